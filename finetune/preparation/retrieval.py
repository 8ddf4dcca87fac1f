"""Make rows that teach to answer from a context, and to say when it holds no answer.

    finetune data retrieval --output data/retrieval

A context has four facts. A third of the questions ask for what it does not tell, although it names
the person and the thing. No pair of a person and a thing in dev or test is in training. With
--sentences the facts are your own: a question names a word that only one of them has, and the
answer is that sentence. Sentences without such a word are left out, and counted.
"""

import argparse
import random

from finetune.preparation import sets
from finetune.preparation.frame import Frame

NOT_IN_IT = "The context does not say."
FACTS = 4  # of a context
NAMES = (
    "Mira Tomas Elena Jonas Priya Oskar Lena Amir Clara Felix Noor Hugo Ines Pavel Sofia Emil Ada "
    "Bruno Carla David".split()
)
THINGS = (
    "lamp ladder map kettle flute lantern drum basket mirror rope bell wagon hammer blanket chest "
    "spoon clock sail bottle shovel".split()
)
PLACES = "barn attic cellar garden kitchen tower stable library boat shed tent mill".split()
ABOUT = "What does the context say about {word}?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sets.add_arguments(parser, 4_000)
    sets.add_sentences(parser, "facts of your own, in place of composed ones")


def main(frame: Frame, arguments: argparse.Namespace) -> None:
    if arguments.sentences:
        parts = _own(frame, arguments)
    else:
        parts = sets.drawn(compose, sets.sizes(arguments), arguments.seed)
    sets.write(frame, arguments, parts)


def _row(question: str, facts: list[str], answer: str) -> dict[str, str]:
    return {"instruction": question, "context": "\n".join(facts), "response": answer}


def compose(source: random.Random) -> tuple[str, dict[str, str]]:
    """Return a question with its context and answer, and what decides its split."""
    name, *others = source.sample(NAMES, FACTS)
    thing, *things = source.sample(THINGS, FACTS)
    places = source.sample(PLACES, FACTS)
    asked = (name, thing, places[0])
    # One fact shares the name with what is asked, one the thing: neither word alone will do.
    facts = [(name, things[0], places[1]), (others[0], thing, places[2])]
    is_there = source.random() < 2 / 3
    rest = [(others[1], things[1], places[3])]
    facts += [asked, *rest] if is_there else [*rest, (others[2], things[2], places[0])]
    source.shuffle(facts)
    texts = [f"{owner} keeps the {what} in the {place}." for owner, what, place in facts]
    ways = [f"Where does {name} keep the {thing}?", f"Where is the {thing} of {name}?"]
    answer = f"In the {places[0]}." if is_there else NOT_IN_IT
    return f"{name} {thing}", _row(source.choice(ways), texts, answer)


def _own(frame: Frame, arguments: argparse.Namespace) -> dict[str, sets.Rows]:
    """Return questions about the user's own facts; no fact of a split is in another's contexts."""
    rows = sets.sentences(frame, arguments)
    texts = [" ".join(row.values["text"].split()) for row in rows]
    facts: dict[str, str] = {}
    for row, text, word in zip(rows, texts, sets.own_words(texts)):
        if word:
            facts[text] = ABOUT.format(word=word)
        else:
            frame.drop(row, "without a word of its own")
    known = list(facts)
    parts = {}
    for name, numbers in sets.parted(known, arguments.seed).items():
        own = [known[number] for number in numbers]
        sets.require_some(len(own), 2)
        source = random.Random(f"{arguments.seed} {name}")
        parts[name] = [
            _asked(fact, facts[fact], own, source, n < 2) for fact in own for n in range(3)
        ]
        source.shuffle(parts[name])
    return parts


def _asked(
    fact: str, question: str, own: list[str], source: random.Random, is_there: bool
) -> dict[str, str]:
    others = [text for text in own if text != fact]
    context = source.sample(others, min(FACTS - is_there, len(others)))
    context += [fact] if is_there else []
    source.shuffle(context)
    return _row(question, context, fact if is_there else NOT_IN_IT)
