"""Match messages: what one rank of a pair sends, the other receives, in the same order and posted in mirrored batches."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatronish.preflight.align import Divergence, explain
from megatronish.preflight.coding import CodedJob, Codes, Done, things_done
from megatronish.preflight.findings import Collected, Finding

Places = npt.NDArray[np.intp]


class _End(NamedTuple):
    """One rank of a pair."""

    rank: int
    place: int
    program: int
    peer: int = -1
    """Place of the other."""
    weight: tuple[int, int] = (0, 0)
    """Ranks in the same place of such groups with the same messages to that peer, and minus the number of partners that disagree
    with this one: what is odd has less."""


def match_exchanges(coded: CodedJob, instances: Sequence[tuple[str, tuple[int, ...]]], collected: Collected) -> None:
    """Findings for every pair of every group whose messages do not meet."""
    pairs: defaultdict[tuple[str, int], set[tuple[int, int]]] = defaultdict(set)
    """By group and its size: places that exchange messages in any instance of it."""
    for group, ranks in instances:
        pairs[group, len(ranks)] |= _pairs(coded, group, ranks, collected)
    usage: Counter[tuple[str, int, int, int]] = Counter()
    """(group, place, place of the partner, program) -> ranks; to have no messages is a program too."""
    sound: set[tuple[int, int]] = set()
    disputed: list[tuple[str, _End, _End]] = []
    for group, ranks in instances:
        for low, high in sorted(pairs[group, len(ranks)]):
            here, there = coded.unit_program(ranks[low], group, high), coded.unit_program(ranks[high], group, low)
            usage[group, low, high, here] += 1
            usage[group, high, low, there] += 1
            if (here, there) in sound:
                continue
            if _differing(coded, here, there):
                disputed.append((group, _End(ranks[low], low, here), _End(ranks[high], high, there)))
            else:
                sound.add((here, there))
    disputes = Counter(end.rank for _, *ends in disputed for end in ends)
    for group, low_end, high_end in disputed:
        ends = [
            end._replace(peer=other.place, weight=(usage[group, end.place, other.place, end.program], -disputes[end.rank]))
            for end, other in ((low_end, high_end), (high_end, low_end))
        ]
        likeness, finding = _first_divergence(coded, group, (ends[0], ends[1]))
        collected.add((group, low_end.place, high_end.place, likeness), finding)


def _pairs(coded: CodedJob, group: str, ranks: tuple[int, ...], collected: Collected) -> set[tuple[int, int]]:
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
    return pairs


def _differing(coded: CodedJob, here: int, there: int) -> list[tuple[Places, Places]]:
    """Of the units of two programs, those of a kind that are not each other's mirror images.

    Batches meet batches. Messages alone meet messages alone, each direction in its own order: both ends may send first."""
    a, b = coded.mirror[coded.codes(here)], coded.codes(there)
    if np.array_equal(a, b):
        return []
    is_batch = np.array([unit.is_batch for unit in coded.unit_table.items], dtype=bool)
    is_send = np.array([bool(unit.sends) for unit in coded.unit_table.items], dtype=bool)
    kinds = (is_batch, ~is_batch & is_send, ~is_batch & ~is_send)
    kept = [(np.flatnonzero(kind[a]), np.flatnonzero(kind[b])) for kind in kinds]
    return [(ours, theirs) for ours, theirs in kept if not np.array_equal(a[ours], b[theirs])]


def _first_divergence(coded: CodedJob, group: str, ends: tuple[_End, _End]) -> tuple[Hashable, Finding]:
    """What does not meet first."""
    a, b = coded.mirror[coded.codes(ends[0].program)], coded.codes(ends[1].program)
    everything = [things_done(coded.job, coded.job.log_of[end.rank], group, end.peer) for end in ends]
    found = []
    for ours, theirs in _differing(coded, ends[0].program, ends[1].program):
        done = [everything[0][i] for i in ours], [everything[1][i] for i in theirs]
        found.append(_describe(coded, group, ends, (a[ours], b[theirs]), done))
    return min(found, key=lambda pair: pair[1].position)


def _describe(
    coded: CodedJob,
    group: str,
    ends: tuple[_End, _End],
    codes: tuple[Codes, Codes],
    done: tuple[Sequence[Done], Sequence[Done]],
) -> tuple[Hashable, Finding]:
    name = coded.job.name
    # The odd end is the one whose messages few ranks in its place have; else the one that others disagree with too.
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
