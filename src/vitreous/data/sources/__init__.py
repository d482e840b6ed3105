"""Where images come from: one file a kind of source, and `load` that finds out which kind it is."""

from vitreous.data.sources.built_in import BUILT_IN
from vitreous.data.sources.load import (
    change_config,
    list_image_files,
    load_dataset,
    load_images,
    make_dataset,
    read_source,
    source_path,
)

__all__ = [
    "BUILT_IN",
    "change_config",
    "list_image_files",
    "load_dataset",
    "load_images",
    "make_dataset",
    "read_source",
    "source_path",
]
