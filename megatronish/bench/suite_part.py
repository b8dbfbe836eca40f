"""One part of the suite, as a process: `python -m megatronish.bench.suite_part MODULE:FUNCTION KIND OUT SECONDS`."""

from __future__ import annotations

import importlib
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatronish.json_file import write_json


@dataclass(frozen=True)
class Request:
    """What a part is asked: `function(request)` measures, and saves what it has as it goes on."""

    device_kind: str
    """cuda, cpu, or auto (`describe` alone)."""
    out: Path
    seconds: float
    """What it has from its start; a part that cannot do all leaves the last out."""
    started: float = field(default_factory=time.monotonic)

    @property
    def on_gpu(self) -> bool:
        return self.device_kind == "cuda"

    @property
    def seconds_left(self) -> float:
        """A tenth is kept for what goes on when the time is over."""
        return self.started + 0.9 * self.seconds - time.monotonic()

    def save(self, result: dict[str, Any]) -> None:
        """What is known so far: it is kept whatever comes after."""
        write_json(self.out, result)

    def tell(self, line: str) -> None:
        """A line of progress."""
        print(line, flush=True)


if __name__ == "__main__":
    target, kind, out, seconds = sys.argv[1:]
    module, _, function = target.partition(":")
    getattr(importlib.import_module(module), function)(Request(kind, Path(out), float(seconds)))
    sys.stdout.flush()
    os._exit(0)  # all is saved; to take torch apart costs seconds of its time
