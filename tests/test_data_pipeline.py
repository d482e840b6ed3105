import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from vitreous.data import pipeline
from vitreous.data.image_set import ImageSet
from vitreous.data.images import resize_image
from vitreous.data.pipeline import Loader
from vitreous.errors import ConfigError
from vitreous.spec import AugmentConfig, InputSpec

pytestmark = pytest.mark.usefixtures("threads_side_by_side")

SPEC = InputSpec(image_size=12)
AUGMENT = AugmentConfig(colour_jitter=0.2)


def images_in_memory(count=37):
    arrays = np.random.default_rng(0).integers(0, 256, (count, 14, 16, 3), dtype="uint8")
    return ImageSet([f"memory/{i}" for i in range(count)], np.arange(count) % 5, arrays=arrays)


def images_on_disk(folder, count=37):
    memory = images_in_memory(count)
    for i in range(count):
        Image.fromarray(memory.load(i)).save(folder / f"{i}.png")
    return ImageSet([f"{i}.png" for i in range(count)], memory.labels, root=folder)


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("vitreous-loader")]


def assert_equal(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        for field in ("images", "labels", "mask", "indices"):
            assert np.array_equal(getattr(a, field), getattr(b, field)), field


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not loader_threads()


def test_batches_for_evaluation():
    images = images_in_memory()
    loader = Loader(images, SPEC, batch_size=16)
    batches = list(loader.epoch(0))
    assert loader.num_batches == len(batches) == 3
    for batch in batches:
        assert batch.images.shape == (16, 12, 12, 3) and batch.images.dtype == np.uint8
        assert batch.labels.dtype == np.int32 and batch.mask.dtype == bool and batch.indices.dtype == np.int64
    indices = np.concatenate([batch.indices for batch in batches])
    assert indices.tolist() == [*range(37), *[-1] * 11]
    assert np.concatenate([batch.mask for batch in batches]).tolist() == [True] * 37 + [False] * 11
    last = batches[-1]
    assert not last.images[5:].any() and not last.labels[5:].any()
    assert last.labels[:5].tolist() == images.labels[32:].tolist()
    for batch in batches:
        for row in np.flatnonzero(batch.mask):
            assert np.array_equal(batch.images[row], resize_image(images.load(batch.indices[row]), SPEC))


def test_drop_last():
    loader = Loader(images_in_memory(), SPEC, batch_size=16, drop_last=True)
    batches = list(loader.epoch(0))
    assert loader.num_batches == len(batches) == 2
    assert all(batch.mask.all() for batch in batches)


def test_order_depends_on_seed_and_epoch():
    images = images_in_memory()
    orders = [
        Loader(images, SPEC, batch_size=8, shuffle=True, seed=seed).order(epoch).tolist()
        for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))
    ]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == list(range(37)) for order in orders)
    assert Loader(images, SPEC, batch_size=8).order(3).tolist() == list(range(37))


@pytest.mark.parametrize("num_workers", [1, 2, 5])
@pytest.mark.parametrize("batch_size", [3, 16, 40])
def test_batches_do_not_depend_on_the_workers(tmp_path, num_workers, batch_size):
    images = images_on_disk(tmp_path)
    options = {"batch_size": batch_size, "augment": AUGMENT, "shuffle": True, "seed": 5}
    alone = Loader(images, SPEC, num_workers=0, **options)
    threaded = Loader(images, SPEC, num_workers=num_workers, **options)
    for epoch in range(3):  # from the second on, from memory
        assert_equal(list(alone.epoch(epoch)), list(threaded.epoch(epoch)))


def test_pixels_depend_on_seed_epoch_and_index_alone():
    images = images_in_memory()

    def pixels(seed, epoch, batch_size=16, shuffle=True):
        loader = Loader(images, SPEC, batch_size=batch_size, augment=AUGMENT, shuffle=shuffle, seed=seed)
        return {
            int(index): batch.images[row].tobytes()
            for batch in loader.epoch(epoch)
            for row, index in enumerate(batch.indices)
            if index >= 0
        }

    first = pixels(0, 0)
    assert first == pixels(0, 0, batch_size=5, shuffle=False)
    for other in (pixels(1, 0), pixels(0, 1)):
        assert sum(first[index] != other[index] for index in first) > 30


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("start_batch", [0, 1, 4, 5])
def test_resume_in_the_middle_of_an_epoch(num_workers, start_batch):
    options = {"batch_size": 8, "augment": AUGMENT, "shuffle": True, "num_workers": num_workers}
    whole = list(Loader(images_in_memory(), SPEC, **options).epoch(2))
    rest = list(Loader(images_in_memory(), SPEC, **options).epoch(2, start_batch=start_batch))
    assert_equal(whole[start_batch:], rest)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("augment", [None, AUGMENT])
def test_a_broken_file_in_the_middle(tmp_path, num_workers, augment):
    images = images_on_disk(tmp_path, 20)
    whole = list(Loader(images, SPEC, batch_size=8, augment=augment, num_workers=0).epoch(0))
    (tmp_path / "9.png").write_bytes((tmp_path / "9.png").read_bytes()[:80])
    (tmp_path / "17.png").write_bytes(b"")
    loader = Loader(images, SPEC, batch_size=8, augment=augment, num_workers=num_workers)
    for _ in range(2):
        batches = list(loader.epoch(0))
        assert set(loader.broken) == {"9.png", "17.png"}
        assert loader.broken["17.png"] == "an empty file" and "truncated" in loader.broken["9.png"]
        assert batches[1].mask.tolist() == [True, False] + [True] * 6
        assert batches[2].mask.tolist() == [True, False, True, True] + [False] * 4
        assert batches[1].indices[1] == 9 and batches[1].labels[1] == images.labels[9]
        assert not batches[1].images[1].any()
        for batch, expected in zip(batches, whole, strict=True):
            assert np.array_equal(batch.images[batch.mask], expected.images[batch.mask])


@pytest.mark.parametrize("num_workers", [0, 1, 4])
def test_an_error_in_a_worker_reaches_the_consumer(tmp_path, num_workers):
    images = images_on_disk(tmp_path)
    load = images.load

    def fail_at_20(index, *arguments, **options):
        if index == 20:
            raise RuntimeError("a defect")
        return load(index, *arguments, **options)

    images.load = fail_at_20
    seen = []
    with pytest.raises(RuntimeError, match="a defect"):
        for batch in Loader(images, SPEC, batch_size=8, num_workers=num_workers).epoch(0):
            seen.append(batch)
    assert len(seen) == 2


def test_a_file_that_vanishes_is_masked_and_named(tmp_path):
    images = images_on_disk(tmp_path)
    (tmp_path / "20.png").unlink()
    loader = Loader(images, SPEC, batch_size=8)
    masks = np.concatenate([batch.mask for batch in loader.epoch(0)])[: len(images)]
    assert np.flatnonzero(~masks).tolist() == [20]
    assert loader.broken == {"20.png": "a file that is not there"}


@pytest.mark.parametrize("num_workers", [1, 4])
def test_closing_early_leaves_no_thread(num_workers):
    loader = Loader(images_in_memory(), SPEC, batch_size=2, augment=AUGMENT, num_workers=num_workers)
    batches = loader.epoch(0)
    assert not loader_threads()
    next(batches)
    assert loader_threads()
    batches.close()
    assert not loader_threads()

    for error in (KeyboardInterrupt, RuntimeError):
        with pytest.raises(error):
            for _ in loader.epoch(0):
                raise error
        assert not loader_threads()

    batches = loader.epoch(1)
    next(batches)
    del batches
    assert not loader_threads()
    assert len(list(loader.epoch(0))) == loader.num_batches


def test_closing_does_not_wait_for_the_whole_batch(monkeypatch):
    loader = Loader(images_in_memory(), SPEC, batch_size=16, augment=AUGMENT, num_workers=1)
    monkeypatch.setattr(pipeline, "augment_image", lambda *_: time.sleep(0.02) or np.zeros((12, 12, 3), "uint8"))
    batches = loader.epoch(0)
    next(batches)
    start = time.perf_counter()
    batches.close()
    assert time.perf_counter() - start < 0.2


def test_a_process_with_an_open_epoch_ends():
    code = """
import numpy as np
from vitreous.data import ImageSet, Loader
from vitreous.spec import InputSpec
images = ImageSet(list("abcdefgh"), arrays=np.zeros((8, 8, 8, 3), "uint8"))
batches = Loader(images, InputSpec(image_size=8), batch_size=1, num_workers=2).epoch(0)
next(batches)
print("end")
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout == "end\n" and result.stderr == ""


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_work_ahead_is_bounded(monkeypatch, num_workers):
    made = []
    monkeypatch.setattr(pipeline, "augment_image", lambda *_: made.append(0) or np.zeros((12, 12, 3), "uint8"))
    loader = Loader(images_in_memory(300), SPEC, batch_size=4, augment=AUGMENT, num_workers=num_workers)
    batches = loader.epoch(0)
    next(batches)
    time.sleep(0.1)
    assert 4 <= len(made) <= 4 * (2 + 2 * num_workers)
    batches.close()


def test_cache(tmp_path, monkeypatch):
    images = images_on_disk(tmp_path, 10)
    reads = []
    load = ImageSet.load

    def counted(self, index, *args, **options):
        reads.append(index)
        return load(self, index, *args, **options)

    monkeypatch.setattr(ImageSet, "load", counted)
    num_bytes = images.load(0).nbytes
    for cache_bytes, expected in ((1 << 20, 10), (0, 30), (4 * num_bytes, 10 + 6 + 6)):
        reads.clear()
        loader = Loader(images, SPEC, batch_size=4, augment=AUGMENT, num_workers=2, cache_bytes=cache_bytes)
        for epoch in range(3):
            list(loader.epoch(epoch))
        assert len(reads) == expected


def test_large_jpegs_are_decoded_small_for_training_only(tmp_path):
    Image.new("RGB", (800, 600), (10, 200, 90)).save(tmp_path / "a.jpg")
    images = ImageSet(["a.jpg"], [0], root=tmp_path)
    sizes = {}
    for augment in (AugmentConfig(), AugmentConfig(crop_scale=(1, 1)), None):
        loader = Loader(images, SPEC, batch_size=1, augment=augment, num_workers=0)
        (batch,) = loader.epoch(0)
        assert np.abs(batch.images.astype(int) - (10, 200, 90)).max() <= 3
        sizes[augment and augment.has_crop] = (loader._min_size, loader._cache.get(0).shape)
    assert sizes == {True: (24, (75, 100, 3)), False: (24, (75, 100, 3)), None: (None, (12, 12, 3))}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_memory_is_used_again_only_when_nobody_sees_it(num_workers):
    options = {"batch_size": 4, "augment": AUGMENT, "num_workers": num_workers}
    expected = [batch.images.copy() for batch in Loader(images_in_memory(300), SPEC, **options).epoch(0)]
    loader = Loader(images_in_memory(300), SPEC, **options)
    kept, addresses = [], set()
    for number, batch in enumerate(loader.epoch(0)):
        addresses.add(batch.images.ctypes.data)
        if number % 3 == 0:
            kept.append((number, batch.images[1:3, ::2]))  # a view of the batch, not the batch
    for number, view in kept:
        assert np.array_equal(view, expected[number][1:3, ::2])
    kept.clear()
    del view
    addresses = {batch.images.ctypes.data for batch in loader.epoch(1)}
    assert len(addresses) <= 16 and len(loader._buffers) <= 16


def test_grey_images():
    spec = InputSpec(image_size=8, num_channels=1, mean=(0.5,), std=(0.5,))
    arrays = np.arange(5 * 64, dtype="uint8").reshape(5, 8, 8, 1)
    images = ImageSet(list("abcde"), arrays=arrays)
    (batch,) = Loader(images, spec, batch_size=5).epoch(0)
    assert np.array_equal(batch.images, arrays)
    assert batch.labels.tolist() == [-1] * 5


def test_number_of_workers_by_size(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "_SMALL_PIXELS", 64 * 64)
    monkeypatch.setattr(pipeline, "count_cores", lambda: 6)
    images = images_in_memory()
    assert Loader(images, SPEC, batch_size=4).num_workers == 1
    assert [Loader(images, SPEC, batch_size=4, num_workers=n).num_workers for n in (0, 1, 5)] == [0, 1, 1]
    assert Loader(images, InputSpec(), batch_size=4).num_workers == 6
    large = ImageSet(["a"], [0], root=tmp_path, file_sizes=[4_000_000])
    assert Loader(large, SPEC, batch_size=1).num_workers == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"Cannot use batch_size\. Expected 1 or more\. Received: batch_size=0\. Pass 1 or more\."),
        ({"batch_size": 1, "num_workers": -1}, r"Cannot use num_workers\. Expected 0 or more\."),
        ({"batch_size": 1, "cache_bytes": -1}, r"Cannot use cache_bytes\. Expected 0 or more\."),
        (
            {"batch_size": 64, "drop_last": True},
            r"Cannot make batches\. Expected at least one full batch of images\. "
            r"Received: 37 images, batch_size=64, drop_last=True\. Pass a smaller batch_size, or drop_last=False\.",
        ),
    ],
)
def test_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        Loader(images_in_memory(), SPEC, **options)


def test_errors_of_epoch():
    loader = Loader(images_in_memory(), SPEC, batch_size=8)
    with pytest.raises(ConfigError, match=r"Expected 0 or more\. Received: epoch=-1\."):
        loader.epoch(-1)
    with pytest.raises(ConfigError, match=r"Expected a batch from 0 to 5\. Received: start_batch=6\. Resume with"):
        loader.epoch(0, start_batch=6)
    with pytest.raises(ConfigError, match=r"Expected at least one image\. Received: 0 images.*Pass an ImageSet with"):
        Loader(ImageSet([]), SPEC, batch_size=1)
