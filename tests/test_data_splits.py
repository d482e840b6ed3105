import numpy as np
import pytest

from vitreous.data.splits import assign_folds, split_examples, stratified_split


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


def groups_of(rng, num_groups, num_classes):
    """Groups of 1 to 20 images; the images of a group are of one or two classes."""
    sizes = rng.integers(1, 20, num_groups)
    groups = np.repeat(np.arange(num_groups), sizes)
    labels = (groups % num_classes + rng.integers(0, 2, len(groups))) % num_classes
    order = rng.permutation(len(groups))
    return labels[order], groups[order]


@pytest.mark.parametrize("seed", range(5))
def test_groups_stay_together(seed):
    labels, groups = groups_of(np.random.default_rng(seed), 60, 3)
    kept, held_out = split_examples(labels, 0.2, seed, groups)
    assert not set(groups[kept]) & set(groups[held_out])
    assert sorted([*kept, *held_out]) == list(range(len(labels)))
    assert abs(len(held_out) / len(labels) - 0.2) < 0.04
    for label in range(3):
        assert abs((labels[held_out] == label).mean() - (labels == label).mean()) < 0.1
    again = split_examples(labels, 0.2, seed, groups)[1]
    assert again.tolist() == held_out.tolist() != split_examples(labels, 0.2, seed + 1, groups)[1].tolist()


def test_a_class_in_one_group_is_kept_for_training():
    labels = np.array([0] * 20 + [1] * 20 + [2] * 5)
    groups = np.array([f"g{i // 4}" for i in range(40)] + ["rare"] * 5)
    for seed in range(10):
        kept, held_out = split_examples(labels, 0.3, seed, groups)
        assert set(labels[kept]) == {0, 1, 2}
        assert len(held_out)


def test_groups_with_a_class_to_themselves_are_kept():
    labels = np.array([0] * 95 + [0, 1, 1, 0, 2])
    groups = np.array(["A"] * 95 + ["B"] * 3 + ["C"] * 2)
    kept, held_out = split_examples(labels, 0.1, 0, groups)
    assert len(kept) == 100 and held_out.tolist() == []


def test_one_group_cannot_be_split():
    kept, held_out = split_examples(np.array([0, 1, 0, 1]), 0.5, 0, ["same"] * 4)
    assert kept.tolist() == [0, 1, 2, 3] and held_out.tolist() == []


def test_several_labels_are_split_label_by_label():
    rng = np.random.default_rng(0)
    shares = np.array([0.5, 0.2, 0.05, 0.01])
    labels = rng.random((2000, 4)) < shares
    kept, held_out = split_examples(labels, 0.1, 0)
    assert abs(len(held_out) - 200) <= 10
    counts, totals = labels[held_out].sum(axis=0), labels.sum(axis=0)
    assert (np.abs(counts - 0.1 * totals) <= np.maximum(2, 0.02 * totals)).all()
    assert sorted([*kept, *held_out]) == list(range(2000))


def test_a_label_with_one_example_is_kept_for_training():
    labels = np.zeros((40, 3), bool)
    labels[:20, 0], labels[20:39, 1], labels[39, 2] = True, True, True
    for seed in range(10):
        kept, held_out = split_examples(labels, 0.2, seed)
        assert labels[kept].any(axis=0).all() and len(held_out) >= 4


@pytest.mark.parametrize("kind", ["classes", "groups", "several labels"])
def test_folds_partition(kind):
    rng = np.random.default_rng(1)
    labels, groups = groups_of(rng, 60, 4)
    if kind == "several labels":
        labels = rng.random((300, 4)) < 0.3
    folds = assign_folds(labels, 5, 0, groups if kind == "groups" else None)
    sizes = np.bincount(folds)
    assert len(sizes) == 5 and sizes.sum() == len(labels)
    if kind == "groups":
        assert all(len(set(folds[groups == group])) == 1 for group in groups)
        assert np.ptp(sizes) < 0.2 * sizes.mean()
    else:
        assert np.ptp(sizes) <= (1 if kind == "classes" else 4)
    if kind == "classes":
        for label in range(4):
            assert np.ptp(np.bincount(folds[labels == label], minlength=5)) <= 1
    assert assign_folds(labels, 5, 0, groups if kind == "groups" else None).tolist() == folds.tolist()
