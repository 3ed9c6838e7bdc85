"""Fast kernels in CUDA C++ (the .cu files), launched through CuPy. Each op stands here under its reference's name.

UNRUN names the kernels that no GPU has run yet: they compile for every architecture and run right on the CPU (tests/cuda_shim), no more.
FAST is what kernels.gpu launches in place of its readable kernels: by op, of float32 arrays on the device; None where it does not fit.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from . import bf16
from .gemm import fp8_gemm
from .latent import attention_merge, mla_decode, mla_decode_fp8
from .launch import Unfit
from .norm import rmsnorm, rmsnorm_bwd, rmsnorm_quantize
from .permuting import moe_permute, moe_permute_bwd, moe_unpermute, moe_unpermute_bwd
from .prefill import attention, attention_bwd
from .quantize import cast, decode, encode
from .quantize import quantize_block as fp8_quantize_block
from .quantize import quantize_tile as fp8_quantize_tile
from .routing import router_noaux_tc, router_softmax
from .variants import UNRUN

__all__ = [
    "FAST",
    "UNRUN",
    "attention",
    "attention_bwd",
    "attention_merge",
    "bf16",
    "cast",
    "decode",
    "encode",
    "fp8_gemm",
    "fp8_quantize_block",
    "fp8_quantize_tile",
    "mla_decode",
    "mla_decode_fp8",
    "moe_permute",
    "moe_permute_bwd",
    "moe_unpermute",
    "moe_unpermute_bwd",
    "rmsnorm",
    "rmsnorm_bwd",
    "rmsnorm_quantize",
    "router_noaux_tc",
    "router_softmax",
]


def _fast(kernel: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(kernel)
    def call(**given: Any) -> Any:
        given = {name: x for name, x in given.items() if x is not None}
        if any(getattr(x, "dtype", None) == "float64" for x in given.values()):
            return None
        try:
            return kernel(**given)
        except Unfit:
            return None

    return call


_OPS: dict[str, Callable[..., Any]] = {
    "fp8.quantize_block": fp8_quantize_block,
    "fp8.quantize_tile": fp8_quantize_tile,
    "moe.permute": moe_permute,
    "moe.permute_bwd": moe_permute_bwd,
    "moe.unpermute": moe_unpermute,
    "moe.unpermute_bwd": moe_unpermute_bwd,
    "rmsnorm": rmsnorm,
    "rmsnorm_bwd": rmsnorm_bwd,
    "router.noaux_tc": router_noaux_tc,
    "router.softmax": router_softmax,
    **{
        f"{kind}.{name}": kernel
        for kind, of in (("cast", cast), ("encode", encode), ("decode", decode))
        for name, kernel in vars(of).items()
    },
}
FAST: dict[str, Callable[..., Any]] = {name: _fast(kernel) for name, kernel in _OPS.items()}
