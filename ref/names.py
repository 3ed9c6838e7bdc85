"""The names of a checkpoint, as Hugging Face and DeepSeek publish them, and the shape that a Config gives each. Spec §9.

Nothing else in the project writes them. The left-hand names are those of the ops (block, mtp, model); their experts are stacked, a
checkpoint's lie one by one.
"""

from .config import Config

MODEL = {"embed_tokens": "model.embed_tokens.weight", "norm": "model.norm.weight", "lm_head": "lm_head.weight"}
EXPERT = ("gate_proj", "up_proj", "down_proj")  # w_gate, w_up, w_down


def is_dense(config: Config, i: int) -> bool:
    """Whether layer i has one FFN and no experts; MTP layers have experts."""
    return i < min(config.first_k_dense_replace, config.num_hidden_layers)


def layer_names(config: Config, i: int) -> dict[str, str]:
    """Each weight of layer i but the routed experts' (expert_names), by the ops' names; from num_hidden_layers on, an MTP layer's too"""
    at = f"model.layers.{i}"
    queries = ["q_proj"] if config.q_lora_rank is None else ["q_a_proj", "q_a_layernorm", "q_b_proj"]
    latents = ["kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"]
    names = {"input_layernorm": f"{at}.input_layernorm.weight"}
    names |= {name: f"{at}.self_attn.{name}.weight" for name in (*queries, *latents)}
    names["post_attention_layernorm"] = f"{at}.post_attention_layernorm.weight"
    if is_dense(config, i):
        names |= {name: f"{at}.mlp.{name}.weight" for name in EXPERT}
    else:
        names["gate_weight"] = f"{at}.mlp.gate.weight"
        if config.topk_method == "noaux_tc":
            names["e_score_correction_bias"] = f"{at}.mlp.gate.e_score_correction_bias"
        if config.n_shared_experts:
            names |= {f"shared_{name.removesuffix('_proj')}": f"{at}.mlp.shared_experts.{name}.weight" for name in EXPERT}
    if i >= config.num_hidden_layers:
        names |= {name: f"{at}.{name}.weight" for name in ("enorm", "hnorm", "eh_proj", "embed_tokens")}
        names |= {"shared_head_norm": f"{at}.shared_head.norm.weight", "shared_head": f"{at}.shared_head.head.weight"}
    return names


def expert_names(i: int, e: int) -> tuple[str, str, str]:
    """w_gate, w_up and w_down of expert e in layer i"""
    gate, up, down = (f"model.layers.{i}.mlp.experts.{e}.{name}.weight" for name in EXPERT)
    return gate, up, down


def layer_shapes(config: Config, i: int) -> dict[str, tuple[int, ...]]:
    """The shapes of layer_names, by the same keys"""
    d, h, c, q = config.hidden_size, config.num_attention_heads, config.kv_lora_rank, config.q_lora_rank or config.hidden_size
    heads, f = h * (config.qk_nope_head_dim + config.qk_rope_head_dim), config.intermediate_size
    g, e, v = config.n_shared_experts * config.moe_intermediate_size, config.n_routed_experts, config.vocab_size
    every = {
        **dict.fromkeys(("input_layernorm", "post_attention_layernorm", "enorm", "hnorm", "shared_head_norm"), (d,)),
        **{"q_proj": (heads, d), "q_a_proj": (q, d), "q_a_layernorm": (q,), "q_b_proj": (heads, q)},
        **{"kv_a_proj_with_mqa": (c + config.qk_rope_head_dim, d), "kv_a_layernorm": (c,)},
        **{"kv_b_proj": (h * (config.qk_nope_head_dim + config.v_head_dim), c), "o_proj": (d, h * config.v_head_dim)},
        **{"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)},
        **{"gate_weight": (e, d), "e_score_correction_bias": (e,)},
        **{"shared_gate": (g, d), "shared_up": (g, d), "shared_down": (d, g)},
        **{"eh_proj": (d, 2 * d), "embed_tokens": (v, d), "shared_head": (v, d)},
    }
    return {name: every[name] for name in layer_names(config, i)}


def expert_shapes(config: Config) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """w_gate[f,d], w_up[f,d] and w_down[d,f]"""
    f, d = config.moe_intermediate_size, config.hidden_size
    return (f, d), (f, d), (d, f)


def shapes(config: Config, mtp: bool = False) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint and its shape, layer by layer; with mtp those of the MTP layers too"""
    d, v = config.hidden_size, config.vocab_size
    found: dict[str, tuple[int, ...]] = {MODEL["embed_tokens"]: (v, d)}
    for i in range(config.num_hidden_layers + (config.num_nextn_predict_layers if mtp else 0)):
        own = layer_shapes(config, i)
        found |= {name: own[key] for key, name in layer_names(config, i).items()}
        if not is_dense(config, i):
            for e in range(config.n_routed_experts):
                found |= dict(zip(expert_names(i, e), expert_shapes(config), strict=True))
    return found | {MODEL["norm"]: (d,), MODEL["lm_head"]: (v, d)}
