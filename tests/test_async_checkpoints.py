"""checkpoint.asynchronous=true in whole runs: the same bits, one save at a time, failures seen by every rank, crashes survived."""

from __future__ import annotations

import contextlib
import io
import logging
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatronish import train
from megatronish.checkpoint.storage import FileStorage
from megatronish.comm.recording import Call, Recorder
from megatronish.config import Config
from megatronish.config_loader import load_config
from megatronish.parallel.mesh import MeshShape, build_mesh
from megatronish.preflight.rehearse import play, rehearse
from megatronish.run_folder import RunFolder
from megatronish.surroundings import Surroundings, open_datasets
from tests.parallel.parity import Case
from tests.ranks import ranks
from tests.small_run import (
    assert_same_bits,
    error_lines,
    forked,
    kill_all,
    losses,
    saved_tensors,
    start_forked,
    wait_until,
    write_run,
)
from tests.test_resume import train_life

ASYNC = "checkpoint.asynchronous=true"

# Rank 1 does `then` in the middle of writing step 10, half of whose file is there.
STUCK_DISK = """
import os, time
from megatronish.checkpoint.storage import FileStorage
whole = FileStorage.write_tensors
def write_tensors(self, path, tensors):
    result = whole(self, path, tensors)
    if "step-00000010" in str(path) and os.environ.get("RANK", "0") == "1":
        os.truncate(path, result[0] // 2)
        {then}
    return result
FileStorage.write_tensors = write_tensors
"""


def test_the_run_and_its_files_are_those_of_saves_that_wait(tmp_path: Path) -> None:
    config = write_run(tmp_path, checkpoint={"interval": 5, "keep": 3})
    for name, override in (("waits", "checkpoint.asynchronous=false"), ("goes-on", ASYNC)):
        train_life(config, f"name={name}", override, world_size=2)
    waits, goes_on = tmp_path / "runs/waits", tmp_path / "runs/goes-on"
    assert losses(goes_on) == losses(waits)
    names = sorted(path.name for path in (waits / "checkpoints").iterdir())
    assert names == ["step-00000010", "step-00000015", "step-00000020"]
    assert sorted(path.name for path in (goes_on / "checkpoints").iterdir()) == names
    for name in names:
        for file in ("rank-00000.safetensors", "rank-00001.safetensors"):
            assert (goes_on / "checkpoints" / name / file).read_bytes() == (waits / "checkpoints" / name / file).read_bytes()
        assert_same_bits(saved_tensors(goes_on, int(name[5:])), saved_tensors(waits, int(name[5:])))


class SlowDisk(FileStorage, logging.Handler):
    """Has not written a file before the log says that the next save waits for it, if it ever does."""

    def __init__(self) -> None:
        super().__init__()
        self.awaited = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if "waits for" in record.getMessage():
            self.awaited.set()

    def write_tensors(self, path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
        if "step-00000003" in str(path):
            assert self.awaited.wait(60)
        return super().write_tensors(path, tensors)


def test_a_second_save_waits_for_the_first_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = load_config(write_run(tmp_path), [ASYNC, "checkpoint.interval=3", "train.steps=7"])
    folder = RunFolder.of(config)
    folder.prepare(config)
    mesh = build_mesh(MeshShape(), 0, device=torch.device("cpu"))
    log, disk = logging.getLogger("tests.async"), SlowDisk()
    log.addHandler(disk)
    around = Surroundings(folder, log, token="test", storage=disk)
    with caplog.at_level(logging.INFO, "tests.async"), contextlib.redirect_stderr(io.StringIO()):
        train.run_training(config, mesh, open_datasets(config), around)
    lines = [record.getMessage() for record in caplog.records]
    assert any(
        r.levelno == logging.WARNING and "the save of step 6 waits for that of step 3:" in r.getMessage() for r in caplog.records
    )
    order = ["saving step 3", "step 6 waits", "step-00000003 in", "saving step 6", "step-00000006 in", "saving step 7", "07 in"]
    at = [next(i for i, line in enumerate(lines) if words in line) for words in order]
    assert at == sorted(at)
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["step-00000003", "step-00000006", "step-00000007"]


@pytest.mark.timeout(600)
def test_sigkill_in_the_middle_of_a_save_leaves_the_last_whole_and_the_run_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    killed, straight = tmp_path / "runs/killed", tmp_path / "runs/straight"
    command = ("train", str(config), ASYNC, "name=killed")
    stuck = STUCK_DISK.format(then="time.sleep(1e6)")
    life = start_forked(*command, "checkpoint.interval=5", nproc=2, stderr=tmp_path / "stderr", plant=stuck)
    # The save of step 15 would wait for ever; until then the training goes on.
    wait_until(
        lambda: (killed / "metrics.jsonl").exists() and '"step": 14' in (killed / "metrics.jsonl").read_text(),
        seconds=200,
        what="step 14",
    )
    kill_all(life)
    names = sorted(path.name.partition(".tmp-")[0] for path in (killed / "checkpoints").iterdir())
    assert names == ["step-00000005", "step-00000010"] and not (killed / "checkpoints/step-00000010").exists()
    resumed = forked(*command, nproc=2)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed after step 5" in resumed.stderr and "REFUSED" not in resumed.stderr
    train_life(config, "name=straight", world_size=2)
    assert losses(killed) == losses(straight)
    assert_same_bits(saved_tensors(killed, 20), saved_tensors(straight, 20))
    assert not list((killed / "checkpoints").glob("*.tmp-*"))


@pytest.mark.timeout(600)
def test_a_disk_that_fails_beside_the_training_ends_every_rank_at_the_same_step_with_one_line(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    full = STUCK_DISK.format(then="raise OSError(28, 'No space left on device')")
    result = forked("train", str(config), ASYNC, "train.steps=100000", nproc=2, plant=full)
    assert result.returncode == 2, result.stderr
    (line,) = error_lines(result.stderr)
    assert "checkpoint of step 10" in line and "rank 1: No space left on device" in line and "free space" in line
    assert "Traceback" not in result.stderr and "lost a peer" not in result.stderr
    run = tmp_path / "runs/tiny"
    for rank in range(2):
        assert "rank 1: No space left on device" in (run / f"logs/rank-{rank:05d}.log").read_text()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000005"]
    assert max(losses(run)) < 15  # the save of step 15 would have met it in any case


def record_real_run(rank: int, config: Config, world_size: int, recorder: Recorder) -> list[Call]:
    play(config, rank, world_size, device=torch.device("cpu"), device_kind="cpu")
    return recorder.calls


def test_a_rehearsal_makes_the_calls_of_a_real_run() -> None:
    case = Case(tp=2, dp=2, dtype="float32")
    checkpoint = case.config().checkpoint.model_copy(update={"asynchronous": True, "interval": 1})
    config = case.config().model_copy(update={"checkpoint": checkpoint})
    real = ranks(4).run(record_real_run, config, 4, recorded=True)
    for rank in range(4):
        assert rehearse(config, rank=rank, world_size=4, device_kind="cpu").calls == real[rank]
    # The save of step 1 takes one row of each rank after step 2, and ends before the next begins; the last is waited for.
    rows = [call for call in real[0] if call.operation == "all_gather" and call.dtype == "int64" and call.axis == "world"]
    width = rows[-1].num_elements
    assert sum(call.num_elements == width for call in rows) == 4
