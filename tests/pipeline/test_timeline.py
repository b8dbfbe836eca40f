"""The clock of schedules: makespans, idle shares, and lists that never end."""

from __future__ import annotations

import pytest

from megatronish import formulas
from megatronish.pipeline.schedules import Backward, Forward
from megatronish.pipeline.timeline import idle_fraction, idle_of, input_of, makespan, part_of, timeline
from tests.pipeline.cases import ROWS, Row


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_idle_time_is_that_of_the_formula(row: Row) -> None:
    """Interleaved where the stages divide the microbatches. All stages run the same work, so the bubble is the rest."""
    for num_stages in range(1, 17):
        for num_microbatches in (1, 2, 5, 8, 12, 16, 30, 64):
            if row.num_chunks > 1 and num_microbatches % num_stages:
                continue
            spans = timeline(row.actions(num_stages, num_microbatches))
            if row.name == "interleaved" and num_microbatches % num_stages:
                continue
            expected = formulas.pipeline_idle_fraction(num_stages, num_microbatches, num_chunks=row.num_chunks)
            assert idle_fraction(spans) == pytest.approx(expected, abs=1e-12)
            assert makespan(spans) == 3 * (num_microbatches * row.num_chunks + num_stages - 1)


@pytest.mark.parametrize(("num_stages", "num_microbatches"), [(2, 3), (4, 5), (4, 7), (8, 9), (8, 15), (16, 17), (16, 63)])
@pytest.mark.parametrize("num_chunks", [2, 4])
def test_an_incomplete_round_idles_more_but_never_more_than_a_whole_one(
    num_stages: int, num_microbatches: int, num_chunks: int
) -> None:
    row = Row("interleaved", num_chunks)
    whole = -(-num_microbatches // num_stages) * num_stages
    least = 3 * (num_microbatches * num_chunks + num_stages - 1)
    assert least < makespan(timeline(row.actions(num_stages, num_microbatches))) < 3 * (whole * num_chunks + num_stages - 1)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_every_action_runs_once_after_its_input_and_after_the_one_before(row: Row) -> None:
    num_stages = 3
    actions = row.actions(num_stages, 7)
    spans = timeline(actions)
    ends = {
        (type(span.action), span.action.microbatch, part_of(span.action, stage, num_stages)): span.end
        for stage, mine in enumerate(spans)
        for span in mine
    }
    for stage, mine in enumerate(spans):
        assert [span.action for span in mine] == actions[stage]
        clock = 0
        for span in mine:
            needed = input_of(span.action, part_of(span.action, stage, num_stages), num_stages * row.num_chunks)
            assert span.start == max(clock, 0 if needed is None else ends[needed])
            assert span.end - span.start == (1 if isinstance(span.action, Forward) else 2)
            clock = span.end


def test_lists_that_wait_for_each_other_are_refused_and_named() -> None:
    first = [Forward(0), Backward(0), Forward(1), Backward(1)]
    second = [Forward(1), Backward(1), Forward(0), Backward(0)]
    with pytest.raises(ValueError, match=r"stage 0 at B0, stage 1 at F1 wait"):
        timeline([first, second])


def test_idle_of_a_config_is_that_of_its_lists() -> None:
    assert idle_of("1f1b", 4, 12) == pytest.approx(3 / 15)
    assert idle_of("interleaved", 4, 12, num_chunks=3) == pytest.approx(3 / 39)
    assert idle_of("interleaved", 4, 5, num_chunks=2) == pytest.approx(15 / 45)
    assert idle_of("gpipe", 1, 5) == 0
