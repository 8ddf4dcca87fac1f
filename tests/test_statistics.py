"""Intervals cover what they claim, and p-values are those of the exact tests."""

import math

import numpy as np
import pytest
from conftest import short

from finetune.evaluation import statistics

TRUE = 0.1


def binary(random):
    """Pairs of 0 and 1: 25% become right, 15% become wrong."""
    fate = random.random(100)
    return (fate > 0.25) * (fate < 0.7), (fate < 0.25) | ((fate > 0.25) & (fate < 0.55)), None


def graded(random):
    """Two scores of means 0.5 and 0.6."""
    return random.beta(2, 2, 60), random.beta(3, 2, 60), None


def clustered(random, per_cluster=10, count=40):
    """Rows of a cluster share most of their gain."""
    clusters = np.repeat(np.arange(count), per_cluster)
    shared = random.normal(0, 0.3, count)[clusters]
    return np.zeros(len(clusters)), TRUE + shared + random.normal(0, 0.1, len(clusters)), clusters


def coverage(draw, times, ignore_clusters=False):
    random, hits = np.random.default_rng(1), 0
    for _ in range(times):
        before, after, clusters = draw(random)
        found = statistics.difference(
            before.astype(float), after.astype(float), None if ignore_clusters else clusters
        )
        hits += found.low <= TRUE <= found.high
    return hits / times


@pytest.mark.parametrize("draw", [binary, graded, clustered])
@pytest.mark.parametrize("times", short([600, 6_000], 600))
def test_intervals_hold_the_true_difference_in_95_of_100_cases(draw, times):
    deviations = 3 * math.sqrt(0.95 * 0.05 / times)
    assert coverage(draw, times) == pytest.approx(0.95, abs=max(0.015, deviations))


def test_an_interval_that_ignores_clusters_is_too_narrow():
    assert coverage(clustered, 300, ignore_clusters=True) < 0.75


@pytest.mark.parametrize(
    ("before", "after", "low", "high"),
    [
        # ((1 - d) / (1 + d)) 4 = 1.96^2, of Tango's formula where all rows go up
        ([0] * 4, [1] * 4, 0.0202, 1.0),
        # Wilson's for 0 of 4: 1.96^2 / (4 + 1.96^2)
        ([1, 1, 0, 0], [1, 1, 0, 0], -0.4899, 0.4899),
        ([1] * 1, [1] * 1, -0.7935, 0.7935),
        ([0] * 1000, [1] * 1000, 0.9923, 1.0),
    ],
)
def test_the_interval_of_right_and_wrong_answers_is_never_a_point(before, after, low, high):
    found = statistics.difference(before, after)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(
    ("before", "after", "low", "high"),
    [
        # 40 clusters of two rows: of 0 in 40, 1 - 0.025^(1 / 40) = 8.81% at most are unlike these
        ([1, 0] * 40, [1, 0] * 40, -0.0881, 0.0881),
        ([0] * 80, [1] * 80, 1 - 2 * 0.0881, 1),
        ([0.2] * 80, [0.7] * 80, 0.5 - 1.5 * 0.0881, 0.5 + 0.5 * 0.0881),
        ([2, 9] * 40, [2, 9] * 40, -7 * 0.0881, 7 * 0.0881),  # no share: as far as was seen
        ([5] * 80, [5] * 80, 0, 0),
    ],
)
def test_clusters_that_differ_alike_leave_room_for_others(before, after, low, high):
    found = statistics.difference(before, after, np.repeat(np.arange(40), 2).tolist())
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)
    assert found.p == (1.0 if found.mean == 0 else 2 / 2**40)
    alone = statistics.interval(after, np.repeat(np.arange(40), 2).tolist())
    assert alone[1] <= max(1, *after)


def test_the_interval_of_shares_ends_at_1():
    found = statistics.difference([0.0] * 40, [1.0] * 39 + [0.5])
    assert found.high == 1.0
    assert found.low == pytest.approx(0.9875 - 2.0226909 * 0.0125)
    assert statistics.interval([1.0] * 39 + [0.5])[1] == 1.0


def test_rows_that_all_agree_say_how_many_would_do():
    """Of 0 in n, 5% is excluded from n = 73 on: 1.96^2 / (73 + 1.96^2) = 5%, as Wilson has it."""
    for count in (3, 40):
        assert statistics.difference([1.0] * count, [1.0] * count).rows_for(0.05) == 73
    clusters = np.repeat(np.arange(40), 2).tolist()
    found = statistics.difference([1.0] * 80, [1.0] * 80, clusters)
    assert found.rows_for(0.05) == pytest.approx(2 * 73, abs=3)


@pytest.mark.parametrize(("up", "down"), [(0, 0), (1, 0), (5, 1), (9, 9), (3, 14)])
def test_mcnemar_adds_up_all_outcomes_that_are_at_most_as_likely(up, down):
    n = up + down
    chances = [math.comb(n, k) / 2**n for k in range(n + 1)]
    wanted = sum(chance for chance in chances if chance <= chances[up] * (1 + 1e-9))
    assert statistics.mcnemar(up, down) == pytest.approx(wanted)


def test_the_interval_of_a_mean_is_students():
    gain = np.arange(40) / 40
    found = statistics.difference([0.0] * 40, gain.tolist())
    error = gain.std(ddof=1) / math.sqrt(40)
    assert found.standard_error == pytest.approx(error)
    assert found.high - found.mean == pytest.approx(2.0226909 * error)  # t of 39, 97.5%


def test_rows_that_repeat_do_not_narrow_an_interval():
    random = np.random.default_rng(0)
    gain = random.normal(0.2, 1, 50)
    once = statistics.difference([0.0] * 50, gain.tolist())
    tenfold = statistics.difference(
        [0.0] * 500, np.repeat(gain, 10).tolist(), np.repeat(np.arange(50), 10).tolist()
    )
    assert (once.low, once.high) == pytest.approx((tenfold.low, tenfold.high))


def test_few_rows_have_no_interval_of_a_mean():
    found = statistics.difference([0.5] * 29, [0.7, *[0.9] * 28])
    assert (found.low, found.high, found.p) == (None, None, None)
    many = statistics.difference([0.5] * 290, [0.7, 0.9] * 145, [n // 10 for n in range(290)])
    assert many.low is None
    assert many.num_clusters == 29


def test_the_rows_needed_show_the_difference_in_80_of_100_cases():
    random = np.random.default_rng(2)
    gain = random.normal(TRUE, 1, 200_000)
    needed = statistics.difference([0.0] * len(gain), gain.tolist()).rows_needed
    assert needed == pytest.approx((1.959964 + 0.841621) ** 2 / TRUE**2, rel=0.05)
    draws = (random.normal(TRUE, 1, needed) for _ in range(400))
    shown = [statistics.difference([0.0] * needed, draw.tolist()).low > 0 for draw in draws]
    assert np.mean(shown) == pytest.approx(0.8, abs=0.06)


def test_a_statistic_that_is_no_mean_gets_its_interval_from_clusters():
    random = np.random.default_rng(3)
    values = np.repeat(random.normal(1, 1, 100), 5)
    clusters = np.repeat(np.arange(100), 5).tolist()

    def mean(rows):
        return float(values[rows].mean())

    low, high = statistics.bootstrap(mean, 500, clusters, draws=2_000)
    known = statistics.difference([0.0] * 500, values.tolist(), clusters)
    assert (low, high) == pytest.approx((known.low, known.high), abs=0.03)
    narrow = statistics.bootstrap(mean, 500, draws=2_000)
    assert narrow[1] - narrow[0] < 0.6 * (high - low)


def test_holm_holds_for_all_scores_at_once():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.5, 0.9]) == [1.0, 1.0]
    assert statistics.holm([]) == []
