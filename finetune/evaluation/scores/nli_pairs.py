"""Pairs of sentences with known labels, to see how far a model of inference is to be trusted.

Each situation has a premise, a sentence that follows, one that may be true, and one that cannot;
its variants put other names and numbers in. They are easy: a model that fails here is not one.
"""

from typing import NamedTuple

LABELS = ("entailment", "neutral", "contradiction")


class Pair(NamedTuple):
    premise: str
    hypothesis: str
    label: str


# (premise, entailed, neutral, contradicted); {a} to {d} are filled from FILLINGS.
SITUATIONS = (
    ("{a} bought {n} apples at the market on Monday.", "{a} went to the market.",
     "{a} likes apples more than pears.", "{a} bought nothing on Monday."),
    ("The museum in {c} opens at {n} o'clock and closes at six.",
     "The museum in {c} is closed at eight in the evening.",
     "The museum in {c} has a large collection of coins.", "The museum in {c} never opens."),
    ("{a} has worked as a nurse in {c} for {n} years.", "{a} has a job in {c}.",
     "{a} plans to move away from {c}.", "{a} has never worked in {c}."),
    ("All {n} students of the class passed the exam.", "No student of the class failed the exam.",
     "The exam took two hours.", "Some students of the class failed the exam."),
    ("{a} is taller than {b}.", "{b} is shorter than {a}.", "{a} is older than {b}.",
     "{b} is taller than {a}."),
    ("The train to {c} was cancelled because of snow.", "The train to {c} did not run.",
     "The passengers to {c} took a bus.", "The train to {c} ran as planned."),
    ("{a} ordered soup and {b} ordered fish.", "{b} ordered fish.", "{b} paid for both meals.",
     "{b} did not order anything."),
    ("The return of goods is free within {n} days.",
     "Sending goods back within {n} days costs nothing.", "Most customers keep their goods.",
     "Every return costs a fee."),
    ("{a} sold the house in {c} and now lives on a boat.", "{a} lives on a boat.",
     "{a} got a good price for the house.", "{a} still lives in the house in {c}."),
    ("Only {a} and {b} have a key to the office.", "{a} has a key to the office.",
     "{a} is in the office now.", "{a} has no key to the office."),
    ("The river through {c} froze last winter for {n} days.",
     "The river through {c} was frozen last winter.",
     "Children skated on the river through {c}.", "The river through {c} has never frozen."),
    ("{a} wrote {n} letters to {b}, who answered none of them.", "{b} did not answer {a}.",
     "{b} was angry with {a}.", "{b} answered every letter from {a}."),
    ("{a} has been allergic to penicillin since childhood.", "{a} has an allergy.",
     "{a} is afraid of hospitals.", "{a} has no allergies."),
    ("The old bridge in {c} is closed to cars but open to cyclists.",
     "Cyclists may use the old bridge in {c}.", "The old bridge in {c} is {n} metres long.",
     "Cars may use the old bridge in {c}."),
)  # fmt: skip
FILLINGS = (
    {"a": "Maria", "b": "Tom", "c": "Lisbon", "n": "four"},
    {"a": "Ahmed", "b": "Julia", "c": "Oslo", "n": "nine"},
    {"a": "Chen", "b": "Sofia", "c": "Toronto", "n": "seven"},
    {"a": "Ingrid", "b": "Paul", "c": "Nairobi", "n": "ten"},
    {"a": "Kofi", "b": "Elena", "c": "Kyoto", "n": "five"},
)  # fmt: skip
COUNT = 200


def pairs() -> list[Pair]:
    """Return COUNT different pairs, a third of each label."""
    made = dict.fromkeys(
        Pair(premise.format(**words), hypothesis.format(**words), label)
        for words in FILLINGS
        for premise, *hypotheses in SITUATIONS
        for hypothesis, label in zip(hypotheses, LABELS)
    )
    return list(made)[:COUNT]
