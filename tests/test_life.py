"""A run has one life at a time, a signal saves and ends it, and a failed rank leaves its reason."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatronish import failures, retries
from megatronish.errors import Fault, Superseded, UserError, code_of_job, disk_error, exit_code_of
from megatronish.life import Life
from tests.small_run import (
    descendants,
    forked,
    kill_all,
    losses,
    start,
    start_forked,
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


def test_a_life_knows_whether_the_one_before_was_of_its_own_job(tmp_path: Path) -> None:
    continues = []
    for launch, restart in (("slurm-7.0", 0), ("slurm-7.1", 0), ("slurm-7.0", 1), ("slurm-8.1", 0), ("none", 0), ("none", 0)):
        with Life(tmp_path, launch, restart) as life:
            continues.append(life.continues_job)
    assert continues == [False, True, True, False, False, False]


def test_a_killed_life_frees_the_folder_at_once(tmp_path: Path) -> None:
    other = other_process(tmp_path, "none")
    other.kill()
    other.wait()
    with Life(tmp_path, "slurm-8.0", 0) as life:
        assert life.is_current()


def test_a_rank_ends_once_a_later_life_of_its_job_has_begun_whatever_it_waits_in(tmp_path: Path) -> None:
    script = (
        "import ctypes\nfrom pathlib import Path\nfrom megatronish.life import ended_by_later_life\n"
        f"with ended_by_later_life(Path({str(tmp_path)!r}), 'slurm-7.0', 1, watch_seconds=0.1):\n"
        "    print('waits', flush=True)\n    ctypes.CDLL(None).sleep(100)\n"
    )
    rank = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert rank.stdout is not None and rank.stdout.readline() == "waits\n"
    for launch, restart in (("slurm-7.0", 0), ("slurm-7.0", 1), ("slurm-8.0", 5)):  # earlier, its own, another job's
        with Life(tmp_path, launch, restart), pytest.raises(subprocess.TimeoutExpired):
            rank.wait(timeout=0.5)
    with Life(tmp_path, "slurm-7.0", 2):
        assert rank.wait(timeout=20) == 79
    assert "now belongs to slurm-7.0/2/" in rank.communicate()[1]


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


class FailingReads:
    """life.json cannot be read the next `left` times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, read = 0, Path.read_text

        def failing(path: Path, *arguments: Any, **options: Any) -> str:
            if path.name == "life.json" and self.left > 0:
                self.left -= 1
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return read(path, *arguments, **options)

        monkeypatch.setattr(Path, "read_text", failing)
        monkeypatch.setattr(retries, "RETRY_SECONDS", (0.0, 0.0, 0.0))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> FailingReads:
    return FailingReads(monkeypatch)


def test_a_life_whose_file_cannot_be_read_goes_on_and_completes_no_checkpoint_until_it_can(
    tmp_path: Path, reads: FailingReads
) -> None:
    with Life(tmp_path, "slurm-7.0", 0, beat_seconds=0.05) as life:
        reads.left = 10**9
        assert life.is_current()
        with pytest.raises(Fault, match="Stale file handle") as error:
            life.require_current()
        assert exit_code_of(error.value) == 76
        path = tmp_path / "life.json"
        os.utime(path, (0, 0))
        wait_until(lambda: path.stat().st_mtime > 0, seconds=10, what="a beat")
        reads.left = 0
        path.rename(tmp_path / "away")
        assert life.is_current()
        with pytest.raises(Fault, match="names no life"):
            life.require_current()
        (tmp_path / "away").rename(path)
        os.utime(path, (0, 0))
        wait_until(lambda: path.stat().st_mtime > 0, seconds=10, what="a beat after that")
    assert "ended" in json.loads(path.read_text())
    with Life(tmp_path, "slurm-7.0", 1) as life:  # with no beat that would take a failure away
        reads.left = 3
        life.require_current()
        with Life(tmp_path, "slurm-7.0", 2), pytest.raises(Superseded):
            life.require_current()


def test_a_folder_whose_life_cannot_be_read_is_not_taken_over(tmp_path: Path, reads: FailingReads) -> None:
    other, path = other_process(tmp_path, "slurm-7.0"), tmp_path / "life.json"
    try:
        for num_failures, words in ((10**9, "cannot be read"), (3, "run at work")):
            reads.left = num_failures
            with pytest.raises(UserError, match=words) as error, Life(tmp_path, "slurm-8.0", 0):
                pass
            assert isinstance(error.value, Fault) == (num_failures > 3)
            reads.left = 0
            assert json.loads(path.read_text())["job"] == "slurm-7"
    finally:
        other.communicate("")


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


def test_what_may_pass_is_a_fault_and_what_somebody_must_change_is_not() -> None:
    assert exit_code_of(disk_error(errno.EIO)("")) == 76 and exit_code_of(disk_error(errno.ENOSPC)("")) == 2


def leave(run: Path, launch: str, rank: int, error: str, *, code: int = 76, lost_peer: bool = False) -> None:
    at = failures.now(rank, 2, launch, where="train step 3", error=error, code=code, lost_peer=lost_peer)
    failures.leave(run, at)


def test_the_failure_that_explains_itself_is_first(tmp_path: Path) -> None:
    leave(tmp_path, "job/0", 0, "gone", lost_peer=True)
    leave(tmp_path, "job/0", 1, "KeyError")
    latest = failures.latest(tmp_path)
    assert latest is not None and (latest.rank, latest.error) == (1, "KeyError")
    failures.forget(tmp_path, "job/0")
    assert failures.latest(tmp_path) is None


def test_of_thousands_that_lost_a_peer_a_few_say_so(tmp_path: Path) -> None:
    for rank in range(20):
        leave(tmp_path, "job/0", rank, "gone", lost_peer=True)
    leave(tmp_path, "job/0", 30, "KeyError")
    first, *others = failures.of_launch(failures.folder_of(tmp_path, "job/0"))
    assert first.rank == 30 and len(others) == 8


def test_only_what_this_life_of_this_job_left_counts_and_nothing_once_all_is_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(tmp_path, "slurm-7.0/1", 1, "before the mark", code=2)
    folder, mark = failures.folder_of(tmp_path, "slurm-7.0/1"), tmp_path / "mark"
    mark.touch()
    os.utime(folder, (mark.stat().st_mtime - 1,) * 2)
    leave(tmp_path, "slurm-8.0/1", 0, "folder at work", code=2)
    leave(tmp_path, "slurm-7.0/0", 0, "an earlier life", code=2)
    leave(tmp_path, "slurm-7.1/1", 0, "superseded", code=79)
    leave(tmp_path, "slurm-7.1/1", 1, "gone", lost_peer=True)
    assert failures.main(tmp_path, mark, 143, "7", "1") == 76
    said = capsys.readouterr()
    assert "first failure: rank 1 of 2" in said.err and "one was killed" in said.err and said.out == "76 -\n"
    assert failures.main(tmp_path, mark, 0, "7", "1") == 0
    assert failures.main(tmp_path, mark, 75, "7", "2") == 75
    leave(tmp_path, "slurm-7.1/1", 1, "KeyError")
    assert failures.main(tmp_path, mark, 143, "7", "1") == 76
    assert capsys.readouterr().out == f"0 -\n75 -\n76 {socket.gethostname()}\n"


def test_a_rank_that_cannot_end_as_asked_leaves_its_stacks(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    script = (
        "import ctypes\nfrom pathlib import Path\nfrom megatronish import end_signals\n"
        f"end_signals.STACKS_SECONDS = 0.5\nrun = Path({str(tmp_path)!r})\n"
        "signals = end_signals.EndSignals()\nsignals.listen()\n"
        "from megatronish.observe.post_mortem import PostMortem, Who\n"
        "with PostMortem(run, Who(3, 8, {}, 'tp1', 'a/0'), hang_seconds=0):\n"
        "    signals.begin(lambda: (run / 'failed').exists())\n    print('waits', flush=True)\n"
        "    while True:\n        ctypes.CDLL(None).sleep(100)\n"
    )
    rank = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert rank.stdout is not None and rank.stdout.readline() == "waits\n"
    stacks = tmp_path / "post_mortem/rank-00003.json"
    rank.terminate()
    wait_until(stacks.exists, seconds=20, what="its stacks")
    assert rank.poll() is None and json.loads(stacks.read_text())["stacks"][0]["frames"]
    (tmp_path / "failed").touch()  # another rank gave up
    assert rank.wait(timeout=20) == 143
    rank.communicate()


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
        assert launcher.wait(timeout=240) == 75, (tmp_path / "stderr").read_text()
        wait_until_ended(processes, seconds=30)
        assert step() > last and (run / f"checkpoints/step-{step():08d}").is_dir()
        last = step()
    assert sorted(losses(run)) == list(range(1, last + 1))


def test_a_rank_that_stands_still_ends_the_job_and_is_named(tmp_path: Path) -> None:
    config, run = (
        write_run(tmp_path, parallel={"pipeline": 2, "data": 2, "timeout_seconds": 15.0}, train={"steps": 100_000}),
        tmp_path / "runs/tiny",
    )
    ranks = start_forked("train", str(config), nproc=4, stderr=tmp_path / "stderr")
    try:
        wait_until(lambda: (run / "metrics.jsonl").exists(), seconds=120, what="a step")
        assert ranks[3].pid is not None
        os.kill(ranks[3].pid, signal.SIGSTOP)
        # The time-out, what writing the stacks takes, and a busy machine.
        for rank in ranks[:3]:
            rank.join(60)
        assert [rank.exitcode for rank in ranks[:3]] == [76] * 3, (tmp_path / "stderr").read_text()
    finally:
        kill_all(ranks)
    failure = failures.latest(run)
    assert failure is not None and "imed out" in failure.error, (tmp_path / "stderr").read_text()
    why = forked("why-hung", str(run))
    assert "rank 3" in why.stdout.splitlines()[0], why.stdout
