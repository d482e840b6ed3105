import io
import json
import os
import tarfile
import threading
import zipfile

import numpy as np
import pytest
from PIL import Image

from vitreous.data import load_dataset, load_evaluation_images, load_images
from vitreous.data.sources.archives import archive_suffix
from vitreous.data.sources.shards import expand_braces, split_of_shard
from vitreous.errors import DataError, ImageError, MissingPathError

NOISE = np.random.default_rng(0).integers(0, 255, (60, 70, 3)).astype("uint8")  # its file is larger than its header


def image(value, format="png"):
    stream = io.BytesIO()
    pixels = NOISE.copy()
    pixels[0, 0] = value % 256
    Image.fromarray(pixels).save(stream, format)
    return stream.getvalue()


def value_of(example):
    return int(example.image[0, 0, 0])


def class_files(count=20, prefix=""):
    """Class folders a and b; image i has a pixel of value i."""
    return {f"{prefix}{'ab'[i % 2]}/{i:02}.png": image(i) for i in range(count)}


def write_zip(path, files, method=zipfile.ZIP_DEFLATED):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_tar(path, files, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def write_folder(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def sizes(dataset):
    return {split: len(images) for split, images in dataset.splits.items()}


def fails(message, data, error=DataError, **changes):
    with pytest.raises(error) as caught:
        load_dataset(data, **changes)
    assert message in str(caught.value), str(caught.value)


WRITERS = {
    "t.zip": write_zip,
    "stored.zip": lambda path, files: write_zip(path, files, zipfile.ZIP_STORED),
    "t.tar": write_tar,
    "t.tar.gz": lambda path, files: write_tar(path, files, "w:gz"),
    "t.tgz": lambda path, files: write_tar(path, files, "w:gz"),
    "t.tar.bz2": lambda path, files: write_tar(path, files, "w:bz2"),
    "t.tar.xz": lambda path, files: write_tar(path, files, "w:xz"),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VITREOUS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# Archives of class folders


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("prefix", ["", "photos/", "./"])
def test_an_archive_is_as_its_folder(tmp_path, name, prefix):
    files = class_files()
    files["a/broken.png"], files["b/cut.png"], files["readme.txt"] = b"", image(0)[:20], b"text"
    folder = load_dataset(write_folder(tmp_path / "folder", files))
    if prefix == "photos/":
        files.pop("readme.txt")  # beside the only folder it would be another layout
        folder.num_ignored = 0
    archive = WRITERS[name](tmp_path / name, {prefix + key: data for key, data in files.items()})
    dataset = load_dataset(archive)
    assert dataset.name == name.split(".")[0] and dataset.root == archive
    assert dataset.fingerprint == folder.fingerprint
    assert dataset.broken == folder.broken and dataset.num_ignored == folder.num_ignored
    for split, images in dataset.splits.items():
        for example, other in zip(images, folder.splits[split], strict=True):
            assert np.array_equal(example.image, other.image) and example.label == other.label
        assert images.path(0) is None


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_an_archive_with_splits(tmp_path, write):
    files = class_files(20, "data/train/") | class_files(4, "data/val/") | class_files(6, "data/test/")
    files |= {"__MACOSX/data/a/1.png": b"", "data/.DS_Store": b"", "data/train/a/._01.png": b""}
    dataset = load_dataset(write(tmp_path / ("t.zip" if write is write_zip else "t.tar"), files))
    assert sizes(dataset) == {"train": 20, "val": 4, "test": 6} and dataset.num_ignored == 0
    assert "train, val and test are as the folders give them" in dataset.notes
    alone = write(tmp_path / ("u.zip" if write is write_zip else "u.tar"), class_files(20, "train/"))
    assert load_dataset(alone).splits["test"].names[0].startswith("train/")


def test_a_compressed_tar_is_decompressed_once(tmp_path, cache):
    archive = write_tar(tmp_path / "t.tar.gz", class_files(), "w:gz")
    notes = load_dataset(archive).notes
    (plain,) = cache.glob("files/t-*.tar")
    assert f"the archive is compressed as a whole; decompressed, it is kept as {plain}" in notes
    before = plain.stat().st_mtime_ns
    load_dataset(archive)
    assert plain.stat().st_mtime_ns == before
    write_tar(archive, class_files(30), "w:gz")
    assert sum(sizes(load_dataset(archive)).values()) == 30


def test_archives_are_read_by_threads(tmp_path):
    for path in (write_zip(tmp_path / "t.zip", class_files(40)), write_tar(tmp_path / "t.tar", class_files(40))):
        images = load_images(path)
        wrong = []

        def read(images=images, wrong=wrong):
            for i in range(len(images)):
                if images.load(i)[0, 0, 0] != int(images.names[i][2:4]):
                    wrong.append(i)

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


def test_archives_that_are_none(tmp_path):
    path = tmp_path / "t.zip"
    path.write_bytes(b"no zip")
    fails(f"Cannot use the archive {path}. Expected a whole zip. Received: File is not a zip file. Pack it,", path)
    path = tmp_path / "t.tar"
    path.write_bytes(b"no tar" * 200)
    fails(f"Cannot use the archive {path}. Expected a whole tar. Received: ", path)
    write_tar(path, class_files())
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    fails("Expected a whole tar. Received: unexpected end of data. Pack it, or fetch it, anew.", path)
    path = write_tar(tmp_path / "t.tgz", class_files(), "w:gz")
    path.write_bytes(path.read_bytes()[:500])
    fails("Expected a whole tar. Received: Compressed file ended before the end-of-stream marker was reached.", path)
    assert not list((tmp_path / "cache").glob("files/*"))
    path = write_zip(tmp_path / "t.zip", class_files(), zipfile.ZIP_LZMA)
    fails("Expected a zip of files that are stored or deflated. Received: a/00.png, compressed by method 14.", path)
    fails("Expected images in class folders. Received: an empty folder.", write_zip(tmp_path / "t.zip", {}))
    fails("images that lie in no class folder.", write_zip(tmp_path / "t.zip", {"1.png": image(1), "2.png": image(2)}))
    with pytest.raises(DataError, match=r"Expected image files in it\. Received: none\. Name one that has some\."):
        load_images(write_zip(tmp_path / "t.zip", {"a/readme.txt": b""}))


def test_an_archive_that_changes_under_us(tmp_path):
    path = write_zip(tmp_path / "t.zip", class_files(), zipfile.ZIP_STORED)
    images = load_images(path)
    data = bytearray(path.read_bytes())
    place = data.index(b"IDAT") + 20
    data[place] ^= 255
    path.write_bytes(bytes(data))
    with pytest.raises(ImageError, match=r"Cannot read the image a/00\.png\..*damaged in .*t\.zip: its checksum"):
        images.load(0)
    path.write_bytes(b"short")
    with pytest.raises(ImageError, match=r"Received: 5 of its 30 bytes in .*t\.zip"):
        images.load(0)
    path.unlink()
    with pytest.raises(MissingPathError, match=r"Expected a file that exists\. Received: path='.*t\.zip'"):
        images.load(0)


def test_names_that_begin_at_the_root_or_lead_out(tmp_path):
    files = class_files() | {"/a/root.png": image(1), "../../b/x.png": image(2)}
    out = "with names that lead out of the archive"
    dataset = load_dataset(write_tar(tmp_path / "t.tar", files))
    assert sum(sizes(dataset).values()) == 21 and dataset.num_ignored == 1
    assert f"1 file passed over: 1 {out}" in dataset.notes
    assert "a/root.png" in [name for images in dataset.splits.values() for name in images.names]
    dataset = load_dataset(write_zip(tmp_path / "t.zip", files | {"C:\\a\\y.png": image(3), "readme.txt": b""}))
    assert sum(sizes(dataset).values()) == 21 and dataset.num_ignored == 3
    assert f"3 files passed over: 1 .txt, 2 {out}" in dataset.notes


def test_links_in_a_tar(tmp_path):
    path = write_tar(tmp_path / "t.tar", class_files())
    links = [
        ("a/link.png", tarfile.LNKTYPE, "./a/00.png"),
        ("b/chain.png", tarfile.LNKTYPE, "a/link.png"),
        ("b/none.png", tarfile.LNKTYPE, "b/gone.png"),
        ("b/soft.png", tarfile.SYMTYPE, "01.png"),
    ]
    with tarfile.open(path, "a") as archive:
        for name, kind, target in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
    dataset = load_dataset(path)
    assert sum(sizes(dataset).values()) == 22 and dataset.broken == {} and dataset.num_ignored == 2
    assert "2 files passed over: 1 hard links to nothing, 1 symbolic links" in dataset.notes
    images = load_images(path)
    for name in ("a/link.png", "b/chain.png"):
        assert value_of(images[images.names.index(name)]) == 0


def test_archive_suffixes():
    assert [archive_suffix(name) for name in ("a.ZIP", "a.tar", "a.tar.xz", "a.gz", "tar")] == [
        *(".zip", ".tar", ".tar.xz"),
        *(None, None),
    ]


def test_archives_for_evaluation_and_prediction(tmp_path):
    path = write_zip(tmp_path / "t.zip", class_files(10))
    assert load_evaluation_images(path, ("b", "x", "a")).images.labels.tolist() == [2] * 5 + [0] * 5
    flat = write_tar(tmp_path / "flat.tar", {f"{i}.jpg": image(i, "jpeg") for i in range(3)})
    assert load_images(flat).names == ["0.jpg", "1.jpg", "2.jpg"]
    assert len(load_images([path, flat, tmp_path / "t.zip"])) == 23


# WebDataset shards


def shard_files(start=0, count=20, kind="cls", prefix=""):
    files = {}
    for i in range(start, start + count):
        key = f"{prefix}{i:04}"
        label = {
            "cls": str(i % 12),
            "txt": f"name {i % 3}",
            "json": json.dumps({"species": "ab"[i % 2], "camera": i // 4}),
        }
        files[f"{key}.jpg"] = image(i)
        files[f"{key}.{kind}"] = label[kind].encode()
    return files


@pytest.mark.parametrize(
    ("kind", "class_names"),
    [("cls", tuple(map(str, range(12)))), ("txt", ("name 0", "name 1", "name 2")), ("json", ("a", "b"))],
)
def test_a_shard(tmp_path, kind, class_names):
    dataset = load_dataset(write_tar(tmp_path / "s.tar", shard_files(0, 48, kind)))
    assert dataset.class_names == class_names and dataset.name == "s"
    assert sum(sizes(dataset).values()) == 48
    for images in dataset.splits.values():
        for example, name in zip(images, images.names, strict=True):
            number = int(name[:4])
            assert value_of(example) == number
            assert class_names[example.label] == {"cls": str(number % 12), "txt": f"name {number % 3}"}.get(
                kind, "ab"[number % 2]
            )
    if kind == "json":
        assert "labels: column species" in dataset.notes and list(images.columns) == ["camera"]


def test_shards_by_pattern_and_folder(tmp_path):
    for i in range(9, 12):
        write_tar(tmp_path / f"data/s-{i:03}.tar", shard_files(i * 20, 20, "json"))
    expected = load_dataset(tmp_path / "data")
    assert expected.name == "data" and sum(sizes(expected).values()) == 60
    for pattern in ("s-{009..011}.tar", "s-0{09,10,11}.tar", "s-*.tar", "s-{00,01}?.tar"):
        dataset = load_dataset(str(tmp_path / "data" / pattern))
        assert dataset.fingerprint == expected.fingerprint and dataset.name.startswith("s")
    grouped = load_dataset(tmp_path / "data", label_column="species", group_column="camera", test_fraction=0.3)
    found = [set(images.columns["camera"]) for images in grouped.splits.values()]
    assert sum(map(len, found)) == len(set.union(*found)) == 15
    fails(
        f"Cannot load the shards {tmp_path}/data/s-{{009..013}}.tar. Expected files that exist. "
        "Received: 2 of 5 missing: "
        f"{tmp_path}/data/s-012.tar, {tmp_path}/data/s-013.tar. Check the pattern.",
        str(tmp_path / "data/s-{009..013}.tar"),
        MissingPathError,
    )
    fails("Received: none. Check the pattern.", str(tmp_path / "x-*.tar"), MissingPathError)
    (tmp_path / "a.csv").write_text("")
    fails(f"Cannot use the files {tmp_path}/*.csv. Expected tar shards. Received: a.csv.", str(tmp_path / "*.csv"))


@pytest.mark.parametrize("template", ["{}-000.tar", "{}/000.tar"])
def test_shards_with_splits(tmp_path, template):
    for start, split in ((0, "train"), (40, "val"), (60, "test")):
        write_tar(tmp_path / template.format(split), shard_files(start, 24, "json"))
    dataset = load_dataset(tmp_path)
    assert sizes(dataset) == {"train": 24, "val": 24, "test": 24}
    assert "train, val and test are as the names of the shards give them" in dataset.notes


def test_keys_that_repeat(tmp_path):
    for i in range(2):
        write_tar(tmp_path / f"{i}.tar", shard_files(0, 20, "json"))
    assert load_images(tmp_path).names[::20] == ["0/0000.jpg", "1/0000.jpg"]


def test_examples_that_do_not_work(tmp_path):
    files = shard_files(0, 20, "json")
    del files["0003.jpg"], files["0004.json"]
    dataset = load_dataset(write_tar(tmp_path / "s.tar", files))
    assert sum(sizes(dataset).values()) == 18
    assert "1 examples without an image are left out" in dataset.notes
    assert "1 images without a label are left out" in dataset.notes
    files["0005.json"] = b"{"
    fails("Expected JSON. Received: 0005.json: ", write_tar(tmp_path / "s.tar", files))
    files = shard_files(0, 20, "json")
    files["0001.png"] = image(1)
    path = write_tar(tmp_path / "s.tar", files)
    fails("Expected to know which image of an example is meant. Received: 0001 with jpg, png. Name it with", path)
    assert sum(sizes(load_dataset(path, image_column="jpg")).values()) == 20
    fails("Expected images. Received: 20 examples without one. Name shards of images.", path, image_column="webp")
    path = write_tar(tmp_path / "s.tar", {f"{i}.{kind}": image(i) for i in range(20) for kind in ("jpg", "cls")})
    fails(
        "Expected classes with several images each.",
        write_tar(
            path,
            {
                **{f"{i}.jpg": image(i) for i in range(20)},
                **{f"{i}.cls": str(i).encode() for i in range(20)},
            },
        ),
    )


def test_class_folders_with_notes_are_no_shard(tmp_path):
    files = class_files() | {"a/00.txt": b"a caption", "b/01.txt": b"another"}
    dataset = load_dataset(write_tar(tmp_path / "t.tar", files))
    assert dataset.class_names == ("a", "b") and dataset.num_ignored == 2
    tars = write_folder(tmp_path / "folder", class_files() | {"backup.tar": b""})
    assert load_dataset(tars).class_names == ("a", "b")


def test_names_of_shards():
    assert expand_braces("{0..2}{a,b}") == ["0a", "0b", "1a", "1b", "2a", "2b"]
    assert [
        split_of_shard(name) for name in ("train-1.tar", "x/valid00.tar", "test/1.tar", "s.tar", "training.tar")
    ] == [
        *("train", "val", "test"),
        *(None, "train"),
    ]


# All sources of the same images


def test_equal_sources_give_equal_pixels(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    files = class_files(24)
    names, data = list(files), list(files.values())
    labels = [name[0] for name in names]
    folder = write_folder(tmp_path / "folder", files)
    (tmp_path / "t.csv").write_text("path,label\n" + "".join(f"folder/{n},{n[0]}\n" for n in names))
    parquet.write_table(arrow.table({"image": data, "label": labels}), tmp_path / "t.parquet")
    shard = {f"{n[2:4]}.{kind}": b for n, d in files.items() for kind, b in (("png", d), ("cls", n[0].encode()))}
    sources = [
        *(folder, tmp_path / "t.csv", tmp_path / "t.parquet", write_zip(tmp_path / "t.zip", files)),
        *(write_tar(tmp_path / "t.tar", files), write_tar(tmp_path / "s.tar", shard)),
    ]
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_dict({"image": [{"bytes": each, "path": None} for each in data], "label": labels})
    saved.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
    found = []
    for source in (*sources, tmp_path / "saved"):
        contents = load_evaluation_images(source, ("a", "b"), split="all").images
        found.append(sorted((value_of(example), example.label, example.image.tobytes()) for example in contents))
    assert len(found[0]) == 24
    assert all(each == found[0] for each in found)
    assert os.environ["VITREOUS_CACHE"] and not (tmp_path / "cache").exists()
