"""The scripts of launch/ by themselves: shellcheck, and what they refuse."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatronish.parallel.launchers import free_port
from tests.small_run import clean_environment, descendants, losses, wait_until, wait_until_ended, write_run

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("launch", "tests")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".sh", ".sbatch")
)


def test_there_are_scripts() -> None:
    assert {"launch/env.sh", "launch/slurm/pretrain.sbatch", "tests/launch/cluster.sh"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_finds_nothing(script: str) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (tests/install_tools.sh)")
    done = subprocess.run(["shellcheck", "-x", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("launch/slurm/pretrain.sbatch", []),
        ("launch/slurm/array_sweep.sbatch", ["config.yaml"]),
        ("launch/deepspeed/run.sh", ["hostfile"]),
        ("launch/mpi/run.sh", ["-np", "8", "config.yaml"]),
        ("launch/torchrun/run.sh", ["2", "8", "config.yaml"]),
    ],
)
def test_too_few_arguments_are_answered_with_the_usage(script: str, arguments: list[str]) -> None:
    done = subprocess.run(["bash", script, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("usage: ") and "CONFIG" in line


@pytest.mark.parametrize(
    ("script_of", "options", "number", "code"),
    [
        ("torchrun", ["1", "2", "localhost"], signal.SIGUSR1, 1),  # torchrun's, whatever its ranks end with
        ("mpi", ["-np", "2", "--oversubscribe", "--"], signal.SIGTERM, 75),
    ],
)
def test_a_script_hands_signals_to_the_ranks(
    script_of: str, options: list[str], number: signal.Signals, code: int, tmp_path: Path
) -> None:
    if script_of == "mpi" and shutil.which("mpirun") is None:
        pytest.skip("no mpirun: tests/install_tools.sh installs it as root")
    config, run = write_run(tmp_path, train={"steps": 100_000}, checkpoint={"interval": None}), tmp_path / "runs/tiny"
    command = [f"launch/{script_of}/run.sh", *options, str(config), "parallel.tensor=2"]
    environment = clean_environment(
        PYTHON=sys.executable, RDZV_PORT=str(free_port()), TORCHRUN_ARGS="--rdzv-backend static --node-rank 0",
        OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
    )  # fmt: skip
    with open(tmp_path / "log", "wb") as log:
        script = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def step() -> int:
        return max(losses(run), default=0) if (run / "metrics.jsonl").exists() else 0

    wait_until(lambda: step() > 0, seconds=200, what="a step")
    processes = descendants(script.pid)
    assert len(processes) >= 3
    script.send_signal(signal.SIGUSR2)
    wait_until(lambda: len(list((run / "post_mortem").glob("rank-*.json"))) == 2, seconds=60, what="what ranks are doing")
    before = step()
    wait_until(lambda: step() > before, seconds=60, what="another step")
    script.send_signal(number)
    assert script.wait(timeout=200) == code, (tmp_path / "log").read_text()
    wait_until_ended(processes, seconds=30)
    assert (run / f"checkpoints/step-{step():08d}").is_dir(), (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (None, "is not there, or empty"),
        ("", "is not there, or empty"),
        ("# none\n\n", "names no host"),
        ("a slots=8\nb slots=0\n", ':2: "b slots=0" is not HOST slots=N, with N >= 1'),
        ("a slots=8\nb\n", ':2: "b" is not HOST slots=N'),
        ("a slots=x\n", ':1: "a slots=x" is not HOST slots=N'),
        ("a slots=8\nb slots=8\na slots=4\n", ":3: host a is on line 1 already"),
        ("# two\na slots=8\nb slots=4\n", "deepspeed: 12 ranks on 2 hosts"),
    ],
)
def test_a_hostfile_is_read_before_deepspeed_reads_it(text: str | None, line: str, tmp_path: Path) -> None:
    hostfile, stub = tmp_path / "hosts", tmp_path / "bin/deepspeed"
    if text is not None:
        hostfile.write_text(text)
    stub.parent.mkdir()
    # In the place of deepspeed, of the Python that checks the config, and of ssh.
    for name, does in {"deepspeed": 'echo "$@"; cat "$DS_ENV_FILE"', "python": "true", "ssh": "true", "pdsh": "true"}.items():
        (stub.parent / name).write_text(f"#!/bin/sh\n{does}\n")
        (stub.parent / name).chmod(0o755)
    environment = clean_environment(
        PATH=f"{stub.parent}:/usr/bin:/bin", PYTHON=str(stub.parent / "python"), HOME=str(tmp_path),
        DEEPSPEED_ARGS="--master_port 29501 --launcher_args '-x y'", GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    (tmp_path / ".deepspeed_env").write_text("OF_THE_USER=1\n")
    command = ["launch/deepspeed/run.sh", str(hostfile), "c.yaml", "a.b=1"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    (said,) = done.stderr.splitlines()
    assert line in said
    if line.startswith("deepspeed"):
        words, *settings = done.stdout.splitlines()
        options = "--master_port 29501 --launcher_args -x y"
        assert words == f"--hostfile {hostfile} {options} --module megatronish train c.yaml a.b=1"
        # What other hosts get of the environment.
        assert settings[0] == "OF_THE_USER=1" and {"GLOO_SOCKET_IFNAME=lo", "OMP_NUM_THREADS=1"} <= set(settings)
    assert done.returncode == (0 if line.startswith("deepspeed") else 2)
