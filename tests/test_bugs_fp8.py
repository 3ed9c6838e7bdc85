"""Known bugs of casts, FP8 quantisation, products, the linear layer and packing: each makes some declared case FAIL, and is named."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from buggy import check_reference, check_registry, check_told, known, question_of, vector
from leadline.golden.band import truth_of
from leadline.golden.bugs import Bug, bugs_of, fp8, fp8_block, fp8_gemm, fp8_linear
from leadline.golden.draw import draw_case
from leadline.golden.judge import FAIL, as_returned, judge
from leadline.golden.precision import PRECISIONS
from leadline.golden.vectors import Vector
from leadline.ref.cast import decode, encode
from leadline.ref.formats import FORMATS
from leadline.ref.op import OPS
from variants import casts, decodes, floats, quantize
from variants import fp8 as fp8_blocks
from variants import fp8_gemm as fp8_products

Array = np.ndarray
AREA = ("cast", "encode", "decode", "fp8", "pack", "unpack")

# The registry of known bugs of this area: reports from the field, and mutants of them.
REGISTRY = (
    "e4m3-overflow-nan",
    "e4m3-round-half-away",
    "e4m3-truncate",
    "fp8-double-rounding",
    "fp8-subnormal-flush",
    "e4m3fnuz-vs-fn",
    "fp8-max-wrong",
    "scale-eps-missing-zero-block",
    "scale-reciprocal-multiply",
    "scale-inverted",
    "scale-dropped",
    "scale-grid-transposed",
    "scale-k-pad4",
    "wgrad-scale-orientation",
    "block-size-from-shape",
    "block-mixes-experts",
    "scale-cast-fp8-dtype",
    "ue8m0-floor-or-nearest",
    "ue8m0-round-after-quant",
    "ue8m0-log2-inexact",
    "ue8m0-truncates-f32-scale",
    "ue8m0-mode-mismatch",
    "ue8m0-nan-255",
    "amax-double-vs-f32",
    "fp8-gemm-no-promotion",
    "fp8-fmt-swap",
    "silu-bf16-before-quant",
    "fp8-quant-tanspose-corrupt",
    "fp8-dispatch-scale-dropped",
    "mla-absorb-dequant-layout",
)

# What bfloat16 cannot show, and why.
GRID = "bfloat16 inputs lie on the grid that is rounded to"
EXACT = "eight bits are float16 numbers, where the format is no wider"
HIDDEN_IN_BF16 = {
    **{(f"{kind}.{f}", "fp8-double-rounding"): EXACT for kind in ("cast", "encode") for f in ("e4m3fn", "e5m2", "e4m3fnuz")},
    **{(op, bug): GRID for op in ("cast.bf16", "encode.bf16", "cast.tf32") for bug in ("e4m3-round-half-away", "e4m3-truncate")},
    ("fp8.quantize_tile", "ue8m0-log2-inexact"): "no amax in bfloat16 is within a few units of float32 above a power of two times 448",
    ("fp8.quantize_block", "ue8m0-log2-inexact"): "no amax in bfloat16 is within a few units of float32 above a power of two times 448",
    ("fp8.gemm", "accumulator-wide"): "a sum that is not cut is cut when the next group is added: the last one's 14th bit is all",
}


def test_no_bug_of_the_registry_is_dropped() -> None:
    """Every id is a variant, or is listed with the reason why it is none; never both."""
    check_registry(REGISTRY)


# ---- every bug is caught


def fails(v: Vector, bug: Bug) -> bool:
    """Whether the case fails a subject that has this bug. A case whose sizes do not allow the bug's attribute does not."""
    question = question_of(v)
    inputs = v.inputs if v.op.exact else {k: x.astype(np.float64) if x.dtype.kind == "f" else x for k, x in v.inputs.items()}
    try:
        with np.errstate(all="ignore"):
            outputs = bug.variant(v.op).run(v.direction, inputs, {**v.case.attrs, **bug.attrs})
    except ValueError:
        assert bug.attrs, f"{bug.id} refuses {v.id}"
        return False
    return judge(question, as_returned(question, {k: np.asarray(y) for k, y in outputs.items()}), v.band).verdict == FAIL


@pytest.mark.parametrize(("op", "way", "bug"), [pytest.param(*k, id="-".join(k)) for k in known(AREA)])
def test_some_case_fails_the_bug(op: str, way: str, bug: str) -> None:
    """At float32, and at bfloat16 unless that hides it; each of several variants of one bug for itself."""
    for precision in ("fp32", "bf16"):
        names = [case.name for case in OPS[op].cases]
        hidden = precision == "bf16" and (op, bug) in HIDDEN_IN_BF16
        for variant in (b for b in bugs_of(OPS[op], way) if b.id == bug):
            found = next((name for name in names if fails(vector(op, name, way, precision), variant)), None)
            assert (found is None) is hidden, f"{precision} cases of {op} {way}: {found or 'none'} fails {bug}: {variant.what}"


def test_the_reference_passes_as_itself() -> None:
    """What the variants are compared with: the reference's own outputs, rounded once, pass."""
    check_reference(AREA, cases=2)


def same(op: str, way: str, fwd: Callable | None = None, bwd: Callable | None = None, but: Callable = lambda attrs: False) -> None:
    """The op with these is the reference on every case, bit for bit. `but` says which attributes are left out."""
    for case in OPS[op].cases:
        if but({**OPS[op].defaults, **case.attrs}):
            continue
        inputs = draw_case(OPS[op], case, way, PRECISIONS["fp32"])
        inputs = inputs if OPS[op].exact else {k: x.astype(np.float64) if x.dtype.kind == "f" else x for k, x in inputs.items()}
        truth = truth_of(OPS[op], way, inputs, case.attrs)
        with np.errstate(all="ignore"):
            outputs = Bug("frame", (op,), "", fwd=fwd, bwd=bwd).variant(OPS[op]).run(way, inputs, case.attrs)
        for name, y in outputs.items():
            np.testing.assert_array_equal(np.asarray(y), truth[name], err_msg=f"{op} {case.name} {name}")


def test_frames_without_a_mistake_are_the_reference() -> None:
    """What variants are built on computes the right thing when nothing is changed, so that a variant differs by its mistake alone."""
    values = lambda xp, codes, o: decode(FORMATS[o["format"]], codes)  # noqa: E731
    as_it_is = lambda a, sa, b, sb: (a, sa, b, sb)  # noqa: E731
    for body in (fp8.right, fp8.other_rule(lambda rule: rule), fp8.other_scale(lambda scale, *_: scale), fp8.max_of({})):
        same("fp8.quantize_tile", "forward", fp8.tiles(body))
        same("fp8.quantize_block", "forward", fp8_block.blocks(body))
    same("fp8.dequantize_tile", "forward", fp8.of_scale(lambda xp, scale: scale))
    same("fp8.dequantize_tile", "forward", fp8.of_values(values, fp8.dequantize_tile_fwd))
    same("fp8.dequantize_block", "forward", fp8.of_values(values, fp8_block.dequantize_block_fwd))
    same("fp8.dequantize_block", "forward", fp8_block.of_grid(lambda xp, scale: scale))
    row, column = (lambda xp, i, j, block, **_: i // block), (lambda xp, i, j, block, **_: j // block)
    same("fp8.dequantize_block", "forward", fp8_block.at(row, column))
    same("fp8.gemm", "forward", fp8_gemm.by_parts())
    same("fp8.gemm", "forward", fp8_gemm.by_parts(fp8_gemm.stepped(fp8_gemm.Steps())))
    same("fp8.gemm", "forward", fp8_gemm.other(as_it_is))
    same("fp8.gemm", "forward", fp8_gemm.with_b_scale(lambda scale: scale))
    same("fp8.linear", "forward", fp8_linear.of_x(lambda x, o: fp8_linear.coded(x, o["recipe"])))
    same("fp8.linear", "backward", bwd=fp8_linear.backward(fp8_linear.dgrad_of(fp8_linear.coded)))
    same("fp8.linear", "backward", bwd=fp8_linear.backward(fp8_linear.with_grid(lambda grid: grid.T)))
    same("fp8.linear", "backward", bwd=fp8_linear.backward(wgrad=fp8_linear.wgrad_of(fp8_linear.dy_by_tokens, fp8_linear.x_by_tokens)))
    same("fp8.linear", "backward", fp8_linear.keeps_x, lambda dy, saved: fp8_linear.fp8_linear_bwd(dy, saved[:-1]))


def test_two_formats_in_one_product() -> None:
    """The product that takes a in E5M2 is fp8.gemm where a's codes are the same numbers in both formats."""
    rng = np.random.default_rng(0)
    b, scale = rng.integers(0, 0x7F, (5, 200)).astype(np.uint8), rng.uniform(0.5, 2, (7, 2)).astype(np.float32)
    numbers = np.array([1.0, -2.0, 4.0, -0.5, 0.0], np.float32)[rng.integers(0, 5, (7, 200))]
    in_e4m3, in_e5m2 = (encode(FORMATS[f], numbers) for f in ("e4m3fn", "e5m2"))
    o = {"accumulator": "wgmma13", "promote": 128}
    expected = fp8_linear.multiplied(scale, (in_e4m3, scale), (b, scale[:5]), o)
    np.testing.assert_array_equal(fp8_linear.mixed(scale, (in_e5m2, scale), (b, scale[:5]), o), expected)


# ---- wrong subjects, which share nothing with golden/bugs nor with the reference


def tile_kernels(x: Array, *, rounding: str) -> Array:
    """E5M6 by way of float16 toward zero, in integers; toward zero and by other rules it has none."""
    if rounding != "half-even":
        raise NotImplementedError("one rounding")
    bits = x.view(np.uint32)
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)
    half = np.where(np.abs(half.astype(np.float64)) > np.abs(x.astype(np.float64)), np.nextafter(half, np.float16(0)), half)
    pattern = half.astype(np.float16).view(np.uint16)
    up = ((pattern >> np.uint16(4)) & np.uint16(1)).astype(np.int64) + (bits & np.uint32(0x1FFFF)) > 0x10000
    codes = (pattern >> np.uint16(4)) + up.astype(np.uint16)
    usual = casts.encode_by("frexp", floats.LAYOUTS["e5m6"], x)
    return np.where(np.isfinite(x) & (np.abs(x) < 60000), codes, usual).astype(np.uint16)


def other_fnuz(codes: Array) -> Array:
    return decodes.table(floats.LAYOUTS["e4m3fn"], codes)


def power_stored(x: Array, *, recipe: str, tile: int, axis: int, format: str, rounding: str) -> Any:
    """Codes over the linear scale; the power of two above it is returned."""
    if recipe not in ("deepgemm-ue8m0", "tilekernels-ue8m0") or axis != 1:
        raise NotImplementedError("rows in two recipes")
    codes, _ = quantize.padded(x, recipe="deepgemm", tile=tile, format=format, rounding=rounding)
    return codes, quantize.padded(x, recipe=recipe, tile=tile, format=format, rounding=rounding)[1]


def shared_evenly(codes: Array, scale: Array, *, block: int, format: str) -> Array:
    """Blocks as large as the shapes suggest"""
    down, across = (-(-n // s) for n, s in zip(codes.shape, scale.shape, strict=True))
    each = np.repeat(np.repeat(scale, down, axis=0), across, axis=1)[: codes.shape[0], : codes.shape[1]]
    return (decodes.table(floats.LAYOUTS[format], codes) * each).astype(np.float32)


def never_promoted(a_codes: Array, a_scale: Array, b_codes: Array, b_scale: Array, *, accumulator: str, tile: int, **rest: Any) -> Array:
    return fp8_products.GEMM["blas"](a_codes, a_scale, b_codes, b_scale, accumulator=accumulator, tile=tile, **{**rest, "promote": tile})


def flat_grid(a_codes: Array, a_scale: Array, b_codes: Array, b_scale: Array, **attrs: Any) -> Array:
    """The scales of b as a buffer that holds them column after column"""
    p, q = b_scale.shape
    if p != len(b_codes):
        b_scale = np.array([[b_scale.T.flat[i * q + j] for j in range(q)] for i in range(p)], b_scale.dtype)
    return fp8_products.GEMM["einsum"](a_codes, a_scale, b_codes, b_scale, **attrs)


def core_to_nearest(f: floats.Layout, a: Array, b: Array, bits: int) -> Array:
    """The accumulator in float64, with rint for trunc"""
    va, vb = (decodes.table(f, c).astype(np.float64) for c in (a, b))
    least = 2.0 ** (1 - f.bias)
    ea, eb = (np.floor(np.log2(np.maximum(np.abs(v), least))) for v in (va, vb))
    c = np.zeros((len(a), len(b)))
    for k in range(0, a.shape[1], 32):
        part = slice(k, k + 32)
        p = va[:, None, part] * vb[None, :, part]
        e = np.where(p != 0, ea[:, None, part] + eb[None, :, part], -150).max(axis=2)
        unit = 2.0 ** (np.maximum(e, np.where(c != 0, np.frexp(c)[1] - 1, -150)) - bits)
        total = np.rint(p / unit[..., None]).sum(axis=2) * unit + np.rint(c / unit) * unit
        last = 2.0 ** (np.maximum(np.frexp(total)[1] - 1, -126) - min(bits, 23))
        c = np.rint(total / last) * last
    return c


def nearest(a_codes: Array, a_scale: Array, b_codes: Array, b_scale: Array, **attrs: Any) -> Array:
    return fp8_products.gemm(core=core_to_nearest)(a_codes, a_scale, b_codes, b_scale, **attrs)


def scaled(x: Array, axis: int) -> Array:
    """What v3 makes of x: codes times scales, in tiles of 128 along the axis"""
    return quantize.repeated(*quantize.padded(x, axis=axis), axis=axis)


def wrong_linear(dy_axis: int = 0, of_kept: bool = True) -> Callable:
    """v3's backward with a float32 accumulator, in float64"""

    def subject(x: Array, weight: Array, dy: Array, **o: Any) -> Any:
        if o["accumulator"] != "fp32" or o["recipe"] != "v3" or o["cache"] != "e4m3fn":
            raise NotImplementedError("v3 in float32")
        w = fp8_blocks.kronecker(*fp8_blocks.by_padding(weight))
        dx = scaled(dy, 1).astype(np.float64) @ w
        kept = scaled(scaled(x, 1) if of_kept else x, 0)
        return dx.astype(np.float32), (scaled(dy, dy_axis).astype(np.float64).T @ kept).astype(np.float32)

    return subject


def high_first(codes: Array) -> Array:
    return codes[:, ::2] * np.uint8(16) + codes[:, 1::2]


WRONG = [
    ("e5m6-tilekernels-subnormal", "encode.e5m6", "forward", tile_kernels),
    ("e4m3fnuz-vs-fn", "decode.e4m3fnuz", "forward", other_fnuz),
    ("ue8m0-round-after-quant", "fp8.quantize_tile", "forward", power_stored),
    ("block-size-from-shape", "fp8.dequantize_block", "forward", shared_evenly),
    ("fp8-gemm-no-promotion", "fp8.gemm", "forward", never_promoted),
    ("scale-grid-transposed", "fp8.gemm", "forward", flat_grid),
    ("accumulator-rounds", "fp8.gemm", "forward", nearest),
    ("wgrad-dy-along-features", "fp8.linear", "backward", wrong_linear(dy_axis=1)),
    ("wgrad-x-original", "fp8.linear", "backward", wrong_linear(of_kept=False)),
    ("fp4-nibble-order", "pack.e2m1", "forward", high_first),
]


@pytest.mark.parametrize(("bug", "op", "way", "subject"), [pytest.param(*w, id=f"{w[0]}-{w[1]}") for w in WRONG])
def test_a_wrong_subject_fails_and_is_told_why(bug: str, op: str, way: str, subject: Callable) -> None:
    """A subject with the bug fails, and its own bug is the first that is named."""
    check_told(bug, op, way, subject)


def test_the_linear_layer_of_these_subjects_is_right_without_its_mistake() -> None:
    """The same code with dy and x as they should be passes what it takes."""
    v = vector("fp8.linear", "fp32", "backward", "fp32")
    dx, dweight = wrong_linear()(**v.inputs, **{**v.op.defaults, **v.case.attrs})
    question = question_of(v)
    found = judge(question, as_returned(question, {"dx": dx, "dweight": dweight}), v.band)
    assert found.verdict != FAIL, found.reasons
