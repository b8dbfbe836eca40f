"""Recomputation: bytes kept for backward equal the formula, gradients and communication stay the same, bit for bit."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megatronish import formulas
from megatronish.assemble import Assembly, assemble, draw_weights, mesh_shape
from megatronish.comm.recording import rehearsed_world
from megatronish.config import Config
from megatronish.parallel.mesh import build_mesh
from megatronish.parallel.recompute import recompute_selectively
from megatronish.verify.batches import SlicedBatches, global_batch
from megatronish.verify.layout_run import run_layout
from tests.parallel.parity import Case, check


class LiveStorages(TorchDispatchMode):
    """Follows every storage that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def bytes(self) -> int:
        """Of those that are still held."""
        gc.collect()
        return sum(size for reference, size in self.made.values() if not reference.expired())


@contextmanager
def fake_run(case: Case, device_kind: str) -> Iterator[tuple[Assembly, Config]]:
    """Rank 0 of the case, on meta tensors."""
    config = case.config()
    with rehearsed_world(0, case.world_size):
        shape = mesh_shape(config, case.world_size)
        mesh = build_mesh(shape, 0, device=torch.device("meta"), device_kind=device_kind)
        yield assemble(config, mesh, SlicedBatches(config, mesh)), config


def kept_bytes(case: Case, num_layers: int, device_kind: str) -> int:
    """What one microbatch's forward leaves behind, with so many layers."""
    with fake_run(replace(case, num_layers=num_layers), device_kind) as (run, config):
        batch = run.trainer.batches.batch(1).microbatches(config.train.micro_batch_size)[0]
        run.trainer.pipeline.stage.model.train()
        with LiveStorages() as live:
            run.trainer.pipeline.stage.forward(0, batch, None, keep=True)
            return live.bytes()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("device_kind", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(architecture="gpt2", tp=2, sequence=True),
        Case(tp=2),
        Case(tp=4, sequence=True),
        Case(tp=2, sequence=True, dtype="bfloat16"),
    ],
    ids=str,
)
def test_kept_bytes_are_those_of_the_formula(case: Case, device_kind: str, dropout: float) -> None:
    kept = {}
    for recompute in ("none", "selective", "full"):
        config = case.config()
        expected = formulas.kept_bytes_per_block(
            config.model,
            sequence_length=config.data.sequence_length,
            micro_batch_size=config.train.micro_batch_size,
            element_bytes=torch.empty((), dtype=getattr(torch, config.train.dtype)).element_size(),
            tensor=case.tp,
            sequence_parallel=case.sequence,
            regather_input=case.sequence and device_kind == "cuda",
            recompute=recompute,
        )
        asked = replace(case, recompute=recompute, dropout=dropout)
        kept[recompute] = kept_bytes(asked, 3, device_kind) - kept_bytes(asked, 2, device_kind)
        assert kept[recompute] == expected, recompute
    assert kept["none"] > kept["selective"] > kept["full"]


def left_after_the_upper_blocks(case: Case) -> int:
    """Bytes live when the backward of one microbatch has done all blocks but the first."""
    with fake_run(case, "cpu") as (run, config):
        batch = run.trainer.batches.batch(1).microbatches(config.train.micro_batch_size)[0]
        stage, left = run.trainer.pipeline.stage, []
        stage.model.train()
        run.trainer.grads.zero()
        run.trainer.grads.begin_last_backward()
        with LiveStorages() as live:
            stage.forward(0, batch, None, keep=True)
            last = next(p for name, p in stage.model.named_parameters() if name.startswith("layers.1.attention_norm."))
            last.register_post_accumulate_grad_hook(lambda _: left.append(live.bytes()))
            stage.backward(0, torch.ones((), dtype=torch.float64, device=run.mesh.device))
        return left[0]


def test_what_is_made_again_is_let_go_block_by_block() -> None:
    # Three more blocks leave the same behind as without recomputation: their gradients.
    none, selective = (
        [left_after_the_upper_blocks(Case(recompute=recompute, num_layers=n)) for n in (2, 5)]
        for recompute in ("none", "selective")
    )
    assert selective[1] - selective[0] == none[1] - none[0]


def test_gradients_are_the_same_bits_with_any_recomputation() -> None:
    case = Case(dropout=0.1, documents=True)
    results = [run_layout(0, replace(case, recompute=recompute).config()) for recompute in ("none", "selective", "full")]
    for other in results[1:]:
        assert other.losses == results[0].losses and other.norms == results[0].norms
        for step, expected_step in zip(other.gradients, results[0].gradients, strict=True):
            for got, expected in zip(step, expected_step, strict=True):
                assert got[1] == expected[1] and torch.equal(got[3], expected[3]), got[1]


def test_each_stage_may_have_its_own() -> None:
    check(Case(pp=2, tp=2, sequence=True, recompute=("selective", "full"), dropout=0.1), 1e-10)


def test_microbatches_in_flight_do_not_mix() -> None:
    case = Case(recompute="selective", dropout=0.1, num_microbatches=3)
    config = case.config()
    mesh = build_mesh(mesh_shape(config, 1), 0, device=torch.device("cpu"))
    gradients = []
    for order in ("one by one", "all in flight"):
        run = assemble(config, mesh, SlicedBatches(config, mesh))
        draw_weights(config, run.cut)
        run.optimizer.reset_master()
        run.trainer.grads.zero()
        run.trainer.grads.begin_last_backward()
        stage, microbatches = run.trainer.pipeline.stage, global_batch(config, 1).microbatches(2)
        stage.model.train()
        if order == "all in flight":
            for index, batch in enumerate(microbatches):
                stage.forward(index, batch, None, keep=True)
                with torch.no_grad():  # an evaluation in between leaves nothing waiting
                    stage.forward(99, batch, None, keep=False)
        for index, batch in enumerate(microbatches):
            if order == "one by one":
                stage.forward(index, batch, None, keep=True)
            stage.backward(index, torch.tensor(0.1, dtype=torch.float64))
        gradients.append([flat.clone() for flat in run.trainer.grads.flat])
    for got, expected in zip(*gradients, strict=True):
        assert torch.equal(got, expected)
        assert got.abs().max() > 0


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_dropout_adds_no_communication(recompute: str) -> None:
    def calls(dropout: float) -> list[str]:
        case = Case(tp=2, sequence=True, recompute=recompute, dropout=dropout)
        with rehearsed_world(0, 2) as recorder:
            run_layout(0, case.config(), device=torch.device("meta"))
            return [str(call) for call in recorder.calls]

    assert calls(0.1) == calls(0.0)


def test_a_table_that_names_no_module_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"no module layers\.\*\.nothing"):
        recompute_selectively(nn.ModuleDict({"layers": nn.ModuleDict()}), {"layers.*.nothing": "layers.*.mlp.down"})
