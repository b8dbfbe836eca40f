"""`megatronish pipeline show`: what is drawn is the schedule, and what is said of it is true of the drawing."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console
from typer.testing import CliRunner

from megatronish.errors import UserError
from megatronish.pipeline.cli import app
from megatronish.pipeline.draw import Drawing, render, svg
from megatronish.pipeline.timeline import makespan
from tests.pipeline.cases import ROWS, Row

SVG = "{http://www.w3.org/2000/svg}"


def printed(drawing: Drawing, width: int = 132) -> str:
    console = Console(width=width, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(render(drawing, width))
    return capture.get()


def rows_of(text: str, num_stages: int) -> list[str]:
    """What is drawn for each stage, time ranges joined."""
    rows = [""] * num_stages
    for line in text.splitlines():
        if match := re.match(r"stage (\d+) +(.*)$", line):
            rows[int(match[1])] += " " + match[2]
    return rows


@pytest.mark.parametrize("width", [60, 132, 400])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_every_action_is_drawn_twice_in_its_row(row: Row, width: int) -> None:
    """Once as a forward, once as a backward, with the bars of a backward after it, also where a line ends."""
    num_stages, num_microbatches = 3, 7
    drawing = Drawing(row.name, num_stages, num_microbatches, row.num_chunks)
    letters = "abcd"[: row.num_chunks] if row.num_chunks > 1 else [""]
    expected = Counter({f"{i}{letter}": 2 for i in range(num_microbatches) for letter in letters})
    for drawn in rows_of(printed(drawing, width), num_stages):
        assert Counter(word.rstrip("─") for word in drawn.split() if word.strip("─·")) == expected


def test_one_f_one_b_as_it_is_printed() -> None:
    text = printed(Drawing("1f1b", 4, 8))
    drawn = " ".join(rows_of(text, 4)[2].split())
    assert drawn == "· · 0 1 · · 0── 2 1── 3 2── 4 3── 5 4── 6 5── 7 6── · 7── · · · ·"
    assert "idle as drawn     27.27% of 33 units" in text and "27.27% = (p - 1) / (m + p - 1)" in text
    assert "37.50% of the work = (p - 1) / m" in text and "Narayanan et al. 2021" in text
    assert [line.split("│")[2].strip() for line in text.splitlines() if line.startswith("│")] == ["4", "3", "2", "1"]


def test_an_incomplete_round_is_said_to_be_one() -> None:
    text = printed(Drawing("interleaved", 4, 6, 2))
    assert "26.53% of 49 units" in text and "6 % 4 = 2 leaves a round incomplete" in text and "at most 11" in text


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_picture_has_a_box_for_every_action_and_none_overlap(row: Row) -> None:
    drawing = Drawing(row.name, 4, 6, row.num_chunks)
    root = ElementTree.fromstring(svg(drawing))
    groups = [group for group in root.iter(f"{SVG}g") if group.find(f"{SVG}rect") is not None]
    boxes = [(group.findtext(f"{SVG}title") or "", group.find(f"{SVG}rect")) for group in groups]
    assert len(boxes) == sum(map(len, drawing.spans)) == len({(title, box.get("y")) for title, box in boxes if box is not None})
    by_row: dict[str, list[tuple[float, float]]] = {}
    for _, box in boxes:
        assert box is not None
        by_row.setdefault(box.get("y", ""), []).append((float(box.get("x", 0)), float(box.get("width", 0))))
    assert len(by_row) == 4
    widest = float(root.get("width", 0))
    for places in by_row.values():
        places.sort()
        assert all(x + width < following for (x, width), (following, _) in pairwise(places))
        assert places[-1][0] + places[-1][1] <= widest
    assert f"of {makespan(drawing.spans)} units" in svg(drawing)


def test_the_command_prints_and_writes(tmp_path: Path) -> None:
    picture = tmp_path / "x.svg"
    result = CliRunner().invoke(app, ["show", "interleaved", "--stages", "2", "--microbatches", "4", "--svg", str(picture)])
    assert result.exit_code == 0 and "2 chunks a stage" in result.output
    assert picture.read_text() == svg(Drawing("interleaved", 2, 4, 2))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["1f2b"], ("'1f2b'", "1f1b, gpipe, interleaved")),
        (["gpipe", "--chunks", "2"], ("--chunks 2", "gpipe", "interleaved")),
        (["interleaved", "--chunks", "27"], ("27", "at most 26")),
        (["1f1b", "--svg", "/nonexistent/x.svg"], ("/nonexistent/x.svg", "cannot be written")),
    ],
)
def test_a_wrong_argument_is_named(arguments: list[str], words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, ["show", *arguments])
    assert isinstance(result.exception, UserError)
    assert all(word in str(result.exception) for word in words) and "\n" not in str(result.exception)
