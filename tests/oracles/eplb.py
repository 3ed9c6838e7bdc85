"""DeepSeek's expert placement: which experts get a second copy, and where every copy lies; shares nothing with `ref`.

Equation: where num_nodes divides num_groups, whole groups of experts are packed onto nodes by their load; on every node the expert with the
largest load a copy gets one copy more until all places are taken; the node's copies are packed onto its GPUs by their load. Otherwise
all is one group on one node. Packing: by descending load, each to the least loaded pack that still has room; with room for one item a
pack, item i is pack i's. Ties go to the lowest index, in a node to the expert that comes first there (its groups as they were packed).
Loads are exact fractions of the weights as they are given: see `margin`.
"""

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np

from .edges import refuse
from .linear import Arrays

NAMES = ("num_replicas", "num_groups", "num_nodes", "num_gpus")


class Load:
    """A load and the inputs and operations it is made by: equal recipes give equal loads in any arithmetic."""

    def __init__(self, value: Fraction, recipe: Any) -> None:
        self.value, self.recipe = value, recipe


def _gap(a: Load, b: Load, gaps: list[Fraction]) -> None:
    """Notes how far, relatively, a and b are apart."""
    if a.recipe != b.recipe:
        gaps.append(abs(a.value - b.value) / (max(abs(a.value), abs(b.value)) or 1))


def pack(items: Sequence[Load], packs: int, gaps: list[Fraction]) -> list[list[int]]:
    """The items of every pack, in the order in which they were put there."""
    room = len(items) // packs
    if room == 1:
        return [[i] for i in range(packs)]
    filled: list[list[int]] = [[] for _ in range(packs)]
    order = sorted(range(len(items)), key=lambda i: -items[i].value)
    for i, j in pairwise(order):
        _gap(items[i], items[j], gaps)
    for item in order:
        loads = {
            p: Load(sum((items[i].value for i in held), Fraction(0)), [items[i].recipe for i in held])
            for p, held in enumerate(filled)
            if len(held) < room
        }
        lightest = min(loads, key=lambda p: loads[p].value)  # the first of equals
        for p in loads:
            _gap(loads[lightest], loads[p], gaps)
        filled[lightest].append(item)
    return filled


def replicate(loads: list[Fraction], places: int, gaps: list[Fraction]) -> list[int]:
    """The expert in every place: each once, then each time the one whose copies carry most."""
    copies = list(range(len(loads)))
    while len(copies) < places:
        shares = [load / copies.count(i) for i, load in enumerate(loads)]
        heaviest = max(range(len(loads)), key=lambda i: shares[i])  # the first of equals
        for share in shares:  # a quotient rounds by its value alone
            _gap(Load(shares[heaviest], shares[heaviest]), Load(share, share), gaps)
        copies.append(heaviest)
    return copies


def place(loads: list[Fraction], replicas: int, groups: int, nodes: int, gpus: int, gaps: list[Fraction]) -> list[tuple[int, int]]:
    """(expert, which of its copies) in every place of one layer."""
    size = len(loads) // groups
    grouped = [loads[g * size : (g + 1) * size] for g in range(groups)]
    places: list[tuple[int, int]] = []
    for held in pack([Load(sum(g, Fraction(0)), g) for g in grouped], nodes, gaps):
        members = [g * size + i for g in held for i in range(size)]
        copies = replicate([loads[i] for i in members], replicas // nodes, gaps)
        ranks = [copies[:p].count(i) for p, i in enumerate(copies)]
        shares = [loads[members[i]] / copies.count(i) for i in copies]
        for gpu in pack([Load(share, share) for share in shares], gpus // nodes, gaps):
            places += [(members[copies[p]], ranks[p]) for p in gpu]
    return places


def _places(inputs: Arrays, attrs: dict[str, Any]) -> tuple[list[list[tuple[int, int]]], list[list[Fraction]]]:
    """(the places, the gaps) of every layer; the contract's ValueErrors."""
    if set(attrs) != set(NAMES):
        raise TypeError(f"attributes {sorted(attrs)}, expected {sorted(NAMES)}")
    replicas, groups, nodes, gpus = (attrs[name] for name in NAMES)
    weight = inputs["weight"]
    refuse(weight, "weight", infinite=True)
    e = weight.shape[1]
    if min(replicas, groups, nodes, gpus) < 1:
        raise ValueError(f"{attrs}: each is at least 1")
    if groups % nodes:
        groups, nodes = 1, 1
    for what, whole, part in (("experts", e, groups), ("GPUs", gpus, nodes), ("replicas", replicas, gpus)):
        if whole % part:
            raise ValueError(f"{whole} {what} cannot be split evenly by {part}")
    if replicas < e:
        raise ValueError(f"num_replicas {replicas} < {e} experts")
    layers, gaps = [], []
    for row in weight.tolist():
        gaps.append([])
        layers.append(place([Fraction(w) for w in row], replicas, groups, nodes, gpus, gaps[-1]))
    return layers, gaps


def rebalance(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """moe.eplb: weight -> phy2log, log2phy (copy by copy, in the order in which they were made; -1 beyond counts), counts."""
    layers, (l, e) = _places(inputs, attrs)[0], inputs["weight"].shape
    r = attrs["num_replicas"]
    phy2log = np.full((l, r), -1, np.int64)
    log2phy = np.full((l, e, r - e + 1), -1, np.int64)
    counts = np.zeros((l, e), np.int64)
    for layer, places in enumerate(layers):
        for p, (expert, rank) in enumerate(places):
            phy2log[layer, p] = expert
            log2phy[layer, expert, rank] = p
            counts[layer, expert] += 1
    return {"phy2log": phy2log, "log2phy": log2phy[:, :, : counts.max(initial=1)], "counts": counts}


def margin(inputs: Arrays, attrs: dict[str, Any]) -> np.ndarray:
    """Per layer, the least relative gap between two loads that were compared, other than the same load made in the same way (inf: none).

    Where it is not well above the roundings of sums of `e` weights and of their quotients, another arithmetic may rightly decide otherwise.
    """
    return np.array([float(min(gaps, default=np.inf)) for gaps in _places(inputs, attrs)[1]], np.float64)
