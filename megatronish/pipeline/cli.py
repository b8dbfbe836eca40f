"""`megatronish pipeline ...`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer

from megatronish.errors import UserError

app = typer.Typer(
    help="Look at pipeline schedules.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    add_completion=False,
)


@app.callback()
def _root() -> None:
    """Look at pipeline schedules."""


@app.command()
def show(
    schedule: Annotated[str, typer.Argument(help="1f1b, gpipe or interleaved.")],
    stages: Annotated[int, typer.Option(min=1, max=1024, help="Pipeline stages p.")] = 4,
    microbatches: Annotated[int, typer.Option(min=1, max=4096, help="Microbatches m of a step, on each data rank.")] = 8,
    chunks: Annotated[int | None, typer.Option(min=1, help="Chunks v of a stage; 2 for interleaved when not given.")] = None,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a picture there too.")] = None,
) -> None:
    """Draw a schedule, with its bubble and peak activations as drawn and by formula.

    Example: megatronish pipeline show interleaved --stages 4 --microbatches 8 --chunks 2 --svg schedule.svg
    """
    from rich.console import Console

    draw: Any = importlib.import_module("megatronish.pipeline.draw")
    drawing = draw.Drawing(schedule, stages, microbatches, chunks or (2 if schedule == "interleaved" else 1))
    if svg is not None:
        try:
            svg.write_text(draw.svg(drawing))
        except OSError as error:
            raise UserError(f"--svg {svg}: cannot be written ({error.strerror})") from None
    console = Console()
    draw.show(drawing, console if console.is_terminal else Console(width=132))
