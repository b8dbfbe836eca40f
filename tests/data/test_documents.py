"""Reading text: cuts that lose nothing, and bad input named by file, line and column."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatronish.data.documents import cut_text, find_files, plan_segments, read_segment
from megatronish.errors import UserError


def texts(path: Path, segment_bytes: int = 1 << 20) -> list[str]:
    return [text for segment in plan_segments([path], segment_bytes=segment_bytes) for text in read_segment(segment)]


# Few distinct characters, so that cuts meet line ends, spaces and characters of 2 to 4 bytes often.
ALPHABET = st.sampled_from("ab \n\té東😀")


@settings(max_examples=100, deadline=None)
@given(text=st.text(ALPHABET, max_size=200), segment_bytes=st.integers(4, 50))
def test_segments_of_a_text_join_to_the_text(tmp_path_factory, text, segment_bytes):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(text.encode())
    segments = list(plan_segments([path], segment_bytes=segment_bytes))
    assert "".join(texts(path, segment_bytes)) == text
    assert [segment.ends_document for segment in segments] == [False] * (len(segments) - 1) + [True]
    assert all(segment.num_bytes <= 2 * segment_bytes + 2 for segment in segments)


@settings(max_examples=100, deadline=None)
@given(documents=st.lists(st.text(ALPHABET, max_size=30), max_size=12), segment_bytes=st.integers(1, 80))
def test_segments_of_jsonl_give_every_line_once_in_order(tmp_path_factory, documents, segment_bytes):
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in documents), encoding="utf-8")
    assert texts(path, segment_bytes) == documents


@given(text=st.text(ALPHABET, max_size=200), size=st.integers(1, 20))
def test_cut_pieces_join_to_the_text_and_are_short(text, size):
    pieces = list(cut_text(text, size=size))
    assert "".join(pieces) == text
    assert all(len(piece) <= 2 * size for piece in pieces)


def test_a_byte_order_mark_crlf_and_blank_lines_are_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n  \n{"text": "two\\r\\n", "id": 3}')
    assert texts(tmp_path / "a.jsonl") == ["one", "two\r\n"]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert texts(tmp_path / "a.txt") == ["one\r\ntwo"]


BAD_LINES = {
    "not json": (b'{"text": oops}', r"a\.jsonl:3:10: not JSON: Expecting value"),
    "half a line": (b'{"text": "abc', r"a\.jsonl:3:10: not JSON: Unterminated string"),
    "missing": (b'{"content": "x", "id": 1}', r'a\.jsonl:3:1: no key "text" \(keys: content, id\)'),
    "null": (b'{"id": 1, "text": null}', r'a\.jsonl:3:11: "text" is null; a string is needed'),
    "number": (b'{"text": 5}', r'a\.jsonl:3:2: "text" is a number'),
    "list": (b'["text"]', r"a\.jsonl:3:1: JSON that is a list"),
    "null line": (b"null", r"a\.jsonl:3:1: JSON that is null"),
    "utf-8": ('{"text": "é'.encode() + b'\xff"}', r"a\.jsonl:3:12: invalid UTF-8, byte 0xff"),
    "surrogate": (b'{"text": "\\ud800"}', r'a\.jsonl:3:1: "text" holds half a surrogate pair, U\+D800'),
    "deep": (b"[" * 100_000, r"a\.jsonl:3:1: not usable JSON"),
}


@pytest.mark.parametrize("name", BAD_LINES)
@pytest.mark.parametrize("segment_bytes", [1, 1 << 20])  # the line in a segment of its own, and among others
def test_a_bad_line_is_named_by_file_line_and_column(tmp_path, name, segment_bytes):
    line, message = BAD_LINES[name]
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n')
    with pytest.raises(UserError, match=message) as caught:
        texts(tmp_path / "a.jsonl", segment_bytes)
    assert "\n" not in str(caught.value)


def test_invalid_utf_8_in_a_text_is_named_by_line_and_column_in_any_segment(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\n" * 50 + b"ab\xe9\n" + b"abc\n" * 50)
    for segment_bytes in (20, 1 << 20):
        with pytest.raises(UserError, match=r"a\.txt:51:3: invalid UTF-8, byte 0xe9"):
            texts(tmp_path / "a.txt", segment_bytes)


def test_utf_16_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("text".encode("utf-16"))
    with pytest.raises(UserError, match=r"a\.txt: is UTF-16; convert it"):
        texts(tmp_path / "a.txt")


def test_directories_give_matching_files_in_order_of_relative_path(tmp_path):
    for name in ("b/z.txt", "b/a.txt", "a.txt", "b.txt", "c.md", "B.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = [path.relative_to(tmp_path).as_posix() for path in find_files([tmp_path])]
    assert found == ["B.txt", "a.txt", "b.txt", "b/a.txt", "b/z.txt"]
    assert find_files([tmp_path], globs=["*.md", "c.*"]) == [tmp_path / "c.md"]
    assert find_files([tmp_path / "b", tmp_path / "c.md"])[-1] == tmp_path / "c.md"


def test_missing_inputs_and_directories_without_a_match_are_refused(tmp_path):
    (tmp_path / "a.py").write_text("x")
    (tmp_path / "b.zip").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"no file matches \*\.txt, .*\*\.jsonl\.zst; choose others with --glob \(it holds \.py, \.zip"
    ):
        find_files([tmp_path])
    with pytest.raises(UserError, match=r"nowhere: no such file or directory"):
        find_files([tmp_path / "nowhere"])
    with pytest.raises(UserError, match=r"b\.zip: archives of this kind are not read, only \.gz and \.zst"):
        find_files([tmp_path / "b.zip"])
