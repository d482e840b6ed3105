"""Checkpoints, the folder of an unfinished run, and what is in them that should not be."""

import errno
import hashlib
import importlib.util
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import keras
import numpy as np
import pytest
from hostile import Trap

import vitreous
from vitreous.errors import ConfigError, MissingDependencyError, RunError, RunExistsError, WeightsError
from vitreous.training import checkpoint as module
from vitreous.training import sharded
from vitreous.training.checkpoint import Checkpoints, read_checkpoint, write_checkpoint
from vitreous.training.distribute import Layout
from vitreous.training.recipe import Interval, Recipe, parse_interval
from vitreous.training.run import RunWriter, load_model, load_run
from vitreous.training.sharded import ShardedCheckpoints, check_orbax, load_checkpoint, read_arrays

DATA = Path(__file__).parent / "data"
ARRAYS = {
    "model/0000/kernel": np.arange(6, dtype="float32").reshape(2, 3) / 7,
    "model/0001/seed": np.array([1, 2**32 - 1], "uint32"),
    "slots/0000/step": np.array(5.0, "float32"),
    "average/0000/none": np.zeros((0, 3), "float32"),
    "best/0000": np.array([-(2**40)], "int64"),
}
STATE = {"step": 3, "loss": 0.1 + 0.2, "rows": [{"val_loss": None}]}


def create(folder, said=None, **options):
    options = {"interval": Interval(steps=1), **options}
    return Checkpoints(folder, report=(said if said is not None else []).append, **options)


def save(checkpoints, step, arrays=ARRAYS):
    checkpoints.save({**STATE, "step": step}, arrays, num_steps=step)
    checkpoints.wait()


def test_what_is_read_is_what_was_written(tmp_path):
    write_checkpoint(tmp_path / "000001", STATE, ARRAYS, {"seed": 1})
    found = read_checkpoint(tmp_path / "000001")
    assert (found.state, found.config, list(found.arrays)) == (STATE, {"seed": 1}, list(ARRAYS))
    for name, array in ARRAYS.items():
        assert found.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(found.arrays[name], array)
    assert {path.name for path in tmp_path.rglob("*")} == {"000001", "checkpoint.json", "arrays.safetensors"}


def test_the_last_few_are_kept(tmp_path):
    checkpoints = create(tmp_path / "checkpoints", keep=2)
    assert checkpoints.load() is None
    for step in range(1, 5):
        save(checkpoints, step)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["000003", "000004"]
    assert checkpoints.load().state["step"] == 4
    (checkpoints.folder / ".000005.tmp").mkdir()  # as a kill leaves it
    assert checkpoints.load().state["step"] == 4
    save(checkpoints, 5)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["000004", "000005"]


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: flip(path / "arrays.safetensors", -2), r"arrays\.safetensors, whose checksum is another"),
        (lambda path: flip(path / "checkpoint.json", 90), r"checkpoint\.json"),
        (lambda path: os.truncate(path / "arrays.safetensors", 100), r"arrays\.safetensors of 100 bytes"),
        (lambda path: os.truncate(path / "checkpoint.json", 0), r"checkpoint\.json: it is damaged"),
        (lambda path: (path / "arrays.safetensors").unlink(), r"no file arrays\.safetensors"),
        (lambda path: (path / "checkpoint.json").unlink(), r"checkpoint\.json: No such file"),
    ],
)
def test_a_damaged_one_gives_way_to_the_one_before(tmp_path, damage, reason):
    said = []
    checkpoints = create(tmp_path, said)
    save(checkpoints, 1)
    save(checkpoints, 2)
    damage(tmp_path / "000002")
    assert checkpoints.load().state["step"] == 1
    assert len(said) == 1
    assert said[0].startswith(
        f"Cannot read the checkpoint {tmp_path / '000002'}. Expected the files that were written."
    )
    assert said[0].endswith("The checkpoint before it is taken.")
    assert re.search(reason, said[0])
    save(checkpoints, 3)  # the damaged one takes no whole one's place
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000001", "000003"]
    for path in tmp_path.iterdir():
        damage(path)
    with pytest.raises(RunError, match=r"Expected a whole checkpoint in .* Received: 2, all damaged\. Start anew with"):
        checkpoints.load()


def seal(path, content):
    """Writes a checkpoint.json whose checksum is right, as whoever means harm would."""
    path.mkdir(exist_ok=True)
    (path / "checkpoint.json").write_text(json.dumps({"sha256": module._digest(content), "content": content}))


def describe_file(path):
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def test_a_newer_format_is_refused(tmp_path):
    checkpoints = create(tmp_path)
    save(checkpoints, 1)
    seal(tmp_path / "000002", {"format": 99, "vitreous": "9.9"})
    with pytest.raises(RunError, match=r"Expected format 2 or older\. Received: format=99, written by vitreous 9\.9\."):
        checkpoints.load()


def test_hostile_checkpoints(tmp_path):
    outside = tmp_path / "outside.safetensors"
    module._write_arrays(outside, ARRAYS)
    path = tmp_path / "000001"
    base = {"format": 1, "state": {}, "config": {}}
    for name in ("../outside.safetensors", str(outside), "arrays/../../outside.safetensors", "code.pkl"):
        seal(path, {**base, "files": {name: describe_file(outside)}})
        with pytest.raises(RunError, match=r"a file called .*, which may lie anywhere"):
            read_checkpoint(path)
    (path / "arrays.safetensors").symlink_to(outside)
    seal(path, {**base, "files": {"arrays.safetensors": describe_file(outside)}})
    with pytest.raises(RunError, match=r"no file arrays\.safetensors"):
        read_checkpoint(path)
    (path / "arrays.safetensors").unlink()
    headers = {
        r"bomb of shape": {"bomb": {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 8]}},
        r"F128": {"bomb": {"dtype": "F128", "shape": [1], "data_offsets": [0, 8]}},
        r"bomb has shape": {"bomb": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}},
    }
    for reason, header in headers.items():
        text = json.dumps(header).encode()
        (path / "arrays.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
        seal(path, {**base, "files": {"arrays.safetensors": describe_file(path / "arrays.safetensors")}})
        with pytest.raises(RunError, match=reason):
            read_checkpoint(path)
    (path / "arrays.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}")
    seal(path, {**base, "files": {"arrays.safetensors": describe_file(path / "arrays.safetensors")}})
    with pytest.raises(RunError, match=r"a header of 1152921504606846976 bytes in a file of 10"):
        read_checkpoint(path)
    for content in ([], "text", {**base, "files": []}, {**base, "files": {"arrays.safetensors": 1}}, {"format": "1"}):
        seal(path, content)
        with pytest.raises(RunError, match=r"Cannot read the checkpoint"):
            read_checkpoint(path)
    (path / "checkpoint.json").write_text("[" * 100_000)
    with pytest.raises(RunError, match=r"checkpoint\.json: it is damaged"):
        read_checkpoint(path)


def test_a_state_that_is_no_number_any_more_is_not_kept(tmp_path):
    checkpoints = create(tmp_path)
    save(checkpoints, 1)
    save(checkpoints, 2, {**ARRAYS, "model/0000/kernel": np.array([np.nan], "float32")})
    assert checkpoints.load().state["step"] == 1


def test_a_full_disk_is_said_once_and_ends_nothing(tmp_path, monkeypatch):
    said = []
    checkpoints = create(tmp_path / "checkpoints", said)
    save(checkpoints, 1)
    real, code = os.fsync, errno.ENOSPC

    def fail(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    save(checkpoints, 2)
    save(checkpoints, 3)
    text = (
        f"Cannot write the checkpoint in {tmp_path}: No space left on device. Training goes on, its state is in memory"
    )
    assert len(said) == 1 and said[0].startswith(text)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["000001"]
    code = errno.EROFS
    save(checkpoints, 4)
    assert len(said) == 2 and "Read-only file system" in said[1]
    monkeypatch.setattr(os, "fsync", real)
    save(checkpoints, 5)
    assert said[2:] == ["The checkpoint can be written again."]
    assert checkpoints.load().state["step"] == 5


def test_on_a_disk_that_is_full(tmp_path):
    """A file system of 256 KiB: checkpoints of 100 KB fill it up, and what was saved before stays whole."""
    place = tmp_path / "small"
    place.mkdir()
    mount = shutil.which("mount")
    if (
        not mount
        or subprocess.run([mount, "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], capture_output=True).returncode
    ):
        pytest.skip("file systems cannot be mounted here")
    try:
        said = []
        checkpoints = create(place / "checkpoints", said, keep=3)
        for step in range(1, 6):
            save(checkpoints, step, {"model/0000/kernel": np.full(25_000, step, "float32")})
        assert len(said) == 1 and "No space left on device" in said[0]
        assert checkpoints.load().arrays["model/0000/kernel"][0] == 2
        assert not list(checkpoints.folder.glob(".*"))
        shutil.rmtree(checkpoints.folder / "000001")
        save(checkpoints, 6, {"model/0000/kernel": np.full(25_000, 6, "float32")})
        assert said[1:] == ["The checkpoint can be written again."]
        assert checkpoints.load().state["step"] == 6
    finally:
        subprocess.run(["umount", place], check=True)


def test_when_to_save(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    by_steps, by_time, never = (create(tmp_path, interval=parse_interval(x)) for x in ("20 steps", "90s", "none"))
    assert [by_steps.is_due(step) for step in (0, 19, 20, 41)] == [False, False, True, True]
    by_steps.start(20)
    assert [by_steps.is_due(step) for step in (20, 39, 40)] == [False, False, True]
    assert not by_time.is_due(10**6)
    now = 90.0
    assert by_time.is_due(1) and not never.is_due(10**6)
    for text in ("5", "0 steps", "0m", "often", "-3 steps"):
        with pytest.raises(
            ConfigError, match=r"Cannot read the interval\. .* Pass for example 5m, 90s, '200 steps' or"
        ):
            Recipe(checkpoint_every=text)
    with pytest.raises(ConfigError, match=r"Cannot use keep_checkpoints\. Expected at least 1"):
        Recipe(keep_checkpoints=0)
    with pytest.raises(ConfigError, match=r"Cannot go back to a saved state\. .* Received: checkpoint_every='none'"):
        Recipe(checkpoint_every="none", on_nan="back")


HOLD = """
import sys, time
from vitreous.training.run import RunWriter
writer = RunWriter(sys.argv[1])
print("here", flush=True)
time.sleep(99)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_two_processes_on_one_run(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE)
    assert other.stdout.readline()
    with pytest.raises(
        RunExistsError, match=rf"Expected no other process to write it\. Received: process {other.pid} on .*Wait for it"
    ):
        RunWriter(tmp_path / "run", overwrite=True, resume="never")
    other.send_signal(signal.SIGKILL)
    other.wait()
    writer = RunWriter(tmp_path / "run")
    with pytest.raises(RunExistsError, match=rf"Received: process {os.getpid()} on "):
        RunWriter(tmp_path / "run")
    assert writer.keep() is None  # there is nothing to resume from
    assert list(tmp_path.iterdir()) == []


def test_the_lock_on_windows(tmp_path, monkeypatch):
    """There, one byte beyond the text of the lock is locked, which leaves the text to be read by others."""
    held = set()

    def locking(descriptor, mode, count):
        place = (os.fstat(descriptor).st_ino, os.lseek(descriptor, 0, os.SEEK_CUR))
        assert (mode, count) == ("nonblocking", 1) and place[1] > 1000
        if place in held:
            raise PermissionError(13, "Permission denied")
        held.add(place)

    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK="nonblocking"))
    monkeypatch.setattr(sys, "platform", "win32")
    writer = RunWriter(tmp_path / "run")
    with pytest.raises(RunExistsError, match=rf"Received: process {os.getpid()} on .*, which does"):
        RunWriter(tmp_path / "run")
    assert (writer.folder / "lock").stat().st_size < 1000
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / ".run.partial").mkdir()
    (tmp_path / ".run.partial" / "mine.txt").write_text("keep me")
    with pytest.raises(RunExistsError, match=r"Expected .*\.run\.partial to be free, or to be an unfinished run\."):
        RunWriter(tmp_path / "run", resume="never")
    assert (tmp_path / ".run.partial" / "mine.txt").exists()


def test_a_finish_that_was_cut_short(tmp_path):
    """Killed between its renames, a finish loses neither the old run nor the new one, and leaves nothing for long."""
    out = tmp_path / "run"
    shutil.copytree(DATA / "run-0.1.0", out)
    writer = RunWriter(out, overwrite=True)
    save(create(writer.checkpoints), 1)
    shutil.copytree(out, writer.partial, dirs_exist_ok=True)
    os.rename(out, writer.folder / "old")
    writer._release()  # killed here
    writer = RunWriter(out, overwrite=True)
    assert load_run(out) and create(writer.checkpoints).load().state["step"] == 1
    shutil.copytree(out, writer.partial, dirs_exist_ok=True)
    os.rename(out, writer.folder / "old")
    os.rename(writer.partial, out)
    writer._release()  # killed here
    with pytest.raises(RunExistsError, match=r"where a run lies"):
        RunWriter(out)
    assert load_run(out) and [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_of_each_release_loads():
    """Made by `vitreous train noise --model vit_pico_patch2_8 --epochs 2 --checkpoint-every "2 steps"` with
    a model of 16 numbers a token; the checkpoint is the one after the last step.
    """
    for path in sorted(DATA.glob("run-*")):
        run = load_run(path)
        answers = np.load(path / "answers.npz")
        logits = np.asarray(run.load_model()(run.prepare(answers["images"])))
        np.testing.assert_allclose(logits, answers["logits"], atol=1e-5)
        assert run.config["versions"]["vitreous"] == path.name.removeprefix("run-")
        found = read_checkpoint(path / "checkpoint")
        assert found.state["loop"]["num_steps"] == run.metrics["num_steps"]
        average = [array for name, array in found.arrays.items() if name.startswith("average/")]
        assert sum(array.nbytes for array in average) > 1000
    assert path.name == f"run-{vitreous.__version__}"


def rewrite(path, source, change):
    """Writes a .keras with another description of what is in it."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, json.dumps(change(json.loads(content))) if name == "config.json" else content)
    return path


def test_hostile_models(tmp_path):
    """Whatever a .keras asks for, only a VisionTransformer that its bytes fill is built."""
    good = DATA / "run-0.1.0" / "model.keras"
    mark, path = tmp_path / "executed", tmp_path / "model.keras"
    lambda_layer = {
        "module": "keras.layers",
        "class_name": "Lambda",
        "config": {"name": "x", "function": {"class_name": "__lambda__", "config": {"code": "gASVAAAAAA=="}}},
        "registered_name": None,
    }
    system = {"module": "os", "class_name": "function", "config": "system", "registered_name": "system"}
    for hostile in (lambda_layer, system, {**system, "module": "builtins", "config": "eval"}):
        with pytest.raises(RunError, match=r"Expected a VisionTransformer\. Received: .*model\.keras, which holds a "):
            load_model(rewrite(path, good, lambda _, hostile=hostile: hostile))

    def set_dtype(config):
        argument = {"module": "os", "class_name": "function", "config": "system", "registered_name": "system"}
        config["config"]["dtype"] = {**argument, "config": {"command": f"touch {mark}"}}
        return config

    with pytest.raises(RunError, match=r"Cannot load a model\."):
        load_model(rewrite(path, good, set_dtype))
    for changes in ({"projection_dim": 2**20}, {"num_blocks": 2**30}, {"image_size": [2**14, 2**14]}):

        def grow(config, changes=changes):
            config["config"]["config"] |= changes
            return config

        with pytest.raises(RunError, match=r"which holds a model of \d+ tokens and \d+ weights in \d+ bytes"):
            load_model(rewrite(path, good, grow))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", " " * 2**25)
        archive.writestr("model.weights.h5", b"")
    with pytest.raises(RunError, match=r"which holds 33554432 bytes, packed into \d+"):
        load_model(path)
    path.write_bytes(pickle.dumps(Trap(mark)))
    with pytest.raises(RunError, match=r"Expected a whole \.keras file"):
        load_model(path)
    assert not mark.exists()


def test_npz_with_python_objects_is_refused(tmp_path):
    mark = tmp_path / "executed"
    buffer = io.BytesIO()
    np.save(buffer, np.array([Trap(mark)], object), allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "weights.npz", "w") as archive:
        archive.writestr("kernel.npy", buffer.getvalue())
    with pytest.raises(WeightsError, match=r"kernel holds pickled Python objects, which can run code"):
        vitreous.import_weights(tmp_path / "weights.npz", model="vit_tiny_patch16_224")
    assert not mark.exists()


needs_orbax = pytest.mark.skipif(
    os.environ["KERAS_BACKEND"] != "jax" or not importlib.util.find_spec("orbax"), reason="needs jax and Orbax"
)


def create_sharded(folder, said, **options):
    options = {"interval": Interval(steps=1), "layout": Layout(), **options}
    return ShardedCheckpoints(folder, report=said.append, **options)


def read_sharded(checkpoint):
    import jax

    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = read_arrays(checkpoint, dict.fromkeys(checkpoint.shapes, place), Layout())
    return {name: np.asarray(array) for name, array in found.items()}


def on_device(arrays):
    import jax

    return {name: jax.numpy.array(array) for name, array in arrays.items() if array.size and array.dtype != "int64"}


@needs_orbax
def test_sharded_checkpoints_of_one_device(tmp_path, monkeypatch):
    """What is read is what was written; names that may lie anywhere, other shapes and full disks are told."""
    said, arrays = [], on_device(ARRAYS)
    checkpoints = create_sharded(tmp_path / "saved", said)
    for step in range(1, 4):
        save(checkpoints, step, arrays)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["000002", "000003"]
    found = checkpoints.load()
    assert found.state["step"] == 3 and not found.arrays
    for name, array in read_sharded(found).items():
        assert array.dtype == arrays[name].dtype
        np.testing.assert_array_equal(array, arrays[name])
    path, content = found.path, json.loads((found.path / "checkpoint.json").read_text())["content"]
    assert content["format"] == 2
    for name in ("arrays/../../outside", "/etc/passwd", "arrays/d/../x", "arrays.safetensors", "arrays/d/code.pkl"):
        seal(path, {**content, "files": {name: {"size": 1, "sha256": ""}}})
        with pytest.raises(RunError, match=r"a file called .*, which may lie anywhere"):
            read_checkpoint(path)
    for shapes in (None, {}, [1], {"model/0000/kernel": ["2", 3]}, {"model/0000/kernel": 6}):
        seal(path, {**content, "arrays": shapes})
        with pytest.raises(RunError, match=r"checkpoint\.json without the shapes of the arrays"):
            read_checkpoint(path)
    seal(path, {**content, "arrays": {**content["arrays"], "model/0000/kernel": [2**20, 2**20]}})
    with pytest.raises(RunError, match=r"Received: model/0000/kernel of shape \[2, 3\] in parts of \[2, 3\]"):
        read_sharded(read_checkpoint(path))
    seal(path, content)
    extra = path / "arrays" / "d" / "00"
    extra.write_bytes(b"1")
    with pytest.raises(RunError, match=r"'arrays/d/00', which checkpoint\.json does not name"):
        read_checkpoint(path)
    extra.unlink()
    lost = SimpleNamespace(restore=Mock(side_effect=Exception("Encountered error while reading array index")))
    with monkeypatch.context() as patch:  # as Orbax says that a part is not there
        patch.setattr(sharded, "_handler", lambda _: lost)
        with pytest.raises(RunError, match=r"Expected the arrays that checkpoint\.json names\..*Remove that folder"):
            read_sharded(read_checkpoint(path))
    folder = path / "arrays" / "ocdbt.process_0"
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert checkpoints.load().state["step"] == 2  # a link may lead anywhere
    assert len(said) == 1 and "no file arrays/ocdbt.process_0/" in said[0]

    def fail(*_):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device [os_error_code='28']")

    monkeypatch.setattr(sharded, "_handler", lambda _: SimpleNamespace(save=lambda *_, **__: fail()))
    save(checkpoints, 4, arrays)
    assert len(said) == 2 and "Cannot write the checkpoint in" in said[1] and "No space left on device" in said[1]
    assert not list(checkpoints.folder.glob(".*"))


def test_what_sharded_checkpoints_need(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with pytest.raises(ConfigError, match=r"sharded checkpoints with the torch backend\. Expected jax.*Pass --backend"):
        check_orbax()
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(MissingDependencyError, match=r"Sharded checkpoints cannot be used.*'vitreous\[orbax\]'"):
        check_orbax()


class Two:
    """What two processes tell each other, seen from one of them, whose other one answers as it is told to."""

    num_processes = 2

    def __init__(self, index, other):
        self.process_index, self.is_first, self.other = index, index == 0, other

    def share(self, value):
        return value

    def agree_all(self, flag):
        return flag

    def forget_all(self):
        pass

    def gather_values(self, value):
        return [value, self.other]


@needs_orbax
def test_a_process_that_cannot_write_makes_no_checkpoint(tmp_path):
    said, arrays = [], on_device(ARRAYS)
    layout = Two(0, [{}, "No space left on device"])
    checkpoints = create_sharded(tmp_path / "saved", said, layout=layout)
    checkpoints.save(STATE, arrays, num_steps=1)
    assert checkpoints.is_writing and not checkpoints.is_due(5)
    checkpoints.finish()
    checkpoints.wait()
    assert len(said) == 1 and "process 1: No space left on device. Training goes on" in said[0]
    assert not list(checkpoints.folder.iterdir())
    layout.other = [{"arrays/ocdbt.process_1/d/00": {"size": 1, "sha256": ""}}, None]
    save_both(checkpoints, arrays)
    assert "arrays/ocdbt.process_1/d/00 is not seen by the first process" in said[1]
    layout.other = [{}, None]
    save_both(checkpoints, arrays)
    assert said[2:] == ["The checkpoint can be written again."]
    assert [path.name for path in checkpoints.folder.iterdir()] == ["000001"]
    layout.other = False
    with pytest.raises(ConfigError, match=r"Expected a file system that all of them share\. Received: process 1 does"):
        load_checkpoint(checkpoints, layout)


def save_both(checkpoints, arrays):
    checkpoints.save(STATE, arrays, num_steps=1)
    checkpoints.finish()
    checkpoints.wait()
