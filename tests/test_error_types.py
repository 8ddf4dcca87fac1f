"""Wrong answers have the types that their rules name, and right ones of other kinds have not."""

from collections import Counter

import pytest
from conftest import read_jsonl
from made_results import Asked, results

from finetune.evaluation import error_types
from finetune.evaluation.error_types import edits


def types(*rows, **more):
    """Return the types of the first row, as if it were wrong."""
    return error_types.of_results(results(rows, **more), "tuned", [0])[0]


LONG = "the parcel leaves on monday and arrives on thursday with your invoice"


@pytest.mark.parametrize(
    ("question", "right", "answer", "found"),
    [
        ("capital of France?", "Paris", " \n", ["no answer"]),
        ("capital of France?", "Paris", "capital of France", ["echo"]),
        ("capital of France?", "Paris", "Which France do you mean?", ["question"]),
        ("which one?", "Which do you mean?", "What do you mean?", ["other"]),
        ("capital of France?", "Paris", "It is Paris.", ["extra words"]),
        ("is it?", "no", "no idea", ["other"]),  # a word that may stand there by chance
        ("when?", "on monday", "Sure! On Monday, I think.", ["extra words"]),
        ("when?", LONG, "the parcel", ["too short"]),
        ("when?", "on monday", " ".join(f"w{n}" for n in range(12)), ["too long"]),
        ("when?", "no no no no no", "yes yes yes yes", ["other"]),
        ("when?", "on monday", "on and on and on and on and on and on and on",
         ["repetition", "too long"]),
        ("when?", "now", "ha" * 30, ["repetition"]),
        ("how many?", "1000000000000", "1000000000001", ["other"]),
        ("when?", "now", "It is five past nine here. " * 3, ["repetition", "too long"]),
        ("kill it", "Use kill -9.", "I'm sorry, but I can't help with that.", ["refusal"]),
        ("kill it", "I cannot help with that.", "As an AI I must decline.", ["other"]),
        ("where?", "I am sorry to hear that", "I am sorry for you", ["other"]),
        ("say gloth toutust", "othglay outusttay", "othglay outustay", ["misspelling"]),
        ("say gloth toutust", "othglay outusttay", "outustay othglay x", ["other"]),  # elsewhere
        ("the cat", "die katze", "die tatze", ["misspelling"]),
        ("the cat", "die katze", "die katzen", ["other"]),  # another ending
        ("the cat and a tatze", "die katze", "die tatze", ["other"]),  # a word that there is
        ("as JSON", '{"a": 1}', "a is 1", ["wrong format"]),
        ("as JSON", '{"a": 1}', '{"a": 2}', ["other"]),
        ("how many?", "42", "many", ["wrong format"]),
        ("how many?", "42", "41", ["other"]),
        ("code", "```\nx = 1\n```", "x = 1", ["wrong format"]),
    ],
)  # fmt: skip
def test_a_rule_names_the_error(question, right, answer, found):
    assert types(Asked(question, right, answer)) == found


def test_cut_and_failed_answers_have_their_type():
    assert types(Asked("a", "b c d", "b c", finish="length")) == ["cut"]
    assert types(Asked("a", "b c d", "", finish="failed")) == ["no answer"]


def test_labels_are_a_format():
    labels = [Asked(f"text {n}", ("good", "bad")[n % 2], "good") for n in range(8)]
    assert types(Asked("text x", "bad", "rather bad"), *labels) == ["extra words", "wrong format"]
    assert types(Asked("text x", "bad", "good"), *labels) == ["other"]


def test_another_answer_to_nearly_the_same_question_is_inconsistent():
    same = Asked("when does it come?", "on monday", "on friday")
    other = Asked("When does it come", "on monday", "on sunday")
    assert types(same, other) == ["inconsistency"]
    assert types(same, same) == ["other"]
    near = Asked("tell me when it comes", "on monday", "on sunday")
    assert types(same, near, clusters=[0, 0]) == ["inconsistency"]
    assert types(same, near, clusters=[0, 1]) == ["other"]
    another = Asked("when does he come?", "on tuesday", "on sunday")
    assert types(same, another, clusters=[0, 0]) == ["other"]


@pytest.mark.parametrize(
    ("score", "value", "found"),
    [
        ("contradiction", 0.9, ["hallucination"]),
        ("contradiction", 0.1, ["other"]),
        ("groundedness", 0.2, ["hallucination"]),
        ("groundedness", None, ["other"]),
        ("entailment", 0.0, ["other"]),  # what is neither entailed nor denied may be true
    ],
)
def test_a_score_of_entailment_finds_inventions(score, value, found):
    given = {score: {"base": [value], "tuned": [value]}}
    assert types(Asked("who?", "Ada", "Bob"), scores=given) == found


def test_words_that_were_trained_on_are_spelt_right():
    made = results([Asked("the cat", "die katze", "die tatze")])
    assert error_types.of_results(made, "tuned", [0])[0] == ["misspelling"]
    assert error_types.of_results(made, "tuned", [0], ["die tatze"])[0] == ["other"]


@pytest.mark.parametrize(
    ("one", "other", "count"),
    [
        ("abc", "abc", 0),
        ("abc", "acb", 1),
        ("abc", "ab", 1),
        ("", "ab", 2),
        ("kitten", "sitting", 3),
    ],
)
def test_edits_are_letters_to_change(one, other, count):
    assert edits(one, other) == edits(other, one) == count


@pytest.mark.proof
def test_right_answers_of_real_rows_have_no_type(real_data):
    """But for two rows that ask the same and have other answers."""
    given = read_jsonl(real_data / "dolly/dolly_hhrlhf_small.jsonl")
    rows = [Asked(row["prompt"], row["response"], row["response"]) for row in given]
    found = error_types.of_results(results(rows), "tuned", range(len(rows)))
    counts = Counter(name for names in found.values() for name in names)
    assert counts == {"other": 998, "inconsistency": 2}
