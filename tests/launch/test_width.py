"""The shipped script at the width of a real job: 1,024 tasks on 128 slurmd, with a stand-in for the trainer."""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.cluster import Cluster
from tests.launch.conftest import skip_without_slurm
from tests.launch.stand_in import write_stand_in
from tests.small_run import wait_until

pytestmark = [pytest.mark.slow_faults, pytest.mark.timeout(1800)]
NODES, SPARES, TASKS = 128, 2, 8
TRAIN = """\
# Say where this rank is, save, and wait in the kernel.
echo "$SLURMD_NODENAME" > "$run/here/$life-$SLURM_PROCID"
[ "$SLURM_PROCID" -ne 0 ] || save "$life"
exec cat "$run/gate"
"""


@pytest.fixture
def wide_cluster() -> Iterator[Cluster]:
    """So many nodes on a machine answer slowly."""
    skip_without_slurm()
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:
        extra = Path(folder) / "extra"
        extra.write_text("MessageTimeout=20\nSlurmdTimeout=30\n")
        cluster = Cluster(Path(folder), "-n", str(NODES + SPARES), "-x", str(extra))
        try:
            yield cluster
        finally:
            cluster.stop()


def test_a_thousand_ranks_lose_a_node_and_are_back_on_the_spares(wide_cluster: Cluster, root: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "job.log"
    python = write_stand_in(tmp_path / "python", run, TRAIN)
    (run / "here").mkdir(parents=True)
    os.mkfifo(run / "gate")

    def nodes_of(life: int) -> Counter[str]:
        return Counter(path.read_text().strip() for path in (run / "here").glob(f"{life}-*"))

    def all_here(life: int) -> bool:
        return len(list((run / "here").glob(f"{life}-*"))) == NODES * TASKS and "" not in nodes_of(life)

    began = time.monotonic()
    job = wide_cluster.submit(
        f"--nodes={NODES + SPARES}", f"--ntasks-per-node={TASKS}", "--cpus-per-task=1", "--gpus-per-node=0", "--no-kill",
        f"--output={log}", "launch/slurm/pretrain.sbatch", "config.yaml", cwd=root, PYTHON=str(python), SPARES=str(SPARES),
    )  # fmt: skip
    wait_until(lambda: all_here(1), seconds=400, what="1,024 ranks", often=0.5)
    print(f"{NODES * TASKS} ranks after {time.monotonic() - began:.0f} s")
    assert nodes_of(1) == {f"node{number:03d}": TASKS for number in range(1, NODES + 1)}
    lost, began = "node077", time.monotonic()
    wide_cluster.run("crash", lost)
    wait_until(lambda: all_here(2), seconds=600, what="1,024 ranks again", often=0.5)
    print(f"all back {time.monotonic() - began:.0f} s after the crash")
    back = nodes_of(2)
    assert lost not in back and set(back.values()) == {TASKS} and len(back) == NODES
    os.close(os.open(run / "gate", os.O_WRONLY))
    ended = wide_cluster.wait(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "0"), log.read_text()
    assert f"job {job}: {NODES + 1} nodes left; again on {NODES} of them" in log.read_text()
