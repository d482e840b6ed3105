"""Vectors of images: from backbones to files, and the nearest images of an image. What they are worth: *_probe.py."""

import json

import keras
import numpy as np
import pytest
from embeddings_data import make_backbone, make_colours
from run_folder import make_run

import vitreous
from vitreous.data import load_dataset, load_images, resize_image
from vitreous.embeddings import (
    embed,
    embed_to_file,
    files,
    find_neighbours,
    load_backbone,
    load_embeddings,
    load_sources,
)
from vitreous.embeddings.extract import read_labelled
from vitreous.embeddings.neighbours import search
from vitreous.errors import ConfigError, DataError, ImageError, MissingPathError, UnknownNameError
from vitreous.figures import draw_neighbours
from vitreous.model import normalize_images
from vitreous.spec import ViTConfig

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """60 images in three classes of colours, without splits."""
    return make_colours(tmp_path_factory.mktemp("data") / "colours")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A tiny model with a class token and a register, in a file."""
    return make_backbone(tmp_path_factory.mktemp("models") / "tiny.keras")


@pytest.fixture(scope="module")
def run(colours, tmp_path_factory):
    """A run of seed 7 on these images, whose model nobody trained."""
    out = tmp_path_factory.mktemp("runs") / "colours"
    config = ViTConfig(image_size=8, patch_size=4, projection_dim=16, num_blocks=1, num_heads=2, num_classes=3)
    return make_run(out, config, ("blue", "green", "red"), colours, seed=7)


@pytest.fixture(scope="module")
def table(backbone, colours, tmp_path_factory):
    out = tmp_path_factory.mktemp("embeddings") / "colours.parquet"
    embed_to_file(backbone, colours, out)
    return out


def expected_tokens(backbone, colours, num_images=4, block=None):
    """Tokens of the first images, computed without any of the code under test."""
    loaded = load_backbone(backbone)
    images = load_images(colours)
    pixels = np.stack([resize_image(images.load(i), loaded.input_spec) for i in range(num_images)])
    normalized = normalize_images(keras.ops.convert_to_tensor(pixels), loaded.input_spec)
    return loaded.model, keras.ops.convert_to_numpy(loaded.model.tokens(normalized, block))


def test_each_pooling_is_what_the_model_gives(backbone, colours):
    _, tokens = expected_tokens(backbone, colours)
    wanted = {
        "head": tokens[:, 0],
        "class": tokens[:, 0],
        "mean": tokens[:, 2:].mean(axis=1),
        "patches": tokens[:, 2:],
    }
    for pooling, vectors in wanted.items():
        found = embed(backbone, colours, pooling=pooling, batch_size=7)
        assert found.vectors.dtype == "float32" and len(found) == len(found.vectors) == 60
        np.testing.assert_allclose(found.vectors[:4], vectors, atol=2e-5, err_msg=pooling)


def test_an_earlier_block_is_normalised_at_the_end(backbone, colours):
    model, tokens = expected_tokens(backbone, colours, block=0)
    normalized = keras.ops.convert_to_numpy(model.norm(tokens))
    np.testing.assert_allclose(embed(backbone, colours, block=0).vectors[:4], normalized[:, 0], atol=2e-5)
    patches = embed(backbone, colours, block=-2, pooling="patches").vectors
    np.testing.assert_allclose(patches[:4], normalized[:, 2:], atol=2e-5)


@pytest.mark.parametrize("suffix", [".parquet", ".npz"])
@pytest.mark.parametrize("options", [{}, {"dtype": "float16", "pooling": "patches"}], ids=["pooled", "patches"])
def test_a_file_holds_what_was_computed(backbone, colours, tmp_path, monkeypatch, suffix, options):
    monkeypatch.setattr(files, "_GROUP_BYTES", 4000)  # several row groups
    out = tmp_path / f"colours{suffix}"
    written = embed_to_file(backbone, colours, out, batch_size=16, **options)
    assert written["num_images"] == 60
    found, wanted = load_embeddings(out), embed(backbone, colours, batch_size=16, **options)
    np.testing.assert_array_equal(found.vectors, wanted.vectors)
    assert found.vectors.dtype == options.get("dtype", "float32")
    assert (found.names, found.labels, found.splits) == (wanted.names, wanted.labels, wanted.splits)
    assert found.names[0] == "blue/00.png" and found.labels[0] == "blue" and set(found.splits) == {"all"}
    assert found.metadata == wanted.metadata
    assert found.metadata["fingerprint"] == load_backbone(backbone).fingerprint
    assert found.metadata["input"]["image_size"] == [16, 16] and found.metadata["vitreous"] == vitreous.__version__
    assert [path.name for path in tmp_path.iterdir()] == [out.name]  # nothing temporary is left


def test_parquet_is_plain_to_others(table, backbone, colours, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    file = parquet.ParquetFile(table)
    assert file.schema_arrow.names == ["image", "label", "split", "embedding"]
    assert str(file.schema_arrow.field("embedding").type) == "fixed_size_list<element: float>[32]"
    monkeypatch.setattr(files, "_GROUP_BYTES", 32 * 4 * 16)
    out = tmp_path / "groups.parquet"
    embed_to_file(backbone, colours, out, batch_size=16)
    metadata = parquet.ParquetFile(out).metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [16, 16, 16, 12]


@pytest.mark.parametrize("suffix", [".parquet", ".npz"])
def test_several_labels_an_image(backbone, colours, tmp_path, suffix):
    rows = ["image,labels,split", "blue/00.png,a;b,train", "blue/01.png,,train", "red/00.png,b,test"]
    (colours / "labels.csv").write_text("\n".join(rows))
    out = tmp_path / f"labels{suffix}"
    try:
        embed_to_file(backbone, colours / "labels.csv", out, label_separator=";")
        with pytest.raises(DataError, match="species"):  # what was named must be there: no quiet fall-back
            embed(backbone, colours / "labels.csv", label_column="species")
    finally:
        (colours / "labels.csv").unlink()
    found = load_embeddings(out)
    assert found.labels == [("a", "b"), (), ("b",)]
    assert found.splits == ["train", "train", "test"]


def test_images_without_labels(backbone, colours):
    notes = []
    flat = embed(backbone, colours / "red", on_note=notes.append)
    assert flat.labels is None and set(flat.splits) == {"all"} and len(flat) == 20
    assert any(note.startswith("without labels") for note in notes)
    some = embed(backbone, [colours / "red" / "03.png", colours / "blue"])
    assert some.names[0] == str(colours / "red" / "03.png") and len(some) == 21
    np.testing.assert_allclose(some.vectors[0], flat.vectors[3], atol=2e-5)


def test_a_broken_image_is_left_out_and_named(backbone, tmp_path):
    colours = make_colours(tmp_path / "colours", count=4)
    path = colours / "red" / "01.png"
    path.write_bytes(path.read_bytes()[:60])  # a whole header, half the pixels
    broken = {}
    found = embed(backbone, colours, on_error=broken.__setitem__)
    assert list(broken) == ["red/01.png"] and "truncated" in broken["red/01.png"]
    assert len(found) == 11 and found.names[-3:] == ["red/00.png", "red/02.png", "red/03.png"]
    assert found.labels == ["blue"] * 4 + ["green"] * 4 + ["red"] * 3
    np.testing.assert_allclose(found.vectors[-1], embed(backbone, path.with_name("03.png")).vectors[0], atol=2e-5)
    with pytest.raises(ImageError, match=r"red/01\.png"):
        embed_to_file(backbone, colours, tmp_path / "out.npz")
    assert not list(tmp_path.glob("*out.npz*"))
    for each in colours.rglob("*.png"):
        each.write_bytes(path.read_bytes())
    with pytest.raises(DataError, match="Expected at least one image that can be read"):
        embed(backbone, colours / "red", on_error=broken.__setitem__)


def test_a_run_brings_the_splits_of_its_training(run, colours):
    found = embed(run, colours)
    wanted = load_dataset(colours, seed=7)
    for split, images in wanted.splits.items():
        assert [name for name, part in zip(found.names, found.splits, strict=True) if part == split] == images.names
    np.testing.assert_array_equal(found.vectors, embed(run.path, colours).vectors)
    np.testing.assert_array_equal(found.vectors, embed(run.path / "model.keras", colours).vectors)
    assert found.metadata["backbone"] == str(run.path)


def test_a_run_is_probed_on_images_that_it_has_not_seen(run, colours, tmp_path):
    def read(data):
        found = read_labelled(data, run, seed=None, changes={}, min_classes=2)
        return found.notes, found.get_dataset(data)

    note = "splits are those of the run's training: it has not seen the test images"
    wanted = load_dataset(colours, seed=7).fingerprint
    for data in (colours, make_colours(tmp_path / "copy")):  # the same images elsewhere too
        notes, dataset = read(data)
        assert notes == (note,) and dataset.fingerprint == wanted
    notes, dataset = read(make_colours(tmp_path / "others", count=9))
    assert notes == () and dataset.fingerprint == load_dataset(tmp_path / "others", seed=0).fingerprint
    (colours / "red" / "00.png").rename(colours / "red" / "zz.png")
    try:
        notes, _ = read(colours)
    finally:
        (colours / "red" / "zz.png").rename(colours / "red" / "00.png")
    assert notes[0].startswith("WARNING: the data, or how it is split, has changed since the run was trained on it")


def test_another_image_size(run, colours):
    loaded = load_backbone(run.path, image_size=16)
    assert loaded.input_spec.image_size == loaded.model.config.image_size == (16, 16)
    assert loaded.input_spec.mean == run.input_spec.mean
    vectors = embed(loaded, colours / "red", pooling="patches", image_size=16).vectors
    assert vectors.shape == (20, 16, loaded.model.config.projection_dim)
    with pytest.raises(ConfigError, match=r"Expected that of the loaded backbone, \(16, 16\)\. Received: image_size=8"):
        embed(loaded, colours / "red", image_size=8)  # not left out quietly


def test_a_bare_name_has_random_weights_and_says_so():
    first, second, other = (load_backbone("vit_pico_patch4_32", seed=seed) for seed in (0, 0, 1))
    assert first.is_random and "its weights are random" in first.notes[0]
    assert first.fingerprint == second.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("source", "error", "text"),
    [
        ("vit_pico_patch4_23", MissingPathError, "Nearest models: vit_pico_patch4_32"),
        ("vit_tiny_patch16_224.augreg_in21k", ConfigError, "Pass timm/vit_tiny_patch16_224.augreg_in21k, or"),
        ("vit_tiny_patch16_224.nonsense", UnknownNameError, "tag='nonsense'"),
        ("runs/none", MissingPathError, r"Received: 'runs/none', which does not exist"),
    ],
)
def test_no_such_backbone(source, error, text):
    with pytest.raises(error, match=text):
        load_backbone(source)


def test_options_that_cannot_work(backbone, colours, tmp_path):
    with pytest.raises(ConfigError, match=r"^Cannot read a block of tiny\. Expected an index from -2 to 1\."):
        embed(backbone, colours, block=5)
    with pytest.raises(ConfigError, match="pooling='max'"):
        embed(backbone, colours, pooling="max")
    with pytest.raises(ConfigError, match="dtype='int8'"):
        embed(backbone, colours, dtype="int8")
    with pytest.raises(ConfigError, match="batch_size=0"):
        embed(backbone, colours, batch_size=0)
    with pytest.raises(ConfigError, match=r"Cannot write .* ends in .parquet or .npz. Received: 'out.csv'"):
        embed_to_file(backbone, colours, "out.csv")


def test_files_that_are_no_embeddings(tmp_path, table):
    whole = table.read_bytes()
    (tmp_path / "half.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_text("no")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    (tmp_path / "table.csv").write_text("no")
    with pytest.raises(ConfigError, match=r"Cannot load embeddings\. Expected a file name that ends in \.parquet"):
        load_embeddings(tmp_path / "table.csv")
    for name in ("half.parquet", "text.npz", "other.npz"):
        with pytest.raises(DataError, match=f"{name}. Expected a file that vitreous embed wrote"):
            load_embeddings(tmp_path / name)
    with pytest.raises(MissingPathError, match="Make it: vitreous embed"):
        load_embeddings(tmp_path / "none.parquet")
    parquet = pytest.importorskip("pyarrow.parquet")
    content = parquet.read_table(table)
    parquet.write_table(content.replace_schema_metadata(None), tmp_path / "bare.parquet")
    with pytest.raises(DataError, match="it has no metadata of vitreous"):
        load_embeddings(tmp_path / "bare.parquet")
    metadata = {"vitreous": json.dumps({**json.loads(content.schema.metadata[b"vitreous"]), "format": 9})}
    parquet.write_table(content.replace_schema_metadata(metadata), tmp_path / "new.parquet")
    with pytest.raises(DataError, match=r"Expected format 1 or older\. Received: format=9"):
        load_embeddings(tmp_path / "new.parquet")


def test_search_is_exact():
    generator = np.random.default_rng(0)
    bank, queries = generator.normal(size=(300, 8)), generator.normal(size=(20, 8)) * 5
    bank[7] = 0  # no direction at all
    cosines = queries @ bank.T
    cosines /= np.linalg.norm(queries, axis=1)[:, None] * np.maximum(np.linalg.norm(bank, axis=1), 1e-9)
    similarities, indices = search(bank, queries, 5)
    np.testing.assert_array_equal(indices, np.argsort(-cosines, axis=1)[:, :5])
    np.testing.assert_allclose(similarities, -np.sort(-cosines, axis=1)[:, :5], atol=1e-6)


def test_neighbours_of_names_and_of_files(table, colours, tmp_path):
    bank = load_embeddings(table)
    by_name, by_path = find_neighbours(table, ["red/05.png", colours / "red" / "05.png"], k=3)
    assert by_name == by_path and len(by_name) == 3
    assert "red/05.png" not in [each.name for each in by_name]  # not its own neighbour
    assert [each.label for each in by_name] == ["red"] * 3 and by_name[0].split == "all"
    assert by_name[0].similarity >= by_name[1].similarity >= by_name[2].similarity > 0.9
    assert by_name[0].to_dict()["label"] == "red"
    copy = tmp_path / "copy.png"
    copy.write_bytes((colours / "green" / "02.png").read_bytes())
    (near,) = find_neighbours(bank, [copy], k=200)
    assert near[0].name == "green/02.png" and near[0].similarity == pytest.approx(1, abs=1e-5) and len(near) == 60


def test_neighbours_that_cannot_be_found(table, backbone, colours, tmp_path):
    with pytest.raises(ConfigError, match="k=0"):
        find_neighbours(table, ["red/05.png"], k=0)
    with pytest.raises(MissingPathError, match=r"such as 'blue/00.png'. Received: 'none.png', which is neither"):
        find_neighbours(table, ["none.png"])
    with pytest.raises(ConfigError, match="embeddings of patches"):
        find_neighbours(embed(backbone, colours, pooling="patches"), ["red/05.png"])
    copy = tmp_path / "copy.png"
    copy.write_bytes((colours / "green" / "02.png").read_bytes())
    with pytest.raises(DataError, match="their vectors cannot be compared with this model's"):
        find_neighbours(table, [copy], backbone=load_backbone(make_backbone(tmp_path / "other.keras", seed=1)))
    bank = load_embeddings(table)
    bank.metadata["backbone"] = str(tmp_path / "gone.keras")
    with pytest.raises(DataError, match=r"Expected the backbone that made the embeddings, .*gone.keras"):
        find_neighbours(bank, [copy])


def test_pixels_come_from_where_they_were_embedded(backbone, colours, tmp_path):
    import shutil

    archive = shutil.make_archive(str(tmp_path / "colours"), "zip", colours)
    for source in (colours, archive, "digits"):
        bank = embed(backbone, source)
        pixels = load_sources(bank, [0, len(bank) - 1])
        assert all(image.dtype == np.uint8 and image.shape[2] == 3 for image in pixels)
        if source != "digits":
            np.testing.assert_array_equal(pixels[1], load_images(colours).load(59))
    bank = embed(backbone, archive)
    (tmp_path / "colours.zip").unlink()
    with pytest.raises(DataError, match="Expected the images where they were embedded"):
        load_sources(bank, [0])


def test_picture(tmp_path):
    from PIL import Image

    image = np.zeros((8, 12, 3), "uint8")
    out = draw_neighbours(
        [image, image],
        ["a.png", "b$.png"],
        ["cat", None],
        [[image] * 3, [image]],
        [["cat", "dog", None], [("cat", "dog")]],
        [[0.9, 0.8, -0.1], [0.5]],
        tmp_path / "near.png",
    )
    assert Image.open(out).size[0] > Image.open(out).size[1]
    with pytest.raises(ConfigError, match="Cannot draw neighbours"):
        draw_neighbours([image], ["a.png"], [None], [[image]], [[]], [[0.5]], tmp_path / "near.png")


def test_cli_embeds_and_finds(call, backbone, run, colours, tmp_path):
    out, picture = tmp_path / "colours.parquet", tmp_path / "near.png"
    code, text, err = call("embed", backbone, colours, "--out", out, "--dtype", "float16", "--pooling", "mean")
    assert code == 0, err
    assert text.startswith(f"Wrote    {out}: 60 images, 32 float16 each, ")
    assert "Note     the file does not tell mean and std" in err
    query = colours / "blue" / "07.png"
    code, text, err = call("neighbours", out, query, "red/01.png", "-k", 2, "--out", picture)
    assert code == 0, err
    lines = text.splitlines()
    assert lines[0] == str(query) and lines[3] == "red/01.png" and len(lines) == 6
    assert lines[1].split()[2] == "blue" and picture.stat().st_size > 5000
    code, text, err = call("neighbours", run.path, "red/01.png", "--k", 1, "--json", "--save", tmp_path / "run.npz")
    (row,) = json.loads(text)
    assert row["image"] == "red/01.png" and set(row["neighbours"][0]) == {"image", "similarity", "label", "split"}
    assert len(load_embeddings(tmp_path / "run.npz")) == 60
    assert "--save FILE.parquet keeps" in call("neighbours", run.path, "red/01.png")[2]


def test_cli_errors(call, backbone, colours, table, tmp_path):
    for arguments, text in (
        (("embed", backbone, colours, "--out", tmp_path / "no" / "x.npz"), "Received: no folder"),
        (("embed", backbone, colours, "--out", tmp_path / "x.csv"), "ends in .parquet or .npz"),
        (("neighbours", backbone, "red/01.png"), "Pass --data DATA"),
        (("neighbours", tmp_path / "none", "red/01.png", "-k", 0), "Received: k=0"),  # before anything is embedded
        (("neighbours", table, "red/01.png", "--data", colours), "Expected --data and --save with a backbone"),
        (("neighbours", tmp_path / "none.parquet", "red/01.png"), "Make it: vitreous embed"),
        (("neighbours", table, "red/01.png", "--out", tmp_path / "x.txt"), "ends in .png"),
    ):
        code, out, err = call(*arguments)
        assert (code, out) == (2, "") and text in err, (arguments, err)
