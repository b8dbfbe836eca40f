"""What is written is what was given, whatever the memory it lies in and the disk it goes to; a full disk is an OSError."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import xxhash

from megatronish.checkpoint import direct
from megatronish.checkpoint.direct import BLOCK_BYTES, Bytes, write_stream

CHUNK = 4 * BLOCK_BYTES


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(direct, "_STRIDE_BYTES", BLOCK_BYTES)


def aligned(size: int, seed: int = 0) -> Bytes:
    """Random bytes that begin on a block."""
    memory = np.empty(size + BLOCK_BYTES, np.uint8)
    start = -memory.ctypes.data % BLOCK_BYTES
    memory[start : start + size] = np.random.default_rng(seed).integers(0, 256, size)
    return memory[start : start + size]


def cut(data: Bytes, *at: int) -> list[Bytes]:
    """Neighbours in memory."""
    return [data[a:b] for a, b in zip((0, *at), (*at, len(data)), strict=True)]


WHOLE = aligned(10 * CHUNK + 77)
CASES = {
    "one aligned run": [WHOLE],
    "whole chunks only": [WHOLE[: 3 * CHUNK]],
    "neighbours": cut(WHOLE, 5, CHUNK, CHUNK + 1, 3 * CHUNK - 1, 9 * CHUNK),
    "odd addresses": [WHOLE[3:]],
    "scattered": [aligned(n, n)[k:] for n, k in [(100, 0), (3 * CHUNK, 1), (1, 0), (5 * CHUNK, 0), (CHUNK - 100, 7)]],
    "a header before an image": [aligned(1000, 1), WHOLE[1000:]],
    "empty parts": [WHOLE[:0], WHOLE[:10], WHOLE[10:10], WHOLE[10 : 2 * CHUNK], WHOLE[:0]],
    "one byte": [WHOLE[:1]],
    "a thousand": [aligned(99, n) for n in range(1000)],
}


@pytest.mark.parametrize("is_direct", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_the_file_holds_the_parts_and_the_digest_is_of_them(
    name: str, is_direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_direct:
        monkeypatch.setattr(os, "O_DIRECT", 0)
    data = b"".join(part.tobytes() for part in CASES[name])
    digest = write_stream(tmp_path / "file", iter(CASES[name]), len(data))
    assert (tmp_path / "file").read_bytes() == data
    assert digest == xxhash.xxh3_128_hexdigest(data)
    with pytest.raises(FileExistsError):
        write_stream(tmp_path / "file", CASES[name], len(data))


def test_an_aligned_run_is_written_from_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []
    copy = np.copyto
    monkeypatch.setattr(np, "copyto", lambda target, source: (copied.append(len(source)), copy(target, source)))
    write_stream(tmp_path / "file", cut(WHOLE, 5000, 6 * CHUNK), len(WHOLE))
    assert sum(copied) == 77  # the end, which is no whole block
    assert (tmp_path / "file").read_bytes() == WHOLE.tobytes()


@pytest.mark.parametrize("after", [0, 1, 7])
def test_a_disk_that_fills_up_is_the_error_of_the_call(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, whole = [], os.pwrite

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match="No space left"):
        write_stream(tmp_path / "file", [WHOLE[3:]], len(WHOLE) - 3)


def test_short_writes_and_another_alignment_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        return whole(descriptor, data[:1000] if offset % 3 else data, offset)  # leaves a rest that O_DIRECT refuses

    monkeypatch.setattr(os, "pwrite", pwrite)
    write_stream(tmp_path / "file", [WHOLE], len(WHOLE))
    assert (tmp_path / "file").read_bytes() == WHOLE.tobytes()
