"""How far a bench is, and what it wrote, for whoever waits: a bar on a terminal, a line a case in a log."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

Tell = Callable[[str, int, int], None]
"""(what begins, how many are done, of how many)."""


@contextmanager
def progress() -> Iterator[Tell]:
    """On stderr."""
    if not sys.stderr.isatty():
        yield tell_line
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)
        yield lambda name, done, total: bar.update(task, description=name, completed=done, total=total)


def tell_line(name: str, done: int, total: int) -> None:
    """One line on stderr; none where nothing more begins."""
    if done < total:
        print(f"{name}: {done + 1} of {total}", file=sys.stderr, flush=True)


def wrote(json_file: Path | None, pictures: Sequence[Path] = ()) -> list[str]:
    """Lines that name the files."""
    lines = ["wrote " + ", ".join(str(file) for file in pictures)] if pictures else []
    return lines + ([f"wrote {json_file}; `megatronish bench show {json_file}` prints it"] if json_file is not None else [])
