"""Commands about features: vectors of images, the nearest images of an image, what a backbone's features are worth."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from vitreous.cli.options import (
    DATA,
    Backend,
    ColumnOptions,
    SplitOptions,
    describe_source,
    given,
    parse_size,
    start_backend,
)
from vitreous.cli.printing import check_output, open_output, show_progress
from vitreous.errors import ConfigError
from vitreous.text import escape_text

if TYPE_CHECKING:
    from vitreous.embeddings import Embeddings, Neighbour

_BACKBONE = Parameter(
    help="A run folder (of train or pretrain); a .keras file; weights as timm/NAME.TAG, hf:OWNER/NAME, or a local file "
    "or folder; or the bare name of a model, whose weights are then random."
)


def embed(
    backbone: Annotated[str, _BACKBONE],
    data: Annotated[str, describe_source("Images, labelled or not: a folder of images, one image;")],
    /,
    *,
    out: Path,
    pooling: Literal["head", "class", "mean", "patches"] = "head",
    block: int | None = None,
    image_size: str | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    batch_size: int = 64,
    backend: Backend | None = None,
    columns: Annotated[ColumnOptions | None, Parameter(name="*", group=DATA)] = None,
) -> int:
    """Compute a vector for each image, and write them to a file: image, label, split, embedding.

    Memory stays flat, however many images there are. Images that cannot be read are left out and named.

    Args:
        backbone: The model.
        data: Images.
        out: File to write: .parquet or .npz.
        pooling: What becomes the vector: head (what the classifier would read), class (the class token), mean (the mean
            over patches), patches (a vector for each patch).
        block: Index of the block to read, negative from the end. Default: the last one.
        image_size: Adapt the model to images of 224 or 192x256 pixels. Default: the backbone's size.
        dtype: Type of the numbers; float16 takes half the room.
        batch_size: Images computed at once.
        backend: Keras backend. Default: KERAS_BACKEND, else the fastest one installed for this hardware.
        columns: Columns of the data.
    """
    check_output(out)
    size = parse_size(image_size, "image-size")
    start_backend(backend)
    from vitreous.embeddings import embed_to_file

    with show_progress("images") as on_progress:
        written = embed_to_file(
            backbone,
            data,
            out,
            block=block,
            pooling=pooling,
            dtype=dtype,
            image_size=size,
            batch_size=batch_size,
            on_progress=on_progress,
            on_error=_warn_left_out,
            on_note=_note,
            **given(columns),
        )
    shape = " x ".join(map(str, written["shape"]))
    size_text = f"{out.stat().st_size / 1e6:.1f} MB"
    print(f"Wrote    {out}: {written['num_images']:,} images, {shape} {written['dtype']} each, {size_text}")
    return 0


def neighbours(
    embeddings: Annotated[
        str,
        Parameter(
            help="A file that vitreous embed wrote; or a backbone, as for vitreous embed: then images are embedded "
            "first (--data)."
        ),
    ],
    images: Annotated[
        list[str],
        Parameter(
            required=True, help="Image files, or names of images in the embeddings (then not their own neighbour)."
        ),
    ],
    /,
    *,
    k: Annotated[int, Parameter(name=("--k", "-k"))] = 9,
    out: Path | None = None,
    json_output: Annotated[bool, Parameter(name="--json", negative=())] = False,
    data: Annotated[
        str | None,
        describe_source("With a backbone, the images to search:", "Default: what the run was trained on."),
    ] = None,
    save: Path | None = None,
    backend: Backend | None = None,
    columns: Annotated[ColumnOptions | None, Parameter(name="*", group=DATA)] = None,
) -> int:
    """Find the nearest images of an image, by the cosine of their embeddings.

    Args:
        embeddings: Where to search.
        images: Images whose neighbours are wanted.
        k: Neighbours of each image.
        out: Picture to write, each image beside its neighbours: .png, .svg or .pdf.
        json_output: Print JSON.
        data: Images to search.
        save: With a backbone: file (.parquet, .npz) to keep the embeddings in, so that the next search needs none.
        backend: Keras backend. Default: KERAS_BACKEND, else the fastest one installed for this hardware.
        columns: Columns of the data.
    """
    check_output(out)
    check_output(save, "--save")
    if out is not None:
        from vitreous.figures.canvas import checked_path

        checked_path(out)
    is_file = Path(embeddings).suffix.lower() in (".parquet", ".npz") and (Path(embeddings).is_file() or data is None)
    if is_file and (data is not None or save is not None):
        raise ConfigError(
            "Cannot search a file of embeddings and embed. Expected --data and --save with a backbone. "
            f"Received: {embeddings}. Leave them out, or pass the backbone in its place."
        )
    start_backend(backend)
    from vitreous.embeddings import find_neighbours, load_embeddings
    from vitreous.embeddings.neighbours import check_count

    check_count(k)  # before anything is embedded
    if is_file:
        bank, backbone = load_embeddings(embeddings), None
    else:
        bank, backbone = _embed_now(embeddings, data, save, given(columns))
    found = find_neighbours(bank, images, k=k, backbone=backbone)
    if json_output:
        rows = [
            {"image": image, "neighbours": [each.to_dict() for each in near]}
            for image, near in zip(images, found, strict=True)
        ]
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        print("\n".join(_neighbour_lines(images, found)))
    if out is not None:
        _draw(bank, images, found, out)
        print(f"Wrote {out}", file=sys.stderr)
    return 0


def probe(
    backbone: Annotated[str, _BACKBONE],
    data: Annotated[str, describe_source("Labelled images:")],
    /,
    *,
    pooling: Literal["head", "class", "mean"] = "head",
    block: int | None = None,
    image_size: str | None = None,
    shots: list[int] | None = None,
    num_draws: int = 5,
    max_train: int = 4000,
    max_test: int = 2000,
    seed: int | None = None,
    json_output: Annotated[bool, Parameter(name="--json", negative=())] = False,
    out: Path | None = None,
    backend: Backend | None = None,
    data_options: Annotated[SplitOptions | None, Parameter(name="*", group=DATA)] = None,
) -> int:
    """Measure what the frozen features of a backbone are worth on your images, before any fine-tuning.

    Features are computed once; on them k-NN and a linear classifier are measured, with few labels too, beside baselines
    (the most frequent class, raw pixels), and a verdict in words.

    Args:
        backbone: The model.
        data: Labelled images.
        pooling: What becomes the vector: head (what the classifier would read), class (the class token), mean (the mean
            over patches).
        block: Index of the block to read, negative from the end. Default: the last one.
        image_size: Adapt the model to images of 224 or 192x256 pixels. Default: the backbone's size.
        shots: Images a class, for the numbers with few labels. Default: 1, 5 and 10.
        num_draws: How often these images are drawn; the mean counts.
        max_train: Training and validation images used, at most; 0 for all.
        max_test: Test images used, at most; 0 for all.
        seed: Decides what is drawn. Default: that of the run's training for its own data, else 0.
        json_output: Print JSON.
        out: File to write instead of printing.
        backend: Keras backend. Default: KERAS_BACKEND, else the fastest one installed for this hardware.
        data_options: Columns and splits.
    """
    check_output(out)
    size = parse_size(image_size, "image-size")
    start_backend(backend)
    from vitreous.embeddings import probe as probe_features

    with show_progress("images") as on_progress:
        report = probe_features(
            backbone,
            data,
            block=block,
            pooling=pooling,
            image_size=size,
            shots=tuple(shots or (1, 5, 10)),
            num_draws=num_draws,
            max_train=max_train or None,
            max_test=max_test or None,
            seed=seed,
            on_progress=on_progress,
            on_error=_warn_left_out,
            **given(data_options),
        )
    with open_output(out) as file:
        if json_output:
            json.dump(report, file, indent=2, ensure_ascii=False)
            file.write("\n")
        else:
            print("\n".join(_probe_lines(report)), file=file)
    return 0


def _warn_left_out(name: str, reason: str) -> None:
    print(f"Warning: left out {escape_text(name)}: {escape_text(reason)}", file=sys.stderr)


def _note(text: str) -> None:
    print(f"Note     {escape_text(text)}", file=sys.stderr)


def _embed_now(source: str, data: str | None, save: Path | None, changes: dict[str, Any]) -> tuple["Embeddings", Any]:
    """Returns the embeddings of the images to search, and the backbone that made them."""
    from vitreous.embeddings import embed, embed_to_file, load_backbone, load_embeddings

    backbone = load_backbone(source)
    if data is None:
        data = backbone.run.data_source if backbone.run else None
        if data is None:
            raise ConfigError(
                f"Cannot search with {source}. Expected images to search. Received: no --data, and the backbone does "
                "not know of any. Pass --data DATA."
            )
    with show_progress("images") as on_progress:
        options: dict[str, Any] = {"on_progress": on_progress, "on_error": _warn_left_out, "on_note": _note, **changes}
        if save is None:
            bank = embed(backbone, data, **options)
        else:
            embed_to_file(backbone, data, save, **options)
            bank = load_embeddings(save)
    if save is None:
        print("Note     --save FILE.parquet keeps the embeddings: the next search needs none", file=sys.stderr)
    else:
        print(f"Wrote {save}", file=sys.stderr)
    return bank, backbone


def _label_text(label: str | tuple[str, ...] | None) -> str:
    if label is None:
        return ""
    return escape_text(label if isinstance(label, str) else ", ".join(label) or "(none)")


def _neighbour_lines(images: list[str], found: "list[list[Neighbour]]") -> list[str]:
    """Returns a line for each image, and one for each neighbour."""
    width = max((len(_label_text(each.label)) for near in found for each in near), default=0)
    lines = []
    for image, near in zip(images, found, strict=True):
        lines.append(escape_text(image))
        for rank, each in enumerate(near, 1):
            split = "" if each.split == "all" else f"{each.split:<6}"
            columns = (f"{rank:4}", f"{each.similarity:7.3f}", f"{_label_text(each.label):<{width}}", split)
            lines.append("  ".join([*filter(str.strip, columns), escape_text(each.name)]))
    return lines


def _draw(bank: "Embeddings", images: list[str], found: "list[list[Neighbour]]", out: Path) -> None:
    from vitreous.data import decode_image
    from vitreous.embeddings import load_sources, locate_queries
    from vitreous.figures import draw_neighbours

    places = locate_queries(bank, images)
    own = [place for place in places if place is not None]
    pixels = iter(load_sources(bank, [*own, *(each.index for near in found for each in near)]))
    labels = bank.labels
    draw_neighbours(
        [decode_image(image) if place is None else next(pixels) for image, place in zip(images, places, strict=True)],
        [Path(image).name for image in images],
        [labels[place] if labels and place is not None else None for place in places],
        [[next(pixels) for _ in near] for near in found],
        [[each.label for each in near] for near in found],
        [[each.similarity for each in near] for near in found],
        out,
    )


def _probe_lines(report: dict[str, Any]) -> list[str]:
    """Returns a probe as lines to print."""
    weights = "RANDOM weights" if report["has_random_weights"] else f"weights {report['fingerprint'][:12]}"
    block = "" if report["block"] is None else f", block {report['block']}"
    lines = [
        f"Backbone {escape_text(report['backbone'])}: {report['model']}, {weights}, {report['features_dim']} features "
        f"({report['pooling']}{block})",
        f"Data     {escape_text(report['data'])}: {report['num_classes']} classes; {report['num_train']:,} images to "
        f"train, {report['num_test']:,} to measure ({report['split']})",
        *(f"         {escape_text(note)}" for note in report["notes"]),
        "",
        f"{report['measure'].capitalize()}",
    ]
    knn, linear, baselines = report["knn"], report["linear"], report["baselines"]
    constant = "most frequent class" if report["measure"] == "accuracy" else "frequency of each label"
    rows = [
        (constant, baselines["constant"], ""),
        ("k-NN on raw pixels", baselines["pixels"], ""),
        (f"k-NN on features, k={knn['k']}", knn, ""),
        *(
            (
                f"linear, {few['shots']} a class",
                few,
                f"{few['lowest']:.1%} to {few['highest']:.1%} over {few['num_draws']} draws",
            )
            for few in report["few_shot"]
        ),
        ("linear, all", linear, f"; {linear['train_score']:.1%} on its own images, C={linear['strength']:g}"),
    ]
    for name, numbers, remark in rows:
        if "interval" in numbers:
            low, high = numbers["interval"]
            remark = f"95% interval {low:.1%} to {high:.1%}{remark}"
        lines.append(f"         {name:<24} {numbers['score']:6.1%}   {remark}")
    width = max(map(len, map(escape_text, report["per_class"])), default=0)
    what = "recall" if report["measure"] == "accuracy" else "average precision"
    ranked = sorted(report["per_class"].items(), key=lambda item: item[1])
    shown = ranked if len(ranked) <= 12 else ranked[:10]
    rest = "" if len(shown) == len(ranked) else f", the lowest 10 of {len(ranked)} classes (--json has all)"
    lines += ["", f"Linear   {what} of each class{rest}"]
    lines += [f"         {escape_text(name):<{width}} {value:7.1%}" for name, value in shown]
    lines += ["", f"Verdict  {report['verdict']}"]
    lines.append(f"Took     {report['seconds']:.1f} s, {report['embed_seconds']:.1f} s of it for the features")
    return lines
