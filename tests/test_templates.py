"""Training sees what inference renders, and exactly its answers are supervised."""

import functools
import hashlib
import json
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from finetune.data import chat_templates, templates
from finetune.data.built_in_templates import TOKENS
from finetune.data.conversations import Conversation, Message, turn_by_turn, without_thoughts
from finetune.data.places import Place
from finetune.data.templates import Template
from finetune.errors import ConfigError, DataError, UserError
from finetune.export import save
from finetune.models.load import bytes_tokenizer as load_bytes_tokenizer

SPECIAL = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}
VOCABULARY = {
    "<|im_start|>": 1,
    "<|im_end|>": 2,
    "<|eot|>": 3,
    "<start_of_turn>": 4,
    "<end_of_turn>": 5,
    "word": 6,
    **{token: 7 for tokens in TOKENS.values() for token in tokens},
}

# Chat templates as tokenizers bring them along, each with a habit of its own.
CHAT = {
    "header": """\
{%- for message in messages %}{{ '<|start|>' + message.role + '<|sep|>\n' }}
{{- message.content + '<|eot|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|sep|>\n' }}{% endif %}""",
    "writes the BOS": """\
{{- bos_token }}{% for message in messages %}
{{- '[' + message.role + '] ' + message.content + '<|eot|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}""",
    "trims": """\
{%- for message in messages %}
{{- message.role + ': ' + message.content | trim + '<|eot|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}""",
    "a space before the end of the turn": """\
{%- for message in messages %}{{ message.role + ': ' + message.content + ' <|eot|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}""",
    "text after the last turn": """\
{%- for message in messages %}{{ message.role + ': ' + message.content + '<|eot|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}
{%- else %}{{ 'The end.' + eos_token }}{% endif %}""",
    "marks the content": """\
{%- for message in messages %}{{ message.role + ': ' }}{% if message.role == 'assistant' %}
{%- generation %}{{ message.content }}{% endgeneration %}
{%- else %}{{ message.content }}{% endif %}{{ '<|eot|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}""",
    "marks the turn": """\
{%- for message in messages %}{{ message.role + ': ' }}{% if message.role == 'assistant' %}
{%- generation %}{{ message.content + '<|eot|>' }}{% endgeneration %}
{%- else %}{{ message.content + '<|eot|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}""",
}
# What the model should write for an answer, in the built-in templates.
ANSWERS = {
    "plain": "{}<|eos|>",
    "question_answer": "{}<|eos|>",
    "alpaca": "{}<|eos|>",
    "llama2": " {} <|eos|>",
    "chatml": "{}<|im_end|>",
    "vicuna": " {}<|eos|>",
    "llama3": "{}<|eot_id|>",
    "gemma": "{}<end_of_turn>",
    "phi3": "{}<|end|>",
    "mistral": " {}<|eos|>",
}
TRIMMED = ("llama3", "gemma")


def conversation(*texts: str, system: str | None = None) -> Conversation:
    """Turns of user and assistant in turn, after a system message where there is one."""
    messages = [
        Message(("user", "assistant")[i % 2], text, supervised=i % 2 == 1)
        for i, text in enumerate(texts)
    ]
    return Conversation(
        tuple([Message("system", system)] * (system is not None) + messages), Place("rows.jsonl", 3)
    )


CONVERSATIONS = {
    "one turn": conversation("What is 6 x 7?", "42"),
    "several turns": conversation("Hi", "Hello", "And you?", "Fine.\nThanks", "Bye", "Bye"),
    "system": conversation("Hi", "Hello", system="Be brief."),
    "system, several turns": conversation("Hi", "Hello", "Hi", "Hello", system="Be brief."),
    "the answer stands in the question": conversation(
        "Say: Hello", "Hello", "Again: Hello", "Hello"
    ),
    "spaces and lines at the ends": conversation(" Hi \n", "\n Hello  \n", "And? ", " Fine "),
    "text of no template": conversation(
        "{{ messages }} {% if %}", "{# no #} ### Answer:\n[INST] é🙂"
    ),
    "the prompt of an answer": conversation(
        "Hi", "### Answer:\n### Response:\n", "Hi", "assistant: [assistant]"
    ),
}


def load(
    name: str, format: str = "messages", source: object = None, vocabulary: object = VOCABULARY,
    date: str | None = None,
) -> Template:  # fmt: skip
    return chat_templates.load(name, format, source, SPECIAL, vocabulary, date)


def template(name: str) -> Template:
    """A built-in template, or one of the chat templates above."""
    return chat(CHAT[name]) if name in CHAT else load(name)


def chat(source: str, date: str | None = None) -> Template:
    return load("chat", source=source, date=date)


def refuses(match: str, error: type[UserError] = DataError) -> Any:
    """Expect an error whose message matches."""
    return pytest.raises(error, match=match)


def supervised(
    template: Template, conversation: Conversation, loss_on: str = "completion"
) -> list[str]:
    segments = template.segments(conversation, loss_on)
    return [segment.text for segment in segments if segment.supervised]


def rendered(template: Template, conversation: Conversation) -> str:
    return "".join(segment.text for segment in template.segments(conversation))


def as_inference_renders(
    tokenizer, template: Template, messages, add_generation_prompt: bool = False
) -> str:
    """The same messages through the tokenizer, as a user of the exported model will do it."""
    turns = [
        {"role": m.role, "content": m.content, **({"context": m.context} if m.context else {})}
        for m in messages
    ]
    return tokenizer.apply_chat_template(
        turns, chat_template=template.source, tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )  # fmt: skip


FOUR = conversation("Hi", "Hello", "And?", "Fine")
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)


@pytest.fixture(params=[*ANSWERS, *CHAT])
def each_template(request):
    return template(request.param)


def test_the_segments_together_are_the_text_that_inference_renders(each_template, bytes_tokenizer):
    for name, each in CONVERSATIONS.items():
        expected = as_inference_renders(bytes_tokenizer, each_template, each.messages)
        for loss_on in ("completion", "last_turn", "all"):
            segments = each_template.segments(each, loss_on)
            assert "".join(s.text for s in segments) == expected, name
            assert all(segment.text for segment in segments), name
        assert supervised(each_template, each, "all") == [rendered(each_template, each)], name


def test_every_prompt_is_what_stands_before_its_answer(each_template, bytes_tokenizer):
    """At inference the model sees the prompt; in training supervised text begins right after it."""
    for name, each in CONVERSATIONS.items():
        segments = each_template.segments(each)
        starts = [
            len("".join(s.text for s in segments[:i]))
            for i, s in enumerate(segments)
            if s.supervised
        ]
        turns = [n for n, message in enumerate(each.messages) if message.role == "assistant"]
        assert len(starts) == len(turns), name
        for turn, start in zip(turns, starts):
            before = each.messages[:turn]
            prompt = each_template.prompt(before)
            assert prompt == rendered(each_template, each)[:start], name
            assert prompt == as_inference_renders(
                bytes_tokenizer, each_template, before, add_generation_prompt=True
            )


@pytest.mark.parametrize("adds_bos", [False, True])
def test_an_exported_template_renders_what_was_trained(each_template, bytes_tokenizer, adds_bos):
    """Whole conversations, and the prompt of each answer; one BOS if the tokenizer adds one."""
    bos = bytes_tokenizer.bos_token
    if adds_bos:
        bytes_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, bytes_tokenizer.bos_token_id)]
        )
    own = each_template.prompt(FOUR.messages[:1]).startswith(bos)
    head = bos if adds_bos and not own else ""
    source = save.chat_template(each_template, bytes_tokenizer)
    exported = replace(each_template, source=source)
    for name, each in CONVERSATIONS.items():
        whole = as_inference_renders(bytes_tokenizer, exported, each.messages)
        assert whole == head + rendered(each_template, each), name
        for turn, message in enumerate(each.messages):
            if message.role == "assistant":
                before = each.messages[:turn]
                asked = as_inference_renders(bytes_tokenizer, exported, before, True)
                assert asked == head + each_template.prompt(before), name


TEXTS = st.text("ab \n#:{}%[]/<>é🙂\\'\"", min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from([*ANSWERS, *CHAT]),
    texts=st.lists(TEXTS, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0),
    system=st.none() | TEXTS,
)
def test_any_text_is_asked_as_it_is_trained(name, texts, system):
    """Whole text, every prompt and every answer, whatever stands in the messages."""
    own, whole, tokenizer = template(name), conversation(*texts, system=system), made_tokenizer()
    segments = own.segments(whole)
    text = "".join(segment.text for segment in segments)
    assert text == as_inference_renders(tokenizer, own, whole.messages)
    answers = [n for n, message in enumerate(whole.messages) if message.role == "assistant"]
    learned = [n for n, segment in enumerate(segments) if segment.supervised]
    for turn, number in zip(answers, learned, strict=True):
        before = "".join(segment.text for segment in segments[:number])
        assert before == own.prompt(whole.messages[:turn])
        answer = whole.messages[turn].content
        assert segments[number].text.strip().startswith(answer.strip())


@functools.cache
def made_tokenizer() -> Any:
    return load_bytes_tokenizer()


@pytest.mark.parametrize("name", ANSWERS)
def test_exactly_the_answers_and_their_turn_ends_are_supervised(name):
    for each in CONVERSATIONS.values():
        answers = [message.content for message in each.messages if message.supervised]
        expected = [
            ANSWERS[name].format(answer.strip() if name in TRIMMED else answer)
            for answer in answers
        ]
        assert supervised(template(name), each) == expected


@pytest.mark.parametrize("name", CHAT)
def test_chat_template_answers_and_their_turn_ends_are_supervised(name):
    expected = {
        "trims": ["Hello<|eot|>", "Fine<|eot|>"],
        "a space before the end of the turn": ["\n Hello  \n <|eot|>", " Fine  <|eot|>"],
    }
    assert supervised(
        template(name), CONVERSATIONS["spaces and lines at the ends"]
    ) == expected.get(name, ["\n Hello  \n<|eot|>", " Fine <|eot|>"])


def test_only_the_last_answer_is_supervised_on_request(each_template):
    whole = CONVERSATIONS["several turns"]
    assert supervised(each_template, whole, "last_turn") == supervised(each_template, whole)[-1:]
    assert len(supervised(each_template, whole)) == 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", "HiHello<|eos|>And?Fine<|eos|>"),
        (
            "question_answer",
            "### Question:\nHi\n\n### Answer:\nHello<|eos|>\n\n### Question:\nAnd?\n\n### "
            "Answer:\nFine<|eos|>",
        ),
        ("llama2", "[INST] Hi [/INST] Hello <|eos|>[INST] And? [/INST] Fine <|eos|>"),
        (
            "chatml",
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
            "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nFine<|im_end|>\n",
        ),
        (
            "vicuna",
            f"{VICUNA} USER: Hi ASSISTANT: Hello<|eos|>USER: And? ASSISTANT: Fine<|eos|>",
        ),
        (
            "llama3",
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nAnd?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nFine<|eot_id|>",
        ),
        (
            "gemma",
            "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
            "<start_of_turn>user\nAnd?<end_of_turn>\n<start_of_turn>model\nFine<end_of_turn>\n",
        ),
        (
            "phi3",
            "<|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>\n"
            "<|user|>\nAnd?<|end|>\n<|assistant|>\nFine<|end|>\n<|eos|>",
        ),
        ("mistral", "[INST] Hi[/INST] Hello<|eos|>[INST] And?[/INST] Fine<|eos|>"),
    ],
)  # fmt: skip
def test_the_built_in_templates_are_as_their_models_know_them(name, expected):
    assert rendered(template(name), FOUR) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", "Be brief.Hi"),
        ("question_answer", "Be brief.\n\n### Question:\nHi\n\n### Answer:\n"),
        (
            "alpaca",
            "Be brief.\n\nBelow is an instruction that describes a task. Write a response that "
            "appropriately completes the request.\n\n### Instruction:\nHi\n\n### Response:\n",
        ),
        ("llama2", "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]"),
        (
            "chatml",
            "<|im_start|>system\nBe "
            "brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("vicuna", "Be brief. USER: Hi ASSISTANT:"),
        (
            "llama3",
            "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            "gemma",
            "<start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n",
        ),
        ("phi3", "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n"),
        ("mistral", "[INST] Be brief.\n\nHi[/INST]"),
    ],
)  # fmt: skip
def test_a_system_prompt_stands_once_and_first(name, expected):
    assert template(name).prompt(conversation("Hi", system="Be brief.").messages) == expected
    whole = rendered(template(name), CONVERSATIONS["system, several turns"])
    assert whole.count("Be brief.") == 1


def test_an_empty_system_message_switches_a_default_off():
    assert template("vicuna").prompt(conversation("Hi", system="").messages) == (
        "USER: Hi ASSISTANT:"
    )


def instruction(context: str) -> Conversation:
    return Conversation(
        (Message("user", "Add.", context=context), Message("assistant", "3", supervised=True)),
        Place("r", 1),
    )


def test_alpaca_has_a_separate_section_for_input(bytes_tokenizer):
    alpaca, whole = template("alpaca"), instruction("1 + 2")
    assert rendered(alpaca, whole) == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 + 2\n\n### Response:\n3<|eos|>"
    )
    expected = as_inference_renders(bytes_tokenizer, alpaca, whole.messages)
    assert rendered(alpaca, whole) == expected
    assert "### Input:" not in rendered(alpaca, instruction(""))


def test_other_templates_append_the_input_to_the_instruction():
    assert template("question_answer").prompt(instruction("1 + 2").messages[:1]) == (
        "### Question:\nAdd.\n\n1 + 2\n\n### Answer:\n"
    )


def test_alpaca_introduces_itself_once():
    whole = rendered(template("alpaca"), CONVERSATIONS["several turns"])
    assert whole.count("Below is an instruction") == 1


def test_plain_text_is_left_as_it_is():
    text = Conversation((Message("text", " {{ text }}\n", supervised=True),), Place("r", 1))
    assert template("plain").segments(text, "all") == [templates.Segment(" {{ text }}\n", True)]


@pytest.mark.parametrize("loss_on", ["completion", "last_turn"])
def test_plain_text_has_no_answer_to_supervise(loss_on):
    text = Conversation((Message("text", "words", supervised=True),), Place("rows.txt", 5))
    with refuses(r"^rows\.txt:5: .* use objective\.kind: clm"):
        template("plain").segments(text, loss_on)


@pytest.mark.parametrize(
    ("name", "token"),
    [
        ("plain", "<|eos|>"),
        ("llama2", "<|eos|>"),
        ("chatml", "<|im_end|>"),
        ("vicuna", "<|eos|>"),
        ("llama3", "<|eot_id|>"),
        ("gemma", "<end_of_turn>"),
        ("phi3", "<|end|>"),
        ("mistral", "<|eos|>"),
        *((name, "<|eot|>") for name in CHAT),
    ],
)
def test_the_token_that_ends_an_answer_is_known(name, token):
    assert template(name).stop_token() == token


ENDS_IN_TEXT = {
    "a line": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    ),
    "a word": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}[END]{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    ),
    "a header": (
        "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n"
        "{% endfor %}{% if add_generation_prompt %}### assistant:\n{% endif %}"
    ),
}


@pytest.mark.parametrize("source", ENDS_IN_TEXT.values(), ids=ENDS_IN_TEXT)
def test_where_no_token_ends_an_answer_the_text_ends_with_the_answer(source):
    """The EOS follows it, so the model can reach it and answers hold no text of the template."""
    own, whole = chat(source), FOUR
    assert own.stop_token() is None
    assert supervised(own, conversation("Hi", "Hello")) == ["Hello"]
    assert rendered(own, conversation("Hi", "Hello")) == own.prompt(whole.messages[:1]) + "Hello"
    asked, learned = own.segments(whole, "last_turn")
    assert (asked.text, learned.text) == (own.prompt(whole.messages[:3]), "Fine")
    advice = "use data.loss_on: each_turn or last_turn, or a template"
    with refuses(rf"^rows\.jsonl:3: data\.template 'chat' .* {advice}"):
        own.segments(whole)


# {% generation %} marks


def test_generation_marks_decide_which_answer_text_is_supervised():
    """As in SmolLM3, marks hold the header (which ends the prompt) and the line after the turn."""
    source = (
        "{%- for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ '<|im_start|>assistant\n' + m.content + '<|im_end|>\n' }}{% "
        "endgeneration %}"
        "{% else %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    answers = ["Hello<|im_end|>\n", "Fine<|im_end|>\n"]
    assert supervised(chat(source), conversation("Hi", "Hello")) == answers[:1]
    assert supervised(chat(source), FOUR) == answers
    assert supervised(chat(source), FOUR, "last_turn") == answers[1:]
    assert chat(source).stop_token() == "<|im_end|>"


@pytest.mark.parametrize(
    ("source", "marked"),
    [
        ("{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration "
         "%}", 1),
        ("{% for m in messages %}{% if loop.last %}{% generation %}{{ m.content }}{% endgeneration "
         "%}{% else %}{{ m.content }}{% endif %}{% endfor %}", 1),
        ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor "
         "%}", 4),
    ],
)  # fmt: skip
def test_marks_must_surround_each_answer_once(source, marked):
    what = f"marks {marked} {{% generation %}} blocks for 2 assistant messages"
    with refuses(rf"^rows\.jsonl:3: data\.template 'chat' {what}"):
        chat(source).segments(conversation("a", "b", "c", "d"))


def test_marks_may_trim_on_both_sides():
    source = (
        "{% for m in messages %}{%- if m.role == 'assistant' -%}{%- generation -%}{{ m.content }}"
        "{%- endgeneration -%}{% else %}{{ m.content }}{% endif %}{{ '<|eot|>' }}{% endfor %}"
    )
    assert supervised(chat(source), conversation("Hi", "Hello")) == ["Hello<|eot|>"]


# Templates that would train something else than what is asked


DROPS = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
DROPS_EARLIER = (
    "{% for m in messages %}{% if m.role == 'user' or loop.last %}{{ m.content + '<|eot|>' }}"
    "{% endif %}{% endfor %}"
)
SHOUTS = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
HIDES_THOUGHTS = """\
{%- for m in messages %}{% if m.role == 'assistant' and not loop.last %}
{{- 'assistant: ' + m.content.split('</think>')[-1] }}
{%- else %}{{ m.role + ': ' + m.content }}{% endif %}{{ '<|eot|>' }}{% endfor %}
{%- if add_generation_prompt %}assistant: {% endif %}"""
POINTS_AT_THE_LAST = """\
{%- for m in messages %}{{ '(now) ' if loop.last else '' }}
{{- m.role + ': ' + m.content + '<|eot|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""
WRITES_TWICE = (
    "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ m.content }}"
    "{% endif %}<|eot|>{% endfor %}"
)
MARKS_THE_SECOND = WRITES_TWICE.replace(
    "%}{{ m.content }}{% endif", "%}{% generation %}{{ m.content }}{% endgeneration %}{% endif"
)
RAISES = "{% if messages | length > 1 %}{{ raise_exception('one message only') }}{% endif %}"


@pytest.mark.parametrize(
    ("source", "texts", "says"),
    [
        (
            DROPS, ("Hi", "Hello"),
            "drops the answer in message 2 ('Hello'); use another data.template",
        ),
        (DROPS_EARLIER, ("Hi", "Hello", "And?", "Fine"), "drops the answer in message 2 ('Hello')"),
        (SHOUTS, ("Hi", "Hello"), "drops or rewrites the answer 'Hello'"),
        (SHOUTS, ("Hi", "HELLO"), "drops or changes the user message 1 ('Hi')"),
        (WRITES_TWICE, ("Hi", "Hello"), "writes the answer in message 2 more than once ('Hello')"),
        (
            MARKS_THE_SECOND, ("Hi", "Hello"),
            "writes the answer in message 2 more than once ('Hello')",
        ),
        (
            HIDES_THOUGHTS, ("Hi", "<think>hm</think>Hello", "And?", "Fine"),
            "renders the answer in message 2 differently once later turns are there",
        ),
        (
            POINTS_AT_THE_LAST, ("Hi", "Hello"),
            "renders the prompt of message 2 differently once the answer is there",
        ),
        (RAISES, ("Hi", "Hello"), "fails: TemplateError: one message only"),
        ("{{ messages[7].content }}", ("Hi", "Hello"), "fails: "),
        ("{% for m in messages %}", ("Hi", "Hello"), "fails: "),
        ("{{ messages | no_such_filter }}", ("Hi", "Hello"), "fails: "),
        ("{{ 1 + messages }}", ("Hi", "Hello"), "fails: "),
    ],
    ids=[
        "drops", "drops an earlier answer", "rewrites", "rewrites the question", "twice",
        "twice with marks", "hides thoughts", "prompt changes", "raises", "undefined", "syntax",
        "filter", "type",
    ],
)  # fmt: skip
def test_a_template_that_changes_answers_is_refused(source, texts, says):
    with pytest.raises(UserError) as caught:
        chat(source).segments(conversation(*texts))
    assert str(caught.value).startswith("rows.jsonl:3: data.template 'chat'")
    assert says in str(caught.value)


WITHOUT_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CUTS_QUESTIONS = (
    "{% for m in messages %}{{ m.content[:2] if m.role == 'user' else m.content }}<|eot|>"
    "{% endfor %}"
)


@pytest.mark.parametrize("loss_on", ["completion", "last_turn", "all"])
@pytest.mark.parametrize(
    ("source", "whole", "says"),
    [
        (
            WITHOUT_SYSTEM, conversation("Hi", "Hello", system="Be brief."),
            r"the system message 1 \('Be brief.'\)",
        ),
        (CUTS_QUESTIONS, FOUR, r"the user message 3 \('And\?'\)"),
    ],
)  # fmt: skip
def test_a_template_that_loses_a_part_of_the_prompt_is_refused(source, whole, says, loss_on):
    with refuses(rf"^rows\.jsonl:3: data\.template 'chat' drops or changes {says}"):
        chat(source).segments(whole, loss_on)


def test_a_dropped_earlier_answer_is_detected_with_last_turn():
    with refuses(r"drops or changes the assistant message 2 \('Hello'\)"):
        chat(DROPS_EARLIER).segments(FOUR, "last_turn")


def test_a_dropped_instruction_input_is_detected():
    own = chat(
        "{% for message in messages %}{{ message.content }}{% if message.context == '1' %}"
        "{{ message.context }}{% endif %}<|eot|>{% endfor %}"
    )
    assert own.segments(instruction("1"))
    with refuses("drops or changes the user message 1"):
        own.segments(instruction("1 + 2"))


def test_earlier_thoughts_may_be_hidden_with_last_turn():
    whole = conversation("Hi", "<think>hm</think>Hello", "And?", "<think>so</think>Fine")
    assert supervised(chat(HIDES_THOUGHTS), whole, "last_turn") == ["<think>so</think>Fine<|eot|>"]


def test_a_prompt_that_cannot_be_rendered_is_refused():
    says = r"^the prompt:1: data\.template 'chat' fails: TemplateError: one message only"
    with refuses(says):
        chat(RAISES).prompt(conversation("Hi", "Hello").messages)


# Finding a template


@pytest.mark.parametrize(
    ("format", "chat_template", "name"),
    [
        ("text", None, "plain"),
        ("text", "{{ x }}", "plain"),
        ("prompt_completion", "{{ x }}", "plain"),
        ("question_answer", None, "question_answer"),
        ("instruction", None, "alpaca"),
        ("messages", None, "chatml"),
        ("question_answer", "{{ x }}", "chat"),
        ("instruction", "{{ x }}", "chat"),
        ("messages", "{{ x }}", "chat"),
    ],
)
def test_auto_takes_the_chat_template_or_the_usual_one_of_the_format(format, chat_template, name):
    assert load("auto", format, chat_template).name == name


@pytest.mark.parametrize("name", ["chatml", "auto"])
@pytest.mark.parametrize(
    ("vocabulary", "missing"),
    [
        ({}, "<|im_start|> and <|im_end|>"),
        ({"<|im_start|>": 1}, "<|im_end|>"),
        ({"<|im_end|>": 1}, "<|im_start|>"),
    ],
)
def test_chatml_needs_its_tokens(name, vocabulary, missing):
    says = f"the tokenizer has no {missing}; add them with model.new_tokens: ["
    with refuses(re.escape(says)):
        load(name, vocabulary=vocabulary)


@pytest.mark.parametrize("name", TOKENS)
def test_a_template_with_markers_names_those_that_the_tokenizer_lacks(name):
    first, *others = TOKENS[name]
    says = f"{name} ends turns with the token {others[-1]}, but the tokenizer has no {first}; add "
    with refuses(re.escape(f"{says}them with model.new_tokens: [{first}], or use ")):
        load(name, vocabulary=dict.fromkeys(others, 1))


NAMED = {"rag": "{{ x }}", "tool_use": "{{ tools }}"}


@pytest.mark.parametrize(
    ("name", "source", "says"),
    [
        ("chat", None, "chat, but the tokenizer has no chat template; use one of plain"),
        (
            "zephyr", None,
            "'zephyr' is not one of auto, chat, plain, question_answer, alpaca, llama2, chatml, "
            "vicuna, llama3, gemma, phi3, mistral, or a .jinja file",
        ),
        ("chat", NAMED, ".* has the chat templates rag, tool_use, but none named default"),
        ("chat", "\ud83d" + chat_templates.BUILT_IN["chatml"], "chat: holds half of a character"),
        ("chat", "{{ ['a', 'b'] | random }}", "chat: uses chance"),
        ("chat", "{{ lipsum(1) }}", "chat: uses chance"),
    ],
)  # fmt: skip
def test_a_template_that_is_missing_or_unfit_is_refused(name, source, says):
    with refuses(rf"data\.template: {says}"):
        load(name, source=source)


def test_a_template_is_read_from_a_file(tmp_path):
    path = tmp_path / "own.jinja"
    for encoding in ("utf-8", "utf-8-sig"):  # editors of Windows put a mark of the encoding first
        path.write_text(CHAT["header"], encoding=encoding)
        own = load(str(path), source="{{ other }}")
        assert own.source == CHAT["header"]
        assert supervised(own, CONVERSATIONS["one turn"]) == ["42<|eot|>"]


def test_an_unreadable_template_file_is_refused(tmp_path):
    (tmp_path / "latin.jinja").write_bytes(b"caf\xe9")
    for name in ("absent.jinja", "latin.jinja"):
        with refuses(rf"data\.template: .*{name}: cannot be read"):
            load(str(tmp_path / name))


def test_a_fingerprint_changes_with_all_that_decides_the_text():
    base = ("chat", "messages", CHAT["header"], SPECIAL, VOCABULARY)
    changes = [
        (*base[:2], CHAT["header"] + " ", SPECIAL, VOCABULARY),
        (*base[:3], {**SPECIAL, "eos_token": "</s>"}, VOCABULARY),
        (*base[:4], {**VOCABULARY, "<|other_end|>": 7}),
    ]
    prints = {chat_templates.load(*arguments).fingerprint for arguments in [base, *changes]}
    assert len(prints) == 4
    assert chat_templates.load(*base).fingerprint in prints


# Arguments


MOODY = (
    "{% set tone = 'calm' %}{% if mood is defined %}[{{ mood | tojson }}]{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant, ' ~ tone ~ ': ' if loud else 'assistant: ' }}"
    "{% endif %}"
)
VALUES = [
    False, None, 3, -2.5, 1e-07, "a'\"\\ \n{{ x }} %} \u00e9\U0001f600\u2028",
    [1, {"b": [None]}], {},
]  # fmt: skip


def with_arguments(source: str, **arguments: Any) -> Template:
    return chat_templates.load("chat", "messages", source, SPECIAL, VOCABULARY, None, arguments)


def plainly(tokenizer, template: Template, messages, **given: Any) -> str:
    """What plain apply_chat_template makes of messages with the exported template."""
    tokenizer.chat_template = save.chat_template(template, tokenizer)
    turns = [{"role": m.role, "content": m.content} for m in messages]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **given)


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_an_exported_template_has_the_arguments_of_training(bytes_tokenizer, value):
    own, asked = with_arguments(MOODY, mood=value), FOUR.messages[:1]
    prompt = f"[{json.dumps(value, ensure_ascii=False)}]user: Hi<|eot|>assistant: "
    assert own.prompt(asked) == prompt
    assert rendered(own, FOUR).startswith(prompt)
    assert plainly(bytes_tokenizer, own, asked) == prompt
    assert plainly(bytes_tokenizer, own, asked, mood=1) == "[1]" + prompt[prompt.index("user:") :]


def test_arguments_are_part_of_a_fingerprint_and_none_leave_it_as_it_was():
    plain, calm, loud = (with_arguments(MOODY, **a) for a in ({}, {"mood": 1}, {"mood": 2}))
    assert len({each.fingerprint for each in (plain, calm, loud)}) == 3
    parts = [MOODY, "bos_token=<|bos|>", "eos_token=<|eos|>", *plain.turn_ends]
    assert plain.fingerprint == hashlib.sha256("\0".join(parts).encode()).hexdigest()


@pytest.mark.parametrize(
    ("source", "name", "reads"),
    [
        (MOODY, "mod", "reads loud, mood"), (MOODY, "tone", "reads loud, mood"),
        (CHAT["header"], "mood", "reads none"), (MOODY, "messages", "reads loud, mood"),
        (CHAT["writes the BOS"], "bos_token", "reads none"),
    ],
)  # fmt: skip
def test_an_argument_that_the_template_does_not_read_is_refused(source, name, reads):
    says = rf"^data\.template_arguments: {name}: .*'chat' does not read it, and it {reads}; "
    with refuses(says, ConfigError):
        with_arguments(source, **{name: 1})


# The chat templates of real models


def real_template(real_data, name: str) -> Template:
    return chat((real_data / "chat_templates" / f"{name}.jinja").read_text())


REAL_STOPS = {"<|im_start|": "<|im_end|>", "<|bos|": "<end_of_turn>"}  # by how a text begins
REAL = {
    "qwen2.5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "gemma-3": "<end_of_turn>",
    "smollm3": "<|im_end|>",
}


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("case", ["one turn", "several turns", "system", "system, several turns"])
def test_a_real_template_renders_as_inference_does(real_data, bytes_tokenizer, name, case):
    own, whole = real_template(real_data, name), CONVERSATIONS[case]
    assert own.stop_token() == REAL[name]
    if name == "qwen3" and "several turns" in case:  # its empty thoughts leave the history
        with refuses("differently once later turns are there"):
            own.segments(whole)
        return
    assert rendered(own, whole) == as_inference_renders(bytes_tokenizer, own, whole.messages)
    for turn, message in enumerate(whole.messages):
        if message.role == "assistant":
            assert rendered(own, whole).startswith(own.prompt(whole.messages[:turn]))


def turn(role: str, content: str, **parts: Any) -> Message:
    return Message(role, content, supervised=role == "assistant", parts=parts)


ASKED = (turn("user", "Hi"), turn("assistant", "Hello"), turn("user", "And?"))
TOOL = {"type": "function", "function": {"name": "f", "description": "It.", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "y"}}}
KINDS = {
    "one": ASKED[:2],
    "several": (*ASKED, turn("assistant", "Fine")),
    "system": (turn("system", "Be brief."), *ASKED, turn("assistant", "Fine")),
    "empty system": (turn("system", ""), *ASKED[:2]),
    "thoughts inside": (
        ASKED[0], turn("assistant", "<think>\nhm\n</think>\n\nHello"), ASKED[2],
        turn("assistant", "<think>\nso\n</think>\n\nFine"),
    ),
    "thoughts beside": (
        ASKED[0], turn("assistant", "Hello", reasoning_content="hm"), ASKED[2],
        turn("assistant", "Fine", reasoning_content="so"),
    ),
    "tools": (
        ASKED[0], turn("assistant", "", tool_calls=[CALL]), turn("tool", "20", name="f"),
        turn("assistant", "Fine"),
    ),
}  # fmt: skip
LOSS_ON = ("completion", "each_turn", "last_turn", "all")
APART = ("each_turn", "last_turn")
# What each takes of KINDS; the rest in every way. Only Qwen3 has a place for thoughts.
TAKES = {
    "qwen2.5": {"thoughts beside": ()},
    "gemma-3": {"thoughts beside": (), "tools": ()},
    "smollm3": {"thoughts beside": (), "tools": ()},
    "qwen3": dict.fromkeys(
        ("several", "system", "thoughts inside", "thoughts beside", "tools"), APART
    ),
}


@pytest.mark.parametrize("name", TAKES)
@pytest.mark.parametrize("thinks", [None, False, True], ids=["", "not thinking", "thinking"])
def test_a_real_template_trains_what_it_asks_or_refuses(real_data, bytes_tokenizer, name, thinks):
    """With arguments, tools and thoughts; through the exported template, without being told."""
    source = (real_data / "chat_templates" / f"{name}.jinja").read_text()
    given = {} if thinks is None else {"enable_thinking": thinks}
    if given and name not in ("qwen3", "smollm3"):
        with refuses("enable_thinking: .* does not read it, and it reads none", ConfigError):
            with_arguments(source, **given)
        return
    own, takes = with_arguments(source, **given), TAKES[name]
    if name == "qwen3" and thinks is False:  # which asks with empty thoughts
        takes = {**takes, "thoughts inside": (), "thoughts beside": ()}
    exported = replace(own, source=save.chat_template(own, bytes_tokenizer), arguments={})
    for kind, messages in KINDS.items():
        tools = (TOOL,) if kind == "tools" else ()
        whole = Conversation(messages, Place("rows.jsonl", 3), tools)
        for loss_on in LOSS_ON:
            if loss_on not in takes.get(kind, LOSS_ON):
                with refuses(r"^rows\.jsonl:3: data\.template 'chat' ", UserError):
                    check_asked_as_trained(bytes_tokenizer, own, exported, whole, loss_on)
            else:
                check_asked_as_trained(bytes_tokenizer, own, exported, whole, loss_on)


def check_asked_as_trained(
    tokenizer: Any, own: Template, exported: Template, whole: Conversation, loss_on: str
) -> None:
    """Check text, prompts and ends against apply_chat_template with the exported template."""

    def applied(messages: tuple[Message, ...], ask: bool) -> str:
        turns = [{"role": m.role, "content": m.content, **m.parts} for m in messages]
        return tokenizer.apply_chat_template(
            turns, tools=list(whole.tools) or None, chat_template=exported.source, tokenize=False,
            add_generation_prompt=ask,
        )  # fmt: skip

    apart = loss_on == "each_turn"
    for each in turn_by_turn(whole) if apart else [whole]:
        segments = own.segments(each, "last_turn" if apart else loss_on)
        text = "".join(segment.text for segment in segments)
        assert text == applied(each.messages, False)
        assert own.stop_of(segments) == REAL_STOPS[text.partition(">")[0]]
        if loss_on == "all":
            continue
        answers = [n for n, message in enumerate(each.messages) if message.supervised]
        answers = answers if loss_on == "completion" else answers[-1:]
        starts = [
            len("".join(s.text for s in segments[:n]))
            for n, segment in enumerate(segments)
            if segment.supervised
        ]
        assert len(starts) == len(answers)
        for turn, start in zip(answers, starts):
            asked = applied(each.messages[:turn], True)
            opens = replace(own, learn_opening=own.opens_itself(segments))
            assert opens.prompt(each.messages[:turn], each.place, each.tools) == text[:start]
            assert text[:start] in (asked, asked.removesuffix(own.opening))


@pytest.mark.parametrize(
    ("name", "learned"),
    [
        ("qwen2.5", ["Hello<|im_end|>", "Fine<|im_end|>"]),
        ("gemma-3", ["Hello<end_of_turn>", "Fine<end_of_turn>"]),
        ("smollm3", ["Hello<|im_end|>\n", "Fine<|im_end|>\n"]),  # its marks hold the line end too
    ],
)
def test_real_templates_supervise_exactly_the_answers(real_data, name, learned):
    own = real_template(real_data, name)
    assert supervised(own, FOUR) == learned
    assert supervised(own, FOUR, "last_turn") == learned[-1:]


def test_qwen25_is_asked_with_an_empty_system_message_and_not_its_default(real_data):
    own = real_template(real_data, "qwen2.5")
    rest = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    empty, none = (own.prompt(conversation("Hi", system=s).messages) for s in ("", None))
    assert empty == "<|im_start|>system\n<|im_end|>\n" + rest
    assert none.endswith("You are a helpful assistant.<|im_end|>\n" + rest)
    assert rendered(own, conversation("Hi", "Hello", system="")).startswith(empty)


def test_qwen3_is_asked_with_empty_thoughts_where_rows_have_none(real_data):
    own = real_template(real_data, "qwen3")
    assert own.prompt(FOUR.messages[:3]).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert supervised(own, FOUR, "last_turn") == ["Fine<|im_end|>"]
    assert supervised(own, conversation("Hi", "<think>hm</think>Hello")) == [
        "<think>\nhm\n</think>\n\nHello<|im_end|>"
    ]


def test_smollm3_asked_not_to_think_has_empty_thoughts_in_every_prompt(real_data):
    own = real_template(real_data, "smollm3")
    whole = conversation("Hi", "Hello", "And?", "Fine", system="/no_think")
    assert supervised(own, whole) == ["Hello<|im_end|>\n", "Fine<|im_end|>\n"]
    assert own.prompt(whole.messages[:2]).endswith("<|im_start|>assistant\n<think>\n\n</think>\n")


def test_qwen3_learns_each_answer_in_an_example_of_its_own(real_data):
    """With its thoughts, and without those of the answers before, as it is asked."""
    own = real_template(real_data, "qwen3")
    texts = ("Hi", "<think>\nhm\n</think>\n\nHello", "And?", "<think>\nso\n</think>\n\nFine")
    found = [supervised(own, each, "last_turn") for each in turn_by_turn(conversation(*texts))]
    assert found == [[f"{texts[1]}<|im_end|>"], [f"{texts[3]}<|im_end|>"]]
    [_, second] = turn_by_turn(conversation(*texts))
    assert "hm" not in own.segments(second, "last_turn")[0].text
    assert supervised(own, thoughtful("hm"), "last_turn") == [
        "<think>\nhm\n</think>\n\nYo<|im_end|>"
    ]


def test_qwen3_hides_earlier_thoughts_and_needs_last_turn(real_data):
    own, hm, so = (
        real_template(real_data, "qwen3"),
        "<think>\nhm\n</think>",
        "<think>\nso\n</think>",
    )
    whole = conversation("Hi", f"{hm}\n\nHello", "And?", f"{so}\n\nFine")
    with refuses(r"rows\.jsonl:3: .*data\.loss_on: each_turn or last_turn"):
        own.segments(whole)
    assert supervised(own, whole, "last_turn") == [f"{so}\n\nFine<|im_end|>"]


@pytest.mark.parametrize("name", ["gemma", "phi3"])
def test_a_built_in_template_writes_what_its_family_writes(real_data, name):
    """But for the BOS, which the tokenizer writes."""
    source = (real_data / "chat_templates" / "gemma-3.jinja").read_text()
    if name == "phi3":
        config = real_data / "tokenizers" / "phi-3-mini" / "tokenizer_config.json"
        source = json.loads(config.read_text())["chat_template"]
    for case, each in CONVERSATIONS.items():
        turns = rendered(chat(source), each).removeprefix("<|bos|>")
        assert rendered(load(name), each) == turns, case


def test_phi3_ends_a_turn_and_then_the_text(real_data):
    from finetune.config import Model
    from finetune.models.load import load_tokenizer

    tokenizer = load_tokenizer(Model(path=str(real_data / "tokenizers" / "phi-3-mini")))
    special, added = tokenizer.special_tokens_map, tokenizer.get_added_vocab()
    own = chat_templates.load("auto", "messages", tokenizer.chat_template, special, added)
    assert own.name == "chat"
    assert rendered(own, FOUR) == as_inference_renders(tokenizer, own, FOUR.messages)
    assert supervised(own, FOUR) == ["Hello<|end|>", "Fine<|end|>"]
    assert own.stop_token() == "<|end|>"


def test_generation_marks_do_not_hide_a_prompt_that_is_not_trained():
    """Asked with empty thoughts before the answer, trained without: two different models."""
    source = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}{{ "
        "m.content }}{{ eos_token }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:<think></think>{% endif %}"
    )
    with refuses("renders the prompt of message 2 differently once the answer is there"):
        chat(source).segments(conversation("Hi", "Hello"))


# What a template puts before an answer

TURN = "<|im_start|>{{ m.role }}\n"
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# As Qwen3: empty thoughts before the last answer, unless it has thoughts of its own.
THINKS_LAST = (
    "{% for m in messages %}" + TURN + "{% if m.role == 'assistant' and loop.last"
    " and '<think>' not in m.content %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}" + ASKS
)  # fmt: skip
THINKS_EACH = THINKS_LAST.replace("loop.last", "true")
OPENS_THOUGHTS = THINKS_EACH.replace(  # as Qwen3-Thinking: the prompt already opens them
    ASKS, "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
IGNORES_THE_ASKING = "{% for m in messages %}" + TURN + "{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize(
    ("source", "opening", "prompt"),
    [
        (THINKS_LAST, "<think>\n\n</think>\n\n", "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        (THINKS_EACH, "<think>\n\n</think>\n\n", "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        (OPENS_THOUGHTS, "\n</think>\n\n", "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        (IGNORES_THE_ASKING, "<|im_start|>assistant\n", "<|im_start|>assistant\n"),
    ],
    ids=["before the last answer", "before each", "opened by the prompt", "header"],
)
def test_text_of_the_template_before_an_answer_ends_the_prompt(source, opening, prompt):
    own, whole = chat(source), conversation("Hi", "Fine")
    asked = own.prompt(whole.messages[:1])
    assert own.opening == opening
    assert asked == "<|im_start|>user\nHi<|im_end|>\n" + prompt
    assert [s.text for s in own.segments(whole)] == [asked, "Fine<|im_end|>", "\n"]
    assert not own.opens_itself(own.segments(whole))


@pytest.mark.parametrize(
    ("source", "learned"),
    [
        (THINKS_LAST, "<think>\nhm\n</think>\n\nFine<|im_end|>"),
        (OPENS_THOUGHTS, "hm\n</think>\n\nFine<|im_end|>"),
    ],
)
def test_thoughts_of_a_row_are_supervised_without_empty_ones(source, learned):
    whole = conversation("Hi", "<think>\nhm\n</think>\n\nFine")
    assert supervised(chat(source), whole) == [learned]
    assert chat(source).opens_itself(chat(source).segments(whole))


# As Qwen3, but for earlier answers, which stay as they are.
READS_THOUGHTS = (
    "{% for m in messages %}" + TURN + "{% if m.reasoning_content %}<think>\n"
    "{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    + ASKS
)  # fmt: skip


def thoughtful(*thoughts: str) -> Conversation:
    """Questions and answers with these thoughts beside them."""
    turns = []
    for text in thoughts:
        parts = {"reasoning_content": text} if text else {}
        turns += [Message("user", "Hi"), Message("assistant", "Yo", supervised=True, parts=parts)]
    return Conversation(tuple(turns), Place("rows.jsonl", 3))


@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
def test_thoughts_beside_an_answer_are_supervised_where_the_template_writes_them(
    bytes_tokenizer, key
):
    own, whole = chat(READS_THOUGHTS.replace("reasoning_content", key)), thoughtful("hm", "")
    assert supervised(own, whole) == ["<think>\nhm\n</think>\n\nYo<|im_end|>", "Yo<|im_end|>"]
    turns = [{"role": m.role, "content": m.content, **m.parts} for m in whole.messages]
    expected = bytes_tokenizer.apply_chat_template(turns, chat_template=own.source, tokenize=False)
    assert rendered(own, whole) == expected


def test_thoughts_that_the_template_leaves_out_are_refused():
    says = r"leaves out the thoughts of message 2 \('hm'\); set data\.thinking: drop, or write them"
    with refuses(says):
        chat(THINKS_LAST).segments(thoughtful("hm"))
    assert supervised(chat(THINKS_LAST), without_thoughts(thoughtful("hm"))) == ["Yo<|im_end|>"]


@pytest.mark.parametrize(
    ("answer", "left"),
    [
        ("<think>\nhm\n</think>\n\nFine", "Fine"), ("hm</think>Fine", "Fine"), ("Fine", "Fine"),
        ("The tag <think> opens them.",) * 2,
        (" <thinking>a</thinking> Fine <think>b</think>", "Fine <think>b</think>"),
    ],
)  # fmt: skip
def test_thoughts_of_answers_are_dropped_on_request(answer, left):
    whole = conversation(f"Say {answer}", answer)
    assert [m.content for m in without_thoughts(whole).messages] == [f"Say {answer}", left]


@pytest.mark.parametrize("answer", ["<think>hm</think> ", "<think>hm"])
def test_an_answer_of_thoughts_alone_cannot_lose_them(answer):
    with refuses(
        r"^rows\.jsonl:3: message 2 holds nothing but thoughts, which data\.thinking: drop"
    ):
        without_thoughts(conversation("Hi", answer))


@pytest.mark.parametrize("answer", ["Well. <think>hm</think> 4", "Well\n<thinking>hm</thinking>"])
def test_text_before_thoughts_is_not_dropped_with_them(answer):
    with refuses(r"^rows\.jsonl:3: message 2 has text before its thoughts"):
        without_thoughts(conversation("Hi", answer))


def test_rows_without_thoughts_are_supervised_on_empty_ones():
    own = replace(chat(THINKS_LAST), learn_opening=True)
    assert own.prompt(conversation("Hi").messages).endswith("<|im_start|>assistant\n")
    assert supervised(own, conversation("Hi", "Fine")) == ["<think>\n\n</think>\n\nFine<|im_end|>"]


@pytest.mark.parametrize("learn_opening", [False, True])
def test_an_earlier_answer_without_what_the_last_has_before_it_is_refused(learn_opening):
    own = replace(chat(THINKS_LAST), learn_opening=learn_opening)
    with refuses(
        r"message 2 differently once later turns are there.* data\.loss_on: each_turn or last_turn"
    ):
        own.segments(FOUR)
    assert len(supervised(own, FOUR, "last_turn")) == 1
    # What depends on the place alone is asked as it is trained.
    by_place = chat(THINKS_LAST.replace("loop.last", "loop.index > 2"))
    assert len(supervised(replace(by_place, learn_opening=learn_opening), FOUR)) == 2


def test_an_end_of_turn_that_only_the_last_answer_has_is_refused():
    source = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '<|eot|>' if loop.last or m.role "
        "== 'user' else ';' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with refuses("message 2 differently once later turns are there"):
        chat(source).segments(FOUR)


def test_white_space_before_an_answer_stays_with_the_answer():
    """Llama-2's own template; tokenizers join the space with the first word."""
    own = chat(
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} "
        "{{ m.content }} <|eot|>{% endif %}{% endfor %}"
    )
    assert own.opening == ""
    assert supervised(own, FOUR) == [" Hello <|eot|>", " Fine <|eot|>"]


# Rows that fit, where the shortest conversation does not


OPENS_AND_KEEPS = IGNORES_THE_ASKING + ASKS.replace("assistant\n", "assistant\n<think>\n")


def test_a_template_is_asked_for_its_end_with_a_row_that_fits():
    """As DeepSeek-R1's, where the rows begin with what the prompt already opens."""
    fits = conversation("Hi", "<think>\nhm\n</think>\n\nHello")
    with refuses("renders the prompt of message 2 differently"):
        chat(OPENS_AND_KEEPS).stop_token()
    assert replace(chat(OPENS_AND_KEEPS), example=fits).stop_token() == "<|im_end|>"
    assert supervised(chat(OPENS_AND_KEEPS), fits) == ["hm\n</think>\n\nHello<|im_end|>"]
    with refuses(r"^rows\.jsonl:3: "):
        replace(chat(OPENS_AND_KEEPS), example=conversation("Hi", "Hello")).stop_token()


# Templates that take only some rows

DEMANDS = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('system message needed') }}{% endif %}"
    + IGNORES_THE_ASKING + ASKS
)  # fmt: skip
REFUSES = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + IGNORES_THE_ASKING + ASKS
)  # fmt: skip


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (WITHOUT_SYSTEM, "would be ignored: "),
        (REFUSES, "takes no system message: TemplateError: no system role; "),
    ],
)
def test_an_unsupported_system_prompt_is_reported_as_a_setting_error(source, says):
    system = Message("system", "Be brief.", from_setting=True)
    whole = Conversation((system, *conversation("Hi", "Hello").messages), Place("rows.jsonl", 3))
    advice = "remove the setting, or use another data.template"
    with refuses(rf"^data\.system_prompt: .*{says}.*{advice}", ConfigError):
        chat(source).segments(whole)


@pytest.mark.parametrize(
    ("source", "fits", "says"),
    [
        (DEMANDS, "Be brief.", "system .*; it needs a system message: set data.system_prompt, "),
        (REFUSES, None, "no system .*; it takes no system message: take it out"),
    ],
)
def test_a_template_refuses_only_the_rows_that_do_not_fit_it(source, fits, says):
    own, other = chat(source), None if fits else "Be brief."
    assert own.stop_token() == "<|im_end|>"
    assert supervised(own, conversation("Hi", "Hello", system=fits)) == ["Hello<|im_end|>"]
    with refuses(rf"^rows\.jsonl:3: data\.template 'chat' fails: TemplateError: {says}"):
        own.segments(conversation("Hi", "Hello", system=other))


@pytest.mark.parametrize("half", [r"{{ '\ud83d' }}", r"{{ messages[0].content ~ '\ude00' }}"])
def test_a_template_that_writes_a_lone_surrogate_is_refused(half):
    with refuses(r"rows\.jsonl:3: data\.template 'chat' writes '\\ud...', half of a character"):
        chat(half + chat_templates.BUILT_IN["question_answer"]).segments(
            conversation("Hi", "Hello")
        )


def test_a_template_syntax_error_is_reported_with_its_line():
    says = r"rows\.jsonl:3: .* \(line 2 of the template\)"
    with refuses(says, templates.BrokenTemplate):
        chat("\n{{ messages | no_such_filter }}").segments(conversation("Hi", "Hello"))


# Templates that render other text on another day, or each time


def test_a_template_is_given_one_date():
    source = "{{ strftime_now('%d %b %Y') }}|" + IGNORES_THE_ASKING
    own, later = chat(source, "2001-02-03"), chat(source, "2001-02-04")
    assert rendered(own, conversation("Hi", "Hello")).startswith("03 Feb 2001|")
    assert own.fingerprint != later.fingerprint


def test_a_template_without_a_date_does_not_depend_on_the_day():
    days = [load("chatml", date=day) for day in ("2001-02-03", "2001-02-04")]
    assert days[0].fingerprint == days[1].fingerprint
    assert days[0].date is None


@pytest.mark.parametrize("form", ["%H:%M:%S", "%d %b %Y %I %p", "%f"])
def test_a_template_that_writes_the_time_is_refused(form):
    source = "{{ strftime_now('" + form + "') }}|" + IGNORES_THE_ASKING
    with refuses(r"data\.template: chat: writes the time, .*; take it out"):
        chat(source, "2001-02-03")


def test_a_template_may_hold_the_word_random():
    assert chat("a random {{ messages[0].content }}")


# Several chat templates


def test_the_default_of_several_chat_templates_is_used():
    assert load("auto", source={**NAMED, "default": CHAT["header"]}).source == CHAT["header"]
    assert load("chatml", source=NAMED).name == "chatml"


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    ],
    ids=["zero", "endless"],
)
def test_a_template_that_exhausts_python_is_reported(source, error):
    with refuses(rf"rows\.jsonl:3: data\.template 'chat' fails: {error}"):
        chat(source).segments(conversation("Hi", "Hello"))


ELSE = (
    "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}{% else %}A: {{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "{% endfor %}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
)
CALLED = (
    Message("user", "3*4?"),
    Message("assistant", "", parts={"tool_calls": [
        {"type": "function", "function": {"name": "calc", "arguments": {"a": 3}}}
    ]}),
    Message("tool", "12"),
)  # fmt: skip
AS_ANSWERS = r"rows.jsonl:1: .* writes messages of the role tool as answers of the model; use the"


def test_a_template_that_writes_other_roles_as_answers_is_refused_where_it_trains_and_asks():
    """Learned, or asked, a result of a tool would be what the model itself had said."""
    own, place = Template("own", ELSE, {"eos_token": "</s>"}, ("</s>",)), Place("rows.jsonl", 1)
    answered = Conversation((*CALLED, Message("assistant", "12", supervised=True)), place)
    for ask in (lambda: own.segments(answered), lambda: own.prompt(CALLED, place)):
        with refuses(AS_ANSWERS):
            ask()
    system = Message("system", "Be nice", from_setting=True)
    for ask in (
        lambda: own.segments(answered.with_messages((system, CALLED[0], answered.messages[-1]))),
        lambda: own.prompt((system, CALLED[0]), place),
    ):
        with refuses("data.system_prompt: .* writes system messages as answers", ConfigError):
            ask()
    no_roles = replace(own, source="{% for m in messages %}{{ m.content }}{% endfor %}")
    assert no_roles.prompt((replace(system, from_setting=False), CALLED[0])) == "Be nice3*4?"


def test_what_a_prompt_would_drop_is_refused_as_in_training():
    own, place = load("chatml"), Place("rows.jsonl", 1)
    with refuses(r"rows.jsonl:1: .* drops the name of tool call 1 in message 2"):
        own.prompt(CALLED, place)
    deaf = replace(own, source="{{ messages[-1].content }}")
    with refuses(r"rows.jsonl:1: .* drops or changes the user message 1 \('3\*4\?'\)"):
        deaf.prompt((CALLED[0], Message("assistant", "b"), Message("user", "c")), place)
