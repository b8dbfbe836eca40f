"""The phases of a start follow each other without gaps, from when the system started the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megatronish.bench.startup import TOGETHER, WIDTH, estimate
from megatronish.observe.start_clock import read_phases

PROGRAM = """
import time
time.sleep(0.5)  # as imports do, before there is a clock
from megatronish.observe.start_clock import StartClock
clock = StartClock()
clock.end("import")
time.sleep(0.2)
clock.end("config and data")
end = time.process_time() + 0.2
while time.process_time() < end: pass
clock.end("first step")
print(clock.describe())
"""


def test_what_came_before_the_clock_is_in_its_first_phase() -> None:
    said = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
    phases = read_phases(said)
    assert list(phases) == ["import", "config and data", "first step"]
    assert phases["import"].wall >= 0.5 and phases["config and data"].wall >= 0.2
    assert phases["config and data"].cpu < 0.1 and phases["first step"].cpu >= 0.19
    total = float(said.split()[0])
    assert total == pytest.approx(sum(spent.wall for spent in phases.values()), abs=0.02)  # each is rounded to 0.01


def test_the_estimate_goes_on_along_the_line_of_what_ranks_do_together() -> None:
    def rows(size: int) -> dict[str, dict[str, float]]:
        together = {phase: {"most": 9.0, "least": 0.5 + 0.01 * size, "cpu": 9.0} for phase in TOGETHER}
        return {"import": {"most": 4.0 * size, "least": 4.0, "cpu": 3.0}} | together

    found = estimate({size: rows(size) for size in (1, 4, 8)})
    assert found["alone"] == 3.0
    assert found["together"] == pytest.approx(3 * (0.5 + 0.01 * WIDTH))
