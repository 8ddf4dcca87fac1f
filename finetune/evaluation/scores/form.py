"""The form of an answer: its length, repetition, spelling."""

import re
from functools import cache
from typing import Any

from finetune import extras
from finetune.data import clusters
from finetune.errors import ConfigError
from finetune.evaluation.scores.base import OfAnswer, Value, of_reference
from finetune.generation.completions import Completion, Score

RUN = 4  # words; shorter runs repeat in any text
# A whole word of letters: not a part of an address, a name of a file or a contraction.
_WORD = re.compile(r"(?<![\w'\u2019.@/-])[^\W\d_]{2,}(?![\w@/-]|['\u2019.]\w)")


def num_words() -> OfAnswer:
    """Count the words of an answer."""
    line = "length of the answer in words; neither more nor less is better"
    return OfAnswer("words", line, lambda each: len(clusters.words(each.text)), None, False)


def length_ratio() -> OfAnswer:
    """Score the words of the answer for each word of the reference."""

    def of(answer: str, reference: str) -> Value:
        wanted = len(clusters.words(reference))
        return len(clusters.words(answer)) / wanted if wanted else _NO_WORDS

    line = "words of the answer for each word of the reference; 1 is as long"
    return of_reference("length ratio", line, of, None, False)


_NO_WORDS = Score(None, "the reference has no words")


def repetition() -> OfAnswer:
    """Score the share of runs of four words that the answer had before."""
    line = f"share of runs of {RUN} words that repeat earlier ones"
    return OfAnswer("repetition", line, lambda each: repeated(each.text), higher=False)


def repeated(text: str) -> float:
    """Return the share of runs of RUN words that came before; 0 for fewer words."""
    found = clusters.words(text)
    runs = [tuple(found[start : start + RUN]) for start in range(len(found) - RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def spelling(language: str = "en") -> OfAnswer:
    """Score the share of words that pyspellchecker's list of a language has."""
    known = _known(language)

    def of(completion: Completion) -> Value:
        given = set(_plain_words(completion.prompt.reference or ""))
        for message in completion.prompt.messages:
            given |= set(_plain_words(f"{message.content} {message.context}"))
        found = _plain_words(completion.text)
        if not found:
            return Score(None, "the answer has no word in lower case")
        wrong = [word for word in found if word not in given and word not in known]
        return Score(1 - len(wrong) / len(found), " ".join(dict.fromkeys(wrong))[:200])

    line = "share of words in the word list of a language; words of the prompt and names are right"
    return OfAnswer(f"spelling {language}", line, of)


def _plain_words(text: str) -> list[str]:
    """Return the words in lower case; others may be names."""
    return [word for word in _WORD.findall(text) if word == word.lower()]


@cache
def _known(language: str) -> Any:
    extras.require("pyspellchecker", "--scores spelling")
    from spellchecker import SpellChecker

    listed = sorted(SpellChecker.languages())
    if language not in listed:
        raise ConfigError(
            f"--scores spelling={language}: pyspellchecker has no words of this language; it has "
            f"{', '.join(listed)}"
        )
    return SpellChecker(language=language, distance=1)
