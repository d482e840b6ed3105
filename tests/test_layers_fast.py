"""Every fast form of a layer or of an update against the plain one: values and gradients."""

import keras
import numpy as np
import pytest
from layer_harness import random_array, to_numpy

from vitreous.layers import MLP, SelfAttention, TransformerBlock
from vitreous.layers.blocks import activate

ON_TORCH = pytest.mark.skipif(keras.backend.backend() != "torch", reason="a form for torch")
ON_JAX = pytest.mark.skipif(keras.backend.backend() != "jax", reason="a form for jax")
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


def differentiate_on_jax(layer, x):
    """Returns layer(x) in training, and the gradients of the sum of its squares by x and by each trainable weight."""
    import jax

    def objective(x, weights):
        y = layer.stateless_call(weights, [v.value for v in layer.non_trainable_variables], x, training=True)[0]
        return (y**2).sum(), y

    arguments = (x, [v.value for v in layer.trainable_variables])
    (_, y), (d_x, d_weights) = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))(*arguments)
    return [to_numpy(v) for v in (y, d_x, *d_weights)]


@ON_JAX
@pytest.mark.parametrize(
    ("layer", "size"),  # of a part, out of 5 examples
    [
        (lambda: SelfAttention(2), 2),
        (lambda: SelfAttention(2, use_qk_norm=True, use_inner_norm=True, use_key_bias=False), 3),
        (lambda: SelfAttention(2, use_local_attention=True, norm_position="post", layer_scale=0.1), 1),
        (lambda: MLP(24), 3),
        (lambda: MLP(24, kind="swiglu", activation="silu", use_inner_norm=True, norm="rms"), 5),
    ],
)
def test_branches_in_parts_equal_the_whole(layer, size, monkeypatch):
    from vitreous.layers import jax_parts

    layer, x = layer(), random_array(5, 5, 8)
    layer.build(x.shape)
    randomize(layer)
    sizes = []
    monkeypatch.setattr(jax_parts, "_get_size", lambda *args: sizes.append(args) or size)
    split = differentiate_on_jax(layer, x)
    assert len(sizes) == 1
    monkeypatch.setattr(jax_parts, "can_compute", lambda: False)
    whole = differentiate_on_jax(layer, x)
    assert len(sizes) == 1
    check_close(split, whole, 1e-5)


@ON_JAX
def test_branches_in_parts_are_taken_in_training_and_only_where_they_give_the_same():
    import jax

    def count(layer, **kwargs):
        layer.build((None, 5, 8))
        return str(jax.make_jaxpr(lambda x: layer(x, **kwargs))(random_array(2, 5, 8))).count("scan[")

    table = np.ones((5, 4), "float32")
    assert count(SelfAttention(2), training=True) == 1
    assert count(SelfAttention(2), training=True, rope=(table, table)) == 1
    assert count(SelfAttention(2), training=True, rope=(table[None].repeat(2, 0),) * 2) == 0
    assert count(SelfAttention(2), training=True, return_attention=True) == 0
    assert count(SelfAttention(2, attention_dropout_rate=0.5), training=True) == 0
    assert count(SelfAttention(2, dropout_rate=0.5), training=True) == 1  # of the branch's end, outside the parts
    assert count(MLP(8), training=True) == 1
    assert count(MLP(8, dropout_rate=0.5), training=True) == 0
    assert count(MLP(8)) == count(SelfAttention(2)) == 0  # exports trace this


@ON_JAX
def test_branches_in_parts_are_traced_or_not_taken(monkeypatch):
    """Called one by one, operations would compile their loop anew each time."""
    import jax

    from vitreous.layers import jax_parts

    block, x = TransformerBlock(2, 24), jax.numpy.asarray(random_array(4, 5, 8))
    block.build(x.shape)
    monkeypatch.setattr(jax_parts, "can_compute", lambda: True)
    calls, compute = [], jax_parts.compute
    monkeypatch.setattr(jax_parts, "compute", lambda *args, **kwargs: calls.append(1) or compute(*args, **kwargs))
    block(x, training=True)
    assert calls == []
    jax.make_jaxpr(lambda x: block(x, training=True))(x)
    assert calls == [1, 1]


@ON_JAX
@pytest.mark.parametrize("layer", [lambda: SelfAttention(2), lambda: MLP(24)])
def test_nothing_keeps_a_layer_that_has_trained_in_parts(layer, monkeypatch):
    import gc
    import weakref

    import jax

    from vitreous.layers import jax_parts

    monkeypatch.setattr(jax_parts, "can_compute", lambda: True)

    def trace(layer, x):
        def objective(x, weights):
            return layer.stateless_call(weights, [], x, training=True)[0].sum()

        layer.build(x.shape)
        weights = [v.value for v in layer.trainable_variables]
        assert str(jax.make_jaxpr(jax.grad(objective, argnums=(0, 1)))(x, weights)).count("scan[") == 2
        return weakref.ref(layer)

    found = trace(layer(), random_array(4, 5, 8))
    gc.collect()
    assert found() is None


@ON_JAX
@pytest.mark.parametrize(
    ("batch", "num_tokens", "num_heads", "size"),
    [
        (32, 197, 0, 4),
        (32, 197, 3, 4),
        (128, 65, 3, 16),
        (31, 197, 3, 4),
        (5, 65, 3, 5),
        (8, 1025, 3, 1),
        (2, 5000, 3, 1),
    ],
)
def test_a_part_is_as_large_as_the_cache_and_near_the_batch(batch, num_tokens, num_heads, size):
    from vitreous.layers import jax_parts

    assert jax_parts._get_size(batch, num_tokens, num_heads) == size


@ON_JAX
def test_low_rank_updates_and_frozen_weights_train_in_parts(monkeypatch):
    from vitreous.layers import jax_parts

    monkeypatch.setattr(jax_parts, "_MAX_TOKENS", 10)
    block = TransformerBlock(2, 24)
    x = random_array(4, 5, 8)
    block.build(x.shape)
    block.attention.qkv.enable_lora(2)
    block.mlp.norm.trainable = False
    randomize(block)
    results = []
    for can in (True, False):
        monkeypatch.setattr(jax_parts, "can_compute", lambda can=can: can)
        results.append(differentiate_on_jax(block, x))
    assert sum("lora" in v.path for v in block.trainable_variables) == 2
    check_close(*results, 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gelu_is_exact(dtype):
    from scipy.special import erfc

    x = np.linspace(-9, 9, 4001)
    x = to_numpy(keras.ops.cast(keras.ops.cast(x, dtype), "float32")).astype("float64")
    found = to_numpy(keras.ops.cast(activate(keras.ops.cast(x, dtype), "gelu"), "float32"))
    tolerance = {"float32": 1e-6, "bfloat16": 0.02}[dtype]
    np.testing.assert_allclose(found, x * erfc(-x / 2**0.5) / 2, atol=tolerance, rtol=tolerance)


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
