"""GPU benchmarks of what moves bytes, at DeepSeek-V3's sizes: casts, quantisers, norms, RoPE; readable kernels where no other is.

Each is what a launcher does, checks of values left out (kernels.gpu.cuda.launch.unchecked); a readable kernel is timed with its checks.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from ..kernels import gpu
from ..kernels.gpu import cuda
from ..kernels.gpu.cuda.launch import runner
from ..ref import OPS
from ..ref.formats import FORMATS, Format
from .bench_gpu import NUMBA, Case, Held
from .bench_gpu_data import Sizes, alone, coded, gradients, numbers, of_kind, peers_of, scales, tensor
from .bench_mla import YARN

TORCH = {
    **{name: f"float8_{name}" for name in ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz")},
    "e8m0": "float8_e8m0fnu",
    "bf16": "bfloat16",
    "fp16": "float16",
}
KINDS = ("bfloat16", "float32")


def casts(fmt: Format, way: str, z: Sizes) -> Iterator[Case]:
    n, code = z.elements, np.dtype(fmt.code_dtype).itemsize
    x, kernel = coded((n,), fmt=fmt) if way == "decode" else numbers((n,)), getattr(getattr(cuda, way), fmt.name)
    x = x if fmt.signed else abs(x)

    def words() -> Any:
        import torch

        narrow = getattr(torch, TORCH[fmt.name])
        if way == "decode":
            return lambda t: t.to(torch.float32), (tensor(x, TORCH[fmt.name]),)
        return (lambda t: t.to(narrow).to(torch.float32)) if way == "cast" else (lambda t: t.to(narrow)), (tensor(x),)

    moved = n * {"cast": 8, "encode": 4 + code, "decode": code + 4}[way]
    peers = peers_of("torch, there and back" if way == "cast" else "torch", words, triton=False) if fmt.name in TORCH else ()
    check = partial(alone, kernel, (x,), rows=1 << 12)
    yield Case(f"{way}.{fmt.name}", f"{n} numbers", partial(kernel, x), Held(kernel), moved, peers=peers, alike=check)


def quantised(t: Any, down: int = 1) -> Any:
    """fp8.quantize_tile of V3's inference code, and quantize_block"""
    import torch

    t = t.float().unflatten(0, (-1, down)).unflatten(-1, (-1, 128))
    s = t.abs().amax((1, 3), keepdim=True).clamp(min=1e-4) / 448
    return (t / s).to(torch.float8_e4m3fn), s


def quantize(op: str, kernel: Callable[..., Any], of_bits: Callable[..., Any], down: int, z: Sizes) -> Iterator[Case]:
    n, d = (z.tokens, z.hidden) if down == 1 else (z.hidden, z.heads * z.nope)
    for kind in KINDS:
        x = numbers((n, d), kind=kind)
        held = Held(kernel) if kind == "float32" else Held(of_bits, "bf16")
        peers = peers_of("torch", lambda x=x, kind=kind: (partial(quantised, down=down), (of_kind(x, kind),)))
        moved = n * d * (x.dtype.itemsize + 1) + -(-n // down) * -(-d // 128) * 4
        check = partial(alone, kernel, (x,), rows=128)
        yield Case(op, f"{kind}, {n}×{d}, {down}×128", partial(kernel, x), held, moved, peers=peers, alike=check)


def dequantize(op: str, kernel: Callable[..., Any], down: int, z: Sizes) -> Iterator[Case]:
    n, d = z.tokens, z.hidden
    codes, scale = coded((n, d)), scales((-(-n // down), d // 128))

    def words() -> Any:
        t = tensor(codes, "float8_e4m3fn").unflatten(0, (-1, down)).unflatten(-1, (-1, 128))
        return lambda t, s: t.float() * s, (t, tensor(scale)[:, None, :, None])

    call, moved = partial(kernel, codes, scale), n * d * 5 + scale.size * 4
    yield Case(op, f"{n}×{d}, {down}×128", call, Held(kernel), moved, kernel=NUMBA, peers=peers_of("torch", words))


def rms_norm(x: Any, weight: Any) -> Any:
    import torch

    return torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-6)


def normed_and_quantised(x: Any, weight: Any) -> Any:
    return quantised(rms_norm(x, weight))


def rmsnorm(z: Sizes) -> Iterator[Case]:
    n, d = z.tokens, z.hidden
    for kind in KINDS:
        x, weight, dy = (numbers(shape, key, kind) for key, shape in enumerate(((n, d), (d,), (n, d))))
        own, precision = (cuda, "fp32") if kind == "float32" else (cuda.bf16, "bf16")
        name, size, held = f"{kind}, {n}×{d}", x.dtype.itemsize, Held(own.rmsnorm, precision)

        def tensors(x: Any = x, weight: Any = weight, kind: str = kind) -> Any:
            return of_kind(x, kind), of_kind(weight, kind)

        def one_after_the_other(x: Any = x, weight: Any = weight) -> Any:
            return zip(cuda.rmsnorm_quantize(x, weight), cuda.fp8_quantize_tile(cuda.rmsnorm(x, weight)), strict=True)

        peers = peers_of("torch rms_norm", lambda t=tensors: (rms_norm, t()), triton=False)
        check, call = partial(alone, cuda.rmsnorm, (x,), weight), partial(cuda.rmsnorm, x, weight)
        yield Case("rmsnorm", name, call, held, (2 * n + 1) * d * size, peers=peers, alike=check)
        peers = peers_of("torch rms_norm and quantise", lambda t=tensors: (normed_and_quantised, t()))
        moved, call = (n + 1) * d * size + n * d + n * -(-d // 128) * 4, partial(cuda.rmsnorm_quantize, x, weight)
        yield Case("rmsnorm", f"{name}, and quantised 1×128", call, held, moved, peers=peers, alike=one_after_the_other)
        moved, call, held = (3 * n + 2) * d * size, partial(cuda.rmsnorm_bwd, dy, x, weight), Held(own.rmsnorm_bwd, precision)
        check = partial(alone, cuda.rmsnorm_bwd, (dy, x), weight, outputs=1)
        peers = [gradients(rms_norm, tensors, lambda dy=dy, kind=kind: of_kind(dy, kind))]
        yield Case("rmsnorm", name, call, held, moved, direction="backward", peers=peers, alike=check)


def rope(z: Sizes) -> Iterator[Case]:
    """V3's queries far into the context. The peers are handed cos and sin; ours makes them."""
    n, h, r = z.tokens, z.heads, z.rope
    x, positions = numbers((n, h, r)), runner().array(np.arange(n) + 100_000)

    def turn(t: Any, by: Any) -> Any:
        import torch

        return torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2))) * by).flatten(-2)

    def words(back: bool = False) -> Any:
        import torch

        inv_freq = torch.from_numpy(
            np.asarray(OPS["rope.frequencies"].run("forward", {"like": np.zeros(())}, {"r": r, **YARN})["inv_freq"])
        )
        angle = torch.arange(100_000, 100_000 + n)[:, None] * inv_freq
        by = torch.polar(torch.ones_like(angle), -angle if back else angle).to(torch.complex64)[:, None]
        return turn, (tensor(x), by.to(tensor(x).device))

    for direction, kernel, inputs in (("forward", gpu.rope, (x, positions)), ("backward", gpu.rope_bwd, (x, positions, x))):
        call, peers = partial(kernel, *inputs, **YARN), peers_of("torch complex", partial(words, direction == "backward"))
        moved, name = 2 * n * h * r * 4 + n * 8, f"float32, {n}×{h}×{r}"
        yield Case("rope", name, call, Held(kernel), moved, direction=direction, kernel=NUMBA, peers=peers)


BENCHES: dict[str, Callable[[Sizes], Iterator[Case]]] = {
    **{f"{way}.{name}": partial(casts, FORMATS[name], way) for way in ("cast", "encode", "decode") for name in vars(getattr(cuda, way))},
    "fp8.dequantize_block": partial(dequantize, "fp8.dequantize_block", gpu.fp8.dequantize_block, 128),
    "fp8.dequantize_tile": partial(dequantize, "fp8.dequantize_tile", gpu.fp8.dequantize_tile, 1),
    "fp8.quantize_block": partial(quantize, "fp8.quantize_block", cuda.fp8_quantize_block, cuda.bf16.fp8_quantize_block, 128),
    "fp8.quantize_tile": partial(quantize, "fp8.quantize_tile", cuda.fp8_quantize_tile, cuda.bf16.fp8_quantize_tile, 1),
    "rmsnorm": rmsnorm,
    "rope": rope,
}
