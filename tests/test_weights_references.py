"""Every reference model: the same numbers, and back to the same file."""

import keras
import numpy as np
import pytest
from weight_references import NAMES, place

from vitreous.weights import convert, export_weights, import_weights
from vitreous.weights.load import variables
from vitreous.weights.mapping import variable_shapes
from vitreous.weights.tensors import read_tensors

to_numpy = keras.ops.convert_to_numpy


def assert_same_tensors(path, other):
    first, second = read_tensors(path), read_tensors(other)
    assert set(first) == set(second)
    for name in first:
        np.testing.assert_array_equal(first[name].read(), second[name].read(), err_msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_reference(name, tmp_path):
    path, outputs = place(name, tmp_path)
    report = import_weights(path)
    model, images = report.model, outputs["images"]
    shapes = {key: tuple(v.shape) for key, v in variables(model).items()}
    assert shapes == variable_shapes(model.config)
    assert report.num_parameters == sum(int(np.prod(shape)) for shape in shapes.values())
    assert report.num_matched + len(report.unused) == len(read_tensors(path))

    np.testing.assert_allclose(to_numpy(model(images)), outputs["logits"], atol=1e-5)
    np.testing.assert_allclose(to_numpy(model.tokens(images)), outputs["tokens"], atol=1e-5)
    if name.startswith(("hf_deit_distilled", "hf_dinov2")):  # there, what is stored is the class token
        features = to_numpy(model.features(images, pooling="class"))
    else:
        features = to_numpy(model.features(images))
    np.testing.assert_allclose(features, outputs["features"], atol=1e-5)

    # Back to the format it came from, at once and by way of a .keras file.
    place_for = lambda stem: tmp_path / (f"{stem}.npz" if report.format == "npz" else stem)  # noqa: E731
    exported = export_weights(model, place_for("back"), format=report.format, input_spec=report.input_spec)
    assert_same_tensors(path, exported.paths[0])
    assert exported.num_tensors == len(read_tensors(path))
    export_weights(model, tmp_path / "model.keras", input_spec=report.input_spec)
    later = convert(tmp_path / "model.keras", place_for("later"), to=report.format).exported
    assert_same_tensors(path, later.paths[0])
    # What was written is read again without being told what it is.
    again = import_weights(place_for("back"))
    assert (again.format, again.input_spec) == (report.format, report.input_spec)
    np.testing.assert_allclose(to_numpy(again.model(images)), outputs["logits"], atol=1e-5)


def test_round_the_world(tmp_path):
    path, outputs = place("google_vit", tmp_path)
    convert(path, tmp_path / "a.keras")
    convert(tmp_path / "a.keras", tmp_path / "timm", to="timm")
    convert(tmp_path / "timm", tmp_path / "hf", to="hf")
    report = convert(tmp_path / "hf", tmp_path / "b.npz")
    assert_same_tensors(path, tmp_path / "b.npz")
    model = report.imported.model
    np.testing.assert_allclose(to_numpy(model(outputs["images"])), outputs["logits"], atol=1e-5)
    assert "read back and equal" in report.summary()


def test_positions_of_registers_change_hands(tmp_path):
    """DINOv2's class token has a position in transformers, and none of its own in timm: the sum is the same."""
    path, outputs = place("hf_dinov2_reg", tmp_path)
    model = import_weights(path, num_classes=0).model
    expected = to_numpy(model.tokens(outputs["images"]))
    assert model.config.position_tokens == "class"
    report = import_weights(path, num_classes=0, pooling="class")
    folded = convert_model(report.model, tmp_path / "timm")
    assert folded.config.position_tokens == "patches"
    np.testing.assert_allclose(to_numpy(folded.tokens(outputs["images"])), expected, atol=1e-5)


def convert_model(model, folder):
    export_weights(model, folder, format="timm")
    return import_weights(folder).model


def test_big_vision_files(tmp_path):
    """Stacked and single blocks, with and without the image tower's prefix."""
    import dataclasses

    path, outputs = place("timm_siglip_map", tmp_path)
    model = import_weights(path).model
    origin = model.origin
    for is_stacked in (False, True):
        for prefix in ("params/", "params/img/"):
            style = {"prefix": prefix, "is_big_vision": True, "is_stacked": is_stacked}
            model.origin = dataclasses.replace(origin, format="npz", style=style)
            export_weights(model, tmp_path / "big.npz")
            names = set(read_tensors(tmp_path / "big.npz"))
            block = "encoderblock" if is_stacked else "encoderblock_2"
            assert f"{prefix}Transformer/{block}/MlpBlock_0/Dense_1/kernel" in names
            (tmp_path / "big.json").unlink()  # nothing but the tensors, as Google publishes them
            report = import_weights(tmp_path / "big.npz")
            assert report.model.config.num_heads == 4
            np.testing.assert_allclose(to_numpy(report.model(outputs["images"])), outputs["logits"], atol=1e-5)
