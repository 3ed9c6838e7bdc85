"""The command line: ops, verify, golden generate, dequantize, bugs, power, bench. Wrong use: one line on standard error, exit status 2."""

import importlib
import importlib.util
import inspect
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..ref.op import OPS, Case, Op, op_named
from .draw import draw_case
from .errors import UsageError
from .outputs import Outputs, file_options, given, report
from .precision import PRECISIONS
from .vectors import DIRECTORY, Store, counted, directions

# Commands in files of their own, imported when they are asked for: a command starts as fast as what it needs.
ELSEWHERE = {
    name: file
    for file, names in {"cli_checkpoint": ("checkpoint", "run"), "cli_trace": ("trace",), "cli_gpu": ("probe",)}.items()
    for name in names
    if importlib.util.find_spec(f"{__package__}.{file}")
}


class OneLine(click.Group):
    """Every ValueError that names an argument is the user's to mend; everything else is a defect and keeps its traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *(ELSEWHERE if self.name == "main" else ())})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if self.name == "main" and cmd_name in ELSEWHERE:
            return getattr(importlib.import_module(f".{ELSEWHERE[cmd_name]}", __package__), cmd_name)
        return super().get_command(ctx, cmd_name)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **{**kwargs, "standalone_mode": False})
        except click.exceptions.Abort:
            click.echo("leadline: interrupted", err=True)
            sys.exit(130)
        except click.exceptions.Exit as error:
            sys.exit(error.exit_code)
        except click.ClickException as error:
            click.echo(f"leadline: {' '.join(error.format_message().split())}", err=True)
            sys.exit(2)
        except (UsageError, ValueError) as error:
            if not isinstance(error, UsageError) and type(error) is not ValueError:
                raise
            click.echo(f"leadline: {' '.join(str(error).split())}", err=True)
            sys.exit(2)
        except BrokenPipeError:
            sys.stderr.close()
            sys.exit(141)


@click.group(cls=OneLine, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="leadline")
def main() -> None:
    """Holds implementations of DeepSeek's building blocks to a reference, and names the bug."""


@main.group(invoke_without_command=True)
@click.option("--markdown", is_flag=True, help="The table as the README has it.")
@click.pass_context
def ops(context: click.Context, markdown: bool) -> None:
    """Every op: forward, backward, precisions, vectors, kernels."""
    if context.invoked_subcommand is not None:
        return
    rows = list(op_rows())
    if markdown:
        for cells in (OP_COLUMNS, ["---"] * len(OP_COLUMNS), *rows):
            click.echo(f"| {' | '.join(cells)} |")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in OP_COLUMNS:
        table.add_column(name, overflow="fold")
    for cells in rows:
        table.add_row(*(escape(cell) for cell in cells))
    console = Console()
    console.print(table)
    console.print(f"\nprecisions: {', '.join(PRECISIONS)} (vectors are stored for fp32 and bf16, made on demand for the others)")


OP_COLUMNS = ["op", "backward", "vectors", "kernels", "signature"]


def op_rows() -> Iterator[list[str]]:
    """What the op table says: name, whether it has a backward, stored vectors, which kernels there are, signature.

    gpu is Numba-CUDA, cuda is CUDA C++. gpu (simulated), cuda (unrun): no GPU has run that kernel yet.
    """
    from .subject import Subject, load

    stored, (gpu, cuda) = counted(), (importlib.import_module(f"leadline.kernels.gpu{part}") for part in ("", ".cuda"))
    kernels = {"cpu": load("kernels.cpu"), "gpu": Subject("kernels.gpu", gpu), "cuda": Subject("kernels.gpu.cuda", cuda)}  # needs no GPU
    never = {"gpu": " (simulated)", "cuda": " (unrun)"}
    for op in OPS.values():
        where = []
        for name, subject in kernels.items():
            have = [d for d in directions(op) if subject.contract(op, d) is not None]
            unrun = never.get(name, "") if op.name not in gpu.RUN else ""
            where += [name + unrun] if len(have) == len(directions(op)) else [f"{name} {d}{unrun}" for d in have]
        yield [op.name, "yes" if op.bwd else "·", str(stored[op.name]), ", ".join(where) or "·", op.sig]


@ops.command("show")
@click.argument("name")
@click.option("--plot", "picture", type=click.Path(path_type=Path, dir_okay=False), help="Draw what the op does to numbers into this file.")
def ops_show(name: str, picture: Path | None) -> None:
    """Index equation, source, contract, cost in FLOPs and bytes of one op."""
    from .intermediates import names_of

    op = op_named(name)
    console = Console(highlight=False)
    if picture is not None:
        from .plot import plot

        plot(op.name, picture)
        console.print(f"{picture} written", soft_wrap=True)
        return
    console.print(f"[bold]{op.name}[/]   {escape(op.sig)}\n", soft_wrap=True)
    console.print(escape(inspect.getdoc(op.fwd) or ""), soft_wrap=True)
    if op.bwd:
        console.print(f"\n[bold]backward[/]\n{escape(inspect.getdoc(op.bwd) or '')}", soft_wrap=True)
    console.print(f"\n[bold]source[/]    {escape(op.source)}", soft_wrap=True)
    for direction in directions(op):
        tensors, outputs = op.signature_of(direction)
        console.print(f"[bold]{direction:<9}[/] {escape(_names(tensors))} -> {escape(_names(outputs))}", soft_wrap=True)
    if names := names_of(op.name):
        told = "a dict may return these too, and a FAIL then says which is the first wrong"
        console.print(f"[bold]on the way[/] {', '.join(names)}: {told}", soft_wrap=True)
    for parameter in op.attrs.values():
        console.print(f"[bold]attribute[/] {escape(str(parameter))}", soft_wrap=True)
    case = max(op.cases, key=lambda c: math.prod(c.dims.values()))
    flops, moved = cost(op, case)
    sizes = ", ".join(f"{k}={v}" for k, v in case.dims.items())
    console.print(f"[bold]cost[/]      {op.flops} FLOPs; at {sizes} in float32 {flops:,} FLOPs and {moved:,} bytes", soft_wrap=True)
    console.print(f"[bold]cases[/]     {', '.join(c.name for c in op.cases[:12])}{', …' if len(op.cases) > 12 else ''}", soft_wrap=True)


def _names(tensors: tuple) -> str:
    return "  ".join(f"{t.name}{'?' * t.optional}[{','.join(t.dims)}]" + (f":{t.kind}" if t.kind != "real" else "") for t in tensors)


def cost(op: Op, case: Case) -> tuple[int, int]:
    """FLOPs of a case's forward, and the bytes of its inputs and outputs in float32."""
    inputs = draw_case(op, case, "forward", PRECISIONS["fp32"])
    with np.errstate(all="ignore"):  # cases overflow on purpose
        outputs = op.run("forward", inputs, case.attrs)
    flops = eval(op.flops, {"__builtins__": {}}, {**op.defaults, **case.attrs, **case.dims})  # a formula of the declaration, in its letters
    return flops, sum(array.nbytes for array in (*inputs.values(), *outputs.values()))


@main.command()
@click.argument("subjects", nargs=-1)
@click.option("--op", "names", multiple=True, help="One op (repeat for more); all by default.")
@click.option("--precision", multiple=True, help=f"One of {', '.join(PRECISIONS)} (repeat for more); fp32 and bf16 by default.")
@click.option("--direction", help="forward or backward; both by default (a bare callable: forward).")
@click.option("--attr", "attrs", multiple=True, metavar="NAME=VALUE", help="An attribute that the subject is built with.")
@click.option("--ties", help="lowest or any: who may win an exact tie.")
@click.option("--framework", help="The arrays that a callable is handed: numpy, torch, jax, cupy.")
@click.option("--profile", default="quick", show_default=True, help="quick or full.")
@click.option("--seed", "seeds", multiple=True, type=int, help="Draw new inputs (repeat for more); 0 is the stored vectors.")
@click.option("--case", "cases", multiple=True, help="One case, by its name or a pattern (repeat for more).")
@click.option("--timeout", default=120.0, show_default=True, help="Seconds that a case may take.")
@click.option("--vectors", type=click.Path(path_type=Path), default=DIRECTORY, help="Another directory of vectors.")
@click.option("--json", "as_json", is_flag=True, help="JSON lines on standard output instead of the table.")
@click.option("--jobs", default=1, show_default=True, help="Processes that share the work; the results are the same.")
@click.option("--scheduler", metavar="ADDRESS", help="tcp://… of a Dask scheduler whose workers share the work.")
@click.option(
    "--resume", type=click.File(encoding="utf-8"), metavar="RUN", help="JSON lines of an interrupted run: its cases are not asked again."
)
@click.option("--maps", is_flag=True, help="An error map of every case in the reports; failing cases always have theirs.")
@file_options("html", "junit", "markdown", "jsonl")
def verify(
    subjects: tuple[str, ...],
    names: tuple[str, ...],
    precision: tuple[str, ...],
    direction: str | None,
    attrs: tuple[str, ...],
    ties: Any,
    framework: str | None,
    profile: Any,
    seeds: tuple[int, ...],
    cases: tuple[str, ...],
    timeout: float,
    vectors: Path,
    as_json: bool,
    jobs: int,
    scheduler: str | None,
    resume: Any,
    maps: bool,
    files: dict[str, Path],
) -> None:
    """Hold SUBJECTS (kernels.cpu by default) to the vectors.

    A subject is kernels.cpu, kernels.gpu, ref, torch, transformers, transformers.v2, ml_dtypes or gfloat; or your own: module, module:attr,
    file.py, file.py:attr; exec:PROGRAM [ARGS], which answers JSON lines (`leadline smoke`); ctypes:LIB.so, which exports C functions.
    """
    from .report import json_header, json_result, json_total, print_table
    from .runs import provenance, resumed
    from .spread import spread
    from .subject import heading_of
    from .verify import DEFAULT_PRECISIONS, parse_attr

    chosen = [op_named(name) for name in names] or list(OPS.values())
    options = {
        "precision": precision or None,
        "direction": direction,
        "attrs": dict(parse_attr(text, chosen) for text in attrs),
        "cases": cases or None,
        "maps": maps,
        "profile": profile,
        "seeds": seeds or (0,),
        "framework": framework,
        "ties": ties,
        "timeout": timeout,
        "store": Store(vectors),
    }
    started = time.perf_counter()
    reports = []
    about = {"op": names, "precision": precision, "direction": direction, "attr": options["attrs"], "ties": ties, "framework": framework}
    about = given(**about, seed=seeds, case=cases, vectors=None if vectors == DIRECTORY else vectors)
    about |= given(profile=None if profile == "quick" else profile, timeout=None if timeout == 120 else timeout)
    subjects = subjects or ("kernels.cpu",)
    earlier = resumed(resume.name, resume.read(), subjects, about) if resume else {}
    options |= {"jobs": jobs, "scheduler": scheduler, "done": earlier}
    devices = [device for device in map(heading_of, subjects) if device]
    for device in () if as_json else devices:
        click.echo(device)
    with Outputs(files, as_json) as outputs:
        if outputs.wanted:
            outputs.line(json_header(**provenance(subjects, chosen, precision or DEFAULT_PRECISIONS, about), **given(devices=devices)))
            for result in earlier.values():  # first of all: an interrupt must not lose them
                outputs.line(json_result(result))
            options["on_result"] = lambda result: outputs.line(json_result(result))
        for subject in subjects:
            with Progress(subject) as progress:
                reports.append(spread(subject, names or None, progress=progress, **options))
        if outputs.wanted:
            outputs.line(json_total(reports))
    if not as_json:
        print_table(Console(highlight=False), reports)
        click.echo(f"{time.perf_counter() - started:.1f} s")
    if any(r.exit_status for r in reports):
        sys.exit(1)
    if outputs.failed:
        sys.exit(2)


main.add_command(report)


class Progress:
    """A progress bar on a terminal's standard error; silence elsewhere."""

    def __init__(self, subject: str, in_bytes: bool = False):
        from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        count = DownloadColumn() if in_bytes else MofNCompleteColumn()
        columns = (TextColumn("{task.fields[subject]}"), BarColumn(), count, TextColumn("{task.description}"))
        console = Console(stderr=True)
        self.bar = Bar(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.bar.add_task("compiling" if subject == "kernels.cpu" else "loading", total=None, subject=escape(subject))

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __call__(self, done: int, total: int, what: str) -> None:
        self.bar.update(self.task, completed=done, total=total, description=escape(what))

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


@main.command()
@click.argument("subject")
@click.option("--timeout", default=20.0, show_default=True, help="Seconds that an answer may take.")
def smoke(subject: str, timeout: float) -> None:
    """Say start, describe, one run of each op, and stop to SUBJECT, exec:PROGRAM [ARGS]: a line a step. For people who write one."""
    from .report import STYLE
    from .smoke import smoke as run

    console = Console(highlight=False)
    if not run(subject, timeout, lambda verdict, line: console.print(f"[{STYLE[verdict]}]{verdict:7}[/] {escape(line)}", soft_wrap=True)):
        sys.exit(1)


@main.group()
def golden() -> None:
    """The golden vectors."""


@golden.command()
@click.option("--check", is_flag=True, help="Write nothing; prove that the stored vectors are what the code makes.")
@click.option("--op", "names", multiple=True, help="One op (repeat for more); all by default.")
@click.option("--dir", "directory", type=click.Path(path_type=Path), help="Where the vectors are; golden/vectors of a checkout by default.")
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(1), help="Processes.")
def generate(check: bool, names: tuple[str, ...], directory: Path | None, jobs: int) -> None:
    """Write every vector anew (in a source checkout), each blessed by the reference and an oracle."""
    from . import generate as g
    from .spread import executor

    chosen = {op_named(name).name for name in names} or set(OPS)
    checkout = Path.cwd() if (Path.cwd() / "golden" / "vectors").is_dir() and (Path.cwd() / "tests" / "oracles").is_dir() else None
    if not check and checkout is None:
        raise UsageError("vectors are generated in a source checkout (cd to it); --check works anywhere")
    directory = directory or (checkout / "golden" / "vectors" if checkout else DIRECTORY)
    found, count = [], 0
    with executor(jobs, None) as pool:
        files = [(op.name, precision.name) for op, precision in g.files() if op.name in chosen]
        files.sort(key=lambda file: -max(math.prod(case.dims.values()) for case in OPS[file[0]].cases))  # long ones are not left for last
        for future in [pool.submit(g.one, *file, checkout, directory, check) for file in files]:
            vectors, differences = future.result()
            count += vectors
            found += differences
    if check and not names:
        found += [f"{path}: no op makes it" for path in sorted(directory.glob("*/*")) if path.parent.name not in OPS]
    for line in sorted(found):
        click.echo(line)
    agreed = "blessed by the oracles" if checkout else "oracles not at hand, so not asked again"
    click.echo(f"{count} vectors {'checked' if check else 'written'} ({agreed}), {len(found)} differences")
    if found:
        sys.exit(1)


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--dtype", default="bf16", show_default=True, help="bf16 or fp32: what the FP8 weights become.")
def dequantize(source: Path, target: Path, dtype: str) -> None:
    """Write the safetensors file SOURCE to TARGET with its FP8 weights (F8_E4M3 beside *_scale_inv) dequantised, all else unchanged."""
    from .weights import dequantize_file

    started = time.perf_counter()
    try:
        with Progress(source.name, in_bytes=True) as progress:
            done = dequantize_file(source, target, dtype=dtype, progress=progress)
    except OSError as error:  # no such file, no space left, ...
        raise UsageError(str(error)) from error
    seconds = time.perf_counter() - started
    click.echo(f"{done.dequantized} weights to {dtype}, {done.passed} tensors unchanged, {done.bytes_written:,} bytes in {seconds:.1f} s")


@main.group(invoke_without_command=True)
@click.option("--op", help="The bugs of one op.")
@click.option("--unwritten", is_flag=True, help="Only those that are not written here, with the reason.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.pass_context
def bugs(context: click.Context, op: str | None, unwritten: bool, as_json: bool) -> None:
    """The catalogue: every known bug, its severity, and how many stored vectors catch it or why it is not written."""
    if context.invoked_subcommand is None:
        from .catalogue import print_catalogue

        print_catalogue(Console(highlight=False), op, unwritten, as_json)


@bugs.command("show")
@click.argument("id")
def bugs_show(id: str) -> None:
    """All that is known of one bug: what goes wrong, which inputs reveal it, which vectors catch it, the threads."""
    from .catalogue import print_entry

    print_entry(Console(highlight=False), id)


@main.command()
@click.option("--op", "names", multiple=True, help="One op (repeat for more); all by default.")
@click.option("--precision", "precisions", multiple=True, help="One precision (repeat for more); fp32, bf16 and bf16-eager by default.")
@click.option("--full", is_flag=True, help="Every bug on every case (hours); by default a fixed sample on cheap cases (minutes).")
@click.option("--unnamed", is_flag=True, help="Do not ask what each failing output is taken for.")
@click.option("--jobs", default=1, show_default=True, help="Processes.")
@click.option("--resume", type=click.Path(path_type=Path, dir_okay=False), help="A file for each result; what it holds is not done again.")
@click.option(
    "--wall", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Of tests/wall.py: its false alarms are told too."
)
@click.option("--json", "as_json", is_flag=True, help="JSON lines on standard output instead of the tables.")
def power(
    names: tuple[str, ...],
    precisions: tuple[str, ...],
    full: bool,
    unnamed: bool,
    jobs: int,
    resume: Path | None,
    wall: Path | None,
    as_json: bool,
) -> None:
    """The kill matrix: every known bug against Leadline's judge and the field's metrics, and whether it is named."""
    from .power_table import run_power

    with Progress("power") as progress:
        killed = run_power(names or None, precisions or None, full, not unnamed, jobs, resume, as_json, progress, wall=wall)
    if not killed:
        sys.exit(1)


@main.command()
@click.option("--subject", default="kernels.cpu", show_default=True, help="kernels.cpu or kernels.gpu.")
@click.option("--op", "names", multiple=True, help="One op (repeat for more); all that have a benchmark by default.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.option("--keep", is_flag=True, help="Keep what a GPU showed, as a JSON file in golden/hardware.")
def bench(subject: str, names: tuple[str, ...], as_json: bool, keep: bool) -> None:
    """Time kernels.cpu, or kernels.gpu, beside its peers and the machine's limit, in one run."""
    if subject not in ("kernels.cpu", "kernels.gpu"):
        raise UsageError(f"--subject is {subject}; expected kernels.cpu or kernels.gpu")
    if keep and subject != "kernels.gpu":
        raise UsageError("--keep records a device; it goes with --subject kernels.gpu")
    chosen = [op_named(name) for name in names]
    if subject == "kernels.cpu":
        from . import bench as cpu

        cpu.run(chosen, as_json)
        return
    from . import bench_gpu_run as gpu

    if not gpu.run(chosen, as_json, keep):
        sys.exit(1)


if __name__ == "__main__":
    main()
