"""The pages of docs/ that follow from the code. Write them anew with: python tests/test_docs.py"""

from pathlib import Path

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


PAGES = {"cli.md": cli_page, "models.md": models_page}


@pytest.mark.parametrize("name", PAGES)
def test_page_is_what_the_code_says(name):
    assert (DOCS / name).read_text() == PAGES[name](), "Run: python tests/test_docs.py"


if __name__ == "__main__":
    for name, write in PAGES.items():
        (DOCS / name).write_text(write())
        print(f"Wrote docs/{name}")
