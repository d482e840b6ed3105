import numpy as np
import pytest

from vitreous.data.splits import check_fractions, stratified_split
from vitreous.errors import ConfigError


def test_shares_of_each_class():
    labels = np.repeat([0, 1, 2], [100, 50, 10])
    kept, held_out = stratified_split(labels, 0.1, seed=0)
    assert np.bincount(labels[held_out]).tolist() == [10, 5, 1]
    assert sorted([*kept, *held_out]) == list(range(160))
    assert (np.diff(held_out) > 0).all() and (np.diff(kept) > 0).all()


def test_the_seed_decides():
    labels = np.repeat([0, 1], 50)
    splits = [stratified_split(labels, 0.2, seed)[1].tolist() for seed in (0, 0, 1, -1)]
    assert splits[0] == splits[1] and splits[0] != splits[2]


@pytest.mark.parametrize("counts", [[1, 1, 1, 6], [2, 2, 2], [3] * 10, [1000, 2, 1], [1, 2], [500] + [2] * 40])
@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.9, 0.99])
def test_every_class_keeps_one(counts, fraction):
    labels = np.repeat(np.arange(len(counts)), counts)
    kept, held_out = stratified_split(labels, fraction, seed=3)
    assert np.bincount(labels[kept], minlength=len(counts)).min() >= 1
    assert len(held_out) >= 1
    assert not set(kept) & set(held_out)
    assert len(kept) + len(held_out) == len(labels)


def test_nothing_to_hold_out():
    for labels, fraction in (([0, 1, 2], 0.5), ([0, 0, 1, 1], 0.0), ([], 0.5)):
        kept, held_out = stratified_split(labels, fraction, seed=0)
        assert kept.tolist() == list(range(len(labels))) and held_out.tolist() == []


def test_fraction_errors():
    check_fractions(0.0, 0.0)
    with pytest.raises(
        ConfigError, match=r"Expected a share in \[0, 1\)\. Received: val_fraction=1\. Pass one such as 0\.1"
    ):
        check_fractions(1, 0)
    with pytest.raises(ConfigError, match=r"Received: test_fraction=-0\.1\."):
        check_fractions(0, -0.1)
    with pytest.raises(
        ConfigError, match=r"Expected val_fraction \+ test_fraction below 1\. Received: val_fraction=0\.5"
    ):
        check_fractions(0.5, 0.5)
