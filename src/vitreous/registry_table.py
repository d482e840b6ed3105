"""The models that `vitreous.registry` knows, as a table to read and to add to.

A name is read word by word: `vit_base_patch16_reg4_gap_256` says `base`, `patch16`, `reg4`, `gap`, `256`. Patch size,
registers and image size are in the word itself; what the others stand for is in `WORDS`, or in the family's own
`words`, which come after. So a model is its family's `changes`, then its words', then what its own line adds, in fields
of `ViTConfig` and `InputSpec`. **To add a model, add its line**; to add published weights, add their tag to the line.

Weights are tags between spaces, the default one first, on https://huggingface.co/OWNER/NAME.TAG. A tag takes the
model's classes and input, except for what `TAGS` says of it, and then for what stands behind it:
`openai_ft_in1k/0.95/squash` is cropped to 0.95 of its side and squashed; `/half` normalises with means of one half.

Source: timm 1.0.31 (https://github.com/huggingface/pytorch-image-models, Apache-2.0), whose names, inputs and licences
these are; `tests/test_registry.py` holds each line against it.
"""

from dataclasses import dataclass, field
from typing import Any

Fields = dict[str, Any]

HALF: Fields = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
ZERO_TO_ONE: Fields = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
IMAGENET: Fields = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
OPENAI_CLIP: Fields = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
SATELLITE: Fields = {"mean": (0.43, 0.411, 0.296), "std": (0.213, 0.156, 0.143)}


@dataclass(frozen=True)
class Model:
    """A line of the table: a name, the tags of its weights, and what differs from its family."""

    name: str
    weights: str
    changes: Fields


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models with a common origin: what they share, and what the words in their names mean."""

    title: str
    source: str
    models: tuple[Model, ...]
    changes: Fields = field(default_factory=dict)
    words: dict[str, Fields] = field(default_factory=dict)
    license: str = "apache-2.0"
    owner: str = "timm"


def model(name: str, weights: str = "", **changes: Any) -> Model:
    """Returns one line of the table."""
    return Model(name, weights, changes)


def size(width: int, blocks: int, heads: int, mlp_dim: int | None = None, **changes: Any) -> Fields:
    """Returns the fields that a model's size settles; the MLP has 4 * `width` hidden units unless said."""
    return {"projection_dim": width, "num_blocks": blocks, "num_heads": heads, "mlp_dim": mlp_dim, **changes}


SWIGLU: Fields = {"mlp": "swiglu", "activation": "silu"}
TANH: Fields = {"activation": "gelu_tanh"}
MEAN: Fields = {"use_class_token": False, "pooling": "mean"}

# What a word in a name stands for, in every family.
WORDS: dict[str, Fields] = {
    "pico": size(64, 6, 4),
    "nano": size(96, 6, 3),
    "micro": size(128, 8, 4),
    "tiny": size(192, 12, 3),
    "xsmall": size(256, 10, 4),
    "wee": size(256, 14, 4, 1280),
    "little": size(320, 14, 5, 1792),
    "small": size(384, 12, 6),
    "medium": size(512, 12, 8),
    "mediumd": size(512, 20, 8),
    "betwixt": size(640, 12, 10),
    "base": size(768, 12, 12),
    "so150m": size(896, 18, 14, 2304),
    "so150m2": size(832, 21, 13, 2176),
    "large": size(1024, 24, 16),
    "intern300m": size(1024, 24, 16),
    "so400m": size(1152, 27, 16, 4304),
    "huge": size(1280, 32, 16),
    "giant": size(1408, 40, 16, 6144),
    "giantopt": size(1536, 40, 16),
    "gigantic": size(1664, 48, 16, 8192),
    "enormous": size(1792, 64, 16, 15360),
    "7b": size(4096, 40, 32, 8192),
    "gap": MEAN,
    "map": {"use_class_token": False, "pooling": "map"},
    "distilled": {"use_distillation_token": True, "use_distillation_head": True},
    "quickgelu": {"activation": "quick_gelu"},
}

# What a tag says of its weights, in every family: all lines that match count, the last one most.
NON_COMMERCIAL: Fields = {"license": "cc-by-nc-4.0"}
TAGS: tuple[tuple[str, Fields], ...] = (
    ("*in1k", {"num_classes": 1000}),
    ("*in12k", {"num_classes": 11821}),
    ("*in21k", {"num_classes": 21843}),
    ("*in22k", {"num_classes": 21841}),
    ("in21k", {"num_classes": 11221}),  # miil's own choice of classes
    ("orig_in21k", {"num_classes": 0}),
    ("mim_in22k", {"num_classes": 0}),
    ("*pt", {"num_classes": 0}),
    ("dino", {"num_classes": 0, **IMAGENET}),
    ("mae", {"num_classes": 0, **IMAGENET, **NON_COMMERCIAL}),
    ("bamboo", {"num_classes": 115217, **OPENAI_CLIP, "license": ""}),  # its licence is not stated
    ("m30m*", IMAGENET),
    ("sat493m", SATELLITE),
    ("eupe*", {"license": "fair-noncommercial-research-license"}),
    ("metaclip*", NON_COMMERCIAL),
    ("dfn*", {"license": "apple-ascl"}),
    ("apple_mclip2*", {"license": "apple-amlr"}),
    ("laion400m*", {"license": "mit"}),
    ("tinyclip*", {"license": "mit"}),
    ("ogvl_dist", {"license": "mit"}),
)

FAMILIES = (
    Family(
        title="vitreous",
        source="Sizes of our own, for images of 8 to 64 pixels and for training from scratch on a CPU; they pool by "
        "the mean over patches and use the tanh form of GELU, which is cheaper. `stem` has convolutions in the place "
        "of two blocks, and the exact GELU, which is cheaper in bfloat16 on torch: docs/log.md.",
        changes={**MEAN, **TANH},
        words={
            "224": {"crop_fraction": 0.9},
            "128": {"crop_fraction": 0.9},
            "stem": {
                **{"stem": "convolution", "stem_dim": 128, "stem_depths": (2, 1)},
                **{"num_blocks": 4, "activation": "gelu"},
            },
        },
        models=(
            model("vit_pico_patch1_8"),
            model("vit_{pico,nano}_patch2_8"),
            model("vit_{pico,nano}_patch4_28"),
            model("vit_{pico,nano,micro}_patch4_32"),
            model("vit_{nano,micro}_patch8_64"),
            model("vit_micro_patch16_224"),
            model("vit_nano_stem_patch{4_32,8_64,16_128}"),
        ),
    ),
    Family(
        title="ViT",
        source="Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929 (orig); Steiner et al. 2022, "
        "https://arxiv.org/abs/2106.10270 (augreg); Caron et al. 2021, https://arxiv.org/abs/2104.14294 (dino); "
        "He et al. 2022, https://arxiv.org/abs/2111.06377 (mae)",
        words={
            "224": {"crop_fraction": 0.9},
            "plus": size(896, 12, 14, layer_scale=1e-5, crop_fraction=0.95),
            "18x2": {"num_blocks": 18, "num_parallel": 2, "layer_scale": 1e-5},
            "36x1": {"num_blocks": 36, "layer_scale": 1e-5},
            "miil": {"use_qkv_bias": False, **ZERO_TO_ONE, "interpolation": "bilinear", "crop_fraction": 0.875},
        },
        models=(
            model("vit_{tiny,small}_patch4_32"),
            model("vit_tiny_patch8_64"),
            model("vit_tiny_patch16_224", "augreg_in21k_ft_in1k augreg_in21k"),
            model("vit_tiny_patch16_384", "augreg_in21k_ft_in1k"),
            model("vit_small_patch8_224", "dino"),
            model("vit_small_patch16_224", "augreg_in21k_ft_in1k augreg_in1k augreg_in21k dino"),
            model("vit_small_patch16_384", "augreg_in21k_ft_in1k augreg_in1k"),
            model("vit_small_patch32_224", "augreg_in21k_ft_in1k augreg_in21k"),
            model("vit_small_patch32_384", "augreg_in21k_ft_in1k"),
            model("vit_small_patch16_{18x2,36x1}_224"),
            model("vit_base_patch8_224", "augreg2_in21k_ft_in1k augreg_in21k_ft_in1k augreg_in21k dino"),
            model(
                "vit_base_patch16_224",
                "augreg2_in21k_ft_in1k augreg_in21k_ft_in1k orig_in21k_ft_in1k augreg_in1k orig_in21k augreg_in21k "
                "sam_in1k bamboo/1.0 dino mae",
            ),
            model("vit_base_patch16_384", "augreg_in21k_ft_in1k orig_in21k_ft_in1k augreg_in1k"),
            model("vit_base_patch32_224", "augreg_in21k_ft_in1k augreg_in1k orig_in21k augreg_in21k sam_in1k"),
            model("vit_base_patch32_384", "augreg_in21k_ft_in1k augreg_in1k"),
            model("vit_base_patch16_224_miil", "in21k in21k_ft_in1k"),
            model("vit_base_patch16_18x2_224"),
            model("vit_base_patch16_plus_240"),
            model("vit_base_patch32_plus_256"),
            model("vit_{large,giant,gigantic}_patch14_224"),
            model("vit_large_patch16_224", "augreg_in21k_ft_in1k orig_in21k augreg_in21k mae"),
            model("vit_large_patch16_384", "augreg_in21k_ft_in1k"),
            model("vit_large_patch32_224", "orig_in21k"),
            model("vit_large_patch32_384", "orig_in21k_ft_in1k"),
            model("vit_huge_patch14_224", "orig_in21k mae"),
        ),
    ),
    Family(
        title="DeiT",
        source="Touvron et al. 2021, https://arxiv.org/abs/2012.12877",
        changes=IMAGENET,
        words={"224": {"crop_fraction": 0.9}},
        models=(
            model("deit_{tiny,small,base}{_distilled,}_patch16_224", "fb_in1k"),
            model("deit_base{_distilled,}_patch16_384", "fb_in1k"),
        ),
    ),
    Family(
        title="DeiT III",
        source="Touvron et al. 2022, https://arxiv.org/abs/2204.07118",
        changes={**IMAGENET, "position_tokens": "patches", "layer_scale": 1e-6},
        words={"224": {"crop_fraction": 0.9}},
        models=(
            model("deit3_{small,medium,base,large}_patch16_224", "fb_in1k fb_in22k_ft_in1k/1.0"),
            model("deit3_{small,base,large}_patch16_384", "fb_in1k fb_in22k_ft_in1k"),
            model("deit3_huge_patch14_224", "fb_in1k fb_in22k_ft_in1k/1.0"),
        ),
    ),
    Family(
        title="FlexiViT",
        source="Beyer et al. 2023, https://arxiv.org/abs/2212.08013",
        changes={"image_size": 240, "position_tokens": "patches", "crop_fraction": 0.95},
        models=(
            model("flexivit_{small,large}", "1200ep_in1k 600ep_in1k 300ep_in1k"),
            model(
                "flexivit_base",
                "1200ep_in1k 600ep_in1k 300ep_in1k 1000ep_in21k 300ep_in21k patch16_in21k patch30_in21k",
            ),
        ),
    ),
    Family(
        title="ViT without a class token",
        source="timm (sw); Assran et al. 2023, https://arxiv.org/abs/2301.08243 (I-JEPA: huge, giant)",
        words={
            "224": {"crop_fraction": 0.9},
            "huge": {"num_classes": 0, **IMAGENET},
            "giant": {"num_classes": 0, **IMAGENET},
            "medium": {"use_qkv_bias": False, "layer_scale": 1e-6, "crop_fraction": 0.95},
            "betwixt": {"use_qkv_bias": False, "layer_scale": 1e-6, "crop_fraction": 0.95},
            "rpn": {**MEAN, "use_qkv_bias": False, "norm_position": "post", "final_norm": "pooled"},
        },
        models=(
            model("vit_medium_patch16_gap_240", "sw_in12k", num_classes=11821),
            model("vit_medium_patch16_gap_256", "sw_in12k_ft_in1k"),
            model("vit_medium_patch16_gap_384", "sw_in12k_ft_in1k/squash"),
            model("vit_betwixt_patch16_gap_256"),
            model("vit_base_patch16_gap_224", num_heads=16),
            model("vit_base_patch16_rpn_224", "sw_in1k"),
            model("vit_huge_patch14_gap_224"),
            model("vit_huge_patch16_gap_448"),
            model("vit_giant_patch16_gap_224"),
        ),
    ),
    Family(
        title="ViT with registers",
        source="Wightman, https://huggingface.co/timm, tags sbb: a search for better baselines",
        changes={
            "crop_fraction": 0.95,
            "position_tokens": "patches",
            "layer_scale": 1e-5,
            "final_norm": "pooled",
        },
        words={
            "384": {"crop_fraction": 1.0},
            "so150m": {"position_tokens": "all", "layer_scale": 0.0, "final_norm": "tokens"},
            "so150m2": {"position_tokens": "all", "use_qkv_bias": False, "crop_fraction": 1.0},
        },
        models=(
            model("vit_{wee,medium,betwixt}_patch16_reg1_gap_256", "sbb_in1k"),
            model("vit_little_patch16_reg1_gap_256", "sbb_in12k_ft_in1k sbb_in12k"),
            model("vit_little_patch16_reg4_gap_256", "sbb_in1k"),
            model("vit_medium_patch16_reg4_gap_256", "sbb_in12k_ft_in1k sbb_in1k sbb_in12k"),
            model(
                "vit_mediumd_patch16_reg4_gap_256",
                "sbb2_e200_in12k_ft_in1k sbb_in12k_ft_in1k sbb2_e200_in12k sbb_in12k",
            ),
            model("vit_{mediumd,betwixt}_patch16_reg4_gap_384", "sbb2_e200_in12k_ft_in1k"),
            model(
                "vit_betwixt_patch16_reg4_gap_256",
                "sbb2_e200_in12k_ft_in1k sbb_in12k_ft_in1k sbb_in1k sbb2_e200_in12k sbb_in12k",
            ),
            model("vit_base_patch16_reg4_gap_256", layer_scale=0.0, crop_fraction=0.9),
            model("vit_so150m_patch16_reg4_gap_256", "sbb_e250_in12k_ft_in1k sbb_e250_in12k"),
            model("vit_so150m_patch16_reg4_gap_384", "sbb_e250_in12k_ft_in1k"),
            model("vit_so150m_patch16_reg4_map_256", crop_fraction=0.9),
            model("vit_so150m2_patch16_reg1_gap_256", "sbb_e200_in12k_ft_in1k sbb_e200_in12k"),
            model("vit_so150m2_patch16_reg1_gap_384", "sbb_e200_in12k_ft_in1k"),
            model("vit_so150m2_patch16_reg1_gap_448", "sbb_e200_in12k_ft_in1k/squash"),
        ),
    ),
    Family(
        title="ViT with registers and rotary positions",
        source="Wightman, https://huggingface.co/timm, tags sbb: a search for better baselines",
        changes={
            "crop_fraction": 0.95,
            "position": "none",
            "rope": "eva",
            "rope_reference_grid": (16, 16),
            "use_key_bias": False,
            "layer_scale": 1e-5,
            "final_norm": "pooled",
        },
        license="mit",
        models=(
            model("vit_{medium,base}_patch16_rope_reg1_gap_256", "sbb_in1k"),
            model("vit_mediumd_patch16_rope_reg1_gap_256", "sbb_in1k", use_qkv_bias=False),
            model(
                "vit_betwixt_patch16_rope_reg4_gap_256", "sbb_in1k", mean=OPENAI_CLIP["mean"], std=OPENAI_CLIP["std"]
            ),
        ),
    ),
    Family(
        title="CLIP",
        source="Radford et al. 2021, https://arxiv.org/abs/2103.00020 (openai), and its kin: OpenCLIP (laion), "
        "DataComp, DFN, MetaCLIP, TinyCLIP, MobileCLIP 2. Without fine-tuning (ft), the head is the projection to the "
        "space that images and texts share.",
        changes={**OPENAI_CLIP, "use_pre_norm": True, "use_patch_bias": False, "epsilon": 1e-5, "num_classes": 512},
        words={
            "plus": size(896, 12, 14, num_classes=640),
            "large": {"num_classes": 768},
            "huge": {"num_classes": 1024},
            "giant": {"num_classes": 1024},
            "gigantic": {"num_classes": 1280},
        },
        models=(
            model("vit_{xsmall,medium}_patch16_clip_224", "tinyclip_yfcc15m/0.9"),
            model("vit_{medium,betwixt}_patch32_clip_224", "tinyclip_laion400m/0.9"),
            model(
                "vit_base_patch16_clip_224",
                "laion2b_ft_in12k_in1k/0.95 openai_ft_in12k_in1k/0.95 laion2b_ft_in1k openai_ft_in1k/0.9 "
                "laion2b_ft_in12k/0.9 openai_ft_in12k/0.9 laion2b laion400m_e32 datacompxl dfn2b metaclip_2pt5b "
                "metaclip_400m openai/0.9",
            ),
            model(
                "vit_base_patch16_clip_384",
                "laion2b_ft_in12k_in1k/squash openai_ft_in12k_in1k/0.95/squash laion2b_ft_in1k/squash "
                "openai_ft_in1k/squash",
            ),
            model("vit_base_patch16_clip_quickgelu_224", "metaclip_2pt5b metaclip_400m openai/0.9"),
            model("vit_base_patch16_plus_clip_240", "laion400m_e32"),
            model(
                "vit_base_patch32_clip_224",
                "laion2b_ft_in12k_in1k/0.9 laion2b_ft_in1k/0.9 openai_ft_in1k/0.9 laion2b/0.9 laion400m_e32/0.9 "
                "datacompxl metaclip_2pt5b metaclip_400m openai/0.9",
            ),
            model("vit_base_patch32_clip_256", "datacompxl"),
            model("vit_base_patch32_clip_384", "laion2b_ft_in12k_in1k openai_ft_in12k_in1k/0.95/squash"),
            model("vit_base_patch32_clip_448", "laion2b_ft_in12k_in1k"),
            model("vit_base_patch32_clip_quickgelu_224", "laion400m_e32/0.9 metaclip_2pt5b metaclip_400m openai/0.9"),
            model(
                "vit_large_patch14_clip_224",
                "laion2b_ft_in12k_in1k/half openai_ft_in12k_in1k laion2b_ft_in1k/half openai_ft_in1k "
                "laion2b_ft_in12k/half openai_ft_in12k laion2b/half laion400m_e32 datacompxl dfn2b_s39b dfn2b "
                "metaclip_2pt5b metaclip_400m openai apple_mclip2_dfndr2b",
            ),
            model(
                "vit_large_patch14_clip_336",
                "laion2b_ft_in12k_in1k/squash/half openai_ft_in12k_in1k/squash laion2b_ft_in1k/squash/half openai",
            ),
            model("vit_large_patch14_clip_quickgelu_224", "dfn2b metaclip_2pt5b metaclip_400m openai"),
            model("vit_large_patch14_clip_quickgelu_336", "openai"),
            model(
                "vit_huge_patch14_clip_224",
                "laion2b_ft_in12k_in1k laion2b_ft_in1k laion2b_ft_in12k laion2b dfn5b metaclip2_worldwide "
                "metaclip_2pt5b metaclip_altogether",
            ),
            model("vit_huge_patch14_clip_336", "laion2b_ft_in12k_in1k/squash"),
            model("vit_huge_patch14_clip_378", "dfn5b metaclip2_worldwide/squash"),
            model("vit_huge_patch14_clip_quickgelu_224", "dfn5b metaclip2_worldwide metaclip_2pt5b"),
            model("vit_huge_patch14_clip_quickgelu_378", "dfn5b"),
            model("vit_giant_patch14_clip_224", "laion2b"),
            model("vit_gigantic_patch14_clip_224", "laion2b metaclip2_worldwide metaclip_2pt5b"),
            model("vit_gigantic_patch14_clip_378", "metaclip2_worldwide/squash"),
            model("vit_gigantic_patch14_clip_quickgelu_224", "metaclip_2pt5b"),
        ),
    ),
    Family(
        title="SigLIP",
        source="Zhai et al. 2023, https://arxiv.org/abs/2303.15343 (webli); Tschannen et al. 2025, "
        "https://arxiv.org/abs/2502.14786 (v2); Beyer et al. 2024, https://arxiv.org/abs/2407.07726 (pali). "
        "`gap` pools by the mean in place of attention.",
        changes={"num_classes": 0, "use_class_token": False, "pooling": "map", "crop_fraction": 0.9},
        words={"patch32": TANH, "giantopt": TANH, "448": {"crop_fraction": 1.0}, "896": {"crop_fraction": 1.0}},
        models=(
            model("vit_base_patch16_siglip_{gap_,}{224,384,512}", "v2_webli webli"),
            model("vit_base_patch16_siglip_{gap_,}256", "v2_webli webli webli_i18n"),
            model("vit_base_patch32_siglip_{gap_,}256", "v2_webli"),
            model("vit_large_patch16_siglip_{gap_,}{256,384}", "v2_webli webli"),
            model("vit_large_patch16_siglip_{gap_,}512", "v2_webli", **TANH),
            model("vit_so400m_patch14_siglip_224", "v2_webli webli"),
            model("vit_so400m_patch14_siglip_378", "v2_webli webli webli_ft_in1k/1.0/squash"),
            model("vit_so400m_patch14_siglip_gap_224", "v2_webli webli pali_mix pali_pt pali2_3b_pt pali2_10b_pt"),
            model("vit_so400m_patch14_siglip_gap_378", "v2_webli webli/1.0 webli_ft_in1k/1.0/squash"),
            model(
                "vit_so400m_patch14_siglip_gap_448",
                "pali_mix pali_pt pali_refcoco_seg pali_ocrvqa pali2_3b_pt pali2_10b_pt pali2_3b_docci pali2_10b_docci",
            ),
            model("vit_so400m_patch14_siglip_gap_896", "pali_pt pali_refcoco_seg pali_ocrvqa pali2_3b_pt pali2_10b_pt"),
            model("vit_so400m_patch16_siglip_{gap_,}256", "v2_webli webli_i18n", **TANH),
            model("vit_so400m_patch16_siglip_{gap_,}{384,512}", "v2_webli", **TANH),
            model("vit_giantopt_patch16_siglip_{gap_,}{256,384}", "v2_webli"),
        ),
    ),
    Family(
        title="DINOv2",
        source="Oquab et al. 2024, https://arxiv.org/abs/2304.07193; Darcet et al. 2024, "
        "https://arxiv.org/abs/2309.16588 (reg4)",
        changes={**IMAGENET, "num_classes": 0, "image_size": 518, "layer_scale": 1e-5},
        words={"giant": size(1536, 40, 24, 4096, **SWIGLU), "reg4": {"position_tokens": "patches"}},
        models=(model("vit_{small,base,large,giant}_patch14_{reg4_,}dinov2", "lvd142m"),),
    ),
    Family(
        title="DINOv3",
        source="Siméoni et al. 2025, https://arxiv.org/abs/2508.10104; pooled by the mean, as in timm. `qkvb` keeps "
        "the biases of queries and values, the others leave them out.",
        changes={
            **IMAGENET,
            **{"num_classes": 0, "image_size": 256, "has_dynamic_size": True, "num_registers": 4, "pooling": "mean"},
            **{"position": "none", "rope": "dinov3", "epsilon": 1e-5, "layer_scale": 1e-5},
            **{"use_qkv_bias": False, "use_key_bias": False},
        },
        words={"huge": {"num_heads": 20}, "plus": SWIGLU, "7b": SWIGLU, "qkvb": {"use_qkv_bias": True}},
        license="dinov3-license",
        models=(
            model("vit_tiny_patch16_dinov3_qkvb", "eupe_lvd1689m"),
            model("vit_{small,small_plus,base,huge_plus}_patch16_dinov3", "lvd1689m"),
            model("vit_{small,base}_patch16_dinov3_qkvb", "lvd1689m eupe_lvd1689m"),
            model("vit_{small,huge}_plus_patch16_dinov3_qkvb", "lvd1689m"),
            model("vit_large_patch16_dinov3{_qkvb,}", "lvd1689m sat493m"),
            model("vit_7b_patch16_dinov3", "lvd1689m sat493m"),
        ),
    ),
    Family(
        title="LingBot",
        source="https://arxiv.org/abs/2607.05247, in DINOv3's architecture",
        changes={
            **IMAGENET,
            **{"num_classes": 0, "image_size": 512, "has_dynamic_size": True, "num_registers": 4},
            **{"interpolation": "bilinear", "resize_mode": "squash"},
            **{"position": "none", "rope": "dinov3", "epsilon": 1e-5, "layer_scale": 1e-5, "use_key_bias": False},
        },
        words={"giant": size(1536, 40, 24, 4096, use_qkv_bias=False, **SWIGLU)},
        owner="belfner",
        models=(model("vit_{small,base,large,giant}_patch16_lingbot", "robbyant"),),
    ),
    Family(
        title="TIPS v2",
        source="https://arxiv.org/abs/2604.12012",
        changes={**ZERO_TO_ONE, "num_classes": 0, "image_size": 448, "layer_scale": 1.0, "position_tokens": "patches"},
        words={"giant": size(1536, 40, 24, 4096, **SWIGLU)},
        models=(model("vit_{base,large,so400m,giant}_patch14_reg1_tipsv2", "webli"),),
    ),
    Family(
        title="C-RADIO",
        source="Ranzinger et al. 2024, https://arxiv.org/abs/2312.06709",
        changes={
            **OPENAI_CLIP,
            **{"num_classes": 0, "image_size": 512, "position_tokens": "patches", "final_norm": "none"},
        },
        words={
            "v3": {"num_registers": 7},
            "v4": {"num_registers": 9},
            "base": {"layer_scale": 1e-5},
            "large": {"layer_scale": 1e-5},
            "giant": size(1536, 40, 24),
        },
        license="nvidia-open-model-license",
        models=(
            model("vit_{base,large,huge,giant}_patch16_radio_v3", "c_radio"),
            model("vit_{so400m,huge}_patch16_radio_v4", "c_radio"),
        ),
    ),
    Family(
        title="InternViT",
        source="Chen et al. 2024, https://arxiv.org/abs/2312.14238",
        changes={**IMAGENET, "num_classes": 0, "has_dynamic_size": True, "layer_scale": 0.1, "final_norm": "none"},
        models=(model("vit_intern300m_patch14_448", "ogvl_dist ogvl_2pt5"),),
    ),
    Family(
        title="BEiT-3",
        source="Wang et al. 2023, https://arxiv.org/abs/2208.10442",
        changes={
            **IMAGENET,
            **{"use_attention_norm": True, "use_mlp_norm": True, "epsilon": 1e-5},
            **{"pooling": "mean", "final_norm": "pooled"},
        },
        models=(
            model("beit3_{base,large}_patch16_224", "in22k_ft_in1k indomain_in22k_ft_in1k pt indomain_pt"),
            model("beit3_giant_patch14_{224,336}"),
        ),
    ),
    Family(
        title="EVA",
        source="Fang et al. 2023, https://arxiv.org/abs/2211.07636; Sun et al. 2023, https://arxiv.org/abs/2303.15389",
        changes={**OPENAI_CLIP, "use_key_bias": False, "pooling": "mean", "final_norm": "pooled"},
        words={
            "224": {"crop_fraction": 0.9},
            "large": {"use_key_bias": True},
            "clip": {"num_classes": 1024, "pooling": "class", "final_norm": "tokens"},
            "enormous": {"norm_position": "post"},
        },
        license="mit",
        models=(
            model("eva_large_patch14_196", "in22k_ft_in22k_in1k in22k_ft_in1k"),
            model("eva_large_patch14_336", "in22k_ft_in22k_in1k/squash in22k_ft_in1k/squash"),
            model("eva_giant_patch14_224", "clip_ft_in1k"),
            model("eva_giant_patch14_336", "clip_ft_in1k/squash m30m_ft_in22k_in1k/squash"),
            model("eva_giant_patch14_560", "m30m_ft_in22k_in1k/squash"),
            model("eva_giant_patch14_clip_224", "laion400m merged2b"),
            model("eva02_enormous_patch14_clip_224", "laion2b laion2b_plus"),
        ),
    ),
    Family(
        title="EVA-02",
        source="Fang et al. 2023, https://arxiv.org/abs/2303.11331",
        changes={
            **OPENAI_CLIP,
            **{"rope": "eva", "rope_reference_grid": (16, 16), "use_key_bias": False, **SWIGLU},
            **{"pooling": "mean", "final_norm": "pooled", "num_classes": 0},
        },
        words={
            "224": {"crop_fraction": 0.9},
            "tiny": {"mlp_dim": 512},
            "small": {"mlp_dim": 1024},
            "base": {"mlp_dim": 2048, "use_mlp_norm": True},
            "large": {"mlp_dim": 2730, "use_mlp_norm": True},
            "clip": {"pooling": "class", "final_norm": "tokens", "use_attention_norm": True},
        },
        license="mit",
        models=(
            model("eva02_{tiny,small,base}_patch14_224", "mim_in22k"),
            model("eva02_{tiny,small}_patch14_336", "mim_in22k_ft_in1k"),
            model(
                "eva02_base_patch14_448",
                "mim_in22k_ft_in22k_in1k/squash mim_in22k_ft_in1k mim_in22k_ft_in22k/squash",
            ),
            model("eva02_large_patch14_224", "mim_in22k mim_m38m"),
            model(
                "eva02_large_patch14_448",
                "mim_in22k_ft_in22k_in1k/squash mim_m38m_ft_in22k_in1k/squash mim_in22k_ft_in1k mim_m38m_ft_in1k "
                "mim_in22k_ft_in22k/squash mim_m38m_ft_in22k/squash",
            ),
            model("eva02_base_patch16_clip_224", "merged2b", num_classes=512),
            model("eva02_large_patch14_clip_{224,336}", "merged2b", num_classes=768),
        ),
    ),
    Family(
        title="Test models",
        source="timm: tiny models with trained weights, to try a pipeline with",
        changes={"image_size": 160, "has_dynamic_size": True, "crop_fraction": 0.95, "final_norm": "pooled"},
        models=(
            model("test_vit", "r160_in1k", **size(64, 6, 2, 192), final_norm="tokens"),
            model("test_vit2", "r160_in1k", **size(64, 8, 2, 192), **MEAN, num_registers=1, layer_scale=1e-5),
            model("test_vit4", **size(96, 9, 3, 288), **MEAN, num_registers=1, layer_scale=1e-5, norm="rms"),
        ),
    ),
)
