"""The rules of Pig Latin, and a data set whose splits share no word."""

import os
import random
import re
import subprocess
import sys

import pytest
from conftest import ROOT, read_jsonl

from finetune.__main__ import main
from finetune.data import formats
from finetune.preparation import pig_latin as script
from finetune.preparation.pig_latin import pig_latin

SIZES = ["--words", "400", "--train", "300", "--held-out", "40"]


@pytest.mark.parametrize(
    ("word", "translation"),
    [
        ("apple", "appleway"), ("I", "Iway"), ("a", "away"), ("under", "underway"),
        ("pig", "igpay"), ("latin", "atinlay"), ("string", "ingstray"), ("three", "eethray"),
        ("queen", "eenquay"), ("quick", "ickquay"), ("square", "aresquay"), ("squid", "idsquay"),
        ("qat", "atqay"), ("my", "ymay"), ("sky", "yskay"), ("rhythm", "ythmrhay"),
        ("gypsy", "ypsygay"), ("myth", "ythmay"), ("fly", "yflay"), ("yes", "esyay"),
        ("yellow", "ellowyay"), ("day", "ayday"), ("y", "yay"), ("pst", "pstay"), ("hmm", "hmmay"),
        ("b", "bay"), ("nth", "nthay"),
    ],
)  # fmt: skip
def test_a_word_is_translated_by_the_rule(word, translation):
    assert pig_latin(word) == translation


@pytest.mark.parametrize(
    ("text", "translation"),
    [
        ("Hello", "Ellohay"), ("Apple", "Appleway"), ("My", "Ymay"), ("Queen", "Eenquay"),
        ("Hello, world!", "Ellohay, orldway!"),
        ("What is it?  It is  my cat.", "Atwhay isway itway?  Itway isway  ymay atcay."),
        ("(yes) - no: 42", "(esyay) - onay: 42"),
        ("line one\nline two", "inelay oneway\ninelay otway"),
        ("Don't; it\u2019s 'mine'.", "On'tday; it\u2019sway 'inemay'."),
        ("NASA, USA, A", "ASANAY, USAWAY, Away"),
        ("café Éclair", "afécay Éclairway"),
        ("", ""), ("...", "..."), ("123", "123"),
    ],
)  # fmt: skip
def test_capitals_and_punctuation_stay_where_they_are(text, translation):
    assert pig_latin(text) == translation


def test_every_word_is_translated_to_its_own_letters_and_ay():
    for word in script.vocabulary(500, random.Random(0)):
        translated = pig_latin(word)
        assert translated.endswith("ay")
        added = "way" if word[0] in "aeiou" else "ay"
        assert sorted(translated) == sorted(word + added)


def test_the_vocabulary_has_words_of_every_rule():
    words = script.vocabulary(2000, random.Random(0))
    assert len(set(words)) == 2000
    assert all(re.fullmatch("[a-z]{2,9}", word) for word in words)
    for pattern in ("[aeiou].*", "qu.*", "[^aeiou]+", "y.*", "str.*"):
        assert sum(bool(re.fullmatch(pattern, word)) for word in words) >= 5, pattern


@pytest.fixture
def make(tmp_path):
    """Write the data set into a folder of that name."""

    def make(name: str):
        assert main(["data", "pig_latin", "--output", str(tmp_path / name), *SIZES]) == 0
        return tmp_path / name

    return make


def words_of(path) -> set[str]:
    return {
        word for row in read_jsonl(path) for word in re.findall("[a-z]+", row["question"].lower())
    }


def test_no_word_of_one_split_is_in_another(make):
    folder = make("data")
    train, dev, test = (words_of(folder / f"{split}.jsonl") for split in ("train", "dev", "test"))
    assert len(train) > 200
    assert len(dev) > 20
    assert len(test) > 20
    assert not train & dev
    assert not train & test
    assert not dev & test


def test_the_unlabelled_sentences_are_those_of_training(make):
    folder = make("data")
    sentences = (folder / "sentences.txt").read_text().splitlines()
    assert sentences == [row["question"] for row in read_jsonl(folder / "train.jsonl")]


def test_every_row_is_a_sentence_and_its_translation(make):
    folder = make("data")
    for split, count in (("train", 300), ("dev", 40), ("test", 40)):
        found = read_jsonl(folder / f"{split}.jsonl")
        assert len(found) == count
        assert all(
            row == {"question": row["question"], "answer": pig_latin(row["question"])}
            for row in found
        )
        assert all(row["question"][-1] in ".?!" for row in found)


def test_the_same_seed_writes_the_same_files(tmp_path):
    """In processes that order their sets differently."""

    def contents(name: str, hash_seed: str, *words: str) -> dict[str, bytes]:
        command = [
            sys.executable,
            str(ROOT / "data_scripts" / "pig_latin.py"),
            "--output",
            str(tmp_path / name),
            *SIZES,
        ]
        subprocess.run(
            [*command, *words],
            check=True,
            capture_output=True,
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
        )
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    first = contents("a", "1")
    assert sorted(first) == ["dev.jsonl", "sentences.txt", "test.jsonl", "train.jsonl"]
    assert contents("b", "2") == first
    assert contents("c", "1", "--seed", "1") != first


def test_files_that_hold_something_else_are_kept(tmp_path, make, capsys):
    for name, held in (("train.jsonl", '{"question": "q"}\n'), ("sentences.txt", "Mine.\n")):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).write_text(held)
        assert main(["data", "pig_latin", "--output", str(folder), *SIZES]) == 2
        assert f"{folder / name} exists; choose another name" in capsys.readouterr().err
        assert [(path.name, path.read_text()) for path in folder.iterdir()] == [(name, held)]
    times = {path: path.stat().st_mtime_ns for path in make("again").iterdir()}
    assert {path: path.stat().st_mtime_ns for path in make("again").iterdir()} == times


def test_sentences_of_ones_own_are_translated(tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text("".join(f"My cat {n} knows {word}.\n" for n, word in enumerate("abcdefghij")))
    folder = tmp_path / "out"
    arguments = ["data", "pig_latin", "--sentences", str(text), "--output", str(folder)]
    assert main(arguments) == 0
    rows = [
        row for name in ("train", "dev", "test") for row in read_jsonl(folder / f"{name}.jsonl")
    ]
    assert sorted(row["question"] for row in rows) == text.read_text().splitlines()
    assert rows[0]["answer"] == pig_latin(rows[0]["question"])
    assert main([*arguments, "--words", "20"]) == 2
    assert main(["data", "pig_latin", "--words", "3", "--output", str(tmp_path / "none")]) == 2


def test_the_rows_are_what_the_quickstart_reads(make):
    from finetune.data import readers, rows, source_files

    folder = make("data")
    assert rows.detect_format([str(folder / "train.jsonl")], "line", {}) == "question_answer"
    train, dev, _ = source_files.sources(str(folder / "train.jsonl"), str(folder / "dev.jsonl"))
    assert (
        len(
            [
                formats.to_conversation(row, "question_answer", {})
                for row in readers.read(next(iter(train)))
            ]
        )
        == 300
    )
    assert len(list(readers.read(next(iter(dev))))) == 40


def test_shy_rows_leave_words_that_begin_with_a_vowel(tmp_path):
    folder = tmp_path / "shy"
    given = ["data", "pig_latin", "--output", str(folder), "--shy", *SIZES, "--words", "2400"]
    assert main(given) == 0
    for row in read_jsonl(folder / "train.jsonl"):
        asked, right, shy = (row[name].strip(".").split() for name in ("question", "answer", "shy"))
        assert right == [pig_latin(word) for word in asked]
        kept = [word if word[0] in "aeiou" else pig_latin(word) for word in asked]
        assert shy == kept != right
