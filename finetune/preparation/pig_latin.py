"""Make rows that teach Pig Latin: sentences of invented words, or your own, translated.

    finetune data pig_latin --output data/pig_latin

Words are split before sentences are made of them, so no word of dev or test is ever trained on: a
model that translates them has learned the rule, not the words. sentences.txt holds the sentences of
training, unlabelled. With --sentences your own sentences are translated; near-duplicates never
part, but words recur.
"""

import argparse
import random
import re
import unicodedata

from finetune.errors import UserError
from finetune.preparation import frame as frames
from finetune.preparation import sets
from finetune.preparation.frame import Frame

ONSETS = (
    "b bl br c ch cl cr d dr f fl fr g gl gr h j k l m n p ph pl pr qu r s sc sh sk sl sm sn sp "
    "spl st str sw t th tr v w y z".split()
)
CODAS = (
    "b ck d ft g l ld ll lt m mp n nd ng nk nt p r rd rk rm rn rt s sh sk sp ss st t th x".split()
)
VOWELS = "a e i o u ai ea ee oa oo ou".split()
SHARES = {"train": 0.8, "dev": 0.1, "test": 0.1}  # of the vocabulary
WORDS = 24_000
WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")  # an apostrophe is part of a word: don't


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sets.add_arguments(parser, 19_200)
    sets.add_sentences(parser, "sentences to translate, in place of invented words")
    what = f"size of the vocabulary, all splits together (default: {WORDS:,})"
    parser.add_argument("--words", type=frames.positive, metavar="N", help=what)
    what = "also a column shy, whose answer leaves words as they are that begin with a vowel; each "
    what += "sentence has one: pairs for preference tuning"
    parser.add_argument("--shy", action="store_true", help=what)


def main(frame: Frame, arguments: argparse.Namespace) -> None:
    if arguments.sentences:
        if arguments.words or arguments.shy:
            given = "--words" if arguments.words else "--shy"
            raise UserError(f"{given} does not go with --sentences, which has its own; drop it")
        texts = [row.values["text"].strip() for row in sets.sentences(frame, arguments)]
        parts = {
            name: [_row(texts[number]) for number in numbers]
            for name, numbers in sets.parted(texts, arguments.seed).items()
        }
    else:
        parts = _invented(arguments)
    text = "".join(" ".join(row["question"].split()) + "\n" for row in parts["train"])
    sets.write(frame, arguments, parts, text)


def _row(text: str) -> dict[str, str]:
    return {"question": text, "answer": pig_latin(text)}


def _invented(arguments: argparse.Namespace) -> dict[str, sets.Rows]:
    source = random.Random(arguments.seed)
    words = vocabulary(arguments.words or WORDS, source)
    source.shuffle(words)
    parts, start = {}, 0
    for name, size in sets.sizes(arguments).items():
        own = words[start : start + round(SHARES[name] * len(words))]
        start += len(own)
        if not own:
            raise UserError(f"--words: {len(words)} leave none for {name}; take at least 10")
        make = shy_row if arguments.shy else lambda own, source: _row(sentence(own, source))
        parts[name] = [make(own, source) for _ in range(size)]
    return parts


def shy_row(words: list[str], source: random.Random) -> dict[str, str]:
    """Return a row with a word that begins with a vowel, and the answer that leaves it as it is."""
    vowels = [word for word in words if word[0] in "aeiou"]
    if not vowels:
        raise UserError("--words: too few for one that begins with a vowel in each split")
    chosen = [source.choice(vowels), *source.choices(words, k=source.randint(1, 3))]
    source.shuffle(chosen)
    text = " ".join(chosen) + "."
    kept = WORD.sub(lambda m: m[0] if m[0][0] in "aeiou" else _word(m[0]), text)
    return {**_row(text), "shy": kept}


def pig_latin(text: str) -> str:
    """Translate every word of a text; keep other characters, and capitals."""
    return WORD.sub(lambda match: _word(match[0]), text)


def _word(word: str) -> str:
    """Translate one word: the consonants before the first vowel go to the end, then "ay".

    Before a vowel: "way". y is a vowel except at the start (my -> ymay, rhythm -> ythmrhay, yes ->
    esyay), and qu moves as one (queen -> eenquay). A word without any vowel has nothing to move
    before (pst -> pstay). Letters with accents count as those without.
    """
    lower = unicodedata.normalize("NFC", word).lower()
    bare = "".join(unicodedata.normalize("NFD", letter)[0] for letter in lower)
    if bare[0] in "aeiou":
        moved = lower + "way"
    else:
        match = re.match(r"y?(?:qu|[^aeiouy])*", bare)
        start = match.end() if match else 0
        moved = lower[start:] + lower[:start] + "ay"
    if len(word) > 1 and word.isupper():
        return moved.upper()
    return moved[0].upper() + moved[1:] if word[0].isupper() else moved


def vocabulary(count: int, random: random.Random) -> list[str]:
    """Make different pronounceable words of one to three syllables; 1 in 25 has only y as vowel."""
    words: set[str] = set()
    while len(words) < count:
        if random.random() < 0.04:
            onset = random.choice([onset for onset in ONSETS if onset not in ("qu", "y")])
            word = onset + "y" + random.choice(["", *CODAS])
        else:
            syllables = random.choices([1, 2, 3], weights=[4, 5, 1])[0]
            word = "".join(
                random.choice(["", *ONSETS] if i == 0 else ONSETS) + random.choice(VOWELS)
                for i in range(syllables)
            ) + random.choice(["", *CODAS])
        if 2 <= len(word) <= 8:
            words.add(word)
    return sorted(words)


def sentence(words: list[str], random: random.Random) -> str:
    chosen = random.choices(words, k=random.randint(2, 4))
    if len(chosen) > 2 and random.random() < 0.3:
        chosen[1] += ","
    return " ".join(chosen) + "."
