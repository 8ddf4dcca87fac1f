"""Unite rows that mean nearly the same: the cosine of their vectors is at least a threshold.

Every pair is compared, a block of the matrix of cosines at a time, so memory grows with rows, and
work with their square.
"""

from collections.abc import Sequence

import numpy as np

from finetune.data import clusters

ROWS, COLUMNS = 1_024, 8_192  # of a block: 32 MB
ROUNDING = 2e-5  # of a cosine in 32 bits; each that unites rows is computed again in 64
EQUAL = 1e-6  # how much a vector of length 1 may miss it


def united(labels: Sequence[int], vectors: np.ndarray, threshold: float) -> list[int]:
    """Return the labels of clusters, those united whose first rows are near.

    vectors: [clusters, dimensions] float32, of length 1.
    """
    found = np.array(labels)
    unite_near(found, np.flatnonzero(found == np.arange(len(found))), vectors, threshold)
    return [int(label) for label in found]


def unite_near(labels: np.ndarray, rows: np.ndarray, vectors: np.ndarray, threshold: float) -> None:
    """Unite the clusters of `labels`, in place, of all rows whose vectors are near.

    labels: [all rows] int64, the first row of each row's cluster; rows: [n] which of them have
    vectors; vectors: [n, dimensions] float32, of length 1.
    """
    for start in range(0, len(rows), ROWS):
        own = np.arange(start, min(start + ROWS, len(rows)))
        for column in range(start, len(rows), COLUMNS):
            others = np.arange(column, min(column + COLUMNS, len(rows)))
            near = vectors[own] @ vectors[others].T >= threshold - ROUNDING
            near &= own[:, None] < others[None, :]
            _unite(labels, rows, vectors, own, others, near, threshold)


def _unite(
    labels: np.ndarray, rows: np.ndarray, vectors: np.ndarray, own: np.ndarray, others: np.ndarray,
    near: np.ndarray, threshold: float,
) -> None:  # fmt: skip
    """Unite near pairs of a block until none is in two clusters; in each pass one of each column.

    So rows that are all alike take one pass.
    """
    while True:
        near &= labels[rows[own]][:, None] != labels[rows[others]][None, :]
        right = np.flatnonzero(near.any(axis=0))
        if not len(right):
            return
        left = near[:, right].argmax(axis=0)
        one, other = vectors[own[left]], vectors[others[right]]
        cosines = np.einsum("ij,ij->i", one, other, dtype=np.float64)
        is_near = cosines >= threshold - EQUAL
        near[left[~is_near], right[~is_near]] = False
        clusters.unite(labels, rows[own[left[is_near]]], rows[others[right[is_near]]])
