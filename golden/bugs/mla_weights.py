"""Bugs of multi-head latent attention that read a projection in another order, in both forms."""

from collections.abc import Callable
from typing import Any

from ...ref.xp import Array, xp_of
from .mla import Given, changed_arguments


def _weight(names: tuple[str, ...], change: Callable[[Array, Given], Array]) -> Callable[[Given, Given], tuple[Given, Given]]:
    """Weights that are read in another order: change(weight, attributes)."""

    def changed(given: Given, attrs: Given) -> tuple[Given, Given]:
        return {n: change(w, attrs) if n in names and w is not None else w for n, w in given.items()}, attrs

    return changed


def _up(w: Array, attrs: Given) -> tuple[Array, Array, Any, int, int]:
    """kv_b_proj by head: W_UK[h,dn,c], W_UV[h,dv,c]"""
    xp, h, dn, dv = xp_of(w), attrs["num_attention_heads"], attrs["qk_nope_head_dim"], attrs["v_head_dim"]
    up = xp.reshape(w, (h, dn + dv, w.shape[1]))
    return up[:, :dn, :], up[:, dn:, :], xp, dn, dv


def _all_heads_first(w: Array, attrs: Given) -> Array:
    """Rows read as [every head's k_nope | every head's v]"""
    (xp, h, dn, dv), c = (xp_of(w), *(attrs[n] for n in ("num_attention_heads", "qk_nope_head_dim", "v_head_dim"))), w.shape[1]
    uk, uv = xp.reshape(w[: h * dn, :], (h, dn, c)), xp.reshape(w[h * dn :, :], (h, dv, c))
    return xp.reshape(xp.concat([uk, uv], axis=1), w.shape)


def _values_first(w: Array, attrs: Given) -> Array:
    """Each head's rows read as [v | k_nope]"""
    xp, h, dn, dv = xp_of(w), attrs["num_attention_heads"], attrs["qk_nope_head_dim"], attrs["v_head_dim"]
    up = xp.reshape(w, (h, dn + dv, w.shape[1]))
    return xp.reshape(xp.concat([up[:, dv:, :], up[:, :dv, :]], axis=1), w.shape)


def _transposed(which: int) -> Callable[[Array, Given], Array]:
    """W_UK or W_UV of each head read as its transpose: the same numbers, columns for rows (a plain transpose where it is square)."""

    def change(w: Array, attrs: Given) -> Array:
        *parts, xp, _, _ = _up(w, attrs)
        h, rows, c = parts[which].shape
        parts[which] = xp.matrix_transpose(xp.reshape(parts[which], (h, c, rows)))
        return xp.reshape(xp.concat(parts, axis=1), w.shape)

    return change


def _rope_first(w: Array, attrs: Given) -> Array:
    """Each query head's rows read as [q_pe | q_nope]"""
    xp, h, dn, r = xp_of(w), attrs["num_attention_heads"], attrs["qk_nope_head_dim"], attrs["qk_rope_head_dim"]
    rows = xp.reshape(w, (h, dn + r, w.shape[1]))
    return xp.reshape(xp.concat([rows[:, r:, :], rows[:, :r, :]], axis=1), w.shape)


def _kpe_first(w: Array, attrs: Given) -> Array:
    """kv_a_proj's rows read as [k_pe | c_kv]"""
    r = attrs["qk_rope_head_dim"]
    return xp_of(w).concat([w[r:, :], w[:r, :]], axis=0)


def _heads_last(w: Array, attrs: Given) -> Array:
    """o_proj's columns read as [v,h] instead of [h,v]"""
    xp, h = xp_of(w), attrs["num_attention_heads"]
    columns = xp.reshape(w, (w.shape[0], -1, h))
    return xp.reshape(xp.permute_dims(columns, (0, 2, 1)), w.shape)


BUGS = [
    *changed_arguments(
        "mla-kvb-split-order",
        "kv_b_proj's rows are read as [every k_nope | every v] instead of [k_nope | v] for each head.",
        _weight(("kv_b_proj",), _all_heads_first),
        "ggml-org/llama.cpp#12725 has the right view",
    ),
    *changed_arguments(
        "mla-kvb-values-first", "kv_b_proj's rows are read as [v | k_nope] for each head.", _weight(("kv_b_proj",), _values_first)
    ),
    *changed_arguments(
        "mla-wuk-transpose", "q_nope is multiplied by W_UK instead of its transpose.", _weight(("kv_b_proj",), _transposed(0))
    ),
    *changed_arguments("mla-wuv-transpose", "The result is multiplied by W_UV transposed.", _weight(("kv_b_proj",), _transposed(1))),
    *changed_arguments("mla-q-rope-first", "Query heads are read as [q_pe | q_nope].", _weight(("q_proj", "q_b_proj"), _rope_first)),
    *changed_arguments(
        "mla-kpe-before-latent", "kv_a_proj_with_mqa's rows are read as [k_pe | c_kv].", _weight(("kv_a_proj_with_mqa",), _kpe_first)
    ),
    *changed_arguments("mla-output-heads-last", "o_proj is fed [v,h] instead of [h,v].", _weight(("o_proj",), _heads_last)),
]
