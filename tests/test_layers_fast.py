"""Every fast form of a layer or of an update against the plain one: values and gradients."""

import keras
import numpy as np
import pytest
from layer_harness import gradients, random_array, to_numpy

from vitreous.layers import MLP, SelfAttention, TransformerBlock

ON_TORCH = pytest.mark.skipif(keras.backend.backend() != "torch", reason="a form for torch")
TOLERANCE = {"float32": 2e-6, "mixed_bfloat16": 0.03}


def randomize(layer):
    rng = np.random.default_rng(1)
    for weight in layer.trainable_variables:
        weight.assign(rng.standard_normal(weight.shape) * 0.3 + weight.path.endswith("gamma"))


def check_close(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(np.abs(b).max(), 1.0), rtol=0)


@ON_TORCH
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize(
    "layer",
    [
        lambda dtype: SelfAttention(3, dtype=dtype),
        lambda dtype: SelfAttention(3, layer_scale=0.1, dtype=dtype),
        lambda dtype: MLP(40, dtype=dtype),
        lambda dtype: MLP(40, activation="gelu_tanh", epsilon=1e-3, dtype=dtype),
    ],
)
def test_branches_by_hand_equal_composed_ones(layer, dtype, monkeypatch):
    import torch

    from vitreous.layers import torch_branches

    layer = layer(dtype)
    x = torch.from_numpy(random_array(4, 9, 24)).requires_grad_()
    layer(x)
    randomize(layer)
    results, calls = [], []
    monkeypatch.setattr(torch_branches, "can_compute", lambda x: calls.append(len(results) == 0) or calls[-1])
    for _ in range(2):
        y = layer(x).float()
        found = torch.autograd.grad(y.square().sum(), [x, *(v.value for v in layer.trainable_variables)])
        results.append([to_numpy(v) for v in (y.detach(), *found)])
    assert calls == [True, False]  # the first by hand, the second composed
    check_close(*results, TOLERANCE[dtype])


@ON_TORCH
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_branches_by_hand_compute_with_low_rank_updates(dtype, monkeypatch):
    import torch

    from vitreous.layers import torch_branches

    block = TransformerBlock(3, 40, dtype=dtype)
    x = torch.from_numpy(random_array(4, 9, 24)).requires_grad_()
    block(x)
    for dense in (block.attention.qkv, block.attention.projection, block.mlp.hidden, block.mlp.output_dense):
        dense.enable_lora(2, lora_alpha=3.0)
    randomize(block)
    results, calls = [], []
    monkeypatch.setattr(torch_branches, "can_compute", lambda x: calls.append(not results) or calls[-1])
    for _ in range(2):
        found = torch.autograd.grad(block(x).float().square().sum(), [x, *(v.value for v in block.trainable_variables)])
        results.append([to_numpy(v) for v in found])
    assert calls == [True, True, False, False]
    assert sum("lora_kernel" in v.path for v in block.trainable_variables) == 8
    check_close(*results, TOLERANCE[dtype])


@ON_TORCH
def test_branches_by_hand_are_taken_where_they_can_be_and_only_there():
    import torch

    from vitreous.layers import torch_branches

    x = torch.zeros(2, 5, 8)
    assert torch_branches.can_compute(x)
    assert not torch_branches.can_compute(x.double())
    assert not torch_branches.can_compute(x.to("meta"))
    assert not torch_branches.can_compute(keras.KerasTensor((2, 5, 8)))
    seen = []
    torch.func.grad(lambda x: seen.append(torch_branches.can_compute(x)) or x.sum())(x)
    torch.jit.trace(lambda x: seen.append(torch_branches.can_compute(x)) or x * 2, x)
    assert seen[:2] == [False, False]
    dense = keras.layers.Dense(4)
    dense.build((None, 4))
    assert MLP(16).get_branches(x, dense) is torch_branches
    assert MLP(16, norm="rms").get_branches(x, dense) is None
    assert MLP(16, norm_position="post").get_branches(x, dense) is None


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="a form for jax")
@pytest.mark.parametrize("max_scores", [1, 2 * 2 * 5 * 5, 10**6])
@pytest.mark.parametrize("options", [{}, {"use_qk_norm": True}, {"use_inner_norm": True, "use_key_bias": False}])
def test_attention_in_parts_equals_the_whole(options, max_scores, monkeypatch):
    from vitreous.layers import jax_attention

    monkeypatch.setattr(jax_attention, "_MAX_SCORES", max_scores)
    x = random_array(6, 5, 8)
    layer = SelfAttention(2, **options)
    layer(x)
    randomize(layer)
    attend, calls = jax_attention.attend, []
    monkeypatch.setattr(jax_attention, "attend", lambda qkv: calls.append(qkv.shape) or attend(qkv))
    split = [to_numpy(layer(x, training=True)), *gradients(layer, x)]
    assert (taken := len(calls)) >= 2
    monkeypatch.setattr(jax_attention, "can_compute", lambda: False)
    whole = [to_numpy(layer(x, training=True)), *gradients(layer, x)]
    assert len(calls) == taken
    check_close(split, whole, 1e-5)
    monkeypatch.setattr(jax_attention, "can_compute", lambda: True)
    layer(x)  # without training: exports trace this
    assert len(calls) == taken


@ON_TORCH
def test_a_block_exports_with_a_dynamic_batch():
    import torch

    block = TransformerBlock(2, 16)
    x = torch.from_numpy(random_array(3, 5, 8))
    expected = block(x)

    class Module(torch.nn.Module):
        def forward(self, x):
            return block(x, training=False)

    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        exported = torch.export.export(Module(), (x,), dynamic_shapes=({0: batch},), strict=False)
    twice = exported.module()(torch.cat([x, x]))
    np.testing.assert_allclose(to_numpy(twice.detach()), np.tile(to_numpy(expected.detach()), (2, 1, 1)), atol=1e-5)
