"""torch: its dtype conversions and F.rms_norm, with autograd for the backward."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

FRAMEWORK = "torch"
# What torch's conversions do beyond the largest number; they take no option.
DECLARES = {f"{kind}.{fmt}": {"overflow": "nan"} for kind in ("cast", "encode") for fmt in ("e5m2", "bf16", "fp16")}
DTYPES = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "bf16": torch.bfloat16, "fp16": torch.float16}


def _conversions(make: Callable[[torch.dtype], Any]) -> SimpleNamespace:
    return SimpleNamespace(**{name: make(dtype) for name, dtype in DTYPES.items()})


def _codes(dtype: torch.dtype) -> torch.dtype:
    return torch.uint8 if dtype.itemsize == 1 else torch.uint16


def _only(dtype: torch.dtype, overflow: str) -> None:
    own = "saturate" if dtype is torch.float8_e4m3fn else "nan"
    if overflow != own:
        raise NotImplementedError(f"torch converts to {dtype} with overflow={own} only")


def _cast(dtype: torch.dtype) -> Any:
    def cast(x: torch.Tensor, overflow: str) -> torch.Tensor:
        _only(dtype, overflow)
        return x.to(dtype).to(x.dtype)

    return cast


def _encode(dtype: torch.dtype) -> Any:
    def encode(x: torch.Tensor, overflow: str) -> torch.Tensor:
        _only(dtype, overflow)
        return x.to(dtype).view(_codes(dtype))

    return encode


def _decode(dtype: torch.dtype) -> Any:
    return lambda codes: codes.view(dtype).to(torch.float32)


cast = _conversions(_cast)
encode = _conversions(_encode)
decode = _conversions(_decode)


def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rmsnorm_bwd(x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor, eps: float) -> tuple[torch.Tensor, ...]:
    x.requires_grad_()
    weight.requires_grad_()
    return torch.autograd.grad(rmsnorm(x, weight, eps), (x, weight), dy)
