"""Reading samples, writing token files, and text to token files, each against megatron-core in the same interleaved run.

The peers are imported: GPTDataset, IndexedDatasetBuilder. Megatron's preprocessing is a script that no package holds, so its
pipeline is put together from the same parts: a pool of processes that parse a JSON line and encode it with the tokenizers library,
and a parent that feeds lists of ids to the builder.

Token files are written twice: to memory, where the program's own work is all there is, and to the disk, durably, beside the bare
disk's rate for the same bytes. No writer is faster than that, so on a slow disk the ratio tends to 1.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatronish.batch_schedule import BatchSchedule, Stage
from megatronish.checkpoint.durable import write_all
from megatronish.data.corpus import standard_library
from megatronish.data.gpt_dataset import GPTDataset
from megatronish.data.indexed_writer import IndexedDatasetWriter, token_dtype
from megatronish.data.loader import BatchLoader
from megatronish.data.tokenize import tokenize
from megatronish.data.tokenizer import end_of_text_id, load_tokenizer, train_tokenizer
from megatronish.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

SEQUENCE_LENGTH = 2048
LIMIT = "the disk"
_VOCAB = 50_257
_DOCUMENT_TOKENS = 700  # on average
_BATCH = 32  # a rank's samples of a step
_CHUNK = 32  # lines that Megatron's script hands to a worker at once
_WRITE_DOCUMENTS = 4096  # documents a call of our writer, some megabytes


@dataclass(frozen=True)
class DataBench:
    """What is measured."""

    folder: Path
    """On the disk to measure, for files of some hundred MB."""
    memory: Path
    """The same on a file system in memory, such as /dev/shm."""
    rounds: int
    samples: int
    """Samples a round, for each variant."""
    tokens: int
    """Of the set that is written and then read."""
    text_megabytes: int
    workers: int
    tokenizer: Path | None = None
    """A tokenizer.json; by default one of 8,192 tokens is learned from the text."""


def measure(bench: DataBench, on_round: Callable[[int], None] = lambda number: None) -> dict[str, Any]:
    """Run all benches; the numbers of every round, medians and ratios. UserError without megatron-core."""
    megatron = _import_megatron()
    tokens, lengths = make_tokens(bench.tokens)
    corpus, tokenizer = make_text(bench)
    parts: dict[str, dict[str, Callable[[], float]]] = {
        "write in memory": {
            "megatronish": lambda: write_ours(bench.memory, tokens, lengths),
            "megatron-core": lambda: write_theirs(megatron, bench.memory, tokens, lengths),
        },
        "write": {
            "megatronish": lambda: write_ours(bench.folder, tokens, lengths),
            "megatron-core": lambda: write_theirs(megatron, bench.folder, tokens, lengths),
            LIMIT: lambda: write_bare(bench.folder, tokens),
        },
        "read": Readers(bench, megatron).variants,
        "tokenize": {
            "megatronish": lambda: tokenize_ours(bench, corpus, tokenizer),
            "megatron-core": lambda: tokenize_theirs(megatron, bench, corpus, tokenizer),
        },
    }
    rates: dict[str, dict[str, list[float]]] = {part: {name: [] for name in variants} for part, variants in parts.items()}
    for number in range(bench.rounds):
        for part, variants in parts.items():
            for name, run in variants.items():
                rates[part][name].append(run())
        on_round(number)
    require_same_files(bench.folder)
    require_same_files(bench.memory, text=False)
    return {
        "bench": "data",
        "units": {"read": "seconds a sample of 2,048 tokens", "write, write in memory": "tokens/s", "tokenize": "bytes/s"},
        "median": {part: {name: statistics.median(values) for name, values in found.items()} for part, found in rates.items()},
        "ratio": {part: _ratio(part, found) for part, found in rates.items()},
        "rounds": rates,
        "same_files": True,
        "workers": bench.workers,
        "text_bytes": corpus.stat().st_size,
        "tokens": len(tokens),
        "documents": len(lengths),
        "versions": {name: version(name) for name in ("megatronish", "megatron-core", "tokenizers", "torch", "numpy")},
        "python": platform.python_version(),
        "device": f"{os.cpu_count()} cores of {_processor()}",
        "load_before": round(os.getloadavg()[0], 2),
        "date": time.strftime("%Y-%m-%d"),
    }


def require_same_files(folder: Path, *, text: bool = True) -> None:
    """RuntimeError unless both variants made the same files."""
    for ours, theirs in (("ours", "theirs"), *([("text", "text-theirs")] if text else [])):
        for suffix in ("bin", "idx"):
            if (folder / f"{ours}.{suffix}").read_bytes() != (folder / f"{theirs}.{suffix}").read_bytes():
                raise RuntimeError(f"{folder}/{ours}.{suffix} and {theirs}.{suffix} differ")


def make_tokens(count: int) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """Random tokens, and lengths of documents that sum to their number."""
    random = np.random.default_rng(0)
    lengths = random.geometric(1 / _DOCUMENT_TOKENS, count // _DOCUMENT_TOKENS)
    return random.integers(0, _VOCAB, int(lengths.sum()), dtype=np.uint16), lengths.astype(np.int64)


def make_text(bench: DataBench) -> tuple[Path, Path]:
    """A jsonl of the standard library's sources, as often as it takes, and a tokenizer."""
    bench.folder.mkdir(parents=True, exist_ok=True)
    path, size = bench.folder / "text.jsonl", 0
    files = standard_library().train
    with open(path, "w") as out:
        while size < bench.text_megabytes * 1_000_000:
            for file in files:
                size += out.write(json.dumps({"text": file.read_text()}) + "\n")
                if size >= bench.text_megabytes * 1_000_000:
                    break
    tokenizer = bench.tokenizer
    if tokenizer is None:
        tokenizer = bench.folder / "tokenizer.json"
        train_tokenizer(files[::4], vocab_size=8192, out=tokenizer)
    return path, tokenizer


def write_ours(folder: Path, tokens: NDArray[np.uint16], lengths: NDArray[np.int64]) -> float:
    """Tokens a second, files on the disk."""
    ends = np.concatenate(([0], np.cumsum(lengths)))
    started = time.perf_counter()
    with IndexedDatasetWriter(folder / "ours", dtype=np.dtype("u2")) as writer:
        for first in range(0, len(lengths), _WRITE_DOCUMENTS):
            last = min(first + _WRITE_DOCUMENTS, len(lengths))
            writer.add_documents(tokens[ends[first] : ends[last]], lengths[first:last])
    return len(tokens) / (time.perf_counter() - started)


def write_theirs(megatron: SimpleNamespace, folder: Path, tokens: NDArray[np.uint16], lengths: NDArray[np.int64]) -> float:
    """Tokens a second of the builder, fed with an array a document; its files are synced too, as ours are."""
    ends = np.concatenate(([0], np.cumsum(lengths))).tolist()
    prefix = folder / "theirs"
    started = time.perf_counter()
    builder = megatron.indexed.IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for i, length in enumerate(lengths.tolist()):
        builder.add_document(tokens[ends[i] : ends[i + 1]], [length])
    builder.finalize(f"{prefix}.idx")
    for suffix in ("bin", "idx"):
        with open(f"{prefix}.{suffix}", "rb") as file:
            os.fsync(file.fileno())
    return len(tokens) / (time.perf_counter() - started)


def write_bare(folder: Path, tokens: NDArray[np.uint16]) -> float:
    """Tokens a second of one file of the tokens alone, written at once and synced."""
    started = time.perf_counter()
    with open(folder / "bare", "wb", buffering=0) as file:
        write_all(file.fileno(), tokens.data.cast("B"))
        os.fsync(file.fileno())
    return len(tokens) / (time.perf_counter() - started)


class Readers:
    """Seconds a sample, in each variant's own random order over a set in memory: ours as batches for the model (stacked,
    transposed, with masks and positions), theirs as the dictionaries of GPTDataset, not yet stacked."""

    def __init__(self, bench: DataBench, megatron: SimpleNamespace) -> None:
        self._bench, self._megatron = bench, megatron
        self._loader: BatchLoader | None = None
        self._theirs: Any = None
        self._step = 0
        self._next = 0
        self.variants = {"megatronish": self.ours, "megatron-core": self.theirs}

    def ours(self) -> float:
        """Batches of 32 samples in one thread, nothing made ahead."""
        if self._loader is None:
            dataset = GPTDataset(self._bench.folder / "ours", sequence_length=SEQUENCE_LENGTH, vocab_size=_VOCAB)
            schedule = BatchSchedule((Stage(0, 0, _BATCH),))
            self._loader = BatchLoader(dataset, seed=1, data_rank=0, data_size=1, schedule=schedule, prefetch="none")
            for step in range(len(dataset) // _BATCH):  # the first time over, pages are mapped
                self._loader.batch(step)
        steps = max(1, self._bench.samples // _BATCH)
        started = time.perf_counter()
        for step in range(self._step, self._step + steps):
            self._loader.batch(step)
        self._step += steps
        return (time.perf_counter() - started) / (steps * _BATCH)

    def theirs(self) -> float:
        """One sample after the other."""
        if self._theirs is None:
            self._theirs = _megatron_dataset(self._megatron, self._bench.folder / "theirs")
            for i in range(len(self._theirs)):
                self._theirs[i]
        numbers = [(self._next + i) % len(self._theirs) for i in range(self._bench.samples)]
        self._next += self._bench.samples
        started = time.perf_counter()
        for number in numbers:
            self._theirs[number]
        return (time.perf_counter() - started) / len(numbers)


def tokenize_ours(bench: DataBench, corpus: Path, tokenizer: Path) -> float:
    """Bytes of text a second."""
    started = time.perf_counter()
    tokenize([corpus], tokenizer=tokenizer, out=bench.folder / "text", workers=bench.workers)
    return corpus.stat().st_size / (time.perf_counter() - started)


def tokenize_theirs(megatron: SimpleNamespace, bench: DataBench, corpus: Path, tokenizer: Path) -> float:
    """Bytes of text a second of the pipeline of Megatron's preprocess_data.py: Pool.imap over lines, lists to the builder."""
    prefix = bench.folder / "text-theirs"
    dtype = token_dtype(load_tokenizer(tokenizer).get_vocab_size(with_added_tokens=True)).type
    context = multiprocessing.get_context("forkserver")
    started = time.perf_counter()
    with open(corpus, encoding="utf-8") as lines, context.Pool(bench.workers, _start_encoder, (tokenizer,)) as pool:
        builder = megatron.indexed.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        for ids, lengths in pool.imap(_encode_line, lines, _CHUNK):
            builder.add_document(ids, lengths)
        builder.finalize(f"{prefix}.idx")
    return corpus.stat().st_size / (time.perf_counter() - started)


_encoder: list[tuple[Any, int]] = []  # in a worker of Megatron's pipeline: tokenizer and end of text, as its script keeps them


def _start_encoder(tokenizer: Path) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    loaded = load_tokenizer(tokenizer)
    _encoder[:] = [(loaded, end_of_text_id(loaded))]


def _encode_line(line: str) -> tuple[list[int], list[int]]:
    loaded, end = _encoder[0]
    ids = loaded.encode(json.loads(line)["text"], add_special_tokens=False).ids
    ids.append(end)
    return ids, [len(ids)]


def _import_megatron() -> SimpleNamespace:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it would like to have for training
            from megatron.core.datasets import gpt_dataset, indexed_dataset, utils
    except ImportError as error:
        raise UserError(
            f"bench data compares with megatron-core, which is not there ({error}); pip install megatron-core"
        ) from None
    return SimpleNamespace(gpt=gpt_dataset, indexed=indexed_dataset, utils=utils)


def _megatron_dataset(megatron: SimpleNamespace, prefix: Path) -> Any:
    """A GPTDataset of one epoch, as its builder makes it for training without resets of positions."""
    config = megatron.gpt.GPTDatasetConfig(
        random_seed=1,
        sequence_length=SEQUENCE_LENGTH,
        split="1,0,0",
        blend=([str(prefix)], None),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        tokenizer=SimpleNamespace(vocab_size=_VOCAB, eod=0, pad=-1, unique_identifiers={}),
        mid_level_dataset_surplus=0.005,
        path_to_cache=str(prefix.parent / "megatron-cache"),
    )
    low = megatron.gpt.GPTDataset.build_low_level_dataset(str(prefix), config)
    indices = np.arange(len(low), dtype=np.int32)
    return megatron.gpt.GPTDataset(low, str(prefix), indices, None, megatron.utils.Split.train, config)


def render(result: dict[str, Any]) -> Table:
    """The medians for people."""
    from rich.table import Table

    title = (
        f"{result['device']}, {result['date']}, megatron-core {result['versions']['megatron-core']}, load {result['load_before']}"
    )
    table = Table("what", title=title, title_justify="left")
    for name in ("megatronish", "megatron-core", "ratio", LIMIT):
        table.add_column(name, justify="right")
    rows = {
        "read": ("a random sample of 2,048 tokens, 32 a batch", "us", 1e6),
        "write in memory": (".bin and .idx from arrays, in memory", "Mtok/s", 1e-6),
        "write": (".bin and .idx from arrays, durable on the disk", "Mtok/s", 1e-6),
        "tokenize": (f"text to .bin and .idx, {result['workers']} workers", "MB/s", 1e-6),
    }
    for part, (what, unit, scale) in rows.items():
        if part not in result["median"]:  # a result of an earlier version
            continue
        median = result["median"][part]
        cells = [f"{median[name] * scale:,.1f} {unit}" for name in ("megatronish", "megatron-core")]
        limit = [f"{median[LIMIT] * scale:,.1f} {unit}"] if LIMIT in median else []
        table.add_row(what, *cells, f"{result['ratio'][part]:.1f} x", *limit)
    return table


def _ratio(part: str, rates: dict[str, list[float]]) -> float:
    """Ours over theirs, median of the rounds' ratios; above 1 is faster."""
    pairs = zip(rates["megatronish"], rates["megatron-core"], strict=True)
    return statistics.median(theirs / ours if part == "read" else ours / theirs for ours, theirs in pairs)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
