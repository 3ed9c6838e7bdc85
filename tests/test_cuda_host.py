"""The CUDA kernels' own text, run on the CPU (tests/cuda_shim): held to the vectors, whatever the order of threads, blocks and copies."""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import no_gpu
from cuda_shim import KERNELS, Host, missing
from leadline.golden.verify import verify
from leadline.kernels.gpu import cuda
from leadline.kernels.gpu.cuda import accumulate, gemm, quantize
from leadline.kernels.gpu.cuda.launch import Cupy, GPUError, Launch, Unfit, unchecked, using
from leadline.ref.fp8_gemm import fp8_gemm_fwd

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"CUDA kernels on the CPU: {missing()}")

# op, precision, cases, attributes: one compilation each, or few
ASKED: list[tuple[str, str, list[str], dict[str, Any]]] = [
    ("cast.e4m3fn", "fp32", ["*"], {}),
    ("encode.e5m6", "fp32", ["boundary*", "stochastic"], {}),
    ("decode.e4m3fnuz", "fp32", ["*"], {}),
    ("fp8.quantize_tile", "fp32", ["*.v3", "edges.*", "midpoints.*", "spread.*", "ties", "model"], {}),
    ("fp8.quantize_tile", "fp32", ["wgrad"], {}),
    ("fp8.quantize_tile", "fp32", ["mxfp4*"], {}),
    ("fp8.quantize_tile", "bf16", ["e5m6"], {}),
    ("fp8.quantize_block", "fp32", ["*"], {}),
    ("fp8.quantize_block", "bf16", ["ragged.v3"], {}),
    ("rmsnorm", "fp32", ["one", "ragged", "outliers", "zero-row"], {}),
    ("rmsnorm", "bf16", ["model"], {"cast_order": "cast_then_weight"}),
    ("router.noaux_tc", "fp32", ["v3", "v3-*"], {}),
    ("router.noaux_tc", "fp32", ["small-groups"], {}),
    ("router.softmax", "bf16", ["v2", "v2-ties"], {}),
    ("moe.permute", "bf16", ["*"], {}),
    ("moe.unpermute", "bf16", ["*"], {}),
    ("fp8.gemm", "fp32", ["one", "ragged", "wgrad"], {}),
    ("fp8.gemm", "fp32", ["mma25"], {}),
    ("fp8.gemm", "fp32", ["wgmma13", "wgmma13-nan", "wgmma13-subnormal"], {}),
    ("mla.decode", "bf16", ["empty", "verify"], {}),
    ("mla.decode", "bf16", ["flash"], {}),
    ("mla.decode_fp8", "bf16", ["v4"], {}),
    ("mla.decode_fp8", "bf16", ["unused-nan"], {}),
    ("attention.merge", "fp32", ["*"], {}),
    ("attention", "bf16", ["verify", "decode", "all-keys"], {}),
    ("attention", "bf16", ["empty-rows"], {}),
]


@contextmanager
def on_host(**how: Any) -> Iterator[Host]:
    host = Host(**how)
    with using(host):
        yield host


def asked_id(asked: tuple[str, str, list[str], dict[str, Any]]) -> str:
    return f"{asked[0]}-{asked[1]}-{asked[2][0]}"


@pytest.mark.parametrize("asked", ASKED, ids=asked_id)
def test_kernels_pass_the_vectors(asked: tuple[str, str, list[str], dict[str, Any]]) -> None:
    op, precision, cases, attrs = asked
    direction = "forward" if not hasattr(cuda, f"{op.replace('.', '_')}_bwd") else None
    with on_host(seed=3) as host:
        subject = cuda.bf16 if precision == "bf16" else cuda
        report = verify(subject, op, precision=precision, cases=cases, attrs=attrs, direction=direction, explained=False)
    report.raise_for_verdict()
    assert report.results
    assert host.launched


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_kernel_passes_every_vector(precision: str) -> None:
    """Ten minutes, most of them g++; last run on 2026-11-22, op by op: all passed but what a kernel says that it does not do."""
    ops = {asked[0] for asked in ASKED}
    if precision == "fp32":
        ops |= {f"{kind}.{name}" for kind in ("cast", "encode", "decode") for name in vars(getattr(cuda, kind))}
        ops -= {"attention", "mla.decode", "mla.decode_fp8"}  # bfloat16's alone
    subject = cuda.bf16 if precision == "bf16" else cuda
    with on_host():
        have = sorted(op for op in ops if precision == "fp32" or hasattr(subject, op.replace(".", "_")))
        verify(subject, have, precision=precision, explained=False).raise_for_verdict()


def some(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=seed)).standard_normal(shape).astype(np.float32)


def bits(x: np.ndarray) -> np.ndarray:
    return (x.view(np.uint32) >> 16).astype(np.uint16)


def codes(shape: tuple[int, ...], seed: int) -> np.ndarray:
    c = np.random.Generator(np.random.Philox(key=seed)).integers(0, 256, shape).astype(np.uint8)
    return np.where(c & 0x7F == 0x7F, 0x38, c).astype(np.uint8)


def scales(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.exp2(some(shape, seed)).astype(np.float32)


def latent_case() -> dict[str, Any]:
    table = np.array([[3, 1, 4, 0, 2, 5]], np.int32)
    sizes = {"q": bits(some((1, 2, 3, 40))), "kv_cache": bits(some((6, 32, 40), 1)), "block_table": table}
    return {**sizes, "cache_seqlens": np.array([180], np.int32), "kv_lora_rank": 32}


def attend_case(call: Callable[..., Any]) -> Any:
    """Two blocks of queries and of keys, two heads to a key head"""
    q, k, v = bits(some((1, 70, 4, 24))), bits(some((1, 90, 2, 24), 1)), bits(some((1, 90, 2, 16), 2))
    return call(q=q, k=k, v=v)


def gemm_case(path: str) -> Callable[[], Any]:
    a, b = codes((130, 272), 1), codes((131, 272), 2)
    return lambda: gemm.gemm(a, scales((130, 3), 3), b, scales((2, 3), 4), path=path)


RUNS: dict[str, Callable[[], Any]] = {
    "quantize_tile": lambda: cuda.fp8_quantize_tile(some((5, 300))),
    "quantize_panel": lambda: cuda.fp8_quantize_block(some((200, 300))),
    "rmsnorm": lambda: cuda.rmsnorm_bwd(some((9, 300)), some((9, 300), 1), some((300,), 2)),
    "router": lambda: cuda.router_noaux_tc(some((9, 256)), some((256,), 1)),
    "permute": lambda: cuda.moe_permute(some((300, 5)), np.argsort(some((300, 16), 1), axis=1)[:, :8], n_routed_experts=16),
    "fp8_gemm": gemm_case("mma"),
    "fp8_gemm_wgmma": gemm_case("wgmma"),
    "mla_decode": lambda: cuda.mla_decode(**latent_case()),
    "attention": lambda: attend_case(cuda.attention),
    "attention_backward": lambda: attend_case(lambda **x: cuda.attention_bwd(bits(some((1, 70, 4, 16), 5)), some((1, 4, 70), 6), **x)),
    "accumulate": lambda: accumulate.wgmma(codes((70, 160), 1), codes((70, 160), 2), some((70,))),
}


def same(one: Any, other: Any) -> bool:
    """Bit for bit, NaNs and all."""
    ones, others = ((x if isinstance(x, tuple) else (x,)) for x in (one, other))
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(ones, others, strict=True))


@pytest.mark.parametrize("name", RUNS)
def test_results_do_not_depend_on_the_order_of_threads(name: str) -> None:
    """Ascending, descending and shuffled threads and blocks; copies that land at once and as late as they may."""
    results = []
    for seed in (0, 1, 4, 7):
        with on_host(seed=seed, multiprocessors=4):
            results.append(RUNS[name]())
    assert all(same(results[0], other) for other in results[1:])


# A barrier that is missing, an index that is off by one: what the CPU run must notice.
MUTANTS = {
    "gemm-no-barrier": ("fp8_gemm", "fp8_gemm", r"        __syncthreads\(\);  // tile kt is there[^\n]*\n", ""),
    "gemm-early": ("fp8_gemm", "fp8_gemm", r"cp_async_wait<STAGES - 2>", "cp_async_wait<STAGES - 1>"),
    "wgmma-descriptor": ("fp8_gemm_wgmma", "fp8_gemm_wgmma", r"of_b \+ step \* 2", "of_b + step"),
    "wgmma-forgets": ("fp8_gemm_wgmma", "fp8_gemm_wgmma", "step > 0", "false && step"),
    "decode-no-barrier": ("mla_decode", "mla_decode", r"        __syncthreads\(\);  // both halves[^\n]*\n", ""),
    "attention-no-barrier": ("attention", "attention", r"        __syncthreads\(\);  // block n is there[^\n]*\n", ""),
    "backward-mask": ("attention_backward", "attention_backward", r"key <= query \+ n.t - n.s", "key < query + n.t - n.s"),
    "panel-no-barrier": ("quantize_panel", "quantize_panel", r"    __syncthreads\(\);\n", ""),
    "permute-rank": ("permute", "permute", r"\(1u << lane\) - 1", "(2u << lane) - 1"),
    "router-highest": ("router", "router-ties", r"__ffs\((.*)\) - 1;", r"31 - __clz(\1);"),
}
RUNS_OF_MUTANTS = {**RUNS, "router-ties": lambda: cuda.router_noaux_tc(np.zeros((3, 256), np.float32), np.zeros(256, np.float32))}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_kernel_is_noticed(mutant: str, tmp_path: Path) -> None:
    """The run can fail: each of these changes a result, some only for an unlucky order."""
    file, run, pattern, instead = MUTANTS[mutant]
    kernels = Path(shutil.copytree(KERNELS, tmp_path / "kernels"))
    text = (kernels / f"{file}.cu").read_text()
    changed, count = re.subn(pattern, instead, text)
    assert count >= 1
    (kernels / f"{file}.cu").write_text(changed)
    with on_host():
        right = RUNS_OF_MUTANTS[run]()
    noticed = False
    for seed in (0, 1, 4, 7):
        try:
            with on_host(seed=seed, kernels=kernels):
                noticed |= not same(RUNS_OF_MUTANTS[run](), right)
        except (RuntimeError, AssertionError):
            noticed = True
    assert noticed


@pytest.mark.parametrize(("path", "adds"), [("wgmma", "wgmma13"), ("mma", "mma25")])
@pytest.mark.parametrize("order", ["one by one", "product first"])
def test_gemm_is_its_accumulator_bit_for_bit(path: str, adds: str, order: Any) -> None:
    """With the instruction modelled as ref/fp8_accumulate.py has it, the product is the reference's, promotion and scales included."""
    a, b, sa, sb = codes((70, 300), 1), codes((140, 300), 2), scales((70, 3), 3), scales((2, 3), 4)
    wanted, _ = fp8_gemm_fwd(a, sa, b, sb, accumulator=adds, scale_order=order)
    with on_host(seed=2):
        got = gemm.gemm(a, sa, b, sb, scale_order=order, path=path)
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("path", ["mma", "wgmma"])
def test_grouped_gemm_is_one_gemm_an_expert(path: str) -> None:
    a, b, sa, sb = codes((384, 128), 1), codes((3, 40, 128), 2), scales((384, 1), 3), scales((3, 1, 1), 4)
    with on_host():
        got = gemm.gemm(a, sa, b, sb, np.array([2, -1, 0], np.int32), path=path)
        for rows, expert in ((slice(0, 128), 2), (slice(256, 384), 0)):
            np.testing.assert_array_equal(got[rows], gemm.gemm(a[rows], sa[rows], b[expert], sb[expert], path=path))


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", ["v3", "v32-ue8m0", "te"])
def test_fused_norm_and_quantise_is_one_after_the_other(kind: str, recipe: str) -> None:
    x, weight = some((3, 1000)), some((1000,), 1)
    if kind == "bfloat16":
        x, weight = bits(x), bits(weight)
    with on_host():
        fused = cuda.rmsnorm_quantize(x, weight, recipe=recipe)
        apart = cuda.fp8_quantize_tile(cuda.rmsnorm(x, weight), recipe=recipe)
    assert same(fused, apart)


def test_decode_in_parts_is_decode() -> None:
    """Split-KV: one pass and merged parts differ by what rounding weights and results to bfloat16 may: 2^-9 of Σ p|v|, and of |o|, each."""
    results = []
    for multiprocessors in (1, 3):
        with on_host(multiprocessors=multiprocessors) as host:
            results.append(cuda.mla_decode(**latent_case()))
        assert [launch.kernel for launch in host.launched] == ["mla_decode", "merge"][: 1 + (multiprocessors > 1)]
    (o1, lse1), (o3, lse3) = results
    np.testing.assert_allclose(lse1, lse3, rtol=1e-6, atol=1e-6)
    one, other, largest = (quantize.numbers(x) for x in (o1, o3, latent_case()["kv_cache"]))
    assert (abs(one - other) <= 1.01 * 2.0**-8 * (abs(largest).max() + abs(one))).all()


def test_probe_kernels_add_as_their_instruction() -> None:
    """Diagonals of matrix products: each sum by itself, none disturbed by its neighbours."""
    from leadline.golden.probe_models import simulated

    a, b, c = codes((70, 160), 1), codes((70, 160), 2), some((70,))
    with on_host() as host:
        np.testing.assert_array_equal(accumulate.mma(a, b, c), simulated("mma25")(a, b, c))
        np.testing.assert_array_equal(accumulate.wgmma(a, b, c), simulated("wgmma13")(a, b, c))
        assert list(accumulate.instructions()) == ["mma.sync", "wgmma"]
        host.capability = 80
        with pytest.raises(GPUError, match=r"8\.0 has no FP8 tensor cores"):
            accumulate.instructions()


x32, q16 = some((2, 256)), bits(some((1, 1, 1, 40)))
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "dtype": (
        lambda: cuda.fp8_quantize_tile(x32.astype(np.float64)),
        ValueError,
        "quantize_tile: x is float64; expected an array of float32 or",
    ),
    "rank": (lambda: cuda.rmsnorm(x32[0], x32[0]), ValueError, r"rmsnorm: x is of shape \(256,\); expected 2 dimensions"),
    "tile": (lambda: cuda.fp8_quantize_tile(x32, tile=100), Unfit, "tile is 100; expected 32, 64 or 128"),
    "recipe": (lambda: cuda.fp8_quantize_tile(x32, recipe="none"), ValueError, "recipe is 'none'; expected one of v3"),
    "nan": (lambda: cuda.fp8_quantize_tile(np.where(x32 == x32[1, 3], np.nan, x32).astype(np.float32)), ValueError, r"x\[1, 3\] is NaN"),
    "width": (
        lambda: cuda.rmsnorm(np.zeros((1, 9000), np.float32), np.zeros(9000, np.float32)),
        Unfit,
        "width 9000; expected at most 8192",
    ),
    "weight": (lambda: cuda.rmsnorm(x32, x32[0, :5].copy()), ValueError, r"weight is of shape \(5,\); expected \(256,\)"),
    "experts": (lambda: cuda.router_softmax(np.zeros((1, 600), np.float32)), Unfit, "600 experts; expected 1 to 512"),
    "infinite": (lambda: cuda.router_softmax(np.full((1, 160), np.inf, np.float32)), ValueError, "expected finite numbers"),
    "scale": (
        lambda: gemm.gemm(codes((2, 16), 1), scales((2, 2), 1), codes((2, 16), 1), scales((1, 1), 1)),
        ValueError,
        r"a_scale is of shape \(2, 2\)",
    ),
    "path": (
        lambda: gemm.gemm(codes((2, 16), 1), scales((2, 1), 1), codes((2, 16), 1), scales((1, 1), 1), path="cuda"),
        ValueError,
        "path is 'cuda'",
    ),
    "page": (
        lambda: cuda.mla_decode(q16, q16[0], np.array([[9]], np.int32), np.array([1], np.int32), kv_lora_rank=32),
        ValueError,
        "block_table is outside its range; expected 0 to 0",
    ),
    "odd": (lambda: cuda.mla_decode(q16[..., :39].copy(), q16[0, ..., :39].copy(), None, None), Unfit, "multiples of 8"),
    "expert": (
        lambda: cuda.moe_permute(x32, np.array([[1], [7]]), n_routed_experts=4),
        ValueError,
        "topk_idx is outside its range; expected -1 to 3",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_before_any_launch(name: str) -> None:
    call, kind, message = BAD[name]
    with on_host() as host, pytest.raises(kind, match=message) as caught:
        call()
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert name in ("nan", "infinite") or not host.launched  # what values hold is found by the kernel itself


def test_unchecked_reads_nothing_back() -> None:
    """Values are not looked at, shapes and dtypes are all the same."""
    bad = np.where(x32 == x32[1, 3], np.nan, x32).astype(np.float32)
    with on_host(), unchecked():
        assert cuda.fp8_quantize_tile(bad)[0].shape == bad.shape
        with pytest.raises(ValueError, match="expected 2 dimensions"):
            cuda.fp8_quantize_tile(bad[0])


def test_a_chip_without_fp8_is_told_so() -> None:
    args = codes((2, 16), 1), scales((2, 1), 1), codes((2, 16), 1), scales((1, 1), 1)
    with on_host(capability=80):
        with pytest.raises(
            ValueError, match=r"path is 'mma' on compute capability 8\.0; expected 8\.9 or later.*path='bf16' runs everywhere"
        ):
            gemm.gemm(*args, path="mma")
        plain = gemm.gemm(*args)
    with on_host(capability=90):
        np.testing.assert_array_equal(plain, gemm.gemm(*args, path="bf16"))


def test_fast_kernels_step_aside_for_what_they_do_not_do() -> None:
    """kernels.gpu then takes its own: None, never an error; a wrong value is an error all the same."""
    with on_host():
        assert cuda.FAST["fp8.quantize_tile"](x=x32, tile=100) is None
        assert cuda.FAST["rmsnorm"](x=x32.astype(np.float64), weight=np.zeros(256)) is None
        assert cuda.FAST["rmsnorm"](x=x32, weight=x32[0].copy()).shape == x32.shape
        with pytest.raises(ValueError, match="recipe"):
            cuda.FAST["fp8.quantize_tile"](x=x32, recipe="none")


def test_without_a_gpu_the_error_is_one_line() -> None:
    """Never a silent fall-back to the CPU."""
    if no_gpu() is None:
        pytest.skip("there is a GPU")
    with pytest.raises(GPUError, match=r"^[^\n]*(install|use)[^\n]*$"):
        Cupy()
    with pytest.raises(GPUError):
        cuda.rmsnorm(x32, x32[0].copy())


def test_errors_of_a_launch_name_the_kernel() -> None:
    """Here the CPU's: a block that is too large, and a barrier that not every thread reaches."""
    with on_host() as host, pytest.raises(RuntimeError, match=r"^merge: a block has 1 to 1024 threads"):
        host.launch(
            Launch("merge", "merge", (("TYPE", "float"),), (1,), 2048, (None, None, None, None, None, *(np.int32(1) for _ in range(4))))
        )
