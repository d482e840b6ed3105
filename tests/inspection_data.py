"""A folder of images in which everything is wrong that `vitreous inspect` knows, each on purpose, and a clean one."""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter


def photo(seed: int, size: tuple[int, int] = (96, 96), level: float = 128, contrast: float = 55) -> Image.Image:
    """Returns smooth random colours, as different from those of another seed as two photographs are."""
    small = np.random.default_rng(seed).normal(0, 1, (9, 9, 3))
    pixels = Image.fromarray(np.clip(level + contrast * small, 0, 255).astype("uint8"))
    return pixels.resize(size, Image.Resampling.BICUBIC)


def make_clean(root: Path, num_train: int = 12, num_test: int = 4) -> Path:
    """Makes two classes of images without a fault, in train/ and test/."""
    seed = 0
    for split, count in (("train", num_train), ("val", num_test), ("test", num_test)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                photo(seed).save(root / split / name / f"{number:02}.png")
                seed += 1
    return root


def make_faulty(root: Path) -> Path:
    """Makes a folder with every fault."""
    make_clean(root)
    cat, dog, test = root / "train" / "cat", root / "train" / "dog", root / "test"

    whole = (cat / "00.png").read_bytes()
    (cat / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (cat / "text.jpg").write_text("this is no image")
    (cat / "empty.jpg").write_bytes(b"")
    photo(500).save(cat / "really_png.jpg", "PNG")

    (cat / "copy.png").write_bytes(whole)  # duplicate
    Image.open(cat / "01.png").save(cat / "other_encoding.bmp")  # duplicate by pixels alone
    (test / "cat" / "leak.png").write_bytes((cat / "02.png").read_bytes())
    (dog / "conflict.png").write_bytes((cat / "03.png").read_bytes())

    Image.open(cat / "04.png").save(cat / "near.jpg", quality=60)
    Image.open(cat / "05.png").resize((70, 70)).save(test / "cat" / "near_leak.jpg", quality=80)
    Image.open(cat / "06.png").filter(ImageFilter.GaussianBlur(1)).save(dog / "near_conflict.png")

    photo(510, (9, 9)).save(dog / "tiny.png")
    photo(511, (400, 60)).save(dog / "long.png")
    Image.new("1", (10_001, 5_000), 1).save(dog / "huge.png")
    Image.new("RGB", (96, 96), (90, 30, 120)).save(dog / "constant.png")
    photo(512, level=3, contrast=2).save(dog / "dark.png")
    photo(513, level=252, contrast=2).save(dog / "bright.png")

    photo(520).convert("CMYK").save(dog / "cmyk.jpg")
    deep = np.asarray(photo(521).convert("L")).astype("uint16") * 257
    Image.fromarray(deep).save(dog / "deep.png")
    photo(522).convert("P").save(dog / "palette.png")
    alpha = photo(523).convert("RGBA")
    alpha.putalpha(128)
    alpha.save(dog / "alpha.png")
    photo(524).save(dog / "animated.gif", save_all=True, append_images=[photo(525)])
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(526).save(dog / "rotated.jpg", exif=exif)
    photo(527).convert("L").save(dog / "grey.png")

    for number in range(2):  # alike in name; few images; missing from val and test
        for folder in ("Cat ", "ｄｏｇ"):
            (root / "train" / folder).mkdir(exist_ok=True)
            photo(530 + number + 10 * ord(folder[0])).save(root / "train" / folder / f"{number}.png")
    (root / "train" / "notes.txt").write_text("passed over")
    return root


def tree_hash(root: Path) -> str:
    """Returns a hash over every path, its times and its bytes below a folder."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        status = path.stat()
        digest.update(f"{path.relative_to(root)} {status.st_mode} {status.st_mtime_ns} {status.st_ino}".encode())
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()
