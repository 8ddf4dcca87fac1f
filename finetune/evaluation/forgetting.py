"""What tuning cost elsewhere: a fixed small suite before and after.

The parts are multiple choice made by rule, the same on every machine, of what most language models
can do: sums, copying, letters, counting on, order. Text that the user names is measured in bits per
byte, which compares models with different tokenizers. A part that the base cannot do either shows
nothing, and the table says so.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from finetune.data import readers, source_files
from finetune.data.column_names import FORMATS
from finetune.data.formats import cell
from finetune.data.places import list_columns, printable
from finetune.data.problems import Problems
from finetune.errors import DataError
from finetune.evaluation import benchmarks, continuations
from finetune.evaluation.benchmarks import Benchmark, Item
from finetune.evaluation.continuations import Continuations
from finetune.evaluation.measures import Measure

ITEMS = 200  # of a part: an interval of about +-7 points where a tenth of the answers change
SHOTS = 3  # solved examples before each question, so that no instruction has to be followed
PASSAGE = 1000  # letters of text that are measured together
LOG_2 = float(np.log(2))
WORDS = (
    "river stone window garden letter market winter candle bridge forest silver mirror basket "
    "planet thunder kitchen island button pepper shadow ladder violin harbor meadow"
).split()
ORDERS = (
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "January February March April May June July August September October November December".split(),
    "one two three four five six seven eight nine ten eleven twelve".split(),
    list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
)

Made = tuple[str, str, Sequence[str]]
"""A question up to its answer, the answer, and three wrong ones."""


# ------------------------------------------------------------------------------------ made by rule


def _sum(draw: random.Random) -> Made:
    one, other = draw.randint(2, 49), draw.randint(2, 49)
    right = one + other
    wrong = draw.sample([right + step for step in (-10, -2, -1, 1, 2, 10)], 3)
    return f"{one} + {other} =", str(right), [str(each) for each in wrong]


def _copy(draw: random.Random) -> Made:
    words = draw.sample(WORDS, 4)
    others = draw.sample([word for word in WORDS if word not in words], 3)
    place = draw.randrange(4)
    wrong = [" ".join([*words[:place], other, *words[place + 1 :]]) for other in others]
    return f"Copy: {' '.join(words)}\nAnswer:", " ".join(words), wrong


def _capitals(draw: random.Random) -> Made:
    one, two, other = draw.sample(WORDS, 3)
    text = f"{one} {two}"
    return (
        f"{text} in capital letters:",
        text.upper(),
        [text, text.title(), f"{one} {other}".upper()],
    )


def _count_on(draw: random.Random) -> Made:
    first, step = draw.randint(1, 40), draw.choice([1, 2, 5, 10])
    shown = [first + step * number for number in range(4)]
    right = first + 4 * step
    wrong = [right + step, right - step, right + 3 * step + 1]
    return f"{', '.join(map(str, shown))},", str(right), [str(each) for each in wrong]


def _next(draw: random.Random) -> Made:
    names, (word, step) = draw.choice(ORDERS), draw.choice([("After", 1), ("Before", -1)])
    one, other = draw.choice(list(zip(names, names[1:])))
    known, right = (one, other) if step > 0 else (other, one)
    wrong = draw.sample([name for name in names if name not in (known, right)], 3)
    return f"{word} {known} comes", right, wrong


PARTS: dict[str, Callable[[random.Random], Made]] = {
    "sums": _sum, "copying": _copy, "capital letters": _capitals, "counting on": _count_on,
    "order": _next,
}  # fmt: skip


def suite() -> list[Benchmark]:
    """Return the parts made by rule: ITEMS questions each, of four choices."""
    return [Benchmark(name, _items(name)) for name in PARTS]


def _items(name: str) -> list[Item]:
    draw, made = random.Random(name), dict[str, Item]()
    shots = "".join(_item(name, draw).solved + benchmarks.SHOTS for _ in range(SHOTS))
    for _ in range(50 * ITEMS):  # some parts have fewer questions than that
        item = _item(name, draw)
        made.setdefault(item.context, item)
        if len(made) == ITEMS:
            break
    return [
        Item(f"{name} {number}", item.context, item.choices, item.gold, shots)
        for number, item in enumerate(made.values(), 1)
    ]


def _item(name: str, draw: random.Random) -> Item:
    question, right, wrong = PARTS[name](draw)
    choices = [right, *wrong]
    draw.shuffle(choices)
    return Item(name, question, tuple(choices), choices.index(right))


# -------------------------------------------------------------------------------------------- text


class Passage(NamedTuple):
    """A piece of text, and the number of the row that it is from."""

    text: str
    row: int

    @property
    def num_bytes(self) -> int:
        return len(self.text.encode())


def passages(source: str, option: str = "--forgetting-file") -> list[Passage]:
    """Return the text of a file in pieces of about PASSAGE letters. Raise DataError."""
    problems, found = Problems(), list[Passage]()
    for file in source_files.expand(source, option)[0]:
        for number, record in enumerate(readers.records(file, "paragraph")):
            problems.num_rows += 1
            if isinstance(record, DataError):
                problems.note(str(record))
                continue
            with problems.noted(record):
                if FORMATS["text"][0] not in record.values:
                    raise DataError(
                        f"{record.place}: no column 'text' or 'choices'; this row has "
                        f"{list_columns(sorted(record.values))}; name a file of text or of "
                        "multiple choice"
                    )
                found += [Passage(piece, number) for piece in _pieces(cell(record, "text"))]
    problems.raise_if_any()
    if not found:
        raise DataError(f"{option}: {printable(source)} holds no text")
    return found


def _pieces(text: str) -> list[str]:
    """Cut a text between words into nearly equal pieces of at most about PASSAGE letters."""
    words, size = text.split(" "), -(-len(text) // PASSAGE)
    goal, pieces, piece, length = len(text) / size, list[str](), list[str](), 0
    for word in words:
        piece.append(word)
        length += len(word) + 1
        if length >= goal:
            pieces.append(" ".join(piece))
            piece, length = [], 0
    return [each for each in [*pieces, " ".join(piece)] if each.strip()]


def bits_per_byte(given: Sequence[Passage], scorer: Continuations, tokenizer: Any) -> list[float]:
    """Return a number for each passage, whose mean is the bits that a byte of all the text takes.

    Bits of the passage, times the number of passages, over the bytes of all: so long passages count
    for more. Text beyond what a model reads at once goes on after its last token.
    """
    requests = continuations.encode(tokenizer, [("", passage.text) for passage in given])
    most = scorer.max_length
    parts, owners = [], []
    for number, (context, ids) in enumerate(requests):
        for start in range(0, len(ids), most):
            before = context if start == 0 else ids[start - 1 : start]
            parts.append(continuations.Request(before, ids[start : start + most]))
            owners.append(number)
    sums = np.bincount(owners, [found.logprob for found in scorer(parts)], len(given))
    each_byte = len(given) / (LOG_2 * sum(passage.num_bytes for passage in given))
    return [float(-total * each_byte) for total in sums]


# ---------------------------------------------------------------------------------------- measures


def of_choices(benchmark: Benchmark, found: Mapping[str, Sequence[np.ndarray]]) -> Measure:
    """Return the share of right answers. `found`: model -> log-probabilities of the choices."""
    values = {
        model: benchmarks.accuracies(benchmark.items, each)["acc"] for model, each in found.items()
    }
    return Measure(benchmark.name, "acc", values, chance=benchmark.chance)


def of_text(name: str, given: Sequence[Passage], found: Mapping[str, Sequence[float]]) -> Measure:
    """Return the bits per byte of a text. `found`: model -> what `bits_per_byte` returns."""
    rows = [passage.row for passage in given]
    return Measure(name, "bits per byte", found, rows, is_share=False, higher=False)


def shows_nothing(measure: Measure) -> bool:
    """Return whether the first model does no better than guessing, so cannot have lost anything."""
    if measure.chance is None:
        return False
    first, chance = next(iter(measure.values)), measure.chance
    count = len(measure.values[first])
    return measure.mean(first) <= chance + 2 * (chance * (1 - chance) / count) ** 0.5


def judged(measure: Measure, model: str) -> str:
    """Return the verdict on a model; of a part that the first model only guesses, that."""
    verdict = measure.verdict(model)
    if shows_nothing(measure) and verdict != "better":
        return "shows nothing, as the first model only guesses"
    return verdict


def summary(measures: Sequence[Measure]) -> str:
    """Return in one sentence for each tuned model what it lost."""
    lines = []
    for model in measures[0].others:
        by_verdict: dict[str, list[str]] = {}
        for measure in measures:
            by_verdict.setdefault(judged(measure, model), []).append(measure.task)
        order = sorted(by_verdict, key=lambda verdict: (verdict != "worse", verdict))
        parts = [f"{verdict}: {', '.join(by_verdict[verdict])}" for verdict in order]
        lost = by_verdict.get("worse", [])
        begin = f"lost {len(lost)} of {len(measures)}" if lost else "no loss seen"
        lines.append(f"forgetting of {model}: {begin}; {'; '.join(parts)}")
    return "\n".join(lines)
