"""What every figure is made of: an empty one, images, text, and a file that is written whole or not at all."""

import functools
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from vitreous.errors import ConfigError
from vitreous.files import replacing
from vitreous.patches import as_pair

BLUE, ORANGE, VERMILION = "#0072B2", "#E69F00", "#D55E00"
INK, FAINT, PALE = "#222222", "#767676", "#E4E4E4"
DPI = 100
FORMATS = (".png", ".svg", ".pdf")

_SCRIPTS = (  # fonts for what DejaVu Sans cannot write; those that are installed are used
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans SC",
    "WenQuanYi Zen Hei",
    "Microsoft YaHei",
    "PingFang SC",
    "Hiragino Sans",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "Arial Unicode MS",
)


def create_figure(width: float, height: float) -> Figure:
    """Returns an empty figure of so many pixels, with a canvas that draws without a screen."""
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def load_image(image: np.ndarray | str | Path, image_size: int | tuple[int, int] | None) -> tuple[np.ndarray, int]:
    """Returns an image as uint8 (H, W, 3), resized if asked, and how many channels it had."""
    if isinstance(image, str | Path):
        from vitreous.data.images import decode_image

        array = decode_image(image)
    else:
        array = np.asarray(image)
    is_float = np.issubdtype(array.dtype, np.floating)
    has_shape = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3))
    if not (has_shape and array.size and (array.dtype == np.uint8 or is_float)):
        raise ConfigError(
            "Cannot draw the image. Expected uint8 or floating point of shape (H, W), (H, W, 1) or (H, W, 3). "
            f"Received: shape={array.shape}, dtype={array.dtype}. Pass one image, without a batch axis."
        )
    if is_float:
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ConfigError(
                "Cannot draw the image. Expected floating point values in [0, 1]. "
                f"Received: values from {array.min():.4g} to {array.max():.4g}. "
                "Undo the normalisation, or pass uint8."
            )
        array = np.rint(array * 255).astype("uint8")
    num_channels = 1 if array.ndim == 2 else array.shape[2]
    pixels = np.broadcast_to(array.reshape(*array.shape[:2], num_channels), (*array.shape[:2], 3))
    if image_size is not None:
        from PIL import Image

        height, width = as_pair(image_size, "image_size")
        pixels = np.asarray(
            Image.fromarray(np.ascontiguousarray(pixels)).resize((width, height), Image.Resampling.BICUBIC)
        )
    return pixels, num_channels


def show(axis: Axes, pixels: np.ndarray) -> None:
    """Shows an image without ticks: crisp where it is enlarged, smooth where it is reduced."""
    axis.imshow(pixels, interpolation="auto", aspect="equal")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


# ----- text, always literal: a class named $x$ is written so


@functools.cache
def _families() -> list[str]:
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in _SCRIPTS if name in installed)]


def text_style(size: float) -> dict[str, Any]:
    """Returns how texts of so many points look."""
    return {"fontfamily": _families(), "fontsize": size, "color": INK, "parse_math": False}


def write(
    where: Axes | Figure, x: float, y: float, text: str, *, color: str, size: float, ha: str = "center", **style: Any
) -> None:
    """Writes a text, centred at (x, y) of `where` unless `ha` says otherwise."""
    where.text(x, y, text, **{**text_style(size), "color": color, "ha": ha, "va": "center", **style})


def write_title(axis: Axes, text: str) -> None:
    """Writes the title of an axis."""
    axis.set_title(text, **{**text_style(10), "pad": 7})


def measure(figure: Figure, text: str, size: float) -> tuple[float, float]:
    """Returns (width, height) in pixels of a text of so many points."""
    probe = Text(0, 0, text, **text_style(size))
    probe.set_figure(figure)
    with _without_glyph_warnings():
        box = probe.get_window_extent(figure.canvas.get_renderer())  # type: ignore[attr-defined]
    return box.width, box.height


def fit(figure: Figure, name: str, size: float, pixels: float) -> str:
    """Returns the name, shortened until it fits into so many pixels."""
    name = shorten(name, 60)
    while len(name) > 3 and measure(figure, name, size)[0] > pixels:
        name = shorten(name, min(len(name) - 1, max(3, int(len(name) * pixels / measure(figure, name, size)[0]))))
    return name


def shorten(name: str, length: int) -> str:
    """Returns a name in one line of at most `length` characters, with an ellipsis in place of its middle."""
    name = " ".join(name.split())
    if len(name) <= length:
        return name
    tail = (length - 1) // 3
    return f"{name[: length - 1 - tail]}…{name[len(name) - tail :]}"


_FILTERS = threading.Lock()  # warning filters belong to the whole process


@contextmanager
def _without_glyph_warnings() -> Iterator[None]:
    """Keeps Matplotlib from warning of each character that no installed font has; it draws a box in its place."""
    with _FILTERS, warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from", UserWarning)
        yield


# ----- files


def checked_path(out: str | Path) -> Path:
    """Returns the path of a file to write, whose suffix is one of `FORMATS`."""
    path = Path(out)
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(
            f"Cannot write the figure. Expected a file name that ends in {', '.join(FORMATS)}. "
            f"Received: out={str(out)!r}. Change the suffix."
        )
    return path


def save(figure: Figure, path: Path) -> Path:
    """Writes a figure through a temporary file beside it, so that a reader never sees half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = path.suffix.lower().removeprefix(".")
    dates = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with replacing(path) as temporary, _without_glyph_warnings():
        figure.savefig(temporary, format=suffix, dpi=DPI, metadata=dates[suffix])
    return path
