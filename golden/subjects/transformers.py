"""Hugging Face transformers' own DeepSeek-V3 modules, called alone; torch's autograd for the backward."""

import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers.models.deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RMSNorm,
    DeepseekV3RotaryEmbedding,
    DeepseekV3TopkRouter,
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_interleave,
)

from ._latent_attention import Family, float32_inside

FRAMEWORK = "torch"
TIES = "any"  # torch.topk leaves them open
HALVES = {"cos_sin": "stored"}  # cos and sin are rounded to the activations' dtype
DECLARES = {
    "rmsnorm": {"cast_order": "cast_then_weight"},  # the normalised x is rounded, then multiplied
    "rope": {"layout_out": "half", **HALVES},
    "mla.prefill": {"rope_layout_out": "half", **HALVES},
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


def _route(logits: torch.Tensor, bias: torch.Tensor, attrs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The router takes hidden states: with the identity for its weight, those are the logits, exactly."""
    float32_inside(logits)
    if attrs["scoring"] != "sigmoid" or attrs["mask_fill"] != "-inf" or attrs["denominator_eps"] != 1e-20:
        raise NotImplementedError("transformers' DeepseekV3TopkRouter has sigmoid scores, a fill of -inf and an eps of 1e-20")
    e = logits.shape[1]
    config = DeepseekV3Config(
        hidden_size=e,
        n_routed_experts=e,
        num_experts_per_tok=attrs["k"],
        n_group=attrs["n_group"],
        topk_group=attrs["topk_group"],
        norm_topk_prob=attrs["norm_topk_prob"],
        routed_scaling_factor=attrs["routed_scaling_factor"],
    )
    router = DeepseekV3TopkRouter(config)
    router.weight = torch.nn.Parameter(torch.eye(e))
    router.e_score_correction_bias = bias
    _, topk_weight, topk_idx = router(logits)
    return topk_idx, topk_weight


def router_noaux_tc(logits: torch.Tensor, bias: torch.Tensor, **attrs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _route(logits, bias, attrs)


def router_noaux_tc_bwd(
    logits: torch.Tensor, bias: torch.Tensor, topk_idx: torch.Tensor, dtopk_weight: torch.Tensor, **attrs: Any
) -> torch.Tensor:
    """Its slots come in another order: each slot's gradient is handed to the slot that holds the same expert."""
    logits.requires_grad_()
    own_idx, own_weight = _route(logits, bias, attrs)
    dense = torch.zeros(logits.shape, dtype=own_weight.dtype).scatter(1, topk_idx, dtopk_weight.to(own_weight.dtype))
    (dlogits,) = torch.autograd.grad(own_weight, logits, dense.gather(1, own_idx))
    return dlogits


V3 = Family(
    DeepseekV3Config,
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
    {"interleaved": apply_rotary_pos_emb_interleave, "half": apply_rotary_pos_emb},
    "half",
)
rope_frequencies, rope, rope_bwd, mla_prefill, mla_prefill_bwd = V3.functions()
