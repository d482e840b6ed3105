"""From data to a run folder: the whole way, in the order in which things can go wrong."""

import dataclasses
import importlib
import json
import platform
import random
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tomli_w

from vitreous import __version__
from vitreous.backend import select_precision
from vitreous.data import BUILT_IN, Dataset, ImageSet, Loader, load_dataset, resize_image
from vitreous.data.inspection import inspect_fast
from vitreous.data.sources import source_path
from vitreous.errors import ConfigError, ImageError
from vitreous.evaluation import (
    collect_logits,
    compute_metrics,
    get_headline,
    sigmoid,
    softmax,
    summarize_metrics,
)
from vitreous.figures import draw_augmentation, draw_confusion, draw_curves, draw_labels, draw_patches, draw_predictions
from vitreous.model import VisionTransformer, create_predict_function
from vitreous.registry import count_parameters, get_spec
from vitreous.spec import DataConfig, InputSpec, ModelSpec
from vitreous.training.fit import Evaluation, History, Interrupt, fit
from vitreous.training.losses import create_loss
from vitreous.training.optimizer import create_optimizer
from vitreous.training.progress import Reporter
from vitreous.training.recipe import Recipe, choose_recipe, load_recipe
from vitreous.training.run import FORMAT, Run, RunWriter, load_model, load_run
from vitreous.weights import import_weights


def train(
    data: str | Path | Dataset,
    *,
    out: str | Path | None = None,
    recipe: str | Path | Recipe | None = None,
    pretrained: str | Path | None = None,
    seed: int = 0,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    **changes: Any,
) -> Run:
    """Trains a classifier on labelled images and leaves a run folder.

    Args:
        data: A source as for `load_dataset`: a folder with one folder a class (with or without train/ and val/ or
            test/ above them), a table, a built-in name such as `"digits"`; or a loaded `Dataset`.
        out: Where the run goes. Default: the first free `runs/DATA-N`.
        recipe: A recipe, its name, or a TOML file. Default: chosen from the data.
        pretrained: Weights to start from, as `import_weights` takes them: a local file or folder, `timm/NAME.TAG`,
            `hf:OWNER/NAME`. The model and its input are theirs; the head is fresh. Default: random weights.
        seed: Decides splits, first weights, order and augmentation.
        overwrite: Whether a run at `out` may be replaced (once the new one is whole).
        reporter: Where progress is shown. Default: nowhere.
        **changes: Fields of `DataConfig` (`val_fraction=0.2`, `label_column="species"`), and fields of `Recipe` that
            differ from the recipe's; nested ones as dicts (`optimizer={"learning_rate": 3e-4}`).

    Returns:
        The run, with what was measured on the test images in `run.metrics["test"]`.

    Raises:
        DataError: If the data cannot be used.
        ConfigError: If an option cannot work.
        RunExistsError: If a run lies at `out` and `overwrite` is False.
        TrainingError: If the loss is no longer finite.
        WeightsError: If `pretrained` cannot be imported.

    Example:

    ```python
    run = vitreous.train("digits", epochs=2)
    print(run.metrics["test"]["accuracy"])
    ```
    """
    reporter = reporter or Reporter()
    split, changes = split_options(data, seed, changes)
    dataset = data if isinstance(data, Dataset) else load_dataset(data, **split)
    recipe_name, settled = _settle_recipe(recipe or ("finetune" if pretrained else None), dataset, changes)
    if pretrained is None:
        spec, weights = _random_start(settled, len(dataset.class_names)), None
    else:
        spec, weights, settled = _pretrained_start(pretrained, changes.get("model"), settled, dataset, reporter)
    spec = dataclasses.replace(spec, input=spec.input.replace(resize_mode=settled.resize_mode))
    train_images = dataset.splits["train"]
    batch_size = min(settled.batch_size, len(train_images)) // settled.num_parts * settled.num_parts
    settled = dataclasses.replace(settled, batch_size=batch_size)
    loader = Loader(
        train_images,
        spec.input,
        batch_size=settled.batch_size,
        augment=settled.augment,
        num_classes=len(dataset.class_names),
        shuffle=True,
        class_balanced=settled.balance == "sampling",
        cache=settled.cache,
        max_bad_fraction=settled.max_bad,
        report=reporter.warn,
        # A last batch that is not full is left out where that costs an epoch less than a tenth of its images.
        drop_last=len(train_images) % settled.batch_size < len(train_images) / 10,
        seed=seed,
    )
    if settled.epochs is None and settled.time is None:
        num_epochs = max(round(settled.num_examples_seen / len(train_images)), 1)
        settled = dataclasses.replace(settled, epochs=num_epochs)
    policy = select_precision(settled.precision, keras.backend.backend())
    writer = RunWriter(out or free_path(dataset.name), overwrite=overwrite)
    with Interrupt() as interrupt:
        try:
            _train(reporter, interrupt, writer, dataset, loader, recipe_name, settled, spec, weights, split, policy)
        except BaseException:
            reporter.close()
            if (writer.partial / "model.keras").is_file():
                reporter.warn(f"The run was not finished; the trained model is kept in {writer.partial}.")
            else:
                writer.discard()
            raise
        return load_run(writer.finish())


def _train(
    reporter: Reporter,
    interrupt: Interrupt,
    writer: RunWriter,
    dataset: Dataset,
    loader: Loader,
    recipe_name: str,
    settled: Recipe,
    spec: ModelSpec,
    weights: list[np.ndarray] | None,
    split: dict[str, Any],
    policy: str,
) -> None:
    """Trains, saves, measures and draws into `writer`'s folder."""
    _say_plan(reporter, dataset, recipe_name, settled, spec, policy)
    state = random.getstate()
    random.seed(split["seed"])  # Keras draws the seeds of its layers here; its own set_random_seed loads TensorFlow
    model = VisionTransformer(spec.config, name=spec.name, dtype=policy)
    average = VisionTransformer(spec.config, name=spec.name, dtype=policy)
    random.setstate(state)
    if weights is not None:
        model.set_weights(weights)
    config = _config(dataset, recipe_name, settled, spec, split, policy)
    writer.write_text("config.toml", _CONFIG_HEAD + tomli_w.dumps(_without_none(config)))
    evaluate_batch = min(settled.batch_size * 2, 256)
    val = _loader(dataset.splits.get("val"), spec.input, evaluate_batch)
    draw_augmentation(
        loader.images,
        spec.input,
        settled.augment,
        out=writer.partial / "augmented.png",
        class_names=dataset.class_names,
        seed=split["seed"],
    )
    loader.cache_folder = writer.partial
    classes, train_images = dataset.class_names, dataset.splits["train"]
    history = fit(
        model,
        average,
        loader,
        optimizer=create_optimizer(model, settled.optimizer),
        input_spec=spec.input,
        config=settled.optimizer,
        loss=create_loss(
            train_images,
            len(classes),
            balance=settled.balance,
            label_smoothing=settled.optimizer.label_smoothing,
        ),
        evaluate=None if val is None else _create_evaluate(average, val, spec.input, classes),
        num_epochs=settled.epochs,
        budget_seconds=settled.budget_seconds,
        num_parts=settled.num_parts,
        patience_epochs=settled.patience_epochs,
        reporter=reporter,
        interrupt=interrupt,
        on_row=writer.write_history,
    )
    loader.close()
    if history.best_weights is not None:
        _keep_both(average, history, settled, spec, writer.partial, reporter)
    _save_model(average, spec, writer.partial / "model.keras")
    reporter.close()
    if history.is_interrupted:
        reporter.note(f"Interrupted after {history.num_images:,} images; measuring and saving what has been learnt.")
    elif history.num_steps < _FEW_STEPS:
        reporter.warn(
            f"Only {history.num_steps} steps were done, too few to learn much: train for more epochs, or longer."
        )
    metrics = _measure(writer.partial / "model.keras", dataset, spec.input, evaluate_batch, writer.partial)
    broken = {**dataset.broken, **loader.broken, **(val.broken if val else {}), **metrics.pop("broken_files")}
    if broken:
        reporter.warn(f"{len(broken)} broken images were left out; metrics.json names them.")
    metrics |= {
        "train_seconds": history.seconds,
        "num_steps": history.num_steps,
        "num_images_seen": history.num_images,
        "num_parameters": count_parameters(spec.config),
        "is_interrupted": history.is_interrupted,
        "broken_files": broken,
        "num_replaced": loader.num_replaced,
    }
    _draw_run(writer.partial, history, dataset, spec)
    writer.write_text("metrics.json", json.dumps(metrics, indent=2))
    writer.write_text("README.md", _readme(writer.path, config, metrics, history))


_FEW_STEPS = 20


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
    return {"seed": seed, **_without_none(config.to_dict())}, {k: v for k, v in changes.items() if k not in names}


def _settle_recipe(
    recipe: str | Path | Recipe | None, dataset: Dataset, changes: Mapping[str, Any]
) -> tuple[str, Recipe]:
    """Returns the recipe's name and the recipe with all changes in it."""
    if isinstance(recipe, Recipe):
        name, base = "(from Python)", recipe
    else:
        name = str(
            recipe or choose_recipe(dataset.name if dataset.root is None else "", _median_side(dataset.splits["train"]))
        )
        base = load_recipe(recipe or name)
    changes = {key: value for key, value in changes.items() if value is not None}
    if "model" in changes and changes["model"] != base.model and "image_size" not in changes:
        changes["image_size"] = None  # the recipe's size was meant for the recipe's model
    return name, base.merge(changes)


def _random_start(recipe: Recipe, num_classes: int) -> ModelSpec:
    """Returns the model of a recipe."""
    return get_spec(
        recipe.model,
        num_classes=num_classes,
        image_size=recipe.image_size,
        num_channels=recipe.num_channels,
        **recipe.architecture,
    )


def _pretrained_start(
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
    spec = ModelSpec(name=model.name, config=model.config, input=report.input_spec)
    settled = dataclasses.replace(recipe, model=model.name, num_channels=model.config.num_channels)
    return spec, model.get_weights(), settled


def _median_side(images: ImageSet, sample: int = 64) -> float:
    """Returns the median shorter side, in pixels, of up to `sample` images spread over the set."""
    chosen = np.unique(np.linspace(0, len(images) - 1, min(sample, len(images))).astype(int))
    return float(np.median([min(image.shape[:2]) for image in _readable(images, chosen)] or [224]))


def _readable(images: ImageSet, indices: Iterable[int], num_channels: int = 3) -> Iterator[np.ndarray]:
    """Yields the images at `indices` that can be decoded; the loaders name the others."""
    for i in indices:
        with suppress(ImageError):
            yield images.load(int(i), num_channels)


def free_path(name: str) -> Path:
    """Returns the first `runs/NAME-N` that does not exist."""
    number = 1
    while (path := Path("runs", f"{name}-{number}")).exists():
        number += 1
    return path


def _loader(images: ImageSet | None, input_spec: InputSpec, batch_size: int) -> Loader | None:
    return Loader(images, input_spec, batch_size=min(batch_size, len(images))) if images else None


def _save_model(average: VisionTransformer, spec: ModelSpec, path: Path) -> None:
    """Saves the averaged weights in a float32 model: it loads and answers the same on every backend."""
    model = VisionTransformer(spec.config, name=spec.name, dtype="float32")
    model.set_weights(average.get_weights())
    model.save(path)


def _measure(path: Path, dataset: Dataset, input_spec: InputSpec, batch_size: int, folder: Path) -> dict[str, Any]:
    """Evaluates the saved file, as read back, on the held-out images; draws the confusion matrix and some answers."""
    predict = create_predict_function(load_model(path), input_spec)
    metrics: dict[str, Any] = {}
    broken: dict[str, str] = {}
    for split in ("val", "test"):
        images = dataset.splits.get(split)
        loader = _loader(images, input_spec, batch_size)
        if loader is None or images is None:
            continue
        logits, labels, indices = collect_logits(predict, loader.epoch(0))
        broken |= loader.broken
        if not len(labels):
            continue  # not one image of this split can be read; metrics.json names them all
        metrics[split] = compute_metrics(logits, labels, dataset.class_names)
        if split == "test" or "test" not in dataset.splits:  # pictures of the test, or of what comes nearest
            _draw_answers(images, logits, labels, indices, metrics[split], dataset.class_names, input_spec, folder)
    return {**metrics, "broken_files": broken}


def _draw_answers(
    images: ImageSet,
    logits: np.ndarray,
    labels: np.ndarray,
    indices: np.ndarray,
    metrics: Mapping[str, Any],
    class_names: tuple[str, ...],
    input_spec: InputSpec,
    folder: Path,
) -> None:
    """Draws what was answered: the confusion matrix, or how well each label is found; and some images."""
    if images.is_multi_label:
        draw_labels(metrics, folder / "labels.png")
        is_right = ((logits > 0) == labels).all(axis=1)
        certainty = np.abs(logits).min(axis=1)
        answers = [np.flatnonzero(row).tolist() for row in logits > 0]
        truths = [np.flatnonzero(row).tolist() for row in labels]
        probabilities = sigmoid(logits)
    else:
        draw_confusion(np.array(metrics["confusion_matrix"]), class_names, folder / "confusion.png")
        probabilities = softmax(logits)
        certainty = probabilities.max(axis=1)
        is_right = logits.argmax(axis=1) == labels
        answers = [[int(answer)] for answer in logits.argmax(axis=1)]
        truths = [[int(label)] for label in labels]
    chosen = _choose_examples(is_right, certainty)
    draw_predictions(
        [images.load(int(i), input_spec.num_channels) for i in indices[chosen]],
        [truths[i] for i in chosen],
        [answers[i] for i in chosen],
        [probabilities[i, answers[i]].tolist() for i in chosen],
        class_names,
        folder / "predictions.png",
    )


def _create_evaluate(
    model: VisionTransformer, loader: Loader, input_spec: InputSpec, class_names: tuple[str, ...]
) -> Callable[[], Evaluation | None]:
    """Returns a function that measures `model` on validation images; None if not one of them can be read."""
    predict = create_predict_function(model, input_spec)

    def evaluate() -> Evaluation | None:
        logits, labels, _ = collect_logits(predict, loader.epoch(0))
        if not len(labels):
            return None
        metrics = compute_metrics(logits, labels, class_names)
        name, headline = get_headline(metrics)
        values = {
            "loss": metrics["loss"],
            "accuracy": metrics.get("accuracy", metrics.get("label_accuracy")),
            name: headline,
        }
        return Evaluation((headline, -metrics["loss"]), values)

    return evaluate


def _keep_both(
    average: VisionTransformer, history: History, recipe: Recipe, spec: ModelSpec, folder: Path, reporter: Reporter
) -> None:
    """Saves the weights that scored best in validation and the last ones; the run's own are put into `average`."""
    best, last = history.best_weights, average.get_weights()
    is_best_kept = recipe.patience_epochs is not None
    row = history.rows[history.best_row or 0]
    reporter.note(
        f"Best     validation at epoch {row['epoch']}, accuracy {row['val_accuracy']:.2%}: "
        + ("model.keras; the last weights are last.keras" if is_best_kept else "best.keras; the last are model.keras")
    )
    average.set_weights(last if is_best_kept else best)
    _save_model(average, spec, folder / ("last.keras" if is_best_kept else "best.keras"))
    average.set_weights(best if is_best_kept else last)


def _choose_examples(is_right: np.ndarray, certainty: np.ndarray, count: int = 24) -> np.ndarray:
    """Returns indices for a picture: the surest mistakes first (at most half), then examples spread over the rest."""
    wrong, right = np.flatnonzero(~is_right), np.flatnonzero(is_right)
    wrong = wrong[np.argsort(-certainty[wrong], kind="stable")][: count // 2]
    spread = np.unique(np.linspace(0, len(right) - 1, min(count - len(wrong), len(right))).astype(int))
    return np.concatenate([wrong, right[spread]])


def _draw_run(folder: Path, history: History, dataset: Dataset, spec: ModelSpec) -> None:
    if history.rows:
        names = dict.fromkeys(key for row in history.rows for key in row)
        columns = {name: [row.get(name) for row in history.rows] for name in names}
        draw_curves(columns, folder / "curves.png")
    images = dataset.splits["test" if "test" in dataset.splits else "train"]
    config = spec.config
    image = next(_readable(images, range(len(images)), spec.input.num_channels), None)
    if image is None:
        return
    draw_patches(
        resize_image(image, spec.input),
        patch_size=config.patch_size,
        strides=config.patch_strides,
        padding=config.patch_padding,
        out=folder / "patches.png",
    )


def _say_plan(
    reporter: Reporter, dataset: Dataset, recipe_name: str, recipe: Recipe, spec: ModelSpec, policy: str
) -> None:
    counts = ", ".join(f"{len(images):,} {split}" for split, images in dataset.splits.items())
    reporter.note(f"Data     {dataset.name}: {len(dataset.class_names)} classes; images: {counts}")
    for note in dataset.notes:
        reporter.note(f"         {note}")
    if dataset.num_ignored:
        reporter.note(f"         {dataset.num_ignored} files that are no images were passed over")
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
    length = f"{recipe.time} of training" if recipe.time else f"{recipe.epochs} epochs"
    precision = "bfloat16 (weights float32)" if policy == "mixed_bfloat16" else "float32"
    reporter.note(f"Recipe   {recipe_name}: {length}, batches of {recipe.batch_size}, {precision}")


_CONFIG_HEAD = """\
# How this run was made: every option as it was resolved. `vitreous train DATA --recipe FILE` reads a file with the
# contents of the [recipe] table.
"""


def _config(
    dataset: Dataset, recipe_name: str, recipe: Recipe, spec: ModelSpec, split: dict[str, Any], policy: str
) -> dict[str, Any]:
    backend = keras.backend.backend()
    return {
        "format": FORMAT,
        "seed": split["seed"],
        "command": shlex.join(["vitreous", *sys.argv[1:]]) if _is_command_line() else "vitreous.train(...)",
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


def _root(dataset: Dataset) -> str:
    """Returns where the data came from: its folder, or a word in brackets."""
    if dataset.root is not None:
        return str(source_path(dataset.root))
    return "(built in)" if dataset.name in BUILT_IN else "(from Python)"


def _is_command_line() -> bool:
    return Path(sys.argv[0]).name == "vitreous" or Path(sys.argv[0]).parts[-2:] == ("vitreous", "__main__.py")


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy without the keys whose value is None, which TOML cannot hold."""
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if value is not None
    }


def _readme(path: Path, config: Mapping[str, Any], metrics: Mapping[str, Any], history: History) -> str:
    """Returns what the folder says about itself."""
    lines = [f"# {path.name}", ""]
    answers = "labels" if config["data"]["is_multi_label"] else "confusion"
    for split in ("test", "val"):
        if split in metrics:
            name, value = get_headline(metrics[split])
            lines += [f"{split} {name.replace('_', ' ')} **{value:.2%}**: {summarize_metrics(metrics[split])}.", ""]
    lines += [
        f"{config['model']['name']} on {config['data']['name']} ({len(config['data']['class_names'])} classes), "
        f"{metrics['num_images_seen']:,} images seen in {history.seconds:.0f} s, seed {config['seed']}"
        + (", interrupted." if history.is_interrupted else "."),
        "",
        f"Made by vitreous {__version__} with `{config['command']}`.",
        "",
        "- `model.keras`: weights and architecture; load with `vitreous.load_run(PATH).load_model()`",
        "- `config.toml`: every option, the classes, the data's fingerprint, versions",
        "- `history.csv`, `curves.png`: training as it went",
        f"- `metrics.json`, `{answers}.png`, `predictions.png`: measured on `model.keras`, read back from this folder",
        "- `augmented.png`, `patches.png`: images as training and as the model see them",
        "",
        f"Classify images: `vitreous predict {shlex.quote(path.name)} IMAGE...` in the folder above.",
        "",
    ]
    return "\n".join(lines)
