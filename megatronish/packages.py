"""Optional packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def find_package(name: str) -> Path | None:
    """The folder of an installed package, which is not imported; None where there is none. A folder of that name in the working
    directory, as offline runs of wandb leave one, looks like a package without an origin."""
    spec = importlib.util.find_spec(name)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent
