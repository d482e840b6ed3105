"""What `look` collects for the page, against the trace that it comes from. test_backends.py runs it on each."""

import base64
import io
import json

import numpy as np
import pytest
from look_models import NAMES, ZOO, look_once, make_explainer, make_image
from PIL import Image

import vitreous.look
from vitreous.errors import ConfigError, UnknownNameError
from vitreous.explanation import explain, maps
from vitreous.look import NUM_SHOWN, look


def unpack(packed):
    codes = np.frombuffer(base64.b64decode(packed["data"]), "uint8").reshape(packed["shape"])
    scales = np.frombuffer(base64.b64decode(packed["scales"]), "<f4").reshape(*packed["shape"][:-1], 1)
    return codes / 255 * scales, scales


@pytest.mark.parametrize("name", ZOO)
def test_numbers_are_those_of_the_trace(name):
    explainer, found = make_explainer(name), look_once(name)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    config = explainer.config
    pixels = explainer.prepare(make_image())
    image = Image.open(io.BytesIO(base64.b64decode(found["image"].partition(",")[2])))
    np.testing.assert_array_equal(np.asarray(image).reshape(pixels.shape), pixels)
    trace = explainer.trace(pixels)
    heads = config.num_heads * config.num_parallel
    attention, scales = unpack(found["attention"])
    blocks = config.num_blocks
    assert found["attention"]["shape"] == [blocks, heads, config.num_tokens, config.num_tokens]
    assert found["attention"]["blocks"] == list(range(blocks)) and found["attention"]["heads"] == list(range(heads))
    assert np.all(np.abs(attention - trace.attention) <= 0.51 / 255 * scales + 1e-5)
    rollout, scales = unpack(found["rollout"])
    np.testing.assert_allclose(rollout, maps.roll_out(trace.attention), atol=0.51 / 255 * scales.max() + 1e-5)
    read = np.array(found["read_out"])
    assert abs(read.sum() - 1) < 1e-3
    expected = maps.read_patches(config, maps.roll_out(trace.attention), trace)
    np.testing.assert_allclose((read @ rollout)[config.num_prefix_tokens :], expected, atol=3e-3)
    walk = found["walk"]
    assert len(walk["pooled"]) == NUM_SHOWN and len(walk["blocks"]) == blocks
    assert all(0 < block[part] < 100 for block in walk["blocks"] for part in ("attention", "mlp"))
    token = np.array(walk["projected"]) + (0 if walk["position"] is None else np.array(walk["position"]))
    np.testing.assert_allclose(token, trace.tokens[0, config.num_prefix_tokens :, :NUM_SHOWN], rtol=2e-3, atol=2e-3)


def test_answer_is_the_ordinary_one():
    explainer, found = make_explainer(), look_once()
    logits = explainer.predict(explainer.prepare(make_image())[None])
    shares = explainer.probabilities(logits)[0]
    order = np.argsort(-shares)
    assert [each["class"] for each in found["predictions"]] == [NAMES[i] for i in order[:5]]
    np.testing.assert_allclose([each["probability"] for each in found["predictions"]], shares[order][:5], atol=1e-6)
    scaled = np.array([each["logit"] for each in found["predictions"]]) / 2
    np.testing.assert_allclose(np.exp(scaled - found["log_sum"]), shares[order][:5], atol=1e-5)
    assert found["other"] == pytest.approx(shares.min(), abs=1e-6)
    assert shares.max() < 0.5 and found["is_sure"] is False
    np.testing.assert_allclose(found["walk"]["answers"][-1], shares[order][:5], atol=1e-3)
    assert len(found["walk"]["answers"]) == 3
    assert found["model"]["prefix_tokens"] == ["class", "register"]
    assert found["model"]["edges"] == [[0, 8, 16, 24, 32], [0, 8, 16, 24, 32]]


def test_relevance_is_that_of_explain():
    explainer, found = make_explainer(), look_once()
    assert list(found["relevance"]) == [each["class"] for each in found["predictions"][:3]]
    for name, values in found["relevance"].items():
        expected = explain(explainer, make_image(), target=name).values()
        np.testing.assert_allclose(values, expected, rtol=2e-3, atol=1e-6)
    last = found["predictions"][-1]
    asked = look(explainer, make_image(), classes=[last["class"], last["index"]], top_k=2)
    assert list(asked["relevance"]) == [last["class"]]
    assert asked["other"] == pytest.approx(1 - sum(each["probability"] for each in found["predictions"][:2]), abs=1e-6)


def test_labels_side_by_side_and_a_model_without_head():
    labels = look_once("map")
    assert labels["other"] is None and labels["model"]["is_multi_label"]
    assert labels["positions"]["kind"] == "rotary" and labels["walk"]["position"] is None
    assert all(0 < each["probability"] < 1 for each in labels["predictions"])
    bare = look_once("bare")
    assert bare["predictions"] == [] and bare["relevance"] == {} and bare["walk"]["answers"] is None
    assert bare["model"]["classes"] == [] and bare["is_sure"] is None
    similarity = np.frombuffer(base64.b64decode(bare["positions"]["data"]), "uint8").reshape(6, 6) / 255
    low, high = bare["positions"]["low"], bare["positions"]["high"]
    expected, _ = maps.compare_positions(make_explainer("bare").model, (2, 3))
    np.testing.assert_allclose(low + similarity * (high - low), expected, atol=(high - low) / 255)


@pytest.mark.parametrize(("limit", "blocks"), [(1000, [0, 1]), (400, [1]), (10, [1])])
def test_large_models_send_less(monkeypatch, limit, blocks):
    monkeypatch.setattr(vitreous.look, "MAX_ATTENTION_BYTES", limit)  # all: 1296; the mean over heads: 324 a block
    explainer = make_explainer()
    trace = explainer.trace(explainer.prepare(make_image()))
    packed = vitreous.look._choose_attention(trace.attention)
    assert (packed["blocks"], packed["heads"]) == (blocks, None)
    values, scales = unpack(packed)
    expected = trace.attention.mean(axis=1, keepdims=True)[blocks]
    np.testing.assert_allclose(values, expected, atol=0.51 / 255 * scales.max() + 1e-5)


def test_wrong_questions_say_so():
    with pytest.raises(UnknownNameError, match=r"Unknown class. Received: class='birds'. Nearest: bird"):
        look(make_explainer(), make_image(), classes=["birds"])
    with pytest.raises(ConfigError, match=r"Expected an index from 0 to 5. Received: target=9"):
        look(make_explainer(), make_image(), classes=[9])
    with pytest.raises(ConfigError, match=r"Expected uint8 of shape \(H, W\)"):
        look(make_explainer(), make_image().astype("float32"))
