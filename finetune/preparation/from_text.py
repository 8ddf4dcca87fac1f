"""Make rows of documents: question and answer by template, or passages of plain text.

Reads Markdown, HTML, PDF and text. By default each section becomes a row: --question asks for it
by {title} and {heading}, and its text answers. --to text makes passages for continued pre-training.
Long sections are parted between paragraphs, or sentences, at --words.
"""

import argparse
import re
from collections.abc import Iterator

from finetune.data.places import printable
from finetune.preparation import documents
from finetune.preparation import frame as frames
from finetune.preparation.documents import Document
from finetune.preparation.frame import Frame

QUESTION = "What does {title} say about {heading}?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    frames.add_documents(parser)
    frames.add_output(parser)
    add("--to", choices=("question_answer", "text"), default="question_answer", help="format")
    what = "template of a question, with {heading}, {title} or both"
    add("--question", default=QUESTION, type=_template, metavar="TEMPLATE", help=what)
    add("--words", type=frames.positive, default=300, help="words of a row, at most")
    what = "words of a row, at least; shorter sections are left out, shorter passages join the next"
    add("--least-words", type=frames.positive, default=5, help=what)


def _template(text: str) -> str:
    names = re.findall(r"\{(.*?)\}", text)
    if not names or set(names) - {"title", "heading"}:
        what = f"{text!r} should hold {{heading}}, {{title}} or both, and nothing else in braces"
        raise argparse.ArgumentTypeError(what)
    return text


def main(frame: Frame, arguments: argparse.Namespace) -> None:
    frame.sources = documents.find(arguments.documents)
    frame.unit = "documents"
    with frame.writing() as write:
        for source in frame.sources:
            document = documents.read(source)
            frame.read += 1
            for heading, text in sections(document):
                parts = list(passages(text, arguments.words))
                for number, part in enumerate(parts, 1):
                    if len(part.split()) < arguments.least_words:
                        frame.dropped["too short"] += 1
                        continue
                    row = {"text": part}
                    if arguments.to == "question_answer":
                        named = f"{heading} ({number} of {len(parts)})" if parts[1:] else heading
                        question = _asked(arguments.question, named, document.title)
                        row = {"question": question, "answer": part}
                    write({**row, "source": printable(source)}, printable(source))


def _asked(template: str, heading: str, title: str) -> str:
    values = {"{heading}": heading, "{title}": title}
    return re.sub(r"\{heading\}|\{title\}", lambda match: values[match[0]], template)


def sections(document: Document) -> Iterator[tuple[str, str]]:
    """Yield (heading, text) of each section; a section under others names them all."""
    path: list[tuple[int, str]] = []
    waiting: list[str] = []
    for block in document.blocks:
        if not block.level:
            waiting.append(block.text)
            continue
        if waiting:
            yield _named(path, document), "\n\n".join(waiting)
        waiting = []
        path = [(level, text) for level, text in path if level < block.level]
        path.append((block.level, block.text))
    if waiting:
        yield _named(path, document), "\n\n".join(waiting)


def _named(path: list[tuple[int, str]], document: Document) -> str:
    names = [text for level, text in path if not (level == 1 and text == document.title)]
    return ": ".join(names) or document.title


def passages(text: str, most: int) -> Iterator[str]:
    """Yield parts of at most `most` words: whole paragraphs, else sentences, else words."""
    waiting: list[str] = []
    count = 0
    for piece, join in _pieces(text, most):
        size = len(piece.split())
        if waiting and count + size > most:
            yield "".join(waiting).strip()
            waiting, count = [], 0
        waiting += [join if waiting else "", piece]
        count += size
    if waiting:
        yield "".join(waiting).strip()


def _pieces(text: str, most: int) -> Iterator[tuple[str, str]]:
    """Yield pieces of at most `most` words, and what joins each to the one before."""
    for paragraph in text.split("\n\n"):
        if len(paragraph.split()) <= most:
            yield paragraph, "\n\n"
            continue
        join = "\n\n"
        for sentence in re.split(r"(?<=[.!?\u3002\uff01\uff1f])\s+", paragraph):
            words = sentence.split()
            if len(words) <= most:
                yield sentence, join
            else:
                for start in range(0, len(words), most):
                    yield " ".join(words[start : start + most]), join
            join = " "
