"""Bugs of RMSNorm."""

from typing import Any

from ...ref.cast import round_to
from ...ref.formats import BF16
from ...ref.norm import rmsnorm_bwd, rmsnorm_fwd
from ...ref.xp import Array, xp_of
from . import Bug


def _with_rstd(rstd_of: Any) -> Any:
    def fwd(x: Array, weight: Array, *, eps: float = 1e-6, cast_order: str = "weight_then_cast") -> tuple[Array, tuple]:
        xp = xp_of(x)
        rstd = rstd_of(xp, x, xp.mean(x * x, axis=-1, keepdims=True), eps)
        return x * rstd * weight, (x, weight, rstd, cast_order)

    return fwd


def _unit_offset(x: Array, weight: Array, **attrs: Any) -> tuple[Array, tuple]:
    return rmsnorm_fwd(x, 1 + weight, **attrs)


def _no_projection(dy: Array, saved: tuple) -> tuple[Array, Array]:
    _, weight, rstd, _ = saved
    return rstd * dy * weight, rmsnorm_bwd(dy, saved)[1]


def _gamma_omitted(dy: Array, saved: tuple) -> tuple[Array, Array]:
    x, weight, rstd, _ = saved
    xp = xp_of(x)
    xhat = x * rstd
    dx = rstd * (dy * weight - xhat * xp.mean(dy * xhat, axis=-1, keepdims=True))
    return dx, rmsnorm_bwd(dy, saved)[1]


def _dweight_of_x(dy: Array, saved: tuple) -> tuple[Array, Array]:
    return rmsnorm_bwd(dy, saved)[0], xp_of(dy).sum(dy * saved[0], axis=0)


RMSNORM = ("rmsnorm",)
BUGS = [
    Bug(
        "rmsnorm-eps-outside",
        RMSNORM,
        "eps is added to the root: x/(rms + eps).",
        fwd=_with_rstd(lambda xp, x, ms, eps: 1 / (xp.sqrt(ms) + eps)),
    ),
    Bug(
        "rmsnorm-eps-hardcoded", RMSNORM, "eps is 1e-5 instead of 1e-6.", fwd=_with_rstd(lambda xp, x, ms, eps: 1 / xp.sqrt(ms + 10 * eps))
    ),
    Bug("rmsnorm-eps-missing", RMSNORM, "eps is left out.", fwd=_with_rstd(lambda xp, x, ms, eps: 1 / xp.sqrt(ms))),
    Bug(
        "rmsnorm-eps-on-sum",
        RMSNORM,
        "eps is added to the sum of squares, not to the mean: it is d times too small.",
        fwd=_with_rstd(lambda xp, x, ms, eps: 1 / xp.sqrt(ms + eps / x.shape[-1])),
    ),
    Bug(
        "rmsnorm-sum-for-mean",
        RMSNORM,
        "Divides by the norm, not the root mean square.",
        fwd=_with_rstd(lambda xp, x, ms, eps: 1 / xp.sqrt(ms * x.shape[-1] + eps)),
    ),
    Bug(
        "rmsnorm-mean-subtracted",
        RMSNORM,
        "The mean is subtracted in the variance, as LayerNorm does.",
        fwd=_with_rstd(lambda xp, x, ms, eps: 1 / xp.sqrt(ms - xp.mean(x, axis=-1, keepdims=True) ** 2 + eps)),
    ),
    Bug(
        "rmsnorm-inv-rms-bf16",
        RMSNORM,
        "1/rms is rounded to bfloat16: one coherent error a row, which grows with depth.",
        fwd=_with_rstd(lambda xp, x, ms, eps: round_to(BF16, 1 / xp.sqrt(ms + eps))),
    ),
    Bug("rmsnorm-unit-offset", RMSNORM, "The weight is 1 + weight, as in Gemma.", fwd=_unit_offset),
    Bug("rmsnorm-bwd-projection-missing", RMSNORM, "dx lacks the projection: rstd is taken for a constant.", bwd=_no_projection),
    Bug("rmsnorm-bwd-gamma", RMSNORM, "The weight is left out of the projection in dx.", bwd=_gamma_omitted),
    Bug("rmsnorm-bwd-dweight-unnormalised", RMSNORM, "dweight sums dy·x instead of dy·x·rstd.", bwd=_dweight_of_x),
]
