import csv
import io
import json

import numpy as np
import pytest
from PIL import Image

from vitreous.data import load_dataset, load_evaluation_images, load_images
from vitreous.data.sources.labels import parse_labels, sort_names, to_text
from vitreous.errors import DataError, MissingDependencyError, MissingPathError


def png(value=0):
    stream = io.BytesIO()
    Image.new("RGB", (5, 4), (value % 256, 0, 0)).save(stream, "png")
    return stream.getvalue()


def write_images(root, count, folder="img"):
    (root / folder).mkdir(parents=True, exist_ok=True)
    names = [f"{folder}/{i:03}.png" for i in range(count)]
    for i, name in enumerate(names):
        (root / name).write_bytes(png(i))
    return names


def write_csv(path, rows, delimiter=",", encoding="utf-8"):
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def rows_of(root, count=40, **columns):
    return [
        {"path": name, "label": "ab"[i % 2], **{key: values[i] for key, values in columns.items()}}
        for i, name in enumerate(write_images(root, count))
    ]


def sizes(dataset):
    return {split: len(images) for split, images in dataset.splits.items()}


def fails(message, data, **changes):
    with pytest.raises(DataError) as caught:
        load_dataset(data, **changes)
    assert message in str(caught.value), str(caught.value)


# What a table holds


@pytest.mark.parametrize(
    ("name", "delimiter", "encoding"),
    [
        ("t.csv", ",", "utf-8"),
        ("t.csv", ";", "utf-8-sig"),
        ("t.csv", "\t", "utf-8"),
        ("t.csv", "|", "utf-8"),
        ("t.TSV", "\t", "utf-8"),
    ],
)
def test_a_table_of_paths(tmp_path, name, delimiter, encoding):
    table = write_csv(tmp_path / name, rows_of(tmp_path), delimiter, encoding)
    dataset = load_dataset(table)
    assert dataset.name == "t" and dataset.root == table and dataset.class_names == ("a", "b")
    assert sizes(dataset) == {"train": 32, "val": 4, "test": 4}
    assert dataset.notes[:2] == ["images: column path", "labels: column label"]
    for images in dataset.splits.values():
        for example, file in zip(images, images.names, strict=True):
            number = int(file[4:7])
            assert example.image[0, 0, 0] == number and example.label == number % 2
    assert dataset.splits["train"].path(0) == tmp_path / dataset.splits["train"].names[0]
    assert (dataset.splits["train"].file_sizes > 0).all()


def test_absolute_paths(tmp_path):
    rows = [{**row, "path": str(tmp_path / row["path"])} for row in rows_of(tmp_path)]
    (tmp_path / "tables").mkdir()
    assert sizes(load_dataset(write_csv(tmp_path / "tables/t.csv", rows)))["train"] == 32


def test_any_column_names(tmp_path):
    rows = [{"Foo": row["label"], "Bar": row["path"], "x": 1} for row in rows_of(tmp_path)]
    table = write_csv(tmp_path / "t.csv", rows)
    fails(
        f"Cannot use the table {table}. Expected to know which column holds the labels. "
        "Received: columns=['Foo', 'x']. Name it with label_column (--label-column).",
        table,
    )
    dataset = load_dataset(table, label_column="Foo")  # the paths are known by their looks
    assert dataset.class_names == ("a", "b") and "images: column Bar" in dataset.notes
    assert load_dataset(table, label_column="Foo", image_column="Bar").fingerprint == dataset.fingerprint
    fails("Expected a column 'foo' for the labels. Received: columns=['Foo', 'x']. Name one", table, label_column="foo")
    fails("Expected a column 'p' for the images. Received: columns=['Foo', 'Bar', 'x'].", table, image_column="p")
    fails("Expected a column 'g' for the groups.", table, label_column="Foo", group_column="g")
    fails("Expected a column 's' for the splits.", table, label_column="Foo", split_column="s")


def test_a_column_of_no_images(tmp_path):
    fails(
        "Expected paths of images in the column 'label'. Received: 40 paths to no file, such as 'a'. "
        f"Paths count from {tmp_path}: mend them, or name another column with image_column (--image-column).",
        write_csv(tmp_path / "t.csv", rows_of(tmp_path)),
        image_column="label",
    )


def test_columns_that_may_be_meant(tmp_path):
    rows = [{**row, "category": "c", "tag": "t"} for row in rows_of(tmp_path)]
    assert load_dataset(write_csv(tmp_path / "t.csv", rows)).class_names == ("a", "b")  # label tells most
    rows = [{"path": row["path"], "category": row["label"], "tag": "t"} for row in rows]
    fails(
        "which column holds the labels. Received: columns=['category', 'tag'], of which category, tag may be meant.",
        write_csv(tmp_path / "t.csv", rows),
    )
    rows = [{"front": row["path"], "back": row["path"], "label": row["label"]} for row in rows_of(tmp_path)]
    fails(
        "holds the images. Received: columns=['front', 'back', 'label'], of which front, back may be meant.",
        write_csv(tmp_path / "t.csv", rows),
    )
    assert sizes(load_dataset(tmp_path / "t.csv", image_column="back"))["train"] == 32


def test_other_columns_are_kept(tmp_path):
    rows = rows_of(tmp_path, camera=[f"c{i % 3}" for i in range(40)])
    dataset = load_dataset(write_csv(tmp_path / "t.csv", rows))
    train = dataset.splits["train"]
    assert list(train.columns) == ["camera"]
    assert all(train.columns["camera"][i] == f"c{int(name[4:7]) % 3}" for i, name in enumerate(train.names))
    assert "if images of one camera belong together, pass --group-column camera" in dataset.notes


def test_json_lines(tmp_path):
    rows = rows_of(tmp_path)
    table = tmp_path / "t.jsonl"
    table.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert load_dataset(table).fingerprint == load_dataset(write_csv(tmp_path / "t.csv", rows)).fingerprint
    table.write_text('{"path": "a.png"}\n[1]\n')
    fails("Expected a JSON object in every line. Received: line 2: [1]. Mend it.", table)
    table.write_text('{"path"\n')
    fails("Expected a JSON object in every line. Received: line 1: ", table)
    table.write_text("")
    fails("Received: no rows. Add rows.", table)


def test_tables_that_are_none(tmp_path):
    table = tmp_path / "t.csv"
    table.write_bytes(b"path,label\na.png,\xff\n")
    fails(f"Cannot use the table {table}. Expected text in UTF-8, with a delimiter. Received: 'utf-8' codec", table)
    table.write_text("path,label\na.png,x\nb.png\n")
    fails("Expected 2 values in every row, as in the first line. Received: 1 in line 3. Mend that line;", table)
    table.write_text("path,label\n")
    fails("Expected a line of column names, and rows below it. Received: 0 rows. Add rows.", table)
    table.write_text("")
    fails("Received: 0 rows.", table)
    table.write_text("a.png,x\nb.png,y\n")
    fails("Expected a first line with the names of the columns. Received: first line=['a.png', 'x'].", table)
    table.write_text("path,label,label\na.png,x,x\n")
    fails("Expected a name of its own for every column. Received: columns=['path', 'label', 'label'].", table)
    table.write_text("path,label\n,x\n,y\n")
    fails("Expected images. Received: an empty column 'path'. Fill it, or name another one.", table)
    with pytest.raises(MissingPathError, match=r"Received: data='.*none\.csv', which does not exist"):
        load_dataset(tmp_path / "none.csv")


# Labels


def test_to_text():
    values = ("x ", 3, np.int64(3), 3.0, np.float32(3), 2.5, True, b"y", "", "  ", None, float("nan"))
    assert [to_text(value) for value in values] == ["x", "3", "3", "3", "3", "2.5", "True", "y", *[None] * 4]


def test_names_in_order():
    assert sort_names(["10", "9", "-1", "2.5"]) == ("-1", "2.5", "9", "10")
    assert sort_names(["b", "a", "10"]) == ("10", "a", "b")


def test_parse_labels():
    assert parse_labels(["a", None, ""]) == ([("a",), None, None], False)
    assert parse_labels(["a|b", "", None, "b| a||b"], "|") == ([("a", "b"), (), None, ("b", "a")], True)
    assert parse_labels([["a", "b"], [], None]) == ([("a", "b"), (), None], True)
    assert parse_labels([0, 1, -1, 2], names=("x", "y")) == ([("x",), ("y",), None, None], False)
    assert parse_labels([[0, 1]], names=("x", "y")) == ([("x", "y")], True)


def test_numeric_labels_are_in_numeric_order(tmp_path):
    names = write_images(tmp_path, 36)
    table = write_csv(tmp_path / "t.csv", [{"path": n, "label": i % 12} for i, n in enumerate(names)])
    assert load_dataset(table).class_names == tuple(map(str, range(12)))


def test_missing_labels_and_images(tmp_path):
    rows = rows_of(tmp_path)
    rows[3]["label"] = rows[4]["label"] = ""
    rows[5]["path"] = ""
    (tmp_path / rows[6]["path"]).write_bytes(b"")
    (tmp_path / rows[7]["path"]).unlink()
    dataset = load_dataset(write_csv(tmp_path / "t.csv", rows))
    assert sum(sizes(dataset).values()) == 35 and dataset.num_ignored == 0  # the notes name them; they are no files
    assert dataset.broken == {"img/006.png": "an empty file", "img/007.png": "a file that is not there"}
    assert "1 rows without an image are left out" in dataset.notes
    assert "2 images without a label are left out" in dataset.notes


def test_a_class_whose_files_are_all_missing(tmp_path):
    rows = [
        {**row, "path": f"wrong/{row['path']}" if row["label"] == "a" else row["path"]} for row in rows_of(tmp_path)
    ]
    fails(
        "Expected a readable training image in every class. Received: class='a' with 20 image files "
        "(wrong/img/000.png: a file that is not there, wrong/img/002.png: a file that is not there and 18 more). "
        f"Paths count from {tmp_path}.",
        write_csv(tmp_path / "t.csv", rows),
    )


def test_one_class(tmp_path):
    rows = [{**row, "label": "a"} for row in rows_of(tmp_path)]
    fails(
        "Expected at least two classes. Received: classes=['a'] in the column 'label' of 40 labelled images.",
        write_csv(tmp_path / "t.csv", rows),
    )


def test_a_label_that_cannot_be_printed(tmp_path):
    rows = rows_of(tmp_path)
    rows[3]["label"] = "b\x1b[31m"
    fails(
        "Expected labels in Unicode that can be printed. Received: label='b\\x1b[31m' in 'label'. Mend this label.",
        write_csv(tmp_path / "t.csv", rows),
    )


def several(root, count=60):
    names = write_images(root, count)
    texts = ["|".join(name for name, n in (("two", 2), ("three", 3), ("five", 5)) if i % n == 0) for i in range(count)]
    return names, texts


def test_several_labels(tmp_path):
    names, texts = several(tmp_path)
    rows = [{"path": name, "tags": text} for name, text in zip(names, texts, strict=True)]
    table = write_csv(tmp_path / "t.csv", rows)
    assert "36 texts in tags hold '|': if" not in " ".join(load_dataset(table, label_separator="|").notes)
    dataset = load_dataset(table, label_separator="|")
    assert dataset.is_multi_label and dataset.class_names == ("five", "three", "two")
    for images in dataset.splits.values():
        assert images.labels.dtype == bool and images.labels.shape == (len(images), 3)
        for name, labels in zip(images.names, images.labels, strict=True):
            assert labels.tolist() == [int(name[4:7]) % n == 0 for n in (5, 3, 2)]
    assert sum(sizes(dataset).values()) == 60 and 5 <= sizes(dataset)["test"] <= 7
    assert "16 images have none of the labels" in dataset.notes
    assert any(note.endswith("drawn label by label with seed 0") for note in dataset.notes)
    lists = tmp_path / "t.jsonl"
    lists.write_text(
        "\n".join(json.dumps({"path": n, "tags": t.split("|") if t else []}) for n, t in zip(names, texts, strict=True))
    )
    assert load_dataset(lists).fingerprint == dataset.fingerprint


def test_a_separator_that_was_not_named(tmp_path):
    names, texts = several(tmp_path)
    rows = [{"path": name, "tags": text} for name, text in zip(names, texts, strict=True)]
    notes = load_dataset(write_csv(tmp_path / "t.csv", rows)).notes
    assert "16 texts in tags hold '|': if that parts several labels, pass --label-separator '|'" in notes


# Splits


def test_a_split_column(tmp_path):
    words = ["train"] * 30 + ["Validation"] * 4 + ["test"] * 4 + [""] * 2
    dataset = load_dataset(write_csv(tmp_path / "t.csv", rows_of(tmp_path, split=words)))
    assert sizes(dataset) == {"train": 30, "val": 4, "test": 4}
    assert "splits: column split" in dataset.notes and "2 images in no split are left out" in dataset.notes
    assert "train, val and test are as the values of split give them" in dataset.notes


@pytest.mark.parametrize("word", ["dev", "Eval", "evaluation"])
def test_other_words_for_validation(tmp_path, word):
    words = ["train"] * 30 + [word] * 6 + ["test"] * 4
    dataset = load_dataset(write_csv(tmp_path / "t.csv", rows_of(tmp_path, split=words)))
    assert sizes(dataset) == {"train": 30, "val": 6, "test": 4}


def test_a_split_column_of_another_name(tmp_path):
    table = write_csv(tmp_path / "t.csv", rows_of(tmp_path, part=["train"] * 30 + ["valid"] * 10))
    assert sizes(load_dataset(table)) == {"train": 32, "val": 4, "test": 4}
    dataset = load_dataset(table, split_column="part")
    assert sizes(dataset) == {"train": 27, "val": 3, "test": 10}
    assert "test is as the values of part give it" in dataset.notes


def test_split_columns_that_do_not_work(tmp_path):
    expected = (
        "Expected one of train, training, val, valid, validation, dev, eval, evaluation, test, testing in the column "
    )
    for name, words in (("split", ["train"] * 30), ("split", ["a"] * 30), ("subset", ["train"] * 30)):
        table = write_csv(tmp_path / "t.csv", rows_of(tmp_path, **{name: [*words, *["holdout"] * 10]}))
        fails(f"{expected}{name!r}. Received: values=[", table)
        fails("'holdout']. Rename these values, or the column.", table)
        fails("'holdout']. Rename these values, or leave out split_column.", table, split_column=name)
    table = write_csv(tmp_path / "t.csv", rows_of(tmp_path, subset=["north"] * 30 + ["south"] * 10))
    dataset = load_dataset(table)
    assert sizes(dataset)["train"] == 32
    assert "the column subset is not used as split: north, south is not train, val or test" in dataset.notes
    table = write_csv(tmp_path / "t.csv", rows_of(tmp_path, split=["test"] * 40))
    fails("Expected images for training. Received: splits=['test']. Mark some as train, or drop the splits.", table)


def test_classes_of_held_out_rows_alone(tmp_path):
    rows = rows_of(tmp_path, split=["train"] * 30 + ["test"] * 10)
    rows[35]["label"] = "z"
    fails(
        "the classes of held-out images among those of the training images. Received: unknown classes in test: z.",
        write_csv(tmp_path / "t.csv", rows),
    )


def test_groups_are_never_on_both_sides(tmp_path):
    patients = [f"p{i // 4}" for i in range(80)]
    patients[7] = ""
    table = write_csv(tmp_path / "t.csv", rows_of(tmp_path, 80, patient=patients))
    for seed in range(5):
        dataset = load_dataset(table, group_column="patient", seed=seed, val_fraction=0.2, test_fraction=0.2)
        found = [{p for p in images.columns["patient"] if p} for images in dataset.splits.values()]
        assert len(found) == 3 and sum(map(len, found)) == len(set.union(*found)) == 20
        assert 12 <= sizes(dataset)["test"] <= 20
    assert "1 images have no patient, and are a group each" in dataset.notes
    assert "drawn by whole groups of patient with seed 4" in " ".join(dataset.notes)


def test_groups_are_compared_as_labels_are(tmp_path):
    patients = [f"p{i // 8}" + " " * (i % 3) for i in range(80)]
    patients[5] = patients[6] = "  "
    table = write_csv(tmp_path / "t.csv", rows_of(tmp_path, 80, patient=patients))
    for seed in range(3):
        dataset = load_dataset(table, group_column="patient", seed=seed)
        found = [{p.strip() for p in images.columns["patient"]} - {""} for images in dataset.splits.values()]
        assert len(found) == 3 and sum(map(len, found)) == len(set.union(*found)) == 10
    assert "2 images have no patient, and are a group each" in dataset.notes
    words = ["train"] * 40 + ["test"] * 40
    rows = rows_of(tmp_path, 80, patient=["p1", "p2 "] * 20 + ["p2", "p3"] * 20, split=words)
    dataset = load_dataset(write_csv(tmp_path / "t.csv", rows), group_column="patient")
    assert "1 groups of patient are in train and in test, as the data give them: p2" in dataset.notes


def test_a_single_group(tmp_path):
    rows = rows_of(tmp_path, patient=["p"] * 40)
    table = write_csv(tmp_path / "t.csv", rows)
    fails(
        f"Cannot split {table} by whole groups. Expected at least two groups of patient. Received: 1. "
        "Leave out group_column, or set val_fraction and test_fraction to 0.",
        table,
        group_column="patient",
    )
    dataset = load_dataset(table, group_column="patient", val_fraction=0, test_fraction=0)
    assert sizes(dataset) == {"train": 40}
    rows = [{**row, "split": "train" if i < 30 else "test"} for i, row in enumerate(rows)]
    fails("Expected at least two groups of patient.", write_csv(table, rows), group_column="patient")


def test_groups_that_are_the_labels(tmp_path):
    table = write_csv(tmp_path / "t.csv", rows_of(tmp_path, species=[f"s{i % 4}" for i in range(40)]))
    fails(
        "Expected groups in another column than the labels. Received: group_column='label'. "
        "Name another column for the groups, or for the labels, with label_column (--label-column).",
        table,
        group_column="label",
    )
    fails("Received: group_column='species'.", table, group_column="species", label_column="species")
    dataset = load_dataset(table, group_column="species", label_column="label", test_fraction=0.25)
    assert dataset.class_names == ("a", "b")
    assert load_dataset(table, group_column="species").class_names == ("a", "b")


def test_groups_that_the_data_divide(tmp_path):
    rows = rows_of(tmp_path, patient=[f"p{i % 10}" for i in range(40)], split=["train"] * 35 + ["test"] * 5)
    notes = load_dataset(write_csv(tmp_path / "t.csv", rows), group_column="patient", val_fraction=0).notes
    assert "5 groups of patient are in train and in test, as the data give them: p5, p6, p7, p8, p9" in notes
    assert "there is no val split: its share is 0, or no group of patient can be spared" in notes


def test_groups_of_a_source_without_columns(tmp_path):
    for name in ("a", "b"):
        write_images(tmp_path, 10, name)
    fails(
        "Expected a source with columns, one of them group_column. Received: group_column='p'.",
        tmp_path,
        group_column="p",
    )


@pytest.mark.parametrize("group_column", [None, "patient"])
def test_folds_partition_the_images(tmp_path, group_column):
    rows = rows_of(tmp_path, patient=[f"p{i // 2}" for i in range(40)])
    table = write_csv(tmp_path / "t.csv", rows)
    folds = [load_dataset(table, num_folds=4, fold=k, group_column=group_column) for k in (1, 2, 3, 4)]
    tests = [name for dataset in folds for name in dataset.splits["test"].names]
    assert sorted(tests) == [row["path"] for row in rows]
    for dataset in folds:
        parts = [set(images.names) for images in dataset.splits.values()]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 40
        assert 8 <= sizes(dataset)["test"] <= 12 and sizes(dataset)["val"] >= 2
    assert f"test is fold 4 of 4, {sizes(folds[3])['test']} of 40 images" in " ".join(folds[3].notes)
    if group_column:
        for dataset in folds:
            found = [set(images.columns["patient"]) for images in dataset.splits.values()]
            assert sum(map(len, found)) == 20


def test_folds_that_cannot_be(tmp_path):
    fails(
        "Cannot make 5 folds of digits. Expected data that is not split. Received: splits=['train', 'test'].",
        "digits",
        num_folds=5,
    )
    rows = rows_of(tmp_path, patient=[f"p{i // 20}" for i in range(40)])
    table = write_csv(tmp_path / "t.csv", rows)
    fails(
        "Expected at least as many groups of patient. Received: 2. Make fewer folds.",
        table,
        num_folds=3,
        group_column="patient",
    )
    fails("Expected at least as many images. Received: 40. Make fewer folds.", table, num_folds=41)


# Parquet


def write_parquet(path, columns, **options):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


@pytest.fixture
def arrow():
    return pytest.importorskip("pyarrow")


@pytest.mark.parametrize("kind", ["bytes", "records", "paths"])
@pytest.mark.parametrize("is_mapped", [False, True])
def test_parquet(tmp_path, monkeypatch, arrow, kind, is_mapped):
    monkeypatch.setattr("vitreous.data.sources.tables._MEMORY_BYTES", 0 if is_mapped else 1 << 30)
    monkeypatch.setenv("VITREOUS_CACHE", str(tmp_path / "cache"))
    rows = rows_of(tmp_path)
    images = [(tmp_path / row["path"]).read_bytes() for row in rows]
    if kind == "records":
        images = [{"bytes": data, "path": row["path"]} for data, row in zip(images, rows, strict=True)]
        images[5]["bytes"] = None
    column = {"paths": [row["path"] for row in rows]}.get(kind, images)
    table = write_parquet(
        tmp_path / "t.parquet",
        {"image": column, "label": [i % 2 for i in range(40)], "x": [1.5] * 40},
        row_group_size=7,
    )
    dataset = load_dataset(table)
    assert dataset.class_names == ("0", "1") and sizes(dataset) == {"train": 32, "val": 4, "test": 4}
    for split in dataset.splits.values():
        assert split.columns["x"].dtype == float
        assert kind == "records" or (split.file_sizes == [len(png(row)) for row in split.rows]).all()
        for example, row in zip(split, split.rows, strict=True):
            assert example.image[0, 0, 0] == row and example.label == row % 2
    assert load_dataset(table).fingerprint == dataset.fingerprint
    assert bool(list(tmp_path.glob("cache/files/t-*.arrow"))) == (is_mapped and kind != "paths")


def test_parquet_with_broken_images(tmp_path, arrow):
    images = [png(i) for i in range(20)]
    images[3], images[4], images[5] = None, b"", b"<html>"
    dataset = load_dataset(write_parquet(tmp_path / "t.parquet", {"image": images, "label": list("ab") * 10}))
    assert dataset.broken == {
        "t/3": "no bytes in this row",
        "t/4": "an empty file",
        "t/5": "not an image in a known format",
    }


def test_parquet_that_is_none(tmp_path, arrow):
    (tmp_path / "t.parquet").write_bytes(b"no parquet")
    fails("Expected a Parquet file. Received: Parquet magic bytes not found", tmp_path / "t.parquet")
    fails(
        "Expected rows. Received: 0 rows. Add rows.",
        write_parquet(tmp_path / "t.parquet", {"image": arrow.array([], "binary")}),
    )


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "t.parquet").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(MissingDependencyError) as caught:
        load_dataset(tmp_path / "t.parquet")
    assert str(caught.value) == (
        f"The table {tmp_path / 't.parquet'} cannot be used. Expected the package pyarrow. Received: it is not "
        "installed. Install it with: pip install 'vitreous[tables]'"
    )


# For evaluation and prediction


def test_evaluation_on_the_table_of_training(tmp_path):
    table = write_csv(tmp_path / "t.csv", rows_of(tmp_path, patient=[f"p{i // 2}" for i in range(40)]))
    made_by = {"seed": 3, "val_fraction": 0.2, "test_fraction": 0.2, "group_column": "patient"}
    trained = load_dataset(table, **made_by)
    options = {"made_by": made_by, "trained_on": trained.fingerprint, "trained_at": str(table)}
    found = load_evaluation_images(table, trained.class_names, **options)
    assert found.split == "test" and found.images.names == trained.splits["test"].names
    assert len(load_evaluation_images(table, trained.class_names, split="all", **options).images) == 40
    write_csv(table, rows_of(tmp_path, 42, patient=[f"p{i // 2}" for i in range(42)]))
    with pytest.raises(DataError, match=r"Expected the data as it was in training\. Received: other files"):
        load_evaluation_images(table, trained.class_names, **options)


def test_evaluation_on_another_table(tmp_path):
    rows = [{**row, "label": "b"} for row in rows_of(tmp_path, 10)]
    table = write_csv(tmp_path / "other.csv", rows)
    made_by = {"num_folds": 5, "fold": 2, "group_column": "patient", "split_column": "part"}
    found = load_evaluation_images(table, ("a", "b", "c"), made_by=made_by)
    assert found.split == "all" and found.images.labels.tolist() == [1] * 10
    rows = [{**row, "split": "test"} for row in rows]
    assert len(load_evaluation_images(write_csv(table, rows), ("a", "b")).images) == 10
    with pytest.raises(DataError, match=r"Received: unknown classes b\. Rename"):
        load_evaluation_images(table, ("a",))


def test_evaluation_on_a_split_of_another_table(tmp_path):
    words = ["train"] * 20 + ["val"] * 12 + ["test"] * 8
    table = write_csv(tmp_path / "t.csv", rows_of(tmp_path, split=words))
    for split, count in (("train", 20), ("val", 12), ("test", 8), (None, 8), ("all", 40)):
        found = load_evaluation_images(table, ("a", "b"), split=split, trained_at="/elsewhere")
        assert (found.split, len(found.images)) == (split or "test", count)
    for split in ("train", "val"):
        with pytest.raises(DataError, match=r"Cannot tell which images of .* the model has seen"):
            load_evaluation_images(table, ("a", "b"), split=split, trained_at=str(table))
    words = ["train"] * 20 + ["val"] * 20
    write_csv(table, rows_of(tmp_path, split=words))
    for split, name in (("val", "val"), ("test", "test"), (None, "test")):
        found = load_evaluation_images(table, ("a", "b"), split=split)
        assert found.split == name and found.images.names == [f"img/{i:03}.png" for i in range(20, 40)]
    write_csv(table, rows_of(tmp_path, split=["val"] * 20 + ["test"] * 20))
    assert len(load_evaluation_images(table, ("a", "b"), split="val").images) == 20
    with pytest.raises(
        DataError, match=r"Expected a train split\. Received: splits=\['val', 'test'\]\. Pass one of these, or all\."
    ):
        load_evaluation_images(table, ("a", "b"), split="train")
    write_csv(table, rows_of(tmp_path))
    with pytest.raises(DataError, match=r"Received: other files, or no val folder\."):
        load_evaluation_images(table, ("a", "b"), split="val")


def test_evaluation_on_classes_of_held_out_rows(tmp_path):
    rows = rows_of(tmp_path, split=["train"] * 20 + ["test"] * 20)
    for i, row in enumerate(rows):
        row["label"] = "c" if i >= 30 else row["label"]
        if i < 20 and row["label"] == "a":  # no training image of a can be read
            (tmp_path / row["path"]).write_bytes(b"")
    table = write_csv(tmp_path / "t.csv", rows)
    found = load_evaluation_images(table, ("c", "b", "a"))
    assert found.images.labels.tolist() == [2, 1] * 5 + [0] * 10 and len(found.broken) == 10
    for row in rows:
        (tmp_path / row["path"]).write_bytes(b"")
    with pytest.raises(
        DataError, match=r"Expected an image that can be read\. Received: 40 broken ones \(img/000\.png: an empty file,"
    ):
        load_evaluation_images(table, ("c", "b", "a"))


def test_columns_named_for_an_evaluation_must_be_there(tmp_path):
    table = write_csv(tmp_path / "t.csv", rows_of(tmp_path))
    for name, kind in (("split_column", "splits"), ("group_column", "groups")):
        assert len(load_evaluation_images(table, ("a", "b"), made_by={name: "part"}).images) == 40
        with pytest.raises(DataError, match=rf"Expected a column 'prat' for the {kind}\. Received: columns="):
            load_evaluation_images(table, ("a", "b"), made_by={name: "part"}, changes={name: "prat"})


def test_evaluation_with_several_labels(tmp_path):
    names, texts = several(tmp_path, 30)
    rows = [{"path": name, "tags": text} for name, text in zip(names, texts, strict=True)]
    table = write_csv(tmp_path / "t.csv", rows)
    made_by = {"label_separator": "|"}
    found = load_evaluation_images(table, ("two", "one", "three", "five"), made_by=made_by, is_multi_label=True)
    numbers = [int(name[4:7]) for name in found.images.names]
    assert found.images.labels.tolist() == [[i % 2 == 0, False, i % 3 == 0, i % 5 == 0] for i in numbers]
    with pytest.raises(
        DataError, match=r"Expected one label an image, as the model was trained with\. Received: several"
    ):
        load_evaluation_images(table, ("two", "three", "five"), made_by=made_by, is_multi_label=False)
    single = write_csv(tmp_path / "s.csv", rows_of(tmp_path, 4))
    found = load_evaluation_images(single, ("b", "a"), is_multi_label=True)
    assert found.images.labels.tolist() == [[False, True], [True, False]] * 2


def test_images_of_a_table_without_labels(tmp_path):
    rows = [{"file": row["path"], "note": "x"} for row in rows_of(tmp_path, 3)]
    images = load_images(write_csv(tmp_path / "t.csv", rows))
    assert images.names == [row["file"] for row in rows] and images.labels.tolist() == [-1] * 3
    assert [example.image[0, 0, 0] for example in images] == [0, 1, 2]
    both = load_images([tmp_path / "img/002.png", tmp_path / "t.csv", "digits"])
    assert both.names[:3] == [str(tmp_path / "img/002.png"), "img/000.png", "img/001.png"]
    assert len(both) == 4 + 1797 and both.load(3)[0, 0, 0] == 2 and both.load(1800).shape == (8, 8, 3)
