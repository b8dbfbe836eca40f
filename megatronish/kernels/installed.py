"""What stands in the way of a body that needs a package or a device."""

from __future__ import annotations

import importlib
from functools import cache

import torch
from torch import Tensor

from megatronish.packages import find_package


@cache
def refuses_package(name: str, *modules: str) -> str | None:
    """Why a package cannot be used; `modules` are imported, since an index may have another project under the same name."""
    if find_package(name) is None:
        return f"the package {name} is not installed"
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:
            return f"{module} cannot be imported ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    return None


@cache
def _refuses_triton(on_gpu: bool, dtype: torch.dtype) -> str | None:
    if (reason := refuses_package("triton")) or on_gpu:
        return reason
    import triton

    if not triton.knobs.runtime.interpret:
        return "tensors on CPU (Triton compiles for GPUs)"
    return "bfloat16 in Triton's interpreter, which gets it wrong" if dtype == torch.bfloat16 else None


def refuses_triton(x: Tensor) -> str | None:
    """Why Triton cannot run on tensors such as `x`. In its interpreter (TRITON_INTERPRET=1) it runs on CPU."""
    return _refuses_triton(x.device.type == "cuda", x.dtype)


def refuses_triton_of_float32(x: Tensor) -> str | None:
    """The same for kernels that compute in float32."""
    return refuses_triton(x) or ("float64 (it computes in float32)" if x.dtype == torch.float64 else None)


def refuses_cpu(x: Tensor) -> str | None:
    """For bodies that want a GPU."""
    return None if x.device.type == "cuda" else "tensors on CPU"
