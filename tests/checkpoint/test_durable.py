"""What is written is what was given, in whatever parts; a full disk is an OSError."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import xxhash

from megatronish import writeback
from megatronish.checkpoint import durable
from megatronish.checkpoint.durable import Bytes, write_stream

CHUNK = 16384


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "CHUNK_BYTES", CHUNK)


def random_bytes(size: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, size).astype(np.uint8)


WHOLE = random_bytes(10 * CHUNK + 77)
CASES = {
    "one part": [WHOLE],
    "whole chunks": [WHOLE[: 3 * CHUNK]],
    "many sizes": [random_bytes(n, n) for n in (100, 3 * CHUNK, 1, 5 * CHUNK - 1, CHUNK)],
    "empty parts": [WHOLE[:0], WHOLE[:10], WHOLE[10:10], WHOLE[10 : 2 * CHUNK], WHOLE[:0]],
    "one byte": [WHOLE[:1]],
    "a thousand": [random_bytes(99, n) for n in range(1000)],
}


@pytest.mark.parametrize("has_advice", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_the_file_holds_the_parts_and_the_digest_is_of_them(
    name: str, has_advice: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges: list[tuple[int, int]] = []
    if has_advice:
        call = writeback._sync_file_range()

        def recorded(descriptor: int, start: int, length: int, flags: int) -> None:
            ranges.append((start, start + length))
            assert call(descriptor, start, length, flags) == 0

        monkeypatch.setattr(writeback, "_sync_file_range", lambda: recorded)
    else:
        monkeypatch.setattr(writeback, "_sync_file_range", lambda: lambda *arguments: -1)
    data = b"".join(part.tobytes() for part in CASES[name])
    assert write_stream(tmp_path / "file", iter(CASES[name])) == (len(data), xxhash.xxh3_128_hexdigest(data))
    assert (tmp_path / "file").read_bytes() == data
    # The disk is begun with early, and never twice with the same bytes.
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges)][: len(ranges)]
    assert not has_advice or len(data) - (ranges[-1][1] if ranges else 0) < CHUNK
    with pytest.raises(FileExistsError):
        write_stream(tmp_path / "file", CASES[name])


@pytest.mark.parametrize("after", [0, 1, 7])
def test_a_disk_that_fills_up_is_the_error_of_the_call(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, whole = [], os.write

    def write(descriptor: int, data: memoryview) -> int:
        calls.append(len(data))
        if len(calls) > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(descriptor, data[:1000])  # short, as on a nearly full disk

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OSError, match="No space left"):
        write_stream(tmp_path / "file", [WHOLE])
