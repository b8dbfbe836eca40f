"""AdamW with its state in slices: ZeRO stages 0, 1 and 2 (Rajbhandari et al. 2020) over flat buckets.

Stages 1 and 2: a data rank updates its slice of each bucket, and the slices are gathered, bucket by bucket, under the forward that
follows. Stage 0: every rank updates everything. Either way a rank *owns* (counts in the norm, saves) the same slice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, Protocol

import torch
from torch import Tensor

from megatronish.comm import Group, Pending
from megatronish.comm.collectives import start_all_gather_into
from megatronish.comm.random import stream_key
from megatronish.config import OptimConfig
from megatronish.kernels.adamw import AdamWNumbers, adamw_, join_master, split_master
from megatronish.layout import ParamPlacement, Rectangle
from megatronish.optim.buckets import Bucket
from megatronish.optim.grad_buffer import GradBuffer
from megatronish.optim.parameters import FlatParameters

STATES = ("master", "exp_avg", "exp_avg_sq")


class Optimizer(Protocol):
    """What a trainer and a checkpoint ask of an optimizer."""

    def reset_master(self) -> None:
        """Take the parameters' values, which were drawn. Collective over the job."""

    def publish_master(self) -> None:
        """Take the state that was read into `needed_pieces`. Collective over the job."""

    def step(self, *, lr: float, scalars: Tensor) -> None:
        """Update for the scalars[1]th time by gradients x scalars[0]; a factor that is not finite changes nothing."""

    def ensure_parameters(self, names: Iterable[str] | None = None) -> None:
        """Wait until the named parameters (default: all) hold this step's values."""

    def owned_pieces(self) -> Iterator[tuple[str, str, Rectangle, Tensor]]:
        """What this rank saves: (state, parameter, box of the global tensor, its values, flat). All data ranks call it."""
        ...

    def needed_pieces(self) -> Iterator[tuple[str, str, Rectangle, Tensor]]:
        """The same tuples for what this rank must load."""
        ...

    def state_bytes(self) -> int:
        """Bytes of optimizer state on this rank."""
        ...


class ZeroAdamW:
    """The optimizer of one rank. Call order in a step: `step`, then `ensure_parameters` before a parameter is read."""

    def __init__(
        self,
        config: OptimConfig,
        parameters: FlatParameters,
        grads: GradBuffer,
        *,
        dp: Group,
        zero_stage: Literal[0, 1, 2],
        placements: Mapping[str, ParamPlacement],
        seed: int,
    ) -> None:
        """`seed` and the parameters' `placements` decide what is rounded by chance."""
        self.config = config
        self.parameters = parameters
        self.grads = grads
        self.dp = dp
        self.zero_stage = zero_stage
        self._gathering: dict[int, Pending] = {}
        self._bucket_of = {slot.name: i for i, b in enumerate(parameters.buckets) for slot in b.slots}
        self.states: list[dict[str, Tensor]] = []
        for bucket, flat in zip(parameters.buckets, parameters.flat, strict=True):
            start, stop = self._updated_range(bucket)
            mine = flat[start:stop]
            # In full precision the parameters are their own master copy; with optim.master=none in bfloat16, too.
            master = mine if flat.dtype == grads.dtype or config.master == "none" else mine.to(grads.dtype)
            if config.master == "remainder":
                master = torch.zeros(stop - start, dtype=torch.int16, device=grads.device)
            dtype = torch.bfloat16 if config.moments_dtype == "bfloat16" else grads.dtype
            zeros = {name: torch.zeros(stop - start, dtype=dtype, device=grads.device) for name in STATES[1:]}
            self.states.append({"master": master, **zeros})
        self._segments: list[Tensor | None] = [None] * len(parameters.buckets)
        if config.rounding == "stochastic":
            ranges = [(bucket, *self._updated_range(bucket)) for bucket in parameters.buckets]
            self._segments = [segments_of(*given, placements, seed=seed).to(grads.device) for given in ranges]
        self._read: dict[int, Tensor] = {}
        """Master weights of a bucket on their way from a checkpoint, where they are kept in halves."""

    def _updated_range(self, bucket: Bucket) -> tuple[int, int]:
        return bucket.owned_range(self.dp.index, self.dp.size) if self.zero_stage > 0 else (0, bucket.num_elements)

    def reset_master(self) -> None:
        """Take the parameters' values as the master weights (after they were drawn)."""
        for bucket, flat, state in zip(self.parameters.buckets, self.parameters.flat, self.states, strict=True):
            start, stop = self._updated_range(bucket)
            if state["master"].dtype == torch.int16:
                state["master"].zero_()
            elif state["master"].dtype != flat.dtype:
                state["master"].copy_(flat[start:stop])

    def step(self, *, lr: float, scalars: Tensor) -> None:
        """Update by gradients x scalars[0], the scalars[1]th time (on the device; a factor that is not finite changes nothing);
        start gathering parameters. Does not wait for the device."""
        c = self.config
        for index, (bucket, flat, state) in enumerate(zip(self.parameters.buckets, self.parameters.flat, self.states, strict=True)):
            start, stop = self._updated_range(bucket)
            numbers = AdamWNumbers(lr, c.beta1, c.beta2, c.eps, c.weight_decay if bucket.weight_decay else 0.0)
            low = None if state["master"].dtype == flat.dtype else flat[start:stop]
            grad = self.grads.updated(index)
            adamw_(
                state["master"],
                grad,
                state["exp_avg"],
                state["exp_avg_sq"],
                scalars=scalars,
                low=low,
                numbers=numbers,
                segments=self._segments[index],
                rounding=c.rounding,
                zero_grad=not self.grads.kept_after_update,
            )
        self.grads.zeroed = not self.grads.kept_after_update
        self.start_gathering()

    def publish_master(self) -> None:
        """Give the parameters the master weights' values, on every data rank (after they were loaded)."""
        for index, (bucket, flat, state) in enumerate(zip(self.parameters.buckets, self.parameters.flat, self.states, strict=True)):
            start, stop = self._updated_range(bucket)
            if index in self._read:
                low, remainder = split_master(self._read.pop(index))
                flat[start:stop].copy_(low)
                state["master"].copy_(remainder)
            elif state["master"].dtype != flat.dtype:
                flat[start:stop].copy_(state["master"])
        self.start_gathering()

    def start_gathering(self) -> None:
        """Begin to give every data rank the whole of each bucket, first layers first: forward needs them first."""
        if self.zero_stage == 0 or self.dp.size == 1:
            return
        for index in reversed(range(len(self.parameters.buckets))):
            start, stop = self._updated_range(self.parameters.buckets[index])
            flat, what = self.parameters.flat[index], f"parameters of {self.parameters.buckets[index]}"
            self._gathering[index] = start_all_gather_into(flat, flat[start:stop], self.dp, what=what)

    def ensure_parameters(self, names: Iterable[str] | None = None) -> None:
        """Wait until the named parameters (default: all) hold this step's values: the one place that waits for the gathering."""
        needed = set(self._gathering) if names is None else {self._bucket_of[name] for name in names} & set(self._gathering)
        for index in sorted(needed, reverse=True):
            self._gathering.pop(index).wait()

    def owned_pieces(self) -> Iterator[tuple[str, str, Rectangle, Tensor]]:
        """What this rank saves: (state, parameter, box of the global tensor, its values, flat). Views; of masters kept in halves,
        new float32 tensors."""
        for bucket, flat, state in zip(self.parameters.buckets, self.parameters.flat, self.states, strict=True):
            if bucket.is_counted_by(self.grads.groups["tp"].index):
                start, stop = self._updated_range(bucket)
                whole = state
                if state["master"].dtype == torch.int16:
                    whole = {**state, "master": join_master(flat[start:stop], state["master"])}
                yield from self._pieces(bucket, whole, *bucket.owned_range(self.dp.index, self.dp.size))

    def needed_pieces(self) -> Iterator[tuple[str, str, Rectangle, Tensor]]:
        """What this rank must load: the same tuples for all state that it updates."""
        for index, (bucket, state) in enumerate(zip(self.parameters.buckets, self.states, strict=True)):
            whole = state
            if state["master"].dtype == torch.int16:
                # Alignment gaps are read from nowhere.
                self._read[index] = torch.zeros(state["master"].numel(), dtype=torch.float32, device=self.grads.device)
                whole = {**state, "master": self._read[index]}
            yield from self._pieces(bucket, whole, *self._updated_range(bucket))

    def _pieces(
        self, bucket: Bucket, state: Mapping[str, Tensor], start: int, stop: int
    ) -> Iterator[tuple[str, str, Rectangle, Tensor]]:
        base = self._updated_range(bucket)[0]
        for name, box, flat in bucket.pieces(start, stop):
            for kind in STATES:
                yield kind, name, box, state[kind][flat - base : flat - base + box.num_elements]

    def state_bytes(self) -> int:
        """Bytes of moments, and of master weights where they are a copy of their own."""
        copies = [
            tensor
            for state, flat in zip(self.states, self.parameters.flat, strict=True)
            for name, tensor in state.items()
            if name != "master" or tensor.dtype != flat.dtype
        ]
        return sum(t.numel() * t.element_size() for t in copies)


def segments_of(bucket: Bucket, start: int, stop: int, placements: Mapping[str, ParamPlacement], *, seed: int) -> Tensor:
    """Which element of which tensor each element of the bucket's slice [start, stop) is: int64 rows for `adamw_`, on the CPU."""
    rows = []
    slots = [slot for slot in bucket.slots if slot.start < stop]
    for slot, following in zip(slots, [*slots[1:], None], strict=True):
        end = stop if following is None else min(stop, following.start)
        if end <= start:
            continue
        shape, box, dim = placements[slot.name].global_shape, slot.local_box, placements[slot.name].shard_dim
        inner = math.prod(box.sizes[dim:] if dim is not None else box.sizes)
        row = math.prod(shape[dim:] if dim is not None else shape)
        first = box.offsets[dim] * math.prod(shape[dim + 1 :]) if dim is not None else 0
        key = stream_key(seed, "rounding", slot.name)
        # A gap behind a tensor counts on.
        rows.append([end - start, int(bucket.weight_decay), key, start - slot.start, max(1, inner), max(1, row), first])
    return torch.tensor(rows, dtype=torch.int64).view(-1, 7)


def saved_boxes(buckets: list[Bucket], *, tp_rank: int, dp_rank: int, dp_size: int) -> Iterator[tuple[str, str, Rectangle]]:
    """(state, parameter, box) that the rank at these coordinates saves: `owned_pieces` as a pure function, for any rank."""
    for bucket in buckets:
        if not bucket.is_counted_by(tp_rank):
            continue
        for name, box, _ in bucket.pieces(*bucket.owned_range(dp_rank, dp_size)):
            for kind in STATES:
                yield kind, name, box
