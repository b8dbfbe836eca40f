"""What each class of ranks does, made ready to be simulated: calls among ranks of the class alone are left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megatronish.preflight.coding import CodedJob, Op
from megatronish.preflight.quotient import Quotient


class Run(NamedTuple):
    """Collectives of one group in a row, or one unit of messages."""

    slot: int
    """Place of the group in `Runs.groups`."""
    length: int
    op: int
    """The first one's number in `CodedJob.ops`."""
    place: int
    """Which op of the log the first one is."""


class Runs(NamedTuple):
    """All calls of a class in order, without waits."""

    groups: tuple[str, ...]
    runs: list[Run]
    places: list[int]
    """Of every call, in the order of the log: which op of the log it is."""
    starts: list[int]
    """By run: its first call in `places`."""


def runs_of(quotient: Quotient) -> list[Runs]:
    """By class; equal ones are shared."""
    known: dict[tuple[int, tuple[str, ...]], Runs] = {}
    found = []
    for number, fellows in enumerate(quotient.fellows):
        key = (quotient.structure(number), tuple(sorted(fellows)))
        if key not in known:
            known[key] = _runs(quotient.coded, *key)
        found.append(known[key])
    return found


def _runs(coded: CodedJob, structure: int, groups: tuple[str, ...]) -> Runs:
    slot_of = np.where(coded.op_kinds == "wait", -1, coded.slots(groups))
    is_unit = coded.op_kinds == "unit"
    codes = coded.codes(structure)
    places = np.flatnonzero(slot_of[codes] >= 0)
    codes = codes[places]
    mine, units = slot_of[codes], is_unit[codes]
    begins = np.ones(len(codes), dtype=bool)
    begins[1:] = (mine[1:] != mine[:-1]) | units[1:] | units[:-1]
    starts = np.flatnonzero(begins)
    lengths = np.diff(np.append(starts, len(codes)))
    columns = (mine[starts], lengths, codes[starts], places[starts])
    runs = [Run(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
    return Runs(groups, runs, places.tolist(), starts.tolist())


class Step(NamedTuple):
    """Post a unit of a group, or block until an earlier call of it is done."""

    blocks: bool
    slot: int
    """Place of the group in `Program.groups`."""
    unit: int
    """Number of the collective or of the unit of messages on the group."""
    call: int
    """Number of the first call of that unit, or of the call that is waited for, among those of the group."""


class Program(NamedTuple):
    """What is left of a class's log from some place on, waits included."""

    groups: tuple[str, ...]
    steps: list[Step]
    units: list[list[int]]
    """By slot: the number in `CodedJob.ops` of each unit."""
    places: list[list[int]]
    """By slot: which op of the log each unit is."""


def programs_from(quotient: Quotient, places: Sequence[int]) -> list[Program]:
    """By class: what follows when everything before its place is done; equal ones are shared."""
    known: dict[tuple[int, tuple[str, ...], int], Program] = {}
    programs = []
    for number, (fellows, place) in enumerate(zip(quotient.fellows, places, strict=True)):
        key = (quotient.structure(number), tuple(sorted(fellows)), place)
        if key not in known:
            known[key] = _program(quotient.coded, *key)
        programs.append(known[key])
    return programs


def _program(coded: CodedJob, structure: int, groups: tuple[str, ...], start: int) -> Program:
    slots = {group: slot for slot, group in enumerate(groups)}
    keep = coded.slots(groups) >= 0
    codes = coded.codes(structure)
    places = start + np.flatnonzero(keep[codes[start:]])
    program = Program(groups, [], [[] for _ in groups], [[] for _ in groups])
    unit_of_call: list[list[int]] = [[] for _ in groups]
    ops: list[Op] = coded.ops.items
    steps = program.steps
    for place, code in zip(places.tolist(), codes[places].tolist(), strict=True):
        op = ops[code]
        slot = slots[op.group]
        calls = unit_of_call[slot]
        if op.kind == "wait":
            number = len(calls) - op.back
            if number >= 0:  # else it is done
                steps.append(Step(True, slot, calls[number], number))
            continue
        units = program.units[slot]
        steps.append(Step(False, slot, len(units), len(calls)))
        if op.kind == "blocking":
            steps.append(Step(True, slot, len(units), len(calls)))
        calls.extend([len(units)] * op.num_calls)
        units.append(code)
        program.places[slot].append(place)
    return program
