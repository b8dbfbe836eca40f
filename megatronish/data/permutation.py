"""A keyed permutation of [0, n) in O(1) memory: the order of an epoch without a shuffle index.

A 4-round Feistel network (Luby and Rackoff 1988) on x = left * b + right with left in [0, a), right in [0, b), a = ceil(sqrt n),
b = ceil(n / a), rounds by addition modulo a or b; results outside [0, n) are mapped again until they are inside (cycle walking,
Black and Rogaway 2002), which keeps it a bijection for every n. a * b < n + sqrt(n) + 1, so a second turn is rare.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatronish import native

_MASK = (1 << 64) - 1
_MUL_1, _MUL_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
NUM_ROUNDS = 4


@dataclass(frozen=True)
class Permutation:
    """A bijection of [0, size) onto itself, chosen by `keys`, one 64-bit number a round."""

    size: int
    keys: tuple[int, ...]

    @classmethod
    def keyed(cls, size: int, *key: int) -> Permutation:
        """The permutation of [0, size) named by some integers in [0, 2^64): seed, fingerprint, epoch."""
        assert size >= 1
        data = struct.pack(f"<{len(key)}Q", *key)
        return cls(size, tuple(xxhash.xxh3_64_intdigest(data, seed=i) for i in range(NUM_ROUNDS)))

    def __call__(self, index: int) -> int:
        """Where `index` goes. About 4 us."""
        a, b = self._sides()
        while True:
            left, right = divmod(index, b)
            for i, key in enumerate(self.keys):
                if i % 2 == 0:
                    left = (left + _mix(right ^ key)) % a
                else:
                    right = (right + _mix(left ^ key)) % b
            index = left * b + right
            if index < self.size:
                return index

    def map(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """`[self(i) for i in indices]`, native where built, else vectorised."""
        function = getattr(native.cpu, "permute", None)
        if function is None:
            return self.map_reference(indices)
        values, keys = indices.astype(np.uint64, order="C"), np.array(self.keys, np.uint64)
        function(values.ctypes.data, values.size, self.size, *self._sides(), keys.ctypes.data, len(self.keys))
        return values.view(np.int64)

    def map_reference(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """`map` in numpy."""
        result = self._turn(indices.astype(np.uint64))
        while (outside := np.flatnonzero(result >= np.uint64(self.size))).size:
            result[outside] = self._turn(result[outside])
        return result.astype(np.int64)

    def _sides(self) -> tuple[int, int]:
        a = math.isqrt(self.size - 1) + 1
        return a, -(-self.size // a)

    def _turn(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        a, b = (np.uint64(side) for side in self._sides())
        left, right = np.divmod(values, b)
        for i, key in enumerate(self.keys):
            if i % 2 == 0:
                left = (left + _mix_array(right ^ np.uint64(key)) % a) % a
            else:
                right = (right + _mix_array(left ^ np.uint64(key)) % b) % b
        return left * b + right


def _mix(x: int) -> int:
    """The finaliser of splitmix64 (Steele et al. 2014)."""
    x = ((x ^ (x >> 30)) * _MUL_1) & _MASK
    x = ((x ^ (x >> 27)) * _MUL_2) & _MASK
    return x ^ (x >> 31)


def _mix_array(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`_mix` of each element; products wrap, as they must."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_MUL_1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_MUL_2)
    return x ^ (x >> np.uint64(31))
