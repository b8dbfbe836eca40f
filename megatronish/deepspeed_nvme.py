"""What DeepSpeed needs for parallel.offload=nvme: its asynchronous I/O, compiled at its first use, and a folder for each rank.

Does not import deepspeed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import weakref
from pathlib import Path

from megatronish.errors import UserError
from megatronish.packages import find_package

_PREFIX = "deepspeed-"
_LOCK = "lock"


def check_async_io() -> None:
    """UserError if DeepSpeed could not compile its asynchronous I/O, with all that is missing."""
    package = find_package("deepspeed")
    assert package is not None, "see check_engine"
    if any((package / "ops" / "aio").glob("async_io_op*.so")):
        return
    add_scripts_to_path()
    compiler = os.environ.get("CXX", "c++")
    missing = []
    if shutil.which("ninja") is None:
        missing.append("ninja (pip install ninja)")
    if shutil.which(compiler) is None:
        missing.append(f"the C++ compiler {compiler} (apt-get install g++; CXX names another)")
    elif not _compiles(compiler):
        missing.append("the header or library of libaio (apt-get install libaio-dev, dnf install libaio-devel)")
    if missing:
        raise UserError(
            f"parallel.offload=nvme: on {socket.gethostname()} DeepSpeed cannot compile its asynchronous I/O, for want of "
            f"{' and '.join(missing)}; install that on every node, or set parallel.offload to cpu"
        )


def _compiles(compiler: str) -> bool:
    """A program that includes libaio.h and is linked with libaio."""
    program = "#include <libaio.h>\nint main() { return io_queue_init(1, nullptr); }\n"
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, "-x", "c++", "-", "-o", f"{folder}/program", "-laio"]
        return subprocess.run(command, input=program, text=True, capture_output=True, check=False).returncode == 0


def add_scripts_to_path() -> None:
    """Let torch find the ninja that pip has installed beside this Python, though its environment is not active."""
    scripts = sysconfig.get_path("scripts")
    if shutil.which("ninja") is None and (Path(scripts) / "ninja").exists():
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), scripts])


class SwapFolder:
    """A folder of this process alone within parallel.offload_path: other runs, and ranks of an earlier life that are still alive,
    have theirs. Removed with this object or at exit; that of a killed rank, by the next rank that starts on the same disk."""

    def __init__(self, parent: Path, *, num_bytes: int) -> None:
        """UserError if `parent` cannot be written past the page cache, as DeepSpeed does, or has no room for `num_bytes`: it would
        not notice a write that fails."""
        try:
            parent.mkdir(parents=True, exist_ok=True)
            with (parent / f"{_PREFIX}{_LOCK}").open("w") as guard:
                fcntl.flock(guard, fcntl.LOCK_EX)
                _remove_abandoned(parent)
                if shutil.disk_usage(parent).free < num_bytes:
                    raise OSError(errno.ENOSPC, f"no room for {num_bytes / 1e9:.1f} GB of this rank's optimizer state")
                self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
                self._descriptor = os.open(self.path / _LOCK, os.O_CREAT | os.O_WRONLY | os.O_DIRECT)
                weakref.finalize(self, _remove, self.path, self._descriptor)
                fcntl.flock(self._descriptor, fcntl.LOCK_EX)
                os.posix_fallocate(self._descriptor, 0, max(num_bytes, 1))
        except OSError as error:
            reason = "its file system has no direct I/O" if error.errno == errno.EINVAL else error.strerror
            raise UserError(
                f"parallel.offload_path={parent} cannot be used on {socket.gethostname()}: {reason}; name a folder on a local disk"
            ) from None

    def release_reserve(self) -> None:
        """The room is about to be used."""
        os.ftruncate(self._descriptor, 0)


def _remove(path: Path, descriptor: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(descriptor)


def _remove_abandoned(parent: Path) -> None:
    """Folders that no living process holds."""
    for lock in parent.glob(f"{_PREFIX}*/{_LOCK}"):
        with lock.open() as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(lock.parent, ignore_errors=True)
