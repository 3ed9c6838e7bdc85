"""Known bugs of rotary embedding, attention, its parts, the latent cache and MLA: each makes some declared case FAIL, and is named."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from buggy import check_reference, check_registry, check_told, known, named, vector
from leadline.golden.band import truth_of
from leadline.golden.bugs import Bug, bugs_of
from leadline.golden.bugs import attention as attention_bugs
from leadline.golden.bugs import cache as cache_bugs
from leadline.golden.bugs import mla as mla_bugs
from leadline.golden.bugs import parts as parts_bugs
from leadline.golden.bugs import rope as rope_bugs
from leadline.golden.draw import draw_case
from leadline.golden.generate import caught
from leadline.golden.judge import Returned
from leadline.golden.precision import PRECISIONS
from leadline.ref.op import OPS
from variants import decodes, floats

Array = np.ndarray
AREA = ("rope", "attention", "mla", "cache")

# The registry of known bugs of this area: reports from the field, and mutants of them.
REGISTRY = (
    "rope-neox-on-interleaved",
    "rope-interleave-on-neox-indexer",
    "rope-permute-one-side-only",
    "rope-hf-permuted-layout",
    "rope-wrong-slice",
    "rope-angle-low-precision",
    "rope-angle-f32-large-pos",
    "rope-cache-too-short",
    "yarn-ignored",
    "yarn-positions-scaled",
    "yarn-original-max-confusion",
    "yarn-conditional",
    "yarn-mscale-missing",
    "yarn-mscale-once",
    "yarn-mscale-vs-all-dim",
    "yarn-mscale-on-cos-sin",
    "mla-scale-latent-dim",
    "mla-scale-inverted",
    "mla-absorb-dequant-layout",
    "mla-kvb-split-order",
    "mla-wuk-transpose",
    "mla-latent-cached-unnormed",
    "kv-scale-on-bf16-cache",
    "kv-scale-one-sided",
    "kv-scale-amax-ignores-kpe",
    "lse-base2-vs-e",
    "lse-empty-chunk-plus-inf",
    "lse-merge-both-neg-inf",
    "merge-stride-mismatch",
    "mask-top-left",
    "mask-verify-sees-future",
    "mask-empty-row-zero-output",
    "kv-padding-nan-leak",
    "padded-row-stale-output",
    "mla-kpe-grad-not-head-summed",
    "mla-dv-tail-columns",
    "bwd-lse-padding-nan",
    "attn-fp16-overflow",
)


def test_no_bug_of_the_registry_is_dropped() -> None:
    """Every id is a variant, or is listed with the reason why it is none; never both, and no reason for an id that is not there."""
    reasons = check_registry(REGISTRY)
    assert {"rope-angle-f32-large-pos", "kv-scale-amax-ignores-kpe"} <= reasons.keys()


# ---- every bug is caught


@cache
def flags(op: str, case: str, way: str, precision: str) -> frozenset[str]:
    return frozenset(caught(vector(op, case, way, precision)))


@pytest.mark.parametrize(("op", "way", "bug"), [pytest.param(*k, id="-".join(k)) for k in known(AREA)])
def test_some_case_fails_the_bug(op: str, way: str, bug: str) -> None:
    """At float32 and at bfloat16. A convention fails likewise where the case has another."""
    for precision in ("fp32", "bf16"):
        names = [case.name for case in reversed(OPS[op].cases)]  # the special ones are declared last
        assert any(bug in flags(op, name, way, precision) for name in names), f"no {precision} case of {op} {way} fails {bug}"


def test_the_reference_passes_as_itself() -> None:
    """What the variants are compared with: the reference's own outputs, rounded once, pass the cases that catch most bugs."""
    check_reference(AREA, cases=1)


def same(op: str, way: str, fwd: Callable, bwd: Callable | None = None) -> None:
    """The op with these is the reference on every case, to float64's rounding (codes and exact numbers bit for bit)."""
    exact = OPS[op].exact
    for case in OPS[op].cases:
        inputs = draw_case(OPS[op], case, way, PRECISIONS["fp32"])
        inputs = {k: x.astype(np.float64) if x.dtype.kind == "f" and not exact else x for k, x in inputs.items()}
        if bwd is not None and "sink" in inputs:
            continue
        truth = truth_of(OPS[op], way, inputs, case.attrs)
        for name, y in Bug("frame", (op,), "", fwd=fwd, bwd=bwd).variant(OPS[op]).run(way, inputs, case.attrs).items():
            size = np.abs(np.where(np.isfinite(truth[name]), truth[name], 0)).max(initial=1.0)
            np.testing.assert_allclose(np.asarray(y), truth[name], rtol=0, atol=0 if exact else 1e-9 * size, err_msg=case.name)


def test_frames_without_a_mistake_are_the_reference() -> None:
    """What variants are built on computes the right thing when nothing is changed, so that a variant differs by its mistake alone."""
    of_rope, of_table = rope_bugs.with_frequencies(rope_bugs.blended(rope_bugs.ramps))
    mask_fwd, mask_bwd = attention_bugs.masked(attention_bugs.bottom_right)
    with np.errstate(all="ignore"):
        same("rope", "forward", of_rope)
        same("rope", "forward", rope_bugs.with_arguments(lambda positions, attrs: (positions, attrs)))
        same("rope.frequencies", "forward", of_table)
        same("attention", "forward", mask_fwd)
        same("attention", "backward", mask_fwd, mask_bwd)
        same("attention.merge", "forward", parts_bugs.literal(plus_is_empty=True, guarded=True))
        same("attention.varlen", "forward", parts_bugs.each(mask_fwd))
        for change in (cache_bugs.of_tokens(lambda data, rest, *_: (data, rest)), cache_bugs.of_scales(lambda xp, scale: scale)):
            same("cache.read", "forward", cache_bugs.reading(change))
            same("cache.append", "forward", cache_bugs.storing(change))
            same("mla.decode_fp8", "forward", cache_bugs.decoding(change))
        for change in (mla_bugs._scaled(lambda yarn, attrs: 1.0), mla_bugs._keys(lambda s, t: slice(None))):
            for bug in mla_bugs._core("frame", "", change):
                assert bug.fwd is not None
                same(bug.ops[0], "forward", bug.fwd)
        for bug in mla_bugs._latents("frame", "", lambda latent, k, c_kv, k_pe, own: (c_kv, k_pe), False):
            assert bug.fwd is not None
            same(bug.ops[0], "forward", bug.fwd)


# ---- wrong subjects, which share nothing with golden/bugs nor with the reference


def turn(x: Array, angle: Array, halves: bool = False) -> Array:
    """Rotates x[n,h,r] by angle[n,r/2], in float64."""
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    half = x.shape[-1] // 2
    a, b = (x[..., :half], x[..., half:]) if halves else (x[..., ::2], x[..., 1::2])
    y = (a * cos - b * sin, a * sin + b * cos)
    return np.concatenate(y, -1) if halves else np.stack(y, -1).reshape(x.shape)


def neox(x: Array, positions: Array) -> Array:
    f = 10000.0 ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])
    return turn(x.astype(np.float64), positions[:, None] * f, halves=True).astype(np.float32)


def softmax(z: Array) -> tuple[Array, Array]:
    """Probabilities, and the logarithm of their denominator."""
    m = z.max(-1, keepdims=True)
    p = np.exp(z - m)
    total = p.sum(-1, keepdims=True)
    return p / total, (m + np.log(total))[..., 0]


def scores(q: Array, k: Array, scale: float, mask: Callable[[Array, Array], Array] | None) -> Array:
    """[b,h,s,t]; each key head serves h/g query heads"""
    q, k = q.astype(np.float64), np.repeat(k.astype(np.float64), q.shape[2] // k.shape[2], axis=2)
    z = np.einsum("bshk,bthk->bhst", q, k) * (scale or q.shape[3] ** -0.5)
    i, j = np.ogrid[: q.shape[1], : k.shape[1]]
    return z if mask is None else np.where(mask(i, j), z, -np.inf)


def top_left(q: Array, k: Array, v: Array, *, scale: float, causal: bool, block: int) -> tuple[Array, Array]:
    p, lse = softmax(scores(q, k, scale, (lambda i, j: j <= i) if causal else None))
    wide = np.repeat(v.astype(np.float64), q.shape[2] // v.shape[2], axis=2)
    return np.einsum("bhst,bthv->bshv", p, wide).astype(np.float32), lse.astype(np.float32)


def forgets_dlse(q: Array, k: Array, v: Array, do: Array, dlse: Array, *, scale: float, causal: bool) -> tuple[Array, Array, Array]:
    if q.shape[1] > k.shape[1] or k.shape[2] != q.shape[2]:
        raise NotImplementedError("as many heads, and no more queries than keys")
    shift, scale = k.shape[1] - q.shape[1], scale or q.shape[3] ** -0.5
    p, _ = softmax(scores(q, k, scale, (lambda i, j: j <= i + shift) if causal else None))
    dp = np.einsum("bshv,bthv->bhst", do.astype(np.float64), v)
    dz = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale
    grads = np.einsum("bhst,bthk->bshk", dz, k), np.einsum("bhst,bshk->bthk", dz, q), np.einsum("bhst,bshv->bthv", p, do)
    return tuple(g.astype(np.float32) for g in grads)


def powers_of_two(o_parts: Array, lse_parts: Array) -> tuple[Array, Array]:
    lse = np.where(np.isinf(lse_parts), -np.inf, lse_parts.astype(np.float64))
    top = np.maximum(lse.max(0), -1e30)
    w = np.exp2(lse - top)
    total = w.sum(0)
    some = total > 0
    weights = np.swapaxes(w / np.where(some, total, 1.0), -1, -2)[..., None]
    o = (weights * np.where(weights == 0, 0.0, o_parts)).sum(0)
    return o.astype(np.float32), np.where(some, top + np.log2(np.where(some, total, 1.0)), np.inf).astype(np.float32)


def paged(q: Array, kv_cache: Array, table: Array, lengths: Array, dv: int, scale: float, masked: bool) -> tuple[Array, Array]:
    """Decode in float64. masked: every slot of the table is read, and those beyond the length get a probability of 0."""
    outputs = []
    for query, pages, n in zip(q.astype(np.float64), table, lengths, strict=True):
        slots = kv_cache[pages].reshape(-1, kv_cache.shape[2]).astype(np.float64)[: None if masked else n]
        s = len(query)
        i, j = np.ogrid[:s, : len(slots)]
        if n == 0:
            outputs.append((np.zeros((s, q.shape[2], dv)), np.full((q.shape[2], s), np.inf)))
            continue
        z = np.where((j <= i + n - s) & (j < n), np.einsum("shk,tk->hst", query, slots) * scale, -np.inf)
        p, lse = softmax(np.where((i + n - s < 0), 0.0, z))
        if s > n:
            raise NotImplementedError("fewer keys than queries")
        outputs.append((np.einsum("hst,tv->shv", p, slots[:, :dv]), lse))
    o, lse = (np.stack(x).astype(np.float32) for x in zip(*outputs, strict=True))
    return o, lse


def own_width(q: Array, kv_cache: Array, block_table: Array, cache_seqlens: Array, *, kv_lora_rank: int, scale: float) -> tuple:
    return paged(q, kv_cache, block_table, cache_seqlens, kv_lora_rank, q.shape[3] ** -0.5, masked=False)


def reads_it_all(q: Array, kv_cache: Array, block_table: Array, cache_seqlens: Array, *, kv_lora_rank: int, scale: float) -> tuple:
    return paged(q, kv_cache, block_table, cache_seqlens, kv_lora_rank, scale or q.shape[3] ** -0.5, masked=True)


def reader(rescale: Callable[[Array], Array], order: str = "<") -> Callable:
    """Reads V3.2's layout, with the scales changed, or 16- and 32-bit words in another byte order."""

    def read(kv_cache: Array, slots: Array, *, kv_lora_rank: int, qk_rope_head_dim: int, layout: str, page_size: int) -> tuple:
        c, r = kv_lora_rank, qk_rope_head_dim
        if layout != "fp8_v32":
            raise NotImplementedError(layout)
        rows = kv_cache.reshape(len(kv_cache) * page_size, -1)[slots]
        k_pe = rows[:, -2 * r :].copy().view(f"{order}u2").astype(np.uint32) << 16
        scale = rescale(rows[:, c : -2 * r].copy().view(f"{order}f4").astype(np.float32))
        values = decodes.table(floats.LAYOUTS["e4m3fn"], rows[:, :c]).astype(np.float64) * np.repeat(scale, 128, axis=1)[:, :c]
        return floats.STORE["bf16"](values.astype(np.float32)), k_pe.view(np.float32)

    return read


WRONG = [
    ("rope-neox-on-interleaved", "rope", "forward", neox),
    ("mask-top-left", "attention", "forward", top_left),
    ("attention-bwd-lse-dropped", "attention", "backward", forgets_dlse),
    ("lse-base2-vs-e", "attention.merge", "forward", powers_of_two),
    ("mla-scale-latent-dim", "mla.decode", "forward", own_width),
    ("kv-padding-nan-leak", "mla.decode", "forward", reads_it_all),
    ("scale-dropped", "cache.read", "forward", reader(np.ones_like)),
    ("scale-inverted", "cache.read", "forward", reader(lambda scale: 1 / scale)),
    ("kv-scale-neighbour-tile", "cache.read", "forward", reader(lambda scale: np.roll(scale, 1, axis=1))),
    ("kv-big-endian", "cache.read", "forward", reader(lambda scale: scale, ">")),
]


@pytest.mark.parametrize(("bug", "op", "way", "subject"), [pytest.param(*w, id=w[0]) for w in WRONG])
def test_a_wrong_subject_fails_and_is_told_why(bug: str, op: str, way: str, subject: Callable) -> None:
    """A subject with the bug fails, and its own bug is the first that is named."""
    check_told(bug, op, way, subject)


def yarn_angles(positions: Array, a: dict[str, Any], r: int) -> Array:
    i = np.arange(a["qk_rope_head_dim"] // 2)
    f = a["theta"] ** (-2 * i / r)
    if a["factor"] > 1:
        turns = a["original_max_position_embeddings"] / (2 * np.pi * np.array([a["beta_fast"], a["beta_slow"]]))
        low, high = r * np.log(turns) / (2 * np.log(a["theta"]))
        low, high = max(np.floor(low), 0), min(np.ceil(high), r - 1)
        ramp = np.clip((i - low) / max(high - low, 0.001), 0, 1)
        f = f / a["factor"] * ramp + f * (1 - ramp)
    return positions[:, None] * f


def rms(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def prefill(
    w: dict[str, Array], a: dict[str, Any], scale: float, key_heads: Array | None = None, wrong: str = ""
) -> tuple[Array, Array, Array]:
    """MLA of one row, in the dtype of the arrays (complex too). key_heads[s,h,r]: what each head takes for k_pe, or else all the same.
    wrong: what to do otherwise than is right."""
    x, (h, dn, r, dv) = w["x"][0], (a[n] for n in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    c, s, eps = a["kv_lora_rank"], len(x), a["rms_norm_eps"]
    c_q = rms(x @ w["q_a_proj"].T, w["q_a_layernorm"], eps) @ w["q_b_proj"].T if "q_a_proj" in w else x @ w["q_proj"].T
    angles = yarn_angles(w["positions"][0].real, a, dn if wrong == "rope-wrong-slice" else r)
    halves = wrong == "rope-neox-on-interleaved"
    q = c_q.reshape(s, h, dn + r)
    q_pe, q_nope = (q[..., :r], q[..., r:]) if wrong == "mla-q-rope-first" else (q[..., dn:], q[..., :dn])
    q_pe = turn(q_pe, angles, halves)
    if wrong == "rope-permute-one-side-only":
        q_pe = np.concatenate([q_pe[..., ::2], q_pe[..., 1::2]], -1)
    q = np.concatenate([q_nope, q_pe], -1)
    down = x @ w["kv_a_proj_with_mqa"].T
    latent, key = (down[:, r:], down[:, :r]) if wrong == "mla-kpe-before-latent" else (down[:, :c], down[:, c:])
    c_kv = latent if wrong == "mla-kv-norm-missing" else rms(latent, w["kv_a_layernorm"], eps)
    k_pe = key[:, None] if wrong == "mla-kpe-not-rotated" else turn(key[:, None], angles, halves)
    if wrong == "mla-kpe-normed":
        k_pe = rms(k_pe, np.ones(r), eps)
    up = w["kv_b_proj"]
    if wrong == "mla-kvb-split-order":
        kv = np.concatenate([(c_kv @ part.T).reshape(s, h, -1) for part in (up[: h * dn], up[h * dn :])], -1)
    elif wrong == "mla-kvb-values-first":
        kv = (c_kv @ up.T).reshape(s, h, dv + dn)
        kv = np.concatenate([kv[..., dv:], kv[..., :dv]], -1)
    else:
        kv = (c_kv @ up.T).reshape(s, h, dn + dv)
    if wrong == "mla-wuk-transpose":
        uk = up.reshape(h, dn + dv, c)[:, :dn]
        kv[..., :dn] = np.einsum("sc,hcd->shd", c_kv, uk)  # qk_nope is kv_lora_rank
    each = np.repeat(k_pe, h, axis=1)
    if key_heads is not None:
        each = np.concatenate([each[:, :1], key_heads[:, 1:]], axis=1)
    k = np.concatenate([kv[..., :dn], each], -1)
    z = np.einsum("shk,thk->hst", q, k) * scale
    p = np.where(np.tri(s, dtype=bool) | (wrong == "mask-verify-sees-future"), np.exp(z - z.real.max(-1, keepdims=True)), 0)
    o = np.einsum("hst,thv->shv", p / p.sum(-1, keepdims=True), kv[..., dn:])
    o = o.transpose(0, 2, 1) if wrong == "mla-output-heads-last" else o
    y = o.reshape(s, -1) @ w["o_proj"].T
    latent, k_pe = (latent if wrong == "mla-latent-cached-unnormed" else c_kv), k_pe[:, 0]
    return y[None], latent[None], (key if wrong == "mla-kpe-cached-unrotated" else k_pe)[None]


def first_of(case: str, way: str, outputs: dict[str, Array], op: str = "mla.prefill") -> list[str]:
    """The verdict on these outputs of a case at float32, and the bugs that explain them."""
    returned = {k: Returned(x.real.astype(np.float32), "float32") for k, x in outputs.items()}
    return named(vector(op, case, way, "fp32"), returned)


def asked(case: str, way: str) -> tuple[dict[str, Array], dict[str, Any]]:
    v = vector("mla.prefill", case, way, "fp32")
    inputs = {k: x if k == "positions" else x.astype(np.float64) for k, x in v.inputs.items()}
    return inputs, {**v.op.defaults, **v.case.attrs}


CHANGED = """rope-neox-on-interleaved rope-permute-one-side-only rope-wrong-slice mla-kvb-split-order mla-kvb-values-first mla-wuk-transpose
mla-q-rope-first mla-kpe-before-latent mla-output-heads-last mla-latent-cached-unnormed mla-kpe-cached-unrotated mla-kv-norm-missing
mla-kpe-not-rotated mla-kpe-normed mask-verify-sees-future"""
SCALES: dict[str, Callable[[float, int, int, int], float]] = {  # of m², qk_nope, qk_rope, kv_lora_rank
    "yarn-mscale-missing": lambda m2, dn, r, c: (dn + r) ** -0.5,
    "yarn-mscale-once": lambda m2, dn, r, c: m2**0.5 * (dn + r) ** -0.5,
    "mla-scale-latent-dim": lambda m2, dn, r, c: m2 * (c + r) ** -0.5,
    "mla-scale-nope-dim": lambda m2, dn, r, c: m2 * dn**-0.5,
    "mla-scale-inverted": lambda m2, dn, r, c: m2 * (dn + r) ** 0.5,
}


@pytest.mark.parametrize("bug", [*CHANGED.split(), *SCALES])
@pytest.mark.parametrize("op", ["mla.prefill", "mla.absorb"])
def test_a_variant_is_what_its_sentence_says(op: str, bug: str) -> None:
    """The variant's outputs are those of code written anew with that mistake (and differ from the truth), to float64's rounding."""
    case = "square" if bug == "mla-wuk-transpose" else "v2"
    inputs, attrs = asked(case, "forward")
    dn, r, m2 = attrs["qk_nope_head_dim"], attrs["qk_rope_head_dim"], (0.1 * attrs["mscale_all_dim"] * np.log(attrs["factor"]) + 1) ** 2
    scale = SCALES.get(bug, lambda m2, dn, r, c: m2 * (dn + r) ** -0.5)(m2, dn, r, attrs["kv_lora_rank"])
    expected = prefill(inputs, attrs, scale, wrong=bug)
    v = vector("mla.prefill", case, "forward", "fp32")
    (variant,) = (b.variant(OPS[op]) for b in bugs_of(OPS[op], "forward") if b.id == bug)
    found = variant.run("forward", inputs, v.case.attrs)
    for name, y in zip(("y", "c_kv", "k_pe"), expected, strict=True):
        np.testing.assert_allclose(np.asarray(found[name]), y, rtol=0, atol=1e-10, err_msg=name)
    assert any(np.abs(y - v.band.truth[name]).max() > 1e-3 for name, y in zip(("y", "c_kv", "k_pe"), expected, strict=True))


def test_a_missing_mscale_is_told() -> None:
    """The softmax scale of V2 without YaRN's factor. The same code with the factor passes."""
    inputs, attrs = asked("v2", "forward")
    plain = (attrs["qk_nope_head_dim"] + attrs["qk_rope_head_dim"]) ** -0.5
    right = plain * (0.1 * attrs["mscale_all_dim"] * np.log(attrs["factor"]) + 1) ** 2
    v = vector("mla.prefill", "v2", "forward", "fp32")
    for name, y in zip(("y", "c_kv", "k_pe"), prefill(inputs, attrs, right), strict=True):
        np.testing.assert_allclose(y, v.band.truth[name], rtol=0, atol=1e-10)
    y, c_kv, k_pe = prefill(inputs, attrs, plain)
    assert first_of("v2", "forward", {"y": y, "c_kv": c_kv, "k_pe": k_pe})[0] == "yarn-mscale-missing"


def test_a_gradient_of_one_head_is_told() -> None:
    """dk_pe from the first head alone: a complex step through a forward whose other heads take k_pe for a constant. With all heads the
    same code gives the true gradient."""
    inputs, attrs = asked("moonlight", "backward")
    scale = (attrs["qk_nope_head_dim"] + attrs["qk_rope_head_dim"]) ** -0.5
    dy = {str(k): inputs.pop(f"d{k}") for k in ("y", "c_kv", "k_pe")}
    _, _, k_pe = prefill(inputs, attrs, scale)
    constant = np.repeat(k_pe[0][:, None], attrs["num_attention_heads"], axis=1)

    def gradient(name: str, key_heads: Array | None) -> Array:
        out = np.zeros(inputs[name].shape)
        for at in np.ndindex(out.shape):
            moved = inputs[name].astype(complex)
            moved[at] += 1e-30j
            result = prefill({**inputs, name: moved}, attrs, scale, key_heads)
            out[at] = sum((dy[k] * y.imag).sum() for k, y in zip(dy, result, strict=True)) / 1e-30
        return out

    truth = vector("mla.prefill", "moonlight", "backward", "fp32").band.truth
    np.testing.assert_allclose(gradient("kv_a_proj_with_mqa", None), truth["dkv_a_proj_with_mqa"], rtol=0, atol=1e-10)
    wrong = {**truth, **{f"d{n}": gradient(n, constant) for n in ("x", "kv_a_proj_with_mqa")}}
    assert first_of("moonlight", "backward", wrong)[0] == "mla-kpe-grad-not-head-summed"
