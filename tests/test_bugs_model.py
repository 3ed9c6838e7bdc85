"""Known bugs of loss, embedding, block, model and MTP: each makes some declared case FAIL, and is named."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import oracles
import pytest
from buggy import check_reference, check_registry, check_told, known, named, question_of, vector
from leadline.golden.band import truth_of
from leadline.golden.bugs import Bug, bugs_of, model, mtp
from leadline.golden.draw import draw_case
from leadline.golden.judge import FAIL, Returned, as_returned, judge
from leadline.golden.precision import PRECISIONS
from leadline.ref.mtp_loss import targets_of
from leadline.ref.op import OPS, Case, Op
from oracles import ORACLES

Array = np.ndarray
AREA = ("cross_entropy", "embedding", "block", "model", "mtp")

# The registry of known bugs of this area.
REGISTRY = (
    "fp16-residual-rescale-repeated",
    "mtp-concat-order",
    "mtp-hidden-norm-stage",
    "mtp-pos0-embedding-zeroed",
    "mtp-input-not-shifted",
    "mtp-position-not-incremented",
    "mtp-label-double-shift",
    "mtp-mask-all-ones",
    "mtp-pack-boundary",
    "mtp-loss-normaliser",
    "mtp-depth-average-missing",
    "mtp-head-grad-leak",
    "mtp-own-vs-main-norm",
    "vocab-parallel-ce-on-gathered",
)


def test_no_bug_of_the_registry_is_dropped() -> None:
    """Every id is a variant, or is listed with the reason why it is none; never both."""
    reasons = check_registry(REGISTRY)
    assert {"mtp-position-not-incremented", "mtp-own-vs-main-norm"} <= reasons.keys()


def in_float64(inputs: dict[str, Array]) -> dict[str, Array]:
    return {k: x.astype(np.float64) if x.dtype.kind == "f" else x for k, x in inputs.items()}


def outputs_of(op: Op, case: Case, way: str, precision: str, bug: Bug | None) -> dict[str, Array]:
    """In float64, with the bug in it"""
    inputs = in_float64(draw_case(op, case, way, PRECISIONS[precision]))
    subject, attrs = (op, case.attrs) if bug is None else (bug.variant(op), {**case.attrs, **bug.attrs})
    with np.errstate(all="ignore"):
        return {k: np.asarray(y) for k, y in subject.run(way, inputs, attrs).items()}


@cache
def right(op: str, case: str, way: str, precision: str) -> dict[str, Array]:
    return outputs_of(OPS[op], next(c for c in OPS[op].cases if c.name == case), way, precision, None)


def fails(op: Op, case: Case, way: str, precision: str, bug: Bug) -> bool:
    """Whether the case fails a subject that has this bug. Where it changes nothing no vector is made, which takes seconds."""
    wrong, truth = outputs_of(op, case, way, precision, bug), right(op.name, case.name, way, precision)
    if all(np.allclose(wrong[name], y, rtol=1e-9, atol=1e-12, equal_nan=True) for name, y in truth.items()):
        return False
    v = vector(op.name, case.name, way, precision)
    question = question_of(v)
    return judge(question, as_returned(question, wrong), v.band).verdict == FAIL


@pytest.mark.parametrize(("op", "way", "bug"), [pytest.param(*k, id="-".join(k)) for k in known(AREA)])
def test_some_case_fails_the_bug(op: str, way: str, bug: str) -> None:
    """At float32 and at bfloat16: each way in which the bug is written, alone. A convention fails likewise where the case has another."""
    for precision in ("fp32", "bf16"):
        for variant in (b for b in bugs_of(OPS[op], way) if b.id == bug):
            found = any(fails(OPS[op], case, way, precision, variant) for case in OPS[op].cases)
            assert found, f"no {precision} case of {op} {way} fails {bug}: {variant.what}"


def test_the_reference_passes_as_itself() -> None:
    """What the variants are compared with: the reference's own outputs, rounded once, pass."""
    check_reference(AREA, cases=1)


def same(op: str, way: str, fwd: Callable | None = None, bwd: Callable | None = None) -> None:
    """The op with these is the reference on every case, to float64's rounding."""
    for case in OPS[op].cases:
        inputs = in_float64(draw_case(OPS[op], case, way, PRECISIONS["fp32"]))
        truth = truth_of(OPS[op], way, inputs, case.attrs)
        for name, y in Bug("frame", (op,), "", fwd=fwd, bwd=bwd).variant(OPS[op]).run(way, inputs, case.attrs).items():
            size = np.abs(truth[name]).max(initial=1e-3)
            np.testing.assert_allclose(np.asarray(y), truth[name], rtol=0, atol=1e-12 * size, err_msg=f"{case.name} {name}")


def test_frames_without_a_mistake_are_the_reference() -> None:
    """What variants are built on computes the right thing when nothing is changed, so that a variant differs by its mistake alone."""
    same("block", "forward", model.block_of(model.right))
    same("model", "forward", model.layers_of(lambda i, dense, x, own: x))
    same("mtp.loss", "forward", mtp.losses_of(targets_of))
    same("mtp.loss", "backward", mtp.losses_of(targets_of))
    for op in ("block", "model", "mtp", "mtp.loss"):
        same(op, "forward", model.with_arguments(OPS[op], lambda given, attrs: (given, attrs)))


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_positions_of_a_module_moved_by_one_change_nothing(way: str) -> None:
    """Why mtp-position-not-incremented is no variant: no output of mtp depends on where its positions begin."""
    case = next(c for c in OPS["mtp"].cases if c.name == "packed")
    inputs = in_float64(draw_case(OPS["mtp"], case, way, PRECISIONS["fp32"]))
    moved = {**inputs, "positions": inputs["positions"] + 1}
    truth = OPS["mtp"].run(way, inputs, case.attrs)
    for name, y in OPS["mtp"].run(way, moved, case.attrs).items():
        np.testing.assert_allclose(y, truth[name], rtol=0, atol=1e-13 * np.abs(truth[name]).max(), err_msg=name)


# ---- wrong subjects, which share nothing with golden/bugs nor with the reference


def halves(logits: Array, labels: Array, *, ignore_index: int, denominator: str, **rest: Any) -> Array:
    """The mean of two micro-batches' means"""
    if denominator != "counted" or len(labels) < 2 or (labels == ignore_index).all():
        raise NotImplementedError("two micro-batches with something to learn")
    z, cut = logits.astype(np.float64), (len(labels) + 1) // 2
    highest = z.max(1, keepdims=True)
    lse = (np.log(np.exp(z - highest).sum(1, keepdims=True)) + highest)[:, 0]
    means = []
    for rows in (slice(0, cut), slice(cut, None)):
        counts = labels[rows] != ignore_index
        own = lse[rows] - z[rows][np.arange(len(counts)), np.where(counts, labels[rows], 0)]
        means.append(own[counts].mean() if counts.any() else 0.0)
    return np.asarray(np.mean(means), dtype=np.float32)


def assigned(ids: Array, weight: Array, dx: Array) -> Array:
    """NumPy's assignment by index keeps the last of equal ids."""
    dweight = np.zeros_like(weight)
    dweight[ids] = dx
    return dweight


WRONG = [
    ("cross-entropy-microbatch-mean", "cross_entropy", "forward", halves),
    ("embedding-bwd-last-wins", "embedding", "backward", assigned),
]


@pytest.mark.parametrize(("bug", "op", "way", "subject"), [pytest.param(*w, id=w[0]) for w in WRONG])
def test_a_wrong_subject_fails_and_is_told_why(bug: str, op: str, way: str, subject: Callable) -> None:
    """A subject with the bug fails, and its own bug is the first that is named."""
    check_told(bug, op, way, subject)


def told(op: str, case: str, way: str, wrong: Callable[[dict[str, Array], dict[str, Any]], dict[str, Array]]) -> list[str]:
    """The bugs that explain what a wrong(inputs, attributes) built of oracles returns in float32, of one case."""
    v = vector(op, case, way, "fp32")
    outputs = wrong(in_float64(v.inputs), {**v.op.defaults, **v.case.attrs})
    kinds = {"f": "float32", "i": "int64"}
    return named(v, {name: Returned(y.astype(kinds[y.dtype.kind]), kinds[y.dtype.kind]) for name, y in outputs.items()})


def split(attrs: dict[str, Any], names: Any) -> dict[str, Any]:
    return {name: attrs[name] for name in names}


def beside_attention(inputs: dict[str, Array], attrs: dict[str, Any]) -> dict[str, Array]:
    """A dense block whose feed-forward network reads the norm of x."""
    x, shape = inputs["x"], inputs["x"].shape

    def norm(weight: str) -> Array:
        flat = {"x": x.reshape(-1, shape[2]), "weight": inputs[weight]}
        return ORACLES["rmsnorm", "forward"](flat, {"eps": attrs["rms_norm_eps"]})["y"].reshape(shape)

    of_attention = {**inputs, "x": norm("input_layernorm")}
    a = ORACLES["mla.prefill", "forward"](of_attention, split(attrs, oracles.mla.DEFAULTS))["y"]
    inner = norm("post_attention_layernorm")
    gate, up = inner @ inputs["gate_proj"].T, inner @ inputs["up_proj"].T
    y = x + a + (gate / (1 + np.exp(-gate)) * up) @ inputs["down_proj"].T
    return {"y": y, "topk_idx": np.zeros((*shape[:2], 0), np.int64)}


def rescaled(inputs: dict[str, Array], attrs: dict[str, Any]) -> dict[str, Array]:
    """Layer after layer, the residual in units of 1/factor from the first dense layer on, and divided again in every other one."""
    stacks, dense, factor = oracles.model, len(inputs["gate_proj"]), attrs["routed_scaling_factor"]
    x, chosen = inputs["embed_tokens"][inputs["ids"]], []
    for i in range(len(inputs["input_layernorm"])):
        own = {**stacks.layer_of(inputs, i, dense), "positions": inputs["positions"], "x": x / factor if 0 < i < dense else x}
        k = {"num_experts_per_tok": 0} if i < dense else {}
        found = ORACLES["block", "forward"](own, {**attrs, **k})
        x = found["y"]
        chosen += [found["topk_idx"]] * (i >= dense)
    flat = {"x": x.reshape(-1, x.shape[2]), "weight": inputs["norm"]}
    hidden = ORACLES["rmsnorm", "forward"](flat, {"eps": attrs["rms_norm_eps"]})["y"].reshape(x.shape)
    return {"logits": hidden @ inputs["lm_head"].T, "hidden": hidden, "topk_idx": np.array(chosen)}


def test_a_wrong_block_is_told_why() -> None:
    assert told("block", "v3-dense", "forward", beside_attention)[:1] == ["block-parallel"]


def test_a_wrong_model_is_told_why() -> None:
    assert told("model", "two-dense", "forward", rescaled)[:1] == ["fp16-residual-rescale-repeated"]


def test_a_wrong_module_is_told_why() -> None:
    """A drafter in the paper's order."""
    paper = {"concat": "hidden_first"}
    assert told("mtp", "dense", "forward", lambda i, a: ORACLES["mtp", "forward"](i, {**a, **paper}))[:1] == ["mtp-concat-order"]


def test_a_wrong_loss_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets over the boundaries of documents; and over labels that do not count."""
    v3 = ORACLES["mtp.loss", "forward"]

    def unmasked(inputs: dict[str, Array], attrs: dict[str, Any]) -> dict[str, Array]:
        labels = inputs["labels"]
        return v3({**inputs, "labels": np.where(labels == -100, inputs["ids"], labels)}, attrs)

    assert told("mtp.loss", "masked", "forward", unmasked)[:1] == ["mtp-mask-all-ones"]
    monkeypatch.setattr(oracles.mtp, "together", lambda cuts, s, i, j: j < s)
    assert told("mtp.loss", "packed", "forward", v3)[:1] == ["mtp-pack-boundary"]
