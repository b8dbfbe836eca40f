"""Which updates are applied, and the loss scale of float16: decided on the device, step by step, without a host wait.

A step whose loss or gradient norm is not finite never reaches weights, moments or their count of updates (torch's GradScaler does
the same). What the device decided, and where the first number that is not finite came from, is kept until the host asks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from megatronish.comm.host import read_values
from megatronish.config import TrainConfig
from megatronish.optim.grad_buffer import GradBuffer
from megatronish.optim.grad_norm import clip_factor

MOST_BAD_IN_A_ROW = 20
"""A run that goes no further must not burn a cluster. Twenty halvings bring a loss scale of 65,536 to 1/16: what still overflows
does so without any scale."""
MOST_LOSS_SCALE = 2.0**24
"""Where gradients are zero nothing would stop the growth; beyond this a gradient of 1e-3 is infinite in float16."""
KEPT_RECORDS = 8
"""Bad steps between two reports of which the origin is kept; later ones are counted."""


@dataclass(frozen=True)
class GuardState:
    """The guard's numbers on the host, equal on every rank."""

    loss_scale: float
    good_steps: int = 0
    """In a row since the loss scale changed."""
    updates: int = 0
    """Steps that were applied: Adam's bias correction counts these."""
    skipped: int = 0
    """Steps that were not."""
    bad_in_a_row: int = 0
    stopped_at: int = 0
    """The bad step since which nothing is applied; 0: none."""


@dataclass(frozen=True)
class LocalRecord:
    """One bad step as one rank saw it by itself, before any sum over ranks."""

    step: int
    microbatch: int | None
    """The first whose loss was not finite."""
    parameter: int | None
    """Position, in the order of backward, of the first whose gradient was not finite."""


class StepGuard:
    """`decide` once a step; everything else is for the host."""

    def __init__(self, config: TrainConfig, grads: GradBuffer, *, clip_norm: float, backward_order: Sequence[str]) -> None:
        """`backward_order`: the stage's parameters, in about the order in which backward finishes them."""
        self.config = config
        self.clip_norm = clip_norm
        self.grads = grads
        self.scales = config.dtype == "float16"
        position = {name: index for index, name in enumerate(grads.names)}
        self._order = torch.tensor([position[name] for name in backward_order], device=grads.device)
        self.reset(GuardState(self.first_scale))
        self._losses: dict[int, Tensor] = {}
        self._rows = torch.arange(KEPT_RECORDS, device=grads.device)
        self.records = torch.zeros(KEPT_RECORDS, 3, dtype=torch.int64, device=grads.device)
        """[KEPT_RECORDS, 3] int64: step, microbatch + 1, parameter + 1; zeros for nothing."""
        self._count = torch.zeros((), dtype=torch.int64, device=grads.device)

    @property
    def first_scale(self) -> float:
        """Of a run's first step."""
        return self.config.loss_scale if self.scales else 1.0

    @property
    def loss_scale(self) -> Tensor:
        """What the loss gradient is multiplied by: a scalar in the gradients' dtype."""
        return self.numbers[0].to(self.grads.dtype)

    def reset(self, state: GuardState) -> None:
        """Go on from `state`, whose skipped steps were reported."""
        self.numbers = torch.tensor([float(v) for v in asdict(state).values()], dtype=torch.float64, device=self.grads.device)
        self.reported_skips = state.skipped

    def note_loss(self, microbatch: int, loss: Tensor) -> None:
        """The last stage's loss of a microbatch of this step."""
        self._losses[microbatch] = loss

    def decide(self, *, step: int, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """What AdamW needs of this step: (factor of the gradients, number of the update); a factor of NaN refuses it.

        `loss` and `grad_norm` (without the loss scale) are those of the whole job, equal on every rank; so is the decision."""
        scale, good, updates, skipped, in_a_row, stopped = self.numbers.unbind()
        running, lost = stopped == 0, ~torch.isfinite(loss)
        bad = lost | ~torch.isfinite(grad_norm)
        self._record(step, bad & running)

        in_a_row = torch.where(bad, in_a_row + 1, 0.0)
        fatal = in_a_row >= MOST_BAD_IN_A_ROW
        if self.config.on_not_finite == "stop":
            # In float16 a finite loss with gradients beyond 65,504 asks for another scale, no more.
            fatal |= lost if self.scales else bad
        good = torch.where(bad, 0.0, good + 1)
        new_scale = scale
        if self.scales:
            grows = good >= self.config.loss_scale_interval
            new_scale = torch.where(bad, scale / 2, torch.where(grows, (scale * 2).clamp(max=MOST_LOSS_SCALE), scale))
            good = torch.where(grows, 0.0, good)
        stopped = torch.where(bad & fatal, float(step), stopped)
        after = torch.stack((new_scale, good, updates + ~bad, skipped + bad, in_a_row, stopped))
        self.numbers = torch.where(running, after, self.numbers)

        factor = clip_factor(grad_norm, self.clip_norm) / scale.to(grad_norm.dtype)
        factor = torch.where(running & ~bad, factor, math.nan)
        return torch.stack((factor, self.numbers[2].to(factor.dtype)))

    def _record(self, step: int, wanted: Tensor) -> None:
        """Keep where this step went wrong on this rank, if it is `wanted`."""
        losses = [self._losses[index] for index in sorted(self._losses)]
        microbatch = _first(~torch.isfinite(torch.stack(losses))) if losses else torch.zeros_like(self._count)
        parameter = _first(~torch.isfinite(self.grads.local_max[self._order]))
        row = torch.stack((torch.full_like(self._count, step), microbatch, parameter))
        self.records = torch.where(((self._rows == self._count) & wanted)[:, None], row, self.records)
        self._count = self._count + wanted
        self._losses = {}

    def forget_records(self) -> None:
        """What was kept has been reported."""
        self.records, self._count = torch.zeros_like(self.records), torch.zeros_like(self._count)

    def state_of(self, values: Sequence[float]) -> GuardState:
        """`numbers` once they are on the host."""
        return GuardState(values[0], *(int(value) for value in values[1:]))

    def read(self) -> GuardState:
        """The numbers on the host. Waits for the device."""
        return self.state_of(read_values(self.numbers, self.assumed))

    @property
    def assumed(self) -> list[float]:
        """The numbers of a run in which nothing goes wrong, for a rehearsal."""
        return [float(value) for value in asdict(GuardState(self.first_scale)).values()]

    def restore(self, saved: Mapping[str, float] | None, *, step: int) -> None:
        """Go on after `step` from what `saved` holds; a checkpoint without it had every step applied."""
        state = GuardState(self.first_scale, updates=step)
        if saved is not None:
            counts = {name: int(saved[name]) for name in ("good_steps", "updates", "skipped", "bad_in_a_row")}
            state = GuardState(float(saved["loss_scale"]) if self.scales and "loss_scale" in saved else self.first_scale, **counts)
        self.reset(state)

    def saved(self, state: GuardState) -> dict[str, float]:
        """What a checkpoint keeps of a run that goes on: plain numbers; a loss scale only where there is one."""
        assert not state.stopped_at
        return {
            name: value for name, value in asdict(state).items() if name != "stopped_at" and (self.scales or name != "loss_scale")
        }


def _first(mask: Tensor) -> Tensor:
    """1 + the position of the first true element, 0 for none: a scalar int64 on the device."""
    return torch.where(mask.any(), mask.to(torch.int8).argmax() + 1, 0)


def records_of(values: Sequence[float]) -> list[LocalRecord]:
    """`StepGuard.records`, flattened and read, without the empty rows."""
    rows = [[int(value) for value in values[at : at + 3]] for at in range(0, len(values), 3)]
    return [LocalRecord(step, microbatch - 1 if microbatch else None, p - 1 if p else None) for step, microbatch, p in rows if step]
