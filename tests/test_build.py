"""The native modules against torch.optim.AdamW and numpy; what the package says of its own build."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatronish import native

ROOT = Path(__file__).resolve().parent.parent
HYPER = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}

needs_cpu = pytest.mark.skipif(native.cpu is None, reason="megatronish._cpu is not built (no C++ compiler)")


def adamw(
    tensors: list[torch.Tensor], step: int, *, scale: float = 1.0, copy: torch.Tensor | None = None, threads: int = 1
) -> None:
    """One native step on (parameter, gradient, exp_avg, exp_avg_sq)."""
    scalars = torch.tensor([scale, step], dtype=tensors[0].dtype)
    native.cpu.adamw(*arguments(tensors, scalars, copy), **HYPER, **NEAREST, threads=threads)


KINDS = {None: 0, torch.float32: 1, torch.float64: 2, torch.bfloat16: 3, torch.float16: 4}
NEAREST = {"stochastic": False, "zero_gradient": False}


def arguments(tensors: list[torch.Tensor], scalars: torch.Tensor, copy: torch.Tensor | None = None) -> list[int]:
    """Of native adamw: addresses and kinds."""
    parameter, gradient, exp_avg, exp_avg_sq = (t.data_ptr() for t in tensors)
    kind, n = KINDS[tensors[0].dtype], tensors[0].numel()
    low = (0, 0) if copy is None else (copy.data_ptr(), KINDS[copy.dtype])
    return [parameter, kind, gradient, exp_avg, exp_avg_sq, kind, *low, n, scalars.data_ptr(), 0, 0]


def run_native(dtype: torch.dtype, n: int, threads: int, *, copy: torch.Tensor | None = None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    parameter = torch.randn(n, dtype=dtype, generator=generator)
    state = [torch.zeros(n, dtype=dtype), torch.zeros(n, dtype=dtype)]
    for step in range(1, 11):
        gradient = torch.randn(n, dtype=dtype, generator=generator)
        adamw([parameter, gradient, *state], step, scale=0.37, copy=copy, threads=threads)
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
    adamw(whole, 1)
    for start, stop in ((0, 5), (5, 333), (333, 334), (334, n)):
        adamw([t[start:stop] for t in tensors], 1)
    assert torch.equal(tensors[0], whole[0])


LOW = pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])


@needs_cpu
@LOW
def test_native_adamw_copies_out_rounded_to_nearest_even(low: torch.dtype) -> None:
    copy = torch.zeros(4099, dtype=low)
    parameter, *_ = run_native(torch.float32, 4099, threads=1, copy=copy)
    assert torch.equal(copy, parameter.to(low))


@needs_cpu
@LOW
def test_the_copy_is_right_for_every_pattern_of_leading_bits(low: torch.dtype) -> None:
    # Ties and their neighbours of every exponent: subnormal results, overflow, infinities, NaN. With lr 0 and a zero gradient the
    # update keeps p as it is.
    lows = [0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001]
    bits = (np.arange(2**16, dtype=np.uint32)[:, None] << 16) | np.array(lows, dtype=np.uint32)
    parameter = torch.from_numpy(bits.flatten().view(np.float32).copy())
    copy, want = torch.zeros(len(parameter), dtype=low), parameter.to(low)
    zeros = [torch.zeros(len(parameter)) for _ in range(3)]
    scalars = torch.ones(2)
    given = arguments([parameter, *zeros], scalars, copy)
    native.cpu.adamw(*given, **{**HYPER, "lr": 0.0}, **NEAREST, threads=1)
    assert torch.equal(torch.isnan(copy), torch.isnan(want))
    sure = ~torch.isnan(want)
    assert torch.equal(copy.view(torch.int16)[sure], want.view(torch.int16)[sure])


@needs_cpu
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_native_adamw_writes_nothing_when_the_scale_is_not_finite(scale: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.rand(1021, generator=generator, dtype=dtype) for _ in range(4)]
    tensors[1][5] = float("nan")
    copy = torch.ones(1021, dtype=torch.float16) if dtype == torch.float32 else None
    before = [t.clone() for t in tensors]
    adamw(tensors, 3, scale=scale, copy=copy)
    for index in (0, 2, 3):
        assert torch.equal(tensors[index], before[index])
    assert copy is None or copy.eq(1).all()


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


@pytest.mark.gpu
@pytest.mark.skipif(
    native.cuda is None or native.cuda.device_count() == 0, reason="no CUDA device, or megatronish._cuda is not built"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cuda_adamw_equals_the_cpu(dtype: torch.dtype) -> None:
    # Both are compiled without fused multiply-add, and division and square root are correctly rounded on both. Bias corrections
    # come from a power in float64, whose last bits differ: rounded to float32 they are the same, in float64 a few units are left.
    n = 100_003
    generator = torch.Generator().manual_seed(7)
    on_cpu = [torch.randn(n, dtype=dtype, generator=generator), *[torch.zeros(n, dtype=dtype) for _ in range(3)]]
    on_gpu = [t.to("cuda") for t in on_cpu]
    stream = torch.cuda.current_stream().cuda_stream
    for step, scale in ((1, 0.37), (2, 0.37), (3, float("nan")), (3, 0.5)):
        on_cpu[1] = torch.randn(n, dtype=dtype, generator=generator)
        on_gpu[1] = on_cpu[1].to("cuda")
        adamw(on_cpu, step, scale=scale)
        scalars = torch.tensor([scale, step], dtype=dtype, device="cuda")
        more = {**HYPER, **NEAREST, "stream": stream}
        if dtype == torch.float32:
            for low in (torch.bfloat16, torch.float16):  # the same step twice, from the same state
                copy, state = torch.zeros(n, dtype=low, device="cuda"), [t.clone() for t in on_gpu]
                native.cuda.adamw(*arguments(state, scalars, copy), **more)
                assert torch.equal(copy, state[0].to(low) if scale == scale else torch.zeros_like(copy))
        native.cuda.adamw(*arguments(on_gpu, scalars), **more)
    tolerance = 0.0 if dtype == torch.float32 else 32 * torch.finfo(dtype).eps
    for got, want in zip(on_gpu, on_cpu, strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=tolerance, atol=tolerance)


def test_a_module_built_from_other_sources_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.importlib, "import_module", lambda name: SimpleNamespace())
    module, outcome = native._load("cpu")
    assert module is None and "make setup" in outcome


def test_describe_names_every_module_and_says_where_it_runs() -> None:
    result = subprocess.run([sys.executable, "-m", "megatronish.native"], capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["cpu", "cuda"]
    for line, module in zip(lines, (native.cpu, native.cuda), strict=True):
        assert line.endswith("native") if module is not None else "in Python (" in line


@pytest.mark.parametrize(
    ("listed", "named", "codes"),
    [
        ("80 90 100", "80 90 90a 100", ["sm_80", "sm_90a", "sm_100", "compute_100"]),
        ("80 90", "80 90 90a", ["sm_80", "sm_90a", "compute_90"]),
        ("80 90", "80 90", ["sm_80", "sm_90", "compute_90"]),
        ("80", "80", ["sm_80", "compute_80"]),
    ],
    ids=["13", "12.0", "11.8", "11.0"],
)
def test_nvcc_is_asked_for_what_it_knows_and_for_ptx_that_later_devices_take(
    listed: str, named: str, codes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setitem(sys.modules, "pybind11", SimpleNamespace(get_include=lambda: ""))
    of_setup = runpy.run_path(str(ROOT / "setup.py"))
    nvcc = tmp_path / "nvcc"
    answers = [" ".join(f"compute_{arch}" for arch in text.split()) for text in (listed, named)]
    nvcc.write_text(f'#!/bin/sh\nif [ "$1" = --help ]; then echo "{answers[1]}"; else echo "{answers[0]}"; fi\n')
    nvcc.chmod(0o755)
    flags = of_setup["cuda_arch_flags"](str(nvcc))
    assert flags == [f"-gencode=arch=compute_{code.partition('_')[2]},code={code}" for code in codes]


def test_building_needs_no_torch() -> None:
    assert "torch" not in (ROOT / "pyproject.toml").read_text().split("[project]")[0].split("requires =")[1]
    for source in (ROOT / "csrc").rglob("*.*"):
        assert "torch/" not in source.read_text(), source


def test_without_a_compiler_the_package_builds_and_says_that_it_runs_in_python(tmp_path: Path) -> None:
    source, built = tmp_path / "source", tmp_path / "built"
    native_files = shutil.ignore_patterns("*.so", "native_build.json", "__pycache__")
    for folder in ("megatronish", "csrc"):
        shutil.copytree(ROOT / folder, source / folder, ignore=native_files)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    # pybind11 is there while pip builds, and in no environment that it installs into; without a compiler its headers are not read.
    (source / "pybind11.py").write_text("def get_include():\n    return '/nonexistent'\n")
    environment = {"PATH": "/nonexistent", "CC": "/nonexistent/cc", "CXX": "/nonexistent/c++", "MEGATRONISH_CUDA": "0"}
    build = subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-lib", str(built)],
        cwd=source,
        env=environment | {"PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stderr
    assert not list(built.rglob("*.so"))
    # The finder of an editable installation would lend the checkout's own modules to a package that lacks them.
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in str(f)]; from megatronish import native as n"
    command = [sys.executable, "-c", f"{code}; print(n.__file__); print(n.describe())"]
    described = subprocess.run(command, cwd=built, env=environment, capture_output=True, text=True)
    assert described.returncode == 0, described.stderr
    file, cpu, cuda = described.stdout.splitlines()
    assert Path(file).is_relative_to(built)
    assert "in Python (not built: " in cpu and "c++" in cpu
    assert "in Python (not built: MEGATRONISH_CUDA=0)" in cuda
