"""Buckets: every element of the model lies in exactly one slot, whatever the sizes; slices of data ranks tile."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatronish.layout import ParamPlacement, shard_range
from megatronish.optim.buckets import ALIGNMENT, Bucket, bucket_elements, decays, plan_buckets
from megatronish.optim.zero import STATES, saved_boxes

Placements = Mapping[str, ParamPlacement]


@st.composite
def placements(draw: st.DrawFn) -> Placements:
    """Parameters of one to four dimensions, cut or not, with and without owed sums, biases, one tied. Cut sizes need not divide."""
    result = {}
    for index in range(draw(st.integers(1, 8))):
        shape = tuple(draw(st.lists(st.integers(1, 12), min_size=1, max_size=4)))
        # A cut dimension has at least a row for each of up to four tp ranks.
        long = [d for d, n in enumerate(shape) if n >= 4]
        shard_dim = draw(st.sampled_from([None, *long]))
        owed = draw(st.booleans()) and shard_dim is None
        bias, tied = draw(st.booleans()), index == 2
        sums = ("tp",) if owed else ()
        result[f"p{index}"] = ParamPlacement(shape, torch.float32, shard_dim, (0,), 0, sums, is_bias=bias, tied=tied)
    return result


sizes = st.integers(1, 4)
bucket_sizes = st.sampled_from([1, 7, 64, 500, 10**9])


def plans(table: Placements, tp_size: int, dp_size: int, size: int) -> list[list[Bucket]]:
    """The buckets of each tp rank."""
    return [
        plan_buckets(table, tp_rank=tp_rank, tp_size=tp_size, dp_size=dp_size, bucket_elements=size) for tp_rank in range(tp_size)
    ]


@given(table=placements(), tp_size=sizes, dp_size=sizes, size=bucket_sizes)
def test_every_local_element_lies_in_exactly_one_slot(table: Placements, tp_size: int, dp_size: int, size: int) -> None:
    for tp_rank, buckets in enumerate(plans(table, tp_size, dp_size, size)):
        slots = [slot for bucket in buckets for slot in bucket.slots]
        assert sorted(slot.name for slot in slots) == sorted(table)
        for slot in slots:
            assert slot.local_box == table[slot.name].local_rectangle(tp_rank, tp_size)
        for bucket in buckets:
            ends = [0]
            for slot in bucket.slots:
                assert slot.start % ALIGNMENT == 0 and ends[-1] <= slot.start < ends[-1] + ALIGNMENT
                ends.append(slot.stop)
            assert ends[-1] <= bucket.num_elements


@given(table=placements(), tp_size=sizes, dp_size=sizes, size=bucket_sizes)
def test_slices_of_data_ranks_are_equal_aligned_and_tile_the_bucket(
    table: Placements, tp_size: int, dp_size: int, size: int
) -> None:
    for buckets in plans(table, tp_size, dp_size, size):
        for bucket in buckets:
            ranges = [bucket.owned_range(rank, dp_size) for rank in range(dp_size)]
            assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])] and ranges[-1][
                1
            ] == bucket.num_elements
            assert {stop - start for start, stop in ranges} == {bucket.num_elements // dp_size}
            assert all(start % ALIGNMENT == 0 for start, _ in ranges)
            # Padding is less than one unit: no rank more than needed.
            assert bucket.num_elements - bucket.slots[-1].stop < dp_size * ALIGNMENT


@given(table=placements(), tp_size=sizes, dp_size=sizes, size=bucket_sizes)
def test_what_all_ranks_save_tiles_every_global_tensor_exactly_once(
    table: Placements, tp_size: int, dp_size: int, size: int
) -> None:
    for state in STATES:
        counts = {name: torch.zeros(p.global_shape, dtype=torch.int64) for name, p in table.items()}
        for tp_rank, buckets in enumerate(plans(table, tp_size, dp_size, size)):
            for dp_rank in range(dp_size):
                for kind, name, box in saved_boxes(buckets, tp_rank=tp_rank, dp_rank=dp_rank, dp_size=dp_size):
                    if kind == state:
                        counts[name][tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))] += 1
        for name, count in counts.items():
            assert count.eq(1).all(), f"{state} of {name}"


@given(table=placements(), tp_size=sizes, dp_size=sizes, size=bucket_sizes)
def test_pieces_point_at_their_own_values(table: Placements, tp_size: int, dp_size: int, size: int) -> None:
    for buckets in plans(table, tp_size, dp_size, size):
        for bucket in buckets:
            flat = torch.full((bucket.num_elements,), -1)
            for slot in bucket.slots:
                shape = table[slot.name].global_shape
                whole = torch.arange(math.prod(shape)).view(shape)
                box = slot.local_box
                local = whole[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))]
                flat[slot.start : slot.stop] = local.flatten()
            for dp_rank in range(dp_size):
                for name, box, offset in bucket.pieces(*bucket.owned_range(dp_rank, dp_size)):
                    shape = table[name].global_shape
                    whole = torch.arange(math.prod(shape)).view(shape)
                    expected = whole[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))]
                    assert torch.equal(flat[offset : offset + box.num_elements].view(box.sizes), expected)


@given(table=placements(), tp_size=sizes, dp_size=sizes, size=bucket_sizes)
def test_a_bucket_holds_one_kind_and_is_closed_when_full(table: Placements, tp_size: int, dp_size: int, size: int) -> None:
    for buckets in plans(table, tp_size, dp_size, size):
        for bucket in buckets:
            for slot in bucket.slots:
                p = table[slot.name]
                assert p.sum_gradient_over == bucket.sum_gradient_over
                assert decays(p) == bucket.weight_decay
                assert (p.shard_dim is None and tp_size > 1) == bucket.replicated
                assert (p.tied, p.owner_stage == 0) == (bucket.tied, bucket.on_owner_stage)
            assert all(slot.stop < size for slot in bucket.slots[:-1])
        order = {name: index for index, name in enumerate(table)}
        assert [bucket.tied for bucket in buckets] == sorted(bucket.tied for bucket in buckets), "tied buckets are the last"
        for bucket in buckets:  # last layer first
            positions = [order[slot.name] for slot in bucket.slots]
            assert positions == sorted(positions, reverse=True)


@given(table=placements(), tp_size=sizes, dp_size=sizes, size=bucket_sizes)
def test_buckets_that_tp_ranks_sum_together_are_equal_on_all_of_them(
    table: Placements, tp_size: int, dp_size: int, size: int
) -> None:
    shared = [
        [bucket for bucket in buckets if bucket.replicated or bucket.sum_gradient_over]
        for buckets in plans(table, tp_size, dp_size, size)
    ]
    assert all(others == shared[0] for others in shared)


def test_rows_that_tp_does_not_divide_are_all_held_once() -> None:
    table = {"embedding": ParamPlacement((105, 8), torch.float32, 0, (0,), 0)}
    boxes = [buckets[0].slots[0].local_box for buckets in plans(table, 4, 3, 50)]
    assert [box.sizes for box in boxes] == [(27, 8), (26, 8), (26, 8), (26, 8)]
    assert [box.offsets[0] for box in boxes] == [shard_range(105, r, 4)[0] for r in range(4)] == [0, 27, 53, 79]


def test_a_bucket_size_in_mib_is_counted_in_elements_of_its_gradients() -> None:
    assert bucket_elements(64.0, 4) == 16 * 2**20
    assert bucket_elements(64.0, 8) == 8 * 2**20
    assert bucket_elements(1e-9, 4) == 1


def test_a_tied_parameter_is_saved_by_its_owner_stage_alone_and_lies_alike_on_both() -> None:
    tied = ParamPlacement((105, 8), torch.float32, 0, (0, 3), 0, ("ends",), tied=True)
    norm = ParamPlacement((8,), torch.float32, None, (3,), 3)
    first = plan_buckets({"e": tied}, stage=0, tp_rank=1, tp_size=2, dp_size=2, bucket_elements=10**9)
    last = plan_buckets({"e": tied, "n": norm}, stage=3, tp_rank=1, tp_size=2, dp_size=2, bucket_elements=10**9)
    assert [slot.name for slot in last[1].slots] == ["e"] and replace(last[1], on_owner_stage=True, group=0) == first[0]
    assert {name for _, name, _ in saved_boxes(first, tp_rank=1, dp_rank=0, dp_size=2)} == {"e"}
    assert {name for _, name, _ in saved_boxes(last, tp_rank=1, dp_rank=0, dp_size=2)} == set()
    assert {name for _, name, _ in saved_boxes(last, tp_rank=0, dp_rank=0, dp_size=2)} == {"n"}


def test_matrices_decay_and_biases_do_not_whatever_their_shape() -> None:
    assert decays(ParamPlacement((4, 3, 8), torch.float32, 0, (0,), 0))
    assert not decays(ParamPlacement((4, 3, 8), torch.float32, 0, (0,), 0, is_bias=True))
    assert not decays(ParamPlacement((8,), torch.float32, None, (0,), 0))
