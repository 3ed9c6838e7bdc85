"""Properties of a correct implementation that need no vectors: how its output must change when its input is changed in a known way."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..ref.formats import FORMATS
from ..ref.op import Op
from .band import DEVIATIONS, SLACK, Arrays, Band
from .metamorphic import (
    Ask,
    Inapplicable,
    Property,
    PropertyError,
    band,
    changed,
    compare,
    in_order,
    inputs_of,
    outputs_of,
)
from .strategies import Drawn

# One token's outputs depend on the others (capacity, a sort, a packed layout), or an input has tokens in an axis of another letter.
COUPLED = {"attention.varlen", "router.drop_tokens", "moe.permute", "moe.unpermute", "cache.append", "moe.eplb", "fp8.dequantize_tile"}


def properties_of(op: Op, direction: str) -> list[Property]:
    return [p for p in PROPERTIES if p.applies(op, direction)]


def repeatable(ask: Ask, q: Drawn) -> None:
    first, again = in_order(q, ask(q)), in_order(q, ask(q))
    compare(ask, q, again, first, "asked twice")


def batch_letter(q: Drawn) -> str:
    letters = [letter for letter in ("n", "b") if any(letter in t.dims for t in inputs_of(q))]
    if q.inputs.get("cu_seqlens") is not None:  # one row, packed
        raise Inapplicable
    return letters[0]


def take(q: Drawn, letter: str, rows: np.ndarray) -> Drawn:
    """These rows of every input that has them."""
    moved = {t.name: np.take(q.inputs[t.name], rows, axis=t.dims.index(letter)) for t in inputs_of(q) if letter in t.dims}
    return changed(q, **moved)


def rows_permuted(ask: Ask, q: Drawn) -> None:
    letter = batch_letter(q)
    count = next(q.inputs[t.name].shape[t.dims.index(letter)] for t in inputs_of(q) if letter in t.dims)
    order = np.random.default_rng(q.seed).permutation(count)
    plain, moved = in_order(q, ask(q)), in_order(q, ask(take(q, letter, order)))
    back = np.argsort(order)
    moved = {t.name: np.take(moved[t.name], back, axis=t.dims.index(letter)) if letter in t.dims else moved[t.name] for t in outputs_of(q)}
    compare(ask, q, moved, plain, f"rows ({letter}) in another order")


def row_alone(ask: Ask, q: Drawn) -> None:
    letter = batch_letter(q)
    count = next(q.inputs[t.name].shape[t.dims.index(letter)] for t in inputs_of(q) if letter in t.dims)
    if count < 2:
        raise Inapplicable
    row = np.array([q.seed % count])
    one = take(q, letter, row)
    whole, alone = in_order(q, ask(q)), in_order(one, ask(one))
    expected = {t.name: np.take(whole[t.name], row, axis=t.dims.index(letter)) for t in outputs_of(q) if letter in t.dims}
    compare(ask, one, alone, expected, f"row {row[0]} ({letter}) without the others", of=band(one, alone))


def _independent(op: Op, direction: str) -> bool:
    letters = {d for t in op.signature_of(direction)[0] for d in t.dims}
    return bool(letters & {"n", "b"}) and op.name not in COUPLED and not (op.name == "fp8.linear" and direction == "backward")


def _one_axis(about: Mapping[str, Any]) -> bool:
    return about.get("axis", 1) == 1


def _several(about: Mapping[str, Any]) -> bool:
    return _one_axis(about) and max(about.get("n", 0), about.get("b", 0)) > 1


MEANS = {"router.balance_loss", "cross_entropy", "mtp.loss"}  # of a batch: a row's share depends on how many there are


def _alone(op: Op, direction: str) -> bool:
    return _independent(op, direction) and op.name not in MEANS


def linear_in_dy(ask: Ask, q: Drawn) -> None:
    """backward(dy) = backward(part of dy) + backward(the rest), the other part zero; and backward(-2 dy) = -2 backward(dy)."""
    rng = np.random.default_rng(q.seed)
    grads = [t.name for t in inputs_of(q) if t.name in {f"d{o.name}" for o in q.op.outputs}]
    if any(not np.all(np.isfinite(q.inputs[g])) or np.max(np.abs(q.inputs[g]), initial=0.0) > q.precision.io.max / 4 for g in grads):
        raise Inapplicable
    whole = ask(q)
    of = band(q, whole)
    doubled = ask(changed(q, **{g: -2 * q.inputs[g] for g in grads}))
    compare(ask, q, {name: y / -2 for name, y in doubled.items()}, whole, "dy times -2, the result over -2", of=of)
    masks = {g: rng.integers(0, 2, q.inputs[g].shape).astype(q.inputs[g].dtype) for g in grads}
    parts = [changed(q, **{g: q.inputs[g] * (m if first else 1 - m) for g, m in masks.items()}) for first in (True, False)]
    answers = [ask(p) for p in parts]
    total = {name: answers[0][name].astype(np.float64) + answers[1][name] for name in whole}
    bands = [of, *(band(p, a) for p, a in zip(parts, answers, strict=True))]
    room = Band(of.truth, {name: np.sum([b.sigma[name] for b in bands], axis=0) for name in of.sigma})  # of three calls
    compare(ask, q, total, whole, "the sum over two parts of dy", of=room)


# By op: the inputs that are doubled, and what becomes of each output.
DOUBLED: dict[str, tuple[tuple[str, ...], dict[str, float]]] = {
    "linear": (("x",), {"y": 2}),
    "rope": (("x",), {"y": 2}),
    "rmsnorm": (("weight",), {"y": 2}),
    "swiglu": (("up",), {"y": 2}),
    "attention": (("v",), {"o": 2, "lse": 1}),
    "attention.varlen": (("v",), {"o": 2, "lse": 1}),
    "attention.merge": (("o_parts",), {"o": 2, "lse": 1}),
    "moe.unpermute": (("y_sorted",), {"y": 2}),
    "moe.experts": (("w_down",), {"y": 2}),
    "fp8.gemm": (("a_scale",), {"y": 2}),
    "moe.eplb": (("weight",), {"phy2log": 1, "log2phy": 1, "counts": 1}),
    "fp8.quantize_tile": (("x",), {"codes": 1, "scale": 2}),
    "fp8.quantize_block": (("w",), {"codes": 1, "scale": 2}),
}


def doubled(ask: Ask, q: Drawn) -> None:
    names, factors = DOUBLED.get(q.op.name, (("x",), {"y": 2}))
    largest = max(np.max(np.abs(q.inputs[n]), initial=0.0, where=np.isfinite(q.inputs[n])) for n in names)
    if not q.op.exact and largest > q.precision.io.max / 4:
        raise Inapplicable
    with np.errstate(over="ignore"):
        twice = {n: 2 * q.inputs[n] for n in names}
    once, twice = ask(q), ask(changed(q, **twice))
    halved = {n: y if factors[n] == 1 else y / 2 for n, y in twice.items()}
    compare(ask, q, halved, once, f"{' and '.join(names)} doubled", _clear_of_clamps(q, once))


def _clear_of_clamps(q: Drawn, once: Arrays) -> dict[str, np.ndarray]:
    """By output, the elements far from a format's ends and a recipe's least maximum."""
    x = np.abs(np.asarray(q.inputs[inputs_of(q)[0].name], dtype=np.float64))
    if q.op.name.startswith("cast."):
        fmt = FORMATS[q.op.name.rsplit(".", 1)[-1]]
        return {"y": (x >= 2.0**fmt.emin) & (x < fmt.max / 4)}
    if not q.op.name.startswith("fp8.quantize"):
        return {}
    scale = np.asarray(once["scale"], dtype=np.float64)
    clear = (scale > 2.0**-16) & (scale < 2.0**60)  # a maximum of 1e-4 makes a scale of 2^-22
    size = q.attrs["tile" if "tile" in q.attrs else "block"]
    codes = np.repeat(clear, size, axis=1)[:, : once["codes"].shape[1]]
    if codes.shape[0] != once["codes"].shape[0]:
        codes = np.repeat(codes, size, axis=0)[: once["codes"].shape[0]]
    return {"scale": clear, "codes": codes}


def _linear(op: Op, direction: str) -> bool:
    return direction == "backward" and op.name != "fp8.linear"  # which quantises what it is given


def _doubles(op: Op, direction: str) -> bool:
    return direction == "forward" and (op.name in DOUBLED or op.name.startswith("cast."))


def bias_shifted(ask: Ask, q: Drawn) -> None:
    """Where masked experts score -inf: a score of 0 would be one that the shift passes."""
    shifted = changed(q, bias=(q.inputs["bias"] + np.float32(0.5)).astype(q.inputs["bias"].dtype))
    plain, moved = in_order(q, ask(q)), in_order(q, ask(shifted))
    compare(ask, q, moved, plain, "0.5 added to every bias")


def weights_sum(ask: Ask, q: Drawn) -> None:
    """Σ_k weight[n,k] = routed_scaling_factor, for the choice that was made."""
    got = in_order(q, ask(q))
    of = band(q, got)
    total, truth = (np.sum(w.astype(np.float64), -1) for w in (got["topk_weight"], of.truth["topk_weight"]))
    factor = q.attrs["routed_scaling_factor"]
    room = np.abs(truth - factor) + SLACK * DEVIATIONS * np.sum(of.sigma["topk_weight"], -1)  # the denominator's epsilon, and rounding
    wrong = np.isfinite(truth) & ~(np.abs(total - factor) <= room)
    if wrong.any():
        n = int(np.flatnonzero(wrong)[0])
        raise PropertyError(
            f"the weights of token {n} sum to {total[n]!r}; expected {factor}, room {room[n]:.2g} [{int(wrong.sum())} tokens]"
        )


def experts_permuted(ask: Ask, q: Drawn) -> None:
    """Groups in another order, and the experts of each: the same experts are chosen, under their new numbers."""
    groups, count = q.attrs["n_group"], q.inputs["logits"].shape[-1]
    rng = np.random.default_rng(q.seed)
    inside = np.stack([rng.permutation(count // groups) for _ in range(groups)])
    order = (inside + np.arange(groups)[:, None] * (count // groups))[rng.permutation(groups)].reshape(-1)  # new number -> old number
    moved = changed(q, logits=q.inputs["logits"][:, order], **({"bias": q.inputs["bias"][order]} if "bias" in q.inputs else {}))
    plain, renamed = in_order(q, ask(q)), ask(moved)
    idx = renamed["topk_idx"]
    if idx.size and (idx.min() < 0 or idx.max() >= count):
        raise PropertyError(f"experts in another order: topk_idx is not within 0 to {count - 1}")
    renamed = in_order(q, {**renamed, "topk_idx": order[idx]})
    compare(ask, q, renamed, plain, "experts in another order")


def future(ask: Ask, q: Drawn) -> None:
    """What comes later is changed: k and v of the last keys, or x of the last positions; what is earlier stays."""
    if q.op.name == "attention":
        queries, keys = q.inputs["q"].shape[1], q.inputs["k"].shape[1]
        first = 1 + q.seed % max(queries - 1, 1)  # the first query that may see a changed key
        moved, axes, seen = ("k", "v"), 1, first + keys - queries
    else:
        queries = q.inputs["x"].shape[1]
        first = seen = 1 + q.seed % max(queries - 1, 1)
        moved, axes = ("x",), 1
    if queries < 2 or seen < 0:
        raise Inapplicable
    later = {n: q.inputs[n].copy() for n in moved}
    for x in later.values():
        np.swapaxes(x, 0, axes)[seen:] *= -2
    plain, other = ask(q), ask(changed(q, **later))
    keep = {}
    for t in outputs_of(q):
        shape = [queries if d == "s" else 1 for d in t.dims]
        keep[t.name] = (np.arange(queries) < first).reshape(shape)
    compare(ask, q, other, plain, f"what comes after position {first - 1} changed", keep)


def keys_permuted(ask: Ask, q: Drawn) -> None:
    order = np.random.default_rng(q.seed).permutation(q.inputs["k"].shape[1])
    plain, moved = ask(q), ask(changed(q, k=q.inputs["k"][:, order], v=q.inputs["v"][:, order]))
    compare(ask, q, moved, plain, "keys and their values in another order")


def _forward(*names: str) -> Callable[[Op, str], bool]:
    return lambda op, direction: direction == "forward" and op.name in names


ROUTERS = ("router.noaux_tc", "router.softmax")
PROPERTIES = (
    Property("repeatable", "the same inputs give the same outputs", lambda op, direction: True, repeatable),
    Property("rows-permuted", "tokens in another order give the same rows in that order", _independent, rows_permuted, _one_axis),
    Property("row-alone", "a token's row does not depend on the others", _alone, row_alone, _several),
    Property("linear-in-dy", "a backward is linear in the gradients that it is given", _linear, linear_in_dy),
    Property(
        "doubled", "doubling an input doubles what is linear in it, and moves no code", _doubles, doubled, lambda a: a.get("limit") is None
    ),
    Property(
        "bias-shifted",
        "the same amount added to every bias changes no choice",
        _forward("router.noaux_tc"),
        bias_shifted,
        lambda a: a["mask_fill"] == "-inf",
    ),
    Property("weights-sum", "normalised weights sum to the routing factor", _forward(*ROUTERS), weights_sum, lambda a: a["norm_topk_prob"]),
    Property("experts-permuted", "experts under other numbers are chosen as before", _forward(*ROUTERS), experts_permuted),
    Property(
        "future",
        "what comes later does not change what is earlier",
        _forward("attention", "mla.prefill", "mla.absorb"),
        future,
        lambda a: a.get("causal", True) and a["s"] > 1,
    ),
    Property(
        "keys-permuted",
        "without a mask, the order of the keys does not matter",
        _forward("attention"),
        keys_permuted,
        lambda a: not a["causal"],
    ),
)
