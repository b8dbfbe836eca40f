"""Calls that do not match are found, first things first, and the rank that is wrong is named; what matches is let through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatronish.comm.history import Call, Moment, Wait
from megatronish.parallel.mesh import MeshShape
from megatronish.preflight.check import check
from megatronish.preflight.job import Job, Log, Span
from megatronish.preflight.match import match, match_recent
from tests.preflight.jobs import Programs, collective, exchange, groups_of, job_of, sound_programs

Fault = Callable[[Programs], None]
SHAPE = MeshShape(pp=2, dp=3, tp=4)


def step_of_training() -> Programs:
    """Two steps of a small job, each call at its own site: tp sums, an exchange, a dp sum, the norm of all."""
    programs: Programs = [[] for _ in range(SHAPE.num_ranks)]
    groups = groups_of(SHAPE)

    def everywhere(name: str, call: Call, moment: Moment) -> None:
        for ranks in sorted({own[name] for own in groups if name in own}):
            collective(programs, ranks, call._replace(group=name), moment)

    for step in (1, 2):
        for layer in range(3):
            call = Call("all_reduce", "tp", 64, "bfloat16", "sum", what=f"layers.{layer}", site="tensor.py:7 forward")
            everywhere("tp", call, Moment("train", step, f"F{layer}"))
            for ranks in sorted({own["pp"] for own in groups}):
                there = Call("send", "pp", 64, "bfloat16", tag=2 * layer, what=f"activation {layer}", site="runtime.py:9 run")
                back = there._replace(tag=2 * layer + 1, what=f"gradient {layer}")
                moment = Moment("train", step, f"F{layer}")
                exchange(programs, ranks, "pp", (0, 1), [there], [back] if layer else [], batch=3 * step + layer, moment=moment)
        everywhere("dp", Call("reduce_scatter", "dp", 640, "float32", "sum", site="zero.py:50 reduce"), Moment("train", step))
        norm = Call("all_reduce", "world", 1, "float32", "sum", what="gradient norm", site="trainer.py:120 train_step")
        everywhere("world", norm, Moment("train", step))
    return programs


def change(rank: int, position: int, **to: object) -> Fault:
    def fault(programs: Programs) -> None:
        moment, event = programs[rank][position]
        programs[rank][position] = moment, event._replace(**to)  # type: ignore[arg-type]

    return fault


def drop(rank: int, position: int) -> Fault:
    return lambda programs: programs[rank].__delitem__(position)


def where(operation: str, number: int = 0, rank: int = 5) -> int:
    """The place of the n-th such call of a rank."""
    calls = [i for i, (_, event) in enumerate(step_of_training()[rank]) if isinstance(event, Call) and event.operation == operation]
    return calls[number]


NORM = where("reduce_scatter") + 1
FAULTS: dict[str, tuple[Fault, str, str]] = {
    "skips the norm": (
        drop(5, NORM),
        "collective",
        "rank 5 [pp0 dp1 tp1] skips all_reduce (sum) of 1 x float32 on world, gradient norm at trainer.py:120 train_step"
        " (train step 1), which rank 0 [pp0 dp0 tp0], ranks 1, 2 and 20 more do",
    ),
    "skips the second of three equal sums": (
        drop(5, where("all_reduce", 1)),
        "collective",
        "rank 5 [pp0 dp1 tp1] skips all_reduce (sum) of 64 x bfloat16 on tp, layers.1 at tensor.py:7 forward (train step 1 F1),"
        " which rank 4 [pp0 dp1 tp0] and ranks 6 and 7 do",
    ),
    "one more": (
        lambda programs: programs[5].insert(2, programs[5][where("all_reduce")]),
        "collective",
        "rank 5 [pp0 dp1 tp1] has one more: all_reduce (sum) of 64 x bfloat16 on tp, layers.0 at tensor.py:7 forward",
    ),
    "dtype": (change(5, 0, dtype="float32"), "collective", "rank 5 [pp0 dp1 tp1] does all_reduce (sum) of 64 x float32 on tp"),
    "count": (
        change(5, NORM - 1, num_elements=639),
        "collective",
        "rank 5 [pp0 dp1 tp1] does reduce_scatter (sum) of 639 x float32",
    ),
    "reduce op": (
        change(5, NORM, reduce_op="max"),
        "collective",
        "rank 5 [pp0 dp1 tp1] does all_reduce (max) of 1 x float32 on world",
    ),
    "size of a message": (change(5, where("send"), num_elements=65), "exchange", "rank 5 [pp0 dp1 tp1] does send of 65 x bfloat16"),
    "tag of a message": (change(5, where("send"), tag=99), "exchange", "rank 5 [pp0 dp1 tp1] does send of 64 x bfloat16"),
    "asymmetric batch": (drop(5, where("receive")), "exchange", "the batches are not mirror images"),
    "a batch in two": (change(5, where("receive"), batch=0), "left over", "rank 17 [pp1 dp1 tp1] nothing that meets it"),
    "never sends": (
        drop(5, where("send")),
        "left over",
        "rank 17 [pp1 dp1 tp1] has receive of 64 x bfloat16 on pp from place 0, activation 0 at runtime.py:9 run (train step 1 F0),"
        " and rank 5 [pp0 dp1 tp1] nothing that meets it: its next is receive",
    ),
    "sends twice": (
        lambda programs: programs[5].insert(
            where("send") + 1, (Moment("train", 1, "F0"), programs[5][where("send")][1]._replace(batch=77))
        ),
        "left over",
        "rank 5 [pp0 dp1 tp1] has send of 64 x bfloat16 on pp to place 1, activation 0",
    ),
}


def test_a_sound_job_has_no_findings() -> None:
    verdict = check(job_of(SHAPE, step_of_training()), "cuda")
    assert verdict.ok and all(verdict.passes.values())
    assert verdict.num_calls == sum(map(len, step_of_training()))
    # 12 tp sums of 6 groups, 2 dp sums of 8, 2 of all; 5 messages a step in each of 12 pipelines.
    assert (verdict.num_collectives, verdict.num_messages) == (6 * 6 + 2 * 8 + 2, 2 * 5 * 12)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_one_rank_is_found_first_and_laid_to_it(name: str) -> None:
    fault, kind, text = FAULTS[name]
    programs = step_of_training()
    fault(programs)
    first = match(job_of(SHAPE, programs))[0]
    assert (first.kind, first.culprits) == (kind, (5,)), first.text
    assert text in first.text


def test_the_odd_one_of_two_is_who_is_odd_among_all() -> None:
    shape = MeshShape(dp=3, tp=2)
    programs: Programs = [[] for _ in range(6)]
    for ranks in ((0, 1), (2, 3), (4, 5)):
        collective(programs, ranks, Call("all_reduce", "tp", 8, "float32", "sum", site="a.py:1 f"))
    programs[2] = [(Moment("train", 1), Call("all_gather", "tp", 8, "float32", site="a.py:2 g"))]
    (finding,) = match(job_of(shape, programs))
    assert (finding.culprits, finding.others) == ((2,), (3,))
    # In a job of two, nobody is odd: both are named.
    (finding,) = match(job_of(MeshShape(tp=2), programs[2:4]))
    assert finding.culprits == (0, 1)


def test_groups_that_are_alike_are_one_finding() -> None:
    programs = step_of_training()
    for rank in range(8, 12):
        del programs[rank][NORM - 1]
    (finding,) = match(job_of(SHAPE, programs))
    assert finding.copies == 4 and finding.culprits == (8, 9, 10, 11)
    assert str(finding).endswith("; and 3 more groups like it")
    assert "rank 8 [pp0 dp2 tp0] skips reduce_scatter" in str(finding)


def test_two_odd_ranks_of_a_group_are_two_findings() -> None:
    programs = step_of_training()
    change(2, 0, dtype="float32")(programs)
    change(3, 0, num_elements=63)(programs)
    assert [finding.culprits for finding in match(job_of(SHAPE, programs))] == [(2,), (3,)]


def test_members_that_disagree_on_a_group_are_named() -> None:
    job = job_of(SHAPE, step_of_training())
    groups = [dict(own) for own in job.groups]
    groups[5]["dp"] = (1, 5, 10)
    findings = match(replace(job, groups=groups))
    assert {finding.kind for finding in findings} == {"members"}
    assert (
        "rank 5 [pp0 dp1 tp1] is not in dp of ranks 1, 5, 9, which rank 1 [pp0 dp0 tp1] and rank 9 [pp0 dp2 tp1] opened: the dp of"
        in (findings[0].text + findings[1].text)
    )
    del groups[5]["dp"]
    assert any("rank 5 [pp0 dp1 tp1] calls on dp, a group that it is not in" in f.text for f in match(replace(job, groups=groups)))


def test_boundaries_of_spans_do_not_matter() -> None:
    calls = tuple(Call("all_reduce", "tp", n, "float32", "sum") for n in range(4))
    cut = [Span(Moment("a"), calls[:1]), Span(Moment("b"), calls[1:])]
    job = Job(MeshShape(tp=2), [Log(cut), Log([Span(Moment(), calls)])], [0, 1], groups_of(MeshShape(tp=2)))
    assert not match(job)


def test_what_was_done_last_is_compared_as_far_as_all_remember() -> None:
    calls = [(Moment("train", n), Call("all_reduce", "dp", n, "float32", "sum")) for n in range(10)]
    name = "rank {}".format
    behind = {0: (0, calls), 1: (4, calls[4:]), 2: (2, calls[2:7])}
    assert not match_recent("dp", behind, name=name)
    wrong = (2, [*calls[2:5], (Moment("train", 5), Call("barrier", "dp")), *calls[5:7]])
    (finding,) = match_recent("dp", {**behind, 3: wrong}, name=name)
    assert finding.culprits == (3,)
    assert (
        "rank 3 has one more: barrier on dp (train step 5), where rank 0 and ranks 1 and 2 do all_reduce (sum) of 5" in finding.text
    )
    assert "call 6 of dp" in finding.text


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_sound_programs_have_no_findings_and_one_mutation_is_found(data: st.DataObject) -> None:
    shape, programs = data.draw(sound_programs())
    assert check(job_of(shape, programs), "cuda").ok
    places = [(rank, i) for rank, program in enumerate(programs) for i, (_, event) in enumerate(program) if isinstance(event, Call)]
    if not places:
        return
    rank, i = data.draw(st.sampled_from(places))
    moment, call = programs[rank][i]
    assert isinstance(call, Call)
    mutation = data.draw(st.sampled_from(["drop", "dtype", "count", "operation", "double"]))
    if mutation == "drop":
        del programs[rank][i]
        # A wait for what is no longer there would be another fault.
        programs[rank] = [(m, e) for m, e in programs[rank] if not isinstance(e, Wait)]
    elif mutation == "double":
        programs[rank].insert(i, (moment, call._replace(batch=call.batch and 10_000)))
    elif mutation == "operation":
        other = {"send": "receive", "receive": "send", "all_reduce": "all_gather"}
        programs[rank][i] = moment, call._replace(operation=other.get(call.operation, "all_reduce"))
    else:
        programs[rank][i] = moment, call._replace(**{"dtype": "int8"} if mutation == "dtype" else {"num_elements": 777})
    findings = match(job_of(shape, programs))
    assert findings
    concerned = {*findings[0].culprits, *findings[0].others}
    assert rank in concerned, findings[0].text
    size = len(groups_of(shape)[rank][call.group])
    if size > 2 and call.peer is None:
        assert findings[0].culprits == (rank,), findings[0].text
