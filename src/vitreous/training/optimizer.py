"""How weights move: AdamW, Muon for the matrices before the head, a rate for each depth, and weights that stay.

One form for every backend: a pure function from lists of tensors to lists of tensors, which jax compiles and TensorFlow
assigns. On torch, AdamW changes the same lists in place, all weights in a handful of kernels.
"""

import re
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from vitreous.errors import ConfigError
from vitreous.spec import ViTConfig, check
from vitreous.training.lora import LowRankUpdate, add_updates
from vitreous.training.recipe import OptimizerConfig

_BETA_1, _EPSILON = 0.9, 1e-8
_MOMENTUM = 0.95  # of Muon, Nesterov's
_BLOCK = re.compile(r"(?:^|/)block_(\d+)/")


def is_decayed(path: str) -> bool:
    """Whether weight decay shrinks a weight: kernels only, never biases, norms, tokens, positions and scales."""
    return path.split("/")[-1] == "kernel"


def is_muon(path: str) -> bool:
    """Whether Muon moves a weight: a kernel of a transformer block, of the stem or of the patch projection."""
    return is_decayed(path) and (_BLOCK.search(path) is not None or _is_early(path))


def is_head(path: str) -> bool:
    """Whether a weight is one of a head: of the class token's, or of the distillation token's."""
    return "head/" in path


def get_depth(path: str, num_blocks: int) -> int:
    """Returns how deep a weight lies: 0 for what makes the tokens, k + 1 for block k, num_blocks + 1 for the rest."""
    if match := _BLOCK.search(path):
        return int(match[1]) + 1
    return 0 if _is_early(path) else num_blocks + 1


def _is_early(path: str) -> bool:
    """Whether a weight lies before the first block."""
    return any(f"/{name}" in f"/{path}" for name in ("patch_encoder/", "stem/", "pre_norm/"))


def is_trained(path: str, config: ViTConfig, trained: str) -> bool:
    """Whether a weight moves.

    Args:
        path: Its path.
        config: Of its model.
        trained: `"all"`, `"head"` (the heads alone), `"lora"` (the heads and updates of low rank), or `"last-N"` (the
            last N blocks, the last norm, the pooling and the heads).
    """
    if trained == "all":
        return True
    if trained in ("head", "lora"):
        return is_head(path) or "/lora_kernel_" in path
    count = int(trained.removeprefix("last-"))
    return get_depth(path, config.num_blocks) > config.num_blocks - count


class Optimizer:
    """Moves weights against their gradients.

    Args:
        variables: The weights that move.
        config: Which optimiser and its numbers; the learning rate itself comes with each step.
        num_blocks: Blocks of the model, for `config.layer_decay`.
        updates: The low-rank updates among the weights.

    Attributes:
        variables: The weights that move, in order.
        slots: Keras variables of float32 that hold the optimiser's state; the first counts the steps.

    Source: AdamW: Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101. Muon: Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon/ (momentum and the five Newton-Schulz steps), scaled to AdamW's size of
    update as in Liu et al. 2025, https://arxiv.org/abs/2502.16982, section 2.2, so that one learning rate serves both;
    queries, keys and values are matrices of their own, and a convolution is one matrix from all that it reads to its
    channels. Layer-wise decay: Bao et al. 2022,
    https://arxiv.org/abs/2106.08254, appendix.
    """

    def __init__(
        self,
        variables: Sequence[keras.Variable],
        config: OptimizerConfig,
        *,
        num_blocks: int,
        updates: Sequence[LowRankUpdate] = (),
    ):
        self.variables = list(variables)
        self.config = config
        self.updates = list(updates)
        paths = [variable.path for variable in self.variables]
        self.scales = [config.layer_decay ** (num_blocks + 1 - get_depth(path, num_blocks)) for path in paths]
        self.decays = [config.weight_decay if is_decayed(path) else 0.0 for path in paths]
        self.has_muon = [config.name == "muon" and is_muon(path) for path in paths]
        self.is_head = [is_head(path) for path in paths]
        self.is_qkv = [path.endswith("qkv/kernel") for path in paths]
        self.slots = [_slot((), "step")]
        for variable, is_matrix in zip(self.variables, self.has_muon, strict=True):
            self.slots += [_slot(variable.shape, f"{name}_{len(self.slots)}") for name in ("m", "v")[: 2 - is_matrix]]
        self.apply = self._apply_in_place if keras.backend.backend() == "torch" else self._apply

    def clip(self, gradients: list[Any]) -> list[Any]:
        """Returns the gradients, shrunk together where their common norm exceeds `config.clip_norm`."""
        if not self.config.clip_norm:
            return gradients
        norm = ops.sqrt(sum(ops.sum(ops.square(gradient)) for gradient in gradients))
        scale = ops.minimum(1.0, self.config.clip_norm / (norm + 1e-12))
        return [gradient * scale for gradient in gradients]

    def _apply(
        self, gradients: list[Any], weights: list[Any], slots: list[Any], learning_rate: Any, body_rate: Any = None
    ) -> tuple[list[Any], list[Any]]:
        """Returns the new weights and slots; `apply` is this, or its form in place.

        Args:
            gradients: As `variables`, float32.
            weights: As `variables`.
            slots: As `slots`.
            learning_rate: Scalar.
            body_rate: The same for what is no head; at 0 it stays, and its slots follow its gradients. Default:
                `learning_rate`.
        """
        body_rate = learning_rate if body_rate is None else body_rate
        gradients = self.clip(gradients)
        step = slots[0] + 1
        beta_2 = self.config.beta_2
        correction_1, correction_2 = 1 - ops.power(_BETA_1, step), 1 - ops.power(beta_2, step)
        moved, kept = [], [step]
        for i, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
            rate = (learning_rate if self.is_head[i] else body_rate) * self.scales[i]
            m = slots[len(kept)]
            if self.has_muon[i]:
                m = _MOMENTUM * m + gradient
                update = orthogonalize(gradient + _MOMENTUM * m, 3 if self.is_qkv[i] else 1)
                kept.append(m)
            else:
                v = slots[len(kept) + 1]
                m = m + (1 - _BETA_1) * (gradient - m)
                v = v + (1 - beta_2) * (ops.square(gradient) - v)
                update = (m / correction_1) / (ops.sqrt(v / correction_2) + _EPSILON)
                kept += [m, v]
            moved.append(weight - rate * (update + self.decays[i] * weight))
        return moved, kept

    def _apply_in_place(
        self, gradients: list[Any], weights: list[Any], slots: list[Any], learning_rate: Any, body_rate: Any = None
    ) -> tuple[list[Any], list[Any]]:
        """The same on torch: changes `weights` and `slots`, and returns them."""
        import torch

        with torch.no_grad():
            divisor = None  # of the gradients
            if self.config.clip_norm:
                norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
                divisor = torch.clamp(norm / self.config.clip_norm, min=1.0)
            slots[0] += 1
            places, place = [], 1
            for is_matrix in self.has_muon:
                places.append(place)
                place += 1 if is_matrix else 2
            rates = [float(learning_rate if body_rate is None else body_rate), float(learning_rate)]
            for (scale, decay, is_matrix, is_head), members in self._groups().items():
                rate = rates[is_head]
                group = [weights[i] for i in members]
                grads = [gradients[i] for i in members]
                m = [slots[places[i]] for i in members]
                if not is_matrix:
                    torch._fused_adamw_(
                        group,
                        grads,
                        m,
                        [slots[places[i] + 1] for i in members],
                        [],
                        [slots[0]] * len(group),
                        lr=rate * scale,
                        beta1=_BETA_1,
                        beta2=self.config.beta_2,
                        weight_decay=decay,
                        eps=_EPSILON,
                        amsgrad=False,
                        maximize=False,
                        grad_scale=divisor,
                    )
                    continue
                if divisor is not None:
                    torch._foreach_div_(grads, divisor)
                torch._foreach_mul_(m, _MOMENTUM)
                torch._foreach_add_(m, grads)
                nesterov = torch._foreach_add(grads, m, alpha=_MOMENTUM)
                update = [
                    orthogonalize(each, 3 if self.is_qkv[i] else 1) for i, each in zip(members, nesterov, strict=True)
                ]
                torch._foreach_mul_(group, 1 - rate * scale * decay)
                torch._foreach_add_(group, update, alpha=-rate * scale)
        return weights, slots

    def _groups(self) -> dict[tuple[float, float, bool, bool], list[int]]:
        """Returns the indices of the weights that are treated alike."""
        groups: dict[tuple[float, float, bool, bool], list[int]] = {}
        for i, key in enumerate(zip(self.scales, self.decays, self.has_muon, self.is_head, strict=True)):
            groups.setdefault(key, []).append(i)
        return groups


def _slot(shape: tuple[int, ...], name: str) -> keras.Variable:
    return keras.Variable(np.zeros(shape, "float32"), trainable=False, name=name)


def orthogonalize(matrix: Any, parts: int = 1) -> Any:
    """Returns the nearest matrix with singular values of about 1, times 0.2 * sqrt(its longer side).

    The factor makes the root mean square of the values about 0.2, as in AdamW's updates.

    Args:
        matrix: (rows, columns) float32; or a convolution's kernel (height, width, inputs, columns), whose rows are
            height * width * inputs.
        parts: Matrices that stand side by side in it, each made orthogonal by itself.

    Returns:
        The same shape, float32.
    """
    shape, columns = matrix.shape, matrix.shape[-1] // parts
    x = ops.reshape(matrix, (-1, parts, columns))
    rows = x.shape[0]
    is_tall = rows > columns
    x = ops.transpose(x, (1, 2, 0) if is_tall else (1, 0, 2))  # (parts, shorter side, longer side)
    x = x / (ops.sqrt(ops.sum(ops.square(x), axis=(1, 2), keepdims=True)) + 1e-7)
    for _ in range(5):
        gram = ops.matmul(x, ops.transpose(x, (0, 2, 1)))
        x = 3.4445 * x + ops.matmul(-4.7750 * gram + 2.0315 * ops.matmul(gram, gram), x)
    x = ops.transpose(x, (2, 0, 1) if is_tall else (1, 0, 2))
    return ops.reshape(x, shape) * (0.2 * max(rows, columns) ** 0.5)


def create_optimizer(model: Any, config: OptimizerConfig, *, seed: int = 0) -> Optimizer:
    """Creates the optimiser for a model; weights that `config.trained` leaves out are no longer trainable.

    Args:
        model: A built `VisionTransformer`; with `trained="lora"`, it gets the updates of low rank.
        config: Which optimiser and its numbers.
        seed: Decides the first values of these updates.

    Raises:
        ConfigError: If no weight is left to train, or the model has fewer blocks than are to move.
    """
    count = int(config.trained.removeprefix("last-")) if config.trained.startswith("last-") else 0
    check(
        count <= model.config.num_blocks,
        f"Cannot train the last {count} blocks of {model.name}.",
        f"at most its {model.config.num_blocks} blocks",
        f"trained={config.trained!r}",
        "Pass fewer, or trained='all'.",
    )
    updates = add_updates(model, config, seed=seed) if config.trained == "lora" else []
    for layer_variable in model.trainable_variables:
        if not is_trained(layer_variable.path, model.config, config.trained):
            layer_variable.trainable = False
    if not model.trainable_variables:
        raise ConfigError(
            f"Cannot train {model.name}. Expected weights that {config.trained!r} leaves to train. Received: none. "
            "Pass trained='all'."
        )
    return Optimizer(model.trainable_variables, config, num_blocks=model.config.num_blocks, updates=updates)
