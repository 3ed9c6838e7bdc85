"""The embedding: one row of the table for each token."""

import itertools

from array_api_compat import device

from .moe_permute import rows_at
from .op import Case, Op, declare, signature
from .xp import Array, xp_of


@signature("ids[n]:index weight[v,d] -> x[n,d]")
def embedding_fwd(ids: Array, weight: Array) -> tuple[Array, tuple]:
    """x[n,d] = weight[ids[n],d]

    Ids outside the vocabulary are refused.
    """
    check_ids("embedding", "ids", ids, weight.shape[0])
    return xp_of(weight).take(weight, ids, axis=0), (ids, weight.shape[0])


def embedding_bwd(dx: Array, saved: tuple) -> Array:
    """dweight[v,d] = Σ_n [ids[n] = v] dx[n,d]: rows sorted by id, one sum for each distinct id, a gather; exactly 0 elsewhere"""
    ids, v = saved
    xp = xp_of(dx)
    order = xp.argsort(ids, stable=True)
    ranked, sorted_dx = xp.take(ids, order), xp.take(dx, order, axis=0)
    first = [0, *(int(i) + 1 for i in xp.nonzero(ranked[1:] != ranked[:-1])[0])] if ids.shape[0] else []
    sums = [xp.sum(sorted_dx[a:z, :], axis=0) for a, z in itertools.pairwise([*first, ids.shape[0]])]
    if not sums:
        return xp.zeros((v, dx.shape[1]), dtype=dx.dtype, device=device(dx))
    distinct = xp.take(ranked, xp.asarray(first, dtype=xp.int64, device=device(ids)))
    token = xp.arange(v, dtype=distinct.dtype, device=device(ids))
    place = xp.clip(xp.searchsorted(distinct, token), 0, len(sums) - 1)  # where each token's sum would stand
    return rows_at(xp.stack(sums, axis=0), xp.where(xp.take(distinct, place) == token, place, xp.full_like(place, -1)))


def check_ids(op: str, name: str, ids: Array, v: int) -> None:
    """Every id within the vocabulary, or a ValueError with the first that is not"""
    xp = xp_of(ids)
    outside = (ids < 0) | (ids >= v)
    if bool(xp.any(outside)):
        at = tuple(int(i[0]) for i in xp.nonzero(outside))
        raise ValueError(f"{op}: {name}[{', '.join(map(str, at))}] is {int(ids[at])}; expected 0 to {v - 1}")


def _case(name: str, n: int, v: int, d: int, ids: tuple, note: str = "") -> Case:
    return Case(name, {"n": n, "v": v, "d": d}, {"ids": ids, "weight": ("normal", 0.02), "dx": ("normal", 1.0)}, note=note)


embedding = declare(
    Op(
        "embedding",
        embedding_fwd,
        embedding_bwd,
        (
            _case("tokens", 9, 31, 12, ("integers", 0, 31)),
            _case("one", 1, 4, 6, ("positions", 3)),
            _case("repeated", 8, 5, 7, ("positions", 4, 0, 4, 4, 2, 0, 4, 2), "the gradient gathers; tokens 1 and 3 have none"),
            _case("edges", 4, 10, 3, ("positions", 0, 9, 9, 0), "the first and the last token"),
        ),
        "n*d",
        "DeepSeek-V3 inference/model.py, ParallelEmbedding",
    )
)
