"""The paged KV cache's bytes: a token written into them and read back, one exact rounding at a time; shares nothing with `ref`.

Equation: bf16 parts are round_bf16(x). FP8 codes are e4m3fn(v / S) of v = round_bf16(x), S the least power of two that is at least
max(amax / 448, 1/10000) over a tile, found in fractions; they are read as round_bf16(round_float32(code * S)). Little-endian throughout.
A page in layout "bf16" or "fp8_v32" is one record a token; in "fp8_v4" the codes and rope parts of all tokens come first, the scales after.
"""

import math
import struct
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from .cast import encode_value
from .edges import carrier, choose, fill
from .floats import BINARY32, CAST_FORMATS, decode, multiply
from .linear import Arrays, expect, integers

E4M3FN, BF16 = CAST_FORMATS["e4m3fn"], CAST_FORMATS["bf16"]
TILES = {"bf16": 0, "fp8_v32": 128, "fp8_v4": 64}  # channels that share a scale; 0: there are no scales
ALIGNMENT = 576  # of an fp8_v4 page, in bytes


@dataclass(frozen=True)
class Layout:
    """Where the parts of a token lie in a page."""

    name: str
    c: int
    r: int
    page_size: int

    def __post_init__(self) -> None:
        choose("layout", self.name, TILES)
        if self.page_size < 1:
            raise ValueError(f"page_size {self.page_size} < 1")
        if min(self.c, self.r) < 0:
            raise ValueError(f"a token of {self.c} latent and {self.r} rope channels")

    @property
    def tiles(self) -> int:
        return -(-self.c // TILES[self.name]) if TILES[self.name] else 0

    @property
    def page_bytes(self) -> int:
        if self.name == "bf16":
            return self.page_size * 2 * (self.c + self.r)
        if self.name == "fp8_v32":
            return self.page_size * (self.c + 4 * self.tiles + 2 * self.r)
        return -(-self.page_size * (self.c + 2 * self.r + self.tiles + 1) // ALIGNMENT) * ALIGNMENT

    def offsets(self, place: int) -> tuple[int, int, int]:
        """The first byte of c_kv, of k_pe and of the scales."""
        if self.name == "bf16":
            first = place * 2 * (self.c + self.r)
            return first, first + 2 * self.c, first
        if self.name == "fp8_v32":
            first = place * (self.c + 4 * self.tiles + 2 * self.r)
            return first, first + self.c + 4 * self.tiles, first + self.c
        first = place * (self.c + 2 * self.r)
        return first, first + self.c, self.page_size * (self.c + 2 * self.r) + place * (self.tiles + 1)


def bf16_bytes(codes: list[int]) -> bytes:
    return struct.pack(f"<{len(codes)}H", *codes)


def bf16_codes(values: list[float]) -> list[int]:
    """The bfloat16 codes of values, infinities where they overflow."""
    return [encode_value(v, BF16, "nan") for v in values]


def scale_exponent(values: list[float]) -> int:
    """ceil(log2(max(amax / 448, 1/10000))) of a tile of finite bfloat16 values."""
    least = max(max(Fraction(abs(v)) for v in values) / 448, Fraction(1, 10_000))
    return next(k for k in range(-14, 128) if Fraction(2) ** k >= least)


def write_token(page: bytearray, place: int, layout: Layout, c_kv: list[int], k_pe: list[int]) -> None:
    """Puts one token, given as bfloat16 codes, into a page."""
    at_c_kv, at_k_pe, at_scales = layout.offsets(place)
    page[at_k_pe : at_k_pe + 2 * layout.r] = bf16_bytes(k_pe)
    if layout.name == "bf16":
        page[at_c_kv : at_c_kv + 2 * layout.c] = bf16_bytes(c_kv)
        return
    values, tile = [decode(code, BF16) for code in c_kv], TILES[layout.name]
    for i in range(layout.tiles):
        part = values[i * tile : (i + 1) * tile]
        k = scale_exponent(part)
        for j, v in enumerate(part):  # 2^-133 / 2^120 and the like are still float64: the quotient is exact
            page[at_c_kv + i * tile + j] = encode_value(math.ldexp(v, -k), E4M3FN, "saturate")
        if layout.name == "fp8_v32":
            struct.pack_into("<f", page, at_scales + 4 * i, 2.0**k)
        else:
            page[at_scales + i] = k + 127


def read_scale(page: bytes, at_scales: int, i: int, layout: Layout) -> float:
    """The scale of tile i, whatever its bits are."""
    if layout.name == "fp8_v32":
        return decode(int.from_bytes(page[at_scales + 4 * i : at_scales + 4 * i + 4], "little"), BINARY32)
    byte = page[at_scales + i]
    return math.nan if byte == 255 else math.ldexp(1.0, byte - 127)


def read_bf16(page: bytes, at: int, count: int) -> list[float]:
    return [decode(code, BF16) for code in struct.unpack_from(f"<{count}H", page, at)]


def read_token(page: bytes, place: int, layout: Layout) -> tuple[list[float], list[float]]:
    """(c_kv, k_pe) of one token, each value a bfloat16."""
    at_c_kv, at_k_pe, at_scales = layout.offsets(place)
    k_pe = read_bf16(page, at_k_pe, layout.r)
    if layout.name == "bf16":
        return read_bf16(page, at_c_kv, layout.c), k_pe
    scales = [read_scale(page, at_scales, i, layout) for i in range(layout.tiles)]
    codes, tile = page[at_c_kv : at_c_kv + layout.c], TILES[layout.name]
    products = [multiply(decode(code, E4M3FN), scales[j // tile], BINARY32) for j, code in enumerate(codes)]
    return [decode(code, BF16) for code in bf16_codes(products)], k_pe


def check_pages(kv_cache: np.ndarray, layout: Layout) -> list[bytes]:
    """The pages, once the cache has passed the contract's ValueErrors."""
    if kv_cache.dtype != np.uint8:
        raise ValueError(f"kv_cache must be uint8, got {kv_cache.dtype}")
    if kv_cache.ndim != 2 or kv_cache.shape[1] != layout.page_bytes:
        raise ValueError(f"kv_cache has shape {kv_cache.shape}, its pages must be of {layout.page_bytes} bytes")
    return [row.tobytes() for row in kv_cache]


def check_slots(slots: list[int], pages: int, layout: Layout, least: int) -> None:
    for i, slot in enumerate(slots):
        if not least <= slot < pages * layout.page_size:
            raise ValueError(f"slots[{i}] is {slot}; the cache has {pages * layout.page_size}")


def append(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """cache.append: kv_cache, c_kv, k_pe, slots -> kv_cache_out."""
    at = fill({"layout": "bf16", "page_size": 64}, attrs)
    (n, c), r = inputs["c_kv"].shape, inputs["k_pe"].shape[1]
    expect(inputs, {"k_pe": (n, r), "slots": (n,)})
    layout, slots = Layout(at["layout"], c, r, at["page_size"]), integers(inputs["slots"], "slots")
    pages = [bytearray(page) for page in check_pages(inputs["kv_cache"], layout)]
    check_slots(slots, len(pages), layout, -1)
    stored = [slot for slot in slots if slot >= 0]
    if len(set(stored)) < len(stored):
        raise ValueError(f"a slot is given twice: {slots}")
    tokens: dict[str, list[list[int]]] = {}
    for name in ("c_kv", "k_pe"):
        carrier(inputs[name])
        tokens[name] = [bf16_codes(row) for row in inputs[name].tolist()]
        # A finite value beyond bfloat16's range has been rounded to an infinity by now.
        if layout.name != "bf16" and not all(math.isfinite(decode(code, BF16)) for row in tokens[name] for code in row):
            raise ValueError(f"{name} holds a value that is no finite bfloat16")
    for slot, c_kv, k_pe in zip(slots, tokens["c_kv"], tokens["k_pe"], strict=True):
        if slot >= 0:
            write_token(pages[slot // layout.page_size], slot % layout.page_size, layout, c_kv, k_pe)
    return {"kv_cache_out": np.frombuffer(b"".join(pages), np.uint8).reshape(inputs["kv_cache"].shape)}


def read(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """cache.read: kv_cache, slots -> c_kv, k_pe."""
    at = fill({"kv_lora_rank": 512, "qk_rope_head_dim": 64, "layout": "bf16", "page_size": 64}, attrs)
    layout = Layout(at["layout"], at["kv_lora_rank"], at["qk_rope_head_dim"], at["page_size"])
    expect(inputs, {"slots": (inputs["slots"].size,)})
    pages, slots = check_pages(inputs["kv_cache"], layout), integers(inputs["slots"], "slots")
    check_slots(slots, len(pages), layout, 0)
    tokens = [read_token(pages[slot // layout.page_size], slot % layout.page_size, layout) for slot in slots]
    c_kv, k_pe = [token[0] for token in tokens], [token[1] for token in tokens]
    return {
        "c_kv": np.array(c_kv, np.float32).reshape(len(slots), layout.c),
        "k_pe": np.array(k_pe, np.float32).reshape(len(slots), layout.r),
    }
