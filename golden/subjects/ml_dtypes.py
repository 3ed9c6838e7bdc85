"""ml_dtypes: NumPy's astype to its float8 and bfloat16 types, as most NumPy code casts. It has no option for overflow."""

from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {"e4m3fn": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "bf16": ml_dtypes.bfloat16}


def _cast(dtype: Any) -> Any:
    return lambda x: x.astype(dtype).astype(x.dtype)


def _encode(dtype: Any) -> Any:
    return lambda x: x.astype(dtype).view(f"uint{8 * np.dtype(dtype).itemsize}")


def _decode(dtype: Any) -> Any:
    return lambda codes: codes.view(dtype).astype(np.float32)


def _overflowing(convert: Any) -> Any:
    def takes(x: np.ndarray, overflow: str = "nan") -> np.ndarray:  # it does what it does, whatever was asked for
        return convert(x)

    return takes


cast = SimpleNamespace(**{name: _overflowing(_cast(dtype)) for name, dtype in DTYPES.items()})
encode = SimpleNamespace(**{name: _overflowing(_encode(dtype)) for name, dtype in DTYPES.items()})
decode = SimpleNamespace(**{name: _decode(dtype) for name, dtype in DTYPES.items()})
