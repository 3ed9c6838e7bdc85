"""Arrays to and from a subject's own framework. Values travel on NumPy carriers: float32 for every format of 32 bits and less."""

from typing import Any

import numpy as np

from ..ref.formats import Format
from .errors import UsageError

FRAMEWORKS = ("numpy", "torch", "jax", "cupy")
NARROW = {"bf16": "bfloat16", "fp16": "float16"}


def check(framework: str | None) -> None:
    if framework is not None and framework not in FRAMEWORKS:
        raise UsageError(f"unknown framework {framework!r}; expected one of {', '.join(FRAMEWORKS)}")


def hand_over(x: np.ndarray, fmt: Format, kind: str, framework: str) -> Any:
    """A copy of its own. torch, JAX and CuPy arrays have the claimed dtype; NumPy, which has no bfloat16, gets the carrier."""
    x = np.array(x)
    if framework == "numpy":
        return x
    narrow = NARROW.get(fmt.name) if x.dtype.kind == "f" else None
    if framework == "torch":
        import torch

        tensor = torch.from_numpy(x)
        return tensor.to(getattr(torch, narrow)) if narrow else tensor
    if framework == "jax":
        import jax
        import jax.numpy as jnp

        if x.dtype == np.float64:
            jax.config.update("jax_enable_x64", True)
        return jnp.asarray(x, dtype=narrow)
    import cupy

    if narrow == "bfloat16":
        raise NotImplementedError("CuPy has no bfloat16")
    return cupy.asarray(x, dtype=narrow)


def snapshot(x: Any) -> np.ndarray:
    """The bits of an array, to see later whether it was changed."""
    values, _ = take_back(x, "const")
    return np.frombuffer(np.ascontiguousarray(values).tobytes(), dtype=np.uint8).copy()


def take_back(y: Any, kind: str) -> tuple[np.ndarray, str]:
    """An output on a NumPy carrier, and the name of the dtype that it came in. Narrow floats where codes are due give their bits."""
    if hasattr(y, "detach"):  # torch
        import torch

        y = y.detach().cpu()
        name = str(y.dtype).removeprefix("torch.")
        if y.dtype.is_floating_point and y.dtype.itemsize <= 2:
            if kind == "code":
                return y.view(torch.uint8 if y.dtype.itemsize == 1 else torch.uint16).numpy(), f"uint{8 * y.dtype.itemsize}"
            y = y.to(torch.float32)
        return y.numpy(), name
    if type(y).__module__.startswith("cupy"):
        y = y.get()
    array = np.asarray(y)
    if array.dtype == object:
        raise TypeError("its elements are Python objects")
    name = str(array.dtype)
    if array.dtype.kind == "V" or name.startswith(("bfloat", "float8_", "float4_", "float6_")) or name == "float16":
        if kind == "code":
            return array.view(f"uint{8 * array.dtype.itemsize}"), f"uint{8 * array.dtype.itemsize}"
        array = array.astype(np.float32)
    return array, name
