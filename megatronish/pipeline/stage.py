"""One stage's part of the model: forward and backward of one microbatch, keeping what lies between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from megatronish.batch import Batch


class LossFunction(Protocol):
    """What the last stage ends in."""

    def __call__(self, logits_SBV: Tensor, batch: Batch, *, training: bool) -> Tensor:
        """logits [S, B, V/tp] of a microbatch -> the sum of its token losses, a scalar. `training`: backward will follow."""


@dataclass
class _InFlight:
    received: Tensor | None
    output: Tensor


class Stage:
    """Runs `model` on microbatches. The last stage ends in `loss_function`; its outputs are scalars that stay on the device."""

    def __init__(self, model: nn.Module, *, is_first: bool, is_last: bool, loss_function: LossFunction) -> None:
        self.model = model
        self.is_first = is_first
        self.is_last = is_last
        self.loss_function = loss_function
        self._in_flight: dict[int, _InFlight] = {}

    def forward(self, index: int, batch: Batch, received: Tensor | None, *, keep: bool) -> Tensor:
        """Microbatch `index`: the output activation [S/tp or S, B, D], or the last stage's loss. `keep`: backward will follow."""
        if received is not None and keep:
            received.requires_grad_()
        with torch.set_grad_enabled(keep):
            inputs = batch.tokens_SB if self.is_first else received
            output = self.model(inputs, batch.context)
            if self.is_last:
                output = self.loss_function(output, batch, training=keep)
        if keep:
            self._in_flight[index] = _InFlight(received, output)
        result: Tensor = output.detach()
        return result

    def backward(self, index: int, gradient: Tensor) -> Tensor | None:
        """The gradient of the received activation (None on the first stage), given that of the output."""
        kept = self._in_flight.pop(index)
        torch.autograd.backward(kept.output, gradient)
        return None if kept.received is None else kept.received.grad
