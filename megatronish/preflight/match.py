"""Match what the ranks of a job communicate: every group's members do the same collectives in the same order, and every exchange
meets its mirror image. What several groups do to each other is in `order.py`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import NamedTuple

import numpy as np

from megatronish.comm.history import Call, Moment
from megatronish.preflight.coding import CodedJob, Collective, Done, Table, collective_of, things_done
from megatronish.preflight.divergence import Numbered, divergences
from megatronish.preflight.exchanges import match_exchanges
from megatronish.preflight.findings import Collected, Finding, Namer, people, verb
from megatronish.preflight.job import Job


class Instance(NamedTuple):
    """One group: all ranks that talk over one communicator."""

    name: str
    ranks: tuple[int, ...]


def match(job: Job) -> list[Finding]:
    """Everything that does not match, first divergent first; empty if all of it does. One finding for groups that are alike."""
    return match_coded(CodedJob(job)).findings


class Matched(NamedTuple):
    """What came of it."""

    findings: list[Finding]
    num_groups: int
    num_collectives: int
    """Each counted once for its group."""
    num_messages: int
    """Each counted once for its two ends."""


def match_coded(coded: CodedJob) -> Matched:
    """`match` of a job that is coded already."""
    collected = Collected()
    instances = groups_of(coded, collected)
    _match_collectives(coded, instances, collected)
    match_exchanges(coded, instances, collected)
    findings = collected.in_order()
    if findings:
        return Matched(findings, len(instances), 0, 0)
    num_collectives = sum(len(coded.codes(coded.collective_program(ranks[0], group))) for group, ranks in instances)
    return Matched([], len(instances), num_collectives, _num_sends(coded))


def _num_sends(coded: CodedJob) -> int:
    sends = np.array([len(unit.sends) for unit in coded.unit_table.items], dtype=np.int64)
    by_log = [sum(int(sends[coded.codes(program)].sum()) for program in programs.values()) for programs in coded.units]
    return sum(by_log[log] for log in coded.job.log_of)


def groups_of(coded: CodedJob, collected: Collected) -> list[Instance]:
    """Every group whose members agree on who they are; findings for all others."""
    job = coded.job
    seen: dict[tuple[str, int], Instance] = {}  # by id: hashing the world's ranks once a rank is slow
    claims: defaultdict[Instance, list[int]] = defaultdict(list)
    for rank, groups in enumerate(job.groups):
        for group, ranks in groups.items():
            key = (group, id(ranks))
            if key not in seen:
                seen[key] = Instance(group, ranks)
            claims[seen[key]].append(rank)
    sound: list[Instance] = []
    for instance, claimants in claims.items():
        if sorted(instance.ranks) == claimants:
            sound.append(instance)
        else:
            _report_members(job, instance, claimants, collected)
    for rank, log in enumerate(job.log_of):
        called = {*coded.collectives[log], *(group for group, _ in coded.units[log])}
        for group in sorted(called - set(job.groups[rank])):
            text = f"{job.name(rank)} calls on {group}, a group that it is not in"
            collected.add(("unknown", group, log), Finding("members", text, (rank,), group=group))
    return sound


def _report_members(job: Job, instance: Instance, claimants: Sequence[int], collected: Collected) -> None:
    """The members that most of a group do not count on, or that do not know of it."""
    group, ranks = instance
    absent = [rank for rank in ranks if rank not in claimants]
    whole = f"{group} of ranks {_list(ranks)}"
    if absent and len(claimants) * 2 > len(ranks):
        culprits, others = tuple(absent), tuple(claimants)
        text = f"{people(absent, job.name)} {verb(absent, 'is', 'are')} not in {whole}, which {people(claimants, job.name)} opened"
        text += f": {_membership(job, absent[0], group)}"
    else:
        culprits, others = tuple(claimants), tuple(absent)
        text = f"{people(claimants, job.name)} opened {whole}"
        text += f", which {people(absent, job.name)} {verb(absent, 'is', 'are')} not in: " if absent else ", without being in it"
        text += _membership(job, absent[0], group) if absent else ""
    if len(absent) == len(claimants):  # nobody is odd
        culprits, others = tuple(sorted({*absent, *claimants})), ()
    places = tuple(ranks.index(rank) for rank in absent)
    collected.add((group, len(ranks), places, len(claimants)), Finding("members", text, culprits, others, group))


def _membership(job: Job, rank: int, group: str) -> str:
    if not 0 <= rank < job.num_ranks:
        return f"the job has no rank {rank}"
    theirs = job.groups[rank].get(group)
    return f"rank {rank} has no {group}" if theirs is None else f"the {group} of rank {rank} is ranks {_list(theirs)}"


def _list(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8:,} more" if len(ranks) > 8 else "")


def _match_collectives(coded: CodedJob, instances: Sequence[Instance], collected: Collected) -> None:
    job = coded.job
    usage: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for log, programs in enumerate(coded.collectives):
        for group, program in programs.items():
            usage[group][program] += coded.ranks_with[log]

    @cache
    def sequence(log: int, group: str) -> Numbered:
        return Numbered(0, coded.codes(coded.collectives[log].get(group, 0)), cache(lambda: things_done(job, log, group)))

    for group, ranks in instances:
        key_of = {rank: coded.collective_program(rank, group) for rank in ranks}
        if len(set(key_of.values())) <= 1:
            continue
        sequences = {key: sequence(job.log_of[rank], group) for rank, key in reversed(key_of.items())}
        for likeness, finding in divergences(group, key_of, sequences, name=job.name, usage=usage[group]):
            places = tuple(ranks.index(rank) for rank in finding.culprits)
            collected.add((group, places, likeness), finding)


def match_recent(group: str, recent: Mapping[int, tuple[int, Sequence[tuple[Moment, Call]]]], *, name: Namer) -> list[Finding]:
    """Whether the members of a group agree in what each did last, as far back as all remember.

    recent: by rank, the number of its first remembered call of the group, and its collectives on that group from there on, with no
    other call between them. Ranks that have done less than others are behind, not wrong: see `waits.py`."""
    signatures: Table[Collective] = Table()
    keys: Table[tuple[int, bytes]] = Table()
    key_of: dict[int, int] = {}
    sequences: dict[int, Numbered] = {}
    for rank, (first_number, calls) in recent.items():
        numbers = [signatures.number(collective_of(c)) for _, c in calls]
        done = [Done(position, moment, (call,)) for position, (moment, call) in enumerate(calls)]
        codes = np.array(numbers, dtype=np.uint32)
        key = key_of[rank] = keys.number((first_number, codes.tobytes()))
        sequences.setdefault(key, Numbered(first_number, codes, partial(list, done)))
    usage = Counter(key_of.values())
    return [finding for _, finding in divergences(group, key_of, sequences, name=name, usage=usage, are_whole=False)]
