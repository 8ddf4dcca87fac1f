"""Near-duplicates are found, and nothing else; every pair is checked by its true similarity."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from conftest import read_jsonl

from finetune.data import clusters

VOCABULARY = [f"word{number}" for number in range(5_000)]
REAL = os.environ.get("FINETUNE_REAL_DATA")


def text(source: random.Random, length: int = 60) -> str:
    return " ".join(source.choices(VOCABULARY, k=length))


def edited(text: str, changes: int, source: random.Random) -> str:
    """Return a text with some words replaced."""
    split = text.split()
    for place in source.sample(range(len(split)), changes):
        split[place] = source.choice(VOCABULARY)
    return " ".join(split)


def similarity(one: str, other: str) -> float:
    """The Jaccard similarity by definition."""
    left, right = (
        {tuple(split[start : start + 3]) for start in range(len(split) - 2)}
        for split in (one.split(), other.split())
    )
    return len(left & right) / len(left | right)


def test_the_similarity_is_that_of_the_shingles():
    source = random.Random(0)
    texts = [text(source) for _ in range(20)]
    texts += [edited(each, changes, source) for changes, each in enumerate(texts)]
    prints = clusters.fingerprint(texts)
    left, right = np.arange(20), np.arange(20, 40)
    expected = [similarity(texts[one], texts[one + 20]) for one in range(20)]
    assert clusters.jaccard(prints, left, right) == pytest.approx(expected)
    assert expected[0] == 1
    assert expected[-1] < 0.3


def test_pairs_above_the_threshold_are_found_and_others_are_not():
    source = random.Random(1)
    texts = [text(source) for _ in range(3_000)]
    texts += [edited(each, source.randrange(5), source) for each in texts[:1_000]]
    labels = clusters.of_texts(texts)
    near = [similarity(texts[one], texts[one + 3_000]) >= 0.8 for one in range(1_000)]
    found = labels[3_000:] == np.arange(1_000)
    assert 400 < sum(near) < 900
    assert found[near].mean() >= 0.99
    assert not found[np.invert(near)].any()
    assert (labels[:3_000] == np.arange(3_000)).all()


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9, 1.0])
def test_bands_find_pairs_right_at_any_threshold(threshold):
    bands, rows = clusters.banding(threshold)
    assert bands * rows <= clusters.PERMUTATIONS
    assert 1 - (1 - threshold**rows) ** bands >= 0.99


def test_a_chain_of_near_duplicates_is_one_cluster():
    source = random.Random(2)
    chain = [text(source)]
    for _ in range(6):
        chain.append(edited(chain[-1], 1, source))
    others = [text(source), text(source)]
    assert clusters.of_texts([others[0], *chain, others[1]]).tolist() == [0, *[1] * 7, 8]
    assert similarity(chain[0], chain[-1]) < 0.8


def test_boilerplate_in_every_row_hides_no_duplicate():
    """All rows share bands; each row's neighbours in a band are the most similar ones."""
    source = random.Random(3)
    boilerplate = text(source, 100)
    own = [text(source, 30) for _ in range(400)]
    rows = [f"{boilerplate} {each}" for each in own]
    labels = clusters.of_texts([*rows, *(f"{boilerplate} {edited(t, 1, source)}" for t in own)])
    assert labels.tolist() == [*range(400), *range(400)]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("What is it?", "what IS  it", True),
        ("What is it", "What was it", False),
        ("yes", "yes", True),
        ("yes", "no", False),
        ("", "", True),
        ("", "!", False),
        ("?!", "?!", True),
        ("?!", "!?", False),
        ("Größe — “STRASSE”", "größe strasse", True),
        ("ﬁne café here", "fine café here", True),
        ("機械学習は面白いです", "機械学習は、面白いです。", True),
        ("機械学習は面白いです", "機械学習は難しいです", False),
        ("a\ud800b c d", "a\ud800b c d", True),
    ],
)
def test_words_are_compared_without_case_and_punctuation(one, other, same):
    assert (clusters.of_texts([one, other]).tolist() == [0, 0]) == same


def test_no_texts_are_no_clusters():
    assert clusters.of_texts([]).tolist() == []
    assert clusters.of_texts(["a"]).tolist() == [0]


@pytest.mark.skipif(not REAL, reason="FINETUNE_REAL_DATA is not set")
@pytest.mark.parametrize(
    ("file", "columns"),
    [
        ("gsm8k/train.jsonl", ("question", "answer")),
        ("dolly/dolly_hhrlhf_small.jsonl", ("prompt", "response")),
    ],
)
def test_near_duplicates_planted_in_real_rows_are_found(file, columns):
    """Words dropped, doubled and exchanged, capitals and spaces lost, in 300 rows of others."""
    source = random.Random(4)
    rows = ["\n".join(row[name] for name in columns) for row in read_jsonl(Path(REAL, file))]
    before = clusters.of_texts(rows)
    numbers = source.sample([n for n, t in enumerate(rows) if len(t.split()) >= 40], 300)
    planted = [damaged(rows[number], source) for number in numbers]
    prints = clusters.fingerprint([*rows, *planted])
    pairs = np.array(numbers), np.arange(len(rows), len(rows) + 300)
    near = clusters.jaccard(prints, *pairs) >= clusters.THRESHOLD
    labels = clusters.clusters(prints)
    found = labels[pairs[0]] == labels[pairs[1]]
    assert near.sum() > 200, json.dumps([file, int(near.sum())])
    assert found[near].mean() >= 0.95
    assert (labels[: len(rows)] == before).mean() > 0.999


def damaged(text: str, source: random.Random) -> str:
    split = text.split(" ")
    for _ in range(max(1, len(split) // 50)):
        place = source.randrange(len(split))
        split[place : place + 1] = source.choice([[], [split[place]] * 2, [source.choice(split)]])
    return source.choice([str.lower, str.upper, str])("  ".join(split))
