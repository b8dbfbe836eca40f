"""Which parameter lies where in which flat bucket, and which slice of it a data rank owns. Pure functions of the ParamLayout.

A bucket is the unit of reduction, update and gathering. All parameters of one bucket owe the same sums, decay alike and count alike
in the norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatronish.layout import ParamPlacement, Rectangle, rectangles_of_flat_range, shard_range

ALIGNMENT = 16
"""Elements. A rank's slice begins at a multiple of this: 64 bytes of float32, a cache line and a full vector."""


@dataclass(frozen=True)
class Slot:
    """One parameter's place in its bucket."""

    name: str
    start: int
    local_box: Rectangle
    """The box of the global tensor that this tp rank holds."""

    @property
    def stop(self) -> int:
        return self.start + self.local_box.num_elements


@dataclass(frozen=True)
class Bucket:
    """A flat run of parameters, padded so that data ranks own equal slices."""

    slots: tuple[Slot, ...]
    num_elements: int
    """With padding: a multiple of the data ranks x ALIGNMENT."""
    sum_gradient_over: tuple[str, ...]
    """Mesh axes, beside dp, over which its gradients are owed a sum."""
    weight_decay: bool
    replicated: bool
    """Every tp rank has the same values: only tp rank 0 counts them in the norm and saves them."""

    def owned_range(self, dp_rank: int, dp_size: int) -> tuple[int, int]:
        """[start, stop) of the slice of data rank `dp_rank`."""
        return shard_range(self.num_elements, dp_rank, dp_size)

    def pieces(self, start: int, stop: int) -> list[tuple[str, Rectangle, int]]:
        """The boxes of global tensors that lie in [start, stop): (name, box, offset of its first element in the bucket)."""
        result = []
        for slot in self.slots:
            low, high = max(start, slot.start), min(stop, slot.stop)
            for box, flat in rectangles_of_flat_range(slot.local_box.sizes, low - slot.start, high - slot.start):
                result.append((slot.name, box.shifted(slot.local_box.offsets), slot.start + flat))
        return result


def decays(placement: ParamPlacement) -> bool:
    """Matrices and embeddings decay; norms and biases (one dimension) do not (Loshchilov and Hutter 2019; so do GPT-3, Llama)."""
    return len(placement.global_shape) >= 2


def plan_buckets(
    placements: Mapping[str, ParamPlacement], *, tp_rank: int, tp_size: int, dp_size: int, bucket_elements: int
) -> list[Bucket]:
    """Cut one stage's parameters into buckets of about `bucket_elements`, last layer first: the order backward finishes them in."""
    open_slots: dict[tuple[tuple[str, ...], bool, bool], list[Slot]] = {}
    buckets: list[Bucket] = []

    def close(kind: tuple[tuple[str, ...], bool, bool]) -> None:
        slots = open_slots.pop(kind)
        unit = dp_size * ALIGNMENT
        buckets.append(Bucket(tuple(slots), -(-slots[-1].stop // unit) * unit, *kind))

    for name, placement in reversed(list(placements.items())):
        kind = (placement.sum_gradient_over, decays(placement), placement.shard_dim is None and tp_size > 1)
        slots = open_slots.setdefault(kind, [])
        box = placement.local_rectangle(tp_rank, tp_size)
        # Every parameter starts on its own cache line, as torch's allocator would place it.
        start = -(-slots[-1].stop // ALIGNMENT) * ALIGNMENT if slots else 0
        slots.append(Slot(name, start, box))
        if slots[-1].stop >= bucket_elements:
            close(kind)
    for kind in list(open_slots):
        close(kind)
    return buckets


def bucket_elements(bucket_mib: float, bytes_per_element: int) -> int:
    """Elements of a bucket of `bucket_mib` MiB of gradients."""
    return max(1, math.floor(bucket_mib * 2**20 / bytes_per_element))
