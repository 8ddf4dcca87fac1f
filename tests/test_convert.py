"""`finetune data convert` of rows with rated answers: there and back is the identity."""

import argparse
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_preparation import Bench

from finetune.data import preferences
from finetune.data.places import Place, Row
from finetune.errors import DataError
from finetune.preparation import convert

LENIENT = {"deadline": None, "suppress_health_check": list(HealthCheck)}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.fixture
def bench(tmp_path, capsys) -> Bench:
    return Bench(tmp_path, capsys)


def to(format: str, values: dict, given: str = "auto", **columns: str) -> dict:
    """Convert one row."""
    arguments = argparse.Namespace(format=given, columns=columns, to=format)
    return convert.converted(Row(Place("rows.jsonl", 1), values), arguments)


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


# ------------------------------------------------------------------------------ there and back

TEXT = st.text("aH:\n[{\u00e9", min_size=1, max_size=8).filter(str.strip)
TEXT |= st.just("Human: a\n\nAssistant: b")
SYSTEM = st.lists(TEXT.map(lambda text: {"role": "system", "content": text}), max_size=1)
TURNS = st.lists(st.tuples(TEXT.map(user), TEXT.map(bot)), max_size=2)
ARGUMENTS = st.dictionaries(TEXT, st.integers() | TEXT, max_size=2)


@st.composite
def calls(draw):
    """Draw a call of a tool, and its result."""
    function = {"name": "add", "arguments": draw(ARGUMENTS)}
    call = {"id": "c1", "type": "function", "function": function}
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    return [asked, {"role": "tool", "content": draw(TEXT), "tool_call_id": "c1"}]


@st.composite
def compared(draw, tools: bool):
    """Draw a row as convert --to preference writes it."""
    pairs = draw(TURNS)
    asked = [*draw(SYSTEM), *(turn for pair in pairs for turn in pair), user(draw(TEXT))]
    answers = draw(st.lists(TEXT, min_size=2, max_size=2, unique=True))
    given = [[bot(answer)] for answer in answers]
    row = {"prompt": asked, "chosen": given[0], "rejected": given[1], "id": draw(st.integers())}
    if tools:
        row["prompt"] += draw(calls())
        row["tools"] = [TOOL]
    return to("preference", row)


@settings(max_examples=80, **LENIENT)
@given(compared(tools=False) | compared(tools=True))
def test_openai_and_back_is_the_identity(row):
    there = to("openai", row)
    assert there.keys() == {"input", "preferred_output", "non_preferred_output", "id"}
    assert to("preference", there) == row
    assert to("openai", to("preference", there)) == there
    json.dumps(there)
    for call in there["input"]["messages"][-2].get("tool_calls", []) if "tools" in row else []:
        assert isinstance(call["function"]["arguments"], str)


@settings(max_examples=80, **LENIENT)
@given(compared(tools=False))
def test_sharegpt_and_back_is_the_identity(row):
    there = to("sharegpt", row)
    assert there["conversations"][-1]["from"] == "human"
    assert there["chosen"].keys() == {"from", "value"}
    assert to("preference", there) == row
    assert to("sharegpt", to("openai", there)) == there


@settings(max_examples=80, **LENIENT)
@given(compared(tools=False) | compared(tools=True))
def test_training_reads_every_shape_alike(row):
    def documents(values):
        place = Place("rows.jsonl", 1)
        sample, _ = preferences.to_sample(Row(place, values), "preference", {})
        return sample.conversations, sample.fields

    assert documents(to("openai", row)) == documents(row)
    if "tools" not in row:
        assert documents(to("sharegpt", row)) == documents(row)


@settings(max_examples=100, **LENIENT)
@given(SYSTEM, TURNS, TEXT, TEXT, st.booleans())
def test_unpaired_rows_come_back_from_messages_and_sharegpt(system, pairs, question, answer, label):
    turns = [*system, *(turn for pair in pairs for turn in pair), user(question), bot(answer)]
    row = to("unpaired", {"messages": turns, "label": label})
    for shape in ("messages", "sharegpt", "openai"):
        assert to("unpaired", to(shape, row)) == row
    assert (row.keys() == {"prompt", "completion", "label"}) == (not system and not pairs)


@settings(max_examples=100, **LENIENT)
@given(TEXT, st.lists(TEXT, min_size=2, max_size=5), st.data())
def test_choices_of_every_shape_become_one(question, texts, data):
    gold = data.draw(st.integers(0, len(texts) - 1))
    letters = [chr(65 + number) for number in range(len(texts))]
    expected = {"question": question, "choices": texts, "gold": gold}
    assert to("choices", expected) == expected
    named = {"prompt": question, "options": dict(zip(letters, texts)), "answer": letters[gold]}
    assert to("choices", named) == expected
    listed = {"label": letters, "text": texts}
    assert to("choices", {"question": question, "choices": listed, "answerKey": letters[gold]}) == (
        expected
    )


# ------------------------------------------------------------------------------------- examples


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"question": "q", "chosen": "a", "rejected": "b"},
        {"conversations": [{"from": "human", "value": "q"}],
         "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
        {"chosen": [user("q"), bot("a")], "rejected": [user("q"), bot("b")]},
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        {"input": {"messages": [user("q")]}, "preferred_output": [bot("a")],
         "non_preferred_output": [bot("b")]},
    ],
)  # fmt: skip
def test_every_shape_of_a_preference_becomes_one(row):
    assert to("preference", row) == {"prompt": "q", "chosen": "a", "rejected": "b"}


def test_several_rejected_answers_stay_where_they_can():
    row = {"prompt": "q", "chosen": "a", "rejected": ["b", "c"], "id": 1}
    assert to("preference", row) == row
    for shape in ("openai", "sharegpt"):
        with pytest.raises(DataError, match=f"2 rejected answers, but {shape} holds one"):
            to(shape, row)


def test_columns_that_are_not_read_stay_and_are_not_replaced():
    row = {"question": "q", "chosen": "a", "rejected": "b", "prompt": None, "note": 1}
    with pytest.raises(DataError, match="'prompt' would be replaced"):
        to("preference", row)
    del row["prompt"]
    assert to("preference", row)["note"] == 1
    mapped = {"q": "q", "good": "a", "bad": "b"}
    assert to("preference", mapped, prompt="q", chosen="good", rejected="bad") == {
        "prompt": "q", "chosen": "a", "rejected": "b",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("row", "format", "name"),
    [
        ({"question": "q", "answer": "a", "system": "web-01"}, "messages", "system"),
        ({"question": "q", "answer": "a", "system": ""}, "sharegpt", "system"),
        ({"prompt": "q", "completion": "a", "context": "c"}, "instruction", "context"),
    ],
)
def test_a_column_that_only_the_new_format_reads_is_an_error(row, format, name):
    """It would become a system message, or a part of the question."""
    with pytest.raises(DataError, match=f"column '{name}' is not read in .*, but would be in"):
        to(format, row)
    made = to(format, row | {name: None})
    assert made[name] is None


def test_openai_says_by_weights_what_is_not_trained():
    first = [user("q"), bot("a") | {"train": False}, user("r"), bot("b") | {"weight": 0.5}]
    there = to("openai", {"messages": first})
    assert [turn.get("weight") for turn in there["messages"]] == [None, 0, None, 0.5]
    assert "train" not in there["messages"][1]
    assert to("messages", there) == {"messages": first}
    assert to("sharegpt", there)["conversations"][1]["train"] is False


@pytest.mark.parametrize(
    ("format", "row", "message"),
    [
        ("messages", {"prompt": "q", "chosen": "a", "rejected": "b"},
         "rows of format preference can become preference, openai, sharegpt, not messages"),
        ("preference", {"question": "q", "choices": ["a", "b"], "gold": 0},
         "rows of format choices can become choices, not preference"),
        ("preference", {"question": "q", "answer": "a"}, "holds no rated answers, as preference"),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": "a"}, "are equal"),
        ("unpaired", {"prompt": "q", "completion": "a", "label": "perhaps"}, "true or false"),
        ("choices", {"question": "q", "choices": ["a"], "gold": 0}, "at least two answers"),
        ("sharegpt", {"chosen": [user("q"), bot("a"), user("r"), bot("s")],
                      "rejected": [user("q"), bot("b")]}, "answers of several messages"),
        ("preference", {"input": {"messages": [user("q")], "user": 1},
                        "preferred_output": [bot("a")], "non_preferred_output": [bot("b")]},
         "input holds 'user', which would be lost"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_an_error(format, row, message):
    with pytest.raises(DataError, match=message) as raised:
        to(format, row)
    assert str(raised.value).startswith("rows.jsonl:1: ")


def test_files_of_rated_rows_convert(bench):
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": ["b", "c"]},
    ]
    made = bench.made("convert", rows, "--to", "openai", "--drop")
    assert made == [to("openai", rows[0])]
    assert bench.counts["dropped"] == {"does not fit the format": 1}
    given = ["--to", "unpaired", "--format", "unpaired"]
    labelled = [{"question": "q", "answer": "a", "kto_tag": "no"}]
    assert bench.made("convert", labelled, *given) == [
        {"prompt": "q", "completion": "a", "label": False}
    ]


def test_real_preferences_come_back(bench, real_data):
    """OpenAI's shape and ShareGPT's hold what Anthropic's and Orca's rows do."""
    files = sorted((real_data / "preference").glob("*.json*"))
    assert files
    for file in files:
        whole = bench.made("convert", file, "--to", "preference", "--drop")
        for shape in ("openai", "sharegpt"):
            there = bench.folder / "there.jsonl"
            assert bench.run("convert", bench.out, "--to", shape, "--output", there, "--force") == 0
            assert bench.made("convert", there, "--to", "preference") == whole
