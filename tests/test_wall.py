"""The judge's first duty: no correct implementation fails. tests/variants holds many, as different as real kernels are from each other."""

import json
import os
from typing import Any

import pytest
import wall
from leadline.golden.vectors import Store
from leadline.golden.verify import Report, verify
from variants import ALL, COS_SIN_STORED, FAST_EXP, ROUNDED_FIRST, SILU_STORED, VARIANTS, Variant

STORE = Store()
OPS = list(dict.fromkeys((v.op, v.direction) for v in VARIANTS))
PRECISIONS = (*ALL, "bf16-eager")
# An op's variants one after the other, so that they share what is costly.
ASKED = [(v, p) for op in OPS for p in PRECISIONS for v in VARIANTS if (v.op, v.direction) == op and p in v.precisions]
ROUTER_ATTRS = (
    {"mask_fill": "0"},
    {"scoring": "softmax"},
    {"scoring": "sqrtsoftplus"},
    {"norm_topk_prob": False},
    {"denominator_eps": 0.0},
    {"scoring": "softmax", "norm_topk_prob": False},
    {"n_group": 1, "topk_group": 1},
)


def asked(variant: Variant, precision: str, seeds: Any, attrs: dict[str, Any] | None = None, profile: Any = "quick") -> Report:
    return verify(
        variant.at(precision),
        op=variant.op,
        precision=precision,
        direction=variant.direction,
        seeds=seeds,
        attrs=attrs,
        profile=profile,
        explained=False,
        store=STORE,
    )


def complaint(report: Report) -> str:
    """Empty if every case passed; a case that was not asked is no pass."""
    return "" if report.count("PASS") == len(report.results) > 0 else str(report)


@pytest.mark.parametrize(("variant", "precision"), [pytest.param(v, p, id=f"{v.id}-{p}") for v, p in ASKED])
def test_correct_implementations_pass(variant: Variant, precision: str) -> None:
    """A correct implementation passes every case, of the stored vectors and of a fresh draw, at each precision that it computes in."""
    report = asked(variant, precision, (1,) if variant.slow else (0, 1))
    assert not complaint(report)


@pytest.mark.parametrize("attrs", ROUTER_ATTRS, ids=str)
def test_correct_routers_pass_with_other_attributes(attrs: dict[str, Any]) -> None:
    """The same where attributes are asked for that differ from a case's own: another fill, score function, normalisation, no groups."""
    routers = [v for v in VARIANTS if v.op == "router.noaux_tc"]
    turn = ROUTER_ATTRS.index(attrs)
    for variant in routers[turn % 2 :: 4]:
        for precision in variant.precisions[:2]:
            # A bf16 gate rounds these scores, too, but its straight-through slope is theirs alone.
            assert not complaint(asked(variant, precision, (2,), {"gate_dtype": "float32", **attrs}))


@pytest.mark.parametrize("overflow", ["saturate", "nan"])
def test_correct_casts_pass_with_either_overflow(overflow: str) -> None:
    """Both overflow rules, of every cast and encoding. E2M1 has no NaN to overflow to."""
    for variant in VARIANTS:
        refused = overflow == "nan" and variant.op.endswith(".e2m1")
        if variant.op.startswith(("cast", "encode")) and not variant.slow and not refused:
            assert not complaint(asked(variant, "fp32", (1,), {"overflow": overflow}))


@pytest.mark.parametrize("variant", ROUNDED_FIRST, ids=lambda v: v.id)
def test_either_cast_order_passes_as_what_it_says(variant: Variant) -> None:
    """An RMSNorm that rounds x·rstd to bfloat16 before the weight passes once cast_order says so."""
    assert not complaint(asked(variant, "bf16", (0, 1), {"cast_order": "cast_then_weight"}))


@pytest.mark.parametrize("variant", COS_SIN_STORED, ids=lambda v: f"{v.id}-{v.precisions[0]}")
def test_a_stored_table_of_cosines_passes_as_what_it_says(variant: Variant) -> None:
    """A rotation by cos and sin that were rounded to bfloat16 passes once cos_sin says so."""
    assert not complaint(asked(variant, variant.precisions[0], (1, 2), {"cos_sin": "stored"}))


@pytest.mark.parametrize("variant", SILU_STORED, ids=lambda v: f"{v.id}-{v.precisions[0]}")
def test_a_stored_silu_passes_as_what_it_says(variant: Variant) -> None:
    """silu(gate) rounded to the activations' format before the product passes once silu says so."""
    assert not complaint(asked(variant, variant.precisions[0], (1, 2), {"silu": "stored"}))


@pytest.mark.parametrize("precision", FAST_EXP.precisions)
def test_the_hardware_exponential_passes(precision: str) -> None:
    """exp(x) as 2^(x·log2 e) with the product rounded, which is what CUDA's __expf and Triton's tl.exp compute, is a correct float32 exp:
    its error grows with |x|, by design. (The case v3-low has logits down to -60.)"""
    for attrs in ({}, {"scoring": "softmax"}, {"scoring": "sqrtsoftplus"}):
        assert not complaint(asked(FAST_EXP, precision, (0, 1), attrs))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_wall_has_forty_variants(precision: str) -> None:
    """At every precision at least 40 correct variants are judged by the full run (tests/wall.py)."""
    assert sum(precision in wall.precisions_of(v) for v in wall.everyone()) >= 40


@pytest.mark.parametrize("op", wall.ROUND_ONCE)
def test_what_rounds_once_passes_where_every_operation_rounds(op: str) -> None:
    """Ops of one operation, whose variants for bf16 stand in the wall of bf16-eager, too."""
    for direction in dict.fromkeys(d for o, d in OPS if o == op):
        (found,) = wall.climb(op, direction, (0,), ("bf16-eager",))
        assert found["cases"] > 0 == found["refused"], found
        assert not found["complaints"], found["complaints"][0]


def test_the_wall_counts_a_false_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variant that is wrong is counted, by its name, and so are the metrics that notice it."""
    wrong = Variant("wrong", "swiglu", "forward", lambda gate, up, **attrs: gate * up, ("fp32",))
    monkeypatch.setattr(wall, "everyone", lambda: [wrong])
    (found,) = wall.climb("swiglu", "forward", range(2))
    assert found["draws"] == 2
    assert found["false_alarms"] == found["cases"] == len(found["complaints"]) > 0
    assert found["complaints"][0].startswith("swiglu-forward-wrong fp32 ")
    assert found["field"]["allclose(1e-2)"] == found["cases"]
    assert wall.totals([found, found])["fp32"]["false_alarms"] == 2 * found["false_alarms"]


@pytest.mark.slow
@pytest.mark.parametrize(("op", "direction"), OPS)
def test_correct_implementations_pass_100_draws(op: str, direction: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No false alarm in 100 draws (LEADLINE_WALL_SEEDS says another number) of every case at every precision; what was judged is printed
    as JSON, with the largest share statistic/limit. `python tests/wall.py` is the same with totals, and can be taken up again.

    Last ran 2026-11-22, 200 draws in parts, and found no false alarm. At every precision: rmsnorm (48,000 cases backward), casts, encodings
    and decodings of e5m2 and bf16 (80,640). At fp32 and bf16: router (36,400 forward, 26,000 backward), e4m3fn (21,760), cast.fp16 (9,680),
    dequantize_tile (9,600), quantize_tile (148,400). Largest share of a limit: 0.57 (rmsnorm backward, bf16, block). Earlier
    forms of the judge failed here: see "reach" in golden/band.py and "equal values" in golden/montecarlo.py.
    """
    found = wall.climb(op, direction, range(int(os.environ.get("LEADLINE_WALL_SEEDS", "100"))))
    with capsys.disabled():
        for record in found:
            print(f"\n{json.dumps({k: v for k, v in record.items() if k != 'complaints'})}", end="")
    complaints = [complaint for record in found for complaint in record["complaints"]]
    assert not complaints, "\n".join(complaints[:20])
