"""Batches: shifted labels, resume at any step, errors of the thread, exact evaluation on any number of ranks."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from megatronish.batch_schedule import BatchSchedule, Stage
from megatronish.data.gpt_dataset import GPTDataset, SyntheticDataset
from megatronish.data.loader import BatchLoader, evaluation_batches
from megatronish.errors import UserError

DATASET = SyntheticDataset(vocab_size=97, sequence_length=5, length=37)


def loader(**changes) -> BatchLoader:
    """`batch_size` samples a step, the first of which is step `first_step` and begins at sample `first_sample`."""
    settings = {"seed": 3, "data_rank": 0, "data_size": 1, "first_step": 0, "first_sample": 0, "batch_size": 4, **changes}
    stage = Stage(*(settings.pop(name) for name in ("first_step", "first_sample", "batch_size")))
    return BatchLoader(settings.pop("dataset", DATASET), schedule=BatchSchedule((stage,)), **settings)


def assert_equal(a, b):
    for name, got in tensors(a).items():
        assert torch.equal(got, getattr(b, name)), name
    assert tensors(a).keys() == tensors(b).keys()


def tensors(batch):
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return {name: value for name, value in fields.items() if value is not None}


def test_labels_are_the_next_tokens_and_all_is_contiguous_sequence_first():
    with loader() as batches:
        batch, tokens = batches.batch(2), DATASET.tokens(batches.sample_ids(2))
    np.testing.assert_array_equal(batch.tokens_SB.T, tokens[:, :-1])
    np.testing.assert_array_equal(batch.labels_SB.T, tokens[:, 1:])
    assert batch.sample_numbers_B.tolist() == [8, 9, 10, 11]
    assert batch.positions_SB.tolist() == [[s] * 4 for s in range(5)]
    assert torch.equal(batch.loss_mask_SB, torch.ones(5, 4))
    assert batch.documents_SB is None
    assert [x.dtype for x in tensors(batch).values()] == [torch.int64] * 2 + [torch.float32] + [torch.int64] * 2
    assert all(x.is_contiguous() for x in tensors(batch).values())


def test_separated_documents_have_numbers_and_positions_of_their_own(write_set):
    documents = [[1, 2, 3], [4], [], [5, 6, 7, 8, 9, 10], [11, 12], [13]]  # 13 tokens: samples 1-5, 5-9 and 9-13
    dataset = GPTDataset(write_set(documents), sequence_length=4, vocab_size=20)
    expected = {1: ([0, 0, 0, 1], [0, 1, 2, 0]), 5: ([0, 0, 0, 0], [0, 1, 2, 3]), 9: ([0, 0, 1, 1], [0, 1, 0, 1])}
    with loader(dataset=dataset, batch_size=3, separate_documents=True) as batches:
        batch = batches.batch(0)
    held_out = list(
        evaluation_batches(dataset, data_rank=0, data_size=1, global_batch_size=3, separate_documents=True, num_batches=1)
    )
    for given in (batch, *held_out):
        assert sorted(given.tokens_SB[0].tolist()) == [1, 5, 9]
        for column, first in enumerate(given.tokens_SB[0].tolist()):
            assert (given.documents_SB[:, column].tolist(), given.positions_SB[:, column].tolist()) == expected[first]
        assert all(x.is_contiguous() for x in tensors(given).values())
        part = given.microbatches(1)[1]
        assert torch.equal(part.context.documents_SB, given.documents_SB[:, 1:2])
        assert torch.equal(part.context.sample_numbers_B, given.sample_numbers_B[1:2])


def test_resuming_at_a_step_gives_the_batches_of_the_run_that_was_not_stopped():
    with loader() as whole, loader(prefetch="none") as no_thread, loader(first_step=6, first_sample=24) as resumed:
        expected = [whole.batch(step) for step in range(20)]
        for step in (0, 5, 3, 19):  # any order
            assert_equal(no_thread.batch(step), expected[step])
        for step in range(6, 20):
            assert_equal(resumed.batch(step), expected[step])


def test_resuming_with_another_batch_size_goes_on_with_the_next_sample():
    with loader(first_step=6, first_sample=24, batch_size=8) as resumed, loader() as whole:
        joined = torch.cat([whole.batch(6).tokens_SB, whole.batch(7).tokens_SB], dim=1)
        assert torch.equal(resumed.batch(6).tokens_SB, joined)


@pytest.mark.parametrize("data_size", [2, 4])
def test_ranks_side_by_side_are_the_batch_of_one_process(data_size):
    with loader() as one:
        expected = one.batch(9)
    parts = []
    for rank in range(data_size):
        with loader(data_rank=rank, data_size=data_size) as batches:
            parts.append(batches.batch(9))
    assert torch.equal(torch.cat([p.tokens_SB for p in parts], dim=1), expected.tokens_SB)
    assert torch.equal(torch.cat([p.sample_numbers_B for p in parts]), expected.sample_numbers_B)


def test_an_error_in_the_thread_is_raised_by_the_next_call(write_set):
    prefix = write_set([list(range(20))])
    dataset = GPTDataset(prefix, sequence_length=1, vocab_size=19)  # the last sample holds token 19
    with loader(dataset=dataset, batch_size=1) as batches:
        bad = next(step for step in range(19) if batches.sample_ids(step)[0] == 18)
        first = bad - 1 if bad else 19 + next(s for s in range(19) if batches.sample_ids(19 + s)[0] == 18) - 1
        batches.batch(first)
        with pytest.raises(UserError, match="token 19 in document 0 at offset 19"):
            batches.batch(first + 1)


def test_the_next_batch_is_made_while_nobody_asks_and_close_ends_the_thread():
    made, ready = [], threading.Event()

    class Watched(SyntheticDataset):
        def tokens(self, ids):
            made.append(threading.current_thread().name)
            if len(made) == 2:
                ready.set()
            return super().tokens(ids)

    batches = loader(dataset=Watched(vocab_size=9, sequence_length=4, length=50))
    batches.batch(0)
    assert ready.wait(timeout=30)
    assert made[0] == threading.current_thread().name and made[1].startswith("batch")
    batches.close()
    assert not any(thread.name.startswith("batch") for thread in threading.enumerate())
    batches.close()


def test_every_tensor_goes_through_the_device_copy_and_constant_ones_once():
    copied = []

    def copy(tensor):
        copied.append(tensor)
        return tensor.clone()

    with loader(device_copy=copy, prefetch="none") as batches:
        batches.batch(0)
        assert len(copied) == 4
        batches.batch(1)
        assert len(copied) == 6  # tokens and sample numbers


def test_batches_can_be_made_under_fake_tensors():
    mode = FakeTensorMode()
    with mode, loader(device_copy=mode.from_tensor, prefetch="none") as batches:
        batch = batches.batch(0)
        held_out = list(evaluation_batches(DATASET, data_rank=0, data_size=1, global_batch_size=4, device_copy=mode.from_tensor))
    assert isinstance(batch.tokens_SB, FakeTensor) and batch.tokens_SB.shape == (5, 4)
    assert isinstance(held_out[-1].loss_mask_SB, FakeTensor)


def evaluation(data_size: int, global_batch_size: int, num_batches: int | None = None):
    """(number of batches of each rank, ids with mask 1, sum of a made-up loss, sum of the mask)."""
    counts, ids, total, weight = [], [], 0.0, 0.0
    for rank in range(data_size):
        batches = list(
            evaluation_batches(
                DATASET, data_rank=rank, data_size=data_size, global_batch_size=global_batch_size, num_batches=num_batches
            )
        )
        counts.append(len(batches))
        for batch in batches:
            assert batch.tokens_SB.shape == (5, global_batch_size // data_size)
            ids += batch.sample_numbers_B[batch.loss_mask_SB[0] > 0].tolist()
            total += float((batch.labels_SB.double() ** 2 * batch.loss_mask_SB).sum())
            weight += float(batch.loss_mask_SB.sum())
    return counts, sorted(ids), total, weight


@pytest.mark.parametrize(("data_size", "global_batch_size"), [(1, 1), (1, 4), (2, 4), (3, 12), (4, 8), (1, 100), (4, 100)])
def test_evaluation_covers_each_sample_once_for_any_number_of_ranks(data_size, global_batch_size):
    counts, ids, total, weight = evaluation(data_size, global_batch_size)
    assert counts == [-(-37 // global_batch_size)] * data_size
    assert ids == list(range(37))
    assert weight == 37 * 5
    assert total == float((DATASET.tokens(np.arange(37))[:, 1:] ** 2).sum())


def test_a_limited_evaluation_reads_the_first_batches():
    assert evaluation(2, 4, num_batches=3)[1] == list(range(12))
    assert evaluation(2, 4, num_batches=99)[1] == list(range(37))


def test_ranks_that_do_not_divide_the_batch_are_refused_at_once():
    with pytest.raises(UserError, match=r"train\.global_batch_size=4"):
        loader(data_size=3)


def test_a_batch_that_is_kept_is_not_written_over_and_one_that_is_dropped_gives_its_memory_back():
    with loader(prefetch="none") as batches:
        kept = [batches.batch(step).labels_SB for step in range(9)]
        copies = [labels.clone() for labels in kept]
        places = {batches.batch(step).tokens_SB.data_ptr() for step in range(9, 29)}
        assert all(torch.equal(labels, copy) for labels, copy in zip(kept, copies, strict=True))
    assert len(places) == 1
