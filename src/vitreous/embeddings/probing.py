"""What frozen features are worth on labelled images: nearest neighbours, a linear classifier, few labels, baselines."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitreous.data import Dataset, ImageSet
from vitreous.data.images import to_pillow
from vitreous.data.sources.contents import join_images
from vitreous.data.splits import split_examples
from vitreous.embeddings.backbone import Backbone, Pooling, load_backbone
from vitreous.embeddings.extract import OnError, OnProgress, iterate_features, read_labelled
from vitreous.embeddings.measures import (
    DEFAULT_STRENGTH,
    NEIGHBOURS,
    TEMPERATURE,
    Measure,
    MultiLabel,
    SingleLabel,
    choose_strength,
    vote,
)
from vitreous.errors import DataError, ImageError
from vitreous.spec import check
from vitreous.training import Run

_VAL_FRACTION = 0.2  # where the data has no validation images
_PIXELS = 16  # a side of the thumbnails that the baseline compares
_ENOUGH = 0.95  # from here on, fine-tuning can win little
_FITTED = 0.99  # a linear classifier that has learnt its own images by heart
_GROWTH = 0.02  # a gain that counts


def probe(
    backbone: str | Path | Run | Backbone,
    data: str | Path | Dataset,
    *,
    block: int | None = None,
    pooling: Pooling = "head",
    image_size: int | tuple[int, int] | None = None,
    shots: Sequence[int] = (1, 5, 10),
    num_draws: int = 5,
    max_train: int | None = 4000,
    max_test: int | None = 2000,
    seed: int | None = None,
    on_progress: OnProgress | None = None,
    on_error: OnError | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Measures what the frozen features of a backbone are worth on labelled images.

    Features are computed once. On them, and measured on test images (validation images where there are no others):

    - k-NN: the 20 nearest training images vote, weighted by exp(cosine / 0.07).
    - Linear probe: logistic regression on features brought to mean 0 and variance 1; validation images choose its
      strength C, then it is fitted to training and validation images.
    - Few labels: the same with so many images a class, the mean of several draws.
    - Baselines: the most frequent class, and k-NN on the pixels of 16 x 16 thumbnails.

    With several labels an image, the measure is mean average precision, a logistic regression for each label; there are
    no few-label numbers.

    Args:
        backbone: As for `load_backbone`.
        data: A labelled source as for `load_dataset`, or a `Dataset`. If it is what the backbone's run was trained on,
            splits are those of that training.
        block: Index of the block to read, negative from the end. Default: the last one.
        pooling: `"head"`, `"class"` or `"mean"`.
        image_size: (H, W) in pixels, or one number, that the model is adapted to. Default: the backbone's.
        shots: Images a class of the few-label numbers.
        num_draws: How often these images are drawn, at least 1.
        max_train: Training and validation images used, at most, drawn class by class. None: all.
        max_test: Test images used, at most. None: all.
        seed: Decides what is drawn. Default: that of the run's training for its own data, else 0.
        on_progress: Called with the images done and the images in all.
        on_error: Called with the name of an image that cannot be read, and why; it is left out. Default: it ends it.
        **changes: Fields of `DataConfig`.

    Returns:
        A dict fit for JSON: `knn`, `linear` and `baselines` (each with a `score` and an `interval` of 95%, Wilson for
        accuracy, bootstrap for mean average precision), `few_shot`, `per_class`, `verdict`, `notes`, `seconds` and what
        was measured on what.

    Raises:
        DataError: If there is nothing to measure on, or a single class.
        ConfigError: If an option cannot work.
        VitreousError: As for `load_backbone`.

    Source: Caron et al. 2021, https://arxiv.org/abs/2104.14294, appendix (k-NN: k = 20, temperature 0.07, from Wu et
    al. 2018, https://arxiv.org/abs/1805.01978); Kornblith et al. 2019, https://arxiv.org/abs/1805.08974 (linear probe
    by logistic regression). Difference: features are standardised.
    """
    start = time.perf_counter()
    check(
        pooling != "patches",
        "Cannot probe.",
        "one vector an image",
        "pooling='patches'",
        "Pass head, class or mean.",
    )
    for name, value in {"num_draws": num_draws, "max_train": max_train, "max_test": max_test, **_named(shots)}.items():
        check(value is None or value >= 1, "Cannot probe.", "1 or more", f"{name}={value}", "Pass 1 or more.")
    backbone = load_backbone(backbone, image_size=image_size)
    notes = list(backbone.notes)
    if isinstance(data, Dataset):
        dataset = data
    else:
        found = read_labelled(data, backbone.run, seed=seed, changes=changes, min_classes=2)
        dataset = found.get_dataset(data)
        notes += found.notes
    notes += dataset.notes
    drawn_with = seed or 0
    train, val, test, test_name = _choose_parts(dataset, drawn_with, max_train, max_test, notes)
    parts = [train, val, test]
    images = join_images(parts)
    loaded = time.perf_counter()
    features = _compute(backbone, images, block, pooling, on_progress, on_error)
    embed_seconds = time.perf_counter() - loaded
    bounds = np.cumsum([len(part) for part in parts])
    place = np.searchsorted(bounds, features.indices, side="right")  # which part each image is of
    labels = images.labels[features.indices]
    is_bank, is_test = place < 2, place == 2
    if not is_test.any() or not (place == 0).any():
        raise DataError(
            "Cannot probe. Expected readable images to train and to test on. "
            f"Received: {int(is_bank.sum())} and {int(is_test.sum())} that can be read. Look at: vitreous inspect DATA."
        )
    measure: Measure = MultiLabel(dataset.class_names) if images.is_multi_label else SingleLabel(dataset.class_names)
    bank, truth = labels[is_bank], labels[is_test]
    is_val = place[is_bank] == 1

    fitting, asked = features.vectors[is_bank], features.vectors[is_test]
    knn = measure.score(vote(measure, fitting, bank, asked), truth)
    thumbnails = features.thumbnails - features.thumbnails[is_bank].mean(axis=0)
    pixels = measure.score(vote(measure, thumbnails[is_bank], bank, thumbnails[is_test]), truth)
    constant = measure.score(measure.guess(bank, len(truth)), truth)
    mean, deviation = fitting.mean(axis=0), fitting.std(axis=0)
    fitting, asked = ((vectors - mean) / np.maximum(deviation, 1e-6) for vectors in (fitting, asked))
    strength = choose_strength(measure, fitting[~is_val], bank[~is_val], fitting[is_val], bank[is_val])
    logits, seen = measure.fit(fitting, bank, strength, (asked, fitting))
    linear = measure.score(logits, truth)
    few = []
    if isinstance(measure, SingleLabel):
        few = _learn_from_few(measure, (fitting, bank), (asked, truth), shots, num_draws, drawn_with)
    report: dict[str, Any] = {
        "backbone": backbone.source,
        "model": backbone.model.name,
        "has_random_weights": backbone.is_random,
        "fingerprint": backbone.fingerprint,
        "block": block,
        "pooling": pooling,
        "features_dim": int(features.vectors.shape[1]),
        "data": dataset.name,
        "measure": measure.name,
        "num_classes": len(dataset.class_names),
        "num_train": int(is_bank.sum()),
        "num_test": int(is_test.sum()),
        "split": test_name,
        "knn": {**knn, "k": min(NEIGHBOURS, len(bank)), "temperature": TEMPERATURE},
        "linear": {**linear, "strength": strength, "train_score": measure.evaluate(seen, bank)},
        "few_shot": few,
        "baselines": {"constant": constant, "pixels": pixels},
        "per_class": measure.score_classes(logits, truth),
        "notes": notes,
        "broken_files": {**dataset.broken, **features.broken},
    }
    report["verdict"] = judge(report)
    report["embed_seconds"] = embed_seconds
    report["seconds"] = time.perf_counter() - start
    return report


def _named(shots: Sequence[int]) -> dict[str, int]:
    return {f"shots[{place}]": value for place, value in enumerate(shots)}


def _choose_parts(
    dataset: Dataset, seed: int, max_train: int | None, max_test: int | None, notes: list[str]
) -> tuple[ImageSet, ImageSet, ImageSet, str]:
    """Returns images to train, to choose C and to test on, and the name of the split that tests."""
    splits = dict(dataset.splits)
    name = next((name for name in ("test", "val") if name in splits), None)
    if name is None:
        raise DataError(
            f"Cannot probe on {dataset.name}. Expected test or validation images. Received: training images alone. "
            "Leave val_fraction and test_fraction at their defaults, or pass data with a test folder."
        )
    train, test = splits["train"], splits[name]
    if name == "test" and "val" in splits:
        val = splits["val"]
    else:
        kept, drawn = split_examples(train.labels, _VAL_FRACTION, seed)
        train, val = train.take(kept), train.take(drawn)
        if not len(val):
            notes.append(f"too few images to choose the strength of the linear probe: C is {DEFAULT_STRENGTH:g}")
    num_bank = len(train) + len(val)
    share = 1.0 if max_train is None else min(1.0, max_train / num_bank)
    if share < 1:
        notes.append(f"{max_train:,} of {num_bank:,} training and validation images are used, drawn class by class")
        train, val = (_thin(part, share, seed) for part in (train, val))
    if max_test is not None and max_test < len(test):
        notes.append(f"{max_test:,} of {len(test):,} {name} images are used, drawn class by class")
        test = _thin(test, max_test / len(test), seed)
    if train.labels.ndim == 1 and len(np.unique(train.labels)) < 2:
        raise DataError(
            f"Cannot probe on {dataset.name}. Expected training images of at least two classes. "
            f"Received: {len(np.unique(train.labels))}. Pass data with more classes."
        )
    return train, val, test, name


def _thin(images: ImageSet, share: float, seed: int) -> ImageSet:
    return images.take(split_examples(images.labels, 1 - share, seed)[0]) if len(images) else images


@dataclass(frozen=True, eq=False)
class _Features:
    """What was computed of the images that can be read.

    Args:
        indices: Their positions, int64 (N,).
        vectors: float32 (N, D).
        thumbnails: float32 (N, pixels).
        broken: Images that cannot be read, and why.
    """

    indices: np.ndarray
    vectors: np.ndarray
    thumbnails: np.ndarray
    broken: dict[str, str]


def _compute(
    backbone: Backbone,
    images: ImageSet,
    block: int | None,
    pooling: Pooling,
    on_progress: OnProgress | None,
    on_error: OnError | None,
) -> _Features:
    broken: dict[str, str] = {}

    def note(name: str, reason: str) -> None:
        if on_error is None:
            raise ImageError(name, reason)
        broken[name] = reason
        on_error(name, reason)

    parts = [
        (indices, vectors, np.stack([_shrink(image) for image in pixels]))
        for indices, vectors, pixels in iterate_features(
            backbone, images, block=block, pooling=pooling, on_progress=on_progress, on_error=note
        )
    ]
    if not parts:
        raise DataError(
            "Cannot probe. Expected images that can be read. Received: none. Look at them: vitreous inspect DATA."
        )
    indices, vectors, thumbnails = (np.concatenate(values) for values in zip(*parts, strict=True))
    return _Features(indices, vectors, thumbnails, broken)


def _shrink(image: np.ndarray) -> np.ndarray:
    """Returns the pixels of a small copy of an image, float32, flat."""
    from PIL import Image

    height, width = (min(side, _PIXELS) for side in image.shape[:2])
    small = to_pillow(image).resize((width, height), Image.Resampling.BOX)
    return np.asarray(small, "float32").reshape(-1)


def _learn_from_few(
    measure: SingleLabel,
    bank: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    shots: Sequence[int],
    num_draws: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Returns the linear probe's accuracy from few images a class, for each number of them that leaves some out."""
    (features, labels), (tests, truth) = bank, test
    classes = np.unique(labels)
    found = []
    for count in shots:
        if count >= max(np.bincount(labels)):
            continue
        scores = []
        for draw in range(num_draws):
            order = np.random.default_rng((seed, count, draw)).permutation(len(labels))
            chosen = np.concatenate([order[labels[order] == k][:count] for k in classes])
            (logits,) = measure.fit(features[chosen], labels[chosen], DEFAULT_STRENGTH, [tests])
            scores.append(measure.evaluate(logits, truth))
        spread = {"lowest": min(scores), "highest": max(scores), "num_draws": num_draws}
        found.append({"shots": count, "score": float(np.mean(scores)), **spread})
    return found


def judge(report: dict[str, Any]) -> str:
    """Returns what the numbers of a probe say, in a few sentences.

    Args:
        report: What `probe` returns.
    """
    measure, linear, knn = report["measure"], report["linear"], report["knn"]
    best, how = max((linear["score"], "a linear classifier"), (knn["score"], "k-NN"))
    chosen = linear if how == "a linear classifier" else knn
    base, what = max(
        (report["baselines"]["pixels"]["score"], "k-NN on raw pixels"),
        (report["baselines"]["constant"]["score"], "the most frequent class"),
    )
    text = []
    if chosen["interval"][0] <= base and not best >= max(base, _ENOUGH):
        low, high = chosen["interval"]
        than = f"worse than {what}" if high < base else f"not clearly better than {what}"
        return (
            f"These features are {than}: {best:.1%} (95% interval {low:.1%} to {high:.1%}) by {how}, against "
            f"{base:.1%}. Do not build on them as they are: train from scratch, fine-tune, or try another backbone."
        )
    if best >= _ENOUGH:
        text.append(
            f"The features suffice: {how} on them has {measure} {best:.1%}, and fine-tuning could win "
            f"{1 - best:.1%} at most."
            + (f" So does {what} ({base:.1%}): these images are easy." if base >= _ENOUGH else "")
        )
    else:
        text.append(
            f"The features help, and leave room: {how} on them has {measure} {best:.1%} against {base:.1%} of {what}; "
            f"{1 - best:.1%} is what fine-tuning could win at most."
        )
        if report["linear"]["train_score"] >= _FITTED:
            text.append(
                f"The linear classifier knows its own images by heart ({linear['train_score']:.1%}): more images, or "
                "augmentation, before a larger model."
            )
        else:
            text.append(
                f"It misses images that it was fitted to as well ({linear['train_score']:.1%} right): the features "
                "themselves lack something, which fine-tuning could change."
            )
    if report["few_shot"]:
        last = report["few_shot"][-1]
        gain = linear["score"] - last["score"]
        if gain > _GROWTH:
            text.append(
                f"Labels pay: {last['shots']} a class give {last['score']:.1%}, all {report['num_train']:,} give "
                f"{linear['score']:.1%}."
            )
        else:
            text.append(f"Few labels do: {last['shots']} a class give {last['score']:.1%} already.")
    return " ".join(text)
