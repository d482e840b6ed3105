"""The command line: parse, call the library, print. It computes nothing itself, and `--help` imports no Keras."""

import dataclasses
import io
import json
import os
import shlex
import sys
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

from cyclopts import App, CycloptsError, Group, Parameter

from vitreous import __version__
from vitreous.backend import select_backend
from vitreous.errors import ConfigError, VitreousError
from vitreous.spec import AugmentConfig, DataConfig, ViTConfig
from vitreous.training.recipe import NOT_ARCHITECTURE, MaskedConfig, OptimizerConfig, Recipe

if typing.TYPE_CHECKING:
    from vitreous.data.inspection import Inspection
    from vitreous.prediction import Prediction
    from vitreous.training.folds import CrossValidation

Backend = Literal["jax", "torch", "tensorflow"]

_DATA, _RECIPE, _OPTIMIZER, _AUGMENTATION, _ARCHITECTURE = (
    Group.create_ordered(name) for name in ("Data", "Recipe", "Optimizer", "Augmentation", "Architecture")
)

app = App(
    name="vitreous",
    help="""Vision Transformers for your own images: train, look inside, ship.

    Start with: vitreous train digits""",
    version=__version__,
    default_parameter=Parameter(negative_iterable=()),
    suppress_keyboard_interrupt=False,
)


def _optional(record: type, name: str, without: Sequence[str] = ()) -> Any:
    """Returns a record's twin for the command line: the same fields and help, and None for "as the recipe says".

    Records inside the record have options of their own; so have the fields named in `without`.
    """
    hints = typing.get_type_hints(record)
    fields = [
        (field.name, hints[field.name] | None, dataclasses.field(default=None))
        for field in dataclasses.fields(record)
        if not dataclasses.is_dataclass(hints[field.name]) and field.name not in without
    ]
    twin = dataclasses.make_dataclass(name, fields, kw_only=True, frozen=True)
    twin.__module__ = __name__  # cyclopts takes classes of built-in modules for scalars
    twin.__doc__ = record.__doc__
    return twin


if typing.TYPE_CHECKING:
    DataOptions: typing.TypeAlias = Any
    MaskedOptions: typing.TypeAlias = Any
    ColumnOptions: typing.TypeAlias = Any
    RecipeOptions: typing.TypeAlias = Any
    OptimizerOptions: typing.TypeAlias = Any
    AugmentOptions: typing.TypeAlias = Any
    ArchitectureOptions: typing.TypeAlias = Any
else:
    MaskedOptions = _optional(MaskedConfig, "MaskedOptions")
    DataOptions = _optional(DataConfig, "DataOptions", without=("num_folds",))
    ColumnOptions = _optional(
        DataConfig,
        "ColumnOptions",
        without=("val_fraction", "test_fraction", "group_column", "num_folds", "fold"),
    )
    RecipeOptions = _optional(Recipe, "RecipeOptions", without=("image_size", "architecture"))
    OptimizerOptions = _optional(OptimizerConfig, "OptimizerOptions")
    AugmentOptions = _optional(AugmentConfig, "AugmentOptions")
    ArchitectureOptions = _optional(ViTConfig, "ArchitectureOptions", without=NOT_ARCHITECTURE)


def _changes(options: Any) -> dict[str, Any]:
    """Returns the options that were given."""
    return {key: value for key, value in vars(options).items() if value is not None} if options else {}


def _parse_size(text: str | None, name: str) -> tuple[int, int] | None:
    """Returns (vertical, horizontal) from `16` or `16x24`."""
    if text is None:
        return None
    parts = text.lower().replace(",", "x").split("x")
    if len(parts) not in (1, 2) or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(
            f"Cannot read --{name}. Expected a positive number or HEIGHTxWIDTH. Received: {name}={text!r}. "
            "Pass for example 224 or 192x256."
        )
    numbers = [int(part) for part in parts]
    return numbers[0], numbers[-1]


def _start_backend(backend: str | None) -> None:
    """Settles the Keras backend and says which and why, in one line on standard error."""
    name, reason = select_backend(backend)
    print(f"Backend  {name} ({reason})", file=sys.stderr, flush=True)


@app.command
def train(
    data: str,
    /,
    *,
    out: Path | None = None,
    recipe: str | None = None,
    pretrained: str | None = None,
    image_size: str | None = None,
    seed: int = 0,
    folds: int | None = None,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
    backend: Backend | None = None,
    data_options: Annotated[DataOptions | None, Parameter(name="*", group=_DATA)] = None,
    options: Annotated[RecipeOptions | None, Parameter(name="*", group=_RECIPE)] = None,
    optimizer: Annotated[OptimizerOptions | None, Parameter(group=_OPTIMIZER)] = None,
    augment: Annotated[AugmentOptions | None, Parameter(group=_AUGMENTATION)] = None,
    architecture: Annotated[ArchitectureOptions | None, Parameter(group=_ARCHITECTURE)] = None,
) -> int:
    """Train a classifier on labelled images and leave a run folder.

    The recipe is chosen from the data; every value of it can be changed here: vitreous train photos/ --time 20m
    --optimizer.learning-rate 5e-4. Ctrl-C ends training cleanly: what has been learnt is measured and saved (exit
    code 130).

    Args:
        data: Folder with one folder a class, with or without train/ and val/ or test/ above them; a zip or tar of such
            a folder; a table (.csv, .tsv, .jsonl, .parquet); WebDataset shards; the URL of one of these; or a
            built-in name:
            digits, cifar10, cifar100, mnist, fashion_mnist.
        out: Folder of the run. Default: the first free runs/DATA-N.
        recipe: Name of a recipe, or a TOML file. Default: chosen from the data.
        pretrained: Weights to start from: timm/NAME.TAG, hf:OWNER/NAME, or a local file or folder.
        image_size: Image height and width in pixels: 224, or 192x256. Default: the recipe's.
        seed: Decides splits, first weights, order and augmentation.
        folds: Train so many runs, each with another part of the images as test set, and give mean and spread; with
            --fold, train that one alone.
        overwrite: Replace a run that lies at --out, once the new one is whole.
        backend: Keras backend. Default: KERAS_BACKEND, else the fastest one installed for this hardware.
        data_options: Columns and splits.
        options: Values that differ from the recipe's.
        optimizer: Values that differ from the recipe's.
        augment: Values that differ from the recipe's.
        architecture: Values in which the model differs from its name's.
    """
    changes = {
        **_changes(data_options),
        **_changes(options),
        "image_size": _parse_size(image_size, "image-size"),
        "optimizer": _changes(optimizer) or None,
        "augment": _changes(augment) or None,
        "architecture": _changes(architecture) or None,
    }
    _start_backend(backend)
    from vitreous.training import train as train_run
    from vitreous.training import train_folds
    from vitreous.training.progress import create_reporter, format_seconds

    changes |= {"out": out, "recipe": recipe, "pretrained": pretrained, "seed": seed, "overwrite": overwrite}
    if folds is not None and changes.get("fold") is None:
        return _say_folds(train_folds(data, num_folds=folds, reporter=create_reporter(), **changes))
    run = train_run(data, reporter=create_reporter(), num_folds=folds, **changes)
    print(f"Trained  {format_seconds(run.metrics['train_seconds'])}, {run.metrics['num_images_seen']:,} images")
    for split in ("val", "test"):
        if split in run.metrics:
            print(_metrics_line(split, run.metrics[split]))
    path = Path(os.path.relpath(run.path)) if run.path.is_relative_to(Path.cwd()) else run.path
    names = ("curves", "confusion", "labels", "predictions", "patches", "augmented")
    pictures = [f"{name}.png" for name in names if (path / f"{name}.png").exists()]
    print(f"Look at  {path}/README.md, {', '.join(pictures)}")
    print(f"Use it   vitreous predict {shlex.quote(str(path))} IMAGE...")
    return 130 if run.metrics["is_interrupted"] else 0


@app.command
def pretrain(
    data: str,
    /,
    *,
    out: Path | None = None,
    recipe: str | None = None,
    image_size: str | None = None,
    seed: int = 0,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
    backend: Backend | None = None,
    masked: Annotated[MaskedOptions | None, Parameter(name="*", group=_RECIPE)] = None,
    options: Annotated[RecipeOptions | None, Parameter(name="*", group=_RECIPE)] = None,
    optimizer: Annotated[OptimizerOptions | None, Parameter(group=_OPTIMIZER)] = None,
    augment: Annotated[AugmentOptions | None, Parameter(group=_AUGMENTATION)] = None,
    architecture: Annotated[ArchitectureOptions | None, Parameter(group=_ARCHITECTURE)] = None,
) -> int:
    """Train an encoder on images without labels: most patches are hidden, and it learns to fill them in.

    Then start a classifier from it: vitreous train LABELLED --pretrained RUN. Worth it where you have many images and
    few labels.

    Args:
        data: Any source of images, labelled or not; test images are left out where there are some.
        out: Folder of the run. Default: the first free runs/DATA-pretrained-N.
        recipe: Name of a recipe, or a TOML file. Default: chosen from the data.
        image_size: Image height and width in pixels: 224, or 192x256. Default: the recipe's.
        seed: Decides which images validate, first weights, order, augmentation and what is hidden.
        overwrite: Replace a run that lies at --out, once the new one is whole.
        backend: Keras backend. Default: KERAS_BACKEND, else the fastest one installed for this hardware.
        masked: What is hidden, and what fills it in.
        options: Values that differ from the recipe's.
        optimizer: Values that differ from the recipe's.
        augment: Values that differ from the recipe's.
        architecture: Values in which the model differs from its name's.
    """
    changes = {
        **_changes(options),
        "image_size": _parse_size(image_size, "image-size"),
        "optimizer": _changes(optimizer) or None,
        "augment": _changes(augment) or None,
        "architecture": _changes(architecture) or None,
        "masked": MaskedConfig(**_changes(masked)),
    }
    _start_backend(backend)
    from vitreous.training import pretrain as pretrain_run
    from vitreous.training.progress import create_reporter, format_seconds

    changes |= {"out": out, "recipe": recipe, "seed": seed, "overwrite": overwrite}
    run = pretrain_run(data, reporter=create_reporter(), **changes)
    print(f"Trained  {format_seconds(run.metrics['train_seconds'])}, {run.metrics['num_images_seen']:,} images")
    if run.metrics["val_loss"] is not None:
        print(f"Val      loss {run.metrics['val_loss']:.3f} on hidden patches (the mean alone: 1)")
    path = Path(os.path.relpath(run.path)) if run.path.is_relative_to(Path.cwd()) else run.path
    print(f"Look at  {path}/README.md, reconstruction.png, curves.png")
    print(f"Use it   vitreous train DATA --pretrained {shlex.quote(str(path))}")
    return 130 if run.metrics["is_interrupted"] else 0


def _metrics_line(split: str, metrics: dict[str, Any]) -> str:
    from vitreous.evaluation import summarize_metrics

    return f"{split.capitalize():<8} {summarize_metrics(metrics)}"


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


@app.command
def evaluate(
    run: Path,
    data: str | None = None,
    /,
    *,
    split: Literal["train", "val", "test", "all"] | None = None,
    json_output: Annotated[bool, Parameter(name="--json", negative=())] = False,
    out: Path | None = None,
    backend: Backend | None = None,
    columns: Annotated[ColumnOptions | None, Parameter(name="*", group=_DATA)] = None,
) -> int:
    """Measure a run on labelled images.

    Args:
        run: Folder of the run.
        data: Folder with one folder a class, or any other source that train takes. Default: the data the run was
            trained on.
        split: Which part of the data. Default: its test images; all images of a folder without splits.
        json_output: Print JSON, with the confusion matrix.
        out: File to write instead of printing.
        backend: Keras backend. Default: KERAS_BACKEND, else the fastest one installed for this hardware.
        columns: Columns, where they differ from those of training.
    """
    from vitreous.training import load_run

    _check_output(out)
    loaded = load_run(run)  # first: a wrong path should not cost the time that Keras takes to start
    _start_backend(backend)
    from vitreous.prediction import evaluate as evaluate_run

    metrics = evaluate_run(loaded, data, split=split, **_changes(columns))
    with _output(out) as file:
        if json_output:
            json.dump(metrics, file, indent=2, ensure_ascii=False)
            file.write("\n")
        else:
            print(_metrics_line(metrics["split"], metrics), file=file)
            if "top5_accuracy" in metrics:
                print(f"Top 5    accuracy {metrics['top5_accuracy']:.2%}", file=file)
            for line in _class_lines(metrics):
                print(line, file=file)
    for name, reason in metrics["broken_files"].items():
        print(f"Warning: left out {name}: {reason}", file=sys.stderr)
    return 0


def _class_lines(metrics: dict[str, Any]) -> list[str]:
    """Returns a line for each class."""
    width = max(map(len, metrics["recall"]), default=0)
    if "accuracy" in metrics:
        lines = [f"{name:<{width}} {recall:7.2%}" for name, recall in metrics["recall"].items()]
        return [
            f"Recall   of each class (mean {metrics['macro_recall']:.2%})",
            *(f"         {line}" for line in lines),
        ]
    kinds = ("average_precision", "precision", "recall")
    return [
        f"Labels   {'':<{width}} average precision  precision   recall   images",
        *(
            f"         {name:<{width}} {metrics[kinds[0]][name]:17.2%} {metrics[kinds[1]][name]:10.2%} "
            f"{metrics[kinds[2]][name]:8.2%} {count:8,}"
            for name, count in metrics["support"].items()
        ),
    ]


@app.command
def predict(
    run: Path,
    images: Annotated[list[str], Parameter(required=True)],
    /,
    *,
    top_k: int = 5,
    json_output: Annotated[bool, Parameter(name="--json", negative=())] = False,
    csv_output: Annotated[bool, Parameter(name="--csv", negative=())] = False,
    image_column: str | None = None,
    out: Path | None = None,
    backend: Backend | None = None,
) -> int:
    """Classify images: the most probable classes of each, with probabilities.

    Args:
        run: Folder of the run.
        images: Image files, folders of images, and any other source that train takes; labels are not needed.
        top_k: How many classes to name for each image, at most.
        json_output: Print JSON.
        csv_output: Print CSV.
        image_column: Column of a table that holds the images. Default: found by its name.
        out: File to write instead of printing.
        backend: Keras backend. Default: KERAS_BACKEND, else the fastest one installed for this hardware.
    """
    if json_output and csv_output:
        raise ConfigError(
            "Cannot print two formats. Expected --json or --csv. Received: both. Pass one of them, or run twice."
        )
    from vitreous.training import load_run

    _check_output(out)
    loaded = load_run(run)
    _start_backend(backend)
    from vitreous.prediction import predict as predict_images
    from vitreous.prediction import write_predictions_csv, write_predictions_json

    with _progress("images") as on_progress:
        predictions = predict_images(loaded, images, top_k=top_k, image_column=image_column, on_progress=on_progress)
    with _output(out) as file:
        if json_output:
            write_predictions_json(predictions, file)
        elif csv_output:
            write_predictions_csv(predictions, file)
        else:
            for prediction in predictions:
                print(_prediction_line(prediction), file=file)
    return 0


def _prediction_line(prediction: "Prediction") -> str:
    pairs = zip(prediction.classes, prediction.probabilities, strict=True)
    return f"{prediction.path}: " + ", ".join(f"{name} {share:.1%}" for name, share in pairs)


@app.command
def inspect(
    data: str,
    /,
    *,
    html: Path | None = None,
    json_output: Annotated[Path | None, Parameter(name="--json")] = None,
    fix_list: Path | None = None,
    run: Path | None = None,
    min_similarity: float = 0.9,
    strict: Annotated[bool, Parameter(negative=())] = False,
    backend: Backend | None = None,
) -> int:
    """Look for what is wrong with labelled images, before or after training. Nothing is deleted or changed.

    Broken files, copies, the same image in training and test or under two classes, odd and extreme images, unequal
    classes; with a run, labels that its model disputes.

    Args:
        data: As for train: a folder with one folder a class, or a built-in name.
        html: Page to write, with thumbnails; one file that needs no network.
        json_output: JSON file to write, with everything.
        fix_list: CSV table to write: each file, what was found, what could be done.
        run: Folder of a run whose model looks for wrong labels. The data is split as in its training.
        min_similarity: Correlation of two thumbnails, in (0, 1], from which images count as nearly the same.
        strict: Exit with code 1 if there are errors.
        backend: Keras backend, for --run. Default: KERAS_BACKEND, else the fastest one installed for this hardware.
    """
    outputs = {"--html": html, "--json": json_output, "--fix-list": fix_list}
    for option, path in outputs.items():
        _check_output(path, option)
    from vitreous.inspection import inspect as inspect_data

    if run:
        from vitreous.training import load_run

        load_run(run)
        _start_backend(backend)
    with _progress("images") as on_progress:
        inspection = inspect_data(data, run=run, min_similarity=min_similarity, on_progress=on_progress)
    _print_findings(inspection)
    if html:
        from vitreous.report import render_inspection

        page = render_inspection(inspection)
        with _output(html) as file:
            file.write(page)
    if json_output:
        with _output(json_output) as file:
            inspection.write_json(file)
    if fix_list:
        with _output(fix_list) as file:
            inspection.write_fix_list(file)
    return 1 if strict and inspection.count("error") else 0


def _print_findings(inspection: "Inspection") -> None:
    """Prints a table of the findings; as wide as the terminal, or 120 characters where there is none."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    dataset = inspection.dataset
    counts = ", ".join(f"{len(images):,} {split}" for split, images in dataset.splits.items())
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(
        Text(f"Data     {dataset.name}: {len(dataset.class_names)} classes; images: {counts}"), soft_wrap=True
    )
    if inspection.findings:
        colours = {"error": "bold red", "warning": "yellow", "note": "blue"}
        table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1))
        for name in ("", "finding", "cases", "such as"):
            table.add_column(name, justify="right" if name == "cases" else "left", overflow="fold")
        for finding in inspection.findings:
            severity = Text(finding.severity, style=colours[finding.severity])
            title = Text(finding.text.title)
            table.add_row(severity, title, f"{len(finding.items):,}", Text(_visible(finding.example())))
        console.print(table)
        shown = [finding for finding in inspection.findings if finding.severity != "note"]
        for finding in shown:
            console.print(Text(f"{finding.text.title}: {finding.text.remedy}"), soft_wrap=True)
    console.print(Text(f"Found    {inspection.summary()} ({inspection.seconds:.1f} s)"), soft_wrap=True)


def _visible(text: str) -> str:
    """Returns a text with control characters written out, so that a file's name cannot steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


@app.command
def patches(
    image: Path,
    /,
    *,
    patch_size: str = "16",
    strides: str | None = None,
    dilation_rate: str = "1",
    padding: Literal["valid", "same"] = "valid",
    image_size: str | None = None,
    out: Path = Path("patches.png"),
) -> int:
    """Draw an image beside its patches.

    Args:
        image: Image file.
        patch_size: Pixels of a patch: 16, or 16x8 (vertical x horizontal).
        strides: Pixels between neighbouring patches. Default: the patch size; smaller ones overlap.
        dilation_rate: Distance between the pixels that one patch samples.
        padding: valid: only whole patches; same: zeros around the image.
        image_size: Resize the image first, to 224 or 192x256 pixels. Default: as it is.
        out: Picture to write: .png, .svg or .pdf.
    """
    from vitreous.figures import draw_patches

    path = draw_patches(
        image,
        patch_size=_parse_size(patch_size, "patch-size") or 16,
        strides=_parse_size(strides, "strides"),
        dilation_rate=_parse_size(dilation_rate, "dilation-rate") or 1,
        padding=padding,
        image_size=_parse_size(image_size, "image-size"),
        out=out,
    )
    print(f"Wrote {path}")
    return 0


@app.command(name="augment")
def draw_augmented(
    data: str,
    /,
    *,
    recipe: str | None = None,
    image_size: str | None = None,
    seed: int = 0,
    out: Path = Path("augmented.png"),
    augment: Annotated[AugmentOptions | None, Parameter(group=_AUGMENTATION)] = None,
) -> int:
    """Draw what training sees: one image in several epochs, and a batch with its targets.

    Args:
        data: Image file, folder with one folder a class, or a built-in name: digits.
        recipe: Name of a recipe, or a TOML file. Default: chosen from the data.
        image_size: Image height and width in pixels: 224, or 192x256. Default: the recipe's.
        seed: Decides the draws.
        out: Picture to write: .png, .svg or .pdf.
        augment: Values that differ from the recipe's.
    """
    from vitreous.data import ImageSet, decode_image, load_dataset
    from vitreous.figures.augmentation import draw_augmentation, first_readable
    from vitreous.registry import get_spec
    from vitreous.training.recipe import choose_recipe, load_recipe

    size = _parse_size(image_size, "image-size")
    name, class_names = "", tuple[str, ...]()
    if Path(data).is_file():
        images = ImageSet([Path(data).name], [0], root=Path(data).parent)
        decode_image(data)  # says what is wrong with it, if anything is
    else:
        dataset = load_dataset(data, seed=seed)
        images, class_names = dataset.splits["train"], dataset.class_names
        name = dataset.name if dataset.root is None else ""
    side = min(first_readable(images)[1].shape[:2])
    base = load_recipe(recipe or choose_recipe(name, side))
    settled = base.merge({"augment": _changes(augment)})
    spec = get_spec(settled.model, image_size=size or settled.image_size, num_channels=settled.num_channels)
    written = draw_augmentation(images, spec.input, settled.augment, out=out, class_names=class_names, seed=seed)
    print(f"Wrote {written}")
    return 0


@app.command
def convert(
    source: str,
    destination: Path,
    /,
    *,
    to: Literal["keras", "timm", "hf", "npz"],
    model: str | None = None,
    num_classes: int | None = None,
    image_size: str | None = None,
    patch_size: str | None = None,
    backend: Backend | None = None,
) -> int:
    """Convert weights between formats; what is written is read back and compared, number by number.

    Args:
        source: A file (.safetensors, .npz, .keras, .pth), a folder (Hugging Face, timm, or a run), timm/NAME.TAG, or
            hf:OWNER/NAME.
        destination: File (keras, npz) or folder (timm, hf) to write.
        to: Format to write.
        model: Name of the model that the weights are of. Default: what the files say.
        num_classes: Another number of classes gets a fresh head; 0 none. Default: the file's.
        image_size: Resize the positions for images of 224 or 192x256 pixels. Default: the file's.
        patch_size: Resize the patch projection. Default: the file's.
        backend: Keras backend. Default: KERAS_BACKEND, else the fastest one installed for this hardware.
    """
    images, patch = _parse_size(image_size, "image-size"), _parse_size(patch_size, "patch-size")
    _start_backend(backend)
    from vitreous.weights import convert as convert_weights

    report = convert_weights(
        source, destination, to=to, model=model, num_classes=num_classes, image_size=images, patch_size=patch
    )
    print(report.summary())
    return 0


@app.command
def models(
    pattern: str = "*",
    /,
    *,
    pretrained: Annotated[bool, Parameter(negative=())] = False,
    json_output: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> int:
    """List the models; with a model's whole name, show that model: its architecture, its input, its published weights.

    The list has parameters, multiply-accumulates for one image, input size, tokens, and how many weights are published.

    Args:
        pattern: Part of a name, or a shell pattern such as 'vit_*_224'; or a whole name, NAME or NAME.TAG.
        pretrained: Leave out models without published weights.
        json_output: Print JSON.
    """
    from vitreous.errors import UnknownNameError
    from vitreous.registry import count_macs, count_parameters, get_family, get_spec, list_models, list_weights

    everything = list_models()
    is_one = pattern in everything or "." in pattern
    names = [pattern] if is_one else list_models(pattern, has_weights=pretrained)
    if not names:
        raise UnknownNameError("model", pattern, everything, "List them all with: vitreous models")
    rows = []
    for name in names:
        spec = get_spec(name)
        row: dict[str, Any] = {
            "name": name,
            "num_parameters": count_parameters(spec.config),
            "num_macs": count_macs(spec.config),
            "image_size": list(spec.config.image_size),
            "num_tokens": spec.config.num_tokens,
            "weights": [source.to_dict() for source in list_weights(name)],
        }
        if is_one:
            family = get_family(name)
            row |= {"family": family.title, "source": family.source}
            row |= {"config": spec.config.to_dict(), "input": spec.input.to_dict()}
        rows.append(row)
    if json_output:
        print(json.dumps(rows, indent=2))
    elif is_one:
        print("\n".join(_model_lines(rows[0])))
    else:
        width = max(map(len, names))
        print(f"{'model':<{width}}  parameters     MACs    input  tokens  weights")
        for row in rows:
            size = "x".join(map(str, row["image_size"]))
            print(
                f"{row['name']:<{width}}  {row['num_parameters'] / 1e6:9.2f}M {row['num_macs'] / 1e9:7.2f}G {size:>8}  "
                f"{row['num_tokens']:>6}  {len(row['weights']):>7}"
            )
    return 0


def _model_lines(row: dict[str, Any]) -> list[str]:
    """Returns one model as lines to print."""
    config, image = row["config"], row["input"]
    mean, std = (" ".join(f"{value:.4g}" for value in image[key]) for key in ("mean", "std"))
    fit = {"crop": "", "squash": "squashed to a square, ", "pad": "padded to a square, "}[image["resize_mode"]]
    named = ("image_size", "patch_size", "projection_dim", "num_blocks", "num_heads", "mlp_dim", "num_classes")
    usual = ViTConfig(**{name: config[name] for name in named}).to_dict()
    special = [f"{name}={value}" for name, value in config.items() if value != usual[name]]
    lines = [
        f"Model    {row['name']}",
        f"Family   {row['family']}: {row['source']}",
        f"Size     {row['num_parameters'] / 1e6:.2f}M parameters, {row['num_macs'] / 1e9:.2f}G multiply-accumulates, "
        f"{config['num_classes'] or 'no'} classes",
        f"Encoder  {config['num_blocks']} blocks of width {config['projection_dim']}, {config['num_heads']} heads, "
        f"MLP of {config['mlp_dim']}; patches of {'x'.join(map(str, config['patch_size']))} pixels, "
        f"{row['num_tokens']} tokens",
        *([f"Special  {', '.join(special)}"] if special else []),
        f"Input    {'x'.join(map(str, row['image_size']))} pixels, {image['interpolation']}, "
        f"{fit}centre crop of {image['crop_fraction']:.4g}, mean {mean}, std {std}",
    ]
    if not row["weights"]:
        return [*lines, "Weights  none published; train it from scratch"]
    width = max(len(source["tag"]) for source in row["weights"])
    lines.append(f"Weights  {'tag':<{width}}  classes  {'licence':<12}  huggingface.co/")
    for source in row["weights"]:
        lines.append(
            f"         {source['tag']:<{width}}  {source['num_classes']:>7}  {source['license'] or 'not stated':<12}  "
            f"{source['hub_id']}"
        )
    return lines


@app.command
def recipes() -> int:
    """List the recipes for training, and what each is for."""
    from vitreous.training.recipe import describe_recipe, list_recipes

    for name in list_recipes():
        print(f"{name:<10} {describe_recipe(name)}")
    return 0


def _check_output(path: Path | None, option: str = "--out") -> None:
    """Raises `ConfigError` if a file could not be written at `path`, before anything is computed for it."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        received = "a folder" if path.is_dir() else f"no folder {path.parent}"
        raise ConfigError(
            f"Cannot write {path}. Expected the path of a file in a folder that exists. Received: {received}. "
            f"Pass another {option}."
        )


@contextmanager
def _output(path: Path | None) -> Iterator[TextIO]:
    """Yields standard output, or a file that appears whole under its name."""
    if path is None:
        yield sys.stdout
        return
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    print(f"Wrote {path}", file=sys.stderr)


@contextmanager
def _progress(what: str) -> Iterator[Any]:
    """Yields a function of (done, total) that moves a bar on standard error; None where that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: 0 if it worked, 2 with one line on standard error if the input was wrong.

    Args:
        arguments: Words after `vitreous`. Default: those of this process.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names need not be text
    try:
        code = app(arguments, exit_on_error=False, print_error=False, result_action="return_value", help_on_error=False)
    except VitreousError as error:
        code = _fail(str(error))
    except CycloptsError as error:
        code = _fail(
            f"{' '.join(str(error).split())} See: vitreous {' '.join([*(error.command_chain or ()), '--help'])}"
        )
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        code = 0
    except OSError as error:
        code = _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))
    except KeyboardInterrupt:
        print("Interrupted", file=sys.stderr)
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> int:
    print(f"Error: {' '.join(message.split())}", file=sys.stderr)
    return 2
