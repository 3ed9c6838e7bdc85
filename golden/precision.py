"""What a subject claims to compute in. It fixes the inputs (always exactly representable) and the roundings a correct subject may make."""

import difflib
from dataclasses import dataclass

from ..ref.formats import BF16, FP16, FP32, FP64, Format
from ..ref.op import Tensor


@dataclass(frozen=True)
class Precision:
    """io: what arrays are stored in. work: what every operation rounds to. Sums and products of matrices accumulate in float32 at least."""

    name: str
    io: Format
    work: Format
    meaning: str

    @property
    def accumulate(self) -> Format:
        return FP64 if self.work is FP64 else FP32

    @property
    def carrier(self) -> str:
        """The NumPy dtype that holds the values: NumPy has no bfloat16, so float32 arrays carry its values."""
        return "float64" if self.io is FP64 else "float32"

    def format_of(self, tensor: Tensor) -> Format:
        """Constants (selection bias, scales) are float32 even where activations are 16 bits wide, as in every released checkpoint."""
        return FP32 if tensor.kind == "const" and self.io.bits < 32 else self.io


PRECISIONS = {
    p.name: p
    for p in (
        Precision("fp64", FP64, FP64, "float64 throughout"),
        Precision("fp32", FP32, FP32, "float32 throughout"),
        Precision("bf16", BF16, FP32, "bfloat16 in and out, float32 inside"),
        Precision("bf16-eager", BF16, BF16, "every operation rounds to bfloat16; sums accumulate in float32"),
        Precision("fp16", FP16, FP32, "float16 in and out, float32 inside"),
    )
}


def precision_named(name: str) -> Precision:
    if name not in PRECISIONS:
        near = difflib.get_close_matches(name, PRECISIONS, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(PRECISIONS)}"
        raise ValueError(f"unknown precision {name!r}; {hint}")
    return PRECISIONS[name]
