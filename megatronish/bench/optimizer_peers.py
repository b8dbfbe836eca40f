"""Optimizers that the kernels bench measures beside ours: (weights [N], gradients [N]) -> a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatronish.bench import adamw
from megatronish.bench.kernel_peers import Contender, eager_and_compiled, load, needs
from megatronish.kernels.installed import refuses_package

SQUARE_SUM = eager_and_compiled(lambda tensors: torch.stack(torch._foreach_norm(tensors)).square().sum().double())


def _optimizer(name: str, kind: Callable[[], Any], refuses: Callable[..., str | None], **how: Any) -> Contender:
    """One with torch's constructor."""
    n = adamw.NUMBERS

    def make(given: Any) -> Any:
        return kind()(given, lr=n.lr, betas=(n.beta1, n.beta2), eps=n.eps, weight_decay=n.weight_decay, **how)

    return Contender(name, lambda weights, gradients: adamw.peer(make, weights, gradients), refuses)


def torch_optimizers(*, whole: str = "") -> tuple[Contender, ...]:
    """torch's fused and foreach AdamW; `whole`: with the rest of a step."""
    return tuple(
        Contender(f"torch-{how}", lambda w, g, how=how: adamw.peer(adamw.torch_adamw(**{how: True}), w, g, whole=whole))
        for how in ("fused", "foreach")
    )


def _deepspeed(*, whole: str = "") -> Contender:
    """CPUAdam on CPU, FusedAdam on GPU; either is compiled on first use, which takes a minute or two."""

    def bind(weights: Tensor, gradients: Tensor) -> Callable[[], Any]:
        if weights.device.type == "cpu":
            make, reason = adamw.deepspeed_adam()
            if make is None:
                raise RuntimeError(reason)
            return adamw.peer(make, weights, gradients, whole=whole)
        n = adamw.NUMBERS
        kind = load("deepspeed.ops.adam").FusedAdam
        numbers = {"lr": n.lr, "betas": (n.beta1, n.beta2), "eps": n.eps, "weight_decay": n.weight_decay}
        how = {"adam_w_mode": True, "set_grad_none": False, **numbers}
        return adamw.peer(lambda given: kind(given, **how), weights, gradients, whole=whole)

    return Contender("deepspeed", bind, lambda *a: refuses_package("deepspeed"))


ADAMW = (
    *torch_optimizers(),
    _deepspeed(),
    _optimizer(
        "apex",
        lambda: load("apex.optimizers").FusedAdam,
        needs("apex", "amp_C", "apex.optimizers"),
        adam_w_mode=True,
        set_grad_none=False,
    ),
    _optimizer(
        "transformer-engine",
        lambda: load("transformer_engine.pytorch.optimizers").FusedAdam,
        needs("transformer_engine", "transformer_engine.pytorch.optimizers"),
        adam_w_mode=True,
    ),
)
OPTIMIZER_STEP = (*torch_optimizers(whole="torch"), _deepspeed(whole="deepspeed"))
