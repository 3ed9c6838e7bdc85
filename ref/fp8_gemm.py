"""Matrix products of FP8 codes with a scale a tile, and the accumulators that tensor cores have. Spec §4.2, §4.4."""

from typing import Literal

from .cast import decode, round_to
from .formats import BF16, FORMATS, Format
from .fp8_accumulate import Accumulator, accumulator_named, fused_dot
from .fp8_recipes import FP8Name, check_codes
from .op import Case, Op, declare, signature
from .xp import Array, constant, xp_of


@signature("a_codes[n,d]:code a_scale[n,d/tile]:const b_codes[o,d]:code b_scale[p,d/tile]:const -> y[n,o]")
def fp8_gemm_fwd(
    a_codes: Array,
    a_scale: Array,
    b_codes: Array,
    b_scale: Array,
    *,
    accumulator: str = "fp32",
    promote: int = 128,
    tile: int = 128,
    scale_order: Literal["one by one", "product first"] = "one by one",
    format: FP8Name = "e4m3fn",
    out: Literal["fp32", "bf16"] = "fp32",
) -> tuple[Array, tuple]:
    """y[n,o] = Σ_j (Σ_{d in part j} a[n,d] b[o,d]) a_scale[n,d//tile] b_scale[r(o),d//tile],   a, b = decode(codes)

    Parts are `promote` elements of d long (a divisor of tile; 0: as long as the tile). Within one the accumulator adds: "fp32", "exact"
    (float64), or a tensor core's: "wgmma13" (Hopper's FP8 wgmma), "mma25" (mma.sync, Blackwell), "bits:F" (ref/fp8_accumulate.py). Its
    result is scaled, (part·a_scale)·b_scale or part·(a_scale·b_scale) with scale_order="product first", and added in the working dtype:
    DeepSeek's promotion to float32. One scale along all of d, tile >= d, with promote=0 is a product that is never promoted.

    r(o) = o//128 where b_scale has p = ⌈o/128⌉ rows (weights in blocks), o where it has p = o (1×tile, Wgrad). out="bf16" rounds the
    result. NaN codes give NaN; scales must be finite and > 0.
    """
    xp, op = xp_of(a_scale), "fp8.gemm"
    how = accumulator_named(op, accumulator)
    check_gemm(a_codes, a_scale, b_codes, b_scale, promote, tile, format, how)
    fmt, d, o = FORMATS[format], a_codes.shape[1], b_codes.shape[0]
    a, b = decode(fmt, a_codes), decode(fmt, b_codes)  # [n,d] [o,d], exact in float32
    if b_scale.shape[0] != o:
        b_scale = xp.repeat(b_scale, 128, axis=0)[:o, :]
    y = xp.zeros_like(xp.matmul(a_scale[:, :0], b_scale[:, :0].T))  # [n,o]
    for k in range(0, d, promote or tile):
        part = slice(k, min(k + (promote or tile), d))
        dot = part_of(a[:, part], b[:, part], a_scale, fmt, accumulator, how)
        sa, sb = a_scale[:, k // tile, None], b_scale[None, :, k // tile]
        y = y + ((dot * sa) * sb if scale_order == "one by one" else dot * (sa * sb))
    return (round_to(BF16, y) if out == "bf16" else y), ()


def part_of(a: Array, b: Array, like: Array, fmt: Format, accumulator: str, how: Accumulator | None) -> Array:
    """Σ_d a[n,d] b[o,d] as the accumulator adds, in the dtype of `like`: [n,o]"""
    xp = xp_of(a)
    if accumulator == "fp32":
        return xp.matmul(constant(like, a), constant(like, b).T)
    if how is None:
        return constant(like, xp.matmul(xp.astype(a, xp.float64), xp.astype(b, xp.float64).T))
    return constant(like, fused_dot(a, b, fmt, how))


def check_gemm(
    a_codes: Array, a_scale: Array, b_codes: Array, b_scale: Array, promote: int, tile: int, format: str, how: Accumulator | None
) -> None:
    op, (n, d), o = "fp8.gemm", a_codes.shape, b_codes.shape[0]
    xp = xp_of(a_scale)
    if d == 0:
        raise ValueError(f"{op}: a_codes has shape {(n, d)}; expected d >= 1, a sum over something")
    if tile < 1:
        raise ValueError(f"{op}: tile is {tile}; expected tile >= 1")
    if promote < 0 or (promote and tile % promote and promote < d):
        raise ValueError(f"{op}: promote is {promote}; expected a divisor of tile = {tile}, or 0 for the whole tile")
    if how is not None and promote % how.group:
        raise ValueError(f"{op}: promote is {promote}; expected a multiple of the accumulator's group of {how.group}")
    for name, codes in (("a_codes", a_codes), ("b_codes", b_codes)):
        check_codes(op, name, codes, format)
    tiles, blocks = -(-d // tile), -(-o // 128)
    if tuple(a_scale.shape) != (n, tiles):
        raise ValueError(f"{op}: a_scale has shape {tuple(a_scale.shape)}; expected n = {n}, d/tile = {tiles}")
    if tuple(b_scale.shape) not in ((o, tiles), (blocks, tiles)):
        rows = f"p = {blocks} (blocks of 128) or {o} (one a row)"
        raise ValueError(f"{op}: b_scale has shape {tuple(b_scale.shape)}; expected {rows}, d/tile = {tiles}")
    for name, scale in (("a_scale", a_scale), ("b_scale", b_scale)):
        wrong = ~(xp.isfinite(scale) & (scale > 0))
        if bool(xp.any(wrong)):
            i, j = (int(v[0]) for v in xp.nonzero(wrong))
            raise ValueError(f"{op}: {name}[{i}, {j}] is {float(scale[i, j])}; expected a finite scale > 0")


def _case(name: str, n: int, o: int, d: int, codes: tuple, note: str = "", p: int = 0, **attrs: object) -> Case:
    draws = {"a_codes": codes, "a_scale": ("scales", -9, -5), "b_codes": codes, "b_scale": ("scales", -9, -5)}
    return Case(name, {"n": n, "o": o, "d": d, "p": p or -(-o // 128)}, draws, attrs, note)


NORMAL, POSITIVE = ("gaussian_codes", 100.0), ("positive_codes", 100.0)
fp8_gemm = declare(
    Op(
        "fp8.gemm",
        fp8_gemm_fwd,
        None,
        (
            _case("one", 1, 1, 1, NORMAL),
            _case("ragged", 5, 131, 300, NORMAL, "two rows of blocks, a last tile of 44"),
            _case("wgrad", 6, 7, 260, NORMAL, "a scale for each row of both operands", p=7),
            _case("product-first", 4, 9, 256, NORMAL, "acc += dot·(sa·sb), as V3.2 and V4 have it", scale_order="product first"),
            _case("wgmma13", 5, 131, 300, NORMAL, "Hopper's FP8 wgmma", accumulator="wgmma13"),
            _case("wgmma13-positive", 4, 6, 1024, POSITIVE, "truncation has a bias", accumulator="wgmma13"),
            _case("wgmma13-never", 4, 6, 4096, POSITIVE, "no promotion: 14 bits all the way", accumulator="wgmma13", promote=0, tile=4096),
            _case("wgmma13-late", 4, 6, 4096, POSITIVE, "one scale, promoted every 128", accumulator="wgmma13", tile=4096),
            _case("wgmma13-subnormal", 4, 6, 256, ("subnormal_codes",), "subnormals, zeros and a few large", accumulator="wgmma13"),
            _case("wgmma13-nan", 4, 6, 96, ("codes",), "every code; rows with a NaN and rows without", accumulator="wgmma13"),
            _case("mma25", 5, 9, 300, NORMAL, accumulator="mma25"),
            _case("bits-10", 5, 9, 300, NORMAL, accumulator="bits:10"),
            _case("exact", 5, 9, 300, NORMAL, accumulator="exact"),
            _case("wide", 8, 16, 7168, NORMAL, "V3's hidden size"),
        ),
        "2*n*o*d",
        "spec §4.2, §4.4; DeepSeek-V3 paper §3.3.2; MMA-Sim (arXiv:2511.10909)",
        vary="n",
    )
)
