import importlib.util
import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vitreous

VITREOUS = [sys.executable, "-m", "vitreous"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")}


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    return vitreous.train("digits", out=tmp_path_factory.mktemp("runs") / "digits", epochs=1).path


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 48, 3)).astype("uint8")).save(path)
    return path


def fails(result, text):
    """Asserts one clear line on standard error and exit code 2."""
    code, out, err = result
    assert code == 2
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith(("Backend", "Engine"))]
    assert len(lines) == 1, err
    assert lines[0].startswith("Error: ")
    assert text in lines[0]


def test_help_is_quick_and_light():
    start = time.monotonic()
    result = subprocess.run([*VITREOUS, "--help"], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert time.monotonic() - start < 2  # 0.25 s on a quiet machine; see docs/log.md
    for command in ("train", "evaluate", "predict", "patches", "models", "recipes"):
        assert command in result.stdout


def test_help_teaches(call):
    code, out, _ = call("train", "--help")
    assert code == 0
    for text in (
        "--optimizer.learning-rate",
        "--augment.crop-scale",
        "--time",
        "Peak learning rate",
        "--epochs",
        "--seed",
    ):
        assert text in out
    assert "empty" not in out


def test_version(call):
    assert call("--version")[1].strip() == vitreous.__version__


def test_train_evaluate_predict(call, tmp_path, image):
    out = tmp_path / "run"
    code, text, err = call("train", "digits", "--epochs", 1, "--out", out, "--optimizer.learning-rate", "1e-3")
    assert code == 0, err
    assert "Backend  jax" in err
    assert "Test     accuracy" in text
    assert f"vitreous predict {out}" in text
    assert f"Report   {out}/report.html (" in text and (out / "report.html").is_file()
    code, text, _ = call("evaluate", out, "--json", "-")
    assert json.loads(text)["accuracy"] == json.loads((out / "metrics.json").read_text())["test"]["accuracy"]
    code, text, _ = call("predict", out, image, "--top-k", 3)
    assert code == 0
    assert text.startswith(f"{image}: ")
    assert text.count("%") == 3


def test_evaluate_prints_a_table(call, digits_run):
    code, out, _ = call("evaluate", digits_run)
    assert code == 0
    assert "Test     accuracy" in out
    assert "top-5 accuracy" in out and "95% interval" in out
    classes = [line.split()[0] for line in out.splitlines() if line.count("%") == 7]
    assert classes == list("0123456789")


def test_predict_formats(call, digits_run, image, tmp_path):
    _, out, _ = call("predict", digits_run, image, image, "--json", "--top-k", 2)
    rows = json.loads(out)
    assert [row["image"] for row in rows] == [str(image)] * 2
    assert len(rows[0]["predictions"]) == 2
    _, out, _ = call("predict", digits_run, image, "--csv", "--top-k", 2)
    assert out.splitlines()[0] == "image,class_1,probability_1,class_2,probability_2"
    target = tmp_path / "answers.csv"
    _, out, err = call("predict", digits_run, image, "--csv", "--out", target)
    assert out == ""
    assert len(target.read_text().splitlines()) == 2
    assert f"Wrote {target}" in err
    assert "Received: both" in call("predict", digits_run, image, "--csv", "--json")[2]


def test_predict_leaves_out_what_a_folder_has_broken(call, digits_run, image, tmp_path):
    whole = Path(image).read_bytes()
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.png").write_bytes(whole)
    (folder / "b.png").write_bytes(whole[: len(whole) // 2])
    code, out, err = call("predict", digits_run, folder)
    assert code == 0 and len(out.splitlines()) == 1 and "a.png" in out
    assert "Warning: left out " in err and "b.png: a truncated image" in err
    fails(call("predict", digits_run, folder / "b.png"), "b.png")


def test_patches(call, image, tmp_path):
    out = tmp_path / "patches.png"
    code, text, _ = call("patches", image, "--patch-size", "8", "--out", out)
    assert (code, text) == (0, f"Wrote {out}\n")
    assert Image.open(out).format == "PNG"
    assert call("patches", image, "--patch-size", "16x8", "--strides", "4", "--padding", "same", "--out", out)[0] == 0
    fails(call("patches", image, "--patch-size", "0", "--out", tmp_path / "b.png"), "patch-size='0'")
    fails(call("patches", image, "--patch-size", "64", "--out", tmp_path / "b.png"), "at least (64, 64) pixels")
    fails(call("patches", tmp_path / "none.png", "--out", tmp_path / "b.png"), "none.png")
    assert not (tmp_path / "b.png").exists()


def test_models(call):
    code, out, _ = call("models", "vit_tiny*")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == ["model", "parameters", "MACs", "input", "tokens", "weights"]
    assert any(line.split() == ["vit_tiny_patch16_224", "5.72M", "1.25G", "224x224", "197", "2"] for line in lines)
    assert "vit_tiny_patch4_32" in out
    assert "vit_tiny_patch4_32" not in call("models", "vit_tiny*", "--pretrained")[1]
    rows = json.loads(call("models", "base", "--json")[1])
    assert all("base" in row["name"] for row in rows)
    fails(call("models", "vit_tinny_patch16_224"), "Nearest: vit_tiny_patch16_224")


def test_models_shows_one_whole(call):
    code, out, _ = call("models", "vit_base_patch16_clip_384")
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "Model    vit_base_patch16_clip_384"
    assert "86.86M parameters" in lines[2] and "1000 classes" in lines[2]
    assert lines[4] == "Special  use_patch_bias=False, use_pre_norm=True, epsilon=1e-05"
    assert lines[5].startswith("Input    384x384 pixels, bicubic, squashed to a square, centre crop of 1, mean 0.4815")
    assert lines[7].split() == [
        "laion2b_ft_in12k_in1k",
        "1000",
        "apache-2.0",
        "timm/vit_base_patch16_clip_384.laion2b_ft_in12k_in1k",
    ]
    out = call("models", "vit_base_patch16_224.bamboo")[1]
    assert "115217 classes" in out and "not stated" in out
    assert "none published" in call("models", "vit_nano_patch4_32")[1]
    (row,) = json.loads(call("models", "vit_base_patch16_224.mae", "--json")[1])
    assert (row["config"]["num_classes"], row["weights"][0]["license"]) == (0, "cc-by-nc-4.0")
    assert row["input"]["mean"] == [0.485, 0.456, 0.406]
    fails(call("models", "vit_base_patch16_224.mea"), "Unknown tag. Received: tag='mea'. Nearest: mae")


def test_recipes(call):
    code, out, _ = call("recipes")
    assert code == 0
    assert out.splitlines()[0].startswith("digits")
    assert "accuracy 99.17%" in out
    assert "not measured" not in out
    code, out, _ = call("recipes", "digits", "--json")
    (row,) = json.loads(out)
    assert (row["name"], row["hardware"]) == ("digits", "2 cores of an AMD EPYC (Zen 5)")
    fails(call("recipes", "digit"), "Unknown recipe. Received: recipe='digit'. Nearest: digits")


def test_find_lr_and_tune(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("--batch", 32, "--architecture.num-blocks", 1, "--architecture.projection-dim", 16)
    code, out, _ = call("find-lr", "digits", "--num-steps", 20, *options)
    assert code == 0
    assert "Recipe   digits has 0.004" in out
    (line,) = (line for line in out.splitlines() if line.startswith("Use it"))
    suggestion = json.loads(Path("find-lr.json").read_text())["suggestion"]
    assert line.endswith(f"vitreous train digits ... --optimizer.learning-rate {suggestion:g}")
    fails(call("find-lr", "digits", "--out", "find-lr.txt"), "Expected a file name that ends in .png, .svg, .pdf")
    fails(call("tune", "digits", "--out", "t"), "Cannot tune without an end")
    fails(call("tune", "digits", "--out", "t", "--time", "1h", "--val-fraction", 0), "Pass a val_fraction above 0")
    fails(call("train", "digits", "--track", "tensorbord"), "--track")
    fails(call("train", "digits", "--batch", "huge"), "--batch")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """24 images of two colours in a table with columns of unusual names."""
    root = tmp_path_factory.mktemp("table")
    lines = ["photo;colour;camera"]
    for i in range(24):
        pixels = np.full((8, 8, 3), 20, "uint8")
        pixels[..., i % 2] += np.uint8(100 + i)
        Image.fromarray(pixels).save(root / f"{i}.png")
        lines.append(f"{i}.png;{('red', 'green')[i % 2]};c{i // 2}")
    (root / "colours.csv").write_text("\n".join(lines))
    return root / "colours.csv"


def test_a_table_from_training_to_prediction(call, table, tmp_path):
    small = ["--model", "vit_pico_patch4_32", "--image-size", "8", "--epochs", 1, "--batch-size", 8]
    columns = ["--label-column", "colour", "--group-column", "camera"]
    out = tmp_path / "folds"
    code, text, err = call("train", table, *small, *columns, "--folds", 2, "--out", out)
    assert code == 0, err
    assert "Fold     2 of 2" in text and "images: column photo" in text
    assert "Test     accuracy" in text and " ± " in text and f"Look at  {out}/README.md" in text
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["test"]["num_examples"] == 24 and len(metrics["test"]["accuracy"]["values"]) == 2
    measured = json.loads(call("evaluate", out / "fold-2", "--json", "-")[1])
    assert measured["accuracy"] == metrics["test"]["accuracy"]["values"][1] and measured["split"] == "test"
    other = table.with_name("other.csv")
    other.write_text("image,truth\n0.png,red\n1.png,green\n")
    measured = json.loads(call("evaluate", out / "fold-2", other, "--json", "-", "--label-column", "truth")[1])
    assert measured["num_examples"] == 2
    fails(call("evaluate", out / "fold-2", other), "Expected a column 'colour' for the labels")
    _, text, _ = call("predict", out / "fold-1", table, "--csv")
    assert [line.split(",")[0] for line in text.splitlines()[1:]] == [f"{i}.png" for i in range(24)]
    other.write_text("x,y\n0.png,1.png\n")
    fails(call("predict", out / "fold-1", other), "Name it with image_column (--image-column)")
    assert call("predict", out / "fold-1", other, "--image-column", "y")[1].startswith("1.png: ")
    fails(call("train", table, *small, *columns, "--folds", 2, "--out", out), "fold-1, which exists")
    fails(call("train", table, "--out", tmp_path / "x"), "which column holds the labels")
    fails(call("train", "digits", "--folds", 3, "--out", tmp_path / "x"), "Expected data that is not split")
    fails(call("train", table, *columns, "--folds", 3, "--fold", 4, "--out", tmp_path / "x"), "a fold from 1 to 3")


def test_wrong_input_is_one_line(call, digits_run, tmp_path, image):
    empty, single, images = tmp_path / "empty", tmp_path / "single", tmp_path / "images"
    empty.mkdir()
    (single / "one").mkdir(parents=True)
    (single / "one" / "a.png").write_bytes(image.read_bytes())
    images.mkdir()
    (images / "a.png").write_bytes(image.read_bytes())
    out = ["--out", tmp_path / "run"]
    fails(call("train", tmp_path / "nowhere", *out), "nowhere")
    fails(call("train", "digit", *out), "digits")
    fails(call("train", empty, *out), "empty folder")
    fails(call("train", single, *out), "at least two classes")
    fails(call("train", images, *out), "no class folder")
    fails(call("train", "digits", "--model", "vit_tiny_patch16_242", *out), "Nearest: vit_tiny_patch16_224")
    fails(call("train", "digits", "--image-size", "9", *out), "divisible by the patch size")
    fails(call("train", "digits", "--image-size", "big", *out), "image-size='big'")
    fails(call("train", "digits", "--epoch", "3", *out), "Did you mean --epochs")
    fails(call("train", "digits", "--epochs", "three", *out), "three")
    fails(call("train", "digits", "--backend", "numpy", *out), "numpy")
    fails(call("train"), "Cannot train. Expected data")
    fails(call("trian"), 'Did you mean "train"')
    fails(call("evaluate", tmp_path / "nowhere"), "nowhere")
    fails(call("evaluate", empty), "missing model.keras")
    fails(call("predict", digits_run, tmp_path / "none.png"), "none.png")
    (tmp_path / "text.png").write_text("no image")
    fails(call("predict", digits_run, image, tmp_path / "text.png"), "text.png")
    fails(call("predict", digits_run, empty), "empty")
    fails(call("predict", empty, image), "missing model.keras")
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.glob(".run*"))


def test_live_bar_in_a_terminal(tmp_path):
    """In a terminal there is a bar with loss, accuracy, speed and time left, and rows stay above it."""
    main_end, process_end = pty.openpty()
    process = subprocess.Popen(
        [*VITREOUS, "train", "digits", "--no-report", "--epochs", "2", "--out", str(tmp_path / "run")],
        stdout=process_end,
        stderr=process_end,
        env={**ENVIRONMENT, "TERM": "xterm-256color", "COLUMNS": "110"},
    )
    os.close(process_end)
    output = b""
    while True:
        try:
            chunk = os.read(main_end, 4096)
        except OSError:  # the other end is closed
            break
        output += chunk
        if not chunk:
            break
    os.close(main_end)
    assert process.wait() == 0
    text = output.decode()
    for part in ("img/s", "left", "loss", "acc", "train"):
        assert part in text
    assert "epoch   2" in text
    assert "Test     accuracy" in text


def test_data_options_everywhere(call, table, tmp_path):
    """inspect and augment read tables as train does; what is said of the data is printed."""
    code, out, err = call("inspect", table, "--label-column", "colour", "--group-column", "camera", "--seed", 3)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].startswith("Data     colours: 2 classes; images: ")
    assert lines[1].startswith("         ") and "column photo" in lines[1]
    assert "drawn by whole groups of camera with seed 3" in out
    picture = tmp_path / "a.png"
    assert call("augment", table, "--label-column", "colour", "--recipe", "digits", "--out", picture)[0] == 0
    assert picture.exists()
    fails(call("augment", table, "--out", picture), "which column holds the labels")
    fails(call("inspect", table), "which column holds the labels")


def test_help_names_every_source(call):
    from vitreous.data import BUILT_IN

    for command in ("train", "pretrain", "evaluate", "report", "predict", "inspect", "augment"):
        text = " ".join(call(command, "--help")[1].replace("│", " ").split())
        for source in ("zip or tar", ".parquet", "WebDataset", "save_to_disk", "URL", *BUILT_IN):
            assert source in text, (command, source)


def test_names_cannot_steer_the_terminal(call, digits_run, image, tmp_path):
    name = "a\nb\x1b[31mred.png"
    (tmp_path / name).write_bytes(image.read_bytes())
    code, out, _ = call("predict", digits_run, tmp_path / name, "--top-k", 1)
    assert code == 0
    assert len(out.splitlines()) == 1 and out.startswith(f"{tmp_path}/a\\nb\\x1b[31mred.png: ")
    (tmp_path / name).write_bytes(b"no image")
    code, _, err = call("predict", digits_run, tmp_path / name)
    assert code == 2 and "\x1b" not in err


def test_training_leaves_tensorflow_alone(tmp_path):
    """Keras imports it to save a model, wherever it is installed: seconds, and log lines in the output."""
    if importlib.util.find_spec("tensorflow") is None:
        pytest.skip("needs TensorFlow beside jax")
    out = str(tmp_path / "run")
    code = f"""
import sys
from vitreous.cli import main
try:
    main(["train", "digits", "--no-report", "--epochs", "1", "--backend", "jax", "--out", {out!r}])
finally:
    print("loaded", "tensorflow" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "loaded False" in result.stdout
    assert "oneDNN" not in result.stderr
