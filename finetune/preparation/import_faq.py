"""Read questions and answers from FAQ pages: HTML, Markdown, PDF and text.

Takes what a page gives to search engines (schema.org FAQPage); else terms with their descriptions
(<dl>, <details>), headings and lines in bold that end with a question mark, with all text up to the
next heading, and text marked by Q: and A:.
"""

import argparse
import re
from collections.abc import Iterator

from finetune.data.places import printable
from finetune.preparation import documents
from finetune.preparation import frame as frames
from finetune.preparation.clean import clean
from finetune.preparation.documents import Document
from finetune.preparation.frame import Frame

_QUESTION = re.compile(r"(?:\*\*)?(?:Q|Question)(?:\s?\d+)?\s?[:.)](?:\*\*)?\s*", re.IGNORECASE)
_ANSWER = re.compile(r"(?:\*\*)?(?:A|Answer)(?:\s?\d+)?\s?[:.)](?:\*\*)?\s*", re.IGNORECASE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    frames.add_documents(parser)
    frames.add_output(parser)
    what = "take every heading as a question, also those without a question mark"
    parser.add_argument("--headings", action="store_true", help=what)


def main(frame: Frame, arguments: argparse.Namespace) -> None:
    frame.sources = documents.find(arguments.documents)
    with frame.writing() as write:
        for source in frame.sources:
            document = documents.read(source)
            before = frame.written
            for question, answer in questions(document, arguments.headings):
                if not answer.strip():
                    frame.dropped["question without an answer"] += 1
                    continue
                row = {"question": question, "answer": answer, "source": printable(source)}
                write(row, printable(source))
            if frame.written == before:
                frame.note(f"{printable(source)}: no questions found; --headings takes headings")
            frame.read += 1
    frame.unit = "documents"


def questions(document: Document, all_headings: bool = False) -> Iterator[tuple[str, str]]:
    """Yield the questions of a document with their answers, which may be empty."""
    if document.questions:
        for pair in document.questions:
            asked, answered = (clean(text, markup=True).strip() for text in pair)
            yield asked, answered
        return
    question, level = "", 0
    answer: list[str] = []
    for block in document.blocks:
        for text, is_question, is_answer in _pieces(block.text, block.level):
            asks = is_question or block.is_term
            asks = asks or (block.level > 0 and (all_headings or text.rstrip().endswith("?")))
            if asks or (block.level and block.level <= level):
                if question:
                    yield question, "\n\n".join(answer)
                question, level, answer = (text if asks else ""), block.level, []
            elif question and (text or is_answer):
                answer.append(text)
    if question:
        yield question, "\n\n".join(answer)


def _pieces(text: str, level: int) -> Iterator[tuple[str, bool, bool]]:
    """Yield (text, whether Q: marks it, whether A: does) of a block."""
    if level:
        mark = _QUESTION.match(text)
        yield (text[mark.end() :] if mark else text), bool(mark), False
        return
    if "```" in text or "~~~" in text:  # code
        yield text, False, False
        return
    piece, is_question, is_answer = list[str](), False, False
    for line in text.split("\n"):
        asks, answers = _QUESTION.match(line), _ANSWER.match(line)
        if asks or answers:
            if piece or is_question or is_answer:
                yield "\n".join(piece).strip(), is_question, is_answer
            mark = asks or answers
            assert mark is not None
            piece, is_question, is_answer = [line[mark.end() :]], bool(asks), bool(answers)
        else:
            piece.append(line)
    yield "\n".join(piece).strip(), is_question, is_answer
