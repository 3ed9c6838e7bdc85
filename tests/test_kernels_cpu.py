"""kernels.cpu held to the reference at sizes and values that Hypothesis finds, beyond the stored vectors."""

import numpy as np
import pytest
from hypothesis import given
from leadline.golden import strategies
from leadline.golden.band import band_of
from leadline.golden.judge import PASS, Question, judge
from leadline.golden.strategies import Drawn
from leadline.golden.subject import load
from leadline.golden.vectors import directions
from leadline.kernels import cpu
from leadline.ref import OPS

KERNELS = load("kernels.cpu")
ASKED = [(op, direction) for op in OPS for direction in directions(OPS[op])]


@pytest.mark.parametrize(("op", "direction"), ASKED)
def test_every_op_has_a_kernel(op: str, direction: str) -> None:
    """`leadline verify` covers every op there is."""
    assert KERNELS.contract(OPS[op], direction) is not None


@pytest.mark.parametrize(("op", "direction"), ASKED)
def test_no_kernel_is_wrong_at_any_size(op: str, direction: str) -> None:
    """Empty, boundary and odd sizes, special values, ties and near ties: the same verdict as on the vectors, PASS."""

    @given(strategies.questions(op, direction=direction))
    def check(drawn: Drawn) -> None:
        question = Question(drawn.op, direction, drawn.inputs, drawn.attrs, drawn.precision)
        band = band_of(drawn.op, direction, drawn.inputs, drawn.attrs, drawn.precision)
        returned = KERNELS.ask(drawn.op, direction, drawn.inputs, drawn.attrs, drawn.precision)
        judgement = judge(question, returned, band)
        assert judgement.verdict == PASS, judgement.reasons

    check()


def test_out_arrays_are_filled_and_returned() -> None:
    """`out=` saves the allocation and changes nothing."""
    x = np.linspace(-500, 500, 1000, dtype=np.float32)
    codes = np.empty(1000, np.uint8)
    assert cpu.encode.e4m3fn(x=x, out=codes) is codes
    np.testing.assert_array_equal(codes, cpu.encode.e4m3fn(x=x))


def test_results_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread and two give the same bits, sums included."""
    from leadline.kernels.cpu import _common

    rng = np.random.Generator(np.random.Philox(key=5))
    x, weight, dy = (rng.standard_normal(s).astype(np.float32) for s in ((700, 512), (512,), (700, 512)))
    two = cpu.rmsnorm_bwd(x=x, weight=weight, dy=dy)
    monkeypatch.setattr(_common, "THREADS", 1)
    one = cpu.rmsnorm_bwd(x=x, weight=weight, dy=dy)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


def test_wrong_arguments_are_named() -> None:
    """A ValueError names argument, value and expectation before any work."""
    x = np.zeros((2, 4), np.float32)
    for call, expected in (
        (lambda: cpu.rmsnorm(x=x, weight=np.zeros(3, np.float32)), "weight"),
        (lambda: cpu.cast.e4m3fn(x=x.astype(np.int32)), "int32"),
        (lambda: cpu.cast.e4m3fn(x=x, overflow="wrap"), "overflow"),
        (lambda: cpu.fp8.quantize_tile(x=np.full((2, 4), np.nan, np.float32)), "NaN"),
        (lambda: cpu.fp8.quantize_tile(x=x, recipe="none"), "recipe"),
        (lambda: cpu.router.noaux_tc(logits=x, bias=np.zeros(4, np.float32), n_group=3), "n_group"),
    ):
        with pytest.raises(ValueError, match=expected):
            call()
