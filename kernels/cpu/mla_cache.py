"""The latent cache of MLA in pages: storing tokens and reading them back, in bfloat16 and in FlashMLA's two FP8 layouts."""

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ._common import array_of, choice, describe, flip, floats, integer, need, output, run, shr
from .cast import FORMATS, cast_one, decode_one, decoding, encode_one, rounding

INTEGERS = (np.int64, np.int32, np.int16, np.int8, np.uint64, np.uint32, np.uint16, np.uint8)
OVER = (2 - 2.0**-8) * 2.0**127  # magnitudes from here on round to bfloat16's infinity
LEAST = -13  # the exponent of a scale: ceil(log2 1e-4)
BF16, E4M3FN = FORMATS["bf16"], FORMATS["e4m3fn"]


class Packing(NamedTuple):
    """Where a token's bytes lie: c_kv, then for float32 scales those, then k_pe, all at place * own from the page's start; byte scales
    at page_size * own + place * after. tile 0: c_kv in bfloat16, no scales."""

    c: int
    r: int
    page_size: int
    page_bytes: int
    own: int
    after: int
    tile: int
    tiles: int
    pe: int  # where k_pe starts in the token


def packing(layout: str, page_size: int, c: int, r: int) -> Packing:
    """The layout "bf16", "fp8_v32" or "fp8_v4" for c and r channels."""
    if layout == "bf16":
        own = 2 * (c + r)
        return Packing(c, r, page_size, page_size * own, own, 0, 0, 0, 2 * c)
    if layout == "fp8_v32":
        tiles = -(-c // 128)
        own = c + 4 * tiles + 2 * r
        return Packing(c, r, page_size, page_size * own, own, 0, 128, tiles, c + 4 * tiles)
    tiles = -(-c // 64)
    own, after = c + 2 * r, tiles + 1
    return Packing(c, r, page_size, -(-page_size * (own + after) // 576) * 576, own, after, 64, tiles, c)


LAYOUTS = ("bf16", "fp8_v32", "fp8_v4")


@njit(nogil=True)
def _bits(x, wide, r, bits):
    """bits = float32's of x rounded to bfloat16; `wide` for float64."""
    x = x[: bits.size]
    if wide:
        for j in range(bits.size):
            bits[j] = np.uint32(encode_one(x[j], r)) << np.uint32(16)
    else:
        for j in range(bits.size):
            bits[j] = cast_one(x[j], r)


@njit(nogil=True)
def _top_halves(bits, codes):
    for j in range(codes.size):
        codes[j] = shr(bits[j], np.uint32(16))


@njit(nogil=True)
def _copy_bytes(source, target):
    """A loop: Numba's assignment of a slice copies byte by byte."""
    for j in range(target.size):
        target[j] = source[j]


@njit(nogil=True)
def _scale_exponent(bits):
    """e of a tile's scale 2^e = 2^ceil(log2 max(amax/448, 1e-4)). amax/448 = f/1.75 * 2^k, f in [1, 2) and of 7 bits, is far from every
    power of two that it does not equal, so integers decide the ceiling."""
    amax = np.uint32(0)
    for j in range(bits.size):
        amax = max(amax, np.uint32(bits[j] & np.uint32(0x7FFFFFFF)))
    k = np.int64(amax >> np.uint32(23)) - 127 - 8
    return max(k + (1 if np.int64(amax & np.uint32(0x7FFFFF)) > 0x600000 else 0), LEAST)


# 16-bit codes go through a buffer that is also seen as bytes: a cache need not be aligned. Numba's machines are little-endian, as the
# layouts are.
@njit(nogil=True, error_model="numpy", cache=True)
def _append(lo, hi, c_kv, k_pe, slots, p, wide, r, r8, cache):
    """The bytes of tokens lo to hi. r rounds to bfloat16, r8 float32 to e4m3fn; cache is flat."""
    latent, rope = np.empty(p.c, np.uint32), np.empty(p.r, np.uint32)
    latent_codes, rope_codes = np.empty(p.c, np.uint16), np.empty(p.r, np.uint16)
    latent_bytes, rope_bytes = latent_codes.view(np.uint8), rope_codes.view(np.uint8)
    for i in range(lo, hi):
        slot = slots[i]
        if slot < 0:
            continue
        page, place = slot // p.page_size * p.page_bytes, slot % p.page_size
        start = page + place * p.own
        _bits(c_kv[i], wide, r, latent)
        _bits(k_pe[i], wide, r, rope)
        _top_halves(rope, rope_codes)
        _copy_bytes(rope_bytes, cache[start + p.pe : start + p.pe + 2 * p.r])
        if p.tile == 0:
            _top_halves(latent, latent_codes)
            _copy_bytes(latent_bytes, cache[start : start + 2 * p.c])
            continue
        data, scales = cache[start : start + p.c], cache[start + p.c : start + p.pe]
        after = cache[page + p.page_size * p.own + place * p.after :]
        for t in range(p.tiles):
            tile, codes = latent[t * p.tile : (t + 1) * p.tile], data[t * p.tile : (t + 1) * p.tile]
            e = _scale_exponent(tile)
            inverse = flip(np.uint32((127 - e) << 23))  # a power of two: exact
            for j in range(tile.size):
                codes[j] = encode_one(flip(tile[j]) * inverse, r8)
            if p.after:
                after[t] = e + 127
            else:
                bits = (e + 127) << 23
                scales[4 * t], scales[4 * t + 1], scales[4 * t + 2], scales[4 * t + 3] = 0, 0, (bits >> 16) & 0xFF, bits >> 24


@njit(nogil=True)
def _widen(codes, out):
    """out = the values of bfloat16 codes."""
    F = out.dtype.type
    for j in range(codes.size):
        out[j] = F(flip(np.uint32(np.uint32(codes[j]) << np.uint32(16))))


@njit(nogil=True)
def _byte_scale(byte):
    """2^(byte-127); 255 is NaN."""
    if byte == 0:
        return flip(np.uint32(1 << 22))
    return flip(np.uint32(np.uint32(byte) << np.uint32(23)) if byte < 255 else np.uint32(0x7FC00000))


@njit(nogil=True, error_model="numpy", cache=True)
def read_tokens(lo, hi, cache, slots, p, r, d, c_kv, c_row, k_pe, pe_first, pe_row):
    """The values of tokens lo to hi of the flat cache, into flat arrays: c_kv[i * c_row :] and k_pe[pe_first + i * pe_row :]. r rounds
    float32 to bfloat16, d decodes e4m3fn."""
    F = c_kv.dtype.type
    latent_codes, rope_codes = np.empty(p.c, np.uint16), np.empty(p.r, np.uint16)
    latent_bytes, rope_bytes = latent_codes.view(np.uint8), rope_codes.view(np.uint8)
    for i in range(lo, hi):
        slot = slots[i]
        page, place = slot // p.page_size * p.page_bytes, slot % p.page_size
        start = page + place * p.own
        latent = c_kv[i * c_row : i * c_row + p.c]
        first = pe_first + i * pe_row
        _copy_bytes(cache[start + p.pe : start + p.pe + 2 * p.r], rope_bytes)
        _widen(rope_codes, k_pe[first : first + p.r])
        if p.tile == 0:
            _copy_bytes(cache[start : start + 2 * p.c], latent_bytes)
            _widen(latent_codes, latent)
            continue
        data, scales = cache[start : start + p.c], cache[start + p.c : start + p.pe]
        after = cache[page + p.page_size * p.own + place * p.after :]
        for t in range(p.tiles):
            if p.after:
                scale = _byte_scale(after[t])
            else:
                s = scales[4 * t : 4 * t + 4]
                scale = flip(np.uint32(np.int64(s[0]) | np.int64(s[1]) << 8 | np.int64(s[2]) << 16 | np.int64(s[3]) << 24))
            codes, values = data[t * p.tile : (t + 1) * p.tile], latent[t * p.tile : (t + 1) * p.tile]
            for j in range(codes.size):
                values[j] = F(flip(cast_one(np.float32(decode_one(codes[j], d) * scale), r)))


def reading() -> tuple[Any, Any]:
    """r and d of `read_tokens`."""
    return rounding(BF16, np.dtype(np.float32), "nan"), decoding(E4M3FN)


@njit(nogil=True, error_model="numpy", cache=True)
def _all_within(lo, hi, x, bound):
    """Whether every |x[i]| < bound in rows lo to hi."""
    within = True
    for i in range(lo, hi):
        v = x[i]
        for j in range(v.size):
            within &= abs(v[j]) < bound
    return within


def _copy(lo: int, hi: int, source: NDArray[Any], target: NDArray[Any]) -> None:
    np.copyto(target[lo:hi], source[lo:hi])


def pages_of(op: str, kv_cache: Any, layout: Any, page_size: Any, c: int, r: int) -> tuple[NDArray[np.uint8], Packing]:
    """kv_cache[pages,bytes] and where its tokens lie, after checks of layout, page_size and the bytes of a page."""
    choice(op, "layout", layout, LAYOUTS)
    p = packing(layout, integer(op, "page_size", page_size), c, r)
    kv_cache = array_of(op, "kv_cache", kv_cache, (np.uint8,), 2)
    what = f"pages of {p.page_bytes} bytes: {page_size} {layout} tokens of {c} and {r} channels"
    need(kv_cache.shape[1] == p.page_bytes, op, "kv_cache", describe(kv_cache), what)
    return kv_cache, p


def _slots(op: str, slots: Any, least: int, count: int) -> NDArray[np.int64]:
    """slots as int64, each from `least` to count - 1."""
    slots = array_of(op, "slots", slots, INTEGERS, 1)
    outside = (slots < least) | (slots >= count)
    if outside.any():
        i = int(np.argmax(outside))
        need(False, op, f"slots[{i}]", slots[i], f"{least} to {count - 1}")
    wide = slots.astype(np.int64)
    wide.flags.writeable = False
    return wide


def _same(a: Any, b: Any) -> bool:
    """Whether two arrays are the same memory, element for element."""
    return a is b or (isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and a.__array_interface__ == b.__array_interface__)


def cache_append(
    kv_cache: NDArray[np.uint8],
    c_kv: NDArray[Any],
    k_pe: NDArray[Any],
    slots: NDArray[Any],
    *,
    layout: str = "bf16",
    page_size: int = 64,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """kv_cache_out[slots[i] // page_size] = kv_cache with the bytes of (c_kv[i,:], k_pe[i,:]) at token slots[i] % page_size.

    kv_cache[pages,bytes] is uint8, c_kv[n,c] and k_pe[n,r] are float32 or float64 alike and are rounded to bfloat16 first, once; a slot
    of -1 stores nothing. Layouts ("bf16", "fp8_v32", "fp8_v4") as FlashMLA has them: c e4m3fn codes with a float32 scale for each 128
    channels, or an e8m0 byte for each 64 behind the page's tokens; k_pe is bfloat16. The scale is 2^ceil(log2 max(amax/448, 1e-4)). All
    other bytes stay. `out` receives the result; out=kv_cache stores in place, and copies nothing.

    ValueError before anything is stored: dtypes or shapes do not fit, a slot is outside the cache or given twice, a value is not finite
    in bfloat16 though the layout is FP8, another layout, an out that does not fit.
    """
    op = "cache_append"
    c_kv, k_pe = floats(op, "c_kv", c_kv, 2), floats(op, "k_pe", k_pe, 2)
    n, c = c_kv.shape
    ok = k_pe.shape[0] == n and k_pe.dtype == c_kv.dtype
    need(ok, op, "k_pe", f"{k_pe.dtype}{list(k_pe.shape)}", f"{c_kv.dtype}[{n}, r] like c_kv")
    source, p = pages_of(op, kv_cache, layout, page_size, c, k_pe.shape[1])
    where = _slots(op, slots, -1, source.shape[0] * page_size)
    need(where.shape == (n,), op, "slots", f"of shape {where.shape}", f"shape ({n},) like c_kv")
    ranked = np.sort(where[where >= 0])
    twice = ranked[1:][ranked[1:] == ranked[:-1]]
    need(not twice.size, op, "slots", f"{twice[0]} twice" if twice.size else "", "each slot once")
    for name, x in (("c_kv", c_kv), ("k_pe", k_pe)):
        if layout != "bf16" and not all(run(_all_within, *x.shape, x, x.dtype.type(OVER))):
            i, j = np.argwhere(~(np.abs(x) < OVER))[0]
            need(False, op, f"{name}[{i}, {j}]", x[i, j], "a value that is finite in bfloat16")
    in_place = _same(out, kv_cache)
    y = output(op, "out", out, source.shape, np.uint8, c_kv, k_pe, where, *(() if in_place else (source,)))
    if not in_place:
        run(_copy, source.shape[0], -(-p.page_bytes // 4), source, y)
    r, r8 = rounding(BF16, c_kv.dtype, "nan"), rounding(E4M3FN, np.dtype(np.float32), "saturate")
    run(_append, n, c + k_pe.shape[1], c_kv, k_pe, where, p, c_kv.dtype == np.float64, r, r8, y.reshape(-1))
    return y


def cache_read(
    kv_cache: NDArray[np.uint8],
    slots: NDArray[Any],
    *,
    kv_lora_rank: int = 512,
    qk_rope_head_dim: int = 64,
    layout: str = "bf16",
    page_size: int = 64,
    out: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """c_kv[i,:], k_pe[i,:] = the values that token slots[i] % page_size of kv_cache[slots[i] // page_size] holds.

    kv_cache[pages,bytes] is uint8; c_kv[n,kv_lora_rank] and k_pe[n,qk_rope_head_dim] are float32, each value exactly a bfloat16: a code
    times its scale is rounded to float32 and then to bfloat16. Any bytes are legal. Layouts as cache_append. `out` = (c_kv, k_pe)
    receives the result.

    ValueError: dtypes or shapes do not fit, a slot is outside the cache, an attribute has no such value, an out that does not fit.
    """
    op = "cache_read"
    c, pe = integer(op, "kv_lora_rank", kv_lora_rank, 0), integer(op, "qk_rope_head_dim", qk_rope_head_dim, 0)
    pages, p = pages_of(op, kv_cache, layout, page_size, c, pe)
    where = _slots(op, slots, 0, pages.shape[0] * page_size)
    need(out is None or (isinstance(out, tuple) and len(out) == 2), op, "out", type(out).__name__, "a pair of arrays (c_kv, k_pe)")
    n = where.size
    c_kv = output(op, "out[0]", out and out[0], (n, c), np.float32, pages, where)
    k_pe = output(op, "out[1]", out and out[1], (n, pe), np.float32, pages, where, c_kv)
    run(read_tokens, n, c + pe, pages.reshape(-1), where, p, *reading(), c_kv.reshape(-1), c, k_pe.reshape(-1), 0, pe)
    return c_kv, k_pe
