"""Benchmark of the whole model: tiny-v3 beside transformers, a forward, then a training step. float32, weights made at random."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..ref.block import WEIGHTS
from ..ref.config import Config
from ..ref.model_stacked import height
from ..ref.names import MODEL, expert_names, layer_names, shapes
from .bench import Bench, normal
from .checkpoint_make import config_json

TOKENS = 256
WAYS = ("grouped_mm", "eager")


def weights(config: Config) -> dict[str, np.ndarray]:
    """A model's weights by checkpoint name"""
    drawn = {}
    for name, shape in shapes(config).items():
        drawn[name] = normal(shape) * 0.1 + 1 if name.endswith("norm.weight") else normal(shape) * np.float32(shape[-1] ** -0.5)
    return drawn


def stacked(w: dict[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
    """The same under the names of the op `model`"""
    arrays = {key: w[name] for key, name in MODEL.items()}
    dense, layers = config.first_k_dense_replace, range(config.num_hidden_layers)
    for name in WEIGHTS:
        at = {"p": layers[:dense], "m": layers[dense:]}.get(height(name), layers)
        if name in ("w_gate", "w_up", "w_down"):
            j = ("w_gate", "w_up", "w_down").index(name)
            arrays[name] = np.stack([[w[expert_names(i, e)[j]] for e in range(config.n_routed_experts)] for i in at])
        elif name in layer_names(config, at[0]):
            arrays[name] = np.stack([w[layer_names(config, i)[name]] for i in at])
    return arrays


def hugging_face(w: dict[str, np.ndarray], config: Config) -> Any:
    """DeepseekV3ForCausalLM with these weights"""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    model = DeepseekV3ForCausalLM(DeepseekV3Config(**config_json(config, False)))
    state = {name: torch.from_numpy(a) for name, a in w.items()}
    for i in range(config.first_k_dense_replace, config.num_hidden_layers):  # it holds the experts of a layer in two tensors
        parts = [[state.pop(name) for name in expert_names(i, e)] for e in range(config.n_routed_experts)]
        at = f"model.layers.{i}.mlp.experts"
        state[f"{at}.gate_up_proj"] = torch.stack([torch.cat([gate, up]) for gate, up, _ in parts])
        state[f"{at}.down_proj"] = torch.stack([down for _, _, down in parts])
    model.load_state_dict(state)
    return model.eval()


def model() -> Iterator[Bench]:
    """One sequence of 256 tokens: logits; then the gradients of every weight for given gradients of logits and hidden states."""
    import torch

    from ..kernels.cpu.model import backward, model_saving

    config = Config.preset("tiny-v3")
    w = weights(config)
    theirs, ours = hugging_face(w, config), stacked(w, config)
    ids = np.arange(TOKENS)[None] * 7 % config.vocab_size
    dlogits = normal((1, TOKENS, config.vocab_size))
    dhidden = np.zeros((1, TOKENS, config.hidden_size), np.float32)
    arrays = {"ids": ids, "positions": np.arange(TOKENS)[None], **ours}
    given = {**arrays, **config.block()}
    tids, tdlogits = torch.from_numpy(ids), torch.from_numpy(dlogits)
    parameters = [p for p in theirs.parameters() if p.requires_grad]

    def infer(way: str) -> Any:
        theirs.set_experts_implementation(way)
        with torch.no_grad():
            return theirs(tids, use_cache=False).logits

    def step(way: str) -> Any:
        theirs.set_experts_implementation(way)
        return torch.autograd.grad(theirs(tids, use_cache=False).logits, parameters, tdlogits)

    def both() -> Any:
        _, saved = model_saving(**given)
        outer, layers = backward(saved, dlogits, dhidden)
        return outer["embed_tokens"], outer, layers  # the first parameter's first, as theirs

    case = f"tiny-v3, 1×{TOKENS}"
    elements = sum(a.size for name, a in w.items() if ".mlp.experts." not in name and "embed" not in name)
    chosen = 3 * config.num_experts_per_tok * config.moe_intermediate_size * config.hidden_size
    flops = 2 * TOKENS * (elements + chosen * (config.num_hidden_layers - config.first_k_dense_replace))
    forward = {f"transformers {way}": (lambda way=way: infer(way)) for way in WAYS}
    yield Bench("model", case, lambda: model_saving(**given)[0], forward, flops=flops)
    training = {f"transformers {way}": (lambda way=way: step(way)) for way in WAYS}
    yield Bench("model", case, both, training, 0, "forward+backward", 3 * flops)
