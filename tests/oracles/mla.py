"""Multi-head latent attention: the whole layer with its backward pass, and decoding over a paged cache; shares nothing with `ref`.

Equation: q = q_proj x, or q_b_proj rmsnorm(q_a_proj x); [latent | k_pe] = kv_a_proj_with_mqa x; c_kv = rmsnorm(latent); k_pe, q_pe
rotated; per head [k_nope | v] = kv_b_proj c_kv; y = o_proj of the heads' attention of [q_nope | q_pe] over [k_nope | k_pe], causal,
with scale (dn + r)^-0.5 times YaRN's m(mscale_all_dim)^2. Folding kv_b_proj into q and o (mla.absorb) is the same function of the inputs.
Decoding: keys are the cached rows, values their first kv_lora_rank columns, both shared by all heads.
Backward: the reverse-mode derivative of L = sum(dy * y) + sum(dc_kv * c_kv) + sum(dk_pe * k_pe) by `tape`; no closed form is used.
"""

from typing import Any

import numpy as np

from .attention import attend, visible
from .edges import carrier, choose, fill
from .linear import Arrays, expect, gradients, matvec, packed, pull_back, rounded, scalars
from .norm import rmsnorm_row
from .rope import LAYOUTS, YARN, integers, rotate, rotation, yarn
from .tape import CTX, ONE, Scalar, Tape

SIZES = ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
LAYOUT = {"rope_layout_in": "interleaved", "rope_layout_out": "interleaved", "cos_sin": "float32"}  # cos_sin: where another rounds
DEFAULTS: dict[str, Any] = {**dict.fromkeys(SIZES), "rms_norm_eps": 1e-6, **LAYOUT, **YARN}
Q_WHOLE, Q_LORA = ("q_proj",), ("q_a_proj", "q_a_layernorm", "q_b_proj")
KV_AND_O = ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")


def _names(inputs: Arrays) -> tuple[str, ...]:
    """The floating-point inputs: x and the weights, by whichever of the two ways leads to q."""
    given = {name for name in (*Q_WHOLE, *Q_LORA) if inputs.get(name) is not None}
    if given not in (set(Q_WHOLE), set(Q_LORA)):
        raise ValueError(f"q needs either {Q_WHOLE} or {Q_LORA}, got {sorted(given)}")
    return ("x", *(Q_WHOLE if given == set(Q_WHOLE) else Q_LORA), *KV_AND_O)


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


def sequence(
    x: list[list[Scalar]], w: Arrays, positions: list[int], at: dict[str, Any]
) -> tuple[list[list[Scalar]], list[list[Scalar]], list[list[Scalar]]]:
    """(y, c_kv, k_pe) of one sequence, token by token, on mpf or on tape variables."""
    h, dn, r, dv, c = (at[name] for name in SIZES)
    spectrum, eps = yarn(at, r), CTX.mpf(float(at["rms_norm_eps"]))
    scale = spectrum.softmax_factor / CTX.sqrt(dn + r)
    keys: list[list[list[Scalar]]] = [[] for _ in range(h)]
    values: list[list[list[Scalar]]] = [[] for _ in range(h)]
    ys, c_kvs, k_pes = [], [], []
    for token, position in zip(x, positions, strict=True):
        turn = rotation(position, spectrum)
        kv_a = matvec(w["kv_a_proj_with_mqa"], token)
        c_kv = rmsnorm_row(kv_a[:c], w["kv_a_layernorm"].tolist(), eps)
        k_pe = rotate(kv_a[c:], turn, at["rope_layout_in"], at["rope_layout_out"])
        if "q_proj" in w:
            q = matvec(w["q_proj"], token)
        else:
            q = matvec(w["q_b_proj"], rmsnorm_row(matvec(w["q_a_proj"], token), w["q_a_layernorm"].tolist(), eps))
        kv = matvec(w["kv_b_proj"], c_kv)
        heads: list[Scalar] = []
        for head in range(h):
            query, key_value = q[head * (dn + r) : (head + 1) * (dn + r)], kv[head * (dn + dv) : (head + 1) * (dn + dv)]
            keys[head].append(key_value[:dn] + k_pe)
            values[head].append(key_value[dn:])
            q_pe = rotate(query[dn:], turn, at["rope_layout_in"], at["rope_layout_out"])
            heads += attend(query[:dn] + q_pe, keys[head], values[head], scale)[0]  # causal: the keys so far
        ys.append(matvec(w["o_proj"], heads))
        c_kvs.append(c_kv)
        k_pes.append(k_pe)
    return ys, c_kvs, k_pes


def layer(given: Arrays, positions: list[list[int]], at: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(y, c_kv, k_pe) of arrays of scalars."""
    (b, s, _), r, c = given["x"].shape, at["qk_rope_head_dim"], at["kv_lora_rank"]
    yarn(at, r)  # its ValueErrors, even where there are no tokens
    results: tuple[list[Scalar], list[Scalar], list[Scalar]] = ([], [], [])
    for x, places in zip(given["x"].tolist(), positions, strict=True):
        for flat, rows in zip(results, sequence(x, given, places, at), strict=True):
            flat += [u for row in rows for u in row]
    y, c_kv, k_pe = results
    return packed(y, given["x"].shape), packed(c_kv, (b, s, c)), packed(k_pe, (b, s, r))


def _mla(inputs: Arrays, attrs: dict[str, Any], tape: Tape | None = None) -> tuple[Arrays, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(the differentiable inputs, the outputs) as scalars."""
    at, names = attributes(attrs), _names(inputs)
    for name in names:
        carrier(inputs[name])
    check_shapes(inputs, at)
    given = {name: scalars(inputs[name], tape) for name in names}
    return given, layer(given, integers(inputs["positions"], "positions"), at)


def forward(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """mla.prefill, mla.absorb: x, the weights, positions -> y, c_kv, k_pe."""
    _, (y, c_kv, k_pe) = _mla(inputs, attrs)
    return {"y": rounded(y), "c_kv": rounded(c_kv), "k_pe": rounded(k_pe)}


def backward(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """mla.prefill, mla.absorb backward: the inputs, dy, dc_kv, dk_pe -> dx and d<weight> of every weight given."""
    tape = Tape()
    given, (y, c_kv, k_pe) = _mla(inputs, attrs, tape)
    pull_back(tape, (y, inputs["dy"]), (c_kv, inputs["dc_kv"]), (k_pe, inputs["dk_pe"]))
    return {f"d{name}": gradients(array) for name, array in given.items()}


def cached_rows(kv_cache: np.ndarray, table: list[int], length: int) -> list[list[Any]]:
    """The keys of one sequence as mpf: token j is at kv_cache[table[j // page], j % page]. No other slot is read."""
    pages, page, _ = kv_cache.shape
    if length > page * len(table):
        raise ValueError(f"cache_seqlens {length} > {page * len(table)} slots in the block table")
    for place in table[: -(-length // page)]:
        if not 0 <= place < pages:
            raise ValueError(f"block_table names page {place} of {pages}")
    return [scalars(kv_cache[table[j // page], j % page]).tolist() for j in range(length)]


def decode(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """mla.decode: q, kv_cache, block_table, cache_seqlens -> o, lse."""
    at = fill({"scale": 0.0, "causal": True, "kv_lora_rank": 512}, attrs)
    q, kv_cache, c, causal = inputs["q"], inputs["kv_cache"], at["kv_lora_rank"], choose("causal", at["causal"], (True, False))
    carrier(q)
    carrier(kv_cache)
    b, s, h, width = q.shape
    scale = ONE * float(at["scale"]) if at["scale"] else ONE / CTX.sqrt(width)
    expect(inputs, {"kv_cache": (*kv_cache.shape[:2], width), "block_table": (b, inputs["block_table"].shape[1]), "cache_seqlens": (b,)})
    o, lse = np.zeros((b, s, h, c), np.float64), np.full((b, h, s), np.inf)
    tables, lengths = integers(inputs["block_table"], "block_table"), integers(inputs["cache_seqlens"], "cache_seqlens")
    for n, (table, t) in enumerate(zip(tables, lengths, strict=True)):
        keys, queries = cached_rows(kv_cache, table, t), scalars(q[n])
        values = [key[:c] for key in keys]
        for i, head in np.ndindex(s, h):
            seen = visible(i, s, t, causal)
            if seen:
                row, mass = attend(queries[i, head].tolist(), keys[:seen], values[:seen], scale)
                o[n, i, head], lse[n, head, i] = rounded(packed(row, (c,))), rounded(packed([mass], ()))
    return {"o": o, "lse": lse}
