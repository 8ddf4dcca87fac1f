"""The options --benchmarks and --forgetting: read before any model loads, then asked of each."""

import argparse
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from finetune.config import paths
from finetune.data import readers, source_files
from finetune.data.file_types import TEXTS, TYPES, type_of
from finetune.data.places import Row
from finetune.errors import DataError, UserError
from finetune.evaluation import benchmarks, forgetting, harness, loaded
from finetune.evaluation.benchmarks import Benchmark, Item
from finetune.evaluation.candidates import Candidate
from finetune.evaluation.continuations import Continuations
from finetune.evaluation.forgetting import Passage
from finetune.evaluation.harness import Harness
from finetune.evaluation.held_out import note
from finetune.evaluation.measures import Measure, table
from finetune.evaluation.results import Beside
from finetune.generation.remote import is_remote


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    what = (
        "compare on these, separated by commas: files with rows of multiple choice (question, "
        "choices, gold), or tasks of lm-evaluation-harness, as arc_easy,mmlu"
    )
    add("--benchmarks", type=_names, default=[], metavar="NAME|FILE,...", help=what)
    what = (
        "how a row of a file becomes what models read, as '{{question}}\\nAnswer:'; default: from "
        "its columns"
    )
    add("--benchmark-prompt", type=_prompt, default=None, metavar="TEMPLATE", help=what)
    what = "put N solved examples before each question: the first N rows of --benchmark-dev"
    add("--benchmark-shots", type=_count, default=0, metavar="N", help=what)
    what = "rows of multiple choice for --benchmark-shots"
    add("--benchmark-dev", type=paths.argument, default=None, metavar="FILE", help=what)
    what = "use only the first N items of each benchmark"
    add("--benchmark-limit", type=_count, default=None, metavar="N", help=what)
    what = (
        "also compare on a small fixed suite of what tuning should not cost: sums, copying, "
        "letters, order"
    )
    add("--forgetting", action="store_true", help=what)
    what = "add your own text, or rows of multiple choice, to --forgetting; may be given again"
    add(
        "--forgetting-file", type=paths.argument, action="append", default=[], metavar="FILE",
        help=what,
    )  # fmt: skip


def are_given(arguments: argparse.Namespace) -> bool:
    """Return whether the options name anything."""
    return bool(arguments.benchmarks or arguments.forgetting or arguments.forgetting_file)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("names nothing; name files or tasks, as arc_easy")
    return names


def _prompt(text: str) -> str:
    """Let a template of the command line have its new lines as \\n."""
    return text.replace("\\n", "\n")


def _count(text: str) -> int:
    if text.isdigit() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"should be a whole number of at least 1, got {text!r}")


@dataclass(frozen=True)
class Benches:
    """What models are compared on beside held-out rows.

    files: multiple choice of the user's. tasks: of lm-evaluation-harness. suite, texts: of
    --forgetting; texts: name -> passages.
    """

    files: Sequence[Benchmark] = ()
    tasks: Harness | None = None
    suite: Sequence[Benchmark] = ()
    texts: dict[str, Sequence[Passage]] = field(default_factory=dict)

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "Benches | None":
        """Read all that the options name; None if they name nothing. Raises UserError."""
        own = arguments.forgetting_file
        if not are_given(arguments):
            return None
        limit = arguments.benchmark_limit
        read = partial(
            benchmarks.read, prompt=arguments.benchmark_prompt, limit=limit, shots=_shots(arguments)
        )
        names = [name for name in arguments.benchmarks if not _is_file(name)]
        files = [read(paths.argument(name)) for name in arguments.benchmarks if _is_file(name)]
        suite = forgetting.suite() if arguments.forgetting or own else []
        suite += [read(name, option="--forgetting-file") for name in own if _has_choices(name)]
        texts: dict[str, Sequence[Passage]] = {
            os.path.basename(name): forgetting.passages(name)
            for name in own if not _has_choices(name)
        }  # fmt: skip
        _require_different([each.name for each in [*files, *suite]] + list(texts))
        return cls(files, Harness(names, limit) if names else None, suite, texts)

    def compare(
        self, candidates: Sequence[Candidate], trust_remote_code: bool = False
    ) -> "Compared":
        """Ask each model everything, one model after another. Raise UserError for servers."""
        if served := [each for each in candidates if is_remote(each.model)]:
            raise UserError(
                f"{served[0].option}: {served[0].model} is a server, and --benchmarks and "
                "--forgetting need the log-probabilities of a model on this machine; leave one out"
            )
        choices: dict[str, dict[str, Any]] = defaultdict(dict)
        bits: dict[str, dict[str, list[float]]] = defaultdict(dict)
        of_tasks: dict[str, harness.Values] = {}
        local = [*self.files, *self.suite]
        for name, model, tokenizer in loaded.each(candidates, trust_remote_code):
            scorer = Continuations(model, tokenizer)
            for benchmark in local:
                choices[benchmark.name][name] = benchmarks.logprobs(benchmark, scorer, tokenizer)
                if scorer.num_cut:
                    note(
                        f"{benchmark.name}: {scorer.num_cut:,} questions of {name} do not fit its "
                        f"{scorer.max_length:,} tokens; their beginnings are cut off"
                    )
            for text, passages in self.texts.items():
                bits[text][name] = forgetting.bits_per_byte(passages, scorer, tokenizer)
            if self.tasks is not None:
                of_tasks[name] = self.tasks(model, tokenizer, scorer)
            del model, scorer
        found = [
            each for benchmark in self.files
            for each in benchmarks.measures(benchmark, choices[benchmark.name])
        ]  # fmt: skip
        if self.tasks is not None:
            found += harness.measures(self.tasks, of_tasks)
        kept = [forgetting.of_choices(each, choices[each.name]) for each in self.suite]
        kept += [forgetting.of_text(name, each, bits[name]) for name, each in self.texts.items()]
        return Compared(found, kept)


@dataclass(frozen=True)
class Compared:
    """What all models made of the tests."""

    benchmarks: Sequence[Measure]
    forgetting: Sequence[Measure]

    def text(self) -> str:
        """Return the tables, and what was lost in one sentence."""
        parts = []
        if self.benchmarks:
            parts.append(f"benchmarks\n{table(self.benchmarks)}")
        if self.forgetting:
            lost = forgetting.summary(self.forgetting)
            parts.append(f"forgetting\n{table(self.forgetting)}\n\n{lost}")
        return "\n\n".join(parts)

    @property
    def facts(self) -> Beside:
        """Return the means and differences, as results.json has them."""
        return Beside(
            [each.facts() for each in self.benchmarks],
            [each.facts(forgetting.judged) for each in self.forgetting],
        )


def _is_file(name: str) -> bool:
    """Return whether a name of --benchmarks is that of local rows, not of a task."""
    return os.path.exists(name) or type_of(name) in TYPES or "/" in name


def _shots(arguments: argparse.Namespace) -> list[Item]:
    """Return the solved examples. Raise UserError for one of the two options alone."""
    count, source = arguments.benchmark_shots, arguments.benchmark_dev
    if bool(count) != bool(source):
        raise UserError(
            "--benchmark-shots and --benchmark-dev come together: how many examples, of which file"
        )
    if not source:
        return []
    prompt = arguments.benchmark_prompt
    found = benchmarks.read(source, prompt=prompt, limit=count, option="--benchmark-dev").items
    if len(found) < count:
        raise DataError(f"--benchmark-dev: {source} has {len(found)} rows, fewer than {count}")
    return list(found)


def _has_choices(source: str) -> bool:
    """Return whether the first row of a file of --forgetting is multiple choice."""
    for file in source_files.expand(source, "--forgetting-file")[0]:
        if type_of(file) in TEXTS:
            return False
        first = next(iter(readers.records(file)), None)
        return isinstance(first, Row) and not benchmarks.CHOICES.isdisjoint(first.values)
    return False


def _require_different(names: Sequence[str]) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two files are called {twice[0]!r} in the table; rename one of them")
