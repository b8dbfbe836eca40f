"""Which samples a step takes: step -> (first sample, batch size). Pure arithmetic, and the one place that knows it.

Without a ramp step n begins at sample (n - 1) x global batch. With one the batch grows from `start` by `increment` up to the global
batch, each size for an equal share of the ramp's samples (Brown et al. 2020, appendix B; as in Megatron-LM, a size ends with the
first step that reaches the end of its share). So samples come in the same order with and without a ramp.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Protocol


class Ramp(Protocol):
    """The numbers of `config.BatchRamp`."""

    @property
    def start(self) -> int: ...
    @property
    def increment(self) -> int: ...
    @property
    def samples(self) -> int: ...


@dataclass(frozen=True)
class Stage:
    """Steps of one batch size. The last stage has no end."""

    first_step: int
    first_sample: int
    batch_size: int


@dataclass(frozen=True)
class BatchSchedule:
    """The stages of a run, in order. The first step of a run is 1, its first sample 0."""

    stages: tuple[Stage, ...]

    @staticmethod
    def of(global_batch_size: int, ramp: Ramp | None = None) -> BatchSchedule:
        """The schedule of a run. A size whose share of the samples the one before has taken already is left out."""
        if ramp is None:
            return BatchSchedule((Stage(1, 0, global_batch_size),))
        stages, step, sample = [], 1, 0
        num_shares = max(1, (global_batch_size - ramp.start) // ramp.increment)
        for i in range(num_shares):
            batch_size = ramp.start + i * ramp.increment
            end = -(-(i + 1) * ramp.samples // num_shares)
            num_steps = max(0, -(-(end - sample) // batch_size))
            if num_steps:
                stages.append(Stage(step, sample, batch_size))
            step, sample = step + num_steps, sample + num_steps * batch_size
        return BatchSchedule((*stages, Stage(step, sample, global_batch_size)))

    def batch_size(self, step: int) -> int:
        """Samples that `step` takes, over all ranks."""
        return self._stage(step).batch_size

    def first_sample(self, step: int) -> int:
        """Number of the first sample of `step`: how many the steps before it took."""
        stage = self._stage(step)
        return stage.first_sample + (step - stage.first_step) * stage.batch_size

    def consumed_after(self, step: int) -> int:
        """Samples that steps 1 .. `step` take; 0 for step 0."""
        return self.first_sample(step + 1)

    def steps_for(self, samples: int) -> int:
        """The fewest steps that take at least `samples` samples."""
        assert samples >= 1
        stage = self.stages[bisect.bisect_left(self.stages, samples, key=lambda stage: stage.first_sample) - 1]
        return stage.first_step - 1 - (stage.first_sample - samples) // stage.batch_size

    def _stage(self, step: int) -> Stage:
        assert step >= self.stages[0].first_step, step
        return self.stages[bisect.bisect_right(self.stages, step, key=lambda stage: stage.first_step) - 1]
