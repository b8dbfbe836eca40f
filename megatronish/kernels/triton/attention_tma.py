"""The attention of attention.py with tiles that the tensor memory accelerator copies (Hopper, Blackwell), and, in forward, warps
that load beside warps that compute.

The kernels are attention.py's; here are the descriptors through which they read, and their cuts. What triton 3.7 asks for: on
Hopper, warp specialisation takes four warps, one loop (two end in "expected non-null blocks"), tiles of 128 queries, of which it
makes two consumers of 64 (given 64, both do the same work), and a descriptor of Q that is made in the kernel, since it must halve
its block. Blackwell takes two loops and any descriptor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import _allocation
from triton.tools.tensor_descriptor import TensorDescriptor

from megatronish.kernels.triton import attention
from megatronish.kernels.triton.ahead import Ahead
from megatronish.kernels.triton.attention import Masks, Tile, Tiles
from megatronish.kernels.triton.launch import architecture

DTYPES = (torch.float16, torch.bfloat16)
LEAST_ARCHITECTURE = 90
LARGEST_BACKWARD = 128
"""Head size; above, copies of whole rows leave no registers (136 to 856 bytes spilled), and pointers read."""


def refuses(query: Tensor, key: Tensor, value: Tensor, masks: Masks) -> str | None:
    """Why these kernels do not take such inputs; None: they do."""
    if architecture() < LEAST_ARCHITECTURE:
        return f"sm_{architecture()}, which has no tensor memory accelerator (compute capability 9.0 and up)"
    if architecture() in attention.NARROW:
        return f"sm_{architecture()}, whose blocks have 99 KiB of shared memory (up to 192 needed)"
    if reason := attention.refuses(query, key, value, masks):
        return reason
    if query.dtype not in DTYPES and not triton.knobs.runtime.interpret:
        return f"dtype {query.dtype} (float16 and bfloat16 only)"
    if masks.documents_TB is not None or masks.samples_B is not None:
        return "documents or dropout of the weights"
    given = (query, key, value)
    if any(x.numel() == 0 for x in given):
        return "no tokens"
    if any(x.data_ptr() % 16 or any(s * x.element_size() % 16 for s in _strides(x)) for x in given):
        return "rows that are not aligned to 16 bytes"
    return None


def _strides(x: Tensor) -> list[int]:
    """Of dimensions 1, 2 and 0; where there is one element none is used, and torch gives any number."""
    return [x.stride(dim) if x.shape[dim] > 1 else 8 for dim in (1, 2, 0)]


def _descriptor(x_SBHK: Tensor, rows: int) -> Any:
    """Of [B, H, S, K], by blocks of `rows` rows of one head of one sample; outside there are zeros."""
    S, B, H, K = x_SBHK.shape
    padded = max(16, triton.next_power_of_2(K))
    return TensorDescriptor(x_SBHK, [B, H, S, K], [*_strides(x_SBHK), 1], [1, 1, rows, padded])


def forward(query_SBHK: Tensor, key_TBGK: Tensor, value_TBGK: Tensor, masks: Masks, scale: float) -> tuple[Tensor, Tensor]:
    """As attention.forward."""
    tile = tiles_for(query_SBHK.shape[-1], architecture=architecture()).forward
    tma = forward_mode(architecture())
    query = query_SBHK if tma == 2 else _descriptor(query_SBHK, tile.queries)
    sources = (query, _descriptor(key_TBGK, tile.keys), _descriptor(value_TBGK, tile.keys))
    with _workspace_on(query_SBHK.device) if tma == 2 else nullcontext():
        return attention.launch_forward(sources, query_SBHK, key_TBGK, value_TBGK, masks, scale, tile=tile, tma=tma)


@contextmanager
def _workspace_on(device: torch.device) -> Iterator[None]:
    """For the descriptors made in the kernel, 128 bytes a program. Whoever has set an allocator of this thread, which may be
    autograd's, finds it again."""
    before = _allocation._allocator.get()
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
    try:
        yield
    finally:
        triton.set_allocator(before)


def forward_mode(architecture: int) -> int:
    """`TMA` of attention.forward_kernel."""
    return 2 if architecture < 100 else 1


def backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, masks: Masks, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As attention.backward."""

    if query.shape[-1] > LARGEST_BACKWARD:
        return attention.backward(dout, query, key, value, out, lse, masks, scale)

    def sources(tile: Tile) -> tuple[Any, Any, Any, Any]:
        q, k = tile.queries, tile.keys
        return _descriptor(dout, q), _descriptor(query, q), _descriptor(key, k), _descriptor(value, k)

    tiles = tiles_for(query.shape[-1], architecture=architecture())
    return attention.launch_backward(sources, dout, query, key, value, out, lse, masks, scale, tiles=tiles, tma=1)


_TILES: dict[int, dict[int, Tiles]] = {
    90: {
        64: Tiles(Tile(128, 128, 4, 3), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
        128: Tiles(Tile(128, 128, 4, 2), Tile(64, 64, 8, 2), Tile(32, 128, 8, 2)),
        256: Tiles(Tile(128, 64, 4, 2), Tile(128, 16, 8, 1), Tile(64, 32, 8, 1)),
    },
    100: {
        64: Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
        128: Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 8, 2), Tile(64, 128, 8, 1)),
        256: Tiles(Tile(64, 64, 8, 2), Tile(64, 32, 8, 1), Tile(64, 32, 8, 1)),
    },
}


def tiles_for(K: int, *, architecture: int) -> Tiles:
    """The largest cuts that neither spill registers nor leave shared memory (`ahead` holds it), by padded head size and
    architecture (90, 100; the next lower of others)."""
    if triton.knobs.runtime.interpret:
        return _INTERPRETED
    known = max(a for a in _TILES if a <= architecture)
    return _TILES[known][max(64, triton.next_power_of_2(K))]


_INTERPRETED = Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))


def ahead() -> Iterator[Ahead]:
    """The core case (causal, bfloat16) by head size, backward at the largest; forward with a window and ALiBi."""
    plain, local = Masks(), Masks(window=1024, slopes_H=torch.empty(0))
    for target in _TILES:
        for K, masks in [(64, plain), (128, plain), (256, plain), (128, local)]:
            tiles = tiles_for(K, architecture=target)
            for name, kernel in attention.KERNELS.items():
                # Backward at 64 has the cuts of attention.py, and less in registers than at 128.
                if name != "forward" and (masks is local or K != LARGEST_BACKWARD):
                    continue
                tile: Tile = getattr(tiles, name)
                tma = forward_mode(target) if name == "forward" else 1
                padded = max(16, triton.next_power_of_2(K))
                rows = {"dout_ptr": tile.queries, "q_ptr": tile.queries, "k_ptr": tile.keys, "v_ptr": tile.keys}
                names = {p.name for p in kernel.params}
                types = {
                    p: f"tensordesc<bf16[1,1,{rows[p]},{padded}]>" for p in rows if p in names and not (p == "q_ptr" and tma == 2)
                }
                case = f"attention_tma K{K}{' window, ALiBi' if masks is local else ''} {name}"
                yield attention.specialisation(case, kernel, K, masks, tile, architectures=(target,), tma=tma, **types)
