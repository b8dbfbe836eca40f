"""Real launchers: each gives the losses of `megatronish train --nproc 8`, bit for bit; what is wrong is one clear line."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatronish.parallel.launchers import free_port
from tests.launch.cluster import Cluster, processes
from tests.launch.conftest import SmallRun
from tests.launch.ssh_hosts import SshHosts
from tests.small_run import clean_environment, error_lines, losses, megatronish, wait_until, write_tokens

# Eight processes that import torch on two cores that others use too.
pytestmark = pytest.mark.timeout(900)
TASKS = ("--nodes=4", "--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-node=0")


def places(run: Path) -> list[str]:
    """Of every rank, what its log says of its place."""
    pattern = re.compile(r"rank (\d+ of \d+ \(local \d+ of \d+\), launcher: .*)")
    return [pattern.findall(log.read_text())[0] for log in sorted((run / "logs").iterdir())]


def test_sbatch_gives_the_losses_of_one_machine(cluster: Cluster, root: Path, tmp_path: Path) -> None:
    # The demo's model, layout and numbers; its own tokens take a minute to make.
    write_tokens(tmp_path / "train", seed=1, num_documents=600)
    settings = [
        f"data.train={tmp_path}/train",
        "data.validation=null",
        "data.tokenizer=null",
        "train.eval_interval=0",
        "train.steps=3",
        "optim.warmup_steps=0",
    ]
    here = megatronish("train", "configs/demo_cpu.yaml", *settings, f"run_root={tmp_path}/here", "--nproc", "8", timeout=600)
    assert here.returncode == 0, here.stderr
    log, run = tmp_path / "job.log", tmp_path / "there/demo_cpu"
    job = cluster.submit(
        *TASKS, f"--output={log}", "launch/slurm/pretrain.sbatch", "configs/demo_cpu.yaml", *settings, f"run_root={run.parent}",
        cwd=root, PYTHON=sys.executable,
    )  # fmt: skip
    ended = cluster.wait(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), log.read_text()
    assert losses(run) == losses(tmp_path / "here/demo_cpu") and len(losses(run)) == 3
    launcher = f"launcher: srun (job {job}, step 0)"
    assert places(run) == [f"{rank} of 8 (local {rank % 2} of 2), {launcher}" for rank in range(8)]
    assert f"job {job}, life 1: 8 ranks on 4 nodes (node[001-004])" in log.read_text()


def test_mpirun_gives_the_losses_of_one_machine(small_run: SmallRun, root: Path, tmp_path: Path) -> None:
    if shutil.which("mpirun") is None:
        pytest.skip("no mpirun: tests/install_tools.sh installs it as root")
    options = ["-np", "8", "--oversubscribe", *(["--allow-run-as-root"] if os.geteuid() == 0 else [])]
    done = subprocess.run(
        ["launch/mpi/run.sh", *options, "--", str(small_run.config), f"run_root={tmp_path}"],
        cwd=root, env=clean_environment(PYTHON=sys.executable), capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "tiny") == small_run.losses
    assert places(tmp_path / "tiny") == [f"{rank} of 8 (local {rank} of 8), launcher: mpirun (Open MPI)" for rank in range(8)]


def start_deepspeed(ssh_hosts: SshHosts, hostfile: Path, *arguments: str, options: str, log: Path) -> subprocess.Popen[bytes]:
    """launch/deepspeed/run.sh with the real launcher; only the script sees to the environment of the other hosts."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: pip install -c constraints.txt -e '.[deepspeed]'")
    path = ssh_hosts.environment()["PATH"]
    if "mpich" in options:  # `mpirun` is that of Open MPI, where both are installed
        if (mpich := shutil.which("mpirun.mpich")) is None:
            pytest.skip("no mpirun.mpich: tests/install_tools.sh installs it as root")
        (hostfile.parent / "mpirun").write_text(f'#!/bin/sh\nexec {mpich} "$@"\n')
        (hostfile.parent / "mpirun").chmod(0o755)
        path = f"{hostfile.parent}:{path}"
    environment = clean_environment(
        PATH=path, PYTHON=sys.executable, DS_ACCELERATOR="cpu", GLOO_SOCKET_IFNAME="lo",
        OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1", DEEPSPEED_ARGS=f"--master_addr 127.0.0.1 {options}",
    )  # fmt: skip
    command = [str(Path(__file__).parents[2] / "launch/deepspeed/run.sh"), str(hostfile), *arguments]
    with open(log, "wb") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file)


def run_deepspeed(ssh_hosts: SshHosts, hostfile: Path, *arguments: str, options: str) -> tuple[int, str]:
    """To its end: the exit code, and what it said."""
    log = hostfile.with_suffix(".log")
    code = start_deepspeed(ssh_hosts, hostfile, *arguments, options=options, log=log).wait(800)
    return code, log.read_text()


MPI_OF_TWO = "--launcher openmpi --launcher_args '--mca btl_tcp_if_include lo'"
ADDRESSES = ("127.0.0.1", "127.0.0.2")
"""By address: mpirun looks names up itself."""


@pytest.mark.parametrize(
    ("tool", "options", "hosts", "launcher"),
    [
        ("pdsh", "", ("first", "second"), "deepspeed"),
        # It knows of no shared host, so the ranks ask mpi4py where to meet.
        ("mpirun", MPI_OF_TWO, ADDRESSES, "mpirun (Open MPI), mpi4py"),
        ("mpirun.mpich", "--launcher mpich", ADDRESSES, "environment"),
    ],
    ids=["pdsh", "openmpi", "mpich"],
)
def test_deepspeed_on_two_hosts_gives_the_losses_of_one_machine(
    ssh_hosts: SshHosts, small_run: SmallRun, tmp_path: Path, tool: str, options: str, hosts: tuple[str, str], launcher: str
) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"no {tool}: tests/install_tools.sh installs it as root")
    if "mpi4py" in launcher and importlib.util.find_spec("mpi4py") is None:
        pytest.skip("mpi4py is not installed: pip install -c constraints.txt -e '.[mpi]'")
    hostfile = tmp_path / "hosts"
    hostfile.write_text(f"# two\n{hosts[0]} slots=4\n{hosts[1]} slots=4\n")
    settings = (str(small_run.config), f"run_root={tmp_path}")
    code, said = run_deepspeed(ssh_hosts, hostfile, *settings, options=f"--master_port {free_port()} {options}")
    assert code == 0, said
    assert losses(tmp_path / "tiny") == small_run.losses
    assert places(tmp_path / "tiny") == [f"{rank} of 8 (local {rank % 4} of 4), launcher: {launcher}" for rank in range(8)]


def test_deepspeed_with_srun_gives_the_losses_of_one_machine(
    cluster: Cluster, small_run: SmallRun, root: Path, tmp_path: Path
) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: pip install -c constraints.txt -e '.[deepspeed]'")
    log, hostfile = tmp_path / "job.log", tmp_path / "hosts"
    hostfile.write_text("node001 slots=4\nnode002 slots=4\n")
    command = f"launch/deepspeed/run.sh {hostfile} {small_run.config} run_root={tmp_path}"
    job = cluster.submit(
        "--nodes=2", "--nodelist=node[001-002]", "--ntasks-per-node=4", f"--output={log}", f"--wrap={command}",
        cwd=root, PYTHON=sys.executable, DS_ACCELERATOR="cpu", DEEPSPEED_ARGS="--launcher slurm",
    )  # fmt: skip
    ended = cluster.wait(job)
    assert ended["ExitCode"] == "0:0", log.read_text()
    assert losses(tmp_path / "tiny") == small_run.losses
    assert places(tmp_path / "tiny") == [
        f"{rank} of 8 (local {rank % 4} of 4), launcher: srun (job {job}, step 0)" for rank in range(8)
    ]


@pytest.mark.parametrize(
    ("hosts", "settings", "line"),
    [
        ("first slots=4\nnobody slots=4\n", (), "host nobody is not reached by `ssh nobody true` without a password: ssh: connect"),
        # The only host, and not this one: deepspeed by itself would run its ranks here.
        ("nobody slots=8\n", (), "host nobody is not reached by `ssh nobody true`"),
        ("first slots=2\nsecond slots=2\n", (), "is 8 ranks, but there are 4"),
        ("first slots=4\nsecond slots=4\n", ("train.step=3",), "train.step"),
    ],
    ids=["unreachable", "only one, unreachable", "slots", "config"],
)
def test_deepspeed_starts_no_rank_where_it_could_not_start_all(
    ssh_hosts: SshHosts, small_run: SmallRun, tmp_path: Path, hosts: str, settings: tuple[str, ...], line: str
) -> None:
    if shutil.which("pdsh") is None:
        pytest.skip("no pdsh: tests/install_tools.sh installs it as root")
    hostfile = tmp_path / "hosts"
    hostfile.write_text(hosts)
    code, text = run_deepspeed(ssh_hosts, hostfile, str(small_run.config), f"run_root={tmp_path}", *settings, options="")
    (said,) = error_lines(text)
    assert line in said and code == 2 and not (tmp_path / "tiny").exists()


@pytest.mark.parametrize(
    ("number", "options", "hosts"),
    [(signal.SIGUSR1, "", ("first", "second")), (signal.SIGTERM, MPI_OF_TWO, ADDRESSES)],
    ids=["USR1, pdsh", "TERM, openmpi"],
)
def test_deepspeeds_script_hands_signals_to_the_ranks(
    ssh_hosts: SshHosts, pair_run: SmallRun, tmp_path: Path, number: signal.Signals, options: str, hosts: tuple[str, str]
) -> None:
    hostfile, log, run = tmp_path / "hosts", tmp_path / "log", tmp_path / "tiny"
    hostfile.write_text(f"{hosts[0]} slots=1\n{hosts[1]} slots=1\n")
    settings = (str(pair_run.config), f"run_root={tmp_path}", "train.steps=100000")
    options = f"--master_port {free_port()} {options}"
    script = start_deepspeed(ssh_hosts, hostfile, *settings, options=options, log=log)
    wait_until(lambda: (run / "metrics.jsonl").exists() or script.poll() is not None, seconds=200, what="a step")
    script.send_signal(number)
    script.wait(120)
    last = max(losses(run), default=0)
    assert (run / f"checkpoints/step-{last:08d}").is_dir(), log.read_text()
    assert f"stopped after step {last} of 100000, as a signal asked" in (run / "logs/rank-00000.log").read_text()
    wait_until(lambda: not processes(tmp_path), seconds=60, what="the end of all processes", often=0.5)
    assert script.returncode == 75, log.read_text()


def test_two_torchrun_agents_give_the_losses_of_one_machine(
    cluster: Cluster, small_run: SmallRun, root: Path, tmp_path: Path
) -> None:
    done = cluster.command(
        "srun", "--nodes=2", "--ntasks-per-node=1", "--nodelist=node[002-003]", "launch/torchrun/run.sh", "2", "4", "node002",
        str(small_run.config), f"run_root={tmp_path}", cwd=root, timeout=600, PYTHON=sys.executable,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "tiny") == small_run.losses
    # Each agent's task is one of srun's; torchrun's word counts.
    assert places(tmp_path / "tiny") == [f"{rank} of 8 (local {rank % 4} of 4), launcher: torchrun" for rank in range(8)]


def test_a_shell_of_sbatch_is_no_rank_and_its_tasks_are(cluster: Cluster, root: Path, tmp_path: Path) -> None:
    probe = f"{sys.executable} -c 'from megatronish.parallel.rendezvous import *; print(find_place().describe())'"
    job = cluster.submit(
        "--nodes=2", "--ntasks=3", f"--output={tmp_path}/log", f"--wrap={probe} && srun {probe} && {probe}", cwd=root
    )
    assert cluster.wait(job)["JobState"] == "COMPLETED"
    lines = (tmp_path / "log").read_text().splitlines()
    alone = "rank 0 of 1 (local 0 of 1), launcher: none (one process)"
    assert lines[0] == lines[-1] == alone
    tail = f"launcher: srun (job {job}, step 0)"
    expected = ("0 of 3 (local 0 of 2)", "1 of 3 (local 1 of 2)", "2 of 3 (local 0 of 1)")
    assert sorted(lines[1:-1]) == [f"rank {place}, {tail}" for place in expected]


def test_another_number_of_tasks_than_the_config_has_is_one_line_before_any_rank_starts(
    cluster: Cluster, small_run: SmallRun, root: Path, tmp_path: Path
) -> None:
    log = tmp_path / "job.log"
    job = cluster.submit(
        *TASKS, "--ntasks-per-node=1", f"--output={log}", "launch/slurm/pretrain.sbatch", str(small_run.config), cwd=root,
        PYTHON=sys.executable,
    )  # fmt: skip
    ended = cluster.wait(job)
    (line,) = error_lines(log.read_text())
    assert ended["ExitCode"] == "2:0" and "8 ranks, but there are 4" in line


def test_preflight_names_the_bad_node_and_tries_the_others_together(cluster: Cluster, root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "launch", tmp_path / "launch")
    job = cluster.submit(
        *TASKS, f"--output={tmp_path}/log", "launch/slurm/preflight.sbatch", cwd=tmp_path,
        PYTHON=sys.executable, PYTHONPATH=str(root), EXPECT_GPUS="0",
        NODE_CHECK='[ "$(hostname)" != node003 ] || { echo Xid 79; exit 1; }',
    )  # fmt: skip
    ended, text = cluster.wait(job), (tmp_path / "log").read_text()
    assert ended["ExitCode"] == "1:0", text
    assert "node003 bad: NODE_CHECK failed: Xid 79\n" in text and all(f"node00{n} ok\n" in text for n in (1, 2, 4))
    assert (tmp_path / f"preflight-{job}.exclude").read_text() == "node003\n"
    assert re.search(r"6 ranks \(srun \(job \d+, step \d\)\): sums of 4 MiB are right", text)
