"""Bugs of multi-token prediction: what a module reads, in which order, after which norm; and which rows its loss counts."""

from collections.abc import Callable
from typing import Any

from ...ref.linear import linear_fwd
from ...ref.loss import cross_entropy_fwd
from ...ref.mtp import mtp, mtp_bwd, mtp_fwd
from ...ref.mtp_loss import chain_by, longer, mtp_loss, mtp_loss_bwd, targets_of
from ...ref.xp import Array, xp_of
from . import Bug
from .model import Given, Result, with_arguments

NAMES = tuple(t.name for t in mtp.inputs)


def losses_of(targets: Callable[[Array, Array | None, int, int], Array]) -> Callable:
    """The loss with other targets: targets(labels, cu_seqlens, k, ignore_index), as targets_of."""

    def fwd(h: Array, ids: Array, labels: Array | None, positions: Array, cu: Array | None, *weights: Any, **attrs: Any) -> Result:
        o, own, (*stacks, shared_head) = {**mtp_loss.defaults, **attrs}, ids if labels is None else labels, weights
        xp, (b, s, d), idx = xp_of(h), h.shape, o.pop("topk_idx", None)
        total, p = o["denominator"] == "total", stacks[0].shape[0]
        loss, chosen, saved = 0 * xp.sum(h), [], []
        for k, last, found, s_module in chain_by(h, ids, (positions, cu), tuple(stacks), idx, o):
            n = last.shape[1]
            logits, s_head = linear_fwd(xp.reshape(last, (b * n, d)), shared_head)
            target = xp.reshape(targets(own, cu, k, o["ignore_index"]), (b * n,))
            how: Any = {"ignore_index": o["ignore_index"], "denominator": "rows" if total else "counted", "empty": "zero"}
            mean, s_loss = cross_entropy_fwd(logits, target, **how)
            share = o["weight"] / p * (n / s if total else 1.0)
            loss = loss + share * mean
            chosen.append(longer(found, s - n, -1))
            saved.append((s_module, s_head, s_loss, share))
        none = xp.zeros((0, b, s, o["num_experts_per_tok"]), dtype=xp.int64)
        return (loss, xp.stack(chosen, axis=0) if chosen else none), (h, saved, weights, o["detach_head"])

    return fwd


def first_zeroed(*arrays: Any, **attrs: Any) -> Result:
    """Rows at position 0 read a token beyond the vocabulary, whose embedding is 0."""
    given, depth = dict(zip(NAMES, arrays, strict=True)), attrs.get("depth", 1)
    xp, ids, v = xp_of(given["ids"]), given["ids"], given["embed_tokens"].shape[0]
    read = xp.where(given["positions"] == 0, xp.full_like(ids[:, depth:], v), ids[:, depth:])
    given["ids"] = xp.concat([ids[:, :depth], read], axis=1)
    for name in ("embed_tokens", "shared_head"):
        given[name] = xp.concat([given[name], 0 * given[name][:1, :]], axis=0)
    (logits, h_next, idx), saved = mtp_fwd(*given.values(), **attrs)
    return (logits[..., :v], h_next, idx), saved


def not_shifted(given: Given, attrs: Given) -> tuple[Given, Given]:
    """ids[j] is the token before; a loss keeps its labels."""
    ids = given["ids"]
    labels = {"labels": ids if given["labels"] is None else given["labels"]} if "labels" in given else {}
    return {**given, **labels, "ids": xp_of(ids).concat([ids[:, :1], ids[:, :-1]], axis=1)}, attrs


def shifted_twice(given: Given, attrs: Given) -> tuple[Given, Given]:
    """labels[j] is the token after."""
    own = given["ids"] if given["labels"] is None else given["labels"]
    xp = xp_of(own)
    return {**given, "labels": xp.concat([own[:, 1:], xp.full_like(own[:, :1], attrs["ignore_index"])], axis=1)}, attrs


def all_ones(given: Given, attrs: Given) -> tuple[Given, Given]:
    """A label that does not count is the token itself."""
    ids, labels = given["ids"], given["labels"]
    return {**given, "labels": labels if labels is None else xp_of(ids).where(labels == attrs["ignore_index"], ids, labels)}, attrs


def summed(given: Given, attrs: Given) -> tuple[Given, Given]:
    b, s = given["ids"].shape
    return given, {**attrs, "denominator": "total", "weight": attrs["weight"] * b * s}


def not_averaged(given: Given, attrs: Given) -> tuple[Given, Given]:
    return given, {**attrs, "weight": attrs["weight"] * given["enorm"].shape[0]}


def norms_swapped(given: Given, attrs: Given) -> tuple[Given, Given]:
    return {**given, "enorm": given["hnorm"], "hnorm": given["enorm"]}, attrs


def _loss(id: str, what: str, sources: str, change: Callable[[Given, Given], tuple[Given, Given]]) -> Bug:
    """The loss with other labels or attributes, and its true gradient"""
    return Bug(id, LOSS, what, sources, fwd=with_arguments(mtp_loss, change), bwd=mtp_loss_bwd)


MTP, LOSS, BOTH = ("mtp",), ("mtp.loss",), ("mtp", "mtp.loss")
BUGS = [
    Bug(
        "mtp-concat-order",
        BOTH,
        "eh_proj is fed [hidden; embedding], the paper's order; released weights expect [embedding; hidden].",
        "sgl-project/sglang#6423, #3798; ml-explore/mlx-lm#1469",
        attrs={"concat": "hidden_first"},
    ),
    Bug(
        "mtp-hidden-norm-stage",
        BOTH,
        "What the next module reads is taken before the head's norm instead of after it.",
        "ROCm/ATOM#1764; ml-explore/mlx-lm#1469; waybarrios/vllm-mlx#660",
        attrs={"chain": "pre_norm"},
    ),
    Bug(
        "mtp-pos0-embedding-zeroed",
        MTP,
        "The embedding at position 0 is zeroed although the inputs were shifted already.",
        "vllm-project/vllm#33299, #49938; ROCm/ATOM#147",
        fwd=first_zeroed,
    ),
    Bug(
        "mtp-input-not-shifted",
        MTP,
        "Every row reads the token before the one that is its own: t1…tn instead of t2…t(n+1).",
        "vllm-project/vllm#14137; wyf3/llm_related#20",
        fwd=with_arguments(mtp, not_shifted),
    ),
    Bug(
        "mtp-input-not-shifted",
        LOSS,
        "Every row reads the token before the one that is its own: t1…tn instead of t2…t(n+1).",
        "vllm-project/vllm#14137; wyf3/llm_related#20",
        fwd=with_arguments(mtp_loss, not_shifted),
    ),
    Bug("mtp-norms-swapped", MTP, "enorm and hnorm are swapped.", fwd=with_arguments(mtp, norms_swapped)),
    _loss("mtp-label-double-shift", "Labels are shifted twice: the target of row i is t(i+k+2).", "radixark/miles#2215", shifted_twice),
    _loss(
        "mtp-mask-all-ones",
        "A missing loss mask counts as all ones: labels that do not count train.",
        "modelscope/ms-swift#8192; NVIDIA-NeMo/Megatron-Bridge#6103",
        all_ones,
    ),
    Bug(
        "mtp-pack-boundary",
        LOSS,
        "The shift reaches across the boundary of packed documents: rows whose target lies in the next one train.",
        "pytorch/torchtitan#3392",
        fwd=losses_of(lambda labels, cu_seqlens, k, ignore_index: targets_of(labels, None, k, ignore_index)),
        bwd=mtp_loss_bwd,
    ),
    _loss(
        "mtp-loss-normaliser",
        "The sum over tokens is not averaged.",
        "NVIDIA/Megatron-LM#1532",
        summed,
    ),
    Bug(
        "mtp-loss-normaliser",
        LOSS,
        "Divided by the main model's number of tokens where the rows that count are asked for.",
        "NVIDIA/Megatron-LM#2417, #3159",
        attrs={"denominator": "total"},
    ),
    _loss("mtp-depth-average-missing", "The depths' losses are added up, not averaged: 1/D is missing.", "", not_averaged),
    Bug(
        "mtp-head-grad-leak",
        LOSS,
        "The module's loss moves the shared embedding and head where it should be detached.",
        "verl-project/verl#6432",
        attrs={"detach_head": False},
        directions=("backward",),
    ),
    Bug(
        "mtp-bwd-chain-dropped",
        MTP,
        "What the next module sends back through h_next is left out.",
        bwd=lambda dlogits, dh_next, saved: mtp_bwd(dlogits, 0 * dh_next, saved),
    ),
    Bug(
        "mtp-bwd-embedding-dropped",
        MTP,
        "The shared embedding gets no gradient from the module.",
        bwd=lambda dlogits, dh_next, saved: (*(found := mtp_bwd(dlogits, dh_next, saved))[:-2], 0 * found[-2], found[-1]),
    ),
]
UNWRITTEN = (
    (
        "mtp-position-not-incremented",
        "Rotary scores depend on differences of positions alone: all of a module's positions moved by one leave logits, h_next and every "
        "gradient as they are. It shows in a cache that the module shares with the main model, and mtp has none.",
    ),
    ("mtp-own-vs-main-norm", "The main model's norm is no input of mtp: no variant of it can put that norm's weight in its own's place."),
)
