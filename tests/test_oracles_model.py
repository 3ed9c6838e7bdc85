"""The oracles of loss, block, MTP and model: hand-worked numbers, parts put together, invariants, differences, refusals; never `ref`."""

import math
from typing import Any

import numpy as np
import pytest
from oracles import ORACLES, block, model, mtp

Arrays = dict[str, np.ndarray]
SIZES = {"num_attention_heads": 2, "qk_nope_head_dim": 2, "qk_rope_head_dim": 2, "v_head_dim": 3, "kv_lora_rank": 4}
ROUTED = {"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
D, V = 6, 7
ATTENTION = {"q_a_proj": (5, D), "q_a_layernorm": (5,), "q_b_proj": (8, 5), "kv_a_proj_with_mqa": (6, D), "kv_a_layernorm": (4,)}
ATTENTION |= {"kv_b_proj": (10, 4), "o_proj": (D, 6)}
NORMS = {"input_layernorm": (D,), "post_attention_layernorm": (D,)}
DENSE = {"gate_proj": (5, D), "up_proj": (5, D), "down_proj": (D, 5)}
MOE = {"gate_weight": (4, D), "e_score_correction_bias": (4,), "w_gate": (4, 3, D), "w_up": (4, 3, D), "w_down": (4, D, 3)}
MOE |= {"shared_gate": (2, D), "shared_up": (2, D), "shared_down": (D, 2)}
MODULE = {"enorm": (D,), "hnorm": (D,), "eh_proj": (D, 2 * D), "shared_head_norm": (D,)}
SHARED = {"embed_tokens": (V, D), "shared_head": (V, D)}
KINDS = {"dense": DENSE, "moe": MOE}


def call(op: str, direction: str = "forward", /, attrs: Any = None, **inputs: np.ndarray) -> Arrays:
    return ORACLES[op, direction](inputs, attrs or {})


def rng(seed: int = 20250104) -> np.random.Generator:
    return np.random.default_rng(seed)


def array(values: Any) -> np.ndarray:
    return np.array(values, np.float64)


def weights(shapes: dict[str, tuple[int, ...]], *stack: int, seed: int = 0) -> Arrays:
    """Normal ones; those of norms lie about 1, matrices keep the size of what they multiply."""
    g = rng(seed)
    found = {name: g.standard_normal((*stack, *shape)) * shape[-1] ** -0.5 for name, shape in shapes.items()}
    return {name: 1 + x / 2 if name.endswith("norm") else x for name, x in found.items()}


def attributes(kind: str, **more: Any) -> dict[str, Any]:
    return {**SIZES, **(ROUTED if kind == "moe" else {"num_experts_per_tok": 0}), **more}


def places(b: int, s: int) -> np.ndarray:
    return np.tile(np.arange(s), (b, 1))


def one_block(kind: str, b: int = 2, s: int = 3) -> Arrays:
    x = rng(1).standard_normal((b, s, D))
    return {"x": x, "positions": places(b, s), **weights(NORMS | ATTENTION | KINDS[kind])}


def check_backward(op: str, inputs: Arrays, attrs: Any) -> Arrays:
    """Every d<input> against differences of the forward along a random direction; topk_idx, where there is one, must not turn over.

    Two central differences of steps h and h/2 make an error of h^4 f'''''/120 and of 2^-53 f/h: 1e-12 for h = 2^-12, times what f is.
    """
    plain = call(op, attrs=attrs, **inputs)
    cotangents = {f"d{name}": rng(len(name)).standard_normal(y.shape) for name, y in plain.items() if y.dtype.kind == "f"}
    held = {"topk_idx": plain["topk_idx"]} if "topk_idx" in plain else {}
    got = call(op, "backward", attrs=attrs, **inputs, **held, **cotangents)
    assert set(got) == {f"d{name}" for name, x in inputs.items() if x.dtype.kind == "f" and name != "e_score_correction_bias"}
    for name, gradient in got.items():
        x = inputs[name[1:]]
        assert (gradient.shape, gradient.dtype) == (x.shape, np.float64)
        direction = rng(x.size).standard_normal(x.shape)

        def loss(step: float, name: str = name[1:], x: np.ndarray = x, direction: np.ndarray = direction) -> float:
            moved = call(op, attrs=attrs, **{**inputs, name: x + step * direction})
            for choice in held:
                np.testing.assert_array_equal(moved[choice], plain[choice])  # else it is no derivative
            return math.fsum(math.fsum((moved[d[1:]] * w).ravel()) for d, w in cotangents.items())

        slopes = [(loss(h) - loss(-h)) / (2 * h) for h in (2.0**-12, 2.0**-13)]
        assert math.fsum((gradient * direction).ravel()) == pytest.approx((4 * slopes[1] - slopes[0]) / 3, rel=1e-8, abs=1e-8), name
    return got


# Cross entropy


def test_cross_entropy_of_two_logits() -> None:
    """p = 3/4, 1/4: the loss is ln 4/3 and ln 4, and the gradient p - 1 at the label, p elsewhere, over how many rows count."""
    logits = array([[math.log(3), 0], [math.log(3), 0]])
    assert call("cross_entropy", logits=logits[:1], labels=np.array([0]))["loss"] == pytest.approx(math.log(4 / 3), rel=1e-15)
    labels = np.array([0, 1])
    assert call("cross_entropy", logits=logits, labels=labels)["loss"] == pytest.approx(math.log(16 / 3) / 2, rel=1e-15)
    got = call("cross_entropy", "backward", logits=logits, labels=labels, dloss=array(2.0))["dlogits"]
    np.testing.assert_allclose(got, [[-0.25, 0.25], [0.75, -0.75]], rtol=1e-15)


def test_cross_entropy_far_from_zero() -> None:
    """exp(1e4) has no float64, its logarithm has; a loss far below the spacing of 1 keeps its digits."""
    logits = array([[1e4, -1e4, 0]])
    for label, loss in ((0, 0.0), (1, 2e4), (2, 1e4)):
        got = call("cross_entropy", logits=logits, labels=np.array([label]))["loss"]
        assert got.shape == ()
        assert got == loss
    assert call("cross_entropy", logits=array([[700.0, 0]]), labels=np.array([0]))["loss"] == pytest.approx(math.exp(-700), rel=1e-15)
    got = call("cross_entropy", "backward", logits=logits, labels=np.array([1]), dloss=array(1.0))["dlogits"]
    assert got.tolist() == [[1, -1, 0]]
    assert call("cross_entropy", logits=array([[5.0]]), labels=np.array([0]))["loss"] == 0  # of one, certain


def test_cross_entropy_of_what_counts() -> None:
    """Of four rows of ln 2 two are ignored: ln 2 over those that count, half of it over all rows."""
    inputs = {"logits": np.zeros((4, 2)), "labels": np.array([1, -100, 0, -100])}
    assert call("cross_entropy", **inputs)["loss"] == math.log(2)
    assert call("cross_entropy", attrs={"denominator": "rows"}, **inputs)["loss"] == math.log(2) / 2
    got = call("cross_entropy", "backward", attrs={"denominator": "rows"}, **inputs, dloss=array(8.0))["dlogits"]
    assert got.tolist() == [[1, -1], [0, 0], [-1, 1], [0, 0]]
    others = {**inputs, "labels": np.array([1, 0, 0, 0])}  # a class may be what is ignored
    assert call("cross_entropy", attrs={"ignore_index": 0, "denominator": "rows"}, **others)["loss"] == math.log(2) / 4


@pytest.mark.parametrize("n", [0, 3])
def test_cross_entropy_of_nothing(n: int) -> None:
    """0/0 is NaN unless asked for 0; over all rows it is 0. The gradient is 0 in each."""
    inputs = {"logits": np.ones((n, 2)), "labels": np.full(n, -100)}
    assert math.isnan(call("cross_entropy", **inputs)["loss"])
    for attrs in ({"empty": "zero"}, {"denominator": "rows"}):
        assert call("cross_entropy", attrs=attrs, **inputs)["loss"] == 0
    for attrs in ({}, {"empty": "zero"}, {"denominator": "rows"}):
        assert call("cross_entropy", "backward", attrs=attrs, **inputs, dloss=array(1.0))["dlogits"].tolist() == [[0, 0]] * n


@pytest.mark.parametrize("attrs", [{}, {"denominator": "rows"}])
def test_cross_entropy_properties(attrs: dict) -> None:
    """Differences; a shift of the logits changes nothing; a row's gradients sum to 0."""
    logits = rng().integers(-64, 64, (4, 5)) / 16
    inputs = {"logits": logits, "labels": np.array([0, 4, -100, 2])}
    got = check_backward("cross_entropy", inputs, attrs)["dlogits"]
    np.testing.assert_allclose(got.sum(1), 0, atol=1e-16)
    assert not got[2].any()
    moved = call("cross_entropy", attrs=attrs, **{**inputs, "logits": logits + 700})
    assert moved["loss"] == call("cross_entropy", attrs=attrs, **inputs)["loss"]


def test_cross_entropy_refuses() -> None:
    for bad in (-1, 2, -99):
        with pytest.raises(ValueError, match=rf"labels\[1\] is {bad}"):
            call("cross_entropy", logits=np.zeros((2, 2)), labels=np.array([0, bad]))
    for attrs in ({"denominator": "mean"}, {"empty": "one"}):
        with pytest.raises(ValueError, match="must be one of"):
            call("cross_entropy", attrs=attrs, logits=np.zeros((1, 2)), labels=np.array([0]))
    with pytest.raises(ValueError, match="labels has shape"):
        call("cross_entropy", logits=np.zeros((1, 2)), labels=np.array([0, 1]))


# Embedding


def test_embedding() -> None:
    """Rows by id; the gradient of a row is the sum over its ids, exact before it is rounded; of an id that is not there exactly 0."""
    weight, ids = array([[1, 2], [3, 4], [5, 6]]), np.array([2, 0, 2, 2])
    assert call("embedding", ids=ids, weight=weight)["x"].tolist() == [[5, 6], [1, 2], [5, 6], [5, 6]]
    dx = array([[1e16, 1], [7, 8], [1, 2], [-1e16, 4]])
    assert call("embedding", "backward", ids=ids, weight=weight, dx=dx)["dweight"].tolist() == [[7, 8], [0, 0], [1, 7]]
    for bad in (-1, 3):
        with pytest.raises(ValueError, match=rf"ids\[1\] is {bad}"):
            call("embedding", ids=np.array([0, bad]), weight=weight)


# Block


SCALAR = {"num_attention_heads": 1, "qk_nope_head_dim": 1, "qk_rope_head_dim": 2, "v_head_dim": 1, "kv_lora_rank": 1, "rms_norm_eps": 0.0}


def test_block_by_hand() -> None:
    """One token of width 1: norms give the sign times the weight, a lone key is seen whole, silu(ln 3) = 3/4 ln 3."""
    one = {"x": array([[[3]]]), "positions": np.array([[5]]), "input_layernorm": array([-2]), "post_attention_layernorm": array([0.5])}
    one |= {"q_proj": array([[1], [1], [1]]), "kv_a_proj_with_mqa": array([[5], [1], [1]]), "kv_a_layernorm": array([7])}
    one |= {"kv_b_proj": array([[1], [0.5]]), "o_proj": array([[2]])}
    u = 3 + 2 * 0.5 * -7  # rmsnorm(x) = -2, the latent -10, c_kv = -7
    assert u < 0
    dense = {"gate_proj": array([[-2 * math.log(3)]]), "up_proj": array([[4]]), "down_proj": array([[10]])}
    expected = u + 10 * 0.75 * math.log(3) * -2
    got = call("block", attrs={**SCALAR, "num_experts_per_tok": 0}, **one, **dense)
    np.testing.assert_allclose(got["y"], [[[expected]]], rtol=1e-14)
    assert got["topk_idx"].shape == (1, 1, 0)
    cut = call("block", attrs={**SCALAR, "num_experts_per_tok": 0, "limit": 1.0}, **one, **dense)["y"]
    np.testing.assert_allclose(cut, [[[u + 10 / (1 + math.exp(-1)) * -1]]], rtol=1e-14)
    experts = {"gate_weight": array([[0], [2]]), "w_gate": array([[[0]], [[-2 * math.log(3)]]]), "w_up": array([[[0]], [[4]]])}
    experts |= {"w_down": array([[[0]], [[10]]]), "shared_gate": dense["gate_proj"], "shared_up": dense["up_proj"]}
    moe = {**SCALAR, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "norm_topk_prob": False}
    got = call("block", attrs=moe, **one, **experts, shared_down=array([[1]]))
    share = 2.5 / (1 + math.exp(1))  # the gate reads rmsnorm(u) = -1/2
    np.testing.assert_allclose(got["y"], [[[u + 0.75 * math.log(3) * -2 * (1 + 10 * share)]]], rtol=1e-14)
    assert got["topk_idx"].tolist() == [[[0, 1]]]  # sigmoid(0) before sigmoid(-1)


def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return call("rmsnorm", x=x.reshape(-1, D), weight=weight)["y"].reshape(x.shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["plain", "cached", "packed"])
def test_block_is_its_parts(kind: str, how: str) -> None:
    """x + attention of the norm, plus the FFN of that sum's norm, each by its own oracle, with two residuals."""
    inputs = one_block(kind, *((1, 5) if how == "packed" else (2, 3)))
    more = {"packed": {"cu_seqlens": np.array([0, 2, 2, 5])}, "plain": {}}
    more["cached"] = {"c_kv_cache": rng(2).standard_normal((2, 3, 4)), "k_pe_cache": rng(3).standard_normal((2, 3, 2))}
    inputs |= more[how]
    got = call("block", attrs=attributes(kind), **inputs)
    own = {name: inputs[name] for name in (*ATTENTION, "positions", *more[how])}
    u = inputs["x"] + call("mla.prefill", attrs=SIZES, x=norm(inputs["x"], inputs["input_layernorm"]), **own)["y"]
    inner = norm(u, inputs["post_attention_layernorm"]).reshape(-1, D)
    if kind == "moe":
        found = call("moe.layer", attrs=ROUTED, x=inner, **{name: inputs[name] for name in MOE})
        np.testing.assert_array_equal(got["topk_idx"].reshape(-1, 2), found["topk_idx"])
        fed = found["y"]
    else:
        gate, up = inner @ inputs["gate_proj"].T, inner @ inputs["up_proj"].T
        fed = (gate / (1 + np.exp(-gate)) * up) @ inputs["down_proj"].T
    np.testing.assert_allclose(got["y"], u + fed.reshape(u.shape), rtol=0, atol=1e-13)
    absorbed = call("block", attrs=attributes(kind, absorbed=True), **inputs)
    np.testing.assert_array_equal(absorbed["y"], got["y"])


def test_block_norms_of_latents() -> None:
    """latent_norm_eps is that of the norms inside attention alone; by default all have one."""
    inputs = one_block("dense")
    own = {name: inputs[name] for name in (*ATTENTION, "positions")}
    wide, narrow = {"rms_norm_eps": 0.25}, {"rms_norm_eps": 0.0625}
    normed = call("rmsnorm", attrs={"eps": 0.25}, x=inputs["x"].reshape(-1, D), weight=inputs["input_layernorm"])["y"].reshape(2, 3, D)
    off = {**inputs, "down_proj": np.zeros((D, 5))}
    for attrs, inner in (({**wide, "latent_norm_eps": 0.0625}, narrow), (wide, wide)):
        u = inputs["x"] + call("mla.prefill", attrs={**SIZES, **inner}, x=normed, **own)["y"]
        np.testing.assert_allclose(call("block", attrs=attributes("dense", **attrs), **off)["y"], u, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_block_backward(kind: str) -> None:
    """Differences, of x, caches and every weight."""
    inputs = one_block(kind, 1, 2) | {"c_kv_cache": rng(2).standard_normal((1, 2, 4)), "k_pe_cache": rng(3).standard_normal((1, 2, 2))}
    assert (block.margin(inputs, attributes(kind)) > 2.0**-6).all()
    check_backward("block", inputs, attributes(kind, limit=2.0))


def test_block_backward_of_packed_sequences() -> None:
    inputs = one_block("dense", 1, 3) | {"cu_seqlens": np.array([0, 1, 3])}
    del inputs["q_a_proj"], inputs["q_a_layernorm"], inputs["q_b_proj"]
    check_backward("block", inputs | {"q_proj": rng(4).standard_normal((8, D)) / 2}, attributes("dense"))


def test_block_margin() -> None:
    """Half the margin, added to the best losing expert's bias, leaves the choice; twice the margin turns it."""
    inputs, attrs = one_block("moe", 1, 2), attributes("moe", n_group=1)
    inputs["e_score_correction_bias"] = np.zeros(4)
    margin, topk_idx = block.margin(inputs, attrs), call("block", attrs=attrs, **inputs)["topk_idx"]
    assert margin.shape == (1, 2)
    for i in range(2):
        assert margin[0, i] > 0
        turned = []
        for factor in (0.5, 2.0):
            for e in range(4):
                bias = np.where(np.arange(4) == e, factor * margin[0, i], 0)
                moved = call("block", attrs=attrs, **{**inputs, "e_score_correction_bias": bias})["topk_idx"]
                turned.append(bool((moved[0, i] != topk_idx[0, i]).any()))
        assert not any(turned[:4])
        assert any(turned[4:])
    assert np.isinf(block.margin(one_block("dense"), attributes("dense"))).all()


def test_block_refuses() -> None:
    inputs = one_block("dense")
    for change, attrs, message in (
        ({"w_gate": np.zeros((4, 3, D))}, {}, "either"),
        ({"up_proj": None}, {}, "either"),
        ({"down_proj": np.zeros((5, D))}, {}, "down_proj has shape"),
        ({"input_layernorm": np.zeros(D + 1)}, {}, "input_layernorm has shape"),
        ({"positions": places(2, 4)}, {}, "positions has shape"),
        ({"cu_seqlens": np.array([0, 3])}, {}, "cu_seqlens with b = 2"),
        ({}, {"num_experts_per_tok": 1}, "num_experts_per_tok 1"),
        ({}, {"limit": 0.0}, "limit"),
    ):
        given = {name: x for name, x in {**inputs, **change}.items() if x is not None}
        with pytest.raises(ValueError, match=message):
            call("block", attrs={**attributes("dense"), **attrs}, **given)


# One MTP module


def one_module(kind: str, b: int = 2, s: int = 3, depth: int = 1) -> Arrays:
    ids = rng(5).integers(0, V, (b, s + depth))
    h, own = rng(6).standard_normal((b, s, D)), weights(MODULE | NORMS | ATTENTION | KINDS[kind] | SHARED, seed=3)
    return {"h": h, "ids": ids, "positions": places(b, s), **own}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [1, 2])
def test_mtp_is_its_parts(kind: str, depth: int) -> None:
    """Row i reads ids[i + depth]; both norms, the projection, the block, the head's norm and the head, each by itself."""
    inputs = one_module(kind, depth=depth)
    got = call("mtp", attrs=attributes(kind, depth=depth), **inputs)
    embedded, hidden = norm(inputs["embed_tokens"][inputs["ids"][:, depth:]], inputs["enorm"]), norm(inputs["h"], inputs["hnorm"])
    x = np.concatenate([embedded, hidden], -1) @ inputs["eh_proj"].T
    own = {name: inputs[name] for name in (*NORMS, *ATTENTION, *KINDS[kind], "positions")}
    found = call("block", attrs=attributes(kind), x=x, **own)
    last = norm(found["y"], inputs["shared_head_norm"])
    np.testing.assert_allclose(got["logits"], last @ inputs["shared_head"].T, rtol=0, atol=1e-13)
    np.testing.assert_allclose(got["h_next"], last, rtol=0, atol=1e-13)
    np.testing.assert_array_equal(got["topk_idx"], found["topk_idx"])
    before = call("mtp", attrs=attributes(kind, depth=depth, chain="pre_norm"), **inputs)
    np.testing.assert_array_equal(before["logits"], got["logits"])
    np.testing.assert_allclose(before["h_next"], found["y"], rtol=0, atol=1e-13)


def test_mtp_concat_orders() -> None:
    """The two orders are one another with eh_proj's column halves swapped, and differ without that."""
    inputs = one_module("dense")
    got = call("mtp", attrs=attributes("dense"), **inputs)
    swapped = {**inputs, "eh_proj": np.roll(inputs["eh_proj"], D, axis=1)}
    other = call("mtp", attrs=attributes("dense", concat="hidden_first"), **swapped)
    for name, y in got.items():
        np.testing.assert_array_equal(other[name], y)
    assert np.abs(call("mtp", attrs=attributes("dense"), **swapped)["logits"] - got["logits"]).max() > 0.1


def test_mtp_reads_the_next_token() -> None:
    """The first `depth` ids change nothing; the last one changes the last row alone; each row is causal."""
    inputs, attrs = one_module("dense", 1, 4, 2), attributes("dense", depth=2)
    got = call("mtp", attrs=attrs, **inputs)["logits"]
    other = {**inputs, "ids": (inputs["ids"] + np.array([1, 1, 0, 0, 0, 0])) % V}
    np.testing.assert_array_equal(call("mtp", attrs=attrs, **other)["logits"], got)
    other = {**inputs, "ids": (inputs["ids"] + np.array([0, 0, 0, 0, 0, 1])) % V}
    moved = call("mtp", attrs=attrs, **other)["logits"]
    np.testing.assert_array_equal(moved[:, :3], got[:, :3])
    assert (moved[:, 3] != got[:, 3]).all()


@pytest.mark.parametrize(("kind", "more"), [("moe", {}), ("dense", {"chain": "pre_norm", "concat": "hidden_first"})])
def test_mtp_backward(kind: str, more: dict) -> None:
    """Differences, embedding and head among the weights."""
    inputs = one_module(kind, 1, 2)
    assert (mtp.margin(inputs, attributes(kind, **more)) > 2.0**-6).all()
    check_backward("mtp", inputs, attributes(kind, **more))


def test_mtp_refuses() -> None:
    inputs = one_module("dense")
    for change, attrs, message in (
        ({"ids": inputs["ids"][:, 1:]}, {}, "ids has shape"),
        ({}, {"depth": 2}, "depth is 2"),
        ({"ids": inputs["ids"] + V}, {}, r"ids\[0, 0\]"),
        ({"eh_proj": np.zeros((D, D))}, {}, "eh_proj has shape"),
        ({"shared_head": np.zeros((V + 1, D))}, {}, "shared_head has shape"),
        ({}, {"concat": "first"}, "concat"),
        ({}, {"chain": "norm"}, "chain"),
    ):
        with pytest.raises(ValueError, match=message):
            call("mtp", attrs={**attributes("dense"), **attrs}, **{**inputs, **change})


# The loss of a chain


def chain(kind: str, p: int, b: int = 2, s: int = 4) -> Arrays:
    own = weights(MODULE | NORMS | ATTENTION | KINDS[kind], p, seed=4) | weights(SHARED, seed=5)
    return {"h": rng(7).standard_normal((b, s, D)), "ids": rng(8).integers(0, V, (b, s)), "positions": places(b, s), **own}


def test_mtp_loss_counts_by_hand() -> None:
    """A head of zeros makes every row ln 7. Of 2 x 4 tokens module 1 has 2 x 2 targets, module 2 one a sequence: 6 of 16, or 2 of 2."""
    inputs = {**chain("dense", 2), "shared_head": np.zeros((V, D))}
    attrs = attributes("dense", weight=0.5)
    assert call("mtp.loss", attrs=attrs, **inputs)["loss"] == pytest.approx(0.25 * math.log(7) * (4 + 2) / 8, rel=1e-15)
    counted = {**attrs, "denominator": "counted"}
    assert call("mtp.loss", attrs=counted, **inputs)["loss"] == pytest.approx(0.25 * math.log(7) * 2, rel=1e-15)
    labels = inputs["ids"].copy()
    labels[0, 3] = labels[1, 0] = -100  # the target of both modules in one sequence; no target in the other
    assert call("mtp.loss", attrs=attrs, **inputs, labels=labels)["loss"] == pytest.approx(0.25 * math.log(7) * (3 + 1) / 8, rel=1e-15)
    assert call("mtp.loss", attrs=counted, **inputs, labels=labels)["loss"] == pytest.approx(0.25 * math.log(7) * 2, rel=1e-15)
    assert call("mtp.loss", attrs=attrs, **inputs, labels=np.full((2, 4), -100))["loss"] == 0
    short = {**inputs, "h": inputs["h"][:, :1], "ids": inputs["ids"][:, :1], "positions": places(2, 1)}
    assert call("mtp.loss", attrs=attrs, **short)["loss"] == 0
    assert call("mtp.loss", attrs=counted, **short)["loss"] == 0


def test_mtp_loss_stops_at_packed_boundaries() -> None:
    """Documents of 3, 1 and 4 tokens: targets i + 2 of i in 0 and in 4, 5; with another module i + 3 of 4."""
    inputs = {**chain("dense", 2, 1, 8), "shared_head": np.zeros((V, D)), "cu_seqlens": np.array([0, 3, 4, 8])}
    got = call("mtp.loss", attrs=attributes("dense", weight=1.0), **inputs)["loss"]
    assert got == pytest.approx(math.log(7) * (3 + 1) / 8 / 2, rel=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_mtp_loss_of_packed_documents_is_that_of_separate_ones(kind: str) -> None:
    """Weighed by their lengths, the losses of the documents by themselves; the same experts."""
    inputs, ends, attrs = chain(kind, 2, 1, 7), (0, 4, 7), attributes(kind)
    apart, chosen = [], []
    for first, end in ((0, 4), (4, 7)):
        own = {name: inputs[name][:, first:end] for name in ("h", "ids", "positions")}
        found = call("mtp.loss", attrs=attrs, **{**inputs, **own})
        apart.append(found["loss"] * (end - first))
        chosen.append(found["topk_idx"])
    got = call("mtp.loss", attrs=attrs, **inputs, cu_seqlens=np.array(ends))
    assert got["loss"] == pytest.approx(sum(apart) / 7, rel=1e-14)
    for k in (1, 2):  # rows that read a token of their own document
        np.testing.assert_array_equal(got["topk_idx"][k - 1, :, : 4 - k], chosen[0][k - 1, :, : 4 - k])
        np.testing.assert_array_equal(got["topk_idx"][k - 1, :, 4 : 7 - k], chosen[1][k - 1, :, : 3 - k])


@pytest.mark.parametrize("link", ["post_norm", "pre_norm"])
def test_mtp_loss_is_its_modules(link: str) -> None:
    """Module after module by the oracle of one; each reads the rows of the one before, less the last."""
    inputs, attrs = chain("moe", 2), attributes("moe", chain=link)
    got, h, terms = call("mtp.loss", attrs=attrs, **inputs), inputs["h"], []
    for k in (1, 2):
        rows, shared = 4 - k, {name: inputs[name] for name in SHARED}
        own = {name: inputs[name][k - 1] for name in (*MODULE, *NORMS, *ATTENTION, *MOE)}
        one = call("mtp", attrs={**attrs, "depth": k}, h=h[:, :rows], ids=inputs["ids"], positions=places(2, rows), **own, **shared)
        h = one["h_next"]
        np.testing.assert_array_equal(got["topk_idx"][k - 1, :, :rows], one["topk_idx"])
        assert (got["topk_idx"][k - 1, :, rows:] == -1).all()
        targets = inputs["ids"][:, k + 1 :]
        flat = {"logits": one["logits"][:, : targets.shape[1]].reshape(-1, V), "labels": targets.ravel()}
        terms.append(call("cross_entropy", **flat)["loss"] * targets.size / 8)
    assert got["loss"] == pytest.approx(0.3 / 2 * sum(terms), rel=1e-13)


def test_mtp_loss_without_modules() -> None:
    """No loss, and exact zeros for h, embedding and head."""
    inputs = chain("dense", 0)
    got = call("mtp.loss", attrs=attributes("dense"), **inputs)
    assert got["loss"] == 0
    assert got["topk_idx"].shape == (0, 2, 4, 0)
    grads = call("mtp.loss", "backward", attrs=attributes("dense"), **inputs, topk_idx=got["topk_idx"], dloss=array(1.0))
    assert all(not g.any() and g.shape == inputs[name[1:]].shape for name, g in grads.items())


@pytest.mark.parametrize(("kind", "more"), [("moe", {}), ("dense", {"denominator": "counted", "chain": "pre_norm"})])
def test_mtp_loss_backward(kind: str, more: dict) -> None:
    """Differences; the row behind the last target gets nothing; detach_head takes away the gradients of embedding and head alone."""
    inputs, attrs = chain(kind, 2, 1, 4), attributes(kind, **more)
    assert mtp.loss_margin(inputs, attrs) > 2.0**-8
    got = check_backward("mtp.loss", inputs, attrs)
    assert not got["dh"][:, 2:].any()  # causal, and there are two targets
    assert got["dh"][:, :2].all()
    topk_idx = call("mtp.loss", attrs=attrs, **inputs)["topk_idx"]
    held = {"topk_idx": topk_idx, "dloss": rng(4).standard_normal(())}
    detached = call("mtp.loss", "backward", attrs={**attrs, "detach_head": True}, **inputs, **held)
    for name, g in call("mtp.loss", "backward", attrs=attrs, **inputs, **held).items():
        np.testing.assert_array_equal(detached[name], 0 * g if name[1:] in SHARED else g)
        assert g.any()


def test_mtp_loss_refuses() -> None:
    inputs = chain("dense", 2)
    for change, attrs, message in (
        ({"ids": inputs["ids"][:, 1:]}, {}, "ids has shape"),
        ({"labels": np.full((2, 4), V)}, {}, r"labels\[0, 0\]"),
        ({"hnorm": inputs["hnorm"][:1]}, {}, "stacked 2 high"),
        ({"cu_seqlens": np.array([0, 4])}, {}, "cu_seqlens with b = 2"),
        ({}, {"denominator": "rows"}, "denominator"),
    ):
        with pytest.raises(ValueError, match=message):
            call("mtp.loss", attrs={**attributes("dense"), **attrs}, **{**inputs, **change})


# The model


def whole(b: int = 2, s: int = 3) -> Arrays:
    """A dense layer and two of experts."""
    own = weights(NORMS | ATTENTION, 3, seed=6) | weights(DENSE, 1, seed=7) | weights(MOE, 2, seed=8)
    outer = weights({"embed_tokens": (V, D), "norm": (D,), "lm_head": (V, D)}, seed=9)
    return {"ids": rng(10).integers(0, V, (b, s)), "positions": places(b, s), **outer, **own}


MODEL = attributes("moe")


def test_model_is_its_layers() -> None:
    """Embedding, blocks, norm and head, each by its own oracle."""
    inputs = whole()
    got = call("model", attrs=MODEL, **inputs)
    x = call("embedding", ids=inputs["ids"].ravel(), weight=inputs["embed_tokens"])["x"].reshape(2, 3, D)
    for i, kind in enumerate(("dense", "moe", "moe")):
        own = {name: inputs[name][i] for name in (*NORMS, *ATTENTION)}
        own |= {name: inputs[name][i - (kind == "moe")] for name in KINDS[kind]}
        found = call("block", attrs=attributes(kind), x=x, positions=inputs["positions"], **own)
        x = found["y"]
        if kind == "moe":
            np.testing.assert_array_equal(got["topk_idx"][i - 1], found["topk_idx"])
    hidden = norm(x, inputs["norm"])
    np.testing.assert_allclose(got["hidden"], hidden, rtol=0, atol=1e-13)
    np.testing.assert_allclose(got["logits"], hidden @ inputs["lm_head"].T, rtol=0, atol=1e-13)
    assert got["topk_idx"].shape == (2, 2, 3, 2)


def test_model_properties() -> None:
    """A longer prompt leaves earlier logits; a sequence does not see its neighbours; packed documents are separate ones."""
    inputs = whole()
    got = call("model", attrs=MODEL, **inputs)
    first = {name: inputs[name][:1, :2] for name in ("ids", "positions")}
    shorter = call("model", attrs=MODEL, **{**inputs, **first})
    np.testing.assert_array_equal(shorter["logits"], got["logits"][:1, :2])
    np.testing.assert_array_equal(shorter["topk_idx"], got["topk_idx"][:, :1, :2])
    row = {name: inputs[name].reshape(1, 6) for name in ("ids", "positions")}
    packed = call("model", attrs=MODEL, **{**inputs, **row}, cu_seqlens=np.array([0, 3, 6]))
    for name, y in got.items():
        np.testing.assert_array_equal(packed[name].ravel(), y.ravel())


def test_model_backward() -> None:
    """Differences, of every stacked weight; an embedding that no token reads gets exactly 0."""
    inputs = whole(1, 2)
    assert model.margin(inputs, MODEL) > 2.0**-6
    got = check_backward("model", inputs, MODEL)
    unread = [i for i in range(V) if i not in inputs["ids"]]
    assert not got["dembed_tokens"][unread].any()
    assert got["dembed_tokens"].any()
    idle = [(i, e) for i in range(2) for e in range(4) if e not in call("model", attrs=MODEL, **inputs)["topk_idx"][i]]
    assert all(not got["dw_gate"][place].any() for place in idle)


def test_model_of_dense_layers() -> None:
    """Without experts topk_idx has no layers and no slots."""
    inputs = {name: x for name, x in whole(1, 2).items() if name not in MOE}
    inputs |= {name: inputs[name][:1] for name in (*NORMS, *ATTENTION)}
    got = call("model", attrs=attributes("dense"), **inputs)
    assert got["topk_idx"].shape == (0, 1, 2, 0)
    check_backward("model", inputs, attributes("dense"))


def test_model_refuses() -> None:
    inputs = whole()
    for change, message in (
        ({"ids": inputs["ids"] - V}, r"ids\[0, 0\]"),
        ({"w_up": inputs["w_up"][:1]}, "w_up is stacked 1 high, expected 2 of 3 layers"),
        ({"lm_head": np.zeros((V + 1, D))}, "lm_head has shape"),
        ({"positions": places(2, 4)}, "positions has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call("model", attrs=MODEL, **{**inputs, **change})


def test_margins_are_the_least_of_their_parts() -> None:
    """The model's and the chain's: that of the block whose choice is nearest to another."""
    inputs = whole(1, 2)
    x = inputs["embed_tokens"][inputs["ids"]]
    found = []
    for i, kind in enumerate(("dense", "moe", "moe")):
        own = {name: inputs[name][i] for name in (*NORMS, *ATTENTION)} | {"positions": inputs["positions"]}
        own |= {name: inputs[name][i - (kind == "moe")] for name in KINDS[kind]}
        found.append(block.margin({"x": x, **own}, attributes(kind)).min())
        x = call("block", attrs=attributes(kind), x=x, **own)["y"]
    assert np.isinf(found[0])
    assert model.margin(inputs, MODEL) == pytest.approx(min(found), rel=1e-9)
    steps = chain("moe", 1, 1, 3)
    own = {name: steps[name][0] for name in (*MODULE, *NORMS, *ATTENTION, *MOE)} | {name: steps[name] for name in (*SHARED, "ids")}
    least = mtp.margin({"h": steps["h"][:, :2], "positions": places(1, 2), **own}, attributes("moe")).min()
    assert mtp.loss_margin(steps, attributes("moe")) == least
    assert np.isinf(mtp.loss_margin(chain("dense", 1), attributes("dense")))
