"""The reference's ops on the CPU (Numba), each under its name: ``cast.e4m3fn``, ``encode.e4m3fn``, ``fp8.quantize_tile``, ``rmsnorm``...

Importing compiles nothing: an op compiles at its first call, once per machine (the result is cached on disk).
"""

from . import cast, fp8, router
from .cast import decode, encode
from .norm import rmsnorm, rmsnorm_bwd

__all__ = ["cast", "decode", "encode", "fp8", "rmsnorm", "rmsnorm_bwd", "router"]
