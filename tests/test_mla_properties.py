"""Metamorphic properties of multi-head latent attention, each with a mutant that it kills. Float64 throughout."""

import itertools
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from float64 import FP64, Arrays, drawn, near
from hypothesis import given
from hypothesis import strategies as st
from leadline.golden.band import band_of
from leadline.ref import OPS, attention_fwd, cache_append_fwd, cache_read_fwd, mla_decode_fwd
from leadline.ref.mla_cache import LAYOUTS
from leadline.ref.op import Op

FORMS = ["mla.prefill", "mla.absorb"]


# ---- chunks, packed rows, pages


def in_chunks(op: Op, inputs: Arrays, attrs: dict[str, Any], cuts: list[int], restart: bool = False) -> Arrays:
    """The sequence a chunk at a time, each after the latents of those before; forward, then backward from the last chunk to the first."""
    s = inputs["x"].shape[1]
    edges = [0, *sorted(cuts), s]
    weights = {k: v for k, v in inputs.items() if k.endswith(("proj", "layernorm", "mqa"))}
    done: list[tuple[Arrays, int, int]] = []
    c_kv, k_pe, ys = [], [], []
    for a, b in itertools.pairwise(edges):
        positions = inputs["positions"][:, a:b] - (inputs["positions"][:, a : a + 1] if restart and b > a else 0)
        given: Arrays = {"x": inputs["x"][:, a:b], "positions": positions, **weights}
        if a:
            given |= {"c_kv_cache": np.concatenate(c_kv, 1), "k_pe_cache": np.concatenate(k_pe, 1)}
        out = op.run("forward", given, attrs)
        ys.append(out["y"])
        c_kv.append(out["c_kv"])
        k_pe.append(out["k_pe"])
        done.append((given, a, b))
    outputs = {"y": np.concatenate(ys, 1), "c_kv": np.concatenate(c_kv, 1), "k_pe": np.concatenate(k_pe, 1)}
    if "dy" in inputs:
        dc_kv, dk_pe = inputs["dc_kv"].copy(), inputs["dk_pe"].copy()
        dx, total = np.zeros_like(inputs["x"]), {f"d{k}": np.zeros_like(w) for k, w in weights.items()}
        for given, a, b in reversed(done):
            grads = op.run("backward", {**given, "dy": inputs["dy"][:, a:b], "dc_kv": dc_kv[:, a:b], "dk_pe": dk_pe[:, a:b]}, attrs)
            dx[:, a:b] = grads["dx"]
            if a:
                dc_kv[:, :a] += grads["dc_kv_cache"]
                dk_pe[:, :a] += grads["dk_pe_cache"]
            for name in total:
                total[name] += grads[name]
        outputs |= {"dx": dx, **total}
    return outputs


@pytest.mark.parametrize("name", FORMS)
@given(cuts=st.lists(st.integers(1, 4), max_size=3), seed=st.integers(0, 2**31))
def test_chunked_equals_whole(name: str, cuts: list[int], seed: int) -> None:
    """Outputs and every gradient, the chain through the cached latents included, empty chunks too."""
    op, inputs, attrs = drawn(name, "v3", "backward", seed)
    chunked = in_chunks(op, inputs, attrs, cuts)
    for way in ("forward", "backward"):
        band = band_of(op, way, inputs, attrs, FP64)
        for output, truth in band.truth.items():
            assert near(chunked[output], truth, band.sigma[output] * (len(cuts) + 1)), output  # so many partial sums of dweight


@pytest.mark.parametrize("name", FORMS)
def test_chunked_check_kills(name: str) -> None:
    """Positions that begin at 0 in every chunk (the cache's offset forgotten) change y."""
    op, inputs, attrs = drawn(name, "v3")
    band = band_of(op, "forward", inputs, attrs, FP64)
    assert near(in_chunks(op, inputs, attrs, [2])["y"], band.truth["y"], band.sigma["y"] * 2)
    assert not near(in_chunks(op, inputs, attrs, [2], restart=True)["k_pe"], band.truth["k_pe"], band.sigma["k_pe"] * 2)


@pytest.mark.parametrize("name", FORMS)
def test_packed_rows_equal_each_sequence_alone(name: str) -> None:
    """cu_seqlens keeps sequences apart; the mutant without boundaries lets the second see the first."""
    op, inputs, attrs = drawn(name, "packed")
    ends = inputs["cu_seqlens"].tolist()
    band = band_of(op, "forward", inputs, attrs, FP64)
    joined = op.run("forward", {**inputs, "cu_seqlens": np.array([0, ends[-1]])}, attrs)["y"]
    for a, b in itertools.pairwise(ends):
        alone = {
            **{k: v for k, v in inputs.items() if k != "cu_seqlens"},
            "x": inputs["x"][:, a:b],
            "positions": inputs["positions"][:, a:b],
        }
        for output, y in op.run("forward", alone, attrs).items():
            assert near(y, band.truth[output][:, a:b], band.sigma[output][:, a:b]), output
        assert near(joined[:, a:b], band.truth["y"][:, a:b], band.sigma["y"][:, a:b]) == (a == 0)


def contiguous_decode(q: np.ndarray, tokens: list[np.ndarray], c: int, **attrs: Any) -> list[np.ndarray]:
    return [attention_fwd(q[i : i + 1], t[None, :, None], t[None, :, None, :c], None, **attrs)[0][0] for i, t in enumerate(tokens)]


@given(st.integers(0, 2**31), st.sampled_from((1, 3, 8)), st.lists(st.integers(0, 20), min_size=1, max_size=3))
def test_paged_equals_contiguous(seed: int, page: int, lengths: list[int]) -> None:
    """Tokens on any pages in any order give the bits of the contiguous cache; one page read in another's place does not."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    blocks = -(-max(lengths) // page) + 1
    pages = blocks * len(lengths)
    table = rng.permutation(pages).reshape(len(lengths), blocks)
    kv_cache, q = rng.standard_normal((pages, page, 12)), rng.standard_normal((len(lengths), 2, 3, 12))
    tokens = [kv_cache[row].reshape(-1, 12)[:n] for row, n in zip(table, lengths, strict=True)]
    (o, _), _ = mla_decode_fwd(q, kv_cache, table, np.array(lengths), kv_lora_rank=8)
    for i, expected in enumerate(contiguous_decode(q, tokens, 8)):
        np.testing.assert_array_equal(o[i : i + 1], expected)
    if lengths[0] > page + 1:  # a full page and more than the newest token of the next
        swapped = table.copy()
        swapped[0, 0] = table[0, 1]
        assert not np.array_equal(mla_decode_fwd(q, kv_cache, swapped, np.array(lengths), kv_lora_rank=8)[0][0][0, 0], o[0, 0])


@given(st.integers(0, 2**31), st.sampled_from(("bf16", "fp8_v32", "fp8_v4")), st.integers(1, 5), st.integers(0, 9))
def test_what_is_appended_is_read_back(seed: int, layout: str, page: int, n: int) -> None:
    """In any order, in parts or at once: the same bytes; k_pe exact in bfloat16, c_kv within half a unit of its tile's scale; what was
    appended before stays. Tokens read in the next one's place are caught."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    c, r, pages = 136, 4, 4
    how: dict[str, Any] = {"layout": layout, "page_size": page}
    empty = rng.integers(0, 256, (pages, LAYOUTS[layout].page_bytes(page, c, r))).astype(np.uint8)
    slots = rng.permutation(pages * page)[: min(n, pages * page)]
    c_kv, k_pe = (rng.standard_normal((len(slots), w)).astype(np.float32) for w in (c, r))
    whole, _ = cache_append_fwd(empty, c_kv, k_pe, slots, **how)
    parts = empty
    for i in reversed(range(len(slots))):
        parts, _ = cache_append_fwd(parts, c_kv[i : i + 1], k_pe[i : i + 1], slots[i : i + 1], **how)
    np.testing.assert_array_equal(whole, parts)
    (c_back, k_back), _ = cache_read_fwd(whole, slots, kv_lora_rank=c, qk_rope_head_dim=r, **how)
    rounded = OPS["cast.bf16"].fwd
    np.testing.assert_array_equal(k_back, rounded(k_pe.ravel())[0].reshape(k_pe.shape))
    stored = rounded(c_kv.ravel())[0].reshape(c_kv.shape)
    if layout == "bf16":
        np.testing.assert_array_equal(c_back, stored)
    else:
        assert np.all(np.abs(c_back - stored) <= np.abs(stored) * 2.0**-4 + 2.0**-13 * 2.0**-10)  # e4m3: 4 bits; its least subnormal
    if len(slots) > 1:
        shifted, _ = cache_read_fwd(whole, np.roll(slots, 1), kv_lora_rank=c, qk_rope_head_dim=r, **how)
        assert not np.array_equal(shifted[1], k_back)
    others = np.setdiff1d(np.arange(pages * page), slots)
    before, after = (cache_read_fwd(x, others, kv_lora_rank=c, qk_rope_head_dim=r, **how)[0] for x in (empty, whole))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


def test_nothing_is_half_written() -> None:
    """A wrong argument leaves the cache as it was, and is named."""
    op, inputs, attrs = drawn("cache.append", "v32")
    before = inputs["kv_cache"].copy()
    n = len(inputs["slots"])
    nan = inputs["c_kv"].copy()
    nan[3, 5] = np.nan
    for change, message in (
        ({"slots": np.full(n, 1)}, "slots has 1 twice"),
        ({"slots": np.arange(n) + 5}, r"slots\[3\] is 8; expected -1 to 7"),
        ({"c_kv": nan}, r"c_kv\[3, 5\] is nan"),
        ({"kv_cache": inputs["kv_cache"][:, 1:]}, "kv_cache is uint8 of shape"),
        ({"kv_cache": inputs["kv_cache"].astype(np.uint16)}, "expected uint8 pages of 2624 bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            op.run("forward", {**inputs, **change}, attrs)
        np.testing.assert_array_equal(inputs["kv_cache"], before)


# ---- batch, heads, scales


def attend_over_the_batch(q: np.ndarray, k: np.ndarray, v: np.ndarray, **attrs: Any) -> np.ndarray:
    """The mutant: keys of all rows in one list, as a kernel that drops the batch stride has it."""
    flat = [np.broadcast_to(x.reshape(1, -1, *x.shape[2:]), (len(q), x.shape[0] * x.shape[1], *x.shape[2:])) for x in (k, v)]
    return attention_fwd(q, *flat, None, causal=False)[0][0]


def rows_are_independent(attend: Callable) -> bool:
    rng = np.random.Generator(np.random.Philox(key=11))
    q, k, v = (rng.standard_normal((3, n, 2, 8)) for n in (4, 6, 6))
    before = attend(q, k, v)
    k[1], v[1] = rng.standard_normal((2, 6, 2, 8))
    after = attend(q, k, v)
    return np.array_equal(np.any(after != before, axis=(1, 2, 3)), [False, True, False])


def test_batch_rows_are_independent() -> None:
    """Another row's keys change nothing, to the bit; in a whole layer neither."""
    assert rows_are_independent(lambda q, k, v: attention_fwd(q, k, v, None)[0][0])
    assert not rows_are_independent(attend_over_the_batch)
    for name in FORMS:
        op, inputs, attrs = drawn(name, "v3")
        moved = {**inputs, "x": inputs["x"].copy()}
        moved["x"][1] += 1.0
        before, after = (op.run("forward", x, attrs)["y"] for x in (inputs, moved))
        np.testing.assert_array_equal(after[0], before[0])
        assert np.any(after[1] != before[1])


def turned_heads(inputs: Arrays, attrs: dict[str, Any], order: list[int], kv_split: bool = True) -> Arrays:
    """The heads of every weight in another order. The mutant takes kv_b_proj's rows as all keys, then all values."""
    h, dv = attrs["num_attention_heads"], attrs["v_head_dim"]
    dn, c = attrs["qk_nope_head_dim"], attrs["kv_lora_rank"]

    def rows(w: np.ndarray) -> np.ndarray:
        return w.reshape(h, -1, w.shape[1])[order].reshape(w.shape)

    kv = inputs["kv_b_proj"]
    if kv_split:
        turned = rows(kv)
    else:
        k, v = kv[: h * dn].reshape(h, dn, c)[order], kv[h * dn :].reshape(h, dv, c)[order]
        turned = np.concatenate([k.reshape(-1, c), v.reshape(-1, c)])
    o = inputs["o_proj"].reshape(-1, h, dv)[:, order].reshape(inputs["o_proj"].shape)
    return {**inputs, "q_b_proj": rows(inputs["q_b_proj"]), "kv_b_proj": turned, "o_proj": o}


@pytest.mark.parametrize("name", FORMS)
@given(order=st.permutations(range(3)), seed=st.integers(0, 2**31))
def test_heads_may_come_in_any_order(name: str, order: list[int], seed: int) -> None:
    """Heads exchanged in q_b_proj, kv_b_proj and o_proj leave y, c_kv and k_pe; read with the wrong split of kv_b_proj they do not."""
    op, inputs, attrs = drawn(name, "v3", seed=seed)
    band = band_of(op, "forward", inputs, attrs, FP64)
    for output, y in op.run("forward", turned_heads(inputs, attrs, order), attrs).items():
        assert near(y, band.truth[output], band.sigma[output]), output
    if order != sorted(order):
        wrong = op.run("forward", turned_heads(inputs, attrs, order, kv_split=False), attrs)["y"]
        assert not near(wrong, band.truth["y"], band.sigma["y"])


def scale_twice(q: np.ndarray, k: np.ndarray, v: np.ndarray, sink: Any = None, *, scale: float) -> Any:
    return attention_fwd(q, k, v, sink, scale=scale * scale)


def scales_rightly(attend: Callable) -> bool:
    """Keys doubled at half the scale change nothing; values doubled double o; a vector added to every key moves only lse, by scale q·c."""
    rng = np.random.Generator(np.random.Philox(key=12))
    q, k, v = (rng.standard_normal((1, n, 2, 8)) for n in (3, 6, 6))
    (o, lse), _ = attend(q, k, v, None, scale=0.3)
    (o2, lse2), _ = attend(q, 2 * k, v, None, scale=0.15)
    (o3, lse3), _ = attend(q, k, 2 * v, None, scale=0.3)
    shift = rng.standard_normal(8)
    (o4, lse4), _ = attend(q, k + shift, v, None, scale=0.3)
    exact = all(np.array_equal(a, b) for a, b in ((o2, o), (lse2, lse), (o3, 2 * o), (lse3, lse)))
    moved = lse + 0.3 * np.transpose(q @ shift, (0, 2, 1))
    return exact and np.allclose(o4, o, rtol=1e-12, atol=1e-13) and np.allclose(lse4, moved, rtol=1e-12, atol=1e-12)


def test_scale_of_keys_and_values() -> None:
    """Exact for powers of two; a scale that is applied to q and again to the scores is caught."""
    assert scales_rightly(attention_fwd)
    assert not scales_rightly(scale_twice)


@pytest.mark.parametrize("name", FORMS)
def test_the_latent_keys_gradient_gathers_over_heads(name: str) -> None:
    """dk_pe and dc_kv of a cached token are the sums over heads of what each head alone gives; one head's (a shard's) part is not it."""
    op, inputs, attrs = drawn(name, "chunk", "backward")
    h, dv = attrs["num_attention_heads"], attrs["v_head_dim"]
    band = band_of(op, "backward", inputs, attrs, FP64)
    alone = []
    for head in range(h):
        kept = np.repeat(np.arange(h) == head, dv)
        alone.append(op.run("backward", {**inputs, "o_proj": inputs["o_proj"] * kept}, attrs))
    for output in ("dk_pe_cache", "dc_kv_cache"):
        total = np.sum([grads[output] for grads in alone], axis=0)
        assert near(total, band.truth[output], h * band.sigma[output]), output
        assert not near(alone[0][output], band.truth[output], h * band.sigma[output])


# ---- sizes


def peak_of(tokens: int, block: int) -> int:
    """Bytes at the height of attention's forward and backward"""
    rng = np.random.Generator(np.random.Philox(key=13))
    q, k, v, do = (rng.standard_normal((1, tokens, 1, 8), dtype=np.float32) for _ in range(4))
    tracemalloc.start()
    _, saved = attention_fwd(q, k, v, None, block=block)
    OPS["attention"].bwd(do, np.zeros((1, 1, tokens), np.float32), saved)  # type: ignore[misc]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def test_attention_memory_grows_linearly() -> None:
    """From 4,096 to 16,384 tokens four times the memory; with all keys in one block sixteen (512 to 2,048)."""
    assert 3.5 < peak_of(16384, 128) / peak_of(4096, 128) < 4.5
    assert peak_of(2048, 2048) / peak_of(512, 512) > 12


REAL = """
import resource, sys
import numpy as np
from leadline.ref import Config, mla_prefill_bwd, mla_prefill_fwd
config, rng = Config.preset("v3"), np.random.Generator(np.random.Philox(key=1))
d, q, c, r, h, dn, dv = 7168, 1536, 512, 64, 128, 128, 128
shapes = dict(q_a_proj=(q, d), q_a_layernorm=(q,), q_b_proj=(h * (dn + r), q), kv_a_proj_with_mqa=(c + r, d), kv_a_layernorm=(c,),
              kv_b_proj=(h * (dn + dv), c), o_proj=(d, h * dv))
w = {k: np.ones(s, np.float32) if len(s) == 1 else rng.random(s, np.float32) * np.float32(s[1] ** -0.5) for k, s in shapes.items()}
x = rng.standard_normal((1, 256, d), dtype=np.float32)
(y, c_kv, k_pe), saved = mla_prefill_fwd(x, np.arange(256)[None], **w, **config.attention())
grads = mla_prefill_bwd(np.ones_like(y), np.zeros_like(c_kv), np.zeros_like(k_pe), saved)
assert np.all(np.isfinite(y)) and all(np.all(np.isfinite(g)) for g in grads) and len(grads) == 8
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def test_real_width_fits() -> None:
    """V3's attention (hidden 7168, 128 heads), 256 tokens, forward and backward: under 8 GB."""
    done = subprocess.run([sys.executable, "-c", REAL], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 8.0
