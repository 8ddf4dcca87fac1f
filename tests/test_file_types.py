"""Files of every type are read, damaged ones refused in one line, whatever their bytes."""

import bz2
import contextlib
import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import short

from finetune.data import encodings, readers, remote, rows, source_files
from finetune.data.problems import Problems
from finetune.errors import DataError, FinetuneError

QA = [{"question": f"q{n}", "answer": f"ä{n}"} for n in range(3)]
AS_LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in QA).encode()


def values(path: Path | str, unit: str = "line") -> list[dict[str, Any]]:
    return [row.values for row in readers.read(str(path), unit)]


def refused(path: Path | str) -> str:
    with pytest.raises(DataError) as caught:
        list(readers.read(str(path)))
    return str(caught.value)


def zstd(data: bytes) -> bytes:
    import pyarrow

    packed: bytes = pyarrow.Codec("zstd").compress(data, asbytes=True)
    return packed


COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd,
}  # fmt: skip


@pytest.mark.parametrize("ending", COMPRESSED)
def test_compressed_lines_are_read(tmp_path, ending):
    path, compress = tmp_path / f"rows.jsonl{ending}", COMPRESSED[ending]
    path.write_bytes(compress(AS_LINES) + compress(AS_LINES))
    assert values(path) == QA * 2
    [note] = source_files.expand(str(tmp_path), "data.train")[0]
    assert note == str(path)


@pytest.mark.parametrize("ending", COMPRESSED)
def test_a_compressed_file_that_ends_too_early_is_refused(tmp_path, ending):
    path, many = tmp_path / f"rows.jsonl{ending}", AS_LINES * 1_000
    whole = COMPRESSED[ending](many)
    for size in (len(whole) - 5, len(whole) // 2, 12):
        path.write_bytes(whole[:size])
        encodings._encoding.cache_clear()
        says = refused(path)
        assert says.startswith(str(path))
        assert "damaged or incomplete" in says, says


def arrow_table() -> Any:
    import pyarrow

    return pyarrow.Table.from_pylist(QA)


@pytest.mark.parametrize("is_stream", [False, True], ids=["file", "stream"])
def test_arrow_files_are_read(tmp_path, is_stream):
    from pyarrow import ipc

    table = arrow_table()
    for name in ("rows.arrow", "rows.feather"):
        make = ipc.new_stream if is_stream else ipc.new_file
        with make(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
        assert values(tmp_path / name) == QA
    (tmp_path / "rows.arrow").write_bytes(b"ARROW1 and nothing more")
    assert "not a whole Arrow file" in refused(tmp_path / "rows.arrow")


def excel(path: Path, *sheets: list[list[Any]]) -> Path:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.remove(book.active)
    for number, lines in enumerate(sheets, 1):
        sheet = book.create_sheet(f"Sheet {number}")
        for line in lines:
            sheet.append(line)
    book.save(path)
    return path


def test_excel_files_are_read(tmp_path):
    import datetime

    day = datetime.datetime(2026, 11, 27)
    table = [["question", "answer", None], ["q", 42, None], ["r", 1.5], [None, None],
             [True, day, None]]  # fmt: skip
    path = excel(tmp_path / "rows.xlsx", [], table, [["other"], ["x"]])
    read = list(readers.read(str(path)))
    assert [row.place.line for row in read if not readers.is_empty(row)] == [2, 3, 5]
    assert [row.values for row in read] == [
        {"question": "q", "answer": "42"}, {"question": "r", "answer": "1.5"},
        {"question": "", "answer": ""}, {"question": "TRUE", "answer": "2026-11-27"},
    ]  # fmt: skip
    assert readers.describe(str(path)) == f"{path} (sheet Sheet 2, not Sheet 3)"
    problems = Problems()
    assert len(list(rows.samples([str(path)], "auto", {}, "line", None, problems))) == 3
    assert problems.num_empty == 1


def test_a_cell_of_excel_behind_the_header_is_refused(tmp_path):
    path = excel(tmp_path / "rows.xlsx", [["question", "answer"], ["q", "a", "b"]])
    assert "rows.xlsx:2: 3 cells, but the header names 2 columns" in refused(path)
    path.write_bytes(b"PK\x03\x04")
    assert "not a whole Excel file" in refused(path)


def test_excel_without_its_package_names_the_extra(tmp_path, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "rows.xlsx").write_bytes(b"PK\x03\x04")
    with pytest.raises(FinetuneError, match=r"needs the package openpyxl; pip install .*\[data\]"):
        list(readers.read(str(tmp_path / "rows.xlsx")))


def test_markdown_is_text(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("# A\n\none\ntwo\n\nthree\n")
    assert values(path, "paragraph") == [{"text": "# A"}, {"text": "one\ntwo"}, {"text": "three"}]
    assert source_files.expand(str(tmp_path), "data.train") == ([str(path)], [])
    (tmp_path / "rows.jsonl").write_bytes(AS_LINES)
    files, [note] = source_files.expand(str(tmp_path), "data.train")
    assert files == [str(tmp_path / "rows.jsonl")]
    assert f"{path} (a page beside rows)" in note


@pytest.mark.parametrize(
    ("delimiter", "name"),
    [("^", "a caret"), ("~", "a tilde"), (":", "a colon"), ("\x1f", "a unit separator"),
     ("\x01", "Ctrl-A"), ("¦", "a broken bar"), (";", "a semicolon"), ("|", "a bar")],
)  # fmt: skip
def test_a_delimiter_is_recognised_and_reported(tmp_path, delimiter, name):
    path = tmp_path / "rows.csv"
    path.write_text(f"question{delimiter}answer\na{delimiter}b, c\n")
    assert values(path) == [{"question": "a", "answer": "b, c"}]
    assert f"(separated by {name})" in readers.describe(str(path))


def test_a_colon_in_the_only_column_is_no_delimiter(tmp_path):
    (tmp_path / "rows.csv").write_text("text: long\none: two: three\nfour\n")
    assert values(tmp_path / "rows.csv") == [
        {"text: long": "one: two: three"}, {"text: long": "four"},
    ]  # fmt: skip


@pytest.mark.parametrize("ending", [".ndjson", ".jsonlines", ".jl"])
def test_other_endings_of_json_lines_are_known(tmp_path, ending):
    (tmp_path / f"rows{ending}").write_bytes(AS_LINES)
    assert values(tmp_path / f"rows{ending}") == QA


# URLs.


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A file system of fsspec in memory, and a folder for copies of its files."""
    import fsspec

    remote.keep_in(str(tmp_path / "cache"))
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)
    remote._folder.clear()


def test_a_url_is_copied_once_and_again_when_it_changes(store, tmp_path):
    store.pipe("/bucket/rows.jsonl", AS_LINES)
    url = "memory://bucket/rows.jsonl"
    assert values(url) == QA
    assert values(url) == QA
    assert str(next(readers.read(url)).place) == f"{url}:1"
    before = source_files.sources(url, None).train
    copies = list((tmp_path / "cache/files").glob("*.jsonl"))
    assert len(copies) == 1
    store.pipe("/bucket/rows.jsonl", AS_LINES[: AS_LINES.index(b"\n") + 1])
    assert values(url) == QA[:1]
    assert source_files.sources(url, None).train != before


def test_folders_and_globs_of_urls_are_expanded(store):
    for name in ("train.jsonl", "dev.jsonl", "deep/more.jsonl.gz", "README.md", "x.bin"):
        data = gzip.compress(AS_LINES + name.encode()[:0]) if name.endswith("gz") else AS_LINES
        store.pipe(f"/bucket/{name}", data + b"\n" * len(name) if name.endswith("l") else data)
    found = source_files.sources("memory://bucket", None)
    assert list(found.train) == [
        "memory://bucket/deep/more.jsonl.gz", "memory://bucket/train.jsonl",
    ]  # fmt: skip
    [note] = found.notes
    assert "memory://bucket/README.md (describes data)" in note
    assert "memory://bucket/dev.jsonl (named as validation rows)" in note
    assert list(source_files.sources("memory://bucket/t*.jsonl", None).train) == [
        "memory://bucket/train.jsonl"
    ]
    [note] = source_files.sources("memory://bucket/de*.jsonl", None).notes
    assert "dev.jsonl is trained on, though named as rows to hold out" in note


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("memory://bucket/none.jsonl", "no such file; correct the name"),
        ("nothing://bucket/rows.jsonl", "fsspec cannot read it: ValueError: Protocol not known"),
        ("memory://bucket/none*.jsonl", "holds no file with rows"),
    ],
)
def test_a_wrong_url_is_refused(store, url, says):
    with pytest.raises(DataError) as caught:
        source_files.sources(url, None)
    assert says in str(caught.value)
    assert url in str(caught.value)


def test_a_file_url_is_a_path(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(AS_LINES)
    assert list(source_files.sources(f"file://{tmp_path}/rows.jsonl", None).train) == [
        str(tmp_path / "rows.jsonl")
    ]


# The Hub.


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name:test", ("owner/name", None, "test")),
        ("owner/name/main", ("owner/name", "main", "train")),
        ("owner/name/main:test[:10]", ("owner/name", "main", "test[:10]")),
    ],
)
def test_a_hub_name_may_have_a_subset_and_a_split(tmp_path, monkeypatch, name, asked):
    import datasets

    calls = []

    def load_dataset(path, subset, split):
        calls.append((path, subset, split))
        return [{"text": "a"}]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert values(name) == [{"text": "a"}]
    assert calls == [asked]


def test_a_missing_subset_is_asked_for(tmp_path, monkeypatch):
    import datasets

    def load_dataset(path, subset, split):
        raise ValueError("Config name is missing.\nPlease pick one among: ['main', 'socratic']")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert "name the subset, as owner/name/subset:split" in refused("owner/name")


# Any bytes.


def valid_files(folder: Path) -> list[Path]:
    """Write a valid file of each type, and of some encodings and compressions."""
    from pyarrow import ipc, parquet

    table = arrow_table()
    chats = [{"messages": [{"role": "user", "content": "q"},
                           {"role": "assistant", "content": [{"type": "text", "text": "é"}]},
                           ]}]  # fmt: skip
    written: dict[str, bytes] = {
        "rows.jsonl": AS_LINES, "chats.json": json.dumps(chats * 3, ensure_ascii=False).encode(),
        "rows.csv": "question;answer\na;\"b\n;\"\"c\"\nd;é\n".encode(),
        "old.csv": "question,answer\nqué,añ\n".encode("cp1252"),
        "rows.tsv": "question\tanswer\na\tb\n".encode("utf-16"), "rows.txt": "a\n\né\n".encode(),
        "page.md": b"# a\n\nb\n",
        **{f"rows.jsonl{ending}": made(AS_LINES * 9) for ending, made in COMPRESSED.items()},
    }  # fmt: skip
    for name, data in written.items():
        (folder / name).write_bytes(data)
    parquet.write_table(table, folder / "rows.parquet")
    for name, make in (("file.arrow", ipc.new_file), ("stream.arrow", ipc.new_stream)):
        with make(str(folder / name), table.schema) as writer:
            writer.write_table(table)
    with contextlib.suppress(pytest.skip.Exception):
        excel(folder / "rows.xlsx", [["question", "answer"], ["q", 1], ["r", None]])
    return sorted(folder.iterdir())


PIECES = [b"", b"\0", b"\n", b"\r", b'"', b",", b"[", b"]", b"{", b"}", b":", b"\\ud800", b"\xff",
          b"\xef\xbb\xbf", b"\xff\xfe", b"\xc3", b"null", b"-1e999", b"NaN", b"\t"]  # fmt: skip


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Return data with one to four pieces replaced, cut, doubled or flipped."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(changed) + 1)
        until = min(len(changed), at + chance.choice((0, 1, 1, 2, 8, 64)))
        how = chance.randrange(4)
        if how == 0:
            changed[at:until] = chance.choice(PIECES)
        elif how == 1:
            changed[at:until] = bytes(chance.randrange(256) for _ in range(until - at))
        elif how == 2:
            changed[at:at] = changed[at:until] * chance.choice((1, 2, 200))
        else:
            del changed[at : len(changed) if chance.random() < 0.2 else until]
    return bytes(changed)


@pytest.mark.parametrize("number", short([200, 10_000], 200))
def test_any_bytes_give_rows_or_one_plain_error(tmp_path, number):
    """No traceback, and no message without the name of the file."""
    (tmp_path / "valid").mkdir()
    files, chance = valid_files(tmp_path / "valid"), random.Random(19)
    originals = {path: path.read_bytes() for path in files}
    num_rows = num_refused = 0
    for count in range(number):
        original = files[count % len(files)]
        path = tmp_path / original.name
        path.write_bytes(mutated(originals[original], chance))
        encodings._encoding.cache_clear()
        problems = Problems()
        try:
            source_files.fingerprint(str(path))
            source_files._guessed(str(path))
            stream = rows.samples([str(path)], "auto", {}, "paragraph", None, problems)
            num_rows += sum(1 for _ in stream)
            readers.describe(str(path))
            problems.raise_if_any()
        except Exception as exc:
            num_refused += 1
            where = f"input {count}: {path.name}: {path.read_bytes()!r}"
            if not isinstance(exc, FinetuneError) or str(path) not in str(exc):
                raise AssertionError(where) from exc
            str(exc).encode()
    assert min(num_rows, num_refused) > number // 10
