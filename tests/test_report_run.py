"""The report of a run, and its model card: whole, escaped, small, and from nowhere else."""

import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
import yaml
from html_page import Page, assert_self_contained
from PIL import Image

import vitreous
from vitreous.errors import ConfigError, DataError, RunError
from vitreous.figures import draw_confusion
from vitreous.report import render_run
from vitreous.report.page import draw_inside
from vitreous.training import load_run
from vitreous.training.card import LIMITS_BEGIN, LIMITS_END, describe_limits, list_confusions, update_limits

HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a_b*c | {{ 7 * 7 }}")
SMALL = {
    "model": "vit_pico_patch4_32",
    "image_size": (8, 8),
    "num_channels": 3,
    "architecture": {"num_blocks": 1},
    "batch_size": 32,
}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """240 images of three brightnesses, whose classes and files have names that would like to run."""
    root = tmp_path_factory.mktemp("table") / "photos"
    root.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i in range(240):
        pixels = rng.integers(0, 90, (8, 8, 3)) + 55 * (i % 3)
        name = f"{i}<script>alert(1)<script> & '.png"
        Image.fromarray(pixels.astype("uint8")).save(root / name)
        label = i % 3 if rng.random() < 0.8 else (i + 1) % 3  # what nobody can learn keeps answers from being sure
        rows.append({"path": name, "label": HOSTILE[label]})
    (root / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root / "table.jsonl"


@pytest.fixture(scope="module")
def run(table, tmp_path_factory):
    return vitreous.train(
        table, out=tmp_path_factory.mktemp("runs") / "run", epochs=2, val_fraction=0.25, test_fraction=0.3, **SMALL
    )


@pytest.fixture(scope="module")
def written(run):
    return vitreous.write_report(run, robustness=True, max_images=6, num_examples=4)


@pytest.fixture(scope="module")
def html(written):
    return written.path.read_text(encoding="utf-8")


def test_report_says_what_was_measured(written, html, run):
    assert written.path == run.path / "report.html"
    assert written.num_bytes == written.path.stat().st_size < 500_000
    page, metrics = Page(html), written.facts.metrics
    assert metrics["accuracy"] == run.metrics["test"]["accuracy"]
    assert metrics["calibration"]["after"] == run.metrics["calibration"]["test"]["after"]
    for name in ("accuracy", "macro_f1", "macro_roc_auc"):
        assert f"{metrics[name]:.2%}" in page.text
    low, high = (100 * metrics["intervals"]["accuracy"][key] for key in ("low", "high"))
    assert f"{low:.2f} to {high:.2f}%" in page.text
    assert f"Temperature {run.temperature:.3f}" in page.text
    assert f"{written.facts.robustness['mean']:.1%} under 15 common corruptions" in page.text
    assert f"{metrics['num_examples']} test images" in page.text
    assert run.config["data"]["fingerprint"] in page.text
    assert "vitreous.train(...)" in page.text and "vitreous report" in page.text
    ids = {attributes["id"] for tag, attributes in page.tags if tag == "section" and "id" in attributes}
    assert {"data", "training", "answers", "sureness", "robustness", "mistakes", "unsure", "speed", "again"} <= ids


def test_report_needs_nothing_from_elsewhere(html):
    page = assert_self_contained(html)
    for tag, attributes in page.tags:
        if tag == "img":
            assert attributes["alt"]
        if tag == "svg":
            assert attributes["role"] == "img" and attributes["aria-label"]
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
    assert [tag for tag, _ in page.tags].count("h1") == 1


def test_hostile_names_are_text(html):
    page = Page(html)
    assert "<script" not in html and "<img src=x" not in html
    for name in (HOSTILE[0], HOSTILE[1], HOSTILE[2], "<script>alert(1)<script> & '.png"):
        assert name in page.text


def test_examples_are_the_worst_and_the_least_sure(written, html):
    facts = written.facts
    answers = facts.answers
    wrong = answers.confidence[~answers.is_right]
    assert len(facts.mistakes) == 4 and len(facts.unsure) == 2
    shown = [case.answers[0][1] for case in facts.mistakes]
    assert shown == pytest.approx(sorted(wrong, reverse=True)[:4])
    taken = {case.name for case in facts.mistakes}
    names = [answers.images.names[i] for i in answers.indices]
    rest = [confidence for confidence, name in zip(answers.confidence, names, strict=True) if name not in taken]
    assert [case.answers[0][1] for case in facts.unsure] == pytest.approx(sorted(rest)[:2])
    for case in facts.mistakes:
        assert case.truths[0] != case.answers[0][0] == case.explained and not case.is_right
        assert case.explanation.class_name == case.explained and case.explanation.map.shape == (2, 2)
    uris = re.findall(r'<img[^>]*src="data:image/webp;base64,([^"]+)"', html)
    images = [Image.open(io.BytesIO(base64.b64decode(uri))).size for uri in uris]
    assert images == [(8, 8), (128, 128)] * 6


def test_table_of_confusions_is_the_matrix(written, html):
    matrix = np.array(written.facts.metrics["confusion_matrix"])
    body = re.search(r'aria-label="Confusion matrix">(.*?)</table>', html, flags=re.DOTALL)[1]
    cells = re.findall(r'<td class="[^"]*" style="[^"]*" title="[^"]*">(\d+)</td>', body)
    assert [int(cell) for cell in cells] == matrix.ravel().tolist()


def test_pages_are_the_same_each_time(written, html):
    assert render_run(written.facts) == html


def test_card_is_read_by_the_hub(run):
    _, block, body = (run.path / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    card = yaml.safe_load(block)
    assert card["library_name"] == "keras" and "vision-transformer" in card["tags"]
    assert "license" not in card  # trained from nothing: it is its owner's to choose
    (entry,) = card["model-index"]
    assert entry["name"] == "run"
    assert [result["dataset"]["split"] for result in entry["results"]] == ["test", "validation"]
    values = {metric["type"]: metric["value"] for metric in entry["results"][0]["metrics"]}
    assert values["accuracy"] == pytest.approx(run.metrics["test"]["accuracy"], abs=1e-6)
    assert values["f1"] == pytest.approx(run.metrics["test"]["macro_f1"], abs=1e-6)
    assert "\\<script\\>alert(1)\\</script\\>" in body and "<script>" not in body
    for heading in ("## Intended use", "## Limits", "## Files"):
        assert heading in body


def test_card_names_measured_limits(run, written):
    text = (run.path / "README.md").read_text(encoding="utf-8")
    limits = text.partition(LIMITS_BEGIN)[2].partition(LIMITS_END)[0]
    metrics, table = written.facts.metrics, written.facts.robustness
    assert written.has_card
    assert f"{metrics['num_examples']} test images of the same source" in limits
    assert f"from {table['clean']:.1%} to {table['mean']:.1%} on average, on 6 images" in limits
    _, _, count, total = list_confusions(metrics, run.class_names, most=1)[0]
    assert f"{count} of {total} images" in limits
    before = describe_limits(run.metrics, run.class_names)
    assert any("not measured (`vitreous report RUN --robustness`)" in line for line in before)
    assert describe_limits({}, ()) == [
        "- Nothing was measured: there were no labelled images beside those of training."
    ]


def test_a_card_without_marks_is_left_alone(run, tmp_path):
    assert update_limits("# mine", ["- a"]) is None
    assert update_limits(f"a\n{LIMITS_BEGIN}\n- old\n{LIMITS_END}\nb", ["- new"]) == (
        f"a\n{LIMITS_BEGIN}\n- new\n{LIMITS_END}\nb"
    )


def test_licence_of_the_weights_goes_into_the_card(run):
    from vitreous.training.card import describe_results
    from vitreous.training.fit import History

    def read(source):
        text = describe_results(run.path, run.path, {**run.config, "pretrained": source}, run.metrics, History())
        return yaml.safe_load(text.split("---\n", 2)[1])

    card = read("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    assert card["license"] == "apache-2.0" and card["base_model"] == "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    card = read("timm/vit_small_patch16_dinov3.lvd1689m")
    assert card["license"] == "other" and card["license_name"] == "dinov3-license"
    card = read("weights/mine.safetensors")
    assert "license" not in card and "base_model" not in card


def test_report_of_other_images(run, table, tmp_path):
    folder = tmp_path / "new"
    (folder / "HOSTILE").mkdir(parents=True)
    rows = [json.loads(line) for line in table.read_text().splitlines()[:9]]
    for row in rows:
        shutil.copy(table.parent / row["path"], folder / row["path"])
    (folder / row["path"]).write_bytes(b"no image")
    (folder / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    card = (run.path / "README.md").read_text(encoding="utf-8")
    written = vitreous.write_report(run, folder / "new.jsonl", out=tmp_path / "page.html", num_examples=0)
    page = assert_self_contained(written.path.read_text(encoding="utf-8"))
    assert "Measured on 8 images" in page.text and "Not measured." in page.text
    assert "have under 30 test images" in page.text
    assert "1 images could not be read" in page.text
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert (run.path / "README.md").read_text(encoding="utf-8") == card


def test_data_that_are_gone_or_changed_are_said(run, tmp_path):
    moved = shutil.copytree(run.path, tmp_path / "moved")
    config = moved / "config.toml"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace(run.config["data"]["fingerprint"], "0" * 64), encoding="utf-8")
    from vitreous.report.run import _check_data

    inspection, note = _check_data(load_run(moved), is_whole=True)
    assert note.startswith("The data have changed since training") and inspection.is_whole
    config.write_text(text.replace(run.config["data"]["root"], str(tmp_path / "gone.csv")), encoding="utf-8")
    inspection, note = _check_data(load_run(moved), is_whole=False)
    assert inspection is None and "The training data were not looked at: " in note and "gone.csv" in note


def test_several_labels_an_image(run, table, tmp_path):
    several = shutil.copytree(run.path, tmp_path / "several")
    config = (several / "config.toml").read_text(encoding="utf-8")
    config = config.replace("is_multi_label = false", "is_multi_label = true").replace(
        json.dumps(run.config["data"]["root"]), '"(from Python)"'
    )
    (several / "config.toml").write_text(config, encoding="utf-8")
    (several / "metrics.json").write_text(json.dumps({**run.metrics, "calibration": {}}))
    with pytest.raises(DataError, match=r"this run was trained on a Dataset made in Python"):
        vitreous.write_report(several)
    rows = [json.loads(line) for line in table.read_text().splitlines()[:20]]
    rows = [{"path": row["path"], "label": [row["label"], HOSTILE[0]][: i % 3]} for i, row in enumerate(rows)]
    (table.parent / "several.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    written = vitreous.write_report(several, table.parent / "several.jsonl", num_examples=20)
    page = assert_self_contained(written.path.read_text(encoding="utf-8"))
    assert "mean average precision" in page.text and "all labels right" in page.text
    assert "handed over in Python" in page.text and "looked at: " in page.text and "(none)" in page.text
    assert "What is taken for what" not in page.text
    assert "No temperature: probabilities are those of training" in page.text


def test_a_figure_of_many_classes_takes_the_colours_of_the_page(tmp_path):
    names = [f"<b>{k}" for k in range(30)]
    figures = [draw_inside(lambda out: draw_confusion(np.eye(30, dtype=int), names, out), name="n", alt="a & b")] * 2
    assert figures[0] == figures[1]
    assert "var(--ink)" in figures[0] and "#222222" not in figures[0] and "<b>" not in figures[0]
    assert 'aria-label="a &amp; b"' in figures[0] and "://" not in figures[0] and "<metadata" not in figures[0]
    used = set(re.findall(r'href="#([^"]+)"', figures[0])) | set(re.findall(r"url\(#([^)]+)\)", figures[0]))
    assert used == set(re.findall(r'\bid="([^"]+)"', figures[0]))


def test_errors(run, tmp_path):
    with pytest.raises(ConfigError, match=r"Cannot write the report\. Expected the path of a file .* no folder"):
        vitreous.write_report(run, out=tmp_path / "none" / "page.html")
    with pytest.raises(ConfigError, match=r"num_examples=101\. Leave them out"):
        vitreous.write_report(run, num_examples=101)
    with pytest.raises(RunError, match="Cannot load the run"):
        vitreous.write_report(tmp_path)


def test_command_line(call, run, tmp_path):
    code, out, _ = call("report", run.path, "--out", tmp_path / "page.html", "--num-examples", "1")
    assert code == 0
    assert out.splitlines()[0].startswith("Test     accuracy ")
    assert re.fullmatch(rf"Report   {re.escape(str(tmp_path))}/page\.html \(\d+ KB, \d+\.\d s\)", out.splitlines()[1])
    assert "--num-examples 1" in (tmp_path / "page.html").read_text()
    code, out, err = call("report", run.path, "--out", tmp_path / "no" / "page.html")
    assert code == 2 and out == "" and "Expected the path of a file in a folder that exists" in err
