"""Whether a job whose calls match one by one can also do them all, or waits in a circle across groups and streams, by three rules.

- **one at a time**: every collective and every exchange is done before its rank goes on; both sides must be there. It is what
  NCCL's documentation asks of several communicators on one device: the same order of launch everywhere.
- **nccl**: a group is one in-order stream. A call starts when the stream's last is done and all that its rank has waited for by
  then; it is done when all members have started it. A batch starts and ends as one. What follows a `Wait` follows the call that
  it waits for. `open` and `barrier` make the host wait; so does `Read`, for what has been waited for already, which adds nothing.
  A message alone is done when its counterpart starts: two ranks that both send first wait for ever.
- **gloo**: a call is posted and the host goes on. A collective is done when all members have posted it, a message when both ends
  have, paired by partner and tag. `Wait`, `open` and `barrier` make the host wait.

A job that passes the first passes the others. Take the order in which the first does everything. Before each call all earlier ones
of its members are done, so under the other rules every stream is empty and every wait over when its members come to it, and they
can do it too. And no rule has races, so one order that reaches the end shows that all do. Hence the first rule is checked, and
the others only where it fails, to say what hangs. Ranks that cannot be told apart are simulated once: see `quotient.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from megatronish.preflight.align import explain
from megatronish.preflight.coding import CodedJob, Done, everything_done
from megatronish.preflight.findings import Finding
from megatronish.preflight.job import Job
from megatronish.preflight.programs import programs_from, runs_of
from megatronish.preflight.quotient import Quotient
from megatronish.preflight.simulate import OneAtATime, Posted, Streams
from megatronish.preflight.waits import Waits, find_cause, in_words

Rule = Literal["one at a time", "nccl", "gloo"]
NCCL_ASKS = (
    "NCCL asks that calls on several communicators of one device be launched in the same order by all ranks; this order ends only"
    " where calls of different groups run at the same time on the device, which NCCL does not promise"
)


@dataclass(frozen=True)
class Order:
    """Under which rules a job ends."""

    passes: Mapping[Rule, bool]
    """The rules that were run or follow from one that was."""
    finding: Finding | None
    """What is wrong for the device that the job is for."""
    num_simulated: int
    """Ranks that stood for all."""


def check_order(coded: CodedJob, device_kind: str, *, every_rank: bool = False) -> Order:
    """Whether a job whose calls match ends. every_rank: simulate all of them, to check that a few stand for all."""
    quotient = Quotient(coded, every_rank=every_rank)
    one_at_a_time = OneAtATime(quotient, runs_of(quotient))
    if one_at_a_time.run():
        return Order({"one at a time": True, "nccl": True, "gloo": True}, None, quotient.num_classes)
    # What the first rule could do, the others could do in the same order: they go on from there, with nothing under way.
    programs = programs_from(quotient, one_at_a_time.reached())
    nccl, gloo = Streams(quotient, programs), Posted(quotient, programs)
    passes: dict[Rule, bool] = {"one at a time": False, "nccl": nccl.run(), "gloo": gloo.run()}
    finding = None
    if device_kind != "cpu":
        finding = _finding(one_at_a_time if passes["nccl"] else nccl, passes, is_hang=not passes["nccl"])
    elif not passes["gloo"]:
        finding = _finding(gloo, passes, is_hang=True)
    return Order(passes, finding, quotient.num_classes)


def _finding(world: OneAtATime | Streams | Posted, passes: Mapping[Rule, bool], *, is_hang: bool) -> Finding:
    job = world.quotient.job
    stuck = [place for rank in range(job.num_ranks) if (place := world.where(rank)).slot >= 0]
    odd = _odd_ranks(world.quotient)
    # From an odd rank the cycle is found that it is in.
    starts = sorted(stuck, key=lambda place: place.rank not in odd)
    waits = find_cause(starts[:1], world.waits_for) or Waits((starts[0],), is_cycle=False)
    text = in_words(
        waits,
        does=lambda place: str(_done(job, place.rank, place.op)),
        name=lambda place: job.name(place.rank),
        fate=lambda place: "has ended",
    )
    ranks = tuple(sorted({place.rank for place in waits.chain}))
    culprits = tuple(rank for rank in ranks if rank in odd) or tuple(odd) or ranks
    if odd:
        text += "; " + _difference(world.quotient, culprits[0], odd[culprits[0]])
    hangs = [rule for rule, passed in passes.items() if not passed]
    ends = [rule for rule, passed in passes.items() if passed]
    text += f" (hangs under {', '.join(hangs)}" + (f"; ends under {', '.join(ends)})" if ends else ")")
    if not is_hang:
        text += f". {NCCL_ASKS}"
    others = tuple(rank for rank in ranks if rank not in culprits)
    position = min(_done(job, place.rank, place.op).position for place in waits.chain if place.slot >= 0)
    return Finding("hang" if is_hang else "order", text, culprits, others, position=position)


def _odd_ranks(quotient: Quotient) -> dict[int, int]:
    """Ranks that do things in another order than most of their pipeline stage -> the structure of most."""
    job = quotient.job
    by_stage: dict[int, Counter[int]] = {}
    stage_of = [job.shape.coordinates(rank)["pp"] for rank in range(job.num_ranks)]
    for rank, stage in enumerate(stage_of):
        by_stage.setdefault(stage, Counter())[quotient.structure_of_rank(rank)] += 1
    odd = {}
    for rank, stage in enumerate(stage_of):
        (usual, count), *rest = by_stage[stage].most_common()
        if rest and rest[0][1] < count and quotient.structure_of_rank(rank) != usual:
            odd[rank] = usual
    return odd


def _difference(quotient: Quotient, rank: int, usual: int) -> str:
    """How an odd rank's order differs from its stage's, in words."""
    job, codes = quotient.job, quotient.coded.codes
    stage = job.shape.coordinates(rank)["pp"]
    fellows = (other for other in range(job.num_ranks) if job.shape.coordinates(other)["pp"] == stage)
    fellow = next(other for other in fellows if quotient.structure_of_rank(other) == usual)
    mine, theirs = codes(quotient.structure_of_rank(rank)), codes(usual)
    done, usually = (list(everything_done(job, job.log_of[each])) for each in (rank, fellow))
    at = explain(mine, theirs, (done, usually)).position
    does = done[at] if at < len(done) else "nothing more"
    instead = usually[at] if at < len(usually) else "nothing more"
    return f"unlike most of its stage, {job.name(rank)} does {does} where {job.name(fellow)} does {instead}"


def _done(job: Job, rank: int, place: int) -> Done:
    return next(islice(everything_done(job, job.log_of[rank]), place, None))
