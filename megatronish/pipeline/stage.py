"""One stage's part of the model: forward and backward of one microbatch through one chunk, keeping what lies between them."""

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
    """Runs `model`, `num_chunks` parts of the layers, on microbatches. Chunk c is part c * num_stages + stage of the whole model;
    the last part ends in `loss_function`, whose outputs are scalars that stay on the device."""

    def __init__(self, model: nn.Module, *, stage: int, num_stages: int, num_chunks: int, loss_function: LossFunction) -> None:
        self.model = model
        self.stage = stage
        self.num_stages = num_stages
        self.num_parts = num_stages * num_chunks
        self.loss_function = loss_function
        self._in_flight: dict[tuple[int, int], _InFlight] = {}

    def forward(self, index: int, batch: Batch, received: Tensor | None, *, chunk: int = 0, keep: bool) -> Tensor:
        """Microbatch `index` through `chunk`: the output activation [S/tp or S, B, D], or the last part's loss. `received`: what
        the part before gave, None for the first. `keep`: backward will follow."""
        part = chunk * self.num_stages + self.stage
        if received is not None and keep:
            received.requires_grad_()
        with torch.set_grad_enabled(keep):
            inputs = batch.tokens_SB if part == 0 else received
            output = self.model(inputs, batch.context, chunk)
            if part == self.num_parts - 1:
                output = self.loss_function(output, batch, training=keep)
        if keep:
            self._in_flight[index, chunk] = _InFlight(received, output)
        result: Tensor = output.detach()
        return result

    def backward(self, index: int, gradient: Tensor, *, chunk: int = 0) -> Tensor | None:
        """The gradient of the received activation (None for the first part), given that of the output."""
        kept = self._in_flight.pop((index, chunk))
        torch.autograd.backward(kept.output, gradient)
        return None if kept.received is None else kept.received.grad
