"""Text on disk -> documents: which files, cut into which segments, read how.

A text file is one document, a jsonl file one document a line (key `text`). Files are planned as segments of a few MiB, so that
memory stays bounded and workers share large files. The plan depends on the files alone, never on the number of workers.

A text file is kept as it is, byte for byte, but for a byte order mark at its start. A jsonl line may end in CRLF; blank lines are
skipped. Anything else that is wrong is a UserError with file:line:column.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from megatronish.errors import UserError

DEFAULT_GLOBS = ("*.txt", "*.jsonl")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".zip")
_BOM = b"\xef\xbb\xbf"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
SEGMENT_BYTES = 4 << 20
_WINDOW = 1 << 16
# A cut here changes no token: the pre-tokenizers of GPT-2 and its heirs never join a line end between two visible characters to
# what follows it.
_CUT = re.compile(rb"[!-~]\n(?=[!-~])")
_TEXT_CUT = re.compile(r"[!-~]\n(?=[!-~])")


@dataclass(frozen=True)
class Segment:
    """Bytes [start, stop) of a file: whole lines of jsonl, or a piece of one text."""

    path: Path
    kind: Literal["text", "jsonl"]
    start: int
    stop: int
    ends_document: bool

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


def find_files(inputs: Sequence[Path], *, globs: Sequence[str] = DEFAULT_GLOBS) -> list[Path]:
    """Files as given, directories replaced by their files that match one of `globs`, at any depth, in order of relative path.

    Raises UserError for what is missing, a directory without a match, and compressed files."""
    found: list[Path] = []
    for path in inputs:
        if path.is_dir():
            matches = {file for glob in globs for file in path.rglob(glob) if file.is_file()}
            if not matches:
                raise UserError(f"{path}: no file matches {', '.join(globs)}; choose others with --glob{_suffixes(path)}")
            found += sorted(matches, key=lambda file: file.relative_to(path).as_posix().encode())
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{path}: no such file or directory")
    for path in found:
        if path.suffix in _COMPRESSED:
            raise UserError(f"{path}: compressed input is not read; unpack it first")
    return found


def plan_segments(paths: Sequence[Path], *, segment_bytes: int = SEGMENT_BYTES) -> Iterator[Segment]:
    """Cut files into segments of about `segment_bytes`, in order."""
    for path in paths:
        if path.suffix in JSONL_SUFFIXES:
            yield from _plan_jsonl(path, segment_bytes)
        else:
            yield from _plan_text(path, segment_bytes)


def read_segment(segment: Segment) -> Iterator[str]:
    """The documents of a jsonl segment, or the one piece of a text segment. Raises UserError."""
    try:
        with open(segment.path, "rb") as file:
            file.seek(segment.start)
            head = file.read(3) if segment.start == 0 else b""
            if head.startswith(_UTF_16):
                raise UserError(f"{segment.path}: is UTF-16; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)")
            position = 3 if head == _BOM else segment.start
            file.seek(position)
            if segment.kind == "jsonl":
                yield from _read_jsonl(file, segment)
            else:
                yield _decode(file.read(segment.stop - position), segment, offset=position)
    except OSError as error:
        raise UserError(f"{segment.path}: cannot be read: {error.strerror}") from None


def cut_text(text: str, *, size: int) -> Iterator[str]:
    """Pieces of about `size` characters (at most twice that), cut where it changes no token if there is such a place."""
    begin = 0
    while len(text) - begin > 2 * size:
        match = _TEXT_CUT.search(text, begin + size, begin + 2 * size)
        end = match.end() if match else begin + 2 * size
        yield text[begin:end]
        begin = end
    yield text[begin:]


def _plan_text(path: Path, segment_bytes: int) -> Iterator[Segment]:
    size, begin = os.path.getsize(path), 0
    with open(path, "rb") as file:
        while size - begin > 2 * segment_bytes:
            end = _find_cut(file, begin + segment_bytes, begin + 2 * segment_bytes)
            yield Segment(path, "text", begin, end, ends_document=False)
            begin = end
    yield Segment(path, "text", begin, size, ends_document=True)


def _find_cut(file: BinaryIO, begin: int, limit: int) -> int:
    """The first place in [begin, limit) where a cut changes no token, else the last character boundary before `limit`."""
    for position in range(begin, limit, _WINDOW):
        file.seek(position)
        window = file.read(min(_WINDOW, limit - position) + 2)  # a match that begins on the window's last byte takes two more
        if match := _CUT.search(window):
            return position + match.end()
    file.seek(limit - 4)
    tail = file.read(5)
    back = next((k for k in range(4) if tail[4 - k] & 0xC0 != 0x80), 0)
    return limit - back


def _plan_jsonl(path: Path, segment_bytes: int) -> Iterator[Segment]:
    size, begin = os.path.getsize(path), 0
    with open(path, "rb") as file:
        while begin < size:
            file.seek(min(begin + segment_bytes, size))
            while (window := file.read(_WINDOW)) and b"\n" not in window:
                pass
            end = file.tell() - len(window) + window.index(b"\n") + 1 if window else size
            yield Segment(path, "jsonl", begin, end, ends_document=True)
            begin = end


def _read_jsonl(file: BinaryIO, segment: Segment) -> Iterator[str]:
    position = file.tell()
    while position < segment.stop:
        data = file.readline()
        line = _decode(data.rstrip(b"\r\n"), segment, offset=position)
        if line.strip():
            yield _text_of(line, segment, position)
        position += len(data)


def _text_of(line: str, segment: Segment, offset: int) -> str:
    try:
        value: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise _error(segment, offset, error.colno, f"not JSON: {error.msg}; one object a line is needed") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise _error(segment, offset, 1, f"not usable JSON: {error}") from None
    if not isinstance(value, dict):
        raise _error(segment, offset, 1, f'JSON that is {_json_type(value)}; an object with the key "text" is needed')
    if "text" not in value:
        keys = ", ".join(list(value)[:8]) or "none"
        raise _error(segment, offset, 1, f'no key "text" (keys: {keys}); rename the one that holds the text')
    text = value["text"]
    if not isinstance(text, str):
        column = line.find('"text"') + 1
        raise _error(segment, offset, column, f'"text" is {_json_type(text)}; a string is needed')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _error(segment, offset, 1, f'"text" holds half a surrogate pair, U+{ord(text[error.start]):04X}') from None
    return text


def _decode(data: bytes, segment: Segment, *, offset: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line_start = before.rfind(b"\n") + 1
        column = len(before[line_start:].decode()) + 1
        what = f"invalid UTF-8, byte 0x{data[error.start]:02x} ({error.reason}); convert the file to UTF-8 or leave it out"
        raise _error(segment, offset + line_start, column, what) from None


def _error(segment: Segment, line_offset: int, column: int, what: str) -> UserError:
    """Counts the lines before `line_offset` now: only a failure pays for line numbers."""
    lines = 1
    with open(segment.path, "rb") as file:
        left = line_offset
        while left > 0 and (block := file.read(min(1 << 20, left))):
            lines += block.count(b"\n")
            left -= len(block)
    return UserError(f"{segment.path}:{lines}:{column}: {what}")


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _suffixes(path: Path) -> str:
    """What there is instead, for the message."""
    kinds = sorted({file.suffix for file in path.rglob("*") if file.is_file() and file.suffix})[:8]
    return f" (it holds {', '.join(kinds)})" if kinds else ""
