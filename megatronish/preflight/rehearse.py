"""Rehearse one rank: the run itself, from agreement to the last save, on meta tensors; returns what it communicated."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatronish.assemble import mesh_shape
from megatronish.checkpoint.storage import NoStorage
from megatronish.comm.groups import world_group
from megatronish.comm.recording import Recorder, rehearsed_world
from megatronish.config import Config
from megatronish.data.gpt_dataset import SyntheticDataset
from megatronish.parallel.mesh import build_mesh
from megatronish.run_folder import RunFolder
from megatronish.startup import require_agreement
from megatronish.train import Datasets, Surroundings, run_facts, run_training

LOG = logging.getLogger("megatronish.rehearsal")


def shortened(config: Config, world_size: int, *, num_microbatches: int, num_steps: int = 1) -> Config:
    """The same run with fewer steps and microbatches: what is communicated a microbatch stays the same. One batch an evaluation, no
    ramp of the batch size."""
    samples = config.train.micro_batch_size * config.data_parallel_size(world_size) * num_microbatches
    cut = {"steps": num_steps, "tokens": None, "global_batch_size": samples, "batch_ramp": None, "eval_steps": 1}
    optim = config.optim.model_copy(update={"warmup_steps": 0, "decay_steps": num_steps})
    return config.model_copy(update={"train": config.train.model_copy(update=cut), "optim": optim})


def synthetic_datasets(config: Config) -> Datasets:
    """Data that needs no files; a held-out set where the config has one."""
    S, V = config.data.sequence_length, config.model.vocab_size
    train = SyntheticDataset(vocab_size=V, sequence_length=S, length=config.batch_schedule.consumed_after(config.num_steps))
    held_out = config.data.validation is not None or config.data.validation_fraction > 0
    return Datasets(train, train if held_out else None, None)


def rehearse(config: Config, *, rank: int, world_size: int, device_kind: str = "cuda") -> Recorder:
    """The calls of `rank` in a job of `world_size`: the whole of `train.run_training`, with nothing on any disk or device."""
    meta = torch.device("meta")
    with rehearsed_world(rank, world_size) as recorder:
        play(config, rank, world_size, device=meta, device_kind=device_kind)
    return recorder


def play(config: Config, rank: int, world_size: int, *, device: torch.device, device_kind: str) -> None:
    """What `train.main` does once it has connected, with synthetic data, and keeping no file."""
    datasets = synthetic_datasets(config)
    require_agreement(run_facts(config, datasets), world=world_group(device_kind=device_kind), device=device)
    mesh = build_mesh(mesh_shape(config, world_size), rank, device=device, device_kind=device_kind)
    nowhere = RunFolder(Path("/nonexistent/rehearsal"))
    around = Surroundings(
        nowhere, LOG, token="rehearsal", storage=NoStorage(), prefetch="none", device_copy=partial(Tensor.to, device=device)
    )
    run_training(config, mesh, datasets, around)
