"""Writes PREFIX.bin and PREFIX.idx, byte for byte what megatron-core's IndexedDatasetBuilder writes (format: `indexed.py`).

Memory is bounded: tokens and lengths go to files as they come. A set appears under its name only when it is whole.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatronish.data.indexed import DTYPES, HEADER, MAGIC, VERSION, bin_path, idx_path
from megatronish.errors import UserError

_BLOCK = 1 << 18  # entries of one step when the index is put together
_SMALL_VOCABULARY = 65500  # megatron-core's bound, not 65536: the same text gives the same files


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 where the vocabulary fits, else int32: megatron-core's choice."""
    return np.dtype("<u2") if vocab_size < _SMALL_VOCABULARY else np.dtype("<i4")


class IndexedDatasetWriter:
    """Use as a context manager: leaving it normally makes the set appear, leaving it by an exception leaves nothing behind.

    `add_tokens` extends the open sequence, `end_sequence` closes it, `end_document` closes sequence and document;
    `add_documents` adds many whole documents of one sequence each."""

    def __init__(self, prefix: str | os.PathLike[str], *, dtype: np.dtype[Any]) -> None:
        self.num_documents = 0
        self.num_sequences = 0
        self.num_tokens = 0
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._code = next(code for code, known in DTYPES.items() if known == self._dtype)
        self._bin, self._idx = bin_path(prefix), idx_path(prefix)
        self._bin.parent.mkdir(parents=True, exist_ok=True)
        tag = f".tmp-{os.getpid()}"
        self._temporary = [Path(f"{self._bin}{tag}"), Path(f"{self._idx}{tag}")]
        self._temporary += [Path(f"{self._idx}{tag}-{table}") for table in ("lengths", "bounds")]
        self._data: BinaryIO = open(self._temporary[0], "wb", buffering=1 << 20)  # noqa: SIM115
        self._lengths = _Spool(self._temporary[2], "i")
        self._bounds = _Spool(self._temporary[3], "q")
        self._bounds.append(0)
        self._open_length = 0

    @property
    def document_is_open(self) -> bool:
        """Whether tokens or sequences came since the last end of a document."""
        return self._open_length > 0 or self.num_sequences > self._bounds.last

    def add_tokens(self, tokens: NDArray[Any]) -> None:
        """Append to the open sequence. Raises UserError for a token that the dtype cannot hold (a cast would wrap silently)."""
        if tokens.size == 0:
            return
        if tokens.dtype != self._dtype and self._dtype.kind in "iu":
            limits = np.iinfo(self._dtype)
            low, high = int(tokens.min()), int(tokens.max())
            if low < limits.min or high > limits.max:
                bad = low if low < limits.min else high
                raise UserError(f"{self._bin}: token {bad} does not fit {self._dtype.name}; write the set with a wider dtype")
        self._data.write(np.ascontiguousarray(tokens, dtype=self._dtype).data)
        self._open_length += tokens.size
        self.num_tokens += tokens.size

    def end_sequence(self) -> None:
        """Close the open sequence, which may be empty."""
        if self._open_length > np.iinfo(np.int32).max:
            raise UserError(f"{self._idx}: a document of {self._open_length} tokens; the format holds at most 2147483647: cut it")
        self._lengths.append(self._open_length)
        self.num_sequences += 1
        self._open_length = 0

    def end_document(self) -> None:
        """Close the document, and the open sequence if it has tokens or the document has none yet."""
        if self._open_length or self.num_sequences == self._bounds.last:
            self.end_sequence()
        self._bounds.append(self.num_sequences)
        self.num_documents += 1

    def add_documents(self, tokens: NDArray[Any], lengths: NDArray[np.integer[Any]]) -> None:
        """Documents of one sequence each: `tokens` is all of them, end to end, `lengths` their lengths."""
        assert not self._open_length, "a document is open"
        assert int(lengths.sum()) == tokens.size, "lengths and tokens disagree"
        self.add_tokens(tokens)
        self._open_length = 0
        self._lengths.extend(lengths)
        self._bounds.extend(self.num_sequences + 1 + np.arange(len(lengths)))
        self.num_sequences += len(lengths)
        self.num_documents += len(lengths)

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            for file in (self._data, self._lengths, self._bounds):
                file.close()
            for path in self._temporary:
                path.unlink(missing_ok=True)

    def _finish(self) -> None:
        assert not self._open_length, "a document is open"
        if not self.num_documents:
            raise UserError(f"{self._bin}: no documents to write")
        _sync(self._data)
        with open(self._temporary[1], "wb") as index:
            index.write(HEADER.pack(MAGIC, VERSION, self._code, self.num_sequences, self.num_documents + 1))
            for lengths in self._lengths.blocks("<i4"):
                index.write(lengths.tobytes())
            pointer = 0
            for lengths in self._lengths.blocks("<i4"):
                ends = pointer + np.cumsum(lengths.astype("<i8") * self._dtype.itemsize)
                index.write(np.concatenate(([pointer], ends[:-1])).astype("<i8").tobytes())
                pointer = int(ends[-1])
            for bounds in self._bounds.blocks("<i8"):
                index.write(bounds.tobytes())
            _sync(index)
        # Without an index there is no set. So a crash in between leaves none, never the new tokens under the old index.
        self._idx.unlink(missing_ok=True)
        os.replace(self._temporary[0], self._bin)
        os.replace(self._temporary[1], self._idx)
        directory = os.open(self._idx.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


class _Spool:
    """A growing table of integers in a file."""

    def __init__(self, path: Path, typecode: str) -> None:
        self.last = 0
        self._path = path
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115
        self._buffer = array(typecode)
        self.close: Callable[[], None] = self._file.close

    def append(self, value: int) -> None:
        self.last = value
        self._buffer.append(value)
        if len(self._buffer) >= _BLOCK:
            self._flush()

    def extend(self, values: NDArray[np.integer[Any]]) -> None:
        if len(values):
            self.last = int(values[-1])
            self._flush()
            self._file.write(values.astype(f"i{self._buffer.itemsize}").tobytes())

    def blocks(self, dtype: str) -> Iterator[NDArray[Any]]:
        self._flush()
        self._file.flush()
        with open(self._path, "rb") as file:
            while block := file.read(_BLOCK * np.dtype(dtype).itemsize):
                yield np.frombuffer(block, dtype)

    def _flush(self) -> None:
        self._file.write(self._buffer.tobytes())
        del self._buffer[:]


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
