"""Rows as other tools write them: chats, tool calls, histories, rated answers."""

import json
from dataclasses import replace
from typing import Any

import pytest
from conftest import write_jsonl

from finetune.data import formats, preferences, rows
from finetune.data.conversations import Conversation, Message
from finetune.data.places import Place, Row
from finetune.data.problems import Problems, Skipping
from finetune.data.templates import Template
from finetune.errors import ConfigError, DataError


def user(content: str, **more: Any) -> Message:
    return Message("user", content, **more)


def assistant(content: str, supervised: bool = True, **more: Any) -> Message:
    return Message("assistant", content, supervised=supervised, **more)


def system(content: str) -> Message:
    return Message("system", content)


def chat(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def sharegpt(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"from": role, "value": content} for role, content in turns]


PLACE = Place("rows.jsonl", 7)
ASKED, ANSWERED = ("user", "q"), ("assistant", "a")


def read(values: dict[str, Any], columns: dict[str, str] | None = None, **how: Any) -> Conversation:
    row, columns = Row(PLACE, values), columns or {}
    return formats.to_conversation(row, formats.detect(row, columns), columns, **how)


def converse(
    values: dict[str, Any], columns: dict[str, str] | None = None, **how: Any
) -> tuple[Message, ...]:
    return read(values, columns, **how).messages


def refused(values: dict[str, Any], columns: dict[str, str] | None = None, **how: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(values, columns, **how)
    assert str(caught.value).startswith("rows.jsonl:7: ")
    return str(caught.value)


# Chats.


@pytest.mark.parametrize(
    ("values", "messages"),
    [
        ({"messages": chat(("developer", "s"), ASKED, ANSWERED)},
         (system("s"), user("q"), assistant("a"))),
        ({"messages": chat(("human", "q"), ("gpt", "a"))}, (user("q"), assistant("a"))),
        ({"messages": chat(ASKED, ("model", "a"))}, (user("q"), assistant("a"))),
        ({"conversations": sharegpt(("human", "q"), ("gpt", "a")), "system": "s"},
         (system("s"), user("q"), assistant("a"))),
        ({"conversations": sharegpt(("human", "q"), ("gpt", "a")), "system": ""},
         (user("q"), assistant("a"))),
        ({"dialog": chat(ASKED, ANSWERED)}, (user("q"), assistant("a"))),
        ({"messages": chat(("user", [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]),
                           ("assistant", ["a"]))}, (user("qr"), assistant("a"))),
        ({"messages": json.dumps(chat(ASKED, ANSWERED))}, (user("q"), assistant("a"))),  # of a CSV
        # Conversational prompts: earlier answers are the prompt's.
        ({"prompt": chat(ASKED, ANSWERED, ("user", "r")), "completion": chat(("assistant", "b"))},
         (user("q"), assistant("a", supervised=False), user("r"), assistant("b"))),
        ({"prompt": chat(ASKED), "completion": "a"}, (user("q"), assistant("a"))),
        ({"prompt": "q", "completion": chat(ANSWERED)}, (user("q"), assistant("a"))),
        # Alpaca's variants, and other tools' names.
        ({"instruction": "i", "context": "x", "response": "o"},
         (user("i", context="x"), assistant("o"))),
        ({"instruction": "i", "output": "o", "system": "s", "history": [["q", "a"]]},
         (system("s"), user("q"), assistant("a"), user("i"), assistant("o"))),
        ({"instruction": "i", "output": "o", "history": []}, (user("i"), assistant("o"))),
        ({"system_prompt": "s", "question": "q", "response": "a"},
         (system("s"), user("q"), assistant("a"))),
        ({"query": "q", "response": "a"}, (user("q"), assistant("a"))),
        ({"inputs": "q", "targets": "a"}, (user("q"), assistant("a"))),
        # A ticket system, not a system message.
        ({"question": "q", "answer": "a", "system": "T1"}, (user("q"), assistant("a"))),
    ],
)  # fmt: skip
def test_rows_of_other_tools_become_conversations(values, messages):
    assert converse(values) == messages


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"messages": chat(("system", "s"), ASKED, ANSWERED), "system": "t"},
         "has a system message, and another in column 'system'; remove one"),
        ({"instruction": "i", "output": "o", "history": [["q"]]},
         "entry 1 of 'history' should be a question and its answer"),
        ({"instruction": "i", "output": "o", "history": "q"}, "entry 1 of 'history'"),
        ({"messages": chat(("user", [{"type": "image_url", "image_url": "x"}]), ANSWERED)},
         "got a part of type 'image_url'"),
        ({"messages": chat(("user", []), ANSWERED)}, "should have text as content, got []"),
        ({"messages": chat(("user", " "), ANSWERED)}, "should have text as content, got an empty"),
        ({"messages": "[{"}, "column 'messages' should be JSON, but"),
        ({"prompt": chat(ASKED), "completion": []}, "should be a list of messages, got []"),
    ],
)  # fmt: skip
def test_a_chat_that_cannot_be_read_is_refused(values, says):
    assert says in refused(values)


def test_lists_of_messages_in_the_format_of_texts_are_refused():
    row = Row(PLACE, {"prompt": chat(ASKED), "completion": chat(ANSWERED)})
    with pytest.raises(DataError, match=r"lists of messages are data\.format: messages"):
        formats.to_conversation(row, "prompt_completion", {})


def test_columns_map_names_inside_messages():
    thread = [{"by": "visitor", "text": "q", "at": 3}, {"by": "agent", "text": "a"}]
    names = {"role": "by", "content": "text", "user": "visitor", "assistant": "agent"}
    columns = {"messages": "thread", **names}
    assert converse({"thread": thread}, columns) == (user("q"), assistant("a"))
    says = "message 2 of 'thread' has role 'agent'; roles are visitor, bot, system"
    assert says in refused({"thread": thread}, {**columns, "assistant": "bot"})
    says = "message 1 of 'thread' should have author and content"
    assert says in refused({"thread": thread}, {**columns, "role": "author"})


def test_keys_that_are_mapped_are_read(tmp_path):
    from collections import Counter

    thread = [{"by": "user", "text": "q", "at": 3}, {"by": "assistant", "text": "a"}]
    path, unread = write_jsonl(tmp_path / "rows.jsonl", [{"messages": thread}]), Counter()
    columns = {"role": "by", "content": "text"}
    [sample] = rows.samples([str(path)], "auto", columns, "line", None, Problems(), unread)
    assert sample.conversations[0].messages == (user("q"), assistant("a"))
    assert unread == {"messages[].at": 1}


# Which answers are trained.


@pytest.mark.parametrize("key", ["train", "weight", "loss", "training", "trainable"])
@pytest.mark.parametrize("off", [0, False, 0.0])
def test_an_answer_with_weight_zero_is_not_supervised(key, off):
    turns = chat(ASKED, ANSWERED, ("user", "r"), ("assistant", "b"))
    turns[1][key], turns[3][key] = off, 1
    assert [m.supervised for m in converse({"messages": turns})] == [False, False, False, True]
    turns[3][key] = off
    assert "says of every answer not to train on it" in refused({"messages": turns})
    assert converse({"messages": turns}, for_training=False)[3].supervised


@pytest.mark.parametrize("weight", [0.5, 2, 1e-6, True])
def test_an_answer_may_have_a_weight(weight):
    turns = chat(ASKED, ANSWERED)
    turns[1]["weight"] = weight
    assert converse({"messages": turns})[1].weight == weight
    assert converse({"messages": turns}, for_training=False)[1].weight == 1
    turns[1]["train"] = False
    turns += chat(("user", "r"), ("assistant", "b"))
    assert [m.supervised for m in converse({"messages": turns})] == [False, False, False, True]


@pytest.mark.parametrize("weight", [-1, -0.5, float("nan"), float("inf"), 1e-9, 10**400])
def test_a_weight_that_is_negative_or_not_finite_is_refused(weight):
    turns = chat(ASKED, ANSWERED)
    turns[1]["weight"] = weight
    says = "message 2 of 'messages' has the weight "
    assert says in refused({"messages": turns})
    assert "it should be 0, or a number from 1e-06 to 1e+06" in refused({"messages": turns})


def test_answers_of_different_weight_are_not_joined():
    turns = chat(ASKED, ANSWERED, ("assistant", "b"))
    turns[2]["weight"] = 0.5
    assert "roles should be" in refused({"messages": turns}, repair_turns=True)
    turns[1]["weight"] = 0.5
    assert [m.weight for m in converse({"messages": turns}, repair_turns=True)] == [1, 0.5]


CHATML = """\
{% if tools %}{{ tools | tojson }}{% endif %}\
{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>\
{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def supervised(conversation: Conversation, source: str = CHATML, loss_on: str = "completion"):
    template = Template("t", source, {"eos_token": "<|im_end|>"}, ("<|im_end|>",))
    return [s.text for s in template.segments(conversation, loss_on) if s.supervised]


def test_only_the_answers_that_are_trained_are_supervised():
    turns = chat(ASKED, ANSWERED, ("user", "r"), ("assistant", "b"))
    turns[1]["train"] = False
    assert supervised(read({"messages": turns})) == ["b<|im_end|>"]
    with pytest.raises(DataError, match="would be ignored where every token is supervised"):
        supervised(read({"messages": turns}), loss_on="all")


# Tools.


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = {"name": "weather", "arguments": {"city": "Rome"}}
CALLED = {"type": "function", "function": CALL}


def calling(**call: Any) -> dict[str, Any]:
    result = {"role": "tool", "content": "20", **({"tool_call_id": "c1"} if call else {})}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", **call}, result]
    return {"messages": [*turns, {"role": "assistant", "content": "a"}], "tools": TOOLS}


@pytest.mark.parametrize(
    "call",
    [
        {"content": None, "tool_calls": [{"type": "function", "function": CALL}]},
        {"tool_calls": [{"function": {**CALL, "arguments": json.dumps(CALL["arguments"])}}]},
        {"content": "", "tool_calls": [CALL]},
        {"content": None, "function_call": {**CALL, "arguments": '{"city": "Rome"}'}},
        # Parquet gives each object the keys of all.
        {"content": None, "tool_calls": [{"id": None, "function": {
            "name": "weather", "arguments": {"city": "Rome", "street": None}}}]},
    ],
)  # fmt: skip
def test_tool_calls_are_read_and_supervised(call):
    conversation = read(calling(**call))
    [_, called, result, _] = conversation.messages
    assert called == assistant("", parts={"tool_calls": [CALLED]})
    assert result == Message("tool", "20", parts={"tool_call_id": "c1"})
    assert conversation.tools == tuple(TOOLS)
    arguments = json.dumps(CALL)
    assert supervised(conversation) == [f"<call>{arguments}</call><|im_end|>", "a<|im_end|>"]


def test_the_text_is_what_apply_chat_template_renders(bytes_tokenizer):
    conversation = read(calling(content=None, tool_calls=[CALL]))
    template = Template("t", CHATML, bytes_tokenizer.special_tokens_map, ("<|im_end|>",))
    bytes_tokenizer.chat_template = CHATML
    turns = [{"role": m.role, "content": m.content, **m.parts} for m in conversation.messages]
    rendered = bytes_tokenizer.apply_chat_template(turns, tools=TOOLS, tokenize=False)
    assert "".join(s.text for s in template.segments(conversation)) == rendered


def test_sharegpt_tools_are_read():
    call = json.dumps(CALL)
    turns = sharegpt(("human", "q"), ("function_call", call), ("observation", "20"), ("gpt", "a"))
    conversation = read({"conversations": turns, "tools": json.dumps(TOOLS)})
    assert [m.role for m in conversation.messages] == ["user", "assistant", "tool", "assistant"]
    assert conversation.messages[1].parts == {"tool_calls": [CALLED]}
    assert conversation.tools == tuple(TOOLS)


def test_a_row_may_end_with_a_call():
    values = calling(tool_calls=[CALL])
    conversation = read({**values, "messages": values["messages"][:2]})
    assert supervised(conversation) == [f"<call>{json.dumps(CALL)}</call><|im_end|>"]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (calling(content="a"), "roles should be user, assistant with tool calls, tool, assistant"),
        (calling(tool_calls=[{"function": {}}]), "should have tool calls with name and arguments"),
        (calling(tool_calls=0), "should have tool calls with name and arguments, got 0"),
        (calling(tool_calls=[{**CALL, "arguments": "{"}]), "arguments of weather should be JSON"),
        (calling(tool_calls=[{**CALL, "arguments": [1]}]), "should be an object, got [1]"),
        ({"messages": [{"role": "user", "content": "q", "tool_calls": [CALL]}]},
         "(user) has tool calls, which only the assistant makes"),
        ({"messages": chat(ASKED, ANSWERED), "tools": "weather"}, "'tools' should be JSON"),
        ({"messages": chat(ASKED, ANSWERED), "tools": {"a": 1}}, "a list of descriptions of tools"),
        ({"conversations": sharegpt(("human", "q"), ("function_call", "{"))}, "should be JSON"),
        ({"messages": chat(ASKED, ("tool", "20"))}, "ends with the result of a tool"),
    ],
)  # fmt: skip
def test_broken_tool_calls_are_refused(values, says):
    assert says in refused(values)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (CHATML.replace("tools | tojson", "''"), "ignores the descriptions of tools"),
        (CHATML.replace("call.function | tojson", "call.function.name"),
         "drops the arguments of tool call 1 in message 2"),
        (CHATML.replace("m.tool_calls or []", "[]"),
         "drops the name of tool call 1 in message 2"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("loss_on", ["completion", "last_turn", "all"])
def test_a_template_that_drops_tools_or_calls_is_refused(source, says, loss_on):
    with pytest.raises(DataError, match=says):
        supervised(read(calling(tool_calls=[CALL])), source, loss_on)


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3"])
def test_real_templates_render_tools(real_data, name):
    source = (real_data / "chat_templates" / f"{name}.jinja").read_text()
    found = supervised(read(calling(content=None, tool_calls=[CALL])), source, "last_turn")
    assert found == ["a<|im_end|>"]
    ends = calling(tool_calls=[CALL])
    ends["messages"] = ends["messages"][:2]
    [call] = supervised(read(ends), source)
    assert call.endswith(f"<tool_call>\n{json.dumps(CALL)}\n</tool_call><|im_end|>")


def test_a_control_token_in_a_tool_call_is_refused(bytes_tokenizer):
    from finetune.data.control_tokens import ControlTokens

    call = {**CALL, "arguments": {"city": bytes_tokenizer.eos_token}}
    with pytest.raises(DataError, match="a control token of the tokenizer"):
        ControlTokens(bytes_tokenizer, ()).refuse(read(calling(tool_calls=[call])))


# Repairs.


@pytest.mark.parametrize(
    ("turns", "messages", "repairs"),
    [
        ([ASKED, ("user", "r"), ANSWERED], (user("q\n\nr"), assistant("a")),
         ["turns of one role in a row joined"]),
        ([ASKED, ANSWERED, ("user", "thanks")], (user("q"), assistant("a")),
         ["a last turn of the user dropped"]),
        ([("assistant", "hello"), ASKED, ANSWERED], (user("q"), assistant("a")),
         ["a first turn of the assistant dropped"]),
        ([("system", "s"), ("assistant", "hello"), ASKED, ANSWERED, ("user", "t"), ("user", "u")],
         (system("s"), user("q"), assistant("a")),
         ["turns of one role in a row joined", "a first turn of the assistant dropped",
          "a last turn of the user dropped"]),
        ([ASKED, ANSWERED], (user("q"), assistant("a")), []),
    ],
)  # fmt: skip
def test_turns_are_repaired_and_counted(turns, messages, repairs):
    values = {"messages": chat(*turns)}
    conversation = read(values, repair_turns=True)
    assert (conversation.messages, list(conversation.repairs)) == (messages, repairs)
    if repairs:
        assert "data.repair_turns: true joins or drops such turns" in refused(values)


@pytest.mark.parametrize("turns", [[ASKED], [("system", "s")], [ANSWERED], [("user", "q")] * 3])
def test_a_chat_without_an_answer_stays_wrong(turns):
    assert "roles should be" in refused({"messages": chat(*turns)}, repair_turns=True)


def test_answers_of_which_one_is_trained_are_not_joined():
    turns = chat(ASKED, ANSWERED, ("assistant", "b"))
    turns[1]["train"] = False
    assert "roles should be" in refused({"messages": turns}, repair_turns=True)


# Rated answers.


def sample(
    values: dict[str, Any], format: str = "preference", columns: dict[str, str] | None = None
):
    found, _ = preferences.to_sample(Row(PLACE, values), format, columns or {})
    return [each.messages for each in found.conversations], found.fields["label"]


GOOD_AND_BAD = ([(user("q"), assistant("c")), (user("q"), assistant("r"))], (1.0, 0.0))


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "q", "chosen": "c", "rejected": "r"},
        {"question": "q", "chosen": "c", "rejected": "r", "score_chosen": 5},
        {"instruction": "q", "chosen": "c", "rejected": "r"},
        {"prompt": chat(ASKED), "chosen": chat(("assistant", "c")),
         "rejected": chat(("assistant", "r"))},
        {"chosen": chat(ASKED, ("assistant", "c")), "rejected": chat(ASKED, ("assistant", "r"))},
        {"prompt": "q", "chosen": chat(ASKED, ("assistant", "c")),
         "rejected": chat(ASKED, ("assistant", "r"))},
        {"input": {"messages": chat(ASKED), "tools": []},
         "preferred_output": chat(("assistant", "c")),
         "non_preferred_output": chat(("assistant", "r"))},
        {"chosen": "\n\nHuman: q\n\nAssistant: c", "rejected": "\n\nHuman: q\n\nAssistant: r"},
        {"conversations": sharegpt(("human", "q")), "chosen": {"from": "gpt", "value": "c"},
         "rejected": {"from": "gpt", "value": "r"}},
    ],
    ids=["texts", "question", "instruction", "continued", "whole", "whole beside its prompt",
         "OpenAI", "transcripts", "ShareGPT"],
)  # fmt: skip
def test_preference_rows_of_all_shapes_are_one_pair(values):
    assert sample(values) == GOOD_AND_BAD


def test_several_rejected_answers_are_read():
    found, label = sample({"prompt": "q", "chosen": "c", "rejected": ["r", "s"]})
    assert [messages[-1].content for messages in found] == ["c", "r", "s"]
    assert label == (1.0, 0.0, 0.0)


def test_only_what_differs_in_whole_conversations_is_supervised():
    turns = [ASKED, ANSWERED, ("user", "r")]
    found, _ = sample({"chosen": chat(*turns, ("assistant", "c")),
                       "rejected": chat(*turns, ("assistant", "d"))})  # fmt: skip
    assert [[m.supervised for m in messages] for messages in found] == [[False] * 3 + [True]] * 2


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"prompt": "q", "chosen": "c"}, "no column 'rejected'"),
        ({"prompt": "q", "chosen": "c", "rejected": ""}, "column 'rejected' is empty"),
        ({"prompt": "q", "chosen": "c", "rejected": "c"}, "the chosen and a rejected answer are"),
        ({"chosen": "c", "rejected": "r"}, "is an answer, but the row has no question"),
        ({"prompt": "q", "chosen": 5, "rejected": "r"}, "column 'chosen' should be a list of"),
        ({"chosen": chat(ASKED, ANSWERED), "rejected": chat(("user", "other"), ANSWERED)},
         "the conversations differ at message 1, which is of the user"),
        ({"input": [], "preferred_output": [], "non_preferred_output": []}, "column 'input'"),
    ],
)  # fmt: skip
def test_a_wrong_preference_row_is_refused(values, says):
    with pytest.raises(DataError) as caught:
        sample(values)
    assert str(caught.value).startswith("rows.jsonl:7: ")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("values", "label"),
    [
        ({"prompt": "q", "completion": "a", "label": True}, 1.0),
        ({"prompt": "q", "completion": "a", "label": "undesirable"}, 0.0),
        ({"messages": chat(ASKED, ANSWERED), "label": 0}, 0.0),
        ({"conversations": sharegpt(("human", "q"), ("gpt", "a")), "kto_tag": "true"}, 1.0),
        ({"instruction": "q", "output": "a", "kto_tag": False}, 0.0),
    ],
)
def test_unpaired_labels_are_read(values, label):
    assert sample(values, "unpaired") == ([(user("q"), assistant("a"))], (label,))


@pytest.mark.parametrize("label", [None, "maybe", 5, [True]])
def test_a_label_that_is_neither_true_nor_false_is_refused(label):
    with pytest.raises(DataError, match="column 'label' should be true or false, got "):
        sample({"prompt": "q", "completion": "a", "label": label}, "unpaired")


@pytest.mark.parametrize(
    ("values", "columns"),
    [
        ({"query": "q", "choices": ["x", "y"], "gold": 1}, {}),
        ({"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]},
          "answerKey": "B"}, {}),
        ({"question": "q", "options": {"A": "x", "B": "y"}, "answer": "B"}, {}),
        ({"question": "q", "options": ["x", "y"], "answer": "y"}, {}),
        ({"question": "q", "choices": ["x", "y"], "answer": "1"}, {}),
        ({"ctx": "q", "endings": ["x", "y"], "label": "1"}, {"question": "ctx"}),
    ],
)  # fmt: skip
def test_choices_with_a_right_answer_are_read(values, columns):
    found, label = sample(values, "choices", columns)
    assert found == [(user("q"), assistant("x")), (user("q"), assistant("y"))]
    assert label == (0.0, 1.0)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"question": "q", "choices": ["x", "y"], "gold": 2}, "should name one of the 2 choices"),
        ({"question": "q", "choices": ["x", "y"], "gold": True}, "should name one of the 2"),
        ({"question": "q", "choices": ["x"], "gold": 0}, "a list of at least two answers"),
        ({"question": "q", "choices": ["x", 5], "gold": 0}, "a list of at least two answers"),
        ({"choices": ["x", "y"], "gold": 0}, "no column with a question"),
        ({"question": "q", "gold": 0}, "no column 'choices'"),
    ],
)  # fmt: skip
def test_a_wrong_row_of_choices_is_refused(values, says):
    with pytest.raises(DataError) as caught:
        sample(values, "choices")
    assert says in str(caught.value)


def test_real_preferences_and_choices_are_read(real_data):
    for name, format, count in (
        ("preference/dpo_en_demo.json", "preference", 2),
        ("benchmarks/arc_easy.jsonl", "choices", 4),
    ):  # fmt: skip
        problems = Problems()
        found = list(rows.samples([str(real_data / name)], format, {}, "line", None, problems))
        assert (len(found), len(problems)) == (problems.num_rows, 0)
        assert len(found) > 100
        counts = [len(each.conversations) for each in found]
        assert sorted(counts)[len(counts) // 2] == count
        assert all(sum(each.fields["label"]) == 1 for each in found)


def test_a_column_that_no_format_of_rated_answers_has_is_refused():
    with pytest.raises(ConfigError, match="history is not a column of format preference"):
        sample({"prompt": "q", "chosen": "c", "rejected": "r"}, columns={"history": "h"})


# Bad rows.


def found_in(path: Any, skipping: Skipping, **how: Any) -> tuple[int, Problems]:
    problems = Problems(skipping)
    stream = rows.samples([str(path)], "auto", {}, "line", None, problems, **how)
    return sum(1 for _ in stream), problems


def test_bad_rows_are_skipped_counted_and_kept(tmp_path):
    good, path = {"question": "q", "answer": "a"}, tmp_path / "rows.jsonl"
    lines = [{"other": 1}, good, {**good, "answer": ""}, *[good] * 3, {**good, "answer": None}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"question": \n')
    number, problems = found_in(path, Skipping(True, 0.5))
    problems.raise_if_any()
    assert (number, problems.num_rows, sum(problems.kinds().values())) == (4, 8, 4)
    assert [reject["row"] for reject in problems.rejects] == [lines[0], lines[2], lines[6], None]
    assert all(reject["problem"].startswith(f"{path}:") for reject in problems.rejects)
    assert rows.detect_format([str(path)], "line", {}, skips=True) == "question_answer"
    _, problems = found_in(path, Skipping(True, 0.4))
    with pytest.raises(DataError) as caught:
        problems.raise_if_any()
    assert "4 of 8 rows are wrong:" in str(caught.value)
    assert "data.max_bad_fraction: 0.4 lets at most 3 be skipped" in str(caught.value)


def test_a_file_that_cannot_be_read_to_its_end_is_not_skipped(tmp_path):
    (tmp_path / "rows.csv").write_text('question,answer\na,b\nc,"d\n')
    _, problems = found_in(tmp_path / "rows.csv", Skipping(True, 0.9))
    with pytest.raises(DataError, match="broken CSV"):
        problems.raise_if_any()


def test_every_broken_line_is_reported(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{\n[]\n{"text": "b"}\n')
    number, problems = found_in(tmp_path / "rows.jsonl", Skipping())
    assert number == 2
    with pytest.raises(DataError) as caught:
        problems.raise_if_any()
    first, *listed = str(caught.value).splitlines()
    assert first == "2 of 4 rows are wrong:"
    assert [line.split("rows.jsonl:")[1][:2] for line in listed] == ["2:", "3:"]


def test_new_settings_at_their_defaults_leave_the_keys_of_older_caches():
    from finetune.data.tokenised import Options

    options = Options("auto", {}, "line", None, "completion", 100, "error", 64, False, Skipping())
    assert list(options.deciding()) == [
        "format", "columns", "text_unit", "system_prompt", "loss_on", "max_length", "truncation",
    ]  # fmt: skip
    skipping = Skipping(True, 0.1)
    kept, dropped = {"special_tokens_in_text": "text"}, {"thinking": "drop"}
    for changes in ({"repair_turns": True}, {"skipping": skipping}, kept, dropped):
        changed = replace(options, **changes)
        assert changed.deciding() != options.deciding()


def test_a_bad_row_is_shown_with_its_first_characters(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"question": "q" * 90, "answer": ""}])
    with pytest.raises(DataError) as caught:
        rows.check([[str(path)]], "auto", {}, "line", None)
    assert str(caught.value).endswith("; the row: " + ('{"question": "' + "q" * 90)[:80] + "...")


def test_evaluation_asks_with_tools_and_refuses_calls_as_answers(tmp_path, bytes_tokenizer):
    from finetune.evaluation import held_out
    from finetune.generation.generate import chat_prompt

    path = str(write_jsonl(tmp_path / "rows.jsonl", [calling(tool_calls=[CALL])]))
    [read] = held_out.read(path)
    asked = read.conversation
    bytes_tokenizer.chat_template = CHATML
    prompt = chat_prompt(bytes_tokenizer, asked.messages, asked.place, asked.tools)
    assert prompt.startswith(json.dumps(TOOLS))
    assert prompt.endswith("20<|im_end|>\n<|im_start|>assistant\n")
    ends = calling(tool_calls=[CALL])
    write_jsonl(tmp_path / "rows.jsonl", [{**ends, "messages": ends["messages"][:2]}])
    with pytest.raises(DataError, match=r"rows\.jsonl:1: ends with tool calls, and evaluate"):
        held_out.read(path)
