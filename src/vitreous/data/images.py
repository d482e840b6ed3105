"""From a file, bytes or a Pillow image to a uint8 array, and from there to the size that a model takes.

Pillow is imported by the first call that needs it. It may open only the formats named here: its other readers include
one that starts Ghostscript, which no image from a stranger should reach.
"""

import contextlib
import functools
import importlib
import io
import os
import re
import stat
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np

from vitreous.data.jpeg import decode_plain_jpeg
from vitreous.errors import ConfigError, ImageError, MissingPathError
from vitreous.spec import InputSpec

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "avif", "gif", "bmp", "dib", "tif", "tiff"),
        *("jp2", "j2k", "j2c", "jpc", "jpf", "jpx", "ppm", "pgm", "pbm", "pnm", "pfm", "qoi"),
    )
)
"""Suffixes of the files that count as images, in lower case."""

HEAD_BYTES = 4096
"""Bytes of a file that show what it is, in most cases."""

_PLUGINS = ("Avif", "Bmp", "Gif", "Jpeg", "Jpeg2K", "Png", "Ppm", "Qoi", "Tiff", "Webp")
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "QOI")
_PILLOW_WARNINGS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
_ORIENTATION_TAG = 0x0112
_WHOLE_BYTES = 1 << 26  # files up to here are read in one piece

ImageSource: TypeAlias = "str | Path | bytes | BinaryIO | Image.Image"


def decode_image(
    source: ImageSource,
    num_channels: int = 3,
    *,
    name: str | None = None,
    min_size: int | None = None,
    scratch: bytearray | None = None,
) -> np.ndarray:
    """Reads one image as the eye would see it: rotated as EXIF says, transparency laid over white.

    Grey becomes colour by repetition, colour becomes grey by Pillow's luma (ITU-R 601-2). Of an animation the first
    frame counts. Colour profiles are not applied. Values beyond 8 bits:

    - 16-bit grey is divided by 257, so that 65535 becomes 255; 16-bit colour loses its lower byte (Pillow does so);
    - 32-bit integers up to 255 are taken as they are, larger ones as 16-bit grey;
    - floating point up to 1 is multiplied by 255, up to 255 taken as it is, beyond that as 16-bit grey.

    Negative values become 0, and values beyond the range its largest.

    Args:
        source: Path of a file, its bytes, a binary stream (read from where it stands), or a Pillow image.
        num_channels: 3 (RGB) or 1 (grey).
        name: What to call the image in errors. Default: the path, or `"<image>"`.
        min_size: Pixels that the shorter side must keep. A much larger JPEG is then decoded at 1/2, 1/4 or 1/8 of its
            size, many times faster. Default: decode at full size.
        scratch: Memory to decode into, where that is possible; it is made larger where need be.

    Returns:
        uint8, (H, W, num_channels), the caller's own; with `scratch` it may be a view of that, valid until its next
        use.

    Raises:
        ImageError: If the source is not a whole image.
        MissingPathError: If the path does not exist.
        ConfigError: If `num_channels` is neither 1 nor 3.
    """
    if num_channels not in (1, 3):
        raise ConfigError(
            "Cannot decode an image. Expected num_channels 1 (grey) or 3 (RGB). "
            f"Received: num_channels={num_channels}. Pass one of them."
        )
    from PIL import Image

    _silence_pillow()
    if isinstance(source, Image.Image):
        try:
            return _as_uint8(source, num_channels)
        except Exception as error:
            raise ImageError(name or "<image>", _reason(error)) from error
    if isinstance(source, str | Path):
        name = name or str(source)
    name = name or "<image>"
    try:
        source = _read_small(source)
        if isinstance(source, bytes) and (pixels := decode_plain_jpeg(source, min_size, scratch)) is not None:
            return pixels if num_channels == 3 else to_array(to_pillow(pixels).convert("L"))
        with _open(source) as image:
            if min_size is not None:
                image.draft(image.mode, (min_size, min_size))
            return _as_uint8(image, num_channels)
    except Exception as error:
        if isinstance(error, FileNotFoundError) and isinstance(source, str | Path) and not os.path.exists(source):
            raise MissingPathError(
                f"Cannot read the image {name}. Expected a file that exists. Received: path={str(source)!r}. "
                "Check the path."
            ) from error
        raise ImageError(name, _reason(error)) from error


@contextlib.contextmanager
def open_image(source: ImageSource, *, name: str | None = None) -> "Iterator[Image.Image]":
    """Opens an image by its header, for a look at its format and mode; `decode_image` takes what this yields.

    Args:
        source: As for `decode_image`.
        name: What to call the image in errors. Default: the path, or `"<image>"`.

    Yields:
        A Pillow image, closed afterwards.

    Raises:
        ImageError: If the source is no image, or whatever Pillow raises inside the `with` block.
    """
    from PIL import Image

    _silence_pillow()
    name = name or (str(source) if isinstance(source, str | Path) else "<image>")
    try:
        with contextlib.nullcontext(source) if isinstance(source, Image.Image) else _open(source) as image:
            yield image
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(name, _reason(error)) from error


def check_image_header(source: str | Path | bytes) -> str | None:
    """Looks at the first bytes of an image, without decoding it.

    Args:
        source: The file, or all its bytes.

    Returns:
        Why the file is no readable image, or None if it looks like one. It may still turn out to be cut short.
    """
    _silence_pillow()
    try:
        if isinstance(source, bytes):
            is_plain = is_plain_header(source[:HEAD_BYTES])
        else:
            is_plain = os.path.isfile(source) and _has_plain_header(source)
        if not is_plain:
            with _open(source):
                pass
    except Exception as error:
        return _reason(error)
    return None


def _has_plain_header(path: str | Path) -> bool:
    """Whether a file begins as most JPEG and PNG files do. Pillow, six times slower, judges the others."""
    with open(path, "rb", buffering=0) as file:
        return is_plain_header(file.read(HEAD_BYTES))


def is_plain_header(head: bytes) -> bool:
    """Whether the first `HEAD_BYTES` of a file are those of an ordinary JPEG or PNG."""
    height = width = 0
    if head.startswith(b"\x89PNG\r\n\x1a\n") and head[12:16] == b"IHDR":
        width, height = struct.unpack_from(">II", head, 16) if len(head) > 32 else (0, 0)
    elif head.startswith(b"\xff\xd8"):
        place = 2
        while place + 9 <= len(head) and head[place] == 0xFF:
            marker, num_bytes, _, rows, columns = struct.unpack_from(">BHBHH", head, place + 1)
            if marker in (0xC0, 0xC1, 0xC2):  # the frame: baseline, extended, progressive
                height, width = rows, columns
                break
            place += 2 + num_bytes
    return 0 < height * width < 2**26


def resize_image(image: np.ndarray, input_spec: InputSpec) -> np.ndarray:
    """Brings an image to the size that a model takes, to the pixel as evaluation does and as exports state it.

    Args:
        image: uint8, (H, W, C).
        input_spec: Size, filter and `resize_mode`.

    Returns:
        uint8, (*input_spec.image_size, C). It is `image` itself if there is nothing to do.

    Raises:
        ConfigError: If `image` is not such an array.

    Source: sizes are rounded as torchvision's Resize and CenterCrop do, and so as timm's evaluation (its crop modes
    center, squash and border): https://github.com/pytorch/vision/blob/main/torchvision/transforms/functional.py,
    https://github.com/huggingface/pytorch-image-models/blob/main/timm/data/transforms_factory.py
    """
    image, cover, (top, left), (rows, columns) = place_image(image, input_spec)
    if cover == image.shape[:2] == (rows, columns) == input_spec.image_size:
        return image
    pillow = to_pillow(image)
    if image.shape[:2] != cover:
        pillow = pillow.resize((cover[1], cover[0]), resampling(input_spec))
    return pad_image(to_array(pillow.crop((left, top, left + columns, top + rows))), input_spec)


def place_image(
    image: np.ndarray, input_spec: InputSpec
) -> tuple[np.ndarray, tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Returns where an image goes: (what of it counts, its size once resized, (top, left) and size of what stays).

    Arguments and errors as for `resize_image`.
    """
    check_array(image, input_spec)
    target = input_spec.image_size
    if input_spec.resize_mode == "crop":
        image = _limit_aspect(image, target)
    height, width = image.shape[:2]
    if (height, width) == target and input_spec.crop_fraction == 1:
        return image, target, (0, 0), target
    cover = [max(side, int(side / input_spec.crop_fraction)) for side in target]
    if input_spec.resize_mode == "pad":  # the longer side decides
        scale = min(cover[0] / height, cover[1] / width)
        cover = [min(limit, max(1, round(side * scale))) for side, limit in zip((height, width), cover, strict=True)]
    elif input_spec.resize_mode == "crop" and cover[0] != cover[1]:  # the side decides that needs it more
        scale = max(cover[0] / height, cover[1] / width)
        cover = [round(side * scale) for side in (height, width)]
    elif input_spec.resize_mode == "crop":
        if width >= height:  # the height decides; the width follows, and covers as well
            cover[1] = cover[0] * width // height
        else:
            cover[0] = cover[1] * height // width
    top, left = (round(max(side - limit, 0) / 2) for side, limit in zip(cover, target, strict=True))
    rows, columns = (min(side, limit) for side, limit in zip(cover, target, strict=True))
    return image, (cover[0], cover[1]), (top, left), (rows, columns)


def pad_image(image: np.ndarray, input_spec: InputSpec) -> np.ndarray:
    """Returns an image of the size in `input_spec`: `image` itself, or, where it is smaller, in the middle of the mean
    colour.
    """
    target, (rows, columns) = input_spec.image_size, image.shape[:2]
    if (rows, columns) == target:
        return image
    padded = np.empty((*target, image.shape[2]), "uint8")
    padded[:] = np.round(255 * np.array(input_spec.mean))
    top, left = (target[0] - rows) // 2, (target[1] - columns) // 2
    padded[top : top + rows, left : left + columns] = image
    return padded


def _limit_aspect(image: np.ndarray, target: tuple[int, int]) -> np.ndarray:
    """Cuts off the ends of a very long image. The centre crop drops them anyway; resized, they would fill memory."""
    height, width = image.shape[:2]
    most_rows = 16 * width * max(1, -(-target[0] // target[1]))
    most_columns = 16 * height * max(1, -(-target[1] // target[0]))
    top, left = max(0, height - most_rows) // 2, max(0, width - most_columns) // 2
    return image[top : height - top, left : width - left] if top or left else image


def check_array(image: np.ndarray, input_spec: InputSpec) -> None:
    """Raises `ConfigError` unless `image` is uint8, (H, W, C) with the channels of `input_spec`."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != input_spec.num_channels or not image.size:
        raise ConfigError(
            f"Cannot resize an image. Expected uint8 of shape (H, W, {input_spec.num_channels}). "
            f"Received: dtype={image.dtype}, shape={image.shape}. Read it with decode_image(source, num_channels)."
        )


def resampling(input_spec: InputSpec) -> "Image.Resampling":
    """Returns Pillow's filter for `input_spec.interpolation`."""
    from PIL import Image

    return Image.Resampling[input_spec.interpolation.upper()]


def to_pillow(image: np.ndarray) -> "Image.Image":
    """Returns uint8 (H, W, 1 or 3) as a Pillow image of mode L or RGB."""
    from PIL import Image

    return Image.fromarray(image if image.shape[2] == 3 else image[:, :, 0])


def to_array(image: "Image.Image") -> np.ndarray:
    """Returns a Pillow image of mode L or RGB as uint8 (H, W, 1 or 3) that may be written to."""
    array = np.array(image)
    return array if array.ndim == 3 else array[:, :, None]


def _silence_pillow() -> None:
    """Keeps Pillow's warnings from printing. Per-call filters are not safe in threads, so one filter stays in place."""
    if warnings.filters[:1] != [_PILLOW_WARNINGS]:
        warnings.filterwarnings("ignore", module=r"PIL\.")


def _formats() -> tuple[str, ...]:
    """Returns the formats that may be read. Pillow may still be registering one in another thread: not for keeping."""
    from PIL import Image

    _load_readers()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@functools.cache
def _load_readers() -> None:
    """Loads Pillow's readers that may be used."""
    for plugin in _PLUGINS:
        with contextlib.suppress(ImportError):  # an older Pillow has fewer
            importlib.import_module(f"PIL.{plugin}ImagePlugin")


def _read_small(source: Any) -> Any:
    """Returns the bytes of a file of ordinary size; anything else as it is."""
    if isinstance(source, str | Path):
        status = os.stat(source)
        if stat.S_ISREG(status.st_mode) and 0 < status.st_size <= _WHOLE_BYTES:
            with open(source, "rb", buffering=0) as file:
                return file.readall()
    return source


def _open(source: Any) -> "Image.Image":
    """Opens without decoding; whoever calls closes it."""
    from PIL import Image

    if isinstance(source, str | Path):
        status = os.stat(source)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("a folder, not a file" if stat.S_ISDIR(status.st_mode) else "not a regular file")
        size = status.st_size
    else:
        data = source if isinstance(source, bytes | bytearray | memoryview) else source.read()
        size, source = len(data), io.BytesIO(data)
    if size == 0:
        raise ValueError("an empty file")
    image = Image.open(source, formats=_formats())
    if 0 in image.size:
        image.close()
        raise ValueError("an image without pixels")
    return image


def _as_uint8(image: "Image.Image", num_channels: int) -> np.ndarray:
    image.load()
    image = _rotate(image)
    if image.mode[0] in "IF":
        image = _from_wide(np.asarray(image), is_16_bit=image.mode.startswith("I;16"))
    elif image.has_transparency_data:
        from PIL import Image

        top = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
        image = Image.new("RGBA", image.size, "white")
        image.alpha_composite(top)
    if image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")
    mode = "RGB" if num_channels == 3 else "L"
    return to_array(image if image.mode == mode else image.convert(mode))


def _rotate(image: "Image.Image") -> "Image.Image":
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged EXIF says nothing about the pixels
        orientation = 1
    if orientation == 1:
        return image
    from PIL import ImageOps

    return ImageOps.exif_transpose(image)


def _from_wide(values: np.ndarray, is_16_bit: bool) -> "Image.Image":
    """16-bit, 32-bit and floating-point grey to 8 bits, by the rules that `decode_image` states."""
    from PIL import Image

    if not np.isfinite(values).all():
        raise ValueError("pixel values that are not finite")
    largest, is_float = values.max(), values.dtype.kind == "f"
    values = values.astype("float64")
    if is_16_bit or largest > 255:
        values = values / 257
    elif is_float and largest <= 1:
        values = values * 255
    return Image.fromarray(np.clip(np.round(values), 0, 255).astype("uint8"))


def _reason(error: Exception) -> str:
    from PIL import Image, UnidentifiedImageError

    text = str(error).strip()
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a known format"
    if isinstance(error, Image.DecompressionBombError):
        return "more pixels than Pillow's limit, possibly a decompression bomb"
    if isinstance(error, FileNotFoundError):
        return "a file that is not there"
    if isinstance(error, EOFError) or "truncated" in text.lower() or "broken data stream" in text:
        return f"a truncated image ({text or 'end of file'})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return text or type(error).__name__
