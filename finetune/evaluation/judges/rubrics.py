"""Rubrics: what a judge judges by, in a YAML file, and the prompts that they make.

name: tone
criterion: The answer is polite, and as brief as the question allows.
scores: {1: rude, 3: neutral, 5: polite and brief}
steps:                  # optional: without them the judge writes some, once
  - Read the request, and note what a polite answer to it would be.
examples:               # optional
  - {prompt: "Where is my parcel?", answer: "No idea.", score: 1}
pairs:                  # optional, for --pairwise
  - {prompt: "Where is it?", first: "No idea.", second: "I'll check.", better: second}
use_reference: false    # whether the judge sees the right answer; true by default
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from finetune import failures, files
from finetune.config.yaml_text import dump, read_yaml
from finetune.data.places import printable, short
from finetune.errors import ConfigError, UserError
from finetune.generation.completions import Prompt

FOLDER = Path(__file__).parent
BUILT_IN = ("quality", "relevancy", "responsibility")
FIRST, SECOND, TIE = "A", "B", "C"
"""What a judge answers for the first of two answers, the second, or neither."""
LETTERS = {"first": FIRST, "second": SECOND, "tie": TIE}
MOST_PROBLEMS = 10

Text = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]
Digit = Annotated[int, Field(ge=0, le=9)]
Message = Mapping[str, str]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Example(_Strict):
    """An answer with the score that it should get."""

    prompt: Text
    answer: str
    score: Digit
    reference: Text | None = None


class Pair(_Strict):
    """Two answers, and which of them is better."""

    prompt: Text
    first: str
    second: str
    better: Literal["first", "second", "tie"]
    reference: Text | None = None


class Rubric(_Strict):
    """A criterion, the scores that answers may get, and examples.

    scores: each a digit, so that it is a single token, and what it means.
    """

    name: Annotated[str, StringConstraints(pattern=r"^\w[\w -]{0,39}$")]
    criterion: Text
    scores: dict[Digit, Text] = Field(min_length=2)
    steps: list[Text] = []
    examples: list[Example] = []
    pairs: list[Pair] = []
    use_reference: bool = True


def read(name: str) -> Rubric:
    """Return a rubric of this package, or of a file. Raise ConfigError for every wrong key."""
    path = FOLDER / f"{name}.yaml" if name in BUILT_IN else Path(name)
    try:
        values = read_yaml(path)
    except ConfigError as exc:
        message = str(exc).replace("sections such as run: and data:", "name, criterion, scores")
        is_missing = isinstance(exc.__cause__, FileNotFoundError)
        hint = f"; give a YAML file, or one of {', '.join(BUILT_IN)}" if is_missing else ""
        raise ConfigError(f"--rubric: {message}{hint}") from exc
    try:
        rubric = Rubric.model_validate(values)
    except ValidationError as exc:
        raise ConfigError(f"--rubric: {printable(name)}: {_problems(exc)}") from exc
    if wrong := [each for each in rubric.examples if each.score not in rubric.scores]:
        listed = ", ".join(map(str, sorted(rubric.scores)))
        what = f"an example has the score {wrong[0].score}, and scores has only {listed}"
        raise ConfigError(f"--rubric: {printable(name)}: {what}; correct one of them")
    return rubric


def _problems(exc: ValidationError) -> str:
    found = exc.errors(include_url=False)
    listed = []
    for each in found[:MOST_PROBLEMS]:
        where = ".".join(str(part) for part in each["loc"]) or "the whole"
        got = "" if each["type"] == "missing" else f", got {short(each['input'])}"
        listed.append(f"\n  {short(where)}: {each['msg']}{got}")
    more = len(found) - len(listed)
    rest = f"\n  and {more:,} more" if more else ""
    return "is not a rubric:" + "".join(listed) + rest


# ------------------------------------------------------------------------------------- prompts


def score_prompt(rubric: Rubric, steps: Sequence[str], prompt: Prompt, answer: str) -> str:
    """Return the prompt that asks for the score of an answer."""
    parts = [_task("Grade an answer by this criterion.", rubric), _scores(rubric), _steps(steps)]
    for number, each in enumerate(rubric.examples, 1):
        shown = _case(rubric, each.prompt, each.reference, {"answer": each.answer})
        parts.append(f"Example {number}:\n{shown}\nScore: {each.score}")
    parts.append("Grade this answer:")
    parts.append(_case(rubric, conversation(prompt), prompt.reference, {"answer": answer}))
    listed = ", ".join(map(str, sorted(rubric.scores)))
    parts.append(f"Write only the score, one of {listed}.")
    return "\n\n".join(part for part in parts if part)


def pair_prompt(
    rubric: Rubric, steps: Sequence[str], prompt: Prompt, first: str, second: str
) -> str:
    """Return the prompt that asks which of two answers is better."""
    names = (f"answer_{FIRST.lower()}", f"answer_{SECOND.lower()}")
    parts = [_task("Compare two answers by this criterion.", rubric), _steps(steps)]
    for number, each in enumerate(rubric.pairs, 1):
        answers = dict(zip(names, (each.first, each.second)))
        shown = _case(rubric, each.prompt, each.reference, answers)
        parts.append(f"Example {number}:\n{shown}\nBetter: {LETTERS[each.better]}")
    parts.append("Compare these answers. Neither their order nor their length counts.")
    answers = dict(zip(names, (first, second)))
    parts.append(_case(rubric, conversation(prompt), prompt.reference, answers))
    parts.append(
        f"Write only {FIRST} if the first is better, {SECOND} if the second is better, or {TIE} if "
        "neither is."
    )
    return "\n\n".join(part for part in parts if part)


def steps_prompt(rubric: Rubric) -> str:
    """Return the prompt that asks for evaluation steps."""
    parts = [
        "Someone will grade answers by the criterion below.",
        _task("", rubric), _scores(rubric),
        "Write three to six short steps that lead from an answer to its score, as a numbered list. "
        "Write nothing else.",
    ]  # fmt: skip
    return "\n\n".join(parts)


def _task(what: str, rubric: Rubric) -> str:
    return f"{what}\n\n{rubric.name.capitalize()}: {rubric.criterion.strip()}".strip()


def _scores(rubric: Rubric) -> str:
    return "\n".join(f"{score}: {meaning}" for score, meaning in sorted(rubric.scores.items()))


def _steps(steps: Sequence[str]) -> str:
    return "\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1))


def _case(rubric: Rubric, prompt: str, reference: str | None, answers: Mapping[str, str]) -> str:
    parts = {"request": prompt}
    if rubric.use_reference and reference:
        parts["right_answer"] = reference
    return "\n".join(f"<{key}>\n{text}\n</{key}>" for key, text in (parts | dict(answers)).items())


def conversation(prompt: Prompt) -> str:
    """Return what was asked: the text of a single message, or each message with its role."""
    texts = [
        (each.role, f"{each.content}\n\n{each.context}" if each.context else each.content)
        for each in prompt.messages
    ]
    if len(texts) == 1:
        return texts[0][1]
    return "\n".join(f"{role}: {text}" for role, text in texts)


# --------------------------------------------------------------------------------------- steps


class Steps(_Strict):
    """Evaluation steps that a judge has written, in a file that people may edit."""

    judge: str
    criterion: str
    steps: list[Text] = Field(min_length=1)


def steps_path(folder: Path, rubric: Rubric) -> Path:
    return folder / f"judge_steps_{rubric.name.replace(' ', '_')}.yaml"


def read_steps(path: Path, rubric: Rubric) -> list[str] | None:
    """Return the steps of a file; None without one. Raise ConfigError if they are of another."""
    if not path.exists():
        return None
    try:
        found = Steps.model_validate(read_yaml(path))
    except ValidationError as exc:
        what = _problems(exc).replace("a rubric", "a file of steps")
        raise ConfigError(f"{path}: {what}; correct it, or remove it") from exc
    if found.criterion.strip() != rubric.criterion.strip():
        what = f"its steps are for another criterion ({short(found.criterion)})"
        raise ConfigError(f"{path}: {what}; remove it, or choose another folder")
    return list(found.steps)


def write_steps(path: Path, rubric: Rubric, name: str, text: str) -> list[str]:
    """Keep the steps that a judge has written, and return them. Raise UserError without any."""
    steps = steps_in(text)
    if not steps:
        what = f"the judge writes no evaluation steps, but {short(text)!r}"
        raise UserError(f"{what}; add `steps:` to the rubric, or use another model")
    values: dict[str, Any] = {"judge": name, "criterion": rubric.criterion.strip(), "steps": steps}
    with failures.writing(path):
        files.write_whole(path, dump(values, flow=False))
    return steps


def steps_in(text: str) -> list[str]:
    """Return the items of a list, without their numbers."""
    lines = [line.strip() for line in text.splitlines()]
    marked = [line for line in lines if line[:1] in "-*" or line[:1].isdigit()]
    items = [line.lstrip("-*0123456789").lstrip(".) ").strip() for line in marked if line]
    return [item for item in items if any(map(str.isalpha, item))]
