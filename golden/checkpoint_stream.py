"""A forward pass straight from a checkpoint's files: one layer at a time, of its experts one at a time, and it can be taken up again."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..ref.config import Config
from ..ref.linear import linear_fwd
from ..ref.model import layer_fwd
from ..ref.names import MODEL
from ..ref.norm import rmsnorm_fwd
from .checkpoint import Checkpoint
from .safetensor_file import Reader, Writer
from .subject import load
from .weights import Multiplying

Array = NDArray[Any]
Cache = tuple[Array, Array]
Progress = Callable[[int, int, str], Any]


class Coded(Multiplying):
    """An FP8 weight that multiplies from its codes, piece by piece, and then gives their memory back. As an array it is NaN, in no memory:
    nothing may read it but ref's linear, by __linear__."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, name: str) -> "Coded":
        codes, scale = checkpoint.codes(name)

        def product(x: Array) -> Array:
            y = load("leadline.kernels.cpu._coded").source.coded_linear(x, codes, scale, block=checkpoint.block)
            checkpoint.release(name)
            return y

        weight = np.broadcast_to(np.float32(np.nan), codes.shape).view(cls)
        weight.product = product
        return weight


class Streamed(Mapping[str, Any]):
    """A checkpoint's weights for a forward pass in float32: of FP8 weights a Coded, of everything else the values."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.bytes = 0  # of all the weights that were asked for

    def __getitem__(self, name: str) -> Any:
        entry = self.checkpoint.entry(name) if name in self.checkpoint else None
        if entry is None:
            raise KeyError(name)
        self.bytes += entry.end - entry.start
        if name.endswith(".kv_b_proj.weight") or not self.checkpoint.is_fp8(name):  # absorbed attention takes kv_b_proj to pieces
            return self.checkpoint.tensor(name)
        self.checkpoint.expect([name])
        return Coded.of(self.checkpoint, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint)

    def __len__(self) -> int:
        return len(self.checkpoint)

    def __contains__(self, name: object) -> bool:
        return name in self.checkpoint


class Run:
    """The model on one sequence, layer after layer. With `state`, a file, what each finished layer left is kept there until the end.

    ids[s] and, after `forward`, logits[s,v] of the tokens that were new; `append` adds a token, which the next forward runs on the caches.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        ids: Array,
        *,
        weights: Mapping[str, Any] | None = None,
        caching: bool = False,
        state: Path | None = None,
    ):
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self.weights = checkpoint.streamed() if weights is None else weights
        self.ids = check_ids(ids, self.config)
        self.caching, self.state = caching, state
        self.done, self.layer = 0, 0  # tokens that every layer has seen; the layer that the others are to enter
        self.x: Array | None = None
        self.caches: list[Cache] = []
        self.asked = len(self.ids)
        if state is not None and state.exists():
            self._resume(state)

    def append(self, token: int) -> None:
        self.ids = np.append(self.ids, token)

    def forward(self, progress: Progress | None = None) -> Array:
        """logits[n,v] of the tokens that no layer has seen"""
        config, n = self.config, len(self.ids) - self.done
        x = self.checkpoint.rows(MODEL["embed_tokens"], self.ids[self.done :])[None] if self.x is None else self.x
        positions = np.arange(self.done, len(self.ids))[None]
        for i in range(self.layer, config.num_hidden_layers):
            if progress:
                progress(i, config.num_hidden_layers, f"layer {i}")
            held = self.caches[i] if self.done else None
            (x, cache, _), _ = layer_fwd(x, positions, self.weights, i, config, cache=held, absorbed=self.done > 0, keep=False)
            if self.caching:
                self.caches[i : i + 1] = [cache]
            self.x, self.layer = x, i + 1
            if self.state is not None:
                self._save(self.state)
        if progress:
            progress(config.num_hidden_layers, config.num_hidden_layers, "lm_head")
        hidden, _ = rmsnorm_fwd(x[0], self.weights[MODEL["norm"]], eps=config.rms_norm_eps)
        logits, _ = linear_fwd(hidden, self.weights[MODEL["lm_head"]])
        self.x, self.layer, self.done = None, 0, self.done + n
        return logits

    def finish(self) -> None:
        """The state is of no more use."""
        if self.state is not None:
            self.state.unlink(missing_ok=True)

    def _about(self) -> dict[str, str]:
        """What a state must agree with."""
        with open(self.checkpoint.index, "rb") as file:
            index = hashlib.sha256(file.read(1 << 24)).hexdigest()
        files = [[file, os.path.getsize(self.checkpoint.path / file)] for file in self.checkpoint.shards]
        first = [int(i) for i in self.ids[: self.asked]]
        return {"model": hashlib.sha256(json.dumps([repr(self.config), index, files]).encode()).hexdigest(), "ids": json.dumps(first)}

    def _save(self, file: Path) -> None:
        assert self.x is not None
        arrays = {"ids": self.ids, "x": self.x}
        for i, cache in enumerate(self.caches):
            arrays |= dict(zip((f"c_kv.{i}", f"k_pe.{i}"), cache, strict=True))
        about = {**self._about(), "caching": json.dumps(self.caching), "done": str(self.done), "layer": str(self.layer)}
        with Writer(file, [(name, "I64" if name == "ids" else "F32", a.shape) for name, a in arrays.items()], about) as out:
            for name, a in arrays.items():
                out.write(name, np.ascontiguousarray(a))

    def _resume(self, file: Path) -> None:
        with Reader(file) as found:
            about, wanted = found.metadata or {}, {**self._about(), "caching": json.dumps(self.caching)}
            for name, value in wanted.items():
                if about.get(name) != value:
                    what = "another model" if name == "model" else f"{name} {str(about.get(name))[:60]}"
                    raise ValueError(f"{file}: is the state of a run with {what}; expected this run's, or a new file")
            self.ids, self.x = found.array("ids").copy(), found.array("x").copy()
            self.done, self.layer = int(about["done"]), int(about["layer"])
            count = sum(name.startswith("c_kv.") for name in found.entries)
            self.caches = [(found.array(f"c_kv.{i}").copy(), found.array(f"k_pe.{i}").copy()) for i in range(count)]


def check_ids(ids: Any, config: Config) -> Array:
    """ids[s], at least one and each in the vocabulary, or ValueError."""
    found = np.asarray(ids, dtype=np.int64).reshape(-1)
    if not found.size:
        raise ValueError("ids: there are none; expected at least one token")
    bad = np.flatnonzero((found < 0) | (found >= config.vocab_size))
    if bad.size:
        raise ValueError(f"ids[{bad[0]}] is {found[bad[0]]}; expected 0 to {config.vocab_size - 1}, the vocabulary of config.json")
    return found
