"""Inputs made from a name: a counter-based generator (Philox4x64-10) and exact arithmetic, the same bits on any machine."""

import hashlib
from collections.abc import Callable, Mapping

import numpy as np

from ..ref.cast import decode, encode, round_to
from ..ref.formats import BF16, FORMATS, FP64, Format
from ..ref.mla_cache import cache_append_fwd
from ..ref.op import Case, Op, Tensor
from .precision import Precision

Draw = Callable[..., np.ndarray]


class Source:
    """A stream of random bits that depends on its key alone. Only raw words are taken: their order is guaranteed by NumPy, that of
    its distributions is not."""

    def __init__(self, key: str):
        digest = hashlib.sha256(key.encode()).digest()
        self.philox = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8"))

    def words(self, count: int) -> np.ndarray:
        return np.asarray(self.philox.random_raw(count), dtype=np.uint64)

    def uniform(self, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> np.ndarray:
        unit = (self.words(int(np.prod(shape))) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return (low + (high - low) * unit).reshape(shape)

    def integers(self, shape: tuple[int, ...], low: int, high: int) -> np.ndarray:
        """low to high - 1"""
        return low + (self.words(int(np.prod(shape))) % np.uint64(high - low)).astype(np.int64).reshape(shape)

    def normal(self, shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
        """Twelve 16-bit uniforms, summed and centred, and a 32-bit fraction: variance 1, within ±6, every low bit of float32 in use, no
        logarithm that could differ between machines."""
        count = int(np.prod(shape))
        parts = self.words(3 * count).view(np.uint16).reshape(count, 12).astype(np.int64)
        fraction = (self.words(count) >> np.uint64(32)).astype(np.float64) * 2.0**-32
        total = (parts.sum(axis=1) - 6 * 65535).astype(np.float64) + (fraction - 0.5)
        return (total * 2.0**-16).reshape(shape) * scale


def ulp(fmt: Format, x: np.ndarray) -> np.ndarray:
    """The unit in the last place of |x| in the format, its smallest for zero."""
    _, e = np.frexp(np.where(np.isfinite(x), x, 1.0))
    exponent = np.where(np.equal(x, 0), fmt.emin, np.maximum(e - 1, fmt.emin))  # frexp(0) is (0, 0)
    return np.ldexp(1.0, exponent - fmt.mantissa_bits)


def boundary(source: Source, shape: tuple[int, ...], fmt: Format, io: Format) -> np.ndarray:
    """Every value and midpoint of a narrow format (a sample of them for 16 bits), each with its neighbours in the input's format, both
    signs, and the special values; the rest is drawn wide."""
    (n,) = shape
    codes = np.arange(fmt.max_code + 1)
    if len(codes) > 127:
        codes = np.unique(np.r_[codes[:24], codes[-24:], source.integers((96,), 0, len(codes) - 1)])
    values = decode(fmt, codes.astype(fmt.code_dtype)).astype(np.float64)
    following = decode(fmt, np.minimum(codes + 1, fmt.max_code).astype(fmt.code_dtype)).astype(np.float64)
    middles = (values + following) / 2
    middles[-1] = values[-1] + float(ulp(fmt, values[-1:])[0]) / 2  # where overflow begins
    points = np.concatenate([values, middles])
    points = np.concatenate([points, points + ulp(io, points), points - ulp(io, points)])
    tiny, top = 2.0 ** (io.emin - io.mantissa_bits), min(io.max, 2.0**127)
    specials = np.array([0.0, np.inf, np.nan, tiny, 3 * tiny, top, top / 3, fmt.max * 1.5, fmt.max * 2])
    specials = specials[~np.isnan(specials) | (fmt.nan_code is not None)]
    points = np.concatenate([specials, -specials, points, -points])[:n]
    return np.concatenate([points, wide(source, (n - len(points),), -40, 20)])


def wide(source: Source, shape: tuple[int, ...], low: int, high: int) -> np.ndarray:
    """± (1 + u) 2^j, the exponent j uniform: every magnitude is as likely as the next"""
    sign = 1.0 - 2.0 * source.integers(shape, 0, 2)
    return sign * np.ldexp(1.0 + source.uniform(shape), source.integers(shape, low, high))


def outliers(source: Source, shape: tuple[int, ...], scale: float, factor: float) -> np.ndarray:
    """Normal, with one channel in 64 (one at least) larger by a factor"""
    gain = np.where(source.uniform(shape[-1:]) < 1 / 64, factor, 1.0)
    gain[int(source.integers((), 0, shape[-1]))] = factor
    return source.normal(shape, scale) * gain


def zero_rows(source: Source, shape: tuple[int, ...], scale: float) -> np.ndarray:
    """Normal, every second row zero"""
    x = source.normal(shape, scale)
    x[::2] = 0.0
    return x


def some_infinite(source: Source, shape: tuple[int, ...], scale: float) -> np.ndarray:
    """Normal, a third of the elements +inf or -inf, and all of the last column"""
    kind = source.integers(shape, 0, 6)
    kind[..., -1] = 0
    return np.where(kind == 0, np.inf, np.where(kind == 1, -np.inf, source.normal(shape, scale)))


def nan_tail(source: Source, shape: tuple[int, ...], scale: float, *starts: int) -> np.ndarray:
    """Normal; NaN where every leading index is at its start or beyond: slots that nothing may read"""
    x = source.normal(shape, scale)
    x[tuple(slice(start, None) for start in starts)] = np.nan
    return x


def rows_wide(source: Source, shape: tuple[int, ...], low: int, high: int) -> np.ndarray:
    """Normal rows of very different size; the first is zero, the second far below every clamp"""
    scale = np.ldexp(1.0, source.integers((*shape[:-1], 1), low, high))
    scale[:2] = np.array([0.0, 2.0**-30]).reshape(2, 1)[: len(scale)]
    return source.normal(shape) * scale


def tile_ties(source: Source, shape: tuple[int, ...], tile: int) -> np.ndarray:
    """Each tile's maximum is 448·2^j, so the scale is 2^j, and the other values lie on midpoints of codes"""
    fmt = FORMATS["e4m3fn"]
    n = shape[0]
    codes = source.integers(shape, 0, fmt.max_code)
    value = decode(fmt, codes.astype(np.uint8)).astype(np.float64)
    following = decode(fmt, (codes + 1).astype(np.uint8)).astype(np.float64)
    x = (value + following) / 2 * (1.0 - 2.0 * source.integers(shape, 0, 2))
    x[:, ::tile] = fmt.max
    return x * np.ldexp(1.0, source.integers((n, 1), -6, 6))


def tile_midpoints(source: Source, shape: tuple[int, ...], tile: int) -> np.ndarray:
    """Any scale; values at midpoints of codes times the scale, as float32 has them, moved by -1, 0 or 1 unit in its last place"""
    fmt = FORMATS["e4m3fn"]
    n = shape[0]
    amax = (source.uniform((n, 1), 0.5, 1.0) * np.ldexp(1.0, source.integers((n, 1), -6, 6))).astype(np.float32)
    scale = amax / np.float32(448)
    codes = source.integers(shape, 8, fmt.max_code)
    value, following = (decode(fmt, (codes + i).astype(np.uint8)).astype(np.float64) for i in (0, 1))
    x = ((value + following) / 2 * scale).astype(np.float32).astype(np.float64)
    x = (x + source.integers(shape, -1, 2) * ulp(FORMATS["fp32"], x)) * (1.0 - 2.0 * source.integers(shape, 0, 2))
    x[:, ::tile] = amax
    return x


def tile_edges(source: Source, shape: tuple[int, ...], tile: int) -> np.ndarray:
    """Each row's maximum is 448·2^j, moved by -12 to 11 units in the last place of float32"""
    n = shape[0]
    top = 448.0 * np.ldexp(1.0, source.integers((n, 1), -20, 21))
    steps = (np.arange(n) - n // 2).reshape(n, 1)
    x = source.uniform(shape, -1.0, 1.0) * top * 0.99
    x[:, ::tile] = top * (1.0 + steps * 2.0**-23)
    return x


def ascending(source: Source, shape: tuple[int, ...], *starts: int) -> np.ndarray:
    """Positions: each row counts up from its own start (a sequence that has begun before)"""
    first = np.resize(np.array(starts or (0,)), (*shape[:-1], 1))
    return first + np.arange(shape[-1])


def latent_cache(source: Source, shape: tuple[int, ...], layout: str, page: int, c: int, r: int) -> np.ndarray:
    """Pages full of tokens of very different size, as cache.append stores them"""
    n = shape[0] * page
    size = np.ldexp(1.0, source.integers((n, 1), -3, 4))
    c_kv, k_pe = source.normal((n, c)) * size, source.normal((n, r))
    return cache_append_fwd(np.zeros(shape, np.uint8), c_kv, k_pe, np.arange(n), layout=layout, page_size=page)[0]


def tiled_cache(source: Source, shape: tuple[int, ...], layout: str, page: int, c: int, r: int) -> np.ndarray:
    """As latent_cache, but it is the channels, 64 at a time, that are of very different size: a token's scales differ"""
    n = shape[0] * page
    size = np.ldexp(1.0, source.integers((n, -(-c // 64)), -6, 4)).repeat(64, axis=1)[:, :c]
    c_kv, k_pe = source.normal((n, c)) * size, source.normal((n, r))
    return cache_append_fwd(np.zeros(shape, np.uint8), c_kv, k_pe, np.arange(n), layout=layout, page_size=page)[0]


def stale_cache(source: Source, shape: tuple[int, ...], page: int, c: int, r: int, first: int, start: int) -> np.ndarray:
    """latent_cache of fp8_v32 whose pages from `first` on have every byte set, NaN throughout, in the tokens from `start` on"""
    cache = latent_cache(source, shape, "fp8_v32", page, c, r).reshape(shape[0], page, -1)
    cache[first:, start:] = 255
    return cache.reshape(shape)


def experts(source: Source, shape: tuple[int, ...], count: int) -> np.ndarray:
    """A token's choice: distinct experts of `count`, each row in an order of its own"""
    rows = int(np.prod(shape[:-1]))
    return np.argsort(source.words(rows * count).reshape(rows, count), axis=1)[:, : shape[-1]].reshape(shape)


def gaussian_codes(source: Source, shape: tuple[int, ...], scale: float) -> np.ndarray:
    """E4M3 codes of normal numbers: at scale 100 every binade is met and some saturate"""
    return encode(FORMATS["e4m3fn"], source.normal(shape, scale), overflow="saturate")


def subnormal_codes(source: Source, shape: tuple[int, ...]) -> np.ndarray:
    """E4M3 codes: most subnormal, zeros of both signs, one in 16 of the largest"""
    small = source.integers(shape, 0, 10)
    code = np.where(source.integers(shape, 0, 16) == 0, 0x7E - small, small)
    return code + 128 * source.integers(shape, 0, 2)


INTEGERS: dict[str, Draw] = {
    "ascending": ascending,
    "positions": lambda source, shape, *values: np.resize(np.array(values), shape),
    "integers": Source.integers,
    "latent_cache": latent_cache,
    "tiled_cache": tiled_cache,
    "experts": experts,
    "gaussian_codes": gaussian_codes,
    "positive_codes": lambda source, shape, scale: gaussian_codes(source, shape, scale) & 0x7F,
    "subnormal_codes": subnormal_codes,
    "stale_cache": stale_cache,
    "pages": lambda source, shape, count: np.argsort(source.words(count))[: int(np.prod(shape))].reshape(shape),
}

DRAWS: dict[str, Draw] = {
    "normal": Source.normal,
    "uniform": Source.uniform,
    "const": lambda source, shape, value: np.full(shape, value),
    "scales": lambda source, shape, low, high: np.abs(wide(source, shape, low, high)),
    "steps": lambda source, shape, count, step: source.integers(shape, -count, count + 1) * step,
    "whole": lambda source, shape, low, high: source.integers(shape, low, high).astype(np.float64),
    "values": lambda source, shape, *values: np.resize(np.array(values, dtype=np.float64), shape),
    "wide": wide,
    "some_infinite": some_infinite,
    "nan_tail": nan_tail,
    "outliers": outliers,
    "zero_rows": zero_rows,
    "rows_wide": rows_wide,
    "tile_ties": tile_ties,
    "tile_midpoints": tile_midpoints,
    "tile_edges": tile_edges,
}


def draw(op: Op, tensor: Tensor, spec: tuple, shape: tuple[int, ...], source: Source, precision: Precision) -> np.ndarray:
    """One array in the precision's format, on its carrier."""
    kind, *parameters = spec
    fmt = FORMATS.get(op.name.rsplit(".", 1)[-1], FORMATS["e4m3fn"])
    if kind in INTEGERS:
        return INTEGERS[kind](source, shape, *parameters).astype(fmt.code_dtype if tensor.kind == "code" else np.int64)
    if kind == "words":
        return (source.words(int(np.prod(shape))) >> np.uint64(64 - parameters[0])).astype(f"uint{parameters[0]}").reshape(shape)
    if kind == "codes":
        return (np.arange(int(np.prod(shape))) % 2**fmt.bits).astype(fmt.code_dtype).reshape(shape)
    if kind == "every_bf16":
        values = decode(BF16, np.arange(shape[0]).astype(np.uint16)).astype(np.float64)
    elif kind == "boundary":
        values = boundary(source, shape, fmt, precision.io)
    else:
        values = DRAWS[kind](source, shape, *parameters)
    target = precision.format_of(tensor)
    rounded = round_to(target, np.asarray(values, dtype=np.float64), overflow="nan")
    return np.asarray(rounded, dtype="float64" if target is FP64 else "float32")


def in_float64(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: x.astype(np.float64) if x.dtype.kind == "f" else x for name, x in arrays.items()}


def draw_case(op: Op, case: Case, direction: str, precision: Precision, seed: int = 0) -> dict[str, np.ndarray]:
    """The inputs of a case by name. A decision that the backward needs (chosen experts) is the reference's own, in float64."""
    letters: Mapping[str, int] = {**op.defaults, **case.attrs, **case.dims}
    tensors, _ = op.signature_of(direction, case.draw)
    arrays: dict[str, np.ndarray] = {}
    for tensor in tensors:
        if tensor.name in case.draw:
            source = Source(f"leadline/1 {op.name} {case.name} {tensor.name} {precision.io.name} {seed}")
            arrays[tensor.name] = draw(op, tensor, case.draw[tensor.name], tensor.shape(letters), source, precision)
    if op.choice and direction == "backward":
        exact = in_float64({t.name: arrays[t.name] for t in op.signature_of("forward", arrays)[0]})
        arrays[op.choice[0]] = op.run("forward", exact, case.attrs)[op.choice[0]]
    return arrays
