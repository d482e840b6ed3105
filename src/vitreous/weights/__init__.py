"""Weights of other libraries, in and out: timm, Hugging Face, Google's .npz, and Keras's own files."""

from vitreous.weights.load import ImportReport, import_weights
from vitreous.weights.save import ConvertReport, ExportReport, convert, export_weights

__all__ = ["ImportReport", "import_weights", "ExportReport", "export_weights", "ConvertReport", "convert"]
