"""Replace personal data by placeholders: [EMAIL_1], [PHONE_2].

Finds e-mail addresses, phone numbers, cards (Luhn), IBANs (mod 97), public IP addresses, and keys
and passwords. Equal data in one row gets the same placeholder, so a conversation still makes sense.
Searches every text of a row, also in columns that training does not read. Names and postal
addresses stay: read a sample before you share rows.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from functools import partial

from finetune import extras
from finetune.preparation import frame as frames
from finetune.preparation import personal, texts, workers
from finetune.preparation.frame import Frame

PACKAGES = {"phone": "phonenumbers", "card": "python-stdnum", "iban": "python-stdnum"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    frames.add_inputs(parser)
    frames.add_output(parser)
    listed = ", ".join(personal.KINDS)
    what = f"what to replace, as email,phone (default: {listed})"
    add("--kinds", type=_kinds, default=None, metavar="KINDS", help=what)
    what = "countries whose phone numbers are written without +, as US,GB (default: "
    add("--regions", type=_regions, default=None, metavar="CODES", help=f"{what}US)")
    frames.add_workers(parser)


def _kinds(text: str) -> list[str]:
    kinds = frames.names(text)
    if unknown := [kind for kind in kinds if kind not in personal.KINDS]:
        raise argparse.ArgumentTypeError(
            f"{unknown[0]!r} is unknown; kinds are {', '.join(personal.KINDS)}"
        )
    return kinds


def _regions(text: str) -> list[str]:
    extras.require("phonenumbers", "--regions")
    import phonenumbers

    regions = [region.upper() for region in frames.names(text)]
    if unknown := [each for each in regions if each not in phonenumbers.SUPPORTED_REGIONS]:
        what = f"{unknown[0]!r} is not the code of a country, such as US, GB or DE"
        raise argparse.ArgumentTypeError(what)
    return regions


def main(frame: Frame, arguments: argparse.Namespace) -> None:
    kinds = arguments.kinds or personal.KINDS
    for kind in kinds:
        if kind in PACKAGES:
            extras.require(PACKAGES[kind], f"scrub --kinds {kind}")
    with frame.writing() as write:
        for rows, scrubbed in workers.mapped_rows(
            frame.rows(), lambda row: list(texts.strings(row.values)),
            partial, arguments.workers, scrub_rows, kinds, arguments.regions or personal.REGIONS,
        ):  # fmt: skip
            for row, (changed, counts) in zip(rows, scrubbed):
                values = texts.changed(row.values, iter(changed)) if counts else row.values
                frame.changed.update(counts)
                frame.changed["rows changed"] += bool(counts)
                write(values, row.place)


def scrub_rows(
    kinds: Sequence[str], regions: Sequence[str], rows: list[list[str]]
) -> list[tuple[list[str], Counter[str]]]:
    """Return the texts of each row, scrubbed, and what was replaced."""
    return [scrub(row, kinds, regions) for row in rows]


def scrub(
    row: list[str],
    kinds: Sequence[str] = personal.KINDS,
    regions: Sequence[str] = personal.REGIONS,
) -> tuple[list[str], Counter[str]]:
    """Return the texts of one row with placeholders, and what was replaced, by kind."""
    numbers: dict[tuple[str, str], int] = {}
    counts: Counter[str] = Counter()
    made = []
    for text in row:
        parts, end = [], 0
        for found in personal.find(text, kinds, regions):
            same_kind = sum(kind == found.kind for kind, _ in numbers)
            number = numbers.setdefault((found.kind, found.value), same_kind + 1)
            parts += [text[end : found.start], f"[{found.kind.upper()}_{number}]"]
            end = found.end
            counts[found.kind] += 1
        made.append("".join([*parts, text[end:]]) if parts else text)
    return made, counts
