"""Which box of which tensor: the unit in which state is saved, and the proof that a set of boxes is a whole tensor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatronish.layout import Rectangle, rectangles_of_flat_range

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """A box of one global tensor, saved by exactly one rank."""

    tensor: str
    box: Rectangle

    @property
    def key(self) -> str:
        """Its name inside a file: `layers.0.norm.weight@128`, `layers.0.mlp.down@64,0`; a scalar's is `name@`."""
        return piece_key(self.tensor, self.box.offsets)


def piece_key(tensor: str, offsets: Sequence[int]) -> str:
    """Key of the piece of `tensor` that begins at `offsets`."""
    return f"{tensor}@{','.join(map(str, offsets))}"


def whole_box(shape: tuple[int, ...]) -> Rectangle:
    """The box that is all of a tensor."""
    return Rectangle((0,) * len(shape), tuple(shape))


def pieces_of_slice(tensor: str, held: Rectangle, start: int, stop: int) -> Iterator[tuple[Piece, int]]:
    """A rank holds the box `held` of `tensor` and owns elements [start, stop) of it, flattened row-major: yields (piece of the
    global tensor, flat offset of its first element within `held`), in order. Each piece is contiguous in the flattened `held`."""
    for box, flat in rectangles_of_flat_range(held.sizes, start, stop):
        yield Piece(tensor, box.shifted(held.offsets)), flat


def tiling_problem(shape: tuple[int, ...], offsets: IntArray, sizes: IntArray) -> str | None:
    """None if the boxes (rows of `offsets` and `sizes`, [n, len(shape)]) cover each element of the tensor once, else what is wrong.

    Exact, and O(n log n) for n boxes. How often element x is covered is a function on the lattice; its mixed difference (along
    each dimension, value minus the value one before) is +-1 at the 2^k corners of each box and 0 elsewhere, and differencing
    loses nothing. So the boxes tile the tensor when the signed corners of all of them add up to the corners of the whole. The
    first corner (in row-major order) that is left over is the first element covered too often or not at all.
    """
    if offsets.shape != sizes.shape or offsets.ndim != 2 or offsets.shape[1] != len(shape):
        return f"boxes of {offsets.shape[-1]} dimensions for a tensor of shape {list(shape)}"
    bounds = np.array(shape, dtype=np.int64)
    outside = (offsets < 0).any(axis=1) | (sizes < 1).any(axis=1) | (offsets > bounds - sizes).any(axis=1)
    if outside.any():
        first = int(np.argmax(outside))
        return f"the piece at {offsets[first].tolist()} of size {sizes[first].tolist()} is empty or not within shape {list(shape)}"
    if math.prod(shape) == 0:
        return None
    # The whole tensor enters with the opposite sign, as a last box.
    starts = np.concatenate([offsets, np.zeros((1, len(shape)), np.int64)])
    stops = np.concatenate([offsets + sizes, bounds[None, :]])
    weight = np.concatenate([np.ones(len(offsets), np.int64), [-1]])
    strides = np.array([math.prod(n + 1 for n in shape[d + 1 :]) for d in range(len(shape))], dtype=np.int64)
    points, signs = [], []
    for corner in itertools.product((0, 1), repeat=len(shape)):
        points.append(np.where(np.array(corner, dtype=bool), stops, starts) @ strides)
        signs.append(weight * (-1) ** sum(corner))
    unique, inverse = np.unique(np.concatenate(points), return_inverse=True)
    total = np.zeros(len(unique), np.int64)
    np.add.at(total, inverse, np.concatenate(signs))
    left = np.flatnonzero(total)
    if not left.size:
        return None
    element = (int(unique[left[0]]) // strides % (bounds + 1)).tolist()
    excess = int(total[left[0]])
    return f"element {element} of shape {list(shape)} lies in {'no piece' if excess < 0 else f'{excess + 1} pieces'}"
