"""The layers of a Vision Transformer, smallest first.

    Patches            image -> patches                       (B, H, W, C) -> (B, N, P_h * P_w * C)
    ConvolutionalStem  image -> what stands for patches       (B, H, W, C) -> (B, N, D)
    PatchEncoder       patches -> tokens                      (B, N, ...)  -> (B, N, D)
    PatchDropout       tokens -> some of them, in training
    SelfAttention      tokens -> x + attention(norm(x))       (B, N, D)    -> (B, N, D)
    MLP                tokens -> x + dense(gelu(dense(norm(x))))
    TransformerBlock   attention, then MLP
    AttentionPool      tokens -> one vector                   (B, N, D)    -> (B, D)

`SelfAttention` and `MLP` own their residual skip: a caller never adds one. All layers run on the jax, torch and
tensorflow backends of Keras and compute the same numbers there.
"""

from vitreous.layers.attention import SelfAttention, rotate
from vitreous.layers.blocks import MLP, TransformerBlock, activate
from vitreous.layers.encoder import PatchDropout, PatchEncoder, take_patches
from vitreous.layers.patches import Patches, shift_images
from vitreous.layers.pooling import AttentionPool
from vitreous.layers.residual import PACKAGE, create_norm
from vitreous.layers.stem import ConvolutionalStem

__all__ = [
    "PACKAGE",
    "Patches",
    "ConvolutionalStem",
    "PatchEncoder",
    "PatchDropout",
    "SelfAttention",
    "MLP",
    "TransformerBlock",
    "AttentionPool",
    "activate",
    "create_norm",
    "rotate",
    "shift_images",
    "take_patches",
]
