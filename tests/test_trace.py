"""Traces: the first tensor that is wrong for its own inputs, by name. The engine here is plain NumPy, without the reference's code."""

import importlib.util
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from leadline.golden.checkpoint_make import make
from leadline.golden.cli import main
from leadline.golden.safetensor_file import Reader, Writer
from leadline.golden.trace_check import Checked, Checker, check
from leadline.golden.trace_drift import Drift
from leadline.golden.trace_names import names_of, read_trace
from leadline.golden.trace_plot import html, lines, show
from leadline.golden.trace_weights import Weights
from leadline.ref import Config
from leadline.ref.model import model_fwd
from leadline.ref.names import shapes
from rich.console import Console

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_attention_heads": 3,
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "vocab_size": 61,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "n_routed_experts": 16,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "num_nextn_predict_layers": 0,
}
V3 = replace(Config.preset("v3"), **SIZES)
V2 = replace(Config.preset("v2"), **{**SIZES, "q_lora_rank": None})
IDS = [7, 3, 44, 60, 0, 12, 3, 3, 29, 51, 18, 5, 33]
Arrays = dict[str, np.ndarray]


def bf16(x: np.ndarray) -> np.ndarray:
    """To nearest, ties to even"""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def weights_of(config: Config, seed: int = 1) -> Arrays:
    """bf16 numbers. Embeddings are small, so that eps is seen; the last layer's biases are below -1, so that what masks with 0 is, too."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in shapes(config).items():
        x = rng.standard_normal(shape)
        if name.endswith("e_score_correction_bias"):
            found[name] = (0.2 * x - 1.5 * (f"layers.{config.num_hidden_layers - 1}" in name)).astype(np.float32)
            continue
        x = 1 + 0.1 * x if len(shape) == 1 else x * (0.02 if "embed" in name else shape[1] ** -0.5)
        found[name] = bf16(x.astype(np.float32))
    return found


class Engine:
    """A model in float32, every tensor of the trace passed through `store`. `bug` names what it does wrong, in layer `at`."""

    def __init__(
        self,
        config: Config,
        weights: Mapping[str, np.ndarray],
        store: Callable[[np.ndarray], np.ndarray],
        bug: str = "",
        at: int = 0,
        force: Mapping[int, tuple[int, int]] | None = None,
    ):
        self.c, self.w, self.store, self.bug, self.at = config, weights, store, bug, at
        self.force = force or {}  # of a token: the expert that another takes the place of
        self.seen: Arrays = {}

    def wrong(self, layer: int, bug: str) -> bool:
        return self.bug == bug and layer == self.at

    def see(self, name: str, x: np.ndarray) -> np.ndarray:
        self.seen[name] = self.store(np.asarray(x, np.float32))
        return self.seen[name]

    def norm(self, x: np.ndarray, weight: str, eps: float) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * self.w[weight]

    def rope(self, x: np.ndarray, layer: int) -> np.ndarray:
        """Pairs (2i, 2i+1), angles by YaRN, in float64"""
        c, r = self.c, x.shape[-1]
        i = np.arange(r // 2)
        f = c.rope_theta ** (-2 * i / r)
        turns = c.original_max_position_embeddings / (2 * np.pi)
        low, high = (r * np.log(turns / beta) / (2 * np.log(c.rope_theta)) for beta in (c.beta_fast, c.beta_slow))
        low, high = max(np.floor(low), 0), min(np.ceil(high), r - 1)
        ramp = np.clip((i - low) / max(high - low, 0.001), 0, 1)
        angle = np.arange(len(x))[:, None] * (f * (1 - ramp) + f / c.factor * ramp)
        cos, sin = (v.astype(np.float32)[:, None, :] for v in (np.cos(angle), np.sin(angle)))
        y = np.empty_like(x)
        if self.wrong(layer, "neox"):
            a, b = x[..., : r // 2], x[..., r // 2 :]
            return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
        a, b = x[..., 0::2], x[..., 1::2]
        y[..., 0::2], y[..., 1::2] = a * cos - b * sin, a * sin + b * cos
        if self.bug == "halves":
            return np.concatenate([y[..., 0::2], y[..., 1::2]], axis=-1)
        return y

    def attention(self, x: np.ndarray, i: int) -> np.ndarray:
        c, p, n, name = self.c, f"model.layers.{i}.self_attn.", len(x), f"layer.{i}.attn."
        store, dn = self.store, self.c.qk_nope_head_dim
        if c.q_lora_rank is None:
            q = store(x @ self.w[p + "q_proj.weight"].T)
        else:
            q = store(
                store(self.norm(store(x @ self.w[p + "q_a_proj.weight"].T), p + "q_a_layernorm.weight", 1e-6))
                @ self.w[p + "q_b_proj.weight"].T
            )
        q = q.reshape(n, c.num_attention_heads, -1)
        q = self.see(name + "q", np.concatenate([q[..., :dn], self.rope(q[..., dn:], i)], axis=-1))
        kv = store(x @ self.w[p + "kv_a_proj_with_mqa.weight"].T)
        c_kv = self.see(name + "c_kv", self.norm(kv[:, : c.kv_lora_rank], p + "kv_a_layernorm.weight", 1e-6))
        k_pe = self.see(name + "k_pe", self.rope(kv[:, None, c.kv_lora_rank :], i)[:, 0])
        up = store(c_kv @ self.w[p + "kv_b_proj.weight"].T).reshape(n, c.num_attention_heads, -1)
        k = np.concatenate([up[..., :dn], np.repeat(k_pe[:, None], c.num_attention_heads, axis=1)], axis=-1)
        m = 1.0 if self.wrong(i, "scale") else 0.1 * c.mscale_all_dim * np.log(c.factor) + 1
        z = np.einsum("shk,thk->hst", q, k) * np.float32(k.shape[-1] ** -0.5 * m * m)
        z = np.where(np.tril(np.ones((n, n), bool)), z, -np.inf)
        z = np.exp(z - z.max(-1, keepdims=True))
        o = np.einsum("hst,thv->shv", store(z / z.sum(-1, keepdims=True)), up[..., dn:])
        o = self.see(name + "o", o)
        return self.see(name + "out", o.reshape(n, -1) @ self.w[p + "o_proj.weight"].T)

    def mlp(self, x: np.ndarray, p: str, swapped: bool = False) -> np.ndarray:
        g, u, d = (self.w[f"{p}{part}_proj.weight"] for part in ("gate", "up", "down"))
        g, u = (u, g) if swapped else (g, u)
        gate, up = self.store(x @ g.T), self.store(x @ u.T)
        return self.store(gate / (1 + np.exp(-gate)) * up) @ d.T

    def experts(self, x: np.ndarray, i: int) -> np.ndarray:
        c, p, name, e = self.c, f"model.layers.{i}.mlp.", f"layer.{i}.", self.c.n_routed_experts
        logits = self.see(name + "router.logits", x @ self.w[p + "gate.weight"].T)
        if c.topk_method == "noaux_tc":
            s = 1 / (1 + np.exp(-logits))
            t = s if self.wrong(i, "bias") else s + self.w[p + "gate.e_score_correction_bias"]
        else:
            s = np.exp(logits - logits.max(-1, keepdims=True))
            t = s = s / s.sum(-1, keepdims=True)
        groups = np.sort(t.reshape(len(x), c.n_group, -1), axis=-1)
        best = groups[..., -2:].sum(-1) if c.topk_method == "noaux_tc" else groups[..., -1]
        kept = np.argsort(-best, axis=-1, kind="stable")[:, : c.topk_group]
        inside = np.any(kept[:, :, None] == np.arange(e) // (e // c.n_group), axis=1)
        t = np.where(inside, t, 0.0 if self.wrong(i, "mask") else -np.inf)
        idx = np.argsort(-t, axis=-1, kind="stable")[:, : c.num_experts_per_tok]
        for token, (instead, taken) in self.force.items():
            idx[token] = np.where(idx[token] == instead, taken, idx[token])
        weight = np.take_along_axis(s, idx, axis=-1)
        if c.norm_topk_prob:
            weight = weight / weight.sum(-1, keepdims=True)
        later = self.bug == "scale later"
        weight = weight if later else weight * np.float32(c.routed_scaling_factor)
        self.seen[name + "router.topk_idx"] = idx
        weight = self.see(name + "router.topk_weight", weight)
        y = np.zeros_like(x)
        for n, row in enumerate(x):
            for k in range(idx.shape[1]):
                y[n] += weight[n, k] * self.store(self.mlp(row[None], f"{p}experts.{idx[n, k]}."))[0]
        shared = self.mlp(x, p + "shared_experts.") * np.float32(1 / c.routed_scaling_factor if self.wrong(i, "shared") else 1)
        if self.bug == "fused":
            self.seen[name + "router.topk_idx"] = np.concatenate([idx, np.full_like(idx[:, :1], e)], axis=1)
            self.seen[name + "router.topk_weight"] = np.concatenate([weight, np.ones_like(weight[:, :1])], axis=1)
            return self.see(name + "mlp.out", self.see(name + "experts.out", y + self.store(shared)))
        y = self.see(name + "experts.out", y)
        y = y * np.float32(c.routed_scaling_factor) if later else y
        return self.see(name + "mlp.out", y + self.see(name + "shared.out", shared))

    def run(self, ids: list[int]) -> Arrays:
        c = self.c
        x = self.see("embed", self.w["model.embed_tokens.weight"][ids])
        for i in range(c.num_hidden_layers):
            p, name = f"model.layers.{i}.", f"layer.{i}."
            eps = 1e-5 if self.wrong(i, "eps") else c.rms_norm_eps
            u = self.see(name + "mid", x + self.attention(self.see(name + "attn.norm", self.norm(x, p + "input_layernorm.weight", eps)), i))
            h = self.see(name + "mlp.norm", self.norm(u, p + "post_attention_layernorm.weight", c.rms_norm_eps))
            if i < c.first_k_dense_replace:
                y = self.see(name + "mlp.out", self.mlp(h, p + "mlp.", self.wrong(i, "swapped")))
            else:
                y = self.experts(h, i)
            if self.wrong(i, "one token"):
                y[len(ids) // 2] *= np.float32(1.02)
            x = self.see(name + "output", u + y)
        hidden = self.see("norm", self.norm(x, "model.norm.weight", c.rms_norm_eps))
        self.see("logits", hidden @ self.w["lm_head.weight"].T)
        return self.seen


def dump(path: Path, tensors: Mapping[str, np.ndarray], precision: str = "fp32", ids: list[int] = IDS, **about: Any) -> Path:
    """The recipe: a safetensors file and trace.json. bf16 is written as float32 carries it."""
    path.mkdir(exist_ok=True)
    kinds = {"f": "F32", "i": "I64"}
    with Writer(path / "trace.safetensors", [(n, kinds[x.dtype.kind], x.shape) for n, x in tensors.items()]) as file:
        for name, x in tensors.items():
            file.write(name, x)
    (path / "trace.json").write_text(
        json.dumps({"schema": "leadline.trace/1", "engine": "plain", "precision": precision, "ids": ids, **about})
    )
    return path


def traced(
    path: Path, bug: str = "", at: int = 0, precision: str = "fp32", config: Config = V3, ids: list[int] = IDS, **options: Any
) -> Checked:
    weights = weights_of(config)
    store = bf16 if precision == "bf16" else np.asarray
    tensors = Engine(config, weights, store, bug, at).run(ids)
    about = {"absent": {"shared.out": "fused"}} if bug == "fused" else {}
    return check(read_trace(dump(path, tensors, precision, ids, **about), config), weights, config, **options)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", [V3, V2], ids=["v3", "v2"])
def test_a_right_engine_passes_everywhere_and_drifts_no_further_than_correct_arithmetic(
    tmp_path: Path, config: Config, precision: str
) -> None:
    report = traced(tmp_path / "run", precision=precision, config=config)
    assert [(r.name, r.reason) for r in report.wrong] == []
    assert [r.name for r in report.results] == [n.name if i is None else f"layer.{i}.{n.name}" for i, n in names_of(config)]
    assert all(r.verdict == "PASS" for r in report.results)
    assert [r.name for r in report.results if r.beyond] == []
    drift = next(r.drift for r in report.results if r.name == "logits")
    assert drift is not None
    assert (1e-8 if precision == "fp32" else 1e-4) < drift < (1e-5 if precision == "fp32" else 0.1)
    assert report.exit_status == 0


def test_a_single_token_and_other_ways_to_lie_are_taken(tmp_path: Path) -> None:
    """A leading axis of 1, heads side by side, the last token's logits alone."""
    assert traced(tmp_path / "one", ids=[5]).verdict == "PASS"
    weights = weights_of(V3)
    tensors = Engine(V3, weights, np.asarray).run(IDS)
    lying = {n: x.reshape(len(IDS), -1) if n.endswith((".q", ".o")) else x[None] for n, x in tensors.items()}
    report = check(read_trace(dump(tmp_path / "run", {**lying, "logits": tensors["logits"][-1:]}), V3), weights, V3)
    assert [(r.name, r.reason) for r in report.wrong] == []
    assert report.results[-1].tokens == 1
    report = check(read_trace(dump(tmp_path / "bad", {**lying, "logits": tensors["logits"][-2:-1]}), V3), weights, V3)
    assert [r.name for r in report.wrong] == ["logits"]


PLANTED = [  # what the engine does, in which layer, the tensor to blame, what the catalogue calls it
    ("mask", 2, "layer.2.router.topk_idx", "group-mask-zero"),
    ("bias", 1, "layer.1.router.topk_idx", "bias-ignored"),
    ("scale", 1, "layer.1.attn.o", "yarn-mscale-missing"),
    ("neox", 2, "layer.2.attn.q", "rope-neox-on-interleaved"),
    ("eps", 0, "layer.0.attn.norm", "rmsnorm-eps-hardcoded"),
    ("shared", 2, "layer.2.shared.out", "shared-expert-inv-scaled"),
    ("swapped", 0, "layer.0.mlp.out", "swiglu-gate-up-swapped"),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("bug", "at", "tensor", "id"), PLANTED, ids=[p[0] for p in PLANTED])
def test_a_planted_bug_is_found_in_its_layer_and_its_tensor_and_named(
    tmp_path: Path, bug: str, at: int, tensor: str, id: str, precision: str
) -> None:
    report = traced(tmp_path / "run", bug, at, precision, drift=False)
    assert report.wrong[0].name == tensor
    assert report.wrong[0].explanations[0].id == id
    assert {r.layer for r in report.wrong} == {at}  # what follows is right for its own inputs
    assert report.exit_status == 1


def test_one_wrong_token_of_a_long_prompt_is_found(tmp_path: Path) -> None:
    """Of more than 32 tokens a part goes through the Monte-Carlo runs; the worst are among them."""
    ids = [(7 * i * i + 3) % 61 for i in range(75)]
    right = traced(tmp_path / "right", ids=ids)
    assert [(r.name, r.reason) for r in right.wrong] == []
    assert max(r.tokens for r in right.results if r.name.endswith(("mlp.out", "attn.q"))) < 30
    wrong = traced(tmp_path / "wrong", "one token", 1, ids=ids)
    assert [r.name for r in wrong.wrong] == ["layer.1.mlp.out"]
    assert "layer.1.mlp.out[37, " in wrong.wrong[0].reason


@pytest.mark.parametrize(
    ("bug", "said"),
    [
        ("halves", {"q_layout half": "layer.0.attn.q", "k_layout half": "layer.0.attn.k_pe"}),
        ("scale later", {"routed_scale where both experts are added": "layer.1.router.topk_weight"}),
        ("fused", {"experts with the shared ones": "layer.1.experts.out"}),
    ],
)
def test_a_convention_is_named_and_no_failure(tmp_path: Path, bug: str, said: dict[str, str]) -> None:
    report = traced(tmp_path / "run", bug)
    assert [(r.name, r.reason) for r in report.wrong] == []
    found = {k: v for k, v in report.conventions.items() if k in said}
    assert set(found) == set(said)
    assert not any(r.beyond for r in report.results)


def test_what_is_absent_is_computed_and_the_next_tensor_answers_for_it(tmp_path: Path) -> None:
    weights = weights_of(V3)
    gone = {"attn.q": "inside a kernel", "attn.o": "inside a kernel", "shared.out": "fused", "mlp.norm": "fused"}

    def judged(bug: str) -> Checked:
        tensors = Engine(V3, weights, np.asarray, bug, 1).run(IDS)
        kept = {n: x for n, x in tensors.items() if n.split(".", 2)[-1] not in gone}
        return check(read_trace(dump(tmp_path / f"run {bug}", kept, absent=gone), V3), weights, V3)

    right = judged("")
    assert [(r.name, r.reason) for r in right.wrong] == []
    assert {r.name.split(".", 2)[-1] for r in right.results if r.verdict == "SKIPPED"} == set(gone)
    assert [r.name for r in judged("scale").wrong] == ["layer.1.attn.out"]
    assert [r.name for r in judged("shared").wrong] == ["layer.1.mlp.out"]


@pytest.mark.parametrize(
    ("tensor", "change", "id", "said"),
    [
        ("embed", lambda x: x * 48**0.5, "constant-factor", "√48 (the width of"),
        ("norm", lambda x: np.roll(x, 1, axis=0), "order", "norm is right but for the order along its axis 0 (row): shifted by -1"),
        ("layer.1.attn.out", lambda x: -x, "sign", "attn.out has the wrong sign everywhere"),
        ("layer.2.experts.out", lambda x: x / 2, "constant-factor", "experts.out is 0.5 (± "),
        ("logits", lambda x: np.where(np.arange(61) < 50, x, 0), "place", "logits is wrong only at"),
    ],
)
def test_what_no_known_bug_explains_is_described(tmp_path: Path, tensor: str, change: Callable, id: str, said: str) -> None:
    weights = weights_of(V3)
    tensors = Engine(V3, weights, np.asarray).run(IDS)
    tensors[tensor] = change(tensors[tensor]).astype(np.float32)
    report = check(read_trace(dump(tmp_path / "run", tensors), V3), weights, V3, drift=False)
    assert report.wrong[0].name == tensor
    assert report.wrong[0].explanations[0].id == id
    assert said in report.wrong[0].explanations[0].text


def test_a_number_that_is_not_finite_fails_there_and_what_it_is_put_into_is_not_judged(tmp_path: Path) -> None:
    weights = weights_of(V3)
    tensors = Engine(V3, weights, np.asarray).run(IDS)
    tensors["layer.1.attn.out"][4, 3] = np.nan
    report = check(read_trace(dump(tmp_path / "run", tensors), V3), weights, V3)
    assert [r.name for r in report.wrong] == ["layer.1.attn.out"]
    assert "layer.1.attn.out[4, 3] is nan" in report.wrong[0].reason
    assert [(r.name, r.verdict) for r in report.results if r.verdict == "SKIPPED"] == [("layer.1.mid", "SKIPPED")]


def test_a_near_tie_may_go_either_way_and_the_truth_follows_the_engine(tmp_path: Path) -> None:
    """The first expert that is left out scores less than the last chosen one by less than float32 can tell: both choices pass, and the
    truth takes the engine's. Of a wider gap the other choice fails."""
    config = replace(V3, num_hidden_layers=2, n_group=1, topk_group=1)
    weights = weights_of(config)
    bias, token = weights["model.layers.1.mlp.gate.e_score_correction_bias"], 5
    logits = Engine(config, weights, np.asarray).run(IDS)["layer.1.router.logits"][token].astype(np.float64)
    s = 1 / (1 + np.exp(-logits))
    *_, last, other = np.argsort(-(s + bias), kind="stable")[: config.num_experts_per_tok + 1]
    for gap, verdict in ((1e-8, "PASS"), (1e-4, "FAIL")):
        bias[other] = np.float32(s[last] + bias[last] - s[other] - gap)
        engine = Engine(config, weights, np.asarray, force={token: (int(last), int(other))})
        report = check(read_trace(dump(tmp_path / verdict, engine.run(IDS)), config), weights, config)
        judged = {r.name: r for r in report.results}
        choice = judged["layer.1.router.topk_idx"]
        assert (choice.verdict, choice.ambiguous) == (verdict, int(verdict == "PASS"))
        assert choice.drift == pytest.approx(1 / len(IDS))
        assert judged["layer.1.router.topk_weight"].verdict == "PASS"  # right for the choice that was made
        assert judged["layer.1.experts.out"].beyond == (verdict == "FAIL")


def test_the_truth_from_the_start_is_the_models(tmp_path: Path) -> None:
    """Step by step as by model_fwd"""
    weights = weights_of(V3)
    checker = Checker(*(read_trace(dump(tmp_path / "run", Engine(V3, weights, np.asarray).run(IDS)), V3), V3), *checker_rest(weights))
    follower = Drift(checker)
    for layer, about in names_of(V3):
        follower.follow(layer, about.name, checker.step(layer, about))
    exact = {k: v.astype(np.float64) for k, v in weights.items()}
    (logits, hidden, _), _ = model_fwd(np.array([IDS]), exact, V3)
    np.testing.assert_allclose(follower.truth["norm"], hidden[0], rtol=1e-10, atol=1e-11)
    np.testing.assert_allclose(follower.truth["logits"], logits[0], rtol=1e-10, atol=1e-11)


def checker_rest(weights: Arrays) -> tuple[Weights, Any]:
    from leadline.golden.precision import PRECISIONS

    return Weights(weights, V3, PRECISIONS["fp32"]), PRECISIONS["fp32"]


# Bad input: one line, exit status 2


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    make(path, V3)
    return path


@pytest.fixture(scope="module")
def recorded(made: Path) -> Arrays:
    found: Arrays = {}
    for file in made.glob("*.safetensors"):
        with Reader(file) as reader:
            for name in reader.entries:
                x = reader.array(name)
                found[name] = (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x.copy()
    return Engine(V3, found, np.asarray).run(IDS)


def renamed(tensors: Arrays, old: str, new: str) -> Arrays:
    return {new if n == old else n: x for n, x in tensors.items()}


BAD: list[tuple[str, Callable[[Arrays], Arrays], dict[str, Any], str]] = [
    (
        "missing",
        lambda t: {n: x for n, x in t.items() if n != "layer.1.attn.c_kv"},
        {},
        r"layer\.1\.attn\.c_kv is missing \(42 of 43 tensors found\); expected \[n,c\] = \[13, 20\], or 'attn\.c_kv' under absent",
    ),
    (
        "misnamed",
        lambda t: renamed(t, "layer.1.attn.c_kv", "layer.1.attn.ckv"),
        {},
        r"trace\.safetensors: layer\.1\.attn\.ckv is no canonical name of this model; did you mean layer\.1\.attn\.c_kv\?",
    ),
    ("a layer too many", lambda t: {**t, "layer.3.mid": t["layer.1.mid"]}, {}, r"layer\.3\.mid is no canonical name of this model"),
    (
        "shape",
        lambda t: {**t, "layer.0.mid": t["layer.0.mid"][:, :5]},
        {},
        r"'layer\.0\.mid' has shape \[13, 5\]; expected \[n,d\] = \[13, 48\]",
    ),
    (
        "dtype",
        lambda t: {**t, "layer.1.router.topk_idx": t["layer.1.router.topk_idx"].astype(np.float32)},
        {},
        r"'layer\.1\.router\.topk_idx' has dtype F32; expected one of I64",
    ),
    (
        "no shared column",
        lambda t: {**t, "layer.1.router.topk_idx": np.zeros((13, 4), np.int64)},
        {},
        r"topk_idx\[0, 3\] is 0; expected 3 columns",
    ),
    ("vocabulary", lambda t: t, {"ids": [*IDS[:-1], 61]}, r"trace\.json: ids\[12\] is 61; expected 0 to 60"),
    ("precision", lambda t: t, {"precision": "bf17"}, r"trace\.json: precision is 'bf17'; expected one of fp64, fp32"),
    ("schema", lambda t: t, {"schema": "x"}, r"schema is 'x'; expected 'leadline\.trace/1'"),
    ("absent", lambda t: t, {"absent": {"logits": ""}}, r"absent names 'logits'; logits must be there"),
    ("field", lambda t: t, {"presicion": "fp32"}, r"unknown field 'presicion'; did you mean 'precision'\?"),
    ("positions", lambda t: t, {"positions": [0, 1]}, r"positions has 2 entries; expected 13"),
]


@pytest.mark.parametrize(("change", "about", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_is_one_line_and_status_2(
    made: Path, recorded: Arrays, tmp_path: Path, change: Callable[[Arrays], Arrays], about: dict[str, Any], message: str
) -> None:
    run = dump(tmp_path / "run", change(recorded), **about)
    result = CliRunner().invoke(main, ["trace", "check", str(made), str(run)])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert re.search(message, result.stderr), result.stderr
    assert not result.stdout


def test_a_trace_without_its_json_and_one_without_tensors_are_refused(made: Path, tmp_path: Path) -> None:
    for path, message in ((tmp_path / "none", "there is no trace.json"), (dump(tmp_path / "empty", {}), "is missing (0 of")):
        result = CliRunner().invoke(main, ["trace", "check", str(made), str(path)])
        assert result.exit_code == 2
        assert message in result.stderr


# What is printed


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Checked:
    return traced(tmp_path_factory.mktemp("trace") / "run", "mask", 2)


def test_the_terminal_names_layer_tensor_and_bug_and_draws_the_drift(masked: Checked) -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: SIM115
    show(masked, console)
    text = console.export_text()
    assert text.startswith("FAIL: ")
    assert "layer.2.router.topk_idx is wrong for its own inputs" in text
    assert "[group-mask-zero]" in text
    assert "mlp.gate, third result (in model.layers.2)" in text
    drifting = [line for line in text.splitlines() if line.startswith(("layer.", "logits"))]
    assert [line.split()[0] for line in drifting[-4:]] == ["layer.0.output", "layer.1.output", "layer.2.output", "logits"]
    assert all(len(line) <= 80 for line in drifting)
    assert drifting[-2].split()[1] == "wrong"


def test_the_json_lines_say_all_of_it(masked: Checked) -> None:
    first, *tensors, total = [json.loads(line) for line in lines(masked)]
    assert first["schema"] == "leadline.trace-report/1"
    assert [t["name"] for t in tensors] == [r.name for r in masked.results]
    (wrong,) = [t for t in tensors if t["verdict"] == "FAIL"]
    assert wrong["explanations"][0]["id"] == "group-mask-zero"
    assert total == {"verdict": "FAIL", "first": "layer.2.router.topk_idx", "conventions": masked.conventions}


def test_the_page_fetches_nothing_and_draws_every_layer(masked: Checked) -> None:
    page = html(masked)
    assert "default-src 'none'" in page
    assert "<script" not in page
    assert page.count("<circle") == V3.num_hidden_layers + 2  # embed has not drifted
    assert page.count('<circle class="wrong"') == 1
    assert not re.search(r"(src|href)=\"(?!https://github\.com)", page)


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_the_picture_is_written(masked: Checked, tmp_path: Path) -> None:
    from leadline.golden.trace_plot import png

    png(masked, tmp_path / "drift.png")
    assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG")


def test_the_names_and_the_recipe_are_printed() -> None:
    names = CliRunner().invoke(main, ["trace", "names", "--json"])
    assert [json.loads(line)["name"] for line in names.stdout.splitlines()][:3] == ["embed", "layer.{i}.attn.norm", "layer.{i}.attn.q"]
    recipe = CliRunner().invoke(main, ["trace", "--help"])
    assert 'save_file(seen, out / "trace.safetensors")' in recipe.stdout


# Hugging Face


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("published") / "model"
    make(path, V3)
    return path


def recorded_by_transformers(model: Path, out: Path, *options: str) -> tuple[int, list[dict[str, Any]]]:
    ids = ",".join(map(str, IDS))
    done = CliRunner().invoke(main, ["trace", "record", str(model), "--ids", ids, "--out", str(out), *options])
    assert done.exit_code == 0, done.stderr
    result = CliRunner().invoke(main, ["trace", "check", str(model), str(out), "--json"])
    assert result.exit_code in (0, 1), result.stderr
    return result.exit_code, [json.loads(line) for line in result.stdout.splitlines()][1:-1]


@pytest.mark.peers("torch", "transformers")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("config", "fp8"), [(V3, False), (V2, False), (V3, True)], ids=["v3", "v2", "v3-fp8"])
def test_transformers_is_right_everywhere(tmp_path: Path, config: Config, fp8: bool, dtype: str) -> None:
    """FP8 weights are dequantised for it."""
    model = tmp_path / "model"
    make(model, config, fp8=fp8)
    status, tensors = recorded_by_transformers(model, tmp_path / "run", "--dtype", dtype)
    assert [(t["name"], t["reason"]) for t in tensors if t["verdict"] != "PASS"] == []
    assert [t["name"] for t in tensors if t["beyond"]] == []
    assert status == 0


def planted_in_transformers() -> Iterator[tuple[str, str]]:
    yield "group-mask-zero", "layer.1.router.topk_idx"  # every layer has it; the first whose scores are negative shows it
    yield "bias-ignored@1", "layer.1.router.topk_idx"
    yield "yarn-mscale-missing@0", "layer.0.attn.o"
    yield "rmsnorm-eps-hardcoded@0", "layer.0.attn.norm"
    yield "shared-expert-inv-scaled@2", "layer.2.shared.out"
    yield "rope-neox-on-interleaved@1", "layer.1.attn.q"


@pytest.mark.peers("torch", "transformers")
@pytest.mark.parametrize(("bug", "tensor"), list(planted_in_transformers()))
def test_a_bug_planted_in_transformers_is_named(published: Path, tmp_path: Path, bug: str, tensor: str) -> None:
    status, tensors = recorded_by_transformers(published, tmp_path / "run", "--plant", bug)
    wrong = [t for t in tensors if t["verdict"] == "FAIL"]
    assert wrong[0]["name"] == tensor
    assert wrong[0]["explanations"][0]["id"] == bug.partition("@")[0]
    assert status == 1


@pytest.mark.peers("torch", "transformers")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ids", "1,61"], r"ids\[1\] is 61; expected 0 to 60"),
        (["--ids", "1,x"], r"--ids is '1,x'; expected integers"),
        (["--ids", "1", "--dtype", "float8"], r"unknown dtype 'float8'; expected one of float32"),
        (["--ids", "1", "--engine", "vllm"], r"unknown engine 'vllm'; expected transformers, or write the trace yourself"),
        (["--ids", "1", "--plant", "nothing"], r"cannot plant 'nothing'; expected one of group-mask-zero"),
        (["--ids", "1", "--plant", "bias-ignored@0"], r"cannot plant 'bias-ignored@0'; there is no gate there"),
        ([], r"expected either --prompt or --ids"),
    ],
)
def test_what_cannot_be_recorded_leaves_nothing(published: Path, tmp_path: Path, options: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["trace", "record", str(published), "--out", str(tmp_path / "run"), *options])
    assert result.exit_code == 2
    assert re.search(message, result.stderr), result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_trace_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from leadline.golden import trace_record

    monkeypatch.setattr(trace_record, "stored", lambda x: ("F32", x))
    with pytest.raises(ValueError, match="'b' is int64"):
        trace_record.write(tmp_path / "run", {"a": np.zeros(3, np.float32), "b": np.zeros(3, np.int64)}, {})
    assert list(tmp_path.iterdir()) == []
    trace_record.write(tmp_path / "run", {"a": np.zeros(3, np.float32)}, {"schema": "x"})
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["trace.json", "trace.safetensors"]
