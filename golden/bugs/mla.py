"""Bugs of multi-head latent attention, in both forms: the form run on other weights, positions or attributes, or around another core."""

from collections.abc import Callable
from typing import Any

from ...ref.linear import linear_fwd
from ...ref.mla import _form, absorbed_bwd, absorbed_fwd, mla_absorb, mla_prefill, naive_bwd, naive_fwd
from ...ref.norm import rmsnorm_fwd
from ...ref.op import Op
from ...ref.xp import Array, stored, xp_of
from ...ref.yarn import Yarn
from . import Bug
from .rope import amplitude_one, by_length, cut, yarn_of

CORES: dict[str, tuple[Op, Callable, Callable]] = {
    "mla.prefill": (mla_prefill, naive_fwd, naive_bwd),
    "mla.absorb": (mla_absorb, absorbed_fwd, absorbed_bwd),
}
NAMES = tuple(t.name for t in mla_prefill.inputs)
Given = dict[str, Any]


def changed_arguments(
    id: str, what: str, change: Callable[[Given, Given], tuple[Given, Given]], sources: str = "", backward: bool = False
) -> list[Bug]:
    """Both forms with other arrays or attributes: change(arrays, attributes). With `backward`, the gradient of that is judged too (true
    where only integers and attributes change)."""
    bugs = []
    for name, (op, _, _) in CORES.items():

        def fwd(*arrays: Array, op: Op = op, **attrs: Any) -> Any:
            given, own = change(dict(zip(NAMES, arrays, strict=True)), {**op.defaults, **attrs})
            return op.fwd(*(given[n] for n in NAMES), **own)

        bugs.append(Bug(id, (name,), what, sources, fwd=fwd, bwd=op.bwd if backward else None))
    return bugs


def _core(id: str, what: str, change: Callable[..., Any], sources: str = "", backward: bool = True) -> list[Bug]:
    """Both forms around another core: change(core, its arguments, attributes)."""
    bugs = []
    for name, (op, core, core_bwd) in CORES.items():

        def fwd(*arrays: Array, name: str = name, op: Op = op, core: Any = core, core_bwd: Any = core_bwd, **attrs: Any) -> Any:
            own = {**op.defaults, **attrs}
            return _form(name, lambda *arguments: change(core, arguments, own), core_bwd, "")[0](*arrays, **attrs)

        bugs.append(Bug(id, (name,), what, sources, fwd=fwd, bwd=op.bwd if backward else None))
    return bugs


def _scaled(factor: Callable[[Yarn, Given], float]) -> Callable[..., Any]:
    """A core whose softmax scale is multiplied."""

    def changed(core: Callable, arguments: tuple, attrs: Given) -> Any:
        return core(*arguments[:-1], arguments[-1] * factor(yarn_of(attrs, {}), attrs))

    return changed


def _keys(keep: Callable[[int, int], slice]) -> Callable[..., Any]:
    """A core that sees some of the keys: keep(s, t)."""

    def changed(core: Callable, arguments: tuple, attrs: Given) -> Any:
        q_nope, q_pe, c_kv, k_pe, kv_b, cu, *rest = arguments
        part = slice(None) if cu is not None else keep(q_nope.shape[1], c_kv.shape[1])
        return core(q_nope, q_pe, c_kv[:, part, :], k_pe[:, part, :], kv_b, cu, *rest)

    return changed


def _every_key(core: Callable, arguments: tuple, attrs: Given) -> Any:
    """One query at a time, which sees every key."""
    q_nope, q_pe, c_kv, k_pe, kv_b, cu, *rest = arguments
    if cu is not None:
        return core(*arguments)
    each = [core(q_nope[:, i : i + 1, ...], q_pe[:, i : i + 1, ...], c_kv, k_pe, kv_b, None, *rest) for i in range(q_nope.shape[1])]
    return xp_of(q_nope).concat([o for o, _ in each], axis=1), ()


def _one_side_permuted(core: Callable, arguments: tuple, attrs: Given) -> Any:
    """q_pe's pairs written as halves, k_pe's as they are."""
    q_nope, q_pe, *rest = arguments
    halves = xp_of(q_pe).concat([q_pe[..., 0::2], q_pe[..., 1::2]], axis=-1)
    return core(q_nope, halves if attrs["rope_layout_out"] == "interleaved" else q_pe, *rest)


def _latents(id: str, what: str, change: Callable[..., tuple[Array, Array]], cached_only: bool, sources: str = "") -> list[Bug]:
    """Both forms with other c_kv and k_pe for their own tokens: change(latent, k, c_kv, k_pe, all arguments), the first two as kv_a_proj
    leaves them. cached_only: y is right, what is handed to the cache is not."""
    bugs = []
    for name, (op, core, core_bwd) in CORES.items():

        def fwd(*arrays: Array, name: str = name, op: Op = op, core: Any = core, core_bwd: Any = core_bwd, **attrs: Any) -> Any:
            given, own = dict(zip(NAMES, arrays, strict=True)), {**op.defaults, **attrs}
            x, xp, c = given["x"], xp_of(given["x"]), own["kv_lora_rank"]
            (y, *right), saved = op.fwd(*arrays, **attrs)
            flat, _ = linear_fwd(xp.reshape(x, (-1, x.shape[2])), given["kv_a_proj_with_mqa"])
            raw = xp.reshape(stored(flat), (*x.shape[:2], -1))
            wrong = change(raw[..., :c], raw[..., c:], *right, {**own, **given})
            if not cached_only:

                def inner(q_nope: Array, q_pe: Array, c_kv: Array, k_pe: Array, *rest: Any) -> Any:
                    t = c_kv.shape[1] - x.shape[1]
                    keys = [xp.concat([old[:, :t, :], stored(new)], axis=1) for old, new in zip((c_kv, k_pe), wrong, strict=True)]
                    return core(q_nope, q_pe, *keys, *rest)

                (y, _, _), saved = _form(name, inner, core_bwd, "")[0](*arrays, **attrs)
            return (y, *wrong), saved

        bugs.append(Bug(id, (name,), what, sources, fwd=fwd))
    return bugs


def _normed_whole(latent: Array, k: Array, c_kv: Array, k_pe: Array, own: Given) -> tuple[Array, Array]:
    """The rotary part divided by its rms, too."""
    xp = xp_of(k_pe)
    return c_kv, k_pe / xp.sqrt(xp.mean(k_pe * k_pe, axis=-1, keepdims=True) + own["rms_norm_eps"])


def rmsnorm_rows(latent: Array, own: Given) -> Array:
    """The latent over its rms, without a weight"""
    xp, (b, s, c) = xp_of(latent), latent.shape
    y, _ = rmsnorm_fwd(xp.reshape(latent, (b * s, c)), xp.ones_like(own["kv_a_layernorm"]), eps=own["rms_norm_eps"])
    return xp.reshape(y, latent.shape)


def _positions(change: Callable[[Array, Given, Given], Array]) -> Callable[[Given, Given], tuple[Given, Given]]:
    return lambda given, attrs: ({**given, "positions": change(given["positions"], given, attrs)}, attrs)


def _from_zero(positions: Array, given: Given, attrs: Given) -> Array:
    return positions if given["c_kv_cache"] is None else positions - positions[:, :1]


def _running_on(positions: Array, given: Given, attrs: Given) -> Array:
    xp = xp_of(positions)
    return positions if given["cu_seqlens"] is None else xp.arange(positions.shape[1], dtype=positions.dtype)[None, :] + 0 * positions


def _neox(given: Given, attrs: Given) -> tuple[Given, Given]:
    halves = {"rope_layout_in": "half", "rope_layout_out": "half"}
    return given, {**attrs, **(halves if attrs["rope_layout_in"] == "interleaved" else {})}


def _short(given: Given, attrs: Given) -> tuple[Given, Given]:
    return given, by_length(xp_of(given["positions"]).reshape(given["positions"], (-1,)), attrs)[1]


def _without_cache(given: Given, attrs: Given) -> tuple[Given, Given]:
    return {**given, "c_kv_cache": None, "k_pe_cache": None}, attrs


def _width(attrs: Given) -> int:
    return attrs["qk_nope_head_dim"] + attrs["qk_rope_head_dim"]


PERMUTED = "The rotated pairs are written as halves, as Hugging Face does: y is the same, the cached k_pe is not."
BUGS = [
    *changed_arguments(
        "rope-neox-on-interleaved",
        "q_pe and k_pe are rotated as pairs (i, i+r/2), in place, where the checkpoint's lie interleaved.",
        _neox,
        "huggingface/optimum-intel#1877; hw-native-sys/pypto-lib#244",
        backward=True,
    ),
    *_core(
        "rope-permute-one-side-only",
        "q_pe is written as halves, k_pe interleaved: q·k pairs the wrong channels.",
        _one_side_permuted,
        "",
        False,
    ),
    Bug(
        "rope-hf-permuted-layout",
        tuple(CORES),
        PERMUTED,
        "huggingface/transformers#39687; deepseek-ai/DeepSeek-V3#938; vllm-project/vllm#26995",
        attrs={"rope_layout_out": "half"},
        benign=True,
    ),
    *changed_arguments(
        "rope-wrong-slice",
        "The rotary part is taken to be qk_nope wide: frequencies are theta^(-2i/qk_nope).",
        lambda given, attrs: (given, {**attrs, "theta": attrs["theta"] ** (attrs["qk_rope_head_dim"] / attrs["qk_nope_head_dim"])}),
        "junfanz1/MiniGPT-and-DeepSeek-MLA-Multi-Head-Latent-Attention#1",
        backward=True,
    ),
    *changed_arguments(
        "rope-cache-too-short",
        "The table of cos and sin ends at the original length: every later position reads its last row.",
        _positions(lambda positions, given, attrs: cut(positions, attrs)),
        "vllm-project/vllm-ascend#1266, #1530",
        backward=True,
    ),
    *changed_arguments(
        "yarn-by-sequence-length",
        "YaRN, and its softmax scale, are left out where the positions at hand stay within the original length.",
        _short,
        "google/flax#4512",
        backward=True,
    ),
    *_core(
        "yarn-mscale-missing",
        "The softmax scale lacks m(mscale_all_dim)²: (qk_nope + qk_rope)^(-1/2) alone.",
        _scaled(lambda yarn, attrs: yarn.gain(yarn.mscale_all_dim) ** -2),
        "onnxruntime/mobius#548; vllm-project/tpu-inference#521; huggingface/optimum-intel#1877; huggingface/transformers#47435",
    ),
    *_core(
        "yarn-mscale-once",
        "The softmax scale has m(mscale_all_dim) once instead of squared.",
        _scaled(lambda yarn, attrs: 1 / yarn.gain(yarn.mscale_all_dim)),
    ),
    *_core(
        "yarn-mscale-vs-all-dim",
        "The softmax scale has m(mscale)² instead of m(mscale_all_dim)²: the same for every released checkpoint.",
        _scaled(lambda yarn, attrs: (yarn.gain(yarn.mscale) / yarn.gain(yarn.mscale_all_dim)) ** 2),
        "NVIDIA/Megatron-LM#1429; EvolvingLMMs-Lab/LLaVA-OneVision-2#151",
    ),
    *changed_arguments(
        "yarn-amplitude-missing",
        "cos and sin lack the factor m(mscale)/m(mscale_all_dim).",
        lambda given, attrs: (given, amplitude_one(attrs)),
        backward=True,
    ),
    *_core(
        "mla-scale-latent-dim",
        "The softmax scale is (kv_lora_rank + qk_rope)^(-1/2), 576 for 192: the width of what is read, not that of the heads.",
        _scaled(lambda yarn, attrs: (_width(attrs) / (attrs["kv_lora_rank"] + attrs["qk_rope_head_dim"])) ** 0.5),
        "ollama/ollama#13893; antonellof/ferrox#225",
    ),
    *_core(
        "mla-scale-inverted",
        "Scores are divided by the softmax scale's (qk_nope + qk_rope)^(-1/2) instead of multiplied.",
        _scaled(lambda yarn, attrs: float(_width(attrs))),
        "AI-Hypercomputer/maxtext#1370",
    ),
    *_core(
        "mla-scale-nope-dim",
        "The softmax scale is qk_nope^(-1/2): the rotary channels are not counted.",
        _scaled(lambda yarn, attrs: (_width(attrs) / attrs["qk_nope_head_dim"]) ** 0.5),
    ),
    *_latents(
        "mla-latent-cached-unnormed",
        "The cache receives the latent before kv_a_layernorm.",
        lambda latent, k, c_kv, k_pe, own: (latent, k_pe),
        True,
    ),
    *_latents(
        "mla-kpe-cached-unrotated", "The cache receives k_pe before its rotation.", lambda latent, k, c_kv, k_pe, own: (c_kv, k), True
    ),
    *_latents("mla-kv-norm-missing", "kv_a_layernorm is left out.", lambda latent, k, c_kv, k_pe, own: (latent, k_pe), False),
    *_latents("mla-kpe-not-rotated", "k_pe is not rotated.", lambda latent, k, c_kv, k_pe, own: (c_kv, k), False),
    *_latents("mla-kpe-normed", "k_pe is normalised, as the latent is.", _normed_whole, False),
    *_latents(
        "mla-kv-norm-weight-missing",
        "kv_a_layernorm's weight is left out.",
        lambda latent, k, c_kv, k_pe, own: (rmsnorm_rows(latent, own), k_pe),
        False,
    ),
    *_core(
        "mask-top-left",
        "The mask is aligned top-left: the first token of a chunk sees the first cached one alone.",
        _keys(lambda s, t: slice(0, s)),
        "Dao-AILab/flash-attention#282, #517; NVIDIA/cutlass#2336",
        False,
    ),
    *_core(
        "mask-verify-sees-future", "Every query sees all keys, those after it too.", _every_key, "vllm-project/vllm#50476, #52218", False
    ),
    *_core("mask-diagonal-hidden", "A token does not see itself.", _keys(lambda s, t: slice(0, t - 1)), "", False),
    *changed_arguments("mla-cache-not-read", "A chunk sees its own tokens alone, not the cached ones.", _without_cache),
    *changed_arguments(
        "mla-chunk-positions-from-zero",
        "A chunk's positions count from 0, as if nothing were cached.",
        _positions(_from_zero),
        backward=True,
    ),
    *changed_arguments(
        "mla-packed-positions-run-on",
        "Positions of packed sequences count through the row instead of from 0 for each.",
        _positions(_running_on),
        backward=True,
    ),
    *changed_arguments(
        "mla-packed-sequences-mixed",
        "Packed sequences see those before them in the row.",
        lambda given, attrs: ({**given, "cu_seqlens": None}, attrs),
        backward=True,
    ),
]
