"""Commands that look inside a model."""

import itertools
import json
import os
import re
import sys
import typing
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from vitreous.cli.options import Backend, describe_source, parse_size, start_backend
from vitreous.cli.printing import check_output, open_output, show_progress
from vitreous.errors import ConfigError, DataError, ImageError
from vitreous.files import replacing
from vitreous.text import escape_text

if typing.TYPE_CHECKING:
    from collections.abc import Sequence

    from vitreous.data import ImageSet
    from vitreous.explanation import Explainer, Explanation, Faithfulness

MethodName = Literal[
    "all",
    "patches",
    "positions",
    "filters",
    "attention",
    "rollout",
    "relevance",
    "attention-gradient",
    "grad-cam",
    "integrated-gradients",
    "occlusion",
    "pca",
]


def explain(
    model: str,
    images: Annotated[
        list[str],
        Parameter(required=True),
        describe_source("Image files; folders of images;", "Labels are not needed."),
    ],
    /,
    *,
    method: Annotated[list[MethodName] | None, Parameter(consume_multiple=True)] = None,
    target: Annotated[str | None, Parameter(name="--class")] = None,
    block: int | None = None,
    head: int | None = None,
    fill: Literal["mean", "blur"] = "mean",
    steps: int = 4,
    smooth: Annotated[bool, Parameter(negative=())] = False,
    faithfulness: Annotated[bool, Parameter(negative=())] = False,
    num_random: int = 5,
    image_size: str | None = None,
    image_column: str | None = None,
    json_output: Annotated[bool, Parameter(name="--json", negative=())] = False,
    npz: Annotated[bool, Parameter(negative=())] = False,
    html: Path | None = None,
    out: Path = Path("explanations"),
    backend: Backend | None = None,
) -> int:
    """Show what a model looks at: a picture for each image, all methods on one sheet.

    With one or more methods, a picture for each, larger. The answer is the model's ordinary one.

    Args:
        model: Folder of a run; weights (.keras, .safetensors, .npz); timm/NAME.TAG, hf:OWNER/NAME, or a name of
            'vitreous models' for its published weights.
        images: Images, labelled or not.
        method: Which methods, one or more. relevance: which patches speak for the class. attention: each block and
            head. rollout: attention of all blocks together. attention-gradient, grad-cam: of one block.
            integrated-gradients: by pixels, summed. occlusion: what is missed when it is taken out. pca: features as
            colours. patches, positions, filters: how the model begins.
        target: Class to explain, by name or index. Default: of each image the one that the model answers.
        block: Block for attention, attention-gradient, grad-cam and pca, from 0; -1 is the last. Default: the last.
        head: Head for attention and attention-gradient, from 0. Default: the mean of all.
        fill: What stands in the place of patches taken out: the image's mean colour, or its blur.
        steps: Steps over which gradients by attention are averaged; 1: as published for relevance.
        smooth: Interpolate maps (bicubic). Default: one colour for each patch.
        faithfulness: Measure the methods on these images: patches are taken out, and put in, by their ranks, against
            random ranks.
        num_random: Random rankings of each image, for --faithfulness.
        image_size: Explain at 384 or 192x256 pixels, for weights, whose positions are resized, and for models that take
            images of any size.
        image_column: Column of a table that holds the images. Default: found by its name.
        json_output: Print JSON: the answer, and each map with its numbers.
        npz: Write all arrays of each image as NumPy's .npz beside its picture.
        html: Write a page about one image to this file, instead of pictures: answer, attention of every block and head,
            rollout, relevance, positions, and a walk through the model. It opens in any browser, without a server.
        out: Folder for the pictures; made if it is not there.
        backend: Keras backend. Default: KERAS_BACKEND, else the fastest one installed for this hardware.
    """
    size = parse_size(image_size, "image-size")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"Cannot write to {out}. Expected a folder. Received: a file. Pass another --out.")
    check_output(html, "--html")
    if html:
        given = {"method": method, "block": block is not None, "head": head is not None, "fill": fill != "mean"}
        given |= {"steps": steps != 4, "smooth": smooth, "faithfulness": faithfulness, "npz": npz}
        if others := [f"--{name}" for name, is_given in given.items() if is_given]:
            raise ConfigError(
                "Cannot write the page. Expected --html without options of pictures. "
                f"Received: {', '.join(others)}. Leave them out, or run vitreous explain again without --html."
            )
    from vitreous.data import DataConfig, load_images
    from vitreous.data.sources.folders import is_image_name
    from vitreous.explanation import (
        METHODS,
        draw_explanation,
        draw_faithfulness,
        load_explainer,
        locate_model,
        measure_faithfulness,
    )

    located = locate_model(model)  # first: a wrong path should not cost the time that Keras takes to start
    found = load_images(images, DataConfig(image_column=image_column))
    if html and len(found) != 1:
        raise ConfigError(
            f"Cannot write the page. Expected one image with --html. Received: {len(found)} images. Name one of them."
        )
    start_backend(backend)
    explainer = load_explainer(located, image_size=size)
    if html:
        answer = _write_page(explainer, found, target, html)
        if json_output:
            json.dump({"model": model, "images": [answer]}, sys.stdout, indent=2, ensure_ascii=False)
            print()
        else:
            share = "" if answer["class"] is None else f": {escape_text(answer['class'])} {answer['probability']:.1%}"
            print(f"{escape_text(answer['image'])}{share}")
        return 0
    chosen = None if method is None or "all" in method else list(method)
    names = explainer.check_methods(chosen)
    for each in METHODS if chosen is None else ():
        if reason := explainer.why_not(each):
            print(f"Left out {each}: {reason}", file=sys.stderr)
    mapped = [each for each in names if METHODS[each].has_map]
    if faithfulness:
        explainer.check_methods(mapped or names, needs_map=True)
    # A file that the user names must be readable; in a folder or a table one bad file stops nothing.
    is_each_named = all(os.path.isfile(image) and is_image_name(image) for image in images)
    stems = _stems(found.names)
    results, readable = [], []
    with show_progress("images") as on_progress:
        for index in range(len(found)):
            try:
                image = found.load(index, explainer.input_spec.num_channels)
            except ImageError as error:
                if is_each_named:
                    raise
                name, reason = escape_text(found.names[index]), escape_text(error.reason)
                print(f"Warning: left out {name}: {reason}", file=sys.stderr)
                continue
            readable.append(index)
            several = explainer.explain(
                image, methods=names, target=target, block=block, head=head, fill=fill, steps=steps
            )
            pictures = []
            title = Path(found.names[index]).name
            groups = [several] if chosen is None else [[each] for each in several]
            for group in groups:
                suffix = "" if chosen is None else f"-{group[0].method}"
                pictures.append(
                    draw_explanation(group, out / f"{stems[index]}{suffix}.png", name=title, is_smooth=smooth)
                )
            if npz:
                pictures.append(_write_arrays(several, out / f"{stems[index]}.npz"))
            if json_output:
                results.append(
                    {
                        "image": str(found.names[index]),
                        "files": [str(path) for path in pictures],
                        "class": several[0].class_name,
                        "probability": several[0].probability,
                        "explanations": [each.to_dict() for each in several],
                    }
                )
            else:
                print(_line(found.names[index], several[0], pictures))
            if on_progress:
                on_progress(index + 1, len(found))
    if not readable:
        raise DataError(
            f"Cannot explain. Expected at least one image that can be read. Received: {len(found)} that cannot. "
            "Look at them: vitreous inspect DATA."
        )
    measured = None
    if faithfulness:
        with show_progress("images measured") as on_progress:
            measured = measure_faithfulness(
                explainer,
                found.take(readable),
                methods=mapped,
                target=target,
                fill=fill,
                num_random=num_random,
                on_progress=on_progress,
            )
        path = draw_faithfulness(measured, out / "faithfulness.png", name=Path(model).name)
        if not json_output:
            print("\n".join([*_table(measured), f"Wrote {path}"]))
    if json_output:
        everything: dict[str, Any] = {"model": model, "images": results}
        if measured:
            everything["faithfulness"] = measured.to_dict()
        json.dump(everything, sys.stdout, indent=2, ensure_ascii=False)
        print()
    return 0


def _write_page(explainer: "Explainer", images: "ImageSet", target: str | None, path: Path) -> dict[str, Any]:
    """Writes the page of the only image, with one more class than usual if it is asked for; returns the answer."""
    from vitreous.look import look
    from vitreous.report import render_look

    image = images.load(0, explainer.input_spec.num_channels)
    more = [] if target is None else [explainer.find_class(target)]
    found = look(explainer, image)
    if more:
        found["relevance"] |= look(explainer, image, classes=more)["relevance"]
    with open_output(path) as file:
        file.write(render_look(found, name=Path(images.names[0]).name))
    first = found["predictions"][0] if found["predictions"] else {"class": None, "probability": None}
    return {
        "image": str(images.names[0]),
        "files": [str(path)],
        "class": first["class"],
        "probability": first["probability"],
    }


def _line(name: str, explanation: "Explanation", files: list[Path]) -> str:
    """Returns an image, its answer and its files in one line."""
    answer = ""
    if explanation.class_name is not None and explanation.probability is not None:
        answer = f"{escape_text(explanation.class_name)} {explanation.probability:.1%}, "
    return f"{escape_text(name)}: {answer}wrote {', '.join(escape_text(str(path)) for path in files)}"


def _table(found: "Faithfulness") -> list[str]:
    """Returns the areas of each method, the best by insertion first."""
    fill = "mean colour" if found.fill == "mean" else "blur"
    images, ranks = f"{found.num_images} image{'s' * (found.num_images > 1)}", f"{found.num_random} random rankings"
    base = found.curves["random"]
    lines = [
        f"Faithfulness on {images}, patches replaced by the {fill}, against the mean of {ranks} of each",
        f"{'method':<22} deletion area (lower is better)  insertion area (higher is better)",
    ]
    for name, curves in sorted(found.curves.items(), key=lambda item: -item[1].insertion_area):
        out, into = curves.deletion_area, curves.insertion_area
        against = "" if name == "random" else f" ({out - base.deletion_area:+.3f})"
        more = "" if name == "random" else f" ({into - base.insertion_area:+.3f})"
        lines.append(f"{name:<22} {out:13.3f}{against:<18} {into:14.3f}{more}")
    return lines


def _stems(names: "Sequence[str]") -> list[str]:
    """Returns a file name for each image's pictures: its own where no other has it, made safe; else with a number."""
    plain = [re.sub(r"[^\w.-]", "_", Path(name).stem) or "image" for name in names]
    counts = Counter(plain)
    taken = {stem for stem, count in counts.items() if count == 1}
    stems = []
    for number, stem in enumerate(plain, 1):
        if counts[stem] > 1:
            base = stem = f"{stem}-{number}"
            for more in itertools.count(2):
                if stem not in taken:
                    break
                stem = f"{base}-{more}"
            taken.add(stem)
        stems.append(stem)
    return stems


def _write_arrays(explanations: "list[Explanation]", path: Path) -> Path:
    """Writes the image, the logits, and each method's arrays under METHOD/NAME."""
    import numpy as np

    arrays: dict[str, Any] = {"image": explanations[0].image, "logits": explanations[0].logits}
    for each in explanations:
        if each.map is not None:
            arrays[f"{each.method}/map"] = each.map
        arrays |= {f"{each.method}/{name}": array for name, array in each.arrays.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
    return path
