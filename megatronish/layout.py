"""Where each parameter lives: plan rules, rectangles, and the ParamLayout table. Data and arithmetic only; no rank acts here.

A model states its plan as `{module name pattern: rule}`; `parallel/tensor.py` applies it and makes the ParamLayout once. Gradient
sums, the gradient norm, ZeRO slices and checkpoints read that table, and nothing else decides these things.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Column:
    """Output features are cut: weight and bias along `dim`. The input is whole, the output local."""

    dim: int = 0


@dataclass(frozen=True)
class Row:
    """Input features are cut: the weight along `dim`. The input is local, partial outputs are summed over tp; a bias is whole on
    every rank and added after the sum."""

    dim: int = 1


@dataclass(frozen=True)
class Vocab:
    """Rows of an embedding are cut along `dim`; partial outputs are summed over tp. Rows need not divide."""

    dim: int = 0


@dataclass(frozen=True)
class Replicated:
    """Every tp rank holds all of it. Under sequence parallelism each sees S/tp tokens, so its gradient is owed a sum over tp."""


@dataclass(frozen=True)
class ReplicatedTable:
    """An embedding that every tp rank holds whole. Its input is whole along S; each rank looks up the tokens it goes on with: under
    sequence parallelism S/tp of them, so its gradient is owed a sum over tp."""


Rule = Column | Row | Vocab | Replicated | ReplicatedTable
Plan = Mapping[str, Rule]


@dataclass(frozen=True)
class Rectangle:
    """A box of a tensor: `offsets[d] <= index[d] < offsets[d] + sizes[d]`."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.sizes)

    def shifted(self, by: tuple[int, ...]) -> Rectangle:
        """The same box in a tensor of which this one's tensor is the part that begins at `by`."""
        return Rectangle(tuple(o + b for o, b in zip(self.offsets, by, strict=True)), self.sizes)

    def intersect(self, other: Rectangle) -> Rectangle | None:
        """The common box, or None."""
        starts = tuple(max(a, b) for a, b in zip(self.offsets, other.offsets, strict=True))
        stops = tuple(min(a + m, b + n) for a, m, b, n in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True))
        if any(stop <= start for start, stop in zip(starts, stops, strict=True)):
            return None
        return Rectangle(starts, tuple(stop - start for start, stop in zip(starts, stops, strict=True)))

    def within(self, outer: Rectangle) -> tuple[slice, ...]:
        """Slices that pick this box out of a tensor that holds `outer`."""
        return tuple(slice(o - base, o - base + n) for o, n, base in zip(self.offsets, self.sizes, outer.offsets, strict=True))


def shard_range(size: int, index: int, count: int) -> tuple[int, int]:
    """[start, stop) of part `index` of `count`: contiguous, and the first `size % count` parts have one more."""
    base, extra = divmod(size, count)
    length = base + 1 if extra and index < extra else base
    # Where a part lies is data: a rehearsal follows a rank's coordinate no further (preflight/coordinates.py), but how long it is.
    start = int(index) * base + min(int(index), extra)
    return start, start + length


def rectangles_of_flat_range(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[Rectangle, int]]:
    """Cut [start, stop) of a row-major tensor's elements into boxes: yields (box, flat offset of its first element), in order.

    Each box is contiguous in memory. A tensor of k dimensions needs at most 2k - 1: a ragged head and tail in every dimension but
    the last, and one body.
    """
    if start >= stop:
        return
    if not shape:
        yield Rectangle((), ()), 0
        return
    if len(shape) == 1:
        yield Rectangle((start,), (stop - start,)), start
        return
    row = math.prod(shape[1:])
    first_whole, last_whole = -(-start // row), stop // row
    if first_whole > last_whole:  # inside one row
        yield from _in_row(shape, start // row, row, start, stop)
        return
    yield from _in_row(shape, first_whole - 1, row, start, first_whole * row)
    if last_whole > first_whole:
        sizes = (last_whole - first_whole, *shape[1:])
        yield Rectangle((first_whole,) + (0,) * (len(shape) - 1), sizes), first_whole * row
    yield from _in_row(shape, last_whole, row, last_whole * row, stop)


def _in_row(shape: tuple[int, ...], index: int, row: int, start: int, stop: int) -> Iterator[tuple[Rectangle, int]]:
    base = index * row
    for box, flat in rectangles_of_flat_range(shape[1:], start - base, stop - base):
        yield Rectangle((index, *box.offsets), (1, *box.sizes)), base + flat


@dataclass(frozen=True)
class ParamPlacement:
    """One parameter of the whole model."""

    global_shape: tuple[int, ...]
    dtype: torch.dtype
    shard_dim: int | None
    """Dimension cut over tp, None if every tp rank holds it whole."""
    stages: tuple[int, ...]
    """Pipeline stages that hold it (more than one: tied)."""
    owner_stage: int
    """The stage that counts it in the norm and saves it."""
    sum_gradient_over: tuple[str, ...] = ()
    """Groups of the mesh, beside dp, over which its gradient is partial and owed a sum."""
    is_bias: bool = False
    """Of a linear or a norm: it does not decay, whatever its shape."""
    tied: bool = False
    """Used at both ends of the model: its gradient is complete only when all backward is done, and, where the ends are two
    stages, summed over them (the group "ends")."""

    def local_rectangle(self, tp_rank: int, tp_size: int) -> Rectangle:
        """The box of the global tensor that `tp_rank` holds."""
        offsets, sizes = [0] * len(self.global_shape), list(self.global_shape)
        if self.shard_dim is not None:
            start, stop = shard_range(self.global_shape[self.shard_dim], tp_rank, tp_size)
            offsets[self.shard_dim], sizes[self.shard_dim] = start, stop - start
        return Rectangle(tuple(offsets), tuple(sizes))


@dataclass(frozen=True)
class ParamLayout:
    """Every parameter of the model by its global name, in the model's order, and the sizes of the axes it was made for."""

    placements: Mapping[str, ParamPlacement]
    tp_size: int
    pp_size: int

    def of_stage(self, stage: int) -> dict[str, ParamPlacement]:
        """The parameters that `stage` holds, in order."""
        return {name: p for name, p in self.placements.items() if stage in p.stages}
