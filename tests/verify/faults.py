"""Faults that trainers of this kind have had, planted one at a time: each changes gradients or weights in some layouts only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from megatronish import assemble, checkpointing, trainer
from megatronish.batch import Batch
from megatronish.comm import Pending
from megatronish.config import Config
from megatronish.optim.grad_buffer import GradBuffer
from megatronish.optim.weight_gradients import WeightGradientQueue
from megatronish.optim.zero import ZeroAdamW
from megatronish.parallel import tensor
from megatronish.pipeline.runtime import PipelineRuntime
from megatronish.verify.layout_run import RankResult, run_layout

Patch = tuple[Any, str, Any]


def norms_are_not_summed_over_tp() -> Patch:
    """Under sequence parallelism a norm's weight sees S/tp tokens."""
    make = assemble.make_param_layout

    def faulty(*args: Any, sequence_parallel: bool, **kwargs: Any) -> Any:
        return make(*args, sequence_parallel=False, **kwargs)

    return assemble, "make_param_layout", faulty


def each_replica_divides_by_its_own_targets() -> Patch:
    """The mean of means: wrong by a few percent where replicas have unequal numbers of targets."""

    def faulty(self: trainer.Trainer, batch: Batch) -> Tensor:
        return batch.loss_mask_SB.sum(dtype=torch.float64) * self.mesh.size("dp")

    return trainer.Trainer, "count_targets", faulty


def replicated_parameters_count_once_a_rank() -> Patch:
    """The norm, and with it the clip factor."""

    def faulty(grads: GradBuffer) -> Tensor:
        return torch.stack([grads.owned(index).square().sum() for index in range(len(grads.buckets))]).sum()

    return trainer, "owned_square_sum", faulty


def gradients_of_the_last_step_stay() -> Patch:
    return GradBuffer, "zero", lambda self: None


def the_input_gradient_is_not_summed_over_tp() -> Patch:
    """Of column-parallel linears."""
    start_sum, start_gather = tensor.TensorParallel.start_sum, tensor.TensorParallel.start_gather

    class Faulty(tensor.TensorParallel):
        def start_sum(self, x: Tensor) -> Pending:
            in_backward = torch._C._current_graph_task_id() != -1
            return Pending(x) if in_backward and not self.sequence_parallel else start_sum(self, x)

        def start_gather(self, x: Tensor) -> Pending:
            return start_gather(self, x)

    return assemble, "TensorParallel", Faulty


def rows_of_other_ranks_count_here() -> Patch:
    """A token of another rank's rows adds its gradient to the first row of this one's."""
    rows = WeightGradientQueue.rows

    def faulty(self: WeightGradientQueue, weight: Any, dy: Tensor, numbers: Tensor) -> None:
        rows(self, weight, dy, numbers.clamp(0, weight.shape[0] - 1))

    return WeightGradientQueue, "rows", faulty


def the_last_microbatch_counts_twice() -> Patch:
    """On stages before the last, whose gradient arrives by message."""
    run = PipelineRuntime.run

    def faulty(self: PipelineRuntime, *args: Any, **kwargs: Any) -> Tensor:
        backward, seen = self.stage.backward, []

        def twice(*where: Any, **named: Any) -> Any:
            seen.append(where)
            last = len(seen) == 3 and self.group.index < self.group.size - 1
            gradient = where[-1] * 2 if last else where[-1]
            return backward(*where[:-1], gradient, **named)

        with patch.object(self.stage, "backward", twice):
            return run(self, *args, **kwargs)

    return PipelineRuntime, "run", faulty


def gathered_parameters_are_one_step_old() -> Patch:
    """ZeRO updates its slice and forgets to give it to the other replicas."""
    return ZeroAdamW, "start_gathering", lambda self: None


def decay_reaches_every_parameter() -> Patch:
    """Norm weights decay too."""
    plan = assemble.plan_buckets

    def faulty(*args: Any, **kwargs: Any) -> Any:
        buckets = plan(*args, **kwargs)
        for bucket in buckets:
            object.__setattr__(bucket, "weight_decay", True)
        return buckets

    return assemble, "plan_buckets", faulty


def a_tied_embedding_is_reduced_at_its_first_gradient() -> Patch:
    """On one stage the projection's gradient comes long before the lookup's."""
    plan = assemble.plan_buckets

    def faulty(*args: Any, **kwargs: Any) -> Any:
        return [replace(bucket, tied=False) for bucket in plan(*args, **kwargs)]

    return assemble, "plan_buckets", faulty


def row_biases_and_positions_see_a_part_of_the_tokens() -> Patch:
    """Under sequence parallelism their gradients are owed a sum over tp."""
    make = assemble.make_param_layout

    def faulty(*args: Any, **kwargs: Any) -> Any:
        layout = make(*args, **kwargs)
        placements = {name: p if "norm" in name else replace(p, sum_gradient_over=()) for name, p in layout.placements.items()}
        return replace(layout, placements=placements)

    return assemble, "make_param_layout", faulty


def moments_are_not_loaded() -> Patch:
    """A resumed run goes on with the right weights and empty moments."""
    load = checkpointing.load_newest

    def faulty(run: Any, *args: Any, **kwargs: Any) -> Any:
        state = load(run, *args, **kwargs)
        for states in run.optimizer.states:
            states["exp_avg"].zero_()
        return state

    return checkpointing, "load_newest", faulty


def dropout_depends_on_the_rank() -> Patch:
    """As a generator that each rank seeds for itself would."""
    place = assemble.place_dropout

    def faulty(model: Any, *, seed: int, tp_index: int, **kwargs: Any) -> None:
        place(model, seed=seed + tp_index, tp_index=tp_index, **kwargs)

    return assemble, "place_dropout", faulty


def dropout_is_the_same_in_every_microbatch() -> Patch:
    """The key forgets which sample it is: every microbatch drops the same elements."""
    microbatches = Batch.microbatches

    def faulty(self: Batch, micro_batch_size: int) -> list[Batch]:
        parts = microbatches(self, micro_batch_size)
        return [replace(part, sample_numbers_B=parts[0].sample_numbers_B) for part in parts]

    return Batch, "microbatches", faulty


def tied_embeddings_are_not_summed() -> Patch:
    """Each end of the pipeline updates its copy by its own gradient."""
    make = assemble.make_param_layout

    def faulty(*args: Any, **kwargs: Any) -> Any:
        layout = make(*args, **kwargs)
        placements = {
            name: replace(p, sum_gradient_over=tuple(axis for axis in p.sum_gradient_over if axis != "ends"))
            for name, p in layout.placements.items()
        }
        return replace(layout, placements=placements)

    return assemble, "make_param_layout", faulty


def a_bias_is_added_on_every_tp_rank() -> Patch:
    """That of a row-parallel linear, before the sum over tp instead of after it."""
    row_forward = tensor.RowParallelLinear.forward

    def faulty(self: tensor.RowParallelLinear, x: Tensor) -> Tensor:
        assert self.bias is not None
        out: Tensor = row_forward(self, x)
        return out + (self.tp.group.size - 1) * self.bias

    return tensor.RowParallelLinear, "forward", faulty


def the_last_backward_of_one_chunk_is_that_of_all() -> Patch:
    """Buckets of other chunks are reduced before their gradients are final."""

    def faulty(self: trainer.Trainer, chunk: int, is_last: bool) -> None:
        if is_last:
            self.grads.begin_last_backward()

    return trainer.Trainer, "_before_backward", faulty


def gradients_are_rounded_on_their_way() -> Patch:
    """To bfloat16, though nobody asked for it."""
    make = assemble.make_grad_buffer

    def faulty(*args: Any, reduce_dtype: Any = None, **kwargs: Any) -> Any:
        return make(*args, reduce_dtype=torch.bfloat16, **kwargs)

    return assemble, "make_grad_buffer", faulty


FAULTS: dict[str, Callable[[], Patch]] = {
    fault.__name__: fault
    for fault in (
        norms_are_not_summed_over_tp,
        each_replica_divides_by_its_own_targets,
        replicated_parameters_count_once_a_rank,
        gradients_of_the_last_step_stay,
        the_input_gradient_is_not_summed_over_tp,
        rows_of_other_ranks_count_here,
        the_last_microbatch_counts_twice,
        gathered_parameters_are_one_step_old,
        decay_reaches_every_parameter,
        moments_are_not_loaded,
        gradients_are_rounded_on_their_way,
        dropout_depends_on_the_rank,
        tied_embeddings_are_not_summed,
        a_bias_is_added_on_every_tp_rank,
        dropout_is_the_same_in_every_microbatch,
        a_tied_embedding_is_reduced_at_its_first_gradient,
        row_biases_and_positions_see_a_part_of_the_tokens,
        the_last_backward_of_one_chunk_is_that_of_all,
    )
}


@contextmanager
def planted(fault: str) -> Iterator[None]:
    """The fault, in this process."""
    with patch.object(*FAULTS[fault]()):
        yield


def run_with_fault(rank: int, config: Config, checkpoints: Path | None = None, *, fault: str) -> RankResult:
    """`run_layout` with the fault on this rank."""
    with planted(fault):
        return run_layout(rank, config, checkpoints)
