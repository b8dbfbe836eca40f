"""Token files: the reader of Megatron's MMIDIDX format, PREFIX.idx beside PREFIX.bin (the writer is `indexed_writer.py`).

    .idx  magic "MMIDIDX\\0\\0" | version u64 | dtype code u8 | num_sequences u64 | num_documents + 1 u64
          lengths i32[num_sequences] | pointers i64[num_sequences] | document_bounds i64[num_documents + 1] | modes i8 (optional)
    .bin  the tokens of all sequences, one after the other

Opening touches a fixed number of pages, whatever the size of the set: header, file sizes, and blocks of the index spread over it.
`IndexedDataset.check_all` reads the whole index.
"""

from __future__ import annotations

import mmap
import os
import struct
from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatronish.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
"""Code in the header -> type in .bin, as megatron-core numbers them (older Megatron called 7 double)."""

_NUM_PROBES = 16
_INDEX_PROBE = 512  # entries: two to three pages of each table
_TOKEN_PROBE_BYTES = 1 << 16
_SCAN_BLOCK = 1 << 20  # entries of one step of check_all


def idx_path(prefix: str | os.PathLike[str]) -> Path:
    """PREFIX.idx. The suffix is appended, never exchanged: prefixes may hold dots."""
    return Path(f"{os.fspath(prefix)}.idx")


def bin_path(prefix: str | os.PathLike[str]) -> Path:
    """PREFIX.bin."""
    return Path(f"{os.fspath(prefix)}.bin")


def probe_ranges(count: int, *, size: int, probes: int = _NUM_PROBES) -> list[tuple[int, int]]:
    """[start, stop) blocks spread evenly over [0, count), first and last entry included; all of it when that is no more work."""
    if count <= size * probes:
        return [(0, count)] if count else []
    return [(k * (count - size) // (probes - 1), k * (count - size) // (probes - 1) + size) for k in range(probes)]


class IndexedDataset:
    """A set of tokenized documents, mapped. Arrays are views of the files; nothing is read before it is used.

    Raises UserError when the files are missing, damaged, or not of one writing."""

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        self._idx, self._bin = idx_path(prefix), bin_path(prefix)
        self._require_files()
        index = _map(self._idx)
        self.dtype, self.num_sequences, bounds = self._read_header(index)
        self.num_documents = bounds - 1
        n, offset = self.num_sequences, HEADER.size
        # These tables begin at odd addresses: numpy copies a whole unaligned array in searchsorted, so use bisect on them.
        self.lengths: NDArray[np.int32] = np.frombuffer(index, "<i4", n, offset)
        self.pointers: NDArray[np.int64] = np.frombuffer(index, "<i8", n, offset + 4 * n)
        self.document_bounds: NDArray[np.int64] = np.frombuffer(index, "<i8", bounds, offset + 12 * n)
        self._header = bytes(index[: HEADER.size])
        for table in (self.lengths, self.pointers, self.document_bounds):
            _read_ahead(self._idx, table, probe_ranges(len(table), size=_INDEX_PROBE), base=index)
        for start, stop in probe_ranges(n, size=_INDEX_PROBE):
            self._check_sequences(start, stop)
        for start, stop in probe_ranges(bounds, size=_INDEX_PROBE):
            self._check_documents(start, stop)
        data = self._data = _map(self._bin)
        self._check_extent(len(data))
        self.tokens: NDArray[Any] = data.view(self.dtype)
        """Every token of the set, in the order of the documents."""
        self.num_tokens = len(self.tokens)

    def sequence(self, index: int) -> NDArray[Any]:
        """Tokens of one sequence, a view."""
        start = int(self.pointers[index]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[index])]

    def document(self, index: int) -> NDArray[Any]:
        """Tokens of one document (one or more sequences), a view."""
        return self.tokens[self.document_start(index) : self.document_start(index + 1)]

    def document_start(self, index: int) -> int:
        """Position of the first token of a document; `num_documents` gives the end of the set."""
        sequence = int(self.document_bounds[index])
        return self.num_tokens if sequence == self.num_sequences else int(self.pointers[sequence]) // self.dtype.itemsize

    def document_starts(self, begin: int, end: int) -> NDArray[np.int64]:
        """Positions in (begin, end) at which a document begins, rising, each once."""
        first, last = self.locate(begin)[0], self.locate(end - 1)[0]
        sequences = np.unique(self.document_bounds[first + 1 : last + 1])
        return np.unique(self.pointers[sequences] // self.dtype.itemsize)

    def locate(self, position: int) -> tuple[int, int]:
        """(document, offset in it) of the token at `position`. Reads O(log) pages."""
        sequence = bisect_right(self.pointers, position * self.dtype.itemsize) - 1
        document = bisect_right(self.document_bounds, sequence) - 1
        return document, position - self.document_start(document)

    @cached_property
    def fingerprint(self) -> int:
        """xxh3-64 of header, sizes and blocks spread over lengths and tokens (all of them in a set below 1 MiB).

        Ignores path and time, so a copy has the same. Reads at most about 1 MiB: edits between the blocks of a larger set that
        keep every size are not seen."""
        ranges = probe_ranges(self.num_tokens, size=_TOKEN_PROBE_BYTES // self.dtype.itemsize)
        _read_ahead(self._bin, self.tokens, ranges, base=self._data)
        digest = xxhash.xxh3_64(self._header + struct.pack("<Q", self.tokens.nbytes))
        for table, size in (
            (self.lengths, _INDEX_PROBE),
            (self.document_bounds, _INDEX_PROBE),
            (self.tokens, _TOKEN_PROBE_BYTES // self.dtype.itemsize),
        ):
            for start, stop in probe_ranges(len(table), size=size):
                digest.update(table[start:stop].tobytes())
        return digest.intdigest()

    def check_all(self) -> Iterator[int]:
        """Check every entry of the index, block by block; yields the number of sequences checked so far. Raises UserError."""
        for start in range(0, self.num_sequences, _SCAN_BLOCK):
            stop = min(start + _SCAN_BLOCK, self.num_sequences)
            self._check_sequences(start, stop)
            yield stop
        for start in range(0, self.num_documents + 1, _SCAN_BLOCK):
            self._check_documents(start, min(start + _SCAN_BLOCK, self.num_documents + 1))

    def _require_files(self) -> None:
        for path, other in ((self._idx, self._bin), (self._bin, self._idx)):
            if path.is_file():
                continue
            if other.is_file():
                raise UserError(f"{other} is there without {path}: a set needs both; copy the missing file or tokenize again")
            hint = ""
            if self.prefix.endswith((".bin", ".idx")):
                hint = f"; give the prefix {self.prefix[:-4]} without its suffix"
            raise UserError(f"{self.prefix}: no such set, neither {self._idx} nor {self._bin} exists{hint}")

    def _read_header(self, index: NDArray[np.uint8]) -> tuple[np.dtype[Any], int, int]:
        """(dtype, number of sequences, entries of document_bounds)."""
        if len(index) < HEADER.size:
            raise UserError(f"{self._idx}: truncated, {len(index)} bytes where the header needs {HEADER.size}; copy it again")
        magic, version, code, sequences, bounds = HEADER.unpack(bytes(index[: HEADER.size]))
        if magic != MAGIC:
            raise UserError(f"{self._idx}: begins with {magic!r}, not with {MAGIC!r}: not an index of Megatron's mapped format")
        if version != VERSION:
            raise UserError(f"{self._idx}: format version {version}, only version {VERSION} is known")
        if code not in DTYPES:
            raise UserError(f"{self._idx}: unknown dtype code {code}, known are {min(DTYPES)} to {max(DTYPES)}")
        if sequences == 0 or bounds <= 1:
            raise UserError(
                f"{self._idx}: holds no documents ({sequences} sequences, {bounds} document bounds); tokenize some text"
            )
        need = HEADER.size + 12 * sequences + 8 * bounds
        if len(index) not in (need, need + sequences):  # with modes: a multimodal set
            state = "truncated" if len(index) < need else "longer than its header says"
            raise UserError(
                f"{self._idx}: {state}, {len(index)} bytes but {sequences} sequences and {bounds} document bounds "
                f"take {need}; copy it again"
            )
        return DTYPES[code], int(sequences), int(bounds)

    def _check_sequences(self, start: int, stop: int) -> None:
        """Lengths are not negative, and each sequence begins where the one before it ends (the next after `stop` as well)."""
        lengths = self.lengths[start:stop].astype(np.int64)
        if lengths.min() < 0:
            bad = int(np.argmax(lengths < 0))
            raise UserError(f"{self._idx}: sequence {start + bad} has the negative length {lengths[bad]}; tokenize again")
        pointers = self.pointers[start : stop + 1]
        first = 0 if start == 0 else int(pointers[0])
        expected = first + np.concatenate(([0], np.cumsum(lengths * self.dtype.itemsize)))[: len(pointers)]
        if not np.array_equal(pointers, expected):
            bad = int(np.argmax(pointers != expected))
            raise UserError(
                f"{self._idx}: pointer of sequence {start + bad} is out of range, {pointers[bad]} where {expected[bad]} is needed; "
                "tokenize again"
            )

    def _check_documents(self, start: int, stop: int) -> None:
        bounds, n = self.document_bounds[start:stop], self.num_sequences
        first_last = (int(self.document_bounds[0]), int(self.document_bounds[-1]))
        if first_last != (0, n):
            raise UserError(f"{self._idx}: documents span the sequences {first_last[0]} to {first_last[1]}, needed are 0 to {n}")
        wrong = (bounds < 0) | (bounds > n)
        wrong[1:] |= bounds[1:] < bounds[:-1]
        if wrong.any():
            bad = int(np.argmax(wrong))
            raise UserError(
                f"{self._idx}: bound {start + bad} of the documents is out of range or order: sequence {bounds[bad]} of {n}; "
                "tokenize again"
            )

    def _check_extent(self, have: int) -> None:
        need = int(self.pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize
        if have != need:
            state = "truncated" if have < need else "longer than its index says"
            raise UserError(
                f"{self._bin}: {state}, {have} bytes where {self._idx.name} needs {need} ({self.dtype.name}); "
                "copy both files again from one writing"
            )


def _read_ahead(path: Path, table: NDArray[Any], ranges: list[tuple[int, int]], *, base: NDArray[np.uint8]) -> None:
    """Ask for all `ranges` of `table` at once. Faulted in one by one they took 400 ms on a cold disk, so 10."""
    if not hasattr(os, "posix_fadvise"):
        return
    offset = table.ctypes.data - base.ctypes.data if len(base) else 0
    with open(path, "rb") as file:
        for start, stop in ranges:
            where, size = offset + start * table.itemsize, (stop - start) * table.itemsize
            os.posix_fadvise(file.fileno(), where, size, os.POSIX_FADV_WILLNEED)


def _map(path: Path) -> NDArray[np.uint8]:
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return np.empty(0, np.uint8)
        # A plain ndarray over the map: slicing np.memmap costs twice as much (3 us against 1.5 us).
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
