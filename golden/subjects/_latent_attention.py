"""DeepSeek's attention as transformers has it, one module called alone; what its V2 and V3 files share."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

YARN = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def float32_inside(x: torch.Tensor) -> None:
    if x.dtype == torch.float64:
        raise NotImplementedError("transformers computes this in float32")


class Latents:
    """Stands where a cache stands: it sees c_kv and the rotated k_pe before they are expanded, and puts earlier tokens before them."""

    def __init__(self, weights: dict[str, torch.Tensor]):
        self.earlier = weights.pop("c_kv_cache", None), weights.pop("k_pe_cache", None)

    def update(self, c_kv: torch.Tensor, k_pe: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.c_kv, self.k_pe = c_kv[:, 0], k_pe[:, 0]
        before = self.earlier
        if before[0] is None or before[1] is None:
            return c_kv, k_pe
        return torch.cat([before[0][:, None], c_kv], dim=2), torch.cat([before[1][:, None], k_pe], dim=2)


def causal_mask(x: torch.Tensor, t: int, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """What is added to the scores [.,.,s,t]: -inf for the future, and for the other sequences of a packed row"""
    s = x.shape[1]
    hidden = torch.ones(s, t, dtype=torch.bool).triu(1 + t - s)
    if cu_seqlens is not None:
        owner = torch.bucketize(torch.arange(s), cu_seqlens, right=True)
        hidden |= owner[:, None] != owner[None, :]
    return torch.zeros(s, t, dtype=x.dtype).masked_fill(hidden, float("-inf"))[None, None]


class Family(NamedTuple):
    """The classes of one model: configuration, attention, rotary embedding; how it turns q and k (by the layout it reads); the layout it
    writes."""

    config: type
    attention: type
    rotary: type
    turns: Mapping[str, Callable]
    writes: str

    def configured(self, r: int, attrs: Mapping[str, Any], **sizes: Any) -> Any:
        """rope_scaling as config.json has it; without a factor there is none."""
        if attrs["yarn_gating"] != "always":
            raise NotImplementedError("transformers always applies YaRN")
        scaling = {"rope_type": "yarn", **{k: attrs[k] for k in YARN}} if attrs["factor"] > 1 else {"rope_type": "default"}
        rope = {**scaling, "rope_theta": attrs["theta"]}
        config = self.config(rope_parameters=rope, qk_rope_head_dim=r, max_position_embeddings=attrs["max_position"], **sizes)
        config._attn_implementation = "eager"
        config.head_dim = r
        return config

    def attend(self, x: torch.Tensor, positions: torch.Tensor, weights: dict, attrs: dict) -> tuple[torch.Tensor, ...]:
        """y, c_kv, k_pe by the model's own module, which is given our weights and, in its cache's place, `Latents`."""
        float32_inside(x)
        if attrs["rope_layout_out"] != self.writes or attrs["rms_norm_eps"] != 1e-6 or attrs["rope_layout_in"] not in self.turns:
            raise NotImplementedError(f"{self.attention.__name__} writes rope {self.writes}, and its inner norms have an eps of 1e-6")
        weights = dict(weights)
        latents, cu_seqlens = Latents(weights), weights.pop("cu_seqlens", None)
        h = attrs["num_attention_heads"]
        sizes = {name: attrs[name] for name in ("qk_nope_head_dim", "v_head_dim", "kv_lora_rank")}
        sizes |= {"hidden_size": h, "num_attention_heads": h, "num_key_value_heads": h}
        sizes["q_lora_rank"] = weights["q_a_proj"].shape[0] if "q_a_proj" in weights else None
        config = self.configured(attrs["qk_rope_head_dim"], attrs, **sizes)
        config.hidden_size = x.shape[-1]  # set here, since V2's configuration wants a multiple of h, for no reason in its mathematics
        config.rope_interleave = attrs["rope_layout_in"] == "interleaved"
        layer = self.attention(config, 0)
        for name, weight in weights.items():
            del getattr(layer, name).weight
            getattr(layer, name).weight = weight  # the tensor itself, for autograd
        s = x.shape[1]
        mask = causal_mask(x, s if latents.earlier[0] is None else s + latents.earlier[0].shape[1], cu_seqlens)
        y = layer(hidden_states=x, attention_mask=mask, past_key_values=latents, position_embeddings=self.rotary(config)(x, positions))[0]
        return y, latents.c_kv, latents.k_pe

    def functions(self) -> tuple[Callable, ...]:
        """rope.frequencies, rope and mla.prefill, each with its backward where it has one, under the ops' names for their inputs."""

        def frequencies(r: int, **attrs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            rotary = self.rotary(self.configured(r, attrs))
            return rotary.inv_freq, torch.tensor(float(rotary.attention_scaling))

        def rope(x: torch.Tensor, positions: torch.Tensor, **attrs: Any) -> torch.Tensor:
            float32_inside(x)
            if attrs["layout_out"] != self.writes or attrs["layout_in"] not in self.turns:
                raise NotImplementedError(f"{self.rotary.__name__} reads {' or '.join(self.turns)} and writes {self.writes}")
            turned = self.rotary(self.configured(x.shape[-1], attrs))(x, positions[None])
            heads_first = x.transpose(0, 1)[None]  # [1,h,n,r]
            turn = self.turns[attrs["layout_in"]]
            both = turn(heads_first, heads_first, *(turned if isinstance(turned, tuple) else (turned,)))
            return both[0][0].transpose(0, 1)

        def rope_bwd(x: torch.Tensor, positions: torch.Tensor, dy: torch.Tensor, **attrs: Any) -> torch.Tensor:
            x.requires_grad_()
            return torch.autograd.grad(rope(x, positions, **attrs), x, dy)[0]

        def prefill(x: torch.Tensor, positions: torch.Tensor, **arguments: Any) -> tuple[torch.Tensor, ...]:
            return self.attend(x, positions, *split(arguments))

        def prefill_bwd(
            x: torch.Tensor, positions: torch.Tensor, dy: torch.Tensor, dc_kv: torch.Tensor, dk_pe: torch.Tensor, **arguments: Any
        ) -> tuple[torch.Tensor, ...]:
            weights, attrs = split(arguments)
            leaves = [x.requires_grad_(), *(w.requires_grad_() for w in weights.values() if w.is_floating_point())]
            return torch.autograd.grad(self.attend(x, positions, weights, attrs), leaves, (dy, dc_kv, dk_pe))

        return frequencies, rope, rope_bwd, prefill, prefill_bwd


def split(arguments: dict) -> tuple[dict, dict]:
    """Arrays, and attributes"""
    arrays = {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    return arrays, {k: v for k, v in arguments.items() if k not in arrays}
