"""More faults, of what stages send each other and of which microbatch does what: rows of the table in `faults.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from megatronish import assemble
from megatronish.comm import Group, all_reduce
from megatronish.comm.exchange import Parcel, PendingExchange, start_exchange
from megatronish.config import Config
from megatronish.parallel.mesh import Mesh
from megatronish.pipeline import runtime
from megatronish.pipeline.lower import Exchange, Step
from megatronish.pipeline.schedules import Forward
from megatronish.pipeline.stage import Stage
from megatronish.trainer import Trainer
from tests.parallel.parity import Case
from tests.preflight.faults import CUBE, Patch, is_at, only, planted_in, trainer_at

PIPELINE = Case(pp=4, dp=3, num_layers=4, num_microbatches=6, dtype="bfloat16")
"""Rank = 3 x pp + dp."""
TWO_STAGES = Case(pp=2, dp=3, num_layers=2, num_microbatches=3, dtype="bfloat16")
"""Rank = 3 x pp + dp."""
Exchanges = Callable[..., PendingExchange]


def exchanging(is_here: Callable[[Any], bool], instead: Exchanges) -> Patch:
    """Other exchanges in the forwards and backwards of some ranks."""

    def faulty(real: Any, self: Trainer, *args: Any) -> Any:
        with patch.object(runtime, "start_exchange", instead):
            return real(self, *args)

    return only(Trainer, "accumulate_gradients", is_here, faulty)


def stepping(is_here: Callable[[Any], bool], change: Callable[[list[Step]], list[Step]]) -> Patch:
    """Another list of steps on some ranks."""

    def faulty(real: Any, self: Trainer, *args: Any) -> Any:
        steps = self.train_steps
        with patch.object(self, "train_steps", lambda count: change(steps(count))):
            return real(self, *args)

    return only(Trainer, "accumulate_gradients", is_here, faulty)


def _one_microbatch_fewer(is_here: Callable[[Any], bool]) -> Patch:
    def faulty(real: Any, self: Trainer, batch: Any, num_targets: Tensor) -> Any:
        steps = self.train_steps
        with patch.object(self, "train_steps", lambda count: steps(count - 1)):
            return real(self, batch, num_targets)

    return only(Trainer, "accumulate_gradients", is_here, faulty)


@planted_in(PIPELINE, 4, says=("rank 4 [pp1 dp1 tp0]", "activation 3 of part 0", "(dry batch"), kind="left over")
def a_stage_of_one_replica_runs_a_microbatch_fewer() -> Patch:
    return _one_microbatch_fewer(trainer_at(pp=1, dp=1))


@planted_in(PIPELINE, *(3, 4, 5), says=("rank 3 [pp1 dp0 tp0]", "(dry batch", "and 2 more groups like it"), kind="left over")
def a_stage_runs_a_microbatch_fewer_on_every_replica() -> Patch:
    return _one_microbatch_fewer(trainer_at(pp=1))


def _apart(*, sends: Sequence[Parcel], receives: Sequence[Parcel], **named: Any) -> PendingExchange:
    if not sends or not receives:
        return start_exchange(sends=sends, receives=receives, **named)
    sent = start_exchange(sends=sends, receives=(), **named)
    return PendingExchange(sent.sends, start_exchange(sends=(), receives=receives, **named).receives)


@planted_in(
    TWO_STAGES, 4, says=("rank 4 [pp1 dp1 tp0] does send of", "are not mirror images", "megatronish/pipeline/"), kind="exchange"
)
def one_end_takes_a_batch_apart() -> Patch:
    return exchanging(trainer_at(pp=1, dp=1), _apart)


def _one_by_one(waits_between: bool) -> Exchanges:
    """As with plain isend and irecv, sends first."""

    def instead(
        *, sends: Sequence[Parcel], receives: Sequence[Parcel], peer_index: int, group: Group, device_kind: str, post: Any = None
    ) -> PendingExchange:
        def started(operation: str, parcel: Parcel) -> Any:
            number = group.note(operation, parcel.tensor, peer=peer_index, tag=parcel.tag, what=parcel.what)
            post = dist.isend if operation == "send" else dist.irecv
            return group.started(post(parcel.tensor, group.ranks[peer_index], group=group.handle, tag=parcel.tag), number)

        exchange = PendingExchange([(started("send", parcel), parcel.tensor) for parcel in sends], [])
        if waits_between and receives:
            exchange.wait_sent()
        exchange.receives = [started("receive", parcel) for parcel in receives]
        return exchange

    return instead


@planted_in(
    TWO_STAGES,
    *(0, 3),
    says=("rank 0 [pp0 dp0 tp0]", "rank 3 [pp1 dp0 tp0]", "waits for", "hangs under", "nccl", "ends under gloo"),
    kind="hang",
    also_on_cpu=False,
)
def both_ends_send_before_they_receive() -> Patch:
    return exchanging(lambda self: True, _one_by_one(waits_between=False))


@planted_in(
    TWO_STAGES,
    *(0, 3),
    says=("waits for rank 3 [pp1 dp0 tp0]", "hangs under one at a time, nccl, gloo"),
    kind="hang",
    also_on_cpu=True,
)
def the_host_waits_between_the_halves_of_an_exchange() -> Patch:
    return exchanging(lambda self: True, _one_by_one(waits_between=True))


def _changed(change: Callable[[list[Parcel], list[Parcel]], None]) -> Exchanges:
    def instead(*, sends: Sequence[Parcel], receives: Sequence[Parcel], **named: Any) -> PendingExchange:
        ours, theirs = list(sends), list(receives)
        change(ours, theirs)
        if not ours and not theirs:
            return PendingExchange([], [])
        return start_exchange(sends=ours, receives=theirs, **named)

    return instead


@planted_in(TWO_STAGES, 4, says=("rank 4 [pp1 dp1 tp0]", "activation 1 of part 0", "(dry batch exchange)"), kind="left over")
def a_receive_is_missing_on_one_rank() -> Patch:
    def change(sends: list[Parcel], receives: list[Parcel]) -> None:
        receives[:] = [parcel for parcel in receives if parcel.what != "activation 1 of part 0"]

    return exchanging(trainer_at(pp=1, dp=1), _changed(change))


def _one_more(sends: bool) -> Patch:
    def faulty(real: Any, self: Trainer, *args: Any) -> Any:
        total = real(self, *args)
        spec, pp = self.pipeline.activation, self.mesh.groups["pp"]
        parcel = Parcel(torch.empty(spec.shape, dtype=spec.dtype, device=spec.device), 0, "one too many")
        ours, theirs = ([parcel], []) if sends else ([], [parcel])
        start_exchange(sends=ours, receives=theirs, peer_index=1, group=pp, device_kind=self.mesh.device_kind)
        return total

    return only(Trainer, "accumulate_gradients", trainer_at(pp=0, dp=1), faulty)


@planted_in(TWO_STAGES, 1, says=("rank 1 [pp0 dp1 tp0] has receive of", "one too many", "nothing that meets it"), kind="left over")
def a_receive_is_left_over() -> Patch:
    return _one_more(sends=False)


@planted_in(TWO_STAGES, 1, says=("rank 1 [pp0 dp1 tp0] has send of", "one too many", "nothing that meets it"), kind="left over")
def a_send_is_left_over() -> Patch:
    return _one_more(sends=True)


@planted_in(PIPELINE, 4, says=("rank 4 [pp1 dp1 tp0]", "to place 3", "rank 10 [pp3 dp1 tp0]"), kind="left over")
def an_exchange_goes_to_the_wrong_peer() -> Patch:
    def instead(*, peer_index: int, **named: Any) -> PendingExchange:
        return start_exchange(peer_index=3 if peer_index == 2 else peer_index, **named)

    return exchanging(trainer_at(pp=1, dp=1), instead)


@planted_in(
    TWO_STAGES, 4, says=("rank 4 [pp1 dp1 tp0]", "send of 512 x bfloat16 on pp", "receive of 1,024 x bfloat16"), kind="exchange"
)
def one_rank_sends_half_of_a_gradient() -> Patch:
    def change(sends: list[Parcel], receives: list[Parcel]) -> None:
        sends[:] = [parcel._replace(tensor=parcel.tensor[: len(parcel.tensor) // 2]) for parcel in sends]

    return exchanging(trainer_at(pp=1, dp=1), _changed(change))


@planted_in(TWO_STAGES, 4, says=("rank 4 [pp1 dp1 tp0] does receive of", "x float32 on pp", "x bfloat16 on pp"), kind="exchange")
def one_rank_expects_activations_in_another_dtype() -> Patch:
    real = assemble.build_pipeline

    def faulty(config: Config, mesh: Mesh, model: Any) -> Any:
        pipeline = real(config, mesh, model)
        if is_at(mesh.groups, pp=1, dp=1):
            pipeline.activation = replace(pipeline.activation, dtype=torch.float32)
        return pipeline

    return assemble, "build_pipeline", faulty


@planted_in(
    replace(CUBE, num_layers=4, schedule=("interleaved", 2)),
    *(4, 5),
    says=("rank 4 [pp0 dp2 tp0]", "of part 0", "(dry batch exchange)"),
    kind="exchange",
)
def one_replica_of_a_stage_has_another_schedule() -> Patch:
    def change(steps: list[Step]) -> list[Step]:
        exchanges = [i for i, step in enumerate(steps) if isinstance(step, Exchange)]
        first, second = exchanges[:2]
        return [*steps[:first], *steps[first + 1 : second + 1], steps[first], *steps[second + 1 :]]

    return stepping(trainer_at(pp=0, dp=2), change)


@planted_in(CUBE, *(4, 5), says=("rank 4 [pp0 dp2 tp0]", "(evaluate"), kind="left over")
def one_replica_evaluates_fewer_microbatches() -> Patch:
    real = assemble.evaluation_steps

    def faulty(config: Config, mesh: Mesh) -> list[Step]:
        steps = real(config, mesh)
        return steps[:-2] if mesh.index("pp") == 0 and mesh.index("dp") == 2 else steps

    return assemble, "evaluation_steps", faulty


MANY = replace(CUBE, dp=1, tp=4, num_microbatches=8)
"""Rank = 4 x pp + tp."""


@planted_in(
    TWO_STAGES,
    4,
    says=("rank 4 [pp1 dp1 tp0] has one more: all_reduce (sum) of 1", "on pp, a call past megatronish/comm", "step 2)"),
)
def one_rank_calls_torch_distributed_itself_among_messages() -> Patch:
    def faulty(real: Any, self: Trainer, step: int) -> Any:
        if step == 2:
            dist.all_reduce(torch.zeros(1, device=self.mesh.device), group=self.mesh.groups["pp"].handle)
        return real(self, step)

    return only(Trainer, "train_step", trainer_at(pp=1, dp=1), faulty)


def _one_more_call(group: Group) -> None:
    all_reduce(torch.zeros(1, device="meta"), group, what="one more")


def _one_more_call_inside(microbatch: int) -> Patch:
    def faulty(real: Any, self: Stage, index: int, *args: Any, **named: Any) -> Any:
        group = self.loss_function.group  # type: ignore[attr-defined]
        if index == microbatch and self.stage == 0 and group.index == 2:
            _one_more_call(group)
        return real(self, index, *args, **named)

    return only(Stage, "forward", lambda self: True, faulty)


@planted_in(MANY, 2, says=("rank 2 [pp0 dp0 tp2] has one more: all_reduce (sum) of 1 x", "one more", "F4)"), microbatches="all")
def one_rank_has_one_more_call_in_a_middle_microbatch() -> Patch:
    """Inside the forward itself, in the steady phase: seen only where every microbatch runs."""
    return _one_more_call_inside(4)


@planted_in(MANY, 2, says=("rank 2 [pp0 dp0 tp2] has one more: all_reduce (sum) of 1 x", "one more", "(train step 1 B4)"))
def one_rank_has_one_more_call_around_a_middle_microbatch() -> Patch:
    """In what the trainer does for each microbatch, all of which runs in any case."""

    def faulty(real: Any, self: Trainer, chunk: int, is_last: bool) -> None:
        self.num_backwards = getattr(self, "num_backwards", 0) + 1  # type: ignore[attr-defined]
        if self.num_backwards == 2 + 5:  # the dry batch has two
            _one_more_call(self.mesh.groups["tp"])
        real(self, chunk, is_last)

    return only(Trainer, "_before_backward", trainer_at(pp=0, tp=2), faulty)


@planted_in(MANY, 2, says=("rank 2 [pp0 dp0 tp2] has one more: all_reduce (sum) of 1 x", "one more", "B7)"))
def one_rank_has_one_more_call_in_the_last_microbatch() -> Patch:
    def faulty(real: Any, self: Stage, index: int, *args: Any, **named: Any) -> Any:
        group = self.loss_function.group  # type: ignore[attr-defined]
        if index == 7 and self.stage == 0 and group.index == 2:
            _one_more_call(group)
        return real(self, index, *args, **named)

    return only(Stage, "backward", lambda self: True, faulty)


@planted_in(MANY, *(0, 1, 2, 3, 4, 5, 6, 7), says=("activation",), kind="left over")
def a_forward_is_executed_twice_and_sent_twice() -> Patch:
    def change(steps: list[Step]) -> list[Step]:
        where = next(i for i, step in enumerate(steps) if isinstance(step, Forward) and step.microbatch == 1)
        following = next(i for i, step in enumerate(steps) if i > where and isinstance(step, Exchange))
        return [*steps[: following + 1], *steps[where : following + 1], *steps[following + 1 :]]

    return stepping(trainer_at(pp=0), change)
