"""Lowering: which exchanges a schedule gets, and that neighbours agree on each."""

from __future__ import annotations

import pytest

from megatronish.pipeline.lower import Exchange, Message, Step, lower, lower_all_stages
from megatronish.pipeline.prove import prove
from megatronish.pipeline.schedules import SCHEDULES, Action, Backward, Forward, actions_of_all_stages, one_f_one_b

SIZES = [(p, m) for p in (1, 2, 3, 5, 8) for m in (1, 2, 3, 7, 12)]


def all_forwards_first(stage: int, num_stages: int, num_microbatches: int) -> list[Action]:
    """GPipe (Huang et al. 2019)."""
    return [kind(i) for kind in (Forward, Backward) for i in range(num_microbatches)]


def written(steps: list[Step]) -> str:
    """F0 is an action; >1(a0) sends activation 0 to stage 1; <1(g0) receives gradient 0 from it; >1(a1)<1(g0) is one exchange."""

    def word(step: Step) -> str:
        if not isinstance(step, Exchange):
            return str(step)
        sends, receives = ([f"{m.kind[0]}{m.microbatch}" for m in messages] for messages in (step.sends, step.receives))
        peer = step.peer_stage
        return (f">{peer}({','.join(sends)})" if sends else "") + (f"<{peer}({','.join(receives)})" if receives else "")

    return " ".join(map(word, steps))


def test_1f1b_written_out() -> None:
    first, middle, last = map(written, lower_all_stages(actions_of_all_stages(one_f_one_b, 3, 3)))
    assert first == "F0 >1(a0) F1 >1(a1) F2 >1(a2)<1(g0) B0 <1(g1) B1 <1(g2) B2"
    assert middle == ("<0(a0) F0 >2(a0) <0(a1) F1 >2(a1)<2(g0) B0 >0(g0)<0(a2) F2 >2(a2)<2(g1) B1 >0(g1) <2(g2) B2 >0(g2)")
    assert last == "<1(a0) F0 B0 >1(g0)<1(a1) F1 B1 >1(g1)<1(a2) F2 B2 >1(g2)"


def test_one_stage_exchanges_nothing() -> None:
    actions = one_f_one_b(0, 1, 5)
    assert lower([actions], 0) == actions


@pytest.mark.parametrize("schedule", [*SCHEDULES.values(), all_forwards_first])
@pytest.mark.parametrize(("num_stages", "num_microbatches"), SIZES)
def test_lowering_keeps_the_actions_and_moves_each_tensor_once(schedule, num_stages: int, num_microbatches: int) -> None:
    actions_by_stage = actions_of_all_stages(schedule, num_stages, num_microbatches)
    for stage, steps in enumerate(lower_all_stages(actions_by_stage)):
        exchanges = [step for step in steps if isinstance(step, Exchange)]
        assert [step for step in steps if not isinstance(step, Exchange)] == actions_by_stage[stage]
        assert all(exchange.peer_stage in (stage - 1, stage + 1) for exchange in exchanges)
        activations = [Message("activation", i) for i in range(num_microbatches)]
        gradients = [Message("gradient", i) for i in range(num_microbatches)]
        to_next, to_previous = ([m for e in exchanges if e.peer_stage == peer for m in e.sends] for peer in (stage + 1, stage - 1))
        assert to_next == (activations if stage < num_stages - 1 else [])
        assert to_previous == (gradients if stage > 0 else [])


@pytest.mark.parametrize("schedule", [*SCHEDULES.values(), all_forwards_first])
@pytest.mark.parametrize(("num_stages", "num_microbatches"), SIZES)
def test_neighbours_list_the_same_exchanges_in_the_same_order(schedule, num_stages: int, num_microbatches: int) -> None:
    lowered = lower_all_stages(actions_of_all_stages(schedule, num_stages, num_microbatches))
    for stage in range(num_stages - 1):
        mine = [(e.sends, e.receives) for e in lowered[stage] if isinstance(e, Exchange) and e.peer_stage == stage + 1]
        theirs = [(e.receives, e.sends) for e in lowered[stage + 1] if isinstance(e, Exchange) and e.peer_stage == stage]
        assert mine == theirs


def test_steady_state_of_1f1b_is_two_way_exchanges() -> None:
    for steps in lower_all_stages(actions_of_all_stages(one_f_one_b, 4, 16))[1:-1]:
        first, last = steps.index(Backward(0)), steps.index(Forward(15))
        exchanges = [step for step in steps[first:last] if isinstance(step, Exchange)]
        assert exchanges and all(step.sends and step.receives for step in exchanges)


def test_merging_depends_on_what_the_neighbour_does_next() -> None:
    """The same actions on stage 0; only under 1F1B does stage 1 have the mirror image to merge with."""
    alternating, forwards_first = (actions_of_all_stages(schedule, 2, 2) for schedule in (one_f_one_b, all_forwards_first))
    assert alternating[0] == forwards_first[0]
    assert written(lower(alternating, 0)) == "F0 >1(a0) F1 >1(a1)<1(g0) B0 <1(g1) B1"
    assert written(lower(forwards_first, 0)) == "F0 >1(a0) F1 >1(a1) <1(g0) B0 <1(g1) B1"
    assert prove(lower_all_stages(forwards_first), 2).ok


def test_one_stage_lowers_as_it_does_among_all() -> None:
    actions_by_stage = actions_of_all_stages(one_f_one_b, 5, 7)
    assert [lower(actions_by_stage, stage) for stage in range(5)] == lower_all_stages(actions_by_stage)


def test_tags_are_unique_within_a_step_and_fit_a_32_bit_integer() -> None:
    messages = [
        Message(kind, microbatch, chunk)
        for kind in ("activation", "gradient")
        for microbatch in (*range(200), 2**24 - 1)
        for chunk in range(64)
    ]
    tags = {message.tag for message in messages}
    assert len(tags) == len(messages)
    assert min(tags) >= 0 and max(tags) < 2**31
