"""Hugging Face transformers' own DeepSeek-V3 modules, called alone; torch's autograd for the backward."""

import os
from collections.abc import Mapping
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers.models.deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3Experts,
    DeepseekV3MLP,
    DeepseekV3MoE,
    DeepseekV3RMSNorm,
    DeepseekV3RotaryEmbedding,
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_interleave,
)

from ._experts import STORED, Experts, slots
from ._latent_attention import Family, float32_inside

FRAMEWORK = "torch"
TIES = "any"  # torch.topk leaves them open
HALVES = {"cos_sin": "stored"}  # cos and sin are rounded to the activations' dtype
DECLARES = {
    "rmsnorm": {"cast_order": "cast_then_weight"},  # the normalised x is rounded, then multiplied
    "rope": {"layout_out": "half", **HALVES},
    "mla.prefill": {"rope_layout_out": "half", **HALVES},
    "swiglu": STORED,
    "moe.experts": STORED,
    "moe.layer": STORED,
}


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
    float32_inside(x)
    norm = DeepseekV3RMSNorm(x.shape[-1], eps=eps)
    norm.weight = torch.nn.Parameter(weight.clone())
    return norm


def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float, cast_order: str) -> torch.Tensor:
    if cast_order != "cast_then_weight":
        raise NotImplementedError("transformers rounds the normalised x, then multiplies: cast_order=cast_then_weight")
    return _norm(x, weight, eps)(x)


def rmsnorm_bwd(x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor, eps: float, cast_order: str) -> tuple[torch.Tensor, ...]:
    norm = _norm(x, weight, eps)
    x.requires_grad_()
    return torch.autograd.grad(norm(x), (x, norm.weight), dy)


def _sizes(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """The router's configuration"""
    fixed = {
        "topk_method": "noaux_tc",
        "scoring": "sigmoid",
        "mask_fill": "-inf",
        "denominator_eps": 1e-20,
        "denominator_place": "add",
        "gate_dtype": "float32",
    }
    if any(attrs.get(name, value) != value for name, value in fixed.items()):
        raise NotImplementedError("transformers' DeepseekV3TopkRouter has " + ", ".join(f"{k}={v}" for k, v in fixed.items()))
    return {name: attrs[name] for name in ("n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor")}


V3_EXPERTS = Experts(DeepseekV3Config, DeepseekV3MLP, DeepseekV3Experts, DeepseekV3MoE, _sizes)
swiglu, swiglu_bwd, moe_experts, moe_experts_bwd, moe_layer, moe_layer_bwd = V3_EXPERTS.functions()


def router_noaux_tc(logits: torch.Tensor, bias: torch.Tensor, k: int, **attrs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return V3_EXPERTS.route(logits, bias, k, attrs)


def router_noaux_tc_bwd(
    logits: torch.Tensor, bias: torch.Tensor, topk_idx: torch.Tensor, dtopk_weight: torch.Tensor, k: int, **attrs: Any
) -> torch.Tensor:
    """Its slots come in another order."""
    logits.requires_grad_()
    own_idx, own_weight = V3_EXPERTS.route(logits, bias, k, attrs)
    return torch.autograd.grad(own_weight, logits, slots(topk_idx, dtopk_weight.float(), own_idx, logits.shape[1]))[0]


V3 = Family(
    DeepseekV3Config,
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
    {"interleaved": apply_rotary_pos_emb_interleave, "half": apply_rotary_pos_emb},
    "half",
)
rope_frequencies, rope, rope_bwd, mla_prefill, mla_prefill_bwd = V3.functions()
