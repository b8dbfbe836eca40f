"""What each rank of a layout sees in a few steps: losses, norms, its pieces of the gradients and of the updated states.

On the way, if asked to, the run is saved and goes on in a trainer that was built anew and loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megatronish import checkpointing
from megatronish.assemble import Assembly, assemble, draw_weights, mesh_shape
from megatronish.checkpoint.storage import FileStorage
from megatronish.comm.host import read_scalar
from megatronish.config import Config
from megatronish.errors import RunStopped
from megatronish.layout import Rectangle
from megatronish.parallel.mesh import Mesh, build_mesh
from megatronish.verify.batches import SlicedBatches

CPU = torch.device("cpu")
Pieces = list[tuple[str, str, Rectangle, Tensor]]


@dataclass
class RankResult:
    """What a rank saw: by step the loss, the norm, its own pieces of the gradients and of the updated master weights; at the end
    the parameters that it computes with."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[Pieces] = field(default_factory=list)
    weights: list[Pieces] = field(default_factory=list)
    held: Pieces = field(default_factory=list)


def run_layout(rank: int, config: Config, checkpoints: Path | None = None, *, device: torch.device = CPU) -> RankResult:
    """Train the config's steps on this rank of its layout (parallel.data must be given).

    With `checkpoints`, a folder: saved after the last step but one, which a trainer that was built anew then loads and takes the
    last step, and after that. Before it at least two steps follow each other in one trainer: what one leaves behind shows too."""
    mesh = build_mesh(mesh_shape(config, world_size_of(config)), rank, device=device)
    run = _build(config, mesh)
    draw_weights(config, run.cut)
    run.optimizer.reset_master()
    result = RankResult()
    for step in range(1, config.num_steps + 1):
        scale = read_scalar(run.trainer.guard.loss_scale, 1.0)
        step_result = run.trainer.train_step(step)
        result.losses.append(read_scalar(step_result.loss, 0.0))
        result.norms.append(read_scalar(step_result.grad_norm, 0.0))
        result.gradients.append(list(_owned_gradients(run, loss_scale=scale)))
        result.weights.append(_owned_weights(run))
        if checkpoints is not None and step >= config.num_steps - 1:
            _save(run, checkpoints, step)
        if checkpoints is not None and step == config.num_steps - 1:
            run = _build(config, mesh)
            assert checkpointing.load_newest(run, checkpoints, log=_nothing) is not None
    run.optimizer.ensure_parameters()
    for name, parameter in run.cut.parameters.by_name.items():
        box = run.cut.layout.placements[name].local_rectangle(mesh.index("tp"), mesh.size("tp"))
        result.held.append((f"rank {rank}", name, box, parameter.detach().clone()))
    return result


def loaded_weights(rank: int, config: Config, checkpoints: Path) -> Pieces:
    """The master weights of the newest checkpoint in `checkpoints`, loaded onto the layout of `config`."""
    mesh = build_mesh(mesh_shape(config, world_size_of(config)), rank, device=CPU)
    run = _build(config, mesh)
    assert checkpointing.load_newest(run, checkpoints, log=_nothing) is not None
    run.optimizer.ensure_parameters()
    return _owned_weights(run)


def world_size_of(config: Config) -> int:
    """Ranks of a config that says how many replicas there are."""
    assert config.parallel.data is not None
    return config.parallel.tensor * config.parallel.pipeline * config.parallel.data


def _save(run: Assembly, checkpoints: Path, step: int) -> None:
    log, storage = logging.getLogger("megatronish.verify"), FileStorage()
    log.setLevel(logging.ERROR)
    saver = checkpointing.Saver(run, checkpoints, data_fingerprint=0, token="verify", storage=storage, log=log, work="inline")
    # Numbers that are not finite are not saved: what was compared so far says more than a rank that ends.
    with suppress(RunStopped):
        saver.save(step)
        saver.finish()


def _build(config: Config, mesh: Mesh) -> Assembly:
    run = assemble(config, mesh, SlicedBatches(config, mesh))
    run.trainer.grads.kept_after_update = True
    return run


def _owned_gradients(run: Assembly, *, loss_scale: float) -> Iterator[tuple[str, str, Rectangle, Tensor]]:
    """Pieces of the gradients that this rank counts, without the loss scale."""
    grads, dp = run.trainer.grads, run.mesh.groups["dp"]
    for index, bucket in enumerate(run.cut.buckets):
        if not bucket.is_counted_by(run.mesh.index("tp")):
            continue
        start, stop = bucket.owned_range(dp.index, dp.size)
        owned = grads.owned(index)
        for name, box, flat in bucket.pieces(start, stop):
            yield "gradient", name, box, owned[flat - start : flat - start + box.num_elements] / loss_scale


def _owned_weights(run: Assembly) -> Pieces:
    """Pieces of the master weights that this rank saves."""
    pieces = run.optimizer.owned_pieces()
    return [(kind, name, box, values.clone()) for kind, name, box, values in pieces if kind == "master"]


def _nothing(text: str) -> None:
    """A log that nobody reads."""
