"""What launching a Triton kernel needs to know of shapes and of the device."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from megatronish.kernels.registry import accumulate_dtype


def wide_of(x: torch.Tensor) -> tl.dtype:
    """The accumulation dtype, in Triton's words."""
    return tl.float64 if accumulate_dtype(x) == torch.float64 else tl.float32


def num_warps(block: int) -> int:
    """At least four elements a thread, at most 16 warps."""
    return min(16, max(1, block // 512))


@cache
def num_programs(device: torch.device, per_multiprocessor: int = 2) -> int:
    """How many programs run at once; a few where there is no GPU (the interpreter)."""
    if device.type != "cuda":
        return 4
    return triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["multiprocessor_count"] * per_multiprocessor


@cache
def architecture() -> int:
    """80, 90, 100...: of the device that kernels run on; 90 in the interpreter."""
    if triton.knobs.runtime.interpret:
        return 90
    found: int = triton.runtime.driver.active.get_current_target().arch
    return found
