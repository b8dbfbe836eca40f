"""Folding keeps what a layout's sums depend on, and fits a laptop."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatronish.config import Config
from megatronish.config_loader import load_config
from megatronish.constraints import find_problems
from megatronish.errors import UserError
from megatronish.verify.fold import MAX_RANKS, fold, fold_axes
from megatronish.verify.layout_run import world_size_of

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@given(st.tuples(*[st.integers(1, 64)] * 3), st.integers(8, 16))
def test_every_axis_above_one_stays_above_one_within_the_ranks(sizes: tuple[int, ...], max_ranks: int) -> None:
    folded = fold_axes(sizes, max_ranks=max_ranks)
    assert math.prod(folded) <= max_ranks
    assert all((f > 1) == (s > 1) and f <= s for f, s in zip(folded, sizes, strict=True))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((2, 1, 3), (2, 1, 3)),  # what fits stays
        ((1, 1, 3), (1, 1, 3)),
        ((8, 64, 6), (2, 2, 2)),
        ((1, 1, 512), (1, 1, 8)),
        ((1, 1, 9), (1, 1, 3)),  # a divisor rather than more ranks: what depends on oddness stays odd
        ((2, 8, 1), (2, 4, 1)),
    ],
)
def test_axes_shrink_as_little_as_they_can(sizes: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert fold_axes(sizes, max_ranks=MAX_RANKS) == expected


def test_too_few_ranks_are_refused_with_the_number_needed() -> None:
    with pytest.raises(UserError, match="--max-ranks 4: every axis above 1 must stay above 1, which takes 8 ranks"):
        fold_axes((4, 4, 4), max_ranks=4)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_folded_config_is_a_possible_run_with_the_same_choices(path: Path) -> None:
    config = load_config(path)
    folded = fold(config)
    assert world_size_of(folded) <= MAX_RANKS
    assert not find_problems(folded, world_size_of(folded))
    assert kept(folded) == kept(config)


def kept(config: Config) -> dict[str, object]:
    """What folding must not change."""
    model, parallel = config.model, config.parallel
    return {
        "architecture": model.architecture,
        "grouped heads": model.num_heads > model.kv_heads,
        "padding": model.padded_vocab_size > model.vocab_size,
        "tied": model.tie_embeddings,
        "dropout": model.dropout,
        "divisible vocabulary": model.padded_vocab_size % parallel.tensor == 0,
        "axes": (parallel.tensor > 1, parallel.pipeline > 1, (parallel.data or 2) > 1),
        "sequence": parallel.sequence and parallel.tensor > 1,
        "schedule": (parallel.schedule, parallel.num_chunks, parallel.stage_layers is not None),
        "zero": parallel.zero_stage,
        "recompute": parallel.recompute,
        "dtype": config.train.dtype,
        "several microbatches": config.num_microbatches(0) > 1 if parallel.data else True,
        "decay": config.optim.weight_decay,
        "clips": config.optim.clip_norm > 0,
    }


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("tp", range(1, 9))
def test_any_number_of_tensor_ranks_folds(tp: int, sequence: bool) -> None:
    heads = 8 if 8 % tp == 0 else tp
    overrides = [
        f"model.num_heads={heads}",
        f"model.num_kv_heads={heads}",
        f"model.hidden_size={heads * 32}",
        f"model.mlp_size={tp * 64}",
    ]
    layout = [f"parallel.tensor={tp}", "parallel.pipeline=1", "parallel.data=1", f"parallel.sequence={str(sequence).lower()}"]
    config = load_config(CONFIGS[0].parent / "demo_cpu.yaml", [*overrides, *layout, f"data.sequence_length={tp * 32}"])
    folded = fold(config)
    assert folded.parallel.tensor == tp and folded.data.sequence_length % tp == 0
    assert not find_problems(folded, world_size_of(folded))


def test_uneven_stages_and_recomputation_by_stage_stay_so() -> None:
    config = load_config(
        CONFIGS[0].parent / "demo_cpu.yaml",
        [
            "parallel.pipeline=4",
            "parallel.tensor=1",
            "parallel.sequence=false",
            "parallel.data=2",
            "parallel.stage_layers=[1,2,3,2]",
            "parallel.recompute=[full,none,none,none]",
        ],
    )
    folded = fold(config)
    assert folded.parallel.pipeline == 4 and folded.parallel.data == 2
    assert folded.parallel.stage_layers == (1, 2, 2, 2)
    assert folded.parallel.recompute == ("full", "none", "none", "none")
