"""Schedules: what each stage computes, before any communication is added."""

from __future__ import annotations

import pytest

from megatronish.pipeline.schedules import SCHEDULES, Backward, Forward, actions_of_all_stages, one_f_one_b, peak_in_flight


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_stages", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("num_microbatches", [1, 2, 3, 8, 33])
def test_every_microbatch_runs_forward_then_backward_once(name: str, num_stages: int, num_microbatches: int) -> None:
    for actions in actions_of_all_stages(SCHEDULES[name], num_stages, num_microbatches):
        assert len(actions) == 2 * num_microbatches
        for microbatch in range(num_microbatches):
            assert actions.index(Forward(microbatch)) < actions.index(Backward(microbatch))


def test_1f1b_written_out() -> None:
    def words(num_stages: int, num_microbatches: int) -> list[str]:
        return [" ".join(map(str, actions)) for actions in actions_of_all_stages(one_f_one_b, num_stages, num_microbatches)]

    assert words(3, 4) == ["F0 F1 F2 B0 F3 B1 B2 B3", "F0 F1 B0 F2 B1 F3 B2 B3", "F0 B0 F1 B1 F2 B2 F3 B3"]
    assert words(4, 2) == ["F0 F1 B0 B1", "F0 F1 B0 B1", "F0 F1 B0 B1", "F0 B0 F1 B1"]
    assert words(1, 2) == ["F0 B0 F1 B1"]


def test_1f1b_holds_at_most_the_stages_behind_it_in_flight() -> None:
    for num_stages in range(1, 17):
        for num_microbatches in range(1, 65):
            for stage in range(num_stages):
                peak = peak_in_flight(one_f_one_b(stage, num_stages, num_microbatches))
                assert peak == min(num_microbatches, num_stages - stage)


def test_peak_in_flight_counts_forwards_without_their_backward() -> None:
    assert peak_in_flight([]) == 0
    assert peak_in_flight([Forward(0), Backward(0), Forward(1), Backward(1)]) == 1
    assert peak_in_flight([Forward(0), Forward(1), Backward(0), Forward(2), Forward(3), Backward(1)]) == 3
