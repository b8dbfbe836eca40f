"""Text -> token files: the same for any number of workers, nothing lost, nothing left after a failure."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatronish.data import tokenize as module
from megatronish.data.gpt_dataset import GPTDataset
from megatronish.data.indexed import IndexedDataset
from megatronish.data.tokenize import tokenize
from megatronish.data.tokenizer import (
    END_OF_TEXT,
    byte_lengths,
    count_bytes,
    end_of_text_id,
    load_tokenizer,
    split_bytes,
    train_tokenizer,
)
from megatronish.errors import UserError


@pytest.fixture
def corpus(tmp_path, sample_text):
    """A directory of texts and a jsonl, with empty documents, and one text that takes several segments."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i:02}.txt").write_text(sample_text[i * 7 : i * 90])
    (folder / "long.txt").write_text(sample_text * 40)
    lines = [json.dumps({"text": sample_text[i : i + i % 50]}) for i in range(300)]
    (folder / "lines.jsonl").write_text("\n".join(lines))
    return folder


def documents_of(prefix) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    return [dataset.document(i).tolist() for i in range(dataset.num_documents)]


def test_the_files_do_not_depend_on_the_number_of_workers(corpus, tokenizer_path, tmp_path, monkeypatch):
    plan, group = module.plan_segments, module.group_jobs
    monkeypatch.setattr(module, "plan_segments", lambda files, **kw: plan(files, segment_bytes=3000, **kw))
    monkeypatch.setattr(module, "group_jobs", lambda segments: group(segments, job_bytes=5000))
    assert len(list(module.group_jobs(module.plan_segments([corpus / "long.txt"])))) > 12, "one job would prove nothing"
    reports = [tokenize([corpus], tokenizer=tokenizer_path, out=tmp_path / f"w{n}", workers=n) for n in (1, 3)]
    assert reports[0] == reports[1]
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"w1.{suffix}").read_bytes() == (tmp_path / f"w3.{suffix}").read_bytes()


@pytest.mark.parametrize("segment_bytes", [50, 700, 1 << 22])
def test_documents_are_the_encodings_of_the_texts_however_they_are_cut(
    corpus, tokenizer_path, tmp_path, monkeypatch, segment_bytes
):
    plan = module.plan_segments
    monkeypatch.setattr(module, "plan_segments", lambda files, **kw: plan(files, segment_bytes=segment_bytes, **kw))
    monkeypatch.setattr(module, "_PIECE_CHARACTERS", segment_bytes)
    report = tokenize([corpus], tokenizer=tokenizer_path, out=tmp_path / "set")
    tokenizer = load_tokenizer(tokenizer_path)
    end = end_of_text_id(tokenizer)
    texts = [path.read_text() for path in sorted(corpus.glob("*.txt"))]
    lines = [json.loads(line)["text"] for line in (corpus / "lines.jsonl").read_text().splitlines()]
    expected = [*texts[:12], *lines, texts[12]]
    decoded = [tokenizer.decode(ids[:-1], skip_special_tokens=False) for ids in documents_of(tmp_path / "set")]
    assert decoded == [text for text in expected if text]
    assert all(ids[-1] == end for ids in documents_of(tmp_path / "set"))
    assert (report.documents, report.empty_documents) == (len(decoded), len(expected) - len(decoded))
    if segment_bytes >= 700:  # every piece has a line end between visible characters: no cut changes a token
        assert documents_of(tmp_path / "set") == [[*tokenizer.encode(text).ids, end] for text in expected if text]


def test_without_eod_the_documents_are_the_bare_texts(tokenizer_path, tmp_path, sample_text):
    (tmp_path / "a.txt").write_text(sample_text)
    tokenize([tmp_path / "a.txt"], tokenizer=tokenizer_path, out=tmp_path / "set", append_eod=False)
    assert documents_of(tmp_path / "set") == [load_tokenizer(tokenizer_path).encode(sample_text).ids]


def test_text_that_spells_the_end_of_text_token_does_not_end_a_document(tokenizer_path, tmp_path):
    text = f"before {END_OF_TEXT} after"
    (tmp_path / "a.txt").write_text(text)
    tokenize([tmp_path / "a.txt"], tokenizer=tokenizer_path, out=tmp_path / "set")
    tokenizer = load_tokenizer(tokenizer_path)
    [ids] = documents_of(tmp_path / "set")
    assert ids.count(end_of_text_id(tokenizer)) == 1
    assert tokenizer.decode(ids[:-1]) == text


def test_bytes_behind_the_tokens_are_exactly_those_of_the_text(corpus, tokenizer_path, tmp_path, sample_text):
    report = tokenize([corpus / "long.txt"], tokenizer=tokenizer_path, out=tmp_path / "set")
    lengths = byte_lengths(load_tokenizer(tokenizer_path))
    dataset = GPTDataset(tmp_path / "set", sequence_length=7, vocab_size=384)
    assert count_bytes(dataset.stream, lengths) == report.bytes == len((sample_text * 40).encode())
    for num_samples in (None, 1, 10, 10**9):
        targets = dataset.tokens(np.arange(min(num_samples or len(dataset), len(dataset))))[:, 1:]
        assert split_bytes(dataset, lengths, num_samples=num_samples) == count_bytes(targets, lengths)


def test_every_byte_has_length_1_and_special_tokens_0(tokenizer_path):
    tokenizer = load_tokenizer(tokenizer_path)
    lengths = byte_lengths(tokenizer)
    assert lengths[end_of_text_id(tokenizer)] == 0
    for text in ("a", "é", "東", "😀", "\x00\x7f", " naïve 東京\n"):
        assert count_bytes(np.array(tokenizer.encode(text).ids), lengths) == len(text.encode())
    assert (lengths == 1).sum() == 256


def test_training_twice_gives_the_same_tokenizer(tokenizer_path, tmp_path, sample_text):
    (tmp_path / "text.txt").write_text(sample_text)
    assert train_tokenizer([tmp_path / "text.txt"], vocab_size=300, out=tmp_path / "again.json") == 300
    assert (tmp_path / "again.json").read_bytes() == tokenizer_path.read_bytes()


def test_progress_reaches_the_size_of_the_input(corpus, tokenizer_path, tmp_path):
    calls = []
    report = tokenize(
        [corpus], tokenizer=tokenizer_path, out=tmp_path / "set", on_progress=lambda done, total: calls.append((done, total))
    )
    assert calls[-1] == (report.bytes, report.bytes)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_line_stops_the_work_and_leaves_nothing(corpus, tokenizer_path, tmp_path, workers):
    (corpus / "m.jsonl").write_text('{"text": "a"}\n{"text": }\n')
    with pytest.raises(UserError, match=r"m\.jsonl:2:10: not JSON"):
        tokenize([corpus], tokenizer=tokenizer_path, out=tmp_path / "out" / "set", workers=workers)
    assert list((tmp_path / "out").iterdir()) == []


def test_inputs_without_text_are_refused(tokenizer_path, tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match=r"a\.txt: no text in 1 files, 1 empty documents"):
        tokenize([tmp_path / "a.txt"], tokenizer=tokenizer_path, out=tmp_path / "set")


def test_a_set_of_another_vocabulary_is_not_overwritten(tokenizer_path, tmp_path, sample_text):
    (tmp_path / "a.txt").write_text(sample_text)
    given = {"out": tmp_path / "set"}
    tokenize([tmp_path / "a.txt"], tokenizer=tokenizer_path, **given)
    before = (tmp_path / "set.bin").read_bytes()
    train_tokenizer([tmp_path / "a.txt"], vocab_size=290, out=tmp_path / "other.json")
    with pytest.raises(UserError, match=r"set\.bin was made with a tokenizer of another vocabulary: give another --out"):
        tokenize([tmp_path / "a.txt"], tokenizer=tmp_path / "other.json", **given)
    assert (tmp_path / "set.bin").read_bytes() == before
    tokenize([tmp_path / "a.txt"], tokenizer=tokenizer_path, **given)


def test_bad_tokenizers_and_settings_are_refused(tokenizer_path, tmp_path, sample_text):
    (tmp_path / "a.txt").write_text(sample_text)
    (tmp_path / "bad.json").write_text("{}")
    sources = {"tokenizer": tokenizer_path, "out": tmp_path / "set"}
    for changes, message in [
        ({"tokenizer": tmp_path / "none.json"}, r"none\.json: no such tokenizer"),
        ({"tokenizer": tmp_path / "bad.json"}, r"bad\.json: not a tokenizer\.json"),
        ({"workers": 0}, "--workers 0: at least 1"),
        ({"eod": "<stop>"}, r"no token that ends a document \(<stop>\)"),
    ]:
        with pytest.raises(UserError, match=message):
            tokenize([tmp_path / "a.txt"], **{**sources, **changes})
    with pytest.raises(UserError, match=r"--vocab-size 100 is too small.*257"):
        train_tokenizer([tmp_path / "a.txt"], vocab_size=100, out=tmp_path / "t.json")
    (tmp_path / "b.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"b\.jsonl:1:1: no key"):
        train_tokenizer([tmp_path / "b.jsonl"], vocab_size=300, out=tmp_path / "t.json")
    assert not (tmp_path / "t.json").exists()
