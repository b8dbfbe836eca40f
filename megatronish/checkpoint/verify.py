"""Is a checkpoint what was saved? Every file's size and digest, read once by one rank, one verdict on all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import torch

from megatronish.checkpoint.exchange import gather_rows
from megatronish.checkpoint.manifest import MANIFEST, FileEntry, Manifest, decode_manifest
from megatronish.checkpoint.storage import file_digest
from megatronish.comm import Group
from megatronish.errors import Fault, UserError, disk_error
from megatronish.retries import NUM_TRIES, retried

_CPU = torch.device("cpu")
SOUND, MISSING, SIZE, CHANGED, SWAPPED, UNREADABLE = range(6)
_MAX_NAMED = 4
_ADVICE = "another start may read it; if none does, remove this checkpoint to go on from the one before"
_FOUND, _REFUSED, _CANNOT_READ = 1, 0, -1


@dataclass(frozen=True)
class Finding:
    """What is wrong with one file, as numbers."""

    code: int = SOUND
    file: int = -1
    """Number of the file in the manifest."""
    detail: int = 0
    """SIZE: bytes found. SWAPPED: number of the file whose content it has. UNREADABLE: errno."""

    @property
    def may_pass(self) -> bool:
        """The disk gave no answer, which says nothing about the file."""
        return self.code == UNREADABLE and disk_error(self.detail) is Fault

    def text(self, files: Sequence[FileEntry]) -> str:
        """For the user."""
        entry = files[self.file]
        if self.code == MISSING:
            return f"{entry.name} is missing"
        if self.code == SIZE:
            verb = "truncated" if self.detail < entry.size else "too long"
            return f"{entry.name} is {verb}: {self.detail} bytes, {entry.size} were saved"
        if self.code == SWAPPED:
            return f"{entry.name} was swapped: it has the content of {files[self.detail].name}"
        if self.code == UNREADABLE:
            return f"{entry.name} cannot be read: {os.strerror(self.detail)}"
        return f"{entry.name} was changed since it was saved: its digest differs"


def read_manifest(path: Path) -> Manifest:
    """The manifest of checkpoint `path`, checked. UserError if there is none, or it is not to be trusted; Fault if the disk gives
    no answer, time after time."""

    def read() -> bytes:
        try:
            return (path / MANIFEST).read_bytes()
        except FileNotFoundError:
            what = f"has no {MANIFEST}: not a checkpoint, or one that was copied in part" if path.is_dir() else "does not exist"
            raise UserError(f"checkpoint {path} {what}") from None

    try:
        data = retried(read)
    except OSError as error:
        kind = disk_error(error.errno)
        tries = f" ({NUM_TRIES} tries); {_ADVICE}" if kind is Fault else ""
        raise kind(f"checkpoint {path}: {MANIFEST} cannot be read: {error.strerror}{tries}") from None
    return decode_manifest(data, path / MANIFEST)


def inspect_file(path: Path, files: Sequence[FileEntry], number: int) -> Finding:
    """Read file `number` of the checkpoint `path` and compare it with what was saved."""
    try:
        return retried(lambda: _compare(path, files, number))
    except FileNotFoundError:
        return Finding(MISSING, number)
    except OSError as error:
        return Finding(UNREADABLE, number, error.errno or 0)


def _compare(path: Path, files: Sequence[FileEntry], number: int) -> Finding:
    entry = files[number]
    size = (path / entry.name).stat().st_size
    like_it = [i for i, other in enumerate(files) if other.size == size and i != number]
    if size != entry.size and not like_it:
        return Finding(SIZE, number, size)
    digest = file_digest(path / entry.name)
    if size == entry.size and digest == entry.digest:
        return Finding()
    for i in like_it:
        if files[i].digest == digest:
            return Finding(SWAPPED, number, i)
    return Finding(SIZE, number, size) if size != entry.size else Finding(CHANGED, number)


def inspect_part(path: Path, files: Sequence[FileEntry], index: int, count: int) -> list[Finding]:
    """What is wrong with files index, index + count, ...: the part of reader `index` of `count`. One that the disk gives no answer
    for is the only one named: no file after it is tried."""
    findings = []
    for number in range(index, len(files), count):
        finding = inspect_file(path, files, number)
        if finding.may_pass:
            return [finding]
        if finding.code != SOUND:
            findings.append(finding)
    return findings


def examine(path: Path, *, world: Group, device: torch.device) -> tuple[Manifest | None, str | None]:
    """(manifest, None) if the checkpoint is sound, (None, what is wrong) if not: the same verdict on every rank. Collective over
    `world`: one all-gather of fixed size. File i is read by rank i mod world.size. Fault, on every rank, if the disk gives any rank
    no answer: that is no verdict."""
    manifest, own_problem, found_it = None, "", _REFUSED
    findings: list[Finding] = []
    try:
        manifest = read_manifest(path)
        findings = inspect_part(path, manifest.files, world.index, world.size)
        found_it = _FOUND
    except UserError as error:
        own_problem, found_it = str(error), _CANNOT_READ if isinstance(error, Fault) else _REFUSED
    except Exception as error:  # the other ranks are waiting in the all-gather
        manifest, own_problem = None, f"checkpoint {path} could not be examined: {error!r}"
    named = [*findings, *[Finding()] * _MAX_NAMED][:_MAX_NAMED]
    numbers = [number for finding in named for number in astuple(finding)]
    rows = gather_rows(
        [found_it, manifest.fingerprint if manifest else 0, len(findings), *numbers],
        world,
        device,
        what="verdict on a checkpoint",
    )
    unanswered = [rank for rank, row in enumerate(rows) if row[0] == _CANNOT_READ]
    if unanswered:
        other = f"checkpoint {path}: rank {unanswered[0]} cannot read its {MANIFEST} now; {_ADVICE}"
        raise Fault(own_problem if found_it == _CANNOT_READ else other)
    blind = [rank for rank, row in enumerate(rows) if row[0] == _REFUSED]
    if blind:
        return None, own_problem or f"checkpoint {path}: rank {blind[0]} could not use its {MANIFEST}"
    assert manifest is not None
    others = [rank for rank, row in enumerate(rows) if row[1] != rows[0][1]]
    if others:
        return None, f"checkpoint {path}: ranks 0 and {others[0]} see different manifests"
    found = [Finding(*row[i : i + 3]) for row in rows for i in range(3, len(row), 3)]
    if passing := next((finding for finding in found if finding.may_pass), None):
        raise Fault(f"checkpoint {path}: {passing.text(manifest.files)} ({NUM_TRIES} tries); {_ADVICE}")
    unsound = sorted((finding for finding in found if finding.code != SOUND), key=lambda finding: finding.file)[:_MAX_NAMED]
    if unsound:
        total = sum(row[2] for row in rows)
        more = f"; and {total - len(unsound)} more of {len(manifest.files)} files" if total > len(unsound) else ""
        return None, f"checkpoint {path}: {'; '.join(finding.text(manifest.files) for finding in unsound)}{more}"
    return manifest, None


def verify_checkpoint(path: Path, *, world: Group, device: torch.device = _CPU) -> None:
    """UserError, the same on every rank, unless the manifest is sound and every file has the size and the digest it was saved with.
    Names the first files that are missing, truncated, changed or swapped, and their number. Reads every byte once. Fault as
    `examine`.
    Collective over `world`; `device` as in `save_checkpoint`."""
    _, problem = examine(path, world=world, device=device)
    if problem:
        raise UserError(problem)
