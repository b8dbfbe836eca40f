"""Dropout (Srivastava et al. 2014) whose bits are a hash of (key, global sample number, coordinates in the sample).

The key stands for seed and site (`stream_key(seed, "dropout", module name)`). Never a function of rank, microbatch or shard, so
every layout drops the same elements, and backward and recomputation draw the bits again instead of keeping them. There is no state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatronish import native
from megatronish.comm import random
from megatronish.kernels.registry import register


def keep_bits(samples_B: Tensor, *, start: int, count: int, key: int, rate: float) -> Tensor:
    """`comm.random.keep_bits`, native where built, on CPU."""
    function = getattr(native.cpu, "keep_bits", None)
    if function is None or samples_B.device.type != "cpu":
        return random.keep_bits(samples_B, start=start, count=count, key=key, rate=rate)
    samples_B = samples_B.contiguous()
    keep = torch.empty(len(samples_B), count, dtype=torch.bool)
    numbers = (start, count, key, round(rate * 2.0**32))
    function(samples_B.data_ptr(), len(samples_B), *numbers, keep.data_ptr(), threads=torch.get_num_threads())
    return keep


def reference(x: Tensor, samples_B: Tensor, batch_dim: int, first: int, key: int, rate: float) -> Tensor:
    """Plain PyTorch, a hash an element: x / (1 - rate) where word e % 4 of block e // 4 is at least rate * 2^32, else 0."""
    by_sample = x.movedim(batch_dim, 0)
    row = by_sample[0, 0].numel()
    element = torch.arange(by_sample[0].numel(), device=x.device) + first * row
    element_BN = element.expand(len(samples_B), -1)
    words = torch.stack(random.philox(element_BN // 4, key, samples_B[:, None].expand_as(element_BN)))
    word_BN = words.gather(0, (element_BN % 4)[None]).squeeze(0)
    keep = (word_BN >= round(rate * 2.0**32)).view(by_sample.shape).movedim(0, batch_dim)
    return torch.where(keep, x * (1.0 / (1.0 - rate)), torch.zeros_like(x))


def drop(x: Tensor, samples_B: Tensor, batch_dim: int, first: int, key: int, rate: float) -> Tensor:
    """The body of the op, without a gradient; `dropout` is what models call."""
    by_sample = x.movedim(batch_dim, 0)
    count = by_sample[0].numel()
    row = count // max(1, by_sample.shape[1])
    keep = keep_bits(samples_B, start=first * row, count=count, key=key, rate=rate)
    out = x * (1.0 / (1.0 - rate))
    return out.masked_fill_(keep.logical_not().view(by_sample.shape).movedim(0, batch_dim), 0.0)


def _forward_fake(x: Tensor, samples_B: Tensor, batch_dim: int, first: int, key: int, rate: float) -> Tensor:
    return torch.empty_like(x)


_op = register("dropout(Tensor x, Tensor samples, int batch_dim, int first, int key, float rate) -> Tensor", drop, _forward_fake)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, samples_B: Tensor, *numbers: Any) -> Tensor:
        # Not by save_for_backward: full recomputation runs a block up to the last tensor saved in it, and this one comes after the
        # last sum over ranks.
        ctx.samples_B, ctx.numbers = samples_B, numbers
        return _op(x, samples_B, *numbers)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _op(dy.contiguous(), ctx.samples_B, *ctx.numbers), None, None, None, None, None


def dropout(x: Tensor, samples_B: Tensor, *, batch_dim: int, first: int, key: int, rate: float) -> Tensor:
    """Zero a share `rate` of x, scale the rest by 1 / (1 - rate). Any floating dtype; keeps only the sample numbers for backward.

    samples_B: int64 global numbers of the samples along `batch_dim`. Without that dimension x is the part of a sample that begins
    at index `first` of its leading dimension; the other dimensions are whole. An element's place in the sample, row-major, its
    number and `key` decide its bit."""
    out: Tensor = _Dropout.apply(x, samples_B, batch_dim, first, key, rate)
    return out


def sample_inputs(dtype: torch.dtype, device: str) -> list[tuple[Tensor, Tensor, int, int, int, float]]:
    """Inputs that tests and benches run every implementation on: parts that begin inside a block of four, large sample numbers."""
    generator = torch.Generator(device).manual_seed(0)
    cases = []
    for shape, batch_dim, first, key, rate in [
        ((6, 2, 32), 1, 0, 5, 0.1),
        ((3, 3, 7), 1, 11, -(2**62), 0.5),
        ((2, 4, 5, 5), 0, 4, 77, 0.25),
    ]:
        x = torch.randn(*shape, generator=generator, dtype=dtype, device=device)
        samples_B = torch.arange(shape[batch_dim], device=device) * 3_000_000_001
        cases.append((x, samples_B, batch_dim, first, key, rate))
    return cases
