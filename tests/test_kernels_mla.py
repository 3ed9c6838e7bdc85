"""The attention kernels beyond the stored vectors: blocks, memory, threads, a training step, arguments."""

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from leadline.golden.band import band_of
from leadline.golden.draw import draw_case
from leadline.golden.judge import PASS, Question, Returned, judge
from leadline.golden.precision import PRECISIONS
from leadline.golden.subject import load
from leadline.kernels import cpu
from leadline.kernels.cpu import _attend, _common, mla
from leadline.ref import OPS
from leadline.ref.op import Op

KERNELS = load("kernels.cpu")
FP32, FP64 = PRECISIONS["fp32"], PRECISIONS["fp64"]
SHAPES = (
    {"s": 37, "t": 53, "h": 4, "g": 4},
    {"s": 37, "t": 53, "h": 4, "g": 2},
    {"s": 37, "t": 53, "h": 3, "g": 1},
    {"s": 41, "t": 17, "h": 2, "g": 1},  # the first 24 queries see nothing
    {"s": 0, "t": 9},
    {"s": 9, "t": 0},
    {"b": 0},
)


def drawn(op: Op, way: str, case: str, dims: dict[str, int], precision: Any = FP64) -> tuple[dict[str, Any], dict[str, Any]]:
    chosen = next(c for c in op.cases if c.name == case)
    chosen = replace(chosen, dims={**chosen.dims, **dims})
    return draw_case(op, chosen, way, precision), dict(chosen.attrs)


@pytest.mark.parametrize("precision", [FP32, FP64], ids=lambda p: p.name)
@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("dims", SHAPES, ids=lambda dims: "-".join(f"{k}{v}" for k, v in dims.items()))
@pytest.mark.parametrize("case", ["square", "all-keys", "sink", "large-logits"])
def test_any_blocking_passes(case: str, dims: dict[str, int], way: str, precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of heads, of queries and of keys, the last of each ragged: the reference's band, as for one block."""
    op = OPS["attention"]
    inputs, attrs = drawn(op, way, case, {"h": 2, "g": 2, **dims}, precision)
    attrs["block"] = 12
    band = band_of(op, way, inputs, attrs, precision)
    monkeypatch.setattr(_attend, "FEW", 1)
    monkeypatch.setattr(_attend, "ROWS", 8)
    monkeypatch.setattr(_attend, "SCORES", 2 * 8 * 12)
    returned = KERNELS.ask(op, way, inputs, attrs, precision)
    judgement = judge(Question(op, way, inputs, attrs, precision), returned, band)
    assert judgement.verdict == PASS, judgement.reasons


@pytest.mark.parametrize("form", ["prefill", "absorb"])
@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("case", ["v3", "chunk", "packed"])
def test_layers_pass_in_blocks(form: str, way: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shared rope key gathers over several blocks of heads and queries."""
    monkeypatch.setattr(_attend, "FEW", 1)
    monkeypatch.setattr(_attend, "ROWS", 2)
    monkeypatch.setattr(_attend, "SCORES", 8)
    op = OPS[f"mla.{form}"]
    inputs, attrs = drawn(op, way, case, {})
    returned = KERNELS.ask(op, way, inputs, attrs, FP64)
    judgement = judge(Question(op, way, inputs, attrs, FP64), returned, band_of(op, way, inputs, attrs, FP64))
    assert judgement.verdict == PASS, judgement.reasons


def peak(attend: Callable[..., Any], s: int) -> int:
    """Bytes at most at once in a call with s queries and keys, inputs not counted"""
    q, k, v, do = (np.zeros((1, s, 1, 8), np.float32) for _ in range(4))
    attend(q, k, v, do)  # compile
    tracemalloc.start()
    try:
        attend(q, k, v, do)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def memory_is_linear(attend: Callable[..., Any]) -> bool:
    """Four times the tokens take at most four times the memory, a tenth more for what is constant or small."""
    return peak(attend, 4096) <= 4.4 * peak(attend, 1024)


def naive(q: np.ndarray, k: np.ndarray, v: np.ndarray, do: np.ndarray) -> np.ndarray:
    z = np.einsum("bshk,bthk->bhst", q, k)
    p = np.exp(z - z.max(-1, keepdims=True))
    return np.einsum("bhst,bthv->bshv", p / p.sum(-1, keepdims=True), v)


def test_memory_grows_with_the_block_not_with_s_times_t() -> None:
    """Forward and backward; the naive form, which holds every score, fails the same check."""
    assert memory_is_linear(lambda q, k, v, do: cpu.attention(q=q, k=k, v=v))
    assert memory_is_linear(lambda q, k, v, do: cpu.attention_bwd(q=q, k=k, v=v, do=do, dlse=do[:, :, :, 0].swapaxes(1, 2)))
    assert not memory_is_linear(naive)


def test_results_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread and two give the same bits: attention with several blocks, its backward, a layer's backward."""
    rng = np.random.Generator(np.random.Philox(key=5))
    q, k, v, do = (rng.standard_normal((1, 700, 2, 32)).astype(np.float32) for _ in range(4))
    inputs, attrs = drawn(OPS["mla.prefill"], "backward", "v3", {"b": 2, "s": 300}, FP32)

    def results() -> list[np.ndarray]:
        parts = cpu.attention(q=q, k=k, v=v), cpu.attention_bwd(q=q, k=k, v=v, do=do, dlse=do[..., 0].swapaxes(1, 2))
        return [a for part in (*parts, cpu.mla_prefill_bwd(**inputs, **attrs)) for a in part]

    monkeypatch.setattr(_common, "THREADS", 2)
    monkeypatch.setattr(_common, "SMALLEST", 1 << 12)  # so that there is work for two
    two = results()
    monkeypatch.setattr(_common, "THREADS", 1)
    for a, b in zip(results(), two, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["mla_prefill", "mla_absorb"])
@pytest.mark.parametrize("case", ["v3", "v2-lite", "chunk", "packed"])
def test_heads_in_groups_give_the_same(name: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two heads and then the third, or all three at once: only the order of BLAS's own sums may differ."""
    inputs, attrs = drawn(OPS[name.replace("_", ".", 1)], "forward", case, {})
    whole = getattr(cpu, name)(**inputs, **attrs)
    monkeypatch.setattr(mla, "GROUP", 2)
    for a, b in zip(getattr(cpu, name)(**inputs, **attrs), whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-14 * np.abs(b).max())  # sums of at most 18 terms


@pytest.mark.parametrize("case", ["v3", "v2-lite", "chunk"])
def test_a_training_step_computes_the_forward_once(case: str) -> None:
    """What prefill_saving saves gives mla_prefill_bwd's gradients, bit for bit, also into arrays that the caller keeps."""
    inputs, attrs = drawn(OPS["mla.prefill"], "backward", case, {}, FP32)
    forward = {k: a for k, a in inputs.items() if k not in ("dy", "dc_kv", "dk_pe")}
    grads = [inputs[name] for name in ("dy", "dc_kv", "dk_pe")]
    outputs, saved = mla.prefill_saving(**forward, **attrs)
    for a, b in zip(outputs, cpu.mla_prefill(**forward, **attrs), strict=True):
        np.testing.assert_array_equal(a, b)
    expected = cpu.mla_prefill_bwd(**inputs, **attrs)
    kept = {name: np.full_like(a, np.nan) for name, a in forward.items() if "_proj" in name}
    for out in (None, kept):
        for a, b in zip(mla.backward(saved, *grads, out=out), expected, strict=True):
            np.testing.assert_array_equal(a, b)
    assert not any(np.isnan(a).any() for a in kept.values())


def test_a_wrong_gradient_does_not_pass() -> None:
    """The judge that passes the kernels fails a dk that lacks one query's share."""
    op = OPS["attention"]
    inputs, attrs = drawn(op, "backward", "square", {}, FP32)
    band = band_of(op, "backward", inputs, attrs, FP32)
    less = {**inputs, "do": np.concatenate([inputs["do"][:, :-1], 0 * inputs["do"][:, -1:]], axis=1)}
    returned = KERNELS.ask(op, "backward", inputs, attrs, FP32)
    returned["dk"] = Returned(KERNELS.ask(op, "backward", less, attrs, FP32)["dk"].values, "float32")
    assert judge(Question(op, "backward", inputs, attrs, FP32), returned, band).verdict != PASS


def test_wrong_arguments_are_named() -> None:
    """A ValueError names argument, value and expectation before any work."""
    q, k = np.zeros((1, 3, 4, 8), np.float32), np.zeros((1, 2, 4, 8), np.float32)
    x, w = np.zeros((2, 4), np.float32), np.zeros((3, 4), np.float32)
    ends = np.array([0, 2, 3])
    layer, attrs = drawn(OPS["mla.prefill"], "forward", "chunk", {}, FP32)
    for call, expected in (
        (lambda: cpu.linear(x=x, weight=w[:, 1:]), r"linear: weight has shape \(3, 3\)"),
        (lambda: cpu.linear(x=x, weight=w.astype(np.float64)), "weight is a float64 array; expected float32"),
        (lambda: cpu.linear_bwd(x=x, weight=w, dy=x), r"linear_bwd: dy has shape \(2, 4\)"),
        (lambda: cpu.attention(q=q, k=k[:, :, :3], v=k[:, :, :3]), "k is of 3 heads; expected a divisor of the 4 heads"),
        (lambda: cpu.attention(q=q, k=k, v=k, empty_rows="refuse"), "q is of 3 positions and k of 2"),
        (lambda: cpu.attention(q=q, k=k, v=k, block=0), "block is 0"),
        (lambda: cpu.attention(q=q, k=k, v=k, scale=np.inf), "scale is inf"),
        (lambda: cpu.attention(q=q, k=k, v=k, empty_lse="0"), "empty_lse is '0'"),
        (lambda: cpu.attention(q=q, k=k, v=k, window=3), "window is no attribute"),
        (lambda: cpu.attention(q=q.astype(np.float16), k=k, v=k), "q is a float16 array"),
        (lambda: cpu.attention(q=list(q), k=k, v=k), "q is of type list"),  # type: ignore[arg-type]
        (lambda: cpu.attention_bwd(q=q, k=k, v=k, do=q[:, :2], dlse=q[..., 0]), "do has shape"),
        (lambda: cpu.attention_merge(o_parts=np.zeros((0, 1, 1, 1, 1)), lse_parts=np.zeros((0, 1, 1, 1))), "o_parts is of no parts"),
        (lambda: cpu.attention_varlen(q=q[0], k=q[0], v=q[0], cu_seqlens_q=ends, cu_seqlens_k=ends + 1), "cu_seqlens_k runs from 1"),
        (lambda: cpu.attention_varlen(q=q[0], k=q[0], v=q[0], cu_seqlens_q=ends * 1.0, cu_seqlens_k=ends), "cu_seqlens_q is a float64"),
        (lambda: cpu.mla_prefill(**{**layer, "o_proj": layer["o_proj"][:, 1:]}, **attrs), "mla_prefill: o_proj has shape"),
        (lambda: cpu.mla_prefill(**{**layer, "q_a_proj": None}, **attrs), "queries come from"),
        (lambda: cpu.mla_prefill(**{**layer, "kv_b_proj": None}, **attrs), "kv_b_proj is missing"),
        (lambda: cpu.mla_absorb(**{**layer, "positions": layer["positions"] - 99}, **attrs), r"positions\[0\] is -95"),
        (lambda: cpu.mla_absorb(**{**layer, "k_pe_cache": layer["k_pe_cache"][..., 1:]}, **attrs), "k_pe_cache is of shape"),
        (lambda: cpu.mla_absorb(**layer, **{**attrs, "factor": 0.5}), "factor is 0.5"),
        (lambda: cpu.mla_absorb(**layer, **{**attrs, "rms_norm_eps": -1.0}), "rms_norm_eps is -1.0"),
    ):
        with pytest.raises(ValueError, match=expected):
            call()
