"""Exports of a run: each loaded in its own runtime, compared, and refused where it does not agree."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from run_folder import make_run

import vitreous
from vitreous.data import decode_image, resize_image
from vitreous.errors import ConfigError, DataError, ExportError, MissingDependencyError, MissingPathError
from vitreous.export import export_model, load_runtime, read_record
from vitreous.export.child import BACKENDS, check_packages, run_child
from vitreous.export.parity import CheckImages, collect_images, compare, generate_images
from vitreous.export.record import metadata_path, parse_record
from vitreous.export.reference import prepare_image
from vitreous.export.write import create_record, move_files, write_export
from vitreous.model import create_predict_function
from vitreous.spec import InputSpec, ViTConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of 12 plain-coloured images, without splits."""
    root = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for k, name in enumerate(("red", "green", "blue")):
        (root / name).mkdir()
        for i in range(12):
            pixels = rng.integers(0, 60, (20, 24, 3)).astype("uint8")
            pixels[:, :, k] += 180
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    config = ViTConfig(image_size=16, patch_size=8, projection_dim=16, num_blocks=1, num_heads=2, num_classes=3)
    return make_run(tmp_path_factory.mktemp("runs") / "colours", config, ("blue", "green", "red"), folder)


@pytest.fixture(scope="module")
def keras_logits(run):
    images = generate_images(run.input_spec, 8)
    return images, create_predict_function(run.load_model(), run.input_spec)(images)


@pytest.mark.parametrize(
    ("format", "precision", "suffix", "tolerance"),
    [
        ("onnx", "fp32", ".onnx", 1e-4),
        ("onnx", "fp16", ".onnx", 2e-2),
        ("openvino", "fp32", ".xml", 1e-4),
        ("openvino", "fp16", ".xml", 2e-2),
        ("openvino", "bf16", ".xml", 1e-1),
    ],
)
def test_export_answers_as_the_model(run, keras_logits, format, precision, suffix, tolerance):
    export = export_model(run, format=format, precision=precision)
    assert export.path == run.path / "export" / f"colours-{format}-{precision}{suffix}"
    record = read_record(export.path)
    assert record == export.record
    assert (record.class_names, record.input) == (run.class_names, run.input_spec)
    assert record.versions["vitreous"] == vitreous.__version__
    assert record.parity["max_logit_difference"] < record.parity["tolerance"]
    assert record.parity["images"].startswith("validation images of ")
    runtime, loaded = load_runtime(export.path, num_threads=1)
    assert loaded == record
    images, expected = keras_logits
    scale = max(1, np.abs(expected).max())
    for count in (1, 5, 8):  # any batch size
        logits, probabilities = runtime(images[:count])
        np.testing.assert_allclose(logits, expected[:count], atol=tolerance * scale)
        np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-3)
    assert f"({format}, {precision}, " in export.summary()
    assert not list(export.path.parent.glob(".*"))


def test_temperature_is_inside(run, keras_logits, tmp_path):
    images, expected = keras_logits
    record = create_record(run, "onnx", "fp32").replace(temperature=2.5)
    export = write_export(run, tmp_path / "warm.onnx", record, CheckImages(images, None, "generated images"))
    logits, probabilities = load_runtime(export.path)[0](images)
    shares = np.exp(expected / 2.5)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    np.testing.assert_allclose(probabilities, shares / shares.sum(1, keepdims=True), atol=1e-5)
    assert "temperature 2.500 inside" in export.summary()


@pytest.mark.parametrize(("format", "batch_size"), [("onnx", 5), ("openvino", None)])
def test_int8_states_its_cost(run, folder, format, batch_size, tmp_path):
    out = tmp_path / ("small.onnx" if format == "onnx" else "small.xml")
    others = shutil.copytree(folder, tmp_path / "others")
    (others / "red" / "0.png").rename(others / "red" / "zero.png")  # not the data of training: all of it counts
    options = {"data": others, "max_drop": 100, "out": out, "batch_size": batch_size}
    export = export_model(run, format=format, precision="int8", **options)
    parity = read_record(out).parity
    assert parity["measure"] == "accuracy"
    assert parity["num_images"] == 36
    assert 0 <= parity["after"] <= 1
    assert "(limit: a loss of 100 points)" in export.summary()
    logits, _ = load_runtime(out)[0](generate_images(run.input_spec, 5))
    assert np.isfinite(logits).all()


def test_int8_is_refused_where_it_costs_too_much():
    labels = np.arange(36) % 3
    images = CheckImages(np.zeros((36, 1, 1, 3), "uint8"), labels, "validation images of colours")
    expected = np.eye(3)[labels]
    options = {"temperature": 1.0, "is_multi_label": False, "class_names": ("a", "b", "c"), "max_drop": 1.0}
    worse = expected.copy()
    worse[:2] = np.roll(worse[:2], 1, axis=1)
    shares = np.exp(worse) / np.exp(worse).sum(1, keepdims=True)
    with pytest.raises(ExportError, match=r"at most 1 points of accuracy. Received: 100.00% before, 94.44% after"):
        compare(expected, worse, shares, images, precision="int8", **options)
    result = compare(expected, worse, shares, images, precision="int8", **{**options, "max_drop": 6})
    assert result["top1_agreement"] == pytest.approx(34 / 36)
    with pytest.raises(ExportError, match=r"Expected logits within 0.0001 in fp32. Received: a difference of 1 on 36"):
        compare(expected, worse, shares, images, precision="fp32", **options)
    with pytest.raises(ExportError, match=r"Received: NaN or infinity in fp16"):
        compare(expected, worse * np.nan, shares, images, precision="fp16", **options)
    with pytest.raises(ExportError, match=r"does not agree with itself"):
        compare(expected, expected, shares, images, precision="fp32", **options)


def test_what_disagrees_is_removed(run, tmp_path):
    from vitreous.export import write

    out = tmp_path / "model.onnx"
    out.write_bytes(b"an earlier export")
    original = write.build_graph

    def wrong(config, weights, *arguments, **options):
        return original(config, {**weights, "head/bias": weights["head/bias"] + 1}, *arguments, **options)

    with mock.patch.object(write, "build_graph", wrong), pytest.raises(ExportError, match=r"does not agree with the"):
        export_model(run, format="onnx", out=out)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert out.read_bytes() == b"an earlier export"


def test_without_its_data_a_run_is_checked_on_generated_images(run, tmp_path):
    config = {**run.config, "data": {**run.config["data"], "root": str(tmp_path / "gone")}}
    moved = type(run)(run.path, config, run.metrics)
    assert collect_images(moved).source.startswith("generated images (no data: ")
    with pytest.raises(DataError, match=r"Expected labelled images, to calibrate on .* Pass --data"):
        collect_images(moved, need_labels=True)


@pytest.mark.parametrize("backend", ["tensorflow", "torch"])
def test_formats_of_other_backends(run, keras_logits, backend, tmp_path):
    """In one process for each backend; `export_model` starts the same one for each format."""
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"needs {backend}")
    images, expected = keras_logits
    outputs = {
        "litert": tmp_path / "m.tflite",
        "saved_model": tmp_path / "saved",
        "torch": tmp_path / "m.pt2",
    }
    outputs = {name: path for name, path in outputs.items() if BACKENDS[name] == backend}
    answers = run_child(
        run.path,
        outputs,
        images,
        tmp_path,
        precision="fp32",
        temperature=2.0,
        is_multi_label=False,
        batch_size=None,
    )
    if "litert" in outputs:
        runtime, _ = load_runtime(outputs["litert"], record=create_record(run, "litert", "fp32"))
        answers["litert"] = runtime(images)
        assert runtime(images[:3])[0].shape == (3, 3)
    assert set(answers) == set(outputs)
    for logits, probabilities in answers.values():
        np.testing.assert_allclose(logits, expected, atol=1e-4)
        shares = np.exp(expected / 2)
        np.testing.assert_allclose(probabilities, shares / shares.sum(1, keepdims=True), atol=1e-5)


def test_a_process_that_fails_says_why(run, tmp_path):
    with (
        mock.patch.dict(os.environ, {"PYTHONPATH": ""}),
        pytest.raises(ExportError, match=r"Cannot export to torch.*exit code 1, .*missing model.keras"),
    ):
        run_child(
            tmp_path,
            {"torch": tmp_path / "m.pt2"},
            np.zeros((1, 16, 16, 3), "uint8"),
            tmp_path,
            precision="fp32",
            temperature=1.0,
            is_multi_label=False,
            batch_size=None,
        )


@pytest.mark.parametrize(("format", "batch_size"), [("onnx", 2), ("openvino", None)])
def test_a_bundle_needs_no_vitreous(run, format, batch_size, tmp_path):
    out = tmp_path / ("model.onnx" if format == "onnx" else "model.xml")
    export = export_model(run, format=format, bundle=True, out=out, batch_size=batch_size)
    assert export.bundle == tmp_path / "model.zip"
    with zipfile.ZipFile(export.bundle) as archive:
        archive.extractall(tmp_path / "elsewhere")
    expected = json.loads((tmp_path / "elsewhere" / "expected.json").read_text())
    script = tmp_path / "elsewhere" / "run.py"
    assert "vitreous" not in script.read_text()
    code = f"import sys; sys.modules['vitreous'] = None; import runpy; runpy.run_path({str(script)!r})"
    images = ["elsewhere/example.png"] * 3 if batch_size else []  # more than a batch; without names, the example
    result = subprocess.run([sys.executable, "-c", code, *images], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(answers) == max(len(images), 1)
    for answer in answers:
        assert answer["class"] == expected["class"]
        assert answer["probability"] == pytest.approx(expected["probability"], abs=1e-5)
        np.testing.assert_allclose(answer["logits"], expected["logits"], atol=1e-4)


@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
@pytest.mark.parametrize("target", [(24, 20), (24, 24)])
@pytest.mark.parametrize("size", [(33, 51), (80, 30), (24, 24), (9, 100)])
def test_reference_preparation_equals_ours(mode, target, size, tmp_path):
    rng = np.random.default_rng(0)
    for channels, kind in ((3, "RGB"), (3, "RGBA"), (1, "L"), (3, "P")):
        image = Image.fromarray(rng.integers(0, 256, (*size, 4)).astype("uint8")).convert(kind)
        exif = Image.Exif()
        exif[0x0112] = 6  # rotated
        image.save(tmp_path / "image.png", exif=exif)
        spec = InputSpec(
            image_size=target,
            num_channels=channels,
            mean=(0.4, 0.5, 0.6)[:channels],
            std=(0.5,) * channels,
            resize_mode=mode,
            crop_fraction=0.875,
        )
        ours = resize_image(decode_image(tmp_path / "image.png", channels), spec)
        theirs = prepare_image(tmp_path / "image.png", json.loads(json.dumps(spec.to_dict())))
        assert theirs.dtype == np.uint8
        np.testing.assert_array_equal(theirs[0], ours)


def test_wrong_arguments(run, tmp_path):
    with pytest.raises(ConfigError, match=r"Cannot export to onnx in bf16. Expected one of fp32, fp16, int8."):
        export_model(run, format="onnx", precision="bf16")
    with pytest.raises(ConfigError, match=r"Expected 'onnx', 'openvino', 'litert', 'saved_model' or 'torch'"):
        export_model(run, format="onxx")
    with pytest.raises(ConfigError, match=r"Expected a path that ends in .onnx, for format='onnx'"):
        export_model(run, format="onnx", out=tmp_path / "model.bin")
    with pytest.raises(ConfigError, match=r"the path of a folder, without a suffix"):
        export_model(run, format="saved_model", out=tmp_path / "model.onnx")
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"Received: a folder that is none"):
        export_model(run, format="saved_model", out=tmp_path / "full")
    with pytest.raises(ConfigError, match=r"Received: a file that is none"):
        export_model(run, format="saved_model", out=tmp_path / "file")
    (tmp_path / "m.bin").mkdir()
    with pytest.raises(ConfigError, match=r"Received: a folder that is none, .*m\.bin"):
        export_model(run, format="openvino", out=tmp_path / "m.xml")
    with pytest.raises(ExportError, match=r"Expected a folder that can be written"):
        export_model(run, format="onnx", out=tmp_path / "file" / "model.onnx")
    with pytest.raises(ConfigError, match=r"Received: batch_size=0"):
        export_model(run, batch_size=0)
    with pytest.raises(ConfigError, match=r"Received: max_drop=-1"):
        export_model(run, max_drop=-1)


def test_files_that_are_no_exports(tmp_path):
    with pytest.raises(MissingPathError, match=r"Received: no such file"):
        read_record(tmp_path / "none.xml")
    for name in ("a.xml", "a.onnx", "a.tflite"):
        (tmp_path / name).write_bytes(b"<net/>" if name == "a.xml" else b"junk")
        with pytest.raises(ExportError):
            load_runtime(tmp_path / name)
    with pytest.raises(ExportError, match=r"with its metadata. Received: none in it, or beside it"):
        read_record(tmp_path / "a.xml")
    (tmp_path / "b.pt2").write_bytes(b"")
    for text in (b'{"format": "torch"}', b"[]", b"[" * 10**6):
        (tmp_path / "b.json").write_bytes(text)
        with pytest.raises(ExportError, match=r"metadata that do not fit"):
            read_record(tmp_path / "b.pt2")
    (tmp_path / "b.json").write_bytes(b"\xff")
    with pytest.raises(ExportError, match=r"Expected its metadata in .*b\.json\. Received: 'utf-8' codec"):
        read_record(tmp_path / "b.pt2")
    for name in ("b.json", "c.xml"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**26 + 1)
    for name in ("b.pt2", "c.xml"):
        with pytest.raises(ExportError, match=r"Received: 67,108,865 bytes"):
            read_record(tmp_path / name)


def test_metadata_that_belong_to_another_file(run, tmp_path):
    export = export_model(run, format="onnx", out=tmp_path / "m.onnx")
    for changes, reason in (
        ({"class_names": ("a", "b")}, r"Expected logits of shape \(None, 2\), .*Received: \('B', 3\)"),
        ({"input": InputSpec(image_size=32)}, r"Expected images of shape \(None, 32, 32, 3\)"),
        ({"batch_size": 4, "input": run.input_spec.replace(image_size=(16, 8))}, r"\(4, 16, 8, 3\)"),
    ):
        with pytest.raises(ExportError, match=reason):
            load_runtime(export.path, record=export.record.replace(**changes))
    text = export.record.replace(format="torch", precision="fp32").to_json()
    with pytest.raises(ExportError, match=r"Received: the metadata of an export to torch"):
        parse_record(text, export.path)
    for changes in ({"temperature": 0.0}, {"temperature": float("nan")}, {"batch_size": 0}, {"class_names": ()}):
        with pytest.raises(ConfigError, match=rf"Cannot use {next(iter(changes))}"):
            export.record.replace(**changes)


def test_a_folder_may_have_dots_and_is_replaced(tmp_path):
    target = tmp_path / "photos-1.5-saved_model-fp32"
    assert metadata_path(target) == target / "vitreous.json"
    for text in ("old", "new"):
        partial = tmp_path / "partial"
        (partial / target.name).mkdir(parents=True)
        (partial / target.name / "saved_model.pb").write_text(text)
        assert list(move_files(partial, target)) == [f"{target.name}/saved_model.pb"]
        shutil.rmtree(partial)
    assert (target / "saved_model.pb").read_text() == "new"


def test_a_model_of_nan_is_not_blamed_on_the_export(run, tmp_path):
    nothing = np.full((36, 3), np.nan)
    with (
        mock.patch("vitreous.model.create_predict_function", lambda *arguments: lambda images: nothing[: len(images)]),
        pytest.raises(ExportError, match=r"Received: NaN or infinity from the Keras model itself"),
    ):
        export_model(run, format="onnx", out=tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("format", "package", "extra"),
    [("onnx", "onnx", "onnx"), ("openvino", "openvino", "openvino"), ("litert", "ai_edge_litert", "litert")],
)
def test_a_missing_package_names_its_extra(run, format, package, extra, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == package else find(name, *more))
    with pytest.raises(MissingDependencyError, match=rf"pip install 'vitreous\[{extra}\]'"):
        export_model(run, format=format)
    if format == "litert":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None)
        with pytest.raises(MissingDependencyError, match=r"pip install 'vitreous\[torch\]'"):
            check_packages("torch")


def test_command(call, run, tmp_path):
    out = tmp_path / "model.onnx"
    code, text, err = call("export", run.path, "--format", "onnx", "--out", out, "--bundle", "--batch", 1)
    assert code == 0, err
    assert f"Export   {out} (onnx, fp32, " in text and "batches of 1" in text and "same answer on 100.00%" in text
    assert (tmp_path / "model.zip").is_file()
    code, text, _ = call("export", run.path, "--format", "onnx", "--out", out, "--json")
    assert json.loads(text)["parity"]["top1_agreement"] == 1
    for options, message in (
        (("--out", "m.onnx"), "Expected a path that ends in .xml"),
        (("--format", "torch", "--precision", "int8"), "Cannot export to torch in int8"),
    ):
        code, _, err = call("export", run.path / "missing", *options)  # before the run is looked at
        assert code == 2 and message in err
    code, _, err = call("export", run.path, "--batch", "many")
    assert code == 2 and "Expected a positive number, or dynamic" in err
