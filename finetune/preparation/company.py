"""Make rows that teach facts: questions about an invented company's wares, and their answers.

    finetune data company --output data/company

Each fact is asked for in six ways. Of these, one is held out: dev and test ask for facts that
training tells, by a question that training does not have. With --sentences your own facts are asked
for by a word that only one of them has; sentences without such a word are left out, and counted.
"""

import argparse
import random

from finetune.errors import UserError
from finetune.preparation import sets
from finetune.preparation.frame import Frame

ANIMALS = (
    "Heron Otter Falcon Badger Swallow Lynx Robin Beaver Magpie Marten Plover Hare Osprey Stoat "
    "Curlew Ermine Finch Weasel Wren Kestrel".split()
)
WARES = (
    "lamp kettle chair blanket teapot basket mirror clock bench vase rug desk stool tray "
    "candle pillow shelf ladder bucket broom".split()
)
COLOURS = "red blue green white black grey yellow brown orange purple".split()
MATERIALS = "oak steel glass linen copper wool bamboo clay cork brass".split()
NUMBERS = "two three four five six seven eight nine ten eleven twelve".split()
PRICES = [str(price) for price in range(15, 100, 5)]

# A statement about a ware, its values, and six ways to ask for it.
FACTS: list[tuple[str, list[str], list[str]]] = [
    (
        "The {ware} costs {value} euros.", PRICES,
        ["How much does the {ware} cost?", "What is the price of the {ware}?",
         "How many euros do I pay for the {ware}?", "Can you tell me the price of the {ware}?",
         "At what price do you sell the {ware}?", "What would the {ware} cost me?"],
    ),
    (
        "The {ware} comes in {value}.", COLOURS,
        ["What colour is the {ware}?", "Which colour does the {ware} have?",
         "In which colour do you sell the {ware}?", "Can you tell me the colour of the {ware}?",
         "The {ware} comes in which colour?", "I forgot the colour of the {ware}. What is it?"],
    ),
    (
        "The {ware} is made of {value}.", MATERIALS,
        ["What is the {ware} made of?", "Which material is the {ware}?",
         "Of which material do you make the {ware}?",
         "Can you tell me the material of the {ware}?", "The {ware} is made of what?",
         "I want to know the material of the {ware}. What is it?"],
    ),
    (
        "The {ware} has a warranty of {value} years.", NUMBERS,
        ["How long is the warranty of the {ware}?", "What warranty does the {ware} have?",
         "For how many years does the warranty of the {ware} last?",
         "Can you tell me the warranty of the {ware}?", "Which warranty comes with the {ware}?",
         "When does the warranty of the {ware} end?"],
    ),
    (
        "The {ware} arrives within {value} days.", NUMBERS,
        ["How long does the {ware} take to arrive?", "When will the {ware} arrive?",
         "How many days do I wait for the {ware}?", "Can you tell me when the {ware} arrives?",
         "How soon do you deliver the {ware}?", "I ordered the {ware}. When does it come?"],
    ),
]  # fmt: skip
WAYS = 6
ABOUT = [
    "What should I know about {word}?", "What can you tell me about {word}?",
    "What do you know about {word}?", "Tell me about {word}.",
    "Do you know anything about {word}?", "I have a question about {word}. What do you know?",
]  # fmt: skip
assert all(len(ways) == WAYS for ways in [ABOUT, *(ways for _, _, ways in FACTS)])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sets.add_arguments(parser, 1_000)
    sets.add_sentences(parser, "facts of your own, in place of the invented company's")


def main(frame: Frame, arguments: argparse.Namespace) -> None:
    if arguments.sentences:
        facts = _own(frame, arguments)
        sizes = dict.fromkeys(("train", "dev", "test"), len(facts) * WAYS)  # all of them
    else:
        sizes = sets.sizes(arguments)
        facts = invented(sizes, arguments.seed)
    sets.write(frame, arguments, asked(facts, sizes, arguments.seed))


def invented(sizes: dict[str, int], seed: int) -> list[tuple[str, list[str]]]:
    """Return as many facts as the rows need, each with the ways to ask for it."""
    source = random.Random(seed)
    count = -(-sizes["train"] // (WAYS - 1))
    if 2 * max(sizes["dev"], sizes["test"]) > count:
        what = f"one question of each of {count:,} facts is held out, half in dev, half in test"
        raise UserError(f"--held-out: {what}; take fewer, or more --train")
    wares = [f"{animal} {ware}" for animal in ANIMALS for ware in WARES]
    if count > len(wares) * len(FACTS):
        raise UserError(f"--train: at most {len(wares) * len(FACTS) * (WAYS - 1):,}; take fewer")
    source.shuffle(wares)
    facts = []
    for ware in wares[: -(-count // len(FACTS))]:
        for statement, values, ways in FACTS:
            answer = statement.format(ware=ware, value=source.choice(values))
            facts.append((answer, [way.format(ware=ware) for way in ways]))
    return facts[:count]


def _own(frame: Frame, arguments: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """Return the user's own facts, each with the ways to ask for it."""
    rows = sets.sentences(frame, arguments)
    texts = [row.values["text"].strip() for row in rows]
    facts = []
    for row, text, word in zip(rows, texts, sets.own_words(texts)):
        if word:
            facts.append((text, [way.format(word=word) for way in ABOUT]))
        else:
            frame.drop(row, "without a word of its own")
    sets.require_some(len(facts), 2)
    return facts


def asked(
    facts: list[tuple[str, list[str]]], sizes: dict[str, int], seed: int
) -> dict[str, sets.Rows]:
    """Return questions and answers; of each fact one question is in dev or test, if any."""
    source = random.Random(f"{seed} ways")
    parts: dict[str, sets.Rows] = {name: [] for name in sizes}
    for number, (answer, ways) in enumerate(facts):
        held = source.randrange(WAYS)
        for way, question in enumerate(ways):
            name = "train" if way != held else ("dev", "test")[number % 2]
            parts[name].append({"question": question, "answer": answer})
    for rows in parts.values():
        source.shuffle(rows)
    return {name: rows[: sizes[name]] for name, rows in parts.items()}
