"""The MLA oracles' own tests: against hand-worked numbers, other routes to the same function and differences, never against `ref`."""

import math
import struct
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
from oracles import ORACLES, attention, cache, linear, mla, rope
from oracles.tape import CTX, mpfs

Arrays = dict[str, np.ndarray]

V3 = {"factor": 40.0, "original_max_position_embeddings": 4096, "theta": 10000.0}
SIZES = {"num_attention_heads": 2, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "kv_lora_rank": 16}


def call(op: str, direction: str = "forward", /, attrs: Any = None, **inputs: np.ndarray) -> Arrays:
    return ORACLES[op, direction](inputs, attrs or {})


def rng() -> np.random.Generator:
    return np.random.default_rng(20250102)


def check_gradients(function: Callable[[Arrays], list[np.ndarray]], inputs: Arrays, cotangents: list[np.ndarray], got: Arrays) -> None:
    """Every got["d" + name] against central differences, along random directions, of <outputs, cotangents> at 50 digits."""
    assert set(got) == {f"d{name}" for name in inputs}
    step = CTX.mpf(10) ** -15  # error step^2 * f''' ~ 1e-30, cancellation ~ 1e-50 / step
    for name, array in inputs.items():
        assert got[f"d{name}"].dtype == np.float64
        assert got[f"d{name}"].shape == array.shape
        for seed in range(2):
            direction = np.random.default_rng(seed).standard_normal(array.shape)

            def loss(sign: int, name: str = name, direction: np.ndarray = direction) -> Any:
                point = {n: linear.scalars(a) for n, a in inputs.items()}
                point[name] = point[name] + sign * step * linear.scalars(direction)
                pairs = zip(function(point), cotangents, strict=True)
                return sum(linear.dot(u.ravel().tolist(), mpfs(w.ravel().tolist())) for u, w in pairs)

            slope = float((loss(1) - loss(-1)) / (2 * step))
            expected = math.fsum((got[f"d{name}"] * direction).ravel())
            assert expected == pytest.approx(slope, rel=1e-12, abs=1e-14), name


# Frequencies and rotation


def test_v3_ramp_bounds() -> None:
    """DeepSeek-V2/V3 (theta 1e4, L0 4096, betas 32 and 1, r 64): corr = 10.47 and 22.51, so low = 10 and high = 23."""
    at = {**rope.YARN, **V3}
    assert float(rope.correction(32, at, 64)) == pytest.approx(10.47, abs=5e-3)
    assert float(rope.correction(1, at, 64)) == pytest.approx(22.51, abs=5e-3)
    assert rope.ramp_bounds(at, 64) == (10, 23)


def test_v3_frequencies() -> None:
    """Up to i = low the frequencies are RoPE's, from i = high on a fortieth of them, between the two blended linearly; amplitude 1."""
    got = call("rope.frequencies", attrs=V3)
    assert got["inv_freq"].shape == (32,)
    assert got["amplitude"].shape == ()
    assert got["amplitude"] == 1
    plain = call("rope.frequencies")["inv_freq"]
    np.testing.assert_allclose(plain, 10000.0 ** (-np.arange(32) / 32), rtol=1e-15)
    assert plain[16] == 0.01
    blend = np.clip((np.arange(32) - 10) / 13, 0, 1)
    np.testing.assert_allclose(got["inv_freq"], plain * (1 - blend + blend / 40), rtol=1e-14)
    np.testing.assert_array_equal(got["inv_freq"][:11], plain[:11])
    np.testing.assert_allclose(got["inv_freq"][23:], plain[23:] / 40, rtol=2e-16)


def test_v3_softmax_scale() -> None:
    """V3's softmax scale (dn 128, r 64, factor 40) is 0.13523378 with mscale_all_dim 1, and plain 192^-0.5 with 0."""
    assert float(rope.yarn({**rope.YARN, **V3}, 64).softmax_factor) * 192**-0.5 == pytest.approx(0.13523378, abs=5e-9)
    assert rope.yarn({**rope.YARN, **V3, "mscale_all_dim": 0.0}, 64).softmax_factor == 1
    assert rope.yarn(rope.YARN, 64).softmax_factor == 1


def test_amplitude() -> None:
    """m(mscale) / m(mscale_all_dim); m(1) where either is 0; 1 while YaRN is inactive, be it by factor 1 or by the native gating."""

    def amplitude(**attrs: Any) -> float:
        return float(call("rope.frequencies", attrs=attrs)["amplitude"])

    log = math.log(40.0)
    ratio = (0.0707 * log + 1) / (0.1 * log + 1)
    assert amplitude(**V3, mscale=0.707, mscale_all_dim=1.0) == pytest.approx(ratio, rel=1e-15)
    for zero in ({"mscale": 0.0}, {"mscale_all_dim": 0.0}):
        assert amplitude(**V3, **zero) == pytest.approx(0.1 * log + 1, rel=1e-15)
    assert amplitude(mscale=0.5) == 1
    assert amplitude(**V3, mscale=0.5, yarn_gating="beyond_original", max_position=4096) == 1
    assert amplitude(**V3, mscale=0.5, yarn_gating="beyond_original", max_position=4097) < 1


def test_equal_betas() -> None:
    """betas 1/1 (Kimi-K2) are legal: low and high are floor and ceiling of one number, the ramp a single step."""
    at = {**rope.YARN, **V3, "beta_fast": 1.0}
    assert rope.ramp_bounds(at, 64) == (22, 23)
    got, plain = call("rope.frequencies", attrs={**V3, "beta_fast": 1.0})["inv_freq"], call("rope.frequencies")["inv_freq"]
    np.testing.assert_array_equal(got[:23], plain[:23])
    np.testing.assert_allclose(got[23:], plain[23:] / 40, rtol=2e-16)


def test_ramp_past_the_last_pair() -> None:
    """high is bounded by r - 1, not by the last index r/2 - 1: at r = 8, L0 = 1e5 the bounds are 2 and 5, so f'_3 is a third of the way."""
    attrs = {**V3, "r": 8, "original_max_position_embeddings": 100_000}
    assert rope.ramp_bounds({**rope.YARN, **attrs}, 8) == (2, 5)
    assert rope.ramp_bounds({**rope.YARN, **attrs, "original_max_position_embeddings": 10**8}, 8) == (5, 7)
    got, plain = call("rope.frequencies", attrs=attrs)["inv_freq"], call("rope.frequencies", attrs={"r": 8})["inv_freq"]
    np.testing.assert_allclose(got, plain * [1, 1, 1, 2 / 3 + 1 / 120], rtol=1e-15)


def test_collapsed_ramp() -> None:
    """Where low == high the ramp is a step: at i = low the frequency is still RoPE's, above it a factor-th of that."""
    attrs = {**V3, "r": 8, "beta_fast": 4096.0, "beta_slow": 700.0}  # corr(beta_slow) is just below 0, whose ceiling is 0
    assert rope.ramp_bounds({**rope.YARN, **attrs}, 8) == (0, 0)
    got, plain = call("rope.frequencies", attrs=attrs)["inv_freq"], call("rope.frequencies", attrs={"r": 8})["inv_freq"]
    np.testing.assert_allclose(got, plain / [1, 40, 40, 40], rtol=2e-16)


@pytest.mark.parametrize(
    "attrs", [{"factor": 0.5}, {"theta": 1.0}, {"beta_fast": 1.0, "beta_slow": 2.0}, {"r": 63}, {"yarn_gating": "never"}]
)
def test_frequency_value_errors(attrs: dict) -> None:
    """factor < 1, theta <= 1, betas out of order, an odd width and an unknown gating are refused."""
    with pytest.raises(ValueError):
        call("rope.frequencies", attrs=attrs)


def test_like_changes_nothing() -> None:
    """`like` says in which dtype another implementation answers: the oracle's answer is the same with it; it has no axes."""
    plain = call("rope.frequencies", attrs=V3)
    for dtype in (np.float32, np.float64):
        got = call("rope.frequencies", attrs=V3, like=np.zeros((), dtype))
        assert all(got[name].tobytes() == plain[name].tobytes() for name in plain)
    with pytest.raises(ValueError, match="like"):
        call("rope.frequencies", like=np.zeros(1))


@pytest.mark.parametrize("attrs", [{}, {**V3, "mscale": 0.707}])
def test_rope_far_out_by_complex_powers(attrs: dict) -> None:
    """At position 163839 y equals, to float64, the pair as a complex number times (e^{i f})^163839, by squarings at 90 digits."""
    r, position = 8, 163839
    x = rng().standard_normal((1, 2, r))
    got = call("rope", x=x, positions=np.array([position]), attrs=attrs)["y"]
    ctx = mpmath.MPContext()
    ctx.dps = 90
    root, at = ctx.nthroot(ctx.mpf(10000), r // 2), {**rope.YARN, **attrs}
    blend = [0, 0, 0.5, 1] if attrs else [0] * 4  # with V3's attributes the ramp goes from 1 to 3
    assert rope.ramp_bounds(at, r) == (1, 3)
    factor, m = ctx.mpf(at["factor"]), [ctx.mpf(at[key]) * ctx.log(at["factor"]) / 10 + 1 for key in ("mscale", "mscale_all_dim")]
    for i in range(r // 2):
        w = ctx.mpf(blend[i])
        f = (w / factor + 1 - w) / root**i
        turn = ctx.expj(f) ** position * (m[0] / m[1])
        for head in range(2):
            z = ctx.mpc(*x[0, head, 2 * i : 2 * i + 2]) * turn
            assert got[0, head, 2 * i] == float(z.real)
            assert got[0, head, 2 * i + 1] == float(z.imag)


@pytest.mark.parametrize("layout_in", rope.LAYOUTS)
@pytest.mark.parametrize("layout_out", rope.LAYOUTS)
def test_layouts_are_permutations(layout_in: str, layout_out: str) -> None:
    """Half layout is the permutation (0, 2, 4, .., 1, 3, 5, ..) of interleaved, on the way in and on the way out; the backward likewise."""
    x, dy = rng().standard_normal((2, 3, 2, 8))
    positions = np.array([0, 1, 5000])
    order = {"interleaved": np.arange(8), "half": np.array([0, 2, 4, 6, 1, 3, 5, 7])}
    into, out, attrs = order[layout_in], order[layout_out], {"layout_in": layout_in, "layout_out": layout_out, **V3}
    plain = call("rope", x=x, positions=positions, attrs=V3)["y"]
    np.testing.assert_array_equal(call("rope", x=x[..., into], positions=positions, attrs=attrs)["y"], plain[..., out])
    back = call("rope", "backward", x=x, positions=positions, dy=dy, attrs=V3)["dx"]
    got = call("rope", "backward", x=x[..., into], positions=positions, dy=dy[..., out], attrs=attrs)["dx"]
    np.testing.assert_array_equal(got, back[..., into])
    np.testing.assert_array_equal(plain[0], x[0])  # position 0 does not turn


def test_rope_backward() -> None:
    """dx equals central differences, and the rotation of dy by the opposite positions (amplitude kept), even where x is NaN."""
    x, dy = rng().standard_normal((2, 2, 3, 6))
    positions, attrs = np.array([3, 163839]), {**V3, "mscale": 0.5, "layout_in": "half"}
    got = call("rope", "backward", x=x * np.nan, positions=positions, dy=dy, attrs=attrs)
    back = {"mscale": 0.5, "layout_out": "half", **V3}
    np.testing.assert_array_equal(got["dx"], call("rope", x=dy, positions=-positions, attrs=back)["y"])
    spectrum = rope.yarn({**rope.YARN, **V3, "mscale": 0.5}, 6)

    def function(point: Arrays) -> list[np.ndarray]:
        rows = [(heads, rope.rotation(p, spectrum)) for heads, p in zip(point["x"], positions.tolist(), strict=True)]
        flat = [u for heads, turn in rows for head in heads for u in rope.rotate(head.tolist(), turn, "half", "interleaved")]
        return [linear.packed(flat, x.shape)]

    check_gradients(function, {"x": x}, [dy], got)


# Attention


def attention_inputs(b: int = 2, s: int = 3, t: int = 5, h: int = 2, dq: int = 12, dv: int = 8) -> Arrays:
    g = rng()
    return {
        "q": g.standard_normal((b, s, h, dq)),
        "k": g.standard_normal((b, t, h, dq)),
        "v": g.standard_normal((b, t, h, dv)),
        "sink": g.standard_normal(h),
    }


def numpy_attention(given: Arrays, scale: float, causal: bool) -> Arrays:
    """Forward and the contract's closed-form backward in float64, no row being empty; do and dlse among `given`."""
    q, k, v = given["q"], given["k"], given["v"]
    z = np.einsum("bshd,bthd->bhst", q, k) * scale
    if causal:
        s, t = z.shape[2:]
        z = np.where(np.arange(t) <= np.arange(s)[:, None] + t - s, z, -np.inf)
    lse = np.log(np.exp(z).sum(-1))
    p = np.exp(z - lse[..., None])
    o = np.einsum("bhst,bthd->bshd", p, v)
    dp = np.einsum("bshd,bthd->bhst", given["do"], v)
    dz = p * (dp - (given["do"] * o).sum(-1).transpose(0, 2, 1)[..., None] + given["dlse"][..., None])
    return {
        "o": o,
        "lse": lse,
        "dq": scale * np.einsum("bhst,bthd->bshd", dz, k),
        "dk": scale * np.einsum("bhst,bshd->bthd", dz, q),
        "dv": np.einsum("bhst,bshd->bthd", p, given["do"]),
    }


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_attention_agrees_with_the_closed_form(causal: bool, scale: float | None) -> None:
    """Forward and backward equal the contract's matrix formulas in numpy's float64, with more keys than queries."""
    given = attention_inputs()
    del given["sink"]
    grads = {"do": rng().standard_normal((2, 3, 2, 8)), "dlse": rng().standard_normal((2, 2, 3))}
    expected = numpy_attention({**given, **grads}, 12**-0.5 if scale is None else scale, causal)
    attrs = {"causal": causal, "scale": scale}
    got = call("attention", attrs=attrs, **given) | call("attention", "backward", attrs=attrs, **given, **grads)
    assert set(got) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-12, atol=1e-14, err_msg=name)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize(("s", "t"), [(2, 3), (3, 2)])
def test_attention_backward_agrees_with_differences(causal: bool, sink: bool, s: int, t: int) -> None:
    """The tape's gradients, the sink's too, equal central differences of the 50-digit forward, with rows that see no key and without."""
    given = attention_inputs(1, s, t, 2, 3, 2)
    if not sink:
        del given["sink"]
    do, dlse = rng().standard_normal((1, s, 2, 2)), rng().standard_normal((1, 2, s))

    def function(point: Arrays) -> list[np.ndarray]:
        return list(attention.attend_all(point["q"], point["k"], point["v"], point.get("sink"), CTX.mpf(0.5), causal, CTX.zero))

    got = call("attention", "backward", attrs={"causal": causal, "scale": 0.5}, **given, do=do, dlse=dlse)
    check_gradients(function, given, [do, dlse], got)


def test_attention_by_hand() -> None:
    """Logits ln 1, ln 2, ln 3: weights 1/6, 1/3, 1/2 and lse = ln 6; causally the first of two queries sees two keys: 1/3, 2/3, ln 3."""
    q, k = np.ones((1, 2, 1, 1)), np.log([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)
    v = np.eye(3).reshape(1, 3, 1, 3)
    got = call("attention", q=q, k=k, v=v)
    np.testing.assert_allclose(got["o"][0, :, 0], [[1 / 3, 2 / 3, 0], [1 / 6, 1 / 3, 1 / 2]], rtol=1e-15)
    np.testing.assert_allclose(got["lse"][0, 0], np.log([3, 6]), rtol=1e-15)


def test_sink() -> None:
    """A sink scales o by exp(lse) / (exp(lse) + exp(sink)) and leaves lse; it equals one more key of that logit and value zero."""
    given = attention_inputs()
    sink = given.pop("sink")
    plain, got = call("attention", **given), call("attention", **given, sink=sink)
    np.testing.assert_array_equal(got["lse"], plain["lse"])
    share = 1 / (1 + np.exp(sink[:, None] - plain["lse"]))
    np.testing.assert_allclose(got["o"], plain["o"] * share.transpose(0, 2, 1)[..., None], rtol=1e-14)
    gone = call("attention", **given, sink=np.full(2, -np.inf))
    np.testing.assert_array_equal(gone["o"], plain["o"])


@pytest.mark.parametrize("empty", ["+inf", "-inf"])
def test_rows_without_keys(empty: str) -> None:
    """s > t: the first s - t rows give o = 0, lse = +-inf and no gradient, whatever do and dlse hold there; t = 0: all rows do."""
    given, attrs = attention_inputs(1, 4, 2), {"empty_lse": empty}
    got = call("attention", attrs=attrs, **given)
    np.testing.assert_array_equal(got["o"][:, :2], 0)
    np.testing.assert_array_equal(got["lse"][:, :, :2], float(empty))
    assert np.isfinite(got["lse"][:, :, 2:]).all()
    do, dlse = rng().standard_normal((1, 4, 2, 8)), rng().standard_normal((1, 2, 4))
    do[:, :2], dlse[:, :, :2] = np.nan, np.nan
    back = call("attention", "backward", attrs=attrs, **given, do=do, dlse=dlse)
    assert all(np.isfinite(g).all() for g in back.values())
    np.testing.assert_array_equal(back["dq"][:, :2], 0)
    none = {**given, "k": given["k"][:, :0], "v": given["v"][:, :0]}
    assert (call("attention", attrs={**attrs, "causal": False}, **none)["lse"] == float(empty)).all()
    back = call("attention", "backward", attrs=attrs, **none, do=do, dlse=dlse)
    assert not any(g.any() for g in back.values())
    assert back["dk"].shape == (1, 0, 2, 12)


def test_empty_rows_refused() -> None:
    """empty_rows="refuse": a causal call with more queries than keys is refused, any other is the same as without."""
    refuse: Any = {"empty_rows": "refuse"}
    with pytest.raises(ValueError, match="none"):
        call("attention", attrs=refuse, **attention_inputs(1, 3, 2))
    with pytest.raises(ValueError, match="empty_rows"):
        call("attention", attrs={"empty_rows": "never"}, **attention_inputs(1, 2, 3))
    for s, t, attrs in ((2, 2, {}), (3, 2, {"causal": False}), (2, 0, {"causal": False})):
        given = attention_inputs(1, s, t)
        got, plain = call("attention", attrs={**attrs, **refuse}, **given), call("attention", attrs=attrs, **given)
        assert all((got[name] == plain[name]).all() for name in plain)


def test_heads_that_do_not_divide() -> None:
    """Three query heads cannot share two key heads evenly."""
    q, k = np.ones((1, 1, 3, 2)), np.ones((1, 1, 2, 2))
    with pytest.raises(ValueError, match="heads"):
        call("attention", q=q, k=k, v=k)


# Packed sequences


def packed_inputs(queries: list[int], keys: list[int], h: int = 4, g: int = 2, width: int = 3, dv: int = 2) -> Arrays:
    gen, n, m = rng(), sum(queries), sum(keys)
    arrays = {"q": gen.standard_normal((n, h, width)), "k": gen.standard_normal((m, g, width)), "v": gen.standard_normal((m, g, dv))}
    return {**arrays, "cu_seqlens_q": np.cumsum([0, *queries]), "cu_seqlens_k": np.cumsum([0, *keys], dtype=np.int32)}


def test_varlen_by_hand() -> None:
    """Keys ln 1 | ln 2, ln 3 and two queries each: the first sequence's first query sees nothing, the second's see ln 2, then both."""
    k = np.log([1.0, 2.0, 3.0]).reshape(3, 1, 1)
    got = call(
        "attention.varlen",
        q=np.ones((4, 1, 1)),
        k=k,
        v=np.array([1.0, 10.0, 100.0]).reshape(3, 1, 1),
        cu_seqlens_q=np.array([0, 2, 4]),
        cu_seqlens_k=np.array([0, 1, 3]),
    )
    np.testing.assert_allclose(got["o"].ravel(), [0, 1, 10, 20 / 5 + 300 / 5], rtol=1e-15)
    np.testing.assert_allclose(got["lse"], [[np.inf, 0, np.log(2), np.log(5)]], rtol=1e-15)


VARLEN_SPLITS = [([2, 0, 1, 3], [3, 2, 0, 2]), ([3], [5]), ([], []), ([0, 0], [0, 0])]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), VARLEN_SPLITS)
def test_varlen_is_attention_of_each(queries: list[int], keys: list[int], causal: bool) -> None:
    """Every sequence's o, lse and gradients are those of `attention` on it alone; some have no queries, too few keys, no keys."""
    given, attrs = packed_inputs(queries, keys), {"scale": 0.6, "causal": causal}
    n = sum(queries)
    grads = {"do": rng().standard_normal((n, 4, 2)), "dlse": rng().standard_normal((4, n))}
    got = call("attention.varlen", attrs=attrs, **given) | call("attention.varlen", "backward", attrs=attrs, **given, **grads)
    assert list(got) == ["o", "lse", "dq", "dk", "dv"]
    assert [got[name].shape for name in got] == [(n, 4, 2), (4, n), (n, 4, 3), (sum(keys), 2, 3), (sum(keys), 2, 2)]
    for i in range(len(queries)):
        rows, columns = (slice(*given[name][i : i + 2]) for name in ("cu_seqlens_q", "cu_seqlens_k"))
        one = {"q": given["q"][None, rows], "k": given["k"][None, columns], "v": given["v"][None, columns]}
        one_grads = {"do": grads["do"][None, rows], "dlse": grads["dlse"][None, :, rows]}
        expected = call("attention", attrs=attrs, **one) | call("attention", "backward", attrs=attrs, **one, **one_grads)
        parts = {name: got[name][rows] for name in ("o", "dq")} | {name: got[name][columns] for name in ("dk", "dv")}
        parts["lse"] = got["lse"][:, rows]
        for name, part in parts.items():
            np.testing.assert_array_equal(part[None], expected[name], err_msg=name)


def test_varlen_scale_and_leaks() -> None:
    """Scale 0 stands for k^-1/2; NaN in one sequence's keys stays in its rows."""
    given = packed_inputs([2, 2], [2, 3])
    plain = call("attention.varlen", **given)
    np.testing.assert_allclose(call("attention.varlen", attrs={"scale": 3**-0.5}, **given)["o"], plain["o"], rtol=1e-14)
    given["k"][:2] = np.nan
    got = call("attention.varlen", **given)
    assert np.isnan(got["o"][:2]).all()
    np.testing.assert_array_equal(got["o"][2:], plain["o"][2:])


BOUNDARIES = [[1, 4], [0, 3], [0, 5], [0, 3, 2, 4], [0, 5, 4], [0, -1, 4], [], [0]]


@pytest.mark.parametrize("cuts", BOUNDARIES)
@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
def test_varlen_boundaries(name: str, cuts: list[int]) -> None:
    """Boundaries that do not start at 0, fall, or end elsewhere than the tokens do, of the queries as of the keys."""
    right = np.linspace(0, 4, max(len(cuts), 1)).astype(int)  # as many, so that the number of sequences is not what is refused
    given = {**packed_inputs([4], [4]), "cu_seqlens_q": right, "cu_seqlens_k": right}
    if len(cuts) > 1:
        call("attention.varlen", **given)
    with pytest.raises(ValueError, match=name if len(cuts) > 1 else "cu_seqlens"):
        call("attention.varlen", **{**given, name: np.array(cuts, int)})


def test_varlen_sequences_are_counted() -> None:
    """Queries of two sequences and keys of one contradict each other."""
    with pytest.raises(ValueError, match="cu_seqlens_k"):
        call("attention.varlen", **{**packed_inputs([2, 2], [2, 3]), "cu_seqlens_k": np.array([0, 5])})


def test_the_future_does_not_leak() -> None:
    """NaN in the last key and value leaves the earlier rows untouched when causal, and logits of 1e6 and -1e6 stay finite."""
    given = attention_inputs()
    plain = call("attention", **given)
    given["k"][:, -1], given["v"][:, -1] = np.nan, np.nan
    got = call("attention", **given)
    np.testing.assert_array_equal(got["o"][:, :-1], plain["o"][:, :-1])
    assert np.isnan(got["o"][:, -1]).all()
    large = call("attention", attrs={"scale": 1e6}, **attention_inputs())
    assert np.isfinite(large["o"]).all()
    assert np.isfinite(large["lse"]).all()


@pytest.mark.parametrize("cuts", [[2], [1, 1, 4], [0, 5]])
def test_merge_of_a_split_equals_the_whole(cuts: list[int]) -> None:
    """Keys split at `cuts` (some parts empty), attended to apart and merged, give attention over all keys."""
    given = attention_inputs()
    del given["sink"]
    parts = []
    for n, (first, last) in enumerate(zip([0, *cuts], [*cuts, 5], strict=True)):
        part = {"q": given["q"], "k": given["k"][:, first:last], "v": given["v"][:, first:last]}
        parts.append(call("attention", attrs={"causal": False, "empty_lse": ("+inf", "-inf")[n % 2]}, **part))
        if first == last:
            parts[-1]["o"][...] = np.nan
    got = call("attention.merge", o_parts=np.stack([p["o"] for p in parts]), lse_parts=np.stack([p["lse"] for p in parts]))
    whole = call("attention", attrs={"causal": False}, **given)
    np.testing.assert_allclose(got["o"], whole["o"], rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(got["lse"], whole["lse"], rtol=1e-14)


def test_merge_of_empty_parts() -> None:
    """Only empty parts: o = 0 and lse = +inf, whatever the signs; one live part among them: that part itself, to the last bit."""
    o_parts = np.full((3, 1, 2, 1, 2), np.nan)
    lse_parts = np.array([np.inf, -np.inf, np.inf]).reshape(3, 1, 1, 1).repeat(2, 3)
    o_parts[1, 0, 1], lse_parts[1, 0, 0, 1] = [1.5, -2.5], 1e6
    got = call("attention.merge", o_parts=o_parts, lse_parts=lse_parts)
    np.testing.assert_array_equal(got["o"][0, :, 0], [[0, 0], [1.5, -2.5]])
    np.testing.assert_array_equal(got["lse"], [[[np.inf, 1e6]]])
    grads = {"do": np.array([[[[np.nan] * 2], [[3.0, 4.0]]]]), "dlse": np.array([[[np.nan, 5.0]]])}
    back = call("attention.merge", "backward", o_parts=o_parts, lse_parts=lse_parts, **grads)
    np.testing.assert_array_equal(back["do_parts"].reshape(3, 4), [[0] * 4, [0, 0, 3, 4], [0] * 4])
    np.testing.assert_array_equal(back["dlse_parts"].reshape(3, 2), [[0, 0], [0, 5], [0, 0]])


def test_merge_backward() -> None:
    """The gradients equal central differences and the contract's closed form, a part that is empty in places getting exact zeros there."""
    o_parts, lse_parts = rng().standard_normal((3, 1, 2, 2, 3)), rng().standard_normal((3, 1, 2, 2))
    do, dlse = rng().standard_normal((1, 2, 2, 3)), rng().standard_normal((1, 2, 2))
    got = call("attention.merge", "backward", o_parts=o_parts, lse_parts=lse_parts, do=do, dlse=dlse)

    def function(point: Arrays) -> list[np.ndarray]:
        return list(attention.merge_all(point["o_parts"], point["lse_parts"], np.zeros(lse_parts.shape, bool)))

    check_gradients(function, {"o_parts": o_parts, "lse_parts": lse_parts}, [do, dlse], got)
    lse_parts[1, 0, 1, 0] = np.inf
    got = call("attention.merge", "backward", o_parts=o_parts, lse_parts=lse_parts, do=do, dlse=dlse)
    live = np.where(np.isinf(lse_parts), -np.inf, lse_parts)
    w = np.exp(live - np.log(np.exp(live).sum(0)))
    inner = (o_parts * do).sum(-1).swapaxes(2, 3)
    expected = w * (inner - (w * inner).sum(0) + dlse)
    np.testing.assert_allclose(got["dlse_parts"], expected, rtol=1e-13, atol=1e-16)
    np.testing.assert_allclose(got["do_parts"], w.swapaxes(2, 3)[..., None] * do, rtol=1e-13)
    assert (got["do_parts"][1, 0, 0, 1] == 0).all()


# MLA


def mla_inputs(lora: bool, b: int = 1, s: int = 4, d: int = 24, q: int = 12, **sizes: int) -> Arrays:
    g = rng()
    h, dn, r, dv, c = ({**SIZES, **sizes}[name] for name in SIZES)
    width = h * (dn + r)
    shapes = {"q_a_proj": (q, d), "q_a_layernorm": (q,), "q_b_proj": (width, q)} if lora else {"q_proj": (width, d)}
    shapes |= {"kv_a_proj_with_mqa": (c + r, d), "kv_a_layernorm": (c,), "kv_b_proj": (h * (dn + dv), c), "o_proj": (d, h * dv)}
    weights = {name: g.standard_normal(shape) * shape[-1] ** -0.5 + (len(shape) == 1) for name, shape in shapes.items()}
    return {"x": g.standard_normal((b, s, d)), **weights, "positions": g.integers(0, 163840, (b, s))}


def mla_cotangents(outputs: Arrays) -> Arrays:
    g = rng()
    return {f"d{name}": g.standard_normal(value.shape) for name, value in outputs.items()}


@pytest.mark.parametrize("how", ["plain", "cached", "packed"])
@pytest.mark.parametrize("lora", [True, False])
def test_mla_backward_agrees_with_differences(lora: bool, how: str) -> None:
    """The gradients to x, caches and weights equal central differences of the 50-digit layer, with YaRN on and two sequences."""
    sizes = {"num_attention_heads": 2, "qk_nope_head_dim": 2, "qk_rope_head_dim": 2, "v_head_dim": 2, "kv_lora_rank": 3}
    attrs = {**sizes, **V3, "mscale": 0.5, "rope_layout_out": "half"}
    inputs = mla_inputs(lora, 1 if how == "packed" else 2, 3, 4, 3, **sizes)
    more: Arrays = {"cu_seqlens": np.array([0, 1, 1, 3])} if how == "packed" else {}
    if how == "cached":
        more = {"c_kv_cache": rng().standard_normal((2, 2, 3)), "k_pe_cache": rng().standard_normal((2, 2, 2))}
    grads = mla_cotangents(call("mla.prefill", attrs=attrs, **inputs, **more))
    got = call("mla.prefill", "backward", attrs=attrs, **inputs, **more, **grads)
    positions, cuts = inputs.pop("positions").tolist(), [(0, 1), (1, 1), (1, 3)] if how == "packed" else None
    if how == "cached":
        inputs |= more
        assert list(got)[:3] == ["dx", "dc_kv_cache", "dk_pe_cache"]

    def function(point: Arrays) -> list[np.ndarray]:
        return list(mla.layer(point, positions, mla.attributes(attrs), cuts))

    check_gradients(function, inputs, list(grads.values()), got)


def numpy_latent_queries(inputs: Arrays, at: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(q over the latent and rope [b,s,h,c+r], W_UV [h,dv,c], the softmax scale), absorbed, in float64."""
    h, dn, r, dv, c = (at[name] for name in SIZES)
    x, (b, s, _) = inputs["x"], inputs["x"].shape
    q = x @ inputs["q_a_proj"].T
    q = q / np.sqrt((q**2).mean(-1, keepdims=True) + at.get("rms_norm_eps", 1e-6)) * inputs["q_a_layernorm"]
    q = (q @ inputs["q_b_proj"].T).reshape(b, s, h, dn + r)
    yarn = {name: at[name] for name in rope.YARN if name in at}
    turned = {"positions": inputs["positions"].ravel(), "attrs": {**yarn, "layout_out": at.get("rope_layout_out", "interleaved")}}
    q_pe = call("rope", x=q[..., dn:].reshape(b * s, h, r), **turned)["y"].reshape(b, s, h, r)
    w = inputs["kv_b_proj"].reshape(h, dn + dv, c)
    m = 0.1 * at.get("mscale_all_dim", 1.0) * math.log(at.get("factor", 1.0)) + 1
    return np.concatenate([np.einsum("bshn,hnc->bshc", q[..., :dn], w[:, :dn]), q_pe], -1), w[:, dn:], np.array((dn + r) ** -0.5 * m * m)


@pytest.mark.parametrize("layout", rope.LAYOUTS)
def test_prefill_equals_absorbed_decoding(layout: str) -> None:
    """W_UK folded into q, mla.decode over a shuffled page cache of prefill's own c_kv and k_pe, W_UV and o_proj after: prefill's y."""
    attrs = {**SIZES, **V3, "mscale": 0.5, "rope_layout_out": layout}
    inputs = mla_inputs(True, 2, 4)
    whole = call("mla.prefill", attrs=attrs, **inputs)
    q, w_uv, scale = numpy_latent_queries(inputs, attrs)
    rows = np.concatenate([whole["c_kv"], whole["k_pe"]], -1)
    cache, table = np.full((6, 3, 20), np.nan), np.array([[4, 1, -1], [0, 3, 99]])
    for n, j in np.ndindex(2, 4):
        cache[table[n, j // 3], j % 3] = rows[n, j]
    last = q[:, 2:]  # the last two queries of four tokens: bottom-right aligned
    decoded = call(
        "mla.decode",
        attrs={"scale": float(scale), "kv_lora_rank": 16},
        q=last,
        kv_cache=cache,
        block_table=table,
        cache_seqlens=np.array([4, 4]),
    )
    heads = np.einsum("bshc,hvc->bshv", decoded["o"], w_uv).reshape(2, 2, -1)
    np.testing.assert_allclose(heads @ inputs["o_proj"].T, whole["y"][:, 2:], rtol=1e-11, atol=1e-13)
    absorbed = call("mla.absorb", attrs=attrs, **inputs)
    assert all((absorbed[name] == whole[name]).all() for name in whole)


def test_latent_and_rope_outputs() -> None:
    """c_kv is the normalised latent; k_pe is rope of the last r columns at each token's own position, in the layout asked for."""
    inputs = mla_inputs(False, 2, 3)
    for layout in rope.LAYOUTS:
        got = call("mla.prefill", attrs={**SIZES, **V3, "mscale": 0.5, "rope_layout_out": layout}, **inputs)
        kv = inputs["x"] @ inputs["kv_a_proj_with_mqa"].T
        latent = kv[..., :16] / np.sqrt((kv[..., :16] ** 2).mean(-1, keepdims=True) + 1e-6) * inputs["kv_a_layernorm"]
        np.testing.assert_allclose(got["c_kv"], latent, rtol=1e-12)
        attrs = {**V3, "mscale": 0.5, "layout_out": layout}
        k_pe = call("rope", x=kv[..., 16:].reshape(6, 1, 4), positions=inputs["positions"].ravel(), attrs=attrs)["y"]
        np.testing.assert_allclose(got["k_pe"], k_pe.reshape(2, 3, 4), rtol=1e-12)


def test_mla_knows_relative_positions_only() -> None:
    """Shifting every position of a sequence, or the rope layout, changes k_pe but not y; an uneven shift changes y."""
    inputs = mla_inputs(True)
    inputs["positions"] = np.arange(4)[None]
    attrs = {**SIZES, **V3}
    plain = call("mla.prefill", attrs=attrs, **inputs)
    shifted = call("mla.prefill", attrs=attrs, **{**inputs, "positions": inputs["positions"] + 160_000})
    np.testing.assert_array_equal(shifted["y"], plain["y"])
    assert (shifted["k_pe"] != plain["k_pe"]).all()
    half = call("mla.prefill", attrs={**attrs, "rope_layout_out": "half"}, **inputs)
    np.testing.assert_array_equal(half["y"], plain["y"])
    np.testing.assert_array_equal(half["k_pe"], plain["k_pe"][..., [0, 2, 1, 3]])
    uneven = call("mla.prefill", attrs=attrs, **{**inputs, "positions": inputs["positions"] * 3})
    assert np.abs(uneven["y"] - plain["y"]).max() > 1e-3


def test_mla_is_causal() -> None:
    """Another last token leaves the earlier rows of every output as they were."""
    inputs = mla_inputs(False)
    plain = call("mla.prefill", attrs=SIZES, **inputs)
    inputs["x"][:, -1] += 1
    got = call("mla.prefill", attrs=SIZES, **inputs)
    for name, value in plain.items():
        np.testing.assert_array_equal(got[name][:, :-1], value[:, :-1])
        assert (got[name][:, -1] != value[:, -1]).all()


@pytest.mark.parametrize("op", ["mla.prefill", "mla.absorb"])
@pytest.mark.parametrize("chunks", [[1, 1, 1, 1, 1], [3, 2], [2, 2, 1]])
def test_chunks_with_caches_are_the_whole(op: str, chunks: list[int]) -> None:
    """Five tokens in chunks, each over the c_kv and k_pe of those before, give the whole's y, c_kv, k_pe up to the caches' rounding."""
    inputs, attrs = mla_inputs(True, 2, 5), {**SIZES, **V3, "mscale": 0.5}
    whole = call(op, attrs=attrs, **inputs)
    caches = {"c_kv_cache": np.zeros((2, 0, 16)), "k_pe_cache": np.zeros((2, 0, 4))}
    first = 0
    for size in chunks:
        part = {name: inputs[name][:, first : first + size] for name in ("x", "positions")}
        got = call(op, attrs=attrs, **{**inputs, **part}, **caches)
        for name, value in whole.items():
            np.testing.assert_allclose(got[name], value[:, first : first + size], rtol=1e-13, atol=1e-14, err_msg=name)
        caches = {f"{name}_cache": np.concatenate([caches[f"{name}_cache"], got[name]], 1) for name in ("c_kv", "k_pe")}
        first += size


def test_caches_are_taken_as_they_are() -> None:
    """A cached k_pe is not rotated nor a cached latent normalised again: with W_UK = 0, q = k_pe's first axis and one cached token,
    the logits are those of the given k_pe, and y the softmax mean of the given latents."""
    sizes: Any = {"num_attention_heads": 1, "qk_nope_head_dim": 0, "qk_rope_head_dim": 2, "v_head_dim": 1, "kv_lora_rank": 1}
    got = call(
        "mla.prefill",
        attrs=sizes,
        x=np.ones((1, 1, 1)),
        q_proj=np.array([[math.sqrt(2) * math.log(3)], [0.0]]),
        kv_a_proj_with_mqa=np.array([[1.0], [0.0], [0.0]]),
        kv_a_layernorm=np.ones(1),
        kv_b_proj=np.ones((1, 1)),
        o_proj=np.ones((1, 1)),
        positions=np.array([[0]]),
        c_kv_cache=np.array([[[5.0]]]),
        k_pe_cache=np.array([[[1.0, 7.0]]]),
    )
    new = 1 / math.sqrt(1 + 1e-6)  # the new token's own latent, at logit 0; the cached one's is ln 3
    assert got["y"].item() == pytest.approx(5 * 3 / 4 + new / 4, rel=1e-14)
    assert got["c_kv"].item() == pytest.approx(new, rel=1e-15)


@pytest.mark.parametrize("op", ["mla.prefill", "mla.absorb"])
def test_packed_sequences_do_not_meet(op: str) -> None:
    """cu_seqlens: every sequence's outputs and dx are those of a call on it alone, and the weights' gradients their sums."""
    inputs, attrs = mla_inputs(True, 1, 5), {**SIZES, **V3}
    cuts = np.array([0, 2, 2, 5], np.int32)
    got = call(op, attrs=attrs, **inputs, cu_seqlens=cuts)
    grads = mla_cotangents(got)
    back = call(op, "backward", attrs=attrs, **inputs, cu_seqlens=cuts, **grads)
    sums = {name: np.zeros_like(value) for name, value in back.items() if name != "dx"}
    for first, last in ((0, 2), (2, 5)):
        part = {**inputs, **{name: inputs[name][:, first:last] for name in ("x", "positions")}}
        alone = call(op, attrs=attrs, **part)
        for name, value in alone.items():
            np.testing.assert_array_equal(got[name][:, first:last], value)
        one = call(op, "backward", attrs=attrs, **part, **{name: g[:, first:last] for name, g in grads.items()})
        np.testing.assert_array_equal(back["dx"][:, first:last], one["dx"])
        for name in sums:
            sums[name] += one[name]
    for name, value in sums.items():
        np.testing.assert_allclose(back[name], value, rtol=1e-12, atol=1e-13, err_msg=name)
    plain = call(op, attrs=attrs, **inputs)
    np.testing.assert_array_equal(call(op, attrs=attrs, **inputs, cu_seqlens=np.array([0, 5]))["y"], plain["y"])
    assert np.abs(got["y"] - plain["y"])[:, 2:].max() > 1e-3


CACHED = {"c_kv_cache": np.zeros((1, 2, 16)), "k_pe_cache": np.zeros((1, 2, 4))}
WRONG_CACHES = {
    "c_kv_cache alone": {"c_kv_cache": CACHED["c_kv_cache"]},
    "k_pe_cache alone": {"k_pe_cache": CACHED["k_pe_cache"]},
    "lengths": {**CACHED, "k_pe_cache": np.zeros((1, 3, 4))},
    "batch": {"c_kv_cache": np.zeros((2, 2, 16)), "k_pe_cache": np.zeros((2, 2, 4))},
    "width": {**CACHED, "c_kv_cache": np.zeros((1, 2, 15))},
    "packed": {**CACHED, "cu_seqlens": np.array([0, 4])},
    **{f"cu_seqlens {cuts}": {"cu_seqlens": np.array(cuts, int)} for cuts in BOUNDARIES},
}


@pytest.mark.parametrize("wrong", WRONG_CACHES)
def test_mla_refuses_wrong_caches(wrong: str) -> None:
    """One cache without the other, caches that do not fit, caches with cu_seqlens, boundaries that are none."""
    inputs = mla_inputs(True)
    call("mla.prefill", attrs=SIZES, **inputs, **CACHED)
    with pytest.raises(ValueError, match=r"cache|cu_seqlens"):
        call("mla.prefill", attrs=SIZES, **inputs, **WRONG_CACHES[wrong])


def test_mla_refuses_packed_batches() -> None:
    """cu_seqlens describes one row."""
    with pytest.raises(ValueError, match="cu_seqlens"):
        call("mla.prefill", attrs=SIZES, **mla_inputs(True, 2, 4), cu_seqlens=np.array([0, 4]))


@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_decode_is_attention_over_the_gathered_cache(causal: bool, sink: bool) -> None:
    """Sequences of 0, 1 and 5 tokens in a cache of NaN: equal to `attention` over the gathered rows, all heads sharing them."""
    g, s, h, c, r = rng(), 2, 3, 4, 2
    q, rows = g.standard_normal((3, s, h, c + r)).astype(np.float32), g.standard_normal((3, 5, c + r)).astype(np.float32)
    cache, lengths = np.full((7, 2, c + r), np.nan, np.float32), np.array([0, 1, 5], np.int32)
    table = np.array([[-1, -1, -1], [6, -1, 77], [5, 0, 2]], np.int32)
    for n, length in enumerate(lengths):
        for j in range(length):
            cache[table[n, j // 2], j % 2] = rows[n, j]
    attrs = {"scale": 0.4, "causal": causal}
    paged = {"kv_cache": cache, "block_table": table, "cache_seqlens": lengths}
    more = {"sink": g.standard_normal(h)} if sink else {}
    paged |= more
    got = call("mla.decode", attrs={**attrs, "kv_lora_rank": c}, q=q, **paged)
    assert got["o"].shape == (3, s, h, c)
    for n, length in enumerate(lengths):
        keys = rows[n : n + 1, :length, None].repeat(h, 2)
        expected = call("attention", attrs=attrs, q=q[n : n + 1], k=keys, v=keys[..., :c], **more)
        np.testing.assert_array_equal(got["o"][n : n + 1], expected["o"])
        np.testing.assert_array_equal(got["lse"][n : n + 1], expected["lse"])
    assert (got["lse"][0] == np.inf).all()
    wrong: list[Arrays] = [{"cache_seqlens": np.array(lengths)} for lengths in ([0, 3, 5], [0, 1, 7], [0, -1, 5])]
    for change in [*wrong, {"block_table": table[:, :2]}, {"sink": np.zeros(h + 1)}, {"kv_cache": cache[..., 1:]}]:
        with pytest.raises(ValueError, match=r"page|slots|sink|kv_cache"):
            call("mla.decode", attrs={**attrs, "kv_lora_rank": c}, q=q, **{**paged, **change})
    with pytest.raises(ValueError, match="channels"):
        call("mla.decode", attrs={**attrs, "kv_lora_rank": c + r + 1}, q=q, **paged)


def test_decode_sink_by_hand() -> None:
    """Two keys at logit 0 and a sink of ln 2 share evenly: o is halved, lse stays ln 2; an empty sequence stays o = 0, lse = +inf."""
    got = call(
        "mla.decode",
        attrs={"kv_lora_rank": 1},
        q=np.zeros((2, 1, 1, 2)),
        kv_cache=np.array([[[3.0, 1.0], [5.0, 1.0]]]),
        block_table=np.array([[0], [0]]),
        cache_seqlens=np.array([2, 0]),
        sink=np.log([2.0]),
    )
    np.testing.assert_allclose(got["o"].ravel(), [2, 0], rtol=1e-15)
    np.testing.assert_allclose(got["lse"].ravel(), [math.log(2), np.inf], rtol=1e-15)


def test_mla_refuses_contradictions() -> None:
    """Both ways to q or neither, a missing size, a weight of another shape: errors, not a silent choice."""
    inputs = mla_inputs(True)
    with pytest.raises(ValueError, match="either"):
        call("mla.prefill", attrs=SIZES, **inputs, q_proj=np.zeros((24, 24)))
    with pytest.raises(ValueError, match="either"):
        call("mla.prefill", attrs=SIZES, **{name: a for name, a in inputs.items() if not name.startswith("q_")})
    with pytest.raises(TypeError, match="kv_lora_rank"):
        call("mla.prefill", attrs={name: n for name, n in SIZES.items() if name != "kv_lora_rank"}, **inputs)
    with pytest.raises(ValueError, match="kv_b_proj"):
        call("mla.prefill", attrs={**SIZES, "v_head_dim": 5}, **inputs)


# The cache's bytes

V32: Any = {"layout": "fp8_v32", "page_size": 1}
V4: Any = {"layout": "fp8_v4", "page_size": 2}


def append(values: list[float], k_pe: list[float], attrs: Any, size: int, slot: int = 0, dtype: type = np.float32) -> bytes:
    """One token put into a page of `size` bytes 0xa5."""
    arrays = {"c_kv": np.array([values], dtype).reshape(1, -1), "k_pe": np.array([k_pe], dtype).reshape(1, -1), "slots": np.array([slot])}
    return call("cache.append", attrs=attrs, kv_cache=np.full((1, size), 0xA5, np.uint8), **arrays)["kv_cache_out"].tobytes()


def read(page: bytes, c: int, r: int, attrs: Any, slot: int = 0) -> tuple[list[float], list[float]]:
    kv_cache = np.frombuffer(page, np.uint8).reshape(1, -1)
    got = call("cache.read", attrs={**attrs, "kv_lora_rank": c, "qk_rope_head_dim": r}, kv_cache=kv_cache, slots=np.array([slot]))
    assert all(array.dtype == np.float32 for array in got.values())
    return got["c_kv"][0].tolist(), got["k_pe"][0].tolist()


def signed(values: list[float]) -> list[tuple[float, float]]:
    return [(v, math.copysign(1.0, v)) for v in values]


def test_bytes_of_a_token() -> None:
    """A token of DeepSeek-V3.2 (512 + 64) takes 656 bytes and one of V4 (448 + 64) 584, whose page of 64 is filled up to 37,440."""
    assert cache.Layout("bf16", 512, 64, 64).page_bytes == 64 * 1152
    assert cache.Layout("fp8_v32", 512, 64, 64).page_bytes == 64 * 656
    assert cache.Layout("fp8_v4", 448, 64, 64).page_bytes == 37440 == -(-64 * 584 // 576) * 576
    assert cache.Layout("fp8_v32", 200, 4, 4).page_bytes == 4 * (200 + 2 * 4 + 8)  # the last tile is ragged
    assert cache.Layout("fp8_v4", 450, 59, 1).page_bytes == 2 * 576  # 577 bytes: the byte after the scales counts


def test_bfloat16_bytes() -> None:
    """1, -2 | 0.5 as 3f80, c000, 3f00, little-endian, in the second place of the page; the rest is left alone."""
    attrs = {"layout": "bf16", "page_size": 2}
    page = append([1.0, -2.0], [0.5], attrs, 12, slot=1)
    assert page.hex(" ") == "a5 a5 a5 a5 a5 a5 80 3f 00 c0 00 3f"
    assert read(page, 2, 1, attrs, slot=1) == ([1.0, -2.0], [0.5])


def test_bfloat16_specials() -> None:
    """NaN is stored as the positive quiet NaN, what exceeds bfloat16 as an infinity, -0 as -0; NaN bytes of any kind are read as NaN."""
    attrs = {"layout": "bf16", "page_size": 1}
    page = append([-math.nan, 3.4e38, -math.inf], [-0.0], attrs, 8)
    assert page.hex(" ") == "c0 7f 80 7f 80 ff 00 80"
    (nan, *rest), k_pe = read(bytes.fromhex("81ff 807f 0100 0080"), 3, 1, attrs)
    assert math.isnan(nan)
    assert rest == [math.inf, 2.0**-133]
    assert signed(k_pe) == [(0.0, -1.0)]


def test_one_rounding_to_bfloat16() -> None:
    """From float64, 1 + 2^-8 + 2^-40 is above the tie and goes up; through float32 it would be the tie and go down, as that itself does."""
    attrs = {"layout": "bf16", "page_size": 1}
    page = append([1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-8], [1 + 3 * 2.0**-8], attrs, 6, dtype=np.float64)
    assert struct.unpack("<3H", page) == (0x3F81, 0x3F80, 0x3F82)


def test_v32_bytes() -> None:
    """amax 448: scale 1, ties to even (17 -> 16, 19 -> 20), -0 kept; a ragged tile of amax 450: scale 2, 225 -> 224; of zeros: 2^-13."""
    first = [448.0, 1.0, -1.0, 0.0, -0.0, 17.0, 19.0, 2.0**-9, 2.0**-10, 3 * 2.0**-10] + [0.0] * 118
    page = append([*first, 450.0, 2.0], [1.0], V32, 130 + 8 + 2)
    assert page[:10].hex(" ") == "7e 38 b8 00 80 58 5a 01 00 02"
    assert page[10:128] == bytes(118)
    assert page[128:].hex(" ") == "76 38 00 00 80 3f 00 00 00 40 80 3f"
    assert append([0.0, -0.0], [0.0], V32, 2 + 4 + 2).hex(" ") == "00 80 00 00 00 39 00 00"


def test_v4_bytes() -> None:
    """Two places of c = 65 and r = 1: 67 bytes of codes and rope each, then 2 scales and an untouched byte each, then filling to 576."""
    page = append([448.0] * 64 + [0.25], [-1.0], V4, 576, slot=1)
    assert page[67:134].hex() == "7e" * 64 + "78" + "80bf"  # 0.25 / 2^-10 = 256
    assert page[137:139] == bytes([127, 127 - 10])
    assert page[:67] + page[134:137] + page[139:] == b"\xa5" * (576 - 69)
    assert read(page, 65, 1, V4, slot=1) == ([448.0] * 64 + [0.25], [-1.0])


def test_scale_comes_after_the_rounding_to_bfloat16() -> None:
    """448.9 is the bfloat16 448, of scale 1; 449.1 is 450, of scale 2. The largest bfloat16 has scale 2^120: no infinity, no NaN."""
    for value, scale, code in ((448.9, 1.0, 0x7E), (449.1, 2.0, 0x76), (3.3895e38, 2.0**120, 0x78)):
        page = append([value], [], V32, 5)
        assert (page[0], struct.unpack("<f", page[1:])[0]) == (code, scale)


def test_append_leaves_the_rest() -> None:
    """Slot -1 is not stored; slots may come in any order; the cache that was given stays as it was."""
    attrs, kv_cache = {"layout": "bf16", "page_size": 2}, np.full((2, 8), 0xA5, np.uint8)
    tokens = {"c_kv": np.array([[1.0], [2.0], [0.5]], np.float32), "k_pe": np.array([[-1.0], [-2.0], [-0.5]])}
    got = call("cache.append", attrs=attrs, kv_cache=kv_cache, **tokens, slots=np.array([3, -1, 0]))["kv_cache_out"]
    assert got.tobytes().hex(" ") == "00 3f 00 bf a5 a5 a5 a5 a5 a5 a5 a5 80 3f 80 bf"
    assert (kv_cache == 0xA5).all()


E4M3FN = [
    (-1) ** (c >> 7) * ((c & 7) / 8 + (c & 0x78 > 0)) * 2.0 ** (max(c >> 3 & 15, 1) - 7) if c & 127 < 127 else math.nan for c in range(256)
]


def test_every_code_at_every_e8m0() -> None:
    """All 256 codes at all 256 scale bytes: code * 2^(byte - 127) rounded to bfloat16's grid, whose step is 2^-133 at the least."""
    size = 256 * (256 + 5)
    kv_cache = np.zeros((1, -(-size // 576) * 576), np.uint8)
    kv_cache[0, : 256 * 256] = np.tile(np.arange(256), 256)
    kv_cache[0, 256 * 256 : size] = np.arange(256).repeat(5)  # four scales and the odd byte
    attrs = {"layout": "fp8_v4", "page_size": 256, "kv_lora_rank": 256, "qk_rope_head_dim": 0}
    got = call("cache.read", attrs=attrs, kv_cache=kv_cache, slots=np.arange(256))["c_kv"]
    scale = np.append(2.0 ** (np.arange(255) - 127), np.nan)
    exact = scale[:, None] * np.array(E4M3FN)
    expected = np.where(np.abs(exact) < 2.0**-126, np.rint(exact * 2.0**133) * 2.0**-133, exact)  # four bits: no other rounding
    expected = np.where(np.abs(exact) >= 2.0**128, np.copysign(np.inf, exact), expected)
    np.testing.assert_array_equal(got, expected)
    negative = np.broadcast_to(np.arange(256) >= 128, got.shape)
    np.testing.assert_array_equal(np.signbit(got)[~np.isnan(got)], negative[~np.isnan(got)])


ANY_SCALE = {  # the scale's bits, code: what is read
    "negative": (0xC0000000, 0x38, -2.0),
    "negative zero": (0x80000000, 0x38, -0.0),
    "zero by negative": (0xBF800000, 0x00, -0.0),
    "infinite": (0x7F800000, 0xB8, -math.inf),
    "zero by infinity": (0x7F800000, 0x00, math.nan),
    "NaN": (0x7F800001, 0x38, math.nan),
    "NaN code": (0x00000000, 0xFF, math.nan),
    "subnormal that vanishes": (0x00000001, 0xFE, -0.0),  # 448 * 2^-149 < 2^-140: below half of 2^-133
    "subnormal that is left": (0x00010000, 0x38, 2.0**-133),
    "subnormal tie": (0x00018000, 0x38, 2.0**-132),
    "overflow in float32": (0x7F000000, 0xFE, -math.inf),
    "overflow in bfloat16": (0x7F7FFFFF, 0x38, math.inf),
    "the largest bfloat16": (0x7F7F7FFF, 0x38, (2.0 - 2.0**-7) * 2.0**127),
    "tie": (0x3F808000, 0x38, 1.0),
}


@pytest.mark.parametrize("name", ANY_SCALE)
def test_any_float32_is_a_scale(name: str) -> None:
    """IEEE arithmetic on whatever the four bytes hold."""
    bits, code, expected = ANY_SCALE[name]
    (got,), _ = read(bytes([code]) + struct.pack("<I", bits), 1, 0, V32)
    assert math.isnan(got) if math.isnan(expected) else signed([got]) == signed([expected])


def test_read_rounds_twice() -> None:
    """9/8 * s just above the tie 257/256 by half a float32 step: float32 goes down to the tie, bfloat16 from there down to 1."""
    m = (257 * 2**19 - 1) // 9 + 1
    assert 9 * m - 257 * 2**19 == 8  # so 9/8 * m 2^-24 = 257/256 + 2^-24
    (got,), _ = read(b"\x39" + struct.pack("<f", m * 2.0**-24), 1, 0, V32)
    assert got == 1.0


@pytest.mark.parametrize("layout", ["bf16", "fp8_v32", "fp8_v4"])
def test_read_append_read(layout: str) -> None:
    """What is read survives storing and reading. A first storing errs by half a step of bfloat16, then of e4m3fn: 1/16 of the value or
    2^-10 of the scale, which is less than twice its lower bound."""
    shape = cache.Layout(layout, 200, 4, 3)
    attrs: Any = {"layout": layout, "page_size": 3}
    sizes = {**attrs, "kv_lora_rank": 200, "qk_rope_head_dim": 4}
    g, slots = rng(), np.array([4, 0, 5, 3])
    tokens = {"c_kv": g.standard_normal((4, 200)) * 10.0 ** g.uniform(-6, 6, (4, 1)), "k_pe": g.standard_normal((4, 4))}
    kv_cache = g.integers(0, 256, (2, shape.page_bytes), np.uint8)
    stored = call("cache.append", attrs=attrs, kv_cache=kv_cache, **tokens, slots=slots)["kv_cache_out"]
    first = call("cache.read", attrs=sizes, kv_cache=stored, slots=slots)
    again = call("cache.append", attrs=attrs, kv_cache=kv_cache, **first, slots=slots)["kv_cache_out"]
    second = call("cache.read", attrs=sizes, kv_cache=again, slots=slots)
    for name, value in tokens.items():
        np.testing.assert_array_equal(second[name], first[name])
        bound = 2.0**-8 * np.abs(value)
        if name == "c_kv" and layout != "bf16":
            largest = np.abs(value) + bound
            scale = 2 * np.maximum(largest.max(1, keepdims=True) / 448, 1e-4)
            bound = bound + np.maximum(largest / 16, scale * 2.0**-10)
        assert (np.abs(first[name] - value) <= bound).all()


APPEND = {"kv_cache": np.zeros((2, 14), np.uint8), "c_kv": np.ones((2, 1)), "k_pe": np.ones((2, 1)), "slots": np.array([3, 0])}
REFUSED_APPENDS = {
    "a signed cache": {"kv_cache": np.zeros((2, 14), np.int8)},
    "a cache of floats": {"kv_cache": np.zeros((2, 14))},
    "page bytes": {"kv_cache": np.zeros((2, 16), np.uint8)},
    "a slot below -1": {"slots": np.array([-2, 0])},
    "a slot past the end": {"slots": np.array([4, 0])},
    "a slot twice": {"slots": np.array([3, 3])},
    "too few slots": {"slots": np.array([3])},
    "tokens": {"k_pe": np.ones((3, 1))},
    "NaN": {"c_kv": np.array([[1.0], [math.nan]])},
    "an infinite rope part": {"k_pe": np.array([[-math.inf], [1.0]])},
    "a value beyond bfloat16": {"c_kv": np.array([[3.4e38], [1.0]])},
}


@pytest.mark.parametrize("wrong", REFUSED_APPENDS)
def test_append_refuses(wrong: str) -> None:
    """The contract's ValueErrors, each beside a call that is right; -1 twice is right, and NaN is in bfloat16."""
    attrs = {"layout": "fp8_v32", "page_size": 2}
    call("cache.append", attrs=attrs, **APPEND)
    call("cache.append", attrs=attrs, **{**APPEND, "slots": np.array([-1, -1])})
    plain = {**APPEND, "kv_cache": np.zeros((2, 8), np.uint8), "c_kv": np.full((2, 1), np.nan)}
    call("cache.append", attrs={"layout": "bf16", "page_size": 2}, **plain)
    with pytest.raises(ValueError):
        call("cache.append", attrs=attrs, **{**APPEND, **REFUSED_APPENDS[wrong]})


@pytest.mark.parametrize("op", ["cache.append", "cache.read"])
def test_cache_attributes(op: str) -> None:
    """A page of no tokens and a layout that nobody knows are refused."""
    given, sizes = APPEND, {}
    if op == "cache.read":
        given, sizes = {name: APPEND[name] for name in ("kv_cache", "slots")}, {"kv_lora_rank": 1, "qk_rope_head_dim": 1}
    right = {**sizes, "layout": "fp8_v32", "page_size": 2}
    call(op, attrs=right, **given)
    for wrong in ({"page_size": 0}, {"page_size": -1}, {"layout": "fp8"}):
        with pytest.raises(ValueError, match=r"page_size|layout"):
            call(op, attrs={**right, **wrong}, **given)


def test_read_refuses() -> None:
    """Slot -1 holds nothing to read, no more than one past the end; a slot may be read twice."""
    attrs = {"layout": "fp8_v32", "page_size": 2, "kv_lora_rank": 1, "qk_rope_head_dim": 1}
    kv_cache = APPEND["kv_cache"]
    assert call("cache.read", attrs=attrs, kv_cache=kv_cache, slots=np.array([3, 3]))["c_kv"].shape == (2, 1)
    assert call("cache.read", attrs=attrs, kv_cache=kv_cache, slots=np.array([], int))["k_pe"].shape == (0, 1)
    for slots in ([-1], [4], [[0]]):
        with pytest.raises(ValueError, match="slots"):
            call("cache.read", attrs=attrs, kv_cache=kv_cache, slots=np.array(slots))
    with pytest.raises(ValueError, match="channels"):  # although the bytes add up: -1 + 2 * 4 = 7
        call("cache.read", attrs={**attrs, "kv_lora_rank": -1, "qk_rope_head_dim": 4}, kv_cache=kv_cache, slots=np.array([0]))
    for wrong in (kv_cache[:, :13], kv_cache.astype(np.int8), kv_cache[0]):
        with pytest.raises(ValueError, match="kv_cache"):
            call("cache.read", attrs=attrs, kv_cache=wrong, slots=np.array([0]))


def fp8_inputs(layout: str) -> tuple[Arrays, dict, list[np.ndarray]]:
    """(inputs of mla.decode_fp8 on random bytes with tokens where the table says, its attributes, every sequence's slots)."""
    g, c, r = rng(), 70, 4
    lengths, table = np.array([5, 0, 2]), np.array([[4, 0, -1], [77, 0, 0], [2, -1, -1]])
    slots = [np.array([table[n, j // 3] * 3 + j % 3 for j in range(t)], int) for n, t in enumerate(lengths)]
    flat = np.concatenate(slots)
    tokens = {"c_kv": g.standard_normal((len(flat), c)), "k_pe": g.standard_normal((len(flat), r))}
    kv_cache = g.integers(0, 256, (5, cache.Layout(layout, c, r, 3).page_bytes), np.uint8)
    kv_cache[1] = 0xFF  # NaN, whatever it is read as
    attrs = {"layout": layout, "page_size": 3}
    kv_cache = call("cache.append", attrs=attrs, kv_cache=kv_cache, **tokens, slots=flat)["kv_cache_out"]
    inputs = {"q": g.standard_normal((3, 2, 3, c + r)), "kv_cache": kv_cache, "block_table": table, "cache_seqlens": lengths}
    return inputs, {**attrs, "qk_rope_head_dim": r, "head_dim_v": c}, slots


@pytest.mark.parametrize("layout", ["bf16", "fp8_v32", "fp8_v4"])
@pytest.mark.parametrize(("width", "more"), [(70, {}), (74, {"causal": False, "scale": 0.3}), (3, {"sink": True})])
def test_decode_fp8_is_attention_over_what_is_read(layout: str, width: int, more: dict) -> None:
    """Equal to `attention` over the tokens as cache.read gives them: [c_kv | k_pe] the keys, their first channels the values."""
    inputs, attrs, slots = fp8_inputs(layout)
    more = dict(more)
    sink = {"sink": rng().standard_normal(3)} if more.pop("sink", False) else {}
    got = call("mla.decode_fp8", attrs={**attrs, "head_dim_v": width, **more}, **inputs, **sink)
    sizes = {"layout": layout, "page_size": 3, "kv_lora_rank": 70, "qk_rope_head_dim": 4}
    for n, where in enumerate(slots):
        rows = call("cache.read", attrs=sizes, kv_cache=inputs["kv_cache"], slots=where)
        keys = np.concatenate([rows["c_kv"], rows["k_pe"]], 1)[None, :, None]
        expected = call("attention", attrs=more, q=inputs["q"][n : n + 1], k=keys, v=keys[..., :width], **sink)
        np.testing.assert_array_equal(got["o"][n : n + 1], expected["o"])
        np.testing.assert_array_equal(got["lse"][n : n + 1], expected["lse"])
    assert np.isfinite(got["o"]).all()
    assert (got["lse"][1] == np.inf).all()


REFUSED_DECODES: dict[str, tuple[Arrays, dict]] = {
    "page bytes": ({"kv_cache": np.zeros((5, 10), np.uint8)}, {}),
    "floats": ({"kv_cache": np.zeros((5, 3 * (70 + 4 + 8)))}, {}),
    "page_size": ({}, {"page_size": 0}),
    "layout": ({}, {"layout": "v32"}),
    "too long": ({"cache_seqlens": np.array([5, 0, 10])}, {}),
    "negative": ({"cache_seqlens": np.array([5, -1, 2])}, {}),
    "a page that is not there": ({"cache_seqlens": np.array([5, 1, 2])}, {}),
    "no page": ({"cache_seqlens": np.array([7, 0, 2])}, {}),
    "values wider than keys": ({}, {"head_dim_v": 75}),
    "rope wider than keys": ({}, {"qk_rope_head_dim": 76}),
    "sink": ({"sink": np.zeros(2)}, {}),
}


@pytest.mark.parametrize("wrong", REFUSED_DECODES)
def test_decode_fp8_refuses(wrong: str) -> None:
    """A cache, table, length or attribute that contradicts the others."""
    inputs, attrs, _ = fp8_inputs("fp8_v32")
    arrays, changed = REFUSED_DECODES[wrong]
    with pytest.raises(ValueError):
        call("mla.decode_fp8", attrs={**attrs, **changed}, **{**inputs, **arrays})


# The tape's dot node, and planted errors


def test_dot_is_exact() -> None:
    """Cancellation over the whole of float64's range leaves the small term: 1e300 * 1e300 + 1e-300 * 1e-300 - 1e300 * 1e300."""
    xs, ys = mpfs([1e300, 1e-300, -1e300]), mpfs([1e300, 1e-300, 1e300])
    assert linear.dot(xs, ys) == xs[1] * ys[1] > 0


def test_planted_gradient_errors_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the derivative of log, exp or one operand of dot off by 1e-9, the comparison with differences fails."""
    right = {"log": attention.log, "exp": attention.exp, "dot": attention.dot}
    for name, function in right.items():

        def wrong(*args: Any, function: Callable = function) -> Any:
            node = function(*args)
            if hasattr(node, "parents"):
                (parent, partial), *rest = node.parents
                node.parents = ((parent, partial * (1 + CTX.mpf("1e-9"))), *rest)
            return node

        test_attention_backward_agrees_with_differences(True, True, 2, 3)
        with monkeypatch.context() as patch:
            patch.setattr(attention, name, wrong)
            with pytest.raises(AssertionError):
                test_attention_backward_agrees_with_differences(True, True, 2, 3)
