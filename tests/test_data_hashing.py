import numpy as np
import pytest
from inspection_data import photo
from PIL import Image

from vitreous.data.hashing import close_pairs, connected_groups, perceptual_hashes, similarity


def thumbnail(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX))


def every_pair(hashes, most):
    distances = np.bitwise_count(hashes[:, None] ^ hashes[None])
    return np.argwhere(np.triu(distances <= most, 1))


@pytest.mark.parametrize("most", [0, 3, 7])
def test_close_pairs_are_those_of_comparing_all(most):
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 2**64, 400, dtype="uint64")
    for i in range(300):  # copies of the first hundred, with up to 9 bits turned anywhere
        bits = generator.choice(64, generator.integers(0, 10), replace=False)
        hashes[100 + i] = hashes[i % 100] ^ np.bitwise_or.reduce(np.uint64(1) << bits.astype("uint64"))
    expected = every_pair(hashes, most)
    assert len(expected) > 10
    np.testing.assert_array_equal(close_pairs(hashes, most), expected)


def test_close_pairs_with_one_bit_turned_in_each_band():
    hashes = np.array([0, 0x0001_0001_0001_0001, 0x8000_8000_8000_8000, 2**64 - 1], "uint64")
    assert close_pairs(hashes).tolist() == [[0, 1], [0, 2]]


def test_close_pairs_of_nothing_and_of_equals():
    assert close_pairs(np.zeros(0, "uint64")).shape == (0, 2)
    assert close_pairs(np.zeros(4, "uint64")).tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    assert len(close_pairs(np.zeros(3000, "uint64"), max_pairs=1000)) > 1000  # stops, and says that there is more


def test_hash_survives_encoding_size_and_brightness():
    generator = np.random.default_rng(1)
    images = [photo(seed, (200, 150)) for seed in range(20)]
    hashes = perceptual_hashes(np.stack([thumbnail(image) for image in images]))
    for change in (
        lambda image: image.resize((90, 70)),
        lambda image: Image.fromarray((np.asarray(image) * 0.7 + 30).astype("uint8")),
        lambda image: Image.fromarray(
            np.clip(np.asarray(image) + generator.normal(0, 4, (150, 200, 3)), 0, 255).astype("uint8")
        ),
    ):
        changed = perceptual_hashes(np.stack([thumbnail(change(image)) for image in images]))
        assert np.bitwise_count(hashes ^ changed).max() <= 6
    others = np.bitwise_count(hashes[:, None] ^ hashes[None])[np.triu_indices(20, 1)]
    assert others.min() > 7
    assert 25 < others.mean() < 39


def test_hash_is_balanced_and_leaves_out_the_mean():
    hashes = perceptual_hashes(np.random.default_rng(0).integers(0, 256, (5, 32, 32)))
    assert np.bitwise_count(hashes).tolist() == [31] * 5
    assert (hashes >> np.uint64(63)).tolist() == [0] * 5  # the constant term has no bit
    assert hashes.dtype == "uint64"


def test_similarity_is_the_correlation():
    generator = np.random.default_rng(0)
    first, second = generator.integers(0, 256, (2, 6, 8, 8, 3)).astype("uint8")
    expected = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(similarity(first, second), expected, atol=1e-6)
    np.testing.assert_allclose(similarity(first, first // 2), 1, atol=1e-3)
    assert similarity(np.zeros_like(first), first).tolist() == [0] * 6


def test_connected_groups():
    assert connected_groups([(3, 4), (1, 2), (4, 9), (2, 5), (9, 3)]) == [[1, 2, 5], [3, 4, 9]]
    assert connected_groups([]) == []
