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


def explain(odd: Codes, usual: Codes, done: tuple[Sequence[Done], Sequence[Done]]) -> Divergence:
    """What makes most of what follows agree; the sequences must differ. done: both in full.

    Calls are first taken for equal if they also have the same purpose and site: many are of one size, and a call that is skipped
    next to one that looks like it is not two that are swapped."""
    start = common_prefix(odd, usual)
    numbers: dict[Hashable, int] = {}
    placed = [_with_places(codes[start:], all_done[start:], numbers) for codes, all_done in zip((odd, usual), done, strict=True)]
    views = ((placed[0], placed[1]), (odd[start:], usual[start:]))
    candidates = [Divergence("swaps", start), Divergence("differs", start)]
    for count in range(1, MAX_SHIFT + 1):
        candidates += [Divergence("skips", start, count), Divergence("adds", start, count)]
    gains = {candidate: tuple(_gain(candidate, *view) for view in views) for candidate in candidates}
    best = max(candidates, key=lambda candidate: gains[candidate])  # the first of the best
    return _sharpen(best if max(gains[best]) > 0 else Divergence("differs", start), *done)


def _with_places(codes: Codes, done: Sequence[Done], numbers: dict[Hashable, int]) -> Codes:
    keys = ((code, _place(each)) for code, each in zip(codes.tolist(), done, strict=True))
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.uint32)


def _gain(candidate: Divergence, a: Codes, b: Codes) -> float:
    """How many calls agree after it, from where `a` is odd and `b` usual: infinity for all of them."""
    explanation, _, count = candidate
    a_from, b_from = {"swaps": (2, 2), "differs": (1, 1), "skips": (0, count), "adds": (count, 0)}[explanation]
    if a_from > len(a) or b_from > len(b):
        return -1.0
    if explanation == "swaps" and not (a[0] == b[1] and a[1] == b[0]):
        return -1.0
    # Two calls swapped are four numbers that agree crosswise: more than a skip and an addition that happen to be near.
    bonus = {"swaps": 2.0, "differs": 0.5}.get(explanation, 0.0)
    length = common_prefix(a[a_from:], b[b_from:])
    return float("inf") if length == len(a) - a_from == len(b) - b_from else bonus + length


def _sharpen(divergence: Divergence, odd: Sequence[Done], usual: Sequence[Done]) -> Divergence:
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
