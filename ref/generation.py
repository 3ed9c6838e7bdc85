"""Generation on the latent cache: greedy or sampled, alone or with the first MTP module as a speculative drafter. Spec §5; V3 paper §5.4.3.

A drafted token is accepted or replaced so that the output has the main model's distribution (Leviathan et al. 2023); a greedy
distribution is one token's, so that the same rule keeps greedy output as it is.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from array_api_compat import device

from .config import Config
from .embedding import embedding_fwd
from .linear import linear_fwd
from .model import Cache, Renamed, layer_fwd, model_fwd
from .mtp import module_by
from .names import MODEL, layer_names
from .xp import Array, xp_of

Random = Callable[[], float]


class Generated(NamedTuple):
    """ids[1,·]: the prompt and what follows it; of `drafted` tokens that the MTP module proposed, `accepted` were kept."""

    ids: Array
    accepted: int
    drafted: int


def probabilities(logits: Array, temperature: float, top_p: float) -> Array:
    """p[v] = softmax(logits/temperature) over the fewest tokens that reach top_p together, 0 elsewhere; one token's at temperature 0

    The lowest index wins a tie.
    """
    xp, v = xp_of(logits), logits.shape[0]
    token = xp.arange(v, device=device(logits))
    if temperature == 0:
        return xp.astype(token == xp.argmax(logits), logits.dtype)
    e = xp.exp((logits - xp.max(logits)) / temperature)
    p = e / xp.sum(e)
    order = xp.argsort(p, descending=True, stable=True)
    ranked = xp.take(p, order)
    kept = xp.take(xp.cumulative_sum(ranked) - ranked < top_p, xp.argsort(order, stable=True))
    p = xp.where(kept | (token == order[0]), p, xp.zeros_like(p))
    return p / xp.sum(p)


def draw(p: Array, random: Random) -> int:
    """The token at which the running sum of p first exceeds a uniform number; never one of probability 0"""
    xp = xp_of(p)
    below = xp.cumulative_sum(p)
    total = below[-1:]
    i = xp.minimum(xp.searchsorted(below, total * random(), side="right"), xp.searchsorted(below, total, side="left"))
    return int(i[0])


def verified(x: int, p: Array, q: Array, random: Random) -> tuple[bool, int]:
    """A draft x drawn from q, kept with probability min(1, p(x)/q(x)), else replaced by a draw from max(p - q, 0), normalised

    What comes out has the distribution p: q(x) min(1, p(x)/q(x)) = min(p, q), and what is missing to p is max(p - q, 0).
    """
    xp = xp_of(p)
    share = xp.minimum(p[x] / q[x], xp.ones_like(p[x]))
    if draw(xp.stack([1 - share, share]), random) == 1:
        return True, x
    return False, draw(xp.where(p > q, p - q, xp.zeros_like(p)), random)


def mtp_layer_fwd(
    h: Array,
    ids: Array,
    positions: Array,
    weights: Mapping[str, Array],
    config: Config,
    *,
    cache: Cache | None = None,
    absorbed: bool = False,
) -> tuple[Array, Array, Cache]:
    """logits[b,s,v], h_next[b,s,d] and the cache of the checkpoint's first MTP layer: row i has h[:,i] and reads ids[:,i], the token after

    Embedding and head are the model's, of which a checkpoint's layer holds copies. Nothing is kept for a backward.
    """
    xp, (b, s, d), i = xp_of(h), h.shape, config.num_hidden_layers
    w = Renamed(weights, {**layer_names(config, i), "embed_tokens": MODEL["embed_tokens"], "shared_head": MODEL["lm_head"]})
    embedded, _ = embedding_fwd(xp.reshape(ids, (b * s,)), w["embed_tokens"])

    def block(x: Array) -> tuple[Array, Cache]:
        (y, new, _), _saved = layer_fwd(x, positions, weights, i, config, cache=cache, absorbed=absorbed, keep=False)
        return y, new

    (last, _), saved = module_by(h, embedded, w, block, eps=config.rms_norm_eps)
    logits, _ = linear_fwd(xp.reshape(last, (b * s, d)), w["shared_head"])
    return xp.reshape(logits, (b, s, logits.shape[1])), last, saved[3]


def generate(
    ids: Array,
    weights: Mapping[str, Array],
    config: Config,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    random: Random | Iterable[float] | None = None,
    mtp: bool = False,
    stop: Collection[int] = (),
) -> Generated:
    """Continues ids[1,s] by up to max_new_tokens tokens, to the first of `stop` at most, each drawn from the model's `probabilities`

    The cache holds c_kv and k_pe; attention is absorbed. With mtp each step drafts one token, and the model reads it together with the one
    before. random() gives uniform numbers in [0,1), or is as many of them as are needed; at temperature 0 none is.
    """
    check_generation(ids, config, max_new_tokens, temperature, top_p, random, mtp)
    uniform = uniforms(random, temperature)
    drafter = Drafter(weights, config) if mtp else None
    tokens, caches, accepted, drafted, end = ids, None, 0, 0, ids.shape[1] + max_new_tokens

    def read(new: Array) -> tuple[list[Array], Array]:
        """What the model predicts after each of the new tokens, and their hidden states"""
        nonlocal caches
        (logits, hidden, caches), _ = model_fwd(new, weights, config, caches=caches, absorbed=True, keep=False)
        return [probabilities(logits[0, i, :], temperature, top_p) for i in range(max(0, logits.shape[1] - 2), logits.shape[1])], hidden

    def done() -> bool:
        return tokens.shape[1] >= end or (tokens.shape[1] > ids.shape[1] and int(tokens[0, -1]) in stop)

    if done():
        return Generated(tokens, 0, 0)
    after, hidden = read(ids)
    tokens = appended(tokens, draw(after[-1], uniform))
    while not done():
        if drafter is None or tokens.shape[1] + 1 == end:
            after, hidden = read(tokens[:, -1:])
            tokens = appended(tokens, draw(after[-1], uniform))
            continue
        q = probabilities(drafter.logits(hidden, tokens), temperature, top_p)
        x = draw(q, uniform)
        after, hidden = read(appended(tokens[:, -1:], x))
        kept, x = verified(x, after[0], q, uniform)
        tokens, drafted, accepted = appended(tokens, x), drafted + 1, accepted + kept
        if not kept:  # the rejected draft has been read: it is forgotten
            hidden, caches = hidden[:, :1, :], [shortened(cache) for cache in caches or []]
        elif not done():
            tokens = appended(tokens, draw(after[1], uniform))
    return Generated(tokens, accepted, drafted)


class Drafter:
    """The first MTP module and its cache: row i has token i's hidden state and reads token i + 1."""

    def __init__(self, weights: Mapping[str, Array], config: Config):
        self.weights, self.config, self.cache = weights, config, None

    def logits(self, hidden: Array, tokens: Array) -> Array:
        """[v], of the token after tokens[1,n]; hidden[1,r,d] are the states of the r tokens before the last that are new"""
        r, n = hidden.shape[1], tokens.shape[1]
        positions = xp_of(tokens).arange(n - 1 - r, n - 1, device=device(tokens))[None, :]
        logits, _, self.cache = mtp_layer_fwd(
            hidden, tokens[:, n - r :], positions, self.weights, self.config, cache=self.cache, absorbed=True
        )
        return logits[0, -1, :]


def appended(tokens: Array, x: int) -> Array:
    xp = xp_of(tokens)
    return xp.concat([tokens, xp.full((1, 1), x, dtype=tokens.dtype, device=device(tokens))], axis=1)


def shortened(cache: Cache) -> Cache:
    """Without the last token"""
    c_kv, k_pe = cache
    return c_kv[:, :-1, :], k_pe[:, :-1, :]


def uniforms(random: Random | Iterable[float] | None, temperature: float) -> Random:
    if temperature == 0:
        return lambda: 0.5  # a distribution of one token: any number draws it
    if callable(random):
        return random  # type: ignore[return-value]
    numbers = iter(() if random is None else random)

    def following() -> float:
        try:
            return float(next(numbers))
        except StopIteration:
            raise ValueError("generate: random has run out; expected a uniform number for each draw, three for each draft") from None

    return following


def check_generation(ids: Any, config: Config, max_new_tokens: int, temperature: float, top_p: float, random: Any, mtp: bool) -> None:
    if len(ids.shape) != 2 or ids.shape[0] != 1 or ids.shape[1] < 1:
        raise ValueError(f"generate: ids has shape {tuple(ids.shape)}; expected [1,s], one prompt of one token at least")
    for name, value, fits, expected in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 0, "0 or more"),
        ("temperature", temperature, temperature >= 0, "0 (greedy) or more"),
        ("top_p", top_p, 0 < top_p <= 1, "more than 0 and at most 1"),
        ("random", random, temperature == 0 or random is not None, "a callable or uniform numbers in [0,1), to sample with"),
        ("mtp", mtp, not mtp or config.num_nextn_predict_layers > 0, "False: the config has no MTP layer (num_nextn_predict_layers)"),
    ):
        if not fits:
            raise ValueError(f"generate: {name} is {value}; expected {expected}")
