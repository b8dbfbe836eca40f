"""A run's folder: what makes a run the same run, and a folder that cannot be written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatronish import run_folder
from megatronish.config_loader import load_config
from megatronish.errors import UserError
from megatronish.run_folder import RunFolder
from tests.small_run import write_run


def test_the_config_in_the_folder_loads_back_to_the_same_run(tmp_path: Path) -> None:
    config = load_config(write_run(tmp_path), ["optim.min_lr=1e-5"])
    folder = RunFolder.of(config)
    folder.prepare(config)
    folder.record(config)
    assert load_config(folder.config_file) == config
    environment = json.loads((folder.path / "environment.json").read_text())
    assert {"commit", "host", "megatronish", "python", "torch"} <= environment.keys()
    assert (folder.path / "logs").is_dir() and folder.checkpoints.is_dir()


@pytest.mark.parametrize(
    "override",
    ["model.num_layers=5", "model.rope_theta=5e4", "data.sequence_length=8", "train.seed=1", "train.global_batch_size=4"],
)
def test_what_makes_the_run_the_same_run_may_not_change(override: str, tmp_path: Path) -> None:
    path = write_run(tmp_path)
    config = load_config(path)
    folder = RunFolder.of(config)
    folder.prepare(config)
    folder.record(config)
    before = folder.config_file.read_text()
    with pytest.raises(UserError) as caught:
        folder.prepare(load_config(path, [override]))
    (line,) = str(caught.value).splitlines()
    key = override.partition("=")[0]
    assert line.startswith(f"{key}=") and str(folder.path) in line and "another `name`" in line
    assert folder.config_file.read_text() == before


def test_everything_else_may_change_when_a_run_is_resumed(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    RunFolder.of(load_config(path)).prepare(load_config(path))
    RunFolder.of(load_config(path)).record(load_config(path))
    changed = load_config(
        path, ["parallel.tensor=2", "train.steps=99", "optim.lr=1e-3", "checkpoint.keep=1", "train.micro_batch_size=1"]
    )
    RunFolder.of(changed).prepare(changed)
    RunFolder.of(changed).record(changed)
    assert load_config(RunFolder.of(changed).config_file).train.steps == 99


@pytest.mark.parametrize("in_the_way", ["runs", "runs/tiny", "runs/tiny/logs", "runs/tiny/checkpoints"])
def test_a_folder_that_cannot_be_made_is_one_line(in_the_way: str, tmp_path: Path) -> None:
    config = load_config(write_run(tmp_path))
    (tmp_path / in_the_way).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / in_the_way).write_text("a file")
    with pytest.raises(UserError) as caught:
        RunFolder.of(config).prepare(config)
    (line,) = str(caught.value).splitlines()
    assert "cannot write the run folder" in line and "run_root" in line


def test_a_copy_of_the_code_knows_its_commit_whatever_it_lies_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "megatronish").mkdir()
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "megatronish/run_folder.py"))
    assert run_folder.commit_of_code() is None
    (tmp_path / "COMMIT").write_text("abc+changes\n")
    assert run_folder.commit_of_code() == "abc+changes"
