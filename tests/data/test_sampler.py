"""The order of samples: the same for every number of ranks and length of run, every sample once an epoch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatronish.batch_schedule import BatchSchedule, Stage
from megatronish.data.gpt_dataset import SyntheticDataset
from megatronish.data.loader import BatchLoader
from megatronish.data.sampler import sample_ids, sample_numbers
from megatronish.errors import UserError

STEPS, BATCH = 1000, 12


def ids_of_run(data_size: int, *, first: int = 0, last: int = STEPS) -> np.ndarray:
    """[steps, BATCH] ids, ranks side by side, as the loaders of all ranks read them."""
    dataset = SyntheticDataset(vocab_size=100, sequence_length=4, length=1777)
    loaders = [
        BatchLoader(
            dataset, seed=5, data_rank=rank, data_size=data_size, schedule=BatchSchedule((Stage(0, 0, BATCH),)), prefetch="none"
        )
        for rank in range(data_size)
    ]
    return np.array([np.concatenate([loader.sample_ids(step) for loader in loaders]) for step in range(first, last)])


def test_ids_of_1000_steps_are_equal_for_dp_1_2_3_4_and_any_length_of_run():
    one = ids_of_run(1)
    for data_size in (2, 3, 4):
        np.testing.assert_array_equal(ids_of_run(data_size), one)
    np.testing.assert_array_equal(ids_of_run(1, last=10), one[:10])
    np.testing.assert_array_equal(ids_of_run(3, first=990), one[990:])


def test_every_sample_comes_once_an_epoch_and_epochs_differ():
    ids = ids_of_run(1).reshape(-1)
    epochs = [ids[e * 1777 : (e + 1) * 1777] for e in range(6)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(1777))
    assert len({tuple(epoch) for epoch in epochs}) == 6


@settings(max_examples=100, deadline=None)
@given(
    num_samples=st.integers(1, 40),
    batch=st.integers(1, 8),
    cuts=st.lists(st.integers(1, 50), max_size=4),
    seed=st.integers(0, 2**63),
)
def test_any_division_into_batches_gives_one_order(num_samples, batch, cuts, seed):
    """Batches may be larger than the set, and may change their size in the middle."""

    def ids(numbers):
        return sample_ids(numbers, seed=seed, fingerprint=9, num_samples=num_samples)

    whole = ids(np.arange(200))
    parts, consumed = [], 0
    for size in [*cuts, *[batch] * 30]:
        parts.append(ids(sample_numbers(consumed_samples=consumed, data_rank=0, data_size=1, global_batch_size=size)))
        consumed += size
    joined = np.concatenate(parts)[:200]
    np.testing.assert_array_equal(joined, whole[: len(joined)])


def test_ranks_take_contiguous_blocks_that_make_up_the_batch():
    blocks = [sample_numbers(consumed_samples=24, data_rank=r, data_size=3, global_batch_size=12).tolist() for r in range(3)]
    assert blocks == [[24, 25, 26, 27], [28, 29, 30, 31], [32, 33, 34, 35]]


def test_seed_and_dataset_change_the_order():
    numbers = np.arange(50)
    orders = {tuple(sample_ids(numbers, seed=s, fingerprint=f, num_samples=50)) for s, f in [(1, 1), (2, 1), (1, 2)]}
    assert len(orders) == 3


def test_ranks_that_do_not_divide_the_batch_are_refused_with_both_numbers():
    with pytest.raises(UserError, match=r"train\.global_batch_size=10 .* 3 data ranks.*parallel\.data"):
        sample_numbers(consumed_samples=0, data_rank=0, data_size=3, global_batch_size=10)
