from __future__ import annotations

from pathlib import Path

from megatronish.checkpoint import newest_loadable
from megatronish.comm.groups import world_group
from tests.checkpoint.support import SHAPES, Layout, read_all, same, save, values_of
from tests.ranks import ranks


def save_twice(rank: int, root: Path, layout: Layout) -> list[str]:
    world = world_group(device_kind="cpu")
    return [save(root, step, group=world, layout=layout).name for step in (10, 20)]


def load_newest(rank: int, root: Path) -> tuple[int, bool, list[str]]:
    lines: list[str] = []
    checkpoint = newest_loadable(root, world=world_group(device_kind="cpu"), log=lines.append)
    assert checkpoint is not None
    return checkpoint.step, same(read_all(checkpoint), values_of(SHAPES, checkpoint.step)), lines


def test_processes_save_and_another_number_of_processes_agree_on_what_to_load(tmp_path: Path) -> None:
    assert ranks(4).run(save_twice, tmp_path, Layout(2, 2)) == [["step-00000010", "step-00000020"]] * 4
    assert ranks(2).run(load_newest, tmp_path) == [(20, True, [])] * 2
    (tmp_path / "step-00000020" / "rank-00003.safetensors").unlink()
    results = ranks(3).run(load_newest, tmp_path)
    assert results == [results[0]] * 3
    step, is_same, lines = results[0]
    assert (step, is_same) == (10, True)
    assert "step-00000020: rank-00003.safetensors is missing" in lines[0]
