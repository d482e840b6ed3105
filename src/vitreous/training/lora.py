"""Low-rank updates: large matrices stay as they are, and what is added to each is a product of two thin ones.

Keras's dense layers compute with such an update themselves. The average that training follows is one of whole matrices,
updates included, in a model that knows nothing of them: what is evaluated and saved is a plain `VisionTransformer`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from vitreous.training.recipe import OptimizerConfig


@dataclass(frozen=True, eq=False)
class LowRankUpdate:
    """The update of one matrix.

    Args:
        kernel: (rows, columns), the matrix; it does not move.
        down: (rows, rank), random at first.
        up: (rank, columns), zero at first.
        scale: How often the product of the two counts.

    Source: Hu et al. 2022, https://arxiv.org/abs/2106.09685, section 4.1.
    """

    kernel: keras.Variable
    down: keras.Variable
    up: keras.Variable
    scale: float

    def merge(self, kernel: Any, down: Any, up: Any) -> Any:
        """Returns the updated matrix for values of the three."""
        return kernel + self.scale * ops.matmul(down, up)


def add_updates(model: Any, config: OptimizerConfig, *, seed: int) -> list[LowRankUpdate]:
    """Gives matrices in a model's blocks an update of low rank; the model's answers do not change by it.

    Args:
        model: A built `VisionTransformer`.
        config: `lora_rank`, `lora_alpha` and `lora_layers` count. A rank above a matrix's shorter side is cut to it.
        seed: Decides the random halves.
    """
    updates = []
    for i, layer in enumerate(_find_layers(model, config.lora_layers)):
        kernel = layer.kernel
        rank = min(config.lora_rank, *kernel.shape)
        layer.enable_lora(
            rank,
            lora_alpha=config.lora_alpha * rank / config.lora_rank,
            a_initializer=keras.initializers.HeUniform(seed=(seed + i) % 2**31),
        )
        scale = config.lora_alpha / config.lora_rank
        updates.append(LowRankUpdate(kernel, layer.lora_kernel_a, layer.lora_kernel_b, scale))
    return updates


def _find_layers(model: Any, which: str) -> Iterator[Any]:
    """Yields the dense layers whose matrices are updated."""
    for block in model.blocks:
        for attention in block.attentions:
            yield from (attention.qkv, attention.projection)
        for mlp in block.mlps if which == "all" else ():
            yield from (mlp.hidden, mlp.output_dense)
