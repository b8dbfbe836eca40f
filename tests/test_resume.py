"""A run that was killed goes on as if nothing had happened, on any layout; a damaged checkpoint is refused by name."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatronish.config_loader import load_config
from megatronish.observe.start_clock import StartClock
from megatronish.parallel.mesh import build_mesh
from megatronish.parallel.rendezvous import Place
from megatronish.resume import differing_settings
from tests.ranks import ranks
from tests.small_run import (
    THREE_D,
    assert_same_bits,
    forked,
    kill_all,
    losses,
    saved_tensors,
    start_forked,
    wait_until,
    write_run,
)

CONSTANT = {"schedule": "constant"}  # the curve does not depend on where a life ends


def train_rank(rank: int, config_file: str, overrides: tuple[str, ...], world_size: int) -> str:
    """One rank's whole life in the pool of ranks; what it wrote to standard error."""
    import torch

    from megatronish import train
    from megatronish.assemble import mesh_shape

    config = load_config(config_file, overrides, world_size=world_size)
    mesh = build_mesh(mesh_shape(config, world_size), rank, device=torch.device("cpu"))
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        place = Place("tests", rank, rank, world_size, world_size)
        train.train_in_folder(config, mesh, train.open_datasets(config), place, StartClock())
    return stderr.getvalue()


def train_life(config_file: Path, *overrides: str, world_size: int = 1) -> str:
    """Train on `world_size` real ranks; the standard error of rank 0."""
    stderr: str = ranks(world_size).run(train_rank, str(config_file), overrides, world_size)[0]
    return stderr


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("layout", "nproc"), [((), 1), (THREE_D, 8)], ids=["one-process", "tp2-pp2-dp2"])
def test_twenty_steps_equal_ten_and_sigkill_and_ten(layout: tuple[str, ...], nproc: int, tmp_path: Path) -> None:
    # One sample a microbatch: steps so slow that the kill falls between step 10 and the end.
    config = write_run(tmp_path, train={"micro_batch_size": 1}, checkpoint={"interval": 10})
    straight, killed = tmp_path / "runs/straight", tmp_path / "runs/killed"
    for _ in range(4):
        life = start_forked("train", str(config), "name=killed", *layout, nproc=nproc, stderr=tmp_path / "stderr")
        wait_until((killed / "checkpoints/step-00000010").exists, seconds=400, what="saving step 10", often=0.002)
        kill_all(life)
        if not (killed / "checkpoints/step-00000020").exists():
            break
        shutil.rmtree(killed)
    resumed = forked("train", str(config), "name=killed", *layout, nproc=nproc, timeout=600)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed after step 10" in resumed.stderr
    assert forked("train", str(config), "name=straight", *layout, nproc=nproc, timeout=600).returncode == 0
    assert losses(killed) == losses(straight)
    assert sorted(losses(killed)) == list(range(1, 21))
    assert_same_bits(saved_tensors(killed, 20), saved_tensors(straight, 20))


# Measured over these 20 steps: 3e-16 in float64. In float32 3.7e-6, not 2e-7: AdamW divides by
# a root + 1e-8, and in an element whose gradient cancels, what rounding leaves (1e-9) is not small beside that.
@pytest.mark.parametrize(
    ("dtype", "tolerance", "sections"),
    [
        pytest.param("float64", 1e-10, {}, id="float64"),
        pytest.param("float32", 1e-5, {}, id="float32"),
        # What is drawn depends on a sample's number in the run, which a life that resumes must count on.
        pytest.param(
            "float64",
            1e-10,
            {
                "model": {"dropout": 0.1},
                "parallel": {"recompute": "selective"},
                "data": {"separate_documents": True},
                "train": {"label_smoothing": 0.1, "z_loss": 1e-4, "eval_interval": 5, "eval_steps": 2},
            },
            id="float64-dropout-documents",
        ),
    ],
)
def test_another_layout_continues_the_same_curve(
    dtype: str, tolerance: float, sections: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    train = {"dtype": dtype, **sections.get("train", {})}
    config = write_run(tmp_path, **{**sections, "train": train, "optim": CONSTANT})
    train_life(config, "name=whole")
    train_life(config, "name=moved", "train.steps=7", *THREE_D, world_size=8)
    second = train_life(config, "name=moved", "train.steps=13")
    third = train_life(config, "name=moved", "parallel.tensor=4", "parallel.data=2", world_size=8)
    assert "resumed after step 7, saved by layout pp2 dp2 tp2" in second
    assert "resumed after step 13, saved by layout pp1 dp1 tp1" in third
    expected, got = losses(tmp_path / "runs/whole"), losses(tmp_path / "runs/moved")
    assert got == pytest.approx(expected, rel=tolerance, abs=0)
    assert len(set(expected.values())) == 20


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a finished run of two data ranks, with checkpoints after 5, 10, 15 and 20 steps."""
    config = write_run(tmp_path_factory.mktemp("finished"))
    train_life(config, world_size=2)
    return config


def flip_a_bit(checkpoint: Path) -> None:
    data = bytearray((checkpoint / "rank-00001.safetensors").read_bytes())
    data[-100] ^= 4
    (checkpoint / "rank-00001.safetensors").write_bytes(data)


def truncate(checkpoint: Path) -> None:
    data = (checkpoint / "rank-00001.safetensors").read_bytes()
    (checkpoint / "rank-00001.safetensors").write_bytes(data[:-1])


def delete(checkpoint: Path) -> None:
    (checkpoint / "rank-00001.safetensors").unlink()


def swap(checkpoint: Path) -> None:
    (checkpoint / "rank-00000.safetensors").rename(checkpoint / "kept")
    (checkpoint / "rank-00001.safetensors").rename(checkpoint / "rank-00000.safetensors")
    (checkpoint / "kept").rename(checkpoint / "rank-00001.safetensors")


@pytest.mark.parametrize(
    ("damage", "words"), [(flip_a_bit, "digest differs"), (truncate, "truncated"), (delete, "missing"), (swap, "swapped")]
)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_used(
    damage: object, words: str, finished: Path, tmp_path: Path
) -> None:
    assert callable(damage)
    shutil.copytree(finished.parent / "runs/tiny", tmp_path / "tiny")
    damage(tmp_path / "tiny/checkpoints/step-00000020")
    stderr = train_life(finished, f"run_root={tmp_path}", world_size=2)
    (refusal,) = [line for line in stderr.splitlines() if "REFUSED" in line]
    assert "WARNING" in refusal and "step-00000020" in refusal and "rank-00001.safetensors" in refusal and words in refusal
    assert "resumed after step 15" in stderr
    # The same five steps again: the damaged one is set aside, and the new one has the same bits.
    assert_same_bits(saved_tensors(tmp_path / "tiny", 20), saved_tensors(finished.parent / "runs/tiny", 20))
    assert losses(tmp_path / "tiny") == losses(finished.parent / "runs/tiny")


def test_a_finished_run_says_so(finished: Path) -> None:
    before = (finished.parent / "runs/tiny/metrics.jsonl").read_bytes()
    result = forked("train", str(finished))
    assert result.returncode == 0, result.stderr
    assert "step 20 of 20: this run is complete" in result.stderr
    assert (finished.parent / "runs/tiny/metrics.jsonl").read_bytes() == before


def test_a_run_keeps_its_model_and_its_samples(finished: Path) -> None:
    result = forked("train", str(finished), "model.mlp_size=64", "train.seed=5", "--nproc", "2")
    assert result.returncode == 2
    first, second = result.stderr.splitlines()
    assert first.startswith("error: model.mlp_size=64") and "mlp_size=48" in first
    assert second.startswith("error: train.seed=5") and "train.seed=1234" in second


def test_a_run_refuses_other_data(finished: Path, tmp_path: Path) -> None:
    write_run(tmp_path)
    shutil.copytree(finished.parent / "runs/tiny", tmp_path / "tiny")
    result = forked("train", str(finished), f"run_root={tmp_path}", f"data.train={tmp_path / 'heldout'}", "data.validation=null")
    assert result.returncode == 2
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert "is not the data" in error and "fingerprint" in error


def test_every_setting_that_differs_is_a_row_of_a_table(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished.parent / "runs/tiny", tmp_path / "tiny")
    changed = (f"run_root={tmp_path}", "train.steps=22", "optim.lr=0.02", "parallel.tensor=2", "data.validation=null")
    stderr = train_life(finished, *changed, world_size=4)
    lines = stderr.splitlines()
    start = next(i for i, line in enumerate(lines) if "settings that differ from the checkpoint's" in line)
    rows = [line.split() for line in lines[start + 1 : start + 8]]
    assert rows[0] == ["setting", "checkpoint", "config", "used"]
    assert rows[2:] == [
        ["run_root", f'"{finished.parent / "runs"}"', f'"{tmp_path}"', f'"{tmp_path}"'],
        ["parallel.tensor", "1", "2", "2"],
        ["data.validation", f'"{finished.parent / "heldout"}"', "null", "null"],
        ["optim.lr", "0.01", "0.02", "0.02"],
        ["train.steps", "20", "22", "22"],
    ]
    assert "setting" in (tmp_path / "tiny/logs/rank-00000.log").read_text()


def test_the_number_of_data_ranks_is_in_the_table_though_no_config_gives_it(finished: Path, tmp_path: Path) -> None:
    config = load_config(finished, [f"run_root={tmp_path}"])
    same = load_config(finished)
    rows = list(differing_settings(same, config, data_ranks=(2, 4)))
    assert [(row.setting, row.checkpoint, row.config, row.used) for row in rows[1:]] == [("parallel.data", "2", "null", "4")]
    assert list(differing_settings(same, same, data_ranks=(2, 2))) == []
