"""Prove, before anything runs, that lowered lists end, lose nothing, and compute each microbatch from what has arrived.

Three independent checks:

- **data**: each stage's list alone, read in order: every microbatch once, from inputs that have arrived.
- **buffered** (gloo): a send never blocks, a receive waits for the message of its name.
- **rendezvous** (NCCL): a rank has one in-order stream, and an exchange ends only when the partner's is at the head of its stream
  and is its mirror image. Names are ignored there, so the order of messages in each direction must agree.

A list that passes one of the last two may hang under the other; a schedule is accepted under both. Neither rule has races: a step
that can run stays able to run whatever other stages do, so one simulated order decides for all of them.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatronish.pipeline.lower import Exchange, Message, Step
from megatronish.pipeline.schedules import Backward, Forward, peak_in_flight

FORWARD_UNITS = 1
BACKWARD_UNITS = 2
"""Input gradient and weight gradient are each one product of the size of the forward's."""

Check = Literal["data", "buffered", "rendezvous"]


@dataclass(frozen=True)
class Proof:
    """What was found out about the lists of all stages."""

    failures: Mapping[Check, str]
    """The checks that failed, each with the reason in words."""
    unit_time: int | None
    """End of the last stage if a forward takes 1, a backward 2 and an exchange only its waiting, under rendezvous (the slower of
    the two rules); None if that check failed."""
    busy_time: int
    """Units computed, all stages together."""
    peak_in_flight: tuple[int, ...]
    """Of each stage: microbatches whose activations it holds at once."""

    @property
    def ok(self) -> bool:
        return not self.failures

    @property
    def message(self) -> str:
        """One line for each failed check; one line if none failed."""
        if self.failures:
            return "\n".join(f"{check}: {reason}" for check, reason in self.failures.items())
        return f"no deadlock and nothing left over under both rules; idle {self.idle_fraction:.1%} of {self.unit_time} units"

    @property
    def idle_fraction(self) -> float | None:
        """Share of all stages' time without work; None if the lists do not end."""
        if not self.unit_time:
            return None
        return 1 - self.busy_time / (self.unit_time * len(self.peak_in_flight))


def prove(steps_by_stage: Sequence[Sequence[Step]], num_microbatches: int) -> Proof:
    """Check the lowered lists of all stages of one step (`lower.lower_all_stages`) under every rule."""
    data = [
        f"stage {stage}: {problem}"
        for stage, steps in enumerate(steps_by_stage)
        if (problem := _data_problem(steps, stage, len(steps_by_stage), num_microbatches))
    ]
    buffered = _run_buffered(steps_by_stage)
    rendezvous, unit_time = _run_rendezvous(steps_by_stage)
    failures: dict[Check, str] = {}
    if data:
        failures["data"] = "; ".join(data)
    if buffered:
        failures["buffered"] = buffered
    if rendezvous:
        failures["rendezvous"] = rendezvous
    return Proof(
        failures,
        unit_time=None if rendezvous else unit_time,
        busy_time=sum(_units(step) for steps in steps_by_stage for step in steps),
        peak_in_flight=tuple(peak_in_flight(steps) for steps in steps_by_stage),
    )


def _units(step: Step) -> int:
    if isinstance(step, Exchange):
        return 0
    return FORWARD_UNITS if isinstance(step, Forward) else BACKWARD_UNITS


def _data_problem(steps: Sequence[Step], stage: int, num_stages: int, num_microbatches: int) -> str:
    """The first thing wrong in one stage's list, or "": what is computed, sent and received, and in which order."""
    done: set[Step] = set()
    sent: set[Message] = set()
    received: set[Message] = set()
    for step in steps:
        if isinstance(step, Exchange):
            if not step.sends and not step.receives:
                return f"an empty exchange with stage {step.peer_stage}"
            for message in step.sends:
                if problem := _send_problem(message, step.peer_stage, stage, num_stages, done):
                    return problem
                if message in sent:
                    return f"{message} is sent twice"
                sent.add(message)
            for message in step.receives:
                if problem := _receive_problem(message, step.peer_stage, stage, num_stages):
                    return problem
                if message in received:
                    return f"{message} is received twice"
                received.add(message)
            continue
        if problem := _compute_problem(step, stage, num_stages, done, received):
            return problem
        done.add(step)
    expected = {kind(microbatch) for kind in (Forward, Backward) for microbatch in range(num_microbatches)}
    if done != expected:
        strange, missing = done - expected, expected - done
        return f"runs {_some(strange)}, not of this step" if strange else f"never runs {_some(missing)}"
    unsent = {
        message
        for microbatch in range(num_microbatches)
        for message, needed in (
            (Message("activation", microbatch), stage < num_stages - 1),
            (Message("gradient", microbatch), stage > 0),
        )
        if needed and message not in sent
    }
    return f"never sends {_some(unsent)}" if unsent else ""


def _some(things: set[Any]) -> str:
    """The first few by microbatch, and how many more."""
    names = [str(thing) for thing in sorted(things, key=lambda thing: (thing.microbatch, str(thing)))]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _compute_problem(step: Forward | Backward, stage: int, num_stages: int, done: set[Step], received: set[Message]) -> str:
    if step in done:
        return f"{step} runs twice"
    if isinstance(step, Forward):
        needed = Message("activation", step.microbatch, step.chunk) if stage > 0 else None
    else:
        if Forward(step.microbatch, step.chunk) not in done:
            return f"{step} runs before F{step.microbatch}"
        needed = Message("gradient", step.microbatch, step.chunk) if stage < num_stages - 1 else None
    return f"{step} runs before {needed} has arrived" if needed is not None and needed not in received else ""


def _send_problem(message: Message, peer: int, stage: int, num_stages: int, done: set[Step]) -> str:
    forward = message.kind == "activation"
    if peer != (stage + 1 if forward else stage - 1) or not 0 <= peer < num_stages:
        return f"{message} is sent to stage {peer}"
    maker = (Forward if forward else Backward)(message.microbatch, message.chunk)
    return "" if maker in done else f"{message} is sent before {maker} has made it"


def _receive_problem(message: Message, peer: int, stage: int, num_stages: int) -> str:
    if peer != (stage - 1 if message.kind == "activation" else stage + 1) or not 0 <= peer < num_stages:
        return f"{message} is received from stage {peer}"
    return ""


def _run_buffered(steps_by_stage: Sequence[Sequence[Step]]) -> str:
    """Run the lists with sends that never block. Returns what is stuck or left over, or ""."""
    positions = [0] * len(steps_by_stage)
    posted = [-1] * len(steps_by_stage)  # the last exchange whose sends are on their way
    under_way: defaultdict[tuple[int, int, Message], int] = defaultdict(int)  # (from, to, message) -> how many
    ready = deque(range(len(steps_by_stage)))
    while ready:
        stage = ready.popleft()
        steps = steps_by_stage[stage]
        while positions[stage] < len(steps):
            step = steps[positions[stage]]
            if isinstance(step, Exchange):
                if posted[stage] < positions[stage]:
                    posted[stage] = positions[stage]
                    for message in step.sends:
                        under_way[stage, step.peer_stage, message] += 1
                    if step.sends and 0 <= step.peer_stage < len(steps_by_stage):
                        ready.append(step.peer_stage)
                arriving = [(step.peer_stage, stage, message) for message in step.receives]
                if not all(under_way[key] for key in arriving):
                    break
                for key in arriving:
                    under_way[key] -= 1
            positions[stage] += 1
    if stuck := _describe_stuck(steps_by_stage, positions):
        return stuck
    left_over = [f"{message} from stage {source} to stage {to}" for (source, to, message), count in under_way.items() if count]
    return f"sent but never received: {', '.join(left_over)}" if left_over else ""


def _run_rendezvous(steps_by_stage: Sequence[Sequence[Step]]) -> tuple[str, int]:
    """Run the lists with exchanges that end in pairs. Returns (what is stuck or "", time at which the last stage ends)."""
    num_stages = len(steps_by_stage)
    positions, clocks = [0] * num_stages, [0] * num_stages
    ready = deque(range(num_stages))
    while ready:
        stage = ready.popleft()
        steps = steps_by_stage[stage]
        while positions[stage] < len(steps):
            step = steps[positions[stage]]
            if isinstance(step, Exchange):
                peer = step.peer_stage
                if peer == stage or not _is_mirror(_head(steps_by_stage, positions, peer), step, stage):
                    break
                clocks[stage] = clocks[peer] = max(clocks[stage], clocks[peer])
                positions[peer] += 1
                ready.append(peer)
            else:
                clocks[stage] += _units(step)
            positions[stage] += 1
    return _describe_stuck(steps_by_stage, positions), max(clocks)


def _head(steps_by_stage: Sequence[Sequence[Step]], positions: Sequence[int], stage: int) -> Step | None:
    if not 0 <= stage < len(steps_by_stage) or positions[stage] == len(steps_by_stage[stage]):
        return None
    return steps_by_stage[stage][positions[stage]]


def _is_mirror(head: Step | None, exchange: Exchange, stage: int) -> bool:
    """`head` is the partner's side of the exchange of `stage`, message order included."""
    return (
        isinstance(head, Exchange)
        and head.peer_stage == stage
        and head.sends == exchange.receives
        and head.receives == exchange.sends
    )


def _describe_stuck(steps_by_stage: Sequence[Sequence[Step]], positions: Sequence[int]) -> str:
    """The first stuck exchange of every stage that has not ended, and who waits for whom; "" if all have ended."""
    stuck: dict[int, Exchange] = {}
    for stage in range(len(steps_by_stage)):
        head = _head(steps_by_stage, positions, stage)
        if head is not None:
            assert isinstance(head, Exchange), "only an exchange can wait"
            stuck[stage] = head
    if not stuck:
        return ""
    heads = "; ".join(f"stage {stage} at step {positions[stage]}, {exchange}" for stage, exchange in stuck.items())
    return f"stuck: {heads}. {_describe_waits(stuck)}"


def _describe_waits(stuck: Mapping[int, Exchange]) -> str:
    """The cycle of waits if there is one, else the chain to a stage that has ended. Every stuck stage waits for one neighbour."""
    chain: list[int] = []
    for start in stuck:
        chain = [start]
        while chain[-1] in stuck:
            peer = stuck[chain[-1]].peer_stage
            if peer in chain:
                return f"Cycle: {_waits([*chain[chain.index(peer) :], peer])}"
            chain.append(peer)
    return f"No cycle: {_waits(chain)}, which has ended"


def _waits(chain: Sequence[int]) -> str:
    first, *others = (f"stage {stage}" for stage in chain)
    return f"{first} waits for " + ", which waits for ".join(others)
