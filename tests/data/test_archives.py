"""Packed text: the documents of the plain file, in bounded memory; damage named with file and place."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatronish.data.archives import read_chunks, text_suffix
from megatronish.data.documents import BadLine, plan_segments, read_segment
from megatronish.data.tokenize import tokenize
from megatronish.data.tokenizer import train_tokenizer
from megatronish.errors import UserError

PACK = {".gz": gzip.compress, ".zst": zstandard.compress}
BOTH = pytest.mark.parametrize("suffix", PACK)


def segments(path: Path, **sizes) -> list[tuple]:
    return [(s.kind, s.start, s.stop, s.ends_document) for s in plan_segments([path], **sizes)]


def texts(path: Path, **sizes) -> list[str]:
    return [text for segment in plan_segments([path], **sizes) for text in read_segment(segment)]


# Few distinct characters, so that cuts meet line ends, spaces and characters of 2 to 4 bytes often.
ALPHABET = st.sampled_from("ab \n\té東😀")


@settings(max_examples=60, deadline=None)
@given(text=st.text(ALPHABET, max_size=200), segment_bytes=st.integers(4, 50))
def test_a_packed_text_is_cut_and_read_like_the_plain_one(tmp_path_factory, text, segment_bytes):
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_bytes(text.encode())
    for suffix, pack in PACK.items():
        (folder / f"a.txt{suffix}").write_bytes(pack(text.encode()))
        packed = folder / f"a.txt{suffix}"
        assert segments(packed, segment_bytes=segment_bytes) == segments(folder / "a.txt", segment_bytes=segment_bytes)
        assert texts(packed, segment_bytes=segment_bytes) == texts(folder / "a.txt", segment_bytes=segment_bytes)


@settings(max_examples=60, deadline=None)
@given(documents=st.lists(st.text(ALPHABET, max_size=30), max_size=12), segment_bytes=st.integers(1, 80))
def test_packed_jsonl_gives_every_line_once_in_order(tmp_path_factory, documents, segment_bytes):
    folder = tmp_path_factory.mktemp("jsonl")
    data = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in documents).encode()
    for suffix, pack in PACK.items():
        (folder / f"a.jsonl{suffix}").write_bytes(pack(data))
        assert texts(folder / f"a.jsonl{suffix}", segment_bytes=segment_bytes) == documents


@BOTH
def test_archives_of_several_members_are_one_text(tmp_path, suffix):
    parts = [b'{"text": "one"}\n', b"", b'{"text": "tw', b'o"}\n']
    (tmp_path / f"a.jsonl{suffix}").write_bytes(b"".join(map(PACK[suffix], parts)))
    assert texts(tmp_path / f"a.jsonl{suffix}") == ["one", "two"]


def test_packed_files_give_the_files_of_the_plain_ones(tmp_path, tokenizer_path, sample_text):
    lines = "".join(json.dumps({"text": sample_text[i : i + 7 * i % 900]}) + "\n" for i in range(400)).encode()
    for name, data in (("a.jsonl", lines), ("b.txt", sample_text.encode() * 30)):
        (tmp_path / name).write_bytes(data)
        for suffix, pack in PACK.items():
            (tmp_path / f"{name}{suffix}").write_bytes(pack(data))
    for packing in ("", ".gz", ".zst"):
        inputs = [tmp_path / f"a.jsonl{packing}", tmp_path / f"b.txt{packing}"]
        report = tokenize(inputs, tokenizer=tokenizer_path, out=tmp_path / f"set{packing}", workers=2 if packing else 1)
        assert report.bytes == sum(path.stat().st_size for path in inputs)
        for suffix in ("bin", "idx"):
            assert (tmp_path / f"set{packing}.{suffix}").read_bytes() == (tmp_path / f"set.{suffix}").read_bytes()
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "t.txt").write_bytes(sample_text.encode())
    (tmp_path / "t.txt.zst").write_bytes(zstandard.compress(sample_text.encode()))
    for path, out in ((tmp_path / "plain" / "t.txt", "x.json"), (tmp_path / "t.txt.zst", "y.json")):
        train_tokenizer([path], vocab_size=290, out=tmp_path / out)
    assert (tmp_path / "x.json").read_bytes() == (tmp_path / "y.json").read_bytes()


def test_progress_counts_the_bytes_of_the_archive(tmp_path, tokenizer_path, sample_text):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((json.dumps({"text": sample_text}) + "\n").encode() * 3))
    calls: list[tuple[int, int]] = []
    tokenize([tmp_path / "a.jsonl.gz"], tokenizer=tokenizer_path, out=tmp_path / "set", on_progress=lambda *at: calls.append(at))
    size = (tmp_path / "a.jsonl.gz").stat().st_size
    assert calls[-1] == (size, size)


@BOTH
def test_a_truncated_archive_is_one_line_with_its_place(tmp_path, suffix, tokenizer_path):
    whole = PACK[suffix](b"".join(b'{"text": "line %d"}\n' % i for i in range(20_000)))
    path = tmp_path / f"a.jsonl{suffix}"
    for size in (0, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(
            UserError, match=rf"a\.jsonl\{suffix}: truncated \w+ archive, .* at byte {size}, after \d+ bytes"
        ) as caught:
            tokenize([path], tokenizer=tokenizer_path, out=tmp_path / "set", workers=1)
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("set*"))


@BOTH
def test_a_damaged_archive_is_one_line_with_its_place(tmp_path, suffix):
    if suffix == ".zst":
        pack = zstandard.ZstdCompressor(write_checksum=True).compress
    whole = bytearray(
        (PACK[suffix] if suffix == ".gz" else pack)(b"".join(b'{"text": "line %d"}\n' % (i * i) for i in range(20_000)))
    )
    whole[len(whole) // 2] ^= 0x55
    path = tmp_path / f"a.jsonl{suffix}"
    for data in (bytes(whole), b"this is no archive"):
        path.write_bytes(data)
        with pytest.raises(UserError, match=rf"a\.jsonl\{suffix}: damaged \w+ archive between bytes \d+ and \d+ of {len(data)}"):
            list(plan_segments([path]))


@pytest.mark.parametrize("suffix", ["", *PACK])
def test_a_line_of_200_mb_is_refused_or_skipped_in_bounded_memory(tmp_path, suffix):
    size = 200_000_000
    lines = [b'{"text": "before"}\n', b'{"text": "' + b"x" * size + b'"}\n', b'{"text": "after"}\n']
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(b"".join(lines) if not suffix else b"".join(PACK[suffix](line) for line in lines))
    bad: list[BadLine] = []
    tracemalloc.start()
    found = [
        text
        for s in plan_segments([path], max_line_bytes=1 << 20)
        for text in read_segment(s, on_bad_line=bad.append, max_line_bytes=1 << 20)
    ]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == ["before", "after"]
    assert [line.reason for line in bad] == ["too long"]
    assert peak < 60 << 20
    with pytest.raises(UserError, match=r"a\.jsonl.*:2:1: a line of .* bytes, more than 67108864; raise --max-line-mib"):
        texts(path)


def test_bad_lines_of_an_archive_are_named_by_line(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "fine"}\n' * 500 + b'{"text": }\n'))
    with pytest.raises(UserError, match=r"a\.jsonl\.gz:501:10: not JSON"):
        texts(tmp_path / "a.jsonl.gz", segment_bytes=1000)


def test_the_kind_of_text_is_the_suffix_before_that_of_the_archive():
    assert [text_suffix(Path(name)) for name in ("a.jsonl.zst", "b.txt.gz", "c.jsonl", "d.gz")] == [".jsonl", ".txt", ".jsonl", ""]


def test_a_plain_file_is_read_in_chunks(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * 2_500_000)
    chunks = list(read_chunks(tmp_path / "a.txt"))
    assert len(chunks) == 3 and chunks[-1][1] == 2_500_000
