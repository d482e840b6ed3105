"""Cross-validation: a run for each fold, and what they say together."""

import json
import re
import shlex
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitreous import __version__
from vitreous.data.sources import load_dataset
from vitreous.errors import ConfigError, DataError, RunError, RunExistsError
from vitreous.files import write_text
from vitreous.training.distribute import create_layout
from vitreous.training.planning import free_path, split_options
from vitreous.training.progress import Reporter
from vitreous.training.resume import FREE_ARGUMENTS as FREE
from vitreous.training.resume import describe_call
from vitreous.training.run import Run, is_run, load_run
from vitreous.training.trainer import train


@dataclass(frozen=True)
class CrossValidation:
    """The runs of all folds.

    Args:
        path: Folder that the runs lie in, as `fold-1` to `fold-K`.
        runs: The runs, in the order of the folds; fewer than K if training was interrupted.
        metrics: What `metrics.json` holds; empty if training was interrupted.
    """

    path: Path
    runs: tuple[Run, ...]
    metrics: dict[str, Any]

    @property
    def is_interrupted(self) -> bool:
        """Whether training was interrupted; there are no metrics then."""
        return not self.metrics


def train_folds(
    data: str | Path,
    *,
    num_folds: int,
    out: str | Path | None = None,
    seed: int = 0,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    **changes: Any,
) -> CrossValidation:
    """Trains a classifier K times, each time with another fold as the test set.

    The folds partition the images: class by class, label by label, or by whole groups with a `group_column`.

    Args:
        data: A source as for `load_dataset`, without a split of its own.
        num_folds: K, at least 2.
        out: Folder of the runs `fold-1` to `fold-K`, `metrics.json` and `README.md`. Default: the first free
            `runs/DATA-N`.
        seed: Decides folds and validation images, and everything else as for `train`.
        overwrite: Whether runs that lie there may be replaced; folds beyond `num_folds` are then removed at the end.
            An unfinished cross-validation of the same options goes on all the same.
        reporter: Where progress is shown. Default: nowhere.
        **changes: As for `train`.

    Returns:
        The runs and their metrics: for each number measured on the test images its mean, its standard deviation
        between the folds (with K - 1 in the denominator), and its values.

    Raises:
        ConfigError: If `fold` is given, which `train` takes.
        RunExistsError: If something lies where a run would go, and `overwrite` is False.
        Exception: As for `train`.

    Example:

    ```python
    result = train_folds("photos", num_folds=5)
    print(result.metrics["test"]["accuracy"]["mean"])
    ```
    """
    if changes.get("fold") is not None:
        raise ConfigError(
            f"Cannot train all folds. Expected no single fold. Received: fold={changes['fold']}. "
            "Leave it out, or call train with num_folds and fold."
        )
    if create_layout(changes.get("devices"), changes.get("parallel")).num_processes > 1:
        raise ConfigError(
            f"Cannot train all folds in several processes. Expected a single fold. Received: num_folds={num_folds}. "
            "Pass --fold beside --folds, one command for each."
        )
    reporter = reporter or Reporter()
    options, _ = split_options(data, seed, {**changes, "num_folds": num_folds, "fold": 1})
    name = load_dataset(data, **options).name  # before anything is said: data that cannot be used is one line
    folder = Path(out) if out is not None else free_path(name, reporter)
    call = describe_call("train", {"data": data, "num_folds": num_folds, "seed": seed, **changes})
    progress = _Progress(folder / "folds.json", call)
    is_resumed = changes.get("resume", "auto") == "auto" and progress.read(overwrite=overwrite)
    places = [folder / f"fold-{fold}" for fold in range(1, num_folds + 1)]
    taken = [*_find_folds(folder).values()]
    taken += [place for place in (*places, folder / "model.keras", folder / "metrics.json") if place.exists()]
    if (folder / "model.keras").exists() or (taken and not overwrite and not is_resumed):
        raise RunExistsError(
            f"Cannot write {num_folds} folds in {folder}. Expected a free path. "
            f"Received: {taken[0].name}, which exists. Pass another --out, or --overwrite to replace folds."
        )
    runs = []
    progress.write()
    for fold, place in enumerate(places, 1):
        if fold in progress.finished and is_run(place):
            run = load_run(place)
            fingerprint = load_dataset(data, **{**options, "fold": fold}).fingerprint
            if run.config["data"]["fingerprint"] != fingerprint:
                raise DataError(
                    f"Cannot go on with the folds in {folder}. Expected the data that they began with. "
                    f"Received: other images or labels than in {place.name}. Restore them, or begin anew: --no-resume "
                    "--overwrite (resume='never', overwrite=True)."
                )
            reporter.note(f"Fold     {fold} of {num_folds} is finished: {place}")
            runs.append(run)
            continue
        reporter.note(f"Fold     {fold} of {num_folds}")
        run = train(
            data,
            out=place,
            seed=seed,
            overwrite=overwrite or (is_resumed and is_run(place)),  # finished, but not noted as such
            reporter=reporter,
            **{**changes, "num_folds": num_folds, "fold": fold},
        )
        runs.append(run)
        if run.metrics["is_interrupted"]:
            reporter.warn(f"Interrupted in fold {fold} of {num_folds}: there is no mean over the folds.")
            return CrossValidation(folder, tuple(runs), {})
        progress.finished.append(fold)
        progress.write()
    metrics = summarize_folds(runs)
    for fold, place in _find_folds(folder).items():
        if fold > num_folds and is_run(place):  # of an earlier cross-validation, whose numbers are replaced below
            shutil.rmtree(place)
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2))
    write_text(folder / "README.md", _readme(folder, runs, metrics))
    progress.path.unlink()
    return CrossValidation(folder, tuple(runs), metrics)


class _Progress:
    """Which folds of an unfinished cross-validation are finished, beside what was asked for."""

    def __init__(self, path: Path, call: dict[str, Any]):
        self.path, self.call = path, json.loads(json.dumps(call))
        self.finished: list[int] = []

    def read(self, *, overwrite: bool) -> bool:
        """Takes up what is unfinished; returns whether there is anything.

        Raises:
            ConfigError: If other options were asked for, a fold was begun with them, and nothing may be overwritten.
            RunError: If the file is damaged.
        """
        if not self.path.is_file():
            return False
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            call, finished = dict(found["call"]), [int(fold) for fold in found["finished"]]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"Cannot go on with the folds in {self.path.parent}. Expected {self.path.name} as it was written. "
                f"Received: a damaged file ({error}). Remove it, and pass --overwrite to begin anew."
            ) from error
        names = [name for name in {**call, **self.call} if call.get(name) != self.call.get(name)]
        names = [name for name in names if name not in FREE]
        folder = self.path.parent
        is_begun = bool(finished) or any(folder.glob("fold-*")) or any(folder.glob(".fold-*.partial"))
        if names and (overwrite or not is_begun):
            return False
        if names:
            before, now = (", ".join(f"{name}={values.get(name)!r}" for name in names) for values in (call, self.call))
            raise ConfigError(
                f"Cannot go on with the folds in {self.path.parent}. Expected the options that they began with: "
                f"{before}. Received: {now}. Give the same ones, or pass another --out, or --overwrite to begin anew."
            )
        self.finished = finished
        return True

    def write(self) -> None:
        """Writes the file whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, json.dumps({"call": self.call, "finished": self.finished}, indent=2))


def _find_folds(folder: Path) -> dict[int, Path]:
    """Returns what lies in a folder under the name of a fold, in order."""
    found = {place: re.fullmatch(r"fold-([1-9]\d*)", place.name) for place in folder.glob("fold-*")}
    return dict(sorted((int(match[1]), place) for place, match in found.items() if match))


def summarize_folds(runs: Sequence[Run]) -> dict[str, Any]:
    """Returns the mean and the spread of what the runs of all folds measured.

    Args:
        runs: Two or more runs.

    Returns:
        A dict fit for JSON: `num_folds`; for `val` and `test`, if every run has it, a dict from the name of each number
        to its `mean`, its standard deviation `std` and its `values`, fold by fold; and `num_examples`, images in all.
    """
    metrics: dict[str, Any] = {"num_folds": len(runs), "runs": [run.path.name for run in runs]}
    for split in ("val", "test"):
        measured = [run.metrics.get(split) for run in runs]
        found = [each for each in measured if each is not None]
        if len(found) < len(runs):
            continue
        names = [name for name, value in found[0].items() if _is_number(value) and name != "num_examples"]
        metrics[split] = {"num_examples": sum(each["num_examples"] for each in found)}
        for name in names:
            values = [float(each[name]) for each in found if _is_number(each.get(name))]
            if len(values) == len(runs):
                spread = {"mean": statistics.fmean(values), "std": statistics.stdev(values), "values": values}
                metrics[split][name] = spread
    return metrics


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _readme(folder: Path, runs: Sequence[Run], metrics: dict[str, Any]) -> str:
    config = runs[0].config
    names = [name for name, value in metrics.get("test", {}).items() if isinstance(value, dict)]
    lines = [
        f"# {folder.name}",
        "",
        f"{config['model']['name']} on {config['data']['name']}, {len(runs)} folds: each image is a test image once "
        f"({metrics.get('test', {}).get('num_examples', 0)} in all). Seed {config['seed']}.",
        "",
        f"| fold | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
        *(
            f"| [{run.path.name}]({run.path.name}/README.md) | "
            + " | ".join(f"{metrics['test'][name]['values'][i]:.4f}" for name in names)
            + " |"
            for i, run in enumerate(runs)
        ),
        "| **mean** | " + " | ".join(f"**{metrics['test'][name]['mean']:.4f}**" for name in names) + " |",
        "| standard deviation | " + " | ".join(f"{metrics['test'][name]['std']:.4f}" for name in names) + " |",
        "",
        "The standard deviation is between the folds; their training images overlap, so it is no confidence interval.",
        "",
        f"Made by vitreous {__version__} with `{config['command']}`.",
        "",
        "- `fold-1` ...: a run each, with its model; `metrics.json`: these numbers",
        "",
        f"Classify images: `vitreous predict {shlex.quote(folder.name)}/fold-1 IMAGE...` in the folder above.",
        "",
    ]
    return "\n".join(lines)


def spread_line(name: str, spread: dict[str, Any]) -> str:
    """Returns one number of `summarize_folds` as text, such as `accuracy 91.20% ± 1.05%`."""
    unit = "%" if name not in ("loss",) and 0 <= spread["mean"] <= 1 else ""
    scale = 100 if unit else 1
    digits = 2 if unit else 3
    return f"{name} {spread['mean'] * scale:.{digits}f}{unit} ± {spread['std'] * scale:.{digits}f}{unit}"
