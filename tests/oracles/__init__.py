"""Slow, exact, per-element oracles, written from the contract's text alone; they share no code with `ref`.

`ORACLES[op, "forward" | "backward"](inputs, attrs) -> outputs`: dicts of numpy arrays by the contract's names; `attrs` may be partial.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from . import (
    attention,
    balance,
    block,
    cache,
    cast,
    decode,
    eplb,
    fp8_gemm,
    fp8_linear,
    linear,
    loss,
    mla,
    model,
    moe,
    mtp,
    norm,
    pack,
    quantize,
    rope,
    router,
)
from .floats import CAST_FORMATS

Oracle = Callable[[dict[str, np.ndarray], dict], dict[str, np.ndarray]]

ORACLES: dict[tuple[str, str], Oracle] = {
    ("fp8.quantize_tile", "forward"): quantize.quantize_tile,
    ("fp8.dequantize_tile", "forward"): quantize.dequantize_tile,
    ("fp8.quantize_block", "forward"): quantize.quantize_block,
    ("fp8.dequantize_block", "forward"): quantize.dequantize_block,
    ("fp8.gemm", "forward"): fp8_gemm.gemm,
    ("fp8.linear", "forward"): fp8_linear.forward,
    ("fp8.linear", "backward"): fp8_linear.backward,
    ("pack.e2m1", "forward"): pack.pack_e2m1,
    ("unpack.e2m1", "forward"): pack.unpack_e2m1,
    ("pack.e5m6", "forward"): pack.pack_e5m6,
    ("unpack.e5m6", "forward"): pack.unpack_e5m6,
    ("rmsnorm", "forward"): norm.forward,
    ("rmsnorm", "backward"): norm.backward,
    ("router.noaux_tc", "forward"): router.forward,
    ("router.noaux_tc", "backward"): router.backward,
    ("router.softmax", "forward"): router.softmax,
    ("router.softmax", "backward"): router.softmax_backward,
    ("router.balance_loss", "forward"): balance.loss,
    ("router.balance_loss", "backward"): balance.loss_backward,
    ("router.drop_tokens", "forward"): balance.drop,
    ("router.drop_tokens", "backward"): balance.drop_backward,
    ("router.bias_update", "forward"): balance.bias_update,
    ("swiglu", "forward"): moe.swiglu,
    ("swiglu", "backward"): moe.swiglu_backward,
    ("moe.permute", "forward"): moe.permute,
    ("moe.permute", "backward"): moe.permute_backward,
    ("moe.unpermute", "forward"): moe.unpermute,
    ("moe.unpermute", "backward"): moe.unpermute_backward,
    ("moe.experts", "forward"): moe.experts,
    ("moe.experts", "backward"): moe.experts_backward,
    ("moe.layer", "forward"): moe.layer,
    ("moe.layer", "backward"): moe.layer_backward,
    ("moe.eplb", "forward"): eplb.rebalance,
    ("linear", "forward"): linear.forward,
    ("linear", "backward"): linear.backward,
    ("rope.frequencies", "forward"): rope.frequencies,
    ("rope", "forward"): rope.forward,
    ("rope", "backward"): rope.backward,
    ("attention", "forward"): attention.forward,
    ("attention", "backward"): attention.backward,
    ("attention.varlen", "forward"): attention.varlen,
    ("attention.varlen", "backward"): attention.varlen_backward,
    ("attention.merge", "forward"): attention.merge,
    ("attention.merge", "backward"): attention.merge_backward,
    ("mla.prefill", "forward"): mla.forward,
    ("mla.prefill", "backward"): mla.backward,
    ("mla.absorb", "forward"): mla.forward,  # in exact arithmetic, one function
    ("mla.absorb", "backward"): mla.backward,
    ("mla.decode", "forward"): decode.forward,
    ("mla.decode_fp8", "forward"): decode.fp8,
    ("cache.append", "forward"): cache.append,
    ("cache.read", "forward"): cache.read,
    ("cross_entropy", "forward"): loss.cross_entropy,
    ("cross_entropy", "backward"): loss.cross_entropy_backward,
    ("embedding", "forward"): loss.embedding,
    ("embedding", "backward"): loss.embedding_backward,
    ("block", "forward"): block.forward,
    ("block", "backward"): block.backward,
    ("mtp", "forward"): mtp.forward,
    ("mtp", "backward"): mtp.backward,
    ("mtp.loss", "forward"): mtp.loss,
    ("mtp.loss", "backward"): mtp.loss_backward,
    ("model", "forward"): model.forward,
    ("model", "backward"): model.backward,
}
for _name in CAST_FORMATS:
    ORACLES[f"cast.{_name}", "forward"] = partial(cast.cast, _name)
    if _name == "tf32":
        continue  # a way to compute, which nothing stores
    ORACLES[f"encode.{_name}", "forward"] = partial(cast.encode, _name)
    ORACLES[f"decode.{_name}", "forward"] = partial(cast.decode, _name)

__all__ = [
    "ORACLES",
    "Oracle",
    "attention",
    "balance",
    "block",
    "cache",
    "cast",
    "decode",
    "eplb",
    "fp8_gemm",
    "fp8_linear",
    "linear",
    "loss",
    "mla",
    "model",
    "moe",
    "mtp",
    "norm",
    "pack",
    "quantize",
    "rope",
    "router",
]
