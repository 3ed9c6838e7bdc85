"""Bugs of the backward of multi-head latent attention, in both forms."""

from collections.abc import Callable

from ...ref.mla import _form, absorbed_bwd, naive_bwd
from ...ref.mla_parts import attend_bwd
from ...ref.xp import Array, stored, xp_of
from . import Bug
from .mla import CORES


def _bwd(id: str, what: str, change: Callable[..., tuple], sources: str = "") -> list[Bug]:
    """Both forms with another backward: change(the right one, dy, dc_kv, dk_pe, saved)."""
    return [
        Bug(id, (n,), what, sources, bwd=lambda dy, dc, dk, saved, b=op.bwd: change(b, dy, dc, dk, saved))
        for n, (op, _, _) in CORES.items()
    ]


def _core_bwd(id: str, what: str, naive: Callable | None, absorbed: Callable | None, sources: str = "") -> list[Bug]:
    """Forms around another backward of the core."""
    pairs = (("mla.prefill", naive), ("mla.absorb", absorbed))
    return [Bug(id, (n,), what, sources, bwd=_form(n, CORES[n][1], core, "")[1]) for n, core in pairs if core is not None]


def _first_head(do: Array, saved: tuple, dn: int) -> tuple[Array, ...]:
    _, s_attention, _ = saved
    dq_nope, dq_pe, dc_kv, _, dkv_b = naive_bwd(do, saved, dn)
    return dq_nope, dq_pe, dc_kv, attend_bwd(do, s_attention)[1][..., 0, dn:], dkv_b


def _first_head_absorbed(do: Array, saved: tuple, dn: int) -> tuple[Array, ...]:
    xp, h = xp_of(do), do.shape[2]
    first = xp.reshape(xp.asarray([float(i == 0) for i in range(h)], dtype=do.dtype), (1, 1, h, 1))
    dq_nope, dq_pe, dc_kv, _, dkv_b = absorbed_bwd(do, saved, dn)
    return dq_nope, dq_pe, dc_kv, absorbed_bwd(do * first, saved, dn)[3], dkv_b


def _mean_over_heads(core: Callable) -> Callable:
    def bwd(do: Array, saved: tuple, dn: int) -> tuple[Array, ...]:
        dq_nope, dq_pe, dc_kv, dk_pe, dkv_b = core(do, saved, dn)
        return dq_nope, dq_pe, dc_kv, dk_pe / do.shape[2], dkv_b

    return bwd


def _key_only(do: Array, saved: tuple, dn: int) -> tuple[Array, ...]:
    """What the latent receives as a value is left out."""
    dq_nope, dq_pe, dc_kv, dk_pe, dkv_b = absorbed_bwd(do, saved, dn)
    _, _, _, w_uv, s_attention = saved
    dv = attend_bwd(stored(xp_of(do).matmul(do[..., None, :], w_uv)[..., 0, :]), s_attention)[2]
    return dq_nope, dq_pe, dc_kv - dv[:, :, 0, :], dk_pe, dkv_b


def _turned(which: str, sign: float) -> Callable[..., tuple]:
    """The rotation of q_pe, of k_pe, or of both goes back by another angle: sign·angle, 0 for none at all."""

    def change(right: Callable, dy: Array, dc: Array, dk: Array, saved: tuple) -> tuple:
        (s_q, s_rope, (s_down, s_norm, s_key)), *rest = saved

        def other(part: tuple) -> tuple:
            cos, sin, *layouts = part
            return (xp_of(cos).sqrt(cos * cos + sin * sin), 0 * sin, *layouts) if sign == 0 else (cos, sign * sin, *layouts)

        queries = other(s_rope) if "q" in which else s_rope
        keys = other(s_key) if "k" in which else s_key
        return right(dy, dc, dk, ((s_q, queries, (s_down, s_norm, keys)), *rest))

    return change


BUGS = [
    *_core_bwd(
        "mla-kpe-grad-not-head-summed",
        "dk_pe comes from the first head alone; all heads share k_pe, so it is the sum over them.",
        _first_head,
        _first_head_absorbed,
        "NVIDIA/Megatron-LM#1699, #6839; NVIDIA/TransformerEngine#1975; bigcode-project/Megatron-LM#37",
    ),
    *_core_bwd(
        "mla-kpe-grad-head-mean",
        "dk_pe is the mean over heads instead of the sum.",
        _mean_over_heads(naive_bwd),
        _mean_over_heads(absorbed_bwd),
    ),
    *_core_bwd("mla-bwd-latent-as-key-only", "The latent's gradient as a value is left out: it is key and value at once.", None, _key_only),
    *_bwd("mla-bwd-kpe-not-rotated-back", "dk_pe is not rotated back.", _turned("k", 0.0)),
    *_bwd("mla-bwd-qpe-not-rotated-back", "dq_pe is not rotated back.", _turned("q", 0.0)),
    *_bwd("rope-bwd-angle-not-negated", "dq_pe and dk_pe are rotated by angle once more, as in the forward.", _turned("qk", -1.0)),
    *_bwd(
        "mla-bwd-cache-gradient-dropped",
        "The gradients that come through the outputs c_kv and k_pe are left out.",
        lambda right, dy, dc, dk, saved: right(dy, 0 * dc, 0 * dk, saved),
    ),
]
