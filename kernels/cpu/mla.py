"""Multi-head latent attention, naive and absorbed, forward and backward, from hidden states to output.

Activations that only products read lie feature first, [features,tokens]: with few tokens and many features BLAS shares out the features.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...ref.attention_parts import check_packed
from ...ref.mla import check_sequences, check_shapes
from ...ref.mla_parts import WEIGHTS
from . import _pool
from ._common import need
from ._declared import declared, split
from ._latent import Absorbed, Form, Heads, Naive, Sizes
from ._step import Setting, is_step, step
from ._turn import turn, turn_back
from .linear import product, transposed
from .norm import rmsnorm, rmsnorm_bwd
from .rotary import positions_of, tables, yarn_of

Array = NDArray[Any]
GROUP = 32  # heads that go from projection to o together, where no backward follows: their activations stay in the cache
SIZES = ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def _segments(op: str, b: int, s: int, t: int, cu_seqlens: Array | None) -> list[tuple[slice, slice]]:
    """The tokens of each sequence among the queries, and among the keys."""
    if cu_seqlens is None:
        return [(slice(i * s, (i + 1) * s), slice(i * t, (i + 1) * t)) for i in range(b)]
    return [(slice(*ends), slice(*ends)) for ends in itertools.pairwise(check_packed(op, "cu_seqlens", cu_seqlens, s))]


def _checked(form: Form, direction: str, arrays: dict[str, Any], attrs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], str]:
    arrays, a, _ = declared(form.name, direction, arrays, attrs)
    op = form.name.replace(".", "_") + ("" if direction == "forward" else "_bwd")
    for name in (*SIZES, "kv_lora_rank"):
        need(a[name] >= 1, op, name, a[name], f"{name} >= 1")
    need(a["rms_norm_eps"] >= 0, op, "rms_norm_eps", a["rms_norm_eps"], "rms_norm_eps >= 0")
    check_shapes(op, arrays, tuple(a[name] for name in SIZES), a["kv_lora_rank"])  # type: ignore[arg-type]
    check_sequences(op, arrays["x"], arrays["c_kv_cache"], arrays["k_pe_cache"], arrays["cu_seqlens"])
    cache, r = arrays["k_pe_cache"], a["qk_rope_head_dim"]
    need(cache is None or cache.shape[2] == r, op, "k_pe_cache", None if cache is None else f"of shape {cache.shape}", f"{r} channels")
    return arrays, a, op


def _setting(arrays: dict[str, Any], a: dict[str, Any], op: str) -> Setting:
    x = arrays["x"]
    h, dn, r, dv = (int(a[name]) for name in SIZES)
    yarn = yarn_of(op, r, a)
    turns = tables(positions_of(op, arrays["positions"].ravel()), r, yarn, x.dtype)
    layouts = a["rope_layout_in"], a["rope_layout_out"]
    return Setting((h, dn, r, dv), int(a["kv_lora_rank"]), float(a["rms_norm_eps"]), layouts, turns, yarn.softmax_scale(dn + r))


class Saved(NamedTuple):
    """What outputs and the backward need of the forward: activations, never the probabilities."""

    form: Form
    arrays: dict[str, Any]  # the inputs
    sizes: Sizes
    eps: float
    layouts: tuple[str, str]
    turns: tuple[Array, Array]  # cos, sin
    down: Any  # None without a query LoRA; q_a_proj x, [n,q]
    c_q: Array  # [n,q], or x[n,d] without
    latent: Array  # [n,c] before the norm
    heads: Heads  # the last group's; the backward needs all heads in one
    o: Array  # [h,dv,n]


def forward(form: Form, arrays: dict[str, Any], a: dict[str, Any], op: str, group: int | None = None) -> Saved:
    """Everything but the output projection, `group` heads at a time (GROUP, if not said; 0: all, for a backward), for checked arguments"""
    x = arrays["x"]
    b, s, d = x.shape
    n, flat = b * s, x.reshape(b * s, d)
    (h, dn, r, dv), c, eps, layouts, turns, scale = _setting(arrays, a, op)
    cached = 0 if arrays["c_kv_cache"] is None else arrays["c_kv_cache"].shape[1]
    segments = _segments(op, b, s, cached + s, arrays["cu_seqlens"])
    down, c_q, to_heads = None, flat, arrays["q_proj"]
    if to_heads is None:
        down, to_heads = np.ascontiguousarray(transposed(arrays["q_a_proj"], flat).T), arrays["q_b_proj"]
        c_q = rmsnorm(down, arrays["q_a_layernorm"], eps=eps)
    kv_a = transposed(arrays["kv_a_proj_with_mqa"], flat).reshape(1, c + r, n)
    k_pe = turn(kv_a, c, *turns, *layouts)[0]
    latent = np.ascontiguousarray(kv_a[0, :c].T)
    c_kv = rmsnorm(latent, arrays["kv_a_layernorm"], eps=eps)
    if cached:
        c_kv, k_pe = (
            np.concatenate([arrays[f"{name}_cache"], new.reshape(b, s, new.shape[1])], axis=1).reshape(b * (cached + s), new.shape[1])
            for name, new in (("c_kv", c_kv), ("k_pe", k_pe))
        )
    lse, o = np.empty((h, n), x.dtype), _pool.empty((h, dv, n), x.dtype)

    def some(h0: int, h1: int) -> Heads:
        sizes, up = (h1 - h0, dn, r, dv), arrays["kv_b_proj"][h0 * (dn + dv) : h1 * (dn + dv)]
        q = transposed(to_heads[h0 * (dn + r) : h1 * (dn + r)], c_q).reshape(h1 - h0, dn + r, n)
        q_pe = turn(q, dn, *turns, *layouts)
        heads = Heads(sizes, up, scale, segments, q, q_pe, c_kv, k_pe, form.core(sizes, q, c_kv, up), lse[h0:h1], o[h0:h1])
        with np.errstate(all="ignore"):
            form.forward(heads)
        return heads

    group = min((GROUP if group is None else group) or h, h)
    for h0 in range(0, h - group, group):
        some(h0, h0 + group)
    last = some((h - 1) // group * group, h)
    return Saved(form, arrays, (h, dn, r, dv), eps, layouts, turns, down, c_q, latent, last, o)


def outputs(saved: Saved) -> tuple[Array, Array, Array]:
    """y[b,s,d] and the new tokens' c_kv, k_pe"""
    b, s, d = saved.arrays["x"].shape
    w = saved.arrays["o_proj"]
    y = product(w, saved.o.reshape(w.shape[1], b * s))
    c_kv, k_pe = (_new(a, b, s) for a in (saved.heads.c_kv, saved.heads.k_pe))
    return np.ascontiguousarray(y.T).reshape(b, s, d), c_kv, k_pe


def _new(a: Array, b: int, s: int) -> Array:
    """Of [b·(t+s),·], what is not from the cache"""
    whole = a.reshape(b, a.shape[0] // b if b else s, a.shape[1])
    return np.ascontiguousarray(whole[:, whole.shape[1] - s :])


def backward(saved: Saved, dy: Array, dc_kv: Array, dk_pe: Array, out: Mapping[str, Array] | None = None) -> tuple[Array, ...]:
    """dx, then the gradients of the caches and weights that there are. A projection's goes into out[its name], if there is one."""
    out = out or {}
    w, (h, dn, r, dv) = saved.arrays, saved.sizes
    b, s, d = w["x"].shape
    n, x, dy = b * s, w["x"].reshape(b * s, d), dy.reshape(b * s, d)
    grads: dict[str, Array] = {}
    dyt = np.ascontiguousarray(dy.T)
    do = product(w["o_proj"].T, dyt).reshape(h, dv, n)
    grads["o_proj"] = product(dyt, saved.o.reshape(h * dv, n).T, out=out.get("o_proj"))
    pull = -np.einsum("hvn,hvn->hn", do, saved.o)
    dq, dq_pe = _pool.empty(saved.heads.q.shape, x.dtype), np.empty_like(saved.heads.q_pe)
    dk = np.empty_like(saved.heads.k_pe)
    with np.errstate(all="ignore"):
        dc, grads["kv_b_proj"] = saved.form.backward(saved.heads, do, pull, dq[:, :dn], dq_pe, dk, out.get("kv_b_proj"))
    if w["c_kv_cache"] is not None:
        t = w["c_kv_cache"].shape[1]
        grads["c_kv_cache"], grads["k_pe_cache"] = (np.ascontiguousarray(a.reshape(b, t + s, a.shape[1])[:, :t]) for a in (dc, dk))
    dc, dk = (_new(a, b, s).reshape(n, a.shape[1]) + new.reshape(n, a.shape[1]) for a, new in ((dc, dc_kv), (dk, dk_pe)))
    turn_back(dq_pe, *saved.turns, *saved.layouts, dq, dn)
    flat = dq.reshape(h * (dn + r), n)
    if saved.down is None:
        grads["q_proj"], dx = product(flat, x, out=out.get("q_proj")), product(w["q_proj"].T, flat)
    else:
        grads["q_b_proj"] = product(flat, saved.c_q, out=out.get("q_b_proj"))
        dc_q = np.ascontiguousarray(product(w["q_b_proj"].T, flat).T)
        ddown, grads["q_a_layernorm"] = rmsnorm_bwd(saved.down, w["q_a_layernorm"], dc_q, eps=saved.eps)
        grads["q_a_proj"], dx = product(ddown.T, x, out=out.get("q_a_proj")), product(w["q_a_proj"].T, ddown.T)
    c = saved.latent.shape[1]
    dkv_a = np.empty((1, c + r, n), x.dtype)
    dlatent, grads["kv_a_layernorm"] = rmsnorm_bwd(saved.latent, w["kv_a_layernorm"], dc, eps=saved.eps)
    dkv_a[0, :c] = dlatent.T
    turn_back(dk[None], *saved.turns, *saved.layouts, dkv_a, c)
    grads["kv_a_proj_with_mqa"] = product(dkv_a[0], x, out=out.get("kv_a_proj_with_mqa"))
    dx += product(w["kv_a_proj_with_mqa"].T, dkv_a[0])
    names = (name for name in ("c_kv_cache", "k_pe_cache", *WEIGHTS) if name in grads)
    return np.ascontiguousarray(dx.T).reshape(b, s, d), *(grads[name] for name in names)


def prefill_saving(absorbed: bool = False, **given: Any) -> tuple[tuple[Array, Array, Array], Saved]:
    """mla_prefill's outputs (or mla_absorb's), and what `backward` takes: a training step computes the forward once."""
    form = Absorbed if absorbed else Naive
    saved = forward(form, *_checked(form, "forward", *split("mla.prefill", given)), group=0)
    return outputs(saved), saved


def _public(form: Form, doc: str) -> Iterator[Any]:
    def fwd(
        x: Array,
        positions: Array,
        c_kv_cache: Array | None = None,
        k_pe_cache: Array | None = None,
        cu_seqlens: Array | None = None,
        q_proj: Array | None = None,
        q_a_proj: Array | None = None,
        q_a_layernorm: Array | None = None,
        q_b_proj: Array | None = None,
        kv_a_proj_with_mqa: Array | None = None,
        kv_a_layernorm: Array | None = None,
        kv_b_proj: Array | None = None,
        o_proj: Array | None = None,
        **attrs: Any,
    ) -> tuple[Array, Array, Array]:
        arrays, a, op = _checked(form, "forward", given(locals()), attrs)
        if form is Absorbed and is_step(arrays):
            return step(op, arrays, _setting(arrays, a, op))
        return outputs(forward(form, arrays, a, op))

    def bwd(
        x: Array,
        positions: Array,
        dy: Array,
        dc_kv: Array,
        dk_pe: Array,
        c_kv_cache: Array | None = None,
        k_pe_cache: Array | None = None,
        cu_seqlens: Array | None = None,
        q_proj: Array | None = None,
        q_a_proj: Array | None = None,
        q_a_layernorm: Array | None = None,
        q_b_proj: Array | None = None,
        kv_a_proj_with_mqa: Array | None = None,
        kv_a_layernorm: Array | None = None,
        kv_b_proj: Array | None = None,
        o_proj: Array | None = None,
        **attrs: Any,
    ) -> tuple[Array, ...]:
        arrays, a, op = _checked(form, "backward", given(locals()), attrs)
        return backward(forward(form, arrays, a, op, 0), *(arrays[name] for name in ("dy", "dc_kv", "dk_pe")))

    def given(local: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in local.items() if name not in ("attrs", "form", "given")}

    name = form.name.replace(".", "_")
    fwd.__name__ = fwd.__qualname__ = name
    bwd.__name__ = bwd.__qualname__ = f"{name}_bwd"
    fwd.__doc__ = doc
    bwd.__doc__ = f"""dx, then d<name> of each cache and weight that is given, in order, for the gradients of {name}'s three outputs.

    The forward runs again up to o; probabilities are made again by blocks. Errors as {name}.
    """
    yield from (fwd, bwd)


mla_prefill, mla_prefill_bwd = _public(
    Naive,
    """y[b,s,d], c_kv[b,s,c], k_pe[b,s,r]:  y = o_proj attention([q_nope | rope q_pe], [k_nope | rope k_pe], v).

    [k_nope | v] = kv_b_proj c_kv for every head; c_kv = rmsnorm of the latent and the turned k_pe are what a cache keeps.
    x[b,s,d], the weights under their checkpoint names and the caches are float32 or float64 alike; positions[b,s] are integers. Queries
    come from q_proj, or from q_a_proj, q_a_layernorm and q_b_proj. Attributes are those of the reference's mla.prefill, with its defaults;
    cos_sin changes nothing here. c_kv_cache[b,t,c], k_pe_cache[b,t,r]: earlier tokens (chunked prefill). cu_seqlens[j]: sequences packed
    into one row. Products and activations in the inputs' dtype.

    ValueError: dtypes or shapes do not fit, an attribute has no such value, positions or boundaries are out of range.
    """,
)
mla_absorb, mla_absorb_bwd = _public(
    Absorbed,
    """y[b,s,d], c_kv[b,s,c], k_pe[b,s,r]:  y = o_proj W_UV attention([W_UKᵀ q_nope | rope q_pe], [c_kv | rope k_pe], c_kv).

    The same function as mla_prefill, by way of one key of width c + r for all heads. Arguments and errors as there.
    """,
)
