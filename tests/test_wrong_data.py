"""What users give by mistake as data: exit code 2, and one line with what was given, what was needed, what to change."""

from __future__ import annotations

import gzip
import json
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard

from megatronish.cli import main
from megatronish.data.indexed import HEADER
from megatronish.data.indexed_writer import IndexedDatasetWriter
from megatronish.data.tokenizer import train_tokenizer

CONFIG = """\
name: run
run_root: {folder}/runs
model: {{num_layers: 1, hidden_size: 32, num_heads: 2, mlp_size: 64, vocab_size: 384}}
data: {{train: {folder}/set, sequence_length: 16, tokenizer: {folder}/tokenizer.json}}
optim: {{lr: 1e-3}}
train: {{steps: 2, global_batch_size: 4, micro_batch_size: 2}}
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A config, a tokenizer of 300 tokens, a set of 40 documents."""
    (tmp_path / "run.yaml").write_text(CONFIG.format(folder=tmp_path))
    (tmp_path / "words.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    train_tokenizer([tmp_path / "words.txt"], vocab_size=300, out=tmp_path / "tokenizer.json")
    write(tmp_path / "set", [9] * 40)
    return tmp_path


def write(prefix: Path, lengths: list[int], token: int = 5) -> None:
    with IndexedDatasetWriter(prefix, dtype=np.dtype("u2")) as writer:
        writer.add_documents(np.full(sum(lengths), token), np.array(lengths))


def run(arguments: list[str], monkeypatch, capsys) -> str:
    """The lines on stderr of a command that must end with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["megatronish", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    return capsys.readouterr().err


def patch_index(folder: Path, offset: int, data: bytes) -> None:
    index = bytearray((folder / "set.idx").read_bytes())
    index[offset : offset + len(data)] = data
    (folder / "set.idx").write_bytes(index)


def cut(folder: Path, name: str, by: int) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:-by])


def other_tokenizer(folder: Path) -> None:
    (folder / "set.json").write_text(json.dumps({"vocabulary": "00000000000000ab"}))


POINTERS = HEADER.size + 4 * 40
SETS: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "no .bin": (lambda f: (f / "set.bin").unlink(), [], r"set\.idx is there without .*set\.bin: a set needs both"),
    "no .idx": (lambda f: (f / "set.idx").unlink(), [], r"set\.bin is there without .*set\.idx"),
    "no set": (lambda f: None, ["data.train=nowhere/at-all"], r"nowhere/at-all: no such set, neither"),
    "magic": (lambda f: patch_index(f, 0, b"TNTIDX"), [], r"set\.idx: begins with .*not with b'MMIDIDX"),
    "version": (lambda f: patch_index(f, 9, struct.pack("<Q", 7)), [], r"set\.idx: format version 7, only version 1"),
    "dtype code": (lambda f: patch_index(f, 17, b"\x63"), [], r"set\.idx: unknown dtype code 99, known are 1 to 8"),
    "truncated .idx": (lambda f: cut(f, "set.idx", 5), [], r"set\.idx: truncated, \d+ bytes but 40 sequences"),
    "truncated .bin": (lambda f: cut(f, "set.bin", 6), [], r"set\.bin: truncated, 714 bytes where set\.idx needs 720"),
    "pointer": (lambda f: patch_index(f, POINTERS + 80, struct.pack("<q", 1 << 40)), [], r"pointer of sequence 10 is out of range"),
    "negative length": (lambda f: patch_index(f, HEADER.size, struct.pack("<i", -3)), [], r"sequence 0 has the negative length -3"),
    "no documents": (lambda f: patch_index(f, 18, struct.pack("<QQ", 0, 1)), [], r"set\.idx: holds no documents"),
    "short documents": (lambda f: write(f / "set", [1] * 40), [], r"all 40 documents are shorter than 2 tokens"),
    "too few tokens": (lambda f: write(f / "set", [9]), [], r"has 9 tokens in 1 documents, too few for one sample of 17"),
    "other tokenizer": (other_tokenizer, [], r"data\.tokenizer=.*tokenizer\.json is not the tokenizer that made .*/set: .*00ab"),
    "small vocabulary": (lambda f: None, ["model.vocab_size=128"], r"model\.vocab_size=128 is smaller than the \d+ tokens of"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), [], r"tokenizer\.json: no such tokenizer"),
    "bad tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), [], r"tokenizer\.json: not a tokenizer\.json of"),
    "blend of a missing set": (lambda f: None, ["data.train=[{prefix: gone, weight: 1}]"], r"gone: no such set"),
    "negative weight": (lambda f: None, ["data.train=[{prefix: a, weight: -1}]"], r"data\.train\.0\.weight=-1: must be > 0"),
    "weights of sum 0": (lambda f: None, ["data.train=[{prefix: a, weight: 0}]"], r"data\.train\.0\.weight=0: must be > 0"),
    "fewer weights than sets": (
        lambda f: None,
        ["data.train=[{prefix: a, weight: 1}, {prefix: b}]"],
        r"data\.train\.1\.weight: required",
    ),
    "weight that is no number": (
        lambda f: None,
        ["data.train=[{prefix: a, weight: .nan}]"],
        r"data\.train\.0\.weight=nan: must be",
    ),
    "empty blend": (lambda f: None, ["data.train=[]"], r"data\.train is an empty list; give a prefix"),
    "a set twice": (
        lambda f: None,
        ["data.train=[{prefix: a, weight: 1}, {prefix: a, weight: 2}]"],
        r"data\.train holds a twice; give it once",
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_a_mistake_in_a_set_ends_training_before_it_begins(name, folder, monkeypatch, capsys):
    spoil, overrides, message = SETS[name]
    spoil(folder)
    error = run(["train", str(folder / "run.yaml"), *overrides, "--nproc", "2"], monkeypatch, capsys)
    check_line(error, message)
    assert re.search(r"data\.|model\.", error), "the key to change"


def test_sets_and_tokenizer_that_are_wrong_at_once_are_a_line_each_under_their_keys(folder, monkeypatch, capsys):
    (folder / "tokenizer.json").write_text("{}")
    overrides = ["data.train=[{prefix: a, weight: 1}, {prefix: b, weight: 1}]", "data.validation=c"]
    for command in (["train", "--nproc", "2"], ["train"]):
        error = run([command[0], str(folder / "run.yaml"), *overrides, *command[1:]], monkeypatch, capsys)
        keys = ["data.validation", "data.train.0.prefix", "data.train.1.prefix", "data.tokenizer"]
        assert [line.removeprefix("error: ").split(": ")[0] for line in error.splitlines()] == keys
        assert "c: no such set" in error and "b: no such set" in error and "tokenizer.json: not a tokenizer.json" in error


def test_two_mistakes_give_two_lines(folder, monkeypatch, capsys):
    mistakes = ["data.train=[{prefix: a, weight: -1}]", "data.order=random"]
    error = run(["train", str(folder / "run.yaml"), *mistakes, "--nproc", "2"], monkeypatch, capsys)
    first, second = error.strip().splitlines()
    assert "data.train.0.weight=-1" in first and "data.order=random: must be one of permutation, megatron" in second


def check_line(error: str, message: str) -> None:
    assert len(error.strip().splitlines()) == 1 and error.startswith("error: "), error
    assert re.search(message, error), error


TEXTS: dict[str, tuple[str, bytes, str]] = {
    "not JSON": ("a.jsonl", b'{"text": "x"}\n{"text": oops}\n', r"a\.jsonl:2:10: not JSON: Expecting value"),
    "no text": ("a.jsonl", b'{"body": "x"}\n', r'a\.jsonl:1:1: no key "text" \(keys: body\); rename'),
    "null": ("a.jsonl", b'{"text": null}\n', r'a\.jsonl:1:2: "text" is null; a string is needed'),
    "invalid UTF-8": ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl:1:11: invalid UTF-8, byte 0xff .*convert the file"),
    "a long line": ("a.jsonl", b'{"text": "' + b"x" * (2 << 20) + b'"}\n', r"a\.jsonl:1:1: a line of 2\d+ bytes, .*--max-line-mib"),
    "truncated gzip": ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n')[:-9], r"a\.jsonl\.gz: truncated gzip archive, .* at byte"),
    "truncated zstd": (
        "a.jsonl.zst",
        zstandard.compress(b'{"text": "x"}\n')[:-3],
        r"a\.jsonl\.zst: truncated zstd archive, .* at byte",
    ),
    "no archive": ("a.jsonl.gz", b"plain text", r"a\.jsonl\.gz: damaged gzip archive between bytes 0 and 10 of 10"),
    "zip": ("a.zip", b"PK", r"a\.zip: archives of this kind are not read, only \.gz and \.zst"),
    "UTF-16": ("a.txt", "text".encode("utf-16"), r"a\.txt: is UTF-16; convert it to UTF-8"),
    "empty": ("a.txt", b"", r"a\.txt: no text in 1 files, 1 empty documents"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_mistake_in_a_text_ends_tokenization_and_leaves_nothing(name, folder, monkeypatch, capsys):
    file, data, message = TEXTS[name]
    (folder / file).write_bytes(data)
    command = ["data", "tokenize", str(folder / file), "--tokenizer", str(folder / "tokenizer.json"), "--max-line-mib", "1"]
    check_line(run([*command, "--out", str(folder / "out")], monkeypatch, capsys), message)
    assert not list(folder.glob("out*"))


def test_a_token_beyond_the_vocabulary_is_named_by_document_and_offset(folder, monkeypatch, capsys):
    write(folder / "set", [9] * 40, token=383)
    command = ["data", "inspect", str(folder / "set"), "--full", "--tokenizer", str(folder / "tokenizer.json")]
    check_line(run(command, monkeypatch, capsys), r"set\.bin: token 383 in document 0 at offset 0 is outside the tokenizer's \d+")


def test_a_run_longer_than_its_set_says_how_many_epochs_it_makes(folder, monkeypatch, capsys):
    from megatronish.config_loader import load_config
    from megatronish.surroundings import open_datasets

    config = load_config(folder / "run.yaml", ["train.steps=100"])
    assert "360 tokens = 22 samples of 16; the run reads 400 = 18.18 epochs" in open_datasets(config).train.describe_epochs(400)
