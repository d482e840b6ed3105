"""Makes the pictures of docs/ anew, with the program that they show.

    python scripts/pictures.py --run runs/cifar10 --data cifar10/            # all of them
    python scripts/pictures.py --run runs/cifar10 --data cifar10/ --only page explain

`--run` is a run of CIFAR-10 and `--data` its images, in train/ and test/ with a folder a class; those of the digits are
trained here. The page, the inspection and the report are photographed in a Chromium. What is made lies in docs/images;
look at it before it is committed.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]


class Studio:
    """What the pictures are made from.

    Args:
        run: Run of CIFAR-10.
        data: Its images.
        folder: For what is made on the way.
    """

    def __init__(self, run: Path, data: Path, folder: Path):
        self.run, self.data, self.folder = run, data, folder

    def call(self, *words: object) -> None:
        """Runs a command of vitreous."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        subprocess.run([sys.executable, "-m", "vitreous", *map(str, words)], check=True, env=environment)

    @property
    def flower(self) -> Path:
        """A photograph that scikit-learn brings: by vultilion, CC BY 2.0."""
        import sklearn.datasets

        return Path(sklearn.datasets.__file__).parent / "images" / "flower.jpg"

    @property
    def horse(self) -> Path:
        """An image of the run's data."""
        return min((self.data / "test" / "horse").iterdir())

    def patches(self) -> None:
        """patches.png."""
        out = IMAGES / "patches.png"
        self.call("patches", self.flower, "--patch-size", 32, "--image-size", "224x320", "--out", out)

    def corruptions(self) -> None:
        """corruptions.jpg."""
        from PIL import Image

        from vitreous.figures import draw_corruptions

        drawn = self.folder / "corruptions.png"
        draw_corruptions(self.flower, drawn, image_size=224)
        Image.open(drawn).convert("RGB").save(IMAGES / "corruptions.jpg", quality=85)

    def digits(self) -> None:
        """curves.png, confusion.png, predictions.png, reliability.png."""
        run = self.folder / "digits"
        self.call("train", "digits", "--out", run)
        for name in ("curves", "confusion", "predictions", "reliability"):
            shutil.copy(run / f"{name}.png", IMAGES)

    def find_lr(self) -> None:
        """find-lr.png."""
        self.call("find-lr", "digits", "--out", self.folder / "find-lr.png")
        shutil.copy(self.folder / "find-lr.png", IMAGES)

    def explain(self) -> None:
        """explain.png."""
        self.call("explain", self.run, self.horse, "--out", IMAGES / "explain.png")

    def neighbours(self) -> None:
        """neighbours.png."""
        vectors, test = self.folder / "test.parquet", self.data / "test"
        self.call("embed", self.run, test, "--out", vectors)
        asked = [min((test / name).iterdir()) for name in ("ship", "automobile", "frog")]
        self.call("neighbours", vectors, *asked, "-k", 8, "--out", IMAGES / "neighbours.png")

    def inspect(self) -> None:
        """inspect.png."""
        page = self.folder / "inspect.html"
        self.call("inspect", self.data, "--html", page)
        with self.photograph(page, width=1120, height=1640) as shoot:
            shoot("inspect")

    def report(self) -> None:
        """report.png."""
        page = self.folder / "report.html"
        self.call("report", self.run, "--robustness", "--max-images", 100, "--out", page)
        with self.photograph(page, width=870, height=1102) as shoot:
            shoot("report")

    def page(self) -> None:
        """page.png, page-dark.png, page-phone.png."""
        page = self.folder / "page.html"
        self.call("explain", self.run, self.horse, "--html", page)
        with self.photograph(page, width=1100, height=1990, point="#map") as shoot:
            shoot("page")
        dark = {"width": 1100, "height": 1350, "scheme": "dark", "press": "[value=relevance] + span"}
        with self.photograph(page, **dark) as shoot:
            shoot("page-dark")
        phone = {"width": 360, "height": 780, "press": "[value=positions] + span", "point": "#map"}
        with self.photograph(page, **phone) as shoot:
            shoot("page-phone")

    @contextlib.contextmanager
    def photograph(
        self, page: Path, *, width: int, height: int, scheme: str = "light", press: str = "", point: str = ""
    ) -> Iterator[Callable[[str], None]]:
        """Opens a page, presses a button and points at an element; yields what takes a picture of it by its name."""
        from browser import Browser, find_chromium
        from PIL import Image

        if find_chromium() is None:
            raise SystemExit("Cannot photograph the pages. Expected a Chromium. Received: none. Install chromium.")
        with Browser(Path(tempfile.mkdtemp(dir=self.folder))) as browser:
            tab = browser.open(page.resolve().as_uri(), width=width, height=height, scheme=scheme)
            if press:
                tab.click(press)
            if point:
                tab.hover(point, 0.55, 0.4)

            def shoot(name: str) -> None:
                path = tab.screenshot(IMAGES / f"{name}.png")
                Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)

            yield shoot


PICTURES = ("patches", "corruptions", "digits", "find_lr", "explain", "neighbours", "inspect", "report", "page")


def main() -> None:
    """Makes the pictures asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=PICTURES, default=PICTURES)
    options = parser.parse_args()
    os.environ.setdefault("KERAS_BACKEND", "jax")
    with tempfile.TemporaryDirectory(prefix="vitreous-pictures-") as folder:
        studio = Studio(options.run, options.data, Path(folder))
        for name in options.only:
            print(f"== {name}: {getattr(Studio, name).__doc__}", flush=True)
            getattr(studio, name)()


if __name__ == "__main__":
    main()
