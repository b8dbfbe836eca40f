"""What the tests of launching share: the cluster, a small run, and what one machine makes of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.launch.cluster import Cluster
from tests.launch.ssh_hosts import SshHosts, serve_ssh
from tests.small_run import THREE_D, losses, megatronish, write_run

NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare")


@pytest.fixture
def cluster(session_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster; a test leaves no job in it."""
    yield session_cluster
    session_cluster.command("scancel", "--user=root", cwd=session_cluster.base)


def skip_without_slurm() -> None:
    """Where a cluster cannot be."""
    if os.geteuid() != 0:
        pytest.skip("a cluster of network namespaces needs root")
    if missing := [name for name in NEEDED if shutil.which(name) is None]:
        pytest.skip(f"Slurm is not installed: no {', '.join(missing)} (tests/install_tools.sh)")
    # As the cluster will: a kernel or container may forbid it.
    links = "ip link add br0 type bridge && ip link add v1 type veth peer name eth0"
    trial = f"mount --make-rprivate / && mount -t proc proc /proc && {links}"
    new = ["unshare", "--mount", "--net", "--uts", "--ipc", "--pid", "--fork", "bash", "-c", trial]
    if (tried := subprocess.run(new, capture_output=True, text=True, check=False)).returncode != 0:
        pytest.skip(f"this machine has no network namespaces for us: {tried.stderr.strip()}")


@pytest.fixture(scope="session")
def session_cluster() -> Iterator[Cluster]:
    """Four nodes with eight GPUs that are none; 384 more in partition `big` that jobs can only be planned on."""
    skip_without_slurm()
    # Short: the path of a socket has at most 107 letters.
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:
        cluster = Cluster(Path(folder), "-n", "4", "-f", "384")
        try:
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture(scope="session")
def ssh_hosts() -> Iterator[SshHosts]:
    """Two hosts that ssh reaches, `first` and `second`."""
    # Not pytest's folder: sshd and ssh want keys below folders that only root writes to.
    with tempfile.TemporaryDirectory(prefix="ssh-") as folder, serve_ssh(Path(folder)) as hosts:
        yield hosts


@dataclass(frozen=True)
class SmallRun:
    """A run, and what one machine makes of it."""

    config: Path
    losses: dict[int, float]
    """Of `megatronish train --nproc N`, of every step."""


def run_here(folder: Path, *, ranks: int, steps: int, interval: int, parallel: dict[str, int | bool]) -> SmallRun:
    """The same learning rate all the way: a run that is cut short has the first losses of the whole one."""
    config = write_run(
        folder,
        parallel=parallel,
        optim={"lr": 0.01, "min_lr": 0.01, "warmup_steps": 0},
        train={"steps": steps},
        checkpoint={"interval": interval},
        observe={"log_interval": 1, "tensorboard": False, "peak_tflops": 1.0},
    )
    done = megatronish("train", str(config), "--nproc", str(ranks), timeout=600)
    assert done.returncode == 0, done.stderr
    return SmallRun(config, losses(folder / "runs/tiny"))


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """6 steps at tensor 2 x pipeline 2 x data 2."""
    layout = {key.partition(".")[2]: value for key, _, value in (pair.partition("=") for pair in THREE_D)}
    parallel = {key: True if value == "true" else int(value) for key, value in layout.items()} | {"zero_stage": 1}
    return run_here(tmp_path_factory.mktemp("small"), ranks=8, steps=6, interval=10, parallel=parallel)


@pytest.fixture(scope="session")
def pair_run(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """60 steps on two ranks, saved every 20: most of what a fault costs is the start of processes."""
    return run_here(tmp_path_factory.mktemp("pair"), ranks=2, steps=60, interval=20, parallel={"pipeline": 2})
