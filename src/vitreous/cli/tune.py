"""Commands that search before training: a learning rate, a recipe."""

import shlex
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from vitreous.cli.options import (
    ARCHITECTURE,
    AUGMENTATION,
    DATA,
    OPTIMIZER,
    RECIPE,
    ArchitectureOptions,
    AugmentOptions,
    Backend,
    OptimizerOptions,
    RecipeOptions,
    SplitOptions,
    describe_source,
    given,
    recipe_changes,
    start_backend,
)
from vitreous.cli.printing import check_output


def find_lr(
    data: Annotated[str, describe_source("Labelled images:")],
    /,
    *,
    out: Path = Path("find-lr.png"),
    recipe: str | None = None,
    pretrained: str | None = None,
    image_size: str | None = None,
    num_steps: int = 100,
    lowest_rate: float = 1e-6,
    highest_rate: float = 1.0,
    seed: int = 0,
    backend: Backend | None = None,
    data_options: Annotated[SplitOptions | None, Parameter(name="*", group=DATA)] = None,
    options: Annotated[RecipeOptions | None, Parameter(name="*", group=RECIPE)] = None,
    optimizer: Annotated[OptimizerOptions | None, Parameter(group=OPTIMIZER)] = None,
    augment: Annotated[AugmentOptions | None, Parameter(group=AUGMENTATION)] = None,
    architecture: Annotated[ArchitectureOptions | None, Parameter(group=ARCHITECTURE)] = None,
) -> int:
    """Suggest a learning rate: train for a few steps with a rate that grows, and look where the loss falls.

    Pass the options that you will train with; the rate depends on the model, the batch and the optimiser. Nothing is
    kept of the model.

    Args:
        data: Labelled images.
        out: Picture to write: .png, .svg or .pdf; the numbers go beside it as .json.
        recipe: Name of a recipe, or a TOML file. Default: chosen from the data.
        pretrained: Weights to start from, as for train.
        image_size: Image height and width in pixels: 224, or 192x256. Default: the recipe's.
        num_steps: Steps from the lowest rate to the highest, at least 20.
        lowest_rate: First learning rate.
        highest_rate: Last learning rate; the search ends before it once the loss has diverged.
        seed: Decides first weights, order and augmentation.
        backend: Keras backend. Default: KERAS_BACKEND, else the fastest one installed for this hardware.
        data_options: Columns and splits.
        options: Values that differ from the recipe's.
        optimizer: Values that differ from the recipe's.
        augment: Values that differ from the recipe's.
        architecture: Values in which the model differs from its name's.
    """
    check_output(out)
    changes = {**given(data_options), **recipe_changes(options, image_size, optimizer, augment, architecture)}
    start_backend(backend)
    from vitreous.training.progress import create_reporter
    from vitreous.training.rate_search import find_learning_rate

    found = find_learning_rate(
        data,
        out=out,
        recipe=recipe,
        pretrained=pretrained,
        num_steps=num_steps,
        lowest_rate=lowest_rate,
        highest_rate=highest_rate,
        seed=seed,
        reporter=create_reporter(),
        **changes,
    )
    print(f"Lowest   a tenth of its rate is {found.tenth:g}")
    print(f"Steepest {found.steepest:g}")
    print(f"Recipe   {found.recipe_name} has {found.recipe_rate:g}")
    print(f"Look at  {out}, {out.with_suffix('.json').name}")
    print(f"Use it   vitreous train {shlex.quote(data)} ... --optimizer.learning-rate {found.suggestion:g}")
    return 0


def tune(
    data: Annotated[str, describe_source("Labelled images:")],
    /,
    *,
    out: Path,
    trial_time: str | None = None,
    num_trials: Annotated[int | None, Parameter(name=("--num-trials", "--trials"))] = None,
    recipe: str | None = None,
    pretrained: str | None = None,
    image_size: str | None = None,
    seed: int = 0,
    backend: Backend | None = None,
    data_options: Annotated[SplitOptions | None, Parameter(name="*", group=DATA)] = None,
    options: Annotated[RecipeOptions | None, Parameter(name="*", group=RECIPE)] = None,
    optimizer: Annotated[OptimizerOptions | None, Parameter(group=OPTIMIZER)] = None,
    augment: Annotated[AugmentOptions | None, Parameter(group=AUGMENTATION)] = None,
    architecture: Annotated[ArchitectureOptions | None, Parameter(group=ARCHITECTURE)] = None,
) -> int:
    """Search for a better recipe by many short trainings, and leave it as a recipe file.

    --time is that of the whole search: vitreous tune photos/ --time 1h --out tuned/. The first trial is the recipe as
    it is; bad ones are given up early; validation images decide, test images are never looked at. The same command
    goes on where an earlier one ended. Every value that is given is kept; learning rate, weight decay, optimiser,
    label smoothing, augmentation, mixup and stochastic depth are searched otherwise. Needs vitreous[tune].

    Args:
        data: Labelled images.
        out: Folder of the search: best.toml, trials.csv, trials.png.
        trial_time: Time of training of each trial, such as 2m. Default: a twelfth of --time; with --epochs, so many
            epochs.
        num_trials: Trials at most, with those of earlier sessions. Default: as many as fit into --time.
        recipe: Name of the recipe to begin with, or a TOML file. Default: chosen from the data.
        pretrained: Weights that each trial starts from, as for train.
        image_size: Image height and width in pixels: 224, or 192x256. Default: the recipe's.
        seed: Decides what is drawn, and all that it decides in train.
        backend: Keras backend. Default: KERAS_BACKEND, else the fastest one installed for this hardware.
        data_options: Columns and splits.
        options: Values that stay as given, --time aside.
        optimizer: Values that stay as given.
        augment: Values that stay as given.
        architecture: Values in which the model differs from its name's.
    """
    changes = {**given(data_options), **recipe_changes(options, image_size, optimizer, augment, architecture)}
    start_backend(backend)
    from vitreous.training.progress import LineReporter
    from vitreous.training.tuning import tune as tune_recipe

    tuning = tune_recipe(
        data,
        out=out,
        trial_time=trial_time,
        num_trials=num_trials,
        recipe=recipe,
        pretrained=pretrained,
        seed=seed,
        reporter=LineReporter(),
        **changes,
    )
    name, best = tuning.score_name.replace("_", " "), tuning.best
    print(f"Best     val {name} {best.score:.2%}, trial {best.number} of {len(tuning.trials)}")
    print(f"Look at  {out}/best.toml, trials.png, trials.csv")
    command = f"vitreous train {shlex.quote(data)} --recipe {shlex.quote(str(out / 'best.toml'))}"
    print(f"Use it   {command}" + (f" --pretrained {shlex.quote(pretrained)}" if pretrained else ""))
    return 130 if tuning.is_interrupted else 0
