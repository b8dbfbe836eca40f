"""AdamW (Loshchilov and Hutter 2019, algorithm 2) on a flat slice, with the gradient scale applied on the way.

g = scale * grad;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
p = p - lr * (weight_decay * p + (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps))

`scalars` = (scale, t) lives on the device: whether a step counts is known there first. A scale that is not finite refuses the
update: nothing is written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatronish import native
from megatronish.comm.streams import stream_handle
from megatronish.kernels.registry import register


@dataclass(frozen=True)
class AdamWNumbers:
    """The numbers of one step that the host knows."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


def reference(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: Tensor,
    low: Tensor | None,
    numbers: AdamWNumbers,
) -> None:
    """Plain PyTorch, in place; all of one dtype, float32 or float64, but for `low`."""
    scale, t = scalars.double().unbind()
    applied = torch.isfinite(scale)
    g = grad * scale.to(grad.dtype)
    new_avg = exp_avg.lerp(g, 1.0 - numbers.beta1)
    new_avg_sq = (exp_avg_sq * numbers.beta2).addcmul_(g, g, value=1.0 - numbers.beta2)
    root_correction = (1.0 - numbers.beta2**t).sqrt().to(grad.dtype)
    step_size = (numbers.lr / (1.0 - numbers.beta1**t)).to(grad.dtype)
    denominator = (new_avg_sq.sqrt() / root_correction).add_(numbers.eps)
    new_master = master * (1.0 - numbers.lr * numbers.weight_decay) - step_size * (new_avg / denominator)
    for old, new in ((master, new_master), (exp_avg, new_avg), (exp_avg_sq, new_avg_sq)):
        old.copy_(torch.where(applied, new, old))
    if low is not None:
        low.copy_(torch.where(applied, new_master.to(low.dtype), low))


def _body(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: Tensor,
    low: Tensor | None,
    numbers: list[float],
) -> None:
    lr, beta1, beta2, eps, weight_decay = numbers
    module = native.cpu if master.device.type == "cpu" else native.cuda
    if module is None:
        reference(master, grad, exp_avg, exp_avg_sq, scalars, low, AdamWNumbers(lr, beta1, beta2, eps, weight_decay))
        return
    addresses = [t.data_ptr() for t in (master, grad, exp_avg, exp_avg_sq)]
    settings: dict[str, float] = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    if master.device.type == "cpu":
        settings["threads"] = torch.get_num_threads()
    else:
        settings["stream"] = stream_handle(master.device)
    if master.dtype == torch.float64:
        assert low is None
        module.adamw_float64(*addresses, master.numel(), scalars.data_ptr(), **settings)
    else:
        assert low is None or low.dtype in (torch.bfloat16, torch.float16)
        copies = [low.data_ptr() if low is not None and low.dtype == dtype else 0 for dtype in (torch.bfloat16, torch.float16)]
        module.adamw_float32(*addresses, *copies, master.numel(), scalars.data_ptr(), **settings)


def _fake(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: Tensor,
    low: Tensor | None,
    numbers: list[float],
) -> None:
    return None


_op = register(
    "adamw_(Tensor(a!) master, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor scalars, Tensor(d!)? low, "
    "float[] numbers) -> ()",
    _body,
    _fake,
)


def adamw_(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    scalars: Tensor,
    low: Tensor | None,
    numbers: AdamWNumbers,
) -> None:
    """One step in place on contiguous slices [n] of one dtype, float32 or float64; `scalars` [2] of that dtype on the device is
    (factor of the gradients, number of this update from 1). A factor that is not finite: nothing is written.

    `low`, bfloat16 or float16 [n], gets the new values rounded to nearest even. Does not wait for the device."""
    n = numbers
    _op(master, grad, exp_avg, exp_avg_sq, scalars, low, [n.lr, n.beta1, n.beta2, n.eps, n.weight_decay])


def sample_inputs(
    dtype: torch.dtype, device: str
) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, AdamWNumbers]]:
    """Inputs that tests and benches run every implementation on: (master, grad, exp_avg, exp_avg_sq, scalars, low, numbers).
    For bfloat16 and float16 the master is float32 and `low` is given. The last one is refused."""
    generator = torch.Generator(device).manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    cases = []
    for n, step, weight_decay, scale in [
        (16, 1, 0.1, 0.37),
        (1000, 7, 0.0, 0.37),
        (4099, 100, 0.1, 0.37),
        (33, 3, 0.1, float("inf")),
    ]:
        master, grad, exp_avg = (torch.randn(n, generator=generator, dtype=wide, device=device) for _ in range(3))
        exp_avg_sq = torch.rand(n, generator=generator, dtype=wide, device=device)
        if step == 1:
            exp_avg.zero_()
            exp_avg_sq.zero_()
        scalars = torch.tensor([scale, step], dtype=wide, device=device)
        low = torch.zeros(n, dtype=dtype, device=device) if dtype in (torch.bfloat16, torch.float16) else None
        numbers = AdamWNumbers(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=weight_decay)
        cases.append((master, grad, exp_avg, exp_avg_sq, scalars, low, numbers))
    return cases
