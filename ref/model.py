"""The whole model: embedding, layers, norm, head. Spec §0, §9; DeepSeek-V3 paper §2.

model_fwd reads a checkpoint's names, one layer at a time and of a MoE layer the experts that its tokens chose. The op `model` has the same
layers stacked. Both are model_by.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from array_api_compat import device

from .block import CONSTANT, EXPERTS, block_by, block_by_bwd, dense_bwd, dense_fwd
from .config import Config
from .embedding import check_ids, embedding_bwd, embedding_fwd
from .linear import linear_bwd, linear_fwd
from .mla_parts import activation_bwd, stored_fwd
from .moe import layer_by, layer_by_bwd
from .names import MODEL, expert_names, expert_shapes, is_dense, layer_names
from .norm import rmsnorm_bwd, rmsnorm_fwd
from .xp import Array, stored, xp_of

Cache = tuple[Array, Array]  # c_kv[b,t,c] and k_pe[b,t,r] of one layer
SHARED = EXPERTS[5:]


class Renamed(Mapping):
    """A checkpoint's weights under the ops' names: each is read when it is asked for, and None where the model has none."""

    def __init__(self, weights: Mapping[str, Array], names: Mapping[str, str]):
        self.weights, self.names = weights, names

    def __getitem__(self, key: str) -> Array:
        return self.weights[self.names[key]]

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self.names else default  # a tensor that is missing is an error, not None

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def model_by(ids: Array, w: Mapping[str, Array], layers: Iterable[Callable[[Array], tuple]], eps: float, keep: bool = True) -> tuple:
    """x = embed_tokens[ids],   x = layer(x) for each,   hidden = rmsnorm(x, norm),   logits = lm_head hidden

    A layer returns (x[b,s,d], saved). Returns (logits[b,s,v], hidden[b,s,d]) and what the backward needs.
    """
    xp, (b, s) = xp_of(ids), ids.shape
    x, s_embedding = embedding_fwd(xp.reshape(ids, (b * s,)), w["embed_tokens"])
    x, s_layers = xp.reshape(x, (b, s, x.shape[1])), []
    for layer in layers:
        x, saved = layer(x)
        s_layers.append(saved)
    hidden, s_norm = stored_fwd(rmsnorm_fwd, xp.reshape(x, (b * s, x.shape[2])), w["norm"], eps=eps)  # [n,d]
    logits, s_head = linear_fwd(hidden, w["lm_head"])
    saved = (s_embedding, s_layers, s_norm, s_head, x.shape) if keep else None
    return (xp.reshape(logits, (b, s, logits.shape[1])), xp.reshape(hidden, x.shape)), saved


def model_by_bwd(dlogits: Array, dhidden: Array, saved: tuple, layer_bwd: Callable[[Array, Any], tuple]) -> tuple[dict[str, Array], list]:
    """The gradients of embed_tokens, norm and lm_head, and those of the layers, the first one first"""
    s_embedding, s_layers, s_norm, s_head, shape = saved
    xp, n, grads, own = xp_of(dlogits), shape[0] * shape[1], {}, []
    back, grads["lm_head"] = activation_bwd(linear_bwd, xp.reshape(dlogits, (n, dlogits.shape[2])), s_head)
    dx, grads["norm"] = activation_bwd(rmsnorm_bwd, stored(back + xp.reshape(dhidden, back.shape)), s_norm)
    dx = xp.reshape(dx, shape)
    for s_layer in reversed(s_layers):
        dx, found = layer_bwd(dx, s_layer)
        own.append(found)
    grads["embed_tokens"] = embedding_bwd(xp.reshape(dx, (n, shape[2])), s_embedding)
    return grads, own[::-1]


def layer_fwd(
    x: Array,
    positions: Array,
    weights: Mapping[str, Array],
    i: int,
    config: Config,
    *,
    cache: Cache | None = None,
    cu_seqlens: Array | None = None,
    absorbed: bool = False,
    topk_idx: Array | None = None,
    keep: bool = True,
) -> tuple[tuple[Array, Cache, Any], Any]:
    """y[b,s,d] of layer i, its cache with the new tokens appended, and topk_idx[b,s,k], or None in a dense layer: `block` by names

    weights is any Mapping by checkpoint names. It is asked for a weight when its turn comes, and for the experts that tokens chose; with
    keep=False nothing holds on to one afterwards, and saved is None. cu_seqlens packs sequences into one row and takes no cache.
    """
    xp, dense = xp_of(x), is_dense(config, i)
    w = Renamed(weights, layer_names(config, i))
    given = None if topk_idx is None or dense else xp.reshape(topk_idx, (x.shape[0] * x.shape[1], topk_idx.shape[2]))

    def expert(e: int) -> tuple[Array, Array, Array]:
        gate, up, down = expert_names(i, e)
        return weights[gate], weights[up], weights[down]

    def ffn(normed: Array) -> tuple:
        if dense:
            return dense_fwd(normed, w)
        shared = [w[name] for name in SHARED] if config.n_shared_experts else []
        return layer_by(normed, w["gate_weight"], w.get(CONSTANT), shared, expert, **config.moe(), topk_idx=given, keep=keep)

    (y, c_kv, k_pe, idx), saved = block_by(
        x, positions, w, ffn, cache or (None, None), cu_seqlens, keep, absorbed=absorbed, **config.norms(), **config.attention()
    )
    new = (c_kv, k_pe) if cache is None else tuple(xp.concat(pair, axis=1) for pair in zip(cache, (c_kv, k_pe), strict=True))
    return (y, new, None if dense else idx), (saved, i, config) if keep else None


def layer_bwd(dy: Array, saved: tuple) -> tuple[Array, dict[str, Array]]:
    """dx and the gradients by checkpoint names; an expert without tokens has exact zeros, all of them one number in memory"""
    parts, i, config = saved
    xp, names, experts = xp_of(dy), layer_names(config, i), {}

    def experts_bwd(df: Array, s_ffn: tuple) -> tuple[Array, dict[str, Array]]:
        dx, dgate_weight, filled, *dshared = layer_by_bwd(df, s_ffn)
        experts.update(filled)
        return dx, {"gate_weight": dgate_weight, **dict(zip(SHARED, dshared, strict=False))}

    dx, own = block_by_bwd(dy, parts, dense_bwd if is_dense(config, i) else experts_bwd)
    grads = {names[key]: g for key, g in own.items() if key in names}
    if not is_dense(config, i):
        zero = xp.zeros((1, 1), dtype=dy.dtype, device=device(dy))
        zeros = tuple(xp.broadcast_to(zero, shape) for shape in expert_shapes(config))
        for e in range(config.n_routed_experts):
            grads |= dict(zip(expert_names(i, e), experts.get(e, zeros), strict=True))
    return dx, grads


def model_fwd(
    ids: Array,
    weights: Mapping[str, Array],
    config: Config,
    *,
    positions: Array | None = None,
    cu_seqlens: Array | None = None,
    caches: list[Cache] | None = None,
    topk_idx: Array | None = None,
    absorbed: bool = False,
    keep: bool = True,
) -> tuple[tuple[Array, Array, list[Cache]], Any]:
    """logits[b,s,v], hidden[b,s,d] and the caches of a checkpoint's model: embedding, layers, norm, head

    hidden is what an MTP module reads, after the final norm. caches are what an earlier call returned; ids then continue its tokens.
    positions are counted on from there, and from 0 in each of the sequences that cu_seqlens packs. topk_idx[m,b,s,k] replays the choice of
    the m MoE layers. weights and keep as in layer_fwd.
    """
    check_ids("model", "ids", ids, config.vocab_size)
    if positions is None:
        positions = positions_of(ids, 0 if caches is None else caches[0][0].shape[1], cu_seqlens)
    new: list[Cache] = []

    def layer(i: int) -> Callable[[Array], tuple]:
        def run(x: Array) -> tuple:
            choice = None if topk_idx is None or is_dense(config, i) else topk_idx[i - config.first_k_dense_replace, ...]
            cache = None if caches is None else caches[i]
            how = {"cache": cache, "cu_seqlens": cu_seqlens, "absorbed": absorbed, "topk_idx": choice, "keep": keep}
            (x, cache, _), saved = layer_fwd(x, positions, weights, i, config, **how)
            new.append(cache)
            return x, saved

        return run

    layers = (layer(i) for i in range(config.num_hidden_layers))
    (logits, hidden), saved = model_by(ids, Renamed(weights, MODEL), layers, config.rms_norm_eps, keep)
    return (logits, hidden, new), saved


def model_bwd(dlogits: Array, dhidden: Array, saved: tuple) -> dict[str, Array]:
    """The gradient of every weight by its checkpoint name; none to the router's bias, none to the caches"""
    outer, layers = model_by_bwd(dlogits, dhidden, saved, layer_bwd)
    grads = {MODEL[key]: g for key, g in outer.items()}
    for own in layers:
        grads |= own
    return grads


def positions_of(ids: Array, start: int = 0, cu_seqlens: Array | None = None) -> Array:
    """positions[b,s]: counted from `start`, or from 0 in each packed sequence"""
    xp, (b, s) = xp_of(ids), ids.shape
    place = xp.arange(s, dtype=xp.int64, device=device(ids))
    if cu_seqlens is not None:
        ends = xp.astype(cu_seqlens, xp.int64)
        place = place - xp.take(ends, xp.searchsorted(ends, place, side="right") - 1)
    return xp.broadcast_to(place + start, (b, s))
