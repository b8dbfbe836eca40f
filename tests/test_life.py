"""A run has one life at a time, a signal saves and ends it, and a failed rank leaves its reason."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatronish import failures
from megatronish.errors import Superseded, UserError, code_of_job
from megatronish.life import Life
from tests.small_run import (
    descendants,
    losses,
    start,
    wait_until,
    wait_until_ended,
    write_run,
)


def other_process(run: Path, launch: str, restart: int = 0) -> subprocess.Popen[str]:
    """A life of another process, until its standard input is closed."""
    script = (
        "import sys\nfrom pathlib import Path\nfrom megatronish.life import Life\n"
        f"with Life(Path({str(run)!r}), {launch!r}, {restart}):\n    print('alive', flush=True)\n    sys.stdin.read()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "alive\n"
    return process


def test_another_job_is_refused_while_one_lives_a_later_life_takes_over_and_the_old_one_may_not_write(tmp_path: Path) -> None:
    other = other_process(tmp_path, "slurm-7.0")
    try:
        with pytest.raises(UserError, match=f"run at work: slurm-7, process {other.pid} on"), Life(tmp_path, "slurm-8.0", 0):
            pass
        with Life(tmp_path, "slurm-7.1", 0) as later:  # the next step of the same allocation
            later.require_current()
            with Life(tmp_path, "slurm-7.0", 1), pytest.raises(Superseded, match=r"belongs to slurm-7\.0/1/"):
                later.require_current()
    finally:
        other.communicate("")
    with Life(tmp_path, "slurm-8.0", 0):  # ended, so free
        pass


def test_a_killed_life_frees_the_folder_at_once(tmp_path: Path) -> None:
    other = other_process(tmp_path, "none")
    other.kill()
    other.wait()
    with Life(tmp_path, "slurm-8.0", 0) as life:
        life.require_current()


def test_a_life_on_another_host_is_alive_while_it_beats(tmp_path: Path) -> None:
    with Life(tmp_path, "a", 0, beat_seconds=0.1) as first:
        path = tmp_path / "life.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "host": "elsewhere"}))
        with pytest.raises(UserError, match="elsewhere"), Life(tmp_path, "b", 0, beat_seconds=0.1):
            pass
        first._ended.set()
        first._thread.join()
        with Life(tmp_path, "b", 0, beat_seconds=0.1) as second:
            second.require_current()


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([0, 0], 0),
        ([75, 75, 0], 75),
        ([75, 76], 76),
        ([-9, 143, 76], 76),
        ([143, 78, 76], 78),
        ([2, 76], 2),
        ([77, 143], 77),
        ([1], 76),
    ],
)
def test_the_reason_that_one_rank_gives_is_the_jobs(codes: list[int], code: int) -> None:
    assert code_of_job(codes) == code


def test_the_failure_that_explains_itself_is_first_and_only_those_since_the_mark_count(tmp_path: Path) -> None:
    for rank, (error, lost) in enumerate([("gone", True), ("KeyError", False)]):
        at = failures.now(rank, 2, "job/0", where="train step 3", error=error, code=76, lost_peer=lost)
        failures.leave(tmp_path, at)
    first, _ = failures.since(tmp_path, 0.0)
    assert (first.rank, first.error) == (1, "KeyError")
    mark = tmp_path / "mark"
    mark.touch()
    assert [f.rank for f in failures.since(tmp_path, mark.stat().st_mtime + 1)] == []


def test_a_signal_to_the_launcher_saves_all_ranks_and_the_same_command_goes_on(tmp_path: Path) -> None:
    config = write_run(tmp_path, train={"steps": 100_000}, checkpoint={"interval": None})
    run, last = tmp_path / "runs/tiny", 0

    def step() -> int:
        return max(losses(run), default=0) if (run / "metrics.jsonl").exists() else 0

    for number in (signal.SIGUSR1, signal.SIGTERM):
        launcher = start("train", str(config), "parallel.tensor=2", "--nproc", "2", stderr=tmp_path / "stderr")
        wait_until(lambda: step() > last, seconds=200, what="a step of this life")  # noqa: B023 (called at once)
        processes = descendants(launcher.pid)
        launcher.send_signal(number)
        assert launcher.wait(timeout=100) == 75, (tmp_path / "stderr").read_text()
        wait_until_ended(processes, seconds=30)
        assert step() > last and (run / f"checkpoints/step-{step():08d}").is_dir()
        last = step()
    assert sorted(losses(run)) == list(range(1, last + 1))
