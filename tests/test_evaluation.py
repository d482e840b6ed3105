"""Metrics from logits against scikit-learn, and a run measured: views, slices, robustness, thresholds, calibration."""

import dataclasses
import json
import re
import warnings

import numpy as np
import pytest
from PIL import Image

import vitreous
from vitreous.calibration import compute_calibration
from vitreous.cli.measure import print_metrics
from vitreous.data import ImageSet
from vitreous.errors import ConfigError, DataError, RunError, UnknownNameError, WeightsError
from vitreous.evaluation import compute_all_metrics, rank_scores, sigmoid, softmax
from vitreous.figures import draw_corruptions, draw_reliability, draw_robustness, draw_selection
from vitreous.measurement import (
    average_views,
    calibrate_run,
    create_views,
    make_view,
    measure_robustness,
    measure_slices,
)
from vitreous.spec import InputSpec

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def answers():
    """Logits (500, 7) and labels, of which the last class has none."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 500)
    return rng.standard_normal((500, 7)) + 1.5 * np.eye(7)[labels], labels


def test_all_metrics_equal_scikit_learn(answers):
    from sklearn.metrics import average_precision_score, precision_recall_fscore_support, roc_auc_score

    logits, labels = answers
    metrics = compute_all_metrics(logits, labels, "abcdefg", num_draws=100)
    chosen, there = logits.argmax(axis=1), range(6)
    kinds = ("precision", "recall", "f1", "support")
    values = precision_recall_fscore_support(labels, chosen, labels=there, zero_division=0)
    for kind, expected in zip(kinds, values, strict=True):
        assert list(metrics[kind].values()) == pytest.approx(expected.tolist())
        assert list(metrics[kind]) == list("abcdef")
    for average in ("macro", "weighted"):
        expected = precision_recall_fscore_support(labels, chosen, labels=there, average=average, zero_division=0)
        for kind, value in zip(kinds[:3], expected[:3], strict=True):
            found = metrics[f"macro_{kind}"] if average == "macro" else metrics["weighted"][kind]
            assert found == pytest.approx(value)
    shares = softmax(logits)
    areas = [roc_auc_score(labels == k, shares[:, k]) for k in there]
    precisions = [average_precision_score(labels == k, shares[:, k]) for k in there]
    assert list(metrics["roc_auc"].values()) == pytest.approx(areas)
    assert list(metrics["average_precision"].values()) == pytest.approx(precisions)
    assert metrics["macro_roc_auc"] == pytest.approx(np.mean(areas))
    assert metrics["mean_average_precision"] == pytest.approx(np.mean(precisions))
    json.dumps(metrics, allow_nan=False)


def test_all_metrics_of_several_labels_equal_scikit_learn():
    from sklearn.metrics import precision_recall_fscore_support, roc_auc_score

    rng = np.random.default_rng(0)
    labels = rng.random((300, 4)) < (0.5, 0.1, 0.9, 0)
    labels[:, 2] = True  # a label of every image has no ROC
    logits = rng.standard_normal((300, 4)) + labels
    metrics = compute_all_metrics(logits, labels, "abcd", num_draws=50)
    for average in ("macro", "weighted"):
        expected = precision_recall_fscore_support(labels[:, :3], logits[:, :3] > 0, average=average)
        for kind, value in zip(("precision", "recall", "f1"), expected[:3], strict=True):
            found = metrics[f"macro_{kind}"] if average == "macro" else metrics["weighted"][kind]
            assert found == pytest.approx(value)
    assert metrics["roc_auc"] == pytest.approx(
        {n: roc_auc_score(labels[:, k], logits[:, k]) for k, n in enumerate("ab")}
    )
    assert list(metrics["average_precision"]) == list("abc") and metrics["average_precision"]["c"] == 1
    names = {"exact_match", "macro_precision", "macro_recall", "macro_f1", "micro_f1", "macro_roc_auc", "loss"}
    assert set(metrics["intervals"]) == names | {"mean_average_precision"}
    for name, interval in metrics["intervals"].items():
        assert interval["low"] <= metrics[name] <= interval["high"]
    json.dumps(metrics, allow_nan=False)


def test_ranks_under_weights_equal_scikit_learn():
    """Ties, weights of zero, and classes that a weighting lacks."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    rng = np.random.default_rng(3)
    scores = np.round(rng.standard_normal((60, 3)), 1)
    truth = rng.random((60, 3)) < 0.3
    weights = rng.multinomial(60, np.full(60, 1 / 60), 5).astype("float32")
    weights[0, truth[:, 0]] = 0
    areas, precisions = rank_scores(scores, truth, weights)
    assert np.isnan(areas[0, 0]) and np.isnan(precisions[0, 0])
    for draw in range(1, 5):
        for k in range(3):
            pair = truth[:, k], scores[:, k]
            assert areas[draw, k] == pytest.approx(roc_auc_score(*pair, sample_weight=weights[draw]))
            expected = average_precision_score(*pair, sample_weight=weights[draw])
            assert precisions[draw, k] == pytest.approx(expected)
    assert np.isnan(rank_scores(scores, np.zeros((60, 3), bool), weights)[0]).all()


def test_bootstrap_intervals_equal_a_plain_bootstrap(answers, monkeypatch):
    """The multinomial over cells and the weights give what drawing images one by one gives."""
    from sklearn.metrics import f1_score

    logits, labels = answers
    metrics = compute_all_metrics(logits, labels, "abcdefg", num_draws=1500)
    chosen = logits.argmax(axis=1)
    rng = np.random.default_rng(5)
    draws = rng.integers(0, 500, (300, 500))
    plain = [f1_score(labels[rows], chosen[rows], average="macro", labels=range(6)) for rows in draws]
    found = metrics["intervals"]["macro_f1"]
    assert (found["low"], found["high"]) == pytest.approx(np.percentile(plain, (2.5, 97.5)), abs=0.012)
    assert found["method"] == "bootstrap" and metrics["intervals"]["accuracy"]["method"] == "wilson"
    losses = -np.log(softmax(logits)[np.arange(500), labels])
    plain = losses[rng.integers(0, 500, (1500, 500))].mean(axis=1)
    found = metrics["intervals"]["loss"]
    assert (found["low"], found["high"]) == pytest.approx(np.percentile(plain, (2.5, 97.5)), abs=0.02)
    assert metrics["bootstrap"] == {"num_draws": 1500, "num_rank_draws": 1500, "seed": 0}
    monkeypatch.setattr("vitreous.evaluation._CHUNK_SIZE", 500 * 7)  # a few draws at a time, to save memory
    again = compute_all_metrics(logits, labels, "abcdefg", num_draws=1500)["intervals"]
    for name, interval in metrics["intervals"].items():  # the same seed, the same interval, but for sums in float32
        assert [again[name][end] for end in ("low", "high")] == pytest.approx(
            [interval[end] for end in ("low", "high")], rel=1e-5
        )


def test_intervals_of_ranks_are_left_out_where_they_would_take_minutes(answers, monkeypatch):
    monkeypatch.setattr("vitreous.evaluation._MOST_WORK", 1e5)
    metrics = compute_all_metrics(*answers, "abcdefg")
    assert metrics["bootstrap"]["num_rank_draws"] == 0 and "macro_roc_auc" not in metrics["intervals"]
    assert metrics["macro_roc_auc"] > 0.5


def test_one_class_and_one_image():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = compute_all_metrics(np.array([[1.0, 0.0]]), np.array([0]), "ab", num_draws=10)
    assert metrics["macro_roc_auc"] is None and metrics["average_precision"] == {"a": 1.0}
    json.dumps(metrics, allow_nan=False)


# ----- views


def test_views():
    images = np.arange(2 * 4 * 4 * 1, dtype="uint8").reshape(2, 4, 4, 1)
    np.testing.assert_array_equal(make_view(images, (0, 0, True)), images[:, :, ::-1])
    down = make_view(images, (1, 0, False))
    np.testing.assert_array_equal(down[:, 1:], images[:, :-1])
    np.testing.assert_array_equal(down[:, 0], images[:, 1])  # the edge is a mirror that shows once
    left = make_view(images, (0, -1, False))
    np.testing.assert_array_equal(left[:, :, :-1], images[:, :, 1:])
    assert len(create_views(10)) == 10 and len({*create_views(10)}) == 10
    assert create_views(None) == ((0, 0, False),)
    for tta in (1, 11, "flop", 2.5):
        with pytest.raises(ConfigError, match=r"Expected flip, or 2 to 10 views\. Received: tta="):
            create_views(tta)


@pytest.mark.parametrize("is_multi_label", [False, True])
def test_the_mean_of_views(is_multi_label):
    weights = np.random.default_rng(0).standard_normal((16, 3))
    images = np.random.default_rng(1).integers(0, 255, (5, 4, 4, 1)).astype("uint8")

    def predict(batch):
        return batch.reshape(len(batch), -1) / 255 @ weights

    to_shares = sigmoid if is_multi_label else softmax
    views = create_views("flip")
    averaged = average_views(predict, views, is_multi_label=is_multi_label, temperature=2.0)
    expected = np.mean([to_shares(predict(make_view(images, view)) / 2) for view in views], axis=0)
    assert to_shares(averaged(images) / 2) == pytest.approx(expected, abs=1e-6)


# ----- slices and robustness, with a predict function that knows the answer


def test_slices():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    cameras = np.array(["left", "right"])[rng.integers(0, 2, 200)].astype(object)
    is_wrong = (cameras == "right") & (rng.random(200) < 0.5)
    cameras[:3] = ["", None, "left"]
    logits = np.eye(2)[labels ^ is_wrong]
    found = measure_slices(logits, labels, cameras, "ab")
    by_value = {row["value"]: row for row in found["slices"]}
    assert found["metric"] == "accuracy" and found["num_left_out"] == 0
    assert by_value["left"]["accuracy"] == 1 and by_value["(none)"]["num_examples"] == 2
    right = cameras == "right"
    assert by_value["right"]["accuracy"] == pytest.approx(1 - is_wrong[right].mean())
    assert by_value["right"]["num_examples"] == right.sum()
    low, high = by_value["right"]["interval"]
    assert low < by_value["right"]["accuracy"] < high
    assert found["slices"][0]["value"] == "right"  # the worst first
    cameras[3:5] = "(none)"  # what somebody wrote for nothing is not lost
    rows = measure_slices(logits, labels, cameras, "ab")["slices"]
    assert {row["value"]: row["num_examples"] for row in rows}["(none)"] == 4
    ages = rng.integers(0, 90, 200)
    quarters = measure_slices(logits, labels, ages.astype(str).astype(object), "ab")["slices"]  # as CSV has them
    assert len(quarters) == 4 and sum(row["num_examples"] for row in quarters) == 200
    assert all(40 <= row["num_examples"] <= 60 and row["value"].startswith("[") for row in quarters)
    many = measure_slices(logits, labels, np.array([f"p{i % 60}" for i in range(200)], object), "ab")
    assert len(many["slices"]) == 50 and many["num_left_out"] > 0
    several = measure_slices(logits, np.eye(2, dtype=bool)[labels], cameras, "ab")
    assert several["metric"] == "mean_average_precision" and "exact_match" in several["slices"][0]


def test_robustness_of_a_brightness_detector(tmp_path):
    """A classifier of light and dark images fails under brightness, and not under JPEG."""
    rng = np.random.default_rng(0)
    labels = np.arange(100) % 2
    arrays = (rng.integers(0, 30, (100, 12, 12, 3)) + 75 * labels[:, None, None, None] + 60).astype("uint8")
    images = ImageSet([str(i) for i in range(100)], labels, arrays=arrays)
    batches = []

    def predict(batch):
        assert batch.shape == (64, 12, 12, 3) and batch.dtype == np.uint8
        light = batch.mean(axis=(1, 2, 3)) - 112
        return np.stack([-light, light], axis=1)

    found = measure_robustness(
        predict,
        images,
        InputSpec(image_size=(12, 12)),
        ("dark", "light"),
        corruptions=["brightness", "jpeg_compression"],
        severities=[1, 5],
        on_batch=batches.append,
    )
    table = found["corruptions"]
    assert found["clean"] == 1 and found["num_examples"] == 100 and found["metric"] == "accuracy"
    assert table["jpeg_compression"] == {"1": 1.0, "5": 1.0, "mean": 1.0}
    assert table["brightness"]["1"] > table["brightness"]["5"] == 0.5
    assert found["mean"] == pytest.approx((table["brightness"]["mean"] + 1) / 2)
    assert found["groups"] == {"weather": table["brightness"]["mean"], "digital": 1.0}
    low, high = found["mean_interval"]
    assert low < found["mean"] < high
    assert sum(batches) == 5 * 100
    bad = ImageSet(["bad.png"], [0], root=tmp_path)
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"Cannot measure robustness\. .* Received: 1 that cannot\."):
        measure_robustness(predict, bad, InputSpec(image_size=(12, 12)), ("dark", "light"))


# ----- a run


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """400 images, light or dark, with a camera that darkens half of them."""
    root = tmp_path_factory.mktemp("table")
    rng = np.random.default_rng(0)
    lines = ["path,label,camera"]
    for i in range(400):
        is_light, is_old = i % 2, (i // 2) % 2
        pixels = rng.integers(0, 120, (8, 8, 3)) + 60 * is_light + 20 * is_old
        Image.fromarray(pixels.astype("uint8")).save(root / f"{i}.png")
        label = is_light if rng.random() < 0.85 else 1 - is_light  # what nobody can learn keeps answers from being sure
        lines.append(f"{i}.png,{('dark', 'light')[label]},{('new', 'old')[is_old]}")
    (root / "table.csv").write_text("\n".join(lines))
    return root / "table.csv"


@pytest.fixture(scope="module")
def run(table, tmp_path_factory):
    return vitreous.train(
        table,
        out=tmp_path_factory.mktemp("runs") / "run",
        model="vit_pico_patch4_32",
        image_size=(8, 8),
        num_channels=3,
        architecture={"num_blocks": 1},
        batch_size=32,
        epochs=2,
        val_fraction=0.2,
        test_fraction=0.3,
    )


def test_a_run_keeps_its_temperature(run):
    calibration = run.metrics["calibration"]
    assert calibration["is_fitted"] and calibration["fitted_on"] == "val" and calibration["num_examples"] == 80
    assert run.temperature == calibration["temperature"] != 1.0
    assert calibration["val"]["after"]["nll"] < calibration["val"]["before"]["nll"]
    assert calibration["test"]["before"]["nll"] == pytest.approx(run.metrics["test"]["loss"])
    assert (run.path / "reliability.png").is_file()
    assert "temperature" in (run.path / "README.md").read_text()


def test_evaluate_and_predict_apply_the_temperature(run, table):
    metrics = vitreous.evaluate(run, slice_by="camera", threshold=0.6)
    calibration = metrics["calibration"]
    assert metrics["accuracy"] == run.metrics["test"]["accuracy"]
    assert calibration["temperature"] == run.temperature
    assert calibration["after"] == run.metrics["calibration"]["test"]["after"]
    assert {row["value"] for row in metrics["slices"]["slices"]} == {"new", "old"}
    assert sum(row["num_examples"] for row in metrics["slices"]["slices"]) == metrics["num_examples"] == 120
    predictions = vitreous.predict(run, table, top_k=2, threshold=0.6)
    sure = np.array([p.probabilities[0] >= 0.6 for p in predictions])
    assert [p.is_sure for p in predictions] == sure.tolist()
    assert predictions[0].to_dict()["is_sure"] == bool(sure[0])
    assert vitreous.predict(run, [table.with_name("0.png")])[0].is_sure is None
    images = np.stack([np.asarray(Image.open(table.with_name(f"{i}.png"))) for i in range(4)])
    from vitreous.model import create_predict_function

    logits = create_predict_function(run.load_model(), run.input_spec)(images)
    expected = np.sort(softmax(logits / run.temperature), axis=1)[:, ::-1]
    assert np.array([p.probabilities for p in predictions[:4]]) == pytest.approx(expected, abs=1e-4)


def test_evaluate_takes_any_engine_and_draws(run, tmp_path):
    """A predict function of another kind goes the same way; it answers `light`, always."""
    progress = []
    metrics = vitreous.evaluate(
        run,
        predict=lambda batch: np.tile([[0.0, 1.0]], (len(batch), 1)),
        tta="flip",
        corruptions=["fog"],
        severities=[5, 2, 2],
        max_images=30,
        plots=tmp_path / "plots",
        on_progress=lambda done, total: progress.append((done, total)),
    )
    assert metrics["recall"] == {"dark": 0.0, "light": 1.0}
    assert metrics["tta"] == {"num_views": 2, "views": ["as it is", "as it is, mirrored"]}
    assert metrics["robustness"]["num_examples"] == 30 and metrics["robustness"]["severities"] == [2, 5]
    assert progress[-1] == (210, 210) and progress == sorted(progress)
    names = {"confusion", "reliability", "selection", "robustness", "corruptions"}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {f"{name}.png" for name in names}


def test_answers_that_are_no_logits_of_the_run(run):
    for answer, text in (
        (np.nan, r"Expected finite logits\. Received: NaN or infinity for \d+\.png\. The weights are damaged"),
        (np.zeros(3), r"Expected logits \(B, 2\), one for each class\. Received: logits of shape \('B', 3\)"),
    ):
        row = np.broadcast_to(answer, (len(answer) if np.ndim(answer) else 2,))
        with pytest.raises(WeightsError, match=text):
            vitreous.evaluate(run, predict=lambda batch, row=row: np.tile(row, (len(batch), 1)))


def test_evaluate_refuses(run):
    with pytest.raises(DataError, match=r"Expected a column 'site' .* Received: columns=\['camera'\]\."):
        vitreous.evaluate(run, slice_by="site")
    with pytest.raises(UnknownNameError, match=r"Received: corruption='frosty'\. Nearest: frost\."):
        vitreous.evaluate(run, corruptions=["frosty"])
    with pytest.raises(ConfigError, match=r"severities from 1 to 5\. Received: severity=7\."):
        vitreous.evaluate(run, severities=[7])
    with pytest.raises(ConfigError, match=r"Received: max_images=0\."):
        vitreous.evaluate(run, robustness=True, max_images=0)
    for call in (lambda: vitreous.evaluate(run, threshold=2), lambda: vitreous.predict(run, "x.png", threshold=2)):
        with pytest.raises(ConfigError, match=r"Expected a probability in \[0, 1\]\. Received: threshold=2\."):
            call()


def test_calibrate_a_run_again(run, table):
    before = (run.path / "metrics.json").read_text()
    assert run.is_trained_on(table) and not run.is_trained_on(run.config["data"]["name"])
    for split in ("train", "all"):
        with pytest.raises(ConfigError, match=rf"not trained on\. Received: split='{split}' of the data of training\."):
            calibrate_run(run, split=split)
    few = table.with_name("few.csv")
    few.write_text("path,label\n0.png,dark\n1.png,light\n")
    with pytest.raises(DataError, match=rf"2 {re.escape(str(few))} images, fewer than 50\. The run is as it was"):
        calibrate_run(run, few)
    assert (run.path / "metrics.json").read_text() == before
    old = {name: value for name, value in run.metrics.items() if name != "calibration"}
    (run.path / "metrics.json").write_text(json.dumps(old))
    loaded = vitreous.load_run(run.path)
    assert loaded.temperature == 1.0
    again = calibrate_run(loaded)
    assert again.temperature == pytest.approx(run.temperature, rel=1e-6)
    for temperature in (0, -1.0, "hot", float("inf")):
        spoiled = dataclasses.replace(run, metrics={"calibration": {"temperature": temperature}})
        with pytest.raises(RunError, match=r"Expected a temperature above 0 in metrics\.json\. Received: temperature="):
            _ = spoiled.temperature
    assert again.metrics["test"] == run.metrics["test"]
    assert again.metrics["calibration"]["test"]["after"]["nll"] == pytest.approx(
        run.metrics["calibration"]["test"]["after"]["nll"]
    )


def test_the_command_line(call, run, tmp_path):
    code, out, err = call(
        "evaluate",
        run.path,
        "--slice-by",
        "camera",
        "--corruptions",
        "fog,contrast",
        "--severities",
        "1,5",
        "--threshold",
        0.5,
        "--tta",
        2,
        "--json",
        tmp_path / "e.json",
    )
    assert code == 0, err
    for text in (
        "95% interval",
        "ROC-AUC",
        "temperature",
        "after",
        "camera",
        "old",
        "contrast",
        "Robust   mean",
        "asked for",
    ):
        assert text in out
    metrics = json.loads((tmp_path / "e.json").read_text())
    assert set(metrics["robustness"]["corruptions"]) == {"fog", "contrast"} and metrics["tta"]["num_views"] == 2
    image = run.config["data"]["root"].replace("table.csv", "0.png")
    _, out, _ = call("predict", run.path, image, "--threshold", 1)
    assert out.startswith(f"{image}: not sure: ")
    _, out, _ = call("predict", run.path, image, "--threshold", 1, "--csv", "--top-k", 1)
    assert out.splitlines()[0] == "image,is_sure,class_1,probability_1" and ",false," in out
    code, out, _ = call("calibrate", run.path)
    assert code == 0 and out.startswith("Sure     temperature ") and "reliability.png" in out
    for arguments, text in (
        (("--severities", "high"), "Cannot read --severities. Expected numbers from 1 to 5, with commas."),
        (("--json", "--tta"), "Expected a file, or - for standard output. Received: json='--tta'."),
        (("--tta", "flop"), "Expected flip, or 2 to 10 views. Received: tta='flop'."),
        (("--plots", image), "Cannot write pictures. Expected a folder."),
        (("--json", tmp_path / "no" / "e.json"), "Pass another --json."),
    ):
        code, _, err = call("evaluate", run.path, *arguments)
        assert code == 2 and text in " ".join(err.split())


def test_names_are_printed_as_they_are(capsys):
    """Column and class names that look like markup of the terminal stay text."""
    rng = np.random.default_rng(0)
    truth = rng.random((40, 2)) < 0.5
    logits = rng.standard_normal((40, 2)) + truth
    names = ("[red]x[/red]", "<b>\x1b[31m\n")
    calibration = compute_calibration(logits, truth)
    print_metrics(
        {
            "split": "test",
            **compute_all_metrics(logits, truth, names, num_draws=20),
            "calibration": {"temperature": 1.0, "before": calibration, "after": calibration},
            "selection": {"aurc": 0.2, "aurc_best": 0.1, "thresholds": {}},
            "slices": {"column": "[b]", **measure_slices(logits, truth, np.array(["[i]"] * 40, object), names)},
        }
    )
    out = capsys.readouterr().out
    for text in (
        "[red]x[/red]",
        r"<b>\x1b[31m\n",
        "[b]",
        "[i]",
        "no temperature",
        "all labels right, 95%",
        "F1 over all labels",
    ):
        assert text in out
    assert "\x1b" not in out


# ----- figures


def test_figures_refuse_what_cannot_be_drawn(tmp_path):
    with pytest.raises(ConfigError, match=r"Expected one or more bins with images\. Received: none\."):
        draw_reliability({"reliability": [], "ece": 0.0}, tmp_path / "r.png")
    for draw in (draw_reliability, draw_selection, draw_robustness):
        with pytest.raises(ConfigError, match=r"Expected a file name that ends in"):
            draw({}, tmp_path / "r.jpg")
    with pytest.raises(UnknownNameError, match="Received: corruption='rain'"):
        draw_corruptions(np.zeros((8, 8, 3), "uint8"), tmp_path / "c.png", corruptions=["rain"])
    grey = draw_corruptions(np.full((8, 12), 90, "uint8"), tmp_path / "c.png", corruptions=["snow"], severities=[1, 5])
    width, height = Image.open(grey).size
    assert width > 3 * 100 and height > 77
