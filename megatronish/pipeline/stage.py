"""One stage's part of the model: forward and backward of one microbatch through one chunk, keeping what lies between them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from megatronish.batch import Batch


class LossFunction(Protocol):
    """What the last stage ends in."""

    def __call__(self, logits_SBV: Tensor, batch: Batch, *, training: bool) -> Tensor:
        """logits [S, B, V/tp] of a microbatch -> the sum of its token losses, a scalar. `training`: backward will follow."""


class ProjectionLoss(Protocol):
    """What the last stage ends in, in the place of the model's projection and a LossFunction."""

    def __call__(self, x: Tensor, projection: nn.Module, batch: Batch, *, loss_gradient: Tensor | None) -> Tensor:
        """Activations [S/tp or S, B, D] of a microbatch and the module that would make logits of them -> the sum of its token
        losses. `loss_gradient`: where its backward will start; None: there will be none."""


@dataclass
class _InFlight:
    received: Tensor | None
    output: Tensor
    loss_gradient: Tensor | None


class Stage:
    """Runs `model`, `num_chunks` parts of the layers, on microbatches. Chunk c is part c * num_stages + stage of the whole model;
    the last part ends in `loss_function`, or `projection_loss` where that is given; their outputs are scalars that stay on the
    device."""

    def __init__(
        self,
        model: nn.Module,
        *,
        stage: int,
        num_stages: int,
        num_chunks: int,
        loss_function: LossFunction,
        projection_loss: ProjectionLoss | None = None,
    ) -> None:
        self.model = model
        self.stage = stage
        self.num_stages = num_stages
        self.num_parts = num_stages * num_chunks
        self.loss_function = loss_function
        self.projection_loss = projection_loss
        self._in_flight: dict[tuple[int, int], _InFlight] = {}

    def forward(
        self,
        index: int,
        batch: Batch,
        received: Tensor | None,
        *,
        chunk: int = 0,
        keep: bool,
        loss_gradient: Tensor | None = None,
    ) -> Tensor:
        """Microbatch `index` through `chunk`: the output activation [S/tp or S, B, D], or the last part's loss. `received`: what
        the part before gave, None for the first. `keep`: backward will follow, and that of the loss start from `loss_gradient`."""
        part = chunk * self.num_stages + self.stage
        if received is not None and keep:
            received.requires_grad_()
        with torch.set_grad_enabled(keep):
            inputs = batch.tokens_SB if part == 0 else received
            if part < self.num_parts - 1:
                output = self.model(inputs, batch.context, chunk)
            elif self.projection_loss is None:
                output = self.loss_function(self.model(inputs, batch.context, chunk), batch, training=keep)
            else:
                loss = partial(self.projection_loss, batch=batch, loss_gradient=loss_gradient if keep else None)
                output = self.model(inputs, batch.context, chunk, loss)
        if keep:
            self._in_flight[index, chunk] = _InFlight(received, output, loss_gradient)
        result: Tensor = output.detach()
        return result

    def backward(self, index: int, gradient: Tensor, *, chunk: int = 0) -> Tensor | None:
        """The gradient of the received activation (None for the first part), given that of the output."""
        kept = self._in_flight.pop((index, chunk))
        if chunk * self.num_stages + self.stage == self.num_parts - 1 and self.projection_loss is not None:
            assert gradient is kept.loss_gradient, "the gradients were made in forward, for another loss gradient"
        torch.autograd.backward(kept.output, gradient)
        return None if kept.received is None else kept.received.grad
