"""Slurm's lists of hosts, `node[001-128,200],login1`, without asking scontrol: a thousand ranks would ask it at once."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from megatronish.errors import UserError

_NUMBERS = re.compile(r"(\d+)(?:-(\d+))?")
_COUNT = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def expand_hosts(nodelist: str, *, variable: str = "SLURM_JOB_NODELIST") -> Iterator[str]:
    """Every host of a list, in its order; as `scontrol show hostnames`. The first comes without the others being made.

    Several brackets in a name count like digits, the last one fastest. UserError, naming `variable`, where it is no such list."""
    for name in _split(nodelist, variable):
        parts = re.split(r"\[([^\[\]]*)\]", name)  # text, numbers, text, numbers, ..., text
        if not name or any(bracket in text for text in parts[::2] for bracket in "[]"):
            raise _refused(nodelist, variable, f"{name!r} is not the name of a host")
        choices = [_numbers(part, nodelist, variable) if place % 2 else [part] for place, part in enumerate(parts)]
        yield from map("".join, itertools.product(*choices))


def expand_counts(text: str, *, variable: str = "SLURM_STEP_TASKS_PER_NODE") -> list[int]:
    """`2(x3),1` -> [2, 2, 2, 1]. UserError, naming `variable`, for anything else."""
    counts: list[int] = []
    for part in text.split(","):
        match = _COUNT.fullmatch(part)
        if match is None:
            raise UserError(f"{variable}={text!r} is not a list of counts such as 8(x4),2")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _split(nodelist: str, variable: str) -> Iterator[str]:
    """At the commas outside of brackets."""
    start = depth = 0
    for place, letter in enumerate(nodelist):
        depth += {"[": 1, "]": -1}.get(letter, 0)
        if depth not in (0, 1):
            raise _refused(nodelist, variable, f"the bracket at character {place + 1} does not match")
        if letter == "," and depth == 0:
            yield nodelist[start:place]
            start = place + 1
    if depth:
        raise _refused(nodelist, variable, "a bracket is not closed")
    yield nodelist[start:]


def _numbers(text: str, nodelist: str, variable: str) -> list[str]:
    """`001-003,7` -> 001, 002, 003, 7: as many digits as the first number of a range has."""
    found: list[str] = []
    for part in text.split(","):
        match = _NUMBERS.fullmatch(part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise _refused(nodelist, variable, f"{part!r} is not a number, nor a range of them")
        first, last = match[1], match[2] or match[1]
        found += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return found


def _refused(nodelist: str, variable: str, reason: str) -> UserError:
    short = nodelist if len(nodelist) <= 80 else nodelist[:77] + "..."
    return UserError(f"{variable}={short!r} is not a list of hosts such as node[001-128,200]: {reason}")
