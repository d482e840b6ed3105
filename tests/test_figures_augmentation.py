import zipfile

import numpy as np
import pytest
from PIL import Image

from vitreous.cli import main
from vitreous.data import ImageSet
from vitreous.data.images import resize_image
from vitreous.data.transforms import augment_image, example_generator
from vitreous.errors import ConfigError, DataError
from vitreous.figures import augmentation
from vitreous.figures.augmentation import describe_target, draw_augmentation
from vitreous.spec import AugmentConfig, InputSpec

SPEC = InputSpec(image_size=24)
MIXED = AugmentConfig(mixup_alpha=0.8, policy="rand")


def images(count=12, channels=3):
    arrays = np.random.default_rng(0).integers(0, 256, (count, 30, 40, channels), dtype="uint8")
    return ImageSet([str(i) for i in range(count)], np.arange(count) % 3, arrays=arrays)


@pytest.fixture
def seen(monkeypatch):
    """What was shown and written."""
    shown, written = [], []
    show, write = augmentation.show, augmentation.write
    monkeypatch.setattr(augmentation, "show", lambda axis, pixels: shown.append(pixels) or show(axis, pixels))
    monkeypatch.setattr(
        augmentation,
        "write",
        lambda figure, x, y, text, **style: written.append(text) or write(figure, x, y, text, **style),
    )
    return shown, written


def test_the_picture_shows_what_training_sees(tmp_path, seen):
    shown, written = seen
    path = draw_augmentation(images(), SPEC, MIXED, out=tmp_path / "a.png", class_names=["cat", "dog", "owl"], seed=4)
    with Image.open(path) as file:
        assert file.size[0] > 1000
    assert len(shown) == 16 + 8
    assert np.array_equal(shown[0], resize_image(images().load(0), SPEC))
    for epoch in range(15):
        expected = augment_image(images().load(0), SPEC, MIXED, example_generator(4, epoch, 0))
        assert np.array_equal(shown[1 + epoch], expected)
    assert "One image, in several epochs" in written and "A batch, mixed, with its targets" in written
    assert any(text.startswith(("cat 0.", "dog 0.", "owl 0.")) for text in written)


@pytest.mark.parametrize("channels", [1, 3])
def test_one_image_has_no_batch(tmp_path, seen, channels):
    spec = InputSpec(image_size=(16, 24), num_channels=channels, mean=(0.5,) * channels, std=(0.5,) * channels)
    draw_augmentation(images(1, channels), spec, MIXED, out=tmp_path / "a.svg")
    assert len(seen[0]) == 16


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (np.int32(1), "dog"),
        (np.int32(-1), ""),
        (np.array([0, 1.0, 0]), "dog"),
        (np.array([0.25, 0, 0.75]), "3 0.75\ncat 0.25"),
        (np.array([0.0, 0, 0]), "none"),
        (np.array([1.0, 1.0, 1.0]), "cat\ndog +1"),
    ],
)
def test_targets(target, text):
    assert describe_target(target, ["cat", "dog"]).replace("2 0.75", "3 0.75") == text


def test_errors(tmp_path):
    with pytest.raises(ConfigError, match=r"Cannot write the figure\."):
        draw_augmentation(images(), SPEC, MIXED, out=tmp_path / "a.txt")
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"Expected at least one image that can be read\. Received: 1 images\."):
        draw_augmentation(ImageSet(["x.png"], [0], root=tmp_path), SPEC, MIXED, out=tmp_path / "a.png")


def run(*arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


def test_command(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(10):
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), "uint8")).save(tmp_path / "data" / name / f"{i}.png")
    out = tmp_path / "out.png"
    assert (
        run("augment", tmp_path / "data", "--augment.cutmix-alpha", 1, "--augment.policy", "three", "--out", out) == 0
    )
    assert out.exists() and str(out) in capsys.readouterr().out
    assert run("augment", tmp_path / "data" / "cat" / "0.png", "--recipe", "photos", "--out", tmp_path / "b.png") == 0
    assert (tmp_path / "b.png").exists()
    (tmp_path / "bad.png").write_bytes(b"no image")
    assert run("augment", tmp_path / "bad.png") == 2
    assert "bad.png" in capsys.readouterr().err


def test_command_knows_pictures_by_their_suffix(tmp_path, capsys):
    """Another file is a source of images: a zip here."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 40, 40, 3), "uint8")
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(tmp_path / "image.png")
            archive.write(tmp_path / "image.png", f"{('cat', 'dog')[i % 2]}/{i}.png")
    assert run("augment", tmp_path / "data.zip", "--recipe", "photos", "--out", tmp_path / "a.png") == 0
    (tmp_path / "notes.txt").write_text("no image")
    assert run("augment", tmp_path / "notes.txt", "--out", tmp_path / "b.png") == 2
    assert "Received: a file of another kind." in capsys.readouterr().err
