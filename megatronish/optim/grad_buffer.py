"""Gradients accumulate in flat buckets; a complete bucket is summed over the ranks it is owed to, under the rest of the backward.

The order of reductions is the order of buckets, the same on every rank, whatever order backward completes them in.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from megatronish.comm import Group, Pending, all_reduce
from megatronish.comm.collectives import start_all_reduce, start_reduce_scatter_into
from megatronish.optim.buckets import Bucket


class GradBuffer:
    """Flat gradient memory for `buckets` and the reductions it is owed.

    zero_stage 1: a data rank ends with the sum of its own slice; 0: with the sum of everything.
    """

    def __init__(
        self,
        buckets: list[Bucket],
        parameters: Mapping[str, nn.Parameter],
        *,
        groups: Mapping[str, Group],
        zero_stage: Literal[0, 1],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.buckets = buckets
        self.groups = groups
        self.zero_stage = zero_stage
        self.flat = [torch.zeros(b.num_elements, dtype=dtype, device=device) for b in buckets]
        self._view_of: dict[nn.Parameter, Tensor] = {}
        self._bucket_of: dict[nn.Parameter, int] = {}
        self._parameters_of = [[parameters[slot.name] for slot in b.slots] for b in buckets]
        for index, (bucket, flat) in enumerate(zip(buckets, self.flat, strict=True)):
            for slot in bucket.slots:
                parameter = parameters[slot.name]
                self._view_of[parameter] = flat[slot.start : slot.stop].view(slot.local_box.sizes)
                self._bucket_of[parameter] = index
        self._missing: list[set[nn.Parameter]] | None = None
        self._next = 0
        self._pending: list[Pending] = []
        # An embedding or a linear hands its gradient over itself; what autograd accumulates for all others is moved here.
        # A parameter keeps its hooks where the garbage collector does not look: a strong reference from there would never be freed,
        # nor the groups' communicators with their threads.
        buffer = weakref.proxy(self)
        for parameter in self._view_of:
            parameter.register_post_accumulate_grad_hook(lambda p: buffer.take_autograd_gradient(p))

    def view(self, parameter: nn.Parameter) -> Tensor:
        """The parameter's accumulated gradient, in the parameter's shape and the bucket's dtype."""
        return self._view_of[parameter]

    def zero(self) -> None:
        """Start a step."""
        for flat in self.flat:
            flat.zero_()

    def begin_last_backward(self) -> None:
        """From now on each parameter gets its last contribution of the step: reduce every bucket once it is complete."""
        self._missing = [set(parameters) for parameters in self._parameters_of]
        self._next = 0

    def contributed(self, parameter: nn.Parameter) -> None:
        """`view(parameter)` has this microbatch's gradient added."""
        if self._missing is None:
            return
        self._missing[self._bucket_of[parameter]].discard(parameter)
        while self._next < len(self.buckets) and not self._missing[self._next]:
            self._pending.append(self._start_reduction(self._next))
            self._next += 1

    def finish(self) -> None:
        """Wait for every reduction; parameters that got no gradient this step count as zero. Ends the step's gradients."""
        while self._next < len(self.buckets):
            self._pending.append(self._start_reduction(self._next))
            self._next += 1
        for pending in self._pending:
            pending.wait()
        self._pending, self._missing = [], None

    def owned(self, index: int) -> Tensor:
        """This data rank's slice of bucket `index`, reduced once `finish` has returned."""
        start, stop = self.buckets[index].owned_range(self.groups["dp"].index, self.groups["dp"].size)
        return self.flat[index][start:stop]

    def _start_reduction(self, index: int) -> Pending:
        bucket, flat, dp = self.buckets[index], self.flat[index], self.groups["dp"]
        for axis in bucket.sum_gradient_over:
            all_reduce(flat, self.groups[axis])
        if self.zero_stage == 0:
            return start_all_reduce(flat, dp)
        return start_reduce_scatter_into(self.owned(index), flat, dp)

    def take_autograd_gradient(self, parameter: Tensor) -> None:
        """Move what autograd accumulated in `parameter.grad` into the bucket."""
        assert isinstance(parameter, nn.Parameter)
        if parameter.grad is None:  # its module handed the gradient over itself
            return
        self._view_of[parameter].add_(parameter.grad)
        parameter.grad = None
        self.contributed(parameter)
