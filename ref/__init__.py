"""The mathematics: one topic a file, forward and backward side by side, on any array that follows the array API.

Letters: b batch, s query position, t key position, n flattened tokens, h head, d model width, c kv_lora_rank, r rope width,
e expert, k top-k slot.
"""

from .cast import decode, encode, round_to
from .formats import BF16, E4M3FN, E5M2, FORMATS, FP16, FP32, FP64, Format
from .fp8 import RECIPES, Recipe, dequantize_tile_fwd, quantize_tile_fwd
from .norm import rmsnorm_bwd, rmsnorm_fwd
from .op import OPS, Case, Op, op_named
from .router import router_noaux_tc_bwd, router_noaux_tc_fwd
from .xp import xp_of

__all__ = [
    "BF16",
    "E4M3FN",
    "E5M2",
    "FORMATS",
    "FP16",
    "FP32",
    "FP64",
    "OPS",
    "RECIPES",
    "Case",
    "Format",
    "Op",
    "Recipe",
    "decode",
    "dequantize_tile_fwd",
    "encode",
    "op_named",
    "quantize_tile_fwd",
    "rmsnorm_bwd",
    "rmsnorm_fwd",
    "round_to",
    "router_noaux_tc_bwd",
    "router_noaux_tc_fwd",
    "xp_of",
]
