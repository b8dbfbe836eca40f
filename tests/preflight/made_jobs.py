"""Jobs made by hand: a pipeline's own lists of steps with a few collectives around them, as ranks would have recorded them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatronish.comm.history import Call, Event, Moment, Wait
from megatronish.parallel.mesh import MeshShape
from megatronish.pipeline.lower import Exchange, Step, lower_all_stages
from megatronish.pipeline.schedules import Backward, Forward, actions_of_all_stages
from megatronish.preflight.job import Job, Log, Span

ACTIVATION = 4096
"""Elements of a message."""

Change = Callable[[list[list[Step]]], None]


def made_job(
    shape: MeshShape, num_microbatches: int, *, schedule: str = "1f1b", num_chunks: int = 1, change: Change | None = None
) -> Job:
    """A log a stage. `change` edits the lists of steps: a fault."""
    actions = actions_of_all_stages(schedule, shape.pp, num_microbatches, num_chunks=num_chunks)
    steps = [list(mine) for mine in lower_all_stages(actions)]
    if change is not None:
        change(steps)
    logs = [Log(list(spans_of_stage(shape, mine))) for mine in steps]
    world = tuple(range(shape.num_ranks))
    groups = [
        {axis: shape.ranks_along(axis, rank) for axis in ("pp", "dp", "tp") if getattr(shape, axis) > 1} | {"world": world}
        for rank in range(shape.num_ranks)
    ]
    stage_of = [shape.coordinates(rank)["pp"] for rank in range(shape.num_ranks)]
    return Job(shape, logs, stage_of, groups, num_run=shape.pp)


def spans_of_stage(shape: MeshShape, steps: list[Step]) -> Iterator[Span]:
    """Build, two training steps of which the second is as the first, evaluation, save."""
    site = "megatronish/trainer.py:68 train_step"
    yield Span(Moment("build"), (Call("open", "world", shape.num_ranks), Call("barrier", "world", site=site)))
    inside = _inside(shape)
    norm: tuple[Event, ...] = (
        Call("all_reduce", "world", 1, "float32", "sum", what="gradient norm", site=site),
        Wait("world", 1, site),
    )
    messages = {action: _messages(action) for action in steps if isinstance(action, Exchange)}
    for step in (1, 2):
        seen: set[type] = set()
        for action in steps:
            if isinstance(action, Exchange):
                yield Span(Moment("train", step, "exchange"), messages[action])
            else:
                yield Span(Moment("train", step, str(action)), inside[type(action)], is_inferred=type(action) in seen)
                seen.add(type(action))
        yield Span(Moment("train", step), norm)
    yield Span(Moment("evaluate"), inside[Forward])
    yield Span(Moment("save"), (Call("barrier", "world", site=site),))


def _inside(shape: MeshShape) -> dict[type, tuple[Event, ...]]:
    forward: list[Event] = []
    if shape.tp > 1:
        forward = [
            Call("all_gather", "tp", ACTIVATION // shape.tp, "bfloat16"),
            Call("reduce_scatter", "tp", ACTIVATION, "bfloat16", "sum"),
        ]
    bucket: list[Event] = [Call("reduce_scatter", "dp", 10 * ACTIVATION, "float32", "sum")] if shape.dp > 1 else []
    return {Forward: (*forward, *forward), Backward: (*forward, *forward, *bucket)}


def _messages(exchange: Exchange) -> tuple[Event, ...]:
    ends = [("receive", message) for message in exchange.receives] + [("send", message) for message in exchange.sends]
    return tuple(
        Call(operation, "pp", ACTIVATION, "bfloat16", peer=exchange.peer_stage, tag=message.tag, batch=1, what=str(message))
        for operation, message in ends
    )
