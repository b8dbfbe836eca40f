"""Rehearse one rank: build, check, step, evaluate and save with the trainer's own code, on fake tensors; return its calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megatronish import checkpointing
from megatronish.assemble import assemble, draw_weights, mesh_shape
from megatronish.checkpoint.storage import NoStorage
from megatronish.comm.recording import Call, rehearsed_world
from megatronish.config import Config
from megatronish.data.gpt_dataset import SyntheticDataset
from megatronish.data.loader import BatchLoader, evaluation_batches
from megatronish.parallel.mesh import Mesh, build_mesh
from megatronish.startup import config_facts, require_agreement, version_facts


def with_microbatches(config: Config, world_size: int, num_microbatches: int) -> Config:
    """The same run with this many microbatches a step: what is communicated a microbatch stays the same."""
    samples = config.train.micro_batch_size * config.data_parallel_size(world_size) * num_microbatches
    return config.model_copy(update={"train": config.train.model_copy(update={"global_batch_size": samples})})


def run_through(config: Config, mesh: Mesh, *, num_steps: int, device_copy: Callable[[Tensor], Tensor]) -> None:
    """What a rank does in a run, in order: agree, draw, step, one evaluation, one save that writes nothing."""
    require_agreement(config_facts(config) | version_facts(), world=mesh.groups["world"], device=mesh.device)
    samples = config.train.global_batch_size * (num_steps + 1)
    dataset = SyntheticDataset(vocab_size=config.model.vocab_size, sequence_length=config.data.sequence_length, length=samples)
    place = {
        "data_rank": mesh.index("dp"),
        "data_size": mesh.size("dp"),
        "global_batch_size": config.train.global_batch_size,
    }
    loader = BatchLoader(dataset, seed=config.train.seed, **place, first_step=1, device_copy=device_copy, prefetch="none")
    run = assemble(config, mesh, loader)
    draw_weights(config, run.cut)
    run.optimizer.reset_master()
    for _ in run.trainer.fit(1, num_steps):
        pass
    run.trainer.evaluate(evaluation_batches(dataset, **place, num_batches=1, device_copy=device_copy))
    checkpointing.save(run, Path("rehearsal"), step=num_steps, data_fingerprint=dataset.fingerprint, storage=NoStorage())


def rehearse(config: Config, *, rank: int, world_size: int, device_kind: str = "cuda", num_steps: int = 1) -> list[Call]:
    """The calls of `rank` in a job of `world_size`: agreement, `num_steps` steps, one batch of evaluation, one save."""
    with rehearsed_world(rank, world_size) as (recorder, mode):
        mesh = build_mesh(mesh_shape(config, world_size), rank, device=torch.device("cpu"), device_kind=device_kind)
        run_through(config, mesh, num_steps=num_steps, device_copy=mode.from_tensor)
    return recorder.calls
