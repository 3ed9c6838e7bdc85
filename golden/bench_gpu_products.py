"""GPU benchmarks of what multiplies, at DeepSeek-V3's sizes: FP8 products, MLA's decoding over a paged cache, MLA's prefill.

Operations are those of the op itself, two a multiply-and-add: of causal attention only the keys that a query sees.
"""

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from ..kernels.gpu import cuda
from ..kernels.gpu.cuda.gemm import gemm
from ..kernels.gpu.cuda.launch import runner
from ..ref.mla_cache import LAYOUTS, cache_append_fwd
from .bench_gpu import BF16, FP8, Case, Held, Peer, Timed
from .bench_gpu_data import Sizes, alone, coded, drawn, gradients, numbers, of_kind, peers_of, scales, spread, tensor

PAGE, SCALE = 64, 0.13523378  # of V3, YaRN's factor included
# A path's instruction, the vectors of its accumulator (ref/fp8_accumulate.py), and the ceiling of its operations
PATHS = {
    "wgmma": (("wgmma13", "wgmma13-positive", "wgmma13-subnormal", "wgmma13-nan"), FP8),
    "mma": (("mma25",), FP8),
    "bf16": (("one", "ragged", "wgrad", "product-first", "wide"), BF16),
}
NAMES = {"wgmma": "wgmma", "mma": "mma.sync", "bf16": "bf16 mma.sync"}


def paths() -> tuple[str, ...]:
    """Those of this chip"""
    capability = runner().capability
    return ("wgmma", "mma") if capability == 90 else ("mma",) if capability >= 89 else ("bf16",)


def fp8_gemm(z: Sizes) -> Iterator[Case]:
    for n, d, o in z.products:
        a, b, sa, sb = coded((n, d), 1), coded((o, d), 2), scales((n, -(-d // 128)), 1), scales((-(-o // 128), -(-d // 128)), 2)

        def tensors(a: Any = a, b: Any = b) -> tuple[Any, Any]:
            return tensor(a, "float8_e4m3fn"), tensor(b, "float8_e4m3fn").T

        def whole(tensors: Any = tensors) -> Timed:
            torch: Any = import_module("torch")  # whose type stubs hide what begins with _

            (ta, tb), out = tensors(), torch.bfloat16
            one = torch.ones((), device=ta.device)
            return lambda: torch._scaled_mm(ta, tb, scale_a=one, scale_b=one, out_dtype=out, use_fast_accum=True)

        def scaled(tensors: Any = tensors, sa: Any = sa, sb: Any = sb) -> Timed:
            torch: Any = import_module("torch")

            (ta, tb), rows, blocks = tensors(), tensor(sa).T.contiguous().T, tensor(sb).T
            return lambda: torch._scaled_mm(ta, tb, scale_a=rows, scale_b=blocks, out_dtype=torch.bfloat16)

        def wide(tensors: Any = tensors) -> Timed:
            torch: Any = import_module("torch")

            ta, tb = (t.to(torch.bfloat16) for t in tensors())
            return lambda: torch.mm(ta, tb)

        peers = [Peer("cuBLASLt, one scale", whole), Peer("cuBLASLt, 1×128 and 128×128", scaled), Peer("torch bf16", wide)]
        moved = (n + o) * d + 2 * n * o + 4 * (sa.size + sb.size)
        for path in paths():
            cases, product = PATHS[path]
            call = partial(gemm, a, sa, b, sb, out="bf16", path=path)
            check = partial(last_rows, a, sa, b, sb, path)
            held, name = Held(cuda.fp8_gemm, "fp32", cases), f"{n}×{d}×{o}, {NAMES[path]}"
            yield Case("fp8.gemm", name, call, held, moved, 2 * n * d * o, product, peers=peers, alike=check)
    yield from grouped(z)


def last_rows(a: Any, sa: Any, b: Any, sb: Any, path: str) -> Any:
    return alone(lambda a, sa: gemm(a, sa, b, sb, out="bf16", path=path), (a, sa), rows=128)


def grouped(z: Sizes) -> Iterator[Case]:
    """Each expert's rows by its own weights"""
    e, rows, d, o = z.grouped
    n = e * rows
    a, b, sa, sb = coded((n, d), 1), coded((e, o, d), 2), scales((n, -(-d // 128)), 1), scales((e, -(-o // 128), -(-d // 128)), 2)
    expert_of = runner().array(np.repeat(np.arange(e, dtype=np.int32), rows // 128))

    def wide() -> Any:
        torch: Any = import_module("torch")

        ta, tb = (tensor(t, "float8_e4m3fn").to(torch.bfloat16) for t in (a, b))
        ends = torch.arange(rows, n + 1, rows, dtype=torch.int32, device=ta.device)
        return lambda ta, tb, ends: torch._grouped_mm(ta, tb.mT, offs=ends), (ta, tb, ends)

    moved = n * d + e * o * d + 2 * n * o + 4 * (sa.size + sb.size + expert_of.size)
    for path in paths():

        def last_expert(path: str = path) -> Any:
            y, part = gemm(a, sa, b, sb, expert_of, out="bf16", path=path), slice(n - rows, n)
            return [(y[part], gemm(a[part], sa[part], b[e - 1], sb[e - 1], out="bf16", path=path))]

        cases, product = PATHS[path]
        call, name = partial(gemm, a, sa, b, sb, expert_of, out="bf16", path=path), f"{e} experts of {rows}×{d}×{o}, {NAMES[path]}"
        peers = peers_of("torch bf16 _grouped_mm", wide, triton=False)
        held = Held(cuda.fp8_gemm, "fp32", cases)
        yield Case("fp8.gemm", name, call, held, moved, 2 * n * d * o, product, peers=peers, alike=last_expert)


def attend(q: Any, k: Any, v: Any, causal: bool = False, scale: float | None = None) -> Any:
    """[b,s,h,·], as ours"""
    import torch

    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=causal, scale=scale).transpose(1, 2)


def packed(pages: int, z: Sizes) -> Any:
    """kv_cache[pages,bytes] in FlashMLA's FP8 layout, 64 pages over and over"""
    tokens = min(pages, 64) * PAGE
    c_kv, k_pe = (np.resize(drawn(key), (tokens, width)) for key, width in ((1, z.latent), (2, z.rope)))
    empty = np.zeros((tokens // PAGE, LAYOUTS["fp8_v32"].page_bytes(PAGE, z.latent, z.rope)), np.uint8)
    cache, _ = cache_append_fwd(empty, c_kv, k_pe, np.arange(tokens), layout="fp8_v32", page_size=PAGE)
    return spread(cache, (pages, cache.shape[1]))


def decode(fp8: bool, z: Sizes) -> Iterator[Case]:
    """One new token for each sequence; pages in no order"""
    op, named = ("mla.decode_fp8", "mla_decode_fp8") if fp8 else ("mla.decode", "mla_decode")
    kernel, held = getattr(cuda, named), getattr(cuda.bf16, named)
    b, h, width = z.batch, z.heads, z.latent + z.rope
    for t in z.cached:
        pages = b * t // PAGE
        q, cache = numbers((b, 1, h, width), 1, "bfloat16"), packed(pages, z) if fp8 else numbers((pages, PAGE, width), 2, "bfloat16")
        order = np.random.Generator(np.random.Philox(key=2)).permutation(pages).reshape(b, -1).astype(np.int32)
        table, lengths = runner().array(order), runner().array(np.full(b, t, np.int32))
        attrs = {"scale": SCALE, **({"head_dim_v": z.latent, "qk_rope_head_dim": z.rope} if fp8 else {"kv_lora_rank": z.latent})}

        def without_the_first(q: Any = q, cache: Any = cache, table: Any = table, lengths: Any = lengths, attrs: Any = attrs) -> Any:
            """As many parts of the keys either way, so the same bits"""
            (o, lse), (o1, lse1) = kernel(q, cache, table, lengths, **attrs), kernel(q[1:], cache, table[1:], lengths[1:], **attrs)
            return (o[1:], o1), (lse[1:], lse1)

        def words(q: Any = q, cache: Any = cache, table: Any = table, t: int = t) -> Any:
            """The heads are queries of one key head, whose pages were put in order before"""
            keys = of_kind(cache, "bfloat16")[tensor(table).long()].view(b, t, 1, width)
            return partial(attend, scale=SCALE), (of_kind(q, "bfloat16").transpose(1, 2), keys, keys[..., : z.latent])

        moved = cache.nbytes + b * h * (2 * width + 2 * z.latent + 4) + 4 * table.size + 4 * b
        flops, name = 2 * b * h * t * (width + z.latent), f"{'fp8_v32' if fp8 else 'bfloat16'}, {b} sequences of {t}, {h} heads"
        peers = [] if fp8 else peers_of("torch sdpa, keys in order", words, triton=False)
        call = partial(kernel, q, cache, table, lengths, **attrs)
        yield Case(op, name, call, Held(held, "bf16"), moved, flops, BF16, peers=peers, alike=without_the_first)


def merge(z: Sizes) -> Iterator[Case]:
    p, b, h, v = z.parts, z.batch, z.heads, z.latent
    o, lse = numbers((p, b, 1, h, v), 1), numbers((p, b, h, 1), 2)

    def words(o: Any, lse: Any) -> Any:
        whole = lse.logsumexp(0)
        return ((lse - whole).exp().transpose(-1, -2)[..., None] * o).sum(0), whole

    moved = 4 * (p + 1) * b * h * (v + 1)
    peers, call = peers_of("torch", lambda: (words, (tensor(o), tensor(lse)))), partial(cuda.attention_merge, o, lse)
    yield Case("attention.merge", f"{p} parts of {b}×{h}×{v}", call, Held(cuda.attention_merge), moved, peers=peers)


def prefill(z: Sizes) -> Iterator[Case]:
    """Causal, each head with keys of its own"""
    h, dk, dv = z.heads, z.nope + z.rope, z.nope
    for s in z.prefill:
        q, k, v, do = (numbers((1, s, h, width), key, "bfloat16") for key, width in enumerate((dk, dk, dv, dv)))
        dlse = spread(np.zeros(1, np.float32), (1, h, s))

        def tensors(q: Any = q, k: Any = k, v: Any = v) -> Any:
            return tuple(of_kind(x, "bfloat16") for x in (q, k, v))

        def last_head(kernel: Callable[..., Any], *args: Any) -> Any:
            """dlse has its heads second, the others third"""
            whole, part = kernel(*args), kernel(*(x[:, -1:] if x.ndim == 3 else x[:, :, -1:] for x in args))
            return [(w[:, -1:] if w.ndim == 3 else w[:, :, -1:], p) for w, p in zip(whole, part, strict=True)]

        pairs, name = h * s * (s + 1) // 2, f"bfloat16, {s} tokens, {h} heads of {dk} and {dv}, causal"
        of_qkv, of_o, call = 2 * s * h * (2 * dk + dv), 2 * s * h * dv, partial(cuda.attention, q, k, v)
        peers = peers_of("torch sdpa", lambda t=tensors: (partial(attend, causal=True), t()), triton=False)
        check = partial(last_head, cuda.attention, q, k, v)
        moved, flops, held = of_qkv + of_o + 4 * s * h, 2 * pairs * (dk + dv), Held(cuda.bf16.attention, "bf16")
        yield Case("attention", name, call, held, moved, flops, BF16, peers=peers, alike=check)
        peers = [gradients(partial(attend, causal=True), tensors, lambda do=do: of_kind(do, "bfloat16"))]
        call, check = partial(cuda.attention_bwd, do, dlse, q, k, v), partial(last_head, cuda.attention_bwd, do, dlse, q, k, v)
        moved, flops, held = 2 * of_qkv + of_o + 4 * s * h, 2 * pairs * (3 * dk + 2 * dv), Held(cuda.bf16.attention_bwd, "bf16")
        yield Case("attention", name, call, held, moved, flops, BF16, "backward", peers=peers, alike=check)


BENCHES: dict[str, Callable[[Sizes], Iterator[Case]]] = {
    "attention": prefill,
    "attention.merge": merge,
    "fp8.gemm": fp8_gemm,
    "mla.decode": partial(decode, False),
    "mla.decode_fp8": partial(decode, True),
}
