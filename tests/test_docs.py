# ruff: noqa: E501
"""The pages of docs/ that follow from the code. Write them anew with: python tests/test_docs.py"""

import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from vitreous.cli import app
from vitreous.registry import (
    count_macs,
    count_parameters,
    get_family,
    get_spec,
    list_families,
    list_models,
    list_weights,
)

DOCS = Path(__file__).parents[1] / "docs"
NOTE = "<!-- Written by tests/test_docs.py from the code; do not edit. -->\n\n"


def cli_page() -> str:
    with mock.patch.object(sys, "argv", ["vitreous"]):  # cyclopts takes the program's name from there
        return NOTE + app.generate_docs().strip() + "\n"


def models_page() -> str:
    lines = [
        "# Models",
        "",
        "The names are those of timm, and so are inputs, tags and licences of the weights; `vitreous models NAME` "
        "shows a model whole. Parameters are counted with the head of the first weights (of 1,000 classes where there "
        "are none); MACs are the multiply-accumulates of one image's matrix products.",
        "",
        f"{len(list_models())} models, {sum(len(list_weights(name)) for name in list_models())} published weights.",
    ]
    for title, names in list_families().items():
        family = get_family(names[0])
        has_weights = any(list_weights(name) for name in names)
        usual = f" Weights: {family.license}, unless said otherwise." if has_weights else ""
        lines += [
            "",
            f"## {title}",
            "",
            f"Source: {family.source.rstrip('.')}.{usual}",
            "",
            "| name | image | patch | width | blocks | heads | tokens | parameters | MACs | pooling | weights |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for name in names:
            c = get_spec(name).config
            weights = [
                f"`{source.tag}`"
                + (f" ({source.license or 'licence not stated'})" * (source.license != family.license))
                for source in list_weights(name)
            ]
            lines.append(
                f"| `{name}` | {c.image_size[0]} | {c.patch_size[0]} | {c.projection_dim} | {c.num_blocks} "
                f"| {c.num_heads} | {c.num_tokens} | {count_parameters(c) / 1e6:.2f}M | {count_macs(c) / 1e9:.3f}G "
                f"| {c.pooling} | {', '.join(weights)} |"
            )
    return NOTE + "\n".join(lines) + "\n"


WEIGHTS_HEAD = """\
# Weights in and out

    vitreous train photos/ --pretrained timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k
    vitreous convert hf:google/vit-base-patch16-224 base.keras --to keras
    vitreous convert runs/photos-1 photos-timm --to timm

| format | files | read | written |
|---|---|---|---|
| Keras | `.keras`, or a run folder | yes | `--to keras` |
| timm | `.safetensors` (sharded too), `.pth` with torch, `config.json` beside it; VisionTransformer, DeiT, EVA-02, DINOv3 | yes | `--to timm` |
| Hugging Face | folder with `config.json`, `preprocessor_config.json`; ViT, DeiT, distilled DeiT, DINOv2, with registers | yes | `--to hf` |
| Google | `.npz` of vision_transformer and big_vision | yes | `--to npz` |

Every tensor must find its place: a missing, unexpected or misshaped one is an error that names it. A new number of
classes gets a fresh head and says so; positions are resized to a new image size as timm does it, patch projections to a
new patch size as FlexiViT does it. What is written is read back and compared. Nothing is unpickled.

Names of models and their published weights: [models](models.md), `vitreous models NAME`. Weights by name come through
`huggingface_hub` (`vitreous[hub]`) and its cache; without a network, pass a local file.

## Checked

These models, with random weights and outputs that their own libraries computed, are imported by the tests on each
backend: tokens and logits to 1e-5. Exported back, each file is equal tensor by tensor.

| reference | library | class | what it has |
|---|---|---|---|
"""


def weights_page() -> str:
    lines = []
    for path in sorted((Path(__file__).parent / "data" / "references").glob("*.npz")):
        with np.load(path) as arrays:
            description = json.loads(arrays["description"].tobytes())
        common = {"img_size", "image_size", "patch_size", "embed_dim", "hidden_size", "depth", "num_hidden_layers"}
        common |= {"num_heads", "num_attention_heads", "num_classes", "num_labels", "intermediate_size"}
        what = ", ".join(key for key in description["arguments"] if key not in common) or "the plain model"
        lines.append(f"| {path.stem} | {description['library']} | {description.get('cls', '')} | {what} |")
    return NOTE + WEIGHTS_HEAD + "\n".join(lines) + "\n"


PAGES = {"weights.md": weights_page, "cli.md": cli_page, "models.md": models_page}


@pytest.mark.parametrize("name", PAGES)
def test_page_is_what_the_code_says(name):
    assert (DOCS / name).read_text() == PAGES[name](), "Run: python tests/test_docs.py"


if __name__ == "__main__":
    for name, write in PAGES.items():
        (DOCS / name).write_text(write())
        print(f"Wrote docs/{name}")
