"""Rows of the table in `faults.py`: faults in collectives, and in what several ranks must do alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from megatronish import after_step, assemble, startup, train, trainer
from megatronish.comm import Group, Pending, all_reduce, barrier
from megatronish.comm.collectives import start_all_reduce
from megatronish.config import Config
from megatronish.optim import grad_buffer
from megatronish.optim.grad_buffer import GradBuffer
from megatronish.optim.zero import ZeroAdamW
from megatronish.parallel import loss, mesh
from megatronish.parallel.mesh import Mesh
from megatronish.trainer import Trainer
from tests.parallel.parity import Case
from tests.preflight.faults import CUBE, Patch, is_at, only, planted_in, trainer_at

DATA = Case(dp=8, num_layers=2, num_microbatches=1, dtype="bfloat16")
TENSOR = Case(tp=4, dp=2, num_layers=2, num_microbatches=1, dtype="bfloat16")
TIED = Case(pp=2, dp=3, num_layers=2, num_microbatches=2, dtype="bfloat16", tie_embeddings=True)


def _unsummed_norm(real: Any, self: Trainer, local_loss: Tensor) -> Any:
    with patch.object(trainer, "all_reduce", lambda x, *_, **__: x):
        return real(self, local_loss)


@planted_in(
    DATA,
    5,
    says=(
        "rank 5 [pp0 dp5 tp0] skips all_reduce (sum) of 2 x float32 on world, loss and gradient norm at megatronish/trainer.py:",
        "join_scalars (dry batch), which rank 0 [pp0 dp0 tp0], ranks 1, 2 and 4 more do",
        "does all_gather of 1 x int64 on world, finite parameters at megatronish/startup.py:",
    ),
)
def the_norm_is_not_summed_on_one_inner_data_rank() -> Patch:
    return only(Trainer, "join_scalars", trainer_at(dp=5), _unsummed_norm)


@planted_in(TENSOR, 2, 6, says=("rank 2 [pp0 dp0 tp2] and rank 6 [pp0 dp1 tp2] skip", "loss and gradient norm", "(dry batch)"))
def the_norm_is_summed_only_if_the_tensor_rank_is_not_two() -> Patch:
    return only(Trainer, "join_scalars", trainer_at(tp=2), _unsummed_norm)


@planted_in(DATA, 6, says=("rank 6 [pp0 dp6 tp0] has one more: barrier on world", "where rank 0 [pp0 dp0 tp0]"))
def a_barrier_stands_in_a_branch_of_one_rank() -> Patch:
    """Found by the number of the rank itself."""

    def instead(real: Any, self: Trainer, batch: Any) -> Any:
        barrier(self.mesh.groups["world"])
        return real(self, batch)

    return only(Trainer, "count_targets", lambda self: self.mesh.rank == 6, instead)


@planted_in(
    DATA, 5, says=("rank 5 [pp0 dp5 tp0] does all_reduce (max) of 2", "do all_reduce (sum) of 2 x float32 on world, loss and")
)
def the_norm_is_a_maximum_on_one_rank() -> Patch:
    def instead(real: Any, self: Trainer, local_loss: Tensor) -> Any:
        with patch.object(trainer, "all_reduce", lambda x, group, **named: all_reduce(x, group, "max", **named)):
            return real(self, local_loss)

    return only(Trainer, "join_scalars", trainer_at(dp=5), instead)


@planted_in(DATA, 5, says=("rank 5 [pp0 dp5 tp0] does all_reduce (sum) of 3 x float32", "all_reduce (sum) of 2 x float32 on world"))
def one_rank_sums_three_numbers_where_others_sum_two() -> Patch:
    def more(x: Tensor, group: Group, **named: Any) -> Tensor:
        return all_reduce(torch.cat((x, x[:1])), group, **named)[:2]

    def instead(real: Any, self: Trainer, local_loss: Tensor) -> Any:
        with patch.object(trainer, "all_reduce", more):
            return real(self, local_loss)

    return only(Trainer, "join_scalars", trainer_at(dp=5), instead)


@planted_in(
    DATA, 5, says=("rank 5 [pp0 dp5 tp0] does reduce_scatter (sum)", "x bfloat16 on dp, gradients of bucket", "x float32 on dp")
)
def one_rank_reduces_gradients_in_another_dtype() -> Patch:
    make = assemble.make_grad_buffer

    def faulty(*args: Any, groups: Mapping[str, Group], reduce_dtype: Any, **named: Any) -> GradBuffer:
        dtype = torch.bfloat16 if is_at(groups, dp=5) else reduce_dtype
        return make(*args, groups=groups, reduce_dtype=dtype, **named)

    return assemble, "make_grad_buffer", faulty


@planted_in(CUBE, 5, says=("rank 5 [pp0 dp2 tp1] has one more: all_reduce (sum) of 1 x float32 on world, number of targets",))
def one_rank_counts_targets_over_the_wrong_group() -> Patch:
    def instead(real: Any, self: Trainer, batch: Any) -> Any:
        groups = {**self.mesh.groups, "dp": self.mesh.groups["world"]}
        with patch.object(self, "mesh", replace(self.mesh, groups=groups)):
            return real(self, batch)

    return only(Trainer, "count_targets", lambda self: self.mesh.rank == 5, instead)


@planted_in(TENSOR, 6, says=("rank 6 [pp0 dp1 tp2] has one more: all_reduce (sum) of", "on tp, gradients of bucket"))
def one_rank_reduces_gradients_over_the_wrong_axis() -> Patch:
    def instead(real: Any, self: GradBuffer, index: int) -> Any:
        all_reduce(self.flat[index], self.groups["tp"], what=f"gradients of bucket {index}")
        return Pending(self.flat[index])

    return only(GradBuffer, "_start_reduction", lambda self: is_at(self.groups, dp=1, tp=2), instead)


def _gathering(order: Callable[[int], list[int]]) -> Callable[..., None]:
    """`ZeroAdamW.start_gathering` over the buckets of `order(number of buckets)`."""

    def instead(real: Any, self: ZeroAdamW, *_: Any) -> None:
        count = len(self.parameters.buckets)
        with patch("megatronish.optim.zero.reversed", lambda indices: order(count), create=True):
            real(self)

    return instead


@planted_in(
    DATA,
    2,
    says=("rank 2 [pp0 dp2 tp0] skips all_gather of", "parameters of bucket", "megatronish/optim/zero.py:", "(train step 1)"),
)
def one_rank_gathers_buckets_in_the_order_of_backward() -> Patch:
    return only(ZeroAdamW, "start_gathering", lambda self: self.dp.index == 2, _gathering(lambda count: list(range(count))))


@planted_in(
    # Four layers that are alike: buckets 1, 2 and 3 have one size, and what is gathered for one would be taken for another.
    Case(dp=8, num_layers=4, num_microbatches=2, dtype="float32", bucket_mib=0.02),
    2,
    says=("rank 2 [pp0 dp2 tp0]", "all_gather of", "parameters of bucket layers", "megatronish/optim/zero.py:"),
)
def one_rank_gathers_two_buckets_of_one_size_in_the_other_order() -> Patch:
    def swapped(count: int) -> list[int]:
        order = list(reversed(range(count)))
        at = order.index(2)
        order[at], order[at - 1] = order[at - 1], order[at]
        return order

    return only(ZeroAdamW, "start_gathering", lambda self: self.dp.index == 2, _gathering(swapped))


@planted_in(DATA, *(0, 1, 4, 5), says=("all_gather of", "parameters of bucket"))
def the_order_of_buckets_depends_on_the_rank() -> Patch:
    """To spread the load, as it were: each begins with another bucket. Of the four orders, each of two ranks, none is odd."""

    def instead(real: Any, self: ZeroAdamW) -> None:
        def order(count: int) -> list[int]:
            return [(index + self.dp.index) % count for index in range(count)]

        _gathering(order)(real, self)

    return only(ZeroAdamW, "start_gathering", lambda self: True, instead)


@planted_in(DATA, 3, says=("rank 3 [pp0 dp3 tp0] skips all_gather of", "on dp, parameters of bucket", "megatronish/optim/zero.py:"))
def one_bucket_is_not_gathered_on_one_rank() -> Patch:
    instead = _gathering(lambda count: [index for index in reversed(range(count)) if index != 2])
    return only(ZeroAdamW, "start_gathering", lambda self: self.dp.index == 3, instead)


@planted_in(DATA, 0, says=("rank 0 [pp0 dp0 tp0] has one more: all_reduce (sum) of 2", "held-out loss", "(evaluate)"))
def evaluation_is_entered_by_one_data_rank_only() -> Patch:
    return only(after_step.AfterStep, "evaluate", lambda self: self.run.mesh.index("dp") > 0, lambda *_: None)


@planted_in(CUBE, 11, says=("rank 11 [pp1 dp1 tp1] skips all_gather", "(save step 2)"))
def a_save_is_entered_by_all_ranks_but_one() -> Patch:
    return only(after_step.AfterStep, "save", lambda self: self.run.mesh.rank == 11, lambda *_: None)


@planted_in(TIED, *range(6), says=("rank 3 [pp1 dp0 tp0]", "all_reduce (sum) of", "on ends, gradients of bucket", "2 more groups"))
def the_tied_embedding_is_not_summed_on_the_last_stage() -> Patch:
    """Of two that disagree, everywhere alike, none is odd."""
    real = grad_buffer.all_reduce

    def faulty(x: Tensor, group: Group, **named: Any) -> Tensor:
        return x if group.axis == "ends" and group.index == 1 else real(x, group, **named)

    return grad_buffer, "all_reduce", faulty


@planted_in(TIED, 4, says=("rank 4 [pp1 dp1 tp0] skips all_reduce (sum) of", "on ends", "bucket", "(dry batch)"), also_on_cpu=True)
def the_tied_embedding_is_not_summed_on_the_last_stage_of_one_replica() -> Patch:
    def instead(real: Any, self: GradBuffer, index: int) -> Any:
        with patch.object(grad_buffer, "all_reduce", lambda x, group, **_: x):
            return real(self, index)

    return only(GradBuffer, "_start_reduction", lambda self: is_at(self.groups, pp=1, dp=1), instead)


@planted_in(TENSOR, 2, 6, says=("rank 2 [pp0 dp0 tp2]", "has one more: all_reduce", "on tp, layers.", "(dry batch B0)"))
def one_tensor_rank_recomputes() -> Patch:
    real = assemble.apply_recompute

    def faulty(config: Config, mesh: Mesh, model: Any) -> None:
        full = config.model_copy(update={"parallel": config.parallel.model_copy(update={"recompute": "full"})})
        real(full if mesh.index("tp") == 2 else config, mesh, model)

    return assemble, "apply_recompute", faulty


@planted_in(
    replace(TENSOR, sequence=True),
    *(1, 5),
    says=("rank 1 [pp0 dp0 tp1] does all_reduce (sum)", "do reduce_scatter (sum) of", "on tp, embedding at megatronish/parallel/"),
)
def one_tensor_rank_is_not_sequence_parallel() -> Patch:
    real = assemble.TensorParallel

    def faulty(*, group: Group, sequence_parallel: bool, **named: Any) -> Any:
        return real(group=group, sequence_parallel=sequence_parallel and group.index != 1, **named)

    return assemble, "TensorParallel", faulty


@planted_in(TENSOR, 2, 6, says=("rank 2 [pp0 dp0 tp2]", "skips all_gather of", "parts of the loss", "(dry batch F0)"))
def a_tensor_rank_without_valid_rows_leaves_the_loss_out() -> Patch:
    real = loss.all_gather

    def faulty(x: Tensor, group: Group, **named: Any) -> Tensor:
        return torch.cat([x] * group.size) if group.index == 2 else real(x, group, **named)

    return loss, "all_gather", faulty


@planted_in(DATA, 5, says=("rank 5 [pp0 dp5 tp0] skips", "(dry batch)"))
def the_dry_batch_is_skipped_on_one_rank() -> Patch:
    return only(train, "dry_batch", lambda run: is_at(run.mesh.groups, dp=5), lambda *_: 1.0)


@planted_in(
    DATA, 5, says=("rank 5 [pp0 dp5 tp0] has one more: all_reduce (sum) of 1 x float32 on dp, a call past megatronish/comm",)
)
def one_rank_calls_torch_distributed_itself() -> Patch:
    def instead(real: Any, self: Trainer, batch: Any) -> Any:
        dist.all_reduce(torch.zeros(1, device=self.mesh.device), group=self.mesh.groups["dp"].handle)
        return real(self, batch)

    return only(Trainer, "count_targets", trainer_at(dp=5), instead)


@planted_in(DATA, 5, says=("rank 5 [pp0 dp5 tp0] skips all_reduce (sum) of 1", "on dp, first call", "(connect)"))
def the_first_call_of_a_communicator_is_skipped() -> Patch:
    real = mesh.all_reduce

    def faulty(x: Tensor, group: Group, **named: Any) -> Tensor:
        return x if group.axis == "dp" and group.index == 5 else real(x, group, **named)

    return mesh, "all_reduce", faulty


def _other_members(members: tuple[int, ...]) -> Patch:
    """Of the data group of rank 5, which takes it for the right one."""
    real = mesh.new_group

    def faulty(axis: str, ranks: tuple[int, ...], rank: int, **named: Any) -> Group:
        group = real(axis, members if axis == "dp" and rank == 5 else ranks, rank, **named)
        return replace(group, ranks=ranks, index=ranks.index(rank))

    return mesh, "new_group", faulty


@planted_in(DATA, 5, says=("rank 5 [pp0 dp5 tp0] is not in dp of ranks 0, 1", "of rank 5 is ranks 5, 0"), kind="members")
def one_rank_has_another_order_in_a_group() -> Patch:
    return _other_members((5, 0, 1, 2, 3, 4, 6, 7))


@planted_in(CUBE, 5, says=("rank 5 [pp0 dp2 tp1] is not in dp of ranks 1, 3, 5, 7", "is ranks 4, 5, 6, 7"), kind="members")
def one_rank_makes_a_group_of_the_wrong_ranks() -> Patch:
    return _other_members((4, 5, 6, 7))


@planted_in(DATA, 5, says=("rank 5 [pp0 dp5 tp0] skips all_reduce (sum) of 2", "loss and gradient norm", "(train step 2), which"))
def the_norm_is_not_summed_in_the_second_step_of_one_rank() -> Patch:
    def instead(real: Any, self: Trainer, step: int) -> Any:
        if step < 2:
            return real(self, step)
        with patch.object(self, "join_scalars", partial(_unsummed_norm, Trainer.join_scalars, self)):
            return real(self, step)

    return only(Trainer, "train_step", trainer_at(dp=5), instead)


@planted_in(DATA, 5, says=("rank 5 [pp0 dp5 tp0] does all_gather of 1 x int64", "before all_reduce (sum) of 2", "(dry batch)"))
def two_calls_are_swapped_on_one_rank() -> Patch:
    """Of one group: the norm, and whether parameters are finite."""

    def instead(real: Any, run: Any, step: int) -> Any:
        require, join = startup._require_finite_parameters, run.trainer.join_scalars

        def swapped(local_loss: Tensor) -> Any:
            require(run)
            return join(local_loss)

        with (
            patch.object(startup, "_require_finite_parameters", lambda run: None),
            patch.object(run.trainer, "join_scalars", swapped),
        ):
            return real(run, step)

    return only(train, "dry_batch", lambda run: is_at(run.mesh.groups, dp=5), instead)


@planted_in(
    replace(DATA, tie_embeddings=True),
    5,
    says=("rank 5 [pp0 dp5 tp0]", "loss and gradient norm", "gradients of bucket", "waits for"),
    kind="hang",
)
def two_groups_are_used_in_another_order_on_one_rank() -> Patch:
    """The norm of all before the last bucket's sum over data ranks: each group agrees with itself."""

    def instead(real: Any, self: Trainer, step: int) -> Any:
        finish, join = self.grads.finish, self.join_scalars

        def join_then_finish(local_loss: Tensor) -> Any:
            result = join(local_loss)
            finish()
            return result

        with patch.object(self.grads, "finish", lambda: None), patch.object(self, "join_scalars", join_then_finish):
            return real(self, step)

    return only(Trainer, "train_step", trainer_at(dp=5), instead)


@planted_in(
    replace(TENSOR, bucket_mib=1e-5),
    2,
    says=("rank 2 [pp0 dp0 tp2]", "gradients of bucket", "NCCL asks that calls on several communicators"),
    kind="order",
    also_on_cpu=False,
)
def one_rank_reduces_its_buckets_late() -> Patch:
    """After the backward instead of within it: calls of two groups pass each other, which NCCL does not promise to stand."""
    return only(GradBuffer, "begin_last_backward", lambda self: is_at(self.groups, dp=0, tp=2), lambda *_: None)


@planted_in(
    replace(CUBE, zero_stage=0),
    12,
    says=("rank 12 [pp1 dp2 tp0] does all_reduce (sum) of", "on dp, gradients of bucket", "(dry batch"),
)
def one_replica_reduces_each_bucket_in_two_halves() -> Patch:
    def halves(x: Tensor, group: Group, **named: Any) -> Pending:
        parts = [start_all_reduce(part, group, **named) for part in x.chunk(2)]
        return Pending(x, finish=lambda: [part.wait() for part in parts] and None)

    def instead(real: Any, self: GradBuffer, index: int) -> Any:
        with patch.object(grad_buffer, "start_all_reduce", halves):
            return real(self, index)

    return only(GradBuffer, "_start_reduction", lambda self: is_at(self.groups, pp=1, dp=2), instead)


def one_replica_cuts_other_buckets() -> Patch:
    """Not in the table: the rehearsal itself fails, as a rank saves what it should not hold."""
    real = assemble.cut_model

    def faulty(config: Config, mesh: Mesh) -> Any:
        smaller = config.model_copy(update={"optim": config.optim.model_copy(update={"bucket_mib": 1e-5})})
        return real(smaller if is_at(mesh.groups, dp=5) else config, mesh)

    return assemble, "cut_model", faulty


@planted_in(
    replace(DATA, zero_stage=2, num_microbatches=3),
    5,
    says=("rank 5 [pp0 dp5 tp0] has one more: reduce_scatter", "gradients of bucket", "dry batch"),
)
def one_rank_runs_a_microbatch_twice() -> Patch:
    """Under ZeRO 2 gradients travel once a microbatch."""

    def instead(real: Any, self: Trainer, batch: Any, num_targets: Tensor) -> Any:
        def twice(size: int) -> list[Any]:
            parts = type(batch).microbatches(batch, size)
            return [*parts, parts[-1]]

        object.__setattr__(batch, "microbatches", twice)
        return real(self, batch, num_targets)

    return only(Trainer, "accumulate_gradients", trainer_at(dp=5), instead)
