"""Near-duplicate clusters: rows whose texts have nearly the same words in nearly the same order.

A text is compared by its shingles, runs of three words without case and punctuation. MinHash
(rensa) and bands of it propose pairs, the Jaccard similarity of their shingles decides, and
connected pairs are a cluster. The data programs, evaluation and statistics all ask here.

    found = clusters.of_texts(["one text", "another text"])  # [0, 1]: the first row of each cluster
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from finetune.data.spans import mixed

THRESHOLD = 0.8
"""Jaccard similarity from which two texts are near-duplicates."""
SHINGLE = 3  # words; one changed word of 200 changes 3 of 198 shingles
PERMUTATIONS = 128
SEED = 42
RECALL = 0.99  # of pairs right at the threshold, as bands are chosen
# A band of a boilerplate text holds thousands of rows: each is compared with its nearest
# neighbours in the order of the band and the next one, so work grows with rows, not their square.
MOST_NEIGHBOURS = 32
PAIRS_AT_ONCE = 10_000
CHUNK = 1_000  # texts
# Scripts that write no spaces between words: each character counts as a word.
_NO_SPACES = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
_NOT_WORD = re.compile(r"[^\w]+")
_LOWER = bytes(
    (ord(chr(code).lower()) if chr(code).isalnum() else 32) if code < 128 else code
    for code in range(256)
)
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / the golden ratio, as splitmix64 has it


def words(text: str) -> list[bytes]:
    """Split a text into words without case and punctuation, as UTF-8."""
    if not text.isascii():
        text = _NOT_WORD.sub(" ", unicodedata.normalize("NFKC", text).casefold())
        text = _NO_SPACES.sub(r" \g<0> ", text)
    return text.encode("utf-8", "surrogatepass").translate(_LOWER).split()


@dataclass(frozen=True)
class Grams:
    """Hashes of the runs of n words of several texts, laid end to end."""

    hashes: np.ndarray
    """[grams] uint64"""
    rows: np.ndarray
    """[grams] which text each belongs to"""
    starts: np.ndarray
    """[grams] which of all words each begins with"""


def word_hashes(split: Sequence[Sequence[bytes]]) -> tuple[np.ndarray, np.ndarray]:
    """Return (hashes of all words, uint64; the number of words of each text)."""
    from rensa import RMinHash

    lengths = np.fromiter(map(len, split), np.int64, len(split))
    hashed = chain.from_iterable(RMinHash.hash_token_sets(split))
    return np.fromiter(hashed, np.uint64, int(lengths.sum())), lengths


def grams(hashes: np.ndarray, lengths: np.ndarray, n: int) -> Grams:
    """Return the runs of n words; texts of fewer words have none."""
    rows = np.repeat(np.arange(len(lengths)), lengths)
    count = max(0, len(hashes) - n + 1)
    combined = hashes[:count].copy()
    for offset in range(1, n):
        combined *= _MULTIPLIER
        combined += hashes[offset : offset + count]
    starts = np.flatnonzero(rows[:count] == rows[n - 1 : n - 1 + count])
    return Grams(mixed(combined[starts]), rows[starts], starts)


@dataclass(frozen=True)
class Fingerprints:
    """What is kept of texts: about 170 bytes, and 4 for each shingle."""

    bands: np.ndarray
    """[texts, bands] uint64: equal in a column where texts may be near-duplicates"""
    shingles: np.ndarray
    """[shingles] uint32: for each text a sorted set"""
    ends: np.ndarray
    """[texts] int64: where each set ends"""

    def __len__(self) -> int:
        return len(self.ends)

    @classmethod
    def joined(cls, parts: Iterable["Fingerprints"]) -> "Fingerprints":
        """Lay fingerprints end to end; there must be at least one."""
        found = list(parts)
        counts = [np.diff(each.ends, prepend=0) for each in found]
        return cls(
            np.concatenate([each.bands for each in found]),
            np.concatenate([each.shingles for each in found]),
            np.cumsum(np.concatenate(counts)),
        )


def banding(threshold: float) -> tuple[int, int]:
    """Return (bands, rows of each): the longest bands that find RECALL of pairs at the threshold.

    A pair of similarity s shares a band of r rows with probability s**r, and at least one of b
    bands with 1 - (1 - s**r)**b.
    """
    choices = [(PERMUTATIONS // rows, rows) for rows in range(1, 17)]
    return max(
        (
            (bands, rows)
            for bands, rows in choices
            if rows == 1 or 1 - (1 - threshold**rows) ** bands >= RECALL
        ),
        key=lambda choice: choice[1],
    )


def fingerprint(texts: Sequence[str], threshold: float = THRESHOLD) -> Fingerprints:
    """Return the fingerprints of texts. A text without words resembles only the same text."""
    split = [words(text) or [text.strip().encode("utf-8", "replace")] for text in texts]
    return fingerprint_words(*word_hashes(split), threshold)


def fingerprint_words(
    hashes: np.ndarray, lengths: np.ndarray, threshold: float = THRESHOLD
) -> Fingerprints:
    """Return the fingerprints of texts whose words are hashed."""
    from rensa import RMinHash

    count, rows_of_band = banding(threshold)
    shingled = grams(*_padded(hashes, lengths), SHINGLE)
    sizes = np.bincount(shingled.rows, minlength=len(lengths))
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.uint64)
    made = RMinHash.digest_matrix_from_flat_token_hashes(
        shingled.hashes, offsets, count * rows_of_band, SEED
    )
    signature = np.fromiter(chain.from_iterable(made.to_rows()), np.uint64)
    signature = signature.reshape(len(lengths), count, rows_of_band)
    bands = np.zeros((len(lengths), count), np.uint64)
    for row in range(rows_of_band):
        bands = bands * _MULTIPLIER + signature[:, :, row]
    keys = shingled.rows.astype(np.uint64) << np.uint64(32) | shingled.hashes >> np.uint64(32)
    keys.sort()  # numpy.unique hashes, which takes 50 times as long for keys like these
    keys = keys[np.concatenate([np.ones(len(keys[:1]), bool), keys[1:] != keys[:-1]])]
    owners = (keys >> np.uint64(32)).astype(np.int64)
    ends = np.cumsum(np.bincount(owners, minlength=len(lengths)))
    return Fingerprints(mixed(bands), keys.astype(np.uint32), ends)


def _padded(hashes: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Make each text at least one shingle long, with zeros."""
    longer = np.maximum(lengths, SHINGLE)
    moved = np.repeat((np.cumsum(longer) - longer) - (np.cumsum(lengths) - lengths), lengths)
    filled = np.zeros(int(longer.sum()), np.uint64)
    filled[np.arange(len(hashes)) + moved] = hashes
    return filled, longer


def jaccard(prints: Fingerprints, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the Jaccard similarities of pairs of texts: shared shingles by all shingles."""
    return jaccard_between(prints, left, prints, right)


def jaccard_between(
    one: Fingerprints, left: np.ndarray, other: Fingerprints, right: np.ndarray
) -> np.ndarray:
    """Return the Jaccard similarities of texts `left` of one with texts `right` of the other."""
    found = np.zeros(len(left))
    for start in range(0, len(left), PAIRS_AT_ONCE):
        part = slice(start, start + PAIRS_AT_ONCE)
        a, sizes_a = _sets(one, left[part])
        b, sizes_b = _sets(other, right[part])
        both = np.concatenate([a, b])
        both.sort()
        twice = (both[:-1][both[1:] == both[:-1]] >> np.uint64(32)).astype(np.int64)
        shared = np.bincount(twice, minlength=len(sizes_a))
        found[part] = shared / np.maximum(1, sizes_a + sizes_b - shared)
    return found


def _sets(prints: Fingerprints, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (the shingles of texts, each below the number of its place in `texts`; sizes)."""
    starts = np.concatenate([[0], prints.ends])[texts]
    sizes = prints.ends[texts] - starts
    places = np.repeat(np.arange(len(texts)), sizes)
    inside = np.arange(len(places)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    values = prints.shingles[np.repeat(starts, sizes) + inside]
    return places.astype(np.uint64) << np.uint64(32) | values, sizes


def clusters(prints: Fingerprints, threshold: float = THRESHOLD) -> np.ndarray:
    """Return the first text of each text's cluster: [texts] int64."""
    labels = _equal(prints)
    kept = np.flatnonzero(labels == np.arange(len(labels)))
    for left, right in _candidates(prints.bands, kept):
        apart = labels[left] != labels[right]
        left, right = left[apart], right[apart]
        near = jaccard(prints, left, right) >= threshold
        if near.any():
            unite(labels, left[near], right[near])
    return labels


def of_texts(texts: Iterable[str], threshold: float = THRESHOLD) -> np.ndarray:
    """Return the first text of each text's cluster: [texts] int64."""
    parts = [fingerprint(part, threshold) for part in chunks(texts)]
    if not parts:
        return np.zeros(0, np.int64)
    return clusters(Fingerprints.joined(parts), threshold)


def chunks(texts: Iterable[str], size: int = CHUNK) -> Iterator[list[str]]:
    part: list[str] = []
    for text in texts:
        part.append(text)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


def _equal(prints: Fingerprints) -> np.ndarray:
    """Return the first of the texts whose bands are all the same: their shingles are, too."""
    row = np.dtype((np.void, prints.bands.shape[1] * 8))
    whole = np.ascontiguousarray(prints.bands).view(row).ravel()
    _, first, group = np.unique(whole, return_index=True, return_inverse=True)
    labels = first[group].astype(np.int64)
    # Bands may agree by chance where shingles differ a little; those pairs are candidates again.
    others = np.flatnonzero(labels != np.arange(len(labels)))
    different = others[jaccard(prints, others, labels[others]) < 1]
    labels[different] = different
    return labels


def _candidates(bands: np.ndarray, kept: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield pairs of texts that share a band, neighbours first."""
    columns = bands.shape[1]
    for band in range(columns):
        values = bands[kept, band]
        order = np.lexsort((bands[kept, (band + 1) % columns], values))
        values, rows = values[order], kept[order]
        for distance in range(1, min(MOST_NEIGHBOURS, len(kept) - 1) + 1):
            same = np.flatnonzero(values[distance:] == values[:-distance])
            if not len(same):
                break
            yield rows[same], rows[same + distance]


def unite(labels: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """Unite clusters, in place; the label of each stays its first text."""
    for one, other in zip(left.tolist(), right.tolist()):
        first, second = _root(labels, one), _root(labels, other)
        labels[max(first, second)] = min(first, second)
    while not np.array_equal(flat := labels[labels], labels):
        labels[:] = flat


def _root(labels: np.ndarray, text: int) -> int:
    while labels[text] != text:
        text = int(labels[text])
    return text
