"""The router's balance losses, token dropping and bias update; shares nothing with `ref`.

Equation: loss = alpha mean_b sum_i f[b,i] P[b,i], P the mean over the sequence of s' (scores, or scores over their sum), f the count of the
slots times e / (k s); over devices instead of experts, f is a mean, or devices / (topk_devices s) a token that reaches it, P a sum.
drop_tokens: of every device's slots the best `capacity` are kept. bias_update: bias + gamma sign(mean load - load), less the signs' mean.
Backward: the reverse-mode derivative of L = dloss * loss, or sum(dweight * weight), by `tape`; what counts slots is constant on it.
"""

import math
from fractions import Fraction
from typing import Any

import numpy as np

from .edges import carrier, choose, fill
from .floats import BINARY64, round_fraction
from .linear import Arrays, dot, expect, gradients, integers, packed, pull_back, rounded, scalars, total
from .tape import CTX, Scalar, Tape, value_of

LOSS: dict[str, Any] = {"alpha": 1e-4, "level": "sequence", "normalise": True, "devices": 8, "topk_devices": 3}
DROP: dict[str, Any] = {"n_routed_experts": 160, "devices": 8, "capacity_factor": 1.0}
BIAS: dict[str, Any] = {"gamma": 1e-3, "centred": False}


def slots(topk_idx: np.ndarray, e: int, lowest: int = -1) -> list[list[int]]:
    """topk_idx[..., k] as a list of rows; ValueError for an index outside lowest..e-1 or an expert twice in a row."""
    k = topk_idx.shape[-1]
    rows = integers(topk_idx.reshape(math.prod(topk_idx.shape[:-1]), k), "topk_idx")
    for n, row in enumerate(rows):
        experts = [i for i in row if i != -1]
        if any(not lowest <= i < e for i in row):
            raise ValueError(f"topk_idx row {n} is {row}: outside {lowest}..{e - 1}")
        if len(set(experts)) < len(experts):
            raise ValueError(f"topk_idx row {n} is {row}: an expert twice")
    return rows


def _blocks(e: int, devices: int) -> int:
    """Experts a device."""
    if devices < 1 or e % devices:
        raise ValueError(f"devices {devices} does not divide the {e} experts")
    return e // devices


def _sequence(scores: list[list[Scalar]], chosen: list[list[int]], at: dict[str, Any]) -> Scalar:
    """sum f P of one sequence, on mpf or on tape variables."""
    s, k, e = len(chosen), len(chosen[0]), len(scores[0])
    if at["normalise"]:
        scores = [[u / whole if value_of(whole) else u * CTX.nan for u in row] for row in scores for whole in [total(row)]]
    p = [total(column) / s for column in zip(*scores, strict=True)]
    f = [Fraction(e * sum(row.count(i) for row in chosen), k * s) for i in range(e)]
    if at["level"] in ("device", "communication"):
        devices, size = at["devices"], e // at["devices"]
        blocks = [range(g * size, (g + 1) * size) for g in range(devices)]
        p = [total([p[i] for i in block]) for block in blocks]
        if at["level"] == "device":
            f = [sum(f[i] for i in block) / size for block in blocks]
        else:
            f = [Fraction(devices * sum(any(i in block for i in row) for row in chosen), at["topk_devices"] * s) for block in blocks]
    return dot(p, [CTX.mpf(v.numerator) / v.denominator for v in f])


def _loss(inputs: Arrays, attrs: dict[str, Any], tape: Tape | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(scores, loss) as scalars."""
    at, (b, s, e), k = fill(LOSS, attrs), inputs["scores"].shape, inputs["topk_idx"].shape[-1]
    carrier(inputs["scores"])
    choose("level", at["level"], ("sequence", "expert", "device", "communication"))
    expect(inputs, {"topk_idx": (b, s, k), "dloss": ()})
    if b * s == 0 or k == 0:
        raise ValueError(f"a balance loss of {b} x {s} tokens with {k} slots")
    if at["level"] in ("device", "communication"):
        _blocks(e, at["devices"])
    if at["level"] == "communication" and not 1 <= at["topk_devices"] <= at["devices"]:
        raise ValueError(f"topk_devices {at['topk_devices']} outside 1..{at['devices']}")
    chosen, scores = slots(inputs["topk_idx"], e), scalars(inputs["scores"], tape)
    sequences = [_sequence(rows, chosen[n * s : (n + 1) * s], at) for n, rows in enumerate(scores.tolist())]
    return scores, packed([total(sequences) * (CTX.mpf(float(at["alpha"])) / b)], ())


def loss(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """router.balance_loss: scores, topk_idx -> loss."""
    return {"loss": rounded(_loss(inputs, attrs)[1])}


def loss_backward(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """router.balance_loss backward: scores, topk_idx, dloss -> dscores."""
    tape = Tape()
    scores, value = _loss(inputs, attrs, tape)
    pull_back(tape, (value, inputs["dloss"]))
    return {"dscores": gradients(scores)}


def _kept(inputs: Arrays, attrs: dict[str, Any]) -> list[list[bool]]:
    """Which slots are kept. The capacity is the floor of the real product, capacity_factor being the decimal that it is written as."""
    at, (n, k) = fill(DROP, attrs), inputs["topk_idx"].shape
    carrier(inputs["topk_weight"])
    expect(inputs, {"topk_weight": (n, k), "dweight": (n, k), "exempt": (n,)})
    size, factor = _blocks(at["n_routed_experts"], at["devices"]), at["capacity_factor"]
    if not 0 < factor < math.inf:
        raise ValueError(f"capacity_factor {factor} is not a finite number above 0")
    capacity = math.floor(Fraction(repr(float(factor))) * n * k / at["devices"])
    if n and capacity < 1:
        raise ValueError(f"capacity_factor {factor} leaves no slot a device")
    rows, affinity = slots(inputs["topk_idx"], at["n_routed_experts"], lowest=0), inputs["topk_weight"].tolist()
    exempt = [False] * n if inputs.get("exempt") is None else [v != 0 for v in integers(inputs["exempt"], "exempt")]
    kept = [[exempt[i]] * k for i in range(n)]
    for device in range(at["devices"]):
        here = [(i, j) for i in range(n) for j in range(k) if rows[i][j] // size == device]
        here.sort(key=lambda slot: (not exempt[slot[0]], -affinity[slot[0]][slot[1]], slot))
        for i, j in here[:capacity]:
            kept[i][j] = True
    return kept


def drop(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """router.drop_tokens: topk_idx, topk_weight, exempt? -> keep, weight."""
    shape, kept = inputs["topk_idx"].shape, _kept(inputs, attrs)
    rows = zip(kept, inputs["topk_weight"].tolist(), strict=True)
    weight = [w * keep for flags, row in rows for keep, w in zip(flags, row, strict=True)]
    return {"keep": np.array(kept, np.int64).reshape(shape), "weight": np.array(weight, np.float64).reshape(shape)}


def drop_backward(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """router.drop_tokens backward: topk_idx, topk_weight, exempt?, dweight -> dtopk_weight."""
    tape = Tape()
    given = scalars(inputs["topk_weight"], tape)
    flags = [keep for row in _kept(inputs, attrs) for keep in row]
    weight = [u if keep else CTX.zero for keep, u in zip(flags, given.ravel().tolist(), strict=True)]
    pull_back(tape, (packed(weight, given.shape), inputs["dweight"]))
    return {"dtopk_weight": gradients(given)}


def bias_update(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """router.bias_update: bias, counts -> bias_out; rounded once from the exact sum."""
    at, bias, counts = fill(BIAS, attrs), inputs["bias"].tolist(), integers(inputs["counts"], "counts")
    carrier(inputs["bias"])
    expect(inputs, {"counts": inputs["bias"].shape})
    if not at["gamma"] >= 0:
        raise ValueError(f"gamma {at['gamma']} < 0")
    if min(counts, default=0) < 0:
        raise ValueError(f"counts hold {min(counts)}")
    e, load = len(counts), sum(counts)
    signs = [(load > e * c) - (load < e * c) for c in counts]
    centre = Fraction(sum(signs), e) if at["centred"] and e else Fraction(0)
    steps = [Fraction(at["gamma"]) * (sign - centre) for sign in signs]
    out = [round_fraction(Fraction(b) + step, BINARY64) if math.isfinite(b) else b for b, step in zip(bias, steps, strict=True)]
    return {"bias_out": np.array(out, np.float64)}
