"""A rehearsal runs the trainer's own code: every shipped config at its full size, and the same calls as a real run."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatronish.assemble import mesh_shape
from megatronish.comm.recording import Intercepted, Recorder
from megatronish.config import BatchRamp, Config
from megatronish.config_loader import load_config
from megatronish.preflight.check import check
from megatronish.preflight.classes import Plan
from megatronish.preflight.job import Job, Log
from megatronish.preflight.rehearse import play, rehearse, shortened
from megatronish.preflight.rehearse_job import rehearse_job
from megatronish.remember import remember_from_now_on
from megatronish.trainer import Trainer
from tests.parallel.parity import Case
from tests.ranks import ranks

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def world_size_of(config: Config) -> int:
    """The number of ranks that a shipped config is made for."""
    assert config.parallel.data is not None
    return config.parallel.tensor * config.parallel.pipeline * config.parallel.data


def corner_ranks(config: Config) -> list[int]:
    """Of the first, the middle and the last stage the first rank and the last, which differ in tp and data rank. `megatronish
    preflight CONFIG --all-ranks` runs every rank."""
    shape = mesh_shape(config, world_size_of(config))
    stages = sorted({0, shape.pp // 2, shape.pp - 1})
    corners = [{"dp": 0, "tp": 0}, {"dp": shape.dp - 1, "tp": shape.tp - 1}]
    return sorted({shape.rank_of({"pp": stage, **corner}) for stage in stages for corner in corners})


def rehearse_config(path: Path, rank: int) -> Log:
    config = load_config(path, ["train.eval_interval=0"])
    world_size = world_size_of(config)
    short = shortened(config, world_size, num_microbatches=2 * config.parallel.pipeline)
    return rehearse(short, rank=rank, world_size=world_size, microbatches="two of each phase").log


def begin() -> None:
    # One thread: the fork server has loaded torch, and a forked OpenMP pool would hang.
    torch.set_num_threads(1)
    remember_from_now_on()


@pytest.mark.slow
@pytest.mark.timeout(900)  # a minute and a half on two idle cores
def test_every_shipped_config_builds_and_steps_at_full_size() -> None:
    jobs = [(path, rank) for path in CONFIGS for rank in corner_ranks(load_config(path))]
    assert len(jobs) > len(CONFIGS)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("forkserver"), initializer=begin) as pool:
        results = list(pool.map(rehearse_config, *zip(*jobs, strict=True)))
    for (path, rank), log in zip(jobs, results, strict=True):
        calls = [call for _, call in log.calls()]
        config = load_config(path)
        stage = mesh_shape(config, world_size_of(config)).coordinates(rank)["pp"]
        last = config.parallel.pipeline - 1
        # Each microbatch crosses each edge once forwards and once backwards: pp of them in the dry batch, 2 pp in the step.
        m = 3 * config.parallel.pipeline
        received = sum(c.operation == "receive" for c in calls)
        assert received == (m if stage > 0 else 0) + (m if stage < last else 0), f"{path.name} rank {rank}"
        assert any(c.group == "dp" for c in calls), f"{path.name} rank {rank} reduces no gradient"


def record_real_run(rank: int, config: Config, world_size: int, recorder: Recorder) -> list[Intercepted]:
    play(config, rank, world_size, device=torch.device("cpu"), device_kind="cpu")
    return recorder.calls


def logged_calls(job: Job, rank: int) -> list[Intercepted]:
    """The log of a rank as a backend would see it: calls that were inferred too."""
    calls = []
    for _, call in job.log(rank).calls():
        ranks_of_group = job.groups[rank][call.group]
        peer = None if call.peer is None else ranks_of_group[call.peer]
        what = (call.num_elements, call.dtype, call.reduce_op, peer, call.tag)
        if call.operation != "open":
            calls.append(Intercepted(call.operation, call.group, ranks_of_group, *what))
    return calls


LAYOUTS = [
    Case(tp=2, pp=2, dp=2, sequence=True, dtype="float32", num_microbatches=7, loss_chunks=3),
    Case(tp=1, pp=4, dp=2, zero_stage=0, recompute="full", dtype="float32"),
    Case(tp=4, pp=2, sequence=True, recompute="full", dtype="bfloat16"),
    Case(tp=2, dp=3, dtype="float32", num_microbatches=6),
    Case(pp=2, dp=3, zero_stage=2, dtype="float16"),
    Case(tp=2, dp=2, zero_stage=2, sequence=True, architecture="gpt2", tie_embeddings=True, dtype="bfloat16", num_microbatches=8),
    Case(tp=2, pp=2, sequence=True, recompute=("selective", "full"), dropout=0.1, documents=True, label_smoothing=0.1),
    Case(architecture="gpt2", tie_embeddings=True, tp=2, pp=2, dp=2, sequence=True, dtype="float32"),
    Case(tp=2, pp=2, dp=2, schedule=("interleaved", 2), dtype="float32", num_microbatches=9),
    Case(tp=2, dtype="float32"),
    Case(pp=2, dtype="float32", num_microbatches=9),
    Case(dp=2, dtype="float32", num_microbatches=6),
    Case(dp=4, zero_stage=0, dtype="bfloat16"),
    Case(tp=4, sequence=True, recompute="selective", num_microbatches=5),
    Case(pp=4, schedule=("gpipe", 1), num_microbatches=11),
    Case(pp=2, dp=2, schedule=("interleaved", 2), num_microbatches=8, zero_stage=2, loss_chunks=3),
    Case(tp=2, pp=4, sequence=True, tie_embeddings=True, num_microbatches=6),
    Case(tp=2, dp=4, zero_stage=2, recompute="full", num_microbatches=6),
    Case(pp=2, dp=4, architecture="gpt2", z_loss=1e-3, num_microbatches=6),
    Case(pp=3, stage_layers=(2, 1, 1), num_microbatches=8),
    Case(tp=2, pp=2, schedule=("interleaved", 2), num_microbatches=3, vocab_size=96, vocab_multiple=8),
]


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_the_log_of_every_rank_equals_the_calls_of_a_real_run(case: Case) -> None:
    held_out = case.config().data.model_copy(update={"validation": "none"})
    train = case.config().train.model_copy(update={"eval_interval": 1, "eval_steps": 1})
    config = case.config().model_copy(update={"data": held_out, "train": train})
    real = ranks(case.world_size).run(record_real_run, config, case.world_size, recorded=True)
    rehearsed = rehearse_job(Plan(config, case.world_size, "cpu", "two of each phase", every_rank=False), processes=0)
    job = rehearsed.job
    # ZeRO 2 waits for the sum before the one before: its backwards begin to repeat later.
    assert rehearsed.num_actions_inferred > 0 or case.num_microbatches < 5 or case.zero_stage == 2
    for rank in range(case.world_size):
        logged = logged_calls(job, rank)
        assert len(real[rank]) > 30
        for number, (expected, got) in enumerate(zip(real[rank], logged, strict=False)):
            assert got == expected, f"rank {rank}, call {number}: real {expected}, rehearsed {got}"
        assert len(logged) == len(real[rank]), f"rank {rank}"
    assert check(job, "cpu").ok


def test_nothing_passes_the_seam_unseen() -> None:
    """What comm/ says it does is what a backend sees, on a GPU's path too, where messages have no tags."""
    case = LAYOUTS[0]
    run = rehearse(case.config(), rank=5, world_size=8, device_kind="cuda")
    job = Job(mesh_shape(case.config(), 8), [run.log], [0] * 8, [run.groups] * 8)
    assert [replace(call, tag=0) for call in logged_calls(job, 5)] == run.calls


def call_past_the_seam(x: torch.Tensor) -> None:
    dist.all_reduce(x)


def test_a_call_past_the_seam_is_in_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Trainer, "count_targets", lambda self, batch: call_past_the_seam(torch.zeros(3, device="meta")) or torch.ones(())
    )
    run = rehearse(LAYOUTS[0].config(), rank=0, world_size=8)
    past = [call for _, call in run.log.calls() if "past" in call.what]
    assert past and all(call.num_elements == 3 and "call_past_the_seam" in call.site for call in past)


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
