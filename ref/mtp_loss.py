"""The loss of a chain of multi-token prediction modules, masked and packed. Spec §5; DeepSeek-V3 paper eq. 24, 25."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from array_api_compat import device

from .attention_parts import check_packed
from .block import CONSTANT, PLAIN, SIZES, V3, block_fwd, block_regret, sequence_draws, stacked_sig
from .embedding import check_ids
from .linear import linear_bwd, linear_fwd
from .loss import cross_entropy_bwd, cross_entropy_fwd
from .mla_parts import activation_bwd
from .moe import stack_of
from .mtp import MODULE, PLACES, Chain, Concat, check_merge, module_bwd, module_draws, module_fwd
from .op import Case, Op, attributes_of, declare, keywords, signature
from .xp import Array, xp_of

Denominator = Literal["total", "counted"]


BLOCK = tuple(keywords(block_fwd))


def targets_of(labels: Array, cu_seqlens: Array | None, k: int, ignore_index: int) -> Array:
    """[b,s-k]: row i's target, labels[i+k+1]; ignore_index where there is none or it lies in another packed sequence than row i"""
    xp, (b, s) = xp_of(labels), labels.shape
    n, first = max(s - k, 0), min(k + 1, s)  # rows, and where the targets begin: the last row has none
    none = xp.full((b, 1), ignore_index, dtype=labels.dtype, device=device(labels))
    target = xp.concat([labels[:, first:], none], axis=1)[:, :n]
    if cu_seqlens is None:
        return target
    place = xp.arange(s, dtype=cu_seqlens.dtype, device=device(labels))
    document = xp.searchsorted(cu_seqlens, place, side="right")  # [s]
    together = xp.concat([document[: s - first] == document[first:], none[0, :] != none[0, :]])[:n]
    return xp.where(together[None, :], target, xp.full_like(target, ignore_index))


def rows_of(places: tuple[Array, Array | None], rows: int) -> tuple[Array, Array | None]:
    """positions and cu_seqlens of the first rows"""
    positions, cu_seqlens = places
    return positions[:, :rows], None if cu_seqlens is None else xp_of(cu_seqlens).clip(cu_seqlens, 0, rows)


def chain_by(
    h: Array,
    ids: Array,
    places: tuple[Array, Array | None],
    w: tuple[Array | None, ...],
    idx: Array | None,
    attrs: Mapping[str, Any],
    part: Callable = block_fwd,
) -> Iterator[tuple[int, Array, Array, tuple]]:
    """k, last[b,s-k,d], topk_idx[b,s-k,·] and what its backward needs, module after module; w are the stacks and the embedding"""
    *stacks, embed_tokens = w
    concat, chain = attrs["concat"], attrs["chain"]
    of_block = {name: value for name, value in attrs.items() if name in BLOCK}
    x, s, p = h, h.shape[1], stacks[0].shape[0]  # type: ignore[union-attr]
    for k in range(1, p + 1):
        n = max(s - k, 0)
        own = {name: None if stack is None else stack[k - 1, ...] for name, stack in zip(MODULE, stacks, strict=True)}
        how = of_block if idx is None else {**of_block, "topk_idx": idx[k - 1, :, :n, :]}
        read, where = ids[:, s - n :], rows_of(places, n)
        (last, x, chosen), saved = module_fwd(x[:, :n, :], read, where, embed_tokens, own, concat, chain, how, part)
        yield k, last, chosen, saved


def longer(x: Array, rows: int, fill: int = 0) -> Array:
    """x[b,·,…] with that many more rows"""
    xp = xp_of(x)
    more = xp.full((x.shape[0], rows, *x.shape[2:]), fill, dtype=x.dtype, device=device(x))
    return xp.concat([x, more], axis=1)


@signature(
    f"h[b,s,d] ids[b,s]:index labels?[b,s]:index {PLACES} enorm[p,d] hnorm[p,d] eh_proj[p,d,dd] {stacked_sig(lambda _: 'p')} "
    "shared_head_norm[p,d] embed_tokens[v,d] shared_head[v,d] -> loss[] topk_idx[p,b,s,num_experts_per_tok]:index"
)
@attributes_of(block_fwd)
def mtp_loss_fwd(
    h: Array,
    ids: Array,
    labels: Array | None,
    positions: Array,
    cu_seqlens: Array | None,
    *weights: Array,
    weight: float = 0.3,
    denominator: Denominator = "total",
    ignore_index: int = -100,
    detach_head: bool = False,
    concat: Concat = "embed_first",
    chain: Chain = "post_norm",
    topk_idx: Array | None = None,
    **attrs: Any,
) -> tuple[tuple[Array, Array], tuple]:
    """loss = weight/p Σ_k L_k,   L_k = -1/(b s) Σ_i log softmax(logits_k[i])[labels[i+k+1]]   (V3 eq. 24, 25)

    Module k = 1..p reads the hidden states of the module before it (the first: h, the main model's after its final norm) and the tokens
    ids[i+k], so it has s - k rows. A row counts if its target is there, is not ignore_index (labels[i] is token i's own; default: ids) and
    lies in the same packed sequence as token i. denominator="counted" divides by how many rows count. detach_head: no gradient to
    embed_tokens and shared_head. Rows without a token have topk_idx -1. Without modules (p = 0) the loss is 0. Other attributes as in mtp.
    """
    xp, (b, s, d) = xp_of(h), h.shape
    *stacks, embed_tokens, shared_head = weights
    check_merge("mtp.loss", h, stacks[2])
    check_ids("mtp.loss", "ids", ids, embed_tokens.shape[0])
    if labels is not None:
        check_ids("mtp.loss", "labels", xp.where(labels == ignore_index, 0 * labels, labels), embed_tokens.shape[0])
    if cu_seqlens is not None:
        check_packed("mtp.loss", "cu_seqlens", cu_seqlens, s)
    own, part = ids if labels is None else labels, weight / max(stacks[0].shape[0], 1)
    saved, chosen, loss = [], [], xp.zeros((), dtype=h.dtype, device=device(h))
    attrs |= {"concat": concat, "chain": chain}
    for k, last, idx, s_module in chain_by(h, ids, (positions, cu_seqlens), (*stacks, embed_tokens), topk_idx, attrs):
        n = last.shape[1]
        logits, s_head = linear_fwd(xp.reshape(last, (b * n, d)), shared_head)
        target = xp.reshape(targets_of(own, cu_seqlens, k, ignore_index), (b * n,))
        how: Any = "rows" if denominator == "total" else "counted"
        mean, s_loss = cross_entropy_fwd(logits, target, ignore_index=ignore_index, denominator=how, empty="zero")
        share = part * n / max(s, 1) if denominator == "total" else part  # of b s rows, b (s - k) are there
        loss = loss + share * mean
        chosen.append(longer(idx, s - n, -1))
        saved.append((s_module, s_head, s_loss, share))
    none = xp.zeros((0, b, s, attrs.get("num_experts_per_tok", 8)), dtype=xp.int64, device=device(ids))
    return (loss, xp.stack(chosen, axis=0) if chosen else none), (h, saved, weights, detach_head)


def mtp_loss_bwd(dloss: Array, saved: tuple) -> tuple[Array, ...]:
    """dlogits_k = weight/p dL_k,   dh_{k-1} = module'_k(shared_headᵀ dlogits_k, dh_k), from the last module to the first"""
    h, modules, weights, detach_head = saved
    xp, (b, s, _), stacks = xp_of(h), h.shape, dict(zip(MODULE, weights[:-2], strict=True))
    dembed_tokens, dshared_head, grads, dx = 0 * weights[-2], 0 * weights[-1], [], 0 * h[:, :0, :]
    for s_module, s_head, s_loss, share in reversed(modules):
        dlast, dhead = activation_bwd(linear_bwd, cross_entropy_bwd(dloss * share, s_loss), s_head)
        dlast = xp.reshape(dlast, (b, dlast.shape[0] // max(b, 1), dlast.shape[1]))
        dx, dembed, own = module_bwd(dlast, longer(dx, dlast.shape[1] - dx.shape[1]), s_module)
        grads.insert(0, own)
        if not detach_head:
            dembed_tokens, dshared_head = dembed_tokens + dembed, dshared_head + dhead
    given = [name for name in MODULE if stacks[name] is not None and name != CONSTANT]
    return longer(dx, s - dx.shape[1]), *(stack_of([own[n] for own in grads], stacks[n]) for n in given), dembed_tokens, dshared_head


def mtp_loss_regret(
    h: Array, ids: Array, labels: Array | None, positions: Array, cu_seqlens: Array | None, *weights: Array, topk_idx: Array, **attrs: Any
) -> Array:
    """[p,b,s]: by how much a module's router scores would have to move for topk_idx to be the choice; inf if a row without a token chose"""
    xp, s, found = xp_of(h), h.shape[1], []
    attrs = {"concat": "embed_first", "chain": "post_norm", **attrs}

    def part(x: Array, *arrays: Array, **how: Any) -> tuple:
        found.append(longer(block_regret(x, *arrays, **how), s - x.shape[1]))
        return block_fwd(x, *arrays, **how)

    for k, last, _, _ in chain_by(h, ids, (positions, cu_seqlens), weights[:-1], topk_idx, attrs, part):
        beyond = xp.arange(s, device=device(ids)) >= last.shape[1]
        wrong = beyond & xp.any(topk_idx[k - 1, ...] != -1, axis=-1)
        found[-1] = xp.where(wrong, xp.full_like(found[-1], float("inf")), found[-1])
    return xp.stack(found, axis=0)


def _case(name: str, p: int, b: int, s: int, note: str = "", labels: tuple = (), lora: bool = True, **how: Any) -> Case:
    router = how.pop("router", "noaux_tc")
    dims, draws = module_draws(lora, router)
    packing, places = sequence_draws(how.pop("starts", (0,)), how.pop("ends", ()))
    draws |= places | {"dloss": ("normal", 1.0)} | ({"labels": ("positions", *labels)} if labels else {})
    return Case(name, {"p": p, "b": b, "s": s, **dims, **packing}, draws, {**SIZES, **(V3 if router else PLAIN), **how}, note)


mtp_loss = declare(
    Op(
        "mtp.loss",
        mtp_loss_fwd,
        mtp_loss_bwd,
        (
            _case("v3", 1, 2, 4, "one module, λ = 0.3, divided by all tokens", starts=(0, 3000)),
            _case("two", 2, 1, 5, "a chain of two"),
            _case(
                "pre-norm", 2, 1, 5, "a chain before the norms, [hidden; embedding]", router=None, chain="pre_norm", concat="hidden_first"
            ),
            _case("masked", 1, 1, 6, "labels that do not count", (0, 3, -100, 9, -100, 16), weight=0.1),
            _case(
                "counted", 1, 2, 4, "divided by the rows that count", (2, 5, -100, 7, 1, -100, 0, -100), router=None, denominator="counted"
            ),
            _case("packed", 2, 1, 7, "sequences of 1, 4 and 2 tokens: no loss across them", ends=(0, 1, 5, 7)),
            _case("short", 3, 1, 3, "as many modules as tokens: the last have none to read, and add nothing", lora=False, router=None),
            _case("detached", 1, 1, 4, "embedding and head get no gradient", router=None, detach_head=True),
        ),
        "p*(2*b*s*(2*d*d+d*(q+cr)+q*hq+c*hkv+d*hv+d*e+3*d*(i+num_experts_per_tok*f+g)+v*d)+2*b*s*s*(hq+hv))",
        "DeepSeek-V3 paper eq. 21-25; spec §5",
        vary="",
        choice=("topk_idx", mtp_loss_regret),
    )
)
