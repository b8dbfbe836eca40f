"""Optimizer state a rank, measured on the trainer's tensors, falls as 1/dp under ZeRO 1 and 2 and stays under ZeRO 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatronish.assemble import assemble, mesh_shape
from megatronish.bench.memory import optimizer_state_table, render
from megatronish.config import Config
from megatronish.formulas import num_parameters
from megatronish.optim.buckets import ALIGNMENT
from megatronish.parallel.mesh import build_mesh
from tests.batches import LearnableBatches
from tests.parallel.parity import Case
from tests.ranks import ranks

DP_SIZES = (1, 2, 4)
# Bytes of each state element and states a parameter: fp32 moments; bf16 adds a master copy.
STATES = {"float32": (4, 2), "bfloat16": (4, 3), "float64": (8, 2)}


def config_of(dtype: str, tp: int, pp: int, zero_stage: int = 1, dp: int = 1) -> Config:
    return Case(tp=tp, pp=pp, dp=dp, dtype=dtype, zero_stage=zero_stage, num_microbatches=4).config()


@pytest.mark.parametrize("dtype", STATES)
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_state_falls_as_one_over_dp_under_zero_1_and_stays_under_zero_0(dtype: str, tp: int, pp: int) -> None:
    config = config_of(dtype, tp, pp)
    rows = {(row["zero_stage"], row["dp"]): row for row in optimizer_state_table(config, DP_SIZES)}
    size, copies = STATES[dtype]
    num_tensors = 3 + 6 * config.model.num_layers
    # At most every parameter in a bucket of its own, each padded on its start and to dp x ALIGNMENT at its end.
    for (zero_stage, dp), row in rows.items():
        padding = num_tensors * (dp + 1) * ALIGNMENT * size * copies
        share = dp if zero_stage > 0 else 1
        assert row["num_ranks"] == tp * pp * dp
        assert abs(row["max_bytes"] - rows[zero_stage, 1]["max_bytes"] / share) <= padding / share
        if (tp, pp) == (1, 1):
            assert row["min_bytes"] == row["max_bytes"]
            assert row["ideal_bytes"] == num_parameters(config.model) * size * copies / share
            assert 0 <= row["max_bytes"] - row["ideal_bytes"] <= padding / share
    assert rows[1, 1]["total_bytes"] == rows[0, 1]["total_bytes"]
    assert rows[1, 4]["max_bytes"] < 0.3 * rows[0, 4]["max_bytes"]
    # Gradients: whole under ZeRO 0 and 1; under 2 a share, and two groups of about bucket_mib and a layer's largest matrix each.
    whole, two_groups = rows[1, 4]["max_gradient_bytes"], 2 * (config.optim.bucket_mib * 2**20 + 64 * 105 * size)
    assert whole == rows[0, 4]["max_gradient_bytes"]
    assert rows[2, 4]["max_gradient_bytes"] <= whole / 4 + two_groups + padding
    assert rows[2, 1]["max_gradient_bytes"] == rows[1, 1]["max_gradient_bytes"], "one data rank needs no scratch"


def state_bytes(rank: int, config: Config, world_size: int) -> int:
    """Counted on a rank of a real job, after a step."""
    mesh = build_mesh(mesh_shape(config, world_size), rank, device=torch.device("cpu"))
    run = assemble(config, mesh, LearnableBatches(config, mesh.index("dp"), mesh.size("dp")))
    with torch.no_grad():
        for flat in run.cut.parameters.flat:
            flat.fill_(0.01)
    run.optimizer.reset_master()
    list(run.trainer.fit(1, 1))
    run.optimizer.ensure_parameters()
    return run.optimizer.state_bytes()


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_the_table_is_what_real_ranks_hold(zero_stage: int) -> None:
    config = config_of("float32", 2, 1, zero_stage, dp=2)
    measured = ranks(4).run(state_bytes, config, 4)
    (row,) = (row for row in optimizer_state_table(config, [2]) if row["zero_stage"] == zero_stage)
    assert (sum(measured), max(measured), min(measured)) == (row["total_bytes"], row["max_bytes"], row["min_bytes"])


def test_the_printed_table_names_every_row() -> None:
    rows: list[dict[str, Any]] = optimizer_state_table(config_of("float32", 1, 1), [1, 2])
    table = render(rows)
    assert table.row_count == len(rows) == 6
    assert list(table.columns[1].cells) == ["1", "2"] * 3
    assert list(table.columns[-2].cells)[:3] == ["1.000", "1.000", "1.000"]
