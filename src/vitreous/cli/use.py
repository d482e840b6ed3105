"""Commands that put data and a run to use: classify, look for what is wrong."""

import os
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from vitreous.cli.options import DATA, Backend, SplitOptions, describe_source, given, start_backend
from vitreous.cli.printing import (
    check_output,
    open_output,
    prediction_line,
    print_findings,
    show_progress,
)
from vitreous.errors import ConfigError
from vitreous.text import escape_text


def predict(
    run: Path,
    images: Annotated[
        list[str],
        Parameter(required=True),
        describe_source("Image files; folders of images;", "Labels are not needed."),
    ],
    /,
    *,
    top_k: int = 5,
    json_output: Annotated[bool, Parameter(name="--json", negative=())] = False,
    csv_output: Annotated[bool, Parameter(name="--csv", negative=())] = False,
    threshold: float | None = None,
    image_column: str | None = None,
    out: Path | None = None,
    backend: Backend | None = None,
) -> int:
    """Classify images: the most probable classes of each, with probabilities.

    Args:
        run: Folder of the run.
        images: Images, labelled or not.
        top_k: How many classes to name for each image, at most.
        json_output: Print JSON.
        csv_output: Print CSV.
        threshold: Probability in [0, 1] below which an answer is "not sure"; `vitreous evaluate` shows what one does.
        image_column: Column of a table that holds the images. Default: found by its name.
        out: File to write instead of printing.
        backend: Keras backend. Default: KERAS_BACKEND, else the fastest one installed for this hardware.
    """
    if json_output and csv_output:
        raise ConfigError(
            "Cannot print two formats. Expected --json or --csv. Received: both. Pass one of them, or run twice."
        )
    from vitreous.training import load_run

    check_output(out)
    loaded = load_run(run)
    start_backend(backend)
    from vitreous.data.sources.folders import is_image_name
    from vitreous.prediction import predict as predict_images
    from vitreous.prediction import write_predictions_csv, write_predictions_json

    failed: list[tuple[str, str]] = []
    is_each_named = all(os.path.isfile(image) and is_image_name(str(image)) for image in images)
    with show_progress("images") as on_progress:
        predictions = predict_images(
            loaded,
            images,
            top_k=top_k,
            threshold=threshold,
            image_column=image_column,
            on_progress=on_progress,
            # A file that the user names must be readable; in a folder or a table one bad file stops nothing.
            on_error=None if is_each_named else lambda name, reason: failed.append((name, reason)),
        )
    for name, reason in failed:
        print(f"Warning: left out {escape_text(name)}: {reason}", file=sys.stderr)
    with open_output(out) as file:
        if json_output:
            write_predictions_json(predictions, file)
        elif csv_output:
            write_predictions_csv(predictions, file)
        else:
            for prediction in predictions:
                print(prediction_line(prediction), file=file)
    return 0


def inspect(
    data: Annotated[str, describe_source("Labelled images:")],
    /,
    *,
    html: Path | None = None,
    json_output: Annotated[Path | None, Parameter(name="--json")] = None,
    fix_list: Path | None = None,
    run: Path | None = None,
    min_similarity: float = 0.9,
    strict: Annotated[bool, Parameter(negative=())] = False,
    seed: int | None = None,
    backend: Backend | None = None,
    data_options: Annotated[SplitOptions | None, Parameter(name="*", group=DATA)] = None,
) -> int:
    """Look for what is wrong with labelled images, before or after training. Nothing is deleted or changed.

    Broken files, copies, the same image in training and test or under two classes, odd and extreme images, unequal
    classes; with a run, labels that its model disputes.

    Args:
        data: Labelled images.
        html: Page to write, with thumbnails; one file that needs no network.
        json_output: JSON file to write, with everything.
        fix_list: CSV table to write: each file, what was found, what could be done.
        run: Folder of a run whose model looks for wrong labels. Columns and splits are those of its training where the
            data has them.
        min_similarity: Correlation of two thumbnails, in (0, 1], from which images count as nearly the same.
        strict: Exit with code 1 if there are errors.
        seed: Decides the splits that the data does not give. Default: the run's, or 0.
        backend: Keras backend, for --run. Default: KERAS_BACKEND, else the fastest one installed for this hardware.
        data_options: Columns and splits.
    """
    outputs = {"--html": html, "--json": json_output, "--fix-list": fix_list}
    for option, path in outputs.items():
        check_output(path, option)
    from vitreous.inspection import inspect as inspect_data

    if run:
        from vitreous.training import load_run

        load_run(run)
        start_backend(backend)
    with show_progress("images") as on_progress:
        inspection = inspect_data(
            data, run=run, seed=seed, min_similarity=min_similarity, on_progress=on_progress, **given(data_options)
        )
    print_findings(inspection)
    if html:
        from vitreous.report import render_inspection

        page = render_inspection(inspection)
        with open_output(html) as file:
            file.write(page)
    if json_output:
        with open_output(json_output) as file:
            inspection.write_json(file)
    if fix_list:
        with open_output(fix_list) as file:
            inspection.write_fix_list(file)
    return 1 if strict and inspection.count("error") else 0
