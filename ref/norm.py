"""RMSNorm. Spec §1.1."""

from typing import Literal

from .op import Case, Op, declare, signature
from .xp import Array, stored, xp_of

CastOrder = Literal["weight_then_cast", "cast_then_weight"]


@signature("x[n,d] weight[d] -> y[n,d]")
def rmsnorm_fwd(x: Array, weight: Array, *, eps: float = 1e-6, cast_order: CastOrder = "weight_then_cast") -> tuple[Array, tuple]:
    """y[n,d] = weight[d] x[n,d] rstd[n],   rstd[n] = (mean_d x[n,d]² + eps)^(-1/2)

    cast_order says where an implementation with 16-bit activations rounds: once, after the weight (V3.2 and V4, fused kernels), or
    x·rstd first and the product again (V3's first release, Hugging Face). On the reference's own arrays both are the same.
    """
    xp = xp_of(x)
    if eps < 0:
        raise ValueError(f"rmsnorm: eps is {eps}; expected eps >= 0")
    rstd = 1 / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + eps)  # [n,1]
    xhat = x * rstd
    y = (stored(xhat) if cast_order == "cast_then_weight" else xhat) * weight
    return y, (x, weight, rstd, cast_order)


def rmsnorm_bwd(dy: Array, saved: tuple) -> tuple[Array, Array]:
    """xhat = x rstd, g = dy weight:   dx[n,d] = rstd[n] (g - xhat mean_d(g xhat)),   dweight[d] = Σ_n dy xhat

    With cast_then_weight the product with the weight is one of 16-bit arrays: so are both of its gradients.
    """
    x, weight, rstd, cast_order = saved
    xp = xp_of(x)
    xhat, g = x * rstd, dy * weight
    products = dy * xhat
    if cast_order == "cast_then_weight":
        g, products = stored(g), stored(dy * stored(xhat))
    dx = rstd * (g - xhat * xp.mean(g * xhat, axis=-1, keepdims=True))
    dweight = xp.sum(products, axis=0)  # [d]
    return dx, dweight


def _case(name: str, n: int, d: int, x: tuple, note: str = "", quick: bool = True, **attrs: float) -> Case:
    return Case(name, {"n": n, "d": d}, {"x": x, "weight": ("uniform", 0.25, 2.0), "dy": ("normal", 1.0)}, attrs, note, quick)


rmsnorm = declare(
    Op(
        "rmsnorm",
        rmsnorm_fwd,
        rmsnorm_bwd,
        (
            _case("one", 1, 1, ("normal", 1.0)),
            _case("ragged", 3, 127, ("normal", 1.0)),
            _case("latent", 5, 512, ("normal", 1.0), "kv_lora_rank"),
            _case("small", 4, 129, ("normal", 1e-3), "eps and the mean square are of one size: where eps stands is visible"),
            _case("tiny", 4, 128, ("normal", 1e-5), "eps rules"),
            _case("large", 4, 128, ("normal", 100.0), "x² leaves float16's range; float32 inside is needed"),
            _case("outliers", 4, 128, ("outliers", 1.0, 200.0), "a few channels carry the sum, as in real residual streams"),
            _case("zero-row", 3, 128, ("zero_rows", 1.0), "an all-zero row gives zeros, not NaN"),
            _case("glm", 3, 256, ("normal", 3e-3), "eps as GLM and LongCat have it", eps=1e-5),
            _case("model", 3, 7168, ("normal", 0.5), "V3's width"),
        ),
        "4*n*d",
        "spec §1.1; Zhang and Sennrich 2019; DeepSeek-V3 inference/model.py, RMSNorm",
        vary="nd",
    )
)
