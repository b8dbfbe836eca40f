"""Before step 1: ranks that do not run the same stop, naming what differs; a weight that is not finite is named."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatronish.assemble import assemble, draw_weights, mesh_shape
from megatronish.comm.groups import world_group
from megatronish.config import Config
from megatronish.errors import RunStopped, UserError
from megatronish.parallel.mesh import build_mesh
from megatronish.startup import config_facts, dry_batch, require_agreement, version_facts
from megatronish.verify.batches import SlicedBatches
from tests.parallel.parity import Case
from tests.ranks import ranks

CPU = torch.device("cpu")


def facts_of(rank: int, odd_rank: int, change: dict[str, str]) -> dict[str, str]:
    facts = config_facts(Case().config()) | version_facts() | {"training data": "0123"}
    assert all(key in facts for key in change)
    return facts | change if rank == odd_rank else facts


def agree(rank: int, odd_rank: int, change: dict[str, str]) -> str:
    """What this rank was told; nothing if all agree."""
    try:
        require_agreement(facts_of(rank, odd_rank, change), world=world_group(device_kind="cpu"), device=CPU)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("odd_rank", "change"),
    [
        (2, {"train.seed": "8"}),
        (0, {"training data": "4567"}),
        (3, {"train.dtype": "bfloat16", "optim.lr": "0.5"}),
        # Compared first, without the mesh: ranks of another version or layout could not form the same groups.
        (3, {"version of torch": "1.0"}),
        (1, {"parallel.tensor": "2"}),
    ],
)
def test_a_rank_that_differs_stops_every_rank_and_is_named(odd_rank: int, change: dict[str, str]) -> None:
    told = ranks(4).run(agree, odd_rank, change)
    # Everything is compared with rank 0: if that one differs, all the others are named.
    named = [1, 2, 3] if odd_rank == 0 else [odd_rank]
    for rank, text in enumerate(told):
        assert f"ranks {', '.join(map(str, named))} differ from rank 0 in" in text
        for key in change:
            assert key in text
        assert len(text.splitlines()) == 1
        facts = facts_of(rank, odd_rank, change)
        assert all(f"{key}={facts[key]}" in text for key in change)


def agree_on_each(rank: int, leaves: list[str]) -> list[str]:
    """For each leaf, what is wrong with what this rank is told when rank 1 has another value of it; nothing if it is named."""
    wrong = []
    for leaf in leaves:
        told = agree(rank, 1, {leaf: "another"})
        wrong.append("" if f"differ from rank 0 in {leaf};" in told else f"{leaf}: {told}")
    return wrong


def test_equal_ranks_agree() -> None:
    assert ranks(4).run(agree, -1, {}) == [""] * 4


def test_every_key_of_a_config_is_compared() -> None:
    config: Config = Case().config()
    leaves = {f"{name}.{key}" for name, value in config.model_dump().items() if isinstance(value, dict) for key in value}
    assert leaves | {"name", "run_root"} == set(config_facts(config))
    for text in ranks(2).run(agree_on_each, sorted(leaves))[0]:
        assert text == ""


def run_dry(rank: int, case: Case, plant: Any) -> str | float:
    """The dry batch's loss, or its error, with a NaN planted into the parameter `plant`."""
    config = case.config()
    mesh = build_mesh(mesh_shape(config, case.world_size), rank, device=CPU)
    run = assemble(config, mesh, SlicedBatches(config, mesh))
    draw_weights(config, run.cut)
    run.optimizer.reset_master()
    if plant in run.cut.parameters.by_name:
        run.cut.parameters.by_name[plant].data.view(-1)[-1] = math.nan
    try:
        return dry_batch(run, 1)
    except RunStopped as error:
        return str(error)


def test_a_weight_that_is_not_finite_is_named_on_every_rank_with_the_rank_that_has_it() -> None:
    name = "layers.3.mlp.down.weight"
    first, second = ranks(2).run(run_dry, Case(pp=2), name)
    assert isinstance(first, str) and first == second, "both ranks must stop, and say the same"
    assert f"parameter {name} on rank 1 [pp1 dp0 tp0] is not finite" in first


def test_the_dry_batch_gives_the_first_loss_and_changes_nothing() -> None:
    case = Case(num_microbatches=1)  # the dry batch is cut to as many microbatches as there are stages
    (before,) = ranks(1).run(run_dry, case, None)
    assert before == pytest.approx(math.log(101), rel=0.02)
    (after,) = ranks(1).run(dry_twice_then_step, case)
    assert after[0] == after[1] == before
    assert after[2] == before


def dry_twice_then_step(rank: int, case: Case) -> tuple[float, float, float]:
    """The losses of two dry batches and of the first step."""
    config = case.config()
    mesh = build_mesh(mesh_shape(config, 1), rank, device=CPU)
    run = assemble(config, mesh, SlicedBatches(config, mesh))
    draw_weights(config, run.cut)
    run.optimizer.reset_master()
    dry = dry_batch(run, 1), dry_batch(run, 1)
    return *dry, run.trainer.train_step(1).loss.item()
