"""Correct implementations, written separately from leadline, that its judge must pass: as different as real kernels are from each other."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from . import (
    attention,
    attention_backward,
    balance,
    block,
    cache,
    casts,
    decodes,
    eager,
    eplb,
    fp8,
    fp8_gemm,
    frameworks,
    linear,
    loss,
    mla,
    mla_backward,
    mla_decode,
    model,
    moe,
    moe_backward,
    mtp,
    norm,
    parts,
    quantize,
    rope,
    router,
    router_backward,
    router_softmax,
    swiglu,
    torch_model,
)
from .floats import LAYOUTS, STORE

ALL = ("fp32", "bf16", "fp16", "fp64")
SINGLE = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Variant:
    """An implementation of one op and direction, and the precisions that it honestly computes in."""

    name: str
    op: str
    direction: str
    fn: Callable
    precisions: tuple[str, ...]
    rounded: tuple[int, ...] = ()  # the outputs that it rounds, once, to a 16-bit precision's format
    slow: bool = False  # plain Python over every element
    stores: bool = False  # fn takes `to`, which rounds what a 16-bit implementation stores on its way

    @property
    def id(self) -> str:
        return f"{self.op}-{self.direction}-{self.name}"

    def at(self, precision: str) -> Callable:
        """The callable that claims this precision."""
        fn = functools.partial(self.fn, to=STORE[precision]) if self.stores else self.fn
        if not self.rounded or precision in ("fp32", "fp64"):
            return fn

        @functools.wraps(fn)
        def stored(*arrays: Any, **keywords: Any) -> Any:
            result = fn(*arrays, **keywords)
            outputs = result if isinstance(result, tuple) else (result,)
            outputs = tuple(STORE[precision](y) if i in self.rounded else y for i, y in enumerate(outputs))
            return outputs if isinstance(result, tuple) else outputs[0]

        return stored


def _casts() -> list[Variant]:
    found = []
    for format in (*LAYOUTS, "e8m0"):
        for name in casts.names(format):
            precisions = ALL if name in casts.WIDE else SINGLE
            slow = name in casts.SLOW
            found.append(Variant(name, f"cast.{format}", "forward", casts.caster(name, format), precisions, slow=slow))
            if format != "tf32":
                found.append(Variant(name, f"encode.{format}", "forward", casts.encoder(name, format), precisions, slow=slow))
        if format != "tf32":
            found += [Variant(name, f"decode.{format}", "forward", decodes.decoder(name, format), ALL) for name in decodes.names(format)]
    return found


def _named(op: str, direction: str, fns: Any, rounded: tuple[int, ...], single: Callable[[str], bool]) -> list[Variant]:
    return [Variant(f.__name__, op, direction, f, SINGLE if single(f.__name__) else ALL, rounded) for f in fns]


def _plain(
    op: str,
    direction: str,
    fns: Mapping[str, Callable],
    rounded: tuple[int, ...],
    single: tuple[str, ...] = (),
    slow: tuple[str, ...] = (),
) -> list[Variant]:
    """Variants that round their outputs and nothing else."""
    return [Variant(name, op, direction, fn, SINGLE if name in single else ALL, rounded, slow=name in slow) for name, fn in fns.items()]


def _storing(op: str, direction: str, fns: Any, rounded: tuple[int, ...], precisions: Mapping[str, tuple[str, ...]]) -> list[Variant]:
    """Variants that are told how a precision stores; all precisions but for those that are named."""
    return [Variant(name, op, direction, f, precisions.get(name, ALL), rounded, stores=True) for name, f in fns.items()]


VARIANTS = [
    *_casts(),
    *_named("fp8.quantize_tile", "forward", quantize.QUANTIZE, (), lambda n: n in quantize.SINGLE),
    *_named("fp8.dequantize_tile", "forward", quantize.DEQUANTIZE, (), lambda n: False),
    *_plain("fp8.quantize_block", "forward", fp8.QUANTIZE_BLOCK, (), ("patterns",)),
    *_plain("fp8.dequantize_block", "forward", fp8.DEQUANTIZE_BLOCK, ()),
    *_plain("fp8.gemm", "forward", fp8_gemm.GEMM, (0,), fp8_gemm.GEMM_SINGLE, fp8_gemm.GEMM_SLOW),
    *_plain("fp8.linear", "forward", fp8_gemm.LINEAR, (0,), fp8_gemm.LINEAR_SINGLE),
    *_plain("fp8.linear", "backward", fp8_gemm.LINEAR_BACK, (0, 1), fp8_gemm.LINEAR_SINGLE),
    *_plain("pack.e2m1", "forward", fp8.PACK_E2M1, ()),
    *_plain("unpack.e2m1", "forward", fp8.UNPACK_E2M1, ()),
    *_plain("pack.e5m6", "forward", fp8.PACK_E5M6, ()),
    *_plain("unpack.e5m6", "forward", fp8.UNPACK_E5M6, ()),
    *_named("rmsnorm", "forward", norm.FORWARD, (0,), lambda n: n in norm.SINGLE),
    *_named("rmsnorm", "backward", norm.BACKWARD, (0, 1), lambda n: n in norm.SINGLE),
    *_named("router.noaux_tc", "forward", router.FORWARD, (1,), lambda n: n not in router.WIDE),
    *_named("router.noaux_tc", "backward", router_backward.BACKWARD, (0,), lambda n: n not in router_backward.WIDE),
    *_named("linear", "forward", linear.FORWARD, (0,), lambda n: False),
    *_named("linear", "backward", linear.BACKWARD, (0, 1), lambda n: False),
    *_named("rope", "forward", rope.FORWARD, (0,), lambda n: False),
    *_named("rope", "backward", rope.BACKWARD, (0,), lambda n: False),
    *_named("rope.frequencies", "forward", rope.FREQUENCIES, (), lambda n: False),
    *_storing("attention", "forward", attention.FORWARD, (0,), dict.fromkeys(attention.SINGLE, SINGLE)),
    *_storing("attention", "backward", attention_backward.BACKWARD, (0, 1, 2, 3), {}),
    *_storing("attention.varlen", "forward", attention.VARLEN, (0,), dict.fromkeys(attention.SINGLE, SINGLE)),
    *_storing("attention.varlen", "backward", attention_backward.VARLEN, (0, 1, 2), {}),
    *_named("attention.merge", "forward", mla_decode.MERGES, (0, 1), lambda n: False),
    *_storing("attention.merge", "backward", mla_decode.MERGES_BACK, (0, 1), {}),
    *_storing("mla.prefill", "forward", mla.PREFILL, (0, 1, 2), {**dict.fromkeys(mla.SINGLE, SINGLE), "folded-scale": ("fp32", "fp64")}),
    *_storing("mla.prefill", "backward", mla_backward.PREFILL, tuple(range(11)), dict.fromkeys(mla.SINGLE, SINGLE)),
    *_storing("mla.absorb", "forward", mla.ABSORB, (0, 1, 2), dict.fromkeys(mla.SINGLE, SINGLE)),
    *_storing("mla.absorb", "backward", mla_backward.ABSORB, tuple(range(11)), dict.fromkeys(mla.SINGLE, SINGLE)),
    *_storing("mla.decode", "forward", mla_decode.DECODE, (0,), dict.fromkeys(mla_decode.SINGLE, SINGLE)),
    *_storing("mla.decode_fp8", "forward", mla_decode.DECODE_FP8, (0,), dict.fromkeys(mla_decode.SINGLE, SINGLE)),
    *_plain("swiglu", "forward", swiglu.SWIGLU, (0,), swiglu.SINGLE),
    *_plain("swiglu", "backward", swiglu.BACK, (0, 1), swiglu.BACK_SINGLE),
    *_plain("router.softmax", "forward", router_softmax.SOFTMAX, (1,), router_softmax.SINGLE),
    *_plain("router.softmax", "backward", router_softmax.SOFTMAX_BACK, (0,), router_softmax.BACK_SINGLE),
    *_plain("router.balance_loss", "forward", balance.LOSS, (0,)),
    *_plain("router.balance_loss", "backward", balance.LOSS_BACK, (0,)),
    *_plain("router.drop_tokens", "forward", balance.DROP, ()),
    *_plain("router.drop_tokens", "backward", balance.DROP_BACK, ()),
    *_plain("router.bias_update", "forward", balance.BIAS, ()),
    *_plain("moe.permute", "forward", moe.PERMUTE, ()),
    *_plain("moe.permute", "backward", moe_backward.PERMUTE, (0,)),
    *_plain("moe.unpermute", "forward", moe.UNPERMUTE, (0,)),
    *_plain("moe.unpermute", "backward", moe_backward.UNPERMUTE, (0, 1)),
    *_plain("moe.eplb", "forward", eplb.EPLB, ()),
    *_plain("cross_entropy", "forward", loss.LOSS, (0,)),
    *_plain("cross_entropy", "backward", loss.LOSS_BACK, (0,)),
    *_plain("embedding", "forward", loss.EMBEDDING, ()),
    *_plain("embedding", "backward", loss.EMBEDDING_BACK, (0,)),
    *_storing("moe.experts", "forward", moe.EXPERTS, (0,), {**dict.fromkeys(moe.SINGLE, SINGLE), "weights-early": ("fp32", "fp64")}),
    *_storing("moe.experts", "backward", moe_backward.EXPERTS, (0, 1, 2, 3, 4), {}),
    *_storing("moe.layer", "forward", moe.LAYER, (0,), {**dict.fromkeys(moe.LAYER_SINGLE, SINGLE), "weights-early": ("fp32",)}),
    *_storing("moe.layer", "backward", moe_backward.LAYER, tuple(range(8)), dict.fromkeys(moe_backward.LAYER_SINGLE, SINGLE)),
    *_named("cache.append", "forward", cache.APPEND, (), lambda n: False),
    *_named("cache.read", "forward", cache.READ, (), lambda n: False),
]
EAGER = [
    Variant("eager", "rmsnorm", "forward", norm.forward_eager, ("bf16-eager",)),
    Variant("eager-rsqrt", "rmsnorm", "forward", norm.forward_eager_rsqrt, ("bf16-eager",)),
    Variant("eager", "rmsnorm", "backward", norm.backward_eager, ("bf16-eager",)),
    Variant("eager", "router.noaux_tc", "forward", router.forward_eager, ("bf16-eager",)),
    Variant("eager", "router.noaux_tc", "backward", router_backward.eager, ("bf16-eager",)),
    *(Variant("eager", "rope", direction, fn, ("bf16-eager",)) for direction, fn in zip(("forward", "backward"), rope.EAGER, strict=True)),
    Variant("eager", "attention", "forward", attention.EAGER, ("bf16-eager",), (0, 1), stores=True),
    Variant("eager", "attention", "backward", attention_backward.EAGER, ("bf16-eager",), (0, 1, 2, 3), stores=True),
    Variant("eager", "attention.varlen", "forward", attention.VARLEN_EAGER, ("bf16-eager",), (0, 1), stores=True),
    Variant("eager", "attention.varlen", "backward", attention_backward.VARLEN_EAGER, ("bf16-eager",), (0, 1, 2), stores=True),
    Variant("eager", "attention.merge", "forward", mla_decode.merge_eager, ("bf16-eager",)),
    Variant("eager", "attention.merge", "backward", mla_decode.merge_back_eager, ("bf16-eager",), (), stores=True),
    Variant("eager", "mla.decode", "forward", mla_decode.EAGER, ("bf16-eager",), (0, 1), stores=True),
    Variant("eager", "mla.decode_fp8", "forward", mla_decode.EAGER_FP8, ("bf16-eager",), (0, 1), stores=True),
    *(
        Variant(name, op, "forward", fn, ("bf16-eager",), (0, 1, 2), stores=True)
        for name, fn in mla.EAGER.items()
        for op in ("mla.absorb" if "absorbed" in name else "mla.prefill",)  # where all is rounded, a form is judged by its own op
    ),
    *(
        Variant(name, op, "backward", fn, ("bf16-eager",), tuple(range(11)), stores=True)
        for name, fn in mla_backward.EAGER.items()
        for op in ("mla.absorb" if "absorbed" in name else "mla.prefill",)
    ),
]
EAGER += [
    Variant("eager", "swiglu", "forward", swiglu.swiglu_eager, ("bf16-eager",)),
    Variant("eager", "swiglu", "backward", swiglu.swiglu_back_eager, ("bf16-eager",)),
    Variant("eager", "router.softmax", "forward", router_softmax.SOFTMAX_EAGER, ("bf16-eager",)),
    Variant("eager", "router.softmax", "backward", router_softmax.SOFTMAX_BACK_EAGER, ("bf16-eager",)),
    Variant("eager", "router.balance_loss", "forward", balance.LOSS_EAGER, ("bf16-eager",)),
    Variant("eager", "router.balance_loss", "backward", balance.LOSS_BACK_EAGER, ("bf16-eager",)),
    Variant("eager", "cross_entropy", "forward", loss.loss_eager, ("bf16-eager",)),
    Variant("eager", "cross_entropy", "backward", loss.loss_back_eager, ("bf16-eager",)),
    Variant("eager", "moe.permute", "backward", moe_backward.PERMUTE_EAGER, ("bf16-eager",)),
    Variant("eager", "moe.unpermute", "forward", moe.UNPERMUTE_EAGER, ("bf16-eager",)),
    Variant("eager", "moe.unpermute", "backward", moe_backward.UNPERMUTE_EAGER, ("bf16-eager",)),
    Variant("eager", "moe.experts", "forward", moe.EXPERTS_EAGER, ("bf16-eager",), (0,), stores=True),
    Variant("eager", "moe.experts", "backward", moe_backward.EXPERTS_EAGER, ("bf16-eager",), tuple(range(5)), stores=True),
    Variant("eager", "moe.layer", "forward", moe.LAYER_EAGER, ("bf16-eager",), (0,), stores=True),
    Variant("eager", "moe.layer", "backward", moe_backward.LAYER_EAGER, ("bf16-eager",), tuple(range(8)), stores=True),
]
EAGER += [Variant(name, op, way, fn, ("bf16-eager",), rounded, stores=told) for op, way, name, fn, rounded, told in eager.entries()]
EAGER += [Variant("eager-torch", op, way, fn, ("bf16-eager",), stores=told) for op, way, fn, _, told in frameworks.entries("bfloat16")]
VARIANTS += EAGER
VARIANTS += [Variant("torch", op, way, fn, ALL, rounded, stores=told) for op, way, fn, rounded, told in frameworks.entries()]
VARIANTS += [  # what 16 bits hold TF32 holds: operands that tensor cores take as TF32 lose nothing
    *_storing("attention", "forward", {"tf32": attention.TF32}, (0,), {"tf32": ("bf16", "fp16")}),
    *_storing("attention.varlen", "forward", {"tf32": attention.VARLEN_TF32}, (0,), {"tf32": ("bf16", "fp16")}),
    *_storing("mla.decode", "forward", {"tf32": mla_decode.TF32}, (0,), {"tf32": ("bf16", "fp16")}),
    *(
        Variant("tf32", "linear", way, fn, ("bf16", "fp16"), rounded)
        for way, fn, rounded in (("forward", linear.TF32, (0,)), ("backward", linear.TF32_BACK, (0, 1)))
    ),
]
WHOLE: tuple[tuple[str, Mapping[str, Callable], Mapping[str, Callable], Mapping[str, tuple[Callable, Callable]]], ...] = (
    ("block", block.FORWARD, block.BACKWARD, block.EAGER),
    ("mtp", mtp.FORWARD, mtp.BACKWARD, mtp.EAGER),
    ("mtp.loss", mtp.LOSS, mtp.LOSS_BACK, mtp.LOSS_EAGER),
    ("model", model.FORWARD, model.BACKWARD, model.EAGER),
)
ACTIVATIONS = {"mtp": (0, 1), "model": (0, 1)}  # of a forward, the outputs that are real; the last of any is a choice


def _whole(op: str, direction: str) -> tuple[int, ...]:
    """The outputs that are left to be rounded; of a backward all, and there are fewer than this."""
    return ACTIVATIONS.get(op, (0,)) if direction == "forward" else tuple(range(40))


for _op, _forward, _backward, _eager in WHOLE:
    for _way, _fns in (("forward", _forward), ("backward", _backward)):
        VARIANTS += _storing(_op, _way, _fns, _whole(_op, _way), dict.fromkeys(parts.PARTS, SINGLE))
    VARIANTS += [
        Variant(name, _op, way, fn, ("bf16-eager",), _whole(_op, way), stores=True)
        for name, pair in _eager.items()
        for way, fn in zip(("forward", "backward"), pair, strict=True)
    ]
VARIANTS += [Variant(name, op, way, fn, precisions, _whole(op, way)) for op, way, name, fn, precisions in torch_model.entries()]
FAST_EXP = Variant("fast-exp", "router.noaux_tc", "forward", router.FAST, SINGLE, (1,))
ROUNDED_FIRST = [  # for cast_order="cast_then_weight"
    Variant("cast-first", "rmsnorm", "forward", norm.forward_cast_first, ("bf16",)),
    Variant("cast-first", "rmsnorm", "backward", norm.backward_cast_first, ("bf16",)),
]
COS_SIN_STORED = [  # for cos_sin="stored"
    *(Variant("stored", "rope", d, fn, ("bf16",), (0,)) for d, fn in zip(("forward", "backward"), rope.STORED_FUSED, strict=True)),
    *(Variant("stored", "rope", d, fn, ("bf16-eager",)) for d, fn in zip(("forward", "backward"), rope.STORED, strict=True)),
]
SILU_STORED = [  # for silu="stored"
    Variant("stored", "swiglu", "forward", swiglu.swiglu_stored, ("bf16",), (0,), stores=True),
]
