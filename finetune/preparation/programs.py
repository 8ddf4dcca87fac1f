"""The programs of `finetune data NAME`: what each does, its command line, its run."""

import argparse
import importlib
from typing import Any

from finetune import places
from finetune.config import note_repeats
from finetune.errors import EXIT_COMPLETE
from finetune.preparation.frame import Frame

PROGRAMS = {
    "import_faq": "questions and answers of FAQ pages, as rows",
    "import_slack": "threads of a Slack export, as conversations",
    "import_support": "support tickets, as conversations",
    "from_text": "documents, as questions and answers or passages",
    "validate": "check every row as training does",
    "convert": "convert rows to another format, and files to another type",
    "generate": "new rows from another model: tasks like given ones, or answers to prompts",
    "teach": "write what a teacher expects at each token into rows, for distillation",
    "dedup": "remove rows that are the same as, or nearly the same as, another row",
    "decontaminate": "remove rows that overlap with evaluation rows",
    "split": "split rows into train, dev and test; near-duplicates never part",
    "clean": "clean characters, markup and white space; keep languages",
    "scrub": "replace personal data by placeholders",
    "sample": "draw rows at random",
    "mix": "mix sources by weight",
    "report": "write the card of a set of rows: lengths, duplicates, overlap and more, with plots",
    "pig_latin": "make a set: sentences, translated into Pig Latin",
    "yoda": "make a set: sentences, as Yoda says them",
    "patient_doctor": "make a set: what patients ask, and a doctor answers",
    "company": "make a set: questions and answers about a company",
    "moderation": "make a set: requests to refuse, and their harmless neighbours to answer",
    "retrieval": "make a set: questions that a context answers, or does not",
    "reasoning_gym": "make a set: tasks of reasoning-gym, each with a rule that scores answers",
}


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keep the lines of a description; show the defaults of options that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return (
            action.help if action.default in (None, False, {}) else super()._get_help_string(action)
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the name of a program; the program itself reads the rest."""
    listed = "\n".join(f"  {name:15} {text}" for name, text in PROGRAMS.items())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = f"Prepare rows for training. Programs:\n\n{listed}"
    parser.epilog = f"{places.command()} data NAME --help shows the options of one."
    parser.add_argument("program", choices=PROGRAMS, metavar="NAME", help="a program, see above")
    rest = argparse.REMAINDER
    parser.add_argument("arguments", nargs=rest, metavar="...", help="its inputs and options")


def main(arguments: argparse.Namespace) -> int:
    """Run one program and return the exit code."""
    module: Any = importlib.import_module(f"finetune.preparation.{arguments.program}")
    name = f"{places.command()} data {arguments.program}"
    parser = argparse.ArgumentParser(
        prog=name, description=module.__doc__, allow_abbrev=False, formatter_class=_Help
    )
    note_repeats(parser)
    module.add_arguments(parser)
    given = parser.parse_args(arguments.arguments)
    with Frame(arguments.program, given) as frame:
        module.main(frame, given)
    return EXIT_COMPLETE
