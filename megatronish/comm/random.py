"""Counter-based randomness: a weight is a function of (seed, its global name, its global coordinates), of nothing else; a dropout
bit of (seed, site, global sample number, coordinates in the sample).

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") on the element's row-major index in the *global*
tensor. A rank draws only its part, so the same weights and bits come out under every layout.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
_CHUNK = 1 << 15  # elements drawn at once: the int64 intermediates stay in cache and out of mmap

_library = torch.library.Library("megatronish", "FRAGMENT")


def stream_key(seed: int, *names: str | int) -> int:
    """A 64-bit key (as a signed integer) for one named stream, such as `stream_key(seed, "init", "layers.7.mlp.down.weight")`."""
    text = "\0".join([str(seed), *(str(name) for name in names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def philox(counter: Tensor, key: int, high: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four independent 32-bit words (in int64 tensors) for each int64 counter. Ten rounds.

    `high`: the upper half of the counters, of the same shape; zero when not given."""
    key0, key1 = key & _MASK, (key >> 32) & _MASK
    high = torch.zeros_like(counter) if high is None else high
    c0, c1, c2, c3 = counter & _MASK, (counter >> 32) & _MASK, high & _MASK, (high >> 32) & _MASK
    for _ in range(10):
        # The product of two 32-bit words wraps in int64, but its bits are right; the mask undoes the sign extension.
        product0, product1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK) ^ c1 ^ key0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ c3 ^ key1,
            product0 & _MASK,
        )
        key0, key1 = (key0 + _W0) & _MASK, (key1 + _W1) & _MASK
    return c0, c1, c2, c3


def keep_bits(sample_numbers_B: Tensor, *, start: int, count: int, key: int, rate: float) -> Tensor:
    """bool [B, count]: for each sample, elements start .. start + count - 1 of its stream `key`; False with probability `rate`.

    Element e of sample n is word e % 4 of the block at counter (e // 4, n): 32 bits decide, so the rate is right to 2^-33."""
    first, stop = start // 4, (start + count + 3) // 4
    B, threshold = sample_numbers_B.shape[0], round(rate * 2.0**32)
    keep = torch.empty(B, stop - first, 4, dtype=torch.bool, device=sample_numbers_B.device)
    # On CPU the int64 intermediates of a chunk stay in cache: 12 ns an element.
    at_once = max(1, _CHUNK // max(1, B)) if keep.device.type == "cpu" else stop - first
    for begin in range(first, stop, max(1, at_once)):
        end = min(begin + at_once, stop)
        blocks = torch.arange(begin, end, device=keep.device).expand(B, -1)
        words = philox(blocks, key, sample_numbers_B[:, None].expand_as(blocks))
        for index, word in enumerate(words):
            torch.ge(word, threshold, out=keep[:, begin - first : end - first, index])
    return keep.flatten(1)[:, start - 4 * first : start - 4 * first + count]


def _normal_fill(out: Tensor, offsets: list[int], global_shape: list[int], key: int, std: float) -> None:
    strides = [math.prod(global_shape[d + 1 :]) for d in range(len(global_shape))]
    row_shape = out.shape[1:]
    row = torch.zeros(row_shape, dtype=torch.int64, device=out.device)
    for dim, size in enumerate(row_shape, start=1):
        index = (torch.arange(size, device=out.device) + offsets[dim]) * strides[dim]
        row += index.view([-1 if d == dim else 1 for d in range(1, len(global_shape))])
    rows_at_once = max(1, _CHUNK // max(1, row.numel()))
    for first in range(0, out.shape[0], rows_at_once):
        part = out[first : first + rows_at_once]
        lead = (torch.arange(part.shape[0], device=out.device) + (offsets[0] + first)) * strides[0]
        words = philox((lead.view(-1, *[1] * row.dim()) + row), key)
        u1 = (words[0].double() + 0.5) * 2.0**-32
        u2 = words[1].double() * 2.0**-32
        part.copy_(torch.sqrt(-2.0 * torch.log(u1)) * torch.cos(2.0 * math.pi * u2) * std)


_library.define("normal_fill_(Tensor(a!) out, int[] offsets, int[] global_shape, int key, float std) -> ()")
_library.impl("normal_fill_", _normal_fill, "CompositeExplicitAutograd")


def _normal_fill_fake(out: Tensor, offsets: list[int], global_shape: list[int], key: int, std: float) -> None:
    return None


torch.library.register_fake("megatronish::normal_fill_", _normal_fill_fake, lib=_library)


def normal_fill_(out: Tensor, *, offsets: tuple[int, ...], global_shape: tuple[int, ...], key: int, std: float) -> None:
    """Fill `out` with the box at `offsets` of a N(0, std^2) tensor of `global_shape` (Box-Muller in float64, then rounded)."""
    torch.ops.megatronish.normal_fill_(out, list(offsets), list(global_shape), key, std)
