"""Which parameter lies where in which flat bucket, and which slice of it a data rank owns. Pure functions of the ParamLayout.

A bucket is the unit of reduction, update and gathering. All parameters of one bucket owe the same sums, decay alike and count alike
in the norm. Buckets of one group are filled together: what ZeRO 2 holds in full size at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

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
    tied: bool
    """Gradients come from both ends of the model: complete only when all backward is done. Such buckets are the last ones."""
    on_owner_stage: bool
    """False: another stage counts it in the norm and saves it."""
    group: int
    """Consecutive buckets with one number are filled by the same stretch of the backward."""

    @cached_property
    def _text(self) -> str:
        more = len(self.slots) - 1
        return f"bucket {self.slots[0].name}" + (f" and {more} more" if more else "")

    def __str__(self) -> str:
        """By its first parameter: the same on every rank that has it, of another stage too."""
        return self._text

    def is_counted_by(self, tp_rank: int) -> bool:
        """Whether this stage's rank counts it in the norm and saves it, as exactly one rank does (but for the cut over data)."""
        return self.on_owner_stage and not (self.replicated and tp_rank > 0)

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
    return len(placement.global_shape) >= 2 and not placement.is_bias


Kind = tuple[tuple[str, ...], bool, bool, bool, bool]
"""(sum_gradient_over, weight_decay, replicated, tied, on_owner_stage)"""


def plan_buckets(
    placements: Mapping[str, ParamPlacement],
    *,
    tp_rank: int,
    tp_size: int,
    dp_size: int,
    bucket_elements: int,
    stage: int = 0,
    close: Literal["by kind", "together"] = "by kind",
) -> list[Bucket]:
    """Cut the parameters of `stage` into buckets of about `bucket_elements`, last layer first: the order backward finishes them in;
    after all of them the tied ones.

    `by kind`: a bucket is closed when it is full, so that of vectors there are few buckets. `together`: when all open buckets
    are, they are closed as one group, so that none stays open while backward goes on."""
    open_slots: dict[Kind, list[Slot]] = {}
    buckets: list[Bucket] = []
    filled = 0

    def close_group(kinds: list[Kind]) -> None:
        group = buckets[-1].group + 1 if buckets else 0
        for kind in kinds:
            slots, unit = open_slots.pop(kind), dp_size * ALIGNMENT
            buckets.append(Bucket(tuple(slots), -(-slots[-1].stop // unit) * unit, *kind, group))

    def close_all() -> None:
        if close == "together" and open_slots:
            close_group(list(open_slots))
        for kind in list(open_slots):
            close_group([kind])

    last_first = reversed(list(placements.items()))
    for name, placement in sorted(last_first, key=lambda item: item[1].tied):
        if placement.tied:  # nothing else shares a bucket or a group with it
            close_all()
        replicated, on_owner_stage = placement.shard_dim is None and tp_size > 1, placement.owner_stage == stage
        kind = (placement.sum_gradient_over, decays(placement), replicated, placement.tied, on_owner_stage)
        slots = open_slots.setdefault(kind, [])
        box = placement.local_rectangle(tp_rank, tp_size)
        # Every parameter starts on its own cache line, as torch's allocator would place it.
        start = -(-slots[-1].stop // ALIGNMENT) * ALIGNMENT if slots else 0
        slots.append(Slot(name, start, box))
        # Groups hold buckets that tp ranks sum together: all ranks close them at the same parameter, where the first is full.
        filled += placement.local_rectangle(0, tp_size).num_elements
        if close == "by kind" and slots[-1].stop >= bucket_elements:
            close_group([kind])
        elif close == "together" and filled >= bucket_elements:
            close_group(list(open_slots))
            filled = 0
    close_all()
    return buckets


def bucket_elements(bucket_mib: float, bytes_per_element: int) -> int:
    """Elements of a bucket of `bucket_mib` MiB of gradients."""
    return max(1, math.floor(bucket_mib * 2**20 / bytes_per_element))
