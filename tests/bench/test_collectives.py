"""bench collectives: wrong results are found before anything is timed, bandwidths follow from the slowest rank's seconds, bad
layouts are refused, and the command starts its own processes."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from megatronish.bench import collectives
from megatronish.bench.cli import app
from megatronish.bench.collectives import OPERATIONS, CollectivesBench, bus_factor, measure
from megatronish.bench.collectives_run import layout_of, sizes_between
from megatronish.comm.collectives import Pending
from megatronish.errors import UserError
from megatronish.parallel.mesh import MeshShape, build_mesh
from tests.ranks import ranks
from tests.small_run import megatronish

SMALL = CollectivesBench(sizes=(64, 1000), dtypes=("float32", "bfloat16"), rounds=3, seconds=60)


def on_rank(rank: int, shape: MeshShape, *, broken: str = "") -> dict[str, Any]:
    """Measured on a layout; `broken`: what comes out wrong, the sum on rank 2, the order everywhere."""
    mesh = build_mesh(shape, rank, device=torch.device("cpu"))
    reduce: Any = collectives.start_all_reduce
    gather: Any = collectives.start_all_gather_into

    def twice(x: torch.Tensor, *arguments: Any, **more: Any) -> Pending:
        return reduce(x.mul_(2), *arguments, **more)

    def flipped(out: torch.Tensor, *arguments: Any, **more: Any) -> Pending:
        done = gather(out, *arguments, **more).wait()
        out.copy_(done.view(mesh.size("tp"), -1).flip(0).flatten())
        return Pending(out)

    with pytest.MonkeyPatch.context() as patch:
        if broken == "sum" and rank == 2:
            patch.setattr(collectives, "start_all_reduce", twice)
        if broken == "order":
            patch.setattr(collectives, "start_all_gather_into", flipped)
        return measure(SMALL, mesh)


def test_every_axis_operation_dtype_and_size_is_measured_and_every_rank_has_the_same_rows() -> None:
    results = ranks(4).run(on_rank, MeshShape(tp=2, dp=2))
    first = results[0]
    assert first["wrong"] == [] and all(result["rows"] == first["rows"] for result in results)
    assert {row["axis"]: (row["group_size"], row["num_groups"]) for row in first["rows"]} == {
        "tp": (2, 2),
        "dp": (2, 2),
        "world": (4, 1),
    }
    assert len(first["rows"]) == 3 * len(OPERATIONS) * 2 * 2
    for row in first["rows"]:
        assert row["microseconds"] == median(row["all_microseconds"]) and len(row["all_microseconds"]) == 3
        # Whole elements for each rank of the group.
        assert row["bytes"] in (64, 992, 1000) and row["bytes"] % (row["group_size"] * (4 if row["dtype"] == "float32" else 2)) == 0
        assert row["algorithm_gigabytes_per_second"] == pytest.approx(row["bytes"] / row["microseconds"] / 1e3)
        factor = bus_factor(row["operation"], row["group_size"])
        assert row["bus_gigabytes_per_second"] == pytest.approx(row["algorithm_gigabytes_per_second"] * factor)


def test_an_odd_group_leaves_its_last_rank_out_of_the_exchange_and_world_is_not_measured_twice() -> None:
    first = ranks(3).run(on_rank, MeshShape(pp=3))[0]
    assert first["wrong"] == [] and {row["axis"] for row in first["rows"]} == {"pp"}


def test_a_wrong_sum_is_named_with_its_axis_and_rank_and_nothing_is_timed() -> None:
    results = ranks(4).run(on_rank, MeshShape(tp=4), broken="sum")
    assert all(result == results[0] for result in results)
    assert results[0]["rows"] == [] and results[0]["rounds"] == 0
    assert results[0]["wrong"][0] == "all-reduce of 64 B of float32 over tp gives wrong numbers on rank 3"
    assert all(line.startswith("all-reduce") for line in results[0]["wrong"])


def test_parts_in_another_order_are_found() -> None:
    wrong = ranks(2).run(on_rank, MeshShape(tp=2), broken="order")[0]["wrong"]
    assert len(wrong) == 4 and all(line.startswith("all-gather") for line in wrong)


def test_bus_bandwidth_is_that_of_nccl_tests() -> None:
    # doc/PERFORMANCE.md of nccl-tests.
    assert {operation: bus_factor(operation, 8) for operation in OPERATIONS} == {
        "all-reduce": 1.75,
        "reduce-scatter": 0.875,
        "all-gather": 0.875,
        "send/receive": 1.0,
    }


def test_sizes_and_layouts() -> None:
    assert sizes_between(4, 100, 4) == (4, 16, 64)
    assert layout_of((), 4) == MeshShape(dp=4)
    assert layout_of(("parallel.tensor=2", "parallel.pipeline=2"), 8) == MeshShape(pp=2, dp=2, tp=2)
    assert layout_of(("configs/demo_cpu.yaml", "parallel.data=1", "parallel.tensor=4"), 8) == MeshShape(pp=2, tp=4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["parallel.tensor=3", "--nproc", "4"],
            "parallel.tensor=3 x parallel.pipeline=1 x parallel.data=1 = 3 ranks, but 4 processes",
        ),
        (["parallel.tensor=two", "--nproc", "4"], "parallel.tensor=two: must be a whole number"),
        (["model.num_layers=2", "--nproc", "4"], "model.num_layers=2: without a config file only parallel.tensor"),
        (["nothing.yaml", "--nproc", "4"], "nothing.yaml"),
        ([], "one process has nobody to talk to"),
        (["--nproc", "2", "--dtype", "int8"], "--dtype int8: must be float32 or bfloat16"),
        (["--nproc", "2", "--max-kib", "1"], "--max-kib 1 is below --min-kib 4"),
        (["--nproc", "2", "--json", "/nowhere/x.json"], "--json /nowhere/x.json"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_started(arguments: list[str], said: str) -> None:
    run = CliRunner().invoke(app, ["collectives", *arguments])
    assert isinstance(run.exception, UserError) and said in str(run.exception) and "\n" not in str(run.exception)


def test_the_command_starts_its_processes_prints_a_table_and_writes_numbers_and_pictures(tmp_path: Path) -> None:
    options = ["--nproc", "2", "--max-kib", "16", "--rounds", "2", "--json", str(tmp_path / "c.json"), "--plot", str(tmp_path)]
    done = megatronish("bench", "collectives", "parallel.tensor=2", *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tp: 1 group of 2 ranks") == 1 and "16 KiB" in done.stdout
    result = json.loads((tmp_path / "c.json").read_text())
    assert (result["layout"], result["launcher"], result["backend"]) == ("pp1 dp1 tp2", "torchrun", "gloo")
    assert {row["bytes"] for row in result["rows"]} == {4096, 16384}
    assert all((tmp_path / f"collectives.{kind}").stat().st_size > 1000 for kind in ("svg", "png"))
