"""Small sets and a small tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from megatronish.data.indexed_writer import IndexedDatasetWriter
from megatronish.data.tokenizer import train_tokenizer

WriteSet = Callable[..., Path]


@pytest.fixture
def write_set(tmp_path: Path) -> WriteSet:
    """write_set(documents, dtype="u2", name="set") -> prefix."""

    def write(documents: Sequence[Sequence[int]], *, dtype: str = "u2", name: str = "set") -> Path:
        prefix = tmp_path / name
        with IndexedDatasetWriter(prefix, dtype=np.dtype(dtype)) as writer:
            for document in documents:
                writer.add_tokens(np.array(document, dtype))
                writer.end_document()
        return prefix

    return write


TEXT = "The quick brown fox, naïve 東京 😀,\njumps\tover 12 lazy dogs.\n\n  def f(x):\n      return x ** 2\n" * 20


@pytest.fixture(scope="session")
def sample_text() -> str:
    """Several alphabets, code, blank lines."""
    return TEXT


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 300 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text(TEXT)
    train_tokenizer([folder / "text.txt"], vocab_size=300, out=folder / "tokenizer.json")
    return folder / "tokenizer.json"
