"""Every format and file type is read, and every bad row is refused by file, line and column."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl

from finetune.data import formats, readers, rows, source_files
from finetune.data.column_names import FORMATS
from finetune.data.conversations import Message
from finetune.data.places import Place, Row
from finetune.data.problems import Problems
from finetune.errors import ConfigError, DataError

QA = {"question": "q", "answer": "a"}


def user(content: str, context: str = "") -> Message:
    return Message("user", content, context=context)


def assistant(content: str, **others: Any) -> Message:
    return Message("assistant", content, supervised=True, **others)


def messages(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def sharegpt(question: Any, answer: Any) -> list[dict[str, Any]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def unread_columns(path: object, problems: Problems | None = None) -> Counter[str]:
    unread: Counter[str] = Counter()
    problems = Problems() if problems is None else problems
    list(rows.samples([str(path)], "auto", {}, "line", None, problems, unread))
    return unread


def tokenised(path: Path, tokenizer: Any, columns: dict[str, str], format: str = "auto") -> Any:
    """Take the same door as a run, which finds out the format where it is not given."""
    from finetune.data import chat_templates, tokenised
    from finetune.data.examples import prepare

    options = tokenised.Options(format, columns, "line", None, "completion", 100, "error")
    template = chat_templates.load("plain", format, None, tokenizer.special_tokens_map, {})
    sources = source_files.sources(str(path), None).train
    return prepare(sources, template, tokenizer, options, str(path.parent / "cache"))


def system(content: str) -> Message:
    return Message("system", content)


def turns(*roles: str | None) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": f"said by {role}"} for role in roles]}


def converse(
    values: dict[str, Any],
    format: str = "auto",
    columns: dict[str, str] | None = None,
    system_prompt: str | None = None,
) -> tuple[Message, ...]:
    row = Row(Place("rows.jsonl", 7), values)
    format = formats.detect(row) if format == "auto" else format
    conversation = formats.to_conversation(row, format, columns or {}, system_prompt)
    assert str(conversation.place) == "rows.jsonl:7"
    return conversation.messages


def refused(
    values: dict[str, Any], format: str = "auto", columns: dict[str, str] | None = None
) -> str:
    """What the user reads about a row; it always begins with its file and line."""
    with pytest.raises(DataError) as caught:
        converse(values, format, columns)
    message = str(caught.value)
    assert message.startswith("rows.jsonl:7: ")
    return message


# The formats.


@pytest.mark.parametrize(
    ("values", "messages"),
    [
        ({"text": " plain "}, (Message("text", " plain ", supervised=True),)),
        ({"question": "q", "answer": "a"}, (user("q"), assistant("a"))),
        ({"prompt": "p ", "completion": " c"}, (user("p "), assistant(" c"))),
        ({"prompt": "p", "response": "c"}, (user("p"), assistant("c"))),
        ({"instruction": "i", "output": "o"}, (user("i"), assistant("o"))),
        ({"instruction": "i", "response": "o"}, (user("i"), assistant("o"))),
        (
            {"instruction": "i", "input": "x", "output": "o"},
            (user("i", context="x"), assistant("o")),
        ),
        ({"instruction": "i", "input": "", "output": "o"}, (user("i"), assistant("o"))),
        ({"instruction": "i", "input": None, "output": "o"}, (user("i"), assistant("o"))),
        ({"question": "q", "answer": "a", "id": 5, "source": None}, (user("q"), assistant("a"))),
        ({"question": "q", "answer": "a", "text": "q a"}, (user("q"), assistant("a"))),
        (
            {"messages": messages("q", "a")},
            (user("q"), assistant("a")),
        ),
        (
            {"conversations": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"},
                               {"role": "assistant", "content": "a"},
                               {"role": "user", "content": "r"},
                               {"role": "assistant", "content": "b"}]},
            (system("s"), user("q"), assistant("a"), user("r"), assistant("b")),
        ),
    ],
)  # fmt: skip
def test_a_row_of_every_format_becomes_a_conversation(values, messages):
    assert converse(values) == messages


@pytest.mark.parametrize(
    ("format", "values", "columns"),
    [
        (
            "question_answer", {"Patient": "q", "Doctor": "a"},
            {"question": "Patient", "answer": "Doctor"},
        ),
        ("question_answer", {"question": "q", "Doctor": "a"}, {"answer": "Doctor"}),
        ("prompt_completion", {"in": "q", "response": "a"}, {"prompt": "in"}),
        ("prompt_completion", {"prompt": "wrong", "in": "q", "completion": "a"}, {"prompt": "in"}),
        ("messages", {"chat": messages("q", "a")}, {"messages": "chat"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("auto", [False, True], ids=["format given", "format auto"])
def test_columns_are_read_under_the_names_they_are_given(
    tmp_path, bytes_tokenizer, format, values, columns, auto
):
    path = write_jsonl(tmp_path / "rows.jsonl", [values])
    examples = tokenised(path, bytes_tokenizer, columns, "auto" if auto else format)
    assert bytes_tokenizer.decode(examples.input.ids) == "qa<|eos|>"


def test_text_and_input_can_stand_under_other_names():
    assert converse({"body": "t"}, "text", {"text": "body"})[0].content == "t"
    values = {"instruction": "i", "Context": "x", "output": "o"}
    assert converse(values, "instruction", {"input": "Context"})[0] == user("i", context="x")


def test_a_system_prompt_is_put_before_conversations_that_have_none():
    own = [{"role": "system", "content": "own"}, *messages("q", "a")]
    whole = (user("q"), assistant("a"))
    assert converse({"messages": messages("q", "a")}, system_prompt="s") == (system("s"), *whole)
    assert converse({"messages": own}, system_prompt="s") == (system("own"), *whole)
    assert converse(QA, system_prompt="s") == (system("s"), *whole)


def test_only_answers_are_supervised():
    values = turns("system", "user", "assistant", "user", "assistant")
    assert [m.role for m in converse(values) if m.supervised] == ["assistant", "assistant"]


def test_the_format_of_a_file_is_that_of_its_first_row(tmp_path):
    path = str(write_jsonl(tmp_path / "a.jsonl", [QA]))
    assert rows.detect_format([path], "line", {}) == "question_answer"
    (tmp_path / "b.txt").write_text("words")
    assert rows.detect_format([str(tmp_path / "b.txt")], "line", {}) == "text"


# Files that cannot be read.


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train", 0.5), ("weight", "0"), ("loss_mask", [0]), ("mask", True),
        ("mask", False), ("isMasked", True), ("trainable", "no"), ("learn", 0), ("rating", -1),
        ("rating", 1), ("score", "2/5"), ("label", "bad"), ("is_good", False),
        ("feedback", {"helpful": 1}),
    ],
)  # fmt: skip
def test_a_message_with_unsupported_keys_is_refused(key, value):
    for column, turns in (
        ("messages", messages("q", "a")), ("conversations", sharegpt("q", "a")),
    ):  # fmt: skip
        turns[1][key] = value
        says = f"message 2 of {column!r} has {key!r}, which would be ignored"
        assert says in refused({column: turns})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tool_calls", None), ("weight", 1), ("train", True), ("loss", True), ("mask", None),
        ("rating", None), ("label", "geography"), ("_rating", -1), ("name", "Bob"), ("id", 7),
    ],
)  # fmt: skip
def test_harmless_keys_of_a_message_are_accepted(key, value):
    turns = messages("q", "a")
    turns[1][key] = value
    assert converse({"messages": turns}) == (user("q"), assistant("a"))


def test_an_empty_system_message_stays_and_is_not_none():
    turns = [{"role": "system", "content": ""}, *messages("q", "a")]
    assert converse({"messages": turns}) == (system(""), user("q"), assistant("a"))
    for prompt in (None, "Be brief."):
        row = Row(Place("r", 1), {"messages": turns})
        made = formats.to_conversation(row, "messages", {}, prompt)
        assert made.messages == (system(""), user("q"), assistant("a"))
    turns[0]["content"] = None
    assert "message 1 of 'messages' (system) should have text" in refused({"messages": turns})


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_beside_an_answer_are_read(key, tmp_path):
    turns, unread = messages("q", "a"), Counter()
    turns[1][key] = "hm"
    [answer] = converse({"messages": turns})[1:]
    assert answer == assistant("a", parts={"reasoning_content": "hm"})
    path = str(write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns}]))
    assert list(rows.samples([path], "auto", {}, "line", None, Problems(), unread))
    assert not unread
    if key == "thinking":
        turns[1]["reasoning_content"] = ""
        assert converse({"messages": turns})[1] == answer
    turns[1]["reasoning_content"] = ["hm"]
    assert "should have text as reasoning_content, got [" in refused({"messages": turns})
    turns[1]["reasoning_content"] = "\ud83d"
    assert "half of a character" in refused({"messages": turns})
    turns = messages("q", "a")
    turns[0][key] = "hm"
    assert f"message 1 of 'messages' has {key!r}, which would be" in refused({"messages": turns})


def test_an_empty_cell_for_the_system_message_is_none():
    assert converse({**QA, "system_prompt": ""}) == (user("q"), assistant("a"))


def test_a_score_on_a_question_is_ignored():
    turns = messages("q", "a")
    turns[0]["score"] = 0.1
    assert converse({"messages": turns}) == (user("q"), assistant("a"))


def test_keys_of_messages_that_are_not_read_are_counted_by_row(tmp_path):
    turns, others = messages("q", "a"), sharegpt("q", "a")
    turns[0]["name"], turns[1]["name"], turns[1]["id"], others[0]["id"] = "Bob", "Eve", None, 1
    unread = Counter()
    for column, values in (("messages", turns), ("conversations", others)):
        unread += unread_columns(write_jsonl(tmp_path / "rows.jsonl", [{column: values}] * 2))
    assert unread == {"messages[].name": 2, "conversations[].id": 2}


@pytest.mark.parametrize(
    ("values", "format", "columns"),
    [
        ({"q": "x"}, "question_answer", {"question": "q", "answer": "q"}),
        (QA, "question_answer", {"question": "answer"}),
        ({"prompt": "p", "response": "r"}, "prompt_completion", {"prompt": "response"}),
        ({"instruction": "i", "output": "o"}, "instruction", {"input": "output"}),
    ],
)  # fmt: skip
def test_a_column_read_twice_is_refused(values, format, columns):
    """Every question would be its own answer."""
    says = r"data\.columns: \w+ and \w+ would both be read from column"
    with pytest.raises(ConfigError, match=says):
        converse(values, format, columns)


def test_an_instruction_in_the_column_input_has_no_separate_input():
    found = converse({"input": "i", "output": "o"}, "instruction", {"instruction": "input"})
    assert found == (user("i"), assistant("o"))


def test_a_mapped_column_that_the_format_does_not_have_is_refused():
    says = r"data\.columns: output is not a column of format question_answer"
    with pytest.raises(ConfigError, match=says):
        converse({**QA, "foo": "x"}, columns={"output": "foo"})


def test_a_lone_surrogate_is_refused_at_its_line(tmp_path, bytes_tokenizer):
    """What is left of an emoji that was cut in two: JSON allows it, but no encoding can hold it."""
    path = write_jsonl(tmp_path / "rows.jsonl", [QA, {**QA, "answer": "cut \ud83d"}])
    with pytest.raises(DataError, match=re.escape(f"{path}:2: ")):
        tokenised(path, bytes_tokenizer, {})


# Columns that are not read.


PAIRS = [
    QA, {"prompt": "p", "completion": "c"}, {"prompt": "p", "response": "c"},
    {"instruction": "i", "output": "o"}, {"messages": messages("q", "a")},
]  # fmt: skip


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("label", False), ("label", True), ("label", 0), ("label", "0"), ("Label", "bad"),
        ("score", 4.5), ("score", "4,5"), ("quality_score", -1), ("isGood", True),
        ("is_good", "TRUE"), ("rating", "3"), ("reward", 1e-3), ("rewardModelScore", 1),
        ("ratings", [1, 2]), ("RATING", 5), ("thumbs_up", True), ("chosen", "c"), ("rejected", "c"),
        ("rejected", ["c"]), ("feedback", "no"), ("is_good", "Y"), ("is_good", "n"),
        ("is_good", "T"), ("score", "4/5"), ("score", "4 out of 5"), ("score", "80%"),
        ("score", "high"), ("rating", "5 stars"), ("grade", "F"), ("grade", "B+"),
        ("reward", {"a": 1}), ("scores", {"helpful": 3, "safe": None}), ("preference", "A"),
        ("ratings", [{"by": 3}, {"by": "4/5"}]), ("label", "positive"), ("ok", 0), ("passed", 1),
        ("win", False), ("is_correct", False), ("is_safe", False), ("liked", False),
        ("reject", "any text"), ("loser", "any text"), ("worse_answer", "c"),
        ("dispreferred", ["c"]), ("pass", False), ("fail", 1), ("upvoted", False),
        ("downvoted", True), ("hallucination", "yes"), ("hallucinated", 0), ("kto_tag", True),
        ("kto_tag", "desirable"), ("margin", 0.3), ("winner", "model_a"), ("win", "gpt-4-0613"),
        ("winner", "tie (bothbad)"), ("winner", "Assistant 2"), ("winner", "llama-2-70b-chat"),
        ("rejected_response", "c"), ("chosen_response", "c"), ("response_rejected", ["c"]),
        ("chosenAnswer", {"a": "c"}), ("bad_answer", True),
    ],
)  # fmt: skip
def test_a_quality_column_is_refused(column, value):
    """Without its label, a KTO row would train on a bad answer as on a good one."""
    for values in PAIRS:
        says = refused({**values, column: value})
        assert f"column {column!r}" in says
        assert re.search("objective.kind: (kto|dpo)", says)
        assert "drop the column" in says


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("label", "geography"), ("label", None), ("rejected", None), ("_label", False),
        ("_score", 3), ("id", 7), ("source", "good"), ("topic", 3), ("labelled_by", "Ann"),
        ("scorer", 1), ("goodness", "yes"), ("difficulty", 2), ("score", {"a": "long"}),
        ("feedback", "Well reply."), ("page_rank", 0.3), ("weight_kg", 3.5), ("label_id", 3),
        ("zip_label", "12345"), ("valid_until", "2027"), ("label", "A"), ("score", {}),
        ("ok", None), ("bad_answer", "Paris"), ("chosen", None), ("validity", 1), ("windows", True),
        ("quality", "grainy"), ("_chosen_response", "c"), ("likes", 7), ("upvotes", 7),
        ("votes", -2), ("views", 900), ("stars", 5), ("rank", 0), ("weight", 0.5),
        ("quality", "good"), ("input_quality", "poor"), ("problem_is_valid", "No"),
        ("correctness_count", 1), ("correctness_math_verify", [True, False]), ("toxic", False),
        ("flagged", True), ("best_of", 4), ("search_score", 0.3), ("winner", "Germany"),
        ("hallucination", "He saw a unicorn."), ("pass", "the Brenner"), ("worse", None),
        ("margin", "wide"),
    ],
)  # fmt: skip
def test_a_column_unrelated_to_quality_is_ignored(column, value):
    assert converse({**QA, column: value}) == (user("q"), assistant("a"))


@pytest.mark.parametrize(
    ("column", "value"), [("label", 1), ("score", 0.5), ("rating", "4"), ("chosen", "x")]
)
def test_plain_text_with_a_label_stays_text(column, value):
    assert converse({"text": "t", column: value})[0].content == "t"


@pytest.mark.parametrize(
    ("values", "columns", "messages"),
    [
        (
            {"prompt": "p", "chosen": "c", "rejected": "r"}, {"completion": "chosen"},
            (user("p"), assistant("c")),
        ),
        (
            {"prompt": "p", "chosen": "c", "rejected": "r", "score_chosen": 5},
            {"completion": "chosen"}, (user("p"), assistant("c")),
        ),
        (
            {"chosen": PAIRS[4]["messages"], "rejected": []}, {"messages": "chosen"},
            (user("q"), assistant("a")),
        ),
        (
            {"prompt": "p", "chosen_response": "c", "rejected_response": "r"},
            {"completion": "chosen_response"}, (user("p"), assistant("c")),
        ),
        ({"question": "q", "label": "4"}, {"answer": "label"}, (user("q"), assistant("4"))),
    ],
)  # fmt: skip
def test_chosen_answers_train_once_they_are_mapped(values, columns, messages):
    row = Row(Place("rows.jsonl", 7), values)
    assert formats.to_conversation(row, formats.detect(row, columns), columns).messages == messages


def accepted(folder, values: dict[str, Any], columns: dict[str, str]) -> tuple[Message, ...]:
    path = str(write_jsonl(folder / "rows.jsonl", [values]))
    rows.check([[path]], "auto", columns, "line", None)
    [sample] = rows.samples([path], "auto", columns, "line", None, Problems())
    return sample.conversations[0].messages


PAIR = {"chosen": "c", "rejected": "r"}


@pytest.mark.parametrize(
    ("values", "mapping", "messages"),
    [
        ({"prompt": "p", **PAIR}, "{completion: chosen}", (user("p"), assistant("c"))),
        ({"prompt": "p", "chosen": "c"}, "{completion: chosen}", (user("p"), assistant("c"))),
        ({"system": "s", "question": "q", **PAIR}, "{answer: chosen}", (user("q"), assistant("c"))),
        ({**QA, **PAIR}, "{answer: chosen}", (user("q"), assistant("c"))),
        ({"instruction": "i", **PAIR}, "{output: chosen}", (user("i"), assistant("c"))),
        (
            {"query": "q", **PAIR}, "{prompt: query, completion: chosen}",
            (user("q"), assistant("c")),
        ),
        (PAIR, "{text: chosen}", (Message("text", "c", supervised=True),)),
        (
            {"prompt": "p", "score_chosen": 5, "chosen_response": "c", "rejected_response": "r"},
            "{completion: chosen_response}", (user("p"), assistant("c")),
        ),
        (
            {"prompt": "p", "chosen": PAIRS[4]["messages"], "rejected": [], "score_chosen": 5},
            "{messages: chosen}", (user("q"), assistant("a")),
        ),
    ],
)  # fmt: skip
def test_the_error_for_preference_rows_shows_a_working_mapping(tmp_path, values, mapping, messages):
    says = refused(values)
    assert "belongs to preference rows (DPO, reward models), of which sft learns nothing" in says
    assert "for an objective of your own set data.format: preference" in says
    assert f"write data.columns: {mapping}" in says
    columns = dict(part.split(": ") for part in mapping.strip("{}").split(", "))
    assert accepted(tmp_path, values, columns) == messages


ASKED, SAID = {"from": "human", "value": "q"}, {"from": "gpt", "value": "c"}


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        (
            {"conversations": [ASKED], "chosen": SAID, "rejected": SAID},
            "append chosen to conversations; then drop the columns ['chosen', 'rejected']",
        ),
        (
            {"conversations": [ASKED], "chosen": SAID},
            "append chosen to conversations; then drop the columns ['chosen']",
        ),
        (
            {"messages": [{"role": "user", "content": "q"}], "chosen": "c", "rejected": "r"},
            "append chosen, as a message of the assistant, to messages; then drop",
        ),
        (
            {"prompt": [ASKED], "chosen": [SAID], "rejected": [SAID]},
            "append chosen to prompt, and rename it to 'messages'; then drop the columns",
        ),
    ],
)  # fmt: skip
def test_the_error_for_a_continuing_chosen_answer_says_to_append_it(tmp_path, values, advice):
    assert f"to train on the chosen answers only, {advice}" in refused(values)
    asked = next(value for name, value in values.items() if name not in ("chosen", "rejected"))
    reply = SAID if "from" in asked[0] else {"role": "assistant", "content": "c"}
    name = "conversations" if "conversations" in values else "messages"
    assert accepted(tmp_path, {name: [*asked, reply]}, {}) == (user("q"), assistant("c"))


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        ({**QA, "rejected_response": "r"}, "to train on the other answers only, drop the column"),
        ({**QA, "chosen": True}, "keep the good rows and drop the column"),
        (
            {"messages": PAIRS[4]["messages"], "chosen": SAID, "rejected": SAID},
            "drop the columns ['chosen', 'rejected']: 'messages' has an answer of its own",
        ),
    ],
)  # fmt: skip
def test_the_error_for_preference_columns_beside_an_answer_says_to_drop_them(values, advice):
    assert refused(values).endswith(advice)


def test_columns_that_only_later_rows_have_are_counted_and_refused(tmp_path):
    last = {**QA, "source": "s", "note": "x", "empty": "", "null": None}
    problems = Problems()
    path = write_jsonl(tmp_path / "r.jsonl", [QA] * 30 + [{**QA, "note": "x"}] * 3 + [last])
    assert unread_columns(path, problems) == {"note": 4, "source": 1}
    assert (problems.num_rows, len(problems)) == (34, 0)
    write_jsonl(path, [QA] * 30 + [{**QA, "label": False}])
    with pytest.raises(DataError, match=r"r\.jsonl:31: column 'label' \(false\) says how good"):
        rows.check([[str(path)]], "auto", {}, "line", None)


def test_the_first_rows_of_training_and_of_evaluation_are_both_checked(tmp_path):
    train = str(write_jsonl(tmp_path / "train.jsonl", [QA] * 30))
    dev = str(write_jsonl(tmp_path / "dev.jsonl", [QA] * 9 + [{"question": "q", "answer": ""}]))
    rows.check([[train], [dev]], "auto", {}, "line", None, most=9)
    with pytest.raises(DataError, match=r"dev\.jsonl:10: column 'answer' is empty"):
        rows.check([[train], [dev]], "auto", {}, "line", None, most=10)


def test_an_alias_beside_its_column_is_counted_as_unread(tmp_path):
    values = {"prompt": "p", "completion": "c", "response": "r"}
    assert unread_columns(write_jsonl(tmp_path / "r.jsonl", [values])) == {"response": 1}


def test_a_mapped_column_that_no_row_has_is_refused(tmp_path):
    """The input of an instruction may be missing in some rows, but not in all."""
    values = {"instruction": "i", "output": "o", "Context": "x"}
    path = str(write_jsonl(tmp_path / "r.jsonl", [values] * 3))
    with pytest.raises(ConfigError, match=r"data\.columns: input: no row has a column 'context'"):
        rows.check([[path]], "auto", {"input": "context"}, "line", None)
    rows.check([[path]], "auto", {"input": "Context"}, "line", None)


@pytest.mark.parametrize(
    "theirs", ["customer question", "Customer Questions", " Customer Question ", "CustomerQuestion"]
)
def test_a_misspelt_mapped_name_gets_the_nearest(theirs):
    row = Row(Place("rows.csv", 2), {"Customer Question": "q", "answer": "a"})
    says = "data.columns: question: no column .*; did you mean 'Customer Question'"
    with pytest.raises(DataError, match=says):
        formats.detect(row, {"question": theirs})


def test_sharegpt_is_read():
    turns = [("system", "s"), ("human", "q"), ("gpt", "a"), ("user", "r"), ("assistant", "b")]
    values = {"conversations": [{"from": name, "value": text} for name, text in turns]}
    assert converse(values) == (system("s"), user("q"), assistant("a"), user("r"), assistant("b"))
    values["conversations"][2]["weight"] = 0.5
    assert [message.weight for message in converse(values)] == [1, 1, 0.5, 1, 1]
    values["conversations"][1]["weight"] = 0.5
    assert "message 2 of 'conversations' has 'weight', which would be ignored" in refused(values)


def test_a_lone_surrogate_in_a_column_name_can_be_shown(tmp_path):
    for values in ({"question": "q", "\ud83d": "a"}, {**QA, "\ud83d": "a", "answer": None}):
        refused(values, "question_answer").encode()
    with pytest.raises(DataError) as caught:
        formats.detect(Row(Place("rows.jsonl", 1), {"\ud83d": "a"}))
    str(caught.value).encode()


def test_long_values_are_shortened_in_messages():
    long = "word " * 10_000
    message = {"role": "user", "content": "q"}
    for values in (
        {long: 1}, {**{f"{n}{long}": n for n in range(30)}}, {"question": [long], "answer": "a"},
        {"messages": [{"role": long, "content": "q"}]}, {"messages": [{long: "x"}]},
        {"messages": [message, {"role": "assistant", "content": "a", "weight": long}]},
        {**QA, "label": [0] * 10_000},
        {"messages": [{"from": long, "value": "q"}]}, {"messages": [message] * 5_000},
    ):  # fmt: skip
        assert len(refused(values)) < 3_000


# Rows that cannot be learned from.


@pytest.mark.parametrize("values", [{"Patient": "q", "Doctor": "a"}, {"question": "q"}, {}])
def test_the_error_for_unknown_columns_lists_formats_and_mappings(values):
    message = refused(values)
    assert str(sorted(values)) in message
    assert "question_answer: question, answer" in message
    assert "data.columns, for example {question: Patient, answer: Doctor}" in message


@pytest.mark.parametrize(
    ("values", "mapping"),
    [
        ({"Question": "q", "Answer": "a"}, "{question: Question, answer: Answer}"),
        ({"question": "q", "ANSWER": "a"}, "{answer: ANSWER}"),
        ({"Instruction": "i", "Response": "o"}, "{instruction: Instruction, output: Response}"),
        ({"Text": "t"}, "{text: Text}"),
    ],
)  # fmt: skip
def test_the_error_for_columns_in_capitals_shows_the_mapping(values, mapping):
    assert f"map them with data.columns, which is case-sensitive: {mapping}" in refused(values)


def test_a_table_without_a_header_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("What is 1+1?,2\nWhat is 2+2?,4\n")
    with pytest.raises(DataError, match="the first line should name the columns"):
        rows.detect_format([str(tmp_path / "rows.csv")], "line", {})


@pytest.mark.parametrize("format", FORMATS)
def test_the_error_for_a_missing_column_lists_the_columns(format):
    message = refused({"other": "x"}, format)
    assert f"no column {FORMATS[format][0]!r}; this row has ['other']" in message


def test_a_missing_mapped_column_is_refused():
    message = refused(QA, "question_answer", {"answer": "Doctor"})
    assert "no column 'Doctor'; this row has ['answer', 'question']" in message


def of_sender(sender: Any, value: Any = "x") -> dict[str, Any]:
    return {"conversations": [{"from": sender, "value": value}]}


@pytest.mark.parametrize(
    ("values", "column"),
    [
        ({"question": "q", "answer": ""}, "answer"),
        ({"question": "q", "answer": " \n"}, "answer"),
        ({"question": "", "answer": "a"}, "question"),
        ({"prompt": "p", "completion": ""}, "completion"),
        ({"prompt": "p", "response": ""}, "response"),
        ({"instruction": "i", "output": "\t"}, "output"),
        ({"text": "  "}, "text"),
    ],
)
def test_an_empty_cell_is_refused_by_its_column(values, column):
    assert f"column {column!r} is empty; fill it or remove the row" in refused(values)


@pytest.mark.parametrize(
    ("values", "column", "got"),
    [
        ({"question": "q", "answer": None}, "answer", "null"),
        ({"question": "q", "answer": 42}, "answer", "42"),
        ({"question": ["q"], "answer": "a"}, "question", '["q"]'),
        ({"text": 1.5}, "text", "1.5"),
        ({"instruction": "i", "input": 3, "output": "o"}, "input", "3"),
        ({"prompt": True, "completion": "c"}, "prompt", "true"),
    ],
)
def test_a_value_that_is_not_text_is_refused_by_its_column(values, column, got):
    assert f"column {column!r} should be text, got {got}; write it as a string" in refused(values)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (turns("user", "assistant", "user"), "the conversation ends with the user"),
        (turns("user"), "the conversation ends with the user"),
        (
            turns("assistant", "user"),
            "roles should be user, assistant, user, assistant, ..., got assistant, user",
        ),
        (turns("user", "user", "assistant"), "got user, user, assistant"),
        (turns("user", "assistant", "assistant"), "got user, assistant, assistant"),
        (turns("assistant"), "got assistant"),
        (turns("system"), "got none"),
        (turns("user", "system", "assistant"), "it can only be the first"),
        (turns("system", "system", "user", "assistant"), "it can only be the first"),
        (
            turns("patient", "gpt"),
            "message 1 of 'messages' has role 'patient'; roles are system, developer, user, human,",
        ),
        (turns("user", "tool"), "the conversation ends with the result of a tool, without"),
        (turns(None), "message 1 of 'messages' has role None"),
        ({"messages": []}, "column 'messages' should be a list of messages, got []"),
        ({"messages": "hello"}, "column 'messages' should be a list of messages, got hello"),
        ({"messages": None}, "column 'messages' should be a list of messages, got null"),
        (
            {"messages": ["hello"]},
            "message 1 of 'messages' should have role and content, got hello",
        ),
        (of_sender("human"), "the conversation ends with the user"),
        (
            of_sender("human", None),
            "message 1 of 'conversations' (user) should have text as content, got null",
        ),
        (
            of_sender("moderator"),
            "message 1 of 'conversations' has role 'moderator'; roles are system, developer,",
        ),
        *((of_sender(sender), "message 1 of 'conversations' has role ")
          for sender in (["human"], {"a": 1}, None, 7)),
        (
            {"conversations": [{"from": "human"}]},
            "message 1 of 'conversations' should have role and content",
        ),
        (
            {"messages": messages("q", "")},
            "message 2 of 'messages' (assistant) should have text as content",
        ),
        (
            {"messages": [{"role": "user", "content": None}]},
            "message 1 of 'messages' (user) should have text as content, got null",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "(user) should have text as content, got a part of type 'image_url': {",
        ),
    ],
)  # fmt: skip
def test_a_conversation_out_of_order_is_refused_with_the_right_order(values, says):
    assert says in refused(values)


@pytest.mark.parametrize(
    ("name", "format", "count"),
    [
        ("gsm8k/test.jsonl", "question_answer", 1319),
        ("dolly/dolly_hhrlhf_small.jsonl", "prompt_completion", 1000),
        ("wiki_demo.txt", "text", None),
    ],
)
def test_real_rows_become_conversations(real_data, name, format, count):
    source = str(real_data / name)
    conversations = [
        formats.to_conversation(row, formats.detect(row), {}) for row in readers.read(source)
    ]
    assert rows.detect_format([source], "line", {}) == format
    assert len(conversations) == count or count is None
    assert all(conversation.messages[-1].supervised for conversation in conversations)


@pytest.mark.parametrize("key", ["weight", "train", "loss"])
def test_an_unsupervised_question_is_accepted(key):
    """So SlimOrca's rows say of their questions; only answers are learned anyway."""
    conversation = sharegpt("q", "a")
    conversation[0][key], conversation[1][key] = 0, 1
    assert converse({"conversations": conversation}) == (user("q"), assistant("a"))


def test_a_column_without_a_name_is_read_where_it_is_named_and_nowhere_else():
    """Exports of pandas have one for the index."""
    assert converse({**QA, "": "x"}) == converse(QA)
    assert converse({**QA, "": "x"}, columns={"question": ""})[0].content == "x"
