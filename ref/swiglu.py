"""SwiGLU, with V4's clamp. Spec §3.1."""

from typing import Literal

from .op import Case, Op, declare, signature
from .router import scores_of
from .xp import Array, clip, stored, xp_of

Silu = Literal["float32", "stored"]


@signature("gate[n,f] up[n,f] -> y[n,f]")
def swiglu_fwd(gate: Array, up: Array, *, limit: float | None = None, silu: Silu = "float32") -> tuple[Array, tuple]:
    """y[n,f] = silu(gate[n,f]) up[n,f],   silu(g) = g σ(g)

    With a limit (V4: 10) gate becomes min(gate, limit) and up is clipped to ±limit first. silu="stored" says that an implementation with
    16-bit activations rounds silu(gate) to them before it multiplies (V3's first release, Hugging Face).
    """
    check_limit("swiglu", limit)
    g, u = (gate, up) if limit is None else (clip(gate, high=limit), clip(up, -limit, limit))
    sigmoid = scores_of(g, "sigmoid")
    a = g * sigmoid
    return (stored(a) if silu == "stored" else a) * u, (gate, up, g, u, sigmoid, a, limit, silu)


def check_limit(op: str, limit: float | None) -> None:
    if limit is not None and limit <= 0:
        raise ValueError(f"{op}: limit is {limit}; expected limit > 0, or None for no clamp")


def swiglu_bwd(dy: Array, saved: tuple) -> tuple[Array, Array]:
    """dgate = dy up σ (1 + gate (1 - σ)),   dup = dy silu(gate);   0 where a limit has cut (strictly beyond it)"""
    gate, up, g, u, sigmoid, a, limit, silu = saved
    xp = xp_of(dy)
    da, dup = dy * u, dy * (stored(a) if silu == "stored" else a)
    dgate = (stored(da) if silu == "stored" else da) * (sigmoid * (1 + g * (1 - sigmoid)))
    if limit is not None:
        zero = xp.zeros_like(dy)
        dgate = xp.where(gate > limit, zero, dgate)
        dup = xp.where((up > limit) | (up < -limit), zero, dup)
    return dgate, dup


def _case(name: str, n: int, f: int, spread: float, note: str = "", limit: float | None = None, gate: tuple | None = None) -> Case:
    draws = {"gate": gate or ("normal", spread), "up": ("normal", spread), "dy": ("normal", 1.0)}
    return Case(name, {"n": n, "f": f}, draws, {} if limit is None else {"limit": limit}, note)


swiglu = declare(
    Op(
        "swiglu",
        swiglu_fwd,
        swiglu_bwd,
        (
            _case("one", 1, 1, 1.0),
            _case("ragged", 3, 129, 1.0),
            # None from -104 to -87: silu is a number of float32 there, but 1/(1 + exp(-gate)), which is how everyone has it, is 0.
            _case("large", 4, 128, 30.0, "σ saturates; exp(±gate) overflows where it is written so", gate=("steps", 5, 40.0)),
            _case("clamped", 4, 128, 8.0, "V4: gate at most 10, up within ±10", limit=10.0),
            _case("tight", 3, 33, 2.0, "a limit at which silu is not yet the identity", limit=1.0),
            _case("expert", 2, 2048, 1.0, "V3's expert width"),
        ),
        "8*n*f",
        "DeepSeek-V3 paper §2.1.2; spec §3.1; Shazeer 2020",
        vary="nf",
    )
)
