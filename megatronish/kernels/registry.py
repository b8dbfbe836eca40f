"""Registers an op with torch.library: a schema, the body for real tensors, and the shapes for fake ones.

The body is opaque to fake tensors and torch.compile, so what an op returns is all they ever see: a rehearsal counts the same bytes
whichever implementation runs. autograd.Functions stand outside, in each op's file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("megatronish", "FRAGMENT")


def register(schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define `megatronish::<schema>` and return the callable. `fake` gives outputs of the right shape, dtype and strides."""
    name = schema[: schema.index("(")]
    _library.define(schema)
    _library.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"megatronish::{name}", fake, lib=_library)
    op: Callable[..., Any] = getattr(torch.ops.megatronish, name).default
    return op


def accumulate_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that sums over `x` are kept in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
