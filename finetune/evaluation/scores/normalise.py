"""Named normalisations of texts, and the words and numbers of a text, for comparing answers.

normalised("The answer: 1,000!", ("case", "punctuation", "articles", "numbers"))  # answer 1000
"""

import json
import re
import string
import unicodedata
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

# A sign counts where no word ends before it: 10-5 holds 10 and 5. Commas separate thousands only.
NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?"
    r"|(?<![\w.])[-+]?\.\d+(?:[eE][-+]?\d+)?"
)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
# Scripts without spaces between words: each character counts as a word.
_NO_SPACES = re.compile("([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff])")
_WORD = re.compile(rf"{NUMBER.pattern}|[^\W_]+")
_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
_MOST_DIGITS = 400  # of an exponent of 10; such a number is text


def number_of(text: str) -> Decimal | None:
    """Return a number of NUMBER, without separators; None if it is too large to write out."""
    try:
        value = Decimal(text.replace(",", ""))
    except InvalidOperation:
        return None
    return value if not value or abs(value.adjusted()) <= _MOST_DIGITS else None


def numbers_in(text: str) -> list[Decimal]:
    """Return the numbers of a text; the minus of typographers is one, too."""
    found = (number_of(match.group()) for match in NUMBER.finditer(text.replace("\u2212", "-")))
    return [value for value in found if value is not None]


def _case(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _punctuation(text: str) -> str:
    # A point between digits and a sign before one stay: they are parts of numbers.
    kept = re.sub(r"(?<=\d)[.](?=\d)|(?<!\w)[-](?=[.]?\d)", lambda m: "\ue000\ue001"[m[0] == "-"],
                  text)  # fmt: skip
    spaced = (" " if unicodedata.category(sign)[0] in "PS" else sign for sign in kept)
    return "".join(spaced).replace("\ue000", ".").replace("\ue001", "-")


def _articles(text: str) -> str:
    return _ARTICLES.sub(" ", text)


def _numbers(text: str) -> str:
    return NUMBER.sub(lambda match: _written(match.group()), text.replace("\u2212", "-"))


def _written(number: str) -> str:
    """Return a number as it is always written: 1,000.0 and +1e3 are 1000."""
    value = number_of(number)
    if value is None:
        return number
    return f"{value.normalize():f}" if value else "0"


NORMALISATIONS = {
    "json": "parse JSON, also inside a code fence or a sentence; order of keys and spaces are free",
    "numbers": "write numbers one way: 1,000.0 is 1000",
    "case": "ignore upper and lower case, and Unicode's variants of a letter",
    "punctuation": "ignore punctuation and symbols",
    "articles": "ignore a, an, the",
}
"""Name -> what it does, in the order in which they apply. All of them ignore extra spaces."""
_OF_TEXT = {
    "numbers": _numbers, "case": _case, "punctuation": _punctuation, "articles": _articles,
}  # fmt: skip


def normalised(text: str, names: Sequence[str]) -> str | None:
    """Apply normalisations; without any, only white space at the ends goes.

    Return None where "json" finds no JSON.
    """
    if not names:
        return text.strip()
    if "json" in names:
        found = json_in(text)
        if found is None:
            return None
        text = canonical(found[0])
    for name, function in _OF_TEXT.items():
        if name in names:
            text = function(text)
    return " ".join(text.split())


def words(text: str) -> list[str]:
    """Split a text into words without case, punctuation and articles; numbers are written one way.

    A character of a script without spaces is a word.
    """
    text = _NO_SPACES.sub(r" \1 ", _case(_numbers(text)))
    return [word for word in _WORD.findall(text) if not _ARTICLES.fullmatch(word)]


def squad_words(text: str) -> list[str]:
    """Split a text as SQuAD's evaluation does: lower case, no ASCII punctuation, no articles.

    Beyond that, a character of a script without spaces is a word.
    """
    bare = _ARTICLES.sub(" ", text.lower().translate(_ASCII_PUNCTUATION))
    return _NO_SPACES.sub(r" \1 ", bare).split()


def json_in(text: str) -> tuple[Any] | None:
    """Return the JSON value of an answer, in a tuple of one, as null is one; None without any.

    It may be the whole answer, the content of a code fence, or the first object or list in it.
    """
    fences = re.findall(r"```(?:json)?\s*\n(.*?)```", text, re.DOTALL | re.IGNORECASE)
    for each in (text, *fences):
        try:
            return (json.loads(each),)
        except (ValueError, RecursionError):
            continue
    decoder = json.JSONDecoder()
    starts = [match.start() for match in re.finditer(r"[{\[]", text)]
    for start in starts[:100]:  # a failed attempt may read to the end
        try:
            return (decoder.raw_decode(text, start)[0],)
        except (ValueError, RecursionError):
            continue
    return None


def canonical(value: Any) -> str:
    """Write a JSON value the one way that equal values share: 1.0 is 1."""
    return json.dumps(_plain(value), sort_keys=True, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
