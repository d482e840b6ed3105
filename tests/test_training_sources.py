"""Training, evaluation and prediction on sources that are no folders."""

import numpy as np
import pytest
from PIL import Image

import vitreous
from vitreous.data import load_dataset
from vitreous.errors import DataError
from vitreous.training.planning import fit_to_images, random_start, say_plan, settle_recipe
from vitreous.training.progress import Reporter
from vitreous.training.recipe import Recipe

SMALL = {"model": "vit_pico_patch4_32", "image_size": (8, 8), "batch_size": 8, "num_channels": 3, "epochs": 2}


@pytest.fixture(scope="module")
def tags(tmp_path_factory):
    """30 images, red, green, both or neither."""
    root = tmp_path_factory.mktemp("tags")
    lines = ["path,tags"]
    for i in range(30):
        is_red, is_green = i % 2 == 0, i % 3 == 0
        pixels = np.zeros((8, 8, 3), "uint8")
        pixels[..., 0], pixels[..., 1] = 200 * is_red + i, 200 * is_green + i
        Image.fromarray(pixels).save(root / f"{i}.png")
        lines.append(f"{i}.png,{'|'.join(['red'] * is_red + ['green'] * is_green)}")
    (root / "tags.csv").write_text("\n".join(lines))
    return root / "tags.csv"


def test_several_labels_from_training_to_prediction(tags, tmp_path):
    run = vitreous.train(tags, label_separator="|", test_fraction=0.3, out=tmp_path / "run", **SMALL)
    assert run.class_names == ("green", "red") and run.is_multi_label
    assert run.config["data"]["split"]["label_separator"] == "|" and run.config["data"]["root"] == str(tags)
    measured = vitreous.evaluate(run)
    assert measured["split"] == "test" and measured["loss"] == run.metrics["test"]["loss"]
    assert vitreous.evaluate(run, tags, split="all")["num_examples"] == 30
    predictions = vitreous.predict(run, tags)
    assert [prediction.path for prediction in predictions] == [f"{i}.png" for i in range(30)]
    single = tags.with_name("single.csv")
    single.write_text("path,tags\n0.png,red\n3.png,green\n")
    assert vitreous.evaluate(run, single)["num_examples"] == 2
    folder = tmp_path / "classes"
    for name, number in (("red", 2), ("green", 3)):
        (folder / name).mkdir(parents=True)
        (folder / name / "1.png").write_bytes(tags.with_name(f"{number}.png").read_bytes())
    assert vitreous.evaluate(run, folder)["num_examples"] == 2


def test_one_label_is_not_measured_on_several(tags, tmp_path):
    single = tags.with_name("one.csv")
    rows = [f"{i}.png,{'red' if i % 2 == 0 else 'other'}" for i in range(30)]
    single.write_text("\n".join(["path,tags", *rows]))
    run = vitreous.train(single, out=tmp_path / "run", **SMALL)
    tags.with_name("two.csv").write_text("path,tags\n0.png,red|other\n1.png,other\n")
    with pytest.raises(DataError, match=r"Expected one label an image, as the model was trained with\."):
        vitreous.evaluate(run, tags.with_name("two.csv"), label_separator="|")
    with pytest.raises(DataError, match=r"Expected the data as it was in training\. Received: other files"):
        single.write_text("\n".join(["path,tags", *rows[:-1]]))
        vitreous.evaluate(run)


def plan_of(dataset):
    class Lines(Reporter):
        def note(self, text):
            lines.append(text)

        warn = note

    lines = []
    name, recipe = settle_recipe(None, dataset, SMALL)
    say_plan(Lines(), dataset, name, recipe, random_start(recipe, len(dataset.class_names)), "float32")
    return [line.strip() for line in lines]


def test_the_plan_says_once_what_is_left_out(tags, tmp_path):
    table = tags.with_name("gaps.csv")
    rows = [f"{i}.png,{'' if i < 4 else ('red', 'other')[i % 2]}" for i in range(30)]
    table.write_text("\n".join(["path,tags", *rows]))
    plan = plan_of(load_dataset(table))
    assert "4 images without a label are left out" in plan
    assert not [line for line in plan if "passed over" in line]
    for i in range(6):
        place = tmp_path / "ab"[i % 2] / f"{i}.png"
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(tags.with_name(f"{i}.png").read_bytes())
    (tmp_path / "readme.txt").write_text("")
    dataset = load_dataset(tmp_path)
    assert [line for line in plan_of(dataset) if "passed over" in line] == ["1 file passed over: 1 .txt"]
    dataset.notes.clear()
    assert [line for line in plan_of(dataset) if "passed over" in line] == ["1 file without an image passed over"]


def test_fewer_images_than_parts_of_a_batch():
    """One batch with room to spare, and no division by its size of 0."""
    recipe = Recipe(model="vit_pico_patch2_8", epochs=1, batch_size=64, num_parts=8)
    assert [fit_to_images(recipe, count).batch_size for count in (5, 8, 20, 100)] == [8, 8, 16, 64]
