import io
import threading

import numpy as np
import pytest
from PIL import Image

from vitreous.data import load_dataset, load_evaluation_images, load_images
from vitreous.errors import DataError, MissingDependencyError

datasets = pytest.importorskip("datasets")


def png(value):
    stream = io.BytesIO()
    Image.new("RGB", (5, 4), (value % 256, 0, 0)).save(stream, "png")
    return stream.getvalue()


def rows(count=40, **columns):
    return {"image": [{"bytes": png(i), "path": None} for i in range(count)], **columns}


def create(values, **features):
    types = {name: datasets.Value("string" if isinstance(v[0], str) else "int64") for name, v in values.items()}
    return datasets.Dataset.from_dict(values, datasets.Features({**types, "image": datasets.Image(), **features}))


NAMES = datasets.ClassLabel(names=["zebra", "ant", "unused"])


def sizes(dataset):
    return {split: len(images) for split, images in dataset.splits.items()}


def test_one_data_set(tmp_path):
    labels = [i % 2 for i in range(40)]
    labels[7] = -1
    create(rows(label=labels, camera=[i // 4 for i in range(40)]), label=NAMES).save_to_disk(tmp_path / "d")
    dataset = load_dataset(tmp_path / "d")
    assert dataset.name == "d" and dataset.class_names == ("zebra", "ant")  # in the order of the data set
    assert sum(sizes(dataset).values()) == 39
    for images in dataset.splits.values():
        assert list(images.columns) == ["camera"] and (images.file_sizes > 60).all()
        for example, name in zip(images, images.names, strict=True):
            number = int(name.removeprefix("all/"))
            assert example.image[0, 0, 0] == number and example.label == number % 2
    assert "1 of 3 named classes have no training image: unused" in dataset.notes
    assert "1 images without a label are left out" in dataset.notes
    grouped = load_dataset(tmp_path / "d", group_column="camera")
    found = [set(images.columns["camera"]) for images in grouped.splits.values()]
    assert sum(map(len, found)) == len(set.union(*found)) == 10
    assert load_dataset(tmp_path / "d").fingerprint == dataset.fingerprint


def test_splits(tmp_path):
    parts = {
        name: create(rows(count, label=[i % 2 for i in range(count)]), label=NAMES)
        for name, count in (("train", 20), ("validation", 6), ("test", 4), ("unsupervised", 8))
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "d")
    dataset = load_dataset(tmp_path / "d")
    assert sizes(dataset) == {"train": 20, "val": 6, "test": 4}
    assert "splits passed over: unsupervised" in dataset.notes
    assert "train, val and test are as the splits of the data set give them" in dataset.notes
    assert [int(e.image[0, 0, 0]) for e in dataset.splits["test"]] == [0, 1, 2, 3]
    assert dataset.splits["test"].names[0] == "test/0"
    found = load_evaluation_images(tmp_path / "d", ("ant", "zebra"))
    assert found.split == "test" and found.images.labels.tolist() == [1, 0, 1, 0]


def test_rows_in_another_order_and_several_threads(tmp_path):
    data = create(rows(label=[i % 2 for i in range(40)]), label=NAMES).shuffle(seed=3).select(range(5, 35))
    data.save_to_disk(tmp_path / "d")
    images = load_images(tmp_path / "d")
    expected = [np.asarray(row["image"])[0, 0, 0] for row in data]
    wrong = []

    def read():
        wrong.extend(i for i in range(30) if images.load(i)[0, 0, 0] != expected[i])

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and len(images) == 30 and images.labels.max() == -1


def test_several_labels_and_other_types(tmp_path):
    tags = [[k for k, n in ((0, 2), (1, 3)) if i % n == 0] for i in range(40)]
    values = rows(tags=tags, mask=[{"bytes": png(0), "path": None}] * 40)
    features = {"tags": datasets.Sequence(NAMES), "mask": datasets.Image(), "image": datasets.Image()}
    datasets.Dataset.from_dict(values, datasets.Features(features)).save_to_disk(tmp_path / "d")
    dataset = load_dataset(tmp_path / "d")
    assert dataset.is_multi_label and dataset.class_names == ("zebra", "ant")
    for images in dataset.splits.values():
        numbers = [int(name.removeprefix("all/")) for name in images.names]
        assert images.labels.tolist() == [[i % 2 == 0, i % 3 == 0] for i in numbers]


def test_images_of_files_and_broken_ones(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.png").write_bytes(png(i) if i != 3 else b"")
    values = [{"bytes": None, "path": str(tmp_path / f"{i}.png")} for i in range(20)]
    values[4] = {"bytes": b"<html>", "path": "x.png"}
    create({"image": values, "label": ["a", "b"] * 10}).save_to_disk(tmp_path / "d")
    dataset = load_dataset(tmp_path / "d")
    assert dataset.broken == {"3.png": "an empty file", "x.png": "not an image in a known format"}
    for images in dataset.splits.values():  # save_to_disk has put the files into the data set
        assert [f"{image[0, 0, 0]}.png" for image in (e.image for e in images)] == images.names


def test_what_cannot_be_read(tmp_path):
    create(rows(n=list(range(40)))).save_to_disk(tmp_path / "d")
    with pytest.raises(DataError, match=r"which column holds the labels\. Received: columns=\['n'\]\. Name it with"):
        load_dataset(tmp_path / "d")
    next((tmp_path / "d").glob("*.arrow")).write_bytes(b"no arrow")
    with pytest.raises(
        DataError, match=r"Cannot use the data set .*Expected a folder that save_to_disk left\. Received: "
    ):
        load_dataset(tmp_path / "d")


def test_without_datasets(tmp_path, monkeypatch):
    create(rows(label=["a", "b"] * 20)).save_to_disk(tmp_path / "d")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingDependencyError) as caught:
        load_dataset(tmp_path / "d")
    assert str(caught.value) == (
        f"The data set {tmp_path / 'd'} cannot be used. Expected the package datasets. Received: it is not installed. "
        "Install it with: pip install 'vitreous[datasets]'"
    )
