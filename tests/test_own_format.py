"""Rows in a format of a user's own, which a function in FILE.py:NAME reads."""

import argparse
import re

import numpy as np
import pytest
from conftest import TINY_LLAMA, losses, read_jsonl, write_jsonl
from test_tokens import Tokenizing

from finetune import config as configs
from finetune import own_code
from finetune.data import rows
from finetune.data.batches import Batches
from finetune.data.examples import hold_out
from finetune.data.order import Sequences
from finetune.data.problems import Problems
from finetune.errors import ConfigError, DataError, RunDirectoryError, UserError
from finetune.evaluation import command, held_out
from finetune.evaluation.held_out import Reading

TURNS = """
def rows(row):
    if row["votes"] < 2:
        return None
    return {"question": row["Patient"].strip(), "answer": row["Doctor"]}
"""
ROWS = [
    {"Patient": f" is {n} even ", "Doctor": "yes" if n % 2 == 0 else "no", "votes": n % 4}
    for n in range(40)
]


A = "A = {'prompt': 'a', 'completion': 'b'}\n"


@pytest.fixture
def own(workshop):
    """Write a function of the user's own next to the config; gives how a config names it."""
    write_jsonl(workshop.rows, ROWS)

    def own(source: str) -> str:
        (workshop.folder / "own.py").write_text(source)
        return "own.py:rows"

    return own


def samples(workshop, source: str, raw: list, problems: Problems | None = None):
    """What a function makes of rows of a file."""
    name = f"{workshop.folder}/own.py:rows"
    (workshop.folder / "own.py").write_text(source)
    own_code.read(name)
    path = write_jsonl(workshop.folder / "raw.jsonl", raw)
    return list(
        rows.samples(
            [str(path)], name, {}, "line", None, Problems() if problems is None else problems
        )
    )


def test_a_function_reads_rows_and_skips_some(workshop, own, capsys):
    run = workshop.train(data__format=own(TURNS))
    output = capsys.readouterr().out
    assert "data        20 rows -> 20 examples" in output
    assert "; 20 rows skipped by data.format" in output
    assert "own code    " in output
    assert "| is 2 even\n" in output
    identity = workshop.receipt()["identity"]
    assert identity["code of data.format: own.py:rows"] == own_code.sha256(
        f"{workshop.folder}/own.py:rows"
    )
    assert len(read_jsonl(run / "metrics.jsonl")) == 3


def test_rows_keep_their_order_and_line_numbers(workshop):
    made = [sample.conversations[0] for sample in samples(workshop, TURNS, ROWS)]
    kept = [n for n in range(40) if n % 4 > 1]
    assert [conversation.messages[0].content for conversation in made] == [
        f"is {n} even" for n in kept
    ]
    assert [conversation.place.line for conversation in made] == [n + 1 for n in kept]


@pytest.mark.parametrize(
    ("values", "turns"),
    [
        (
            "{'messages': [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': "
            "'b'}]}",
            ["a", "b"],
        ),
        ("{'prompt': 'a', 'completion': 'b'}", ["a", "b"]),
        ("{'text': 'a'}", ["a"]),
    ],
)
def test_every_format_may_come_out_of_a_function(workshop, values, turns):
    [made] = samples(workshop, f"def rows(row):\n    return {values}\n", [{"x": 1}])
    assert [message.content for message in made.conversations[0].messages] == turns


PAIRS = """
def rows(row):
    good, bad = ({"prompt": row["Patient"], "completion": text} for text in ("yes", "no, not so"))
    return {"documents": [good, bad], "fields": {"rank": [1, 0], "votes": row["votes"]}}
"""


def test_documents_may_be_a_tuple(workshop):
    [made] = samples(
        workshop, f"{A}def rows(row):\n    return {{'documents': (A, A)}}\n", [{"x": 1}]
    )
    assert len(made.conversations) == 2


def test_several_documents_of_a_row_are_one_example_with_its_fields(tmp_path, bytes_tokenizer):
    """Never parted by packs, by held-out rows or by an epoch's order; each with its numbers."""
    (tmp_path / "own.py").write_text(PAIRS)
    own_code.read(name := f"{tmp_path}/own.py:rows")
    made = Tokenizing(tmp_path).prepare(ROWS, bytes_tokenizer, format=name, max_length=100)
    assert len(made) == 40
    assert made.counts(np.arange(3))["documents"] == 6
    train, held = hold_out(made, 0.25, seed=1)
    assert (len(train), len(held)) == (30, 10)
    for examples in (made, train, held):
        packed = Batches(
            Sequences(examples, True, 100, seed=1), seed=1, global_batch_size=4, micro_batch_size=2
        )
        assert packed.largest().counts["examples"] > 2, "packs hold several examples"
        for batch in (batch for step in packed.epoch() for batch in step):
            assert batch.example.bincount().tolist() == [2] * batch.counts["examples"]
            assert batch.columns["rank"].tolist() == [1.0, 0.0] * batch.counts["examples"]
            text = bytes_tokenizer.decode(batch.inputs["input_ids"][0])
            votes = [int(number) % 4 for number in re.findall(r"is (\d+) even", text)]
            assert batch.columns["votes"].tolist() == votes
        assert packed.filler().columns["votes"].shape == (0,)


def test_rows_of_several_documents_are_learned_whole_or_not_at_all(tmp_path, bytes_tokenizer):
    (tmp_path / "own.py").write_text(PAIRS)
    own_code.read(name := f"{tmp_path}/own.py:rows")
    tokenizing, longest = Tokenizing(tmp_path), [*ROWS[:3], {"Patient": "x" * 50, "votes": 1}]
    for truncation in ("error", "right", "left"):
        says = tokenizing.refused(
            longest, bytes_tokenizer, format=name, max_length=100, truncation=truncation
        )
        assert says == (
            "115 tokens in 2 documents, over data.max_length 100; set data.max_length: 128, or "
            "data.truncation to drop, as rows of several documents are not cut"
        )
    made = tokenizing.prepare(
        longest, bytes_tokenizer, format=name, max_length=100, truncation="drop"
    )
    assert (len(made), made.num_dropped, made.columns["votes"].tolist()) == (
        3,
        1,
        [0, 0, 1, 1, 2, 2],
    )


def test_advice_for_long_rows_of_several_documents_is_to_drop_them(workshop, own):
    """Also where the last row has one document, and where positions of the model end first."""
    source = PAIRS.replace("[good, bad],", "[good, bad] if row['votes'] < 3 else [good],")
    source = source.replace('"rank": [1, 0], ', "")
    says = "rows are longer than data.max_length 8; .*, or data.truncation to drop, as rows of "
    with pytest.raises(DataError, match=says):
        workshop.check(data__format=own(source), data__max_length=8)
    short = TINY_LLAMA | {"max_position_embeddings": 8}
    with pytest.raises(ConfigError, match="has only 8 positions") as refused:
        workshop.check(data__format=own(PAIRS), data__max_length=256, model__config=short)
    assert "data.truncation to drop, as rows of several documents" in str(refused.value)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (
            "return row['question']",
            r"raw\.jsonl:1: data\.format: .*own\.py:3: KeyError: 'question'",
        ),
        (
            "return [row]",
            r"raw\.jsonl:1: data\.format: .*own\.py:rows should return a dict with "
            r"messages, or .*, got \[\{",
        ),
        ("return {'documents': [A, 3]}", r"should return a dict with messages, or .*, got 3"),
        (
            "return {'documents': (each for each in (A, A))}",
            "own.py:rows: documents should be a list, got a generator",
        ),
        ("return {'documents': ()}", "returns no documents; return None to skip the row"),
        ("return {'documents': []}", "returns no documents; return None to skip the row"),
        (
            "return {'documents': [A, A], 'prompt': 'a'}",
            r"returns \['prompt'\] beside documents, which would be ignored",
        ),
        ("return {'documents': [{**A, 'fields': {}}]}", "returns fields inside a document"),
        (
            "return {'documents': [A, A], 'fields': {'rank': [1, 2, 3]}}",
            r"fields: rank should be a finite number, or a list with one for each document \(2\)"
            r", by name, got \[1, 2, 3\]",
        ),
        ("return {**A, 'fields': {'rank': float('nan')}}", "fields: rank should be a finite"),
        ("return {**A, 'fields': {'rank': 1e300}}", "fields: rank should be a finite"),
        ("return {**A, 'fields': {'rank': 10**400}}", "fields: rank should be a finite"),
        (
            "return {**A, 'fields': {'rank': 2**25 + 1}}",
            "rank is 33,554,433, but fields are float32",
        ),
        ("return {**A, 'fields': {3: 1}}", "fields: 3 should be a finite number"),
        ("return {**A, 'fields': [1]}", r"fields should be a finite number, .* got \[1\]"),
        ("return {1: 'a'}", r"should return a dict with messages"),
        (
            "return {'Patient': 'a'}",
            r"gives columns \['Patient'\], which fit no format \(messages: messages; ",
        ),
        (
            "return {'prompt': 'a', 'completion': 3}",
            r"raw\.jsonl:1: column 'completion' should be text, got 3",
        ),
        ("return {'prompt': 'a', 'chosen': 'b', 'completion': 'c'}", "belongs to preference rows"),
    ],
)
def test_a_mistake_of_the_function_names_the_row_and_the_line_of_the_function(workshop, body, says):
    problems = Problems()
    assert samples(workshop, f"{A}def rows(row):\n    {body}\n", [{"Patient": "x"}], problems) == []
    with pytest.raises(DataError, match=says):
        problems.raise_if_any()


def test_a_function_that_skips_every_row_is_refused(workshop, own):
    with pytest.raises(DataError, match=r"rows\.jsonl: .*own\.py:rows returns None for every row"):
        workshop.check(data__format=own("def rows(row):\n    return None\n"))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"data__columns": {"question": "Patient"}},
            "data.columns: would be ignored: own.py:rows reads the columns of the file itself",
        ),
        ({"data__format": "own.py:row"}, "data.format: own.py defines no row; did you mean rows?"),
        (
            {"data__format": "own.py:N"},
            "data.format: own.py:N is of type int, not a function of a row",
        ),
        ({"data__format": "other.py:rows"}, "data.format: no file other.py in "),
        (
            {"data__format": "rows"},
            "data.format: should be 'auto', 'text', 'prompt_completion', 'question_answer', "
            "'instruction', 'messages', 'preference', 'unpaired', 'choices', "
            "'text_label', 'token_labels' or 'prompt' or FILE.py:NAME, "
            "got 'rows'",
        ),
        ({"data__format": 3}, "'token_labels' or 'prompt' or FILE.py:NAME, got 3"),
        ({"data__format": "own.py:rows\n"}, "or FILE.py:NAME, got 'own.py:rows\\n'"),
    ],
)  # fmt: skip
def test_invalid_references_to_a_function_are_refused(workshop, own, settings, says):
    values = workshop.config(**{"data__format": own(TURNS + "N = 3\n"), **settings})
    with pytest.raises(ConfigError) as caught:
        configs.from_dict(values, folder=workshop.folder)
    assert says in str(caught.value).replace(f"{own_code.shown(workshop.folder)}/", "")


def test_another_function_gives_other_tokens_and_is_another_run(workshop, own):
    workshop.train(data__format=own(TURNS))
    capped = TURNS.replace("strip()", "strip().upper()")
    with pytest.raises(
        RunDirectoryError, match=re.escape("code of data.format: own.py:rows: was ")
    ):
        workshop.train(data__format=own(capped))
    other = workshop.train("other", data__format=own(capped))
    first, second = (read_jsonl(run / "metrics.jsonl")[0] for run in (workshop.run_dir(), other))
    assert first["loss"] != second["loss"], "the cache of tokens tells them apart"


def test_two_functions_of_one_file_share_no_tokens(workshop, own):
    loud = TURNS.replace("def rows", "def loud").replace("strip()", "strip().upper()")
    kind = own(TURNS + loud)
    first, second = (
        workshop.train(name, data__format=kind.replace("rows", name)) for name in ("rows", "loud")
    )
    assert losses(first) != losses(second)


def test_evaluation_rows_with_other_fields_are_refused(workshop, own):
    held = write_jsonl(workshop.folder / "held.jsonl", [{**ROWS[2], "Patient": "new"}])
    source = TURNS.replace('"answer": row["Doctor"]', '"answer": row["Doctor"], "fields": fields')
    fields = "    fields = {} if 'new' in row['Patient'] else {'n': 1}\n"
    source = source.replace("    return {", fields + "    return {")
    with pytest.raises(DataError, match=r"data.eval: data.format gives its rows the fields \[\], "):
        workshop.check(data__format=own(source), data__eval=str(held))


def test_evaluate_reads_rows_by_the_same_function(workshop, own, capsys):
    name = command._format(f"{workshop.folder}/{own(TURNS)}")
    assert len(held_out.read(str(workshop.rows), Reading(name), 3)) == 3
    assert "note: --format skips 4 of 7 rows" in capsys.readouterr().err
    with pytest.raises(UserError, match="--columns: would be ignored"):
        held_out.read(str(workshop.rows), Reading(name, {"question": "Patient"}), 3)
    with pytest.raises(argparse.ArgumentTypeError, match=r"defines no row; did you mean rows\?"):
        command._format(name[:-1])
    with pytest.raises(
        argparse.ArgumentTypeError, match=r"should be auto, .* or FILE.py:NAME, got 'chat'"
    ):
        command._format("chat")
    own(TURNS.replace("votes", "likes"))
    with pytest.raises(DataError, match=r"rows\.jsonl:1: --format: .*own\.py:3: KeyError: 'likes'"):
        held_out.read(str(workshop.rows), Reading(command._format(name)), 3)
