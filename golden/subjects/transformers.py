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

FRAMEWORK = "torch"
TIES = "any"  # torch.topk leaves them open
HALVES = {"cos_sin": "stored"}  # cos and sin are rounded to the activations' dtype
DECLARES = {
    "rmsnorm": {"cast_order": "cast_then_weight"},  # the normalised x is rounded, then multiplied
    "rope": {"layout_out": "half", **HALVES},
    "mla.prefill": {"rope_layout_out": "half", **HALVES},
}


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
    _float32_inside(x)
    norm = DeepseekV3RMSNorm(x.shape[-1], eps=eps)
    norm.weight = torch.nn.Parameter(weight.clone())
    return norm


def _float32_inside(x: torch.Tensor) -> None:
    if x.dtype == torch.float64:
        raise NotImplementedError("transformers computes this in float32")


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
    _float32_inside(logits)
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


YARN = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def _config(r: int, attrs: dict, **sizes: Any) -> Any:
    """rope_scaling as config.json has it; without a factor there is none."""
    if attrs["yarn_gating"] != "always":
        raise NotImplementedError("transformers always applies YaRN")
    scaling = {"rope_type": "yarn", **{k: attrs[k] for k in YARN}} if attrs["factor"] > 1 else {"rope_type": "default"}
    rope = {**scaling, "rope_theta": attrs["theta"]}
    config = DeepseekV3Config(rope_parameters=rope, qk_rope_head_dim=r, max_position_embeddings=attrs["max_position"], **sizes)
    config._attn_implementation = "eager"
    config.head_dim = r
    return config


def rope(x: torch.Tensor, positions: torch.Tensor, **attrs: Any) -> torch.Tensor:
    _float32_inside(x)
    if attrs["layout_out"] != "half":
        raise NotImplementedError("transformers writes rotated halves: layout_out=half")
    cos, sin = DeepseekV3RotaryEmbedding(_config(x.shape[-1], attrs))(x, positions[None])
    turn = apply_rotary_pos_emb_interleave if attrs["layout_in"] == "interleaved" else apply_rotary_pos_emb
    heads_first = x.transpose(0, 1)[None]  # [1,h,n,r]
    return turn(heads_first, heads_first, cos, sin)[0][0].transpose(0, 1)


def rope_bwd(x: torch.Tensor, positions: torch.Tensor, dy: torch.Tensor, **attrs: Any) -> torch.Tensor:
    x.requires_grad_()
    return torch.autograd.grad(rope(x, positions, **attrs), x, dy)[0]


class _Latents:
    """Stands where a cache stands: it sees c_kv and the rotated k_pe before they are expanded."""

    def update(self, c_kv: torch.Tensor, k_pe: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.c_kv, self.k_pe = c_kv[:, 0], k_pe[:, 0]
        return c_kv, k_pe


def _attend(x: torch.Tensor, positions: torch.Tensor, weights: dict, attrs: dict) -> tuple[torch.Tensor, ...]:
    _float32_inside(x)
    if attrs["rope_layout_out"] != "half" or attrs["rms_norm_eps"] != 1e-6:
        raise NotImplementedError("transformers rotates into halves, and its inner norms have an eps of 1e-6")
    h = attrs["num_attention_heads"]
    sizes = {name: attrs[name] for name in ("qk_nope_head_dim", "v_head_dim", "kv_lora_rank")}
    lora = weights["q_a_proj"].shape[0] if "q_a_proj" in weights else None
    config = _config(
        attrs["qk_rope_head_dim"], attrs, hidden_size=x.shape[-1], num_attention_heads=h, num_key_value_heads=h, q_lora_rank=lora, **sizes
    )
    config.rope_interleave = attrs["rope_layout_in"] == "interleaved"
    layer, latents = DeepseekV3Attention(config, 0), _Latents()
    for name, weight in weights.items():
        del getattr(layer, name).weight
        getattr(layer, name).weight = weight  # the tensor itself, for autograd
    s = x.shape[1]
    mask = torch.full((s, s), float("-inf"), dtype=x.dtype).triu(1)[None, None]
    y = layer(x, DeepseekV3RotaryEmbedding(config)(x, positions), mask, latents)[0]
    return y, latents.c_kv, latents.k_pe


def _split(arguments: dict) -> tuple[dict, dict]:
    weights = {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    return weights, {k: v for k, v in arguments.items() if k not in weights}


def mla_prefill(x: torch.Tensor, positions: torch.Tensor, **arguments: Any) -> tuple[torch.Tensor, ...]:
    return _attend(x, positions, *_split(arguments))


def mla_prefill_bwd(
    x: torch.Tensor, positions: torch.Tensor, dy: torch.Tensor, dc_kv: torch.Tensor, dk_pe: torch.Tensor, **arguments: Any
) -> tuple[torch.Tensor, ...]:
    weights, attrs = _split(arguments)
    leaves = [x.requires_grad_(), *(w.requires_grad_() for w in weights.values())]
    return torch.autograd.grad(_attend(x, positions, weights, attrs), leaves, (dy, dc_kv, dk_pe))
