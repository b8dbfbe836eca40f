"""Bytes of optimizer state and gradients on each rank, counted on the tensors that the trainer allocates.

`megatronish bench memory CONFIG` prints a table. No process is started: a rank's memory is a function of its
coordinates, so one process builds rank after rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table

from megatronish.assemble import cut_model, main_dtype
from megatronish.comm import Group
from megatronish.config import Config
from megatronish.formulas import num_parameters
from megatronish.optim.sharded_grads import make_grad_buffer
from megatronish.optim.zero import ZeroAdamW
from megatronish.parallel.mesh import AXES, Mesh, MeshShape


def lone_mesh(shape: MeshShape, rank: int) -> Mesh:
    """The place of `rank`, with groups that cannot communicate: enough to build what the rank holds."""
    here = shape.coordinates(rank)
    groups = {axis: Group(axis, shape.ranks_along(axis, rank), here[axis]) for axis in AXES}
    groups["world"] = Group("world", tuple(range(shape.num_ranks)), rank)
    return Mesh(shape, rank, groups, torch.device("cpu"), "cpu")


def with_layout(config: Config, *, dp_size: int, zero_stage: int) -> Config:
    """The config on other data ranks."""
    parallel = config.parallel.model_copy(update={"data": dp_size, "zero_stage": zero_stage})
    return config.model_copy(update={"parallel": parallel})


def bytes_of_rank(config: Config, shape: MeshShape, rank: int) -> tuple[int, int]:
    """Of one rank: bytes of moments (and master weights, where they are a copy), and the most that gradients take in a step."""
    mesh = lone_mesh(shape, rank)
    cut = cut_model(config, mesh)
    zero_stage, dtype = config.parallel.zero_stage, main_dtype(config)
    assert zero_stage != 3, "DeepSpeed's engine has no buckets of ours"
    grads = make_grad_buffer(
        cut.buckets, cut.parameters.by_name, groups=mesh.groups, zero_stage=zero_stage, dtype=dtype, device=mesh.device
    )
    optimizer = ZeroAdamW(
        config.optim,
        cut.parameters,
        grads,
        dp=mesh.groups["dp"],
        zero_stage=zero_stage,
        placements=cut.layout.placements,
        seed=config.train.seed,
    )
    return optimizer.state_bytes(), grads.held_bytes() + grads.scratch_bytes()


def optimizer_state_table(config: Config, dp_sizes: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each ZeRO stage and number of data ranks: the bytes of every rank measured, and what the arithmetic says.

    Keys: zero_stage, dp, num_ranks, max_bytes, min_bytes, mean_bytes, total_bytes, ideal_bytes, max_gradient_bytes. `ideal_bytes`
    is the mean a rank without padding and without the tp copies of norms: state of one parameter x parameters / (tp x pp), under
    ZeRO 1 and 2 / dp. `max_gradient_bytes` has the two largest groups of buckets in it that ZeRO 2 fills and sends."""
    parallel = config.parallel
    wide = torch.empty((), dtype=main_dtype(config)).element_size()
    narrow = config.train.dtype in ("bfloat16", "float16")
    state = {"full": wide, "remainder": 2, "none": 0}[config.optim.master] if narrow else 0
    state += 2 * (2 if config.optim.moments_dtype == "bfloat16" else wide)
    rows = []
    for zero_stage in (0, 1, 2):
        for dp_size in dp_sizes:
            run = with_layout(config, dp_size=dp_size, zero_stage=zero_stage)
            shape = MeshShape(pp=parallel.pipeline, dp=dp_size, tp=parallel.tensor)
            measured, gradients = zip(*(bytes_of_rank(run, shape, rank) for rank in range(shape.num_ranks)), strict=True)
            shares = parallel.tensor * parallel.pipeline * (dp_size if zero_stage > 0 else 1)
            rows.append(
                {
                    "zero_stage": zero_stage,
                    "dp": dp_size,
                    "num_ranks": len(measured),
                    "max_bytes": max(measured),
                    "min_bytes": min(measured),
                    "mean_bytes": sum(measured) / len(measured),
                    "total_bytes": sum(measured),
                    "ideal_bytes": state * num_parameters(config.model) / shares,
                    "max_gradient_bytes": max(gradients),
                }
            )
    return rows


TITLE = "MiB a rank: optimizer state, and the most gradients at a time (ZeRO 2: 1/dp, and two groups of buckets in full)"


def render(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for people; every size in MiB."""
    table = Table(
        "ZeRO",
        "data ranks",
        "ranks",
        title=TITLE,
        title_justify="left",
    )
    for name in ("largest", "smallest", "mean", "without padding", "against dp 1", "gradients"):
        table.add_column(name, justify="right")
    first = {row["zero_stage"]: row["mean_bytes"] for row in reversed(rows)}
    for row in rows:
        sizes = [f"{row[key] / 2**20:.2f}" for key in ("max_bytes", "min_bytes", "mean_bytes", "ideal_bytes")]
        share = f"{row['mean_bytes'] / first[row['zero_stage']]:.3f}"
        table.add_row(
            str(row["zero_stage"]), str(row["dp"]), str(row["num_ranks"]), *sizes, share, f"{row['max_gradient_bytes'] / 2**20:.2f}"
        )
    return table
