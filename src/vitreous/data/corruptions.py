"""The 15 common corruptions, each at five severities, of images at the size that a model takes.

What they are and how strong follows Hendrycks and Dietterich 2019, "Benchmarking neural network robustness to common
corruptions and perturbations", https://arxiv.org/abs/1903.12261, and the authors' constants: those of ImageNet-C at 224
pixels, those of CIFAR-10-C at 32 and below. In between a constant goes linearly with the logarithm of the shorter side.
Above 224, lengths in pixels grow with the side, and all else is as at 224. So a severity means something else at
another image size: accuracies under corruption compare models of one image size.

Deliberate differences: frost is drawn (crystals on the pane, `_frost_texture`), where the original crops six
photographs; glass swaps the same pixels in another order, so that many swaps can be done at once; the elastic warp and
its affine part are one interpolation; zooms are Pillow's; results are rounded, not cut off. One image gets the same
random numbers at each severity, so that severities differ in strength alone. The original's tables are kept where they
do not rise evenly: elastic severities 1 and 2 bend widely, 3 to 5 finely.
"""

import functools
import io
import math
from collections.abc import Callable

import numpy as np

from vitreous.data.images import to_array, to_pillow
from vitreous.data.transforms import example_generator
from vitreous.errors import ConfigError, UnknownNameError

_Table = tuple[tuple[float, ...], ...]

# Constants of severities 1 to 5: at 32 pixels, at 224 pixels. Lengths in pixels, unless said otherwise.
_TABLES: dict[str, tuple[_Table, _Table]] = {
    "gaussian_noise": (  # standard deviation
        ((0.04,), (0.06,), (0.08,), (0.09,), (0.10,)),
        ((0.08,), (0.12,), (0.18,), (0.26,), (0.38,)),
    ),
    "shot_noise": (  # photons of a white pixel
        ((500,), (250,), (100,), (75,), (50,)),
        ((60,), (25,), (12,), (5,), (3,)),
    ),
    "impulse_noise": (  # share of values
        ((0.01,), (0.02,), (0.03,), (0.05,), (0.07,)),
        ((0.03,), (0.06,), (0.09,), (0.17,), (0.27,)),
    ),
    "defocus_blur": (  # radius of the disk, softness of its edge
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    "glass_blur": (  # blur, reach of a swap, rounds of swaps
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    ),
    "motion_blur": (  # reach, standard deviation
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    ),
    "zoom_blur": (  # end of the zoom beyond 1 (exclusive), step
        ((0.06, 0.01), (0.11, 0.01), (0.16, 0.01), (0.21, 0.01), (0.26, 0.01)),
        ((0.11, 0.01), (0.16, 0.01), (0.21, 0.02), (0.26, 0.02), (0.31, 0.03)),
    ),
    "snow": (  # mean, standard deviation, zoom, threshold, reach and deviation of the fall, share of the image
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "frost": (  # share of the image, share of the frost, scale of the texture
        ((1, 0.2, 0.2), (1, 0.3, 0.2), (0.9, 0.4, 0.2), (0.85, 0.4, 0.2), (0.75, 0.45, 0.2)),
        ((1, 0.4, 1), (0.8, 0.6, 1), (0.7, 0.7, 1), (0.65, 0.7, 1), (0.6, 0.75, 1)),
    ),
    "fog": (  # thickness, smoothness
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    "brightness": (  # added to the value of HSV
        ((0.05,), (0.1,), (0.15,), (0.2,), (0.3,)),
        ((0.1,), (0.2,), (0.3,), (0.4,), (0.5,)),
    ),
    "contrast": (  # factor around the mean
        ((0.75,), (0.5,), (0.4,), (0.3,), (0.15,)),
        ((0.4,), (0.3,), (0.2,), (0.1,), (0.05,)),
    ),
    "elastic_transform": (  # height and width of the waves, shift of the affine part: shares of the side
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        (  # the authors' shares are of 244 pixels where the side has 224
            (2 * 244 / 224, 0.7 * 244 / 224, 0.1 * 244 / 224),
            (2 * 244 / 224, 0.08 * 244 / 224, 0.2 * 244 / 224),
            (0.05 * 244 / 224, 0.01 * 244 / 224, 0.02 * 244 / 224),
            (0.07 * 244 / 224, 0.01 * 244 / 224, 0.02 * 244 / 224),
            (0.12 * 244 / 224, 0.01 * 244 / 224, 0.02 * 244 / 224),
        ),
    ),
    "pixelate": (  # pixels that are left, as a share of the side
        ((0.95,), (0.9,), (0.85,), (0.75,), (0.65,)),
        ((0.6,), (0.5,), (0.4,), (0.3,), (0.25,)),
    ),
    "jpeg_compression": (  # quality
        ((80,), (65,), (58,), (50,), (40,)),
        ((25,), (18,), (15,), (10,), (7,)),
    ),
}
_LENGTHS = {"defocus_blur": (0,), "glass_blur": (0, 1), "motion_blur": (0, 1), "snow": (2, 4, 5), "frost": (2,)}
_SMALL, _LARGE = 32, 224  # pixels

CORRUPTIONS = tuple(_TABLES)
"""Names of the 15 corruptions, in the order of the paper."""

CORRUPTION_GROUPS = {
    "noise": CORRUPTIONS[:3],
    "blur": CORRUPTIONS[3:7],
    "weather": CORRUPTIONS[7:11],
    "digital": CORRUPTIONS[11:],
}
"""Names by kind. (The paper counts brightness as weather.)"""

SEVERITIES = (1, 2, 3, 4, 5)

_STREAM = 2**61  # of `example_generator`, beside those of augmentation


def corrupt_image(image: np.ndarray, name: str, severity: int, *, seed: int = 0, index: int = 0) -> np.ndarray:
    """Applies one corruption to one image.

    Args:
        image: uint8, (H, W, C), at the size that the model takes. It is not written to.
        name: One of `CORRUPTIONS`.
        severity: 1 (weak) to 5 (strong).
        seed: Decides the random numbers, with the name and the index.
        index: Position of the image in its data set.

    Returns:
        uint8, (H, W, C).

    Raises:
        UnknownNameError: If there is no such corruption.
        ConfigError: If the severity is out of range.

    Source: see the module.
    """
    check_corruptions([name], [severity])
    generator = example_generator(seed, 0, index, _STREAM + CORRUPTIONS.index(name))
    constants = severity_constants(name, severity, min(image.shape[:2]))
    pixels = np.asarray(image, "float32") / 255  # (H, W, C)
    changed = _FUNCTIONS[name](pixels, constants, generator)
    return np.rint(np.clip(changed, 0, 1) * 255).astype("uint8")


def check_corruptions(names: "list[str] | tuple[str, ...]", severities: "list[int] | tuple[int, ...]") -> None:
    """Raises an error if one of the names or severities does not exist, or there are none."""
    if not names or not severities:
        raise ConfigError(
            "Cannot corrupt images. Expected at least one corruption and one severity. "
            f"Received: corruptions={list(names)}, severities={list(severities)}. Leave the option out for all."
        )
    for name in names:
        if name not in _TABLES:
            raise UnknownNameError("corruption", name, CORRUPTIONS, f"These are all: {', '.join(CORRUPTIONS)}.")
    for severity in severities:
        if severity not in SEVERITIES:
            raise ConfigError(
                f"Cannot corrupt images. Expected severities from 1 to 5. Received: severity={severity!r}. "
                "Pass some of 1, 2, 3, 4, 5."
            )


def severity_constants(name: str, severity: int, size: int) -> tuple[float, ...]:
    """Returns the constants of a corruption for images whose shorter side has `size` pixels."""
    small, large = (table[severity - 1] for table in _TABLES[name])
    clipped = min(max(size, _SMALL), _LARGE)
    share = math.log(clipped / _SMALL) / math.log(_LARGE / _SMALL)
    values = [a + share * (b - a) for a, b in zip(small, large, strict=True)]
    for place in _LENGTHS.get(name, ()):
        values[place] *= max(size / _LARGE, 1)
    return tuple(values)


# ----- noise


def _gaussian_noise(x: np.ndarray, c: tuple[float, ...], generator: np.random.Generator) -> np.ndarray:
    return x + c[0] * generator.standard_normal(x.shape, "float32")


def _shot_noise(x: np.ndarray, c: tuple[float, ...], generator: np.random.Generator) -> np.ndarray:
    return generator.poisson(x * c[0]) / c[0]


def _impulse_noise(x: np.ndarray, c: tuple[float, ...], generator: np.random.Generator) -> np.ndarray:
    draws = generator.random(x.shape, "float32")
    is_salt = generator.random(x.shape, "float32") < 0.5
    return np.where(draws < c[0], is_salt, x)


# ----- blur


def _defocus_blur(x: np.ndarray, c: tuple[float, ...], generator: np.random.Generator) -> np.ndarray:
    from scipy.ndimage import convolve1d
    from scipy.signal import fftconvolve

    radius, softness = c
    reach = 1 if radius <= 8 else 2  # of the filter that softens the disk
    side = math.floor(radius) + reach
    places = np.arange(-side, side + 1)
    disk = (places[:, None] ** 2 + places**2 <= radius**2).astype("float64")
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / softness) ** 2)
    for axis in (0, 1):
        disk = convolve1d(disk, weights / weights.sum(), axis, mode="constant")
    disk /= disk.sum()
    padded = np.pad(x, ((side, side), (side, side), (0, 0)), "reflect" if side < min(x.shape[:2]) else "symmetric")
    return fftconvolve(padded, disk[:, :, None].astype("float32"), "valid", axes=(0, 1))


def _glass_blur(x: np.ndarray, c: tuple[float, ...], generator: np.random.Generator) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    sigma, reach, rounds = c[0], max(1, round(c[1])), round(c[2])
    height, width = x.shape[:2]
    x = gaussian_filter(x, (sigma, sigma, 0), mode="nearest")
    pixels = x.reshape(height * width, -1).copy()  # swaps of rows of this array
    # A pixel swaps with one at most `reach` away. Pixels 2 * reach apart cannot get in each other's way: all of them
    # swap at once, and so on for each of the (2 * reach)^2 shifts of that lattice.
    step = 2 * reach
    for _ in range(rounds):
        for shift in generator.permutation(step * step).tolist():
            rows = np.arange(reach + shift // step, height - reach + 1, step)
            columns = np.arange(reach + shift % step, width - reach + 1, step)
            rows, columns = rows[rows < height], columns[columns < width]
            moves = generator.integers(-reach, reach, (2, len(rows), len(columns)))
            here = (rows[:, None] * width + columns).ravel()
            there = ((rows[:, None] + moves[0]) * width + columns + moves[1]).ravel()
            pixels[here], pixels[there] = pixels[there], pixels[here]
    return gaussian_filter(pixels.reshape(x.shape), (sigma, sigma, 0), mode="nearest")


def _motion_blur(x: np.ndarray, c: tuple[float, ...], generator: np.random.Generator) -> np.ndarray:
    return _smear(x, c[0], c[1], generator.uniform(-45, 45))


def _smear(x: np.ndarray, reach: float, sigma: float, degrees: float) -> np.ndarray:
    """Blurs (H, W, C) along a line in one direction, by half of a Gaussian that ends after 2 * reach pixels."""
    steps = np.arange(2 * math.ceil(reach) + 1)
    weights = np.exp(-0.5 * (steps / sigma) ** 2)
    steps, weights = steps[weights > 1e-3], weights[weights > 1e-3]
    weights /= weights.sum()
    angle = math.radians(degrees)
    moves = np.rint(np.outer((math.sin(angle), math.cos(angle)), steps)).astype(int)  # (2, steps)
    most = int(np.abs(moves).max(initial=0))
    padded = np.pad(x, ((most, most), (most, most), (0, 0)), "edge")
    out = np.zeros_like(x)
    for (down, right), weight in zip(moves.T.tolist(), weights.tolist(), strict=True):
        top, left = most + down, most + right
        out += weight * padded[top : top + x.shape[0], left : left + x.shape[1]]
    return out


def _zoom_blur(x: np.ndarray, c: tuple[float, ...], generator: np.random.Generator) -> np.ndarray:
    zooms = 1 + np.arange(0, c[0] - 1e-9, c[1])
    return (x + sum(_zoom(x, zoom) for zoom in zooms.tolist())) / (len(zooms) + 1)


def _zoom(x: np.ndarray, zoom: float) -> np.ndarray:
    """Enlarges the middle of (H, W, C) to the whole."""
    from PIL import Image

    if zoom == 1:
        return x
    height, width = x.shape[:2]
    rows, columns = height / zoom, width / zoom
    left, top = (width - columns) / 2, (height - rows) / 2
    box = (left, top, left + columns, top + rows)
    planes = [Image.fromarray(np.ascontiguousarray(x[..., k])) for k in range(x.shape[2])]
    resized = [plane.resize((width, height), Image.Resampling.BILINEAR, box) for plane in planes]
    return np.stack([np.asarray(plane) for plane in resized], axis=-1)


# ----- weather


def _snow(x: np.ndarray, c: tuple[float, ...], generator: np.random.Generator) -> np.ndarray:
    mean, deviation, zoom, threshold, reach, sigma, share = c
    flakes = mean + deviation * generator.standard_normal((*x.shape[:2], 1), "float32")
    flakes = _zoom(flakes, max(zoom, 1.0))
    flakes = np.clip(np.where(flakes < threshold, 0, flakes), 0, 1)
    flakes = _smear(flakes, reach, sigma, generator.uniform(-135, -45))
    whitened = share * x + (1 - share) * np.maximum(x, 1.5 * _to_grey(x) + 0.5)
    return whitened + flakes + flakes[::-1, ::-1]


def _to_grey(x: np.ndarray) -> np.ndarray:
    """Returns the luminance (H, W, 1)."""
    return x if x.shape[2] == 1 else x @ np.array([[0.299], [0.587], [0.114]], "float32")


def _frost(x: np.ndarray, c: tuple[float, ...], generator: np.random.Generator) -> np.ndarray:
    share, frost_share, scale = c
    height, width = x.shape[:2]
    side = max(round(scale * _TEXTURE_SIDE), height + 1, width + 1)
    texture = _scaled_texture(int(generator.integers(_NUM_TEXTURES)), side)
    top, left = (int(u * (side - n)) for u, n in zip(generator.random(2), (height, width), strict=True))
    crop = texture[top : top + height, left : left + width]
    return share * x + frost_share * (crop if x.shape[2] == 3 else _to_grey(crop))


_TEXTURE_SIDE, _NUM_TEXTURES = 640, 5


@functools.lru_cache(maxsize=2 * _NUM_TEXTURES)
def _scaled_texture(number: int, side: int) -> np.ndarray:
    from PIL import Image

    texture = Image.fromarray(_frost_texture(number))
    return np.asarray(texture.resize((side, side), Image.Resampling.LANCZOS), "float32") / 255


@functools.lru_cache(maxsize=_NUM_TEXTURES)
def _frost_texture(number: int) -> np.ndarray:
    """Draws a frosted pane: ferns of ice on a dark, bluish ground, thicker in some places than in others.

    A fern is a curved stem with side branches at about 60 degrees, as ice grows, which have side branches themselves.

    Returns:
        uint8, (640, 640, 3).
    """
    from PIL import Image, ImageDraw
    from scipy.ndimage import gaussian_filter

    generator = np.random.default_rng(1000 + number)
    side, drawn = _TEXTURE_SIDE, 2 * _TEXTURE_SIDE
    cloud = _plasma(1024, 1.6, generator)[:side, :side]
    canvas = Image.new("L", (drawn, drawn))
    draw = ImageDraw.Draw(canvas)

    def grow(x: float, y: float, angle: float, length: float, light: float, depth: int) -> None:
        spacing = (9.0, 7.0, 6.0)[depth]
        bend = generator.normal(0, 0.012)
        num_joints = max(1, int(length / spacing))
        for joint in range(num_joints):
            angle += bend
            end_x, end_y = x + spacing * math.cos(angle), y + spacing * math.sin(angle)
            taper = 1 - joint / num_joints
            draw.line((x, y, end_x, end_y), fill=int(light * (0.45 + 0.55 * taper)), width=3 if depth == 0 else 2)
            x, y = end_x, end_y
            if depth < 2:
                for sign in (-1, 1):
                    if generator.random() < 0.8:
                        turn = sign * math.radians(generator.normal(58, 5))
                        branch = length * (0.34, 0.3)[depth] * taper * generator.uniform(0.5, 1)
                        if branch > 6:
                            grow(x, y, angle + turn, branch, 0.8 * light, depth + 1)

    for _ in range(120):
        start = generator.random((2, 2)) * (side - 1)  # most grow where the cloud is thick
        x, y = start[int(np.argmax([cloud[int(row), int(column)] for column, row in start]))]
        light, length = generator.uniform(120, 255), drawn * generator.uniform(0.08, 0.3)
        grow(2 * x, 2 * y, generator.uniform(0, 2 * math.pi), length, light, 0)
    ferns = np.asarray(canvas.resize((side, side), Image.Resampling.BOX), "float32") / 255
    glow = gaussian_filter(ferns, 2) + gaussian_filter(ferns, 10)
    grain = gaussian_filter(generator.standard_normal((side, side)), 0.8)
    ice = np.clip(0.1 + 0.22 * cloud + 0.75 * ferns + 0.45 * glow * (0.5 + cloud) + 0.05 * grain, 0, 1)[..., None]
    shadow, light_colour = np.array((0.02, 0.08, 0.16)), np.array((0.93, 0.98, 1.0))
    return np.rint(255 * np.clip(shadow + (light_colour - shadow) * ice, 0, 1)).astype("uint8")


def _fog(x: np.ndarray, c: tuple[float, ...], generator: np.random.Generator) -> np.ndarray:
    thickness, smoothness = c
    height, width = x.shape[:2]
    most = float(x.max())
    fog = _plasma(2 ** math.ceil(math.log2(max(height, width))), smoothness, generator)[:height, :width, None]
    return (x + thickness * fog) * most / (most + thickness)


def _plasma(side: int, smoothness: float, generator: np.random.Generator) -> np.ndarray:
    """Returns a random height map (side, side) in [0, 1] that repeats itself, by the diamond-square algorithm.

    `side` is a power of two; heights are drawn from coarse to fine, each finer step smaller by smoothness squared.
    """
    grid, amplitude = np.zeros((1, 1)), 1.0
    while (count := len(grid)) < side:
        noise = generator.uniform(-amplitude, amplitude, (3, count, count))
        right, below = np.roll(grid, -1, 1), np.roll(grid, -1, 0)
        middle = (grid + right + below + np.roll(right, -1, 0)) / 4 + noise[0]
        finer = np.empty((2 * count, 2 * count))
        finer[::2, ::2], finer[1::2, 1::2] = grid, middle
        finer[::2, 1::2] = (grid + right + middle + np.roll(middle, 1, 0)) / 4 + noise[1]
        finer[1::2, ::2] = (grid + below + middle + np.roll(middle, 1, 1)) / 4 + noise[2]
        grid, amplitude = finer, amplitude / smoothness**2
    low, high = grid.min(), grid.max()
    return ((grid - low) / max(high - low, 1e-12)).astype("float32")


def _brightness(x: np.ndarray, c: tuple[float, ...], generator: np.random.Generator) -> np.ndarray:
    value = x.max(axis=2, keepdims=True)  # of HSV: with hue and saturation kept, all channels grow with it
    brighter = np.clip(value + c[0], 0, 1)
    return np.where(value > 0, x * brighter / np.maximum(value, 1e-6), brighter)


# ----- digital


def _contrast(x: np.ndarray, c: tuple[float, ...], generator: np.random.Generator) -> np.ndarray:
    mean = x.mean(axis=(0, 1), keepdims=True)
    return mean + c[0] * (x - mean)


def _elastic_transform(x: np.ndarray, c: tuple[float, ...], generator: np.random.Generator) -> np.ndarray:
    from scipy.ndimage import map_coordinates

    height, width, channels = x.shape
    side = min(height, width)
    waves, smoothness, shift = (side * share for share in c)
    centre, arm = np.array((height // 2, width // 2), "float64"), side // 3
    before = centre + np.array(((arm, arm), (arm, -arm), (-arm, -arm)), "float64")
    after = before + generator.uniform(-shift, shift, (3, 2))
    ones = np.ones((3, 1))
    back = np.linalg.lstsq(np.hstack([after, ones]), np.hstack([before, ones]), rcond=None)[0][:, :2]  # (3, 2)
    noise = generator.uniform(-1, 1, (2, height, width))
    places = np.indices((height, width)) + waves * np.stack([_smooth(plane, smoothness) for plane in noise])
    rows, columns = (back[0, k] * places[0] + back[1, k] * places[1] + back[2, k] for k in (0, 1))
    planes = [map_coordinates(x[..., k], (rows, columns), order=1, mode="mirror") for k in range(channels)]
    return np.stack(planes, axis=-1)


def _smooth(x: np.ndarray, sigma: float) -> np.ndarray:
    """Applies a Gaussian filter of any width to (H, W), with the edges as mirrors: a product of cosine transforms."""
    from scipy.fft import dctn, idctn

    if sigma == 0:
        return x
    rows, columns = (np.exp(-0.5 * (sigma * math.pi * np.arange(n) / n) ** 2) for n in x.shape)
    return idctn(dctn(x) * rows[:, None] * columns)


def _pixelate(x: np.ndarray, c: tuple[float, ...], generator: np.random.Generator) -> np.ndarray:
    from PIL import Image

    image = to_pillow(np.rint(255 * x).astype("uint8"))
    width, height = (max(1, int(c[0] * side)) for side in image.size)
    small = image.resize((width, height), Image.Resampling.BOX)
    return to_array(small.resize(image.size, Image.Resampling.BOX)) / 255


def _jpeg_compression(x: np.ndarray, c: tuple[float, ...], generator: np.random.Generator) -> np.ndarray:
    from PIL import Image

    file = io.BytesIO()
    to_pillow(np.rint(255 * x).astype("uint8")).save(file, "JPEG", quality=round(c[0]))
    with Image.open(file) as image:
        return to_array(image) / 255


_FUNCTIONS: dict[str, Callable[[np.ndarray, tuple[float, ...], np.random.Generator], np.ndarray]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}
