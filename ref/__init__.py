"""The mathematics: one topic a file, forward and backward side by side, on any array that follows the array API.

Letters: b batch, s query position, t key position, n flattened tokens, h head, d model width, c kv_lora_rank, r rope width,
e expert, k top-k slot, v vocabulary, l layer (p dense ones, m with experts), p in mtp.loss a module's depth.
"""

from .attention import attention_bwd, attention_fwd
from .attention_parts import attention_merge_bwd, attention_merge_fwd, attention_varlen_bwd, attention_varlen_fwd
from .balance import balance_loss_bwd, balance_loss_fwd, bias_update_fwd, drop_tokens_bwd, drop_tokens_fwd
from .block import block_bwd, block_fwd
from .cast import decode, encode, round_to
from .config import Config
from .embedding import embedding_bwd, embedding_fwd
from .eplb import eplb_fwd, nodes_touched
from .expert_parallel import experts_over_ranks
from .formats import (
    BF16,
    E2M1,
    E4M3FN,
    E4M3FNUZ,
    E5M2,
    E5M2FNUZ,
    E5M6,
    E8M0,
    FORMATS,
    FP16,
    FP32,
    FP64,
    TF32,
    Format,
)
from .fp8 import dequantize_tile_fwd, quantize_tile_fwd
from .fp8_block import dequantize_block_fwd, quantize_block_fwd
from .fp8_gemm import fp8_gemm_fwd
from .fp8_linear import fp8_linear_bwd, fp8_linear_fwd
from .fp8_recipes import RECIPES, Recipe
from .generation import Generated, generate
from .linear import linear_bwd, linear_fwd
from .loss import cross_entropy_bwd, cross_entropy_fwd
from .mla import mla_absorb_bwd, mla_absorb_fwd, mla_prefill_bwd, mla_prefill_fwd
from .mla_cache import cache_append_fwd, cache_read_fwd
from .mla_decode import mla_decode_fp8_fwd, mla_decode_fwd
from .model import layer_bwd, layer_fwd, model_bwd, model_fwd
from .model_stacked import stacked_bwd, stacked_fwd
from .moe import moe_experts_bwd, moe_experts_fwd, moe_layer_bwd, moe_layer_fwd
from .moe_permute import moe_permute_bwd, moe_permute_fwd, moe_unpermute_bwd, moe_unpermute_fwd
from .mtp import mtp_bwd, mtp_fwd
from .mtp_loss import mtp_loss_bwd, mtp_loss_fwd
from .norm import rmsnorm_bwd, rmsnorm_fwd
from .op import OPS, Case, Op, op_named
from .pack import pack_e2m1_fwd, pack_e5m6_fwd, unpack_e2m1_fwd, unpack_e5m6_fwd
from .rope import rope_bwd, rope_fwd
from .router import router_noaux_tc_bwd, router_noaux_tc_fwd
from .router_softmax import router_softmax_bwd, router_softmax_fwd
from .swiglu import swiglu_bwd, swiglu_fwd
from .xp import xp_of
from .yarn import rope_frequencies_fwd

__all__ = [
    "BF16",
    "E2M1",
    "E4M3FN",
    "E4M3FNUZ",
    "E5M2",
    "E5M2FNUZ",
    "E5M6",
    "E8M0",
    "FORMATS",
    "FP16",
    "FP32",
    "FP64",
    "OPS",
    "RECIPES",
    "TF32",
    "Case",
    "Config",
    "Format",
    "Generated",
    "Op",
    "Recipe",
    "attention_bwd",
    "attention_fwd",
    "attention_merge_bwd",
    "attention_merge_fwd",
    "attention_varlen_bwd",
    "attention_varlen_fwd",
    "balance_loss_bwd",
    "balance_loss_fwd",
    "bias_update_fwd",
    "block_bwd",
    "block_fwd",
    "cache_append_fwd",
    "cache_read_fwd",
    "cross_entropy_bwd",
    "cross_entropy_fwd",
    "decode",
    "dequantize_block_fwd",
    "dequantize_tile_fwd",
    "drop_tokens_bwd",
    "drop_tokens_fwd",
    "embedding_bwd",
    "embedding_fwd",
    "encode",
    "eplb_fwd",
    "experts_over_ranks",
    "fp8_gemm_fwd",
    "fp8_linear_bwd",
    "fp8_linear_fwd",
    "generate",
    "layer_bwd",
    "layer_fwd",
    "linear_bwd",
    "linear_fwd",
    "mla_absorb_bwd",
    "mla_absorb_fwd",
    "mla_decode_fp8_fwd",
    "mla_decode_fwd",
    "mla_prefill_bwd",
    "mla_prefill_fwd",
    "model_bwd",
    "model_fwd",
    "moe_experts_bwd",
    "moe_experts_fwd",
    "moe_layer_bwd",
    "moe_layer_fwd",
    "moe_permute_bwd",
    "moe_permute_fwd",
    "moe_unpermute_bwd",
    "moe_unpermute_fwd",
    "mtp_bwd",
    "mtp_fwd",
    "mtp_loss_bwd",
    "mtp_loss_fwd",
    "nodes_touched",
    "op_named",
    "pack_e2m1_fwd",
    "pack_e5m6_fwd",
    "quantize_block_fwd",
    "quantize_tile_fwd",
    "rmsnorm_bwd",
    "rmsnorm_fwd",
    "rope_bwd",
    "rope_frequencies_fwd",
    "rope_fwd",
    "round_to",
    "router_noaux_tc_bwd",
    "router_noaux_tc_fwd",
    "router_softmax_bwd",
    "router_softmax_fwd",
    "stacked_bwd",
    "stacked_fwd",
    "swiglu_bwd",
    "swiglu_fwd",
    "unpack_e2m1_fwd",
    "unpack_e5m6_fwd",
    "xp_of",
]
