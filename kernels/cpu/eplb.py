"""Where the replicas of busy experts go: DeepSeek's expert-parallel load balancer."""

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ...ref.eplb import check_eplb
from ._declared import declared

Array = NDArray[Any]


@njit(nogil=True, cache=True)
def _pack(weight, order, packs, pack, rank):
    """Items, in `order` (descending), each into the lightest pack that has room; the lower pack wins a tie. Loads in weight's dtype."""
    room = weight.size // packs
    if room == 1:
        for i in range(weight.size):
            pack[i], rank[i] = i, 0
        return
    loads, filled = np.zeros(packs, weight.dtype), np.zeros(packs, np.int64)
    for item in order:
        lightest = -1
        for p in range(packs):
            if filled[p] < room and (lightest < 0 or loads[p] < loads[lightest]):
                lightest = p
        pack[item], rank[item] = lightest, filled[lightest]
        loads[lightest] += weight[item]
        filled[lightest] += 1


@njit(nogil=True, error_model="numpy", cache=True)
def _replicate(weight, item, rank, count, each):
    """One replica of each, then always one more of the largest weight/count; the lowest index wins a tie. each = weight/count"""
    n = weight.size
    for i in range(n):
        item[i], rank[i], count[i], each[i] = i, 0, 1, weight[i]
    for r in range(n, item.size):
        busiest = 0
        for i in range(1, n):
            if each[i] > each[busiest]:
                busiest = i
        item[r], rank[r] = busiest, count[busiest]
        count[busiest] += 1
        each[busiest] = weight[busiest] / weight.dtype.type(count[busiest])


def _packed(weight: Array, packs: int) -> tuple[Array, Array]:
    """The pack of each item, and its place within"""
    order = np.argsort(-weight, kind="stable")
    pack, rank = (np.empty(weight.size, np.int64) for _ in range(2))
    _pack(weight, order, packs, pack, rank)
    return pack, rank


def moe_eplb(
    weight: Array, *, num_replicas: int = 288, num_groups: int = 8, num_nodes: int = 4, num_gpus: int = 32
) -> tuple[Array, Array, Array]:
    """phy2log[l,p]: the expert of replica p;   log2phy[l,e,:counts[l,e]]: the replicas of expert e, then -1;   counts[l,e].

    weight[l,e] is each layer's load. Groups of experts go to nodes where num_nodes divides num_groups (else all of it at once), experts are
    replicated within their node, replicas go to its GPUs; the heaviest first, to the lightest. The lowest index wins a tie.
    ValueError: sizes that do not divide, fewer replicas than experts, a load that is negative, NaN or infinite.
    """
    attrs = {"num_replicas": num_replicas, "num_groups": num_groups, "num_nodes": num_nodes, "num_gpus": num_gpus}
    arrays, _, letters = declared("moe.eplb", "forward", {"weight": weight}, attrs)
    weight, layers, e = arrays["weight"], letters["l"], letters["e"]
    check_eplb(weight, num_replicas, num_groups, num_nodes, num_gpus)
    groups, nodes = (num_groups, num_nodes) if num_groups % num_nodes == 0 else (1, 1)
    size, share, here = e // groups, e // nodes, num_replicas // nodes
    phy2log, ranks = (np.empty((layers, num_replicas), np.int64) for _ in range(2))
    counts = np.empty((layers, e), np.int64)
    item, rank, each = np.empty(here, np.int64), np.empty(here, np.int64), np.empty(share, weight.dtype)
    count = np.empty(share, np.int64)
    for layer, load in enumerate(weight):
        node, place = _packed(np.sum(load.reshape(groups, size), axis=1), nodes)
        own = (np.lexsort((place, node))[:, None] * size + np.arange(size)).reshape(nodes, share)  # each node's experts
        for i, experts in enumerate(own):
            _replicate(load[experts], item, rank, count, each)
            order = np.lexsort(_packed(each[item], num_gpus // nodes)[::-1])
            rows = slice(i * here, (i + 1) * here)
            phy2log[layer, rows], ranks[layer, rows] = experts[item[order]], rank[order]
            counts[layer, experts] = count
    log2phy = np.full((layers, e, int(counts.max(initial=1))), -1, np.int64)
    log2phy[np.arange(layers)[:, None], phy2log, ranks] = np.arange(num_replicas)
    return phy2log, log2phy, counts
