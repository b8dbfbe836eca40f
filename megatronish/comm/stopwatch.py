"""Times single calls on a device, for benches: by events on a GPU, with its L2 cache flushed before each, else by the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

_LEAST_FLUSH = 256 << 20
"""Bytes: writing them takes some 0.1 ms on the fastest GPUs, in which the host enqueues what is timed next."""


class Stopwatch:
    """For one device. Waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush: torch.Tensor | None = None
        if device.type == "cuda":
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(max(_LEAST_FLUSH, 2 * cache), dtype=torch.int8, device=device)

    def seconds(self, call: Callable[[], Any], repeats: int, before: Callable[[], Any] = lambda: None) -> float:
        """The median over `repeats` of what one call takes; `before` comes before each and is not timed."""
        if self._flush is None:
            return statistics.median(self._on_host(call, before) for _ in range(repeats))
        events = []
        for _ in range(repeats):
            before()
            self._flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize(self.device)
        return statistics.median(begin.elapsed_time(end) / 1e3 for begin, end in events)

    @staticmethod
    def _on_host(call: Callable[[], Any], before: Callable[[], Any]) -> float:
        before()
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    def extra_bytes(self, call: Callable[[], Any]) -> int | None:
        """The most that a call's tensors, its results among them, take at a time; None on CPU, where nobody counts."""
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        held = torch.cuda.memory_allocated(self.device)
        kept = call()
        most = torch.cuda.max_memory_allocated(self.device) - held
        del kept
        return most


def free_cached_memory(device: torch.device) -> None:
    """Give back what torch's allocator keeps for later."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def toolkit_version() -> str | None:
    """Of CUDA, that torch was built with."""
    return torch.version.cuda
