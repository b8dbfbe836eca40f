"""A disk that is really full, in the middle of a save."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatronish.checkpoint import newest_loadable
from megatronish.comm import single_process_group
from megatronish.errors import UserError
from tests.checkpoint.support import read_all, same, save

SHAPES = {"w": ((100_000,), "float32")}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    (tmp_path / "disk").mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path / "disk")]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a tmpfs needs root")
    yield tmp_path / "disk"
    subprocess.run(["umount", "-l", str(tmp_path / "disk")], check=True)


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint_whole(small_disk: Path) -> None:
    values = {step: {"w": torch.full((100_000,), float(step))} for step in (10, 20, 30)}
    for step in (10, 20):
        save(small_disk, step, shapes=SHAPES, values=values[step])
    with pytest.raises(UserError) as caught:  # 0.4 MB each: the third does not fit
        save(small_disk, 30, shapes=SHAPES, values=values[30])
    (line,) = str(caught.value).splitlines()
    assert "step 30" in line and "rank 0: No space left on device; free space, lower checkpoint.keep or change run_root" in line
    assert sorted(path.name for path in small_disk.iterdir()) == ["step-00000010", "step-00000020"]
    checkpoint = newest_loadable(small_disk, world=single_process_group(), log=lambda line: None)
    assert checkpoint is not None and checkpoint.step == 20
    assert same(read_all(checkpoint), values[20])
