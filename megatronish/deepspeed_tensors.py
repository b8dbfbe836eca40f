"""Parameters and gradients whose memory is DeepSpeed's: what stands in the place of our flat parameters and of our buckets."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatronish.comm.host import read_scalar
from megatronish.optim.grad_buffer import GradBuffer
from megatronish.optim.parameters import FlatParameters


class Accumulating(Protocol):
    """What EngineGradients needs of the engine's optimizer."""

    @property
    def parameters(self) -> FlatParameters:
        """By name."""

    def begin_accumulation(self) -> None:
        """Start a step with no gradients."""

    def end_accumulation(self) -> None:
        """The next backward is the last of the step."""


class EngineParameters(FlatParameters):
    """The parameters once the engine keeps their memory."""

    def __init__(self, given: FlatParameters) -> None:
        self.buckets, self.flat, self.by_name = given.buckets, [], given.by_name

    def all_finite(self) -> Tensor:
        """A bool scalar on the device: what this rank holds of the parameters is finite."""
        return torch.stack([torch.isfinite(_held(parameter)).all() for parameter in self.by_name.values()]).all()

    def first_not_finite(self) -> str | None:
        """The name of a parameter that is not finite, for an error message. Waits for the device."""
        bad = (name for name, p in self.by_name.items() if not read_scalar(torch.isfinite(_held(p)).all(), 1.0))
        return next(bad, None)


def _held(parameter: nn.Parameter) -> Tensor:
    """This rank's values: under stage 3 a slice."""
    held: Tensor = getattr(parameter, "ds_tensor", parameter.data)
    return held


class EngineGradients(GradBuffer):
    """In the place of our buckets: the engine keeps and reduces the gradients. Here is what this rank computed itself, for the
    report of a step that is not finite."""

    def __init__(self, optimizer: Accumulating, *, groups: Any, device: torch.device) -> None:
        self.buckets, self.groups, self.dtype, self.device = [], groups, torch.float32, device
        self.names = list(optimizer.parameters.by_name)
        self.local_max = torch.zeros(len(self.names), device=device)
        self._optimizer = optimizer
        buffer = weakref.proxy(self)
        for index, parameter in enumerate(optimizer.parameters.by_name.values()):
            parameter.register_hook(partial(_note, buffer, index))

    def zero(self) -> None:
        """Start a step; what the dry batch left is dropped."""
        self.local_max.zero_()
        self._optimizer.begin_accumulation()

    def begin_last_backward(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """The backward that follows is the step's last: the engine reduces what is left to reduce."""
        self._optimizer.end_accumulation()

    def finish(self) -> None:
        """The engine has finished with its last backward."""

    def held_bytes(self) -> int:
        """The engine's are not known."""
        return 0


def _note(gradients: EngineGradients, index: int, gradient: Tensor) -> None:
    largest = torch.linalg.vector_norm(gradient, math.inf).to(gradients.local_max.dtype)
    gradients.local_max[index] = torch.maximum(gradients.local_max[index], largest)
