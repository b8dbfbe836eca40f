"""Run few microbatches of a schedule and infer the others.

A forward or backward of one chunk does the same in every microbatch of one phase of the schedule: warm-up (before the first
backward), steady, cool-down (after the last forward). The first two of each phase run, and their events are compared; equal events
stand for the rest. A chunk's first backward of a step is a phase of its own. Its first forward and last backward always run:
parameters arrive there, and gradients leave.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

from torch import Tensor

from megatronish.batch import Batch
from megatronish.comm import Group
from megatronish.comm.exchange import Parcel
from megatronish.comm.history import Event, Waits
from megatronish.comm.recording import DONE
from megatronish.pipeline.lower import Step
from megatronish.pipeline.runtime import PipelineRuntime, RunsMicrobatches
from megatronish.pipeline.schedules import Backward, Forward
from megatronish.preflight.log_history import LogHistory

Microbatches = Literal["all", "two of each phase"]
RUNS = 2
"""Of each kind of action, before others are inferred."""


class NotRepeating(Exception):
    """Two microbatches of one phase communicate differently: all must run."""


class Kind(NamedTuple):
    """Actions that should do the same."""

    action: str
    chunk: int
    phase: str
    trains: bool


def kinds_of(steps: Sequence[Step]) -> dict[Step, Kind | None]:
    """The kind of each action of a lowered list; None for those that always run."""
    actions = [step for step in steps if isinstance(step, Forward | Backward)]
    is_backward = [isinstance(action, Backward) for action in actions]
    trains = any(is_backward)
    first_backward = is_backward.index(True) if trains else len(actions)
    last_forward = max(i for i, backward in enumerate(is_backward) if not backward)
    first: dict[tuple[type, int], Step] = {(type(action), action.chunk): action for action in reversed(actions)}
    last: dict[tuple[type, int], Step] = {(type(a), a.chunk): a for a in actions if isinstance(a, Backward)}
    kinds: dict[Step, Kind | None] = {}
    for i, action in enumerate(actions):
        key = (type(action), action.chunk)
        phase = "warm-up" if i < first_backward else "steady" if i <= last_forward else "cool-down"
        is_first = action is first[key]
        phase = "first" if is_first else phase
        always = action is last.get(key) or (is_first and isinstance(action, Forward))
        kinds[action] = None if always else Kind(type(action).__name__, action.chunk, phase, trains)
    return kinds


class ReplayingRuntime(PipelineRuntime):
    """A PipelineRuntime for rehearsals, whose stage may run few of its actions."""

    def __init__(self, runtime: PipelineRuntime, history: LogHistory, microbatches: Microbatches) -> None:
        stage = ReplayingStage(runtime.stage, history, microbatches)
        super().__init__(stage, group=runtime.group, activation=runtime.activation, device_kind=runtime.device_kind)
        self.replaying = stage
        self._num_passes, self._microbatches = 0, microbatches

    def run(self, steps: Sequence[Step], microbatches: Sequence[Batch], **more: Any) -> Tensor:
        """See PipelineRuntime.run."""
        self.replaying.begin(steps)
        # What a batch of messages is has been seen by torch.distributed once.
        self.post = None if self._num_passes == 0 or self._microbatches == "all" else _post_nothing
        self._num_passes += 1
        return super().run(steps, microbatches, **more)


def _post_nothing(sends: Sequence[Parcel], receives: Sequence[Parcel], peer: int, group: Group) -> list[Waits]:
    return [DONE] * (len(sends) + len(receives))


class ReplayingStage:
    """Runs the actions that must run, and tells the history of the others."""

    def __init__(self, stage: RunsMicrobatches, history: LogHistory, microbatches: Microbatches) -> None:
        self._stage, self._history, self._microbatches = stage, history, microbatches
        self.model, self.stage, self.num_stages, self.num_parts = stage.model, stage.stage, stage.num_stages, stage.num_parts
        self._kinds: dict[Step, Kind | None] = {}
        self._runs: set[Step] = set()
        self._seen: dict[Kind, list[tuple[Event, ...]]] = {}
        self._outputs: dict[tuple[type, int, bool], Tensor | None] = {}
        self.num_run = self.num_inferred = 0

    def begin(self, steps: Sequence[Step]) -> None:
        """Choose what of this list runs."""
        self._kinds = kinds_of(steps)
        if self._microbatches == "all":
            self._kinds = dict.fromkeys(self._kinds)
        owed = {kind: RUNS - len(self._seen.get(kind, ())) for kind in self._kinds.values() if kind is not None}
        counts: Counter[Kind] = Counter()
        self._runs = set()
        for action, kind in self._kinds.items():
            if kind is None or counts[kind] < owed[kind]:
                self._runs.add(action)
            if kind is not None:
                counts[kind] += 1
        # A backward needs what its forward kept.
        self._runs |= {Forward(a.microbatch, a.chunk) for a in self._runs if isinstance(a, Backward)}

    def forward(
        self,
        index: int,
        batch: Batch,
        received: Tensor | None,
        *,
        chunk: int = 0,
        keep: bool,
        loss_gradient: Tensor | None = None,
    ) -> Tensor:
        """See Stage.forward."""
        run = partial(self._stage.forward, index, batch, received, chunk=chunk, keep=keep, loss_gradient=loss_gradient)
        output = self._act(Forward(index, chunk), run, keep)
        assert output is not None
        return output

    def backward(self, index: int, gradient: Tensor, *, chunk: int = 0) -> Tensor | None:
        """See Stage.backward."""
        return self._act(Backward(index, chunk), lambda: self._stage.backward(index, gradient, chunk=chunk), True)

    def _act(self, action: Step, run: Callable[[], Tensor | None], keep: bool) -> Tensor | None:
        assert isinstance(action, Forward | Backward)
        kind, key = self._kinds[action], (type(action), action.chunk, keep)
        if action not in self._runs:
            assert kind is not None
            self._history.infer(self._seen[kind][-1])
            self.num_inferred += 1
            return self._outputs[key]  # nobody writes into it: it has no values
        self._history.begin_action()
        output = self._outputs[key] = run()
        events = self._history.since_mark()
        self.num_run += 1
        if kind is not None:
            seen = self._seen.setdefault(kind, [])
            seen.append(events)
            if seen[0] != events:
                raise NotRepeating(f"{kind}: {action}")
        return output
