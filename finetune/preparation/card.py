"""A card of rows: sections of text, tables and plots, as Markdown and as one HTML page."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from finetune import page


@dataclass
class Table:
    """Rows of cells below a head; numbers are right-aligned."""

    head: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass
class Histogram:
    """How often values occur; on the page alone. `marks`: values to mark, by name."""

    values: Sequence[float]
    label: str
    marks: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Bars:
    """A bar for each name; on the page alone, so a table beside it holds the numbers."""

    counts: Mapping[str, float]
    label: str


Block = str | Table | Histogram | Bars


@dataclass
class Section:
    """A part of the card with a title of its own."""

    title: str
    blocks: list[Block]


def markdown(title: str, sections: Sequence[Section]) -> str:
    """Return the card as Markdown."""
    lines = [f"# {_plain(title)}", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        for block in section.blocks:
            lines += [*_markdown(block)]
    return "\n".join(lines)


def _markdown(block: Block) -> Iterator[str]:
    if isinstance(block, str):
        yield from (_plain(block), "")
    elif isinstance(block, Table):
        numeric = [
            all(isinstance(row[n], int | float) for row in block.rows)
            for n in range(len(block.head))
        ]
        yield f"| {' | '.join(map(_cell, block.head))} |"
        yield f"| {' | '.join('---:' if is_number else '---' for is_number in numeric)} |"
        for row in block.rows:
            yield f"| {' | '.join(map(_cell, row))} |"
        yield ""


def _cell(value: object) -> str:
    return _plain(shown(value)).replace("|", "\\|")


def _plain(text: str) -> str:
    """Return text that Markdown shows as it is: rows may hold HTML, and more than one line."""
    text = page.plain(" ".join(text.split()))
    return text.replace("\\", "\\\\").replace("<", "&lt;").replace("*", "\\*").replace("`", "'")


def shown(value: object) -> str:
    """Write a number with thousands separated, and four digits of a fraction."""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def html(title: str, sections: Sequence[Section]) -> str:
    """Return the card as a page."""
    parts = []
    for section in sections:
        parts += [f"<h2>{page.text(section.title)}</h2>", *map(block_html, section.blocks)]
    return page.page(title, "\n".join(parts))


def block_html(block: Block) -> str:
    """Return a block as HTML."""
    if isinstance(block, str):
        return f"<p>{page.text(block)}</p>"
    if isinstance(block, Table):
        return page.table(block.head, block.rows)
    if isinstance(block, Bars):
        return page.bars(block.counts, block.label)
    return page.histogram(block.values, block.label, block.marks)
