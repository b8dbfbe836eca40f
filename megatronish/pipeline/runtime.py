"""Runs a lowered list: forwards, backwards and exchanges, strictly in order. Knows no schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from megatronish.batch import Batch
from megatronish.comm import Group
from megatronish.comm.exchange import Parcel, PendingExchange, Post, start_exchange
from megatronish.comm.history import note_action
from megatronish.pipeline.lower import Exchange, Message, Step, destination, needed_by, output_of
from megatronish.pipeline.schedules import Backward, Forward
from megatronish.pipeline.timeline import part_of


class RunsMicrobatches(Protocol):
    """What the runtime needs of a stage (`stage.Stage`)."""

    model: nn.Module
    stage: int
    num_stages: int
    num_parts: int

    def forward(
        self, index: int, batch: Batch, received: Tensor | None, *, chunk: int, keep: bool, loss_gradient: Tensor | None
    ) -> Tensor:
        """See Stage.forward."""

    def backward(self, index: int, gradient: Tensor, *, chunk: int) -> Tensor | None:
        """See Stage.backward."""


@dataclass(frozen=True)
class ActivationSpec:
    """What passes between stages."""

    shape: tuple[int, ...]
    """[S/tp or S, B, D]"""
    dtype: torch.dtype
    device: torch.device


@dataclass
class _Mail:
    """Tensors that wait to be sent, that arrive or have arrived, by message; and sends under way."""

    outgoing: dict[Message, Tensor] = field(default_factory=dict)
    incoming: dict[Message, tuple[Tensor, PendingExchange | None]] = field(default_factory=dict)
    under_way: list[PendingExchange] = field(default_factory=list)

    def take(self, message: Message) -> Tensor:
        """Wait for a message; its tensor."""
        tensor, exchange = self.incoming.pop(message)
        if exchange is not None:
            exchange.wait_received()
        return tensor


class PipelineRuntime:
    """Executes the steps of one stage over the microbatches of a step. Collective over the pipeline group."""

    def __init__(self, stage: RunsMicrobatches, *, group: Group, activation: ActivationSpec, device_kind: str) -> None:
        self.stage = stage
        self.group = group
        self.activation = activation
        self.device_kind = device_kind
        self.post: Post | None = None
        """What a rehearsal has in the place of torch.distributed."""

    def run(
        self,
        steps: Sequence[Step],
        microbatches: Sequence[Batch],
        *,
        loss_gradient: Tensor | None = None,
        before_backward: Callable[[int, bool], None] | None = None,
        on_loss: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """The sum over microbatches of the last part's token losses (zero on other stages), a device scalar.

        `loss_gradient`, 1 / the global number of target tokens, is where backward starts. `before_backward` is called before each
        Backward with its chunk and whether it is the chunk's last of the step: the gradients that one adds are final. `on_loss`
        gets (microbatch, its loss) where the last part is. A list without Backward only evaluates: no gradients, no dropout.
        Returns when every send is done, so all buffers are free."""
        stage, mail = self.stage, _Mail()
        last_backward = {step.chunk: step for step in steps if isinstance(step, Backward)}
        stage.model.train(bool(last_backward))
        total = torch.zeros((), device=self.activation.device)
        for step in steps:
            if isinstance(step, Exchange):
                note_action("exchange")
                self._exchange(step, mail)
                continue
            note_action(str(step))
            part = part_of(step, stage.stage, stage.num_stages)
            needed = needed_by(step, part, stage.num_parts)
            received = None if needed is None else mail.take(needed)
            output: Tensor | None
            if isinstance(step, Forward):
                batch, keep = microbatches[step.microbatch], bool(last_backward)
                output = stage.forward(step.microbatch, batch, received, chunk=step.chunk, keep=keep, loss_gradient=loss_gradient)
            else:
                if before_backward is not None:
                    before_backward(step.chunk, step is last_backward[step.chunk])
                gradient = loss_gradient if needed is None else received
                assert gradient is not None
                output = stage.backward(step.microbatch, gradient, chunk=step.chunk)
            message = output_of(step, part, stage.num_parts)
            if message is not None:
                assert output is not None
                self._hand_on(message, output, mail)
            elif isinstance(step, Forward):
                assert output is not None
                if on_loss is not None:
                    on_loss(step.microbatch, output)
                total = total + output
        note_action("last sends")
        for exchange in mail.under_way:
            exchange.wait_sent()
        note_action("")
        return total

    def _hand_on(self, message: Message, tensor: Tensor, mail: _Mail) -> None:
        if destination(message) % self.stage.num_stages == self.stage.stage:
            mail.incoming[message] = tensor, None
        else:
            mail.outgoing[message] = tensor

    def _exchange(self, step: Exchange, mail: _Mail) -> None:
        """Post all of it. What is received is waited for by the action that needs it; until then this stage computes on."""
        spec = self.activation
        sends = [Parcel(mail.outgoing.pop(message).contiguous(), message.tag, str(message)) for message in step.sends]
        arriving = {m: torch.empty(spec.shape, dtype=spec.dtype, device=spec.device) for m in step.receives}
        exchange = start_exchange(
            sends=sends,
            receives=[Parcel(tensor, message.tag, str(message)) for message, tensor in arriving.items()],
            peer_index=step.peer_stage,
            group=self.group,
            device_kind=self.device_kind,
            post=self.post,
        )
        mail.incoming.update((message, (tensor, exchange)) for message, tensor in arriving.items())
        if sends:
            mail.under_way.append(exchange)
        # Bounds what waits to be sent by the number of stages. Safe: the proof has every exchange block until its partner's.
        while len(mail.under_way) > self.group.size:
            mail.under_way.pop(0).wait_sent()
