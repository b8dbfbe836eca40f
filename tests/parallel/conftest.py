"""Prints a table of the parity cases that ran: a row a layout."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.parallel.parity import Case


@dataclass
class Cell:
    """The cases of one layout and one set of choices."""

    passed: int = 0
    run: int = 0
    largest_error: float = 0.0

    def __str__(self) -> str:
        return f"{self.passed}/{self.run} {self.largest_error:.0e}" if self.run else "-"


def place_in_table(case: Case) -> tuple[str, str]:
    """(row, column)."""
    layout = case.layout if case.schedule[0] == "1f1b" else f"{case.layout} {case.schedule[0]}"
    return layout, ("sequence\n" if case.sequence else "\n") + f"recompute {case.recompute}"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Layouts down, choices across; in each cell how many cases equal one process, of how many that ran, and the largest error."""
    cells: dict[str, dict[str, Cell]] = defaultdict(lambda: defaultdict(Cell))
    columns: set[str] = set()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            properties = dict(getattr(report, "user_properties", ()))
            if "parity" not in properties or report.when != "call":
                continue
            row, column = properties["parity"]
            columns.add(column)
            cell = cells[row][column]
            cell.passed += outcome == "passed"
            cell.run += 1
            cell.largest_error = max(cell.largest_error, properties.get("largest error", 0.0))
    if not cells:
        return
    table = Table(
        "layout", *sorted(columns), title="cases equal to one process / run, largest relative error", title_justify="left"
    )
    for layout in sorted(cells):
        table.add_row(layout, *(str(cells[layout][column]) for column in sorted(columns)))
    console = Console(width=132, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    terminalreporter.write_line(capture.get())
