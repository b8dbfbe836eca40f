"""Write a checkpoint: all of it or nothing.

    every rank   own file -> step-N.tmp-<attempt>, flushed        rank 0 also: the manifest's space
    all          one all-gather of a row of numbers: failed or not, size, digest
    rank 0       manifest, flushed -> rename to step-N, flushed -> older ones removed

A directory named step-N is therefore complete, and nothing writes into it again. `background.py` takes the same steps beside the
training.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from megatronish.checkpoint.exchange import gather_rows
from megatronish.checkpoint.manifest import (
    MANIFEST,
    FileEntry,
    TensorSpec,
    as_signed,
    attempt_step_of,
    checkpoint_name,
    digest_from_numbers,
    digest_to_numbers,
    dtype_name,
    encode_manifest,
    file_name,
    step_of,
)
from megatronish.checkpoint.pieces import Piece, tiling_problem
from megatronish.checkpoint.storage import Storage
from megatronish.checkpoint.verify import verify_checkpoint
from megatronish.comm import Group
from megatronish.errors import Fault, Superseded, UserError, disk_error

_DISK, _INTERNAL, _SUPERSEDED = 1, 2, 3
_PLACEHOLDER_SIZE = 10**15
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """What a rank tells the others about its part."""

    failed: int = 0
    """0, _DISK (then `error_number` says which), _INTERNAL or _SUPERSEDED."""
    error_number: int = 0
    size: int = 0
    digest_high: int = 0
    digest_low: int = 0
    num_pieces: int = 0
    attempt: int = 0
    step_exists: int = 0
    """Rank 0: a directory step-N is there already."""
    pending: int = 0
    """It is not done yet, and the other numbers mean nothing: ask again."""


@dataclass(frozen=True)
class SaveJob:
    """One save. `shapes` and `state` (plain JSON) are the same on every rank."""

    root: Path
    step: int
    local: Sequence[tuple[Piece, Tensor]]
    """This rank's pieces and their values, any shape of that many elements, row-major."""
    pieces_of_rank: Callable[[int], Sequence[Piece]]
    """What rank i saves; over all ranks the pieces tile every tensor of `shapes` exactly once."""
    shapes: Mapping[str, TensorSpec]
    state: Mapping[str, Any]
    world: Group
    keep: int
    """How many checkpoints up to this step stay."""
    storage: Storage
    token: str | None = None
    """A word that the ranks of this launch share and no other launch has: it keeps the attempt's directory apart from one that a
    launch before left behind, or is still writing."""
    device: torch.device = _CPU
    """Carries the rows of numbers: of the kind that `world` communicates on."""
    log: Callable[[str], None] = lambda line: None
    require_current: Callable[[], object] = lambda: None
    """Rank 0 asks, when it begins and just before the rename; raises Superseded if the run is another life's by now."""

    @cached_property
    def attempt(self) -> int:
        """A number that every rank of this attempt finds by itself. Without a token, an attempt that is made again after a crash
        may find its own leftovers: each rank replaces its file, and rank 0 removes what is not listed."""
        try:
            text = json.dumps([self.step, self.token, self.state], sort_keys=True, allow_nan=False)
        except (TypeError, ValueError):
            text = json.dumps([self.step, self.token])  # the manifest's own encoding reports it, after all ranks have met
        return as_signed(xxhash.xxh3_64_intdigest(text.encode()))

    @property
    def final(self) -> Path:
        """The complete checkpoint."""
        return self.root / checkpoint_name(self.step)

    @property
    def attempt_id(self) -> str:
        return f"{self.attempt & (1 << 64) - 1:016x}"

    @property
    def temporary(self) -> Path:
        return self.root / f"{checkpoint_name(self.step)}.tmp-{self.attempt_id}"


@dataclass(frozen=True)
class Part:
    """One rank's work before the ranks agree."""

    row: Row
    error: Exception | None = None
    plan: Sequence[Sequence[Piece]] = ()
    """Rank 0: what each rank saves."""


def save_checkpoint(job: SaveJob) -> Path:
    """Save this rank's part of a checkpoint, and the whole of it. Returns the path of step-N.

    Collective over `job.world`: one all-gather of fixed size (more only where step-N exists already: all ranks verify it; it is set
    aside as step-N.bad-<attempt> just before the new one takes its name, but a sound one is a UserError where the job has no token:
    no life owns the run). Waits for the device and the disk. If any rank fails
    before the all-gather, every rank raises (UserError for the disk's errors), naming the rank and the reason, and nothing is left
    behind. After it only rank 0 works; if it fails there, it alone raises, and step-N does not exist. Older checkpoints are
    untouched until step-N is complete; then all but the `keep` newest up to this step are removed."""
    part = write_own_part(job)
    rows = gather(job, part)
    accept(job, rows, part.error)
    if job.world.index == 0:
        commit(job, part.plan, rows)
    return job.final


def write_own_part(job: SaveJob) -> Part:
    """Write this rank's file. Never raises an Exception: a rank that did would leave the others waiting in the all-gather."""
    index, storage = job.world.index, job.storage
    try:
        if index == 0:
            job.require_current()
        tensors = _named_tensors(job)
        storage.make_directory(job.root)
        storage.make_directory(job.temporary)
        size, digest = storage.write_tensors(job.temporary / file_name(index), tensors) if tensors else (0, "0" * 32)
        plan: list[Sequence[Piece]] = []
        exists = 0
        if index == 0:
            plan = [job.pieces_of_rank(rank) for rank in range(job.world.size)]
            _check_plan(job, plan)
            # Takes the final manifest's space: a full disk shows here, while every rank can still be told.
            planned = [FileEntry(file_name(rank), _PLACEHOLDER_SIZE, "0" * 32) for rank in range(job.world.size)]
            storage.write_bytes(job.temporary / MANIFEST, _manifest(job, planned, plan))
            exists = int(checkpoint_name(job.step) in storage.names(job.root))
        storage.sync_directory(job.temporary)
        high, low = digest_to_numbers(digest)
        return Part(Row(0, 0, size, high, low, len(tensors), job.attempt, exists), plan=plan)
    except Exception as error:
        return Part(failure_row(job, error), error)


def failure_row(job: SaveJob, error: Exception) -> Row:
    """What a rank that failed tells the others."""
    if isinstance(error, OSError):
        return Row(_DISK, error.errno or 0, attempt=job.attempt)
    return Row(_SUPERSEDED if isinstance(error, Superseded) else _INTERNAL, attempt=job.attempt)


def gather(job: SaveJob, part: Part) -> list[Row]:
    """Every rank's row. Collective over `job.world`."""
    assumed = [astuple(replace(part.row, num_pieces=len(pieces))) for pieces in part.plan]
    return [
        Row(*values) for values in gather_rows(astuple(part.row), job.world, job.device, what="parts of a save", assumed=assumed)
    ]


def accept(job: SaveJob, rows: Sequence[Row], error: Exception | None) -> None:
    """Raise, on every rank, what made any of them fail (`error`: this rank's own); and, which is collective, if step-N is there and
    must stay."""
    try:
        _raise_failures(job, rows, error)
        if rows[0].step_exists:
            _require_replaceable(job)
    except Exception:
        if job.world.index == 0:
            _remove_quietly(job, job.temporary)
        raise


def commit(job: SaveJob, plan: Sequence[Sequence[Piece]], rows: Sequence[Row]) -> None:
    """Rank 0, every file being on disk: make it a checkpoint, and remove older ones."""
    try:
        _finish(job, plan, rows)
    except Exception:
        _remove_quietly(job, job.temporary)
        raise
    try:
        _remove_old(job)
    except OSError as error:
        job.log(f"could not remove old checkpoints of {job.root}: {error}")


def _named_tensors(job: SaveJob) -> dict[str, Tensor]:
    """This rank's pieces by key, in their boxes' shapes."""
    planned = {piece.key: piece for piece in job.pieces_of_rank(job.world.index)}
    tensors = {}
    for piece, tensor in job.local:
        if planned.get(piece.key) != piece or piece.key in tensors:
            raise ValueError(f"piece {piece.key} of size {piece.box.sizes} is not what pieces_of_rank says")
        if dtype_name(tensor.dtype) != job.shapes[piece.tensor][1]:
            raise ValueError(f"piece {piece.key} is {tensor.dtype}, its tensor {job.shapes[piece.tensor][1]}")
        tensors[piece.key] = tensor.detach().reshape(piece.box.sizes)
    if len(tensors) != len(planned):
        raise ValueError(f"{len(tensors)} pieces given, pieces_of_rank says {len(planned)}")
    return tensors


def _check_plan(job: SaveJob, plan: Sequence[Sequence[Piece]]) -> None:
    """ValueError unless the pieces of all ranks tile every tensor."""
    boxes: dict[str, list[Piece]] = {name: [] for name in job.shapes}
    for piece in (piece for of_rank in plan for piece in of_rank):
        boxes[piece.tensor].append(piece)
    for name, (shape, _) in job.shapes.items():
        rows = (len(boxes[name]), len(shape))
        offsets = np.array([p.box.offsets for p in boxes[name]], dtype=np.int64).reshape(rows)
        sizes = np.array([p.box.sizes for p in boxes[name]], dtype=np.int64).reshape(rows)
        if problem := tiling_problem(shape, offsets, sizes):
            raise ValueError(f"the pieces of tensor {name} do not tile it: {problem}")


def _manifest(job: SaveJob, entries: Sequence[FileEntry], plan: Sequence[Sequence[Piece]]) -> bytes:
    """A rank that owns nothing has no file."""
    files = [(entry, pieces) for entry, pieces in zip(entries, plan, strict=True) if pieces]
    return encode_manifest(job.step, job.state, job.shapes, files)


def _raise_failures(job: SaveJob, rows: Sequence[Row], error: Exception | None) -> None:
    """The same outcome on every rank."""
    where = f"checkpoint of step {job.step} in {job.root} was not saved"
    for rank, row in enumerate(rows):
        if row.failed == _DISK:
            reason = os.strerror(row.error_number) if row.error_number else "input/output failed"
            full = row.error_number in (errno.ENOSPC, errno.EDQUOT)
            advice = "free space, lower checkpoint.keep or change run_root" if full else "check run_root"
            kind = disk_error(row.error_number)
            raise kind(f"{where}: rank {rank}: {reason}; {advice}. Earlier checkpoints are whole") from error
        if row.failed == _SUPERSEDED:
            raise Superseded(f"{where}: a later life of the run has begun; this one ends")
        if row.failed:
            why = repr(error) if error and rank == job.world.index else "its log says why"
            raise RuntimeError(f"{where}: rank {rank} failed: {why}. Earlier checkpoints are whole") from error
    for rank, row in enumerate(rows):
        if row.attempt != rows[0].attempt:
            raise RuntimeError(f"{where}: rank {rank} came with another step, token or state than rank 0")


def _require_replaceable(job: SaveJob) -> None:
    """step-N is there. UserError if it must stay. Collective.

    Training comes to a step twice only if it did not resume from what it saved the first time: that was refused, or not seen, or
    is of a branch that was given up. A token is of the life that owns the run: whether it still does is asked just before."""
    try:
        verify_checkpoint(job.final, world=job.world, device=job.device)
        problem = f"checkpoint {job.final} is sound, but this life did not resume from it"
    except UserError as error:
        if job.token is None and isinstance(error, Fault):
            raise
        problem = str(error)
    else:
        if job.token is None:
            raise UserError(
                f"checkpoint {job.final} exists and is sound; it is never written again: remove it or use another run name"
            )
    if job.world.index == 0:
        job.log(f"{problem}; it is set aside as {_name_aside(job)}")


def _name_aside(job: SaveJob) -> str:
    """The first that is free."""
    name, taken = f"{job.final.name}.bad-{job.attempt_id}", job.storage.names(job.root)
    while name in taken:
        name += "-"
    return name


def _finish(job: SaveJob, plan: Sequence[Sequence[Piece]], rows: Sequence[Row]) -> None:
    """Rank 0, every file being on disk: list them, and let the name say so."""
    entries = []
    for rank, (row, pieces) in enumerate(zip(rows, plan, strict=True)):
        path = job.temporary / file_name(rank)
        if row.num_pieces != len(pieces):
            raise RuntimeError(f"rank {rank} saved {row.num_pieces} pieces, rank 0 expected {len(pieces)}")
        if pieces and not job.storage.holds(path, row.size):
            raise UserError(
                f"rank 0 does not see {path} ({row.size} bytes) of rank {rank}: run_root must be on a disk that all ranks share"
            )
        entries.append(FileEntry(path.name, row.size, digest_from_numbers(row.digest_high, row.digest_low)))
    listed = {MANIFEST, *(entry.name for entry, pieces in zip(entries, plan, strict=True) if pieces)}
    for name in job.storage.names(job.temporary):
        if name not in listed:
            job.storage.remove(job.temporary / name)
    job.storage.write_bytes(job.temporary / MANIFEST, _manifest(job, entries, plan))
    job.storage.sync_directory(job.temporary)
    job.require_current()
    if rows[0].step_exists:
        job.storage.rename(job.final, job.root / _name_aside(job))
    job.storage.rename(job.temporary, job.final)
    job.storage.sync_directory(job.root)


def _remove_old(job: SaveJob) -> None:
    """Rank 0, step-N being complete: remove what is no longer needed. Failing here costs disk space, not the run.

    Steps after N are left alone: they were refused when this run resumed before them, and are looked at when their turn comes."""
    steps = sorted((step, name) for name in job.storage.names(job.root) if (step := step_of(name)) is not None and step < job.step)
    older = [name for _, name in steps if MANIFEST in job.storage.names(job.root / name)]  # one that lost it does not count
    for name in job.storage.names(job.root):
        attempt_step = attempt_step_of(name)
        if attempt_step is not None and attempt_step <= job.step:
            _remove_quietly(job, job.root / name)
    for name in older[: max(0, len(older) - (job.keep - 1))]:
        # A half-removed directory must not be called step-N.
        gone = job.root / f"{name}.tmp-removed-{job.attempt_id}"
        job.storage.rename(job.root / name, gone)
        _remove_quietly(job, gone)


def _remove_quietly(job: SaveJob, path: Path) -> None:
    try:
        job.storage.remove(path)
    except OSError as error:
        job.log(f"could not remove {path}: {error}")
