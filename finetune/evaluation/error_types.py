"""Type wrong answers by rules.

An answer has every type whose rule applies, or "other". Rules are made for precision: what they
name is nearly always right, and what they are unsure of they leave to "other". They count words as
`data.clusters` does: without case and punctuation, and each character of a script without spaces.
"""

import functools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from finetune.data.clusters import words as bytes_of_words
from finetune.evaluation.results import Results
from finetune.generation.completions import Completion, Prompt

OTHER = "other"
LONGEST_PHRASE = 12  # words that may repeat
REPEATED_WORDS = 12  # words in a row that repeat, from which they are an error
FEWEST_LETTERS = 4  # of words that are compared by letters: most shorter ones are near another
# Labels of a set of classes; words of each; rows for each, on average.
MOST_LABELS, LONGEST_LABEL, ROWS_PER_LABEL = 20, 3, 4
REFUSED_WITHIN = 200  # characters
# Names of scores of entailment -> whether a value of a wrong answer means that it invents.
INVENTED: dict[str, Callable[[float], bool]] = {
    "contradiction": lambda value: value >= 0.5,
    "groundedness": lambda value: value < 0.5,
}
_REFUSAL = re.compile(
    r"\bI(?:['\u2019]m| am) (?:very |so |really )?(?:sorry|afraid)\b[^.!?\n]{0,40}?"
    r"\b(?:can(?:not|['\u2019]t| not)|unable|won['\u2019]t)\b"
    r"|\bI(?:['\u2019]m| am)? (?:can(?:not|['\u2019]t| not)|won['\u2019]t|unable to|not able to) "
    r"(?:\w+ )?"
    r"(?:help|assist|answer|provide|comply|fulfill?|do that|discuss|create|generate|give|share)\b"
    r"|\bas an? (?:AI\b|artificial intelligence|(?:large )?language model)"
    r"|\bI (?:must|have to) (?:decline|refuse)\b",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"[^.!?\u3002\uff01\uff1f\u061f\n]+[.!?\u3002\uff01\uff1f\u061f]*")
# Of digits more, as numbers may end in many zeros.
_STUTTER = re.compile(r"([^\W\d_]{1,8}?)\1{9,}|(\d{1,8}?)\2{19,}")
_NUMBER = re.compile(r"[-+]?[$€£]?\d[\d.,]*%?")


@dataclass(frozen=True)
class Case:
    """A wrong answer, and what the rules ask about it.

    known: words that are spelt right. labels: the right answers of a set that has few of them.
    differs: the model answers the same question in another way elsewhere. invents: a model of
    entailment says that the answer states what its premise does not.
    """

    prompt: Prompt
    answer: Completion
    known: frozenset[str]
    labels: frozenset[str]
    differs: bool
    invents: bool

    @property
    def text(self) -> str:
        return self.answer.text

    @property
    def reference(self) -> str:
        return self.prompt.reference or ""


@dataclass(frozen=True)
class ErrorType:
    """A name, a definition in one line, and the rule that decides."""

    name: str
    definition: str
    applies: Callable[[Case], bool]


@functools.lru_cache(4096)  # each rule asks again
def words(text: str) -> tuple[str, ...]:
    """Split a text into words without case and punctuation."""
    return tuple(word.decode("utf-8", "replace") for word in bytes_of_words(text))


def is_cut(case: Case) -> bool:
    return case.answer.is_cut


def is_empty(case: Case) -> bool:
    return case.answer.finish_reason == "failed" or not case.text.strip()


def repeats(case: Case) -> bool:
    return _repeats(case.text) and not _repeats(case.reference)


def _repeats(text: str) -> bool:
    """Return whether a phrase, a sentence or a few letters repeat without end."""
    if _STUTTER.search(text):
        return True
    found = words(text)
    for size in range(1, LONGEST_PHRASE + 1):
        run = 0  # words that equal the one `size` places before
        for one, other in zip(found, found[size:]):
            run = run + 1 if one == other else 0
            if run + size >= max(REPEATED_WORDS, 3 * size):
                return True
    sentences = Counter(words(each) for each in _SENTENCE.findall(text))
    return any(count >= 3 and len(sentence) >= 5 for sentence, count in sentences.items())


def refuses(case: Case) -> bool:
    return _refuses(case.text) and not _refuses(case.reference)


def _refuses(text: str) -> bool:
    return bool(_REFUSAL.search(text[:REFUSED_WITHIN]))


def asks(case: Case) -> bool:
    sentences = [each.strip() for each in _SENTENCE.findall(case.text) if words(each)]
    asked = bool(sentences) and all(each.endswith(("?", "\uff1f", "\u061f")) for each in sentences)
    return asked and "?" not in case.reference and not echoes(case)


def echoes(case: Case) -> bool:
    asked = words(case.prompt.question)
    return bool(asked) and words(case.text) == asked != words(case.reference)


def is_wrapped(case: Case) -> bool:
    given, right = words(case.text), words(case.reference)
    if not right or len(given) <= len(right):
        return False
    if len(right) == 1:  # a single word may stand in an answer by chance
        return given[-1] == right[0] or (right[0].isdecimal() and right[0] in given)
    size = len(right)
    return any(given[start : start + size] == right for start in range(len(given) - size + 1))


def is_too_long(case: Case) -> bool:
    given, right = len(words(case.text)), len(words(case.reference))
    return right > 0 and given >= 2 * right and given >= right + 10


def is_too_short(case: Case) -> bool:
    given, right = len(words(case.text)), len(words(case.reference))
    return 0 < given <= right / 2 and given <= right - 5


def is_misspelt(case: Case) -> bool:
    """Return whether a word is a slip of the one that should stand in its place."""
    given, right = words(case.text), words(case.reference)
    for what, i, end, j, right_end in SequenceMatcher(None, given, right, False).get_opcodes():
        if what == "replace" and end - i == right_end - j:
            for word, wanted in zip(given[i:end], right[j:right_end]):
                if word.isalpha() and word not in case.known and _is_slip(word, wanted):
                    return True
    return False


def _is_slip(word: str, wanted: str) -> bool:
    """Return whether a word is another with a slip or two; an ending more or less is none."""
    if len(wanted) < FEWEST_LETTERS or word.startswith(wanted) or wanted.startswith(word):
        return False
    most = 1 if len(wanted) < 8 else 2
    return abs(len(word) - len(wanted)) <= most and edits(word, wanted) <= most


def edits(one: str, other: str) -> int:
    """Return how many letters to insert, delete, change, or swap with the next, at least."""
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        before, last, row = row, before, [i]
        for j, wanted in enumerate(other, 1):
            best = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != wanted))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == wanted:
                best = min(best, last[j - 2] + 1)
            row.append(best)
    return row[-1]


def has_wrong_format(case: Case) -> bool:
    if case.labels and _label(case.reference) in case.labels:
        return _label(case.text) not in case.labels
    if _is_json(case.reference):
        return not _is_json(case.text)
    if _NUMBER.fullmatch(case.reference.strip()):
        return not _NUMBER.search(case.text)
    return "```" in case.reference and "```" not in case.text


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def _label(text: str) -> str:
    return " ".join(words(text))


ERROR_TYPES = (
    ErrorType("no answer", "the answer is empty, or none came", is_empty),
    ErrorType("cut", "the limit of new tokens ended the answer, not the model", is_cut),
    ErrorType(
        "repetition",
        "a phrase fills 12 words or more by repeating, or a sentence stands there three times",
        repeats,
    ),
    ErrorType("refusal", "the answer begins by declining, in English", refuses),
    ErrorType("question", "a question is answered by nothing but questions", asks),
    ErrorType("echo", "the answer is the question, word for word", echoes),
    ErrorType("extra words", "the right answer stands inside a longer one", is_wrapped),
    ErrorType("too long", "twice the words of the right answer, and at least 10 more", is_too_long),
    ErrorType(
        "too short", "half the words of the right answer, and at least 5 fewer", is_too_short
    ),
    ErrorType(
        "misspelling",
        "a word that no row has, one letter (two of eight) off the one that belongs there",
        is_misspelt,
    ),
    ErrorType(
        "wrong format",
        "the right answer is JSON, a number, code, or one of a few labels, and this is not",
        has_wrong_format,
    ),
    ErrorType(
        "inconsistency", "nearly the same question gets another answer", lambda case: case.differs
    ),
    ErrorType(
        "hallucination",
        "a model of entailment finds that it contradicts the reference, or is not in the context",
        lambda case: case.invents,
    ),
)
DEFINITIONS = {each.name: each.definition for each in ERROR_TYPES} | {
    OTHER: "wrong in a way that none of these rules knows"
}


def of_results(
    results: Results, model: str, failures: Sequence[int], trained: Iterable[str] = ()
) -> dict[int, list[str]]:
    """Return the types of each failure of a model, by the number of its row.

    trained: texts of rows that were trained on, whose words count as spelt right.
    """
    answers = results.answers[model]
    texts = [text for each in results.prompts for text in (each.question, each.reference or "")]
    known = frozenset(word for text in [*texts, *trained] for word in words(text))
    labels, differing = _labels(results.prompts), _differing(results, model)
    invented = _invented(results, model)
    found = {}
    for row in failures:
        case = Case(
            results.prompts[row], answers[row], known, labels, row in differing, row in invented
        )
        found[row] = [each.name for each in ERROR_TYPES if each.applies(case)] or [OTHER]
    return found


def _labels(prompts: Sequence[Prompt]) -> frozenset[str]:
    """Return the labels of a set of classes: few short right answers, with rows enough for each."""
    counts = Counter(_label(each.reference) for each in prompts if each.reference)
    short = all(len(label.split()) <= LONGEST_LABEL for label in counts)
    enough = counts.total() >= ROWS_PER_LABEL * len(counts) and min(counts.values(), default=0) > 1
    is_set = short and enough and 2 <= len(counts) <= MOST_LABELS
    return frozenset(counts) if is_set else frozenset()


def _differing(results: Results, model: str) -> set[int]:
    """Return the rows whose question has another answer in another row.

    Questions are the same if their words are, or if they are near-duplicates of one right answer.
    """
    groups = defaultdict(list)
    for row, prompt in enumerate(results.prompts):
        asked = tuple(word for message in prompt.messages for word in words(message.content))
        groups["asked", asked].append(row)
        if prompt.reference:
            right = words(prompt.reference)
            groups[f"cluster {results.clusters[row]}", right].append(row)
    answers, found = results.answers[model], set()
    for rows in groups.values():
        if len(rows) > 1 and len({words(answers[row].text) for row in rows}) > 1:
            found.update(rows)
    return found


def _invented(results: Results, model: str) -> set[int]:
    """Return the rows whose answer a score of entailment finds invented."""
    found = set()
    for score, by_model in results.scores.items():
        rule = next((rule for name, rule in INVENTED.items() if name in score), None)
        if rule is not None and model in by_model:
            for row, each in enumerate(by_model[model]):
                if each.value is not None and rule(each.value):
                    found.add(row)
    return found
