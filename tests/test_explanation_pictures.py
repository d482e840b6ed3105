"""Explanations of a trained model: whether they point at what decides, how faithful they are, pictures, commands."""

import json
import shutil

import keras
import numpy as np
import pytest
import tomli_w
from PIL import Image

import vitreous
from vitreous.cli.look import _stems
from vitreous.data import ImageSet
from vitreous.errors import ConfigError, MissingPathError, RunError, WeightsError
from vitreous.explanation import (
    METHODS,
    Explainer,
    Faithfulness,
    draw_explanation,
    draw_faithfulness,
    load_explainer,
    locate_model,
    measure_faithfulness,
)
from vitreous.explanation.faithfulness import Curves
from vitreous.figures.explanation import Panel, colour_map, draw_panels, lay_over, tile
from vitreous.model import VisionTransformer, normalize_images
from vitreous.patches import PatchGrid
from vitreous.spec import InputSpec, ViTConfig

SPEC = InputSpec(image_size=32)
NAMES = ("red", "green", "blue", "none")
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 40), "blue": (40, 40, 220)}
CONFIG = ViTConfig(image_size=32, patch_size=8, projection_dim=32, num_blocks=2, num_heads=4, num_classes=4)


def make_images(count, seed, *, has_none=False):
    """Grey noise in which one patch has a colour, which is the class; returns images, classes and the patches' places.

    Each patch has a brightness of its own, so that colour alone tells. With `has_none`, every fourth image has no such
    patch and is a class of its own, so that no class can be told by what is missing.
    """
    generator = np.random.default_rng(seed)
    images = np.repeat(generator.uniform(40, 215, (count, 4, 4, 1, 1, 1)), 3, axis=5)
    images = images + generator.normal(0, 15, (count, 4, 4, 8, 8, 3))
    labels, places = generator.integers(0, 3, count), generator.integers(0, 16, count)
    rows, columns = np.divmod(places, 4)
    patches = np.array(list(COLOURS.values()))[labels][:, None, None] + generator.normal(0, 15, (count, 8, 8, 3))
    has_colour = np.arange(count) % 4 > 0 if has_none else np.ones(count, bool)
    images[has_colour, rows[has_colour], columns[has_colour]] = patches[has_colour]
    labels[~has_colour] = 3
    images = images.transpose(0, 1, 3, 2, 4, 5).reshape(count, 32, 32, 3)
    return np.clip(images, 0, 255).astype("uint8"), labels, places


@pytest.fixture(scope="module")
def trained():
    """A model that knows the colours, in seconds."""
    keras.utils.set_random_seed(0)
    model = VisionTransformer(CONFIG)
    model.compile(keras.optimizers.AdamW(3e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    images, labels, _ = make_images(1600, 0, has_none=True)
    model.fit(normalize_images(images, SPEC), labels, batch_size=50, epochs=6, verbose=0)
    return Explainer(model, input_spec=SPEC, class_names=NAMES)


@pytest.fixture(scope="module")
def run_folder(trained, tmp_path_factory):
    """The same as a run folder."""
    folder = tmp_path_factory.mktemp("runs") / "colours"
    folder.mkdir()
    trained.model.save(folder / "model.keras")
    split = {"seed": 0}
    data = {"name": "colours", "root": "(from Python)", "fingerprint": "", "class_names": list(NAMES), "split": split}
    config = {"format": 1, "seed": 0, "input": SPEC.to_dict(), "data": data}
    (folder / "config.toml").write_text(tomli_w.dumps(config))
    (folder / "metrics.json").write_text("{}")
    return folder


def test_relevance_points_at_the_patch_that_decides(trained):
    images, labels, places = make_images(60, 1)
    answers = trained.predict(images).argmax(axis=1)
    assert (answers == labels).mean() >= 0.98
    hits = {"relevance": 0, "occlusion": 0}
    for image, place in zip(images, places, strict=True):
        for found in trained.explain(image, methods=list(hits)):
            hits[found.method] += int(found.values().argmax()) == place
    assert all(count >= 54 for count in hits.values()), hits  # 90%


def test_relevance_is_of_the_class(trained):
    """In an image with two colours, a patch has more of the relevance for its own class than for the other."""
    images, labels, places = make_images(20, 2)
    right = 0
    for image, label, place in zip(images, labels, places, strict=True):
        other, elsewhere = (label + 1) % 3, (place + 5) % 16
        y, x = 8 * (elsewhere // 4), 8 * (elsewhere % 4)
        image[y : y + 8, x : x + 8] = list(COLOURS.values())[other]
        first, second = (
            trained.explain(image, methods=["relevance"], target=int(target))[0].values() for target in (label, other)
        )
        first, second = first / first.sum(), second / second.sum()
        right += int(first[place] > second[place]) + int(second[elsewhere] > first[elsewhere])
    assert right >= 36  # of 40


def test_faithfulness_against_random(trained):
    images, _, _ = make_images(8, 3)
    names = [str(i) for i in range(8)]
    calls = []
    found = measure_faithfulness(
        trained, images, methods=["relevance"], num_random=4, on_progress=lambda *x: calls.append(x)
    )
    again = measure_faithfulness(trained, ImageSet(names, arrays=images), methods=["relevance"], num_random=4)
    assert found.to_dict() == again.to_dict()
    relevance, random = found.curves["relevance"], found.curves["random"]
    assert relevance.deletion_area < random.deletion_area - 0.1
    assert relevance.insertion_area > random.insertion_area + 0.05
    for curves in (relevance, random):
        assert curves.deletion.shape == curves.insertion.shape == (17,)
        np.testing.assert_allclose(curves.deletion[[0, -1]], curves.insertion[[-1, 0]], atol=1e-5)
    np.testing.assert_allclose(relevance.deletion[0], random.deletion[0], atol=1e-5)
    assert calls[-1] == (8, 8)
    assert (found.num_images, found.num_random, found.fill) == (8, 4, "mean")


class Known(Explainer):
    """Answers with the brightness of the first patch: of 4 x 4 patches, one decides."""

    def predict(self, images):
        bright = images[:, :8, :8].mean(axis=(1, 2, 3)) > 128
        return np.where(bright[:, None], [4.0, -4.0, -4.0, -4.0], [-4.0, 4.0, 4.0, 4.0]).astype("float32")


def test_areas_are_those_of_the_curves(trained):
    known = Known(trained.model, input_spec=SPEC)
    image = np.zeros((32, 32, 3), "uint8")
    image[:8, :8] = 255
    found = measure_faithfulness(known, [image], methods=["occlusion"], num_random=50)
    high, low = (np.exp(z) / (np.exp(z) + 3 * np.exp(-z)) for z in (4, -4))
    expected = np.full(17, low)
    expected[0] = high
    occlusion = found.curves["occlusion"]
    np.testing.assert_allclose(occlusion.deletion, expected, atol=1e-5)
    np.testing.assert_allclose(occlusion.insertion, np.where(np.arange(17) > 0, high, low), atol=1e-5)
    assert occlusion.deletion_area == pytest.approx(low + (high - low) / 32, abs=1e-5)
    assert found.curves["random"].deletion_area == pytest.approx(low + (high - low) / 2, abs=0.12)


def test_faithfulness_needs_maps_and_images(trained):
    with pytest.raises(ConfigError, match=r"Received: 0 images, num_steps=16, num_random=5"):
        measure_faithfulness(trained, [])
    with pytest.raises(ConfigError, match=r"method='pca', but it gives no value for each patch"):
        measure_faithfulness(trained, make_images(1, 0)[0], methods=["pca"])


# ----- pictures


def test_colours_and_overlays():
    values = np.array([[0.0, 1.0], [2.0, -2.0]])
    colours, scale = colour_map(values, is_signed=True)
    assert scale == (-2, 2)
    np.testing.assert_allclose(colours[0, 0], 0.97, atol=0.02)  # nothing is white
    assert colour_map(values)[1] == (-2, 2)
    assert colour_map(np.zeros((2, 2)))[1] == (0, 1)  # a map of zeros has a scale too
    image = np.full((40, 20, 3), 100, "uint8")
    edges = (np.array([0, 10, 40]), np.array([0, 20]))
    pixels, scale = lay_over(image, np.array([[0.0], [3.0]]), edges)
    times = pixels.shape[0] // 40
    assert times == 6 and pixels.shape == (240, 120, 3)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) == 2
    np.testing.assert_array_equal(pixels[10 * times - 1], pixels[0])
    assert (pixels[10 * times] != pixels[0]).any()
    smooth, smooth_scale = lay_over(image, np.array([[0.0], [3.0]]), edges, is_smooth=True)
    assert len(np.unique(smooth.reshape(-1, 3), axis=0)) > 10
    assert smooth_scale[0] >= 0 and smooth_scale[1] <= 3
    sheet = tile(np.zeros((5, 2, 3, 3)), 3)
    assert sheet.shape == (5, 11, 3)
    assert sheet[2].min() == 1


def test_every_method_is_drawn(trained, tmp_path):
    image = make_images(1, 5)[0][0]
    found = trained.explain(image)
    assert [each.method for each in found] == list(METHODS)
    sheet = draw_explanation(found, tmp_path / "sheet.png", name="<b>$x$.png")
    with Image.open(sheet) as opened:
        assert opened.width > 1000
        pixels = np.asarray(opened.convert("RGB"))
    for edge in (pixels[:4], pixels[-4:], pixels[:, :4], pixels[:, -4:]):
        assert edge.min() == 255  # nothing is cut off
    for each in found:
        with Image.open(draw_explanation(each, tmp_path / f"{each.method}.png")) as opened:
            assert min(opened.size) > 200
    with pytest.raises(ConfigError, match=r"Expected at least one\. Received: none"):
        draw_explanation([], tmp_path / "none.png")
    with pytest.raises(ConfigError, match=r"Received: out='.*sheet\.gif'"):
        draw_explanation(found, tmp_path / "sheet.gif")
    with pytest.raises(ConfigError, match="Cannot draw panels"):
        draw_panels([], heading="", out=tmp_path / "none.png")
    long = Panel("a title that is far too long for its place " * 3, np.zeros((9, 90, 3)), "words " * 60)
    draw_panels([long], heading="x" * 500, out=tmp_path / "long.svg")


def test_curves_are_drawn(tmp_path):
    curve = Curves(np.linspace(1, 0, 5), np.linspace(0, 1, 5), 0.5, 0.5)
    found = Faithfulness({"relevance": curve, "random": curve}, 1, 3, "blur")
    text = draw_faithfulness(found, tmp_path / "curves.svg", name="a run").read_text()
    assert "a run, 1 image, patches replaced by the blur" in text


# ----- models by name, and the command line


def test_models_by_name(run_folder, tmp_path):
    for source in (run_folder, run_folder / "model.keras", str(run_folder)):
        explainer = load_explainer(source)
        assert explainer.class_names == NAMES
    alone = tmp_path / "alone.keras"
    alone.write_bytes((run_folder / "model.keras").read_bytes())
    assert load_explainer(alone).class_names == ()
    assert locate_model("vit_tiny_patch16_224") == "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    with pytest.raises(MissingPathError, match="Received: 'nowhere', which does not exist"):
        locate_model("nowhere")
    with pytest.raises(WeightsError, match="Cannot load the weights of vit_pico_patch2_8"):
        locate_model("vit_pico_patch2_8")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text("format = 1")
    with pytest.raises(RunError, match=r"missing model\.keras, metrics\.json"):
        locate_model(tmp_path / "run")
    with pytest.raises(ConfigError, match="Pass the model's own, or create the model with has_dynamic_size=True"):
        load_explainer(run_folder, image_size=64)
    warm = tmp_path / "warm"
    shutil.copytree(run_folder, warm)
    (warm / "metrics.json").write_text('{"calibration": {"temperature": 4.0}}')
    cool, calm = (load_explainer(folder) for folder in (run_folder, warm))
    logits = np.array([[4.0, 0, 0, 0]])
    np.testing.assert_allclose(calm.probabilities(logits), cool.probabilities(logits / 4), rtol=1e-6)
    found = vitreous.explain(run_folder, make_images(1, 0)[0][0], target="green")
    assert (found.method, found.class_index, found.grid) == ("relevance", 1, PatchGrid(size=(8, 8), strides=(8, 8)))


@pytest.fixture
def pictures(tmp_path):
    images, labels, _ = make_images(3, 6)
    for folder, image in zip(("a", "b", "b"), images, strict=True):
        path = tmp_path / folder / f"{'one' if folder == 'a' or not (tmp_path / 'b').exists() else 'two'}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    return tmp_path, [NAMES[label] for label in labels]


def test_cli(call, run_folder, pictures):
    folder, names = pictures
    out = folder / "out"
    code, text, err = call("explain", run_folder, folder / "a", folder / "b", "--out", out, "--npz")
    assert code == 0, err
    assert sorted(path.name for path in out.iterdir()) == [
        *("one-1.npz", "one-1.png", "one-2.npz", "one-2.png", "two.npz", "two.png"),
    ]
    lines = text.splitlines()
    assert len(lines) == 3
    assert f"{names[0]} " in lines[0] and str(out / "one-1.png") in lines[0]
    with np.load(out / "two.npz") as arrays:
        assert arrays["relevance/map"].shape == (4, 4)
        assert arrays["attention/attention"].shape == (2, 4, 17, 17)
        assert arrays["image"].shape == (32, 32, 3)


def test_cli_json_and_faithfulness(call, run_folder, pictures):
    folder, _ = pictures
    arguments = ("explain", run_folder, folder / "b", "--method", "relevance", "rollout", "--class", "blue")
    code, text, _ = call(*arguments, "--faithfulness", "--num-random", 2, "--out", folder / "out", "--json")
    assert code == 0
    answer = json.loads(text)
    first = answer["images"][0]
    assert first["class"] == "blue"
    assert [each["method"] for each in first["explanations"]] == ["relevance", "rollout"]
    assert np.array(first["explanations"][0]["map"]).shape == (4, 4)
    assert set(answer["faithfulness"]["methods"]) == {"relevance", "rollout", "random"}
    assert {path.name for path in (folder / "out").iterdir()} >= {"faithfulness.png", "one-relevance.png"}
    code, text, _ = call(*arguments, "--faithfulness", "--num-random", 2, "--out", folder / "out")
    assert "Faithfulness on 2 images, patches replaced by the mean colour, against the mean of 2 random" in text
    assert text.count("\nrandom ") == 1


def test_cli_leaves_out_what_cannot_be_read(call, run_folder, pictures, tmp_path):
    folder, _ = pictures
    mixed, out = tmp_path / "mixed", tmp_path / "out"
    mixed.mkdir()
    (mixed / "bad.png").write_bytes((folder / "a" / "one.png").read_bytes()[:300])
    arguments = ("--method", "patches", "--out", out)
    code, text, err = call("explain", run_folder, mixed, *arguments)
    assert (code, text) == (2, "") and "Expected at least one image that can be read. Received: 1 that cannot" in err
    (mixed / "good.png").write_bytes((folder / "a" / "one.png").read_bytes())
    code, text, err = call("explain", run_folder, mixed, *arguments)
    assert code == 0 and f"Warning: left out {mixed / 'bad.png'}: a truncated image" in err
    assert text.startswith(f"{mixed / 'good.png'}: ") and [path.name for path in out.iterdir()] == ["good-patches.png"]
    code, _, err = call("explain", run_folder, mixed / "bad.png", mixed / "good.png", *arguments)
    assert code == 2 and "Cannot read the image" in err


def test_each_image_has_a_file_of_its_own():
    names = ["a/x.png", "b/x.png", "x-1.png", "x-2.jpg", "y:z.png"]
    assert _stems(names) == ["x-1-2", "x-2-2", "x-1", "x-2", "y_z"]


def test_cli_page(call, run_folder, pictures):
    folder, names = pictures
    page = folder / "page.html"
    arguments = ("explain", run_folder, folder / "a" / "one.png", "--html", page, "--class", "none")
    code, text, err = call(*arguments)
    assert code == 0, err
    assert text.startswith(f"{folder / 'a' / 'one.png'}: {names[0]} ") and f"Wrote {page}" in err
    assert not (folder / "explanations").exists()
    html = page.read_text(encoding="utf-8")
    data = html.partition('id="look-data">')[2].partition("</script>")[0]
    found = json.loads(data)
    assert found["name"] == "one.png" and found["look"]["predictions"][0]["class"] == names[0]
    assert set(found["look"]["relevance"]) == set(NAMES)  # the three most probable ones, and the one that was asked for
    code, text, _ = call(*arguments, "--json")
    answer = json.loads(text)["images"][0]
    assert (code, answer["class"], answer["files"]) == (0, names[0], [str(page)])


def test_cli_wrong_input(call, run_folder, pictures):
    folder, _ = pictures
    image = folder / "a" / "one.png"
    for arguments, text in (
        (("nowhere", image), "Received: 'nowhere', which does not exist"),
        ((run_folder, folder / "none.png"), "none.png"),
        ((run_folder, image, "--class", "pink"), "Unknown class. Received: class='pink'"),
        ((run_folder, image, "--out", image), "Expected a folder. Received: a file"),
        ((run_folder, image, "--method", "magic"), "magic"),
        ((run_folder, image, "--block", "7"), "Received: block=7"),
        ((run_folder, image, "--faithfulness", "--method", "pca"), "it gives no value for each patch"),
        (
            (run_folder, folder / "b", "--html", folder / "x.html"),
            "Expected one image with --html. Received: 2 images.",
        ),
        ((run_folder, image, "--html", folder / "x.html", "--npz", "--head", "0"), "Received: --head, --npz. Leave"),
        ((run_folder, image, "--html", folder / "none" / "x.html"), "Pass another --html."),
        ((run_folder, image, "--html", folder / "x.html", "--class", "pink"), "Received: class='pink'"),
    ):
        code, out, err = call("explain", *arguments)
        assert (code, out) == (2, ""), (arguments, out)
        last = err.splitlines()[-1]
        assert text in last and last.startswith("Error: "), err
