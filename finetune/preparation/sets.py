"""Sets made by rule: their sizes, the user's own sentences, and the files of a set."""

import argparse
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune import failures, files
from finetune.config import paths
from finetune.data import clusters
from finetune.data.places import Row, short
from finetune.errors import DataError, UserError
from finetune.preparation import frame as frames
from finetune.preparation import output, split
from finetune.preparation.frame import Frame

Rows = list[dict[str, Any]]
HELD_OUT = 0.1  # of the user's own sentences, for dev, and for test
MOST_SHOWN = 400  # characters of a column of the first row
IN_VAIN = 50_000  # draws without a new row, before a rule is taken to make no more


def add_arguments(parser: argparse.ArgumentParser, train: int) -> None:
    """Add the folder and the sizes."""
    add = parser.add_argument
    frames.add_folder(parser, "train.jsonl, dev.jsonl and test.jsonl")
    what = f"rows of train.jsonl, if they are made by rule (default: {train:,})"
    add("--train", type=frames.positive, metavar="N", help=what)
    what = f"rows of dev.jsonl, and of test.jsonl, so made (default: {held_out(train):,})"
    add("--held-out", type=frames.positive, metavar="N", help=what)
    add("--seed", type=int, default=0, help="another seed makes other rows")
    parser.set_defaults(default_train=train)


def add_sentences(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the user's own sentences; `what` says what they are."""
    text = f"{what}: a text file, one a line, or rows with a column text"
    parser.add_argument("--sentences", type=paths.argument, metavar="FILE", help=text)


def held_out(train: int) -> int:
    return min(200, max(1, train // 10))


def sizes(arguments: argparse.Namespace) -> dict[str, int]:
    """Return how many rows of each split to make."""
    train = arguments.train or arguments.default_train
    held = arguments.held_out or held_out(train)
    return {"train": train, "dev": held, "test": held}


def drawn(
    make: Callable[[random.Random], tuple[str, dict[str, Any]]], sizes: dict[str, int], seed: int
) -> dict[str, Rows]:
    """Return different rows of each split, of those that `make` draws with a key.

    All rows of a key go to the same split, so no key of a held-out row is ever trained on.
    """
    source = random.Random(seed)
    found: dict[str, Rows] = {name: [] for name in sizes}
    seen: set[str] = set()
    in_vain = 0
    while any(len(found[name]) < size for name, size in sizes.items()):
        key, row = make(source)
        name = _split_of(key, seed)
        if (text := str(row)) in seen or len(found[name]) == sizes[name]:
            in_vain += 1
            if in_vain > IN_VAIN:
                made = ", ".join(f"{len(rows):,} for {name}" for name, rows in found.items())
                raise UserError(f"the rule makes fewer different rows ({made}); ask for fewer")
            continue
        in_vain = 0
        seen.add(text)
        found[name].append(row)
    return found


def _split_of(key: str, seed: int) -> str:
    share = random.Random(f"{seed} {key}").random()
    return "train" if share < 0.8 else "dev" if share < 0.9 else "test"


# --------------------------------------------------------------------------- the user's sentences


def require_no_sizes(arguments: argparse.Namespace) -> None:
    """Raise UserError for sizes beside the user's own rows."""
    if arguments.train or arguments.held_out:
        what = "all are taken, and a tenth each is held out for dev and test"
        raise UserError(f"--train and --held-out do not go with rows of your own: {what}; drop it")


def sentences(frame: Frame, arguments: argparse.Namespace) -> list[Row]:
    """Read --sentences, without empty ones. Raise DataError for rows without the column text."""
    require_no_sizes(arguments)
    frame.unit = "sentences"
    frame.sources = frame.expanded([arguments.sentences], "--sentences")
    found = []
    for row in frame.rows():
        text = row.values.get("text")
        if not isinstance(text, str):
            what = f"this row has no text in column 'text'; it has {list(row.values)[:20]}"
            raise DataError(f"{row.place}: --sentences: {what}; rename its column to text")
        if text.strip():
            found.append(row)
        else:
            frame.drop(row, "empty")
    return found


def parted(texts: Sequence[str], seed: int) -> dict[str, list[int]]:
    """Return the numbers of the texts in each split; near-duplicates never part."""
    hold = round(HELD_OUT * len(texts)) or 1
    names: list[str] = []
    if len(texts) > 2 * hold:
        parts = split.together(clusters.of_texts(texts), [])
        names = split.drawn(parts, [], {"test": hold, "dev": hold}, seed)
    found = {name: [n for n, own in enumerate(names) if own == name] for name in split.SPLITS}
    require_some(len(texts) if all(found.values()) else 0, 1)
    return found


def require_some(count: int, least: int) -> None:
    """Raise DataError if fewer than `least` of the user's own rows are left."""
    if count < least:
        what = "too few of your own rows are left, or they are too alike, to hold some out"
        why = "--help says which the rule cannot use"
        raise DataError(f"{what} ({why}); give at least 10 that differ")


def own_words(texts: Sequence[str]) -> list[str | None]:
    """Return for each text the longest word that stands in no other, of four letters or more."""
    words = [[word.lower() for word in re.findall(r"[^\W\d_]{4,}", text)] for text in texts]
    counts = Counter(word for found in words for word in set(found))
    only = [[word for word in found if counts[word] == 1] for found in words]
    return [max(found, key=len) if found else None for found in only]


# -------------------------------------------------------------------------------------- the files


def write(
    frame: Frame, arguments: argparse.Namespace, parts: Mapping[str, Rows], text: str = ""
) -> None:
    """Write each split, and `text` as sentences.txt; keep files that hold the same already."""
    folder = Path(arguments.folder)
    contents = {
        folder / f"{name}.jsonl": b"".join(output.dumped(row, name) + b"\n" for row in rows)
        for name, rows in parts.items()
    }
    if text:
        contents[folder / "sentences.txt"] = text.encode()
    new = {path: content for path, content in contents.items() if not _holds(path, content)}
    for path in new:
        frame.require_free(str(path), "--output")
    for path, content in new.items():
        with failures.writing(path), files.replacing(path) as file:
            file.write(content)
    for name, rows in parts.items():
        frame.written += len(rows)
        frame.changed[f"in {name}"] = len(rows)
    first = parts["train"][0]
    shown = (short(str(value).replace("\n", " | "), MOST_SHOWN) for value in first.values())
    frame.note("the first row: " + "  ->  ".join(shown))


def _holds(path: Path, content: bytes) -> bool:
    """Return whether a file holds this content."""
    try:
        return path.stat().st_size == len(content) and path.read_bytes() == content
    except OSError:
        return False
