"""What can happen to a long job, on a real cluster: it ends with the losses of an undisturbed run, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.cluster import Cluster
from tests.launch.conftest import SmallRun
from tests.small_run import error_lines, losses, wait_until

pytestmark = pytest.mark.timeout(900)
SCRIPT = "launch/slurm/pretrain.sbatch"
RESUMED = re.compile("resumed after step [12]0")
"""From the last save; a quick machine may have reached the second one before the fault."""
TASKS = ("--ntasks-per-node=4", "--cpus-per-task=1", "--gpus-per-node=0")


def last_step(run: Path) -> int:
    """As metrics.jsonl has it; 0: none yet."""
    path = run / "metrics.jsonl"
    found = re.findall(r'"step": ?(\d+)', path.read_text()) if path.exists() else []
    return int(found[-1]) if found else 0


def wait_for_step(run: Path, step: int) -> None:
    wait_until(lambda: last_step(run) >= step, seconds=400, what=f"step {step}")


def rank_on(cluster: Cluster, node: str) -> int:
    """A process that trains on a node."""
    for pid in map(int, cluster.run("pids", node).stdout.split()):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"train" in words and b"python" in words[0]:
            return pid
    raise AssertionError(f"no rank runs on {node}")


@pytest.fixture
def whole_cluster(cluster: Cluster) -> Iterator[Cluster]:
    """A test may break nodes of it."""
    yield cluster
    for node in ("node001", "node002", "node003", "node004"):
        if cluster.run("node-exec", node, "true").returncode != 0:
            cluster.run("revive", node)

    def idle() -> bool:
        cluster.command("scontrol", "update", "nodename=node[001-004]", "state=resume", cwd=cluster.base)
        states = cluster.command("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N", cwd=cluster.base)
        return len(states.stdout.split()) == 4

    wait_until(idle, seconds=240, what="four idle nodes", often=1.0)


def test_a_killed_rank_and_a_requeue_cost_nothing_but_time(
    cluster: Cluster, small_run: SmallRun, root: Path, tmp_path: Path
) -> None:
    log, run = tmp_path / "job.log", tmp_path / "tiny"
    job = cluster.submit(
        "--nodes=2",
        *TASKS,
        f"--output={log}",
        SCRIPT,
        str(small_run.config),
        f"run_root={tmp_path}",
        cwd=root,
        PYTHON=sys.executable,
    )
    wait_for_step(run, 11)
    node = cluster.job(job)["NodeList"].removeprefix("node[").split("-")[0]
    os.kill(rank_on(cluster, f"node{node}"), signal.SIGKILL)
    wait_until(lambda: cluster.job(job).get("Restarts") == "1", seconds=200, what="a requeue")
    assert "a fault; back into the queue" in log.read_text() and "first failure: rank " in log.read_text(), log.read_text()
    wait_until(lambda: RESUMED.search(log.read_text()) is not None, seconds=200, what="life 2")
    cluster.command("scontrol", "requeue", str(job), cwd=root)
    ended = cluster.wait(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), log.read_text()
    assert losses(run) == small_run.losses


def test_a_lost_node_is_replaced_by_a_spare_in_the_same_allocation(
    whole_cluster: Cluster, small_run: SmallRun, root: Path, tmp_path: Path
) -> None:
    log, run = tmp_path / "job.log", tmp_path / "tiny"
    job = whole_cluster.submit(
        "--nodes=3", "--no-kill", *TASKS, f"--output={log}", SCRIPT, str(small_run.config), f"run_root={tmp_path}",
        cwd=root, PYTHON=sys.executable, SPARES="1",
    )  # fmt: skip
    wait_for_step(run, 11)
    # The second of the two that train: the batch script is on the first.
    whole_cluster.run("crash", "node002")
    wait_until(lambda: "again on 2 of them" in log.read_text(), seconds=120, what="a relaunch")
    ended = whole_cluster.wait(job)
    assert (ended["JobState"], ended.get("Restarts")) == ("COMPLETED", "0"), log.read_text()
    assert losses(run) == small_run.losses and RESUMED.search(log.read_text())


def test_two_jobs_on_one_run_folder_are_one_line(cluster: Cluster, small_run: SmallRun, root: Path, tmp_path: Path) -> None:
    logs, run = [tmp_path / "1.log", tmp_path / "2.log"], tmp_path / "tiny"
    command = (SCRIPT, str(small_run.config), f"run_root={tmp_path}", "train.steps=5000")
    first = cluster.submit("--nodes=2", *TASKS, f"--output={logs[0]}", *command, cwd=root, PYTHON=sys.executable)
    wait_for_step(run, 1)
    second = cluster.submit("--nodes=2", *TASKS, f"--output={logs[1]}", *command, cwd=root, PYTHON=sys.executable)
    ended = cluster.wait(second)
    (line,) = error_lines(logs[1].read_text())
    assert ended["ExitCode"] == "2:0" and "is the folder of a run at work: slurm-" in line
    # The first goes on undisturbed.
    (run / "STOP").touch()
    assert cluster.wait(first)["ExitCode"] == "0:0", logs[0].read_text()
    found = losses(run)
    assert all(found[step] == loss for step, loss in small_run.losses.items() if step in found)
