"""Multi-head latent attention: the whole layer with its backward pass; shares nothing with `ref`.

Equation: q = q_proj x, or q_b_proj rmsnorm(q_a_proj x); [latent | k_pe] = kv_a_proj_with_mqa x; c_kv = rmsnorm(latent); k_pe, q_pe
rotated; per head [k_nope | v] = kv_b_proj c_kv; y = o_proj of the heads' attention of [q_nope | q_pe] over [k_nope | k_pe], causal,
with scale (dn + r)^-0.5 times YaRN's m(mscale_all_dim)^2. Folding kv_b_proj into q and o (mla.absorb) is the same function of the inputs.
Cached tokens (their c_kv and k_pe) come before the new ones as keys and values; sequences packed into one row do not see each other.
Backward: the reverse-mode derivative of L = sum(dy * y) + sum(dc_kv * c_kv) + sum(dk_pe * k_pe) by `tape`; no closed form is used.
"""

from typing import Any

import numpy as np

from .attention import attend, segments
from .edges import carrier, choose, fill
from .linear import Arrays, expect, gradients, integers, matvec, packed, pull_back, rounded, scalars
from .norm import rmsnorm_row
from .rope import LAYOUTS, YARN, rotate, rotation, yarn
from .tape import CTX, Scalar, Tape

SIZES = ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
LAYOUT = {"rope_layout_in": "interleaved", "rope_layout_out": "interleaved", "cos_sin": "float32"}  # cos_sin: where another rounds
DEFAULTS: dict[str, Any] = {**dict.fromkeys(SIZES), "rms_norm_eps": 1e-6, **LAYOUT, **YARN}
Q_WHOLE, Q_LORA = ("q_proj",), ("q_a_proj", "q_a_layernorm", "q_b_proj")
CACHES = ("c_kv_cache", "k_pe_cache")
KV_AND_O = ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")


def _names(inputs: Arrays) -> tuple[str, ...]:
    """The floating-point inputs: x, the caches if there are any, and the weights, by whichever of the two ways leads to q."""
    given = {name for name in (*Q_WHOLE, *Q_LORA) if inputs.get(name) is not None}
    if given not in (set(Q_WHOLE), set(Q_LORA)):
        raise ValueError(f"q needs either {Q_WHOLE} or {Q_LORA}, got {sorted(given)}")
    caches = tuple(name for name in CACHES if inputs.get(name) is not None)
    if len(caches) == 1:
        raise ValueError(f"{caches[0]} needs the other of {CACHES}")
    if caches and inputs.get("cu_seqlens") is not None:
        raise ValueError("cu_seqlens and caches exclude each other")
    return ("x", *caches, *(Q_WHOLE if given == set(Q_WHOLE) else Q_LORA), *KV_AND_O)


def attributes(attrs: dict[str, Any]) -> dict[str, Any]:
    """The attributes completed; the sizes have no defaults."""
    at = fill(DEFAULTS, attrs)
    missing = [name for name in SIZES if at[name] is None]
    if missing:
        raise TypeError(f"missing attributes {missing}")
    choose("rope_layout_out", at["rope_layout_out"], LAYOUTS)
    return at


def check_shapes(inputs: Arrays, at: dict[str, Any]) -> None:
    """ValueError where a shape contradicts the attributes."""
    h, dn, r, dv, c = (at[name] for name in SIZES)
    b, s, d = inputs["x"].shape
    if inputs.get("q_proj") is None:
        q = inputs["q_a_proj"].shape[0]
        expect(inputs, {"q_a_proj": (q, d), "q_a_layernorm": (q,), "q_b_proj": (h * (dn + r), q)})
    shapes = {"q_proj": (h * (dn + r), d), "kv_a_proj_with_mqa": (c + r, d), "kv_a_layernorm": (c,), "kv_b_proj": (h * (dn + dv), c)}
    expect(inputs, {**shapes, "o_proj": (d, h * dv), "positions": (b, s)})
    if inputs.get("c_kv_cache") is not None:
        t = inputs["c_kv_cache"].shape[1]
        expect(inputs, {"c_kv_cache": (b, t, c), "k_pe_cache": (b, t, r)})
    if inputs.get("cu_seqlens") is not None and b != 1:
        raise ValueError(f"cu_seqlens with b = {b}: packed sequences are one row")


Rows = list[list[Scalar]]


def sequence(x: Rows, w: Arrays, positions: list[int], at: dict[str, Any], cached: list[tuple[list[Scalar], list[Scalar]]]) -> list[Rows]:
    """[y, c_kv, k_pe] of one sequence, token by token after the cached (c_kv, k_pe), on mpf or on tape variables."""
    h, dn, r, dv, c = (at[name] for name in SIZES)
    spectrum, eps = yarn(at, r), CTX.mpf(float(at["rms_norm_eps"]))
    scale = spectrum.softmax_factor / CTX.sqrt(dn + r)
    keys: list[Rows] = [[] for _ in range(h)]
    values: list[Rows] = [[] for _ in range(h)]

    def remember(c_kv: list[Scalar], k_pe: list[Scalar]) -> None:
        kv = matvec(w["kv_b_proj"], c_kv)
        for head in range(h):
            key_value = kv[head * (dn + dv) : (head + 1) * (dn + dv)]
            keys[head].append(key_value[:dn] + k_pe)
            values[head].append(key_value[dn:])

    for c_kv, k_pe in cached:
        remember(c_kv, k_pe)
    ys, c_kvs, k_pes = [], [], []
    for token, position in zip(x, positions, strict=True):
        turn = rotation(position, spectrum)
        kv_a = matvec(w["kv_a_proj_with_mqa"], token)
        c_kv = rmsnorm_row(kv_a[:c], w["kv_a_layernorm"].tolist(), eps)
        k_pe = rotate(kv_a[c:], turn, at["rope_layout_in"], at["rope_layout_out"])
        remember(c_kv, k_pe)
        if "q_proj" in w:
            q = matvec(w["q_proj"], token)
        else:
            q = matvec(w["q_b_proj"], rmsnorm_row(matvec(w["q_a_proj"], token), w["q_a_layernorm"].tolist(), eps))
        heads: list[Scalar] = []
        for head in range(h):
            query = q[head * (dn + r) : (head + 1) * (dn + r)]
            q_pe = rotate(query[dn:], turn, at["rope_layout_in"], at["rope_layout_out"])
            heads += attend(query[:dn] + q_pe, keys[head], values[head], scale)[0]  # causal: the keys so far
        ys.append(matvec(w["o_proj"], heads))
        c_kvs.append(c_kv)
        k_pes.append(k_pe)
    return [ys, c_kvs, k_pes]


def layer(
    given: Arrays, positions: list[list[int]], at: dict[str, Any], cuts: list[tuple[int, int]] | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(y, c_kv, k_pe) of arrays of scalars; `cuts` are the sequences that every row is made of, by default one."""
    (b, s, _), r, c = given["x"].shape, at["qk_rope_head_dim"], at["kv_lora_rank"]
    yarn(at, r)  # its ValueErrors, even where there are no tokens
    results: tuple[list[Scalar], list[Scalar], list[Scalar]] = ([], [], [])
    for n, (x, places) in enumerate(zip(given["x"].tolist(), positions, strict=True)):
        cached = list(zip(*(given[name][n].tolist() for name in CACHES), strict=True)) if "c_kv_cache" in given else []
        for first, last in [(0, s)] if cuts is None else cuts:
            for flat, rows in zip(results, sequence(x[first:last], given, places[first:last], at, cached), strict=True):
                flat += [u for row in rows for u in row]
    y, c_kv, k_pe = results
    return packed(y, given["x"].shape), packed(c_kv, (b, s, c)), packed(k_pe, (b, s, r))


def _mla(inputs: Arrays, attrs: dict[str, Any], tape: Tape | None = None) -> tuple[Arrays, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(the differentiable inputs, the outputs) as scalars."""
    at, names = attributes(attrs), _names(inputs)
    for name in names:
        carrier(inputs[name])
    check_shapes(inputs, at)
    cu_seqlens, s = inputs.get("cu_seqlens"), inputs["x"].shape[1]
    cuts = None if cu_seqlens is None else segments(cu_seqlens, s, "cu_seqlens")
    given = {name: scalars(inputs[name], tape) for name in names}
    return given, layer(given, integers(inputs["positions"], "positions"), at, cuts)


def forward(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """mla.prefill, mla.absorb: x, positions, the weights, and perhaps caches or cu_seqlens -> y, c_kv, k_pe."""
    _, (y, c_kv, k_pe) = _mla(inputs, attrs)
    return {"y": rounded(y), "c_kv": rounded(c_kv), "k_pe": rounded(k_pe)}


def backward(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """mla.prefill, mla.absorb backward: the inputs, dy, dc_kv, dk_pe -> dx, d<cache> of both if given, d<weight> of every weight given."""
    tape = Tape()
    given, (y, c_kv, k_pe) = _mla(inputs, attrs, tape)
    pull_back(tape, (y, inputs["dy"]), (c_kv, inputs["dc_kv"]), (k_pe, inputs["dk_pe"]))
    return {f"d{name}": gradients(array) for name, array in given.items()}
