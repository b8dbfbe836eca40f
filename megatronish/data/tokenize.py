"""Text files, directories and jsonl -> PREFIX.bin and PREFIX.idx, by worker processes.

The parent plans segments (`documents.py`), workers read and encode them, the parent writes the results in the order of the plan:
the files do not depend on the number of workers. A bounded number of segments is under way, so memory is a few segments a worker.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatronish.data.documents import (
    DEFAULT_GLOBS,
    SEGMENT_BYTES,
    Segment,
    cut_text,
    find_files,
    plan_segments,
    read_segment,
)
from megatronish.data.indexed_writer import IndexedDatasetWriter, token_dtype
from megatronish.data.tokenizer import end_of_text_id, load_tokenizer
from megatronish.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_PIECE_CHARACTERS = 1 << 18  # of one call of the encoder, whose Encoding objects take some 100 bytes a token
_AHEAD = 2  # jobs under way, a worker


@dataclass(frozen=True)
class TokenizeReport:
    """What was written."""

    documents: int
    tokens: int
    bytes: int
    """Of the input files."""
    empty_documents: int
    """Left out."""
    dtype: str


@dataclass(frozen=True)
class Encoded:
    """One job's tokens: runs of `lengths`, each the end of a document or, the last one only, a part of one that goes on."""

    tokens: NDArray[Any]
    lengths: NDArray[np.int64]
    goes_on: bool
    num_bytes: int
    empty_documents: int


Job = tuple[Segment, ...]


def tokenize(
    inputs: Sequence[Path],
    *,
    tokenizer: Path,
    out: str | os.PathLike[str],
    workers: int = 1,
    append_eod: bool = True,
    eod: str | None = None,
    globs: Sequence[str] = DEFAULT_GLOBS,
    on_progress: Callable[[int, int], None] | None = None,
) -> TokenizeReport:
    """Write the documents of `inputs`, in order, as the set `out`. uint16 when the vocabulary fits, else int32.

    `append_eod` ends each document with the end-of-text token (`eod` names another). `workers=1` works in this process.
    `on_progress(bytes done, bytes in all)` is called as results are written. Raises UserError; then nothing is left at `out`."""
    if workers < 1:
        raise UserError(f"--workers {workers}: at least 1 is needed")
    loaded = load_tokenizer(tokenizer)
    dtype = token_dtype(loaded.get_vocab_size(with_added_tokens=True))
    end_id = end_of_text_id(loaded, token=eod) if append_eod else None
    files = find_files(inputs, globs=globs)
    total, done, empty = sum(path.stat().st_size for path in files), 0, 0
    encode = functools.partial(encode_job, end_id=end_id, dtype=dtype.str)
    with IndexedDatasetWriter(out, dtype=dtype) as writer:
        for result in _run(group_jobs(plan_segments(files)), encode, tokenizer=tokenizer, loaded=loaded, workers=workers):
            _write(writer, result)
            done, empty = done + result.num_bytes, empty + result.empty_documents
            if on_progress is not None:
                on_progress(done, total)
        if writer.num_documents == 0:
            raise UserError(f"{', '.join(map(str, inputs[:4]))}: no text in {len(files)} files, {empty} empty documents; give some")
    return TokenizeReport(writer.num_documents, writer.num_tokens, total, empty, dtype.name)


def group_jobs(segments: Iterable[Segment], *, job_bytes: int = SEGMENT_BYTES) -> Iterator[Job]:
    """Small segments together, up to about `job_bytes`."""
    group: list[Segment] = []
    size = 0
    for segment in segments:
        if group and size + segment.num_bytes > job_bytes:
            yield tuple(group)
            group, size = [], 0
        group.append(segment)
        size += segment.num_bytes
    if group:
        yield tuple(group)


def encode_job(job: Job, tokenizer: Tokenizer, *, end_id: int | None, dtype: str) -> Encoded:
    """Read and encode one job. A pure function of the files and the tokenizer. Raises UserError."""
    tokens: list[NDArray[Any]] = []
    lengths: list[int] = []
    length = empty = 0
    end = np.array([] if end_id is None else [end_id], dtype)
    for pieces in _batches(job):
        encodings = tokenizer.encode_batch_fast([text for text, _ in pieces], add_special_tokens=False)
        for (_, closes), encoding in zip(pieces, encodings, strict=True):
            ids = np.array(encoding.ids, dtype)
            tokens.append(ids)
            length += len(ids)
            if closes is None or not closes.ends_document:
                continue
            if length or (closes.kind == "text" and closes.start > 0):  # the rest of a document begun in another job
                tokens.append(end)
                lengths.append(length + len(end))
                length = 0
            else:
                empty += 1
    goes_on = not job[-1].ends_document
    if goes_on:
        lengths.append(length)
    return Encoded(
        np.concatenate(tokens) if tokens else end[:0],
        np.array(lengths, np.int64),
        goes_on,
        sum(segment.num_bytes for segment in job),
        empty,
    )


def _batches(job: Job) -> Iterator[list[tuple[str, Segment | None]]]:
    """Pieces for one call of the encoder each; with the segment at the end of its text, else None."""
    batch: list[tuple[str, Segment | None]] = []
    size = 0
    for segment in job:
        for text in read_segment(segment):
            pieces = list(cut_text(text, size=_PIECE_CHARACTERS))
            for i, piece in enumerate(pieces):
                batch.append((piece, segment if i == len(pieces) - 1 else None))
                size += len(piece)
                if size >= _PIECE_CHARACTERS:
                    yield batch
                    batch, size = [], 0
    if batch:
        yield batch


def _write(writer: IndexedDatasetWriter, result: Encoded) -> None:
    tokens, lengths = result.tokens, result.lengths
    if writer.document_is_open and len(lengths):
        writer.add_tokens(tokens[: lengths[0]])
        tokens, first_goes_on, lengths = tokens[lengths[0] :], result.goes_on and len(lengths) == 1, lengths[1:]
        if first_goes_on:
            return
        writer.end_document()
    whole = len(lengths) - result.goes_on
    split = int(lengths[:whole].sum())
    writer.add_documents(tokens[:split], lengths[:whole])
    writer.add_tokens(tokens[split:])


def _run(
    jobs: Iterator[Job], encode: Callable[..., Encoded], *, tokenizer: Path, loaded: Tokenizer, workers: int
) -> Iterator[Encoded]:
    """Results in the order of `jobs`, with at most `_AHEAD * workers` under way."""
    if workers == 1:
        for job in jobs:
            yield encode(job, loaded)
        return
    # forkserver: a plain fork of a process with threads (torch, this tokenizer) can hang.
    context = multiprocessing.get_context("forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(tokenizer, encode))
    pending: deque[Future[Encoded]] = deque()
    try:
        for job in jobs:
            pending.append(pool.submit(_work, job))
            if len(pending) >= _AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise UserError(f"a tokenizer worker died (out of memory, or killed); try fewer than --workers {workers}") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: list[Callable[[Job], Encoded]] = []  # in a worker process: what it runs, made once


def _start_worker(tokenizer: Path, encode: Callable[..., Encoded]) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    loaded = load_tokenizer(tokenizer)
    _worker[:] = [lambda job: encode(job, loaded)]


def _work(job: Job) -> Encoded:
    return _worker[0](job)
