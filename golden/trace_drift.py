"""How far a trace has drifted from the truth, beside how far correct arithmetic of its precision drifts.

The truth follows the reference from the ids on, in float64, through all tokens; STREAM Monte-Carlo runs follow the same text over the
first PREFIX tokens, which no later token touches. A choice of experts is the engine's own wherever that is a near tie: there the truth
and the runs follow the engine.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ref.cast import round_to
from .band import DEVIATIONS, SLACK
from .montecarlo import noisy_inputs
from .trace_band import Stacked
from .trace_names import full_name
from .trace_steps import About, Values, router_attrs, router_inputs

if TYPE_CHECKING:
    from .trace_check import Checker, Judged

STREAM = 8  # runs
PREFIX = 32  # tokens


class Drift:
    """Follows the reference step by step, beside the checker."""

    def __init__(self, checker: "Checker"):
        self.checker = checker
        self.n = len(checker.trace.ids)
        self.m = min(self.n, PREFIX)
        self.noise = Stacked(checker.precision, 1)
        self.layer: int | None = None
        self.truth: dict[str, Any] = {"ids": checker.trace.ids}
        self.runs: dict[str, Any] = {"ids": np.tile(checker.trace.ids[: self.m], STREAM)}

    def follow(self, layer: int | None, name: str, result: "Judged") -> None:
        """One step further; the drift goes into the result."""
        if layer != self.layer:
            last = next((k for k in ("output", "embed") if k in self.truth), None)
            self.truth = {"input": self.truth[last]} if last else self.truth
            self.runs = {"input": self.runs[last]} if last else self.runs
            self.layer = layer
        about = self.checker.about(layer)
        got = self.checker.trace.tensors.get(full_name(layer, name))
        if name == "router.topk_idx" and got is not None:
            self.truth[name] = self.choice(about, got, result)
            self.runs[name] = np.tile(self.truth[name][: self.m], (STREAM, 1))
            return
        with np.errstate(all="ignore"):
            self.truth[name] = np.asarray(Values(self.truth, about)[name])
            stacked = replace(about, positions=about.positions[: self.m], runs=STREAM)
            value = Values(self.noisy(), stacked)[name]
            self.runs[name] = np.asarray(value)
        if got is not None:
            self.measure(name, got, result)

    def noisy(self) -> Mapping[str, Any]:
        return noisy_inputs(self.runs, self.noise)

    def measure(self, name: str, got: np.ndarray, result: "Judged") -> None:
        """rms error over rms, of the engine and of the runs"""
        truth = self.truth[name][-len(got) :]
        size = float(np.sqrt(np.mean(truth * truth))) or 1.0
        error = got.astype(np.float64) - truth
        result.drift = float(np.sqrt(np.mean(error * error))) / size if np.isfinite(error).all() else float("inf")
        prefix = self.truth[name][: self.m]
        runs = self.runs[name].reshape(STREAM, *prefix.shape)
        errors = (round_to(self.checker.precision.io, runs) - prefix).reshape(STREAM, -1)
        size = float(np.sqrt(np.mean(prefix * prefix))) or 1.0
        each = np.sqrt(np.mean(errors * errors, axis=1)) / size
        result.expected = float(np.mean(each))
        result.limit = SLACK * float(np.mean(each) + DEVIATIONS * np.std(each, ddof=1))

    def choice(self, about: About, got: np.ndarray, result: "Judged") -> np.ndarray:
        """The reference's choice, and the engine's where the runs' noise could have led there"""
        question = self.checker.router_question(about.layer, self.truth["router.logits"])
        op, attrs = question.op, question.attrs
        own = np.asarray(op.run("forward", question.inputs, attrs)["topk_idx"])
        differs = np.flatnonzero(np.any(np.sort(own, -1) != np.sort(got, -1), axis=-1))
        result.drift = len(differs) / len(own)
        if len(differs) and op.choice is not None:
            inputs = [v[differs] if i == 0 else v for i, v in enumerate(router_inputs(self.truth["router.logits"], about))]
            regret = np.asarray(op.choice[1](*inputs, topk_idx=got[differs], **attrs))
            near = differs[np.isfinite(regret) & (regret <= SLACK * DEVIATIONS * self.wobble(about))]
            own[near] = got[near]
        same = np.all(np.sort(own, -1) == np.sort(got, -1), axis=-1)
        own[same] = got[same]  # in the engine's order, so that the weights' drift is theirs
        return own

    def wobble(self, about: About) -> float:
        """The deviation of the scores that experts are chosen by, from the start"""
        from ..ref.router import scores_of

        name, attrs = router_attrs(about.config)
        scoring = attrs["scoring"] if name == "router.noaux_tc" else "softmax"
        truth = self.truth["router.logits"][: self.m]
        runs = self.runs["router.logits"].reshape(STREAM, *truth.shape)
        error = scores_of(runs.reshape(-1, truth.shape[1]), scoring).reshape(runs.shape) - scores_of(truth, scoring)
        return float(np.sqrt(np.mean(error * error)))
