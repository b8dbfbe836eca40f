"""The sum of squares of the elements of many tensors, for a gradient norm: one pass, in float64, in an order that sizes decide.

A result that is one number for a hundred million elements must not depend on how they are cut over threads, nor, but for float64's
last bits, over ranks: a clip factor would. Squares of float32 numbers are exact in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatronish import native
from megatronish.comm.streams import stream_handle
from megatronish.kernels.installed import refuses_triton
from megatronish.kernels.registry import Implementation, register


def reference(tensors: list[Tensor]) -> Tensor:
    """Plain PyTorch: a float64 scalar."""
    return torch.stack([t.double().square().sum() for t in tensors]).sum()


_ROW = 1024


def _by_rows(flat: Tensor) -> Tensor:
    """torch's vector_norm on CPU adds float32 squares one after the other: off by 5e-4 on 12.6 M elements. Rows of 1,024 first cost
    no more time and are off by 1e-9."""
    whole = flat.numel() // _ROW * _ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1)
    return rows.square().sum(dtype=torch.float64) + torch.linalg.vector_norm(flat[whole:]).square().double()


def _body(tensors: list[Tensor]) -> Tensor:
    device, dtype = tensors[0].device, tensors[0].dtype
    given = [(t.data_ptr(), t.numel()) for t in tensors]
    if device.type == "cpu" and native.cpu is not None:
        value = native.cpu.square_sum(given, dtype == torch.float64, threads=torch.get_num_threads())
        return torch.tensor(value, dtype=torch.float64)
    if device.type == "cuda" and native.cuda is not None:
        partials = torch.empty(sum(-(-n // native.cuda.sum_block) for _, n in given), dtype=torch.float64, device=device)
        total = torch.empty((), dtype=torch.float64, device=device)
        where = {"stream": stream_handle(device)}
        native.cuda.square_sum(given, dtype == torch.float64, partials.data_ptr(), total.data_ptr(), **where)
        return total
    return torch.stack([_by_rows(t) for t in tensors]).sum()


def _fake(tensors: list[Tensor]) -> Tensor:
    return torch.empty((), dtype=torch.float64, device=tensors[0].device)


def _triton(tensors: list[Tensor]) -> Tensor:
    from megatronish.kernels.triton.adamw import square_sum

    return square_sum(tensors)


def _triton_refuses(tensors: list[Tensor]) -> str | None:
    return refuses_triton(tensors[0])


_op = register(
    "square_sum(Tensor[] tensors) -> Tensor",
    _body,
    _fake,
    also={"triton": Implementation(_triton, _triton_refuses), "reference": Implementation(reference)},
    named="native",
)


def square_sum(tensors: list[Tensor]) -> Tensor:
    """The sum of squares of all elements of one or more contiguous tensors of one dtype, float32 or float64, on one device: a
    float64 scalar there. The same bits every time; on CPU on any number of threads. Does not wait for the device."""
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.float64} or not all(t.is_contiguous() for t in tensors):
        raise ValueError(f"square_sum: contiguous tensors of one dtype, float32 or float64, are needed, given {dtypes}")
    total: Tensor = _op(tensors)
    return total


def sample_inputs(dtype: torch.dtype, device: str) -> list[tuple[list[Tensor]]]:
    """Inputs that tests and benches run every implementation on. 16-bit dtypes: float32, as gradients are."""
    generator = torch.Generator(device).manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    cases = []
    for sizes in ((1,), (0, 33, 7), (4099, 16384, 40000)):
        cases.append(([torch.randn(n, generator=generator, dtype=wide, device=device) for n in sizes],))
    return cases
