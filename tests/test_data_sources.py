import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitreous.data import load_evaluation_images
from vitreous.data.image_set import ImageSet
from vitreous.data.sources import list_image_files, load_dataset
from vitreous.errors import ConfigError, DataError, ImageError, MissingPathError


def png(value=0):
    stream = io.BytesIO()
    Image.new("RGB", (5, 4), (value, value, value)).save(stream, "png")
    return stream.getvalue()


PNG = png()


def write(root, *names, data=PNG):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def write_classes(root, **counts):
    for name, count in counts.items():
        write(root, *(f"{name}/{i:03}.png" for i in range(count)))


def counts(dataset):
    num_classes = len(dataset.class_names)
    return {
        split: np.bincount(images.labels, minlength=num_classes).tolist() for split, images in dataset.splits.items()
    }


def names(dataset):
    return {split: images.names for split, images in dataset.splits.items()}


def all_names(dataset):
    return sorted(name for images in dataset.splits.values() for name in images.names)


# Layouts


def test_one_folder_a_class(tmp_path):
    write_classes(tmp_path / "pets", dog=20, cat=40)
    dataset = load_dataset(tmp_path / "pets")
    assert dataset.name == "pets" and dataset.root == tmp_path / "pets"
    assert dataset.class_names == ("cat", "dog")
    assert counts(dataset) == {"train": [32, 16], "val": [4, 2], "test": [4, 2]}
    assert list(dataset.splits) == ["train", "val", "test"]
    assert len(set(all_names(dataset))) == 60
    assert dataset.broken == {} and dataset.num_ignored == 0
    assert dataset.notes == [
        "test is 6 of 60 training images, drawn class by class with seed 0",
        "val is 6 of 54 training images, drawn class by class with seed 0",
    ]
    example = dataset.splits["train"][0]
    assert example.image.shape == (4, 5, 3) and example.label == 0
    assert all(
        name.startswith(dataset.class_names[label])
        for images in dataset.splits.values()
        for name, label in zip(images.names, images.labels, strict=True)
    )


def test_the_seed_decides_what_is_drawn(tmp_path):
    write_classes(tmp_path, a=30, b=30)
    drawn = [names(load_dataset(str(tmp_path), seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_shares(tmp_path):
    write_classes(tmp_path, a=50, b=50)
    assert counts(load_dataset(tmp_path, val_fraction=0.2, test_fraction=0.4)) == {
        "train": [20, 20],
        "val": [10, 10],
        "test": [20, 20],
    }
    dataset = load_dataset(tmp_path, val_fraction=0.0, test_fraction=0.0)
    assert counts(dataset) == {"train": [50, 50]}
    assert dataset.notes[0] == "there is no test split: its share is 0, or every class has one image"
    with pytest.raises(ConfigError, match=r"Expected val_fraction \+ test_fraction below 1\."):
        load_dataset(tmp_path, val_fraction=0.5, test_fraction=0.5)


@pytest.mark.parametrize("split_names", [("train", "val", "test"), ("Training", "VALID", "Testing")])
def test_train_val_test(tmp_path, split_names):
    for split, count in zip(split_names, (4, 2, 3), strict=True):
        write_classes(tmp_path / split, a=count, b=count)
    dataset = load_dataset(tmp_path)
    assert counts(dataset) == {"train": [4, 4], "val": [2, 2], "test": [3, 3]}
    assert dataset.splits["val"].names[0] == f"{split_names[1]}/a/000.png"
    assert dataset.notes == ["train, val and test are as the folders give them"]


@pytest.mark.parametrize("held_out", ["val", "validation", "valid", "dev", "eval", "Evaluation", "test", "TEST"])
def test_train_and_one_held_out_folder(tmp_path, held_out):
    write_classes(tmp_path / "train", a=20, b=20)
    write_classes(tmp_path / held_out, a=3, b=3)
    dataset = load_dataset(tmp_path)
    assert counts(dataset) == {"train": [18, 18], "val": [2, 2], "test": [3, 3]}
    assert all(name.startswith(f"{held_out}/") for name in dataset.splits["test"].names)
    assert all(name.startswith("train/") for name in dataset.splits["val"].names)
    assert dataset.notes[0] == f"test is the folder {held_out}/"


def test_classes_of_held_out_folders_are_enough_to_evaluate(tmp_path):
    write_classes(tmp_path / "train", a=2)
    write_classes(tmp_path / "test", a=3, b=4)
    write(tmp_path, "train/c/broken.png", data=b"no image")
    write(tmp_path, "train/d/notes.txt")
    found = load_evaluation_images(tmp_path, ("c", "b", "a"))
    assert found.split == "test" and sorted(found.images.labels.tolist()) == [1] * 4 + [2] * 3
    assert list(found.broken) == ["train/c/broken.png"]


def test_train_alone(tmp_path):
    write_classes(tmp_path / "train", a=20, b=20)
    write(tmp_path, "labels/readme.txt")
    dataset = load_dataset(tmp_path)
    assert counts(dataset) == {"train": [16, 16], "val": [2, 2], "test": [2, 2]}
    assert "Folders beside the splits passed over: labels" in dataset.notes


def test_held_out_folder_without_class_folders(tmp_path):
    write_classes(tmp_path / "train", a=20, b=20)
    write(tmp_path, "test/1.png", "test/2.png")
    dataset = load_dataset(tmp_path)
    assert counts(dataset) == {"train": [16, 16], "val": [2, 2], "test": [2, 2]}
    assert "test/ is not used: it has 2 images, and none in a class folder" in dataset.notes
    assert dataset.num_ignored == 2


def test_classes_that_are_called_like_splits(tmp_path):
    write_classes(tmp_path, test=10, train=10, bus=10)
    assert load_dataset(tmp_path).class_names == ("bus", "test", "train")


def test_class_folders_may_be_nested_and_held_out_classes_few(tmp_path):
    write(tmp_path, "train/a/x/1.png", "train/a/x/y/2.png", "train/a/3.png", "train/b/1.png", "train/c/1.png")
    write(tmp_path, "val/a/1.png", "test/b/deep/1.png")
    (tmp_path / "test" / "empty").mkdir()
    dataset = load_dataset(tmp_path)
    assert dataset.class_names == ("a", "b", "c")
    assert dataset.splits["train"].names[:3] == ["train/a/3.png", "train/a/x/1.png", "train/a/x/y/2.png"]
    assert counts(dataset) == {"train": [3, 1, 1], "val": [1, 0, 0], "test": [0, 1, 0]}
    assert "1 of 3 classes in train only, having one image: c" in dataset.notes
    assert "1 of 3 classes without a val image: b" in dataset.notes


def test_a_class_with_one_image_is_for_training(tmp_path):
    write_classes(tmp_path, a=20, b=1, c=2)
    dataset = load_dataset(tmp_path)
    assert counts(dataset)["train"][1] == 1
    assert min(counts(dataset)["train"]) >= 1
    assert "1 of 3 classes in train only, having one image: b" in dataset.notes


def test_files_that_do_not_count(tmp_path):
    write_classes(tmp_path, a=5, b=5)
    write(tmp_path, ".DS_Store", "Thumbs.db", "a/.hidden.png", "a/desktop.ini", "__MACOSX/a/1.png", ".git/b/1.png")
    dataset = load_dataset(tmp_path)
    assert len(all_names(dataset)) == 10 and dataset.num_ignored == 0
    write(tmp_path, "readme.txt", "loose.png", "a/note.txt", "b/photo.heic", "b/x/LICENSE")
    dataset = load_dataset(tmp_path)
    assert len(all_names(dataset)) == 10 and dataset.num_ignored == 5
    assert dataset.notes[0] == (
        "5 files passed over: 1 images outside the class folders, 2 .txt, 1 .heic, 1 without a suffix"
    )


def test_suffixes_in_any_case_and_odd_names(tmp_path):
    write(tmp_path, "a/1.PNG", "a/ü ñ.JpG", "b/ä/1.jpeg", "b/2.webp")
    assert len(all_names(load_dataset(tmp_path))) == 4


@pytest.mark.skipif(os.name == "nt", reason="needs links and byte names")
def test_links(tmp_path):
    write_classes(tmp_path / "data", a=5, b=5)
    (tmp_path / "data/a/loop").symlink_to(tmp_path / "data/a")
    (tmp_path / "data/a/up").symlink_to(tmp_path / "data")
    (tmp_path / "data/b/gone.png").symlink_to(tmp_path / "nowhere.png")
    write_classes(tmp_path, elsewhere=3)
    (tmp_path / "data/c").symlink_to(tmp_path / "elsewhere")
    Path(os.fsdecode(os.fsencode(tmp_path / "data/a") + b"/\xff.png")).write_bytes(PNG)
    dataset = load_dataset(tmp_path / "data")
    assert dataset.class_names == ("a", "b", "c")
    assert len(all_names(dataset)) == 14
    assert dataset.broken == {"b/gone.png": "a file that is not there"}
    assert len(dataset.fingerprint) == 64


# Broken files


def test_broken_files(tmp_path):
    write_classes(tmp_path, a=10, b=10)
    write(tmp_path, "a/000.png", data=b"")
    write(tmp_path, "b/005.png", data=b"<html>not found</html>")
    dataset = load_dataset(tmp_path)
    assert dataset.broken == {"a/000.png": "an empty file", "b/005.png": "not an image in a known format"}
    assert len(all_names(dataset)) == 18 and not set(dataset.broken) & set(all_names(dataset))


def test_images_of_a_class_are_decoded_until_one_succeeds(tmp_path):
    write_classes(tmp_path, a=4, b=4)
    write(tmp_path, "a/000.png", "a/001.png", "a/003.png", data=PNG[:45])
    dataset = load_dataset(tmp_path)
    assert set(dataset.broken) == {"a/000.png", "a/001.png"}  # and the search ends with 002
    assert all("truncated" in reason for reason in dataset.broken.values())
    write(tmp_path, "a/002.png", data=PNG[:45])
    with pytest.raises(DataError, match=r"class='a' with 4 image files \(a/000\.png: .*, a/001\.png: .* and 2 more\)"):
        load_dataset(tmp_path)


def test_a_class_without_readable_images(tmp_path):
    write_classes(tmp_path, a=4)
    write(tmp_path, "b/1.png", data=b"")
    with pytest.raises(DataError) as caught:
        load_dataset(tmp_path)
    assert str(caught.value) == (
        f"Cannot use the folder {tmp_path}. Expected a readable training image in every class. "
        "Received: class='b' with 1 image files (b/1.png: an empty file). Add images to this folder, or remove it."
    )
    shutil.rmtree(tmp_path / "b")
    write(tmp_path, "b/notes.txt")
    with pytest.raises(DataError, match=r"Received: class='b' with 0 image files\. Add images"):
        load_dataset(tmp_path)


# Errors of the layout

LAYOUT = "The layout is one folder of images for each class, or train/, val/ and test/ with one folder for each class"


def expect_data_error(root, *parts):
    with pytest.raises(DataError) as caught:
        load_dataset(root)
    message = str(caught.value)
    assert message.startswith(f"Cannot use the folder {root}. Expected ")
    for part in parts:
        assert part in message


def test_empty_folder(tmp_path):
    expect_data_error(tmp_path, "Expected images in class folders. Received: an empty folder.", LAYOUT)
    write(tmp_path, "readme.txt")
    expect_data_error(tmp_path, "Received: an empty folder.")


def test_images_without_class_folders(tmp_path):
    write(tmp_path, "1.png", "2.png")
    expect_data_error(tmp_path, "Received: 2 images that lie in no class folder. Sort them into folders.", LAYOUT)
    shutil.move(tmp_path / "1.png", tmp_path / "train.png")
    write(tmp_path, "train/1.png", "test/2.png")
    expect_data_error(tmp_path, "images that lie in no class folder.")


def test_one_class(tmp_path):
    write_classes(tmp_path, a=3)
    expect_data_error(tmp_path, "Expected at least two classes. Received: classes=['a'].", LAYOUT)
    write_classes(tmp_path / "a", cat=3, dog=3)
    expect_data_error(tmp_path, f"If the classes are the folders in {tmp_path / 'a'}, pass that folder.")


def test_no_training_folder(tmp_path):
    write_classes(tmp_path / "val", a=3, b=3)
    write_classes(tmp_path / "test", a=3, b=3)
    expect_data_error(tmp_path, "a folder train/ beside the others. Received: folders=['test', 'val']. Add train/")


def test_two_folders_for_one_split(tmp_path):
    for split in ("train", "val", "validation"):
        write_classes(tmp_path / split, a=3, b=3)
    expect_data_error(tmp_path, "one folder for val. Received: folders=['val', 'validation']. Rename or merge")


def test_unknown_classes_in_a_held_out_split(tmp_path):
    write_classes(tmp_path / "train", a=3, b=3)
    write_classes(tmp_path / "test", a=3, c=3, B=1)
    expect_data_error(
        tmp_path,
        "the classes of held-out images among those of the training images. Received: unknown classes in test: B, c.",
        "Rename or remove these folders",
    )


def test_missing_paths(tmp_path, monkeypatch):
    with pytest.raises(MissingPathError) as caught:
        load_dataset("digit")
    assert str(caught.value) == (
        "Cannot load the data set digit. Expected a folder, a file, or a built-in name: "
        "digits, cifar10, cifar100, mnist, fashion_mnist. "
        "Received: data='digit', which does not exist. Did you mean digits?"
    )
    with pytest.raises(MissingPathError, match=r"Received: data='/no/where', which does not exist\. Check the path\."):
        load_dataset("/no/where")
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(DataError, match=r"Expected a folder, a table \(.*\)\. Received: a file of another kind\."):
        load_dataset(tmp_path / "a.txt")
    monkeypatch.chdir(tmp_path)
    write_classes(tmp_path / "digits", a=3, b=3)
    assert load_dataset("digits").root is None
    assert load_dataset("./digits").class_names == ("a", "b")
    assert load_dataset("digits/").class_names == ("a", "b")


# Built-in


def test_digits():
    first, second = load_dataset("digits"), load_dataset("digits", seed=1, val_fraction=0.2)
    assert first.class_names == tuple("0123456789")
    assert {split: len(images) for split, images in first.splits.items()} == {"train": 1293, "val": 144, "test": 360}
    assert len(second.splits["val"]) == 287
    assert first.splits["test"].names == second.splits["test"].names
    assert min(np.bincount(first.splits["test"].labels)) >= 34
    image = first.splits["train"].load(0, 1)
    assert image.shape == (8, 8, 1) and image.dtype == np.uint8
    assert max(example.image.max() for example in first.splits["train"]) == 255
    colour = first.splits["train"].load(0)
    assert colour.shape == (8, 8, 3) and (colour == image).all()
    assert first.splits["train"].names[0].startswith("digits/")
    assert first.fingerprint == load_dataset("digits").fingerprint != second.fingerprint


# Fingerprint


def test_fingerprint(tmp_path):
    write_classes(tmp_path / "one", a=5, b=5)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    same = load_dataset(tmp_path / "one").fingerprint
    assert same == load_dataset(tmp_path / "two").fingerprint
    assert load_dataset(tmp_path / "one", seed=1).fingerprint != same
    write(tmp_path, "two/a/000.png", data=PNG + b"\0")
    assert load_dataset(tmp_path / "two").fingerprint != same
    (tmp_path / "one/a").rename(tmp_path / "one/c")
    assert load_dataset(tmp_path / "one").fingerprint != same


def test_fingerprint_covers_pixels_in_memory():
    def fingerprint(value):
        from vitreous.data.image_set import Dataset

        images = ImageSet(["x"], [0], arrays=np.full((1, 2, 2, 1), value, "uint8"))
        return Dataset(name="m", root=None, class_names=("a", "b"), splits={"train": images}).fingerprint

    assert fingerprint(1) == fingerprint(1) != fingerprint(2)


# ImageSet


def test_image_set_in_memory():
    arrays = np.arange(3 * 4 * 4 * 1, dtype="uint8").reshape(3, 4, 4, 1)
    images = ImageSet(["a", "b", "c"], [2, 1, 0], arrays=arrays)
    assert len(images) == 3 and images.labels.dtype == np.int32
    assert images[-1].label == 0 and np.array_equal(images[-1].image[..., :1], arrays[2])
    assert np.array_equal(images.load(1, 1), arrays[1]) and images.path(1) is None
    assert [example.label for example in images] == [2, 1, 0]
    assert images[1:].names == ["b", "c"]
    taken = images.take(np.array([2, 0]))
    assert taken.names == ["c", "a"] and np.array_equal(taken.load(0, 1), arrays[2])
    ragged = ImageSet(["a", "b"], arrays=[np.zeros((2, 3, 3), "uint8"), np.full((5, 4, 3), 255, "uint8")])
    assert ragged.labels.tolist() == [-1, -1]
    assert ragged.take([1]).load(0).shape == (5, 4, 3)
    assert ragged.load(1, 1).tolist() == [[[255]] * 4] * 5
    assert repr(images) == "ImageSet(3 images)"
    with pytest.raises(IndexError):
        images[3]


def test_image_set_of_files(tmp_path):
    write(tmp_path, "a/1.png", data=png(9))
    write(tmp_path, "b/2.png", data=b"")
    images = ImageSet(["a/1.png", "b/2.png", "c.png"], [0, 1, 1], root=tmp_path)
    assert (images.load(0, 1) == 9).all()
    assert images.path(0) == tmp_path / "a/1.png"
    with pytest.raises(ImageError, match=r"^Cannot read the image b/2\.png\. .* Received: an empty file\."):
        images.load(1)
    with pytest.raises(MissingPathError, match=r"^Cannot read the image c\.png\."):
        images.load(2)
    assert ImageSet([str(tmp_path / "a/1.png")]).load(0).shape == (4, 5, 3)
    with pytest.raises(DataError, match=r"Received: 2 names, 1 labels, 2 rows, 2 file sizes\. Pass one of each"):
        ImageSet(["a", "b"], [0])


# Files for prediction


def test_list_image_files(tmp_path):
    write(tmp_path, "b.png", "a/2.jpg", "a/1.png", "a/x.txt", "c/.hidden.png")
    (tmp_path / "empty").mkdir()
    assert list_image_files([tmp_path]) == [tmp_path / name for name in ("a/1.png", "a/2.jpg", "b.png")]
    assert list_image_files([tmp_path / "a/x.txt", str(tmp_path / "b.png")]) == [
        tmp_path / "a/x.txt",
        tmp_path / "b.png",
    ]
    with pytest.raises(
        DataError, match=r"empty\. Expected image files in it\. Received: none\. Name a folder that has"
    ):
        list_image_files([tmp_path / "empty"])
    with pytest.raises(
        MissingPathError, match=r"Expected files and folders that exist\. Received: path='.*none'\. Check"
    ):
        list_image_files([tmp_path / "none"])
