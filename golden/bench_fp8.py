"""`leadline bench` for FP8: products with every accumulator, blocks, and a checkpoint file."""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..ref.cast import encode
from ..ref.formats import FORMATS
from .bench import Bench, Product, Timed, normal
from .draw import Source

SIDE = 1024
TILE = (64, 256, 32)  # one instruction of Hopper's, as the package mmasim takes it


def _codes(*shape: int) -> np.ndarray:
    return encode(FORMATS["e4m3fn"], normal(shape) * np.float32(100), overflow="saturate")


def _scales(*shape: int) -> np.ndarray:
    return np.exp2(Source("bench scales").uniform(shape, -9, -5)).astype(np.float32)


def _mmasim() -> tuple[dict[str, Timed], dict[str, float]]:
    """One m64n256k32 instruction of the package mmasim, if it is installed, and the share of the whole product that it is."""
    if importlib.util.find_spec("mmasim") is None:
        return {}, {}
    import torch
    from mmasim.nv_ptx import WGMMA  # type: ignore[import-not-found]

    m, n, k = TILE
    unit = WGMMA("Hopper", f"m{m}n{n}k{k}.f32.e4m3.e4m3")
    a, b = (torch.from_numpy(_codes(rows, k)).view(torch.float8_e4m3fn) for rows in (m, n))
    c = torch.zeros(m, n)
    return {"mmasim, by one instruction": lambda: unit(a, b.T, c)}, {"mmasim, by one instruction": m * n * k / SIDE**3}


def gemm() -> Iterator[Bench]:
    from ..kernels import cpu

    n = SIDE
    given: dict[str, Any] = {
        "a_codes": _codes(n, n),
        "a_scale": _scales(n, n // 128),
        "b_codes": _codes(n, n),
        "b_scale": _scales(n // 128, n // 128),
    }
    peers, shares = _mmasim()
    sgemm = Product(n, n, n)
    for how in ("wgmma13", "mma25", "fp32", "exact"):

        def run(how: str = how) -> Any:
            return cpu.fp8_gemm(**given, accumulator=how)

        beside = {**peers, "sgemm of this size": sgemm} if how == "wgmma13" else {"sgemm of this size": sgemm}
        yield Bench("fp8.gemm", f"1024³, {how}, promoted every 128", run, beside, flops=2 * n**3, shares=shares)


def linear() -> Iterator[Bench]:
    from ..kernels import cpu

    n, o, d = 256, 2048, 7168
    x, weight, dy = normal((n, d)), normal((o, d)) * np.float32(0.02), normal((n, o))
    plain, back = Product(n, d, o), (Product(n, o, d), Product(o, n, d))

    def both() -> None:
        for product in back:
            product()

    yield Bench(
        "fp8.linear", "256 × 7168 to 2048", lambda: cpu.fp8_linear(x=x, weight=weight), {"sgemm of this size": plain}, flops=plain.flops
    )
    backward = {"sgemms of these sizes": both}
    yield Bench(
        "fp8.linear", "256 × 7168 to 2048", lambda: cpu.fp8_linear_bwd(x=x, weight=weight, dy=dy), backward, 0, "backward", 2 * plain.flops
    )


def quantize_block() -> Iterator[Bench]:
    import torch

    from ..kernels import cpu

    o, d = 7168, 2048
    w = normal((o, d))
    out = np.empty((o, d), np.uint8), np.empty((o // 128, d // 128), np.float32)
    blocks = torch.from_numpy(w).view(o // 128, 128, d // 128, 128)

    def eager() -> Any:
        s = blocks.abs().amax((1, 3), keepdim=True).clamp(min=1e-4) / 448
        return (blocks / s).to(torch.float8_e4m3fn), s

    yield Bench("fp8.quantize_block", "7168×2048", lambda: cpu.fp8.quantize_block(w=w, out=out), {"torch": eager}, o * d * 5)


def dequantize_block() -> Iterator[Bench]:
    import torch

    from ..kernels import cpu

    o, d = 7168, 2048
    codes, scale, out = _codes(o, d), _scales(o // 128, d // 128), np.empty((o, d), np.float32)
    blocks = torch.from_numpy(codes).view(torch.float8_e4m3fn).view(o // 128, 128, d // 128, 128)
    factor = torch.from_numpy(scale)[:, None, :, None]
    eager = {"torch": lambda: blocks.float() * factor}
    yield Bench("fp8.dequantize_block", "7168×2048", lambda: cpu.fp8.dequantize_block(codes=codes, scale=scale, out=out), eager, o * d * 5)
    yield from checkpoint()


def checkpoint() -> Iterator[Bench]:
    """leadline dequantize on half a gigabyte of FP8 weights, beside a plain copy of as many bytes, where temporary files lie."""
    from .safetensor_file import Writer
    from .weights import dequantize_file, pair_entries, write_pair

    shape, count = (7168, 2048), 32
    with tempfile.TemporaryDirectory() as folder:
        source, target, plain, copied = (Path(folder) / name for name in ("in.safetensors", "out.safetensors", "plain", "copy"))
        names = [f"layer{i}.weight" for i in range(count)]
        codes, scale = _codes(*shape), _scales(shape[0] // 128, shape[1] // 128)
        with Writer(source, [entry for name in names for entry in pair_entries(name, shape)]) as writer:
            for name in names:
                write_pair(writer, name, codes, scale)
        done = dequantize_file(source, target)
        moved = done.bytes_read + done.bytes_written
        with plain.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, moved // 2)

        def fresh(path: Path) -> None:
            path.unlink(missing_ok=True)

        def ours() -> None:
            fresh(target)
            dequantize_file(source, target)

        def peer() -> None:
            fresh(copied)
            shutil.copyfile(plain, copied)

        yield Bench("fp8.dequantize_block", "a file of 470 MB to bf16", ours, {"file copy of as many bytes": peer}, moved)
