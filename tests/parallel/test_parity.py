"""The layout never changes the mathematics: losses, the norm, every gradient and every update equal one process, in float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any
from unittest.mock import patch

import pytest

from megatronish import assemble
from megatronish.config import RopeScaling
from megatronish.parallel.tensor import TensorParallel
from tests.parallel.conftest import place_in_table
from tests.parallel.parity import Case, RankResult, check, run_rank
from tests.parallel.points import AXES, all_cases, allowed_points, case_of, pairs, pairwise_points

# float64 has an epsilon of 2.2e-16. Sums of up to a few thousand terms in another order, through 4 layers and 2 optimizer steps,
# differ by at most 2e-12 of a tensor's largest element (the table at the end of a run says by how much). A wrong term shows at 1e-4
# or more.
TOLERANCE = 1e-10


@pytest.mark.parametrize("case", [case_of(point) for point in pairwise_points()], ids=str)
def test_any_layout_equals_one_process(case: Case, record_property: Callable[[str, object], None]) -> None:
    record_property("parity", place_in_table(case))
    record_property("largest error", check(case, TOLERANCE))


@pytest.mark.parity_all
@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_every_layout_equals_one_process(case: Case, record_property: Callable[[str, object], None]) -> None:
    record_property("parity", place_in_table(case))
    record_property("largest error", check(case, TOLERANCE))


def test_the_pairwise_cover_holds_every_pair_of_values() -> None:
    columns = zip(AXES, zip(*allowed_points(), strict=True), strict=True)
    possible = {(a, x, b, y) for (a, xs), (b, ys) in combinations(columns, 2) for x, y in set(zip(xs, ys, strict=True))}
    cover = pairwise_points()
    assert {pair for point in cover for pair in pairs(point)} == possible
    assert len(cover) < 45
    values = {(axis, value) for point in cover for axis, value in zip(AXES, point, strict=True)}
    assert values == {(axis, value) for axis, axis_values in AXES.items() for value in axis_values}


def test_all_cases_are_every_layout_with_every_choice() -> None:
    cases = all_cases()
    layouts = {case.layout for case in cases}
    # tp x pp in {1,2,4}^2 leaves this many data sizes of {1,2,3,4} within 8 ranks: 4 + 4 + 4 + 2 + 2 + 2 + 1 + 1.
    assert len(layouts) == 20
    # ZeRO x recompute x model, and twice that where sequence parallelism is a choice (10 of the layouts).
    assert len(set(cases)) == len(cases) == 10 * 18 + 10 * 36
    for axis in ("vocab_size", "schedule", "dropout", "documents", "bucket_mib"):
        for tp in AXES["tp"]:
            assert len({getattr(case, axis) for case in cases if case.tp == tp}) > 1, (axis, tp)


@pytest.mark.parametrize("sequence", [False, True])
def test_a_tensor_rank_that_holds_only_padding_changes_nothing(sequence: bool) -> None:
    # 70 tokens in 128 rows, 32 a rank: the third rank has 6 tokens, the fourth none.
    check(Case(tp=4, sequence=sequence, vocab_size=70, vocab_multiple=128), TOLERANCE)


@pytest.mark.parametrize(
    "case",
    [
        Case(pp=2, num_microbatches=3, stage_layers=(3, 1)),
        Case(pp=2, dp=2, schedule=("interleaved", 2), stage_layers=(1, 3, 2, 1), num_layers=7),
        # One stage with chunks exchanges with nobody; every edge of two stages carries all four messages of four chunks.
        Case(pp=1, dp=2, schedule=("interleaved", 2)),
        Case(pp=2, schedule=("interleaved", 4), num_layers=8, num_microbatches=5),
    ],
    ids=str,
)
def test_uneven_stages_and_many_chunks_change_nothing(case: Case) -> None:
    check(case, TOLERANCE)


YARN = RopeScaling(type="yarn", factor=4.0, original_max_position_embeddings=8, beta_fast=2.0, beta_slow=0.25)
MODELS = {
    "part of a head turns, interleaved, YaRN": (
        ("partial_rotary_factor", 0.5),
        ("rope_layout", "interleaved"),
        ("rope_scaling", YARN),
    ),
    "GeGLU": (("activation", "geglu"),),
}


@pytest.mark.parametrize("more", MODELS.values(), ids=MODELS.keys())
def test_a_model_with_other_parts_equals_one_process(more: tuple[tuple[str, Any], ...]) -> None:
    check(Case(tp=2, pp=2, sequence=True, recompute="selective", documents=True, more=more), TOLERANCE)


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
