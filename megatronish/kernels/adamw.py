"""AdamW (Loshchilov and Hutter 2019, algorithm 2) on a flat slice, with the gradient scale applied on the way.

g = scale * grad;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
p = p - lr * (weight_decay * p + (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps))
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatronish import native
from megatronish.comm.streams import stream_handle
from megatronish.kernels.registry import register


@dataclass(frozen=True)
class AdamWStep:
    """The numbers of one step, those that do not live on the device."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    """t: the first step is 1."""


def reference(master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scale: Tensor, numbers: AdamWStep) -> None:
    """Plain PyTorch, in place; all of one dtype, float32 or float64."""
    g = grad * scale
    exp_avg.lerp_(g, 1.0 - numbers.beta1)
    exp_avg_sq.mul_(numbers.beta2).addcmul_(g, g, value=1.0 - numbers.beta2)
    denominator = (exp_avg_sq.sqrt() / math.sqrt(1.0 - numbers.beta2**numbers.step)).add_(numbers.eps)
    master.mul_(1.0 - numbers.lr * numbers.weight_decay)
    master.addcdiv_(exp_avg, denominator, value=-numbers.lr / (1.0 - numbers.beta1**numbers.step))


def _body(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scale: Tensor,
    low: Tensor | None,
    numbers: list[float],
    step: int,
) -> None:
    lr, beta1, beta2, eps, weight_decay = numbers
    module = native.cpu if master.device.type == "cpu" else native.cuda
    if module is None:
        reference(master, grad, exp_avg, exp_avg_sq, scale, AdamWStep(lr, beta1, beta2, eps, weight_decay, step))
        if low is not None:
            low.copy_(master)
        return
    addresses = [t.data_ptr() for t in (master, grad, exp_avg, exp_avg_sq)]
    settings: dict[str, float] = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay, "step": step}
    if master.device.type == "cpu":
        settings["threads"] = torch.get_num_threads()
    else:
        settings["stream"] = stream_handle(master.device)
    if master.dtype == torch.float64:
        assert low is None
        module.adamw_float64(*addresses, master.numel(), scale.data_ptr(), **settings)
    else:
        module.adamw_float32(*addresses, 0 if low is None else low.data_ptr(), master.numel(), scale.data_ptr(), **settings)


def _fake(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scale: Tensor,
    low: Tensor | None,
    numbers: list[float],
    step: int,
) -> None:
    return None


_op = register(
    "adamw_(Tensor(a!) master, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor scale, Tensor(d!)? low, "
    "float[] numbers, int step) -> ()",
    _body,
    _fake,
)


def adamw_(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, scale: Tensor, low: Tensor | None, numbers: AdamWStep
) -> None:
    """One step in place on contiguous slices [n] of one dtype, float32 or float64; `scale` is a scalar of that dtype on the device.

    `low`, bfloat16 [n], gets the new values rounded to nearest even. Does not wait for the device."""
    _op(
        master,
        grad,
        exp_avg,
        exp_avg_sq,
        scale,
        low,
        [numbers.lr, numbers.beta1, numbers.beta2, numbers.eps, numbers.weight_decay],
        numbers.step,
    )


def sample_inputs(dtype: torch.dtype, device: str) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, AdamWStep]]:
    """Inputs that tests and benches run every implementation on: (master, grad, exp_avg, exp_avg_sq, scale, low, numbers).
    For bfloat16 the master is float32 and `low` is given."""
    generator = torch.Generator(device).manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    cases = []
    for n, step, weight_decay in [(16, 1, 0.1), (1000, 7, 0.0), (4099, 100, 0.1)]:
        master, grad, exp_avg = (torch.randn(n, generator=generator, dtype=wide, device=device) for _ in range(3))
        exp_avg_sq = torch.rand(n, generator=generator, dtype=wide, device=device)
        if step == 1:
            exp_avg.zero_()
            exp_avg_sq.zero_()
        scale = torch.tensor(0.37, dtype=wide, device=device)
        low = torch.zeros(n, dtype=dtype, device=device) if dtype == torch.bfloat16 else None
        numbers = AdamWStep(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=weight_decay, step=step)
        cases.append((master, grad, exp_avg, exp_avg_sq, scale, low, numbers))
    return cases
