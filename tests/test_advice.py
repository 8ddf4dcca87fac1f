"""What errors about rows advise works: applied, it leads to another outcome."""

import re

import pytest
from conftest import TINY_LLAMA, write_jsonl

from finetune import config as configs
from finetune.config import choices
from finetune.errors import UserError

pytestmark = pytest.mark.slow
LONG = "a" * 120
TURNS = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
PROMPT = [{"role": role, "content": text} for role, text in TURNS[:3]]
THOUGHTS = "<think>e</think>b"
EOS = "{{ eos_token }}"


def template(before="", end=EOS, answer="{{ m.content }}"):
    """A template that writes every message, with an end behind every answer."""
    of_answer = "{% else %}" + answer + end + "{% endif %}{% endfor %}"
    return before + "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]" + of_answer


TEMPLATES = {
    "": "",
    "number of turns": template("{{ messages | length }}"),
    "length of the answer": template("{{ messages[-1].content | length }}"),
    "text at the end": template(end="[END]"),
    "no thoughts": template(answer="{{ m.content.split('</think>')[-1] }}"),
    "another end in between": template(end="{% if not loop.last %}.{% endif %}" + EOS),
}
KINDS = ("sft", "clm", "distill", "dpo", "reward", "kto", "process_reward", "grpo")


def rows_of(kind, answer="d", turns=TURNS):
    """Two rows that an objective reads; the first has this answer."""
    messages = [{"role": role, "content": text} for role, text in turns]
    asked, pair = messages[:-1], (answer, "x")
    if kind in ("dpo", "reward"):
        return [{"prompt": asked, "chosen": one, "rejected": "y"} for one in pair]
    if kind in ("kto", "process_reward"):
        return [
            {"prompt": asked, "completion": one, "label": one == answer} for one in pair
        ]  # fmt: skip
    if kind == "grpo":
        asked[-1]["content"] = answer
        return [{"prompt": asked}, {"prompt": asked[:1]}]
    return [{"messages": [*asked, {"role": "assistant", "content": one}]} for one in pair]


def settings(workshop, kind, rows, template):
    own = {
        "data__train": str(write_jsonl(workshop.folder / "rows.jsonl", rows)),
        "objective__kind": kind, "model__config": TINY_LLAMA, "data__max_length": 100,
    }  # fmt: skip
    if kind == "process_reward":
        own["data__format"] = "unpaired"
    if kind == "distill":
        own["objective__teacher"] = str(workshop.folder)
    if kind == "grpo":
        own["objective__rewards"] = [{"kind": "contains", "text": "a"}]
        own["objective__rollouts"] = {"max_new_tokens": 8}
    if template:
        (workshop.folder / "t.jinja").write_text(TEMPLATES[template])
        own["data__template"] = str(workshop.folder / "t.jinja")
    return own


def outcome(workshop, own):
    """Return the error of a check, or nothing."""
    try:
        workshop.check(**own)
    except UserError as exc:
        return str(exc)
    return ""


ADVISED = re.compile(
    r"((?:data|objective)\.\w+)(?:: | to )((?:\w+|, (?!or |as |which )| or (?!data))+)"
)


def advised(message):
    """Return the settings that an error says to set, each with its values."""
    said = message.partition("; ")[2].partition("; the row: ")[0]
    return [
        (key, value)
        for key, values in ADVISED.findall(said)
        for value in re.split(r", | or ", values)
    ]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "distill"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_every_setting_that_an_error_advises_works(workshop, kind, template):
    answer = THOUGHTS if template == "no thoughts" else "d" if template else LONG
    own = settings(workshop, kind, rows_of(kind, answer), template)
    before = outcome(workshop, own)
    assert template or "over data.max_length 100" in before
    for key, value in advised(before):
        number = int(value) if value.isdigit() else value
        after = outcome(workshop, own | {key.replace(".", "__"): number})
        assert after != before, (key, value, before)
        assert f"  {key}:" not in after, (key, value, before, after)


def test_advice_is_found_in_errors():
    assert advised("r:1: long, over data.max_length 9; set data.max_length: 64, or data.truncation "
                   "to right, left or drop") == [
        ("data.max_length", "64"), ("data.truncation", "right"), ("data.truncation", "left"),
        ("data.truncation", "drop"),
    ]  # fmt: skip
    assert advised("t; use data.loss_on: each_turn or last_turn, or a template") == [
        ("data.loss_on", "each_turn"), ("data.loss_on", "last_turn"),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["loss_on", "truncation"])
def test_the_table_of_objectives_says_which_settings_the_rules_take(workshop, kind, name):
    usual = {"loss_on": "completion", "truncation": "error"}[name]
    field = configs.Data.model_fields[name]
    for value in set(field.annotation.__args__) - {usual, "all"}:
        own = settings(workshop, kind, rows_of(kind), "")
        config = workshop.config(**own)
        config["data"][name] = value
        problem = ""
        try:
            configs.from_dict(config)
        except UserError as exc:
            problem = str(exc)
        takes = value in getattr(choices.OBJECTIVES[kind], name)
        assert (f"data.{name}:" in problem) is not takes, (kind, value, problem)
        assert takes is not bool(problem), problem
