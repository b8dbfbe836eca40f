"""Jobs made by hand, by drawing, and from schedules; and who may do what next, written again as plainly as can be."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from hypothesis import strategies as st

from megatronish.comm.history import Call, Event, Moment, Wait
from megatronish.parallel.mesh import AXES, MeshShape
from megatronish.pipeline.lower import Exchange, Step
from megatronish.preflight.coding import unit_of, units_of
from megatronish.preflight.job import Job, Log, Span

Programs = list[list[tuple[Moment, Event]]]
"""By rank."""
TRAIN = Moment("train", 1)


def groups_of(shape: MeshShape) -> list[dict[str, tuple[int, ...]]]:
    """Every rank's groups of more than one, as the mesh makes them."""
    found = []
    for rank in range(shape.num_ranks):
        groups = {"world": tuple(range(shape.num_ranks)), **{axis: shape.ranks_along(axis, rank) for axis in AXES}}
        stages = groups["pp"]
        if rank in (stages[0], stages[-1]):
            groups["ends"] = (stages[0], stages[-1])
        found.append({name: ranks for name, ranks in groups.items() if len(set(ranks)) > 1})
    return found


def job_of(shape: MeshShape, programs: Programs) -> Job:
    """A job of these events: equal programs share a log, equal spans their tuple."""
    logs: dict[tuple[Span, ...], int] = {}
    tuples: dict[tuple[Event, ...], tuple[Event, ...]] = {}
    log_of = []
    for program in programs:
        spans: list[Span] = []
        for moment, event in program:
            if spans and spans[-1].moment == moment:
                spans[-1] = Span(moment, (*spans[-1].events, event))
            else:
                spans.append(Span(moment, (event,)))
        shared = tuple(Span(span.moment, tuples.setdefault(span.events, span.events)) for span in spans)
        log_of.append(logs.setdefault(shared, len(logs)))
    return Job(shape, [Log(spans) for spans in logs], log_of, groups_of(shape))


def collective(programs: Programs, ranks: Iterable[int], call: Call, moment: Moment = TRAIN) -> None:
    """All of these ranks do it."""
    for rank in ranks:
        programs[rank].append((moment, call))


def exchange(
    programs: Programs,
    group: Sequence[int],
    name: str,
    ends: tuple[int, int],
    there: Sequence[Call],
    back: Sequence[Call] = (),
    *,
    batch: int = 1,
    moment: Moment = TRAIN,
) -> None:
    """One batch between two places: messages there and back, as `send` calls."""
    for me, other, sends, receives in ((ends[0], ends[1], there, back), (ends[1], ends[0], back, there)):
        calls = [c._replace(operation="receive", group=name, peer=other, batch=batch) for c in receives]
        calls += [c._replace(operation="send", group=name, peer=other, batch=batch) for c in sends]
        programs[group[me]] += [(moment, call) for call in calls]


def job_of_steps(steps_by_stage: Sequence[Sequence[Step]], *, tp: int = 2, dp: int = 1) -> Job:
    """A training step of lowered lists: two sums over tp in each action, exchanges as the runtime posts them, no waits, and at
    the end a sum over dp and one over all."""
    shape = MeshShape(pp=len(steps_by_stage), tp=tp, dp=dp)
    groups = groups_of(shape)
    programs: Programs = []
    for rank in range(shape.num_ranks):
        events: list[tuple[Moment, Event]] = []
        for number, step in enumerate(steps_by_stage[shape.coordinates(rank)["pp"]], start=1):
            if isinstance(step, Exchange):
                for operation, messages in (("receive", step.receives), ("send", step.sends)):
                    for message in messages:
                        call = Call(operation, "pp", 64, "float32", peer=step.peer_stage, tag=message.tag, batch=number)
                        events.append((Moment("train", 1, str(number)), call))
            elif "tp" in groups[rank]:
                events += [(Moment("train", 1, str(step)), Call("all_reduce", "tp", 64, "float32", "sum"))] * 2
        ends = [Call("all_reduce", group, 1, "float32", "sum") for group in ("dp", "world") if group in groups[rank]]
        programs.append(events + [(Moment("train", 1), call) for call in ends])
    return job_of(shape, programs)


def ends_plainly(job: Job, rule: str) -> bool:
    """Whether the job ends under a rule of `order.py`: try everything again and again until nothing changes."""
    ranks = range(job.num_ranks)
    items = [_items(job, rank) for rank in ranks]
    at = [0] * job.num_ranks
    posted: list[list[tuple[str, tuple[Call, ...]]]] = [[] for _ in ranks]
    done: list[set[int]] = [set() for _ in ranks]
    complete = _complete_posted if rule == "gloo" else _complete_streams
    changed = True
    while changed:
        changed = False
        for rank in ranks:
            while at[rank] < len(items[rank]):
                kind, group, detail = items[rank][at[rank]]
                if kind == "post":
                    posted[rank].append((group, detail))
                    at[rank] += 1
                    blocks = rule == "one at a time" or detail[0].operation in ("open", "barrier")
                    if blocks:
                        items[rank].insert(at[rank], ("block", group, len(posted[rank]) - 1))
                elif detail in done[rank]:
                    at[rank] += 1
                else:
                    break
                changed = True
        changed |= complete(job, posted, done)
    return all(at[rank] == len(items[rank]) for rank in ranks)


def _items(job: Job, rank: int) -> list[tuple[str, str, object]]:
    """(post, group, calls), or (block, group, place among what is posted)."""
    found: list[tuple[str, str, object]] = []
    unit_of_call: defaultdict[str, list[int]] = defaultdict(list)
    count = 0
    for _, events, _ in job.log(rank).spans:
        units = dict(units_of(events))
        inside = {i + k for i, calls in units.items() for k in range(len(calls))} - set(units)
        for i, event in enumerate(events):
            if isinstance(event, Wait):
                found.append(("block", event.group, unit_of_call[event.group][-event.back]))
            elif isinstance(event, Call) and i not in inside:
                calls = units.get(i, (event,))
                found.append(("post", event.group, calls))
                unit_of_call[event.group] += [count] * len(calls)
                count += 1
    return found


def _complete_streams(job: Job, posted: list, done: list[set[int]]) -> bool:
    def head(rank: int, group: str) -> int | None:
        mine = (k for k, (name, _) in enumerate(posted[rank]) if name == group and k not in done[rank])
        return next(mine, None)

    changed = False
    for rank in range(job.num_ranks):
        for group, ranks in job.groups[rank].items():
            first = head(rank, group)
            if first is None:
                continue
            calls = posted[rank][first][1]
            if calls[0].peer is None:
                heads = [head(other, group) for other in ranks]
                if all(h is not None and posted[other][h][1][0].peer is None for h, other in zip(heads, ranks, strict=True)):
                    for h, other in zip(heads, ranks, strict=True):
                        done[other].add(h)
                    changed = True
            else:
                other = ranks[calls[0].peer]
                h = head(other, group)
                theirs = () if h is None else posted[other][h][1]
                if theirs and theirs[0].peer == ranks.index(rank) and unit_of(theirs) == unit_of(calls).mirrored():
                    done[rank].add(first)
                    done[other].add(h)
                    changed = True
    return changed


def _complete_posted(job: Job, posted: list, done: list[set[int]]) -> bool:
    """A wait for one message of a batch is taken for all of it here, which is the same where batches mirror each other."""

    def count(rank: int, group: str, wanted: Callable[[Call], bool], upto: int | None = None) -> int:
        return sum(wanted(call) for name, calls in posted[rank][:upto] if name == group for call in calls)

    def is_collective(call: Call) -> bool:
        return call.peer is None

    changed = False
    for rank in range(job.num_ranks):
        for k, (group, calls) in enumerate(posted[rank]):
            if k in done[rank]:
                continue
            ranks = job.groups[rank][group]
            if calls[0].peer is None:
                mine = count(rank, group, is_collective, k + 1)
                ok = all(count(other, group, is_collective) >= mine for other in ranks)
            else:
                ok = True
                for call in calls:
                    same = lambda c, call=call: (c.operation, c.peer, c.tag) == (call.operation, call.peer, call.tag)  # noqa: E731
                    back = ("receive" if call.operation == "send" else "send", ranks.index(rank), call.tag)
                    meets = lambda c, back=back: (c.operation, c.peer, c.tag) == back  # noqa: E731
                    ok &= count(ranks[call.peer], group, meets) >= count(rank, group, same, k + 1)
            if ok:
                done[rank].add(k)
                changed = True
    return changed


@st.composite
def sound_programs(draw: st.DrawFn) -> tuple[MeshShape, Programs]:
    """One order of collectives and exchanges for all, seen by each rank; each waits for earlier calls where it likes."""
    shape = MeshShape(pp=draw(st.integers(1, 3)), dp=draw(st.integers(1, 2)), tp=draw(st.integers(1, 3)))
    programs: Programs = [[] for _ in range(shape.num_ranks)]
    groups = groups_of(shape)
    instances = sorted({(name, ranks) for own in groups for name, ranks in own.items()})
    for number in range(draw(st.integers(0, 14)) if instances else 0):
        name, ranks = draw(st.sampled_from(instances))
        moment = Moment("train", 1, draw(st.sampled_from(["F0", "B0"])))
        if draw(st.booleans()):
            low, high = draw(st.sampled_from([(i, j) for j in range(len(ranks)) for i in range(j)]))
            there, back = (
                [Call("send", name, draw(st.integers(1, 3)), "float32", tag=draw(st.integers(0, 2))) for _ in range(count)]
                for count in draw(st.sampled_from([(1, 0), (0, 1), (1, 1), (2, 1)]))
            )
            is_alone = len(there) + len(back) == 1 and draw(st.booleans())
            exchange(programs, ranks, name, (low, high), there, back, batch=0 if is_alone else number + 1, moment=moment)
        else:
            operation = draw(st.sampled_from(["all_reduce", "barrier", "reduce_scatter"]))
            collective(programs, ranks, Call(operation, name, draw(st.integers(1, 3)), "float32", site=f"{number}"), moment)
        for rank in ranks:
            if programs[rank] and draw(st.integers(0, 3)) == 0:
                other = draw(st.sampled_from(sorted({event.group for _, event in programs[rank]})))
                count = sum(isinstance(event, Call) and event.group == other for _, event in programs[rank])
                programs[rank].append((moment, Wait(other, draw(st.integers(1, count)))))
    return shape, programs
