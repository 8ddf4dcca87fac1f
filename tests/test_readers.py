"""Every file type is read with line numbers; unreadable input is refused by file and line."""

import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl

from finetune.data import formats, readers, rows, source_files
from finetune.data.conversations import Message
from finetune.data.problems import Problems
from finetune.errors import DataError

QA = {"question": "q", "answer": "a"}


def lines_and_values(path: Path, text_unit: str = "line") -> list[tuple[int, dict[str, Any]]]:
    return [(row.place.line, row.values) for row in readers.read(str(path), text_unit)]


def refuses(match: str) -> Any:
    return pytest.raises(DataError, match=match)


def qa(question: str, answer: str) -> dict[str, str]:
    return {"question": question, "answer": answer}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "rows.jsonl", '{"text": "a"}\n\n   \n{"text": "b"}\r\n{"text": "c"}',
            [(1, {"text": "a"}), (4, {"text": "b"}), (5, {"text": "c"})],
        ),
        (
            "rows.csv", 'question,answer\n"a\n\nb",c\n\nd,"e, ""f"""\n"g","h\n"\ni,j\n',
            [
                (2, qa("a\n\nb", "c")), (6, qa("d", 'e, "f"')), (7, qa("g", "h\n")),
                (9, qa("i", "j")),
            ],
        ),
        (
            "rows.csv", "question,answer\n007,1e3\nnull,\n",
            [(2, qa("007", "1e3")), (3, qa("null", ""))],
        ),
        ("rows.csv", "\n\nquestion,answer\na,b\n", [(4, qa("a", "b"))]),
        ("rows.csv", f"text\n{'word ' * 40_000}\n", [(2, {"text": "word " * 40_000})]),
        (
            "rows.csv", 'text\n"one, two; three"\nfour\n',
            [(2, {"text": "one, two; three"}), (3, {"text": "four"})],
        ),
        (
            "rows.csv", "Customer Question , answer,,\na, b,,x\n",
            [(2, {"Customer Question": "a", "answer": "b", "(column 3)": "", "(column 4)": "x"})],
        ),
        (
            "rows.txt", "a\r\nb\r\n\r\nc\r\n",
            [(1, {"text": "a"}), (2, {"text": "b"}), (4, {"text": "c"})],
        ),
    ],
    ids=[
        "JSON Lines with blank lines", "cells of several lines", "a cell stays text",
        "blank lines before the header", "a cell holds a book", "one column",
        "blanks around names of columns", "line ends of Windows",
    ],
)  # fmt: skip
def test_rows_are_numbered_by_line_as_an_editor_does(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content.encode())
    assert lines_and_values(tmp_path / name) == expected


def unreadable(path: Path, content: str | bytes) -> str:
    """What the user reads about a file; it always begins with its name."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        list(readers.read(str(path)))
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


def test_a_json_row_is_known_by_its_number(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"text": "a\nb"}, {"text": "c", "n": [1, {"d": 2}]}], indent=2))
    assert [(str(row.place), row.values) for row in readers.read(str(path))] == [
        (f"{path} row 1", {"text": "a\nb"}), (f"{path} row 2", {"text": "c", "n": [1, {"d": 2}]}),
    ]  # fmt: skip


def test_empty_rows_of_a_table_are_skipped_and_counted(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('question,answer\n,\na,b\n , \n,,,\n""\nc,\n')
    problems = Problems()
    read = list(rows.samples([str(path)], "auto", {}, "line", None, problems))
    assert [sample.conversations[0].place.line for sample in read] == [3]
    assert (problems.num_rows, problems.num_empty) == (2, 4)
    assert len(problems) == 1, "that of half a row is an error"
    path.write_text("question,answer\n,\n,\n")
    with refuses("all its rows are empty"):
        rows.check([[str(path)]], "auto", {}, "line", None)


@pytest.mark.parametrize(
    "again", ["question,answer", '"question",answer', "question , answer", "\ufeffquestion,answer"]
)
def test_a_repeated_header_is_refused(tmp_path, again):
    """cat a.csv b.csv > rows.csv"""
    says = unreadable(tmp_path / "rows.csv", f"question,answer\na,b\n{again}\nc,d\n")
    assert says.startswith(":3: repeats the header; were files joined? Remove this line")


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


def test_parquet_rows_are_numbered_from_1(parquet):
    values = [qa("a", "b"), qa("c", "d")]
    assert lines_and_values(parquet(values)) == list(enumerate(values, 1))


IN_EACH_TYPE = {
    ".jsonl": '{"text": "é"}', ".json": '[{"text": "é"}]', ".csv": "text\né", ".txt": "é",
}  # fmt: skip


def test_parquet_keeps_conversations(parquet):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (row,) = readers.read(str(parquet([{"messages": turns}])))
    assert formats.to_conversation(row, formats.detect(row), {}).messages == (
        Message("user", "q"),
        Message("assistant", "a", supervised=True),
    )


@pytest.mark.parametrize(
    "name", ["rows.JSONL", "rows.Json", "rows.CSV", "rows.TXT", "rows.PARQUET"]
)
def test_a_file_type_may_be_written_in_capitals(tmp_path, parquet, name):
    path = tmp_path / name
    if text := IN_EACH_TYPE.get(path.suffix.lower()):
        path.write_text(text)
    else:
        parquet([{"text": "é"}], name)
    assert [values for _, values in lines_and_values(path)] == [{"text": "é"}]


@pytest.mark.parametrize("suffix", IN_EACH_TYPE)
def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    path.write_text("\ufeff" + IN_EACH_TYPE[suffix], encoding="utf-8")
    assert [values for _, values in lines_and_values(path)] == [{"text": "é"}]


@pytest.mark.parametrize(
    "reading",
    [
        lambda path: list(readers.read(path)), source_files.fingerprint,
        lambda path: source_files.sources(path, None),
    ],
)  # fmt: skip
def test_a_missing_file_is_refused(tmp_path, reading):
    path = str(tmp_path / "absent.jsonl")
    takes = "take files, folders, globs, URLs, or Hub names"
    with refuses(f"{re.escape(path)}: no such file in .*.* {takes}"):
        reading(path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.txt"])
@pytest.mark.parametrize("content", ["", "\n", " \n\n"])
def test_an_empty_file_is_refused(tmp_path, name, content):
    says = unreadable(tmp_path / name, content)
    assert "holds no rows" in says or "should hold a list of rows" in says


@pytest.mark.parametrize(
    ("name", "content"), [("rows.csv", "question,answer\n"), ("rows.json", "[]")]
)
def test_a_file_without_rows_is_refused(tmp_path, name, content):
    assert ": holds no rows" in unreadable(tmp_path / name, content)


def test_a_parquet_file_without_rows_is_refused(parquet):
    import pyarrow

    path = parquet([], schema=pyarrow.schema([("question", pyarrow.string())]))
    with refuses(re.escape(str(path)) + ": holds no rows"):
        list(readers.read(str(path)))


def test_a_damaged_parquet_file_is_refused(tmp_path, datasets_cache):
    says = unreadable(tmp_path / "rows.parquet", b"PAR1 and nothing more")
    assert "not a whole Parquet file" in says


COLUMNS = "but the header names 2 columns"


@pytest.mark.parametrize(
    ("name", "content", "place", "says"),
    [
        ("jsonl", '{"a": 1}\n{"a": }\n', ":2", "broken JSON: Expecting value at character 7"),
        ("jsonl", '{"a": 1}\n\n{"a": "x"\n', ":3", "broken JSON"),
        ("jsonl", '{"a": 1} {"a": 2}\n', ":1", "broken JSON: Extra data at character 10"),
        ("jsonl", '{"a": 1}\n{"a": 2},\n', ":2", "the comma at its end belongs to a list"),
        ("json", '{"n": 1, "data": [{"a": 1}]}', "", "write the list under 'data' alone"),
        ("json", '{"a": 1}', "", "one object per line is .jsonl"),
        (
            "jsonl", '{"a": 1}\n[1, 2]\n', ":2",
            "a row should be an object like {...}, got [1, 2]",
        ),
        ("jsonl", '"words"\n', ":1", "a row should be an object"),
        ("jsonl", "null\n", ":1", "a row should be an object"),
        ("jsonl", '[\n{"a": 1}\n]', ":1", "a file that holds one list is .json"),
        ("jsonl", '[{"a": 1}]', ":1", "a file that holds one list is .json"),
        ("json", '\n\n{"a": 1}\n{"a": 2}', ": ", "one object per line is .jsonl"),
        ("json", '[\n{"a": 1},\n{"a": }\n]', ":3", "broken JSON: Expecting value at column 7"),
        ("json", '[\n{"a": 1}\n{"a": 2}\n]', ":3", "broken JSON: Expecting ',' delimiter"),
        ("json", '[\n{"a": 1},\n5\n]', " row 2", "a row should be an object like {...}, got 5"),
        # Or the second list would be lost.
        ("json", '[\n{"a": 1}\n]\n[\n{"a": 2}\n]', ":4", "broken JSON: Extra data"),
        (
            "csv", "question,answer\na,b\nc\n", ":3",
            f"1 cells, {COLUMNS} ['question', 'answer']",
        ),
        ("csv", "question,answer\na,b,c\n", ":2", f"3 cells, {COLUMNS}"),
        ("csv", 'question,answer\n"a\nb",c\nd, e, f\n', ":4", "3 cells"),
        ("csv", 'question,answer\na,"b"c\n', ":2", "broken CSV"),
        # The line where the quote was left open.
        ("csv", 'question,answer\na,b\nc,"d\ne,f\ng,h\n', ":3", "broken CSV"),
        (
            "csv", 'question,answer\na, "b, c"\n', ":2",
            f"3 cells, {COLUMNS} ['question', 'answer']; put the quote right after",
        ),
        # Or one of them would go without a word.
        *(("csv", f"{header}\na,b,c\n", ":1", "the header names the column 'answer' twice")
          for header in ("answer,question,answer", "answer, answer", '"answer",answer')),
    ],
)  # fmt: skip
def test_a_broken_file_is_refused_at_its_line(tmp_path, name, content, place, says):
    message = unreadable(tmp_path / f"rows.{name}", content)
    assert message.startswith(place)
    assert not message.removeprefix(place)[:1].isdigit()
    assert says in message


@pytest.mark.parametrize("name", ["rows.xls", "rows", "rows.jsonl.lz4", "rows.parquet.gz"])
def test_the_error_for_an_unknown_file_type_lists_the_known_ones(tmp_path, name):
    says = unreadable(tmp_path / name, b"anything")
    assert "unknown file type" in says
    assert "use one of .jsonl .json .csv .tsv .parquet .arrow .xlsx .txt .md" in says


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("[" * 200_000, "brackets are nested too deeply"),
        ('{"question": ' + "9" * 5_000 + "}", "a number has too many digits"),
        ('{"question": "q", "answer": "a", "answer": "b"}', "'answer' is given twice"),
    ],
    ids=["nested too deep", "a number too long", "a key twice"],
)
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_json_that_python_cannot_hold_is_refused(tmp_path, line, says, ending):
    message = unreadable(tmp_path / f"rows.{ending}", f"[{line}]" if ending == "json" else line)
    assert message.startswith(": broken JSON: " if ending == "json" else ":1: broken JSON: ")
    assert says in message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", '{"text": "ö"}\n{"text": "caf\udce9"}\n'),
        ("rows.json", '[{"text": "ö"},\n{"text": "caf\udce9"}]\n'),
        ("rows.csv", "töxt\ncaf\udce9\n"),
        ("rows.txt", "ö\ncaf\udce9\n"),
    ],
)
def test_bytes_that_are_not_utf8_are_refused_at_their_line(tmp_path, name, content):
    message = unreadable(tmp_path / name, content.encode("utf-8", "surrogateescape"))
    assert message.startswith(":2: byte 0xe9 at position ")
    assert "; everything before it is UTF-8; correct this character, or save the file" in message
    assert message.endswith("caf\\xe9") or '{"text": "caf\\xe9"}' in message


@pytest.mark.parametrize(
    "name",
    ["owner/no-such-name", "owner/name-2.5", "owner/name-v1.0:test", "owner/name/subset:test"],
)
def test_a_name_without_a_file_is_looked_up_on_the_hub(name):
    with refuses(re.escape(name) + ": datasets cannot load it"):
        list(readers.read(name))


def test_sources_are_lists_of_names(tmp_path):
    a, b = (str(write_jsonl(tmp_path / f"{n}.jsonl", [{"text": n}])) for n in "ab")
    assert [list(names) for names in source_files.sources(a, None)[:2]] == [[a], []]
    assert [list(names) for names in source_files.sources([a], b)[:2]] == [[a], [b]]
    assert [list(names) for names in source_files.sources([a, b], None)[:2]] == [[a, b], []]


def test_an_empty_list_of_sources_is_an_error(tmp_path):
    path = str(write_jsonl(tmp_path / "a.jsonl", [QA]))
    for key, given in (("data.train", ([], path)), ("data.eval", (path, []))):
        with refuses(f"{key}: the list is empty; name at least one file"):
            source_files.sources(*given)


def test_a_device_and_a_pipe_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name in ("/dev/null", str(tmp_path / "pipe.jsonl")):
        with refuses(f"data.train: {name} is a device or a pipe"):
            source_files.sources(name, None)


@pytest.mark.parametrize(
    "copied", [False, True], ids=["the same file", "a copy under another name"]
)
def test_the_same_rows_for_training_and_evaluation_are_refused(tmp_path, copied):
    train = write_jsonl(tmp_path / "train.jsonl", [QA])
    evaluation = write_jsonl(tmp_path / "dev.jsonl", [QA]) if copied else train
    says = f"^data.eval: {evaluation} holds the same rows as data.train {train}; "
    with refuses(says + "do not evaluate on training rows"):
        source_files.sources([str(train)], [str(evaluation)])


def test_the_same_rows_given_twice_are_refused(tmp_path):
    path = str(write_jsonl(tmp_path / "train.jsonl", [QA]))
    with refuses(r"data\.train: .* holds the same rows as .*; .*, and list each file once"):
        source_files.sources([path, path], None)


def test_a_fingerprint_changes_with_any_byte(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("abc")
    before = source_files.fingerprint(str(path))
    path.write_text("abd")
    assert source_files.fingerprint(str(path)) != before
    path.write_text("abc")
    assert source_files.fingerprint(str(path)) == before


# Folders, globs and Hub names.


def write(path: Path, values: Any = (QA,)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_jsonl(path, values)


def found(source: Any, key: str = "data.train") -> tuple[list[str], list[str]]:
    """Files by their names under the folder, and the notes."""
    files, notes = source_files.expand(str(source), key)
    return [os.path.relpath(file, source) for file in files], notes


def test_every_file_of_a_folder_is_read_or_reported(tmp_path):
    """datasets drops files without "train" in their names, and those of rarer types."""
    for name in ("train_a.jsonl", "b.jsonl", "deep/er/c.jsonl"):
        write(tmp_path / name)
    (tmp_path / "d.csv").write_text("question,answer\na,b\n")
    (tmp_path / ".git").mkdir()
    others = "README.md LICENSE .gitattributes table.xls .git/config changelog.txt notes.md"
    for name in others.split():
        (tmp_path / name).write_text("words")
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / "empty.jsonl").touch()
    files, notes = found(tmp_path)
    assert files == ["b.jsonl", "d.csv", "deep/er/c.jsonl", "train_a.jsonl"]
    [note] = notes
    for names, why in (
        (".git/ .gitattributes", "hidden"),
        ("LICENSE README.md changelog.txt", "describes data"),
        ("_SUCCESS table.xls", "type not known"),
        ("notes.md", "a page beside rows"),
        ("empty.jsonl", "empty"),
    ):
        listed = ", ".join(f"{tmp_path}/{name}" for name in names.split())
        assert f"{listed} ({why})" in note


def test_rows_of_folders_and_globs_have_places_that_exist(tmp_path):
    for name, text in (("a.txt", "one\n\ntwo\n"), ("deep/b.txt", "three\n")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for source in (tmp_path, tmp_path / "**", tmp_path / "**/*.txt", tmp_path / "*"):
        files = source_files.sources(str(source), None).train
        places = [str(row.place) for file in files for row in readers.read(file)]
        assert places == [f"{tmp_path}/a.txt:1", f"{tmp_path}/a.txt:3", f"{tmp_path}/deep/b.txt:1"]


def test_a_name_with_the_signs_of_a_glob_may_be_a_file(tmp_path):
    path = write(tmp_path / "rows[1].jsonl")
    write(tmp_path / "rows1.jsonl")
    assert source_files.expand(str(path), "data.train") == ([str(path)], [])


@pytest.mark.parametrize("name", ["*.jsonl", "absent/*.jsonl", "**/x*", "rows[1].jsonl"])
def test_a_glob_that_matches_nothing_is_refused(tmp_path, name):
    (tmp_path / "rows.csv").write_text("question,answer\na,b\n")
    with refuses(r"^data\.train: .* matches no file; searched in /"):
        source_files.sources(str(tmp_path / name), None)


def test_a_folder_without_rows_is_refused_with_what_it_holds(tmp_path):
    (tmp_path / "table.xls").write_text("words")
    with refuses(r"holds no file with rows; not read: .*/table\.xls \(type not known\)"):
        source_files.sources(str(tmp_path), None)


def test_links_are_followed_once(tmp_path):
    write(tmp_path / "folder/a.jsonl")
    (tmp_path / "folder/again").symlink_to(tmp_path / "folder")
    (tmp_path / "folder/b.jsonl").symlink_to(tmp_path / "folder/a.jsonl")
    assert found(tmp_path / "folder")[0] == ["a.jsonl"]
    (tmp_path / "folder/c.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with refuses(r"folder/c\.jsonl: links to .*gone\.jsonl, which does not exist"):
        found(tmp_path / "folder")


@pytest.mark.parametrize(
    ("names", "train", "evaluation"),
    [
        ("train.jsonl test.jsonl", "train.jsonl", "test.jsonl"),
        ("train.jsonl dev.jsonl test.jsonl", "train.jsonl", "dev.jsonl"),
        ("train-00000-of-00002.jsonl train-00001-of-00002.jsonl validation-00000-of-00001.jsonl",
         "train-00000-of-00002.jsonl "
         "train-00001-of-00002.jsonl", "validation-00000-of-00001.jsonl"),
        ("train/a.jsonl test/a.jsonl", "train/a.jsonl", "test/a.jsonl"),
        ("extra.jsonl my_train.jsonl my_test.jsonl", "extra.jsonl my_train.jsonl", "my_test.jsonl"),
        ("latest.jsonl contest.jsonl", "latest.jsonl contest.jsonl", "latest.jsonl contest.jsonl"),
    ],
)  # fmt: skip
def test_a_folder_of_splits_is_read_by_split(tmp_path, names, train, evaluation):
    for number, name in enumerate(names.split()):
        write(tmp_path / name, [{**QA, "question": f"q{number}"}])
    files, notes = found(tmp_path)
    assert sorted(files) == sorted(train.split())
    assert bool(notes) == (train != evaluation)
    assert sorted(found(tmp_path, "data.eval")[0]) == sorted(evaluation.split())
    if train != evaluation:
        both = source_files.sources(str(tmp_path), str(tmp_path))
        assert not set(both.train) & set(both.eval)
        assert f"{tmp_path}/{evaluation} (named as " in both.notes[0]


def test_a_folder_with_only_held_out_rows_is_refused(tmp_path):
    write(tmp_path / "test.jsonl")
    write(tmp_path / "questions.jsonl")
    with refuses(r"test\.jsonl is named as rows to hold out, .* list the files to train on, or"):
        found(tmp_path)
    files, notes = source_files.expand(f"{tmp_path}/**/*", "data.train")
    assert len(files) == 2
    assert notes == [
        f"data.train: {tmp_path}/test.jsonl is trained on, though named as rows to hold out"
    ]


@pytest.mark.parametrize(
    "other", ["folder", "folder/*.jsonl", "link.jsonl", "./folder//rows.jsonl"]
)
def test_the_same_file_by_two_ways_is_found(tmp_path, other):
    path = write(tmp_path / "folder/rows.jsonl")
    (tmp_path / "link.jsonl").symlink_to(path)
    with refuses(r"^data\.eval: .*jsonl holds the same rows as data\.train .*jsonl; "):
        source_files.sources(str(path), f"{tmp_path}/{other}")


def test_a_folder_of_save_to_disk_is_read(tmp_path, datasets_cache):
    import datasets

    saved = tmp_path / "saved"
    one = datasets.Dataset.from_list([QA])
    two = datasets.Dataset.from_list([{**QA, "question": "r"}])
    datasets.DatasetDict({"train": one, "test": two}).save_to_disk(saved)
    files, notes = found(saved)
    assert files == ["train"]
    assert "saved/test (named as test rows)" in notes[0]
    assert lines_and_values(saved / "train") == [(1, QA)]
    assert found(saved, "data.eval")[0] == ["test"]
    assert source_files.expand(str(saved / "test"), "data.train") == ([str(saved / "test")], [])


@pytest.mark.parametrize(
    "name",
    [
        "rows", "./folder/rows", "/folder/rows", "a/b/c/d", "folder/rows.jsonl", "../rows.csv",
        "data/train.jsonl.gz", "data/rows.tsv", "data/rows.xlsx", "data/ROWS.JSONL", "here/rows",
        "no/rows.zst:train",
    ],
)  # fmt: skip
def test_a_name_like_a_file_is_never_looked_up_on_the_hub(tmp_path, monkeypatch, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    with refuses("no such file in"):
        source_files.sources(name, None)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("folder/row.jsonl", "did you mean folder/rows.jsonl?"),
        ("folder/ROWS.JSONL", "did you mean folder/rows.jsonl?"),
        ("nowhere/rows.jsonl", "the folder nowhere does not exist"),
        ("folder/other", "it was not searched on the Hub, because folder is a local folder"),
        ("folder\\rows.jsonl", "write / between folders"),
    ],
)
def test_the_error_for_a_missing_file_suggests_the_nearest(tmp_path, monkeypatch, name, hint):
    write(tmp_path / "folder/rows.jsonl")
    monkeypatch.chdir(tmp_path)
    with refuses(re.escape(f"no such file in {tmp_path}; {hint}")):
        source_files.sources(name, None)


def test_without_the_hub_the_error_says_what_to_do():
    with refuses("give a file or a folder, set HF_ENDPOINT to a mirror, or HF_HUB_OFFLINE=1"):
        source_files.sources("owner/no-such-name", None)


def test_the_home_directory_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write(tmp_path / "rows.jsonl")
    assert list(source_files.sources("~/rows.jsonl", None).train) == [str(path)]


def test_a_name_that_is_not_unicode_can_be_shown(tmp_path):
    """As an archive of Latin-1 names leaves it."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl")
    Path(path).write_text('{"question": ""}\n')
    [file] = source_files.expand(str(tmp_path), "data.train")[0]
    assert file == path
    [row] = readers.read(file)
    assert str(row.place).encode() == str(tmp_path).encode() + rb"/caf\udce9.jsonl:1"
    readers.describe(file).encode()


# What a file is, under any name.


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_the_delimiter_of_a_csv_is_found(tmp_path, delimiter, suffix):
    path = tmp_path / f"rows.{suffix}"
    cells = [
        ["question", "the answer; or, so|"],
        ['a "word"', "one, two"],
        ["b", "three; four|five\tsix, seven"],
    ]
    quoted = [['"' + cell.replace('"', '""') + '"' for cell in line] for line in cells]
    path.write_text("".join(delimiter.join(line) + "\n" for line in quoted))
    assert lines_and_values(path) == [
        (n, dict(zip(cells[0], line))) for n, line in enumerate(cells[1:], 2)
    ]
    unusual = delimiter != {"csv": ",", "tsv": "\t"}[suffix]
    assert ("separated by a" in readers.describe(str(path))) == unusual


@pytest.mark.parametrize(
    "text",
    [
        "question;answer\nWhy, really?;Because, well.\nHow?;So, so, so.\n",
        # Both divide the header in two, but only one the rows
        "question, or so;answer\na;b\nc;d\n",
        "\ufeffquestion;answer\na;b\n",
        "sep=;\nquestion;answer\na;b\n",
    ],
)
def test_a_semicolon_is_found_beside_commas(tmp_path, text):
    path = tmp_path / "rows.csv"
    path.write_text(text, encoding="utf-8")
    [first, *_] = readers.read(str(path))
    assert list(first.values)[1] == "answer"
    assert first.place.line == 1 + text.splitlines().index(";".join(first.values.values()))


TEXTS = {
    "rows.jsonl": '{"text": "é€漢"}\n{"text": "b"}\n',
    "rows.json": '[{"text": "é€漢"},\r\n{"text": "b"}]',
    "rows.csv": "text\né€漢\nb\n", "rows.tsv": "text\nb\né\n", "rows.txt": "é€漢\r\nb\n",
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_utf16_with_its_mark_is_read(tmp_path, name, encoding):
    path = tmp_path / name
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    path.write_bytes((mark + TEXTS[name]).encode(encoding))
    plain = tmp_path / f"plain-{name}"
    plain.write_text(TEXTS[name], encoding="utf-8", newline="")
    assert lines_and_values(path) == lines_and_values(plain)
    assert "UTF-" in readers.describe(str(path))


@pytest.mark.parametrize("name", TEXTS)
def test_gzip_is_read_with_its_lines(tmp_path, name):
    path, plain = tmp_path / f"{name}.gz", tmp_path / name
    path.write_bytes(gzip.compress(TEXTS[name].encode()))
    plain.write_bytes(TEXTS[name].encode())
    assert lines_and_values(path) == lines_and_values(plain)
    path.write_bytes(path.read_bytes()[:-10])
    with refuses(re.escape(str(path)) + ": damaged or incomplete"):
        list(readers.read(str(path)))


ENCODED = [
    ("cp1252", "Das heißt «schön», sagt er \u2013 für 5 €"),
    ("cp1252", "Ça va très bien, merci à tous."),
    ("cp1252", "He said \u201cyes\u201d, it\u2019s fine."),
    ("cp1250", "Zażółć gęślą jaźń. Kiedy przyjdzie moja przesyłka?"),
    ("cp1251", "Съешь же ещё этих мягких французских булок, да выпей чаю."),
    ("koi8-r", "Съешь же ещё этих мягких французских булок, да выпей чаю."),
    ("cp932", "パスワードを忘れました。「再設定」ボタンを押してください。"), ("gb18030", "我的包裹什么时候到。请尽快回复。谢谢"),
    ("utf-16-le", "a b c"), ("utf-16-be", "a b c"),
]  # fmt: skip


@pytest.mark.parametrize(("encoding", "text"), ENCODED)
def test_an_encoding_is_recognised_and_reported(tmp_path, encoding, text):
    path = tmp_path / "rows.txt"
    path.write_bytes(((text + "\n") * 9).encode(encoding))
    assert [values for _, values in lines_and_values(path)] == [{"text": text}] * 9
    found = readers.describe(str(path)).upper().replace("_", "-")
    assert found.endswith(f"({encoding.upper()})")
    [note] = source_files.sources(str(path), None).notes
    assert f"rows.txt is not UTF-8, and is read as {encoding.upper()}" in note.replace("_", "-")


@pytest.mark.parametrize(
    ("content", "place", "says"),
    [
        (  # one damaged character does not make a file cp1252
            "schön\n".encode() + b"sch\xf6n\n", ":2",
            "byte 0xf6 at position 4 is not UTF-8; everything before it is UTF-8",
        ),
        (
            "schön, schö".encode()[:-1], ":1",
            "the file ends inside a character; create it again",
        ),
    ],
)  # fmt: skip
def test_a_damaged_character_is_refused_at_its_line(tmp_path, content, place, says):
    message = unreadable(tmp_path / "rows.txt", content)
    assert message.startswith(place)
    assert says in message


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"PK\x03\x04xl/", "a zip archive or an Excel file"), (b"PAR1\x15", "a Parquet file"),
        (gzip.compress(b"a", mtime=0), "compressed by gzip"), (b"%PDF-1.7", "a PDF"),
    ],
)  # fmt: skip
def test_a_binary_file_is_refused_with_its_type(tmp_path, content, what):
    assert f"this file is {what}, not .csv" in unreadable(tmp_path / "rows.csv", content)


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.txt"])
def test_carriage_return_line_ends_are_refused(tmp_path, name):
    says = unreadable(tmp_path / name, b"question,answer\ra,b\rc,d\r")
    assert says.startswith(
        ":1: lines end in CR alone, as on an old Macintosh; convert them, for example with tr "
    )


def test_parquet_with_a_column_twice_is_refused(tmp_path):
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.Table.from_arrays(
        [pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"]
    )
    parquet.write_table(table, tmp_path / "rows.parquet")
    with refuses(r"rows\.parquet: names a column twice: \['text', 'text'\]; rename one"):
        list(readers.read(str(tmp_path / "rows.parquet")))


def test_long_values_are_shortened_everywhere(tmp_path):
    long = "word " * 100_000
    for name, text in (
        ("a.jsonl", f'{{"text": "{long}'), ("b.jsonl", f'{{"{long}": 1, "{long}": 2}}'),
        ("c.jsonl", f'["{long}"]'), ("d.csv", f"{long},{long}\na,b"), ("e.csv", f"a,{long}\nx"),
        ("f.json", f'[] "{long}"'),
    ):  # fmt: skip
        assert len(unreadable(tmp_path / name, text)) < 500, name


def test_rows_named_like_descriptions_and_linked_files_are_read_once(tmp_path):
    write_jsonl(tmp_path / "citation.jsonl", [{"text": "a"}])
    write_jsonl(tmp_path / "z.jsonl", [{"text": "b"}])
    (tmp_path / "README.md").write_text("What these rows are.")
    (tmp_path / "a_link").symlink_to(tmp_path / "z.jsonl")
    files = source_files.sources(str(tmp_path), None).train
    assert [Path(file).name for file in files] == ["citation.jsonl", "z.jsonl"]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ('question, answer\nq, a\nr,b\ns, "c, d"\n', [("q", "a"), ("r", "b"), ("s", "c, d")]),
        ("question,answer\nq, a\n", [("q", " a")]),  # the header has none
    ],
)
def test_blanks_after_each_separator_are_no_part_of_the_cells(tmp_path, text, rows):
    path = tmp_path / "rows.csv"
    path.write_text(text)
    assert [tuple(row.values.values()) for row in readers.read(str(path))] == rows
    assert ("without the blanks after each separator" in readers.describe(str(path))) == (
        rows[0] == ("q", "a")
    )


def test_a_pipe_in_a_folder_is_reported(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [QA])
    os.mkfifo(tmp_path / "more.jsonl")
    _, notes = source_files.expand(str(tmp_path), "data.train")
    assert "more.jsonl (a device or a pipe)" in notes[0]
