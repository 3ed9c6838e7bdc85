"""Benchmarks of attention: V3's layer beside Hugging Face's, and attention alone beside torch's. float32, weights made at random."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from .bench import Bench, normal

V3 = {"hidden": 7168, "heads": 128, "q_lora": 1536, "kv_lora": 512, "nope": 128, "rope": 64, "v": 128}
YARN = {"factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
TOKENS = 256


def weights() -> dict[str, np.ndarray]:
    """One V3 attention layer, 187 million parameters"""
    d, h, q, c, dn, r, dv = V3.values()
    shapes = {
        "q_a_proj": (q, d),
        "q_b_proj": (h * (dn + r), q),
        "kv_a_proj_with_mqa": (c + r, d),
        "kv_b_proj": (h * (dn + dv), c),
        "o_proj": (d, h * dv),
    }
    drawn = {name: normal(shape) * np.float32(shape[1] ** -0.5) for name, shape in shapes.items()}
    return {**drawn, "q_a_layernorm": normal((q,)) * 0.1 + 1, "kv_a_layernorm": normal((c,)) * 0.1 + 1}


def hugging_face(w: dict[str, Any], implementation: str) -> Any:
    """DeepseekV3Attention with these very tensors for its weights, as a function of hidden states[1,s,d]"""
    import torch

    from .subjects.transformers import DeepseekV3Attention, DeepseekV3Config, DeepseekV3RotaryEmbedding

    d, h, q, c, dn, r, dv = V3.values()
    config = DeepseekV3Config(
        hidden_size=d,
        num_attention_heads=h,
        num_key_value_heads=h,
        q_lora_rank=q,
        kv_lora_rank=c,
        qk_nope_head_dim=dn,
        qk_rope_head_dim=r,
        v_head_dim=dv,
        rope_parameters={"rope_type": "yarn", **YARN, "rope_theta": 10000.0},
    )
    config._attn_implementation = implementation
    config.head_dim = r
    with torch.device("meta"):
        layer = DeepseekV3Attention(config, 0)
    for name, weight in w.items():
        del getattr(layer, name).weight
        getattr(layer, name).weight = weight
    layer.eval()
    turn = DeepseekV3RotaryEmbedding(config)
    positions = torch.arange(TOKENS)[None]
    mask = torch.full((TOKENS, TOKENS), float("-inf")).triu(1)[None, None] if implementation == "eager" else None
    return lambda x: layer(x, turn(x, positions), mask)[0]


def flops_of_layer() -> tuple[int, int]:
    """Of the projections, and of the scores that the causal mask lets through"""
    d, h, q, c, dn, r, dv = V3.values()
    parameters = d * (q + c + r) + q * h * (dn + r) + c * h * (dn + dv) + d * h * dv
    return 2 * TOKENS * parameters, TOKENS * (TOKENS + 1) * h * (dn + r + dv)


def prefill() -> Iterator[Bench]:
    """One layer, b=1, s=256: forward, then forward and backward together (a training step: what the forward saves is used)."""
    import torch

    from ..kernels.cpu import mla

    w = weights()
    x, dy = normal((1, TOKENS, V3["hidden"])), normal((1, TOKENS, V3["hidden"])) + 1
    latents = [np.zeros((1, TOKENS, width), np.float32) for width in (V3["kv_lora"], V3["rope"])]
    arrays, attrs = {"x": x, "positions": np.arange(TOKENS)[None], **w}, {"factor": YARN["factor"]}
    leaves = {name: torch.from_numpy(a).requires_grad_() for name, a in w.items()}
    tx, tdy = torch.from_numpy(x).requires_grad_(), torch.from_numpy(dy)
    layers = {f"transformers {name}": hugging_face(leaves, name) for name in ("sdpa", "eager")}

    def infer(layer: Any) -> Any:
        with torch.no_grad():
            return layer(tx)

    kept = {name: np.empty_like(a) for name, a in w.items() if name.endswith(("proj", "mqa"))}

    def ours(out: Any = None) -> Any:
        _, saved = mla.prefill_saving(**arrays, **attrs)
        return mla.backward(saved, dy, *latents, out=out)

    projections, scores = flops_of_layer()
    case, out = f"V3, 1×{TOKENS}", ((V3["hidden"], V3["heads"] * V3["v"], TOKENS),)
    forward = {name: (lambda layer=layer: infer(layer)) for name, layer in layers.items()}
    yield Bench("mla.prefill", case, lambda: mla.mla_prefill(**arrays, **attrs), forward, flops=projections + scores, products=out)
    both = {name: (lambda layer=layer: torch.autograd.grad(layer(tx), (tx, *leaves.values()), tdy)) for name, layer in layers.items()}
    yield Bench("mla.prefill", case, ours, both, 0, "forward+backward", 3 * (projections + scores), out)
    case += ", gradients into arrays that we keep"  # which the peers cannot: autograd allocates them anew
    yield Bench("mla.prefill", case, lambda: ours(kept), both, 0, "forward+backward", 3 * (projections + scores), out)


def attention() -> Iterator[Bench]:
    """Attention alone, causal, V3's widths: its memory is one block's, torch's eager form holds every score."""
    import torch

    from ..kernels import cpu

    s, h, dk, dv = 2048, 16, 192, 128
    q, k, v = (normal((1, s, h, width)) for width in (dk, dk, dv))
    do, dlse = normal((1, s, h, dv)) + 1, np.zeros((1, h, s), np.float32)
    heads = [torch.from_numpy(a).requires_grad_() for a in (q, k, v)]
    tdo = torch.from_numpy(do)

    def sdpa() -> Any:
        qh, kh, vh = (x.transpose(1, 2) for x in heads)
        return torch.nn.functional.scaled_dot_product_attention(qh, kh, vh, is_causal=True).transpose(1, 2)

    mask = torch.full((s, s), float("-inf")).triu(1)

    def eager() -> Any:
        qh, kh, vh = (x.transpose(1, 2) for x in heads)
        return ((qh @ kh.mT * dk**-0.5 + mask).softmax(-1) @ vh).transpose(1, 2)

    def infer(attend: Any) -> Any:
        with torch.no_grad():
            return attend()

    case, flops, peers = f"1×{s}, 16 heads, 192/128", s * (s + 1) * h * (dk + dv), {"torch sdpa": sdpa, "torch eager": eager}
    forward = {name: (lambda attend=attend: infer(attend)) for name, attend in peers.items()}
    yield Bench("attention", case, lambda: cpu.attention(q=q, k=k, v=v), forward, flops=flops)
    both = {name: (lambda attend=attend: torch.autograd.grad(attend(), heads, tdo)) for name, attend in peers.items()}
    # attention_bwd runs the forward itself
    yield Bench("attention", case, lambda: cpu.attention_bwd(q=q, k=k, v=v, do=do, dlse=dlse), both, 0, "forward+backward", 3 * flops)
