"""Engine: the answers of the model, in order, from every kind of source; broken images, resuming, start-up."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import tracemalloc

import numpy as np
import pytest
from PIL import Image
from run_folder import make_run

from vitreous import engine as engine_module
from vitreous.data import decode_image, resampling, resize_image
from vitreous.data.resampling import resize_image_fast
from vitreous.engine import Engine, Prediction
from vitreous.errors import ConfigError, ImageError, MissingPathError, RunError
from vitreous.evaluation import softmax
from vitreous.export import export_model, load_runtime
from vitreous.model import create_predict_function
from vitreous.spec import ViTConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, projection_dim=16, num_blocks=1, num_heads=2, num_classes=10
    )
    return make_run(tmp_path_factory.mktemp("runs") / "digits", config, [str(k) for k in range(10)])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """40 images, and one that is none."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(40):
        size = (10 + i % 7, 12)
        Image.fromarray(rng.integers(0, 256, size).astype("uint8")).save(folder / f"{i:02}.png")
    (folder / "20b.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def expected(run, photos):
    """{name: probabilities} by Keras."""
    files = [path for path in sorted(photos.iterdir()) if path.name != "20b.png"]
    images = np.stack([resize_image(decode_image(path, 1), run.input_spec) for path in files])
    shares = softmax(create_predict_function(run.load_model(), run.input_spec)(images))
    return dict(zip(map(str, files), shares, strict=True))


@pytest.fixture(scope="module")
def engine(run):
    return Engine(run.path, num_threads=2)


def check(predictions, expected, run):
    """Asserts order and numbers."""
    predictions = list(predictions)
    assert [str(p.path) for p in predictions] == list(expected)
    for prediction, shares in zip(predictions, expected.values(), strict=True):
        order = [run.class_names.index(name) for name in prediction.classes]
        np.testing.assert_allclose(prediction.probabilities, shares[order], atol=1e-5)
        assert list(prediction.probabilities) == sorted(prediction.probabilities, reverse=True)


def test_a_folder_in_order_with_a_broken_file(engine, run, photos, expected):
    failed, seen = [], []
    predictions = engine.predict(
        photos, on_error=lambda *args: failed.append(args), on_progress=lambda *args: seen.append(args)
    )
    check(predictions, expected, run)
    assert failed == [(str(photos / "20b.png"), "not an image in a known format")]
    assert seen[-1] == (41, 41) and seen == sorted(seen)
    with pytest.raises(ImageError, match=r"20b.png"):
        list(engine.predict(photos))
    with pytest.raises(MissingPathError, match=r"none"):
        engine.predict(photos / "none")
    with pytest.raises(ConfigError, match=r"Received: top_k=0"):
        engine.predict(photos, top_k=0)
    for one in (np.zeros((8, 8, 3), "uint8"), np.zeros((8, 8, 1), "uint8"), np.zeros((8, 8), "uint8"), b"GIF"):
        with pytest.raises(ConfigError, match=r"Received: a (ndarray of shape \(8, 8.*|bytes)\. .*one image in a list"):
            engine.predict(one)
    with pytest.raises(ConfigError, match=r"Received: num_threads=0"):
        Engine(run, num_threads=0)
    with pytest.raises(ConfigError, match=r"Received: a int"):
        engine.predict(3)


def test_every_kind_of_image(engine, run, photos, expected):
    files = list(expected)
    check(engine.predict(files, top_k=10), expected, run)
    check(engine.predict(path for path in files), expected, run)
    by_place = {str(i): shares for i, shares in enumerate(expected.values())}
    arrays = [np.asarray(Image.open(path)) for path in files]
    check(engine.predict(arrays), by_place, run)
    check(engine.predict(iter([a[..., None] for a in arrays])), by_place, run)
    check(engine.predict(open(path, "rb").read() for path in files), by_place, run)  # noqa: SIM115
    with pytest.raises(ConfigError, match=r"Received: dtype=float64"):
        list(engine.predict([np.zeros((8, 8))]))


def test_exports_keras_and_precisions_agree(run, photos, expected, tmp_path):
    def ignore(*arguments):
        pass

    onnx = export_model(run, format="onnx", out=tmp_path / "m.onnx", batch_size=3).path
    for options, name, tolerance in (
        ({"path": onnx}, "onnxruntime", 1e-5),
        ({"path": run, "backend": "jax"}, "Keras on jax, float32 (asked for)", 1e-5),
        ({"path": run, "precision": "bf16"}, "OpenVINO", 0.1),
    ):
        told = []
        engine = Engine(**options, on_message=told.append)
        assert engine.description.startswith(name)
        assert told[-1] == f"Engine   {engine.description}"
        for prediction in engine.predict(photos, top_k=1, on_error=ignore):
            assert prediction.probabilities[0] == pytest.approx(expected[str(prediction.path)].max(), abs=tolerance)
        images = np.zeros((5, 8, 8, 1), "uint8")
        assert engine.logits(images).shape == engine.probabilities(images).shape == (5, 10)


def test_images_are_resized_to_the_pixel_in_fp32_alone(run, photos):
    path = photos / "03.png"
    image = decode_image(path, 1)
    for precision, resize in (("fp32", resize_image), ("bf16", resize_image_fast)):
        engine = Engine(run, precision=precision)
        shares = engine.probabilities(resize(image, run.input_spec)[None])[0]
        (found,) = engine.predict([path])
        assert found.probabilities == tuple(float(share) for share in np.sort(shares)[::-1][:5])
    if resampling._kernels() is not None:  # there is a build of the package for this machine
        assert not np.array_equal(resize_image(image, run.input_spec), resize_image_fast(image, run.input_spec))


def test_what_a_server_needs(engine, run):
    assert (engine.class_names, engine.input_spec) == (run.class_names, run.input_spec)
    assert engine.temperature == run.temperature
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1)).astype("uint8")
    logits = engine.logits(images)
    assert logits.dtype == np.float32
    results = {}
    threads = [
        threading.Thread(target=lambda i=i: results.update({i: engine.logits(images[i : i + 1])})) for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_allclose(np.concatenate([results[i] for i in range(6)]), logits, atol=1e-5)
    latency = Engine(run, is_latency=True)
    np.testing.assert_allclose(latency.logits(images), logits, atol=1e-5)
    with pytest.raises(ConfigError, match=r"uint8 images of shape \(B, 8, 8, 1\). Received: dtype=float32"):
        engine.logits(images.astype("float32"))


def test_memory_is_flat_and_reading_runs_only_a_little_ahead(engine):
    read = 0

    def images(count):
        nonlocal read
        for _ in range(count):
            read += 1
            yield np.zeros((200, 200), "uint8")

    tracemalloc.start()
    for done, _ in enumerate(engine.predict(images(3000)), 1):
        assert read - done <= 8 * engine_module.BATCH
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert done == 3000
    assert peak < 20e6  # all of them at once take 120 MB


def test_leaving_early_ends_the_threads(engine):
    stream = engine.predict(np.zeros((8, 8), "uint8") for _ in range(1000))
    next(stream)
    readers = [thread for thread in threading.enumerate() if thread.name.startswith("vitreous-read")]
    assert readers
    stream.close()
    for thread in readers:
        thread.join(10)
        assert not thread.is_alive()


def test_wrong_arguments(run, tmp_path):
    onnx = export_model(run, format="onnx", out=tmp_path / "m.onnx").path
    with pytest.raises(ConfigError, match=r"an export has its own. Received: precision='bf16'"):
        Engine(onnx, precision="bf16")
    with pytest.raises(ConfigError, match=r"Expected fp32 or bf16. Received: precision='int8'"):
        Engine(run, precision="int8")
    with pytest.raises(ConfigError, match=r"Expected OpenVINO on a CPU. Received: asked for"):
        Engine(run, precision="bf16", backend="jax")
    with pytest.raises(RunError, match=r"Received: missing model.keras"):
        Engine(tmp_path)
    with pytest.raises(MissingPathError):
        Engine(tmp_path / "none.onnx")
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "saved_model.pb").write_bytes(b"")
    from vitreous.export.write import create_record

    (saved / "vitreous.json").write_text(create_record(run, "saved_model", "fp32").to_json())
    with pytest.raises(ConfigError, match=r"Received: an export to saved_model. Load it in its own library"):
        Engine(saved)


def test_the_cache(run, monkeypatch, tmp_path):
    """An export is made once for a state of the run, and made for one time only where nothing can be kept."""
    monkeypatch.setenv("VITREOUS_ENGINE_CACHE", str(tmp_path / "cache"))
    told = []
    Engine(run, on_message=told.append)
    Engine(run, on_message=told.append)
    assert [line for line in told if "once" in line] == ["Engine   exports digits to OpenVINO in fp32, once"]
    (folder,) = (tmp_path / "cache" / "exports").iterdir()
    (folder / "model.bin").write_bytes(b"")  # damaged: made again
    told.clear()
    assert np.isfinite(Engine(run, on_message=told.append).logits(np.zeros((1, 8, 8, 1), "uint8"))).all()
    assert told[0] == "Engine   exports digits to OpenVINO in fp32, once"
    monkeypatch.setenv("VITREOUS_ENGINE_CACHE", "off")
    images = np.zeros((1, 8, 8, 1), "uint8")
    assert Engine(run).logits(images).shape == (1, 10)
    monkeypatch.setenv("VITREOUS_ENGINE_CACHE", str(tmp_path / "locked"))
    monkeypatch.setattr(engine_module.os, "access", lambda *arguments: False)
    told.clear()
    assert Engine(run, on_message=told.append).logits(images).shape == (1, 10)
    assert told[0] == f"Engine   cannot keep anything in {tmp_path / 'locked'}: it cannot be written"
    monkeypatch.undo()
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("VITREOUS_ENGINE_CACHE", str(tmp_path / "file"))
    told.clear()
    assert Engine(run, on_message=told.append).logits(images).shape == (1, 10)
    assert told[0].startswith(f"Engine   cannot keep anything in {tmp_path / 'file'}: ")


def test_what_is_compiled_follows_the_weights(run, tmp_path):
    """Other weights beside the same .xml, at the same time to the second, are not answered for by the old ones."""
    path, cache = export_model(run, format="openvino", out=tmp_path / "m.xml").path, tmp_path / "cache"
    images = np.full((1, 8, 8, 1), 99, "uint8")
    before = load_runtime(path, cache_dir=cache)[0](images)[0]
    weights = path.with_suffix(".bin")
    times = weights.stat()
    kernel = np.array(run.load_model().head.kernel)
    assert weights.read_bytes().count(kernel.tobytes()) == 1
    weights.write_bytes(weights.read_bytes().replace(kernel.tobytes(), (kernel / 2).tobytes()))
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = load_runtime(path, cache_dir=cache)[0](images)[0]
    np.testing.assert_array_equal(after, load_runtime(path)[0](images)[0])
    assert not np.allclose(after, before)


def test_signals_are_heard_after_engines_have_gone(run, tmp_path):
    """Ended in the order of their beginning, two cores of OpenVINO make the next signal a segmentation fault."""
    path = export_model(run, format="openvino", out=tmp_path / "m.xml").path
    first, second = load_runtime(path)[0], load_runtime(path)[0]
    del first
    del second
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


def test_without_openvino_keras_answers(run, monkeypatch):
    monkeypatch.setattr(engine_module, "is_installed", lambda name: name != "openvino")
    engine = Engine(run)
    assert engine.description == (
        "Keras on jax, float32 (not installed: openvino, which would be faster: vitreous[openvino])"
    )


def test_an_export_needs_no_keras(run, photos, tmp_path):
    export_model(run, format="openvino", out=tmp_path / "m.xml")
    export_model(run, format="onnx", out=tmp_path / "m.onnx")
    code = f"""
import sys
from vitreous.engine import Engine
for path in ({str(tmp_path / "m.xml")!r}, {str(tmp_path / "m.onnx")!r}):
    print(next(Engine(path).predict([{str(photos / "00.png")!r}])).classes[0])
assert not {{"keras", "jax", "torch", "tensorflow", "sklearn", "onnx", "openvino_telemetry"}} & set(sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(set(result.stdout.split())) == 1


# ---- files of answers ----


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_files(call, run, photos, expected, tmp_path):
    from pyarrow import parquet

    out = {name: tmp_path / f"answers.{name}" for name in ("csv", "json", "jsonl", "parquet")}
    for name, path in out.items():
        code, text, err = call("predict", run.path, photos, f"--{name}", "--out", path, "--top-k", 2)
        assert (code, text) == (0, "")
        assert f"Wrote {path}" in err and "Warning: left out" in err
    table = rows(out["csv"])
    assert [row["image"] for row in table] == list(expected)
    assert list(table[0]) == ["image", "class_1", "probability_1", "class_2", "probability_2"]
    whole = json.loads(out["json"].read_text())
    assert [json.loads(line) for line in out["jsonl"].read_text().splitlines()] == whole
    assert [row["image"] for row in whole] == list(expected)
    columns = parquet.read_table(out["parquet"]).to_pydict()
    assert columns["image"] == list(expected)
    np.testing.assert_allclose(columns["probability_1"], [float(row["probability_1"]) for row in table], atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in out.values())


@pytest.mark.parametrize("name", ["csv", "jsonl"])
def test_resume_gives_the_same_file(call, run, photos, name, tmp_path):
    whole, out = tmp_path / f"whole.{name}", tmp_path / f"out.{name}"
    call("predict", run.path, photos, f"--{name}", "--out", whole)
    text = whole.read_bytes()
    partial = tmp_path / f"out.{name}.partial"
    partial.write_bytes(text[: len(text) * 2 // 3])  # in the middle of a row
    assert not text[: len(text) * 2 // 3].endswith(b"\n")
    _, _, err = call("predict", run.path, photos, f"--{name}", "--out", out, "--resume")
    assert "Resume   2" in err
    assert out.read_bytes() == text
    assert not partial.exists()
    _, _, err = call("predict", run.path, photos, f"--{name}", "--out", out, "--resume")  # nothing is left to do
    assert "Resume   40 images have their row" in err
    assert out.read_bytes() == text


def test_an_interrupted_prediction_keeps_its_rows(call, run, photos, tmp_path, monkeypatch):
    out = tmp_path / "out.csv"
    original, count = Engine._describe, 0

    def describe(*arguments):
        nonlocal count
        count += 1
        if count == 20:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(Engine, "_describe", describe)
    code, _, err = call("predict", run.path, photos, "--csv", "--out", out)
    assert code == 130
    assert f"Kept     what was answered so far in {out}.partial; the same command with --resume goes on" in err
    assert not out.exists()
    assert len(rows(tmp_path / "out.csv.partial")) == 19
    monkeypatch.undo()
    origin = tmp_path / "out.csv.partial.json"
    before = json.loads(origin.read_text())
    assert (before["precision"], before["top_k"], before["threshold"]) == ("fp32", 5, None)
    origin.write_text(json.dumps({**before, "model": "another"}))
    code, _, err = call("predict", run.path, photos, "--csv", "--out", out, "--resume")
    assert code == 2 and "model='another' before" in err
    origin.write_text(json.dumps(before))
    code, _, err = call("predict", run.path, photos, "--csv", "--out", out, "--resume")
    assert code == 0
    assert len(rows(out)) == 40
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]


def test_a_file_without_rows_has_one_header(tmp_path):
    from vitreous.answers import CsvWriter

    options = {"num_ranks": 1, "has_labels": False, "threshold": 0.5}
    for _ in range(2):
        (tmp_path / "a.csv").write_text("image,is_sure,class_1,probability_1\n")
        with CsvWriter(tmp_path / "a.csv", resume=True, **options) as writer:
            writer.write(Prediction("a.png", ("x",), (0.9,), None, True))
    assert (tmp_path / "a.csv").read_text() == "image,is_sure,class_1,probability_1\na.png,true,x,0.900000\n"


def test_resume_refuses(call, run, photos, tmp_path):
    out = tmp_path / "out.csv"
    code, _, err = call("predict", run.path, photos, "--csv", "--resume")
    assert code == 2 and "Received: no file" in err
    code, _, err = call("predict", run.path, photos, "--json", "--out", out, "--resume")
    assert code == 2 and "Received: another format" in err
    call("predict", run.path, photos, "--csv", "--out", out)
    code, _, err = call("predict", run.path, photos, "--csv", "--out", out, "--resume", "--top-k", 1)
    assert code == 2 and "with the same options. Received: " in err and "columns image, class_1" in err
    assert len(rows(out)) == 40  # what was refused stays as it was
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv"]
    lines = tmp_path / "out.jsonl"
    call("predict", run.path, photos, "--jsonl", "--out", lines, "--threshold", 0)
    for options, reason in (
        (("--threshold", 0, "--top-k", 1), "a row of 5 classes"),
        ((), "a row of image, is_sure, predictions"),
        (("--threshold", 1), "is_sure=True, threshold=1.0"),
    ):
        code, _, err = call("predict", run.path, photos, "--jsonl", "--out", lines, "--resume", *options)
        assert code == 2 and reason in err
    foreign = tmp_path / "notes.csv"
    foreign.write_text("a line\nand one without an end")
    code, _, err = call("predict", run.path, photos, "--csv", "--out", foreign, "--resume")
    assert code == 2 and foreign.read_text() == "a line\nand one without an end"
    code, _, err = call("predict", run.path, photos, "--parquet")
    assert code == 2 and "Pass --out FILE.parquet" in err


def test_several_labels(tmp_path):
    from vitreous.answers import CsvWriter, ParquetWriter

    predictions = [
        Prediction("a.png", ("x", "y"), (0.9, 0.6), ("x", "y")),
        Prediction("b.png", ("y", "x"), (0.2, 0.1), ()),
    ]
    for kind, path in ((CsvWriter, tmp_path / "a.csv"), (ParquetWriter, tmp_path / "a.parquet")):
        with kind(path, num_ranks=2, has_labels=True) as writer:
            for prediction in predictions:
                writer.write(prediction)
    assert [row["labels"] for row in rows(tmp_path / "a.csv")] == ["x;y", ""]
    from pyarrow import parquet

    assert parquet.read_table(tmp_path / "a.parquet").to_pydict()["labels"] == [["x", "y"], []]
