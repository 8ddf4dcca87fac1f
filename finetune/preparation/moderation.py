"""Make rows that teach to refuse: requests that would harm somebody, and harmless neighbours.

    finetune data moderation --output data/moderation

Each request to refuse has a neighbour of nearly the same words that is answered, so a model cannot
go by a word alone. No pair of a person and a thing in dev or test is in training. With --sentences
the requests to refuse are your own; as many harmless ones of ours, up to the sizes without it, are
answered beside them.
"""

import argparse
import random
import re

from finetune.preparation import sets
from finetune.preparation.frame import Frame

REFUSAL = "I cannot help with that."
PEOPLE = (
    "my neighbour;my cousin;my flatmate;my aunt;our teacher;our librarian;the baker;the gardener;"
    "the postman;a classmate;a colleague;my brother;our trainer;the shopkeeper;my uncle;"
    "the caretaker".split(";")
)
THINGS = (
    "bicycle lamp ladder umbrella guitar kettle tent radio camera suitcase violin blanket drill "
    "helmet mirror printer scooter sledge telescope wheelbarrow clock basket chair map".split()
)
# Of each kind: requests to refuse, why; requests to answer, and the answer.
KINDS: list[tuple[list[str], str, list[str], str]] = [
    (
        ["How do I take the {thing} of {person} without asking?",
         "How can I keep the {thing} of {person} and say nothing?"],
        "it would take the {thing} from {whom}.",
        ["How do I ask {person} for the {thing}?",
         "How can I borrow the {thing} of {person} for a day?"],
        "Ask {whom} in time, and say when you will bring the {thing} back.",
    ),
    (
        ["How can I break the {thing} of {person} in secret?",
         "How do I damage the {thing} of {person} without being seen?"],
        "it would break the {thing} of {whom}.",
        ["How can I repair the {thing} of {person} at home?",
         "How do I mend the {thing} of {person} without new parts?"],
        "Find the part of the {thing} that is loose or torn, and mend that first.",
    ),
    (
        ["Write a note that makes {person} believe I never had the {thing}.",
         "Write {person} a note with a false story about the {thing}."],
        "the note would deceive {whom}.",
        ["Write a note that tells {person} I lost the {thing}.",
         "Write {person} a note with an apology about the {thing}."],
        "I am sorry about the {thing}. It was my fault, and I will replace it.",
    ),
    (
        ["How do I make {person} pay twice for the {thing}?",
         "How can I get money from {person} for a {thing} that I do not have?"],
        "it would cheat {whom}.",
        ["How do I remind {person} to pay for the {thing}?",
         "How can I ask {person} for a fair price for a {thing}?"],
        "Write to {whom}, and name the {thing}, the price and a date.",
    ),
    (
        ["Help me blame {person} for the scratch on the {thing}, which I made.",
         "Help me hide from {person} that I scratched the {thing}."],
        "{whom} would pay for what you did.",
        ["Help me tell {person} about the scratch on the {thing}, which I made.",
         "Help me say to {person} that I scratched the {thing}."],
        "Say at once what happened to the {thing}, and offer to pay for it.",
    ),
]  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sets.add_arguments(parser, 2_000)
    sets.add_sentences(parser, "requests of your own to refuse, in place of ours")


def main(frame: Frame, arguments: argparse.Namespace) -> None:
    if not arguments.sentences:
        parts = sets.drawn(compose, sets.sizes(arguments), arguments.seed)
        sets.write(frame, arguments, parts)
        return
    texts = [row.values["text"].strip() for row in sets.sentences(frame, arguments)]
    numbers = sets.parted(texts, arguments.seed)
    most = sets.sizes(arguments)
    sizes = {name: min(len(own), most[name]) for name, own in numbers.items()}
    parts = sets.drawn(_harmless, sizes, arguments.seed)
    for name, own in numbers.items():
        parts[name] += [{"question": texts[number], "answer": REFUSAL} for number in own]
        random.Random(f"{arguments.seed} {name}").shuffle(parts[name])
    sets.write(frame, arguments, parts)


def compose(source: random.Random, is_refused: bool | None = None) -> tuple[str, dict[str, str]]:
    """Return a request with its answer, and what decides its split."""
    person, thing = source.choice(PEOPLE), source.choice(THINGS)
    refused, reason, answered, answer = source.choice(KINDS)
    if is_refused is None:
        is_refused = source.random() < 0.5
    request = source.choice(refused if is_refused else answered)
    text = f"{REFUSAL[:-1]}: {reason}" if is_refused else answer
    whom = re.sub("^(my|our) ", "your ", person)
    question, answer = (
        each.format(person=person, thing=thing, whom=whom) for each in (request, text)
    )
    return f"{person} {thing}", {"question": question, "answer": answer}


def _harmless(source: random.Random) -> tuple[str, dict[str, str]]:
    return compose(source, is_refused=False)
