"""GPU benchmarks of the mixture of experts, at DeepSeek-V3's sizes: routers, permutes, SwiGLU; readable kernels where no other is."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from ..kernels import gpu
from ..kernels.gpu import cuda
from ..kernels.gpu.cuda.launch import runner
from .bench_gpu import NUMBA, Case, Held
from .bench_gpu_data import Sizes, alone, gradients, numbers, of_kind, peers_of, tensor


def routing(t: Any, bias: Any, k: int, kept: int, best: int, softmax: bool) -> Any:
    """The eight groups' scores, the best groups, the best experts in them, and weights"""
    import torch

    s = t.softmax(-1) if softmax else t.sigmoid()
    z = s if bias is None else s + bias
    groups = z.unflatten(-1, (8, -1)).topk(best, dim=-1)[0].sum(-1).topk(kept, dim=-1)[1]
    keep = torch.zeros(len(t), 8, dtype=torch.bool, device=t.device).scatter_(1, groups, True).repeat_interleave(t.shape[1] // 8, dim=1)
    idx = z.masked_fill(~keep, float("-inf")).topk(k, dim=-1)[1]
    return idx, weighted(s.gather(1, idx), softmax)


def weighted(chosen: Any, softmax: bool) -> Any:
    return chosen * 16.0 if softmax else chosen / (chosen.sum(-1, keepdim=True) + 1e-20) * 2.5


def router(softmax: bool, z: Sizes) -> Iterator[Case]:
    n, e, k = (z.routed, z.v2_experts, 6) if softmax else (z.routed, z.experts, 8)
    op, fast = ("router.softmax", cuda.router_softmax) if softmax else ("router.noaux_tc", cuda.router_noaux_tc)
    readable = gpu.router.softmax_bwd if softmax else gpu.router.noaux_tc_bwd
    logits, given = numbers((n, e)), () if softmax else (numbers((e,), 1),)
    names = () if softmax else ("bias",)

    def words() -> Any:
        bias = tensor(given[0]) if given else None
        return partial(routing, bias=bias, k=k, kept=3 if softmax else 4, best=1 if softmax else 2, softmax=softmax), (tensor(logits),)

    moved = n * e * 4 + (0 if softmax else e * 4) + n * k * 8
    peers, check = peers_of("torch topk", words), partial(alone, fast, (logits,), *given)
    yield Case(op, f"float32, {n}×{e}", partial(fast, logits, *given), Held(fast), moved, peers=peers, alike=check)
    idx, dweight = spread_experts(n, k, e), numbers((n, k), 2)
    call = partial(readable, logits=logits, **dict(zip(names, given, strict=True)), topk_idx=idx, dtopk_weight=dweight)

    def chosen(t: Any) -> Any:
        s = t.softmax(-1) if softmax else t.sigmoid()
        return weighted(s.gather(1, tensor(idx)), softmax)

    peers = [gradients(chosen, lambda: (tensor(logits),), lambda: tensor(dweight))]
    moved = 2 * n * e * 4 + n * k * (8 + 4)
    yield Case(op, f"float32, {n}×{e}", call, Held(readable), moved, direction="backward", kernel=NUMBA, peers=peers)


def spread_experts(n: int, k: int, e: int) -> Any:
    """topk_idx[n,k], int64: k experts of every token, all different, all experts in much the same use"""
    first = np.random.Generator(np.random.Philox(key=1)).integers(0, e, (n, 1))
    return runner().array((first + np.arange(k) * (e // k)) % e)


class Sorting:
    """Tokens sent to experts: the arrays of both permutes, and torch's words for them"""

    def __init__(self, z: Sizes):
        self.n, self.d, self.k, self.e = z.tokens, z.hidden, 8, z.experts
        self.m, self.idx = self.n * self.k, spread_experts(self.n, self.k, z.experts)
        shapes = (self.n, self.d), (self.m, self.d), (self.n, self.k)
        self.x, self.rows, self.weight = (numbers(shape, key, "bfloat16") for key, shape in enumerate(shapes))
        self.bytes_of_x, self.bytes_of_rows, self.bytes_of_idx = (2 * self.n * self.d, 2 * self.m * self.d, 4 * self.m)

    def case(self, name: str, kernel: str, moved: int, words: Callable[..., Any], *given: Any, alike: Any = None) -> Case:
        """words takes the same arrays as the kernel, of torch's types"""
        short = runner().array(self.idx.astype(np.int32))
        args = tuple(short if x is self.idx else x for x in given)
        call = partial(getattr(cuda, kernel), *args, n_routed_experts=self.e)
        held, about = Held(getattr(cuda.bf16, kernel), "bf16"), f"bfloat16, {self.n}×{self.d}, {self.k} of {self.e} experts, rows counted"

        def tensors() -> Any:
            return words, tuple(tensor(x) if x is self.idx else of_kind(x, "bfloat16") for x in given)

        direction = "backward" if kernel.endswith("_bwd") else "forward"
        peers = peers_of("torch sort and index", tensors, triton=False)
        return Case(name, about, call, held, moved, direction=direction, peers=peers, alike=alike)

    def gathered(self, x: Any, idx: Any) -> Any:
        order = idx.flatten().argsort(stable=True)
        return x[order // self.k], order

    def summed(self, rows: Any, idx: Any, weight: Any = None) -> Any:
        order = idx.flatten().argsort(stable=True)
        return rows.new_zeros(self.n, self.d).index_add_(
            0, order // self.k, rows if weight is None else rows * weight.flatten()[order, None]
        )


def permute(z: Sizes) -> Iterator[Case]:
    s = Sorting(z)

    def sorted_rows() -> Any:
        x_sorted, _, source = cuda.moe_permute(s.x, runner().array(s.idx.astype(np.int32)), n_routed_experts=s.e)
        return (x_sorted, s.x[source // s.k]), (source.astype(np.int64), s.idx.reshape(-1).argsort(kind="stable"))

    moved = s.bytes_of_x + s.bytes_of_rows + 2 * s.bytes_of_idx + 4 * s.e
    yield s.case("moe.permute", "moe_permute", moved, s.gathered, s.x, s.idx, alike=sorted_rows)
    moved = s.bytes_of_rows + s.bytes_of_x + s.bytes_of_idx
    yield s.case("moe.permute", "moe_permute_bwd", moved, lambda rows, x, idx: s.summed(rows, idx), s.rows, s.x, s.idx)


def unpermute(z: Sizes) -> Iterator[Case]:
    s = Sorting(z)

    def back(dy: Any, rows: Any, idx: Any, weight: Any) -> Any:
        order = idx.flatten().argsort(stable=True)
        grad = dy[order // s.k]
        dots = (grad * rows).sum(-1)
        return grad * weight.flatten()[order, None], dots.new_empty(s.m).index_copy_(0, order, dots).view(s.n, s.k)

    weights = 2 * s.m
    moved = s.bytes_of_rows + s.bytes_of_x + s.bytes_of_idx + weights
    yield s.case("moe.unpermute", "moe_unpermute", moved, s.summed, s.rows, s.idx, s.weight)
    moved = s.bytes_of_x + 2 * s.bytes_of_rows + s.bytes_of_idx + 2 * weights
    yield s.case("moe.unpermute", "moe_unpermute_bwd", moved, back, s.x, s.rows, s.idx, s.weight)


def swiglu(z: Sizes) -> Iterator[Case]:
    n, f = z.slots, z.width
    gate, up, dy = (numbers((n, f), key) for key in range(3))

    def words(gate: Any, up: Any) -> Any:
        import torch

        return torch.nn.functional.silu(gate) * up

    def tensors() -> Any:
        return tensor(gate), tensor(up)

    name, size = f"float32, {n}×{f}", n * f * 4
    peers = peers_of("torch", lambda: (words, tensors()))
    yield Case("swiglu", name, partial(gpu.swiglu, gate, up), Held(gpu.swiglu), 3 * size, kernel=NUMBA, peers=peers)
    call, peers = partial(gpu.swiglu_bwd, gate, up, dy), [gradients(words, tensors, lambda: tensor(dy))]
    yield Case("swiglu", name, call, Held(gpu.swiglu_bwd), 5 * size, direction="backward", kernel=NUMBA, peers=peers)


BENCHES: dict[str, Callable[[Sizes], Iterator[Case]]] = {
    "moe.permute": permute,
    "moe.unpermute": unpermute,
    "router.noaux_tc": partial(router, False),
    "router.softmax": partial(router, True),
    "swiglu": swiglu,
}
