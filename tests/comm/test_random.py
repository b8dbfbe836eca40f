"""Counter-based randomness: the published numbers, any box of a tensor equal to that part of the whole, a normal distribution."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatronish.comm.random import normal_fill_, philox, stream_key


def words(counter: int, key: int) -> list[int]:
    return [int(word) for word in philox(torch.tensor([counter]), key)]


def python_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's own integers, from the paper's figure."""
    mask = 0xFFFFFFFF
    for _ in range(10):
        product0, product1 = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (product1 >> 32) ^ counter[1] ^ key[0],
            product1 & mask,
            (product0 >> 32) ^ counter[3] ^ key[1],
            product0 & mask,
        ]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return counter


def test_philox_gives_the_published_answers() -> None:
    # kat_vectors of Random123 (Salmon et al. 2011): philox4x32 10.
    assert words(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    # Ours fixes the upper two words of the counter to zero, so the other vectors check the formula that it is compared with.
    ones = 0xFFFFFFFF
    assert python_philox([ones] * 4, [ones] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]
    assert python_philox(*pi) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@given(counter=st.integers(-(2**63), 2**63 - 1), key=st.integers(-(2**63), 2**63 - 1))
def test_philox_equals_python_integers(counter: int, key: int) -> None:
    mask = 0xFFFFFFFF
    expected = python_philox([counter & mask, (counter >> 32) & mask, 0, 0], [key & mask, (key >> 32) & mask])
    assert words(counter, key) == expected


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(global shape, offsets, sizes) of a box of one to four dimensions."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    offsets = tuple(draw(st.integers(0, n - 1)) for n in shape)
    return shape, offsets, tuple(draw(st.integers(1, n - o)) for n, o in zip(shape, offsets, strict=True))


@given(box=boxes(), key=st.integers(-(2**63), 2**63 - 1), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_a_box_equals_that_part_of_the_whole(
    box: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], key: int, dtype: torch.dtype
) -> None:
    shape, offsets, sizes = box
    whole, part = torch.empty(shape, dtype=dtype), torch.empty(sizes, dtype=dtype)
    normal_fill_(whole, offsets=(0,) * len(shape), global_shape=shape, key=key, std=0.5)
    normal_fill_(part, offsets=offsets, global_shape=shape, key=key, std=0.5)
    assert torch.equal(part, whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))])


def test_a_box_larger_than_a_chunk_equals_that_part_of_the_whole() -> None:
    whole, part = torch.empty(700, 130), torch.empty(600, 65)
    normal_fill_(whole, offsets=(0, 0), global_shape=(700, 130), key=3, std=1.0)
    normal_fill_(part, offsets=(50, 65), global_shape=(700, 130), key=3, std=1.0)
    assert torch.equal(part, whole[50:650, 65:])


def test_a_view_is_filled_in_place_and_its_surroundings_are_left() -> None:
    flat, expected = torch.zeros(40), torch.empty(4, 5)
    normal_fill_(flat[8:28].view(4, 5), offsets=(0, 0), global_shape=(4, 5), key=1, std=1.0)
    normal_fill_(expected, offsets=(0, 0), global_shape=(4, 5), key=1, std=1.0)
    assert torch.equal(flat[8:28], expected.flatten())
    assert not flat[:8].any() and not flat[28:].any()


@pytest.mark.parametrize("std", [1.0, 0.02])
def test_values_are_normal(std: float) -> None:
    n = 1 << 18
    x = torch.empty(n, dtype=torch.float64)
    normal_fill_(x, offsets=(0,), global_shape=(n,), key=stream_key(1, "init", "a"), std=std)
    x /= std
    # Standard errors of the moments of n normal numbers: sqrt(1, 2, 15, 96)/sqrt(n); five of them.
    for power, expected, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert abs(float((x**power).mean()) - expected) < 5 * math.sqrt(variance / n)
    # Kolmogorov-Smirnov: the distribution function within 1.95/sqrt(n) (a chance of 1e-3).
    ordered = 0.5 * (1 + torch.erf(x.sort().values / math.sqrt(2)))
    assert float((ordered - (torch.arange(n) + 0.5) / n).abs().max()) < 1.95 / math.sqrt(n)
    # Neighbours, in whose counters one bit differs, do not correlate.
    assert abs(float((x[:-1] * x[1:]).mean())) < 5 / math.sqrt(n)


def test_streams_are_told_apart_by_every_name_and_their_borders() -> None:
    keys = [stream_key(*names) for names in [(1, "ab"), (1, "a", "b"), (2, "ab"), (1, "ba"), (1, "ab", 0), (11, "b")]]
    assert len(set(keys)) == len(keys)
    assert all(-(2**63) <= key < 2**63 for key in keys)
    # A stream is what it was: a run that resumes draws the same.
    assert stream_key(1234, "init", "layers.0.mlp.down.weight") == stream_key(1234, "init", "layers.0.mlp.down.weight")
