"""The paged latent cache, written and read: by struct, by views of the bytes, and by integer arithmetic on bits. Everything is exact."""

import math
import struct
from collections.abc import Callable

import numpy as np

from .floats import LAYOUTS, Array

Two = tuple[Array, Array]
E4M3 = LAYOUTS["e4m3fn"]
POSITIVE = np.array([E4M3.value(code) for code in range(127)])
VALUES = np.concatenate([POSITIVE, [np.nan], -POSITIVE, [np.nan]])


def page_bytes(layout: str, page: int, c: int, r: int) -> int:
    if layout == "bf16":
        return page * (c + r) * 2
    if layout == "fp8_v32":
        return page * (c + 4 * math.ceil(c / 128) + 2 * r)
    return math.ceil(page * (c + 2 * r + math.ceil(c / 64) + 1) / 576) * 576


# to bfloat16: codes


def bf16_codes(x: Array) -> Array:
    """Nearest even, once, from the array's own dtype: float64 is brought to odd on the way, so that nothing is rounded twice."""
    if x.dtype == np.float64:
        with np.errstate(over="ignore"):
            y = x.astype(np.float32)
            toward = np.where(np.abs(y.astype(np.float64)) > np.abs(x), np.nextafter(y, np.float32(0)), y)
        inexact = (toward.astype(np.float64) != x) & ~np.isnan(x)
        x = (toward.view(np.uint32) | inexact.astype(np.uint32)).view(np.float32)
    u = x.view(np.uint32).astype(np.uint64)
    codes = (u + np.uint64(0x7FFF) + ((u >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    nan = (u >> np.uint64(16) & np.uint64(0x8000)) | np.uint64(0x7FC0)
    return np.where(np.isnan(x), nan, codes).astype(np.uint16)


def bf16_values(codes: Array) -> Array:
    return (codes.astype(np.uint32) << np.uint32(16)).view(np.float32)


def bf16_code_scalar(x: float) -> int:
    """Plain Python: the quotient by the unit in the last place, rounded by round()."""
    sign = 0x8000 if math.copysign(1.0, x) < 0 else 0
    if math.isnan(x):
        return sign | 0x7FC0
    if math.isinf(x):
        return sign | 0x7F80
    exponent = max(math.frexp(x)[1] - 1, -126) if x else -126
    units = round(math.ldexp(abs(x), 7 - exponent))  # Python rounds halves to even
    return sign | min(units + ((exponent + 126) << 7), 0x7F80)


# to FP8: a tile's scale is a power of two


def exponent_of(amax: float) -> int:
    """⌈log2 max(amax/448, 1e-4)⌉ without a logarithm"""
    if amax / 448 <= 1e-4:
        return -13
    mantissa, e = math.frexp(amax)  # amax = mantissa 2^e; 448 = 0.875 2^9
    return e - 9 + (mantissa > 0.875)


def codes_by_search(y: Array) -> Array:
    """The nearest of the positive values; from the middle of two, the even code."""
    magnitude = np.minimum(np.abs(y.astype(np.float64)), 448.0)
    middles = (POSITIVE[:-1] + POSITIVE[1:]) / 2
    low, high = np.searchsorted(middles, magnitude, side="left"), np.searchsorted(middles, magnitude, side="right")
    return (np.where(low % 2 == 0, low, high) + 128 * np.signbit(y)).astype(np.uint8)


def code_scalar(y: float) -> int:
    sign = 128 if math.copysign(1.0, y) < 0 else 0
    a = min(abs(y), 448.0)
    exponent = max(math.frexp(a)[1] - 1, -6) if a else -6
    return sign | (round(math.ldexp(a, 3 - exponent)) + ((exponent + 6) << 3))


def codes_by_bits(y: Array) -> Array:
    """A float32 addition that leaves the wanted bits lowest, nearest even by the hardware."""
    a = np.minimum(np.abs(y.astype(np.float32)), np.float32(448))
    _, e = np.frexp(a)
    exponent = np.maximum(np.where(a > 0, e - 1, -6), -6)
    anchor = np.ldexp(np.float32(1.5), exponent + 20)  # its unit in the last place is 2^(exponent - 3)
    units = ((a + anchor) - anchor) / np.ldexp(np.float32(1), exponent - 3)
    return (units.astype(np.int32) + ((exponent + 6) << 3) + 128 * np.signbit(y)).astype(np.uint8)


# append


def append_struct(kv_cache: Array, c_kv: Array, k_pe: Array, slots: Array, *, layout: str = "bf16", page_size: int = 64) -> Array:
    """Plain Python into a bytearray, value after value."""
    (n, c), r = c_kv.shape, k_pe.shape[1]
    size = page_bytes(layout, page_size, c, r)
    out = bytearray(kv_cache.tobytes())
    for i in range(n):
        if slots[i] < 0:
            continue
        at, place = size * (int(slots[i]) // page_size), int(slots[i]) % page_size
        latent, rope = ([bf16_code_scalar(v) for v in row.tolist()] for row in (c_kv[i], k_pe[i]))
        if layout == "bf16":
            struct.pack_into(f"<{c + r}H", out, at + place * 2 * (c + r), *latent, *rope)
            continue
        values = [struct.unpack("<f", struct.pack("<I", code << 16))[0] for code in latent]
        tile = 128 if layout == "fp8_v32" else 64
        exponents = [exponent_of(max(map(abs, values[j : j + tile]))) for j in range(0, c, tile)]
        codes = [code_scalar(math.ldexp(v, -exponents[j // tile])) for j, v in enumerate(values)]
        if layout == "fp8_v32":
            tiles = len(exponents)
            start = at + place * (c + 4 * tiles + 2 * r)
            struct.pack_into(f"<{c}B{tiles}f{r}H", out, start, *codes, *(2.0**e for e in exponents), *rope)
        else:
            struct.pack_into(f"<{c}B{r}H", out, at + place * (c + 2 * r), *codes, *rope)
            after = at + page_size * (c + 2 * r) + place * (len(exponents) + 1)
            struct.pack_into(f"<{len(exponents)}B", out, after, *(e + 127 for e in exponents))
    return np.frombuffer(bytes(out), np.uint8).reshape(kv_cache.shape)


def _append_views(encode: Callable, name: str) -> Callable:
    def append(kv_cache: Array, c_kv: Array, k_pe: Array, slots: Array, *, layout: str = "bf16", page_size: int = 64) -> Array:
        (n, c), r = c_kv.shape, k_pe.shape[1]
        out = kv_cache.copy()
        latent, rope = bf16_codes(c_kv), bf16_codes(k_pe).astype("<u2").view(np.uint8).reshape(n, 2 * r)
        tile = 128 if layout == "fp8_v32" else 64
        starts = range(0, c, tile)
        values = bf16_values(latent)
        exponents = np.array([[exponent_of(float(np.abs(row[j : j + tile]).max())) for j in starts] for row in values])
        own = 2 * (c + r) if layout == "bf16" else c + 2 * r + (4 * len(starts) if layout == "fp8_v32" else 0)
        for i, slot in enumerate(slots.tolist()):
            if slot == -1:
                continue
            page, place = divmod(slot, page_size)
            at = out[page, place * own : (place + 1) * own]
            at[own - 2 * r :] = rope[i]
            if layout == "bf16":
                at[: 2 * c] = latent[i].astype("<u2").view(np.uint8)
                continue
            at[:c] = encode(np.ldexp(values[i], -np.repeat(exponents[i], tile)[:c]))
            if layout == "fp8_v32":
                at[c : own - 2 * r] = np.ldexp(np.float32(1), exponents[i]).astype("<f4").view(np.uint8)
            else:
                rest = page_size * own + place * (len(starts) + 1)
                out[page, rest : rest + len(starts)] = exponents[i] + 127
        return out

    append.__name__ = name
    return append


APPEND = (append_struct, _append_views(codes_by_search, "views-search"), _append_views(codes_by_bits, "views-bits"))

# read: (kv_cache, slots, c, r, layout, page) to c_kv[n,c], k_pe[n,r]


def read_struct(kv_cache: Array, slots: Array, c: int, r: int, layout: str, page_size: int) -> Two:
    """Token after token from a memory view."""
    latent, rope = np.zeros((len(slots), c), np.float32), np.zeros((len(slots), r), np.float32)
    tiles = math.ceil(c / (128 if layout == "fp8_v32" else 64))
    for i, slot in enumerate(slots.tolist()):
        page, place = kv_cache[slot // page_size].tobytes(), slot % page_size
        if layout == "bf16":
            codes = np.array(struct.unpack_from(f"<{c + r}H", page, place * 2 * (c + r)), np.uint16)
            latent[i], rope[i] = bf16_values(codes[:c]), bf16_values(codes[c:])
            continue
        if layout == "fp8_v32":
            fields = struct.unpack_from(f"<{c}B{tiles}I{r}H", page, place * (c + 4 * tiles + 2 * r))
            scales = np.array(fields[c : c + tiles], np.uint32).view(np.float32)
        else:
            fields = struct.unpack_from(f"<{c}B{r}H", page, place * (c + 2 * r))
            after = struct.unpack_from(f"<{tiles}B", page, page_size * (c + 2 * r) + place * (tiles + 1))
            scales = np.array([math.nan if b == 255 else 2.0 ** (b - 127) for b in after], np.float32)
        width = 128 if layout == "fp8_v32" else 64
        with np.errstate(all="ignore"):
            values = np.array([np.float32(VALUES[code]) * scales[j // width] for j, code in enumerate(fields[:c])], np.float32)
        latent[i] = bf16_values(bf16_codes(values))
        rope[i] = bf16_values(np.array(fields[-r:], np.uint16))
    return latent, rope


def read_views(kv_cache: Array, slots: Array, c: int, r: int, layout: str, page_size: int) -> Two:
    """Gathered tokens, their fields as views; code times scale in float64, which holds it, rounded to float32, then to bfloat16."""
    pages, places = kv_cache[slots // page_size], slots % page_size
    own = {"bf16": 2 * (c + r), "fp8_v32": c + 4 * -(-c // 128) + 2 * r, "fp8_v4": c + 2 * r}[layout]
    token = np.ascontiguousarray(np.take_along_axis(pages, places[:, None] * own + np.arange(own), axis=1))
    rope = bf16_values(np.ascontiguousarray(token[:, own - 2 * r :]).view("<u2"))
    if layout == "bf16":
        return bf16_values(np.ascontiguousarray(token[:, : 2 * c]).view("<u2")), rope
    if layout == "fp8_v32":
        scale = np.repeat(np.ascontiguousarray(token[:, c : own - 2 * r]).view("<f4"), 128, axis=1)[:, :c]
    else:
        tiles = -(-c // 64)
        bits = np.take_along_axis(pages, page_size * own + places[:, None] * (tiles + 1) + np.arange(tiles), axis=1).astype(np.uint32)
        # an e8m0 byte is float32's exponent field, but for 0 (a subnormal) and 255 (NaN)
        field = np.where(bits == 0, 1 << 22, np.where(bits == 255, 0x7FC00000, bits << 23)).astype(np.uint32)
        scale = np.repeat(field.view(np.float32), 64, axis=1)[:, :c]
    with np.errstate(all="ignore"):
        product = (VALUES[token[:, :c]] * scale.astype(np.float64)).astype(np.float32)
    return bf16_values(bf16_codes(product)), rope


def read_bits(kv_cache: Array, slots: Array, c: int, r: int, layout: str, page_size: int) -> Two:
    """Codes to numbers by shifting them into float16's exponent, and a factor of 256; whole pages, then the rows that are asked for."""
    tokens = len(kv_cache) * page_size
    own = {"bf16": 2 * (c + r), "fp8_v32": c + 4 * -(-c // 128) + 2 * r, "fp8_v4": c + 2 * r}[layout]
    token = kv_cache[:, : page_size * own].reshape(tokens, own)[slots]
    words = (token[:, 1::2].astype(np.uint16) << np.uint16(8)) | token[:, ::2] if own % 2 == 0 else None
    if layout == "bf16" and words is not None:
        both = bf16_values(words)
        return both[:, :c], both[:, c:]
    tail = token[:, own - 2 * r :].astype(np.uint16)
    rope = bf16_values(tail[:, ::2] | tail[:, 1::2] << np.uint16(8))
    codes = token[:, :c].astype(np.uint16)
    half = ((codes & np.uint16(0x80)) << np.uint16(8)) | ((codes & np.uint16(0x7F)) << np.uint16(7))
    values = half.view(np.float16).astype(np.float32) * np.float32(256)
    values = np.where(codes & 0x7F == 0x7F, np.float32(np.nan), values)
    if layout == "fp8_v32":
        raw = token[:, c : own - 2 * r].reshape(len(slots), -(-c // 128), 4).astype(np.uint32)
        scale = (raw << (np.uint32(8) * np.arange(4, dtype=np.uint32))).sum(-1, dtype=np.uint32).view(np.float32)
        scale = np.repeat(scale, 128, axis=1)[:, :c]
    else:
        tiles = -(-c // 64)
        rest = kv_cache[:, page_size * own : page_size * (own + tiles + 1)].reshape(tokens, tiles + 1)[slots, :tiles].astype(np.int32)
        power = np.ldexp(np.float32(1), rest - 127)
        scale = np.repeat(np.where(rest == 255, np.float32(np.nan), power), 64, axis=1)[:, :c]
    with np.errstate(all="ignore"):
        return bf16_values(bf16_codes(values * scale)), rope


READERS: dict[str, Callable] = {"struct": read_struct, "views": read_views, "bits": read_bits}


def _reader(read: Callable, name: str) -> Callable:
    def reader(
        kv_cache: Array, slots: Array, *, kv_lora_rank: int = 512, qk_rope_head_dim: int = 64, layout: str = "bf16", page_size: int = 64
    ) -> Two:
        return read(kv_cache, slots, kv_lora_rank, qk_rope_head_dim, layout, page_size)

    reader.__name__ = name
    return reader


READ = tuple(_reader(read, name) for name, read in READERS.items())
