"""The order of rows that do not fit into memory: a keyed permutation in windows of shards."""

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from finetune.data.permutation import Permutation
from finetune.data.windows import WindowedOrder, spans

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**31 - 1), st.integers(0, 50))
@example(1, 0, 0)
@example(64, 0, 0)
@example(65, 0, 0)
def test_permutation_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    numbers = Permutation(size, seed, epoch)(np.arange(size))
    assert sorted(numbers.tolist()) == list(range(size))


def test_permutation_of_ten_billion_is_computed_place_by_place() -> None:
    permutation = Permutation(10_000_000_000, 7, 0)
    places = np.array([0, 1, 123_456_789, 9_999_999_999])
    numbers = permutation(places)
    assert len(set(numbers.tolist())) == 4
    assert (numbers < permutation.size).all()
    assert numbers.tolist() == [int(permutation(places[n : n + 1])[0]) for n in range(4)]


def test_every_number_is_as_frequent_at_every_place() -> None:
    """Chi-square over keys: of every pair (place, number), and of which number follows which."""
    for size in (2, 7, 20):
        keys = 150
        drawn = np.array([Permutation(size, key)(np.arange(size)) for key in range(keys)])
        places = np.zeros((size, size))
        for place in range(size):
            places[place] = np.bincount(drawn[:, place], minlength=size)
        follow = np.zeros((size, size))
        np.add.at(follow, (drawn[:, :-1].ravel(), drawn[:, 1:].ravel()), 1)
        cells = size * (size - 1)
        for counts, freedom in ((places, (size - 1) ** 2), (follow[~np.eye(size, dtype=bool)],
                                                           cells - 1)):  # fmt: skip
            expected = counts.sum() / counts.size
            chi = ((counts - expected) ** 2 / expected).sum()
            # Five standard deviations of a chi-square, and some freedom for the smallest.
            assert chi < freedom + 5 * np.sqrt(2 * freedom) + 10, (size, chi, freedom)


def test_neighbours_of_the_files_do_not_stay_together() -> None:
    numbers = Permutation(100_000, 3, 0)(np.arange(100_000))
    assert np.abs(np.diff(numbers)).mean() > 0.9 * 100_000 / 3  # of a true shuffle: a third
    assert abs(np.corrcoef(numbers, np.arange(100_000))[0, 1]) < 0.02


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(0, 1000), st.integers(0, 5))
def test_epoch_has_every_sequence_once_window_after_window(
    sizes: list[int], seed: int, epoch: int
) -> None:
    order, total = WindowedOrder(sizes, seed, epoch), sum(sizes)
    everything = order[0:total]
    assert sorted(everything.tolist()) == list(range(total))
    assert len(order) == total
    owner = np.repeat(np.arange(len(sizes)), sizes)[everything]
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    assert len(starts) == np.count_nonzero(sizes)  # no window is left and entered again
    if not epoch:
        assert owner.tolist() == sorted(owner.tolist())


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(0, 1000), st.integers(0, 3), st.integers(0, 500), st.integers(1, 30))
def test_any_position_is_read_without_those_before_it(
    sizes: list[int], seed: int, epoch: int, start: int, count: int
) -> None:
    part = WindowedOrder(sizes, seed, epoch)[start : start + count]
    assert part.tolist() == WindowedOrder(sizes, seed, epoch)[:][start : start + count].tolist()


def test_seed_and_epoch_change_the_order() -> None:
    orders = {
        tuple(WindowedOrder([50, 50], seed, epoch)[:].tolist())
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 100), max_size=20), st.integers(1, 200))
def test_windows_are_whole_shards_that_fit(sizes: list[int], most: int) -> None:
    found = spans(sizes, most)
    assert [n for begin, end in found for n in range(begin, end)] == list(range(len(sizes)))
    for begin, end in found:
        assert sum(sizes[begin:end]) <= most or end == begin + 1
    for (begin, end), _ in zip(found, found[1:]):  # the next shard did not fit
        assert sum(sizes[begin : end + 1]) > most
    # Where a window ends is known as soon as the shard behind it is.
    for (begin, end), _ in zip(found, found[1:]):
        assert (
            spans(sizes[: end + 1], most)[: found.index((begin, end)) + 1]
            == found[: found.index((begin, end)) + 1]
        )
    assert spans(sizes, None) == ([(0, len(sizes))] if sizes else [])
