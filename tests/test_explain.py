"""What a subject is told beyond its verdict: numbers that are measured, what hides below the tolerance, two bugs, the error's look."""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from leadline.golden.bugs import bugs_of
from leadline.golden.draw import draw_case
from leadline.golden.explain import Explanation, consolidate, explain, hidden
from leadline.golden.judge import FAIL, PASS, Question, Returned, as_returned, judge
from leadline.golden.montecarlo import Noise, noisy_inputs
from leadline.golden.precision import PRECISIONS
from leadline.golden.vectors import make
from leadline.golden.verify import Report, verify
from leadline.ref import OPS, Case, attention_fwd, moe_layer_fwd, rmsnorm_fwd
from variants import VARIANTS

Array = np.ndarray


def told(subject: Callable, op: str, precision: str = "fp32", **options: Any) -> tuple[Report, list[Explanation]]:
    """The report on a forward, and what explains its failing cases, the best first."""
    report = verify(subject, op=op, precision=precision, direction="forward", **options)
    return report, [e for group in report.groups() for e, _ in report.explanations(group)]


# numbers


def attention_scaled(by: float) -> Callable:
    def attention(q: Array, k: Array, v: Array, *, scale: float = 0.0, **attrs: Any) -> Any:
        return attention_fwd(q, k, v, scale=(scale or q.shape[-1] ** -0.5) * by, **attrs)[0]

    return attention


@pytest.mark.parametrize("by", [1.0002, 0.9, 1.3])
def test_a_softmax_scale_is_measured(by: float) -> None:
    """The factor to a part in a million, and nothing else is named first."""
    report, (first, *_) = told(attention_scaled(by), "attention")
    assert report.verdict == FAIL
    assert (first.id, first.kind) == ("softmax scale", "estimate")
    assert first.coefficient == pytest.approx(by, rel=1e-6)


@pytest.mark.parametrize("eps", [1.7e-5, 3e-6])
def test_an_epsilon_is_measured(eps: float) -> None:
    """Far off, too: the value, within what the deviation says."""
    _, (first, *_) = told(lambda x, weight, *, eps_=eps, **rest: rmsnorm_fwd(x, weight, **{**rest, "eps": eps_})[0], "rmsnorm")
    assert first.id == "eps"
    assert first.coefficient == pytest.approx(eps / 1e-6, rel=0.05)
    assert "--attr eps=" in first.mend


def test_a_shared_experts_weight_is_measured() -> None:
    """The mistake that cost half a point of GSM8K, at a factor that no catalogue has."""

    def layer(**arrays: Any) -> Any:
        if arrays.get("shared_down") is not None:
            arrays["shared_down"] = arrays["shared_down"] * np.float32(0.7)
        return moe_layer_fwd(**arrays)[0]

    _, (first, *_) = told(layer, "moe.layer", cases=["v3"] if any(c.name == "v3" for c in OPS["moe.layer"].cases) else None)
    assert first.id == "weight of the shared experts"
    assert first.coefficient == pytest.approx(0.7, rel=1e-4)


# below the tolerance

LARGE = Case("large", {"b": 2, "s": 96, "t": 96, "h": 8, "g": 8, "k": 96, "v": 64}, dict.fromkeys("qkv", ("normal", 1.0)), {"causal": True})


def large_attention(precision: str, by: float, seed: int = 5) -> tuple[Question, dict[str, Returned], Any]:
    """A larger case of attention answered in the claimed precision's own arithmetic, its softmax scale off by a factor."""
    op, p = OPS["attention"], PRECISIONS[precision]
    inputs = draw_case(op, LARGE, "forward", p, 1)
    vector = make(op, LARGE, "forward", p, 1)
    attrs = {**LARGE.attrs, "scale": 96**-0.5 * by}
    outputs = op.run("forward", noisy_inputs(inputs, Noise(p, seed)), attrs)
    question = Question(op, "forward", inputs, LARGE.attrs, p)
    return question, as_returned(question, {k: np.asarray(v) for k, v in outputs.items()}), vector.band


def test_a_scale_below_the_tolerance_is_measured_in_a_pass() -> None:
    """bfloat16, a scale 0.05% off: no element is out of bounds, yet the number is known to a third of that."""
    question, returned, band = large_attention("bf16", 1.0005)
    assert judge(question, returned, band).verdict == PASS
    (first, *_) = hidden(question, returned, band)
    assert first.id == "softmax scale"
    assert first.coefficient == pytest.approx(1.0005, abs=1.7e-4)


def test_a_right_subject_is_told_nothing() -> None:
    """The same without the mistake: silence, at every seed."""
    for precision in ("fp32", "bf16", "bf16-eager"):
        for seed in range(4):
            question, returned, band = large_attention(precision, 1.0, seed)
            assert judge(question, returned, band).verdict == PASS
            assert hidden(question, returned, band) == []


QUIET = [(v, p) for v in VARIANTS if v.op in ("rmsnorm", "attention", "swiglu", "linear", "router.noaux_tc") for p in ("fp32", "bf16")]


@pytest.mark.parametrize(("variant", "precision"), [pytest.param(v, p, id=f"{v.id}-{p}") for v, p in QUIET if p in v.precisions][::5])
def test_correct_implementations_are_told_nothing(variant: Any, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall: every fifth correct variant of five ops, every case probed, not only the largest."""
    module = importlib.import_module("leadline.golden.verify")
    found: list[Explanation] = []

    def probing(question: Question, returned: Any, band: Any) -> Any:
        judgement = judge(question, returned, band)
        found.extend(hidden(question, returned, band))
        return judgement

    monkeypatch.setattr(module, "judge_closely", probing)
    subject = variant.at(precision)
    report = verify(subject, op=variant.op, precision=precision, direction=variant.direction, seeds=(3,), explained=False)
    assert report.count(PASS)
    assert found == []


# two at once


def test_two_bugs_at_once_are_both_named() -> None:
    """An output with two known bugs of small effect, which neither explains alone."""
    op = OPS["attention"]
    question, _, band = large_attention("fp32", 1.0)
    truth, differences = band.truth, {}
    exact = {k: x.astype(np.float64) for k, x in question.inputs.items()}
    for bug in bugs_of(op, "forward"):
        try:
            outputs = bug.variant(op).run("forward", exact, {**question.attrs, **bug.attrs})
        except (ValueError, TypeError):
            continue
        apart = {k: outputs[k] - truth[k] for k in band.sigma if outputs[k].shape == truth[k].shape}
        size = max(float(np.nanmax(np.abs(d))) if np.all(np.isfinite(d)) else np.inf for d in apart.values())
        if 0 < size < np.inf:
            differences[bug.id] = apart
    assert len(differences) > 3
    a, b = list(differences)[:2]
    both = {k: truth[k] + differences[a][k] + differences[b][k] for k in band.sigma}
    returned = as_returned(question, {**truth, **both})
    assert judge(question, returned, band).verdict == FAIL
    found = explain(question, returned, band)
    assert [e.kind for e in found][:1] == ["pair"], found
    assert set(found[0].id.split(" + ")) == {a, b}


# fingerprints


def norm(change: Callable[[Array], Array]) -> Callable:
    return lambda x, weight, **attrs: change(rmsnorm_fwd(x, weight, **attrs)[0])


def zero_tail(y: Array) -> Array:
    y = y.copy()
    y[:, 100:] = 0
    return y


LOOKS: dict[str, tuple[Callable[[Array], Array], str, str]] = {
    "sign": (lambda y: -y, "sign", "wrong sign everywhere"),
    "ln 2": (lambda y: (y / np.log(2)).astype(np.float32), "constant-factor", "which is 1/(ln 2)"),
    "fnuz": (lambda y: (y * (448 / 240)).astype(np.float32), "constant-factor", "448/240"),
    "unnamed": (lambda y: (y * 1.37).astype(np.float32), "constant-factor", "1.37"),
    "reversed": (lambda y: y[:, ::-1], "order", "reversed"),
    "shifted": (lambda y: np.roll(y, -1, axis=1), "order", "shifted by 1"),
    "tail": (zero_tail, "place", "channel 100 and on"),
}


@pytest.mark.parametrize("look", LOOKS)
def test_the_errors_look_is_told(look: str) -> None:
    """Where no known bug fits: factor, sign, order, place, in words."""
    change, id, says = LOOKS[look]
    report, found = told(norm(change), "rmsnorm")
    assert report.verdict == FAIL
    first = next(e for e in found if e.kind == "fingerprint")
    assert first.id == id
    assert says in str(first)


def test_a_transposed_result_is_told() -> None:
    _, found = told(lambda x, weight: (x @ weight.T).T.reshape(len(x), -1), "linear", cases=["ragged"])
    assert any(e.id == "transposed" for e in found)


# ranking


def test_the_strongest_evidence_is_kept_and_the_order_is_the_cases() -> None:
    """What explains most cases comes first; of one explanation the case with most significance is shown; others' order is theirs."""
    a, strong, b = Explanation("a", "A."), Explanation("a", "A.", significance=50.0), Explanation("b", "B.")
    assert [(e.id, n, e.significance) for e, n in consolidate([[b, a], [strong], [strong, b]])] == [("a", 3, 50.0)]
    assert [e.id for e, _ in consolidate([[b, a], [b, a]])] == ["b", "a"]
    assert consolidate([]) == []


def test_a_case_that_passed_counts_against_what_it_would_have_failed() -> None:
    """Of two that explain the same failing cases: the one that would have passed what passed. Then the one that would fail what failed."""
    a, b = Explanation("a", "A.", fails=("one", "two", "three")), Explanation("b", "B.", fails=("one", "two"))
    assert [e.id for e, _ in consolidate([[a, b], [a, b]])] == ["a", "b"]
    assert [(e.id, n) for e, n in consolidate([[a, b], [a, b]], passed=["three"], failed=["one", "two"])] == [("b", 2)]
    assert [e.id for e, _ in consolidate([[b, a]], passed=["four"], failed=["one", "two", "three"])] == ["a", "b"]
    rival = Explanation("c", "C.")  # explains one case less, and nothing speaks against it
    assert [e.id for e, _ in consolidate([[a], [a, rival]], passed=["three"])] == ["a", "c"]
    assert [e.id for e, _ in consolidate([[a], [a, rival]], passed=["two", "three"])] == ["c"]


def test_where_an_error_lies_outranks_nothing_and_intermediates_are_told_beside() -> None:
    """place explains every failing case, and says least."""
    place, bug = Explanation("place", "There.", kind="fingerprint"), Explanation("a", "A.")
    way = Explanation("intermediate q", "q is wrong.", kind="intermediate")
    assert [e.id for e, _ in consolidate([[place], [place], [bug, place]])] == ["a"]
    assert [(e.id, n) for e, n in consolidate([[place, way], [place, way]])] == [("place", 2), ("intermediate q", 2)]
    assert [e.id for e, _ in consolidate([[way], [bug, way]])] == ["a", "intermediate q"]


def router_with(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable:
    """V3's router with attributes that depend on what was asked for."""

    def router(logits: Array, bias: Array, **attrs: Any) -> Any:
        return OPS["router.noaux_tc"].fwd(logits, bias, **{**attrs, **change(attrs)})[0]

    return router


def yarn_if_far(x: Array, positions: Array, **attrs: Any) -> Any:
    near = int(positions.max()) < attrs["original_max_position_embeddings"]
    return OPS["rope"].fwd(x, positions, **{**attrs, "factor": 1.0 if near else attrs["factor"]})[0]


def no_gradient_of_one(logits: Array, topk_idx: Array, dtopk_weight: Array, **attrs: Any) -> Any:
    op = OPS["router.softmax"]
    dlogits = op.run("backward", {"logits": logits, "topk_idx": topk_idx, "dtopk_weight": dtopk_weight}, attrs)["dlogits"]
    return dlogits * np.float32(topk_idx.shape[1] > 1)


def no_eps(logits: Array, bias: Array, topk_idx: Array, dtopk_weight: Array, **attrs: Any) -> Any:
    given = {"logits": logits, "bias": bias, "topk_idx": topk_idx, "dtopk_weight": dtopk_weight}
    return OPS["router.noaux_tc"].run("backward", given, {**attrs, "denominator_eps": 0.0})["dlogits"]


def unsigned(x: Array, **attrs: Any) -> Any:
    return np.where(x == 0, np.float32(0), OPS["cast.e2m1"].fwd(x, None, **attrs)[0])


def never_negative(x: Array, **attrs: Any) -> Any:
    y = OPS["cast.e2m1"].fwd(x, None, **attrs)[0]
    return np.where(y == 0, np.float32(0), y)


RIVALS: dict[str, tuple[str, str, Callable]] = {  # each agrees with another bug on every case that fails
    "norm-xor-scale": ("router.noaux_tc", "forward", router_with(lambda a: {"routed_scaling_factor": 1.0} if a["norm_topk_prob"] else {})),
    "scale-only-if-renorm": (
        "router.noaux_tc",
        "forward",
        router_with(lambda a: {} if a["norm_topk_prob"] else {"routed_scaling_factor": 1.0}),
    ),
    "yarn-by-sequence-length": ("rope", "forward", yarn_if_far),
    "gate-grad-topk1-zero": ("router.softmax", "backward", no_gradient_of_one),
    "norm-eps-missing": ("router.noaux_tc", "backward", no_eps),
    "zero-sign-lost": ("cast.e2m1", "forward", unsigned),  # these two no value tells from what is right
    "fp4-negative-zero-dropped": ("cast.e2m1", "forward", never_negative),
}


@pytest.mark.parametrize("bug", RIVALS)
def test_a_bug_is_told_from_its_rivals(bug: str) -> None:
    """What passes tells apart what fails alike."""
    op, direction, subject = RIVALS[bug]
    report = verify(subject, op=op, precision="fp32", direction=direction)
    (group,) = report.groups()
    assert [e.id for e, _ in report.explanations(group)][:1] == [bug], report


def test_a_candidate_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each known bug and each other value of an attribute: one run in float64 for a failing case, and a band only for those near by."""
    module, asked, bands = importlib.import_module("leadline.golden.candidates"), [], []

    def truth_of(op: Any, direction: str, inputs: Any, attrs: Any) -> Any:
        asked.append((id(op.fwd), id(op.bwd), tuple(sorted((k, str(v)) for k, v in attrs.items()))))
        return importlib.import_module("leadline.golden.band").truth_of(op, direction, inputs, attrs)

    def band_of(*given: Any, **keywords: Any) -> Any:
        bands.append(given)
        return importlib.import_module("leadline.golden.band").band_of(*given, **keywords)

    monkeypatch.setattr(module, "truth_of", truth_of)
    monkeypatch.setattr(module, "band_of", band_of)
    op = OPS["rope"]
    vector = make(op, next(c for c in op.cases if c.name == "yarn-v3"), "forward", PRECISIONS["fp32"])
    wrong = op.run("forward", {k: x.astype(np.float64) if x.dtype.kind == "f" else x for k, x in vector.inputs.items()}, {"factor": 1.0})
    question = Question(op, "forward", vector.inputs, vector.case.attrs, PRECISIONS["fp32"])
    (first, *_) = explain(question, as_returned(question, wrong), vector.band)
    assert first.id == "yarn-ignored"
    assert len(asked) == len(set(asked)) > 10
    assert 0 < len(bands) < len(asked) / 2


def test_a_band_for_another_decision_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two subjects that give the experts in the same other order are held to one band; one that permutes them otherwise, to its own."""
    module, made = importlib.import_module("leadline.golden.decisions"), []
    original = module.band_of
    monkeypatch.setattr(module, "band_of", lambda *given, **keywords: made.append(given[-1]) or original(*given, **keywords))
    op = OPS["router.noaux_tc"]
    v = make(op, next(c for c in op.cases if c.name == "v3"), "forward", PRECISIONS["fp32"])
    question = Question(op, "forward", v.inputs, v.case.attrs, v.precision)

    def verdict(order: Any, weights: Any) -> str:
        truth = {**v.band.truth, "topk_idx": v.band.truth["topk_idx"][:, order], "topk_weight": v.band.truth["topk_weight"][:, weights]}
        return judge(question, as_returned(question, truth), v.band).verdict

    as_they_are, reversed_, rotated = slice(None), slice(None, None, -1), np.r_[1 : v.band.truth["topk_idx"].shape[1], 0]
    assert verdict(as_they_are, as_they_are) == PASS
    assert not made
    assert [verdict(reversed_, reversed_), verdict(reversed_, reversed_), verdict(reversed_, as_they_are)] == [PASS, PASS, FAIL]
    assert len(made) == 1
    assert verdict(rotated, rotated) == PASS
    assert len(made) == 2
