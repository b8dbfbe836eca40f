"""The loss scale moves as torch's, refused steps leave no trace, and a run that goes nowhere stops."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatronish.comm.groups import single_process_group
from megatronish.config import TrainConfig
from megatronish.layout import ParamPlacement
from megatronish.optim.buckets import plan_buckets
from megatronish.optim.grad_buffer import GradBuffer
from megatronish.optim.step_guard import (
    KEPT_RECORDS,
    MOST_BAD_IN_A_ROW,
    MOST_LOSS_SCALE,
    GuardState,
    LocalRecord,
    StepGuard,
    records_of,
)

NAMES = ("first", "second", "third")


def make_guard(clip_norm: float = 1.0, **train: Any) -> StepGuard:
    table = {name: ParamPlacement((4, 4), torch.float32, None, (0,), 0) for name in NAMES}
    buckets = plan_buckets(table, tp_rank=0, tp_size=1, dp_size=1, bucket_elements=1)
    parameters = {name: nn.Parameter(torch.zeros(4, 4)) for name in NAMES}
    groups = {"dp": single_process_group("dp"), "tp": single_process_group("tp")}
    cpu = torch.device("cpu")
    grads = GradBuffer(buckets, parameters, groups=groups, zero_stage=1, dtype=torch.float32, device=cpu)
    config = TrainConfig(steps=10, global_batch_size=1, micro_batch_size=1, **train)
    return StepGuard(config, grads, clip_norm=clip_norm, backward_order=NAMES[::-1])


def decide(guard: StepGuard, step: int, norm: float = 0.5, loss: float = 2.0) -> list[float]:
    scalars: Tensor = guard.decide(step=step, loss=torch.tensor(loss), grad_norm=torch.tensor(norm))
    return scalars.tolist()


@pytest.mark.parametrize("seed", range(4))
def test_the_loss_scale_moves_as_torchs_grad_scaler(seed: int) -> None:
    interval = 3
    guard = make_guard(dtype="float16", loss_scale=1024.0, loss_scale_interval=interval, on_not_finite="skip")
    scale, tracker = torch.tensor(1024.0), torch.tensor(0, dtype=torch.int32)
    chance = random.Random(seed)
    updates = 0
    for step in range(1, 60):
        bad = chance.random() < 0.3
        factor, number = decide(guard, step, norm=chance.choice([math.inf, math.nan]) if bad else 4.0)
        updates += not bad
        assert number == updates and (math.isnan(factor) if bad else factor == pytest.approx(0.25 / float(scale)))
        torch._amp_update_scale_(scale, tracker, torch.tensor(float(bad)), 2.0, 0.5, interval)
        state = guard.read()
        assert (state.loss_scale, state.good_steps, state.updates) == (float(scale), int(tracker), updates)
        assert state.skipped == step - updates


def test_the_loss_scale_has_a_limit() -> None:
    guard = make_guard(dtype="float16", loss_scale=MOST_LOSS_SCALE / 2, loss_scale_interval=1)
    for step in range(1, 5):
        decide(guard, step)
    assert guard.read().loss_scale == MOST_LOSS_SCALE


@pytest.mark.parametrize(("norm", "loss"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_stop_refuses_the_bad_step_and_all_that_follow(norm: float, loss: float, clip_norm: float) -> None:
    guard = make_guard(clip_norm)
    assert decide(guard, 1) == [1.0, 1.0]
    factor, number = decide(guard, 2, norm, loss)
    assert math.isnan(factor) and number == 1
    stopped = guard.read()
    assert stopped == GuardState(1.0, 1, 1, 1, 1, 2) or stopped == GuardState(1.0, 0, 1, 1, 1, 2)
    factor, _ = decide(guard, 3)
    assert math.isnan(factor) and guard.read() == stopped, "nothing moves any more"


def test_in_float16_only_a_loss_that_is_not_finite_stops_at_once() -> None:
    guard = make_guard(dtype="float16")
    decide(guard, 1, math.inf)
    assert guard.read().stopped_at == 0
    decide(guard, 2, math.inf, math.nan)
    assert guard.read().stopped_at == 2


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_twenty_bad_steps_in_a_row_stop_any_run(dtype: str) -> None:
    guard = make_guard(dtype=dtype, on_not_finite="skip")
    for step in range(1, MOST_BAD_IN_A_ROW):
        decide(guard, step, math.nan)
    decide(guard, MOST_BAD_IN_A_ROW)  # a good one
    for step in range(1, MOST_BAD_IN_A_ROW + 1):
        assert guard.read().stopped_at == 0
        decide(guard, 100 + step, math.nan)
    state = guard.read()
    assert (state.stopped_at, state.skipped) == (100 + MOST_BAD_IN_A_ROW, 2 * MOST_BAD_IN_A_ROW - 1)


def test_a_record_names_the_first_loss_and_the_first_parameter_of_backward() -> None:
    guard = make_guard(on_not_finite="skip")
    largest = dict(zip(guard.grads.names, guard.grads.local_max, strict=True))
    guard.note_loss(0, torch.tensor(1.0))
    decide(guard, 1)
    largest["first"].fill_(math.nan)
    decide(guard, 2, math.nan)
    largest["second"].fill_(math.inf)
    for microbatch, loss in enumerate([1.0, math.nan, math.inf]):
        guard.note_loss(microbatch, torch.tensor(loss))
    decide(guard, 5, math.nan, math.nan)
    expected = [LocalRecord(2, None, NAMES[::-1].index("first")), LocalRecord(5, 1, NAMES[::-1].index("second"))]
    assert records_of(guard.records.flatten().tolist()) == expected
    guard.forget_records()
    assert records_of(guard.records.flatten().tolist()) == []
    for step in range(10, 12 + KEPT_RECORDS):
        decide(guard, step, math.nan)
        decide(guard, step + 100)
    steps = [record.step for record in records_of(guard.records.flatten().tolist())]
    assert steps == list(range(10, 10 + KEPT_RECORDS)), "the first of an interval, not the last"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_a_checkpoint_keeps_brings_back_the_state(dtype: str) -> None:
    guard = make_guard(dtype=dtype, on_not_finite="skip", loss_scale=512.0)
    for step, norm in enumerate([1.0, math.nan, 1.0, math.nan, 1.0, 1.0], start=1):
        decide(guard, step, norm)
    state = guard.read()
    other = make_guard(dtype=dtype, on_not_finite="skip")
    other.restore(guard.saved(state), step=6)
    assert other.read() == state and other.reported_skips == 2
    assert decide(other, 7) == decide(guard, 7)
    # Of another precision, and from a checkpoint that knows nothing of it: the config's scale.
    changed = make_guard(dtype="float16" if dtype == "float32" else "float32", on_not_finite="skip", loss_scale=64.0)
    changed.restore(guard.saved(state), step=6)
    assert changed.read().loss_scale == (64.0 if dtype == "float32" else 1.0)
    other.restore(None, step=6)
    assert other.read() == GuardState(other.first_scale, updates=6)
