"""Compiles every kernel of kernels.gpu to PTX, with the types that its ops launch it with, on a machine without a GPU.

Run by test_kernels_gpu_compile.py in a process of its own: `python ptx.py MAJOR MINOR` prints a JSON line a kernel.
"""

import importlib
import json
import re
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
from leadline.golden.draw import draw_case
from leadline.golden.precision import PRECISIONS
from leadline.golden.subject import Subject
from leadline.golden.vectors import directions
from leadline.kernels import gpu
from leadline.kernels.gpu import _call, _device
from leadline.ref import OPS
from leadline.ref.moe_permute import plan_of
from numba import typeof

cuda: Any = importlib.import_module("numba.cuda")
dispatcher: Any = importlib.import_module("numba.cuda.dispatcher")
# One that rounds in float64; moves, comparisons and conversions are not meant.
DOUBLE = re.compile(r"^\s*(?:add|sub|mul|fma|div|sqrt|rcp|ex2|lg2)\.(?:\w+\.)*f64\b", re.M)
# Subnormals lost, or a quotient or a root that is not IEEE's. (The exponential's and the logarithm's own steps are libdevice's.)
APPROXIMATE = re.compile(r"^\s*(?:(?:add|sub|mul|fma|div|sqrt)\.(?:\w+\.)*ftz|(?:div|sqrt)\.(?:approx|full))\S*", re.M)
CASES = 4  # of an op: more have the same types


def launches() -> Iterator[tuple[str, Any, tuple]]:
    """(op, kernel, types of its arguments) of all that the ops launch. Arrays stay NumPy's, and nothing runs."""
    launched: list[tuple[Any, tuple]] = []

    def note(kernel: Any, blocks: int, args: tuple) -> None:
        launched.append((kernel, tuple(map(typeof, args))))

    def planned(op: str, topk_idx: np.ndarray, e: int, alignment: int) -> Any:
        planning(op, topk_idx, e, alignment)
        return moe_permute.Plan(*plan_of(topk_idx, e, alignment))

    moe_permute = importlib.import_module("leadline.kernels.gpu.moe_permute")
    planning = moe_permute.plan_of  # where rows go decides how many there are
    _device.SIMULATED = _call.SIMULATED = True
    _device._launch, moe_permute.plan_of = note, planned  # type: ignore[assignment]
    subject = Subject("kernels.gpu", gpu)
    for op in OPS.values():
        for way in directions(op):
            for case in op.cases[:CASES] if subject.contract(op, way) is not None else ():
                for precision in (PRECISIONS["fp32"], PRECISIONS["fp64"]):
                    launched.clear()
                    subject.ask(op, way, draw_case(op, case, way, precision, 0), {**op.defaults, **case.attrs}, precision)
                    name = f"{op.name} {way} {precision.name}"
                    yield from ((name, kernel, types) for kernel, types in launched)


def main(capability: tuple[int, int]) -> None:
    # A function that a kernel calls is compiled for the current device.
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=capability)
    seen = set()
    for name, kernel, types in launches():
        if (kernel, types) in seen:
            continue
        seen.add((kernel, types))
        started = time.perf_counter()
        ptx, _ = cuda.compile(kernel.py_func, types, device=False, abi="numba", cc=capability, output="ptx")
        about = {
            "op": name,
            "kernel": f"{kernel.py_func.__module__.rpartition('.')[2]}.{kernel.py_func.__name__}",
            "target": re.findall(r"^\.target (\w+)", ptx, re.M),
            "entries": len(re.findall(r"^\.visible \.entry", ptx, re.M)),
            "double": len(DOUBLE.findall(ptx)),
            "approximate": sorted(set(APPROXIMATE.findall(ptx))),
            "seconds": time.perf_counter() - started,
        }
        print(json.dumps(about), flush=True)


def kernels() -> set[str]:
    """All that there are: every dispatcher in the package's modules that is no device function."""
    modules = {name: module for name, module in sys.modules.items() if name.startswith("leadline.kernels.gpu.")}
    return {
        f"{name.rpartition('.')[2]}.{fn}"
        for name, module in modules.items()
        for fn, value in vars(module).items()
        if isinstance(value, dispatcher.CUDADispatcher) and not value.targetoptions.get("device") and value.py_func.__module__ == name
    }


if __name__ == "__main__":
    with np.errstate(all="ignore"):
        main((int(sys.argv[1]), int(sys.argv[2])))
    print(json.dumps({"all": sorted(kernels())}))
