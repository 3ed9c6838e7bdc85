"""The linear layer. Weights are stored [out,in], as in every checkpoint."""

from .op import Case, Op, declare, signature
from .xp import Array, xp_of


@signature("x[n,d] weight[o,d] -> y[n,o]")
def linear_fwd(x: Array, weight: Array) -> tuple[Array, tuple]:
    """y[n,o] = Σ_d x[n,d] weight[o,d]

    A weight that multiplies in a way of its own (FP8 codes and scales, say) has the method __linear__(x) -> y, for the forward alone.
    """
    hook = getattr(weight, "__linear__", None)
    return xp_of(x).matmul(x, weight.T) if hook is None else hook(x), (x, weight)


def linear_bwd(dy: Array, saved: tuple) -> tuple[Array, Array]:
    """dx[n,d] = Σ_o dy[n,o] weight[o,d],   dweight[o,d] = Σ_n dy[n,o] x[n,d]"""
    x, weight = saved
    xp = xp_of(x)
    return xp.matmul(dy, weight), xp.matmul(dy.T, x)


linear = declare(
    Op(
        "linear",
        linear_fwd,
        linear_bwd,
        tuple(
            Case(name, {"n": n, "o": o, "d": d}, {"x": ("normal", 1.0), "weight": ("normal", 0.1), "dy": ("normal", 1.0)}, note=note)
            for name, n, o, d, note in (
                ("one", 1, 1, 1, ""),
                ("ragged", 3, 5, 129, ""),
                ("latent", 4, 96, 512, "from kv_lora_rank"),
            )
        ),
        "2*n*o*d",
        "DeepSeek-V3 inference/model.py, linear",
        vary="n",
    )
)
