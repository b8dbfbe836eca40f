"""Samples: consecutive tokens of a split, stitched over documents; splits by document; bad data refused by name."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatronish import native
from megatronish.data.gpt_dataset import GPTDataset, SyntheticDataset, gather, gather_reference
from megatronish.data.indexed_writer import IndexedDatasetWriter
from megatronish.errors import UserError

DOCUMENTS = [[1, 2, 3], [4], [], [5, 6, 7, 8, 9], [10, 11]]
FLAT = np.concatenate([np.array(d, np.int64) for d in DOCUMENTS])


def all_tokens(dataset) -> np.ndarray:
    return dataset.tokens(np.arange(len(dataset)))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(lambda lengths: max(lengths) > 1),
    sequence_length=st.integers(1, 6),
)
def test_samples_are_slices_of_the_concatenated_documents(tmp_path_factory, lengths, sequence_length):
    flat = np.arange(100, 100 + sum(lengths))
    prefix = tmp_path_factory.mktemp("set") / "set"
    with IndexedDatasetWriter(prefix, dtype=np.dtype("u2")) as writer:
        writer.add_documents(flat, np.array(lengths))
    count = (len(flat) - 1) // sequence_length
    if count == 0:
        with pytest.raises(UserError, match="too few for one sample"):
            GPTDataset(prefix, sequence_length=sequence_length, vocab_size=1000)
        return
    dataset = GPTDataset(prefix, sequence_length=sequence_length, vocab_size=1000)
    assert len(dataset) == count
    tokens = all_tokens(dataset)
    assert tokens.dtype == np.int64
    for i in range(count):
        np.testing.assert_array_equal(tokens[i], flat[i * sequence_length : (i + 1) * sequence_length + 1])


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=12).filter(lambda d: sum(map(sum, d)) > 14),
    sequence_length=st.integers(1, 6),
    fraction=st.sampled_from([0.0, 0.3]),
)
def test_document_numbers_follow_the_bounds_of_the_index(tmp_path_factory, lengths, sequence_length, fraction):
    # Documents of several sequences, of none, of empty ones; a split that begins inside the set.
    prefix = tmp_path_factory.mktemp("set") / "set"
    with IndexedDatasetWriter(prefix, dtype=np.dtype("u2")) as writer:
        for document in lengths:
            for size in document:
                writer.add_tokens(np.ones(size, "u2"))
                writer.end_sequence()
            writer.end_document()
    owner = np.repeat(np.arange(len(lengths)), [sum(document) for document in lengths])
    for split in ("train", "validation") if fraction else ("all",):
        try:
            dataset = GPTDataset(prefix, sequence_length=sequence_length, vocab_size=9, split=split, validation_fraction=fraction)
        except UserError:  # too little for a sample
            continue
        numbers = dataset.document_numbers(np.arange(len(dataset)))
        for sample, row in enumerate(numbers):
            begin = dataset.start + sample * sequence_length
            _, expected = np.unique(owner[begin : begin + sequence_length], return_inverse=True)
            np.testing.assert_array_equal(row, expected)


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "i4", "i8", "u2"])
def test_every_integer_dtype_gives_the_same_samples(write_set, dtype):
    dataset = GPTDataset(write_set(DOCUMENTS, dtype=dtype), sequence_length=3, vocab_size=12)
    np.testing.assert_array_equal(all_tokens(dataset), [FLAT[0:4], FLAT[3:7], FLAT[6:10]])


def test_every_token_but_the_first_is_a_target_once(write_set):
    targets = all_tokens(GPTDataset(write_set(DOCUMENTS), sequence_length=2, vocab_size=12))[:, 1:]
    np.testing.assert_array_equal(targets.reshape(-1), FLAT[1:])


def test_the_last_documents_are_held_out_and_no_document_is_in_both_splits(write_set):
    prefix = write_set(DOCUMENTS)
    splits = {
        split: GPTDataset(prefix, sequence_length=1, vocab_size=12, split=split, validation_fraction=0.4)
        for split in ("train", "validation", "all")
    }
    assert splits["train"].stream.tolist() == [1, 2, 3, 4]
    assert splits["validation"].stream.tolist() == [5, 6, 7, 8, 9, 10, 11]
    assert splits["all"].stream.tolist() == FLAT.tolist()
    assert splits["train"].num_documents + splits["validation"].num_documents == len(DOCUMENTS)
    assert len({dataset.fingerprint for dataset in splits.values()}) == 3


def test_without_a_fraction_all_documents_train(write_set):
    assert GPTDataset(write_set(DOCUMENTS), sequence_length=1, vocab_size=12, split="train").num_tokens == len(FLAT)


@pytest.mark.parametrize(("fraction", "split"), [(0.0, "validation"), (0.95, "train")])
def test_a_split_without_documents_is_refused(write_set, fraction, split):
    with pytest.raises(UserError, match=rf"data\.validation_fraction={fraction} of 5 documents"):
        GPTDataset(write_set(DOCUMENTS), sequence_length=1, vocab_size=12, split=split, validation_fraction=fraction)


def test_a_token_outside_the_vocabulary_is_named_with_document_and_offset(write_set):
    dataset = GPTDataset(write_set(DOCUMENTS), sequence_length=3, vocab_size=8)
    np.testing.assert_array_equal(dataset.tokens(np.array([1])), [[4, 5, 6, 7]])  # batches without one pass
    for read in (lambda: dataset.tokens(np.array([0, 2])), dataset.check_tokens):
        with pytest.raises(UserError, match=r"set\.bin: token 8 in document 3 at offset 3 .* vocabulary of 8.*model\.vocab_size"):
            read()


def test_a_negative_token_is_outside_the_vocabulary(write_set):
    dataset = GPTDataset(write_set([[1, 2], [3, -4, 5]], dtype="i4"), sequence_length=4, vocab_size=100)
    for read in (lambda: dataset.tokens(np.array([0])), dataset.check_tokens):
        with pytest.raises(UserError, match="token -4 in document 1 at offset 1"):
            read()


def test_a_token_of_a_validation_split_is_named_by_its_document_in_the_set(write_set):
    dataset = GPTDataset(write_set(DOCUMENTS), sequence_length=6, vocab_size=11, split="validation", validation_fraction=0.4)
    with pytest.raises(UserError, match="token 11 in document 4 at offset 1"):
        dataset.tokens(np.array([0]))


def test_documents_of_one_token_are_refused(write_set):
    with pytest.raises(UserError, match="all 4 documents are shorter than 2 tokens"):
        GPTDataset(write_set([[1], [2], [], [3]]), sequence_length=1, vocab_size=12)
    mixed = write_set([[], [], [1, 2], []], name="mixed")  # fewer tokens than documents, yet one has two
    assert len(GPTDataset(mixed, sequence_length=1, vocab_size=12)) == 1


def test_too_few_tokens_name_the_count_the_need_and_the_key(write_set):
    with pytest.raises(
        UserError, match=r"the set has 11 tokens in 5 documents, too few for one sample of 12.*data\.sequence_length=11"
    ):
        GPTDataset(write_set(DOCUMENTS), sequence_length=11, vocab_size=12)


def test_a_run_longer_than_the_set_is_described_by_its_epochs(write_set):
    dataset = GPTDataset(write_set(DOCUMENTS), sequence_length=2, vocab_size=12)
    assert dataset.num_epochs(12) == 2.4
    assert "11 tokens = 5 samples of 2; the run reads 12 = 2.40 epochs" in dataset.describe_epochs(12)


def test_numbers_that_are_not_integers_are_refused(write_set):
    with pytest.raises(UserError, match=r"set\.bin holds float32 numbers"):
        GPTDataset(write_set(DOCUMENTS, dtype="f4"), sequence_length=1, vocab_size=12)


def test_ids_outside_the_dataset_are_refused(write_set):
    dataset = GPTDataset(write_set(DOCUMENTS), sequence_length=2, vocab_size=12)
    for bad in (-1, len(dataset)):
        with pytest.raises(IndexError):
            dataset.tokens(np.array([0, bad]))


@pytest.mark.skipif(native.cpu is None, reason="native module not built")
@pytest.mark.parametrize("dtype", ["<u2", "<i4"])
def test_native_gathering_equals_numpy(dtype):
    stream = np.random.default_rng(0).integers(0, 60_000, 5000).astype(dtype)
    offsets = np.array([0, 4991, 17, 17, 1234])
    ours, reference = np.empty((5, 9), np.int64), np.empty((5, 9), np.int64)
    assert gather(stream, offsets, ours) == gather_reference(stream, offsets, reference) == (reference.min(), reference.max())
    np.testing.assert_array_equal(ours, reference)


def test_synthetic_samples_depend_on_the_id_alone_and_fill_the_vocabulary():
    dataset = SyntheticDataset(vocab_size=50, sequence_length=64, length=10**12)
    tokens = dataset.tokens(np.array([3, 10**12 - 1, 3]))
    assert tokens.shape == (3, 65) and tokens.dtype == np.int64
    np.testing.assert_array_equal(tokens[0], tokens[2])
    assert (tokens[0] != tokens[1]).any()
    assert set(np.unique(dataset.tokens(np.arange(50)))) == set(range(50))
