"""Schedules: what each stage computes, before any communication is added."""

from __future__ import annotations

import pytest

from megatronish import formulas
from megatronish.pipeline.schedules import (
    SCHEDULES,
    Backward,
    Forward,
    actions_of_all_stages,
    count_chunks,
    gpipe,
    interleaved,
    one_f_one_b,
    peak_in_flight,
)
from tests.pipeline.cases import ROWS, Row


def words(name: str, num_stages: int, num_microbatches: int, num_chunks: int = 1) -> list[str]:
    return [" ".join(map(str, a)) for a in actions_of_all_stages(name, num_stages, num_microbatches, num_chunks=num_chunks)]


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("num_stages", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("num_microbatches", [1, 2, 3, 8, 33])
def test_every_microbatch_runs_forward_then_backward_once_through_every_chunk(
    row: Row, num_stages: int, num_microbatches: int
) -> None:
    for actions in row.actions(num_stages, num_microbatches):
        assert len(actions) == 2 * num_microbatches * row.num_chunks
        for microbatch in range(num_microbatches):
            forwards = [actions.index(Forward(microbatch, chunk)) for chunk in range(row.num_chunks)]
            backwards = [actions.index(Backward(microbatch, chunk)) for chunk in reversed(range(row.num_chunks))]
            assert forwards + backwards == sorted(forwards + backwards)


def test_1f1b_written_out() -> None:
    assert words("1f1b", 3, 4) == ["F0 F1 F2 B0 F3 B1 B2 B3", "F0 F1 B0 F2 B1 F3 B2 B3", "F0 B0 F1 B1 F2 B2 F3 B3"]
    assert words("1f1b", 4, 2) == ["F0 F1 B0 B1", "F0 F1 B0 B1", "F0 F1 B0 B1", "F0 B0 F1 B1"]
    assert words("1f1b", 1, 2) == ["F0 B0 F1 B1"]


def test_gpipe_written_out() -> None:
    assert words("gpipe", 2, 3) == ["F0 F1 F2 B0 B1 B2"] * 2


def test_interleaved_written_out() -> None:
    """Chunk 1 of F0 is F0.1. Narayanan et al. 2021, figure 4, below, is this with 4 stages and 8 microbatches."""
    assert words("interleaved", 2, 2, 2) == ["F0 F1 F0.1 F1.1 B0.1 B1.1 B0 B1", "F0 F1 F0.1 B0.1 F1.1 B1.1 B0 B1"]
    first, *_, last = words("interleaved", 4, 8, 2)
    warmup = "F0 F1 F2 F3 F0.1 F1.1 F2.1 F3.1 F4 F5"
    assert first == f"{warmup} F6 B0.1 F7 B1.1 F4.1 B2.1 F5.1 B3.1 F6.1 B0 F7.1 B1 B2 B3 B4.1 B5.1 B6.1 B7.1 B4 B5 B6 B7"
    assert last.startswith("F0 F1 F2 F3 F0.1 B0.1 F1.1 B1.1 F2.1 B2.1 F3.1 B3.1 F4 B0 F5 B1")


def test_interleaved_leaves_out_what_the_last_round_lacks() -> None:
    for stage in range(4):
        full = [a for a in interleaved(stage, 4, 8, 2) if a.microbatch < 6]
        assert interleaved(stage, 4, 6, 2) == full


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_activations_in_flight_are_as_the_formula_says(row: Row) -> None:
    for num_stages in range(1, 17):
        for num_microbatches in (*range(1, 20), 31, 32, 48, 63, 64):
            for stage, actions in enumerate(row.actions(num_stages, num_microbatches)):
                bound = formulas.pipeline_peak_in_flight(
                    row.name, stage=stage, num_stages=num_stages, num_microbatches=num_microbatches, num_chunks=row.num_chunks
                )
                peak = peak_in_flight(actions)
                exact = row.name != "interleaved" or num_microbatches % num_stages == 0
                assert peak == bound if exact else peak <= bound


def test_interleaving_keeps_more_than_1f1b_by_the_published_factor() -> None:
    """Korthikanti et al. 2022: L (1 + (p - 1) / (p v)) layers on the first stage instead of L."""
    p, v = 8, 2
    assert peak_in_flight(interleaved(0, p, 64, v)) / (p * v) == 1 + (p - 1) / (p * v)
    assert peak_in_flight(one_f_one_b(0, p, 64)) / p == 1
    assert peak_in_flight(gpipe(0, p, 64)) / p == 64 / p


def test_a_schedule_without_chunks_takes_none() -> None:
    for name, schedule in SCHEDULES.items():
        if schedule.has_chunks:
            assert count_chunks(actions_of_all_stages(name, 2, 4, num_chunks=3)) == 3
        else:
            with pytest.raises(AssertionError, match="one chunk"):
                actions_of_all_stages(name, 2, 4, num_chunks=3)


def test_peak_in_flight_counts_forwards_without_their_backward() -> None:
    assert peak_in_flight([]) == 0
    assert peak_in_flight([Forward(0), Backward(0), Forward(1), Backward(1)]) == 1
    assert peak_in_flight([Forward(0), Forward(1), Backward(0), Forward(2), Forward(3), Backward(1)]) == 3
