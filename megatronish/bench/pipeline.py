"""Idle time of pipeline schedules, measured: equal stages that sleep instead of computing, on real gloo ranks, against the formula.

Everything but the arithmetic is the trainer's: schedules, lowering, runtime and exchanges. Sleeping stages need no core, so any
number of ranks fits on any machine, and what is idle is idle because of the schedule or of communication.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatronish import __version__, formulas
from megatronish.batch import Batch
from megatronish.bench.step import processor_name
from megatronish.comm import barrier
from megatronish.comm.groups import world_group
from megatronish.comm.local_ranks import RankPool
from megatronish.pipeline.lower import lower
from megatronish.pipeline.runtime import ActivationSpec, PipelineRuntime
from megatronish.pipeline.schedules import actions_of_all_stages
from megatronish.pipeline.timeline import BACKWARD_UNITS, FORWARD_UNITS, idle_of

_SHAPE = (16, 1, 64)
"""[S, B, D]: small, as equal communication costs nothing in the formula."""
_PRELOAD = ("megatronish.bench.pipeline",)


@dataclass(frozen=True)
class PipelineBench:
    """One schedule at one size."""

    schedule: str
    num_stages: int
    num_microbatches: int
    num_chunks: int = 1
    unit_seconds: float = 0.1
    """The forward of one chunk; a backward is twice as long."""
    rounds: int = 3


class SleepingStage:
    """A stage whose work is sleep. `busy` seconds are measured, so a sleep that lasts too long is work too."""

    def __init__(self, bench: PipelineBench, stage: int) -> None:
        self.model: nn.Module = nn.Identity()
        self.stage, self.num_stages, self.num_parts = stage, bench.num_stages, bench.num_stages * bench.num_chunks
        self.unit_seconds = bench.unit_seconds
        self.busy = 0.0

    def forward(
        self, index: int, batch: Batch, received: Tensor | None, *, chunk: int, keep: bool, loss_gradient: Tensor | None
    ) -> Tensor:
        """See Stage.forward."""
        self._work(FORWARD_UNITS)
        part = chunk * self.num_stages + self.stage
        return torch.zeros(()) if part == self.num_parts - 1 else torch.zeros(_SHAPE)

    def backward(self, index: int, gradient: Tensor, *, chunk: int) -> Tensor | None:
        """See Stage.backward."""
        self._work(BACKWARD_UNITS)
        return None if chunk * self.num_stages + self.stage == 0 else torch.zeros(_SHAPE)

    def _work(self, units: int) -> None:
        started = time.perf_counter()
        time.sleep(units * self.unit_seconds)
        self.busy += time.perf_counter() - started


def _no_batch() -> Batch:
    nothing = torch.zeros(0, 0, dtype=torch.int64)
    return Batch(nothing, nothing, nothing.float(), nothing, nothing.flatten())


def _measure_rank(rank: int, bench: PipelineBench) -> list[tuple[float, float, float]]:
    """By round: (start, end, busy seconds). The clock is the machine's, the same in all processes."""
    group = world_group(device_kind="cpu")
    actions = actions_of_all_stages(bench.schedule, bench.num_stages, bench.num_microbatches, num_chunks=bench.num_chunks)
    steps = lower(actions, rank)
    stage = SleepingStage(bench, rank)
    spec = ActivationSpec(_SHAPE, torch.float32, torch.device("cpu"))
    runtime = PipelineRuntime(stage, group=group, activation=spec, device_kind="cpu")
    microbatches, rounds = [_no_batch()] * bench.num_microbatches, []
    for number in range(bench.rounds + 1):
        # The first, short, opens the connections.
        stage.busy, stage.unit_seconds = 0.0, bench.unit_seconds if number else 0.0
        barrier(group)
        started = time.perf_counter()
        runtime.run(steps, microbatches, loss_gradient=torch.ones(()))
        rounds.append((started, time.perf_counter(), stage.busy))
    return rounds[1:]


def measure(benches: list[PipelineBench], on_schedule: Callable[[int], None] = lambda number: None) -> list[dict[str, Any]]:
    """Measure each; medians over rounds."""
    with RankPool(preload=_PRELOAD) as pool:
        results = []
        for number, bench in enumerate(benches):
            results.append(_summary(bench, pool.run(bench.num_stages, _measure_rank, bench)))
            on_schedule(number)
    return results


def _summary(bench: PipelineBench, by_rank: list[list[tuple[float, float, float]]]) -> dict[str, Any]:
    p, m, v = bench.num_stages, bench.num_microbatches, bench.num_chunks
    idle, seconds = [], []
    for ranks in zip(*by_rank, strict=True):
        step = max(end for _, end, _ in ranks) - min(start for start, _, _ in ranks)
        idle.append(1 - sum(busy for *_, busy in ranks) / (step * p))
        seconds.append(step)
    measured, formula = statistics.median(idle), formulas.pipeline_idle_fraction(p, m, num_chunks=v)
    return {
        "bench": "pipeline",
        "schedule": bench.schedule,
        "num_stages": p,
        "num_microbatches": m,
        "num_chunks": v,
        "unit_seconds": bench.unit_seconds,
        "idle_measured": measured,
        "idle_of_all_rounds": idle,
        "idle_by_formula": formula,
        "idle_of_the_lists": idle_of(bench.schedule, p, m, num_chunks=v),
        "ratio": measured / formula,
        "step_seconds": statistics.median(seconds),
        "versions": {"megatronish": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "device": processor_name(),
        "date": time.strftime("%Y-%m-%d"),
    }
