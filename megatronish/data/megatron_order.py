"""The order of samples of megatron-core's GPTDataset and BlendedDataset, sample by sample, for runs that go on from its own.

Documents of all epochs are shuffled, laid end to end and cut into samples, which are shuffled too; the last epoch apart from the
others when less than 80 % of it is needed. So the order depends on the number of samples in the whole run, and takes an index,
which is built once and kept in `cache`. What Megatron calls a document here is a sequence of the set: one document, unless it was
written with several sequences a document. Its split `--split 1-f,f,0` is `data.validation_fraction=f`, but for rounding.
"""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatronish import native
from megatronish.data.gpt_dataset import GPTDataset
from megatronish.errors import UserError

Arrays = dict[str, NDArray[np.integer]]
_SEPARATE_BELOW = 0.80  # of an epoch's samples
_SURPLUS = 0.005  # samples that a blend's source is built with beyond its share


class MegatronOrder:
    """The first `num_samples` samples, at least, of a set in Megatron's order: sample number n is place n."""

    def __init__(self, dataset: GPTDataset, *, num_samples: int, seed: int, cache: Path | None = None) -> None:
        self.dataset = dataset
        self.sequence_length = dataset.sequence_length
        self.num_epochs = num_epochs(dataset.num_tokens, sequence_length=self.sequence_length, num_samples=num_samples)
        key = struct.pack("<QQQ", dataset.fingerprint, num_samples, seed)
        self.fingerprint = xxhash.xxh3_64_intdigest(b"megatron order 1" + key)
        """64 bits of the split, the seed and the number of samples: the order follows from them."""
        arrays = _cached(cache, f"{self.fingerprint:016x}", lambda: build_order(dataset, num_samples=num_samples, seed=seed))
        self.document_index, self.sample_index, self.shuffle_index = (arrays[name] for name in ("document", "sample", "shuffle"))
        self._num_samples = num_samples

    def __len__(self) -> int:
        return len(self.shuffle_index)

    def sample_ids(self, numbers: NDArray[np.int64], *, seed: int) -> NDArray[np.int64]:
        """The numbers themselves. IndexError beyond the samples that the order was built for."""
        if numbers.size and numbers.max() >= len(self):
            raise IndexError(f"the order was built for {self._num_samples} samples and has {len(self)}; asked for {numbers.max()}")
        return numbers

    def tokens(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [len(ids), S+1]. Raises UserError for a token outside the vocabulary."""
        if ids.size and (ids.min() < 0 or ids.max() >= len(self)):
            raise IndexError(f"sample ids must lie in [0, {len(self)})")
        out = np.empty((len(ids), self.sequence_length + 1), np.int64)
        for row, sample in zip(out, self.shuffle_index[ids].tolist(), strict=True):
            self._fill(row, sample)
        if out.size and (out.min() < 0 or out.max() >= self.dataset.vocab_size):
            self.dataset.check_tokens()  # names the first such token
        return out

    def document_numbers(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [len(ids), S]: of what Megatron calls documents."""
        out = np.empty((len(ids), self.sequence_length), np.int64)
        for row, sample in zip(out, self.shuffle_index[ids].tolist(), strict=True):
            (first, offset), (last, last_offset) = self.sample_index[sample : sample + 2].tolist()
            sizes = self.dataset.indexed.lengths[self.document_index[first : last + 1]].astype(np.int64)
            sizes[-1] = last_offset + 1
            sizes[0] -= offset
            sizes = sizes[sizes > 0]
            row[:] = np.repeat(np.arange(len(sizes)), sizes)[:-1]  # the last token is a label only
        return out

    def _fill(self, row: NDArray[np.int64], sample: int) -> None:
        (first, offset), (last, last_offset) = self.sample_index[sample : sample + 2].tolist()
        filled = 0
        for position in range(first, last + 1):
            tokens = self.dataset.indexed.sequence(int(self.document_index[position]))
            piece = tokens[offset if position == first else 0 : last_offset + 1 if position == last else None]
            row[filled : filled + len(piece)] = piece
            filled += len(piece)
        assert filled == len(row)

    def describe_epochs(self, samples: int) -> str:
        """One line for the log."""
        return f"{self.dataset.describe_epochs(samples)}; in megatron-core's order of {self.num_epochs} epochs"


class MegatronBlend:
    """Sets mixed in the order of megatron-core's BlendedDataset: the next sample is of the source furthest behind its weight."""

    def __init__(
        self, datasets: Sequence[GPTDataset], weights: Sequence[float], *, num_samples: int, seed: int, cache: Path | None = None
    ) -> None:
        total = float(np.sum(np.array(weights, np.float64)))
        self.weights = [weight / total for weight in weights]
        targets = [math.ceil(num_samples * weight) for weight in self.weights]
        self.sources = [
            MegatronOrder(dataset, num_samples=math.ceil(target * (1 + _SURPLUS)), seed=seed, cache=cache)
            for dataset, target in zip(datasets, targets, strict=True)
        ]
        self.sequence_length = datasets[0].sequence_length
        digest = xxhash.xxh3_64(b"megatron blend 1" + struct.pack(f"<Q{len(weights)}d", num_samples, *self.weights))
        for source in self.sources:
            digest.update(struct.pack("<Q", source.fingerprint))
        self.fingerprint = digest.intdigest()
        """64 bits of the sources, their orders and weights."""
        size = sum(targets)
        arrays = _cached(cache, f"{self.fingerprint:016x}", lambda: build_blend(self.weights, size))
        self.source_index, self.number_index = arrays["source"], arrays["number"]
        counts = np.bincount(self.source_index, minlength=len(weights))
        for source, count in zip(self.sources, counts.tolist(), strict=True):
            if len(source) < count:
                raise UserError(
                    f"data.order=megatron: the blend takes {count} samples of {source.dataset.indexed.prefix}, whose order holds "
                    f"{len(source)}; megatron-core refuses this too: change its weight or use data.order=permutation"
                )

    def __len__(self) -> int:
        return len(self.source_index)

    def sample_ids(self, numbers: NDArray[np.int64], *, seed: int) -> NDArray[np.int64]:
        """The numbers themselves. IndexError beyond the samples that the order was built for."""
        if numbers.size and numbers.max() >= len(self):
            raise IndexError(f"the blend was built for {len(self)} samples; asked for {numbers.max()}")
        return numbers

    def tokens(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [len(ids), S+1]. Raises UserError for a token outside the vocabulary."""
        out = np.empty((len(ids), self.sequence_length + 1), np.int64)
        which, numbers = self.source_index[ids], self.number_index[ids]
        for k in np.unique(which):
            chosen = which == k
            out[chosen] = self.sources[k].tokens(np.asarray(numbers[chosen]))
        return out

    def document_numbers(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [len(ids), S]."""
        out = np.empty((len(ids), self.sequence_length), np.int64)
        which, numbers = self.source_index[ids], self.number_index[ids]
        for k in np.unique(which):
            chosen = which == k
            out[chosen] = self.sources[k].document_numbers(np.asarray(numbers[chosen]))
        return out

    def describe_epochs(self, samples: int) -> str:
        """One line a source."""
        shares = zip(self.sources, self.weights, strict=True)
        return "\n".join(
            f"{weight:.2%} of the samples: {source.describe_epochs(round(samples * weight))}" for source, weight in shares
        )


def num_epochs(num_tokens: int, *, sequence_length: int, num_samples: int) -> int:
    """Whole epochs that hold `num_samples` samples and the last one's extra token."""
    return max(1, -(-(num_samples * sequence_length + 1) // num_tokens))


def build_order(dataset: GPTDataset, *, num_samples: int, seed: int) -> Arrays:
    """`document`: sequences of the set in order, int32; `sample`: where samples begin there, int64 [n + 1, 2]; `shuffle`."""
    S, per_epoch = dataset.sequence_length, dataset.num_tokens
    epochs = num_epochs(per_epoch, sequence_length=S, num_samples=num_samples)
    assert dataset.split != "validation", "training order"
    sequences = np.arange(int(dataset.indexed.document_bounds[dataset.num_documents]), dtype=np.int32)
    total = (epochs * per_epoch - 1) // S
    before_last = ((epochs - 1) * per_epoch - 1) // S
    separate = epochs > 1 and num_samples - before_last < int(_SEPARATE_BELOW * ((per_epoch - 1) // S))
    random = np.random.RandomState(seed)
    parts = []
    for part in (epochs - 1, 1) if separate else (epochs,):
        parts.append(np.tile(sequences, part))
        random.shuffle(parts[-1])
    documents = np.concatenate(parts)
    samples = sample_index(dataset.indexed.lengths, documents, sequence_length=S, num_samples=total)
    dtype = np.uint32 if total < np.iinfo(np.uint32).max - 1 else np.int64
    shuffles = []
    for start, stop in ((0, before_last), (before_last, total)) if separate else ((0, total),):
        shuffles.append(np.arange(start, stop, dtype=dtype))
        random.shuffle(shuffles[-1])
    return {"document": documents, "sample": samples, "shuffle": np.concatenate(shuffles)}


def sample_index(
    lengths: NDArray[np.int32], documents: NDArray[np.int32], *, sequence_length: int, num_samples: int
) -> NDArray[np.int64]:
    """int64 [num_samples + 1, 2]: (position in `documents`, offset in it) of token i * sequence_length. Native where built."""
    function = getattr(native.cpu, "megatron_sample_index", None)
    if function is None:
        return sample_index_reference(lengths, documents, sequence_length=sequence_length, num_samples=num_samples)
    lengths = np.require(lengths, np.int32, ["C", "A"]) if lengths.flags.aligned else lengths.copy()
    documents, out = np.ascontiguousarray(documents), np.empty((num_samples + 1, 2), np.int64)
    sizes = (lengths.ctypes.data, len(lengths), documents.ctypes.data, len(documents))
    function(*sizes, sequence_length, num_samples, out.ctypes.data)
    return out


def sample_index_reference(
    lengths: NDArray[np.int32], documents: NDArray[np.int32], *, sequence_length: int, num_samples: int
) -> NDArray[np.int64]:
    """`sample_index` in numpy."""
    ends = np.cumsum(lengths[documents], dtype=np.int64)
    tokens = np.arange(num_samples + 1, dtype=np.int64) * sequence_length
    positions = np.searchsorted(ends, tokens, side="right")
    positions[0] = 0
    starts = np.concatenate(([0], ends[:-1]))
    return np.stack((positions, tokens - starts[positions]), axis=1)


def build_blend(weights: Sequence[float], size: int) -> Arrays:
    """`source` int16 and `number` int64, [size] each. Native where built."""
    arrays: Arrays = {"source": np.empty(size, np.int16), "number": np.empty(size, np.int64)}
    given = np.array(weights, np.float64)
    function = getattr(native.cpu, "megatron_blend_index", None)
    if function is None:
        build_blend_reference(given, arrays)
    else:
        function(given.ctypes.data, len(given), size, arrays["source"].ctypes.data, arrays["number"].ctypes.data)
    return arrays


def build_blend_reference(weights: NDArray[np.float64], arrays: Arrays) -> None:
    """`build_blend` in numpy, some microseconds a sample."""
    taken = np.zeros(len(weights), np.int64)
    for i in range(len(arrays["source"])):
        k = int(np.argmax(weights * max(float(i), 1.0) - taken))
        arrays["source"][i], arrays["number"][i] = k, taken[k]
        taken[k] += 1


def _cached(cache: Path | None, name: str, build: Callable[[], Arrays]) -> Arrays:
    """`build()`, or its arrays mapped from the folder CACHE/NAME, which one process builds while the others wait for it."""
    if cache is None:
        return build()
    folder = cache / name
    if not folder.is_dir():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with open(cache / f"{name}.lock", "w") as lock:
                _lock(lock.fileno())
                if not folder.is_dir():
                    _save(folder, build())
        except OSError as error:
            raise UserError(f"cannot write the order of samples to {folder}: {error.strerror}; change run_root or name") from None
    return {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}


def _lock(descriptor: int) -> None:
    """Wait for the lock. On a file system without locks every process builds, and all build the same."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        return


def _save(folder: Path, arrays: Arrays) -> None:
    """Whole or not at all: written aside, then renamed."""
    temporary = folder.with_name(f"{folder.name}.tmp-{os.uname().nodename}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for name, array in arrays.items():
        with open(temporary / f"{name}.npy", "wb") as file:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(temporary)  # another process was first
