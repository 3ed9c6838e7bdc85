"""Hugging Face transformers' own DeepSeek-V2 modules, called alone; torch's autograd for the backward."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers.models.deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention, DeepseekV2RotaryEmbedding, apply_rotary_emb

from ._latent_attention import Family

FRAMEWORK = "torch"
V2 = Family(DeepseekV2Config, DeepseekV2Attention, DeepseekV2RotaryEmbedding, {"interleaved": apply_rotary_emb}, "interleaved")
rope_frequencies, rope, rope_bwd, mla_prefill, mla_prefill_bwd = V2.functions()
