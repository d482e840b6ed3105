"""Several devices and several processes train as one does. Both are simulated here: XLA cuts this CPU into devices."""

import contextlib
import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import keras
import numpy as np
import pytest
from run_folder import write_noise

import vitreous
from vitreous.errors import (
    ConfigError,
    DataError,
    MissingDependencyError,
    RunError,
    RunExistsError,
    TrainingError,
)
from vitreous.model import create_predict_function
from vitreous.training import ray_workers
from vitreous.training.devices import DistributionConfig
from vitreous.training.distribute import Layout, create_layout, join_processes
from vitreous.training.fit import Interrupt, Terminated, _Loop
from vitreous.training.planning import identity_of
from vitreous.training.progress import Reporter
from vitreous.training.ray_workers import train_on_ray

pytestmark = pytest.mark.usefixtures("runs_without_pictures")
OPTIONS = {
    "model": "vit_pico_patch2_8",
    "image_size": [8, 8],
    "batch_size": 8,
    "epochs": 4,
    "architecture": {
        "num_blocks": 1,
        "projection_dim": 32,
        "num_heads": 4,
        "mlp_dim": 64,
        "stochastic_depth_rate": 0.2,
        "dropout_rate": 0.1,
    },
    "checkpoint_every": "2 steps",
}
PRELUDE = """
import json, sys, time
from pathlib import Path
import numpy as np
import vitreous
from vitreous.training import results, trainer

for name in ("draw_augmentation", "draw_run"):
    setattr(trainer, name, lambda *_, **__: None)
results._draw_answers = lambda *_: None
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
OPTIONS = json.loads(sys.argv[3])
"""
needs_jax = pytest.mark.skipif(os.environ["KERAS_BACKEND"] != "jax", reason="only jax has several devices")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_noise(tmp_path_factory.mktemp("noise"), 35)


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    return vitreous.train(folder, out=tmp_path_factory.mktemp("runs") / "alone", **OPTIONS)


def start(code, *arguments, num_devices=1):
    """Starts a Python process that sees so many devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={num_devices}"
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code, *map(str, arguments)],
        env={**os.environ, "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, code=0):
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, err[-3000:]
    return out, err


def numbers(run):
    with (run.path / "history.csv").open() as file:
        return [
            [float(row[name]) for name in ("step", "train_loss", "train_accuracy", "val_loss", "val_accuracy")]
            for row in csv.DictReader(file)
        ]


def assert_alike(run, other):
    """The same curves and answers but for the order in which sums are added.

    Weights need not be: a bias of keys has no influence, so that AdamW makes steps of rounding with it.
    """
    np.testing.assert_allclose(numbers(run), numbers(other), atol=1e-5)
    images = np.random.default_rng(1).integers(0, 256, (8, 8, 8, 3)).astype("uint8")
    answers, others = (create_predict_function(each.load_model(), each.input_spec)(images) for each in (run, other))
    np.testing.assert_allclose(answers, others, atol=1e-4)
    assert np.ptp(others) > 0.01
    assert run.metrics["num_images_seen"] == other.metrics["num_images_seen"]


STEPS = """
import random
from vitreous.data import Batch
from vitreous.model import VisionTransformer
from vitreous.spec import InputSpec, ViTConfig
from vitreous.training.distribute import create_layout
from vitreous.training.losses import Loss
from vitreous.training.optimizer import create_optimizer
from vitreous.training.recipe import OptimizerConfig
from vitreous.training.step import create_step

def train(num_devices, parallel, num_parts=1):
    random.seed(0)
    config = ViTConfig(
        image_size=8, patch_size=4, projection_dim=32, num_heads=4, num_blocks=1, num_classes=3
    )
    model, average = VisionTransformer(config), VisionTransformer(config)
    step = create_step(
        model, average, create_optimizer(model, OptimizerConfig()), input_spec=InputSpec(image_size=8),
        loss=Loss(num_classes=3), num_parts=num_parts, layout=create_layout(num_devices, parallel),
    )
    losses = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        images, labels = rng.integers(0, 255, (16, 8, 8, 3), "uint8"), rng.integers(0, 3, 16).astype("int32")
        batch = Batch(images, labels, rng.random(16) < 0.8, np.arange(16))
        losses.append(float(step(batch, learning_rate=1e-3, decay=0.9)[0]))
    (kernel,) = [
        array for array, variable in zip(step.state[0], model.trainable_variables) if "hidden/kernel" in variable.path
    ]
    held = max(shard.data.size for shard in kernel.addressable_shards) / kernel.size
    step.finish()
    return {"losses": losses, "held": held, "weights": [float(np.abs(w).sum()) for w in average.get_weights()]}

found = {"one": train(1, None), "data": train(4, "data", 2)}
print(json.dumps(found | {name: train(4, name) for name in ("fsdp", "tensor")}))
"""
CRASH = """
from vitreous.errors import ConfigError
from vitreous.training.progress import Reporter

class Crash(Reporter):
    def row(self, row):
        while list(out.parent.glob(".sharded.partial/checkpoints/.*")):  # there is more than one at the end
            time.sleep(0.01)
        if row["epoch"] == 2:
            raise RuntimeError("crash")

for impossible in (
    lambda: create_layout(5),
    lambda: create_layout("all").check_batch(6, 1),
    lambda: create_layout(4, "tensor").spec("block_0/mlp/hidden/kernel", (32, 66)),
):
    try:
        impossible()
    except ConfigError as error:
        print(error)
for place, kind in ((out, None), (out.with_name("sharded"), "sharded")):
    try:
        vitreous.train(folder, out=place, devices=4, parallel="fsdp", checkpoints=kind, reporter=Crash(), **OPTIONS)
    except RuntimeError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def four(folder, tmp_path_factory):
    """What a process with four devices says, line by line, and the run that it has not finished."""
    out = tmp_path_factory.mktemp("four") / "run"
    process = start(STEPS + CRASH, folder, out, json.dumps(OPTIONS), num_devices=4)
    return finish(process)[0].splitlines(), out


@needs_jax
def test_four_devices_compute_what_one_does(four):
    """Loss curves with a mask, in one part or two; each matrix lies where it should."""
    found = json.loads(four[0][0])
    for name in ("data", "fsdp", "tensor"):
        np.testing.assert_allclose(found[name]["losses"], found["one"]["losses"], atol=1e-5, err_msg=name)
        np.testing.assert_allclose(found[name]["weights"], found["one"]["weights"], atol=1e-3, err_msg=name)
    assert [found[name]["held"] for name in ("one", "data", "fsdp", "tensor")] == [1, 1, 0.25, 0.25]
    assert max(found["one"]["losses"]) - min(found["one"]["losses"]) > 1e-3


@needs_jax
def test_a_run_of_four_devices_goes_on_on_one(folder, alone, four):
    (_, *refused, first, last), out = four
    assert first == last == "crash"
    assert refused == [
        "Cannot train on 5 devices. Expected from 1 to 4, which jax sees (cpu). Received: devices=5. Pass fewer; with "
        "XLA_FLAGS=--xla_force_host_platform_device_count=N a CPU passes for N devices.",
        "Cannot share a batch among 4 devices. Expected a multiple of 4. Received: batch_size=6. "
        "Pass --batch-size 4, or another number of devices.",
        "Cannot share block_0/mlp/hidden/kernel among 4 devices. Expected a width that 4 divides. "
        "Received: shape=(32, 66). Pass --parallel fsdp or data, or fewer devices.",
    ]
    said = []
    reporter = vitreous.training.progress.Reporter()
    reporter.note = reporter.warn = said.append
    run = vitreous.train(folder, out=out, reporter=reporter, **OPTIONS)
    assert_alike(run, alone)
    assert any(line.startswith("Resumed  at step") for line in said)
    assert any("The run was begun on other devices (parallel fsdp, now None; num_devices 4" in line for line in said)
    assert "distribution" not in run.config


RESUME = """
import dataclasses
import shutil
from vitreous.training import fit

measure = fit._Loop.measure
fit._Loop.measure = lambda self, evaluate: dataclasses.replace(measure(self, evaluate), score=(-len(self.state.rows),))
run = vitreous.train(folder, out=out.with_name("best-first"), devices=2, **{**OPTIONS, "epochs": 2})
assert (run.path / "best.keras").is_file()
fit._Loop.measure = measure

for parallel, kind in (("fsdp", "sharded"), ("data", None)):
    place = out.with_name(f"on-{parallel}")
    shutil.copytree(out.with_name(".sharded.partial"), place.with_name(f".{place.name}.partial"))
    vitreous.train(folder, out=place, devices=2, parallel=parallel, checkpoints=kind, **OPTIONS)
"""


@needs_jax
def test_sharded_checkpoints_of_four_devices_go_on_anywhere(folder, alone, four, tmp_path):
    """On two devices, cut otherwise and not at all; and on one, from the one before the last, which is damaged."""
    pytest.importorskip("orbax.checkpoint")
    _, out = four
    partial = out.with_name(".sharded.partial")
    places = sorted((partial / "checkpoints").iterdir())
    assert [path.name for path in places[-1].iterdir() if path.suffix] == ["checkpoint.json"]
    process = start(RESUME, folder, out, json.dumps(OPTIONS), num_devices=2)
    shutil.copytree(partial, tmp_path / ".run.partial")
    newest = tmp_path / ".run.partial" / "checkpoints" / places[-1].name
    file = max((newest / "arrays").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    said = []
    reporter = Reporter()
    reporter.note = reporter.warn = said.append
    run = vitreous.train(folder, out=tmp_path / "run", reporter=reporter, **OPTIONS)
    assert_alike(run, alone)
    assert sum(f"{file.name}, whose checksum is another" in line for line in said) == 1
    assert any(line.endswith(f"from {newest.with_name(places[-2].name)}") for line in said)
    finish(process)
    for name in ("on-fsdp", "on-data"):
        assert_alike(vitreous.load_run(out.with_name(name)), alone)


PROCESSES = """
from vitreous.errors import ConfigError
from vitreous.training.distribute import join_processes

address, index = sys.argv[4], int(sys.argv[5])
said = []  # in a file: Gloo prints to standard output, in the midst of lines too
join_processes(address, num_processes=2, process_id=index)
for changes in ({"seed": index}, {"time": "5s", "epochs": None}, {"devices": 1}):
    try:
        vitreous.train(folder, out=out, **{**OPTIONS, **changes})
    except ConfigError as error:
        said.append(str(error))
run = vitreous.train(folder, out=out, **OPTIONS)
said.append(f"{run.path} {sorted(run.metrics)[-1:]} {run.config['distribution']}")
Path(sys.argv[6]).write_text(json.dumps(said))
"""


@needs_jax
def test_two_processes_train_as_one(folder, alone, tmp_path):
    """Each has two devices, and makes its half of each batch; the last batch of an evaluation is not full."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        address = f"localhost:{listener.getsockname()[1]}"
    out = tmp_path / "run"
    arguments = (folder, out, json.dumps(OPTIONS), address)
    said = [tmp_path / f"said-{index}.json" for index in range(2)]
    processes = [start(PROCESSES, *arguments, index, said[index], num_devices=2) for index in range(2)]
    for process, file, last in zip(processes, said, ("['val']", "[]"), strict=True):
        finish(process)
        *refused, told = json.loads(file.read_text())
        assert refused == [
            "Cannot train in 2 processes. Expected the same data, options and versions in all. Received: process 1 "
            "differs from process 0 in seed, data (fingerprint). Start all with the same command on the same data.",
            "Cannot train for a time in 2 processes. Expected epochs: the learning rate would follow the clock of "
            "each. Received: time='5s'. Pass --epochs.",
            "Cannot choose devices in 2 processes. Expected all of each process, 2 in this one. Received: devices=1. "
            "Leave --devices out; CUDA_VISIBLE_DEVICES hides devices.",
        ]
        assert told == f"{out} {last} {{'parallel': 'data', 'num_devices': 4, 'num_processes': 2}}"
    run = vitreous.load_run(out)
    assert_alike(run, alone)
    assert {path.name for path in tmp_path.iterdir()} == {"run", *(file.name for file in said)}


TERMINATED = """
from vitreous.training.distribute import join_processes

join_processes(sys.argv[4], num_processes=2, process_id=int(sys.argv[5]))
vitreous.train(folder, out=out, parallel="fsdp", checkpoints="sharded", **{**OPTIONS, "epochs": int(sys.argv[6])})
"""


def start_two(code, folder, out, options, *arguments):
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        address = f"localhost:{listener.getsockname()[1]}"
    return [start(code, folder, out, json.dumps(options), address, index, *arguments) for index in range(2)]


@needs_jax
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_sigterm_to_one_of_two_processes_that_save_sharded_ends_both(folder, tmp_path):
    """Each has written its part of each matrix; one process goes on from there."""
    pytest.importorskip("orbax.checkpoint")
    out, saved = tmp_path / "run", tmp_path / ".run.partial" / "checkpoints"
    processes = start_two(TERMINATED, folder, out, OPTIONS, 2000)
    while not list(saved.glob("0*")) and all(process.poll() is None for process in processes):
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    for process in processes:
        finish(process, 143)
    newest = max(saved.iterdir())
    content = json.loads((newest / "checkpoint.json").read_text())["content"]
    assert set(content["files"]) == {
        path.relative_to(newest).as_posix() for path in (newest / "arrays").rglob("*") if path.is_file()
    }
    parts = [sum(file.stat().st_size for file in newest.glob(f"arrays/ocdbt.process_{i}/d/*")) for i in range(2)]
    num_bytes = 4 * sum(int(np.prod(shape)) for shape in content["arrays"].values())
    assert min(parts) > 0.4 * num_bytes and sum(parts) < 1.8 * num_bytes, (parts, num_bytes)  # with Orbax's own trees
    said = []
    reporter = Reporter()
    reporter.note = said.append

    def stop(_):
        reporter.step = reporter.row = lambda _: None  # a second Ctrl-C would not wait
        signal.raise_signal(signal.SIGINT)

    reporter.step = reporter.row = stop
    run = vitreous.train(folder, out=out, reporter=reporter, **{**OPTIONS, "epochs": 2000})
    step = content["state"]["loop"]["num_steps"]
    assert any(line.startswith(f"Resumed  at step {step:,}, ") for line in said)
    assert run.metrics["is_interrupted"] and run.metrics["num_steps"] > step


@pytest.mark.parametrize(("error", "leaves"), [(OSError("the disk is gone"), True), (Terminated(), False)])
def test_a_process_that_fails_alone_does_not_wait(monkeypatch, error, leaves):
    at_exit = []
    monkeypatch.setattr("vitreous.training.distribute.atexit.register", at_exit.append)
    layout = Layout()
    layout.num_processes = 2
    layout.gather_values = lambda value: [value, value]
    with pytest.raises(type(error)), layout.together():
        layout.meet({})
        raise error
    assert [function.__name__ for function in at_exit] == ["_leave"] * leaves


def test_processes_compare_what_they_start_from():
    """Other weights or another kind of checkpoints are refused; SIGTERM before training ends all."""
    versions = dict.fromkeys(("vitreous", "keras", "backend", "policy"), "1")
    config = {"seed": 0, "model": {}, "recipe": {}, "data": {"fingerprint": ""}, "versions": versions}
    weights = [np.ones((2, 3), "float32"), np.zeros((), "float32")]
    layout, mine = Layout(), identity_of(config, weights=weights)
    layout.num_processes = 2
    for other, name in (
        (identity_of(config, weights=[weights[0] * 2, weights[1]]), "the weights to start from"),
        (identity_of(config), "the weights to start from"),
        (identity_of(config, weights=weights, checkpoints="sharded"), "the kind of checkpoints"),
    ):
        layout.gather_values = lambda value, other=other: [value, {"identity": other}]
        with pytest.raises(ConfigError, match=rf"process 1 differs from process 0 in {name}\."):
            layout.meet(mine)
    layout.gather_values = lambda value: [value, {"identity": identity_of(config, weights=weights)}]
    layout.meet(mine)
    told = []
    layout.gather_values = lambda value: told.append(value) or [value, value]
    with pytest.raises(Terminated), layout.together():
        raise Terminated
    layout.gather_values = lambda value: [value, told[0]]
    with pytest.raises(SystemExit) as stop:
        layout.meet(mine)
    assert stop.value.code == 143


def test_other_backends_train_on_one_device(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    assert not create_layout().is_spread and not create_layout(1).is_spread
    with pytest.raises(ConfigError) as error:
        create_layout("all", "fsdp")
    assert str(error.value) == (
        "Cannot train on several devices with the torch backend. Expected jax, the only one of these that Keras "
        "spreads over devices. Received: backend='torch', devices='all', parallel='fsdp'. Pass --backend jax."
    )
    with pytest.raises(ConfigError, match=r"several processes with the torch backend\. Expected jax"):
        monkeypatch.setenv("KERAS_BACKEND", "torch")
        join_processes("localhost:1", num_processes=2, process_id=0)


def test_only_the_process_that_writes_checkpoints_asks_for_them():
    """Another one never writes any: its own would be due again and again."""
    asked = []
    layout = Layout()
    layout.agree = lambda *flags: asked.append(flags) or (True, False, False)
    for index in range(2):
        layout.process_index = index
        loop = _Loop(
            SimpleNamespace(),
            SimpleNamespace(stream=lambda: None),
            config=None,
            evaluate=None,
            total_steps=4,
            budget_seconds=None,
            patience_epochs=None,
            has_answers=True,
            reporter=Reporter(),
            interrupt=Interrupt(),
            on_row=None,
            checkpoints=SimpleNamespace(is_due=lambda num_steps: True, is_sharded=False, proceed=lambda: None),
            on_nan="stop",
            layout=layout,
        )
        with pytest.raises(Terminated):
            loop.advance()
    assert asked == [(False, False, True), (False, False, False)]


@needs_jax
def test_plain_addresses_leave_a_process_all_its_devices(monkeypatch):
    import jax

    told = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: told.update(options))
    join_processes("localhost:1", num_processes=2, process_id=1)
    assert told["cluster_detection_method"] == "deactivate" and told["coordinator_address"] == "localhost:1"
    told.clear()
    join_processes("auto")
    assert not {"cluster_detection_method", "coordinator_address"} & set(told)


def test_a_run_of_several_devices_resumes_on_one(monkeypatch):
    call = {"task": "train", "data": "digits", "devices": 4, "parallel": "fsdp"}
    monkeypatch.setattr(sys.modules["vitreous.training.resume"], "read_call", lambda path: dict(call))
    monkeypatch.setattr("vitreous.training.trainer.train", lambda **arguments: arguments)
    found = vitreous.resume("run", devices=2)
    assert (found["devices"], found["parallel"]) == (2, "fsdp")
    found = vitreous.resume("run", devices=1)
    assert found["devices"] == 1 and "parallel" not in found


@needs_jax
def test_one_device_shares_nothing():
    with pytest.raises(ConfigError) as error:
        create_layout(None, "fsdp")
    assert (
        "Cannot train with parallel='fsdp'. Expected several devices to share the work. Received: devices=None, 1 seen"
        in str(error.value)
    )
    layout = Layout()
    assert layout.agree(True, False) == (True, False)
    assert layout.share([1]) == [1] and layout.gather_values("a") == ["a"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"num_workers": 2},
            "Expected the address of a Ray cluster beside them. Received: num_workers=2. Pass --ray auto",
        ),
        ({"ray": "auto", "num_workers": 0}, "Cannot use num_workers. Expected 1 or more. Received: num_workers=0."),
        ({"ray": "auto", "process_id": 1}, "Expected no addresses of processes beside --ray"),
        ({"parallel": "both"}, "Cannot use parallel. Expected 'data', 'fsdp' or 'tensor', or None. Received"),
        ({"devices": "some"}, "Cannot use devices. Expected an integer, or 'all', or None"),
    ],
)
def test_options_that_cannot_work(values, message):
    with pytest.raises(ConfigError) as error:
        DistributionConfig(**values)
    assert message in str(error.value)
    if values.keys() <= {"devices", "parallel"}:
        with pytest.raises(ConfigError) as error:
            create_layout(**values)
        assert message in str(error.value)


def test_what_several_devices_are():
    assert not DistributionConfig().is_several and not DistributionConfig(devices=1).is_several
    assert DistributionConfig(devices=2).is_several
    assert DistributionConfig(devices=1, coordinator="auto").is_several  # a device for each process


@pytest.mark.parametrize(
    "arguments",
    [
        {"coordinator": "localhost"},
        {"coordinator": "localhost:80", "num_processes": 2},
        {"coordinator": "localhost:80", "num_processes": 2, "process_id": 2},
        {"coordinator": "auto", "process_id": 0},
        {"num_processes": 2, "process_id": 0},
    ],
)
def test_addresses_that_cannot_work(arguments):
    with pytest.raises(
        ConfigError, match=r"Cannot train in several processes\. Expected .*Received: coordinator=.*Pass"
    ):
        join_processes(arguments.pop("coordinator", None), **arguments)


def test_ray_needs_a_place_for_the_run(monkeypatch, folder):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ray", None)
        with pytest.raises(
            MissingDependencyError, match=r"Training on Ray cannot be used\. .* pip install 'vitreous\[ray"
        ):
            train_on_ray("train", folder, DistributionConfig(ray="local"))
    pytest.importorskip("ray")
    with pytest.raises(ConfigError, match=r"Expected the path of the run.*Pass --out, on a file system"):
        train_on_ray("train", folder, DistributionConfig(ray="local"))


@pytest.mark.parametrize("error", [ConfigError("no such option"), DataError("no images"), TrainingError("diverged")])
def test_what_ray_need_not_repeat_is_said_once(monkeypatch, tmp_path, error):
    """Worker 0 hears what worker 1 was refused for; a disk or a lock may be free the next time."""
    worker = SimpleNamespace(get_world_rank=lambda: worker.rank)
    ray_train = SimpleNamespace(get_context=lambda: worker)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(train=ray_train))
    monkeypatch.setitem(sys.modules, "ray.train", ray_train)

    def work(rank, raised):
        worker.rank = rank
        with monkeypatch.context() as patch:
            patch.setattr(ray_workers, "_train_in_worker", Mock(side_effect=raised))
            ray_workers._work({"storage": str(tmp_path / "storage")})

    ray_workers._raise_refusal(tmp_path / "storage")
    heard = TrainingError("process 1 says: this")
    heard.is_of_all = error.is_of_all = True
    work(0, heard)
    work(1, error)
    with pytest.raises(TrainingError) as told:
        ray_workers._raise_refusal(tmp_path / "storage")
    assert str(told.value) == ("process 1 says: this" if isinstance(error, TrainingError) else str(error))
    work(0, None)
    work(1, None)
    ray_workers._raise_refusal(tmp_path / "storage")  # of an attempt before: nothing is refused any more
    alone = DataError("an image of one worker alone")
    for raised in (RunError("the disk is full"), RunExistsError("another process writes it"), OSError("gone"), alone):
        with pytest.raises(type(raised), match=str(raised)):
            work(0, raised)


def test_command_line_refuses_what_ray_cannot(call, folder, tmp_path):
    code, _, err = call("train", folder, "--ray", "local", "--folds", 3, "--out", tmp_path / "run")
    assert code == 2 and "Cannot train on Ray. Expected no --folds beside --ray." in err
    code, _, err = call("train", folder, "--num-processes", 2, "--out", tmp_path / "run")
    assert code == 2 and "Pass --coordinator HOST:PORT --num-processes N --process-id I" in err
    code, _, err = call("train", folder, "--ray", "local", "--backend", "torch", "--out", tmp_path / "run")
    assert code == 2 and "Cannot train on Ray with the torch backend. Expected jax" in err
    assert not list(Path(tmp_path).iterdir())


@pytest.mark.skipif("VITREOUS_TEST_RAY" not in os.environ, reason="takes minutes: VITREOUS_TEST_RAY=1 runs it")
def test_a_worker_that_is_killed_under_ray_takes_nothing_along(folder, tmp_path):
    pytest.importorskip("ray")
    options = {**OPTIONS, "epochs": 60}
    alone = vitreous.train(folder, out=tmp_path / "alone", **options)
    words = ["--model", options["model"], "--image-size", "8", "--batch-size", "8", "--epochs", "60", "--no-report"]
    for name, value in options["architecture"].items():
        words += [f"--architecture.{name.replace('_', '-')}", str(value)]
    words += ["--checkpoint-every", "20 steps", "--ray", "local", "--num-workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "vitreous", "train", str(folder), "--out", str(tmp_path / "run"), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

    def is_ours(pid):
        while pid > 1 and pid != process.pid:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])  # the parent
        return pid == process.pid

    def workers():
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if b"RayTrainWorker" in (path / "cmdline").read_bytes() and is_ours(int(path.name)):
                    yield int(path.name)

    while process.poll() is None and not list((tmp_path / ".run.partial" / "checkpoints").glob("0*")):
        time.sleep(0.1)
    os.kill(max(workers()), signal.SIGKILL)
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0 and "Resumed  at step" in said, said[-3000:]
    assert_alike(vitreous.load_run(tmp_path / "run"), alone)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "run"]
