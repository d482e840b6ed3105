"""What explanations compute: traces, gradients, maps. tests/test_backends.py runs this on every backend."""

import functools
import re

import keras
import numpy as np
import pytest
from layer_harness import to_numpy

from vitreous.errors import ConfigError, ImageError, UnknownNameError
from vitreous.explanation import METHODS, Explainer, explain, list_methods, maps
from vitreous.explanation.perturbation import create_windows, fill_image, find_edges, spread, sum_cells, take_out
from vitreous.explanation.trace import one_hot
from vitreous.layers import AttentionPool, SelfAttention, TransformerBlock
from vitreous.model import VisionTransformer
from vitreous.patches import PatchGrid
from vitreous.spec import InputSpec, ViTConfig

pytestmark = pytest.mark.usefixtures("quick_compile")

SIZE = (16, 24)
GRID = (2, 3)


@functools.cache
def explainer_of(name):
    """The explainer of a model of the zoo; what one test compiles, another uses."""
    return make_explainer(**ZOO[name])


def make_explainer(**changes):
    """A small model whose weights are all random, the head's and the scales' too, and its explainer."""
    keras.utils.set_random_seed(0)
    options = {"image_size": SIZE, "patch_size": 8, "projection_dim": 16, "num_blocks": 2, "num_heads": 2}
    config = ViTConfig(**{**options, "num_classes": 5, **changes})
    model = VisionTransformer(config)
    generator = np.random.default_rng(0)
    for weight in model.weights:
        if len(weight.shape) and "seed" not in weight.path:
            weight.assign(to_numpy(weight.value) + generator.normal(0, 0.2, weight.shape))
    half = (0.5,) * config.num_channels
    spec = InputSpec(image_size=config.image_size, num_channels=config.num_channels, mean=half, std=half)
    return Explainer(model, input_spec=spec)


def make_image(size=SIZE, channels=3):
    return np.random.default_rng(1).integers(0, 256, (*size, channels), dtype="uint8")


ZOO = {
    "class": {},
    "mean": {"use_class_token": False, "num_registers": 2, "pooling": "mean", "rope": "eva", "position": "none"}
    | {"mlp": "swiglu", "norm_position": "post", "use_key_bias": False},
    "class and mean": {"num_registers": 1, "pooling": "class_mean", "position": "sincos", "norm": "rms"}
    | {"stem": "convolution", "use_pre_norm": True, "num_channels": 1, "layer_scale": 0.5},
    "two heads": {"use_distillation_token": True, "use_distillation_head": True, "final_norm": "pooled"}
    | {"num_parallel": 2, "stem": "shifted", "use_local_attention": True},
    "map": {"use_class_token": False, "pooling": "map", "use_qk_norm": True, "rope": "dinov3"}
    | {"patch_strides": (8, 4), "patch_padding": "same", "activation": "quick_gelu"},
}


@pytest.mark.parametrize("name", ZOO)
def test_second_pass_gives_the_same_answer(name):
    explainer = explainer_of(name)
    config = explainer.config
    image = make_image(channels=config.num_channels)
    answer = explainer.predict(image[None])[0]
    target = int(answer.argmax())
    trace = explainer.trace(image, target, 2)
    np.testing.assert_allclose(trace.logits, answer, atol=1e-4, rtol=0)
    heads, tokens = 2 * config.num_parallel, config.num_tokens
    assert trace.attention.shape == trace.attention_gradients.shape == (2, heads, tokens, tokens)
    np.testing.assert_allclose(trace.attention.sum(axis=-1), 1, atol=1e-5)
    assert trace.tokens.shape == trace.token_gradients.shape == (2, tokens, 16)
    assert np.abs(trace.attention_gradients[0]).max() > 0
    rows, columns = config.grid_size
    if config.pooling == "map":
        np.testing.assert_allclose(trace.pool_attention.sum(axis=-1), 1, atol=1e-5)
        assert trace.pool_gradients.shape == (2, rows * columns)
    else:
        assert trace.pool_attention is None
    names = [name for name in METHODS if name not in ("integrated-gradients", "occlusion")]
    for each in explainer.explain(image, methods=names, steps=2):
        assert each.class_index == target
        assert each.class_name == f"class {target}"
        assert each.is_answer
        np.testing.assert_array_equal(each.logits, answer)
        if METHODS[each.method].has_map:
            assert each.map.shape == (rows, columns)
            assert each.map.dtype == "float32"
            assert np.isfinite(each.map).all()
            assert each.map.min() >= -1e-6, each.method
            assert each.map.max() > 0 or each.method == "grad-cam"


def along(gradients):
    """A small step along gradients: float32 tells the change that it makes."""
    return (5e-3 * gradients / np.abs(gradients).max()).astype("float32")


def test_gradients_are_those_of_the_attention_weights():
    """A small step in the weights changes the logit by gradient times step."""
    explainer = explainer_of("class")
    image = make_image()
    trace = explainer.trace(image, 3)
    model, pixels = explainer.model, explainer.normalize(image[None])
    steps = along(trace.attention_gradients)

    def logit(sign):
        x, rope = model.enter(keras.ops.convert_to_tensor(pixels))
        for block, step in zip(model.blocks, steps, strict=True):
            x = block(x, rope=rope, attention_tap=keras.ops.convert_to_tensor(sign * step[None]))
        return float(to_numpy(model.classify(model.leave(x)))[0, 3])

    expected = (trace.attention_gradients * steps).sum()
    assert logit(1) - logit(-1) == pytest.approx(2 * expected, rel=2e-2)


def test_gradients_of_tokens_and_of_pooling():
    explainer = explainer_of("map")
    image = make_image()
    trace = explainer.trace(image, 1)
    model = explainer.model
    move = along(trace.token_gradients[1])
    rope = model.enter(keras.ops.convert_to_tensor(explainer.normalize(image[None])))[1]
    weight_move = along(trace.pool_gradients)

    def logit(sign):
        x = model.blocks[1](keras.ops.convert_to_tensor((trace.tokens[1] + sign * move)[None]), rope=rope)
        tap = keras.ops.convert_to_tensor(sign * weight_move[None])
        return float(to_numpy(model.classify(model.leave(x), attention_tap=tap))[0, 1])

    expected = (trace.token_gradients[1] * move).sum() + (trace.pool_gradients * weight_move).sum()
    assert logit(1) - logit(-1) == pytest.approx(2 * expected, rel=2e-2)


def test_taps_of_zeros_change_nothing():
    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype("float32")
    layer = SelfAttention(2)
    plain, attention = (to_numpy(y) for y in layer(x, return_attention=True))
    np.testing.assert_allclose(to_numpy(layer(x, attention_tap=np.zeros((2, 2, 5, 5), "float32"))), plain, atol=1e-6)
    block = TransformerBlock(2, 16, num_parallel=3)
    _, heads = block(x, return_attention=True)
    assert heads.shape == (2, 6, 5, 5)
    first = to_numpy(block.attentions[1](x, return_attention=True)[1])
    np.testing.assert_allclose(to_numpy(heads)[:, 2:4], first, atol=1e-6)
    pool = AttentionPool(2, 16)
    pooled, weights = pool(x, return_attention=True)
    assert weights.shape == (2, 2, 5)
    tapped = pool(x, attention_tap=np.zeros((2, 2, 5), "float32"))
    np.testing.assert_allclose(to_numpy(tapped), to_numpy(pooled), atol=1e-6)
    assert attention.shape == (2, 2, 5, 5)


def relevance_by_hand(trace, parallel=1):
    """Chefer et al. 2021, element by element."""
    count = trace.attention.shape[-1]
    result = np.eye(count)
    for weights, gradients in zip(trace.attention, trace.attention_gradients, strict=True):
        bar = np.zeros((count, count))
        for i in range(count):
            for j in range(count):
                products = [max(0.0, float(g[i, j]) * float(a[i, j])) for a, g in zip(weights, gradients, strict=True)]
                bar[i, j] = parallel * sum(products) / len(products)
        result = result + bar @ result
    return result


@pytest.mark.parametrize(("name", "steps"), [*((name, 1) for name in ZOO), ("class", 3)])
def test_relevance_equals_chefer(name, steps):
    explainer = explainer_of(name)
    image = make_image(channels=explainer.config.num_channels)
    (found,) = explainer.explain(image, methods=["relevance"], target=2, steps=steps)
    trace = explainer.trace(image, 2, steps)
    expected = relevance_by_hand(trace, explainer.config.num_parallel)
    np.testing.assert_allclose(found.arrays["relevance"], expected, rtol=1e-4, atol=1e-6)
    prefix = explainer.config.num_prefix_tokens
    patches = expected[prefix:, prefix:]
    if name == "map":
        row = np.maximum(trace.pool_attention * trace.pool_gradients, 0).mean(axis=0) @ patches
    else:
        mean = (patches - np.eye(len(patches))).mean(axis=0)
        row = {
            "class": expected[0, prefix:],
            "mean": mean,
            "class and mean": (expected[0, prefix:] + mean) / 2,
            "two heads": (expected[0, prefix:] + expected[1, prefix:]) / 2,
        }[name]
    np.testing.assert_allclose(found.values(), row, rtol=1e-3, atol=1e-6)
    assert (found.class_index, found.is_answer) == (2, bool(found.logits.argmax() == 2))


def test_steps_average_gradients_while_attention_grows():
    explainer = explainer_of("class")
    image = make_image()
    trace = explainer.trace(image, 0, 2)
    model, pixels = explainer.model, keras.ops.convert_to_tensor(explainer.normalize(image[None]))
    attention = trace.attention
    move = along(trace.attention_gradients)

    def logit(share, sign):
        x, rope = model.enter(pixels)
        for block, weights, step in zip(model.blocks, attention, move, strict=True):
            x = block(x, rope=rope, attention_tap=(share - 1) * weights[None] + sign * step[None])
        return float(to_numpy(model.classify(model.leave(x)))[0, 0])

    changes = [(logit(share, 1) - logit(share, -1)) / 2 for share in (0.25, 0.75)]
    assert (trace.attention_gradients * move).sum() == pytest.approx(np.mean(changes), rel=2e-2)


def test_rollout():
    explainer = explainer_of("mean")
    (found,) = explainer.explain(make_image(), methods=["rollout"])
    rollout = found.arrays["rollout"]
    np.testing.assert_allclose(rollout.sum(axis=1), 1, atol=1e-5)
    expected = np.eye(len(rollout))
    for block in explainer.trace(make_image()).attention:
        mixed = 0.5 * block.mean(axis=0) + 0.5 * np.eye(len(rollout))
        expected = mixed @ expected
    np.testing.assert_allclose(rollout, expected, atol=1e-5)
    np.testing.assert_allclose(found.values(), expected[2:, 2:].mean(axis=0), atol=1e-5)


def test_rollout_normalises_rows():
    attention = np.random.default_rng(0).random((3, 2, 4, 4))
    np.testing.assert_allclose(maps.roll_out(attention).sum(axis=1), 1, atol=1e-6)


def test_attention_of_a_block_and_a_head():
    explainer = explainer_of("class")
    (found,) = explainer.explain(make_image(), methods=["attention"], block=0, head=-1)
    attention = found.arrays["attention"]
    np.testing.assert_allclose(attention.sum(axis=-1), 1, atol=1e-5)
    np.testing.assert_allclose(found.values(), attention[0, 1, 0, 1:], atol=1e-6)
    np.testing.assert_allclose(found.arrays["heads"][1, 0], attention[1, 0, 0, 1:].reshape(GRID), atol=1e-6)
    assert found.note == "block 0 of 0 to 1, head 1"


def test_methods_by_images():
    """Integrated gradients add up to the change of the logit; occlusion is the fall that a patch leaves."""
    explainer = explainer_of("class")
    image = make_image()
    gradients, occlusion = explainer.explain(image, methods=["integrated-gradients", "occlusion"], target=4)
    nothing = fill_image(image, "mean")
    full, empty = explainer.predict(np.stack([image, nothing]))[:, 4]
    assert gradients.map.sum() == pytest.approx(full - empty, abs=0.03 * max(1, abs(full - empty)))
    np.testing.assert_allclose(gradients.arrays["pixels"][:8, 16:].sum(), gradients.map[0, 2], rtol=1e-4)
    without = image.copy()
    without[8:, :8] = nothing[8:, :8]
    assert occlusion.map[1, 0] == pytest.approx(full - explainer.predict(without[None])[0, 4], abs=1e-4)
    assert occlusion.is_signed and gradients.is_signed
    (blurred,) = explainer.explain(image, methods=["occlusion"], target=4, fill="blur")
    assert "blurred" in blurred.note
    assert not np.array_equal(blurred.map, occlusion.map)


def test_another_size_and_grey_images():
    explainer = make_explainer(has_dynamic_size=True, num_blocks=1)
    explainer = Explainer(explainer.model, input_spec=InputSpec(image_size=(24, 16)))
    image = np.random.default_rng(0).integers(0, 256, (50, 33), dtype="uint8")  # grey, any size
    found = explainer.explain(image, methods=["relevance", "positions", "patches"])
    assert found[0].map.shape == (3, 2)
    assert found[0].image.shape == (24, 16, 3)
    assert found[1].arrays["similarity"].shape == (3, 2, 3, 2)
    assert found[2].arrays["patches"].shape == (3, 2, 8, 8, 3)


def test_positions():
    for name, kind in (("class", "learned"), ("class and mean", "sincos"), ("mean", "rotary")):
        similarity, found = maps.compare_positions(explainer_of(name).model, GRID)
        assert found == kind
        np.testing.assert_allclose(np.diag(similarity), 1, atol=1e-5)
        np.testing.assert_allclose(similarity, similarity.T, atol=1e-6)
    assert similarity[0, 1] > similarity[0, 2]  # rotary: near patches are more alike
    with pytest.raises(ConfigError, match="Expected a model that has some"):
        maps.compare_positions(make_explainer(position="none", num_blocks=1).model, GRID)


def test_filters_and_features():
    for name, shape in (("class", (8, 8, 3)), ("two heads", (8, 8, 3)), ("class and mean", (3, 3, 1))):
        explainer = explainer_of(name)
        image = make_image(channels=shape[2])
        filters, features = explainer.explain(image, methods=["filters", "pca"])
        assert filters.arrays["filters"].shape[1:] == shape
        assert filters.arrays["components"].shape[1:] == shape
        assert filters.arrays["variance_shares"].sum() <= 1 + 1e-5
        colours = features.arrays["colours"]
        assert colours.shape == (*GRID, 3)
        assert colours.min() >= 0 and colours.max() <= 1


def test_components():
    generator = np.random.default_rng(0)
    direction = np.array([3, 4, 0, 0]) / 5
    points = generator.normal(size=(50, 1)) * direction * 10 + generator.normal(size=(50, 4)) * 0.01
    scores, components, shares = maps.find_components(points)
    np.testing.assert_allclose(components[0], direction, atol=1e-2)
    assert shares[0] > 0.999
    assert scores.shape == (50, 3)
    scores, _, shares = maps.find_components(np.ones((5, 2)))
    assert scores.shape == (5, 2)
    assert not scores.any() and not shares.any()


@pytest.mark.parametrize(
    ("grid", "rows", "columns"),
    [
        (PatchGrid(size=(8, 8), strides=(8, 8)), [0, 8, 16], [0, 8, 16, 24]),
        (PatchGrid(size=(8, 8), strides=(8, 4)), [0, 8, 16], [0, 6, 10, 14, 18, 24]),
        (PatchGrid(size=(8, 8), strides=(8, 8), padding="same"), [0, 8, 16], [0, 8, 16, 24]),
        (PatchGrid(size=(6, 10), strides=(6, 10)), [0, 6, 16], [0, 10, 24]),
    ],
)
def test_cells_part_the_image(grid, rows, columns):
    edges = find_edges(grid, SIZE)
    assert [edge.tolist() for edge in edges] == [rows, columns]
    count = (len(rows) - 1, len(columns) - 1)
    values = np.arange(count[0] * count[1]).reshape(count)
    pixels = spread(values, edges)
    assert pixels.shape == SIZE
    areas = sum_cells(np.ones(SIZE), edges)
    assert areas.sum() == SIZE[0] * SIZE[1]
    np.testing.assert_array_equal(sum_cells(pixels, edges), values * areas)


def test_parts_taken_out():
    image = make_image()
    edges = find_edges(PatchGrid(size=(8, 8), strides=(8, 8)), SIZE)
    is_out = np.zeros((1, 2, 3), bool)
    is_out[0, 1, 2] = True
    (changed,) = take_out(image, fill_image(image, "mean"), is_out, edges)
    assert len(np.unique(changed[8:, 16:].reshape(-1, 3), axis=0)) == 1
    np.testing.assert_array_equal(changed[:8], image[:8])
    np.testing.assert_array_equal(changed[:, :16], image[:, :16])
    assert fill_image(image, "blur").std() < 0.5 * image.std()
    for size, most in (((14, 14), 64), ((8, 8), 64), ((3, 30), 10), ((1, 1), 1)):
        windows = create_windows(size, most)
        assert len(windows) <= most
        np.testing.assert_array_equal(windows.sum(axis=0), 1)
    assert len(create_windows((14, 14), 64)) == 49


def test_model_without_a_head():
    explainer = make_explainer(num_classes=0, num_blocks=1)
    found = explainer.explain(make_image())
    names = [each.method for each in found]
    assert names == ["patches", "positions", "filters", "attention", "rollout", "pca"]
    assert {each.class_name for each in found} == {None}
    assert found[0].logits.size == 0
    for options, text in (
        ({"methods": ["relevance"]}, "the model has no head, so there is no class to explain"),
        ({"target": 0}, "Expected a model with a head. Received: target=0"),
    ):
        with pytest.raises(ConfigError, match=re.escape(text)):
            explainer.explain(make_image(), **options)


def test_wrong_input_is_named(tmp_path):
    explainer = make_explainer(position="none", num_blocks=1)
    named = Explainer(explainer.model, input_spec=explainer.input_spec, class_names=["a", "b", "c", "d", "3"])
    image = make_image()
    assert named.find_class("b") == 1
    assert named.find_class("3") == 4  # a name before an index
    assert named.find_class("0") == 0
    for options, error, text in (
        ({"target": "cat"}, UnknownNameError, "Unknown class. Received: class='cat'"),
        ({"target": 5}, ConfigError, "Expected an index from 0 to 4. Received: target=5. Pass one of them"),
        ({"block": 2}, ConfigError, "Expected an index from -1 to 0. Received: block=2."),
        ({"head": -3}, ConfigError, "Expected an index from -2 to 1. Received: head=-3."),
        ({"methods": ["saliency"]}, UnknownNameError, "Unknown method. Received: method='saliency'"),
        ({"methods": ["positions"]}, ConfigError, "method='positions', but the model has no positions"),
        ({"steps": 0}, ConfigError, "Expected 1 step or more. Received: steps=0."),
        ({"fill": "black"}, ConfigError, "Expected 'mean' or 'blur'. Received: fill='black'."),
    ):
        with pytest.raises(error, match=re.escape(text)):
            named.explain(image, **options)
    with pytest.raises(ConfigError, match=r"shape=\(16, 24, 4\), dtype=uint8"):
        named.explain(np.zeros((16, 24, 4), "uint8"))
    with pytest.raises(ConfigError, match="dtype=float32"):
        named.explain(image.astype("float32"))
    (tmp_path / "no.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"no\.png"):
        explain(named, tmp_path / "no.png")
    with pytest.raises(ConfigError, match=r"Expected 5 class names\. Received: 1"):
        Explainer(explainer.model, input_spec=explainer.input_spec, class_names=["a"])
    with pytest.raises(ConfigError, match=r"Received: input_spec with \(32, 32\) and 3"):
        Explainer(explainer.model, input_spec=InputSpec(image_size=32))


def test_several_labels_have_the_probability_of_a_sigmoid():
    explainer = explainer_of("class")
    several = Explainer(explainer.model, input_spec=explainer.input_spec, is_multi_label=True)
    found = explain(several, make_image(), method="patches", target=2)
    assert found.probability == pytest.approx(1 / (1 + np.exp(-found.logits[2])), rel=1e-5)
    assert found.map is None
    with pytest.raises(ConfigError, match="Cannot read the map of patches"):
        found.values()


def test_table_of_methods():
    names = [method.name for method in list_methods()]
    assert names == list(METHODS)
    assert all(method.description.endswith(".") for method in list_methods())
    np.testing.assert_array_equal(one_hot(None, 2), [0, 0])
