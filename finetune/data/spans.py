"""Count in, and compare, many spans of one array, with numpy alone.

Python takes 1 to 10 microseconds for each span, which is most of what reading a cache of a million
rows takes. Spans may be empty, overlap, and stand in any order.
"""

from collections.abc import Iterator

import numpy as np

AT_ONCE = 1 << 22  # elements: 100 MB of intermediate arrays
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / the golden ratio, as splitmix64 has it


def parts(starts: np.ndarray, ends: np.ndarray) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Yield (some of the spans, their elements' places in the array, their bounds in these).

    Bounds are int64 [spans + 1]. A span longer than AT_ONCE comes alone.
    """
    lengths = np.maximum(ends - starts, 0)
    before = np.concatenate([[0], np.cumsum(lengths)])
    first = 0
    while first < len(lengths):
        last = int(np.searchsorted(before, before[first] + AT_ONCE, "right")) - 1
        part = slice(first, max(last, first + 1))
        bounds = before[first : part.stop + 1] - before[first]
        shift = np.repeat(starts[part] - bounds[:-1], lengths[part])
        yield part, shift + np.arange(bounds[-1]), bounds
        first = part.stop


def sums(values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the sum of the values of each span, int64 [spans]."""
    found = np.zeros(len(starts), np.int64)
    for part, places, bounds in parts(starts, ends):
        before = np.concatenate([[0], np.cumsum(values[places], dtype=np.int64)])
        found[part] = np.diff(before[bounds])
    return found


def repeated(ids: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the spans whose ids may be those of another span, as places in `starts`, ascending.

    All that are, and of a million others one in ten million: compare those found.
    """
    keys = np.zeros(len(starts), np.uint64)
    for part, places, bounds in parts(starts, ends):
        inside = np.arange(len(places)) - np.repeat(bounds[:-1], np.diff(bounds))
        spread = mixed(ids[places].astype(np.uint64) + (inside + 1).astype(np.uint64) * _MULTIPLIER)
        before = np.concatenate([np.zeros(1, np.uint64), np.cumsum(spread, dtype=np.uint64)])
        keys[part] = np.diff(before[bounds])
    order = np.argsort(keys, kind="stable")
    same = keys[order][1:] == keys[order][:-1]
    is_repeated = np.concatenate([[False], same]) | np.concatenate([same, [False]])
    found: np.ndarray = np.sort(order[is_repeated[: len(order)]])
    return found


def mixed(values: np.ndarray) -> np.ndarray:
    """Spread the bits of hashes, as splitmix64 ends."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
