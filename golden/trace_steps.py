"""Each canonical tensor of a trace as a function of earlier ones and the weights, made of ref's parts.

A step is text over arrays: float64 for the truth, noisy arrays for the band. What an engine does not show is computed on the way from what
it shows. Tokens lie flat; `runs` copies of them may lie one after the other, each attending to its own.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..ref.config import Config
from ..ref.moe import experts_by
from ..ref.names import is_dense
from ..ref.op import OPS
from ..ref.xp import stored
from ..ref.yarn import Yarn
from .precision import Precision
from .trace_weights import Weights

Array = Any
INNER_EPS = 1e-6  # of the latents' norms, whatever rms_norm_eps says: DeepSeek's and Hugging Face's code have their default
YARN = Yarn._fields

# Where engines differ and none is wrong: by name, the values, the usual one first. What is found is named, not failed.
CONVENTIONS: dict[str, tuple[str, ...]] = {
    "q_layout": ("interleaved", "half"),
    "k_layout": ("interleaved", "half"),
    "cast_order": ("weight_then_cast", "cast_then_weight"),
    "cos_sin": ("float32", "stored"),
    "silu": ("float32", "stored"),
    "routed_scale": ("in the weights", "times the experts' sum", "where both experts are added"),
    "experts": ("routed alone", "with the shared ones"),
}
WIDE = ("cast_order", "cos_sin", "silu")  # nothing to see where activations are as wide as the arithmetic


@dataclass(frozen=True)
class About:
    """What a step needs to know beside tensors: the model, the layer, positions, conventions, and the parts it is made of."""

    config: Config
    weights: Weights
    positions: np.ndarray
    layer: int | None = None
    conventions: Mapping[str, str] = field(default_factory=dict)
    runs: int = 1
    change: Mapping[str, Callable[..., Any]] = field(default_factory=dict)  # an op's name: the forward that takes its place

    def __getattr__(self, name: str) -> str:
        """A convention by its name"""
        if name not in CONVENTIONS:
            raise AttributeError(name)
        return self.conventions.get(name, CONVENTIONS[name][0])

    def part(self, op: str, *arrays: Array, **attrs: Any) -> Any:
        return self.change.get(op, OPS[op].fwd)(*arrays, **attrs)[0]

    def weight(self, name: str) -> Any:
        return self.weights(self.layer, name)

    def rope(self, x: Array, layout: str) -> Array:
        """Of each row's position; x[n,h,r]"""
        attrs = {k: v for k, v in self.config.attention().items() if k in YARN}
        positions = np.tile(self.positions, self.runs)
        return self.part("rope", x, positions, layout_out=layout, cos_sin=self.cos_sin, **attrs)

    def norm(self, x: Array, weight: str, eps: float) -> Array:
        return self.part("rmsnorm", x, self.weight(weight), eps=eps, cast_order=self.cast_order)

    def linear(self, x: Array, weight: str, rows: slice = slice(None)) -> Array:
        return self.part("linear", x, self.weight(weight)[rows])

    def mlp(self, x: Array, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> Array:
        g, u = (stored(self.part("linear", x, w)) for w in (gate, up))
        return self.part("linear", stored(self.part("swiglu", g, u, silu=self.silu)), down)

    @property
    def scale(self) -> float:
        """Of the softmax"""
        yarn = Yarn(**{k: v for k, v in self.config.attention().items() if k in YARN})
        return yarn.softmax_scale(self.config.qk_nope_head_dim + self.config.qk_rope_head_dim)


Step = Callable[[Mapping[str, Array], About], Array]


def embed(t: Mapping[str, Array], a: About) -> Array:
    return a.weights.rows("embed_tokens", np.asarray(t["ids"]))


def attn_norm(t: Mapping[str, Array], a: About) -> Array:
    return a.norm(t["input"], "input_layernorm", a.config.rms_norm_eps)


def attn_q(t: Mapping[str, Array], a: About) -> Array:
    """[q_nope | rope q_pe], q = q_b_proj rmsnorm(q_a_proj x), or q_proj x"""
    x, dn = t["attn.norm"], a.config.qk_nope_head_dim
    if a.config.q_lora_rank is None:
        q = stored(a.linear(x, "q_proj"))
    else:
        c_q = stored(a.norm(stored(a.linear(x, "q_a_proj")), "q_a_layernorm", INNER_EPS))
        q = stored(a.linear(c_q, "q_b_proj"))
    q = q.reshape(x.shape[0], a.config.num_attention_heads, dn + a.config.qk_rope_head_dim)
    return np.concatenate([q[:, :, :dn], a.rope(q[:, :, dn:], a.q_layout)], axis=-1)


def attn_c_kv(t: Mapping[str, Array], a: About) -> Array:
    latent = stored(a.linear(t["attn.norm"], "kv_a_proj_with_mqa", slice(None, a.config.kv_lora_rank)))
    return a.norm(latent, "kv_a_layernorm", INNER_EPS)


def attn_k_pe(t: Mapping[str, Array], a: About) -> Array:
    k = stored(a.linear(t["attn.norm"], "kv_a_proj_with_mqa", slice(a.config.kv_lora_rank, None)))
    return a.rope(k[:, None, :], a.k_layout)[:, 0, :]


def interleaved(x: Array, layout: str) -> Array:
    """Halves put back into pairs"""
    half = x.shape[-1] // 2
    return x if layout == "interleaved" else np.stack([x[..., :half], x[..., half:]], axis=-1).reshape(x.shape)


def attn_o(t: Mapping[str, Array], a: About) -> Array:
    """attention(q, [k_nope | k_pe], v), [k_nope | v] = kv_b_proj c_kv; the queries are those of the last keys"""
    dn, dv, h, runs = a.config.qk_nope_head_dim, a.config.v_head_dim, a.config.num_attention_heads, a.runs
    q, c_kv, k_pe = t["attn.q"], t["attn.c_kv"], interleaved(t["attn.k_pe"], a.k_layout)
    q = np.concatenate([q[..., :dn], interleaved(q[..., dn:], a.q_layout)], axis=-1)
    kv = stored(a.linear(c_kv, "kv_b_proj")).reshape(runs, -1, h, dn + dv)
    k_pe = np.broadcast_to(k_pe.reshape(runs, -1, 1, k_pe.shape[-1]), (*kv.shape[:3], k_pe.shape[-1]))
    k = np.concatenate([kv[..., :dn], k_pe], axis=-1)
    o, _ = a.part("attention", q.reshape(runs, -1, *q.shape[1:]), k, kv[..., dn:], None, scale=a.scale)
    return o.reshape(q.shape[0], h, dv)


def attn_out(t: Mapping[str, Array], a: About) -> Array:
    o = stored(t["attn.o"])
    return a.linear(o.reshape(o.shape[0], -1), "o_proj")


def mid(t: Mapping[str, Array], a: About) -> Array:
    return t["input"] + stored(t["attn.out"])


def mlp_norm(t: Mapping[str, Array], a: About) -> Array:
    return a.norm(t["mid"], "post_attention_layernorm", a.config.rms_norm_eps)


def router_logits(t: Mapping[str, Array], a: About) -> Array:
    return a.linear(t["mlp.norm"], "gate_weight")


def router_attrs(config: Config) -> tuple[str, dict[str, Any]]:
    """The router's op and its attributes"""
    own = config.moe()
    attrs = {"k": own["num_experts_per_tok"], **{n: own[n] for n in ("n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor")}}
    return ("router.noaux_tc", {**attrs, "scoring": own["scoring"]}) if own["topk_method"] == "noaux_tc" else ("router.softmax", attrs)


def router_inputs(logits: Array, a: About) -> list[Array]:
    bias = a.weight("e_score_correction_bias")
    if router_attrs(a.config)[0] != "router.noaux_tc":
        return [logits]
    return [logits, np.zeros(a.config.n_routed_experts) if bias is None else bias]


def topk_idx(t: Mapping[str, Array], a: About) -> Array:
    op, attrs = router_attrs(a.config)
    return a.part(op, *router_inputs(t["router.logits"], a), **attrs)[0]


def topk_weight(t: Mapping[str, Array], a: About) -> Array:
    """Of the experts that were chosen"""
    op, attrs = router_attrs(a.config)
    weight = a.part(op, *router_inputs(t["router.logits"], a), **attrs, topk_idx=np.asarray(t["router.topk_idx"]))[1]
    return weight if a.routed_scale == "in the weights" else weight / a.config.routed_scaling_factor


def experts_out(t: Mapping[str, Array], a: About) -> Array:
    """Σ_k topk_weight[n,k] FFN_{topk_idx[n,k]}(x[n]), expert by expert"""
    x, idx, weight = t["mlp.norm"], np.asarray(t["router.topk_idx"]), t["router.topk_weight"]
    layer, e = a.layer, a.config.n_routed_experts
    assert layer is not None
    y, _ = experts_by(x, idx, weight, e, lambda i: a.weights.expert(layer, i), silu=a.silu, keep=False)  # type: ignore[arg-type]
    y = y * a.config.routed_scaling_factor if a.routed_scale == "times the experts' sum" else y
    return stored(y) + shared_out(t, a) if a.experts == "with the shared ones" else y


def shared_out(t: Mapping[str, Array], a: About) -> Array:
    return stored(a.mlp(t["mlp.norm"], *(a.weight(name) for name in ("shared_gate", "shared_up", "shared_down"))))


def mlp_out(t: Mapping[str, Array], a: About) -> Array:
    """A dense layer's FFN, or the sum of the routed and the shared experts"""
    if a.layer is not None and is_dense(a.config, a.layer):
        return a.mlp(t["mlp.norm"], *(a.weight(name) for name in ("gate_proj", "up_proj", "down_proj")))
    y = stored(t["experts.out"])
    y = y * a.config.routed_scaling_factor if a.routed_scale == "where both experts are added" else y
    shared = a.config.n_shared_experts and a.experts == "routed alone"
    return y + stored(t["shared.out"]) if shared else y


def output(t: Mapping[str, Array], a: About) -> Array:
    return t["mid"] + stored(t["mlp.out"])


def final_norm(t: Mapping[str, Array], a: About) -> Array:
    return a.norm(t["input"], "norm", a.config.rms_norm_eps)


def logits(t: Mapping[str, Array], a: About) -> Array:
    return a.linear(t["norm"], "lm_head")


STEPS: dict[str, tuple[Step, tuple[str, ...], tuple[str, ...]]] = {  # the text, what it reads, the conventions that it knows
    "embed": (embed, ("ids",), ()),
    "attn.norm": (attn_norm, ("input",), ("cast_order",)),
    "attn.q": (attn_q, ("attn.norm",), ("q_layout", "cast_order", "cos_sin")),
    "attn.c_kv": (attn_c_kv, ("attn.norm",), ("cast_order",)),
    "attn.k_pe": (attn_k_pe, ("attn.norm",), ("k_layout", "cos_sin")),
    "attn.o": (attn_o, ("attn.q", "attn.c_kv", "attn.k_pe"), ()),
    "attn.out": (attn_out, ("attn.o",), ()),
    "mid": (mid, ("input", "attn.out"), ()),
    "mlp.norm": (mlp_norm, ("mid",), ("cast_order",)),
    "router.logits": (router_logits, ("mlp.norm",), ()),
    "router.topk_idx": (topk_idx, ("router.logits",), ()),
    "router.topk_weight": (topk_weight, ("router.logits", "router.topk_idx"), ("routed_scale",)),
    "experts.out": (experts_out, ("mlp.norm", "router.topk_idx", "router.topk_weight"), ("silu", "routed_scale", "experts")),
    "shared.out": (shared_out, ("mlp.norm",), ("silu",)),
    "mlp.out": (mlp_out, ("mlp.norm", "experts.out", "shared.out"), ("silu", "routed_scale", "experts")),
    "output": (output, ("mid", "mlp.out"), ()),
    "norm": (final_norm, ("input",), ("cast_order",)),
    "logits": (logits, ("norm",), ()),
}


def reads(config: Config, layer: int | None, name: str) -> tuple[str, ...]:
    """What a step reads in this layer"""
    if name != "mlp.out" or layer is None:
        return STEPS[name][1]
    if is_dense(config, layer):
        return ("mlp.norm",)
    return ("experts.out", "shared.out") if config.n_shared_experts else ("experts.out",)


def sources(config: Config, layer: int | None, name: str, given: Iterable[str]) -> tuple[set[str], set[str]]:
    """The tensors that a step reads in the end, where only some are given; and the steps on the way, its own among them"""
    there, found, way, left = set(given), set(), {name}, list(reads(config, layer, name))
    while left:
        n = left.pop()
        if n in there:
            found.add(n)
        elif n not in way:
            way.add(n)
            left += reads(config, layer, n)
    return found, way


class Values(Mapping[str, Array]):
    """Tensors by short name: what is given, and what its absence makes to be computed, once."""

    def __init__(self, given: Mapping[str, Array], about: About):
        self.given, self.about = dict(given), about

    def __getitem__(self, name: str) -> Array:
        if name not in self.given:
            if name not in STEPS:
                raise KeyError(name)
            self.given[name] = stored(STEPS[name][0](self, self.about))
        return self.given[name]

    def __iter__(self) -> Any:
        return iter(self.given)

    def __len__(self) -> int:
        return len(self.given)


def value_of(name: str, given: Mapping[str, Array], about: About) -> Array:
    """A step's output from what is given"""
    return STEPS[name][0](Values({k: v for k, v in given.items() if k != name}, about), about)


def other_conventions(about: About, names: Iterable[str], precision: Precision) -> Iterable[dict[str, str]]:
    """Every other set of values of these conventions, those that differ in least first"""
    own = {n: getattr(about, n) for n in names if not (n in WIDE and precision.io is precision.work)}
    if about.config.routed_scaling_factor == 1:
        own.pop("routed_scale", None)
    if not about.config.n_shared_experts:
        own.pop("experts", None)
    sets = [own]
    for name in own:
        sets += [{**s, name: value} for s in sets for value in CONVENTIONS[name] if value != own[name]]
    return sorted((s for s in sets if s != own), key=lambda s: sum(s[n] != own[n] for n in own))
