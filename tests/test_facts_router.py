"""What must hold of the router. Each fact is held by the reference and kills a named mutant.

Where rounding could turn a decision (the oracle's margin says so), a row is left out; all is in float64.
"""

from collections.abc import Callable
from dataclasses import replace
from math import fsum
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from leadline.golden import strategies
from leadline.golden.bugs import bugs_of
from leadline.golden.draw import Source
from leadline.ref import OPS, Op
from oracles import router as oracle

ROUTER = OPS["router.noaux_tc"]
UNIT = 2.0**-53


class Asked(NamedTuple):
    """logits[n,e] and bias[e] in float64, attributes, and a source for what else is drawn."""

    logits: np.ndarray
    bias: np.ndarray
    attrs: dict[str, Any]
    seed: int

    def __repr__(self) -> str:
        return f"Asked(logits{list(self.logits.shape)}, {self.attrs}, seed={self.seed})"


@st.composite
def asked(draw: st.DrawFn) -> Asked:
    """The declared cases at small sizes, every scoring, with and without normalisation"""
    q = draw(strategies.questions(ROUTER, empty=False, large=4200).filter(lambda q: q.inputs["logits"].size <= 4200))
    attrs = {
        **q.attrs,
        "norm_topk_prob": draw(st.booleans()),
        "scoring": draw(st.sampled_from(("sigmoid", "softmax", "sqrtsoftplus"))),
        "denominator_eps": draw(st.sampled_from((0.0, 1e-20))),
    }
    return Asked(q.inputs["logits"].astype(np.float64), q.inputs["bias"].astype(np.float64), attrs, q.seed)


def route(op: Op, q: Asked, **changed: Any) -> tuple[np.ndarray, np.ndarray]:
    arrays = {"logits": q.logits, "bias": q.bias, **{k: changed.pop(k) for k in ("logits", "bias") if k in changed}}
    return op.fwd(arrays["logits"], arrays["bias"], **{**q.attrs, **changed})[0]


def settled(q: Asked, shift: float = 0.0) -> np.ndarray:
    """[n]: rows whose decision float64 rounding cannot turn: a score errs by 4 units, its sum with the bias by one more, a group's by
    twice that; 12 units of the largest, on either side of the gap."""
    size = np.max(np.abs(q.bias)) + abs(shift) + np.sqrt(1.0 + np.max(q.logits, initial=0.0))
    return oracle.selection_margin({"logits": q.logits, "bias": q.bias}, q.attrs) > 24 * UNIT * size


def plain_scores(q: Asked) -> np.ndarray:
    """The scores by their textbook formulas (to 4 units or so)"""
    if q.attrs["scoring"] == "softmax":
        powers = np.exp(q.logits - q.logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)
    sigmoid = 1 / (1 + np.exp(-q.logits))
    return sigmoid if q.attrs["scoring"] == "sigmoid" else np.sqrt(np.logaddexp(0.0, q.logits))


def some_choice(q: Asked) -> np.ndarray:
    """Any k distinct experts a row, in any order"""
    return np.argsort(Source(f"choice {q.seed}").uniform(q.logits.shape), axis=1)[:, : q.attrs["k"]]


def tokens_are_independent(op: Op, q: Asked) -> None:
    """A permutation of the tokens permutes the rows of both outputs, and one row alone gives what it gives among others."""
    idx, weight = route(op, q)
    order = np.argsort(Source(f"tokens {q.seed}").uniform((len(q.logits),)))
    for rows in (order, order[:1]):
        moved_idx, moved = route(op, q, logits=q.logits[rows])
        np.testing.assert_array_equal(moved_idx, idx[rows])
        np.testing.assert_array_equal(moved, weight[rows])


def experts_are_alike(op: Op, q: Asked) -> None:
    """A permutation of whole groups, and of the experts inside each, renames the chosen experts and leaves their order."""
    e, g = q.logits.shape[1], q.attrs["n_group"]
    source = Source(f"experts {q.seed}")
    inside = np.argsort(source.uniform((g, e // g)), axis=1) + np.arange(g)[:, None] * (e // g)
    order = inside[np.argsort(source.uniform((g,)))].reshape(-1)  # new expert i is old expert order[i]
    idx, _ = route(op, q)
    moved, _ = route(op, q, logits=q.logits[:, order], bias=q.bias[order])
    rows = settled(q)
    np.testing.assert_array_equal(order[moved][rows], idx[rows])


def a_common_bias_changes_nothing(op: Op, q: Asked) -> None:
    """The same number added to every expert's bias leaves the choice (masked groups are filled with -inf) and the weights."""
    idx, weight = route(op, q, mask_fill="-inf")
    for shift in (-3.0, 5.0):
        moved_idx, moved = route(op, q, mask_fill="-inf", bias=q.bias + shift)
        rows = settled(q._replace(attrs={**q.attrs, "mask_fill": "-inf"}), shift)
        np.testing.assert_array_equal(moved_idx[rows], idx[rows])
        np.testing.assert_array_equal(moved[rows], weight[rows])


def weights_sum_to_the_factor(op: Op, q: Asked) -> None:
    """norm_topk_prob, eps=0: the weights are positive and sum to routed_scaling_factor. k - 1 sums, a quotient, a product: k + 1 units."""
    k, factor = q.attrs["k"], q.attrs["routed_scaling_factor"]
    _, weight = route(op, q, norm_topk_prob=True, denominator_eps=0.0)
    assert np.all(weight >= 0)
    for row in weight:
        assert abs(fsum(row.tolist()) - factor) <= (k + 1) * UNIT * factor * (1 + 1e-12)


def few_groups_are_touched(op: Op, q: Asked) -> None:
    """The chosen experts lie in topk_group groups at most."""
    idx, _ = route(op, q, mask_fill="-inf")
    size = q.logits.shape[1] // q.attrs["n_group"]
    assert all(len(set(row)) <= q.attrs["topk_group"] for row in (idx // size).tolist())


def bias_never_weighs(op: Op, q: Asked) -> None:
    """For a given choice the weights do not depend on the bias."""
    choice = some_choice(q)
    np.testing.assert_array_equal(route(op, q, topk_idx=choice)[1], route(op, q, topk_idx=choice, bias=1.0 - 2.0 * q.bias)[1])


def choices_are_distinct(op: Op, q: Asked) -> None:
    """Every row has k distinct indices from 0 to e - 1, int64."""
    idx, weight = route(op, q)
    assert idx.dtype == np.int64
    assert idx.shape == weight.shape == (len(q.logits), q.attrs["k"])
    assert np.all((idx >= 0) & (idx < q.logits.shape[1]))
    assert all(len(set(row)) == q.attrs["k"] for row in idx.tolist())


def lowest_index_wins_ties(op: Op, q: Asked) -> None:
    """Logits of few values, no bias: of two experts of a group that tie, the lower is chosen first; groups that tie in whole likewise. All
    experts alike: the first k are chosen, in order."""
    n, e = q.logits.shape
    bias = np.zeros(e)
    idx, _ = route(op, q, logits=np.full((n, e), q.logits[0, 0]), bias=bias)
    np.testing.assert_array_equal(idx, np.broadcast_to(np.arange(q.attrs["k"]), idx.shape))
    logits = Source(f"ties {q.seed}").integers((n, e), -1, 2).astype(np.float64)
    idx, _ = route(op, q, logits=logits, bias=bias)
    size = e // q.attrs["n_group"]
    for row, chosen in zip(logits, idx.tolist(), strict=True):
        for slot, i in enumerate(chosen):
            group = range(i // size * size, i)
            assert all(j in chosen[:slot] for j in group if row[j] == row[i]), (
                f"{i} before its equals {[j for j in group if row[j] == row[i]]}"
            )


def a_given_choice_is_kept(op: Op, q: Asked) -> None:
    """Routing replay: a given topk_idx is returned as it is, and weighed slot by slot."""
    choice = some_choice(q)
    idx, weight = route(op, q, topk_idx=choice)
    np.testing.assert_array_equal(idx, choice)
    reverse_idx, reverse = route(op, q, topk_idx=choice[:, ::-1], norm_topk_prob=False)
    np.testing.assert_array_equal(reverse_idx, choice[:, ::-1])
    np.testing.assert_array_equal(reverse[:, ::-1], route(op, q, topk_idx=choice, norm_topk_prob=False)[1])
    idx, weight = route(op, q)
    np.testing.assert_array_equal(route(op, q, topk_idx=idx)[1], weight)


def softmax_ignores_a_common_logit(op: Op, q: Asked) -> None:
    """scoring="softmax": the same number added to a row's logits changes nothing (integers, so that the sum is exact)."""
    logits = np.round(q.logits)
    idx, weight = route(op, q, logits=logits, scoring="softmax")
    for shift in (-1000.0, 1000.0):
        moved_idx, moved = route(op, q, logits=logits + shift, scoring="softmax")
        np.testing.assert_array_equal(moved_idx, idx)
        np.testing.assert_array_equal(moved, weight)


def choices_descend(op: Op, q: Asked) -> None:
    """topk_idx is in descending order of s + bias; no expert of the groups that were chosen from, and left out, beats one that was
    chosen."""
    idx, _ = route(op, q, mask_fill="-inf")
    t = plain_scores(q) + q.bias
    slack = 24 * UNIT * (np.max(np.abs(q.bias)) + np.sqrt(1.0 + np.max(q.logits, initial=0.0)))
    chosen = np.take_along_axis(t, idx, axis=1)
    assert np.all(np.diff(chosen, axis=1) <= slack)
    size = q.logits.shape[1] // q.attrs["n_group"]
    for row, numbers in zip(t, idx, strict=True):
        groups = set((numbers // size).tolist())
        left_out = [v for i, v in enumerate(row.tolist()) if i // size in groups and i not in numbers]
        assert max(left_out, default=-np.inf) <= row[numbers[-1]] + slack


def weights_are_proportional_to_scores(op: Op, q: Asked) -> None:
    """Weight over score is one number a row: factor, or factor over the sum of the chosen scores and eps. The scores here err by 8 units
    (by the logit's size more where it is the argument of exp alone), both sides alike."""
    idx, weight = route(op, q)
    s = np.take_along_axis(plain_scores(q), idx, axis=1)
    total = s.sum(axis=1, keepdims=True) + q.attrs["denominator_eps"] if q.attrs["norm_topk_prob"] else 1.0
    expected = q.attrs["routed_scaling_factor"] * s / total
    assert np.all(np.abs(weight - expected) <= (q.attrs["k"] + 16 + 2 * np.max(np.abs(q.logits))) * 2 * UNIT * expected)


def bug(id: str) -> Op:
    """A known bug; one that is a matter of attributes has them forced."""
    found = next(b for b in bugs_of(ROUTER, "forward") if b.id == id)
    return (
        found.variant(ROUTER) if found.fwd else mutant(lambda logits, bias, **attrs: ROUTER.fwd(logits, bias, **{**attrs, **found.attrs}))
    )


def mutant(fwd: Callable) -> Op:
    fwd.sig = ROUTER.sig  # type: ignore[attr-defined]
    return replace(ROUTER, fwd=fwd)


@mutant
def first_row_decides(logits: np.ndarray, bias: np.ndarray, **attrs: Any) -> Any:
    """Every token gets the first one's experts."""
    idx = ROUTER.fwd(logits, bias, **attrs)[0][0]
    return ROUTER.fwd(logits, bias, **{**attrs, "topk_idx": np.repeat(idx[:1], len(idx), axis=0)})


@mutant
def interleaved_groups(logits: np.ndarray, bias: np.ndarray, **attrs: Any) -> Any:
    """Group g has the experts g, g + n_group, … instead of consecutive ones."""
    order = np.arange(logits.shape[1]).reshape(-1, attrs["n_group"]).T.reshape(-1)
    idx = ROUTER.fwd(logits[:, order], bias[order], **attrs)[0][0]
    return ROUTER.fwd(logits, bias, **{**attrs, "topk_idx": order[idx]})


@mutant
def one_expert_k_times(logits: np.ndarray, bias: np.ndarray, **attrs: Any) -> Any:
    """The best expert fills every slot: it was not struck off."""
    (idx, weight), saved = ROUTER.fwd(logits, bias, **attrs)
    return (np.repeat(idx[:, :1], idx.shape[1], axis=1), weight), saved


@mutant
def replay_ignored(logits: np.ndarray, bias: np.ndarray, **attrs: Any) -> Any:
    """A given topk_idx is chosen anew."""
    return ROUTER.fwd(logits, bias, **{k: v for k, v in attrs.items() if k != "topk_idx"})


@mutant
def sorted_by_index(logits: np.ndarray, bias: np.ndarray, **attrs: Any) -> Any:
    """The chosen experts in order of their numbers."""
    return ROUTER.fwd(logits, bias, **{**attrs, "topk_idx": np.sort(ROUTER.fwd(logits, bias, **attrs)[0][0], axis=1)})


FACTS: list[tuple[Callable[[Op, Asked], None], Op]] = [
    (tokens_are_independent, first_row_decides),
    (experts_are_alike, interleaved_groups),
    (a_common_bias_changes_nothing, bug("group-mask-zero")),
    (weights_sum_to_the_factor, bug("routed-scale-missing")),
    (weights_sum_to_the_factor, bug("norm-topk-missing")),
    (few_groups_are_touched, bug("group-ignored")),
    (bias_never_weighs, bug("bias-leaks-into-weights")),
    (choices_are_distinct, one_expert_k_times),
    (lowest_index_wins_ties, bug("topk-tie-break")),
    (a_given_choice_is_kept, replay_ignored),
    (softmax_ignores_a_common_logit, mutant(lambda logits, bias, **attrs: ROUTER.fwd(logits, bias, **{**attrs, "scoring": "sigmoid"}))),
    (choices_descend, sorted_by_index),
    (choices_descend, bug("bias-ignored")),
    (weights_are_proportional_to_scores, bug("scale-only-if-renorm")),
    (weights_are_proportional_to_scores, bug("softmax-instead-of-sigmoid")),
]
NAMED = list(dict.fromkeys(fact for fact, _ in FACTS))


@pytest.mark.parametrize("fact", NAMED, ids=lambda f: f.__name__)
@given(q=asked())
def test_holds(fact: Callable, q: Asked) -> None:
    """The reference holds the fact, which its own docstring states."""
    fact(ROUTER, q)


@pytest.mark.parametrize(("fact", "broken"), FACTS, ids=[f"{fact.__name__}-{i}" for i, (fact, _) in enumerate(FACTS)])
def test_kills(fact: Callable, broken: Op, killed: Callable) -> None:
    """The fact fails for its mutant on some input."""
    killed(lambda q: fact(broken, q), asked())
