"""Triton's bodies of the attention ops, `attention` and `masked_attention`, forward and backward."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatronish.kernels.installed import refuses_triton
from megatronish.kernels.registry import Implementation

MODULES = {"triton": "attention", "triton-tma": "attention_tma"}
"""Module of kernels/triton by name of the body."""
ONLY_BY_NAME = ("attention_tma",)
"""Warps that wait for each other: until they have run on a GPU, `auto` does not try them."""


def triton_bodies(masks_of: Callable[..., tuple[Any, float]], *, backward: bool) -> dict[str, Implementation]:
    """By name. `masks_of`, of the op's arguments behind the tensors and of the query: (triton's Masks, scale)."""
    make = _backward if backward else _forward
    return {name: make(module, masks_of) for name, module in MODULES.items()}


def _load(module: str) -> Any:
    return importlib.import_module(f"megatronish.kernels.triton.{module}")


def _forward(module: str, masks_of: Callable[..., tuple[Any, float]]) -> Implementation:
    def run(query: Tensor, key: Tensor, value: Tensor, *mask: Any) -> tuple[Tensor, Tensor]:
        got: tuple[Tensor, Tensor] = _load(module).forward(query, key, value, *masks_of(query, *mask))
        return got

    return Implementation(run, _refuses(module, masks_of), only_by_name=module in ONLY_BY_NAME)


def _backward(module: str, masks_of: Callable[..., tuple[Any, float]]) -> Implementation:
    def run(
        dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *mask: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        given = (dout.contiguous(), query, key, value, out.contiguous(), lse)
        got: tuple[Tensor, Tensor, Tensor] = _load(module).backward(*given, *masks_of(query, *mask))
        return got

    of_forward = _refuses(module, masks_of)

    def refuses(dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *mask: Any) -> str | None:
        return of_forward(query, key, value, *mask)

    return Implementation(run, refuses, only_by_name=module in ONLY_BY_NAME)


def _refuses(module: str, masks_of: Callable[..., tuple[Any, float]]) -> Callable[..., str | None]:
    def refuses(query: Tensor, key: Tensor, value: Tensor, *mask: Any) -> str | None:
        if reason := refuses_triton(query):
            return reason
        found: str | None = _load(module).refuses(query, key, value, masks_of(query, *mask)[0])
        return found

    return refuses
