"""Samples of S+1 consecutive tokens.

Documents lie one after the other in .bin, so sample i of a split is the flat slice that begins at i * S of the split's tokens:
stitched across documents, with no sample index. Neighbours share one token, so every token but a split's first is a target once
(the remainder after the last whole sample is left out).
"""

from __future__ import annotations

import os
import struct
from typing import Any, Literal, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatronish import native
from megatronish.data.indexed import IndexedDataset
from megatronish.data.sampler import sample_ids
from megatronish.errors import UserError

Split = Literal["all", "train", "validation"]
_SCAN_BLOCK = 1 << 20


class TokenDataset(Protocol):
    """What the loader reads."""

    @property
    def sequence_length(self) -> int:
        """S."""

    @property
    def fingerprint(self) -> int:
        """64 bits that name the contents; a copy has the same."""

    def __len__(self) -> int:
        """Number of samples."""

    def tokens(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [len(ids), S+1]."""

    def document_numbers(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [len(ids), S]: which document of its sample each input token is of, 0 for the first, never falling."""


class TrainingDataset(TokenDataset, Protocol):
    """A dataset with an order of its own."""

    def sample_ids(self, numbers: NDArray[np.int64], *, seed: int) -> NDArray[np.int64]:
        """Places in the dataset of the samples with these global numbers, which count on over the epochs: a pure function."""

    def describe_epochs(self, samples: int) -> str:
        """What a run of `samples` samples reads of each source, one line a source."""


class GPTDataset:
    """A split of the set at `prefix`. Opens in O(1) reads; raises UserError when the files are bad or too small."""

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        *,
        sequence_length: int,
        vocab_size: int,
        split: Split = "all",
        validation_fraction: float = 0.0,
    ) -> None:
        self.indexed = IndexedDataset(prefix)
        self.sequence_length = sequence_length
        self.vocab_size = vocab_size
        self.split = split
        if self.indexed.dtype.kind not in "iu":
            raise UserError(f"{self.indexed.prefix}.bin holds {self.indexed.dtype.name} numbers; token ids are integers")
        _require_text(self.indexed)
        documents = _documents_of_split(self.indexed, split, validation_fraction)
        start, stop = (self.indexed.document_start(bound) for bound in documents)
        self.num_documents = documents[1] - documents[0]
        self.start = start
        """Position of the split's first token in the set."""
        self.stream: NDArray[Any] = self.indexed.tokens[start:stop]
        """The split's tokens, in order, as they lie in the file."""
        self.num_tokens = stop - start
        self._num_samples = max(0, self.num_tokens - 1) // sequence_length
        if self._num_samples == 0:
            raise UserError(
                f"{self.indexed.prefix}: {_name(split)} has {self.num_tokens} tokens in {self.num_documents} documents, too few "
                f"for one sample of {sequence_length + 1}; lower data.sequence_length={sequence_length} or give more text"
            )
        # A widened negative token, seen as unsigned, is large too: one comparison finds both.
        self._limit = np.uint64(vocab_size)

    def __len__(self) -> int:
        return self._num_samples

    @property
    def fingerprint(self) -> int:
        """64 bits of the set's fingerprint, the split's bounds and the sequence length."""
        data = struct.pack("<QQQQ", self.indexed.fingerprint, self.start, self.num_tokens, self.sequence_length)
        return xxhash.xxh3_64_intdigest(data)

    def sample_ids(self, numbers: NDArray[np.int64], *, seed: int) -> NDArray[np.int64]:
        """Places of sample numbers, each once an epoch, in an order of its own each epoch."""
        return sample_ids(numbers, seed=seed, fingerprint=self.fingerprint, num_samples=self._num_samples)

    def tokens(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [len(ids), S+1], one copy out of the map. Raises UserError for a token outside the vocabulary."""
        if ids.size and (ids.min() < 0 or ids.max() >= self._num_samples):
            raise IndexError(f"sample ids must lie in [0, {self._num_samples})")
        out = np.empty((len(ids), self.sequence_length + 1), np.int64)
        if not len(ids):
            return out
        low, high = gather(self.stream, ids * self.sequence_length, out)
        if low < 0 or high >= self.vocab_size:
            row, offset = np.unravel_index(int(np.argmax(out.view(np.uint64) >= self._limit)), out.shape)
            self._raise_bad_token(int(ids[row]) * self.sequence_length + int(offset))
        return out

    def document_numbers(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [len(ids), S], from the document bounds of the .idx. Reads the bounds of the samples' own documents only."""
        S, out = self.sequence_length, np.zeros((len(ids), self.sequence_length), np.int64)
        for row, sample in zip(out, ids.tolist(), strict=True):
            begin = self.start + sample * S
            row[self.indexed.document_starts(begin, begin + S) - begin] = 1
        out[:, 0] = 0
        return np.cumsum(out, axis=1)

    def check_tokens(self) -> None:
        """Read every token of the split and compare it with the vocabulary. Raises UserError."""
        for begin in range(0, self.num_tokens, _SCAN_BLOCK):
            block = self.stream[begin : begin + _SCAN_BLOCK].astype(np.int64).view(np.uint64)
            if block.max() >= self._limit:
                self._raise_bad_token(begin + int(np.argmax(block >= self._limit)))

    def num_epochs(self, samples: int) -> float:
        """How often a run of `samples` samples reads the split."""
        return samples / self._num_samples

    def describe_epochs(self, samples: int) -> str:
        """One line on what a run of `samples` samples does with this split, for the log."""
        epochs = self.num_epochs(samples)
        what = "each sample at most once" if epochs <= 1 else "samples come again, in another order each epoch"
        return (
            f"{self.indexed.prefix}: {_name(self.split)} has {self.num_tokens} tokens = {self._num_samples} samples of "
            f"{self.sequence_length}; the run reads {samples} = {epochs:.2f} epochs: {what}"
        )

    def _raise_bad_token(self, position: int) -> None:
        document, offset = self.indexed.locate(self.start + position)
        raise UserError(
            f"{self.indexed.prefix}.bin: token {int(self.stream[position])} in document {document} at offset {offset} is outside "
            f"the vocabulary of {self.vocab_size}; set model.vocab_size to the tokenizer's or give the set that this tokenizer made"
        )


def gather(stream: NDArray[Any], offsets: NDArray[np.int64], out: NDArray[np.int64]) -> tuple[int, int]:
    """Fill row r of `out` with the tokens from `offsets[r]` on; returns (smallest, largest). Native for uint16 and int32."""
    if native.cpu is None:
        return gather_reference(stream, offsets, out)
    function = {"<u2": native.cpu.gather_uint16, "<i4": native.cpu.gather_int32}.get(stream.dtype.str)
    if function is None:
        return gather_reference(stream, offsets, out)
    offsets = np.ascontiguousarray(offsets)
    rows, width = out.shape
    low, high = function(stream.ctypes.data, len(stream), offsets.ctypes.data, rows, width, out.ctypes.data, threads=1)
    return int(low), int(high)


def gather_reference(stream: NDArray[Any], offsets: NDArray[np.int64], out: NDArray[np.int64]) -> tuple[int, int]:
    """`gather` in numpy, for any type of integer."""
    for row, begin in zip(out, offsets.tolist(), strict=True):
        row[:] = stream[begin : begin + out.shape[1]]
    return int(out.min()), int(out.max())


class SyntheticDataset:
    """Tokens from arithmetic: needs no files. For rehearsals and benchmarks; the same interface as GPTDataset."""

    def __init__(self, *, vocab_size: int, sequence_length: int, length: int) -> None:
        self.vocab_size = vocab_size
        self.sequence_length = sequence_length
        self._length = length

    def __len__(self) -> int:
        return self._length

    @property
    def fingerprint(self) -> int:
        """64 bits of the three sizes."""
        return xxhash.xxh3_64_intdigest(struct.pack("<QQQ", self.vocab_size, self.sequence_length, self._length))

    def sample_ids(self, numbers: NDArray[np.int64], *, seed: int) -> NDArray[np.int64]:
        """As of a set on disk."""
        return sample_ids(numbers, seed=seed, fingerprint=self.fingerprint, num_samples=self._length)

    def tokens(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [len(ids), S+1], spread over the vocabulary; a function of id and position."""
        position = np.arange(self.sequence_length + 1, dtype=np.uint64)
        x = (ids.astype(np.uint64)[:, None] * np.uint64(self.sequence_length) + position) * np.uint64(0x9E3779B97F4A7C15)
        return ((x >> np.uint64(32)) % np.uint64(self.vocab_size)).astype(np.int64)

    def document_numbers(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [len(ids), S]: documents of 100 tokens."""
        documents = (ids[:, None] * self.sequence_length + np.arange(self.sequence_length)) // 100
        return documents - documents[:, :1]

    def num_epochs(self, samples: int) -> float:
        """How often a run of `samples` samples reads the set."""
        return samples / self._length

    def describe_epochs(self, samples: int) -> str:
        """One line for the log."""
        return f"synthetic tokens: {self._length} samples of {self.sequence_length}; the run reads {samples}"


def _name(split: Split) -> str:
    return "the set" if split == "all" else f"its {split} split"


def _documents_of_split(indexed: IndexedDataset, split: Split, fraction: float) -> tuple[int, int]:
    """[first, last) document. The last `fraction` of the documents, at least one, are the validation split."""
    total = indexed.num_documents
    if split == "all":
        return 0, total
    if split == "train" and fraction == 0:
        return 0, total
    held_out = max(1, round(total * fraction)) if fraction > 0 else 0
    if not 0 < held_out < total:
        raise UserError(
            f"{indexed.prefix}: data.validation_fraction={fraction} of {total} documents leaves {total - held_out} to train on and "
            f"{held_out} held out; both need at least one"
        )
    return (0, total - held_out) if split == "train" else (total - held_out, total)


def _require_text(indexed: IndexedDataset) -> None:
    """Raises UserError when no document has two tokens. Scans only where the counts leave it open."""
    if indexed.num_tokens > indexed.num_documents:
        return
    for begin in range(0, indexed.num_documents, _SCAN_BLOCK):
        bounds = indexed.document_bounds[begin : begin + _SCAN_BLOCK + 1]
        starts = indexed.pointers[np.minimum(bounds, indexed.num_sequences - 1)]
        starts[bounds == indexed.num_sequences] = indexed.tokens.nbytes
        if (np.diff(starts) >= 2 * indexed.dtype.itemsize).any():
            return
    raise UserError(
        f"{indexed.prefix}: all {indexed.num_documents} documents are shorter than 2 tokens, so there is nothing to predict; "
        "give other text to `megatronish data tokenize`"
    )
