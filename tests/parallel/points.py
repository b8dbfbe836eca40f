"""The axes of the parity check: every point of them, and a small set of points that has every pair of values."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, cycle, product
from typing import Any

from tests.parallel.parity import Case
from tests.ranks import MAX_RANKS

AXES: dict[str, tuple[Any, ...]] = {
    "tp": (1, 2, 4),
    "pp": (1, 2, 4),
    "dp": (1, 2, 3, 4),
    "zero_stage": (0, 1, 2),
    "sequence": (False, True),
    "recompute": ("none", "full"),
    # (architecture, tie_embeddings)
    "model": (("llama", False), ("gpt2", True)),
    # (vocab_size, vocab_multiple): 105 rows, cut unevenly, 4 of them padding; 96 rows that every tp divides, without padding.
    "vocabulary": ((101, 7), (96, 8)),
    # Every parameter in a bucket of its own; some share one; one bucket of each kind.
    "bucket_mib": (1e-5, 0.02, 8.0),
    "num_microbatches": (1, 2, 3, 4, 5),
}
Point = tuple[Any, ...]
Pair = tuple[str, Any, str, Any]


def allowed(point: Point) -> bool:
    """At most MAX_RANKS ranks; sequence parallelism where there is tensor parallelism; no fewer microbatches than stages."""
    p = dict(zip(AXES, point, strict=True))
    return p["tp"] * p["pp"] * p["dp"] <= MAX_RANKS and (p["tp"] > 1 or not p["sequence"]) and p["num_microbatches"] >= p["pp"]


def pairs(point: Point) -> Iterator[Pair]:
    """Every two axes with their values."""
    for (a, x), (b, y) in combinations(zip(AXES, point, strict=True), 2):
        yield a, x, b, y


def case_of(point: Point) -> Case:
    """The case at a point."""
    fields = dict(zip(AXES, point, strict=True))
    vocab_size, vocab_multiple = fields.pop("vocabulary")
    architecture, tied = fields.pop("model")
    return Case(architecture=architecture, tie_embeddings=tied, vocab_size=vocab_size, vocab_multiple=vocab_multiple, **fields)


def allowed_points() -> list[Point]:
    """The product of all axes."""
    return [point for point in product(*AXES.values()) if allowed(point)]


def pairwise_points() -> list[Point]:
    """Few points that hold every pair of values that any allowed point holds. Greedy: the most new pairs, then the fewest ranks,
    then the first; so the same list every time."""
    points = allowed_points()
    bit_of: dict[Pair, int] = {}
    masks = []
    for point in points:
        mask = 0
        for pair in pairs(point):
            mask |= 1 << bit_of.setdefault(pair, len(bit_of))
        masks.append(mask)
    missing, chosen = (1 << len(bit_of)) - 1, []
    while missing:
        new = [(mask & missing).bit_count() for mask in masks]
        best = max(range(len(points)), key=lambda i: (new[i], -points[i][0] * points[i][1] * points[i][2], -i))
        chosen.append(points[best])
        missing &= ~masks[best]
    return chosen


def all_cases() -> list[Case]:
    """Every point of the axes that decide who computes what; bucket sizes and numbers of microbatches take turns."""
    sizes, numbers = cycle(AXES["bucket_mib"]), cycle(AXES["num_microbatches"])
    cases = []
    for head in product(*(values for axis, values in AXES.items() if axis not in ("bucket_mib", "num_microbatches"))):
        point = (*head, next(sizes), max(head[1], next(numbers)))
        if allowed(point):
            cases.append(case_of(point))
    return cases
