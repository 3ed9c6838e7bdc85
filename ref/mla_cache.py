"""The latent cache in pages: BF16, and FlashMLA's two FP8 layouts, byte for byte. Spec §2.1.

A token is c_kv[c] and k_pe[r]; k_pe is always bfloat16, little-endian. A contiguous cache is one page a sequence.
"""

from typing import Any, Literal, NamedTuple

from array_api_compat import device

from .cast import decode, encode, round_to
from .formats import BF16, E4M3FN, FP32
from .fp8 import dequantize_tile_fwd, quantize_tile_fwd
from .op import Case, Op, declare, signature
from .xp import Array, floor_log2, power_of_two, xp_of

LayoutName = Literal["bf16", "fp8_v32", "fp8_v4"]


class CacheLayout(NamedTuple):
    """How a token lies in its page. tile: channels of c_kv to a scale (0: c_kv is bfloat16). apart: the scales of a page, a byte each and
    one more to fill up, follow all its tokens, and the page is filled up to a multiple of `align` bytes."""

    tile: int = 0
    apart: bool = False
    align: int = 1

    def token_bytes(self, c: int, r: int) -> tuple[int, int]:
        """Bytes among the tokens, and bytes after them."""
        if not self.tile:
            return 2 * (c + r), 0
        tiles = -(-c // self.tile)
        return (c + 2 * r, tiles + 1) if self.apart else (c + 4 * tiles + 2 * r, 0)

    def page_bytes(self, page: int, c: int, r: int) -> int:
        return -(-page * sum(self.token_bytes(c, r)) // self.align) * self.align


LAYOUTS: dict[str, CacheLayout] = {
    "bf16": CacheLayout(),
    "fp8_v32": CacheLayout(tile=128),  # 656 bytes: 512 e4m3 | 4 float32 scales | 64 bfloat16
    "fp8_v4": CacheLayout(tile=64, apart=True, align=576),  # 584 bytes: 448 e4m3 | 64 bfloat16, then 7 e8m0 scales and one more byte
}


def bytes_of(codes: Array, count: int) -> Array:
    """Unsigned integers [n,m] as bytes, the lowest first: [n, m·count]"""
    xp = xp_of(codes)
    wide = xp.astype(codes, xp.int64)
    parts = xp.stack([wide // 256**i % 256 for i in range(count)], axis=-1)
    return xp.astype(xp.reshape(parts, (codes.shape[0], codes.shape[1] * count)), xp.uint8)


def integers_of(data: Array, count: int) -> Array:
    """bytes_of, backwards: [n, m·count] to int64 [n,m]"""
    xp = xp_of(data)
    parts = xp.astype(xp.reshape(data, (data.shape[0], data.shape[1] // count, count)), xp.int64)
    return xp.sum(xp.stack([parts[..., i] * 256**i for i in range(count)], axis=-1), axis=-1)


def pack(c_kv: Array, k_pe: Array, layout: CacheLayout) -> tuple[Array, Array]:
    """A token's bytes among the tokens, and after them: [n,·] uint8 each, of values rounded to bfloat16"""
    xp = xp_of(c_kv)
    rope = bytes_of(encode(BF16, k_pe), 2)
    if not layout.tile:
        return xp.concat([bytes_of(encode(BF16, c_kv), 2), rope], axis=1), rope[:, :0]
    (codes, scale), _ = quantize_tile_fwd(round_to(BF16, c_kv), recipe="flashmla", tile=layout.tile)
    exponent = floor_log2(xp, scale) + 127  # [n,tiles]: a scale is a power of two
    if layout.apart:
        return xp.concat([codes, rope], axis=1), bytes_of(exponent, 1)
    return xp.concat([codes, bytes_of(exponent * 2**23, 4), rope], axis=1), rope[:, :0]


def unpack(data: Array, after: Array, layout: CacheLayout, c: int) -> tuple[Array, Array]:
    """c_kv[n,c] and k_pe[n,r] as they are read back: bfloat16 values in float32; code times scale is rounded once"""
    xp = xp_of(data)
    if not layout.tile:
        values = decode(BF16, integers_of(data, 2))
        return values[:, :c], values[:, c:]
    tiles = -(-c // layout.tile)
    if layout.apart:
        # An e8m0 byte b is 2^(b-127); 255 is NaN.
        exponent = xp.astype(after[:, :tiles], xp.int64)
        scale = power_of_two(xp, exponent - 127, xp.float32, device(data))
        scale = xp.where(exponent == 255, xp.full_like(scale, float("nan")), scale)
        rope = data[:, c:]
    else:
        scale = decode(FP32, integers_of(data[:, c : c + 4 * tiles], 4))
        rope = data[:, c + 4 * tiles :]
    values, _ = dequantize_tile_fwd(data[:, :c], scale, tile=layout.tile, format=E4M3FN.name)
    return round_to(BF16, values), decode(BF16, integers_of(rope, 2))


def split_pages(kv_cache: Array, layout: CacheLayout, page_size: int, c: int, r: int) -> tuple[Array, Array, Array]:
    """kv_cache[pages,bytes] as tokens [pages·page_size,·], what follows them [pages·page_size,·], and what fills the page up"""
    xp, pages = xp_of(kv_cache), kv_cache.shape[0]
    own, after = layout.token_bytes(c, r)
    data = xp.reshape(kv_cache[:, : page_size * own], (pages * page_size, own))
    rest = xp.reshape(kv_cache[:, page_size * own : page_size * (own + after)], (pages * page_size, after))
    return data, rest, kv_cache[:, page_size * (own + after) :]


def check_cache(op: str, kv_cache: Array, layout: str, page_size: int, c: int, r: int) -> None:
    xp = xp_of(kv_cache)
    if page_size < 1:
        raise ValueError(f"{op}: page_size is {page_size}; expected page_size >= 1")
    expected = LAYOUTS[layout].page_bytes(page_size, c, r)
    if kv_cache.dtype != xp.uint8 or kv_cache.shape[1] != expected:
        what = f"{kv_cache.dtype} of shape {tuple(kv_cache.shape)}"
        raise ValueError(
            f"{op}: kv_cache is {what}; expected uint8 pages of {expected} bytes: {page_size} {layout} tokens of {c} and {r} channels"
        )


def check_slots(op: str, slots: Array, count: int, least: int) -> None:
    xp = xp_of(slots)
    outside = (slots < least) | (slots >= count)
    if bool(xp.any(outside)):
        i = int(xp.nonzero(outside)[0][0])
        raise ValueError(f"{op}: slots[{i}] is {int(slots[i])}; expected {least} to {count - 1}")


@signature("kv_cache[pages,bytes]:code c_kv[n,c] k_pe[n,r] slots[n]:index -> kv_cache_out[pages,bytes]:code")
def cache_append_fwd(
    kv_cache: Array, c_kv: Array, k_pe: Array, slots: Array, *, layout: LayoutName = "bf16", page_size: int = 64
) -> tuple[Array, tuple]:
    """kv_cache_out[slots[i] // page_size] = kv_cache with the bytes of (c_kv[i], k_pe[i]) at token slots[i] % page_size

    Values are rounded to bfloat16 first. Layouts: "bf16", 2(c+r) bytes a token. "fp8_v32" (FlashMLA, V3.2; 656 bytes): c e4m3 codes, a
    float32 scale for each 128 channels, r bfloat16. "fp8_v4" (FlashMLA's MODEL1, V4's shapes; 584 bytes): c e4m3 codes and r bfloat16 of
    all tokens of the page, then for each token an e8m0 scale for each 64 channels and one byte more; the page is filled up to a multiple
    of 576. A scale is 2^⌈log2 max(amax/448, 1e-4)⌉ and multiplies on reading. A slot of -1 stores nothing. All other bytes stay as they
    are. Nothing is stored if any argument is wrong: slots outside the cache or given twice; in an FP8 layout, values that are not finite
    in bfloat16.
    """
    xp, op, how = xp_of(kv_cache), "cache.append", LAYOUTS[layout]
    (n, c), r, total = c_kv.shape, k_pe.shape[1], kv_cache.shape[0] * page_size
    check_cache(op, kv_cache, layout, page_size, c, r)
    check_slots(op, slots, total, -1)
    order = xp.argsort(slots, stable=True)
    ranked = xp.take(slots, order)  # [n], ascending
    twice = (ranked[1:] == ranked[:-1]) & (ranked[1:] >= 0) if n else ranked == ranked
    if bool(xp.any(twice)):
        raise ValueError(f"{op}: slots has {int(ranked[1:][twice][0])} twice; expected each slot once")
    for name, x in (("c_kv", c_kv), ("k_pe", k_pe)):
        finite = xp.isfinite(round_to(BF16, x))
        if how.tile and not bool(xp.all(finite)):
            i, j = (int(v[0]) for v in xp.nonzero(~finite))
            raise ValueError(f"{op}: {name}[{i}, {j}] is {float(x[i, j])}; expected values that are finite in bfloat16")
    if n == 0 or total == 0:
        return kv_cache + xp.zeros_like(kv_cache), ()
    places = xp.arange(total, dtype=slots.dtype, device=device(slots))
    near = xp.clip(xp.searchsorted(ranked, places), 0, n - 1)  # which token, if any, goes to each place: a gather, not a scatter
    stored = (xp.take(ranked, near) == places)[:, None]
    token = xp.take(order, near)
    old_data, old_after, filling = split_pages(kv_cache, how, page_size, c, r)
    data, after = pack(c_kv, k_pe, how)
    tiles = after.shape[1]
    data = xp.where(stored, xp.take(data, token, axis=0), old_data)
    after = xp.concat([xp.where(stored, xp.take(after, token, axis=0), old_after[:, :tiles]), old_after[:, tiles:]], axis=1)
    pages = kv_cache.shape[0]
    rows = [xp.reshape(part, (pages, page_size * part.shape[1])) for part in (data, after)]
    return xp.concat([*rows, filling], axis=1), ()


@signature("kv_cache[pages,bytes]:code slots[n]:index -> c_kv[n,kv_lora_rank]:exact k_pe[n,qk_rope_head_dim]:exact")
def cache_read_fwd(
    kv_cache: Array,
    slots: Array,
    *,
    kv_lora_rank: int = 512,
    qk_rope_head_dim: int = 64,
    layout: LayoutName = "bf16",
    page_size: int = 64,
) -> tuple[tuple[Array, Array], tuple]:
    """c_kv[i], k_pe[i] = the values that token slots[i] % page_size of kv_cache[slots[i] // page_size] holds

    In float32, each exactly a bfloat16: FP8 codes times their scale are rounded to bfloat16 once. Layouts as in cache.append.
    """
    xp, how, c, r = xp_of(kv_cache), LAYOUTS[layout], kv_lora_rank, qk_rope_head_dim
    check_cache("cache.read", kv_cache, layout, page_size, c, r)
    check_slots("cache.read", slots, kv_cache.shape[0] * page_size, 0)
    data, after, _ = split_pages(kv_cache, how, page_size, c, r)
    index = xp.astype(slots, xp.int64)
    return unpack(xp.take(data, index, axis=0), xp.take(after, index, axis=0), how, c), ()


def _sizes(layout: str, pages: int, page: int, c: int, r: int, n: int) -> tuple[dict[str, int], dict[str, Any]]:
    dims = {"pages": pages, "bytes": LAYOUTS[layout].page_bytes(page, c, r), "n": n}
    return dims, {"layout": layout, "page_size": page}


def _append(
    name: str,
    layout: str,
    slots: tuple[int, ...],
    note: str = "",
    pages: int = 3,
    page: int = 4,
    c: int = 12,
    r: int = 4,
    c_kv: tuple = ("rows_wide", -20, 12),
) -> Case:
    dims, attrs = _sizes(layout, pages, page, c, r, len(slots))
    draws = {"kv_cache": ("integers", 0, 256), "c_kv": c_kv, "k_pe": ("normal", 1.0), "slots": ("positions", *slots)}
    return Case(name, {**dims, "c": c, "r": r}, draws, attrs, note)


def _read(name: str, layout: str, slots: tuple[int, ...], note: str = "", pages: int = 3, page: int = 4, c: int = 12, r: int = 4) -> Case:
    dims, attrs = _sizes(layout, pages, page, c, r, len(slots))
    draws = {"kv_cache": ("integers", 0, 256), "slots": ("positions", *slots)}
    return Case(name, dims, draws, {**attrs, "kv_lora_rank": c, "qk_rope_head_dim": r}, note)


SOURCE = "spec §2.1; FlashMLA README and tests/quant.py"
cache_append = declare(
    Op(
        "cache.append",
        cache_append_fwd,
        None,
        (
            _append("bf16", "bf16", (5, 0, -1, 11), "one token that is not stored"),
            _append("contiguous", "bf16", (3, 4, 5), "a page is a sequence", pages=1, page=9),
            _append("v32", "fp8_v32", (0, 2, 7, 5, -1, 1), "656 bytes a token", pages=2, c=512, r=64),
            _append("v4", "fp8_v4", (6, 1, 2, 0), "584 bytes a token, scales after the tokens", pages=2, c=448, r=64),
            _append("ragged", "fp8_v32", (1, 3), "a last tile of 72 channels", pages=1, c=200, r=4),
            _append("outliers", "fp8_v32", (1, 0), "a scale for each tile", pages=1, page=2, c=512, r=4, c_kv=("outliers", 1.0, 900.0)),
        ),
        "n*(c+r)",
        SOURCE,
        vary="",
    )
)
cache_read = declare(
    Op(
        "cache.read",
        cache_read_fwd,
        None,
        (
            _read("bf16", "bf16", (5, 0, 11, 5)),
            _read("contiguous", "bf16", (3, 4, 5), "a page is a sequence", pages=1, page=9),
            _read("v32", "fp8_v32", (0, 2, 7), "656 bytes a token, any bytes: any float32 for a scale", pages=2, c=512, r=64),
            _read("v4", "fp8_v4", (6, 1, 2), "584 bytes a token, any bytes", pages=2, c=448, r=64),
            _read("ragged", "fp8_v32", (1, 3), "a last tile of 72 channels", pages=1, c=200, r=4),
        ),
        "n*(kv_lora_rank+qk_rope_head_dim)",
        SOURCE,
        vary="",
    )
)
