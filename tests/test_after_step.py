"""What follows a step: requests by file, early stopping, profile; on real ranks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest.mock import patch

import pytest

from megatronish.life import Life
from megatronish.observe import requests
from megatronish.trainer import StepResult, Trainer
from tests.ranks import ranks
from tests.small_run import assert_same_bits, forked, losses, megatronish, saved_tensors, write_run
from tests.test_resume import train_life, train_rank

CONSTANT = {"schedule": "constant"}


def train_and_touch(
    rank: int,
    config_file: str,
    overrides: tuple[str, ...],
    world_size: int,
    touched: dict[int, str],
    run: str,
    answer_seconds: float = requests.ANSWER_SECONDS,
) -> str:
    """One rank's life, in which the last rank touches RUN/FILE before the steps given."""
    whole = Trainer.train_step

    def train_step(self: Trainer, step: int) -> StepResult:
        if rank == world_size - 1 and step in touched:
            (Path(run) / touched[step]).touch()
        return whole(self, step)

    with patch.object(Trainer, "train_step", train_step), patch.object(requests, "ANSWER_SECONDS", answer_seconds):
        return train_rank(rank, config_file, overrides, world_size)


def steps_saved(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Of a run that saves only at its end and logs every fourth step."""
    return write_run(tmp_path, checkpoint={"interval": None}, optim=CONSTANT, observe={"log_interval": 4})


@pytest.mark.parametrize("world_size", [1, 2])
def test_stop_saves_ends_on_the_next_log_step_and_the_same_command_goes_on(world_size: int, config: Path, tmp_path: Path) -> None:
    run, whole = tmp_path / "runs/tiny", tmp_path / "runs/whole"
    layout = ("parallel.tensor=2",) if world_size == 2 else ()
    stderr = ranks(world_size).run(train_and_touch, str(config), layout, world_size, {6: "STOP"}, str(run))[0]
    assert "stopped after step 8 of 20, as RUN/STOP asked" in stderr
    assert not (run / "STOP").exists()
    assert steps_saved(run) == [8]
    assert "resumed after step 8" in train_life(config, *layout, world_size=world_size)
    train_life(config, "name=whole", *layout, world_size=world_size)
    assert steps_saved(run) == [8, 20]
    assert_same_bits(saved_tensors(run, 20), saved_tensors(whole, 20))


def test_where_steps_are_slow_a_request_does_not_wait_for_a_log_step(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs/tiny"
    layout = ("parallel.tensor=2", "observe.log_interval=8")
    # As if each step took longer than a request may wait.
    stderr = ranks(2).run(train_and_touch, str(config), layout, 2, {17: "STOP"}, str(run), answer_seconds=0.0)[0]
    assert "stopped after step 17 of 20, as RUN/STOP asked" in stderr and steps_saved(run) == [17]


def test_save_saves_once_and_the_run_goes_on(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs/tiny"
    ranks(2).run(train_and_touch, str(config), ("parallel.tensor=2",), 2, {6: "SAVE", 11: "SAVE"}, str(run))
    assert steps_saved(run) == [8, 12, 20]
    assert not (run / "SAVE").exists()


def test_what_was_asked_before_the_start_is_removed_and_said(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs/tiny"
    run.mkdir(parents=True)
    for name in ("STOP", "SAVE"):
        (run / name).touch()
    stderr = train_life(config)
    assert stderr.count("it was there before this start") == 2
    assert steps_saved(run) == [20] and not (run / "STOP").exists() and not (run / "SAVE").exists()


@pytest.mark.parametrize(
    "life",
    [{"TORCHELASTIC_RESTART_COUNT": "1"}, {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1"}],
    ids=["restarted", "next-step-of-the-allocation"],
)
def test_a_stop_that_was_asked_between_two_lives_of_a_job_still_holds(life: dict[str, str], config: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs/tiny"
    run.mkdir(parents=True)
    with Life(run, "slurm-7.0", 0):
        pass
    (run / "STOP").touch()
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    ended = forked("train", str(config), TORCHELASTIC_RUN_ID="r", **alone, **life)
    assert ended.returncode == 0 and "stopped after step 1 of 20, as RUN/STOP asked" in ended.stderr, ended.stderr
    assert steps_saved(run) == [1] and not (run / "STOP").exists()


def evaluations(run: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]


def test_early_stopping_ends_at_the_same_step_with_and_without_a_stop_in_between(tmp_path: Path) -> None:
    # 60 documents are soon learned by heart: held-out loss falls, then rises.
    config = write_run(tmp_path, train={"eval_interval": 2, "steps": 80, "patience": 3}, optim={"lr": 0.003, **CONSTANT})
    stderr = train_life(config, "name=whole")
    whole, cut = tmp_path / "runs/whole", tmp_path / "runs/cut"
    found = evaluations(whole)
    last = found[-1][0]
    assert last < 80 and f"early stopping after step {last}: 3 evaluations without a new lowest loss" in stderr
    lowest = min(loss for _, loss in found)
    assert [loss == lowest for _, loss in found[-4:]] == [True, False, False, False]
    assert steps_saved(whole)[-1] == last
    assert "this run has stopped early" in train_life(config, "name=whole")
    train_life(config, "name=cut", f"train.steps={last - 2}")
    train_life(config, "name=cut", "parallel.tensor=2", "parallel.data=2", world_size=4)
    assert evaluations(cut)[-1][0] == last
    train_life(config, "name=whole", "train.patience=4")
    assert evaluations(whole)[-1][0] > last


def test_a_profile_is_a_chrome_trace_of_each_rank_and_changes_nothing(tmp_path: Path) -> None:
    config = write_run(tmp_path, train={"steps": 6}, checkpoint={"interval": None})
    asked = ("observe.profile_steps=[3,4]", "observe.memory_snapshot_step=2")
    stderr = train_life(config, *asked, "parallel.tensor=2", world_size=2)
    assert "observe.memory_snapshot_step: a CPU has no allocator history" in stderr
    folder = tmp_path / "runs/tiny/profile"
    assert sorted(path.name for path in folder.iterdir()) == ["rank-00000.json", "rank-00001.json"]
    for path in folder.iterdir():
        names = [event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]]
        # Two steps of 4 microbatches, each of one loss.
        assert names.count("megatronish::cross_entropy_parts") == 8
        assert any("c10d::send" in name for name in names)
    train_life(config, "name=plain", "parallel.tensor=2", world_size=2)
    assert losses(tmp_path / "runs/plain") == losses(tmp_path / "runs/tiny")


def test_weights_and_biases_offline_has_the_rows_of_metrics(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    if wandb.__file__ is None:
        pytest.skip("the extra `wandb` is not installed")
    config = write_run(tmp_path, train={"steps": 6}, checkpoint={"interval": 3})
    for steps in ("train.steps=3", "train.steps=6"):
        result = megatronish("train", str(config), "observe.wandb_project=tests", steps, WANDB_MODE="offline")
        assert result.returncode == 0, result.stderr
    run = tmp_path / "runs/tiny"
    files = sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2 and {path.stem for path in files} == {f"run-{(run / 'wandb_id').read_text()}"}
    # Its format is a log of protocol buffers: names and numbers stand in it as text.
    assert all(b"grad_norm" in path.read_bytes() and path.stat().st_size > 1000 for path in files)


def test_weights_and_biases_without_the_package_is_one_line(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    hidden = tmp_path / "site"
    hidden.mkdir()
    # A folder of this name, as offline runs leave one, is not the package.
    (tmp_path / "wandb").mkdir()
    (hidden / "sitecustomize.py").write_text(
        "import importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, package=None: None if name == 'wandb' else find(name, package)\n"
    )
    path = f"{hidden}:{Path(__file__).parent.parent}:{os.environ.get('PYTHONPATH', '')}"
    result = megatronish("train", str(config), "observe.wandb_project=mine", "--nproc", "2", PYTHONPATH=path)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: observe.wandb_project=mine") and "pip install 'megatronish[wandb]'" in line
