"""Prove, before anything runs, that lowered lists end, lose nothing, and compute each microbatch from what has arrived.

Three independent checks:

- **data**: each stage's list alone, read in order: every microbatch once through every chunk, from inputs that have arrived.
- **buffered** (gloo): a send never blocks, a receive waits for the message of its name.
- **rendezvous** (NCCL): a rank has one in-order stream, and an exchange ends only when the partner's is at the head of its stream
  and is its mirror image. Names are ignored there, so the order of messages in each direction must agree.

A list that passes one of the last two may hang under the other; a schedule is accepted under both. Neither rule has races: a step
that can run stays able to run whatever other stages do, so one simulated order decides for all of them. Both let a stage wait at
each exchange, which is more than the runtime does: it computes on until it needs what it receives. Fewer waits cannot hang.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from megatronish.pipeline.lower import Exchange, Message, Step, destination, needed_by, output_of
from megatronish.pipeline.schedules import Backward, Forward, count_chunks, peak_in_flight
from megatronish.pipeline.timeline import part_of, units

Check = Literal["data", "buffered", "rendezvous"]


@dataclass(frozen=True)
class Proof:
    """What was found out about the lists of all stages."""

    failures: Mapping[Check, str]
    """The checks that failed, each with the reason in words."""
    unit_time: int | None
    """End of the last stage if a forward of a chunk takes 1, a backward 2 and an exchange only its waiting on the in-order streams
    of the rendezvous rule, under which stages compute on until they need what they receive; None if that check failed."""
    busy_time: int
    """Units computed, all stages together."""
    peak_in_flight: tuple[int, ...]
    """Of each stage: how many (microbatch, chunk) it holds activations of at once."""
    peak_received: tuple[int, ...]
    """Of each stage: tensors that it has asked for and not used yet, at most."""

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
    cut = _Cut(len(steps_by_stage), len(steps_by_stage) * count_chunks(steps_by_stage))
    data = [
        f"stage {stage}: {problem}"
        for stage, steps in enumerate(steps_by_stage)
        if (problem := _data_problem(steps, stage, cut, num_microbatches))
    ]
    buffered = _run_buffered(steps_by_stage)
    rendezvous, unit_time = _run_rendezvous(steps_by_stage, cut)
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
        busy_time=sum(units(step) for steps in steps_by_stage for step in steps if not isinstance(step, Exchange)),
        peak_in_flight=tuple(peak_in_flight(steps) for steps in steps_by_stage),
        peak_received=tuple(_peak_received(steps, stage, cut) for stage, steps in enumerate(steps_by_stage)),
    )


class _Cut(NamedTuple):
    """How the layers are dealt out."""

    num_stages: int
    num_parts: int

    def output_of(self, step: Forward | Backward, stage: int) -> Message | None:
        return output_of(step, part_of(step, stage, self.num_stages), self.num_parts)

    def needed_by(self, step: Forward | Backward, stage: int) -> Message | None:
        return needed_by(step, part_of(step, stage, self.num_stages), self.num_parts)

    def maker_stage(self, message: Message) -> int:
        return message.part % self.num_stages

    def user_stage(self, message: Message) -> int:
        return destination(message) % self.num_stages

    def stays(self, message: Message) -> bool:
        """Made for another part of the same stage."""
        return self.maker_stage(message) == self.user_stage(message)


def _peak_received(steps: Sequence[Step], stage: int, cut: _Cut) -> int:
    waiting: set[Message] = set()
    peak = 0
    for step in steps:
        if isinstance(step, Exchange):
            waiting.update(step.receives)
            peak = max(peak, len(waiting))
        elif (needed := cut.needed_by(step, stage)) is not None:
            waiting.discard(needed)
    return peak


def _data_problem(steps: Sequence[Step], stage: int, cut: _Cut, num_microbatches: int) -> str:
    """The first thing wrong in one stage's list, or "": what is computed, sent and received, and in which order."""
    done: set[Step] = set()
    made: set[Message] = set()
    sent: set[Message] = set()
    received: set[Message] = set()
    for step in steps:
        if isinstance(step, Exchange):
            if problem := _exchange_problem(step, stage, cut, made, sent, received):
                return problem
            sent.update(step.sends)
            received.update(step.receives)
            continue
        if problem := _compute_problem(step, cut.needed_by(step, stage), done, received):
            return problem
        done.add(step)
        if (output := cut.output_of(step, stage)) is not None:
            (received if cut.stays(output) else made).add(output)
    num_chunks = cut.num_parts // cut.num_stages
    expected = {kind(i, chunk) for kind in (Forward, Backward) for i in range(num_microbatches) for chunk in range(num_chunks)}
    if done != expected:
        strange, missing = done - expected, expected - done
        return f"runs {_some(strange)}, not of this step" if strange else f"never runs {_some(missing)}"
    return f"never sends {_some(made - sent)}" if made - sent else ""


def _exchange_problem(
    exchange: Exchange, stage: int, cut: _Cut, made: set[Message], sent: set[Message], received: set[Message]
) -> str:
    peer = exchange.peer_stage
    if not exchange.sends and not exchange.receives:
        return f"an empty exchange with stage {peer}"
    for message in exchange.sends:
        if (cut.maker_stage(message), cut.user_stage(message)) != (stage, peer) or not _exists(message, cut):
            return f"{message} is sent to stage {peer}"
        if message not in made:
            return f"{message} is sent before it is made"
        if message in sent:
            return f"{message} is sent twice"
    for message in exchange.receives:
        if (cut.maker_stage(message), cut.user_stage(message)) != (peer, stage) or not _exists(message, cut):
            return f"{message} is received from stage {peer}"
        if message in received:
            return f"{message} is received twice"
    return ""


def _exists(message: Message, cut: _Cut) -> bool:
    return 0 <= message.part < cut.num_parts and 0 <= destination(message) < cut.num_parts


def _some(things: set[Any]) -> str:
    """The first few by microbatch, and how many more."""
    names = [str(thing) for thing in sorted(things, key=lambda thing: (thing.microbatch, str(thing)))]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _compute_problem(step: Forward | Backward, needed: Message | None, done: set[Step], received: set[Message]) -> str:
    if step in done:
        return f"{step} runs twice"
    if isinstance(step, Backward) and (forward := Forward(step.microbatch, step.chunk)) not in done:
        return f"{step} runs before {forward}"
    return f"{step} runs before {needed} has arrived" if needed is not None and needed not in received else ""


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


def _run_rendezvous(steps_by_stage: Sequence[Sequence[Step]], cut: _Cut) -> tuple[str, int]:
    """Run the lists with exchanges that end in pairs. Returns (what is stuck or "", time at which the last stage ends).

    What can run in which order is found with stages that wait at every exchange; the clocks are those of stages that compute on:
    an exchange begins when both stages have come to it and both streams are free, and its messages are waited for where needed."""
    num_stages = len(steps_by_stage)
    positions, clocks, streams = [0] * num_stages, [0] * num_stages, [0] * num_stages
    arrived: dict[Message, int] = {}
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
                end = max(clocks[stage], clocks[peer], streams[stage], streams[peer])
                streams[stage] = streams[peer] = end
                arrived.update(dict.fromkeys((*step.sends, *step.receives), end))
                positions[peer] += 1
                ready.append(peer)
            else:
                needed = cut.needed_by(step, stage)
                clocks[stage] = max(clocks[stage], arrived.get(needed, 0) if needed is not None else 0) + units(step)
            positions[stage] += 1
    return _describe_stuck(steps_by_stage, positions), max(*clocks, *streams)


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
