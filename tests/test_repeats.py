"""--check notes rows that repeat or resemble evaluation rows, and disks that are too small."""

import random
import shutil
from collections import namedtuple

import pytest
from conftest import Workshop, read_jsonl, run_main, short, write_jsonl

USAGE = namedtuple("usage", "total used free")


def story(number, length=30):
    source = random.Random(number)
    return " ".join(f"w{source.randrange(3_000)}" for _ in range(length))


def row(number, **changes):
    return {"question": story(number, 8), "answer": story(number + 500, 14), **changes}


ROWS = [row(number) for number in range(40)]
PLAIN = {"train__max_steps": None, "train__global_batch_size": 1, "train__micro_batch_size": 1,
         "data__max_length": 256}  # fmt: skip


def checked(workshop, capsys, rows, *arguments, code=0, **changes):
    """Return the notes of --check."""
    write_jsonl(workshop.rows, rows)
    assert workshop.main("run", ["--check", *arguments], **PLAIN, **changes) == code
    streams = capsys.readouterr()
    lines = streams.out.splitlines()
    return [line[12:] for line in lines if line.startswith("note  ")], streams


def test_unlike_rows_get_no_note(workshop, capsys):
    notes, _ = checked(workshop, capsys, ROWS, data__eval_fraction=0.2)
    assert notes == []


def test_duplicates_and_contradictions_are_noted(workshop, capsys):
    rows = [*ROWS, ROWS[2], ROWS[2], ROWS[30], row(5, answer=story(900, 9))]
    notes, _ = checked(workshop, capsys, rows)
    assert notes == [
        f"3 examples are the same as an earlier one, such as {workshop.rows}:41 and "
        f"{workshop.rows}:3; finetune data dedup removes such rows",
        f"1 prompt is followed by different answers, such as in {workshop.rows}:6 and "
        f"{workshop.rows}:44: the model cannot learn which to give",
    ]


def test_rows_that_weights_repeat_are_no_duplicates(workshop, capsys):
    weights = {str(workshop.rows): 2}
    notes, _ = checked(workshop, capsys, ROWS, data__weights=weights)
    assert notes == []


def test_the_same_first_question_of_other_conversations_is_no_contradiction(workshop, capsys):
    def turns(*contents):
        roles = ["user", "assistant"] * 2
        return [{"role": role, "content": content} for role, content in zip(roles, contents)]

    rows = [{"messages": turns("hi", "hello", story(n, 5), story(n + 99, 5))} for n in range(20)]
    notes, _ = checked(workshop, capsys, rows, data__template="chatml")
    assert notes == []
    rows.append({"messages": turns("hi", "hello", story(3, 5), "another")})
    notes, _ = checked(workshop, capsys, rows, data__template="chatml")
    [note] = notes
    assert note.startswith("1 prompt is followed by different answers")
    assert f"{workshop.rows}:4 and {workshop.rows}:21" in note


def test_rows_like_evaluation_rows_are_noted(workshop, capsys):
    alike = row(3, answer=ROWS[3]["answer"] + " more")
    asked = row(4, answer="another answer")
    path = write_jsonl(workshop.folder / "dev.jsonl", [row(901), alike, asked, row(902)])
    notes, _ = checked(workshop, capsys, ROWS, data__eval=str(path))
    [note] = notes
    assert note.startswith("2 training rows are too much like evaluation rows, such as ")
    assert f"{workshop.rows}:4 and {path}:2" in note


def test_held_out_rows_are_compared_with_the_rest(workshop, capsys):
    rows = [*ROWS, *(row(n, answer=each["answer"] + " more") for n, each in enumerate(ROWS))]
    notes, _ = checked(workshop, capsys, rows, data__eval_fraction=0.2)
    assert any("too much like evaluation rows" in note for note in notes)


def test_strict_makes_notes_errors(workshop, capsys):
    _, streams = checked(workshop, capsys, ROWS, "--strict")
    assert not streams.err
    _, streams = checked(workshop, capsys, [*ROWS, ROWS[0]], "--strict", code=2)
    assert "error: --strict: 1 note:\n  1 example is the same as an earlier one" in streams.err
    assert run_main(workshop.folder / "run.yaml", "--strict") == 2  # which is --check, too
    assert not workshop.run_dir().exists()


def test_a_disk_that_is_too_small_is_noted(workshop, capsys, monkeypatch):
    _, streams = checked(workshop, capsys, ROWS)
    assert "disk        " in streams.out
    monkeypatch.setattr(shutil, "disk_usage", lambda path: USAGE(10**6, 10**6, 1_000))
    notes, _ = checked(workshop, capsys, ROWS)
    [note] = notes
    assert note.startswith("checkpoints and the model may take 0.001")
    assert note.endswith("GB free; lower checkpoint.keep_last, or set run.dir")


STORED = {
    "adamw": {}, "averages": {"train__ema_decay": 0.9},
    "16 bits": {"model__dtype": "bfloat16", "train__precision": "bf16"},
    "muon": {"optimizer__kind": "muon", "optimizer__lr": 1e-4},
}  # fmt: skip


@pytest.mark.parametrize("name", short([*STORED], "16 bits"))
def test_the_forecast_of_a_checkpoint_is_its_size(workshop, name):
    """But for names and the like: at most 300 KB, a tenth of this model of 2.6 MB."""
    from finetune import config as configs
    from finetune import preflight
    from finetune.engine.topology import Topology

    larger = dict(Workshop(workshop.folder).config()["model"]["config"], hidden_size=128)
    changes = {**STORED[name], "model__config": larger, "train__max_steps": 1}
    run = workshop.train(**changes)
    [saved] = read_jsonl(run / "saves.jsonl")
    config, _ = configs.parse(["--config", str(workshop.folder / "run.yaml")])
    data = preflight.prepare(config, Topology(config.train.precision, check_only=True))
    facts = preflight.check_model(config, data)
    assert facts.checkpoint_bytes == pytest.approx(saved["bytes"], rel=0.01, abs=300_000)
    size = (run / "model" / "model.safetensors").stat().st_size
    assert facts.export_bytes == pytest.approx(size, rel=0.02)
