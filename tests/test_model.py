from pathlib import Path

import keras
import numpy as np
import pytest
from layer_harness import random_array, to_numpy

from vitreous.errors import ConfigError, UnknownNameError
from vitreous.model import VisionTransformer, create_model, create_predict_function, normalize_images
from vitreous.registry import get_spec
from vitreous.spec import InputSpec, ViTConfig

DATA = Path(__file__).parent / "data"
SMALL = ViTConfig(image_size=8, patch_size=4, projection_dim=16, num_blocks=2, num_heads=2, num_classes=5)


def assign_timm(model, weights):
    """Puts a timm ViT's tensors into ours: dense kernels transposed, the patch filter laid out as (P, P, C, D)."""

    def dense(layer, name):
        layer.kernel.assign(weights[f"{name}.weight"].T)
        layer.bias.assign(weights[f"{name}.bias"])

    def norm(layer, name):
        layer.gamma.assign(weights[f"{name}.weight"])
        layer.beta.assign(weights[f"{name}.bias"])

    encoder = model.patch_encoder
    filters = weights["patch_embed.proj.weight"]
    encoder.projection.kernel.assign(filters.transpose(2, 3, 1, 0).reshape(-1, filters.shape[0]))
    encoder.projection.bias.assign(weights["patch_embed.proj.bias"])
    encoder.class_token.assign(weights["cls_token"])
    encoder.position_embedding.assign(weights["pos_embed"])
    for i, block in enumerate(model.blocks):
        norm(block.attention.norm, f"blocks.{i}.norm1")
        dense(block.attention.qkv, f"blocks.{i}.attn.qkv")
        dense(block.attention.projection, f"blocks.{i}.attn.proj")
        norm(block.mlp.norm, f"blocks.{i}.norm2")
        dense(block.mlp.hidden, f"blocks.{i}.mlp.fc1")
        dense(block.mlp.output_dense, f"blocks.{i}.mlp.fc2")
    norm(model.norm, "norm")
    dense(model.head, "head")


@pytest.mark.parametrize("fused", [True, False])
def test_equals_timm(fused):
    """timm 1.0.31 VisionTransformer, width 48, 3 blocks, random weights: tokens, features and logits to 1e-5."""
    with np.load(DATA / "timm_vit_cls.npz") as arrays:
        reference = dict(arrays)
    weights = {key.removeprefix("weights/"): value for key, value in reference.items() if key.startswith("weights/")}
    model = VisionTransformer(
        ViTConfig(image_size=32, patch_size=8, projection_dim=48, num_blocks=3, num_heads=4, num_classes=7)
    )
    assign_timm(model, weights)
    assert model.count_params() == sum(value.size for value in weights.values())
    for block in model.blocks:
        block.attention.use_fused_attention = fused
    images = reference["images"]
    np.testing.assert_allclose(to_numpy(model.tokens(images)), reference["tokens"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(to_numpy(model.features(images)), reference["features"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(to_numpy(model(images)), reference["logits"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_class_token": False, "pooling": "mean"},
        {"pooling": "mean"},
        {"num_classes": 0},
        {"image_size": (8, 12), "patch_size": (4, 2), "num_channels": 1},
        {"image_size": (9, 7), "patch_size": 4, "patch_strides": 2},
        {"image_size": (9, 7), "patch_padding": "same"},
        {"stem": "convolution"},
        {"stem": "convolution", "stem_dim": 24, "stem_depths": (2, 1), "activation": "gelu"},
        {"stem": "shifted", "use_patch_bias": False},
        {"num_registers": 2, "position_tokens": "class", "pooling": "class_mean"},
        {"use_distillation_token": True, "use_distillation_head": True},
        {"position": "sincos", "norm": "rms", "final_norm": "pooled"},
        {"position": "none", "rope": "dinov3", "use_key_bias": False, "layer_scale": 0.1},
        {"rope": "eva", "mlp": "swiglu", "use_mlp_norm": True, "use_attention_norm": True, "activation": "silu"},
        {"use_class_token": False, "pooling": "map", "final_norm": "none"},
        {"num_parallel": 2, "use_qk_norm": True, "norm_position": "post", "use_pre_norm": True},
        {"use_local_attention": True, "patch_dropout_rate": 0.5, "use_qkv_bias": False, "use_mlp_bias": False},
    ],
    ids=str,
)
def test_save_and_load_is_bit_equal(changes, tmp_path):
    config = SMALL.replace(**({"patch_strides": None} | changes if "patch_size" in changes else changes))
    model = VisionTransformer(config, name="vit")
    if model.head is not None:
        model.head.kernel.assign(random_array(*model.head.kernel.shape))
    images = random_array(3, *config.image_size, config.num_channels)
    logits = to_numpy(model(images))
    assert logits.shape == (3, config.num_classes or 16)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.config == config
    assert [w.path for w in loaded.weights] == [w.path for w in model.weights]
    np.testing.assert_array_equal(to_numpy(loaded(images)), logits)
    twin = VisionTransformer.from_config(model.get_config())
    assert twin.get_config() == model.get_config()
    twin.set_weights(model.get_weights())
    np.testing.assert_array_equal(to_numpy(twin(images)), logits)


def test_tokens_features_and_attention_of_any_block():
    model = VisionTransformer(SMALL)
    images = random_array(2, 8, 8, 3)
    x = model.embed(images)
    for i, block in enumerate(model.blocks):
        x = block(x)
        np.testing.assert_allclose(to_numpy(model.tokens(images, i)), to_numpy(x), atol=1e-6)
    np.testing.assert_array_equal(to_numpy(model.tokens(images, -1)), to_numpy(model.tokens(images, 1)))
    np.testing.assert_allclose(to_numpy(model.tokens(images)), to_numpy(model.norm(x)), atol=1e-6)
    np.testing.assert_array_equal(to_numpy(model.features(images)), to_numpy(model.features(images, -1)))
    assert model.features(images, 0).shape == (2, 16)
    assert [a.shape for a in model.attention(images)] == [(2, 2, 5, 5)] * 2
    last, first = model.attention(images, [-1, 0])
    np.testing.assert_array_equal(to_numpy(first), to_numpy(model.attention(images)[0]))
    np.testing.assert_array_equal(to_numpy(last), to_numpy(model.attention(images)[1]))
    with pytest.raises(ConfigError, match=r"Expected an index from -2 to 1\. Received: block=2"):
        model.tokens(images, 2)


def test_mean_pooling_leaves_the_class_token_out():
    model = VisionTransformer(SMALL.replace(pooling="mean"))
    images = random_array(2, 8, 8, 3)
    np.testing.assert_allclose(
        to_numpy(model.features(images)), to_numpy(model.tokens(images))[:, 1:].mean(axis=1), atol=1e-6
    )


def test_logits_are_float32_in_mixed_precision():
    model = VisionTransformer(SMALL, dtype="mixed_bfloat16")
    assert keras.backend.standardize_dtype(model(random_array(2, 8, 8, 3)).dtype) == "float32"
    assert all(w.dtype == "float32" for w in model.trainable_weights)


def test_stochastic_depth_grows_linearly():
    model = VisionTransformer(SMALL.replace(num_blocks=3, stochastic_depth_rate=0.2))
    assert [block.mlp.stochastic_depth_rate for block in model.blocks] == [0.0, 0.1, 0.2]
    assert [block.attention.stochastic_depth_rate for block in model.blocks] == [0.0, 0.1, 0.2]


def test_predict_function_normalizes_and_reads_current_weights():
    model = VisionTransformer(SMALL)
    spec = InputSpec(image_size=8, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    predict = create_predict_function(model, spec)
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype="uint8")
    for _ in range(2):
        model.head.kernel.assign(random_array(*model.head.kernel.shape, seed=_))
        expected = (images / 255 - np.array(spec.mean)) / np.array(spec.std)
        np.testing.assert_allclose(to_numpy(normalize_images(images, spec)), expected, atol=1e-5)
        np.testing.assert_allclose(predict(images), to_numpy(model(expected.astype("float32"))), atol=1e-4)


def test_create_model():
    model = create_model("vit_pico_patch2_8", num_classes=3, image_size=(8, 10), num_channels=1, num_blocks=1)
    assert model.name == "vit_pico_patch2_8"
    assert to_numpy(model(random_array(2, 8, 10, 1))).shape == (2, 3)
    with pytest.raises(
        ConfigError, match=r"Expected images of shape .* \(B, 8, 10, 1\)\. Received: images.shape=\(2, 8, 8, 1\)"
    ):
        model(random_array(2, 8, 8, 1))
    with pytest.raises(
        UnknownNameError,
        match=r"Unknown model\. Received: model='vit_tiny_patch16_242'\. Nearest: vit_.*\. "
        r"Expected the name of an existing model\. List them all with: vitreous models",
    ):
        create_model("vit_tiny_patch16_242")
    with pytest.raises(
        ConfigError,
        match=r"image height divisible by the patch size\. Received: image_size=\(100, 100\), patch_size=\(16, 16\)\. "
        r"Pass 96 or 112 pixels",
    ):
        create_model("vit_tiny_patch16_224", image_size=100)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_heads": 3},
            r"Expected projection_dim divisible by num_heads\. Received: projection_dim=16, num_heads=3",
        ),
        (
            {"dropout_rate": 1.0},
            r"Cannot use dropout_rate\. Expected a value in \[0, 1\)\. Received: dropout_rate=1\.0",
        ),
        ({"pooling": "max"}, r"Expected 'class', 'mean', 'map' or 'class_mean'\. Received: pooling='max'"),
        ({"use_class_token": False}, r"Cannot pool the class token\..* Pass pooling='mean'"),
        ({"num_blocks": 0}, r"Cannot use num_blocks\. Expected at least 1\. Received: num_blocks=0"),
        ({"image_size": (8, 2.5)}, r"Cannot use image_size\. Expected an integer, or two .*image_size=\(8, 2\.5\)"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ConfigError, match=message):
        SMALL.replace(**changes)


def test_records_round_trip():
    assert ViTConfig.from_dict(SMALL.to_dict()) == SMALL
    spec = get_spec("vit_tiny_patch16_224", num_classes=7)
    assert type(spec).from_dict(spec.to_dict()) == spec
    with pytest.raises(
        UnknownNameError, match=r"Unknown key of ViTConfig\. Received: .*'num_layers'.* Nearest: num_classes"
    ):
        ViTConfig.from_dict({"num_layers": 3})


@pytest.mark.parametrize(
    "changes", [{}, {"position": "sincos"}, {"position": "none", "rope": "dinov3"}, {"rope": "eva"}]
)
def test_dynamic_size(changes):
    """A model with dynamic size gives at its own size what a fixed one gives, and takes other sizes."""
    config = SMALL.replace(has_dynamic_size=True, **changes)
    model, fixed = VisionTransformer(config), VisionTransformer(SMALL.replace(**changes))
    fixed.set_weights(model.get_weights())
    images = random_array(2, 8, 8, 3)
    np.testing.assert_array_equal(to_numpy(model.features(images)), to_numpy(fixed.features(images)))
    assert model.tokens(random_array(2, 16, 12, 3)).shape == (2, 1 + 4 * 3, 16)
    with pytest.raises(ConfigError, match=r"image height divisible by the patch size"):
        model(random_array(2, 10, 8, 3))
    with pytest.raises(ConfigError, match=r"or with has_dynamic_size=True"):
        fixed(random_array(2, 16, 8, 3))
    if not changes:  # learned positions are resized in float32
        half = VisionTransformer(config, dtype="mixed_bfloat16")
        half.set_weights(model.get_weights())
        larger = random_array(2, 16, 12, 3)
        features = to_numpy(keras.ops.cast(half.features(larger), "float32"))
        np.testing.assert_allclose(features, to_numpy(model.features(larger)), atol=0.2)


def test_distillation_heads():
    model = VisionTransformer(SMALL.replace(use_distillation_token=True, use_distillation_head=True))
    model.head.bias.assign(np.ones(5))
    model.distillation_head.bias.assign(np.full(5, 3.0))
    images = random_array(2, 8, 8, 3)
    np.testing.assert_allclose(to_numpy(model(images)), 2)
    first, second = model.classify_both(model.tokens(images))
    np.testing.assert_allclose([to_numpy(first), to_numpy(second)], [np.ones((2, 5)), np.full((2, 5), 3.0)])


def test_patch_dropout_in_training_only():
    model = VisionTransformer(SMALL.replace(patch_dropout_rate=0.5, rope="eva", stochastic_depth_rate=0.1))
    model.head.kernel.assign(random_array(*model.head.kernel.shape))
    images = random_array(2, 8, 8, 3)
    assert not np.allclose(to_numpy(model(images, training=True)), to_numpy(model(images)))
    np.testing.assert_array_equal(to_numpy(model(images)), to_numpy(model(images)))


@pytest.mark.parametrize("has_dynamic_size", [False, True])
def test_images_must_be_normalized_and_of_known_size(has_dynamic_size):
    model = VisionTransformer(SMALL.replace(has_dynamic_size=has_dynamic_size))
    with pytest.raises(
        ConfigError,
        match=r"Expected normalised images of a floating point dtype\. Received: images\.dtype=uint8\. "
        r"Pass vitreous\.model\.normalize_images\(images, input_spec\)\.",
    ):
        model(np.zeros((2, 8, 8, 3), "uint8"))
    with pytest.raises(ConfigError, match=r"images\.shape=\(None, None, None, 3\)\. .*H and W must be known"):
        model(keras.Input((None, None, 3)))
    with pytest.raises(ConfigError, match=r"Expected images of shape \(B, H, W, C\) .* images\.shape=\(8, 8, 3\)"):
        model(np.zeros((8, 8, 3), "float32"))
    assert model(keras.Input((8, 8, 3))).shape == (None, 5)


def test_features_by_another_pooling():
    model = VisionTransformer(SMALL.replace(num_registers=1, pooling="class_mean"))
    images = random_array(2, 8, 8, 3)
    both = to_numpy(model.features(images))
    np.testing.assert_array_equal(to_numpy(model.features(images, pooling="class")), both[:, :16])
    np.testing.assert_array_equal(to_numpy(model.features(images, pooling="mean")), both[:, 16:])
    without = VisionTransformer(SMALL.replace(use_class_token=False, pooling="mean"))
    with pytest.raises(ConfigError, match=r"Cannot pool the class token of .* Pass pooling='mean'"):
        without.features(images, pooling="class")
