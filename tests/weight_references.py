"""Models of timm, transformers and Google with their outputs, as other libraries computed them.

Most lie in tests/data/references, one .npz a model. `VITREOUS_REFERENCES` may name a folder with more of them, each as
NAME.json, NAME.npz (outputs) and NAME.safetensors or NAME.weights.npz.
"""

import os
import shutil
from pathlib import Path

import numpy as np

from vitreous.weights.tensors import write_npz, write_safetensors

DATA = Path(__file__).parent / "data" / "references"
MORE = Path(os.environ.get("VITREOUS_REFERENCES", "/nonexistent"))
OUTPUTS = ("images", "tokens", "features", "logits")

NAMES = sorted(
    {path.stem for path in DATA.glob("*.npz")} | {path.name.split(".")[0] for path in MORE.glob("*.safetensors")}
)


def place(name: str, folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """Writes a reference as its library would: the weights and their description. Returns their path and outputs."""
    suffix = ".weights.npz" if name.startswith("google") else ".safetensors"
    path = folder / f"{name}{suffix}"
    if not (DATA / f"{name}.npz").is_file():
        shutil.copy(MORE / path.name, path)
        shutil.copy(MORE / f"{name}.json", folder)
        with np.load(MORE / f"{name}.npz") as arrays:
            return path, {key: arrays[key] for key in OUTPUTS}
    with np.load(DATA / f"{name}.npz") as arrays:
        tensors = {key.removeprefix("tensor:"): arrays[key] for key in arrays.files if key.startswith("tensor:")}
        outputs = {key: arrays[key] for key in OUTPUTS}
        (folder / f"{name}.json").write_bytes(arrays["description"].tobytes())
    write = write_npz if suffix == ".weights.npz" else write_safetensors
    write(path, outgoing(tensors))
    return path, outputs


def outgoing(tensors: dict[str, np.ndarray]) -> dict:
    """Returns arrays in the form that the writers take."""
    return {name: (values.shape, lambda values=values: values) for name, values in tensors.items()}
