"""Draws a schedule: a row a stage, time to the right, a box an action; in the terminal and as SVG."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from html import escape

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from megatronish import formulas
from megatronish.errors import UserError
from megatronish.pipeline.schedules import SCHEDULES, Forward, actions_of_all_stages, peak_in_flight
from megatronish.pipeline.timeline import Span, idle_fraction, makespan, timeline

LETTERS = "abcdefghijklmnopqrstuvwxyz"
"""Names of chunks."""
# Fill and text of chunk 0, 1, ...; the chunks beyond begin anew.
FORWARD_COLOURS = (("#1d4ed8", "#ffffff"), ("#60a5fa", "#0b1b3a"), ("#1e3a8a", "#ffffff"), ("#bfdbfe", "#0b1b3a"))
BACKWARD_COLOURS = (("#15803d", "#ffffff"), ("#4ade80", "#052e16"), ("#14532d", "#ffffff"), ("#bbf7d0", "#052e16"))


@dataclass(frozen=True)
class Drawing:
    """A row of SCHEDULES at one size."""

    name: str
    num_stages: int
    num_microbatches: int
    num_chunks: int = 1

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise UserError(f"there is no schedule {self.name!r}; give {', '.join(SCHEDULES)}")
        if self.num_chunks > 1 and not SCHEDULES[self.name].has_chunks:
            able = ", ".join(name for name, row in SCHEDULES.items() if row.has_chunks)
            raise UserError(f"--chunks {self.num_chunks}: {self.name} has one chunk a stage; leave --chunks out, or draw {able}")
        if self.num_chunks > len(LETTERS):
            raise UserError(f"--chunks {self.num_chunks} is more than can be drawn; give at most {len(LETTERS)}")

    @cached_property
    def spans(self) -> list[list[Span]]:
        """By stage, if a forward of a chunk takes 1 unit, a backward 2 and communication nothing."""
        return timeline(actions_of_all_stages(self.name, self.num_stages, self.num_microbatches, num_chunks=self.num_chunks))

    @property
    def num_parts(self) -> int:
        """What the layers are cut into."""
        return self.num_stages * self.num_chunks

    @property
    def title(self) -> str:
        """Schedule and size."""
        chunks = f", {self.num_chunks} chunks a stage" if SCHEDULES[self.name].has_chunks else ""
        return f"{self.name}: {self.num_stages} stages, {self.num_microbatches} microbatches{chunks}"

    def label(self, span: Span) -> str:
        """The microbatch, and the chunk's letter where there are several."""
        return f"{span.action.microbatch}" + (LETTERS[span.action.chunk] if self.num_chunks > 1 else "")

    def peaks(self) -> list[tuple[int, int]]:
        """By stage: (microbatches x chunks in flight as drawn, by formula)."""
        size = {"num_stages": self.num_stages, "num_microbatches": self.num_microbatches, "num_chunks": self.num_chunks}
        return [
            (
                peak_in_flight(span.action for span in mine),
                formulas.pipeline_peak_in_flight(self.name, stage=stage, **size),  # type: ignore[arg-type]
            )
            for stage, mine in enumerate(self.spans)
        ]

    def bubble_lines(self) -> Iterator[str]:
        """Idle time as drawn and by formula, with the formula and its source."""
        p, m, v = self.num_stages, self.num_microbatches, self.num_chunks
        divided = v == 1 or m % p == 0
        drawn = idle_fraction(self.spans)
        yield f"idle as drawn     {drawn:.2%} of {makespan(self.spans)} units (forward of a chunk 1, backward 2, communication 0)"
        formula = "(p - 1) / (m v + p - 1)" if v > 1 else "(p - 1) / (m + p - 1)"
        value = formulas.pipeline_idle_fraction(p, m, num_chunks=v)
        note = "" if divided else f", if the stages divided the microbatches: {m} % {p} = {m % p} leaves a round incomplete"
        yield f"idle by formula   {value:.2%} = {formula}{note}"
        work = "(p - 1) / (m v)" if v > 1 else "(p - 1) / m"
        yield f"bubble by formula {formulas.pipeline_bubble(p, m, num_chunks=v):.2%} of the work = {work}"
        yield f"source            {SCHEDULES[self.name].source}; bubble: Narayanan et al. 2021, section 2.2"

    def peak_formula(self) -> str:
        """Formula and source of what is in flight on stage s."""
        return {
            "gpipe": "m on every stage: Huang et al. 2019",
            "1f1b": "min(m, p - s) on stage s: Narayanan et al. 2021, section 2.2.1",
            "interleaved": "min(m v, p v + p - 1 - 2 s) chunks on stage s: Korthikanti et al. 2022, section 4.2.3",
        }[self.name]


def _colours(span: Span) -> tuple[str, str]:
    table = FORWARD_COLOURS if isinstance(span.action, Forward) else BACKWARD_COLOURS
    return table[span.action.chunk % len(table)]


def render(drawing: Drawing, width: int) -> Group:
    """For a terminal of `width` columns; a long schedule goes on below, time range by time range."""
    cell = max(len(drawing.label(span)) for mine in drawing.spans for span in mine) + 1
    head = len(f"stage {drawing.num_stages - 1} ")
    units_a_row = max(8, (width - head) // cell)
    total = makespan(drawing.spans)
    parts: list[Text | Table] = [Text(drawing.title, style="bold"), Text()]
    for start in range(0, total, units_a_row):
        stop = min(start + units_a_row, total)
        if total > units_a_row:
            parts.append(Text(f"time {start} to {stop}", style="dim"))
        for stage, mine in enumerate(drawing.spans):
            parts.append(_row(drawing, mine, start, stop, cell=cell, head=f"stage {stage}".ljust(head)))
        parts.append(Text())
    legend = Text("forward ", style="dim")
    for kind, colours in (("", FORWARD_COLOURS), ("  backward ", BACKWARD_COLOURS)):
        legend.append(kind, style="dim")
        for chunk in range(drawing.num_chunks):
            fill, ink = colours[chunk % len(colours)]
            legend.append(f" {LETTERS[chunk] if drawing.num_chunks > 1 else ' '} ", style=f"{ink} on {fill}")
    legend.append("  idle ·  a backward is twice as long", style="dim")
    parts += [legend, Text(), *map(Text, drawing.bubble_lines()), Text(f"in flight         {drawing.peak_formula()}"), Text()]
    part = "chunk" if drawing.num_chunks > 1 else "stage"
    parts += [
        peak_table(drawing),
        Text(f"L: all layers of the model for one microbatch; a {part} has 1/{drawing.num_parts} of them"),
    ]
    return Group(*parts)


def _row(drawing: Drawing, mine: list[Span], start: int, stop: int, *, cell: int, head: str) -> Text:
    row, clock = Text(head, no_wrap=True, overflow="crop"), start
    for span in mine:
        low, high = max(span.start, start), min(span.end, stop)
        if low >= high:
            continue
        row.append("·".center(cell) * (low - clock), style="dim")
        fill, ink = _colours(span)
        text = drawing.label(span) if low == span.start else "─"
        # The last column stays free, so that boxes stand apart without colours too.
        row.append(text.ljust((high - low) * cell - 1, "─"), style=f"{ink} on {fill}")
        row.append(" ")
        clock = high
    row.append("·".center(cell) * (stop - clock), style="dim")
    return row


def peak_table(drawing: Drawing) -> Table:
    """Activations that each stage holds at most."""
    p, v = drawing.num_stages, drawing.num_chunks
    unit = "microbatch x chunk" if v > 1 else "microbatches"
    table = Table("stage", f"{unit} in flight", "by formula", "in layers of the model")
    for column in table.columns:
        column.justify = "right"
    for stage, (peak, formula) in enumerate(drawing.peaks()):
        bound = "" if peak == formula else "at most "
        table.add_row(str(stage), str(peak), f"{bound}{formula}", f"{peak / (p * v):.3f} L")
    return table


def show(drawing: Drawing, console: Console) -> None:
    """Print it."""
    console.print(render(drawing, console.width))


UNIT, ROW, LEFT, TOP = 26, 30, 78, 52
"""Pixels of the SVG: a unit of time, a row, and where the rows begin."""


def svg(drawing: Drawing) -> str:
    """A picture that needs nothing: no script, no font, no style sheet of others."""
    total = makespan(drawing.spans)
    lines = [*drawing.bubble_lines(), f"in flight         {drawing.peak_formula()}"]
    width = max(LEFT + total * UNIT + 20, 860)
    below = TOP + drawing.num_stages * ROW
    height = below + 62 + 20 * len(lines)
    shapes = [
        f'<text x="20" y="30" font-size="18" font-weight="600" fill="#0f172a">{escape(drawing.title)}</text>',
        f'<rect x="{LEFT}" y="{TOP}" width="{total * UNIT}" height="{drawing.num_stages * ROW}" fill="#f1f5f9"/>',
    ]
    for stage, ((peak, _), mine) in enumerate(zip(drawing.peaks(), drawing.spans, strict=True)):
        y = TOP + stage * ROW
        shapes.append(f'<text x="20" y="{y + 20}" font-size="13" fill="#334155">stage {stage}</text>')
        shapes.append(f"<g><title>stage {stage}: at most {peak} in flight</title>")
        shapes += [_box(drawing, span, y) for span in mine]
        shapes.append("</g>")
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, total) if total / s <= 40)
    for time in range(0, total + 1, step):
        x = LEFT + time * UNIT
        shapes.append(f'<text x="{x}" y="{below + 16}" font-size="10" text-anchor="middle" fill="#64748b">{time}</text>')
    for number, line in enumerate(lines):
        label, _, text = line.partition("  ")
        y = below + 48 + 20 * number
        shapes.append(f'<text x="20" y="{y}" font-size="13" fill="#64748b">{escape(label)}</text>')
        shapes.append(f'<text x="150" y="{y}" font-size="13" fill="#0f172a">{escape(text.strip())}</text>')
    shapes.append(_svg_legend(drawing, width))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif">\n<rect width="{width}" height="{height}" fill="#ffffff"/>\n'
        + "\n".join(shapes)
        + "\n</svg>\n"
    )


def _box(drawing: Drawing, span: Span, y: int) -> str:
    x, width = LEFT + span.start * UNIT, (span.end - span.start) * UNIT
    fill, ink = _colours(span)
    what = "forward" if isinstance(span.action, Forward) else "backward"
    chunk = f", chunk {LETTERS[span.action.chunk]}" if drawing.num_chunks > 1 else ""
    label = drawing.label(span)
    size = 12 if len(label) <= 2 else 10
    return (
        f"<g><title>{what} of microbatch {span.action.microbatch}{chunk}: {span.start} to {span.end}</title>"
        f'<rect x="{x + 1}" y="{y + 2}" width="{width - 2}" height="{ROW - 4}" rx="3" fill="{fill}"/>'
        f'<text x="{x + width / 2:g}" y="{y + 19}" font-size="{size}" text-anchor="middle" fill="{ink}">{label}</text></g>'
    )


def _svg_legend(drawing: Drawing, width: int) -> str:
    shapes, x = [], width - 210 - 60 * (drawing.num_chunks - 1)
    for name, table in (("forward", FORWARD_COLOURS), ("backward", BACKWARD_COLOURS)):
        for chunk in range(drawing.num_chunks):
            fill, ink = table[chunk % len(table)]
            shapes.append(f'<rect x="{x}" y="16" width="18" height="18" rx="3" fill="{fill}"/>')
            if drawing.num_chunks > 1:
                letter = LETTERS[chunk]
                shapes.append(f'<text x="{x + 9}" y="29" font-size="11" text-anchor="middle" fill="{ink}">{letter}</text>')
            x += 22
        shapes.append(f'<text x="{x + 2}" y="29" font-size="12" fill="#334155">{name}</text>')
        x += 72
    return "\n".join(shapes)
