"""From unlabelled images to a run folder with an encoder: masked autoencoding, the whole way."""

import dataclasses
import json
import random
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tomli_w

from vitreous import __version__
from vitreous.backend import select_precision
from vitreous.data import Dataset, Loader, load_dataset, load_images, resize_image
from vitreous.errors import ConfigError, DataError
from vitreous.figures import draw_reconstruction
from vitreous.model import VisionTransformer, normalize_images
from vitreous.registry import count_parameters, get_spec
from vitreous.spec import InputSpec, ModelSpec
from vitreous.training.batch_search import find_batch_size, scale_learning_rate
from vitreous.training.checkpoint import Checkpoints
from vitreous.training.devices import CheckpointKind, Devices, Parallel
from vitreous.training.distribute import Layout
from vitreous.training.fit import Evaluation, History, Interrupt, fit
from vitreous.training.masked import MaskedAutoencoder, reconstruction_loss
from vitreous.training.optimizer import Optimizer
from vitreous.training.planning import (
    CONFIG_HEAD,
    describe_run,
    fit_to_images,
    identity_of,
    is_rate_given,
    readable,
    say_plan,
    settle_recipe,
    split_options,
    take_auto_batch,
    training_loader,
    without_none,
)
from vitreous.training.progress import Reporter
from vitreous.training.recipe import NOT_PRETRAINED, OPTIMIZER_NOT_PRETRAINED, MaskedConfig, Recipe
from vitreous.training.results import draw_run, evaluation_loader
from vitreous.training.resume import (
    batch_of,
    describe_call,
    open_checkpoints,
    open_writer,
    train_together,
    unfinished,
)
from vitreous.training.run import Resume, Run, RunWriter, load_run
from vitreous.training.trackers import Tracker, Trackers, follow_rows

_NUM_SHOWN = 6
_MOST_VALIDATED = 2000  # images
# What a recipe for labels would do worse here: large crops keep what has to be filled in.
_CHANGES: dict[str, Any] = {
    "optimizer": {
        "label_smoothing": 0.0,
        "layer_decay": 1.0,
        "trained": "all",
        "head_first_fraction": 0.0,
    },
    "augment": {
        "crop_scale": (0.5, 1.0),
        "mixup_alpha": 0.0,
        "cutmix_alpha": 0.0,
        "policy": "none",
        "erasing_rate": 0.0,
    },
    "architecture": {"stochastic_depth_rate": 0.0, "patch_dropout_rate": 0.0},
    "balance": "none",
    "small_fraction": 0.0,
}


def pretrain(
    data: str | Path | Dataset,
    *,
    out: str | Path | None = None,
    recipe: str | Path | Recipe | None = None,
    masked: MaskedConfig | None = None,
    seed: int = 0,
    overwrite: bool = False,
    resume: Resume = "auto",
    reporter: Reporter | None = None,
    track: str | Tracker | Sequence[str | Tracker] = (),
    devices: Devices | None = None,
    parallel: Parallel | None = None,
    checkpoints: CheckpointKind | None = None,
    **changes: Any,
) -> Run:
    """Trains an encoder on images without labels and leaves a run folder to start a classifier from.

    Most patches of each image are hidden, and the model learns to fill them in (`MaskedAutoencoder`). Afterwards:
    `train(data, pretrained=run.path)`.

    Args:
        data: Any source of images, as for `load_dataset` or `load_images`: a folder of images, with or without classes.
            Of a source with splits the training images are used, and test images never.
        out: Where the run goes. Default: the first free `runs/DATA-pretrained-N`.
        recipe: A recipe, its name, or a TOML file. Default: chosen from the data. Labels, mixing and stochastic depth
            of the recipe are turned off.
        masked: How images are hidden and filled in.
        seed: Decides which images validate, first weights, order, augmentation and what is hidden.
        overwrite: As for `train`.
        resume: As for `train`: an unfinished run goes on from its last checkpoint.
        reporter: Where progress is shown. Default: nowhere.
        track: What follows the run, as for `train`.
        devices: As for `train`.
        parallel: As for `train`.
        checkpoints: As for `train`.
        **changes: Fields of `DataConfig` and of `Recipe`, as for `train`.

    Returns:
        The run: `model.keras` is the encoder, without a head; `run.metrics["val_loss"]` says how well it fills in.

    Raises:
        DataError: If there are no images.
        ConfigError: If an option cannot work.
        RunExistsError: If a run lies at `out` and `overwrite` is False, or another process is writing it.
        RunError: If the run cannot be written; its last checkpoint is kept.
        TrainingError: If the loss is no longer finite.
    """
    call = {name: value for name, value in locals().items() if name != "changes"} | changes
    return train_together(_prepare, call, changes)


def _prepare(
    call: dict[str, Any],
    changes: dict[str, Any],
    layout: Layout,
    reporter: Reporter,
    trackers: Trackers,
    *,
    out: str | Path | None,
    resume: Resume,
) -> Run:
    """Settles everything before training, trains, and returns the run. Arguments and errors as for `pretrain`."""
    data, recipe, seed, overwrite = (call[name] for name in ("data", "recipe", "seed", "overwrite"))
    masked = call["masked"] or MaskedConfig()
    _refuse_labels(changes)
    split, changes = split_options(data, seed, changes)
    is_auto, changes = take_auto_batch(changes)
    dataset = _unlabelled(data, split, seed)
    recipe_name, settled = settle_recipe(recipe, dataset, changes)
    settled = settled.merge(_CHANGES).merge({key: value for key, value in changes.items() if value is not None})
    spec = get_spec(
        settled.model,
        num_classes=0,
        image_size=settled.image_size,
        num_channels=settled.num_channels,
        **{**settled.architecture, "patch_dropout_rate": 0.0, "use_distillation_head": False},
    )
    spec = dataclasses.replace(spec, input=spec.input.replace(resize_mode=settled.resize_mode))
    images = dataset.splits["train"]
    policy = select_precision(settled.precision, keras.backend.backend())
    if is_auto and layout.is_spread:
        raise ConfigError(
            f"Cannot find the batch size on {layout.num_devices} devices. Expected a number. "
            "Received: batch_size='auto'. Find it on one device, and pass it times the number of devices."
        )
    if is_auto:
        has_rate = is_rate_given(changes)
        before = batch_of(out, resume, settled, is_rate_given=has_rate)
        settled = before or _settle_batch(settled, masked, spec, len(images), policy, reporter, has_rate)
    settled = fit_to_images(settled, len(images), layout)
    if settled.augment.has_mixing:
        raise ConfigError(
            "Cannot pretrain. Expected images that are not mixed: there are no labels to mix with them. "
            f"Received: mixup_alpha={settled.augment.mixup_alpha:g}, cutmix_alpha={settled.augment.cutmix_alpha:g}. "
            "Pass 0 for both."
        )
    loader = training_loader(images, spec.input, settled, reporter, seed=seed, num_classes=None, layout=layout)
    config = {
        **describe_run(dataset, recipe_name, settled, spec, split, policy, task="pretrain", layout=layout),
        "task": "pretrain",
        "masked": masked.to_dict(),
    }
    with Interrupt() as interrupt:
        name = f"{dataset.name}-pretrained"
        writer = open_writer(out, name, overwrite=overwrite, resume=resume, reporter=reporter)
        with unfinished(writer, reporter, trackers):
            kind = call["checkpoints"]
            checkpoints, config = open_checkpoints(
                writer, config, settled, resume=resume, reporter=reporter, layout=layout, kind=kind
            )
            writer.write_call(describe_call("pretrain", call))
            interrupt.is_busy = layout.num_processes > 1  # SIGTERM for one is for all: they look at it together
            layout.meet(identity_of(config, checkpoints=kind))
            path = layout.share(str(writer.path))
            say_plan(reporter, dataset, recipe_name, settled, spec, policy, layout)
            writer.write_text("config.toml", CONFIG_HEAD + tomli_w.dumps(without_none(config)))
            trackers.start(writer.path, config)
            with checkpoints:
                plan = (dataset, loader, settled, masked, spec, config)
                _pretrain(layout, reporter, trackers, interrupt, writer, checkpoints, *plan)
            if not layout.is_first:
                return Run(Path(path), config, {})
            place = writer.finish()
    return load_run(place)


def _refuse_labels(changes: Mapping[str, Any]) -> None:
    """Raises `ConfigError` for options of what pretraining does not have: they would be ignored."""
    optimizer = changes.get("optimizer") or {}
    found = {key: changes[key] for key in NOT_PRETRAINED if changes.get(key) is not None}
    found |= {key: optimizer[key] for key in OPTIMIZER_NOT_PRETRAINED if optimizer.get(key) is not None}
    if found:
        options = ", ".join(f"{key}={value!r}" for key, value in found.items())
        raise ConfigError(
            "Cannot pretrain with options for labels, heads, a teacher or smaller images: there are none. Expected "
            f"others. Received: {options}. Leave them out; `vitreous train` takes them."
        )


def _unlabelled(data: str | Path | Dataset, split: dict[str, Any], seed: int) -> Dataset:
    """Returns the images to train on, and a few to validate with."""
    if isinstance(data, Dataset):
        images, name, root, notes = data.splits["train"], data.name, data.root, []
    else:
        try:
            found = load_dataset(data, **split)
        except DataError as error:
            images = load_images(data)
            name, root = Path(str(data)).name or "images", Path(str(data))
            notes = [f"all {len(images):,} images are used; as a labelled set: {error}"]
        else:
            images, name, root = found.splits["train"], found.name, found.root
            held_out = [part for part in found.splits if part != "train"]
            notes = [f"labels are not used; {' and '.join(held_out)} images are left out"] if held_out else []
    order = np.random.default_rng((seed, 1)).permutation(len(images))
    num_val = min(len(images) // 20, _MOST_VALIDATED)
    splits = {"train": images.take(np.sort(order[num_val:]))}
    if num_val:
        splits["val"] = images.take(np.sort(order[:num_val]))
        notes.append(f"val is {num_val} of these images, drawn with seed {seed}")
    unlabelled = {part: chosen.with_labels(np.full(len(chosen), -1)) for part, chosen in splits.items()}
    return Dataset(name=name, root=root, class_names=(), splits=unlabelled, notes=notes)


def _create(
    spec: ModelSpec, masked: MaskedConfig, policy: str, recipe: Recipe
) -> tuple[MaskedAutoencoder, MaskedAutoencoder, Optimizer]:
    """Returns the model, a second one for the average of its weights, and the optimiser."""
    model, average = (
        MaskedAutoencoder(
            VisionTransformer(spec.config, name=spec.name, dtype=policy), dtype=policy, **masked.to_dict()
        )
        for _ in range(2)
    )
    return model, average, Optimizer(model.trainable_variables, recipe.optimizer, num_blocks=spec.config.num_blocks)


def _settle_batch(
    recipe: Recipe,
    masked: MaskedConfig,
    spec: ModelSpec,
    num_images: int,
    policy: str,
    reporter: Reporter,
    is_rate_given: bool,
) -> Recipe:
    """Returns the recipe with the largest batch that is worth its memory."""
    size = find_batch_size(
        lambda: _create(spec, masked, policy, recipe),
        recipe=recipe,
        input_spec=spec.input,
        loss=reconstruction_loss,
        num_targets=None,
        num_images=num_images,
        reporter=reporter,
    )
    if is_rate_given:
        return dataclasses.replace(recipe, batch_size=size)
    return scale_learning_rate(recipe, size, reporter)


def _pretrain(
    layout: Layout,
    reporter: Reporter,
    trackers: Trackers,
    interrupt: Interrupt,
    writer: RunWriter,
    checkpoints: Checkpoints,
    dataset: Dataset,
    loader: Loader,
    settled: Recipe,
    masked: MaskedConfig,
    spec: ModelSpec,
    config: dict[str, Any],
) -> None:
    """Trains; in the first process, also saves, measures and draws into `writer`'s folder."""
    policy = config["versions"]["policy"]
    state = random.getstate()
    random.seed(config["seed"])
    model, average, optimizer = _create(spec, masked, policy, settled)
    random.setstate(state)
    val = evaluation_loader(dataset.splits.get("val"), spec.input, min(settled.batch_size * 2, 256), layout)
    loader.cache_folder = writer.partial
    history = fit(
        model,
        average,
        loader,
        optimizer=optimizer,
        input_spec=spec.input,
        config=settled.optimizer,
        loss=reconstruction_loss,
        has_answers=False,
        evaluate=None if val is None else _create_evaluate(average, val, spec.input, layout),
        num_epochs=settled.epochs,
        budget_seconds=settled.budget_seconds,
        num_parts=settled.num_parts,
        reporter=reporter,
        interrupt=interrupt,
        on_row=follow_rows(lambda rows: checkpoints.attempt("history", lambda: writer.write_history(rows)), trackers),
        checkpoints=checkpoints,
        on_nan=settled.on_nan,
        layout=layout,
    )
    if not layout.is_first:
        loader.close()
        return
    writer.write_history(history.rows)
    trackers.follow(history.rows)  # of a run that was resumed after its last step, nothing has been told yet
    loader.close()
    reporter.close()
    encoder = VisionTransformer(spec.config, name=spec.name, dtype="float32")
    encoder.set_weights(average.encoder.get_weights())
    encoder.save(writer.partial / "model.keras")
    metrics = {
        "val_loss": history.rows[-1].get("val_loss") if history.rows else None,
        "train_seconds": history.seconds,
        "num_steps": history.num_steps,
        "num_images_seen": history.num_images,
        "num_parameters": count_parameters(spec.config),
        "is_interrupted": history.is_interrupted,
        "recoveries": history.recoveries,
        "broken_files": {**dataset.broken, **loader.broken, **(val.broken if val else {})},
        "num_replaced": loader.num_replaced,
    }
    draw_run(writer.partial, history, dataset, spec)
    _draw(average, dataset, spec.input, writer.partial / "reconstruction.png")
    writer.write_text("metrics.json", json.dumps(metrics, indent=2))
    writer.write_text("README.md", _readme(writer.path, config, metrics, history))
    trackers.finish(metrics, writer.partial)


def _create_evaluate(
    model: MaskedAutoencoder, loader: Loader, input_spec: InputSpec, layout: Layout
) -> Callable[[], Evaluation | None]:
    predict = layout.create_predict(model, input_spec)

    def evaluate() -> Evaluation | None:
        errors, _, _ = layout.collect(predict, loader)
        loss = float(errors.mean()) if len(errors) else None
        return None if loss is None else Evaluation((-loss,), {"loss": loss})

    return evaluate


def _draw(model: MaskedAutoencoder, dataset: Dataset, input_spec: InputSpec, out: Path) -> None:
    images = dataset.splits.get("val", dataset.splits["train"])
    found = []
    for image in readable(images, range(len(images)), input_spec.num_channels):
        found.append(resize_image(image, input_spec))
        if len(found) == _NUM_SHOWN:
            break
    if not found:
        return
    batch = np.stack(found)
    normalized = normalize_images(keras.ops.convert_to_tensor(batch), input_spec)
    mean, std = (np.array(values) for values in (input_spec.mean, input_spec.std))
    seen, filled = (
        np.clip(np.round(255 * (keras.ops.convert_to_numpy(values) * std + mean)), 0, 255).astype("uint8")
        for values in model.reconstruct(normalized)
    )
    draw_reconstruction(list(batch), list(seen), list(filled), out)


def _readme(path: Path, config: dict[str, Any], metrics: dict[str, Any], history: History) -> str:
    """Returns what the folder says about itself."""
    loss = "" if metrics["val_loss"] is None else f", validation loss **{metrics['val_loss']:.3f}**"
    name = shlex.quote(path.name)
    lines = [
        f"# {path.name}",
        "",
        f"{config['model']['name']}, an encoder pretrained on {config['data']['num_images']['train']:,} images of "
        f"{config['data']['name']} without labels{loss}: the mean squared error on hidden patches, each "
        f"{config['masked']['mask_target']} brought to mean 0 and variance 1; an answer of nothing but the mean has 1.",
        "",
        f"{metrics['num_images_seen']:,} images seen in {history.seconds:.0f} s, seed {config['seed']}"
        + (", interrupted." if history.is_interrupted else "."),
        "",
        f"Made by vitreous {__version__} with `{config['command']}`.",
        "",
        "- `model.keras`: the encoder; it has no head",
        "- `config.toml`: every option, the data, versions",
        "- `history.csv`, `history.jsonl`, `curves.png`: training as it went",
        "- `reconstruction.png`: images, what the model sees of them, and what it makes of that",
        "- `metrics.json`: numbers",
        "",
        f"Train a classifier from it: `vitreous train DATA --pretrained {name}` in the folder above.",
        "",
    ]
    return "\n".join(lines)
