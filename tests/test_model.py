"""Block, model, MTP and their losses: metamorphic properties, each with a mutant that it kills; streaming; peers; what is refused."""

import dataclasses
import functools
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import leadline.ref.attention as attention
import leadline.ref.block as block_file
import leadline.ref.mtp_loss as mtp_loss_file
import numpy as np
import pytest
from float64 import FP64, Arrays, drawn, near
from leadline.golden.band import DEVIATIONS, SLACK, band_of
from leadline.golden.draw import Source
from leadline.golden.precision import PRECISIONS
from leadline.ref import (
    OPS,
    Config,
    cross_entropy_bwd,
    cross_entropy_fwd,
    embedding_bwd,
    embedding_fwd,
    layer_bwd,
    layer_fwd,
    linear_fwd,
    model_bwd,
    model_fwd,
    stacked_fwd,
)
from leadline.ref.block import EXPERTS, WEIGHTS
from leadline.ref.config import PRESETS
from leadline.ref.model import positions_of
from leadline.ref.model_stacked import layer_of
from leadline.ref.names import MODEL, expert_names, is_dense, layer_names, shapes

SIZES = {
    "num_attention_heads": 3,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "vocab_size": 17,
    "hidden_size": 15,
    "intermediate_size": 11,
    "moe_intermediate_size": 7,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
}


FP32 = PRECISIONS["fp32"]


def within(got: np.ndarray, truth: np.ndarray, sigma: np.ndarray) -> bool:
    """A correct evaluation, against the truth"""
    return bool(np.all(np.abs(got - truth) <= SLACK * DEVIATIONS * sigma))


def small(preset: str = "tiny-v3", **changes: Any) -> Config:
    """A preset at sizes that run in a moment"""
    lora = {} if PRESETS[preset].q_lora_rank is None else {"q_lora_rank": 10}
    return dataclasses.replace(PRESETS[preset], **{**SIZES, **lora, "num_hidden_layers": 3, **changes})


def weights_of(config: Config, key: str = "weights", dtype: Any = np.float64) -> dict[str, np.ndarray]:
    """Random weights by checkpoint names, the MTP layers' among them"""
    found = {}
    for name, shape in shapes(config, mtp=True).items():
        x = Source(f"{key} {name}").normal(shape)
        scale = 0.1 if name.endswith("bias") else shape[1] ** -0.5 if len(shape) > 1 and "embed" not in name else 1.0
        found[name] = (1.0 + 0.2 * x if "norm" in name else scale * x).astype(dtype)
    return found


def normal(key: str, *shape: int) -> np.ndarray:
    return Source(key).normal(shape)


def tokens(key: str, *shape: int, v: int = 17) -> np.ndarray:
    return Source(key).integers(shape, 0, v)


def sigma_of(name: str, way: str, inputs: Arrays, attrs: Mapping[str, Any]) -> Arrays:
    return band_of(OPS[name], way, inputs, attrs, FP64).sigma


@functools.cache
def sigma(name: str, case: str, way: str) -> Arrays:
    """Of a declared case; asked for before a mutant is put in place, it is the reference's."""
    return sigma_of(name, way, *drawn(name, case, way)[1:])


# ---- prefixes, caches, batches


def sees_no_future(case: str) -> bool:
    """A longer prompt does not change earlier logits."""
    op, inputs, attrs = drawn("model", case)
    room, whole = sigma("model", case, "forward"), op.run("forward", inputs, attrs)
    part = op.run("forward", {**inputs, **{name: inputs[name][:, :-1] for name in ("ids", "positions")}}, attrs)
    chosen = np.array_equal(part["topk_idx"], whole["topk_idx"][:, :, :-1])
    return chosen and all(near(part[name], whole[name][:, :-1], room[name][:, :-1]) for name in ("logits", "hidden"))


@pytest.mark.parametrize("case", ["v3", "v2-lite"])
def test_a_prefix_does_not_depend_on_what_follows(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits, hidden states and choices of a prompt are those within a longer one; an attention without a mask is caught."""
    assert sees_no_future(case)
    visible = attention.visible
    monkeypatch.setattr(attention, "visible", lambda xp, s, t, start, stop, causal, *rest: visible(xp, s, t, start, stop, False, *rest))
    assert not sees_no_future(case)


def in_chunks(config: Config, w: Mapping, ids: np.ndarray, cuts: tuple[int, ...], absorbed: bool, moved: bool = True) -> list[np.ndarray]:
    """Logits and hidden states of ids read a chunk at a time"""
    caches, parts = None, []
    for a, z in zip((0, *cuts), (*cuts, ids.shape[1]), strict=True):
        positions = None if moved else np.broadcast_to(np.arange(z - a), (len(ids), z - a))
        (logits, hidden, caches), _ = model_fwd(ids[:, a:z], w, config, positions=positions, caches=caches, absorbed=absorbed, keep=False)
        parts.append((logits, hidden))
    return [np.concatenate(x, axis=1) for x in zip(*parts, strict=True)]


@pytest.mark.parametrize("preset", ["tiny-v3", "tiny-v2-lite"])
def test_reading_with_a_cache_is_reading_at_once(preset: str) -> None:
    """Chunks of 3, 1 and 2 tokens on the latent cache give the logits of all 6 together; positions that start again do not."""
    config = small(preset)
    w, ids = weights_of(config), tokens("cache", 2, 6)
    inputs, attrs = stacked(config, w, ids)
    room = sigma_of("model", "forward", inputs, attrs)
    (logits, hidden, _), _ = model_fwd(ids, w, config)
    for absorbed in (False, True):
        for name, got, want in zip(("logits", "hidden"), in_chunks(config, w, ids, (3, 4), absorbed), (logits, hidden), strict=True):
            assert near(got, want, room[name])
        assert not near(in_chunks(config, w, ids, (3, 4), absorbed, moved=False)[0], logits, room["logits"])


def batches_do_not_matter() -> bool:
    """Each row of a batch by itself: the same outputs, and gradients that add up to the batch's."""
    op, inputs, attrs = drawn("model", "v2", "backward")
    room, out = sigma("model", "v2", "backward"), sigma("model", "v2", "forward")
    whole, grads = op.run("forward", inputs, attrs), op.run("backward", inputs, attrs)
    rows = ("ids", "positions", "dlogits", "dhidden")
    alone = [{**inputs, **{n: inputs[n][i : i + 1] for n in rows}, "topk_idx": inputs["topk_idx"][:, i : i + 1]} for i in range(2)]
    parts, added = [op.run("forward", x, attrs) for x in alone], [op.run("backward", x, attrs) for x in alone]
    same = all(near(np.concatenate([p[n] for p in parts]), whole[n], out[n]) for n in ("logits", "hidden"))
    return same and all(near(added[0][n] + added[1][n], g, room[n]) for n, g in grads.items())


def test_the_batch_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients of a batch are those of its rows; a norm over the whole batch is caught."""
    assert batches_do_not_matter()
    real = block_file.rmsnorm_fwd

    def over_the_batch(x: np.ndarray, weight: np.ndarray, *, eps: float) -> tuple:
        _, (x, weight, rstd, order) = real(x, weight, eps=eps)
        rstd = 0 * rstd + 1 / np.sqrt(np.mean(x * x) + eps)
        return x * rstd * weight, (x, weight, rstd, order)

    monkeypatch.setattr(block_file, "rmsnorm_fwd", over_the_batch)
    assert not batches_do_not_matter()


# ---- packed documents

ENDS = (0, 1, 4, 6)


def packing_does_not_matter(without: tuple[str, ...] = ()) -> bool:
    """Documents packed into one row, against each alone: outputs joined, gradients added"""
    op, inputs, attrs = drawn("model", "packed", "backward")
    out, room = (sigma("model", "packed", way) for way in ("forward", "backward"))
    packed = {name: x for name, x in inputs.items() if name not in without}
    whole, grads = op.run("forward", {k: x for k, x in packed.items() if k != "topk_idx"}, attrs), op.run("backward", packed, attrs)
    parts, added = [], []
    for a, z in itertools.pairwise(ENDS):
        one = {n: x for n, x in inputs.items() if n != "cu_seqlens"} | {"topk_idx": inputs["topk_idx"][:, :, a:z]}
        one |= {n: inputs[n][:, a:z] for n in ("ids", "positions", "dlogits", "dhidden")}
        parts.append(op.run("forward", one, attrs))
        added.append(op.run("backward", one, attrs))
    same = all(near(np.concatenate([p[n] for p in parts], axis=1), whole[n], out[n]) for n in ("logits", "hidden"))
    return same and all(near(np.sum([g[n] for g in added], axis=0), g, room[n]) for n, g in grads.items())


def test_packed_documents_are_separate_ones() -> None:
    """Outputs and gradients of packed documents are those of each alone; without cu_seqlens one attends to another."""
    assert packing_does_not_matter()
    assert not packing_does_not_matter(without=("cu_seqlens",))


def packed_loss_is_separate() -> bool:
    """mtp.loss over packed documents against the sum over each: divided by all tokens, so each counts by its share"""
    op, inputs, attrs = drawn("mtp.loss", "packed", "backward")
    ends, total = inputs["cu_seqlens"], inputs["ids"].shape[1]
    room, out = (sigma("mtp.loss", "packed", way) for way in ("backward", "forward"))
    forward = {k: x for k, x in inputs.items() if k != "topk_idx"}
    loss, grads = op.run("forward", forward, attrs)["loss"], op.run("backward", inputs, attrs)
    summed, added, dh = 0.0, {name: 0 * g for name, g in grads.items() if name != "dh"}, []
    for a, z in itertools.pairwise(ends):
        one = {k: x[:, a:z] if k in ("h", "ids", "positions") else x for k, x in forward.items() if k != "cu_seqlens"}
        one["dloss"] = inputs["dloss"] * ((z - a) / total)
        summed += op.run("forward", one, attrs)["loss"] * ((z - a) / total)
        found = op.run("backward", one, attrs)
        dh.append(found["dh"])
        added = {name: g + found[name] for name, g in added.items()}
    same = near(np.asarray(summed), np.asarray(loss), out["loss"]) and near(np.concatenate(dh, axis=1), grads["dh"], room["dh"])
    return same and all(near(g, grads[name], room[name]) for name, g in added.items())


def test_the_mtp_loss_of_packed_documents_is_that_of_separate_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients; targets in the next document are caught."""
    assert packed_loss_is_separate()
    real = mtp_loss_file.targets_of
    monkeypatch.setattr(mtp_loss_file, "targets_of", lambda labels, cu, k, ignore: real(labels, None, k, ignore))
    assert not packed_loss_is_separate()


# ---- MTP


def without_modules(case: str = "two") -> tuple[Arrays, dict[str, Any]]:
    """A case whose modules are taken away"""
    _, inputs, attrs = drawn("mtp.loss", case, "backward")
    stacked = {t.name for t in OPS["mtp.loss"].inputs if t.dims[:1] == ("p",)} | {"topk_idx"}
    return {name: x[:0] if name in stacked else x for name, x in inputs.items()}, attrs


def disappears(inputs: Arrays, attrs: Mapping[str, Any]) -> bool:
    """Loss and gradients are zeros of the inputs' shapes."""
    op = OPS["mtp.loss"]
    loss, grads = op.run("forward", inputs, attrs)["loss"], op.run("backward", inputs, attrs)
    shaped = all(g.shape == inputs[name[1:]].shape for name, g in grads.items())
    return shaped and loss == 0 and all(not np.any(g) for g in grads.values())


def test_mtp_of_depth_0_disappears() -> None:
    """Without modules the loss is 0, and so is every gradient; one module is enough for neither to be."""
    inputs, attrs = without_modules()
    assert disappears(inputs, attrs)
    assert OPS["mtp.loss"].run("forward", inputs, attrs)["topk_idx"].shape == (0, 1, 5, 3)
    assert not disappears(*drawn("mtp.loss", "v3", "backward")[1:])


def chained(inputs: Arrays, attrs: Mapping[str, Any], rows: int = 0) -> float:
    """mtp.loss of a case without labels, made of mtp and cross_entropy; `rows` is what each term is divided by if not by all tokens"""
    op, own = OPS["mtp"], [t.name for t in OPS["mtp.loss"].inputs if t.dims[:1] == ("p",) and t.name in inputs]
    h, ids, total, how = inputs["h"], inputs["ids"], 0.0, {k: v for k, v in attrs.items() if k in op.attrs}
    (b, s), p = ids.shape, len(inputs["enorm"])
    for k in range(1, p + 1):
        arrays = {name: inputs[name][k - 1] for name in own} | {n: inputs[n] for n in ("embed_tokens", "shared_head")}
        arrays |= {"h": h[:, : s - k], "ids": ids, "positions": inputs["positions"][:, : s - k]}
        out = op.run("forward", arrays, {**how, "depth": k})
        h, logits = out["h_next"], out["logits"][:, : s - k - 1]
        nll, _ = cross_entropy_fwd(logits.reshape(-1, logits.shape[2]), ids[:, k + 1 :].reshape(-1))
        total += float(nll) * logits.shape[0] * logits.shape[1] / (rows or b * s)
    return attrs.get("weight", 0.3) / p * total


@pytest.mark.parametrize("case", ["v3", "pre-norm"])
def test_the_loss_is_a_chain_of_modules(case: str) -> None:
    """L = λ/D Σ_k L_k, each divided by T, of mtp at depth k; divided by T - k it is another number."""
    op, inputs, attrs = drawn("mtp.loss", case)
    loss, room = np.asarray(op.run("forward", inputs, attrs)["loss"]), sigma("mtp.loss", case, "forward")["loss"]
    assert near(np.asarray(chained(inputs, attrs)), loss, room)
    assert not near(np.asarray(chained(inputs, attrs, rows=inputs["ids"].size - 1)), loss, room)


def test_concatenation_orders_are_column_halves_exchanged() -> None:
    """[embedding; hidden] with eh_proj is [hidden; embedding] with its halves exchanged, and only then."""
    op, inputs, attrs = drawn("mtp", "v3")
    room, d = sigma("mtp", "v3", "forward"), inputs["h"].shape[2]
    turned = {**inputs, "eh_proj": np.roll(inputs["eh_proj"], d, axis=1)}
    for given, same in ((turned, True), (inputs, False)):
        found = op.run("forward", given, {**attrs, "concat": "hidden_first"})
        assert near(found["logits"], op.run("forward", inputs, attrs)["logits"], room["logits"]) == same


def test_a_detached_head_has_no_gradient_and_changes_no_other() -> None:
    """detach_head: zeros for embedding and head; every other gradient to the bit."""
    op, inputs, attrs = drawn("mtp.loss", "two", "backward")
    plain, detached = (op.run("backward", inputs, {**attrs, "detach_head": value}) for value in (False, True))
    for name, g in plain.items():
        shared = name in ("dembed_tokens", "dshared_head")
        np.testing.assert_array_equal(detached[name], 0 * g if shared else g)
        assert np.any(g) or not shared


# ---- the two ways to write one model


def stacked(config: Config, w: Mapping[str, np.ndarray], ids: np.ndarray, positions: np.ndarray | None = None) -> tuple[Arrays, dict]:
    """A checkpoint's model as inputs and attributes of the op"""
    rows: dict[str, list] = {}
    for i in range(config.num_hidden_layers):
        for key, name in layer_names(config, i).items():
            rows.setdefault(key, []).append(w[name])
        if not is_dense(config, i):
            found = zip(*([w[name] for name in expert_names(i, e)] for e in range(config.n_routed_experts)), strict=True)
            for key, each in zip(("w_gate", "w_up", "w_down"), found, strict=True):
                rows.setdefault(key, []).append(np.stack(each))
    inputs = {key: np.stack(each) for key, each in rows.items()} | {key: w[name] for key, name in MODEL.items()}
    places = np.broadcast_to(np.arange(ids.shape[1]), ids.shape).copy() if positions is None else positions
    return inputs | {"ids": ids, "positions": places}, config.block()


@pytest.mark.parametrize("preset", ["tiny-v3", "tiny-v2-lite"])
def test_by_names_and_stacked_are_one_model(preset: str) -> None:
    """Logits, hidden states and every gradient by checkpoint names are those of the op; gate and up exchanged are not."""
    config = small(preset)
    w, ids = weights_of(config), tokens("one model", 2, 4)
    inputs, attrs = stacked(config, w, ids)
    d = {"dlogits": normal("dlogits", 2, 4, 17), "dhidden": normal("dhidden", 2, 4, 15)}
    (logits, hidden, _), saved = model_fwd(ids, w, config)
    grads = model_bwd(d["dlogits"], d["dhidden"], saved)
    out = OPS["model"].run("forward", inputs, attrs)
    want = OPS["model"].run("backward", {**inputs, **d, "topk_idx": out["topk_idx"]}, attrs)
    room = sigma_of("model", "backward", {**inputs, **d, "topk_idx": out["topk_idx"]}, attrs)
    np.testing.assert_array_equal(logits, out["logits"])
    np.testing.assert_array_equal(hidden, out["hidden"])
    assert set(grads) == {name for name in shapes(config) if not name.endswith("bias")}
    own, _ = stacked(config, grads | {name: x for name, x in w.items() if name.endswith("bias")}, ids)
    for name, g in want.items():
        assert near(own[name[1:]], g, room[name]), name
    assert not near(own["w_gate"], want["dw_up"], room["dw_up"])


def test_a_layer_by_names_is_a_block() -> None:
    """layer_fwd and layer_bwd of each layer are block's on that layer's weights, the cache what mla.prefill adds to it."""
    config = small()
    w, ids = weights_of(config), tokens("layer", 1, 4)
    inputs, attrs = stacked(config, w, ids)
    x, dy = normal("x", 1, 4, 15), normal("dy", 1, 4, 15)
    for i in range(config.num_hidden_layers):
        dense = is_dense(config, i)
        arrays = dict(zip(WEIGHTS, layer_of({name: inputs.get(name) for name in WEIGHTS}, i, 1), strict=True))
        given = {"x": x, "positions": inputs["positions"], **{name: a for name, a in arrays.items() if a is not None}}
        how = {**attrs, "num_experts_per_tok": 0} if dense else attrs
        out = OPS["block"].run("forward", given, how)
        (y, cache, idx), saved = layer_fwd(x, inputs["positions"], w, i, config)
        np.testing.assert_array_equal(y, out["y"])
        assert (idx is None) == dense
        assert dense or np.array_equal(idx, out["topk_idx"])
        assert [part.shape for part in cache] == [(1, 4, 12), (1, 4, 4)]
        dx, grads = layer_bwd(dy, saved)
        want = OPS["block"].run("backward", {**given, "dy": dy, "topk_idx": out["topk_idx"]}, how)
        room = sigma_of("block", "backward", {**given, "dy": dy, "topk_idx": out["topk_idx"]}, how)
        assert near(dx, want["dx"], room["dx"])
        for key, name in layer_names(config, i).items():
            assert name in grads or key == EXPERTS[1]
            assert name not in grads or near(grads[name], want[f"d{key}"], room[f"d{key}"]), name


def test_packed_by_names_and_replayed() -> None:
    """cu_seqlens by names: positions begin again in each document, an empty one too; a choice that is given back changes nothing."""
    config = small()
    w, ids, ends = weights_of(config), tokens("packed names", 1, 5), np.array([0, 2, 2, 5])
    np.testing.assert_array_equal(positions_of(ids, 0, ends), [[0, 1, 0, 1, 2]])
    np.testing.assert_array_equal(positions_of(ids, 7), [[7, 8, 9, 10, 11]])
    (logits, _, caches), _ = model_fwd(ids, w, config, cu_seqlens=ends)
    inputs, attrs = stacked(config, w, ids, np.array([[0, 1, 0, 1, 2]]))
    out = OPS["model"].run("forward", {**inputs, "cu_seqlens": ends}, attrs)
    np.testing.assert_array_equal(logits, out["logits"])
    assert [part.shape for part in caches[0]] == [(1, 5, 12), (1, 5, 4)]
    (again, _, _), _ = model_fwd(ids, w, config, cu_seqlens=ends, topk_idx=out["topk_idx"])
    np.testing.assert_array_equal(again, logits)
    (other, _, _), _ = model_fwd(ids, w, config, cu_seqlens=ends, topk_idx=out["topk_idx"][::-1])
    assert not np.array_equal(other, logits)


def test_naive_is_absorbed() -> None:
    """The model's outputs and gradients with W_UK and W_UV folded; a folded weight of another head shows."""
    for case in ("v3", "v2-lite"):
        op, inputs, attrs = drawn("model", case, "backward")
        for way in ("forward", "backward"):
            room, want = sigma("model", case, way), op.run(way, inputs, attrs)
            for name, got in op.run(way, inputs, {**attrs, "absorbed": True}).items():
                assert name == "topk_idx" or near(got, want[name], room[name]), name
    turned = {**inputs, "kv_b_proj": np.roll(inputs["kv_b_proj"], 1, axis=1)}
    assert not near(op.run("backward", turned, {**attrs, "absorbed": True})["dnorm"], want["dnorm"], room["dnorm"])


# ---- streaming


class Watched(Mapping):
    """Weights that are made anew at each read: what was read, and how many experts' arrays were alive at once"""

    def __init__(self, weights: Mapping[str, np.ndarray]):
        self.weights, self.read, self.alive, self.most = weights, [], weakref.WeakValueDictionary(), 0

    def __getitem__(self, name: str) -> np.ndarray:
        self.read.append(name)
        x = self.weights[name].copy()
        if ".experts." in name:
            self.alive[name] = x
            self.most = max(self.most, len(self.alive))
        return x

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def test_the_streamed_model_is_the_resident_one() -> None:
    """keep=False gives the same bits and caches, reads each weight once and only the experts that were chosen, one at a time, and keeps
    none; keep=True has many alive."""
    config = small(n_routed_experts=16, num_experts_per_tok=2)
    w, ids = weights_of(config), tokens("stream", 1, 3)
    (logits, hidden, caches), saved = model_fwd(ids, w, config)
    held = Watched(w)
    (again, _, _), kept = model_fwd(ids, held, config)
    streamed = Watched(w)
    (got, states, found), nothing = model_fwd(ids, streamed, config, keep=False)
    assert nothing is None
    np.testing.assert_array_equal(got, logits)
    np.testing.assert_array_equal(again, logits)
    np.testing.assert_array_equal(states, hidden)
    for a, b in zip(found, caches, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert len(streamed.read) == len(set(streamed.read))
    chosen = {name for name in streamed.read if ".experts." in name}
    assert 0 < len(chosen) < sum(".experts." in name for name in shapes(config))
    assert (streamed.most, len(streamed.alive)) == (3, 0)
    assert held.most == len(chosen) == len(held.alive)
    grads = model_bwd(np.ones_like(logits), np.zeros_like(hidden), kept)
    for name in shapes(config):
        if ".experts." in name:
            assert np.any(grads[name]) == (name in chosen)
            assert grads[name].shape == w[name].shape
    assert saved is not None


def test_a_missing_weight_is_an_error() -> None:
    """A checkpoint without a shared expert's tensor: the mapping's own KeyError, not a model without it"""
    config = small()
    w = weights_of(config)
    del w["model.layers.1.mlp.shared_experts.up_proj.weight"], w["model.layers.2.mlp.gate.e_score_correction_bias"]
    for name in ("shared_experts.up_proj", "e_score_correction_bias"):
        with pytest.raises(KeyError, match=name):
            model_fwd(tokens("missing", 1, 2), w, config, keep=False)
        w["model.layers.1.mlp.shared_experts.up_proj.weight"] = np.zeros((7, 15))


def test_a_weight_may_multiply_in_its_own_way() -> None:
    """A weight with __linear__ is asked for the product, wherever the model multiplies by it as a matrix."""

    class Doubled(np.ndarray):
        def __linear__(self, x: np.ndarray) -> np.ndarray:
            return 2 * (x @ np.asarray(self).T)

    x, weight = normal("x", 3, 5), normal("w", 4, 5)
    np.testing.assert_array_equal(linear_fwd(x, weight.view(Doubled))[0], 2 * (x @ weight.T))
    config = small()
    w, ids = weights_of(config), tokens("hook", 1, 3)
    name = "model.layers.1.mlp.shared_experts.up_proj.weight"
    twice = model_fwd(ids, {**w, name: 2 * w[name]}, config)[0][0]
    np.testing.assert_array_equal(model_fwd(ids, {**w, name: w[name].view(Doubled)}, config)[0][0], twice)


# ---- losses and embedding


def test_cross_entropy_does_as_torch_does() -> None:
    """Loss and gradient, ignored rows, none that count (NaN, gradient 0), logits near ±1e4."""
    torch = pytest.importorskip("torch")
    for case in OPS["cross_entropy"].cases:
        op, inputs, attrs = drawn("cross_entropy", case.name, "backward")
        if attrs.get("denominator") == "rows" or attrs.get("empty") == "zero":
            continue
        z = torch.tensor(inputs["logits"], requires_grad=True)
        loss = torch.nn.functional.cross_entropy(z, torch.tensor(inputs["labels"]), ignore_index=attrs.get("ignore_index", -100))
        loss.backward(torch.tensor(inputs["dloss"]))
        for way, name, theirs in (("forward", "loss", loss.detach()), ("backward", "dlogits", z.grad)):
            assert near(theirs.numpy(), np.asarray(op.run(way, inputs, attrs)[name]), sigma("cross_entropy", case.name, way)[name])
    z = torch.ones((2, 3), dtype=torch.float64, requires_grad=True)
    torch.nn.functional.cross_entropy(z, torch.tensor([-100, -100])).backward()
    loss, saved = cross_entropy_fwd(np.ones((2, 3)), np.array([-100, -100]))
    assert np.isnan(loss)
    np.testing.assert_array_equal(cross_entropy_bwd(np.ones(()), saved), z.grad.numpy())


def test_a_whole_vocabulary_is_embedded() -> None:
    """V3's 129,280 tokens: rows taken to the bit, each gradient the sum over its token's places, 0 elsewhere."""
    v, ids = 129280, tokens("vocabulary", 300, v=129280) // np.array([1, 1000])[np.arange(300) % 2]
    weight, dx = normal("table", v, 3).astype(np.float32), normal("dx", 300, 3)
    x, saved = embedding_fwd(ids, weight)
    np.testing.assert_array_equal(x, weight[ids])
    want = np.zeros((v, 3))
    np.add.at(want, ids, dx)
    got = embedding_bwd(dx, saved)
    size = np.zeros((v, 3))
    np.add.at(size, ids, np.abs(dx))
    assert np.all(np.abs(got - want) <= 300 * 2.0**-53 * size)  # two orders of one sum of at most 300 terms


# ---- names and sizes


@pytest.mark.parametrize(("preset", "millions"), [("v3", 684489.845504), ("v2", 235741.434880), ("v2-lite", 15706.484224)])
def test_the_released_models_have_their_number_of_parameters(preset: str, millions: float) -> None:
    """685 B with the MTP layer's copies of embedding and head, 236 B, 15.7 B, as published"""
    assert sum(np.prod(shape, dtype=np.int64) for shape in shapes(PRESETS[preset], mtp=True).values()) == millions * 10**6


def test_tiny_presets_are_small_and_no_two_of_their_matrices_fit_each_other() -> None:
    """Under 20 MB in float32; a weight exchanged with another or transposed is refused for its shape, but gate for up."""
    for name, config in PRESETS.items():
        if not name.startswith("tiny"):
            continue
        config.check(name)
        sizes = shapes(config, mtp=True)
        assert sum(np.prod(shape) for shape in sizes.values()) * 4 < 20e6
        alike: dict[tuple, set] = {}
        for i in range(config.num_hidden_layers + 1):
            for key, tensor in layer_names(config, i).items():
                shape = sizes.get(tensor, ())
                if len(shape) == 2:
                    alike.setdefault(tuple(sorted(shape)), set()).add(key.removeprefix("shared_").removesuffix("_proj"))
        allowed = ({"gate", "up", "down"}, {"embed_tokens", "head"})
        assert all(len(keys) == 1 or any(keys <= pair for pair in allowed) for keys in alike.values()), name


# ---- what is refused

CONFIG = small()


def refusing(name: str, case: str, attrs: Mapping[str, Any] | None = None, **change: Any) -> Callable[[], Any]:
    op, inputs, own = drawn(name, case)
    changed = {key: change[key](inputs.get(key)) if callable(change.get(key)) else change[key] for key in change}
    return lambda: op.run("forward", {**inputs, **changed}, {**own, **(attrs or {})})


REFUSED = {
    "label": (refusing("cross_entropy", "one", labels=np.array([5])), r"cross_entropy: labels\[0\] is 5; expected 0 to 4"),
    "negative label": (refusing("cross_entropy", "one", labels=np.array([-1])), r"labels\[0\] is -1"),
    "no vocabulary": (refusing("cross_entropy", "one", logits=np.zeros((1, 0))), "vocabulary of 0"),
    "id": (refusing("embedding", "one", ids=np.array([4])), r"embedding: ids\[0\] is 4; expected 0 to 3"),
    "negative id": (refusing("embedding", "one", ids=np.array([-1])), r"ids\[0\] is -1"),
    "model id": (refusing("model", "v3", ids=lambda x: x + 17), r"model: ids\[0, 0\] is \d+; expected 0 to 16"),
    "heights": (refusing("model", "v3", w_gate=lambda x: x[:1]), r"model: w_gate has shape \(1, 8, 3, 11\); expected m = 2"),
    "layers": (
        refusing("model", "v3", **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), lambda x: x[:0])),
        "0 dense feed-forward networks and 2 of experts; expected 3",
    ),
    "two kinds": (refusing("block", "v3", gate_proj=np.zeros((8, 11))), "block: the feed-forward network has gate_proj, gate_weight"),
    "neither kind": (refusing("block", "v3-dense", up_proj=lambda x: None), "has gate_proj, down_proj; expected gate_proj"),
    "dense choice": (refusing("block", "v3-dense", {"num_experts_per_tok": 2}), "num_experts_per_tok is 2 in a dense layer; expected 0"),
    "one cache": (refusing("block", "chunk", k_pe_cache=lambda x: None), "k_pe_cache is missing"),
    "few ids": (refusing("mtp", "v3", {"depth": 2}), "mtp: ids has 4 tokens, depth is 2; expected 3"),
    "negative depth": (refusing("mtp", "v3", {"depth": -1}), "depth is -1"),
    "mtp id": (refusing("mtp", "v3", ids=lambda x: x + 17), r"mtp: ids\[0, 0\] is"),
    "eh_proj": (refusing("mtp", "v3", eh_proj=lambda x: x[:, 1:]), r"mtp: eh_proj has shape \(11, 21\); expected 22"),
    "loss label": (refusing("mtp.loss", "masked", labels=lambda x: x + 17), r"mtp.loss: labels\[0, 0\] is 17; expected 0 to 16"),
    "config id": (lambda: model_fwd(np.array([[17]]), weights_of(CONFIG), CONFIG), r"model: ids\[0, 0\] is 17"),
    "cache and packing": (
        lambda: model_fwd(
            tokens("x", 1, 2),
            weights_of(CONFIG),
            CONFIG,
            caches=model_fwd(tokens("y", 1, 1), weights_of(CONFIG), CONFIG)[0][2],
            cu_seqlens=np.array([0, 2]),
        ),
        "cu_seqlens is given with caches",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments_are_named(name: str) -> None:
    """One line with argument, value and what was expected"""
    call, expected = REFUSED[name]
    with pytest.raises(ValueError, match=expected) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_choice_can_be_replayed() -> None:
    """topk_idx of a run, given back, changes nothing; another choice changes the logits."""
    op, inputs, attrs = drawn("model", "kimi-k2")
    first = op.run("forward", inputs, attrs)
    arrays = [inputs.get(t.name) for t in op.inputs]
    (again, _, _), _ = stacked_fwd(*arrays, **attrs, topk_idx=first["topk_idx"])
    np.testing.assert_array_equal(again, first["logits"])
    (other, _, _), _ = stacked_fwd(*arrays, **attrs, topk_idx=(first["topk_idx"] + 1) % 8)
    assert not np.array_equal(other, first["logits"])


# ---- Hugging Face

ROPE = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "rope_theta")


def hugging_face(config: Config) -> Any:
    """transformers' model of a Config"""
    import transformers

    kind = "DeepseekV2" if config.scoring_func == "softmax" else "DeepseekV3"
    skipped = {*ROPE, "scoring_func", "scale_fmt", *(["topk_method"] if kind == "DeepseekV3" else [])}
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in skipped}
    rope = {"rope_type": "yarn", **{name: getattr(config, name) for name in ROPE}}
    made = getattr(transformers, f"{kind}Config")(**fields, num_key_value_heads=config.num_attention_heads, rope_parameters=rope)
    made._attn_implementation = made._experts_implementation = "eager"
    return getattr(transformers, f"{kind}ForCausalLM")(made)


def fused(name: str, w: Mapping[str, np.ndarray], experts: int) -> np.ndarray:
    """A tensor under the name that transformers gives it in memory: there the experts are stacked, gate above up"""
    stem, _, last = name.rpartition(".")
    if not stem.endswith(".experts"):
        return w[name]
    parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
    return np.stack([np.concatenate([w[f"{stem}.{e}.{part}.weight"] for part in parts]) for e in range(experts)])


def apart(name: str, x: np.ndarray) -> dict[str, np.ndarray]:
    """`fused` undone"""
    stem, _, last = name.rpartition(".")
    if not stem.endswith(".experts"):
        return {name: x}
    parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
    halves = np.split(x, len(parts), axis=1)
    return {f"{stem}.{e}.{part}.weight": half[e] for part, half in zip(parts, halves, strict=True) for e in range(len(x))}


def load(module: Any, w: Mapping[str, np.ndarray], config: Config, own: Callable[[str], str] = str) -> None:
    import torch

    found = {name: torch.tensor(fused(own(name), w, config.n_routed_experts)) for name in module.state_dict() if "rotary" not in name}
    module.load_state_dict(found, strict=True)


@pytest.mark.peers("torch", "transformers")
@pytest.mark.parametrize("preset", ["tiny-v3", "tiny-v2", "tiny-v2-lite", "tiny-k2"])
def test_hugging_face_agrees(preset: str) -> None:
    """Logits, loss and the gradient of every parameter in float32, within the band of float32 arithmetic; another epsilon is outside."""
    import torch

    config = small(preset)
    w, ids = weights_of(config, dtype=np.float32), tokens("peer", 2, 5)
    theirs = hugging_face(config)
    load(theirs, w, config)
    out = theirs(torch.tensor(ids), labels=torch.tensor(ids))
    out.loss.backward()
    exact = {name: x.astype(np.float64) for name, x in w.items()}
    inputs, attrs = stacked(config, exact, ids)
    band = band_of(OPS["model"], "forward", inputs, attrs, FP32)
    logits = band.truth["logits"]
    assert within(out.logits.detach().numpy(), logits, band.sigma["logits"])
    assert not within(OPS["model"].run("forward", inputs, {**attrs, "rms_norm_eps": 1e-4})["logits"], logits, band.sigma["logits"])
    loss, s_loss = cross_entropy_fwd(logits[:, :-1].reshape(-1, 17), ids[:, 1:].reshape(-1))
    dlogits = np.zeros_like(logits)
    dlogits[:, :-1] = cross_entropy_bwd(np.ones(()), s_loss).reshape(2, 4, 17)
    reach = SLACK * DEVIATIONS * np.sum(np.abs(dlogits) * band.sigma["logits"]) + 4 * 2.0**-24 * loss  # the logits' errors, and its own
    assert abs(float(out.loss.detach()) - loss) <= reach
    given = {**inputs, "dlogits": dlogits, "dhidden": 0 * band.truth["hidden"], "topk_idx": band.truth["topk_idx"]}
    grads = band_of(OPS["model"], "backward", given, attrs, FP32)
    found = {name: x for name, x in exact.items() if name.endswith("bias")}
    for name, parameter in theirs.named_parameters():
        found |= apart(name, parameter.grad.numpy())
    own, _ = stacked(config, found, ids)
    for name, g in grads.truth.items():
        assert within(own[name[1:]], g, grads.sigma[name]), name
    assert not within(own["w_up"], grads.truth["dw_gate"], grads.sigma["dw_gate"])


@pytest.mark.peers("torch", "transformers")
def test_hugging_face_s_mtp_agrees() -> None:
    """Two chained modules of transformers' MtpModel, post_norm, [embedding; hidden]: logits and h_next, in the band of float32 arithmetic;
    the other order is outside."""
    pytest.importorskip("transformers.modeling_layers")
    import torch
    from transformers.modeling_layers import MtpModel

    config = small(num_nextn_predict_layers=2)
    w = weights_of(config, dtype=np.float32)
    main = hugging_face(config)
    load(main, w, config)
    theirs = MtpModel(main, 2)

    def own(name: str) -> str:
        if not name.startswith("layers."):
            return MODEL["embed_tokens"] if name.startswith("embed") else MODEL["lm_head"]
        _, k, rest = name.split(".", 2)
        at = f"model.layers.{int(k) + config.num_hidden_layers}"
        return f"{at}.{rest.removeprefix('mtp_block.').replace('post_norm', 'shared_head.norm')}"

    load(theirs, w, config, own)
    ids, h = tokens("mtp peer", 1, 6), normal("h", 1, 6, 15).astype(np.float32)
    for k in (1, 2):
        n = 6 - k
        exact = {name: x.astype(np.float64) for name, x in w.items()}
        i = config.num_hidden_layers + k - 1
        arrays = {key: exact[name] for key, name in layer_names(config, i).items()}
        found = zip(*([exact[name] for name in expert_names(i, e)] for e in range(config.n_routed_experts)), strict=True)
        arrays |= dict(zip(("w_gate", "w_up", "w_down"), map(np.stack, found), strict=True))
        arrays |= {"embed_tokens": exact[MODEL["embed_tokens"]], "shared_head": exact[MODEL["lm_head"]]}
        inputs = {**arrays, "h": h[:, :n].astype(np.float64), "ids": ids, "positions": np.arange(n)[None]}
        attrs = {**config.block(), "depth": k}
        with torch.no_grad():
            states = theirs.forward_layer(k - 1, torch.tensor(h[:, :n]), torch.arange(n)[None] + 1, None, torch.tensor(ids[:, k:]))
            logits = theirs._project_to_logits(states)
        band = band_of(OPS["mtp"], "forward", inputs, attrs, FP32)
        for name, got in (("h_next", states), ("logits", logits)):
            assert within(got.numpy(), band.truth[name], band.sigma[name]), (k, name)
        wrong = OPS["mtp"].run("forward", inputs, {**attrs, "concat": "hidden_first"})
        assert not within(wrong["logits"], band.truth["logits"], band.sigma["logits"])
        h = states.numpy()
