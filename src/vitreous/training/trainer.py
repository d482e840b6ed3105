"""From data to a run folder: the whole way, in the order in which things can go wrong."""

import dataclasses
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tomli_w

from vitreous.backend import select_precision
from vitreous.data import Dataset, Loader, load_dataset
from vitreous.errors import ConfigError
from vitreous.figures import draw_augmentation
from vitreous.model import VisionTransformer
from vitreous.registry import count_parameters
from vitreous.spec import ModelSpec
from vitreous.training.batch_search import find_batch_size, scale_learning_rate
from vitreous.training.card import describe_results
from vitreous.training.checkpoint import Checkpoints
from vitreous.training.devices import CheckpointKind, Devices, Parallel
from vitreous.training.distillation import DistillationLoss, load_teacher
from vitreous.training.distribute import Layout
from vitreous.training.fit import History, Interrupt, fit
from vitreous.training.losses import Loss
from vitreous.training.optimizer import create_optimizer
from vitreous.training.planning import (
    CONFIG_HEAD,
    check_start,
    describe_run,
    describe_weights,
    fit_to_images,
    identity_of,
    is_rate_given,
    pretrained_start,
    random_start,
    say_plan,
    settle_recipe,
    split_options,
    take_auto_batch,
    training_loader,
    training_loss,
    without_none,
)
from vitreous.training.progress import Reporter
from vitreous.training.recipe import Recipe
from vitreous.training.results import create_evaluate, draw_run, evaluation_loader, measure_run
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

_FEW_STEPS = 20  # too few to learn much


def train(
    data: str | Path | Dataset,
    *,
    out: str | Path | None = None,
    recipe: str | Path | Recipe | None = None,
    pretrained: str | Path | None = None,
    teacher: str | Path | None = None,
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
    """Trains a classifier on labelled images and leaves a run folder.

    The state of training is saved now and then (`checkpoint_every`): after a crash, the same call goes on from there.

    Args:
        data: A source as for `load_dataset`: a folder with one folder a class (with or without train/ and val/ or
            test/ above them), a table, a built-in name such as `"digits"`; or a loaded `Dataset`.
        out: Where the run goes. Default: the first free `runs/DATA-N`.
        recipe: A recipe, its name, or a TOML file. Default: chosen from the data; `finetune` from weights that know
            classes already.
        pretrained: Weights to start from, as `import_weights` takes them: a local file or folder, `timm/NAME.TAG`,
            `hf:OWNER/NAME`. The model and its input are theirs; the head is fresh. Default: random weights.
        teacher: A trained model to learn from beside the labels, as `recipe.distillation` says: a run folder, or what
            `import_weights` takes. It must have the data's classes; it sees the same augmented images, so these have
            their whole size all the time unless `small_fraction` is given.
        seed: Decides splits, first weights, order and augmentation.
        overwrite: Whether a run at `out` may be replaced (once the new one is whole); an unfinished one that was begun
            with other options or data then gives way too.
        resume: What is done about an unfinished run at `out`, as a crash leaves it: `"auto"` continues it, `"only"`
            does nothing else, `"never"` removes it and starts anew.
        reporter: Where progress is shown. Default: nowhere.
        track: What follows the run beside its own files: `"tensorboard"`, `"mlflow"`, `"wandb"`, or a `Tracker`; one or
            several.
        devices: How many devices of this machine to train on, or `"all"`; on jax. Default: one, or, after
            `join_processes`, all.
        parallel: What they share: `"data"`, the rows of a batch; `"fsdp"`, weights and optimiser too; `"tensor"`, the
            matrices of each block. Default: `"data"`.
        checkpoints: How the state of training is saved: `"whole"`, gathered and written by the first process; or
            `"sharded"`, each process the parts that it holds, and nothing is gathered. A run goes on from either as
            either. Default: `"whole"`.
        **changes: Fields of `DataConfig` (`val_fraction=0.2`, `label_column="species"`), and fields of `Recipe` that
            differ from the recipe's; nested ones as dicts (`optimizer={"learning_rate": 3e-4}`). A `batch_size` of
            `"auto"` is the largest that is worth its memory (`vitreous.training.batch_search`); the learning rate then
            goes with its square root, unless one is given.

    Returns:
        The run, with what was measured on the test images in `run.metrics["test"]`. Of several processes, the first
        writes and returns it; the others return it without metrics, as soon as training is over.

    Raises:
        DataError: If the data cannot be used.
        ConfigError: If an option cannot work.
        RunExistsError: If a run lies at `out` and `overwrite` is False, or another process is writing it.
        RunError: If the run cannot be written; its last checkpoint is kept.
        TrainingError: If the loss is no longer finite.
        WeightsError: If `pretrained` or `teacher` cannot be imported.
        RunError: If `teacher` is a run that is not whole, or has no classes.
        MissingDependencyError: If the package of a tracker is not installed, or Orbax for sharded checkpoints.

    Example:

    ```python
    run = vitreous.train("digits", epochs=2)
    print(run.metrics["test"]["accuracy"])
    ```
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
    """Settles everything before training, trains, and returns the run. Arguments and errors as for `train`."""
    data, recipe, pretrained, teacher, seed, overwrite = (
        call[name] for name in ("data", "recipe", "pretrained", "teacher", "seed", "overwrite")
    )
    split, changes = split_options(data, seed, changes)
    is_auto, changes = take_auto_batch(changes)
    dataset = data if isinstance(data, Dataset) else load_dataset(data, **split)
    recipe_name, settled = settle_recipe(recipe, dataset, changes, pretrained=pretrained)
    check_start(settled, changes, has_weights=pretrained is not None, has_teacher=teacher is not None)
    if pretrained is None:
        spec, weights = random_start(settled, len(dataset.class_names)), None
    else:
        spec, weights, settled = pretrained_start(pretrained, changes.get("model"), settled, dataset, reporter)
    if teacher is not None and "small_fraction" not in changes:
        settled = dataclasses.replace(settled, small_fraction=0.0)  # it would see them enlarged again
    train_images = dataset.splits["train"]
    policy = select_precision(settled.precision, keras.backend.backend())
    labels_loss = training_loss(train_images, settled, len(dataset.class_names))
    loss: Loss | DistillationLoss = labels_loss
    if teacher is not None:
        channels = spec.config.num_channels
        asked = load_teacher(teacher, dataset, num_channels=channels, dtype=policy, reporter=reporter)
        loss = DistillationLoss(labels_loss, settled.distillation, asked)
    if is_auto and layout.is_spread:
        raise ConfigError(
            f"Cannot find the batch size on {layout.num_devices} devices. Expected a number. "
            "Received: batch_size='auto'. Find it on one device, and pass it times the number of devices."
        )
    if is_auto:
        has_rate = is_rate_given(changes)
        before = batch_of(out, resume, settled, is_rate_given=has_rate)
        settled = before or _settle_batch(settled, spec, dataset, loss, policy, reporter, is_rate_given=has_rate)
    settled = fit_to_images(settled, len(train_images), layout)
    loader = training_loader(
        train_images, spec.input, settled, reporter, seed=seed, num_classes=len(dataset.class_names), layout=layout
    )
    if settled.patience_epochs is not None and "val" not in dataset.splits:
        raise ConfigError(
            "Cannot stop early. Expected validation images beside patience_epochs. "
            f"Received: patience_epochs={settled.patience_epochs}, and no val split. Pass a val_fraction above 0."
        )
    with Interrupt() as interrupt:
        writer = open_writer(out, dataset.name, overwrite=overwrite, resume=resume, reporter=reporter)
        with unfinished(writer, reporter, trackers):
            config = describe_run(dataset, recipe_name, settled, spec, split, policy, layout=layout)
            if pretrained is not None:
                config["pretrained"] = describe_weights(pretrained)
            if isinstance(loss, DistillationLoss):
                config["teacher"] = loss.teacher.name
                config["teacher_fingerprint"] = loss.teacher.fingerprint
            kind = call["checkpoints"]
            checkpoints, config = open_checkpoints(
                writer, config, settled, resume=resume, reporter=reporter, layout=layout, kind=kind
            )
            writer.write_call(describe_call("train", call))
            interrupt.is_busy = layout.num_processes > 1  # SIGTERM for one is for all: they look at it together
            compared = weights if layout.num_processes > 1 else None  # alone, nobody asks for what takes a while
            layout.meet(identity_of(config, weights=compared, checkpoints=kind))
            path = layout.share(str(writer.path))
            with checkpoints:
                plan = (dataset, loader, settled, spec, weights, loss, config)
                _train(layout, reporter, trackers, interrupt, writer, checkpoints, *plan)
            if not layout.is_first:
                return Run(Path(path), config, {})
            place = writer.finish()
    return load_run(place)


def _settle_batch(
    recipe: Recipe,
    spec: ModelSpec,
    dataset: Dataset,
    loss: Loss | DistillationLoss,
    policy: str,
    reporter: Reporter,
    *,
    is_rate_given: bool,
) -> Recipe:
    """Returns the recipe with the largest batch that is worth its memory."""

    def create() -> tuple[Any, Any, Any]:
        model, average = (VisionTransformer(spec.config, name=spec.name, dtype=policy) for _ in range(2))
        return model, average, create_optimizer(model, recipe.optimizer)

    num_classes, images = len(dataset.class_names), dataset.splits["train"]
    size = find_batch_size(
        create,
        recipe=recipe,
        input_spec=spec.input,
        loss=loss,
        num_targets=num_classes if images.is_multi_label or recipe.augment.has_mixing else None,
        num_images=len(images),
        reporter=reporter,
    )
    if is_rate_given:
        return dataclasses.replace(recipe, batch_size=size)
    return scale_learning_rate(recipe, size, reporter)


def _train(
    layout: Layout,
    reporter: Reporter,
    trackers: Trackers,
    interrupt: Interrupt,
    writer: RunWriter,
    checkpoints: Checkpoints,
    dataset: Dataset,
    loader: Loader,
    settled: Recipe,
    spec: ModelSpec,
    weights: list[np.ndarray] | None,
    loss: Loss | DistillationLoss,
    config: dict[str, Any],
) -> None:
    """Trains; in the first process, also saves, measures and draws into `writer`'s folder."""
    policy = config["versions"]["policy"]
    say_plan(reporter, dataset, config["recipe_name"], settled, spec, policy, layout)
    state = random.getstate()
    random.seed(config["seed"])  # Keras draws the seeds of its layers here; its own set_random_seed loads TensorFlow
    small_size = settled.get_small_size(spec.config)
    is_resized = small_size != spec.config.image_size
    of_sizes = spec.config.replace(has_dynamic_size=True) if is_resized else spec.config
    model = VisionTransformer(of_sizes, name=spec.name, dtype=policy)
    average = VisionTransformer(spec.config, name=spec.name, dtype=policy)
    random.setstate(state)
    if weights is not None:
        model.set_weights(weights)
    optimizer = create_optimizer(model, settled.optimizer, seed=config["seed"])
    num_trained = sum(math.prod(variable.shape) for variable in optimizer.variables)
    if settled.optimizer.trained != "all":
        whole = count_parameters(spec.config)
        reporter.note(f"Trained  {num_trained:,} weights ({settled.optimizer.trained}) of a model of {whole:,}")
    writer.write_text("config.toml", CONFIG_HEAD + tomli_w.dumps(without_none(config)))
    trackers.start(writer.path, config)
    evaluate_batch = min(settled.batch_size * 2, 256)
    val = evaluation_loader(dataset.splits.get("val"), spec.input, evaluate_batch, layout)
    if layout.is_first:
        draw_augmentation(
            loader.images,
            spec.input,
            settled.augment,
            out=writer.partial / "augmented.png",
            class_names=dataset.class_names,
            seed=config["seed"],
        )
    loader.cache_folder = writer.partial
    classes = dataset.class_names
    history = fit(
        model,
        average,
        loader,
        optimizer=optimizer,
        input_spec=spec.input,
        config=settled.optimizer,
        loss=loss,
        evaluate=None if val is None else create_evaluate(average, val, spec.input, classes, layout),
        num_epochs=settled.epochs,
        budget_seconds=settled.budget_seconds,
        num_parts=settled.num_parts,
        small_size=small_size if is_resized else None,
        small_fraction=settled.small_fraction,
        patience_epochs=settled.patience_epochs,
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
    metrics = measure_run(writer.partial / "model.keras", dataset, spec.input, evaluate_batch, writer.partial)
    broken = {**dataset.broken, **loader.broken, **(val.broken if val else {}), **metrics.pop("broken_files")}
    if broken:
        reporter.warn(f"{len(broken)} broken images were left out; metrics.json names them.")
    metrics |= {
        "train_seconds": history.seconds,
        "num_steps": history.num_steps,
        "num_images_seen": history.num_images,
        "num_parameters": count_parameters(spec.config),
        "num_trained": num_trained,
        "is_interrupted": history.is_interrupted,
        "recoveries": history.recoveries,
        "broken_files": broken,
        "num_replaced": loader.num_replaced,
    }
    draw_run(writer.partial, history, dataset, spec)
    writer.write_text("metrics.json", json.dumps(metrics, indent=2))
    writer.write_text("README.md", describe_results(writer.path, writer.partial, config, metrics, history))
    trackers.finish(metrics, writer.partial)


def _save_model(average: VisionTransformer, spec: ModelSpec, path: Path) -> None:
    """Saves the averaged weights in a float32 model: it loads and answers the same on every backend."""
    model = VisionTransformer(spec.config, name=spec.name, dtype="float32")
    model.set_weights(average.get_weights())
    model.save(path)


def _keep_both(
    average: VisionTransformer, history: History, recipe: Recipe, spec: ModelSpec, folder: Path, reporter: Reporter
) -> None:
    """Saves the weights that scored best in validation and the last ones; the run's own are put into `average`."""
    best, last = history.best_weights, average.get_weights()
    is_best_kept = recipe.patience_epochs is not None
    row = history.rows[history.best_row or 0]
    name = "mean_average_precision" if "val_mean_average_precision" in row else "accuracy"
    reporter.note(
        f"Best     validation at epoch {row['epoch']}, {name.replace('_', ' ')} {row[f'val_{name}']:.2%}: "
        + ("model.keras; the last weights are last.keras" if is_best_kept else "best.keras; the last are model.keras")
    )
    average.set_weights(last if is_best_kept else best)
    _save_model(average, spec, folder / ("last.keras" if is_best_kept else "best.keras"))
    average.set_weights(best if is_best_kept else last)
