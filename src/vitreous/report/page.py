"""What every page is made of: templates that escape, images and figures inside the page."""

import base64
import functools
import io
import itertools
import re
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitreous import __version__
from vitreous.data.images import to_pillow

if TYPE_CHECKING:
    from markupsafe import Markup
    from PIL import Image

THUMBNAIL_SIZE = 112
"""Pixels of a thumbnail's longer side, at most."""

# What figures are drawn in becomes the page's own colours, which follow light and dark.
_COLOURS = {
    "#222222": "var(--ink)",
    "#000000": "var(--ink)",
    "#767676": "var(--soft)",
    "#e4e4e4": "var(--line)",
    "#ffffff": "var(--card)",
    "#0072b2": "var(--train)",
    "#d55e00": "var(--mark)",
}
_NUMBER = re.compile(r"-?\d+\.\d{3,}")


def render_page(template: str, **values: Any) -> str:
    """Returns a page: every value that is no `Markup` is escaped, and one that is missing is an error."""
    return _environment().get_template(template).render(version=__version__, **values)


@functools.cache
def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["number"] = lambda value: f"{value:,}"
    environment.filters["percent"] = lambda value, digits=1: "–" if value is None else f"{100 * value:.{digits}f}%"
    return environment


def make_thumbnail(pixels: np.ndarray, size: int = THUMBNAIL_SIZE) -> str:
    """Returns an image, uint8 (H, W, 1) or (H, W, 3), as a data URI of at most `size` pixels; never enlarged."""
    from PIL import Image

    image = to_pillow(np.ascontiguousarray(pixels))
    image.thumbnail((size, size), Image.Resampling.BOX if max(image.size) > 4096 else Image.Resampling.BICUBIC)
    return _encode(image)


def _encode(image: "Image.Image") -> str:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def draw_inside(draw: Callable[[Path], Path], *, name: str, alt: str) -> "Markup":
    """Draws a figure into the page.

    Args:
        draw: Writes the figure to the SVG file that it is given.
        name: Of the figure, one on a page: ids inside begin with it.
        alt: What it shows, for readers who do not see it.

    Returns:
        An `<svg>` in the page's colours, of its own width at most, with ids that are the same each time.
    """
    from markupsafe import Markup, escape

    with tempfile.TemporaryDirectory() as folder:
        text = draw(Path(folder) / "figure.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)  # our own file, just written
    for parent in root.iter():
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):  # who made it when; joins, which the page's style says
                parent.remove(child)
    numbers = itertools.count()
    names = {element.attrib["id"]: f"{name}-{next(numbers)}" for element in root.iter() if "id" in element.attrib}
    used: set[str] = set()
    for element in root.iter():
        element.tag = element.tag.partition("}")[2]
        attributes = {key.partition("}")[2] or key: value for key, value in element.attrib.items()}
        element.attrib.clear()
        for key, value in attributes.items():
            if key == "href" and value.startswith("#"):
                value = f"#{names[value[1:]]}"
                used.add(value[1:])
            elif key == "id":
                value = names[value]
            elif "url(#" in value:
                value = re.sub(r"url\(#([^)]+)\)", lambda found: f"url(#{names[found[1]]})", value)
                used.update(re.findall(r"url\(#([^)]+)\)", value))
            if key in ("style", "fill", "stroke"):
                value = re.sub(r"#[0-9a-f]{6}\b", lambda found: _COLOURS.get(found[0], found[0]), value)
            if key in ("d", "x", "y", "width", "height", "points"):  # transforms scale: their digits count
                value = _NUMBER.sub(lambda found: f"{float(found[0]):.2f}", value)
            element.set(key, " ".join(value.split()) if key == "d" else value)
    for element in root.iter():
        if element.attrib.get("id") not in used:
            element.attrib.pop("id", None)
        if element.text and not element.text.strip():
            element.text = None
        element.tail = None
    view = root.attrib["viewBox"].split()
    inside = "".join(ElementTree.tostring(child, encoding="unicode") for child in root)
    return Markup(
        f'<svg class="drawn" viewBox="{" ".join(view)}" style="max-width: {float(view[2]) * 4 / 3:.0f}px" role="img" '
        f'aria-label="{escape(alt)}">{inside}</svg>'
    )
