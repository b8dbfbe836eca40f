"""Everything that depends on the kind of device: choosing it, waiting for it, its memory. The only caller of torch.cuda."""

from __future__ import annotations

import contextlib
import mmap
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megatronish.comm import history
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


def is_gpu_build() -> bool:
    """Whether torch could use GPUs."""
    return torch.version.cuda is not None


def num_gpus() -> int:
    """GPUs that this process sees; 0 on a CPU build."""
    return torch.cuda.device_count()


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
    record = history.current()
    record.begin_read("end of all work")
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    record.end_wait()


def wall_time(device: torch.device) -> float:
    """Seconds on a monotonic clock, after the device has caught up."""
    synchronize(device)
    return time.perf_counter()


def peak_memory_bytes(device: torch.device) -> int | None:
    """Most bytes that tensors held on the GPU so far; None on CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def release_cached_memory(device: torch.device) -> None:
    """Give memory that no tensor holds back to the GPU, for other processes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def record_memory(device: torch.device) -> bool:
    """Begin to keep the history of a GPU's allocator; False on CPU, which has none."""
    if device.type != "cuda":
        return False
    torch.cuda.memory._record_memory_history(max_entries=100_000, device=device)
    return True


def write_memory_history(device: torch.device, path: Path) -> bool:
    """Write what `record_memory` has kept, and keep no more; False on CPU."""
    if device.type != "cuda":
        return False
    torch.cuda.memory._dump_snapshot(str(path))
    torch.cuda.memory._record_memory_history(enabled=None, device=device)
    return True


def device_name(device: torch.device) -> str:
    """The marketing name of the GPU, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def nccl_version(device: torch.device) -> str | None:
    """Of the NCCL that torch was built with; None on CPU."""
    return ".".join(map(str, torch.cuda.nccl.version())) if device.type == "cuda" else None


def copy_to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Host to device without making the host wait (pinned, on the current stream). On CPU the tensor itself."""
    if device.type == "cpu":
        return x
    return x.pin_memory().to(device, non_blocking=True)


def host_memory(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Zeroed uint8 host memory that begins on a page, pinned where `device` is a GPU: copies from there need not wait.

    Mapped, not from torch's pinned allocator, which takes the next power of two."""
    pages = mmap.mmap(-1, num_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(pages, dtype=torch.uint8).zero_()  # every page is there before it is needed
    if device.type == "cuda":
        status = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), num_bytes, 0)
        torch.cuda.check_error(int(status))
    return memory


def end_of_work(device: torch.device) -> Callable[[], None]:
    """A function that waits, on any thread, until the device has done what this thread has given it so far."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event()
    event.record()
    return event.synchronize


def is_current(device: torch.device) -> bool:
    """Whether launches of this thread go to this GPU."""
    return device.index == torch.cuda.current_device()


def compute_capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU, such as (9, 0)."""
    return torch.cuda.get_device_capability(device)


def shared_memory_per_block(device: torch.device) -> int:
    """Bytes of shared memory that a block of a GPU may ask for."""
    # The binding has it, torch's stub does not.
    size: int = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    return size


def stream_handle(device: torch.device) -> int:
    """The address of the current stream of a GPU, for native launchers."""
    handle: int = torch.cuda.current_stream(device).cuda_stream
    return handle


class PhaseClock:
    """Seconds of each phase of a step. On GPU it records events and waits for the device only when read."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []

    def begin(self) -> None:
        """Start a step; what the last one recorded is dropped."""
        self._marks = []
        self.mark("")

    def mark(self, phase: str) -> None:
        """The phase named here ends now."""
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))

    def read(self) -> dict[str, float]:
        """Seconds by phase. On GPU this waits until the device has finished the step."""
        if self._on_gpu and self._marks:
            last = self._marks[-1][1]
            assert isinstance(last, torch.cuda.Event)
            last.synchronize()
        seconds = {}
        for (_, before), (phase, after) in zip(self._marks, self._marks[1:], strict=False):
            if isinstance(before, torch.cuda.Event) and isinstance(after, torch.cuda.Event):
                seconds[phase] = before.elapsed_time(after) / 1000.0
            elif isinstance(before, float) and isinstance(after, float):
                seconds[phase] = after - before
        return seconds
