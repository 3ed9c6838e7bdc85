"""The same ops on float32 arrays that carry bfloat16 values, through the bfloat16 kernels: so `verify --precision bf16` hands them over."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np

from . import latent, norm, permuting, prefill, routing
from .quantize import decode, encode, quantize_block, quantize_tile


def bits(x: Any) -> Any:
    """float32 values as bfloat16 bits"""
    return encode.bf16(x.reshape(-1)).reshape(x.shape)


def values(x: Any) -> Any:
    """bfloat16 bits as float32 values"""
    return decode.bf16(x.reshape(-1)).reshape(x.shape)


def carried(kernel: Callable[..., Any], keep: tuple[str, ...] = (), codes: bool = False) -> Callable[..., Any]:
    """The kernel with every float32 array, but those named, turned into bits on the way in, and bits into values on the way out. With
    `codes` nothing is turned on the way out: the 16 bits of a code are no bfloat16."""

    @wraps(kernel)
    def call(**given: Any) -> Any:
        for name, x in given.items():
            if name not in keep and getattr(x, "dtype", None) == np.float32:
                given[name] = bits(x)
        result = kernel(**given)
        if codes:
            return result
        many = result if isinstance(result, tuple) else (result,)
        back = tuple(values(y) if getattr(y, "dtype", None) == np.uint16 else y for y in many)
        return back if isinstance(result, tuple) else back[0]

    return call


fp8_quantize_tile = carried(quantize_tile, codes=True)
fp8_quantize_block = carried(quantize_block, codes=True)
rmsnorm = carried(norm.rmsnorm)
rmsnorm_bwd = carried(norm.rmsnorm_bwd)
router_noaux_tc = carried(routing.router_noaux_tc, keep=("bias",))
router_softmax = carried(routing.router_softmax)
moe_permute = carried(permuting.moe_permute)
moe_permute_bwd = carried(permuting.moe_permute_bwd)
moe_unpermute = carried(permuting.moe_unpermute)
moe_unpermute_bwd = carried(permuting.moe_unpermute_bwd)
mla_decode = carried(latent.mla_decode, keep=("sink",))
mla_decode_fp8 = carried(latent.mla_decode_fp8, keep=("sink",))
attention = carried(prefill.attention, keep=("sink",))
attention_bwd = carried(prefill.attention_bwd, keep=("dlse", "sink"))
