"""Images as vectors: from any backbone to files, to the nearest images of an image, to what the features are worth."""

from vitreous.embeddings.backbone import Backbone, load_backbone
from vitreous.embeddings.extract import embed, embed_to_file
from vitreous.embeddings.files import Embeddings, load_embeddings
from vitreous.embeddings.neighbours import Neighbour, find_neighbours, load_sources, locate_queries
from vitreous.embeddings.probing import probe

__all__ = [
    "Backbone",
    "Embeddings",
    "Neighbour",
    "embed",
    "embed_to_file",
    "find_neighbours",
    "load_backbone",
    "load_embeddings",
    "load_sources",
    "locate_queries",
    "probe",
]
