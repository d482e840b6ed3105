"""A run as one HTML page: what it was trained on, what it can do, where it fails, how to make it again."""

import csv
import math
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vitreous.calibration import to_probabilities
from vitreous.data import load_dataset
from vitreous.data.corruptions import CORRUPTIONS, SEVERITIES
from vitreous.data.inspection import Inspection, inspect_dataset, inspect_fast
from vitreous.errors import ConfigError, DataError, MissingPathError
from vitreous.explanation import Explainer, Explanation
from vitreous.files import replacing
from vitreous.measurement import (
    Answers,
    collect_answers,
    describe_device,
    draw_sample,
    load_images_of,
    measure_answers,
    measure_robustness,
    measure_speed,
)
from vitreous.training import Run, load_run
from vitreous.training.card import describe_limits, update_limits

MAX_EXAMPLES = 100
"""Mistakes that a page may show, and as many uncertain answers."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One image that the model was asked about.

    Args:
        name: Of the image.
        truths: Its classes.
        answers: The model's: (name, probability), the most probable first.
        is_right: Whether they agree.
        explained: The class that `explanation` explains.
        explanation: What speaks for that class.
    """

    name: str
    truths: tuple[str, ...]
    answers: tuple[tuple[str, float], ...]
    is_right: bool
    explained: str
    explanation: Explanation


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a report shows.

    Args:
        run: The run.
        answers: Its answers to labelled images.
        metrics: What `evaluate` returns of them.
        robustness: What `measure_robustness` returns, where it was measured.
        inspection: Of the data that the run was trained on, where they can be read.
        data_note: What is to be said of that; may be empty.
        history: Columns of `history.csv`, None where there is no number.
        mistakes: Wrong answers, the surest first.
        unsure: Answers that were the least sure.
        speed: What `measure_speed` returns, and `backend`, `device`, `model_bytes`.
        command: That made the page.
        seconds: That all this took.
    """

    run: Run
    answers: Answers
    metrics: dict[str, Any]
    robustness: dict[str, Any] | None = None
    inspection: Inspection | None = None
    data_note: str = ""
    history: dict[str, list[float | None]] = field(default_factory=dict)
    mistakes: Sequence[Case] = ()
    unsure: Sequence[Case] = ()
    speed: dict[str, Any]
    command: str
    seconds: float


@dataclass(frozen=True)
class RunReport:
    """A report that was written.

    Args:
        path: The page.
        num_bytes: Its size.
        facts: What it shows.
        has_card: Whether the limits in the run's README.md were written anew.
    """

    path: Path
    num_bytes: int
    facts: RunFacts
    has_card: bool


def write_report(
    run: str | Path | Run,
    data: str | Path | None = None,
    *,
    out: str | Path | None = None,
    split: str | None = None,
    robustness: bool = False,
    max_images: int = 1000,
    check_images: bool = False,
    num_examples: int = 12,
    on_progress: Progress | None = None,
    **changes: Any,
) -> RunReport:
    """Writes a report of a run: one HTML file, pictures inside, nothing loaded from elsewhere.

    With robustness measured on the run's own test images, the limits in its model card (`README.md`) are written anew.

    Args:
        run: A run, or its folder.
        data: Labelled images to measure it on, as for `evaluate`. Default: the data that the run was trained on.
        out: File to write. Default: `report.html` in the run's folder. An existing one is replaced.
        split: As for `evaluate`.
        robustness: Whether to measure under the 15 common corruptions, at severities 1 to 5: 76 passes over at most
            `max_images` images.
        max_images: As for `evaluate`.
        check_images: Whether to decode every image of the training data and compare it with all others, as `inspect`
            does. Default: only what costs little: names, counts, equal files.
        num_examples: How many mistakes to show, and half as many uncertain answers, in [0, 100].
        on_progress: Called with the images done and the images in all.
        **changes: Fields of `DataConfig` that differ from those of training.

    Returns:
        Where the page is, and what it shows.

    Raises:
        ConfigError: If an option cannot work.
        DataError: If the data cannot be used, or has a class that the run does not know.
        MissingPathError: If a path does not exist.
        RunError: If `run` is no run.

    Example:

    ```python
    report = vitreous.write_report("runs/photos-1", robustness=True)
    print(report.path, report.facts.metrics["accuracy"])
    ```
    """
    from vitreous.report.run_page import render_run

    run = run if isinstance(run, Run) else load_run(run)
    path = Path(out) if out is not None else run.path / "report.html"
    if path.is_dir() or not path.absolute().parent.is_dir():
        received = "a folder" if path.is_dir() else f"no folder {path.parent}"
        raise ConfigError(
            "Cannot write the report. Expected the path of a file in a folder that exists. "
            f"Received: out={str(path)!r}, {received}. Pass another out."
        )
    facts = collect_facts(
        run,
        data,
        split=split,
        robustness=robustness,
        max_images=max_images,
        check_images=check_images,
        num_examples=num_examples,
        on_progress=on_progress,
        **changes,
    )
    page = render_run(facts).encode("utf-8")
    with replacing(path) as temporary:
        temporary.write_bytes(page)
    has_card = robustness and data is None and split in (None, "test") and _write_limits(facts)
    return RunReport(path, len(page), facts, has_card)


def collect_facts(
    run: Run,
    data: str | Path | None = None,
    *,
    split: str | None = None,
    robustness: bool = False,
    max_images: int = 1000,
    check_images: bool = False,
    num_examples: int = 12,
    on_progress: Progress | None = None,
    **changes: Any,
) -> RunFacts:
    """Measures what a report shows. Args and errors: as for `write_report`."""
    import keras

    from vitreous.model import create_predict_function

    start = time.perf_counter()
    run.check_has_classes()
    if max_images < 1 or not 0 <= num_examples <= MAX_EXAMPLES:
        raise ConfigError(
            f"Cannot make the report. Expected one or more images to corrupt, and 0 to {MAX_EXAMPLES} examples. "
            f"Received: max_images={max_images}, num_examples={num_examples}. Leave them out for 1000 and 12."
        )
    source, found = load_images_of(run, data, split=split, **changes)
    sample = draw_sample(len(found.images), max_images)
    passes = 1 + len(CORRUPTIONS) * len(SEVERITIES) if robustness else 0
    total, done = len(found.images) + passes * len(sample), 0

    def count(number: int) -> None:
        nonlocal done
        done = min(done + number, total)
        if on_progress:
            on_progress(done, total)

    model = run.load_model()
    predict = create_predict_function(model, run.input_spec)
    answers = collect_answers(run, source, found, predict=predict, on_batch=count)
    metrics = measure_answers(run, answers)
    table = None
    if robustness:
        table = measure_robustness(
            predict, found.images.take(sample), run.input_spec, run.class_names, indices=sample, on_batch=count
        )
    explainer = Explainer(
        model, input_spec=run.input_spec, class_names=run.class_names, is_multi_label=run.is_multi_label
    )
    mistakes, unsure = _choose_cases(run, answers, num_examples)
    backend = keras.backend.backend()
    speed = measure_speed(predict, run.input_spec, batch_size=min(64, len(found.images)))
    inspection, data_note = _check_data(run, is_whole=check_images)
    return RunFacts(
        run=run,
        answers=answers,
        metrics=metrics,
        robustness=table,
        inspection=inspection,
        data_note=data_note,
        history=_read_history(run.path / "history.csv"),
        mistakes=[_describe_case(run, answers, explainer, place) for place in mistakes],
        unsure=[_describe_case(run, answers, explainer, place) for place in unsure],
        speed={
            **speed,
            "backend": backend,
            "device": describe_device(backend),
            "model_bytes": (run.path / "model.keras").stat().st_size,
        },
        command=_describe_command(
            [str(run.path), *([] if data is None else [str(data)])],
            {
                "split": (split, None),
                "robustness": (robustness, False),
                "max_images": (max_images if robustness else 1000, 1000),
                "check_images": (check_images, False),
                "num_examples": (num_examples, 12),
                **{name: (value, None) for name, value in changes.items()},
            },
        ),
        seconds=time.perf_counter() - start,
    )


# ----- cases


def _probabilities(run: Run, answers: Answers) -> np.ndarray:
    return to_probabilities(answers.logits, is_multi_label=run.is_multi_label, temperature=run.temperature)


def _choose_cases(run: Run, answers: Answers, count: int) -> tuple[list[int], list[int]]:
    """Returns which answers are the worst mistakes, and which the least sure of all others."""
    if run.is_multi_label:
        surprise = np.abs(_probabilities(run, answers) - answers.labels.astype(bool)).max(axis=1)
    else:
        surprise = answers.confidence
    wrong = np.flatnonzero(~answers.is_right)
    mistakes = wrong[np.argsort(-surprise[wrong], kind="stable")][:count].tolist()
    order = np.argsort(answers.confidence, kind="stable").tolist()
    taken = set(mistakes)
    return mistakes, [place for place in order if place not in taken][: math.ceil(count / 2)]


def _describe_case(run: Run, answers: Answers, explainer: Explainer, place: int) -> Case:
    """Returns one answer with its explanation: of the answer, or, with several labels, of the one most amiss."""
    shares = _probabilities(run, answers)[place]
    label = answers.labels[place]
    names = run.class_names
    if run.is_multi_label:
        truth = np.flatnonzero(label).tolist()
        shown = np.flatnonzero(shares >= 0.5)
        target = int(np.abs(shares - label.astype(bool)).argmax())
    else:
        truth, target = [int(label)], int(shares.argmax())
        shown = np.arange(len(shares))
    shown = shown[np.argsort(-shares[shown], kind="stable")][: 5 if run.is_multi_label else 2]
    index = int(answers.indices[place])
    pixels = answers.images.load(index, run.input_spec.num_channels)
    (explanation,) = explainer.explain(pixels, methods=["relevance"], target=target)
    return Case(
        name=str(answers.images.names[index]),
        truths=tuple(names[k] for k in truth),
        answers=tuple((names[k], float(shares[k])) for k in shown.tolist()),
        is_right=bool(answers.is_right[place]),
        explained=names[target],
        explanation=explanation,
    )


# ----- what lies on disk


def _check_data(run: Run, *, is_whole: bool) -> tuple[Inspection | None, str]:
    """Looks at the data of training, and says what is to be known of them."""
    record = run.config["data"]
    if run.data_source is None:
        return None, "The run was trained on images that were handed over in Python; they cannot be looked at again."
    try:
        dataset = load_dataset(run.data_source, **record["split"])
    except (DataError, MissingPathError) as error:
        return None, f"The training data were not looked at: {error}"
    note = ""
    if dataset.fingerprint != record["fingerprint"]:
        note = "The data have changed since training: other images, labels or classes. This is how they are now."
    return (inspect_dataset if is_whole else inspect_fast)(dataset), note


def _read_history(path: Path) -> dict[str, list[float | None]]:
    """Returns the columns of a run's history; none if it has none."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: [_read_number(row[name]) for row in rows] for name in (rows[0] if rows else ())}


def _read_number(text: str | None) -> float | None:
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _describe_command(arguments: Sequence[str], options: Mapping[str, tuple[Any, Any]]) -> str:
    """Returns the command line of arguments and of options by name, each with its value and its default."""
    words = ["vitreous", "report", *arguments]
    for name, (value, default) in options.items():
        if value != default:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return shlex.join(words)


def _write_limits(facts: RunFacts) -> bool:
    """Writes the limits in the model card anew; False where it is missing, or its owner took the marks out."""
    card = facts.run.path / "README.md"
    if not card.is_file():
        return False
    measured = {**facts.run.metrics, facts.metrics["split"]: facts.metrics}
    text = update_limits(
        card.read_text(encoding="utf-8"),
        describe_limits(measured, facts.run.class_names, robustness=facts.robustness),
    )
    if text is None:
        return False
    with replacing(card) as temporary:
        temporary.write_bytes(text.encode("utf-8"))
    return True
