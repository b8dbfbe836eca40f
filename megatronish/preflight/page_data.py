"""The numbers behind the page's drawings, as small as JSON can hold them: see `report.py` and `page.html`."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from megatronish.comm.history import Call, Event
from megatronish.pipeline.schedules import Backward, peak_in_flight
from megatronish.preflight.findings import Finding
from megatronish.preflight.job import Job
from megatronish.preflight.stages import Recorded, Stage, read_stages
from megatronish.preflight.traffic import STEP, Amount, Tallies, Tally, Traffic, Use, group_sizes, handed_bytes

MOST_PLACES = {"rank": 128, "stage": 128, "node": 512}
"""Rows of a matrix that can still be seen."""


def schedule(job: Job, problem: Finding | None = None) -> dict[str, Any]:
    """A training step of all stages. Each action is four numbers: units of idle time before it, 1 for a backward + 2 if inferred
    + 4 times its chunk, its microbatch, and its place in `details`."""
    culprits = problem.culprits if problem else ()
    # A problem is best seen where it is: in its step, on the pipeline of the first culprit.
    like, where = (culprits[0] if culprits else 0), re.search(rf"\b{STEP} step (\d+)(?: ([FB]\d+(?:\.\d+)?)\b)?", str(problem))
    read = read_stages(job, like=like, step=int(where[1]) if where else None)
    details = Details()
    of_culprits = {job.shape.coordinates(rank)["pp"] for rank in culprits}
    return {
        "step": read.step,
        "like": job.shape.describe(like).partition(" ")[2],
        "mark": [job.shape.coordinates(like)["pp"], where[2]] if where and where[2] else None,
        "makespan": read.makespan,
        "idle": read.idle_share,
        "chunks": 1 + max((step.action.chunk for stage in read.stages for step in stage.steps), default=0),
        "stages": [_stage(job, stage, details, is_culprit=stage.stage in of_culprits) for stage in read.stages],
        "details": details.texts,
    }


def _stage(job: Job, stage: Stage, details: Details, *, is_culprit: bool) -> dict[str, Any]:
    describe = Describer(group_sizes(job, stage.rank))
    numbers: list[int] = []
    clock = 0
    for step in stage.steps:
        if step.start is None or step.end is None:
            break
        kind = isinstance(step.action, Backward) + 2 * step.is_inferred + 4 * step.action.chunk
        numbers += [step.start - clock, kind, step.action.microbatch, details.of(step, describe)]
        clock = step.end
    stuck = stage.stuck_at
    return {
        "rank": stage.rank,
        "name": job.name(stage.rank),
        "busy": stage.busy,
        "peak": peak_in_flight(step.action for step in stage.steps),
        "culprit": is_culprit,
        "stuck": None if stuck is None else str(stuck),
        "before": describe(stage.before),
        "after": describe(stage.after),
        "actions": numbers,
    }


class Details:
    """What actions communicate, each text once."""

    def __init__(self) -> None:
        self.texts: list[list[str]] = []
        self._places: dict[tuple[str, ...], int] = {}

    def of(self, step: Recorded, describe: Describer) -> int:
        """The place of its text."""
        lines = (*describe(step.parts), *(text for events in step.exchanges for text in _messages(events)))
        if lines not in self._places:
            self._places[lines] = len(self.texts)
            self.texts.append(list(lines))
        return self._places[lines]


class Describer:
    """Puts the events of one rank in words, alike ones once."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        """sizes: ranks of each group."""
        self._tallies = Tallies(sizes)
        self._known: dict[tuple[int, ...], list[str]] = {}

    def __call__(self, parts: Iterable[tuple[Event, ...]]) -> list[str]:
        """E.g. `4 all_reduce on tp, 64.0 MiB`, a line a group and operation."""
        tallies = [self._tallies.of(events) for events in parts]
        key = tuple(map(id, tallies))
        if key not in self._known:
            total = Tally()
            for tally in tallies:
                total.add(tally)
            self._known[key] = list(_lines(total))
        return self._known[key]


def _lines(total: Tally) -> Iterator[str]:
    for use, amount in total.uses.items():
        size = f", {in_words(amount.handed_bytes)}" if amount.handed_bytes else ""
        yield f"{amount.calls} {use.operation} on {use.group}{size}"
    if total.num_waits:
        yield f"{total.num_waits} wait{'s' if total.num_waits > 1 else ''} for a call"
    if total.num_reads:
        yield f"{total.num_reads} read{'s' if total.num_reads > 1 else ''} by the host"


def _messages(events: Iterable[Event]) -> Iterator[str]:
    """E.g. `then sends 16.0 MiB to stage 2`."""
    for event in events:
        if isinstance(event, Call) and event.peer is not None:
            way = "sends {} to" if event.operation == "send" else "receives {} from"
            yield f"then {way.format(in_words(handed_bytes(event)))} stage {event.peer}"


@cache
def in_words(number: int) -> str:
    """E.g. `16.0 MiB`."""
    amount, unit = float(number), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{amount:.1f} {unit}" if unit != "B" else f"{number} B"


def communication(traffic: Traffic, *, gpus_per_node: int) -> dict[str, Any]:
    """The last training step: by group and operation, by stage, and who sends to whom."""
    phase = traffic.last_step
    return {
        "phase": phase,
        "uses": _uses(traffic, phase),
        "stages": _by_stage(traffic, phase),
        **_places(traffic, phase, gpus_per_node),
    }


def _uses(traffic: Traffic, phase: str) -> list[dict[str, Any]]:
    """A row a group and operation: of the rank that sends most, and of all ranks."""
    rows: dict[Use, list[tuple[Amount, int, int]]] = defaultdict(list)
    for phases, ranks in zip(traffic.of_log, traffic.ranks_with, strict=True):
        for use, amount in phases.get(phase, Tally()).uses.items():
            if ranks:
                rows[use].append((amount, len(ranks), ranks[0]))
    result = []
    for use, amounts in sorted(rows.items()):
        most, _, rank = max(amounts, key=lambda entry: (entry[0].handed_bytes, entry[0].calls, -entry[2]))
        calls = [amount.calls for amount, _, _ in amounts]
        result.append(
            {
                "group": use.group,
                "operation": use.operation,
                "size": max(group_sizes(traffic.job, rank).get(use.group, 1), 1),
                "ranks": sum(number for _, number, _ in amounts),
                "calls": [min(calls), max(calls)],
                "handed": most.handed_bytes,
                "sent": most.sent_bytes,
                "rank": traffic.job.name(rank),
                "total": sum(number * amount.sent_bytes for amount, number, _ in amounts),
            }
        )
    return result


def _by_stage(traffic: Traffic, phase: str) -> dict[str, Any]:
    """Bytes that the busiest rank of each stage sends over each group."""
    job = traffic.job
    rows: list[dict[str, int]] = []
    groups: dict[str, None] = {}
    per_stage = job.num_ranks // job.shape.pp
    for stage in range(job.shape.pp):
        logs = {job.log_of[rank]: rank for rank in range(stage * per_stage, (stage + 1) * per_stage)}
        row: dict[str, int] = {}
        for rank in logs.values():
            sent: Counter[str] = Counter()
            for use, amount in traffic.of_rank(rank, phase).uses.items():
                sent[use.group] += amount.sent_bytes
            for group, given in sent.items():
                row[group] = max(row.get(group, 0), given)
        groups |= dict.fromkeys(row)
        rows.append(row)
    return {"groups": list(groups), "rows": [[row.get(group, 0) for group in groups] for row in rows]}


def _places(traffic: Traffic, phase: str, gpus_per_node: int) -> dict[str, Any]:
    """Who sends how much to whom: by node, stage and rank, where there are few enough; and within nodes and across, by group."""
    job = traffic.job
    per_stage = job.num_ranks // job.shape.pp
    levels: dict[str, Callable[[int], int]] = {
        "node": lambda rank: rank // gpus_per_node,
        "stage": lambda rank: rank // per_stage,
        "rank": lambda rank: rank,
    }
    sizes = {"node": -(-job.num_ranks // gpus_per_node), "stage": job.shape.pp, "rank": job.num_ranks}
    shown = {level: place for level, place in levels.items() if 1 < sizes[level] <= MOST_PLACES[level]}
    cells: dict[str, defaultdict[str, Counter[tuple[int, int]]]] = {level: defaultdict(Counter) for level in shown}
    within: Counter[str] = Counter()
    across: Counter[str] = Counter()
    leaves: Counter[int] = Counter()
    for sender, receiver, group, given in traffic.edges(phase):
        node, to_node = sender // gpus_per_node, receiver // gpus_per_node
        if node == to_node:
            within[group] += given
        else:
            across[group] += given
            leaves[node] += given
        for level, place in shown.items():
            cells[level][group][place(sender), place(receiver)] += given
    reach: list[list[Any]] = [[group, within[group], across[group]] for group in sorted({*within, *across})]
    return {
        "reach": reach,
        "busiest": next(([node, given] for node, given in leaves.most_common(1)), None),
        "matrices": [
            {"level": level, "size": sizes[level], "cells": {group: list(_flat(found)) for group, found in cells[level].items()}}
            for level in shown
        ],
    }


def _flat(cells: Counter[tuple[int, int]]) -> Iterator[int]:
    for (sender, receiver), given in sorted(cells.items()):
        yield from (sender, receiver, given)


def counts(traffic: Traffic) -> dict[str, Any]:
    """Calls of one rank by group, operation and phase: the least and the most of all ranks."""
    phases = traffic.phases
    logs = [found for found, ranks in zip(traffic.of_log, traffic.ranks_with, strict=True) if ranks]
    uses = sorted({use for found in logs for tally in found.values() for use in tally.uses})

    def row(of: Callable[[Tally], int]) -> list[list[int]]:
        numbers = [[of(found.get(phase, Tally())) for found in logs] for phase in phases]
        return [[min(column), max(column)] for column in numbers]

    def calls_of(use: Use) -> Callable[[Tally], int]:
        return lambda tally: tally.uses.get(use, Amount()).calls

    rows: list[list[Any]] = [[use.group, use.operation, row(calls_of(use))] for use in uses]
    rows.append(["", "waits for a call", row(lambda tally: tally.num_waits)])
    rows.append(["", "reads by the host", row(lambda tally: tally.num_reads)])
    return {"phases": phases, "rows": rows, "totals": _totals(traffic, phases)}


def _totals(traffic: Traffic, phases: Sequence[str]) -> list[int]:
    """Calls of all ranks together, by phase."""
    return [
        sum(
            len(ranks) * sum(amount.calls for amount in found.get(phase, Tally()).uses.values())
            for found, ranks in zip(traffic.of_log, traffic.ranks_with, strict=True)
        )
        for phase in phases
    ]
