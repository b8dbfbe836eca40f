"""RUN/metrics.jsonl, one JSON object a line, and TensorBoard scalars. Kept a true curve across kills: a step is never there twice.

A number that is not finite is written as null (NaN is not JSON) and read back as nan.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from megatronish.errors import disk_error

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from megatronish.observe.wandb_run import WandbRun

FILE_NAME = "metrics.jsonl"


class MetricsWriter:
    """Appends to the metrics of a run; of all ranks, one has it.

    A life that was killed may have written past its last checkpoint: on opening, lines of `first_step` and later are cut off, as is
    a line torn in the middle, and TensorBoard is told to forget those steps. `first_step` is the first step this life writes about:
    0 at the start of a run (the evaluation before training), else the checkpoint's step + 1.
    """

    def __init__(self, run_dir: Path, *, tensorboard: bool, first_step: int, wandb: WandbRun | None = None) -> None:
        path = run_dir / FILE_NAME
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            cut_rows(path, first_step)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            reason = f"{path}: cannot be written ({error.strerror}); set run_root to a folder that can"
            raise disk_error(error.errno)(reason) from None
        self._wandb = wandb
        self._board: SummaryWriter | None = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line and one point a scalar. When this returns the operating system has them: a kill of the process loses nothing."""
        row = {"step": step} | {key: value if math.isfinite(value) else None for key, value in values.items()}
        try:
            self._file.write(f"{json.dumps(row, allow_nan=False)}\n".encode())
        except OSError as error:
            reason = f"{self._file.name}: cannot be written ({error.strerror}); free space, or change run_root"
            raise disk_error(error.errno)(reason) from None
        if self._board is not None:
            for key, value in values.items():
                self._board.add_scalar(key, value, step)
            self._board.flush()
        if self._wandb is not None:
            self._wandb.write(step, values)

    def close(self) -> None:
        """Flush and close. Calling it again does nothing."""
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.close()
            self._wandb = None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows in the order of writing, each with an int `step`; none where there is no file. A run may be writing meanwhile."""
    path = run_dir / FILE_NAME
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        rows = [row for line in file if (row := _parse(line)) is not None]
    return [{key: math.nan if value is None else value for key, value in row.items()} for row in rows]


def cut_rows(path: Path, first_step: int) -> None:
    """Rewrite a file of rows without those of `first_step` and later, and without lines that cannot be read."""
    if not path.exists():
        return
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    changed = False
    with open(path, "rb") as source, open(temporary, "wb") as kept:
        for line, keep in _lines(source, first_step):
            if keep:
                kept.write(line.rstrip(b"\n") + b"\n")
            changed |= not (keep and line.endswith(b"\n"))
    if changed:
        os.replace(temporary, path)
    else:
        temporary.unlink()


def _lines(source: Any, first_step: int) -> Iterator[tuple[bytes, bool]]:
    for line in source:
        row = _parse(line)
        yield line, row is not None and row["step"] < first_step


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
