"""AdamW (Loshchilov and Hutter 2019, algorithm 2) on a flat slice, with the gradient scale applied on the way.

g = scale * grad;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
p = p - lr * (weight_decay * p + (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps))

`scalars` = (scale, t) lives on the device: whether a step counts is known there first. A scale that is not finite refuses the
update: no weight and no moment is written.

What a parameter takes, beside its gradient, and what a step moves with a float32 gradient (which is not zeroed):

    master              parameter   moments     bytes held   bytes moved
    float32             bfloat16    float32     2 + 4 + 8    30
    float32             bfloat16    bfloat16    2 + 4 + 4    22
    int16 remainders    bfloat16    float32     2 + 2 + 8    28
    int16 remainders    bfloat16    bfloat16    2 + 2 + 4    20
    bfloat16, itself    -           bfloat16    2 + 4        16

The master's dtype says which. A float32 master is its bfloat16 parameter, rounded to nearest with ties away from zero, and the
lower 16 bits of its pattern: nothing is lost. bfloat16 moments, and parameters without a master, are rounded to nearest even or by
chance, up with the probability that makes the mean right: small changes to them are not lost on average. The chance is a hash of
(key of the tensor, number of the update, index in the whole tensor), so any cut of it draws the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from megatronish import native
from megatronish.comm.streams import stream_handle
from megatronish.kernels.installed import refuses_triton
from megatronish.kernels.registry import Implementation, register

Rounding = Literal["nearest", "stochastic"]

SEGMENT_COLUMNS = ("stop", "decays", "key", "offset", "inner", "row", "first")
"""Of a row of `segments` (int64): elements of the slice from the row before's `stop` to this one's belong to one tensor. Element i
of the slice is number e = i + offset of what this rank holds of it, number e // inner * row + first + e % inner of the whole."""

_KINDS = {torch.float32: 1, torch.float64: 2, torch.bfloat16: 3, torch.float16: 4, torch.int16: 5}
"""csrc/cpu/cpu.h and csrc/cuda/cuda.h."""


@dataclass(frozen=True)
class AdamWNumbers:
    """The numbers of one step that the host knows."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


def join_master(low: Tensor, remainder: Tensor) -> Tensor:
    """The float32 master of a bfloat16 parameter and its int16 remainders."""
    return ((low.view(torch.int16).int() << 16) + remainder.int()).view(torch.float32)


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """(bfloat16 parameter, int16 remainder): nearest, ties away from zero, since with ties to even two masters would have the same
    two halves."""
    bits = master.view(torch.int32)
    return ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


_MASK = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """The "lowbias32" of Chris Wellons' hash-prospector, on 32-bit words in int64 tensors."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK
    return x ^ (x >> 15)


def random_words(segments: Tensor, n: int, t: Tensor) -> Tensor:
    """The 32-bit word (int64) of each of the slice's n elements in update number `t`. The first moment is rounded by its upper
    half, the second by its lower, a parameter by the upper half of the word mixed once more."""
    i = torch.arange(n, device=segments.device)
    _, _, key, offset, inner, row, first = segments[torch.searchsorted(segments[:, 0].contiguous(), i, right=True)].unbind(1)
    local = i + offset
    index = local // inner * row + first + local % inner
    key0 = _mix((key & _MASK) ^ _mix(((key >> 32) & _MASK) ^ _mix(t.long() & _MASK)))
    key1 = _mix(key0 ^ ((0x9E3779B9 + ((index >> 32) & _MASK)) & _MASK))
    return _mix((_mix((index & _MASK) ^ key0) + key1) & _MASK)


def _rounded(x: Tensor, dtype: torch.dtype, random: Tensor | None) -> Tensor:
    """x in `dtype`: to nearest even, or bfloat16 by 16 random bits that are added to the pattern of a float32 and cut off."""
    if random is None or dtype != torch.bfloat16:
        return x.to(dtype)
    drawn = ((x.float().view(torch.int32) + random.int()) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(torch.isfinite(x), drawn, x.to(dtype))


def reference(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: Tensor,
    low: Tensor | None,
    numbers: AdamWNumbers,
    segments: Tensor | None = None,
    rounding: Rounding = "nearest",
    zero_grad: bool = False,
) -> None:
    """Plain PyTorch, in place, an operation's rounding each: the arithmetic of the native code, in the gradient's dtype."""
    scale, t = scalars.double().unbind()
    applied = torch.isfinite(scale)
    wide = grad.dtype
    if master.dtype == torch.int16:
        assert low is not None
        old = join_master(low, master)
    else:
        old = master.to(wide)
    g = grad * scale.to(wide)
    old_avg = exp_avg.to(wide)
    new_avg = old_avg + (g - old_avg) * (1.0 - numbers.beta1)
    new_avg_sq = exp_avg_sq.to(wide) * numbers.beta2 + g * (1.0 - numbers.beta2) * g
    root_correction = (1.0 - numbers.beta2**t).sqrt().to(wide)
    step_size = (numbers.lr / (1.0 - numbers.beta1**t)).to(wide)
    # A root of torch on CPU may be off by its last bit in float32; that of a float64 number is right once it is rounded.
    denominator = new_avg_sq.double().sqrt().to(wide) / root_correction + numbers.eps
    decay = torch.full_like(g, 1.0 - numbers.lr * numbers.weight_decay)
    words = None
    if segments is not None:
        n = torch.arange(grad.numel(), device=grad.device)
        decays = segments[torch.searchsorted(segments[:, 0].contiguous(), n, right=True), 1] != 0
        decay = torch.where(decays, decay, 1.0)
        if rounding == "stochastic":
            words = random_words(segments, grad.numel(), t)
    new = old * decay - (new_avg / denominator) * step_size

    results = [
        (exp_avg, _rounded(new_avg, exp_avg.dtype, None if words is None else words >> 16)),
        (exp_avg_sq, _rounded(new_avg_sq, exp_avg_sq.dtype, None if words is None else words & 0xFFFF)),
    ]
    if master.dtype == torch.int16:
        assert low is not None
        results += zip((low, master), split_master(new), strict=True)
    else:
        random = None if words is None else _mix((words + 0x9E3779B9) & _MASK) >> 16
        results.append((master, _rounded(new, master.dtype, random)))
        if low is not None:
            results.append((low, new.to(low.dtype)))
    for kept, value in results:
        kept.copy_(torch.where(applied, value, kept))
    if zero_grad:
        grad.zero_()


def _body(*given: Any) -> None:
    device = given[0].device
    module = native.cpu if device.type == "cpu" else native.cuda
    if module is None:
        _reference(*given)
        return
    where = {"threads": torch.get_num_threads()} if device.type == "cpu" else {"stream": stream_handle(device)}
    call_native(module, where, *given)


def call_native(
    module: ModuleType,
    where: dict[str, int],
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: Tensor,
    low: Tensor | None,
    numbers: list[float],
    segments: Tensor | None,
    rounding: str,
    zero_grad: bool,
) -> None:
    """The op by megatronish._cpu or ._cuda; `where`: threads, or the stream."""
    lr, beta1, beta2, eps, weight_decay = numbers
    module.adamw(
        master.data_ptr(),
        _KINDS[master.dtype],
        grad.data_ptr(),
        exp_avg.data_ptr(),
        exp_avg_sq.data_ptr(),
        _KINDS[exp_avg.dtype],
        0 if low is None else low.data_ptr(),
        0 if low is None else _KINDS[low.dtype],
        grad.numel(),
        scalars.data_ptr(),
        0 if segments is None else segments.data_ptr(),
        0 if segments is None else len(segments),
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        stochastic=rounding == "stochastic",
        zero_gradient=zero_grad,
        **where,
    )


def _reference(*arguments: Any) -> None:
    *given, numbers, segments, rounding, zero_grad = arguments
    master, grad, exp_avg, exp_avg_sq, scalars, low = given
    reference(master, grad, exp_avg, exp_avg_sq, scalars, low, AdamWNumbers(*numbers), segments, rounding, zero_grad)


def _triton(*arguments: Any) -> None:
    from megatronish.kernels.triton.adamw import forward

    forward(*arguments)


def _triton_refuses(*arguments: Any) -> str | None:
    if reason := refuses_triton(arguments[1]):
        return reason
    from megatronish.kernels.triton.adamw import refuses

    return refuses(*arguments)


def _fake(*arguments: Any) -> None:
    return None


_op = register(
    "adamw_(Tensor(a!) master, Tensor(b!) grad, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, Tensor scalars, Tensor(e!)? low, "
    "float[] numbers, Tensor? segments, str rounding, bool zero_grad) -> ()",
    _body,
    _fake,
    also={"triton": Implementation(_triton, _triton_refuses), "reference": Implementation(_reference)},
    choice="adamw",
    named="native",
)


def _check(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    low: Tensor | None,
    segments: Tensor | None,
    rounding: Rounding,
) -> None:
    wide, tensors = grad.dtype, [master, grad, exp_avg, exp_avg_sq, *([] if low is None else [low])]
    masters: list[torch.dtype] = [torch.float64] if wide == torch.float64 else [torch.float32, torch.int16, torch.bfloat16]
    moments = [torch.float64] if wide == torch.float64 else [torch.float32, torch.bfloat16]
    lows_of: dict[torch.dtype, list[torch.dtype | None]] = {
        torch.float32: [None, torch.bfloat16, torch.float16],
        torch.int16: [torch.bfloat16],
    }
    lows = lows_of.get(master.dtype, [None])
    low_dtype = None if low is None else low.dtype
    rules: list[tuple[str, torch.dtype | None, Sequence[torch.dtype | None]]] = [
        ("grad", wide, [torch.float32, torch.float64]),
        ("master", master.dtype, masters),
        ("exp_avg", exp_avg.dtype, moments),
        ("exp_avg_sq", exp_avg_sq.dtype, [exp_avg.dtype]),
        ("low", low_dtype, lows),
    ]
    for name, dtype, allowed in rules:
        if dtype not in allowed:
            raise ValueError(f"adamw_: {name} is {dtype}; beside grad {wide} and master {master.dtype} it can be {allowed}")
    if any(t.numel() != grad.numel() or not t.is_contiguous() for t in tensors):
        raise ValueError(f"adamw_: tensors must be contiguous and of one size, given {[tuple(t.shape) for t in tensors]}")
    if rounding == "stochastic" and segments is None:
        raise ValueError("adamw_: rounding=stochastic needs segments, which say which element of which tensor each one is")


def adamw_(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    scalars: Tensor,
    low: Tensor | None,
    numbers: AdamWNumbers,
    segments: Tensor | None = None,
    rounding: Rounding = "nearest",
    zero_grad: bool = False,
) -> None:
    """One step in place on contiguous slices [n]; `grad` and `scalars` [2] on the device, (factor of the gradients, number of this
    update from 1), are float32 or float64. A factor that is not finite: no weight and no moment is written.

    `master`: the gradient's dtype; int16 remainders of bfloat16 `low`; or bfloat16 parameters themselves. Moments: the gradient's
    dtype or bfloat16. `low`, bfloat16 or float16 [n], gets the new values rounded to nearest. `segments`, int64 [k, 7] on the
    device (SEGMENT_COLUMNS), covers the slice: where given, only what `decays` gets weight decay. `zero_grad`: the gradient is
    zeros afterwards, of a refused step too. ValueError for another combination. Deterministic. Does not wait for the device."""
    _check(master, grad, exp_avg, exp_avg_sq, low, segments, rounding)
    n = numbers
    hyper = [n.lr, n.beta1, n.beta2, n.eps, n.weight_decay]
    _op(master, grad, exp_avg, exp_avg_sq, scalars, low, hyper, segments, rounding, zero_grad)


def sample_inputs(dtype: torch.dtype, device: str) -> list[tuple[Any, ...]]:
    """Inputs that tests and benches run every implementation on: the arguments of `reference`. For bfloat16 and float16 the master
    is float32 and `low` is given; for bfloat16 moments are bfloat16 in some cases. One is refused."""
    generator = torch.Generator(device).manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # Decays, a bias that does not, and a part of a matrix cut by columns whose numbers pass 2^32.
    segments = torch.tensor(
        [
            [40, 1, 5, 0, 1 << 40, 1 << 40, 0],
            [57, 0, -(2**62), -40, 1 << 40, 1 << 40, 3],
            [4099, 1, 77, -57, 37, 111, (1 << 32) - 999],
        ]
    )
    cases: list[tuple[Any, ...]] = []
    for n, step, weight_decay, scale, narrow, cut in [
        (16, 1, 0.1, 0.37, False, False),
        (1000, 7, 0.0, 0.37, False, False),
        (4099, 100, 0.1, 0.37, False, True),
        (4099, 100, 0.1, 0.37, True, True),
        (1000, 7, 0.1, 0.37, True, False),
        (33, 3, 0.1, float("inf"), False, False),
    ]:
        kept = torch.bfloat16 if narrow and dtype == torch.bfloat16 else wide
        master, grad, exp_avg = (torch.randn(n, generator=generator, dtype=wide, device=device) for _ in range(3))
        exp_avg_sq = torch.rand(n, generator=generator, dtype=wide, device=device)
        if step == 1:
            exp_avg.zero_()
            exp_avg_sq.zero_()
        scalars = torch.tensor([scale, step], dtype=wide, device=device)
        low = torch.zeros(n, dtype=dtype, device=device) if dtype in (torch.bfloat16, torch.float16) else None
        numbers = AdamWNumbers(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=weight_decay)
        more = (segments.to(device), "stochastic", True) if cut else (None, "nearest", False)
        cases.append((master, grad, exp_avg.to(kept), exp_avg_sq.to(kept), scalars, low, numbers, *more))
    return cases
