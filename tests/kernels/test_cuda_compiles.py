"""Every CUDA source for sm_80, sm_90a and sm_100: registers, spills and shared memory as ptxas counts them."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import TABLE

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
LIMIT_KIB = {"sm_80": 163, "sm_90a": 227, "sm_100": 227}
"""Shared memory a block may have: CUDA C++ Programming Guide, technical specifications per compute capability. Dynamic shared
memory is the emulated device's to check (tests/kernels/cuda_on_cpu/emulate.cpp)."""
MOST_SPILLED = 64
"""Bytes a thread: a dozen values that are set before a loop and used behind it."""


@dataclass(frozen=True)
class Usage:
    arch: str
    kernel: str
    registers: int
    spilled: int
    """Bytes of spill stores."""
    shared: int
    """Bytes of static shared memory."""


def parse(text: str) -> list[Usage]:
    """Of the output of ptxas -v."""
    rows = []
    for part in text.split("Compiling entry function '")[1:]:
        mangled, arch = re.match(r"(\w+)' for '(\w+)'", part).groups()  # type: ignore[union-attr]
        registers = re.search(r"Used (\d+) registers", part)
        spilled = re.search(r"(\d+) bytes spill stores", part)
        shared = re.search(r"(\d+) bytes smem", part)
        assert registers and spilled, part
        rows.append(Usage(arch, mangled, int(registers[1]), int(spilled[1]), int(shared[1]) if shared else 0))
    return rows


def said_by_ptxas(source: Path, folder: Path) -> str:
    """What `make setup` wrote when it built this very source for all architectures; else nvcc is run."""
    texts = [path.read_text() for path in [source, *sorted(source.parent.glob("*.h"))]]
    report = ROOT / "build" / "cuda" / f"{source.stem}.ptxas"
    if report.is_file():
        digest, _, text = report.read_text().partition("\n")
        if digest == hashlib.sha256("".join(texts).encode()).hexdigest() and all(f"'{arch}'" in text for arch in LIMIT_KIB):
            return text
    codes = [f"-gencode=arch=compute_{arch[3:]},code={arch}" for arch in LIMIT_KIB]
    command = ["nvcc", "-std=c++17", "-O3", "-Xptxas=-v", *codes, "-c", str(source), "-o", str(folder / "out.o")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def short_names(mangled: list[str]) -> list[str]:
    """`attention_forward_kernel<__half, 64>` of what the compiler calls it."""
    lines = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout.splitlines()
    return [re.sub(r"\(\w+\)|[\w:]*\(anonymous namespace\)::|^void ", "", line).partition("(")[0] for line in lines]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles_without_spills_for_every_architecture(
    source: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    text = said_by_ptxas(source, tmp_path)
    assert "warning" not in text, text
    rows = parse(text)
    assert {row.arch for row in rows} == set(LIMIT_KIB)
    kernels = sorted({row.kernel for row in rows})
    lines = [f"{source.name}: registers / bytes spilled / bytes of static shared memory, {', '.join(LIMIT_KIB)}"]
    for kernel, name in zip(kernels, short_names(kernels), strict=True):
        same = [row for arch in LIMIT_KIB for row in rows if (row.kernel, row.arch) == (kernel, arch)]
        assert len(same) == len(LIMIT_KIB), name
        lines.append(f"  {name:60}" + "  ".join(f"{row.registers:3} /{row.spilled:3} /{row.shared:6}" for row in same))
    record_property(TABLE, "\n".join(lines))
    too_much = [row for row in rows if row.spilled > MOST_SPILLED or row.shared > LIMIT_KIB[row.arch] * 1024]
    assert not too_much, too_much


def test_a_kernel_that_spills_is_seen() -> None:
    text = """ptxas info    : Compiling entry function '_Z1kv' for 'sm_80'
ptxas info    : Function properties for _Z1kv
    72 bytes stack frame, 156 bytes spill stores, 124 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 512 bytes smem"""
    assert parse(text) == [Usage("sm_80", "_Z1kv", 64, 156, 512)]
