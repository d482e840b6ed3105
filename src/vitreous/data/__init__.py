"""Data: from folders, tables and archives to batches of uint8 images. Importing it loads neither Keras nor Pillow nor
scikit-learn.
"""

from vitreous.data.image_set import Dataset, Example, ImageSet
from vitreous.data.images import IMAGE_SUFFIXES, check_image_header, decode_image, resize_image
from vitreous.data.labelled import LabelledImages, load_evaluation_images
from vitreous.data.pipeline import Batch, Loader
from vitreous.data.sources import list_image_files, load_dataset, load_images
from vitreous.data.sources.built_in import BUILT_IN
from vitreous.data.splits import stratified_split
from vitreous.data.stores import ArrayStore, FolderStore, SpanStore, Store
from vitreous.data.stream import BatchStream
from vitreous.data.transforms import augment_image, example_generator
from vitreous.spec import AugmentConfig, DataConfig

__all__ = [
    "BUILT_IN",
    "IMAGE_SUFFIXES",
    "ArrayStore",
    "AugmentConfig",
    "Batch",
    "BatchStream",
    "DataConfig",
    "Dataset",
    "Example",
    "FolderStore",
    "ImageSet",
    "LabelledImages",
    "Loader",
    "SpanStore",
    "Store",
    "augment_image",
    "check_image_header",
    "decode_image",
    "example_generator",
    "list_image_files",
    "load_dataset",
    "load_evaluation_images",
    "load_images",
    "resize_image",
    "stratified_split",
]
