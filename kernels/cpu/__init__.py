"""The reference's ops on the CPU (Numba), each under its name: ``cast.e4m3fn``, ``encode.e4m3fn``, ``fp8.quantize_tile``, ``rmsnorm``...

Importing compiles nothing: an op compiles at its first call, once per machine (the result is cached on disk).
"""

from . import cast, fp8, router
from .attention import attention, attention_bwd, attention_merge, attention_merge_bwd, attention_varlen, attention_varlen_bwd
from .block import block, block_bwd
from .cast import decode, encode
from .eplb import moe_eplb
from .fp8_gemm import fp8_gemm
from .fp8_linear import fp8_linear, fp8_linear_bwd
from .linear import linear, linear_bwd
from .loss import cross_entropy, cross_entropy_bwd, embedding, embedding_bwd
from .mla import mla_absorb, mla_absorb_bwd, mla_prefill, mla_prefill_bwd
from .mla_cache import cache_append, cache_read
from .mla_decode import mla_decode, mla_decode_fp8
from .model import model, model_bwd
from .moe import moe_experts, moe_experts_bwd, moe_layer, moe_layer_bwd
from .moe_permute import moe_permute, moe_permute_bwd, moe_unpermute, moe_unpermute_bwd
from .mtp import mtp, mtp_bwd, mtp_loss, mtp_loss_bwd
from .norm import rmsnorm, rmsnorm_bwd
from .pack import pack_e2m1, pack_e5m6, unpack_e2m1, unpack_e5m6
from .rotary import rope, rope_bwd, rope_frequencies
from .swiglu import swiglu, swiglu_bwd

__all__ = [
    "attention",
    "attention_bwd",
    "attention_merge",
    "attention_merge_bwd",
    "attention_varlen",
    "attention_varlen_bwd",
    "block",
    "block_bwd",
    "cache_append",
    "cache_read",
    "cast",
    "cross_entropy",
    "cross_entropy_bwd",
    "decode",
    "embedding",
    "embedding_bwd",
    "encode",
    "fp8",
    "fp8_gemm",
    "fp8_linear",
    "fp8_linear_bwd",
    "linear",
    "linear_bwd",
    "mla_absorb",
    "mla_absorb_bwd",
    "mla_decode",
    "mla_decode_fp8",
    "mla_prefill",
    "mla_prefill_bwd",
    "model",
    "model_bwd",
    "moe_eplb",
    "moe_experts",
    "moe_experts_bwd",
    "moe_layer",
    "moe_layer_bwd",
    "moe_permute",
    "moe_permute_bwd",
    "moe_unpermute",
    "moe_unpermute_bwd",
    "mtp",
    "mtp_bwd",
    "mtp_loss",
    "mtp_loss_bwd",
    "pack_e2m1",
    "pack_e5m6",
    "rmsnorm",
    "rmsnorm_bwd",
    "rope",
    "rope_bwd",
    "rope_frequencies",
    "router",
    "swiglu",
    "swiglu_bwd",
    "unpack_e2m1",
    "unpack_e5m6",
]
