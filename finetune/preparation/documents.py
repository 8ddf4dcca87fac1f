"""Read documents, Markdown, HTML, PDF and text, as blocks: headings and the text below them."""

import glob
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import extras
from finetune.data import readers
from finetune.data.places import printable
from finetune.errors import DataError

HTML, PDF, MARKDOWN = (".html", ".htm", ".xhtml"), (".pdf",), (".md", ".markdown")
TYPES = (*HTML, *PDF, *MARKDOWN, ".txt")
TERM_LEVEL = 8  # of a term, a summary, a line in bold: below all headings
_HEADING = re.compile(r"(#{1,6})\s+(.*?)\s*#*$")
_BOLD = re.compile(r"(?:\*\*|__)([^*_]+)(?:\*\*|__):?$")
_FENCE = re.compile(r"\s*(```|~~~)")
_HIDDEN = ("script", "style", "template", "noscript", "nav", "header", "footer", "aside", "form")
_TEXTS = ("p", "li", "dd", "pre", "td", "th", "blockquote", "figcaption")


@dataclass(frozen=True)
class Block:
    """A heading of a level, or with level 0 a piece of text."""

    text: str
    level: int = 0
    is_term: bool = False
    """Whether a page marks it as what is explained below it: <dt>, <summary>."""


@dataclass(frozen=True)
class Document:
    """The blocks of a document, and what it calls itself."""

    source: str
    title: str
    blocks: list[Block]
    questions: list[tuple[str, str]]
    """Questions and answers that a page gives to search engines (schema.org FAQPage)."""


def find(names: list[str]) -> list[str]:
    """Return the documents that names of files, folders and globs mean, in order."""
    found: dict[str, None] = {}
    for name in names:
        whole = not os.path.exists(name) and glob.has_magic(name)
        matches = sorted(glob.glob(name, recursive=True)) if whole else [name]
        if not matches or not os.path.exists(matches[0]):
            raise readers.absent(name, "INPUT")
        for match in matches:
            inside = [match]
            if os.path.isdir(match):
                paths = sorted(path for path in Path(match).rglob("*") if path.is_file())
                inside = [str(path) for path in paths if path.suffix.lower() in TYPES]
            found.update(dict.fromkeys(inside))
    if not found:
        what = f"holds no document; types are {' '.join(TYPES)}"
        raise DataError(f"{printable(', '.join(names[:3]))} {what}")
    return list(found)


def read(path: str) -> Document:
    """Read one document. Raise DataError that names it."""
    kind = Path(path).suffix.lower()
    if kind not in TYPES:
        raise DataError(f"{printable(path)}: unknown type {kind!r}; types are {' '.join(TYPES)}")
    with readers.readable(path):
        data = Path(path).read_bytes()
    title = Path(path).stem.replace("_", " ").replace("-", " ")
    questions: list[tuple[str, str]] = []
    if kind in PDF:
        blocks = [Block(text) for text in _paragraphs(_pdf_text(path))]
    elif kind in HTML:
        named, blocks, questions = _html(data)
        title = named or title
    else:
        blocks = list(_markdown(_decoded(path, data)))
        title = next((block.text for block in blocks if block.level == 1), title)
    return Document(path, title, blocks, questions)


def _decoded(path: str, data: bytes) -> str:
    marks = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
    try:
        return data.decode(marks.get(data[:2], "utf-8-sig"))
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        what = f"byte {data[exc.start]:#04x} is not UTF-8; save the file as UTF-8"
        raise DataError(f"{printable(path)}:{line}: {what}") from exc


def _paragraphs(text: str) -> list[str]:
    found = (part.strip() for part in re.split(r"\n\s*\n", text.replace("\r\n", "\n")))
    return [part for part in found if part]


def _markdown(text: str) -> Iterator[Block]:
    """Yield the blocks of Markdown; code stays together."""
    waiting: list[str] = []
    fence = ""

    def flush() -> Iterator[Block]:
        if body := "\n".join(waiting).strip("\n").rstrip():
            yield Block(body)
        waiting.clear()

    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    for number, line in enumerate(lines):
        if mark := _FENCE.match(line):
            fence = "" if mark[1] == fence else fence or mark[1]
        is_last = number + 1 == len(lines)
        under = "" if is_last or fence else lines[number + 1].rstrip()
        if fence:
            waiting.append(line)
        elif heading := _HEADING.match(line):
            yield from flush()
            yield Block(_plain(heading[2]), len(heading[1]))
        elif line.strip() and not waiting and re.fullmatch("={3,}|-{3,}", under):
            yield Block(_plain(line), 1 if under[0] == "=" else 2)
        elif re.fullmatch("={3,}|-{3,}", line.rstrip()) and not waiting:
            continue
        elif (bold := _BOLD.match(line.strip())) and not waiting:
            yield Block(_plain(bold[1]), TERM_LEVEL)
        elif line.strip():
            waiting.append(line.rstrip())
        else:
            yield from flush()
    yield from flush()


def _plain(text: str) -> str:
    """Return a heading without emphasis and links."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"(\*\*|__|`)", "", text).strip()


def _pdf_text(path: str) -> str:
    extras.require("pypdf", printable(path))
    from pypdf import PdfReader
    from pypdf.errors import PyPdfError

    try:
        pages = [page.extract_text() for page in PdfReader(path).pages]
    except (PyPdfError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        what = f"not a whole PDF: {type(exc).__name__}: {str(exc)[:200]}"
        raise DataError(f"{printable(path)}: {what}; save it again, or leave it out") from exc
    text = "\n\n".join(pages)
    if not text.strip():
        raise DataError(f"{printable(path)}: this PDF holds images of text; recognise it first")
    return text


def _html(data: bytes) -> tuple[str, list[Block], list[tuple[str, str]]]:
    """Return (title, blocks, questions of schema.org) of a page."""
    extras.require("beautifulsoup4", "reading HTML")
    from bs4 import BeautifulSoup

    page = BeautifulSoup(data, "html.parser")
    title = _line(page.title) if page.title else ""
    questions = [
        pair
        for script in page.find_all("script", type="application/ld+json")
        for pair in _schema_questions(script.string or "")
    ]
    for tag in page.find_all(_HIDDEN):
        tag.decompose()
    blocks: list[Block] = []
    for tag in page.find_all([*_TEXTS, "h1", "h2", "h3", "h4", "h5", "h6", "dt", "summary"]):
        inner = tag.find([*_TEXTS, "h1", "h2", "h3", "h4", "h5", "h6"])
        text = tag.get_text().strip("\n") if tag.name == "pre" else _line(tag)
        if not text or (inner is not None and tag.name in _TEXTS):
            continue  # its parts follow
        if tag.name[0] == "h":
            blocks.append(Block(text, int(tag.name[1])))
        elif tag.name in ("dt", "summary"):
            blocks.append(Block(text, TERM_LEVEL, is_term=True))
        else:
            blocks.append(Block(f"- {text}" if tag.name == "li" else text))
    blocks = blocks or [Block(text) for text in _paragraphs(page.get_text())]
    return title, blocks, questions


def _line(tag: Any) -> str:
    return " ".join(tag.get_text(" ").split())


def _schema_questions(text: str) -> list[tuple[str, str]]:
    try:
        waiting = [json.loads(text)]
    except (ValueError, RecursionError):
        return []
    found = []
    while waiting:
        value = waiting.pop(0)
        if isinstance(value, list):
            waiting.extend(value)
        elif isinstance(value, dict):
            answer = value.get("acceptedAnswer")
            answer = answer[0] if isinstance(answer, list) and answer else answer
            body = answer.get("text") if isinstance(answer, dict) else None
            if isinstance(value.get("name"), str) and isinstance(body, str):
                found.append((value["name"], body))
            waiting.extend(each for each in value.values() if isinstance(each, list | dict))
    return found
