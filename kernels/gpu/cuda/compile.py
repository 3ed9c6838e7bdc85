"""A .cu file to machine code of one architecture, through NVRTC: no GPU and no driver needed, only the packages of the extra `gpu`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
# Multiplications and additions stay apart and divisions are IEEE's: a fused one would change a code's last bit.
OPTIONS = ("--std=c++17", "--fmad=false", "-Xptxas=-v")
MISSING = "the GPU kernels need CuPy and NVRTC; install them with: python3 -m pip install 'leadline[gpu]'"

Defines = tuple[tuple[str, str | int], ...]


@dataclass(frozen=True)
class Usage:
    """What ptxas says of one kernel."""

    registers: int
    spills: int  # bytes stored
    stack: int


@dataclass(frozen=True)
class Compiled:
    cubin: bytes
    usage: Mapping[str, Usage]


class CompileError(RuntimeError):
    """NVRTC's log, with the file's name."""


def nvrtc() -> Any:
    """cupy.cuda.nvrtc, which needs no driver."""
    try:
        from cupy.cuda import nvrtc as library
    except ImportError as error:
        raise CompileError(MISSING) from error
    try:
        library.getVersion()
    except Exception as error:  # the library itself is not there
        raise CompileError(MISSING) from error
    return library


@lru_cache
def compiled(file: str, defines: Defines, arch: str) -> Compiled:
    """file.cu with -Dname=value for each define."""
    library = nvrtc()
    name = f"{file}.cu"
    options = (f"-arch={arch}", *OPTIONS, *(f"-D{key}={value}" for key, value in defines))
    headers = {path.name.encode(): path.read_bytes() for path in HERE.glob("*.cuh")}  # by name: not from wherever this process stands
    program = library.createProgram((HERE / name).read_text(), name, tuple(headers.values()), tuple(headers))
    try:
        try:
            library.compileProgram(program, options)
        except library.NVRTCError as error:
            raise CompileError(f"{name} for {arch}: {library.getProgramLog(program).strip() or error}") from error
        return Compiled(library.getCUBIN(program), usage_of(library.getProgramLog(program)))
    finally:
        library.destroyProgram(program)


def usage_of(log: str) -> dict[str, Usage]:
    """The kernels that a ptxas log tells of."""
    found = {}
    for part in re.split(r"Compiling entry function '", log)[1:]:
        name = part.split("'")[0]
        stack, spills = re.search(r"(\d+) bytes stack frame", part), re.search(r"(\d+) bytes spill stores", part)
        registers = re.search(r"Used (\d+) registers", part)
        if not (stack and spills and registers):
            raise CompileError(f"the log of kernel {name} does not tell registers and spills")
        found[name] = Usage(int(registers[1]), int(spills[1]), int(stack[1]))
    return found


def says_no_spills(file: str, arch: str) -> bool:
    """Whether the file promises it: "No register spills." of every chip, or "No register spills on sm_80 and sm_90a." of these."""
    said = re.search(r"No register spills(?: on ((?:sm_\w+|and|[, ])+))?\.", (HERE / f"{file}.cu").read_text())
    return said is not None and (said[1] is None or arch in re.findall(r"sm_\w+", said[1]))
