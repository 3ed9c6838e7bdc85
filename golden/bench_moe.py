"""Benchmarks of the mixture of experts: V3's layer beside Hugging Face's two ways of running it, its experts, SwiGLU, V2's router.

float32. Ours and theirs work on one set of weights, made at random: gate and up lie one after the other, expert by expert, as theirs do.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from .bench import Bench, normal

HIDDEN, WIDTH, TOKENS, K = 7168, 2048, 256, 8
WAYS = ("eager", "grouped_mm")
ATTRS: dict[str, Any] = {"n_group": 4, "topk_group": 2}


def weights(e: int) -> dict[str, Any]:
    """A layer of e experts and a shared one, under our names; w_gate and w_up are views of gate_up"""
    small = np.float32(HIDDEN**-0.5)
    gate_up, down = np.empty((e, 2 * WIDTH, HIDDEN), np.float32), np.empty((e, HIDDEN, WIDTH), np.float32)
    for i in range(e):  # each expert its own, without a second copy of them all
        gate_up[i] = np.roll(normal((2 * WIDTH, HIDDEN)), i) * small
        down[i] = np.roll(normal((HIDDEN, WIDTH)), i) * np.float32(WIDTH**-0.5)
    shared = {name: normal((WIDTH, HIDDEN)) * small for name in ("shared_gate", "shared_up")}
    return {
        "gate_weight": normal((e, HIDDEN)) * small,
        "e_score_correction_bias": normal((e,)) * np.float32(0.1),
        "w_gate": gate_up[:, :WIDTH],
        "w_up": gate_up[:, WIDTH:],
        "w_down": down,
        **shared,
        "shared_down": normal((HIDDEN, WIDTH)) * np.float32(WIDTH**-0.5),
        "gate_up": gate_up,
    }


class HuggingFace:
    """DeepseekV3MoE on these very weights"""

    def __init__(self, w: dict[str, np.ndarray]):
        import torch
        from transformers.models.deepseek_v3 import DeepseekV3Config
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

        e = len(w["gate_weight"])
        self.config = DeepseekV3Config(
            hidden_size=HIDDEN,
            moe_intermediate_size=WIDTH,
            n_routed_experts=e,
            num_experts_per_tok=K,
            n_shared_experts=1,
            routed_scaling_factor=2.5,
            norm_topk_prob=True,
            **ATTRS,
        )
        with torch.device("meta"):
            self.moe = DeepseekV3MoE(self.config)
        leaves = {"gate.weight": "gate_weight", "experts.gate_up_proj": "gate_up", "experts.down_proj": "w_down"}
        leaves |= {f"shared_experts.{name}_proj.weight": f"shared_{name}" for name in ("gate", "up", "down")}
        self.leaves = {name: torch.nn.Parameter(torch.from_numpy(w[ours])) for name, ours in leaves.items()}
        for name, leaf in self.leaves.items():
            owner, _, last = name.rpartition(".")
            setattr(self.moe.get_submodule(owner), last, leaf)
        self.moe.gate.e_score_correction_bias = torch.nn.Buffer(torch.from_numpy(w["e_score_correction_bias"]))

    def __call__(self, way: str, x: Any) -> Any:
        self.config._experts_implementation = way
        return self.moe(x[None])[0]

    def experts(self, way: str, x: Any, idx: Any, weight: Any) -> Any:
        self.config._experts_implementation = way
        return self.moe.experts(x, idx, weight)


def infer(run: Any, *args: Any) -> Any:
    import torch

    with torch.no_grad():
        return run(*args)


def layer() -> Iterator[Bench]:
    """256 tokens: forward with 32 experts; forward and backward together (a training step) with 16."""
    import torch

    from ..kernels.cpu import moe

    x, dy = normal((TOKENS, HIDDEN)), normal((TOKENS, HIDDEN)) + 1
    tx, tdy = torch.from_numpy(x).requires_grad_(), torch.from_numpy(dy)
    for e, direction in (32, "forward"), (16, "forward+backward"):
        w = weights(e)
        theirs, ours = HuggingFace(w), {name: a for name, a in w.items() if name != "gate_up"}
        leaves = tuple(theirs.leaves.values())

        def both(w: Any = ours, out: Any = None) -> Any:
            _, saved = moe.layer_saving(x=x, **w, **ATTRS)
            return moe.backward(saved, dy, out)

        def step(way: str, hf: Any = theirs, leaves: Any = leaves) -> Any:
            return torch.autograd.grad(hf(way, tx), (tx, *leaves), tdy)

        flops = 6 * TOKENS * (K + 1) * HIDDEN * WIDTH + 2 * TOKENS * e * HIDDEN
        case, products = f"V3, {TOKENS} tokens, {e} experts + 1", ((WIDTH, HIDDEN, TOKENS * K // e),)
        if direction == "forward":
            peers = {f"transformers {way}": (lambda way=way, hf=theirs: infer(hf, way, tx)) for way in WAYS}
            yield Bench("moe.layer", case, lambda w=ours: moe.moe_layer(x=x, **w, **ATTRS), peers, 0, direction, flops, products)
        else:
            peers = {f"transformers {way}": (lambda way=way, step=step: step(way)) for way in WAYS}
            yield Bench("moe.layer", case, both, peers, 0, direction, 3 * flops, products)
            kept = {name: np.empty(a.shape, a.dtype) for name, a in ours.items() if a.ndim > 1}
            case += ", gradients into arrays that we keep"  # which the peers cannot: autograd allocates them anew
            peers = {name: run for name, run in peers.items() if "eager" not in name}  # most of a minute a run
            yield Bench("moe.layer", case, lambda both=both, kept=kept: both(out=kept), peers, 0, direction, 3 * flops, products)
        del w, theirs, ours, leaves, both, step, peers  # before the next set of weights


def experts() -> Iterator[Bench]:
    """Few tokens, as in decoding, where reading the weights is what takes the time; then as many as 64 an expert."""
    import torch

    from ..kernels import cpu

    e = 16
    w = weights(e)
    theirs, ours = HuggingFace(w), {name: w[name] for name in ("w_gate", "w_up", "w_down")}
    for n in (8, 128):
        x = normal((n, HIDDEN))
        idx = (np.arange(n)[:, None] + 2 * np.arange(K)) % e
        weight = np.abs(normal((n, K))) + np.float32(0.1)
        tensors = [torch.from_numpy(a) for a in (x, idx, weight)]
        peers = {f"transformers {way}": (lambda way=way, t=tensors: infer(theirs.experts, way, *t)) for way in WAYS}
        arrays: dict[str, Any] = {"x": x, "topk_idx": idx, "topk_weight": weight, **ours}
        flops, products = 6 * n * K * HIDDEN * WIDTH, ((WIDTH, HIDDEN, n * K // e),)
        case = f"V3, {n} tokens, {e} experts"
        yield Bench("moe.experts", case, lambda arrays=arrays: cpu.moe_experts(**arrays), peers, 0, "forward", flops, products)


def swiglu() -> Iterator[Bench]:
    import torch

    from ..kernels import cpu

    n, f = 8192, WIDTH
    gate, up, dy = normal((n, f)), normal((n, f)) * 2, normal((n, f)) + 1
    tg, tu, tdy = (torch.from_numpy(a).requires_grad_() for a in (gate, up, dy))
    y = torch.nn.functional.silu(tg) * tu
    peers = {"torch": lambda: infer(lambda: torch.nn.functional.silu(tg) * tu)}
    yield Bench("swiglu", f"{n}×{f}", lambda: cpu.swiglu(gate=gate, up=up), peers, n * f * 12)
    peers = {"torch autograd": lambda: torch.autograd.grad(y, (tg, tu), tdy.detach(), retain_graph=True)}
    yield Bench("swiglu", f"{n}×{f}", lambda: cpu.swiglu_bwd(gate=gate, up=up, dy=dy), peers, n * f * 20, "backward")


def router_softmax() -> Iterator[Bench]:
    import torch

    from ..kernels import cpu

    n, e = 65536, 160
    logits = normal((n, e))
    tl = torch.from_numpy(logits)

    def eager() -> Any:
        s = tl.softmax(-1)
        groups = s.view(n, 8, -1).max(-1)[0].topk(3, dim=-1)[1]
        keep = torch.zeros(n, 8, dtype=torch.bool).scatter_(1, groups, True).repeat_interleave(e // 8, dim=1)
        weight, idx = s.masked_fill(~keep, float("-inf")).topk(6, dim=-1)
        return idx, weight * 16.0

    moved = n * e * 4 + n * 6 * 12
    yield Bench("router.softmax", f"V2, {n}×{e}", lambda: cpu.router.softmax(logits=logits), {"torch topk": eager}, moved)
