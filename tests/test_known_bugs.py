"""The judge's second duty: what is wrong fails, and is told why. The wrong subjects here share nothing with golden/bugs."""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from leadline.golden.bugs import bugs_of
from leadline.golden.generate import caught
from leadline.golden.precision import PRECISIONS
from leadline.golden.vectors import Store, directions
from leadline.golden.verify import Report, verify
from leadline.ref.fp8 import RECIPES
from leadline.ref.op import OPS, Op
from variants import casts, decodes, floats, quantize

Array = np.ndarray
STORE = Store()

# ---- wrong subjects


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def wrong_router(fill: float = -np.inf, leak: bool = False, best: int = 2) -> Callable:
    def router(logits: Array, bias: Array, *, k: int, n_group: int, topk_group: int, **rest: Any) -> tuple[Array, Array]:
        scoring, factor, eps = rest["scoring"], rest["routed_scaling_factor"], rest["denominator_eps"]
        if rest["denominator_place"] != "add" or rest["gate_dtype"] != "float32":
            raise NotImplementedError("an added eps and a float32 gate")
        if scoring == "softmax":
            s = np.exp(logits - logits.max(1, keepdims=True))
            s /= s.sum(1, keepdims=True)
        else:
            s = sigmoid(logits) if scoring == "sigmoid" else np.sqrt(np.logaddexp(np.float32(0), logits))
        t = s + bias
        if n_group > 1:
            groups = np.sort(t.reshape(len(t), n_group, -1), -1)[..., -best:].sum(-1)
            worst = np.argsort(-groups, axis=1, kind="stable")[:, topk_group:]
            for row, out in zip(t.reshape(len(t), n_group, -1), worst, strict=True):
                row[out] = fill
        idx = np.argsort(-t, axis=1, kind="stable")[:, :k]
        w = np.take_along_axis(s + bias if leak else s, idx, 1)
        return idx, (w / (w.sum(1, keepdims=True) + np.float32(eps)) if rest["norm_topk_prob"] else w) * np.float32(factor)

    return router


def constant_normaliser(logits: Array, bias: Array, topk_idx: Array, dtopk_weight: Array, **a: Any) -> Array:
    """The scores' sum as if it did not depend on the logits."""
    if a["scoring"] != "sigmoid":
        raise NotImplementedError("sigmoid only")
    chosen = sigmoid(np.take_along_axis(logits, topk_idx, 1))
    total = chosen.sum(1, keepdims=True) + np.float32(a["denominator_eps"]) if a["norm_topk_prob"] else np.float32(1)
    dlogits = np.zeros_like(logits)
    np.put_along_axis(dlogits, topk_idx, dtopk_weight * np.float32(a["routed_scaling_factor"]) / total * chosen * (1 - chosen), 1)
    return dlogits


def eps_outside(x: Array, weight: Array, *, eps: float) -> Array:
    return x / (np.sqrt((x * x).mean(1, keepdims=True)) + np.float32(eps)) * weight


def eps_forgotten(x: Array, weight: Array) -> Array:
    rms = np.sqrt(np.einsum("nd,nd->n", x, x) / x.shape[1])[:, None]
    return np.divide(x, rms) * weight


def gemma(x: Array, weight: Array, *, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(1, keepdims=True) + np.float32(eps)) * (weight + 1)


def no_projection(x: Array, weight: Array, dy: Array, *, eps: float) -> tuple[Array, Array]:
    rms = np.sqrt((x * x).mean(1, keepdims=True) + np.float32(eps))
    return dy * weight / rms, (dy * x / rms).sum(0)


def dweight_of_x(x: Array, weight: Array, dy: Array, *, eps: float) -> tuple[Array, Array]:
    rstd = 1 / np.sqrt((x * x).mean(1, keepdims=True) + np.float32(eps))
    g = dy * weight
    return rstd * g - x * rstd**3 * (g * x).mean(1, keepdims=True), (dy * x).sum(0)


def half_away(x: Array) -> Array:
    """e4m3fn with ties rounded away from zero: half a unit is added and the rest cut off."""
    a = np.minimum(np.abs(x).astype(np.float64), 1e6)
    unit = 2.0 ** (np.maximum(np.floor(np.log2(np.maximum(a, 2.0**-9))), -6) - 3)
    y = np.minimum(np.floor(a / unit + 0.5) * unit, 448.0)
    return np.copysign(np.where(np.isnan(x), np.nan, y), x).astype(np.float32)


def cut_off(x: Array, *, overflow: str) -> Array:
    """bfloat16 by dropping the lower half."""
    u = x.view(np.uint32) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), x, u.view(np.float32))


def small_binade(codes: Array) -> Array:
    y = decodes.table(floats.LAYOUTS["e4m3fn"], codes)
    return np.where(np.abs(y) < 2.0**-6, y * np.float32(0.5), y)


def tile_of_240(x: Array, *, recipe: str, tile: int, axis: int, format: str) -> tuple[Array, Array]:
    if recipe != "v3" or axis != 1:
        raise NotImplementedError("v3 along rows only")
    blocks = np.pad(x, ((0, 0), (0, -x.shape[1] % tile))).reshape(len(x), -1, tile)
    s = np.maximum(np.abs(blocks).max(-1), np.float32(1e-4)) / np.float32(240)
    v = (blocks / s[..., None]).reshape(len(x), -1)[:, : x.shape[1]]
    return casts.encode_by("frexp", floats.LAYOUTS[format], v.ravel(), "saturate").reshape(v.shape), s


def reciprocal(x: Array, *, recipe: str, tile: int, axis: int, format: str) -> tuple[Array, Array]:
    """v3 divides; this multiplies."""
    if recipe != "v3" or axis != 1:
        raise NotImplementedError("v3 along rows only")
    with np.errstate(all="ignore"):
        codes, _ = quantize.padded(x, recipe="deepgemm", tile=tile, format=format)
        return codes, quantize.padded(x, recipe=recipe, tile=tile, format=format)[1]


def inverse_scale(codes: Array, scale: Array, *, tile: int, axis: int, format: str) -> Array:
    return quantize.repeated(codes, 1 / scale, tile=tile, axis=axis, format=format)


WRONG = [
    ("group-mask-zero", "router.noaux_tc", "forward", wrong_router(fill=0.0)),
    ("bias-leaks-into-weights", "router.noaux_tc", "forward", wrong_router(leak=True)),
    ("group-score-max", "router.noaux_tc", "forward", wrong_router(best=1)),
    ("gate-grad-through-norm-dropped", "router.noaux_tc", "backward", constant_normaliser),
    ("rmsnorm-eps-outside", "rmsnorm", "forward", eps_outside),
    ("rmsnorm-eps-missing", "rmsnorm", "forward", eps_forgotten),
    ("rmsnorm-unit-offset", "rmsnorm", "forward", gemma),
    ("rmsnorm-bwd-projection-missing", "rmsnorm", "backward", no_projection),
    ("rmsnorm-bwd-dweight-unnormalised", "rmsnorm", "backward", dweight_of_x),
    ("e4m3-round-half-away", "cast.e4m3fn", "forward", half_away),
    ("fp8-subnormal-binade", "decode.e4m3fn", "forward", small_binade),
    ("fp8-max-wrong", "fp8.quantize_tile", "forward", tile_of_240),
    ("scale-reciprocal-multiply", "fp8.quantize_tile", "forward", reciprocal),
    ("scale-inverted", "fp8.dequantize_tile", "forward", inverse_scale),
]


def named(report: Report) -> list[str]:
    """The bugs that explain the report. Attributes and precisions that would make it right (recipe=deepgemm) are no bugs."""
    (group,) = report.groups()
    return [e.id for e, _ in report.explanations(group) if "=" not in e.id]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("bug", "op", "direction", "subject"), [pytest.param(*w, id=w[0] + "-" + w[1]) for w in WRONG])
def test_a_wrong_subject_fails_and_is_told_why(bug: str, op: str, direction: str, subject: Callable, precision: str) -> None:
    """A subject with a known bug fails at float32 and at bfloat16, and its own bug is named and no other."""
    with np.errstate(all="ignore"):
        report = verify(subject, op=op, direction=direction, precision=precision, store=STORE)
    assert report.verdict == "FAIL", str(report)
    assert named(report) == [bug], str(report)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_wrong_cast_of_bf16_fails(precision: str) -> None:
    """Cutting off instead of rounding to bfloat16 fails from float32, and passes from bfloat16 inputs, where nothing is cut off."""
    report = verify(cut_off, op="cast.bf16", direction="forward", precision=precision, store=STORE)
    assert (report.verdict, named(report)) == (("FAIL", ["e4m3-truncate"]) if precision == "fp32" else ("PASS", [])), str(report)


@pytest.mark.parametrize("share", [1e-3, -1e-3, 1e-4])
@pytest.mark.parametrize(("op", "precision", "least"), [("rmsnorm", "fp32", 1e-5), ("rmsnorm", "bf16", 1e-3)])
def test_a_constant_factor_fails(op: str, precision: str, least: float, share: float) -> None:
    """An output that is too large by one part in a thousand fails, in float32 by one in ten thousand too: beyond all rounding."""
    if abs(share) < least:
        pytest.skip("below what the precision shows")

    def subject(x: Array, weight: Array, *, eps: float) -> Array:
        y = x / np.sqrt((x * x).mean(1, keepdims=True) + np.float32(eps)) * weight * np.float32(1 + share)
        return floats.STORE[precision](y)

    assert verify(subject, op=op, precision=precision, direction="forward", explained=False, store=STORE).verdict == "FAIL"


def test_a_biased_rounding_of_the_output_fails() -> None:
    """Cutting the output off to bfloat16 errs by less than one unit everywhere, always toward zero: a bias, and a bug."""

    def subject(x: Array, weight: Array, *, eps: float) -> Array:
        return cut_off(good(x, weight, eps=eps), overflow="nan")

    report = verify(subject, op="rmsnorm", precision="bf16", direction="forward", explained=False, store=STORE)
    assert report.count("FAIL") >= len(report.results) - 1, str(report)  # a single element has no bias


UE8M0 = {"v3-ue8m0", "v32-ue8m0", "deepgemm-ue8m0", "deepep-ue8m0", "tilekernels-ue8m0", "te-ue8m0"}


@pytest.mark.parametrize("own", RECIPES)
def test_a_recipe_passes_as_itself_alone(own: str) -> None:
    """A subject that follows one recipe fails as every other one, and is told which it follows. With scales that are powers of two, those
    that differ only before the rounding up agree."""

    def subject(x: Array, *, recipe: str, tile: int, axis: int, format: str) -> tuple[Array, Array]:
        return quantize.padded(x, recipe=own, tile=tile, axis=axis, format=format)

    report = verify(subject, op="fp8.quantize_tile", direction="forward", precision="fp32", store=STORE)
    verdicts: dict[str, set[str]] = {}
    for result in report.results:
        verdicts.setdefault(result.attrs.get("recipe", "v3"), set()).add(result.verdict)
    (group,) = report.groups()
    assert verdicts[own] - {"SKIPPED"} == {"PASS"}  # a case with another tie rule is not asked
    assert {recipe for recipe, found in verdicts.items() if found == {"PASS"}} - {own} <= (UE8M0 if own in UE8M0 else set())
    assert f"recipe={own}" in [e.id for e, _ in report.explanations(group)]


def test_log2_of_the_scale_is_no_exact_power_of_two() -> None:
    """A scale rounded up by way of a float32 log2 (v3-ue8m0) fails as a recipe that works on the bits, in the stored vectors of each such
    recipe: just above a power of two log2 falls on it."""
    for recipe in UE8M0 - {"v3-ue8m0"}:

        def subject(x: Array, *, recipe: str, tile: int, axis: int, format: str) -> tuple[Array, Array]:
            s = quantize.padded(x, recipe="v32" if recipe.startswith(("v32", "deepep")) else "v3", tile=tile, axis=axis, format=format)[1]
            s = quantize.up_by_wide_log2(s)
            each = np.repeat(s, tile, axis=axis)[: x.shape[0], : x.shape[1]]
            return casts.encode_by("frexp", floats.LAYOUTS[format], (x / each).ravel(), "saturate").reshape(x.shape), s

        report = verify(
            subject, op="fp8.quantize_tile", direction="forward", precision="fp32", attrs={"recipe": recipe}, explained=False, store=STORE
        )
        assert report.verdict == "FAIL", recipe


# ---- the stored vectors

ALREADY = "16-bit inputs lie on the grid that the bug rounds to"
INVISIBLE_AT_BF16 = {
    **{(f"{kind}.{f}", "forward", "fp8-double-rounding"): ALREADY for kind in ("cast", "encode") for f in ("e4m3fn", "e5m2", "e4m3fnuz")},
    **{
        (op, "forward", bug): ALREADY
        for op in ("cast.bf16", "encode.bf16", "cast.tf32")
        for bug in ("e4m3-round-half-away", "e4m3-truncate")
    },
    **{
        (f"fp8.quantize_{what}", "forward", "ue8m0-log2-inexact"): "no bf16 amax lies that near to a power of two"
        for what in ("tile", "block")
    },
    ("fp8.gemm", "forward", "accumulator-wide"): "the last group's 14th bit is below bf16's last place",
    ("router.noaux_tc", "forward", "router-logits-bf16"): ALREADY,
    ("router.softmax", "forward", "router-logits-bf16"): ALREADY,
    ("router.bias_update", "forward", "bias-out-bf16"): ALREADY,
}
KNOWN = [(op, way, bug) for op in OPS for way in directions(OPS[op]) for bug in dict.fromkeys(b.id for b in bugs_of(OPS[op], way))]


@pytest.mark.parametrize(("op", "direction", "bug"), KNOWN)
def test_every_known_bug_is_caught(op: str, direction: str, bug: str) -> None:
    """Some stored vector fails each known bug at float32 and at bfloat16, with the listed exceptions; the first of them is asked again."""
    for precision in ("fp32", "bf16"):
        stored = [STORE.get(OPS[op], case, direction, PRECISIONS[precision]) for case in OPS[op].cases]
        catching = [v for v in stored if bug in v.flags]
        if precision == "bf16" and (op, direction, bug) in INVISIBLE_AT_BF16:
            assert not catching, f"{bug} is caught at bf16 by {catching[0].id}: it is no exception any more"
            continue
        assert catching, f"no stored {precision} vector of {op} {direction} catches {bug}"
        assert bug in caught(catching[0])


# ---- subjects that misbehave


def good(x: Array, weight: Array, *, eps: float = 1e-6) -> Array:
    return x / np.sqrt((x * x).mean(1, keepdims=True) + np.float32(eps)) * weight


def at_small(change: Callable[[Array, Array, Array], Any]) -> Callable:
    """Right but for the case small (4×129), where change(x, weight, y) is returned."""

    def subject(x: Array, weight: Array, *, eps: float = 1e-6) -> Any:
        y = good(x, weight, eps=eps)
        return change(x, weight, y) if x.shape == (4, 129) else y

    return subject


def raised(x: Array, weight: Array, y: Array) -> Array:
    raise KeyError("no such tile")


def not_finite(x: Array, weight: Array, y: Array) -> Array:
    y[2, 7] = np.nan
    return y


def mutated(x: Array, weight: Array, y: Array) -> Array:
    x *= weight
    return y


def refused(x: Array, weight: Array, y: Array) -> Array:
    raise NotImplementedError("rows of 129 are not supported")


MISBEHAVED = {
    "raises": (raised, "ERROR", "KeyError: 'no such tile'"),
    "refuses": (refused, "SKIPPED", "rows of 129 are not supported"),
    "wrong-shape": (lambda x, w, y: y.T, "FAIL", "y has shape (129, 4); expected (4, 129)"),
    "wrong-rank": (lambda x, w, y: y.ravel(), "FAIL", "y has shape (516,); expected (4, 129)"),
    "wrong-dtype": (lambda x, w, y: y.astype(np.float64), "FAIL", "y is float64; expected float32"),
    "half": (lambda x, w, y: y.astype(np.float16), "FAIL", "y is float16; expected float32"),
    "integers": (lambda x, w, y: y.astype(np.int32), "FAIL", "y is int32; expected float32"),
    "complex": (lambda x, w, y: y.astype(np.complex64), "FAIL", "y is complex64; expected float32"),
    "two-outputs": (lambda x, w, y: (y, y), "FAIL", "returned 2 outputs; expected 1: y"),
    "none": (lambda x, w, y: None, "FAIL", "y is NoneType"),
    "text": (lambda x, w, y: "done", "FAIL", "y"),
    "other-name": (lambda x, w, y: {"out": y}, "FAIL", "returned out; y is missing"),
    "nan": (not_finite, "FAIL", "y[2, 7] is nan; the truth is"),
    "infinity": (lambda x, w, y: np.full_like(y, np.inf), "FAIL", "y[0, 0] is inf; the truth is"),
    "zeros": (lambda x, w, y: np.zeros_like(y), "FAIL", "y is off by max"),
    "mutates": (mutated, "FAIL", "x was changed in place"),
}


@pytest.mark.parametrize("how", MISBEHAVED)
def test_misbehaviour_costs_one_case(how: str) -> None:
    """Whatever a subject does in one case is that case's verdict, with a reason that names it; all other cases are judged."""
    change, verdict, reason = MISBEHAVED[how]
    report = verify(at_small(change), op="rmsnorm", precision="fp32", direction="forward", store=STORE)
    (bad,) = [r for r in report.results if r.verdict != "PASS"]
    assert (bad.case, bad.verdict) == ("small", verdict), str(report)
    assert reason in bad.reason
    assert len(report.results) == len(OPS["rmsnorm"].cases)


def test_layouts_of_arrays_do_not_matter() -> None:
    """Read-only, transposed, strided and subclassed arrays are their values."""
    layouts = (
        lambda y: np.asfortranarray(y),
        lambda y: np.repeat(y, 2, axis=1)[:, ::2],
        lambda y: y[::-1].copy()[::-1],
        lambda y: y.view(np.ma.MaskedArray),
        lambda y: [y],
        lambda y: {"y": y, "rstd": None},
    )
    for layout in layouts:
        report = verify(
            at_small(lambda x, w, y, layout=layout: layout(y)), op="rmsnorm", precision="fp32", direction="forward", store=STORE
        )
        assert report.verdict == "PASS", str(report)


def test_a_changed_floating_point_state_does_not_reach_the_judge() -> None:
    """A subject that makes NumPy raise on overflow, and leaves it so, changes nothing for the judge or for other subjects."""
    before = np.geterr()

    def subject(x: Array, weight: Array, *, eps: float = 1e-6) -> Array:
        np.seterr(all="raise")
        return good(x, weight, eps=eps)

    try:
        report = verify(subject, op="rmsnorm", precision=["fp32", "bf16"], direction="forward", seeds=(0, 1), store=STORE)
        after = np.geterr()
    finally:
        np.seterr(**before)
    assert report.verdict == "PASS", str(report)
    assert after == before


def test_an_exit_in_process_is_that_cases_error() -> None:
    """sys.exit() in a subject does not end the run."""

    def left(x: Array, weight: Array, y: Array) -> Array:
        raise SystemExit(0)

    report = verify(at_small(left), op="rmsnorm", precision="fp32", direction="forward", store=STORE)
    (bad,) = [r for r in report.results if r.verdict != "PASS"]
    assert (bad.case, bad.verdict) == ("small", "ERROR")
    assert "SystemExit" in bad.reason


def extreme(dtype: Any, top: bool) -> Any:
    limits = np.finfo(dtype) if np.dtype(dtype).kind == "f" else np.iinfo(dtype)
    return limits.max if top else limits.min


GARBAGE = {
    "zeros": lambda shape, dtype: np.zeros(shape, dtype),
    "largest": lambda shape, dtype: np.full(shape, extreme(dtype, True), dtype),
    "least": lambda shape, dtype: np.full(shape, extreme(dtype, False), dtype),
    "nan": lambda shape, dtype: np.full(shape, np.nan if np.dtype(dtype).kind == "f" else 0x7F, dtype),
    "infinity": lambda shape, dtype: np.full(shape, -np.inf if np.dtype(dtype).kind == "f" else 0x7C, dtype),
    "ramp": lambda shape, dtype: np.arange(np.prod(shape))[::-1].reshape(shape).astype(dtype),
}


BY_CHANCE = "what means nothing is right here"


def garbage(what: str, op: Op, direction: str) -> Callable:
    """A subject that returns arrays of the right shape and dtype that mean nothing, and raises where they happen to be right."""

    def subject(**given: Any) -> tuple[Array, ...]:
        attrs = {k: given.pop(k) for k in op.attrs if k in given}
        with np.errstate(all="ignore"):
            right = {k: np.asarray(y) for k, y in op.run(direction, given, attrs).items()}
        wrong = {k: GARBAGE[what](y.shape, y.dtype) for k, y in right.items()}
        assert not all(np.array_equal(wrong[k], y) for k, y in right.items()), BY_CHANCE
        return tuple(wrong.values())

    return subject


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_of_the_right_form_fails(what: str) -> None:
    """Numbers of the right shape and dtype that mean nothing are FAIL in every case, and never an error of the judge. For some of them an
    explanation is sought, too, which must not break it either."""
    for name, op in OPS.items():
        for way in directions(op):
            subject, explained = garbage(what, op, way), what in ("nan", "largest") and name in ("rmsnorm", "fp8.quantize_tile")
            report = verify(subject, op=name, direction=way, precision="fp32", explained=explained, store=STORE)
            chance = [r for r in report.results if BY_CHANCE in r.reason]
            assert report.count("FAIL") == len(report.results) - len(chance), str(report)
            assert [r.case for r in chance] in ([], ["alone", "nothing"] if name == "cross_entropy" else [])  # no loss: 0 is right


# ---- in a process of its own

FILE = """
    import os, sys, time
    import numpy as np

    def rmsnorm(x, weight, *, eps=1e-6):
        if x.shape == (4, 129):
            {deed}
        return x / np.sqrt((x * x).mean(1, keepdims=True) + np.float32(eps)) * weight
"""
DEEDS = {
    "killed": ("os.kill(os.getpid(), 9)", "killed by SIGKILL"),
    "aborts": ("os.abort()", "killed by SIGABRT"),
    "hangs": ("time.sleep(600)", "no answer within 2 s"),
    "sys-exit": ("print('going down'); sys.exit(3)", "exited with status 3; its last words: going down"),
    "os-exit": ("os._exit(0)", "exited with status 0"),
    "closes-everything": ("os.closerange(0, 64)", ""),
    "raises": ("raise ValueError('odd width')", "ValueError: odd width"),
}


@pytest.mark.parametrize("deed", DEEDS)
def test_an_isolated_subject_loses_one_case(deed: str, tmp_path: Path) -> None:
    """A process that is killed, aborts, hangs or exits in one case costs that case, which is an ERROR that says so; the rest is judged."""
    path = tmp_path / "subject.py"
    path.write_text(textwrap.dedent(FILE).format(deed=DEEDS[deed][0]))
    report = verify(f"{path}:rmsnorm", op="rmsnorm", precision="fp32", direction="forward", isolate=True, timeout=2, store=STORE)
    (bad,) = [r for r in report.results if r.verdict != "PASS"]
    assert (bad.case, bad.verdict) == ("small", "ERROR"), str(report)
    assert DEEDS[deed][1] in bad.reason
    assert len(report.results) == len(OPS["rmsnorm"].cases)


def test_what_an_isolated_subject_prints_does_no_harm(tmp_path: Path) -> None:
    """Bytes on stdout and stderr, however many, are no part of the answer."""
    deed = "print('\\x00garbage\\xff' * 100000); os.write(1, bytes(range(256)) * 1000); os.write(2, b'{\"verdict\": 1}')"
    path = tmp_path / "subject.py"
    path.write_text(textwrap.dedent(FILE).replace("{deed}", deed))
    report = verify(f"{path}:rmsnorm", op="rmsnorm", precision="fp32", direction="forward", isolate=True, timeout=20, store=STORE)
    assert report.count("PASS") == len(OPS["rmsnorm"].cases), str(report)
