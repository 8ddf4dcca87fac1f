"""Text around contents that is kept for the next row is what the template would write."""

import itertools
import random

import pytest
from test_templates import CHAT, SPECIAL, VOCABULARY

from finetune.data.built_in_templates import BUILT_IN
from finetune.data.conversations import Conversation, Message
from finetune.data.places import Place
from finetune.data.templates import Template

PLACE, ROLES = Place("rows.jsonl", 1), ("system", "user", "assistant")
TEXTS = (
    "", "a", " a b \n", "  ", "\n\n", "{{ x }}", "\u2003e\u2003", "\ufdd10\ufdd1", "[INST]",
    "\ud800", "last", "system", "é\u00a0",
)  # fmt: skip
# Templates that copy contents in other ways than the built-in ones.
COPIES = {
    "a name for the text": """\
{% set loop_messages = messages %}{% for message in loop_messages %}
{% set content = '<' + message['role'] + '>' + message['content'] | trim + '|' %}
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}
{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}""",
    "messages behind the system one": """\
{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'].strip() %}
{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}
{{ system }}{% for message in rest %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}
{% endif %}{{ message['role'] ~ ': ' ~ message['content'] ~ eos_token }}{% endfor %}""",
    "the type of a content, and keys": """\
{% for message in messages %}{% if message.content is string and 'content' in message %}
{{ message.content if message.role != 'user' else '? ' + message.content }}{{ messages | length }}
{% endif %}{% if loop.last and add_generation_prompt %}>{% endif %}{% endfor %}""",
    "another date": "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}",
}
DOES_MORE = {
    "asks for a content": "{% for m in messages %}{% if m.content == 'last' %}!{% endif %}"
    "{{ m.content }}{% endfor %}",
    "asks for what a name has": "{% set c = messages[-1].content %}{% if c %}{{ c }}!{% endif %}",
    "searches it": "{% for m in messages %}{{ 'a' in m.content }}{{ m.content }}{% endfor %}",
    "takes another": "{% for m in messages %}{{ m.content or 'none' }}{% endfor %}",
    "changes it": "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
    "measures it": "{% for m in messages %}{{ m.content | length }}{{ m.content }}{% endfor %}",
    "trims more": "{% for m in messages %}{{ (' ' + m.content) | trim }}{% endfor %}",
    "trims letters": "{% for m in messages %}{{ m.content | trim('a') }}{% endfor %}",
    "strips letters": "{% for m in messages %}{{ m.content.strip('a') }}{% endfor %}",
    "strips one end": "{% for m in messages %}{{ m.content.lstrip() }}{% endfor %}",
    "cuts it": "{% for m in messages %}{{ m.content[:2] }}{% endfor %}",
    "splits it": "{% for m in messages %}{{ m.content.split('a')[-1] }}{% endfor %}",
    "formats it": "{% for m in messages %}{{ '%3s' % m.content }}{% endfor %}",
    "repeats it": "{% for m in messages %}{{ m.content * 2 }}{% endfor %}",
    "compares two": "{% if messages[0].content == messages[-1].content %}!{% endif %}",
    "writes a message": "{% for m in messages %}{{ m }}{% endfor %}",
    "writes all": "{{ messages | tojson }}",
    "values of a message": "{% for m in messages %}{{ m.values() | list }}{% endfor %}",
    "a key that varies": "{% for k in ['content'] %}{{ messages[0][k] | upper }}{% endfor %}",
    "gets it": "{{ messages[0].get('content') | upper }}",
    "of a pair": "{% for k, v in messages[0].items() %}{{ v | upper }}{% endfor %}",
    "maps": "{{ messages | map(attribute='content') | join(',') | upper }}",
    "the message before": "{% for m in messages %}{{ loop.previtem.content | upper }}{% endfor %}",
    "in a namespace": "{% set n = namespace(m=messages[0]) %}{{ n.m.content | upper }}",
    "set in a namespace": "{% set n = namespace(c='') %}{% for m in messages %}"
    "{% set n.c = m.content %}{% endfor %}{{ n.c | upper }}",
    "a macro": "{% macro f(m) %}{{ m.content | upper }}{% endmacro %}{{ f(messages[0]) }}",
    "a block that is set": "{% set c %}{{ messages[0].content }}{% endset %}{{ c | upper }}",
    "a filter on a block": "{% filter upper %}{{ messages[0].content }}{% endfilter %}",
    "in a list": "{% set c = [messages[0].content] %}{{ c[0] | upper }}",
    "a name for two": "{% set c = messages[0] %}{% set c = 'x' %}{% set c = messages %}{{ c }}",
    "a name that comes later": "{% for m in messages %}{% if c %}!{% endif %}"
    "{% set c = m.content %}{% endfor %}{% set c = messages[0].content %}{{ c }}",
}


def template(source: str) -> Template:
    return Template("t", source, SPECIAL, tuple(VOCABULARY), date="2026-01-02")


def outcome(call) -> str:
    try:
        return call()
    except Exception as exc:
        return f"{type(exc).__name__}: {exc}"


def require_same(source: str) -> int:
    """Compare both ways for conversations of up to three turns; return how often text was kept."""
    drawn, made, num_kept = random.Random(1), template(source), 0
    for roles in (roles for n in (1, 2, 3) for roles in itertools.product(ROLES, repeat=n)):
        for adds in (False, True):
            messages = tuple(
                Message(role, drawn.choice(TEXTS), context=drawn.choice(("", "", " c ")))
                for role in roles
            )
            asked = Conversation(messages, PLACE)
            wanted = outcome(lambda asked=asked, adds=adds: made._run(asked, adds))
            assert outcome(lambda asked=asked, adds=adds: made._jinja(asked, adds)) == wanted
            num_kept += made._texts.get((adds, _shape(made, messages))) is not None
    return num_kept


def _shape(made: Template, messages: tuple[Message, ...]) -> tuple[tuple[str, bool], ...]:
    return tuple((each.role, made._has_context and bool(each.context)) for each in messages)


@pytest.mark.parametrize("name", [*BUILT_IN, *CHAT, *COPIES])
def test_kept_text_is_what_the_template_writes(name):
    num_kept = require_same(({**BUILT_IN, **CHAT, **COPIES})[name])
    runs_anyway = name == "vicuna" or name.startswith("marks")
    assert (num_kept == 0) == runs_anyway


@pytest.mark.parametrize("name", DOES_MORE)
def test_a_template_that_does_more_than_to_copy_contents_runs_for_each_row(name):
    assert not template(DOES_MORE[name])._copies_contents
    assert require_same(DOES_MORE[name]) == 0


def test_parts_and_tools_of_a_row_are_rendered_by_the_template():
    made = template(
        "{% for m in messages %}{{ m.content }}{{ m.name }}{% endfor %}{{ tools | tojson }}"
    )
    assert made._copies_contents
    for name in ("a", "b"):
        turns = (Message("tool", "x", parts={"name": name}), Message("user", "y"))
        asked = Conversation(turns, PLACE, ({"name": name},))
        assert made._jinja(asked, False) == f'x{name}y[{{"name": "{name}"}}]'


def test_today_is_not_kept_for_tomorrow():
    source = COPIES["another date"]
    assert template(source)._copies_contents
    assert not Template("t", source, SPECIAL)._copies_contents
