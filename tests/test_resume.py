"""A run that was interrupted ends as one that was not."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, Workshop, losses, read_jsonl, short
from faults.forked import start, wait_for
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader

from finetune import config as configs
from finetune.errors import CheckpointError, DirectoryInUse, RunDirectoryError

pytestmark = pytest.mark.slow
TIED_WITH_DROPOUT = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "attention_dropout": 0.1, "tie_word_embeddings": True,
}  # fmt: skip


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
        {"data__packing": True},
        {"data__group_by_length": True, "schedule__kind": "cosine", "schedule__warmup_steps": 3},
        {"model__config": TIED_WITH_DROPOUT},
        {"model__dtype": "bfloat16", "train__precision": "bf16", "optimizer__lr": 1e-3},
    ],
    ids=["packed", "grouped, cosine", "tied, dropout", "in 16 bits, rounded by chance"],
)  # fmt: skip
def test_resumed_equals_uninterrupted_to_the_bit(workshop, monkeypatch, changes):
    """Interrupted at step 9, two steps after a save, in the middle of the second epoch."""
    settings = {"train__epochs": 3, "train__max_steps": 12, "checkpoint__every_steps": 7, **changes}
    whole = workshop.train("whole", **settings)
    train_until(workshop, monkeypatch, 9, "parts", **settings)
    parts = workshop.train("parts", **settings)
    assert losses(parts) == losses(whole)
    assert [line["lr"] for line in read_jsonl(parts / "metrics.jsonl")] == [
        line["lr"] for line in read_jsonl(whole / "metrics.jsonl")
    ]
    before, after = (
        load_file(whole / "model/model.safetensors"),
        load_file(parts / "model/model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_lora_resumes_to_the_bit(workshop, monkeypatch):
    base = workshop.train("base")
    lora = {
        "model__init": "pretrained", "model__path": str(base / "model"), "model__config": None,
        "model__tokenizer": None, "adapter__kind": "lora", "adapter__dropout": 0.1,
        "train__max_steps": 6, "train__epochs": 2, "checkpoint__every_steps": 2,
    }  # fmt: skip
    whole = workshop.train("whole", **lora)
    train_until(workshop, monkeypatch, 5, "parts", **lora)
    parts = workshop.train("parts", **lora)
    assert losses(parts) == losses(whole)
    before, after = (load_file(r / "model/adapter_model.safetensors") for r in (whole, parts))
    assert all(torch.equal(before[name], after[name]) for name in before)
    saved = (
        FileSystemReader(parts / "checkpoints/step-00000006/shards")
        .read_metadata()
        .state_dict_metadata
    )
    assert saved
    assert all("lora_" in name or "param_groups" in name for name in saved), (
        "frozen weights must not be saved again"
    )


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
    parts = workshop.train("parts", **settings)
    assert read_jsonl(parts / "eval.jsonl") == read_jsonl(whole / "eval.jsonl")
    assert (parts / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    assert torch.equal(
        *(load_file(run / "model/model.safetensors")["model.norm.weight"] for run in (whole, parts))
    )


def test_other_evaluation_rows_are_another_run(workshop, monkeypatch):
    rows = workshop.folder / "eval.jsonl"
    rows.write_text('{"question": "new?", "answer": "yes"}\n')
    settings = {"data__eval": str(rows), "checkpoint__every_steps": 2}
    train_until(workshop, monkeypatch, 3, "run", **settings)
    rows.write_text('{"question": "new?", "answer": "no"}\n')
    with pytest.raises(RunDirectoryError, match="evaluation data: was"):
        workshop.train(**settings)


def test_a_finished_run_started_again_is_still_finished(workshop):
    run = workshop.train()
    before = (run / "model/model.safetensors").stat().st_mtime_ns
    assert workshop.launch().returncode == 0
    assert (run / "model/model.safetensors").stat().st_mtime_ns == before


def test_keep_last_counts_whole_checkpoints(workshop):
    run = workshop.train(checkpoint__every_steps=1, checkpoint__keep_last=3)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        f"step-{n:08d}" for n in (3, 4, 5)
    ]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"optimizer__lr": 1e-3}, "optimizer.lr: was 0.01, now 0.001"),
        ({"train__global_batch_size": 4}, "train.global_batch_size: was 8, now 4"),
        ({"data__max_length": 100}, "data.max_length: was 128, now 100"),
    ],
)
def test_a_run_directory_of_another_config_is_refused_with_the_keys(workshop, change, key):
    run = workshop.train()
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(RunDirectoryError, match=key):
        workshop.train(**change)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before, (
        "nothing on disk may change"
    )


def test_a_checkpoint_of_other_data_is_refused(workshop, monkeypatch):
    train_until(workshop, monkeypatch, 4, "run", checkpoint__every_steps=2)
    workshop.rows.write_text(workshop.rows.read_text().replace("three", "four"))
    with pytest.raises(RunDirectoryError, match="training data: was"):
        workshop.train(checkpoint__every_steps=2)


def test_settings_outside_the_arithmetic_may_change_on_resume(workshop, monkeypatch):
    train_until(workshop, monkeypatch, 4, "run", checkpoint__every_steps=2)
    run = workshop.train(
        checkpoint__every_steps=3, train__micro_batch_size=4, tracking__log_every_steps=1
    )
    assert losses(run) == pytest.approx(losses(workshop.train("whole")), rel=1e-5)


def test_a_signal_while_rows_are_tokenised_leaves_no_half_of_a_cache(workshop):
    """Nothing is there to save yet: exit code 75 asks to be run again."""
    workshop.rows.write_text(
        "".join(json.dumps({"question": f"{i}", "answer": "a" * 50}) + "\n" for i in range(100_000))
    )
    launch = start(workshop.write(workshop.config()))
    wait_for(lambda: list(workshop.folder.glob("cache/tokens/.building-*")))
    launch.kill([0], signal.SIGTERM)
    assert launch.codes() == [75], launch.output()
    assert "SIGTERM" in launch.output()
    assert not list(workshop.folder.glob("cache/tokens/.building-*")), "half a cache must not stay"


def test_a_lora_run_does_not_resume_over_another_base(workshop, monkeypatch):
    base = workshop.train("base")
    lora = {
        "model__init": "pretrained", "model__path": str(base / "model"), "model__config": None,
        "model__tokenizer": None,
        "adapter__kind": "lora", "checkpoint__every_steps": 2,
    }  # fmt: skip
    train_until(workshop, monkeypatch, 3, "lora", **lora)
    other = workshop.train("other", run__seed=7)
    (base / "model/model.safetensors").write_bytes((other / "model/model.safetensors").read_bytes())
    with pytest.raises(RunDirectoryError, match="frozen weights: was"):
        workshop.train("lora", **lora)
    assert (workshop.run_dir("lora") / "checkpoints/step-00000002/manifest.json").exists()


def test_a_moved_data_file_is_the_same_data(workshop, monkeypatch):
    monkeypatch.chdir(workshop.folder)
    settings = {"data__train": "rows.jsonl", "checkpoint__every_steps": 2}
    train_until(workshop, monkeypatch, 3, "run", **settings)
    elsewhere = workshop.folder / "elsewhere"
    elsewhere.mkdir()
    workshop.rows.rename(elsewhere / "rows.jsonl")
    monkeypatch.chdir(elsewhere)
    assert losses(workshop.train(**settings)) == losses(workshop.train("whole", **settings))


def test_a_running_run_has_no_preempted_outcome(workshop, monkeypatch):
    run = train_until(workshop, monkeypatch, 3, "run", checkpoint__every_steps=2)
    assert json.loads((run / "outcome.json").read_text())["state"] == "running"


def test_a_run_in_progress_locks_its_directory(workshop):
    from finetune.engine.rundir import RunDirectory

    run = workshop.train()
    config = configs.from_dict(yaml.safe_load((run / "config.yaml").read_text()))
    first = RunDirectory(config)
    first.lock(0)
    (run / "outcome.json").unlink()
    with pytest.raises(DirectoryInUse, match="is still in use by another process after 0.2 s"):
        workshop.train(checkpoint__grace_seconds=0.2)
    first.unlock()
    workshop.train()


def test_user_files_beside_checkpoints_are_ignored(workshop):
    settings = {"checkpoint__every_steps": 1, "checkpoint__keep_last": 2}
    run = workshop.train(**settings)
    checkpoints = run / "checkpoints"
    shutil.copytree(checkpoints / "step-00000004", checkpoints / "step-00000004.bak")
    shutil.copytree(checkpoints / "step-00000004", checkpoints / "step-keep-this")
    (checkpoints / "step-notes.txt").write_text("mine")
    shutil.rmtree(checkpoints / "step-00000005")
    (run / "outcome.json").unlink()
    workshop.train(**settings)
    assert {p.name for p in checkpoints.iterdir()} == {
        "step-00000004", "step-00000005", "step-00000004.bak", "step-keep-this", "step-notes.txt",
    }  # fmt: skip


@pytest.mark.parametrize(
    "damage",
    short(
        ["[]", "null", "no progress", "no identity", "no files", "step -3", "another step"],
        "[]",
        "no files",
        "another step",
    ),
)
def test_an_edited_manifest_is_a_damaged_checkpoint(workshop, damage, capsys):
    run = workshop.train(checkpoint__every_steps=1)
    newest = run / "checkpoints/step-00000005"
    manifest = json.loads((newest / "manifest.json").read_text())
    if damage.startswith("no "):
        manifest[damage[3:]] = {}
    elif "step" in damage:
        manifest["progress"]["step"] = -3 if damage == "step -3" else 4
    text = json.dumps(manifest) if " " in damage else damage
    (newest / "manifest.json").write_text(text)
    (run / "outcome.json").unlink()
    workshop.train(checkpoint__every_steps=1)
    says = capsys.readouterr().out
    assert f"skipped a damaged checkpoint: {newest}" in says
    assert "step-00000004 at step 4" in says


@pytest.mark.parametrize("name", ["outcome.json", "metrics.jsonl", "receipt.json"])
@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe", pytest.param(b"[]\n", marks=pytest.mark.proof)],
    ids=["not UTF-8", "a list"],
)
def test_a_damaged_note_of_a_run_does_not_stop_it(workshop, name, content):
    run = workshop.train()
    (run / "outcome.json").unlink()
    (run / name).write_bytes(content)
    workshop.train()
    assert json.loads((run / "outcome.json").read_text())["state"] == "complete"
    assert json.loads((run / "receipt.json").read_text())["seed"] == 0


def test_a_finished_run_whose_model_is_gone_exports_it_again(workshop):
    run = workshop.train()
    before = (run / "model/model.safetensors").read_bytes()
    (run / "model/model.safetensors").unlink()
    workshop.train()
    assert (run / "model/model.safetensors").read_bytes() == before


def test_a_save_longer_than_the_hang_limit_is_waited_for(workshop, monkeypatch):
    """Only steps and evaluations have a bound."""
    from finetune.engine.checkpoint import folder

    commit = folder.commit
    monkeypatch.setattr(folder, "commit", lambda *a: (time.sleep(2.5), commit(*a))[1])
    workshop.train(checkpoint__every_steps=3, train__hang_minutes=1 / 60)
    assert [line["step"] for line in read_jsonl(workshop.run_dir() / "saves.jsonl")] == [3, 5]


@pytest.mark.parametrize("asynchronous", [True, False])
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

    settings = {
        "data__eval_fraction": 0.2, "evaluation__every_steps": 1, "evaluation__export_best": True,
        "train__max_steps": 8, "train__epochs": 9,
        "optimizer__lr": 1.0, "schedule__kind": "constant",
    }  # fmt: skip
    evals = read_jsonl(workshop.train("whole", **settings) / "eval.jsonl")
    best = min(evals, key=lambda line: line["eval_loss"])["step"]
    assert best < 8, "or nothing is to be lost"
    space = folder.require_space

    def full(root: Path, needed_bytes: int) -> None:
        if read_jsonl(root.parent / "metrics.jsonl")[-1]["step"] == best:
            raise CheckpointError("no space")
        space(root, needed_bytes)

    monkeypatch.setattr(folder, "require_space", full)
    run = workshop.train("run", **settings)
    assert (
        f"the evaluation of step {best} was better, but its checkpoint was not kept"
        in capsys.readouterr().out
    )
    assert json.loads((run / "outcome.json").read_text())["exported_step"] != best


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


def test_a_closed_pipe_does_not_end_the_run(workshop):
    """A terminal that was closed, a pipe that has broken."""
    config = workshop.write(workshop.config(train__max_steps=300, train__epochs=99))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "--config", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(120) == 0
    assert json.loads((workshop.run_dir() / "outcome.json").read_text())["state"] == "complete"


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
    from transformers import AutoModelForCausalLM, LlamaConfig

    from finetune.models.load import bytes_tokenizer

    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    tokenizer = bytes_tokenizer()
    config = LlamaConfig(
        vocab_size=264, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def interrupted(workshop, monkeypatch, base: Path, kind: str) -> tuple[Path, dict]:
    """A copy of the base, and a run that died on it after a checkpoint."""
    shutil.copytree(base, workshop.folder / "base")
    settings = {
        "model__init": "pretrained", "model__path": str(workshop.folder / "base"),
        "model__config": None, "model__tokenizer": None, "adapter__kind": kind,
        "checkpoint__every_steps": 2, "data__template": "question_answer",
    }  # fmt: skip
    train_until(workshop, monkeypatch, 3, "run", **settings)
    return workshop.folder / "base", settings


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
def test_a_base_of_another_architecture_is_another_run(
    workshop, monkeypatch, base, field, value, says
):
    """Its weights fit: it would go on as another function, and say complete."""
    kind = "lora" if field in ("hidden_act", "num_attention_heads") else "full"
    folder, settings = interrupted(workshop, monkeypatch, base, kind)
    change_config(folder, **{field: value})
    with pytest.raises(RunDirectoryError) as problem:
        workshop.train(**settings)
    assert f"\n  {says}\n" in str(problem.value)
    assert str(problem.value).count(": was ") == 1


@pytest.mark.parametrize("has_checkpoints", [True, False])
def test_a_complete_run_whose_base_has_changed_is_another_run(
    workshop, monkeypatch, base, has_checkpoints
):
    folder, settings = interrupted(workshop, monkeypatch, base, "lora")
    run = workshop.train(**settings)
    if not has_checkpoints:
        shutil.rmtree(run / "checkpoints")
    workshop.train(**settings)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    change_config(
        folder, rope_parameters__rope_theta=500.0, transformers_version="4.0.0", use_cache=False
    )
    with pytest.raises(RunDirectoryError) as problem:
        workshop.train(**settings)
    assert "is complete, but it is another run" in str(problem.value)
    assert "\n  model: rope_parameters.rope_theta: was 10000.0, now 500.0\n" in str(problem.value)
    assert str(problem.value).count(": was ") == 1
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_harmless_config_changes_of_a_base_are_accepted(workshop, monkeypatch, base, capsys):
    folder, settings = interrupted(workshop, monkeypatch, base, "full")
    change_config(
        folder,
        transformers_version="4.0.0",
        use_cache=False,
        dtype="bfloat16",
        architectures=["Other"],
    )
    capsys.readouterr()
    run = workshop.train(**settings)
    assert f"resumed from {run}/checkpoints/step-00000002 at step 2" in capsys.readouterr().out
    assert json.loads((run / "outcome.json").read_text())["state"] == "complete"


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_base_with_one_other_value_is_another_run(workshop, monkeypatch, base, kind):
    folder, settings = interrupted(workshop, monkeypatch, base, kind)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] += 1e-2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    says = "frozen weights: was" if kind == "lora" else "weights before the first step: was"
    with pytest.raises(RunDirectoryError, match=says):
        workshop.train(**settings)


@pytest.mark.parametrize("what", ["tokenizer", "template"])
def test_another_tokenizer_or_template_is_another_run_and_named(workshop, monkeypatch, base, what):
    folder, settings = interrupted(workshop, monkeypatch, base, "full")
    if what == "tokenizer":
        path = folder / "tokenizer.json"
        values = json.loads(path.read_text())
        vocab = values["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
        path.write_text(json.dumps(values))
    else:
        jinja = workshop.folder / "my.jinja"
        jinja.write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
        workshop.run_dir().rename(workshop.folder / "runs/old")
        settings["data__template"] = str(jinja)
        train_until(workshop, monkeypatch, 3, "run", **settings)
        jinja.write_text("{% for m in messages %}{{ m.content }} {{ eos_token }}{% endfor %}")
    with pytest.raises(RunDirectoryError, match=f"{what}: was"):
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


def test_a_checkpoint_of_another_version_is_named_and_stays(workshop):
    run = workshop.train()
    path = run / "checkpoints/step-00000005/manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop("sha256")
    manifest["format"] = 2
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(manifest))
    (run / "outcome.json").unlink()
    with pytest.raises(
        RunDirectoryError, match=r"step-00000005 was written by another version .*format 2"
    ):
        workshop.train()
    assert path.exists()
