import numpy as np
import pytest
from PIL import Image

from vitreous.data.image_set import ImageSet
from vitreous.data.pipeline import Loader
from vitreous.errors import ConfigError, DataError
from vitreous.spec import AugmentConfig, InputSpec

pytestmark = pytest.mark.usefixtures("threads_side_by_side")

SPEC = InputSpec(image_size=12)
AUGMENT = AugmentConfig(colour_jitter=0.2)
COUNT, BAD = 60, (9, 17, 40)


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        Image.fromarray(rng.integers(0, 256, (14, 16, 3), dtype="uint8")).save(tmp_path / f"{i}.png")
    for i in BAD:
        (tmp_path / f"{i}.png").write_bytes((tmp_path / f"{i}.png").read_bytes()[:80])
    return ImageSet([f"{i}.png" for i in range(COUNT)], np.arange(COUNT) % 5, root=tmp_path)


def batches(images, num_workers=0, **options):
    options = {"batch_size": 8, "augment": AUGMENT, "shuffle": True, "max_bad_fraction": 0.1, **options}
    loader = Loader(images, SPEC, num_workers=num_workers, **options)
    return loader, [list(loader.epoch(epoch)) for epoch in range(2)]


def test_another_image_takes_the_place(images):
    said = []
    loader, epochs = batches(images, report=said.append)
    assert set(loader.broken) == {f"{i}.png" for i in BAD}
    assert loader.num_replaced == 2 * len(BAD)
    assert sorted(said) == [
        f"Cannot read {i}.png: {loader.broken[f'{i}.png']}; another image takes its place." for i in (17, 40, 9)
    ]
    for epoch, made in enumerate(epochs):
        indices = np.concatenate([batch.indices for batch in made])
        masks = np.concatenate([batch.mask for batch in made])
        assert masks[:COUNT].all() and not set(indices) & set(BAD)
        order = loader.order(epoch)
        moved = np.flatnonzero(indices[:COUNT] != order)
        assert set(order[moved]) == set(BAD)
        for batch in made:
            real = batch.indices[batch.mask]
            assert np.array_equal(batch.labels[batch.mask], images.labels[real])


@pytest.mark.parametrize("num_workers", [1, 2, 5])
@pytest.mark.parametrize("mixing", [False, True])
def test_replacements_do_not_depend_on_the_workers(images, num_workers, mixing):
    options = {"augment": AUGMENT.replace(mixup_alpha=0.8, num_repeats=2), "num_classes": 5} if mixing else {}
    _, alone = batches(images, 0, **options)
    _, threaded = batches(images, num_workers, **options)
    for one, other in zip(alone[0] + alone[1], threaded[0] + threaded[1], strict=True):
        for field in ("images", "labels", "mask", "indices"):
            assert np.array_equal(getattr(one, field), getattr(other, field))


def test_a_resumed_epoch_has_the_same_replacements(images):
    _, (whole, _) = batches(images)
    loader = Loader(images, SPEC, batch_size=8, augment=AUGMENT, shuffle=True, max_bad_fraction=0.1)
    for batch, expected in zip(loader.epoch(0, start_batch=3), whole[3:], strict=True):
        assert np.array_equal(batch.images, expected.images) and np.array_equal(batch.indices, expected.indices)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_stop_the_run_and_are_named(images, num_workers):
    with pytest.raises(DataError) as caught:
        batches(images, num_workers, max_bad_fraction=0.04)  # 2.4 images
    message = str(caught.value)
    assert message.startswith(
        "Cannot go on reading images. Expected at most 0.04 of 60 images to be unreadable. Received: 3: "
    )
    assert all(f"{i}.png (a truncated image" in message for i in BAD)
    assert message.endswith("Mend or remove them, or allow a larger share (max_bad_fraction, --max-bad).")
    batches(images, num_workers, max_bad_fraction=0.05)


def test_not_one_readable_image(tmp_path):
    (tmp_path / "a.png").write_bytes(b"nothing")
    loader = Loader(ImageSet(["a.png"], [0], root=tmp_path), SPEC, batch_size=1, max_bad_fraction=0.99)
    for _ in range(2):
        with pytest.raises(DataError, match=r"Received: 1: a\.png \(not an image in a known format\)"):
            list(loader.epoch(0))


def test_evaluation_leaves_out(images):
    said = []
    loader = Loader(images, SPEC, batch_size=8, report=said.append)
    masks = np.concatenate([batch.mask for batch in loader.epoch(0)])[:COUNT]
    assert np.flatnonzero(~masks).tolist() == list(BAD) and loader.num_replaced == 0
    assert len(said) == 3 and said[0].endswith("; left out.")


def test_a_share_out_of_range(images):
    with pytest.raises(
        ConfigError, match=r"Cannot use max_bad_fraction\. Expected a value in \[0, 1\)\. Received: max_"
    ):
        Loader(images, SPEC, batch_size=8, max_bad_fraction=1.0)
