"""Who in a group leaves the order of calls that the others keep, and how, in words. Knows nothing of jobs: whole logs and the last
few calls of a run that hangs are compared alike."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatronish.preflight.align import Divergence, common_prefix, explain
from megatronish.preflight.coding import Codes, Done
from megatronish.preflight.findings import Finding, Namer, people, verb


@dataclass(frozen=True)
class Numbered:
    """What one or more ranks did on a group, from its call `first_number` on."""

    first_number: int
    codes: Codes
    """Equal for equal calls."""
    done: Callable[[], Sequence[Done]]
    """The same in full."""


class Sides(NamedTuple):
    """The odd ones of a group, and those that keep the usual order."""

    group: str
    odd: tuple[int, ...]
    usual: tuple[int, ...]
    is_tie: bool
    """As many of one kind as of the other: nobody is odd."""


def divergences(
    group: str,
    key_of: Mapping[int, int],
    sequences: Mapping[int, Numbered],
    *,
    name: Namer,
    usage: Mapping[int, int],
    are_whole: bool = True,
) -> Iterator[tuple[Hashable, Finding]]:
    """One finding for each kind of rank that leaves the order of most, and what makes it equal to those of other groups.

    key_of: by rank, a key of `sequences`. usage: by key, how many ranks of the job have it, other copies of the group included:
    of two that disagree, the odd one is odd elsewhere too. are_whole: False for what was done so far, of which some may have done
    more than others."""
    members = dict(key_of)
    first = max((sequences[key].first_number for key in members.values()), default=0)
    codes = {key: sequence.codes[first - sequence.first_number :] for key, sequence in sequences.items()}
    while len(keys := sorted(set(members.values()))) > 1:
        position = min(common_prefix(codes[keys[0]], codes[key]) for key in keys[1:])
        parts: defaultdict[int, list[int]] = defaultdict(list)
        for rank, key in members.items():
            parts[int(codes[key][position]) if position < len(codes[key]) else -1].append(rank)
        if not are_whole:
            parts.pop(-1, None)  # behind, not wrong: they drop out
        if not parts:
            return
        weights = {
            code: (len(ranks), sum(usage.get(key, 0) for key in {members[rank] for rank in ranks})) for code, ranks in parts.items()
        }
        usual = max(parts, key=lambda code: (weights[code], -min(parts[code])))
        for code in sorted(set(parts) - {usual}, key=lambda code: parts[code]):
            sides = Sides(group, tuple(parts[code]), tuple(parts[usual]), weights[code] == weights[usual])
            odd_key, usual_key = (_commonest(members[rank] for rank in parts[part]) for part in (code, usual))
            odd, usually = (sequences[key].done()[first - sequences[key].first_number :] for key in (odd_key, usual_key))
            divergence = explain(codes[odd_key], codes[usual_key], (odd, usually))
            yield _likeness(divergence, odd, usually), finding_of(sides, divergence, odd, usually, name, first)
        members = {rank: members[rank] for rank in parts[usual]}


def _commonest(keys: Iterable[int]) -> int:
    ((key, _),) = Counter(keys).most_common(1)
    return key


def _likeness(divergence: Divergence, odd: Sequence[Done], usual: Sequence[Done]) -> Hashable:
    return divergence, _at(odd, divergence.position), _at(usual, divergence.position)


def _at(done: Sequence[Done], position: int) -> Done | None:
    return done[position] if position < len(done) else None


def finding_of(
    sides: Sides, divergence: Divergence, odd: Sequence[Done], usual: Sequence[Done], name: Namer, first_number: int
) -> Finding:
    """The divergence in words."""
    explanation, position, count = divergence
    group, they = sides.group, people(sides.odd, name)
    others = people(sides.usual, name)
    mine, theirs = _at(odd, position), _at(usual, position)
    more = f" and {count - 1} more after it" if count > 1 else ""
    if explanation == "skips":
        text = f"{they} {verb(sides.odd, 'skips', 'skip')} {theirs}{more}, which {others} {verb(sides.usual, 'does', 'do')}"
        text += f"; next on {group} {they} {verb(sides.odd, 'does', 'do')} {mine}" if mine else ""
    elif explanation == "adds":
        text = f"{they} {verb(sides.odd, 'has', 'have')} one more: {mine}{more}"
        text += f", where {others} {verb(sides.usual, 'does', 'do')} " + (str(theirs) if theirs else f"nothing more on {group}")
    elif explanation == "swaps":
        text = f"{they} {verb(sides.odd, 'does', 'do')} {mine} before {_at(odd, position + 1)}"
        text += f", which {others} {verb(sides.usual, 'does', 'do')} the other way round: {theirs} first"
    else:
        text = f"{they} {verb(sides.odd, 'does', 'do')} " + (str(mine) if mine else f"nothing more on {group}")
        text += f", where {others} {verb(sides.usual, 'does', 'do')} " + (str(theirs) if theirs else f"nothing more on {group}")
    text += f" (call {first_number + position + 1} of {group})"
    culprits, rest = (tuple(sorted(sides.odd + sides.usual)), ()) if sides.is_tie else (sides.odd, sides.usual)
    first = mine or theirs
    return Finding("collective", text, culprits, rest, group, 0 if first is None else first.position)
