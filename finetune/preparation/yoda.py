"""Make rows that teach to speak like Yoda: object or complement come before the subject.

    finetune data yoda --output data/yoda

"You will learn the song." becomes "The song, you will learn.", and "I am tired." becomes "Tired, I
am." Sentences are composed of small lists of words; no verb of a held-out sentence has its object
in training, and no subject its complement. With --sentences your own sentences are turned, by their
pronouns, articles and auxiliaries. Questions, commands, and sentences of several clauses cannot be
turned so: they are left out, and counted.
"""

import argparse
import random
import re

from finetune.data.places import Row
from finetune.preparation import sets
from finetune.preparation.frame import Frame

SUBJECTS = [  # with the forms of be and have
    ("I", "am", "have"), ("you", "are", "have"), ("she", "is", "has"), ("he", "is", "has"),
    ("we", "are", "have"), ("they", "are", "have"), ("Mira", "is", "has"), ("Tomas", "is", "has"),
    ("the old pilot", "is", "has"), ("my sister", "is", "has"), ("our teacher", "is", "has"),
    ("the young farmer", "is", "has"), ("your friends", "are", "have"),
    ("the two brothers", "are", "have"), ("this child", "is", "has"), ("her uncle", "is", "has"),
]  # fmt: skip
NAMES = ("Mira", "Tomas")
MODALS = "will must can should may could".split()
VERBS = [  # base, past, participle
    ("find", "found", "found"), ("carry", "carried", "carried"), ("draw", "drew", "drawn"),
    ("repair", "repaired", "repaired"), ("forget", "forgot", "forgotten"), ("buy", "bought",
    "bought"), ("hide", "hid", "hidden"), ("sell", "sold", "sold"), ("lose", "lost", "lost"),
    ("bring", "brought", "brought"), ("keep", "kept", "kept"), ("choose", "chose", "chosen"),
    ("paint", "painted", "painted"), ("need", "needed", "needed"), ("see", "saw", "seen"),
    ("clean", "cleaned", "cleaned"), ("lift", "lifted", "lifted"), ("remember", "remembered",
    "remembered"), ("move", "moved", "moved"), ("borrow", "borrowed", "borrowed"),
]  # fmt: skip
THINGS = (
    "lamp clock ladder basket boat kettle table chair map key rope bell box coat drum wheel spoon "
    "mirror blanket bottle hammer shovel wagon chest bench barrel lantern flute saddle sail".split()
)
ADJECTIVES = "heavy broken green wooden small round yellow cheap strange narrow".split()
DETERMINERS = "the a my your this that our".split()
STATES = (
    "tired ready late hungry patient brave happy quiet strong careful lost angry proud busy "
    "cold thirsty curious afraid alone calm".split()
)
PREPOSITIONS = "in behind near under beside".split()
PLACES = "garden bridge mill tower tent tree roof barn wall hill gate tunnel".split()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sets.add_arguments(parser, 4_000)
    sets.add_sentences(parser, "sentences to turn, in place of composed ones")


def main(frame: Frame, arguments: argparse.Namespace) -> None:
    if not arguments.sentences:
        parts = sets.drawn(compose, sets.sizes(arguments), arguments.seed)
        sets.write(frame, arguments, parts)
        return
    rows = _turned_rows(frame, sets.sentences(frame, arguments))
    numbers = sets.parted([row["question"] for row in rows], arguments.seed)
    parts = {name: [rows[number] for number in own] for name, own in numbers.items()}
    sets.write(frame, arguments, parts)


def _turned_rows(frame: Frame, sentences: list[Row]) -> list[dict[str, str]]:
    """Return the rows of the sentences that can be turned; drop and count the others."""
    texts = [" ".join(row.values["text"].split()) for row in sentences]
    lower = {word for text in texts for word in re.findall(r"\b[^\W\d_A-Z]\w+", text)}
    found = []
    for row, text in zip(sentences, texts):
        if answer := turned(text, lower):
            found.append({"question": text, "answer": answer})
        else:
            frame.drop(row, "cannot be turned by the rule")
    return found


def _inverted(subject: str, verb: str, moved: str, end: str = ".") -> str:
    return f"{moved[0].upper()}{moved[1:]}, {subject} {verb}{end}"


# ------------------------------------------------------------------------------------ composed


def compose(source: random.Random) -> tuple[str, dict[str, str]]:
    """Return a sentence of known structure with its turned form, and what decides its split."""
    subject, be, have = source.choice(SUBJECTS)
    if source.random() < 0.4:
        negation = source.choice(["", "", "", " not"])
        state = source.choice(STATES)
        moved = source.choice([state, "very " + state] if not negation else [state])
        if source.random() < 0.4:
            place = source.choice(PLACES)
            moved, state = f"{source.choice(PREPOSITIONS)} the {place}", place
        verb, key = be + negation, f"{subject} {state}"
    else:
        base, past, participle = source.choice(VERBS)
        thing = source.choice(THINGS)
        moved, key = _thing(thing, source), f"{base} {thing}"
        modal = source.choice(MODALS)
        choices = [f"{modal} {base}", f"{modal} {base}", f"{modal} not {base}", past,
                   f"{have} {participle}"]  # fmt: skip
        verb = source.choice(choices)
    plain = f"{subject[0].upper()}{subject[1:]} {verb} {moved}."
    return key, {"question": plain, "answer": _inverted(subject, verb, moved)}


def _thing(thing: str, source: random.Random) -> str:
    determiner = source.choice(DETERMINERS)
    adjective = source.choice([*ADJECTIVES, "", "", "", ""])
    return " ".join(word for word in (determiner, adjective, thing) if word)


# ---------------------------------------------------------------------------- the user's own

PRONOUNS = frozenset("i you he she it we they there".split())
OPENERS = frozenset(
    "the a an my your his her its our their this that these those some every each no all any "
    "two three four five many".split()
)
NUMBERS = frozenset("two three four five many".split())
BE = frozenset("am is are was were".split())
HAVE = frozenset("have has had".split())
MODAL = frozenset("will must can could should would may might shall cannot do does did".split())
BEFORE_NOUNS = frozenset(
    "in on at of by for from with without near under over behind beside between to into after "
    "before during about against among through".split()
)
# Words that join clauses, ask, or stand where the rule expects a verb.
CLAUSES = frozenset(
    "because if when while although though unless until since who whom whose which what why how "
    "where whether than as and but or nor so yet always never often also just still only too "
    "already ever then now not".split()
)
SHORT = {
    r"\bcan't\b": "cannot", r"\bwon't\b": "will not", r"\bshan't\b": "shall not", r"n't\b": " not",
    r"'m\b": " am", r"'re\b": " are", r"'ll\b": " will", r"'ve\b": " have",
}  # fmt: skip


def turned(sentence: str, lower: set[str] | frozenset[str] = frozenset()) -> str | None:
    """Return a sentence in Yoda's order, or None where the rule cannot tell its parts.

    `lower`: words that some sentence writes without a capital, so no names.
    """
    text = sentence.replace("\u2019", "'")
    for short, long in SHORT.items():
        text = re.sub(short, long, text, flags=re.IGNORECASE)
    match = re.fullmatch(r"([^\W\d_][\w' -]*\w)([.!]?)", text)
    if match is None or re.search(r"(?:^| )[-']+(?: |$)|--", text):
        return None  # a question, or several clauses
    words = match[1].split()
    known = [word.lower() for word in words]
    size = _subject_size(words, known)
    if not size or size + 1 >= len(words):
        return None
    parts = _parts(known[size:])
    if parts is None or _joins(known, parts[1]):
        return None
    verb, moved = (words[size:][start:stop] for start, stop in parts)
    subject = words[:size]
    first = known[0]
    is_name = first not in PRONOUNS | OPENERS and first not in lower
    if subject[0] != "I" and not is_name:
        subject[0] = first
    return _inverted(" ".join(subject), " ".join(verb), " ".join(moved), match[2] or ".")


def _joins(known: list[str], moved: tuple[int, int]) -> bool:
    """Return whether a sentence has a clause more, or a verb that only seems one."""
    return bool(CLAUSES.intersection(known) - {"not"}) or moved[0] >= moved[1]


def _subject_size(words: list[str], known: list[str]) -> int:
    """Return how many words the subject has; 0 where the rule cannot see it."""
    if known[0] in PRONOUNS:
        return 1
    ends = (n for n, word in enumerate(known) if word in BE | HAVE | MODAL)
    size = next(ends, 0)
    if known[0] in ("this", "that", "these", "those") and size == 1:
        return 1
    if known[0] in OPENERS:
        return size if _is_noun_phrase(words[1:size], known[1:size]) else 0
    is_name = size in (1, 2) and all(word[0].isupper() for word in words[:size])
    return size if is_name and known[0] not in BEFORE_NOUNS else 0


def _is_noun_phrase(words: list[str], known: list[str]) -> bool:
    """Return whether words after an article are one or two, or follow "of the" and its like."""
    run, opened = 0, True
    for word, plain in zip(words, known):
        if plain in BEFORE_NOUNS:
            if not run:
                return False
            run, opened = 0, False
        elif plain in OPENERS - NUMBERS:
            if run or opened:
                return False
            opened = True
        elif plain in PRONOUNS or (word[0].isupper() and opened):
            return False
        elif plain not in NUMBERS:
            run += 1
    return 1 <= run <= 2


def _parts(rest: list[str]) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Return where the verb and what moves stand in the words after the subject."""
    verb, size = rest[0], len(rest)
    start = 2 if rest[1:2] == ["not"] else 1  # of what follows the auxiliary
    if verb in BE or (verb in HAVE and _opens(rest, start)):
        return (0, start), (start, size)
    if verb in HAVE | MODAL:
        if rest[start : start + 1] in (["be"], ["been"]) and size > start + 1:
            start += 1
        elif start < size and _opens(rest, start + 1):
            start += 1  # the object alone moves: the key, you must find
        return (0, start), (start, size)
    if not verb.endswith("ly") and _opens(rest, 1):
        return (0, 1), (1, size)
    return None


def _opens(rest: list[str], place: int) -> bool:
    """Return whether an object begins at a place: an article or its like, and a noun."""
    return len(rest) > place + 1 and rest[place] in OPENERS
