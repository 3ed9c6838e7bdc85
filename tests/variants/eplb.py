"""EPLB: packs by a heap and by a masked minimum, replicas by a heap and by a scan. Nothing rounds but sums of loads, in their own dtype."""

import heapq
from collections.abc import Callable

import numpy as np

from .floats import Array


def pack_by_minimum(load: Array, packs: int) -> tuple[Array, Array]:
    """The heaviest first, each to the lightest pack that is not full: pack and rank of each item. One item a pack stays where it is."""
    room = len(load) // packs
    pack, rank = np.arange(len(load)) % packs, np.zeros(len(load), np.int64)
    if room == 1:
        return pack, rank
    total, filled = np.zeros(packs, load.dtype), np.zeros(packs, np.int64)
    for item in np.lexsort((np.arange(len(load)), -load)):
        at = int(np.argmin(np.where(filled < room, total, np.inf)))
        pack[item], rank[item] = at, filled[at]
        total[at] += load[item]
        filled[at] += 1
    return pack, rank


def pack_by_heap(load: Array, packs: int) -> tuple[Array, Array]:
    """Packs with room in a heap, by load and index."""
    room = len(load) // packs
    pack, rank = np.arange(len(load)) % packs, np.zeros(len(load), np.int64)
    if room == 1:
        return pack, rank
    heap = [(load.dtype.type(0), at, 0) for at in range(packs)]
    for _, item in sorted((-value, item) for item, value in enumerate(load)):
        total, at, filled = heapq.heappop(heap)
        pack[item], rank[item] = at, filled
        if filled + 1 < room:
            heapq.heappush(heap, (total + load[item], at, filled + 1))
    return pack, rank


def copies_by_scan(load: Array, more: int) -> list[int]:
    """Which items get one replica more, in the order in which they do."""
    count, found = np.ones(len(load), np.int64), []
    for _ in range(more):
        found.append(int(np.argmax(load / count.astype(load.dtype))))
        count[found[-1]] += 1
    return found


def copies_by_heap(load: Array, more: int) -> list[int]:
    heap, found = [(-value, item, 1) for item, value in enumerate(load)], []
    heapq.heapify(heap)
    for _ in range(more):
        _, item, count = heapq.heappop(heap)
        found.append(item)
        heapq.heappush(heap, (-load[item] / load.dtype.type(count + 1), item, count + 1))
    return found


def placed(pack: Callable, copies: Callable, load: Array, replicas: int, groups: int, nodes: int, gpus: int) -> list[tuple[int, int]]:
    """The expert of each replica, and which of the expert's replicas it is"""
    per, found = len(load) // groups, []
    node, place = pack(load.reshape(groups, per).sum(1), nodes)
    for n in range(nodes):
        mine = sorted(np.flatnonzero(node == n), key=lambda g: place[g])
        experts = np.concatenate([np.arange(g * per, (g + 1) * per) for g in mine])
        own = load[experts]
        item = np.array([*range(len(experts)), *copies(own, replicas // nodes - len(experts))])
        number = [int(np.sum(item[:i] == which)) for i, which in enumerate(item)]
        gpu, slot = pack((own / np.bincount(item).astype(own.dtype))[item], gpus // nodes)
        found += [(int(experts[item[i]]), number[i]) for i in np.lexsort((slot, gpu))]
    return found


def _eplb(pack: Callable, copies: Callable) -> Callable:
    def forward(
        weight: Array, *, num_replicas: int = 288, num_groups: int = 8, num_nodes: int = 4, num_gpus: int = 32
    ) -> tuple[Array, Array, Array]:
        groups, nodes = (num_groups, num_nodes) if num_groups % num_nodes == 0 else (1, 1)
        layers = [placed(pack, copies, load, num_replicas, groups, nodes, num_gpus) for load in weight]
        phy2log = np.array([[expert for expert, _ in layer] for layer in layers], np.int64)
        counts = np.array([np.bincount(row, minlength=weight.shape[1]) for row in phy2log], np.int64)
        log2phy = np.full((*counts.shape, counts.max()), -1)
        for table, layer in zip(log2phy, layers, strict=True):
            for replica, (expert, number) in enumerate(layer):
                table[expert, number] = replica
        return phy2log, log2phy, counts

    return forward


EPLB = {"scans": _eplb(pack_by_minimum, copies_by_scan), "heaps": _eplb(pack_by_heap, copies_by_heap)}
