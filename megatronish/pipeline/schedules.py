"""What one stage computes, in which order: lists of actions. Communication is added by `lower.py`, checked by `prove.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Forward:
    """Run the forward of `microbatch` through the layers of `chunk` of this stage."""

    microbatch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"F{self.microbatch}"


@dataclass(frozen=True, slots=True)
class Backward:
    """Run the backward of `microbatch`: input gradient and weight gradients."""

    microbatch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"B{self.microbatch}"


Action = Forward | Backward
Schedule = Callable[[int, int, int], list[Action]]
"""(stage, num_stages, num_microbatches) -> the actions of that stage, in order."""


def one_f_one_b(stage: int, num_stages: int, num_microbatches: int) -> list[Action]:
    """1F1B: fill the stages behind this one, then alternate, then drain. At most min(m, num_stages - stage) microbatches in flight.

    Source: Narayanan et al. 2021 (PipeDream-Flush, section 2.2.1). With fewer microbatches than stages the early stages have no
    steady phase.
    """
    assert 0 <= stage < num_stages and num_microbatches >= 1, (stage, num_stages, num_microbatches)
    num_warmup = min(num_stages - 1 - stage, num_microbatches)
    num_steady = num_microbatches - num_warmup
    warmup: list[Action] = [Forward(i) for i in range(num_warmup)]
    steady: list[Action] = [action for i in range(num_steady) for action in (Forward(num_warmup + i), Backward(i))]
    cooldown: list[Action] = [Backward(i) for i in range(num_steady, num_microbatches)]
    return warmup + steady + cooldown


SCHEDULES: dict[str, Schedule] = {"1f1b": one_f_one_b}


def actions_of_all_stages(schedule: Schedule, num_stages: int, num_microbatches: int) -> list[list[Action]]:
    """The list of every stage: what `lower.lower` needs, since neighbours must agree on each exchange."""
    return [schedule(stage, num_stages, num_microbatches) for stage in range(num_stages)]


def peak_in_flight(actions: Iterable[object]) -> int:
    """Most forwards whose backward has not run: how many microbatches' activations the stage keeps. Other steps are skipped."""
    in_flight = peak = 0
    for action in actions:
        if isinstance(action, Forward):
            in_flight += 1
            peak = max(peak, in_flight)
        elif isinstance(action, Backward):
            in_flight -= 1
    return peak
