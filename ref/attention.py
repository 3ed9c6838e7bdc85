"""Attention with log-sum-exp, by blocks of keys with an online softmax. Spec §2, §2.1."""

from typing import Any, Literal

from array_api_compat import device

from .op import Case, Op, declare, signature
from .xp import Array, once, stored, wide, xp_of

EmptyLse = Literal["+inf", "-inf"]
EmptyRows = Literal["allow", "refuse"]


def heads_first(x: Array) -> Array:
    """[b,s,h,d] to [b,h,s,d], and back"""
    return xp_of(x).permute_dims(x, (0, 2, 1, 3))


def transposed(x: Array) -> Array:
    """The last two axes exchanged"""
    return xp_of(x).matrix_transpose(x)


def rows_of(x: Array, g: int) -> Array:
    """[b,s,h,d] to [b,g,h/g·s,d]: the query heads that share a key head, one after the other"""
    b, s, h, d = x.shape
    return xp_of(x).reshape(heads_first(x), (b, g, h // g * s, d))


def heads_of(rows: Array, h: int) -> Array:
    """[b,g,h/g·s,d] back to [b,s,h,d]"""
    b, g, n, d = rows.shape
    return heads_first(xp_of(rows).reshape(rows, (b, h, n * g // h, d)))


def visible(xp: Any, s: int, t: int, start: int, stop: int, causal: bool, repeat: int, dev: Any) -> Array:
    """[repeat·s, stop-start]: whether query i sees key j; bottom-right aligned, j <= i + (t - s)"""
    i, j = xp.arange(s, device=dev)[:, None], xp.arange(start, stop, device=dev)[None, :]
    seen = (j <= i + (t - s)) if causal else (j >= 0) & (i >= 0)
    return xp.reshape(xp.broadcast_to(seen[None, ...], (repeat, *seen.shape)), (repeat * s, stop - start))


def kept_share(sink: Array, logsum: Array, s: int) -> Array:
    """What a sink leaves of o: exp(lse)/(exp(lse) + exp(sink)), for logsum[b,g,rows,1]"""
    xp = xp_of(sink)
    _, g, n, _ = logsum.shape
    logits = xp.reshape(xp.repeat(sink, s, axis=0), (1, g, n, 1))
    return 1 / (1 + xp.exp(logits - logsum))


@signature("q[b,s,h,k] k[b,t,g,k] v[b,t,g,v] sink?[h] -> o[b,s,h,v] lse[b,h,s]")
def attention_fwd(
    q: Array,
    k: Array,
    v: Array,
    sink: Array | None,
    *,
    scale: float = 0.0,
    causal: bool = True,
    empty_lse: EmptyLse = "+inf",
    empty_rows: EmptyRows = "allow",
    block: int = 512,
) -> tuple[tuple[Array, Array], tuple]:
    """z = scale Σ_k q[b,s,h,k] k[b,t,g,k],   lse[b,h,s] = log Σ_t exp z,   o[b,s,h,v] = Σ_t exp(z - lse) v[b,t,g,v]

    g heads of keys and values, each shared by h/g consecutive query heads (g = h: as many; g = 1: absorbed MLA).
    Causal is bottom-right aligned: key j is visible to query i if j <= i + (t - s). scale=0 stands for k^(-1/2). A row that sees no key has
    o = 0 and lse = +inf (FlashMLA) or -inf; empty_rows="refuse" forbids a causal call with s > t instead. A sink is one more logit of each
    head in the denominator: o gains the factor 1/(1 + exp(sink - lse)), lse stays. Keys are taken `block` at a time, so memory grows with
    s·block. 16-bit implementations round exp(z) and dz to the activations' format before the products with v, k and q, as tensor cores
    take them.
    """
    xp = xp_of(q)
    (b, s, h, _), (_, t, g, _) = q.shape, k.shape
    scale = scale or q.shape[3] ** -0.5
    if block < 1:
        raise ValueError(f"attention: block is {block}; expected block >= 1")
    if empty_rows == "refuse" and causal and s > t:
        raise ValueError(f"attention: q has {s} positions and k {t}; expected no more queries than keys (empty_rows is 'refuse')")
    if g < 1 or h % g:
        raise ValueError(f"attention: k has {g} heads; expected a divisor of the {h} heads of q")
    qh, kh, vh = rows_of(q, g), heads_first(k), heads_first(v)  # [b,g,rows,k], rows = h/g·s
    low = xp.zeros_like(qh[..., :1]) - float("inf")  # [b,g,rows,1]
    m, total = low, xp.zeros_like(low)
    acc = xp.zeros((*qh.shape[:3], v.shape[3]), dtype=q.dtype, device=device(q)) + total
    for start in range(0, t, block):
        stop = min(start + block, t)
        z = xp.matmul(once(qh), transposed(kh[:, :, start:stop, :])) * scale  # [b,g,rows,block]
        seen = visible(xp, s, t, start, stop, causal, h // g, device(q))
        z = xp.where(seen, z, low)
        m_new = xp.maximum(m, xp.max(z, axis=-1, keepdims=True))
        base = xp.where(m_new == low, xp.zeros_like(m_new), m_new)  # a row that has seen nothing yet
        p, shrink = xp.exp(z - base), xp.exp(m - base)
        total = total * shrink + xp.sum(p, axis=-1, keepdims=True)
        acc = acc * shrink + xp.matmul(stored(p, any_unit=True), vh[:, :, start:stop, :])
        m = m_new
    empty = total == 0
    denominator = xp.where(empty, xp.ones_like(total), total)
    logsum = wide(xp.where(empty, xp.zeros_like(m), m)) + xp.log(wide(denominator))
    oh = acc / denominator
    if sink is not None:
        oh = oh * kept_share(sink, logsum, s)
    lse = xp.reshape(xp.where(empty, -low if empty_lse == "+inf" else low, logsum), (b, h, s))
    o = heads_of(oh, h)
    return (o, lse), (q, k, v, sink, stored(o), lse, scale, causal, block)


def attention_bwd(do: Array, dlse: Array, saved: tuple) -> tuple[Array, ...]:
    """P = exp(z - lse), dP = do vᵀ, D = Σ_v do o:   dz = P (dP - D + dlse),   dq = scale dz k,   dk = scale dzᵀ q,   dv = Pᵀ do

    With a sink every do becomes keep·do, keep = 1/(1 + exp(sink - lse)), and dsink = -Σ_{b,s} (1 - keep) D; the rest goes through lse.
    Only o and lse are saved; P is computed again, block by block.
    """
    q, k, v, sink, o, lse, scale, causal, block = saved
    xp = xp_of(q)
    (b, s, h, _), (_, t, g, _) = q.shape, k.shape
    qh, doh, kh, vh = rows_of(q, g), rows_of(do, g), heads_first(k), heads_first(v)
    lse, dlse = (xp.reshape(a, (b, g, h // g * s, 1)) for a in (lse, dlse))
    seen_any = ~xp.isinf(lse)  # [b,g,rows,1]
    logsum = xp.where(seen_any, lse, xp.zeros_like(lse))
    through_lse = xp.where(seen_any, dlse, xp.zeros_like(dlse))
    delta = xp.sum(doh * rows_of(o, g), axis=-1, keepdims=True)  # [b,g,rows,1]
    dsink = None
    if sink is not None:
        keep = xp.where(seen_any, kept_share(sink, logsum, s), xp.zeros_like(logsum))
        pull = xp.where(seen_any, delta * (1 - keep), xp.zeros_like(delta))
        dsink = -xp.sum(xp.reshape(pull, (b, h, s)), axis=(0, 2))
        # o = keep·a with a the plain attention: a's own D is D/keep·keep, and keep(lse) adds D (1 - keep) to dlse.
        through_lse = through_lse + delta * (1 - keep)
        doh = doh * keep
    dq, dk, dv = 0 * qh, [], []
    for start in range(0, t, block):
        stop = min(start + block, t)
        kb, vb = kh[:, :, start:stop, :], vh[:, :, start:stop, :]
        z = xp.matmul(once(qh), transposed(kb)) * scale
        seen = visible(xp, s, t, start, stop, causal, h // g, device(q)) & seen_any
        p = xp.where(seen, xp.exp(xp.where(seen, z - logsum, xp.zeros_like(z))), xp.zeros_like(z))  # [b,g,rows,block]
        dz = p * (xp.matmul(doh, transposed(vb)) - delta + through_lse) * scale
        p, dz = stored(p), stored(dz, any_unit=True)
        dq = dq + xp.matmul(dz, kb)
        dk.append(xp.matmul(transposed(dz), qh))
        dv.append(xp.matmul(transposed(p), doh))
    dk = xp.concat(dk, axis=2) if dk else 0 * kh
    dv = xp.concat(dv, axis=2) if dv else 0 * vh
    grads = heads_of(dq, h), heads_first(dk), heads_first(dv)
    return grads if dsink is None else (*grads, dsink)


def _case(name: str, sizes: tuple[int, ...], note: str = "", spread: float = 1.0, sink: bool = False, **attrs: Any) -> Case:
    dims: dict[str, int] = dict(zip(("b", "s", "t", "h", "g", "k", "v"), sizes, strict=True))
    draws: dict[str, tuple] = {
        "q": ("normal", spread),
        "k": ("normal", 1.0),
        "v": ("normal", 1.0),
        "do": ("normal", 1.0),
        "dlse": ("normal", 1.0),
    }
    return Case(name, dims, {**draws, "sink": ("normal", 1.0)} if sink else draws, attrs, note)


attention = declare(
    Op(
        "attention",
        attention_fwd,
        attention_bwd,
        (
            _case("square", (1, 7, 7, 2, 2, 24, 16)),
            _case("one", (1, 1, 1, 1, 1, 8, 8)),
            _case("decode", (2, 1, 33, 2, 2, 24, 16), "one query, bottom-right aligned: it sees every key"),
            _case("verify", (1, 3, 40, 2, 2, 24, 16), "three speculated tokens"),
            _case("empty-rows", (1, 6, 4, 1, 1, 8, 8), "more queries than keys: the first two see nothing"),
            _case("all-keys", (1, 5, 9, 2, 2, 24, 16), causal=False),
            _case("shared-key", (1, 4, 12, 4, 1, 24, 16), "one key head, as absorbed MLA has it", scale=0.13523378),
            _case("blocks", (1, 8, 50, 1, 1, 16, 8), "keys in blocks of 16, the last one ragged", block=16),
            _case("large-logits", (1, 5, 20, 2, 2, 24, 16), "scores beyond exp's range in float32", 60.0),
            _case("scaled", (1, 5, 20, 2, 2, 192, 128), "V3's widths and softmax scale", scale=0.13523378),
            _case("sink", (1, 4, 9, 3, 3, 16, 8), "one more logit a head in the denominator", sink=True),
            _case("grouped", (1, 4, 6, 4, 2, 16, 8), "each key head is shared by two consecutive query heads"),
            _case("beyond-float16", (1, 4, 12, 1, 1, 24, 8), "products of q and k exceed 65504", 10000.0),
            _case("odd-widths", (1, 3, 5, 1, 1, 80, 72), "the widths of q and v differ and are no multiple of 64"),
        ),
        "2*b*s*t*h*(k+v)",
        "DeepSeek-V3 paper eq. 10; FlashMLA tests/ref.py; Milakov and Gimelshein 2018 (online softmax)",
        vary="st",
    )
)
