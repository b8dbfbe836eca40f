"""The demo's text, which every machine with Python has: the sources of the standard library, with held-out files apart."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import xxhash

from megatronish.errors import UserError

_EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "idlelib", "turtledemo", "_bundled"}
_MAX_SHARE = 0.25  # of the held-out bytes, that one file may be: one large table would be all of the measure


@dataclass(frozen=True)
class Corpus:
    """Paths of text files, in order of their relative paths."""

    train: list[Path]
    validation: list[Path]
    num_bytes: int


def standard_library(*, held_out: float = 0.03, root: Path | None = None) -> Corpus:
    """All .py files under `root` (the running Python's library), without tests and installed packages.

    Files are held out by the hash of their relative path until they make `held_out` of the bytes, so the choice does not depend
    on the machine or on the order of directories. Empty files and those not UTF-8 are left out. Raises UserError when none is left.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    sizes = {name: size for name in _relative_paths(root) if (size := _usable_bytes(root / name))}
    total = sum(sizes.values())
    budget = held_out * total
    validation: set[str] = set()
    for name in sorted(sizes, key=lambda name: (xxhash.xxh3_64_intdigest(name.encode()), name)):
        if sizes[name] <= min(budget, _MAX_SHARE * held_out * total):
            validation.add(name)
            budget -= sizes[name]
    if not validation or len(validation) == len(sizes):
        raise UserError(f"{root}: {len(sizes)} Python files of {total} bytes are too few for a corpus with a held-out part")
    names = sorted(sizes)
    return Corpus(
        train=[root / name for name in names if name not in validation],
        validation=[root / name for name in names if name in validation],
        num_bytes=total,
    )


def _relative_paths(root: Path) -> list[str]:
    found = (path.relative_to(root) for path in root.rglob("*.py"))
    return [path.as_posix() for path in found if not _EXCLUDED.intersection(path.parts[:-1])]


def _usable_bytes(path: Path) -> int:
    try:
        data = path.read_bytes()
        data.decode()
    except (OSError, UnicodeDecodeError):
        return 0
    return len(data)
