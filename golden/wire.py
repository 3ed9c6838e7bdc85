"""Arrays as programs and libraries in other languages have them: in the dtype that is claimed, 16-bit floats included."""

import numpy as np

from ..ref.cast import decode, encode
from ..ref.formats import BF16, Format
from ..ref.op import Tensor
from .judge import Returned
from .precision import Precision

# NumPy's names and safetensors' for what both have.
NAMES = {"bool": "BOOL"} | {f"{kind}{bits}": f"{kind[0].upper()}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)}
NAMES |= {f"float{bits}": f"F{bits}" for bits in (16, 32, 64)}


def pack(x: np.ndarray, fmt: Format) -> tuple[str, np.ndarray]:
    """The dtype's name in safetensors and the array in it: floats in the format (bf16 as its bits, in uint16), all else as it is."""
    if x.dtype.kind == "f" and fmt.name == "bf16":
        return "BF16", encode(BF16, x)
    if x.dtype.kind == "f" and fmt.name == "fp16":
        x = x.astype(np.float16)
    return NAMES[x.dtype.name], x


def unpack(dtype: str, x: np.ndarray, kind: str) -> Returned:
    """An output on a NumPy carrier. Narrow floats where codes are due give their bits; a dtype that no output may have keeps its name."""
    if dtype == "BF16":
        return Returned(x, "uint16") if kind == "code" else Returned(decode(BF16, x).astype(np.float32), "bfloat16")
    if dtype == "F16":
        return Returned(x.view(np.uint16), "uint16") if kind == "code" else Returned(x.astype(np.float32), "float16")
    return Returned(x, dtype if dtype.startswith("F8") and kind != "code" else str(x.dtype))


def dtype_of(tensor: Tensor, truth: np.ndarray, p: Precision) -> str:
    """The safetensors dtype that an output is due in: real numbers as claimed, exact ones on their carrier, all else as the reference's."""
    if tensor.kind in ("real", "const", "exact"):
        narrow = {"bf16": "BF16", "fp16": "F16"}.get(p.io.name)
        return narrow if narrow and tensor.kind == "real" else NAMES[p.carrier]
    return NAMES[truth.dtype.name]


def plain(text: str, limit: int = 300) -> str:
    """What a stranger wrote, as part of one line of ours: nothing that a terminal would obey, nothing long."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return line if len(line) <= limit else f"{line[: limit - 1]}…"
