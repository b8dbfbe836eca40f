import itertools
import os
import pty
import re
import subprocess
import sys

import pytest

from megatronish.observe.progress import TrainingProgress


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def lines_of(capfd):
    return capfd.readouterr().err.splitlines()


def test_in_a_log_the_numbers_are_in_plain_lines(capfd):
    with TrainingProgress(total_steps=110, first_step=1, enabled=True, plain_seconds=0) as progress:
        progress.print("held-out loss [9.01] at step 0")
        progress.update(10, loss=5.12345, tokens_per_second=1650.4, mfu=0.3125)
        progress.update(20, loss=4.5, tokens_per_second=1700.0, mfu=None)
    first, second, third = lines_of(capfd)
    assert first == "held-out loss [9.01] at step 0"
    assert second.startswith("step 10/110  loss 5.1235  1,650 tokens/s  MFU 31.2 %  ")
    assert third.startswith("step 20/110  loss 4.5000  1,700 tokens/s  ") and "MFU" not in third


def test_force_color_makes_no_live_bar_in_a_log(capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with TrainingProgress(total_steps=2, first_step=1, enabled=True) as progress:
        progress.update(2, loss=1.0, tokens_per_second=1.0, mfu=None)
    assert "\x1b" not in capfd.readouterr().err


def test_plain_lines_come_at_most_once_an_interval_but_the_first_and_last_always(capfd):
    clock = Clock()
    with TrainingProgress(total_steps=100, first_step=1, enabled=True, plain_seconds=10, clock=clock) as progress:
        for step in range(1, 101):
            clock.now += 0.8
            progress.update(step, loss=1.0, tokens_per_second=1.0, mfu=None)
    steps = [int(re.match(r"step (\d+)/100 ", line)[1]) for line in lines_of(capfd)]
    assert steps[0] == 1 and steps[-1] == 100
    assert all(0.8 * (b - a) >= 10 for a, b in itertools.pairwise(steps[:-1])) and 8 <= len(steps) <= 10


def test_time_left_is_that_of_a_steady_run_whatever_the_first_step_cost_and_wherever_it_resumed(capfd):
    clock = Clock()
    with TrainingProgress(total_steps=10_000, first_step=4001, enabled=True, plain_seconds=0, clock=clock) as progress:
        clock.now = 300.0  # start-up
        progress.update(4001, loss=1.0, tokens_per_second=1.0, mfu=None)
        for step in range(4002, 4012):
            clock.now += 60.0
            progress.update(step, loss=1.0, tokens_per_second=1.0, mfu=None)
        clock.now += 60.0 * (9_990 - 4011)
        progress.update(9_990, loss=1.0, tokens_per_second=1.0, mfu=None)
        clock.now += 600.0
        progress.update(10_000, loss=1.0, tokens_per_second=1.0, mfu=None)
    lines = lines_of(capfd)
    assert all(line.endswith(f"{left} left") for line, left in zip(lines[-3:], ("4d 3:49:00", "10:00", "0:00"), strict=True))


def test_ranks_that_are_not_enabled_say_nothing(capfd):
    with TrainingProgress(total_steps=10, first_step=1, enabled=False) as progress:
        progress.update(10, loss=1.0, tokens_per_second=1.0, mfu=0.5)
        progress.print("evaluation")
    assert capfd.readouterr() == ("", "")


ON_A_TERMINAL = """
import sys
from pathlib import Path
from megatronish.observe.log import setup_logging
from megatronish.observe.progress import TrainingProgress
log = setup_logging(Path(sys.argv[1]), rank=0, coordinates="pp0 dp0 tp0")
with TrainingProgress(total_steps=40, first_step=1, enabled=True) as progress:
    for step in (10, 20, 30, 40):
        progress.update(step, loss=7.25 - step / 10, tokens_per_second=1234.5, mfu=0.125)
        if step == 20:
            log.info("saved [step] 20")
            progress.print("evaluated [20]")
"""


def test_on_a_terminal_a_bar_shows_the_numbers_and_log_lines_stand_above_it(tmp_path):
    text = run_on_terminal([sys.executable, "-c", ON_A_TERMINAL, str(tmp_path)])
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "step 40/40" in plain and "loss 3.2500" in plain and "1,234 tokens/s" in plain and "MFU 12.5 %" in plain
    # Whole lines of their own: not run into the bar.
    lines = re.split(r"[\r\n]+", plain)
    assert any(re.fullmatch(r"\[pp0 dp0 tp0\] \S+ saved \[step\] 20 *", line) for line in lines), lines
    assert any(line.rstrip() == "evaluated [20]" for line in lines), lines


def run_on_terminal(command):
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "30"}
    process = subprocess.Popen(command, stdin=child, stdout=child, stderr=child, env=environment)
    os.close(child)
    output = b""
    while True:
        try:
            block = os.read(parent, 65536)
        except OSError:  # Linux: the other side is closed
            break
        if not block:
            break
        output += block
    os.close(parent)
    assert process.wait() == 0, output.decode()
    return output.decode()


def test_an_exception_in_training_passes_through_and_stops_the_bar(tmp_path):
    with pytest.raises(KeyboardInterrupt), TrainingProgress(total_steps=2, first_step=1, enabled=True):
        raise KeyboardInterrupt
