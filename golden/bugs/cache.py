"""Bugs of the latent cache: a misread cache is written as the reference's reading of other bytes."""

from collections.abc import Callable
from typing import Any

from ...ref.attention import attention_fwd
from ...ref.cast import decode, encode, quotient
from ...ref.formats import BF16, FP32
from ...ref.mla_cache import (
    LAYOUTS,
    CacheLayout,
    bytes_of,
    cache_append,
    cache_append_fwd,
    cache_read,
    cache_read_fwd,
    integers_of,
    split_pages,
)
from ...ref.mla_decode import mla_decode_fp8
from ...ref.op import Op
from ...ref.xp import Array, floor_log2, power_of_two, xp_of
from . import Bug

Result = tuple[tuple[Array, Array], tuple]
Change = Callable[[Array, CacheLayout, int, int, int], Array]  # of kv_cache, layout, page, c, r


def rejoined(kv_cache: Array, data: Array, rest: Array, filling: Array) -> Array:
    """split_pages, backwards"""
    pages = kv_cache.shape[0]
    return xp_of(kv_cache).concat([data.reshape((pages, -1)), rest.reshape((pages, -1)), filling], axis=1)


def of_tokens(change: Callable[[Array, Array, CacheLayout, int, int], tuple[Array, Array]]) -> Change:
    """Each token's bytes changed: change(data, after, layout, c, r)."""

    def changed(kv_cache: Array, how: CacheLayout, page: int, c: int, r: int) -> Array:
        data, rest, filling = split_pages(kv_cache, how, page, c, r)
        return rejoined(kv_cache, *change(data, rest, how, c, r), filling)

    return changed


def float32_bits(x: Array) -> Array:
    """The bit pattern of float32 numbers, int64"""
    xp = xp_of(x)
    q, _, steps = quotient(FP32, xp.where(xp.isfinite(x), x, xp.zeros_like(x)))
    code = steps * 2**FP32.mantissa_bits + xp.astype(q, xp.int64)
    code = xp.where(xp.isinf(x), xp.full_like(code, FP32.inf_code), xp.where(xp.isnan(x), xp.full_like(code, FP32.nan_code), code))
    return code + xp.astype(xp.signbit(x), xp.int64) * 2**31


def of_scales(change: Callable[[Any, Array], Array]) -> Change:
    """Scales changed as numbers, [tokens,tiles]; a cache without scales stays."""

    def changed(data: Array, rest: Array, how: CacheLayout, c: int, r: int) -> tuple[Array, Array]:
        if not how.tile:
            return data, rest
        xp, tiles = xp_of(data), -(-c // how.tile)
        if how.apart:
            exponent = xp.astype(rest[:, :tiles], xp.int64)
            other = floor_log2(xp, change(xp, power_of_two(xp, exponent - 127, xp.float64, None))) + 127
            return data, xp.concat([bytes_of(xp.where(exponent == 255, exponent, xp.clip(other, 0, 254)), 1), rest[:, tiles:]], axis=1)
        scale = decode(FP32, integers_of(data[:, c : c + 4 * tiles], 4))
        fresh = bytes_of(float32_bits(change(xp, scale)), 4)
        return xp.concat([data[:, :c], fresh, data[:, c + 4 * tiles :]], axis=1), rest

    return of_tokens(changed)


def scaled_rope(data: Array, rest: Array, how: CacheLayout, c: int, r: int) -> tuple[Array, Array]:
    """k_pe times the scale of the last tile."""
    if not how.tile:
        return data, rest
    xp, tiles = xp_of(data), -(-c // how.tile)
    if how.apart:
        scale = power_of_two(xp, xp.astype(rest[:, tiles - 1 : tiles], xp.int64) - 127, xp.float32, None)
    else:
        scale = decode(FP32, integers_of(data[:, c + 4 * tiles - 4 : c + 4 * tiles], 4))
    k_pe = decode(BF16, integers_of(data[:, -2 * r :], 2)) * scale
    return xp.concat([data[:, : -2 * r], bytes_of(encode(BF16, k_pe), 2)], axis=1), rest


def big_endian(data: Array, rest: Array, how: CacheLayout, c: int, r: int) -> tuple[Array, Array]:
    """Every bfloat16 and float32 with its highest byte first; its own inverse."""
    xp, n = xp_of(data), data.shape[0]

    def turned(part: Array, size: int) -> Array:
        return xp.reshape(xp.flip(xp.reshape(part, (n, -1, size)), axis=2), part.shape)

    if not how.tile:
        return turned(data, 2), rest
    return xp.concat([data[:, :c], turned(data[:, c : data.shape[1] - 2 * r], 4), turned(data[:, -2 * r :], 2)], axis=1), rest


def rope_first(data: Array, rest: Array, how: CacheLayout, c: int, r: int) -> tuple[Array, Array]:
    """[k_pe | rest] read as such: moved to where the reference looks."""
    return xp_of(data).roll(data, -2 * r, axis=1), rest


def rope_first_back(data: Array, rest: Array, how: CacheLayout, c: int, r: int) -> tuple[Array, Array]:
    return xp_of(data).roll(data, 2 * r, axis=1), rest


def unpadded_scales(kv_cache: Array, how: CacheLayout, page: int, c: int, r: int) -> Array:
    """Scales that follow a page's tokens, read without the byte that fills each token's up."""
    data, rest, filling = split_pages(kv_cache, how, page, c, r)
    after = rest.shape[1]
    if after == 0:
        return kv_cache
    xp, flat = xp_of(rest), rest.reshape((kv_cache.shape[0], -1))
    index = xp.arange(page)[:, None] * (after - 1) + xp.arange(after)[None, :]
    return rejoined(kv_cache, data, xp.take(flat, xp.reshape(index, (-1,)), axis=1), filling)


def token_after_token(kv_cache: Array, how: CacheLayout, page: int, c: int, r: int) -> Array:
    """A page read as tokens of all their bytes, scales included, one after the other."""
    xp, (own, after) = xp_of(kv_cache), how.token_bytes(c, r)
    tokens = xp.reshape(kv_cache[:, : page * (own + after)], (-1, own + after))
    return rejoined(kv_cache, tokens[:, :own], tokens[:, own:], kv_cache[:, page * (own + after) :])


def reading(change: Change) -> Callable:
    def fwd(kv_cache: Array, slots: Array, **attrs: Any) -> Result:
        own = {**cache_read.defaults, **attrs}
        c, r, page = own["kv_lora_rank"], own["qk_rope_head_dim"], own["page_size"]
        return cache_read_fwd(change(kv_cache, LAYOUTS[own["layout"]], page, c, r), slots, **attrs)

    return fwd


def fp8(kv_cache: Array, q: Array, attrs: dict, change: Change) -> Array:
    r = attrs["qk_rope_head_dim"]
    return change(kv_cache, LAYOUTS[attrs["layout"]], attrs["page_size"], q.shape[3] - r, r)


def decoding(change: Change) -> Callable:
    def fwd(q: Array, kv_cache: Array, table: Array, lengths: Array, sink: Array | None, **attrs: Any) -> Result:
        own = {**mla_decode_fp8.defaults, **attrs}
        return mla_decode_fp8.fwd(q, fp8(kv_cache, q, own, change), table, lengths, sink, **attrs)

    return fwd


def misread(id: str, what: str, change: Change, sources: str = "") -> list[Bug]:
    """A cache that is read wrongly, by cache.read and by decode."""
    return [Bug(id, ("cache.read",), what, sources, fwd=reading(change)), Bug(id, FP8, what, sources, fwd=decoding(change))]


def one_sided(of_keys: bool) -> Callable:
    """Scales left out of the keys, or of the values."""

    def fwd(q: Array, kv_cache: Array, table: Array, lengths: Array, sink: Array | None, **attrs: Any) -> Result:
        own, xp = {**mla_decode_fp8.defaults, **attrs}, xp_of(q)
        caches = [kv_cache, fp8(kv_cache, q, own, of_scales(lambda xp, scale: xp.ones_like(scale)))]
        parts, r, page = [], own["qk_rope_head_dim"], own["page_size"]
        for i in range(q.shape[0]):
            t = xp.arange(int(lengths[i]))
            slots = xp.take(table[i, ...], t // page) * page + t % page
            sizes = {"kv_lora_rank": q.shape[3] - r, "qk_rope_head_dim": r, "layout": own["layout"], "page_size": page}
            read = [xp.astype(xp.concat(list(cache_read_fwd(c, slots, **sizes)[0]), axis=1), q.dtype)[None, :, None, :] for c in caches]
            keys, values = reversed(read) if of_keys else read
            values = values[..., : own["head_dim_v"]]
            parts.append(attention_fwd(q[i : i + 1, ...], keys, values, sink, scale=own["scale"], causal=own["causal"])[0])
        return (xp.concat([o for o, _ in parts], axis=0), xp.concat([lse for _, lse in parts], axis=0)), ()

    return fwd


def appending(forth: Change, back: Change) -> Callable:
    """cache.append that stores tokens as `back` turns them; all other bytes stay."""

    def fwd(kv_cache: Array, c_kv: Array, k_pe: Array, slots: Array, **attrs: Any) -> tuple[Array, tuple]:
        own = {**cache_append.defaults, **attrs}
        sizes = LAYOUTS[own["layout"]], own["page_size"], c_kv.shape[1], k_pe.shape[1]
        out, saved = cache_append_fwd(forth(kv_cache, *sizes), c_kv, k_pe, slots, **attrs)
        return back(out, *sizes), saved

    return fwd


def storing(change: Change) -> Callable:
    """cache.append whose new tokens are changed afterwards; all other bytes stay."""

    def fwd(kv_cache: Array, c_kv: Array, k_pe: Array, slots: Array, **attrs: Any) -> tuple[Array, tuple]:
        xp, own = xp_of(kv_cache), {**cache_append.defaults, **attrs}
        sizes = LAYOUTS[own["layout"]], own["page_size"], c_kv.shape[1], k_pe.shape[1]
        out, saved = cache_append_fwd(kv_cache, c_kv, k_pe, slots, **attrs)
        right, wrong = split_pages(out, *sizes), split_pages(change(out, *sizes), *sizes)
        new = xp.any(xp.arange(right[0].shape[0])[:, None] == slots[None, :], axis=1)[:, None]
        return rejoined(out, xp.where(new, wrong[0], right[0]), xp.where(new, wrong[1], right[1]), right[2]), saved

    return fwd


def minus_one_wraps(kv_cache: Array, c_kv: Array, k_pe: Array, slots: Array, **attrs: Any) -> tuple[Array, tuple]:
    """Slot -1 is the last one; of tokens that meet in a slot the last stays."""
    xp, n = xp_of(slots), slots.shape[0]
    page = {**cache_append.defaults, **attrs}["page_size"]
    wrapped = xp.where(slots < 0, kv_cache.shape[0] * page - 1, slots)
    later = (wrapped[:, None] == wrapped[None, :]) & (xp.arange(n)[:, None] < xp.arange(n)[None, :])
    return cache_append_fwd(kv_cache, c_kv, k_pe, xp.where(xp.any(later, axis=1), -1, wrapped), **attrs)


def page_cleared(kv_cache: Array, c_kv: Array, k_pe: Array, slots: Array, **attrs: Any) -> tuple[Array, tuple]:
    return cache_append_fwd(0 * kv_cache, c_kv, k_pe, slots, **attrs)


def columns_first(op: Op) -> Callable:
    """Slot s at page s mod pages, token s // pages"""

    def fwd(kv_cache: Array, *arrays: Array, **attrs: Any) -> Any:
        *tokens, slots = arrays
        pages, page = kv_cache.shape[0], {**op.defaults, **attrs}["page_size"]
        moved = xp_of(slots).where(slots < 0, slots, slots % pages * page + slots // pages)
        return op.fwd(kv_cache, *tokens, moved, **attrs)

    return fwd


APPEND, READ, FP8 = ("cache.append",), ("cache.read",), ("mla.decode_fp8",)
UNWRITTEN = (("kv-scale-amax-ignores-kpe", "No layout here lets k_pe share c_kv's scale: FlashMLA keeps k_pe in bfloat16."),)
BUGS = [
    Bug(
        "kv-scale-one-sided",
        FP8,
        "The scales reach the keys and not the values; the latent is both.",
        "sgl-project/sglang#34765; NVIDIA/TensorRT-LLM#16916",
        fwd=one_sided(of_keys=False),
    ),
    Bug(
        "kv-scale-missing-in-scores",
        FP8,
        "The scales reach the values and not the keys.",
        "sgl-project/sglang#34765; NVIDIA/TensorRT-LLM#16916",
        fwd=one_sided(of_keys=True),
    ),
    *misread("scale-dropped", "Codes are read without their scales.", of_scales(lambda xp, scale: xp.ones_like(scale))),
    *misread("scale-inverted", "Codes are divided by their scales.", of_scales(lambda xp, scale: 1 / scale)),
    *misread(
        "kv-scale-neighbour-tile",
        "Each tile is read with the scale of the one before it.",
        of_scales(lambda xp, scale: xp.roll(scale, 1, axis=1)),
    ),
    *misread("kv-scale-on-rope", "k_pe is multiplied by the last tile's scale; it is bfloat16 and has none.", of_tokens(scaled_rope)),
    *misread("kv-big-endian", "The bytes of bfloat16 and float32 are read highest first.", of_tokens(big_endian)),
    *misread("kv-kpe-first", "A token is read as [k_pe | c_kv].", of_tokens(rope_first)),
    *misread("kv-scale-stride-unpadded", "Scales after the tokens are read without the byte that fills each token's up.", unpadded_scales),
    *misread("kv-page-token-after-token", "A page is read as tokens that each end with their scales.", token_after_token),
    Bug(
        "kv-slot-transposed",
        READ,
        "Slot s is read at page s mod pages, token s // pages.",
        fwd=columns_first(cache_read),
    ),
    Bug(
        "kv-slot-transposed",
        APPEND,
        "Slot s is stored at page s mod pages, token s // pages.",
        fwd=columns_first(cache_append),
    ),
    Bug(
        "kv-big-endian",
        APPEND,
        "The bytes of bfloat16 and float32 are stored highest first.",
        fwd=appending(of_tokens(big_endian), of_tokens(big_endian)),
    ),
    Bug("kv-kpe-first", APPEND, "A token is stored as [k_pe | c_kv].", fwd=appending(of_tokens(rope_first), of_tokens(rope_first_back))),
    Bug("scale-inverted", APPEND, "1/scale is stored; what is stored multiplies.", fwd=storing(of_scales(lambda xp, scale: 1 / scale))),
    Bug(
        "kv-scale-neighbour-tile",
        APPEND,
        "Each tile's scale is stored for the tile after it.",
        fwd=storing(of_scales(lambda xp, scale: xp.roll(scale, 1, axis=1))),
    ),
    Bug("kv-slot-minus-one-stored", APPEND, "Slot -1 is stored as the last one instead of skipped.", fwd=minus_one_wraps),
    Bug("kv-append-clears", APPEND, "Bytes that receive no token are cleared instead of kept.", fwd=page_cleared),
]
