"""Write a stream of host memory to a new file, durably, as fast as the disk takes it, and digest it on the way.

The caller's thread takes the stream in order, chunk by chunk: copies it into an aligned buffer, digests it, hands it on. A few
writer threads put chunks on disk past the page cache (O_DIRECT), so nothing is copied twice and fsync has nothing left to write.
A chunk that already lies in one aligned run of memory is written from there.

Measured for 1 GiB on ext4, 2 busy cores: 0.46 s; write() in order and fsync 1.0 to 3.8 s; xxh3-128 of it 0.04 s.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import queue
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

BLOCK_BYTES = 4096
"""Memory, file offsets and lengths of O_DIRECT are multiples of it on every disk we know; where that is wrong, it is not used."""
CHUNK_BYTES = 8 << 20
_NUM_WRITERS = 4
_STRIDE_BYTES = 1 << 20
"""Copied and digested at a time: it is still in the cache for the digest."""

Bytes = npt.NDArray[np.uint8]


def write_stream(path: Path, parts: Iterable[Bytes], size: int) -> str:
    """Write `parts`, of `size` bytes in all, to the new file `path` and wait until they are on disk; the xxh3-128 of them.

    `parts` is walked once, in order, and each is kept until it is written. Raises OSError. Memory: a few chunks."""
    descriptor = _open_new(path)
    try:
        num_writers = min(_NUM_WRITERS, -(-size // CHUNK_BYTES))
        writers = _Writers(descriptor, num_writers)
        digest = xxhash.xxh3_128()
        try:
            offset = 0
            for chunk in _chunks(parts, size, writers, digest):
                writers.put(offset, chunk)
                offset += CHUNK_BYTES
        finally:
            writers.finish()
        assert offset >= size, f"the parts hold less than {size} bytes"
        os.ftruncate(descriptor, size)  # the last block was padded
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def _open_new(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        path.unlink(missing_ok=True)  # Linux creates the file before it finds that it cannot do O_DIRECT
        return os.open(path, flags, 0o666)


def _chunks(parts: Iterable[Bytes], size: int, writers: _Writers, digest: Any) -> Iterator[Bytes]:
    """The stream in runs of CHUNK_BYTES, the last padded to whole blocks; all but the padding has gone through `digest`."""
    runs = _Runs(parts)
    for start in range(0, size, CHUNK_BYTES):
        length = min(CHUNK_BYTES, size - start)
        run = runs.take_aligned(length)
        if run is not None:
            digest.update(run)
            yield run
            continue
        buffer = writers.buffer()
        filled = 0
        while filled < length:
            piece = runs.take(min(_STRIDE_BYTES, length - filled))
            target = buffer[filled : filled + len(piece)]
            np.copyto(target, piece)
            digest.update(target)
            filled += len(piece)
        yield buffer[: -(-length // BLOCK_BYTES) * BLOCK_BYTES]


class _Runs:
    """Walks over parts; neighbours in memory count as one."""

    def __init__(self, parts: Iterable[Bytes]) -> None:
        self._parts = iter(parts)
        self._next: Bytes | None = next(self._parts, None)
        self._run = np.empty(0, np.uint8)

    def _advance(self) -> None:
        while not len(self._run):
            assert self._next is not None, "the parts ended before their size"
            self._run, self._next = self._next, next(self._parts, None)

    def take(self, most: int) -> Bytes:
        """The next bytes: at least one, at most `most`."""
        self._advance()
        taken, self._run = self._run[:most], self._run[most:]
        return taken

    def take_aligned(self, length: int) -> Bytes | None:
        """The next `length` bytes where they are one run that O_DIRECT can write; None otherwise, and then nothing is taken."""
        self._advance()
        address = _address(self._run)
        if length % BLOCK_BYTES or address % BLOCK_BYTES:
            return None
        owners, total = [self._run], len(self._run)
        while total < length and self._next is not None and _address(self._next) == address + total:
            owners.append(self._next)
            total += len(self._next)
            self._next = next(self._parts, None)
        if len(owners) > 1:
            self._run = _Memory(address, total, owners).array()
        return self.take(length) if total >= length else None


class _Memory:
    """An array over memory that several arrays own, and keeps them alive."""

    def __init__(self, address: int, length: int, owners: list[Bytes]) -> None:
        self._owners = owners
        self.__array_interface__ = {"shape": (length,), "typestr": "|u1", "data": (address, False), "version": 3}

    def array(self) -> Bytes:
        return np.asarray(self)


def _address(array: Bytes) -> int:
    address: int = array.ctypes.data
    return address


class _Writers:
    """Threads that write chunks at their offsets. The first error stops them all and is raised by `put` or `finish`."""

    def __init__(self, descriptor: int, num_threads: int) -> None:
        self._descriptor = descriptor
        self._error: OSError | None = None
        self._free: queue.SimpleQueue[Bytes] = queue.SimpleQueue()
        self._num_buffers, self._most_buffers = 0, num_threads + 2
        self._owned: dict[int, Bytes] = {}
        self._room = threading.Semaphore(num_threads + 2)
        self._work: queue.SimpleQueue[tuple[int, Bytes] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(num_threads)]
        for thread in self._threads:
            thread.start()

    def buffer(self) -> Bytes:
        """Aligned memory for one chunk; waits until there is some. It comes back when its chunk is written."""
        if self._num_buffers < self._most_buffers and self._free.empty():
            self._num_buffers += 1
            buffer = np.frombuffer(mmap.mmap(-1, CHUNK_BYTES), np.uint8)
            self._owned[_address(buffer)] = buffer
            return buffer
        return self._free.get()

    def put(self, offset: int, chunk: Bytes) -> None:
        """Write `chunk` at `offset` soon. Waits while too many are waiting."""
        self._room.acquire()
        if self._error is not None:
            raise self._error
        self._work.put((offset, chunk))

    def finish(self) -> None:
        """Wait for all that was put."""
        for _ in self._threads:
            self._work.put(None)
        for thread in self._threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            offset, chunk = work
            try:
                if self._error is None:
                    _write_all(self._descriptor, offset, chunk)
            except OSError as error:
                self._error = error
            buffer = self._owned.get(_address(chunk))
            if buffer is not None:
                self._free.put(buffer)
            self._room.release()


def _write_all(descriptor: int, offset: int, chunk: Bytes) -> None:
    data, through_cache = chunk.data, False
    while data:  # one call writes at most 2 GiB, and less on a nearly full disk
        try:
            written = os.pwrite(descriptor, data, offset)
        except OSError as error:
            if error.errno != errno.EINVAL or through_cache:
                raise
            # This disk wants another alignment, or what is left is no whole block: without O_DIRECT, then, which another thread
            # may have found out just now.
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~getattr(os, "O_DIRECT", 0))
            through_cache = True
            continue
        data, offset = data[written:], offset + written
