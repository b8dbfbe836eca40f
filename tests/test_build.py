"""The native modules against torch.optim.AdamW and numpy; the CUDA sources against nvcc; what the package says of its own build."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatronish import native

ROOT = Path(__file__).resolve().parent.parent
HYPER = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}

needs_cpu = pytest.mark.skipif(native.cpu is None, reason="megatronish._cpu is not built (no C++ compiler)")


def adamw(tensors: list[torch.Tensor], step: int, *, scale: torch.Tensor | None, copy: torch.Tensor | None, threads: int) -> None:
    """One native step on (parameter, gradient, exp_avg, exp_avg_sq)."""
    addresses = [t.data_ptr() for t in tensors]
    scale_address = 0 if scale is None else scale.data_ptr()
    n = tensors[0].numel()
    if tensors[0].dtype == torch.float64:
        native.cpu.adamw_float64(*addresses, n, scale_address, **HYPER, step=step, threads=threads)
    else:
        native.cpu.adamw_float32(
            *addresses, 0 if copy is None else copy.data_ptr(), n, scale_address, **HYPER, step=step, threads=threads
        )


def run_native(dtype: torch.dtype, n: int, threads: int, *, copy: torch.Tensor | None = None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    parameter = torch.randn(n, dtype=dtype, generator=generator)
    state = [torch.zeros(n, dtype=dtype), torch.zeros(n, dtype=dtype)]
    scale = torch.tensor(0.37, dtype=dtype)
    for step in range(1, 11):
        gradient = torch.randn(n, dtype=dtype, generator=generator)
        adamw([parameter, gradient, *state], step, scale=scale, copy=copy, threads=threads)
    return [parameter, *state]


@needs_cpu
@pytest.mark.parametrize("n", [1, 7, 4099])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_native_adamw_equals_torch(dtype: torch.dtype, n: int) -> None:
    generator = torch.Generator().manual_seed(7)
    reference = torch.nn.Parameter(torch.randn(n, dtype=dtype, generator=generator))
    optimizer = torch.optim.AdamW(
        [reference], lr=HYPER["lr"], betas=(HYPER["beta1"], HYPER["beta2"]), eps=HYPER["eps"], weight_decay=HYPER["weight_decay"]
    )
    for _ in range(10):
        reference.grad = torch.randn(n, dtype=dtype, generator=generator) * torch.tensor(0.37, dtype=dtype)
        optimizer.step()
    parameter, exp_avg, exp_avg_sq = run_native(dtype, n, threads=1)
    # Ten updates of the same formula in another order of operations: a few last bits of numbers of size up to 4 and 1.
    tolerance = 32 * torch.finfo(dtype).eps
    torch.testing.assert_close(parameter, reference.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(exp_avg, optimizer.state[reference]["exp_avg"], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(exp_avg_sq, optimizer.state[reference]["exp_avg_sq"], rtol=tolerance, atol=tolerance)


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_native_adamw_has_the_same_bits_on_any_number_of_threads(dtype: torch.dtype) -> None:
    n = 3 * 65536 + 17  # enough for three threads, with a ragged end
    one = run_native(dtype, n, threads=1)
    for threads in (2, 3, 5):
        for got, want in zip(run_native(dtype, n, threads=threads), one, strict=True):
            assert torch.equal(got, want)


@needs_cpu
def test_native_adamw_has_the_same_bits_wherever_a_slice_begins() -> None:
    # ZeRO cuts flat buckets at any element: vector bodies and scalar tails must round alike.
    n = 1021
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(n, generator=generator), torch.randn(n, generator=generator), torch.zeros(n), torch.zeros(n)]
    whole = [t.clone() for t in tensors]
    adamw(whole, 1, scale=None, copy=None, threads=1)
    for start, stop in ((0, 5), (5, 333), (333, 334), (334, n)):
        adamw([t[start:stop] for t in tensors], 1, scale=None, copy=None, threads=1)
    assert torch.equal(tensors[0], whole[0])


@needs_cpu
def test_native_adamw_copies_out_bfloat16_rounded_to_nearest_even() -> None:
    copy = torch.zeros(4099, dtype=torch.bfloat16)
    parameter, *_ = run_native(torch.float32, 4099, threads=1, copy=copy)
    assert torch.equal(copy, parameter.to(torch.bfloat16))


@needs_cpu
def test_bfloat16_copy_is_right_for_ties_infinity_and_nan() -> None:
    # With a zero gradient and no history the update is p * (1 - lr * weight_decay); lr 0 keeps p as it is.
    bits = [0x3F808000, 0x3F818000, 0x3F807FFF, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FFFFFFF, 0x7F800001, 0x80000000, 0x00000001]
    parameter = torch.from_numpy(np.array(bits, dtype=np.uint32).view(np.float32).copy())
    zeros = [torch.zeros(len(bits)) for _ in range(3)]
    copy = torch.zeros(len(bits), dtype=torch.bfloat16)
    want = parameter.to(torch.bfloat16)
    options = {**HYPER, "lr": 0.0}
    addresses = [t.data_ptr() for t in (parameter, *zeros, copy)]
    native.cpu.adamw_float32(*addresses, len(bits), 0, **options, step=1, threads=1)
    assert torch.equal(torch.isnan(copy), torch.isnan(want))
    assert torch.equal(copy.nan_to_num(nan=0.0, posinf=1e38, neginf=-1e38), want.nan_to_num(nan=0.0, posinf=1e38, neginf=-1e38))


@needs_cpu
@pytest.mark.parametrize(("dtype", "high"), [(np.uint16, 65536), (np.int32, 2**31 - 1)])
@pytest.mark.parametrize("threads", [1, 3])
def test_native_gather_equals_slices(dtype: type, high: int, threads: int) -> None:
    generator = np.random.default_rng(5)
    source = generator.integers(0, high, size=200_000, dtype=dtype)
    width, rows = 1025, 700
    offsets = generator.integers(0, len(source) - width + 1, size=rows, dtype=np.int64)
    offsets[:2] = (0, len(source) - width)
    out = np.empty((rows, width), dtype=np.int64)
    gather = native.cpu.gather_uint16 if dtype is np.uint16 else native.cpu.gather_int32
    low_high = gather(source.ctypes.data, len(source), offsets.ctypes.data, rows, width, out.ctypes.data, threads=threads)
    want = np.stack([source[o : o + width] for o in offsets]).astype(np.int64)
    assert np.array_equal(out, want)
    assert low_high == (want.min(), want.max())


@needs_cpu
@pytest.mark.parametrize("offset", [-1, 6, 2**62])
def test_native_gather_refuses_a_row_outside_the_buffer(offset: int) -> None:
    source, out = np.zeros(10, dtype=np.uint16), np.zeros(5, dtype=np.int64)
    offsets = np.array([offset], dtype=np.int64)
    with pytest.raises(IndexError, match=f"row 0 asks for tokens .{offset}, {offset + 5}. of 10"):
        native.cpu.gather_uint16(source.ctypes.data, 10, offsets.ctypes.data, 1, 5, out.ctypes.data, threads=1)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ids=lambda path: path.name)
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_cuda_source_compiles(source: Path, arch: str, tmp_path: Path) -> None:
    command = ["nvcc", "-cubin", f"-arch=sm_{arch}", "-std=c++17", "--fmad=false", str(source), "-o", str(tmp_path / "out.cubin")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr, result.stderr


@pytest.mark.gpu
@pytest.mark.skipif(
    native.cuda is None or native.cuda.device_count() == 0, reason="no CUDA device, or megatronish._cuda is not built"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cuda_adamw_has_the_bits_of_the_cpu(dtype: torch.dtype) -> None:
    # Both are compiled without fused multiply-add, and division and square root are correctly rounded on both.
    n = 100_003
    generator = torch.Generator().manual_seed(7)
    on_cpu = [
        torch.randn(n, dtype=dtype, generator=generator),
        torch.empty(0),
        torch.zeros(n, dtype=dtype),
        torch.zeros(n, dtype=dtype),
    ]
    on_gpu = [t.to("cuda") for t in on_cpu]
    scale = torch.tensor(0.37, dtype=dtype)
    scale_gpu = scale.to("cuda")
    function = native.cuda.adamw_float32 if dtype == torch.float32 else native.cuda.adamw_float64
    for step in range(1, 4):
        on_cpu[1] = torch.randn(n, dtype=dtype, generator=generator)
        on_gpu[1] = on_cpu[1].to("cuda")
        adamw(on_cpu, step, scale=scale, copy=None, threads=1)
        addresses = [t.data_ptr() for t in on_gpu] + ([0] if dtype == torch.float32 else [])
        function(*addresses, n, scale_gpu.data_ptr(), **HYPER, step=step, stream=torch.cuda.current_stream().cuda_stream)
    for got, want in zip(on_gpu, on_cpu, strict=True):
        assert torch.equal(got.cpu(), want)


def test_describe_names_every_module_and_says_where_it_runs() -> None:
    result = subprocess.run([sys.executable, "-m", "megatronish.native"], capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["cpu", "cuda"]
    for line, module in zip(lines, (native.cpu, native.cuda), strict=True):
        assert line.endswith("native") if module is not None else "in Python (" in line


def test_building_needs_no_torch() -> None:
    assert "torch" not in (ROOT / "pyproject.toml").read_text().split("[project]")[0].split("requires =")[1]
    for source in (ROOT / "csrc").rglob("*.*"):
        assert "torch/" not in source.read_text(), source
