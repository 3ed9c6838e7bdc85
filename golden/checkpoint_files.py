"""What a checkpoint's directory must hold, read and refused by name: config.json, the index, the shards."""

import json
import mmap
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

from ..ref.config import Config
from .safetensor_file import Reader, short

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ARCHITECTURES = {"DeepseekV2ForCausalLM": "deepseek_v2", "DeepseekV3ForCausalLM": "deepseek_v3"}
MODEL_TYPES = (*ARCHITECTURES.values(), "kimi_k2")
# What a config.json leaves out has the value of its architecture's class. Config's own are those of DeepSeek-V3.
V2_DEFAULTS = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 102400,
    "intermediate_size": 11008,
    "moe_intermediate_size": 1407,
    "first_k_dense_replace": 0,
    "max_position_embeddings": 2048,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
}


class Shard(Reader):
    """A file of weights; its pages can be asked for ahead."""

    def expect(self, name: str) -> None:
        """Says that a tensor will be read soon: the system may begin to fetch it, nobody waits."""
        entry = self.entry(name)
        start = self._data + entry.start & -mmap.PAGESIZE
        if self._map is not None and entry.end > entry.start and hasattr(mmap, "MADV_WILLNEED"):
            self._map.madvise(mmap.MADV_WILLNEED, start, self._data + entry.end - start)


def refuse(file: Path, found: str, expected: str) -> NoReturn:
    raise ValueError(f"{file}: {found}; expected {expected}")


def json_of(file: Path, what: str) -> dict[str, Any]:
    """The object in a file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{file}: there is none; expected {what}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {type(error).__name__}: {str(error)[:100]}; expected {what}") from error
    if not isinstance(found, dict):
        refuse(file, f"holds {short(found)}", "a JSON object")
    return found


def read_config(directory: Path) -> tuple[Config, int, dict[str, Any]]:
    """config.json as a Config, the side of FP8's square blocks, and what the file says."""
    if not directory.is_dir():
        refuse(directory, "is no directory", "one with config.json and *.safetensors")
    file = directory / "config.json"
    about = json_of(file, "a model's config.json")
    names, kind = about.get("architectures") or [], about.get("model_type")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        refuse(file, f"architectures is {short(names)}", "a list of names")
    known = [name for name in names if name in ARCHITECTURES]
    if names and not known:
        refuse(file, f"the architecture is {', '.join(names)}", f"one of {', '.join(ARCHITECTURES)}")
    if kind not in MODEL_TYPES and (kind is not None or not known):
        refuse(file, f"model_type is {kind!r}", f"one of {', '.join(MODEL_TYPES)}")
    is_v2 = (known or [kind])[0] in ("DeepseekV2ForCausalLM", "deepseek_v2")
    fields = {name: value for name, value in about.items() if value is not None or name in ("q_lora_rank", "rope_scaling")}
    if "n_shared_experts" in about:
        fields["n_shared_experts"] = about["n_shared_experts"] or 0  # null: none
    config = Config.from_dict({**(V2_DEFAULTS if is_v2 else {}), **fields}, str(file))
    return config, _block(about, file), about


def _block(about: dict[str, Any], file: Path) -> int:
    """The side of the blocks that share a scale."""
    given = about.get("quantization_config")
    if given is None:
        return 128
    if not isinstance(given, dict):
        refuse(file, f"quantization_config is {short(given)}", "an object")
    for name, value in (("quant_method", "fp8"), ("fmt", "e4m3"), ("activation_scheme", "dynamic")):
        if given.get(name, value) != value:
            refuse(file, f"quantization_config.{name} is {given[name]!r}", repr(value))
    size = given.get("weight_block_size", [128, 128])
    if not (isinstance(size, list) and len(size) == 2 and size[0] == size[1] and isinstance(size[0], int) and size[0] > 0):
        refuse(file, f"quantization_config.weight_block_size is {short(size)}", "square blocks, as [128, 128]")
    return size[0]


def index_of(directory: Path) -> tuple[Path, dict[str, str]]:
    """The file that says what there is, and the file of each tensor: the index, or a single file's own header."""
    single, index = directory / SINGLE, directory / INDEX
    if single.exists():  # as transformers: before the index
        with Reader(single) as file:
            return single, dict.fromkeys(file.entries, SINGLE)
    if not index.exists():
        refuse(directory, "has no weights", f"{SINGLE} or {INDEX}")
    found = json_of(index, "an index of shards").get("weight_map")
    if not isinstance(found, dict) or not found:
        refuse(index, f"weight_map is {short(found)}", "an object: the file of each tensor")
    for name, file in found.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            refuse(index, f"{name!r} is in {short(file)}", "the name of a file beside the index")
    return index, found


def open_shards(directory: Path, index: Path, where: dict[str, str], opened: ExitStack) -> dict[str, Shard]:
    """Every file that the index names, each with what the index says is in it."""
    shards: dict[str, Shard] = {}
    for name, file in where.items():
        if file not in shards:
            if not (directory / file).exists():
                refuse(directory / file, "is missing", f"a shard with {name!r} in it, by {index.name}")
            try:
                shards[file] = Shard(directory / file)
            except OSError as error:
                raise ValueError(f"{directory / file}: {error}; expected a file of weights") from error
            opened.callback(shards[file].close)
    for name, file in where.items():
        if name not in shards[file]:
            others = [other for other, shard in shards.items() if name in shard]
            refuse(index, f"{name!r} is in {file}", f"{others[0] if others else 'no file'}, where it is")
    return shards
