import numpy as np
import pytest

from vitreous.data.image_set import ImageSet
from vitreous.data.pipeline import Loader
from vitreous.data.sampling import count_earlier, draw_balanced, group_by_class, repeat_in_batches
from vitreous.errors import ConfigError
from vitreous.spec import AugmentConfig, InputSpec

pytestmark = pytest.mark.usefixtures("threads_side_by_side")

SPEC = InputSpec(image_size=12)
AUGMENT = AugmentConfig(colour_jitter=0.2)
MIXED = AUGMENT.replace(mixup_alpha=0.8, cutmix_alpha=1.0)


def images_in_memory(labels):
    arrays = np.random.default_rng(0).integers(0, 256, (len(labels), 14, 16, 3), dtype="uint8")
    return ImageSet([f"memory/{i}" for i in range(len(labels))], labels, arrays=arrays)


UNEQUAL = [0] * 50 + [3] * 8 + [1] * 2


def test_each_class_equally_often():
    images = images_in_memory(UNEQUAL)
    loader = Loader(images, SPEC, batch_size=10, shuffle=True, class_balanced=True, seed=1)
    order = loader.order(0)
    assert order.dtype == np.int64 and len(order) == 60
    assert np.bincount(images.labels[order]).tolist() == [20, 20, 0, 20]
    counts = np.bincount(order, minlength=60)
    assert counts[:50].max() == 1  # of a large class, 20 different images
    assert set(counts[50:58]) == {2, 3} and counts[58:].tolist() == [10, 10]
    assert np.array_equal(order, loader.order(0)) and not np.array_equal(order, loader.order(1))
    seen = np.unique(np.concatenate([loader.order(epoch) for epoch in range(12)]))
    assert len(seen) > 58


def test_a_remainder_goes_to_different_classes():
    groups = [np.arange(5), np.arange(5, 10), np.arange(10, 15)]
    extra = set()
    for seed in range(40):
        counts = np.bincount(draw_balanced(groups, 10, np.random.default_rng(seed)) // 5, minlength=3)
        assert sorted(counts) == [3, 3, 4]
        extra.add(int(counts.argmax()))
    assert extra == {0, 1, 2}
    assert sorted(draw_balanced([np.array([4])], 3, np.random.default_rng(0))) == [4, 4, 4]
    assert len(draw_balanced([np.array([4]), np.array([5])], 1, np.random.default_rng(0))) == 1


def test_balance_with_several_labels():
    labels = np.zeros((40, 3), bool)
    labels[:30, 0] = True
    labels[28:34, 1] = True  # class 2 has no image; 6 have no label
    images = images_in_memory(labels)
    assert [group.tolist() for group in group_by_class(images)] == [
        list(range(30)),
        list(range(28, 34)),
        list(range(34, 40)),
    ]
    counts = np.zeros(40)
    loader = Loader(images, SPEC, batch_size=10, shuffle=True, class_balanced=True)
    for epoch in range(60):
        counts += np.bincount(loader.order(epoch), minlength=40)
    assert abs(counts[:28].sum() / counts.sum() - 28 / 30 / 3) < 0.03
    assert abs(counts[34:].sum() / counts.sum() - 1 / 3) < 0.03


@pytest.mark.parametrize(("count", "batch_size", "num_repeats"), [(40, 12, 3), (40, 10, 3), (7, 8, 2), (12, 4, 4)])
def test_repeats(count, batch_size, num_repeats):
    source = np.random.default_rng(0).permutation(count)
    order = repeat_in_batches(source, batch_size, num_repeats)
    assert len(order) == count
    for start in range(0, count, batch_size):
        batch = order[start : start + batch_size]
        copies = np.bincount(batch, minlength=count)
        assert copies.max() <= num_repeats
        assert (copies > 0).sum() == -(-len(batch) // num_repeats)
        if len(batch) > num_repeats:
            assert (np.diff(batch) != 0).all()  # neighbours are different images
    assert len(np.unique(order)) <= -(-count // num_repeats) + -(-count // batch_size)


def test_count_earlier():
    assert count_earlier(np.array([3, 1, 3, 3, 1, 0])).tolist() == [0, 0, 1, 2, 1, 0]
    assert count_earlier(np.array([], "int64")).tolist() == []


def test_copies_of_an_image_are_changed_differently():
    images = images_in_memory([0] * 12)
    options = {"batch_size": 6, "shuffle": True, "seed": 2}
    loader = Loader(images, SPEC, augment=AUGMENT.replace(num_repeats=3), **options)
    plain = Loader(images, SPEC, augment=AUGMENT, **options)
    alone = {int(i): batch.images[row] for batch in plain.epoch(0) for row, i in enumerate(batch.indices)}
    for batch in loader.epoch(0):
        assert len(np.unique(batch.indices)) == 2 and batch.mask.all()
        assert len({image.tobytes() for image in batch.images}) == 6
        for row in (0, 1):  # the first copy is what a plain epoch shows
            assert np.array_equal(batch.images[row], alone[int(batch.indices[row])])


@pytest.mark.parametrize("num_processes", [1, 2, 4])
@pytest.mark.parametrize(
    "options", [{}, {"class_balanced": True}, {"augment": MIXED}], ids=["plain", "balanced", "mixed"]
)
def test_parts_of_the_processes_are_the_whole_batch(num_processes, options):
    images = images_in_memory(UNEQUAL[::-1])
    options = {"augment": AUGMENT.replace(num_repeats=2), **options}
    options = {"batch_size": 16, "num_classes": 4, "shuffle": True, "num_workers": 2, **options}
    whole = list(Loader(images, SPEC, **options).epoch(1, start_batch=1))
    parts = [
        list(Loader(images, SPEC, process_index=rank, num_processes=num_processes, **options).epoch(1, start_batch=1))
        for rank in range(num_processes)
    ]
    assert len(whole) == 3 and not whole[-1].mask.all()
    for number, batch in enumerate(whole):
        for field in ("images", "labels", "mask", "indices"):
            together = np.concatenate([getattr(part[number], field) for part in parts])
            assert np.array_equal(together, getattr(batch, field)), field


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_balanced": True}, r"Expected shuffle=True with class_balanced=True\. Received: shuffle=False\."),
        ({"process_index": 2, "num_processes": 2}, r"Received: process_index=2, num_processes=2\. Pass the rank"),
        ({"num_processes": 3}, r"Expected a multiple of 3\. Received: batch_size=10, num_processes=3\."),
        (
            {"num_processes": 2, "augment": AUGMENT.replace(cutmix_alpha=1.0), "num_classes": 4},
            r"Expected a multiple of 4, so that no pair of mixed images is parted\. Received: batch_size=10",
        ),
    ],
)
def test_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        Loader(images_in_memory(UNEQUAL), SPEC, batch_size=10, **options)
