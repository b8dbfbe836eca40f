"""Blends: exact counts in every block, every sample of a source once an epoch, the same from any rank and at any place."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatronish.batch_schedule import BatchSchedule, Stage
from megatronish.data.blend import BlendedDataset, block_counts, largest_remainder
from megatronish.data.gpt_dataset import GPTDataset
from megatronish.data.loader import BatchLoader
from megatronish.errors import UserError

SEED = 7


@pytest.fixture
def sources(write_set) -> list[GPTDataset]:
    """Three sets of 50, 7 and 300 samples of 4 tokens, whose tokens tell the set and the place."""
    made = []
    for k, samples in enumerate((50, 7, 300)):
        prefix = write_set([np.arange(4 * samples + 1) + 10_000 * (k + 1)], name=f"set{k}")
        made.append(GPTDataset(prefix, sequence_length=4, vocab_size=40_000))
    return made


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9))
def test_shares_of_a_block_are_the_weights_by_largest_remainder(weights):
    counts = block_counts(weights)
    size = sum(counts)
    assert size & (size - 1) == 0 and 1024 <= size <= 1 << 20
    total = sum(map(Fraction, weights))
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - size * Fraction(weight) / total) < 1
        if size < 1 << 20:
            assert count == pytest.approx(size * weight / sum(weights), rel=0.0101)


def test_largest_remainders_get_the_rest_the_first_of_equal_ones_first():
    assert largest_remainder([Fraction(1, 3)] * 3, 10) == (4, 3, 3)
    assert largest_remainder([Fraction(1, 10), Fraction(45, 100), Fraction(45, 100)], 16) == (2, 7, 7)
    assert block_counts([3, 1]) == (768, 256)
    assert block_counts([0.7, 0.2, 0.1]) == (717, 205, 102)


def test_every_block_holds_the_exact_count_of_each_source_and_its_next_samples(sources):
    blend = BlendedDataset(sources, [0.5, 0.125, 0.375])
    assert blend.counts == (512, 128, 384)
    for block in (0, 1, 5, 10**12):
        numbers = np.arange(block * 1024, (block + 1) * 1024)
        which, within = blend.source_numbers(numbers, seed=SEED)
        for k, count in enumerate(blend.counts):
            assert sorted(within[which == k].tolist()) == list(range(block * count, (block + 1) * count))
        assert len(set(which[:64].tolist())) == 3, "sources are mixed within a block"


def test_each_source_has_its_own_epochs_in_which_every_sample_comes_once(sources):
    blend = BlendedDataset(sources, [0.5, 0.125, 0.375])
    numbers = np.arange(8 * 1024)
    which, within = blend.source_numbers(numbers, seed=SEED)
    ids = blend.sample_ids(numbers, seed=SEED)
    np.testing.assert_array_equal(blend.locate(ids)[0], which)
    for k, source in enumerate(sources):
        for epoch in range(8 * blend.counts[k] // len(source)):
            chosen = (which == k) & (within // len(source) == epoch)
            assert sorted(blend.locate(ids[chosen])[1].tolist()) == list(range(len(source)))


def test_tokens_are_those_of_the_sources_own_order(sources):
    blend = BlendedDataset(sources, [0.5, 0.125, 0.375])
    numbers = np.array([0, 700, 5, 999_999, 123_456])
    tokens = blend.tokens(blend.sample_ids(numbers, seed=SEED))
    for row, k, n in zip(tokens, *blend.source_numbers(numbers, seed=SEED), strict=True):
        place = sources[k].sample_ids(np.array([n]), seed=SEED)
        np.testing.assert_array_equal(row, sources[k].tokens(place)[0])


def test_document_numbers_are_those_of_the_sources(write_set):
    sets = [
        write_set([[k * 10 + d] * size for d, size in enumerate(sizes)], name=f"docs{k}")
        for k, sizes in enumerate(([5, 8], [3, 9]))
    ]
    sources = [GPTDataset(prefix, sequence_length=4, vocab_size=40) for prefix in sets]
    blend = BlendedDataset(sources, [0.5, 0.5])
    ids = np.arange(len(blend))
    assert_documents_are_runs_of_equal_tokens(blend.tokens(ids)[:, :-1], blend.document_numbers(ids))


def assert_documents_are_runs_of_equal_tokens(tokens, numbers):
    changes = np.diff(tokens, axis=1) != 0
    assert changes.any()
    np.testing.assert_array_equal(numbers[:, 0], 0)
    np.testing.assert_array_equal(np.diff(numbers, axis=1), changes)


def test_the_order_does_not_depend_on_ranks_or_on_where_a_run_was_interrupted(sources):
    blend = BlendedDataset(sources, [1, 1, 1])

    def order(data_size: int, consumed: int) -> np.ndarray:
        schedule = BatchSchedule((Stage(0, consumed, 12),))
        loaders = [
            BatchLoader(blend, seed=3, data_rank=r, data_size=data_size, schedule=schedule, prefetch="none")
            for r in range(data_size)
        ]
        return np.concatenate([loader.batch(step).tokens_SB.numpy().T for step in range(3) for loader in loaders])

    one = order(1, 0)
    for data_size in (2, 3, 4):
        np.testing.assert_array_equal(order(data_size, 0), one)
    np.testing.assert_array_equal(order(2, 24)[:12], one[24:])


def test_the_first_numbers_of_a_blend_stay_what_they_are(sources, monkeypatch):
    monkeypatch.setattr(BlendedDataset, "fingerprint", 2)
    blend = BlendedDataset(sources, [0.7, 0.2, 0.1])
    which, within = blend.source_numbers(np.arange(2040, 2056), seed=1)
    assert which.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2, 2, 0, 0]
    assert within.tolist()[:8] == [318, 1233, 817, 1354, 1376, 906, 1119, 1260]


def test_the_fingerprint_is_of_sources_and_weights(sources):
    prints = {
        BlendedDataset(sources, [1, 1, 1]).fingerprint,
        BlendedDataset(sources, [1, 1, 2]).fingerprint,
        BlendedDataset(sources[::-1], [1, 1, 1]).fingerprint,
        BlendedDataset(sources[:2], [1, 1]).fingerprint,
    }
    assert len(prints) == 4
    assert BlendedDataset(sources, [2, 2, 4]).fingerprint == BlendedDataset(sources, [1, 1, 2]).fingerprint


def test_a_weight_too_small_for_a_sample_is_refused_by_name(sources):
    with pytest.raises(UserError, match=r"weight 1e-09 of .*set1 over their sum .* less than one sample in 1048576"):
        BlendedDataset(sources, [1, 1e-9, 1])


def test_each_source_says_its_share_and_epochs(sources):
    lines = BlendedDataset(sources, [0.5, 0.125, 0.375]).describe_epochs(800).splitlines()
    assert [line.split()[0] for line in lines] == ["50.00%", "12.50%", "37.50%"]
    assert "set0" in lines[0] and "the run reads 400 = 8.00 epochs" in lines[0]
    assert "the run reads 100 = 14.29 epochs" in lines[1] and "the run reads 300 = 1.00 epochs" in lines[2]


def test_a_bad_token_of_a_source_is_named_with_its_file(sources, write_set):
    bad = GPTDataset(write_set([[1, 2, 3, 9, 5]], name="bad"), sequence_length=4, vocab_size=8)
    blend = BlendedDataset([sources[0], bad], [1, 1])
    with pytest.raises(UserError, match=r"bad\.bin: token 9 in document 0 at offset 3"):
        blend.tokens(blend.sample_ids(np.arange(64), seed=0))
