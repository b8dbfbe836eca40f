"""The native modules, where they were built: `cpu` and `cuda` are modules or None. Every operation has a Python reference as well.

Their functions take addresses (`tensor.data_ptr()`), sizes, and a number of threads or a stream: csrc/cpu/cpu.h, csrc/cuda/cuda.h.
`python -m megatronish.native` prints `describe()`.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

INTERFACE = 3
"""The number in csrc/bindings.cpp: an editable installation may hold a module that was built from older sources."""

OPERATIONS = {"cpu": "AdamW, gathering and ordering of samples, BPE, dropout", "cuda": "AdamW"}


def _load(name: str) -> tuple[ModuleType | None, str]:
    """The module, or None; and how it went, in words."""
    try:
        module = importlib.import_module(f"megatronish._{name}")
    except ModuleNotFoundError:
        record = Path(__file__).with_name("native_build.json")
        if not record.is_file():
            return None, "not built: the package was not installed (run `make setup` or `pip install .`)"
        return None, str(json.loads(record.read_text()).get(name, "not built"))
    except ImportError as error:
        return None, f"built, but does not load: {error}"
    if getattr(module, "interface", 1) != INTERFACE:
        return None, "built from other sources: run `make setup` or `pip install .` again"
    return module, "built"


cpu, _cpu_outcome = _load("cpu")
cuda, _cuda_outcome = _load("cuda")


def describe() -> str:
    """What is native, what runs in Python, and why; one line a module. Does not touch a GPU."""
    lines = []
    for name, module, outcome in (("cpu", cpu, _cpu_outcome), ("cuda", cuda, _cuda_outcome)):
        where = "native" if module is not None else f"in Python ({outcome})"
        lines.append(f"{name}: {OPERATIONS[name]}: {where}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(describe())
