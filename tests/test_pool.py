"""Memory that kernels.cpu uses again: never while anything still looks at it, and no more of it than was in use at once."""

import gc
from collections.abc import Iterator

import numpy as np
import pytest
from leadline.kernels import cpu
from leadline.kernels.cpu import _pool

pytestmark = pytest.mark.skipif(_pool.LAZY is None, reason="this system cannot mark memory as free: nothing is kept")
SHAPE = (4, _pool.LEAST)  # uint8


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    gc.collect()
    _pool.clear()
    yield
    _pool.clear()


def address(a: np.ndarray) -> int:
    return a.ctypes.data


@pytest.mark.parametrize("hold", [lambda a: a[1:3], lambda a: a.view(np.int32).T, memoryview, lambda a: a.reshape(-1)[-1:]])
def test_memory_that_anything_looks_at_is_not_handed_out_again(hold) -> None:
    """A view of a view, another dtype, a buffer: each keeps the whole block. Without one it is used again at once."""
    a = _pool.empty(SHAPE, np.uint8)
    place, view = address(a), hold(a)
    del a
    other = _pool.empty(SHAPE, np.uint8)
    assert address(other) != place
    del view
    gc.collect()
    assert address(_pool.empty(SHAPE, np.uint8)) == place


def test_what_is_kept_is_no_more_than_was_in_use_at_once() -> None:
    """Arrays of ever other sizes, one at a time: one of them is kept, or none, not all."""
    for k in range(8):
        _pool.empty((_pool.LEAST + 4096 * k,), np.uint8)
        gc.collect()
    kept = sum(size * len(blocks) for size, blocks in _pool._free.items())
    assert 0 < kept == _pool._kept <= _pool.LEAST + 4096 * 7


def test_gradients_of_one_step_survive_the_next() -> None:
    """Two backward passes: the first's gradients are what they were, for the caller still has them."""
    rng = np.random.default_rng(0)
    x, weight = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 2048), (2048, 2048)))
    first = cpu.linear_bwd(x=x, weight=weight, dy=x)[1]
    as_it_was = first.copy()
    second = cpu.linear_bwd(x=x, weight=weight, dy=2 * x)[1]
    assert np.shares_memory(first, second) is False
    assert (first == as_it_was).all()
    np.testing.assert_array_equal(second, 2 * first)
