"""What a set holds, as numbers and as a table."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megatronish.data.indexed import IndexedDataset, probe_ranges
from megatronish.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

QUANTILES = (0, 10, 50, 90, 99, 100)
_HEAD_TOKENS = 64
_SAMPLED_DOCUMENTS = 512  # of each of 16 places
_SCAN_BLOCK = 1 << 20


@dataclass(frozen=True)
class Summary:
    """A set in numbers."""

    prefix: str
    dtype: str
    documents: int
    sequences: int
    tokens: int
    bytes: int
    """Of both files."""
    fingerprint: int
    length_quantiles: tuple[int, ...]
    """Tokens a document at `QUANTILES` percent."""
    short_documents: int
    """With fewer than 2 tokens, among those looked at."""
    exact: bool
    """Whether every document was looked at (else samples spread over the set)."""
    token_range: tuple[int, int] | None
    """Smallest and largest token; only a full scan knows."""
    head: str | None
    """The beginning of the first document, decoded; with a tokenizer."""


def summarize(
    prefix: str | os.PathLike[str],
    *,
    full: bool = False,
    tokenizer: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Look at a set; `full` reads all of it and checks every length, pointer, bound and, with a tokenizer, every token.

    `on_progress(done, total)` counts tokens and sequences read by a full scan. Raises UserError for what is damaged."""
    dataset = IndexedDataset(prefix)
    vocab_size = head = None
    if tokenizer is not None:
        from megatronish.data.tokenizer import load_tokenizer

        loaded = load_tokenizer(tokenizer)
        vocab_size = loaded.get_vocab_size(with_added_tokens=True)
        head = loaded.decode(_head_ids(dataset, vocab_size), skip_special_tokens=False)
    token_range = _scan(dataset, vocab_size, on_progress) if full else None
    ranges = probe_ranges(dataset.num_documents, size=_SAMPLED_DOCUMENTS)
    if full:
        ranges = [(i, min(i + _SCAN_BLOCK, dataset.num_documents)) for i in range(0, dataset.num_documents, _SCAN_BLOCK)]
    lengths = np.concatenate([_document_lengths(dataset, start, stop) for start, stop in ranges])
    quantiles = np.percentile(lengths, QUANTILES, method="lower")
    size = sum(os.path.getsize(f"{dataset.prefix}{suffix}") for suffix in (".bin", ".idx"))
    return Summary(
        prefix=dataset.prefix,
        dtype=dataset.dtype.name,
        documents=dataset.num_documents,
        sequences=dataset.num_sequences,
        tokens=dataset.num_tokens,
        bytes=size,
        fingerprint=dataset.fingerprint,
        length_quantiles=tuple(int(q) for q in quantiles),
        short_documents=int((lengths < 2).sum()),
        exact=len(lengths) == dataset.num_documents,
        token_range=token_range,
        head=head,
    )


def summary_table(summary: Summary) -> Table:
    """The summary for a terminal."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("what", "value", title=escape(summary.prefix), title_justify="left")
    table.add_row("dtype", summary.dtype)
    table.add_row("documents", f"{summary.documents:,}")
    if summary.sequences != summary.documents:
        table.add_row("sequences", f"{summary.sequences:,}")
    table.add_row("tokens", f"{summary.tokens:,}")
    table.add_row("on disk", f"{summary.bytes / 2**20:,.1f} MiB")
    names = {0: "shortest", 50: "median", 100: "longest"}
    scope = "" if summary.exact else " (of a sample; --full for all)"
    lengths = ", ".join(f"{names.get(q, f'{q} %')} {v:,}" for q, v in zip(QUANTILES, summary.length_quantiles, strict=True))
    table.add_row("tokens a document", lengths + scope)
    if summary.short_documents:
        table.add_row("shorter than 2 tokens", f"{summary.short_documents:,}{scope}")
    if summary.token_range is not None:
        table.add_row("token ids", f"{summary.token_range[0]:,} to {summary.token_range[1]:,}")
        table.add_row("checked", "whole: every length, pointer and bound, and every token")
    table.add_row("fingerprint", f"{summary.fingerprint:016x}")
    if summary.head is not None:
        table.add_row("begins", escape(summary.head))
    return table


def _head_ids(dataset: IndexedDataset, vocab_size: int) -> list[int]:
    ids: list[int] = dataset.tokens[:_HEAD_TOKENS].astype(np.int64).tolist()
    if any(not 0 <= token < vocab_size for token in ids):
        raise _other_tokenizer(dataset, next(i for i, token in enumerate(ids) if not 0 <= token < vocab_size), vocab_size)
    return ids


def _other_tokenizer(dataset: IndexedDataset, position: int, vocab_size: int) -> UserError:
    document, offset = dataset.locate(position)
    return UserError(
        f"{dataset.prefix}.bin: token {int(dataset.tokens[position])} in document {document} at offset {offset} is outside the "
        f"tokenizer's {vocab_size}: another tokenizer made this set; give that one with --tokenizer"
    )


def _document_lengths(dataset: IndexedDataset, start: int, stop: int) -> NDArray[np.int64]:
    bounds = dataset.document_bounds[start : stop + 1]
    positions = dataset.pointers[np.minimum(bounds, dataset.num_sequences - 1)] // dataset.dtype.itemsize
    positions[bounds == dataset.num_sequences] = dataset.num_tokens
    return np.diff(positions)


def _scan(dataset: IndexedDataset, vocab_size: int | None, on_progress: Callable[[int, int], None] | None) -> tuple[int, int]:
    """Check the whole index, then read every token: (smallest, largest)."""
    total = dataset.num_sequences + dataset.num_tokens
    for done in dataset.check_all():
        if on_progress is not None:
            on_progress(done, total)
    low = high = int(dataset.tokens[0])
    for start in range(0, dataset.num_tokens, _SCAN_BLOCK):
        block = dataset.tokens[start : start + _SCAN_BLOCK]
        low, high = min(low, int(block.min())), max(high, int(block.max()))
        if vocab_size is not None and (low < 0 or high >= vocab_size):
            raise _other_tokenizer(dataset, start + int(np.argmax((block < 0) | (block >= vocab_size))), vocab_size)
        if on_progress is not None:
            on_progress(dataset.num_sequences + start + len(block), total)
    return low, high
