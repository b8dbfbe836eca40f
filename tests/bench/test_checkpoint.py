"""bench checkpoint: every variant saves and loads the same state on real processes, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatronish.bench import checkpoint as module
from megatronish.bench.checkpoint import LOADS, SAVES, CheckpointBench, measure
from megatronish.bench.cli import app
from megatronish.bench.workers import scratch_folder
from megatronish.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench") / "not there yet"


@pytest.fixture(scope="module")
def result(folder: Path):
    return measure(CheckpointBench(gib=0.1, num_ranks=1, rounds=2, folder=folder))


@pytest.mark.slow
def test_every_variant_is_timed_and_ratios_are_those_of_the_medians(result, folder: Path) -> None:
    # A load that gives other values than were saved ends the bench.
    assert set(result["all_seconds"]) == {*SAVES, *LOADS}
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in result["all_seconds"].values())
    seconds = result["seconds"]
    ours = seconds["save: megatronish"]
    assert result["ratios"] == {
        "save, times as fast as the peer": seconds["save: torch DCP"] / ours,
        "save, times as fast as the peer with 4 threads": seconds["save: torch DCP, 4 writer threads"] / ours,
        "stall, times a memcpy": seconds["stall: megatronish"] / seconds["stall: memcpy"],
        "load, times as fast as the peer": seconds["load: torch DCP"] / seconds["load: megatronish"],
    }
    assert result["gib"] == pytest.approx(0.1, abs=0.02)
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_the_command_prints_the_ratios_and_writes_the_numbers(result, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "measure", lambda bench, on_round: result)
    run = CliRunner().invoke(app, ["checkpoint", "--json", str(tmp_path / "checkpoint.json")])
    assert run.exit_code == 0, run.output
    assert f"stall, times a memcpy: {result['ratios']['stall, times a memcpy']:.2f}" in run.output
    assert json.loads((tmp_path / "checkpoint.json").read_text()) == result


def test_a_folder_that_cannot_be_made_and_a_full_disk_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--folder .*file/in: cannot be written \(Not a directory\)"):
        measure(CheckpointBench(gib=0.1, num_ranks=1, rounds=1, folder=tmp_path / "file/in"))
    with (
        pytest.raises(UserError, match=r"--memory .*: No space left on device; free space, or measure less"),
        scratch_folder(tmp_path, "--memory") as scratch,
    ):
        (scratch / "part").touch()
        raise OSError(errno.ENOSPC, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
