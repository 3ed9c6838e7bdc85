"""The pytest plugin as a user meets it, and the properties that it tries: the reference has them all, a mutant of each is told."""

import dataclasses
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, reject, settings
from leadline.golden.metamorphic import Ask, Inapplicable, Property, PropertyError
from leadline.golden.precision import precision_named
from leadline.golden.properties import PROPERTIES, properties_of
from leadline.golden.strategies import Drawn, questions
from leadline.golden.subject import load
from leadline.golden.vectors import directions
from leadline.ref import OPS
from leadline.ref.op import Op

pytest_plugins = ["pytester"]
INSTALLED = any(e.value == "leadline.golden.plugin" for e in importlib.metadata.entry_points(group="pytest11"))
PLUGIN = [] if INSTALLED else ["-p", "leadline.golden.plugin"]

TESTS = """
import numpy as np
from leadline.golden import conforms

def good(x, weight, eps):
    return (x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(eps)) * weight).astype(x.dtype)

def eps_outside(x, weight, eps):
    return x / (np.sqrt((x * x).mean(-1, keepdims=True)) + np.float32(eps)) * weight

def leaky(x, weight, eps):
    return good(x + np.float32(0.25) * x.mean(0), weight, eps)

def refuses(x, weight):
    raise NotImplementedError("not on Tuesdays")

"""


@pytest.fixture
def run(pytester: pytest.Pytester) -> Callable[..., pytest.RunResult]:
    """run(tests, *options): pytest on a file of a user's."""

    def go(tests: str, *options: str) -> pytest.RunResult:
        pytester.makepyfile(TESTS + tests)
        return pytester.runpytest("-p", "no:cacheprovider", "-p", "no:randomly", *PLUGIN, *options)

    return go


Run = Callable[..., pytest.RunResult]


def test_there_is_a_test_for_each_case_and_property(run: Run) -> None:
    """The id says op, direction, precision and case; a right implementation passes them all."""
    result = run('test_norm = conforms(good, "rmsnorm", precision="fp32", examples=3)', "-v")
    cases, tried = [c.name for c in OPS["rmsnorm"].cases if c.quick], [p.name for p in properties_of(OPS["rmsnorm"], "forward")]
    result.assert_outcomes(passed=len(cases) + len(tried))
    for name in cases:
        result.stdout.fnmatch_lines([f"*::test_norm::test_case[[]rmsnorm-forward-fp32-{name}] PASSED*"])
    for name in tried:
        result.stdout.fnmatch_lines([f"*::test_norm::test_property[[]rmsnorm-forward-fp32-{name}] PASSED*"])
    assert "<-" not in result.stdout.str()  # a test stands where conforms was called


def test_a_failure_names_the_bug_and_shows_no_traceback_of_ours(run: Run) -> None:
    """The reason, the known bug, and nothing of how we found it."""
    result = run('test_norm = conforms(eps_outside, "rmsnorm", precision="fp32", properties=False)')
    assert result.ret == 1
    text = result.stdout.str()
    assert "rmsnorm-eps-outside" in text
    assert "rmsnorm forward fp32 small: FAIL: y is off by" in text
    assert "Traceback" not in text
    assert "conforms.py" not in text


def test_a_property_that_fails_says_so_and_is_replayed_by_its_seed(run: Run) -> None:
    """A row that depends on the others: found without vectors; the seed that is shown gives the same question and the same answer."""
    tests = 'test_norm = conforms(leaky, "rmsnorm", precision="fp32", properties=["row-alone"], examples=5)'
    first = run(tests, "-k", "test_property")
    first.assert_outcomes(failed=1, deselected=sum(c.quick for c in OPS["rmsnorm"].cases))
    text = first.stdout.str()
    assert "a token's row does not depend on the others" in text
    seed = re.findall(r"replay: --leadline-seed (\d+)", text)[0]
    assert f"leadline: seed {seed} " in text
    told = re.findall(r"row \d+ \(n\) without.*|question=.*", text)
    assert len(told) >= 2
    again = run(tests, "-k", "test_property", "--leadline-seed", seed).stdout.str()
    assert re.findall(r"row \d+ \(n\) without.*|question=.*", again) == told


def test_options_take_the_place_of_what_the_tests_say(run: Run) -> None:
    """--leadline-precision and a repeated one; a refusal is a skip with its reason; seeds other than 0 are drawn."""
    tests = 'test_norm = conforms(good, "rmsnorm", precision="fp32", properties=False, seeds=[0, 3])'
    result = run(tests, "--leadline-precision", "bf16", "--leadline-precision", "fp64", "-v", "-k", "small", "--leadline-profile", "full")
    found = re.findall(r"test_case\[(\S+)\]", result.stdout.str())
    assert {"rmsnorm-forward-bf16-small", "rmsnorm-forward-fp64-small", "rmsnorm-forward-fp64-small-seed3"} <= set(found)
    assert not [name for name in found if "fp32" in name]
    result = run('test_norm = conforms(refuses, "rmsnorm", precision="fp32", examples=2)', "-rs")
    assert result.parseoutcomes().keys() == {"skipped"}
    assert "not on Tuesdays" in result.stdout.str()


WRONG = {
    "an unknown precision": (["--leadline-precision", "fp23"], 'conforms(good, "rmsnorm")', "did you mean fp32"),
    "an unknown profile": (["--leadline-profile", "slow"], 'conforms(good, "rmsnorm")', "quick"),
    "an unknown op": ([], 'conforms(good, "rmsnrom")', "did you mean rmsnorm"),
    "no op": ([], "conforms(good)", "name what it computes"),
    "an unknown attribute": ([], 'conforms(good, "rmsnorm", attrs={"epz": 1.0})', "did you mean eps"),
    "a subject that does not fit": ([], 'conforms(lambda x: x, "rmsnorm")', "passes by keyword x, weight"),
    "an unknown property": ([], 'conforms(good, "rmsnorm", properties=["rows"])', "rows-permuted"),
    "no such waivers": (["--leadline-waivers", "nowhere.txt"], 'conforms(good, "rmsnorm")', "nowhere.txt: No such file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_is_told_before_any_test(name: str, run: Run) -> None:
    """By its name and mend, as an error of usage or of collection."""
    options, made, expected = WRONG[name]
    result = run(f"test_norm = {made}", *options)
    assert result.ret in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.INTERRUPTED)
    assert expected in result.stdout.str() + result.stderr.str()
    assert not re.search(r"\d passed", result.stdout.str())


WAIVERS = """
# what is known
rmsnorm forward fp32 small   # eps outside the root, see issue 12
rmsnorm * fp3? tiny          # the same
rmsnorm forward fp32 one     # passes long since
swiglu forward fp32 *        # nothing here is swiglu
"""


def test_waived_failures_are_expected_and_unexpected_passes_are_shown(run: Run, pytester: pytest.Pytester) -> None:
    """xfail with line and reason; a waived test that passes is shown, or fails (--leadline-strict); what waives nothing is told."""
    (pytester.path / "waivers.txt").write_text(WAIVERS)
    tests = 'test_norm = conforms(eps_outside, "rmsnorm", precision="fp32", properties=False)'
    cases = "small or tiny or -one"
    result = run(tests, "--leadline-waivers", "waivers.txt", "-rx", "-k", cases)
    outcomes = result.parseoutcomes()
    assert (outcomes["xfailed"], outcomes["xpassed"], result.ret) == (2, 1, 0)
    text = result.stdout.str()
    for part in ("waived, line 3: eps outside the root, see issue 12", "unexpected pass: ", "passes long since", "unused: line 6: swiglu"):
        assert part in text
    strict = run(tests, "--leadline-waivers", "waivers.txt", "--leadline-strict", "-k", cases)
    assert strict.parseoutcomes()["failed"] == 1
    assert strict.ret == 1


def test_a_waiver_waives_no_crash_of_pytest_or_of_ours(run: Run, pytester: pytest.Pytester) -> None:
    """Only a verdict is waived: an error in the tests themselves is not."""
    (pytester.path / "waivers.txt").write_text("rmsnorm forward fp32 small  # known")
    tests = 'test_norm = conforms(eps_outside, "rmsnorm", precision="fp32", properties=False)\n'
    tests += "def broken(task): raise KeyError('ours')\ntest_norm.leadline.run = broken\n"
    result = run(tests, "--leadline-waivers", "waivers.txt", "-k", "small")
    assert result.parseoutcomes() == {"failed": 1, "deselected": result.parseoutcomes()["deselected"]}


LINES = {
    "no reason": ("rmsnorm forward fp32 small", "gives no reason"),
    "an empty reason": ("rmsnorm forward fp32 small  #  ", "gives no reason"),
    "too few words": ("rmsnorm small  # known", "2 words"),
    "an unknown op": ("rmsnrm forward fp32 small  # known", "unknown op 'rmsnrm'; did you mean rmsnorm"),
    "an unknown case": ("rmsnorm forward fp32 smal  # known", "no case 'smal'; did you mean small"),
    "an unknown direction": ("rmsnorm sideways fp32 small  # known", "no direction 'sideways'"),
    "a direction that the op lacks": ("cast.bf16 backward fp32 *  # known", "no direction 'backward'"),
    "an unknown precision": ("rmsnorm forward fp33 small  # known", "unknown precision 'fp33'"),
}


@pytest.mark.parametrize("name", LINES)
def test_a_waiver_that_waives_nothing_known_is_a_usage_error_that_names_its_line(name: str, run: Run, pytester: pytest.Pytester) -> None:
    """One line, before any test."""
    line, expected = LINES[name]
    (pytester.path / "waivers.txt").write_text(f"# known\n\n{line}\n")
    result = run('test_norm = conforms(good, "rmsnorm")', "--leadline-waivers", "waivers.txt")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (told,) = [text for text in result.stderr.str().splitlines() if "leadline" in text]
    assert "waivers.txt, line 3" in told
    assert expected in told


def test_a_run_without_our_tests_is_not_touched(pytester: pytest.Pytester) -> None:
    """The plugin imports neither NumPy nor the oracle, and changes nothing but the header."""
    pytester.makepyfile("import sys\ndef test_it(): assert not {'numpy', 'hypothesis', 'leadline.ref'} & set(sys.modules)")
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-p", "no:xdist", *PLUGIN)
    result.assert_outcomes(passed=1)
    code = "import leadline.golden.plugin, sys; print(sorted({'numpy', 'leadline.ref', 'click', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_workers_draw_from_the_seed_that_the_header_shows(pytester: pytest.Pytester) -> None:
    """Under xdist every worker has the seed of the process that started it."""
    pytester.makepyfile("from leadline.golden.plugin import seed_of\ndef test_it(request): print('seed is', seed_of(request.config))")
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", *PLUGIN, "-n", "1", "-rP")
    text = result.stdout.str()
    assert re.findall(r"leadline: seed (\d+)", text) == re.findall(r"seed is (\d+)", text)


def test_names_are_had_whichever_module_is_imported_first() -> None:
    """verify and conforms are the functions, though their modules have the same names."""
    code = "import leadline.golden.verify, leadline.golden.conforms, leadline.golden as g; print(g.verify.__name__, g.conforms.__name__)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "verify conforms\n"
    code = "from leadline.golden import *; from leadline.golden.verify import verify as v; print(v is verify, callable(conforms))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "True True\n"


# The properties themselves

REFERENCE = load("ref")


def asker(op: Op, direction: str, change: Callable[[Drawn, dict[str, np.ndarray]], dict[str, np.ndarray]] | None = None) -> Ask:
    """The reference in the precision's carrier, with what is done to its answers."""

    def answer(q: Drawn) -> dict[str, np.ndarray]:
        got = {name: r.values for name, r in REFERENCE.ask(q.op, q.direction, q.inputs, q.attrs, q.precision).items()}
        return change(q, got) if change else got

    contract = REFERENCE.contract(op, direction)
    assert contract is not None
    return Ask(answer, contract.takes_choice)


def holding(tried: Property, ask: Ask) -> Callable[[Drawn], None]:
    def check(q: Drawn) -> None:
        try:
            tried.check(ask, q)
        except Inapplicable:
            reject()

    return check


EVERY = [(p, op, way) for op in OPS.values() for way in directions(op) for p in properties_of(op, way)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [p.name for p in PROPERTIES])
def test_the_reference_has_every_property(name: str, precision: str) -> None:
    """On drawn questions of every op that the property is claimed of; --hypothesis-profile deep draws many."""
    few = settings(
        parent=settings.get_profile("dev"),
        max_examples=max(1, settings.default.max_examples // 8 if settings.default else 1),
        phases=[Phase.generate],
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )
    claimed = [(p, op, way) for p, op, way in EVERY if p.name == name]
    assert claimed
    for tried, op, way in claimed:
        narrowed = tried.narrowed(op)
        assert narrowed.cases, (op.name, name)
        drawn = questions(narrowed, direction=way, precision=precision, empty=False, large=sys.maxsize)
        few(given(drawn)(holding(tried, asker(op, way))))()


State = dict[str, Any]


def wandering(state: State) -> Callable:
    """Every second answer is another."""

    def change(q: Drawn, got: dict) -> dict:
        state["count"] = state.get("count", 0) + 1
        return got if state["count"] % 2 else {n: y + y.dtype.type(1) for n, y in got.items()}

    return change


def by_place(q: Drawn, got: dict) -> dict:
    """The first row is not what it should be, wherever its token came from."""
    first = next(iter(got))
    got = {n: y.copy() for n, y in got.items()}
    got[first][0] = got[first][0] * 1.5 + 1
    return got


def by_others(q: Drawn, got: dict) -> dict:
    first = next(iter(got))
    return {**got, first: got[first] + got[first].mean(0) / 8}


def decayed(q: Drawn, got: dict) -> dict:
    """Weight decay in the gradient."""
    return {**got, "dweight": got["dweight"] + np.float32(0.01) * q.inputs["weight"]}


def clamped(q: Drawn, got: dict) -> dict:
    return {n: np.clip(y, -1, 1) for n, y in got.items()}


def offset(q: Drawn, got: dict) -> dict:
    """The largest scale counts in whole: a scale in steps of three."""
    return {**got, "scale": np.where(got["scale"] > 0.01, got["scale"] + np.float32(0.001), got["scale"])}


def chosen_where(wrong: Callable[[Drawn], bool]) -> Callable:
    """Where a question is so, the first token's first expert gives way to one that was not chosen."""

    def change(q: Drawn, got: dict) -> dict:
        if not wrong(q):
            return got
        idx = got["topk_idx"].copy()
        idx[0, 0] = next(e for e in range(q.inputs["logits"].shape[1]) if e not in idx[0])
        return {**got, "topk_idx": idx}

    return change


def unscaled(q: Drawn, got: dict) -> dict:
    return {**got, "topk_weight": got["topk_weight"] * np.float32(1.0001)}


def peeks(q: Drawn, got: dict) -> dict:
    """Every position has a little of the last."""
    first = next(iter(got))
    return {**got, first: got[first] + got[first][:, -1:] / 16}


def by_key_order(q: Drawn, got: dict) -> dict:
    return {**got, "o": got["o"] + q.inputs["v"][:, :1, :1] * np.float32(0.01)}


# Each with the op and direction that it is shown on.
MUTANTS: dict[str, list[tuple[str, str, Callable]]] = {
    "repeatable": [("rmsnorm", "forward", wandering({})), ("encode.bf16", "forward", wandering({})), ("swiglu", "backward", wandering({}))],
    "rows-permuted": [("rmsnorm", "forward", by_place), ("attention", "forward", by_place), ("cast.bf16", "forward", by_place)],
    "row-alone": [("rmsnorm", "forward", by_others), ("linear", "forward", by_others), ("swiglu", "backward", by_others)],
    "linear-in-dy": [("rmsnorm", "backward", decayed), ("attention", "backward", clamped)],
    "doubled": [("linear", "forward", clamped), ("fp8.quantize_tile", "forward", offset), ("cast.bf16", "forward", clamped)],
    "bias-shifted": [("router.noaux_tc", "forward", chosen_where(lambda q: q.inputs["bias"].sum() > 0))],
    "weights-sum": [("router.noaux_tc", "forward", unscaled), ("router.softmax", "forward", unscaled)],
    "experts-permuted": [("router.noaux_tc", "forward", chosen_where(lambda q: q.inputs["logits"][0, 0] > q.inputs["logits"][0, 1]))],
    "future": [("attention", "forward", peeks), ("mla.prefill", "forward", peeks)],
    "keys-permuted": [("attention", "forward", by_key_order)],
}


def test_every_property_has_a_mutant() -> None:
    """None can be added without one."""
    assert set(MUTANTS) == {p.name for p in PROPERTIES}


@pytest.mark.parametrize(("name", "op", "way"), [(name, op, way) for name, shown in MUTANTS.items() for op, way, _ in shown])
def test_a_mutant_of_each_property_is_told(name: str, op: str, way: str, killed: Callable) -> None:
    """A subject that lacks the property fails it on some question."""
    tried = next(p for p in PROPERTIES if p.name == name)
    change = next(change for o, w, change in MUTANTS[name] if (o, w) == (op, way))
    assert tried.applies(OPS[op], way)
    drawn = questions(tried.narrowed(OPS[op]), direction=way, precision="fp32", empty=False, large=sys.maxsize)
    killed(holding(tried, asker(OPS[op], way, change)), drawn)


def test_a_turn_that_rounding_leads_to_is_no_failure_and_a_real_one_is() -> None:
    """Two logits one unit apart may change places between two calls; two far apart may not."""
    tried = next(p for p in PROPERTIES if p.name == "repeatable")
    op = OPS["router.softmax"]
    case = next(c for c in op.cases if c.attrs.get("n_group") == 1)
    attrs = {**op.defaults, **case.attrs}
    e, k = case.dims["e"], attrs["k"]
    for gap, fails in ((np.float32(2.0**-22), False), (np.float32(0.25), True)):
        logits = np.linspace(2, -2, e, dtype=np.float32)[None]
        logits[0, k - 1 : k + 1] = [logits[0, k - 1], logits[0, k - 1] - gap]
        q = Drawn(op, "forward", precision_named("fp32"), {"logits": logits}, attrs, dataclasses.replace(case, dims={"n": 1, "e": e}), 0)
        asked: list[int] = []

        def answer(q: Drawn, asked: list[int] = asked, k: int = k) -> dict[str, np.ndarray]:
            asked.append(1)
            choice = np.r_[np.arange(k - 1), k - 1 + (len(asked) + 1) % 2][None]
            return {n: np.asarray(y) for n, y in q.op.run("forward", {**q.inputs, "topk_idx": choice}, q.attrs).items()}

        if fails:
            with pytest.raises(PropertyError, match="topk_idx"):
                tried.check(Ask(answer), q)
        else:
            tried.check(Ask(answer), q)
