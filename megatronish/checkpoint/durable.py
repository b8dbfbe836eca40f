"""Write a stream of host memory to a new file, durably, as fast as the disk takes it, and digest it on the way.

The kernel is told to begin with each chunk at once (sync_file_range): the disk works from the first millisecond and fsync finds
little left. Measured for 1 GiB on ext4, 2 busy cores, medians of five: 0.38 s; without it, when the kernel begins where it likes,
1.0 to 3.3 s; O_DIRECT from four threads 0.53 s, and 0.65 s from memory that is not aligned. xxh3-128 takes 0.04 s.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from megatronish.writeback import begin_writing

CHUNK_BYTES = 8 << 20

Bytes = npt.NDArray[np.uint8]


def write_stream(path: Path, parts: Iterable[Bytes]) -> tuple[int, str]:
    """Write `parts`, one after the other, to the new file `path` and wait until they are on disk: (bytes, xxh3-128).

    `parts` is walked once, in order. Raises OSError. Releases the interpreter while it writes and digests."""
    digest, size = xxhash.xxh3_128(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        begun = 0
        for part in parts:
            for start in range(0, len(part), CHUNK_BYTES):
                chunk = part[start : start + CHUNK_BYTES].data
                digest.update(chunk)
                write_all(descriptor, chunk)
                size += len(chunk)
                if size - begun >= CHUNK_BYTES:  # pieces may be small
                    begin_writing(descriptor, begun, size - begun)
                    begun = size
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return size, digest.hexdigest()


def write_all(descriptor: int, data: memoryview) -> None:
    """Append all of `data` to an open file."""
    while data:  # one call writes at most 2 GiB, and less on a nearly full disk
        data = data[os.write(descriptor, data) :]
