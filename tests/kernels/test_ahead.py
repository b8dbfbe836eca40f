"""Every Triton kernel compiles for each architecture within its bounds on spills and shared memory; no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatronish.packages import find_package
from tests.conftest import TABLE

pytestmark = pytest.mark.skipif(find_package("triton") is None, reason="triton is not installed")
PACKAGE = Path(__file__).resolve().parents[2] / "megatronish/kernels/triton"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if "\ndef ahead(" in path.read_text())
COMPILES = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def ahead(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatronish.kernels.triton.ahead", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=COMPILES | environment, check=False)


@pytest.mark.parametrize("module", MODULES)
def test_kernels_compile_for_every_architecture_within_their_bounds(
    module: str, record_property: Callable[[str, object], None]
) -> None:
    done = ahead(module, "--json")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    lines = [f"triton/{module}.py: registers / bytes spilled / bytes of shared memory"]
    for row in rows:
        used = f"{row['registers']:3} /{row['spill_bytes']:3} /{row['shared_bytes']:7}"
        lines.append(f"  {row['name']:60} sm_{row['architecture']:<4} {used}")
    record_property(TABLE, "\n".join(lines))
    assert done.returncode == 0, [row for row in rows if row["fault"]] or done.stderr
    assert {row["architecture"] for row in rows} == ({90, 100} if module == "attention_tma" else {80, 90, 100})
    if module == "attention_tma":
        assert all("tma" in row["features"] for row in rows)
        forward = [row for row in rows if row["name"].endswith("forward")]
        assert forward and all("warp-specialised" in row["features"] for row in forward)


def test_attention_takes_the_matrix_units_of_its_architecture() -> None:
    units = {(row["architecture"], row["tensor_unit"]) for row in map(json.loads, ahead("attention", "--json").stdout.splitlines())}
    assert {(80, "mma"), (90, "wgmma"), (100, "tcgen05")} <= units


def test_what_the_compiler_has_not_made_of_a_kernel_is_a_fault() -> None:
    script = """
from dataclasses import replace
from megatronish.kernels.triton import attention
from megatronish.kernels.triton.ahead import compile_ahead

for kernel in attention.KERNELS.values():
    free = {p.name for p in kernel.params if not p.do_not_specialize and not p.is_constexpr and "ptr" not in p.name}
    assert not free & {"document_stride", "first_head", "repeats", "key", "threshold"}, free
kernel = next(a for a in attention.ahead() if a.name == "attention K64 forward" and 90 in a.architectures)
print(compile_ahead(replace(kernel, needs=("tma",)), 90).fault)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=COMPILES, check=False)
    assert done.stdout == "is not tma\n", done.stderr


def test_what_compiles_nothing_is_refused_in_one_line() -> None:
    for done in (ahead("nonsense"), ahead(TRITON_INTERPRET="1")):
        assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "nonsense" in ahead("nonsense").stderr
