"""`vitreous tune`: short trainings in search of a better recipe for some data, with Optuna."""

import csv
import dataclasses
import importlib.util
import io
import json
import math
import shlex
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from vitreous import __version__
from vitreous.data import Dataset, load_dataset
from vitreous.errors import ConfigError, MissingDependencyError, RunError, TrainingError
from vitreous.evaluation import get_headline
from vitreous.figures import draw_trials
from vitreous.files import write_text
from vitreous.spec import check, check_minimum
from vitreous.training.planning import check_start, describe_command, settle_recipe, split_options, without_none
from vitreous.training.progress import Reporter, Status, format_seconds
from vitreous.training.recipe import Recipe, parse_seconds
from vitreous.training.recipe_header import RecipeHeader
from vitreous.training.search_space import Dimension, read_values, search_space, to_changes
from vitreous.training.trainer import train

if TYPE_CHECKING:
    import optuna

_MOST_LENGTHS = 12  # trials of full length that the time has room for
_CHECKPOINTS = 10  # of a trial, at which the worse half is given up
_STARTUP = 4  # trials before any is given up
_STUDY = "vitreous"


@dataclass(frozen=True)
class Trial:
    """One short training.

    Args:
        number: From 0; trial 0 is the recipe as it is.
        state: `complete`; `pruned`, given up early; or `failed`, its loss was no longer finite or the time was up.
        score: Accuracy on the validation images (mean average precision with several labels), in [0, 1]: of the whole
            training, or the last one before it was given up. None if there was none.
        seconds: Wall-clock time.
        params: Values of the recipe by their path.
    """

    number: int
    state: str
    score: float | None
    seconds: float
    params: dict[str, Any]


@dataclass(frozen=True)
class Tuning:
    """What a tuning found.

    Args:
        path: Its folder, with `best.toml`, `trials.csv`, `trials.png`.
        recipe: The best recipe.
        score_name: `accuracy`, or `mean_average_precision` with several labels.
        trials: All trials, those of earlier sessions too.
        is_interrupted: Whether the user ended it early.
    """

    path: Path
    recipe: Recipe
    score_name: str
    trials: tuple[Trial, ...] = field(repr=False)
    is_interrupted: bool

    @property
    def best(self) -> Trial:
        """The best whole trial; of equal ones the first."""
        return max((each for each in self.trials if each.state == "complete"), key=lambda each: each.score or 0.0)


class _TimeIsUpError(Exception):
    """Ends a trial when the time of the whole tuning is up."""


def tune(
    data: str | Path | Dataset,
    *,
    out: str | Path,
    time: str | None = None,
    trial_time: str | None = None,
    num_trials: int | None = None,
    recipe: str | Path | Recipe | None = None,
    pretrained: str | Path | None = None,
    seed: int = 0,
    reporter: Reporter | None = None,
    **changes: Any,
) -> Tuning:
    """Searches for a better recipe by short trainings, each measured on the validation images.

    The first trial is the recipe as it is; the others are drawn by Optuna's TPE around what went well. After each tenth
    of a trial it is given up if it is worse there than the median of those before (from the fifth trial on). Test
    images are never looked at. Everything is kept in `out` after each trial, and a tuning that ended, or was killed,
    goes on there: with the same arguments, and more time or trials.

    Searched are, with the ranges of `search_space`: learning rate, weight decay, optimiser, label smoothing, crop or
    shift, policy of augmentation and its magnitude, mixup, stochastic depth. A value given in `changes` is fixed.

    Args:
        data: Labelled images, as for `train`.
        out: Folder of the tuning.
        time: Wall-clock time for all trials together, such as 1h. Default: no limit; `num_trials` is then needed.
        trial_time: Time of training of each trial, such as 2m; its schedule ends with it. Default: a twelfth of `time`,
            or the epochs given in `changes`.
        num_trials: Trials at most, with those of earlier sessions.
        recipe: The recipe to begin with, its name, or a TOML file. Default: chosen from the data.
        pretrained: Weights that each trial starts from, as for `train`.
        seed: Decides what is drawn; and, the same for each trial, everything that it decides in `train`.
        reporter: Where trials are told. Default: nowhere.
        **changes: Fields of `DataConfig` and of `Recipe`, as for `train`.

    Returns:
        The trials and the best recipe.

    Raises:
        ConfigError: If there are no validation images, an option cannot work, or the folder holds a tuning of something
            else.
        MissingDependencyError: If Optuna is not installed.
        TrainingError: If no trial came to its end.

    Source: Bergstra et al. 2011, Algorithms for Hyper-Parameter Optimization, section 4 (TPE); Golovin et al. 2017,
    Google Vizier, section 3.2 (the median rule).
    """
    if importlib.util.find_spec("optuna") is None:
        raise MissingDependencyError("optuna", "tune", "`vitreous tune`")
    reporter = reporter or Reporter()
    if changes.get("batch_size") == "auto":
        raise ConfigError(
            "Cannot tune. Expected a number of images a step: the learning rate depends on it. "
            "Received: batch_size='auto'. Pass the number that `vitreous train --batch auto` chose."
        )
    length = _check_length(time, trial_time, num_trials, changes)
    budget = None if time is None else parse_seconds(time)
    clock = _Clock(budget)
    split, changes = split_options(data, seed, changes)
    dataset = data if isinstance(data, Dataset) else load_dataset(data, **split)
    if "val" not in dataset.splits:
        raise ConfigError(
            "Cannot tune without validation images. Expected a val split. "
            f"Received: splits {', '.join(dataset.splits)}. Pass a val_fraction above 0."
        )
    changes = {key: value for key, value in changes.items() if value is not None and key not in ("epochs", "time")}
    recipe_name, base = settle_recipe(recipe, dataset, changes, pretrained=pretrained)
    check_start(base, changes, has_weights=pretrained is not None, has_teacher=False)
    space = search_space(base, changes)
    splits = {name: dataset.splits[name] for name in ("train", "val")}
    session = _Session(
        folder=Path(out),
        dataset=dataclasses.replace(dataset, splits=splits),
        base=base,
        recipe_name=recipe_name,
        space=space,
        length=length,
        start={"pretrained": pretrained, "model": changes.get("model")} if pretrained else {},
        seed=seed,
        clock=clock,
        reporter=reporter,
    )
    return session.run(num_trials)


def _check_length(
    time: str | None, trial_time: str | None, num_trials: int | None, changes: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns how long a trial is: `{"time": ...}` or `{"epochs": ...}`."""
    if time is None and num_trials is None:
        raise ConfigError(
            "Cannot tune without an end. Expected a time or a number of trials. Received: time=None, num_trials=None. "
            "Pass for example time='1h'."
        )
    if num_trials is not None:
        check_minimum(1, num_trials=num_trials)
    epochs = changes.get("epochs")
    check(
        epochs is None or trial_time is None,
        "Cannot tune with two lengths of a trial.",
        "epochs or trial_time",
        f"epochs={epochs}, trial_time={trial_time!r}",
        "Leave one out.",
    )
    if epochs is not None:
        check_minimum(1, epochs=epochs)
        return {"epochs": epochs}
    if trial_time is None:
        check(
            time is not None,
            "Cannot tune.",
            "a length of each trial",
            "time=None, trial_time=None, epochs=None",
            "Pass one of them, for example trial_time='2m'.",
        )
        return {"time": f"{max(parse_seconds(str(time)) / _MOST_LENGTHS, 1):.0f}s"}
    seconds = parse_seconds(trial_time)
    check(
        time is None or seconds <= parse_seconds(str(time)),
        "Cannot tune.",
        "a trial that is no longer than the whole",
        f"trial_time={trial_time!r}, time={time!r}",
        "Pass a shorter trial_time, or a longer time.",
    )
    return {"time": trial_time}


class _Clock:
    """Counts down the time of a tuning."""

    def __init__(self, budget_seconds: float | None):
        self.start = time.monotonic()
        self.budget_seconds = budget_seconds

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    @property
    def left(self) -> float:
        return math.inf if self.budget_seconds is None else self.budget_seconds - self.seconds


class _TrialReporter(Reporter):
    """Listens to a trial in place of the user: hands its scores to `report`, and ends it when the time is up."""

    def __init__(self, clock: _Clock, report: Callable[[Mapping[str, Any], float], None]):
        self.clock = clock
        self.report = report
        self.progress = 0.0
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def step(self, status: Status) -> None:
        self.progress = status.progress
        if self.clock.left <= 0:
            raise _TimeIsUpError

    def row(self, row: Mapping[str, Any]) -> None:
        self.report(row, self.progress)
        if self.clock.left <= 0:
            raise _TimeIsUpError


@dataclass
class _Session:
    """The trials of one call of `tune`."""

    folder: Path
    dataset: Dataset
    base: Recipe
    recipe_name: str
    space: tuple[Dimension, ...]
    length: dict[str, Any]
    start: dict[str, Any]
    seed: int
    clock: _Clock
    reporter: Reporter
    score_name: str = "accuracy"

    def run(self, num_trials: int | None) -> Tuning:
        """Trains until the time or the trials are used up; writes what was found."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.score_name = "mean_average_precision" if self.dataset.is_multi_label else "accuracy"
        self._claim_folder()
        study = self._open_study()
        counts = ", ".join(f"{len(images):,} {name}" for name, images in self.dataset.splits.items())
        length = f"{self.length['epochs']} epochs" if "epochs" in self.length else f"{self.length['time']} of training"
        self.reporter.note(f"Data     {self.dataset.name}: {len(self.dataset.class_names)} classes; images: {counts}")
        self.reporter.note(
            f"Tune     {self.recipe_name}, {len(self.space)} values, trials of {length}, in {self.folder}"
        )
        if earlier := self._trials(study):
            self.reporter.note(f"         goes on after {len(earlier)} trials of an earlier session")
        is_interrupted, has_warned = False, False
        longest = parse_seconds(self.length["time"]) if "time" in self.length else 1.0
        while num_trials is None or len(self._trials(study)) < num_trials:
            if self.clock.left < longest:
                break
            start = time.monotonic()
            trial = study.ask()
            warnings, is_whole, is_interrupted = self._train(study, trial)
            for text in () if has_warned else warnings:
                self.reporter.warn(text)
            has_warned = has_warned or bool(warnings)
            if not is_whole:
                why = "interrupted" if is_interrupted else "the time is up"
                self.reporter.note(f"Trial {trial.number:<3}cut short: {why}. A later session begins with it.")
                break
            if study.trials[trial.number].state.name == "COMPLETE":
                longest = max(longest, 1.05 * (time.monotonic() - start))
            self._tell(study, trial.number)
            self._write(study)
        trials = self._trials(study)
        if not any(each.state == "complete" for each in trials):
            raise TrainingError(
                "Cannot say which recipe is best. Expected at least one whole trial. Received: "
                f"{len(trials)} trials, none of them whole. Pass a longer --time, or a shorter --trial-time."
            )
        return Tuning(self.folder, self._write(study), self.score_name, tuple(trials), is_interrupted)

    def _claim_folder(self) -> None:
        """Makes the folder, or sees to it that the tuning in it is this one."""
        identity = {
            "data": self.dataset.name,
            "fingerprint": self.dataset.fingerprint,
            "seed": self.seed,
            "start": {key: None if value is None else str(value) for key, value in self.start.items()},
            "trial": self.length,
            "recipe": self.base.to_dict(),
            "values": [each.key for each in self.space],
        }
        path = self.folder / "tuning.json"
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            differing = [key for key, value in identity.items() if found.get(key) != json.loads(json.dumps(value))]
            if differing:
                raise ConfigError(
                    f"Cannot go on tuning in {self.folder}. Expected the same data, recipe, seed and length of a "
                    f"trial. Received: another {', '.join(differing)}. Pass another --out, or the options that it "
                    "began with."
                )
            return
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise RunError(
                f"Cannot tune in {self.folder}. Expected a new folder, or one of an earlier tuning. Received: "
                f"{'other files' if self.folder.is_dir() else 'a file'}. Pass another --out."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(identity, indent=2))

    def _open_study(self) -> "optuna.Study":
        """Opens the journal; trials that were killed half-way are tried again."""
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
        from optuna.trial import TrialState

        journal = str(self.folder / "journal.log")
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(journal, lock_obj=JournalFileOpenLock(journal))),
            study_name=_STUDY,
            direction="maximize",
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=_STARTUP, n_warmup_steps=2),
        )
        killed = study.get_trials(states=(TrialState.RUNNING,))
        for trial in killed:
            study.tell(trial.number, state=TrialState.FAIL)
            study.enqueue_trial(trial.params)  # what it had not drawn yet is drawn anew
        if not study.trials:
            study.enqueue_trial(read_values(self.base, self.space))
        # A sampler draws the same numbers for the same seed; one that goes on must draw others.
        study.sampler = optuna.samplers.TPESampler(seed=self.seed + len(study.trials), n_startup_trials=_STARTUP)
        return study

    def _train(self, study: "optuna.Study", trial: "optuna.Trial") -> tuple[list[str], bool, bool]:
        """Trains once and tells the study.

        Returns:
            What a whole trial warned of, whether the trial came to an end of its own, and whether the user ended it.
        """
        import optuna
        from optuna.trial import TrialState

        params: dict[str, Any] = {}
        for each in self.space:
            if each.needs is None or params.get(each.needs[0], each.needs[1]) == each.needs[1]:
                params[each.key] = each.suggest(trial)
        recipe = self._recipe(params).merge(self.length)
        if recipe.on_nan == "stop":  # a trial that was cut short begins anew
            recipe = recipe.merge({"checkpoint_every": "none"})
        last: dict[str, float] = {}
        reported = 0

        def report(row: Mapping[str, Any], progress: float) -> None:
            nonlocal reported
            if (score := row.get(f"val_{self.score_name}")) is None:
                return
            last["score"] = float(score)
            trial.set_user_attr("last_score", float(score))
            reached = self._progress(row, progress)
            while reported < min(int(reached * _CHECKPOINTS), _CHECKPOINTS - 1):
                reported += 1
                trial.report(float(score), reported)
            if reported and trial.should_prune():
                raise optuna.TrialPruned

        listener = _TrialReporter(self.clock, report)
        work = self.folder / ".work"
        start = time.monotonic()
        state, score, is_whole, is_interrupted = TrialState.FAIL, None, True, False
        told: list[str] = []  # a run that was broken off warns of what is removed here
        try:
            run = train(
                self.dataset,
                out=work / "run",
                recipe=recipe,
                **self.start,
                seed=self.seed,
                resume="never",  # what a killed session left may be of another trial
                reporter=listener,
            )
            is_interrupted = bool(run.metrics["is_interrupted"])
            is_whole = not is_interrupted
            if is_whole:
                told = listener.warnings
                score, state = get_headline(run.metrics["val"])[1], TrialState.COMPLETE
        except optuna.TrialPruned:
            state = TrialState.PRUNED
        except _TimeIsUpError:
            is_whole = False
        except TrainingError as error:  # the loss is no longer finite: a trial that went wrong, not a tuning
            trial.set_user_attr("reason", str(error))
        finally:
            shutil.rmtree(work, ignore_errors=True)
        if is_whole:
            trial.set_user_attr("seconds", time.monotonic() - start)
        study.tell(trial, score, state=state)
        if not is_whole:
            study.enqueue_trial(params)
        return told, is_whole, is_interrupted

    def _recipe(self, params: Mapping[str, Any]) -> Recipe:
        """Returns the recipe of a trial: the one to begin with, untouched, where the values are its own."""
        is_base = params == {key: value for key, value in read_values(self.base, self.space).items() if key in params}
        return self.base if is_base else self.base.merge(to_changes(params))

    def _progress(self, row: Mapping[str, Any], progress: float) -> float:
        """Returns the share of a trial that is done."""
        if "epochs" in self.length:
            return float(row["epoch"]) / self.length["epochs"]
        return max(progress, float(row["seconds"]) / parse_seconds(self.length["time"]))

    def _trials(self, study: "optuna.Study") -> list[Trial]:
        """Returns the trials that have ended; one that was cut short is tried again, and is none."""
        states = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
        return [
            Trial(
                number=each.number,
                state=states[each.state.name],
                score=each.value if each.state.name == "COMPLETE" else each.user_attrs.get("last_score"),
                seconds=each.user_attrs["seconds"],
                params=dict(each.params),
            )
            for each in study.get_trials(deepcopy=False)
            if each.state.name in states and "seconds" in each.user_attrs
        ]

    def _tell(self, study: "optuna.Study", number: int) -> None:
        """Says what a trial gave."""
        trials = self._trials(study)
        trial = next(each for each in trials if each.number == number)
        name = self.score_name.replace("_", " ")
        score = "no score" if trial.score is None else f"val {name} {trial.score:.2%}"
        complete = [each for each in trials if each.state == "complete"]
        best = max(complete, key=lambda each: each.score or 0.0, default=None)
        standing = "" if best is None else f"; best {best.score:.2%}, trial {best.number}"
        values = ", ".join(f"{key.split('.')[1]} {_short(value)}" for key, value in trial.params.items())
        how = {"complete": "", "pruned": " (given up)", "failed": " (failed)"}[trial.state]
        self.reporter.note(f"Trial {number:<3}{score}{how}  {format_seconds(trial.seconds)}{standing}")
        is_base = self._recipe(trial.params) is self.base
        self.reporter.note(f"         {'the recipe as it is' if is_base else values}")
        if reason := study.trials[number].user_attrs.get("reason"):
            self.reporter.note(f"         {reason}")

    def _write(self, study: "optuna.Study") -> Recipe:
        """Writes table, picture and the best recipe so far; returns that."""
        trials = self._trials(study)
        columns = [each.key for each in self.space]
        table = io.StringIO(newline="")
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["number", "state", f"val_{self.score_name}", "seconds", *columns])
        for each in trials:
            values = [each.params.get(key) for key in columns]
            writer.writerow([each.number, each.state, each.score, round(each.seconds, 2), *values])
        write_text(self.folder / "trials.csv", table.getvalue())
        complete = [each for each in trials if each.state == "complete"]
        if not complete:
            return self.base
        rows = [{"number": t.number, "state": t.state, "score": t.score, "params": t.params} for t in trials]
        name = self.score_name.replace("_", " ")
        draw_trials(rows, self.folder / "trials.png", score_name=f"validation {name}")
        best = max(complete, key=lambda each: each.score or 0.0)
        recipe = self._recipe(best.params)
        length = self.length.get("time") or f"{self.length['epochs']} epochs"
        pruned = sum(each.state == "pruned" for each in trials)
        header = RecipeHeader(
            purpose=f"{self.dataset.name}: {self.recipe_name}, tuned. Train with it: "
            f"vitreous train DATA --recipe {shlex.quote(str(self.folder / 'best.toml'))}",
            source=f"vitreous {__version__} tune, trial {best.number} of {len(trials)} ({pruned} given up early) of "
            f"{length} each, seed {self.seed}; all of them: trials.csv. The recipe as it was had "
            + next((f"{each.score:.2%}" for each in complete if self._recipe(each.params) is self.base), "no score"),
            command=describe_command("tune"),
            minutes=best.seconds / 60,
            accuracy=f"{best.score:.2%} ({name} on {len(self.dataset.splits['val'])} validation images that chose it, "
            "so rather too high; 1 seed)",
        )
        write_text(self.folder / "best.toml", header.format() + tomli_w.dumps(without_none(recipe.to_dict())))
        return recipe


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
