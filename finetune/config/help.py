"""--help: the settings that matter most, those of one section, or all of them."""

import argparse
import difflib
import textwrap
from collections.abc import Iterable

# What most runs set, in the order in which a new user meets it.
ESSENTIAL = (
    "run.name", "model.path", "adapter.kind", "data.train", "data.eval_fraction", "data.max_length",
    "data.packing", "optimizer.lr", "train.epochs", "train.global_batch_size",
    "train.micro_batch_size", "evaluation.every_steps",
)  # fmt: skip
EXAMPLES = (
    ("my_run.yaml --check", "show what would be trained on and what is wrong; load no weights"),
    ("my_run.yaml", "train"),
    ("my_run.yaml --optimizer.lr 1e-4", "train with another learning rate than the file's"),
)
WORDS = ("-h", "--help")


def topic(argv: list[str]) -> str | None:
    """Return the word after --help, "" if there is none, None without --help."""
    for place, word in enumerate(argv):
        name, _, inside = word.partition("=")
        if name in WORDS:
            following = argv[place + 1] if place + 1 < len(argv) else ""
            return (inside or ("" if following.startswith("-") else following)).lstrip("-")
    return None


def text(parser: argparse.ArgumentParser, asked: str) -> str:
    """Return the help on a section (adapter), a setting (adapter.r), "all", or "" (in short)."""
    if asked == "all":
        return parser.format_help()
    groups = {str(group.title): group for group in parser._action_groups if group.description}
    actions = [action for group in groups.values() for action in group._group_actions]
    settings = {option[2:]: action for action in actions for option in action.option_strings}
    group = groups.get(asked)
    if group is not None:
        return _part(parser, asked, str(group.description), group._group_actions)
    if asked in settings:
        return _part(parser, "", "", [settings[asked]])
    width = parser._get_formatter()._width
    listed = ", ".join(group for group in groups if "." not in group)
    more = f"--help SECTION lists the settings of a section ({listed}), --help all lists all."
    if asked and not asked.endswith((".yaml", ".yml")):
        near = difflib.get_close_matches(asked, [*groups, *settings], n=1)
        meant = f"; did you mean {near[0]}?" if near else "."
        answer = f"No section or setting is named {asked!r}{meant} {more}"
        return textwrap.fill(answer, width) + "\n"
    column = max(len(rest) for rest, _ in EXAMPLES) + 4
    examples = "\n".join(f"  {parser.prog} {rest:<{column}}{what}" for rest, what in EXAMPLES)
    essential = [settings[name] for name in ESSENTIAL if name in settings]
    return (
        f"usage: {str(parser.usage) % {'prog': parser.prog}}\n\n"
        f"{textwrap.fill(str(parser.description), width)}\n\n{examples}\n\n"
        f"{_part(parser, 'the settings that matter most', '', essential)}\n"
        f"{textwrap.fill(more, width)}\n"
    )


def _part(
    parser: argparse.ArgumentParser, title: str, about: str, actions: Iterable[argparse.Action]
) -> str:
    """Return one group of settings as argparse prints it."""
    formatter = parser._get_formatter()
    formatter.start_section(title or None)
    formatter.add_text(about or None)
    formatter.add_arguments(actions)
    formatter.end_section()
    return formatter.format_help()
