"""Names and values by which rows say how good an answer is, or which turns to learn."""

import functools
import re
from typing import Any

# Words in the name of a column that rates the answer, where its values are numbers, yes or no. Left
# out are words of columns that many data sets carry along after bad answers were removed, or that
# rate something else: likes, votes, views, stars, rank, weight, quality, correctness, toxic, valid,
# flagged, best.
VERDICTS = set(
    "accepted approved bad chosen correct desirable dislike disliked downvoted fail failed "
    "feedback good grade hallucinated hallucination harmful harmless helpful helpfulness incorrect "
    "kto label labels liked margin ok pass passed preference preferred rating ratings rejected "
    "reward rewards safe score scores thumb thumbs unsafe upvoted verdict win winner won "
    "wrong".split()
)
# Words beside them that change what the name means: label_id, search_score, reward_date.
OTHER_MEANINGS = set("at count date id ids index page path position search time url zip".split())
VERDICT_VALUES = set(
    "true false t f yes no y n good bad great poor excellent terrible better worse best worst high "
    "medium low positive negative neutral desirable undesirable correct incorrect right wrong "
    "valid invalid ok pass passed fail failed accepted approved rejected chosen preferred safe "
    "unsafe toxic harmful harmless helpful unhelpful win won loss lost tie up down 👍 👎".split()
)
_NUMBER = r"[+-]?\d*[.,]?\d+(e[+-]?\d+)?"
_VERDICT_TEXT = re.compile(  # 3, 4/5, 5 stars
    rf"{_NUMBER}\s*(%|stars?|points?|(/|of|out of)\s*{_NUMBER}( stars?| points?)?)?"
)
_LETTER = re.compile(r"[a-f][+-]?")  # a grade, or which of two answers is better
LETTERS_OF = set(
    "grade preference preferred rating ratings score scores verdict win winner".split()
)
# Which of several models gave the better answer: model_a, assistant 2, gpt-4, tie (bothbad).
_MODEL = re.compile(
    r"(model|assistant|response|answer|candidate|option|system)[ _-]?([a-f]|\d+)"
    r"|tie \(.*\)|both[ _-]?(good|bad)"
    r"|(chatgpt|claude|command|deepseek|falcon|gemini|gemma|gpt|llama|mi[sx]tral|phi|qwen|vicuna)"
    r"[ _-]?\d?.*"
)
MODELS_OF = {"preferred", "verdict", "win", "winner"}
CHOSEN = frozenset({"chosen"})
# Words in the names of columns that hold the worse of two answers, whatever their values.
REJECTED = frozenset({"rejected", "reject", "loser", "worse", "dispreferred"})
# Words in the keys of messages by which other tools choose which turns are supervised.
LEARNING = set(
    "learn learnable loss mask masked supervised train trainable training weight".split()
)
# Some tools mask what is supervised, some what is not: no value surely means "supervised".
MASKS = {"mask", "masked"}


@functools.lru_cache(10_000)
def words(name: str) -> frozenset[str]:
    """Split isGood, is_good, score_2 into words; none for a name that begins with _."""
    split = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name[:200])
    return frozenset() if name.startswith("_") else frozenset(word.lower() for word in split)


@functools.lru_cache(1_000)
def preference_columns(columns: tuple[str, ...], wanted: frozenset[str]) -> list[str]:
    """Return the columns whose name holds one of the `wanted` words, exact names first."""
    found = [column for column in columns if words(column) & wanted]
    return sorted(found, key=lambda column: (column not in wanted, column))


@functools.lru_cache(1_000)
def verdict_columns(columns: tuple[str, ...]) -> list[str]:
    """Return the columns whose name holds a word of VERDICTS, as is_good, rewardScore, score_2.

    A name that begins with _ never does.
    """
    found = [column for column in columns if words(column) & VERDICTS]
    return [column for column in found if not words(column) & OTHER_MEANINGS]


def is_verdict(value: Any, column: str) -> bool:
    """Return whether a value, or all in a list or mapping, is a number, yes, no and the like."""
    leaves, inside = [], [value]
    while inside:
        value = inside.pop()
        if isinstance(value, (list, dict)):
            inside.extend(value.values() if isinstance(value, dict) else value)
        elif value is not None:
            leaves.append(value)
    return bool(leaves) and all(_is_one(leaf, column) for leaf in leaves)


def _is_one(value: Any, column: str) -> bool:
    if not isinstance(value, str):
        return isinstance(value, (bool, int, float))
    text = value.strip().lower() if len(value) <= 100 else ""
    is_letter = _LETTER.fullmatch(text) and words(column) & LETTERS_OF
    is_model = _MODEL.fullmatch(text) and words(column) & MODELS_OF
    return bool(_VERDICT_TEXT.fullmatch(text) or is_letter or is_model) or text in VERDICT_VALUES
