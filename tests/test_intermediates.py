"""Intermediates that a subject returns beside its outputs: the first that is wrong is told, and what is right is never called wrong."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from leadline.golden.band import carrier
from leadline.golden.cli import main
from leadline.golden.explain import Explanation
from leadline.golden.intermediates import first_wrong, names_of
from leadline.golden.judge import FAIL, Question, Returned, as_returned
from leadline.golden.montecarlo import Noise, noisy_inputs
from leadline.golden.precision import PRECISIONS
from leadline.golden.vectors import make
from leadline.golden.verify import CaseResult, verify
from leadline.ref import OPS
from leadline.ref.xp import named, recording

OFF = np.float32(1.001)
NAMES = {
    "mla.prefill": ["c_q", "q", "q_pe", "o"],
    "mla.absorb": ["c_q", "q", "q_pe", "q_c", "o_c", "o"],
    "moe.layer": ["logits", "scores", "topk_weight", "routed", "shared"],
    "router.noaux_tc": ["scores"],
    "router.softmax": ["scores"],
    "fp8.linear": ["x_codes", "x_scale", "weight_codes", "weight_scale"],
    "rmsnorm": [],
}


def showing(op: str, wrong: Iterable[str], more: Any = ()) -> Callable:
    """The reference with its intermediates, those named and these outputs off by a thousandth."""
    declared = OPS[op]

    def subject(**given: Any) -> dict[str, Any]:
        arrays = [given.pop(t.name, None) for t in declared.inputs]
        with recording() as seen:
            result, _ = declared.fwd(*arrays, **given)
        result = result if isinstance(result, tuple) else (result,)
        shown = {**seen, **dict(zip((t.name for t in declared.outputs), result, strict=True)), **dict(more)}
        return {name: x * OFF if name in wrong else x for name, x in shown.items()}

    return subject


def told(result: CaseResult) -> list[Explanation]:
    return [e for e in result.explanations if e.kind == "intermediate"]


@pytest.mark.parametrize("op", NAMES)
def test_the_names_are_known_and_shown(op: str) -> None:
    """`leadline ops show` lists what may be returned beside the outputs, in the reference's order."""
    assert list(names_of(op)) == NAMES[op]
    text = CliRunner().invoke(main, ["ops", "show", op]).stdout
    assert ("on the way" in text) == bool(NAMES[op])
    assert ", ".join(NAMES[op]) in text


def test_a_name_changes_nothing_and_is_seen_only_where_it_is_recorded() -> None:
    """The identity, of any array; what has a name twice has none; a recording in a recording is another one."""
    x, y = np.ones(3), np.zeros(3)
    assert named("x", x) is x
    with recording() as outer:
        named("x", x)
        with recording() as inner:
            named("y", y)
        assert list(inner) == ["y"]
        named("z", x)
        assert named("z", y) is y
    assert list(outer) == ["x"]
    assert outer["x"] is x
    named("later", x)
    assert "later" not in outer


WRONG = {
    "mla.prefill": (["q", "q_pe", "o", "y"], "v3", "c_q is right, q is the first that is wrong: "),
    "mla.absorb": (["o_c", "o", "y"], "chunk", "c_q, q, q_pe, c_kv, k_pe, q_c are right, o_c is the first that is wrong: "),
    "moe.layer": (["routed", "y"], "v3", "logits, scores, topk_weight are right, routed is the first that is wrong: "),
    "router.noaux_tc": (["scores", "topk_weight"], "v3", "scores is the first that is wrong: "),
    "router.softmax": (["topk_weight"], "v2", "scores is right: look at what comes after scores."),
    "fp8.linear": (["weight_scale", "y"], "ragged", "x_codes, x_scale, weight_codes are right, weight_scale is the first that is wrong: "),
}


@pytest.mark.parametrize("op", WRONG)
def test_the_first_that_is_wrong_is_named(op: str) -> None:
    """And by how many σ; after it nothing is said, since what is made of it is wrong too."""
    wrong, case, says = WRONG[op]
    (result,) = verify(showing(op, wrong), op=op, precision="fp32", cases=[case]).results
    assert result.verdict == FAIL
    (e,) = told(result)
    assert str(e).startswith(says)
    assert says.endswith(".") or str(e).endswith(" σ rms.")
    assert e is result.explanations[-1]  # the bug's name, where there is one, goes before it


def test_a_backward_may_show_its_forwards() -> None:
    """What the reference comes by on the way to a gradient, too."""
    op = OPS["mla.prefill"]

    def subject(**given: Any) -> dict[str, Any]:
        attrs = {k: given.pop(k) for k in list(given) if k in op.attrs}
        with recording() as seen:
            grads = op.run("backward", given, attrs)
        shown = {n: seen[n] for n in NAMES["mla.prefill"]}
        return {**grads, **shown, "dx": grads["dx"] * OFF, "o": shown["o"] * OFF}

    (result,) = verify(subject, op="mla.prefill", direction="backward", precision="fp32", cases=["v3"]).results
    (e,) = told(result)
    assert str(e).startswith("c_q, q, q_pe are right, o is the first that is wrong: ")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-eager"])
@pytest.mark.parametrize(("op", "output", "case"), [("mla.prefill", "y", "v3"), ("moe.layer", "y", "near"), ("fp8.linear", "y", "tokens")])
def test_what_rounds_as_it_claims_is_right_on_the_way(op: str, output: str, case: str, precision: str) -> None:
    """The reference computed as the precision claims, its last step off: every intermediate is right, whatever decision rounding turned."""
    declared, p = OPS[op], PRECISIONS[precision]
    vector = make(declared, next(c for c in declared.cases if c.name == case), "forward", p)
    question = Question(declared, "forward", vector.inputs, vector.case.attrs, p)
    for seed in (1000, 1001):
        with recording() as seen, np.errstate(all="ignore"):
            outputs = declared.run("forward", noisy_inputs(vector.inputs, Noise(p, seed)), vector.case.attrs)
        wrong = as_returned(question, {n: np.asarray(y) * (1.1 if n == output else 1) for n, y in outputs.items()})
        more = {n: Returned(np.asarray(x), str(x.dtype)) for n, x in seen.items() if n not in outputs}
        with np.errstate(all="ignore"):
            found = [says for _, says in first_wrong(question, wrong, more, vector.band)]
        assert found == [f"{', '.join(seen)} are right: look at what comes after {list(seen)[-1]}."]


def test_a_wrong_shape_is_told_and_another_layout_of_it_is_read() -> None:
    """[n,q] and [b,s,q] are the same numbers; a part of them is not."""
    for change, says in (
        (lambda c_q: c_q.reshape(2, -1, c_q.shape[-1]), "c_q, q, q_pe, c_kv, k_pe, o are right: look at what comes after o."),
        (lambda c_q: c_q[:3], "c_q has shape (3, "),
    ):

        def subject(change: Callable = change, **given: Any) -> dict[str, Any]:
            shown = showing("mla.prefill", ["y"])(**given)
            return {**shown, "c_q": change(shown["c_q"])}

        (result,) = verify(subject, op="mla.prefill", precision="fp32", cases=["v3"]).results
        assert [str(e).startswith(says) for e in told(result)] == [True]


def test_what_is_not_returned_costs_nothing() -> None:
    """Some of them, or none: those are judged, and a PASS is a PASS whatever they are."""

    def asked(wrong: str, *names: str) -> CaseResult:
        def subject(**given: Any) -> dict[str, Any]:
            shown = showing("moe.layer", [wrong])(**given)
            return {n: shown[n] for n in ("y", "topk_idx", *names)}

        return verify(subject, op="moe.layer", precision="fp32", cases=["v3"]).results[0]

    assert [str(e) for e in told(asked("y", "scores"))] == ["scores is right: look at what comes after scores."]
    assert (asked("y").verdict, told(asked("y"))) == (FAIL, [])
    right = asked("scores", "scores")
    assert (right.verdict, right.explanations) == ("PASS", [])


def test_an_unknown_name_is_refused_in_one_line() -> None:
    """Named, with the names that there are."""
    (result,) = verify(showing("moe.layer", [], {"gates": np.ones(3)}), op="moe.layer", precision="fp32", cases=["v3"]).results
    assert result.verdict == FAIL
    assert result.reason == "returned gates; expected y, topk_idx and, if it likes, logits, scores, topk_weight, routed, shared"
    (result,) = verify(lambda x, weight: {"y": x, "rstd": x}, op="rmsnorm", precision="fp32", cases=["one"]).results
    assert result.reason == "returned rstd; expected y alone"


def test_every_report_tells_it(tmp_path: Path) -> None:
    """Terminal, JSON lines and HTML have the sentence."""
    subject = tmp_path / "mine.py"
    subject.write_text(
        "from leadline.ref import OPS\nfrom leadline.ref.xp import recording\n"
        "def router_noaux_tc(logits, bias, **attrs):\n"
        "    with recording() as seen:\n"
        "        (idx, weight), _ = OPS['router.noaux_tc'].fwd(logits * logits.dtype.type(1.01), bias, **attrs)\n"
        "    return {'topk_idx': idx, 'topk_weight': weight, **seen}\n"
    )
    files = [word for kind in ("html", "jsonl") for word in (f"--{kind}", str(tmp_path / kind))]
    words = ["--op", "router.noaux_tc", "--precision", "fp32", "--case", "v3-plain", "--direction", "forward"]
    done = CliRunner().invoke(main, ["verify", str(subject), *words, *files], env={"COLUMNS": "200"})
    says = "scores is the first that is wrong: "
    assert says in done.stdout
    assert says in (tmp_path / "html").read_text()
    found = [e["text"] for line in (tmp_path / "jsonl").read_text().splitlines()[1:-1] for e in json.loads(line)["explanations"]]
    assert any(says in text for text in found)


def test_a_recording_is_of_plain_arrays_as_they_are() -> None:
    """Observed, never changed: the outputs under a recording are bit for bit those without it."""
    op = OPS["mla.absorb"]
    vector = make(op, op.cases[0], "forward", PRECISIONS["fp32"])
    inputs = carrier(vector.inputs, np.float64)
    plain = op.run("forward", inputs, vector.case.attrs)
    with recording() as seen:
        observed = op.run("forward", inputs, vector.case.attrs)
    assert list(seen) == ["c_q", "q", "q_pe", "c_kv", "k_pe", "q_c", "o_c", "o"]
    assert all(np.array_equal(plain[n], observed[n]) for n in plain)
