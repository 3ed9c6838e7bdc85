"""Bugs of decode over a paged latent cache, of numbers or of FP8 bytes."""

from collections.abc import Callable
from typing import Any

from ...ref.mla_cache import cache_read_fwd
from ...ref.mla_decode import gather_sequence, mla_decode, mla_decode_fp8
from ...ref.op import Op
from ...ref.xp import Array, xp_of
from . import Bug
from .attention import LN2, lse_with_sink
from .cache import Result, fp8, of_tokens


def decodes(id: str, what: str, change: Callable[[dict, dict], tuple[dict, dict]], sources: str = "", only: str = "") -> list[Bug]:
    """Both decodes with other arguments: change(arrays, attributes), whose "page" is the page size."""
    bugs = []
    for op in (mla_decode, mla_decode_fp8):

        def fwd(*arrays: Array, op: Op = op, **attrs: Any) -> Result:
            names, own = [t.name for t in op.inputs], {**op.defaults, **attrs}
            given = dict(zip(names, arrays, strict=True))
            given, own = change({**given, "page": own.get("page_size", given["kv_cache"].shape[1])}, own)
            return op.fwd(*(given[n] for n in names), **own)

        if only in ("", op.name):
            bugs.append(Bug(id, (op.name,), what, sources, fwd=fwd))
    return bugs


def finished(id: str, what: str, change: Callable[[Any, Array, Array, Array | None], tuple[Array, Array]], sources: str = "") -> list[Bug]:
    """Both decodes with o and lse changed at the end: change(xp, o, lse, sink)."""
    bugs = []
    for op in (mla_decode, mla_decode_fp8):

        def fwd(q: Array, *arrays: Array, op: Op = op, **attrs: Any) -> Result:
            (o, lse), saved = op.fwd(q, *arrays, **attrs)
            return change(xp_of(q), o, lse, arrays[3]), saved

        bugs.append(Bug(id, (op.name,), what, sources, fwd=fwd))
    return bugs


def in_order(given: dict, attrs: dict) -> tuple[dict, dict]:
    table = given["block_table"]
    xp, (b, blocks) = xp_of(table), table.shape
    return {**given, "block_table": xp.reshape(xp.arange(b * blocks), (b, blocks)) % given["kv_cache"].shape[0]}, attrs


def first_row(given: dict, attrs: dict) -> tuple[dict, dict]:
    table = given["block_table"]
    needed = (xp_of(table).max(given["cache_seqlens"]) + given["page"] - 1) // given["page"]
    rows = table[:1, ...] + 0 * table
    return {**given, "block_table": rows if int(needed) <= table.shape[1] else table}, attrs


def longer_pages(given: dict, attrs: dict) -> tuple[dict, dict]:
    """Page p begins at token p·(page + 1), past the end at the beginning again."""
    kv, page, q = given["kv_cache"], given["page"], given["q"]
    xp, pages = xp_of(kv), kv.shape[0]
    index = (xp.arange(pages)[:, None] * (page + 1) + xp.arange(page)[None, :]) % (pages * page)
    index = xp.reshape(index, (-1,))
    if kv.ndim == 3:
        moved = xp.reshape(xp.take(xp.reshape(kv, (pages * page, -1)), index, axis=0), kv.shape)
    else:
        moved = fp8(kv, q, attrs, of_tokens(lambda data, rest, *_: (xp.take(data, index, axis=0), xp.take(rest, index, axis=0))))
    return {**given, "kv_cache": moved}, attrs


def lengths(change: Callable[[Any, Array, dict], Array]) -> Callable[[dict, dict], tuple[dict, dict]]:
    return lambda given, attrs: ({**given, "cache_seqlens": change(xp_of(given["q"]), given["cache_seqlens"], given)}, attrs)


def scale_of(given: dict, attrs: dict) -> float:
    return attrs["scale"] or given["q"].shape[3] ** -0.5


def rolled(*names: str) -> Callable[[dict, dict], tuple[dict, dict]]:
    """The channels of the arrays moved by the rotary width: [k_pe | c_kv] instead of [c_kv | k_pe]."""

    def change(given: dict, attrs: dict) -> tuple[dict, dict]:
        r = given["q"].shape[3] - attrs["kv_lora_rank"]
        return {n: xp_of(x).roll(x, -r, axis=x.ndim - 1) if n in names else x for n, x in given.items()}, attrs

    return change


def beyond(op: Op, kv_cache: Array, pages: Array, length: int, width: int, dv: int, attrs: dict) -> Array:
    """What the slots of a sequence's last page hold that no token uses, [·,dv]"""
    page = attrs.get("page_size", kv_cache.shape[1])
    end = -(-length // page) * page
    if op is mla_decode:
        return gather_sequence(kv_cache, pages, end)[length:, :dv]
    t, xp, r = xp_of(pages).arange(length, end), xp_of(kv_cache), attrs["qk_rope_head_dim"]
    sizes = {"kv_lora_rank": width - r, "qk_rope_head_dim": r, "layout": attrs["layout"], "page_size": page}
    parts, _ = cache_read_fwd(kv_cache, xp.take(pages, t // page) * page + t % page, **sizes)
    return xp.concat(list(parts), axis=1)[:, :dv]


def poisoned(id: str, what: str, sources: str, unused: bool) -> list[Bug]:
    """Both decodes where unused slots are multiplied by 0 instead of left out, or where a sequence without keys is NaN."""
    bugs = []
    for op in (mla_decode, mla_decode_fp8):

        def fwd(q: Array, kv_cache: Array, table: Array, lengths: Array, sink: Array | None, *, op: Op = op, **attrs: Any) -> Result:
            (o, lse), saved = op.fwd(q, kv_cache, table, lengths, sink, **attrs)
            xp, own, rows = xp_of(q), {**op.defaults, **attrs}, []
            for i in range(q.shape[0]):
                length, row = int(lengths[i]), o[i : i + 1, ...]
                if unused:
                    rest = beyond(op, kv_cache, table[i, ...], length, q.shape[3], o.shape[3], own)
                    row = row + xp.sum(xp.astype(0 * rest, o.dtype), axis=0)
                rows.append(row + float("nan") if not unused and length == 0 else row)
            return (xp.concat(rows, axis=0), lse), saved

        bugs.append(Bug(id, (op.name,), what, sources, fwd=fwd))
    return bugs


DECODE, FP8 = ("mla.decode",), ("mla.decode_fp8",)
LSE = "sgl-project/sglang#40903, #35045; vllm-project/vllm#52796, #47079, #43919, #28840; flashinfer-ai/flashinfer#2113, #4485, #4547"
BUGS = [
    *decodes(
        "kv-scale-on-bf16-cache",
        "A checkpoint's k_scale (here 0.06) multiplies the scores although the cache is not quantised.",
        lambda given, attrs: (given, {**attrs, "scale": 0.06 * scale_of(given, attrs)}),
        "sgl-project/sglang#18396",
        only="mla.decode",
    ),
    *decodes(
        "mask-top-left",
        "The mask is aligned top-left: query i sees keys 0..i.",
        lengths(lambda xp, n, given: xp.clip(n, None, given["q"].shape[1])),
        "Dao-AILab/flash-attention#282, #517; NVIDIA/cutlass#2336",
    ),
    Bug(
        "mla-scale-latent-dim",
        (*DECODE, *FP8),
        "The softmax scale is the width of what is read to the power -1/2 (576), not what the model passes (192).",
        "ollama/ollama#13893; antonellof/ferrox#225",
        attrs={"scale": 0.0},
    ),
    *decodes(
        "mla-scale-inverted",
        "Scores are divided by the softmax scale.",
        lambda given, attrs: (given, {**attrs, "scale": 1 / scale_of(given, attrs)}),
        "AI-Hypercomputer/maxtext#1370",
    ),
    *finished("lse-base2-vs-e", "lse is a logarithm to base 2: too large by 1/ln 2.", lambda xp, o, lse, sink: (o, lse / LN2), LSE),
    *finished("sink-in-lse", "The sink's logit is counted in lse; it belongs to the denominator of o alone.", lse_with_sink),
    *decodes("sink-ignored", "The sink is not used.", lambda given, attrs: ({**given, "sink": None}, attrs)),
    *decodes("page-table-ignored", "Pages are read one after the other, not by the block table.", in_order),
    *decodes("page-table-first-row", "Every sequence reads the pages of the first.", first_row),
    *decodes("page-stride-mismatch", "A page's stride is one token too long.", longer_pages),
    *decodes(
        "decode-last-token-dropped",
        "The last cached token is left out.",
        lengths(lambda xp, n, given: xp.clip(n - 1, 0, None)),
    ),
    *decodes(
        "decode-last-page-unmasked",
        "Every slot of a sequence's last page is read, used or not.",
        lengths(lambda xp, n, given: (n + given["page"] - 1) // given["page"] * given["page"]),
    ),
    *decodes(
        "decode-values-from-end", "The values are the last kv_lora_rank channels of a token.", rolled("q", "kv_cache"), only="mla.decode"
    ),
    *decodes("kv-kpe-first", "A token is read as [k_pe | c_kv].", rolled("kv_cache"), only="mla.decode"),
    *poisoned(
        "kv-padding-nan-leak",
        "Slots that no token uses are multiplied by a probability of 0: 0·NaN.",
        "flashinfer-ai/flashinfer#941, #942; Dao-AILab/flash-attention#1745, #2374, #1395",
        unused=True,
    ),
    *poisoned(
        "padded-row-stale-output",
        "A sequence without keys keeps what the buffer held, here NaN.",
        "vllm-project/vllm#37442; sgl-project/sglang#1779",
        unused=False,
    ),
]
