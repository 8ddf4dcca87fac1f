"""Put examples of given lengths into packs, with numpy alone."""

from bisect import bisect_left, insort

import numpy as np


def pack(lengths: np.ndarray, max_length: int, seed: int) -> list[np.ndarray]:
    """Pack examples best-fit decreasing: each goes into the fullest pack that still has room.

    lengths: tokens of each example, int [examples], each at most max_length. Returns the example
    indices of each pack. Every example is in exactly one pack; among equal lengths the seed
    decides. Takes O(n log max_length) time. (Johnson, Near-optimal bin packing algorithms, 1973:
    at most 11/9 of the optimal number of packs + 4.)
    """
    if len(lengths) and lengths.max() > max_length:
        raise ValueError(
            f"an example of {lengths.max()} tokens does not fit into a pack of {max_length}"
        )
    shuffled = np.random.default_rng([seed, 0xBFD]).permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    packs: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # free tokens -> packs with exactly that room
    rooms: list[int] = []  # the keys of by_room, ascending
    for example in order:
        length = int(lengths[example])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            number, room = len(packs), max_length
            packs.append([])
        else:
            room = rooms[at]
            number = by_room[room].pop()
            if not by_room[room]:
                del by_room[room]
                rooms.pop(at)
        packs[number].append(int(example))
        left = room - length
        if left not in by_room:
            insort(rooms, left)
            by_room[left] = []
        by_room[left].append(number)
    return [np.array(members, np.int64) for members in packs]
