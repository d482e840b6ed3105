"""Writes timm_models.json: what timm says of the models in our registry. Run it where timm 1.0.31 is installed:

    TIMM_FUSED_ATTN=0 PYTHONPATH=src python tests/data/timm_models.py

Every model is built on torch's meta device, so that its shapes are real and its weights take no memory. A model's line
has what its modules and tensors show where that differs from "usual"; its weights have (tag, hub id, licence, classes,
image size, index into "normalizations", crop, crop mode, interpolation).
"""

import json
from pathlib import Path

import timm
import torch
from timm.models import _registry
from torch.utils.flop_counter import FlopCounterMode

from vitreous.registry import list_models


def count_macs(model):
    """Returns the multiply-accumulates of one image's matrix products, counted by torch while timm's model runs."""
    model.eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        model(torch.empty(1, 3, *model.patch_embed.img_size))
    return counter.get_total_flops() // 2


def describe(model):
    """Returns the architecture of a timm model, read off its modules."""
    block = model.blocks[0]
    attention = block.attns[0].attn if hasattr(block, "attns") else block.attn
    mlp = block.ffns[0].mlp if hasattr(block, "ffns") else block.mlp
    norm = next(m for m in model.modules() if hasattr(m, "normalized_shape"))
    first = getattr(mlp, "fc1", None) or mlp.fc1_x
    rope = getattr(model, "rope", None)
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    return {
        "parameters": sum(value.numel() for value in model.parameters()),
        "macs": count_macs(model),
        "image_size": list(model.patch_embed.img_size),
        "patch_size": list(model.patch_embed.patch_size),
        "width": model.embed_dim,
        "blocks": len(model.blocks),
        "parallel": len(block.attns) if hasattr(block, "attns") else 1,
        "heads": attention.num_heads,
        "mlp_dim": mlp.fc2.in_features,
        "mlp_gates": 2 if hasattr(mlp, "fc1_g") or first.out_features == 2 * mlp.fc2.in_features else 1,
        "activation": type(mlp.act).__name__ + (mlp.act.approximate if hasattr(mlp.act, "approximate") else ""),
        "classes": model.num_classes,
        "class_token": model.cls_token is not None,
        "distillation_token": "dist_token" in shapes,
        "registers": shapes.get("reg_token", (1, 0))[1],
        "prefix_tokens": model.num_prefix_tokens,
        "positions": shapes.get("pos_embed", (1, 0))[1],
        "rope": [type(rope).__name__, rope.temperature, getattr(rope, "ref_feat_shape", None)] if rope else None,
        "dynamic_size": model.dynamic_img_size,
        "pool": model.global_pool,
        "norms": [k for k in ("norm_pre", "norm", "fc_norm") if f"{k}.weight" in shapes],
        "norm": type(norm).__name__,
        "epsilon": norm.eps,
        "patch_bias": "patch_embed.proj.bias" in shapes,
        "attention_norm": any("attn.norm." in k for k in shapes),
        "mlp_norm": any("mlp.norm." in k for k in shapes),
        "layer_scale": next(
            (m.init_values for m in model.modules() if hasattr(m, "gamma") or getattr(m, "gamma_1", None) is not None),
            0,
        ),
        "qkv_biases": 3 * any("qkv.bias" in k for k in shapes) or 2 * any(".q_" in k and "bias" in k for k in shapes),
        "post_norm": type(block).__name__ in ("ResPostBlock", "EvaBlockPostNorm"),
    }


def main():
    models, normalizations = {}, []
    for name in sorted(list_models()):
        if not timm.is_model(name):
            continue
        configs = _registry._model_default_cfgs[name]
        with torch.device("meta"):
            model = timm.create_model(name)
        weights = []
        for tag in configs.tags:
            cfg = configs.cfgs[tag]
            normalization = [list(cfg.mean), list(cfg.std)]
            if normalization not in normalizations:
                normalizations.append(normalization)
            hub_id = cfg.hf_hub_id and (
                f"{cfg.hf_hub_id}{name}.{tag}" if cfg.hf_hub_id.endswith("/") else cfg.hf_hub_id
            )
            size = cfg.input_size[1]
            row = [tag, hub_id, cfg.license, cfg.num_classes, size, normalizations.index(normalization), cfg.crop_pct]
            weights.append([*row, cfg.crop_mode, cfg.interpolation])
        models[name] = {**describe(model), "weights": weights}
    usual = {
        key: value
        for key, value in models["vit_base_patch16_224"].items()
        if key not in ("parameters", "macs", "weights")
    }
    lines = ",\n".join(
        f"{json.dumps(name)}: {json.dumps({k: v for k, v in record.items() if k not in usual or v != usual[k]})}"
        for name, record in models.items()
    )
    head = {"timm": timm.__version__, "normalizations": normalizations, "usual": usual}
    text = f'{json.dumps(head)[:-1]}, "models": {{\n{lines}\n}}}}\n'
    Path(__file__).with_suffix(".json").write_text(text)


if __name__ == "__main__":
    main()
