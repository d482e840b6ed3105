"""Vision Transformers for your own images, in Keras 3: train, look inside, ship.

The public names below load on first use (PEP 562), so that importing the package, and the command line's help, stay
fast: `import vitreous` imports neither Keras nor NumPy. It does settle Keras's backend for this process
(`vitreous.backend.select_backend`), unless the program imported Keras before or set `KERAS_BACKEND`.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitreous.data import load_dataset
    from vitreous.embeddings import embed, find_neighbours, probe
    from vitreous.engine import Engine
    from vitreous.errors import VitreousError
    from vitreous.explanation import explain
    from vitreous.export.write import export_model
    from vitreous.figures import draw_patches
    from vitreous.inspection import inspect
    from vitreous.layers import MLP, PatchEncoder, Patches, SelfAttention, TransformerBlock
    from vitreous.measurement import evaluate
    from vitreous.model import VisionTransformer, create_model
    from vitreous.prediction import predict
    from vitreous.ray_engine import RayEngine
    from vitreous.registry import get_spec, list_models, list_weights
    from vitreous.report import write_report
    from vitreous.spec import InputSpec, ModelSpec, ViTConfig, WeightsSource
    from vitreous.training.pretrainer import pretrain
    from vitreous.training.rate_search import find_learning_rate
    from vitreous.training.resume import resume
    from vitreous.training.run import load_run
    from vitreous.training.trainer import train
    from vitreous.training.tuning import tune
    from vitreous.weights import export_weights, import_weights

__version__ = "0.1.0"

__all__ = [
    "Patches",
    "PatchEncoder",
    "SelfAttention",
    "MLP",
    "TransformerBlock",
    "VisionTransformer",
    "create_model",
    "ViTConfig",
    "InputSpec",
    "ModelSpec",
    "WeightsSource",
    "list_models",
    "list_weights",
    "get_spec",
    "load_dataset",
    "train",
    "pretrain",
    "resume",
    "find_learning_rate",
    "tune",
    "load_run",
    "evaluate",
    "predict",
    "Engine",
    "RayEngine",
    "export_model",
    "inspect",
    "write_report",
    "explain",
    "embed",
    "find_neighbours",
    "probe",
    "draw_patches",
    "import_weights",
    "export_weights",
    "VitreousError",
    "__version__",
]

_HOMES = {
    "Patches": "vitreous.layers",
    "PatchEncoder": "vitreous.layers",
    "SelfAttention": "vitreous.layers",
    "MLP": "vitreous.layers",
    "TransformerBlock": "vitreous.layers",
    "VisionTransformer": "vitreous.model",
    "create_model": "vitreous.model",
    "ViTConfig": "vitreous.spec",
    "InputSpec": "vitreous.spec",
    "ModelSpec": "vitreous.spec",
    "WeightsSource": "vitreous.spec",
    "list_models": "vitreous.registry",
    "list_weights": "vitreous.registry",
    "get_spec": "vitreous.registry",
    "load_dataset": "vitreous.data",
    "train": "vitreous.training.trainer",
    "pretrain": "vitreous.training.pretrainer",
    "resume": "vitreous.training.resume",
    "find_learning_rate": "vitreous.training.rate_search",
    "tune": "vitreous.training.tuning",
    "load_run": "vitreous.training.run",
    "evaluate": "vitreous.measurement",
    "predict": "vitreous.prediction",
    "Engine": "vitreous.engine",
    "RayEngine": "vitreous.ray_engine",
    "export_model": "vitreous.export.write",
    "inspect": "vitreous.inspection",
    "write_report": "vitreous.report",
    "explain": "vitreous.explanation",
    "embed": "vitreous.embeddings",
    "find_neighbours": "vitreous.embeddings",
    "probe": "vitreous.embeddings",
    "draw_patches": "vitreous.figures",
    "import_weights": "vitreous.weights",
    "export_weights": "vitreous.weights",
    "VitreousError": "vitreous.errors",
}

if "keras" not in sys.modules and not os.environ.get("KERAS_BACKEND"):
    # Keras by itself asks for TensorFlow. This looks up what is installed, and imports none of it.
    importlib.import_module("vitreous.backend").select_backend()


def __getattr__(name: str) -> Any:
    """Loads a public name from the module it lives in, once."""
    if name not in _HOMES:
        raise AttributeError(f"module 'vitreous' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Lists the public names, loaded or not, beside what the module already holds."""
    return sorted({*globals(), *__all__})
