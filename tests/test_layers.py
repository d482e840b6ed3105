import json
import random
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops
from layer_harness import check_layer, gradients, random_array, to_numpy

from vitreous.errors import ConfigError
from vitreous.layers import (
    MLP,
    AttentionPool,
    ConvolutionalStem,
    PatchDropout,
    PatchEncoder,
    Patches,
    SelfAttention,
    TransformerBlock,
    rotate,
    shift_images,
)
from vitreous.patches import PatchGrid, extract_patches

random.seed(0)  # layers below draw the seeds of their dropout from here: no test may hang on luck

DATA = Path(__file__).parent / "data"
CASES = json.loads((DATA / "tf_extract_patches.json").read_text())


@pytest.fixture(scope="module")
def reference():
    with np.load(DATA / "tf_extract_patches.npz") as arrays:
        return dict(arrays)


def layer_of(case):
    return Patches(
        tuple(case["size"]),
        strides=tuple(case["stride"]),
        dilation_rate=tuple(case["rate"]),
        padding=case["padding"],
        as_grid=True,
    )


@pytest.mark.parametrize(
    ("layer", "shape", "output_shape"),
    [
        (Patches(4), (2, 8, 12, 3), (2, 6, 48)),
        (Patches((4, 2), strides=(2, 1), padding="same", as_grid=True), (2, 7, 5, 3), (2, 4, 5, 24)),
        (PatchEncoder(8), (2, 6, 12), (2, 6, 8)),
        (PatchEncoder(8, use_class_token=True), (2, 2, 3, 12), (2, 7, 8)),
        (PatchEncoder(8, use_class_token=True), (2, 6, 12), (2, 7, 8)),
        (
            PatchEncoder(
                8,
                use_patch_norm=True,
                use_class_token=True,
                use_distillation_token=True,
                num_registers=2,
                use_bias=False,
            ),
            (2, 6, 12),
            (2, 10, 8),
        ),
        (
            PatchEncoder(8, use_class_token=True, num_registers=2, position_tokens="class", grid_size=(2, 3)),
            (2, 6, 12),
            (2, 9, 8),
        ),
        (PatchEncoder(8, num_registers=1, position_tokens="patches"), (2, 6, 12), (2, 7, 8)),
        (PatchEncoder(8, num_registers=1, position="sincos", grid_size=(2, 3)), (2, 6, 12), (2, 7, 8)),
        (PatchEncoder(8, position="none"), (2, 6, 12), (2, 6, 8)),
        (ConvolutionalStem(4, 8), (2, 8, 12, 3), (2, 6, 8)),
        (ConvolutionalStem(4, 10, depths=(2, 1), activation="gelu"), (2, 8, 12, 3), (2, 6, 10)),
        (PatchDropout(0.5, num_prefix_tokens=1), (2, 5, 8), (2, 5, 8)),
        (SelfAttention(2), (2, 5, 8), (2, 5, 8)),
        (SelfAttention(2, norm="rms", use_qk_norm=True, use_inner_norm=True, layer_scale=0.1), (2, 5, 8), (2, 5, 8)),
        (SelfAttention(2, norm_position="post", use_local_attention=True), (2, 5, 8), (2, 5, 8)),
        (SelfAttention(2, use_key_bias=False, use_projection_bias=False), (2, 5, 8), (2, 5, 8)),
        (SelfAttention(2, use_qkv_bias=False), (2, 5, 8), (2, 5, 8)),
        (SelfAttention(2, use_fused_attention=True), (2, 5, 8), (2, 5, 8)),
        (SelfAttention(4, dropout_rate=0.1, attention_dropout_rate=0.1, epsilon=1e-5), (2, 5, 8), (2, 5, 8)),
        (MLP(16), (2, 5, 8), (2, 5, 8)),
        (MLP(16, activation="gelu_tanh", dropout_rate=0.1, epsilon=1e-5), (2, 5, 8), (2, 5, 8)),
        (MLP(16, kind="swiglu", activation="silu", use_inner_norm=True, layer_scale=0.1), (2, 5, 8), (2, 5, 8)),
        (MLP(16, activation="quick_gelu", use_bias=False, norm="rms", norm_position="post"), (2, 5, 8), (2, 5, 8)),
        (AttentionPool(2, 16), (2, 5, 8), (2, 8)),
        (TransformerBlock(2, 16), (2, 5, 8), (2, 5, 8)),
        (
            TransformerBlock(
                2,
                16,
                num_parallel=2,
                attention={"use_qk_norm": True},
                mlp={"kind": "swiglu"},
                layer_scale=0.1,
                norm="rms",
            ),
            (2, 5, 8),
            (2, 5, 8),
        ),
        (TransformerBlock(2, 16, dropout_rate=0.1, stochastic_depth_rate=0.1), (2, 5, 8), (2, 5, 8)),
    ],
    ids=lambda value: value.__class__.__name__ if isinstance(value, keras.layers.Layer) else None,
)
def test_layer(layer, shape, output_shape, tmp_path):
    check_layer(layer, random_array(*shape), output_shape, tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_patches_equal_tensorflow(case, reference):
    images, expected = reference[f"images_{case}"], reference[f"patches_{case}"]
    layer = layer_of(CASES[case])
    np.testing.assert_array_equal(to_numpy(layer(images)), expected)
    flat = Patches.from_config({**layer.get_config(), "as_grid": False})
    np.testing.assert_array_equal(to_numpy(flat(images)), expected.reshape(len(images), -1, expected.shape[-1]))
    in_numpy = extract_patches(images, layer.grid)
    np.testing.assert_array_equal(in_numpy.reshape(expected.shape), expected)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float16"])
@pytest.mark.parametrize("dilation_rate", [1, 2])
def test_patches_of_any_dtype(dtype, dilation_rate):
    images = np.random.default_rng(0).integers(0, 255, (2, 9, 9, 3)).astype(dtype)
    patches = Patches(3, strides=2, dilation_rate=dilation_rate, dtype=dtype, as_grid=True)(images)
    expected = extract_patches(
        images, PatchGrid(size=(3, 3), strides=(2, 2), dilation_rate=(dilation_rate, dilation_rate))
    )
    assert keras.backend.standardize_dtype(patches.dtype) == dtype
    np.testing.assert_array_equal(to_numpy(patches), expected.reshape(patches.shape))


def test_one_nan_stays_in_its_place():
    images = np.zeros((1, 8, 8, 1), "float32")
    images[0, 1, 2, 0] = np.nan
    assert np.isnan(to_numpy(Patches(4)(images))).sum() == 1
    assert np.isnan(to_numpy(Patches(4, strides=2)(images))).sum() == 2  # two patches see that pixel


@pytest.mark.parametrize("case", CASES)
def test_reconstruct(case, reference):
    images = reference[f"images_{case}"]
    layer = layer_of(CASES[case])
    rebuilt = to_numpy(layer.reconstruct(layer(images), images.shape[1:3]))
    seen = extract_patches(np.ones_like(images), layer.grid)  # 0 where only padding is seen
    rows, columns = layer.grid.indices(images.shape[1:3])
    pads = layer.grid.pad_widths(images.shape[1:3])
    covered = np.zeros((images.shape[1] + sum(pads[0]), images.shape[2] + sum(pads[1])), bool)
    covered[np.ix_(rows.ravel(), columns.ravel())] = True
    covered = covered[pads[0][0] :, pads[1][0] :][: images.shape[1], : images.shape[2]]
    assert seen.max() == 1
    np.testing.assert_allclose(rebuilt[:, covered], images[:, covered], atol=1e-6)
    assert (rebuilt[:, ~covered] == 0).all()


def test_reconstruct_is_exact_without_overlap_and_averages_with():
    images = random_array(2, 8, 12, 3)
    tiles = Patches(4)
    np.testing.assert_array_equal(to_numpy(tiles.reconstruct(tiles(images), (8, 12))), images)
    overlapping = Patches((1, 2), strides=1)
    patches = np.array([[[0.0, 1.0], [3.0, 2.0]]], "float32")  # pixels: 0, mean of 1 and 3, 2
    np.testing.assert_allclose(to_numpy(overlapping.reconstruct(patches, (1, 3))).ravel(), [0, 2, 2])


def test_patches_errors():
    with pytest.raises(ConfigError, match=r"Cannot use size\. Expected a positive integer, or two .* size=0"):
        Patches(0)
    with pytest.raises(ConfigError, match=r"Expected padding 'valid' or 'same'\. Received: padding='SAME'"):
        Patches(4, padding="SAME")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"at least \(4, 4\) pixels\. Received: image_size=\(3, 8\)"):
        Patches(4).compute_output_shape((None, 3, 8, 3))
    with pytest.raises(ConfigError, match=r"Expected 2 x 2 patches of 4 x 4 pixels .* patches.shape=\(1, 6, 48\)"):
        Patches(4).reconstruct(np.zeros((1, 6, 48), "float32"), (8, 8))


def test_projection_is_the_same_as_a_convolution():
    images = random_array(2, 8, 12, 3)
    encoder = PatchEncoder(5)
    tokens = to_numpy(encoder(Patches(4)(images)))
    convolution = keras.layers.Conv2D(5, 4, strides=4)
    convolution.build(images.shape)
    convolution.kernel.assign(ops.reshape(encoder.projection.kernel, (4, 4, 3, 5)))
    expected = to_numpy(convolution(images)).reshape(2, 6, 5) + to_numpy(encoder.position_embedding)
    np.testing.assert_allclose(tokens, expected, atol=1e-5)


def test_class_token_comes_first_with_its_own_position():
    encoder = PatchEncoder(4, use_class_token=True)
    patches = random_array(3, 2, 6)
    encoder.build(patches.shape)
    encoder.class_token.assign(np.full((1, 1, 4), 7.0))
    tokens = to_numpy(encoder(patches))
    np.testing.assert_allclose(tokens[:, 0], np.tile(7 + to_numpy(encoder.position_embedding)[:, 0], (3, 1)), atol=1e-6)


def test_attention_weights_come_with_the_same_output():
    x = random_array(2, 9, 16)
    for fused in (True, False, None):
        layer = SelfAttention(4, use_fused_attention=fused)
        y = to_numpy(layer(x))
        z, attention = layer(x, return_attention=True)
        np.testing.assert_allclose(to_numpy(z), y, atol=1e-5)
        assert attention.shape == (2, 4, 9, 9)
        np.testing.assert_allclose(to_numpy(attention).sum(-1), 1, atol=1e-5)
        assert to_numpy(attention).min() >= 0


def test_skips_are_inside():
    """With the last dense layer at zero, attention and MLP return their input: each owns its residual skip."""
    x = random_array(2, 5, 8)
    for layer, last in ((SelfAttention(2), "projection"), (MLP(16), "output_dense")):
        layer.build(x.shape)
        getattr(layer, last).kernel.assign(np.zeros(getattr(layer, last).kernel.shape))
        np.testing.assert_array_equal(to_numpy(layer(x)), x)


def test_mlp_by_hand():
    x = random_array(2, 5, 8)
    layer = MLP(16, activation="gelu_tanh")
    y = to_numpy(layer(x))
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    hidden = normed @ to_numpy(layer.hidden.kernel)
    gelu = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    np.testing.assert_allclose(y, x + gelu @ to_numpy(layer.output_dense.kernel), atol=1e-5)


def test_stochastic_depth_drops_whole_examples():
    x = random_array(64, 3, 8)
    layer = MLP(16, stochastic_depth_rate=0.5)
    layer.build(x.shape)
    layer.output_dense.bias.assign(np.ones(8))
    branch = to_numpy(layer(x, training=True)) - x
    is_dropped = (branch == 0).all(axis=(1, 2))
    assert 10 < is_dropped.sum() < 54
    np.testing.assert_allclose(branch[~is_dropped], 2 * (to_numpy(layer(x)) - x)[~is_dropped], atol=1e-5)


def test_dropout_is_active_in_training_only():
    x = random_array(2, 5, 8)
    layer = SelfAttention(2, attention_dropout_rate=0.5)
    y = to_numpy(layer(x))
    assert not np.allclose(to_numpy(layer(x, training=True)), y)
    np.testing.assert_array_equal(to_numpy(layer(x)), y)


def test_gradient_by_finite_differences():
    """The harness checks that gradients are there; this one, that they are right."""
    x = random_array(2, 4, 8)
    layer = TransformerBlock(2, 16)
    layer.build(x.shape)
    found = gradients(layer, x)
    for weight, gradient in zip(layer.trainable_weights, found, strict=True):
        values = to_numpy(weight)
        direction = random_array(*values.shape, seed=1)
        direction /= np.linalg.norm(direction)
        step = 1e-2
        sums = []
        for sign in (1, -1):
            weight.assign(values + sign * step * direction)
            sums.append(np.square(to_numpy(layer(x)).astype("float64")).sum())
        weight.assign(values)
        numeric = (sums[0] - sums[1]) / (2 * step)
        assert abs(numeric - (gradient * direction).sum()) < 1e-2 * max(1, abs(numeric)), weight.path


def test_heads_must_divide_the_width():
    with pytest.raises(ConfigError, match=r"Received: width=8, num_heads=3\. Change one of the two\."):
        SelfAttention(3).build((None, 5, 8))


def test_key_bias_never_changes_the_softmax():
    """So leaving it out, as EVA and DINOv3 do, is exact; and query and value biases are where they belong."""
    x = random_array(2, 5, 8)
    whole, split = SelfAttention(2), SelfAttention(2, use_key_bias=False)
    for layer in (whole, split):
        layer.build(x.shape)
    bias = random_array(24)
    for name in ("qkv", "projection"):
        getattr(split, name).kernel.assign(getattr(whole, name).kernel)
    whole.qkv.bias.assign(bias)
    split.query_value_bias.assign(np.concatenate([bias[:8], bias[16:]]))
    np.testing.assert_allclose(to_numpy(split(x)), to_numpy(whole(x)), atol=1e-5)


def test_no_token_attends_to_itself_in_local_attention():
    _, attention = SelfAttention(2, use_local_attention=True)(random_array(2, 5, 8), return_attention=True)
    assert np.einsum("bhnn->bhn", to_numpy(attention)).max() == 0
    np.testing.assert_allclose(to_numpy(attention).sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize(("style", "pairs"), [("interleaved", [(0, 1), (2, 3)]), ("half", [(0, 2), (1, 3)])])
def test_rotate_turns_pairs_and_keeps_lengths(style, pairs):
    heads = random_array(1, 1, 1, 4)
    angles = np.zeros(4, "float32")
    for (i, j), angle in zip(pairs, (0.3, 1.2), strict=True):
        angles[[i, j]] = angle
    turned = to_numpy(rotate(ops.convert_to_tensor(heads), (np.sin(angles)[None], np.cos(angles)[None]), style)).ravel()
    for (i, j), angle in zip(pairs, (0.3, 1.2), strict=True):
        before, after = complex(*heads.ravel()[[i, j]]), complex(*turned[[i, j]])
        assert after == pytest.approx(before * np.exp(1j * angle), abs=1e-6)


def test_rope_moves_attention_with_the_pattern():
    """Rotary attention between two tokens depends on their distance only: shifting all positions changes nothing."""
    from vitreous.positions import rope_tables

    x = random_array(2, 4, 16)
    layer = SelfAttention(2)
    sine, cosine = rope_tables("eva", (1, 9), 8, temperature=100.0)
    outputs = [to_numpy(layer(x, rope=(sine[i : i + 4], cosine[i : i + 4]))) for i in (0, 5)]
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-5)
    assert not np.allclose(outputs[0], to_numpy(layer(x)), atol=1e-4)


def test_patch_dropout_keeps_order_prefix_and_rope_rows():
    x = np.tile(np.arange(9, dtype="float32")[None, :, None], (64, 1, 4))
    table = np.tile(np.arange(9, dtype="float32")[:, None], (1, 2))
    layer = PatchDropout(0.5, num_prefix_tokens=1, seed=1)
    kept, rope = layer(x, rope=(table, table), training=True)
    rows = to_numpy(kept)[..., 0]
    assert rows.shape == (64, 5)
    assert (rows[:, 0] == 0).all()
    assert (np.diff(rows, axis=1) > 0).all()
    assert len({tuple(row) for row in rows.tolist()}) > 20
    np.testing.assert_array_equal(to_numpy(rope[0])[..., 0], rows)
    assert layer(x).shape == (64, 9, 4)


def test_shifted_copies():
    images = np.arange(16, dtype="float32").reshape(1, 4, 4, 1)
    shifted = to_numpy(shift_images(images, (1, 1)))
    assert shifted.shape == (1, 4, 4, 5)
    np.testing.assert_array_equal(shifted[..., :1], images)
    np.testing.assert_array_equal(shifted[0, 1:, 1:, 1], images[0, :3, :3, 0])  # moved down and right
    np.testing.assert_array_equal(shifted[0, :3, :3, 4], images[0, 1:, 1:, 0])  # moved up and left
    assert (shifted[0, 0, :, 1] == 0).all()


def test_positions_of_some_tokens_only():
    patches = np.zeros((1, 6, 12), "float32")
    for tokens, expected in (("all", 0), ("class", 2), ("patches", 3)):
        encoder = PatchEncoder(4, use_class_token=True, num_registers=2, position_tokens=tokens)
        encoder.build(patches.shape)
        encoder.registers.assign(np.zeros((1, 2, 4)))
        without = (to_numpy(encoder(patches))[0] == 0).all(axis=-1)
        assert without.sum() == expected, tokens
        assert not without[3:].any()


def test_positions_are_resized_to_another_grid():
    encoder = PatchEncoder(4, use_class_token=True, grid_size=(2, 2))
    encoder.build((None, 4, 12))
    encoder.position_embedding.assign(np.ones((1, 5, 4)))
    tokens = to_numpy(encoder(np.zeros((1, 15, 12), "float32"), grid_size=(3, 5)))
    np.testing.assert_allclose(tokens, 1, atol=1e-6)
    with pytest.raises(ConfigError, match=r"Cannot add positions\. Expected 4 patches\. Received: 15"):
        encoder(np.zeros((1, 15, 12), "float32"))


def test_a_grid_of_patches_is_encoded_as_its_patches():
    images = random_array(2, 8, 12, 3)
    encoder = PatchEncoder(5, use_class_token=True, grid_size=(2, 3))
    tokens = to_numpy(encoder(Patches(4)(images)))
    np.testing.assert_array_equal(to_numpy(encoder(Patches(4, as_grid=True)(images))), tokens)
    larger = random_array(2, 12, 8, 3)  # a grid says its own size: positions are resized to it
    np.testing.assert_array_equal(
        to_numpy(encoder(Patches(4, as_grid=True)(larger))), to_numpy(encoder(Patches(4)(larger), grid_size=(3, 2)))
    )


def test_encoder_without_grid_size_takes_as_many_patches_as_it_was_built_for():
    encoder = PatchEncoder(4)
    encoder.build((None, 6, 12))
    with pytest.raises(ConfigError, match=r"Cannot add positions\. Expected 6 patches\. Received: 15\. Pass images"):
        encoder(np.zeros((1, 15, 12), "float32"))


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float16", "float32"])
def test_reconstruct_keeps_the_dtype_and_never_overflows(dtype):
    images = np.random.default_rng(0).integers(200, 256, (2, 9, 8, 3)).astype(dtype)
    layer = Patches(4, strides=1, dtype=dtype)
    rebuilt = layer.reconstruct(layer(images), (9, 8))
    assert keras.backend.standardize_dtype(rebuilt.dtype) == dtype
    np.testing.assert_allclose(to_numpy(rebuilt), images, rtol=1e-6)


def test_reconstruct_rounds_means_of_integers():
    patches = np.array([[[0, 200], [255, 7]]], "uint8")  # the middle pixel is the mean of 200 and 255
    rebuilt = Patches((1, 2), strides=1, dtype="uint8").reconstruct(patches, (1, 3))
    np.testing.assert_array_equal(to_numpy(rebuilt).ravel(), [0, 228, 7])


@pytest.mark.parametrize(
    ("create", "message"),
    [
        (
            lambda: MLP(8, activation="relu"),
            r"Cannot use activation\. Expected 'gelu', 'gelu_tanh', 'quick_gelu' or 'silu'\. "
            r"Received: activation='relu'\. Pass one of them\.",
        ),
        (lambda: MLP(8, kind="gated"), r"Expected 'dense' or 'swiglu'\. Received: kind='gated'"),
        (lambda: MLP(8, norm="batch"), r"Expected 'layer' or 'rms'\. Received: norm='batch'"),
        (
            lambda: SelfAttention(2, norm_position="mid"),
            r"Expected 'pre' or 'post'\. Received: norm_position=",
        ),
        (lambda: SelfAttention(2, rope_style="x"), r"'interleaved' or 'half'\. Received: rope_style='x'"),
        (lambda: PatchEncoder(8, position="sin"), r"'learned', 'sincos' or 'none'\. Received: position='sin'"),
        (lambda: PatchEncoder(8, position_tokens="x"), r"'all', 'class' or 'patches'\. .*position_tokens='x'"),
        (lambda: SelfAttention(0), r"Cannot use num_heads\. Expected at least 1\. Received: num_heads=0\. Pass a"),
        (lambda: SelfAttention("2"), r"Cannot use num_heads\. Expected an integer\. Received: num_heads='2'"),
        (lambda: MLP(0), r"Cannot use hidden_dim\. Expected at least 1\. Received: hidden_dim=0"),
        (lambda: MLP(2.5), r"Cannot use hidden_dim\. Expected an integer\. Received: hidden_dim=2\.5"),
        (lambda: PatchEncoder(0), r"Cannot use projection_dim\. Expected at least 1\. Received: projection_dim=0"),
        (lambda: PatchEncoder(8, num_registers=-1), r"Expected 0 \(none\) or more\. Received: num_registers=-1"),
        (lambda: AttentionPool(0, 8), r"Cannot use num_heads\. Expected at least 1"),
        (lambda: AttentionPool(3, 8).build((None, 5, 8)), r"Cannot build AttentionPool\. .*width=8, num_heads=3"),
        (lambda: TransformerBlock(2, 8, num_parallel=0), r"Expected at least 1\. Received: num_parallel=0"),
        (lambda: ConvolutionalStem(3, 8), r"Expected a power of two, 2 or more\. Received: patch_size=3"),
        (
            lambda: ConvolutionalStem(4, 8, depths=(1, 1, 1)),
            r"Expected stem_depths of up to 2 numbers, .* Received: stem_depths=\(1, 1, 1\)\. Pass fewer numbers",
        ),
        (lambda: ConvolutionalStem(4, 8, depths=(1, -1)), r"Received: stem_depths=\(1, -1\)"),
        (lambda: ConvolutionalStem(4, 8, activation="relu"), r"Received: activation='relu'"),
        (lambda: MLP(8, dropout_rate=1), r"Cannot use dropout_rate\. Expected a value in \[0, 1\)\. .*rate=1\. Pass"),
        (
            lambda: SelfAttention(2, attention_dropout_rate=-0.1),
            r"value in \[0, 1\)\. Received: attention_dropout_rate=",
        ),
        (lambda: MLP(8, stochastic_depth_rate=2.0), r"value in \[0, 1\)\. Received: stochastic_depth_rate=2\.0"),
        (lambda: PatchDropout(1.0), r"Cannot use rate\. Expected a value in \[0, 1\)\. Received: rate=1\.0"),
        (lambda: MLP(8, layer_scale=-0.1), r"Expected 0 \(none\) or more\. Received: layer_scale=-0\.1"),
        (
            lambda: Patches(4)(keras.Input((None, None, 3))),
            r"with H, W and C known\. Received: shape=\(None, None, None, 3\)\. Name the size, such as keras\.Input",
        ),
        (lambda: Patches(4)(np.zeros((8, 8, 3), "float32")), r"shape \(B, H, W, C\).* Received: shape=\(8, 8, 3\)"),
        (
            lambda: PatchEncoder(4)(keras.Input((None, 12))),
            r"Expected shape \(B, N, patch_dim\) .* Received: patches\.shape=\(None, None, 12\)",
        ),
    ],
)
def test_layers_refuse(create, message):
    with pytest.raises(ConfigError, match=message):
        create()
