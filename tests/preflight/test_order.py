"""Jobs that wait in a circle are found, those that end are let through: as a plain simulation of every rank says, and the proof of
pipeline schedules."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatronish.comm.history import Call, Moment, Wait
from megatronish.parallel.mesh import MeshShape
from megatronish.pipeline.lower import Exchange, Message, lower_all_stages
from megatronish.pipeline.prove import prove
from megatronish.pipeline.schedules import Backward, Forward, actions_of_all_stages
from megatronish.preflight.check import check
from megatronish.preflight.coding import CodedJob
from megatronish.preflight.match import match
from megatronish.preflight.order import Order, Rule, check_order
from megatronish.preflight.waits import Blocked, why_blocked
from tests.preflight.jobs import Programs, collective, ends_plainly, groups_of, job_of, job_of_steps, sound_programs

RULES: tuple[Rule, ...] = ("one at a time", "nccl", "gloo")
TRAIN = Moment("train", 1)


def order_of(shape: MeshShape, programs: Programs, device_kind: str = "cuda") -> Order:
    job = job_of(shape, programs)
    assert not match(job)
    return check_order(CodedJob(job), device_kind)


def tp_then_dp(*, waits: bool) -> Programs:
    """Four ranks (dp2 tp2): a sum over tp, a gather over dp, at their sites."""
    programs: Programs = [[] for _ in range(4)]
    for ranks in ((0, 1), (2, 3)):
        collective(programs, ranks, Call("all_reduce", "tp", 1, "float32", "sum", what="gradient norm", site="a.py:1 norm"))
    for ranks in ((0, 2), (1, 3)):
        collective(programs, ranks, Call("all_gather", "dp", 8, "float32", site="b.py:2 gather"))
    if waits:
        programs = [[programs[r][0], (TRAIN, Wait("tp", 1)), programs[r][1], (TRAIN, Wait("dp", 1))] for r in range(4)]
    return programs


def invert(programs: Programs, ranks: tuple[int, ...]) -> None:
    """These ranks do the second half first."""
    for rank in ranks:
        half = len(programs[rank]) // 2
        programs[rank] = programs[rank][half:] + programs[rank][:half]


def test_an_order_inverted_in_a_circle_hangs_where_ranks_wait() -> None:
    programs = tp_then_dp(waits=True)
    invert(programs, (0, 3))
    order = order_of(MeshShape(dp=2, tp=2), programs)
    assert order.passes == dict.fromkeys(RULES, False)
    assert order.finding is not None and order.finding.kind == "hang"
    assert (
        "rank 0 [pp0 dp0 tp0], in all_gather of 8 x float32 on dp at b.py:2 gather (train step 1), waits for rank 2 [pp0 dp1 tp0],"
        " which is in all_reduce (sum) of 1 x float32 on tp, gradient norm at a.py:1 norm (train step 1)"
        " and waits for rank 3 [pp0 dp1 tp1]"
    ) in order.finding.text
    assert order.finding.text.split(" (hangs")[0].endswith("and waits for rank 0 [pp0 dp0 tp0]")


def test_the_same_without_waits_is_an_order_that_nccl_does_not_promise() -> None:
    programs = tp_then_dp(waits=False)
    invert(programs, (0, 3))
    order = order_of(MeshShape(dp=2, tp=2), programs)
    assert order.passes == {"one at a time": False, "nccl": True, "gloo": True}
    assert order.finding is not None and order.finding.kind == "order" and "NCCL asks" in order.finding.text
    assert order_of(MeshShape(dp=2, tp=2), programs, "cpu").finding is None


def test_one_odd_rank_of_many_is_the_culprit() -> None:
    shape = MeshShape(dp=2, tp=4)
    programs: Programs = [[] for _ in range(8)]
    for number in range(3):
        for ranks in ((0, 4), (1, 5), (2, 6), (3, 7)):
            collective(programs, ranks, Call("reduce_scatter", "dp", number, "float32", "sum", site="zero.py:1 reduce"))
        collective(programs, range(8), Call("all_reduce", "world", number, "float32", "sum", site="trainer.py:2 norm"))
    programs[6][2], programs[6][3] = programs[6][3], programs[6][2]
    finding = order_of(shape, programs).finding
    assert finding is not None and finding.culprits == (6,)
    assert (
        "unlike most of its stage, rank 6 [pp0 dp1 tp2] does all_reduce (sum) of 1 x float32 on world at trainer.py:2"
        in finding.text
    )


@pytest.mark.parametrize(("batches", "passes"), [(True, True), (False, False)])
def test_both_ends_sending_first_hang_on_nccl_unless_it_is_a_batch(batches: bool, passes: bool) -> None:
    programs: Programs = []
    for rank in range(2):
        send = Call("send", "pp", 8, "float32", peer=1 - rank, batch=int(batches), site="x.py:1 f")
        programs.append([(TRAIN, send), (TRAIN, send._replace(operation="receive")), (TRAIN, Wait("pp", 1))])
    order = order_of(MeshShape(pp=2), programs)
    assert order.passes == {"one at a time": passes, "nccl": passes, "gloo": True}
    if order.finding is not None:
        assert order.finding.kind == "hang" and order.finding.culprits == (0, 1)
    assert order_of(MeshShape(pp=2), programs, "cpu").finding is None


def test_a_host_wait_between_two_halves_of_an_exchange_hangs() -> None:
    programs: Programs = []
    for rank in range(2):
        receive = Call("receive", "pp", 8, "float32", peer=1 - rank, batch=1)
        send = receive._replace(operation="send", batch=2)
        first = [(TRAIN, receive), (TRAIN, Wait("pp", 1)), (TRAIN, send)]
        programs.append(first)
    # Each waits for what the other sends only afterwards; batches do not mirror each other either.
    assert match(job_of(MeshShape(pp=2), programs))
    alone = [[(m, e._replace(batch=0)) if isinstance(e, Call) else (m, e) for m, e in program] for program in programs]
    assert order_of(MeshShape(pp=2), alone).passes == dict.fromkeys(RULES, False)


@pytest.mark.parametrize("name", ["1f1b", "gpipe", "interleaved"])
@pytest.mark.parametrize(("num_stages", "num_microbatches"), [(1, 2), (2, 1), (2, 5), (4, 8), (8, 3)])
def test_schedules_end(name: str, num_stages: int, num_microbatches: int) -> None:
    actions = actions_of_all_stages(name, num_stages, num_microbatches, num_chunks=2 if name == "interleaved" else 1)
    job = job_of_steps(lower_all_stages(actions), dp=2)
    verdict = check(job, "cuda")
    assert verdict.ok and verdict.passes == dict.fromkeys(RULES, True)
    assert verdict.num_simulated == num_stages
    assert check(job, "cuda", every_rank=True).passes == verdict.passes


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_lists_that_the_schedules_proof_refuses_are_refused(data: st.DataObject) -> None:
    """Any exchange moved to another place of one stage's list: what `prove` says of rendezvous is what is said here."""
    num_stages, num_microbatches = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 4))
    name = data.draw(st.sampled_from(["1f1b", "gpipe"]))
    lists = lower_all_stages(actions_of_all_stages(name, num_stages, num_microbatches))
    steps = lists[data.draw(st.integers(0, num_stages - 1))]
    moved = steps.pop(data.draw(st.sampled_from([i for i, step in enumerate(steps) if isinstance(step, Exchange)])))
    steps.insert(data.draw(st.integers(0, len(steps))), moved)
    proof = prove(lists, num_microbatches)
    # Where exchanges of a pair no longer mirror each other, that is a finding of its own.
    assert check(job_of_steps(lists), "cuda").ok == ("rendezvous" not in proof.failures)


def test_a_known_circle_of_stages_is_told_as_the_proof_tells_it() -> None:
    there, back = Message("activation", 0, 0), Message("gradient", 0, 1)
    lists = [
        [Forward(0), Exchange(1, receives=(back,)), Exchange(1, sends=(there,)), Backward(0)],
        [Exchange(0, receives=(there,)), Forward(0), Backward(0), Exchange(0, sends=(back,))],
    ]
    assert "rendezvous" in prove(lists, 1).failures
    assert not check(job_of_steps(lists), "cuda").ok


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_verdict_is_that_of_a_plain_simulation_of_every_rank(data: st.DataObject) -> None:
    """Sound programs, and such with two neighbours of one rank swapped, which may or may not end: three rules, with classes and
    without. And what ends one at a time ends under all."""
    shape, programs = data.draw(sound_programs())
    for _ in range(data.draw(st.integers(0, 3))):
        rank = data.draw(st.integers(0, shape.num_ranks - 1))
        swappable = [
            i
            for i in range(len(programs[rank]) - 1)
            if isinstance(first := programs[rank][i][1], Call)
            and isinstance(second := programs[rank][i + 1][1], Call)
            and (first.group != second.group or (first.peer is None) != (second.peer is None))
        ]
        if swappable:
            i = data.draw(st.sampled_from(swappable))
            programs[rank][i : i + 2] = reversed(programs[rank][i : i + 2])
    job = job_of(shape, programs)
    if match(job):
        return
    order, full = (check_order(CodedJob(job), "cuda", every_rank=every_rank) for every_rank in (False, True))
    plainly = {rule: ends_plainly(job, rule) for rule in RULES}
    assert order.passes == full.passes == plainly
    if plainly["one at a time"]:
        assert all(plainly.values())
    else:
        assert order.finding is not None and order.finding.culprits and "waits for" in order.finding.text


def test_ranks_that_cannot_be_told_apart_are_simulated_once() -> None:
    shape = MeshShape(pp=4, dp=4, tp=2)
    groups = groups_of(shape)
    programs: Programs = [[] for _ in range(shape.num_ranks)]
    for name in ("tp", "dp", "pp", "ends", "world"):
        for ranks in sorted({own[name] for own in groups if name in own}):
            collective(programs, ranks, Call("all_reduce", name, 1, "float32", "sum"))
    # The first and the last stage are one kind here, the inner ones another: nobody exchanges with a neighbour.
    assert order_of(shape, programs).num_simulated == 2


def test_why_blocked_names_who_is_waited_for_or_the_circle() -> None:
    blocked = {0: Blocked("all_reduce on dp", (7,)), 1: Blocked("all_reduce on dp", (7,)), 2: Blocked("all_gather on tp", (0,))}
    name, fate = "rank {}".format, lambda rank: "is in the data loader"
    cause = why_blocked(blocked, name=name, fate=fate)
    assert cause is not None and cause.ranks == (7,) and not cause.is_cycle
    assert cause.text == "rank 0, in all_reduce on dp, waits for rank 7 (and so does 1 more), which is in the data loader"
    cause = why_blocked({0: Blocked("X", (1,)), 1: Blocked("Y", (2, 0)), 2: Blocked("Z", (1,))}, name=name, fate=fate)
    assert cause is not None and cause.is_cycle
    assert cause.text == "rank 0, in X, waits for rank 1, which is in Y and waits for rank 0"
    assert why_blocked({}, name=name, fate=fate) is None
