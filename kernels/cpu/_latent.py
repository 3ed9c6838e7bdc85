"""The two forms of latent attention's core, naive and absorbed, each forward and backward, between queries and latents and o."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import _pool
from ._attend import Part, attend, attend_bwd
from .linear import product, transposed

Array = NDArray[Any]
Sizes = tuple[int, int, int, int]  # heads, dn, r, dv
BLOCK = 512  # keys at a time


class Heads(NamedTuple):
    """Some heads, or all, between their projections: what the forward fills (lse, o) and the backward needs."""

    sizes: Sizes
    up: Array  # their rows of kv_b_proj
    scale: float
    segments: list[tuple[slice, slice]]
    q: Array  # [h,dn+r,n], the rope part not yet turned
    q_pe: Array  # [h,n,r]
    c_kv: Array  # [b·(t+s),c], the cache's first
    k_pe: Array  # [b·(t+s),r]
    core: tuple[Array, ...]
    lse: Array  # [h,n]
    o: Array  # [h,dv,n]


class Naive:
    """Keys and values expanded for every head: [k_nope | v][h,·,m] = kv_b_proj c_kv"""

    name = "mla.prefill"

    @staticmethod
    def parts(own: Heads, qs: slice, ks: slice) -> tuple[list[Part], Array]:
        dn = own.sizes[1]
        q, kv = own.q[:, :dn, qs].swapaxes(1, 2), own.core[0][:, :, ks].swapaxes(1, 2)
        return [Part(q, kv[..., :dn]), Part(own.q_pe[:, qs], own.k_pe[ks])], kv[..., dn:]

    @staticmethod
    def core(sizes: Sizes, q: Array, c_kv: Array, kv_b_proj: Array) -> tuple[Array, ...]:
        h, dn, _, dv = sizes
        return (transposed(kv_b_proj, c_kv).reshape(h, dn + dv, len(c_kv)),)

    @staticmethod
    def forward(own: Heads) -> None:
        for qs, ks in own.segments:
            parts, v = Naive.parts(own, qs, ks)
            attend(parts, v, own.o[:, :, qs].swapaxes(1, 2), own.lse[:, qs], own.scale, True, BLOCK, None, np.inf)

    @staticmethod
    def backward(own: Heads, do: Array, pull: Array, dq: Array, dq_pe: Array, dk_pe: Array, out: Array | None) -> tuple[Array, Array]:
        """dc_kv[m,c], dkv_b_proj; fills dq[h,dn,n], dq_pe[h,n,r], dk_pe[m,r]"""
        dn = own.sizes[1]
        dkv = _pool.empty(own.core[0].shape, do.dtype)
        for qs, ks in own.segments:
            parts, v = Naive.parts(own, qs, ks)
            dkv_own = dkv[:, :, ks].swapaxes(1, 2)
            grads = [Part(dq[:, :, qs].swapaxes(1, 2), dkv_own[..., :dn]), Part(dq_pe[:, qs], dk_pe[ks])]
            do_own = do[:, :, qs].swapaxes(1, 2)
            attend_bwd(parts, v, do_own, own.lse[:, qs], pull[:, qs], grads, dkv_own[..., dn:], own.scale, True, BLOCK)
        flat = dkv.reshape(dkv.shape[0] * dkv.shape[1], dkv.shape[2])
        return product(own.up.T, flat).T, product(flat, own.c_kv, out)


class Absorbed:
    """W_UK folded into the query, W_UV applied to the result: one key [c_kv | k_pe] and one value c_kv for all heads"""

    name = "mla.absorb"

    @staticmethod
    def parts(own: Heads, qs: slice, ks: slice) -> list[Part]:
        return [Part(own.core[0][:, qs], own.c_kv[ks]), Part(own.q_pe[:, qs], own.k_pe[ks])]

    @staticmethod
    def up(own: Heads) -> tuple[Array, Array]:
        """W_UK[h,dn,c], W_UV[h,dv,c]"""
        h, dn, _, dv = own.sizes
        w = own.up.reshape(h, dn + dv, -1)
        return w[:, :dn], w[:, dn:]

    @staticmethod
    def core(sizes: Sizes, q: Array, c_kv: Array, kv_b_proj: Array) -> tuple[Array, ...]:
        """q_c[h,n,c], and room for o_c[h,n,c]"""
        h, dn, _, dv = sizes
        w_uk = kv_b_proj.reshape(h, dn + dv, -1)[:, :dn]
        q_c = np.matmul(q[:, :dn].swapaxes(1, 2), w_uk)
        return q_c, _pool.empty(q_c.shape, q_c.dtype)

    @staticmethod
    def forward(own: Heads) -> None:
        o_c = own.core[1]
        for qs, ks in own.segments:
            parts = Absorbed.parts(own, qs, ks)
            attend(parts, own.c_kv[ks], o_c[:, qs], own.lse[:, qs], own.scale, True, BLOCK, None, np.inf)
        np.matmul(Absorbed.up(own)[1], o_c.swapaxes(1, 2), out=own.o)

    @staticmethod
    def backward(own: Heads, do: Array, pull: Array, dq: Array, dq_pe: Array, dk_pe: Array, out: Array | None) -> tuple[Array, Array]:
        """dc_kv[m,c] from keys and values, dkv_b_proj; fills dq[h,dn,n], dq_pe[h,n,r], dk_pe[m,r]"""
        (w_uk, w_uv), (q_c, o_c), dn = Absorbed.up(own), own.core, own.sizes[1]
        do_c = np.matmul(do.swapaxes(1, 2), w_uv)  # [h,n,c]
        dq_c, dk, dv = np.empty_like(q_c), np.empty_like(own.c_kv), np.empty_like(own.c_kv)
        for qs, ks in own.segments:
            grads = [Part(dq_c[:, qs], dk[ks]), Part(dq_pe[:, qs], dk_pe[ks])]
            parts = Absorbed.parts(own, qs, ks)
            attend_bwd(parts, own.c_kv[ks], do_c[:, qs], own.lse[:, qs], pull[:, qs], grads, dv[ks], own.scale, True, BLOCK)
        np.matmul(w_uk, dq_c.swapaxes(1, 2), out=dq)
        dkv_b = _pool.empty(own.up.shape, do.dtype) if out is None else out
        by_head = dkv_b.reshape(w_uk.shape[0], -1, w_uk.shape[2])
        np.matmul(own.q[:, :dn], dq_c, out=by_head[:, :dn])
        np.matmul(do, o_c, out=by_head[:, dn:])
        return dk + dv, dkv_b


Form = type[Naive] | type[Absorbed]
