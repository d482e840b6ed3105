"""The pages of docs/ that follow from the code. Write them anew with: python tests/test_docs.py"""

from pathlib import Path

import pytest

from vitreous.cli import app
from vitreous.registry import count_macs, count_parameters, get_spec, list_models

DOCS = Path(__file__).parents[1] / "docs"
NOTE = "<!-- Written by tests/test_docs.py from the code; do not edit. -->\n\n"


def cli_page() -> str:
    return NOTE + app.generate_docs().strip() + "\n"


def models_page() -> str:
    lines = [
        "# Models",
        "",
        "Parameters with the head of 1,000 classes; MACs are the multiply-accumulates of one image's matrix products.",
        "",
        "| name | image | patch | width | blocks | heads | tokens | parameters | MACs | pooling |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in list_models():
        c = get_spec(name).config
        lines.append(
            f"| `{name}` | {c.image_size[0]} | {c.patch_size[0]} | {c.projection_dim} | {c.num_blocks} | {c.num_heads} "
            f"| {c.num_tokens} | {count_parameters(c) / 1e6:.2f}M | {count_macs(c) / 1e9:.3f}G | {c.pooling} |"
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
