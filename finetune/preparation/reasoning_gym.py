"""Make rows of reasoning-gym's tasks: puzzles with a rule that scores any answer.

    finetune data reasoning_gym --tasks countdown,chain_sum --output data/countdown

Each row has a question, a right answer, and what the reward `kind: reasoning_gym` and the score
reasoning-gym read: the name of its task, and its entry. No question stands in two files.
"""

import argparse
import difflib
import json
import random
from typing import Any

from finetune import extras
from finetune.errors import UserError
from finetune.preparation import sets
from finetune.preparation.frame import Frame


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sets.add_arguments(parser, train=1_000)
    what = "names of tasks, with commas: their rows are mixed in equal parts"
    parser.add_argument("--tasks", required=True, metavar="A,B", help=what)


def main(frame: Frame, arguments: argparse.Namespace) -> None:
    extras.require("reasoning-gym", "finetune data reasoning_gym")
    from reasoning_gym.factory import DATASETS, create_dataset

    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    for name in names:
        if name not in DATASETS:
            near = difflib.get_close_matches(name, DATASETS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(DATASETS))}"
            raise UserError(f"--tasks: reasoning-gym has no task {name!r}; {hint}")
    if not names:
        raise UserError("--tasks: names none")
    sizes = sets.sizes(arguments)
    most = sum(sizes.values()) * 2 + sets.IN_VAIN
    sources = {name: iter(create_dataset(name, size=most, seed=arguments.seed)) for name in names}
    known: dict[str, dict[str, Any]] = {}

    def make(source: random.Random) -> tuple[str, dict[str, Any]]:
        row = _row(task := source.choice(names), next(sources[task]))
        return row["question"], known.setdefault(row["question"], row)

    sets.write(frame, arguments, sets.drawn(make, sizes, arguments.seed))


def _row(task: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Return a row. Raise UserError for a task whose rule fails on what a file can hold."""
    from reasoning_gym.factory import get_score_answer_fn

    entry = json.loads(json.dumps(entry))
    answer = entry["answer"]
    if answer is None:
        answer = ""  # such a task has only a rule
    elif (score := get_score_answer_fn(task)(answer, entry)) < 1:
        raise UserError(
            f"--tasks: {task} gives its own answer {score:g} once its row was a file; leave it out"
        )
    return {"question": entry["question"], "answer": answer, "task": task, "entry": entry}
