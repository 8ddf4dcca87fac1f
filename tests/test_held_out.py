"""Rows that are held out are written as they were given, and read by `evaluate`."""

import csv
import datetime
import json
from types import SimpleNamespace

import pandas
import pytest
from conftest import forget_process_state, pairs, read_jsonl, write_jsonl

from finetune import config as configs
from finetune import preflight
from finetune.data import held_out
from finetune.engine.rundir import RunDirectory
from finetune.engine.topology import Topology
from finetune.errors import DataError
from finetune.evaluation import held_out as evaluated
from finetune.run import Run


def held(workshop, **changes):
    """Return the rows that a run would hold out, and the texts that it would train on."""
    forget_process_state()
    config, _ = configs.parse(["--config", str(workshop.write(workshop.config(**changes)))])
    data = preflight.prepare(config, Topology(config.train.precision, check_only=True))
    train = data.train.sequences.examples
    spans = (train.input.span(number) for number in range(len(train)))
    texts = [data.tokenizer.decode(train.input.ids[span].tolist()) for span in spans]
    return data.eval.sequences.examples, texts


def written(folder, values):
    """Write rows in several types of files, each of which holds rows that differ from the others.

    Return their paths, and the rows as a reader of that type gives them.
    """
    odd = [{**row, "id": n, "note": None} for n, row in enumerate(values[:10])]
    write_jsonl(folder / "a.jsonl", odd)
    (folder / "b.json").write_text(json.dumps(values[10:20], indent=1))
    with (folder / "c.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(values[20:30])
    day = datetime.date(2026, 11, 27)
    dated = [{**row, "day": day} for row in values[30:]]
    pandas.DataFrame(dated).to_parquet(folder / "d.parquet")
    files = ["a.jsonl", "b.json", "c.csv", "d.parquet"]
    rows = [*odd, *values[10:30], *({**row, "day": str(day)} for row in dated)]
    return [str(folder / name) for name in files], rows


def test_rows_are_written_as_they_were_given(workshop):
    files, rows = written(workshop.folder, pairs())
    examples, trained = held(workshop, data__train=files, data__eval_fraction=0.4)
    path = workshop.folder / "held_out.jsonl"
    held_out.write(path, examples, "line")
    kept = read_jsonl(path)
    assert len(kept) == 16
    assert [row for row in rows if row in kept] == kept
    for row in rows:
        is_trained = any(f"{row['question']}\n" in text for text in trained)
        assert is_trained == (row not in kept)
    prompts = evaluated.read(str(path))
    assert [prompt.reference for prompt in prompts] == [row["answer"] for row in kept]


def test_a_long_text_is_written_once_and_whole(workshop):
    texts = [f"text {n} " + " ".join(str(n * 1000 + k) for k in range(n)) for n in range(20)]
    (workshop.folder / "texts.txt").write_text("\n\n".join(texts))
    split = {"data__truncation": "split", "data__max_length": 16, "objective__kind": "clm"}
    examples, _ = held(
        workshop, data__train=str(workshop.folder / "texts.txt"), data__text_unit="paragraph",
        data__eval_fraction=0.2, **split,
    )  # fmt: skip
    held_out.write(workshop.folder / "held_out.jsonl", examples, "paragraph")
    kept = [row["text"] for row in read_jsonl(workshop.folder / "held_out.jsonl")]
    assert len(examples) > len(kept) == 4
    assert [text.strip() for text in texts if text.strip() in map(str.strip, kept)] == [
        text.strip() for text in kept
    ]


def test_the_file_is_whole_or_as_it_was(workshop):
    examples, _ = held(workshop, data__eval_fraction=0.2)
    path = workshop.folder / "held_out.jsonl"
    path.write_text("before")
    lines = workshop.rows.read_text().splitlines(keepends=True)
    workshop.rows.write_text("".join([*lines[:-1], "{broken\n"]))
    with pytest.raises(DataError, match="rows.jsonl:40"):
        held_out.write(path, examples, "line")
    assert path.read_text() == "before"
    assert not list(workshop.folder.glob(".writing*"))


def test_half_a_character_in_a_column_that_is_not_read_is_kept(workshop):
    row = '{"question": "a", "answer": "b%d", "other": "\\ud800"}\n'
    workshop.rows.write_text("".join(row % number for number in range(10)))
    examples, _ = held(workshop, data__eval_fraction=0.2)
    held_out.write(workshop.folder / "held_out.jsonl", examples, "line")
    kept = read_jsonl(workshop.folder / "held_out.jsonl")
    assert [row["other"] for row in kept] == ["\ud800"] * 2


@pytest.mark.parametrize(
    ("changes", "options"),
    [({"data__eval_fraction": 0.2}, "{run}"), ({}, "{run} --data HELD_OUT_ROWS")],
    ids=["held out", "none"],
)
def test_the_next_command_names_rows_where_the_run_held_out_none(workshop, changes, options):
    config, _ = configs.parse(["--config", str(workshop.write(workshop.config(**changes)))])
    run = SimpleNamespace(config=config, directory=RunDirectory(config))
    assert Run.to_compare(run) == options.format(run=workshop.run_dir())
