"""Our accumulator models as subjects of the probe, and whether a subject is one of them bit for bit."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..ref.cast import decode, encode
from ..ref.formats import E4M3FN
from ..ref.fp8_accumulate import Accumulator, accumulator_named, exponents, truncated_sum
from .probe import Finding, Subject

NAMES = ("wgmma13", "mma25", "fp32", "exact")


def simulated(how: str | Accumulator) -> Subject:
    """A model of ref/fp8_accumulate.py by name (wgmma13, mma25, bits:F), or any of its form; "fp32" adds in order, "exact" rounds once."""
    model = accumulator_named("probe accumulator", how) if isinstance(how, str) else how

    def subject(a_codes: NDArray[np.uint8], b_codes: NDArray[np.uint8], c: NDArray[np.float32]) -> NDArray[np.float32]:
        a, b = (np.asarray(decode(E4M3FN, codes), np.float64) for codes in (a_codes, b_codes))
        if model is None and how == "fp32":
            sums = np.asarray(c, np.float32)
            for product in (a * b).astype(np.float32).T:  # exact
                sums = sums + product
            return sums
        if model is None:
            return (np.asarray(c, np.float64) + (a * b).sum(axis=1)).astype(np.float32)
        e = exponents(a, E4M3FN.emin) + exponents(b, E4M3FN.emin)
        sums = np.asarray(c, np.float64)[:, None]
        for k in range(0, a.shape[1], model.group):
            part = slice(k, k + model.group)
            top = np.maximum(e[:, None, part].max(axis=2), exponents(sums, -126))
            sums = truncated_sum((a * b)[:, None, part], sums, top, model)
        return sums[:, 0].astype(np.float32)

    return subject


@dataclass(frozen=True)
class Match:
    """How often a model gave the subject's bits."""

    name: str
    equal: int
    of: int
    first: str  # the first difference

    @property
    def everywhere(self) -> bool:
        return self.equal == self.of


def candidates(finding: Finding) -> dict[str, Subject]:
    """The models by name, and the one that the finding describes where none of them has its numbers"""
    names = [*NAMES, *([f"bits:{finding.fraction}"] if finding.fraction and finding.fraction <= 30 else [])]
    models = {name: simulated(name) for name in names}
    own, known = finding.accumulator, [accumulator_named("probe accumulator", name) for name in names]
    if own is not None and own not in known:
        models[f"{own.fraction} bits, {own.kept} kept, groups of {own.group}"] = simulated(own)
    return models


def draws(rng: np.random.Generator, m: int, k: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float32]]:
    """Sums to compare on: Gaussian, any codes, all positive, subnormals and large numbers, near-cancelling pairs, sparse; c of any size."""
    a, b = (rng.integers(0, 256, (m, k)).astype(np.uint8) for _ in range(2))
    kind = np.arange(m)[:, None] % 6
    for codes in (a, b):
        gaussian = np.asarray(encode(E4M3FN, rng.normal(0, 60, (m, k)).astype(np.float32), overflow="saturate"))
        small = rng.integers(0, 12, (m, k)).astype(np.uint8) | (rng.integers(0, 2, (m, k)) << 7).astype(np.uint8)
        mixed = np.where(rng.random((m, k)) < 0.1, codes, small)
        codes[...] = np.select([kind == 0, kind == 2, kind == 3], [gaussian, gaussian & 0x7F, mixed], codes)
    half = k // 2
    swap = kind == 4  # the second half cancels the first, but for a unit of a mantissa here and there
    nudged = a[:, :half] ^ (rng.random((m, half)) < 0.2).astype(np.uint8)
    a[:, half : 2 * half] = np.where(swap, nudged ^ 0x80, a[:, half : 2 * half])
    b[:, half : 2 * half] = np.where(swap, b[:, :half], b[:, half : 2 * half])
    a[(kind == 5) & (rng.random((m, k)) < 0.8)] = 0
    for codes in (a, b):
        codes[(codes & 0x7F) == 0x7F] = 0x38  # no NaN
    c = (np.rint(rng.normal(0, 1, m) * 2.0 ** rng.integers(6, 48, m)) * 2.0**-30).astype(np.float32)  # so that float64 holds every sum
    return a, b, np.where(rng.random(m) < 0.25, np.float32(0), c)


def match(subject: Subject, finding: Finding, tiles: int, seed: int = 0) -> list[Match]:
    """Each model against the subject on `tiles` sums; the best first"""
    models = candidates(finding)
    equal, first = dict.fromkeys(models, 0), dict.fromkeys(models, "")
    for rng, m in _batches(tiles, seed):
        a, b, c = draws(rng, m, finding.k)
        got = np.asarray(subject(a, b, c), np.float32)
        for name, model in models.items():
            wanted = model(a, b, c)
            same = got.view(np.uint32) == wanted.view(np.uint32)
            equal[name] += int(same.sum())
            if not same.all() and not first[name]:
                i = int(np.argmin(same))
                first[name] = f"{float(got[i])!r} where the model has {float(wanted[i])!r}"
    return sorted((Match(name, equal[name], tiles, first[name]) for name in models), key=lambda r: -r.equal)


def _batches(tiles: int, seed: int, size: int = 1 << 14) -> Iterator[tuple[np.random.Generator, int]]:
    for i, start in enumerate(range(0, tiles, size)):
        yield np.random.Generator(np.random.Philox(key=(seed, i))), min(size, tiles - start)
