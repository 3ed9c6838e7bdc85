"""YaRN's frequencies, and rotary position embedding with its backward pass, in 50-digit arithmetic; shares nothing with `ref`.

Equation: with angle[n,i] = positions[n] * f'_i, every pair (a, b) -> amplitude * (a cos - b sin, a sin + b cos).
f'_i = theta^(-2i/r), and with YaRN active f_i/factor * ramp_i + f_i * (1 - ramp_i); neither f' nor the angle is rounded to float64.
Backward: the reverse-mode derivative of L = sum(dy * y) by `tape`; the inverse rotation is not used.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .edges import carrier, choose, fill
from .linear import Arrays, dot, expect, gradients, integers, packed, pull_back, rounded, scalars
from .tape import CTX, ONE, Scalar, Tape, to_float64

YARN: dict[str, Any] = {
    "theta": 10000.0,
    "factor": 1.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "yarn_gating": "always",
    "max_position": 163840,
}
LAYOUTS = ("interleaved", "half")
Rotation = list[tuple[Any, Any]]


@dataclass(frozen=True)
class Yarn:
    """f'_i, the amplitude of the rotation, and what multiplies (dn + r)^-0.5 in MLA's softmax scale."""

    frequencies: list[Any]
    amplitude: Any
    softmax_factor: Any


def _real(value: Any) -> Any:
    return CTX.mpf(float(value))


def check_yarn(at: dict[str, Any], r: int) -> None:
    """The contract's ValueErrors."""
    choose("yarn_gating", at["yarn_gating"], ("always", "beyond_original"))
    if r % 2:
        raise ValueError(f"rope width {r} is odd")
    if at["factor"] < 1:
        raise ValueError(f"factor {at['factor']} < 1")
    if at["theta"] <= 1:
        raise ValueError(f"theta {at['theta']} <= 1")
    if at["beta_fast"] < at["beta_slow"]:
        raise ValueError(f"beta_fast {at['beta_fast']} < beta_slow {at['beta_slow']}")


def correction(beta: float, at: dict[str, Any], r: int) -> Any:
    """corr(beta) = r ln(L0 / (2 pi beta)) / (2 ln theta): the index whose wave turns beta times in L0 positions."""
    turns = _real(at["original_max_position_embeddings"]) / (2 * CTX.pi * _real(beta))
    return r * CTX.log(turns) / (2 * CTX.log(_real(at["theta"])))


def ramp_bounds(at: dict[str, Any], r: int) -> tuple[int, int]:
    """(low, high), before high += 0.001 where they are equal."""
    low, high = int(CTX.floor(correction(at["beta_fast"], at, r))), int(CTX.ceil(correction(at["beta_slow"], at, r)))
    return max(low, 0), min(high, r - 1)


def ramp(at: dict[str, Any], r: int) -> list[Any]:
    """ramp_i = clip((i - low) / (high - low), 0, 1)."""
    low, high = ramp_bounds(at, r)
    width = CTX.mpf(high - low) if high != low else CTX.mpf(1) / 1000
    return [min(max((i - low) / width, CTX.zero), ONE) for i in range(r // 2)]


def yarn(at: dict[str, Any], r: int) -> Yarn:
    """Everything the YaRN attributes stand for, at rope width r."""
    check_yarn(at, r)
    theta, factor = _real(at["theta"]), _real(at["factor"])
    f = [CTX.power(theta, CTX.mpf(-2 * i) / r) for i in range(r // 2)]
    if not (factor > 1 and (at["yarn_gating"] == "always" or at["max_position"] > at["original_max_position_embeddings"])):
        return Yarn(f, ONE, ONE)

    def m(k: Any) -> Any:
        return k * CTX.log(factor) / 10 + 1

    f = [u / factor * w + u * (1 - w) for u, w in zip(f, ramp(at, r), strict=True)]
    mscale, all_dim = _real(at["mscale"]), _real(at["mscale_all_dim"])
    amplitude = m(mscale) / m(all_dim) if mscale and all_dim else m(ONE)
    return Yarn(f, amplitude, m(all_dim) ** 2 if all_dim else ONE)


def rotation(position: int, y: Yarn) -> Rotation:
    """(amplitude * cos, amplitude * sin) of every angle at one position."""
    angles = [position * f for f in y.frequencies]
    return [(y.amplitude * CTX.cos(a), y.amplitude * CTX.sin(a)) for a in angles]


def _places(r: int, layout: str) -> list[tuple[int, int]]:
    """Where the two elements of every pair lie."""
    return [(2 * i, 2 * i + 1) if layout == "interleaved" else (i, i + r // 2) for i in range(r // 2)]


def rotate(x: list[Scalar], turn: Rotation, layout_in: str, layout_out: str) -> list[Scalar]:
    """One head at one position, on mpf or on tape variables."""
    y: list[Scalar] = [None] * len(x)
    for (c, s), (i, j), (k, l) in zip(turn, _places(len(x), layout_in), _places(len(x), layout_out), strict=True):
        y[k], y[l] = dot((x[i], x[j]), (c, -s)), dot((x[i], x[j]), (s, c))
    return y


def frequencies(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """rope.frequencies: -> inv_freq, amplitude. `like` may say in which dtype another returns them: nothing here depends on it."""
    at = fill({"r": 64, **YARN}, attrs)
    if inputs.get("like") is not None:
        carrier(inputs["like"])
        expect(inputs, {"like": ()})
    y = yarn(at, at["r"])
    return {"inv_freq": np.array([to_float64(f) for f in y.frequencies], np.float64), "amplitude": np.array(to_float64(y.amplitude))}


def _rope(inputs: Arrays, attrs: dict[str, Any], tape: Tape | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) as scalars."""
    # cos_sin says where an implementation rounds: nothing here does
    at = fill({"layout_in": "interleaved", "layout_out": "interleaved", "cos_sin": "float32", **YARN}, attrs)
    carrier(inputs["x"])
    layouts = choose("layout_in", at["layout_in"], LAYOUTS), choose("layout_out", at["layout_out"], LAYOUTS)
    x, spectrum = scalars(inputs["x"], tape), yarn(at, inputs["x"].shape[2])
    flat = []
    for heads, position in zip(x, integers(inputs["positions"], "positions"), strict=True):
        turn = rotation(position, spectrum)
        flat += [u for head in heads for u in rotate(head.tolist(), turn, *layouts)]
    return x, packed(flat, x.shape)


def forward(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """rope: x, positions -> y."""
    return {"y": rounded(_rope(inputs, attrs)[1])}


def backward(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """rope backward: x, positions, dy -> dx."""
    tape = Tape()
    x, y = _rope(inputs, attrs, tape)
    pull_back(tape, (y, inputs["dy"]))
    return {"dx": gradients(x)}
