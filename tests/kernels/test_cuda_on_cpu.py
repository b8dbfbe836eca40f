"""The emulated device finds the faults that it is there for, and multiplies and rounds as the real one does."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from tests.kernels.cuda_on_cpu import HERE, ORDERS, build, guarded, launches_as_calls, needs_compiler

pytestmark = needs_compiler

N = 128


@pytest.fixture(scope="module")
def faulty() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build([HERE / "faulty.cu"])))
    library.run_faulty.restype = ctypes.c_char_p
    return library


def run(library: ctypes.CDLL, fault: str, number: int) -> tuple[torch.Tensor, str]:
    """(out, error)"""
    order, copies = ORDERS[number]
    library.emulate_configure({"first": 0, "last": 1}.get(str(order), order), int(copies == "late"))
    x, out = guarded(torch.arange(N, dtype=torch.float32)), guarded(torch.full((N,), -1.0))
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, out)]
    error = library.run_faulty(fault.encode(), pointers[0], N, pointers[1])
    return out, error.decode()


def test_a_kernel_without_fault_runs_in_every_order(faulty: ctypes.CDLL) -> None:
    for number in range(len(ORDERS)):
        out, error = run(faulty, "none", number)
        assert not error and torch.equal(out, torch.arange(N - 1, -1, -1, dtype=torch.float32))


@pytest.mark.parametrize("fault", ["no barrier", "no wait"])
def test_a_race_shows_in_some_order(faulty: ctypes.CDLL, fault: str) -> None:
    want = torch.arange(N - 1, -1, -1, dtype=torch.float32)
    outs = [run(faulty, fault, number)[0] for number in range(len(ORDERS))]
    assert not all(torch.equal(out, want) for out in outs)


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("past a tensor", "outside of every tensor"),
        ("past shared memory", "outside of shared memory"),
        ("misaligned", "16 bytes is not aligned"),
        ("diverged", "another lane is in"),
        ("waits for ever", "threads wait for ever"),
        ("too much shared memory", "204800 bytes of shared memory; sm_80 has 166912"),
    ],
)
def test_a_fault_is_an_error_that_says_where(faulty: ctypes.CDLL, fault: str, text: str) -> None:
    _, error = run(faulty, fault, 0)
    assert text in error
    # The process, and the device, go on.
    assert not run(faulty, "none", 0)[1]


def test_only_launches_are_rewritten() -> None:
    source = "norm_kernel<T, 2, true><<<grid_of(n, 4), threads, 0, stream>>>(x, y);"
    assert launches_as_calls(source) == "emulate::Launch(grid_of(n, 4), threads, 0, stream).run(norm_kernel<T, 2, true>, x, y);"
    assert launches_as_calls("a << b; c >> (d);") == "a << b; c >> (d);"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_floats_are_rounded_as_torch_rounds_them(faulty: ctypes.CDLL, dtype: torch.dtype) -> None:
    lows = np.array([0x0000, 0x0001, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    bits = (np.arange(0, 2**16, 3, dtype=np.uint32)[:, None] << 16 | lows).flatten()
    x = torch.from_numpy(bits.view(np.float32).copy())
    out = torch.empty(len(x), dtype=dtype)
    back = torch.empty(len(x))
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, out, back)]
    faulty.emulate_round(int(dtype == torch.bfloat16), *pointers[:1], ctypes.c_int64(len(x)), *pointers[1:])
    want = x.to(dtype)
    sure = ~want.isnan()
    assert torch.equal(out.view(torch.int16)[sure], want.view(torch.int16)[sure]) and out[~sure].isnan().all()
    assert torch.equal(back[sure], want.float()[sure])
