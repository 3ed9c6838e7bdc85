"""What others wrote, held to the vectors: their right answers pass, their known conventions are named."""

import importlib.util

import pytest
from leadline.golden import Report, verify
from leadline.golden.judge import FAIL, PASS, SKIPPED

pytestmark = pytest.mark.peers

CASTS = [f"{kind}.{fmt}" for kind in ("cast", "encode", "decode") for fmt in ("e4m3fn", "e5m2", "bf16", "fp16")]


def run(subject: str, *ops: str, **options: object) -> Report:
    if importlib.util.find_spec(subject.partition(".")[0]) is None:
        pytest.skip(f"needs {subject} (the extra peers)")
    return verify(subject, list(ops), **options)  # type: ignore[arg-type]


def test_transformers_router_and_norm_pass_forward_and_backward_at_fp32_and_bf16() -> None:
    """Hugging Face's DeepseekV3TopkRouter and DeepseekV3RMSNorm, through torch's autograd for the backward."""
    report = run("transformers", "router.noaux_tc", "rmsnorm").raise_for_verdict()
    assert {(r.op, r.direction, r.precision) for r in report.results if r.verdict == PASS} == {
        (op, direction, precision)
        for op in ("router.noaux_tc", "rmsnorm")
        for direction in ("forward", "backward")
        for precision in ("fp32", "bf16")
    }


@pytest.mark.parametrize("subject", ["transformers", "transformers.v2"])
def test_transformers_attention_passes_forward_and_backward(subject: str) -> None:
    """DeepseekV3Attention and DeepseekV2Attention: every configuration, YaRN on and off, chunks after a cache and packed rows, at fp32 and
    bf16; the backward through torch's autograd. All that is left out is what they say they do not do."""
    report = run(subject, "rope.frequencies", "rope", "mla.prefill").raise_for_verdict()
    passed = {(r.op, r.direction, r.precision) for r in report.results if r.verdict == PASS}
    both = {(op, way, p) for op in ("rope", "mla.prefill") for way in ("forward", "backward") for p in ("fp32", "bf16")}
    assert passed == both | {("rope.frequencies", "forward", p) for p in ("fp32", "bf16")}
    cases = {r.case for r in report.results if r.op == "mla.prefill" and r.verdict == PASS}
    assert {"v3", "v2", "v2-lite", "kimi-k2", "moonlight", "chunk", "packed"} <= cases
    assert all(r.reason for r in report.results if r.verdict == SKIPPED)


def test_transformers_norm_fails_at_bf16_where_it_does_not_say_how_it_rounds() -> None:
    """Its two roundings are beyond what one rounding allows: the difference is declared, and without that it is named."""
    from leadline.golden.subjects import transformers as theirs

    def norm(x, weight, eps):
        return theirs.rmsnorm(x, weight, eps, "cast_then_weight")

    report = verify(norm, "rmsnorm", precision="bf16", framework="torch")
    assert report.verdict == FAIL
    (group,) = report.groups()
    assert "cast_order=cast_then_weight" in {e.id for e, _ in report.explanations(group)}


@pytest.mark.parametrize("op", CASTS)
def test_torch_casts_pass(op: str) -> None:
    """torch's conversions to and from its narrow dtypes, at fp32 and bf16."""
    run("torch", op).raise_for_verdict()


def test_torch_rms_norm_passes_forward_and_backward() -> None:
    """F.rms_norm at fp32 and bf16."""
    assert run("torch", "rmsnorm").raise_for_verdict().count(PASS) == 40


@pytest.mark.parametrize("op", CASTS)
def test_gfloat_passes(op: str) -> None:
    """gfloat's slow and careful rounding agrees, at fp32, bf16 and fp64."""
    run("gfloat", op, precision=["fp32", "bf16", "fp64"]).raise_for_verdict()


@pytest.mark.parametrize("op", ["cast.e4m3fn", "encode.e4m3fn"])
def test_ml_dtypes_overflow_is_named_and_passes_when_declared(op: str) -> None:
    """Its NaN above 464 fails the default, is told why, and passes with overflow=nan."""
    report = run("ml_dtypes", op)
    assert report.verdict == FAIL
    for group in report.groups():
        ((explanation, _), *others) = report.explanations(group)
        assert not others
        assert explanation.id == "e4m3-overflow-nan"
        assert "464" in explanation.text
        assert "overflow=nan" in explanation.mend
    run("ml_dtypes", op, attrs={"overflow": "nan"}).raise_for_verdict()


def test_ml_dtypes_rounds_float64_twice() -> None:
    """From float64 it goes through float32: at fp64 it fails just above midpoints, and not for its overflow."""
    report = run("ml_dtypes", "cast.e4m3fn", precision="fp64", attrs={"overflow": "nan"})
    assert report.verdict == FAIL
    assert [r.case for r in report.results if r.verdict == FAIL] == ["boundary"]
