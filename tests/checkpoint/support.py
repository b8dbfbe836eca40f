"""Ranks as threads, a tiny model's state in any layout, and disks that fail: what the tests of checkpoints share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatronish.checkpoint import Checkpoint, FileStorage, Piece, SaveJob, TensorSpec, pieces_of_slice, save_checkpoint, whole_box
from megatronish.comm import Group, single_process_group
from megatronish.layout import Rectangle, shard_range


class Meeting:
    """Where the threads of one world exchange tensors."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.slots: list[Tensor | None] = [None] * size
        self.num_collectives = 0


@dataclass(frozen=True)
class ThreadGroup(Group):
    """One thread's view of a world of threads."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1))


def gather_among_threads(x: Tensor, group: Group, *, what: str = "") -> Tensor:
    """Stands for `comm.all_gather` where ranks are threads."""
    assert isinstance(group, ThreadGroup)
    meeting = group.meeting
    meeting.slots[group.index] = x.clone()
    if meeting.barrier.wait() == 0:
        meeting.num_collectives += 1
    out = torch.cat([slot for slot in meeting.slots if slot is not None])
    meeting.barrier.wait()
    return out


def on_threads(size: int, function: Callable[[Group], Any]) -> list[Any]:
    """What `function` returned, or the exception it raised, on each rank."""
    meeting = Meeting(size)

    def rank(index: int) -> Any:
        try:
            return function(ThreadGroup("world", tuple(range(size)), index, meeting=meeting))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(rank, range(size)))


@dataclass(frozen=True)
class Layout:
    """Each tensor is cut over tp along `shard_dim` (if it has one), and each shard, flattened, over dp: as ZeRO cuts it."""

    tp: int
    dp: int
    shard_dim: int = 0

    @property
    def size(self) -> int:
        return self.tp * self.dp

    def held(self, shape: tuple[int, ...], rank: int) -> Rectangle:
        box = whole_box(shape)
        if self.shard_dim >= len(shape):
            return box if rank % self.tp == 0 else Rectangle(box.offsets, (0,) * len(shape))
        start, stop = shard_range(shape[self.shard_dim], rank % self.tp, self.tp)
        offsets, sizes = list(box.offsets), list(box.sizes)
        offsets[self.shard_dim], sizes[self.shard_dim] = start, stop - start
        return Rectangle(tuple(offsets), tuple(sizes))

    def pieces(self, shapes: Mapping[str, TensorSpec], rank: int) -> list[Piece]:
        return [piece for name, (shape, _) in shapes.items() for piece, _ in self.slices(name, shape, rank)]

    def slices(self, name: str, shape: tuple[int, ...], rank: int) -> Iterator[tuple[Piece, int]]:
        if not shape:
            if rank == 0:
                yield Piece(name, Rectangle((), ())), 0
            return
        held = self.held(shape, rank)
        yield from pieces_of_slice(name, held, *shard_range(held.num_elements, rank // self.tp, self.dp))


SHAPES: dict[str, TensorSpec] = {
    "layers.0.up": ((6, 5), "float32"),
    "layers.0.norm": ((7,), "bfloat16"),
    "exp_avg/layers.0.qkv": ((3, 2, 4), "float32"),
    "count": ((), "int64"),
}


def values_of(shapes: Mapping[str, TensorSpec], seed: int) -> dict[str, Tensor]:
    """Random whole tensors."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * 100).to(getattr(torch, dtype)) for name, (shape, dtype) in shapes.items()
    }


def part(values: Mapping[str, Tensor], pieces: Sequence[Piece]) -> list[tuple[Piece, Tensor]]:
    """The values of each piece."""
    return [(p, values[p.tensor][p.box.within(whole_box(tuple(values[p.tensor].shape)))]) for p in pieces]


def save(
    root: Path,
    step: int,
    *,
    group: Group | None = None,
    layout: Layout | None = None,
    shapes: Mapping[str, TensorSpec] | None = None,
    storage: Any = None,
    keep: int = 10,
    state: Mapping[str, Any] | None = None,
    token: str | None = None,
    values: Mapping[str, Tensor] | None = None,
    log: Callable[[str], None] = lambda line: None,
    require_current: Callable[[], object] = lambda: None,
) -> Path:
    """One rank's save of random values whose seed is the step."""
    group = group or single_process_group()
    layout = layout or Layout(1, 1)
    shapes = SHAPES if shapes is None else shapes
    values = values_of(shapes, step) if values is None else values
    return save_checkpoint(
        SaveJob(
            root,
            step=step,
            local=part(values, layout.pieces(shapes, group.index)),
            pieces_of_rank=lambda rank: layout.pieces(shapes, rank),
            shapes=shapes,
            state={"consumed_samples": step * 8} if state is None else state,
            world=group,
            keep=keep,
            storage=storage or FileStorage(),
            token=token,
            log=log,
            require_current=require_current,
        )
    )


def save_all(root: Path, step: int, layout: Layout, **options: Any) -> list[Any]:
    """A save by every rank of `layout`: what each returned or raised."""
    return on_threads(layout.size, lambda group: save(root, step, group=group, layout=layout, **options))


def read_all(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every tensor, whole."""
    out = {}
    for name, (shape, dtype) in checkpoint.tensors().items():
        out[name] = torch.empty(shape, dtype=getattr(torch, dtype))
        checkpoint.read(name, whole_box(shape), out[name])
    return out


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Bit for bit."""
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


class Crash(BaseException):
    """The process is gone: nothing that handles an Exception runs."""


class FailingStorage(FileStorage):
    """Does `fail` at call number `at` (from 0), in the middle of it: a write has then reached the disk in part."""

    def __init__(self, at: int, fail: Callable[[], None]) -> None:
        self.at, self.fail, self.calls = at, fail, 0

    def _now(self) -> bool:
        self.calls += 1
        return self.calls - 1 == self.at

    def make_directory(self, path: Path) -> None:
        if self._now():
            self.fail()
        super().make_directory(path)

    def write_tensors(self, path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
        now = self._now()
        result = super().write_tensors(path, tensors)
        if now:
            path.write_bytes(path.read_bytes()[: result[0] // 2])
            self.fail()
        return result

    def write_bytes(self, path: Path, data: bytes) -> None:
        now = self._now()
        super().write_bytes(path, data[: len(data) // 2] if now else data)
        if now:
            self.fail()

    def sync_directory(self, path: Path) -> None:
        if self._now():
            self.fail()
        super().sync_directory(path)

    def rename(self, source: Path, target: Path) -> None:
        if self._now():
            self.fail()
        super().rename(source, target)

    def remove(self, path: Path) -> None:
        if self._now():
            inside = sorted(path.iterdir()) if path.is_dir() else []
            if inside:
                inside[0].unlink()
            self.fail()
        super().remove(path)
