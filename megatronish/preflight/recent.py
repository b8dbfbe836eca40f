"""Where the last calls of a job's ranks disagree: within a group, between the two ends of a message, and across the groups of ranks
that should all do the same."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from megatronish.comm.history import Call, Channel, Moment, channel_of
from megatronish.preflight.coding import Done, Table, message_of
from megatronish.preflight.divergence import Numbered, divergences
from megatronish.preflight.dumps import Dump, Evidence, mirrored
from megatronish.preflight.findings import Finding
from megatronish.preflight.match import match_recent

Row = tuple[Moment, Call, int]
"""A call, and its number on its channel."""
_COUNTED = re.compile(r" \(call \d+ of [^()]*\)$")


@dataclass(frozen=True)
class Disagreement:
    """A finding about the last calls."""

    finding: Finding
    num_compared: int
    """Ranks that were compared: the more, the surer is who is odd."""

    @property
    def is_tie(self) -> bool:
        """As many do one thing as the other."""
        return not self.finding.others


def disagreements(evidence: Evidence) -> list[Disagreement]:
    """All of them, the surest first."""
    found = [*_of_stages(evidence), *_of_groups(evidence), *_of_messages(evidence)]
    return sorted(found, key=lambda one: (one.is_tie, -one.num_compared))


def change_of(dump: Dump) -> str | None:
    """How its last step departs from its step before, in words; None if it does the same as far as it has come. Of two that
    disagree, the one that has changed is odd."""
    steps: dict[int, list[Row]] = {}
    for row in dump.calls():
        if row[0].phase == "train":
            steps.setdefault(row[0].step, []).append(row)
    if len(steps) < 3:  # the ring may begin in the middle of the oldest
        return None
    before, last = list(steps.values())[-2:]
    for place, (moment, call, _) in enumerate(last):
        if place >= len(before) or _same(dump, call) != _same(dump, before[place][1]):
            then = str(before[place][1]) if place < len(before) else "nothing more"
            return f"does {call} at {call.site} ({moment}), where it did {then} a step before"
    return None


def _same(dump: Dump, call: Call) -> Hashable:
    return _likeness(call, dump), call.what


def instances(evidence: Evidence) -> list[tuple[str, tuple[int, ...]]]:
    """(name, ranks) of every group that some rank has opened."""
    return sorted({(name, ranks) for dump in evidence.dumps.values() for name, ranks in dump.groups.items()})


def _numberless(finding: Finding) -> Finding:
    # Numbers count from the first call that all remember, which says nothing.
    return replace(finding, text=_COUNTED.sub("", finding.text))


def _of_groups(evidence: Evidence) -> Iterator[Disagreement]:
    """Collectives of one group."""
    for group, ranks in instances(evidence):
        members = {rank: evidence.dumps[rank] for rank in ranks if rank in evidence.dumps}
        recent: dict[int, tuple[int, Sequence[tuple[Moment, Call]]]] = {}
        channel = Channel(group)
        for rank, dump in members.items():
            rows = [row for row in dump.calls() if channel_of(row[1]) == channel]
            first = rows[0][2] if rows else dump.counts.get(channel, 0)
            recent[rank] = first, [(moment, call) for moment, call, _ in rows]
        for finding in match_recent(group, recent, name=evidence.name):
            yield Disagreement(_numberless(finding), len(members))


def _of_messages(evidence: Evidence) -> Iterator[Disagreement]:
    """What one rank sends and the other receives."""
    for rank, dump in evidence.dumps.items():
        for channel in dump.counts:
            if channel.operation != "send" or channel.peer is None or channel.group not in dump.groups:
                continue
            ranks = dump.groups[channel.group]
            peer = evidence.dumps.get(ranks[channel.peer])
            if peer is None or channel.group not in peer.groups:
                continue
            theirs = mirrored(channel, ranks.index(rank))
            rows = {rank: _on(dump, channel), peer.rank: _on(peer, theirs)}
            signature = {key: [message_of(call) for _, call, _ in found] for key, found in rows.items()}
            counts = {rank: dump.counts.get(channel, 0), peer.rank: peer.counts.get(theirs, 0)}
            yield from _compared(evidence, channel.group, rows, signature, counts)


def _of_stages(evidence: Evidence) -> Iterator[Disagreement]:
    """Ranks of a pipeline stage do the same in the same order, on all their groups together."""
    stages: defaultdict[int, dict[int, Dump]] = defaultdict(dict)
    for rank, dump in evidence.dumps.items():
        stages[evidence.shape.coordinates(rank)["pp"]][rank] = dump
    for stage, dumps in stages.items():
        if len(dumps) < 2:
            continue
        first = _first_remembered_by_all(list(dumps.values()))
        rows = {
            rank: [row for row in dump.calls() if row[2] >= first.get(_common(channel_of(row[1]), dump), 0)]
            for rank, dump in dumps.items()
        }
        signature = {rank: [_likeness(call, dumps[rank]) for _, call, _ in found] for rank, found in rows.items()}
        yield from _compared(evidence, f"the groups of stage {stage}", rows, signature, dict.fromkeys(rows, None))


def _first_remembered_by_all(dumps: Sequence[Dump]) -> dict[Channel, int]:
    """By channel: the first number that every rank still has."""
    first: dict[Channel, int] = {}
    for dump in dumps:
        mine = {_common(channel, dump): count for channel, count in dump.counts.items()}
        for _, call, number in reversed(dump.calls()):
            mine[_common(channel_of(call), dump)] = number
        for channel, number in mine.items():
            first[channel] = max(first.get(channel, 0), number)
    return first


def _common(channel: Channel, dump: Dump) -> Channel:
    """The same for both ranks of a pair, whose peers are each other."""
    if channel.peer is None or len(dump.groups.get(channel.group, ())) != 2 or channel.group in ("pp", "ends"):
        return channel
    return channel._replace(peer=-1)


def _likeness(call: Call, dump: Dump) -> Hashable:
    channel = _common(channel_of(call), dump)
    return channel, call.operation, call.num_elements, call.dtype, call.reduce_op, call.tag


def _on(dump: Dump, channel: Channel) -> list[Row]:
    return [row for row in dump.calls() if channel_of(row[1]) == channel]


def _compared(
    evidence: Evidence,
    group: str,
    rows: Mapping[int, Sequence[Row]],
    signatures: Mapping[int, Sequence[Hashable]],
    counts: Mapping[int, int | None],
) -> Iterator[Disagreement]:
    """counts: calls on a channel so far, where the rows are those of one; None: the rows begin at the same call."""
    numbers: Table[Hashable] = Table()
    keys: Table[Hashable] = Table()
    key_of: dict[int, int] = {}
    sequences: dict[int, Numbered] = {}
    for rank, found in rows.items():
        codes = np.array([numbers.number(signature) for signature in signatures[rank]], dtype=np.uint32)
        count = counts[rank]
        first = 0 if count is None else found[0][2] if found else count
        key = key_of[rank] = keys.number((first, codes.tobytes()))
        done = [Done(place, moment, (call,)) for place, (moment, call, _) in enumerate(found)]
        sequences.setdefault(key, Numbered(first, codes, partial(list, done)))
    for _, finding in divergences(group, key_of, sequences, name=evidence.name, usage=Counter(key_of.values()), are_whole=False):
        yield Disagreement(_numberless(finding), len(rows))
