"""Write the card of a set of rows: README.md, report.html with plots, croissant.json.

It shows where the rows come from and what earlier programs dropped, lengths and what max_length
would cut, duplicates, questions with several answers, overlap with evaluation rows, personal data,
languages, diversity, and the roles of messages. With --config lengths are in tokens, as that run
would see them, with the share of supervised tokens, packing and padding. README.md begins with the
front matter of the Hub.
"""

import argparse
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from finetune import failures, files
from finetune.config import paths
from finetune.data.overlap import Overlap
from finetune.data.places import Place, counted
from finetune.errors import DataError, UserError
from finetune.preparation import card, croissant, survey, texts
from finetune.preparation import frame as frames
from finetune.preparation.card import Bars, Block, Histogram, Section, Table
from finetune.preparation.frame import Frame
from finetune.preparation.survey import Survey

NAMES = ("README.md", "report.html", "croissant.json")
SHOWN = 10  # clusters, questions, overlaps
PLOTTED = 100_000  # lengths in a plot: a sample at even distances of more
INSTALL = "was not searched for: pip install 'finetune[data]'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    frames.add_inputs(parser)
    frames.add_folder(parser, "README.md, report.html and croissant.json")
    add("--name", help="name of the set (default: that of the folder)")
    add("--source", metavar="TEXT", help="where the rows come from: a sentence, or a URL")
    add("--licence", metavar="ID", help="licence, such as apache-2.0 or cc-by-sa-4.0")
    what = "run config whose tokenizer, template and data.max_length measure the rows"
    add("--config", metavar="FILE", type=paths.argument, help=what)
    what = "evaluation rows that should not be among these; may be given several times"
    add("--against", action="append", default=None, metavar="ROWS", help=what)
    what = "files that earlier programs wrote with --counts, in order"
    add("--steps", nargs="+", default=None, type=paths.argument, metavar="FILE", help=what)
    what = "column that says where a row comes from, or true for generated ones (default: "
    what += f"{', '.join(survey.ORIGINS)}, whichever is there)"
    add("--origin", metavar="COLUMN", help=what)
    frames.add_columns(parser, "measure")
    frames.add_workers(parser)


def main(frame: Frame, arguments: argparse.Namespace) -> None:
    folder = Path(arguments.folder)
    for name in NAMES:
        frame.require_free(str(folder / name), "--output")
    steps = [_step(path) for path in arguments.steps or []]
    known, against = _against(frame, arguments.against or [])
    found = survey.of_rows(
        frame.rows(title="measuring"), frame.columns, arguments.workers, against, arguments.origin
    )
    if not len(found):
        raise DataError("all rows are empty; is it the right file?")
    if arguments.origin and arguments.origin not in found.columns:
        raise UserError(
            f"--origin: no row has a column {arguments.origin!r}; they have {sorted(found.columns)}"
        )
    report = _Report(frame, found, known)
    sections = [report.overview(arguments), *report.steps(steps), report.lengths(arguments.config)]
    sections += [
        report.duplicates(), report.several_answers(), report.overlap(against is not None),
        report.personal(), report.languages(), report.diversity(), *report.origins(),
        report.patterns(),
    ]  # fmt: skip
    sections.insert(1, Section("What to do", report.advice or ["Nothing was found to mend."]))
    _write(folder, report.described(arguments), sections)
    frame.details |= report.numbers


def _against(frame: Frame, names: list[str]) -> tuple[list[Place], Overlap | None]:
    """Index the evaluation rows."""
    if not names:
        return [], None
    rows = list(frame.rows(frame.expanded(names, "--against"), "indexing"))
    if not rows:
        raise DataError("--against: none of its rows holds text; is it the right file?")
    return [row.place for row in rows], Overlap([texts.parts_of(row.values) for row in rows])


def _step(path: str) -> dict[str, Any]:
    """Read what an earlier program counted. Raise UserError for another file."""
    values, problem = files.read_note(Path(path))
    numbers = [values.get("read"), values.get("written")]
    is_counts = isinstance(values.get("program"), str) and isinstance(values.get("dropped"), dict)
    if problem or not is_counts or not all(type(number) is int for number in numbers):
        what = problem or "was not written by --counts"
        raise UserError(f"--steps: {path} {what}; give files that programs wrote with --counts")
    return values


def _write(folder: Path, about: croissant.Described, sections: list[Section]) -> None:
    contents = {
        "README.md": croissant.front_matter(about) + card.markdown(about.name, sections),
        "report.html": card.html(about.name, sections),
        "croissant.json": croissant.croissant(about),
    }
    for name, content in contents.items():
        with failures.writing(folder / name):
            files.write_whole(folder / name, content, "backslashreplace")


class _Report:
    """The sections of the card; `advice` and `numbers` grow with each."""

    def __init__(self, frame: Frame, found: Survey, known: list[Place]) -> None:
        self._frame, self._found, self._known = frame, found, known
        self.advice: list[Block] = []
        self.numbers: dict[str, Any] = {"rows": len(found)}
        self._examples = self._excerpts()

    def described(self, arguments: argparse.Namespace) -> croissant.Described:
        found = self._found
        codes = [code for code, count in found.languages.most_common() if code != survey.UNKNOWN]
        sources = [each for each in self._frame.sources if self._frame.shown(each) == each]
        return croissant.Described(
            self._name(arguments), len(found), arguments.licence, arguments.source,
            [code for code in codes if found.languages[code] > len(found) / 100], sources,
            found.kinds,
        )  # fmt: skip

    @staticmethod
    def _name(arguments: argparse.Namespace) -> str:
        return arguments.name or os.path.basename(os.path.abspath(arguments.folder))

    def overview(self, arguments: argparse.Namespace) -> Section:
        found, blocks = self._found, list[Block]()
        blocks.append(f"{len(found):,} rows.")
        for option, what in (("source", "where the rows come from"), ("licence", "their licence")):
            given = getattr(arguments, option)
            blocks.append(f"{option.capitalize()}: {given or 'not given'}.")
            if not given:
                self.advice.append(f"Say {what}: --{option}.")
        in_file = Counter(place.source for place in found.places)
        listed = [
            (self._frame.shown(source), count, _size(source)) for source, count in in_file.items()
        ]
        blocks.append(Table(["file", "rows", "bytes"], listed))
        columns = [
            (name, count, ", ".join(sorted(found.kinds[name])))
            for name, count in found.columns.most_common(50)
        ]
        blocks.append(Table(["column", "rows", "types"], columns))
        return Section("The rows", blocks)

    def steps(self, steps: list[dict[str, Any]]) -> Iterator[Section]:
        if not steps:
            return
        rows, examples = [], []
        for step in steps:
            why = "; ".join(f"{count:,} {reason}" for reason, count in step["dropped"].items())
            rows.append((step["program"], step["read"], step["written"], why or "none"))
            for reason, kept in step.get("examples", {}).items():
                for each in kept:
                    text = survey.masked(str(each.get("text", "")))
                    examples.append((step["program"], reason, each.get("place", ""), text))
        blocks: list[Block] = [Table(["program", "read", "written", "dropped"], rows)]
        if examples:
            blocks.append(Table(["program", "reason", "row", "text"], examples))
        if steps[-1]["written"] != len(self._found):
            self.advice.append(
                f"The last of --steps wrote {steps[-1]['written']:,} rows, but these are "
                f"{len(self._found):,}: a step is missing, or is of another file."
            )
        yield Section("What earlier steps did", blocks)

    # ------------------------------------------------------------------------------ lengths

    def lengths(self, config: str | None) -> Section:
        found = self._found
        asked, answered = found.words_asked, found.words_answered
        rows = [_percentiles("words asked", asked), _percentiles("words answered", answered)]
        blocks: list[Block] = []
        self.numbers["words"] = int(asked.sum() + answered.sum())
        if config:
            from finetune.preparation import lengths

            tokens = lengths.by_config(config, self._frame.sources)
            rows.append(_percentiles("tokens of a row", tokens.lengths))
            blocks += self._in_tokens(tokens)
        else:
            blocks.append("With --config the lengths are in tokens, with what max_length cuts.")
            blocks.append(Histogram(_sample(asked + answered), "words of a row"))
        head = ["", "least", "5%", "half", "95%", "99%", "most", "sum"]
        return Section("Lengths", [Table(head, rows), *blocks])

    def _in_tokens(self, tokens: Any) -> Iterator[Block]:
        """Say what each max_length cuts, what is supervised, packed and padded."""
        advised, limits = tokens.advised(), []
        for limit in tokens.limits():
            over, lost, answers = tokens.cut(limit)
            num_packs, full = tokens.packed(limit)
            names = ["config"] * (limit == tokens.max_length) + ["advised"] * (limit == advised)
            percent = (f"{share:.2%}" for share in (lost, answers, full))
            limits.append((limit, " and ".join(names), over, *percent, num_packs))
        share = tokens.rows.num_supervised_tokens / max(1, int(tokens.lengths.sum()))
        over = tokens.cut(tokens.max_length)[0]
        self.numbers["tokens"] = {
            "sum": int(tokens.lengths.sum()), "supervised_share": share, "advised_length": advised,
            "over_max_length": over,
        }  # fmt: skip
        if over:
            self.advice.append(
                f"{counted(over, 'row')} longer than data.max_length {tokens.max_length} tokens; "
                f"with {advised} there would be {tokens.cut(advised)[0]:,}. Raise it, or set "
                "data.truncation."
            )
        marks = {"max_length": tokens.max_length, "advised": advised}
        yield Histogram(_sample(tokens.lengths), "tokens of a row", marks)
        yield (
            f"Template {tokens.template}; {share:.1%} of the tokens are supervised. The advised "
            f"max_length is the smallest multiple of 64 that keeps 99.5% of the rows whole"
            + (f", at most the model's {tokens.positions} positions." if tokens.positions else ".")
        )
        head = ["max_length", "", "rows over it", "tokens cut", "supervised tokens cut (right)"]
        yield Table([*head, "packs full", "packs"], limits)
        yield (
            f"Where attention pads, micro-batches of {tokens.micro_batch_size} hold "
            f"{tokens.padded(False):.1%} padding, with data.group_by_length "
            f"{tokens.padded(True):.1%}."
        )

    # --------------------------------------------------------------------------- what repeats

    def _excerpts(self) -> dict[int, str]:
        """Return the beginnings of the rows that the card shows, read once more."""
        found = self._found
        wanted = {int(number) for rows in found.clusters()[:SHOWN] for number in rows[:2]}
        wanted |= {number for rows in found.other_answers()[:SHOWN] for number in rows[:2]}
        wanted |= set(list(found.matches)[:SHOWN])
        rows, texts_of = enumerate(self._frame.rows(title="showing")), {}
        for number, row in rows:
            if number in wanted:
                texts_of[number] = survey.excerpt(row.values, self._frame.columns)
        return texts_of

    def _place(self, number: int) -> str:
        return self._frame.shown(self._found.places[number])

    def duplicates(self) -> Section:
        clusters, exact = self._found.clusters(), self._found.num_exact()
        near = sum(len(rows) - 1 for rows in clusters)
        self.numbers |= {
            "exact_duplicates": exact, "near_duplicates": near,
            "largest_clusters": [len(rows) for rows in clusters[:SHOWN]],
        }  # fmt: skip
        if near:
            self.advice.append(
                f"{counted(near, 'row')} the same as, or nearly the same as, a row before: "
                "finetune data dedup removes such rows."
            )
        blocks: list[Block] = [
            f"With the text of a row before: {exact:,}. With at least 80% of all runs of three "
            f"words shared with a row before: {near:,}, in {len(clusters):,} clusters."
        ]
        if clusters:
            listed = [
                (len(rows), ", ".join(map(self._place, rows[:3])), self._examples[int(rows[0])])
                for rows in clusters[:SHOWN]
            ]
            blocks.append(Table(["rows", "such as", "text"], listed))
        return Section("Duplicates", blocks)

    def several_answers(self) -> Section:
        found = self._found.other_answers()
        self.numbers["questions_with_several_answers"] = len(found)
        if found:
            self.advice.append(
                f"Questions with several answers: {len(found):,}. The model cannot learn which to "
                "give: keep one of each, unless variety is meant."
            )
        blocks: list[Block] = [f"Questions with more than one answer: {len(found):,}."]
        if found:
            listed = [
                (len(rows), ", ".join(map(self._place, rows[:3])), self._examples[rows[0]])
                for rows in sorted(found, key=len, reverse=True)[:SHOWN]
                if rows[0] in self._examples
            ]
            blocks.append(Table(["answers", "such as", "text"], listed))
        return Section("The same question with other answers", blocks)

    def overlap(self, is_known: bool) -> Section:
        title, matches = "Overlap with evaluation rows", self._found.matches
        if not is_known:
            self.advice.append(
                "Name the evaluation rows that should not be among these: --against."
            )
            return Section(title, ["Not compared: no --against was given."])
        self.numbers["overlaps"] = dict(Counter(match.rule for match in matches.values()))
        blocks: list[Block] = [
            f"{len(matches):,} of {len(self._found):,} rows overlap with one of the "
            f"{len(self._known):,} evaluation rows."
        ]
        if matches:
            self.advice.append(
                f"{counted(len(matches), 'row')} too much like evaluation rows: finetune data "
                "decontaminate removes such rows."
            )
            blocks.append(Table(["rule", "rows"], list(self.numbers["overlaps"].items())))
            listed = [
                (self._place(row), self._frame.shown(self._known[match.row]), match.rule,
                 survey.masked(match.shared))
                for row, match in list(matches.items())[:SHOWN]
            ]  # fmt: skip
            blocks.append(Table(["row", "evaluation row", "rule", "shared words"], listed))
        return Section(title, blocks)

    # ----------------------------------------------------------------------- what they are like

    def personal(self) -> Section:
        title, found = "Personal data", self._found.personal
        if not survey.personal_searched():
            return Section(title, [f"Personal data {INSTALL}."])
        self.numbers["personal"] = {kind: len(rows) for kind, rows in sorted(found.items())}
        if not found:
            return Section(title, ["E-mail addresses, phone, card and bank numbers, public IP "
                                   "addresses and keys: none found."])  # fmt: skip
        self.advice.append(
            f"Personal data stands in {len({n for rows in found.values() for n in rows}):,} of the "
            "rows: finetune data scrub puts placeholders in its place."
        )
        listed = [
            (kind, len(rows), ", ".join(map(self._place, rows[:5])))
            for kind, rows in sorted(found.items())
        ]
        what = "The values are not shown. Names and postal addresses are not searched for."
        return Section(title, [Table(["kind", "rows", "such as"], listed), what])

    def languages(self) -> Section:
        title, counts = "Languages", self._found.languages
        if not survey.language_searched():
            return Section(title, [f"The language {INSTALL}."])
        listed = counts.most_common(20)
        self.numbers["languages"] = dict(listed)
        rows = [(code, count, f"{count / len(self._found):.1%}") for code, count in listed]
        return Section(title, [Table(["language", "rows", "share"], rows),
                               Bars(dict(listed), "rows by language")])  # fmt: skip

    def diversity(self) -> Section:
        values = [(n, self._found.distinct(n)) for n in (1, 2, 3)]
        self.numbers["distinct"] = {str(n): value for n, value in values}
        rows = [(n, "-" if value is None else round(value, 4)) for n, value in values]
        what = "The share of different ones among all runs of n words of the answers"
        if len(self._found.answers) < len(self._found):
            what += f", in the first {len(self._found.answers):,} rows"
        return Section("Diversity", [f"{what}.", Table(["n", "distinct-n"], rows)])

    def origins(self) -> Iterator[Section]:
        """Compare real rows with generated ones, if a column says which are which."""
        found = self._found
        if set(found.origins) == {survey.NOT_SAID}:
            return
        rows = []
        repeated = found.labels != np.arange(len(found))
        for origin, count in Counter(found.origins).most_common(SHOWN):
            own = np.flatnonzero(np.array(found.origins) == origin)
            distinct = found.distinct(2, own.tolist())
            median = float(np.median(found.words_answered[own]))
            rows.append((origin, count, f"{count / len(found):.1%}", median,
                         "-" if distinct is None else round(distinct, 4),
                         int(repeated[own].sum())))  # fmt: skip
        self.numbers["origins"] = {row[0]: row[1] for row in rows}
        head = ["origin", "rows", "share", "words of an answer (half)", "distinct-2", "duplicates"]
        yield Section("Where rows come from", [Table(head, rows)])

    def patterns(self) -> Section:
        counts = self._found.patterns.most_common(SHOWN)
        rows = [(pattern, count, f"{count / len(self._found):.1%}") for pattern, count in counts]
        self.numbers["patterns"] = dict(counts)
        return Section("Roles and turns", [Table(["roles, or columns", "rows", "share"], rows)])


def _size(source: str) -> int | str:
    return os.path.getsize(source) if os.path.isfile(source) else "-"


def _percentiles(name: str, values: np.ndarray) -> tuple[object, ...]:
    found = np.quantile(values, [0, 0.05, 0.5, 0.95, 0.99, 1], method="nearest").tolist()
    return name, *map(int, found), int(values.sum())


def _sample(values: Iterable[int]) -> list[int]:
    """Return at most PLOTTED values, at even distances."""
    listed = [int(value) for value in values]
    return listed[:: -(-len(listed) // PLOTTED)]
