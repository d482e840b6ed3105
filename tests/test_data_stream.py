import json

import numpy as np
import pytest

from vitreous.data.image_set import ImageSet
from vitreous.data.pipeline import Loader
from vitreous.errors import ConfigError
from vitreous.spec import AugmentConfig, InputSpec

pytestmark = pytest.mark.usefixtures("threads_side_by_side")

SPEC = InputSpec(image_size=12)
AUGMENT = AugmentConfig(colour_jitter=0.2, mixup_alpha=0.8, num_repeats=2)


def loader(num_workers=0, count=37, first=0, num_labels=5, **options):
    arrays = np.random.default_rng(0).integers(0, 256, (count, 14, 16, 3), dtype="uint8")
    images = ImageSet([f"{first + i}" for i in range(count)], np.arange(count) % num_labels, arrays=arrays)
    options = {"batch_size": 8, "augment": AUGMENT, "num_classes": 5, "shuffle": True, **options}
    return Loader(images, SPEC, num_workers=num_workers, **options)


@pytest.mark.parametrize("num_workers", [0, 1, 2, 5])
@pytest.mark.parametrize("stop", [0, 1, 4, 5, 7, 10])
def test_a_restored_stream_goes_on_with_the_exact_next_batch(num_workers, stop):
    whole = loader().stream()
    batches = [next(whole) for _ in range(12)]  # two epochs of 5 and some more
    broken_off = loader(num_workers).stream()
    for _ in range(stop):
        next(broken_off)
    state = json.loads(json.dumps(broken_off.state()))
    broken_off.close()
    resumed = loader(num_workers).stream(state)
    for expected in batches[stop:]:
        batch = next(resumed)
        for field in ("images", "labels", "mask", "indices"):
            assert np.array_equal(getattr(batch, field), getattr(expected, field))
    resumed.restore(state)
    if stop < 12:
        assert np.array_equal(next(resumed).images, batches[stop].images)
    resumed.close()


def test_state_counts_what_was_handed_out():
    stream = loader(2).stream()
    assert (stream.state()["epoch"], stream.state()["batch"]) == (0, 0)
    for _ in range(7):
        next(stream)
    assert (stream.state()["epoch"], stream.state()["batch"]) == (1, 2)
    stream.close()


def test_state_is_good_for_another_number_of_processes():
    one = loader(batch_size=16).stream()
    next(one)
    parts = [loader(batch_size=16, process_index=rank, num_processes=2).stream(one.state()) for rank in (0, 1)]
    expected = next(one)
    assert np.array_equal(np.concatenate([next(part).images for part in parts]), expected.images)


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"batch_size": 16}, {}, r"Cannot restore the state of a stream\. Expected a state with seed=0, batch_size=16"),
        ({"seed": 1}, {}, r"Received: seed=0, batch_size=8, num_images=37, num_batches=5, "),
        ({"count": 38}, {}, r"num_images=38"),
        ({}, {"batch": 9}, r"batch=9\. Resume with the data, the batch size, the seed and the sampling that the run"),
        ({}, {"epoch": None}, r"epoch=None"),
        ({"shuffle": False}, {}, r"shuffle=0, .* Received: .*shuffle=1, "),
        ({"class_balanced": True}, {}, r"class_balanced=1, .* Received: .*class_balanced=0, "),
        ({"augment": None}, {}, r"num_repeats=1, .* Received: .*num_repeats=2, "),
        ({"first": 1}, {}, r"images_hash=\d+\. Received: .*images_hash=\d+, "),
        ({"num_labels": 4}, {}, r"images_hash=\d+\. Received: .*images_hash=\d+, "),
    ],
)
def test_errors(options, change, message):
    state = {**loader().stream().state(), **change}
    with pytest.raises(ConfigError, match=message):
        loader(**options).stream(state)
