"""Results of an evaluation as tests want them: questions, right answers, and what models said."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.data.conversations import Conversation, Message
from finetune.data.places import Place
from finetune.evaluation.results import Results
from finetune.generation.completions import Completion, Prompt, Score


@dataclass(frozen=True)
class Rule:
    """A scorer whose values the test gives."""

    name: str
    higher: bool | None = True
    is_share: bool = True
    line: str = "a score"

    def __call__(self, completions):
        raise NotImplementedError


@dataclass(frozen=True)
class Asked:
    """A row: question, right answer, answer of the tuned model, and of the base."""

    question: str
    right: str | None
    tuned: str
    base: str = ""
    finish: str = "stop"
    fields: Mapping[str, Any] = field(default_factory=dict)
    system: str = ""


def results(
    rows: Sequence[Asked], clusters: Sequence[int] | None = None,
    scores: Mapping[str, Mapping[str, Sequence[float | None]]] | None = None,
    scorers: Mapping[str, Rule] | None = None, **more: Any,
) -> Results:  # fmt: skip
    """Return results of these rows, with exact match as the first score."""
    prompts, answers = [], {"base": [], "tuned": []}
    for number, row in enumerate(rows, 1):
        system = (Message("system", row.system),) if row.system else ()
        messages = (*system, Message("user", row.question))
        prompt = Prompt(Conversation(messages, Place("test.jsonl", number)), row.right, row.fields)
        prompts.append(prompt)
        answers["base"].append(Completion(prompt, row.base))
        answers["tuned"].append(Completion(prompt, row.tuned, row.finish, (1, 2), 0, 0.5))
    match = {
        name: [
            Score(None, "the row has no reference")
            if each.prompt.reference is None
            else Score(float(each.text == each.prompt.reference))
            for each in given
        ]
        for name, given in answers.items()
    }
    given = {
        name: {model: [Score(v, "" if v is not None else "not there") for v in values]
               for model, values in by_model.items()}
        for name, by_model in (scores or {}).items()
    }  # fmt: skip
    made = {name: (scorers or {}).get(name, Rule(name)) for name in ["exact match", *given]}
    numbers = list(range(len(rows))) if clusters is None else clusters
    return Results(prompts, numbers, answers, {"exact match": match, **given}, made, **more)
