"""What keeps experts balanced: V2's and V3's losses, V2's token dropping, V3's bias. Spec §3.2, §3.3."""

from decimal import Decimal
from typing import Any, Literal

from array_api_compat import device

from .op import Case, Op, declare, signature
from .selection import check_chosen
from .xp import Array, constant, xp_of

Level = Literal["sequence", "expert", "device", "communication"]


def counts_of(topk_idx: Array, e: int) -> Array:
    """int64 [b,e]: how many slots of topk_idx[b,s,k] chose each expert; -1 chose none"""
    xp = xp_of(topk_idx)
    flat = xp.reshape(topk_idx, (topk_idx.shape[0], topk_idx.shape[1] * topk_idx.shape[2]))
    hits = flat[:, :, None] == xp.arange(e, device=device(topk_idx))  # [b,s·k,e]
    return xp.sum(xp.astype(hits, xp.int64), axis=1)


def devices_reached(topk_idx: Array, e: int, devices: int) -> Array:
    """int64 [b,devices]: how many tokens send something to each device, experts lying on devices in equal blocks"""
    xp = xp_of(topk_idx)
    owner = xp.where(topk_idx < 0, topk_idx, topk_idx // (e // devices))
    hits = owner[..., None] == xp.arange(devices, device=device(topk_idx))  # [b,s,k,devices]
    return xp.sum(xp.astype(xp.any(hits, axis=2), xp.int64), axis=1)


@signature("scores[b,s,e] topk_idx[b,s,k]:index -> loss[]")
def balance_loss_fwd(
    scores: Array,
    topk_idx: Array,
    *,
    alpha: float = 1e-4,
    level: Level = "sequence",
    normalise: bool = True,
    devices: int = 8,
    topk_devices: int = 3,
) -> tuple[Array, tuple]:
    """loss = alpha mean_b Σ_i f[b,i] P[b,i],   f[b,i] = e/(k s) Σ_t [i in topk_idx[b,t]],   P[b,i] = mean_t s[b,t,i]/Σ_j s[b,t,j]

    level="sequence" is V3's loss (eq. 17-20) and "expert" V2's (eq. 23-25): the same function, of sigmoid scores normalised here and of
    softmax scores. "device" (V2 eq. 26-28): f and P of a device are the mean of f and the sum of P over its experts, which lie on
    `devices` devices in equal blocks. "communication" (eq. 29-31): f = devices/(topk_devices s) Σ_t [token t sends something to the
    device], P as there. normalise=False leaves s as it is. Slots with index -1 chose nothing, and their tokens count. f has no gradient.
    """
    xp = xp_of(scores)
    (b, s, e), k = scores.shape, topk_idx.shape[2]
    check_loss(scores, topk_idx, devices, topk_devices, level)
    total = xp.sum(scores, axis=-1, keepdims=True) if normalise else xp.ones_like(scores[..., :1])  # [b,s,1]
    p = xp.sum(scores / total, axis=1) / s  # [b,e]
    if level == "communication":
        reached = xp.astype(devices_reached(topk_idx, e, devices), scores.dtype)  # [b,devices]
        f = xp.repeat(reached, e // devices, axis=1) * (devices / (topk_devices * s))
    else:
        f = xp.astype(counts_of(topk_idx, e), scores.dtype) * (e / (k * s))  # [b,e]
        if level == "device":
            mean = xp.mean(xp.reshape(f, (b, devices, e // devices)), axis=-1)
            f = xp.repeat(mean, e // devices, axis=1)
    loss = alpha * xp.sum(f * p) / b
    return loss, (scores, total, f, alpha, normalise)


def balance_loss_bwd(dloss: Array, saved: tuple) -> Array:
    """dscores[b,t,i] = dloss alpha/(b s) (f_i - Σ_j f_j s'_j)/Σ_j s_j;   without normalise dloss alpha/(b s) f_i"""
    scores, total, f, alpha, normalise = saved
    xp = xp_of(scores)
    b, s, _ = scores.shape
    g = f[:, None, :] + xp.zeros_like(scores)
    if normalise:
        g = g - xp.sum(g * (scores / total), axis=-1, keepdims=True)
    return dloss * (alpha / (b * s)) * g / total


def check_loss(scores: Array, topk_idx: Array, devices: int, topk_devices: int, level: str) -> None:
    (b, s, e), k = scores.shape, topk_idx.shape[2]
    op, xp = "router.balance_loss", xp_of(topk_idx)
    if b * s == 0 or k == 0:
        raise ValueError(
            f"{op}: scores has shape {tuple(scores.shape)} and topk_idx {tuple(topk_idx.shape)}; expected one token and slot at least"
        )
    check_chosen(op, xp.reshape(topk_idx, (b * s, k)), b * s, k, e, least=-1)
    if level in ("device", "communication") and (devices < 1 or e % devices):
        raise ValueError(f"{op}: devices is {devices}; expected a divisor of the {e} experts")
    if level == "communication" and not 1 <= topk_devices <= devices:
        raise ValueError(f"{op}: topk_devices is {topk_devices}; expected 1 to devices = {devices}")


@signature("topk_idx[n,k]:index topk_weight[n,k] exempt?[n]:index -> keep[n,k]:index weight[n,k]")
def drop_tokens_fwd(
    topk_idx: Array,
    topk_weight: Array,
    exempt: Array | None,
    *,
    n_routed_experts: int = 160,
    devices: int = 8,
    capacity_factor: float = 1.0,
) -> tuple[tuple[Array, Array], tuple]:
    """weight[n,k] = topk_weight[n,k] keep[n,k],   keep = 1 for the ⌊capacity_factor n k/devices⌋ slots of a device with largest topk_weight

    V2 §2.2.4. A device's slots are those whose expert it owns (equal blocks of experts). Beyond its capacity the slots of smallest
    affinity are dropped; on a tie the later one in (n, k) is. Tokens with exempt[n] != 0 (those of a tenth of the sequences) are never
    dropped, and use up capacity first. Training only: nothing is dropped in evaluation. keep is 0 or 1.
    """
    xp, op, (n, k) = xp_of(topk_weight), "router.drop_tokens", topk_idx.shape
    if devices < 1 or n_routed_experts % devices:
        raise ValueError(f"{op}: devices is {devices}; expected a divisor of the {n_routed_experts} experts")
    capacity = int(Decimal(repr(float(capacity_factor))) * n * k // devices)  # 0.3 means three tenths
    if capacity_factor <= 0 or (n and capacity < 1):
        raise ValueError(f"{op}: capacity_factor is {capacity_factor}, which leaves {capacity} slots a device; expected one at least")
    check_chosen(op, topk_idx, n, k, n_routed_experts)
    owner = xp.reshape(topk_idx // (n_routed_experts // devices), (n * k,))
    affinity = xp.reshape(topk_weight, (n * k,))
    free = xp.zeros_like(owner) if exempt is None else xp.repeat(xp.astype(exempt != 0, owner.dtype), k)
    order = xp.argsort(affinity, descending=True, stable=True)
    order = xp.take(order, xp.argsort(xp.take(free, order), descending=True, stable=True))  # the exempt first
    keep = xp.zeros_like(owner)
    for j in range(devices):
        mine = xp.astype(xp.take(owner, order) == j, owner.dtype)
        rank = xp.cumulative_sum(mine)  # 1 for the device's first
        kept = (mine == 1) & ((rank <= capacity) | (xp.take(free, order) == 1))
        keep = keep + xp.take(xp.astype(kept, owner.dtype), xp.argsort(order, stable=True))  # the inverse permutation
    keep = xp.reshape(keep, (n, k))
    return (keep, topk_weight * xp.astype(keep, topk_weight.dtype)), (keep,)


def drop_tokens_bwd(dweight: Array, saved: tuple) -> Array:
    """dtopk_weight[n,k] = dweight[n,k] keep[n,k]"""
    (keep,) = saved
    return dweight * xp_of(dweight).astype(keep, dweight.dtype)


@signature("bias[e]:const counts[e]:index -> bias_out[e]")
def bias_update_fwd(bias: Array, counts: Array, *, gamma: float = 1e-3, centred: bool = False) -> tuple[Array, tuple]:
    """bias_out[i] = bias[i] + gamma sign(mean(counts) - counts[i])   (V3 §2.1.2)

    counts are integers over the whole batch: all ranks, all micro-batches, once a step, padding left out. The sign is taken in integers, of
    Σ counts - e counts[i], and is 0 for an expert at the mean. centred=True (Moonlight) subtracts the mean sign, so the biases' sum stays.
    """
    xp = xp_of(bias)
    wide = xp.astype(counts, xp.int64)
    if bool(xp.any(wide < 0)):
        i = int(xp.nonzero(wide < 0)[0][0])
        raise ValueError(f"router.bias_update: counts[{i}] is {int(wide[i])}; expected counts >= 0")
    if gamma < 0:
        raise ValueError(f"router.bias_update: gamma is {gamma}; expected gamma >= 0")
    whole = xp.sign(xp.sum(wide) - bias.shape[0] * wide)  # [e]
    sign = constant(bias, xp.astype(whole, bias.dtype))
    if centred:
        total = constant(bias, xp.astype(xp.sum(whole), bias.dtype))
        return bias + gamma * (sign - total / max(bias.shape[0], 1)), ()
    return bias + gamma * sign, ()


def _loss(
    name: str, b: int, s: int, e: int, k: int, scores: tuple, note: str = "", idx: tuple[int, ...] | None = None, **attrs: Any
) -> Case:
    chosen = ("experts", e) if idx is None else ("positions", *idx)
    draws = {"scores": scores, "topk_idx": chosen, "dloss": ("normal", 1.0)}
    return Case(name, {"b": b, "s": s, "e": e, "k": k}, draws, attrs, note)


balance_loss = declare(
    Op(
        "router.balance_loss",
        balance_loss_fwd,
        balance_loss_bwd,
        (
            _loss("v3", 2, 9, 32, 8, ("uniform", 0.0, 1.0), "sequence-wise, sigmoid scores"),
            _loss("one", 1, 1, 4, 1, ("uniform", 0.1, 1.0)),
            _loss("v2-expert", 2, 7, 16, 6, ("uniform", 0.0, 0.12), "V2's expert loss", alpha=0.003, level="expert", normalise=False),
            _loss("v2-device", 2, 7, 16, 6, ("uniform", 0.0, 0.12), alpha=0.05, level="device", normalise=False, devices=4),
            _loss("v2-communication", 2, 7, 16, 6, ("uniform", 0.0, 0.12), alpha=0.02, level="communication", devices=4, topk_devices=2),
            _loss("unrouted", 2, 4, 6, 2, ("uniform", 0.1, 1.0), "slots, and a token, that chose nothing", (0, 3, -1, 4, -1, -1, 5, 1)),
            _loss("top1", 1, 12, 8, 1, ("uniform", 0.0, 1.0), "one expert a token: normalising is not the identity"),
        ),
        "6*b*s*e",
        "DeepSeek-V3 paper eq. 17-20; DeepSeek-V2 paper eq. 23-31",
        vary="",
    )
)

drop_tokens = declare(
    Op(
        "router.drop_tokens",
        drop_tokens_fwd,
        drop_tokens_bwd,
        tuple(
            Case(
                name,
                {"n": n, "k": k},
                {
                    "topk_idx": ("experts", attrs["n_routed_experts"]),
                    "topk_weight": weight,
                    "dweight": ("normal", 1.0),
                    **({"exempt": ("integers", 0, 2)} if exempt else {}),
                },
                attrs,
                note,
            )
            for name, n, k, weight, exempt, attrs, note in (
                ("v2", 24, 6, ("uniform", 0.0, 1.0), False, {"n_routed_experts": 160}, ""),
                ("exempt", 24, 6, ("uniform", 0.0, 1.0), True, {"n_routed_experts": 160}, "some tokens are never dropped"),
                (
                    "ties",
                    16,
                    4,
                    ("steps", 2, 0.25),
                    False,
                    {"n_routed_experts": 16, "devices": 4},
                    "equal affinities: the later is dropped",
                ),
                ("half", 16, 4, ("uniform", 0.0, 1.0), False, {"n_routed_experts": 16, "devices": 4, "capacity_factor": 0.5}, ""),
                ("ragged", 5, 3, ("uniform", 0.0, 1.0), False, {"n_routed_experts": 8, "devices": 2}, "15 slots, a capacity of 7"),
                (
                    "roomy",
                    8,
                    2,
                    ("uniform", 0.0, 1.0),
                    False,
                    {"n_routed_experts": 8, "devices": 2, "capacity_factor": 4.0},
                    "none dropped",
                ),
            )
        ),
        "n*k",
        "DeepSeek-V2 paper §2.2.4",
        vary="",
    )
)

bias_update = declare(
    Op(
        "router.bias_update",
        bias_update_fwd,
        None,
        (
            Case("v3", {"e": 256}, {"bias": ("normal", 0.1), "counts": ("integers", 0, 400)}),
            Case("at-the-mean", {"e": 5}, {"bias": ("normal", 0.1), "counts": ("positions", 3, 2, 4, 3, 3)}, {}, "sign(0) = 0"),
            Case(
                "large",
                {"e": 8},
                {
                    "bias": ("normal", 0.1),
                    "counts": ("positions", 16777217, 16777216, 16777216, 16777216, 16777216, 16777216, 16777216, 16777215),
                },
                {},
                "counts beyond float32's integers",
            ),
            Case(
                "near",
                {"e": 8},
                {"bias": ("normal", 0.1), "counts": ("positions", 257, 256, 256, 258, 255, 256, 256, 257)},
                {},
                "counts that bfloat16 cannot tell apart",
            ),
            Case("moonlight", {"e": 64}, {"bias": ("normal", 0.1), "counts": ("integers", 0, 400)}, {"centred": True}),
            Case("fast", {"e": 16}, {"bias": ("normal", 0.1), "counts": ("integers", 0, 9)}, {"gamma": 0.01}),
        ),
        "3*e",
        "DeepSeek-V3 paper §2.1.2; arXiv 2408.15664; Moonlight appendix C",
        vary="",
    )
)
