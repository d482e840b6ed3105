"""Commands that need no data set: patches of an image, weights, models, recipes."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from vitreous.cli.options import Backend, parse_size, start_backend
from vitreous.cli.printing import model_lines


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
        patch_size=parse_size(patch_size, "patch-size") or 16,
        strides=parse_size(strides, "strides"),
        dilation_rate=parse_size(dilation_rate, "dilation-rate") or 1,
        padding=padding,
        image_size=parse_size(image_size, "image-size"),
        out=out,
    )
    print(f"Wrote {path}")
    return 0


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
    images, patch = parse_size(image_size, "image-size"), parse_size(patch_size, "patch-size")
    start_backend(backend)
    from vitreous.weights import convert as convert_weights

    report = convert_weights(
        source, destination, to=to, model=model, num_classes=num_classes, image_size=images, patch_size=patch
    )
    print(report.summary())
    return 0


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
        print("\n".join(model_lines(rows[0])))
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


def recipes(
    names: list[str] | None = None,
    /,
    *,
    json_output: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> int:
    """List the recipes for training: what each is for, and what was measured with it.

    Args:
        names: Names of recipes, or TOML files. Default: all that vitreous carries.
        json_output: Print JSON.
    """
    from vitreous.training.recipe import list_recipes, load_header, load_recipe

    headers = {}
    for name in names or list_recipes():
        load_recipe(name)  # a file that is no recipe is an error here, as it would be in training
        headers[name] = load_header(name)
    if json_output:
        print(json.dumps([{"name": name, **dataclasses.asdict(header)} for name, header in headers.items()], indent=2))
        return 0
    width = max(map(len, headers))
    for name, header in headers.items():
        for i, line in enumerate(header.describe()):
            print(f"{name if i == 0 else '':<{width}}  {line}")
    return 0
