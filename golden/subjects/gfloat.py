"""gfloat: round_ndarray, encode_ndarray and decode_ndarray on its own descriptions of the formats."""

from types import SimpleNamespace
from typing import Any

import gfloat
import numpy as np
from gfloat import formats

INFO = {
    "e4m3fn": formats.format_info_ocp_e4m3,
    "e5m2": formats.format_info_ocp_e5m2,
    "bf16": formats.format_info_bfloat16,
    "fp16": formats.format_info_binary16,
}


def _round(info: Any, x: np.ndarray, overflow: str) -> np.ndarray:
    return gfloat.round_ndarray(info, x.astype(np.float64), sat=overflow == "saturate")


def _cast(info: Any) -> Any:
    return lambda x, overflow: _round(info, x, overflow).astype(x.dtype)


def _encode(info: Any) -> Any:
    return lambda x, overflow: gfloat.encode_ndarray(info, _round(info, x, overflow)).astype(f"uint{info.k if info.k > 8 else 8}")


def _decode(info: Any) -> Any:
    return lambda codes: gfloat.decode_ndarray(info, codes.astype(np.int64)).astype(np.float32)


cast = SimpleNamespace(**{name: _cast(info) for name, info in INFO.items()})
encode = SimpleNamespace(**{name: _encode(info) for name, info in INFO.items()})
decode = SimpleNamespace(**{name: _decode(info) for name, info in INFO.items()})
