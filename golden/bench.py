"""`leadline bench`: kernels.cpu beside its peers and the machine's limit, all in one run.

Each line is one kernel against one peer: op, case, direction, subject, seconds (median of REPEATS), peer, peer_seconds, ratio (seconds over
peer_seconds: below 1 is faster), limit (what binds: copy or gemm) and limit_share (the limit's time over seconds: 1 is the machine's best).
"""

import concurrent.futures
import contextlib
import importlib
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..ref.op import Op
from .draw import Source
from .errors import UsageError

REPEATS = 9
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
Timed = Callable[[], Any]


@dataclass
class Bench:
    """What is timed: ours, the peers, and what no implementation can do without: bytes to move, or else floating-point operations."""

    op: str
    case: str
    ours: Timed
    peers: dict[str, Timed]
    moved: int = 0
    direction: str = "forward"
    flops: int = 0
    products: tuple[tuple[int, int, int], ...] = ()  # sizes at which the product's rate is measured, besides the square one
    shares: Mapping[str, float] = field(default_factory=dict)  # of the work, for a peer so slow that it is given only a part


def normal(shape: tuple[int, ...]) -> np.ndarray:
    """A block of normals, repeated: what is timed does not depend on the values' being new."""
    block = Source(f"leadline/1 bench {shape}").normal((min(int(np.prod(shape)), 1 << 18),)).astype(np.float32)
    return np.resize(block, shape)


def median_seconds(runs: dict[str, Timed]) -> dict[str, float]:
    """The median of REPEATS of each, taken in turns so that all meet the same machine."""
    for run in runs.values():
        run()  # compile, and fault the pages in
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(REPEATS):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


class MemoryCopy:
    """A copy of `moved` bytes (read and written, half each) by every thread: what a kernel that moves them takes at least.

    A write costs more than a read, so a kernel that mostly reads (float32 to 8 bits) can come out a little under it.
    """

    def __init__(self, moved: int, threads: int = THREADS):
        self.source, self.target = np.ones(moved // 2, np.uint8), np.empty(moved // 2, np.uint8)
        edges = np.linspace(0, moved // 2, threads + 1).astype(int)
        self.parts = [slice(a, b) for a, b in itertools.pairwise(edges)]
        self.pool = concurrent.futures.ThreadPoolExecutor(threads)

    def __call__(self) -> None:
        list(self.pool.map(lambda part: np.copyto(self.target[part], self.source[part]), self.parts))


class Product:
    """A float32 product by NumPy's BLAS with every thread: the rate that a kernel made of products can reach."""

    def __init__(self, o: int, d: int, n: int):
        self.left, self.right, self.out = np.ones((o, d), np.float32), np.ones((d, n), np.float32), np.empty((o, n), np.float32)
        self.flops = 2 * o * d * n

    def __call__(self) -> None:
        np.matmul(self.left, self.right, out=self.out)


def casts(fmt: str) -> Iterator[Bench]:
    import ml_dtypes
    import torch

    from ..kernels import cpu

    count = 1 << 24
    x = normal((count,))
    codes, values = np.empty(count, np.uint8 if fmt.startswith("e") else np.uint16), np.empty_like(x)
    tx = torch.from_numpy(x)
    dtype = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "bf16": torch.bfloat16, "fp16": torch.float16}[fmt]
    narrow, wide = torch.empty(count, dtype=dtype), torch.empty(count)
    other: Any = {"e4m3fn": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "bf16": ml_dtypes.bfloat16, "fp16": np.float16}[fmt]
    name = "ml_dtypes" if fmt != "fp16" else "numpy"
    to_codes = {"torch": lambda: narrow.copy_(tx), name: lambda: x.astype(other)}
    to_values = {"torch": lambda: wide.copy_(narrow.copy_(tx)), name: lambda: x.astype(other).astype(np.float32)}
    encode, cast = getattr(cpu.encode, fmt), getattr(cpu.cast, fmt)
    yield Bench(f"cast.{fmt}", "float32 to codes, 2^24", lambda: encode(x=x, out=codes), to_codes, count * (4 + codes.itemsize))
    yield Bench(f"cast.{fmt}", "float32 to values, 2^24", lambda: cast(x=x, out=values), to_values, count * 8)


def quantize_tile() -> Iterator[Bench]:
    import torch

    from ..kernels import cpu

    n, d = 4096, 7168
    x = normal((n, d))
    out = np.empty((n, d), np.uint8), np.empty((n, d // 128), np.float32)
    tx = torch.from_numpy(x).view(n, -1, 128)
    narrow, scales = torch.empty(n, d // 128, 128, dtype=torch.float8_e4m3fn), torch.empty(n, d // 128, 1)

    def finish(amax: Any) -> Any:
        s = amax.clamp(min=1e-4) / 448
        return (tx / s).to(torch.float8_e4m3fn), s

    def finish_in_place(amax: Any) -> Any:
        s = amax.clamp_(min=1e-4).div_(448)
        return torch.div(tx, s, out=scratch).to(torch.float8_e4m3fn), s

    scratch = torch.empty_like(tx)
    peers = {
        "torch abs().amax": lambda: finish(tx.abs().amax(-1, keepdim=True)),
        "torch aminmax": lambda: finish(torch.maximum(*(v.abs() for v in torch.aminmax(tx, dim=-1, keepdim=True)))),
        "torch norm(inf), in place": lambda: finish_in_place(torch.linalg.vector_norm(tx, float("inf"), dim=-1, keepdim=True)),
        "torch abs(out).amax, in place": lambda: finish_in_place(torch.abs(tx, out=scratch).amax(-1, keepdim=True)),
    }

    def by_rows(rows: int = 128) -> Any:
        """As much as stays in the cache: fewer passes over the memory."""
        part = scratch[:rows]
        for i in range(0, n, rows):
            s = torch.abs(tx[i : i + rows], out=part).amax(-1, keepdim=True).clamp_(min=1e-4).div_(448)
            narrow[i : i + rows].copy_(torch.div(tx[i : i + rows], s, out=part))
            scales[i : i + rows] = s

    peers["torch, 128 rows at a time"] = by_rows
    moved = n * d * 5 + n * d // 128 * 4
    yield Bench("fp8.quantize_tile", "v3, 4096×7168, 1×128", lambda: cpu.fp8.quantize_tile(x=x, recipe="v3", out=out), peers, moved)


def rmsnorm() -> Iterator[Bench]:
    import torch

    from ..kernels import cpu

    n, d = 4096, 7168
    x, weight, dy = normal((n, d)), normal((d,)), normal((n, d)) + 1
    tx, tw, tdy = (torch.from_numpy(a) for a in (x, weight, dy))
    leaf, leaf_weight = tx.clone().requires_grad_(), tw.clone().requires_grad_()
    norm = torch.nn.functional.rms_norm
    y = norm(leaf, (d,), leaf_weight, 1e-6)
    yield Bench("rmsnorm", "4096×7168", lambda: cpu.rmsnorm(x=x, weight=weight), {"torch": lambda: norm(tx, (d,), tw, 1e-6)}, n * d * 8)
    backward = {"torch autograd": lambda: torch.autograd.grad(y, (leaf, leaf_weight), tdy, retain_graph=True)}
    yield Bench("rmsnorm", "4096×7168", lambda: cpu.rmsnorm_bwd(x=x, weight=weight, dy=dy), backward, n * d * 12, "backward")


def router() -> Iterator[Bench]:
    import torch

    from ..kernels import cpu

    n, e = 65536, 256
    logits, bias = normal((n, e)), normal((e,)) * 0.1
    tl, tb = torch.from_numpy(logits), torch.from_numpy(bias)

    def eager() -> Any:
        s = tl.sigmoid()
        t = s + tb
        groups = t.view(n, 8, -1).topk(2, dim=-1)[0].sum(-1).topk(4, dim=-1)[1]
        keep = torch.zeros(n, 8, dtype=torch.bool).scatter_(1, groups, True).repeat_interleave(e // 8, dim=1)
        idx = t.masked_fill(~keep, float("-inf")).topk(8, dim=-1)[1]
        chosen = s.gather(1, idx)
        return idx, chosen / (chosen.sum(-1, keepdim=True) + 1e-20) * 2.5

    moved = n * e * 4 + n * 8 * 12
    yield Bench("router.noaux_tc", "65536×256", lambda: cpu.router.noaux_tc(logits=logits, bias=bias), {"torch topk": eager}, moved)


def beside(module: str, name: str) -> Callable[[], Iterator[Bench]]:
    """A benchmark of another module, which imports this one: looked up when it is called."""
    return lambda: getattr(importlib.import_module(f".{module}", __package__), name)()


BENCHES: dict[str, Callable[[], Iterator[Bench]]] = {
    **{f"cast.{fmt}": (lambda fmt=fmt: casts(fmt)) for fmt in ("e4m3fn", "e5m2", "bf16", "fp16")},
    "attention": beside("bench_mla", "attention"),
    "cache.append": beside("bench_decode", "append"),
    "cache.read": beside("bench_decode", "read"),
    "fp8.dequantize_block": beside("bench_fp8", "dequantize_block"),
    "fp8.gemm": beside("bench_fp8", "gemm"),
    "fp8.linear": beside("bench_fp8", "linear"),
    "fp8.quantize_block": beside("bench_fp8", "quantize_block"),
    "fp8.quantize_tile": quantize_tile,
    "mla.absorb": beside("bench_decode", "decode_step"),
    "mla.decode": beside("bench_decode", "decode"),
    "mla.decode_fp8": beside("bench_decode", "decode_fp8"),
    "mla.prefill": beside("bench_mla", "prefill"),
    "model": beside("bench_model", "model"),
    "moe.experts": beside("bench_moe", "experts"),
    "moe.layer": beside("bench_moe", "layer"),
    "rmsnorm": rmsnorm,
    "rope": beside("bench_decode", "rope"),
    "router.noaux_tc": router,
    "router.softmax": beside("bench_moe", "router_softmax"),
    "swiglu": beside("bench_moe", "swiglu"),
}


def measure(bench: Bench) -> Iterator[dict[str, Any]]:
    """One record a peer, all timed in turns with ours and the limit: a copy of the bytes, or the operations at the best product's rate."""
    products = {f"product {shape}": Product(*shape) for shape in ((4096, 4096, 4096), *bench.products)} if bench.flops else {}
    copies = {} if bench.flops else {"memory copy": MemoryCopy(bench.moved)}
    seconds = median_seconds({"kernels.cpu": bench.ours, **bench.peers, **products, **copies})
    limit = "gemm" if bench.flops else "copy"
    if bench.flops:
        seconds["sgemm"] = min(bench.flops / product.flops * seconds[name] for name, product in products.items())
    bound = "sgemm" if bench.flops else "memory copy"
    seconds |= {peer: seconds[peer] / share for peer, share in bench.shares.items() if peer in bench.peers}
    ours, floor = seconds["kernels.cpu"], seconds[bound]
    for peer in (*bench.peers, bound):
        yield {
            "op": bench.op,
            "case": bench.case,
            "direction": bench.direction,
            "subject": "kernels.cpu",
            "seconds": ours,
            "peer": peer,
            "peer_seconds": seconds[peer],
            "ratio": ours / seconds[peer],
            "limit": limit,
            "limit_share": floor / ours,
        }


def run(ops: list[Op], as_json: bool) -> None:
    """Prints every benchmark of the ops (of all that have one, if none is named)."""
    from rich.console import Console
    from rich.table import Table

    with contextlib.suppress(ModuleNotFoundError):  # said below, by the benchmark that needs it
        import torch

        torch.set_num_threads(THREADS)
    if missing := [op.name for op in ops if op.name not in BENCHES]:
        raise UsageError(f"{missing[0]} has no benchmark; these have: {', '.join(BENCHES)}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("op")
    table.add_column("case", overflow="fold")
    for name in ("ours ms", "peer", "peer ms", "rate", "of limit"):
        table.add_column(name, justify="left" if name == "peer" else "right", overflow="fold")
    for name in [op.name for op in ops] or BENCHES:
        try:
            benches = BENCHES[name]()
            for bench in benches:
                for i, record in enumerate(measure(bench)):
                    if as_json:
                        print(json.dumps(record), flush=True)
                        continue
                    first = (bench.op, f"{bench.case} {bench.direction}", f"{record['seconds'] * 1e3:.2f}") if i == 0 else ("", "", "")
                    rate = f"{1 / record['ratio']:.2f}×"
                    table.add_row(
                        *first,
                        record["peer"],
                        f"{record['peer_seconds'] * 1e3:.2f}",
                        rate,
                        f"{record['limit_share']:.0%}" if i == 0 else "",
                    )
        except ModuleNotFoundError as error:
            raise UsageError(f"the peers of {name} need {error.name}; install them with: python3 -m pip install '.[peers]'") from error
    if not as_json:
        console = Console(highlight=False)
        console.print(table)
        console.print(f"{THREADS} threads. rate: ours over the peer's. of limit: the time of copying the bytes that must move, over ours;")
        console.print("where products rule (a peer is called sgemm), the operations at the best product's rate instead.")
