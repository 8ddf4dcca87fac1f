"""New tasks from a few: Self-Instruct (Wang et al., 2023), and Alpaca's shorter way.

Each request shows a few tasks, drawn at random from the seeds and from the new ones, and asks for
more. A question that resembles a known one too much is refused. Alpaca asks for questions with
their answers; Self-Instruct asks for questions, and then for the answer to each.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.data.places import Place, Row
from finetune.endpoint import Refused, Reply, Request
from finetune.errors import DataError
from finetune.preparation import tasks
from finetune.preparation.request import Slice
from finetune.preparation.rouge import Texts
from finetune.preparation.tasks import Prompts, Task

SEEDS_SHOWN, NEW_SHOWN = 3, 1
MOST_FRUITLESS = 20  # requests in a row without a new task, after which the model repeats itself
REFUSED, EMPTY = "refused by the server", "without an answer"
CUT, FILTERED = "cut at --max-tokens", "cut by the server's filter"
LIKE = "too much like a known question"
NO_TASK, MORE = "answer without a task", "more than asked for"
Drop = Callable[[Row, str], None]


@dataclass
class Part:
    """Tasks of one kind: `count` new ones are wanted."""

    seeds: Sequence[Task]
    count: int
    slice: Slice | None = None
    kept: list[Task] = field(default_factory=list)
    waiting: deque[Task] = field(default_factory=deque)
    """Questions that are to be answered."""
    num_asked: int = 0
    expected: int = 0
    """Tasks that are to be kept, if each request that is under way brings what it asks for."""
    fruitless: int = 0

    @property
    def is_dry(self) -> bool:
        return self.fruitless >= MOST_FRUITLESS


class Growing:
    """Requests for tasks, and the rows that their replies make."""

    def __init__(
        self, parts: Sequence[Part], prompts: Prompts, threshold: float, per_request: int,
        two_steps: bool, seed: int, make: Callable[[str, bool], Request], drop: Drop,
    ) -> None:  # fmt: skip
        """`make`: text and whether it asks for an answer -> request; `drop`: counts what goes."""
        self.parts = parts
        self._prompts, self._per_request, self._two_steps = prompts, per_request, two_steps
        self._seed, self._make, self._drop = seed, make, drop
        self._known = Texts(threshold)
        for part in parts:
            for task in part.seeds:
                self._known.add(task.question)

    def requests(self) -> "Iterator[tuple[Any, Request] | None]":
        """Yield (tag, request); None while the requests under way may bring enough."""
        for number, part in enumerate(self.parts):
            while True:
                if part.waiting:
                    task = part.waiting.popleft()
                    yield (part, task), self._make(task.question, True)
                elif len(part.kept) >= part.count or (part.is_dry and not part.expected):
                    break
                elif part.is_dry or len(part.kept) + part.expected >= part.count:
                    yield None
                else:
                    part.num_asked += 1
                    part.expected += self._per_request
                    yield (part, None), self._make(self._prompt(part, number), False)

    def _prompt(self, part: Part, number: int) -> str:
        source = random.Random(f"{self._seed} {number} {part.num_asked}")
        shown = source.sample(part.seeds, min(SEEDS_SHOWN, len(part.seeds)))
        if part.kept:
            shown += source.sample(part.kept, min(NEW_SHOWN, len(part.kept)))
        source.shuffle(shown)
        return self._prompts.write(shown, part.slice)

    def take(
        self, tag: tuple[Part, Task | None], request: Request, reply: Reply | Refused
    ) -> Iterator[dict[str, Any]]:
        """Yield the rows that a reply makes."""
        part, task = tag
        if task is not None:
            part.expected -= 1
            yield from self._answered(part, task, reply)
            return
        part.expected -= self._per_request
        part.fruitless += 1
        for found in self._found(part, request, reply):
            if len(part.kept) + (part.expected if self._two_steps else 0) >= part.count:
                self._leave_out(part, found, MORE)
            elif self._known.resembled(found.question) is not None:
                self._leave_out(part, found, LIKE)
            elif self._two_steps:
                self._known.add(found.question)
                part.fruitless = 0
                part.expected += 1
                part.waiting.append(found)
            elif not found.answer:
                self._leave_out(part, found, EMPTY)
            else:
                self._known.add(found.question)
                yield self._keep(part, found)

    def _found(self, part: Part, request: Request, reply: Reply | Refused) -> Sequence[Task]:
        """Return the tasks of a reply, without those that hold no question."""
        if isinstance(reply, Refused):
            self._leave_out(part, Task(str(reply), ""), REFUSED)
            return []
        text = reply.text if request.is_chat else f"Question:{reply.text}"
        try:
            found = tasks.read(text, not self._two_steps, reply.is_cut)
        except DataError:
            self._leave_out(part, Task(reply.text, ""), _cut(reply) or NO_TASK)
            return []
        return [task for task in found if task.question]

    def _answered(self, part: Part, task: Task, reply: Reply | Refused) -> Iterator[dict[str, Any]]:
        reason = problem(reply)
        if reason:
            self._leave_out(part, task, reason)
        elif isinstance(reply, Reply):
            yield self._keep(part, Task(task.question, reply.text.strip()))

    def _keep(self, part: Part, task: Task) -> dict[str, Any]:
        part.fruitless = 0
        part.kept.append(task)
        row = {"question": task.question, "answer": task.answer}
        return row | ({"slice": part.slice.name} if part.slice else {})

    def _leave_out(self, part: Part, task: Task, reason: str) -> None:
        values = {"question": task.question, "answer": task.answer}
        self._drop(Row(Place("answer", part.num_asked), values), reason)


def problem(reply: Reply | Refused) -> str | None:
    """Return why a reply teaches nothing, or None."""
    if isinstance(reply, Refused):
        return REFUSED
    return _cut(reply) or (None if reply.text.strip() else EMPTY)


def _cut(reply: Reply) -> str | None:
    """Return what has cut a reply, or kept it from being there, or None."""
    if reply.is_filtered:
        return FILTERED
    if reply.missing:
        return reply.missing.partition(":")[0]
    return CUT if reply.is_cut else None
