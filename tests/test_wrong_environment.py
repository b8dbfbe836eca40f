"""What is wrong around a run: the launcher's variables, the port, the disk. One line with given and needed, and exit code 2.

Each variable by itself is in tests/test_rendezvous.py; a disk that fills up within a save in tests/checkpoint/test_full_disk.py."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path

import pytest

from megatronish.errors import UserError
from megatronish.parallel.launchers import free_port
from megatronish.parallel.rendezvous import VARIABLES, connect, find_place
from tests.ranks import ranks
from tests.small_run import clean_environment, command, error_lines, forked, losses, write_run
from tests.test_rendezvous import WHOLE
from tests.test_train import command_line


def run_command(*arguments: str, **environment: str) -> tuple[int, str]:
    """`megatronish ARGUMENTS`: (exit code, standard error)."""
    ((code, stderr),) = ranks(1).run(command_line, list(arguments), environment)
    assert "Traceback" not in stderr, stderr
    return code, stderr


def test_any_part_of_the_five_variables_is_one_line_that_names_the_missing(tmp_path: Path) -> None:
    whole = {name: WHOLE[name] for name in VARIABLES}
    for number in range(1, len(VARIABLES)):
        for names in combinations(VARIABLES, number):
            with pytest.raises(UserError) as caught:
                find_place({name: whole[name] for name in names})
            missing = [name for name in VARIABLES if name not in names]
            assert f"sets {', '.join(names)} but not {', '.join(missing)}: set all five, or none" in str(caught.value)
            assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("verb", ["train", "eval", "generate"])
@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}, "sets MASTER_ADDR, MASTER_PORT but not RANK, LOCAL_RANK, WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "sets RANK, WORLD_SIZE but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({**WHOLE, "RANK": "7"}, "RANK=7 must be below WORLD_SIZE=4"),
        ({**WHOLE, "WORLD_SIZE": "0", "RANK": "0"}, "RANK=0 must be below WORLD_SIZE=0"),
        ({**WHOLE, "RANK": "²"}, "RANK='²' in the environment is not a number"),
        ({"OMP_NUM_THREADS": "0"}, "OMP_NUM_THREADS='0' in the environment is not a number >= 1"),
    ],
    ids=["master-alone", "no-master", "rank-too-large", "empty-world", "not-a-digit", "no-threads"],
)
def test_every_verb_refuses_a_contradictory_environment(verb: str, environment: dict[str, str], words: str, tmp_path: Path) -> None:
    config = write_run(tmp_path)
    (tmp_path / "runs/tiny/checkpoints").mkdir(parents=True)
    run = str(tmp_path / "runs/tiny")
    arguments = {
        "train": ["train", str(config)],
        "eval": ["eval", run, "--data", str(tmp_path / "heldout")],
        "generate": ["generate", run, "--prompt", "a"],
    }
    code, stderr = run_command(*arguments[verb], **environment)
    (line,) = error_lines(stderr)
    assert code == 2 and words in line and stderr.splitlines() == [line]


@pytest.mark.parametrize("address", ["no.such.host.invalid", "a" * 70 + ".invalid", "two words"])
def test_a_master_that_has_no_address_is_one_line(address: str, tmp_path: Path) -> None:
    code, stderr = run_command("train", str(write_run(tmp_path)), **{**WHOLE, "MASTER_ADDR": address})
    (line,) = error_lines(stderr)
    assert code == 2 and f"MASTER_ADDR={address} cannot be resolved (" in line and "the host of rank 0" in line


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.1.1", "localhost", "::1"])
def test_loopback_on_another_node_than_the_first_is_refused_when_nothing_answers(address: str) -> None:
    place = find_place(WHOLE | {"MASTER_ADDR": address, "MASTER_PORT": str(free_port())})
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        connect(place, timeout_seconds=60, loopback_seconds=0.5)
    (line,) = str(caught.value).splitlines()
    assert f"MASTER_ADDR={address} is each host itself" in line and "rank 3 (LOCAL_RANK=1) is not on the node of rank 0" in line
    assert time.monotonic() - started < 30


def test_several_nodes_on_one_host_may_meet_at_loopback(tmp_path: Path) -> None:
    # Each its own node: LOCAL_RANK=0, LOCAL_WORLD_SIZE=1.
    config, port = write_run(tmp_path, train={"steps": 1}, optim={"warmup_steps": 0}), str(free_port())
    nodes = []
    for rank in (1, 0):
        place = {"RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "2"}
        environment = clean_environment(**place, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        nodes.append(
            subprocess.Popen(command("train", str(config)), env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        )
    for node in nodes:
        stderr = node.communicate(timeout=240)[1]
        assert node.returncode == 0, stderr.decode()
    assert sorted(losses(tmp_path / "runs/tiny")) == [1]


def test_a_busy_port_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        config = str(write_run(tmp_path))
        result = forked(
            "train", config, timeout=120, RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port
        )
    (line,) = error_lines(result.stderr)
    assert result.returncode == 2 and f"rank 0 cannot serve MASTER_ADDR=127.0.0.1 MASTER_PORT={port}" in line, result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a tmpfs with options, or change its options; its path."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def call(options: str) -> Path:
        arguments = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        if shutil.which("mount") is None or subprocess.run(arguments, capture_output=True, check=False).returncode != 0:
            pytest.skip("mounting a tmpfs needs root")
        return disk

    yield call
    while os.path.ismount(disk):
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("nproc", [(), ("--nproc", "2")], ids=["alone", "launcher"])
def test_a_read_only_run_folder_is_one_line(nproc: tuple[str, ...], tmp_path: Path, mount: Callable[[str], Path]) -> None:
    disk = mount("size=16m")
    config = write_run(tmp_path, train={"steps": 1}, optim={"warmup_steps": 0})
    # Not in the pool of processes: its open log would keep the disk from becoming read-only.
    assert forked("train", str(config), f"run_root={disk}").returncode == 0
    mount("size=16m,remount,ro")
    for name in ("tiny", "another"):  # to be resumed, and new
        code, stderr = run_command("train", str(config), "train.steps=2", f"run_root={disk}", f"name={name}", *nproc)
        (line,) = error_lines(stderr)
        assert code == 2 and "Read-only file system" in line and "run_root" in line, stderr


@pytest.mark.parametrize("size", [0, 8, 40, 200, 400])
def test_a_disk_that_fills_up_ends_the_run_with_one_line(size: int, tmp_path: Path, mount: Callable[[str], Path]) -> None:
    disk = mount("size=600k")
    config = write_run(tmp_path, train={"steps": 5}, observe={"tensorboard": size == 40})
    # What is left, in KiB: for nothing, the folders, the first lines, a part of a checkpoint.
    (disk / "ballast").write_bytes(bytes((600 - size) * 1024))
    code, stderr = run_command("train", str(config), f"run_root={disk}")
    (line,) = error_lines(stderr)
    assert code == 2 and "No space left on device" in line and "run_root" in line, stderr
    (disk / "ballast").unlink()
