"""How rates change while training goes on. Progress runs from 0 (start) to 1 (end), in steps or in time."""

import math

from vitreous.training.recipe import OptimizerConfig


def learning_rate(progress: float, *, peak: float, warmup_fraction: float, final_fraction: float) -> float:
    """Returns the learning rate: a straight warm-up, then half a cosine.

    Args:
        progress: Share of training done, in [0, 1].
        peak: The highest rate.
        warmup_fraction: Share of training in which the rate rises from 0 to `peak`, in [0, 1).
        final_fraction: The rate at the end, as a share of `peak`.

    Source: Loshchilov & Hutter 2017, https://arxiv.org/abs/1608.03983 (one cycle, no restart).
    """
    if progress < warmup_fraction:
        return peak * progress / warmup_fraction
    along = (min(progress, 1.0) - warmup_fraction) / (1 - warmup_fraction)
    return peak * (final_fraction + (1 - final_fraction) * (1 + math.cos(math.pi * along)) / 2)


def learning_rates(progress: float, config: OptimizerConfig) -> tuple[float, float]:
    """Returns the learning rates of the head and of everything else.

    Args:
        progress: Share of training done, in [0, 1].
        config: The schedule. With a `head_first_fraction`, the head learns alone at first, at `head_first_rate`, and
            the schedule of all follows it; where the head alone is trained anyway, there is no such part.
    """
    alone = 0.0 if config.trained == "head" else config.head_first_fraction
    if progress < alone:
        return config.head_first_rate, 0.0
    rate = learning_rate(
        (progress - alone) / (1 - alone),
        peak=config.learning_rate,
        warmup_fraction=config.warmup_fraction,
        final_fraction=config.final_fraction,
    )
    return rate, rate


def average_decay(step: int, progress: float, *, horizon_fraction: float) -> float:
    """Returns the decay of the weights' exponential moving average.

    Args:
        step: Steps done so far, from 1.
        progress: Share of training done after this step, in (0, 1].
        horizon_fraction: How far the average reaches back, as a share of the whole training; 0 averages nothing.

    Returns:
        A decay in [0, 1); small at first, so that the random start is soon forgotten.
    """
    total_steps = step / max(progress, 1e-9)
    horizon = max(horizon_fraction * total_steps, 1.0)
    return min(1 - 1 / horizon, step / (step + 10)) if horizon_fraction else 0.0
