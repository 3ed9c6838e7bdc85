"""kernels.gpu with its readable kernels alone, whatever faster ones there are: `leadline verify leadline.kernels.gpu.readable`."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any


def __getattr__(name: str) -> Any:
    """The op of that name, or a namespace of ops."""
    found = getattr(sys.modules[__package__ or ""], name)
    if isinstance(found, ModuleType | SimpleNamespace):
        return SimpleNamespace(**{k: v.readable for k, v in vars(found).items() if hasattr(v, "readable")})
    return found.readable
