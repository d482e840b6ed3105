"""The ONNX graph: every architecture gives the numbers of the Keras model, in both runtimes."""

import keras
import numpy as np
import onnxruntime
import pytest
from weight_references import NAMES, place

from vitreous.errors import ConfigError, WeightsError
from vitreous.evaluation import sigmoid, softmax
from vitreous.export.graph import build_graph
from vitreous.export.runtimes import openvino_core
from vitreous.model import VisionTransformer, create_predict_function
from vitreous.spec import InputSpec, ViTConfig
from vitreous.weights import import_weights
from vitreous.weights.load import variables

pytestmark = pytest.mark.usefixtures("quick_compile")

BASE = {
    "image_size": 16,
    "patch_size": 8,
    "projection_dim": 16,
    "num_blocks": 2,
    "num_heads": 2,
    "mlp_dim": 24,
    "num_classes": 5,
}
KINDS = {  # each has several things that no reference model has
    "shifted stem with overlap, local attention, parallel branches": {
        "stem": "shifted",
        "patch_strides": 4,
        "use_local_attention": True,
        "num_parallel": 2,
    },
    "convolutional stem, RMS, qk-norm, rope": {
        "stem": "convolution",
        "image_size": (16, 24),
        "use_class_token": False,
        "pooling": "mean",
        "norm": "rms",
        "use_qk_norm": True,
        "rope": "dinov3",
    },
    "stem with residual convolutions and a width of its own, SiLU": {
        "stem": "convolution",
        "stem_dim": 10,
        "stem_depths": (2, 0, 1),
        "image_size": (16, 24),
        "activation": "silu",
        "use_patch_bias": False,
    },
    "zeros around, post-norm, MAP, SwiGLU": {
        "patch_strides": 5,
        "patch_padding": "same",
        "image_size": (15, 18),
        "norm_position": "post",
        "layer_scale": 0.1,
        "pooling": "map",
        "mlp": "swiglu",
        "use_mlp_norm": True,
    },
    "overlap, two heads, quick GELU": {
        "patch_strides": 4,
        "use_distillation_token": True,
        "use_distillation_head": True,
        "final_norm": "pooled",
        "activation": "quick_gelu",
        "use_attention_norm": True,
        "use_pre_norm": True,
    },
    "local attention, qk-norm, rope, registers, silu": {
        "use_local_attention": True,
        "use_qk_norm": True,
        "rope": "eva",
        "rope_reference_grid": (3, 3),
        "num_registers": 2,
        "position_tokens": "class",
        "use_key_bias": False,
        "activation": "silu",
    },
    "grey, fixed positions, class and mean": {
        "num_channels": 1,
        "position": "sincos",
        "pooling": "class_mean",
        "final_norm": "pooled",
        "activation": "gelu_tanh",
    },
}


@pytest.fixture(autouse=True)
def quick_draws(monkeypatch):
    """Has NumPy draw the first weights: jax compiles a draw for each shape, which takes longer than all the rest."""
    rng = np.random.default_rng(0)

    def draw(self, shape, dtype=None, **options):
        return keras.ops.convert_to_tensor(rng.normal(0, 0.02, shape).astype("float32"))

    for kind in (keras.initializers.TruncatedNormal, keras.initializers.VarianceScaling):
        monkeypatch.setattr(kind, "__call__", draw)


def weights_of(model):
    return {path: keras.ops.convert_to_numpy(v) for path, v in variables(model).items()}


def shaken(config):
    """A model whose every weight counts: none is 0 or 1 as it was initialised."""
    model = VisionTransformer(config)
    rng = np.random.default_rng(0)
    for v in model.trainable_variables:
        v.assign(keras.ops.convert_to_numpy(v) + rng.normal(0, 0.1, v.shape))
    return model


def compare(model, **options):
    """Asserts that the graph in onnxruntime and in OpenVINO answers as the model does; returns the graph."""
    config = model.config
    channels = config.num_channels
    mean, std = (0.4, 0.5, 0.6)[:channels], (0.2, 0.25, 0.3)[:channels]
    spec = InputSpec(image_size=config.image_size, num_channels=channels, mean=mean, std=std)
    images = np.random.default_rng(1).integers(0, 256, (3, *config.image_size, channels)).astype("uint8")
    expected = create_predict_function(model, spec)(images)
    graph = build_graph(config, weights_of(model), spec, temperature=1.7, **options)
    data = graph.SerializeToString()
    logits, shares = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(
        None, {"images": images}
    )
    core = openvino_core()
    compiled = core.compile_model(core.read_model(data), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    tolerance = 1e-5 * max(1, np.abs(expected).max())
    np.testing.assert_allclose(logits, expected, atol=tolerance)
    np.testing.assert_allclose(compiled(images)["logits"], expected, atol=tolerance)
    to_shares = sigmoid if options.get("is_multi_label") else softmax
    np.testing.assert_allclose(shares, to_shares(expected / 1.7), atol=1e-5)
    assert np.abs(expected).max() > 0.05
    return graph


@pytest.mark.parametrize("kind", KINDS)
def test_architecture(kind):
    compare(shaken(ViTConfig(**{**BASE, **KINDS[kind]})))


@pytest.mark.parametrize("name", NAMES)
def test_reference(name, tmp_path):
    compare(import_weights(place(name, tmp_path)[0]).model)


def test_several_labels_and_a_fixed_batch():
    graph = compare(shaken(ViTConfig(**BASE)), is_multi_label=True, batch_size=3)
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 3


def test_half_precision_is_half_the_size_and_close():
    model = shaken(ViTConfig(**BASE))
    spec = InputSpec(image_size=16)
    whole, half = (build_graph(model.config, weights_of(model), spec, dtype=d) for d in ("float32", "float16"))
    assert half.ByteSize() < 0.7 * whole.ByteSize()
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype("uint8")
    answers = [
        onnxruntime.InferenceSession(g.SerializeToString(), providers=["CPUExecutionProvider"]).run(
            None, {"images": images}
        )[0]
        for g in (whole, half)
    ]
    assert 0 < np.abs(answers[0] - answers[1]).max() < 1e-2
    assert answers[1].dtype == np.float32


def test_the_last_block_computes_only_what_is_read():
    model = shaken(ViTConfig(**BASE))
    graph = build_graph(model.config, weights_of(model), InputSpec(image_size=16))
    slices = [node for node in graph.graph.node if node.op_type == "Slice"]
    assert [node.name.split("/")[0] for node in slices] == ["block_1", "block_1"]


def test_what_cannot_be_exported():
    config = ViTConfig(**BASE)
    weights = weights_of(VisionTransformer(config))
    spec = InputSpec(image_size=16)
    with pytest.raises(ConfigError, match=r"Expected a classifier. Received: num_classes=0"):
        build_graph(config.replace(num_classes=0), weights, spec)
    with pytest.raises(ConfigError, match=r"Received: config.image_size=\(16, 16\), input_spec.image_size=\(8, 8\)"):
        build_graph(config, weights, InputSpec(image_size=8))
    with pytest.raises(WeightsError, match=r"Expected a place for every weight. Received: extra, and 0 more"):
        build_graph(config, {**weights, "extra": np.zeros(1)}, spec)
    del weights["head/bias"]
    with pytest.raises(WeightsError, match=r"Expected a weight head/bias. Received: none of that name"):
        build_graph(config, weights, spec)
    huge = {"head/kernel": np.broadcast_to(np.zeros(1, "float32"), (2**20, 2**10))}
    with pytest.raises(ConfigError, match=r"Expected weights of less than 2 GB.*Received: 4.0 GB"):
        build_graph(config, huge, spec)
