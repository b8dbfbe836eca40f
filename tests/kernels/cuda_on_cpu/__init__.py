"""Runs csrc/cuda on the CPU: `emulated()` is megatronish._cuda, built by g++ from the very same files over emulate.h.

`as_cuda(order=..., copies=...)` puts it in place of the real module, so that the host functions in megatronish/kernels/cuda run as
they do on a GPU; tensors that are made meanwhile lie against a page that may not be touched.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import mmap
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatronish import native
from megatronish.kernels.cuda import launch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
FLAGS = ["-std=c++17", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-DMEGATRONISH_CUDA=1"]

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")

ORDERS = (("first", "late"), ("last", "at once"), (7, "late"))
"""(which threads go first, when asynchronous copies land): code without races gives the same bits in all of them."""


def launches_as_calls(source: str) -> str:
    """`kernel<T><<<grid, block>>>(x)` -> `emulate::Launch(grid, block).run(kernel<T>, x)`: the only syntax that g++ lacks."""
    return re.sub(r"(\w+(?:<[^<>;]*>)?)<<<([^;]*?)>>>\(", r"emulate::Launch(\2).run(\1, ", source)


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr, result.stderr


def _once(name: str, made_of: str, make: Callable[[Path], None]) -> Path:
    """The file `name` in the folder of what it is made of; made by the first of all workers that asks."""
    folder = ROOT / "build" / "cuda_on_cpu" / hashlib.sha256(made_of.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / name).exists():
            make(folder / f"part_{name}")
            (folder / f"part_{name}").rename(folder / name)
    return folder / name


def _object(source: Path, headers: str) -> Path:
    """`source` compiled; a .cu file with its launches turned into calls."""
    text = launches_as_calls(source.read_text()) if source.suffix == ".cu" else source.read_text()
    includes = [HERE, ROOT / "csrc" / "cuda", ROOT / "csrc", Path(torch.__path__[0]) / "include", sysconfig.get_paths()["include"]]
    flags = [*FLAGS, *(f"-I{include}" for include in includes)]

    def make(out: Path) -> None:
        copy = out.with_suffix(".cpp")
        copy.write_text(f'#line 1 "{source}"\n{text}')
        _run(["g++", *flags, "-c", str(copy), "-o", str(out)])

    return _once(f"{source.stem}.o", "\0".join((*flags, torch.__version__, headers, text)), make)


def build(sources: Iterable[Path]) -> Path:
    """A shared library of the sources and the emulation; each is compiled once for each state of it and of the headers."""
    folders = (HERE, ROOT / "csrc" / "cuda")
    headers = "\0".join(path.read_text() for folder in folders for path in sorted(folder.glob("*.h")))
    objects = [str(_object(source, headers)) for source in (HERE / "emulate.cpp", *sources)]
    return _once("library.so", "\0".join(objects), lambda out: _run(["g++", "-shared", *objects, "-o", str(out)]))


@cache
def emulated() -> ModuleType:
    """megatronish._cuda for the CPU."""
    path = build([ROOT / "csrc" / "bindings.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))])
    spec = importlib.util.spec_from_file_location("_cuda", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(emulated().__file__))


def guarded(x: Tensor, *, at: Literal["start", "end"] = "end") -> Tensor:
    """A copy of x, of its strides, whose first (or last) byte lies against a page that may not be read or written.

    Up to 15 bytes are left at the end where the size is not a multiple of 16: addresses stay aligned."""
    size = (sum(stride * (length - 1) for stride, length in zip(x.stride(), x.shape, strict=True)) + 1) * x.element_size()
    if x.numel() == 0:
        return x
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    area = mmap.mmap(-1, pages + 2 * mmap.PAGESIZE)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(area))
    libc = ctypes.CDLL(None, use_errno=True)
    for page in (begin, begin + mmap.PAGESIZE + pages):
        assert libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    offset = mmap.PAGESIZE + (0 if at == "start" else (pages - size) // 16 * 16)
    flat = torch.frombuffer(area, dtype=x.dtype, count=size // x.element_size(), offset=offset)
    # NaN of every dtype, all around: what is read but was never written shows in the results.
    torch.frombuffer(area, dtype=torch.uint8, count=pages, offset=mmap.PAGESIZE).fill_(0xFF)
    return flat.as_strided(x.shape, x.stride()).copy_(x)


class _Guarding(TorchDispatchMode):
    """Tensors that are made uninitialised are guarded, and NaN."""

    def __init__(self, at: Literal["start", "end"]) -> None:
        super().__init__()
        self.at = at

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty):
            return guarded(out.fill_(float("nan")) if out.is_floating_point() else out.fill_(-1), at=self.at)
        return out


@contextmanager
def as_cuda(order: Literal["first", "last"] | int = "first", copies: Literal["late", "at once"] = "late") -> Iterator[ModuleType]:
    """megatronish.native.cuda is the emulated module. `order`: the first or the last thread and block first, or a seed from 2."""
    number = {"first": 0, "last": 1}[order] if isinstance(order, str) else order
    _library().emulate_configure(number, int(copies == "late"))
    before = native.cuda, launch.DEVICE_TYPE
    native.cuda, launch.DEVICE_TYPE = emulated(), "cpu"
    try:
        with _Guarding("end" if number != 1 else "start"):
            yield native.cuda
    finally:
        native.cuda, launch.DEVICE_TYPE = before


def counters() -> dict[str, int]:
    """Since the last call: 8x8 matrices that ldmatrix read, and those of their rows that met another row's banks."""
    out = (ctypes.c_int64 * 2)()
    _library().emulate_counters(out)
    return {"ldmatrix": out[0], "conflicts": out[1]}
