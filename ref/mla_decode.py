"""MLA decode over a paged latent cache, of numbers or of FP8 bytes: FlashMLA's contract. Spec §2.1."""

from collections.abc import Callable
from typing import Any

from array_api_compat import device

from .attention import attention_fwd
from .mla_cache import LAYOUTS, LayoutName, cache_read_fwd, check_cache
from .op import Case, Op, declare, signature
from .xp import Array, xp_of


@signature(
    "q[b,s,h,k] kv_cache[pages,page,k] block_table[b,blocks]:index cache_seqlens[b]:index sink?[h]:const "
    "-> o[b,s,h,kv_lora_rank] lse[b,h,s]"
)
def mla_decode_fwd(
    q: Array,
    kv_cache: Array,
    block_table: Array,
    cache_seqlens: Array,
    sink: Array | None,
    *,
    kv_lora_rank: int = 512,
    scale: float = 0.0,
    causal: bool = True,
) -> tuple[tuple[Array, Array], tuple]:
    """z = scale Σ_k q[b,s,h,k] K_b[t,k],   lse = log Σ_t exp z,   o[b,s,h,c] = Σ_t exp(z - lse) K_b[t,c],   c < kv_lora_rank

    K_b[t] = kv_cache[block_table[b, t // page], t % page] for t < cache_seqlens[b]: one key head [c_kv | k_pe], whose first
    kv_lora_rank channels are the values. Causal is aligned with the end of each sequence, so s > 1 verifies speculated tokens. Slots
    beyond a sequence's length may hold anything, NaN included. scale=0 stands for k^(-1/2), FlashMLA's default: a model passes its own.
    No keys: o = 0, lse = +inf. A sink scales o as in `attention`.
    """
    pages, page, width = kv_cache.shape
    if not 0 < kv_lora_rank <= width:
        raise ValueError(f"mla.decode: kv_lora_rank is {kv_lora_rank}; expected 1 to {width}, the cache's width")
    check_table("mla.decode", block_table, cache_seqlens, pages, page)

    def keys_of(i: int) -> Array:
        return gather_sequence(kv_cache, block_table[i, ...], int(cache_seqlens[i]))

    return attend_cached(q, keys_of, sink, kv_lora_rank, scale, causal), ()


def attend_cached(
    q: Array, keys_of: Callable[[int], Array], sink: Array | None, dv: int, scale: float, causal: bool
) -> tuple[Array, Array]:
    """o[b,s,h,dv] and lse[b,h,s], sequence by sequence: the keys are one head [t,k], the values its first dv channels"""
    xp, (b, s, h, _) = xp_of(q), q.shape
    o = [xp.zeros((0, s, h, dv), dtype=q.dtype, device=device(q))]
    lse = [xp.zeros((0, h, s), dtype=q.dtype, device=device(q))]
    for i in range(b):
        keys = keys_of(i)[None, :, None, :]  # [1,t,1,k]
        (o_i, lse_i), _ = attention_fwd(q[i : i + 1, ...], keys, keys[..., :dv], sink, scale=scale, causal=causal)
        o.append(o_i)
        lse.append(lse_i)
    return xp.concat(o, axis=0), xp.concat(lse, axis=0)


def gather_sequence(kv_cache: Array, pages: Array, length: int) -> Array:
    """The tokens of one sequence in order, [length,k]; nothing else of its pages is touched"""
    xp = xp_of(kv_cache)
    _, page, width = kv_cache.shape
    count = -(-length // page)
    if count == 0:
        return kv_cache[0, :0, :]
    blocks = xp.take(kv_cache, xp.astype(pages[:count], xp.int64), axis=0)  # [count,page,k]
    return xp.reshape(blocks, (count * page, width))[:length, :]


def check_table(op: str, block_table: Array, cache_seqlens: Array, pages: int, page: int) -> None:
    xp, blocks = xp_of(block_table), block_table.shape[1]
    for i in range(cache_seqlens.shape[0]):
        length = int(cache_seqlens[i])
        if not 0 <= length <= blocks * page:
            raise ValueError(f"{op}: cache_seqlens[{i}] is {length}; expected 0 to {blocks * page}, {blocks} blocks of {page}")
        used = block_table[i, : -(-length // page)]
        outside = (used < 0) | (used >= pages)
        if bool(xp.any(outside)):
            j = int(xp.nonzero(outside)[0][0])
            raise ValueError(f"{op}: block_table[{i}, {j}] is {int(used[j])}; expected 0 to {pages - 1}")


@signature(
    "q[b,s,h,k] kv_cache[pages,bytes]:code block_table[b,blocks]:index cache_seqlens[b]:index sink?[h]:const "
    "-> o[b,s,h,head_dim_v] lse[b,h,s]"
)
def mla_decode_fp8_fwd(
    q: Array,
    kv_cache: Array,
    block_table: Array,
    cache_seqlens: Array,
    sink: Array | None,
    *,
    head_dim_v: int = 512,
    qk_rope_head_dim: int = 64,
    layout: LayoutName = "fp8_v32",
    page_size: int = 64,
    scale: float = 0.0,
    causal: bool = True,
) -> tuple[tuple[Array, Array], tuple]:
    """z = scale Σ_k q[b,s,h,k] K_b[t,k],   lse = log Σ_t exp z,   o[b,s,h,v] = Σ_t exp(z - lse) K_b[t,v],   v < head_dim_v

    K_b[t] = [c_kv | k_pe] as `cache.read` reads token t % page_size of page block_table[b, t // page_size]: bfloat16 values. head_dim_v is
    512 for both FP8 layouts: c_kv of V3.2, all of V4's 448 + 64. The rest as in `mla.decode`. A cached NaN that is read is NaN.
    """
    xp, width = xp_of(q), q.shape[3]
    c, pages = width - qk_rope_head_dim, kv_cache.shape[0]
    if not 0 < head_dim_v <= width:
        raise ValueError(f"mla.decode_fp8: head_dim_v is {head_dim_v}; expected 1 to {width}, the width of q")
    if not 0 < qk_rope_head_dim < width:
        raise ValueError(f"mla.decode_fp8: qk_rope_head_dim is {qk_rope_head_dim}; expected 1 to {width - 1}, less than the width of q")
    check_cache("mla.decode_fp8", kv_cache, layout, page_size, c, qk_rope_head_dim)
    check_table("mla.decode_fp8", block_table, cache_seqlens, pages, page_size)

    def keys_of(i: int) -> Array:
        t = xp.arange(int(cache_seqlens[i]), dtype=xp.int64, device=device(kv_cache))
        slots = xp.take(xp.astype(block_table[i, ...], xp.int64), t // page_size) * page_size + t % page_size
        sizes = {"kv_lora_rank": c, "qk_rope_head_dim": qk_rope_head_dim, "layout": layout, "page_size": page_size}
        parts, _ = cache_read_fwd(kv_cache, slots, **sizes)
        return xp.astype(xp.concat(list(parts), axis=1), q.dtype)

    return attend_cached(q, keys_of, sink, head_dim_v, scale, causal), ()


def _case(name: str, sizes: tuple[int, ...], lengths: tuple[int, ...], note: str = "", sink: bool = False, **attrs: Any) -> Case:
    b, s, h, pages, page, c, r, blocks = sizes
    dims = {"b": b, "s": s, "h": h, "k": c + r, "pages": pages, "page": page, "blocks": blocks}
    draws = {"q": ("normal", 1.0), "kv_cache": ("normal", 1.0), "block_table": ("pages", pages), "cache_seqlens": ("positions", *lengths)}
    return Case(name, dims, {**draws, "sink": ("normal", 1.0)} if sink else draws, {"kv_lora_rank": c, **attrs}, note)


mla_decode = declare(
    Op(
        "mla.decode",
        mla_decode_fwd,
        None,
        (
            _case("paged", (2, 1, 3, 9, 16, 24, 8, 4), (50, 17), "pages out of order, ragged lengths", scale=0.13523378),
            _case("verify", (2, 3, 2, 9, 16, 24, 8, 4), (64, 33), "three speculated tokens a sequence"),
            _case("empty", (2, 2, 2, 5, 8, 16, 8, 2), (0, 1), "no keys, and fewer keys than queries"),
            _case("flash", (1, 1, 4, 3, 64, 512, 64, 2), (100,), "FlashMLA's page and widths", scale=0.13523378),
            _case("all-keys", (1, 2, 2, 5, 8, 16, 8, 3), (20,), causal=False),
            _case("sink", (2, 1, 3, 5, 8, 16, 8, 2), (9, 0), "one more logit a head in the denominator", sink=True),
            Case(
                "unused-nan",
                {"b": 2, "s": 1, "h": 2, "k": 24, "pages": 5, "page": 8, "blocks": 3},
                {
                    "q": ("normal", 1.0),
                    "kv_cache": ("nan_tail", 1.0, 3, 5),
                    "block_table": ("positions", 1, 3, 0, 4, 2, 3),
                    "cache_seqlens": ("positions", 13, 2),
                },
                {"kv_lora_rank": 16},
                "NaN in the slots of the last pages that no token uses",
            ),
        ),
        "2*b*s*h*blocks*page*(k+kv_lora_rank)",
        "spec §2.1; FlashMLA flash_mla_with_kvcache and tests/ref.py",
        vary="",
    )
)


def _fp8(
    name: str, layout: str, sizes: tuple[int, ...], lengths: tuple[int, ...], note: str = "", sink: bool = False, **drawn: tuple
) -> Case:
    """The cache is what cache.append would have stored: any bytes would hold NaN."""
    b, s, h, pages, page, c, r, blocks = sizes
    how = LAYOUTS[layout]
    dims = {"b": b, "s": s, "h": h, "k": c + r, "pages": pages, "bytes": how.page_bytes(page, c, r), "blocks": blocks}
    draws = {"q": ("normal", 1.0), "kv_cache": ("latent_cache", layout, page, c, r), "block_table": ("pages", pages)}
    draws |= {"cache_seqlens": ("positions", *lengths), **({"sink": ("normal", 1.0)} if sink else {}), **drawn}
    width = c if layout == "fp8_v32" else c + r
    attrs = {"head_dim_v": width, "qk_rope_head_dim": r, "layout": layout, "page_size": page, "scale": 0.13523378}
    return Case(name, dims, draws, attrs, note)


mla_decode_fp8 = declare(
    Op(
        "mla.decode_fp8",
        mla_decode_fp8_fwd,
        None,
        (
            _fp8("v32", "fp8_v32", (2, 1, 2, 5, 8, 128, 8, 2), (11, 5), "V3.2's layout"),
            _fp8("v4", "fp8_v4", (2, 2, 2, 5, 8, 128, 8, 2), (16, 3), "V4's layout; the values are all of the key"),
            _fp8("sink", "fp8_v4", (1, 1, 3, 3, 4, 64, 8, 2), (7,), "V4's attention sink", True),
            _fp8("flash", "fp8_v32", (1, 1, 2, 2, 64, 512, 64, 1), (37,), "FlashMLA's page and widths"),
            *(
                _fp8(
                    f"tiles-{layout[4:]}",
                    layout,
                    (1, 1, 2, 3, 4, c, 8, 2),
                    (6,),
                    "a token's scales differ from tile to tile",
                    kv_cache=("tiled_cache", layout, 4, c, 8),
                )
                for layout, c in (("fp8_v32", 256), ("fp8_v4", 192))
            ),
            _fp8(
                "unused-nan",
                "fp8_v32",
                (3, 1, 2, 4, 4, 128, 8, 2),
                (7, 0, 2),
                "NaN in the slots of the last pages that no token uses; a sequence without keys",
                kv_cache=("stale_cache", 4, 128, 8, 2, 3),
                block_table=("positions", 1, 2, 0, 1, 3, 0),
            ),
        ),
        "2*b*s*h*blocks*page_size*(k+head_dim_v)",
        "spec §2.1; FlashMLA README (FP8 KV cache) and tests/quant.py",
        vary="",
    )
)
