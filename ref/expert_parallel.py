"""Expert parallelism, simulated exactly: ranks as a leading axis of lists, all-to-all as array operations. Spec §3.5; DeepEP.

Tokens are split over R ranks, experts lie on the ranks in equal blocks. Every rank sends each of its tokens once to every rank that owns
one of its experts (dispatch). The owners run their experts over what came from all ranks, in the order of the tokens, and send back a row
for each slot (combine), which the token's own rank weighs and adds in the order of the slots: the sums of one rank, bit for bit.
"""

from typing import Any

from .moe import moe_experts_fwd
from .moe_permute import rows_at, total_of
from .selection import check_chosen
from .xp import Array, xp_of


def split_tokens(x: Array, ranks: int) -> list[Array]:
    """Consecutive shares, the first ones a token larger where ranks do not divide n"""
    n = x.shape[0]
    ends = [r * (n // ranks) + min(r, n % ranks) for r in range(ranks + 1)]
    return [x[ends[r] : ends[r + 1], ...] for r in range(ranks)]


def dispatch(x: list[Array], topk_idx: list[Array], per_rank: int) -> list[tuple[Array, Array, list[Array]]]:
    """For each owner: the rows x it receives, rank after rank and token after token, their experts as its own numbers (-1: another's), and
    which tokens of each source they are"""
    xp, owners = xp_of(x[0]), len(x)
    received = []
    for owner in range(owners):
        rows, local, tokens = [], [], []
        for part, idx in zip(x, topk_idx, strict=True):
            own = idx - owner * per_rank
            own = xp.where((idx >= 0) & (own >= 0) & (own < per_rank), own, xp.full_like(own, -1))
            token = xp.nonzero(xp.any(own >= 0, axis=1))[0]
            rows.append(xp.take(part, token, axis=0))
            local.append(xp.take(own, token, axis=0))
            tokens.append(token)
        received.append((xp.concat(rows, axis=0), xp.concat(local, axis=0), tokens))
    return received


def combine(
    sent: list[list[Array]], topk_idx: list[Array], tokens: list[list[Array]], topk_weight: list[Array], per_rank: int
) -> list[Array]:
    """y of each rank: Σ_k topk_weight[n,k] of the row that the slot's owner sent back, slot after slot. sent[owner][slot] is [rows,d]"""
    xp = xp_of(topk_weight[0])
    ys = []
    begins = [0] * len(sent)
    for source, (idx, weight) in enumerate(zip(topk_idx, topk_weight, strict=True)):
        n, k = idx.shape
        empty, parts = xp.zeros((n, sent[0][0].shape[1]), dtype=weight.dtype), []
        for slot in range(k):
            part = empty
            for owner, slots in enumerate(sent):
                token = tokens[owner][source]
                count = token.shape[0]
                rows = slots[slot][begins[owner] : begins[owner] + count, :]
                place = xp.searchsorted(token, xp.arange(n, dtype=token.dtype))  # where a token stands among those that were sent
                mine = (idx[:, slot] >= 0) & (idx[:, slot] // per_rank == owner)
                if count:
                    back = xp.take(rows, xp.where(mine, place, xp.zeros_like(place)), axis=0)
                    part = xp.where(mine[:, None], back, part)
            parts.append(weight[:, slot : slot + 1] * part)
        begins = [b + tokens[owner][source].shape[0] for owner, b in enumerate(begins)]
        ys.append(total_of(parts, empty, n))
    return ys


def experts_over_ranks(
    x: Array, topk_idx: Array, topk_weight: Array, w_gate: Array, w_up: Array, w_down: Array, *, ranks: int, **attrs: Any
) -> list[Array]:
    """y of every rank: moe.experts with tokens and experts spread over `ranks`; joined, the one-rank result bit for bit"""
    e = w_gate.shape[0]
    if ranks < 1 or e % ranks:
        raise ValueError(f"experts_over_ranks: ranks is {ranks}; expected a divisor of the {e} experts")
    check_chosen("experts_over_ranks", topk_idx, x.shape[0], topk_idx.shape[1], e, least=-1)
    if attrs.get("weight_before_down"):
        raise ValueError("experts_over_ranks: weight_before_down is True; expected False: the token's own rank weighs")
    per_rank, k = e // ranks, topk_idx.shape[1]
    xs, idx, weight = (split_tokens(a, ranks) for a in (x, topk_idx, topk_weight))
    received = dispatch(xs, idx, per_rank)
    xp, sent = xp_of(x), []
    for owner, (rows, local, _) in enumerate(received):
        own = slice(owner * per_rank, (owner + 1) * per_rank)
        weights = (w_gate[own, ...], w_up[own, ...], w_down[own, ...])
        one = xp.ones((rows.shape[0], k), dtype=x.dtype)
        # A row for each slot: the owner's experts over all its rows, as in one call of moe.experts, with the slots kept apart.
        _, saved = moe_experts_fwd(rows, local, one, *weights, **attrs)
        y_sorted, place = saved[0], saved[3]
        sent.append([rows_at(y_sorted, place[:, slot]) for slot in range(k)])
    return combine(sent, idx, [tokens for _, _, tokens in received], weight, per_rank)
