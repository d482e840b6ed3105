"""From weights and from a teacher, the whole way: what is trained, refused, said and written down."""

import json
import tomllib

import numpy as np
import pytest
from PIL import Image

import vitreous
from vitreous.data import load_dataset
from vitreous.errors import ConfigError, RunError
from vitreous.training.distillation import load_teacher
from vitreous.training.progress import Reporter
from vitreous.training.recipe import OptimizerConfig
from vitreous.training.run import load_model
from vitreous.training.schedules import learning_rates

SMALL = {"model": "vit_pico_patch4_32", "image_size": (16, 16), "batch_size": 8, "num_channels": 3, "epochs": 1}
ARCHITECTURE = {"num_blocks": 1, "projection_dim": 32, "num_heads": 2, "mlp_dim": 32}


class Listener(Reporter):
    """Keeps what is said."""

    def __init__(self):
        self.said = []

    def note(self, text):
        self.said.append(text)

    warn = note


def write_images(root, names, size=16):
    rng = np.random.default_rng(0)
    for k, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 60, (size, size, 3)).astype("uint8")
            pixels[:, :, k] += 180
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "colours", ("red", "green", "blue"))


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "teacher"
    return vitreous.train(folder, out=out, architecture=ARCHITECTURE, **SMALL)


def ask(run, data, *, source=None, split=None, num_channels=3):
    """Returns a teacher for a source of images, and what was said."""
    listener = Listener()
    teacher = load_teacher(
        source or run.path,
        load_dataset(data, **(split or {})),
        num_channels=num_channels,
        dtype="float32",
        reporter=listener,
    )
    return teacher, listener.said


def test_a_student_of_a_run(run, folder, call, tmp_path):
    """Of another image size, with mixed images and another loss; a recipe's small images at first are left out."""
    arguments = ("--model", "vit_pico_patch4_32", "--image-size", "8", "--batch-size", "8", "--epochs", "1")
    code, out, err = call(
        "train", folder, "--out", tmp_path / "run", "--teacher", run.path, "--distillation.kind", "hard",
        "--distillation.weight", "0.8", "--loss", "focal", "--focal-gamma", "1", "--augment.mixup-alpha", "0.5",
        "--augment.crop-scale", "1", "1", *arguments, "--architecture.num-blocks", "1", "--recipe", "small32",
    )  # fmt: skip
    assert code == 0, err
    assert f"Teacher  {run.path}: vit_pico_patch4_32, 0." in out and "M parameters, 16x16 pixels" in out
    config = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert config["teacher"] == str(run.path) and config["recipe"]["small_fraction"] == 0
    assert config["recipe"]["distillation"] == {"kind": "hard", "temperature": 2.0, "weight": 0.8}
    assert (config["recipe"]["loss"], config["recipe"]["focal_gamma"]) == ("focal", 1.0)
    assert load_model(tmp_path / "run" / "model.keras").config.image_size == (8, 8)


def test_low_rank_updates_end_up_in_a_plain_model(run, folder, tmp_path):
    listener = Listener()
    optimizer = {"trained": "lora", "lora_rank": 2, "head_first_fraction": 0.4, "average_fraction": 0.0}
    small = {**SMALL, "model": None, "image_size": None, "epochs": 2}
    tuned = vitreous.train(
        folder, out=tmp_path / "run", pretrained=run.path, optimizer=optimizer, reporter=listener, **small
    )
    count = 2 * ((32 + 96) + (32 + 32) + (32 + 32) + (32 + 32)) + 32 * 3 + 3
    assert tuned.metrics["num_trained"] == count
    assert any(line.startswith(f"Trained  {count} weights (lora) of a model of ") for line in listener.said)
    model, before = tuned.load_model(), run.load_model()
    assert [v.path for v in model.weights] == [v.path for v in before.weights]
    moved = [
        a.path.split("/", 1)[1]
        for a, b in zip(model.weights, before.weights, strict=True)
        if not np.array_equal(a.numpy(), b.numpy())
    ]
    assert sorted(moved) == sorted(
        [f"block_0/{name}/kernel" for name in ("attention/qkv", "attention/projection", "mlp/hidden", "mlp/output")]
        + ["head/kernel", "head/bias"]
    )
    assert json.loads((tuned.path / "metrics.json").read_text())["num_parameters"] == run.metrics["num_parameters"]


def test_classes_are_matched_by_name(run, folder, tmp_path):
    teacher, said = ask(run, folder)
    assert teacher.order.tolist() == [0, 1, 2] and len(said) == 1
    config = (run.path / "config.toml").read_text()
    turned = tmp_path / "turned"
    turned.mkdir()
    for path in run.path.iterdir():
        (turned / path.name).write_bytes(path.read_bytes())
    names = '"blue",\n    "green",\n    "red",'
    assert names in config
    (turned / "config.toml").write_text(config.replace(names, '"red",\n    "blue",\n    "green",'))
    for source in (turned, turned / "model.keras"):
        assert ask(run, folder, source=source)[0].order.tolist() == [1, 2, 0]
    _, said = ask(run, folder, split={"seed": 7})
    assert any("was trained on colours" in line and "it may have seen some that this run" in line for line in said)
    (turned / "config.toml").unlink()
    teacher, said = ask(run, folder, source=turned / "model.keras")
    assert teacher.order.tolist() == [0, 1, 2]
    assert any("does not name its classes" in line and "blue, green, red." in line for line in said)


def test_teachers_that_are_refused(run, folder, tmp_path):
    other = write_images(tmp_path / "other", ("red", "green", "violet"))
    with pytest.raises(
        ConfigError, match=r"of the data's 3 classes\. Received: 3 classes, without violet, with blue\. Train one on"
    ):
        ask(run, other)
    with pytest.raises(ConfigError, match=r"Received: 3 classes, with blue\."):
        ask(run, write_images(tmp_path / "fewer", ("red", "green")))
    with pytest.raises(ConfigError, match=r"Expected a teacher for images of 4 channels\. Received: num_channels=3"):
        ask(run, folder, num_channels=4)
    model = vitreous.VisionTransformer(run.load_model().config.replace(num_classes=5), name="five")
    model.save(tmp_path / "five.keras")
    with pytest.raises(ConfigError, match=r"Expected a teacher of the data's 3 classes\. Received: num_classes=5\."):
        ask(run, folder, source=tmp_path / "five.keras")
    model = vitreous.VisionTransformer(run.load_model().config.replace(num_classes=0), name="none")
    model.save(tmp_path / "none.keras")
    with pytest.raises(ConfigError, match=r"Expected a classifier\. Received: num_classes=0, a model without a head"):
        ask(run, folder, source=tmp_path / "none.keras")
    (tmp_path / "config.toml").write_text("format = 1")
    with pytest.raises(RunError, match=r"missing model\.keras, metrics\.json"):
        ask(run, folder, source=tmp_path)
    table = tmp_path / "tags.csv"
    rows = [f"{folder}/{name}/{i}.png,{name}|other" for name in ("red", "green") for i in range(12)]
    table.write_text("\n".join(["path,tags", *rows]))
    with pytest.raises(ConfigError, match=r"images with several labels an image\. Received: one label an image\."):
        ask(run, table, split={"label_separator": "|"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"trained": "lora"}}, r"Cannot train low-rank updates\. .* Received: trained='lora', pre"),
        (
            {"optimizer": {"head_first_fraction": 0.2}},
            r"Cannot train the head first\. .* head_first_fraction=0\.2, pre",
        ),
        ({"distillation": {"weight": 0.2}}, r"Cannot learn from a teacher\. .* Received: weight=0\.2, teacher=None\."),
        ({"loss": "asymmetric"}, r"Cannot use the asymmetric loss\. Expected images with several labels\."),
    ],
)
def test_options_without_what_they_are_for(folder, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        vitreous.train(folder, out=tmp_path / "run", **SMALL, **changes)
    assert not list(tmp_path.iterdir())


def test_the_schedule_begins_after_the_head():
    plain = OptimizerConfig(warmup_fraction=0.1)
    config = plain.replace(head_first_fraction=0.2, head_first_rate=0.5)
    assert learning_rates(0.0, config) == learning_rates(0.199, config) == (0.5, 0.0)
    for progress in (0.0, 0.1, 0.6, 1.0):
        rate, body_rate = learning_rates(0.2 + 0.8 * progress, config)
        assert rate == body_rate == pytest.approx(learning_rates(progress, plain)[0])
    alone = config.replace(trained="head")
    assert learning_rates(0.1, alone) == learning_rates(0.1, plain.replace(trained="head"))
