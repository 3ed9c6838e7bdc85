"""Holds kernels.gpu to the vectors in Numba's simulator, and mutants of its kernels too, which must fail.

Run by test_kernels_gpu_sim.py in a process of its own, with NUMBA_ENABLE_CUDASIM=1: `python simulated.py FAMILY` prints a JSON line a run.
"""

import importlib
import json
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from hypothesis import HealthCheck, assume, given, settings
from leadline.golden import strategies
from leadline.golden.band import band_of
from leadline.golden.draw import Source
from leadline.golden.judge import FAIL, PASS, Question, judge
from leadline.golden.precision import PRECISIONS
from leadline.golden.subject import Subject
from leadline.golden.vectors import directions
from leadline.golden.verify import verify
from leadline.ref import OPS
from leadline.ref.mla_cache import LAYOUTS, cache_append_fwd

NUMBERS = ["boundary", "boundary.*", "normal", "wide", "stochastic"]  # without every bfloat16
FORMATS = ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e2m1", "e8m0", "e5m6", "bf16", "fp16", "tf32")
STORED = FORMATS[:-1]
TILES = ["edges.*", "midpoints.v3", "midpoints.deepep", "midpoints.te", "spread.v3-unclamped", "spread.flashmla", "wgrad", "ties", "e5m2"]
TILES += ["tile-64", "e4m3fnuz", "e5m6", "mxfp4", "mxfp4-half-zero"]
BLOCKS = ["edges.v3*", "ragged.v32-ue8m0", "ragged.te-ue8m0", "zero-block", "fnuz"]

# What is asked, by file: each op with its cases; None is all quick ones. Every op of the package stands in one family.
FAMILIES: dict[str, dict[str, list[str] | None]] = {
    "cast": {
        **{f"cast.{f}": NUMBERS for f in FORMATS},
        **{f"encode.{f}": NUMBERS for f in STORED},
        **{f"decode.{f}": None for f in STORED},
    },
    "fp8": {
        "fp8.quantize_tile": TILES,
        "fp8.quantize_block": BLOCKS,
        "fp8.dequantize_tile": ["ragged", "wgrad", "e5m2"],
        "fp8.dequantize_block": None,
    },
    "norm": {"rmsnorm": None},
    "rotary": {"rope": None},
    "router": {"router.noaux_tc": None, "router.softmax": None},
    "moe_permute": {"moe.permute": None, "moe.unpermute": None},
    "swiglu": {"swiglu": None},
    "mla_decode": {"mla.decode": None, "mla.decode_fp8": None},
}
EXAMPLES, LARGE = 5, 1500  # of the questions of any size
SCALED = "scaled cache"  # no stored case: scaled_cache below


class Mutant(NamedTuple):
    """A kernel with one bug: `old`, which stands in the file once, is `new`; a case that shows it."""

    file: str
    old: str
    new: str
    op: str
    case: str
    direction: str = "forward"


TIE = "up = fraction > 0.5 or (fraction == 0.5 and n % 2 == 1)"
LIMITED = "e = max(e - 1, g.emin) if a > 0.0 else g.emin"
MAGNITUDE = "abs(x[top + k // width, left + k % width])"
MUTANTS = (
    Mutant("cast", TIE, "up = fraction >= 0.5", "cast.e4m3fn", "boundary"),
    Mutant("cast", LIMITED, "e = e - 1 if a > 0.0 else g.emin", "cast.e5m2", "boundary"),
    Mutant("cast", "field - g.signed + g.emin", "field + g.emin", "decode.e4m3fn", "every-code"),
    Mutant("cast", "and (g.negative_zero or code > 0)", "and True", "encode.e4m3fnuz", "boundary"),
    Mutant("cast", "max(n + int(up), 1 - g.signed)", "n + int(up)", "cast.e8m0", "boundary"),
    Mutant("cast", "fraction > random", "fraction > 0.5", "cast.bf16", "stochastic"),
    Mutant("fp8", f"own = max(own, {MAGNITUDE})", f"own = {MAGNITUDE}", "fp8.quantize_tile", "edges.v3"),
    Mutant("fp8", "e - 1 if m == 0.5 else e", "e", "fp8.quantize_tile", "edges.v32-ue8m0"),
    Mutant("fp8", "x[i, j] / by", "x[i, j] * (x.dtype.type(1) / by)", "fp8.quantize_tile", "midpoints.v3"),
    Mutant("fp8", "width = min(across, d - left)", "width = across if left + across <= d else 1", "fp8.quantize_tile", "e5m2"),
    Mutant("fp8", "scale[i // down, j // across]\n\n\ndef", "scale[0, j // across]\n\n\ndef", "fp8.dequantize_tile", "ragged"),
    Mutant("norm", "range(1, THREADS)", "range(1, THREADS - 1)", "rmsnorm", "latent"),
    Mutant("norm", "math.sqrt(total(part) / F(d) + eps)", "math.sqrt(total(part) / F(d)) + eps", "rmsnorm", "small"),
    Mutant("norm", "x[i, j] * rstd * mean)", "x[i, j] * mean)", "rmsnorm", "latent", "backward"),
    Mutant("norm", "for i in range(n):", "for i in range(1, n):", "rmsnorm", "latent", "backward"),
    Mutant("rotary", "(i, i + half) if halves_out", "(i, i + half) if halves_in", "rope", "hugging-face"),
    Mutant("rotary", "s = -s if back else s", "s = s if back else s", "rope", "plain", "backward"),
    Mutant("rotary", "p * digits[0, i] + middle // DIGIT", "p * digits[0, i]", "rope", "far"),
    Mutant("router", "if not value > values[j]", "if value < values[j]", "router.noaux_tc", "v3-ties"),
    Mutant("router", "s[t, topk_idx[t, j]] / by * factor", "topk_best[t, j] / by * factor", "router.noaux_tc", "v3"),
    Mutant("router", "elif v > second:", "elif v > first:", "router.noaux_tc", "v3"),
    Mutant("router", "if normalise and (not clamp or total >= eps):", "if False:", "router.noaux_tc", "v3", "backward"),
    Mutant("router", "dlogits[t, i] -= s[t, i] * coupled", "pass", "router.softmax", "v2", "backward"),
    Mutant("moe_permute", "            out[i, j] = x[slot // k, j]", "            out[i, j] = x[slot % k, j]", "moe.permute", "v3"),
    Mutant("moe_permute", "xp.cumsum(padded) - padded", "xp.cumsum(counts) - counts", "moe.permute", "aligned"),
    Mutant("moe_permute", "weight[n, slot] * rows", "weight[n, 0] * rows", "moe.unpermute", "v3"),
    Mutant("moe_permute", "out[n, slot % k] = total(part)", "out[n, slot % k] = part[0]", "moe.unpermute", "v3", "backward"),
    Mutant("swiglu", "y[i] = g * sigmoid(g) * clipped(up[i], -limit, limit)", "y[i] = g * sigmoid(g) * up[i]", "swiglu", "clamped"),
    Mutant("swiglu", "(F(1) + g * (F(1) - s))", "(F(1) + g - s)", "swiglu", "ragged", "backward"),
    Mutant("mla_decode", "seen - s + i + 1", "seen - s + i", "mla.decode", "verify"),
    Mutant("mla_decode", "o[b, i, head, c] * factor + add", "o[b, i, head, c] + add", "mla.decode", "flash"),
    Mutant("mla_decode", "sums * factor + total(z)", "sums + total(z)", "mla.decode", "flash"),
    Mutant("mla_decode", "add += z[t] * keys[table[b, token // page]", "add += z[t] * keys[table[b, 0]", "mla.decode", "paged"),
    Mutant("mla_decode", "start + c + 4 * (j // tile)", "start + c", "mla.decode_fp8", SCALED),
    Mutant("mla_decode", "(tiles + 1) + j // tile", "(tiles + 1)", "mla.decode_fp8", SCALED),
    Mutant("mla_decode", "else start + c + 4 * tiles", "else start + c + 4", "mla.decode_fp8", SCALED),
    Mutant("mla_decode", "token * (tiles + 1)", "token * tiles", "mla.decode_fp8", "v4"),
)


def mutated(m: Mutant) -> Any:
    """An object with the mutant's ops: its file, changed, as one more module of the package."""
    whole = importlib.import_module(f"leadline.kernels.gpu.{m.file}")
    text = Path(str(whole.__file__)).read_text()
    assert text.count(m.old) == 1, (m, text.count(m.old))
    module = ModuleType(f"leadline.kernels.gpu._mutant_{m.file}")
    module.__package__ = whole.__package__
    exec(compile(text.replace(m.old, m.new), f"mutant of {m.file}", "exec"), vars(module))
    return SimpleNamespace(
        **{k: v for k, v in vars(module).items() if not k.startswith("__")}, **dict.fromkeys(("cast", "fp8", "router"), module)
    )


def scaled_cache(subject: Any) -> list[str]:
    """What is wrong with mla.decode_fp8 over caches whose tiles have scales far apart; those of the stored vectors are much alike."""
    source, op, p = Source("scaled cache"), OPS["mla.decode_fp8"], PRECISIONS["fp32"]
    c_kv = source.normal((12, 256)).astype(np.float32) * np.repeat(np.array([1, 60, 0.02, 7], np.float32), 64)
    k_pe, q = source.normal((12, 8)).astype(np.float32), source.normal((1, 2, 2, 264)).astype(np.float32)
    wrong = []
    for layout in ("fp8_v32", "fp8_v4"):
        empty = np.zeros((3, LAYOUTS[layout].page_bytes(4, 256, 8)), np.uint8)
        kv_cache, _ = cache_append_fwd(empty, c_kv, k_pe, np.arange(12), layout=layout, page_size=4)
        inputs = {"q": q, "kv_cache": kv_cache, "block_table": np.array([[2, 0, 1]]), "cache_seqlens": np.array([11])}
        attrs = {**op.defaults, "head_dim_v": 256, "qk_rope_head_dim": 8, "layout": layout, "page_size": 4, "scale": 0.03}
        returned = Subject("kernels.gpu", subject).ask(op, "forward", inputs, attrs, p)
        found = judge(Question(op, "forward", inputs, attrs, p), returned, band_of(op, "forward", inputs, attrs, p))
        wrong += found.reasons if found.verdict != PASS else []
    return wrong


def any_size(subject: Any, op: str, direction: str) -> None:
    """Empty, boundary and odd sizes, special values, ties and near ties: the same questions every time."""
    asked = Subject("kernels.gpu", subject)

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=(HealthCheck.too_slow, HealthCheck.filter_too_much),
    )
    @given(strategies.questions(op, direction=direction, large=LARGE))
    def check(drawn: strategies.Drawn) -> None:
        assume(all(x.size <= 4 * LARGE for x in drawn.inputs.values()))
        question = Question(drawn.op, direction, drawn.inputs, drawn.attrs, drawn.precision)
        band = band_of(drawn.op, direction, drawn.inputs, drawn.attrs, drawn.precision)
        found = judge(question, asked.ask(drawn.op, direction, drawn.inputs, drawn.attrs, drawn.precision), band)
        assert found.verdict == PASS, found.reasons

    check()


def told(what: str, subject: Any, op: str, cases: list[str] | None, direction: str | None = None) -> None:
    """Prints what came of a run."""
    started = time.perf_counter()
    if cases == [SCALED]:
        wrong = scaled_cache(subject)
        verdict = FAIL if wrong else PASS
    else:
        report = verify(subject, op=op, cases=cases, precision="fp32", direction=direction, explained=False)
        verdict, wrong = report.verdict, [f"{r.direction} {r.case}: {r.verdict} {r.reason}" for r in report.results if r.verdict != PASS]
    print(json.dumps({"run": what, "verdict": verdict, "wrong": wrong[:5], "seconds": round(time.perf_counter() - started, 1)}), flush=True)


def refused(gpu: Any) -> Iterator[tuple[str, str]]:
    """Calls that must be refused, and what they are told."""
    x, weight = np.zeros((2, 4), np.float32), np.ones(4, np.float32)
    q, cache, table, lengths = np.zeros((1, 1, 2, 8), np.float32), np.zeros((2, 4, 8), np.float32), np.array([[0, 1]]), np.array([5])
    decode = {"q": q, "kv_cache": cache, "block_table": table, "cache_seqlens": lengths, "kv_lora_rank": 4}
    for expected, fn, arguments in (
        ("rmsnorm: weight is missing", gpu.rmsnorm, {"x": x, "weight": None}),
        ("rmsnorm: x is of type list", gpu.rmsnorm, {"x": [1.0], "weight": weight}),
        ("rmsnorm: weight has shape (3,); expected d = 4", gpu.rmsnorm, {"x": x, "weight": weight[:3]}),
        ("rmsnorm: weight is a float64 array; expected float32 like x", gpu.rmsnorm, {"x": x, "weight": np.ones(4)}),
        ("rmsnorm: eps is -1", gpu.rmsnorm, {"x": x, "weight": weight, "eps": -1.0}),
        ("rmsnorm: cast_order is 'none'", gpu.rmsnorm, {"x": x, "weight": weight, "cast_order": "none"}),
        ("rmsnorm: x is int32", gpu.rmsnorm, {"x": x.astype(np.int32), "weight": weight}),
        ("cast.e4m3fn: overflow is 'wrap'", gpu.cast.e4m3fn, {"x": x, "overflow": "wrap"}),
        ("cast.e2m1: x[3] is NaN", gpu.cast.e2m1, {"x": np.array([0, 1, 2, np.nan], np.float32)}),
        ("cast.bf16: random is missing", gpu.cast.bf16, {"x": x, "rounding": "stochastic"}),
        ("decode.e2m1: codes is an array that reaches 16", gpu.decode.e2m1, {"codes": np.array([16], np.uint8)}),
        ("decode.bf16: codes is a uint8 array", gpu.decode.bf16, {"codes": np.array([16], np.uint8)}),
        ("fp8.quantize_tile: x[0, 1] is NaN", gpu.fp8.quantize_tile, {"x": np.array([[0, np.nan]], np.float32)}),
        ("fp8.quantize_tile: recipe is 'none'", gpu.fp8.quantize_tile, {"x": x, "recipe": "none"}),
        ("fp8.quantize_tile: tile is 0", gpu.fp8.quantize_tile, {"x": x, "tile": 0}),
        ("by the scale 0.0; expected no NaN", gpu.fp8.quantize_tile, {"x": 0 * x, "format": "e2m1", "recipe": "v3-unclamped"}),
        (
            "fp8.dequantize_tile: scale is of shape (1, 1)",
            gpu.fp8.dequantize_tile,
            {"codes": np.zeros((2, 4), np.uint8), "scale": x[:1, :1]},
        ),
        ("rope: r is 3", gpu.rope, {"x": np.zeros((1, 1, 3), np.float32), "positions": np.array([0])}),
        ("rope: positions[0] is -1", gpu.rope, {"x": np.zeros((1, 1, 4), np.float32), "positions": np.array([-1])}),
        ("rope: nonsense is no attribute", gpu.rope, {"x": np.zeros((1, 1, 4), np.float32), "positions": np.array([0]), "nonsense": 1}),
        ("router.noaux_tc: n_group is 3", gpu.router.noaux_tc, {"logits": x, "bias": 0 * weight, "n_group": 3}),
        ("router.softmax: logits[0, 0] is not finite", gpu.router.softmax, {"logits": x / 0, "k": 1, "n_group": 1, "topk_group": 1}),
        ("moe.permute: topk_idx[1, 0] is 9", gpu.moe_permute, {"x": x, "topk_idx": np.array([[0], [9]]), "n_routed_experts": 4}),
        ("swiglu: limit is 0", gpu.swiglu, {"gate": x, "up": x, "limit": 0.0}),
        ("mla.decode: kv_lora_rank is 9", gpu.mla_decode, {**decode, "kv_lora_rank": 9}),
        ("mla.decode: cache_seqlens[0] is 9", gpu.mla_decode, {**decode, "cache_seqlens": np.array([9])}),
        ("mla.decode: block_table[0, 1] is 2", gpu.mla_decode, {**decode, "block_table": np.array([[0, 2]])}),
    ):
        try:
            with np.errstate(all="ignore"):
                fn(**arguments)
            said = "nothing"
        except ValueError as error:
            said = str(error)
        yield expected, said


def check_arguments(gpu: Any) -> list[str]:
    """What is wrong with how arguments are taken and results given."""
    wrong = [f"{said!r}; expected {expected!r}" for expected, said in refused(gpu) if expected not in said]
    x, weight = np.arange(24, dtype=np.float32).reshape(4, 6), np.ones(3, np.float32)
    strided, frozen = x[:, ::2], np.ascontiguousarray(x[:, ::2])
    frozen.flags.writeable = False
    results = [gpu.rmsnorm(v, weight) for v in (strided, frozen)]
    wrong += ["strides or read-only memory make a difference"] * (results[0].tobytes() != results[1].tobytes())
    wrong += [f"a result is {type(results[0])}"] * (type(results[0]) is not np.ndarray)
    wrong += ["a cast lost its array's shape"] * (gpu.encode.e4m3fn(x.reshape(2, 3, 4)).shape != (2, 3, 4))
    wrong += ["an empty array is not taken"] * (gpu.swiglu(x[:0], x[:0]).shape != (0, 6))
    try:
        gpu.fp8.quantize_tile(np.zeros((2000, 8), np.float32))
        wrong.append("the simulator takes on what takes it minutes")
    except NotImplementedError:
        pass  # SKIPPED, in a verdict
    return wrong


def main(family: str) -> None:
    gpu = importlib.import_module("leadline.kernels.gpu")
    print(json.dumps({"heading": gpu.heading()}))
    if family == "arguments":
        wrong = check_arguments(gpu)
        print(json.dumps({"run": "arguments", "verdict": FAIL if wrong else PASS, "wrong": wrong}))
        return
    for op, cases in FAMILIES[family].items():
        told(op, gpu, op, cases)
    for op in FAMILIES[family] if family != "cast" else ("cast.e4m3fn", "encode.bf16", "decode.e5m6"):  # one text for all formats
        for direction in directions(OPS[op]):
            started = time.perf_counter()
            any_size(gpu, op, direction)
            print(json.dumps({"run": f"{op} {direction} at any size", "verdict": PASS, "seconds": round(time.perf_counter() - started, 1)}))
    if family == "mla_decode":
        told(f"mla.decode_fp8 {SCALED}", gpu, "mla.decode_fp8", [SCALED])
    for m in MUTANTS:
        if m.file == family:
            told(f"mutant {m.op} {m.direction}: {m.new.strip()}", mutated(m), m.op, [m.case], m.direction)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # threads have error states of their own: overflows on purpose would be told
    with np.errstate(all="ignore"):
        main(sys.argv[1])
