"""The table of a set, the full check, the demo's corpus, and the commands."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from megatronish.data.cli import app
from megatronish.data.corpus import standard_library
from megatronish.data.indexed import IndexedDataset
from megatronish.data.inspect import summarize, summary_table
from megatronish.data.tokenize import tokenize
from megatronish.errors import UserError


def test_the_summary_counts_what_is_there(write_set):
    prefix = write_set([[5] * n for n in [1, 0, *range(2, 100)]] + [[7, 299]])
    for full in (False, True):
        summary = summarize(prefix, full=full)
        assert (summary.documents, summary.tokens, summary.short_documents) == (101, 4952, 2)
        assert summary.length_quantiles[0] == 0 and summary.length_quantiles[-1] == 99
        assert summary.exact and summary.fingerprint == IndexedDataset(prefix).fingerprint
        assert summary.token_range == ((5, 299) if full else None)


def test_the_table_shows_the_head_as_text(tokenizer_path, tmp_path, sample_text):
    (tmp_path / "a.txt").write_text("[bold]" + sample_text)  # no markup of ours
    tokenize([tmp_path / "a.txt"], tokenizer=tokenizer_path, out=tmp_path / "set")
    console = Console(width=100, file=io.StringIO())
    console.print(summary_table(summarize(tmp_path / "set", full=True, tokenizer=tokenizer_path)))
    shown = console.file.getvalue()
    assert "[bold]The quick brown" in shown and "uint16" in shown and "documents" in shown


@pytest.mark.parametrize("position", [3, 200])  # in the head, and where only a full scan looks
def test_tokens_of_another_tokenizer_are_named(write_set, tokenizer_path, position):
    tokens = [5] * 400
    tokens[position] = 300
    with pytest.raises(UserError, match=f"token 300 in document 1 at offset {position - 2} is outside the tokenizer's 300"):
        summarize(write_set([tokens[:2], tokens[2:]]), full=True, tokenizer=tokenizer_path)


def test_the_corpus_is_apart_ordered_and_about_3_percent_held_out():
    corpus = standard_library()
    train, held_out = (sum(path.stat().st_size for path in part) for part in (corpus.train, corpus.validation))
    assert train + held_out == corpus.num_bytes > 5_000_000
    assert 0.02 < held_out / corpus.num_bytes < 0.04
    assert not set(corpus.train) & set(corpus.validation)
    assert len(corpus.validation) >= 4
    assert not any({"test", "site-packages", "__pycache__"} & set(path.parts[-3:-1]) for path in corpus.train)


def test_the_corpus_is_the_same_wherever_the_files_lie(tmp_path):
    rng = np.random.default_rng(0)
    for root in ("one", "two"):
        for i in rng.permutation(300):
            path = tmp_path / root / f"p{i % 7}" / f"m{i}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("x" * int(50 + i))
        (tmp_path / root / "latin.py").write_bytes(b"\xe9\xff")
        (tmp_path / root / "test").mkdir()
        (tmp_path / root / "test" / "t.py").write_text("x")
    one, two = (standard_library(root=tmp_path / root) for root in ("one", "two"))
    for part in ("train", "validation"):
        names = [[path.relative_to(tmp_path / root) for path in getattr(c, part)] for root, c in (("one", one), ("two", two))]
        assert names[0] == names[1]
    assert len(one.train) + len(one.validation) == 300


def test_the_commands_make_a_set_from_text(tmp_path, sample_text):
    (tmp_path / "a.md").write_text(sample_text)
    runner = CliRunner()
    steps = [
        ["tokenizer", "train", f"{tmp_path}", "--vocab-size", "290", "--out", f"{tmp_path}/t.json", "--glob", "*.md"],
        ["tokenize", f"{tmp_path}", "--tokenizer", f"{tmp_path}/t.json", "--out", f"{tmp_path}/set", "--glob", "*.md"],
        ["inspect", f"{tmp_path}/set", "--full", "--tokenizer", f"{tmp_path}/t.json"],
    ]
    results = [runner.invoke(app, step, catch_exceptions=False) for step in steps]
    assert [result.exit_code for result in results] == [0, 0, 0]
    assert "290 tokens" in results[0].stdout
    assert "1 documents" in results[1].stdout
    assert "The quick brown" in results[2].stdout


@pytest.mark.parametrize("command", [["tokenizer", "train"], ["tokenize"], ["inspect"]])
def test_help_teaches_with_an_example(command):
    shown = CliRunner().invoke(app, [*command, "--help"]).stdout
    assert f"megatronish data {' '.join(command)} " in " ".join(shown.split())


def test_importing_the_commands_imports_nothing_heavy():
    heavy = ("torch", "numpy", "tokenizers", "rich.progress")
    code = f"import sys, megatronish.data.cli; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
