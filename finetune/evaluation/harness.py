"""Benchmarks of lm-evaluation-harness, with our own scorer of continuations.

Tasks, prompts and metrics are the harness's. Log-probabilities come from `continuations.py`, which
computes each context once; answers that have to be generated are the harness's own.
"""

import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from finetune import extras, failures
from finetune.errors import Outage, UserError
from finetune.evaluation.continuations import Continuations, Request
from finetune.evaluation.measures import Measure

OPTION = "--benchmarks"
INSTEAD = f"or name local rows of multiple choice: {OPTION} FILE.jsonl"

Values = dict[tuple[str, str], list[float]]
"""(task, metric) -> a number for each item, in the order of the task."""


class Harness:
    """Tasks of lm-evaluation-harness by name, ready for any number of models."""

    def __init__(
        self, names: Sequence[str | Mapping[str, Any]], limit: int | None = None,
        manager: Any = None,
    ) -> None:  # fmt: skip
        """Load the tasks with their rows, before any model. Raise UserError, Outage.

        names: of tasks, groups or tags; or the config of a task. manager: of tasks; default: one
        that knows all tasks of the harness.
        """
        extras.require("lm-eval", OPTION)
        self.names, self.limit = list(names), limit
        with _quiet():
            from lm_eval.tasks import TaskManager

            self.manager = manager or TaskManager()
            self._require_known([name for name in names if isinstance(name, str)])
            with _without_rows():
                self.tasks = self.manager.load(self.names)

    def _require_known(self, names: Sequence[str]) -> None:
        known = self.manager.match_tasks(list(names))
        if missing := [name for name in names if name not in known and "*" not in name]:
            raise UserError(
                f"{OPTION}: lm-evaluation-harness has no task {missing[0]!r}; `lm-eval ls tasks` "
                f"lists its tasks; {INSTEAD}"
            )

    def __call__(self, model: Any, tokenizer: Any, scorer: Continuations) -> Values:
        """Return what each metric says of each item."""
        with _quiet(), _without_rows():
            import lm_eval

            found = lm_eval.simple_evaluate(
                model=_packed(model, tokenizer, scorer), tasks=self.names,
                task_manager=self.manager, limit=self.limit, log_samples=True, bootstrap_iters=0,
            )  # fmt: skip
        values: Values = defaultdict(list)
        for task, samples in found["samples"].items():
            for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
                for metric in sample["metrics"]:
                    name = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
                    values[task, name].append(_number(sample[metric]))
        # Lists and pairs, as words and log-probability of a perplexity, compare no items.
        return {key: each for key, each in values.items() if None not in each}

    def groups(self) -> dict[str, list[str]]:
        """Return each named group -> its tasks, as `mmlu` has one for each subject."""
        children = self.tasks.get("group_map", {})

        def leaves(name: str) -> Iterator[str]:
            for child in children.get(name, [name]):
                yield from leaves(child) if child in children else [child]

        named = [name for name in self.names if isinstance(name, str)]
        return {name: list(leaves(name)) for name in named if name in children}


def _number(value: Any) -> Any:
    """Return a number, or None for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def measures(harness: Harness, found: Mapping[str, Values]) -> list[Measure]:
    """Return the metrics of all models. `found`: model -> its values.

    The tasks of a group are one measure, each item counting as much as any other.
    """
    groups = harness.groups()
    first = next(iter(found.values()))
    shown: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for task, metric in first:
        name = next((group for group, tasks in groups.items() if task in tasks), task)
        shown.setdefault((name, metric), []).append((task, metric))
    results = []
    for (name, metric), parts in shown.items():
        values = {
            model: [value for part in parts for value in each[part]]
            for model, each in found.items()
        }  # fmt: skip
        is_share = all(0 <= value <= 1 for each in values.values() for value in each)
        results.append(Measure(name, metric, values, is_share=is_share))
    return results


def _packed(model: Any, tokenizer: Any, scorer: Continuations) -> Any:
    """Return a model as the harness takes it, whose log-probabilities are ours."""
    from lm_eval.models.huggingface import HFLM

    class Packed(HFLM):
        def _loglikelihood_tokens(
            self, requests: Sequence[Any], disable_tqdm: bool = False,
            override_bs: int | None = None,
        ) -> list[tuple[float, bool]]:  # fmt: skip
            asked = [Request(tuple(before), tuple(after)) for _, before, after in requests]
            return [(found.logprob, found.is_greedy) for found in scorer(asked, greedy=True)]

    return Packed(pretrained=model, tokenizer=tokenizer, batch_size="auto")


@contextmanager
def _without_rows() -> Iterator[None]:
    """Raise Outage or UserError for rows of a task that cannot be fetched."""
    try:
        yield
    except Exception as exc:  # of datasets, the Hub and the harness
        offline = os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "True", "ON")
        is_network = isinstance(exc, ConnectionError) or type(exc).__module__.startswith(
            ("datasets", "huggingface_hub", "httpx", "requests")
        )
        if is_network:
            why = "HF_HUB_OFFLINE is set" if offline else str(exc).splitlines()[0]
            raise Outage(
                f"{OPTION}: the rows of a task of lm-evaluation-harness cannot be fetched: {why}; "
                f"connect this machine to the network, {INSTEAD}"
            ) from exc
        failures.reraise(exc, OPTION)
        raise


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness from writing about what it does."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
