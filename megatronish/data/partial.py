"""A set that is being written: PREFIX.partial, from which the same command goes on after the process was killed.

settings.json   what the set is made of and how; another command, input or tokenizer is refused by name
progress.json   how many jobs are written, and how much of each file that is; replaced whole, at most once a second
tokens, lengths, bounds   as the writer keeps them; what is beyond `progress.json` is cut off
report.json, index        both there: only the renaming is left to do
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from megatronish.data.documents import BadLine
from megatronish.data.indexed import bin_path, idx_path
from megatronish.data.indexed_writer import IndexedDatasetWriter, WriterState, publish
from megatronish.errors import UserError

_SAVE_SECONDS = 1.0
_VERSION = 1


@dataclass
class Progress:
    """What is written."""

    jobs: int = 0
    file_bytes: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    """Lines left out, by reason."""
    first: dict[str, BadLine] = field(default_factory=dict)
    """The first line of each reason."""
    writer: WriterState = field(default_factory=WriterState)

    def count(self, skipped: dict[str, int], first: dict[str, BadLine]) -> None:
        """Add a job's."""
        for reason, number in skipped.items():
            self.skipped[reason] = self.skipped.get(reason, 0) + number
        for reason, line in first.items():
            self.first.setdefault(reason, line)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        first = {reason: {**asdict(line), "path": str(line.path)} for reason, line in self.first.items()}
        return {**asdict(self), "first": first}

    @staticmethod
    def from_json(values: dict[str, Any]) -> Progress:
        """From what `to_json` gave."""
        first = {reason: BadLine(**{**line, "path": Path(line["path"])}) for reason, line in values["first"].items()}
        return Progress(**{**values, "first": first, "writer": WriterState(**values["writer"])})


class PartialSet:
    """The folder PREFIX.partial, claimed by this process while the context lasts. Raises UserError when another process has it, or
    when it was begun with other `settings`, which are plain values; `inputs` among them are (path, size, time) of each file."""

    def __init__(self, prefix: str | os.PathLike[str], settings: dict[str, Any]) -> None:
        self.prefix = os.fspath(prefix)
        self.folder = Path(f"{self.prefix}.partial")
        self._settings = {"version": _VERSION, **settings}
        self._saved = -_SAVE_SECONDS

    def __enter__(self) -> PartialSet:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock: TextIO = open(self.folder / "lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise UserError(f"{self.folder}: another process is writing this set; wait for it, or give another --out") from None
        except OSError:
            pass  # a file system without locks
        try:
            self._check_settings()
        except UserError:
            self._lock.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.close()

    def progress(self) -> Progress:
        """Where the work stands; the beginning if there is none, or if its files are not all on the disk."""
        try:
            progress = Progress.from_json(json.loads((self.folder / "progress.json").read_text()))
            state = progress.writer
            sizes = {"tokens": state.num_tokens, "lengths": 4 * state.num_sequences, "bounds": 8 * (state.num_documents + 1)}
            whole = all((self.folder / name).stat().st_size >= size for name, size in sizes.items())
        except (OSError, ValueError, TypeError, KeyError):
            return Progress()
        return progress if whole else Progress()

    def save(self, progress: Progress, writer: IndexedDatasetWriter) -> None:
        """Record the progress, unless that was done within the last second."""
        if time.monotonic() - self._saved < _SAVE_SECONDS:
            return
        progress.writer = writer.flush(durable=True)
        self._write("progress.json", progress.to_json())
        self._saved = time.monotonic()

    def finish(self, writer: IndexedDatasetWriter, report: dict[str, Any]) -> None:
        """Make the set and its report, PREFIX.json, appear."""
        writer.write_index()
        self._write("report.json", report)
        self.publish()

    def is_ready(self) -> bool:
        """Whether all is written and only the renaming is left."""
        return (self.folder / "report.json").exists()

    def publish(self) -> dict[str, Any]:
        """Rename the files; the report. What a killed process had renamed already is left as it is."""
        report: dict[str, Any] = json.loads((self.folder / "report.json").read_text())
        if (self.folder / "index").exists():
            publish(self.folder / "tokens", self.folder / "index", bin_path(self.prefix), idx_path(self.prefix))
        os.replace(self.folder / "report.json", f"{self.prefix}.json")
        self.discard()
        return report

    def discard(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def restart(self) -> None:
        """Forget the progress."""
        for name in ("progress.json", "report.json", "index"):
            (self.folder / name).unlink(missing_ok=True)

    def _check_settings(self) -> None:
        path = self.folder / "settings.json"
        try:
            before = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            self.restart()
            self._write("settings.json", self._settings)
            return
        now = json.loads(json.dumps(self._settings))
        if before != now:
            raise UserError(
                f"{self.folder} holds the work of an interrupted command, but {_difference(before, now)}; give what it was begun "
                f"with, or delete {self.folder} to start over"
            )

    def _write(self, name: str, values: dict[str, Any]) -> None:
        temporary = self.folder / f"{name}.tmp"
        with open(temporary, "w") as file:
            json.dump(values, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.folder / name)


def input_facts(paths: Sequence[Path]) -> list[list[Any]]:
    """(path, size, time of the last change) of each file."""
    facts = []
    for path in paths:
        stat = path.stat()
        facts.append([str(path), stat.st_size, stat.st_mtime_ns])
    return facts


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first thing that is not as it was, in words."""
    old, new = {path: facts for path, *facts in before.get("inputs", [])}, {path: facts for path, *facts in now["inputs"]}
    for path in [*old, *new]:
        if path not in new:
            return f"{path} was among its inputs"
        if path not in old:
            return f"{path} was not among its inputs"
        if old[path][0] != new[path][0]:
            return f"{path} has changed: {new[path][0]} bytes, then {old[path][0]}"
        if old[path] != new[path]:
            return f"{path} has changed: it was written again since then"
    for key, value in now.items():
        if key != "inputs" and before.get(key) != value:
            return f"{key.replace('_', ' ')} was {before.get(key)}, now {value}"
    return "its inputs were in another order"
