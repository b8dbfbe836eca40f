"""Activation recomputation: what is not kept for backward and made again there.

Full (Chen et al. 2016): keep a block's input, run its forward again. Selective (Korthikanti et al. 2022, section 5; outputs dropped
as in Megatron's CheckpointWithoutOutput): a producer without large products (norm, activation, attention without its linears) keeps
its inputs only; its output goes to one linear, which does not keep it either and has it made again right before its own backward.
A model names these pairs in its SELECTIVE_RECOMPUTE. Randomness is counter-based, so nothing of a generator's state has to be kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatronish.parallel.tensor import CutLinear


class Recomputed(nn.Module):
    """Runs `block` keeping only its inputs for backward."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *inputs: Any) -> Tensor:
        # Early stop leaves out what follows the last tensor that backward needs, so the block's last sum is not communicated twice.
        out: Tensor = checkpoint(self.block, *inputs, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
        return out


def recompute_blocks(blocks: nn.ModuleDict) -> None:
    """Wrap each block in place. Call it after parameters have their names: the wrapper adds a level to them."""
    for name, block in list(blocks.items()):
        blocks[name] = Recomputed(block)


class _Call:
    """One forward of a producer: its inputs, from which its output comes again."""

    def __init__(self, producer: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.producer = producer
        self.parameters = list(producer.parameters())
        # Leaves of a graph of their own, which share the memory of the inputs.
        self.inputs = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs]
        self.remade: Tensor | None = None

    def remake(self) -> Tensor:
        """The output once more. Called by the consumer's backward, before `gradients`."""
        with torch.enable_grad():
            self.remade = self.producer(*self.inputs)
        return self.remade.detach()

    def gradients(self, dy: Tensor) -> list[Tensor | None]:
        """Of the inputs and parameters, None for what needs none. Lets go of all of them: the call lives as long as the graph."""
        assert self.remade is not None, "the consumer's backward comes first"
        given = [*self.inputs, *self.parameters]
        wanted = [isinstance(x, Tensor) and x.requires_grad for x in given]
        leaves = [x for x, is_wanted in zip(given, wanted, strict=True) if is_wanted]
        grads = iter(torch.autograd.grad(self.remade, leaves, dy))
        self.remade, self.inputs, self.parameters = None, [], []
        return [next(grads) if is_wanted else None for is_wanted in wanted]


class _Forget(torch.autograd.Function):
    """A producer's forward that keeps nothing but the call. The parameters are arguments so that the output needs a gradient."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *inputs_and_parameters: Any) -> Tensor:
        ctx.call = call
        out: Tensor = call.producer(*call.inputs)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.call.gradients(dy)


class _Handover:
    """From a producer to its consumer, within one forward: the output, and how to make it again."""

    def __init__(self) -> None:
        self._waiting: tuple[Tensor, _Call] | None = None

    def give(self, output: Tensor, call: _Call) -> None:
        """By the producer."""
        self._waiting = (output, call)

    def take(self, x: Tensor) -> Callable[[], Tensor] | None:
        """By the consumer, for its input; None in a forward that keeps nothing."""
        if not torch.is_grad_enabled():
            return None
        assert self._waiting is not None and self._waiting[0] is x, "the consumer's input is not the producer's output"
        _, call = self._waiting
        self._waiting = None
        return call.remake


class Forgotten(nn.Module):
    """Runs `producer`; its output is kept by nobody and made again for the backward of the linear that consumes it."""

    def __init__(self, producer: nn.Module, handover: _Handover) -> None:
        super().__init__()
        self.producer = producer
        self._handover = handover

    def forward(self, *inputs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            plain: Tensor = self.producer(*inputs)
            return plain
        call = _Call(self.producer, inputs)
        out: Tensor = _Forget.apply(call, *inputs, *call.parameters)
        self._handover.give(out, call)
        return out


def recompute_selectively(model: nn.Module, table: Mapping[str, str]) -> None:
    """For each `producer: consumer` of module names (`*` is one part of a name, the same in both): wrap the producer in place and
    have the consumer, a cut linear, keep nothing of its input. Call it after parameters have their names."""
    for producer_pattern, consumer_pattern in table.items():
        pattern = re.compile(re.escape(producer_pattern).replace(r"\*", r"([^.]+)"))
        matches = [match for name, _ in model.named_modules() if (match := pattern.fullmatch(name)) is not None]
        assert matches, f"SELECTIVE_RECOMPUTE: no module {producer_pattern}"
        for match in matches:
            consumer = model.get_submodule(consumer_pattern.replace("*", match.group(1)))
            assert isinstance(consumer, CutLinear), f"SELECTIVE_RECOMPUTE: {consumer_pattern} is no cut linear"
            handover = _Handover()
            consumer.input_source = handover.take
            model.set_submodule(match.group(0), Forgotten(model.get_submodule(match.group(0)), handover))
