"""Lowering: which exchanges a schedule gets, and that neighbours agree on each."""

from __future__ import annotations

from itertools import pairwise

import pytest

from megatronish.pipeline.lower import MAX_MICROBATCHES, MAX_PARTS, Exchange, Message, Step, destination, lower, lower_all_stages
from megatronish.pipeline.schedules import Backward, Forward
from tests.pipeline.cases import ROWS, Row

ONE_F_ONE_B = Row("1f1b", 1)

SIZES = [(p, m) for p in (1, 2, 3, 5, 8) for m in (1, 2, 3, 7, 12)]


def written(steps: list[Step]) -> str:
    """F0 is an action; >1(a0) sends activation 0 to stage 1; <1(g0) receives gradient 0 from it; >1(a1)<1(g0) is one exchange. With
    chunks parts are named too: a0/2 is made by part 2."""
    has_chunks = any(isinstance(step, Forward) and step.chunk for step in steps)

    def letter(message: Message) -> str:
        return f"{message.kind[0]}{message.microbatch}" + (f"/{message.part}" if has_chunks else "")

    def word(step: Step) -> str:
        if not isinstance(step, Exchange):
            return str(step)
        sends, receives = ([letter(m) for m in messages] for messages in (step.sends, step.receives))
        peer = step.peer_stage
        return (f">{peer}({','.join(sends)})" if sends else "") + (f"<{peer}({','.join(receives)})" if receives else "")

    return " ".join(map(word, steps))


def test_1f1b_written_out() -> None:
    """Activation 2 leaves as soon as it is made, while the stage behind waits for its first gradient."""
    first, middle, last = map(written, ONE_F_ONE_B.lowered(3, 3))
    assert first == "F0 >1(a0) F1 >1(a1) F2 >1(a2) <1(g0) B0 <1(g1) B1 <1(g2) B2"
    assert middle == "<0(a0) F0 <0(a1) >2(a0) F1 <0(a2) >2(a1) <2(g0) B0 >0(g0) F2 >2(a2)<2(g1) B1 >0(g1) <2(g2) B2 >0(g2)"
    assert last == "<1(a0) F0 <1(a1) B0 >1(g0) F1 B1 >1(g1)<1(a2) F2 B2 >1(g2)"


def test_two_interleaved_stages_meet_in_a_ring() -> None:
    """The last stage's first chunk feeds the first stage's second, over the same edge as the activations that go the other way."""
    first, last = map(written, Row("interleaved", 2).lowered(2, 2))
    assert first.split(" B0.1")[0] == "F0 >1(a0/0) F1 >1(a1/0)<1(a0/1) F0.1 >1(a0/2)<1(a1/1) F1.1 >1(a1/2) <1(g0/3)"
    assert last.split(" B0.1")[0] == "<0(a0/0) F0 >0(a0/1)<0(a1/0) F1 >0(a1/1)<0(a0/2) F0.1 <0(a1/2)"


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_one_stage_exchanges_nothing(row: Row) -> None:
    actions = row.actions(1, 5)
    assert lower(actions, 0) == actions[0]


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize(("num_stages", "num_microbatches"), SIZES)
def test_lowering_keeps_the_actions_and_moves_each_tensor_once(row: Row, num_stages: int, num_microbatches: int) -> None:
    actions_by_stage = row.actions(num_stages, num_microbatches)
    num_parts = num_stages * row.num_chunks
    messages = [Message("activation", i, part) for i in range(num_microbatches) for part in range(num_parts - 1)]
    messages += [Message("gradient", i, part) for i in range(num_microbatches) for part in range(1, num_parts)]
    for stage, steps in enumerate(lower_all_stages(actions_by_stage)):
        exchanges = [step for step in steps if isinstance(step, Exchange)]
        assert [step for step in steps if not isinstance(step, Exchange)] == actions_by_stage[stage]
        sent = [(message, exchange.peer_stage) for exchange in exchanges for message in exchange.sends]
        received = [(message, exchange.peer_stage) for exchange in exchanges for message in exchange.receives]
        ends = {m: (m.part % num_stages, destination(m) % num_stages) for m in messages if num_stages > 1}
        assert len(sent) + len(received) == len({*sent, *received})
        assert set(sent) == {(m, to) for m, (source, to) in ends.items() if source == stage}
        assert set(received) == {(m, source) for m, (source, to) in ends.items() if to == stage}


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize(("num_stages", "num_microbatches"), SIZES)
def test_two_stages_list_the_same_exchanges_in_the_same_order(row: Row, num_stages: int, num_microbatches: int) -> None:
    lowered = row.lowered(num_stages, num_microbatches)
    exchanges = [[step for step in steps if isinstance(step, Exchange)] for steps in lowered]
    for one in range(num_stages):
        for other in range(one):
            mine = [(e.sends, e.receives) for e in exchanges[one] if e.peer_stage == other]
            theirs = [(e.receives, e.sends) for e in exchanges[other] if e.peer_stage == one]
            assert mine == theirs


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_what_is_made_is_sent_before_anything_else_is_computed(row: Row) -> None:
    """Nobody waits for a tensor that is ready; with few microbatches the last stage's forward is all that sends nothing."""
    for stage, steps in enumerate(row.lowered(4, 12)):
        for step, later in pairwise(steps):
            if isinstance(step, Forward | Backward):
                part = step.chunk * 4 + stage
                makes = part < 4 * row.num_chunks - 1 if isinstance(step, Forward) else part > 0
                sent: set[Message] = set()
                for following in steps[steps.index(later) :]:
                    if not isinstance(following, Exchange):
                        break
                    sent.update(following.sends)
                kind = "activation" if isinstance(step, Forward) else "gradient"
                assert (Message(kind, step.microbatch, part) in sent) == makes


def test_steady_state_of_1f1b_is_two_way_exchanges() -> None:
    for steps in ONE_F_ONE_B.lowered(4, 16)[1:-1]:
        first, last = steps.index(Backward(3)), steps.index(Forward(15))
        exchanges = [step for step in steps[first:last] if isinstance(step, Exchange)]
        assert exchanges and all(step.sends and step.receives for step in exchanges)


def test_merging_depends_on_what_the_other_stage_does() -> None:
    """The same actions on stage 0; under 1F1B stage 1 has gradient 1 ready later."""
    alternating, forwards_first = ONE_F_ONE_B.actions(2, 2), Row("gpipe", 1).actions(2, 2)
    assert alternating[0] == forwards_first[0]
    assert written(lower(alternating, 1)) == "<0(a0) F0 <0(a1) B0 >0(g0) F1 B1 >0(g1)"
    assert written(lower(forwards_first, 1)) == "<0(a0) F0 <0(a1) F1 B0 >0(g0) B1 >0(g1)"


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_one_stage_lowers_as_it_does_among_all(row: Row) -> None:
    actions_by_stage = row.actions(5, 7)
    assert [lower(actions_by_stage, stage) for stage in range(5)] == lower_all_stages(actions_by_stage)


def test_tags_are_unique_within_a_step_and_fit_a_32_bit_integer() -> None:
    messages = [
        Message(kind, microbatch, part)
        for kind in ("activation", "gradient")
        for microbatch in (*range(40), MAX_MICROBATCHES - 1)
        for part in (*range(40), MAX_PARTS - 1)
    ]
    tags = {message.tag for message in messages}
    assert len(tags) == len(messages)
    assert min(tags) >= 0 and max(tags) < 2**31
