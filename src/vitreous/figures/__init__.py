"""Pictures: patches, augmentation, learning curves, confusion matrices, calibration, predictions. Arrays or images
in, a file out.

The suffix of `out` chooses the format: .png, .svg or .pdf. A file is written whole or not at all. Nothing here touches
Matplotlib's global state (pyplot), so these functions work in any thread. Colours are those of Okabe and Ito, which
colour-blind readers tell apart; where a colour says something, a sign or a word says it too.
"""

from vitreous.figures.augmentation import draw_augmentation
from vitreous.figures.calibration import draw_reliability, draw_selection
from vitreous.figures.canvas import shorten
from vitreous.figures.neighbours import draw_neighbours
from vitreous.figures.patches import GAP, compose_mosaic, draw_patches
from vitreous.figures.reconstruction import draw_reconstruction
from vitreous.figures.results import draw_confusion, draw_curves, draw_labels, draw_predictions
from vitreous.figures.robustness import draw_corruptions, draw_robustness
from vitreous.figures.search import draw_rate_search, draw_trials

__all__ = [
    "GAP",
    "compose_mosaic",
    "draw_augmentation",
    "draw_confusion",
    "draw_corruptions",
    "draw_curves",
    "draw_labels",
    "draw_neighbours",
    "draw_patches",
    "draw_predictions",
    "draw_rate_search",
    "draw_reconstruction",
    "draw_trials",
    "draw_reliability",
    "draw_robustness",
    "draw_selection",
    "shorten",
]
