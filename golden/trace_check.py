"""A trace held to the reference: every tensor for its own inputs (is this step right?), and from the start (how far has it drifted?)."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from ..ref.cast import round_to
from ..ref.config import Config
from ..ref.op import op_named
from .band import band_of
from .explain import Explanation
from .judge import FAIL, PASS, SKIPPED, Question, Returned, judge
from .precision import PRECISIONS, Precision, precision_named
from .trace_band import judge_step, question_of, rows_for, runs_of
from .trace_names import Name, Trace, full_name, names_of
from .trace_steps import CONVENTIONS, STEPS, About, other_conventions, router_attrs, router_inputs, sources, value_of
from .trace_weights import Weights

CHOICE = ("router.topk_idx", "router.topk_weight")


@dataclass
class Judged:
    """One canonical tensor: the verdict on its step, and its drift."""

    name: str
    layer: int | None
    verdict: str
    reason: str = ""
    ambiguous: int = 0
    convention: str = ""
    statistics: Mapping[str, float] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)
    tokens: int = 0  # that were put through the Monte-Carlo runs
    drift: float | None = None  # rms error over rms, from the start; of a choice the share of tokens that choose otherwise
    expected: float | None = None  # the same of the Monte-Carlo runs, in the mean
    limit: float | None = None
    explanations: list[Explanation] = field(default_factory=list)

    @property
    def worst(self) -> float:
        """The largest statistic over its limit: a step above 1 is wrong."""
        return max((v / self.limits[s] for s, v in self.statistics.items() if self.limits.get(s)), default=0.0)

    @property
    def beyond(self) -> bool:
        """Whether it has drifted further than correct arithmetic of this precision does."""
        return self.drift is not None and self.limit is not None and self.drift > self.limit


@dataclass
class Checked:
    """All of a trace's tensors, in their order."""

    engine: str
    precision: str
    tokens: int
    planted: str = ""
    results: list[Judged] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def wrong(self) -> list[Judged]:
        return [r for r in self.results if r.verdict == FAIL]

    @property
    def verdict(self) -> str:
        return FAIL if self.wrong else PASS if any(r.verdict == PASS for r in self.results) else SKIPPED

    @property
    def exit_status(self) -> int:
        return 0 if self.verdict == PASS else 1

    @property
    def conventions(self) -> dict[str, str]:
        """Each convention that was found, with the first tensor that shows it"""
        found: dict[str, str] = {}
        for r in self.results:
            for said in filter(None, r.convention.split("; ")):
                found.setdefault(said, r.name)
        return found


@dataclass
class Checker:
    """A trace, the model that it claims to be of, and what is known of the engine so far."""

    trace: Trace
    config: Config
    weights: Weights
    precision: Precision
    conventions: dict[str, str] = field(default_factory=dict)

    def about(self, layer: int | None) -> About:
        return About(self.config, self.weights, self.trace.positions, layer, dict(self.conventions))

    def given(self, layer: int | None, name: str) -> dict[str, np.ndarray]:
        """What a step reads of the trace, by short names"""
        tensors = self.trace.tensors
        if layer is None:
            last = full_name(self.config.num_hidden_layers - 1, "output")
            own = {"ids": self.trace.ids, "input": tensors[last], **{n: tensors[n] for n in ("norm",) if n in tensors}}
        else:
            start = f"layer.{layer}."
            own = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
            own["input"] = tensors["embed" if layer == 0 else full_name(layer - 1, "output")]
        own = {k: v for k, v in own.items() if k != name}
        read, _ = sources(self.config, layer, name, own)
        return {k: v if v.dtype.kind == "i" else v.astype(np.float64) for k, v in own.items() if k in read}

    def step(self, layer: int | None, about: Name) -> Judged:
        """Given the engine's own earlier tensors, is this one right?"""
        name = about.name
        full = full_name(layer, name)
        if full not in self.trace.tensors:
            return Judged(full, layer, SKIPPED, f"absent: {self.trace.absent[full]}")
        given, got = self.given(layer, name), self.trace.tensors[full]
        strange = [k for k, v in given.items() if v.dtype.kind == "f" and not np.isfinite(v).all()]
        e = self.config.n_routed_experts
        if strange:
            return Judged(full, layer, SKIPPED, f"{full_name(layer, strange[0])}, which it is made of, is not finite")
        if name != CHOICE[0] and CHOICE[0] in given and not legal(given[CHOICE[0]], e):
            return Judged(full, layer, SKIPPED, f"{full_name(layer, CHOICE[0])}, which it is made of, is no choice of {e} experts")
        if name == CHOICE[0]:
            return self.choice(layer, name, given, got)
        if name == "embed":
            return self.embedding(got)
        return self.real(layer, about, given, got)

    def embedding(self, got: np.ndarray) -> Judged:
        """Rows of a table, exactly"""
        truth = value_of("embed", {"ids": self.trace.ids}, self.about(None))
        wrong = np.argwhere(got != truth)
        if not len(wrong):
            return Judged("embed", None, PASS, tokens=len(got))
        at = tuple(int(i) for i in wrong[0])
        reason = f"embed[{at[0]}, {at[1]}] is {got[at]:.8g}; the row of id {self.trace.ids[at[0]]} has {truth[at]:.8g} [{len(wrong)} such]"
        return Judged("embed", None, FAIL, reason, tokens=len(got))

    def real(self, layer: int | None, about: Name, given: dict[str, np.ndarray], got: np.ndarray) -> Judged:
        """Judged as it is usually done, then as others do it; the first convention that fits is kept."""
        precision = own_precision(about.name, got, self.precision)
        known = STEPS[about.name][2]
        if self.trace.fused:
            self.conventions["experts"] = "with the shared ones"
        result = self.judged(layer, about, given, got, precision, self.about(layer))
        if result.verdict == FAIL and known and np.isfinite(got).all():
            for other in other_conventions(self.about(layer), known, precision):
                tried = self.judged(
                    layer, about, given, got, precision, replace(self.about(layer), conventions={**self.conventions, **other})
                )
                if tried.verdict == PASS:
                    self.conventions.update(other)
                    result = tried
                    break
        kept = {n: self.conventions[n] for n in known if n in self.conventions}
        if result.verdict == PASS:
            result.convention = "; ".join(f"{n} {v}" for n, v in kept.items() if v != CONVENTIONS[n][0])
        return result

    def judged(
        self, layer: int | None, about: Name, given: dict[str, np.ndarray], got: np.ndarray, precision: Precision, how: About
    ) -> Judged:
        with np.errstate(all="ignore"):
            truth = np.asarray(value_of(about.name, given, how))
        truth, tail = truth[-len(got) :], len(truth) - len(got)
        _, way = sources(self.config, layer, about.name, given)
        rows = rows_for(way, got, truth)
        given = {k: v[tail:] for k, v in given.items()}  # logits may be those of the last tokens
        runs = runs_of(about.name, given, how, precision, rows)
        question = question_of(about.name, about.dims, precision)
        found = judge_step(question, got[rows.rows], truth[rows.rows], runs, rows)
        full = full_name(layer, about.name)
        reason = re.sub(r"\by\b", full, "; ".join(dict.fromkeys(found.reasons)))
        return Judged(
            full,
            layer,
            found.verdict,
            reason,
            found.ambiguous,
            "",
            found.statistics.get("y", {}),
            found.limits.get("y", {}),
            len(rows.rows),
        )

    def choice(self, layer: int | None, name: str, given: dict[str, np.ndarray], got: np.ndarray) -> Judged:
        """The router's decision, near ties accepted"""
        full = full_name(layer, name)
        question = self.router_question(layer, given["router.logits"])
        band = band_of(question.op, "forward", question.inputs, question.attrs, question.precision)
        found = judge(question, self.router_returned(layer, question, got), band)
        reasons = [r.replace("topk_idx", full) for r in found.reasons if r.startswith("topk_idx")]
        return Judged(full, layer, FAIL if reasons else PASS, "; ".join(reasons), found.ambiguous, tokens=len(got))

    def router_question(self, layer: int | None, logits: np.ndarray) -> Question:
        op, attrs = router_attrs(self.config)
        inputs: dict[str, np.ndarray] = dict(
            zip(("logits", "bias"), (np.asarray(v) for v in router_inputs(logits, self.about(layer))), strict=False)
        )
        weight = self.trace.tensors.get(full_name(layer, CHOICE[1]))
        precision = self.precision if weight is None else own_precision(CHOICE[1], weight, self.precision)
        return Question(op_named(op), "forward", inputs, attrs, precision, any_tie=True)

    def router_returned(self, layer: int | None, question: Question, idx: np.ndarray) -> dict[str, Returned]:
        """The engine's decision and weights; weights that are absent are the reference's."""
        weight = self.trace.tensors.get(full_name(layer, CHOICE[1]))
        if weight is None:
            own = legal(idx, self.config.n_routed_experts)
            weight = question.op.run("forward", {**question.inputs, **({"topk_idx": idx} if own else {})}, question.attrs)["topk_weight"]
            weight = round_to(question.precision.io, weight)
        weight = weight.astype(question.precision.carrier)
        return {"topk_idx": Returned(idx, "int64"), "topk_weight": Returned(weight, str(weight.dtype))}


def legal(idx: np.ndarray, e: int) -> bool:
    """Whether every row has distinct experts"""
    ordered = np.sort(idx, axis=-1)
    return bool(np.all((idx >= 0) & (idx < e)) and np.all(ordered[:, 1:] != ordered[:, :-1]))


def own_precision(name: str, values: np.ndarray, precision: Precision) -> Precision:
    """A 16-bit model's router computes in float32 where its numbers are not of 16 bits: they are then held to float32."""
    if precision.io.bits >= 32 or name not in ("router.logits", CHOICE[1]) or np.array_equal(round_to(precision.io, values), values):
        return precision
    return PRECISIONS["fp32"]


def check(
    trace: Trace,
    checkpoint: Mapping[str, np.ndarray],
    config: Config,
    *,
    drift: bool = True,
    explained: int = 1,
    progress: Callable[[int, int, str], None] | None = None,
) -> Checked:
    """Judges every tensor of a trace against a checkpoint; explains the first `explained` that are wrong."""
    from .trace_drift import Drift
    from .trace_explain import explain_step

    precision = precision_named(trace.precision)
    checker = Checker(trace, config, Weights(checkpoint, config, precision), precision)
    report = Checked(trace.engine, precision.name, len(trace.ids), trace.planted)
    follower = Drift(checker) if drift else None
    names = list(names_of(config))
    for count, (layer, about) in enumerate(names):
        if progress:
            progress(count, len(names), full_name(layer, about.name))
        result = checker.step(layer, about)
        if result.verdict == FAIL and explained > 0:
            explained -= 1
            result.explanations = explain_step(checker, layer, about)
        if follower is not None:
            follower.follow(layer, about.name, result)
        report.results.append(result)
    return report


def layers_of(report: Checked) -> Iterator[tuple[int | None, list[Judged]]]:
    """The results layer by layer; those outside the layers where they stand"""
    block: list[Judged] = []
    for r in report.results:
        if block and block[-1].layer != r.layer:
            yield block[-1].layer, block
            block = []
        block.append(r)
    if block:
        yield block[-1].layer, block
