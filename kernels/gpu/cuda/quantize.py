"""Launchers of cast.cu, quantize_tile.cu and quantize_panel.cu: float32 arrays, or bfloat16 as its bits in uint16."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from ....ref.formats import CASTS, FORMATS, Format
from ....ref.fp8_recipes import RECIPES, Recipe
from .launch import Launch, aligned, checked, fits, need, runner, taken

ROUNDINGS = ("half-even", "half-away", "half-zero", "zero", "stochastic")
SCALES, POWERS, VALUES = ("a/M", "a*(1/M)", "1/(M/a)"), ("no", "log2", "bits"), ("x/s", "x*(1/s)", "x*(M/a)")
INPUTS = {np.dtype(np.float32): "float", np.dtype(np.uint16): "u16"}
TILES, THREADS, LIMIT = (32, 64, 128), 256, 2**31 - 2**12


def code_type(fmt: Format) -> tuple[str, Any]:
    """The type of a format's codes in a kernel, and in an array"""
    return {"uint8": ("u8", np.uint8), "uint16": ("u16", np.uint16), "uint32": ("u32", np.uint32)}[fmt.code_dtype]


def recipe_arguments(recipe: Recipe) -> tuple[Any, ...]:
    """The five numbers that the kernels take a recipe as"""
    rules = SCALES.index(recipe.scale), POWERS.index(recipe.power_of_two), VALUES.index(recipe.value)
    return (np.float32(recipe.amax_min), np.float32(recipe.scale_min), *(np.int32(rule) for rule in rules))


def quantize(kernel: str, name: str, x: Any, recipe: str, tile: int, per_row: bool, per_column: bool, format: str, rounding: str) -> Any:
    """(codes, scale) of x in tiles of 1×tile (per_row), tile×1 (per_column) or tile×tile."""
    need(recipe in RECIPES, kernel, "recipe", repr(recipe), f"one of {', '.join(RECIPES)}")
    need(
        format in FORMATS and FORMATS[format].bits <= 12 and format != "e8m0",
        kernel,
        "format",
        repr(format),
        "a format of FP8, FP4 or e5m6",
    )
    need(rounding in ("half-even", "half-zero"), kernel, "rounding", repr(rounding), "half-even or half-zero")
    fits(tile in TILES, kernel, "tile", tile, "32, 64 or 128, the sizes that are compiled")
    x = taken(kernel, name, x, tuple(INPUTS), 2)
    (n, d), fmt, on = x.shape, FORMATS[format], runner()
    fits(n * d <= LIMIT * 64, kernel, name, f"of {n * d} numbers", f"at most {LIMIT * 64}")
    code, dtype = code_type(fmt)
    down, across = (1, tile) if per_row else (tile, 1 if per_column else tile)
    codes, scale, found = on.empty((n, d), dtype), on.empty((-(-n // down), -(-d // across)), np.float32), on.zeros((1,), np.int32)
    if n * d == 0:
        return codes, scale
    source = INPUTS[np.dtype(x.dtype)]
    defines = (("INPUT", source), ("CODE", code), ("FORMAT", format.upper()), ("TILE", tile))
    width = 16 // x.dtype.itemsize if per_row else 4
    whole = d % width == 0 and aligned(x, codes)
    args = (x, codes, scale, found, np.int32(n), np.int32(d), np.int32(whole), np.int32(ROUNDINGS.index(rounding)))
    args += recipe_arguments(RECIPES[recipe])
    if per_row:
        blocks = -(-(scale.shape[0] * scale.shape[1] * (tile // width)) // THREADS)
        fits(blocks < 2**31, kernel, name, f"of {n} rows", "fewer tiles")
        on.launch(Launch("quantize_tile", "quantize_tile", defines, (blocks,), THREADS, args))
    else:
        fits(-(-n // tile) <= 65535, kernel, name, f"of {n} rows", f"at most {65535 * tile}")
        grid = (-(-d // 128), -(-n // tile))
        on.launch(Launch("quantize_panel", "quantize_panel", (*defines, ("PER_COLUMN", int(per_column))), grid, THREADS, args))
    if checked() and int(found[0]):
        i, j = (int(v[0]) for v in (numbers(x) != numbers(x)).nonzero())
        raise ValueError(f"{kernel}: {name}[{i}, {j}] is NaN; expected no NaN")
    if checked() and fmt.nan_code is None:
        refuse_nan(kernel, name, numbers(x), codes, scale, down, across, format)
    return codes, scale


def numbers(x: Any) -> Any:
    """The values of bfloat16 bits; float32 as it is"""
    return x if x.dtype == np.float32 else (x.astype(np.uint32) << 16).view(np.float32)


def refuse_nan(kernel: str, name: str, x: Any, codes: Any, scale: Any, down: int, across: int, format: str) -> None:
    """inf/inf and 0/0 are NaN, which this format has none of."""
    if bool(((scale > 0) & (abs(scale) < np.inf)).all()):
        return
    own = scale.repeat(down, axis=0)[: x.shape[0]].repeat(across, axis=1)[:, : x.shape[1]]
    lost = ((abs(own) == np.inf) & (abs(x) == np.inf)) | ((own == 0) & (x == 0))
    if bool(lost.any()):
        i, j = (int(v[0]) for v in lost.nonzero())
        raise ValueError(f"{kernel}: {name}[{i}, {j}] = {float(x[i, j])} by the scale {float(own[i, j])} gives NaN; {format} has none")


def quantize_tile(
    x: Any, *, recipe: str = "v3", tile: int = 128, axis: int = 1, format: str = "e4m3fn", rounding: str = "half-even"
) -> tuple[Any, Any]:
    """codes[n,d] = encode(x / scale), a scale for each tile of 1×tile (axis=1) or tile×1 (axis=0, Wgrad's form)

    ValueError: a NaN, another dtype than float32 or uint16, a tile that is not compiled (32, 64, 128).
    """
    need(axis in (0, 1), "quantize_tile", "axis", axis, "0 or 1")
    return quantize("quantize_tile", "x", x, recipe, tile, axis == 1, axis == 0, format, rounding)


def quantize_block(w: Any, *, recipe: str = "v3", block: int = 128, format: str = "e4m3fn", rounding: str = "half-even") -> tuple[Any, Any]:
    """codes[o,d] = encode(w / scale[o//block, d//block]); blocks of 128×128, 64×64 or 32×32"""
    return quantize("quantize_block", "w", w, recipe, block, False, False, format, rounding)


def _cast_arguments(
    name: str, fmt: Format, x: Any, random: Any, overflow: str | None, rounding: str
) -> tuple[Any, Any, tuple[Any, ...], tuple[tuple[str, str | int], ...]]:
    overflow = overflow or ("saturate" if fmt.bits <= 8 else "nan")
    need(overflow in ("saturate", "nan"), name, "overflow", repr(overflow), "saturate or nan")
    need(rounding in ROUNDINGS, name, "rounding", repr(rounding), f"one of {', '.join(ROUNDINGS)}")
    need(
        (rounding == "stochastic") == (random is not None), name, "random", random is not None and "given", "one with stochastic, else none"
    )
    need(fmt.nan_code is not None or overflow == "saturate", name, "overflow", repr(overflow), f"saturate; {fmt.name} has no NaN")
    x = taken(name, "x", x, (np.float32,), 1)
    fits(x.shape[0] <= LIMIT, name, "x", f"of {x.shape[0]} numbers", f"at most {LIMIT}")
    if random is not None:
        random = taken(name, "random", random, (np.float32,), 1)
        need(random.shape == x.shape, name, "random", f"of shape {random.shape}", f"{x.shape}, that of x")
        need(not checked() or bool(((random >= 0) & (random < 1)).all()), name, "random", "outside [0, 1)", "uniform random numbers")
    if checked() and fmt.nan_code is None and bool((x != x).any()):
        raise ValueError(f"{name}: x[{int((x != x).nonzero()[0][0])}] is NaN; {fmt.name} has none")
    settings = (np.int32(x.shape[0]), np.int32(aligned(x)), np.int32(overflow == "saturate"), np.int32(ROUNDINGS.index(rounding)))
    return x, random, settings, (("FORMAT", fmt.name.upper()), ("CODE", code_type(fmt)[0]))


def _cast(fmt: Format) -> Callable[..., Any]:
    def cast(x: Any, random: Any = None, *, overflow: str | None = None, rounding: str = "half-even") -> Any:
        x, random, settings, defines = _cast_arguments(f"cast.{fmt.name}", fmt, x, random, overflow, rounding)
        y = runner().empty(x.shape, np.float32)
        if x.shape[0]:
            grid = (-(-x.shape[0] // (4 * THREADS)),)
            runner().launch(Launch("cast", "cast_values", defines, grid, THREADS, (x, random, y, *settings)))
        return y

    cast.__doc__ = f"y[n] = the value of {fmt.name} nearest to x[n]; attributes as in the reference"
    return cast


def _encode(fmt: Format) -> Callable[..., Any]:
    def encode(x: Any, random: Any = None, *, overflow: str | None = None, rounding: str = "half-even") -> Any:
        x, random, settings, defines = _cast_arguments(f"encode.{fmt.name}", fmt, x, random, overflow, rounding)
        codes = runner().empty(x.shape, code_type(fmt)[1])
        if x.shape[0]:
            grid = (-(-x.shape[0] // (4 * THREADS)),)
            runner().launch(Launch("cast", "encode_values", defines, grid, THREADS, (x, random, codes, *settings)))
        return codes

    encode.__doc__ = f"codes[n] = the bit pattern of {fmt.name} nearest to x[n]; attributes as in the reference"
    return encode


def _decode(fmt: Format) -> Callable[..., Any]:
    def decode(codes: Any) -> Any:
        name = f"decode.{fmt.name}"
        code, dtype = code_type(fmt)
        codes = taken(name, "codes", codes, (dtype,), 1)
        n = codes.shape[0]
        fits(n <= LIMIT, name, "codes", f"{n} codes", f"at most {LIMIT}")
        if checked() and fmt.bits % 8 and bool((codes >= 2**fmt.bits).any()):
            raise ValueError(f"{name}: codes reach {int(codes.max())}; expected {fmt.bits} bits, below {2**fmt.bits}")
        x = runner().empty((n,), np.float32)
        if n:
            defines = (("FORMAT", fmt.name.upper()), ("CODE", code))
            args = (codes, x, np.int32(n), np.int32(aligned(codes, x)))
            runner().launch(Launch("cast", "decode_codes", defines, (-(-n // (4 * THREADS)),), THREADS, args))
        return x

    decode.__doc__ = f"x[n] = the value of each {fmt.bits}-bit pattern of {fmt.name}, in float32"
    return decode


cast = SimpleNamespace(**{fmt.name: _cast(fmt) for fmt in CASTS})
encode = SimpleNamespace(**{fmt.name: _encode(fmt) for fmt in CASTS if fmt.bits <= 16})
decode = SimpleNamespace(**{fmt.name: _decode(fmt) for fmt in CASTS if fmt.bits <= 16})
