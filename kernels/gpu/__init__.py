"""The reference's ops on a CUDA GPU (Numba-CUDA, made to be read), each under its name: ``cast.e4m3fn``, ``rmsnorm``...

NumPy arrays are copied there and back; CuPy arrays, and whatever has ``__cuda_array_interface__``, stay there and give CuPy arrays. Results
are new arrays. Names, attributes and errors are those of ``leadline.kernels.cpu``. With NUMBA_ENABLE_CUDASIM=1, set before Numba is first
imported, the same kernels run in Numba's simulator: threads in turn, NumPy arrays. Importing compiles nothing and needs no GPU; an op
compiles at its first call, and where it cannot run it says in one line what is missing. Where ``leadline.kernels.gpu.cuda`` has a faster
kernel for a call (its FAST), that one is launched.
"""

from . import cast, fp8, router
from ._device import check_device, heading
from .cast import decode, encode
from .mla_decode import mla_decode, mla_decode_fp8
from .moe_permute import moe_permute, moe_permute_bwd, moe_unpermute, moe_unpermute_bwd
from .norm import rmsnorm, rmsnorm_bwd
from .rotary import rope, rope_bwd
from .swiglu import swiglu, swiglu_bwd

RUN: frozenset[str] = frozenset()  # the ops that have passed on a GPU; the others have in the simulator alone

__all__ = [
    "RUN",
    "cast",
    "check_device",
    "decode",
    "encode",
    "fp8",
    "heading",
    "mla_decode",
    "mla_decode_fp8",
    "moe_permute",
    "moe_permute_bwd",
    "moe_unpermute",
    "moe_unpermute_bwd",
    "rmsnorm",
    "rmsnorm_bwd",
    "rope",
    "rope_bwd",
    "router",
    "swiglu",
    "swiglu_bwd",
]
