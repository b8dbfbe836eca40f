from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatronish.checkpoint.pieces import Piece, pieces_of_slice, tiling_problem, whole_box
from megatronish.layout import Rectangle

Boxes = list[Rectangle]


def problem(shape: tuple[int, ...], boxes: Boxes) -> str | None:
    offsets = np.array([box.offsets for box in boxes], dtype=np.int64).reshape(len(boxes), len(shape))
    sizes = np.array([box.sizes for box in boxes], dtype=np.int64).reshape(len(boxes), len(shape))
    return tiling_problem(shape, offsets, sizes)


def coverage(shape: tuple[int, ...], boxes: Boxes) -> np.ndarray:
    count = np.zeros(shape, dtype=int)
    for box in boxes:
        count[box.within(whole_box(shape))] += 1
    return count


@st.composite
def cut(draw: st.DrawFn, box: Rectangle, depth: int = 4) -> Boxes:
    """A tiling of `box`, by cutting again and again."""
    dims = [d for d, n in enumerate(box.sizes) if n > 1]
    if not depth or not dims or draw(st.integers(0, 3)) == 0:
        return [box]
    dim = draw(st.sampled_from(dims))
    at = draw(st.integers(1, box.sizes[dim] - 1))
    low, high, offsets = list(box.sizes), list(box.sizes), list(box.offsets)
    low[dim], high[dim], offsets[dim] = at, box.sizes[dim] - at, box.offsets[dim] + at
    return [
        *draw(cut(Rectangle(box.offsets, tuple(low)), depth - 1)),
        *draw(cut(Rectangle(tuple(offsets), tuple(high)), depth - 1)),
    ]


shapes = st.lists(st.integers(1, 6), max_size=3).map(tuple)


@given(st.data(), shapes)
def test_a_tiling_is_accepted_in_any_order_and_any_change_of_it_is_refused(data: st.DataObject, shape: tuple[int, ...]) -> None:
    boxes = data.draw(cut(whole_box(shape)).flatmap(st.permutations))
    assert problem(shape, boxes) is None
    chosen = data.draw(st.sampled_from(boxes))
    assert "in no piece" in str(problem(shape, [box for box in boxes if box != chosen]))
    assert "in 2 pieces" in str(problem(shape, [*boxes, chosen]))


@given(st.data(), shapes)
def test_the_verdict_on_any_boxes_equals_counting_every_element(data: st.DataObject, shape: tuple[int, ...]) -> None:
    def boxes_within() -> st.SearchStrategy[Rectangle]:
        ranges = [st.tuples(st.integers(0, n - 1), st.integers(1, n)).filter(lambda r, n=n: r[0] + r[1] <= n) for n in shape]
        return st.tuples(*ranges).map(lambda rs: Rectangle(tuple(r[0] for r in rs), tuple(r[1] for r in rs)))

    boxes = data.draw(st.lists(boxes_within(), max_size=4))
    count, found = coverage(shape, boxes), problem(shape, boxes)
    wrong = np.argwhere(count != 1)
    if not len(wrong):
        assert found is None
    else:
        first = wrong[0].tolist()
        assert f"element {first} of" in str(found)
        assert ("no piece" in str(found)) == (count[tuple(first)] == 0)


def test_boxes_that_leave_the_tensor_are_refused() -> None:
    assert "not within" in str(problem((4,), [Rectangle((2,), (3,))]))
    assert "not within" in str(problem((4,), [Rectangle((-1,), (5,))]))
    assert "empty" in str(problem((4,), [Rectangle((0,), (4,)), Rectangle((2,), (0,))]))
    assert "dimensions" in str(tiling_problem((4, 4), np.zeros((1, 1), np.int64), np.ones((1, 1), np.int64)))
    assert problem((0, 3), []) is None


def test_a_gap_and_an_overlap_of_the_same_volume_do_not_cancel() -> None:
    assert problem((4,), [Rectangle((0,), (2,)), Rectangle((1,), (2,))]) is not None


@given(st.data(), st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple), st.integers(1, 5))
def test_slices_of_a_shard_make_pieces_that_hold_the_right_elements(
    data: st.DataObject, shape: tuple[int, ...], parts: int
) -> None:
    held = data.draw(st.sampled_from(data.draw(cut(whole_box(shape)))))
    whole = np.arange(np.prod(shape)).reshape(shape)
    shard = whole[held.within(whole_box(shape))].reshape(-1)
    bounds = sorted(data.draw(st.lists(st.integers(0, held.num_elements), min_size=parts - 1, max_size=parts - 1)))
    seen: list[Rectangle] = []
    for start, stop in zip([0, *bounds], [*bounds, held.num_elements], strict=True):
        for piece, flat in pieces_of_slice("w", held, start, stop):
            expected = whole[piece.box.within(whole_box(shape))].reshape(-1)
            assert start <= flat < stop
            assert (shard[flat : flat + piece.box.num_elements] == expected).all()
            seen.append(piece.box)
    assert sum(box.num_elements for box in seen) == held.num_elements
    assert coverage(shape, seen).max() == 1


def test_keys_say_tensor_and_offsets() -> None:
    assert Piece("layers.0.up", Rectangle((64, 0), (2, 3))).key == "layers.0.up@64,0"
    assert Piece("count", Rectangle((), ())).key == "count@"
