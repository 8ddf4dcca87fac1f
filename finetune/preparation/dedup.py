"""Remove rows that are the same as another row, or nearly the same.

Exact duplicates have the same text, apart from spaces around it. Near-duplicates share at least
--threshold of all runs of three words that either has (Jaccard similarity), without case and
punctuation; rows that are connected by such pairs are one cluster, and one row of it stays.
--semantic also removes rows that mean the same in other words: the cosine of their vectors, made by
a small model on this machine, is at least --similarity.
"""

import argparse
import contextlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from hashlib import blake2b

import numpy as np

from finetune.config import paths
from finetune.data import clusters
from finetune.data.clusters import Fingerprints
from finetune.data.overlap import without_template
from finetune.data.places import Place, Row, short
from finetune.errors import DataError, UserError
from finetune.preparation import embeddings, semantic, texts, workers
from finetune.preparation import frame as frames
from finetune.preparation.frame import Frame

EXACT, NEAR, MEANING = "exact duplicate", "near-duplicate", "same meaning"
SIMILARITY = 0.95


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    frames.add_inputs(parser)
    frames.add_output(parser)
    frames.add_rejects(parser)
    frames.add_columns(parser, "compare")
    what = "similarity from which two rows are near-duplicates"
    add("--threshold", type=frames.fraction, default=clusters.THRESHOLD, help=what)
    add("--exact", action="store_true", help="remove exact duplicates only")
    add("--semantic", action="store_true", help="also remove rows that mean the same")
    what = "cosine from which two rows mean the same"
    add("--similarity", type=frames.fraction, default=argparse.SUPPRESS, metavar="COSINE",
        help=f"{what} (default: {SIMILARITY})")  # fmt: skip
    what = "folder of another model that makes vectors of texts, for --semantic"
    add("--embedding", type=paths.argument, metavar="FOLDER", help=what)
    what = "which row of a cluster stays: its first, or the best by --by"
    add("--keep", choices=("first", "best"), default="first", help=what)
    what = "column of numbers: the highest is the best (default: the longest text)"
    add("--by", metavar="COLUMN", help=what)
    frames.add_workers(parser)


def main(frame: Frame, arguments: argparse.Namespace) -> None:
    if not arguments.semantic and ("similarity" in arguments or arguments.embedding):
        raise UserError("--similarity and --embedding are for --semantic; add it, or remove them")
    embed = embeddings.embedder(arguments.embedding) if arguments.semantic else None
    seen = _Seen(arguments.keep == "best", arguments.by)
    found = seen.texts(frame)
    labels = exact = seen.firsts
    if arguments.exact:
        deque(found, maxlen=0)
    else:
        prints = fingerprints(found, arguments.threshold, arguments.workers)
        labels = clusters.clusters(prints, arguments.threshold).tolist() if prints else []
    near = labels
    if embed and labels:
        similarity = getattr(arguments, "similarity", SIMILARITY)
        vectors = _vectors(frame, labels, arguments, embed)
        labels = semantic.united(labels, vectors, similarity)
    merit = seen.merit if arguments.keep == "best" else None
    stays, stays_of_equal = _staying(labels, merit), _staying(exact, merit)
    stays_of_near = _staying(near, merit)
    frame.details["largest_clusters"] = _largest(labels)
    with frame.writing() as write:
        for number, row in enumerate(frame.rows(title="writing")):
            if stays[number] == number:
                write(row.values, row.place)
                continue
            reason = NEAR if stays_of_near[number] != number else MEANING
            reason = EXACT if stays_of_equal[number] != number else reason
            frame.drop(row, reason, kept=frame.shown(seen.places[stays[number]]))


class _Seen:
    """What a first reading of the rows notes of each."""

    def __init__(self, with_merit: bool, by: str | None) -> None:
        self.firsts: list[int] = []
        """The first row with the same text."""
        self.places: list[Place] = []
        self.merit: list[float] = []
        """How good a row is, if asked for."""
        self._with_merit, self._by = with_merit, by

    def texts(self, frame: Frame) -> Iterator[str]:
        """Yield the text of each row."""
        known: dict[bytes, int] = {}
        for number, row in enumerate(frame.rows(title="comparing")):
            text = texts.text_of(row.values, frame.columns)
            key = blake2b(text.strip().encode("utf-8", "surrogatepass"), digest_size=16).digest()
            self.firsts.append(known.setdefault(key, number))
            self.places.append(row.place)
            if self._with_merit:
                self.merit.append(_merit(row, text, self._by))
            yield text


def _merit(row: Row, text: str, column: str | None) -> float:
    if column is None:
        return len(text)
    value = row.values.get(column)
    with contextlib.suppress(TypeError, ValueError):
        return float(value)  # type: ignore[arg-type]
    what = f"--by: column {short(column)!r} should be a number, got {short(value)}"
    raise DataError(f"{row.place}: {what}; correct it, or leave out the row")


def fingerprints(found: Iterable[str], threshold: float, count: int) -> Fingerprints | None:
    """Fingerprint texts in `count` processes; None without texts."""
    make = partial(partial, clusters.fingerprint, threshold=threshold)
    parts = list(workers.mapped(make, workers.chunks(found), count))
    return Fingerprints.joined(parts) if parts else None


def _vectors(
    frame: Frame, labels: Sequence[int], arguments: argparse.Namespace, embed: embeddings.Embed
) -> np.ndarray:
    """Return the vectors of the first rows of clusters: [clusters, dimensions]."""
    found = (  # what all rows share would make all of them alike
        without_template(texts.text_of(row.values, frame.columns))
        for number, row in enumerate(frame.rows(title="embedding"))
        if labels[number] == number
    )
    parts: Iterator[np.ndarray] = map(embed, workers.chunks(found))
    if embeddings.is_static(embed):  # an encoder uses all cores, or the GPU, by itself
        make, folder = embeddings.embedder, arguments.embedding
        parts = workers.mapped(make, workers.chunks(found), arguments.workers, folder)
    vectors, done = np.zeros((0, 0), np.float32), 0
    for part in parts:
        if not done:  # not all parts and the whole at once
            count = sum(number == label for number, label in enumerate(labels))
            vectors = np.empty((count, part.shape[1]), np.float32)
        vectors[done : done + len(part)] = part
        done += len(part)
    return vectors


def _staying(labels: Sequence[int], merit: Sequence[float] | None) -> Sequence[int]:
    """Return the row that stays of each row's cluster: its first, or the first of its best."""
    if merit is None:
        return labels
    best: dict[int, int] = {}
    for number, label in enumerate(labels):
        if label not in best or merit[number] > merit[best[label]]:
            best[label] = number
    return [best[label] for label in labels]


def _largest(labels: Sequence[int], most: int = 10) -> list[int]:
    """Return the sizes of the largest clusters of at least two rows."""
    return [size for _, size in Counter(labels).most_common(most) if size > 1]
