"""Packs hold every example once, never too much, and are few."""

import math

import numpy as np
import pytest

from finetune.data.packing import pack

SHAPES = {
    "uniform": lambda random, n: random.integers(1, 101, n),
    "short": lambda random, n: random.integers(1, 12, n),
    "over half": lambda random, n: random.integers(51, 101, n),
    "like answers": lambda random, n: np.clip(random.lognormal(3, 0.8, n).astype(int), 1, 100),
    "two kinds": lambda random, n: random.choice([34, 66], n),
    "all equal": lambda random, n: np.full(n, 33),
    "all full": lambda random, n: np.full(n, 100),
    "ones": lambda random, n: np.ones(n, int),
}


@pytest.fixture(params=SHAPES)
def lengths(request):
    return SHAPES[request.param](np.random.default_rng(1), 1_000)


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b))


def test_every_example_is_in_exactly_one_pack(lengths):
    packs = pack(lengths, 100, seed=0)
    assert sorted(np.concatenate(packs)) == list(range(len(lengths)))
    assert all(len(members) for members in packs)


def test_no_pack_is_over_max_length(lengths):
    assert max(lengths[members].sum() for members in pack(lengths, 100, seed=0)) <= 100


def test_the_same_seed_makes_the_same_packs_and_another_seed_others(lengths):
    assert same(pack(lengths, 100, seed=5), pack(lengths.copy(), 100, seed=5))
    assert not same(pack(lengths, 100, seed=5), pack(lengths, 100, seed=6))


@pytest.mark.parametrize("seed", range(10))
def test_packs_are_close_to_the_fewest_there_can_be(seed):
    """50 full packs in random pieces: the optimum is 50, the bound of best-fit 11/9 x 50 + 4."""
    random = np.random.default_rng(seed)
    cuts = [
        np.sort(random.choice(np.arange(1, 1000), random.integers(1, 9), replace=False))
        for _ in range(50)
    ]
    lengths = np.concatenate([np.diff(np.concatenate([[0], cut, [1000]])) for cut in cuts])
    packs = pack(random.permutation(lengths), 1000, seed)
    assert 50 <= len(packs) <= 53  # within 6 % of the optimum; the proof would allow 65


@pytest.mark.parametrize("name", ["uniform", "short", "like answers", "ones"])
def test_random_lengths_leave_little_room_empty(name):
    """Packs stay within 3 % of the lower bound: the sum of the lengths over the size of a pack."""
    lengths = SHAPES[name](np.random.default_rng(2), 5_000)
    assert len(pack(lengths, 100, seed=0)) <= math.ceil(1.03 * lengths.sum() / 100)


@pytest.mark.parametrize(
    ("lengths", "max_length", "sizes"),
    [
        ([], 10, []),
        ([10], 10, [[10]]),
        ([1], 10, [[1]]),
        ([6, 6, 6], 10, [[6], [6], [6]]),
        ([5, 5, 5], 10, [[5], [5, 5]]),
        ([1, 9, 2, 8, 3, 7], 10, [[9, 1], [8, 2], [7, 3]]),
        ([1, 1, 1], 1, [[1], [1], [1]]),
        ([6, 3, 5, 4, 1, 1], 10, [[6, 4], [5, 3, 1, 1]]),
    ],
)
def test_small_packs_are_the_best_there_are(lengths, max_length, sizes):
    lengths = np.array(lengths, int)
    packs = pack(lengths, max_length, seed=0)
    assert sorted(sorted(lengths[members], reverse=True) for members in packs) == sorted(sizes)


def test_an_example_that_fits_no_pack_is_refused():
    with pytest.raises(ValueError, match="an example of 11 tokens does not fit into a pack of 10"):
        pack(np.array([3, 11, 4]), 10, seed=0)
