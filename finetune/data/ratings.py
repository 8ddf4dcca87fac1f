"""Refuse rows with a column that rates the answer, and say how to train on the good ones."""

from collections.abc import Mapping, Sequence

from finetune.data import verdicts
from finetune.data.column_names import FORMATS, PAIRS, fitting
from finetune.data.messages import role_of
from finetune.data.places import Row, list_columns, short
from finetune.errors import DataError


def require_none(row: Row, taken: Mapping[str, str]) -> None:
    """Raise DataError for a column that rates the answer: training would learn bad answers.

    `taken`: our names of the columns that are read -> the row's own.
    """
    names, read = tuple(row.values), set(taken.values())
    chosen, rejected = (
        verdicts.preference_columns(names, words) for words in (verdicts.CHOSEN, verdicts.REJECTED)
    )
    if read & set(chosen):
        return  # data.columns chooses the good answers
    for column in (*rejected, *chosen):
        if row.values[column] is not None:
            remedy = _to_train_on_chosen(row, column, taken, chosen, rejected)
            raise DataError(
                f"{row.place}: column {short(column)!r} belongs to preference rows (DPO, reward "
                "models), of which sft learns nothing; take objective.kind: dpo, or for an "
                f"objective of your own set data.format: preference; {remedy}"
            )
    for column in verdicts.verdict_columns(names):
        if column not in read and verdicts.is_verdict(row.values[column], column):
            raise DataError(
                f"{row.place}: column {column!r} ({short(row.values[column])}) says how good an "
                "answer is, but training would learn every answer as a good one: take "
                "objective.kind: kto with a column label, keep the good rows and drop the column, "
                "set data.format: unpaired for an objective of your own, or rename it to "
                f"'_{column}' if it means something else"
            )


def _to_train_on_chosen(
    row: Row, column: str, taken: Mapping[str, str], chosen: Sequence[str], rejected: Sequence[str]
) -> str:
    """Say how to train on the good answer of a preference row, by where that answer stands."""
    best = next((name for name in chosen if isinstance(row.values[name], str | list | dict)), None)
    if best is None:
        if isinstance(row.values[column], str | list | dict):
            return "to train on the other answers only, drop the column"
        return "keep the good rows and drop the column"
    aim, answer = "to train on the chosen answers only, ", row.values[best]
    drop = f"drop the columns {list_columns(sorted({*chosen, *rejected}))}"
    if isinstance(answer, list) and (not answer or role_of(answer[0]) != "assistant"):
        return f"{aim}write data.columns: {{messages: {short(best)}}}"
    for name in (taken.get("messages"), "messages", "conversations", "prompt"):
        turns = row.values.get(name) if name else None
        if isinstance(turns, list) and turns:
            if role_of(turns[-1]) == "assistant":
                return f"{aim}{drop}: {short(name)!r} has an answer of its own"
            is_text = isinstance(answer, str)
            what = short(best) + (", as a message of the assistant," if is_text else "")
            rename = ", and rename it to 'messages'" if name == "prompt" else ""
            return f"{aim}append {what} to {short(name)}{rename}; then {drop}"
    if not isinstance(answer, str):
        return f"{aim}write them as text into a column named completion; then {drop}"
    otherwise = f", or {drop}" if fitting(row, taken) not in (None, "text") else ""
    return f"{aim}write data.columns: {_mapping(row, best, taken, rejected)}{otherwise}"


def _mapping(row: Row, best: str, taken: Mapping[str, str], rejected: Sequence[str]) -> str:
    """Return data.columns for a row whose column `best` holds the text of the answer."""
    for ours, answer in (FORMATS[name] for name in PAIRS):
        theirs = taken.get(ours, ours)
        if isinstance(row.values.get(theirs), str):
            asked = "" if theirs == ours else f"{ours}: {short(theirs)}, "
            return f"{{{asked}{answer}: {short(best)}}}"
    answers = (best, *rejected)
    texts = [name for name, value in row.values.items() if isinstance(value, str)]
    others = [name for name in texts if name not in answers]
    if not others:
        return f"{{text: {short(best)}}}, which learns all of the text"
    if len(others) == 1:
        return f"{{prompt: {short(others[0])}, completion: {short(best)}}}"
    return f"{{prompt: NAME, completion: {short(best)}}}, with the NAME of the column that asks"
