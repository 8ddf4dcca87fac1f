"""Make the Pig Latin data set of the quickstart: sentences of invented words, translated.

    python data_scripts/pig_latin.py --output data/pig_latin

Writes sentences.txt (unlabelled, training words only) and train, dev and test .jsonl with question
and answer. The words are split before the sentences are made, so no word of dev or test is ever
trained on: a model that translates them has learned the rule, not the words.
"""

import argparse
import json
import os
import random
import re
from pathlib import Path

ONSETS = (
    "b bl br c ch cl cr d dr f fl fr g gl gr h j k l m n p ph pl pr qu r s sc sh sk sl sm sn sp "
    "spl st str sw t th tr v w y z".split()
)
CODAS = (
    "b ck d ft g l ld ll lt m mp n nd ng nk nt p r rd rk rm rn rt s sh sk sp ss st t th x".split()
)
VOWELS = "a e i o u ai ea ee oa oo ou".split()
SPLITS = {"train": 0.8, "dev": 0.1, "test": 0.1}


def pig_latin(text: str) -> str:
    """Translate every word of a text; keep other characters, and leading capitals."""
    return re.sub(r"[A-Za-z]+", lambda match: _word(match[0]), text)


def _word(word: str) -> str:
    """Translate one word: the consonants before the first vowel go to the end, then "ay".

    Before a vowel: "way". y is a vowel except at the start (my -> ymay, rhythm -> ythmrhay, yes ->
    esyay), and qu moves as one (queen -> eenquay). A word without any vowel has nothing to move
    before (pst -> pstay).
    """
    lower = word.lower()
    if lower[0] in "aeiou":
        moved = lower + "way"
    else:
        match = re.match(r"(y?(?:qu|[^aeiouy])*)(.*)", lower)
        assert match is not None
        moved = (match[2] or "") + match[1] + "ay"
    return moved.capitalize() if word[0].isupper() else moved


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


def problem_with(folder: Path) -> str | None:
    """Return why a folder should not be written to, or None.

    It may be a file, or hold rows that this script did not make.
    """
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not above.is_dir():
        return f"{above} is a file; give a folder"
    if not os.access(above, os.W_OK | os.X_OK):
        return f"{above} cannot be written; give another folder"
    for name in ("sentences.txt", *(f"{split}.jsonl" for split in SPLITS)):
        path = folder / name
        if path.exists() and not is_ours(path):
            why = "exists, and this script did not write it"
            return f"{path} {why}; give another folder, or remove it"
    return None


def is_ours(path: Path) -> bool:
    """Return whether a file is empty, or begins as this script writes it."""
    try:
        with path.open(encoding="utf-8") as file:
            line = file.readline(1000)
        if path.suffix == ".txt":
            return not line or re.fullmatch(r"[a-z]+( [a-z]+,?)*\.\n", line) is not None
        row = json.loads(line or "{}")
        return not row or (
            row.keys() == {"question", "answer"} and row["answer"] == pig_latin(row["question"])
        )
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add, default = parser.add_argument, Path("data/pig_latin")
    add("--output", type=Path, default=default, help="folder to write to")
    add("--words", type=int, default=24_000, help="size of the vocabulary, all splits together")
    add("--train", type=int, default=19_200, help="training sentences")
    add("--held-out", type=int, default=200, help="sentences of dev, and of test")
    add("--seed", type=int, default=0)
    arguments = parser.parse_args()

    source = random.Random(arguments.seed)
    words = vocabulary(arguments.words, source)
    source.shuffle(words)
    if problem := problem_with(arguments.output):
        parser.error(f"--output: {problem}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    start = 0
    for split, part in SPLITS.items():
        own = words[start : start + round(part * len(words))]
        start += len(own)
        count = arguments.train if split == "train" else arguments.held_out
        sentences = [sentence(own, source) for _ in range(count)]
        rows = [json.dumps({"question": s, "answer": pig_latin(s)}) for s in sentences]
        (arguments.output / f"{split}.jsonl").write_text("".join(row + "\n" for row in rows))
        if split == "train":
            (arguments.output / "sentences.txt").write_text("".join(s + "\n" for s in sentences))
        print(
            f"{split:<6}{len(rows):>7,} sentences of {len(own):>6,} words, such as: {sentences[0]} "
            f" ->  {pig_latin(sentences[0])}"
        )


if __name__ == "__main__":
    main()
