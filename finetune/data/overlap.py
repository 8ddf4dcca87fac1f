"""Find evaluation rows in other rows: the same text, nearly the same, or a part of it.

    found = Overlap([("a question", "its answer")]).matches([("a question", "another answer")])

Four rules, after templates are stripped: the same words in what is asked or in all of it; Jaccard
similarity of at least 0.8 (finetune/data/clusters.py); one run of 13 words of an evaluation row; or
runs of 8 words that cover half of the question of an evaluation row, or half of all of it.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from finetune.data import clusters
from finetune.data.clusters import Grams
from finetune.data.spans import mixed

LONG, SHORT = 13, 8  # words
COVERED = 0.5
EXACT, NEAR = "the same text", "nearly the same text"
LONG_RUN, COVERAGE = f"{LONG} words in a row", f"half covered by runs of {SHORT} words"
# Runs in more than 1% of at least 1,000 evaluation rows, or in half of a few, are a template.
COMMON, COMMON_ROWS, HALF_ROWS = 0.01, 10, 4
_MARKERS = re.compile(
    r"<\|[^<>|\n]{1,40}\|>(?:(?:system|user|assistant|developer|tool)\n)?|</?s>|\[/?INST\]"
    r"|<</?SYS>>|<(?:bos|eos)>|<(?:start|end)_of_turn>(?:(?:user|model)\n)?"
    r"|^#{2,4} *(?:question|answer|instruction|input|response|human|user|assistant|system):? *$"
    r"|^(?:question|answer|instruction|input|response|human|user|assistant|system|q|a):",
    re.IGNORECASE | re.MULTILINE,
)
_ALPACA = re.compile(
    r"below is an instruction that describes a task(?:, paired with an input that provides further "
    r"context)?\.\s+write a response that appropriately completes the request\.",
    re.IGNORECASE,
)
Text = tuple[str, str]
"""What a row asks, and all else of its text."""


@dataclass(frozen=True)
class Match:
    """An evaluation row that a text overlaps with."""

    row: int
    rule: str
    shared: str
    """Words that both have."""


def without_template(text: str) -> str:
    """Return a text without the markers of chat templates and the sentences of Alpaca's."""
    if "elow is an" in text or "ELOW IS AN" in text:
        text = _ALPACA.sub(" ", text)
    return _MARKERS.sub(" ", text) if ":" in text or "<" in text or "[" in text else text


class _Words:
    """The hashed words of texts, and where what they ask ends."""

    def __init__(self, texts: Sequence[Text]) -> None:
        asked, answered = (
            [clusters.words(without_template(text[part])) for text in texts] for part in (0, 1)
        )
        self.split = [one + other for one, other in zip(asked, answered)]
        self.hashes, self.lengths = clusters.word_hashes(self.split)
        self.asked = np.fromiter(map(len, asked), np.int64, len(asked))
        self.starts = np.cumsum(self.lengths) - self.lengths

    def pieces(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (hashed words, lengths, texts) of all of each text, then of what each asks.

        Without texts that have no words, and without what is asked where it is all.
        """
        places = np.arange(len(self.hashes)) - np.repeat(self.starts, self.lengths)
        asked = np.where(self.asked < self.lengths, self.asked, 0)
        hashes = np.concatenate([self.hashes, self.hashes[places < np.repeat(asked, self.lengths)]])
        lengths = np.concatenate([self.lengths, asked])
        texts = np.tile(np.arange(len(asked)), 2)
        return hashes, lengths[lengths > 0], texts[lengths > 0]


class _Lookup:
    """Find hashes in a sorted array; a table of bits answers for most that are not there.

    A hash sets two bits of at least eight for each value, so that at most 5% of other hashes pass:
    searching the array costs 20 times as much as asking the table.
    """

    def __init__(self, values: np.ndarray) -> None:
        self.values = values
        self._bits = max(16, int(8 * max(1, len(values))).bit_length())
        table = np.zeros(1 << self._bits, bool)
        for places in self._places(values):
            table[places] = True
        self._table = np.packbits(table, bitorder="little")

    def _places(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the two bits of each hash: from its lowest and its highest bits."""
        return hashes & np.uint64((1 << self._bits) - 1), hashes >> np.uint64(64 - self._bits)

    def _is_set(self, places: np.ndarray) -> np.ndarray:
        bit = self._table[places >> np.uint64(3)] >> (places & np.uint64(7)).astype(np.uint8)
        return (bit & np.uint8(1)).astype(bool)

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """Return which hashes are there, as their places in `hashes`."""
        if not len(self.values):
            return np.zeros(0, np.int64)
        low, high = self._places(hashes)
        maybe = np.flatnonzero(self._is_set(low))
        maybe = maybe[self._is_set(high[maybe])]
        found = np.searchsorted(self.values, hashes[maybe])
        found[found == len(self.values)] = 0
        return maybe[self.values[found] == hashes[maybe]]


class Overlap:
    """Evaluation rows, indexed so that other rows can be compared with all of them."""

    def __init__(self, texts: Sequence[Text]) -> None:
        words = _Words(texts)
        self._lengths, self._asked = words.lengths, words.asked
        hashes, lengths, self._texts = words.pieces()
        self._prints = clusters.fingerprint_words(hashes, lengths)
        bands = np.ascontiguousarray(self._prints.bands.T)
        self._order = np.argsort(bands, axis=1, kind="stable")
        self._bands = np.take_along_axis(bands, self._order, 1)
        pairs = zip(_sequences(hashes, lengths).tolist(), self._texts.tolist())
        self._known = dict(reversed(list(pairs)))
        self._long_rows, self._long = _indexed(
            clusters.grams(words.hashes, words.lengths, LONG), len(texts)
        )[:2]
        short = clusters.grams(words.hashes, words.lengths, SHORT)
        self._short_rows, self._short, self._short_starts, template = _indexed(short, len(texts))
        starts = self._short_starts - words.starts[self._short_rows]
        self._short_starts = starts.astype(np.int32)  # inside its row
        self._set_counted(words, short, template)

    def _set_counted(self, words: _Words, short: Grams, template: np.ndarray) -> None:
        """Count the words of all of each row, and of its question, outside templates."""
        is_template = np.zeros(len(words.hashes) + SHORT, bool)
        for offset in range(SHORT):
            is_template[short.starts[template] + offset] = True
        before = np.concatenate([[0], np.cumsum(~is_template[: len(words.hashes)])])
        starts = words.starts
        self._counted = before[starts + words.lengths] - before[starts]
        self._counted_asked = before[starts + words.asked] - before[starts]

    def __len__(self) -> int:
        return len(self._lengths)

    def matches(self, texts: Sequence[Text]) -> list[Match | None]:
        """Return for each text an evaluation row that it overlaps with, by the strictest rule."""
        found: list[Match | None] = [None] * len(texts)
        if not len(self) or not len(texts):
            return found
        words = _Words(texts)
        self._match_whole(words, found)
        self._match_long(words, found)
        self._match_coverage(words, found)
        return found

    def _match_whole(self, words: _Words, found: list[Match | None]) -> None:
        hashes, lengths, texts = words.pieces()
        if not len(lengths) or not len(self._texts):
            return
        for value, row, size in zip(_sequences(hashes, lengths).tolist(), texts, lengths):
            if found[row] is None and value in self._known:
                found[row] = Match(self._known[value], EXACT, _shown(words.split[row][:size]))
        prints = clusters.fingerprint_words(hashes, lengths)
        pairs = [pair for pair in self._near(prints.bands) if found[texts[pair[0]]] is None]
        left, right = (np.array([pair[side] for pair in pairs], np.int64) for side in (0, 1))
        similar = clusters.jaccard_between(prints, left, self._prints, right)
        for (piece, other), value in zip(pairs, similar):
            row = int(texts[piece])
            if value >= clusters.THRESHOLD and found[row] is None:
                shared = _shown(words.split[row][: lengths[piece]])
                found[row] = Match(int(self._texts[other]), NEAR, shared)

    def _near(self, bands: np.ndarray) -> list[tuple[int, int]]:
        """Return pairs (piece, piece of an evaluation row) that share a band, sorted."""
        pairs: set[tuple[int, int]] = set()
        for band, (known, order) in enumerate(zip(self._bands, self._order)):
            values = bands[:, band]
            by_value = np.argsort(values)  # searching in order is several times as fast
            first = np.searchsorted(known, values[by_value])
            first[first == len(known)] = 0
            for place in np.flatnonzero(known[first] == values[by_value]).tolist():
                piece, start = int(by_value[place]), int(first[place])
                last = int(np.searchsorted(known, values[piece], "right"))
                last = min(last, start + clusters.MOST_NEIGHBOURS)
                pairs.update((piece, int(other)) for other in order[start:last])
        return sorted(pairs)

    def _match_long(self, words: _Words, found: list[Match | None]) -> None:
        runs = clusters.grams(words.hashes, words.lengths, LONG)
        for hit in self._long.find(runs.hashes).tolist():
            row = int(runs.rows[hit])
            if found[row] is None:
                start = int(runs.starts[hit] - words.starts[row])
                known = self._long_rows[np.searchsorted(self._long.values, runs.hashes[hit])]
                shared = _shown(words.split[row][start : start + LONG])
                found[row] = Match(int(known), LONG_RUN, shared)

    def _match_coverage(self, words: _Words, found: list[Match | None]) -> None:
        runs = clusters.grams(words.hashes, words.lengths, SHORT)
        hits = self._short.find(runs.hashes)
        covered: dict[tuple[int, int], set[int]] = defaultdict(set)
        first: dict[int, int] = {}
        for hit in hits.tolist():
            row = int(runs.rows[hit])
            if found[row] is not None:
                continue
            first.setdefault(row, int(runs.starts[hit] - words.starts[row]))
            left = int(np.searchsorted(self._short.values, runs.hashes[hit]))
            right = int(np.searchsorted(self._short.values, runs.hashes[hit], "right"))
            for place in range(left, right):
                start = int(self._short_starts[place])
                covered[row, int(self._short_rows[place])].update(range(start, start + SHORT))
        for (row, known), places in covered.items():
            asked = sum(place < self._asked[known] for place in places)
            if found[row] is None and (
                len(places) >= max(SHORT, COVERED * self._counted[known])
                or asked >= max(SHORT, COVERED * self._counted_asked[known])
            ):
                shared = _shown(words.split[row][first[row] : first[row] + SHORT])
                found[row] = Match(known, COVERAGE, shared)


def _indexed(runs: Grams, count: int) -> tuple[np.ndarray, _Lookup, np.ndarray, np.ndarray]:
    """Return (rows, hashes, starts of runs outside templates, sorted; which are in one)."""
    order = np.argsort(runs.hashes, kind="stable")  # the runs are in the order of rows already
    hashes, rows = runs.hashes[order], runs.rows[order]
    new = np.concatenate([[True], hashes[1:] != hashes[:-1]])[: len(hashes)]
    new_row = new | np.concatenate([[True], rows[1:] != rows[:-1]])[: len(hashes)]
    group = np.cumsum(new) - 1
    frequency = np.bincount(group, weights=new_row)[group] if len(group) else np.zeros(0)
    most = max(COMMON_ROWS, COMMON * count)
    common = (frequency > most) | ((frequency >= count / 2) & (frequency >= HALF_ROWS))
    template = np.zeros(len(hashes), bool)
    template[order] = common
    kept = order[~common]
    rows, starts = runs.rows[kept].astype(np.int32), runs.starts[kept]
    return rows, _Lookup(runs.hashes[kept]), starts, template


def _sequences(hashes: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return a hash of each text's words in their order."""
    starts = np.cumsum(lengths) - lengths
    places = (np.arange(len(hashes)) - np.repeat(starts, lengths)).astype(np.uint64)
    spread = mixed(hashes + places * np.uint64(0x9E3779B97F4A7C15))
    before = np.concatenate([np.zeros(1, np.uint64), np.cumsum(spread, dtype=np.uint64)])
    return before[starts + lengths] - before[starts]


def _shown(split: Sequence[bytes], most: int = LONG) -> str:
    return b" ".join(split[:most]).decode("utf-8", "replace")
