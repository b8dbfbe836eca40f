"""Measured idle time of equal stages is that of the formula."""

from __future__ import annotations

import pytest

from megatronish.bench.pipeline import PipelineBench, measure

ATTEMPTS = 4


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("schedule", "num_chunks"),
    [("1f1b", 1), ("gpipe", 1), ("interleaved", 2)],
)
def test_idle_time_is_within_five_percent_of_the_formula(schedule: str, num_chunks: int) -> None:
    """Of the idle time itself, not of the step. A busy machine delays messages and only ever adds, a few milliseconds each: beside
    stages that work longer that is less, and none may idle less than the formula says."""
    ratios = []
    for attempt in range(ATTEMPTS):
        (result,) = measure([PipelineBench(schedule, 4, 8, num_chunks, unit_seconds=0.1 * 2**attempt, rounds=1)])
        ratios.append(result["ratio"])
        assert result["idle_of_the_lists"] == pytest.approx(result["idle_by_formula"])
        assert ratios[-1] > 0.99, "less idle than the dependencies allow"
        if ratios[-1] < 1.05:
            return
    pytest.fail(f"measured over formula: {ratios}")
