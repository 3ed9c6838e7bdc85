"""Hugging Face's DeepSeek-V2 and V3 models on the checkpoints that are made here: logits, loss, the gradient of every parameter."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from leadline.golden.checkpoint import Checkpoint
from leadline.golden.checkpoint_make import LARGE, SHARD, TINY, configured, make
from leadline.golden.checkpoint_stream import Run
from leadline.golden.model_cost import Half
from leadline.ref import cross_entropy_bwd, cross_entropy_fwd
from leadline.ref.model import model_bwd, model_fwd
from leadline.ref.names import shapes

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytestmark = pytest.mark.peers("torch", "transformers")

IDS = np.array([[1, 2, 3, 500, 7, 1023, 2, 90, 400, 44, 12], [9, 9, 9, 1, 640, 33, 81, 0, 1000, 17, 256]])
EMBEDDING = "model.embed_tokens.weight"
ALIKE = 3.0  # how many times the error of one float32 implementation that of another may be


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    home = tmp_path_factory.mktemp("peers")

    def one(preset: str) -> Path:
        if not (home / preset).exists():
            make(home / preset, configured(preset), shard=SHARD.get(preset, LARGE))
        return home / preset

    return one


def theirs(directory: Path, dtype: str = "float32") -> Any:
    """The model that AutoModelForCausalLM makes of the directory; every weight of ours is one of its own, but the MTP layer's."""
    import torch
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype), output_loading_info=True)
    model, about = loaded
    assert not about["missing_keys"]
    assert not about["mismatched_keys"]
    assert all(name.startswith("model.layers.4.") for name in about["unexpected_keys"])
    return model


def gradients(model: Any) -> dict[str, np.ndarray]:
    """By the checkpoint's names: their experts are stacked, gate and up in one."""
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad.numpy()
        if name.endswith("experts.gate_up_proj"):
            for e, (gate, up) in enumerate(zip(*np.split(grad, 2, axis=1), strict=True)):
                found |= {
                    name.replace("gate_up_proj", f"{e}.gate_proj.weight"): gate,
                    name.replace("gate_up_proj", f"{e}.up_proj.weight"): up,
                }
        elif name.endswith("experts.down_proj"):
            found |= {name.replace("down_proj", f"{e}.down_proj.weight"): down for e, down in enumerate(grad)}
        else:
            found[name] = grad
    return found


def ours(directory: Path, ids: np.ndarray, dtype: str) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
    """Logits, the loss of the next tokens, and the gradient of every weight."""
    with Checkpoint(directory) as model:
        weights = {name: w.astype(dtype) for name, w in model.items()}
        (logits, hidden, _), saved = model_fwd(ids, weights, model.config)
        assert saved is not None
        v = logits.shape[2]
        loss, s_loss = cross_entropy_fwd(logits[:, :-1].reshape(-1, v), ids[:, 1:].reshape(-1))
        dlogits = np.zeros_like(logits)
        dlogits[:, :-1] = cross_entropy_bwd(np.ones((), dtype), s_loss).reshape(logits[:, :-1].shape)
        return logits, float(loss), model_bwd(dlogits, np.zeros_like(hidden), saved)


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def distances(mine: tuple, other: tuple, exact: tuple) -> dict[str, tuple[float, float]]:
    """Of the logits, the loss and every gradient: how far theirs are from float64, and how far may be.

    ALIKE times the distance of ours, which adds up the same numbers in another order, and for a gradient not less than that of all
    gradients relative to their size: of some weights a run errs by chance less than it should.
    """
    (logits, loss, grads), (their_logits, their_loss, their_grads), (true_logits, true_loss, true_grads) = mine, other, exact
    assert set(their_grads) == set(true_grads) == set(grads)
    found = {"logits": (rms(their_logits - true_logits), ALIKE * rms(logits - true_logits))}
    found["loss"] = abs(their_loss - true_loss), ALIKE * max(abs(loss - true_loss), found["logits"][0] / np.sqrt(true_logits[..., 0].size))
    size = {name: rms(g) for name, g in true_grads.items()}
    usual = float(np.median([rms(grads[name] - g) / size[name] for name, g in true_grads.items() if size[name]]))
    for name, g in true_grads.items():
        found[name] = rms(their_grads[name] - g), ALIKE * max(rms(grads[name] - g), usual * size[name])
    return found


@pytest.mark.parametrize("preset", TINY)
def test_logits_loss_and_every_gradient_agree(preset: str, made: Callable[[str], Path]) -> None:
    """In float32: theirs are as far from our float64 as our own float32 is. Another epsilon in one norm, or one expert's weight turned by a
    part in 10,000, is found."""
    import torch

    directory = made(preset)
    exact, mine = (ours(directory, IDS, dtype) for dtype in ("float64", "float32"))

    def asked(model: Any) -> dict[str, tuple[float, float]]:
        model.zero_grad()
        out = model(torch.tensor(IDS), labels=torch.tensor(IDS))
        out.loss.backward()
        return distances(mine, (out.logits.detach().numpy(), out.loss.item(), gradients(model)), exact)

    model = theirs(directory)
    wrong = {name: pair for name, pair in asked(model).items() if not pair[0] <= pair[1]}
    assert not wrong
    layer = model.model.layers[2]
    layer.input_layernorm.variance_epsilon = 1e-2
    assert not all(a <= b for a, b in asked(model).values())
    layer.input_layernorm.variance_epsilon = 1e-6
    assert all(a <= b for a, b in asked(model).values())
    with torch.no_grad():
        layer.mlp.experts.gate_up_proj *= 1.0001
    assert not all(a <= b for a, b in asked(model).values())


@pytest.mark.parametrize("preset", TINY)
def test_logits_agree_at_bf16(preset: str, made: Callable[[str], Path]) -> None:
    """With the experts that they choose, they are as far from float64 as the reference that rounds to bf16 wherever something is stored.
    Experts that are twice as large are found."""
    import torch

    with Checkpoint(made(preset)) as model:
        config, weights = model.config, dict(model)
    bfloat = theirs(made(preset), "bfloat16")
    choices: list[np.ndarray] = []
    for layer in bfloat.model.layers[config.first_k_dense_replace :]:
        layer.mlp.gate.register_forward_hook(lambda _module, _x, out: choices.append(out[2].reshape(*IDS.shape, -1).numpy()))

    def asked() -> tuple[float, float]:
        choices.clear()
        with torch.no_grad():
            logits = bfloat(torch.tensor(IDS)).logits.float().numpy()
        exact = {name: w.astype(np.float64) for name, w in weights.items()}
        rounded = weights | {EMBEDDING: weights[EMBEDDING].view(Half)}
        (true, *_), (mine, *_) = (model_fwd(IDS, w, config, topk_idx=np.stack(choices), keep=False)[0] for w in (exact, rounded))
        assert isinstance(mine, Half)
        return rms(logits - true), rms(np.asarray(mine) - true)

    far, usual = asked()
    assert usual / ALIKE <= far <= usual * ALIKE
    with torch.no_grad():
        bfloat.model.layers[2].mlp.experts.down_proj *= 2
    far, usual = asked()
    assert far > usual * ALIKE


@pytest.mark.parametrize("preset", TINY)
def test_what_transformers_saves_is_read_again(preset: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    """Its config.json with rope_parameters, its float32 weights, no MTP layer: the same config, the same values."""
    theirs(made(preset)).save_pretrained(tmp_path)
    with Checkpoint(made(preset)) as before, Checkpoint(tmp_path) as after:
        assert after.config == before.config
        assert not after.has_mtp
        assert set(after) == set(shapes(before.config))
        assert all(np.array_equal(after[name], before[name]) for name in after)


def test_they_generate_the_tokens_that_we_do(made: Callable[[str], Path]) -> None:
    """Eight tokens, greedily, each on a cache; the tokens are those of leadline run."""
    import torch

    out = theirs(made("tiny-v3")).generate(torch.tensor(IDS[:1]), max_new_tokens=8, do_sample=False, pad_token_id=0)
    with Checkpoint(made("tiny-v3")) as model:
        run = Run(model, IDS[0], caching=True)
        for _ in range(8):
            run.append(int(np.argmax(run.forward()[-1])))
    assert run.ids.tolist() == out[0].tolist()


def test_their_tokenizer_reads_ours(made: Callable[[str], Path]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made("tiny-v3"))
    assert tokenizer("héy ✓").input_ids == [2 + b for b in "héy ✓".encode()]
    assert tokenizer.decode([2 + b for b in "héy ✓".encode()]) == "héy ✓"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)


@pytest.mark.slow
def test_two_layers_at_the_width_of_v3_agree(tmp_path: Path) -> None:
    """A dense and a MoE layer of DeepSeek-V3's own sizes, with 16 experts and 1024 tokens (6 GB in float32 on their side): logits."""
    import torch

    make(tmp_path / "wide", configured("v3", layers=2, dense=1, experts=16, vocab=1024))
    ids = np.random.default_rng(0).integers(0, 1024, 16)
    with Checkpoint(tmp_path / "wide") as model:

        class Exact(dict):
            def __missing__(self, name: str) -> np.ndarray:
                return model[name].astype(np.float64)

        (exact, _, _), _ = model_fwd(ids[None], Exact(), model.config, keep=False)
        mine = Run(model, ids).forward()
    with torch.no_grad():
        other = theirs(tmp_path / "wide")(torch.tensor(ids[None])).logits.numpy()
    assert rms(other - exact) <= ALIKE * rms(mine - exact[0])
    assert rms(exact) > 1
