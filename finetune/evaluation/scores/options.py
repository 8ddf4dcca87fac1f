"""The option --scores: which scores an evaluation computes."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from finetune.evaluation.scores import table
from finetune.generation.completions import Prompt, Scorer


class _Listing(argparse.Action):
    """Print every score for `--scores list`; otherwise keep the names."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
        option_string: str | None = None,
    ) -> None:  # fmt: skip
        if values == ["list"]:
            print(table.listing())
            parser.exit()
        setattr(namespace, self.dest, values)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scores", nargs="+", action=_Listing, default=None, metavar="NAME[=VALUE]",
        help="scores of the answers, or FILE.py:NAME of your own; `--scores list` shows them all; "
        "default: those that fit the references",
    )  # fmt: skip


def named(names: Sequence[str] | None) -> list[Scorer] | None:
    """Return the scores of --scores, before any work; None without it. Raises ConfigError."""
    return None if names is None else table.choose(names)


def fitting(prompts: Sequence[Prompt]) -> list[Scorer]:
    """Return the scores that fit the references, and say which on stderr."""
    names, why = table.suitable(prompts)
    scorers = table.choose(names)
    listed = ", ".join(each.name for each in scorers)
    print(f"note: scores: {listed}, as {why}; --scores names others", file=sys.stderr)
    return scorers
