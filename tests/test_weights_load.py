"""Importing and exporting: other sizes and classes, what files tell, every refusal and its text."""

import io
import json
import pickle
import re
import sys
import zipfile

import keras
import numpy as np
import pytest
from hostile import Trap
from weight_references import outgoing, place

from vitreous.errors import (
    ConfigError,
    MissingDependencyError,
    MissingPathError,
    UnknownNameError,
    VitreousError,
    WeightsError,
)
from vitreous.model import VisionTransformer, create_model
from vitreous.spec import InputSpec, ViTConfig
from vitreous.weights import convert, export_weights, import_weights, mapping
from vitreous.weights.load import to_float32, variables
from vitreous.weights.tensors import (
    MAX_HEADER_BYTES,
    read_npz,
    read_safetensors,
    read_tensors,
    write_npz,
    write_safetensors,
)

to_numpy = keras.ops.convert_to_numpy


def tensors_of(path):
    return {name: entry.read() for name, entry in read_tensors(path).items()}


@pytest.fixture
def cls(tmp_path):
    """A small timm model with its description: path, tensors, outputs."""
    path, outputs = place("timm_nobias", tmp_path)
    return path, tensors_of(path), outputs


@pytest.fixture(scope="module")
def pico(tmp_path_factory):
    """A model of the registry, with random weights, as a bare timm file."""
    folder = tmp_path_factory.mktemp("pico")
    model = create_model("vit_pico_patch4_32", num_classes=5)
    export_weights(model, folder / "pico.safetensors", format="timm")
    (folder / "pico.json").unlink()
    return folder / "pico.safetensors", model


# ---- other sizes, other classes ----


def test_new_classes_get_a_fresh_head_and_say_so(cls):
    report = import_weights(cls[0], num_classes=3)
    assert report.model(cls[2]["images"]).shape == (2, 3)
    assert report.notes[-1] == "fresh head for 3 classes (the file has 7)"
    assert "note: fresh head for 3 classes (the file has 7)" in report.summary()
    assert not np.any(to_float32(variables(report.model)["head/kernel"]))
    np.testing.assert_allclose(to_numpy(report.model.features(cls[2]["images"])), cls[2]["features"], atol=1e-5)


def test_no_classes_leave_the_features(cls):
    report = import_weights(cls[0], num_classes=0)
    assert report.notes[-1] == "no head (the file has one for 7 classes)"
    np.testing.assert_allclose(to_numpy(report.model(cls[2]["images"])), cls[2]["features"], atol=1e-5)


def test_another_size_resizes_positions_and_patches(cls):
    report = import_weights(cls[0], image_size=(48, 40))
    assert report.notes[-1] == "positions resized 4x4 -> 6x5"
    assert report.input_spec.image_size == report.model.config.image_size == (48, 40)
    assert report.model(np.zeros((1, 48, 40, 3), "float32")).shape == (1, 7)
    report = import_weights(cls[0], patch_size=16, image_size=64)
    assert report.notes[-1] == "patches resized 8x8 -> 16x16"
    assert report.model.config.grid_size == (4, 4)
    # Larger patches of a larger image see what smaller ones saw.
    images = np.repeat(np.repeat(np.ones((2, 32, 32, 3), "float32") * 0.3, 2, 1), 2, 2)
    expected = to_numpy(import_weights(cls[0]).model(images[:, :32, :32]))
    np.testing.assert_allclose(to_numpy(report.model(images)), expected, atol=1e-4)


def test_dtype_and_rates_are_those_asked_for(cls):
    report = import_weights(cls[0], dtype="mixed_bfloat16", stochastic_depth_rate=0.1)
    assert report.model.dtype_policy.name == "mixed_bfloat16"
    assert report.model.config.stochastic_depth_rate == 0.1


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_precision_files_are_read_to_float32(cls, tmp_path, dtype):
    path, tensors, _ = cls
    name = "blocks.0.attn.qkv.weight"
    if dtype == "F16":
        halves = {key: x.astype("<f2") for key, x in tensors.items()}
        expected = halves[name].astype("float32")
    else:
        halves = {key: (x.view("<u4") >> 16).astype("<u2") for key, x in tensors.items()}
        expected = (tensors[name].view("<u4") & 0xFFFF0000).view("float32")
    write_raw(path, {key: (dtype, x.shape, x.tobytes()) for key, x in halves.items()})
    model = import_weights(path).model
    own = variables(model)["block_0/attention/qkv/kernel"]
    assert own.dtype == "float32"
    np.testing.assert_array_equal(to_float32(own), expected.T)


def test_sharded_files(cls, tmp_path):
    _, tensors, outputs = cls
    names = sorted(tensors)
    folder = tmp_path / "sharded"
    parts = {"model-1.safetensors": names[:9], "model-2.safetensors": names[9:]}
    for part, some in parts.items():
        write_safetensors(folder / part, outgoing({name: tensors[name] for name in some}))
    weight_map = {name: part for part, some in parts.items() for name in some}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_bytes((tmp_path / "timm_nobias.json").read_bytes())
    report = import_weights(folder)
    np.testing.assert_allclose(to_numpy(report.model(outputs["images"])), outputs["logits"], atol=1e-5)

    index.write_text(json.dumps({"weight_map": {**weight_map, "extra": "model-1.safetensors"}}))
    with pytest.raises(WeightsError, match=r"Expected extra in model-1.safetensors\. Received: .* without it\."):
        import_weights(folder)
    index.write_text(json.dumps({"weight_map": {**weight_map, names[0]: "../model-1.safetensors"}}))
    with pytest.raises(WeightsError, match=r"Expected an index with a weight_map to files beside it"):
        import_weights(folder)
    index.write_text(json.dumps({"weight_map": {n: p for n, p in weight_map.items() if n != names[0]}}))
    with pytest.raises(WeightsError, match=f"Received: {names[0]} in model-1.safetensors"):
        import_weights(folder)
    index.write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(MissingPathError, match=r"model-2.safetensors"):
        import_weights(folder)


# ---- what the files tell ----


def test_shapes_name_the_model(pico):
    path, model = pico
    report = import_weights(path)
    assert report.model.name == "vit_pico_patch4_32"
    assert report.model.config == model.config
    assert report.notes == ("taken for vit_pico_patch4_32, whose shapes it has",)
    for name, v in variables(model).items():
        np.testing.assert_array_equal(to_float32(variables(report.model)[name]), to_float32(v))


def test_a_file_alone_needs_the_number_of_heads(cls, tmp_path):
    (tmp_path / "timm_nobias.json").unlink()
    expected = (
        r"Cannot import .*timm_nobias.safetensors\. Expected a config.json beside it, or a model's name: tensors do "
        r"not tell the number of heads\. Received: the file alone, of width 48 with 3 blocks, like no model in the "
        r"registry\. Pass num_heads, and any other field of ViTConfig that differs from its default\."
    )
    with pytest.raises(WeightsError, match=expected):
        import_weights(cls[0])
    report = import_weights(cls[0], num_heads=4)
    assert "assumed, because shapes do not tell: epsilon=1e-06, activation=gelu" in report.notes
    np.testing.assert_allclose(to_numpy(report.model(cls[2]["images"])), cls[2]["logits"], atol=1e-5)
    config = report.model.config
    np.testing.assert_allclose(
        to_numpy(import_weights(cls[0], config=config).model(cls[2]["images"])), cls[2]["logits"], atol=1e-5
    )


def test_an_unknown_architecture_is_refused(cls, tmp_path):
    config = {"architecture": "vit_future_patch8", "pretrained_cfg": {"input_size": [3, 32, 32]}}
    (tmp_path / "timm_nobias.json").write_text(json.dumps(config))
    with pytest.raises(
        WeightsError, match=r"Expected an architecture of the registry.*architecture='vit_future_patch8'"
    ):
        import_weights(cls[0])


def test_timm_config_gives_the_input(pico, tmp_path):
    _, model = pico
    spec = InputSpec(
        image_size=(32, 32), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), crop_fraction=0.9, interpolation="bilinear"
    )
    export_weights(model, tmp_path / "t", format="timm", input_spec=spec, class_names=list("abcde"))
    config = json.loads((tmp_path / "t" / "config.json").read_text())
    assert config["model_args"]["num_heads"] == 4
    assert config["pretrained_cfg"]["label_names"] == list("abcde")
    for keep_own in (True, False):  # ours and what timm itself would have written
        if not keep_own:
            del config["vitreous"], config["model_args"]
            config["architecture"] = "vit_pico_patch4_32"
            (tmp_path / "t" / "config.json").write_text(json.dumps(config))
        report = import_weights(tmp_path / "t")
        assert report.input_spec == spec
        assert report.class_names == tuple("abcde")
        assert report.model.config == model.config
    assert import_weights(tmp_path / "t", num_classes=2).class_names == ()


def test_hugging_face_configs(tmp_path):
    path, _ = place("hf_vit", tmp_path)
    model = import_weights(path).model
    spec = InputSpec(image_size=(32, 32), mean=(0.485, 0.456, 0.406), std=(0.2, 0.3, 0.4), crop_fraction=0.5)
    names = [f"kind {i}" for i in range(7)]
    report = export_weights(model, tmp_path / "hf", format="hf", input_spec=spec, class_names=names)
    assert [x.name for x in report.paths] == ["model.safetensors", "config.json", "preprocessor_config.json"]
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("vit", ["ViTForImageClassification"])
    assert (config["layer_norm_eps"], config["id2label"]["6"]) == (1e-12, "kind 6")
    preprocessor = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert (preprocessor["size"], preprocessor["crop_size"]) == ({"shortest_edge": 64}, {"height": 32, "width": 32})
    back = import_weights(tmp_path / "hf")
    assert (back.input_spec, back.class_names, back.model.config) == (spec, tuple(names), model.config)

    config["model_type"] = "swin"
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"Expected a model_type of vit, deit, .* Received: model_type='swin'"):
        import_weights(tmp_path / "hf")
    config.update(model_type="vit", hidden_act="relu")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"Expected a hidden_act of gelu, .* Received: hidden_act='relu'"):
        import_weights(tmp_path / "hf")


@pytest.mark.parametrize("name", ["hf_vit", "hf_deit_distilled", "hf_dinov2_reg"])
def test_both_spellings_of_transformers(name, tmp_path):
    """References have the names of transformers 5; a new export has those of the files on the hub."""
    path, outputs = place(name, tmp_path)
    model = import_weights(path).model
    model.origin = None
    report = export_weights(model, tmp_path / "hub", format="hf")
    names = set(read_tensors(report.paths[0]))
    assert any(key.endswith("encoder.layer.2.attention.attention.query.weight") for key in names)
    assert ("mask_token is written as zeros: the model has none" in report.notes) == ("dinov2" in name)
    back = import_weights(tmp_path / "hub").model
    np.testing.assert_allclose(to_numpy(back(outputs["images"])), outputs["logits"], atol=1e-5)


def test_tensors_that_nothing_reads_come_back(tmp_path):
    path, _ = place("hf_dinov2_reg", tmp_path)
    name = "dinov2_with_registers.embeddings.mask_token"
    tensors = tensors_of(path)
    tensors[name] = np.full_like(tensors[name], 0.25)
    write_safetensors(path, outgoing(tensors))
    report = import_weights(path)
    assert report.unused == {name: "of masked pretraining; no prediction reads it"}
    assert f"unused: {name}: of masked pretraining" in report.summary()
    convert(path, tmp_path / "m.keras")
    convert(tmp_path / "m.keras", tmp_path / "back", to="hf")
    np.testing.assert_array_equal(tensors_of(tmp_path / "back" / "model.safetensors")[name], tensors[name])


def test_a_run_folder_tells_its_input(pico, tmp_path):
    pico[1].save(tmp_path / "model.keras")
    (tmp_path / "config.toml").write_text("[input]\nimage_size = [32, 32]\nmean = [0.1, 0.2, 0.3]\nstd = [1, 1, 1]\n")
    report = import_weights(tmp_path)
    assert report.input_spec.mean == (0.1, 0.2, 0.3)
    assert (report.format, report.model.config) == ("keras", pico[1].config)
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype("float32")
    np.testing.assert_array_equal(to_numpy(report.model(images)), to_numpy(pico[1](images)))
    report = import_weights(tmp_path / "model.keras", num_classes=2, image_size=40)
    assert report.notes == ("positions resized 8x8 -> 10x10", "fresh head for 2 classes (the file has 5)")


# ---- what does not fit ----


def test_misshaped_tensors_name_the_model_that_fits(pico):
    expected = (
        r"^Cannot load patch_embed.proj.weight\. Expected shape \(96, 3, 4, 4\)\. Received: shape=\(64, 3, 4, 4\)\. "
        r"\d+ more: .*\. The file matches vit_pico_patch4_32; pass that name\.$"
    )
    with pytest.raises(WeightsError, match=expected):
        import_weights(pico[0], model="vit_nano_patch4_32")


def test_missing_and_unexpected_tensors_are_named(cls):
    path, tensors, _ = cls
    fewer = {name: x for name, x in tensors.items() if name not in ("blocks.1.norm1.bias", "cls_token")}
    config = import_weights(path).model.config
    write_safetensors(path, outgoing(fewer))
    expected = (
        r"Cannot load .*timm_nobias.safetensors\. Expected the tensors of the model\. Received: 2 missing: cls_token, "
        r"blocks.1.norm1.bias\. No model in the registry has such shapes; check the file, or pass its config\."
    )
    with pytest.raises(WeightsError, match=expected):
        import_weights(path, config=config)
    write_safetensors(path, outgoing({**tensors, "blocks.0.attn.rel_pos": np.zeros(3, "float32")}))
    expected = r"Expected only tensors that the model reads\. Received: 1 unexpected: blocks.0.attn.rel_pos\."
    with pytest.raises(WeightsError, match=expected):
        import_weights(path)
    write_safetensors(path, outgoing({**tensors, "blocks.0.mlp.fc1.weight": np.zeros((200, 48), "float32")}))
    with pytest.raises(
        WeightsError,
        match=r"Cannot load blocks.0.mlp.fc1.weight\. Expected shape \(192, 48\)\. Received: shape=\(200, 48\)\.",
    ):
        import_weights(path, config=config)


def test_half_of_a_joined_tensor_is_missing(tmp_path):
    path, _ = place("hf_vit", tmp_path)
    tensors = tensors_of(path)
    del tensors["vit.layers.1.attention.k_proj.weight"]
    write_safetensors(path, outgoing(tensors))
    expected = (
        r"Received: 1 missing: vit.layers.1.attention.k_proj.weight, and unexpected "
        r"vit.layers.1.attention.q_proj.weight \(without vit.layers.1.attention.k_proj.weight\)"
    )
    with pytest.raises(WeightsError, match=expected):
        import_weights(path)


def test_a_model_with_a_stem_takes_another_size_and_other_classes(tmp_path):
    model = create_model("vit_nano_stem_patch4_32", num_blocks=1, projection_dim=32, stem_dim=16, num_heads=2)
    model.save(tmp_path / "stem.keras")
    report = import_weights(tmp_path / "stem.keras", num_classes=3, image_size=24)
    mine, theirs = model.get_weights(), report.model.get_weights()
    assert report.model.config.grid_size == (6, 6)
    assert report.notes[1:] == ("positions resized 8x8 -> 6x6", "fresh head for 3 classes (the file has 1000)")
    same = [i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a.shape == b.shape]
    assert len(same) == len(mine) - 3  # but positions and the head's two
    assert all((mine[i] == theirs[i]).all() for i in same)
    with pytest.raises(WeightsError, match=r"Expected 4x4, that of the stem\. Received: patch_size=\(8, 8\)"):
        import_weights(tmp_path / "stem.keras", patch_size=8)


def test_other_files_are_refused(cls, tmp_path):
    write_safetensors(tmp_path / "other.safetensors", outgoing({"conv1.weight": np.zeros((1,), "float32")}))
    with pytest.raises(WeightsError, match=r"Expected a Vision Transformer with the names of timm .* conv1.weight"):
        import_weights(tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=r"Expected a patch projection and blocks\."):
        write_safetensors(tmp_path / "o.safetensors", outgoing({"patch_embed.proj.weight": np.zeros((4, 3, 2, 2))}))
        import_weights(tmp_path / "o.safetensors")
    with pytest.raises(MissingPathError, match=r"Expected a file, a folder, hf:OWNER/NAME\[@REVISION\] or timm/NAME"):
        import_weights(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=r"Expected a folder with model.safetensors"):
        import_weights(tmp_path / "empty")
    (tmp_path / "x.h5").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"Expected a name that ends in .safetensors, .npz"):
        import_weights(tmp_path / "x.h5")
    (tmp_path / "x.keras").write_bytes(b"not a zip")
    with pytest.raises(WeightsError, match=r"Expected a whole .keras file of a VisionTransformer"):
        import_weights(tmp_path / "x.keras")
    with pytest.raises(UnknownNameError, match=r"Unknown model"):
        import_weights(cls[0], model="vit_pico_patch4_23")
    with pytest.raises(UnknownNameError, match=r"Nearest: num_heads"):
        import_weights(cls[0], num_head=4)


# ---- hostile files ----


def write_raw(path, items):
    """Writes a safetensors file from {name: (type, shape, bytes)}."""
    header, data = {}, b""
    for name, (dtype, shape, values) in items.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a header of 0 bytes in a file of 0"),
        ((2**62).to_bytes(8, "little") + b"{}", "a header of 4611686018427387904 bytes in a file of 10"),
        ((2).to_bytes(8, "little") + b"[]", "a header that does not fit the format"),
        ((2).to_bytes(8, "little") + b"{]", "a header that does not fit the format"),
        ((7).to_bytes(8, "little") + b'{"a":1}', "a header that does not fit the format"),
    ],
)
def test_damaged_safetensors(tmp_path, content, message):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=f"Expected a whole safetensors file. Received: {message}"):
        read_safetensors(tmp_path / "x.safetensors")


def test_safetensors_that_lie(tmp_path):
    path = tmp_path / "x.safetensors"
    assert MAX_HEADER_BYTES == 100 * 2**20
    for dtype, shape, message in (
        ("F32", (2**40,), r"x of shape \(1099511627776,\) and type F32 lies at bytes 0 to 4"),
        ("F32", (-1,), r"x has shape \(-1,\)"),
        ("F32", (1,) * 9, "x has shape"),
        ("F8_E4M3", (4,), "x of type F8_E4M3"),
    ):
        write_raw(path, {"x": (dtype, shape, b"1234")})
        with pytest.raises(WeightsError, match=message):
            read_safetensors(path)
    text = (
        b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    )
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"1234")
    with pytest.raises(WeightsError, match=r"the same name twice"):
        read_safetensors(path)


def test_pickled_npz_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, **{"embedding/kernel": np.array([Trap(tmp_path / "executed")], dtype=object)})
    with pytest.raises(WeightsError, match=r"embedding/kernel holds pickled Python objects, which can run code"):
        import_weights(path)
    assert not (tmp_path / "executed").exists()


def test_npz_that_lie(tmp_path):
    path, buffer = tmp_path / "x.npz", io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (2**40,)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + buffer.getvalue()[8:] + b"1234")
    with pytest.raises(WeightsError, match=r"x of shape \(1099511627776,\)"):
        read_npz(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.pkl", pickle.dumps(1))
    with pytest.raises(WeightsError, match=r"'x.pkl' beside the arrays"):
        read_npz(path)
    np.savez(path, names=np.array(["a"]))
    with pytest.raises(WeightsError, match=r"names of type <U1"):
        read_npz(path)
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(WeightsError, match=r"Expected a whole .npz file of arrays"):
        read_npz(path)


def test_npz_of_bfloat16(tmp_path):
    bits = np.array([0x3F80, 0xC000], "<u2").view("V2")
    np.savez(tmp_path / "x.npz", x=bits)
    np.testing.assert_array_equal(read_npz(tmp_path / "x.npz")["x"].read(), np.array([1, -2], "float32"))


def test_torch_files_hold_tensors_or_are_refused(cls, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    _, tensors, outputs = cls
    folder = tmp_path / "bin"
    folder.mkdir()
    state = {name: torch.tensor(x) for name, x in tensors.items()}
    torch.save({"model": state}, folder / "pytorch_model.bin")
    (folder / "config.json").write_bytes((tmp_path / "timm_nobias.json").read_bytes())
    model = import_weights(folder).model
    np.testing.assert_allclose(to_numpy(model(outputs["images"])), outputs["logits"], atol=1e-5)
    trap = Trap(tmp_path / "executed")
    torch.save({"model": trap}, folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"Expected a PyTorch file of tensors and nothing else"):
        import_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(trap))
    with pytest.raises(WeightsError, match=r"Expected a PyTorch file of tensors and nothing else"):
        import_weights(folder)
    assert not trap.mark.exists()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(WeightsError, match=r"Received: a pickled file, and torch is not installed"):
        read_tensors(folder / "pytorch_model.bin")


def test_a_hidden_layer_before_the_head_is_not_dropped_in_silence(tmp_path):
    path, _ = place("google_vit", tmp_path)
    write_npz(path, outgoing({**tensors_of(path), "pre_logits/kernel": np.eye(48), "pre_logits/bias": np.zeros(48)}))
    with pytest.raises(WeightsError, match=r"Received: pre_logits/kernel, a hidden layer before it. Pass num_classes"):
        import_weights(path)
    assert len(import_weights(path, num_classes=3).unused) == 2


# ---- writing ----


def test_formats_and_destinations_agree(pico, tmp_path):
    with pytest.raises(ConfigError, match=r"Expected a format of timm, hf, npz, keras. Received: format=None"):
        export_weights(pico[1], tmp_path / "x")
    with pytest.raises(ConfigError, match=r"Expected a folder or .safetensors for format='timm'"):
        export_weights(pico[1], tmp_path / "x.npz", format="timm")
    with pytest.raises(ConfigError, match=r"Expected 5 class names. Received: 2 of them"):
        export_weights(pico[1], tmp_path / "x", format="timm", class_names=["a", "b"])
    with pytest.raises(ConfigError, match=r"Expected .npz for format='npz'"):
        convert(tmp_path / "absent", tmp_path / "x.keras", to="npz")


@pytest.mark.parametrize(
    ("changes", "format", "message"),
    [
        ({}, "hf", "Received: use_class_token=False; pooling='mean'. Export to timm or to .keras."),
        ({"position": "sincos"}, "timm", "Received: position='sincos'. Export to .keras."),
        ({"use_local_attention": True}, "timm", "Received: use_local_attention=True. Export to .keras."),
        ({"stem": "shifted"}, "timm", "Expected stem='none'. Received: stem='shifted'."),
        ({"use_qk_norm": True}, "npz", "Received: block_0/attention/query_norm/gamma"),
        ({"rope": "eva"}, "npz", "Received: rope='eva'. Export to .keras."),
        ({"mlp": "swiglu"}, "timm", "Received: mlp='swiglu' with activation='gelu'. Export to .keras."),
        ({"rope": "eva"}, "timm", "Received: rotary attention with use_key_bias=True. Export to .keras."),
        (
            {"mlp": "swiglu", "activation": "silu", "num_parallel": 2},
            "timm",
            "Received: num_parallel=2 with mlp='swiglu'. Export to .keras.",
        ),
    ],
)
def test_what_a_format_cannot_say_is_refused(tmp_path, changes, format, message):
    config = ViTConfig(
        image_size=8, patch_size=4, projection_dim=16, num_blocks=1, num_heads=2, num_classes=3, use_class_token=False,
        pooling="mean", **changes,
    )  # fmt: skip
    with pytest.raises(WeightsError, match=re.escape(message)):
        export_weights(VisionTransformer(config), tmp_path / ("x.npz" if format == "npz" else "x"), format=format)
    assert list(tmp_path.iterdir()) == []


def test_files_are_read_back(pico, tmp_path, monkeypatch):
    from vitreous.weights import save

    monkeypatch.setattr(save, "differing", lambda path, tensors: iter(["norm.weight"]))
    with pytest.raises(WeightsError, match=r"Received: 1 tensors that differ, such as norm.weight"):
        export_weights(pico[1], tmp_path / "x", format="timm")


def test_every_keras_model_goes_through_a_keras_file(tmp_path):
    config = ViTConfig(image_size=8, patch_size=4, projection_dim=16, num_blocks=1, num_heads=2, stem="convolution")
    model = VisionTransformer(config)
    report = export_weights(model, tmp_path / "x.keras", class_names=())
    assert report.notes == ("no input_spec was passed: mean and std of 0.5 are written",)
    images = np.ones((1, 8, 8, 3), "float32")
    back = import_weights(tmp_path / "x.keras").model
    np.testing.assert_array_equal(to_numpy(back(images)), to_numpy(model(images)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_parallel": 2, "layer_scale": 0.1},
        {"norm_position": "post", "final_norm": "none"},
        {"use_distillation_token": True, "use_distillation_head": True},
        {"rope": "eva", "use_key_bias": False, "mlp": "swiglu", "activation": "silu", "use_mlp_norm": True},
        {"rope": "eva", "use_key_bias": False, "mlp": "swiglu", "activation": "silu", "use_attention_norm": True},
        {"rope": "dinov3", "use_key_bias": False, "position": "none", "num_registers": 2},
        {"norm": "rms", "use_qk_norm": True, "use_pre_norm": True, "use_patch_bias": False},
    ],
)
def test_timm_holds_every_other_architecture(tmp_path, changes):
    config = ViTConfig(
        image_size=8, patch_size=4, projection_dim=16, num_blocks=2, num_heads=2, num_classes=3, **changes
    )
    model = VisionTransformer(config)
    rng = np.random.default_rng(0)
    for v in variables(model).values():
        v.assign(rng.normal(size=v.shape))
    export_weights(model, tmp_path / "x", format="timm")
    back = import_weights(tmp_path / "x").model
    images = rng.normal(size=(2, 8, 8, 3)).astype("float32")
    assert back.config == config
    np.testing.assert_allclose(to_numpy(back(images)), to_numpy(model(images)), atol=1e-5)
    # The architecture is read from the tensors too, up to what shapes cannot tell.
    (tmp_path / "x" / "config.json").unlink()
    told = {
        key: value for key, value in changes.items() if key in ("rope", "norm_position", "final_norm", "activation")
    }
    bare = import_weights(tmp_path / "x", num_heads=2, image_size=8, **told).model
    np.testing.assert_allclose(to_numpy(bare(images)), to_numpy(model(images)), atol=1e-5)


def test_positions_move_between_tokens():
    config = ViTConfig(image_size=8, patch_size=4, projection_dim=16, num_blocks=1, num_heads=2, num_registers=3)
    rng = np.random.default_rng(0)
    values = {path: rng.normal(size=shape) for path, shape in mapping.variable_shapes(config).items()}
    arrays = {path: (lambda x=x: x) for path, x in values.items()}

    def sums(arrays, config):
        prefix = np.concatenate([arrays[f"patch_encoder/{n}"]() for n in ("class_token", "registers")], axis=1)
        positions = arrays["patch_encoder/position_embedding"]()
        held = config.num_prefix_positions
        prefix[:, :held] += positions[:, :held]
        return np.concatenate([prefix, positions[:, held:]], axis=1)

    expected = sums(arrays, config)
    for steps in (["patches"], ["class"], ["class", "patches"], ["patches", "all"], ["patches", "class", "all"]):
        some, now = arrays, config
        for tokens in steps:
            some, now = mapping.fold_positions(some, now, tokens)
        assert now.position_tokens == steps[-1]
        np.testing.assert_allclose(sums(some, now), expected, atol=1e-12)


# ---- the hub ----


class Hub:
    """A hub of one model, in place of huggingface_hub's."""

    def __init__(self, folder, error=None):
        self.folder, self.error, self.asked = folder, error, []

    def __call__(self, repository, file, revision=None, local_files_only=False):
        from huggingface_hub import errors

        self.asked.append((repository, file, revision))
        self.is_offline = local_files_only
        if self.error:
            raise self.error
        if not (self.folder / file).is_file():
            raise errors.EntryNotFoundError(file)
        return str(self.folder / file)


def test_the_hub(pico, tmp_path, monkeypatch):
    hub_module = pytest.importorskip("huggingface_hub")
    export_weights(pico[1], tmp_path / "vit_pico_patch4_32", format="timm")
    hub = Hub(tmp_path / "vit_pico_patch4_32")
    monkeypatch.setattr(hub_module, "hf_hub_download", hub)
    report = import_weights("hf:someone/pico@v2", num_classes=0)
    assert hub.asked[0] == ("someone/pico", "model.safetensors", "v2")
    assert report.source == "hf:someone/pico@v2"
    (tmp_path / "vit_pico_patch4_32" / "config.json").unlink()
    report = import_weights("timm/vit_pico_patch4_32.mine_in1k")
    assert hub.asked[-3] == ("timm/vit_pico_patch4_32.mine_in1k", "model.safetensors", None)
    assert report.model.name == "vit_pico_patch4_32"
    (tmp_path / "vit_pico_patch4_32" / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"Received: a model on the hub without them"):
        import_weights("hf:someone/pico")


def test_a_hub_out_of_reach_says_what_to_do(tmp_path, monkeypatch):
    hub_module = pytest.importorskip("huggingface_hub")
    errors = hub_module.errors
    hub = Hub(tmp_path, errors.LocalEntryNotFoundError("no network"))
    monkeypatch.setattr(hub_module, "hf_hub_download", hub)
    with pytest.raises(WeightsError):
        import_weights("hf:someone/pico")
    assert hub.is_offline  # the network is waited for once, then the cache is asked
    for error in (errors.LocalEntryNotFoundError("no network"), OSError("no network"), ConnectionError("no network")):
        monkeypatch.setattr(hub_module, "hf_hub_download", Hub(tmp_path, error))
        with pytest.raises(VitreousError) as caught:
            import_weights("hf:someone/pico")
        assert str(caught.value) == (
            "Cannot fetch hf:someone/pico. Expected the Hugging Face hub, or the model in its cache. Received: no "
            "network. Offline, either fill the cache where there is a network (hf download someone/pico) and copy it "
            "($HF_HOME), or copy the model's files into a folder and pass the folder."
        )
    monkeypatch.undo()
    with pytest.raises(WeightsError, match=r"Expected hf:OWNER/NAME\[@REVISION\]\. Received: repository='a/b/c'"):
        import_weights("hf:a/b/c")


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        MissingDependencyError, match=r"Expected the package huggingface_hub.*pip install 'vitreous\[hub\]'"
    ):
        import_weights("timm/vit_tiny_patch16_224.augreg_in21k")


def test_a_keras_file_is_what_it_says(tmp_path):
    model = create_model("vit_pico_patch2_8", num_classes=3, num_blocks=1)
    model.save(tmp_path / "a.keras")
    assert import_weights(tmp_path / "a.keras", dropout_rate=0.1).model.config.dropout_rate == 0.1
    with pytest.raises(WeightsError, match=r"Expected num_heads=4, as the file says\. Received: num_heads=8"):
        import_weights(tmp_path / "a.keras", num_heads=8)
    with pytest.raises(WeightsError, match=r"as the file says\. Received: "):
        import_weights(tmp_path / "a.keras", model="vit_base_patch16_224")


def test_a_failed_import_leaves_keras_usable(tmp_path):
    path, _ = place("timm_qknorm", tmp_path)
    with pytest.raises(VitreousError):
        import_weights(path, patch_strides=(4, 4))
    assert import_weights(path).num_matched > 0


def test_a_description_with_other_blocks_than_the_file(tmp_path):
    path, _ = place("hf_vit", tmp_path)
    for count in (4, 10**9):
        description = json.loads((tmp_path / "hf_vit.json").read_text())
        description["arguments"]["num_hidden_layers"] = count
        (tmp_path / "hf_vit.json").write_text(json.dumps(description))
        with pytest.raises(WeightsError, match=rf"Expected {count} blocks, .* Received: 3 blocks in the file"):
            import_weights(path)


# ---- timm's arguments ----


def timm_folder(folder, base, arguments=None, **changes):
    """Writes a model as timm would, with the config.json that timm itself writes. Returns it and its model."""
    config = create_model(base, num_classes=5).config.replace(**changes)
    model, rng = VisionTransformer(config), np.random.default_rng(0)
    for v in variables(model).values():
        v.assign(rng.normal(size=v.shape) * 0.1)
    export_weights(model, folder, format="timm")
    (folder / "config.json").write_text(json.dumps({"architecture": base, "model_args": arguments or {}}))
    return folder, model


def assert_same_logits(model, other):
    images = np.random.default_rng(1).normal(size=(2, *model.config.image_size, 3)).astype("float32")
    np.testing.assert_allclose(to_numpy(model(images)), to_numpy(other(images)), atol=1e-4)


@pytest.mark.parametrize("said", ["architecture", "pool", "arguments", "model", "heads"])
def test_the_mean_of_patches_is_not_taken_for_the_class_token(tmp_path, said):
    folder, model = timm_folder(tmp_path / "x", "test_vit", pooling="mean", final_norm="pooled")
    assert "fc_norm.weight" in tensors_of(folder / "model.safetensors")
    description = {"architecture": "test_vit"}
    if said == "pool":
        description["global_pool"] = "avg"
    elif said == "arguments":
        description["model_args"] = {"num_classes": 5, "global_pool": "avg"}
    (folder / "config.json").write_text(json.dumps(description))
    options = {"model": {"model": "test_vit"}, "heads": {"num_heads": 2}}.get(said, {})
    if options:
        (folder / "config.json").unlink()
    report = import_weights(folder, **options)
    assert (report.model.config.pooling, report.model.config.final_norm) == ("mean", "pooled")
    assert_same_logits(report.model, model)
    if said != "heads":
        note = "pooling='mean', final_norm='pooled', as the file has it; test_vit itself differs there"
        assert note in report.notes


def test_the_wrong_last_norm_is_missing_and_unexpected(tmp_path):
    folder, _ = timm_folder(tmp_path / "x", "test_vit", pooling="mean", final_norm="pooled")
    with pytest.raises(WeightsError, match=r"2 missing: norm.weight, norm.bias, and unexpected fc_norm.bias, fc_norm"):
        import_weights(folder, config=create_model("test_vit", num_classes=5).config)
    folder, model = timm_folder(tmp_path / "y", "eva02_tiny_patch14_224", pooling="class", final_norm="tokens")
    (folder / "config.json").unlink()
    name = "eva02_tiny_patch14_224"
    with pytest.raises(WeightsError, match=r"2 missing: fc_norm.weight, fc_norm.bias, and unexpected norm.bias"):
        import_weights(folder, model=name)
    with pytest.raises(WeightsError, match=r"tensors do not tell the number of heads"):
        import_weights(folder)  # taken for no model of the mean
    (folder / "config.json").write_text(json.dumps({"architecture": name, "global_pool": "token"}))
    for options in ({}, {"model": name}):
        assert import_weights(folder, **options).model.config == model.config


@pytest.mark.parametrize(
    ("base", "arguments", "expected"),
    [
        ("test_vit", {"act_layer": "relu"}, "act_layer of gelu, gelu_tanh, quick_gelu, silu"),
        ("test_vit", {"global_pool": "avgmax"}, "global_pool of token, avg, map"),
        ("test_vit", {"pool_include_prefix": True}, "pool_include_prefix of False"),
        ("test_vit", {"norm_layer": "batchnorm"}, "norm_layer of layernorm, rmsnorm"),
        ("test_vit", {"norm_layer": "rmsnorm"}, "the layer normalisation that the tensors have"),
        ("test_vit", {"block_fn": "DiffBlock"}, "block_fn of Block, ResPostBlock, ParallelThingsBlock"),
        ("test_vit", {"mystery": 1}, "arguments of VisionTransformer and Eva that have a counterpart here"),
        ("eva02_tiny_patch14_224", {"rope_grid_offset": 0.5}, "rope_grid_offset of 0"),
        ("eva02_tiny_patch14_224", {"rope_grid_indexing": "xy"}, "rope_grid_indexing of 'ij'"),
        ("eva02_tiny_patch14_224", {"rope_type": "mixed"}, "rope_type of cat, dinov3"),
        ("eva02_tiny_patch14_224", {"rope_rotate_half": True}, "rope_rotate_half=False with this rope_type"),
    ],
)
def test_arguments_that_compute_something_else_are_refused(tmp_path, base, arguments, expected):
    folder, _ = timm_folder(tmp_path / "x", base, arguments)
    ((key, value),) = arguments.items()
    with pytest.raises(WeightsError) as caught:
        import_weights(folder)
    if key == "global_pool":
        assert f"Expected {expected}. Received: {key}={value!r}." in str(caught.value)
        return
    assert str(caught.value) == (
        f"Cannot read the arguments of timm's model. Expected {expected}. Received: {key}={value!r}. Pass the "
        "architecture as config if it is one of vitreous; else the model cannot be imported."
    )


@pytest.mark.parametrize(
    ("base", "arguments", "changes"),
    [
        ("test_vit", {"act_layer": "quick_gelu", "drop_path_rate": 0.1}, {"activation": "quick_gelu"}),
        ("vit_base_patch32_clip_224", {"norm_layer": "layernorm"}, {"epsilon": 1e-6}),
        ("eva02_tiny_patch14_224", {"ref_feat_shape": [8, 4]}, {"rope_reference_grid": (8, 4)}),
        ("eva02_tiny_patch14_224", {"rope_temperature": 50}, {"rope_temperature": 50.0}),
        ("eva02_tiny_patch14_224", {"use_rot_pos_emb": False}, {"rope": "none"}),
    ],
)
def test_arguments_change_the_named_architecture(tmp_path, base, arguments, changes):
    small = {"projection_dim": 16, "num_heads": 2, "num_blocks": 1, "mlp_dim": 32}
    folder, model = timm_folder(tmp_path / "x", base, {"num_heads": 2, **arguments}, **small)
    config = import_weights(folder).model.config
    for key, value in changes.items():
        assert getattr(config, key) == value != getattr(model.config, key)
    report = import_weights(folder, config=model.config)
    assert report.model.config == model.config


def test_eva_pools_the_prefix_with_attention(tmp_path):
    config = ViTConfig(
        image_size=8, patch_size=4, projection_dim=16, num_blocks=1, num_heads=2, num_classes=3, rope="eva",
        use_key_bias=False, pooling="map",
    )  # fmt: skip
    reason = "rotary or key-bias-free attention with pooling='map' and tokens before the patches"
    with pytest.raises(WeightsError, match=re.escape(f"Received: {reason}. Export to .keras.")):
        export_weights(VisionTransformer(config), tmp_path / "x", format="timm")
    bare = VisionTransformer(config.replace(use_class_token=False))
    export_weights(bare, tmp_path / "x", format="timm")
    assert_same_logits(import_weights(tmp_path / "x").model, bare)
    tensors = tensors_of(tmp_path / "x" / "model.safetensors")
    tensors["cls_token"] = np.zeros((1, 1, 16), "float32")
    tensors["pos_embed"] = np.zeros((1, 5, 16), "float32")
    write_safetensors(tmp_path / "y.safetensors", outgoing(tensors))
    expected = (
        r"Expected attention pooling over patches\. Received: timm's Eva with global_pool='map' and 1 tokens before "
        r"the patches, which it pools too\. Import a model with another pooling, or without class token and registers\."
    )
    with pytest.raises(WeightsError, match=expected):
        import_weights(tmp_path / "y.safetensors", config=config)
