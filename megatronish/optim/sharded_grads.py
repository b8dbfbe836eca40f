"""ZeRO 2 (Rajbhandari et al. 2020): a data rank keeps 1/dp of the accumulated gradients.

Each microbatch's backward fills buckets in scratch memory, group by group. A complete group is reduce-scattered over the data ranks
under the rest of the backward, and added to the slices that this rank keeps. At most two groups have scratch at a time: what a rank
holds never exceeds its slices and twice the largest group. The price: gradients travel once a microbatch instead of once a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megatronish.comm import Group, Pending, all_reduce
from megatronish.comm.collectives import start_reduce_scatter_into
from megatronish.optim.buckets import Bucket
from megatronish.optim.grad_buffer import GradBuffer, narrow_in_place

MOST_GROUPS = 2
"""Groups with scratch at a time: one that backward fills, one that travels."""


@dataclass
class _Scratch:
    """One group's full-size memory."""

    block: Tensor
    """What was allocated; it may be longer than the group."""
    flat: dict[int, Tensor]
    """By bucket, in order."""
    missing: set[nn.Parameter]
    travelling: list[tuple[int, Pending]] = field(default_factory=list)
    """(bucket, its reduction)."""


class ShardedGradBuffer(GradBuffer):
    """`flat` holds slices only.

    Groups are reduced in the order in which backward reaches them. Ranks that differ on dp alone run the same graph over the same
    schedule, so their order is the same."""

    def _allocate(self) -> None:
        dp = self.groups["dp"]
        self.flat = [torch.zeros(b.num_elements // dp.size, dtype=self.dtype, device=self.device) for b in self.buckets]
        by_group = groupby(range(len(self.buckets)), key=lambda index: self.buckets[index].group)
        self._groups = {group: list(indices) for group, indices in by_group}
        self._place_of: dict[nn.Parameter, tuple[int, int, int]] = {}
        for index, (bucket, parameters) in enumerate(zip(self.buckets, self._parameters_of, strict=True)):
            for position, parameter in enumerate(parameters):
                self._place_of[parameter] = (bucket.group, index, position)
        self._filling: dict[int, _Scratch] = {}  # in the order of opening
        self._reducing: list[_Scratch] = []
        self._free: list[Tensor] = []

    def view(self, parameter: nn.Parameter) -> Tensor:
        """See GradBuffer; takes scratch memory for the parameter's group, which may wait for an earlier group's reduction."""
        group, index, position = self._place_of[parameter]
        if group not in self._filling:
            self._open(group)
        slot = self.buckets[index].slots[position]
        return self._filling[group].flat[index][slot.start : slot.stop].view(slot.local_box.sizes)

    def begin_last_backward(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Nothing: each microbatch's gradients are reduced."""

    def contributed(self, parameter: nn.Parameter) -> None:
        """See GradBuffer. Groups start in the order of opening, once complete: a parameter that comes early does not change it."""
        self._filling[self._place_of[parameter][0]].missing.discard(parameter)
        while self._filling and not next(iter(self._filling.values())).missing:
            self._start_oldest()

    def finish(self) -> None:
        """See GradBuffer. Sums over other axes than dp come here, once a step and on slices."""
        while self._filling:
            self._start_oldest()
        while self._reducing:
            self._add_oldest()
        self._free = []
        for bucket, mine in zip(self.buckets, self.flat, strict=True):
            for axis in bucket.sum_gradient_over:
                all_reduce(mine, self.groups[axis], what=f"gradients of {bucket}")

    def owned(self, index: int) -> Tensor:
        """See GradBuffer."""
        return self.flat[index]

    def scratch_bytes(self) -> int:
        """See GradBuffer."""
        largest = max(sum(self.buckets[index].num_elements for index in indices) for indices in self._groups.values())
        return MOST_GROUPS * largest * self.flat[0].element_size()

    def _open(self, group: int) -> None:
        while len(self._filling) + len(self._reducing) >= MOST_GROUPS:
            if not self._reducing:  # backward has left both unfinished: what they lack will travel by itself
                self._start_oldest()
            self._add_oldest()
        indices = self._groups[group]
        sizes = [self.buckets[index].num_elements for index in indices]
        block = self._take_block(sum(sizes))
        flat = dict(zip(indices, block[: sum(sizes)].zero_().split(sizes), strict=True))
        self._filling[group] = _Scratch(block, flat, {p for index in indices for p in self._parameters_of[index]})

    def _take_block(self, size: int) -> Tensor:
        fits = [index for index in range(len(self._free)) if self._free[index].numel() >= size]
        if fits:
            return self._free.pop(fits[0])
        # Never more blocks than groups, each no longer than the largest group.
        del self._free[: len(self._free) + len(self._filling) + len(self._reducing) + 1 - MOST_GROUPS]
        return torch.empty(size, dtype=self.dtype, device=self.device)

    def _start_oldest(self) -> None:
        scratch = self._filling.pop(next(iter(self._filling)))
        dp = self.groups["dp"]
        for index, flat in scratch.flat.items():
            self._note_local(index, flat)
            sent = flat if self.reduce_dtype == self.dtype else narrow_in_place(flat, self.reduce_dtype)
            start, stop = self.buckets[index].owned_range(dp.index, dp.size)
            what = f"gradients of {self.buckets[index]}"
            scratch.travelling.append((index, start_reduce_scatter_into(sent[start:stop], sent, dp, what=what)))
        self._reducing.append(scratch)

    def _add_oldest(self) -> None:
        scratch = self._reducing.pop(0)
        for index, pending in scratch.travelling:
            self.flat[index].add_(pending.wait())
        self._free.append(scratch.block)


def make_grad_buffer(
    buckets: list[Bucket],
    parameters: Mapping[str, nn.Parameter],
    *,
    groups: Mapping[str, Group],
    zero_stage: Literal[0, 1, 2],
    **more: Any,
) -> GradBuffer:
    """The buffer for a ZeRO stage; a single data rank owns all gradients and needs no scratch."""
    kind = ShardedGradBuffer if zero_stage == 2 and groups["dp"].size > 1 else GradBuffer
    return kind(buckets, parameters, groups=groups, zero_stage=zero_stage, **more)
