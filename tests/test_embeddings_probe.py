"""What frozen features are worth: k-NN, linear probe, few labels, baselines, and the words for them."""

import json

import numpy as np
import pytest
from embeddings_data import make_backbone, make_colours

from vitreous.data import Dataset, ImageSet
from vitreous.embeddings import measures, probe
from vitreous.embeddings.measures import MultiLabel, SingleLabel, choose_strength, vote
from vitreous.embeddings.probing import judge
from vitreous.errors import ConfigError, DataError, ImageError


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return make_backbone(tmp_path_factory.mktemp("models") / "tiny.keras")


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    return make_colours(tmp_path_factory.mktemp("data") / "colours")


def noise(num_classes=2, *, is_multi_label=False, splits=(("train", 60), ("val", 20), ("test", 40))):
    """Images that say nothing of their labels; with several labels, brightness says the first one."""
    generator = np.random.default_rng(0)
    parts = {}
    for split, count in splits:
        images = generator.integers(0, 120, (count, 16, 16, 3)).astype("uint8")
        labels = generator.integers(0, num_classes, count)
        if is_multi_label:
            labels = generator.random((count, num_classes)) < 0.3
            images += (labels[:, 0] * 120).astype("uint8")[:, None, None, None]
        parts[split] = ImageSet([f"{split}/{i}" for i in range(count)], labels, arrays=images)
    names = tuple(f"class{k}" for k in range(num_classes))
    return Dataset(name="noise", root=None, class_names=names, splits=parts)


def test_features_that_tell_the_classes_apart(backbone, colours):
    report = probe(backbone, colours, shots=(1, 3, 500), num_draws=2, seed=3)
    assert report["linear"]["score"] == report["linear"]["train_score"] == 1
    assert report["linear"]["strength"] in measures.STRENGTHS
    assert report["knn"]["score"] == 1 and report["knn"]["k"] == 20
    assert report["baselines"]["constant"]["score"] == pytest.approx(1 / 3)
    assert report["per_class"] == {"blue": 1, "green": 1, "red": 1}
    assert [few["shots"] for few in report["few_shot"]] == [1, 3]  # no class has 500
    assert all(few["lowest"] <= few["score"] <= few["highest"] for few in report["few_shot"])
    assert (report["num_train"], report["num_test"], report["split"]) == (54, 6, "test")
    low, high = report["linear"]["interval"]
    assert 0.5 < low < high == 1
    again = probe(backbone, colours, shots=(1, 3, 500), num_draws=2, seed=3)
    assert {k: v for k, v in again.items() if "seconds" not in k} == {
        k: v for k, v in report.items() if "seconds" not in k
    }
    json.dumps(report)


def test_features_that_say_nothing(backbone):
    report = probe(backbone, noise(), shots=(), max_train=50, max_test=30)
    assert report["linear"]["interval"][0] < 0.5
    assert "Do not build on them as they are" in report["verdict"]
    assert report["few_shot"] == []
    assert 47 <= report["num_train"] <= 52 and report["num_test"] == 30
    assert "50 of 80 training and validation images are used, drawn class by class" in report["notes"]


def test_several_labels_an_image(backbone, monkeypatch):
    monkeypatch.setattr(measures, "_NUM_RESAMPLES", 20)
    report = probe(backbone, noise(3, is_multi_label=True))
    assert report["measure"] == "mean average precision" and report["few_shot"] == []
    assert report["per_class"]["class0"] > 0.95 > max(report["per_class"]["class1"], report["per_class"]["class2"])
    low, high = report["linear"]["interval"]
    assert low < report["linear"]["score"] < high
    assert report["baselines"]["constant"]["score"] < report["linear"]["score"]


def test_random_weights_are_named():
    report = probe("vit_pico_patch4_32", noise(splits=(("train", 40), ("val", 20))), shots=())
    assert report["has_random_weights"] and report["split"] == "val"
    assert "its weights are random" in report["notes"][0]


def test_what_cannot_be_probed(backbone, colours, tmp_path):
    with pytest.raises(ConfigError, match="pooling='patches'"):
        probe(backbone, colours, pooling="patches")
    for name, value in (("num_draws", 0), ("max_train", 0), ("shots", (0,))):
        with pytest.raises(ConfigError, match=rf"Cannot probe. Expected 1 or more. Received: {name}"):
            probe(backbone, colours, **{name: value})
    with pytest.raises(DataError, match=r"Expected test or validation images\. Received: training images alone"):
        probe(backbone, noise(splits=(("train", 20),)))
    with pytest.raises(DataError, match=r"Expected training images of at least two classes\. Received: 1"):
        probe(backbone, noise(1))
    broken = make_colours(tmp_path / "broken", count=6)
    path = broken / "red" / "01.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ImageError, match=r"red/01\.png"):
        probe(backbone, broken)
    told = {}
    report = probe(backbone, broken, shots=(), on_error=told.__setitem__)
    assert list(told) == ["red/01.png"] == list(report["broken_files"])
    assert report["num_train"] + report["num_test"] == 17


def test_votes_are_those_of_the_definition():
    generator = np.random.default_rng(0)
    bank, queries, labels = generator.normal(size=(50, 6)), generator.normal(size=(7, 6)), generator.integers(0, 4, 50)
    votes = vote(SingleLabel("abcd"), bank, labels, queries)
    for query, row in zip(queries, votes, strict=True):
        cosines = bank @ query / (np.linalg.norm(bank, axis=1) * np.linalg.norm(query))
        nearest = np.argsort(-cosines)[:20]
        wanted = np.zeros(4)
        for i in nearest:
            wanted[labels[i]] += np.exp(cosines[i] / 0.07)
        np.testing.assert_allclose(row / row.sum(), wanted / wanted.sum(), rtol=1e-4)
    assert vote(SingleLabel("abcd"), bank[:3], labels[:3], queries).shape == (7, 4)  # fewer than k


def test_a_class_without_images_is_never_answered():
    features = np.array([[0.0], [0.1], [1.0], [1.1]])
    (logits,) = SingleLabel("abc").fit(features, np.array([0, 0, 2, 2]), 10.0, [features])
    assert logits.argmax(axis=1).tolist() == [0, 0, 2, 2] and np.isneginf(logits[:, 1]).all()
    labels = np.array([[True, False, True], [True, False, True], [False, False, True], [False, False, True]])
    (logits,) = MultiLabel("abc").fit(features, labels, 10.0, [features])
    assert (logits[:, 1:] == 0).all() and (logits[:2, 0] > logits[2:, 0].max()).all()


def test_strength_is_the_best_on_validation_images():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 40)
    noisy = generator.normal(size=(40, 200)) + 0.15 * labels[:, None]
    scores = []
    for strength in measures.STRENGTHS:
        (logits,) = SingleLabel("ab").fit(noisy[:20], labels[:20], strength, [noisy[20:]])
        scores.append(float((logits.argmax(axis=1) == labels[20:]).mean()))
    chosen = choose_strength(SingleLabel("ab"), noisy[:20], labels[:20], noisy[20:], labels[20:])
    assert scores[measures.STRENGTHS.index(chosen)] == max(scores)
    none = np.zeros(0, int)
    assert choose_strength(SingleLabel("ab"), noisy, labels, noisy[:0], none) == measures.DEFAULT_STRENGTH


def numbers(linear, knn=0.5, pixels=0.3, train=1.0, few=(), margin=0.02):
    def scored(score):
        return {"score": score, "interval": [score - margin, min(score + margin, 1)]}

    return {
        "measure": "accuracy",
        "num_train": 4000,
        "linear": {**scored(linear), "train_score": train},
        "knn": scored(knn),
        "baselines": {"pixels": scored(pixels), "constant": scored(0.1)},
        "few_shot": [{"shots": shots, "score": score} for shots, score in few],
    }


@pytest.mark.parametrize(
    ("report", "texts"),
    [
        (numbers(0.97, few=[(10, 0.96)]), ["The features suffice: a linear", "win 3.0% at most", "96.0% already"]),
        (
            numbers(0.70, few=[(10, 0.5)]),
            ["help, and leave room", "heart (100.0%)", "10 a class give 50.0%, all 4,000"],
        ),
        (
            numbers(0.96, pixels=0.95),
            ["The features suffice", "So does k-NN on raw pixels (95.0%): these images are easy"],
        ),
        (numbers(0.70, train=0.75), ["misses images that it was fitted to as well (75.0% right)"]),
        (numbers(0.40, knn=0.8), ["k-NN on them has accuracy 80.0% against 30.0% of k-NN on raw pixels"]),
        (numbers(0.31, knn=0.2), ["not clearly better than k-NN on raw pixels: 31.0% (95% interval 29.0% to 33.0%)"]),
        (numbers(0.50, pixels=0.9), ["These features are worse than k-NN on raw pixels", "fine-tune"]),
        (numbers(0.05, knn=0.02, pixels=0.04), ["worse than the most frequent class"]),
    ],
)
def test_the_verdict_says_what_the_numbers_say(report, texts):
    for text in texts:
        assert text in judge(report)


def test_cli(call, backbone, colours, tmp_path):
    code, text, err = call("probe", backbone, colours, "--shots", 2, "--num-draws", 2)
    assert code == 0, err
    for line in (
        "Data     colours: 3 classes; 54 images to train, 6 to measure (test)",
        "Linear   recall of each class",
    ):
        assert line in text
    for name in (
        "most frequent class",
        "k-NN on raw pixels",
        "k-NN on features, k=20",
        "linear, 2 a class",
        "linear, all",
    ):
        assert name in text
    assert "Verdict  The features suffice" in text and "Took     " in text
    out = tmp_path / "probe.json"
    assert call("probe", backbone, colours, "--json", "--out", out, "--max-train", 0, "--max-test", 0)[0] == 0
    assert json.loads(out.read_text())["linear"]["score"] == 1
    code, text, err = call("probe", backbone, tmp_path)
    assert (code, text) == (2, "") and str(tmp_path) in err
