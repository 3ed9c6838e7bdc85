"""The kill matrix: the field's metrics are what they are called, weak judges are told of as weak, and a run can be taken up again."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from leadline.golden import field, power, power_count, power_sample, power_table
from leadline.golden.band import truth_of
from leadline.golden.bugs import Bug, bugs_of
from leadline.golden.cli import main
from leadline.golden.errors import UsageError
from leadline.golden.field import METRICS
from leadline.golden.judge import Judgement, Question, Returned, as_returned
from leadline.golden.power import CORRECT, Part
from leadline.golden.precision import PRECISIONS
from leadline.golden.vectors import Store, Vector, directions
from leadline.ref.fp8_recipes import RECIPES
from leadline.ref.op import OPS

STORE = Store()


def vector(op: str, case: str, direction: str = "forward", precision: str = "fp32") -> Vector:
    return STORE.get(OPS[op], next(c for c in OPS[op].cases if c.name == case), direction, PRECISIONS[precision])


def records(
    op: str, ids: tuple[str, ...], direction: str = "forward", precision: str = "fp32", named: bool = False
) -> list[dict[str, Any]]:
    return [r for r in power.records(Part(op, direction, precision, ids, named=named), STORE) if "id" in r]


# ---- the field's metrics on arrays made by hand

ONES = np.ones(1000)
HALF = np.r_[np.ones(500), np.zeros(500)]


@pytest.mark.parametrize(
    ("candidate", "reference", "passing"),
    [
        (ONES, ONES, "allclose assert calc_diff cosine 85%"),
        (ONES * 1.009, ONES, "allclose calc_diff cosine 85%"),  # a gain of 0.9 %: 2e-2 less than the 2e-2 that rtol and atol add up to
        (ONES * 1.019, ONES, "allclose calc_diff cosine 85%"),
        (ONES * 1.021, ONES, "calc_diff cosine 85%"),
        (ONES * 1.045, ONES, "calc_diff cosine 85%"),  # 1 - 2·1.045/(1 + 1.045²) = 9.7e-4
        (ONES * 1.047, ONES, "cosine 85%"),  # 1.05e-3
        (ONES * 1.2, ONES, "cosine"),
        (ONES * 3, ONES, "cosine"),  # an angle does not see a factor
        (-ONES, ONES, ""),
        (np.r_[ONES[:-1], 0.0], ONES, "calc_diff 85%"),  # one in a thousand is gone: 1 - 2·999/1999 = 5e-4, cosine √0.999
        (np.r_[ONES[:-150], np.zeros(150)], ONES, "85%"),
        (np.r_[ONES[:-151], np.zeros(151)], ONES, ""),
        (ONES * 2e-3, ONES * 1e-3, "allclose cosine"),  # an absolute tolerance does not see small numbers
        (ONES * 1e-3, ONES * 1.11e-3, "allclose cosine"),  # 11 % of the candidate, 9.9 % of the reference
        (np.r_[ONES[:-1], np.nan], ONES, "85%"),
        (np.r_[ONES[:-1], np.nan], np.r_[ONES[:-1], np.nan], "allclose assert calc_diff cosine 85%"),
        (np.r_[ONES[:-1], np.inf], np.r_[ONES[:-1], -np.inf], "85%"),
        (np.zeros(4), np.zeros(4), "allclose assert calc_diff cosine 85%"),
        (np.zeros(4), np.ones(4) * 1e-6, "allclose assert"),
        (HALF[::-1], HALF, ""),
    ],
)
def test_the_metrics_pass_what_their_formulas_pass(candidate: np.ndarray, reference: np.ndarray, passing: str) -> None:
    found = [name for name, metric in METRICS.items() if field.passed(metric, candidate, reference, "fp32")]
    assert [n.removesuffix("_close").split("(")[0].split(" ")[0] for n in found] == passing.split()


def test_torchs_defaults_are_torchs() -> None:
    """rtol and atol by dtype, as torch.testing.assert_close takes them: moved by a little less and a little more."""
    torch = pytest.importorskip("torch")
    dtypes = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    assert {name: torch.testing._comparison.default_tolerances(dtype) for name, dtype in dtypes.items()} == field.TORCH_DEFAULTS
    rng = np.random.default_rng(0)
    y = rng.normal(size=100)
    for share in (0.99, 1.01):
        x = y + share * (1e-5 + 1.3e-6 * np.abs(y))
        assert field.passed(METRICS["assert_close"], x, y, "fp32") == (share < 1)
        try:
            torch.testing.assert_close(torch.tensor(x), torch.tensor(y), rtol=1.3e-6, atol=1e-5)
        except AssertionError:
            assert share > 1
        else:
            assert share < 1


def test_codes_are_compared_by_value_and_choices_as_sets() -> None:
    """-0 is 0 and another NaN is NaN for the field's metrics; experts in another order are the same choice, another expert is not."""
    v = vector("encode.e4m3fn", "normal")
    question = Question(v.op, "forward", v.inputs, v.case.attrs, v.precision)

    def failing(change: Callable[[np.ndarray], np.ndarray]) -> list[str]:
        right = as_returned(question, {"codes": np.zeros(64, np.uint8) + 0x38})
        return field.rejecting(question, {"codes": Returned(change(right["codes"].values), "uint8")}, right)

    assert failing(lambda c: c) == []
    assert failing(lambda c: c + 1) == list(METRICS)[:3] + list(METRICS)[4:]  # 1.125 for 1: all but the angle
    v = vector("router.noaux_tc", "v3")
    question = Question(v.op, "forward", v.inputs, v.case.attrs, v.precision)
    right = as_returned(question, v.band.truth)
    other = {**right, "topk_idx": Returned(right["topk_idx"].values[:, ::-1].copy(), "int64")}
    assert field.rejecting(question, other, right) == []
    changed = right["topk_idx"].values.copy()
    changed[0, 0] = next(e for e in range(256) if e not in changed[0])
    assert field.rejecting(question, {**right, "topk_idx": Returned(changed, "int64")}, right) == list(METRICS)


# ---- the matrix


def test_bugs_fail_and_the_reference_passes() -> None:
    """A bug that is far off is seen by all, one that is not by ours alone; the reference with its own noise is failed by nobody."""
    found = {r["id"]: r for r in records("rmsnorm", ("rmsnorm-unit-offset", "rmsnorm-inv-rms-bf16", CORRECT))}
    assert all(found["rmsnorm-unit-offset"]["field"].values())
    subtle = found["rmsnorm-inv-rms-bf16"]
    assert subtle["computed"] == subtle["rounded"] == subtle["differ"] != []
    assert not any(subtle["field"][name] for name in METRICS if name != "assert_close")
    assert found[CORRECT]["differ"] == found[CORRECT]["computed"] == []
    assert found[CORRECT]["cases"] == len(OPS["rmsnorm"].cases)


def test_a_bug_computed_with_noise_differs_from_it_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both forms are judged: the noise is the claimed precision's and not one of the band's own runs."""
    bug, v = next(b for b in bugs_of(OPS["rmsnorm"], "forward") if b.id == "rmsnorm-unit-offset"), vector("rmsnorm", "latent")
    plain = power.outputs_of(bug, v)
    noisy = power.outputs_of(bug, v, power.Noise(v.precision, power.SEED))
    assert plain is not None
    assert noisy is not None
    assert not np.array_equal(plain["y"], noisy["y"])
    assert np.allclose(plain["y"], noisy["y"], rtol=1e-5)
    assert power.SEED >= 16  # the band's runs have the seeds 0 to 15


def test_a_weak_judge_is_told_of_as_surviving(monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge that passes everything leaves every bug a survivor, and one that fails everything has false alarms: the matrix says so."""
    ids = ("rmsnorm-unit-offset", CORRECT)
    monkeypatch.setattr(power, "judge_closely", lambda *_: Judgement())
    blind = power_count.count(records("rmsnorm", ids))
    assert [r["id"] for r in blind.survivors] == ["rmsnorm-unit-offset"]
    assert power_table.missed(blind) == ["fp32: 0.0% of the bugs fail; expected 100%"]
    monkeypatch.setattr(power, "judge_closely", lambda *_: Judgement("FAIL"))
    harsh = power_count.count(records("rmsnorm", ids))
    assert not harsh.survivors
    cases = len(OPS["rmsnorm"].cases)
    assert power_table.missed(harsh) == [f"fp32: the reference fails {cases} of {cases} cases; expected none"]


def test_a_bug_that_no_case_reveals_survives(monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes no difference on any case is a survivor, not left out of the count."""
    planted = Bug("planted", ("rmsnorm",), "Nothing.", fwd=OPS["rmsnorm"].fwd)
    monkeypatch.setattr(power, "bugs_of", lambda op, way: [planted])
    matrix = power_count.count(records("rmsnorm", ("planted",)))
    assert [r["id"] for r in matrix.survivors] == ["planted"]
    assert matrix.total("fp32").bugs == 1
    assert power_table.lists(matrix)["survivors"] == ["fp32 rmsnorm forward planted (no output differs)"]


def test_a_wrong_name_is_told_of_and_an_equal_bugs_name_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Named first by another bug's name: not counted. By the name of one that is the same function: counted."""
    ids = ("rmsnorm-unit-offset",)
    (right,) = records("rmsnorm", ids, named=True)
    assert right["named"][0][0] == "rmsnorm-unit-offset"
    assert power_count.count([right]).total("fp32").first == 1
    wrong = {**right, "named": [["rmsnorm-eps-missing", 3], ["rmsnorm-unit-offset", 3]]}
    matrix = power_count.count([wrong, *records("rmsnorm", ("rmsnorm-eps-missing",))])
    assert matrix.total("fp32").first == 0
    assert power_table.lists(matrix)["taken for something else"] == [
        "fp32 rmsnorm forward rmsnorm-unit-offset: named rmsnorm-eps-missing, rmsnorm-unit-offset; itself: 2"
    ]
    twin = {**right, "id": "twin", "named": []}
    assert power_count.same(right, [right, twin]) == ["rmsnorm-unit-offset", "twin"]
    assert power_count.count([{**right, "named": [["twin", 3]]}, twin]).total("fp32").first == 1


def test_a_bug_that_is_an_attributes_value_may_be_named_so() -> None:
    """mask-verify-sees-future is causal=False: either name is right."""
    record = {"id": "mask-verify-sees-future", "print": {}}
    assert power_count.same(record, [record]) == ["mask-verify-sees-future", "causal=False"]


def test_fingerprints_tell_functions_apart_and_not_the_last_bits() -> None:
    v = vector("rmsnorm", "latent")
    truth = truth_of(v.op, "forward", v.inputs, v.case.attrs)["y"]
    ours = {"latent": power.fingerprint(v, {"y": truth})}

    def alike(y: np.ndarray) -> bool:
        return power_count._alike(ours, {"latent": power.fingerprint(v, {"y": y})})

    assert alike(truth * (1 + 1e-14))
    assert not alike(truth * (1 + 1e-6))
    swapped = truth.copy()
    swapped[0, :2] = truth[0, 1::-1]
    assert not alike(swapped)
    holed = truth.copy()
    holed[0, 0] = np.nan
    assert not alike(holed)
    assert not power_count._alike(ours, {})


def test_the_quick_form_is_a_fixed_sample_of_every_cheap_op() -> None:
    """The same bugs and cases every time, whatever the order; a part of all, and none of another's cost."""
    quick, full = power.parts(quick=True), power.parts(quick=False)
    assert power.parts(quick=True) == quick
    count = lambda parts: sum(len([i for i in p.ids if i != CORRECT]) for p in parts)  # noqa: E731
    assert 0.05 * count(full) < count(quick) < 0.2 * count(full)
    for part in quick:
        op = OPS[part.op]
        for bug in (b for b in bugs_of(op, part.direction) if b.id in part.ids):
            cases = power_sample.drawn(bug, op, part.direction, part.precision, STORE)
            caught = power_sample.revealing(bug.id, op, part.direction, part.precision)
            recipes = len({power_sample.recipes_of(op, c) for c in op.cases})
            assert 0 < len(cases) <= max(power_sample.QUICK["cases"], recipes)
            assert not caught or caught & {c.name for c in cases}, bug.id
            assert max(power_sample.flops(op, c) for c in cases) <= power_sample.form(op)["flops"]
    whole = {(p.op, p.direction, p.precision, i) for p in full for i in p.ids}
    assert {(p.op, p.direction, p.precision, i) for p in quick for i in p.ids} <= whole
    for op in OPS.values():
        for way in directions(op):
            assert {i for o, d, p, i in whole if (o, d, p) == (op.name, way, "fp32")} == {b.id for b in bugs_of(op, way)} | {CORRECT}


@pytest.mark.parametrize(
    ("op", "direction", "precision", "id"),
    [
        ("cross_entropy", "forward", "fp32", "cross-entropy-no-maximum"),  # an infinite sum has no noise that makes it NaN
        ("router.softmax", "backward", "bf16-eager", "sigmoid-instead-of-softmax"),  # not an open tie, after which a backward is not judged
    ],
)
def test_what_was_once_misnamed_is_named_first(op: str, direction: str, precision: str, id: str) -> None:
    (record,) = records(op, (id,), direction, precision, named=True)
    assert record["named"][0][0] == id
    assert record["named"][0][1] > 1


def test_fp8_bugs_are_counted_under_each_recipe() -> None:
    """Codes of what the scale was before it became a power of two: a bug of the recipes that have such scales, nothing under the others."""
    matrix = power_count.count(records("fp8.quantize_tile", ("ue8m0-round-after-quant", CORRECT)))
    assert matrix.recipes is not None
    rows = matrix.recipes.rows["fp32"]
    assert rows.keys() == RECIPES.keys()
    powers = {name for name in RECIPES if name.endswith("ue8m0") or name in ("flashmla", "mxfp4")}
    assert {name for name in RECIPES if rows[name].bugs} == powers
    for name in powers:
        assert rows[name].killed["leadline"] == rows[name].bugs == 1
    for name, cases in power_count.recipes_in("fp8.quantize_tile").items():
        assert rows[name].correct == len(cases)
        assert not rows[name].alarms["leadline"]


def test_a_bug_is_named_under_a_recipe_by_that_recipes_cases() -> None:
    """Each recipe under which a bug fails has a case that is explained; what is named wrongly there is told of with the recipe."""
    (record,) = records("fp8.quantize_tile", ("scale-inverted",), named=True)
    cases = power_count.recipes_in("fp8.quantize_tile")
    assert record["by_recipe"].keys() == {recipe for recipe in cases if {*cases[recipe]} & {*record["computed"]}} >= {"v3", "te-ue8m0"}
    wrong = {**record, "by_recipe": {**record["by_recipe"], "te-ue8m0": ["recipe=v3"]}}
    matrix = power_count.count([wrong])
    assert matrix.recipes is not None
    assert matrix.recipes.rows["fp32"]["te-ue8m0"].first == 0
    assert matrix.recipes.rows["fp32"]["v3"].first == 1
    assert power_table.lists(matrix)["taken for something else"] == [
        "fp32 fp8.quantize_tile under te-ue8m0 forward scale-inverted: named recipe=v3; itself: not at all"
    ]


def test_the_wall_of_variants_is_told_beside_the_bugs(tmp_path: Path) -> None:
    """What tests/wall.py wrote: the false alarms of every judge; one of ours is told of as missed."""
    record = {"precision": "fp32", "cases": 40, "false_alarms": 0, "field": {name: i for i, name in enumerate(METRICS)}}
    path = tmp_path / "wall.jsonl"
    arguments = ["power", "--full", "--op", "rmsnorm", "--precision", "fp32", "--unnamed", "--wall", str(path)]
    path.write_text(f"{json.dumps(record)}\n{json.dumps(record)}\n")
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (line,) = (line for line in result.output.splitlines() if line.startswith("of variants"))
    assert line.split()[2:] == ["80", "0", "0", "2", "4", "6", "8"]
    path.write_text(f"{json.dumps({**record, 'false_alarms': 1})}\n")
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 1
    assert "MISSED fp32: correct variants fail 1 of 40 cases; expected none" in result.output
    path.write_text('{"schema": "leadline.report/1"}\n')
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, result.stderr.count("wall.jsonl"), result.stderr.count("\n")) == (2, 1, 1)


def test_the_command_writes_lines_and_takes_them_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the file holds is not done again; a line that was cut off is."""
    path = tmp_path / "power.jsonl"
    arguments = ["power", "--full", "--op", "rmsnorm", "--precision", "fp32", "--unnamed", "--json", "--resume", str(path)]

    def run() -> list[dict[str, Any]]:
        result = CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return [json.loads(line) for line in result.output.splitlines()]

    first = run()
    assert first[0] == {"schema": power.SCHEMA}
    assert first[-1]["total"]["fp32"]["killed"]["leadline"] == first[-1]["total"]["fp32"]["bugs"] > 8
    assert first[-1]["missed"] == []
    asked: list[str] = []
    original = power._record
    monkeypatch.setattr(power, "_record", lambda bug, *rest: asked.append(bug.id) or original(bug, *rest))
    assert run()[-1] == first[-1]
    assert not asked
    path.write_text(path.read_text().rstrip("\n")[:-30])
    assert run()[-1] == first[-1]
    assert len(asked) == 1


def test_a_file_of_something_else_is_not_taken_up(tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    for text in ('{"schema": "leadline.report/1"}\n', "not JSON\n{}\n"):
        path.write_text(text)
        with pytest.raises(UsageError, match=r"other.jsonl"):
            power_table.read(path)


def test_a_missed_figure_is_exit_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power, "judge_closely", lambda *_: Judgement())
    result = CliRunner().invoke(main, ["power", "--full", "--op", "rmsnorm", "--precision", "fp32", "--unnamed"])
    assert result.exit_code == 1
    assert "MISSED fp32: 0.0% of the bugs fail; expected 100%" in result.output
    assert "survivors" in result.output
    result = CliRunner().invoke(main, ["power", "--op", "rmsnrm"])
    assert (result.exit_code, "did you mean rmsnorm" in result.stderr) == (2, True)


def test_two_processes_find_what_one_finds() -> None:
    work = power.parts(["rope.frequencies", "swiglu"], ["fp32"], quick=False, named=False)
    one, two = ([r for _, found in power.run(work, STORE, jobs) for r in found] for jobs in (1, 2))
    key = lambda r: (r["op"], r["direction"], r["id"])  # noqa: E731
    assert sorted(one, key=key) == sorted(two, key=key)
    assert power_table.totals(power_count.count(one)) == power_table.totals(power_count.count(two[::-1]))


def test_a_variant_that_refuses_a_case_is_not_asked_of_it() -> None:
    """A ValueError means that the bug does not apply to these sizes."""

    def refuses(*arrays: Any, **attrs: Any) -> Any:
        raise ValueError("not these")

    v = vector("rmsnorm", "latent")
    assert power.outputs_of(Bug("refuses", ("rmsnorm",), "", fwd=refuses), v) is None
    assert power.outputs_of(replace(Bug("right", ("rmsnorm",), "")), v) is not None
