"""Rehearse one rank: the run itself, from agreement to the last save, on meta tensors; returns what it communicated."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatronish.assemble import Assembly, mesh_shape
from megatronish.checkpoint.storage import NoStorage
from megatronish.comm.groups import world_group
from megatronish.comm.history import phase
from megatronish.comm.recording import Intercepted, Recorder, rehearsed_world
from megatronish.config import Config
from megatronish.data.gpt_dataset import SyntheticDataset
from megatronish.parallel.mesh import Mesh, build_mesh
from megatronish.preflight.coordinates import Questions, watched
from megatronish.preflight.job import Log
from megatronish.preflight.log_history import LogHistory
from megatronish.preflight.replay import Microbatches, NotRepeating, ReplayingRuntime
from megatronish.run_folder import RunFolder
from megatronish.startup import require_agreement
from megatronish.train import Datasets, Surroundings, run_facts, run_training

LOG = logging.getLogger("megatronish.rehearsal")


Groups = Mapping[str, tuple[int, ...]]
"""Global ranks of each group of a rank, in the order of places."""


@dataclass(frozen=True)
class Rehearsal:
    """What one rank did."""

    log: Log
    calls: list[Intercepted]
    """As a backend saw them; without those of microbatches that did not run."""
    groups: Groups
    questions: Questions
    num_run: int
    """Forwards and backwards of microbatches."""
    num_inferred: int


def shortened(config: Config, world_size: int, *, num_microbatches: int | None = None, num_steps: int = 1) -> Config:
    """The same run with fewer steps and, where a number is given, fewer microbatches: what is communicated a microbatch stays the
    same. One batch an evaluation, no ramp of the batch size."""
    cut = {"steps": num_steps, "tokens": None, "batch_ramp": None, "eval_steps": 1}
    if num_microbatches is not None:
        cut["global_batch_size"] = config.train.micro_batch_size * config.data_parallel_size(world_size) * num_microbatches
    optim = config.optim.model_copy(update={"warmup_steps": 0, "decay_steps": num_steps})
    return config.model_copy(update={"train": config.train.model_copy(update=cut), "optim": optim})


def synthetic_datasets(config: Config) -> Datasets:
    """Data that needs no files; a held-out set where the config has one."""
    S, V = config.data.sequence_length, config.model.vocab_size
    train = SyntheticDataset(vocab_size=V, sequence_length=S, length=config.batch_schedule.consumed_after(config.num_steps))
    held_out = config.data.validation is not None or config.data.validation_fraction > 0
    return Datasets(train, train if held_out else None, None)


def rehearse(
    config: Config, *, rank: int, world_size: int, device_kind: str = "cuda", microbatches: Microbatches = "all"
) -> Rehearsal:
    """`rank` of a job of `world_size`: the whole of `train.run_training`, with nothing on any disk or device."""
    try:
        return _rehearse(config, rank, world_size, device_kind, microbatches)
    except NotRepeating as difference:
        LOG.debug("rank %d runs all microbatches: %s", rank, difference)
        return _rehearse(config, rank, world_size, device_kind, "all")


def _rehearse(config: Config, rank: int, world_size: int, device_kind: str, microbatches: Microbatches) -> Rehearsal:
    history, questions = LogHistory(), Questions()
    recorder, stages = Recorder(history=history), []

    def adapt(run: Assembly) -> None:
        runtime = ReplayingRuntime(run.trainer.pipeline, history, microbatches)
        run.trainer.pipeline = runtime
        stages.append(runtime.replaying)

    with rehearsed_world(rank, world_size, recorder):
        hooks = Hooks(adapt, partial(watched, questions=questions))
        play(config, rank, world_size, device=torch.device("meta"), device_kind=device_kind, hooks=hooks)
    num_run, num_inferred = sum(stage.num_run for stage in stages), sum(stage.num_inferred for stage in stages)
    return Rehearsal(history.log(), recorder.calls, dict(history.groups), questions, num_run, num_inferred)


@dataclass(frozen=True)
class Hooks:
    """What a rehearsal changes on the way."""

    adapt: Callable[[Assembly], None] | None = None
    watch: Callable[[Mesh], Mesh] = field(default=lambda mesh: mesh)


def play(config: Config, rank: int, world_size: int, *, device: torch.device, device_kind: str, hooks: Hooks = Hooks()) -> None:
    """What `train.main` does once it has connected, with synthetic data, and keeping no file."""
    datasets, mesh = _meet(config, rank, world_size, device=device, device_kind=device_kind)
    nowhere = RunFolder(Path("/nonexistent/rehearsal"))
    around = Surroundings(
        nowhere,
        LOG,
        token="rehearsal",
        storage=NoStorage(),
        prefetch="none",
        device_copy=partial(Tensor.to, device=device),
        adapt=hooks.adapt,
    )
    run_training(config, hooks.watch(mesh), datasets, around)


def _meet(config: Config, rank: int, world_size: int, *, device: torch.device, device_kind: str) -> tuple[Datasets, Mesh]:
    """The phases of MEETING, in which a rank has no coordinates yet that can be asked."""
    with phase("agree"):
        datasets = synthetic_datasets(config)
        require_agreement(run_facts(config, datasets), world=world_group(device_kind=device_kind), device=device)
    with phase("connect"):
        mesh = build_mesh(mesh_shape(config, world_size), rank, device=device, device_kind=device_kind)
    return datasets, mesh


MEETING = ("agree", "connect")


def rehearse_meeting(config: Config, *, rank: int, world_size: int, device_kind: str) -> tuple[Log, Groups]:
    """The log of the phases of MEETING alone, and the groups that were made: what every rank runs."""
    history = LogHistory()
    with rehearsed_world(rank, world_size, Recorder(history=history)):
        _meet(config, rank, world_size, device=torch.device("meta"), device_kind=device_kind)
    return history.log(), dict(history.groups)
