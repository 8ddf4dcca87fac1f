"""The sets made by rule: what a row holds, what is held out, and the user's own sentences."""

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import read_jsonl, write_jsonl

from finetune.__main__ import main
from finetune.data import clusters
from finetune.data.formats import detect, to_conversation
from finetune.data.readers import read
from finetune.preparation import company, moderation, patient_doctor, retrieval, yoda

SETS = ("pig_latin", "yoda", "patient_doctor", "company", "moderation", "retrieval")
SPLITS = ("train", "dev", "test")
FEW = ["--train", "200", "--held-out", "20"]
FACTS = """The office opens at nine on weekdays.
Invoices are sent on Fridays.
Parking costs two euros an hour.
Our kitchen serves lunch until three.
The archive keeps letters for ten years.
Visitors sign a book downstairs.
The printer upstairs needs yellow paper.
Bicycles belong behind the warehouse.
Elevators stop during thunderstorms.
The gardener waters the roses before sunrise.
Our founder was a watchmaker.
Samples leave the laboratory in blue crates.
"""


@pytest.fixture
def made(tmp_path, capsys):
    """Make a set in this process; return the rows of each split."""

    def made(name: str, *options: Any, code: int = 0) -> Any:
        folder = tmp_path / name
        try:
            found = main(["data", name, "--output", str(folder), *map(str, options)])
        except SystemExit as exc:
            found = int(exc.code or 0)
        error = capsys.readouterr().err
        assert found == code, error
        if code:
            return error
        return {split: read_jsonl(folder / f"{split}.jsonl") for split in SPLITS}

    return made


def sentences(folder: Path, text: str) -> list[str]:
    path = folder / "mine.txt"
    path.write_text(text)
    return ["--sentences", str(path)]


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_what_training_reads_and_nothing_is_held_out_twice(made, tmp_path, name):
    parts = made(name, *FEW)
    assert {split: len(rows) for split, rows in parts.items()} == {
        "train": 200, "dev": 20, "test": 20,
    }  # fmt: skip
    for row in read(str(tmp_path / name / "train.jsonl")):
        conversation = to_conversation(row, detect(row), {})
        assert [message.role for message in conversation.messages] == ["user", "assistant"]
    rows = [json.dumps(row) for own in parts.values() for row in own]
    assert len(set(rows)) == len(rows)
    assert made(name, *FEW) == parts, "the same again is not an error"
    assert "train.jsonl exists; choose another name" in made(name, *FEW, "--seed", 1, code=2)
    assert made(name, *FEW, "--seed", 1, "--force") != parts


@pytest.mark.parametrize("name", [name for name in SETS if name != "company"])
def test_no_held_out_row_resembles_a_row_of_training(made, name):
    """Of company the answers are those of training; its questions are new."""
    parts = made(name, "--train", 1000, "--held-out", 100)
    texts = ["\n".join(row.values()) for own in parts.values() for row in own]
    labels = clusters.of_texts(texts)
    assert not np.intersect1d(labels[:1000], labels[1000:]).size


@pytest.mark.parametrize("name", [name for name in SETS if name != "patient_doctor"])
def test_sizes_and_sentences_of_ones_own_exclude_each_other(made, tmp_path, name):
    options = sentences(tmp_path, FACTS)
    assert "do not go with rows of your own" in made(name, *options, "--train", 5, code=2)
    short = sentences(tmp_path, "I am tired.\n")
    assert "give at least 10 that differ" in made(name, *short, code=2)
    table = write_jsonl(tmp_path / "table.jsonl", [{"sentence": "I am tired."}])
    error = made(name, "--sentences", table, code=2)
    assert f"{table}:1: --sentences: this row has no text in column 'text'" in error


def test_a_sentence_of_any_length_is_shown_in_short(tmp_path, capsys):
    """A line of a megabyte, with a code that clears the screen."""
    text = "\n".join(["x" * 10**6 + "\x1b[2J", *FACTS.splitlines()])
    options = sentences(tmp_path, text)
    assert main(["data", "pig_latin", "--output", str(tmp_path / "made"), *options]) == 0
    error = capsys.readouterr().err
    assert "note: the first row: " in error
    assert len(error) < 2_000
    assert "\x1b" not in error


def test_more_rows_than_the_rule_makes_are_an_error(made, monkeypatch):
    monkeypatch.setattr("finetune.preparation.sets.IN_VAIN", 100)
    error = made("moderation", "--held-out", 10**6, code=2)
    assert "the rule makes fewer different rows" in error


# ------------------------------------------------------------------------------------------ yoda


@pytest.mark.parametrize(
    ("plain", "turned"),
    [
        ("I am tired.", "Tired, I am."),
        ("You will learn the song.", "The song, you will learn."),
        ("You must not forget the key!", "The key, you must not forget!"),
        ("The cat is under the bridge", "Under the bridge, the cat is."),
        ("The people in the house are tired.", "Tired, the people in the house are."),
        ("The two old brothers are late.", "Late, the two old brothers are."),
        ("My sister has found her bag.", "Her bag, my sister has found."),
        ("I don't know the way.", "The way, I do not know."),
        ("We can't help you.", "Help you, we cannot."),
        ("I'm reading this book.", "Reading this book, I am."),
        ("He has a dog.", "A dog, he has."),
        ("They have been tired.", "Tired, they have been."),
        ("There is a dog in the garden.", "A dog in the garden, there is."),
        ("She repaired the lamp of my uncle.", "The lamp of my uncle, she repaired."),
        ("Anna Smith is ill.", "Ill, Anna Smith is."),
        ("Anna is ill.", "Ill, Anna is."),
        ("This is my house.", "My house, this is."),
        ("You will learn.", "Learn, you will."),
    ],
)
def test_a_sentence_of_ones_own_is_turned(plain, turned):
    assert yoda.turned(plain) == turned


@pytest.mark.parametrize(
    "sentence",
    [
        "Who are you?", "Go home.", "I will", "I do", "He is", "Is he?", "", "...", "42", "é",
        "After Anna was ill she slept.", "They have a plan - to go.", "He has it--all of it.",
        "You are late, I sense.", "I think you are right.", "They quickly left the hall.",
        "My sister knows the way is long.", "The teacher says Anna is ill.",
        "The man who is tired sleeps.", "You read and write the book.",
        "You must go because it is late.", "She has never seen it.",
        "The juice of lemons makes fine punch.", "I am. You are.",
    ],
)  # fmt: skip
def test_a_sentence_whose_parts_are_not_plain_is_left_out(sentence):
    assert yoda.turned(sentence) is None


def test_the_rule_agrees_with_sentences_of_known_structure():
    source = random.Random(0)
    rows = [yoda.compose(source)[1] for _ in range(2000)]
    turned = [(yoda.turned(row["question"]), row["answer"]) for row in rows]
    assert [pair for pair in turned if pair[0] and pair[0] != pair[1]] == []
    assert sum(bool(found) for found, _ in turned) > 1500
    assert not [row for row in rows if re.search(r"\ba [aeiou]|\ban [^aeiou]", row["question"])]


def test_what_cannot_be_turned_is_counted(made, tmp_path):
    adjectives = "tired late ill calm cold proud lost shy sad glad odd".split()
    texts = [f"Books are {word}." for word in adjectives] + ["Who are you?", "Read books!", " "]
    path = write_jsonl(tmp_path / "mine.jsonl", [{"text": text} for text in texts])
    parts = made("yoda", "--sentences", path, "--counts", tmp_path / "counts.json")
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert (counts["read"], counts["written"]) == (14, 11)
    assert counts["dropped"] == {"cannot be turned by the rule": 2, "empty": 1}
    assert {len(parts["dev"]), len(parts["test"])} == {1}
    answers = [row["answer"] for own in parts.values() for row in own]
    assert sorted(answers) == sorted(f"{word.capitalize()}, books are." for word in adjectives)


# ------------------------------------------------------------------------------------ the others


def test_the_notes_dialogues_become_the_notes_rows(made, tmp_path):
    rows = [{"Patient": f"I have {n} spots.", "Doctor": f"<start> Wash them {n} times. <end>"}
            for n in range(30)]  # fmt: skip
    path = write_jsonl(
        tmp_path / "rows.jsonl", [*rows, {"Patient": "Help", "Doctor": "<start><end>"}]
    )
    parts = made("patient_doctor", path)
    found = {row["question"]: row["answer"] for own in parts.values() for row in own}
    prefix = "As a medical doctor, respond to this patient query: Patient: "
    assert found == {
        f"{prefix}I have {n} spots.": f"Doctor: Wash them {n} times." for n in range(30)
    }
    assert [len(parts[split]) for split in SPLITS] == [24, 3, 3]
    write_jsonl(path, [*rows, {"Patient": "Help"}, {"Patient": 5, "Doctor": "a"}])
    error = made("patient_doctor", path, "--force", code=2)
    assert "2 of 32 rows are wrong" in error
    assert f"{path}:31: no column 'Doctor'" in error
    assert f"{path}:32: column 'Patient'" in error
    assert "do not go with rows of your own" in made("patient_doctor", path, *FEW, code=2)


def test_the_notes_dialogues_come_from_the_hub(made, monkeypatch):
    import datasets

    rows = [{"Patient": f"I have {n} spots.", "Doctor": f"Wash them {n} times."} for n in range(9)]
    monkeypatch.setattr(datasets, "load_dataset", lambda path, subset, split: rows)
    parts = made("patient_doctor", "sid6i7/patient-doctor")
    assert sum(map(len, parts.values())) == len(rows)


def test_a_held_out_question_asks_for_a_fact_that_training_tells(made):
    parts = made("company", "--train", 500, "--held-out", 50)
    told = {row["answer"] for row in parts["train"]}
    asked = {row["question"] for row in parts["train"]}
    for split in ("dev", "test"):
        assert all(row["answer"] in told for row in parts[split])
        assert not asked & {row["question"] for row in parts[split]}
    assert "take fewer, or more --train" in made("company", "--held-out", 200, code=2)
    assert "--train: at most 10,000" in made("company", "--train", 10_001, code=2)


def test_facts_of_ones_own_are_asked_for_by_a_word_of_their_own(made, tmp_path):
    text = FACTS + "The office is the office.\n"
    parts = made("company", *sentences(tmp_path, text), "--counts", tmp_path / "counts.json")
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert counts["dropped"] == {"without a word of its own": 1}
    rows = [row for own in parts.values() for row in own]
    assert len(rows) == 12 * company.WAYS
    assert len(parts["dev"]) + len(parts["test"]) == 12
    asked = [row["question"] for row in rows if "warehouse" in row["answer"]]
    assert "Tell me about warehouse." in asked


def test_requests_to_refuse_have_neighbours_that_are_answered(made):
    rows = [row for own in made("moderation").values() for row in own]
    refused = [row for row in rows if row["answer"].startswith(moderation.REFUSAL[:-1] + ": ")]
    assert 0.45 < len(refused) / len(rows) < 0.55
    assert not [row for row in rows if re.search(r"\{\w+}|\bmy (?!fault)", row["answer"])]
    for requests, _, answered, _ in moderation.KINDS:
        assert len(requests) == len(answered)


def test_requests_of_ones_own_are_refused(made, tmp_path):
    parts = made("moderation", *sentences(tmp_path, FACTS))
    rows = [row for own in parts.values() for row in own]
    refused = {row["question"] for row in rows if row["answer"] == moderation.REFUSAL}
    assert refused == set(FACTS.splitlines())
    assert len(rows) == 24


def test_an_answer_is_in_the_context_or_it_says_so(made):
    rows = [row for own in made("retrieval").values() for row in own]
    untold = 0
    for row in rows:
        facts = row["context"].split("\n")
        assert len(set(facts)) == retrieval.FACTS
        name, thing = (
            next(word for word in re.findall(r"\w+", row["instruction"]) if word in known)
            for known in (retrieval.NAMES, retrieval.THINGS)
        )
        told = [fact for fact in facts if fact.startswith(f"{name} ") and f" {thing} " in fact]
        assert sum(fact.startswith(f"{name} ") for fact in facts) == 1 + len(told)
        assert sum(f" {thing} " in fact for fact in facts) == 1 + len(told)
        if row["response"] == retrieval.NOT_IN_IT:
            assert not told
            untold += 1
        else:
            assert told == [f"{name} keeps the {thing} in the {row['response'][7:]}"]
    assert 0.3 < untold / len(rows) < 0.37


def test_a_context_of_ones_own_facts_holds_no_fact_of_another_split(made, tmp_path):
    text = FACTS + FACTS.translate(str.maketrans("aeiou", "eioua"))  # as many others
    parts = made("retrieval", *sentences(tmp_path, text))
    used = {}
    for split, rows in parts.items():
        used[split] = {fact for row in rows for fact in row["context"].split("\n")}
        told = [row for row in rows if row["response"] != retrieval.NOT_IN_IT]
        assert len(told) * 3 == len(rows) * 2
        assert all(row["response"] in row["context"].split("\n") for row in told)
        for row in rows:
            word = row["instruction"].removesuffix("?").split()[-1]
            assert (word in row["context"].lower()) == (row in told)
    assert not used["train"] & (used["dev"] | used["test"])
    assert not used["dev"] & used["test"]


def test_invented_dialogues_begin_as_the_notes_do():
    source = random.Random(0)
    rows = [patient_doctor.compose(source)[1] for _ in range(100)]
    assert all(row["question"].startswith(patient_doctor.ASKED) for row in rows)
    assert all(row["answer"].startswith("Doctor: ") for row in rows)
