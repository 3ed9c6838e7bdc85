"""kernels.cpu's loss, embedding and blocks, held at any size and at real ones to sums that share nothing with them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from leadline import ref
from leadline.golden.draw import draw_case
from leadline.golden.precision import PRECISIONS
from leadline.kernels import cpu

SIZES = st.tuples(st.integers(1, 9), st.sampled_from([1, 2, 63, 64, 65, 129, 1000]), st.integers(0, 2**32 - 1))
UNIT = 2.0**-24


def drawn(n: int, v: int, seed: int, scale: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, v, n)
    labels[rng.random(n) < 0.3] = -100
    return (rng.standard_normal((n, v)) * scale).astype(np.float32), labels


def losses(logits: np.ndarray, labels: np.ndarray) -> list[float]:
    """Row by row in Python's floats"""
    found = []
    for row, i in zip(logits.tolist(), labels, strict=True):
        if i != -100:
            top = max(row)
            found.append(top - row[i] + math.log(math.fsum(math.exp(x - top) for x in row)))
    return found


@given(SIZES)
def test_cross_entropy_is_the_mean_of_its_rows(question: tuple[int, int, int]) -> None:
    """Any n and v, lanes that do not fill: within a few units of the terms (exp is right to about one)."""
    logits, labels = drawn(*question)
    own = losses(logits, labels)
    if own:
        size = math.fsum(abs(x) for x in own) / len(own) + float(np.abs(logits).max())
        assert abs(float(cpu.cross_entropy(logits, labels)) - math.fsum(own) / len(own)) <= 8 * UNIT * size
    assert float(cpu.cross_entropy(logits, labels, empty="zero", denominator="rows")) == pytest.approx(
        math.fsum(own) / len(labels), rel=1e-5
    )


@given(SIZES)
def test_gradients_of_a_row_sum_to_zero_and_ignored_rows_have_none(question: tuple[int, int, int]) -> None:
    """Σ_v dlogits[n,v] = 0, dlogits >= 0 but at the label, exact zeros where the label does not count."""
    logits, labels = drawn(*question)
    grads = cpu.cross_entropy_bwd(logits, labels, np.asarray(1.0, np.float32))
    v = logits.shape[1]
    assert (grads[labels == -100] == 0).all()
    assert np.abs(grads.astype(np.float64).sum(axis=1)).max(initial=0) <= 4 * UNIT * math.sqrt(v) + 4 * UNIT
    at = np.flatnonzero(labels != -100)
    assert (grads[at, labels[at]] <= 0).all()
    others = grads.copy()
    others[at, labels[at]] = 0
    assert (others >= 0).all()


def test_a_real_vocabulary_and_logits_of_ten_thousand() -> None:
    """V3's 129,280 tokens, logits near ±1e4: the loss of float32's own values."""
    logits, labels = drawn(3, 129280, 1, 4000.0)
    labels[:] = [7, 129279, int(logits[2].argmax())]
    own = losses(logits, labels)
    assert float(cpu.cross_entropy(logits, labels)) == pytest.approx(math.fsum(own) / 3, rel=4 * UNIT)


@given(st.integers(0, 50), st.integers(1, 20), st.sampled_from([1, 7, 64]), st.integers(0, 2**32 - 1))
def test_the_embedding_gathers_equal_ids(n: int, v: int, d: int, seed: int) -> None:
    """dweight against sums one by one in float64; ids that nobody asked for have exact zeros."""
    rng = np.random.default_rng(seed)
    ids, weight, dx = rng.integers(0, v, n), rng.standard_normal((v, d)).astype(np.float32), rng.standard_normal((n, d)).astype(np.float32)
    expected = np.zeros((v, d))
    np.add.at(expected, ids, dx.astype(np.float64))
    got = cpu.embedding_bwd(ids, weight, dx)
    np.testing.assert_array_equal(got, expected.astype(np.float32))
    np.testing.assert_array_equal(cpu.embedding(ids, weight), weight[ids])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: cpu.embedding(np.array([0, 4]), np.zeros((4, 2), np.float32)), r"ids\[1\] is 4; expected 0 to 3"),
        (lambda: cpu.cross_entropy(np.zeros((2, 3), np.float32), np.array([0, 3])), r"labels\[1\] is 3; expected 0 to 2"),
        (lambda: cpu.cross_entropy(np.zeros((2, 3), np.float32), np.array([0])), "labels has shape"),
        (lambda: cpu.cross_entropy(np.zeros((2, 3), np.float32), np.array([0, 1]), mean=True), "mean is no attribute"),
        (lambda: cpu.block(x=np.zeros((1, 2, 3), np.float32)), "positions is missing"),
    ],
)
def test_wrong_input_is_refused_by_name(call, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize("name", ["block", "model", "mtp", "mtp.loss"])
def test_a_kept_choice_is_kept(name: str) -> None:
    """The backward under another choice than the router's own has other gradients, the reference's under that choice."""
    op = ref.op_named(name)
    case = op.cases[0]
    inputs = draw_case(op, case, "backward", PRECISIONS["fp32"])
    idx = inputs["topk_idx"]
    experts = int(inputs["gate_weight"].shape[-2])
    inputs["topk_idx"] = np.where(idx < 0, idx, (idx + 1) % experts)  # every token is sent elsewhere
    fn = getattr(cpu, name.replace(".", "_") + "_bwd")
    got = fn(**inputs, **case.attrs)
    wide = {k: a.astype(np.float64) if a.dtype.kind == "f" else a for k, a in inputs.items()}
    for mine, (key, theirs) in zip(got, op.run("backward", wide, case.attrs).items(), strict=True):
        size = max(float(np.abs(theirs).max(initial=0)), 1e-6)
        assert np.abs(mine - theirs).max(initial=0) <= 1e-5 * size, key
    own = fn(**{**inputs, "topk_idx": idx}, **case.attrs)
    assert any((a != b).any() for a, b in zip(own, got, strict=True))
