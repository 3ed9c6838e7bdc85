"""What needs a GPU: the reference's own text on CuPy arrays, and kernels.gpu on the device itself. Skipped where there is none."""

from typing import Any

import numpy as np
import pytest
from leadline.golden.judge import PASS
from leadline.golden.subject import Subject
from leadline.golden.vectors import directions
from leadline.golden.verify import verify
from leadline.kernels import gpu
from leadline.ref import OPS

pytestmark = pytest.mark.gpu
ASKED = [(op, direction) for op in OPS for direction in directions(OPS[op])]
SUBJECT = Subject("kernels.gpu", gpu)
OWN = [(op, direction) for op, direction in ASKED if SUBJECT.contract(OPS[op], direction) is not None]


@pytest.mark.parametrize(("op", "direction"), ASKED)
def test_the_reference_on_cupy_gives_the_same_values(op: str, direction: str) -> None:
    """One text, every array: discrete outputs bit for bit, real ones within float64's and float32's own rounding."""
    report = verify("ref", op=op, direction=direction, precision=["fp64", "fp32"], framework="cupy", explained=False)
    assert report.verdict == PASS, str(report)


@pytest.mark.parametrize("subject", ["kernels.gpu", "leadline.kernels.gpu.readable"])
@pytest.mark.parametrize(("op", "direction"), OWN)
def test_kernels_pass_on_the_device(op: str, direction: str, subject: str) -> None:
    """The vectors, and inputs of two seeds that are not stored, by whichever kernel is launched and by the readable one."""
    report = verify(subject, op=op, direction=direction, precision=["fp64", "fp32", "bf16"], seeds=(0, 1, 2))
    assert report.verdict == PASS, str(report)


def test_arrays_stay_where_they_are() -> None:
    """CuPy arrays, and what has __cuda_array_interface__, give CuPy arrays; NumPy arrays give NumPy arrays; the values are the same."""
    import cupy

    class Foreign:
        """Another library's array."""

        def __init__(self, array: Any):
            self.__cuda_array_interface__, self.shape, self.kept = array.__cuda_array_interface__, array.shape, array

    x, weight = np.linspace(-3, 3, 512, dtype=np.float32).reshape(4, 128), np.linspace(0.5, 1.5, 128, dtype=np.float32)
    home = gpu.rmsnorm(x, weight)
    assert type(home) is np.ndarray
    for there in (cupy.asarray, lambda a: Foreign(cupy.asarray(a))):
        y = gpu.rmsnorm(there(x), there(weight))
        assert isinstance(y, cupy.ndarray)
        np.testing.assert_array_equal(y.get(), home)


def test_kernels_run_on_the_current_stream() -> None:
    """What CuPy does before and after a kernel on a stream of its own keeps its order."""
    import cupy

    with cupy.cuda.Stream(non_blocking=True):
        x = cupy.zeros((1 << 12, 1024), cupy.float32)
        for _ in range(20):
            x = gpu.swiglu(x + 1, cupy.ones_like(x))
        result = x.sum()
    expected, one = np.float64(0), np.float64(1)
    for _ in range(20):
        expected = (expected + 1) / (1 + np.exp(-(expected + 1))) * one
    np.testing.assert_allclose(float(result.get()), expected * x.size, rtol=1e-4)
