"""A keyed permutation of 0 .. n - 1 that is computed place by place, and never held in memory.

A Feistel network permutes the numbers of an even number of bits, whatever its round function; those
of n and more are permuted again until they are below it ("cycle walking": Black and Rogaway,
Ciphers with arbitrary finite domains, 2002), so each number below n has exactly one place.
"""

import hashlib

import numpy as np

from finetune.data import spans

# With a random round function four rounds suffice (Luby and Rackoff, 1988). Ours is a mixer of hash
# tables, and half of a small number has few bits.
ROUNDS = 8
# Halves of fewer bits permute too few ways; a domain of 64 costs small n a few walks more.
FEWEST_BITS = 3


class Permutation:
    """A permutation of `size` numbers that the `key` decides."""

    def __init__(self, size: int, *key: int) -> None:
        self.size = size
        bits = max(FEWEST_BITS, -(-max(size - 1, 1).bit_length() // 2))
        self._bits, self._mask = np.uint64(bits), np.uint64((1 << bits) - 1)
        text = ",".join(map(str, key)).encode()
        self._keys = np.frombuffer(hashlib.blake2b(text, digest_size=8 * ROUNDS).digest(), "<u8")

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """Return the numbers at these places, int64; each place is in 0 .. size - 1."""
        numbers = self._permuted(np.asarray(places).astype(np.uint64))
        while len(outside := np.flatnonzero(numbers >= np.uint64(self.size))):
            numbers[outside] = self._permuted(numbers[outside])
        return numbers.astype(np.int64)

    def _permuted(self, numbers: np.ndarray) -> np.ndarray:
        left, right = numbers >> self._bits, numbers & self._mask
        for key in self._keys:
            left, right = right, left ^ (spans.mixed(right + key) & self._mask)
        found: np.ndarray = (left << self._bits) | right
        return found
