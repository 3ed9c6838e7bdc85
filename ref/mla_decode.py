"""MLA decode over a paged latent cache: FlashMLA's contract. Spec §2.1."""

from .attention import attention_fwd
from .op import Case, Op, signature
from .xp import Array, xp_of


@signature("q[b,s,h,k] kv_cache[pages,page,k] block_table[b,blocks]:index cache_seqlens[b]:index -> o[b,s,h,kv_lora_rank] lse[b,h,s]")
def mla_decode_fwd(
    q: Array,
    kv_cache: Array,
    block_table: Array,
    cache_seqlens: Array,
    *,
    kv_lora_rank: int = 512,
    scale: float = 0.0,
    causal: bool = True,
) -> tuple[tuple[Array, Array], tuple]:
    """z = scale Σ_k q[b,s,h,k] K_b[t,k],   lse = log Σ_t exp z,   o[b,s,h,c] = Σ_t exp(z - lse) K_b[t,c],   c < kv_lora_rank

    K_b[t] = kv_cache[block_table[b, t // page], t % page] for t < cache_seqlens[b]: one key head [c_kv | k_pe], whose first
    kv_lora_rank channels are the values. Causal is aligned with the end of each sequence, so s > 1 verifies speculated tokens. Slots
    beyond a sequence's length may hold anything, NaN included. scale=0 stands for k^(-1/2), FlashMLA's default: a model passes its own.
    No keys: o = 0, lse = +inf.
    """
    xp = xp_of(q)
    _check(kv_cache, block_table, cache_seqlens, kv_lora_rank)
    b = q.shape[0]
    o, lse = [], []
    for i in range(b):
        keys = gather_sequence(kv_cache, block_table[i, :], int(cache_seqlens[i]))[None, :, None, :]  # [1,t,1,k]
        (o_i, lse_i), _ = attention_fwd(q[i : i + 1, ...], keys, keys[..., :kv_lora_rank], scale=scale, causal=causal)
        o.append(o_i)
        lse.append(lse_i)
    return (xp.concat(o, axis=0), xp.concat(lse, axis=0)), ()


def gather_sequence(kv_cache: Array, pages: Array, length: int) -> Array:
    """The tokens of one sequence in order, [length,k]; nothing else of its pages is touched"""
    xp = xp_of(kv_cache)
    _, page, width = kv_cache.shape
    count = -(-length // page)
    if count == 0:
        return kv_cache[0, :0, :]
    blocks = xp.take(kv_cache, xp.astype(pages[:count], xp.int64), axis=0)  # [count,page,k]
    return xp.reshape(blocks, (count * page, width))[:length, :]


def _check(kv_cache: Array, block_table: Array, cache_seqlens: Array, kv_lora_rank: int) -> None:
    xp, (pages, page, width) = xp_of(kv_cache), kv_cache.shape
    if not 0 < kv_lora_rank <= width:
        raise ValueError(f"mla.decode: kv_lora_rank is {kv_lora_rank}; expected 1 to {width}, the cache's width")
    blocks = block_table.shape[1]
    for i in range(cache_seqlens.shape[0]):
        length = int(cache_seqlens[i])
        if not 0 <= length <= blocks * page:
            raise ValueError(f"mla.decode: cache_seqlens[{i}] is {length}; expected 0 to {blocks * page}, {blocks} blocks of {page}")
        used = block_table[i, : -(-length // page)]
        outside = (used < 0) | (used >= pages)
        if bool(xp.any(outside)):
            j = int(xp.nonzero(outside)[0][0])
            raise ValueError(f"mla.decode: block_table[{i}, {j}] is {int(used[j])}; expected 0 to {pages - 1}")


def _case(name: str, sizes: tuple[int, ...], lengths: tuple[int, ...], note: str = "", **attrs: object) -> Case:
    b, s, h, pages, page, c, r, blocks = sizes
    dims = {"b": b, "s": s, "h": h, "k": c + r, "pages": pages, "page": page, "blocks": blocks}
    draws = {"q": ("normal", 1.0), "kv_cache": ("normal", 1.0), "block_table": ("pages", pages), "cache_seqlens": ("positions", *lengths)}
    return Case(name, dims, draws, {"kv_lora_rank": c, **attrs}, note)


mla_decode = Op(
    "mla.decode",
    mla_decode_fwd,
    None,
    (
        _case("paged", (2, 1, 3, 9, 16, 24, 8, 4), (50, 17), "pages out of order, ragged lengths", scale=0.13523378),
        _case("verify", (2, 3, 2, 9, 16, 24, 8, 4), (64, 33), "three speculated tokens a sequence"),
        _case("empty", (2, 2, 2, 5, 8, 16, 8, 2), (0, 1), "no keys, and fewer keys than queries"),
        _case("flash", (1, 1, 4, 3, 64, 512, 64, 2), (100,), "FlashMLA's page and widths", scale=0.13523378),
        _case("all-keys", (1, 2, 2, 5, 8, 16, 8, 3), (20,), causal=False),
    ),
    "2*b*s*h*blocks*page*(k+kv_lora_rank)",
    "spec §2.1; FlashMLA flash_mla_with_kvcache and tests/ref.py",
    vary="",
)
