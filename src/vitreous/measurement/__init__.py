"""A run measured on labelled images: how good, how sure, how robust.

Everything here takes a predict function, uint8 images (B, H, W, C) to logits (B, K), so that whatever computes the
logits is measured on one path: Keras, ONNX, OpenVINO.
"""

from vitreous.measurement.robustness import measure_robustness
from vitreous.measurement.runs import calibrate_run, evaluate
from vitreous.measurement.slices import measure_slices
from vitreous.measurement.views import average_views, create_views, make_view

__all__ = [
    "average_views",
    "calibrate_run",
    "create_views",
    "evaluate",
    "make_view",
    "measure_robustness",
    "measure_slices",
]
