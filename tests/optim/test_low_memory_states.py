"""Moments in bfloat16, masters in halves, rounding by chance: the same whatever the layout, saved and resumed to the bit, loaded
from and into the other kinds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatronish.config_loader import load_config
from megatronish.errors import UserError
from megatronish.kernels.adamw import random_words
from megatronish.layout import ParamPlacement
from megatronish.optim.buckets import plan_buckets
from megatronish.optim.zero import segments_of
from tests.small_run import assert_same_bits, losses, saved_tensors, write_run
from tests.test_resume import CONSTANT, train_life

HALVES = ("train.dtype=bfloat16", "optim.moments_dtype=bfloat16", "optim.master=remainder", "optim.rounding=stochastic")
NO_MASTER = ("train.dtype=bfloat16", "optim.moments_dtype=bfloat16", "optim.master=none", "optim.rounding=stochastic")


def placement(shape: tuple[int, ...], shard_dim: int | None) -> ParamPlacement:
    return ParamPlacement(shape, torch.bfloat16, shard_dim, stages=(0,), owner_stage=0, sum_gradient_over=())


PLACEMENTS = {
    "norm": placement((12,), None),
    "column": placement((8, 5), 0),
    "row": placement((6, 8), 1),
    "fused": placement((2, 12, 7), 1),
}


def words_of(tp_size: int, dp_size: int) -> dict[str, torch.Tensor]:
    """By parameter: the word of every element, put together from all ranks; ranks that share an element must agree."""
    words = {name: torch.full(p.global_shape, -1) for name, p in PLACEMENTS.items()}
    for tp_rank in range(tp_size):
        buckets = plan_buckets(PLACEMENTS, tp_rank=tp_rank, tp_size=tp_size, dp_size=dp_size, bucket_elements=70)
        for bucket in buckets:
            for dp_rank in range(dp_size):
                start, stop = bucket.owned_range(dp_rank, dp_size)
                drawn = random_words(segments_of(bucket, start, stop, PLACEMENTS, seed=5), stop - start, torch.tensor(3.0))
                for name, box, flat in bucket.pieces(start, stop):
                    where = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))
                    mine = drawn[flat - start : flat - start + box.num_elements].view(box.sizes)
                    assert ((words[name][where] == -1) | (words[name][where] == mine)).all()
                    words[name][where] = mine
    return words


def test_every_cut_draws_the_same_word_for_an_element_and_another_for_each() -> None:
    whole = words_of(1, 1)
    everything = torch.cat([w.flatten() for w in whole.values()])
    assert (everything >= 0).all() and len(everything.unique()) == len(everything)
    for tp_size, dp_size in ((1, 4), (2, 1), (2, 3)):
        for name, words in words_of(tp_size, dp_size).items():
            assert torch.equal(words, whole[name]), name


@pytest.mark.parametrize("kind", [HALVES, NO_MASTER], ids=["halves", "no master"])
def test_a_resumed_run_goes_on_to_the_bit(kind: tuple[str, ...], tmp_path: Path) -> None:
    config = write_run(tmp_path, optim={"lr": 3e-3, **CONSTANT})
    train_life(config, "name=straight", "train.steps=6", *kind)
    for steps in (3, 6):
        train_life(config, "name=resumed", f"train.steps={steps}", *kind)
    assert losses(tmp_path / "runs/resumed") == losses(tmp_path / "runs/straight")
    assert_same_bits(saved_tensors(tmp_path / "runs/resumed", 6), saved_tensors(tmp_path / "runs/straight", 6))


def test_states_load_across_kinds(tmp_path: Path) -> None:
    config = write_run(tmp_path, optim={"lr": 3e-3, **CONSTANT})
    bfloat16 = "train.dtype=bfloat16"
    train_life(config, "name=run", "train.steps=3", bfloat16)
    stderr = train_life(config, "name=run", "train.steps=4", *HALVES)
    assert "exp_avg is float32, and is kept as bfloat16 from here on" in stderr and "master is" not in stderr
    stderr = train_life(config, "name=run", "train.steps=5", *NO_MASTER)
    assert "master is float32, and is kept as bfloat16" in stderr
    stderr = train_life(config, "name=run", "train.steps=6", bfloat16)
    assert "exp_avg_sq is bfloat16, and is kept as float32" in stderr
    found = losses(tmp_path / "runs/run")
    train_life(config, "name=straight", "train.steps=6", bfloat16)
    straight = losses(tmp_path / "runs/straight")
    assert sorted(found) == list(range(1, 7))
    # Weights that were rounded once to bfloat16 (2^-8), and moments likewise: losses near 4.6.
    assert all(abs(found[step] - straight[step]) < 0.02 for step in found)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("optim.master=remainder",), "optim.master=remainder with train.dtype=float32"),
        (("optim.master=none", "train.dtype=bfloat16"), "set optim.rounding to stochastic"),
        (("optim.rounding=stochastic",), "nothing is kept in bfloat16"),
        (("optim.moments_dtype=bfloat16", "train.dtype=float64"), "remove optim.moments_dtype"),
        (("optim.moments_dtype=bfloat16", "parallel.zero_engine=deepspeed"), "remove optim.moments_dtype"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(settings: tuple[str, ...], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        load_config(write_run(tmp_path), settings)
