"""Turn the rows of all sources into samples, and report wrong rows."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from finetune import own_code
from finetune.data import asked_rows, labels, own_rows, preferences, readers
from finetune.data.column_names import (
    ASKED,
    IN_MESSAGES,
    LABELLED,
    RATED,
    described,
    taken_from,
)
from finetune.data.column_names import unread as unread_of
from finetune.data.conversations import Sample
from finetune.data.formats import detect, to_conversation
from finetune.data.own_rows import Fields, Formatted, formatted
from finetune.data.places import Row, printable, short, some
from finetune.data.problems import ENDS, Problems, Skipping
from finetune.errors import ConfigError, DataError

Records = Callable[[str, str], Iterator[Row | DataError]]
"""(source, data.text_unit) -> its rows, and a DataError in place of each wrong one."""
Shape = tuple[str, tuple[str, ...]]
"""(format of rows, names of their fields)."""
MOST_CHECKED = 10_000  # rows: reading takes 0.1 ms a row, and every start reads them again


def detect_format(
    sources: list[str],
    text_unit: str,
    columns: Mapping[str, str],
    for_training: bool = True,
    format: str = "auto",
    skips: bool = False,
) -> str:
    """Return the one format of all sources. Raise DataError if they differ: a template fits one.

    The first row of each source decides, or where wrong ones are skipped (`skips`), the first that
    fits a format. `format`: auto, or a function of the user's own, which makes the rows to read.
    """
    found: dict[str, list[str]] = {}
    for source in sources:
        first = _first_shape(source, text_unit, columns, for_training, format, skips)
        if first:
            found.setdefault(first[0], []).append(source)
    if not found:
        raise DataError(
            f"{some(sources)}: {own_rows.shown(format)} returns None for every row, so no row is "
            "left to train on"
        )
    if len(found) > 1:
        listed = "; ".join(f"{format}: {some(files)}" for format, files in found.items())
        raise DataError(
            f"the files hold rows of different formats ({listed}); convert them to one format, or "
            "list the files to read"
        )
    return next(iter(found))


def own_shape(
    sources: Sequence[str], text_unit: str, columns: Mapping[str, str], format: str, skips: bool
) -> Shape | None:
    """Return the shape of the first row that a function of the user's own makes."""
    found = (_first_shape(each, text_unit, columns, True, format, skips) for each in sources)
    return next((shape for shape in found if shape), None)


def _first_shape(
    source: str, text_unit: str, columns: Mapping[str, str], for_training: bool, format: str,
    skips: bool,
) -> Shape | None:  # fmt: skip
    """Return the shape of a source, or None if the user's own function skips all its rows."""
    problem: DataError | None = None
    for row in readers.records(source, text_unit):
        try:
            if isinstance(row, DataError):
                raise row
            if format != "auto" and readers.is_empty(row):
                continue
            if made := formatted(row, format):
                return detect(made[0][0], columns, for_training), tuple(made[1])
        except DataError as exc:
            if not skips:
                raise
            problem = problem or exc
    if problem:
        raise problem
    return None


def columns_read(source: str, text_unit: str, columns: Mapping[str, str], format: str) -> str:
    """Return which columns of a source are read, and from which names, for the summary."""
    row = next((r for r in readers.records(source, text_unit) if isinstance(r, Row)), None)
    return described(row, format, columns) if row and not own_code.is_own(format) else ""


def samples(
    sources: Sequence[str],
    format: str,
    columns: Mapping[str, str],
    text_unit: str,
    system_prompt: str | None,
    problems: Problems,
    unread: "Counter[str] | None" = None,
    for_training: bool = True,
    repair_turns: bool = False,
    records: Records = readers.records,
    unseen: set[str] | None = None,
    own_format: str = "auto",
) -> Iterator[Sample]:
    """Yield the rows of all sources as samples.

    `format` may be auto, or name a function of the user's own. Wrong rows are noted in `problems`;
    `unread` counts the rows that have a column that is not read. `for_training`: whether answers
    will be trained on; if so, a column that rates an answer makes its row wrong, as bad answers
    would be learned, too. `repair_turns`: see `to_conversation`. `records`: where the rows of a
    source come from. `own_format`: of what the user's own function makes, where it is known; else
    its first row of each source decides. Raises ConfigError if no row has a column that `columns`
    names; of a part of the rows, `unseen` takes the names of such columns.
    """
    missing = {ours: theirs for ours, theirs in columns.items() if ours not in IN_MESSAGES}

    reading = _Reading(columns, system_prompt, for_training, repair_turns, problems, unread)
    for source in sources:
        with problems.noted(ends=True):  # stop reading a broken file
            own, before = own_format if own_code.is_own(format) else format, problems.num_rows
            for row, (rows, fields) in _formatted_rows(
                records(source, text_unit), format, problems
            ):
                if own == "auto":
                    with problems.noted(row) if problems.skipping.skips else nullcontext():
                        own = detect(rows[0], columns, for_training)
                    if own == "auto":
                        continue
                for each in rows:
                    for ours in [name for name, its in missing.items() if its in each.values]:
                        del missing[ours]
                sample = None
                with problems.noted(row):
                    sample = reading.sample(row, rows, fields, own)
                if sample:
                    yield sample
            if problems.num_rows == before and unseen is None:
                raise DataError(
                    f"{printable(source)}: all its rows are empty; is it the right file?"
                )
    if unseen is not None:
        unseen.update(missing)
    elif missing and not problems:
        ours, theirs = next(iter(missing.items()))
        raise ConfigError(
            f"data.columns: {ours}: no row has a column {short(theirs)!r}; correct the name, or "
            "remove it"
        )


@dataclass(frozen=True)
class _Reading:
    """Turn rows into samples, each by these settings; see `samples`."""

    columns: Mapping[str, str]
    system_prompt: str | None
    for_training: bool
    repair_turns: bool
    problems: Problems
    unread: "Counter[str] | None"

    def sample(self, row: Row, rows: Sequence[Row], fields: Fields, format: str) -> Sample:
        """Return the sample of a row, which a user's own function may part into several."""
        if format in RATED:
            sample, read = preferences.to_sample(row, format, self.columns, self.system_prompt)
            self._count_unread(row, read)
            return sample
        if format == ASKED:
            sample, read = asked_rows.to_sample(row, self.columns, self.system_prompt)
            self._count_unread(row, read)
            return sample
        if format in LABELLED:
            sample, read = labels.to_sample(row, format, self.columns)
            self._count_unread(row, read)
            return sample
        for each in rows if self.unread is not None else ():
            self._count_unread(each, set(taken_from(each, format, self.columns).values()))
        made = tuple(
            to_conversation(
                each, format, self.columns, self.system_prompt, self.for_training, self.repair_turns
            )
            for each in rows
        )
        if self.repair_turns:  # once a row, and in the same order at each start
            repairs = dict.fromkeys((why for each in made for why in each.repairs), 1)
            self.problems.repairs.update(repairs)
        return Sample(made, fields, row)

    def _count_unread(self, row: Row, read: set[str]) -> None:
        if self.unread is None:
            return
        names_others = row.values.keys() - read
        if names_others or any(isinstance(value, list) for value in row.values.values()):
            self.unread.update(unread_of(row, read, self.columns))


def _formatted_rows(
    records: Iterator[Row | DataError], format: str, problems: Problems
) -> Iterator[tuple[Row, Formatted]]:
    """Yield the rows of a source, and formatted; note or count the others in `problems`."""
    for row in records:
        if isinstance(row, DataError):
            problems.num_rows += 1
            problems.note(str(row))
            continue
        if readers.is_empty(row):
            problems.num_empty += 1
            continue
        problems.num_rows += 1
        made = None
        with problems.noted(row):
            made = formatted(row, format)
            problems.num_skipped += made is None
        if made is not None:
            yield row, made


def check(
    groups: Sequence[Sequence[str]],
    format: str,
    columns: Mapping[str, str],
    text_unit: str,
    system_prompt: str | None,
    most: int = MOST_CHECKED,
    skipping: Skipping = ENDS,
    repair_turns: bool = False,
) -> None:
    """Raise DataError for rows that are wrong with any tokenizer, before anything is fetched.

    `groups`: the files of data.train, and those of data.eval. Reads the first `most` rows of each,
    and all of them once one is wrong; tokenising checks the rest.
    """
    problems = Problems(skipping)
    for sources in groups:
        stream = samples(
            sources, format, columns, text_unit, system_prompt, problems, repair_turns=repair_turns
        )
        for number, _ in enumerate(stream, 1):
            if number >= most and not problems.must_end:
                break
    problems.raise_if_any()
