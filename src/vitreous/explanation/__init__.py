"""What a model looks at: maps of an image's patches, by several methods, and how faithful they are.

    methods.py       Explanation, and the table of methods
    explainer.py     Explainer: answers, and explanations of them
    trace.py         one pass with composed attention, and gradients, on each backend
    maps.py          rollout, relevance, Grad-CAM, positions, filters: each as it is defined, in NumPy
    perturbation.py  images with parts taken out
    faithfulness.py  deletion and insertion, against random rankings
    pictures.py      explanations drawn

Importing it loads no Keras.
"""

from vitreous.explanation.explainer import Explainer, explain, load_explainer, locate_model
from vitreous.explanation.faithfulness import Curves, Faithfulness, measure_faithfulness
from vitreous.explanation.methods import METHODS, Explanation, Method, list_methods
from vitreous.explanation.pictures import draw_explanation, draw_faithfulness

__all__ = [
    "METHODS",
    "Curves",
    "Explainer",
    "Explanation",
    "Faithfulness",
    "Method",
    "draw_explanation",
    "draw_faithfulness",
    "explain",
    "list_methods",
    "load_explainer",
    "locate_model",
    "measure_faithfulness",
]
