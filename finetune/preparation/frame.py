"""What all programs share: inputs, an output, counts, and files that are never overwritten."""

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from finetune import config, failures, files
from finetune.config import paths
from finetune.console import visible
from finetune.data import readers, source_files
from finetune.data.column_names import FORMATS
from finetune.data.places import Row, printable, short
from finetune.errors import DataError, FinetuneError, UserError
from finetune.preparation import output, workers
from finetune.preparation.output import PIPE, Write

EXAMPLES = 3  # kept of each reason for which rows are dropped
STDIN = "standard-input.jsonl"


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """Add the inputs, and how they are read."""
    what = "files, folders or globs of rows, in any type that training reads; - for rows as JSON "
    what += "lines from a pipe"
    parser.add_argument("inputs", nargs="+", metavar="INPUT", type=paths.argument, help=what)
    units = ("line", "paragraph", "file")
    what = "what a row of a text file is"
    parser.add_argument("--text-unit", choices=units, default="line", help=what)


def add_documents(parser: argparse.ArgumentParser) -> None:
    """Add inputs that are documents, not rows."""
    what = "files, folders or globs of Markdown, HTML, PDF or text"
    parser.add_argument("documents", nargs="+", metavar="INPUT", type=paths.argument, help=what)


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add the output, the counts, and whether files may be replaced."""
    add = parser.add_argument
    what = "file to write, .jsonl, .json, .csv, .tsv or .parquet; - for a pipe"
    add("--output", required=True, type=paths.argument, metavar="FILE", help=what)
    add_counts(parser)


def add_folder(parser: argparse.ArgumentParser, files: str) -> None:
    """Add an output that is a folder for these `files`, the counts, and whether to replace them."""
    add, what = parser.add_argument, f"folder to write {files} to"
    add("--output", dest="folder", required=True, type=paths.argument, metavar="FOLDER", help=what)
    add_counts(parser)


def add_counts(parser: argparse.ArgumentParser) -> None:
    """Add the counts, and whether files may be replaced."""
    add = parser.add_argument
    what = "also write what was counted to this file, as JSON"
    add("--counts", type=paths.argument, metavar="FILE", help=what)
    add("--force", action="store_true", help="replace files that exist")


def add_rejects(parser: argparse.ArgumentParser) -> None:
    what = "also write the rows that are left out to this .jsonl file, with place and reason"
    parser.add_argument("--rejects", type=paths.argument, metavar="FILE", help=what)


def add_columns(parser: argparse.ArgumentParser, what: str) -> None:
    what = (
        f"columns to {what}, as a,b (default: those that training reads, or all if it reads none)"
    )
    parser.add_argument("--columns", type=names, metavar="NAMES", help=what)


def add_format(parser: argparse.ArgumentParser, also: Sequence[str] = ()) -> None:
    """Add how columns are read, as training reads them. `also`: formats that it may have, too."""
    what = "format of the rows (default: by the columns of the first row of each file)"
    known = ["auto", *FORMATS, *also]
    parser.add_argument("--format", choices=known, default="auto", help=what)
    what = "other names of columns, as 'question: Patient, answer: Doctor'"
    parser.add_argument("--columns", type=mapping, default={}, metavar="MAP", help=what)


def add_workers(parser: argparse.ArgumentParser) -> None:
    what = "number of processes; the output is the same with any (default: the number of cores)"
    parser.add_argument("--workers", type=positive, default=workers.cores(), help=what)


def names(text: str) -> list[str]:
    """Read names between commas; a type for argparse."""
    return [name for name in text.split(",") if name]


def mapping(text: str) -> dict[str, str]:
    """Read names of columns as data.columns has them, braces or not; a type for argparse."""
    body = text.strip().removeprefix("{").removesuffix("}")
    try:
        found = config.from_yaml(f"{{{body}}}")
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        what = f"{text!r} should be as 'question: Patient, answer: Doctor'"
        raise argparse.ArgumentTypeError(what)
    return found


def positive(text: str) -> int:
    """Read a whole number of at least 1; a type for argparse."""
    if not text.isdecimal() or not text.isascii() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} should be a whole number, at least 1")
    return int(text)


def fraction(text: str) -> float:
    """Read a number above 0 and up to 1; a type for argparse."""
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) <= 1:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} should be a number above 0, up to 1")


class Frame:
    """One run of a program. A context manager: at the end it reports the counts."""

    def __init__(self, program: str, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.program = program
        self.read = 0
        """Rows read, or what else `unit` says."""
        self.unit = "rows"
        self.written = 0
        """Rows written."""
        self.dropped: Counter[str] = Counter()
        """Rows left out, by reason."""
        self.changed: Counter[str] = Counter()
        """What was changed in rows that stay, or else counted, by kind."""
        self.examples: dict[str, list[dict[str, Any]]] = {}
        self.details: dict[str, Any] = {}
        """What else a program reports, for the JSON alone."""
        self._stack = contextlib.ExitStack()
        self._reject: Write | None = None
        self._stdin = ""

    def __enter__(self) -> "Frame":
        with self._stack:
            self._check_outputs()
            inputs = getattr(self.arguments, "inputs", [])
            self.groups = [self.expanded([name], "INPUT") for name in inputs]
            """The files of each input."""
            self.sources = list(dict.fromkeys(file for group in self.groups for file in group))
            if rejects := getattr(self.arguments, "rejects", None):
                self._reject = self._stack.enter_context(output.writing(rejects))
            self._kept = self._stack.pop_all()
        return self

    def __exit__(self, kind: Any, exc: BaseException | None, trace: Any) -> None:
        if self._kept.__exit__(kind, exc, trace):
            return
        if isinstance(exc, FinetuneError) and self._stdin and self._stdin in str(exc):
            raise type(exc)(str(exc).replace(self._stdin, "standard input")) from exc
        if exc is None:
            self._report()

    # ---------------------------------------------------------------------------------- input

    def rows(
        self, sources: Iterable[str] | None = None, title: str = "reading",
        broken: Callable[[DataError], None] | None = None,
    ) -> Iterator[Row]:  # fmt: skip
        """Yield the rows of all sources, or of some, in order, without empty rows of tables.

        Counts what it reads, once: a program may read its rows twice. `broken` takes the errors of
        lines that hold no row; without it, the first raises.
        """
        count = 0
        unit = self.arguments.text_unit if "text_unit" in self.arguments else "line"
        with tqdm(desc=title, unit=" rows", disable=None, leave=False, delay=1) as bar:
            for source in self.sources if sources is None else sources:
                for row in readers.records(source, unit):
                    if isinstance(row, DataError):
                        if broken is None:
                            raise row
                        count += 1
                        broken(row)
                    elif not readers.is_empty(row):
                        count += 1
                        bar.update()
                        yield row
        if sources is None:
            self.read = count

    @property
    def columns(self) -> list[str]:
        """What --columns names."""
        return getattr(self.arguments, "columns", None) or []

    def shown(self, place: Any) -> str:
        """Return a place, or the name of a source, for reports."""
        text = printable(str(place))
        return text.replace(self._stdin, "standard input") if self._stdin else text

    def expanded(self, names: list[str], key: str) -> list[str]:
        """Return the files that an option names, as the inputs are found."""
        found: dict[str, None] = {}
        for name in names:
            if name == PIPE:
                found[self._spooled()] = None
                continue
            listed, notes = source_files.expand(name, "INPUT")
            for note in notes:
                self.note(note.replace("INPUT", key))
            found.update(dict.fromkeys(listed))
        return list(found)

    def _spooled(self) -> str:
        """Copy standard input to a file, as rows may be read twice; return its path."""
        if not self._stdin:
            folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="finetune-"))
            self._stdin = os.path.join(folder, STDIN)
            with failures.writing(Path(folder)), open(self._stdin, "wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
        return self._stdin

    # --------------------------------------------------------------------------------- output

    @contextlib.contextmanager
    def writing(self, path: str | None = None) -> Iterator[Write]:
        """Yield a function that writes rows to --output, or to another path, and counts them."""
        with output.writing(path or self.arguments.output) as put:

            def write(values: Mapping[str, Any], where: Any) -> None:
                put(values, where)
                self.written += 1

            yield write

    def drop(self, row: Row, reason: str, **more: Any) -> None:
        """Count a row that is left out, and write it to --rejects."""
        self.dropped[reason] += 1
        place = self.shown(row.place)
        kept = self.examples.setdefault(reason, [])
        if len(kept) < EXAMPLES:
            kept.append({"place": place, **more, "text": short(row.values, 200)})
        if self._reject:
            self._reject({"place": place, "reason": reason, **more, "row": row.values}, place)

    def note(self, text: str) -> None:
        tqdm.write(visible(f"note: {text}"), file=sys.stderr)

    def _check_outputs(self) -> None:
        """Raise UserError for a file that may not or cannot be written, before the work."""
        given: dict[str, str] = {}
        for option in ("output", "counts", "rejects"):
            path = getattr(self.arguments, option, None)
            if path is None or (path == PIPE and option == "output"):
                continue
            if option == "output":
                output.type_of(path)
            if option == "rejects" and not path.lower().endswith((".jsonl", ".jsonl.gz")):
                raise UserError(f"--rejects: {printable(path)}: name a file that ends in .jsonl")
            if (real := os.path.realpath(path)) in given:
                raise UserError(f"--{option} and --{given[real]} name the same file; change one")
            given[real] = option
            self.require_free(path, f"--{option}")

    def require_free(self, path: str, option: str) -> None:
        """Raise UserError for a file that exists, without --force, or that cannot be written."""
        shown = printable(path)
        if os.path.isfile(path) and not self.arguments.force:
            raise UserError(f"{option}: {shown} exists; choose another name, or add --force")
        try:
            Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
            files.require_writable(Path(path))
        except OSError as exc:
            failures.reraise(exc, f"{option}: {shown}: cannot be written now")
            why = f"cannot be written: {exc.strerror}; choose another place"
            raise UserError(f"{option}: {shown}: {why}") from exc

    # --------------------------------------------------------------------------------- counts

    def _report(self) -> None:
        """Print the counts to stderr, and write them to --counts."""
        parts = [f"{self.read:,} {self.unit} read"] * bool(self.sources)
        if self.written or not hasattr(self.arguments, "output") or self.arguments.output:
            rows = "rows " * (self.unit != "rows" or not parts)
            parts = [", ".join([*parts, f"{self.written:,} {rows}written"])]
        parts += [f"{count:,} dropped ({reason})" for reason, count in sorted(self.dropped.items())]
        parts += [f"{count:,} {what}" for what, count in sorted(self.changed.items())]
        tqdm.write(visible(f"{self.program}: " + "; ".join(parts)), file=sys.stderr)
        if not self.arguments.counts:
            return
        values = {
            "program": self.program,
            "inputs": [self.shown(source) for source in self.sources],
            "output": getattr(self.arguments, "output", getattr(self.arguments, "folder", None)),
            "read": self.read,
            "written": self.written,
            "dropped": dict(sorted(self.dropped.items())),
            "changed": dict(sorted(self.changed.items())),
            "examples": dict(sorted(self.examples.items())),
            **self.details,
        }
        path = Path(self.arguments.counts)
        with failures.writing(path):
            text = json.dumps(values, indent=1, ensure_ascii=False, default=str)
            files.write_whole(path, text + "\n", "backslashreplace")
