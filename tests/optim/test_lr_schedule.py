"""The learning rate at the steps that have a name, for every shape."""

from __future__ import annotations

import math
from typing import Any

import pytest

from megatronish.config import OptimConfig
from megatronish.optim.lr_schedule import learning_rate

STEPS = 100


def rates(**fields: Any) -> list[float]:
    """rates[step] for steps 1 .. STEPS; rates[0] is not a step."""
    config = OptimConfig(lr=1.0, min_lr=0.1, **fields)
    return [math.nan, *(learning_rate(config, step, STEPS) for step in range(1, STEPS + 1))]


@pytest.mark.parametrize(
    ("schedule", "decay_steps", "points"),
    [
        ("cosine", None, {11: 1 - 0.45 * (1 - math.cos(math.pi / 90)), 55: 0.55, 100: 0.1}),
        ("cosine", 40, {30: 0.55, 50: 0.1, 51: 0.1, 100: 0.1}),
        ("linear", None, {11: 0.99, 55: 0.55, 99: 0.11, 100: 0.1}),
        ("linear", 45, {55: 0.1, 80: 0.1}),
        ("wsd", 20, {11: 1.0, 80: 1.0, 81: 0.955, 90: 0.55, 100: 0.1}),
        ("constant", None, {11: 1.0, 100: 1.0}),
    ],
)
def test_named_points(schedule: str, decay_steps: int | None, points: dict[int, float]) -> None:
    rate = rates(schedule=schedule, decay_steps=decay_steps, warmup_steps=10)
    assert [rate[1], rate[5], rate[10]] == pytest.approx([0.1, 0.5, 1.0])
    assert {step: rate[step] for step in points} == pytest.approx(points)


@pytest.mark.parametrize(("schedule", "decay_steps"), [("cosine", None), ("linear", None), ("wsd", 30), ("constant", None)])
@pytest.mark.parametrize("warmup_steps", [0, 1, 10, STEPS])
def test_it_rises_in_the_warm_up_and_never_after_it(schedule: str, decay_steps: int | None, warmup_steps: int) -> None:
    rate = rates(schedule=schedule, decay_steps=decay_steps, warmup_steps=warmup_steps)
    rising, falling = rate[1 : warmup_steps + 1], rate[max(1, warmup_steps) :]
    assert rising == sorted(set(rising)) and falling == sorted(falling, reverse=True)
    assert all(0 < r <= 1.0 for r in rate[1:])
    assert max(rate[1:]) == 1.0 or warmup_steps == 0


def test_a_run_without_warm_up_starts_one_step_into_the_decay() -> None:
    assert rates(schedule="linear")[1] == pytest.approx(0.991)
    assert rates(schedule="linear")[STEPS] == pytest.approx(0.1)


def test_the_rate_depends_on_the_step_alone() -> None:
    config = OptimConfig(lr=3e-4, warmup_steps=5)
    forwards = [learning_rate(config, step, STEPS) for step in range(1, STEPS + 1)]
    assert [learning_rate(config, step, STEPS) for step in range(STEPS, 0, -1)] == forwards[::-1]
