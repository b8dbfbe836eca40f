"""What a device can do, measured beside what is compared with it: a product of square matrices, and a copy."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from megatronish.bench.kernel_op import Work

_MATRIX = {("cuda", 2): 8192, ("cuda", 4): 8192, ("cpu", 2): 256, ("cpu", 4): 512}
"""By bytes of an element: a processor without instructions for 16 bits is hundreds of times slower in them."""
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 64 << 20}


class Limits:
    """Both, as calls that take turns with others, in a dtype and on a device."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        n, num_bytes = _MATRIX[device.type, dtype.itemsize], _COPY_BYTES[device.type]
        generator = torch.Generator(device).manual_seed(0)
        self._a, self._b = (torch.randn(n, n, dtype=dtype, device=device, generator=generator) for _ in range(2))
        self._product = torch.empty_like(self._a)
        self._from, self._to = (torch.zeros(num_bytes // dtype.itemsize, dtype=dtype, device=device) for _ in range(2))
        self._flops, self._bytes, self._size = 2.0 * n**3, 2.0 * num_bytes, n
        self._seconds: dict[str, list[float]] = {"matrix": [], "copy": []}

    def matrix(self) -> None:
        """One product."""
        torch.mm(self._a, self._b, out=self._product)

    def copy(self) -> None:
        """One copy: each byte is read once and written once."""
        self._to.copy_(self._from)

    def note(self, matrix: list[float], copy: list[float]) -> None:
        """Seconds of both, of a case's rounds."""
        self._seconds["matrix"] += matrix
        self._seconds["copy"] += copy

    def seconds_of(self, work: Work, matrix: list[float], copy: list[float]) -> tuple[float, str]:
        """(the least that `work` can take by these rounds, `compute` or `memory`, whichever bounds it)."""
        compute = work.flops * statistics.median(matrix) / self._flops
        memory = work.bytes * statistics.median(copy) / self._bytes
        return max(compute, memory), "compute" if compute > memory else "memory"

    def summary(self) -> dict[str, Any]:
        """Medians of all that was noted."""

        def rate(work: float, seconds: list[float]) -> float | None:
            return work / statistics.median(seconds) if seconds else None

        matrix, copy = rate(self._flops, self._seconds["matrix"]), rate(self._bytes, self._seconds["copy"])
        return {
            "matrix_tflops": None if matrix is None else matrix / 1e12,
            "copy_gigabytes_per_second": None if copy is None else copy / 1e9,
            "matrix_size": self._size,
            "copy_bytes": int(self._bytes) // 2,
        }
