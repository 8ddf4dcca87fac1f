"""A run that was interrupted ends as one that was not."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, TINY_LLAMA, Workshop, losses, pretrained, read_jsonl, short
from faults.forked import assert_same_end, forget, start, wait_for
from safetensors.torch import load_file, save_file

from finetune import config as configs
from finetune.errors import CheckpointError, DirectoryInUse, RunDirectoryError

pytestmark = pytest.mark.slow
TIED_WITH_DROPOUT = TINY_LLAMA | {"attention_dropout": 0.1, "tie_word_embeddings": True}


class Interrupted(BaseException):  # not caught by anything, as the end of a process is not
    pass


def wait_for_saves() -> None:
    """Death comes when nothing is being written; tests/faults/ has the other moments."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()


def train_until(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, step: int, name: str, **changes
) -> Path:
    """Train and die, without any goodbye, as step `step` begins."""
    from finetune import loop

    whole, done = loop.train_step, []

    def dying(*arguments, **keywords):
        if len(done) == step:
            wait_for_saves()
            raise Interrupted
        done.append(1)
        return whole(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", dying)
        with pytest.raises(Interrupted):
            workshop.train(name, **changes)
    return workshop.run_dir(name)


@pytest.mark.parametrize(
    "changes",
    [
        {"data__packing": True, "schedule__kind": "cosine", "schedule__warmup_steps": 3},
        {"data__group_by_length": True, "model__config": TIED_WITH_DROPOUT},
        {"model__dtype": "bfloat16", "train__precision": "bf16", "optimizer__lr": 1e-3},
    ],
    ids=["packed, cosine", "grouped, tied, dropout", "in 16 bits, rounded by chance"],
)  # fmt: skip
def test_resumed_equals_uninterrupted_to_the_bit(workshop, changes):
    """Resumed in the middle of the second epoch."""
    settings = {"train__epochs": 3, "train__max_steps": 10, "checkpoint__every_steps": 7, **changes}
    run, whole = workshop.train(**settings), workshop.folder / "whole"
    shutil.copytree(run, whole)
    forget(run, 7)
    assert_same_end(workshop.train(**settings), whole)


def test_a_preempted_runs_missed_evaluation_is_made_up(workshop, monkeypatch):
    """Else it would stop at another step, and export another model, than an undisturbed one."""
    from finetune import loop
    from finetune.errors import Preempted
    from finetune.survival.preemption import StopFlag

    settings = {
        "data__eval_fraction": 0.2, "evaluation__every_steps": 2, "evaluation__patience": 1,
        "evaluation__export_best": True, "evaluation__sample_prompts": ["a\u2028b"],
        "evaluation__sample_every_steps": 2, "evaluation__sample_max_new_tokens": 2,
        "optimizer__lr": 1.0, "schedule__kind": "constant", "train__max_steps": 12,
        "train__epochs": 9,
    }  # fmt: skip
    whole = workshop.train("whole", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(StopFlag, "is_set", property(lambda self: len(done) == 2))
        one, done = loop.train_step, []
        patch.setattr(loop, "train_step", lambda *a, **k: done.append(1) or one(*a, **k))
        with pytest.raises(Preempted):
            workshop.train("parts", **settings)
    kept = workshop.run_dir("parts") / "held_out.jsonl"
    assert kept.read_text() == (whole / "held_out.jsonl").read_text()
    kept.unlink()  # a resume writes it again
    parts = workshop.train("parts", **settings)
    assert kept.read_text() == (whole / "held_out.jsonl").read_text()
    assert read_jsonl(parts / "eval.jsonl") == read_jsonl(whole / "eval.jsonl")
    assert (parts / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    assert torch.equal(
        *(load_file(run / "model/model.safetensors")["model.norm.weight"] for run in (whole, parts))
    )


def test_other_rows_are_another_run(workshop, monkeypatch):
    rows = workshop.folder / "eval.jsonl"
    rows.write_text('{"question": "new?", "answer": "yes"}\n')
    settings = {"data__eval": str(rows), "checkpoint__every_steps": 2}
    run = train_until(workshop, monkeypatch, 3, "run", **settings)
    assert json.loads((run / "outcome.json").read_text())["state"] == "running"
    for starts in ("is a checkpoint of another run", "is complete, but it is another run"):
        for path, word, what in ((rows, "yes", "evaluation"), (workshop.rows, "three", "training")):
            content = path.read_text()
            path.write_text(content.replace(word, "four"))
            with pytest.raises(RunDirectoryError, match=f"({starts})(.*\n)*  {what} data: was"):
                workshop.train(**settings)
            path.write_text(content)
        workshop.train(**settings)
    assert json.loads((run / "outcome.json").read_text())["state"] == "complete"


def test_a_finished_run_started_again_is_still_finished(workshop):
    run = workshop.train(train__max_steps=1)
    before = (run / "model/model.safetensors").stat().st_mtime_ns
    workshop.train(train__max_steps=1)
    assert (run / "model/model.safetensors").stat().st_mtime_ns == before


def test_a_run_directory_of_another_config_is_refused_with_the_keys(workshop):
    run = workshop.train()
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    for change, key in (
        ({"optimizer__lr": 1e-3}, "optimizer.lr: was 0.01, now 0.001"),
        ({"train__global_batch_size": 4}, "train.global_batch_size: was 8, now 4"),
        ({"data__max_length": 100}, "data.max_length: was 128, now 100"),
    ):
        with pytest.raises(RunDirectoryError, match=key):
            workshop.train(**change)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before, (
        "nothing on disk may change"
    )


def test_a_moved_data_file_and_settings_outside_the_arithmetic_are_the_same_run(
    workshop, monkeypatch
):
    monkeypatch.chdir(workshop.folder)
    run = workshop.train(data__train="rows.jsonl", checkpoint__every_steps=2)
    whole = losses(run)
    forget(run, 4)
    elsewhere = workshop.folder / "elsewhere"
    elsewhere.mkdir()
    workshop.rows.rename(elsewhere / "rows.jsonl")
    monkeypatch.chdir(elsewhere)
    workshop.train(
        data__train="rows.jsonl", checkpoint__every_steps=3, train__micro_batch_size=8,
        tracking__log_every_steps=2,
    )  # fmt: skip
    assert losses(run) == pytest.approx(whole, rel=1e-5)


@pytest.mark.fault
def test_a_signal_while_rows_are_tokenised_leaves_no_half_of_a_cache(workshop):
    """Nothing is there to save yet: exit code 75 asks to be run again."""
    workshop.rows.write_text(
        "".join(json.dumps({"question": f"{i}", "answer": "a" * 50}) + "\n" for i in range(40_000))
    )
    launch = start(workshop.write(workshop.config()))
    wait_for(lambda: list(workshop.folder.glob("cache/tokens/.building-*")))
    launch.kill([0], signal.SIGTERM)
    assert launch.codes() == [75], launch.output()
    assert "SIGTERM" in launch.output()
    assert not list(workshop.folder.glob("cache/tokens/.building-*")), "half a cache must not stay"


def test_a_run_in_progress_locks_its_directory(workshop):
    from finetune.engine.rundir import RunDirectory

    run = workshop.train(train__max_steps=1)
    config = configs.from_dict(yaml.safe_load((run / "config.yaml").read_text()))
    first = RunDirectory(config)
    first.lock(0)
    (run / "outcome.json").unlink()
    with pytest.raises(DirectoryInUse, match="is still in use by another process after 0.2 s"):
        workshop.train(train__max_steps=1, checkpoint__grace_seconds=0.2)
    first.unlock()
    workshop.train(train__max_steps=1)


def test_the_last_checkpoints_are_kept_and_files_of_a_user_beside_them(workshop):
    settings = {"checkpoint__every_steps": 1, "checkpoint__keep_last": 2}
    run = workshop.train(**settings)
    checkpoints = run / "checkpoints"
    assert {p.name for p in checkpoints.iterdir()} == {"step-00000004", "step-00000005"}
    shutil.copytree(checkpoints / "step-00000004", checkpoints / "step-00000004.bak")
    shutil.copytree(checkpoints / "step-00000004", checkpoints / "step-keep-this")
    (checkpoints / "step-notes.txt").write_text("mine")
    shutil.rmtree(checkpoints / "step-00000005")
    (run / "outcome.json").unlink()
    workshop.train(**settings)
    assert {p.name for p in checkpoints.iterdir()} == {
        "step-00000004", "step-00000005", "step-00000004.bak", "step-keep-this", "step-notes.txt",
    }  # fmt: skip


def test_a_save_longer_than_the_hang_limit_is_waited_for(workshop, monkeypatch):
    """Only steps and evaluations have a bound."""
    from finetune.engine.checkpoint import folder

    commit = folder.commit
    monkeypatch.setattr(folder, "commit", lambda *a: (time.sleep(2.5), commit(*a))[1])
    workshop.train(checkpoint__every_steps=3, train__hang_minutes=1 / 60)
    assert [line["step"] for line in read_jsonl(workshop.run_dir() / "saves.jsonl")] == [3, 5]


@pytest.mark.parametrize("asynchronous", short([True, False], True))
def test_waiting_times_of_training_are_measured(workshop, monkeypatch, asynchronous):
    from finetune.engine.checkpoint import folder

    commit = folder.commit
    monkeypatch.setattr(folder, "commit", lambda *a: (time.sleep(0.5), commit(*a))[1])
    run = workshop.train(checkpoint__every_steps=3, checkpoint__asynchronous=asynchronous)
    first, last = read_jsonl(run / "saves.jsonl")
    assert (first["stall_seconds"] > 0.5) == (not asynchronous)
    assert min(first["seconds"], last["seconds"]) > 0.5
    if asynchronous:
        assert last["stall_seconds"] > 0.2, "the second save had to wait for the first one"


def test_a_failed_save_of_the_best_evaluation_does_not_stop_the_run(workshop, monkeypatch, capsys):
    """The best of those that are there is exported, and the loss is reported."""
    from finetune.engine.checkpoint import folder

    space = folder.require_space

    def full(root: Path, needed_bytes: int) -> None:
        if read_jsonl(root.parent / "metrics.jsonl")[-1]["step"] == 1:
            raise CheckpointError("no space")
        space(root, needed_bytes)

    monkeypatch.setattr(folder, "require_space", full)
    run = workshop.train(
        data__eval_fraction=0.2, evaluation__every_steps=1, evaluation__export_best=True,
        train__max_steps=8, train__epochs=9, optimizer__lr=1.0, schedule__kind="constant",
    )  # fmt: skip
    best, *others = sorted(read_jsonl(run / "eval.jsonl"), key=lambda line: line["eval_loss"])
    assert best["step"] == 1, "or nothing is to be lost"
    assert (
        "the evaluation of step 1 was better, but its checkpoint was not kept"
        in capsys.readouterr().out
    )
    assert json.loads((run / "outcome.json").read_text())["exported_step"] == others[0]["step"]


def test_processes_with_equal_weights_stage_each_tensor_once():
    """Under DDP all hold the same: each stages its share, and together all of it."""
    import torch

    from finetune.engine.checkpoint.contents import Staged, share

    state = {
        "model": {"embedding": torch.zeros(1000), "norm": torch.zeros(10)},
        "optimizer": {
            "state": {"embedding": {"step": torch.zeros(1), "exp_avg": torch.zeros(1000)}},
            "lr": 0.1,
        },
    }
    shares = [share(state, rank, 2) for rank in (0, 1)]
    assert shares[0]["model"] == {"embedding": state["model"]["embedding"]}
    assert sum(Staged(each, {}, {}).num_bytes for each in shares) == 4 * 2011
    assert [Staged(each, {}, {}).num_bytes for each in shares] == [4 * 1000, 4 * 1011], (
        "about as much each"
    )
    assert all(each["optimizer"]["lr"] == 0.1 for each in shares)
    assert share(state, 0, 1) == state


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    ("death", "why"),
    [
        (lambda *_: None, "the thread that saves ended without a result"),
        (lambda *_: sys.exit(), "SystemExit"),
    ],
    ids=["returns", "exits"],
)
def test_a_saver_thread_that_dies_at_its_first_line_is_a_failed_save(
    workshop, monkeypatch, capsys, death, why
):
    """On a GPU the thread once died before it could record why, and no run exported a model."""
    from finetune.engine.checkpoint.saver import Saver

    write, saves = Saver._write, []

    def once(self, *arguments):
        saves.append(arguments)
        (death if len(saves) == 1 else write)(self, *arguments)

    monkeypatch.setattr(Saver, "_write", once)
    run = workshop.train("run", checkpoint__every_steps=2, checkpoint__keep_last=9)
    printed = capsys.readouterr().out
    assert f"note: checkpoint of step 2 could not be saved: process 0: {why}" in printed
    assert sorted(path.name for path in (run / "checkpoints").iterdir())[0] == "step-00000004", (
        "later saves are whole"
    )
    assert (run / "model/model.safetensors").exists()


def test_an_error_of_one_process_before_a_save_fails_the_save(workshop, monkeypatch, capsys):
    """If taking the GPU fails on one process, the others must not wait for it for two hours."""
    from finetune.engine.checkpoint.saver import Saver

    def broken(self):
        raise ValueError("Expected a torch.device with a specified index")

    monkeypatch.setattr(Saver, "_use_own_gpu", broken)
    with pytest.raises(CheckpointError, match="could not be saved: Expected a torch.device"):
        workshop.train("run", checkpoint__every_steps=2)
    assert "Expected a torch.device with a specified index" in capsys.readouterr().out


def test_a_run_with_only_damaged_checkpoints_does_not_restart(workshop, monkeypatch):
    run = train_until(
        workshop, monkeypatch, 4, "parts", checkpoint__every_steps=2, checkpoint__keep_last=1
    )
    newest = max((run / "checkpoints").glob("step-*"))
    (newest / "manifest.json").unlink()
    newest.rename(run / "checkpoints/damaged-step-00000004.0")
    lines = (run / "metrics.jsonl").read_text()
    with pytest.raises(CheckpointError, match="damaged before"):
        workshop.train("parts", checkpoint__every_steps=2, checkpoint__keep_last=1)
    assert (run / "metrics.jsonl").read_text() == lines


def test_a_closed_pipe_does_not_end_the_run(workshop, monkeypatch):
    """A terminal that was closed, or a pipe that has broken."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as broken:
        with pytest.raises(BrokenPipeError):
            print("lost", file=broken)
        monkeypatch.setattr(sys, "stdout", broken)
        monkeypatch.setattr(sys, "stderr", broken)
        assert workshop.main() == 0
        with open(os.devnull, "w") as sink:  # for what is buffered
            os.dup2(sink.fileno(), broken.fileno())
    assert workshop.outcome()["state"] == "complete"


def test_a_closed_pipe_leaves_the_exit_code_when_the_interpreter_ends():
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "--config", "no_such_file.yaml"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT,
    )  # fmt: skip
    process.stdout.close()
    assert process.wait(120) == 2


def test_a_checkpoint_that_is_a_link_is_pruned_as_a_link(workshop, monkeypatch):
    run = train_until(
        workshop, monkeypatch, 4, "run", checkpoint__every_steps=2, checkpoint__keep_last=1
    )
    elsewhere = workshop.folder / "elsewhere"
    old = run / "checkpoints/step-00000002"
    shutil.copytree(
        run / "checkpoints/step-00000004", old
    )  # not whole under this name, so neither counted nor removed
    shutil.move(run / "checkpoints/step-00000004", elsewhere)
    (run / "checkpoints/step-00000004").symlink_to(elsewhere)
    workshop.train("run", checkpoint__every_steps=2, checkpoint__keep_last=1, train__max_steps=5)
    (run / "outcome.json").unlink()
    workshop.train("run", checkpoint__every_steps=2, checkpoint__keep_last=1, train__max_steps=5)
    assert (elsewhere / "manifest.json").exists()


def change_config(folder: Path, **fields) -> None:
    """What a Hub repository that was corrected would look like; `a__b` is a field b in a."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for name, value in fields.items():
        *parts, last = name.split("__")
        place = values
        for part in parts:
            place = place[part]
        place[last] = value
    path.write_text(json.dumps(values))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return Workshop(tmp_path_factory.mktemp("base")).train(train__max_steps=1) / "model"


@pytest.fixture(scope="module")
def interrupted_runs(tmp_path_factory, base):
    """Return a function that gives the folder of a run of 3 steps that died, with its base."""

    @functools.cache
    def make(kind: str) -> Path:
        workshop = Workshop(tmp_path_factory.mktemp("interrupted"))
        shutil.copytree(base, workshop.folder / "base")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(workshop.folder)
            train_until(workshop, patch, 3, "run", **on_the_base(kind))
        return workshop.folder

    return make


def on_the_base(kind: str) -> dict[str, Any]:
    """Paths are relative to the working directory, so that the whole folder can be copied."""
    return {
        "run__dir": "runs", "data__train": "rows.jsonl", "data__template": "question_answer",
        "adapter__kind": kind, "checkpoint__every_steps": 2, **pretrained("base"),
    }  # fmt: skip


@pytest.fixture
def interrupted(interrupted_runs, workshop, monkeypatch):
    """Return a function that copies such a run here: its base, and its settings."""

    def copy(kind: str) -> tuple[Path, dict[str, Any]]:
        shutil.copytree(interrupted_runs(kind), workshop.folder, dirs_exist_ok=True)
        monkeypatch.chdir(workshop.folder)
        return workshop.folder / "base", on_the_base(kind)

    return copy


@pytest.mark.parametrize(
    ("field", "value", "says"),
    short(
        [
            (
                "rope_parameters__rope_theta",
                500.0,
                "model: rope_parameters.rope_theta: was 10000.0, now 500.0",
            ),
            ("hidden_act", "gelu", "model: hidden_act: was silu, now gelu"),
            ("rms_norm_eps", 1e-3, "model: rms_norm_eps: was 1e-06, now 0.001"),
            ("num_attention_heads", 2, "model: num_attention_heads: was 4, now 2"),
            ("sliding_window", 4, "model: sliding_window: was None, now 4"),
            ("num_hidden_layers", 1, "model: num_hidden_layers: was 2, now 1"),
            ("attention_dropout", 0.5, "model: attention_dropout: was 0.0, now 0.5"),
        ],
        ("hidden_act", "gelu", "model: hidden_act: was silu, now gelu"),
        ("sliding_window", 4, "model: sliding_window: was None, now 4"),
    ),
)
def test_a_base_of_another_architecture_is_another_run(workshop, interrupted, field, value, says):
    """Its weights fit: it would go on as another function, and say complete."""
    kind = "lora" if field in ("hidden_act", "num_attention_heads") else "full"
    folder, settings = interrupted(kind)
    change_config(folder, **{field: value})
    with pytest.raises(RunDirectoryError) as problem:
        workshop.train(**settings)
    assert f"\n  {says}\n" in str(problem.value)
    assert str(problem.value).count(": was ") == 1


def test_a_complete_run_whose_base_has_changed_is_another_run(workshop, interrupted):
    """With its checkpoints, and without."""
    folder, settings = interrupted("lora")
    run = workshop.train(**settings)
    config = (folder / "config.json").read_text()
    for has_checkpoints in (True, False):
        if not has_checkpoints:
            shutil.rmtree(run / "checkpoints")
        (folder / "config.json").write_text(config)
        workshop.train(**settings)
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        change_config(
            folder, rope_parameters__rope_theta=500.0, transformers_version="4.0.0", use_cache=False
        )
        with pytest.raises(RunDirectoryError) as problem:
            workshop.train(**settings)
        message = str(problem.value)
        assert "is complete, but it is another run" in message
        assert "\n  model: rope_parameters.rope_theta: was 10000.0, now 500.0\n" in message
        assert message.count(": was ") == 1
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_harmless_config_changes_of_a_base_are_accepted(workshop, interrupted, capsys):
    folder, settings = interrupted("full")
    change_config(
        folder,
        transformers_version="4.0.0",
        use_cache=False,
        dtype="bfloat16",
        architectures=["Other"],
    )
    capsys.readouterr()
    run = workshop.train(**settings)
    assert "resumed from runs/run/checkpoints/step-00000002 at step 2" in capsys.readouterr().out
    assert json.loads((run / "outcome.json").read_text())["state"] == "complete"


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_base_with_one_other_value_is_another_run(workshop, interrupted, kind):
    folder, settings = interrupted(kind)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] += 1e-2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    says = "frozen weights: was" if kind == "lora" else "weights before the first step: was"
    with pytest.raises(RunDirectoryError, match=says):
        workshop.train(**settings)
    assert (workshop.run_dir() / "checkpoints/step-00000002/manifest.json").exists()


def test_another_tokenizer_is_another_run_and_named(workshop, interrupted):
    folder, settings = interrupted("full")
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    vocab = values["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(values))
    with pytest.raises(RunDirectoryError, match="tokenizer: was"):
        workshop.train(**settings)


def test_another_template_is_another_run_and_named(workshop, monkeypatch):
    jinja = workshop.folder / "my.jinja"
    jinja.write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    settings = {"data__template": str(jinja), "checkpoint__every_steps": 1}
    train_until(workshop, monkeypatch, 1, "run", **settings)
    jinja.write_text("{% for m in messages %}{{ m.content }} {{ eos_token }}{% endfor %}")
    with pytest.raises(RunDirectoryError, match="template: was"):
        workshop.train(**settings)


def test_config_fields_added_by_newer_transformers_are_not_differences():
    from finetune.engine.checkpoint import resume
    from finetune.engine.checkpoint.folder import Found

    config = configs.from_dict(
        {
            "run": {"name": "a"},
            "model": {"path": "m"},
            "data": {"train": "x"},
            "optimizer": {"lr": 1},
        }
    )
    found = Found(
        Path("step-00000001"), {"config": config.model_dump(), "identity": {"model": {"a": 1}}}
    )
    resume.require_same_run(found, config, {"model": {"a": 1, "new": 0.5}}, {"a": 2, "new": 0.5})
    with pytest.raises(RunDirectoryError, match=r"model: new: was 0.5, now 0.6"):
        resume.require_same_run(
            found, config, {"model": {"a": 1, "new": 0.6}}, {"a": 2, "new": 0.5}
        )
