"""What a training run will do: its recipe settled for the data, its model, and all of it in words."""

import dataclasses
import hashlib
import importlib
import platform
import shlex
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import keras
import numpy as np

from vitreous import __version__
from vitreous.data import BUILT_IN, Dataset, ImageSet, Loader
from vitreous.data.inspection import inspect_fast
from vitreous.data.sources import source_path
from vitreous.errors import ConfigError, ImageError, MissingPathError
from vitreous.registry import count_parameters, get_spec
from vitreous.spec import DataConfig, InputSpec, ModelSpec
from vitreous.training.distribute import Layout
from vitreous.training.losses import Loss, create_loss
from vitreous.training.progress import Reporter
from vitreous.training.recipe import Recipe, choose_recipe, load_recipe
from vitreous.training.run import FORMAT, partial_folder
from vitreous.weights import import_weights


def split_options(
    data: str | Path | Dataset, seed: int, changes: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the options that decide how data are read and split, as they were resolved, and the other changes."""
    names = {field.name for field in dataclasses.fields(DataConfig)}
    given = {name: value for name, value in changes.items() if name in names and value is not None}
    if isinstance(data, Dataset) and given:
        raise ConfigError(
            f"Cannot split the data set {data.name}. Expected no options of the data beside a Dataset. "
            f"Received: {', '.join(given)}. Pass them to load_dataset."
        )
    config = DataConfig.from_dict(given)
    return {"seed": seed, **without_none(config.to_dict())}, {k: v for k, v in changes.items() if k not in names}


def take_auto_batch(changes: Mapping[str, Any]) -> tuple[bool, dict[str, Any]]:
    """Returns whether the batch is to be found by trying, and the changes without that wish."""
    is_auto = changes.get("batch_size") == "auto"
    return is_auto, {key: value for key, value in changes.items() if not (is_auto and key == "batch_size")}


def is_rate_given(changes: Mapping[str, Any]) -> bool:
    """Whether the changes name a learning rate: it is then kept, whatever the batch."""
    return "learning_rate" in (changes.get("optimizer") or {})


def settle_recipe(
    recipe: str | Path | Recipe | None,
    dataset: Dataset,
    changes: Mapping[str, Any],
    *,
    pretrained: str | Path | None = None,
) -> tuple[str, Recipe]:
    """Returns the recipe's name and the recipe with all changes in it.

    Without a recipe: `finetune` for weights to start from that know classes; else the one that suits the data, also for
    an encoder that `pretrain` left, since all that classes need has still to be learnt.
    """
    is_from_encoder = recipe is None and pretrained is not None and _is_encoder(pretrained)
    if recipe is None and pretrained is not None and not is_from_encoder:
        recipe = "finetune"
    if isinstance(recipe, Recipe):
        name, base = "(from Python)", recipe
    else:
        train_images = dataset.splits["train"]
        known = dataset.name if dataset.root is None else ""
        name = str(recipe or choose_recipe(known, _median_side(train_images), len(train_images)))
        base = load_recipe(recipe or name)
    if is_from_encoder:
        base = dataclasses.replace(base, architecture={})  # the model is that of the weights
    changes = {key: value for key, value in changes.items() if value is not None}
    if "model" in changes and changes["model"] != base.model and "image_size" not in changes:
        changes["image_size"] = None  # the recipe's size was meant for the recipe's model
    return name, base.merge(changes)


def _is_encoder(source: str | Path) -> bool:
    """Whether weights are those of a run of `pretrain`."""
    path = Path(source) / "config.toml"
    if not path.is_file():
        return False
    try:
        return tomllib.loads(path.read_text(encoding="utf-8")).get("task") == "pretrain"
    except (OSError, ValueError):
        return False  # reading the weights themselves says what is wrong


def fit_to_images(recipe: Recipe, num_images: int, layout: Layout | None = None) -> Recipe:
    """Returns the recipe with a batch that the images fill, and with epochs where it has neither them nor a time.

    Raises:
        ConfigError: If the devices of the layout cannot share the batch equally, or processes would need one clock.
    """
    layout = layout or Layout()
    if num_images < recipe.batch_size:
        unit = recipe.num_parts * layout.unit
        batch_size = max(num_images // unit, 1) * unit
    else:
        batch_size = recipe.batch_size
    layout.check_batch(batch_size, recipe.num_parts)
    if layout.num_processes > 1 and recipe.time is not None:
        raise ConfigError(
            f"Cannot train for a time in {layout.num_processes} processes. Expected epochs: the learning rate would "
            f"follow the clock of each. Received: time={recipe.time!r}. Pass --epochs."
        )
    epochs = recipe.epochs
    if recipe.epochs is None and recipe.time is None:
        epochs = max(round(recipe.num_examples_seen / num_images), 1)
    return dataclasses.replace(recipe, batch_size=batch_size, epochs=epochs)


def training_loader(
    images: ImageSet,
    input_spec: InputSpec,
    recipe: Recipe,
    reporter: Reporter,
    *,
    seed: int,
    num_classes: int | None,
    layout: Layout | None = None,
) -> Loader:
    """Returns the batches to train on; of a recipe that `fit_to_images` has settled."""
    return Loader(
        images,
        input_spec,
        batch_size=recipe.batch_size,
        augment=recipe.augment,
        num_classes=num_classes,
        shuffle=True,
        class_balanced=recipe.balance == "sampling",
        cache=recipe.cache,
        max_bad_fraction=recipe.get_bad_fraction(len(images)),
        report=reporter.warn,
        # A last batch that is not full is left out where that costs an epoch less than a tenth of its images.
        drop_last=len(images) % recipe.batch_size < len(images) / 10,
        seed=seed,
        **share_of(layout or Layout()),
    )


def share_of(layout: Layout) -> dict[str, Any]:
    """Returns which rows of a batch a `Loader` makes in this process."""
    return {"process_index": layout.process_index, "num_processes": layout.num_processes}


def training_loss(images: ImageSet, recipe: Recipe, num_classes: int) -> Loss:
    """Returns what a recipe makes small on some training images."""
    return create_loss(
        images,
        num_classes,
        balance=recipe.balance,
        name=recipe.loss,
        label_smoothing=recipe.optimizer.label_smoothing,
        focal_gamma=recipe.focal_gamma,
        gamma_negative=recipe.gamma_negative,
        gamma_positive=recipe.gamma_positive,
        negative_clip=recipe.negative_clip,
    )


def check_start(recipe: Recipe, changes: Mapping[str, Any], *, has_weights: bool, has_teacher: bool) -> None:
    """Raises `ConfigError` for options that ask for weights or a teacher where there are none."""
    fraction = (changes.get("optimizer") or {}).get("head_first_fraction")
    for condition, what, received in (
        (recipe.optimizer.trained == "lora", "low-rank updates", "trained='lora'"),
        (fraction, "the head first", f"head_first_fraction={fraction}"),
    ):
        if condition and not has_weights:
            raise ConfigError(
                f"Cannot train {what}. Expected weights to start from: without them all has still to be learnt. "
                f"Received: {received}, pretrained=None. Pass pretrained, or train everything."
            )
    if changes.get("distillation") and not has_teacher:
        options = ", ".join(f"{key}={value!r}" for key, value in changes["distillation"].items())
        raise ConfigError(
            f"Cannot learn from a teacher. Expected one beside the options of distillation. Received: {options}, "
            "teacher=None. Pass a run or weights as teacher."
        )


def random_start(recipe: Recipe, num_classes: int) -> ModelSpec:
    """Returns the model of a recipe."""
    spec = get_spec(
        recipe.model,
        num_classes=num_classes,
        image_size=recipe.image_size,
        num_channels=recipe.num_channels,
        **recipe.architecture,
    )
    return dataclasses.replace(spec, input=spec.input.replace(resize_mode=recipe.resize_mode))


def pretrained_start(
    source: str | Path, name: str | None, recipe: Recipe, dataset: Dataset, reporter: Reporter
) -> tuple[ModelSpec, list[np.ndarray], Recipe]:
    """Returns the model of some weights, the weights, and the recipe with that model in it."""
    report = import_weights(
        source,
        model=name,
        num_classes=len(dataset.class_names),
        image_size=recipe.image_size,
        dtype="float32",
        **recipe.architecture,
    )
    for line in report.summary().splitlines():
        reporter.note(f"Weights  {line}")
    model = report.model
    seen = report.input_spec.replace(resize_mode=recipe.resize_mode)
    spec = ModelSpec(name=model.name, config=model.config, input=seen)
    settled = dataclasses.replace(recipe, model=model.name, num_channels=model.config.num_channels)
    return spec, model.get_weights(), settled


def describe_weights(source: str | Path) -> str:
    """Returns where weights come from: the whole path of a file or folder, so that it holds in any folder."""
    return str(Path(source).resolve()) if Path(source).exists() else str(source)


def _median_side(images: ImageSet, sample: int = 64) -> float:
    """Returns the median shorter side, in pixels, of up to `sample` images spread over the set."""
    chosen = np.unique(np.linspace(0, len(images) - 1, min(sample, len(images))).astype(int))
    return float(np.median([min(image.shape[:2]) for image in readable(images, chosen)] or [224]))


def readable(images: ImageSet, indices: Iterable[int], num_channels: int = 3) -> Iterator[np.ndarray]:
    """Yields the images at `indices` that can be decoded; the loaders name the others."""
    for i in indices:
        with suppress(ImageError, MissingPathError):
            yield images.load(int(i), num_channels)


def say_plan(
    reporter: Reporter,
    dataset: Dataset,
    recipe_name: str,
    recipe: Recipe,
    spec: ModelSpec,
    policy: str,
    layout: Layout | None = None,
) -> None:
    """Says what will be trained on what, and what a quick look at the data finds."""
    counts = ", ".join(f"{len(images):,} {split}" for split, images in dataset.splits.items())
    reporter.note(f"Data     {dataset.name}: {len(dataset.class_names)} classes; images: {counts}")
    for note in dataset.notes:
        reporter.note(f"         {note}")
    files = "file" if dataset.num_ignored == 1 else "files"
    told = f"{dataset.num_ignored} {files} passed over"
    if dataset.num_ignored and not any(note.startswith(told) for note in dataset.notes):
        reporter.note(f"         {dataset.num_ignored} {files} without an image passed over")
    if dataset.broken:
        name, reason = next(iter(dataset.broken.items()))
        reporter.warn(f"{len(dataset.broken)} images cannot be read and are left out, such as {name}: {reason}")
    for finding in inspect_fast(dataset).findings:
        if finding.severity != "note" and finding.kind != "unreadable":
            reporter.warn(finding.summary())
    height, width = spec.config.image_size
    reporter.note(
        f"Model    {spec.name}: {count_parameters(spec.config) / 1e6:.2f}M parameters, {height}x{width} pixels, "
        f"{spec.config.num_patches} patches"
    )
    if (small := recipe.get_small_size(spec.config)) != spec.config.image_size:
        reporter.note(f"         {small[0]}x{small[1]} pixels in the first {recipe.small_fraction:.0%} of training")
    elif recipe.small_fraction:
        reporter.note("         no smaller images at first: the next size of whole patches is the model's own")
    if layout is not None and layout.is_spread:
        reporter.note(f"Devices  {layout.describe()}")
    length = f"{recipe.time} of training" if recipe.time else f"{recipe.epochs} epochs"
    precision = "bfloat16 (weights float32)" if policy == "mixed_bfloat16" else "float32"
    reporter.note(f"Recipe   {recipe_name}: {length}, batches of {recipe.batch_size}, {precision}")


CONFIG_HEAD = """\
# How this run was made: every option as it was resolved. `vitreous train DATA --recipe FILE` reads a file with the
# contents of the [recipe] table.
"""


def describe_run(
    dataset: Dataset,
    recipe_name: str,
    recipe: Recipe,
    spec: ModelSpec,
    split: dict[str, Any],
    policy: str,
    *,
    task: str = "train",
    layout: Layout | None = None,
) -> dict[str, Any]:
    """Returns what config.toml will hold."""
    backend = keras.backend.backend()
    return {
        "format": FORMAT,
        "seed": split["seed"],
        "command": describe_command(task),
        "recipe_name": recipe_name,
        "model": {"name": spec.name, **spec.config.to_dict()},
        "input": spec.input.to_dict(),
        "data": {
            "name": dataset.name,
            "root": _root(dataset),
            "fingerprint": dataset.fingerprint,
            "class_names": list(dataset.class_names),
            "is_multi_label": dataset.is_multi_label,
            "num_images": {split: len(images) for split, images in dataset.splits.items()},
            "split": split,
            "notes": dataset.notes,
        },
        "recipe": recipe.to_dict(),
        **(layout or Layout()).to_dict(),
        "versions": {
            "vitreous": __version__,
            "python": platform.python_version(),
            "keras": keras.version(),
            "backend": f"{backend} {importlib.import_module(backend).__version__}",
            "policy": policy,
            "numpy": np.__version__,
            "machine": f"{platform.system()} {platform.machine()}",
        },
    }


def identity_of(
    config: Mapping[str, Any], *, weights: Sequence[np.ndarray] | None = None, checkpoints: str | None = None
) -> dict[str, Any]:
    """Returns what must be the same in all processes that train together.

    Args:
        config: What `describe_run` returned.
        weights: Those to start from.
        checkpoints: Which kind of them is written.
    """
    data, versions = config["data"], config["versions"]
    return {
        "seed": config["seed"],
        "model": config["model"],
        "recipe": config["recipe"],
        "what is masked": config.get("masked"),
        "data (fingerprint)": data["fingerprint"],
        **{f"the version of {name}": versions[name] for name in ("vitreous", "keras", "backend")},
        "precision": versions["policy"],
        "the weights to start from": None if weights is None else fingerprint(weights),
        "the weights of the teacher": config.get("teacher_fingerprint"),
        "the kind of checkpoints": checkpoints or "whole",
        "the devices": config.get("distribution"),
    }


def fingerprint(weights: Iterable[np.ndarray]) -> str:
    """Returns a sha256 of weights: about a second for a billion bytes."""
    digest = hashlib.sha256()
    for weight in weights:
        digest.update(np.ascontiguousarray(weight).data.cast("B") if weight.size else b"")
    return digest.hexdigest()


def _root(dataset: Dataset) -> str:
    """Returns where the data came from: its folder, or a word in brackets."""
    if dataset.root is not None:
        return str(source_path(dataset.root))
    return "(built in)" if dataset.name in BUILT_IN else "(from Python)"


def describe_command(name: str) -> str:
    """Returns the command line of this process; `vitreous.NAME(...)` where it was called from Python."""
    program = Path(sys.argv[0])
    is_command_line = program.name == "vitreous" or program.parts[-2:] == ("vitreous", "__main__.py")
    return shlex.join(["vitreous", *sys.argv[1:]]) if is_command_line else f"vitreous.{name}(...)"


def without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy without the keys whose value is None, which TOML cannot hold."""
    return {
        key: without_none(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if value is not None
    }


def free_path(name: str, reporter: Reporter) -> Path:
    """Returns the first `runs/NAME-N` that does not exist; names the unfinished ones that it leaves alone."""
    number = 1
    while (path := Path("runs", f"{name}-{number}")).exists() or partial_folder(path).exists():
        if not path.exists():
            reporter.note(f"Note     {path} is not finished; continue it with --resume {shlex.quote(str(path))}")
        number += 1
    return path
