import csv
import io
import json
import shutil
import threading

import numpy as np
import pytest
from inspection_data import make_clean, make_faulty, photo, tree_hash
from PIL import Image

from vitreous.data import Dataset, ImageSet, load_dataset
from vitreous.data.inspection import KINDS, SEVERITIES, inspect_dataset, inspect_fast
from vitreous.data.inspection.findings import FIX_LIST_COLUMNS
from vitreous.data.inspection.scan import measure_image, scan_dataset
from vitreous.data.sources.remote import RemoteStore
from vitreous.data.stores import JoinedStore
from vitreous.errors import ConfigError


@pytest.fixture(scope="module")
def faulty_folder(tmp_path_factory):
    return make_faulty(tmp_path_factory.mktemp("data") / "faulty")


@pytest.fixture(scope="module")
def faulty(faulty_folder):
    return inspect_dataset(load_dataset(faulty_folder))


@pytest.fixture(scope="module")
def clean_folder(tmp_path_factory):
    return make_clean(tmp_path_factory.mktemp("data") / "clean")


def files(inspection, kind):
    return [ref.file for item in inspection[kind].items for ref in item.files]


def details(inspection, kind):
    return [item.detail for item in inspection[kind].items]


def arrays_dataset(train, train_labels, test=None, test_labels=None, class_names=("a", "b")):
    splits = {"train": ImageSet([f"train/{i}" for i in range(len(train))], train_labels, arrays=train)}
    if test is not None:
        splits["test"] = ImageSet([f"test/{i}" for i in range(len(test))], test_labels, arrays=test)
    return Dataset(name="arrays", root=None, class_names=class_names, splits=splits)


EXPECTED = {
    "wrong_extension": ["train/cat/really_png.jpg"],
    "duplicate": ["train/cat/copy.png", "train/cat/other_encoding.bmp"],
    "leak": ["train/cat/02.png"],
    "label_conflict": ["train/cat/03.png", "train/dog/conflict.png"],
    "near_duplicate": ["train/cat/near.jpg"],
    "near_leak": ["train/cat/05.png"],
    "near_label_conflict": ["train/cat/06.png", "train/dog/near_conflict.png"],
    "tiny": ["train/dog/tiny.png"],
    "huge": ["train/dog/huge.png"],
    "extreme_aspect": ["train/dog/long.png"],
    "constant": ["train/dog/constant.png", "train/dog/huge.png"],
    "dark": ["train/dog/dark.png"],
    "bright": ["train/dog/bright.png"],
    "cmyk": ["train/dog/cmyk.jpg"],
    "deep": ["train/dog/deep.png"],
    "palette": ["train/dog/palette.png"],
    "alpha": ["train/dog/alpha.png"],
    "animated": ["train/dog/animated.gif"],
    "exif_rotated": ["train/dog/rotated.jpg"],
    "grey": ["train/dog/deep.png", "train/dog/grey.png", "train/dog/huge.png"],
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_each_fault_is_found_in_its_files_and_no_others(faulty, kind):
    assert files(faulty, kind) == EXPECTED[kind]


def test_no_kind_is_left_out_of_the_tests(faulty):
    of_classes = {"unreadable", "ignored", "similar_class_names", "missing_class", "imbalance", "few_images"}
    assert {finding.kind for finding in faulty.findings} == {*EXPECTED, *of_classes}
    elsewhere = {"label_error", "label_error_seen", "unchecked"}
    assert {*EXPECTED, *of_classes, *elsewhere} == set(KINDS)


def test_unreadable_files_with_reasons(faulty):
    found = dict(zip(files(faulty, "unreadable"), details(faulty, "unreadable"), strict=True))
    assert found["train/cat/empty.jpg"] == "an empty file"
    assert found["train/cat/text.jpg"] == "not an image in a known format"
    assert found["train/cat/truncated.png"].startswith("a truncated image")
    assert len(found) == 3
    assert faulty["unreadable"].detail == "2 by their header, 1 when decoded whole"


def test_findings_of_classes(faulty):
    assert details(faulty, "similar_class_names") == ["'Cat ' = 'cat'", "'dog' = 'ｄｏｇ'"]
    assert details(faulty, "missing_class") == [
        "val has no image of Cat , ｄｏｇ",
        "test has no image of Cat , ｄｏｇ",
    ]
    assert details(faulty, "few_images") == ["Cat : 2", "ｄｏｇ: 2"]
    assert faulty["imbalance"].severity == "warning"
    assert "dog has 13.5 times the training images of ｄｏｇ (27 and 2)" in faulty["imbalance"].detail
    assert details(faulty, "ignored") == ["1 in all"]


def test_related_files_and_details(faulty):
    (leak,) = faulty["leak"].items
    assert [(ref.split, ref.file, ref.label) for ref in leak.related] == [("test", "test/cat/leak.png", "cat")]
    assert leak.detail == "train and test"
    (near,) = faulty["near_leak"].items
    assert near.related[0].file == "test/cat/near_leak.jpg"
    assert near.detail.startswith("train and test, similarity 0.9")
    assert details(faulty, "label_conflict") == ["cat or dog"]
    assert details(faulty, "wrong_extension") == ["holds PNG"]
    assert details(faulty, "huge") == ["10001 x 5000"]
    assert "decoded pixels (BLAKE2b" in faulty["duplicate"].detail


def test_findings_come_in_order_and_explain_themselves(faulty):
    order = [SEVERITIES.index(finding.severity) for finding in faulty.findings]
    assert order == sorted(order)
    for finding in faulty.findings:
        assert finding.text.explanation.endswith(".") and finding.text.remedy.endswith("."), finding.kind
        assert finding.text.remedy in finding.summary()
    assert faulty.summary() == "3 errors, 10 warnings, 13 notes"


def test_clean_data_gives_nothing(clean_folder):
    assert inspect_dataset(load_dataset(clean_folder)).findings == []
    assert inspect_fast(load_dataset(clean_folder)).findings == []
    for inspection in (inspect_dataset(load_dataset("digits")), inspect_fast(load_dataset("digits"))):
        assert inspection.findings == []


def test_nothing_is_changed(faulty_folder):
    before = tree_hash(faulty_folder)
    dataset = load_dataset(faulty_folder)
    inspect_dataset(dataset)
    inspect_fast(dataset)
    assert tree_hash(faulty_folder) == before


def test_same_answer_from_any_number_of_threads(faulty_folder):
    dataset = load_dataset(faulty_folder)
    first, second = (inspect_dataset(dataset, num_workers=n).to_dict() for n in (1, 5))
    assert first["findings"] == second["findings"]


def test_arrays():
    images = np.stack([np.asarray(photo(seed, (40, 40))) for seed in range(24)])
    near = np.asarray(photo(3, (40, 40)).resize((30, 30)).resize((40, 40)))
    test = np.stack([images[0], near, *(np.asarray(photo(seed, (40, 40))) for seed in range(50, 54))])
    found = inspect_dataset(arrays_dataset(images, [0, 1] * 12, test, [0, 0, 1, 1, 0, 1]))
    assert files(found, "leak") == ["train/0"]
    assert found["leak"].items[0].related[0].file == "test/0"
    assert files(found, "near_leak") == ["train/3"]
    assert files(found, "near_label_conflict") == ["train/3", "test/1"]
    assert len(found.findings) == 3
    fast = inspect_fast(arrays_dataset(images, [0, 1] * 12, test, [0, 0, 1, 1, 0, 1]))
    assert files(fast, "leak") == ["train/0"]
    assert len(fast.findings) == 1


def test_several_labels_an_image():
    images = np.stack([np.asarray(photo(seed, (32, 32))) for seed in [*range(30), 0, 1]])
    labels = np.random.default_rng(0).random((32, 2)) < 0.7
    labels[30], labels[31] = labels[0], ~labels[1]
    labels[0] = labels[30] = [True, True]
    dataset = arrays_dataset(images, labels, images[5:6], labels[5:6])
    assert dataset.is_multi_label
    found = inspect_dataset(dataset)
    assert files(found, "duplicate") == ["train/30"]
    assert found["duplicate"].items[0].related[0].label == "a, b"
    assert files(found, "label_conflict") == ["train/1", "train/31"]
    assert files(found, "leak") == ["train/5"]
    json.dumps(found.to_dict())


def test_flat_small_images_do_not_match_by_chance(monkeypatch):
    """Skies with a speck: each has its own light, and a speck of its own shape near the middle."""
    generator = np.random.default_rng(0)
    ramp = np.linspace(0, 1, 32)
    skies = []
    for _ in range(400):
        slope = generator.uniform(30, 60) * np.array([np.cos(angle := generator.normal(0, 0.2)), np.sin(angle)])
        sky = generator.uniform(80, 180) + slope[0] * ramp[:, None, None] + slope[1] * ramp[None, :, None]
        speck = np.zeros((32, 32, 1))
        speck[12:20, 12:20, 0] = -40 * (generator.random((8, 8)) < 0.2)
        skies.append(sky + speck + generator.normal(0, 2, (32, 32, 3)))
    dataset = arrays_dataset(np.clip(skies, 0, 255).astype("uint8"), [0, 1] * 200)

    def num_matched():
        found = inspect_dataset(dataset)
        return sum(found[kind].num_files for kind in ("near_duplicate", "near_label_conflict") if kind in found)

    assert num_matched() <= 12  # of 400; 80,000 pairs
    monkeypatch.setattr("vitreous.data.inspection.duplicates.MIN_DETAIL", -1.0)
    assert num_matched() > 100  # by hash and light alone
    noise = generator.normal(128, 1.5, (200, 32, 32, 3)).astype("uint8")  # flat: hashes are noise
    assert inspect_dataset(arrays_dataset(noise, [0, 1] * 100)).findings == []


def test_min_similarity_decides(clean_folder, tmp_path):
    root = make_clean(tmp_path / "data")
    Image.open(root / "train/cat/00.png").resize((48, 48)).save(root / "train/cat/small.jpg", quality=40)
    dataset = load_dataset(root)
    assert "near_duplicate" in inspect_dataset(dataset)
    assert "near_duplicate" not in inspect_dataset(dataset, min_similarity=1.0)
    with pytest.raises(ConfigError, match=r"Received: min_similarity=1.5"):
        inspect_dataset(dataset, min_similarity=1.5)
    with pytest.raises(ConfigError, match=r"Received: num_workers=0"):
        inspect_dataset(dataset, num_workers=0)


@pytest.mark.parametrize(("count", "severity"), [(24, None), (30, None), (40, "note"), (130, "warning")])
def test_imbalance(count, severity):
    images = np.random.default_rng(0).integers(0, 256, (count + 12, 16, 16, 3)).astype("uint8")
    found = inspect_fast(arrays_dataset(images, [0] * count + [1] * 12))
    assert (found["imbalance"].severity if "imbalance" in found else None) == severity


def test_deep_colour_and_opaque_alpha(tmp_path):
    """16-bit colour PNG is deep though Pillow hands out 8 bits; an alpha channel without a hole is no finding."""
    root = make_clean(tmp_path / "data")
    rgba = photo(900).convert("RGBA")
    rgba.save(root / "train/cat/opaque.png")
    raw = np.repeat(np.asarray(photo(901)), 2, axis=2)  # each byte twice: 16-bit samples
    import struct
    import zlib

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + row.tobytes() for row in raw)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 96, 96, 16, 2, 0, 0, 0))
    (root / "train/cat/deep.png").write_bytes(png + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    found = inspect_dataset(load_dataset(root))
    assert files(found, "deep") == ["train/cat/deep.png"]
    assert len(found.findings) == 1


def test_file_that_goes_away(tmp_path):
    root = make_clean(tmp_path / "data")
    dataset = load_dataset(root)
    (root / "train/cat/03.png").unlink()
    found = inspect_dataset(dataset)
    assert details(found, "unreadable") == ["a file that is not there"]
    assert files(found, "unreadable") == ["train/cat/03.png"]
    assert [finding.kind for finding in inspect_fast(dataset).findings] == []  # the loader will name it


def test_dataset_without_one_readable_image(tmp_path):
    root = make_clean(tmp_path / "data", num_train=2, num_test=1)
    dataset = load_dataset(root)
    for path in root.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:200])
    found = inspect_dataset(dataset)
    assert len(files(found, "unreadable")) == 8
    assert "width" not in found.statistics


def test_statistics(faulty, clean_folder):
    statistics = faulty.statistics
    assert statistics["num_images"] == {"train": 48, "val": 8, "test": 10}
    assert statistics["class_counts"]["train"] == {"Cat ": 2, "cat": 17, "dog": 27, "ｄｏｇ": 2}
    assert statistics["formats"]["JPEG"] == 4 and sum(statistics["formats"].values()) == 65
    for kind in ("width", "height", "brightness"):
        histogram = statistics[kind]["histogram"]
        assert len(histogram["edges"]) == len(histogram["counts"]) + 1
        assert sum(histogram["counts"]) == 65
    assert (statistics["width"]["min"], statistics["width"]["median"], statistics["width"]["max"]) == (9, 96, 10001)


def test_measures_are_those_of_the_pixels(clean_folder):
    dataset = load_dataset(clean_folder)
    images = dataset.splits["train"]
    pixels = images.load(3)
    measures = measure_image(images, 3)
    assert (measures.height, measures.width) == pixels.shape[:2]
    grey = np.asarray(Image.fromarray(pixels).convert("L"))
    assert measures.brightness == pytest.approx(grey.mean(), abs=0.5)
    scan = scan_dataset(dataset)
    assert len(scan) == 40
    assert len(np.unique(scan.pixel_hashes)) == 40
    columns = ("heights", "widths", "flags", "formats", "modes", "brightness", "contrast", "pixel_hashes", "hashes")
    assert sum(getattr(scan, name).nbytes for name in columns) == 43 * 40  # as docs/inspect.md says


def test_progress_ends_at_the_number_of_images(clean_folder):
    calls = []
    inspect_dataset(load_dataset(clean_folder), on_progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (40, 40)
    assert calls == sorted(calls)


def test_an_interrupt_ends_the_threads(clean_folder):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        inspect_dataset(load_dataset(clean_folder), on_progress=stop)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vitreous-inspect")]


# ----- what is written


def test_json_has_everything_and_keeps_its_shape(faulty):
    file = io.StringIO()
    faulty.write_json(file)
    found = json.loads(file.getvalue())
    assert list(found) == ["format", "data", "is_whole", "seconds", "counts", "findings", "statistics"]
    assert found["format"] == 1
    assert found["counts"] == {"error": 3, "warning": 10, "note": 13}
    assert list(found["data"]) == ["name", "root", "class_names", "notes"]
    assert list(found["statistics"]) == [
        *("num_images", "class_counts", "formats", "modes", "width", "height", "brightness")
    ]
    finding = next(finding for finding in found["findings"] if finding["kind"] == "leak")
    assert list(finding) == [
        *("kind", "severity", "title", "explanation", "remedy", "action", "detail", "num_items", "num_files", "items")
    ]
    assert finding["items"] == [
        {
            "files": [{"split": "train", "index": 4, "file": "train/cat/02.png", "class": "cat"}],
            "related": [{"split": "test", "index": 4, "file": "test/cat/leak.png", "class": "cat"}],
            "detail": "train and test",
        }
    ]
    assert sum(len(finding["items"]) for finding in found["findings"]) == sum(
        len(finding.items) for finding in faulty.findings
    )


def test_json_keeps_names_that_are_no_text(tmp_path):
    images = np.zeros((1, 8, 8, 3), "uint8")
    dataset = Dataset(
        name="x", root=None, class_names=("a",), splits={"train": ImageSet(["b\udcff.png"], [0], arrays=images)}
    )
    file = io.StringIO()
    inspect_dataset(dataset).write_json(file)
    assert json.loads(file.getvalue().encode("ascii"))["findings"][0]["kind"] in KINDS
    assert "b\\udcff.png" in file.getvalue()


def test_fix_list_names_file_related_file_and_action(faulty):
    file = io.StringIO()
    faulty.write_fix_list(file)
    rows = list(csv.DictReader(io.StringIO(file.getvalue())))
    assert tuple(rows[0]) == FIX_LIST_COLUMNS
    (leak,) = [row for row in rows if row["finding"] == "leak"]
    assert leak == {
        "finding": "leak",
        "severity": "error",
        "split": "train",
        "class": "cat",
        "file": "train/cat/02.png",
        "related_file": "test/cat/leak.png",
        "suggested_action": "keep in one split",
        "detail": "train and test",
    }
    conflict = [(row["file"], row["related_file"]) for row in rows if row["finding"] == "label_conflict"]
    assert conflict == [("train/cat/03.png", "train/dog/conflict.png"), ("train/dog/conflict.png", "train/cat/03.png")]
    assert len(rows) == sum(finding.num_files for finding in faulty.findings)


# ----- the quick look


def test_fast_part_finds_what_costs_little(faulty_folder):
    found = inspect_fast(load_dataset(faulty_folder))
    assert not found.is_whole
    assert {finding.kind for finding in found.findings} == {
        *("unreadable", "leak", "label_conflict", "duplicate", "similar_class_names", "missing_class", "imbalance"),
        *("few_images", "wrong_extension", "ignored"),
    }
    assert files(found, "leak") == ["train/cat/02.png"]
    assert files(found, "duplicate") == ["train/cat/copy.png"]  # the .bmp has the same pixels, not the same bytes
    assert files(found, "wrong_extension") == ["train/cat/really_png.jpg"]
    assert "their bytes" in found["leak"].detail


@pytest.mark.parametrize(("name", "value"), [("FAST_MAX_FILES", 10), ("FAST_MAX_BYTES", 100)])
def test_fast_part_says_what_it_left_out(faulty_folder, monkeypatch, name, value):
    monkeypatch.setattr(f"vitreous.data.inspection.whole.{name}", value)
    found = inspect_fast(load_dataset(faulty_folder))
    assert "leak" not in found
    assert "too many to compare before training: vitreous inspect compares them" in details(found, "unchecked")[0]


def test_fast_part_bounds_what_it_reads_of_unknown_size(monkeypatch):
    monkeypatch.setattr("vitreous.data.inspection.whole.FAST_MAX_BYTES", 1000)
    images = np.random.default_rng(0).integers(0, 256, (30, 16, 16, 3)).astype("uint8")
    found = inspect_fast(arrays_dataset(images, [0, 1] * 15))
    assert [finding.kind for finding in found.findings] == ["unchecked"]


def test_fast_part_fetches_nothing(monkeypatch):
    def refuse(*_):
        raise AssertionError("fetched")

    monkeypatch.setattr(RemoteStore, "read", refuse)
    names = [f"{i}.png" for i in range(24)]
    images = ImageSet(names, [0, 1] * 12, store=RemoteStore("s3://bucket/photos"), file_sizes=[100] * 24)
    far = Dataset(name="far", root="s3://bucket/photos", class_names=("a", "b"), splits={"train": images})
    found = inspect_fast(far)
    assert details(found, "unchecked") == [
        "images on other machines (24) are not fetched before training: vitreous inspect compares them"
    ]


def test_fast_part_compares_what_is_near_beside_what_is_far(tmp_path, monkeypatch):
    monkeypatch.setattr("vitreous.data.sources.remote.open_file_system", None)
    for name in "abc":
        photo(ord(name) // 98).save(tmp_path / f"{name}.png")  # b and c are the same
    names = [*(f"{name}.png" for name in "abc"), "https://example.org/d.png"]
    images = ImageSet(names, [0, 1, 1, 0], store=JoinedStore([RemoteStore(tmp_path)], [4]))
    found = inspect_fast(Dataset(name="mixed", root=tmp_path, class_names=("a", "b"), splits={"train": images}))
    assert files(found, "duplicate") == ["c.png"]
    assert details(found, "unchecked")[0].startswith("images on other machines (1) are")


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_fast_part_counts_what_it_reads_of_archives(tmp_path, monkeypatch, kind):
    """Members whose sizes differ need not be read: heads of those in a tar; those in a zip are whole, and counted."""
    make_clean(tmp_path / "data")
    path = shutil.make_archive(str(tmp_path / "packed"), kind, tmp_path / "data")
    dataset = load_dataset(path)
    sizes = np.concatenate([images.file_sizes for images in dataset.splits.values()])
    shared = sum(size for size in sizes.tolist() if (sizes == size).sum() > 1)
    monkeypatch.setattr("vitreous.data.inspection.whole.FAST_MAX_BYTES", shared + 12 * len(sizes))
    found = inspect_fast(dataset)
    assert ("unchecked" in found) == (kind == "zip")
    if kind == "zip":
        assert details(found, "unchecked")[0].startswith("the images are too large to compare before training")
