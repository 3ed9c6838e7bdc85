"""Small checkpoints that anyone can make again, byte for byte: weights drawn by integers from a seed and their own names."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..ref.config import PRESETS, YARN, Config
from ..ref.names import shapes
from .draw import Source
from .safetensor_file import Writer, size_of
from .subject import load
from .weights import BLOCK, SUFFIX, grid
from .whole import whole

SHARD = {"tiny-v3": 1 << 21, "tiny-v3.1": 1 << 21}  # bytes of a shard where it is not 4 GB
LARGE = 4 << 30
CHUNK = 1 << 19  # elements drawn at a time, rounded up to whole rows of blocks
THREADS = 2
HEAD = 3.0  # the head's gain: logits of deviation 3, so that some tokens are likelier than others
BYTES = ("<s>", "</s>")  # the tokenizer's first tokens, before the 256 bytes

Progress = Callable[[int, int, str], Any]


class Made(NamedTuple):
    """What make did."""

    parameters: int
    tensors: int
    files: int
    bytes: int


def configured(
    preset: str,
    layers: int | None = None,
    dense: int | None = None,
    experts: int | None = None,
    vocab: int | None = None,
    wide: bool = False,
) -> Config:
    """A preset, perhaps of fewer layers, experts and tokens (with layers, it has no MTP layers); if wide, of DeepSeek-V3's widths."""
    given = {"num_hidden_layers": layers, "first_k_dense_replace": dense, "n_routed_experts": experts, "vocab_size": vocab}
    given = {name: value for name, value in given.items() if value is not None}
    config = Config.preset(preset)
    if wide:
        config = dataclasses.replace(PRESETS["v3"], scale_fmt=config.scale_fmt)
    if layers is not None:
        if layers < 1:
            raise ValueError(f"layers is {layers}; expected at least 1")
        given["num_nextn_predict_layers"] = 0
        given.setdefault("first_k_dense_replace", min(config.first_k_dense_replace, max(layers - 1, 0)))
    config = dataclasses.replace(config, **given)
    config.check(preset)
    return config


def config_json(config: Config, fp8: bool) -> dict[str, Any]:
    """config.json as DeepSeek publishes it; transformers takes it for DeepseekV3ForCausalLM or DeepseekV2ForCausalLM."""
    fields = dataclasses.asdict(config)
    yarn = {name: fields.pop(name) for name in YARN}
    yarn = {name: float(value) if name != "original_max_position_embeddings" else value for name, value in yarn.items()}
    scale_fmt = fields.pop("scale_fmt")
    family = "V3" if config.topk_method == "noaux_tc" else "V2"
    found: dict[str, Any] = {"architectures": [f"Deepseek{family}ForCausalLM"], "model_type": f"deepseek_{family.lower()}", **fields}
    found |= {"num_key_value_heads": config.num_attention_heads, "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0}
    found |= {"bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True}
    found["rope_scaling"] = {"type": "yarn", **yarn} if config.factor != 1 else None
    if fp8:
        about = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
        found["quantization_config"] = about | ({"scale_fmt": scale_fmt} if scale_fmt else {})
    elif scale_fmt:
        found["scale_fmt"] = scale_fmt
    return found


def tokenizer_json() -> dict[str, Any]:
    """A tokenizer of bytes, in the format of the package tokenizers: token 2 + i is byte i."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))  # the characters that byte-level tokenizers show the other bytes as
    letters = [chr(i) if i in printable else chr(next(others)) for i in range(256)]
    vocab = {token: i for i, token in enumerate((*BYTES, *letters))}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": token, **special} for i, token in enumerate(BYTES)],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }


def is_fp8(name: str) -> bool:
    """Whether a released FP8 checkpoint stores the weight so: the linear layers of attention and experts, not the gate nor eh_proj."""
    return name.endswith(("_proj.weight", "_with_mqa.weight")) and not name.endswith(".eh_proj.weight")


def drawn(name: str, shape: tuple[int, ...], seed: int, rows: slice) -> NDArray[np.float32]:
    """Rows of a weight, each number a function of the seed, the name and its place.

    Four 16-bit uniforms, summed, centred (variance 1, within ±3.5, never 0, no function that machines could disagree on), times
    fan_in^(-1/2). Embeddings 1, the head HEAD times that; norms lie in 7/8 to 9/8; the correction bias has the deviation 1/16, about 0
    in even layers and about -1 in odd ones: which experts are right is the same, but a router that needs positive scores goes wrong.
    """
    width = int(np.prod(shape[1:]))
    source = Source(f"leadline/checkpoint/1 {seed} {name}")
    start, count = rows.start * width, (rows.stop - rows.start) * width
    source.philox.advance(start // 4)
    words = source.words(start % 4 + count)[start % 4 :]
    mask = np.uint64(0x0000FFFF0000FFFF)
    sums = ((words >> np.uint64(16)) & mask) + (words & mask)
    sums = (sums >> np.uint64(32)) + (sums & np.uint64(0xFFFFFFFF))
    x = (2 * sums.astype(np.int32) - 262139).astype(np.float32)  # odd, so never 0; of variance 4 · 4 (2^32 - 1)/12
    if len(shape) == 1:
        at = np.float32(1 if "norm" in name else -(int(name.split(".")[2]) % 2))
        x = at + x * np.float32(0.125 / 262144 if "norm" in name else 0.0625 / 75674)
    else:
        gain = HEAD if name.endswith(("lm_head.weight", "shared_head.head.weight")) else 1.0
        x *= np.float32(gain / 75674 * (1.0 if "embed_tokens" in name else shape[1] ** -0.5))
    return x.reshape(rows.stop - rows.start, *shape[1:])


def bf16_bits(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """To nearest, ties to even."""
    bits = x.view(np.uint32)
    return ((bits + ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)) >> np.uint32(16)).astype(np.uint16)


def pieces(name: str, shape: tuple[int, ...], seed: int, recipe: str | None, helpers: ThreadPoolExecutor) -> Iterator[tuple[Any, Any]]:
    """A weight row by row of blocks: BF16 bits and None, float32 values and None (the bias), or FP8 codes and scales."""
    quantize = load("leadline.kernels.cpu.fp8_block").source.quantize_block if recipe else None
    width = max(int(np.prod(shape[1:])), 1)
    rows = -(-CHUNK // (width * BLOCK)) * BLOCK

    def make(first: int) -> tuple[Any, Any]:
        x = drawn(name, shape, seed, slice(first, min(first + rows, shape[0])))
        if stored_as(name) == "F32":
            return x, None
        bits = bf16_bits(x)
        if quantize is None:
            return bits, None
        return quantize(np.left_shift(bits, 16, dtype=np.uint32).view(np.float32), recipe=recipe)

    waiting = []
    for first in range(0, shape[0], rows):
        waiting.append(helpers.submit(make, first))
        if len(waiting) > THREADS:
            yield waiting.pop(0).result()
    for ready in waiting:
        yield ready.result()


def stored_as(name: str) -> str:
    return "F32" if name.endswith("e_score_correction_bias") else "BF16"


def planned(config: Config, fp8: bool, shard: int) -> list[list[tuple[str, str, tuple[int, ...]]]]:
    """Each file's tensors. A file is full once it has `shard` bytes: after a weight, mostly, so its scales lie in the next."""
    files: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    full = 0
    for name, shape in shapes(config, mtp=True).items():
        own = [(name, "F8_E4M3", shape), (name + SUFFIX, "F32", grid(shape))] if fp8 and is_fp8(name) else [(name, stored_as(name), shape)]
        for tensor in own:
            size = size_of(*tensor[1:]) or 0
            if full >= shard:
                files.append([])
                full = 0
            files[-1].append(tensor)
            full += size
    return files


def make(
    directory: str | os.PathLike[str],
    config: Config,
    *,
    fp8: bool = False,
    seed: int = 0,
    shard: int = LARGE,
    progress: Progress | None = None,
) -> Made:
    """Writes a checkpoint of `config`; the same arguments make the same bytes anywhere. Nothing is held but a piece of one weight.

    The directory appears whole when all is done; it must not be there yet, or be empty. ValueError, and nothing is left, otherwise.
    """
    target = Path(directory)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target}: {'is not empty' if target.is_dir() else 'is no directory'}; expected a new or an empty directory")
    parent = Path(os.path.abspath(target)).parent
    if not parent.is_dir():
        raise ValueError(f"{target}: there is no {parent}; expected a directory to make it in")
    files = planned(config, fp8, shard)
    total = sum(size_of(dtype, shape) or 0 for file in files for _, dtype, shape in file)
    if total > (free := shutil.disk_usage(parent).free):
        raise ValueError(f"{target}: would have {total:,} bytes; expected at most the {free:,} that are free there")
    with whole(target) as part:
        _write(part, files, config, fp8, seed, total, progress)
    weights = [shape for file in files for name, _, shape in file if not name.endswith(SUFFIX)]
    size = sum(p.stat().st_size for p in target.iterdir())
    return Made(sum(int(np.prod(s)) for s in weights), len(weights), len(files), size)


def _write(part: Path, files: list, config: Config, fp8: bool, seed: int, total: int, progress: Progress | None) -> None:
    recipe = ("deepgemm-ue8m0" if config.scale_fmt == "ue8m0" else "v3") if fp8 else None
    named = ["model.safetensors"] if len(files) == 1 else [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    _json(part / "config.json", config_json(config, fp8))
    if config.vocab_size >= 256 + len(BYTES):
        _json(part / "tokenizer.json", tokenizer_json())
        _json(part / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BYTES[0], "eos_token": BYTES[1]})
    if len(files) > 1:
        where = {name: file for file, tensors in zip(named, files, strict=True) for name, _, _ in tensors}
        _json(part / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    done, scales = 0, {}
    with ThreadPoolExecutor(THREADS) as helpers:
        for file, tensors in zip(named, files, strict=True):
            with Writer(part / file, tensors, {"format": "pt"}) as out:
                for name, dtype, shape in tensors:
                    if progress:
                        progress(done, total, name)
                    if name in scales:
                        out.write(name, scales.pop(name))
                        continue
                    found: list[Any] = []
                    parts = pieces(name, shape, seed, recipe if dtype == "F8_E4M3" else None, helpers)
                    for written in out.stream(name, (found.append(scale) or values for values, scale in parts)):
                        done += written
                    if dtype == "F8_E4M3":
                        scales[name + SUFFIX] = np.concatenate(found)
    if progress:
        progress(total, total, "")


def _json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


TINY = tuple(name for name in PRESETS if name.startswith("tiny-"))
