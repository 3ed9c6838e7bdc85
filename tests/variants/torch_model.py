"""A layer, a prediction module, the loss of a chain of them and the model as they are written in torch; gradients are autograd's."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import rope
from .block import CACHES, DENSE, EXPERTS, SHARED, TRAINED, WEIGHTS
from .floats import Array
from .frameworks import array, tensor, torch
from .mla import mask_of, rope_attrs, sizes_of
from .model import OF_EXPERTS
from .mtp import ENDS, ORDER, after, targets_of

Given = dict[str, Any]  # tensors by name, and numbers: attributes, positions, cu_seqlens
F: Any = None if torch is None else torch.nn.functional
NUMBERS = ("positions", "cu_seqlens")


@dataclass(frozen=True)
class Net:
    """at: the dtype of arrays, or their own. eager: torch's operations round to it, one by one; else norms, rotation, softmax, router and
    silu are in float32 at least. absorbed: attention on the latents; else fused, on keys and values."""

    at: str = ""
    eager: bool = False
    absorbed: bool = False

    def wide(self, x: Any) -> Any:
        return x if self.eager or x.element_size() > 2 else x.float()


def rmsnorm(net: Net, x: Any, weight: Any, eps: float) -> Any:
    if net.eager:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight
    return F.rms_norm(net.wide(x), (x.shape[-1],), net.wide(weight), eps).to(x.dtype)


def rotated(x: Any, w: Given, a: dict[str, Any]) -> Any:
    """x[b,s,h,r], neighbours as complex numbers, which torch has from single precision up"""
    kind = np.float64 if x.dtype == torch.float64 else np.float32
    turn = rope_attrs(a)
    assert turn["layout_in"] == turn["layout_out"] == "interleaved"
    cos, sin = rope.tables(rope.freqs_native)(w["positions"].reshape(-1), x.shape[-1], turn, kind)
    angle = torch.complex(torch.tensor(cos), torch.tensor(sin)).reshape(*x.shape[:2], 1, -1)
    z = torch.complex(*(x[..., i::2].to(angle.real.dtype) for i in (0, 1)))
    return torch.view_as_real(z * angle).flatten(3).to(x.dtype)


def attention(net: Net, x: Any, w: Given, a: dict[str, Any]) -> Any:
    (b, s, _), z, eps = x.shape, sizes_of(a), a.get("latent_norm_eps")
    eps = a.get("rms_norm_eps", 1e-6) if eps is None else eps
    if w.get("q_proj") is not None:
        q = F.linear(x, w["q_proj"])
    else:
        q = F.linear(rmsnorm(net, F.linear(x, w["q_a_proj"]), w["q_a_layernorm"], eps), w["q_b_proj"])
    q_nope, q_pe = q.view(b, s, z.h, -1).split([z.dn, z.r], -1)
    c_kv, k_pe = F.linear(x, w["kv_a_proj_with_mqa"]).split([z.c, z.r], -1)
    c_kv, k_pe, q_pe = rmsnorm(net, c_kv, w["kv_a_layernorm"], eps), rotated(k_pe[:, :, None], w, a)[:, :, 0], rotated(q_pe, w, a)
    if w.get(CACHES[0]) is not None:
        c_kv, k_pe = (torch.cat(pair, 1) for pair in ((w[CACHES[0]], c_kv), (w[CACHES[1]], k_pe)))
    seen, scale = torch.tensor(mask_of(s, c_kv.shape[1], w.get("cu_seqlens"))), rope.softmax_scale(z.dn + z.r, rope_attrs(a))
    up = w["kv_b_proj"].view(z.h, z.dn + z.dv, z.c)
    if net.absorbed or (net.eager and a.get("absorbed")):
        q_c = torch.einsum("bshn,hnc->bshc", q_nope, up[:, : z.dn])
        scores = torch.einsum("bshc,btc->bsht", net.wide(q_c), net.wide(c_kv)) + torch.einsum(
            "bshr,btr->bsht", net.wide(q_pe), net.wide(k_pe)
        )
        p = torch.softmax((scores * scale).masked_fill(~seen[:, None, :], -torch.inf), -1).to(x.dtype)
        o = torch.einsum("bshc,hvc->bshv", torch.einsum("bsht,btc->bshc", p, c_kv), up[:, z.dn :])
    else:
        kv = torch.einsum("btc,hkc->bhtk", c_kv, up)
        k = torch.cat([kv[..., : z.dn], k_pe[:, None].expand(b, z.h, -1, -1)], -1)
        q = torch.cat([q_nope, q_pe], -1).transpose(1, 2)
        o = F.scaled_dot_product_attention(q, k, kv[..., z.dn :], attn_mask=seen, scale=scale).transpose(1, 2)
    return F.linear(o.reshape(b, s, -1), w["o_proj"])


def mlp(net: Net, x: Any, w: list[Any], limit: float | None) -> Any:
    w_gate, w_up, w_down = w
    gate, up = F.linear(x, w_gate), F.linear(x, w_up)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    return F.linear((F.silu(net.wide(gate)) * net.wide(up)).to(x.dtype), w_down)


def best(t: Any, k: int) -> Any:
    """The first among equals, which topk does not promise"""
    return torch.sort(t, dim=-1, descending=True, stable=True)[1][:, :k]


def routed(net: Net, x: Any, w: Given, a: dict[str, Any], idx: Any) -> tuple[Any, Any]:
    logits, greedy = F.linear(net.wide(x), net.wide(w["gate_weight"])), a.get("topk_method", "noaux_tc") == "softmax"
    assert a.get("scoring", "sigmoid") == "sigmoid"
    scores = torch.softmax(logits, -1) if greedy else torch.sigmoid(logits)
    if idx is None:
        t, groups = scores if greedy or w.get("e_score_correction_bias") is None else scores + w["e_score_correction_bias"], a["n_group"]
        if groups > 1:
            parts = t.unflatten(1, (groups, -1))
            kept = best(parts.amax(-1) if greedy else parts.topk(2, -1)[0].sum(-1), a["topk_group"])
            mask = torch.ones(len(t), groups, dtype=torch.bool).scatter(1, kept, False)
            t = parts.masked_fill(mask[:, :, None], -torch.inf).flatten(1)
        idx = best(t, a["num_experts_per_tok"])
    weight = scores.gather(1, idx)
    if a.get("norm_topk_prob", True):
        weight = weight / (weight.sum(-1, keepdim=True) + a.get("denominator_eps", 1e-20))
    return idx, weight * a.get("routed_scaling_factor", 2.5)


def routed_experts(net: Net, x: Any, w: Given, a: dict[str, Any], idx: Any) -> tuple[Any, Any]:
    idx, weight = routed(net, x, w, a, idx)
    y = torch.zeros(x.shape, dtype=weight.dtype)  # a sum for each token, in the weights' dtype
    for e in range(len(w["w_gate"])):
        token, slot = torch.where(idx == e)
        if len(token):
            out = mlp(net, x[token], [w[name][e] for name in EXPERTS[1:]], a.get("limit"))
            y = y.index_add(0, token, (out * weight[token, slot, None]).to(y.dtype))
    y = y.to(x.dtype)
    return y if w.get(SHARED[0]) is None else y + mlp(net, x, [w[name] for name in SHARED], a.get("limit")), idx


def layer(net: Net, x: Any, w: Given, a: dict[str, Any], idx: Any = None) -> tuple[Any, Any]:
    eps, (b, s, _) = a.get("rms_norm_eps", 1e-6), x.shape
    x = x + attention(net, rmsnorm(net, x, w["input_layernorm"], eps), w, a)
    normed = rmsnorm(net, x, w["post_attention_layernorm"], eps)
    if w.get(DENSE[0]) is not None:
        return x + mlp(net, normed, [w[name] for name in DENSE], a.get("limit")), torch.zeros(b, s, 0, dtype=torch.int64)
    y, idx = routed_experts(net, normed.flatten(0, 1), w, a, None if idx is None else idx.flatten(0, 1))
    return x + y.view(x.shape), idx.view(b, s, -1)


def block(net: Net, t: Given, a: dict[str, Any], idx: Any = None) -> tuple[tuple, Any]:
    y, idx = layer(net, t["x"], t, a, idx)
    return (y,), idx


def module(net: Net, h: Any, ids: Any, t: Given, a: dict[str, Any], idx: Any) -> tuple[Any, Any, Any]:
    """What the head reads, what the next module reads, the choice"""
    eps = a.get("rms_norm_eps", 1e-6)
    pair = [rmsnorm(net, F.embedding(ids, t["embed_tokens"]), t["enorm"], eps), rmsnorm(net, h, t["hnorm"], eps)]
    pair = pair if a.get("concat", "embed_first") == "embed_first" else pair[::-1]
    y, idx = layer(net, F.linear(torch.cat(pair, -1), t["eh_proj"]), t, a, idx)
    last = rmsnorm(net, y, t["shared_head_norm"], eps)
    return last, last if after(a) else y, idx


def mtp(net: Net, t: Given, a: dict[str, Any], idx: Any = None) -> tuple[tuple, Any]:
    last, following, idx = module(net, t["h"], t["ids"][:, a.get("depth", 1) :], t, a, idx)
    return (F.linear(last, t["shared_head"]), following), idx


def loss(net: Net, t: Given, a: dict[str, Any], idx: Any = None) -> tuple[tuple, Any]:
    """The modules one after the other, each with a row fewer; logits in the activations' format."""
    h, ids, p, ignore = t["h"], t["ids"], len(t["enorm"]), a.get("ignore_index", -100)
    (b, s, _), labels = h.shape, t.get("labels", t["ids"])
    shared = {name: t[name].detach() if a.get("detach_head") else t[name] for name in ENDS}
    total, chosen = net.wide(h).new_zeros(()), torch.full((p, b, s, a["num_experts_per_tok"]), -1)
    for k in range(1, min(p, s - 1) + 1):
        ends = t.get("cu_seqlens")
        own = {**t, **shared, **{name: t[name][k - 1] for name in (*ORDER, "e_score_correction_bias") if t.get(name) is not None}}
        own |= {"positions": t["positions"][:, : s - k], "cu_seqlens": None if ends is None else np.minimum(ends, s - k)}
        last, h, found = module(net, h[:, : s - k], ids[:, k:], own, a, None if idx is None else idx[k - 1, :, : s - k])
        target = torch.tensor(targets_of(labels.numpy(), ends, k, ignore)[:, : s - k].reshape(-1))
        logits = net.wide(F.linear(last, shared["shared_head"])).flatten(0, 1)
        rows = int((target != ignore).sum()) if a.get("denominator", "total") == "counted" else b * s
        total = total + F.cross_entropy(logits, target, ignore_index=ignore, reduction="sum") / max(rows, 1)
        chosen[k - 1, :, : s - k] = found
    return (total * (a.get("weight", 0.3) / max(p, 1)),), chosen


def model(net: Net, t: Given, a: dict[str, Any], idx: Any = None) -> tuple[tuple, Any]:
    x, dense, chosen = F.embedding(t["ids"], t["embed_tokens"]), 0 if t.get(DENSE[0]) is None else len(t[DENSE[0]]), []
    for i in range(len(t["input_layernorm"])):
        first, absent = (0, OF_EXPERTS) if i < dense else (dense, DENSE)
        own = {n: t[n][i - first if n in OF_EXPERTS else i] for n in WEIGHTS if t.get(n) is not None and n not in absent}
        places = {name: t[name] for name in NUMBERS if name in t}
        x, found = layer(net, x, {**places, **own}, a, None if idx is None or i < dense else idx[i - dense])
        chosen += [found] if i >= dense else []
    hidden = rmsnorm(net, x, t["norm"], a.get("rms_norm_eps", 1e-6))
    return (F.linear(hidden, t["lm_head"]), hidden), torch.stack(chosen)


# op: the function, the inputs that have gradients and the outputs' gradients, in order
OPS: dict[str, tuple[Callable, tuple[str, ...], tuple[str, ...]]] = {
    "block": (block, ("x", *CACHES, *TRAINED), ("dy",)),
    "mtp": (mtp, ("h", *ORDER, *ENDS), ("dlogits", "dh_next")),
    "mtp.loss": (loss, ("h", *ORDER, *ENDS), ("dloss",)),
    "model": (model, ("embed_tokens", *TRAINED, "norm", "lm_head"), ("dlogits", "dhidden")),
}


def parted(net: Net, keywords: dict[str, Any]) -> tuple[Given, dict[str, Any]]:
    """What is an array, as torch has it, and the attributes"""
    arrays = {name: x for name, x in keywords.items() if isinstance(x, np.ndarray)}
    wide = (*NUMBERS, "e_score_correction_bias")
    t = {name: tensor(x, net.at if x.dtype.kind == "f" and name not in wide else "") for name, x in arrays.items()}
    t |= {name: arrays[name] for name in NUMBERS if name in arrays}
    return t, {name: value for name, value in keywords.items() if name not in arrays}


def both(op: str, net: Net) -> tuple[Callable, Callable]:
    fn, names, outputs = OPS[op]
    like = names[0]

    def forward(**keywords: Any) -> tuple[Array, ...]:
        t, a = parted(net, keywords)
        found, idx = fn(net, t, a)
        return *(array(y, keywords[like]) for y in found), idx.numpy()

    def backward(*, topk_idx: Array, **keywords: Any) -> tuple[Array, ...]:
        t, a = parted(net, keywords)
        inputs = {name: t[name].requires_grad_() for name in names if name in t}
        found, _ = fn(net, t, a, torch.tensor(topk_idx))
        up = [t[name].to(y.dtype) for name, y in zip(outputs, found, strict=True)]
        grads = torch.autograd.grad(found, list(inputs.values()), up, allow_unused=True)
        return tuple(np.zeros_like(keywords[n]) if g is None else array(g, keywords[n]) for n, g in zip(inputs, grads, strict=True))

    return forward, backward


NETS = {
    "torch": (Net(), ("fp32", "bf16", "fp16", "fp64")),
    "torch-absorbed": (Net(absorbed=True), ("fp32", "bf16", "fp16", "fp64")),
    "torch-bf16": (Net("bfloat16"), ("bf16",)),
    "torch-fp16": (Net("float16"), ("fp16",)),
    "eager-torch": (Net("bfloat16", eager=True), ("bf16-eager",)),
}


def entries() -> list[tuple[str, str, str, Callable, tuple[str, ...]]]:
    """Op, direction, name, function, precisions"""
    if torch is None:
        return []
    return [
        (op, way, name, fn, precisions)
        for name, (net, precisions) in NETS.items()
        for op in OPS
        for way, fn in zip(("forward", "backward"), both(op, net), strict=True)
    ]
