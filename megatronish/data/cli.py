"""`megatronish data ...`. Imports what a command needs when it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

# As for the other verbs: see megatronish/cli.py.
_OPTIONS: dict[str, Any] = {
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "no_args_is_help": True,
    "add_completion": False,
}
app = typer.Typer(help="Make and look at token files (Megatron's .bin/.idx).", **_OPTIONS)
tokenizer_app = typer.Typer(help="Make a tokenizer.", **_OPTIONS)
app.add_typer(tokenizer_app, name="tokenizer")

# typer reads annotations at run time on Python 3.10 too, and help texts keep their lines as written.
OnBadLine = Literal["stop", "skip"]
_GLOB_HELP = "In directories, the files to take, at any depth (may be given several times)."


@tokenizer_app.command("train")
def train(
    files: Annotated[list[Path], typer.Argument(help="Text files, .jsonl files (key `text`), directories.")],
    vocab_size: Annotated[int, typer.Option(help="Tokens to learn, the 256 bytes and <|endoftext|> among them.")],
    out: Annotated[Path, typer.Option(help="The tokenizer.json to write.")],
    glob: Annotated[list[str] | None, typer.Option(help=_GLOB_HELP, show_default="*.txt, *.jsonl, also .gz and .zst")] = None,
) -> None:
    """Learn a byte-level BPE from text.

    Text of the kind you will train on, a few hundred MB at most, is enough.

    Example: megatronish data tokenizer train books/ --vocab-size 32000 --out tokenizer.json
    """
    from megatronish.data.documents import DEFAULT_GLOBS, find_files
    from megatronish.data.tokenizer import train_tokenizer

    paths = find_files(files, globs=glob or DEFAULT_GLOBS)
    size = train_tokenizer(paths, vocab_size=vocab_size, out=out)
    fewer = "" if size == vocab_size else f" (the text has no pairs for {vocab_size})"
    typer.echo(f"{out}: {size} tokens{fewer}. Next: megatronish data tokenize INPUT --tokenizer {out} --out PREFIX")


@app.command("tokenize")
def tokenize_command(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help="Text files, .jsonl files (key `text`), directories.")],
    tokenizer: Annotated[Path, typer.Option(help="A tokenizer.json.")],
    out: Annotated[Path, typer.Option(metavar="PREFIX", help="Write PREFIX.bin and PREFIX.idx.")],
    workers: Annotated[int, typer.Option(help="Processes that encode. The files do not depend on it.")] = 1,
    append_eod: Annotated[bool, typer.Option(help="End each document with the end-of-text token.")] = True,
    eod: Annotated[str | None, typer.Option(help="That token, if it has an unusual name.")] = None,
    on_bad_line: Annotated[
        OnBadLine, typer.Option(help="A jsonl line that is no document: name it and stop, or count it.")
    ] = "stop",
    max_line_mib: Annotated[int, typer.Option(min=1, help="A longer jsonl line is a bad line: memory is bounded.")] = 64,
    glob: Annotated[list[str] | None, typer.Option(help=_GLOB_HELP, show_default="*.txt, *.jsonl, also .gz and .zst")] = None,
) -> None:
    """Turn text into token files.

    A text file is one document, a .jsonl file one a line; both may be packed as .gz or .zst. Order: as given, directories by
    relative path. Killed, the same command goes on where it was. PREFIX.json says what was written and what was left out.

    Example: megatronish data tokenize books/ notes.jsonl --tokenizer tokenizer.json --out data/train --workers 8
    """
    from megatronish.data.documents import DEFAULT_GLOBS
    from megatronish.data.tokenize import tokenize

    with _progress("tokenizing", unit="bytes") as advance:
        report = tokenize(
            inputs,
            tokenizer=tokenizer,
            out=out,
            workers=workers,
            append_eod=append_eod,
            eod=eod,
            globs=glob or DEFAULT_GLOBS,
            on_bad_line=on_bad_line,
            max_line_bytes=max_line_mib << 20,
            on_progress=advance,
        )
    left_out = f", {report.empty_documents} empty documents left out" if report.empty_documents else ""
    typer.echo(
        f"{out}.bin, {out}.idx: {report.documents} documents, {report.tokens} tokens ({report.dtype}) "
        f"of {report.bytes} bytes{left_out}"
    )
    if report.skipped:
        _print_skipped(report.skipped, report.first_skipped)


@app.command("inspect")
def inspect_command(
    prefix: Annotated[Path, typer.Argument(metavar="PREFIX", help="The set PREFIX.bin, PREFIX.idx.")],
    full: Annotated[bool, typer.Option("--full", help="Read everything and check it, not only samples.")] = False,
    tokenizer: Annotated[Path | None, typer.Option(help="Show the beginning as text; with --full check every token.")] = None,
) -> None:
    """Show what a set holds, and whether it is whole.

    Example: megatronish data inspect data/train --tokenizer tokenizer.json --full
    """
    from rich.console import Console

    from megatronish.data.inspect import summarize, summary_table

    with _progress("reading") as advance:
        summary = summarize(prefix, full=full, tokenizer=tokenizer, on_progress=advance)
    Console().print(summary_table(summary))


def _print_skipped(skipped: dict[str, int], first: dict[str, str]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("lines left out", "why", "the first", title_justify="left")
    for reason, count in skipped.items():
        table.add_row(f"{count:,}", reason, escape(first[reason]))
    Console(stderr=True).print(table)


@contextmanager
def _progress(what: str, *, unit: Literal["bytes", "tokens"] = "tokens") -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr; gives the function (done, total) that moves it. `unit`: what is counted, bytes or else."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    speed = (TransferSpeedColumn(),) if unit == "bytes" else ()
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), *speed, TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
