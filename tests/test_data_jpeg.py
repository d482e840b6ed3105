import io
import struct
import sys

import numpy as np
import pytest
from PIL import Image

from vitreous.data import images, jpeg
from vitreous.data.images import decode_image
from vitreous.data.jpeg import decode_plain_jpeg
from vitreous.errors import ImageError


def photograph(height=97, width=130, seed=0):
    """Smooth colours with some noise on them, as a camera sees them."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype="uint8"))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return np.clip(smooth + rng.integers(-12, 13, smooth.shape), 0, 255).astype("uint8")


def encode(image, **options):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "jpeg", **options)
    return stream.getvalue()


def by_pillow(data, mode="RGB", min_size=None):
    image = Image.open(io.BytesIO(data))
    if min_size is not None:
        image.draft(image.mode, (min_size, min_size))
    return np.asarray(image if image.mode == mode else image.convert(mode))


PLAIN = [
    {"quality": 75},
    {"quality": 97, "subsampling": 0},
    {"quality": 60, "subsampling": 1},
    {"quality": 85, "progressive": True},
    {"quality": 85, "optimize": True, "restart_marker_rows": 1},
    {"quality": 90, "keep_rgb": True},
]


@pytest.mark.parametrize("options", PLAIN, ids=str)
@pytest.mark.parametrize("size", [(97, 130), (1, 1), (8, 16), (33, 7)])
def test_bit_equal_to_pillow(options, size):
    data = encode(photograph(*size), **options)
    assert np.array_equal(decode_plain_jpeg(data), by_pillow(data))
    assert np.array_equal(decode_image(data, 1)[:, :, 0], np.asarray(Image.fromarray(by_pillow(data)).convert("L")))


def test_grey_jpeg():
    data = encode(photograph()[:, :, 0])
    assert np.array_equal(decode_image(data), by_pillow(data))
    assert np.array_equal(decode_image(data, 1)[:, :, 0], by_pillow(data, "L"))


@pytest.mark.parametrize("min_size", [10, 12, 13, 24, 25, 48, 49, 97, 200])
@pytest.mark.parametrize("options", PLAIN[:4], ids=str)
def test_scaled_decode_follows_draft(min_size, options):
    data = encode(photograph(), **options)
    assert np.array_equal(decode_plain_jpeg(data, min_size), by_pillow(data, min_size=min_size))


def with_segment(data, marker, payload):
    return data[:2] + struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload + data[2:]


def exif(orientation, order="<"):
    head = b"II*\0" if order == "<" else b"MM\0*"
    entry = struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0)
    return b"Exif\0\0" + head + struct.pack(order + "IH", 8, 1) + entry + bytes(4)


@pytest.mark.parametrize("order", ["<", ">"])
def test_exif(order):
    image = photograph()
    data = encode(image)
    upright, rotated = with_segment(data, 0xE1, exif(1, order)), with_segment(data, 0xE1, exif(6, order))
    assert np.array_equal(decode_plain_jpeg(upright), by_pillow(data))
    assert decode_plain_jpeg(rotated) is None
    assert np.array_equal(decode_image(rotated), np.rot90(by_pillow(data), -1))


@pytest.mark.parametrize(
    "payload",
    [
        b"Exif\0\0II*\0\xff\xff\0\0",
        b"Exif\0\0rubbish",
        b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>',
    ],
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_doubtful_metadata_is_left_to_pillow(payload):
    data = with_segment(encode(photograph()), 0xE1, payload)
    assert decode_plain_jpeg(data) is None
    stored = Image.open(io.BytesIO(data))
    turned = stored.getexif().get(0x0112, 1) == 6
    assert np.array_equal(decode_image(data), np.rot90(by_pillow(data), -1) if turned else by_pillow(data))


def test_xmp_that_asks_for_nothing():
    data = encode(photograph())
    for text in (b'tiff:Orientation="1"', b"<tiff:Orientation>1</tiff:Orientation>", b"no word of it"):
        assert decode_plain_jpeg(with_segment(data, 0xE1, b"http://ns.adobe.com/xap/1.0/\0" + text)) is not None


def test_what_is_not_plain_is_left_to_pillow():
    stream = io.BytesIO()
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(stream, "jpeg")
    data = encode(photograph())
    for odd in (stream.getvalue(), with_segment(data, 0xE2, b"MPF\0II*\0"), b"\xff\xd8" + b"\xff" + data[2:]):
        assert decode_plain_jpeg(odd) is None
    assert np.array_equal(decode_image(b"\xff\xd8" + b"\xff" + data[2:]), by_pillow(data))
    for place in range(0, 700, 7):
        assert decode_plain_jpeg(data[:place]) is None


def test_damaged_files_fare_as_with_pillow(monkeypatch):
    data = bytearray(encode(photograph(), quality=90))
    rng = np.random.default_rng(0)
    outcomes = {"pixels": 0, "error": 0}
    for case in range(120):
        damaged = bytearray(data)
        if case % 3 == 0:
            damaged = damaged[: int(rng.integers(3, len(damaged)))]
        else:
            for place in rng.integers(2, len(damaged), 1 + case % 4):
                damaged[place] = int(rng.integers(0, 256))
        results = []
        for plain in (jpeg.decode_plain_jpeg, lambda *_: None):
            monkeypatch.setattr(images, "decode_plain_jpeg", plain)
            try:
                results.append(decode_image(bytes(damaged)).tobytes())
            except ImageError as error:
                results.append(error.reason)
        assert results[0] == results[1], case
        outcomes["pixels" if isinstance(results[0], bytes) else "error"] += 1
    assert min(outcomes.values()) > 20


def test_without_simplejpeg(monkeypatch):
    data = encode(photograph())
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    jpeg._decoder.cache_clear()
    try:
        assert decode_plain_jpeg(data) is None
        assert np.array_equal(decode_image(data), by_pillow(data))
    finally:
        jpeg._decoder.cache_clear()


def test_paths_and_bytes_are_equal(tmp_path):
    data = encode(photograph())
    (tmp_path / "a.png").write_bytes(data)  # the bytes decide, not the suffix
    assert np.array_equal(decode_image(tmp_path / "a.png"), decode_image(data))
    assert decode_image(data).flags.writeable
