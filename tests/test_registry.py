"""The registry against timm: tests/data/timm_models.json was written by tests/data/timm_models.py from timm 1.0.31."""

import json
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from vitreous.errors import ConfigError, UnknownNameError
from vitreous.model import VisionTransformer
from vitreous.registry import (
    _read_weights,
    count_macs,
    count_parameters,
    get_family,
    get_spec,
    list_families,
    list_models,
    list_weights,
)
from vitreous.registry_table import FAMILIES, TAGS, WORDS
from vitreous.spec import ViTConfig, WeightsSource

TIMM = json.loads((Path(__file__).parent / "data" / "timm_models.json").read_text())
OWN = [
    "vit_pico_patch1_8",
    "vit_pico_patch2_8",
    "vit_nano_patch2_8",
    "vit_pico_patch4_28",
    "vit_nano_patch4_28",
    "vit_pico_patch4_32",
    "vit_nano_patch4_32",
    "vit_micro_patch4_32",
    "vit_tiny_patch4_32",
    "vit_small_patch4_32",
    "vit_nano_patch8_64",
    "vit_micro_patch8_64",
    "vit_tiny_patch8_64",
    "vit_micro_patch16_224",
    "vit_nano_stem_patch4_32",
    "vit_nano_stem_patch8_64",
    "vit_nano_stem_patch16_128",
]


def architecture(config):
    """Returns a config in the terms of timm_models.json: what timm's modules and tensors would show."""
    norms = ["norm_pre"] * config.use_pre_norm + {"tokens": ["norm"], "pooled": ["fc_norm"], "none": []}[
        config.final_norm
    ]
    biases = (3 if config.use_key_bias else 2) * config.use_qkv_bias
    activation = {"gelu": "GELUnone", "gelu_tanh": "GELUTanh", "quick_gelu": "QuickGELU", "silu": "SiLU"}
    rope = {
        "none": None,
        "eva": ["RotaryEmbeddingCat", config.rope_temperature, list(config.rope_reference_grid)],
        "dinov3": ["RotaryEmbeddingDinoV3", config.rope_temperature, None],
    }
    return {
        "parameters": count_parameters(config),
        "macs": count_macs(config),
        "image_size": list(config.image_size),
        "patch_size": list(config.patch_size),
        "width": config.projection_dim,
        "blocks": config.num_blocks,
        "parallel": config.num_parallel,
        "heads": config.num_heads,
        "mlp_dim": config.mlp_dim,
        "mlp_gates": 2 if config.mlp == "swiglu" else 1,
        "activation": activation[config.activation],
        "classes": config.num_classes,
        "class_token": config.use_class_token,
        "distillation_token": config.use_distillation_token,
        "registers": config.num_registers,
        "prefix_tokens": config.num_prefix_tokens,
        "positions": (config.num_prefix_positions + config.num_patches) * (config.position == "learned"),
        "rope": rope[config.rope],
        "dynamic_size": config.has_dynamic_size,
        "pool": {"class": "token", "mean": "avg", "map": "map"}[config.pooling],
        "norms": norms,
        "norm": {"layer": "LayerNorm", "rms": "RmsNorm"}[config.norm],
        "epsilon": config.epsilon,
        "patch_bias": config.use_patch_bias,
        "attention_norm": config.use_attention_norm,
        "mlp_norm": config.use_mlp_norm,
        "layer_scale": config.layer_scale,
        "qkv_biases": biases,
        "post_norm": config.norm_position == "post",
    }


def preprocessing(input_spec):
    """Returns an input in the terms of timm_models.json."""
    assert input_spec.image_size[0] == input_spec.image_size[1]
    normalization = [list(input_spec.mean), list(input_spec.std)]
    mode = {"crop": "center", "squash": "squash"}[input_spec.resize_mode]
    index = TIMM["normalizations"].index(normalization)
    return [input_spec.image_size[0], index, input_spec.crop_fraction, mode, input_spec.interpolation]


@pytest.mark.parametrize("name", TIMM["models"])
def test_architecture_equals_timm(name):
    """Field by field: parameters and multiply-accumulates too, each to the last one."""
    record = {**TIMM["usual"], **TIMM["models"][name]}
    del record["weights"]
    assert architecture(get_spec(name).config) == record


@pytest.mark.parametrize("name", TIMM["models"])
def test_weights_equal_timm(name):
    rows = TIMM["models"][name]["weights"]
    assert [rows[0][3], *preprocessing(get_spec(name).input)] == rows[0][3:]  # the first tag is the default
    expected = [[tag, hub_id, licence or "", *rest] for tag, hub_id, licence, *rest in rows if hub_id]
    sources = list_weights(name)
    assert [[s.tag, s.hub_id, s.license, s.num_classes, *preprocessing(s.input)] for s in sources] == expected
    for source in sources:
        spec = get_spec(source.name)
        assert (spec.name, spec.config.num_classes, spec.input) == (name, source.num_classes, source.input)
        assert list_weights(source.name) == [source]
        assert WeightsSource.from_dict(json.loads(json.dumps(source.to_dict()))) == source


def test_every_model_is_held_against_timm_or_our_own():
    assert sorted(list_models()) == sorted([*TIMM["models"], *OWN])
    names = [name for members in list_families().values() for name in members]
    assert sorted(names) == sorted(list_models())  # no name twice


@pytest.mark.parametrize("name", OWN)
def test_own_models_are_as_their_names_say(name):
    config, input_spec = get_spec(name).config, get_spec(name).input
    _, size, *words, patch, image = name.split("_")
    stem = {"stem": "convolution", "stem_dim": 128, "stem_depths": (2, 1), "num_blocks": 4, "activation": "gelu"}
    sizes = {"pico": (64, 6, 4), "nano": (96, 6, 3), "micro": (128, 8, 4), "tiny": (192, 12, 3), "small": (384, 12, 6)}
    is_own_size = size in ("pico", "nano", "micro")
    plain = ViTConfig(
        image_size=int(image),
        patch_size=int(patch.removeprefix("patch")),
        projection_dim=sizes[size][0],
        num_blocks=sizes[size][1],
        num_heads=sizes[size][2],
        use_class_token=not is_own_size,
        pooling="mean" if is_own_size else "class",
        activation="gelu_tanh" if is_own_size else "gelu",
    )
    assert config == (plain.replace(**stem) if words == ["stem"] else plain)
    assert input_spec.crop_fraction == (0.9 if image in ("128", "224") else 1.0)
    assert list_weights(name) == []


def test_the_table_has_no_dead_words():
    """Every word and every tag pattern is used; every family has a title of its own, and tells its source."""
    names = {
        family.title: set("_".join(members).split("_"))
        for family, members in zip(FAMILIES, list_families().values(), strict=True)
    }
    assert not set(WORDS) - set.union(*names.values())
    for family in FAMILIES:
        assert not set(family.words) - names[family.title], family.title
        assert family.source
    assert len(names) == len(FAMILIES)
    tags = {_read_weights(text)[0] for family in FAMILIES for model in family.models for text in model.weights.split()}
    assert [pattern for pattern, _ in TAGS if not any(fnmatchcase(tag, pattern) for tag in tags)] == []


SMALL = ViTConfig(image_size=(32, 16), patch_size=8, projection_dim=16, num_blocks=2, num_heads=2, num_classes=5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_classes": 0},
        {"use_class_token": False, "pooling": "mean", "mlp_dim": 24},
        {"image_size": (32, 20), "patch_strides": (4, 6), "num_channels": 1},
        {"patch_padding": "same", "image_size": (33, 17)},
        {"stem": "convolution"},
        {"stem": "convolution", "stem_dim": 24, "stem_depths": (2, 1)},
        {"stem": "convolution", "norm": "rms", "patch_size": 2, "patch_strides": None, "num_channels": 1},
        {"stem": "shifted"},
        {"use_patch_bias": False, "use_pre_norm": True},
        {"use_distillation_token": True},
        {"use_distillation_token": True, "use_distillation_head": True},
        {"num_registers": 3},
        {"num_registers": 3, "position_tokens": "class"},
        {"num_registers": 3, "position_tokens": "patches", "use_distillation_token": True},
        {"position": "sincos"},
        {"position": "none", "rope": "eva"},
        {"position": "none", "rope": "dinov3", "num_registers": 2},
        {"norm": "rms", "use_qk_norm": True, "use_attention_norm": True, "use_mlp_norm": True},
        {"use_qk_norm": True, "use_attention_norm": True, "use_mlp_norm": True, "norm_position": "post"},
        {"use_qkv_bias": False},
        {"use_key_bias": False},
        {"use_projection_bias": False, "use_mlp_bias": False},
        {"use_local_attention": True},
        {"num_parallel": 3, "layer_scale": 0.1},
        {"mlp": "swiglu", "activation": "silu", "mlp_dim": 40},
        {"mlp": "swiglu", "use_mlp_norm": True, "use_mlp_bias": False, "norm": "rms"},
        {"final_norm": "none"},
        {"final_norm": "pooled", "pooling": "mean"},
        {"pooling": "map", "mlp_dim": 24},
        {"pooling": "map", "use_class_token": False, "num_registers": 2, "norm": "rms", "mlp": "swiglu"},
        {"pooling": "map", "use_mlp_bias": False, "use_mlp_norm": True, "final_norm": "pooled", "num_classes": 0},
        {"pooling": "class_mean"},
        {"pooling": "class_mean", "final_norm": "pooled", "norm": "rms"},
    ],
    ids=str,
)
def test_counted_parameters_are_those_of_the_built_model(changes):
    config = SMALL.replace(**changes)
    assert VisionTransformer(config).count_params() == count_parameters(config)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # 8 patches of 192 values to 16; 2 blocks of 9 tokens; a head of 16 x 5
        ({}, 8 * 192 * 16 + 2 * (9 * 12 * 16 * 16 + 2 * 81 * 16) + 80),
        ({"stem": "shifted"}, 8 * 960 * 16 + 2 * (9 * 12 * 16 * 16 + 2 * 81 * 16) + 80),
        # convolutions to (16, 8, 4), (8, 4, 8), (4, 2, 16) pixels and channels, then 16 to 16
        # convolutions to (16, 8, 6), (8, 4, 12), (4, 2, 24); two more of the second kind; then 24 to 16
        (
            {"stem": "convolution", "stem_dim": 24, "stem_depths": (2, 0), "num_blocks": 1},
            9 * (128 * 3 * 6 + 32 * 6 * 12 + 2 * 32 * 12 * 12 + 8 * 12 * 24)
            + 8 * 24 * 16
            + 9 * 12 * 16 * 16
            + 2 * 81 * 16
            + 80,
        ),
        (
            {"stem": "convolution", "num_blocks": 1},
            9 * (128 * 3 * 4 + 32 * 4 * 8 + 8 * 8 * 16) + 8 * 16 * 16 + 9 * 12 * 16 * 16 + 2 * 81 * 16 + 80,
        ),
    ],
    ids=str,
)
def test_multiply_accumulates(changes, expected):
    """What timm has no model for; the rest is held against torch's counter in test_architecture_equals_timm."""
    assert count_macs(SMALL.replace(**changes)) == expected


def test_list_models():
    assert len(list_models()) == len(set(list_models())) > 200
    assert set(list_models("vit_tiny_*_224")) == {"vit_tiny_patch16_224"}
    assert list_models("DINOV2") == list_models("*dinov2*")
    assert set(list_models("vit_*_patch14_dinov2")) == {
        f"vit_{size}_patch14_dinov2" for size in ("small", "base", "large", "giant")
    }
    assert "vit_tiny_patch4_32" in list_models("patch4_32")
    assert "vit_tiny_patch4_32" not in list_models("patch4_32", has_weights=True)
    assert all(list_weights(name) for name in list_models(has_weights=True))
    assert list_models("no_such") == []
    sizes = [count_parameters(get_spec(name).config) for name in list_models()]
    assert sizes == sorted(sizes)


def test_name_with_tag():
    spec = get_spec("vit_base_patch16_224.augreg_in21k")
    assert (spec.name, spec.config.num_classes) == ("vit_base_patch16_224", 21843)
    assert get_spec("vit_base_patch16_224.mae").input.mean == (0.485, 0.456, 0.406)
    assert get_spec("vit_base_patch16_224.mae", num_classes=7).config.num_classes == 7
    assert get_spec("vit_base_patch16_224") == get_spec("vit_base_patch16_224.augreg2_in21k_ft_in1k")
    spec = get_spec("vit_base_patch16_clip_384.openai_ft_in12k_in1k", image_size=(192, 256), num_channels=1)
    assert spec.input.to_dict() == {
        "image_size": [192, 256],
        "num_channels": 1,
        "mean": [0.48145466],
        "std": [0.26862954],
        "interpolation": "bicubic",
        "resize_mode": "squash",
        "crop_fraction": 0.95,
    }
    assert (
        list_weights("vit_base_patch16_clip_quickgelu_224.openai")[0].hub_id == "timm/vit_base_patch16_clip_224.openai"
    )
    assert get_family("vit_base_patch16_224.mae").title == "ViT"


def test_changes_reach_the_fields_that_follow_them():
    config = get_spec("vit_base_patch16_224", patch_size=8, projection_dim=48, rope="dinov3").config
    assert (config.patch_strides, config.mlp_dim, config.rope_temperature) == ((8, 8), 192, 100.0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "vit_tiny_patch16_242",
            r"Unknown model\. Received: model='vit_tiny_patch16_242'\. Nearest: vit_tiny_patch16_224",
        ),
        ("vit_tiny_patch16_242.x", r"Unknown model\. Received: model='vit_tiny_patch16_242'\. .* vitreous models"),
        (
            "nonsense",
            r"^Unknown model\. Received: model='nonsense'\. Expected the name of an existing model\. List them all",
        ),
        (
            "vit_tiny_patch16_224.augreg_in22k",
            r"Unknown tag\. Received: tag='augreg_in22k'\. Nearest: augreg_in21k.*"
            r"vit_tiny_patch16_224 has augreg_in21k_ft_in1k, augreg_in21k\.",
        ),
        ("vit_tiny_patch4_32.in1k", r"vit_tiny_patch4_32 has no published weights; pass its name alone\."),
    ],
)
def test_unknown_names(name, message):
    for function in (get_spec, list_weights, get_family):
        with pytest.raises(UnknownNameError, match=message):
            function(name)


def test_values_that_do_not_fit():
    with pytest.raises(ConfigError, match=r"Pass 96 or 112 pixels"):
        get_spec("vit_tiny_patch16_224", image_size=100)
