"""Training: recipes, the loop, and the run folder it leaves.

Names are looked up when first used, so that recipes can be read without Keras.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitreous.training.folds import train_folds
    from vitreous.training.pretrainer import pretrain
    from vitreous.training.run import Run, load_model, load_run
    from vitreous.training.trainer import train

__all__ = ["Run", "load_model", "load_run", "pretrain", "train", "train_folds"]


def __getattr__(name: str) -> Any:
    if name in ("Run", "load_model", "load_run"):
        from vitreous.training import run

        return getattr(run, name)
    if name == "train_folds":
        from vitreous.training.folds import train_folds

        return train_folds
    if name == "pretrain":
        from vitreous.training.pretrainer import pretrain

        return pretrain
    if name == "train":
        from vitreous.training.trainer import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
