"""Every format and file type is read, and every bad row is refused by file, line and column."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl

from finetune.data import rows
from finetune.data.rows import Message
from finetune.errors import ConfigError, DataError

QA = {"question": "q", "answer": "a"}


def user(content: str, context: str = "") -> Message:
    return Message("user", content, context=context)


def assistant(content: str) -> Message:
    return Message("assistant", content, supervised=True)


def system(content: str) -> Message:
    return Message("system", content)


def lines_and_values(path: Path, text_unit: str = "line") -> list[tuple[int, dict[str, Any]]]:
    return [(row.place.line, row.values) for row in rows.read(str(path), text_unit)]


def converse(
    values: dict[str, Any],
    format: str = "auto",
    columns: dict[str, str] | None = None,
    system_prompt: str | None = None,
) -> tuple[Message, ...]:
    row = rows.Row(rows.Place("rows.jsonl", 7), values)
    format = rows.detect(row) if format == "auto" else format
    conversation = rows.to_conversation(row, format, columns or {}, system_prompt)
    assert str(conversation.place) == "rows.jsonl:7"
    return conversation.messages


def refused(values: dict[str, Any], format: str = "auto", columns: dict[str, str] | None = None) -> str:
    """What the user reads about a row; it always begins with its file and line."""
    with pytest.raises(DataError) as caught:
        converse(values, format, columns)
    message = str(caught.value)
    assert message.startswith("rows.jsonl:7: ")
    return message


def unreadable(path: Path, content: str | bytes) -> str:
    """What the user reads about a file; it always begins with its name."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        list(rows.read(str(path)))
    message = str(caught.value)
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch):
    """`datasets` keeps a copy of what it reads; here it goes when the test does."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


@pytest.fixture
def parquet(tmp_path, datasets_cache):
    """Write rows to a Parquet file."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def write(values: list[dict[str, Any]], name: str = "rows.parquet", schema: Any = None) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(values, schema=schema), path)
        return path

    return write


# The file types, and the line that each row stands on.


def test_json_lines_are_numbered_as_an_editor_does_with_blank_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n   \n{"text": "b"}\r\n{"text": "c"}')
    assert lines_and_values(path) == [(1, {"text": "a"}), (4, {"text": "b"}), (5, {"text": "c"})]


def test_a_json_row_has_the_line_of_its_opening_brace(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"text": "a\nb"}, {"text": "c", "n": [1, {"d": 2}]}, {"text": "e"}], indent=2))
    assert lines_and_values(path) == [
        (2, {"text": "a\nb"}), (5, {"text": "c", "n": [1, {"d": 2}]}), (14, {"text": "e"}),
    ]  # fmt: skip
    path.write_text('\n\n[\n\n{"text": "a"},\n\n\n{"text":\n"b"} , {"text": "c"}\n]\n')
    assert lines_and_values(path) == [(5, {"text": "a"}), (8, {"text": "b"}), (9, {"text": "c"})]


def test_a_csv_row_has_the_line_it_begins_on_whatever_its_cells_hold(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('question,answer\n"a\n\nb",c\n\nd,"e, ""f"""\n"g","h\n"\ni,j\n')
    assert lines_and_values(path) == [
        (2, {"question": "a\n\nb", "answer": "c"}),
        (6, {"question": "d", "answer": 'e, "f"'}),
        (7, {"question": "g", "answer": "h\n"}),
        (9, {"question": "i", "answer": "j"}),
    ]


def test_a_cell_of_a_csv_stays_text(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("question,answer\n007,1e3\nnull,\n")
    assert lines_and_values(path) == [
        (2, {"question": "007", "answer": "1e3"}),
        (3, {"question": "null", "answer": ""}),
    ]


def test_a_csv_may_begin_with_blank_lines(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("\n\nquestion,answer\na,b\n")
    assert lines_and_values(path) == [(4, {"question": "a", "answer": "b"})]


def test_a_cell_of_a_csv_may_hold_a_book(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(f"text\n{'word ' * 40_000}\n")
    assert lines_and_values(path) == [(2, {"text": "word " * 40_000})]


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("line", [(2, "a"), (3, " b "), (6, "c"), (7, "d")]),
        ("paragraph", [(2, "a\n b "), (6, "c\nd")]),
        ("file", [(1, "a\n b \n\n  \nc\nd")]),
    ],
)
def test_text_is_read_by_line_paragraph_or_file(tmp_path, unit, expected):
    path = tmp_path / "rows.txt"
    path.write_text("\na\n b \n\n  \nc\nd\n")
    assert lines_and_values(path, unit) == [(line, {"text": text}) for line, text in expected]


def test_a_paragraph_does_not_end_in_the_blank_line_after_it(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("a\nb\n   \nc\n")
    assert lines_and_values(path, "paragraph") == [(1, {"text": "a\nb"}), (4, {"text": "c"})]


def test_lines_may_end_as_on_windows(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_bytes(b"a\r\nb\r\n\r\nc\r\n")
    assert lines_and_values(path) == [(1, {"text": "a"}), (2, {"text": "b"}), (4, {"text": "c"})]


def test_parquet_rows_are_numbered_from_1(parquet):
    path = parquet([{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}])
    assert lines_and_values(path) == [(1, {"question": "a", "answer": "b"}), (2, {"question": "c", "answer": "d"})]


def test_parquet_keeps_conversations(parquet):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (row,) = rows.read(str(parquet([{"messages": turns}])))
    assert rows.to_conversation(row, rows.detect(row), {}).messages == (user("q"), assistant("a"))


def test_a_folder_of_files_is_read(parquet):
    path = parquet([QA], "folder/part.parquet")
    assert lines_and_values(path.parent) == [(1, QA)]


@pytest.mark.parametrize("name", ["rows.JSONL", "rows.Json", "rows.CSV", "rows.TXT", "rows.PARQUET"])
def test_a_file_type_may_be_written_in_capitals(tmp_path, parquet, name):
    path = tmp_path / name
    text = {".jsonl": '{"text": "a"}', ".json": '[{"text": "a"}]', ".csv": "text\na", ".txt": "a"}
    if path.suffix.lower() in text:
        path.write_text(text[path.suffix.lower()])
    else:
        parquet([{"text": "a"}], name)
    assert [values for _, values in lines_and_values(path)] == [{"text": "a"}]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.txt"])
def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path, name):
    path = tmp_path / name
    text = {".jsonl": '{"text": "é"}', ".json": '[{"text": "é"}]', ".csv": "text\né", ".txt": "é"}[path.suffix]
    path.write_text("\ufeff" + text, encoding="utf-8")
    assert [values for _, values in lines_and_values(path)] == [{"text": "é"}]


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
        ({"instruction": "i", "input": "x", "output": "o"}, (user("i", context="x"), assistant("o"))),
        ({"instruction": "i", "input": "", "output": "o"}, (user("i"), assistant("o"))),
        ({"instruction": "i", "input": None, "output": "o"}, (user("i"), assistant("o"))),
        ({"question": "q", "answer": "a", "id": 5, "source": None}, (user("q"), assistant("a"))),
        ({"question": "q", "answer": "a", "text": "q a"}, (user("q"), assistant("a"))),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            (user("q"), assistant("a")),
        ),
        (
            {"conversations": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"},
                               {"role": "assistant", "content": "a"}, {"role": "user", "content": "r"},
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
        ("question_answer", {"Patient": "q", "Doctor": "a"}, {"question": "Patient", "answer": "Doctor"}),
        ("question_answer", {"question": "q", "Doctor": "a"}, {"answer": "Doctor"}),
        ("prompt_completion", {"in": "q", "response": "a"}, {"prompt": "in"}),
        ("prompt_completion", {"prompt": "wrong", "in": "q", "completion": "a"}, {"prompt": "in"}),
        ("messages", {"chat": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, {"messages": "chat"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("auto", [False, True], ids=["format given", "format auto"])
def test_columns_are_read_under_the_names_they_are_given(tmp_path, bytes_tokenizer, format, values, columns, auto):
    """Through the same door as a run, which finds out the format where it is not given."""
    from finetune.data import templates, tokens

    path = write_jsonl(tmp_path / "rows.jsonl", [values])
    options = tokens.Options("auto" if auto else format, columns, "line", None, "completion", 100, "error")
    template = templates.load("plain", format, None, bytes_tokenizer.special_tokens_map, {})
    examples = tokens.prepare(
        rows.sources(str(path), None)[0], template, bytes_tokenizer, options, str(tmp_path / "cache")
    )
    assert bytes_tokenizer.decode(examples.input_ids) == "qa<|eos|>"


def test_text_and_input_can_stand_under_other_names():
    assert converse({"body": "t"}, "text", {"text": "body"})[0].content == "t"
    values = {"instruction": "i", "Context": "x", "output": "o"}
    assert converse(values, "instruction", {"input": "Context"})[0] == user("i", context="x")


def test_a_system_prompt_is_put_before_conversations_that_have_none():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    own = [{"role": "system", "content": "own"}, *turns]
    assert converse({"messages": turns}, system_prompt="s") == (system("s"), user("q"), assistant("a"))
    assert converse({"messages": own}, system_prompt="s") == (system("own"), user("q"), assistant("a"))
    assert converse(QA, system_prompt="s") == (system("s"), user("q"), assistant("a"))


def test_only_answers_are_supervised():
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user", "assistant")]
    assert [m.role for m in converse({"messages": turns}) if m.supervised] == ["assistant", "assistant"]


def test_the_format_of_a_file_is_that_of_its_first_row(tmp_path):
    assert rows.detect_format([str(write_jsonl(tmp_path / "a.jsonl", [QA]))], "line", {}) == "question_answer"
    (tmp_path / "b.txt").write_text("words")
    assert rows.detect_format([str(tmp_path / "b.txt")], "line", {}) == "text"


# Files that cannot be read.


def test_a_file_that_is_not_there_is_named(tmp_path):
    path = str(tmp_path / "absent.jsonl")
    for reading in (lambda: list(rows.read(path)), lambda: rows.fingerprint(path), lambda: rows.sources(path, None)):
        with pytest.raises(DataError, match=re.escape(path) + ": no such file; .* take files, or Hub names"):
            reading()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.txt"])
@pytest.mark.parametrize("content", ["", "\n", " \n\n"])
def test_an_empty_file_is_named(tmp_path, name, content):
    says = unreadable(tmp_path / name, content)
    assert "holds no rows" in says or "should hold a list of rows" in says


@pytest.mark.parametrize(("name", "content"), [("rows.csv", "question,answer\n"), ("rows.json", "[]")])
def test_a_file_without_rows_is_named(tmp_path, name, content):
    assert ": holds no rows" in unreadable(tmp_path / name, content)


def test_a_parquet_file_without_rows_is_named(parquet):
    import pyarrow

    path = parquet([], schema=pyarrow.schema([("question", pyarrow.string())]))
    with pytest.raises(DataError, match=re.escape(str(path)) + ": holds no rows"):
        list(rows.read(str(path)))


def test_a_damaged_parquet_file_is_named(tmp_path, datasets_cache):
    assert "no whole Parquet file" in unreadable(tmp_path / "rows.parquet", b"PAR1 and nothing more")


@pytest.mark.parametrize("name", ["rows.xlsx", "rows", "rows.jsonl.gz"])
def test_an_unknown_file_type_is_told_the_known_ones(tmp_path, name):
    says = unreadable(tmp_path / name, b"anything")
    assert "unknown file type" in says
    assert "use one of .jsonl .json .csv .parquet .txt" in says


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        ('{"a": 1}\n{"a": }\n', 2, "broken JSON: Expecting value at character 7"),
        ('{"a": 1}\n\n{"a": "x"\n', 3, "broken JSON"),
        ('{"a": 1} {"a": 2}\n', 1, "broken JSON: Extra data at character 10"),
        ('{"a": 1}\n[1, 2]\n', 2, "a row should be an object like {...}, got [1, 2]"),
        ('"words"\n', 1, "a row should be an object"),
        ("null\n", 1, "a row should be an object"),
    ],
)
def test_a_broken_json_line_is_named(tmp_path, content, line, says):
    message = unreadable(tmp_path / "rows.jsonl", content)
    assert message.startswith((f":{line}: ", f":{line} (row "))
    assert says in message


def test_rows_of_a_json_file_on_one_line_are_told_apart(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"question": "q", "answer": "a"}] * 3))
    assert [str(row.place) for row in rows.read(str(path))] == [f"{path}:1 (row {n})" for n in (1, 2, 3)]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("[" * 200_000, "recursion"),
        ('{"question": ' + "9" * 5_000 + "}", "digits"),
        ('{"question": "q", "answer": "a", "answer": "b"}', "'answer' is given twice"),
    ],
    ids=["nested too deep", "a number too long", "a key twice"],
)
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_json_that_python_cannot_hold_is_refused_at_its_line(tmp_path, line, says, ending):
    message = unreadable(tmp_path / f"rows.{ending}", f"[{line}]" if ending == "json" else line)
    assert message.startswith((":1: broken JSON: ", ":1 (row 1): broken JSON: "))
    assert says in message


@pytest.mark.parametrize("key", ["tool_calls", "weight", "thinking"])
def test_a_message_with_what_would_be_lost_is_refused(key):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", key: 0}]
    assert f"message 2 of 'messages' has {key!r}, which would be ignored" in refused({"messages": turns})


def test_a_message_with_empty_keys_is_as_good_as_one_without():
    turns = [{"role": "user", "content": "q", "tool_calls": None}, {"role": "assistant", "content": "a", "weight": 1}]
    assert converse({"messages": turns}) == (user("q"), assistant("a"))


def test_a_mapped_column_that_the_format_does_not_have_is_refused():
    with pytest.raises(ConfigError, match=r"data\.columns: output is no column of format question_answer"):
        converse({"question": "q", "answer": "a", "foo": "x"}, columns={"output": "foo"})


def test_columns_that_are_not_read_are_known(tmp_path):
    path = write_jsonl(tmp_path / "r.jsonl", [{"instruction": "i", "response": "o", "context": "c", "category": "d"}])
    assert rows.unused_columns(str(path), "line", "instruction", {}) == ["category", "context"]
    assert rows.unused_columns(str(path), "line", "instruction", {"input": "context"}) == ["category"]


def test_a_file_separated_by_something_else_is_told_so(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("question;answer\nq;a\n")
    with pytest.raises(DataError, match="is it separated by ';'"):
        rows.detect(next(rows.read(str(path))))


def test_a_changed_file_of_the_same_size_and_time_is_read_anew(tmp_path, datasets_cache):
    """As cp -p, rsync -t and image layers leave it: datasets alone would give the old rows."""
    from pyarrow import parquet, table

    folder = tmp_path / "folder"
    folder.mkdir()
    path, seen = folder / "rows.parquet", []
    for word in ("old", "new"):
        parquet.write_table(table({"text": [word]}), path)
        os.utime(path, (1_000_000_000, 1_000_000_000))
        for source in (str(path), str(folder)):
            seen.append((rows.fingerprint(source), [row.values["text"] for row in rows.read(source)]))
    assert [texts for _, texts in seen] == [["old"], ["old"], ["new"], ["new"]]
    assert len({fingerprint for fingerprint, _ in seen}) == 4


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        ('{"a": 1}', 1, "one object per line is .jsonl"),
        ('\n\n{"a": 1}\n{"a": 2}', 3, "one object per line is .jsonl"),
        ('[\n{"a": 1},\n{"a": }\n]', 3, "broken JSON: Expecting value at column 7"),
        ('[\n{"a": 1}\n{"a": 2}\n]', 3, "expected , or ] after a row"),
        ('[\n{"a": 1}\n', 3, "broken JSON"),
        ('[\n{"a": 1},\n5\n]', 3, "a row should be an object like {...}, got 5"),
        ('[\n{"a": 1}\n]\n[\n{"a": 2}\n]', 4, "broken JSON"),  # or the second list would go without a word
        ('[\n{"a": 1}\n] {"a": 2}', 3, "broken JSON"),
    ],
)
def test_a_broken_json_file_is_refused_at_its_line(tmp_path, content, line, says):
    message = unreadable(tmp_path / "rows.json", content)
    assert message.startswith((f":{line}: ", f":{line} (row "))
    assert says in message


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        ("question,answer\na,b\nc\n", 3, "1 cells, but the header names 2 columns ['question', 'answer']"),
        ("question,answer\na,b,c\n", 2, "3 cells, but the header names 2 columns"),
        ('question,answer\n"a\nb",c\nd, e, f\n', 4, "3 cells"),
        ('question,answer\na,"b"c\n', 2, "broken CSV"),
        ('question,answer\na,b\nc,"d\ne,f\ng,h\n', 3, "broken CSV"),  # the line where the quote was left open
        ("answer,answer\na,b\n", 1, "answer"),  # or one of them would go without a word
    ],
)
def test_a_broken_csv_is_refused_at_its_line(tmp_path, content, line, says):
    message = unreadable(tmp_path / "rows.csv", content)
    assert message.startswith((f":{line}: ", f":{line} (row "))
    assert says in message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n'),
        ("rows.json", b'[{"text": "a"},\n{"text": "caf\xe9"}]\n'),
        ("rows.csv", b"text\ncaf\xe9\n"),
        ("rows.txt", b"a\ncaf\xe9\n"),
    ],
)
def test_bytes_that_are_not_utf8_are_refused_at_their_line(tmp_path, name, content):
    message = unreadable(tmp_path / name, content)
    assert message.startswith(":2: byte 0xe9 at position ")
    assert "save the file as UTF-8" in message


def test_half_of_a_surrogate_pair_is_refused_at_its_line(tmp_path, bytes_tokenizer):
    """What is left of an emoji that was cut in two: JSON allows it, but no encoding can hold it."""
    from finetune.data import templates, tokens

    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "q", "answer": "a"}\n{"question": "q", "answer": "cut \\ud83d"}\n')
    template = templates.load("plain", "question_answer", None, {"eos_token": "<|eos|>"}, {})
    options = tokens.Options("auto", {}, "line", None, "completion", 100, "error")
    with pytest.raises(DataError, match=re.escape(f"{path}:2: ")):
        tokens.prepare(rows.sources(str(path), None)[0], template, bytes_tokenizer, options, str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ["owner/no-such-name", "owner/name-2.5", "owner/name-v1.0:test"])
def test_a_name_that_is_no_file_is_looked_for_on_the_hub(name):
    with pytest.raises(DataError, match=re.escape(name) + ": datasets cannot load it"):
        list(rows.read(name))


@pytest.mark.parametrize("name", ["rows", "./folder/rows", "/folder/rows", "a/b/c", "folder/rows.jsonl", "../rows.csv"])
def test_a_name_that_cannot_be_on_the_hub_is_a_missing_file(name):
    with pytest.raises(DataError, match="no such file"):
        list(rows.read(name))


# Rows that cannot be learned from.


@pytest.mark.parametrize(
    ("values", "format"),
    [
        ({"Patient": "q", "Doctor": "a"}, "auto"),
        ({"question": "q"}, "auto"),
        ({}, "auto"),
    ],
)
def test_columns_that_fit_no_format_are_told_the_formats_and_how_to_map(values, format):
    message = refused(values, format)
    assert str(sorted(values)) in message
    assert "question_answer: question, answer" in message
    assert "data.columns, for example {question: Patient, answer: Doctor}" in message


@pytest.mark.parametrize("format", rows.FORMATS)
def test_a_column_that_is_not_there_is_named_with_those_that_are(format):
    message = refused({"other": "x"}, format)
    assert f"no column {rows.FORMATS[format][0]!r}; this row has ['other']" in message


def test_a_mapped_column_that_is_not_there_is_named():
    message = refused({"question": "q", "answer": "a"}, "question_answer", {"answer": "Doctor"})
    assert "no column 'Doctor'; this row has ['answer', 'question']" in message


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
def test_an_empty_cell_is_named_by_its_column(values, column):
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
def test_what_is_no_text_is_named_by_its_column_and_shown(values, column, got):
    assert f"column {column!r} should be text, got {got}; write it as a string" in refused(values)


def turns(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": f"said by {role}"} for role in roles]}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (turns("user", "assistant", "user"), "the conversation ends with the user"),
        (turns("user"), "the conversation ends with the user"),
        (turns("assistant", "user"), "roles should be user, assistant, user, assistant, ..., got assistant, user"),
        (turns("user", "user", "assistant"), "got user, user, assistant"),
        (turns("user", "assistant", "assistant"), "got user, assistant, assistant"),
        (turns("assistant"), "got assistant"),
        (turns("system"), "got none"),
        (turns("user", "system", "assistant"), "it can only be the first"),
        (turns("system", "system", "user", "assistant"), "it can only be the first"),
        (turns("human", "gpt"), "message 1 of 'messages' has role 'human'; roles are system, user, assistant"),
        (turns("user", "tool"), "message 2 of 'messages' has role 'tool'; roles are"),
        ({"messages": [{"role": None, "content": "x"}]}, "message 1 of 'messages' has role None"),
        ({"messages": []}, "column 'messages' should be a list of messages, got []"),
        ({"messages": "hello"}, "column 'messages' should be a list of messages, got hello"),
        ({"messages": None}, "column 'messages' should be a list of messages, got null"),
        ({"messages": ["hello"]}, "message 1 of 'messages' should have role and content, got hello"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "message 1 of 'conversations' should have role and content"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]}, "message 2 of 'messages' (assistant) should have text as content"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1 of 'messages' (user) should have text as content, got null"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "(user) should have text as content, got [{"),
    ],
)  # fmt: skip
def test_a_conversation_out_of_order_is_refused_with_what_it_should_be(values, says):
    assert says in refused(values)


def test_a_long_value_is_shown_in_short():
    assert len(refused({"question": "q", "answer": ["x" * 10_000]})) < 300


# What is trained on is not evaluated on.


def test_sources_are_lists_of_names(tmp_path):
    a, b = (str(write_jsonl(tmp_path / f"{n}.jsonl", [{"text": n}])) for n in "ab")
    assert [list(names) for names in rows.sources(a, None)] == [[a], []]
    assert [list(names) for names in rows.sources([a], b)] == [[a], [b]]
    assert [list(names) for names in rows.sources([a, b], None)] == [[a, b], []]


@pytest.mark.parametrize("copied", [False, True], ids=["the same file", "a copy under another name"])
def test_the_same_rows_for_training_and_evaluation_are_refused(tmp_path, copied):
    train = write_jsonl(tmp_path / "train.jsonl", [QA])
    evaluation = write_jsonl(tmp_path / "dev.jsonl", [QA]) if copied else train
    with pytest.raises(DataError) as caught:
        rows.sources([str(train)], [str(evaluation)])
    assert str(caught.value).startswith(f"data.eval: {evaluation} holds the same rows as data.train {train}; ")
    assert "cannot be evaluated on" in str(caught.value)


def test_the_same_rows_given_twice_are_refused(tmp_path):
    path = str(write_jsonl(tmp_path / "train.jsonl", [QA]))
    with pytest.raises(DataError, match=r"data\.train: .* holds the same rows as .*, nor be given twice"):
        rows.sources([path, path], None)


def test_no_training_file_at_all_is_refused():
    with pytest.raises(DataError, match=r"data\.train: the list is empty; name at least one file"):
        rows.sources([], None)


def test_a_fingerprint_changes_with_any_byte(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("abc")
    before = rows.fingerprint(str(path))
    path.write_text("abd")
    assert rows.fingerprint(str(path)) != before
    path.write_text("abc")
    assert rows.fingerprint(str(path)) == before


@pytest.mark.parametrize(
    ("name", "format", "count"),
    [
        ("gsm8k/train.jsonl", "question_answer", 7473),
        ("dolly/dolly_hhrlhf_small.jsonl", "prompt_completion", 1000),
        ("wiki_demo.txt", "text", None),
    ],
)
def test_real_rows_become_conversations(real_data, name, format, count):
    source = str(real_data / name)
    conversations = [rows.to_conversation(row, rows.detect(row), {}) for row in rows.read(source)]
    assert rows.detect_format([source], "line", {}) == format
    assert len(conversations) == count or count is None
    assert all(conversation.messages[-1].supervised for conversation in conversations)
