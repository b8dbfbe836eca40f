"""A training step of every stage as a trace that Perfetto and chrome://tracing open: a process a stage, in units of time.

Source: the Trace Event Format. A unit is a millisecond there. Communication takes no time in units: a call's slice lies where it is
posted, with a length that can be seen.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatronish.comm.history import Call, Event
from megatronish.pipeline.schedules import Backward
from megatronish.preflight.job import Job
from megatronish.preflight.page_data import Describer, in_words
from megatronish.preflight.stages import Stage, read_stages
from megatronish.preflight.traffic import group_sizes, handed_bytes

UNIT = 1000
"""Microseconds of a trace that stand for a unit of time."""
COMPUTE, COLLECTIVES, MESSAGES = 0, 1, 2
THREADS = {COMPUTE: "compute", COLLECTIVES: "communication: collectives", MESSAGES: "communication: messages"}
MESSAGE_SHARE = 0.05
"""Of a unit, at most: the length of an exchange's slice."""

TraceEvent = dict[str, Any]


def write_trace(path: Path, job: Job, *, like: int = 0) -> int:
    """Write the last training step of the stages, as the ranks that share all other coordinates with rank `like` recorded it; the
    number of events. A path that ends with .gz is compressed; Perfetto opens both."""
    events = trace_events(job, like=like)
    text = ",\n".join(json.dumps(event, separators=(",", ":")) for event in events)
    whole = f'{{"displayTimeUnit":"ms","traceEvents":[\n{text}\n]}}\n'.encode()
    path.write_bytes(gzip.compress(whole, mtime=0) if path.suffix == ".gz" else whole)
    return len(events)


def trace_events(job: Job, *, like: int = 0) -> list[TraceEvent]:
    """Names first, then slices by time."""
    read = read_stages(job, like=like)
    names: list[TraceEvent] = []
    slices: list[TraceEvent] = []
    for stage in read.stages:
        names += _names(job, stage)
        slices += _slices(stage, Describer(group_sizes(job, stage.rank)), end=read.makespan)
    # Of slices that begin together the longest first: the others lie inside it.
    return names + sorted(slices, key=lambda event: (event["ts"], event["pid"], event["tid"], -event["dur"]))


def _names(job: Job, stage: Stage) -> Iterator[TraceEvent]:
    def meta(what: str, tid: int, **args: Any) -> TraceEvent:
        return {"ph": "M", "name": what, "pid": stage.stage, "tid": tid, "ts": 0, "args": args}

    yield meta("process_name", 0, name=f"stage {stage.stage}, {job.name(stage.rank)}")
    yield meta("process_sort_index", 0, sort_index=stage.stage)
    for tid, name in THREADS.items():
        yield meta("thread_name", tid, name=name)
        yield meta("thread_sort_index", tid, sort_index=tid)


def _slices(stage: Stage, describe: Describer, *, end: int) -> Iterator[TraceEvent]:
    def slice_(name: str, tid: int, start: float, length: float, **args: Any) -> TraceEvent:
        where = {"pid": stage.stage, "tid": tid, "ts": round(start * UNIT), "dur": round(length * UNIT)}
        return {"ph": "X", "name": name, **where, **({"args": args} if args else {})}

    yield from _outside(slice_, "before the first action", describe(stage.before), 0, MESSAGE_SHARE)
    for number, step in enumerate(stage.steps):
        if step.start is None or step.end is None:
            break
        following = stage.steps[number + 1].end if number + 1 < len(stage.steps) else None
        args = {"inferred": True} if step.is_inferred else {}
        kind = "backward" if isinstance(step.action, Backward) else "forward"
        yield slice_(str(step.action), COMPUTE, step.start, step.end - step.start, kind=kind, **args)
        if done := describe(step.parts):
            yield slice_(", ".join(done), COLLECTIVES, step.start, step.end - step.start, action=str(step.action))
        batches = [batch for events in step.exchanges for batch in batches_of(events)]
        room = ((following or step.end + 1) - step.end) * 0.9
        length = min(MESSAGE_SHARE, room / max(1, len(batches)))
        for place, batch in enumerate(batches):
            name = f"exchange with stage {batch[0].peer}"
            yield slice_(name, MESSAGES, step.end + place * length, length, calls=[_message(call) for call in batch])
    yield from _outside(slice_, "after the last action, not to scale", describe(stage.after), end, 1)


def _outside(slice_: Any, name: str, lines: Sequence[str], start: float, length: float) -> Iterator[TraceEvent]:
    if lines:
        yield slice_(name, COLLECTIVES, start, length, calls=list(lines))


def batches_of(events: Sequence[Event]) -> list[list[Call]]:
    """The messages of each exchange."""
    batches: dict[tuple[str, int], list[Call]] = {}
    for event in events:
        if isinstance(event, Call) and event.peer is not None:
            batches.setdefault((event.group, event.batch), []).append(event)
    return list(batches.values())


def _message(call: Call) -> str:
    return f"{call.operation} {call.what or 'message'}, {in_words(handed_bytes(call))}, tag {call.tag}"
