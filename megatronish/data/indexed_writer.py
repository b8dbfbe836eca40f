"""Writes PREFIX.bin and PREFIX.idx, byte for byte what megatron-core's IndexedDatasetBuilder writes (format: `indexed.py`).

Memory is bounded: tokens and lengths go to files as they come. A set appears under its name only when it is whole.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatronish.data.indexed import DTYPES, HEADER, MAGIC, VERSION, bin_path, idx_path
from megatronish.errors import UserError
from megatronish.writeback import begin_writing

_BLOCK = 1 << 18  # entries of one step when the index is put together
_BEGIN_BYTES = 8 << 20  # the disk begins with as many at a time
_SMALL_VOCABULARY = 65500  # megatron-core's bound, not 65536: the same text gives the same files


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 where the vocabulary fits, else int32: megatron-core's choice."""
    return np.dtype("<u2") if vocab_size < _SMALL_VOCABULARY else np.dtype("<i4")


@dataclass(frozen=True)
class WriterState:
    """How much a writer was given."""

    num_documents: int = 0
    num_sequences: int = 0
    num_tokens: int = 0
    open_length: int = 0
    """Tokens of the open sequence."""
    last_bound: int = 0


class IndexedDatasetWriter:
    """Use as a context manager: leaving it normally makes the set appear, leaving it by an exception leaves nothing behind.

    `add_tokens` extends the open sequence, `end_sequence` closes it, `end_document` closes sequence and document;
    `add_documents` adds many whole documents of one sequence each."""

    def __init__(self, prefix: str | os.PathLike[str], *, dtype: np.dtype[Any]) -> None:
        self._bin, self._idx = bin_path(prefix), idx_path(prefix)
        self._bin.parent.mkdir(parents=True, exist_ok=True)
        tag = f".tmp-{os.getpid()}"
        self._temporary = [Path(f"{self._bin}{tag}"), Path(f"{self._idx}{tag}")]
        self._temporary += [Path(f"{self._idx}{tag}-{table}") for table in ("lengths", "bounds")]
        self._open(np.dtype(dtype), WriterState())

    @classmethod
    def resumable(
        cls, prefix: str | os.PathLike[str], *, dtype: np.dtype[Any], folder: Path, state: WriterState
    ) -> IndexedDatasetWriter:
        """A writer that keeps its files in `folder` and goes on from `state`, what `flush` gave before a process died."""
        writer = cls.__new__(cls)
        writer._bin, writer._idx = bin_path(prefix), idx_path(prefix)
        writer._temporary = [folder / name for name in ("tokens", "index", "lengths", "bounds")]
        writer._open(np.dtype(dtype), state)
        return writer

    def _open(self, dtype: np.dtype[Any], state: WriterState) -> None:
        self._dtype = dtype.newbyteorder("<")
        self._code = next(code for code, known in DTYPES.items() if known == self._dtype)
        self.num_documents, self.num_sequences, self.num_tokens = state.num_documents, state.num_sequences, state.num_tokens
        self._open_length = state.open_length
        self._begun = state.num_tokens * self._dtype.itemsize
        self._data = _open_at(self._temporary[0], state.num_tokens * self._dtype.itemsize, buffering=1 << 20)
        self._lengths = _Spool(self._temporary[2], "i", count=state.num_sequences)
        self._bounds = _Spool(self._temporary[3], "q", count=state.num_documents + 1 if state.num_documents else 0)
        if state.num_documents:
            self._bounds.last = state.last_bound
        else:
            self._bounds.append(0)

    def flush(self, *, durable: bool = False) -> WriterState:
        """Hand all that was added to the system (`durable`: to the disk), and say how much it is."""
        self._lengths.flush()
        self._bounds.flush()
        for file in (self._data, self._lengths.file, self._bounds.file):
            _sync(file) if durable else file.flush()
        return WriterState(self.num_documents, self.num_sequences, self.num_tokens, self._open_length, self._bounds.last)

    def close(self) -> None:
        """Close the files and leave them as they are."""
        for file in (self._data, self._lengths, self._bounds):
            file.close()

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
        if (size := self.num_tokens * self._dtype.itemsize) - self._begun >= _BEGIN_BYTES:
            self._data.flush()
            begin_writing(self._data.fileno(), self._begun, size - self._begun)
            self._begun = size

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
                self.finish()
        finally:
            self.close()
            for path in self._temporary:
                path.unlink(missing_ok=True)

    def finish(self) -> None:
        """Make the set appear under its name."""
        self.write_index()
        publish(self._temporary[0], self._temporary[1], self._bin, self._idx)

    def write_index(self) -> None:
        """Put the index together, beside the tokens. Both are on the disk then."""
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


def publish(tokens: Path, index: Path, bin_file: Path, idx_file: Path) -> None:
    """Rename both files. Done again after a crash in between, with whichever are left, it finishes the work."""
    # Without an index there is no set. So a crash in between leaves none, never the new tokens under the old index.
    idx_file.unlink(missing_ok=True)
    if tokens.exists():
        os.replace(tokens, bin_file)
    os.replace(index, idx_file)
    directory = os.open(idx_file.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _open_at(path: Path, size: int, *, buffering: int = -1) -> BinaryIO:
    """For writing from byte `size` on; what is beyond is cut off."""
    file: BinaryIO = open(path, "r+b" if size else "wb", buffering=buffering)  # noqa: SIM115
    file.truncate(size)
    file.seek(size)
    return file


class _Spool:
    """A growing table of integers in a file."""

    def __init__(self, path: Path, typecode: str, *, count: int) -> None:
        self.last = 0
        self._path = path
        self._buffer = array(typecode)
        self.file = _open_at(path, count * self._buffer.itemsize)
        self.close: Callable[[], None] = self.file.close

    def append(self, value: int) -> None:
        self.last = value
        self._buffer.append(value)
        if len(self._buffer) >= _BLOCK:
            self._flush()

    def extend(self, values: NDArray[np.integer[Any]]) -> None:
        if len(values):
            self.last = int(values[-1])
            self._flush()
            self.file.write(values.astype(f"i{self._buffer.itemsize}").tobytes())

    def flush(self) -> None:
        self._flush()
        self.file.flush()

    def blocks(self, dtype: str) -> Iterator[NDArray[Any]]:
        self.flush()
        with open(self._path, "rb") as file:
            while block := file.read(_BLOCK * np.dtype(dtype).itemsize):
                yield np.frombuffer(block, dtype)

    def _flush(self) -> None:
        self.file.write(self._buffer.tobytes())
        del self._buffer[:]


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
