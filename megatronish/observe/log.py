"""Log lines with coordinates: every rank to RUN/logs/rank-00000.log, rank 0 to the terminal too.

Modules write with `logging.getLogger(__name__)`; facts with units, once.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from megatronish.errors import disk_error


class _RankFile(logging.FileHandler):
    """The rank's own file."""

    _failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        """One line about a disk that is full, not a traceback a line; a run does not end for its log."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._failed:
            self._failed = True
            sys.stderr.write(f"WARNING: {self.baseFilename}: cannot be written ({error.strerror}): lines are missing there\n")


class _Terminal(logging.Handler):
    """Standard error, looked up for each line: while a progress bar is drawn, rich stands there and puts the line above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(f"{self.format(record)}\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


class _Lines(logging.Formatter):
    """`[pp0 dp0 tp0] TIME message`; the level is named where it is above INFO."""

    def __init__(self, coordinates: str, *, time_format: str) -> None:
        super().__init__(datefmt=time_format)
        self._coordinates = coordinates

    def formatMessage(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname}: " if record.levelno > logging.INFO else ""
        return f"[{self._coordinates}] {self.formatTime(record, self.datefmt)} {level}{record.getMessage()}"


def setup_logging(run_dir: Path, *, rank: int, coordinates: str) -> logging.Logger:
    """The logger of this process, `megatronish`: appends to RUN/logs, and on rank 0 writes to standard error.

    `coordinates` opens each line, e.g. `pp0 dp0 tp0` (`Mesh.describe`). A second call replaces what the first one set up.
    Raises UserError, or Fault (errors.disk_error), where the file cannot be written."""
    logger = logging.getLogger("megatronish")
    for handler in list(logger.handlers):
        if isinstance(handler, _RankFile | _Terminal):
            logger.removeHandler(handler)
            handler.close()
    logger.setLevel(logging.INFO)
    logger.propagate = False  # a root handler of some library would print every line again
    path = run_dir / "logs" / f"rank-{rank:05d}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _RankFile(path, mode="a", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise disk_error(error.errno)(f"{path}: cannot be written ({error.strerror}); set run_root to a folder that can") from None
    file.setFormatter(_Lines(coordinates, time_format="%Y-%m-%d %H:%M:%S"))
    logger.addHandler(file)
    if rank == 0:
        terminal = _Terminal()
        terminal.setFormatter(_Lines(coordinates, time_format="%H:%M:%S"))
        logger.addHandler(terminal)
    return logger
