import html
import math
import threading
import warnings
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from vitreous.errors import ConfigError, MissingPathError
from vitreous.figures import (
    GAP,
    compose_mosaic,
    draw_confusion,
    draw_curves,
    draw_labels,
    draw_patches,
    draw_predictions,
    draw_reconstruction,
    shorten,
)
from vitreous.patches import PatchGrid, extract_patches

ORANGE_RED = (0xD5, 0x5E, 0x00)  # the frame
HOSTILE = ["$x_1$", "<b>", r"$\frac{$", "two\nlines", "a & b", "%s {} \\"]


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype="uint8")


def read(path):
    with Image.open(path) as opened:
        assert opened.format == "PNG"
        return np.asarray(opened.convert("RGB"))


def texts(path):
    """The texts of an SVG: Matplotlib writes each as a comment above its outlines."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    root = ElementTree.parse(path, parser).getroot()
    return [" ".join(html.unescape(node.text or "").split()) for node in root.iter() if node.tag is ElementTree.Comment]


def mosaic_by_hand(image, grid, enlarged, gap):
    """Patches pasted one by one, with gaps between them."""
    patches = extract_patches(image[None], grid)[0]
    rows, columns, height, width = patches.shape[:4]
    cell = (height * enlarged, width * enlarged)
    canvas = np.full((rows * (cell[0] + gap) - gap, columns * (cell[1] + gap) - gap, 3), GAP, "uint8")
    for row in range(rows):
        for column in range(columns):
            y, x = row * (cell[0] + gap), column * (cell[1] + gap)
            patch = patches[row, column].repeat(enlarged, axis=0).repeat(enlarged, axis=1)
            canvas[y : y + cell[0], x : x + cell[1]] = patch
    return canvas


GRIDS = {
    "tiling": PatchGrid(size=(6, 6), strides=(6, 6)),
    "oblong": PatchGrid(size=(8, 3), strides=(8, 3)),
    "overlapping": PatchGrid(size=(8, 8), strides=(4, 5)),
    "dilated": PatchGrid(size=(3, 4), strides=(2, 5), dilation_rate=(3, 2)),
    "same": PatchGrid(size=(7, 9), strides=(5, 7), padding="same"),
    "apart": PatchGrid(size=(2, 2), strides=(8, 9)),
    "one": PatchGrid(size=(24, 36), strides=(1, 1)),
}


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_mosaic_holds_every_patch_with_gaps(image, grid):
    mosaic, cell, step = compose_mosaic(image, grid, small_pixels=150)
    enlarged = round(cell[0] / grid.size[0])
    gap = round(step[0] - cell[0])
    assert enlarged >= 1
    assert gap >= 1
    assert cell == (grid.size[0] * enlarged, grid.size[1] * enlarged)
    assert step == (cell[0] + gap, cell[1] + gap)
    np.testing.assert_array_equal(mosaic, mosaic_by_hand(image, grid, enlarged, gap))


@pytest.mark.parametrize("name", ["tiling", "overlapping", "dilated", "same"])
def test_large_mosaic_is_the_mean_of_what_it_replaces(image, name):
    grid = GRIDS[name]
    whole = mosaic_by_hand(image, grid, 1, 1).astype("float64")
    mosaic, cell, step = compose_mosaic(image, grid, small_pixels=1, large_pixels=20)
    factor = math.ceil(max(whole.shape[:2]) / 20)
    assert factor > 1
    assert max(mosaic.shape) <= 20
    height, width = (math.ceil(length / factor) for length in whole.shape[:2])
    expected = [
        [whole[y * factor : (y + 1) * factor, x * factor : (x + 1) * factor].mean(axis=(0, 1)) for x in range(width)]
        for y in range(height)
    ]
    assert mosaic.shape == (height, width, 3)
    np.testing.assert_allclose(mosaic, expected, atol=0.51)
    assert cell == pytest.approx((grid.size[0] / factor, grid.size[1] / factor))
    assert step == pytest.approx(((grid.size[0] + 1) / factor, (grid.size[1] + 1) / factor))


def test_a_million_patches_stay_small():
    image = np.zeros((1000, 1000, 3), "uint8")
    mosaic, _, step = compose_mosaic(image, PatchGrid(size=(16, 16), strides=(1, 1)))
    assert max(mosaic.shape) <= 1000
    assert step[0] * 985 == pytest.approx(mosaic.shape[0], abs=1)


def test_draw_patches_shows_image_and_patches_pixel_by_pixel(tmp_path, image):
    out = tmp_path / "folder" / "patches.png"
    assert draw_patches(image, patch_size=6, out=out) == out
    mosaic, cell, step = compose_mosaic(image, GRIDS["tiling"])
    picture = read(out)
    # Right of the image, below the titles, the mosaic stands pixel for pixel; the frame covers the middle patch's rim.
    height, width = mosaic.shape[:2]
    found = picture[34 : 34 + height, -24 - width : -24]
    is_framed = (found == ORANGE_RED).all(axis=2)
    y, x, cell = round(2 * step[0]), round(3 * step[1]), (round(cell[0]), round(cell[1]))
    around = np.zeros((height, width), dtype=bool)
    around[y - 4 : y + cell[0] + 4, x - 4 : x + cell[1] + 4] = True
    assert is_framed.any()
    assert not is_framed[~around].any()
    np.testing.assert_array_equal(found[~around], mosaic[~around])
    inside = np.s_[y + 4 : y + cell[0] - 4, x + 4 : x + cell[1] - 4]
    np.testing.assert_array_equal(found[inside], mosaic[inside])
    # The image is as high as its patches, with margins of 24, 44 between the two and 24 pixels.
    assert picture.shape == (34 + height + 62, 24 + round(36 * height / 24) + 44 + width + 24, 3)
    assert [path.name for path in out.parent.iterdir()] == ["patches.png"]


def test_draw_patches_puts_a_wide_image_above_its_patches(tmp_path):
    image = np.full((16, 128, 3), 90, "uint8")
    mosaic, _, _ = compose_mosaic(image, PatchGrid(size=(16, 16), strides=(16, 16)))
    picture = read(draw_patches(image, patch_size=16, out=tmp_path / "wide.png"))
    assert picture.shape == (
        34 + round(16 * mosaic.shape[1] / 128) + 44 + mosaic.shape[0] + 62,
        mosaic.shape[1] + 48,
        3,
    )


@pytest.mark.parametrize(
    ("arguments", "caption"),
    [
        ({"patch_size": 6}, "image 24 × 36 × 3 · patch 6 × 6 · stride 6 × 6 · padding valid"),
        ({"patch_size": (8, 12), "strides": (4, 6)}, "image 24 × 36 × 3 · patch 8 × 12 · stride 4 × 6 · padding valid"),
        (
            {"patch_size": 5, "dilation_rate": 2, "strides": 3, "padding": "same"},
            "image 24 × 36 × 3 · patch 5 × 5 · stride 3 × 3 · dilation 2 × 2 · padding same · faded: in no patch",
        ),
        (
            {"patch_size": 7, "image_size": 32},
            "image 32 × 32 × 3 · patch 7 × 7 · stride 7 × 7 · padding valid · faded: in no patch",
        ),
    ],
)
def test_draw_patches_says_what_it_shows(tmp_path, image, arguments, caption):
    out = draw_patches(image, out=tmp_path / "patches.svg", **arguments)
    assert caption in texts(out)


def test_draw_patches_counts_patches_and_values(tmp_path):
    out = draw_patches(np.zeros((28, 28), "uint8"), patch_size=7, out=tmp_path / "grey.svg")
    assert {
        "16 patches of 49 values",
        "4 × 4 patches",
        "image 28 × 28 × 1 · patch 7 × 7 · stride 7 × 7 · padding valid",
    } <= {*texts(out)}
    out = draw_patches(np.zeros((120, 120, 3), "uint8"), patch_size=2, out=tmp_path / "many.svg")
    assert {"3,600 patches of 12 values", "60 × 60 patches"} <= {*texts(out)}


def test_draw_patches_reads_files_and_takes_floats(tmp_path, image):
    Image.fromarray(image).save(tmp_path / "image.png")
    from_file = draw_patches(tmp_path / "image.png", patch_size=6, out=tmp_path / "a.png")
    from_text = draw_patches(str(tmp_path / "image.png"), patch_size=6, out=str(tmp_path / "b.png"))
    from_array = draw_patches(image, patch_size=6, out=tmp_path / "c.png")
    from_floats = draw_patches(image / 255, patch_size=6, out=tmp_path / "d.png")
    assert from_file.read_bytes() == from_text.read_bytes() == from_array.read_bytes() == from_floats.read_bytes()
    with pytest.raises(MissingPathError, match="absent"):
        draw_patches(tmp_path / "absent.png", patch_size=6, out=tmp_path / "e.png")


@pytest.mark.parametrize(
    ("image", "arguments", "message"),
    [
        (np.zeros((2, 8, 8, 3), "uint8"), {}, r"Received: shape=\(2, 8, 8, 3\), dtype=uint8"),
        (np.zeros((8, 8, 4), "uint8"), {}, r"Expected uint8 or floating point of shape \(H, W\), "),
        (np.zeros((8, 8), "int64"), {}, "dtype=int64"),
        (np.full((8, 8, 3), 1.5), {}, r"Expected floating point values in \[0, 1\]. Received: values from 1.5 to 1.5"),
        (np.full((8, 8, 3), np.nan), {}, "Received: values from nan to nan"),
        (np.zeros((8, 8), "uint8"), {"patch_size": 9}, "Expected an image of at least"),
        (np.zeros((8, 8), "uint8"), {"patch_size": 0}, "Cannot use patch_size"),
        (np.zeros((8, 8), "uint8"), {"strides": 0}, "Cannot use strides"),
        (np.zeros((8, 8), "uint8"), {"padding": "full"}, "Expected 'valid' or 'same'. Received: padding='full'"),
        (np.zeros((8, 8), "uint8"), {"out": "x.jpg"}, "ends in .png, .svg, .pdf. Received: out='x.jpg'"),
    ],
)
def test_draw_patches_refuses(tmp_path, monkeypatch, image, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        draw_patches(image, **{"patch_size": 2, "out": "x.png", **arguments})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path, image, monkeypatch):
    out = draw_patches(image, patch_size=6, out=tmp_path / "patches.png")
    before = out.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("vitreous.files.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        draw_patches(image, patch_size=12, out=out)
    assert out.read_bytes() == before
    assert list(tmp_path.iterdir()) == [out]


def test_drawing_works_in_threads(tmp_path, image):
    failures = []

    def draw(index):
        try:
            draw_patches(image, patch_size=6, out=tmp_path / f"{index}.png")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=draw, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_curves_show_what_is_there(tmp_path):
    history = {
        "epoch": [1, 2, 3],
        "loss": [2.0, 1.0, 0.5],
        "val_loss": [2.1, 1.2, 1.4],
        "val_accuracy": [0.2, None, 0.625],
        "learning_rate": [1e-3, 5e-4, 0.0],
        "epoch_seconds": [3.0, 3.0, 3.0],
    }
    found = texts(draw_curves(history, tmp_path / "curves.svg"))
    assert {"loss: lowest 1.2, epoch 2", "accuracy: highest 62.5%, epoch 3", "learning rate"} <= {*found}
    assert {"training", "validation"} <= {*found}
    assert "epoch_seconds" not in " ".join(found)
    assert read(draw_curves(history, tmp_path / "curves.png")).shape == (360, 1140, 3)


MEASURED = "training: augmented images, current weights · validation: clean images, averaged weights"


def test_curves_say_what_our_training_measures(tmp_path):
    """Not of a Keras history, where it would not be true, and not where there is nothing to compare."""
    ours = {"train_loss": [2.0, 1.0], "val_loss": [1.5, 1.2]}
    assert MEASURED in texts(draw_curves(ours, tmp_path / "ours.svg"))
    picture = read(draw_curves(ours, tmp_path / "ours.png"))
    assert (picture[:, [0, 8, -9, -1]] == 255).all()  # the line fits into the narrowest figure
    assert picture[335:355].min() < 200
    for other in ({"loss": [2.0, 1.0], "val_loss": [1.5, 1.2]}, {"train_loss": [2.0]}):
        assert MEASURED not in texts(draw_curves(other, tmp_path / "other.svg"))


def test_curves_take_the_names_of_keras_and_of_history_csv(tmp_path):
    values = {"loss": [3.0, 2.0], "accuracy": [0.1, 0.2]}
    ours = {f"train_{name}": column for name, column in values.items()}
    first, second = (draw_curves(columns, tmp_path / "curves.png").read_bytes() for columns in (values, ours))
    assert first == second


@pytest.mark.parametrize("name", ["loss", "val_loss", "train_accuracy", "val_accuracy", "learning_rate"])
def test_curves_draw_one_column_and_one_epoch(tmp_path, name):
    out = draw_curves({name: [0.5]}, tmp_path / "curves.png")
    width = 300 if name == "learning_rate" else 480
    picture = read(out)
    assert picture.shape == (360, width, 3)
    color = (0xD5, 0x5E, 0x00) if name.startswith("val_") else (0x00, 0x72, 0xB2)
    assert (picture == color).all(axis=2).any()


def test_curves_refuse_nothing_and_unequal_columns(tmp_path):
    with pytest.raises(ConfigError, match=r"Received: history with \['epoch', 'loss'\]"):
        draw_curves({"epoch": [1], "loss": [None]}, tmp_path / "curves.png")
    with pytest.raises(ConfigError, match="Expected 2 values in each column, one an epoch"):
        draw_curves({"loss": [1.0, 2.0], "val_loss": [1.0]}, tmp_path / "curves.png")
    assert list(tmp_path.iterdir()) == []


def test_confusion_writes_counts_up_to_twenty_classes(tmp_path):
    matrix = np.array([[31, 2, 0], [7, 44, 5], [0, 0, 0]])
    found = texts(draw_confusion(matrix, ["cat", "dog", "emu"], tmp_path / "confusion.svg"))
    assert {"31", "2", "7", "44", "5", "84.3% of 89 examples right", "truth", "answer"} <= {*found}
    assert [found.count(name) for name in ("cat", "dog", "emu")] == [2, 2, 2]  # once a row, once a column
    many = np.eye(21, dtype=int) * 777
    assert "777" not in texts(draw_confusion(many, [f"c{i}" for i in range(21)], tmp_path / "many.svg"))


def test_confusion_colours_are_shares_of_rows(tmp_path):
    matrix = np.array([[900, 100], [1, 9]])  # equal shares, unequal counts
    picture = read(draw_confusion(matrix, ["a", "b"], tmp_path / "confusion.png"))
    top, left = 48 + 10, np.flatnonzero((picture[58] < 200).all(axis=1))[0] + 10
    first, second = picture[top, left], picture[top + 96, left + 96]
    np.testing.assert_array_equal(first, second)
    wrong, other = picture[top, left + 96], picture[top + 96, left]
    np.testing.assert_array_equal(wrong, other)
    assert first.sum() < wrong.sum()


@pytest.mark.parametrize("count", [1, 2, 20, 50, 200, 300])
def test_confusion_has_room_for_its_classes(tmp_path, count):
    matrix = np.eye(count, dtype=int)
    names = [f"{index} a rather long name of a class" for index in range(count)]
    picture = read(draw_confusion(matrix, names, tmp_path / "confusion.png"))
    assert min(picture.shape[:2]) >= min(count, 200) * 9
    assert max(picture.shape[:2]) <= 2200
    rim = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    assert (rim == 255).all()  # nothing is cut off


def test_confusion_refuses(tmp_path):
    out = tmp_path / "confusion.png"
    with pytest.raises(ConfigError, match=r"Received: matrix.shape=\(2, 2\), 3 names"):
        draw_confusion(np.eye(2, dtype=int), ["a", "b", "c"], out)
    with pytest.raises(ConfigError, match="Expected counts"):
        draw_confusion(-np.eye(2, dtype=int), ["a", "b"], out)
    with pytest.raises(ConfigError, match="0 names"):
        draw_confusion(np.zeros((0, 0), dtype=int), [], out)
    assert list(tmp_path.iterdir()) == []


def test_predictions_name_answer_and_truth(tmp_path):
    images = [np.full((8, 8), 100, "uint8"), np.full((30, 40, 3), 100, "uint8"), np.full((9, 9, 3), 0.4)]
    arguments = images, [0, 1, 1], [0, 0, 1], [0.98, 0.51, 1.0], ["cat", "dog"]
    found = texts(draw_predictions(*arguments, tmp_path / "predictions.svg"))
    assert {"✓ cat · 98%", "✗ cat · 51%", "truth: dog", "✓ dog · 100%", "a choice of 3 examples: 2 right, 1 wrong"} <= {
        *found
    }
    assert sum(text.startswith("truth:") for text in found) == 1
    picture = read(draw_predictions(*arguments, tmp_path / "predictions.png"))
    assert picture.shape == (40 + 150 + 40 + 18, 3 * 168 + 18, 3)
    framed = (picture[40:191] == ORANGE_RED).all(axis=2).sum(axis=0)
    assert framed[:180].sum() == framed[360:].sum() == 0  # only the mistake, in the middle, has a frame
    assert framed[180:345].max() > 80


def test_predictions_name_several_labels(tmp_path):
    images = [np.full((8, 8), 100, "uint8")] * 3
    truths, answers, shares = [[0, 1], [1], []], [[0, 1], [0], []], [[0.9, 0.8], [0.7], []]
    found = texts(draw_predictions(images, truths, answers, shares, ["sky", "sea"], tmp_path / "p.svg"))
    assert {"✓ sky, sea", "✗ sky", "truth: sea", "✓ (none)", "a choice of 3 examples: 2 right, 1 wrong"} <= {*found}


def test_labels_are_bars_from_best_to_worst(tmp_path):
    metrics = {
        "average_precision": {"sky": 0.5, "sea": 0.9},
        "support": {"sky": 1200, "sea": 3},
        "mean_average_precision": 0.7,
    }
    found = texts(draw_labels(metrics, tmp_path / "labels.svg"))
    assert {"sky (1,200)", "sea (3)", "50.0%", "90.0%", "average precision: mean 70.0%"} <= {*found}
    assert found.index("sea (3)") < found.index("sky (1,200)")
    names = [f"c{i}" for i in range(50)]
    many = {
        "average_precision": {name: i / 50 for i, name in enumerate(names)},
        "support": dict.fromkeys(names, 1),
        "mean_average_precision": 0.5,
    }
    found = texts(draw_labels(many, tmp_path / "many.svg"))
    assert "average precision: mean 50.0%, the lowest 40 of 50 labels" in found
    assert "c39 (1)" in found and "c40 (1)" not in found
    with pytest.raises(ConfigError, match=r"Received: none\. Pass metrics"):
        draw_labels({"average_precision": {}}, tmp_path / "none.png")


def test_predictions_refuse(tmp_path):
    image = np.zeros((4, 4), "uint8")
    with pytest.raises(ConfigError, match="Received: 2 images, 1 truths, 2 answers, 2 probabilities"):
        draw_predictions([image] * 2, [0], [0, 0], [1, 1], ["a"], tmp_path / "p.png")
    with pytest.raises(ConfigError, match="Received: 0 images"):
        draw_predictions([], [], [], [], ["a"], tmp_path / "p.png")
    assert list(tmp_path.iterdir()) == []


def test_names_are_drawn_literally(tmp_path):
    count = len(HOSTILE)
    expected = {" ".join(name.split()) for name in HOSTILE}
    draw_confusion(np.eye(count, dtype=int), HOSTILE, tmp_path / "confusion.png")
    found = texts(draw_confusion(np.eye(count, dtype=int), HOSTILE, tmp_path / "confusion.svg"))
    assert expected <= {*found}
    images, indices = [np.zeros((4, 4), "uint8")] * count, list(range(count))
    wrong = indices[1:] + indices[:1]
    draw_predictions(images, indices, wrong, [0.5] * count, HOSTILE, tmp_path / "predictions.png")
    found = texts(draw_predictions(images, indices, wrong, [0.5] * count, HOSTILE, tmp_path / "predictions.svg"))
    assert {f"✗ {name} · 50%" for name in expected} | {f"truth: {name}" for name in expected} <= {*found}


def test_names_that_no_font_has_do_not_warn(tmp_path, monkeypatch):
    monkeypatch.setattr("vitreous.figures.canvas._families", lambda: ["DejaVu Sans"])
    names = ["日本", "café", "\ue123"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = texts(draw_confusion(np.eye(3, dtype=int), names, tmp_path / "confusion.svg"))
        draw_confusion(np.eye(3, dtype=int), names, tmp_path / "confusion.png")
        draw_predictions([np.zeros((4, 4), "uint8")], [0], [2], [0.5], names, tmp_path / "predictions.png")
        with pytest.raises(UserWarning, match="mine"):  # the filter is gone afterwards
            warnings.warn("mine", UserWarning, stacklevel=1)
    assert {*names} <= {*found}


def test_draw_patches_never_replaces_its_image(tmp_path, image):
    path = tmp_path / "image.png"
    Image.fromarray(image).save(path)
    before = path.read_bytes()
    (tmp_path / "link.png").symlink_to(path)
    for out in (path, str(path), tmp_path / "link.png", tmp_path / "." / "image.png"):
        with pytest.raises(
            ConfigError,
            match=r"Expected another file than the image\. Received: out='.*', which is the image itself\. Pass",
        ):
            draw_patches(path, patch_size=6, out=out)
    assert path.read_bytes() == before


def test_long_names_keep_their_ends():
    assert shorten("cat", 5) == "cat"
    assert shorten("n02123045_tabby_cat", 10) == "n02123…cat"
    assert len(shorten("x" * 99, 12)) == 12
    assert shorten("two\n lines", 20) == "two lines"


def test_reconstruction_has_a_row_for_each_kind(tmp_path):
    images = [np.full((8, 8, 3), level, "uint8") for level in (10, 120)]
    found = texts(draw_reconstruction(images, images, images, tmp_path / "r.svg"))
    assert {"image", "what the", "model sees", "what it", "makes of it"} <= {*found}
    picture = read(draw_reconstruction(images, images, images, tmp_path / "r.png"))
    assert picture.shape == (3 * 140 + 8, 100 + 2 * 140 + 8, 3)
    for row in range(3):
        assert [int(picture[8 + 140 * row + 66, 100 + 140 * column + 66, 0]) for column in (0, 1)] == [10, 120]
    with pytest.raises(ConfigError, match=r"Received: 2 images, 1 seen, 2 filled\. Pass lists"):
        draw_reconstruction(images, images[:1], images, tmp_path / "other.png")
