"""Small codes packed into whole words: two E2M1 a byte, eight E5M6 in three 32-bit words. Spec §4.3, §4.5."""

from .fp8_recipes import check_codes
from .op import Case, Op, declare, signature
from .xp import Array, xp_of


@signature("codes[n,d]:code -> packed[n,d/2]:code")
def pack_e2m1_fwd(codes: Array) -> tuple[Array, tuple]:
    """packed[n,i] = codes[n,2i] + 16 codes[n,2i+1]: the low nibble is the even index

    codes are uint8 below 16, d even.
    """
    xp = xp_of(codes)
    _check("pack.e2m1", codes, "e2m1", 2)
    wide = xp.astype(codes, xp.int64)
    return xp.astype(wide[:, 0::2] + 16 * wide[:, 1::2], xp.uint8), ()


@signature("packed[n,b]:code -> codes[n,d]:code")
def unpack_e2m1_fwd(packed: Array) -> tuple[Array, tuple]:
    """codes[n,2i] = packed[n,i] mod 16,   codes[n,2i+1] = packed[n,i] div 16: [n,2b]"""
    xp, (n, b) = xp_of(packed), packed.shape
    _of_dtype("unpack.e2m1", packed, "uint8")
    wide = xp.astype(packed, xp.int64)
    return xp.astype(xp.reshape(xp.stack([wide % 16, wide // 16], axis=2), (n, 2 * b)), xp.uint8), ()


@signature("codes[n,d]:code -> packed[n,b]:code")
def pack_e5m6_fwd(codes: Array) -> tuple[Array, tuple]:
    """The bits of eight codes one after the other, the first highest, are three uint32, the first highest: b = 3d/8

    codes are uint16 below 4096, d a multiple of 8.
    """
    xp, (n, d) = xp_of(codes), codes.shape
    _check("pack.e5m6", codes, "e5m6", 8)
    c = xp.reshape(xp.astype(codes, xp.int64), (n, d // 8, 8))
    words = [
        c[:, :, 0] * 2**20 + c[:, :, 1] * 2**8 + c[:, :, 2] // 2**4,
        c[:, :, 2] % 2**4 * 2**28 + c[:, :, 3] * 2**16 + c[:, :, 4] * 2**4 + c[:, :, 5] // 2**8,
        c[:, :, 5] % 2**8 * 2**24 + c[:, :, 6] * 2**12 + c[:, :, 7],
    ]
    return xp.astype(xp.reshape(xp.stack(words, axis=2), (n, d // 8 * 3)), xp.uint32), ()


@signature("packed[n,b]:code -> codes[n,d]:code")
def unpack_e5m6_fwd(packed: Array) -> tuple[Array, tuple]:
    """The inverse of pack.e5m6: d = 8b/3, b a multiple of 3"""
    xp, (n, b) = xp_of(packed), packed.shape
    _of_dtype("unpack.e5m6", packed, "uint32")
    if b % 3:
        raise ValueError(f"unpack.e5m6: packed has {b} words a row; expected a multiple of 3")
    w = xp.reshape(xp.astype(packed, xp.int64), (n, b // 3, 3))
    u, v, t = w[:, :, 0], w[:, :, 1], w[:, :, 2]
    codes = [
        u // 2**20,
        u // 2**8 % 2**12,
        u % 2**8 * 2**4 + v // 2**28,
        v // 2**16 % 2**12,
        v // 2**4 % 2**12,
        v % 2**4 * 2**8 + t // 2**24,
        t // 2**12 % 2**12,
        t % 2**12,
    ]
    return xp.astype(xp.reshape(xp.stack(codes, axis=2), (n, b // 3 * 8)), xp.uint16), ()


def _of_dtype(op: str, packed: Array, dtype: str) -> None:
    if packed.dtype != getattr(xp_of(packed), dtype):
        raise ValueError(f"{op}: packed is {packed.dtype}; expected {dtype}")


def _check(op: str, codes: Array, format: str, multiple: int) -> None:
    d = codes.shape[1]
    check_codes(op, "codes", codes, format)
    if d % multiple:
        raise ValueError(f"{op}: codes has shape {tuple(codes.shape)}; expected d a multiple of {multiple}")


def _declare() -> None:
    source = "spec §4.5; DeepSeek-V4 expert weights"
    codes = Case("every", {"n": 3, "d": 32}, {"codes": ("codes",)})
    declare(Op("pack.e2m1", pack_e2m1_fwd, None, (codes, Case("one", {"n": 1, "d": 2}, {"codes": ("codes",)})), "d*n", source))
    every = Case("every", {"n": 2, "b": 256, "d": 512}, {"packed": ("words", 8)})
    declare(Op("unpack.e2m1", unpack_e2m1_fwd, None, (every,), "b*n", source))
    source = "spec §4.3; TileKernels cast_e5m6"
    codes = Case("every", {"n": 2, "d": 4096, "b": 1536}, {"codes": ("codes",)})
    declare(Op("pack.e5m6", pack_e5m6_fwd, None, (codes, Case("one", {"n": 1, "d": 8, "b": 3}, {"codes": ("codes",)})), "d*n", source))
    words = Case("random", {"n": 5, "b": 96, "d": 256}, {"packed": ("words", 32)})
    declare(Op("unpack.e5m6", unpack_e5m6_fwd, None, (words,), "b*n", source))


_declare()
