"""Benchmarks of decode: rope, the paged cache, attention over it, and one token through V3's whole attention layer. float32."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from .bench import Bench, normal
from .bench_mla import V3, YARN, weights

CACHED, PAGE = 4096, 64  # tokens of a sequence, and of a page
SCALE = 192**-0.5 * (0.1 * math.log(40.0) + 1) ** 2
WIDTH, LATENT = V3["kv_lora"] + V3["rope"], V3["kv_lora"]


def rope() -> Iterator[Bench]:
    """V3's queries: 4096 tokens far into the context. The peers are handed cos and sin; ours makes them."""
    import torch

    from ..kernels import cpu

    n, h, r = 4096, V3["heads"], V3["rope"]
    x, out, positions = normal((n, h, r)), np.empty((n, h, r), np.float32), np.arange(n) + 100_000
    inv_freq, _ = cpu.rope_frequencies(like=np.zeros((), np.float64), r=r, **YARN)
    angle = torch.from_numpy(positions[:, None] * inv_freq)[:, None, :]
    cos, sin, turn = angle.cos().float(), angle.sin().float(), torch.polar(torch.ones_like(angle), angle).to(torch.complex64)
    tx = torch.from_numpy(x)

    def pairs() -> Any:
        a, b = tx[..., 0::2], tx[..., 1::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)

    peers = {
        "torch complex": lambda: torch.view_as_real(torch.view_as_complex(tx.view(n, h, r // 2, 2)) * turn).flatten(-2),
        "torch cos and sin": pairs,
    }
    yield Bench("rope", "V3, 4096×128×64", lambda: cpu.rope(x=x, positions=positions, out=out, **YARN), peers, 2 * x.nbytes)


def page_order(pages: int) -> np.ndarray:
    """Pages as a pool hands them out after a while: in no order"""
    return np.argsort(normal((pages,)), kind="stable")


def filled(layout: str, tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A cache with latents in all its tokens, the latents, and their slots: page by page, pages in no order"""
    from ..kernels import cpu
    from ..kernels.cpu.mla_cache import packing

    c_kv, k_pe = normal((tokens, LATENT)), normal((tokens, V3["rope"]))
    slots = (page_order(tokens // PAGE)[:, None] * PAGE + np.arange(PAGE)).ravel()
    empty = np.zeros((tokens // PAGE, packing(layout, PAGE, LATENT, V3["rope"]).page_bytes), np.uint8)
    return cpu.cache_append(empty, c_kv, k_pe, slots, layout=layout), c_kv, k_pe, slots


def quantized(c_kv: Any, k_pe: Any) -> Any:
    """FlashMLA's 656 bytes of each token, as torch makes them"""
    import torch

    tiles = c_kv.to(torch.bfloat16).float().view(-1, LATENT // 128, 128)
    scale = torch.exp2(torch.ceil(torch.log2((tiles.abs().amax(-1, keepdim=True) / 448).clamp_(min=1e-4))))
    codes = (tiles / scale).to(torch.float8_e4m3fn).flatten(1).view(torch.uint8)
    return torch.cat([codes, scale[..., 0].view(torch.uint8), k_pe.to(torch.bfloat16).view(torch.uint8)], dim=1)


def restored(rows: Any) -> Any:
    """c_kv of 656 bytes a token, as torch reads them"""
    import torch

    scale = rows[:, LATENT : LATENT + 16].contiguous().view(torch.float32)[..., None]
    tiles = rows[:, :LATENT].contiguous().view(torch.float8_e4m3fn).float().view(-1, LATENT // 128, 128) * scale
    return tiles.to(torch.bfloat16).float().flatten(1), rows[:, LATENT + 16 :].contiguous().view(torch.bfloat16).float()


def append(tokens: int = 32768) -> Iterator[Bench]:
    import torch

    from ..kernels import cpu

    for layout in ("bf16", "fp8_v32"):
        cache, c_kv, k_pe, slots = filled(layout, tokens)
        theirs, tc, tk, where = (torch.from_numpy(a.copy()) for a in (cache, c_kv, k_pe, slots))
        rows = theirs.view(tokens, -1)

        def bf16(rows: Any = rows, tc: Any = tc, tk: Any = tk, where: Any = where, theirs: Any = theirs) -> Any:
            rows[where] = torch.cat([tc, tk], dim=1).to(torch.bfloat16).view(torch.uint8)
            return theirs

        def fp8(rows: Any = rows, tc: Any = tc, tk: Any = tk, where: Any = where, theirs: Any = theirs) -> Any:
            rows[where] = quantized(tc, tk)
            return theirs

        def ours(cache: Any = cache, c_kv: Any = c_kv, k_pe: Any = k_pe, slots: Any = slots, layout: str = layout) -> Any:
            return cpu.cache_append(cache, c_kv, k_pe, slots, layout=layout, out=cache)

        peers = {"torch": bf16 if layout == "bf16" else fp8}
        yield Bench("cache.append", f"{layout}, {tokens} tokens in place", ours, peers, c_kv.nbytes + k_pe.nbytes + cache.nbytes)


def read(tokens: int = 32768) -> Iterator[Bench]:
    import torch

    from ..kernels import cpu

    for layout in ("bf16", "fp8_v32"):
        cache, c_kv, k_pe, slots = filled(layout, tokens)
        rows, where = torch.from_numpy(cache).view(tokens, -1), torch.from_numpy(slots)
        out = np.empty_like(c_kv), np.empty_like(k_pe)

        def bf16(rows: Any = rows, where: Any = where) -> Any:
            values = rows[where].view(torch.bfloat16).float()
            return values[:, :LATENT].contiguous(), values[:, LATENT:].contiguous()

        def fp8(rows: Any = rows, where: Any = where) -> Any:
            return restored(rows[where])

        def ours(cache: Any = cache, slots: Any = slots, layout: str = layout, out: Any = out) -> Any:
            return cpu.cache_read(cache, slots, layout=layout, out=out)

        peers = {"torch": bf16 if layout == "bf16" else fp8}
        yield Bench("cache.read", f"{layout}, {tokens} tokens", ours, peers, c_kv.nbytes + k_pe.nbytes + cache.nbytes)


def torch_attention(q: Any, keys: Any) -> Any:
    """o[b,1,h,512] of q[b,1,h,576] over keys[b,t,576]"""
    z = (q[:, 0] @ keys.transpose(1, 2)) * SCALE
    return (z.softmax(-1) @ keys[..., :LATENT])[:, None]


def sequences(b: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, block_table, cache_seqlens of b sequences of CACHED tokens"""
    blocks = CACHED // PAGE
    return normal((b, 1, V3["heads"], WIDTH)), page_order(b * blocks).reshape(b, blocks), np.full(b, CACHED)


def attention_flops(b: int) -> int:
    return 2 * b * V3["heads"] * CACHED * (WIDTH + LATENT)


def decode() -> Iterator[Bench]:
    """One new token for each of b sequences, 128 heads, pages in no order."""
    import torch

    from ..kernels import cpu

    for b in (1, 4):
        q, table, lengths = sequences(b)
        cache = normal((table.size, PAGE, WIDTH))
        tq, tc, tt = (torch.from_numpy(a) for a in (q, cache, table))

        def theirs(tq: Any = tq, tc: Any = tc, tt: Any = tt, b: int = b) -> Any:
            return torch_attention(tq, tc[tt].view(b, CACHED, WIDTH))

        def ours(q: Any = q, cache: Any = cache, table: Any = table, lengths: Any = lengths) -> Any:
            return cpu.mla_decode(q=q, kv_cache=cache, block_table=table, cache_seqlens=lengths, scale=SCALE)

        yield Bench("mla.decode", f"b={b}, 128 heads, {CACHED} tokens", ours, {"torch": theirs}, flops=attention_flops(b))


def decode_fp8() -> Iterator[Bench]:
    """The same over FlashMLA's 656 bytes a token."""
    import torch

    from ..kernels import cpu

    for b in (1, 4):
        q, table, lengths = sequences(b)
        cache = filled("fp8_v32", b * CACHED)[0]
        tq, tc, tt = (torch.from_numpy(a) for a in (q, cache, table))

        def theirs(tq: Any = tq, tc: Any = tc, tt: Any = tt, b: int = b) -> Any:
            keys = torch.cat(restored(tc[tt].view(b * CACHED, -1)), dim=1)
            return torch_attention(tq, keys.view(b, CACHED, WIDTH))

        def ours(q: Any = q, cache: Any = cache, table: Any = table, lengths: Any = lengths) -> Any:
            return cpu.mla_decode_fp8(q=q, kv_cache=cache, block_table=table, cache_seqlens=lengths, scale=SCALE)

        yield Bench("mla.decode_fp8", f"fp8_v32, b={b}, {CACHED} tokens", ours, {"torch": theirs}, flops=attention_flops(b))


def decode_step() -> Iterator[Bench]:
    """One token through V3's attention layer with CACHED tokens before it: 187 million weights and the cache are read once."""
    import torch

    from ..kernels import cpu

    w = weights()
    x, positions = normal((1, 1, V3["hidden"])), np.array([[CACHED]])
    c_kv, k_pe = normal((1, CACHED, LATENT)), normal((1, CACHED, V3["rope"]))
    tw = {name: torch.from_numpy(a) for name, a in w.items()}
    tx, keys = torch.from_numpy(x)[0], torch.from_numpy(np.concatenate([c_kv, k_pe], axis=-1)[0])
    inv_freq, _ = cpu.rope_frequencies(like=np.zeros((), np.float64), r=V3["rope"], **YARN)
    turn = torch.polar(torch.ones(V3["rope"] // 2, dtype=torch.float64), CACHED * torch.from_numpy(inv_freq)).to(torch.complex64)
    h, dn, linear, norm = V3["heads"], V3["nope"], torch.nn.functional.linear, torch.nn.functional.rms_norm

    def turned(v: Any) -> Any:
        return torch.view_as_real(torch.view_as_complex(v.reshape(*v.shape[:-1], -1, 2)) * turn).flatten(-2)

    @torch.no_grad()
    def theirs() -> Any:
        """Absorbed, in torch's words."""
        c_q = norm(linear(tx, tw["q_a_proj"]), (V3["q_lora"],), tw["q_a_layernorm"], 1e-6)
        q = linear(c_q, tw["q_b_proj"]).view(h, 1, -1)
        latent, pe = linear(tx, tw["kv_a_proj_with_mqa"]).split([LATENT, V3["rope"]], dim=-1)
        new = torch.cat([norm(latent, (LATENT,), tw["kv_a_layernorm"], 1e-6), turned(pe)], dim=-1)
        up = tw["kv_b_proj"].view(h, -1, LATENT)
        query = torch.cat([torch.bmm(q[..., :dn], up[:, :dn]), turned(q[..., dn:])], dim=-1)[:, 0]
        every = torch.cat([keys, new])
        o = ((query @ every.T) * SCALE).softmax(-1) @ every[:, :LATENT]
        return linear(torch.bmm(up[:, dn:], o[..., None]).view(1, -1), tw["o_proj"])[None]

    def ours() -> Any:
        return cpu.mla_absorb(x=x, positions=positions, c_kv_cache=c_kv, k_pe_cache=k_pe, **w, factor=YARN["factor"])

    moved = sum(a.nbytes for a in w.values()) + c_kv.nbytes + k_pe.nbytes
    yield Bench("mla.absorb", f"one token after {CACHED}, V3's layer", ours, {"torch": theirs}, moved)
