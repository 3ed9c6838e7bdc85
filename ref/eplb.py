"""DeepSeek's expert-parallel load balancer: replicate the busy experts, and place the replicas. Spec §3.6; EPLB, eplb.py.

Everything here decides; nothing is differentiated. Loads keep their own dtype, so that equal quotients tie as they do in production.
"""

from typing import Any

from array_api_compat import device

from .op import Case, Op, declare, signature
from .xp import Array, xp_of


def packed(weight: Array, packs: int) -> tuple[list[int], list[int]]:
    """Items of weight[n] into `packs` packs of n/packs items: the heaviest first, each into the lightest pack that has room.

    pack[i] and the item's rank within it. On ties the lower index goes first, and into the lower pack. A single item a pack stays put.
    """
    n = weight.shape[0]
    room = n // packs
    if room == 1:
        return list(range(n)), [0] * n
    order = xp_of(weight).argsort(weight, descending=True, stable=True)
    loads, filled = [0 * weight[0]] * packs, [0] * packs
    pack, rank = [0] * n, [0] * n
    for j in range(n):
        item = int(order[j])
        lightest = min((p for p in range(packs) if filled[p] < room), key=lambda p: float(loads[p]))
        pack[item], rank[item] = lightest, filled[lightest]
        loads[lightest] = loads[lightest] + weight[item]
        filled[lightest] += 1
    return pack, rank


def replicated(weight: Array, total: int) -> tuple[list[int], list[int], Array]:
    """`total` replicas of weight[n]'s items: one each, then always one more of the largest weight/count (the lowest index on ties).

    The item of each replica, its rank among the item's replicas, and count[n].
    """
    xp, n = xp_of(weight), weight.shape[0]
    count = xp.ones(n, dtype=xp.int64, device=device(weight))
    places = xp.arange(n, dtype=xp.int64, device=device(weight))
    item, rank = list(range(n)), [0] * n
    for _ in range(total - n):
        busiest = int(xp.argmax(weight / xp.astype(count, weight.dtype)))
        item.append(busiest)
        rank.append(int(count[busiest]))
        count = count + xp.astype(places == busiest, xp.int64)
    return item, rank, count


def place_layer(weight: Array, replicas: int, groups: int, nodes: int, gpus: int) -> tuple[list[int], list[int], list[int]]:
    """phy2log[replicas], each replica's rank, count[e]: groups to nodes, replicas within each node, replicas to the node's GPUs"""
    xp, e = xp_of(weight), weight.shape[0]
    size, dev = e // groups, device(weight)
    node_of, rank_of = packed(xp.sum(xp.reshape(weight, (groups, size)), axis=1), nodes)
    by_place = sorted(range(groups), key=lambda g: (node_of[g], rank_of[g]))
    experts = [g * size + i for g in by_place for i in range(size)]  # node after node
    phy2log, ranks, counts = [], [], [0] * e
    share, here = e // nodes, replicas // nodes
    for node in range(nodes):
        own = experts[node * share : (node + 1) * share]
        load = xp.take(weight, xp.asarray(own, dtype=xp.int64, device=dev))
        item, rank, count = replicated(load, here)
        each = load / xp.astype(count, load.dtype)
        gpu, slot = packed(xp.take(each, xp.asarray(item, dtype=xp.int64, device=dev)), gpus // nodes)
        for replica in sorted(range(here), key=lambda r: (gpu[r], slot[r])):
            phy2log.append(own[item[replica]])
            ranks.append(rank[replica])
        for i, expert in enumerate(own):
            counts[expert] = int(count[i])
    return phy2log, ranks, counts


@signature("weight[l,e]:const -> phy2log[l,num_replicas]:index log2phy[l,e,x]:index counts[l,e]:index")
def eplb_fwd(
    weight: Array, *, num_replicas: int = 288, num_groups: int = 8, num_nodes: int = 4, num_gpus: int = 32
) -> tuple[tuple[Array, Array, Array], tuple]:
    """phy2log[l,p] = the expert of replica p,   log2phy[l,e,:counts[l,e]] = the replicas of expert e (then -1),   counts[l,e] = how many

    weight[l,e] is each layer's load. Where num_nodes divides num_groups, groups of experts are packed onto nodes, experts are replicated
    within their node, and replicas are packed onto its GPUs; else all of it at once over all GPUs. The next replica goes to the largest
    weight/count. x is the largest count. Replica p lives on GPU p // (num_replicas/num_gpus).
    """
    xp, dev, (layers, e) = xp_of(weight), device(weight), weight.shape
    check_eplb(weight, num_replicas, num_groups, num_nodes, num_gpus)
    groups, nodes = (num_groups, num_nodes) if num_groups % num_nodes == 0 else (1, 1)
    placed = [place_layer(weight[i, ...], num_replicas, groups, nodes, num_gpus) for i in range(layers)]
    most = max((max(counts) for _, _, counts in placed), default=1)
    log2phy = [[[-1] * most for _ in range(e)] for _ in range(layers)]
    for table, (phy2log, ranks, _) in zip(log2phy, placed, strict=True):
        for replica, (expert, rank) in enumerate(zip(phy2log, ranks, strict=True)):
            table[expert][rank] = replica
    shapes = ((layers, num_replicas), (layers, e, most), (layers, e))
    tables = ([p for p, _, _ in placed], log2phy, [c for _, _, c in placed])
    phy, log, counts = (xp.reshape(xp.asarray(t, dtype=xp.int64, device=dev), shape) for t, shape in zip(tables, shapes, strict=True))
    return (phy, log, counts), ()


def check_eplb(weight: Array, replicas: int, groups: int, nodes: int, gpus: int) -> None:
    xp, op, e = xp_of(weight), "moe.eplb", weight.shape[1]
    for name, value, divides, what in (
        ("num_groups", groups, e, f"a divisor of the {e} experts"),
        ("num_nodes", nodes, gpus, f"a divisor of num_gpus = {gpus}"),
        ("num_gpus", gpus, replicas, f"a divisor of num_replicas = {replicas}"),
    ):
        if value < 1 or divides % value:
            raise ValueError(f"{op}: {name} is {value}; expected {what}")
    if replicas < e:
        raise ValueError(f"{op}: num_replicas is {replicas}; expected at least one for each of the {e} experts")
    if not bool(xp.all(xp.isfinite(weight) & (weight >= 0))):
        i, j = (int(v[0]) for v in xp.nonzero(~(xp.isfinite(weight) & (weight >= 0))))
        raise ValueError(f"{op}: weight[{i}, {j}] is {float(weight[i, j])}; expected a finite load >= 0")


def nodes_touched(topk_idx: Array, e: int, nodes: int) -> Array:
    """int64 [n]: on how many nodes a token's experts lie, in equal blocks: at most topk_group where groups are nodes"""
    xp = xp_of(topk_idx)
    owner = xp.where(topk_idx < 0, topk_idx, topk_idx // (e // nodes))
    hits = owner[:, :, None] == xp.arange(nodes, device=device(topk_idx))
    return xp.sum(xp.astype(xp.any(hits, axis=1), xp.int64), axis=1)


README = (90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86, 20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27)


def _case(name: str, layers: int, e: int, weight: tuple, sizes: tuple[int, int, int, int], note: str = "") -> Case:
    attrs: dict[str, Any] = dict(zip(("num_replicas", "num_groups", "num_nodes", "num_gpus"), sizes, strict=True))
    return Case(name, {"l": layers, "e": e}, {"weight": weight}, attrs, note)


moe_eplb = declare(
    Op(
        "moe.eplb",
        eplb_fwd,
        None,
        (
            _case("readme", 2, 12, ("values", *README), (16, 4, 2, 8), "the example of EPLB's README"),
            _case("global", 2, 12, ("whole", 0, 400), (16, 3, 2, 8), "groups that nodes do not divide"),
            _case("v3", 1, 256, ("whole", 0, 4000), (288, 8, 4, 32), "V3's decoding deployment, smaller"),
            _case("no-redundancy", 2, 8, ("whole", 0, 100), (8, 4, 2, 4)),
            _case("ties", 2, 8, ("const", 5.0), (12, 4, 2, 4), "equal loads: the lowest index first"),
            _case("hot", 1, 8, ("values", 1000, 1, 1, 1, 1, 1, 1, 1), (16, 1, 1, 4), "one expert with nearly all tokens"),
        ),
        "l*e",
        "spec §3.6; EPLB README and eplb.py",
        vary="",
    )
)
