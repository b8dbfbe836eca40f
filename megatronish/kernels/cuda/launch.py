"""What every call of megatronish._cuda needs: the module, codes of dtypes, the stream."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from megatronish import native
from megatronish.comm.streams import compute_capability, is_current, shared_memory_per_block, stream_handle

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""As csrc/cuda/cuda.h numbers them."""

DEVICE_TYPE = "cuda"
"""Of the tensors that the kernels take; tests run them on the CPU."""


def module() -> ModuleType:
    """megatronish._cuda; only where `unavailable()` is None."""
    assert native.cuda is not None
    return native.cuda


def unavailable(x: Tensor) -> str | None:
    """Why nothing of megatronish._cuda takes this tensor, whatever the op; None: it does."""
    if x.device.type != DEVICE_TYPE:
        return f"tensors on {x.device.type.upper()}"
    if native.cuda is None:
        return f"megatronish._cuda: {native.cuda_outcome}"
    if x.device.type == "cuda":
        if compute_capability(x.device) < (8, 0):
            return "compute capability below 8.0"
        if not is_current(x.device):
            return "a device that is not the current one"
    return None


def stream_of(x: Tensor) -> int:
    """The current stream of the tensor's device; 0 on CPU, where tests run these kernels."""
    return stream_handle(x.device) if x.device.type == "cuda" else 0


def shared_memory_of(x: Tensor) -> int:
    """Bytes that a block may take where the tensor is; on CPU, where tests run these kernels, as many as on sm_80."""
    return shared_memory_per_block(x.device) if x.device.type == "cuda" else 163 * 1024


def is_misaligned(x: Tensor) -> bool:
    """Whether an address or a stride does not allow accesses of 16 bytes. The last dimension must be dense."""
    size = 16 // x.element_size()
    strides = [stride for stride, length in zip(x.stride()[:-1], x.shape[:-1], strict=True) if length > 1]
    return x.data_ptr() % 16 != 0 or (x.shape[-1] > 1 and x.stride(-1) != 1) or any(stride % size for stride in strides)


def dense(x: Tensor) -> Tensor:
    """x, or a copy of it, contiguous from an address that is a multiple of 16 bytes."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()
