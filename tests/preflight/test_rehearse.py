"""A rehearsal runs the trainer's own code: every shipped config at its full size, and the same calls as a real run."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from megatronish.assemble import mesh_shape
from megatronish.comm.recording import Intercepted, Recorder
from megatronish.config import BatchRamp, Config
from megatronish.config_loader import load_config
from megatronish.preflight.rehearse import play, rehearse, shortened
from tests.parallel.parity import Case
from tests.ranks import ranks

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def world_size_of(config: Config) -> int:
    """The number of ranks that a shipped config is made for."""
    assert config.parallel.data is not None
    return config.parallel.tensor * config.parallel.pipeline * config.parallel.data


def corner_ranks(config: Config) -> list[int]:
    """First, middle and last stage, each with the first and the last tp and data rank."""
    shape = mesh_shape(config, world_size_of(config))
    stages = sorted({0, shape.pp // 2, shape.pp - 1})
    corners = [{"dp": dp, "tp": tp} for dp in {0, shape.dp - 1} for tp in {0, shape.tp - 1}]
    return sorted({shape.rank_of({"pp": stage, **corner}) for stage in stages for corner in corners})


def rehearse_config(path: Path, rank: int) -> list[Intercepted]:
    config = load_config(path, ["train.eval_interval=0"])
    world_size = world_size_of(config)
    return rehearse(
        shortened(config, world_size, num_microbatches=2 * config.parallel.pipeline), rank=rank, world_size=world_size
    ).calls


@pytest.mark.slow
@pytest.mark.timeout(900)  # a minute and a half on two idle cores
def test_every_shipped_config_builds_and_steps_at_full_size() -> None:
    jobs = [(path, rank) for path in CONFIGS for rank in corner_ranks(load_config(path))]
    assert len(jobs) > len(CONFIGS)
    # One thread: the fork server has loaded torch, and a forked OpenMP pool would hang.
    one_thread = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("forkserver"), **one_thread) as pool:
        results = list(pool.map(rehearse_config, *zip(*jobs, strict=True)))
    for (path, rank), calls in zip(jobs, results, strict=True):
        config = load_config(path)
        stage = mesh_shape(config, world_size_of(config)).coordinates(rank)["pp"]
        last = config.parallel.pipeline - 1
        # Each microbatch crosses each edge once forwards and once backwards: pp of them in the dry batch, 2 pp in the step.
        m = 3 * config.parallel.pipeline
        received = sum(c.operation == "receive" for c in calls)
        assert received == (m if stage > 0 else 0) + (m if stage < last else 0), f"{path.name} rank {rank}"
        assert any(c.axis == "dp" for c in calls), f"{path.name} rank {rank} reduces no gradient"


def record_real_run(rank: int, config: Config, world_size: int, recorder: Recorder) -> list[Intercepted]:
    play(config, rank, world_size, device=torch.device("cpu"), device_kind="cpu")
    return recorder.calls


@pytest.mark.parametrize(
    "case",
    [
        Case(tp=2, pp=2, dp=2, sequence=True, dtype="float32"),
        Case(tp=1, pp=4, dp=2, zero_stage=0, recompute="full", dtype="float32"),
        Case(tp=4, pp=2, sequence=True, recompute="full", dtype="bfloat16"),
        Case(tp=2, dp=3, dtype="float32"),
        Case(pp=2, dp=3, zero_stage=2, dtype="float16"),
        Case(tp=2, dp=2, zero_stage=2, sequence=True, architecture="gpt2", tie_embeddings=True, dtype="bfloat16"),
        Case(tp=2, pp=2, sequence=True, recompute=("selective", "full"), dropout=0.1, documents=True, label_smoothing=0.1),
        Case(architecture="gpt2", tie_embeddings=True, tp=2, pp=2, dp=2, sequence=True, dtype="float32"),
        Case(tp=2, pp=2, dp=2, schedule=("interleaved", 2), dtype="float32"),
    ],
    ids=str,
)
def test_recorded_calls_equal_those_of_a_real_run(case: Case) -> None:
    held_out = case.config().data.model_copy(update={"validation": "none"})
    train = case.config().train.model_copy(update={"eval_interval": 1, "eval_steps": 1})
    config = case.config().model_copy(update={"data": held_out, "train": train})
    real = ranks(case.world_size).run(record_real_run, config, case.world_size, recorded=True)
    for rank in range(case.world_size):
        rehearsed = rehearse(config, rank=rank, world_size=case.world_size, device_kind="cpu").calls
        assert len(real[rank]) > 30
        for number, (expected, got) in enumerate(zip(real[rank], rehearsed, strict=False)):
            assert got == expected, f"rank {rank}, call {number}: real {expected}, rehearsed {got}"
        assert len(rehearsed) == len(real[rank]), f"rank {rank}"


@pytest.mark.parametrize(
    "case",
    [Case(tp=2, pp=2, sequence=True, dtype="float32", num_microbatches=4), Case(pp=2, dp=2, dtype="float32", num_microbatches=4)],
    ids=str,
)
def test_a_ramp_samples_and_patience_communicate_the_same_in_a_rehearsal(case: Case) -> None:
    config = case.config()
    size = config.train.global_batch_size
    ramp = BatchRamp(start=size // 2, increment=size // 4, samples=size)  # steps of half, 3/4 and whole batches
    train = {"steps": 4, "batch_ramp": ramp, "eval_interval": 2, "eval_steps": 1, "patience": 1}
    config = config.model_copy(
        update={
            "data": config.data.model_copy(update={"validation": "none"}),
            "train": config.train.model_copy(update=train),
            "observe": config.observe.model_copy(update={"sample_interval": 2, "sample_prompts": ("a", "b"), "log_interval": 3}),
        }
    )
    real = ranks(case.world_size).run(record_real_run, config, case.world_size, recorded=True)
    for rank in range(case.world_size):
        assert rehearse(config, rank=rank, world_size=case.world_size, device_kind="cpu").calls == real[rank], f"rank {rank}"
