"""The training loop. `Trainer.train_step` reads top to bottom; what follows a step (log, save, evaluate) is up to `train.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from megatronish.batch import Batch
from megatronish.comm import all_reduce
from megatronish.comm.history import phase
from megatronish.comm.streams import PhaseClock
from megatronish.config import Config
from megatronish.optim.grad_buffer import GradBuffer
from megatronish.optim.grad_norm import owned_square_sum
from megatronish.optim.lr_schedule import learning_rate
from megatronish.optim.step_guard import StepGuard
from megatronish.optim.zero import Optimizer
from megatronish.parallel.mesh import Mesh
from megatronish.pipeline.lower import Step
from megatronish.pipeline.runtime import PipelineRuntime


class BatchSource(Protocol):
    """Where a step's samples come from (`data.loader.BatchLoader`)."""

    def batch(self, step: int) -> Batch:
        """This data rank's samples of `step`."""


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind; the tensors are scalars on the device, equal on every rank. Reading one waits for the device."""

    step: int
    loss: Tensor
    """Mean over the target tokens of the global batch."""
    grad_norm: Tensor
    """Global L2 norm before clipping."""
    num_targets: Tensor
    lr: float


@dataclass
class Trainer:
    """One rank's part of the run."""

    config: Config
    mesh: Mesh
    batches: BatchSource
    pipeline: PipelineRuntime
    train_steps: Callable[[int], list[Step]]
    """Number of microbatches -> this stage's lowered schedule."""
    evaluation_steps: list[Step]
    grads: GradBuffer
    optimizer: Optimizer
    guard: StepGuard
    clock: PhaseClock
    chunk_parameters: list[list[nn.Parameter]]
    """What a backward of each chunk of this stage gives gradients to."""

    def fit(self, first_step: int, last_step: int) -> Iterator[StepResult]:
        """Train steps first_step .. last_step (the first of a run is 1), yielding after each."""
        for step in range(first_step, last_step + 1):
            with phase("train", step):
                result = self.train_step(step)
            yield result

    def train_step(self, step: int) -> StepResult:
        """One optimizer step on one global batch. Collective over the whole job; the host does not wait for a GPU."""
        self.clock.begin()
        batch = self.batches.batch(step)
        self.clock.mark("data")

        num_targets = self.count_targets(batch)
        loss_sum = self.accumulate_gradients(batch, num_targets)
        self.clock.mark("forward_backward")

        self.grads.finish()
        self.clock.mark("reduce")

        loss, grad_norm = self.join_scalars(loss_sum / num_targets)
        lr = learning_rate(self.config.optim, step, self.config.num_steps)
        self.optimizer.step(lr=lr, scalars=self.guard.decide(step=step, loss=loss, grad_norm=grad_norm))
        self.clock.mark("optimizer")
        return StepResult(step, loss, grad_norm, num_targets, lr)

    def count_targets(self, batch: Batch) -> Tensor:
        """The global batch's number of target tokens, which every loss is divided by, once; a scalar in the gradients' dtype."""
        return all_reduce(batch.loss_mask_SB.sum(dtype=self.grads.dtype), self.mesh.groups["dp"], what="number of targets")

    def accumulate_gradients(self, batch: Batch, num_targets: Tensor) -> Tensor:
        """Forward and backward of all microbatches: gradients into the buckets, the sum of this rank's token losses returned."""
        self.grads.zero()
        microbatches = batch.microbatches(self.config.train.micro_batch_size)
        return self.pipeline.run(
            self.train_steps(len(microbatches)),
            microbatches,
            loss_gradient=self.guard.loss_scale / num_targets,
            before_backward=self._before_backward,
            on_loss=self.guard.note_loss,
        )

    def _before_backward(self, chunk: int, is_last: bool) -> None:
        if is_last:
            self.grads.begin_last_backward(self.chunk_parameters[chunk])

    def join_scalars(self, local_loss: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, gradient norm) of the whole job from each rank's share, in one all-reduce of two numbers. The norm is without the
        loss scale."""
        counted = self.mesh.is_last_stage and self.mesh.index("tp") == 0
        square_sum = owned_square_sum(self.grads)
        both = torch.stack((local_loss.to(square_sum.dtype) * float(counted), square_sum))
        loss, total = all_reduce(both, self.mesh.groups["world"], what="loss and gradient norm").unbind()
        return loss, total.sqrt() / self.guard.loss_scale

    def evaluate(self, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
        """(sum of token losses, number of target tokens) over `batches`, summed over the job: device scalars."""
        self.optimizer.ensure_parameters()
        totals = torch.zeros(2, dtype=self.grads.dtype, device=self.mesh.device)
        for batch in batches:
            totals += evaluate_batch(self.pipeline, self.evaluation_steps, batch, self.config.train.micro_batch_size, self.mesh)
        loss_sum, num_targets = all_reduce(totals, self.mesh.groups["world"], what="held-out loss").unbind()
        return loss_sum, num_targets


def evaluate_batch(pipeline: PipelineRuntime, steps: list[Step], batch: Batch, micro_batch_size: int, mesh: Mesh) -> Tensor:
    """[sum of token losses, number of targets] of this rank's share: zeros but on tp rank 0 of the last stage."""
    loss_sum = pipeline.run(steps, batch.microbatches(micro_batch_size))
    counted = float(mesh.is_last_stage and mesh.index("tp") == 0)
    return torch.stack((loss_sum.double(), batch.loss_mask_SB.sum(dtype=torch.float64))) * counted
