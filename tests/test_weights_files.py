"""Files beside weights, damaged or unusual; names of the hub; destinations that are taken. Each with its message."""

import json
import re
import zipfile

import numpy as np
import pytest
from test_weights_load import Hub
from weight_references import outgoing, place

from vitreous.errors import ConfigError, WeightsError
from vitreous.model import VisionTransformer, create_model
from vitreous.registry import list_weights
from vitreous.spec import ViTConfig
from vitreous.weights import convert, export_weights, import_weights
from vitreous.weights.huggingface import read_preprocessor
from vitreous.weights.load import MEMBER
from vitreous.weights.tensors import read_tensors, write_safetensors

SIZE = {"height": 32, "width": 32}


@pytest.fixture
def folders(tmp_path):
    """A model's folder in the format of Hugging Face and in timm's."""
    model = import_weights(place("hf_vit", tmp_path)[0]).model
    for format in ("hf", "timm"):
        export_weights(model, tmp_path / format, format=format)
    return tmp_path


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# ---- preprocessor_config.json ----


@pytest.mark.parametrize(
    ("values", "note"),
    [
        (
            {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
            "the file rescales images by 0.00784314, not by 1/255: mean and std are divided by 2",
        ),
        ({"rescale_factor": 1 / 127.5}, "the file rescales images by 0.00784314, not by 1/255"),
        (
            {"do_rescale": False, "image_mean": [127.0, 120.0, 110.0], "image_std": [50.0, 60.0, 70.0]},
            "the file rescales images by nothing (do_rescale=false), not by 1/255: mean and std are divided by 255",
        ),
        ({"do_normalize": False, "rescale_factor": 0.5}, "the file rescales images by 0.5"),
        ({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}, None),
        ({"image_mean": 0.25, "image_std": 0.75}, None),
        ({"image_mean": 0.0, "image_std": 1}, None),
    ],
)
def test_rescaling_is_part_of_mean_and_std(values, note):
    fields, notes = read_preprocessor({"size": SIZE, **values})
    pixels = np.array([0, 7, 255.0])
    factor = values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 1
    mean, std = values.get("image_mean", 0.5), values.get("image_std", 0.5)
    if not values.get("do_normalize", True):
        mean, std = 0, 1
    expected = (pixels * factor - mean) / std
    ours = (pixels / 255 - np.array(fields.get("mean", 0.5))) / np.array(fields.get("std", 0.5))
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)
    assert len(notes) == (note is not None) and (note is None or notes[0].startswith(note))


def test_what_a_preprocessor_says_of_resizing():
    fields, notes = read_preprocessor({"size": {"shortest_edge": 64}, "do_resize": False, "do_center_crop": True})
    assert fields == {"resize_mode": "crop", "interpolation": "bilinear"}
    assert notes == ["the file leaves images at their size (do_resize=false); here they are brought to the model's"]
    assert read_preprocessor({"size": 32, "resample": 5})[1] == [
        "the file resizes images with the hamming filter; here it is bilinear"
    ]
    assert read_preprocessor({"size": 32, "resample": None}) == read_preprocessor({"size": 32, "resample": 2})
    with pytest.raises(WeightsError, match=r"Expected a resample of 0 to 5, a filter of Pillow\. Received: resample=9"):
        read_preprocessor({"size": 32, "resample": 9})
    for values in ({"rescale_factor": 0}, {"rescale_factor": -1.0}, {"rescale_offset": True}):
        with pytest.raises(WeightsError, match=r"Expected images to be multiplied by a positive rescale_factor\. Rec"):
            read_preprocessor({"size": 32, **values})


def test_one_mean_is_for_all_channels(tmp_path):
    config = ViTConfig(image_size=8, patch_size=4, projection_dim=16, num_blocks=1, num_heads=2, num_channels=1)
    export_weights(VisionTransformer(config), tmp_path / "x", format="hf")
    change(tmp_path / "x" / "preprocessor_config.json", image_mean=0.25, image_std=0.75)
    spec = import_weights(tmp_path / "x").input_spec
    assert (spec.num_channels, spec.mean, spec.std) == (1, (0.25,), (0.75,))
    (tmp_path / "x" / "preprocessor_config.json").unlink()
    assert import_weights(tmp_path / "x").input_spec.mean == (0.5,)


# ---- damaged descriptions ----


@pytest.mark.parametrize(
    ("format", "file", "values"),
    [
        ("hf", "config.json", {"hidden_size": "abc"}),
        ("hf", "config.json", {"id2label": {"x": "a"}}),
        ("hf", "config.json", {"id2label": ["a"]}),
        ("hf", "config.json", {"image_size": [56]}),
        ("hf", "config.json", {"hidden_act": ["gelu"]}),
        ("hf", "preprocessor_config.json", {"crop_size": {"shortest_edge": 48}, "do_center_crop": True}),
        ("hf", "preprocessor_config.json", {"size": "x"}),
        ("hf", "preprocessor_config.json", {"size": {"longest_edge": 3}}),
        ("hf", "preprocessor_config.json", {"image_mean": ["a", "b", "c"]}),
        ("hf", "preprocessor_config.json", {"resample": [2]}),
        ("timm", "config.json", {"model_args": "x"}),
        ("timm", "config.json", {"pretrained_cfg": {"crop_pct": "x"}}),
        ("timm", "config.json", {"pretrained_cfg": {"input_size": [3]}}),
        ("timm", "config.json", {"pretrained_cfg": {"mean": ["a"]}}),
        ("timm", "config.json", {"pretrained_cfg": []}),
        ("own", "config.json", {"config": []}),
        ("own", "config.json", {"class_names": 3}),
    ],
)
def test_damaged_descriptions_name_their_file(folders, format, file, values):
    path = folders / ("hf" if format == "hf" else "timm") / file
    if format == "own":
        values = {"vitreous": {**json.loads(path.read_text())["vitreous"], **values}}
    elif format == "timm":
        values = {"vitreous": None, **values}
    change(path, **values)
    with pytest.raises(WeightsError) as caught:
        import_weights(path.parent)
    expected = (
        f"Cannot read {path}. Expected a description of a model with values of the right types. Received: one that "
        "cannot be used ("
    )
    assert str(caught.value).startswith(expected)
    assert str(caught.value).endswith("). Correct the file, or get it again.")


def test_damaged_pooling_is_refused(folders):
    change(folders / "timm" / "config.json", vitreous=None, model_args={"num_heads": 4, "global_pool": [1]})
    with pytest.raises(WeightsError, match=r"^Cannot read .* Expected .* Received: "):
        import_weights(folders / "timm")


@pytest.mark.parametrize("about", [[], {"input": [1]}, {"origin": 3}, {"class_names": 3}])
def test_damaged_member_of_a_keras_file(tmp_path, about):
    config = ViTConfig(image_size=8, patch_size=4, projection_dim=16, num_blocks=1, num_heads=2)
    path, model = tmp_path / "x.keras", VisionTransformer(config)
    model.save(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(MEMBER, json.dumps(about))
    with pytest.raises(WeightsError, match=rf"^Cannot read {MEMBER} in .*x.keras\. Expected a description of a model"):
        import_weights(path)


# ---- names of the hub ----


def test_names_of_the_registry_are_asked_for_where_they_lie(tmp_path, monkeypatch):
    hub_module = pytest.importorskip("huggingface_hub")
    from huggingface_hub import errors

    for name, repository in (
        ("vit_base_patch16_clip_quickgelu_224.openai", "timm/vit_base_patch16_clip_224.openai"),
        ("vit_small_patch16_lingbot.robbyant", "belfner/vit_small_patch16_lingbot.robbyant"),
        ("vit_base_patch16_224.augreg_in21k", "timm/vit_base_patch16_224.augreg_in21k"),
        ("vit_base_patch16_224.no_such_tag", "timm/vit_base_patch16_224.no_such_tag"),
    ):
        hub = Hub(tmp_path, errors.LocalEntryNotFoundError("no network"))
        monkeypatch.setattr(hub_module, "hf_hub_download", hub)
        with pytest.raises(WeightsError, match=re.escape(f"(hf download {repository})")):
            import_weights(f"timm/{name}@main")
        assert {x[0] for x in hub.asked} == {repository}
        assert {x[2] for x in hub.asked} == {"main"}


def test_a_shared_file_becomes_the_model_that_was_asked_for(tmp_path, monkeypatch):
    """The file's own config tells another architecture, with another activation."""
    hub_module = pytest.importorskip("huggingface_hub")
    from vitreous.weights import sources

    name = "vit_base_patch32_clip_quickgelu_224"
    model = create_model(name, num_classes=0, dtype="float32")
    export_weights(model, tmp_path / "x", format="timm")
    size = {"input_size": [3, 224, 224]}
    hub_config = {"architecture": "vit_base_patch32_clip_224", "num_classes": 0, "pretrained_cfg": size}
    (tmp_path / "x" / "config.json").write_text(json.dumps(hub_config))
    monkeypatch.setattr(hub_module, "hf_hub_download", Hub(tmp_path / "x"))
    assert list_weights(f"{name}.openai")[0].hub_id == "timm/vit_base_patch32_clip_224.openai"
    assert sources.locate(f"timm/{name}.openai").config["architecture"] == name
    report = import_weights(f"timm/{name}.openai")
    assert (report.model.name, report.model.config.activation) == (name, "quick_gelu")
    report = import_weights("timm/vit_base_patch32_clip_224.openai")
    assert report.model.config.activation == "gelu"


# ---- destinations ----


@pytest.fixture
def absent(tmp_path):
    """A source that is not there: whoever reads it before the destination is checked gets another error."""
    (tmp_path / "afile").write_text("x")
    return tmp_path / "absent"


@pytest.mark.parametrize(
    ("destination", "to", "message"),
    [
        ("afile/sub", "timm", r"Expected a folder to write in\. Received: .*/afile, which is a file\. Pass another"),
        ("afile", "timm", r"Expected a folder to write in\. Received: .*/afile, which is a file\. Pass another"),
        ("afile/x.npz", "npz", r"Expected a folder to write in\. Received: .*/afile, which is a file\. Pass another"),
        ("folder.npz", "npz", r"Expected the name of a file\. Received: the name of a folder\. Pass another dest"),
        ("folder.keras", "keras", r"Expected the name of a file\. Received: the name of a folder\. Pass another d"),
        ("x.npz", "npz", r"Expected x.json beside it to be free, or of an earlier export\. Received: .*x.json, which"),
        ("x.safetensors", "timm", r"Expected x.json beside it to be free, or of an earlier export\. Received: .*x.js"),
        ("full", "hf", r"Expected a folder that is new, empty, or of an earlier export to Hugging Face\. Received: on"),
    ],
)
def test_destinations_are_checked_before_anything_is_read(absent, destination, to, message):
    folder = absent.parent
    for name in ("folder.npz", "folder.keras", "full"):
        (folder / name).mkdir()
    (folder / "full" / "thesis.txt").write_text("x")
    (folder / "x.json").write_text('{"mine": 1}')
    with pytest.raises(ConfigError, match=rf"^Cannot export to .*{destination}\. {message}"):
        convert(absent, folder / destination, to=to)
    assert (folder / "x.json").read_text() == '{"mine": 1}'


def test_exports_replace_their_own_and_nothing_else(folders):
    hf, timm = folders / "hf", folders / "timm"
    model = import_weights(hf).model
    (timm / "README.md").write_text("notes")
    (folders / "new" / ".git").mkdir(parents=True)
    for folder, format in ((hf, "hf"), (timm, "timm"), (folders / "new", "hf"), (folders / "x.npz", "npz")):
        for _ in range(2):
            export_weights(model, folder, format=format)
    with pytest.raises(ConfigError, match=r"earlier export to timm\. Received: one with config.json, model.saf"):
        export_weights(model, hf, format="timm")
    with pytest.raises(ConfigError, match=r"earlier export to Hugging Face\. Received: one with README.md, config"):
        export_weights(model, timm, format="hf")
    (timm / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"Received: one with preprocessor_config.json\. Pass another folder, or emp"):
        export_weights(model, timm, format="timm")
    (hf / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"Received: one with pytorch_model.bin\. Pass another folder, or empty"):
        export_weights(model, hf, format="hf")


# ---- what tensors hold ----


def test_integers_are_no_weights(folders):
    path = folders / "timm" / "model.safetensors"
    header_size = int.from_bytes(path.read_bytes()[:8], "little")
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + header_size])
    header["norm.weight"]["dtype"] = "I32"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + header_size :])
    expected = r"Expected weights of a floating-point type\. Received: norm.weight of type I32\. Quantised weights are"
    with pytest.raises(WeightsError, match=expected):
        import_weights(path.parent)


def test_numbers_that_are_not_finite_are_noted(folders):
    path = folders / "timm" / "model.safetensors"
    tensors = {name: entry.read() for name, entry in read_tensors(path).items()}
    assert not [note for note in import_weights(path.parent).notes if "NaN" in note]
    tensors["norm.weight"] = np.array([np.nan, np.nan, -np.inf, *[1] * 45], "float32")
    write_safetensors(path, outgoing(tensors))
    report = import_weights(path.parent)
    assert "norm.weight holds 3 numbers that are infinite or NaN" in report.notes
    assert "  note: norm.weight holds 3 numbers" in report.summary()
