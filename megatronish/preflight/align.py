"""Where two sequences of calls part, and what explains it best: a call skipped, one too many, two swapped, or another instead."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from megatronish.preflight.coding import Done

Codes = npt.NDArray[np.uint32]
Explanation = Literal["skips", "adds", "swaps", "differs"]
MAX_SHIFT = 16
"""Calls in a row that may be missing or too many."""


class Divergence(NamedTuple):
    """How an odd sequence differs from the usual one."""

    explanation: Explanation
    position: int
    """Where they part; equal before."""
    num_calls: int = 1
    """Calls skipped or added."""


def common_prefix(a: Codes, b: Codes) -> int:
    """How many leading numbers are equal."""
    length = min(len(a), len(b))
    differing = np.flatnonzero(a[:length] != b[:length])
    return int(differing[0]) if len(differing) else length


def explain(odd: Codes, usual: Codes) -> Divergence:
    """What makes most of what follows agree; the sequences must differ.

    Equal calls in a row leave open which of them is missing: see `sharpen`."""
    start = common_prefix(odd, usual)
    a, b = odd[start:], usual[start:]

    def gain(a_from: int, b_from: int) -> float:
        if a_from > len(a) or b_from > len(b):
            return -1.0
        length = common_prefix(a[a_from:], b[b_from:])
        return float("inf") if length == len(a) - a_from == len(b) - b_from else float(length)

    candidates: list[tuple[float, Divergence]] = []
    # Two calls swapped are four numbers that agree crosswise: more than a skip and an addition that happen to be near.
    if len(a) > 1 and len(b) > 1 and a[0] == b[1] and a[1] == b[0]:
        candidates.append((2 + gain(2, 2), Divergence("swaps", start)))
    if len(a) and len(b):
        candidates.append((0.5 + gain(1, 1), Divergence("differs", start)))
    for count in range(1, MAX_SHIFT + 1):
        candidates.append((gain(0, count), Divergence("skips", start, count)))
        candidates.append((gain(count, 0), Divergence("adds", start, count)))
    best, divergence = max(candidates, key=lambda candidate: candidate[0])  # the first of the best
    if best <= 0 or not (len(a) or len(b)):
        return Divergence("differs", start)
    return divergence


def sharpen(divergence: Divergence, odd: Sequence[Done], usual: Sequence[Done]) -> Divergence:
    """Which of several equal calls is skipped or added, by what it is for, its site and its moment."""
    if divergence.explanation not in ("skips", "adds"):
        return divergence
    short, long = (odd, usual) if divergence.explanation == "skips" else (usual, odd)
    keys: tuple[Callable[[Done], Hashable], ...] = (_place_and_moment, _place)
    for key in keys:
        a = [key(done) for done in short[: divergence.position]]
        b = [key(done) for done in long[: divergence.position + divergence.num_calls]]
        start = next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), len(a))
        if a[start:] == b[start + divergence.num_calls :]:
            return divergence._replace(position=start)
    return divergence


def _place(done: Done) -> Hashable:
    return tuple((getattr(call, "what", ""), call.site) for call in done.calls)


def _place_and_moment(done: Done) -> Hashable:
    return done.moment, _place(done)
