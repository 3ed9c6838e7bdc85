"""What BF16 and FP8 cost a model: each layer's error in formats that are simulated, against the same layer in float64."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from ..ref.linear import linear_fwd
from ..ref.model import Cache, layer_fwd
from ..ref.names import MODEL, is_dense
from ..ref.norm import rmsnorm_fwd
from .checkpoint import Checkpoint
from .checkpoint_make import is_fp8
from .subject import load
from .weights import BLOCK, Multiplying

Array = NDArray[Any]
Progress = Callable[[int, int, str], Any]
MODES = ("bf16", "fp8", "bf16+fp8")


class Half(np.ndarray):
    """float32 that is rounded to bf16, to nearest, wherever ref says that an implementation stores it."""

    def __stored__(self, any_unit: bool = False) -> "Half":
        return load("leadline.kernels.cpu.cast").source.bf16(np.asarray(self)).view(Half)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        result = super().__array_function__(func, types, args, kwargs)
        return result.view(Half) if isinstance(result, np.ndarray) and result.dtype == np.float32 else result


class Quantised(Multiplying):
    """A weight of E4M3 codes and block scales (its values are theirs) that multiplies as FP8 inference does: the activations become codes
    by tiles of 1 x 128, products are summed in float32 128 at a time, each sum times both scales."""

    @classmethod
    def of(cls, codes: Array, scale: Array, recipe: str) -> "Quantised":
        fp8, gemm = load("leadline.kernels.cpu.fp8").source, load("leadline.kernels.cpu.fp8_gemm").source

        def product(x: Array) -> Array:
            y = gemm.fp8_gemm(*fp8.quantize_tile(np.ascontiguousarray(x), recipe=recipe), codes, scale, out="fp32")
            return y.view(type(x)) if isinstance(x, Half) else y

        weight = load("leadline.kernels.cpu._weights").source.dequantize_weight(codes, scale).view(cls)
        weight.product = product
        return weight


class Weights(Mapping[str, Array]):
    """A checkpoint's weights as a mode has them: float64, float32, or quantised where a released FP8 checkpoint is."""

    def __init__(self, checkpoint: Checkpoint, mode: str):
        self.checkpoint, self.mode = checkpoint, mode
        self.recipe = "deepgemm-ue8m0" if checkpoint.config.scale_fmt == "ue8m0" else "v3"

    def __getitem__(self, name: str) -> Array:
        if "fp8" not in self.mode or not is_fp8(name):
            return self.checkpoint[name].astype(np.float64 if self.mode == "exact" else np.float32)
        if self.checkpoint.is_fp8(name):
            codes, scale = self.checkpoint.codes(name)
        else:
            codes, scale = load("leadline.kernels.cpu.fp8_block").source.quantize_block(self.checkpoint[name], recipe=self.recipe)
        return Quantised.of(codes, scale, self.recipe)

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint)

    def __len__(self) -> int:
        return len(self.checkpoint)


@dataclass(frozen=True)
class Row:
    """A layer's error in each mode: rms(y - exact) / rms(exact), and how many tokens choose other experts."""

    layer: str
    kind: str
    alone: dict[str, float]  # of this layer on the exact input, with the exact choice of experts
    drift: dict[str, float]  # at its output, everything before it in the same mode
    changed: dict[str, int]  # tokens that choose other experts than in float64, everything before in the same mode


def relative(y: Array, exact: Array) -> float:
    error = np.asarray(y, np.float64) - exact
    return float(np.sqrt(np.mean(error**2) / np.mean(exact**2)))


def as_mode(x: Array, mode: str) -> Array:
    return x.astype(np.float32).view(Half) if "bf16" in mode else x.astype(np.float32)


def costs(checkpoint: Checkpoint, ids: Array, progress: Progress | None = None) -> list[Row]:
    """A row a layer, then the logits'."""
    if checkpoint.block != BLOCK:
        raise ValueError(f"{checkpoint.path}: has FP8 blocks of {checkpoint.block}; expected {BLOCK}, as tiles of activations are")
    config, weights = checkpoint.config, {mode: Weights(checkpoint, mode) for mode in ("exact", *MODES)}
    embedded, positions = checkpoint.rows(MODEL["embed_tokens"], ids)[None], np.arange(len(ids))[None]
    exact: Array = embedded.astype(np.float64)
    streams = {mode: as_mode(embedded, mode) for mode in MODES}
    rows = []
    for i in range(config.num_hidden_layers):
        if progress:
            progress(i, config.num_hidden_layers, f"layer {i}")

        def layer(mode: str, x: Array, choice: Array | None, i: int = i) -> tuple[Array, Cache, Array | None]:
            return layer_fwd(x, positions, weights[mode], i, config, topk_idx=choice, keep=False)[0]

        y, _, choice = layer("exact", exact, None)
        alone, changed = {}, {}
        for mode in MODES:
            alone[mode] = relative(layer(mode, as_mode(exact, mode), choice)[0], y)
            streams[mode], _, own = layer(mode, streams[mode], None)
            if ("bf16" in mode) != isinstance(streams[mode], Half):
                raise TypeError(f"layer {i} in {mode} returns {type(streams[mode]).__name__}")
            if choice is not None and own is not None:
                changed[mode] = int(np.any(np.sort(choice, -1) != np.sort(own, -1), axis=-1).sum())
        exact = y
        drift = {mode: relative(streams[mode], exact) for mode in MODES}
        rows.append(Row(str(i), "dense" if is_dense(config, i) else "MoE", alone, drift, changed))
    heads = {}
    for mode, x in {"exact": exact, **streams, **{f"{mode} alone": as_mode(exact, mode) for mode in MODES}}.items():
        w = weights[mode.removesuffix(" alone")]
        hidden, _ = rmsnorm_fwd(x[0], w[MODEL["norm"]], eps=config.rms_norm_eps)
        hidden = hidden.__stored__() if isinstance(hidden, Half) else hidden
        heads[mode], _ = linear_fwd(hidden, w[MODEL["lm_head"]])
    alone = {mode: relative(heads[f"{mode} alone"], heads["exact"]) for mode in MODES}
    rows.append(Row("logits", "head", alone, {mode: relative(heads[mode], heads["exact"]) for mode in MODES}, {}))
    return rows


def print_cost(checkpoint: Checkpoint, ids: Array, as_json: bool, progress: Progress) -> None:
    rows = costs(checkpoint, ids, progress)
    if as_json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("layer", "kind", *MODES, *(f"drift {mode}" for mode in MODES), "other experts"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for row in rows:
        numbers = [f"{values[mode]:.1e}" for values in (row.alone, row.drift) for mode in MODES]
        table.add_row(row.layer, row.kind, *numbers, " ".join(str(row.changed[mode]) for mode in MODES if row.changed))
    console.print(table)
    console.print(
        f"\nrms error relative to float64, of a layer alone and since the first one, on {len(ids)} tokens; with other experts: tokens in "
        f"{', '.join(MODES)}.\nbf16: every stored activation rounded; fp8: linear layers in E4M3, 1 x 128 by 128 x 128, float32 sums."
    )
