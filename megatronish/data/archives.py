"""Text files as streams of bytes: plain, .gz and .zst, in bounded memory. A damaged archive is a UserError with its place.

Archives of several members or frames, one after the other, are read as one.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatronish.errors import UserError

SUFFIXES = (".gz", ".zst")
_PLAIN_CHUNK = 1 << 20
# A chunk may unpack to a thousand times its size (gzip), or, for zstd, to 128 KiB for every four bytes of it.
_CHUNKS = {".gz": 1 << 12, ".zst": 1 << 9}


def is_compressed(path: Path) -> bool:
    """Whether the file is read through a decompressor: by its last suffix."""
    return path.suffix in SUFFIXES


def text_suffix(path: Path) -> str:
    """The suffix that says what the text is: .jsonl of a.jsonl.zst."""
    return path.with_suffix("").suffix if is_compressed(path) else path.suffix


def read_chunks(path: Path) -> Iterator[tuple[bytes, int]]:
    """(bytes of text, bytes of the file read so far), in order. Raises UserError."""
    try:
        if is_compressed(path):
            yield from _decompress(path)
            return
        done = 0
        with open(path, "rb") as file:
            while chunk := file.read(_PLAIN_CHUNK):
                done += len(chunk)
                yield chunk, done
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _decompress(path: Path) -> Iterator[tuple[bytes, int]]:
    new, damage, name = _decompressor(path.suffix)
    size, given, done = path.stat().st_size, 0, 0
    current: Any = new()
    begun = False  # whether `current` has seen a byte
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNKS[path.suffix]):
            begin = done
            done += len(chunk)
            while chunk:
                try:
                    text = current.decompress(chunk)
                except damage as error:
                    what = " ".join(str(error).split())
                    raise UserError(
                        f"{path}: damaged {name} archive between bytes {begin} and {done} of {size}, after {given} bytes of text "
                        f"({what}); copy it again, or leave it out"
                    ) from None
                begun = True
                given += len(text)
                chunk = b""
                if current.eof:
                    chunk, current, begun = current.unused_data, new(), False
                if text:
                    yield text, done
    if begun or size == 0:
        raise UserError(
            f"{path}: truncated {name} archive, it ends in the middle at byte {size}, after {given} bytes of text; copy it again, "
            "or leave it out"
        )


def _decompressor(suffix: str) -> tuple[Any, type[Exception], str]:
    """(what makes one of a member, what it raises, its name)."""
    if suffix == ".gz":
        return (lambda: zlib.decompressobj(wbits=31)), zlib.error, "gzip"
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError, "zstd"
