"""The axes of the parity check: every point of them, and a small set of points that has every pair of values."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import combinations, cycle, product
from typing import Any

import numpy as np

from tests.parallel.parity import Case
from tests.ranks import MAX_RANKS

AXES: dict[str, tuple[Any, ...]] = {
    "tp": (1, 2, 4),
    "pp": (1, 2, 4),
    "dp": (1, 2, 3, 4),
    "zero_stage": (0, 1, 2),
    "sequence": (False, True),
    "recompute": ("none", "selective", "full"),
    # (architecture, tie_embeddings)
    "model": (("llama", False), ("gpt2", True)),
    # (vocab_size, vocab_multiple): 105 rows, cut unevenly, 4 of them padding; 96 rows that every tp divides, without padding.
    "vocabulary": ((101, 7), (96, 8)),
    # (parallel.schedule, parallel.num_chunks)
    "schedule": (("1f1b", 1), ("gpipe", 1), ("interleaved", 2)),
    # (dropout, documents kept apart)
    "masks": ((0.0, False), (0.1, False), (0.1, True)),
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
    dropout, documents = fields.pop("masks")
    return Case(
        architecture=architecture,
        tie_embeddings=tied,
        vocab_size=vocab_size,
        vocab_multiple=vocab_multiple,
        dropout=dropout,
        documents=documents,
        num_layers=max(4, fields["pp"] * fields["schedule"][1]),
        **fields,
    )


@cache
def allowed_points() -> list[Point]:
    """The product of all axes."""
    return [point for point in product(*AXES.values()) if allowed(point)]


@cache
def pairwise_points() -> list[Point]:
    """Few points that hold every pair of values that any allowed point holds. Greedy: the most new pairs, then the fewest ranks,
    then the first; so the same list every time."""
    points = allowed_points()
    value_of = [{value: i for i, value in enumerate(values)} for values in AXES.values()]
    values = np.array([[number[value] for number, value in zip(value_of, point, strict=True)] for point in points])
    largest = max(map(len, AXES.values()))
    columns = [(k * largest + values[:, a]) * largest + values[:, b] for k, (a, b) in enumerate(combinations(range(len(AXES)), 2))]
    pair_ids = np.stack(columns, axis=1)
    num_ranks = np.array([point[0] * point[1] * point[2] for point in points])
    missing = np.zeros(int(pair_ids.max()) + 1, bool)
    missing[pair_ids] = True
    chosen = []
    while missing.any():
        new = missing[pair_ids].sum(1)
        best = int(np.lexsort((num_ranks, -new))[0])  # stable: the first of equal ones
        chosen.append(points[best])
        missing[pair_ids[best]] = False
    return chosen


TAKING_TURNS = ("vocabulary", "schedule", "masks", "bucket_mib", "num_microbatches")


def all_cases() -> list[Case]:
    """Every point of the axes that decide who computes what; of vocabularies, schedules, masks, bucket sizes and numbers of
    microbatches all combinations take turns."""
    turns = cycle(product(*(AXES[axis] for axis in TAKING_TURNS)))
    cases = []
    for head in product(*(values for axis, values in AXES.items() if axis not in TAKING_TURNS)):
        *others, num_microbatches = next(turns)
        point = (*head, *others, max(head[1], num_microbatches))
        if allowed(point):
            cases.append(case_of(point))
    return cases
