from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest
from torch import Tensor

from megatronish.checkpoint import FileStorage, find_checkpoints, newest_loadable, open_checkpoint, verify_checkpoint
from megatronish.checkpoint.manifest import file_name
from megatronish.comm import single_process_group
from megatronish.errors import Superseded, UserError
from tests.checkpoint.support import SHAPES, Crash, FailingStorage, Layout, on_threads, read_all, same, save, save_all, values_of

WORLD = single_process_group()


def crash() -> None:
    raise Crash


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def disk_full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def num_calls(root: Path) -> int:
    """Storage calls of the third save of a run that keeps two: it removes one too."""
    storage = FailingStorage(-1, crash)
    for step in (10, 20):
        save(root, step, keep=2)
    save(root, 30, keep=2, storage=storage)
    assert len(find_checkpoints(root)) == 2
    return storage.calls


def newest(root: Path) -> int:
    """The step resumed from; what is loaded is checked."""
    lines: list[str] = []
    checkpoint = newest_loadable(root, world=WORLD, log=lines.append)
    assert checkpoint is not None and lines == []
    assert same(read_all(checkpoint), values_of(SHAPES, checkpoint.step))
    return checkpoint.step


@pytest.mark.parametrize("token", [None, "launch"])
def test_a_crash_at_any_call_leaves_a_whole_newest_checkpoint_and_the_next_attempt_succeeds(
    tmp_path: Path, token: str | None
) -> None:
    calls = num_calls(tmp_path / "count")
    assert calls >= 10
    resumed = set()
    for at in range(calls):
        root = tmp_path / str(at)
        for step in (10, 20):
            save(root, step, keep=2)
        with pytest.raises(Crash):
            save(root, 30, keep=2, storage=FailingStorage(at, crash), token=token and token + "1")
        step = newest(root)
        resumed.add(step)
        if step == 20:
            assert same(read_all(open_checkpoint(root / "step-00000010")), values_of(SHAPES, 10))
            save(root, 30, keep=2, token=token and token + "2")
        save(root, 40, keep=2)
        assert sorted(p.name for p in root.iterdir()) == ["step-00000030", "step-00000040"]
        assert newest(root) == 40
    assert resumed == {20, 30}


def save_and_die(root: Path, at: int) -> None:
    save(root, 30, keep=2, storage=FailingStorage(at, die))


@pytest.mark.slow
def test_sigkill_at_any_call_leaves_a_whole_newest_checkpoint(tmp_path: Path) -> None:
    calls = num_calls(tmp_path / "count")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "tests.preload", "tests.checkpoint.support"])
    for at in range(calls):
        root = tmp_path / str(at)
        for step in (10, 20):
            save(root, step, keep=2)
        process = context.Process(target=save_and_die, args=(root, at))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert newest(root) in (20, 30)


class FailsOnRank(FileStorage):
    """One rank's disk fails while it writes."""

    def __init__(self, rank: int, error: Exception) -> None:
        self.rank, self.error = rank, error

    def write_tensors(self, path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
        if path.name == file_name(self.rank):
            path.write_bytes(b"part")
            raise self.error
        return super().write_tensors(path, tensors)


def test_a_full_disk_on_one_rank_is_raised_by_all_and_leaves_nothing_behind(tmp_path: Path) -> None:
    layout = Layout(1, 3)
    save_all(tmp_path, 10, layout)
    errors = save_all(tmp_path, 20, layout, storage=FailsOnRank(2, OSError(errno.ENOSPC, "No space left on device")), keep=1)
    for error in errors:
        assert isinstance(error, UserError)
        assert "step 20" in str(error) and "rank 2: No space left on device" in str(error) and "run_root" in str(error)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000010"]
    assert newest(tmp_path) == 10


def test_a_disk_that_is_full_at_any_call_never_costs_a_checkpoint(tmp_path: Path) -> None:
    for at in range(num_calls(tmp_path / "count")):
        root, lines = tmp_path / str(at), []
        for step in (10, 20):
            save(root, step, keep=2)
        try:
            save(root, 30, keep=2, storage=FailingStorage(at, disk_full), log=lines.append)
            saved = True
        except (UserError, OSError):
            saved = False
        # Removing old ones is all that may fail without failing the save; it is then said.
        assert newest(root) == 30 if saved else newest(root) in (20, 30)
        assert not saved or lines


def test_another_failure_is_raised_by_all_and_its_reason_by_the_rank_that_has_it(tmp_path: Path) -> None:
    errors = save_all(tmp_path, 20, Layout(1, 3), storage=FailsOnRank(1, KeyError("what")))
    assert all(isinstance(error, RuntimeError) and "rank 1 failed" in str(error) for error in errors)
    assert "KeyError('what')" in str(errors[1]) and "KeyError" not in str(errors[0])
    assert list(tmp_path.iterdir()) == []


def test_pieces_that_do_not_tile_or_are_not_those_planned_are_never_saved(tmp_path: Path) -> None:
    values = values_of(SHAPES, 1)

    class Gap(Layout):
        def pieces(self, shapes, rank):  # type: ignore[no-untyped-def]
            return super().pieces(shapes, rank)[1:]

    with pytest.raises(RuntimeError, match=r"layers.0.up do not tile it: element"):
        save(tmp_path, 1, layout=Gap(1, 1))
    with pytest.raises(RuntimeError, match="not JSON compliant"):
        save(tmp_path, 1, state={"loss": float("nan")})
    with pytest.raises(RuntimeError, match="float64, its tensor float32"):
        save(tmp_path, 1, values=values | {"layers.0.up": values["layers.0.up"].double()})
    assert list(tmp_path.iterdir()) == []


def test_ranks_with_different_states_are_told(tmp_path: Path) -> None:
    results = on_threads(2, lambda group: save(tmp_path, 1, group=group, layout=Layout(1, 2), state={"seed": group.index}))
    assert all("rank 1 came with another step, token or state" in str(error) for error in results)
    assert find_checkpoints(tmp_path) == []


@pytest.mark.parametrize("token", [None, "launch"])
def test_leftovers_of_an_attempt_on_more_ranks_are_not_mixed_in(tmp_path: Path, token: str | None) -> None:
    # An earlier attempt on five ranks died before rank 0 listed their files; those were of other values.
    class DiesBeforeListing(FileStorage):
        def write_bytes(self, path: Path, data: bytes) -> None:
            raise Crash

    with pytest.raises(Crash):
        save(tmp_path / "run", 20, storage=DiesBeforeListing(), token=token)
    (left,) = (tmp_path / "run").iterdir()
    assert ".tmp-" in left.name
    other = save(tmp_path / "other", 21)
    for rank in range(5):
        (left / file_name(rank)).write_bytes((other / file_name(0)).read_bytes())
    paths = save_all(tmp_path / "run", 20, Layout(1, 2), token=token)
    assert sorted(p.name for p in paths[0].iterdir()) == ["manifest.json", file_name(0), file_name(1)]
    verify_checkpoint(paths[0], world=WORLD)
    assert same(read_all(open_checkpoint(paths[0])), values_of(SHAPES, 20))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["step-00000020"]


def test_leftovers_are_removed_by_the_next_save_but_later_attempts_are_not(tmp_path: Path) -> None:
    for name in ("step-00000005.tmp-aa", "step-00000010.tmp-bb", "step-00000099.tmp-cc", "step-00000005.bad-dd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / file_name(0)).write_bytes(b"x")
    save(tmp_path, 10)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000005.bad-dd", "step-00000010", "step-00000099.tmp-cc"]


def test_a_sound_checkpoint_is_never_written_again(tmp_path: Path) -> None:
    layout = Layout(1, 2)
    (path, _) = save_all(tmp_path, 10, layout)
    before = {p.name: (p.stat().st_ino, p.read_bytes()) for p in path.iterdir()}
    for error in save_all(tmp_path, 10, layout):
        assert isinstance(error, UserError) and "exists and is sound" in str(error)
    assert before == {p.name: (p.stat().st_ino, p.read_bytes()) for p in path.iterdir()}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_sound_checkpoint_that_a_life_did_not_resume_from_is_set_aside_whole_and_replaced(tmp_path: Path) -> None:
    layout, lines = Layout(1, 2), []
    (path, _) = save_all(tmp_path, 10, layout, token="slurm-7.0", values=values_of(SHAPES, 1))
    assert save_all(tmp_path, 10, layout, token="slurm-7.1", log=lines.append) == [path, path]
    assert newest(tmp_path) == 10
    (aside,) = (p for p in tmp_path.iterdir() if p != path)
    assert aside.name.startswith("step-00000010.bad-") and same(read_all(open_checkpoint(aside)), values_of(SHAPES, 1))
    assert len(lines) == 1 and "is sound, but this life did not resume from it; it is set aside as " + aside.name in lines[0]


def test_a_life_that_is_over_sets_no_checkpoint_of_the_next_one_aside(tmp_path: Path) -> None:
    path = save(tmp_path, 10, token="slurm-7.1", values=values_of(SHAPES, 1))
    asked: list[int] = []

    def require_current() -> None:
        asked.append(1)
        if len(asked) > 1:  # the next life began while this one wrote
            raise Superseded("over")

    with pytest.raises(Superseded):
        save(tmp_path, 10, token="slurm-7.0", require_current=require_current)
    assert list(tmp_path.iterdir()) == [path] and same(read_all(open_checkpoint(path)), values_of(SHAPES, 1))


def test_a_damaged_checkpoint_of_the_same_step_is_set_aside(tmp_path: Path) -> None:
    layout, lines = Layout(1, 2), []
    for _ in range(2):
        save_all(tmp_path, 10, layout, log=lines.append)
        (tmp_path / "step-00000010" / file_name(1)).write_bytes(b"damaged")
    save_all(tmp_path, 10, layout, log=lines.append)
    names = sorted(p.name.partition(".bad-")[0] for p in tmp_path.iterdir())
    assert names == ["step-00000010"] * 3
    assert newest(tmp_path) == 10
    assert len(lines) == 2 and "rank-00001.safetensors" in lines[0] and "set aside as step-00000010.bad-" in lines[0]


def test_a_file_that_rank_0_does_not_see_is_a_disk_that_is_not_shared(tmp_path: Path) -> None:
    class Elsewhere(FileStorage):
        def write_tensors(self, path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
            result = super().write_tensors(path, tensors)
            if path.name == file_name(1):
                path.unlink()
            return result

    error, _ = save_all(tmp_path, 10, Layout(1, 2), storage=Elsewhere())
    assert isinstance(error, UserError) and "rank-00001.safetensors" in str(error) and "all ranks share" in str(error)
    assert list(tmp_path.iterdir()) == []


def test_the_final_manifest_fits_in_the_space_taken_before_the_ranks_agree(tmp_path: Path) -> None:
    sizes: list[int] = []

    class Recorded(FileStorage):
        def write_bytes(self, path: Path, data: bytes) -> None:
            sizes.append(len(data))
            super().write_bytes(path, data)

    (path, *_) = save_all(tmp_path, 10, Layout(2, 2), storage=Recorded())
    planned, final = sizes
    assert final <= planned
    assert json.loads((path / "manifest.json").read_bytes())["step"] == 10
