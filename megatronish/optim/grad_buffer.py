"""Gradients accumulate in flat buckets; a complete bucket is summed over the ranks it is owed to, under the rest of the backward.

The order of reductions is the order of buckets, the same on every rank, whatever order backward completes them in.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from megatronish.comm import Group, Pending, all_reduce
from megatronish.comm.collectives import start_all_reduce, start_reduce_scatter_into
from megatronish.optim.buckets import Bucket


class GradBuffer:
    """Flat gradient memory for `buckets` and the reductions it is owed: ZeRO 0 and 1 (`sharded_grads.py`: 2).

    zero_stage 1: a data rank ends with the sum of its own slice; 0: with the sum of everything. `reduce_dtype`: of what travels
    between data ranks; sums over other axes keep `dtype`.
    """

    def __init__(
        self,
        buckets: list[Bucket],
        parameters: Mapping[str, nn.Parameter],
        *,
        groups: Mapping[str, Group],
        zero_stage: Literal[0, 1, 2],
        dtype: torch.dtype,
        device: torch.device,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        self.buckets = buckets
        self.groups = groups
        self.zero_stage = zero_stage
        self.dtype = dtype
        self.device = device
        # Alone, nothing travels, and nothing is rounded.
        self.reduce_dtype = dtype if reduce_dtype is None or groups["dp"].size == 1 else reduce_dtype
        self.names = [slot.name for bucket in buckets for slot in bucket.slots]
        self.local_max = torch.zeros(len(self.names), dtype=dtype, device=device)
        """By parameter, in the order of `names`: the largest element of what this rank itself computed in this step, before any
        sum over ranks; not finite exactly where an element is not. Complete after `finish`."""
        self.kept_after_update = False
        """Whether anyone reads `owned` after the optimizer's step. Otherwise the update leaves zeros, in the same pass."""
        self.zeroed = False
        """What `updated` gives has been zeros since the last update."""
        self._first_name = [0]
        for bucket in buckets:
            self._first_name.append(self._first_name[-1] + len(bucket.slots))
        self._parameters_of = [[parameters[slot.name] for slot in b.slots] for b in buckets]
        self._allocate()
        # An embedding or a linear hands its gradient over itself; what autograd accumulates for all others is moved here.
        # A parameter keeps its hooks where the garbage collector does not look: a strong reference from there would never be freed,
        # nor the groups' communicators with their threads.
        buffer = weakref.proxy(self)
        for parameters_of_bucket in self._parameters_of:
            for parameter in parameters_of_bucket:
                parameter.register_post_accumulate_grad_hook(lambda p: buffer.take_autograd_gradient(p))

    def _allocate(self) -> None:
        self.flat = [torch.zeros(b.num_elements, dtype=self.dtype, device=self.device) for b in self.buckets]
        self._view_of: dict[nn.Parameter, Tensor] = {}
        self._bucket_of: dict[nn.Parameter, int] = {}
        for index, (bucket, flat) in enumerate(zip(self.buckets, self.flat, strict=True)):
            for slot, parameter in zip(bucket.slots, self._parameters_of[index], strict=True):
                self._view_of[parameter] = flat[slot.start : slot.stop].view(slot.local_box.sizes)
                self._bucket_of[parameter] = index
        self._final: set[nn.Parameter] = set()
        """Parameters whose next contribution is their last of the step."""
        self._missing = [set(parameters) for parameters in self._parameters_of]
        """By bucket, those that have not had it."""
        self._next = 0
        self._pending: list[Pending] = []

    def view(self, parameter: nn.Parameter) -> Tensor:
        """Where the parameter's gradient is to be added, in the parameter's shape and the bucket's dtype; `contributed` follows."""
        return self._view_of[parameter]

    def zero(self) -> None:
        """Start a step. What an update has left as zeros (`zeroed`) is not written again."""
        self.local_max.zero_()
        for index, flat in enumerate(self.flat):
            clean = self.updated(index).numel() if self.zeroed else 0
            start = self.updated(index).storage_offset() - flat.storage_offset() if clean else 0
            flat[:start].zero_()
            flat[start + clean :].zero_()
        self.zeroed = False

    def begin_last_backward(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """From now on each of `parameters` (all, when not given) gets its last contribution of the step: reduce every bucket once
        all of its parameters have had theirs."""
        self._final.update(self._view_of if parameters is None else parameters)

    def contributed(self, parameter: nn.Parameter) -> None:
        """`view(parameter)` has this microbatch's gradient added."""
        if parameter not in self._final:
            return
        self._missing[self._bucket_of[parameter]].discard(parameter)
        # A tied bucket is owed more than one contribution of a microbatch, here or on another stage: `finish` reduces it.
        while self._next < len(self.buckets) and not self.buckets[self._next].tied and not self._missing[self._next]:
            self._pending.append(self._start_reduction(self._next))
            self._next += 1

    def finish(self) -> None:
        """Wait for every reduction; parameters that got no gradient this step count as zero. Ends the step's gradients."""
        while self._next < len(self.buckets):
            self._pending.append(self._start_reduction(self._next))
            self._next += 1
        for pending in self._pending:
            pending.wait()
        self._final, self._pending, self._next = set(), [], 0
        self._missing = [set(parameters) for parameters in self._parameters_of]

    def owned(self, index: int) -> Tensor:
        """This data rank's slice of bucket `index`, reduced once `finish` has returned."""
        start, stop = self.buckets[index].owned_range(self.groups["dp"].index, self.groups["dp"].size)
        return self.flat[index][start:stop]

    def updated(self, index: int) -> Tensor:
        """What this rank updates parameters by: the slice that it owns, under ZeRO 0 all of the bucket."""
        return self.flat[index] if self.zero_stage == 0 else self.owned(index)

    def held_bytes(self) -> int:
        """Bytes of accumulated gradients on this rank between steps."""
        return sum(flat.numel() * flat.element_size() for flat in self.flat)

    def scratch_bytes(self) -> int:
        """The most that a step adds to `held_bytes`, beside what communication takes."""
        return 0

    def _start_reduction(self, index: int) -> Pending:
        bucket, flat, dp = self.buckets[index], self.flat[index], self.groups["dp"]
        self._note_local(index, flat)
        what = f"gradients of {bucket}"
        for axis in bucket.sum_gradient_over:
            all_reduce(flat, self.groups[axis], what=what)
        if self.reduce_dtype == self.dtype:
            if self.zero_stage == 0:
                return start_all_reduce(flat, dp, what=what)
            return start_reduce_scatter_into(self.owned(index), flat, dp, what=what)
        if self.zero_stage == 0:
            return _widened_into(flat, start_all_reduce(flat.to(self.reduce_dtype), dp, what=what))
        total = torch.empty(bucket.num_elements // dp.size, dtype=self.reduce_dtype, device=self.device)
        # What was accumulated is read no more: its memory holds what is sent.
        sent = narrow_in_place(flat, self.reduce_dtype)
        return _widened_into(self.owned(index), start_reduce_scatter_into(total, sent, dp, what=what))

    def _note_local(self, index: int, flat: Tensor) -> None:
        """Add what this rank computed for bucket `index`, in `flat`, to `local_max`."""
        views = [flat[slot.start : slot.stop] for slot in self.buckets[index].slots]
        largest = torch.stack(torch._foreach_norm(views, math.inf))
        known = self.local_max[self._first_name[index] : self._first_name[index + 1]]
        torch.maximum(known, largest, out=known)

    def take_autograd_gradient(self, parameter: Tensor) -> None:
        """Move what autograd accumulated in `parameter.grad` into the bucket."""
        assert isinstance(parameter, nn.Parameter)
        if parameter.grad is None:  # its module handed the gradient over itself
            return
        self.view(parameter).add_(parameter.grad)
        parameter.grad = None
        self.contributed(parameter)


def narrow_in_place(flat: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of `flat` rounded to a narrower `dtype`, in the first part of its own memory; `flat` is garbage afterwards.

    In sixteen parts, front to back: a part's place ends no later than what has been read."""
    narrow = flat.view(dtype)[: flat.numel()]
    size = -(-flat.numel() // 16)
    for start in range(0, flat.numel(), size):
        narrow[start : start + size].copy_(flat[start : start + size].to(dtype))
    return narrow


def _widened_into(out: Tensor, pending: Pending) -> Pending:
    """`pending`, whose result goes to `out` in out's dtype."""

    def finish() -> None:
        out.copy_(pending.wait())

    return Pending(out, finish=finish)
