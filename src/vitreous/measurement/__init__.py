"""A run measured on labelled images: how good, how sure, how robust.

Everything here takes a predict function, uint8 images (B, H, W, C) to logits (B, K), so that whatever computes the
logits is measured on one path: Keras, ONNX, OpenVINO.
"""

from vitreous.measurement.robustness import draw_sample, measure_robustness
from vitreous.measurement.runs import (
    Answers,
    calibrate_run,
    collect_answers,
    evaluate,
    load_images_of,
    measure_answers,
)
from vitreous.measurement.slices import measure_slices
from vitreous.measurement.speed import describe_device, measure_speed
from vitreous.measurement.views import average_views, create_views, make_view

__all__ = [
    "Answers",
    "average_views",
    "calibrate_run",
    "collect_answers",
    "create_views",
    "describe_device",
    "draw_sample",
    "evaluate",
    "load_images_of",
    "make_view",
    "measure_answers",
    "measure_robustness",
    "measure_slices",
    "measure_speed",
]
