"""A save beside the training: the same files, the values of its start, one failure for all ranks, never a wait for the disk."""

from __future__ import annotations

import errno
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatronish.checkpoint import BackgroundSaver, FileStorage, SaveJob, open_checkpoint
from megatronish.checkpoint.background import Staging
from megatronish.checkpoint.manifest import file_name
from megatronish.checkpoint.pieces import Piece, whole_box
from megatronish.comm import Group
from megatronish.errors import UserError
from tests.checkpoint.support import SHAPES, Layout, ThreadGroup, on_threads, part, read_all, same, save_all, values_of

LAYOUT = Layout(1, 3)


def job_of(root: Path, step: int, group: Group, values: Mapping[str, Tensor], *, storage: Any = None, **more: Any) -> SaveJob:
    """One rank's save of its part of `values`."""
    return SaveJob(
        root,
        step=step,
        local=part(values, LAYOUT.pieces(SHAPES, group.index)),
        pieces_of_rank=lambda rank: LAYOUT.pieces(SHAPES, rank),
        shapes=SHAPES,
        state={"consumed_samples": step * 8},
        world=group,
        keep=2,
        storage=storage or FileStorage(),
        **more,
    )


class Gate(FileStorage):
    """A disk that writes only while its gate is open."""

    def __init__(self) -> None:
        self.gate = threading.Event()

    def write_tensors(self, path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
        assert self.gate.wait(60)
        return super().write_tensors(path, tensors)


class Fails(FileStorage):
    """One call of one step fails."""

    def __init__(self, call: str, error: Exception, *, step: int, rank: int = 0) -> None:
        self.call, self.error, self.step, self.rank = call, error, step, rank

    def _now(self, call: str, path: Path) -> None:
        if self.call == call and f"step-{self.step:08d}" in str(path):
            raise self.error

    def write_tensors(self, path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
        if path.name == file_name(self.rank):
            self._now("write_tensors", path)
        return super().write_tensors(path, tensors)

    def rename(self, source: Path, target: Path) -> None:
        self._now("rename", source)
        super().rename(source, target)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_files_are_those_of_a_save_that_waits_and_hold_the_values_of_its_start(tmp_path: Path) -> None:
    save_all(tmp_path / "sync", 10, LAYOUT)
    gate = Gate()

    def rank(group: Group) -> list[Any]:
        values, saver = values_of(SHAPES, 10), BackgroundSaver()
        saver.start(job_of(tmp_path / "async", 10, group, values, storage=gate))
        for tensor in values.values():
            tensor.zero_()  # the next step
        polls = [saver.poll(), saver.step_under_way]
        gate.gate.set()
        saved = saver.finish()
        assert saved is not None
        return [*polls, saved.path, saver.step_under_way, saver.poll(), saver.finish()]

    final = tmp_path / "async/step-00000010"
    assert on_threads(3, rank) == [[None, 10, final, None, None, None]] * 3
    assert files(final) == files(tmp_path / "sync/step-00000010")


def test_polls_end_on_all_ranks_at_once_though_one_disk_is_slow_and_each_is_one_collective(tmp_path: Path) -> None:
    gate, groups = Gate(), []

    def rank(group: Group) -> tuple[int, int]:
        groups.append(group)
        saver = BackgroundSaver()
        saver.start(job_of(tmp_path, 10, group, values_of(SHAPES, 10), storage=gate if group.index == 1 else None))
        polls = before = 0
        while saver.step_under_way is not None:
            saver.poll()
            polls += 1
            if polls == 5:
                before = len(list(tmp_path.glob("step-00000010")))
                gate.gate.set()
        return polls, before

    results = on_threads(3, rank)
    (polls, before) = results[0]
    assert results == [(polls, before)] * 3 and polls >= 7 and before == 0
    assert isinstance(groups[0], ThreadGroup) and groups[0].meeting.num_collectives == polls
    assert same(read_all(open_checkpoint(tmp_path / "step-00000010")), values_of(SHAPES, 10))


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("storage", "kind", "words"),
    [
        (
            lambda: Fails("write_tensors", FULL, step=20, rank=2),
            UserError,
            "step 20 .* rank 2: No space left on device; free space",
        ),
        (lambda: Fails("rename", FULL, step=20), UserError, "step 20 .* rank 0: No space left on device; free"),
        (lambda: Fails("write_tensors", KeyError("what"), step=20, rank=1), RuntimeError, "rank 1 failed"),
    ],
    ids=["disk full", "disk full at the commit", "our failure"],
)
def test_a_failure_is_raised_by_the_next_poll_that_all_ranks_come_to_and_the_next_save_works(
    storage: Callable[[], Any], kind: type[Exception], words: str, tmp_path: Path
) -> None:
    disk = storage()

    def rank(group: Group) -> tuple[str, int]:
        saver = BackgroundSaver()
        for step in (10, 20, 30):
            saver.start(job_of(tmp_path, step, group, values_of(SHAPES, step), storage=disk))
            polls = 0
            try:
                while saver.step_under_way is not None:
                    saver.poll()
                    polls += 1
            except kind as error:
                assert step == 20 and saver.step_under_way is None
                said = str(error)
                if group.index == 0:  # it cleans up
                    assert not list(tmp_path.glob("step-00000020*"))
        return said, polls

    results = on_threads(3, rank)
    for said, _ in results:
        assert re.search(words, said), said
        assert "Earlier checkpoints are whole" in said
    for step in (10, 30):
        assert same(read_all(open_checkpoint(tmp_path / f"step-{step:08d}")), values_of(SHAPES, step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000030"]


def test_keep_is_honoured(tmp_path: Path) -> None:
    def rank(group: Group) -> None:
        saver = BackgroundSaver()
        for step in (10, 20, 30):
            saver.start(job_of(tmp_path, step, group, values_of(SHAPES, step)))
            saver.finish()

    assert on_threads(3, rank) == [None] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000020", "step-00000030"]


def test_copies_reuse_their_memory() -> None:
    shapes = {"b": ((700, 3), torch.bfloat16), "a": ((5000,), torch.float32), "c": ((2, 2), torch.float64), "d": ((), torch.int64)}
    pieces = [Piece(name, whole_box(shape)) for name, (shape, _) in shapes.items()]
    staging = Staging()
    addresses = []
    for seed in (1, 2):
        values = [(torch.randn(s, generator=torch.Generator().manual_seed(seed)) * 9).to(d) for s, d in shapes.values()]
        copies = staging.copy(list(zip(pieces, values, strict=True)))
        assert [piece for piece, _ in copies] == pieces
        assert all(torch.equal(copy, value) for (_, copy), value in zip(copies, values, strict=True))
        addresses.append([copy.data_ptr() for _, copy in copies])
    assert addresses[0] == addresses[1]
