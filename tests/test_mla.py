"""Multi-head latent attention and its parts: facts, splits, masks, positions, presets and what is refused. See test_mla_properties too."""

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from leadline.golden.band import band_of
from leadline.golden.draw import draw_case
from leadline.golden.precision import PRECISIONS
from leadline.ref import Config, attention_fwd, attention_merge_fwd, attention_varlen_fwd, mla_decode_fwd, rope_fwd
from leadline.ref.attention import attention
from leadline.ref.config import PRESETS
from leadline.ref.mla import mla_absorb, mla_prefill
from leadline.ref.mla_decode import mla_decode
from leadline.ref.op import Op
from leadline.ref.yarn import Yarn

FP64 = PRECISIONS["fp64"]


def drawn(op: Op, case: int = 0, way: str = "forward") -> tuple[dict[str, Any], dict[str, Any]]:
    chosen = op.cases[case]
    return draw_case(op, chosen, way, FP64), dict(chosen.attrs)


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_naive_equals_absorbed(way: str) -> None:
    """W_UK and W_UV folded give the same outputs and gradients; with W_UK of another head they do not."""
    for case in range(len(mla_prefill.cases)):
        inputs, attrs = drawn(mla_prefill, case, way)
        band = band_of(mla_prefill, way, inputs, attrs, FP64)
        absorbed = mla_absorb.run(way, inputs, attrs)
        for name, value in absorbed.items():
            assert np.all(np.abs(value - band.truth[name]) <= 48 * band.sigma[name] + 1e-300), name
    inputs, attrs = drawn(mla_prefill)
    turned = {**inputs, "kv_b_proj": np.roll(inputs["kv_b_proj"], 1, axis=0)}
    assert not np.allclose(mla_absorb.run("forward", turned, attrs)["y"], mla_prefill.run("forward", inputs, attrs)["y"])


def whole(q: np.ndarray, k: np.ndarray, v: np.ndarray, **attrs: Any) -> tuple[np.ndarray, np.ndarray]:
    return attention_fwd(q, k, v, **attrs)[0]


def top_left(q: np.ndarray, k: np.ndarray, v: np.ndarray, **attrs: Any) -> tuple[np.ndarray, np.ndarray]:
    """The mutant mask-top-left: query i sees keys 0 to i, wherever the sequence ends."""
    s = q.shape[1]
    return whole(q, k[:, :s], v[:, :s], **attrs)


def sees_no_future(attend: Callable) -> bool:
    """Changing key j changes no query before it, bottom-right aligned, and changes one at or after it."""
    rng = np.random.Generator(np.random.Philox(key=7))
    q, k, v = (rng.standard_normal((1, n, 2, 8)) for n in (3, 7, 7))
    before, _ = attend(q, k, v)
    for j in range(7):
        moved = v.copy()
        moved[:, j] += 1.0
        changed = np.any(attend(q, k, moved)[0] != before, axis=(0, 2, 3))
        if not np.array_equal(changed, [j <= i + 4 for i in range(3)]):
            return False
    return True


def test_causality_by_perturbing_the_future() -> None:
    """Holds for the reference; a mask aligned at the top left is caught."""
    assert sees_no_future(whole)
    assert not sees_no_future(top_left)


def merged(parts: list[tuple[np.ndarray, np.ndarray]], base2: bool = False) -> tuple[np.ndarray, np.ndarray]:
    o, lse = (np.stack(x) for x in zip(*parts, strict=True))
    return attention_merge_fwd(o, lse / np.log(2) if base2 else lse)[0]


@given(st.lists(st.integers(0, 20), max_size=4), st.integers(0, 2**31))
def test_any_split_merged_is_the_whole(cuts: list[int], seed: int) -> None:
    """Keys split anywhere, empty parts among them, and merged by log-sum-exp."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    q, k, v = (rng.standard_normal((1, n, 2, 8)) for n in (2, 20, 20))
    edges = [0, *sorted(cuts), 20]
    parts = [whole(q, k[:, a:b], v[:, a:b], causal=False) for a, b in itertools.pairwise(edges)]
    for got, expected in zip(merged(parts), whole(q, k, v, causal=False), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)  # 20 float64 terms: 1e-15 each
    if len(parts) > 1 and all(len(range(a, b)) for a, b in itertools.pairwise(edges)):
        assert not np.allclose(merged(parts, base2=True)[1], whole(q, k, v, causal=False)[1])  # the mutant lse-base2-vs-e


def test_blocks_do_not_matter_even_at_large_logits() -> None:
    """Keys one, three or all at a time: the online softmax is the softmax, where exp of a score overflows."""
    inputs, _ = drawn(attention, 8)
    q, k, v = inputs["q"] * 100, inputs["k"], inputs["v"]
    expected = whole(q, k, v)
    assert np.max(np.abs(expected[1])) > 710  # exp overflows float64 there
    for block in (1, 3, 1000):
        for got, want in zip(whole(q, k, v, block=block), expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-13)


def test_unused_slots_do_not_leak_and_pages_may_lie_anywhere() -> None:
    """NaN in every slot that no sequence uses changes nothing; the same tokens on other pages give the same bits."""
    inputs, attrs = drawn(mla_decode)
    before, _ = mla_decode_fwd(**inputs, **attrs)
    page = inputs["kv_cache"].shape[1]
    used = np.zeros(inputs["kv_cache"].shape[:2], bool)
    for row, length in zip(inputs["block_table"], inputs["cache_seqlens"], strict=True):
        for j in range(length):
            used[row[j // page], j % page] = True
    poisoned = np.where(used[..., None], inputs["kv_cache"], np.nan)
    moved = {**inputs, "kv_cache": poisoned[::-1], "block_table": len(poisoned) - 1 - inputs["block_table"]}
    after, _ = mla_decode_fwd(**moved, **attrs)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)
    off_by_one = {**inputs, "cache_seqlens": inputs["cache_seqlens"] - 1}
    assert not np.allclose(mla_decode_fwd(**off_by_one, **attrs)[0][1], before[1])


def test_rotation_depends_on_relative_position_and_layouts_are_a_permutation() -> None:
    """Scores of rotated q and k stay when both move on; halves are the interleaved result permuted; YaRN's amplitude of 1 keeps norms."""
    rng = np.random.Generator(np.random.Philox(key=3))
    q, k = rng.standard_normal((2, 5, 1, 64))
    places = np.array([0, 3, 100, 4095, 90000])

    def scores(shift: int, **attrs: Any) -> np.ndarray:
        (rotated_q, _), (rotated_k, _) = (rope_fwd(x, places + shift, factor=40.0, **attrs) for x in (q, k))
        return rotated_q[:, 0] @ rotated_k[:, 0].T

    np.testing.assert_allclose(scores(70000), scores(0), rtol=0, atol=1e-12)  # |q||k| is 64: 500 units
    np.testing.assert_allclose(scores(0, layout_out="half"), scores(0), rtol=0, atol=1e-12)
    interleaved, _ = rope_fwd(q, places)
    half, _ = rope_fwd(q, places, layout_out="half")
    np.testing.assert_array_equal(half, np.concatenate([interleaved[..., 0::2], interleaved[..., 1::2]], axis=-1))
    wrong, _ = rope_fwd(q, places, layout_in="half", layout_out="half")  # the mutant rope-neox-on-interleaved
    assert not np.allclose(wrong, half)


def test_the_numbers_of_the_released_models() -> None:
    """V3's softmax scale 0.13523378 and V2's gain; every preset is free of contradictions."""
    v3 = Yarn(**{k: v for k, v in Config.preset("v3").attention().items() if k in Yarn._fields})
    assert v3.softmax_scale(192) == pytest.approx(0.13523378, abs=5e-9)
    assert Yarn(factor=40.0, mscale=0.707, mscale_all_dim=0.707).gain(0.707) ** 2 == pytest.approx(1.5896262, abs=5e-8)
    for name, config in PRESETS.items():
        config.check(name)


def test_wrong_arguments_are_named() -> None:
    """Shapes, tables, lengths and YaRN parameters that cannot be: a ValueError with argument, value and expectation."""
    inputs, attrs = drawn(mla_prefill)
    decode_inputs, decode_attrs = drawn(mla_decode)
    x, at = np.zeros((2, 1, 8)), np.arange(2)
    q5, k3 = np.zeros((1, 5, 2, 4)), np.zeros((1, 3, 2, 4))
    table = decode_inputs["block_table"]
    for call, expected in (
        (lambda: mla_prefill.run("forward", {**inputs, "o_proj": inputs["o_proj"][:, 1:]}, attrs), "o_proj has shape"),
        (lambda: mla_prefill.run("forward", {**inputs, "q_a_proj": None}, attrs), "queries come from"),
        (lambda: mla_decode_fwd(**{**decode_inputs, "block_table": table + 100}, **decode_attrs), r"block_table\[0, 0\] is 1"),
        (lambda: mla_decode_fwd(**{**decode_inputs, "cache_seqlens": np.array([65, 1])}, **decode_attrs), r"cache_seqlens\[0\] is 65"),
        (lambda: rope_fwd(x, at, factor=0.5), "factor is 0.5"),
        (lambda: rope_fwd(x, at, factor=2.0, original_max_position_embeddings=0), "original_max_position_embeddings is 0"),
        (lambda: rope_fwd(x, at, factor=2.0, mscale=-1.0), "mscale is -1.0"),
        (lambda: attention_fwd(q5, k3, k3, None, empty_rows="refuse"), "q has 5 positions and k 3"),
        (lambda: mla_prefill.run("forward", {**inputs, "c_kv_cache": np.zeros((2, 1, 12))}, attrs), "k_pe_cache is missing"),
        (lambda: mla_prefill.run("forward", {**inputs, "cu_seqlens": np.array([0, 5])}, attrs), "cu_seqlens is given with b = 2"),
        (
            lambda: attention_varlen_fwd(q5[0], k3[0], k3[0], np.array([0, 4]), np.array([0, 3])),
            "cu_seqlens_q runs from 0 to 4; expected 0 to 5",
        ),
        (lambda: attention_varlen_fwd(q5[0], k3[0], k3[0], np.array([0, 3, 2, 5]), np.array([0, 1, 2, 3])), r"cu_seqlens_q\[2\] is 2"),
        (lambda: rope_fwd(x, at, beta_fast=1.0, beta_slow=2.0), "beta_fast is 1.0"),
        (lambda: rope_fwd(x, at - 1), r"positions\[0\] is -1"),
        (lambda: attention_fwd(np.zeros((1, 2, 3, 4)), np.zeros((1, 2, 2, 4)), np.zeros((1, 2, 2, 4))), "2 heads"),
        (lambda: Config.from_dict({"hidden_size": 8, "num_attention_heads": 2, "hiden": 1}), "did you mean hidden_size"),
        (lambda: Config.from_dict({"hidden_size": 8, "num_attention_heads": 2, "qk_head_dim": 7}), "qk_head_dim is 7"),
        (lambda: replace(Config.preset("v3"), n_group=7).check(), "n_group is 7"),
    ):
        with pytest.raises(ValueError, match=expected):
            call()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"n_group": "4"}, "n_group is '4'; expected an integer"),
        ({"n_group": True}, "n_group is True; expected an integer"),
        ({"n_group": 4.0}, "n_group is 4.0; expected an integer"),
        ({"hidden_size": "8"}, "hidden_size is '8'; expected an integer"),
        ({"hidden_size": 0}, "hidden_size is 0; expected a positive integer"),
        ({"vocab_size": None}, "vocab_size is None; expected an integer"),
        ({"q_lora_rank": False}, "q_lora_rank is False; expected an integer"),
        ({"num_nextn_predict_layers": True}, "num_nextn_predict_layers is True; expected an integer"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers is -1; expected 0 or a positive integer"),
        ({"rope_theta": True}, "rope_theta is True; expected a number"),
        ({"rope_theta": "1e4"}, "rope_theta is '1e4'; expected a number"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1; expected true or false"),
        ({"topk_method": 3}, "topk_method is 3; expected text"),
        ({"scale_fmt": 8}, "scale_fmt is 8; expected text"),
    ],
)
def test_a_field_of_another_kind_is_refused(fields: dict[str, Any], expected: str) -> None:
    """In a config.json as in a Config that a program made."""
    with pytest.raises(ValueError, match=re.escape(f"config: {expected}")):
        Config.from_dict({"hidden_size": 8, "num_attention_heads": 2, **fields})
    with pytest.raises(ValueError, match=re.escape(f"config: {expected}")):
        replace(Config.preset("v3"), **fields).check()


def test_an_integer_is_a_number_and_null_stands_where_there_may_be_nothing() -> None:
    replace(Config.preset("v3"), rope_theta=10000, factor=40, q_lora_rank=None, scale_fmt=None).check()
    replace(Config.preset("v3"), scale_fmt="ue8m0").check()
