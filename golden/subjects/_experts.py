"""DeepSeek's experts as transformers has them, one module called alone; what its V2 and V3 files share."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from ._latent_attention import float32_inside, split

STORED = {"silu": "stored"}  # silu(gate) is rounded to the activations' dtype, then multiplied
SHARED = {"gate_proj": "shared_gate", "up_proj": "shared_up", "down_proj": "shared_down"}


class Given(torch.nn.Module):
    """Stands where a projection stands: whatever goes in, this tensor comes out."""

    def __init__(self, value: torch.Tensor):
        super().__init__()
        self.value = value

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.value


def put(module: torch.nn.Module, **tensors: torch.Tensor) -> None:
    """The tensors themselves in the parameters' places, for autograd"""
    for name, tensor in tensors.items():
        delattr(module, name)
        setattr(module, name, tensor)


def slots(topk_idx: torch.Tensor, dtopk_weight: torch.Tensor, own_idx: torch.Tensor, e: int) -> torch.Tensor:
    """Each slot's gradient, handed to the slot of own_idx[n,k] that holds the same expert"""
    return torch.zeros(len(own_idx), e, dtype=dtopk_weight.dtype).scatter(1, topk_idx, dtopk_weight).gather(1, own_idx)


def without_limit(attrs: Mapping[str, Any]) -> None:
    if attrs["limit"] is not None or attrs["silu"] != "stored":
        raise NotImplementedError("transformers' experts have no limit, and round silu(gate) to the activations' dtype: silu=stored")


class Experts(NamedTuple):
    """The classes of one model: configuration, MLP, grouped experts, and the layer of router, experts and shared experts. `sizes` says how
    the router is configured, and refuses what it does not do."""

    config: type
    mlp: type
    experts: type
    layer: type
    sizes: Callable[[Mapping[str, Any]], dict[str, Any]]

    def activate(self, gate: torch.Tensor, up: torch.Tensor, attrs: Mapping[str, Any]) -> torch.Tensor:
        """The MLP with gate and up for what its first projections give, and no last one."""
        without_limit(attrs)
        mlp = self.mlp(self.config(hidden_size=1, intermediate_size=1, num_attention_heads=1))
        mlp.gate_proj, mlp.up_proj, mlp.down_proj = Given(gate), Given(up), torch.nn.Identity()
        return mlp(gate)

    def configured(self, w_down: torch.Tensor, **sizes: Any) -> Any:
        e, d, f = w_down.shape
        sizes |= {"num_attention_heads": 1}  # V2's configuration wants hidden_size to be a multiple of it
        config = self.config(hidden_size=d, n_routed_experts=e, moe_intermediate_size=f, **sizes)
        config._experts_implementation = "eager"
        return config

    def fill(self, experts: torch.nn.Module, w: Mapping[str, torch.Tensor], attrs: Mapping[str, Any]) -> None:
        without_limit(attrs)
        if attrs["weight_before_down"]:
            raise NotImplementedError("transformers' experts weigh after down_proj")
        put(experts, gate_up_proj=torch.cat([w["w_gate"], w["w_up"]], dim=1), down_proj=w["w_down"])

    def route(self, logits: torch.Tensor, bias: torch.Tensor | None, k: int, attrs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """topk_idx, topk_weight. The router takes hidden states: with the identity for its weight, those are the logits, exactly."""
        float32_inside(logits)
        e = logits.shape[1]
        gate = self.layer(self.configured(torch.empty(e, e, 1), num_experts_per_tok=k, **self.sizes(attrs))).gate
        put(gate, weight=torch.eye(e), **({} if bias is None else {"e_score_correction_bias": bias}))
        _, topk_weight, topk_idx = gate(logits)
        return topk_idx, topk_weight

    def apply(self, x: torch.Tensor, topk_idx: torch.Tensor, w: Mapping[str, torch.Tensor], attrs: Mapping[str, Any]) -> torch.Tensor:
        """Theirs mark a slot that goes nowhere by the number of experts, not by -1."""
        experts = self.experts(self.configured(w["w_down"]))
        self.fill(experts, w, attrs)
        return experts(x, torch.where(topk_idx < 0, len(w["w_down"]), topk_idx), w["topk_weight"])

    def whole(self, x: torch.Tensor, w: Mapping[str, torch.Tensor], attrs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """y, topk_idx of the whole layer. Where there are no shared experts, theirs add zeros."""
        float32_inside(x)
        config = self.configured(w["w_down"], num_experts_per_tok=attrs["num_experts_per_tok"], **self.sizes(attrs))
        layer = self.layer(config)
        self.fill(layer.experts, w, attrs)
        bias = w.get("e_score_correction_bias")
        put(layer.gate, weight=w["gate_weight"], **({} if bias is None else {"e_score_correction_bias": bias}))
        layer.shared_experts = Given(torch.zeros_like(x))
        if "shared_gate" in w:
            layer.shared_experts = self.mlp(config, intermediate_size=len(w["shared_gate"]))
            for name, own in SHARED.items():
                put(getattr(layer.shared_experts, name), weight=w[own])
        chosen: list[torch.Tensor] = []
        layer.gate.register_forward_hook(lambda _gate, _arguments, routed: chosen.append(routed[2]))
        return layer(x), chosen[0]

    def functions(self) -> tuple[Callable, ...]:
        """swiglu, moe.experts and moe.layer, each with its backward, under the ops' names for their inputs."""

        def swiglu(gate: torch.Tensor, up: torch.Tensor, **attrs: Any) -> torch.Tensor:
            return self.activate(gate, up, attrs)

        def swiglu_bwd(gate: torch.Tensor, up: torch.Tensor, dy: torch.Tensor, **attrs: Any) -> tuple[torch.Tensor, ...]:
            leaves = gate.requires_grad_(), up.requires_grad_()
            return torch.autograd.grad(self.activate(gate, up, attrs), leaves, dy)

        def experts(x: torch.Tensor, topk_idx: torch.Tensor, **arguments: Any) -> torch.Tensor:
            return self.apply(x, topk_idx, *split(arguments))

        def experts_bwd(x: torch.Tensor, topk_idx: torch.Tensor, dy: torch.Tensor, **arguments: Any) -> tuple[torch.Tensor, ...]:
            w, attrs = split(arguments)
            leaves = [t.requires_grad_() for t in (x, *w.values())]
            return torch.autograd.grad(self.apply(x, topk_idx, w, attrs), leaves, dy)

        def layer(x: torch.Tensor, gate_weight: torch.Tensor, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
            w, attrs = split(arguments)
            return self.whole(x, {"gate_weight": gate_weight, **w}, attrs)

        def layer_bwd(x: torch.Tensor, gate_weight: torch.Tensor, dy: torch.Tensor, **arguments: Any) -> tuple[torch.Tensor, ...]:
            """The layer makes the choice again."""
            w, attrs = split(arguments)
            del w["topk_idx"]
            w = {"gate_weight": gate_weight, **w}
            leaves = [t.requires_grad_() for t in (x, *(t for name, t in w.items() if name != "e_score_correction_bias"))]
            return torch.autograd.grad(self.whole(x, w, attrs)[0], leaves, dy)

        return swiglu, swiglu_bwd, experts, experts_bwd, layer, layer_bwd
