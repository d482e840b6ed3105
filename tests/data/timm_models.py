"""Writes timm_models.json: what timm says of the models in our registry. Run it where timm 1.0.31 is installed:

    PYTHONPATH=src python tests/data/timm_models.py

Every model is built on torch's meta device, so that its shapes are real and its weights take no memory. A model's line
has what its modules and tensors show, not what the registry calls it; its weights have (tag, hub id, licence, classes,
image size, index into "normalizations", crop, crop mode, interpolation).
"""

import json
from pathlib import Path

import timm
import torch
from timm.models import _registry

from vitreous.registry import list_models


def describe(model):
    """Returns the architecture of a timm model, read off its modules."""
    block = model.blocks[0]
    attention = block.attns[0].attn if hasattr(block, "attns") else block.attn
    mlp = block.ffns[0].mlp if hasattr(block, "ffns") else block.mlp
    norm = next(m for m in model.modules() if hasattr(m, "normalized_shape"))
    first = getattr(mlp, "fc1", None) or mlp.fc1_x
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    return {
        "parameters": sum(value.numel() for value in model.parameters()),
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
        "rope": type(model.rope).__name__ if getattr(model, "rope", None) is not None else None,
        "dynamic_size": model.dynamic_img_size,
        "pool": model.global_pool,
        "norms": [k for k in ("norm_pre", "norm", "fc_norm") if f"{k}.weight" in shapes],
        "norm": type(norm).__name__,
        "epsilon": norm.eps,
        "patch_bias": "patch_embed.proj.bias" in shapes,
        "attention_norm": any("attn.norm." in k for k in shapes),
        "mlp_norm": any("mlp.norm." in k for k in shapes),
        "layer_scale": any(k.endswith((".gamma", ".gamma_1")) for k in shapes),
        "qkv_biases": 3 if any("qkv.bias" in k for k in shapes) else 2 * any("q_bias" in k or "q_proj.bias" in k for k in shapes),
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
            hub_id = cfg.hf_hub_id and (f"{cfg.hf_hub_id}{name}.{tag}" if cfg.hf_hub_id.endswith("/") else cfg.hf_hub_id)
            size = cfg.input_size[1]
            row = [tag, hub_id, cfg.license, cfg.num_classes, size, normalizations.index(normalization), cfg.crop_pct]
            weights.append([*row, cfg.crop_mode, cfg.interpolation])
        models[name] = {**describe(model), "weights": weights}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(record)}" for name, record in models.items())
    head = {"timm": timm.__version__, "normalizations": normalizations}
    text = f'{json.dumps(head)[:-1]}, "models": {{\n{lines}\n}}}}\n'
    Path(__file__).with_suffix(".json").write_text(text)


if __name__ == "__main__":
    main()
