"""Hugging Face transformers' own DeepSeek-V2 modules, called alone; torch's autograd for the backward."""

import os
from collections.abc import Mapping
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers.models.deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import (
    DeepseekV2Attention,
    DeepseekV2Experts,
    DeepseekV2MLP,
    DeepseekV2Moe,
    DeepseekV2RotaryEmbedding,
    apply_rotary_emb,
)

from ._experts import STORED, Experts, slots
from ._latent_attention import Family

FRAMEWORK = "torch"
TIES = "any"  # torch.topk leaves them open
DECLARES = {
    "router.softmax": {"mask_fill": "0"},
    "swiglu": STORED,
    "moe.experts": STORED,
    "moe.layer": {"mask_fill": "0", **STORED},
}
V2 = Family(DeepseekV2Config, DeepseekV2Attention, DeepseekV2RotaryEmbedding, {"interleaved": apply_rotary_emb}, "interleaved")
rope_frequencies, rope, rope_bwd, mla_prefill, mla_prefill_bwd = V2.functions()


def _sizes(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """The router's configuration"""
    fixed = {"topk_method": "softmax", "norm_topk_prob": False, "mask_fill": "0"}
    if any(attrs.get(name, value) != value for name, value in fixed.items()):
        raise NotImplementedError("transformers' DeepseekV2TopkRouter has " + ", ".join(f"{k}={v}" for k, v in fixed.items()))
    method = "greedy" if attrs["n_group"] == 1 else "group_limited_greedy"
    return {"topk_method": method, **{name: attrs[name] for name in ("n_group", "topk_group", "routed_scaling_factor")}}


V2_EXPERTS = Experts(DeepseekV2Config, DeepseekV2MLP, DeepseekV2Experts, DeepseekV2Moe, _sizes)
swiglu, swiglu_bwd, moe_experts, moe_experts_bwd, moe_layer, moe_layer_bwd = V2_EXPERTS.functions()


def router_softmax(logits: torch.Tensor, k: int, **attrs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return V2_EXPERTS.route(logits, None, k, attrs)


def router_softmax_bwd(logits: torch.Tensor, topk_idx: torch.Tensor, dtopk_weight: torch.Tensor, k: int, **attrs: Any) -> torch.Tensor:
    """Its slots come in another order."""
    logits.requires_grad_()
    own_idx, own_weight = V2_EXPERTS.route(logits, None, k, attrs)
    return torch.autograd.grad(own_weight, logits, slots(topk_idx, dtopk_weight.float(), own_idx, logits.shape[1]))[0]
