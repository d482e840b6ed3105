import errno
import os
import threading

import numpy as np
import pytest
from PIL import Image

from vitreous.data import decode_cache as cache_module
from vitreous.data.decode_cache import DecodeCache
from vitreous.data.image_set import ImageSet
from vitreous.data.pipeline import Loader
from vitreous.errors import ConfigError, DataError
from vitreous.spec import AugmentConfig, InputSpec

pytestmark = pytest.mark.usefixtures("threads_side_by_side")

SPEC = InputSpec(image_size=12)
AUGMENT = AugmentConfig(colour_jitter=0.2)


def arrays(count=30, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*rng.integers(2, 40, 2), 3), dtype="uint8") for _ in range(count)]


def images_on_disk(folder, count=20):
    for i, array in enumerate(arrays(count)):
        Image.fromarray(array).save(folder / f"{i}.png")
    return ImageSet([f"{i}.png" for i in range(count)], [0] * count, root=folder)


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_what_was_put_comes_back(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(cache_module, "_SEGMENT_BYTES", 3 * 16384)
    kept = DecodeCache(kind, folder=tmp_path)
    assert kept.get(3) is None
    for key, array in enumerate(arrays()):
        kept.put(key, array)
        kept.put(key, array + 1)  # the first one stays
    assert len(kept) == 30 and kept.num_bytes == sum(array.nbytes for array in arrays())
    for key, array in enumerate(arrays()):
        assert np.array_equal(kept.get(key), array)
    assert not list(tmp_path.iterdir()) or os.name == "nt"  # the file has no name
    kept.close()
    assert kept.get(3) is None and kept.num_bytes == 0
    kept.put(0, arrays()[0])
    assert kept.get(0) is None


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_only_what_fits_is_kept(tmp_path, kind):
    kept = DecodeCache(kind, max_bytes=2500, folder=tmp_path)
    for key in range(5):
        kept.put(key, np.full((10, 10, 10), key, "uint8"))
    assert len(kept) == 2 and kept.num_bytes == 2000 and kept.problem is None
    assert len(DecodeCache("none")) == 0


def test_none_keeps_nothing():
    kept = DecodeCache("none")
    kept.put(0, np.zeros(3, "uint8"))
    assert kept.get(0) is None


def test_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_SEGMENT_BYTES", 4 * 16384)
    kept, source, wrong = DecodeCache("disk", folder=tmp_path), arrays(200), []

    def work(seed):
        for key in np.random.default_rng(seed).permutation(200).tolist():
            found = kept.get(key)
            if found is None:
                kept.put(key, source[key])
                found = kept.get(key)
            if not np.array_equal(found, source[key]):
                wrong.append(key)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(kept) == 200


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("augment", [None, AUGMENT])
def test_a_cache_changes_no_pixel(tmp_path, num_workers, augment):
    images = images_on_disk(tmp_path)
    results = {}
    for kind in ("none", "memory", "disk", "auto"):
        loader = Loader(images, SPEC, batch_size=8, augment=augment, num_workers=num_workers, cache=kind)
        results[kind] = [batch.images.tobytes() for epoch in range(3) for batch in loader.epoch(epoch)]
        loader.close()
    assert results["none"] == results["memory"] == results["disk"] == results["auto"]


@pytest.mark.parametrize("kind", ["memory", "disk", "auto"])
def test_the_second_epoch_decodes_nothing(tmp_path, monkeypatch, kind):
    images, reads, load = images_on_disk(tmp_path), [], ImageSet.load
    monkeypatch.setattr(
        ImageSet, "load", lambda self, index, *a, **k: reads.append(index) or load(self, index, *a, **k)
    )
    loader = Loader(images, SPEC, batch_size=8, augment=AUGMENT, cache=kind)
    for epoch in range(3):
        list(loader.epoch(epoch))
    assert sorted(reads) == list(range(20))
    loader.close()
    list(loader.epoch(3))
    assert len(reads) == 40


def test_auto_takes_the_disk_where_memory_is_too_small(tmp_path, monkeypatch):
    images = images_on_disk(tmp_path)
    for memory, free, kind in ((1 << 30, 1 << 40, "memory"), (100, 1 << 40, "disk"), (100, 1000, "memory")):
        monkeypatch.setattr("vitreous.data.pipeline.MEMORY_BYTES", memory)
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: type("", (), {"free": free}))
        loader = Loader(images, SPEC, batch_size=8, augment=AUGMENT, cache_folder=tmp_path)
        next(loader.epoch(0))
        assert loader._cache.kind == kind


def test_a_full_disk_is_told_once_and_costs_nothing_but_time(tmp_path, monkeypatch):
    images, said = images_on_disk(tmp_path), []
    whole = [batch.images for batch in Loader(images, SPEC, batch_size=8, augment=AUGMENT, cache="none").epoch(0)]
    loader = Loader(images, SPEC, batch_size=8, augment=AUGMENT, cache="disk", num_workers=2, report=said.append)
    create = loader._create_cache

    def create_on_a_small_disk():
        made = create()
        write, left = made._file.write, [5]

        class File:
            def __getattr__(self, name):
                return getattr(made_file, name)

            def write(self, data):
                left[0] -= 1
                if left[0] < 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return write(data)

        made_file, made._file = made._file, File()
        return made

    monkeypatch.setattr(loader, "_create_cache", create_on_a_small_disk)
    for _ in range(2):
        for batch, expected in zip(loader.epoch(0), whole, strict=True):
            assert np.array_equal(batch.images, expected)
    assert said == [
        "The disk of the decode cache is full (No space left on device); 5 of 20 images are kept, the others are "
        "decoded each time."
    ]


def test_errors(tmp_path):
    images = images_on_disk(tmp_path)
    with pytest.raises(ConfigError, match=r"Cannot use cache\. Expected .*'disk'.* Received: cache='ram'\. Pass one"):
        Loader(images, SPEC, batch_size=8, cache="ram")
    loader = Loader(images, SPEC, batch_size=8, cache="disk", cache_folder=tmp_path / "absent")
    with pytest.raises(DataError, match=r"Expected a folder that can be written\. Received: cache_folder='.*absent'"):
        next(loader.epoch(0))
