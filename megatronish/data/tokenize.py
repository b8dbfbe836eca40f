"""Text files, directories and jsonl -> PREFIX.bin and PREFIX.idx, by worker processes.

The parent plans segments (`documents.py`), workers read and encode them, the parent writes the results in the order of the plan:
the files do not depend on the number of workers. A bounded number of segments is under way, so memory is a few segments a worker.
"""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatronish.data.documents import (
    DEFAULT_GLOBS,
    MAX_LINE_BYTES,
    SEGMENT_BYTES,
    BadLine,
    Segment,
    cut_text,
    find_files,
    plan_segments,
    read_segment,
    stop_at_bad_line,
)
from megatronish.data.encoders import Encoder, EncodersDisagree, LibraryEncoder, make_encoder
from megatronish.data.indexed_writer import IndexedDatasetWriter, token_dtype
from megatronish.data.partial import PartialSet, input_facts
from megatronish.data.tokenizer import end_of_text_id, load_tokenizer, vocabulary_fingerprint
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
    skipped: dict[str, int]
    """Lines left out, by reason."""
    first_skipped: dict[str, str]
    """The first line of each reason: file:line:column: what is wrong."""


@dataclass(frozen=True)
class Encoded:
    """One job's tokens: runs of `lengths`, each the end of a document or, the last one only, a part of one that goes on."""

    tokens: NDArray[Any]
    lengths: NDArray[np.int64]
    goes_on: bool
    file_bytes: int
    empty_documents: int
    skipped: dict[str, int]
    first: dict[str, BadLine]


Job = tuple[Segment, ...]
OnBad = Literal["stop", "skip"]


class WorkerDied(UserError):
    """A worker process ended; what is written stays for the next time."""


def tokenize(
    inputs: Sequence[Path],
    *,
    tokenizer: Path,
    out: str | os.PathLike[str],
    workers: int = 1,
    append_eod: bool = True,
    eod: str | None = None,
    globs: Sequence[str] = DEFAULT_GLOBS,
    on_bad_line: OnBad = "stop",
    max_line_bytes: int = MAX_LINE_BYTES,
    on_progress: Callable[[int, int], None] | None = None,
) -> TokenizeReport:
    """Write the documents of `inputs`, in order, as the set `out`. uint16 when the vocabulary fits, else int32.

    `append_eod` ends each document with the end-of-text token (`eod` names another). `workers=1` works in this process.
    `on_progress(bytes done, bytes in all)` is called as results are written. A process that is killed leaves OUT.partial, from
    which the same call goes on, with any number of workers. Raises UserError; then nothing is left at `out`."""
    if workers < 1:
        raise UserError(f"--workers {workers}: at least 1 is needed")
    loaded = load_tokenizer(tokenizer)
    dtype = token_dtype(loaded.get_vocab_size(with_added_tokens=True))
    end_id = end_of_text_id(loaded, token=eod) if append_eod else None
    _require_same_vocabulary(out, loaded)
    files = find_files(inputs, globs=globs)
    settings = {
        "tokenizer": xxhash.xxh3_128_hexdigest(loaded.to_str().encode()),
        "end_of_text": end_id,
        "on_bad_line": on_bad_line,
        "max_line_bytes": max_line_bytes,
        "inputs": input_facts(files),
    }
    recipe = _Recipe(tokenizer, end_id, dtype.str, on_bad_line, max_line_bytes)
    with PartialSet(out, settings) as partial:
        if partial.is_ready():
            report = partial.publish()
            return TokenizeReport(**{key: report[key] for key in TokenizeReport.__dataclass_fields__})
        try:
            return _tokenize(recipe, loaded, files, partial, workers, on_progress)
        except EncodersDisagree as found:
            warnings.warn(f"{found}; starting over with the library, which is slower", stacklevel=2)
            partial.restart()
            return _tokenize(replace(recipe, encoder="library"), loaded, files, partial, workers, on_progress)
        except WorkerDied:
            raise
        except UserError:
            partial.discard()
            raise


def _require_same_vocabulary(out: str | os.PathLike[str], tokenizer: Tokenizer) -> None:
    """UserError if a set of another vocabulary stands there: runs may read it."""
    try:
        before = json.loads(Path(f"{out}.json").read_text())["vocabulary"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if before != f"{vocabulary_fingerprint(tokenizer):016x}":
        raise UserError(
            f"{out}.bin was made with a tokenizer of another vocabulary: give another --out, or delete {out}.bin, {out}.idx and "
            f"{out}.json"
        )


@dataclass(frozen=True)
class _Recipe:
    """What a worker needs to encode."""

    tokenizer: Path
    end_id: int | None
    dtype: str
    on_bad_line: OnBad
    max_line_bytes: int
    encoder: Literal["fastest", "library"] = "fastest"

    def encoder_of(self, tokenizer: Tokenizer) -> Encoder:
        return make_encoder(tokenizer) if self.encoder == "fastest" else LibraryEncoder(tokenizer)


def _tokenize(
    recipe: _Recipe,
    loaded: Tokenizer,
    files: Sequence[Path],
    partial: PartialSet,
    workers: int,
    on_progress: Callable[[int, int], None] | None,
) -> TokenizeReport:
    total, progress, dtype = sum(path.stat().st_size for path in files), partial.progress(), np.dtype(recipe.dtype)
    writer = IndexedDatasetWriter.resumable(partial.prefix, dtype=dtype, folder=partial.folder, state=progress.writer)
    try:
        jobs = group_jobs(plan_segments(files, max_line_bytes=recipe.max_line_bytes))
        for result in _run(itertools.islice(jobs, progress.jobs, None), recipe, loaded=loaded, workers=workers):
            _write(writer, result)
            progress.jobs, progress.file_bytes = progress.jobs + 1, progress.file_bytes + result.file_bytes
            progress.count({**result.skipped, "empty": result.empty_documents}, result.first)
            partial.save(progress, writer)
            if on_progress is not None:
                on_progress(progress.file_bytes, total)
        empty = progress.skipped.pop("empty", 0)
        if writer.num_documents == 0:
            names = ", ".join(map(str, files[:4]))
            raise UserError(
                f"{names}: no text in {len(files)} files, {empty} empty documents and {sum(progress.skipped.values())} lines left "
                "out; give some"
            )
        report = TokenizeReport(
            documents=writer.num_documents,
            tokens=writer.num_tokens,
            bytes=total,
            empty_documents=empty,
            dtype=dtype.name,
            skipped=dict(sorted(progress.skipped.items())),
            first_skipped={reason: str(line.error()) for reason, line in sorted(progress.first.items())},
        )
        partial.finish(
            writer, asdict(report) | {"vocabulary": f"{vocabulary_fingerprint(loaded):016x}", "end_of_text": recipe.end_id}
        )
        return report
    finally:
        writer.close()


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


def encode_job(job: Job, encoder: Encoder, recipe: _Recipe) -> Encoded:
    """Read and encode one job. A function of the files and the tokenizer. Raises UserError."""
    tokens: list[NDArray[Any]] = []
    lengths: list[int] = []
    length = empty = 0
    skipped: dict[str, int] = {}
    first: dict[str, BadLine] = {}
    end = np.array([] if recipe.end_id is None else [recipe.end_id], recipe.dtype)

    def skip(line: BadLine) -> None:
        skipped[line.reason] = skipped.get(line.reason, 0) + 1
        first.setdefault(line.reason, line)

    read = functools.partial(
        read_segment, on_bad_line=skip if recipe.on_bad_line == "skip" else stop_at_bad_line, max_line_bytes=recipe.max_line_bytes
    )
    for pieces in _batches(job, read):
        ids, counts = encoder.encode([text for text, _ in pieces])
        # No id is beyond the vocabulary, which the dtype was chosen for.
        begin, ids = 0, ids.astype(recipe.dtype)
        for (_, closes), count in zip(pieces, counts.tolist(), strict=True):
            tokens.append(ids[begin : begin + count])
            begin += count
            length += count
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
        tokens=np.concatenate(tokens) if tokens else end[:0],
        lengths=np.array(lengths, np.int64),
        goes_on=goes_on,
        file_bytes=sum(segment.file_bytes for segment in job),
        empty_documents=empty,
        skipped=skipped,
        first=first,
    )


def _batches(job: Job, read: Callable[[Segment], Iterator[str]]) -> Iterator[list[tuple[str, Segment | None]]]:
    """Pieces for one call of the encoder each; with the segment at the end of its text, else None."""
    batch: list[tuple[str, Segment | None]] = []
    size = 0
    for segment in job:
        for text in read(segment):
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


def _run(jobs: Iterator[Job], recipe: _Recipe, *, loaded: Tokenizer, workers: int) -> Iterator[Encoded]:
    """Results in the order of `jobs`, with at most `_AHEAD * workers` under way."""
    if workers == 1:
        encoder = recipe.encoder_of(loaded)
        for job in jobs:
            yield encode_job(job, encoder, recipe)
        return
    # forkserver: a plain fork of a process with threads (torch, this tokenizer) can hang.
    context = multiprocessing.get_context("forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(recipe,))
    pending: deque[Future[Encoded]] = deque()
    try:
        for job in jobs:
            pending.append(pool.submit(_work, job))
            if len(pending) >= _AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise WorkerDied(
            f"a tokenizer worker died (out of memory, or killed); the same command goes on from here: try fewer than --workers "
            f"{workers}"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: list[Callable[[Job], Encoded]] = []  # in a worker process: what it runs, made once


def _start_worker(recipe: _Recipe) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    encoder = recipe.encoder_of(load_tokenizer(recipe.tokenizer))
    _worker[:] = [lambda job: encode_job(job, encoder, recipe)]


def _work(job: Job) -> Encoded:
    return _worker[0](job)
