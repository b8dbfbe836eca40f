"""Steps that were not applied, told to people: which step, on which rank, which loss or parameter; and the end of a run that may
not go on. The device decided long before (`optim/step_guard.py`): weights are those before the first such step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatronish.assemble import Assembly, backward_order
from megatronish.comm import all_gather
from megatronish.comm.host import read_values
from megatronish.errors import RunStopped
from megatronish.optim.step_guard import MOST_BAD_IN_A_ROW, GuardState, LocalRecord, records_of


def require_sound_steps(run: Assembly, *, log: Callable[[str], None], state: GuardState | None = None) -> GuardState:
    """Tell `log` which steps were skipped since the last call; RunStopped, on every rank, if nothing is applied any more.

    `state`: the guard's, where it has been read. Collective over the job, but where nothing was skipped it communicates nothing."""
    guard = run.trainer.guard
    state = state or guard.read()
    num_new = state.skipped - guard.reported_skips
    if num_new == 0:
        return state
    lines = [f"step {step}: {origin}" for step, origin in _origins(run)]
    guard.forget_records()
    guard.reported_skips = state.skipped
    if state.stopped_at:
        raise RunStopped(_last_words(run, state, lines))
    scale = f"; the loss scale is now {state.loss_scale:g}" if guard.scales else ""
    for line in lines:
        log(f"{line}; not applied{scale}")
    if num_new > len(lines):
        log(f"{num_new - len(lines)} more steps were not applied{scale}")
    return state


def _last_words(run: Assembly, state: GuardState, lines: Sequence[str]) -> str:
    optim, train = run.config.optim, run.config.train
    at_end = [line for line in lines if line.startswith(f"step {state.stopped_at}:")]
    what = (at_end or [f"step {state.stopped_at}: not finite"])[0]
    if state.bad_in_a_row >= MOST_BAD_IN_A_ROW:
        what += f", and so were the {state.bad_in_a_row - 1} steps before"
        advice = f"lower optim.lr={optim.lr}, or look at the data"
    else:
        advice = f"lower optim.lr={optim.lr}, or set train.on_not_finite=skip"
        if train.on_not_finite == "skip" or optim.clip_norm == 0:
            advice = f"lower optim.lr={optim.lr}, or set optim.clip_norm"
    return f"{what}; the run stops, no weight has seen it and the last checkpoint is sound; {advice}"


def _origins(run: Assembly) -> list[tuple[int, str]]:
    """(step, where it went wrong first) of each kept record, from the records of all ranks. Collective over the job."""
    mesh, guard = run.mesh, run.trainer.guard
    gathered = all_gather(guard.records.flatten(), mesh.groups["world"], what="bad steps")
    values = read_values(gathered, [0] * gathered.numel())
    length = guard.records.numel()
    by_rank = [records_of(values[rank * length : (rank + 1) * length]) for rank in range(mesh.shape.num_ranks)]
    return [(seen[0].step, _origin(run, seen)) for seen in zip(*by_rank, strict=True)]


def _origin(run: Assembly, seen: Sequence[LocalRecord]) -> str:
    """One step, seen by each rank. A loss comes before gradients; backward runs from the last stage to the first, and spreads what
    is not finite over later parameters."""
    shape = run.mesh.shape
    losses = [(record.microbatch, rank) for rank, record in enumerate(seen) if record.microbatch is not None]
    if losses:
        microbatch, rank = min(losses)
        return f"the loss of microbatch {microbatch} on rank {rank} [{shape.describe(rank)}] is not finite"
    stage_of = [shape.coordinates(rank)["pp"] for rank in range(shape.num_ranks)]
    parameters = [(-stage_of[rank], r.parameter, rank) for rank, r in enumerate(seen) if r.parameter is not None]
    if not parameters:
        return "the gradients of each rank are finite, but not their sum"
    _, position, rank = min(parameters)
    name = backward_order(run.cut.layout, stage_of[rank])[position]
    return f"the gradient of {name} on rank {rank} [{shape.describe(rank)}] is not finite"
