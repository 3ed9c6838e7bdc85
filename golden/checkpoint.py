"""A model's directory as it is published: config.json, shards and their index. Weights by name, one at a time, never the whole model."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..ref.names import shapes
from .checkpoint_files import Shard, index_of, open_shards, read_config
from .safetensor_file import Entry
from .subject import load
from .weights import SUFFIX, scales_of

FLOATS = ("BF16", "F32", "F16")
CODES = "F8_E4M3"
NOT_FINITE = {"BF16": np.uint16(0x7F80), "F16": np.uint16(0x7C00), "F32": np.uint32(0x7F800000), CODES: np.uint8(0x7F)}
PIECE = 1 << 20  # elements looked at at a time


class Problem(NamedTuple):
    """What is wrong with one tensor."""

    kind: str  # missing, extra, shape, dtype, scales or non-finite
    file: Path
    tensor: str
    found: str
    expected: str

    def __str__(self) -> str:
        return f"{self.file}: {self.tensor!r} {self.found}; expected {self.expected}"


class Checkpoint(Mapping[str, NDArray[np.float32]]):
    """The weights of a directory by their names in it, as float32: BF16 widened, FP8 codes times their scales, wherever these lie.

        with Checkpoint("DeepSeek-V3") as model:
            w = model["model.layers.3.self_attn.kv_b_proj.weight"]

    A value is read anew, from the memory map, each time it is asked for, and the pages it lay in are given back: what is held is what
    the caller holds. Scales are no names of the mapping, but part of their weights. `streamed()` is the same mapping for a forward pass.

    ValueError "file: tensor found; expected": config.json, the index or a shard is missing or damaged; with check, also what
    `problems` finds but tensors beyond the model's (an MTP layer may be absent, not half there).
    """

    def __init__(self, directory: str | os.PathLike[str], *, check: bool = True):
        self.path = Path(directory)
        self.config, self.block, self.about = read_config(self.path)
        self.index, where = index_of(self.path)
        with ExitStack() as opened:
            self.shards: dict[str, Shard] = open_shards(self.path, self.index, where, opened)
            self.where: dict[str, Shard] = {name: self.shards[file] for name, file in where.items()}
            if check:
                for problem in self.problems():
                    if problem.kind != "extra":
                        raise ValueError(str(problem))
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Arrays stay valid."""
        self._opened.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.where if not self._is_scale(name))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in self.where and not self._is_scale(str(name))

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        if name not in self:
            raise KeyError(name)
        return self.tensor(name)

    def _is_scale(self, name: str) -> bool:
        return name.endswith(SUFFIX) and name.removesuffix(SUFFIX) in self.where

    def refuse(self, name: str, found: str, expected: str) -> NoReturn:
        raise ValueError(f"{self.where[name].path if name in self.where else self.index}: {name!r} {found}; expected {expected}")

    def entry(self, name: str) -> Entry:
        """dtype and shape as they are stored."""
        if name not in self.where:
            self.refuse(name, "is not in the checkpoint", f"one of its {len(self.where)} tensors")
        return self.where[name].entry(name)

    def is_fp8(self, name: str) -> bool:
        return self.entry(name).dtype == CODES

    @property
    def has_mtp(self) -> bool:
        """Whether the MTP layers that config.json promises are there."""
        first = f"model.layers.{self.config.num_hidden_layers}."
        return self.config.num_nextn_predict_layers > 0 and any(name.startswith(first) for name in self.where)

    def tensor(self, name: str) -> NDArray[np.float32]:
        """A copy of the weight; ValueError if there is none of this name."""
        if self.entry(name).dtype == CODES:
            codes, scale = self.codes(name)
            values = load("leadline.kernels.cpu._weights").source.dequantize_weight(codes, scale, block=self.block)
        else:
            values = self.rows(name, slice(None))
        self.release(name)
        return values

    def codes(self, name: str) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """The codes of an FP8 weight, as they lie in the file, and its scales, each for a block of the weight."""
        if problem := self._pair(name):
            raise ValueError(str(problem))
        shard = self.where[name + SUFFIX]
        return self.where[name].array(name), scales_of(shard.path, name + SUFFIX, shard.array(name + SUFFIX))

    def rows(self, name: str, rows: Any) -> NDArray[np.float32]:
        """Some rows of a tensor that is no FP8 weight (an embedding's, say); the rest is not read."""
        shard, dtype = self.where[name], self.entry(name).dtype
        if dtype not in FLOATS:
            self.refuse(name, f"has dtype {dtype}", f"one of {', '.join((CODES, *FLOATS))}")
        values = shard.array(name)[rows]
        if dtype == "BF16":
            return np.left_shift(values, 16, dtype=np.uint32).view(np.float32)
        return values.astype(np.float32)

    def expect(self, names: Iterable[str]) -> None:
        """Says that these will be read soon, so that the disk can begin."""
        for name in names:
            self.where[name].expect(name)

    def release(self, name: str) -> None:
        self.where[name].release(name)

    def streamed(self) -> Mapping[str, Any]:
        """The same weights for a forward pass: FP8 ones multiply from their codes and are never decoded whole."""
        from .checkpoint_stream import Streamed

        return Streamed(self)

    def problems(self) -> Iterator[Problem]:
        """Whatever config.json and the headers of the shards contradict each other in: missing, extra, shape, dtype, scales."""
        wanted = shapes(self.config, mtp=self.has_mtp)
        for name, shape in wanted.items():
            if name not in self.where:
                elsewhere = [file for file, shard in self.shards.items() if name in shard]
                found = f"is in {elsewhere[0]}, but not in the index" if elsewhere else "is missing"
                yield Problem("missing", self.index, name, found, f"{list(shape)} by config.json")
            elif (entry := self.entry(name)).shape != shape:
                yield Problem("shape", self.where[name].path, name, f"has shape {list(entry.shape)}", f"{list(shape)} by config.json")
            elif entry.dtype not in FLOATS:
                if problem := self._pair(name):
                    yield problem
            elif name + SUFFIX in self.where:
                yield Problem("dtype", self.where[name].path, name, f"has dtype {entry.dtype}", f"{CODES}, as it has scales")
        for name in self.where:
            if name not in wanted and not self._is_scale(name):
                yield Problem("extra", self.where[name].path, name, "is no part of the model", "what config.json asks for")

    def _pair(self, name: str) -> Problem | None:
        """What is wrong with an FP8 weight and its scales, but their values."""
        entry, path = self.entry(name), self.where[name].path
        if entry.dtype != CODES:
            return Problem("dtype", path, name, f"has dtype {entry.dtype}", f"one of {', '.join((CODES, *FLOATS))}")
        if len(entry.shape) != 2:
            return Problem("shape", path, name, f"has shape {list(entry.shape)}", "two dimensions, as an FP8 weight has")
        if name + SUFFIX not in self.where:
            return Problem("scales", path, name, f"has no {name + SUFFIX!r}", "its scales, in this or another shard")
        scale, grid = self.entry(name + SUFFIX), [-(-n // self.block) for n in entry.shape]
        path = self.where[name + SUFFIX].path
        if scale.dtype not in ("F32", "F8_E8M0"):
            return Problem("scales", path, name + SUFFIX, f"has dtype {scale.dtype}", "F32 or F8_E8M0")
        if list(scale.shape) != grid:
            what = f"{grid}, a scale for each {self.block} x {self.block} block of {list(entry.shape)}"
            return Problem("scales", path, name + SUFFIX, f"has shape {list(scale.shape)}", what)
        return None

    def check_values(self, name: str) -> Problem | None:
        """The first number of a weight that is not finite, or of its scales that is none, if there is any."""
        shard, entry = self.where[name], self.entry(name)
        if entry.dtype == CODES:
            scales = self.where[name + SUFFIX]
            values = scales.array(name + SUFFIX)
            try:
                scales_of(scales.path, name + SUFFIX, values)
            except ValueError as error:
                found, _, expected = str(error).partition("; expected ")
                return Problem("non-finite", scales.path, name + SUFFIX, found.partition(f"{name + SUFFIX!r} ")[2], expected)
        ones = NOT_FINITE[entry.dtype]  # the bits that a NaN or an infinity has set
        bits, count, first = shard.raw(name).view(ones.dtype), 0, -1
        for start in range(0, bits.size, PIECE):
            bad = np.flatnonzero((bits[start : start + PIECE] & ones) == ones)
            first = start + int(bad[0]) if bad.size and first < 0 else first
            count += bad.size
        shard.release(name)
        if not count:
            return None
        at = [int(i) for i in np.unravel_index(first, entry.shape)]
        return Problem("non-finite", shard.path, name, f"has {count} of {bits.size} values that are not finite, first at {at}", "none")
