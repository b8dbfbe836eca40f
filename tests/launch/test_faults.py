"""What can happen to a long job, on a real cluster: it ends with the losses of an undisturbed run, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatronish.observe.start_clock import START_UP
from tests.launch.cluster import Cluster, processes
from tests.launch.conftest import SmallRun
from tests.small_run import error_lines, losses, megatronish, wait_until

pytestmark = pytest.mark.timeout(900)
SCRIPT = "launch/slurm/pretrain.sbatch"
RESUMED = re.compile("resumed after step [24]0")
"""From the last save; a quick machine may have reached the second one before the fault."""
MEGATRONISH = (sys.executable, "-m", "megatronish")
TASKS = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0")
BACK_AT_WORK_SECONDS = 240
SUBMIT = ("--nodes=2", "--gpus-per-node=1", "--cpus-per-gpu=1", "--device=cpu", "--no-preflight")
"""As TASKS, of `megatronish submit`."""


@dataclass(frozen=True)
class Job:
    """A job that trains in folder/tiny."""

    cluster: Cluster
    folder: Path
    number: int
    log: Path

    @property
    def run(self) -> Path:
        return self.folder / "tiny"

    def text(self) -> str:
        """Its log so far."""
        return self.log.read_text() if self.log.exists() else ""

    def last_step(self) -> int:
        """As metrics.jsonl has it; 0: none yet."""
        path = self.run / "metrics.jsonl"
        found = re.findall(r'"step": ?(\d+)', path.read_text()) if path.exists() else []
        return int(found[-1]) if found else 0

    def wait_for_step(self, step: int) -> None:
        wait_until(lambda: self.last_step() >= step, seconds=400, what=f"step {step}")

    def wait_for_restart(self, *, seconds: float = 120) -> None:
        wait_until(lambda: self.cluster.job(self.number).get("Restarts") == "1", seconds=seconds, what="a requeue", often=0.2)

    def wait_until_at_work(self, life: int) -> None:
        """Its first step is done: long before a collective gives up by itself, after 600 s."""
        wait_until(lambda: self.text().count(START_UP) >= life, seconds=540, what=f"life {life} at work")

    def ranks(self) -> dict[str, int]:
        """Node -> process of its rank."""
        named = processes(self.folder)
        return {node: pid for pid, (node, words) in named.items() if b"python" in words[0] and b"train" in words}

    @contextlib.contextmanager
    def held(self) -> Iterator[dict[str, int]]:
        """The ranks stand still meanwhile, so that the run is not over before the fault is there."""
        ranks = self.ranks()
        for pid in ranks.values():
            os.kill(pid, signal.SIGSTOP)
        yield ranks
        for pid in ranks.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def check_done(self, undisturbed: SmallRun, *, restarts: int | None) -> None:
        """It ends well, with the undisturbed run's losses, bit for bit, and no process of it is left on any node."""
        ended = self.cluster.wait(self.number)
        assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), self.text()
        assert restarts is None or ended["Restarts"] == str(restarts), self.text()
        assert losses(self.run) == undisturbed.losses
        self.check_no_orphan()

    def check_no_orphan(self) -> None:
        wait_until(lambda: not processes(self.folder), seconds=90, what="the end of all processes", often=0.5)


def train(cluster: Cluster, root: Path, run: SmallRun, folder: Path, *options: str, log: str = "job.log", steps: int = 60) -> Job:
    """Submit the script as a user would by hand."""
    arguments = (
        *TASKS,
        *options,
        f"--output={folder / log}",
        SCRIPT,
        str(run.config),
        f"run_root={folder}",
        f"train.steps={steps}",
    )
    return Job(cluster, folder, cluster.submit(*arguments, cwd=root, PYTHON=sys.executable), folder / log)


def submit(cluster: Cluster, run: SmallRun, folder: Path, *options: str) -> Job:
    """`megatronish submit` from elsewhere: the job runs from its own copy of the code."""
    command = (*MEGATRONISH, "submit", str(run.config), f"run_root={folder}", *SUBMIT, *options)
    done = cluster.command(*command, cwd=folder, timeout=120)
    assert done.returncode == 0, done.stderr
    number = int(done.stdout.split()[1].rstrip(":"))
    return Job(cluster, folder, number, folder / f"tiny/logs/job-{number}.log")


def at_work_again(fault: str, began: float) -> None:
    """launch/README.md has the seconds of a quiet machine; twice as many tests at a time take several times as long."""
    seconds = time.monotonic() - began
    print(f"{fault}: at work again after {seconds:.0f} s")
    assert seconds < BACK_AT_WORK_SECONDS


@pytest.fixture
def whole_cluster(cluster: Cluster) -> Iterator[Cluster]:
    """A test may break nodes of it."""
    yield cluster
    cluster.command("scancel", "--user=root", cwd=cluster.base)
    for node in ("node001", "node002", "node003", "node004"):
        if cluster.run("node-exec", node, "true").returncode != 0:
            cluster.run("revive", node)

    def idle() -> bool:
        cluster.command("scontrol", "update", "nodename=node[001-004]", "state=resume", cwd=cluster.base)
        states = cluster.command("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N", cwd=cluster.base)
        return len(states.stdout.split()) == 4

    wait_until(idle, seconds=120, what="four idle nodes", often=1.0)


def test_a_killed_rank_and_a_requeue_cost_nothing_but_time(
    cluster: Cluster, pair_run: SmallRun, root: Path, tmp_path: Path
) -> None:
    job = train(cluster, root, pair_run, tmp_path)
    job.wait_for_step(21)
    node, pid = max(job.ranks().items())
    began = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    job.wait_for_restart()
    text = job.text()
    assert "a fault; back into the queue" in text and "first failure: rank " in text and "one was killed" in text, text
    wait_until(lambda: RESUMED.search(job.text()) is not None, seconds=200, what="life 2")
    status = cluster.command(*MEGATRONISH, "status", str(job.run), cwd=tmp_path)
    assert f"{job.number} RUNNING" in status.stdout and "last failure:" in status.stdout, status.stdout + status.stderr
    job.wait_until_at_work(2)
    at_work_again("killed rank", began)
    assert cluster.command("scontrol", "requeue", str(job.number), cwd=root).returncode == 0
    job.check_done(pair_run, restarts=2)


@pytest.mark.parametrize(
    ("fault", "place", "repair"),
    [
        ("crash", 1, None),
        ("freeze", 1, "thaw"),
        ("unplug", 1, "plug"),
        # With the batch script and srun on it: Slurm notices later.
        pytest.param("unplug", 0, "plug", marks=pytest.mark.slow_faults),
    ],
)
def test_a_job_that_loses_a_node_goes_on_without_it(
    whole_cluster: Cluster, pair_run: SmallRun, root: Path, tmp_path: Path, fault: str, place: int, repair: str | None
) -> None:
    job = train(whole_cluster, root, pair_run, tmp_path)
    job.wait_for_step(21)
    with job.held() as ranks:
        # The batch script runs on the first of the two.
        lost = sorted(ranks)[place]
        whole_cluster.run(fault, lost)
        if fault == "freeze":
            del ranks[lost]  # it stays still
        began = time.monotonic()
    try:
        job.wait_until_at_work(2)
        at_work_again(f"{fault}", began)
        assert RESUMED.search(job.text()) and len(set(job.ranks()) - {lost}) == 2, job.text()
    finally:
        if repair is not None:
            whole_cluster.run(repair, lost)
    job.check_done(pair_run, restarts=1)


def test_a_lost_node_is_replaced_by_a_spare_in_the_same_allocation(
    whole_cluster: Cluster, pair_run: SmallRun, tmp_path: Path
) -> None:
    job = submit(whole_cluster, pair_run, tmp_path, "--spares=1")
    job.wait_for_step(21)
    with job.held() as ranks:
        status = whole_cluster.command(*MEGATRONISH, "status", str(job.run), cwd=tmp_path)
        assert "nodes node[001-003], 1 of them spare" in status.stdout, status.stdout + status.stderr
        # The second of the two that train: the batch script is on the first.
        whole_cluster.run("crash", max(ranks))
        began = time.monotonic()
    wait_until(lambda: "again on 2 of them" in job.text(), seconds=120, what="a relaunch")
    job.wait_until_at_work(2)
    at_work_again("crash with a spare", began)
    job.check_done(pair_run, restarts=0)
    assert RESUMED.search(job.text())


def test_out_of_time_is_a_save_and_a_requeue_and_the_same_losses(cluster: Cluster, pair_run: SmallRun, tmp_path: Path) -> None:
    job = submit(cluster, pair_run, tmp_path)
    job.wait_for_step(2)
    # As Slurm does before the time limit, under --signal=B:USR1@600.
    began = time.monotonic()
    assert cluster.command("scancel", "--batch", "--signal=USR1", str(job.number), cwd=tmp_path).returncode == 0
    job.wait_for_restart()
    text, before = job.text(), job.last_step()
    assert "out of time, saved; back into the queue" in text, text
    assert before < 60 and (job.run / f"checkpoints/step-{before:08d}").is_dir()
    job.wait_until_at_work(2)
    at_work_again("signal", began)
    job.check_done(pair_run, restarts=1)
    status = cluster.command(*MEGATRONISH, "status", str(job.run), cwd=tmp_path)
    assert f"{job.number} COMPLETED" in status.stdout and "restarts 1" in status.stdout, status.stdout + status.stderr
    assert "60 of 60" in status.stdout and f"{pair_run.losses[60]:.4f}" in status.stdout


def limit_job(job: Job, minutes: int) -> None:
    done = job.cluster.command("scontrol", "update", f"jobid={job.number}", f"timelimit={minutes}", cwd=job.folder)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow_faults
@pytest.mark.parametrize("reason", ["time limit", "preemption"])
def test_the_time_limit_and_preemption_are_a_save_and_a_requeue(
    cluster: Cluster, pair_run: SmallRun, root: Path, tmp_path: Path, reason: str
) -> None:
    job = train(cluster, root, pair_run, tmp_path, "--time=30", "--signal=B:USR1@10", steps=100_000)
    job.wait_for_step(2)
    if reason == "preemption":
        cluster.submit("--partition=urgent", "--nodes=4", "--exclusive", "--wrap=sleep 1", "--output=/dev/null", cwd=root)
    else:  # the start of the ranks may take minutes on a busy machine; Slurm looks every 30 s, and may be a minute early
        hours, minutes, _ = map(int, cluster.job(job.number)["RunTime"].split(":"))
        limit_job(job, 60 * hours + minutes + 2)
    job.wait_for_restart(seconds=300)
    limit_job(job, 30)
    text, before = job.text(), job.last_step()
    assert re.search(r"saved .*/step-0*" + str(before), text), text
    job.wait_until_at_work(2)
    assert f"resumed after step {before}" in job.text()
    (job.run / "STOP").touch()
    ended = cluster.wait(job.number)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), job.text()
    job.check_no_orphan()
    found = losses(job.run)
    settings = (f"run_root={tmp_path / 'here'}", f"train.steps={len(found)}")
    done = megatronish("train", str(pair_run.config), *settings, "--nproc", "2", timeout=600)
    assert done.returncode == 0, done.stderr
    assert found == losses(tmp_path / "here/tiny")


def test_two_jobs_on_one_run_folder_are_one_line(cluster: Cluster, pair_run: SmallRun, root: Path, tmp_path: Path) -> None:
    first = train(cluster, root, pair_run, tmp_path, log="1.log", steps=5000)
    first.wait_for_step(1)
    second = train(cluster, root, pair_run, tmp_path, log="2.log", steps=5000)
    ended = cluster.wait(second.number)
    (line,) = error_lines(second.text())
    assert ended["ExitCode"] == "2:0" and "is the folder of a run at work: slurm-" in line
    # The first goes on undisturbed.
    (first.run / "STOP").touch()
    assert cluster.wait(first.number)["ExitCode"] == "0:0", first.text()
    found = losses(first.run)
    assert all(found[step] == loss for step, loss in pair_run.losses.items() if step in found)
    first.check_no_orphan()
