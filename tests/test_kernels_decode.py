"""CPU kernels of decode: what the judge's cases do not reach. Expectations are written out or come from NumPy in float64."""

from dataclasses import replace
from typing import Any

import mpmath
import numpy as np
import pytest
from leadline.golden.band import band_of
from leadline.golden.draw import draw_case
from leadline.golden.judge import FAIL, PASS, Question, judge
from leadline.golden.precision import PRECISIONS
from leadline.golden.subject import load
from leadline.kernels import cpu
from leadline.kernels.cpu import _common, _step, _tile, matvec, mla, rotary
from leadline.kernels.cpu.mla_cache import packing
from leadline.ref import OPS
from leadline.ref.yarn import Yarn

RNG = np.random.Generator(np.random.Philox(key=11))


def normal(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


def attention(q: np.ndarray, keys: np.ndarray, dv: int, scale: float, sink: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """o[s,h,dv], lse[h,s] of q[s,h,k] over keys[t,k], causal, in float64 and without blocks"""
    q, keys = q.astype(np.float64), keys.astype(np.float64)
    z = np.einsum("shk,tk->hst", q, keys) * scale
    s, t = z.shape[1:]
    z = np.where(np.arange(t)[None, :] <= np.arange(s)[:, None] + t - s, z, -np.inf)
    top = z.max(-1, keepdims=True)
    p = np.exp(z - top)
    lse = (top + np.log(p.sum(-1, keepdims=True)))[..., 0]
    o = np.einsum("hst,tv->shv", np.exp(z - lse[..., None]), keys[:, :dv])
    return o if sink is None else o / (1 + np.exp(sink[:, None] - lse)).T[..., None], lse


def paged(keys: np.ndarray, page: int, fill: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """keys[t,k] in a cache of shuffled pages with three to spare, and their block table; `fill` everywhere else"""
    t, k = keys.shape
    blocks = -(-t // page)
    order = RNG.permutation(blocks + 3)
    cache = np.full((blocks + 3, page, k), fill, keys.dtype)
    for i in range(t):
        cache[order[i // page], i % page] = keys[i]
    return cache, np.append(order[:blocks], -7)[None]  # the block after the last holds no page


@pytest.mark.parametrize("position", [1, 163_839, 2**26 - 1])
def test_angles_are_exact_far_out(position: int) -> None:
    """cos and sin within two units of float64: position times frequency in float64 would be 10^4 units off at 163,839."""
    cos, sin = rotary.tables(np.array([position]), 64, Yarn(), np.float64)
    with mpmath.workdps(50):
        angles = [position * mpmath.mpf(10000) ** (mpmath.mpf(-2 * i) / 64) for i in range(32)]
        for got, want in ((cos, mpmath.cos), (sin, mpmath.sin)):
            for value, angle in zip(got[0], angles, strict=True):
                assert abs(mpmath.mpf(float(value)) - want(angle)) <= 2 * np.spacing(abs(float(want(angle))))


def test_every_quarter_turn_has_its_signs() -> None:
    """The eight octants of the turn, at the frequency 1 of the first pair."""
    positions = np.arange(64)
    cos, sin = rotary.tables(positions, 2, Yarn(), np.float64)
    np.testing.assert_allclose(cos[:, 0], np.cos(positions), rtol=0, atol=1e-14)
    np.testing.assert_allclose(sin[:, 0], np.sin(positions), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("rows", "d", "n"),
    [(300, 700, 1), (17, 64, 2), (65, 1000, 3), (9, 31, 5), (4, 1, 1), (5, 640, 7), (203, 4100, 1), (11, 2100, 2), (7, 1100, 7)],
)
def test_matvec_is_the_product(rows: int, d: int, n: int, dtype: Any) -> None:
    """Whole vectors, the rest of a row, and every number of columns that has its own code; the last three share vectors among rows."""
    w, x = normal(rows, d, dtype=dtype), normal(n, d, dtype=dtype)
    want = x.astype(np.float64) @ w.astype(np.float64).T
    np.testing.assert_allclose(matvec.matvec(w, x), want, rtol=0, atol=40 * np.finfo(dtype).eps * d**0.5)
    heads, per, first, own = 3, 7, 2, 5
    w = normal(heads * per, d, dtype=dtype)
    up = w.astype(np.float64).reshape(heads, per, d)[:, first : first + own]
    x = normal(heads, n, d, dtype=dtype)
    got = matvec.head_matvec(w, x, own, first)
    np.testing.assert_allclose(got, np.einsum("hnd,hid->hni", x, up), rtol=0, atol=40 * np.finfo(dtype).eps * d**0.5)
    x = normal(heads, n, own, dtype=dtype)
    np.testing.assert_allclose(matvec.head_vecmat(w, x, first), np.einsum("hni,hid->hnd", x, up), rtol=0, atol=40 * np.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_block_is_a_product(dtype: Any) -> None:
    """One block at its place, alone and onto a scaled one; what lies beside it stays."""
    from numba import njit

    block, onto = _tile.block, _tile.block_onto

    @njit
    def both(a, b, c, e, f, k, n, wide):
        block(a, 3, k, 1, b, 2, n, c, 5, wide, k, f, 0)
        onto(a, 3, k, 1, b, 2, n, e, 5, wide, k, f, 1)

    k, n, wide, rows = 7, 200, 210, _tile.ROWS
    columns = _tile.VECTORS * _tile.lanes(np.dtype(dtype).itemsize)
    a, b, f = normal(3 + rows * k, dtype=dtype), normal(k * n + 2, dtype=dtype), normal(rows + 1, dtype=dtype)
    c, e = normal(5 + rows * wide, dtype=dtype), normal(5 + rows * wide, dtype=dtype)
    want_c, want_e = c.copy(), e.copy()
    both(a, b, c, e, f, k, n, wide)
    product = a[3:].reshape(rows, k) @ b[2:].reshape(k, n)[:, :columns]
    want_c[5:].reshape(rows, wide)[:, :columns] = product
    target = want_e[5:].reshape(rows, wide)
    target[:, :columns] = target[:, :columns] * f[1:, None] + product
    np.testing.assert_allclose(c, want_c, rtol=1e-5)
    np.testing.assert_allclose(e, want_e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("page", [1, 16, 64, 100, 5000])
def test_pages_of_any_size_hold_the_same_tokens(page: int) -> None:
    """In place where a page is long, gathered where it is short; NaN in every slot that is not used stays out."""
    keys, q = normal(333, 40), normal(1, 2, 3, 40)
    arguments: dict[str, Any] = {"cache_seqlens": np.array([333]), "kv_lora_rank": 24, "scale": 0.2}
    cache, table = paged(keys, page, np.nan)
    o, lse = cpu.mla_decode(q=q, kv_cache=cache, block_table=table, **arguments)
    want_o, want_lse = attention(q[0], keys, 24, 0.2)
    np.testing.assert_allclose(o[0], want_o, rtol=0, atol=2e-6)
    np.testing.assert_allclose(lse[0], want_lse, rtol=2e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_long_sequences_in_parts(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several parts of keys, several chunks of rows, a sink and an empty sequence: the dense softmax, whatever the cut."""
    s, h, k, dv = 2, 70, 48, 33
    q, sink = normal(2, s, h, k, dtype=dtype), normal(h, dtype=dtype)
    keys = normal(1500, k, dtype=dtype)
    keys[700] *= 5  # the maximum moves within the sequence
    cache, table = paged(keys, 64)
    arguments: dict[str, Any] = {"kv_cache": cache, "block_table": np.tile(table, (2, 1)), "cache_seqlens": np.array([1500, 0])}
    want_o, want_lse = attention(q[0], keys, dv, 0.3, sink)
    eps, z = float(np.finfo(dtype).eps), 0.3 * np.abs(q[0] @ keys.T).max()
    bound = eps * float(z) * float(np.abs(keys).max())  # a score off by eps z turns its probability by as much
    for least in (512, 64, 100_000):
        monkeypatch.setattr(mla_decode_module(), "LEAST", least)
        o, lse = cpu.mla_decode(q=q, **arguments, sink=sink, kv_lora_rank=dv, scale=0.3)
        np.testing.assert_allclose(o[0], want_o, rtol=0, atol=bound)
        np.testing.assert_allclose(lse[0], want_lse, rtol=100 * eps)
        assert np.all(o[1] == 0)
        assert np.all(lse[1] == np.inf)


def mla_decode_module() -> Any:
    """The module, whose name the function has in the package"""
    import importlib

    return importlib.import_module("leadline.kernels.cpu.mla_decode")


def test_halves_of_the_keys_merge_to_the_whole() -> None:
    """o and lse of two halves, weighted by their lse, are those of all keys: what a caller who splits by himself relies on."""
    keys, q = normal(256, 40), normal(1, 1, 4, 40)
    cache, table = keys.reshape(4, 64, 40), np.arange(4)[None]
    whole, lse = cpu.mla_decode(q=q, kv_cache=cache, block_table=table, cache_seqlens=np.array([256]), kv_lora_rank=32)
    halves = [
        cpu.mla_decode(q=q, kv_cache=cache, block_table=table[:, i : i + 2], cache_seqlens=np.array([128]), kv_lora_rank=32) for i in (0, 2)
    ]
    together = np.logaddexp(halves[0][1], halves[1][1])
    np.testing.assert_allclose(lse, together, rtol=1e-6)
    merged = sum(o * np.exp(part - together).transpose(0, 2, 1)[..., None] for o, part in halves)
    np.testing.assert_allclose(whole, merged, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", ["bf16", "fp8_v32", "fp8_v4"])
def test_bytes_that_are_not_used_do_not_leak(layout: str) -> None:
    """A cache full of NaN bytes in which 70 tokens are stored: the result is that of the tokens as they are read back."""
    c, r, page = 128, 8, 16
    p = packing(layout, page, c, r)
    kv_cache = np.full((8, p.page_bytes), 0xFF, np.uint8)
    table = np.array([[6, 1, 4, 0, 3, 999]])
    tokens = np.arange(70)
    slots = table[0][tokens // page] * page + tokens % page
    sizes: dict[str, Any] = {"layout": layout, "page_size": page}
    stored = cpu.cache_append(kv_cache, normal(70, c) * 3, normal(70, r), slots, **sizes)
    keys = np.concatenate(cpu.cache_read(stored, slots, kv_lora_rank=c, qk_rope_head_dim=r, **sizes), axis=1)
    q = normal(1, 2, 3, c + r)
    arguments: dict[str, Any] = {"block_table": table, "cache_seqlens": np.array([70]), "scale": 0.1}
    o, lse = cpu.mla_decode_fp8(q=q, kv_cache=stored, head_dim_v=c, qk_rope_head_dim=r, **sizes, **arguments)
    want_o, want_lse = attention(q[0], keys, c, 0.1)
    np.testing.assert_allclose(o[0], want_o, rtol=0, atol=2e-5)
    np.testing.assert_allclose(lse[0], want_lse, rtol=2e-6)


def test_a_nan_that_is_read_is_nan() -> None:
    """In the rows that see it, and in no other: the last token is hidden from the first of two queries' scores, but not from its sums."""
    keys = normal(70, 8)
    keys[69, 7] = np.nan  # a channel that is key only: the values are clean
    cache, table = paged(keys, 64)
    o, lse = cpu.mla_decode(q=normal(1, 2, 1, 8), kv_cache=cache, block_table=table, cache_seqlens=np.array([70]), kv_lora_rank=4)
    assert np.isnan(o[0, 1]).all()
    assert np.isnan(lse[0, :, 1]).all()
    assert np.isfinite(o[0, 0]).all()
    assert np.isfinite(lse[0, :, 0]).all()


def verdict_of_a_step(case: str, dims: dict[str, int], precision: str) -> str:
    op, p = OPS["mla.absorb"], PRECISIONS[precision]
    chosen = next(c for c in op.cases if c.name == case)
    chosen = replace(chosen, dims={**chosen.dims, **dims})
    inputs, attrs = draw_case(op, chosen, "forward", p), dict(chosen.attrs)
    returned = load("kernels.cpu").ask(op, "forward", inputs, attrs, p)
    return judge(Question(op, "forward", inputs, attrs, p), returned, band_of(op, "forward", inputs, attrs, p)).verdict


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize(
    ("case", "dims"),
    [("chunk", {"b": 2, "s": 2}), ("chunk", {"b": 1, "s": 1, "t": 1100}), ("chunk", {"b": 2, "s": 1, "t": 63}), ("v2-lite", {"s": 3})],
    ids=str,
)
def test_a_step_is_the_layer(case: str, dims: dict[str, int], precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens, by the products for few and by those for many: both in the reference's band, with one part of the cache or several."""
    steps, step = [], mla.step
    monkeypatch.setattr(mla, "step", lambda *a: steps.append(1) or step(*a))
    assert verdict_of_a_step(case, dims, precision) == PASS
    assert steps
    monkeypatch.setattr(mla, "is_step", lambda arrays: False)
    taken = len(steps)
    assert verdict_of_a_step(case, dims, precision) == PASS
    assert len(steps) == taken


@pytest.mark.parametrize("wrong", ["scale", "order", "sequences", "offset"])
def test_a_wrong_step_does_not_pass(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale of the width c + r, the new tokens in the wrong order, the other sequence's cache, W_UK where W_UV should be."""
    right, product = _step.decode_halves, _step.head_matvec

    def halves(op: str, q: Any, cached: Any, new: Any, scale: float) -> Any:
        if wrong == "scale":
            scale = q.shape[-1] ** -0.5
        if wrong == "order":
            new = tuple(np.ascontiguousarray(a[:, ::-1]) for a in new)
        if wrong == "sequences":
            cached = tuple(np.ascontiguousarray(a[::-1]) for a in cached)
        return right(op, q, cached, new, scale)

    monkeypatch.setattr(_step, "decode_halves", halves)
    if wrong == "offset":
        monkeypatch.setattr(_step, "head_matvec", lambda weight, x, rows, first: product(weight, x, rows, 0))
    assert verdict_of_a_step("chunk", {"b": 2, "s": 2}, "fp32") == FAIL


def test_results_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread and three give the same bits, at sizes where three have something to do."""
    cache, table = paged(normal(1200, 576), 64)
    q, lengths = normal(1, 1, 128, 576), np.array([1200])
    x, w, positions = normal(400, 8, 64), normal(4000, 300), np.arange(400)

    def everything() -> list[np.ndarray]:
        rope = cpu.rope(x=np.tile(x, (1, 4, 1)), positions=positions)
        decoded = cpu.mla_decode(q=q, kv_cache=cache, block_table=table, cache_seqlens=lengths)
        return [rope, *decoded, matvec.matvec(w, w[:3]), matvec.matvec(w.reshape(200, 6000), w[:20].reshape(1, 6000))]

    ranges = []
    monkeypatch.setattr(_common, "range", lambda *a: ranges.append(len(range(*a))) or range(*a), raising=False)
    monkeypatch.setattr(_common, "THREADS", 3)
    monkeypatch.setattr(_common, "_pool", None)
    three = everything()
    pool = _common._pool
    monkeypatch.setattr(_common, "THREADS", 1)
    one = everything()
    if pool is not None:
        pool.shutdown()
    assert sum(n > 1 for n in ranges) >= 8  # four kernels, twice, were shared out
    for a, b in zip(one, three, strict=True):
        np.testing.assert_array_equal(a, b)


def test_bytes_of_a_token() -> None:
    """Both FP8 layouts written out by hand: 448 has the scale 1 and the code 0x7e, 3.5 then is 0x46; 449 has the scale 2."""
    c_kv, k_pe = np.array([[448.0, 3.5, -1.0], [450.0, 3.5, 0.0]], np.float32), np.array([[1.0], [-2.0]], np.float32)
    v32 = cpu.cache_append(np.full((1, 27), 9, np.uint8), c_kv, k_pe, np.array([2, 0]), layout="fp8_v32", page_size=3)
    first, second = [0x7E, 0x46, 0xB8, 0, 0, 0x80, 0x3F, 0x80, 0x3F], [0x76, 0x3E, 0x00, 0, 0, 0x00, 0x40, 0x00, 0xC0]
    assert v32[0].tolist() == [*second, *[9] * 9, *first]
    v4 = cpu.cache_append(np.full((1, 576), 9, np.uint8), c_kv, k_pe, np.array([2, 0]), layout="fp8_v4", page_size=3)
    data = [0x76, 0x3E, 0x00, 0x00, 0xC0, *[9] * 5, 0x7E, 0x46, 0xB8, 0x80, 0x3F]
    assert v4[0, :21].tolist() == [*data, 128, 9, 9, 9, 127, 9]
    assert np.all(v4[0, 21:] == 9)
    bf16 = cpu.cache_append(np.zeros((1, 8), np.uint8), c_kv[:1], k_pe[:1], np.array([0]), layout="bf16", page_size=1)
    assert bf16[0].tolist() == [0xE0, 0x43, 0x60, 0x40, 0x80, 0xBF, 0x80, 0x3F]


def test_a_cache_at_an_odd_address() -> None:
    """A slice of a larger buffer: neither aligned nor of even length."""
    memory = np.full(1 + 2 * 27, 9, np.uint8)
    cache = memory[1:].reshape(2, 27)
    c_kv, k_pe, slots = normal(3, 3), normal(3, 1), np.array([5, 1, 2])
    sizes: dict[str, Any] = {"layout": "fp8_v32", "page_size": 3}
    fresh = cpu.cache_append(cache.copy(), c_kv, k_pe, slots, **sizes)
    assert cpu.cache_append(cache, c_kv, k_pe, slots, **sizes, out=cache) is cache
    np.testing.assert_array_equal(cache, fresh)
    assert memory[0] == 9
    a, b = (cpu.cache_read(v, slots, kv_lora_rank=3, qk_rope_head_dim=1, **sizes) for v in (cache, fresh))
    np.testing.assert_array_equal(a[0], b[0])
    assert np.abs(a[0] - c_kv).max() < 0.07 * np.abs(c_kv).max()


def append(**changes: Any) -> np.ndarray:
    arguments = {
        "kv_cache": np.full((2, 27), 9, np.uint8),
        "c_kv": np.ones((2, 3), np.float32),
        "k_pe": np.ones((2, 1), np.float32),
        "slots": np.array([0, 4]),
        "layout": "fp8_v32",
        "page_size": 3,
    }
    return cpu.cache_append(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"slots": np.array([0, 6])}, r"slots\[1\] is 6; expected -1 to 5"),
        ({"slots": np.array([-2, 0])}, r"slots\[0\] is -2"),
        ({"slots": np.array([4, 4])}, "slots is 4 twice"),
        ({"slots": np.array([4.0, 5.0])}, "slots"),
        ({"slots": np.array([0])}, "slots is of shape"),
        ({"c_kv": np.array([[1, 2, 3], [4, 5, np.nan]], np.float32)}, r"c_kv\[1, 2\] is nan"),
        ({"c_kv": np.array([[1, 2, 3], [4, 5, 3.4e38]], np.float32)}, r"c_kv\[1, 2\] is 3.*e\+38; expected .* finite in bfloat16"),
        ({"k_pe": np.array([[1], [np.inf]], np.float32)}, r"k_pe\[1, 0\] is inf"),
        ({"k_pe": np.ones((2, 1))}, "k_pe is float64"),
        ({"k_pe": np.ones((2, 2), np.float32)}, "kv_cache is .*expected pages of 33 bytes"),
        ({"layout": "fp8"}, "layout is 'fp8'"),
        ({"page_size": 0}, "page_size is 0"),
        ({"page_size": 2}, "expected pages of 18 bytes"),
    ],
)
def test_nothing_is_stored_if_an_argument_is_wrong(changes: dict[str, Any], expected: str) -> None:
    """In place, the cache's bytes stay as they were; without the change they would not."""
    cache = np.full((2, 27), 9, np.uint8)
    with pytest.raises(ValueError, match=expected):
        append(kv_cache=cache, out=cache, **changes)
    assert np.all(cache == 9)
    append(kv_cache=cache, out=cache)
    assert np.any(cache != 9)


def test_out_of_its_own_or_the_cache_itself() -> None:
    """Another array is filled and the cache left alone; one that overlaps the cache in part is refused."""
    cache, out = np.full((2, 27), 9, np.uint8), np.zeros((2, 27), np.uint8)
    assert append(kv_cache=cache, out=out) is out
    assert np.all(cache == 9)
    np.testing.assert_array_equal(out, append())
    memory = np.full((3, 27), 9, np.uint8)
    with pytest.raises(ValueError, match="overlaps"):
        append(kv_cache=memory[:2], out=memory[1:])
    assert np.all(memory == 9)


def decode(**changes: Any) -> Any:
    arguments = {
        "q": np.ones((1, 1, 2, 6), np.float32),
        "kv_cache": np.ones((3, 4, 6), np.float32),
        "block_table": np.array([[2, 0]]),
        "cache_seqlens": np.array([5]),
        "kv_lora_rank": 4,
    }
    return cpu.mla_decode(**{**arguments, **changes})


def decode_fp8(**changes: Any) -> Any:
    arguments = {
        "q": np.ones((1, 1, 2, 4), np.float32),
        "kv_cache": np.zeros((3, 27), np.uint8),
        "block_table": np.array([[2, 0]]),
        "cache_seqlens": np.array([5]),
        "head_dim_v": 3,
        "qk_rope_head_dim": 1,
        "page_size": 3,
    }
    return cpu.mla_decode_fp8(**{**arguments, **changes})


def rope(**changes: Any) -> Any:
    return cpu.rope(**{"x": np.ones((2, 1, 4), np.float32), "positions": np.array([0, 5]), **changes})


@pytest.mark.parametrize(
    ("call", "changes", "expected"),
    [
        (rope, {"x": np.ones((2, 1, 3), np.float32)}, "r is 3"),
        (rope, {"x": np.ones((2, 1, 4), np.float16)}, "x is a float16"),
        (rope, {"positions": np.array([0, 2**26])}, r"positions\[1\] is 67108864"),
        (rope, {"positions": np.array([0])}, r"positions has shape \(1,\); expected n = 2"),
        (rope, {"positions": np.array([0.0, 1.0])}, "positions is a float64"),
        (rope, {"layout_out": "halves"}, "layout_out is 'halves'"),
        (rope, {"cos_sin": "bf16"}, "cos_sin"),
        (rope, {"theta": float("nan")}, "theta is nan"),
        (rope, {"factor": 0.5}, "factor is 0.5"),
        (rope, {"original_max_position_embeddings": 0}, "original_max_position_embeddings is 0"),
        (rope, {"max_position": 1.5}, "max_position is 1.5"),
        (rope, {"yarn_gating": "never"}, "yarn_gating is 'never'"),
        (rope, {"out": np.empty((2, 1, 4))}, "out is a float64"),
        (lambda **k: cpu.rope_frequencies(np.zeros(()), **k), {"r": 5}, "r is 5"),
        (decode, {"q": np.ones((1, 2, 6), np.float32)}, "q is a float32 array of shape"),
        (decode, {"kv_cache": np.ones((3, 4, 6))}, "kv_cache is float64"),
        (decode, {"kv_cache": np.ones((3, 4, 5), np.float32)}, "kv_cache is float32"),
        (decode, {"block_table": np.array([[2, 3]])}, r"block_table\[0, 1\] is 3; expected 0 to 2"),
        (decode, {"block_table": np.array([[2]])}, r"cache_seqlens\[0\] is 5; expected 0 to 4"),
        (decode, {"cache_seqlens": np.array([-1])}, r"cache_seqlens\[0\] is -1"),
        (decode, {"cache_seqlens": np.array([5, 5])}, "cache_seqlens is of shape"),
        (decode, {"sink": np.zeros(3, np.float32)}, "sink is float32"),
        (decode, {"kv_lora_rank": 7}, "kv_lora_rank is 7; expected 1 to 6"),
        (decode, {"scale": float("inf")}, "scale is inf"),
        (decode, {"causal": 1}, "causal is 1"),
        (decode_fp8, {"kv_cache": np.zeros((3, 26), np.uint8)}, "kv_cache is .*27 bytes"),
        (decode_fp8, {"kv_cache": np.zeros((3, 27), np.int8)}, "kv_cache is a int8"),
        (decode_fp8, {"qk_rope_head_dim": 4}, "qk_rope_head_dim is 4"),
        (decode_fp8, {"head_dim_v": 5}, "head_dim_v is 5"),
        (decode_fp8, {"layout": "v32"}, "layout is 'v32'"),
        (lambda **k: cpu.cache_read(np.zeros((3, 27), np.uint8), **k), {"slots": np.array([-1])}, "kv_cache is .*73728"),
    ],
)
def test_wrong_arguments_are_named(call: Any, changes: dict[str, Any], expected: str) -> None:
    """Each changes one argument of a call that goes through without it."""
    if call in (rope, decode, decode_fp8):
        call()
    with pytest.raises(ValueError, match=expected):
        call(**changes)


def test_slots_are_read_within_the_cache_only() -> None:
    """-1, which storing passes over, is no place to read from."""
    cache = np.zeros((3, 27), np.uint8)
    sizes: dict[str, Any] = {"layout": "fp8_v32", "page_size": 3, "kv_lora_rank": 3, "qk_rope_head_dim": 1}
    assert cpu.cache_read(cache, np.array([0, 8]), **sizes)[0].shape == (2, 3)
    for slot in (-1, 9):
        with pytest.raises(ValueError, match=rf"slots\[1\] is {slot}; expected 0 to 8"):
            cpu.cache_read(cache, np.array([0, slot]), **sizes)
