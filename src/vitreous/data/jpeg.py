"""Plain JPEG files, decoded by simplejpeg: bit for bit what Pillow makes of them, in half the time.

Both stand on libjpeg-turbo. What is not plain (rotated by EXIF, CMYK, several images in a file, damaged in any way) is
left to Pillow, so that its rules and its errors hold.
"""

import functools
import re
import struct
from typing import Any

import numpy as np

_MAX_PIXELS = 2**26  # beyond, Pillow judges whether it is a decompression bomb
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive; Huffman-coded all
_XMP_ORIENTATION = re.compile(rb'Orientation(?:="|>)([0-9])')  # as Pillow looks for it
_WITHOUT_LENGTH = (0x01, *range(0xD0, 0xD8))


def decode_plain_jpeg(data: bytes, min_size: int | None = None, scratch: bytearray | None = None) -> np.ndarray | None:
    """Decodes a JPEG to RGB.

    Args:
        data: A whole file.
        min_size: Pixels that the shorter side must keep: a larger image is decoded at 1/2, 1/4 or 1/8 of its size, by
            the rule of Pillow's `Image.draft`.
        scratch: Memory to decode into, made larger where need be: new memory for each image costs a tenth more.

    Returns:
        uint8, (H, W, 3), the caller's own, or a view of `scratch`; or None if Pillow should read it.
    """
    decoder = _decoder()
    size = _plain_size(data) if decoder is not None else None
    if size is None:
        return None
    scale = 1
    if min_size is not None:
        scale = next((each for each in (8, 4, 2) if min(size) // min_size >= each), 1)
    if scratch is not None and len(scratch) < (num_bytes := 3 * size[0] * size[1]):
        try:
            scratch.extend(bytes(num_bytes - len(scratch)))
        except BufferError:  # somebody still holds a view of it
            scratch = None
    least = {"min_height": -(-size[0] // scale), "min_width": -(-size[1] // scale)} if scale > 1 else {}
    try:
        return decoder.decode_jpeg(data, "RGB", buffer=scratch, **least)
    except ValueError:  # damaged, if only a little: Pillow says what is wrong, or makes the best of it
        return None


@functools.cache
def _decoder() -> Any:
    """Returns the package simplejpeg, or None on a machine that it is not built for: Pillow then reads all."""
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def _plain_size(data: bytes) -> tuple[int, int] | None:
    """Returns (height, width) of a JPEG that needs nothing but decoding, else None."""
    place, length, size = 2, len(data), None
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    while place + 4 <= length:
        if data[place] != 0xFF:
            return None
        marker = data[place + 1]
        if marker in _WITHOUT_LENGTH or marker == 0xFF:
            return None  # legal, but odd
        if marker == 0xDA:
            return size
        (num_bytes,) = struct.unpack_from(">H", data, place + 2)
        start, stop = place + 4, place + 2 + num_bytes
        if stop > length or num_bytes < 2:
            return None
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if marker not in _FRAMES or num_bytes < 8 or size is not None:
                return None
            precision, height, width, components = struct.unpack_from(">BHHB", data, start)
            if precision != 8 or components not in (1, 3) or not 0 < height * width < _MAX_PIXELS:
                return None
            size = (height, width)
        elif _asks_for_more(marker, data[start:stop]):
            return None
        place = stop
    return None


def _asks_for_more(marker: int, segment: bytes) -> bool:
    """Whether a segment may rotate the image (EXIF, XMP), or says that there are several."""
    if marker == 0xE1:
        return not _is_upright(segment)
    return marker == 0xE2 and segment.startswith(b"MPF\0")


def _is_upright(segment: bytes) -> bool:
    """Whether an APP1 segment (EXIF or XMP) certainly asks for no rotation."""
    if not segment.startswith(b"Exif\0\0"):
        return all(value == b"1" for value in _XMP_ORIENTATION.findall(segment))
    tiff = segment[6:]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return False
    try:
        (place,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, place)
        for entry in range(place + 2, place + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, entry)
            if tag == 0x0112 and (kind, value) != (3, 1):
                return False
    except struct.error:
        return False
    return True
