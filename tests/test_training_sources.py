"""Training, evaluation and prediction on sources that are no folders."""

import numpy as np
import pytest
from PIL import Image

import vitreous
from vitreous.errors import DataError

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
