"""`megatronish train` end to end: bad input is one line and exit code 2, a failed rank is reported once, no process is left."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatronish.data.tokenizer import train_tokenizer
from tests.ranks import ranks
from tests.small_run import (
    LAUNCHER_VARIABLES,
    THREE_D,
    descendants,
    error_lines,
    kill_group,
    losses,
    megatronish,
    start,
    start_forked,
    wait_until,
    wait_until_ended,
    write_run,
    write_tokens,
)

ENDLESS = ("train.steps=1000000", "checkpoint.interval=null", "name=endless")


def command_line(rank: int, arguments: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """`megatronish ARGUMENTS` in a process of the pool, which has imported everything already: (exit code, standard error)."""
    from megatronish import cli

    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(environment)
    sys.argv = ["megatronish", *arguments]
    with contextlib.redirect_stderr(io.StringIO()) as stderr, contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.main()
            code: object = 0
        except SystemExit as end:
            code = end.code or 0
    for name in environment:
        del os.environ[name]
    assert isinstance(code, int)
    return code, stderr.getvalue()


@dataclass(frozen=True)
class Case:
    """One bad input: what is done to a good run's folder, how it is started, what the one line must say."""

    name: str
    words: tuple[str, ...]
    prepare: Callable[[Path], object] = lambda folder: None
    arguments: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


def overwrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def large_tokenizer(folder: Path) -> None:
    (folder / "text.txt").write_text(" ".join(f"word{i} other{i * 7}" for i in range(2000)))
    train_tokenizer([folder / "text.txt"], vocab_size=300, out=folder / "tokenizer.json")


def small_heldout(folder: Path) -> None:
    write_tokens(folder / "heldout", seed=1, num_documents=1)


def token_outside(folder: Path) -> None:
    write_tokens(folder / "train", seed=1, num_documents=8, bad_token=(7, 2, 500))


def file_in_the_way(folder: Path) -> None:
    (folder / "runs").write_text("")


def launched(**changes: str) -> tuple[tuple[str, str], ...]:
    whole = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    return tuple({**whole, **changes}.items())


CASES = [
    Case("no .idx", ("train.bin is there without", "train.idx"), lambda folder: (folder / "train.idx").unlink()),
    Case("no .bin", ("train.idx is there without", "train.bin"), lambda folder: (folder / "train.bin").unlink(), ("--nproc", "2")),
    Case("no set", ("nothing: no such set",), arguments=("data.train=nothing", "--nproc", "8", *THREE_D)),
    Case("wrong magic", ("train.idx: begins with", "MMIDIDX"), overwrite("train.idx", lambda b: b"NOTANIDX" + b[8:])),
    Case("wrong version", ("train.idx: format version 9",), overwrite("train.idx", lambda b: b[:9] + b"\x09" + b[10:])),
    Case("unknown dtype", ("train.idx: unknown dtype code 77",), overwrite("train.idx", lambda b: b[:17] + b"\x4d" + b[18:])),
    Case("truncated .idx", ("train.idx: truncated",), overwrite("train.idx", lambda b: b[:-9]), ("--nproc", "2")),
    Case("truncated .bin", ("train.bin: truncated", "copy both files"), overwrite("train.bin", lambda b: b[:-3])),
    Case("empty .idx", ("train.idx: truncated, 0 bytes",), overwrite("train.idx", lambda b: b"")),
    Case(
        "too few tokens",
        ("data.train", "too few", "data.sequence_length=100000"),
        arguments=("data.sequence_length=100000", "data.validation=null"),
    ),
    Case("held-out set too small", ("heldout", "too few"), small_heldout, ("data.sequence_length=64",)),
    Case("token outside", ("token 500 in document 7 at offset 2", "vocabulary of 101"), token_outside),
    Case(
        "tokenizer too large",
        ("model.vocab_size=101 is smaller than", "tokens of data.tokenizer="),
        large_tokenizer,
        ("data.tokenizer={folder}/tokenizer.json",),
    ),
    Case("no tokenizer", ("no such tokenizer", "gone.json"), arguments=("data.tokenizer=gone.json",)),
    Case("not a tokenizer", ("config.yaml: not a tokenizer.json",), arguments=("data.tokenizer={folder}/config.yaml",)),
    Case("no config", ("elsewhere.yaml",), arguments=("elsewhere.yaml",)),
    Case("world size", ("parallel.tensor=2", "8 ranks", "there are 6"), arguments=(*THREE_D, "--nproc", "6")),
    Case("one process for eight ranks", ("8 ranks", "there is 1"), arguments=THREE_D),
    Case("file in the way", ("cannot write the run folder", "run_root"), file_in_the_way),
    Case("file in the way of ranks", ("cannot write the run folder", "run_root"), file_in_the_way, ("--nproc", "2")),
    Case("RANK alone", ("sets RANK but not LOCAL_RANK, WORLD_SIZE",), environment=(("RANK", "0"),)),
    Case("RANK too large", ("RANK=2 must be below WORLD_SIZE=2",), environment=launched(RANK="2")),
    Case("--nproc under a launcher", ("--nproc 4", "WORLD_SIZE=2"), arguments=("--nproc", "4"), environment=launched()),
    Case(
        "MASTER_ADDR",
        ("MASTER_ADDR=no.such.host.invalid cannot be resolved",),
        environment=launched(MASTER_ADDR="no.such.host.invalid"),
    ),
    Case("OMP_NUM_THREADS=0", ("OMP_NUM_THREADS='0'", "train.cpu_threads"), environment=(("OMP_NUM_THREADS", "0"),)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_one_line_and_exit_code_2(case: Case, tmp_path: Path) -> None:
    config = write_run(tmp_path)
    case.prepare(tmp_path)
    arguments = [argument.format(folder=tmp_path) for argument in case.arguments]
    path = [] if case.name == "no config" else [str(config)]
    ((code, stderr),) = ranks(1).run(command_line, ["train", *path, *arguments], dict(case.environment))
    assert code == 2, stderr
    assert "Traceback" not in stderr
    (line,) = error_lines(stderr)
    for word in case.words:
        assert word in line, line
    started = {"token outside"}  # found only when it is read
    assert case.name in started or stderr.splitlines() == [line]


def test_a_bad_token_is_found_on_any_rank_and_said_once(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    write_tokens(tmp_path / "train", seed=1, num_documents=60, bad_token=(30, 3, 777))
    result = megatronish("train", str(config), "parallel.tensor=2", "--nproc", "4")
    assert result.returncode == 2, result.stderr
    (line,) = error_lines(result.stderr)
    assert "token 777 in document 30 at offset 3 is outside the vocabulary of 101" in line
    assert "Traceback" not in result.stderr and "lost a peer" not in result.stderr
    logs = [path.read_text() for path in sorted((tmp_path / "runs/tiny/logs").iterdir())]
    assert len(logs) == 4 and any("token 777" in log for log in logs)


def test_one_of_several_ranks_that_fails_is_the_one_with_a_traceback(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    (tmp_path / "site").mkdir()
    # Python imports this module in every process; in rank 2 it makes step 3 fail.
    (tmp_path / "site/sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '2':\n"
        "    from megatronish.trainer import Trainer\n"
        "    whole = Trainer.train_step\n"
        "    def train_step(self, step):\n"
        "        if step == 3:\n"
        "            raise ArithmeticError('planted')\n"
        "        return whole(self, step)\n"
        "    Trainer.train_step = train_step\n"
    )
    environment = {"PYTHONPATH": f"{tmp_path / 'site'}:{Path(__file__).parent.parent}"}
    result = megatronish("train", str(config), "parallel.pipeline=2", "parallel.tensor=2", "--nproc", "4", **environment)
    assert result.returncode == 76, result.stderr
    assert result.stderr.count("Traceback") == 1
    assert "rank 2 of 4 failed:" in result.stderr and "ArithmeticError: planted" in result.stderr
    assert "ArithmeticError: planted" in (tmp_path / "runs/tiny/logs/rank-00002.log").read_text()
    assert "ArithmeticError" not in (tmp_path / "runs/tiny/logs/rank-00001.log").read_text()


def start_endless(folder: Path, nproc: int) -> tuple[Path, subprocess.Popen[bytes], list[int]]:
    """A run that trains on `nproc` ranks until it is stopped: (its standard error, launcher, all other processes)."""
    stderr = folder / "stderr"
    launcher = start("train", str(write_run(folder)), *ENDLESS, "parallel.tensor=2", "--nproc", str(nproc), stderr=stderr)
    wait_until(lambda: "step 1/" in stderr.read_text(), seconds=200, what="step 1")
    return stderr, launcher, descendants(launcher.pid)


def test_a_killed_rank_is_named_and_ends_the_run(tmp_path: Path) -> None:
    stderr, launcher, processes = start_endless(tmp_path, 4)
    os.kill(processes[2], signal.SIGKILL)
    assert launcher.wait(timeout=100) == 76
    wait_until_ended(processes, seconds=30)
    text = stderr.read_text()
    assert "was ended by SIGKILL" in text or "lost a peer" in text
    assert "Traceback" not in text
    # Each rank says at most one line of it.
    for rank in range(4):
        assert text.count(f"rank {rank} of 4 lost") <= 1


def test_ctrl_c_leaves_no_process_and_no_traceback(tmp_path: Path) -> None:
    stderr, launcher, processes = start_endless(tmp_path, 2)
    before = stderr.read_text()
    os.killpg(launcher.pid, signal.SIGINT)
    assert launcher.wait(timeout=100) == 130
    wait_until_ended(processes, seconds=30)
    after = stderr.read_text().removeprefix(before)
    assert "Traceback" not in after and "lost a peer" not in after
    assert losses(tmp_path / "runs/endless")  # what was written is whole


def test_a_launcher_that_is_killed_takes_its_ranks_with_it(tmp_path: Path) -> None:
    _, launcher, processes = start_endless(tmp_path, 2)
    assert len(processes) >= 2
    kill_group(launcher)
    wait_until_ended(processes, seconds=30)


def test_ranks_that_another_launcher_started_report_bad_input_once(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    write_tokens(tmp_path / "train", seed=1, num_documents=60, bad_token=(30, 3, 777))
    processes = start_forked("train", str(config), nproc=2, stderr=tmp_path / "stderr")
    for process in processes:
        process.join(200)
    codes = [process.exitcode for process in processes]
    assert 2 in codes and all(code in (2, 76) for code in codes)
    text = (tmp_path / "stderr").read_text()
    assert len([line for line in text.splitlines() if "token 777" in line]) == 1, text
    assert "Traceback" not in text
