"""What is trained on is what inference renders, and exactly the answers of it are learned."""

from dataclasses import replace

import pytest

from finetune.data import templates
from finetune.data.rows import Conversation, Message, Place
from finetune.data.templates import Template
from finetune.errors import ConfigError, DataError, UserError

SPECIAL = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}
VOCABULARY = {
    "<|im_start|>": 1,
    "<|im_end|>": 2,
    "<|eot|>": 3,
    "<start_of_turn>": 4,
    "<end_of_turn>": 5,
    "word": 6,
}

# Chat templates as tokenizers bring them along, each with a habit of its own.
CHAT = {
    "header": """\
{%- for message in messages %}{{ '<|start|>' + message.role + '<|sep|>\n' + message.content + '<|eot|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|sep|>\n' }}{% endif %}""",
    "writes the BOS": """\
{{- bos_token }}{% for message in messages %}{{ '[' + message.role + '] ' + message.content + '<|eot|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}""",
    "trims": """\
{%- for message in messages %}{{ message.role + ': ' + message.content | trim + '<|eot|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}""",
    "a space before the end of the turn": """\
{%- for message in messages %}{{ message.role + ': ' + message.content + ' <|eot|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}""",
    "text after the last turn": """\
{%- for message in messages %}{{ message.role + ': ' + message.content + '<|eot|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% else %}{{ 'The end.' + eos_token }}{% endif %}""",
    "marks the content": """\
{%- for message in messages %}{{ message.role + ': ' }}{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}
{%- else %}{{ message.content }}{% endif %}{{ '<|eot|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}""",
    "marks the turn": """\
{%- for message in messages %}{{ message.role + ': ' }}{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|eot|>' }}{% endgeneration %}
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
}


def conversation(*said: str, system: str | None = None) -> Conversation:
    """Turns of user and assistant in turn, after a system message where there is one."""
    messages = [
        Message(("user", "assistant")[i % 2], text, supervised=i % 2 == 1)
        for i, text in enumerate(said)
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


def template(name: str) -> Template:
    """A built-in template, or one of the chat templates above."""
    if name in CHAT:
        return templates.load("chat", "messages", CHAT[name], SPECIAL, VOCABULARY)
    return templates.load(name, "messages", None, SPECIAL, VOCABULARY)


def chat(source: str) -> Template:
    return templates.load("chat", "messages", source, SPECIAL, VOCABULARY)


def supervised(
    template: Template, conversation: Conversation, loss_on: str = "completion"
) -> list[str]:
    return [
        segment.text for segment in template.segments(conversation, loss_on) if segment.supervised
    ]


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
        turns,
        chat_template=template.source,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
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
    """At inference the model sees the prompt; in training the supervised text begins right after
    it.
    """
    for name, each in CONVERSATIONS.items():
        segments = each_template.segments(each)
        starts = [
            len("".join(s.text for s in segments[:i]))
            for i, s in enumerate(segments)
            if s.supervised
        ]
        turns = [
            number for number, message in enumerate(each.messages) if message.role == "assistant"
        ]
        assert len(starts) == len(turns), name
        for turn, start in zip(turns, starts):
            before = each.messages[:turn]
            prompt = each_template.prompt(before)
            assert prompt == rendered(each_template, each)[:start], name
            assert prompt == as_inference_renders(
                bytes_tokenizer, each_template, before, add_generation_prompt=True
            )


@pytest.mark.parametrize("name", ANSWERS)
def test_exactly_the_answers_and_the_ends_of_their_turns_are_learned(name):
    for each in CONVERSATIONS.values():
        answers = [message.content for message in each.messages if message.supervised]
        assert supervised(template(name), each) == [
            ANSWERS[name].format(answer) for answer in answers
        ]


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("header", ["\n Hello  \n<|eot|>", " Fine <|eot|>"]),
        ("writes the BOS", ["\n Hello  \n<|eot|>", " Fine <|eot|>"]),
        ("trims", ["Hello<|eot|>", "Fine<|eot|>"]),
        ("a space before the end of the turn", ["\n Hello  \n <|eot|>", " Fine  <|eot|>"]),
        ("text after the last turn", ["\n Hello  \n<|eot|>", " Fine <|eot|>"]),
        ("marks the content", ["\n Hello  \n<|eot|>", " Fine <|eot|>"]),
        ("marks the turn", ["\n Hello  \n<|eot|>", " Fine <|eot|>"]),
    ],
)
def test_of_a_chat_template_the_answers_and_the_ends_of_their_turns_are_learned(name, answers):
    assert supervised(template(name), CONVERSATIONS["spaces and lines at the ends"]) == answers


def test_only_the_last_answer_is_learned_where_that_is_asked(each_template):
    whole = CONVERSATIONS["several turns"]
    assert supervised(each_template, whole, "last_turn") == supervised(each_template, whole)[-1:]
    assert len(supervised(each_template, whole)) == 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", "HiHello<|eos|>And?Fine<|eos|>"),
        ("question_answer", "### Question:\nHi\n\n### Answer:\nHello<|eos|>\n\n### Question:\nAnd?\n\n### Answer:\nFine<|eos|>"),
        ("llama2", "[INST] Hi [/INST] Hello <|eos|>[INST] And? [/INST] Fine <|eos|>"),
        ("chatml", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nFine<|im_end|>\n"),
    ],
)  # fmt: skip
def test_the_built_in_templates_are_as_their_models_know_them(name, expected):
    assert rendered(template(name), conversation("Hi", "Hello", "And?", "Fine")) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", "Be brief.Hi"),
        ("question_answer", "Be brief.\n\n### Question:\nHi\n\n### Answer:\n"),
        ("alpaca", "Be brief.\n\nBelow is an instruction that describes a task. Write a response that appropriately completes the request.\n\n### Instruction:\nHi\n\n### Response:\n"),
        ("llama2", "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]"),
        ("chatml", "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
    ],
)  # fmt: skip
def test_a_system_prompt_stands_once_and_first(name, expected):
    assert template(name).prompt(conversation("Hi", system="Be brief.").messages) == expected
    whole = rendered(template(name), CONVERSATIONS["system, several turns"])
    assert whole.count("Be brief.") == 1


def instruction(context: str) -> Conversation:
    return Conversation(
        (Message("user", "Add.", context=context), Message("assistant", "3", supervised=True)),
        Place("r", 1),
    )


def test_alpaca_gives_the_input_of_an_instruction_a_place_of_its_own():
    assert rendered(template("alpaca"), instruction("1 + 2")) == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 + 2\n\n### Response:\n3<|eos|>"
    )
    assert "### Input:" not in rendered(template("alpaca"), instruction(""))


def test_elsewhere_the_input_of_an_instruction_follows_it():
    assert template("question_answer").prompt(instruction("1 + 2").messages[:1]) == (
        "### Question:\nAdd.\n\n1 + 2\n\n### Answer:\n"
    )


def test_an_input_is_rendered_as_inference_renders_it(bytes_tokenizer):
    whole = instruction("1 + 2")
    assert rendered(template("alpaca"), whole) == as_inference_renders(
        bytes_tokenizer, template("alpaca"), whole.messages
    )


def test_alpaca_introduces_itself_once():
    assert (
        rendered(template("alpaca"), CONVERSATIONS["several turns"]).count(
            "Below is an instruction"
        )
        == 1
    )


def test_plain_text_is_left_as_it_is():
    text = Conversation((Message("text", " {{ text }}\n", supervised=True),), Place("r", 1))
    assert template("plain").segments(text, "all") == [templates.Segment(" {{ text }}\n", True)]


@pytest.mark.parametrize("loss_on", ["completion", "last_turn"])
def test_plain_text_has_no_answer_to_learn(loss_on):
    text = Conversation((Message("text", "words", supervised=True),), Place("rows.txt", 5))
    with pytest.raises(DataError, match=r"^rows\.txt:5: .* use objective\.kind: clm"):
        template("plain").segments(text, loss_on)


@pytest.mark.parametrize(
    ("name", "token"),
    [
        ("plain", "<|eos|>"),
        ("llama2", "<|eos|>"),
        ("chatml", "<|im_end|>"),
        *((name, "<|eot|>") for name in CHAT),
    ],
)
def test_the_token_that_ends_an_answer_is_known(name, token):
    assert template(name).stop_token() == token


ENDS_IN_TEXT = {
    "a line": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
    "a word": "{% for m in messages %}{{ m.role }}: {{ m.content }}[END]{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
    "a header": "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}{% if add_generation_prompt %}### assistant:\n{% endif %}",
}


@pytest.mark.parametrize("source", ENDS_IN_TEXT.values(), ids=ENDS_IN_TEXT)
def test_where_no_token_ends_an_answer_the_text_ends_with_the_answer(source):
    """The EOS comes behind it: the model can reach it, and its answers hold no text of the
    template.
    """
    own, whole = chat(source), conversation("Hi", "Hello", "And?", "Fine")
    assert own.stop_token() is None
    assert supervised(own, conversation("Hi", "Hello")) == ["Hello"]
    assert rendered(own, conversation("Hi", "Hello")) == own.prompt(whole.messages[:1]) + "Hello"
    asked, learned = own.segments(whole, "last_turn")
    assert (asked.text, learned.text) == (own.prompt(whole.messages[:3]), "Fine")
    with pytest.raises(
        DataError,
        match=r"^rows\.jsonl:3: data\.template 'chat' .* set data\.loss_on: last_turn, or use a template",
    ):
        own.segments(whole)


# {% generation %} marks


def test_marks_decide_what_is_learned_of_what_the_model_writes():
    """The header is inside the marks, as SmolLM3 has it, but the prompt ends with it; the line
    after the turn is inside too.
    """
    source = (
        "{%- for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ '<|im_start|>assistant\n' + m.content + '<|im_end|>\n' }}{% "
        "endgeneration %}"
        "{% else %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    answers = ["Hello<|im_end|>\n", "Fine<|im_end|>\n"]
    assert supervised(chat(source), conversation("Hi", "Hello")) == answers[:1]
    assert supervised(chat(source), conversation("Hi", "Hello", "And?", "Fine")) == answers
    assert (
        supervised(chat(source), conversation("Hi", "Hello", "And?", "Fine"), "last_turn")
        == answers[1:]
    )
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
def test_marks_that_are_not_one_around_each_answer_are_refused(source, marked):
    with pytest.raises(DataError) as caught:
        chat(source).segments(conversation("a", "b", "c", "d"))
    assert str(caught.value).startswith("rows.jsonl:3: data.template 'chat'")
    assert f"marks {marked} {{% generation %}} blocks for 2 assistant messages" in str(caught.value)


def test_marks_may_trim_on_both_sides():
    source = "{% for m in messages %}{%- if m.role == 'assistant' -%}{%- generation -%}{{ m.content }}{%- endgeneration -%}{% else %}{{ m.content }}{% endif %}{{ '<|eot|>' }}{% endfor %}"
    assert supervised(chat(source), conversation("Hi", "Hello")) == ["Hello<|eot|>"]


# Templates that would train something else than what is asked


DROPS = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
DROPS_EARLIER = "{% for m in messages %}{% if m.role == 'user' or loop.last %}{{ m.content + '<|eot|>' }}{% endif %}{% endfor %}"
SHOUTS = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
HIDES_THOUGHTS = """\
{%- for m in messages %}{% if m.role == 'assistant' and not loop.last %}{{ 'assistant: ' + m.content.split('</think>')[-1] }}
{%- else %}{{ m.role + ': ' + m.content }}{% endif %}{{ '<|eot|>' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
POINTS_AT_THE_LAST = """\
{%- for m in messages %}{{ ('(now) ' if loop.last else '') + m.role + ': ' + m.content + '<|eot|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""
WRITES_TWICE = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ m.content }}{% endif %}<|eot|>{% endfor %}"
MARKS_THE_SECOND = WRITES_TWICE.replace(
    "%}{{ m.content }}{% endif", "%}{% generation %}{{ m.content }}{% endgeneration %}{% endif"
)
RAISES = "{% if messages | length > 1 %}{{ raise_exception('one message only') }}{% endif %}"


@pytest.mark.parametrize(
    ("source", "said", "says"),
    [
        (DROPS, ("Hi", "Hello"), "drops the answer in message 2 ('Hello'); use another data.template"),
        (DROPS_EARLIER, ("Hi", "Hello", "And?", "Fine"), "drops the answer in message 2 ('Hello')"),
        (SHOUTS, ("Hi", "Hello"), "drops or rewrites the answer 'Hello'"),
        (SHOUTS, ("Hi", "HELLO"), "drops or changes the user message 1 ('Hi')"),
        (WRITES_TWICE, ("Hi", "Hello"), "writes the answer in message 2 more than once ('Hello')"),
        (MARKS_THE_SECOND, ("Hi", "Hello"), "writes the answer in message 2 more than once ('Hello')"),
        (HIDES_THOUGHTS, ("Hi", "<think>hm</think>Hello", "And?", "Fine"), "renders the answer in message 2 differently once later turns are there"),
        (POINTS_AT_THE_LAST, ("Hi", "Hello"), "renders the prompt of message 2 differently once the answer is there"),
        (RAISES, ("Hi", "Hello"), "fails: TemplateError: one message only"),
        ("{{ messages[7].content }}", ("Hi", "Hello"), "fails: "),
        ("{% for m in messages %}", ("Hi", "Hello"), "fails: "),
        ("{{ messages | no_such_filter }}", ("Hi", "Hello"), "fails: "),
        ("{{ 1 + messages }}", ("Hi", "Hello"), "fails: "),
    ],
    ids=["drops", "drops an earlier answer", "rewrites", "rewrites the question", "twice", "twice with marks", "hides thoughts", "prompt changes", "raises", "undefined", "syntax", "filter", "type"],
)  # fmt: skip
def test_a_template_that_would_train_something_else_is_refused(source, said, says):
    with pytest.raises(UserError) as caught:
        chat(source).segments(conversation(*said))
    assert str(caught.value).startswith("rows.jsonl:3: data.template 'chat'")
    assert says in str(caught.value)


WITHOUT_SYSTEM = "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}<|eot|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
CUTS_QUESTIONS = "{% for m in messages %}{{ m.content[:2] if m.role == 'user' else m.content }}<|eot|>{% endfor %}"


@pytest.mark.parametrize("loss_on", ["completion", "last_turn", "all"])
@pytest.mark.parametrize(
    ("source", "whole", "says"),
    [
        (
            WITHOUT_SYSTEM,
            conversation("Hi", "Hello", system="Be brief."),
            "the system message 1 ('Be brief.')",
        ),
        (
            CUTS_QUESTIONS,
            conversation("Hi", "Hello", "And?", "Fine"),
            "the user message 3 ('And?')",
        ),
    ],
)
def test_a_template_that_loses_a_part_of_the_prompt_is_refused(source, whole, says, loss_on):
    with pytest.raises(
        DataError, match=r"^rows\.jsonl:3: data\.template 'chat' drops or changes "
    ) as caught:
        chat(source).segments(whole, loss_on)
    assert says in str(caught.value)


def test_an_earlier_answer_that_goes_is_missed_where_only_the_last_is_learned():
    with pytest.raises(DataError, match=r"drops or changes the assistant message 2 \('Hello'\)"):
        chat(DROPS_EARLIER).segments(conversation("Hi", "Hello", "And?", "Fine"), "last_turn")


def test_a_lost_input_of_an_instruction_is_missed():
    source = "{% for m in messages %}{{ m.content }}{% if m.context == '1' %}{{ m.context }}{% endif %}<|eot|>{% endfor %}"
    own = chat(
        source.replace("m.context", "message.context")
        .replace("for m ", "for message ")
        .replace("m.content", "message.content")
    )
    assert own.segments(instruction("1"))
    with pytest.raises(DataError, match="drops or changes the user message 1"):
        own.segments(instruction("1 + 2"))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (WITHOUT_SYSTEM, "would be ignored: "),
        ("REFUSES", "takes no system message: TemplateError: no system role; "),
    ],
)
def test_a_system_prompt_that_the_template_does_not_take_is_a_mistake_of_the_setting(source, says):
    system = Message("system", "Be brief.", from_setting=True)
    whole = Conversation((system, *conversation("Hi", "Hello").messages), Place("rows.jsonl", 3))
    own = chat(REFUSES if source == "REFUSES" else source)
    with pytest.raises(
        ConfigError,
        match=rf"^data\.system_prompt: .*{says}.*remove the setting, or use another data\.template",
    ):
        own.segments(whole)


def test_thoughts_of_earlier_turns_may_be_hidden_where_only_the_last_is_learned():
    whole = conversation("Hi", "<think>hm</think>Hello", "And?", "<think>so</think>Fine")
    assert supervised(chat(HIDES_THOUGHTS), whole, "last_turn") == ["<think>so</think>Fine<|eot|>"]


def test_a_prompt_that_cannot_be_rendered_is_refused():
    with pytest.raises(
        DataError,
        match=r"^the prompt:1: data\.template 'chat' fails: TemplateError: one message only",
    ):
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
    assert templates.load("auto", format, chat_template, SPECIAL, VOCABULARY).name == name


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
    with pytest.raises(DataError) as caught:
        templates.load(name, "messages", None, SPECIAL, vocabulary)
    assert f"the tokenizer has no {missing}; add them with model.new_tokens: [" in str(caught.value)


def test_chat_needs_a_chat_template():
    with pytest.raises(
        DataError,
        match=r"data\.template: chat, but the tokenizer has no chat template; use one of plain",
    ):
        templates.load("chat", "messages", None, SPECIAL, VOCABULARY)


def test_an_unknown_template_is_told_the_known_ones():
    with pytest.raises(DataError) as caught:
        templates.load("vicuna", "messages", None, SPECIAL, VOCABULARY)
    assert (
        "data.template: 'vicuna' is not one of auto, chat, plain, question_answer, alpaca, llama2, "
        "chatml" in str(caught.value)
    )


def test_a_template_is_read_from_a_file(tmp_path):
    path = tmp_path / "own.jinja"
    for encoding in ("utf-8", "utf-8-sig"):  # editors of Windows put a mark of the encoding first
        path.write_text(CHAT["header"], encoding=encoding)
        own = templates.load(str(path), "messages", "{{ other }}", SPECIAL, VOCABULARY)
        assert own.source == CHAT["header"]
        assert supervised(own, CONVERSATIONS["one turn"]) == ["42<|eot|>"]


def test_a_template_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "latin.jinja").write_bytes(b"caf\xe9")
    for name in ("absent.jinja", "latin.jinja"):
        with pytest.raises(DataError, match=rf"data\.template: .*{name}: cannot be read"):
            templates.load(str(tmp_path / name), "messages", None, SPECIAL, VOCABULARY)


def test_a_fingerprint_changes_with_all_that_decides_the_text():
    base = ("chat", "messages", CHAT["header"], SPECIAL, VOCABULARY)
    changes = [
        (*base[:2], CHAT["header"] + " ", SPECIAL, VOCABULARY),
        (*base[:3], {**SPECIAL, "eos_token": "</s>"}, VOCABULARY),
        (*base[:4], {**VOCABULARY, "<|other_end|>": 7}),
    ]
    prints = {templates.load(*arguments).fingerprint for arguments in [base, *changes]}
    assert len(prints) == 4
    assert templates.load(*base).fingerprint in prints


# The chat templates of real models


def real_template(real_data, name: str) -> Template:
    source = (real_data / "chat_templates" / f"{name}.jinja").read_text()
    return templates.load("chat", "messages", source, SPECIAL, VOCABULARY)


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
        with pytest.raises(DataError, match="differently once later turns are there"):
            own.segments(whole)
        return
    assert rendered(own, whole) == as_inference_renders(bytes_tokenizer, own, whole.messages)
    for turn, message in enumerate(whole.messages):
        if message.role == "assistant":
            assert rendered(own, whole).startswith(own.prompt(whole.messages[:turn]))


@pytest.mark.parametrize(
    ("name", "learned"),
    [
        ("qwen2.5", ["Hello<|im_end|>", "Fine<|im_end|>"]),
        ("gemma-3", ["Hello<end_of_turn>", "Fine<end_of_turn>"]),
        ("smollm3", ["Hello<|im_end|>\n", "Fine<|im_end|>\n"]),  # its marks hold the line end too
    ],
)
def test_of_a_real_template_exactly_the_answers_are_learned(real_data, name, learned):
    whole = conversation("Hi", "Hello", "And?", "Fine")
    assert supervised(real_template(real_data, name), whole) == learned
    assert supervised(real_template(real_data, name), whole, "last_turn") == learned[-1:]


def test_qwen3_is_asked_with_empty_thoughts_where_rows_have_none(real_data):
    own, whole = real_template(real_data, "qwen3"), conversation("Hi", "Hello", "And?", "Fine")
    assert own.prompt(whole.messages[:3]).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert supervised(own, whole, "last_turn") == ["Fine<|im_end|>"]
    assert supervised(own, conversation("Hi", "<think>hm</think>Hello")) == [
        "<think>\nhm\n</think>\n\nHello<|im_end|>"
    ]


def test_smollm3_asked_not_to_think_has_empty_thoughts_in_every_prompt(real_data):
    own = real_template(real_data, "smollm3")
    whole = conversation("Hi", "Hello", "And?", "Fine", system="/no_think")
    assert supervised(own, whole) == ["Hello<|im_end|>\n", "Fine<|im_end|>\n"]
    assert own.prompt(whole.messages[:2]).endswith("<|im_start|>assistant\n<think>\n\n</think>\n")


def test_qwen3_hides_earlier_thoughts_so_only_the_last_turn_can_be_learned(real_data):
    whole = conversation(
        "Hi", "<think>\nhm\n</think>\n\nHello", "And?", "<think>\nso\n</think>\n\nFine"
    )
    with pytest.raises(DataError, match=r"rows\.jsonl:3: .*data\.loss_on: last_turn"):
        real_template(real_data, "qwen3").segments(whole)
    assert supervised(real_template(real_data, "qwen3"), whole, "last_turn") == [
        "<think>\nso\n</think>\n\nFine<|im_end|>"
    ]


def test_phi3_ends_a_turn_and_then_the_text(real_data):
    from finetune.config import Model
    from finetune.models.load import load_tokenizer

    tokenizer = load_tokenizer(Model(path=str(real_data / "tokenizers" / "phi-3-mini")))
    own = templates.load(
        "auto",
        "messages",
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
        tokenizer.get_added_vocab(),
    )
    whole = conversation("Hi", "Hello", "And?", "Fine")
    assert own.name == "chat"
    assert rendered(own, whole) == as_inference_renders(tokenizer, own, whole.messages)
    assert supervised(own, whole) == ["Hello<|end|>", "Fine<|end|>"]
    assert own.stop_token() == "<|end|>"


def test_generation_marks_do_not_hide_a_prompt_that_is_not_trained():
    """Asked with empty thoughts before the answer, trained without: two different models."""
    source = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}{{ "
        "m.content }}{{ eos_token }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:<think></think>{% endif %}"
    )
    with pytest.raises(
        DataError, match="renders the prompt of message 2 differently once the answer is there"
    ):
        chat(source).segments(conversation("Hi", "Hello"))


# What a template puts before an answer

TURN = "<|im_start|>{{ m.role }}\n"
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
THINKS_LAST = (  # as Qwen3: empty thoughts before the last answer, unless it has thoughts of its own
    "{% for m in messages %}" + TURN + "{% if m.role == 'assistant' and loop.last and '<think>' not in m.content %}"
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
    assert own.opening == opening
    assert own.prompt(whole.messages[:1]) == "<|im_start|>user\nHi<|im_end|>\n" + prompt
    assert [s.text for s in own.segments(whole)] == [
        own.prompt(whole.messages[:1]),
        "Fine<|im_end|>",
        "\n",
    ]
    assert not own.opens_itself(own.segments(whole))


@pytest.mark.parametrize(
    ("source", "learned"),
    [
        (THINKS_LAST, "<think>\nhm\n</think>\n\nFine<|im_end|>"),
        (OPENS_THOUGHTS, "hm\n</think>\n\nFine<|im_end|>"),
    ],
)
def test_thoughts_of_a_row_are_learned_after_the_prompt_without_empty_ones(source, learned):
    whole = conversation("Hi", "<think>\nhm\n</think>\n\nFine")
    assert supervised(chat(source), whole) == [learned]
    assert chat(source).opens_itself(chat(source).segments(whole))


def test_where_some_rows_have_thoughts_the_others_learn_to_have_none():
    own = replace(chat(THINKS_LAST), learn_opening=True)
    assert own.prompt(conversation("Hi").messages).endswith("<|im_start|>assistant\n")
    assert supervised(own, conversation("Hi", "Fine")) == ["<think>\n\n</think>\n\nFine<|im_end|>"]


@pytest.mark.parametrize("learn_opening", [False, True])
@pytest.mark.parametrize(
    "source", [THINKS_LAST, THINKS_LAST.replace("loop.last", "loop.index > 2")]
)
def test_an_earlier_answer_without_what_the_last_has_before_it_is_refused(source, learn_opening):
    own, whole = (
        replace(chat(source), learn_opening=learn_opening),
        conversation("Hi", "Hello", "And?", "Fine"),
    )
    if "loop.last" in source:
        with pytest.raises(
            DataError,
            match=r"message 2 differently once later turns are there.* data\.loss_on: last_turn",
        ):
            own.segments(whole)
        assert len(supervised(own, whole, "last_turn")) == 1
    else:  # it depends on the place alone, so each answer is asked as it is trained
        assert len(supervised(own, whole)) == 2


def test_an_end_of_turn_that_only_the_last_answer_has_is_refused():
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '<|eot|>' if loop.last or m.role == 'user' else ';' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    with pytest.raises(DataError, match="message 2 differently once later turns are there"):
        chat(source).segments(conversation("Hi", "Hello", "And?", "Fine"))


def test_white_space_before_an_answer_stays_with_the_answer():
    """Llama-2's own template; tokenizers join the space with the first word."""
    own = chat(
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} "
        "{{ m.content }} <|eot|>{% endif %}{% endfor %}"
    )
    assert own.opening == ""
    assert supervised(own, conversation("Hi", "Hello", "And?", "Fine")) == [
        " Hello <|eot|>",
        " Fine <|eot|>",
    ]


# Rows that fit, where the shortest conversation does not


OPENS_AND_KEEPS = IGNORES_THE_ASKING + ASKS.replace("assistant\n", "assistant\n<think>\n")


def test_a_template_is_asked_for_its_end_with_a_row_that_fits():
    """As DeepSeek-R1's, where the rows begin with what the prompt already opens."""
    fits = conversation("Hi", "<think>\nhm\n</think>\n\nHello")
    with pytest.raises(DataError, match="renders the prompt of message 2 differently"):
        chat(OPENS_AND_KEEPS).stop_token()
    assert replace(chat(OPENS_AND_KEEPS), example=fits).stop_token() == "<|im_end|>"
    assert supervised(chat(OPENS_AND_KEEPS), fits) == ["hm\n</think>\n\nHello<|im_end|>"]
    with pytest.raises(DataError, match=r"^rows\.jsonl:3: "):
        replace(chat(OPENS_AND_KEEPS), example=conversation("Hi", "Hello")).stop_token()


# Templates that take only some rows

DEMANDS = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('system message needed') }}{% endif %}"
    + IGNORES_THE_ASKING
    + ASKS
)
REFUSES = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + IGNORES_THE_ASKING
    + ASKS
)


@pytest.mark.parametrize(("source", "fits"), [(DEMANDS, "Be brief."), (REFUSES, None)])
def test_a_template_refuses_only_the_rows_that_do_not_fit_it(source, fits):
    own, other = chat(source), None if fits else "Be brief."
    assert own.stop_token() == "<|im_end|>"
    assert supervised(own, conversation("Hi", "Hello", system=fits)) == ["Hello<|im_end|>"]
    with pytest.raises(
        DataError,
        match=r"^rows\.jsonl:3: data\.template 'chat' fails: TemplateError: "
        r"(system .*; it needs a system message: set data\.system_prompt, |no system .*; it takes no system message: take it out)",
    ):
        own.segments(conversation("Hi", "Hello", system=other))


@pytest.mark.parametrize("half", [r"{{ '\ud83d' }}", r"{{ messages[0].content ~ '\ude00' }}"])
def test_a_template_that_writes_half_a_character_is_named(half):
    with pytest.raises(
        DataError,
        match=r"rows\.jsonl:3: data\.template 'chat' writes '\\ud...', half of a character",
    ):
        chat(half + templates.BUILT_IN["question_answer"]).segments(conversation("Hi", "Hello"))


def test_a_template_that_holds_half_a_character_is_named():
    with pytest.raises(DataError, match=r"data\.template: chat: holds half of a character"):
        templates.load("chat", "messages", "\ud83d" + templates.BUILT_IN["chatml"], {}, {})


def test_a_template_that_cannot_be_parsed_is_told_with_its_line():
    with pytest.raises(
        templates.BrokenTemplate, match=r"rows\.jsonl:3: .* \(line 2 of the template\)"
    ):
        chat("\n{{ messages | no_such_filter }}").segments(conversation("Hi", "Hello"))


# Templates that render other text on another day, or each time


def test_a_template_is_given_one_date():
    source = "{{ strftime_now('%d %b %Y') }}|" + IGNORES_THE_ASKING
    own = templates.load("chat", "messages", source, SPECIAL, VOCABULARY, "2001-02-03")
    assert rendered(own, conversation("Hi", "Hello")).startswith("03 Feb 2001|")
    later = templates.load("chat", "messages", source, SPECIAL, VOCABULARY, "2001-02-04")
    assert own.fingerprint != later.fingerprint


def test_a_template_without_a_date_does_not_depend_on_the_day():
    days = [
        templates.load("chatml", "messages", None, SPECIAL, VOCABULARY, day)
        for day in ("2001-02-03", "2001-02-04")
    ]
    assert days[0].fingerprint == days[1].fingerprint
    assert days[0].date is None


@pytest.mark.parametrize("form", ["%H:%M:%S", "%d %b %Y %I %p", "%f"])
def test_a_template_that_writes_the_time_is_refused(form):
    source = "{{ strftime_now('" + form + "') }}|" + IGNORES_THE_ASKING
    with pytest.raises(DataError, match=r"data\.template: chat: writes the time, .*; take it out"):
        templates.load("chat", "messages", source, SPECIAL, VOCABULARY, "2001-02-03")


@pytest.mark.parametrize("source", ["{{ ['a', 'b'] | random }}", "{{ lipsum(1) }}"])
def test_a_template_that_uses_chance_is_refused(source):
    with pytest.raises(DataError, match=r"data\.template: chat: uses chance"):
        chat(source)
    assert chat("a random {{ messages[0].content }}")  # as a word it is none


# Several chat templates


def test_of_several_chat_templates_the_default_is_taken():
    named = {"tool_use": "{{ tools }}", "default": CHAT["header"]}
    assert templates.load("auto", "messages", named, SPECIAL, VOCABULARY).source == CHAT["header"]


def test_chat_templates_without_a_default_are_named():
    named = {"rag": "{{ x }}", "tool_use": "{{ tools }}"}
    with pytest.raises(
        DataError, match="has the chat templates rag, tool_use, but none named default"
    ):
        templates.load("chat", "messages", named, SPECIAL, VOCABULARY)
    assert templates.load("chatml", "messages", named, SPECIAL, VOCABULARY).name == "chatml"


@pytest.mark.parametrize(
    "source",
    ["{{ 1 / 0 }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"],
    ids=["zero", "endless"],
)
def test_a_template_that_breaks_down_is_named(source):
    with pytest.raises(
        DataError,
        match=r"rows\.jsonl:3: data\.template 'chat' fails: (ZeroDivisionError|RecursionError)",
    ):
        chat(source).segments(conversation("Hi", "Hello"))
