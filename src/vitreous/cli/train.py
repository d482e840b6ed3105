"""Commands that train, and the picture of what training sees."""

import os
import shlex
import sys
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from vitreous.cli.options import (
    ARCHITECTURE,
    AUGMENTATION,
    DATA,
    DEVICES,
    DISTILLATION,
    OPTIMIZER,
    RECIPE,
    ArchitectureOptions,
    AugmentOptions,
    Backend,
    DataOptions,
    DistillationOptions,
    DistributionOptions,
    MaskedOptions,
    OptimizerOptions,
    PretrainOptimizerOptions,
    PretrainRecipeOptions,
    RecipeOptions,
    SplitOptions,
    Track,
    describe_source,
    given,
    parse_size,
    recipe_changes,
    start_devices,
)
from vitreous.cli.printing import metrics_line
from vitreous.errors import ConfigError
from vitreous.training.devices import DistributionConfig
from vitreous.training.recipe import MaskedConfig

if typing.TYPE_CHECKING:
    from vitreous.training.folds import CrossValidation
    from vitreous.training.run import Run


def train(
    data: Annotated[str | None, describe_source("Labelled images:")] = None,
    /,
    *,
    out: Path | None = None,
    recipe: str | None = None,
    pretrained: str | None = None,
    teacher: str | None = None,
    image_size: str | None = None,
    seed: int | None = None,
    folds: int | None = None,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
    resume: Path | None = None,
    anew: Annotated[bool, Parameter(name="--no-resume", negative=())] = False,
    report: Annotated[bool, Parameter(negative="--no-report")] = True,
    track: Track = None,
    backend: Backend | None = None,
    data_options: Annotated[DataOptions | None, Parameter(name="*", group=DATA)] = None,
    options: Annotated[RecipeOptions | None, Parameter(name="*", group=RECIPE)] = None,
    distribution: Annotated[DistributionOptions | None, Parameter(name="*", group=DEVICES)] = None,
    optimizer: Annotated[OptimizerOptions | None, Parameter(group=OPTIMIZER)] = None,
    distillation: Annotated[DistillationOptions | None, Parameter(group=DISTILLATION)] = None,
    augment: Annotated[AugmentOptions | None, Parameter(group=AUGMENTATION)] = None,
    architecture: Annotated[ArchitectureOptions | None, Parameter(group=ARCHITECTURE)] = None,
) -> int:
    """Train a classifier on labelled images and leave a run folder.

    The recipe is chosen from the data; every value of it can be changed here: vitreous train photos/ --time 20m
    --optimizer.learning-rate 5e-4. Ctrl-C ends training cleanly: what has been learnt is measured and saved (exit
    code 130). The state of training is saved as it goes (--checkpoint-every): after a crash or a kill, the same
    command, or vitreous train --resume RUN, goes on from there; SIGTERM saves it at once and exits with code 143.

    Args:
        data: Labelled images; may be left out with --resume.
        out: Folder of the run. Default: the first free runs/DATA-N.
        recipe: Name of a recipe, or a TOML file. Default: chosen from the data.
        pretrained: Weights to start from: timm/NAME.TAG, hf:OWNER/NAME, or a local file or folder.
        teacher: A trained model to learn from beside the labels, of the same classes: a run, timm/NAME.TAG,
            hf:OWNER/NAME, or a file.
        image_size: Image height and width in pixels: 224, or 192x256. Default: the recipe's.
        seed: Decides splits, first weights, order and augmentation. Default: 0.
        folds: Train so many runs, each with another part of the images as test set, and give mean and spread; with
            --fold, train that one alone.
        overwrite: Replace a run that lies at --out, once the new one is whole; an unfinished one that was begun with
            other options gives way too.
        resume: Continue the unfinished run of this path, with the data and options that it began with.
        anew: Remove an unfinished run that lies at --out, and begin anew. Default: the same command continues it.
        report: Write report.html into the run too, without robustness; not for each of --folds.
        backend: Keras backend. Default: KERAS_BACKEND, else the fastest one installed for this hardware.
        data_options: Columns and splits.
        options: Values that differ from the recipe's.
        distribution: Which devices and processes train together (docs/scaling.md).
        optimizer: Values that differ from the recipe's.
        distillation: How to learn from the teacher; values that differ from the recipe's.
        augment: Values that differ from the recipe's.
        architecture: Values in which the model differs from its name's.
    """
    changes = {
        **given(data_options),
        **recipe_changes(options, image_size, optimizer, augment, architecture),
        "distillation": given(distillation) or None,
    }
    shares = start_devices(distribution, backend)
    from vitreous.calibration import describe_calibration
    from vitreous.training import train as train_run
    from vitreous.training import train_folds
    from vitreous.training.progress import create_reporter, format_seconds

    changes |= {
        "recipe": recipe,
        "pretrained": pretrained,
        "teacher": teacher,
        "num_folds": folds,
        "track": track or (),
        **shares.given,
    }
    if shares.ray is not None:
        changes |= {"out": out, "seed": seed or 0, "overwrite": overwrite}
        run = _train_on_ray("train", shares, data, changes, folds=folds, resume=resume, anew=anew)
    elif resume is not None:
        run = _resume("train", resume, data, {**changes, "seed": seed}, out=out, overwrite=overwrite, anew=anew)
    else:
        changes |= {"out": out, "seed": seed or 0, "overwrite": overwrite, "resume": "never" if anew else "auto"}
        data = _require(data)
        if folds is not None and changes.get("fold") is None:
            return _say_folds(train_folds(data, reporter=create_reporter(), **changes))
        run = train_run(data, reporter=create_reporter(), **changes)
    if not run.metrics:
        return 0  # of another process, which says the rest
    print(f"Trained  {format_seconds(run.metrics['train_seconds'])}, {run.metrics['num_images_seen']:,} images")
    for split in ("val", "test"):
        if split in run.metrics:
            print(metrics_line(split, run.metrics[split]))
    if "calibration" in run.metrics:
        print(f"Sure     {describe_calibration(run.metrics['calibration'])}")
    path = Path(os.path.relpath(run.path)) if run.path.is_relative_to(Path.cwd()) else run.path
    names = ("curves", "confusion", "labels", "predictions", "reliability", "patches", "augmented")
    pictures = [f"{name}.png" for name in names if (path / f"{name}.png").exists()]
    print(f"Look at  {path}/README.md, {', '.join(pictures)}")
    if report:
        _write_report(run)
    print(f"Use it   vitreous predict {shlex.quote(str(path))} IMAGE...")
    return 130 if run.metrics["is_interrupted"] else 0


def _write_report(run: "Run") -> None:
    """Writes the report of a run that was just trained; a run without one is a run all the same."""
    from vitreous.cli.report import report_line
    from vitreous.errors import VitreousError
    from vitreous.report import write_report

    if not {"val", "test"} & set(run.metrics):
        return  # nothing to measure it on
    try:
        print(report_line(write_report(run, split="test" if "test" in run.metrics else "val")))
    except VitreousError as error:
        print(f"Warning: there is no report: {error}", file=sys.stderr)


def pretrain(
    data: Annotated[
        str | None,
        describe_source("A folder of images, labelled or not;", "Test images are left out where there are some."),
    ] = None,
    /,
    *,
    out: Path | None = None,
    recipe: str | None = None,
    image_size: str | None = None,
    seed: int | None = None,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
    resume: Path | None = None,
    anew: Annotated[bool, Parameter(name="--no-resume", negative=())] = False,
    track: Track = None,
    backend: Backend | None = None,
    masked: Annotated[MaskedOptions | None, Parameter(name="*", group=RECIPE)] = None,
    options: Annotated[PretrainRecipeOptions | None, Parameter(name="*", group=RECIPE)] = None,
    distribution: Annotated[DistributionOptions | None, Parameter(name="*", group=DEVICES)] = None,
    optimizer: Annotated[PretrainOptimizerOptions | None, Parameter(group=OPTIMIZER)] = None,
    augment: Annotated[AugmentOptions | None, Parameter(group=AUGMENTATION)] = None,
    architecture: Annotated[ArchitectureOptions | None, Parameter(group=ARCHITECTURE)] = None,
) -> int:
    """Train an encoder on images without labels: most patches are hidden, and it learns to fill them in.

    Then start a classifier from it: vitreous train LABELLED --pretrained RUN. Worth it where you have many images and
    few labels.

    Args:
        data: Images, labelled or not; may be left out with --resume.
        out: Folder of the run. Default: the first free runs/DATA-pretrained-N.
        recipe: Name of a recipe, or a TOML file. Default: chosen from the data.
        image_size: Image height and width in pixels: 224, or 192x256. Default: the recipe's.
        seed: Decides which images validate, first weights, order, augmentation and what is hidden. Default: 0.
        overwrite: Replace a run that lies at --out, once the new one is whole; an unfinished one that was begun with
            other options gives way too.
        resume: Continue the unfinished run of this path, with the data and options that it began with.
        anew: Remove an unfinished run that lies at --out, and begin anew. Default: the same command continues it.
        backend: Keras backend. Default: KERAS_BACKEND, else the fastest one installed for this hardware.
        masked: What is hidden, and what fills it in.
        options: Values that differ from the recipe's.
        distribution: Which devices and processes train together (docs/scaling.md).
        optimizer: Values that differ from the recipe's.
        augment: Values that differ from the recipe's.
        architecture: Values in which the model differs from its name's.
    """
    changes = recipe_changes(options, image_size, optimizer, augment, architecture)
    shares = start_devices(distribution, backend)
    from vitreous.training import pretrain as pretrain_run
    from vitreous.training.progress import create_reporter, format_seconds

    changes |= {"recipe": recipe, "track": track or (), **shares.given}
    if shares.ray is not None:
        changes |= {"out": out, "seed": seed or 0, "overwrite": overwrite, "masked": MaskedConfig(**given(masked))}
        run = _train_on_ray("pretrain", shares, data, changes, folds=None, resume=resume, anew=anew)
    elif resume is not None:
        changes |= {"seed": seed, "masked": given(masked) or None}
        run = _resume("pretrain", resume, data, changes, out=out, overwrite=overwrite, anew=anew)
    else:
        changes |= {"out": out, "seed": seed or 0, "overwrite": overwrite, "resume": "never" if anew else "auto"}
        masked_config = MaskedConfig(**given(masked))
        run = pretrain_run(_require(data), reporter=create_reporter(), masked=masked_config, **changes)
    if not run.metrics:
        return 0  # of another process, which says the rest
    print(f"Trained  {format_seconds(run.metrics['train_seconds'])}, {run.metrics['num_images_seen']:,} images")
    if run.metrics["val_loss"] is not None:
        print(f"Val      loss {run.metrics['val_loss']:.3f} on hidden patches (the mean alone: 1)")
    path = Path(os.path.relpath(run.path)) if run.path.is_relative_to(Path.cwd()) else run.path
    print(f"Look at  {path}/README.md, reconstruction.png, curves.png")
    print(f"Use it   vitreous train DATA --pretrained {shlex.quote(str(path))}")
    return 130 if run.metrics["is_interrupted"] else 0


def _require(data: str | None) -> str:
    if data is None:
        raise ConfigError(
            "Cannot train. Expected data: a folder of images, or another source. Received: none. "
            "Name it, or continue an unfinished run: --resume RUN."
        )
    return data


def _train_on_ray(
    task: Literal["train", "pretrain"],
    shares: DistributionConfig,
    data: str | None,
    changes: dict[str, Any],
    *,
    folds: int | None,
    resume: Path | None,
    anew: bool,
) -> "Run":
    """Trains on a Ray cluster; what is unfinished at --out goes on by itself."""
    from vitreous.training.progress import create_reporter
    from vitreous.training.ray_workers import train_on_ray

    others = {"--folds": folds is not None and changes.get("fold") is None, "--resume": resume, "--no-resume": anew}
    beside = [name for name, is_given in others.items() if is_given]
    if beside:
        raise ConfigError(
            f"Cannot train on Ray. Expected no {beside[0]} beside --ray. Received: {', '.join(beside)}. "
            "Leave it out: the same command goes on with the unfinished run at --out."
        )
    arguments = {name: value for name, value in changes.items() if value is not None and value != ()}
    return train_on_ray(task, _require(data), shares, reporter=create_reporter(), **arguments)


def _resume(
    task: Literal["train", "pretrain"],
    path: Path,
    data: str | None,
    changes: dict[str, Any],
    *,
    out: Path | None,
    overwrite: bool,
    anew: bool,
) -> "Run":
    """Continues an unfinished run with the options that it began with; others that are given must be the same."""
    from vitreous.training.progress import create_reporter
    from vitreous.training.resume import resume as resume_run

    others = {"--out": out, "--overwrite": overwrite, "--no-resume": anew}
    beside = [name for name, is_given in others.items() if is_given]
    if beside:
        raise ConfigError(
            f"Cannot resume {path}. Expected no {beside[0]} beside --resume, which names the run. "
            f"Received: {', '.join(beside)}. Leave it out."
        )
    given_changes = {name: value for name, value in changes.items() if value is not None and value != ()}
    return resume_run(path, data=data, task=task, reporter=create_reporter(), **given_changes)


def _say_folds(result: "CrossValidation") -> int:
    """Prints what the folds say together; returns the exit code."""
    from vitreous.training.folds import spread_line

    if result.is_interrupted:
        return 130
    for split in ("val", "test"):
        spreads = {name: value for name, value in result.metrics.get(split, {}).items() if isinstance(value, dict)}
        if spreads:
            print(f"{split.capitalize():<8} " + ", ".join(spread_line(*item) for item in spreads.items()))
    path = Path(os.path.relpath(result.path)) if result.path.absolute().is_relative_to(Path.cwd()) else result.path
    print(f"Look at  {path}/README.md: mean ± standard deviation of {result.metrics['num_folds']} folds")
    return 0


def draw_augmented(
    data: Annotated[str, describe_source("An image file;")],
    /,
    *,
    recipe: str | None = None,
    image_size: str | None = None,
    seed: int = 0,
    out: Path = Path("augmented.png"),
    data_options: Annotated[SplitOptions | None, Parameter(name="*", group=DATA)] = None,
    augment: Annotated[AugmentOptions | None, Parameter(group=AUGMENTATION)] = None,
) -> int:
    """Draw what training sees: one image in several epochs, and a batch with its targets.

    Args:
        data: An image file, or labelled images.
        recipe: Name of a recipe, or a TOML file. Default: chosen from the data.
        image_size: Image height and width in pixels: 224, or 192x256. Default: the recipe's.
        seed: Decides splits and draws.
        out: Picture to write: .png, .svg or .pdf.
        data_options: Columns and splits.
        augment: Values that differ from the recipe's.
    """
    from vitreous.data import load_dataset, load_images
    from vitreous.data.sources.columns import is_image_path
    from vitreous.figures.augmentation import draw_augmentation, first_readable
    from vitreous.registry import get_spec
    from vitreous.training.recipe import choose_recipe, load_recipe

    size = parse_size(image_size, "image-size")
    name, class_names = "", tuple[str, ...]()
    if is_image_path(data) and not Path(data).is_dir():
        images = load_images(data)
        images = images.with_labels(images.labels + 1)  # one class, of no name
        images.load(0)  # says what is wrong with it, if anything is
    else:
        dataset = load_dataset(data, seed=seed, **given(data_options))
        images, class_names = dataset.splits["train"], dataset.class_names
        name = dataset.name if dataset.root is None else ""
    side = min(first_readable(images)[1].shape[:2])
    base = load_recipe(recipe or choose_recipe(name, side, len(images)))
    settled = base.merge({"augment": given(augment)})
    spec = get_spec(settled.model, image_size=size or settled.image_size, num_channels=settled.num_channels)
    written = draw_augmentation(images, spec.input, settled.augment, out=out, class_names=class_names, seed=seed)
    print(f"Wrote {written}")
    return 0
