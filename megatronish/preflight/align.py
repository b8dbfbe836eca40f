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

    Many calls are of one size: where two sequences part, an earlier call may be missing whose place another of its size has taken.
    So calls are first taken for equal if they are for the same thing too. Ranks that call it otherwise are not wrong: then their
    sizes alone decide."""
    numbers: dict[Hashable, int] = {}
    purposeful = [_with_purposes(codes, of_codes, numbers) for codes, of_codes in zip((odd, usual), done, strict=True)]
    start, part = common_prefix(odd, usual), common_prefix(purposeful[0], purposeful[1])
    if part < start:
        divergence, gains = _best(part, ((purposeful[0][part:], purposeful[1][part:]),))
        if divergence.explanation != "differs" and max(gains) > 0:
            return _sharpen(divergence, *done)
    divergence, gains = _best(start, ((purposeful[0][start:], purposeful[1][start:]), (odd[start:], usual[start:])))
    return _sharpen(divergence if max(gains) > 0 else Divergence("differs", start), *done)


def _with_purposes(codes: Codes, done: Sequence[Done], numbers: dict[Hashable, int]) -> Codes:
    keys = ((code, _purposes(each)) for code, each in zip(codes.tolist(), done, strict=True))
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.uint32)


def _best(start: int, views: Sequence[tuple[Codes, Codes]]) -> tuple[Divergence, tuple[float, ...]]:
    """The explanation that gains most in the first view; of equal ones, in the next."""
    candidates = [Divergence("swaps", start), Divergence("differs", start)]
    for count in range(1, MAX_SHIFT + 1):
        candidates += [Divergence("skips", start, count), Divergence("adds", start, count)]
    gains = {candidate: tuple(_gain(candidate, *view) for view in views) for candidate in candidates}
    best = max(candidates, key=lambda candidate: gains[candidate])  # the first of the best
    return best, gains[best]


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
    return _purposes(done), tuple(sorted(call.site for call in done.calls))


def _purposes(done: Done) -> Hashable:
    # Sorted: of one batch, each end names what it receives first.
    return tuple(sorted(getattr(call, "what", "") for call in done.calls))


def _place_and_moment(done: Done) -> Hashable:
    return done.moment, _place(done)
