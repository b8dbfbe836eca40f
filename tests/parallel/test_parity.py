"""The layout never changes the mathematics: losses, the norm, every gradient and every update equal one process, in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from megatronish import assemble, trainer
from megatronish.batch import Batch
from megatronish.optim.grad_buffer import GradBuffer
from megatronish.parallel.tensor import TensorParallel, make_param_layout
from tests.parallel.parity import Case, RankResult, check, run_rank
from tests.parallel.points import AXES, all_cases, allowed_points, case_of, pairs, pairwise_points

# float64 has an epsilon of 2.2e-16. Sums of up to a few thousand terms in another order, through 4 layers and 2 optimizer steps,
# differ by at most 2e-12 of a tensor's largest element (the table at the end of a run says by how much). A wrong term shows at 1e-4
# or more.
TOLERANCE = 1e-10


@pytest.mark.parametrize("case", [case_of(point) for point in pairwise_points()], ids=str)
def test_any_layout_equals_one_process(case: Case, record_property: Callable[[str, object], None]) -> None:
    record_property("parity", case)
    record_property("largest error", check(case, TOLERANCE))


@pytest.mark.parity_all
@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_every_layout_equals_one_process(case: Case, record_property: Callable[[str, object], None]) -> None:
    record_property("parity", case)
    record_property("largest error", check(case, TOLERANCE))


def test_the_pairwise_cover_holds_every_pair_of_values() -> None:
    possible = {pair for point in allowed_points() for pair in pairs(point)}
    cover = pairwise_points()
    assert {pair for point in cover for pair in pairs(point)} == possible
    assert len(cover) < 60
    values = {(axis, value) for point in cover for axis, value in zip(AXES, point, strict=True)}
    assert values == {(axis, value) for axis, axis_values in AXES.items() for value in axis_values}


def test_all_cases_are_every_layout_with_every_choice() -> None:
    cases = all_cases()
    layouts = {case.layout for case in cases}
    # tp x pp in {1,2,4}^2 leaves this many data sizes of {1,2,3,4} within 8 ranks: 4 + 4 + 4 + 2 + 2 + 2 + 1 + 1.
    assert len(layouts) == 20
    # ZeRO x recompute x vocabulary, and twice that where sequence parallelism is a choice (10 of the layouts).
    assert len(set(cases)) == len(cases) == 10 * 12 + 10 * 24


@pytest.mark.parametrize("sequence", [False, True])
def test_a_tensor_rank_that_holds_only_padding_changes_nothing(sequence: bool) -> None:
    # 70 tokens in 128 rows, 32 a rank: the third rank has 6 tokens, the fourth none.
    check(Case(tp=4, sequence=sequence, vocab_size=70, vocab_multiple=128), TOLERANCE)


def run_regathering(rank: int, case: Case) -> RankResult:
    """As GPUs do: keep S/tp tokens for backward and gather them again."""

    def regathering(**arguments: Any) -> TensorParallel:
        assert arguments["sequence_parallel"] and not arguments["regather_input"]
        return TensorParallel(**{**arguments, "regather_input": True})

    with patch.object(assemble, "TensorParallel", regathering):
        return run_rank(rank, case)


@pytest.mark.parametrize("case", [Case(tp=2, sequence=True), Case(tp=4, dp=2, sequence=True)], ids=str)
def test_gathering_the_input_again_for_backward_changes_nothing(case: Case) -> None:
    check(case, TOLERANCE, run=run_regathering)


def run_with_fault(rank: int, case: Case, *, fault: str) -> RankResult:
    """The layout with one line of the trainer taken out."""

    def no_owed_sums(stages: Any, plan: Any, *, tp_size: int, sequence_parallel: bool) -> Any:
        return make_param_layout(stages, plan, tp_size=tp_size, sequence_parallel=False)

    def local_targets(self: trainer.Trainer, batch: Batch) -> Tensor:
        return batch.loss_mask_SB.sum(dtype=torch.float64) * self.mesh.size("dp")

    def every_copy_counts(grads: GradBuffer) -> Tensor:
        return torch.stack([grads.owned(index).square().sum() for index in range(len(grads.buckets))]).sum()

    def keep_gradients(self: GradBuffer) -> None:
        """Keep what the last step left."""

    faults: dict[str, tuple[Any, str, Any]] = {
        "norms are not summed over tp": (assemble, "make_param_layout", no_owed_sums),
        "each rank divides by its own targets": (trainer.Trainer, "count_targets", local_targets),
        "replicated parameters count once a tp rank": (trainer, "owned_square_sum", every_copy_counts),
        "gradients of the last step stay": (GradBuffer, "zero", keep_gradients),
    }
    with patch.object(*faults[fault]):
        return run_rank(rank, case)


@pytest.mark.parametrize(
    ("fault", "case", "named"),
    [
        ("norms are not summed over tp", Case(tp=2, sequence=True), r"gradient of \S*norm\.weight in step 1"),
        ("each rank divides by its own targets", Case(dp=2), r"gradient of \S+ in step 1"),
        ("replicated parameters count once a tp rank", Case(tp=2), "norm of step 1"),
        ("gradients of the last step stay", Case(pp=2), r"gradient of \S+ in step 2"),
    ],
    ids=["owed sum", "token count", "norm", "zeroing"],
)
def test_a_planted_fault_is_found_and_named(fault: str, case: Case, named: str) -> None:
    with pytest.raises(AssertionError, match=named):
        check(case, TOLERANCE, run=partial(run_with_fault, fault=fault))
