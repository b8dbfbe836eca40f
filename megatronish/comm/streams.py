"""Everything that depends on the kind of device: choosing it, waiting for it, its memory. The only caller of torch.cuda."""

from __future__ import annotations

import time

import torch

from megatronish.errors import UserError


def choose_device(local_rank: int, local_world_size: int) -> torch.device:
    """`cuda:local_rank` where there are GPUs (one for each local rank, or UserError), else `cpu`."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count()
    if local_world_size > num_gpus:
        raise UserError(
            f"{local_world_size} ranks on this host need as many GPUs, {num_gpus} are visible: start fewer with --nproc, "
            'or set CUDA_VISIBLE_DEVICES="" to run on CPU'
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def backend_of(device_kind: str) -> str:
    """The torch.distributed backend for a kind of device."""
    return "nccl" if device_kind == "cuda" else "gloo"


def set_numerics(*, cpu_threads: int, deterministic: bool) -> None:
    """Threads are set by us, never inherited: a sum in another order has other last bits. TF32 stays off: float32 means float32."""
    torch.set_num_threads(cpu_threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if deterministic:
        torch.use_deterministic_algorithms(True)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all work so far. Blocks the host."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wall_time(device: torch.device) -> float:
    """Seconds on a monotonic clock, after the device has caught up."""
    synchronize(device)
    return time.perf_counter()


def peak_memory_bytes(device: torch.device) -> int | None:
    """Most bytes that tensors held on the GPU so far; None on CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def device_name(device: torch.device) -> str:
    """The marketing name of the GPU, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def copy_to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Host to device without making the host wait (pinned, on the current stream). On CPU the tensor itself."""
    if device.type == "cpu":
        return x
    return x.pin_memory().to(device, non_blocking=True)
