"""Text on disk -> documents: which files, cut into which segments, read how.

A text file is one document, a jsonl file one document a line (key `text`); both may be compressed (.gz, .zst). Files are planned as
segments of a few MiB, so that memory stays bounded and workers share large files. The plan depends on the files alone, never on the
number of workers. An archive is unpacked while it is planned, and its segments carry their bytes.

A text file is kept as it is, byte for byte, but for a byte order mark at its start. A jsonl line may end in CRLF; blank lines are
nothing. Anything else that is wrong is a UserError with file:line:column; a jsonl line that is wrong may be skipped and counted.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

from megatronish.data.archives import is_compressed, read_chunks, text_suffix
from megatronish.errors import UserError

DEFAULT_GLOBS = tuple(f"*{kind}{packing}" for kind in (".txt", ".jsonl") for packing in ("", ".gz", ".zst"))
JSONL_SUFFIXES = (".jsonl", ".ndjson")
_OTHER_ARCHIVES = (".bz2", ".xz", ".zip", ".7z", ".tar", ".tgz")
_BOM = b"\xef\xbb\xbf"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
SEGMENT_BYTES = 4 << 20
MAX_LINE_BYTES = 64 << 20
_WINDOW = 1 << 16
# A cut here changes no token: the pre-tokenizers of GPT-2 and its heirs never join a line end between two visible characters to
# what follows it, nor a word to the space before the next one. The second is for texts without such a line end.
_CUTS = tuple(re.compile(pattern) for pattern in (rb"[!-~]\n(?=[!-~])", rb"[A-Za-z](?= [A-Za-z])"))
_TEXT_CUTS = tuple(re.compile(pattern.pattern.decode()) for pattern in _CUTS)

Reason = Literal["bad JSON", "not an object", "no text", "text is null", "text is no string", "invalid UTF-8", "too long", "empty"]
"""Why a document is left out."""


@dataclass(frozen=True)
class Segment:
    """Bytes [start, stop) of a file's text: whole lines of jsonl, or a piece of one text."""

    path: Path
    kind: Literal["text", "jsonl"]
    start: int
    stop: int
    ends_document: bool
    data: bytes | None = field(default=None, repr=False)
    """Of an archive: the bytes themselves. Of a line beyond the limit, its beginning only."""
    file_bytes: int = 0
    """Bytes of the file, packed as it is, that it took to get here from the segment before."""

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class BadLine:
    """A jsonl line that gives no document."""

    reason: Reason
    path: Path
    offset: int
    """Of the line, in bytes of text."""
    column: int
    what: str

    def error(self) -> UserError:
        """The error that names it. Counts the lines before it now: only a failure pays for line numbers."""
        return _error_at(self.path, self.offset, self.column, self.what)


OnBadLine = Callable[[BadLine], None]


def stop_at_bad_line(line: BadLine) -> None:
    """Raises it as a UserError."""
    raise line.error() from None


def find_files(inputs: Sequence[Path], *, globs: Sequence[str] = DEFAULT_GLOBS) -> list[Path]:
    """Files as given, directories replaced by their files that match one of `globs`, at any depth, in order of relative path.

    Raises UserError for what is missing, a directory without a match, and archives of other kinds."""
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
        if path.suffix in _OTHER_ARCHIVES:
            raise UserError(f"{path}: archives of this kind are not read, only .gz and .zst; unpack it first")
    return found


def plan_segments(
    paths: Sequence[Path], *, segment_bytes: int = SEGMENT_BYTES, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[Segment]:
    """Cut files into segments of about `segment_bytes`, in order. Of a packed line beyond `max_line_bytes` only a beginning that is
    too long as well goes into its segment."""
    for path in paths:
        is_jsonl = text_suffix(path) in JSONL_SUFFIXES
        if is_compressed(path):
            pieces = _unpack_lines(path, segment_bytes, max_line_bytes) if is_jsonl else _unpack_text(path, segment_bytes)
            yield from _count_file_bytes(pieces, path)
        elif is_jsonl:
            yield from _plan_jsonl(path, segment_bytes)
        else:
            yield from _plan_text(path, segment_bytes)


def read_segment(
    segment: Segment, *, on_bad_line: OnBadLine = stop_at_bad_line, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[str]:
    """The documents of a jsonl segment, or the one piece of a text segment. Raises UserError."""
    try:
        with io.BytesIO(segment.data) if segment.data is not None else open(segment.path, "rb") as file:
            base = 0 if segment.data is None else segment.start  # where `file` begins in the text
            file.seek(segment.start - base)
            head = file.read(3) if segment.start == 0 else b""
            if head.startswith(_UTF_16):
                raise UserError(f"{segment.path}: is UTF-16; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)")
            position = 3 if head == _BOM else segment.start
            file.seek(position - base)
            if segment.kind == "jsonl":
                yield from _read_jsonl(file, segment, position, on_bad_line, max_line_bytes)
            else:
                yield _decode_text(file.read(segment.stop - position), segment, position)
    except OSError as error:
        raise UserError(f"{segment.path}: cannot be read: {error.strerror}") from None


def cut_text(text: str, *, size: int) -> Iterator[str]:
    """Pieces of about `size` characters (at most twice that), cut where it changes no token if there is such a place."""
    begin = 0
    while len(text) - begin > 2 * size:
        matches = (cut.search(text, begin + size, begin + 2 * size) for cut in _TEXT_CUTS)
        end = next((match.end() for match in matches if match), begin + 2 * size)
        yield text[begin:end]
        begin = end
    yield text[begin:]


def _plan_text(path: Path, segment_bytes: int) -> Iterator[Segment]:
    size, begin = os.path.getsize(path), 0
    with open(path, "rb") as file:
        while size - begin > 2 * segment_bytes:
            end = _find_cut(file, begin + segment_bytes, begin + 2 * segment_bytes)
            yield Segment(path, "text", begin, end, ends_document=False, file_bytes=end - begin)
            begin = end
    yield Segment(path, "text", begin, size, ends_document=True, file_bytes=size - begin)


def _find_cut(file: BinaryIO, begin: int, limit: int) -> int:
    """The first place in [begin, limit) where a cut changes no token, else the last character boundary before `limit`."""
    for cut in _CUTS:
        for position in range(begin, limit, _WINDOW):
            file.seek(position)
            window = file.read(min(_WINDOW, limit - position) + 2)  # a match that begins on the window's last byte takes two more
            if match := cut.search(window):
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
            yield Segment(path, "jsonl", begin, end, ends_document=True, file_bytes=end - begin)
            begin = end


def _count_file_bytes(pieces: Iterator[tuple[Segment, int]], path: Path) -> Iterator[Segment]:
    """Segments with the bytes of the archive that each took; the last one takes the rest."""
    before, last, size = 0, None, os.path.getsize(path)
    for segment, position in pieces:
        if last is not None:
            yield last
        last = replace(segment, file_bytes=position - before)
        before = position
    if last is not None:
        yield replace(last, file_bytes=last.file_bytes + size - before)


def _unpack_text(path: Path, segment_bytes: int) -> Iterator[tuple[Segment, int]]:
    """As `_plan_text` cuts the unpacked file."""
    held, begin, position = b"", 0, 0
    for chunk, position in read_chunks(path):
        held += chunk
        while len(held) > 2 * segment_bytes + 1:
            cut = _find_cut(io.BytesIO(held), segment_bytes, 2 * segment_bytes)
            yield Segment(path, "text", begin, begin + cut, ends_document=False, data=held[:cut]), position
            held, begin = held[cut:], begin + cut
    if len(held) > 2 * segment_bytes:
        cut = _find_cut(io.BytesIO(held), segment_bytes, 2 * segment_bytes)
        yield Segment(path, "text", begin, begin + cut, ends_document=False, data=held[:cut]), position
        held, begin = held[cut:], begin + cut
    yield Segment(path, "text", begin, begin + len(held), ends_document=True, data=held), position


def _unpack_lines(path: Path, segment_bytes: int, max_line_bytes: int) -> Iterator[tuple[Segment, int]]:
    """Whole lines of about `segment_bytes`; a line longer than the limit stands alone, cut short."""
    held, begin, position = bytearray(), 0, 0
    dropped = 0  # bytes left out of the line that `held` begins
    for chunk, position in read_chunks(path):
        start = 0
        if dropped:
            end = chunk.find(b"\n") + 1
            dropped += end or len(chunk)
            if not end:
                continue
            stop = begin + len(held) + dropped
            yield Segment(path, "jsonl", begin, stop, ends_document=True, data=bytes(held)), position
            held, begin, dropped, start = bytearray(), stop, 0, end
        held += chunk[start:]
        if len(held) < segment_bytes:
            continue
        end = held.rfind(b"\n") + 1
        if end:
            yield Segment(path, "jsonl", begin, begin + end, ends_document=True, data=bytes(held[:end])), position
            del held[:end]
            begin += end
        if len(held) > max_line_bytes + 1:
            dropped = len(held) - (max_line_bytes + 1)
            del held[max_line_bytes + 1 :]
    if held:
        stop = begin + len(held) + dropped
        yield Segment(path, "jsonl", begin, stop, ends_document=True, data=bytes(held)), position


def _read_jsonl(file: BinaryIO, segment: Segment, position: int, on_bad_line: OnBadLine, max_line_bytes: int) -> Iterator[str]:
    while position < segment.stop:
        data = file.readline(max_line_bytes + 1)
        begin = position
        position += len(data)
        if len(data) > max_line_bytes and not data.endswith(b"\n"):
            if segment.data is not None:
                position = segment.stop
            while segment.data is None and (rest := file.readline(_WINDOW)):
                position += len(rest)
                if rest.endswith(b"\n"):
                    break
            what = f"a line of {position - begin} bytes, more than {max_line_bytes}; raise --max-line-mib or leave it out"
            on_bad_line(BadLine("too long", segment.path, begin, 1, what))
            continue
        found = _document_of(data, segment.path, begin)
        if isinstance(found, BadLine):
            on_bad_line(found)
        elif found is not None:
            yield found


def _document_of(data: bytes, path: Path, offset: int) -> str | BadLine | None:
    """The text of one line; None for a blank one."""
    try:
        line = data.rstrip(b"\r\n").decode()
    except UnicodeDecodeError as error:
        column = len(data[: error.start].decode()) + 1
        return BadLine("invalid UTF-8", path, offset, column, _invalid(data, error))
    if not line.strip():
        return None
    try:
        value: Any = json.loads(line)
    except json.JSONDecodeError as error:
        return BadLine("bad JSON", path, offset, error.colno, f"not JSON: {error.msg}; one object a line is needed")
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        return BadLine("bad JSON", path, offset, 1, f"not usable JSON: {error}")
    if not isinstance(value, dict):
        what = f'JSON that is {_json_type(value)}; an object with the key "text" is needed'
        return BadLine("not an object", path, offset, 1, what)
    if "text" not in value:
        keys = ", ".join(list(value)[:8]) or "none"
        return BadLine("no text", path, offset, 1, f'no key "text" (keys: {keys}); rename the one that holds the text')
    text = value["text"]
    if not isinstance(text, str):
        reason: Reason = "text is null" if text is None else "text is no string"
        return BadLine(reason, path, offset, line.find('"text"') + 1, f'"text" is {_json_type(text)}; a string is needed')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return BadLine("invalid UTF-8", path, offset, 1, f'"text" holds half a surrogate pair, U+{ord(text[error.start]):04X}')
    return text


def _decode_text(data: bytes, segment: Segment, offset: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line_start = before.rfind(b"\n") + 1
        column = len(before[line_start:].decode()) + 1
        raise _error_at(segment.path, offset + line_start, column, _invalid(data, error)) from None


def _invalid(data: bytes, error: UnicodeDecodeError) -> str:
    return f"invalid UTF-8, byte 0x{data[error.start]:02x} ({error.reason}); convert the file to UTF-8 or leave it out"


def _error_at(path: Path, line_offset: int, column: int, what: str) -> UserError:
    lines, left = 1, line_offset
    for chunk, _ in read_chunks(path):
        lines += chunk[:left].count(b"\n")
        left -= len(chunk)
        if left <= 0:
            break
    return UserError(f"{path}:{lines}:{column}: {what}")


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _suffixes(path: Path) -> str:
    """What there is instead, for the message."""
    kinds = sorted({file.suffix for file in path.rglob("*") if file.is_file() and file.suffix})[:8]
    return f" (it holds {', '.join(kinds)})" if kinds else ""
