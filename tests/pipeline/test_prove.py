"""The proof: it passes every shipped schedule, and finds planted faults under the rule that they break."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatronish import formulas
from megatronish.pipeline.lower import Exchange, Message, Step, lower_all_stages
from megatronish.pipeline.prove import Proof, prove
from megatronish.pipeline.schedules import Backward, Forward
from megatronish.pipeline.timeline import makespan, timeline
from tests.pipeline.cases import ROWS, Row


def lowered_1f1b(num_stages: int, num_microbatches: int) -> list[list[Step]]:
    return Row("1f1b", 1).lowered(num_stages, num_microbatches)


def failed_checks(proof: Proof) -> set[str]:
    return set(proof.failures)


def check_sound(row: Row, num_stages: int, num_microbatches: int) -> None:
    actions = row.actions(num_stages, num_microbatches)
    proof = prove(lower_all_stages(actions), num_microbatches)
    assert proof.ok, (num_stages, num_microbatches, proof.message)
    assert proof.busy_time == 3 * num_stages * num_microbatches * row.num_chunks
    assert proof.unit_time is not None
    if row.name == "interleaved" and num_microbatches % num_stages:
        assert proof.unit_time <= 1.05 * makespan(timeline(actions))
    else:
        # In-order streams cost nothing: the bubble is the one of free communication, with fewer microbatches than stages too.
        assert proof.unit_time == 3 * (num_microbatches * row.num_chunks + num_stages - 1)
    for stage, peak in enumerate(proof.peak_in_flight):
        limits = {"num_stages": num_stages, "num_microbatches": num_microbatches, "num_chunks": row.num_chunks}
        assert peak <= formulas.pipeline_peak_in_flight(row.name, stage=stage, **limits)
    # Tensors that came before their turn.
    assert max(proof.peak_received) <= {"gpipe": 1, "1f1b": 2, "interleaved": 6}[row.name]


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("num_stages", range(1, 17))
def test_schedules_are_sound_up_to_16_stages_and_64_microbatches(row: Row, num_stages: int) -> None:
    numbers = {1, 2, num_stages - 1, num_stages, num_stages + 1, 2 * num_stages, 27}
    for num_microbatches in sorted(numbers - {0}):
        check_sound(row, num_stages, num_microbatches)
    if num_stages in (2, 16):
        check_sound(row, num_stages, 64)


@pytest.mark.parity_all
@pytest.mark.timeout(900)
@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("num_stages", range(1, 17))
def test_every_schedule_is_sound_for_every_number_of_microbatches(row: Row, num_stages: int) -> None:
    for num_microbatches in range(1, 65):
        check_sound(row, num_stages, num_microbatches)


def test_makespan_of_a_case_worked_by_hand() -> None:
    """Two stages, one microbatch, strictly one after the other: F F B B = 1 + 1 + 2 + 2."""
    proof = prove(lowered_1f1b(2, 1), 1)
    assert (proof.unit_time, proof.busy_time, proof.idle_fraction) == (6, 6, 0.5)


@pytest.mark.parametrize(("num_stages", "num_microbatches"), [(1, 1), (2, 1), (3, 8), (16, 5)])
def test_forwards_alone_deadlock_under_neither_rule(num_stages: int, num_microbatches: int) -> None:
    """Evaluation runs such a list; as a training step it lacks the backwards."""
    forwards = [[Forward(i) for i in range(num_microbatches)] for _ in range(num_stages)]
    proof = prove(lower_all_stages(forwards), num_microbatches)
    assert failed_checks(proof) == {"data"}
    assert proof.unit_time == num_microbatches + num_stages - 1


def split_two_way(steps: list[Step], *, first: str) -> list[Step]:
    """Each two-way exchange in two, the send or the receive first."""
    result: list[Step] = []
    for step in steps:
        if isinstance(step, Exchange) and step.sends and step.receives:
            halves = [Exchange(step.peer_stage, sends=step.sends), Exchange(step.peer_stage, receives=step.receives)]
            result += halves if first == "send" else halves[::-1]
        else:
            result.append(step)
    return result


@pytest.mark.parametrize(("num_stages", "num_microbatches"), [(2, 4), (4, 8), (16, 64)])
def test_sending_before_receiving_on_both_sides_deadlocks_under_rendezvous_only(num_stages: int, num_microbatches: int) -> None:
    lowered = [split_two_way(steps, first="send") for steps in lowered_1f1b(num_stages, num_microbatches)]
    proof = prove(lowered, num_microbatches)
    assert failed_checks(proof) == {"rendezvous"}
    assert "Cycle: stage" in proof.message
    assert proof.unit_time is None and proof.idle_fraction is None


def test_one_un_merged_exchange_deadlocks_under_rendezvous_and_the_message_names_it() -> None:
    lowered = lowered_1f1b(2, 3)
    two_way = [next(i for i, s in enumerate(steps) if isinstance(s, Exchange) and s.sends and s.receives) for steps in lowered]
    faulty = [
        steps[:i] + split_two_way(steps[i : i + 1], first="send") + steps[i + 1 :]
        for steps, i in zip(lowered, two_way, strict=True)
    ]
    proof = prove(faulty, 3)
    assert proof.failures == {
        "rendezvous": "stuck: stage 0 at step 7, exchange with stage 1 (sends activation 2 of part 0); "
        "stage 1 at step 7, exchange with stage 0 (sends gradient 1 of part 1). "
        "Cycle: stage 0 waits for stage 1, which waits for stage 0"
    }


@pytest.mark.parametrize(("num_stages", "num_microbatches"), [(2, 4), (4, 8), (16, 64)])
def test_receiving_before_sending_on_both_sides_deadlocks_under_both_rules(num_stages: int, num_microbatches: int) -> None:
    lowered = [split_two_way(steps, first="receive") for steps in lowered_1f1b(num_stages, num_microbatches)]
    assert {"buffered", "rendezvous"} <= failed_checks(prove(lowered, num_microbatches))


def test_sending_first_on_one_side_and_receiving_first_on_the_other_is_sound() -> None:
    """Not every un-merged list is refused: a checker that refuses all but ours would pass the tests above."""
    first, second = lowered_1f1b(2, 5)
    assert prove([split_two_way(first, first="send"), split_two_way(second, first="receive")], 5).ok


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_two_exchanges_of_an_edge_swapped_on_one_stage_are_found_under_rendezvous(data: st.DataObject) -> None:
    num_stages, num_microbatches = data.draw(st.integers(2, 6)), data.draw(st.integers(2, 9))
    lowered = data.draw(st.sampled_from(ROWS)).lowered(num_stages, num_microbatches)
    stage = data.draw(st.integers(0, num_stages - 1))
    steps = lowered[stage]
    peer = data.draw(st.sampled_from(sorted({step.peer_stage for step in steps if isinstance(step, Exchange)})))
    places = [i for i, step in enumerate(steps) if isinstance(step, Exchange) and step.peer_stage == peer]
    i, j = data.draw(st.lists(st.sampled_from(places), min_size=2, max_size=2, unique=True))
    steps[i], steps[j] = steps[j], steps[i]
    assert "rendezvous" in prove(lowered, num_microbatches).failures


def test_a_send_behind_the_receive_that_depends_on_it_is_found() -> None:
    """Stage 0 of two swaps [send activation 0] with [receive gradient 0]: nobody can go on under either rule."""
    lowered = lowered_1f1b(2, 1)
    assert [str(step) for step in lowered[0]][1:3] == [
        "exchange with stage 1 (sends activation 0 of part 0)",
        "exchange with stage 1 (receives gradient 0 of part 1)",
    ]
    lowered[0][1], lowered[0][2] = lowered[0][2], lowered[0][1]
    proof = prove(lowered, 1)
    assert failed_checks(proof) == {"buffered", "rendezvous"}
    assert proof.failures["buffered"].endswith("Cycle: stage 0 waits for stage 1, which waits for stage 0")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_dropped_message_is_found_under_every_rule(data: st.DataObject) -> None:
    num_stages, num_microbatches = data.draw(st.integers(2, 6)), data.draw(st.integers(1, 9))
    lowered = data.draw(st.sampled_from(ROWS)).lowered(num_stages, num_microbatches)
    direction = data.draw(st.sampled_from(["sends", "receives"]))
    places = [
        (stage, i)
        for stage, steps in enumerate(lowered)
        for i, step in enumerate(steps)
        if isinstance(step, Exchange) and getattr(step, direction)
    ]
    stage, i = data.draw(st.sampled_from(places))
    step = lowered[stage][i]
    assert isinstance(step, Exchange)
    kept = Exchange(step.peer_stage, sends=() if direction == "sends" else step.sends, receives=step.receives)
    if direction == "receives":
        kept = Exchange(step.peer_stage, sends=step.sends)
    lowered[stage][i : i + 1] = [kept] if kept.sends or kept.receives else []
    proof = prove(lowered, num_microbatches)
    assert failed_checks(proof) == {"data", "buffered", "rendezvous"}
    if direction == "receives":
        assert "sent but never received" in proof.failures["buffered"]
        assert "before" in proof.failures["data"] and "has arrived" in proof.failures["data"]


def test_a_left_over_send_is_found_and_named() -> None:
    lowered = lowered_1f1b(3, 4)
    lowered[1].append(Exchange(2, sends=(Message("activation", 3, 1),)))
    proof = prove(lowered, 4)
    assert proof.failures == {
        "data": "stage 1: activation 3 of part 1 is sent twice",
        "buffered": "sent but never received: activation 3 of part 1 from stage 1 to stage 2",
        "rendezvous": f"stuck: stage 1 at step {len(lowered[1]) - 1}, exchange with stage 2 (sends activation 3 of part 1). "
        "No cycle: stage 1 waits for stage 2, which has ended",
    }


def test_message_order_matters_where_names_are_ignored() -> None:
    """Two activations in one exchange, listed in another order by the receiver: right by tag, swapped by order."""
    first, second = (Message("activation", i, 0) for i in (0, 1))
    gradients = [Exchange(1, receives=(Message("gradient", i, 1),)) for i in (0, 1)]
    returned = [Exchange(0, sends=(Message("gradient", i, 1),)) for i in (0, 1)]
    sender = [Forward(0), Forward(1), Exchange(1, sends=(first, second)), gradients[0], Backward(0), gradients[1], Backward(1)]

    def receiver(*messages: Message) -> list[Step]:
        return [Exchange(0, receives=messages), Forward(0), Backward(0), returned[0], Forward(1), Backward(1), returned[1]]

    assert prove([sender, receiver(first, second)], 2).ok
    assert failed_checks(prove([sender, receiver(second, first)], 2)) == {"rendezvous"}


def test_a_cycle_over_four_stages_is_named_whole() -> None:
    """A ring cannot come from a chain of stages, but the words must hold for any graph of waits."""
    ring: list[list[Step]] = [[Exchange((stage + 1) % 4, sends=(Message("activation", 0, stage),))] for stage in range(4)]
    words = "stage 0 waits for stage 1, which waits for stage 2, which waits for stage 3, which waits for stage 0"
    assert prove(ring, 1).failures["rendezvous"].endswith(f"Cycle: {words}")


@pytest.mark.parametrize(
    ("steps", "problem"),
    [
        ([Forward(0), Backward(0), Forward(1)], "never runs B1"),
        ([Forward(0), Backward(0)], "never runs B1, F1"),
        ([Forward(0), Forward(0), Backward(0), Forward(1), Backward(1)], "F0 runs twice"),
        ([Forward(0), Backward(0), Backward(0), Forward(1), Backward(1)], "B0 runs twice"),
        ([Backward(0), Forward(0), Forward(1), Backward(1)], "B0 runs before F0"),
        ([Forward(0), Backward(0), Forward(1), Backward(1), Forward(2), Backward(2)], "runs B2, F2, not of this step"),
        ([Forward(0), Exchange(0), Backward(0), Forward(1), Backward(1)], "an empty exchange with stage 0"),
    ],
)
def test_a_wrong_list_of_one_stage_is_named(steps: list[Step], problem: str) -> None:
    assert prove([steps], 2).failures["data"] == f"stage 0: {problem}"


@pytest.mark.parametrize(
    ("exchange", "place", "problem"),
    [
        (Exchange(1, sends=(Message("activation", 1, 0),)), 0, "activation 1 of part 0 is sent before it is made"),
        (Exchange(1, sends=(Message("gradient", 0, 0),)), -1, "gradient 0 of part 0 is sent to stage 1"),
        (Exchange(2, sends=(Message("activation", 0, 0),)), -1, "activation 0 of part 0 is sent to stage 2"),
        (Exchange(-1, sends=(Message("gradient", 0, 0),)), -1, "gradient 0 of part 0 is sent to stage -1"),
        (Exchange(1, receives=(Message("activation", 0, 1),)), -1, "activation 0 of part 1 is received from stage 1"),
        (Exchange(1, receives=(Message("gradient", 0, 1),)), -1, "gradient 0 of part 1 is received twice"),
    ],
)
def test_a_wrong_exchange_of_one_stage_is_named(exchange: Exchange, place: int, problem: str) -> None:
    lowered = lowered_1f1b(2, 2)
    lowered[0].insert(place, exchange)
    assert prove(lowered, 2).failures["data"] == f"stage 0: {problem}"
