"""The order `megatron`: sample by sample that of megatron-core; the native index builders equal numpy's; one build, kept."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatronish import native
from megatronish.data import megatron_order as module
from megatronish.data.gpt_dataset import GPTDataset
from megatronish.data.indexed_writer import IndexedDatasetWriter
from megatronish.data.megatron_order import (
    MegatronBlend,
    MegatronOrder,
    build_blend,
    build_blend_reference,
    sample_index,
    sample_index_reference,
)
from megatronish.errors import UserError

VOCAB = 30_000


def write(prefix: Path, lengths, first_token: int = 1) -> Path:
    with IndexedDatasetWriter(prefix, dtype=np.dtype("u2")) as writer:
        writer.add_documents(np.arange(sum(lengths)) % 20_000 + first_token, np.array(lengths))
    return prefix


def theirs(prefix: Path, *, S: int, num_samples: int, seed: int, first: int = 0, last: int):
    """megatron-core's GPTDataset over the sequences [first, last)."""
    megatron = pytest.importorskip("megatron.core.datasets.gpt_dataset", reason="megatron-core is not installed (a test extra)")
    from megatron.core.datasets.utils import Split

    config = megatron.GPTDatasetConfig(
        random_seed=seed,
        sequence_length=S,
        split="1,0,0",
        blend=([str(prefix)], None),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        tokenizer=SimpleNamespace(vocab_size=VOCAB, eod=0, pad=-1, unique_identifiers={}),
        mid_level_dataset_surplus=0.005,
    )
    low = megatron.GPTDataset.build_low_level_dataset(str(prefix), config)
    return megatron.GPTDataset(low, str(prefix), np.arange(first, last, dtype=np.int32), num_samples, Split.train, config)


def their_tokens(dataset, count: int) -> np.ndarray:
    samples = [dataset[i] for i in range(count)]
    return np.stack([np.append(sample["tokens"].numpy(), sample["labels"].numpy()[-1]) for sample in samples])


CASES = {
    "one epoch": (5, 40),
    "the last epoch apart": (5, 230),
    "the last epoch with the others": (5, 395),
    "a sample longer than a document": (33, 60),
    "many short epochs": (97, 41),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("fraction", [0.0, 0.25])
def test_samples_are_those_of_megatron_core(tmp_path, name, fraction):
    S, num_samples = CASES[name]
    random = np.random.default_rng(3)
    lengths = [*random.integers(0, 30, 60).tolist(), 0, 1, 2]
    prefix = write(tmp_path / "set", lengths)
    split = "train" if fraction else "all"
    dataset = GPTDataset(prefix, sequence_length=S, vocab_size=VOCAB, split=split, validation_fraction=fraction)
    ours = MegatronOrder(dataset, num_samples=num_samples, seed=1234)
    reference = theirs(prefix, S=S, num_samples=num_samples, seed=1234, last=dataset.num_documents)
    assert len(ours) == len(reference) >= num_samples
    np.testing.assert_array_equal(ours.document_index, reference.document_index)
    np.testing.assert_array_equal(ours.sample_index, reference.sample_index)
    np.testing.assert_array_equal(ours.shuffle_index, reference.shuffle_index)
    np.testing.assert_array_equal(ours.tokens(np.arange(len(ours))), their_tokens(reference, len(ours)))


def test_a_split_is_that_of_megatron_core(tmp_path):
    """`--split 1-f,f,0`, which cuts at round((1 - f) n)."""
    for documents, fraction in [(40, 0.25), (100, 0.03), (77, 0.1), (1000, 0.001)]:
        prefix = write(tmp_path / f"set{documents}", [9] * documents)
        ours = GPTDataset(prefix, sequence_length=4, vocab_size=VOCAB, split="train", validation_fraction=fraction)
        assert ours.num_documents == round((1 - fraction) * documents)


def test_a_blend_is_that_of_megatron_core(tmp_path):
    prefixes = [write(tmp_path / f"set{k}", [7 + k] * n, first_token=1 + 100 * k) for k, n in enumerate((40, 15, 90))]
    weights, S, num_samples = [0.2, 0.5, 0.3], 6, 500
    datasets = [GPTDataset(prefix, sequence_length=S, vocab_size=VOCAB) for prefix in prefixes]
    ours = MegatronBlend(datasets, weights, num_samples=num_samples, seed=99)
    sizes = [len(source) for source in ours.sources]
    blended = pytest.importorskip("megatron.core.datasets.blended_dataset", reason="megatron-core is not installed (a test extra)")
    from megatron.core.datasets.blended_megatron_dataset_builder import _get_size_per_split_per_dataset
    from megatron.core.datasets.utils import normalize

    requests = _get_size_per_split_per_dataset(normalize(weights), [num_samples], surplus=0.005)
    targets = _get_size_per_split_per_dataset(normalize(weights), [num_samples])
    sources = [
        theirs(prefix, S=S, num_samples=request[0], seed=99, last=dataset.num_documents)
        for prefix, dataset, request in zip(prefixes, datasets, requests, strict=True)
    ]
    assert sizes == [len(source) for source in sources]
    reference = blended.BlendedDataset(sources, weights, sum(target[0] for target in targets), sources[0].config)
    assert len(ours) == len(reference)
    np.testing.assert_array_equal(ours.tokens(np.arange(len(ours))), their_tokens(reference, len(reference)))


@pytest.mark.skipif(native.cpu is None, reason="native module not built")
@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=20).filter(lambda values: sum(values) > 1), S=st.integers(1, 7))
def test_the_native_sample_index_equals_numpys(lengths, S):
    array = np.array(lengths, np.int32)
    documents = np.random.default_rng(0).permutation(np.tile(np.arange(len(array), dtype=np.int32), 3))
    num_samples = (3 * sum(lengths) - 1) // S
    args = {"sequence_length": S, "num_samples": num_samples}
    np.testing.assert_array_equal(sample_index(array, documents, **args), sample_index_reference(array, documents, **args))


@pytest.mark.skipif(native.cpu is None, reason="native module not built")
def test_the_native_sample_index_refuses_what_would_read_out_of_bounds():
    for lengths, documents in (([3], [1]), ([3], [-1]), ([3], [0])):
        with pytest.raises(IndexError):
            sample_index(np.array(lengths, np.int32), np.array(documents, np.int32), sequence_length=2, num_samples=3)


@pytest.mark.skipif(native.cpu is None, reason="native module not built")
def test_the_native_blend_equals_numpys():
    weights = [0.1, 0.25, 0.6, 0.05]
    ours = build_blend(weights, 2000)
    reference = {name: np.empty_like(array) for name, array in ours.items()}
    build_blend_reference(np.array(weights), reference)
    for name in ours:
        np.testing.assert_array_equal(ours[name], reference[name])


def test_the_order_is_built_once_and_mapped_by_others(tmp_path, monkeypatch):
    dataset = GPTDataset(write(tmp_path / "set", [9] * 50), sequence_length=4, vocab_size=VOCAB)
    cache = tmp_path / "run" / "order"
    first = MegatronOrder(dataset, num_samples=300, seed=1, cache=cache)
    monkeypatch.setattr(module, "build_order", lambda *args, **kwargs: pytest.fail("built twice"))
    again = MegatronOrder(dataset, num_samples=300, seed=1, cache=cache)
    assert isinstance(again.shuffle_index, np.memmap)
    np.testing.assert_array_equal(again.tokens(np.arange(300)), first.tokens(np.arange(300)))
    monkeypatch.undo()
    for other in ({"num_samples": 301, "seed": 1}, {"num_samples": 300, "seed": 2}):
        assert MegatronOrder(dataset, cache=cache, **other).fingerprint != first.fingerprint
    assert not list(cache.glob("*.tmp-*"))


def test_an_interrupted_build_leaves_nothing_that_is_taken_for_an_order(tmp_path, monkeypatch):
    dataset = GPTDataset(write(tmp_path / "set", [9] * 50), sequence_length=4, vocab_size=VOCAB)
    cache = tmp_path / "order"
    monkeypatch.setattr(module.np, "save", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        MegatronOrder(dataset, num_samples=30, seed=1, cache=cache)
    monkeypatch.undo()
    assert not [path for path in cache.iterdir() if path.is_dir() and ".tmp-" not in path.name]
    assert len(MegatronOrder(dataset, num_samples=30, seed=1, cache=cache)) >= 30


def test_document_numbers_change_where_the_document_does(tmp_path):
    lengths = [3, 1, 9, 2, 14, 1, 1, 30, 6, 5]
    with IndexedDatasetWriter(tmp_path / "set", dtype=np.dtype("u2")) as writer:
        writer.add_documents(np.repeat(np.arange(10), lengths), np.array(lengths))  # each of one token of its own
    dataset = GPTDataset(tmp_path / "set", sequence_length=5, vocab_size=10)
    for order in (MegatronOrder(dataset, num_samples=14, seed=1), MegatronBlend([dataset], [1.0], num_samples=13, seed=1)):
        ids = np.arange(min(14, len(order)))
        changes = np.diff(order.tokens(ids)[:, :-1], axis=1) != 0
        assert changes.any()
        np.testing.assert_array_equal(np.diff(order.document_numbers(ids), axis=1), changes)


def test_places_beyond_the_order_and_bad_tokens_are_refused(tmp_path):
    dataset = GPTDataset(write(tmp_path / "set", [9] * 50), sequence_length=4, vocab_size=VOCAB)
    order = MegatronOrder(dataset, num_samples=30, seed=1)
    with pytest.raises(IndexError, match="built for 30 samples"):
        order.sample_ids(np.array([len(order)]), seed=1)
    small = MegatronOrder(GPTDataset(tmp_path / "set", sequence_length=4, vocab_size=100), num_samples=100, seed=1)
    with pytest.raises(UserError, match=r"set\.bin: token 100 in document 11 at offset 0"):
        small.tokens(np.arange(len(small)))


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    dataset = GPTDataset(write(tmp_path / "set", [9] * 50), sequence_length=4, vocab_size=VOCAB)
    with pytest.raises(UserError, match=r"cannot write the order of samples to .*change run_root or name"):
        MegatronOrder(dataset, num_samples=30, seed=1, cache=tmp_path / "file" / "order")
