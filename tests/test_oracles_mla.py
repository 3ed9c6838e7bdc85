"""The MLA oracles' own tests: against hand-worked numbers, other routes to the same function and differences, never against `ref`."""

import math
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
from oracles import ORACLES, attention, linear, mla, rope
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


@pytest.mark.parametrize("lora", [True, False])
def test_mla_backward_agrees_with_differences(lora: bool) -> None:
    """The gradients to x and to every weight equal central differences of the 50-digit layer, with YaRN on and two sequences."""
    sizes = {"num_attention_heads": 2, "qk_nope_head_dim": 2, "qk_rope_head_dim": 2, "v_head_dim": 2, "kv_lora_rank": 3}
    attrs = {**sizes, **V3, "mscale": 0.5, "rope_layout_out": "half"}
    inputs = mla_inputs(lora, 2, 3, 4, 3, **sizes)
    grads = mla_cotangents(call("mla.prefill", attrs=attrs, **inputs))
    got = call("mla.prefill", "backward", attrs=attrs, **inputs, **grads)
    positions = inputs.pop("positions").tolist()

    def function(point: Arrays) -> list[np.ndarray]:
        return list(mla.layer(point, positions, mla.attributes(attrs)))

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


@pytest.mark.parametrize("causal", [True, False])
def test_decode_is_attention_over_the_gathered_cache(causal: bool) -> None:
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
    got = call("mla.decode", attrs={**attrs, "kv_lora_rank": c}, q=q, **paged)
    assert got["o"].shape == (3, s, h, c)
    for n, length in enumerate(lengths):
        keys = rows[n : n + 1, :length, None].repeat(h, 2)
        expected = call("attention", attrs=attrs, q=q[n : n + 1], k=keys, v=keys[..., :c])
        np.testing.assert_array_equal(got["o"][n : n + 1], expected["o"])
        np.testing.assert_array_equal(got["lse"][n : n + 1], expected["lse"])
    assert (got["lse"][0] == np.inf).all()
    with pytest.raises(ValueError, match="page"):
        call("mla.decode", attrs={**attrs, "kv_lora_rank": c}, q=q, **{**paged, "cache_seqlens": np.array([0, 3, 5])})


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
