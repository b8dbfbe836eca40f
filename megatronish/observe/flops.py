"""The matrix rate that MFU is measured against on a CPU, whose name says little. GPUs have a table: `formulas.peak_tflops`."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

_SIZE = 384  # a product takes 0.5 to 1 ms: short enough to fit between two interruptions on a busy machine
_SECONDS = 0.15
_LEAST_PRODUCTS = 30  # where others have the cores, a few products are all interrupted


def measure_matmul_tflops(dtype: torch.dtype, threads: int | None = None) -> float:
    """TFLOP/s of products of square matrices of `dtype` on `threads` CPU threads, by default one on each core this process may use.

    The fastest product of 0.15 s on one thread, times `threads`: on a busy machine too, near the rate of the free one. Products on
    all threads at once do not give that: the threads wait for each other.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a, b = torch.ones(_SIZE, _SIZE, dtype=dtype), torch.ones(_SIZE, _SIZE, dtype=dtype)
        out = a @ b  # the first product makes buffers
        fastest, products = float("inf"), 0
        end = time.perf_counter() + _SECONDS
        while (start := time.perf_counter()) < end or products < _LEAST_PRODUCTS:
            torch.mm(a, b, out=out)
            fastest, products = min(fastest, time.perf_counter() - start), products + 1
    finally:
        torch.set_num_threads(before)
    return (threads or num_cores()) * 2 * _SIZE**3 / fastest / 1e12


def num_cores() -> int:
    """Cores this process may use; two hardware threads of one core share its matrix units and count once."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/core_cpus_list")
        cores.add(siblings.read_text() if siblings.is_file() else f"{cpu}\n")
    return len(cores)
