"""What is wrong with the images, before a model learns it."""

from vitreous.data.inspection.findings import KINDS, SEVERITIES, Finding, ImageRef, Inspection, Item
from vitreous.data.inspection.whole import MIN_SIMILARITY, inspect_dataset, inspect_fast

__all__ = [
    "KINDS",
    "MIN_SIMILARITY",
    "SEVERITIES",
    "Finding",
    "ImageRef",
    "Inspection",
    "Item",
    "inspect_dataset",
    "inspect_fast",
]
