"""What each rank of a layout sees in a few steps: losses, norms, its pieces of the gradients and of the updated states."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatronish.assemble import assemble, draw_weights, mesh_shape
from megatronish.comm.host import read_scalar
from megatronish.config import Config
from megatronish.layout import Rectangle
from megatronish.parallel.mesh import build_mesh
from megatronish.verify.batches import SlicedBatches

Pieces = list[tuple[str, str, Rectangle, Tensor]]


@dataclass
class RankResult:
    """What a rank saw: by step the loss, the norm and its own pieces of the gradients; at the end its pieces of the states."""

    losses: list[float]
    norms: list[float]
    gradients: list[Pieces]
    states: Pieces


def run_layout(rank: int, config: Config) -> RankResult:
    """Train the config's steps on this rank of its layout (parallel.data must be given)."""
    assert config.parallel.data is not None
    world_size = config.parallel.tensor * config.parallel.pipeline * config.parallel.data
    mesh = build_mesh(mesh_shape(config, world_size), rank, device=torch.device("cpu"))
    run = assemble(config, mesh, SlicedBatches(config, mesh.index("dp"), mesh.size("dp")))
    draw_weights(config, run.cut)
    run.optimizer.reset_master()
    result = RankResult([], [], [], [])
    for step_result in run.trainer.fit(1, config.num_steps):
        result.losses.append(read_scalar(step_result.loss, 0.0))
        result.norms.append(read_scalar(step_result.grad_norm, 0.0))
        gradients: Pieces = []
        grads = run.trainer.grads
        for index, bucket in enumerate(run.cut.buckets):
            if bucket.replicated and mesh.index("tp") > 0:
                continue
            start, stop = bucket.owned_range(mesh.index("dp"), mesh.size("dp"))
            for name, box, flat in bucket.pieces(start, stop):
                own = grads.owned(index)[flat - start : flat - start + box.num_elements]
                gradients.append(("gradient", name, box, own.clone()))
        result.gradients.append(gradients)
    run.optimizer.ensure_parameters()
    result.states = [(kind, name, box, values.clone()) for kind, name, box, values in run.optimizer.owned_pieces()]
    for name, parameter in run.cut.parameters.by_name.items():
        box = run.cut.layout.placements[name].local_rectangle(mesh.index("tp"), mesh.size("tp"))
        result.states.append((f"parameter@{rank}", name, box, parameter.detach().clone()))
    return result
