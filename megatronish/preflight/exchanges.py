"""Match messages: what one rank of a pair sends, the other receives, in the same order and posted in mirrored batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from megatronish.preflight.align import Divergence, explain
from megatronish.preflight.coding import CodedJob, Codes, Done, things_done
from megatronish.preflight.findings import Collected, Finding


class _End(NamedTuple):
    """One rank of a pair, and the place of the other in their group."""

    rank: int
    peer: int
    program: int
    weight: int
    """Ranks of the job with the same messages to that place: an odd rank has few."""


def match_exchanges(coded: CodedJob, instances: Sequence[tuple[str, tuple[int, ...]]], collected: Collected) -> None:
    """Findings for every pair of every group whose messages do not meet."""
    usage: Counter[tuple[str, int, int]] = Counter()
    for log, programs in enumerate(coded.units):
        for (group, peer), program in programs.items():
            usage[group, peer, program] += coded.ranks_with[log]
    sound: set[tuple[int, int]] = set()
    for group, ranks in instances:
        for low, high in _pairs(coded, group, ranks, collected):
            here, there = coded.unit_program(ranks[low], group, high), coded.unit_program(ranks[high], group, low)
            if (here, there) in sound:
                continue
            ends = (
                _End(ranks[low], high, here, usage[group, high, here]),
                _End(ranks[high], low, there, usage[group, low, there]),
            )
            found = _first_divergence(coded, group, ends)
            if found is None:
                sound.add((here, there))
            else:
                collected.add((group, low, high, found[0]), found[1])


def _pairs(coded: CodedJob, group: str, ranks: tuple[int, ...], collected: Collected) -> list[tuple[int, int]]:
    """Places that exchange messages, lower first."""
    pairs: set[tuple[int, int]] = set()
    for place, rank in enumerate(ranks):
        for other, peer in coded.units[coded.job.log_of[rank]]:
            if other != group:
                continue
            if peer == place or not 0 <= peer < len(ranks):
                why = "itself" if peer == place else f"place {peer} of a group of {len(ranks)}"
                text = f"{coded.job.name(rank)} exchanges messages on {group} with {why}"
                collected.add((group, place, peer), Finding("exchange", text, (rank,), group=group))
            else:
                pairs.add((min(place, peer), max(place, peer)))
    return sorted(pairs)


def _first_divergence(coded: CodedJob, group: str, ends: tuple[_End, _End]) -> tuple[Hashable, Finding] | None:
    """What does not meet first, if anything.

    Batches meet batches. Messages alone meet messages alone, each direction in its own order: both ends may send first."""
    a, b = coded.mirror[coded.codes(ends[0].program)], coded.codes(ends[1].program)
    if np.array_equal(a, b):
        return None
    is_batch = np.array([unit.is_batch for unit in coded.unit_table.items], dtype=bool)
    is_send = np.array([bool(unit.sends) for unit in coded.unit_table.items], dtype=bool)
    found = []
    for keep in (is_batch, ~is_batch & is_send, ~is_batch & ~is_send):
        ours, theirs = np.flatnonzero(keep[a]), np.flatnonzero(keep[b])
        if not np.array_equal(a[ours], b[theirs]):
            done = [
                [everything[i] for i in kept]
                for kept, everything in (
                    (ours, things_done(coded.job, coded.job.log_of[ends[0].rank], group, ends[0].peer)),
                    (theirs, things_done(coded.job, coded.job.log_of[ends[1].rank], group, ends[1].peer)),
                )
            ]
            found.append(_describe(coded, group, ends, (a[ours], b[theirs]), (done[0], done[1])))
    return min(found, key=lambda pair: pair[1].position, default=None)


def _describe(
    coded: CodedJob,
    group: str,
    ends: tuple[_End, _End],
    codes: tuple[Codes, Codes],
    done: tuple[Sequence[Done], Sequence[Done]],
) -> tuple[Hashable, Finding]:
    name = coded.job.name
    # The odd end is the one whose messages few ranks of the job have.
    odd = 0 if ends[0].weight < ends[1].weight else 1
    usual = 1 - odd
    divergence = explain(codes[odd], codes[usual], (done[odd], done[usual]))
    mine, theirs = (done[end][divergence.position] if divergence.position < len(done[end]) else None for end in (odd, usual))
    they, others = name(ends[odd].rank), name(ends[usual].rank)
    kind, text = _words(divergence, (they, others), (mine, theirs))
    text += f" (exchange {divergence.position + 1} of this kind between the two on {group})"
    first = mine or theirs
    culprits = (ends[odd].rank,) if ends[odd].weight < ends[usual].weight else tuple(sorted(end.rank for end in ends))
    rest = tuple(end.rank for end in ends if end.rank not in culprits)
    finding = Finding(kind, text, culprits, rest, group, 0 if first is None else first.position)  # type: ignore[arg-type]
    return (divergence, mine, theirs), finding


def _words(divergence: Divergence, names: tuple[str, str], things: tuple[Done | None, Done | None]) -> tuple[str, str]:
    """(kind, text) for the odd end, named first, and the usual one."""
    (they, others), (mine, theirs) = names, things
    more = f" and {divergence.num_calls - 1} more after it" if divergence.num_calls > 1 else ""
    if divergence.explanation == "skips" or mine is None:
        text = f"{others} has {theirs}{more}, and {they} nothing that meets it"
        return "left over", text + (f": its next is {mine}" if mine else f": it has nothing more for {others}")
    if divergence.explanation == "adds" or theirs is None:
        text = f"{they} has {mine}{more}, and {others} nothing that meets it"
        return "left over", text + (f": its next is {theirs}" if theirs else f": it has nothing more for {they}")
    is_asymmetric = len(mine.calls) != len(theirs.calls)
    why = "the batches are not mirror images" if is_asymmetric else "one is not the other's mirror image"
    return "exchange", f"{they} does {mine}, where {others} does {theirs}: {why}"
