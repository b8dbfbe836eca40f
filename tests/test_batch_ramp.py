"""A ramp of the batch size: the samples of a run without one, in the same order, in other steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatronish.batch_schedule import BatchSchedule
from megatronish.config import BatchRamp
from megatronish.data.gpt_dataset import SyntheticDataset
from megatronish.data.loader import BatchLoader
from tests.small_run import THREE_D, assert_same_bits, forked, losses, saved_tensors, write_run
from tests.test_resume import train_life

RAMP = {"start": 4, "increment": 2, "samples": 30}  # steps of 4, 4, 4, 4, 6, 6, 6, then 8
RAMPED = {"steps": 12, "global_batch_size": 8, "micro_batch_size": 1, "batch_ramp": RAMP, "dtype": "float64"}


def test_samples_come_in_the_order_of_a_run_without_a_ramp() -> None:
    dataset = SyntheticDataset(vocab_size=97, sequence_length=5, length=37)
    streams = []
    for ramp in (None, BatchRamp(**RAMP)):
        parts = []
        for rank in range(2):
            schedule = BatchSchedule.of(8, ramp)
            with BatchLoader(dataset, seed=3, data_rank=rank, data_size=2, schedule=schedule) as loader:
                parts.append([loader.batch(step) for step in range(1, 13)])
        steps = [torch.cat([batch.tokens_SB for batch in batches], 1) for batches in zip(*parts, strict=True)]
        numbers = [torch.cat([batch.sample_numbers_B for batch in batches]) for batches in zip(*parts, strict=True)]
        for batches in zip(*parts, strict=True):
            assert all(batch.loss_mask_SB.shape == batch.positions_SB.shape == batch.tokens_SB.shape for batch in batches)
        streams.append((torch.cat(steps, 1), torch.cat(numbers)))
    count = streams[1][1].numel()
    assert count == 4 * 4 + 3 * 6 + 5 * 8
    assert torch.equal(streams[0][0][:, :count], streams[1][0]) and torch.equal(streams[1][1], torch.arange(count))


def test_a_run_resumed_in_the_ramp_has_the_bits_of_one_that_was_not_stopped(tmp_path: Path) -> None:
    config = write_run(tmp_path, train=RAMPED, optim={"schedule": "constant"})
    whole, moved = tmp_path / "runs/whole", tmp_path / "runs/moved"
    train_life(config, "name=whole")
    for steps in (5, 6, 12):
        train_life(config, "name=moved", f"train.steps={steps}")
    assert losses(moved) == losses(whole)
    assert_same_bits(saved_tensors(moved, 12), saved_tensors(whole, 12))
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["consumed_samples"] for row in rows] == [4, 8, 12, 16, 22, 28, 34, 42, 50, 58, 66, 74]
    assert json.loads((whole / "checkpoints/step-00000005/manifest.json").read_text())["state"]["consumed_samples"] == 22


def test_layouts_are_equal_in_a_ramp(tmp_path: Path) -> None:
    config = write_run(tmp_path, train=RAMPED)
    train_life(config, "name=one")
    train_life(config, "name=eight", *THREE_D, world_size=8)
    # float64: sums in another order.
    assert losses(tmp_path / "runs/eight") == pytest.approx(losses(tmp_path / "runs/one"), rel=1e-10, abs=0)


def test_the_ramp_of_a_run_may_not_change(tmp_path: Path) -> None:
    config = write_run(tmp_path, train=RAMPED)
    train_life(config, "train.steps=3")
    for change, words in (("train.batch_ramp=null", "train.batch_ramp=None"), ("train.batch_ramp.samples=40", "samples")):
        result = forked("train", str(config), change)
        assert result.returncode == 2, result.stderr
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: train.batch_ramp") and words in line and "another `name`" in line
