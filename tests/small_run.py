"""A small run on disk, and the command line as a real process: what the end-to-end tests share."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatronish.checkpoint.load import open_checkpoint
from megatronish.checkpoint.pieces import whole_box
from megatronish.data.indexed_writer import IndexedDatasetWriter
from megatronish.errors import code_of_job
from megatronish.parallel.launchers import free_port

VOCAB_SIZE = 101
THREE_D = ("parallel.tensor=2", "parallel.pipeline=2", "parallel.data=2", "parallel.sequence=true")
"""On 8 ranks."""
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")


def write_tokens(prefix: Path, *, seed: int, num_documents: int, bad_token: tuple[int, int, int] | None = None) -> None:
    """Random documents of 5 to 59 tokens; `bad_token` is (document, offset, value)."""
    random = np.random.default_rng(seed)
    with IndexedDatasetWriter(prefix, dtype=np.dtype("<u2")) as writer:
        for document in range(num_documents):
            tokens = random.integers(0, VOCAB_SIZE, random.integers(5, 60)).astype("<u2")
            if bad_token is not None and document == bad_token[0]:
                tokens[bad_token[1]] = bad_token[2]
            writer.add_tokens(tokens)
            writer.end_document()


def write_run(folder: Path, **sections: dict[str, Any]) -> Path:
    """Tokens and a config of a run of 20 steps in `folder`; `sections` go over the config's. The config's path."""
    write_tokens(folder / "train", seed=1, num_documents=60)
    write_tokens(folder / "heldout", seed=2, num_documents=11)
    config: dict[str, Any] = {
        "name": "tiny",
        "run_root": str(folder / "runs"),
        "model": {
            "num_layers": 4,
            "hidden_size": 32,
            "num_heads": 8,
            "num_kv_heads": 4,
            "mlp_size": 48,
            "vocab_size": VOCAB_SIZE,
            "vocab_multiple": 8,
        },
        "data": {"train": str(folder / "train"), "validation": str(folder / "heldout"), "sequence_length": 16},
        # Buckets so small that there are several, and a learning rate so large that a wrong state shows.
        "optim": {"lr": 0.01, "bucket_mib": 0.02, "warmup_steps": 3},
        "train": {"steps": 20, "global_batch_size": 8, "micro_batch_size": 2},
        "checkpoint": {"interval": 5, "keep": 10},
        "observe": {"log_interval": 1, "tensorboard": False, "peak_tflops": 1.0},
    }
    for name, values in sections.items():
        config[name] = {**config.get(name, {}), **values}
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))
    return path


def command(*arguments: str) -> list[str]:
    """`megatronish ARGUMENTS` of this checkout."""
    return [sys.executable, "-m", "megatronish", *arguments]


def clean_environment(**variables: str) -> dict[str, str]:
    """This process's, without a launcher's variables, and `variables`."""
    return {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES} | variables


def megatronish(*arguments: str, timeout: float = 240.0, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `megatronish ARGUMENTS` to its end."""
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, env=clean_environment(**variables), timeout=timeout, check=False
    )


def start(*arguments: str, stderr: Path, **variables: str) -> subprocess.Popen[bytes]:
    """Start `megatronish ARGUMENTS` as the leader of a process group of its own."""
    with open(stderr, "wb") as file:
        return subprocess.Popen(
            command(*arguments), stdout=subprocess.DEVNULL, stderr=file, env=clean_environment(**variables), start_new_session=True
        )


def _command_in_fork(arguments: Sequence[str], environment: dict[str, str], stdout: str, stderr: str, plant: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    exec(plant, {})
    from megatronish import cli

    sys.argv = ["megatronish", *arguments]
    cli.main()


def start_forked(
    *arguments: str, nproc: int = 1, stdout: Path = Path(os.devnull), stderr: Path, plant: str = "", **variables: str
) -> list[ForkServerProcess]:
    """Start `megatronish ARGUMENTS` in new processes that have imported everything: the whole command, less 2.5 s of CPU each.

    Of several, each is told its rank, as by a launcher. `plant`: Python that each runs first."""
    context = multiprocessing.get_context("forkserver")
    port, processes = str(free_port()) if nproc > 1 else "", []
    for rank in range(nproc):
        place = {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{nproc}", "LOCAL_WORLD_SIZE": f"{nproc}"}
        place = {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if nproc > 1 else {}
        environment = clean_environment(**place, **variables)
        processes.append(context.Process(target=_command_in_fork, args=(arguments, environment, str(stdout), str(stderr), plant)))
        processes[-1].start()
    return processes


def forked(*arguments: str, nproc: int = 1, timeout: float = 240.0, **options: str) -> subprocess.CompletedProcess[str]:
    """`start_forked`, to the end of all; the exit code is that of a launcher."""
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder) / "stdout", Path(folder) / "stderr"
        processes = start_forked(*arguments, nproc=nproc, stdout=stdout, stderr=stderr, **options)  # type: ignore[arg-type]
        stop = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, stop - time.monotonic()))
        codes = [process.exitcode for process in processes]
        kill_all(processes)
        ended = [code for code in codes if code is not None]
        assert len(ended) == nproc, f"{arguments} did not end within {timeout} s: {stderr.read_text()}"
        code = ended[0] if nproc == 1 else code_of_job(ended)
        return subprocess.CompletedProcess(arguments, code, stdout.read_text(), stderr.read_text())


def kill_all(processes: Sequence[ForkServerProcess]) -> None:
    """SIGKILL to each, and wait for them."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def descendants(pid: int) -> list[int]:
    """Processes started by `pid`, and by those."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # gone meanwhile
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found, front = [], [pid]
    while front:
        front = [child for parent in front for child in parents.get(parent, [])]
        found += front
    return found


def is_alive(pid: int) -> bool:
    """Whether it runs: a process that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], *, seconds: float, what: str, often: float = 0.02) -> None:
    """Poll; AssertionError naming `what` when it does not come."""
    stop = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < stop, f"{what} did not happen within {seconds:g} s"
        time.sleep(often)


def wait_until_ended(pids: Sequence[int], *, seconds: float) -> None:
    """Poll until none of the processes runs any more."""
    wait_until(lambda: not any(map(is_alive, pids)), seconds=seconds, what=f"the end of processes {list(pids)}")


def losses(run: Path) -> dict[int, float]:
    """Training loss by step, as metrics.jsonl has it; a step that is there twice fails."""
    found: dict[int, float] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "loss" in row:
            assert row["step"] not in found, f"step {row['step']} is written twice"
            found[row["step"]] = row["loss"]
    return found


def saved_tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    checkpoint = open_checkpoint(run / "checkpoints" / f"step-{step:08d}")
    tensors = {}
    for name, (shape, dtype) in checkpoint.tensors().items():
        tensors[name] = torch.empty(shape, dtype=getattr(torch, dtype))
        checkpoint.read(name, whole_box(shape), tensors[name])
    return tensors


def assert_same_bits(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Names, and every bit of every tensor."""
    assert got.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(got[name], tensor)]
    assert not different, f"{len(different)} of {len(expected)} tensors differ, first {different[0]}"


def error_lines(stderr: str) -> Sequence[str]:
    """What a user sees as errors."""
    return [line for line in stderr.splitlines() if line.startswith("error:")]


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the whole process group, and wait for its leader."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
