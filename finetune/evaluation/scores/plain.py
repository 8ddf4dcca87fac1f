"""The two scores of `finetune evaluate` before it had others: strict, from 0 to 1."""


def exact_match(answer: str, wanted: str) -> float:
    """Return 1 if the answer is the wanted text, but for white space at both ends; else 0."""
    return float(answer.strip() == wanted.strip())


def word_accuracy(answer: str, wanted: str) -> float:
    """Return the share of the wanted words that stand at the same place of the answer.

    Additional words of the answer count as wrong.
    """
    given, words = answer.split(), wanted.split()
    right = sum(a == b for a, b in zip(given, words))
    return right / max(len(given), len(words), 1)


SCORES = {"exact match": exact_match, "word accuracy": word_accuracy}
