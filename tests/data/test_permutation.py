"""The keyed permutation: a bijection for every size, the same one scalar and vectorised, and mixed."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatronish.data.permutation import Permutation

KEYS = st.integers(0, 2**64 - 1)


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 3000), key=KEYS)
def test_every_size_is_a_bijection(size, key):
    assert np.array_equal(np.sort(Permutation.keyed(size, key).map(np.arange(size))), np.arange(size))


def test_every_size_up_to_300_is_a_bijection():
    for size in range(1, 301):
        assert sorted(map(Permutation.keyed(size, 1), range(size))) == list(range(size))


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 2**62), key=KEYS, data=st.data())
def test_scalar_and_vector_agree_and_stay_inside_for_sizes_to_2_to_the_62(size, key, data):
    indices = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=8))
    permutation = Permutation.keyed(size, key)
    images = permutation.map(np.array(indices, np.int64)).tolist()
    assert images == [permutation(i) for i in indices]
    assert all(0 <= image < size for image in images)
    assert len(set(images)) == len(set(indices))


def test_a_place_goes_everywhere_with_equal_chance():
    # 4,000 keys over 10 cells: each expects 400, standard deviation 19; 6 of them is one chance in 1e8.
    for index in (0, 5, 9):
        counts = np.bincount([Permutation.keyed(10, key)(index) for key in range(4000)], minlength=10)
        assert np.abs(counts - 400).max() < 6 * 19


def test_neighbours_do_not_stay_neighbours():
    images = Permutation.keyed(100_003, 7).map(np.arange(100_003))
    # A random order has correlation 0 +- 1/sqrt(n), and about 1 neighbour pair that keeps its distance of 1.
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 6 / 100_003**0.5
    assert (np.diff(images) == 1).sum() < 12


def test_each_part_of_the_key_gives_another_order():
    orders = {tuple(Permutation.keyed(50, *key).map(np.arange(50))) for key in [(1, 2, 3), (2, 1, 3), (1, 2, 4), (1, 3, 3), (1, 2)]}
    assert len(orders) == 5


def test_the_order_never_changes_between_versions():
    # A run that resumes under a newer version must go on with the same samples: these numbers are a promise.
    assert Permutation.keyed(1_000_000, 1234, 5678, 0).map(np.arange(6)).tolist() == GOLDEN


GOLDEN = [601716, 832231, 19735, 256276, 958091, 31374]


@settings(max_examples=200)
@given(size=st.integers(1, 2**62), key=st.integers(0, 2**64 - 1), data=st.data())
def test_the_native_map_equals_numpys(size, key, data):
    indices = np.array(data.draw(st.lists(st.integers(0, size - 1), max_size=20)), np.int64)
    permutation = Permutation.keyed(size, key)
    np.testing.assert_array_equal(permutation.map(indices), permutation.map_reference(indices))
