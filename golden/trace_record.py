"""Traces of Hugging Face transformers' own models: hooks on their modules, every file written whole or not at all."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..ref.config import Config
from ..ref.names import shapes
from .checkpoint import Checkpoint
from .errors import UsageError
from .safetensor_file import Writer
from .trace_names import SCHEMA, full_name, names_of
from .whole import whole

DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
ENGINES = ("transformers",)


class Recorded(NamedTuple):
    """What record did: the shapes by name, and whether a planted bug changes anything on this prompt."""

    shapes: dict[str, tuple[int, ...]]
    shows: bool


def plants() -> dict[str, tuple[str, Callable[..., None]]]:
    """Bugs that can be planted, by the catalogue's id: what is done to which modules of a layer"""

    def mask_filled_with_zero(layer: Any, config: Any) -> None:
        """The gate's own code, in which every fill is 0"""
        import torch

        own, fill = layer.mlp.gate.forward, torch.Tensor.masked_fill

        def forward(*args: Any, **kwargs: Any) -> Any:
            torch.Tensor.masked_fill = lambda self, mask, value: fill(self, mask, 0.0)  # type: ignore[method-assign,assignment]
            try:
                return own(*args, **kwargs)
            finally:
                torch.Tensor.masked_fill = fill  # type: ignore[method-assign]

        layer.mlp.gate.forward = forward

    def bias_ignored(layer: Any, config: Any) -> None:
        layer.mlp.gate.e_score_correction_bias.zero_()

    def mscale_missing(layer: Any, config: Any) -> None:
        layer.self_attn.scaling = layer.self_attn.qk_head_dim**-0.5

    def eps_hardcoded(layer: Any, config: Any) -> None:
        layer.input_layernorm.variance_epsilon = 1e-5

    def shared_scaled(layer: Any, config: Any) -> None:
        layer.mlp.shared_experts.register_forward_hook(lambda module, args, y: y / config.routed_scaling_factor)

    def halves(layer: Any, config: Any) -> None:
        layer.self_attn.config = type(config).from_dict({**config.to_dict(), "rope_interleave": False})
        layer.self_attn.config._attn_implementation = config._attn_implementation

    return {
        "group-mask-zero": ("gate", mask_filled_with_zero),
        "bias-ignored": ("gate", bias_ignored),
        "yarn-mscale-missing": ("self_attn", mscale_missing),
        "rmsnorm-eps-hardcoded": ("input_layernorm", eps_hardcoded),
        "shared-expert-inv-scaled": ("shared_experts", shared_scaled),
        "rope-neox-on-interleaved": ("self_attn", halves),
    }


def plant(model: Any, bug: str) -> None:
    """BUG, or BUG@LAYER: makes a model wrong in every layer that has the part, or in one."""
    known = plants()
    id, _, where = bug.partition("@")
    if id not in known:
        raise UsageError(f"cannot plant {id!r}; expected one of {', '.join(known)} (and @LAYER for one layer)")
    layers = model.model.layers
    if where and not (where.isdecimal() and int(where) < len(layers)):
        raise UsageError(f"cannot plant {bug!r}; expected a layer from 0 to {len(layers) - 1} after the @")
    part, change = known[id]
    chosen = [layers[int(where)]] if where else list(layers)
    chosen = [x for x in chosen if any(name.rsplit(".", 1)[-1] == part for name, _ in x.named_modules())]
    if not chosen:
        raise UsageError(f"cannot plant {bug!r}; there is no {part} there")
    import torch

    with torch.no_grad():
        for layer in chosen:
            change(layer, model.config)


def record(
    directory: Path,
    out: Path,
    ids: Sequence[int],
    *,
    engine: str = "transformers",
    dtype: str = "float32",
    bug: str | None = None,
) -> Recorded:
    """Runs a checkpoint's prompt through an engine and writes the trace `out`, a new directory."""
    if engine not in ENGINES:
        raise UsageError(f"unknown engine {engine!r}; expected {', '.join(ENGINES)}, or write the trace yourself (`leadline trace --help`)")
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out}: is there already; expected a new directory")
    config = Config.from_pretrained(directory)
    for i, v in enumerate(ids):
        if not 0 <= v < config.vocab_size:
            raise UsageError(f"ids[{i}] is {v}; expected 0 to {config.vocab_size - 1}")
    if not ids:
        raise UsageError("there are no ids; expected one at least")
    model, versions = load_model(directory, dtype)
    seen, shows = run(model, config, ids), True
    if bug:
        right = seen["logits"]
        plant(model, bug)
        seen = run(model, config, ids)
        shows = bool((seen["logits"] != right).any())
    about = {"schema": SCHEMA, "engine": f"transformers {versions['transformers']}", "precision": DTYPES[dtype], "ids": list(ids)}
    about |= {"versions": versions} | ({"planted": bug} if bug else {})
    write(out, seen, about)
    return Recorded({name: tuple(x.shape) for name, x in seen.items()}, shows)


def load_model(directory: Path, dtype: str) -> tuple[Any, dict[str, str]]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import torch
        import transformers
    except ImportError:
        raise UsageError('recording transformers needs it: pip install "leadline[peers]"') from None
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    versions = {"transformers": transformers.__version__, "torch": str(torch.__version__)}
    try:
        with readable(directory) as source:
            model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    except (ImportError, OSError, ValueError) as error:
        raise UsageError(f"{directory}: transformers {transformers.__version__} does not load it: {str(error)[:300]}") from error
    return model.eval(), versions


@contextmanager
def readable(directory: Path) -> Iterator[Path]:
    """The directory; for FP8 weights, which transformers reads on a GPU alone, another for a while: the same weights dequantised."""
    about = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if not about.pop("quantization_config", None):
        yield directory
        return
    with tempfile.TemporaryDirectory() as made, Checkpoint(directory) as model:
        names = list(shapes(model.config))
        with Writer(Path(made) / "model.safetensors", [(n, "F32", model.entry(n).shape) for n in names], {"format": "pt"}) as file:
            for name in names:
                file.write(name, model[name])
        (Path(made) / "config.json").write_text(json.dumps(about), encoding="utf-8")
        yield Path(made)


def run(model: Any, config: Config, ids: Sequence[int]) -> dict[str, Any]:
    """Every canonical tensor of one forward pass, in canonical order"""
    import torch

    seen: dict[str, Any] = {}

    def see(name: str, x: Any) -> None:
        seen[name] = x.detach().clone()[0] if x.ndim > 2 and x.shape[0] == 1 else x.detach().clone()

    with ExitStack() as hooks:
        for name, module, place in hooked(model, config):
            before, pick = place.startswith("in"), int(place[-1]) if place[-1].isdecimal() else None

            def hook(module: Any, args: Any, *y: Any, name: str = name, before: bool = before, pick: int | None = pick) -> None:
                value = args[0] if before else y[0]
                value = value[pick or 0] if isinstance(value, tuple) else value
                see(name, value)

            handle = module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook)
            hooks.callback(handle.remove)
        hooks.enter_context(queries_seen(model, see))
        with torch.no_grad():
            model(torch.tensor([list(ids)]), past_key_values=cache_seen(see), use_cache=True)
    heads = config.num_attention_heads, config.v_head_dim
    for name in [n for n in seen if n.endswith("attn.o")]:
        seen[name] = seen[name].reshape(len(ids), *heads)
    wanted = [full_name(i, n.name) for i, n in names_of(config)]
    if missing := [n for n in wanted if n not in seen]:
        raise UsageError(f"{type(model).__name__} did not show {missing[0]}; expected a DeepseekV2 or DeepseekV3 of transformers 5")
    return {n: seen[n] for n in wanted}


def hooked(model: Any, config: Config) -> Iterator[tuple[str, Any, str]]:
    """Canonical name, module, and where the tensor passes: `in`, `out`, or one of several results"""
    yield "embed", model.model.embed_tokens, "out"
    for i, layer in enumerate(model.model.layers):
        at = f"layer.{i}"
        yield f"{at}.attn.norm", layer.input_layernorm, "out"
        yield f"{at}.attn.o", layer.self_attn.o_proj, "in"
        yield f"{at}.attn.out", layer.self_attn, "out0"
        yield f"{at}.mid", layer.post_attention_layernorm, "in"
        yield f"{at}.mlp.norm", layer.post_attention_layernorm, "out"
        if hasattr(layer.mlp, "gate"):
            for place, name in enumerate(("logits", "topk_weight", "topk_idx")):
                yield f"{at}.router.{name}", layer.mlp.gate, f"out{place}"
            yield f"{at}.experts.out", layer.mlp.experts, "out"
            if config.n_shared_experts:
                yield f"{at}.shared.out", layer.mlp.shared_experts, "out"
        yield f"{at}.mlp.out", layer.mlp, "out"
        yield f"{at}.output", layer, "out0"
    yield "norm", model.model.norm, "out"
    yield "logits", model.lm_head, "out"


def cache_seen(see: Callable[[str, Any], None]) -> Any:
    """A cache that shows what it is given: c_kv and the rotated k_pe"""
    from transformers import DynamicCache

    class Seen(DynamicCache):
        def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            if key_states.shape[1] != 1:
                raise UsageError("this transformers caches expanded keys; expected one that caches c_kv and k_pe (transformers 5)")
            see(f"layer.{layer_idx}.attn.c_kv", key_states[:, 0])
            see(f"layer.{layer_idx}.attn.k_pe", value_states[:, 0])
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    return Seen()


@contextmanager
def queries_seen(model: Any, see: Callable[[str, Any], None]) -> Iterator[None]:
    """Shows the query that every attention function is called with."""
    import sys

    home: Any = sys.modules[type(model).__module__]
    functions = home.ALL_ATTENTION_FUNCTIONS

    class Shown:
        def get_interface(self, *args: Any, **kwargs: Any) -> Any:
            own = functions.get_interface(*args, **kwargs)

            def attend(module: Any, query: Any, *rest: Any, **more: Any) -> Any:
                see(f"layer.{module.layer_idx}.attn.q", query.transpose(1, 2))
                return own(module, query, *rest, **more)

            return attend

    home.ALL_ATTENTION_FUNCTIONS = Shown()
    try:
        yield
    finally:
        home.ALL_ATTENTION_FUNCTIONS = functions


def stored(x: Any) -> tuple[str, np.ndarray]:
    """A torch tensor as a safetensors dtype and NumPy values"""
    import torch

    x = x.to("cpu").contiguous()
    if x.dtype == torch.bfloat16:
        return "BF16", x.view(torch.int16).numpy().view(np.uint16)
    names = {torch.float32: "F32", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64", torch.int32: "I32"}
    return names[x.dtype], x.numpy()


def write(out: Path, tensors: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """The directory, whole or not at all"""
    parent = Path(os.path.abspath(out)).parent
    if not parent.is_dir():
        raise UsageError(f"{out}: there is no {parent}; expected a directory to write it in")
    values = {name: x if isinstance(x, tuple) else stored(x) for name, x in tensors.items()}
    with whole(out) as part:
        with Writer(part / "trace.safetensors", [(name, dtype, x.shape) for name, (dtype, x) in values.items()]) as file:
            for name, (_, x) in values.items():
                file.write(name, x)
        (part / "trace.json").write_text(json.dumps(about, ensure_ascii=False) + "\n", encoding="utf-8")
