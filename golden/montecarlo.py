"""Monte-Carlo arithmetic: arrays whose every operation rounds at random to a claimed precision.

Run the reference's own text on them a few times and the outputs scatter as those of correct implementations do, whatever their order of
operations. Values are carried in float64. The noise of an operation, in units of the last place of the precision's working format:

    + - ×                  rounded to one of the two neighbours, the nearer more often (no noise where the result is representable)
    ÷ √                    the same after ± 1/2 unit more (fast division, approximate reciprocals)
    exp log and the like   the same after ± 2 units more (approximate hardware functions); exp also ± 0.6|x| units of float32
    Σ and matrix products  a float32 accumulation of n terms in unknown order. Adding one by one in a random order, the partial sums S_j
                           have Σ_j E[S_j²] = (n+1)(Q/6 + S²/3), with S the sum and Q the sum of the squares; each addition errs by
                           |S_j| u/√3 rms (u half a unit, relative), so the total has the deviation u √((n+1)(Q/6 + S²/3) / 3)
    max, sort, |x|, -x     exact
"""

import copy
import functools
from dataclasses import replace
from typing import Any

import numpy as np

from ..ref.formats import FP32, FP64, Format
from .precision import Precision

ROUNDED = {np.divide: 0.5, np.true_divide: 0.5, np.sqrt: 0.5, np.reciprocal: 0.5, np.add: 0.0, np.subtract: 0.0, np.multiply: 0.0}
EXTRA_UNITS = 2.0  # of every other function that is not exact
ARGUMENT_UNITS = 0.6  # of exp, for each unit of its argument: 2^(x·log2 e) with the product rounded to float32 (__expf, Triton's tl.exp)
LEAST = 104.0  # exp(-104) is 0 in float32
EXACT = {
    *(np.negative, np.positive, np.absolute, np.fabs, np.sign, np.copysign, np.maximum, np.minimum, np.fmax, np.fmin),
    *(np.floor, np.ceil, np.rint, np.trunc, np.ldexp, np.spacing, np.nextafter, np.clip),
}


@functools.cache
def kernel() -> Any:
    """Numba's, when noise is first made: importing it takes longer than all the rest."""
    from ..kernels.cpu import noise

    return noise


class Noise:
    """A precision and a stream of random numbers; `amplify` makes every error larger (to find decisions that rounding can turn)."""

    def __init__(self, precision: Precision, seed: int, amplify: float = 1.0):
        self.precision = precision
        self.amplify = amplify
        self.seed = seed
        self.rng = np.random.Generator(np.random.Philox(key=seed))

    def key(self) -> int:
        return self.rng.bit_generator.random_raw()

    def again(self) -> "Noise":
        """Random numbers that are the same each time, but no others': the operations that follow round as they did before."""
        same = copy.copy(self)
        same.rng = np.random.Generator(np.random.Philox(key=[self.seed, 1]))
        return same

    def widened(self) -> "Noise":
        """The same stream of random numbers, with operations that round to the accumulation's format."""
        wide = copy.copy(self)
        wide.precision = replace(self.precision, work=self.precision.accumulate)
        return wide

    def rounded(self, x: np.ndarray, extra: Any = 0.0, fmt: Format | None = None) -> np.ndarray:
        """x at one of its neighbours in the format, at random, the mean being x."""
        fmt = fmt or self.precision.work
        if fmt is FP64:
            extra = extra + 1.0  # the carrier has already rounded: x lies on the grid
        if self.amplify > 1.0:
            extra = (extra + 0.5) * self.amplify
        some = extra.any() if isinstance(extra, np.ndarray) else extra
        extra, first = (extra, self.key()) if some else (0.0, 0)
        return kernel().rounded(x, self.key(), fmt.emin, fmt.mantissa_bits, extra, first)  # 0/n, √0 and 0·x are exact everywhere

    def scattered(self, total: np.ndarray, squares: np.ndarray, n: int, half: float) -> np.ndarray:
        """Sums with their noise, which is a function of the value: equal sums err alike, as in a real kernel."""
        return kernel().scattered(total, squares, n, half, self.key(), self.key())

    def accumulated(self, total: np.ndarray, squares: np.ndarray, n: int) -> np.ndarray:
        """A sum of n terms, added up in unknown order."""
        if n > 1:
            half = self.amplify * 2.0 ** -(self.precision.accumulate.mantissa_bits + 1)
            total = self.scattered(total, squares, n, half)
        return self.rounded(total)


class NoisyArray(np.ndarray):
    """A float64 array with a Noise; every ufunc on it errs as the precision would."""

    noise: Noise | None = None

    def __array_finalize__(self, obj: Any) -> None:
        self.noise = getattr(obj, "noise", None)

    def __stored__(self, any_unit: bool = False) -> "NoisyArray":
        """With any_unit each row is rounded in a unit between 1 and 2, at random."""
        return self if self.noise is None else self._rounded(self.noise.precision.io, any_unit)

    def __rescaled__(self) -> "NoisyArray":
        return self if self.noise is None else self._rounded(self.noise.precision.accumulate, True)

    def _rounded(self, fmt: Format, any_unit: bool) -> "NoisyArray":
        noise, x = self.noise, np.asarray(self)
        assert noise is not None
        unit = np.exp2(noise.rng.random((*x.shape[:-1], 1))) if any_unit else 1.0
        return _noisy(noise.rounded(x * unit, fmt=fmt) / unit, noise)

    def __wide__(self) -> "NoisyArray":
        return self if self.noise is None else _noisy(self, self.noise.widened())

    def __once__(self) -> "NoisyArray":
        noise = self.noise
        return self if noise is None or noise.precision.work is noise.precision.accumulate else _noisy(self, noise.again())

    def __exactly__(self) -> np.ndarray:
        return np.asarray(self)

    def __constant__(self, values: np.ndarray) -> "NoisyArray":
        """Numbers beside this array, in the float32 arithmetic that positions and frequencies have even in 16-bit models."""
        noise = self.noise
        assert noise is not None
        wide = noise.widened()
        return _noisy(wide.rounded(np.asarray(values, dtype=np.float64)), wide)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = None, **keywords: Any) -> Any:
        noise = self.noise or next(i.noise for i in (*inputs, *(out or ())) if isinstance(i, NoisyArray) and i.noise is not None)
        plain = [np.asarray(i) if isinstance(i, NoisyArray) else i for i in inputs]
        if isinstance(keywords.get("where"), NoisyArray):
            keywords["where"] = np.asarray(keywords["where"])
        result: Any = getattr(ufunc, method)(*plain, **keywords)
        if not isinstance(result, (np.ndarray, np.floating)) or result.dtype.kind != "f":
            return result
        result = np.asarray(result)
        if ufunc is np.matmul or ufunc is np.vecdot:
            squares = np.asarray(ufunc(plain[0] * plain[0], plain[1] * plain[1], **keywords))
            result = noise.accumulated(result, squares, plain[0].shape[-1])
        elif ufunc is np.add and method == "reduce":
            squares = np.asarray(np.add.reduce(plain[0] * plain[0], **keywords))
            result = noise.accumulated(result, squares, plain[0].size // max(np.size(result), 1))
        elif ufunc not in EXACT:
            extra: Any = ROUNDED.get(ufunc, EXTRA_UNITS)
            if ufunc is np.exp and noise.precision.accumulate is FP32:
                extra = extra + ARGUMENT_UNITS * np.minimum(np.abs(plain[0]), LEAST) * 2.0 ** (noise.precision.work.mantissa_bits - 23)
            result = noise.rounded(result, extra)
        if out is not None:
            out[0][...] = result
            return out[0]
        return _noisy(result, noise)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        result = super().__array_function__(func, types, args, kwargs)
        noise = self.noise or next((a.noise for a in args if isinstance(a, NoisyArray)), None)
        rewrap = isinstance(result, np.ndarray) and not isinstance(result, NoisyArray) and result.dtype.kind == "f"
        return _noisy(result, noise) if rewrap and noise is not None else result


def _noisy(x: np.ndarray, noise: Noise) -> NoisyArray:
    y = np.asarray(x, dtype=np.float64).view(NoisyArray)
    y.noise = noise
    return y


def noisy_inputs(inputs: dict[str, np.ndarray], noise: Noise) -> dict[str, np.ndarray]:
    """The same values with noise; integers and codes stay as they are."""
    return {name: _noisy(x.astype(np.float64), noise) if x.dtype.kind == "f" else x for name, x in inputs.items()}
