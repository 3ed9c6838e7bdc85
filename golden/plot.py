"""Pictures of what an op does to numbers: `leadline ops show NAME --plot out.png`. Needs matplotlib (extra "report")."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..ref.cast import decode, round_to
from ..ref.formats import FORMATS
from ..ref.fp8 import quantize_tile_fwd
from ..ref.fp8_gemm import fp8_gemm_fwd
from ..ref.fp8_recipes import RECIPES
from .draw import Source, gaussian_codes
from .errors import UsageError

LONGEST = 7168  # V3's hidden size
MODELS = {  # accumulator, promoted every: label
    ("bits:10", 0): "10 fraction bits",
    ("wgmma13", 0): "wgmma13, never promoted",
    ("wgmma13", 128): "wgmma13, promoted every 128",
    ("mma25", 0): "mma25, never promoted",
    ("fp32", 128): "float32",
}


def accumulators(figure: Any, op: str) -> None:
    """The relative error of fp8.gemm's accumulators against K, for products of one sign and for products of both."""
    lengths = [2**j for j in range(5, 13)] + [LONGEST]
    axes = figure.subplots(1, 2, sharey=True)
    for axis, mask, title in ((axes[0], 0x7F, "products of one sign"), (axes[1], 0xFF, "Gaussian")):
        source = Source(f"plot {title}")
        a, b = (gaussian_codes(source, (8, LONGEST), 100.0) & mask for _ in range(2))
        for (name, promote), label in MODELS.items():
            errors = [_error(a[:, :k], b[:, :k], name, promote) for k in lengths]
            axis.loglog(lengths, [e or np.nan for e in errors], marker=".", label=label)  # what is exact is not drawn
        axis.set(title=title, xlabel="K", ylim=(1e-9, 3))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("rms error / rms result")
    axes[1].legend(fontsize="small", loc="upper left")


def _error(a: np.ndarray, b: np.ndarray, name: str, promote: int) -> float:
    one, tile = np.ones((len(a), 1), np.float32), max(128, -(-a.shape[1] // 128) * 128)
    y, exact = (
        fp8_gemm_fwd(a, one, b, one, accumulator=how, promote=p, tile=tile)[0].astype(np.float64)
        for how, p in ((name, promote), ("exact", 0))
    )
    return float(np.sqrt(np.mean((y - exact) ** 2) / np.mean(exact**2)))


def recipes(figure: Any, op: str) -> None:
    """How far each recipe's numbers are from x, in units of the scale amax/448, as a histogram over normal numbers."""
    x = Source("plot recipes").normal((64, 1024)).astype(np.float32)
    ideal = np.repeat(np.max(np.abs(x.reshape(64, 8, 128)), axis=2) / 448, 128, axis=1).astype(np.float64)
    names = [name for name in RECIPES if name != "mxfp4"]
    axes = figure.subplots(4, -(-len(names) // 4), sharex=True, sharey=True).reshape(-1)
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    for axis, name in zip(axes, names, strict=False):
        (codes, scale), _ = quantize_tile_fwd(x, recipe=name)  # type: ignore[arg-type]
        back = decode(FORMATS["e4m3fn"], codes).astype(np.float64) * np.repeat(scale, 128, axis=1)
        error = (back - x) / ideal
        axis.hist(error.reshape(-1), bins=np.linspace(-16, 16, 97), histtype="stepfilled", log=True)
        axis.set_title(f"{name}: rms {np.sqrt(np.mean(error**2)):.3f}", fontsize="small")
    figure.supxlabel("(decoded - x) / (amax/448)")
    figure.supylabel("elements")


def staircase(figure: Any, op: str) -> None:
    """The relative error of a cast against |x|: flat over the normal numbers, growing below them."""
    fmt = FORMATS[op.rsplit(".", 1)[-1]]
    smallest, largest = (np.log2(v) for v in (2.0 ** (fmt.emin - fmt.mantissa_bits - 2), fmt.max * 4))
    x = np.exp2(np.linspace(max(smallest, -140), min(largest, 127.9), 20_000))
    y = round_to(fmt, x, overflow="saturate")
    axis = figure.subplots()
    axis.plot(x, np.abs(y - x) / x, linewidth=0.6)
    axis.axvline(fmt.max, color="black", linewidth=0.6, linestyle="--", label=f"maximum {fmt.max:g}")
    axis.axvline(2.0**fmt.emin, color="gray", linewidth=0.6, linestyle=":", label=f"smallest normal 2^{fmt.emin}")
    axis.set(xscale="log", yscale="log", xlabel="|x|", ylabel="|cast(x) - x| / |x|", ylim=(2.0 ** -(fmt.mantissa_bits + 12), 2))
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")


def picture_of(op: str) -> Callable[[Any, str], None]:
    """What is drawn for an op; a UsageError where nothing is."""
    if op.startswith(("cast.", "encode.")):
        return staircase
    drawn = {"fp8.gemm": accumulators, "fp8.linear": accumulators, "fp8.quantize_tile": recipes, "fp8.quantize_block": recipes}
    if op not in drawn:
        raise UsageError(f"{op} has no picture; cast.*, encode.*, {', '.join(drawn)} have one")
    return drawn[op]


def figure_for(path: Path) -> Any:
    """matplotlib's Figure, if it can write the file"""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError('pictures need matplotlib: pip install "leadline[report]"') from None
    figure = Figure(figsize=(10, 5.5), layout="constrained", dpi=120)
    endings = figure.canvas.get_supported_filetypes()
    if path.suffix.lstrip(".") not in endings:
        raise UsageError(f"cannot draw {path.name!r}; expected a name that ends in one of {', '.join(sorted(endings))}")
    return figure


def plot(op: str, path: Path) -> None:
    """Writes an op's picture; the file's ending says the format."""
    draw = picture_of(op)
    figure = figure_for(path)
    if not path.parent.is_dir():
        raise UsageError(f"no directory {path.parent}")
    draw(figure, op)
    figure.suptitle(f"{op}: {(draw.__doc__ or '').splitlines()[0]}", fontsize="medium", wrap=True)
    figure.savefig(path)
