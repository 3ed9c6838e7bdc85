"""What a trace holds: canonical names, shapes, where engines have each tensor, and the directory that carries them.

A trace is a directory with one safetensors file or more, which hold the tensors by their canonical names, and trace.json. Any engine can
write one; these lines do, in a forward over one prompt (`seen` is filled by hooks or prints, float32 or bfloat16 torch tensors):

    import json, pathlib, torch
    from safetensors.torch import save_file

    out = pathlib.Path("run"); out.mkdir()
    seen = {}

    def see(name, x):                                    # call it where the table of `leadline trace names` says
        seen[name] = x.detach().to("cpu").contiguous()

    # module.register_forward_hook(lambda m, args, y: see("layer.0.attn.norm", y)), and so on, or lines in the model's own code
    model(torch.tensor([ids]))

    save_file(seen, out / "trace.safetensors")
    (out / "trace.json").write_text(json.dumps({
        "schema": "leadline.trace/1",
        "engine": "mine 0.1",
        "precision": "bf16",                             # or fp32, fp16, bf16-eager: what the engine claims to compute in
        "ids": ids,                                      # the prompt, a list of integers
        "absent": {"attn.q": "inside a fused kernel"},   # what the engine cannot show, with the reason; in every layer
    }))

One sequence, positions from 0 unless "positions" lists them. A leading axis of 1 and heads that lie flat ([n, h·v] for [n,h,v]) are taken
as they are; logits may be those of the last tokens only. What is absent is computed from what is there, so more may be judged at once.
"""

import difflib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..ref.config import Config
from ..ref.names import is_dense
from .errors import UsageError
from .precision import PRECISIONS
from .safetensor_file import Reader, short

SCHEMA = "leadline.trace/1"
FIELDS = {"schema", "engine", "precision", "ids", "positions", "absent", "planted", "versions"}
NEEDED = ("embed", "output", "router.logits", "router.topk_idx", "logits")  # ends of layers, choices and what these are made of
HIGHEST = 2**26  # positions below it


@dataclass(frozen=True)
class Name:
    """One canonical tensor: its name (a layer's without `layer.{i}.`), dimensions, what it is, and where engines have it."""

    name: str
    dims: tuple[str, ...]
    what: str
    hugging_face: str
    engines: str  # vLLM's and SGLang's DeepseekV2DecoderLayer, which V3 and Kimi-K2 share
    where: str = "every"  # layers that have it: every, dense, moe, or none for what stands outside the layers
    index: bool = False


IN_LAYER = "model.layers.{i}."
NAMES = (
    Name("embed", ("n", "d"), "embed_tokens[ids]", "model.embed_tokens", "model.embed_tokens", "none"),
    Name("attn.norm", ("n", "d"), "rmsnorm of what enters the layer", "input_layernorm", "input_layernorm, first of two results"),
    Name(
        "attn.q",
        ("n", "h", "q"),
        "queries [q_nope | q_pe], q_pe rotated",
        "query of the attention function",
        "q_b_proj (q_proj), its last r channels after rotary_emb",
    ),
    Name("attn.c_kv", ("n", "c"), "latent after its norm", "kv_a_layernorm; what the cache gets", "kv_a_layernorm (kv_c_normed)"),
    Name("attn.k_pe", ("n", "r"), "rotary key after rotation", "what the cache gets", "rotary_emb, second of two results (k_pe)"),
    Name("attn.o", ("n", "h", "v"), "what the heads give", "input of self_attn.o_proj", "input of o_proj"),
    Name("attn.out", ("n", "d"), "o_proj of it", "self_attn", "o_proj, after the all-reduce"),
    Name(
        "mid",
        ("n", "d"),
        "the residual stream after attention",
        "input of post_attention_layernorm",
        "post_attention_layernorm, second of two",
    ),
    Name("mlp.norm", ("n", "d"), "rmsnorm of it", "post_attention_layernorm", "post_attention_layernorm, first of two results"),
    Name("router.logits", ("n", "e"), "gate_weight x", "mlp.gate, first result", "mlp.gate, first result", "moe"),
    Name("router.topk_idx", ("n", "k"), "the chosen experts", "mlp.gate, third result", "topk_ids of the expert selection", "moe", True),
    Name(
        "router.topk_weight",
        ("n", "k"),
        "their weights, with routed_scaling_factor",
        "mlp.gate, second result",
        "topk_weights of the expert selection",
        "moe",
    ),
    Name("experts.out", ("n", "d"), "Σ_k topk_weight FFN_k", "mlp.experts", "mlp.experts, before the shared experts are added", "moe"),
    Name("shared.out", ("n", "d"), "the shared experts", "mlp.shared_experts", "mlp.shared_experts", "shared"),
    Name("mlp.out", ("n", "d"), "the FFN's or both experts' sum", "mlp", "mlp"),
    Name("output", ("n", "d"), "the residual stream after the layer", "the layer", "the next input_layernorm, second of two results"),
    Name("norm", ("n", "d"), "the final norm", "model.norm", "model.norm, first of two results", "none"),
    Name("logits", ("n", "vocab"), "lm_head of it", "lm_head", "compute_logits (the logits processor)", "none"),
)
BY_NAME = {n.name: n for n in NAMES}


def short_name(name: str) -> tuple[int | None, str]:
    """The layer (None outside the layers) and the name within it"""
    parts = name.split(".", 2)
    return (int(parts[1]), parts[2]) if len(parts) == 3 and parts[0] == "layer" and parts[1].isdecimal() else (None, name)


def full_name(layer: int | None, name: str) -> str:
    return name if layer is None else f"layer.{layer}.{name}"


def has(config: Config, layer: int, where: str) -> bool:
    """Whether a layer has a tensor that stands `where`"""
    moe = not is_dense(config, layer)
    return {"every": True, "none": False, "moe": moe, "shared": moe and config.n_shared_experts > 0}[where]


def names_of(config: Config) -> Iterator[tuple[int | None, Name]]:
    """Every canonical tensor of a model, in the order in which it comes to be"""
    yield None, BY_NAME["embed"]
    for i in range(config.num_hidden_layers):
        yield from ((i, n) for n in NAMES if has(config, i, n.where))
    yield from ((None, BY_NAME[name]) for name in ("norm", "logits"))


def extents(config: Config, n: int) -> dict[str, int]:
    """What the letters stand for"""
    return {
        "n": n,
        "d": config.hidden_size,
        "h": config.num_attention_heads,
        "q": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "c": config.kv_lora_rank,
        "r": config.qk_rope_head_dim,
        "v": config.v_head_dim,
        "e": config.n_routed_experts,
        "k": config.num_experts_per_tok,
        "vocab": config.vocab_size,
    }


@dataclass
class Trace:
    """A trace that has been read: tensors by canonical name, float32 (bfloat16 widened) or int64, in their canonical shapes."""

    path: Path
    engine: str
    precision: str
    ids: np.ndarray
    positions: np.ndarray
    tensors: Mapping[str, np.ndarray]
    absent: Mapping[str, str] = field(default_factory=dict)
    planted: str = ""
    fused: bool = False  # the shared experts are one more routed expert: its column has been taken out of topk_idx and topk_weight


def read_trace(path: Path, config: Config) -> Trace:
    """A trace of a model. A ValueError names the file, the tensor, what was found and what was expected."""
    about = _about(path, config)
    ids = np.array(about["ids"], dtype=np.int64)
    positions = np.array(about.get("positions") or range(len(ids)), dtype=np.int64)
    letters = extents(config, len(ids))
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise UsageError(f"{path}: there is no *.safetensors; expected the tensors beside trace.json")
    expected = {full_name(i, n.name): n for i, n in names_of(config)}
    absent = {name: about["absent"].get(short_name(name)[1]) for name in expected if short_name(name)[1] in about["absent"]}
    tensors: dict[str, np.ndarray] = {}
    found: dict[str, Path] = {}
    for file in files:
        with Reader(file) as reader:
            for name in reader.entries:
                _known(file, name, expected, found)
                found[name] = file
                tensors[name] = _tensor(reader, name, expected[name], letters)
    for name, about_it in expected.items():
        if name not in tensors and name not in absent:
            raise UsageError(_missing(path, name, about_it, letters, len(tensors), len(expected)))
    fused = _without_shared(path, tensors, letters)
    return Trace(path, about["engine"], about["precision"], ids, positions, tensors, absent, about.get("planted", ""), fused)


def _about(path: Path, config: Config) -> dict[str, Any]:
    """trace.json, checked"""
    file = path / "trace.json"
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"{path}: there is no trace.json; expected a trace (leadline trace record, or the recipe of trace --help)"
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} is no JSON: {error}") from error
    if not isinstance(about, dict) or about.get("schema") != SCHEMA:
        raise UsageError(f"{file}: schema is {about.get('schema') if isinstance(about, dict) else about!r}; expected {SCHEMA!r}")
    if extra := sorted(about.keys() - FIELDS):
        near = difflib.get_close_matches(extra[0], FIELDS, n=1)
        raise UsageError(f"{file}: unknown field {extra[0]!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    if about.get("precision") not in PRECISIONS:
        raise UsageError(f"{file}: precision is {about.get('precision')!r}; expected one of {', '.join(PRECISIONS)}")
    if not isinstance(about.get("engine"), str) or not isinstance(about.get("planted", ""), str):
        raise UsageError(f"{file}: engine is {about.get('engine')!r}; expected its name and version")
    _integers(file, "ids", about.get("ids"), config.vocab_size)
    if about.get("positions") is not None:
        _integers(file, "positions", about["positions"], HIGHEST)
        if len(about["positions"]) != len(about["ids"]):
            raise UsageError(f"{file}: positions has {len(about['positions'])} entries; expected {len(about['ids'])}, as many as ids")
    absent = about.setdefault("absent", {})
    if not isinstance(absent, dict) or not all(isinstance(v, str) for v in absent.values()):
        raise UsageError(f"{file}: absent is {short(absent)}; expected the reason by canonical name")
    for name in absent:
        if name not in BY_NAME or name in NEEDED:
            near = difflib.get_close_matches(name, BY_NAME, n=1)
            hint = f"{name} must be there" if name in NEEDED else f"did you mean {near[0]!r}?" if near else "expected a canonical name"
            raise UsageError(f"{file}: absent names {name!r}; {hint}")
    return about


def _integers(file: Path, name: str, values: Any, end: int) -> None:
    if not isinstance(values, list) or not values or not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise UsageError(f"{file}: {name} is {short(values)}; expected a list of integers")
    for i, v in enumerate(values):
        if not 0 <= v < end:
            raise UsageError(f"{file}: {name}[{i}] is {v}; expected 0 to {end - 1}")


def _known(file: Path, name: str, expected: Mapping[str, Name], found: Mapping[str, Path]) -> None:
    if name in found:
        raise UsageError(f"{file}: {name} is in {found[name].name} too; expected each tensor once")
    if name not in expected:
        near = difflib.get_close_matches(name, expected, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {len(expected)} names, as layer.0.attn.norm"
        raise UsageError(f"{file}: {name} is no canonical name of this model; {hint}")


def _missing(path: Path, name: str, about: Name, letters: Mapping[str, int], count: int, total: int) -> str:
    shape = ", ".join(str(letters[d]) for d in about.dims)
    mend = "" if about.name in NEEDED else f", or {about.name!r} under absent in trace.json with the reason"
    return f"{path}: {name} is missing ({count} of {total} tensors found); expected [{','.join(about.dims)}] = [{shape}]{mend}"


def _tensor(reader: Reader, name: str, about: Name, letters: Mapping[str, int]) -> np.ndarray:
    """The tensor in its canonical shape; a choice may have one column more."""
    entry = reader.entry(name)
    wanted = ("I64", "I32", "I16", "I8", "U32", "U16", "U8") if about.index else ("F32", "BF16", "F16", "F64")
    if entry.dtype not in wanted:
        reader.refuse(f"has dtype {entry.dtype}", f"one of {', '.join(wanted)}", name)
    shape = tuple(letters[d] for d in about.dims)
    rows, width = shape[0], math.prod(shape[1:])
    flat = [(rows, width)]
    if about.dims == ("n", "k"):
        flat.append((rows, width + 1))
    if about.name == "logits":
        flat += [(count, width) for count in range(1, rows)]
    found = entry.shape[1:] if entry.shape[:1] == (1,) and entry.shape not in (shape, *flat) else entry.shape
    if found != shape and found not in flat:
        reader.refuse(f"has shape {list(entry.shape)}", f"[{','.join(about.dims)}] = {list(shape)}", name)
    values = reader.array(name)
    if entry.dtype == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    values = values.reshape(shape if found == shape else found if len(shape) == 2 else shape)
    return values.astype(np.int64 if about.index else np.float64 if entry.dtype == "F64" else np.float32)


def _without_shared(path: Path, tensors: dict[str, np.ndarray], letters: Mapping[str, int]) -> bool:
    """Whether the shared experts are one more routed expert, in the last column of each choice; takes that column out."""
    k, e, found = letters["k"], letters["e"], False
    for name in [n for n in tensors if n.endswith("router.topk_idx") and tensors[n].shape[1] > k]:
        if np.any(tensors[name][:, -1] < e):
            row = int(np.argmax(tensors[name][:, -1] < e))
            raise UsageError(
                f"{path}: {name}[{row}, {k}] is {tensors[name][row, -1]}; expected {k} columns, or a shared expert ({e} or more)"
            )
        found, tensors[name] = True, tensors[name][:, :-1]
    for name in [n for n in tensors if n.endswith("router.topk_weight") and tensors[n].shape[1] > k]:
        if not found:
            raise UsageError(f"{path}: {name} has {k + 1} columns; expected {k}, as topk_idx has")
        tensors[name] = tensors[name][:, :-1]
    return found
