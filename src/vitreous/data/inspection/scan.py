"""Every image of a data set decoded once, and what is measured of it in a few dozen bytes.

Threads share the work where images are large: Pillow decodes without the interpreter's lock. Around images of 32 pixels
they only fight over it, and one thread is faster than two, and than two processes (docs/inspect.md has the figures).
"""

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vitreous.backend import count_cores
from vitreous.data.hashing import THUMBNAIL_SIZE, perceptual_hashes
from vitreous.data.image_set import Dataset, ImageSet
from vitreous.data.images import decode_image, open_image, to_pillow
from vitreous.data.sources.contents import reason_of
from vitreous.errors import ImageError, MissingPathError

if TYPE_CHECKING:
    from PIL import Image

_MAX_WORKERS = 8
_CHUNK = 64
_SMALL_FILE_BYTES = 16_384
_ORIENTATION_TAG = 0x0112

GREY, CMYK, DEEP, PALETTE, ALPHA, ANIMATED, ROTATED, CONSTANT = (1 << bit for bit in range(8))
"""Bits of `Scan.flags`: each image that is so has the bit set."""

Progress = Callable[[int, int], None]


@dataclass
class Scan:
    """What was measured of N images, the splits one after the other.

    Attributes:
        starts: Position of the first image of each split, and N at the end; int64.
        heights: Pixels, as the eye sees the image (EXIF applied); int32, (N,). 0 where the image cannot be read.
        widths: The same.
        flags: Bits such as `GREY`; uint8, (N,).
        formats: Index into `format_names`; uint8, (N,).
        modes: Index into `mode_names`; uint8, (N,).
        brightness: Mean of the grey image, 0 to 255; float32, (N,).
        contrast: Standard deviation of its grey thumbnail, in the same levels; float32, (N,).
        pixel_hashes: BLAKE2b of the shape and of the RGB pixels as `decode_image` returns them, 16 bytes; void, (N,).
        hashes: Perceptual hashes; uint64, (N,).
        format_names: Pillow's names, such as JPEG; `array` for images in memory.
        mode_names: Pillow's names, such as RGB.
        broken: Position of each image that cannot be read, and why.
    """

    starts: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    flags: np.ndarray
    formats: np.ndarray
    modes: np.ndarray
    brightness: np.ndarray
    contrast: np.ndarray
    pixel_hashes: np.ndarray
    hashes: np.ndarray
    format_names: list[str] = field(default_factory=list)
    mode_names: list[str] = field(default_factory=list)
    broken: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.heights)

    @property
    def is_readable(self) -> np.ndarray:
        """bool, (N,)."""
        return self.heights > 0


def scan_dataset(dataset: Dataset, *, num_workers: int | None = None, on_progress: Progress | None = None) -> Scan:
    """Decodes every image of a data set, whole, and measures it.

    Args:
        dataset: What to read. Nothing is written.
        num_workers: Threads. Default: one for small files (16 KiB on average), else one for each core, up to 8.
        on_progress: Called with the images done and the images in all.

    Returns:
        The measurements: 43 bytes an image.
    """
    splits = list(dataset.splits.values())
    starts = np.cumsum([0, *map(len, splits)])
    count = int(starts[-1])
    scan = Scan(
        starts=starts,
        heights=np.zeros(count, "int32"),
        widths=np.zeros(count, "int32"),
        flags=np.zeros(count, "uint8"),
        formats=np.zeros(count, "uint8"),
        modes=np.zeros(count, "uint8"),
        brightness=np.zeros(count, "float32"),
        contrast=np.zeros(count, "float32"),
        pixel_hashes=np.zeros(count, "V16"),
        hashes=np.zeros(count, "uint64"),
    )
    scanner = _Scanner(scan)
    chunks = [
        (images, int(start), range(first, min(first + _CHUNK, len(images))))
        for images, start in zip(splits, starts, strict=False)
        for first in range(0, len(images), _CHUNK)
    ]
    if num_workers is None:
        is_small = sum(int(images.file_sizes.sum()) for images in splits) <= _SMALL_FILE_BYTES * count
        num_workers = 1 if is_small else min(count_cores(), _MAX_WORKERS)
    with ThreadPoolExecutor(num_workers, thread_name_prefix="vitreous-inspect") as pool:
        pending: set[Future[int]] = set()
        done = 0
        try:
            for chunk in chunks:
                pending.add(pool.submit(scanner.measure, *chunk))
                if len(pending) >= 4 * num_workers:
                    finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                    done += sum(future.result() for future in finished)
                    if on_progress:
                        on_progress(done, count)
            for future in pending:
                done += future.result()
                if on_progress:
                    on_progress(done, count)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return scan


class Measures(NamedTuple):
    """What `measure_image` returns."""

    height: int
    width: int
    flags: int
    format: str
    mode: str
    brightness: float
    pixel_hash: bytes
    thumbnail: np.ndarray


def measure_image(images: ImageSet, index: int) -> Measures:
    """Decodes one image and measures it; the thumbnail is grey, uint8, (32, 32).

    Raises:
        ImageError: If it is not a whole image.
        MissingPathError: If it is no longer there.
    """
    source = images.read(index)
    name = images.names[index]
    if isinstance(source, np.ndarray):
        pixels = images.load(index, 3)
        format_name, mode = "array", "L" if source.shape[-1] == 1 else "RGB"
        flags = GREY if mode == "L" else 0
    else:
        if isinstance(source, Path) and not source.exists():
            raise MissingPathError(
                f"Cannot read the image {name}. Expected a file that exists. Received: path={str(source)!r}. "
                "Restore it."
            )
        with open_image(source, name=name) as image:
            format_name, mode, flags = image.format or "unknown", image.mode, _header_flags(image)
            pixels = decode_image(image, 3, name=name)
            flags |= ALPHA if _is_transparent(image) else 0
    height, width = pixels.shape[:2]
    digest = hashlib.blake2b(f"{height}x{width}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels).data)
    colour = to_pillow(pixels)
    if all(low == high for low, high in colour.getextrema()):  # type: ignore[misc]
        flags |= CONSTANT
    grey = colour.convert("L")
    thumbnail = np.asarray(shrink(grey))
    brightness = float(thumbnail.mean())
    return Measures(height, width, flags, format_name, mode, brightness, digest.digest(), thumbnail)


def shrink(image: "Image.Image") -> "Image.Image":
    """Returns an image of 32 x 32 pixels, each the mean of what it covers."""
    from PIL import Image

    size = (THUMBNAIL_SIZE, THUMBNAIL_SIZE)
    return image if image.size == size else image.resize(size, Image.Resampling.BOX, reducing_gap=3.0)


def _header_flags(image: "Image.Image") -> int:
    """Returns what format and mode say, before the image is decoded."""
    flags = 0
    mode = image.mode
    if mode in ("1", "L", "LA", "La") or mode[0] in "IF":
        flags |= GREY
    if mode == "CMYK":
        flags |= CMYK
    if mode[0] in "IF" or _bits(image) > 8:
        flags |= DEEP
    if mode in ("P", "PA") and image.format != "GIF":  # every GIF has one
        flags |= PALETTE
    if getattr(image, "is_animated", False) and image.format != "MPO":
        flags |= ANIMATED
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged EXIF says nothing about the pixels; decode_image passes over it too
        orientation = 1
    return flags | (ROTATED if orientation in range(2, 9) else 0)


def _bits(image: "Image.Image") -> int:
    """Returns the bits of a channel in the file, where Pillow reduces them to 8 while it decodes (PNG, TIFF, PPM)."""
    if image.format == "PNG" and image.mode.startswith("RGB"):
        return 16 if any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())) else 8
    if image.format == "TIFF":
        bits = getattr(image, "tag_v2", {}).get(258, (8,))
        return max(bits if isinstance(bits, tuple) else (bits,))
    return 8


def _is_transparent(image: "Image.Image") -> bool:
    """Whether a decoded image has a pixel that is not opaque."""
    if not image.has_transparency_data:
        return False
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        return image.getextrema()[-1][0] < 255  # type: ignore[index]
    return image.convert("RGBA").getextrema()[-1][0] < 255  # type: ignore[index]


class _Scanner:
    """Fills a `Scan` from several threads; each writes rows of its own."""

    def __init__(self, scan: Scan):
        self.scan = scan
        self.lock = threading.Lock()

    def measure(self, images: ImageSet, start: int, indices: range) -> int:
        """Measures some images; returns how many."""
        scan = self.scan
        thumbnails = np.zeros((len(indices), THUMBNAIL_SIZE, THUMBNAIL_SIZE), "uint8")
        for place, index in enumerate(indices):
            row = start + index
            try:
                measures = measure_image(images, index)
            except (ImageError, MissingPathError) as error:
                with self.lock:
                    scan.broken[row] = reason_of(error)
                continue
            scan.heights[row], scan.widths[row] = measures.height, measures.width
            scan.flags[row], scan.brightness[row] = measures.flags, measures.brightness
            scan.formats[row] = self.position(scan.format_names, measures.format)
            scan.modes[row] = self.position(scan.mode_names, measures.mode)
            scan.pixel_hashes[row] = np.void(measures.pixel_hash)
            thumbnails[place] = measures.thumbnail
        rows = slice(start + indices.start, start + indices.stop)
        scan.hashes[rows] = perceptual_hashes(thumbnails)
        scan.contrast[rows] = thumbnails.std(axis=(1, 2))
        return len(indices)

    def position(self, names: list[str], name: str) -> int:
        """Returns the position of a name in a list, added if it is new."""
        if name not in names:
            with self.lock:
                if name not in names:
                    names.append(name)
        return names.index(name)
