"""`leadline bench --subject kernels.gpu`: every GPU kernel beside its peers and its own ceiling, all measured in one run.

A kernel is held to the vectors before it is timed; one that fails is named and not timed. Ceilings are rates measured first: of a copy, and
of large products in float32, bf16 and FP8. A kernel's floor is the longer of two times: the bytes that must move (every input read once,
every result written once) at the copy's rate, and its operations at the rate of the product of its precision. Its share is floor / seconds.
"""

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple, Protocol

from ..kernels.gpu.cuda.launch import Unfit, unchecked
from .judge import ERROR, FAIL, PASS
from .verify import verify

Timed = Callable[[], Any]
COPY, FLOAT32, BF16, FP8 = "copy", "float32 product", "bf16 product", "FP8 product"  # ceilings
CUDA, NUMBA = "CUDA C++", "Numba-CUDA"


class Clock(Protocol):
    """What is asked of a device"""

    def seconds(self, run: Timed) -> float: ...
    def release(self) -> None: ...


class Load(NamedTuple):
    """What a ceiling is measured with: bytes moved or operations done, and the packages that it needs"""

    what: str
    amount: int
    unit: str  # B/s or FLOP/s
    make: Callable[[], Timed]
    needs: tuple[str, ...] = ()


class Ceiling(NamedTuple):
    what: str
    rate: float
    unit: str


class Peer(NamedTuple):
    """Another's kernel for the same work. make takes its arrays and may raise: that costs its own line."""

    name: str
    make: Callable[[], Timed]
    needs: tuple[str, ...] = ("torch",)


class Held(NamedTuple):
    """What is held to the vectors before anything is timed: a kernel, at a precision, on some cases (None: all quick ones)"""

    kernel: Callable[..., Any]
    precision: str = "fp32"
    cases: tuple[str, ...] | None = None


@dataclass
class Case:
    """What is timed, what it is held to, and what no kernel can do without: bytes to move, operations of a precision."""

    op: str
    case: str
    ours: Timed
    held: Held
    moved: int
    flops: int = 0
    product: str = ""  # the ceiling of the operations
    direction: str = "forward"
    kernel: str = CUDA
    peers: Sequence[Peer] = ()
    alike: Callable[[], Iterable[tuple[Any, Any]]] | None = None  # at this size: arrays that must be equal bit for bit


def absent(packages: Iterable[str]) -> list[str]:
    return [p for p in packages if importlib.util.find_spec(p) is None]


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def ceilings_of(clock: Clock, loads: Mapping[str, Load]) -> tuple[dict[str, Ceiling], dict[str, str]]:
    """The rates by name, and why others were not measured"""
    found, without = {}, {}
    for name, load in loads.items():
        if missing := absent(load.needs):
            without[name] = f"{load.what}: {', '.join(missing)} is not installed"
            continue
        try:
            found[name] = Ceiling(load.what, load.amount / clock.seconds(load.make()), load.unit)
        except Exception as error:  # a chip without FP8, or too little memory
            without[name] = f"{load.what}: {first_line(error)}"
        clock.release()
    return found, without


def floor_of(case: Case, ceilings: Mapping[str, Ceiling]) -> tuple[str, float] | None:
    """The ceiling that binds and the seconds that it allows at least; None if one of the case's ceilings was not measured"""
    work = {COPY: case.moved} | ({case.product: case.flops} if case.flops else {})
    if any(name not in ceilings for name in work):
        return None
    floors = {name: amount / ceilings[name].rate for name, amount in work.items()}
    binding = max(floors, key=lambda name: floors[name])
    return binding, floors[binding]


def _stepping_aside(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel, which refuses sizes and attributes that it was not written for, as `verify` hears a refusal"""

    @wraps(kernel)
    def call(**given: Any) -> Any:
        try:
            return kernel(**given)
        except Unfit as error:
            raise NotImplementedError(str(error)) from error

    return call


def fault_of(op: str, direction: str, held: Held) -> str | None:
    """The first vector that the kernel does not pass, and why; None if it passes"""
    kernel = _stepping_aside(held.kernel)
    report = verify(kernel, op, direction=direction, precision=held.precision, cases=held.cases, explained=False)
    if report.verdict == PASS:
        return None
    wrong = next((r for r in report.results if r.verdict in (ERROR, FAIL)), None)
    return f"{wrong.verdict} on vector {wrong.case}: {wrong.reason}" if wrong else "it does none of the vectors"


def unlike(case: Case) -> str | None:
    """What is not equal bit for bit at the size that is timed; None if all is"""
    for i, (one, other) in enumerate(case.alike() if case.alike else ()):
        bits = f"uint{8 * one.dtype.itemsize}"
        if one.dtype != other.dtype or one.shape != other.shape or not bool((one.view(bits) == other.view(bits)).all()):
            return f"at this size, result {i + 1} is not what it must equal bit for bit: its rows alone, or its parts"
    return None


def measure(
    case: Case, clock: Clock, ceilings: Mapping[str, Ceiling], faults: dict[tuple[str, str, Held], str | None]
) -> Iterator[dict[str, Any]]:
    """One record a peer and one for the ceiling; one with "error" for what could not be timed. faults: of kernels held before."""
    about = {"op": case.op, "case": case.case, "direction": case.direction, "subject": "kernels.gpu", "kernel": case.kernel}
    key = case.op, case.direction, case.held
    if key not in faults:
        faults[key] = fault_of(*key)
    fault, seconds = faults[key], 0.0
    try:
        with unchecked():
            fault = fault or unlike(case)
            seconds = 0.0 if fault else clock.seconds(case.ours)
    except Exception as error:  # too little memory, a launch that fails: the next kernel has its chance
        fault = first_line(error)
    if fault:
        yield {**about, "error": fault}
        return
    floor = floor_of(case, ceilings)
    about |= {"seconds": seconds}
    share = {"limit": floor and floor[0], "limit_share": floor and floor[1] / seconds}
    beside: dict[str, float] = {}
    for peer in case.peers:
        if absent(peer.needs):
            continue
        try:
            beside[peer.name] = clock.seconds(peer.make())
        except Exception as error:
            yield {**about, "peer": peer.name, "error": first_line(error)}
        clock.release()
    for name, theirs in {**beside, **({floor[0]: floor[1]} if floor else {})}.items() or ((None, None),):
        yield {**about, "peer": name, "peer_seconds": theirs, "ratio": theirs and seconds / theirs, **share}


def measured(
    op: str, cases: Iterator[Case], clock: Clock, ceilings: Mapping[str, Ceiling], faults: dict[tuple[str, str, Held], str | None]
) -> Iterator[list[dict[str, Any]]]:
    """The records of each case; one record for an op whose arrays cannot be made"""
    try:
        for case in cases:
            yield list(measure(case, clock, ceilings, faults))
            del case  # and with it its arrays
            clock.release()
    except Exception as error:
        about = {"op": op, "case": "its arrays", "direction": "forward", "subject": "kernels.gpu", "kernel": CUDA}
        yield [{**about, "error": first_line(error)}]
