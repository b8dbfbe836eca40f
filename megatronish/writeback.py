"""Tell the kernel to begin writing a part of a file at once, so that the disk works early and fsync finds little left."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

_SYNC_FILE_RANGE_WRITE = 2


def begin_writing(descriptor: int, start: int, num_bytes: int) -> None:
    """Bytes start .. start + num_bytes - 1 of an open file, which the system has, go to the disk now. Does not wait. Advice: where
    the call is missing or fails, fsync does the work and has the error."""
    _sync_file_range()(descriptor, start, num_bytes, _SYNC_FILE_RANGE_WRITE)


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], object]:
    """Linux's call."""
    call = getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform.startswith("linux") else None
    if call is None:
        return lambda *arguments: None
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    found: Callable[[int, int, int, int], object] = call
    return found
