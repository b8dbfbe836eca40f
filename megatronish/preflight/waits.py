"""Who waits for whom: the cycle of waits, or the chain to one who waits for nobody, in words."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from megatronish.preflight.findings import Namer

Node = TypeVar("Node", bound=Hashable)
WaitsFor = Callable[[Node], Iterable[Node]]


@dataclass(frozen=True)
class Waits(Generic[Node]):
    """A path of waits."""

    chain: tuple[Node, ...]
    """Each waits for the next."""
    is_cycle: bool
    """The last waits for the first; else it waits for nobody: what it does instead is the cause."""


def find_cause(starts: Sequence[Node], waits_for: WaitsFor[Node]) -> Waits[Node] | None:
    """Why the starts wait: the nearest node that waits for nobody, else a cycle, that of the first start if it is in one, as
    short as can be found; None without any wait."""
    came_from: dict[Node, Node | None] = dict.fromkeys(starts)
    queue = deque(starts)
    while queue:
        node = queue.popleft()
        found_any = False
        for other in waits_for(node):
            found_any = True
            if other not in came_from:
                came_from[other] = node
                queue.append(other)
        if not found_any and came_from[node] is not None:
            return Waits(_path(came_from, node), is_cycle=False)
    for start in starts[:1]:
        if own := _shortest_cycle(start, waits_for):
            return own
    cycles = (_shortest_cycle(node, waits_for) for node in _walk(starts, waits_for))
    return min((cycle for cycle in cycles if cycle), key=lambda cycle: len(cycle.chain), default=None)


def _path(came_from: Mapping[Node, Node | None], node: Node) -> tuple[Node, ...]:
    path = [node]
    while (before := came_from[path[-1]]) is not None:
        path.append(before)
    return tuple(reversed(path))


def _walk(starts: Sequence[Node], waits_for: WaitsFor[Node]) -> list[Node]:
    """The nodes of one cycle: where one gets by following each node's first wait."""
    if not starts:
        return []
    path, seen = [starts[0]], {starts[0]: 0}
    while True:
        following = next(iter(waits_for(path[-1])), None)
        if following is None:
            return path
        if following in seen:
            return path[seen[following] :]
        seen[following] = len(path)
        path.append(following)


def _shortest_cycle(start: Node, waits_for: WaitsFor[Node]) -> Waits[Node] | None:
    came_from: dict[Node, Node | None] = {start: None}
    queue = deque([start])
    while queue:
        node = queue.popleft()
        for other in waits_for(node):
            if other == start:
                return Waits(_path(came_from, node), is_cycle=True)
            if other not in came_from:
                came_from[other] = node
                queue.append(other)
    return None


def in_words(waits: Waits[Node], *, does: Callable[[Node], str], name: Callable[[Node], str], fate: Callable[[Node], str]) -> str:
    """E.g. `rank 0 [..] in all_reduce on tp at SITE waits for rank 1 [..], which is in all_gather on dp ...`.

    name: of a node's rank. does: what it is in. fate: of a node that waits for nobody, e.g. `has ended`."""
    first, *others = waits.chain
    if not others and not waits.is_cycle:
        return f"{name(first)} {fate(first)}"
    text = f"{name(first)}, in {does(first)}, waits for "
    for node in others[:-1] if not waits.is_cycle else others:
        text += f"{name(node)}, which is in {does(node)} and waits for "
    return text + (name(first) if waits.is_cycle else f"{name(others[-1])}, which {fate(others[-1])}")


@dataclass(frozen=True)
class Blocked:
    """Where a rank hangs."""

    doing: str
    """The call, its site and moment."""
    waits_for: tuple[int, ...]
    """Ranks of the group that have not come to it."""


@dataclass(frozen=True)
class Cause:
    """Why ranks hang."""

    text: str
    ranks: tuple[int, ...]
    """Who waits for nobody, or all of the cycle."""
    is_cycle: bool


def why_blocked(blocked: Mapping[int, Blocked], *, name: Namer, fate: Callable[[int], str]) -> Cause | None:
    """The cause of a hang: who is not blocked and waited for, else the cycle of waits; None if nobody waits.

    fate: what is known of a rank that is not blocked, e.g. `has ended` or `is in the data loader`. Of several that are waited
    for, the one that holds up most, directly, comes first."""
    awaited: dict[int, int] = {}
    for wait in blocked.values():
        for rank in wait.waits_for:
            if rank not in blocked:
                awaited[rank] = awaited.get(rank, 0) + 1
    if awaited:
        roots = sorted(awaited, key=lambda rank: (-awaited[rank], rank))
        texts = []
        for root in roots[:3]:
            waiting = min(rank for rank, wait in blocked.items() if root in wait.waits_for)
            more = f" (and so {'does' if awaited[root] == 2 else 'do'} {awaited[root] - 1:,} more)" if awaited[root] > 1 else ""
            texts.append(f"{name(waiting)}, in {blocked[waiting].doing}, waits for {name(root)}{more}, which {fate(root)}")
        more = f"; and {len(roots) - 3:,} more are waited for" if len(roots) > 3 else ""
        return Cause("; ".join(texts) + more, tuple(roots), is_cycle=False)
    found = find_cause(sorted(blocked), lambda rank: blocked[rank].waits_for)
    if found is None or not found.is_cycle:
        return None
    return Cause(
        in_words(found, does=lambda rank: blocked[rank].doing, name=name, fate=fate), tuple(sorted(found.chain)), is_cycle=True
    )
