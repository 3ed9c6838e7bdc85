"""Bugs of casts, encodings and the packing of small codes."""

from collections.abc import Callable
from typing import Any

from ...ref.cast import decode, encode, quotient, round_to
from ...ref.formats import (
    BF16,
    CASTS,
    E2M1,
    E4M3FN,
    E4M3FNUZ,
    E5M2,
    E5M2FNUZ,
    E5M6,
    E8M0,
    FORMATS,
    FP16,
    FP32,
    TF32,
    Format,
)
from ...ref.pack import pack_e2m1_fwd, pack_e5m6_fwd, unpack_e2m1_fwd, unpack_e5m6_fwd
from ...ref.xp import Array, xp_of
from . import Bug


def _names(*formats: Format) -> tuple[str, ...]:
    """cast.x and encode.x; tf32 has no codes."""
    return tuple(f"{kind}.{f.name}" for kind in ("cast", "encode") for f in formats if kind == "cast" or f.bits <= 16)


def _of(name: str, change: Callable[[Format, Array], Array], formats: tuple[Format, ...], **about: Any) -> list[Bug]:
    """One bug of the rounding, as a variant of cast and of encode: change(fmt, x) is what is then rounded rightly."""
    bugs = []
    for op in _names(*formats):
        kind, fmt = op.split(".")[0], FORMATS[op.split(".")[1]]

        def fwd(
            x: Array, random: Array | None = None, *, overflow: Any = None, rounding: Any = "half-even", kind: str = kind, fmt: Format = fmt
        ) -> tuple[Array, tuple]:
            overflow = overflow or ("saturate" if fmt.bits <= 8 else "nan")
            how = round_to if kind == "cast" else encode
            x = x if random is not None and change is _twice else change(fmt, x)  # it is ties that go wrong twice
            return how(fmt, x, overflow=overflow, rounding=rounding, random=random), ()

        bugs.append(Bug(name, (op,), fwd=fwd, **about))
    return bugs


def _twice(fmt: Format, x: Array) -> Array:
    return round_to(FP16, x, overflow="nan")


def _flushed(fmt: Format, x: Array) -> Array:
    xp = xp_of(x)
    return xp.where(xp.abs(x) < 2.0**fmt.emin, xp.copysign(xp.zeros_like(x), x), x)


def _unsigned_zero(fmt: Format, x: Array) -> Array:
    xp = xp_of(x)
    return xp.where(x == 0, xp.zeros_like(x), x)


def _no_negative_zero(fmt: Format, x: Array) -> Array:
    """Where the result is zero it is +0."""
    xp = xp_of(x)
    return xp.where(round_to(fmt, x) == 0, xp.zeros_like(x), x)


def with_codes(name: str, formats: tuple[Format, ...], codes_of: Callable[..., Array], **about: Any) -> list[Bug]:
    """A bug of encode that is told by its codes: codes_of(fmt, x, right codes, attributes)."""
    bugs = []
    for fmt in formats:

        def fwd(
            x: Array, random: Array | None = None, *, overflow: Any = None, rounding: Any = "half-even", fmt: Format = fmt
        ) -> tuple[Array, tuple]:
            attrs = {"overflow": overflow or ("saturate" if fmt.bits <= 8 else "nan"), "rounding": rounding, "random": random}
            return codes_of(fmt, x, encode(fmt, x, **attrs), attrs), ()

        bugs.append(Bug(name, (f"encode.{fmt.name}",), fwd=fwd, **about))
    return bugs


def _signed_zero_code(fmt: Format, x: Array, codes: Array, attrs: dict) -> Array:
    """The sign bit is set whatever follows: a zero with it is the NaN of the FNUZ formats."""
    xp = xp_of(x)
    return xp.where((codes == 0) & xp.signbit(x), xp.full_like(codes, fmt.nan_code), codes)


OTHER = {E4M3FN: E4M3FNUZ, E4M3FNUZ: E4M3FN, E5M2: E5M2FNUZ, E5M2FNUZ: E5M2}


def _other_codes(fmt: Format, x: Array, codes: Array, attrs: dict) -> Array:
    return encode(OTHER[fmt], x, **attrs)


def tile_kernels_e5m6(x: Array, right: Array) -> Array:
    """Codes of E5M6 as TileKernels makes them. Below 2^-14 the bits that decide the rounding are not those that are cut off."""
    xp = xp_of(x)
    x = round_to(FP32, xp.where(xp.isfinite(x), x, xp.zeros_like(x)))
    magnitude = xp.abs(x)
    whole = xp.astype(xp.floor(xp.clip(magnitude, None, 2.0**E5M6.emin) * 2.0**20), xp.int64)  # binary16 toward zero, four bits less
    mantissa, _, _ = quotient(FP32, x)  # its lower bits are the pattern's
    up = whole % 2 + xp.astype(mantissa, xp.int64) % 2**17 > 2**16
    codes = whole + xp.astype(up, xp.int64) + xp.astype(xp.signbit(x), xp.int64) * 2 ** (E5M6.bits - 1)
    return xp.where((magnitude < 2.0**E5M6.emin) & (magnitude > 0), xp.astype(codes, right.dtype), right)


def _tile_kernels_encode(fmt: Format, x: Array, codes: Array, attrs: dict) -> Array:
    return tile_kernels_e5m6(x, codes) if attrs["rounding"] == "half-even" else codes


def _decoded(name: str, formats: tuple[Format, ...], change: Callable[[Format, Array], Array], **about: Any) -> list[Bug]:
    """A bug of decode, once a format: change(fmt, codes) is what is returned."""
    return [
        Bug(name, (f"decode.{fmt.name}",), fwd=lambda codes, fmt=fmt: (change(fmt, codes), ()), **about)  # type: ignore[misc]
        for fmt in formats
    ]


def _binade_too_small(fmt: Format, codes: Array) -> Array:
    """Subnormals read with the exponent of the field 0 instead of 1."""
    x = decode(fmt, codes)
    return xp_of(codes).where(xp_of(codes).abs(x) < 2.0**fmt.emin, x / 2, x)


def _into_float32(fmt: Format, codes: Array) -> Array:
    """The exponent shifted into a float32's field, which reads 0 and 255 in another way."""
    xp, x = xp_of(codes), decode(fmt, codes)
    return xp.where(codes == 0, xp.zeros_like(x), xp.where(codes == 255, xp.full_like(x, float("inf")), x))


# packing


def _high_nibble_first(codes: Array) -> tuple[Array, tuple]:
    return pack_e2m1_fwd(_exchanged(codes, 2))


def _high_nibble_read_first(packed: Array) -> tuple[Array, tuple]:
    return _exchanged(unpack_e2m1_fwd(packed)[0], 2), ()


def _words_backwards(codes: Array) -> tuple[Array, tuple]:
    return _exchanged(pack_e5m6_fwd(codes)[0], 3), ()


def _words_read_backwards(packed: Array) -> tuple[Array, tuple]:
    return unpack_e5m6_fwd(_exchanged(packed, 3))


def _low_bits_first(codes: Array) -> tuple[Array, tuple]:
    """The 96 bits of the eight codes with the first code lowest, cut into words from below."""
    return _exchanged(pack_e5m6_fwd(_exchanged(codes, 8))[0], 3), ()


def _low_bits_read_first(packed: Array) -> tuple[Array, tuple]:
    return _exchanged(unpack_e5m6_fwd(_exchanged(packed, 3))[0], 8), ()


def _exchanged(x: Array, group: int) -> Array:
    """Each group of columns backwards"""
    xp, (n, d) = xp_of(x), x.shape
    return xp.reshape(xp.flip(xp.reshape(x, (n, d // group, group)), axis=2), (n, d))


NARROW = (E4M3FN, E5M2, E4M3FNUZ, E5M2FNUZ)
SIGNED = tuple(f for f in CASTS if f.signed)
FNUZ = "FNUZ and OCP formats are taken for each other: the bias is one off, a factor of 2, and 0x80 is NaN in one and -0 in the other."
NIBBLES = "The even index is put into the high nibble."
BUGS = [
    Bug(
        "e4m3-round-half-away",
        _names(*SIGNED),
        "Ties are rounded away from zero instead of to even.",
        "sgl-project/sglang#37140, #40581; vllm-project/vllm#46944",
        attrs={"rounding": "half-away"},
    ),
    Bug(
        "e4m3-truncate",
        _names(*SIGNED),
        "Rounded toward zero instead of to nearest.",
        "bfloat16: zilliztech/knowhere#529, stillwater-sc/universal#1133",
        attrs={"rounding": "zero"},
    ),
    Bug(
        "fp4-ties-down",
        _names(E2M1),
        "Ties go toward zero (0.75 to 0.5, 1.75 to 1.5, 3.5 to 3), as DeepGEMM has them.",
        "deepseek-ai/DeepGEMM",
        attrs={"rounding": "half-zero"},
        benign=True,
    ),
    Bug(
        "ue8m0-floor-or-nearest",
        _names(E8M0),
        "The exponent is cut off instead of rounded.",
        "ml-explore/mlx#4353; jax-ml/ml_dtypes#298; ROCm/FlyDSL#590",
        attrs={"rounding": "zero"},
    ),
    Bug(
        "ue8m0-nan-255",
        _names(E8M0),
        "What rounds beyond 2^127 gets the exponent 255, which is NaN.",
        "tile-ai/tilelang-metax#101; sgl-project/sglang#31210 clamps",
        attrs={"overflow": "nan"},
    ),
    *_of(
        "fp8-double-rounding",
        _twice,
        (*NARROW, E5M6),
        what="Rounded twice, through float16: just above a midpoint it falls to the even side.",
        sources="triton-lang/triton#10846, #2583; uxlfoundation/oneDNN#2361; tenstorrent/tt-metal#52155",
    ),
    *_of(
        "fp8-subnormal-flush",
        _flushed,
        (*NARROW, E2M1, E5M6),
        what="Subnormals of the format are flushed to zero.",
        sources="1CatAI/1Cat-vLLM#222; tenstorrent/tt-metal#51971; JuliaMath/Float8s.jl#22",
    ),
    *_of("subnormal-flush", _flushed, (BF16, FP16, TF32), what="Subnormals of the format are flushed to zero."),
    *_of("zero-sign-lost", _unsigned_zero, tuple(f for f in SIGNED if f.negative_zero), what="The sign of a zero is lost."),
    *_of(
        "fp4-negative-zero-dropped",
        _no_negative_zero,
        (E2M1,),
        what="What rounds to zero is +0, as DeepGEMM has it.",
        sources="deepseek-ai/DeepGEMM",
        benign=True,
    ),
    *_decoded(
        "fp8-subnormal-binade",
        (*NARROW, E2M1, E5M6),
        _binade_too_small,
        what="Subnormal codes are read a binade too small.",
        sources="1CatAI/1Cat-vLLM#222",
    ),
    *_decoded(
        "e4m3fnuz-vs-fn",
        NARROW,
        lambda fmt, codes: decode(OTHER[fmt], codes),
        what=FNUZ,
        sources="sgl-project/sglang#2667; vllm-project/vllm#45681",
    ),
    *with_codes("e4m3fnuz-vs-fn", NARROW, _other_codes, what=FNUZ, sources="sgl-project/sglang#2667; vllm-project/vllm#45681"),
    *with_codes(
        "fnuz-negative-zero-nan",
        (E4M3FNUZ, E5M2FNUZ),
        _signed_zero_code,
        what="-0, and negative numbers that round to zero, become 0x80, the NaN of these formats.",
        sources="sgl-project/sglang#2667",
    ),
    *with_codes(
        "e5m6-tilekernels-subnormal",
        (E5M6,),
        _tile_kernels_encode,
        what="TileKernels' E5M6: below 2^-14 it rounds by bits that are not the ones cut off; the same elsewhere.",
        sources="TileKernels cast_e5m6",
        benign=True,
    ),
    *_decoded(
        "ue8m0-as-float32-exponent",
        (E8M0,),
        _into_float32,
        what="The code is shifted into the exponent of a float32: 0 is read as 0 instead of 2^-127, 255 as infinity instead of NaN.",
    ),
    Bug("fp4-nibble-order", ("pack.e2m1",), NIBBLES, fwd=_high_nibble_first),
    Bug("fp4-nibble-order", ("unpack.e2m1",), "The even index is read from the high nibble.", fwd=_high_nibble_read_first),
    Bug("e5m6-words-backwards", ("pack.e5m6",), "The three words of a group are written last first.", fwd=_words_backwards),
    Bug("e5m6-words-backwards", ("unpack.e5m6",), "The three words of a group are read last first.", fwd=_words_read_backwards),
    Bug("e5m6-little-end-first", ("pack.e5m6",), "The first code is put into the lowest bits of the first word.", fwd=_low_bits_first),
    Bug("e5m6-little-end-first", ("unpack.e5m6",), "The first code is read from the lowest bits.", fwd=_low_bits_read_first),
    Bug(
        "e4m3-overflow-nan",
        _names(E4M3FN),
        "Overflow is NaN, not saturated: what is above 464 (it would round beyond 448), and infinity, becomes NaN instead of 448.",
        "OCP OFP8 1.0 leaves both legal; jax-ml/ml_dtypes#400; NVIDIA/Model-Optimizer#1633; pytorch/pytorch#160488, #154028, #178817",
        attrs={"overflow": "nan"},
        benign=True,
    ),
    Bug(
        "fnuz-overflow-nan",
        _names(E4M3FNUZ, E5M2FNUZ),
        "Overflow is NaN, not saturated.",
        "ml_dtypes; pytorch",
        attrs={"overflow": "nan"},
        benign=True,
    ),
    Bug(
        "overflow-infinity",
        _names(E5M2),
        "Overflow is infinity, not saturated: what rounds beyond the largest number becomes infinity.",
        "OCP OFP8 1.0 leaves both legal",
        attrs={"overflow": "nan"},
        benign=True,
    ),
    Bug(
        "overflow-saturates",
        _names(*(f for f in CASTS if f.bits > 8)),
        "Overflow saturates: what rounds beyond the largest number, and infinity, becomes the largest number.",
        "",
        attrs={"overflow": "saturate"},
        benign=True,
    ),
]
