"""The configurations that were shipped, and those that a config.json publishes. Spec §0."""

import dataclasses
import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

# What a config.json says that the mathematics of this project does not depend on.
IGNORED = frozenset(
    [
        "architectures",
        "auto_map",
        "model_type",
        "torch_dtype",
        "dtype",
        "transformers_version",
        "use_cache",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "attention_dropout",
        "initializer_range",
        "pretraining_tp",
        "ep_size",
        "aux_loss_alpha",
        "seq_aux",
        "num_key_value_heads",
        "quantization_config",
        "_name_or_path",
        "head_dim",
        "qk_head_dim",
        "output_router_logits",
        "router_aux_loss_coef",
        "num_local_experts",
        "first_k_dense",
        "mlp_layer_types",
    ]
)

# What these models have in common; another value would be another model.
FIXED = {
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "rope_interleave": True,
}
KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


@dataclass(frozen=True)
class Config:
    """A model's shapes and constants, under the names of DeepSeek's published config.json. YaRN's are those of its rope_scaling."""

    hidden_size: int
    num_attention_heads: int
    kv_lora_rank: int = 512
    q_lora_rank: int | None = 1536
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 163840
    factor: float = 40.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0
    vocab_size: int = 129280
    num_hidden_layers: int = 61
    first_k_dense_replace: int = 3
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    topk_method: str = "noaux_tc"
    scoring_func: str = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    num_nextn_predict_layers: int = 0  # MTP modules, after the last layer
    scale_fmt: str | None = None  # "ue8m0": the scales of FP8 weights and activations are powers of two

    def attention(self) -> dict[str, Any]:
        """The attributes of mla.prefill and mla.absorb."""
        sizes = ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
        shared = {name: getattr(self, name) for name in (*sizes, *YARN)}
        return {**shared, "theta": self.rope_theta, "max_position": self.max_position_embeddings}

    def moe(self) -> dict[str, Any]:
        """The attributes of moe.layer."""
        shared = ("num_experts_per_tok", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor")
        method = "noaux_tc" if self.topk_method == "noaux_tc" else "softmax"  # greedy and group_limited_greedy are one: n_group=1 or more
        scoring = "sqrtsoftplus" if self.scoring_func == "sqrtsoftplus" else "sigmoid"
        return {**{name: getattr(self, name) for name in shared}, "topk_method": method, "scoring": scoring}

    def norms(self) -> dict[str, float]:
        """The epsilons of a block. The latents' norms keep 1e-6, as in DeepSeek's and Hugging Face's code, whatever rms_norm_eps is."""
        return {"rms_norm_eps": self.rms_norm_eps, "latent_norm_eps": 1e-6}

    def block(self) -> dict[str, Any]:
        """The attributes of block and model."""
        return {**self.attention(), **self.moe(), **self.norms()}

    @classmethod
    def preset(cls, name: str) -> "Config":
        """One of the released configurations, by name."""
        if name not in PRESETS:
            near = difflib.get_close_matches(name, PRESETS, n=2, cutoff=0.3)
            raise ValueError(
                f"unknown preset {name!r}; " + (f"did you mean {' or '.join(near)}?" if near else f"expected {', '.join(PRESETS)}")
            )
        return PRESETS[name]

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Config":
        """Reads config.json (the file, or the folder that holds it); unknown or contradictory fields are refused by name."""
        file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
        try:
            found = json.loads(file.read_text())
        except FileNotFoundError as error:
            raise ValueError(f"there is no {file}; expected a config.json") from error
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} is no config.json: {error}") from error
        return cls.from_dict(found, str(file))

    @classmethod
    def from_dict(cls, found: Any, where: str = "config") -> "Config":
        if not isinstance(found, dict):
            raise ValueError(f"{where} is {type(found).__name__}; expected an object")
        for name, value in FIXED.items():
            if found.get(name, value) not in (value, None):
                raise ValueError(f"{where}: {name} is {json.dumps(found[name])}; expected {json.dumps(value)}")
        own = {f.name for f in dataclasses.fields(cls)}
        found = {**found, **_rope(found.get("rope_parameters"), found, where)}
        scaling = found.get("rope_scaling")
        fields = {k: v for k, v in found.items() if k not in ("rope_scaling", "rope_parameters", *FIXED, *IGNORED)}
        for name in fields:
            if name not in own or name in YARN:
                near = difflib.get_close_matches(name, own, n=1, cutoff=0.6)
                raise ValueError(f"{where}: unknown field {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
        for name in ("hidden_size", "num_attention_heads"):
            if name not in fields:
                raise ValueError(f"{where}: {name} is missing")
        quantization = found.get("quantization_config") or {}
        config = cls(**{**fields, **_yarn(scaling, where), "scale_fmt": quantization.get("scale_fmt", fields.get("scale_fmt"))})
        config.check(where)
        _check_derived(found, config, where)
        return config

    def check(self, where: str = "config") -> None:
        """Refuses by name what is of another kind than its field, or contradicts itself."""
        for name, hint in get_type_hints(type(self)).items():  # text where a number belongs would only be met somewhere in the arithmetic
            value, kinds = getattr(self, name), get_args(hint) or (hint,)
            fits = isinstance(value, (*kinds, int) if float in kinds else kinds)
            if not fits or (isinstance(value, bool) and bool not in kinds):  # bool is a subclass of int
                raise ValueError(f"{where}: {name} is {value!r}; expected {KINDS[kinds[0]]}")
        for name in (
            "hidden_size",
            "num_attention_heads",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
            "vocab_size",
        ):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{where}: {name} is {value}; expected a positive integer")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"{where}: qk_rope_head_dim is {self.qk_rope_head_dim}; expected an even number")
        if self.n_group < 1 or self.n_routed_experts % self.n_group:
            raise ValueError(f"{where}: n_group is {self.n_group}; expected a divisor of n_routed_experts = {self.n_routed_experts}")
        if not 1 <= self.topk_group <= self.n_group:
            raise ValueError(f"{where}: topk_group is {self.topk_group}; expected 1 to n_group = {self.n_group}")
        left = self.n_routed_experts // self.n_group * self.topk_group
        if not 1 <= self.num_experts_per_tok <= left:
            raise ValueError(
                f"{where}: num_experts_per_tok is {self.num_experts_per_tok}; expected 1 to {left}, the experts left by the groups"
            )
        if self.num_nextn_predict_layers < 0:
            raise ValueError(f"{where}: num_nextn_predict_layers is {self.num_nextn_predict_layers}; expected 0 or a positive integer")
        if self.factor < 1:
            raise ValueError(f"{where}: rope_scaling factor is {self.factor}; expected >= 1")


YARN = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def _rope(parameters: Any, found: dict[str, Any], where: str) -> dict[str, Any]:
    """transformers 5's rope_parameters, under the names that were published: rope_theta and rope_scaling."""
    if parameters is None or found.get("rope_scaling"):
        return {}
    if not isinstance(parameters, dict):
        raise ValueError(f"{where}: rope_parameters is {type(parameters).__name__}; expected an object")
    fields = {"rope_theta": parameters["rope_theta"]} if "rope_theta" in parameters else {}
    if parameters.get("rope_type", "default") != "default":
        fields["rope_scaling"] = {name: parameters[name] for name in ("rope_type", *YARN) if parameters.get(name) is not None}
    return fields


def _yarn(scaling: Any, where: str) -> dict[str, Any]:
    """rope_scaling's fields; without one there is no YaRN (factor 1)."""
    if scaling is None:
        return {"factor": 1.0}
    kind = scaling.get("type", scaling.get("rope_type"))
    if kind != "yarn":
        raise ValueError(f"{where}: rope_scaling type is {kind!r}; expected 'yarn'")
    for name in scaling:
        if name not in (*YARN, "type", "rope_type", "rope_theta"):
            raise ValueError(f"{where}: unknown field rope_scaling.{name}")
    if "factor" not in scaling:
        raise ValueError(f"{where}: rope_scaling.factor is missing")
    absent = {"mscale": 0.0, "mscale_all_dim": 0.0}  # the amplitude is then m(1), and the softmax scale has no m²
    return {**absent, **{name: scaling[name] for name in YARN if name in scaling}}


def _check_derived(found: dict[str, Any], config: "Config", where: str) -> None:
    """Fields that follow from others must agree with them."""
    derived = {
        "qk_head_dim": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "num_key_value_heads": config.num_attention_heads,
        "num_local_experts": config.n_routed_experts,
    }
    for name, expected in derived.items():
        if found.get(name) is not None and found[name] != expected:
            raise ValueError(f"{where}: {name} is {found[name]!r}; its other fields make it {expected}")


_V2 = {"vocab_size": 102400, "mscale": 0.707, "mscale_all_dim": 0.707, "first_k_dense_replace": 1, "topk_method": "group_limited_greedy"}
_V2 |= {"scoring_func": "softmax", "norm_topk_prob": False}
_V3 = Config(hidden_size=7168, num_attention_heads=128, num_nextn_predict_layers=1)
PRESETS = {
    "v2-lite": Config(
        **{**_V2, "topk_method": "greedy"},
        hidden_size=2048,
        num_attention_heads=16,
        q_lora_rank=None,
        num_hidden_layers=27,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
    ),
    "v2": Config(
        **_V2,
        hidden_size=5120,
        num_attention_heads=128,
        num_hidden_layers=60,
        intermediate_size=12288,
        moe_intermediate_size=1536,
        n_routed_experts=160,
        n_shared_experts=2,
        num_experts_per_tok=6,
        n_group=8,
        topk_group=3,
        routed_scaling_factor=16.0,
    ),
    "v3": _V3,
    "r1": _V3,
    "v3.1": dataclasses.replace(_V3, scale_fmt="ue8m0"),
    "kimi-k2": dataclasses.replace(
        _V3,
        num_nextn_predict_layers=0,
        num_attention_heads=64,
        vocab_size=163840,
        first_k_dense_replace=1,
        n_routed_experts=384,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.827,
        rope_theta=50000.0,
        max_position_embeddings=131072,
        factor=32.0,
        beta_fast=1.0,
    ),
    "moonlight": dataclasses.replace(
        _V3,
        num_nextn_predict_layers=0,
        hidden_size=2048,
        num_attention_heads=16,
        q_lora_rank=None,
        vocab_size=163840,
        num_hidden_layers=27,
        first_k_dense_replace=1,
        intermediate_size=11264,
        moe_intermediate_size=1408,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.446,
        rope_theta=50000.0,
        max_position_embeddings=8192,
        factor=1.0,
        rms_norm_eps=1e-5,
    ),
}

# Small models with every part of the large ones, for tests and fixtures. No two widths are alike, most are no multiple of 128, all are of
# 8, which torch's grouped products of 16-bit numbers need.
_TINY = {
    "hidden_size": 208,
    "num_attention_heads": 4,
    "kv_lora_rank": 72,
    "q_lora_rank": 104,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "vocab_size": 1024,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "intermediate_size": 320,
    "moe_intermediate_size": 56,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
}
PRESETS |= {
    "tiny-v2": dataclasses.replace(PRESETS["v2"], **_TINY),
    "tiny-v2-lite": dataclasses.replace(PRESETS["v2-lite"], **{**_TINY, "q_lora_rank": None, "n_group": 1, "topk_group": 1}),
    "tiny-v3": dataclasses.replace(_V3, **_TINY),
    "tiny-v3.1": dataclasses.replace(PRESETS["v3.1"], **_TINY),
    "tiny-k2": dataclasses.replace(PRESETS["kimi-k2"], **{**_TINY, "n_routed_experts": 24, "n_group": 1, "topk_group": 1}),
}
