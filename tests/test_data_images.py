import contextlib
import io
import warnings

import numpy as np
import pytest
from PIL import Image, ImageCms

from vitreous.data.images import IMAGE_SUFFIXES, check_image_header, decode_image, resize_image
from vitreous.errors import ConfigError, ImageError, MissingPathError
from vitreous.spec import InputSpec


def rgb(height=4, width=6, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype="uint8")


def encode(image, suffix, **options):
    stream = io.BytesIO()
    image.save(stream, suffix, **options)
    return stream.getvalue()


def constant(mode, value, size=(6, 4)):
    return Image.new(mode, size, value)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (constant("1", 1), (255, 255, 255)),
        (constant("L", 77), (77, 77, 77)),
        (constant("LA", (100, 255)), (100, 100, 100)),
        (constant("LA", (100, 0)), (255, 255, 255)),
        (constant("La", (0, 0)), (255, 255, 255)),
        (constant("PA", (0, 0)), (255, 255, 255)),
        (constant("RGB", (1, 2, 3)), (1, 2, 3)),
        (constant("RGBX", (1, 2, 3, 0)), (1, 2, 3)),
        (constant("RGBA", (0, 0, 0, 0)), (255, 255, 255)),
        (constant("RGBA", (255, 0, 0, 255)), (255, 0, 0)),
        (constant("RGBA", (0, 0, 0, 51)), (204, 204, 204)),
        (constant("RGBa", (0, 0, 0, 51)), (204, 204, 204)),
        (constant("CMYK", (0, 255, 255, 0)), (255, 0, 0)),
        (constant("YCbCr", (128, 128, 128)), (128, 128, 128)),
        (constant("HSV", (0, 0, 200)), (200, 200, 200)),
        (constant("I;16", 65535), (255, 255, 255)),
        (constant("I;16", 257 * 9 + 100), (9, 9, 9)),
        (constant("I;16", 0), (0, 0, 0)),
        (constant("I;16B", 257 * 9), (9, 9, 9)),
        (constant("I", 200), (200, 200, 200)),
        (constant("I", 65535), (255, 255, 255)),
        (constant("I", 1), (1, 1, 1)),
        (constant("I", -5), (0, 0, 0)),
        (constant("I", 1_000_000), (255, 255, 255)),
        (constant("F", 0.5), (128, 128, 128)),
        (constant("F", 200.4), (200, 200, 200)),
        (constant("F", 65535.0), (255, 255, 255)),
        (constant("F", -1.0), (0, 0, 0)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else str(value[0]),
)
def test_modes(image, expected):
    decoded = decode_image(image)
    assert decoded.dtype == np.uint8 and decoded.shape == (4, 6, 3) and decoded.flags.writeable
    assert np.abs(decoded.astype(int) - expected).max() <= 1
    grey = decode_image(image, num_channels=1)
    luma = np.dot(expected, (0.299, 0.587, 0.114))
    assert grey.shape == (4, 6, 1)
    assert np.abs(grey.astype(float) - luma).max() <= 1.5


def test_lab():
    lab = ImageCms.profileToProfile(
        constant("RGB", (200, 30, 60)),
        ImageCms.createProfile("sRGB"),
        ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )
    stored = Image.open(io.BytesIO(encode(lab, "tiff")))
    assert stored.mode == "LAB"
    assert np.abs(decode_image(stored)[0, 0].astype(int) - (200, 30, 60)).max() <= 6


def test_palette_with_transparency():
    palette = Image.new("P", (6, 4), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((0, 0), 1)
    decoded = decode_image(encode(palette, "png", transparency=0))
    assert decoded[0, 0].tolist() == [40, 50, 60]
    assert decoded[1, 1].tolist() == [255, 255, 255]
    assert decode_image(encode(palette, "png"))[1, 1].tolist() == [10, 20, 30]


def test_transparent_colour_of_a_png():
    picture = constant("RGB", (9, 9, 9))
    assert decode_image(encode(picture, "png", transparency=(9, 9, 9)))[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm", "gif", "webp", "jpeg2000", "jpeg"])
def test_formats(suffix):
    options = {"webp": {"lossless": True}, "jpeg": {"quality": 95, "subsampling": 0}}.get(suffix, {})
    image = np.kron(rgb(2, 3), np.ones((8, 8, 1), "uint8"))
    tolerance = {"jpeg": 12}.get(suffix, 0)
    decoded = decode_image(encode(Image.fromarray(image), suffix, **options))
    assert np.abs(decoded.astype(int) - image).max() <= tolerance


@pytest.mark.parametrize("suffix", ["png", "tiff", "ppm"])
def test_16_bit_files(suffix):
    values = np.array([[0, 257 * 100], [257 * 200, 65535]], "uint16")
    decoded = decode_image(encode(Image.fromarray(values), suffix), 1)
    assert decoded[:, :, 0].tolist() == [[0, 100], [200, 255]]


def test_cmyk_jpeg():
    decoded = decode_image(encode(constant("CMYK", (0, 255, 255, 0), (16, 16)), "jpeg"))
    assert np.abs(decoded[8, 8].astype(int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("suffix", ["jpeg", "png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(suffix, orientation):
    upright = np.zeros((16, 32, 3), "uint8")
    upright[:8, :8] = 255  # a white corner, top left
    undo = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x),
        7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
        8: lambda x: np.rot90(x, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](upright)))
    decoded = decode_image(encode(stored, suffix, exif=exif))
    assert decoded.shape == (16, 32, 3)
    assert np.abs(decoded.astype(int) - upright).max() <= 40


def test_damaged_exif_does_not_matter():
    data = encode(Image.fromarray(rgb()), "jpeg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 30)
    assert decode_image(data).shape == (4, 6, 3)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_first_frame(suffix):
    frames = [constant("RGB", (250, 0, 0), (8, 8)), constant("RGB", (0, 0, 250), (8, 8))]
    decoded = decode_image(encode(frames[0], suffix, save_all=True, append_images=frames[1:]))
    assert np.abs(decoded[4, 4].astype(int) - (250, 0, 0)).max() <= 6


def test_sources(tmp_path):
    path = tmp_path / "a.png"
    image = rgb()
    Image.fromarray(image).save(path)
    with open(path, "rb") as stream:
        for source in (path, str(path), path.read_bytes(), stream, io.BytesIO(path.read_bytes()), Image.open(path)):
            assert np.array_equal(decode_image(source), image)


def test_small_decode_of_a_large_jpeg():
    data = encode(constant("RGB", (90, 120, 150), (640, 320)), "jpeg")
    assert decode_image(data).shape == (320, 640, 3)
    assert decode_image(data, min_size=80).shape == (80, 160, 3)
    assert decode_image(data, min_size=81).shape == (160, 320, 3)
    assert decode_image(data, min_size=1000).shape == (320, 640, 3)
    assert np.abs(decode_image(data, min_size=40).astype(int) - (90, 120, 150)).max() <= 2
    assert decode_image(encode(constant("RGB", 0, (640, 320)), "png"), min_size=40).shape == (320, 640, 3)


def jpeg(side=64):
    return encode(Image.fromarray(rgb(side, side)), "jpeg")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "Received: an empty file."),
        (b"hello, this is text", "Received: not an image in a known format."),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "Received: not an image in a known format."),
        (jpeg()[:600], "Received: a truncated image (Truncated File Read)."),
        (jpeg()[:-900], "Received: a truncated image (image file is truncated"),
        (encode(Image.fromarray(rgb(64, 64)), "png")[:-900], "Received: a truncated image ("),
        (encode(constant("F", float("nan")), "tiff"), "Received: pixel values that are not finite."),
        (encode(constant("F", float("inf")), "tiff"), "Received: pixel values that are not finite."),
    ],
)
def test_unreadable(tmp_path, data, reason):
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    with pytest.raises(ImageError) as caught:
        decode_image(path)
    message = str(caught.value)
    assert message.startswith(f"Cannot read the image {path}. Expected a whole image in a format that Pillow reads. ")
    assert reason in message
    assert message.endswith("Replace the file, or remove it.")
    assert caught.value.reason in message
    with pytest.raises(ImageError, match=r"^Cannot read the image <image>\."):
        decode_image(data)
    with pytest.raises(ImageError, match=r"^Cannot read the image upload 3\."):
        decode_image(io.BytesIO(data), name="upload 3")


def test_any_damage_is_an_image_error():
    generator = np.random.default_rng(0)
    image = Image.fromarray(rgb(24, 24))
    for suffix in ("png", "jpeg", "gif", "tiff", "bmp", "webp", "jpeg2000", "ppm", "qoi", "avif"):
        data = encode(image, suffix)
        for _ in range(25):
            damaged = bytearray(data[: generator.integers(1, len(data) + 1)])
            for place in generator.integers(0, len(damaged), 4):
                damaged[place] = generator.integers(0, 256)
            with contextlib.suppress(ImageError):
                assert decode_image(bytes(damaged)).shape[2] == 3


def test_missing_path_and_folder(tmp_path):
    with pytest.raises(MissingPathError, match=r"Expected a file that exists\. Received: path='.*no\.jpg'\. Check"):
        decode_image(tmp_path / "no.jpg")
    with pytest.raises(ImageError, match=r"Received: a folder, not a file\."):
        decode_image(tmp_path)


def test_decompression_bomb(tmp_path, monkeypatch):
    path = tmp_path / "a.bmp"
    Image.fromarray(rgb(40, 40)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match=r"Received: more pixels than Pillow's limit, possibly a decompression bomb\."):
        decode_image(path)
    assert check_image_header(path) == "more pixels than Pillow's limit, possibly a decompression bomb"


def test_pillow_warnings_do_not_print(monkeypatch):
    data = encode(Image.fromarray(rgb(40, 40)), "png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # between the limit and twice the limit Pillow warns
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert decode_image(data).shape == (40, 40, 3)
    assert not caught


def test_num_channels():
    with pytest.raises(
        ConfigError, match=r"Expected num_channels 1 \(grey\) or 3 \(RGB\)\. Received: num_channels=4\."
    ):
        decode_image(b"", num_channels=4)


def test_check_image_header(tmp_path):
    for suffix in ("jpg", "png", "gif", "tif", "webp", "bmp"):
        Image.fromarray(rgb()).save(tmp_path / f"a.{suffix}")
        assert check_image_header(tmp_path / f"a.{suffix}") is None
        (tmp_path / f"b.{suffix}").write_bytes((tmp_path / f"a.{suffix}").read_bytes()[:9])
        reason = "a truncated image (Truncated File Read)" if suffix == "jpg" else "not an image in a known format"
        assert check_image_header(tmp_path / f"b.{suffix}") == reason
    exif = Image.Exif()
    exif[0x9286] = "x" * 8000  # the frame lies beyond the first 4096 bytes
    Image.fromarray(rgb()).save(tmp_path / "c.jpg", exif=exif)
    assert check_image_header(tmp_path / "c.jpg") is None
    (tmp_path / "d.jpg").write_bytes(b"")
    assert check_image_header(tmp_path / "d.jpg") == "an empty file"
    assert check_image_header(tmp_path / "e.jpg") == "a file that is not there"
    assert check_image_header(tmp_path) == "a folder, not a file"


def test_suffixes():
    assert {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"} <= IMAGE_SUFFIXES
    assert all(suffix in Image.registered_extensions() for suffix in IMAGE_SUFFIXES)


def test_resize_nothing_to_do_is_no_copy():
    image = rgb(8, 8)
    for mode in ("crop", "squash", "pad"):
        assert resize_image(image, InputSpec(image_size=8, resize_mode=mode)) is image


@pytest.mark.parametrize("shape", [(30, 47), (47, 30), (8, 9), (33, 33), (7, 7)])
@pytest.mark.parametrize("crop_fraction", [1.0, 0.875, 0.9])
def test_resize_crop_equals_resize_and_centre_crop(shape, crop_fraction):
    image = rgb(*shape)
    spec = InputSpec(image_size=16, crop_fraction=crop_fraction)
    side = int(16 / crop_fraction)
    height, width = (side if pixels == min(shape) else int(pixels * side / min(shape)) for pixels in shape)
    top, left = round((height - 16) / 2), round((width - 16) / 2)
    resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    assert np.array_equal(resize_image(image, spec), resized[top : top + 16, left : left + 16])


def test_resize_to_a_rectangle():
    for shape in ((40, 40), (10, 90), (90, 10), (3, 5)):
        for mode in ("crop", "squash", "pad"):
            spec = InputSpec(image_size=(12, 30), resize_mode=mode)
            assert resize_image(rgb(*shape), spec).shape == (12, 30, 3)


def test_resize_squash_and_filters():
    image = rgb(20, 31)
    for name in ("nearest", "bilinear", "bicubic", "lanczos"):
        spec = InputSpec(image_size=(8, 9), resize_mode="squash", interpolation=name)
        expected = np.asarray(Image.fromarray(image).resize((9, 8), Image.Resampling[name.upper()]))
        assert np.array_equal(resize_image(image, spec), expected)


def test_resize_squash_crops_too():
    """As timm: each side to 1 / crop_fraction of the model's, then the centre."""
    image = rgb(20, 31)
    spec = InputSpec(image_size=(16, 24), resize_mode="squash", crop_fraction=0.75)
    resized = np.asarray(Image.fromarray(image).resize((32, 21), Image.Resampling.BICUBIC))
    assert np.array_equal(resize_image(image, spec), resized[2:18, 4:28])
    image = rgb(16, 24)  # of the model's size already
    resized = np.asarray(Image.fromarray(image).resize((32, 21), Image.Resampling.BICUBIC))
    assert np.array_equal(resize_image(image, spec), resized[2:18, 4:28])


def test_resize_pad_crops_too():
    image = rgb(10, 40)
    spec = InputSpec(image_size=16, resize_mode="pad", crop_fraction=0.8, mean=(0.5, 0.25, 1.0))
    resized = np.asarray(Image.fromarray(image).resize((20, 5), Image.Resampling.BICUBIC))
    padded = resize_image(image, spec)
    assert np.array_equal(padded[5:10], resized[:, 2:18])
    assert (padded[:5] == (128, 64, 255)).all() and (padded[10:] == (128, 64, 255)).all()


def test_resize_pad_fills_with_the_mean():
    image = np.full((4, 8, 3), 200, "uint8")
    spec = InputSpec(image_size=16, resize_mode="pad", mean=(0.5, 0.25, 1.0))
    padded = resize_image(image, spec)
    assert (padded[:4] == (128, 64, 255)).all() and (padded[12:] == (128, 64, 255)).all()
    assert (padded[4:12] == 200).all()
    grey = InputSpec(image_size=16, resize_mode="pad", num_channels=1, mean=(0.5,), std=(0.5,))
    assert resize_image(image[:, :, :1], grey).shape == (16, 16, 1)


def test_resize_of_an_extremely_long_image_stays_small():
    line = np.full((1, 200_000, 3), 7, "uint8")
    for mode in ("crop", "squash", "pad"):
        resized = resize_image(line, InputSpec(image_size=64, resize_mode=mode))
        assert resized.shape == (64, 64, 3)
    assert (resize_image(line.swapaxes(0, 1), InputSpec(image_size=64)) == 7).all()


def test_resize_wants_uint8_with_the_right_channels():
    for image in (rgb().astype("float32"), rgb()[:, :, :1], rgb()[:, :, 0], rgb()[:0]):
        with pytest.raises(
            ConfigError, match=r"Expected uint8 of shape \(H, W, 3\)\. Received: dtype=.*, shape=.*\. Read"
        ):
            resize_image(image, InputSpec(image_size=8))
