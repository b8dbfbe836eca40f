"""What parallel.offload=nvme needs is looked for before a rank starts; each rank's folder on the disk."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import pytest

from megatronish.deepspeed_nvme import SwapFolder, check_async_io
from megatronish.errors import UserError

# Looked for, not imported: that takes seconds.
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="the package deepspeed is not here")


@needs_deepspeed
def test_what_is_missing_is_one_line_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError) as caught:
        check_async_io()
    assert "for want of ninja (pip install ninja) and the C++ compiler c++ (" in str(caught.value)
    assert str(caught.value).endswith("set parallel.offload to cpu") and "\n" not in str(caught.value)

    for name in ("ninja", "c++"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    with pytest.raises(UserError, match="for want of the header or library of libaio") as caught:
        check_async_io()
    assert "ninja" not in str(caught.value)


@needs_deepspeed
@pytest.mark.skipif(not Path("/usr/include/libaio.h").exists(), reason="libaio's header is not here")
def test_nothing_is_missing_where_libaio_and_a_compiler_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the environment that ninja is in is not active."""
    if shutil.which("c++", path=os.defpath) is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("PATH", os.defpath)
    check_async_io()


def test_a_rank_has_its_own_folder_and_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    first = SwapFolder(tmp_path, num_bytes=1)
    (first.path / "state.swp").touch()
    killed = tmp_path / "deepspeed-killed"
    killed.mkdir()
    (killed / "lock").touch()
    second = SwapFolder(tmp_path, num_bytes=1)
    assert second.path != first.path and not killed.exists()
    assert (first.path / "state.swp").exists(), "its owner lives"
    gone = first.path
    del first
    assert not gone.exists() and second.path.exists()


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"parallel\.offload_path=.*/file cannot be used on .*: File exists; name a folder"):
        SwapFolder(tmp_path / "file", num_bytes=1)
    with pytest.raises(UserError, match=r"no room for 4000000\.0 GB of this rank's optimizer state"):
        SwapFolder(tmp_path, num_bytes=4 * 10**15)
