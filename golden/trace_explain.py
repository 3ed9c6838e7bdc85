"""Why a step of a trace is wrong: the catalogue's bugs in its parts, the op it belongs to, and what the error looks like.

What is one declared op (a norm, the router, the experts) is asked of that op, as `leadline verify` asks. Other steps are run with one of
their parts replaced by a known bug; attention also as the whole of mla.prefill, from the engine's own input to what it gives.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ref.names import is_dense
from ..ref.op import OPS, op_named
from .band import Band, band_of, spread_of
from .bugs import bugs_of
from .catalogue import entry_named
from .explain import Explanation, explain
from .fingerprints import fingerprints
from .judge import PASS, Question, Returned, judge
from .trace_band import judge_step, question_of, rows_for, runs_of
from .trace_names import Name, full_name
from .trace_steps import INNER_EPS, STEPS, About, sources, value_of

if TYPE_CHECKING:
    from .trace_check import Checker

Arrays = dict[str, np.ndarray]
ROWS = (48, 256)  # tokens that an op is asked about
LARGEST = 2**27  # elements of the experts that are held at once
NORMS = {
    "attn.norm": ("input", "input_layernorm"),
    "mlp.norm": ("mid", "post_attention_layernorm"),
    "norm": ("input", "norm"),
}
PARTS = {  # ops that a step is made of
    "attn.q": ("rope", "rmsnorm"),
    "attn.c_kv": ("rmsnorm",),
    "attn.k_pe": ("rope",),
    "attn.o": ("attention",),
    "shared.out": ("swiglu",),
    "mlp.out": ("swiglu",),
}
ATTENTION = ("attn.q", "attn.c_kv", "attn.k_pe", "attn.o", "attn.out")
Change = Callable[[Mapping[str, Any], About, Any], Any]  # of what a step reads, what it knows and its output: another output


def _scaled(power: float) -> Change:
    return lambda t, a, y: y * a.config.routed_scaling_factor**power


OWN: dict[str, dict[str, Change]] = {  # bugs of larger ops, said of the step where they show; the sentences are the catalogue's
    "shared.out": {"shared-expert-inv-scaled": _scaled(-1), "shared-expert-scaled-too": _scaled(1)},
    "experts.out": {"routed-scale-twice": _scaled(1)},
    "mlp.out": {
        "shared-expert-missing": lambda t, a, y: t["experts.out"],
        "residual-inside": lambda t, a, y: y + t["mlp.norm"],
        "routed-scale-missing": lambda t, a, y: y,
        "shared-expert-inv-scaled": lambda t, a, y: y + (1 / a.config.routed_scaling_factor - 1) * t["shared.out"],
        "shared-expert-scaled-too": lambda t, a, y: y + (a.config.routed_scaling_factor - 1) * t["shared.out"],
    },
}


def explain_step(checker: "Checker", layer: int | None, about: Name) -> list[Explanation]:
    """What explains a wrong tensor, the best first."""
    name, got = about.name, checker.trace.tensors[full_name(layer, about.name)]
    if name == "embed":
        return _looks(checker, layer, about, {"ids": checker.trace.ids}, got)
    given = checker.given(layer, name)
    if name in ("router.topk_idx", "router.topk_weight"):
        return _router(checker, layer, given, got if name == "router.topk_idx" else given["router.topk_idx"])
    if name in NORMS and NORMS[name][0] in given:
        found = _norm(checker, layer, name, given, got)
    else:
        found = list(_parts(checker, layer, about, given, got)) or _whole(checker, layer, name, given, got)
    known = [e for e in found if e.kind not in ("fingerprint", "intermediate")]
    return known or _looks(checker, layer, about, given, got) or found


def _router(checker: "Checker", layer: int | None, given: Arrays, idx: np.ndarray) -> list[Explanation]:
    question = checker.router_question(layer, given["router.logits"])
    return explain(question, checker.router_returned(layer, question, idx))


def _norm(checker: "Checker", layer: int | None, name: str, given: Arrays, got: np.ndarray) -> list[Explanation]:
    source, weight = NORMS[name]
    a = checker.about(layer)
    rows = rows_for(set(), got, value_of(name, given, a)).rows
    inputs = {"x": given[source][rows], "weight": a.weight(weight)}
    attrs = {"eps": checker.config.rms_norm_eps, "cast_order": a.cast_order}
    question = Question(op_named("rmsnorm"), "forward", inputs, attrs, checker.precision)
    return explain(question, {"y": _carried(checker, got[rows])})


def _carried(checker: "Checker", values: np.ndarray) -> Returned:
    values = values.astype(checker.precision.carrier)
    return Returned(values, str(values.dtype))


def candidates(name: str, about: About) -> Iterator[tuple[Explanation, About, Change | None]]:
    """A step with one part replaced, or its output changed"""
    for op in PARTS.get(name, ()):
        for bug in bugs_of(OPS[op], "forward"):
            if bug.benign:
                continue
            fwd = bug.variant(OPS[op]).fwd
            if bug.attrs:

                def fwd(*arrays: Any, own: Any = OPS[op].fwd, attrs: Any = bug.attrs, **keywords: Any) -> Any:
                    return own(*arrays, **{**keywords, **attrs})

            yield Explanation(bug.id, bug.what, bug.sources), replace(about, change={op: fwd}), None
    for id, change in OWN.get(name, {}).items():
        entry = entry_named(id)
        yield Explanation(id, entry.what[0][0], "; ".join(entry.sources)), about, change


def _parts(checker: "Checker", layer: int | None, about: Name, given: Arrays, got: np.ndarray) -> Iterator[Explanation]:
    """The bugs that the step's output agrees with. A band costs many runs, so what is no nearer than the truth is not asked."""
    name, how = about.name, checker.about(layer)
    truth = np.asarray(value_of(name, given, how))
    _, way = sources(checker.config, layer, name, given)
    rows = rows_for(way, got, truth)
    entry = checker.trace.tensors.get(full_name(layer, "mlp.norm"))
    beside = {"mlp.norm": entry.astype(np.float64)} if name == "mlp.out" and entry is not None else {}
    agreeing = []
    layouts = [how] + [
        replace(how, conventions={**how.conventions, key: "half"}) for key in ("q_layout", "k_layout") if key in STEPS[name][2]
    ]
    for explanation, asked, change in (c for each in layouts for c in candidates(name, each)):
        try:
            with np.errstate(all="ignore"):
                theirs = np.asarray(value_of(name, given, asked))
                theirs = theirs if change is None else np.asarray(change({**beside, **given}, asked, theirs))
            gap, own = (float(np.sum(np.square(got - y))) for y in (theirs, truth))
            if not gap < own:
                continue
            runs = runs_of(name, given, asked, checker.precision, rows)
            if change is not None:
                cut = {k: rows.of(k, v) for k, v in {**beside, **given}.items()}
                runs = np.stack([np.asarray(change(cut, asked, r)) for r in runs])
            question = question_of(name, about.dims, checker.precision)
            if judge_step(question, got[rows.rows], theirs[rows.rows], runs, rows).verdict == PASS:
                agreeing.append((gap, explanation))
        except (ValueError, KeyError, TypeError):  # it refuses these inputs or sizes, or what it would read is absent
            continue
    seen: set[str] = set()
    for _, explanation in sorted(agreeing, key=lambda a: a[0]):
        if explanation.id not in seen:
            seen.add(explanation.id)
            yield explanation


def _whole(checker: "Checker", layer: int | None, name: str, given: Arrays, got: np.ndarray) -> list[Explanation]:
    """The declared op that the step is a part of, asked with the engine's own tensors: the first tokens, or more where those are right"""
    for tokens in ROWS:
        asked = None
        if name in ATTENTION:
            asked = _attention(checker, layer, name, tokens)
        elif name == "experts.out" and set(given) == {"mlp.norm", "router.topk_idx", "router.topk_weight"}:
            asked = _experts(checker, layer, given, got, tokens)
        if asked is None:
            return []
        question, returned = asked
        try:
            band = band_of(question.op, "forward", question.inputs, question.attrs, question.precision)
            if judge(question, returned, band).verdict != PASS:
                return explain(question, returned, band)
        except ValueError:  # sizes that the op does not take
            return []
        if tokens >= len(got):
            break
    return []


def _attention(checker: "Checker", layer: int | None, name: str, tokens: int) -> tuple[Question, dict[str, Returned]] | None:
    """mla.prefill from attn.norm to attn.out or, where that is not yet to blame, to the heads' output: o_proj is then the identity"""
    trace, config, a = checker.trace.tensors, checker.config, checker.about(layer)
    last = "attn.out" if name == "attn.out" else "attn.o"
    there = {n: trace.get(full_name(layer, n)) for n in ("attn.norm", "attn.c_kv", "attn.k_pe", last)}
    if any(v is None for v in there.values()) or (a.q_layout != a.k_layout and name != "attn.q"):
        return None
    x, c_kv, k_pe, o = (np.asarray(v) for v in there.values())
    n = min(len(x), tokens)
    weights = {w: a.weight(w) for w in OPS_WEIGHTS}
    width = config.num_attention_heads * config.v_head_dim
    d = config.hidden_size
    if last == "attn.o":
        weights["o_proj"] = np.eye(d, width)
        o = np.concatenate([o.reshape(len(o), -1)[:, :d], np.zeros((len(o), max(d - width, 0)), o.dtype)], axis=1)
    inputs = {"x": x[None, :n].astype(np.float64), "positions": a.positions[None, :n]}
    inputs |= {w: v for w, v in weights.items() if v is not None}
    attrs = {**config.attention(), "rms_norm_eps": INNER_EPS, "rope_layout_out": a.k_layout, "cos_sin": a.cos_sin}
    question = Question(op_named("mla.prefill"), "forward", inputs, attrs, checker.precision)
    returned = {"y": o[None, :n], "c_kv": c_kv[None, :n], "k_pe": k_pe[None, :n]}
    return question, {k: _carried(checker, v) for k, v in returned.items()}


OPS_WEIGHTS = ("q_proj", "q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")


def _experts(
    checker: "Checker", layer: int | None, given: Arrays, got: np.ndarray, tokens: int
) -> tuple[Question, dict[str, Returned]] | None:
    """moe.experts of the experts that were chosen"""
    a = checker.about(layer)
    assert layer is not None
    if a.routed_scale == "times the experts' sum" or a.experts != "routed alone" or is_dense(checker.config, layer):
        return None
    n = min(len(got), tokens)
    used, idx = np.unique(given["router.topk_idx"][:n], return_inverse=True)
    config = checker.config
    if 3 * len(used) * config.hidden_size * config.moe_intermediate_size > LARGEST:
        return None
    stacks = [np.stack(w) for w in zip(*(a.weights.expert(layer, int(e)) for e in used), strict=True)]
    inputs = {"x": given["mlp.norm"][:n], "topk_idx": idx.reshape(n, -1), "topk_weight": given["router.topk_weight"][:n]}
    inputs |= dict(zip(("w_gate", "w_up", "w_down"), stacks, strict=True))
    question = Question(op_named("moe.experts"), "forward", inputs, {"silu": a.silu}, checker.precision)
    return question, {"y": _carried(checker, got[:n])}


def _looks(checker: "Checker", layer: int | None, about: Name, given: Arrays, got: np.ndarray) -> list[Explanation]:
    """Fingerprints of the error"""
    name, how = about.name, checker.about(layer)
    truth = np.asarray(value_of(name, given, how))[-len(got) :]
    _, way = sources(checker.config, layer, name, given)
    given = {k: v[len(v) - len(got) :] for k, v in given.items()}
    rows = rows_for(way, got, truth)
    sigma, limits = spread_of(truth[rows.rows], runs_of(name, given, how, checker.precision, rows), checker.precision)
    band = Band({"y": truth[rows.rows]}, {"y": sigma}, {"y": limits})
    question = question_of(name, about.dims, checker.precision)
    attrs = {"routed_scaling_factor": checker.config.routed_scaling_factor}
    inputs = {k: v for k, v in {**given, name: got}.items() if v.dtype.kind == "f"}  # whose widths a factor may be
    prints = fingerprints(replace(question, attrs=attrs, inputs=inputs), {"y": _carried(checker, got[rows.rows])}, band)
    prints = [p for p in prints if p.id != "place" or len(rows.rows) == len(got)]  # where among all tokens, not among some
    return [Explanation(p.id, re.sub(r"^y\b", name, p.text), kind="fingerprint") for p in prints]
