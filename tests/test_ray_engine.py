"""Prediction on many machines: rows in order, one for each image, errors in words.

Ray itself starts slowly: but for the last test (VITREOUS_TEST_RAY=1 asks for it), a stand-in of a few lines runs the
workers in this process.
"""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image
from run_folder import make_run

from vitreous import ray_engine
from vitreous.data import ImageSet
from vitreous.engine import Engine
from vitreous.errors import ClusterError, ConfigError, DataError, ImageError, MissingDependencyError, RunError
from vitreous.export import export_model
from vitreous.ray_engine import RayEngine, Worker, plan_workers
from vitreous.spec import ViTConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = ViTConfig(image_size=8, patch_size=4, projection_dim=16, num_blocks=1, num_heads=2, num_classes=4)
    return make_run(tmp_path_factory.mktemp("runs") / "colours", config, ["red", "green", "blue", "grey"])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """70 images, one with a name that is no text, and one that is none."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(69):
        Image.fromarray(rng.integers(0, 256, (8, 9, 3)).astype("uint8")).save(folder / f"{i:02}.png")
    shutil.copy(folder / "00.png", os.fsencode(folder) + b"/\xff.png")
    (folder / "20b.png").write_bytes(b"no image")
    return folder


class Rows:
    """What stands for a data set of Ray."""

    def __init__(self, tables, ray):
        self.tables, self.ray = tables, ray
        self.context = types.SimpleNamespace(execution_options=types.SimpleNamespace())

    def map_batches(self, worker, *, fn_constructor_args, **options):
        self.worker, self.ray.options = worker(*fn_constructor_args), options
        return self

    def iter_batches(self, **_):
        import pyarrow

        assert self.context.execution_options.preserve_order is True
        for table in self.ray.order(self.tables):
            if self.ray.failure:
                raise self.ray.failure
            yield pyarrow.table(self.worker(table))


@pytest.fixture
def ray(monkeypatch):
    """A stand-in for Ray with two machines."""

    class RayError(Exception):
        pass

    fake = types.SimpleNamespace(__version__="2", failure=None, order=lambda tables: tables, calls=[], options={})
    fake.is_initialized = lambda: False
    fake.init = lambda address, **options: fake.calls.append(address)
    fake.shutdown = lambda: fake.calls.append("shutdown")
    fake.nodes = lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": True, "Resources": {"CPU": 4.0}}]
    fake.put = lambda value: value
    fake.exceptions = types.SimpleNamespace(RayError=RayError)
    fake.data = types.SimpleNamespace(from_arrow=lambda tables: Rows(tables, fake), ActorPoolStrategy=dict)
    monkeypatch.setattr(ray_engine, "_import_ray", lambda: fake)
    monkeypatch.setattr(ray_engine, "_PAUSES_SECONDS", (0.0, 0.0))
    monkeypatch.chdir(".")  # a worker goes where the command was given
    return fake


def test_rows_are_those_of_one_machine(call, ray, run, photos, tmp_path):
    for options in ((), ("--ray", "local", "--ray-workers", 2)):
        out = tmp_path / f"{len(options)}.csv"
        code, _, error = call("predict", run.path, photos, "--csv", "--threshold", 0.5, "--out", out, *options)
        assert code == 0, error
        assert "Warning: left out" in error and "20b.png: not an image in a known format" in error
    assert "Engine   Ray 2, up to 2 workers with 2 cores each, fp32" in error
    assert (tmp_path / "0.csv").read_bytes() == (tmp_path / "4.csv").read_bytes()
    assert ray.calls == ["local", "shutdown"]
    assert (ray.options["batch_size"], ray.options["num_cpus"], ray.options["num_gpus"]) == (16, 2, 0)


def test_relative_paths_names_twice_and_resuming(call, ray, run, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(photos.parent)
    files = [f"{photos.name}/{name}.png" for name in ("07", "03", "07", "05")]
    options = ("--jsonl", "--out", tmp_path / "out.jsonl", "--ray", "auto")
    code, _, error = call("predict", run.path, *files[:2], *options)
    assert code == 0, error
    code, _, error = call("predict", run.path, *files, *options, "--resume")
    assert code == 0 and "2 images have their row" in error
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == files
    assert rows[0]["predictions"] == rows[2]["predictions"] != rows[1]["predictions"]


def test_exports_urls_and_images_in_memory(ray, run, photos, tmp_path):
    def numbers(predictions):
        return [(str(p.path), p.classes, p.probabilities) for p in predictions]

    path = export_model(run, out=tmp_path / "model.xml").path
    with RayEngine(path, address="auto") as engine:
        assert (engine.class_names, engine.precision, engine.is_multi_label) == (run.class_names, "fp32", False)
        for name in ("00.png", "01.png", "02.png"):
            (tmp_path / "few" / name).parent.mkdir(exist_ok=True)
            shutil.copy(photos / name, tmp_path / "few" / name)
        url, seen = f"file://{tmp_path}/few", []
        found = list(engine.predict(url, on_progress=lambda *args: seen.append(args)))
        np.testing.assert_equal(numbers(found), numbers(Engine(path, num_threads=2).predict(url)))
        assert len(found) == 3 and seen[-1] == (3, 3)
        pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)).astype("uint8")
        images = ImageSet(["a", "b", "a"], arrays=pixels)
        assert [str(p.path) for p in engine.predict(images, top_k=1)] == ["a", "b", "a"]
        assert list(engine.predict(images, skip={"a": 2, "b": 1})) == []


def test_each_failure_is_said_once(ray, run, photos, monkeypatch):
    good, broken = photos / "00.png", photos / "20b.png"
    with RayEngine(run, address="auto") as engine:
        with pytest.raises(ImageError, match=r"20b.png.*not an image in a known format"):
            list(engine.predict([good, broken]))
        failed = []
        engine_error = {"on_error": lambda *args: failed.append(args)}
        assert list(engine.predict(ImageSet(["gone.png"]), **engine_error)) == []
        assert failed == [("gone.png", "a file that is not there")]
        ray.order = lambda tables: tables[::-1]
        with pytest.raises(ClusterError, match=r"one row for each of 71 images, in order. Received: that of image 64"):
            list(engine.predict(photos, **engine_error))
        ray.order = lambda tables: tables[:-1]
        with pytest.raises(ClusterError, match=r"Received: none in place of image 64"):
            list(engine.predict(photos, **engine_error))
        ray.order, ray.failure = lambda tables: tables, ray.exceptions.RayError("first\n\n  the actor died \n")
        with pytest.raises(ClusterError, match=r"Expected workers that live. Received: RayError: the actor died\. See"):
            list(engine.predict(photos))
        ray.failure = None
        images = ImageSet(["there.png"])
        monkeypatch.setattr(images, "path", lambda index: good)  # this machine sees it, a worker does not
        with pytest.raises(ClusterError, match=rf"that every machine sees. Received: .*not on {socket.gethostname()}"):
            list(engine.predict(images, **engine_error))
        with pytest.raises(ConfigError, match=r"Received: top_k=0"):
            engine.predict(photos, top_k=0)


def test_a_worker_answers_with_what_stops_it(run, photos, monkeypatch):
    import pyarrow

    monkeypatch.chdir(".")
    table = pyarrow.table({"index": [5, 6], "name": [b"a", b"b"], "row": [0, 1]})
    files = {name: (run.path / name).read_bytes() for name in ("model.keras", "config.toml", "metrics.json")}
    options = {"top_k": 1, "threshold": None, "version": "0.0"}

    def ask(files=files, options=options, store=None, **choices):
        answer = Worker(("colours", files), store, "/nowhere", choices, options)(table)
        assert answer["index"].tolist() == [5, 6]
        return [json.loads(text) for text in answer["answer"]]

    first, second = ask()
    assert first == second and first["kind"] == "ClusterError"
    assert "Expected vitreous 0.0 on every machine" in first["error"]
    options["version"] = ray_engine.__version__
    first, _ = ask({**files, "config.toml": b"format ="})
    assert first["kind"] == "RunError" and "a damaged file" in first["error"]

    class Storage:
        """It does not answer at first."""

        tries = 0

        def __init__(self, needed):
            self.needed = needed

        def read(self, row, name):
            self.tries += 1
            if self.tries <= self.needed:
                raise DataError("Cannot read s3://bucket. Expected an answer. Received: none. Check the network.")
            return photos / "00.png"

        def path(self, row, name):
            return None

    monkeypatch.setattr(ray_engine, "_PAUSES_SECONDS", (0.0, 0.0))
    first, second = ask(store=Storage(1), num_threads=1)
    assert first["predictions"] == second["predictions"]
    first, _ = ask(store=Storage(9), num_threads=1)
    assert (first["kind"], first["error"][:23]) == ("DataError", "Cannot read s3://bucket")


def test_what_a_worker_says_reaches_the_user(ray, run, photos, monkeypatch):
    def refuse(*arguments, **options):
        raise RunError("Cannot load it. Expected a run. Received: none. Pass one.")

    monkeypatch.setattr(ray_engine, "Engine", refuse)
    with RayEngine(run, address="auto") as engine, pytest.raises(RunError, match=r"^Cannot load it. .*Pass one.$"):
        list(engine.predict(photos))


@pytest.mark.parametrize(
    ("machines", "options", "plan"),
    [
        ([{"CPU": 2}, {"CPU": 5}], {}, (3, 2, 0)),
        ([{"CPU": 64}, {"CPU": 16}, {"CPU": 0.5}], {}, (10, 8, 0)),
        ([{"CPU": 64}, {}], {"max_workers": 3}, (3, 8, 0)),
        ([{"CPU": 16, "GPU": 4}, {"CPU": 64}], {}, (4, 4, 1)),
        ([{"CPU": 16, "GPU": 4}], {"use_gpus": False}, (2, 8, 0)),
    ],
)
def test_workers_fit_the_machines(machines, options, plan):
    assert plan_workers([{"Alive": True, "Resources": machine} for machine in machines], **options) == plan


def test_what_cannot_work_is_said_before_anything_runs(call, ray, run, photos, monkeypatch):
    code, _, error = call("predict", run.path, photos, "--ray-workers", 2)
    assert code == 2 and "Expected --ray, whose workers --ray-workers limits" in error
    with pytest.raises(ConfigError, match=r"Received: max_workers=0"):
        RayEngine(run, max_workers=0)
    with pytest.raises(ConfigError, match=r"Received: precision='int8'"):
        RayEngine(run, precision="int8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"  # bound, and nobody listens
        for each in (address, f"ray://{address}"):
            with pytest.raises(ClusterError, match=rf"Cannot reach Ray. .* address='{each}': .*refused\. Pass"):
                RayEngine(run, address=each)
    assert ray.calls == []
    ray.nodes = lambda: [{"Alive": False, "Resources": {"CPU": 4}}, {"Alive": True, "Resources": {}}]
    with pytest.raises(ClusterError, match=r"machines with a core to compute on. Received: 2 machines without one"):
        RayEngine(run)
    assert ray.calls == ["auto", "shutdown"]
    ray.init = lambda *arguments, **options: (_ for _ in ()).throw(ConnectionError("Could not find  any.\n"))
    with pytest.raises(ClusterError, match=r"Received: address='auto': Could not find any\. Pass the address"):
        RayEngine(run)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"Expected the package ray\[data\].*vitreous\[ray\]"):
        RayEngine(run)


SCRIPT = """
import os, signal, subprocess, sys
import vitreous.ray_engine as ray_engine

run, photos, out = sys.argv[1:]
ray_engine._MAX_PART = 16
killed = []
def on_progress(done, total):
    if not killed:
        found = subprocess.run(["pgrep", "-f", "^ray::MapWorker"], capture_output=True, text=True).stdout.split()
        for pid in found:
            with open(f"/proc/{pid}/environ", "rb") as file:
                if f"VITREOUS_TEST_MARK={os.environ['VITREOUS_TEST_MARK']}".encode() in file.read():
                    os.kill(int(pid), signal.SIGKILL)
                    killed.append(pid)
with ray_engine.RayEngine(run, address="local") as engine, open(out, "w") as file:
    for prediction in engine.predict(photos, on_progress=on_progress, on_error=lambda *args: None):
        print(str(prediction.path).encode("utf-8", "surrogateescape"), prediction.probabilities, file=file)
assert killed
"""


@pytest.mark.skipif(os.environ.get("VITREOUS_TEST_RAY") != "1", reason="takes long; set VITREOUS_TEST_RAY=1")
def test_a_local_ray_answers_though_a_worker_is_killed(run, photos, tmp_path):
    many = tmp_path / "many"
    for i in range(12):
        shutil.copytree(photos, many / str(i))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(run.path), str(many), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "VITREOUS_TEST_MARK": tmp_path.name,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = [
        f"{str(p.path).encode('utf-8', 'surrogateescape')} {p.probabilities}"
        for p in Engine(run.path).predict(many, on_error=lambda *args: None)
    ]
    assert len(expected) == 12 * 70
    assert (tmp_path / "out").read_text().splitlines() == expected
    code = subprocess.run(
        [sys.executable, "-m", "vitreous", "predict", run.path, many, "--csv", "--ray", "local"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert code.returncode == 0, code.stderr
    assert len(list(csv.reader(code.stdout.splitlines()))) == 1 + 12 * 70
