"""`megatronish why-hung RUN`: from what the ranks wrote, which one holds up the job, in which call, and who waits for it."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatronish.comm.history import Channel
from megatronish.preflight.dumps import Dump, Evidence, channel_at, collect, mirrored, short_stack
from megatronish.preflight.findings import people
from megatronish.preflight.recent import Disagreement, change_of, disagreements
from megatronish.preflight.waits import Blocked, Cause, why_blocked

_TIMED_OUT = re.compile(r"timed? ?out", re.IGNORECASE)
PATIENCE_SECONDS = 2.0
"""A rank that is waited for may be silent this long, and five times its longest pause so far, before it counts as stuck."""


@dataclass(frozen=True)
class Diagnosis:
    """What holds up a job."""

    culprits: tuple[int, ...]
    """Empty if nobody can be named."""
    text: str
    """What they do, or what is known."""
    waits: str = ""
    """Who waits for whom."""


def main(run: Path) -> int:
    """Print who holds up the job: 0, or 1 if it cannot be told. UserError without dumps."""
    evidence = collect(run)
    diagnosis = diagnose(evidence)
    print("\n".join(report(evidence, diagnosis)))
    return 0 if diagnosis.culprits else 1


def diagnose(evidence: Evidence) -> Diagnosis:
    """Calls that disagree prove a fault; an error comes next, then who is not there, then who is waited for."""
    found = disagreements(evidence)
    cause = _cause(evidence)
    waits = "" if cause is None else cause.text
    if found and not found[0].is_tie:
        return Diagnosis(found[0].finding.culprits, found[0].finding.text, waits)
    if failed := _failed(evidence):
        return Diagnosis((failed[0].rank,), f"{evidence.name(failed[0].rank)} failed with {failed[0].error}", waits)
    if found:
        return _settled(evidence, found, waits)
    if missing := _missing(evidence, () if cause is None else cause.ranks):
        text = "; ".join(f"{evidence.name(rank)} {_fate(evidence, rank)}" for rank in missing[:3])
        text += f"; and {len(missing) - 3:,} more like it" if len(missing) > 3 else ""
        return Diagnosis(tuple(missing), text, waits)
    return _by_waits(evidence, cause)


def _settled(evidence: Evidence, found: Sequence[Disagreement], waits: str) -> Diagnosis:
    """Of as many that do one thing as the other: who has changed since its step before, else who is in most disagreements."""
    concerned = sorted({rank for one in found for rank in one.finding.culprits})
    if changed := _changed(evidence, concerned, waits):
        first = next(one for one in found if set(changed.culprits) & set(one.finding.culprits))
        return replace(changed, text=f"{changed.text}: {first.finding.text}")
    counts = {rank: sum(rank in one.finding.culprits for one in found) for rank in concerned}
    most = [rank for rank in concerned if counts[rank] == max(counts.values())]
    return Diagnosis(tuple(most), found[0].finding.text, waits)


def _changed(evidence: Evidence, ranks: Sequence[int], waits: str) -> Diagnosis | None:
    """Those of the ranks that do something else than a step before; None if all do, or none."""
    changes = {rank: change for rank in ranks if (change := change_of(evidence.dumps[rank]))}
    if not changes or len(changes) == len(ranks):
        return None
    return Diagnosis(tuple(changes), "; ".join(f"{evidence.name(rank)} {change}" for rank, change in changes.items()), waits)


def _failed(evidence: Evidence) -> list[Dump]:
    """Ranks with an error of their own, first the first."""
    failed = [
        dump
        for dump in evidence.dumps.values()
        if dump.reason == "crash" and not dump.lost_peer and not _TIMED_OUT.search(dump.error or "")
    ]
    return sorted(failed, key=lambda dump: dump.time)


def _missing(evidence: Evidence, awaited: Sequence[int]) -> list[int]:
    """Ranks that are not there: they wrote nothing, or have been stopped or killed since, while others run on. One that runs may
    only be slower to write, unless it is waited for."""
    states = {rank: evidence.state_of(rank) for rank in range(evidence.shape.num_ranks)}
    crashed = {rank for rank, dump in evidence.dumps.items() if dump.reason == "crash"}
    lives = "running" in states.values()

    def is_missing(rank: int) -> bool:
        was_killed = states[rank] == "gone" and lives and rank not in crashed
        if rank in evidence.dumps:
            return states[rank] == "stopped" or was_killed
        return states[rank] != "running" or rank in awaited or bool(evidence.stacks_of_c_code(rank))

    return [rank for rank in states if is_missing(rank)]


def _by_waits(evidence: Evidence, cause: Cause | None) -> Diagnosis:
    if cause is None:
        lost = [dump for dump in evidence.dumps.values() if dump.lost_peer]
        if lost:
            return Diagnosis((), f"{evidence.name(lost[0].rank)} lost a peer, and every rank wrote: {lost[0].lost_peer}")
        waiting = sum(dump.blocked_in is not None or dump.in_read for dump in evidence.dumps.values())
        text = f"no rank hangs: all last calls agree, {waiting} of {len(evidence.dumps)} ranks wait, and nobody that they wait for"
        return Diagnosis((), f"{text} is missing; the job is slow, or its network is")
    if cause.is_cycle:
        if changed := _changed(evidence, cause.ranks, cause.text):
            return changed
        return Diagnosis(cause.ranks, f"{people(cause.ranks, evidence.name)} wait for each other", cause.text)
    stuck = [rank for rank in cause.ranks if rank in evidence.dumps and _is_stuck(evidence.dumps[rank])]
    if not stuck:
        last = cause.ranks[0]
        text = f"no rank hangs: all last calls agree, and {evidence.name(last)}, the last to come, {_fate(evidence, last)}"
        text += "; the job is slow. Ask again in a minute: a rank that is still there then is stuck"
        return Diagnosis((), text, cause.text)
    texts = [f"{evidence.name(rank)} {_fate(evidence, rank)}" for rank in stuck[:3]]
    return Diagnosis(tuple(stuck), "; ".join(texts), cause.text)


def _is_stuck(dump: Dump) -> bool:
    patience = max(PATIENCE_SECONDS, 5 * dump.longest_pause)
    return dump.reason == "timeout" or dump.idle_seconds > min(patience, dump.hang_seconds or patience)


def _cause(evidence: Evidence) -> Cause | None:
    """Who is waited for, or waits in a circle."""
    blocked = {}
    for rank, dump in evidence.dumps.items():
        place = dump.blocked_in
        if place is not None:
            blocked[rank] = Blocked(dump.describe(place), _missing_in_call(evidence, dump, place))
        elif dump.in_read and dump.waiting is not None:
            blocked[rank] = Blocked(f"a read of the device at {dump.describe(dump.waiting)}", _behind(evidence, dump))
    return why_blocked(
        {rank: wait for rank, wait in blocked.items() if wait.waits_for},
        name=evidence.name,
        fate=lambda rank: _fate(evidence, rank),
    )


def _missing_in_call(evidence: Evidence, dump: Dump, place: int) -> tuple[int, ...]:
    """Who has not come to a call; of those that wrote nothing it is not known, so they are named if all others have."""
    channel, number = channel_at(dump, place)
    ranks = dump.groups[channel.group]
    if channel.peer is None:
        others, theirs = [rank for rank in ranks if rank != dump.rank], channel
    else:
        others, theirs = [ranks[channel.peer]], mirrored(channel, ranks.index(dump.rank))
    return _without(evidence, others, theirs, number)


def _without(evidence: Evidence, ranks: Sequence[int], channel: Channel, number: int) -> tuple[int, ...]:
    behind = [rank for rank in ranks if rank in evidence.dumps and not evidence.dumps[rank].has_made(channel, number)]
    return tuple(behind or [rank for rank in ranks if rank not in evidence.dumps])


def _behind(evidence: Evidence, dump: Dump) -> tuple[int, ...]:
    """Who has not come to some call that this rank has given its device."""
    found: set[int] = set()
    for channel, count in dump.counts.items():
        ranks = dump.groups.get(channel.group, ())
        if channel.peer is None:
            found.update(_without(evidence, [rank for rank in ranks if rank != dump.rank], channel, count - 1))
        else:
            theirs = mirrored(channel, ranks.index(dump.rank))
            found.update(_without(evidence, [ranks[channel.peer]], theirs, count - 1))
    known = {rank for rank in found if rank in evidence.dumps}
    return tuple(sorted(known or found))


def _fate(evidence: Evidence, rank: int) -> str:
    """What is known of a rank that others wait for, as the end of a sentence."""
    dump, process = evidence.dumps.get(rank), evidence.where(rank)
    state = evidence.state_of(rank)
    if state == "stopped":
        return f"is stopped, by SIGSTOP or a debugger ({process}: kill -CONT goes on)"
    if dump is not None:
        if dump.reason == "crash":
            return "lost a peer" if dump.lost_peer else f"ended with {dump.error}"
        if (place := dump.blocked_in) is not None:
            return f"waits in {dump.describe(place)}, which all ranks have come to"
        return f"is in no call but at {dump.at} ({dump.moment}), and has communicated nothing for {dump.idle_seconds:.1f} s"
    if lines := evidence.stacks_of_c_code(rank):
        ours = [line for line in lines[1:] if "/megatronish/" in line and "/comm/" not in line] or lines[1:]
        at = f" at {ours[0]}" if ours else ""
        why = (
            f"crashed with `{lines[0]}`"
            if lines[0].startswith("Fatal")
            else "wrote nothing: C code does not give back Python's lock"
        )
        return f"{why}{at} ({process})"
    if state == "gone":
        return f"wrote nothing and is gone ({process}): killed from outside; if the kernel did it for memory, dmesg says so"
    if state == "running":
        return f"runs but wrote nothing ({process}): it waits for a disk or device in the kernel, or has just begun to hang"
    where = f" ({process}: look there whether it runs, with ps -o pid,stat,wchan)" if process else ""
    return f"wrote nothing: it was killed, is stopped, or its host is lost{where}"


def report(evidence: Evidence, diagnosis: Diagnosis) -> list[str]:
    """Lines for a terminal."""
    dumps, num_ranks = evidence.dumps, evidence.shape.num_ranks
    times = [dump.time for dump in dumps.values()]
    newest = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(max(times)))
    reasons = sorted({dump.reason for dump in dumps.values()})
    lines = [f"{len(dumps)} of {num_ranks} ranks wrote, the last at {newest} ({', '.join(reasons)})"]
    if absent := evidence.absent:
        lines[0] += f"; nothing from {people(absent, evidence.name)}"
    if max(times) - min(times) > 60:
        spread = max(times) - min(times)
        lines.append(f"warning: {spread:.0f} s between the first and the last; SIGUSR2 gives a picture of one moment")
    lines.append("")
    lines.append(("cause: " if diagnosis.culprits else "cannot tell: ") + diagnosis.text)
    if diagnosis.waits:
        lines.append(f"waits: {diagnosis.waits}")
    for rank in diagnosis.culprits[:2]:
        lines += _stack_lines(evidence, rank)
    return lines


def _stack_lines(evidence: Evidence, rank: int) -> list[str]:
    dump = evidence.dumps.get(rank)
    if dump is None:
        text = evidence.stacks_of_c_code(rank)[:12]
        return ["", f"{evidence.name(rank)}, as faulthandler saw it:", *(f"  {line}" for line in text)] if text else []
    ago = "" if dump.error is None else ", where its error came from"
    frames = [f"  {frame}" for frame in short_stack(dump.main_frames)]
    return ["", f"{evidence.name(rank)}, main thread, innermost last{ago}:", *frames]
