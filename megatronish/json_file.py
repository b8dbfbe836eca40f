"""Results as a JSON file: checked before the work that they come from, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatronish.errors import UserError, disk_error


def writable(path: Path) -> Path:
    """`path`, if a file can be written there; else UserError, before anything is computed."""
    if not path.parent.is_dir():
        raise UserError(f"--json {path}: there is no folder {path.parent}")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--json {path}: cannot be written; name a file in a folder of yours")
    return path


def write_json(path: Path, values: Mapping[str, Any] | Sequence[Any], *, advice: str = "name another file") -> None:
    """Whole or not at all. UserError, or Fault (errors.disk_error), if the file cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise disk_error(error.errno)(f"{path}: cannot be written ({error.strerror}); {advice}") from None
