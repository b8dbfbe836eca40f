"""What is wrong with a job, in words that name the rank, the call and the place in the code."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["members", "collective", "exchange", "left over", "order", "hang"]
Namer = Callable[[int], str]
"""Rank -> its name, e.g. `Job.name`."""

NUM_NAMED = 3
"""Ranks that a text lists before it counts the rest."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    kind: Kind
    text: str
    culprits: tuple[int, ...]
    """The ranks that differ from what most do; all concerned, where there are as many of one kind as of the other."""
    others: tuple[int, ...] = ()
    """Ranks that the culprits disagree with, or wait for."""
    group: str = ""
    position: int = 0
    """Of the first divergent event in its rank's log: what comes first is the likeliest cause."""
    copies: int = 1
    """Groups that say the same of ranks in the same places."""

    def __str__(self) -> str:
        if self.copies == 1:
            return self.text
        more = self.copies - 1
        return f"{self.text}; and {more:,} more {'group' if more == 1 else 'groups'} like it"


class Collected:
    """Findings, those of groups that are alike joined."""

    def __init__(self) -> None:
        self._found: dict[Hashable, Finding] = {}

    def add(self, likeness: Hashable, finding: Finding) -> None:
        """likeness: equal for findings that differ in nothing but which copy of a group they are of."""
        known = self._found.get(likeness)
        if known is not None:
            culprits = tuple(sorted({*known.culprits, *finding.culprits}))
            finding = replace(known, culprits=culprits, copies=known.copies + 1)
        self._found[likeness] = finding

    def in_order(self) -> list[Finding]:
        """First divergent first."""
        return sorted(self._found.values(), key=lambda finding: (finding.kind != "members", finding.position, finding.text))


def people(ranks: Iterable[int], name: Namer) -> str:
    """E.g. `rank 5 [pp0 dp2 tp1]`, or `rank 0 [pp0 dp0 tp0], rank 1 [pp0 dp0 tp1], ranks 2, 3 and 5 more`."""
    ranks = sorted(ranks)
    if len(ranks) <= 2:
        return " and ".join(map(name, ranks))
    rest = ranks[1:NUM_NAMED]
    more = len(ranks) - 1 - len(rest)
    if not more:
        return f"{name(ranks[0])} and ranks {' and '.join(map(str, rest))}"
    return f"{name(ranks[0])}, ranks {', '.join(map(str, rest))} and {more:,} more"


def verb(ranks: Sequence[int], singular: str, plural: str) -> str:
    """The form that goes with `people(ranks, ...)`."""
    return singular if len(ranks) == 1 else plural
