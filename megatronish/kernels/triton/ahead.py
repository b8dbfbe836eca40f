"""Compiles this package's Triton kernels for GPUs that this machine need not have, and says what they take of each.

`python -m megatronish.kernels.triton.ahead [MODULE ...] [--json]` prints a line a kernel and architecture: registers and
bytes of spilled registers a thread, shared memory a block, matrix instructions (wgmma: Hopper, tcgen05: Blackwell) and
FEATURES. Exit code 1 where one spills more than its bound, takes more shared memory than the chip has or lacks a feature
that it is written for. Every module of the package that has `ahead()` is compiled. Triton's own cache keeps what was
compiled (TRITON_CACHE_DIR, ~/.triton/cache).
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that a block may take, by architecture (CUDA C programming guide, table of compute capabilities)."""
SPILL_LIMIT = 32
"""Bytes a thread that a kernel may spill, unless its `Ahead` says otherwise: 8 registers of 255."""


FEATURES = {
    "tma": lambda ttgir, ptx: "cp.async.bulk.tensor" in ptx,
    "warp-specialised": lambda ttgir, ptx: "ttg.warp_specialize(" in ttgir and "setmaxnreg" in ptx,
}
"""What stands in the compiled code: copies by the tensor memory accelerator; warps that load beside warps that compute, with other
numbers of registers."""


@dataclass(frozen=True)
class Ahead:
    """A specialisation of a kernel."""

    name: str
    """What stands in the table: the kernel and what distinguishes the case ("attention.forward K128")."""
    kernel: Any
    """The triton.jit function."""
    signature: dict[str, str]
    """Type by parameter, for all but the constants: "*bf16", "i32", "fp32"; ":16" behind says divisible by 16. See `signature`."""
    constants: dict[str, Any]
    """Also parameters that are 1 in the case: a launch makes those constants, unless the kernel says do_not_specialize."""
    num_warps: int
    num_stages: int = 1
    spills: dict[int, int] = field(default_factory=dict)
    """A bound in place of SPILL_LIMIT, by architecture. Say why where it is set."""
    architectures: tuple[int, ...] = tuple(SHARED_LIMIT)
    """Where this specialisation is the one that runs."""
    needs: tuple[str, ...] = ()
    """Of FEATURES: what the compiler must have made of it."""


@dataclass(frozen=True)
class Compiled:
    """What a kernel takes on an architecture."""

    name: str
    architecture: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_unit: str
    """wgmma, tcgen05, mma, or "" where no product is made."""
    features: tuple[str, ...]
    """Of FEATURES."""
    fault: str
    """Why this must not pass; "" if it may."""


def signature(kernel: Any, pointers: str, **types: str) -> dict[str, str]:
    """A type for every parameter that is not a constexpr: `pointers` (such as "bf16") for those named `*_ptr`, aligned to 16 bytes
    as torch allocates, i32 for others; `types` names exceptions."""
    chosen = {
        p.name: types.get(p.name, f"*{pointers}:16" if p.name.endswith("_ptr") else "i32")
        for p in kernel.params
        if not p.is_constexpr
    }
    assert types.keys() <= chosen.keys(), f"{kernel.__name__} has no parameter {types.keys() - chosen.keys()}"
    return chosen


def compile_ahead(ahead: Ahead, architecture: int) -> Compiled:
    """Compile for sm_<architecture>; wants no GPU."""
    plain, attributes = {}, {}
    for name, written in ahead.signature.items():
        plain[name], _, divisor = written.partition(":")
        if divisor and name not in ahead.constants:
            attributes[(ahead.kernel.arg_names.index(name),)] = [["tt.divisibility", int(divisor)]]
    constants = {(ahead.kernel.arg_names.index(name),): value for name, value in ahead.constants.items()}
    source = ASTSource(ahead.kernel, plain | dict.fromkeys(ahead.constants, "constexpr"), constants, attributes)
    options = {"num_warps": ahead.num_warps, "num_stages": ahead.num_stages}
    binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    registers, spill_bytes = resources(binary.asm["cubin"])
    ptx: str = binary.asm["ptx"]
    shared: int = binary.metadata.shared
    spill_limit = ahead.spills.get(architecture, SPILL_LIMIT)
    fault = ""
    if spill_bytes > spill_limit:
        fault = f"spills {spill_bytes} bytes a thread, above {spill_limit}"
    elif shared > SHARED_LIMIT[architecture]:
        fault = f"takes {shared} bytes of shared memory, above {SHARED_LIMIT[architecture]}"
    features = tuple(name for name, is_in in FEATURES.items() if is_in(binary.asm["ttgir"], ptx))
    if missing := [name for name in ahead.needs if name not in features]:
        fault = fault or f"is not {missing[0]}"
    unit = next((unit for unit in ("tcgen05", "wgmma", "mma") if f"{unit}." in ptx), "")
    return Compiled(ahead.name, architecture, registers, spill_bytes, shared, unit, features, fault)


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of local memory a thread: spills, since these kernels index no local arrays)."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", text)
    assert found, f"cuobjdump says {text!r}"
    return int(found[1]), int(found[2]) + int(found[3])


def modules() -> list[str]:
    """Names of this package's modules that have `ahead()`."""
    folder = Path(__file__).parent
    names = sorted(m.name for m in pkgutil.iter_modules([str(folder)]))
    return [name for name in names if "\ndef ahead(" in (folder / f"{name}.py").read_text()]


def compile_modules(names: Iterable[str], architectures: Iterable[int]) -> Iterator[Compiled]:
    """Every specialisation of these modules for every architecture."""
    chosen = tuple(architectures)
    for name in names:
        module = importlib.import_module(f"megatronish.kernels.triton.{name}")
        for ahead in module.ahead():
            for architecture in (a for a in ahead.architectures if a in chosen):
                yield compile_ahead(ahead, architecture)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m megatronish.kernels.triton.ahead", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(modules())}; all by default")
    parser.add_argument(
        "--arch", nargs="+", type=int, choices=SHARED_LIMIT, default=list(SHARED_LIMIT), help="80 90 100 by default"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    if unknown := [name for name in options.modules if name not in modules()]:
        parser.error(f"no module {unknown[0]}; there are {', '.join(modules())}")
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET=1 is set, which compiles nothing; unset it")
    if not options.json:
        print(f"{'kernel':44} {'sm':>4} {'registers':>9} {'spilled B':>9} {'shared B':>9}  unit")
    faults = 0
    for row in compile_modules(options.modules or modules(), options.arch):
        faults += bool(row.fault)
        if options.json:
            print(json.dumps(asdict(row)), flush=True)
        else:
            numbers = f"{row.architecture:4} {row.registers:9} {row.spill_bytes:9} {row.shared_bytes:9}"
            print(f"{row.name:44} {numbers}  {' '.join((row.tensor_unit, *row.features)):28} {row.fault}", flush=True)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
