"""Compare the tuned model with that of an earlier round: fixed, not fixed, new.

Rows are the same if the model is asked the same; where a question stands twice, in their order.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from finetune import extras
from finetune.data.places import printable
from finetune.errors import UserError
from finetune.evaluation import results_file, statistics
from finetune.evaluation.results_file import (
    Decides,
    MessageFacts,
    ResultsFile,
    Round,
    RoundSlice,
    Since,
    SliceFacts,
)
from finetune.generation.completions import Scorer

Key = tuple[tuple[str, ...], int]
SINCE: dict[tuple[bool, bool], Since] = {
    (True, False): "fixed", (True, True): "not fixed", (False, True): "new",
    (False, False): "right",
}  # fmt: skip


def rule(path: Path, score: str | None, below: float | None) -> Decides:
    """Return by what the round in a results.json called an answer wrong.

    score, below: of --wrong-below, which may only say the same. Raises UserError for anything else.
    """
    decides = results_file.read(path).decides
    shown = printable(str(path))
    if decides is None:
        raise UserError(
            f"--before: {shown}: no score said there which answers are wrong; evaluate that round "
            "again with --scores where more is better"
        )
    if score not in (None, decides.score) or below not in (None, decides.below):
        now = f"{score or decides.score} below {below:g}"
        raise UserError(
            f"--before: {shown}: an answer was wrong there by {_shown(decides)}, and is here by "
            f"{now}; remove --wrong-below, or evaluate that round again with it"
        )
    return decides


def require_score(path: Path, score: str, scorers: Sequence[Scorer]) -> None:
    """Raise UserError if these scores lack the one that decided the earlier round."""
    if not any(each.name == score and each.higher for each in scorers):
        now = ", ".join(each.name for each in scorers)
        raise UserError(
            f"--before: {printable(str(path))}: an answer was wrong there by {score}, which is not "
            f"among the scores here ({now}); choose the scores of that round with --scores"
        )


def _shown(decides: Decides) -> str:
    return f"{decides.score} below {decides.below:g}"


def keys(asked: Sequence[Sequence[MessageFacts]]) -> list[Key]:
    """Return what makes each row the same in another round."""
    seen: Counter[tuple[str, ...]] = Counter()
    found = []
    for messages in asked:
        texts = tuple(f"{message.role}\n{message.content}" for message in messages)
        found.append((texts, seen[texts]))
        seen[texts] += 1
    return found


def since(
    earlier: ResultsFile, asked: Sequence[Sequence[MessageFacts]], failed: Mapping[int, bool]
) -> dict[int, Since]:
    """Return what became of each row that both rounds asked and could decide."""
    before = dict(zip(keys([row.messages for row in earlier.rows]), earlier.rows))
    found = {}
    for row, key in enumerate(keys(asked)):
        old = before.get(key)
        if old is not None and old.failed is not None and row in failed:
            found[row] = SINCE[old.failed, failed[row]]
    return found


def compared(
    path: Path, earlier: ResultsFile, became: Mapping[int, Since],
    slices: Sequence[SliceFacts], num_rows: int,
) -> Round:  # fmt: skip
    """Count what became of the rows, in all and in each slice."""
    counts = Counter(became.values())
    was_right = counts["new"] + counts["right"]
    most_broken = _most(counts["new"], was_right)
    by_slice = []
    for one in slices:
        inside = Counter(became[row] for row in one.rows if row in became)
        if inside:
            by_slice.append(RoundSlice(column=one.column, value=one.value, **_fields(inside)))
    return Round(
        file=printable(str(path)), sentence=_sentence(counts, most_broken),
        most_broken=most_broken, only_before=len(earlier.rows) - len(became),
        only_now=num_rows - len(became), slices=by_slice, **_fields(counts),
    )  # fmt: skip


def _fields(counts: Counter[Since]) -> dict[str, int]:
    return {name.replace(" ", "_"): counts[name] for name in SINCE.values()}


def _most(count: int, of: int) -> float:
    """Return the upper end of the exact 95% interval of a share (Clopper and Pearson); 1 of 0."""
    if not of:
        return 1.0
    extras.require("scipy", "evaluate")
    from scipy.stats import binomtest

    return float(binomtest(count, of).proportion_ci(statistics.CONFIDENCE).high)


def _sentence(counts: Counter[Since], most_broken: float) -> str:
    """Say in a sentence or two what became of the rows that were wrong, and of the others."""
    wrong, right = counts["fixed"] + counts["not fixed"], counts["new"] + counts["right"]
    if not wrong + right:
        return "The two rounds share no row whose answers can be decided."
    fixed = f"Of {_rows(wrong)} that {'was' if wrong == 1 else 'were'} wrong, {counts['fixed']:,} "
    fixed += f"{'is' if counts['fixed'] == 1 else 'are'} right now."
    if not wrong:
        fixed = "Every row was right before."
    if not right:
        return fixed
    broken = f"Of {_rows(right)} that {'was' if right == 1 else 'were'} right, "
    if counts["new"]:
        now = "is" if counts["new"] == 1 else "are"
        return f"{fixed} {broken}{counts['new']:,} {now} wrong now (at most {most_broken:.1%})."
    return f"{fixed} {broken}every one still is (at most {most_broken:.1%} of such rows broke)."


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"
