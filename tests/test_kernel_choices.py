"""The body of each op that a run takes: agreed by all ranks, kept with the run and its checkpoints, forced by the config."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatronish.checkpoint.load import open_checkpoint
from megatronish.errors import UserError
from megatronish.kernel_choices import _agree, cases, decisions_before, write_decisions
from megatronish.kernels.dispatch import Decision, decide
from megatronish.kernels.registry import Refused, bodies_of
from megatronish.packages import find_package
from megatronish.parallel.mesh import MeshShape, build_mesh
from megatronish.preflight.rehearse import rehearse, shortened
from tests.parallel.parity import Case
from tests.ranks import ranks
from tests.small_run import forked, write_run
from tests.small_run import losses as losses_of

needs_triton = pytest.mark.skipif(find_package("triton") is None, reason="triton is not installed")
WIDE = {"hidden_size": 64, "num_layers": 2}
"""Heads of 8, which Triton's attention takes."""


def run(folder: Path, *overrides: str, **variables: str) -> Any:
    return forked("train", str(folder / "config.yaml"), *overrides, **variables)


@needs_triton
def test_a_run_through_triton_has_the_losses_of_torch_and_keeps_what_it_took(tmp_path: Path) -> None:
    losses = {}
    for name in ("torch", "triton"):
        folder = tmp_path / name
        folder.mkdir()
        small = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "num_kv_heads": 1}
        train = {"steps": 2, "global_batch_size": 1, "micro_batch_size": 1}
        every = ("rms_norm", "add_rms_norm", "split_rotary", "swiglu", "attention", "cross_entropy")
        own = "native" if name == "torch" else name
        kernels = {**dict.fromkeys(every, name), "adamw": own, "square_sum": own}
        write_run(folder, model=small, train=train, kernels=kernels, optim={"warmup_steps": 0})
        done = run(folder, TRITON_INTERPRET="1")
        assert done.returncode == 0, done.stderr
        losses[name] = list(losses_of(folder / "runs/tiny").values())
    assert len(losses["torch"]) == 2
    # float32: the same sums in another order, over two steps.
    assert losses["triton"] == pytest.approx(losses["torch"], rel=1e-5)
    kept = json.loads((folder / "runs/tiny/kernels.json").read_text())
    assert {row["choice"]: row["implementation"] for row in kept} == kernels
    assert open_checkpoint(folder / "runs/tiny/checkpoints/step-00000002").state["kernels"] == kept
    log = (folder / "runs/tiny/logs/rank-00000.log").read_text()
    assert "kernels: attention 16x1x2x8 float32: triton (kernels.attention says so)" in log


@pytest.mark.parametrize(("setting", "words"), [("rms_norm", "tensors on CPU"), ("attention", "tensors on CPU")])
def test_a_body_that_cannot_run_here_is_refused_in_one_line_before_the_first_step(tmp_path: Path, setting: str, words: str) -> None:
    write_run(tmp_path, model=WIDE)
    done = run(tmp_path, f"kernels.{setting}=triton", TRITON_INTERPRET="0")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "kernels." in line]
    assert f"kernels.{setting}=triton" in line and (words in line or "not installed" in line) and "set it to auto" in line
    assert not (tmp_path / "runs/tiny/kernels.json").exists()


def test_a_name_that_does_not_exist_is_refused_with_those_that_do(tmp_path: Path) -> None:
    write_run(tmp_path)
    done = forked("config", "check", str(tmp_path / "config.yaml"), "kernels.attention=fastest")
    assert done.returncode == 2 and "kernels.attention" in done.stderr + done.stdout and "triton" in done.stderr + done.stdout


def test_what_a_checkpoint_says_comes_before_what_lies_in_the_folder(tmp_path: Path) -> None:
    decision = Decision("attention", "8x1x2x16", "float32", "cpu", "torch", "why")
    assert decisions_before(tmp_path, None) == []
    write_decisions(tmp_path, [decision])
    assert decisions_before(tmp_path, None) == [decision]
    other = replace(decision, implementation="reference")
    assert decisions_before(tmp_path, [other.saved()]) == [other]
    (tmp_path / "kernels.json").write_text("{")
    assert decisions_before(tmp_path, None) == []


def agree(rank: int, given: list[int]) -> list[int]:
    """What a rank takes whose own measurements gave the body of number `given[rank]` of each op; by number, too."""
    mesh = build_mesh(MeshShape(pp=1, dp=2, tp=2), rank, device=torch.device("cpu"))
    config = Case(dtype="float32").config()
    wanted = cases(config, 1)
    names = [list(bodies_of(case.kernel.chosen_as)) for case in wanted]
    decided = decide(wanted, forced={}, device=torch.device("cpu"))
    own = [replace(d, implementation=of_case[given[rank]]) for d, of_case in zip(decided, names, strict=True)]
    return [of_case.index(d.implementation) for d, of_case in zip(_agree(mesh, wanted, lambda: own), names, strict=True)]


@needs_triton
@pytest.mark.parametrize("first", [0, 1])
def test_ranks_that_measured_otherwise_take_what_rank_0_takes(first: int) -> None:
    """Every op has a body of torch or native code, and a second one that runs here."""
    taken = ranks(4).run(agree, [first, 0, 1, 0])
    assert len(taken[0]) > 5 and all(set(numbers) == {first} for numbers in taken)


def fail(rank: int, failing: int) -> str:
    """What a rank says where rank `failing` cannot run a body that the config forces."""
    mesh = build_mesh(MeshShape(pp=1, dp=2, tp=2), rank, device=torch.device("cpu"))
    wanted = cases(Case(dtype="float32").config(), 1)

    def decided() -> list[Any]:
        if rank == failing:
            raise Refused("gelu", "triton", "no such package")
        return decide(wanted, forced={}, device=torch.device("cpu"))

    with pytest.raises(UserError) as error:
        _agree(mesh, wanted, decided)
    return str(error.value)


@pytest.mark.parametrize("failing", [0, 2])
def test_what_one_rank_cannot_do_ends_all_and_none_waits(failing: int) -> None:
    said = ranks(4).run(fail, failing)
    for rank, line in enumerate(said):
        assert ("kernels.gelu=triton" if rank == failing else "another rank cannot run a kernel") in line


def test_a_rehearsal_of_gpus_agrees_on_every_rank_and_decides_nothing() -> None:
    config = shortened(Case(tp=2, pp=2, dtype="float32").config(), 4)
    for device_kind, expected in (("cuda", 2), ("cpu", 0)):
        for rank in range(4):
            log = rehearse(config, rank=rank, world_size=4, device_kind=device_kind).log
            calls = [call for _, call in log.calls() if call.what == "choice of kernels"]
            assert len(calls) == expected and all(call.operation == "all_reduce" for call in calls)
