"""Generation: what the cache, the drafter and sampling may not change, each property with a mutant that it kills."""

import dataclasses
from collections.abc import Callable
from typing import Any

import leadline.ref.generation as generation
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from leadline.golden.draw import Source
from leadline.ref import Config, generate, model_fwd
from leadline.ref.generation import Generated, draw, probabilities, verified
from leadline.ref.names import shapes

V = 5
CONFIG = dataclasses.replace(
    Config.preset("tiny-v3"),
    hidden_size=14,
    num_attention_heads=3,
    kv_lora_rank=12,
    q_lora_rank=10,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
    vocab_size=V,
    intermediate_size=11,
    moe_intermediate_size=7,
    n_routed_experts=8,
    num_experts_per_tok=2,
    num_hidden_layers=2,
)


def weights_of(seed: int, config: Config = CONFIG) -> dict[str, np.ndarray]:
    found = {}
    for name, shape in shapes(config, mtp=True).items():
        x = Source(f"generation {seed} {name}").normal(shape)
        found[name] = 1.0 + 0.2 * x if "norm" in name else x * (shape[-1] ** -0.5 if len(shape) > 1 and "embed" not in name else 0.3)
    return found


PROMPT = np.array([[3, 0, 4]])


def plainly(w: dict, ids: np.ndarray, count: int) -> np.ndarray:
    """Greedy, each token from the whole sequence anew: no cache, no absorption"""
    for _ in range(count):
        logits = model_fwd(ids, w, CONFIG)[0][0]
        ids = np.concatenate([ids, np.argmax(logits[:, -1:], axis=-1)], axis=1)
    return ids


def late(cache: tuple) -> tuple:
    """The mutant of `shortened`: a rejected draft stays in the cache."""
    return cache


def test_greedy_output_is_that_of_the_whole_sequence_with_and_without_mtp(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens from a cache, and with drafts of which some are accepted; a rejected draft left in the cache changes some."""
    accepted, changed = 0, 0
    for seed in range(4):
        w = weights_of(seed)
        want = plainly(w, PROMPT, 10)
        np.testing.assert_array_equal(generate(PROMPT, w, CONFIG, max_new_tokens=10).ids, want)
        drafted = generate(PROMPT, w, CONFIG, max_new_tokens=10, mtp=True)
        np.testing.assert_array_equal(drafted.ids, want)
        assert 0 <= drafted.accepted <= drafted.drafted
        assert drafted.ids.shape[1] - 3 - 1 - drafted.drafted - drafted.accepted in (0, 1)  # the last may need no draft
        accepted += drafted.accepted
        with monkeypatch.context() as patch:
            patch.setattr(generation, "shortened", late)
            changed += not np.array_equal(generate(PROMPT, w, CONFIG, max_new_tokens=10, mtp=True).ids, want)
    assert accepted > 0
    assert changed > 0


def enumerated(run: Callable[[], Generated], monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, ...], float]:
    """The law of run()'s ids: every way that the draws may go, with its probability"""
    law: dict[tuple[int, ...], float] = {}
    paths: list[list[int]] = [[]]
    while paths:
        path, at, weight = paths.pop(), 0, 1.0

        def follow(p: np.ndarray, random: Any, path: list[int] = path) -> int:
            nonlocal at, weight
            p = p / np.sum(p)
            if at == len(path):  # a draw not met before: this run takes the first token, others the rest
                first, *rest = (int(i) for i in np.flatnonzero(p))
                paths.extend([*path, i] for i in rest)
                path.append(first)
            chosen = path[at]
            at, weight = at + 1, weight * float(p[chosen])
            return chosen

        monkeypatch.setattr(generation, "draw", follow)
        ids = tuple(int(i) for i in run().ids[0, 3:])
        law[ids] = law.get(ids, 0.0) + weight
    return law


def same_law(ours: dict, theirs: dict) -> bool:
    """Equal to the rounding of a few hundred products of probabilities"""
    return set(ours) == set(theirs) and all(abs(ours[ids] - theirs[ids]) <= 2.0**-40 for ids in ours)


def always_kept(x: int, p: np.ndarray, q: np.ndarray, random: Any) -> tuple[bool, int]:
    """A mutant of `verified`: every draft is kept."""
    return True, x


def redrawn_from_p(x: int, p: np.ndarray, q: np.ndarray, random: Any) -> tuple[bool, int]:
    """A mutant of `verified`: a rejected draft is replaced by a draw from p, not from max(p - q, 0)."""
    share = min(1.0, p[x] / q[x])
    return (True, x) if generation.draw(np.array([1 - share, share]), random) else (False, generation.draw(p, random))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8)])
def test_drafts_leave_the_distribution_as_it_is(temperature: float, top_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probability of each continuation by 3 tokens, enumerated, is the same with and without mtp; two wrong rules change it."""
    config = dataclasses.replace(CONFIG, vocab_size=3)
    w = weights_of(1, config)
    prompt, how = PROMPT % 3, {"max_new_tokens": 3, "temperature": temperature, "top_p": top_p, "random": lambda: 0.0}
    alone = enumerated(lambda: generate(prompt, w, config, **how), monkeypatch)
    assert abs(sum(alone.values()) - 1) <= 2.0**-40
    assert same_law(enumerated(lambda: generate(prompt, w, config, mtp=True, **how), monkeypatch), alone)
    for mutant in (always_kept, redrawn_from_p):
        monkeypatch.setattr(generation, "verified", mutant)
        assert not same_law(enumerated(lambda: generate(prompt, w, config, mtp=True, **how), monkeypatch), alone)


def law_of_one_draft(p: np.ndarray, q: np.ndarray, rule: Callable, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """What comes out of a draft from q that is verified against p"""

    def run() -> Generated:
        x = generation.draw(q, float)
        return Generated(np.array([[0, 0, 0, rule(x, p, q, float)[1]]]), 0, 0)

    law = enumerated(run, monkeypatch)
    return np.array([law.get((i,), 0.0) for i in range(len(p))])


@given(p=st.lists(st.integers(0, 9), min_size=4, max_size=4), q=st.lists(st.integers(0, 9), min_size=4, max_size=4))
def test_a_verified_draft_has_the_models_distribution(p: list[int], q: list[int]) -> None:
    """For any p and q, tokens of probability 0 among them"""
    target, proposal = (np.array(x, dtype=np.float64) + (np.arange(4) == 0) * (sum(x) == 0) for x in (p, q))
    target, proposal = target / target.sum(), proposal / proposal.sum()
    with pytest.MonkeyPatch.context() as patch:
        found = law_of_one_draft(target, proposal, verified, patch)
        assert np.all(np.abs(found - target) <= 2.0**-48)
        if np.max(np.abs(target - proposal)) > 0.01:
            assert np.max(np.abs(law_of_one_draft(target, proposal, always_kept, patch) - target)) > 0.01


def test_sampling_draws_by_the_running_sum() -> None:
    """draw's token for a uniform number, at the edges too; never one of probability 0."""
    p = np.array([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    for u, token in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.75, 4), (np.nextafter(1.0, 0.0), 4)):
        assert draw(p, lambda u=u: u) == token
        assert draw(3 * p, lambda u=u: u) == token


def test_probabilities_are_temperature_and_nucleus() -> None:
    """Softmax of logits/T, the fewest tokens that reach top_p, the lowest index in a tie; greedy is one token's."""
    logits = np.log(np.array([0.1, 0.4, 0.1, 0.4]))
    np.testing.assert_allclose(probabilities(logits, 1.0, 1.0), [0.1, 0.4, 0.1, 0.4], rtol=2.0**-48)
    np.testing.assert_allclose(probabilities(logits, 0.5, 1.0), np.array([1, 16, 1, 16]) / 34, rtol=2.0**-48)
    for top_p, kept in ((0.3, [1]), (0.5, [1, 3]), (0.79, [1, 3]), (0.85, [0, 1, 3]), (0.95, [0, 1, 2, 3]), (1e-9, [1])):
        assert list(np.flatnonzero(probabilities(logits, 1.0, top_p))) == kept
    assert list(probabilities(logits, 0.0, 1.0)) == [0, 1, 0, 0]
    assert probabilities(1e4 * logits, 1.0, 1.0).sum() == pytest.approx(1.0)


def test_generation_stops() -> None:
    """At max_new_tokens; after the first of `stop`, which is kept, drafted or not; at once with max_new_tokens=0."""
    for seed in range(3):
        w = weights_of(seed)
        free = generate(PROMPT, w, CONFIG, max_new_tokens=8).ids[0, 3:]
        for token in sorted(set(free.tolist())):
            until = list(free).index(token) + 1
            for mtp in (False, True):
                ended = generate(PROMPT, w, CONFIG, max_new_tokens=8, mtp=mtp, stop=(token,)).ids
                np.testing.assert_array_equal(ended[0, 3:], free[:until])
        assert generate(PROMPT, w, CONFIG, max_new_tokens=5, mtp=True).ids.shape == (1, 8)
        np.testing.assert_array_equal(generate(PROMPT, w, CONFIG, max_new_tokens=0).ids, PROMPT)


def test_uniform_numbers_may_be_a_list_or_a_function() -> None:
    """The same numbers give the same tokens, whichever way they come; other numbers give others."""
    w, numbers = weights_of(0), Source("uniforms").uniform((40,))
    how: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.5, "mtp": True}
    first = generate(PROMPT, w, CONFIG, random=numbers, **how)
    stream = iter(numbers.tolist())
    assert np.array_equal(generate(PROMPT, w, CONFIG, random=lambda: next(stream), **how).ids, first.ids)
    assert not np.array_equal(generate(PROMPT, w, CONFIG, random=numbers[::-1], **how).ids, first.ids)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens is -1; expected 0 or more"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": 1.0}, "random is None; expected a callable"),
        ({"temperature": 1.0, "random": [0.5, 0.5]}, "random has run out"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"ids": np.zeros((2, 3), np.int64)}, r"ids has shape \(2, 3\); expected \[1,s\]"),
        ({"ids": np.zeros((1, 0), np.int64)}, r"ids has shape \(1, 0\)"),
        ({"ids": np.array([[V]])}, r"ids\[0, 0\] is 5; expected 0 to 4"),
        ({"mtp": True, "config": dataclasses.replace(CONFIG, num_nextn_predict_layers=0)}, "mtp is True; expected False"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], says: str) -> None:
    """One line with argument, value and what was expected"""
    given = {"ids": PROMPT, "config": CONFIG, "max_new_tokens": 4, **change}
    with pytest.raises(ValueError, match=says):
        generate(given.pop("ids"), weights_of(0), given.pop("config"), **given)
