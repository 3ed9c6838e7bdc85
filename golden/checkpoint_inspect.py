"""What a checkpoint holds: config, tensors, dtypes, scale grids, what is wrong with them, parameters, cache."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..ref.config import Config
from ..ref.names import expert_shapes, is_dense, layer_shapes, shapes
from .checkpoint import NOT_FINITE, Checkpoint, Problem
from .weights import SUFFIX

Progress = Callable[[int, int, str], Any]


@dataclass(frozen=True)
class Counts:
    """Parameters, and bytes that one token leaves in the cache."""

    total: int  # of the model, without its MTP layers
    active: int  # that a token meets: of the routed experts num_experts_per_tok
    mtp: int  # of the MTP layers, without the embedding and the head that they share with the model
    mtp_active: int
    cache_bf16: int  # c_kv and k_pe of every layer of the model, two bytes a number
    cache_fp8: int | None  # FlashMLA's FP8 cache, where its sizes are those of its layout: 656 bytes a layer


def counts(config: Config) -> Counts:
    """From the config alone."""
    expert = sum(int(np.prod(shape)) for shape in expert_shapes(config))

    def layer(i: int, experts: int) -> int:
        own = layer_shapes(config, i)
        kept = (int(np.prod(shape)) for name, shape in own.items() if name not in ("embed_tokens", "shared_head"))
        return sum(kept) + (0 if is_dense(config, i) else experts * expert)

    n, e, k = config.num_hidden_layers, config.n_routed_experts, config.num_experts_per_tok
    outside = 2 * config.vocab_size * config.hidden_size + config.hidden_size
    extra = range(n, n + config.num_nextn_predict_layers)
    flash = (config.kv_lora_rank, config.qk_rope_head_dim) == (512, 64)
    return Counts(
        total=outside + sum(layer(i, e) for i in range(n)),
        active=outside + sum(layer(i, k) for i in range(n)),
        mtp=sum(layer(i, e) for i in extra),
        mtp_active=sum(layer(i, k) for i in extra),
        cache_bf16=2 * n * (config.kv_lora_rank + config.qk_rope_head_dim),
        cache_fp8=656 * n if flash else None,
    )


@dataclass(frozen=True)
class Group:
    """Tensors that differ in the numbers of their names alone."""

    names: str  # model.layers.{1-3}.mlp.experts.{0-15}.gate_proj.weight
    count: int
    dtype: str
    shape: tuple[int, ...]
    scales: str  # "[1, 2] F32", or nothing


def groups(checkpoint: Checkpoint) -> list[Group]:
    """All tensors in the order of the model, those of a kind in one line."""
    found: dict[tuple, list[list[int]]] = {}
    ranked = {name: i for i, name in enumerate(shapes(checkpoint.config, mtp=True))}
    for name in sorted(checkpoint, key=lambda name: (ranked.get(name, len(ranked)), name)):
        entry, scales = checkpoint.entry(name), ""
        if name + SUFFIX in checkpoint.where:
            scale = checkpoint.entry(name + SUFFIX)
            scales = f"{list(scale.shape)} {scale.dtype}"
        key = re.sub(r"\d+", "{}", name), entry.dtype, entry.shape, scales
        found.setdefault(key, []).append([int(i) for i in re.findall(r"\d+", name)])
    return [
        Group(pattern.format(*map(_span, zip(*numbers, strict=True))), len(numbers), dtype, shape, scales)
        for (pattern, dtype, shape, scales), numbers in found.items()
    ]


def _span(numbers: Iterable[int]) -> str:
    """3, or {0-15} of what is complete from 0 to 15, or {0,2,5}"""
    have = sorted(set(numbers))
    if len(have) == 1:
        return str(have[0])
    runs = [[have[0], have[0]]]
    for i in have[1:]:
        if i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return "{" + ",".join(f"{a}-{b}" if a < b else str(a) for a, b in runs) + "}"


def all_problems(checkpoint: Checkpoint, values: bool, progress: Progress | None) -> Iterator[Problem]:
    """What the headers contradict, then, with values, each tensor with a number that is not finite."""
    wrong = set()
    for problem in checkpoint.problems():
        wrong.add(problem.tensor.removesuffix(SUFFIX))
        yield problem
    if not values:
        return
    total = sum(shard.size for shard in checkpoint.shards.values())
    done = 0
    for name in checkpoint:
        entry = checkpoint.entry(name)
        if progress:
            progress(done, total, name)
        if name not in wrong and entry.dtype in NOT_FINITE and (problem := checkpoint.check_values(name)):
            yield problem
        done += entry.end - entry.start


def inspect(checkpoint: Checkpoint, *, values: bool = True, as_json: bool = False, progress: Progress | None = None) -> bool:
    """Prints all that is known; whether nothing is wrong."""
    problems = list(all_problems(checkpoint, values, progress))
    config, n = checkpoint.config, counts(checkpoint.config)
    if as_json:
        content = {
            "directory": str(checkpoint.path),
            "config": asdict(config),
            "mtp": checkpoint.has_mtp,
            "files": {file: shard.size for file, shard in checkpoint.shards.items()},
            "tensors": [asdict(group) for group in groups(checkpoint)],
            "counts": asdict(n),
            "problems": [{**p._asdict(), "file": p.file.name} for p in problems],
            "values_checked": values,
        }
        print(json.dumps(content, ensure_ascii=False))
        return not problems
    console = Console(highlight=False)
    kinds = {checkpoint.entry(name).dtype for name in checkpoint}
    size = sum(shard.size for shard in checkpoint.shards.values())
    about = (checkpoint.about.get("architectures") or [checkpoint.about.get("model_type")])[0]
    layers = f"{config.num_hidden_layers} layers, {min(config.first_k_dense_replace, config.num_hidden_layers)} of them dense"
    absent = ", not there" if config.num_nextn_predict_layers and not checkpoint.has_mtp else ""
    mtp = f"MTP layers: {config.num_nextn_predict_layers}{absent}"
    console.print(f"[bold]{escape(str(checkpoint.path))}[/]  {about}, {layers}, {mtp}", soft_wrap=True)
    console.print(f"{len(checkpoint.shards)} files, {size:,} bytes, {len(checkpoint)} weights ({', '.join(sorted(kinds))})", soft_wrap=True)
    console.print(f"\n[bold]config[/]      {escape(', '.join(f'{k}={v}' for k, v in asdict(config).items()))}\n", soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("weights", "count", "dtype", "shape", "scales"):
        table.add_column(column, overflow="fold", justify="right" if column == "count" else "left")
    for group in groups(checkpoint):
        table.add_row(escape(group.names), str(group.count), group.dtype, escape(str(list(group.shape))), escape(group.scales))
    console.print(table)
    console.print(f"\n[bold]parameters[/]  {n.total:,} in total, {n.active:,} active per token", soft_wrap=True)
    if n.mtp:
        console.print(f"            {n.mtp:,} more in the MTP layers, {n.mtp_active:,} active", soft_wrap=True)
    fp8 = f"; {n.cache_fp8:,} in FlashMLA's FP8 layout" if n.cache_fp8 else ""
    console.print(f"[bold]cache[/]       {n.cache_bf16:,} bytes per token in bf16{fp8}\n", soft_wrap=True)
    for problem in problems:
        console.print(f"[red]{problem.kind:10}[/] {escape(str(problem))}", soft_wrap=True)
    unread = "" if values else " (values not read)"
    console.print(f"{len(problems)} problems{unread}" if problems else f"nothing missing, extra, misshapen or non-finite{unread}")
    return not problems
