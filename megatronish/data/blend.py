"""Several sets as one, by weight. In every block of `block_size` consecutive sample numbers each source has the same, exact count.

Where in a block a source's samples stand is a keyed permutation of the block, and which of its samples they are follows from the
number of blocks before it. So a sample is found from its number alone, in O(1) memory, and each source has its own epochs.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatronish.data.gpt_dataset import GPTDataset
from megatronish.data.permutation import Permutation
from megatronish.errors import UserError

_SMALLEST_BLOCK, _LARGEST_BLOCK = 1 << 10, 1 << 20
_CLOSE_ENOUGH = Fraction(1, 100)  # of its weight, that a source's share of a block may be off by


class BlendedDataset:
    """Sources of one sequence length, mixed by weight. Place i of source k is place (samples of the sources before k) + i."""

    def __init__(self, sources: Sequence[GPTDataset], weights: Sequence[float]) -> None:
        assert len(sources) == len(weights) > 0
        self.sources = tuple(sources)
        self.sequence_length = sources[0].sequence_length
        self.counts = block_counts(weights)
        """Samples of each source in a block."""
        self.block_size = sum(self.counts)
        for source, count, weight in zip(sources, self.counts, weights, strict=True):
            if count == 0:
                raise UserError(
                    f"data.train: weight {weight} of {source.indexed.prefix} over their sum {sum(weights)} is less than one sample "
                    f"in {self.block_size}; raise it or leave the set out"
                )
        self._bounds = np.concatenate(([0], np.cumsum(self.counts)))
        self._offsets = np.concatenate(([0], np.cumsum([len(source) for source in sources])))

    def __len__(self) -> int:
        return int(self._offsets[-1])

    @property
    def fingerprint(self) -> int:
        """64 bits of each source's fingerprint and count."""
        digest = xxhash.xxh3_64()
        for source, count in zip(self.sources, self.counts, strict=True):
            digest.update(struct.pack("<QQ", source.fingerprint, count))
        return digest.intdigest()

    def source_numbers(self, numbers: NDArray[np.int64], *, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(source, number within that source) of each sample number. Numbers of a source count on over the blocks: 0, 1, 2, ..."""
        blocks, positions = np.divmod(numbers, self.block_size)
        slots, fingerprint = np.empty_like(positions), self.fingerprint
        for block in np.unique(blocks):
            chosen = blocks == block
            slots[chosen] = Permutation.keyed(self.block_size, seed, fingerprint, int(block)).map(positions[chosen])
        which = np.searchsorted(self._bounds, slots, side="right") - 1
        return which, blocks * np.array(self.counts)[which] + slots - self._bounds[which]

    def sample_ids(self, numbers: NDArray[np.int64], *, seed: int) -> NDArray[np.int64]:
        """Places of sample numbers."""
        which, within = self.source_numbers(numbers, seed=seed)
        ids = np.empty_like(within)
        for k in np.unique(which):
            chosen = which == k
            ids[chosen] = self._offsets[k] + self.sources[k].sample_ids(within[chosen], seed=seed)
        return ids

    def tokens(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [len(ids), S+1]. Raises UserError for a token outside the vocabulary."""
        out = np.empty((len(ids), self.sequence_length + 1), np.int64)
        which, local = self.locate(ids)
        for k in np.unique(which):
            chosen = which == k
            out[chosen] = self.sources[k].tokens(local[chosen])
        return out

    def document_numbers(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [len(ids), S]."""
        out = np.empty((len(ids), self.sequence_length), np.int64)
        which, local = self.locate(ids)
        for k in np.unique(which):
            chosen = which == k
            out[chosen] = self.sources[k].document_numbers(local[chosen])
        return out

    def locate(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(source, place in it) of each place."""
        if ids.size and (ids.min() < 0 or ids.max() >= len(self)):
            raise IndexError(f"sample ids must lie in [0, {len(self)})")
        which = np.searchsorted(self._offsets, ids, side="right") - 1
        return which, ids - self._offsets[which]

    def describe_epochs(self, samples: int) -> str:
        """One line a source: its share, and how often the run reads it."""
        lines = []
        for source, count in zip(self.sources, self.counts, strict=True):
            read = round(samples * count / self.block_size)
            lines.append(f"{count / self.block_size:.2%} of the samples: {source.describe_epochs(read)}")
        return "\n".join(lines)


def block_counts(weights: Sequence[float]) -> tuple[int, ...]:
    """Samples of each source in a block, by largest remainder. The block is the smallest power of two from 1,024 to 1,048,576
    in which every share is within one percent of its weight."""
    total = sum(map(Fraction, weights))
    assert total > 0
    shares = [Fraction(weight) / total for weight in weights]
    size = _SMALLEST_BLOCK
    while True:
        counts = largest_remainder(shares, size)
        close = all(abs(count - size * share) <= _CLOSE_ENOUGH * size * share for count, share in zip(counts, shares, strict=True))
        if close or size == _LARGEST_BLOCK:
            return counts
        size *= 2


def largest_remainder(shares: Sequence[Fraction], size: int) -> tuple[int, ...]:
    """`size` cut into whole numbers in proportion to `shares` (which sum to 1): the floors, and one more for the largest
    remainders, the first of equal ones."""
    counts = [int(share * size) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda k: (counts[k] - shares[k] * size, k))
    for k in by_remainder[: size - sum(counts)]:
        counts[k] += 1
    return tuple(counts)
