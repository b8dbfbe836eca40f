"""Runs a lowered list: forwards, backwards and exchanges, strictly in order. Knows no schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatronish.batch import Batch
from megatronish.comm import Group
from megatronish.comm.exchange import PendingExchange, start_exchange
from megatronish.pipeline.lower import Exchange, Message, Step
from megatronish.pipeline.schedules import Backward, Forward
from megatronish.pipeline.stage import Stage


@dataclass(frozen=True)
class ActivationSpec:
    """What passes between stages."""

    shape: tuple[int, ...]
    """[S/tp or S, B, D]"""
    dtype: torch.dtype
    device: torch.device


@dataclass
class _Mail:
    """Tensors that have arrived or wait to be sent, by message."""

    tensors: dict[Message, Tensor] = field(default_factory=dict)
    under_way: list[PendingExchange] = field(default_factory=list)


class PipelineRuntime:
    """Executes the steps of one stage over the microbatches of a step. Collective over the pipeline group."""

    def __init__(self, stage: Stage, *, group: Group, activation: ActivationSpec, device_kind: str) -> None:
        self.stage = stage
        self.group = group
        self.activation = activation
        self.device_kind = device_kind

    def run(
        self,
        steps: Sequence[Step],
        microbatches: Sequence[Batch],
        *,
        loss_gradient: Tensor | None = None,
        before_last_backward: Callable[[], None] | None = None,
        on_loss: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """The sum over microbatches of the last stage's token losses (zero on the others), a device scalar.

        `loss_gradient`, 1 / the global number of target tokens, is where backward starts. `before_last_backward` is called before
        the step's last Backward: the gradients it adds are final. `on_loss` gets (microbatch, its loss) on the last stage. A
        list without Backward only evaluates: no gradients, no dropout.
        Returns when every send is done, so all buffers are free."""
        mail = _Mail()
        backwards = [step for step in steps if isinstance(step, Backward)]
        self.stage.model.train(bool(backwards))
        total: Tensor | None = None
        for step in steps:
            if isinstance(step, Forward):
                received = mail.tensors.pop(Message("activation", step.microbatch, step.chunk), None)
                output = self.stage.forward(step.microbatch, microbatches[step.microbatch], received, keep=bool(backwards))
                if not self.stage.is_last:
                    mail.tensors[Message("activation", step.microbatch, step.chunk)] = output
                else:
                    total = output if total is None else total + output
                    if on_loss is not None:
                        on_loss(step.microbatch, output)
            elif isinstance(step, Backward):
                if step is backwards[-1] and before_last_backward is not None:
                    before_last_backward()
                if self.stage.is_last:
                    assert loss_gradient is not None
                    gradient = loss_gradient
                else:
                    gradient = mail.tensors.pop(Message("gradient", step.microbatch, step.chunk))
                input_gradient = self.stage.backward(step.microbatch, gradient)
                if input_gradient is not None:
                    mail.tensors[Message("gradient", step.microbatch, step.chunk)] = input_gradient
            else:
                self._exchange(step, mail)
        for exchange in mail.under_way:
            exchange.wait_sent()
        return total if total is not None else torch.zeros((), device=self.activation.device)

    def _exchange(self, step: Exchange, mail: _Mail) -> None:
        spec = self.activation
        sends = [(mail.tensors.pop(message).contiguous(), message.tag) for message in step.sends]
        arriving = {m: torch.empty(spec.shape, dtype=spec.dtype, device=spec.device) for m in step.receives}
        exchange = start_exchange(
            sends=sends,
            receives=[(tensor, message.tag) for message, tensor in arriving.items()],
            peer_index=step.peer_stage,
            group=self.group,
            device_kind=self.device_kind,
        )
        mail.under_way.append(exchange)
        # Bounds what waits to be sent by the number of stages. Safe: the proof has every exchange block until its partner's.
        while len(mail.under_way) > self.group.size:
            mail.under_way.pop(0).wait_sent()
        exchange.wait_received()
        mail.tensors.update(arriving)
