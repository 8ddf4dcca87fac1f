"""Trackers are guests: they get all numbers and no secrets, and the run does without them."""

import json
import os
import re
import sqlite3
import sys

import pytest
from conftest import losses, read_jsonl

from finetune.engine import trackers
from finetune.engine.trackers import redacted
from finetune.errors import ConfigError

OFFLINE = {"tracking__trackers": ["wandb"], "tracking__wandb_mode": "offline"}


@pytest.fixture(autouse=True)
def no_keys(monkeypatch, tmp_path):
    """As on a machine without a login."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


def wandb_ids(run):
    return [
        re.sub(".*-", "", folder.name) for folder in sorted((run / "wandb").glob("offline-run-*"))
    ]


def tensorboard_scalars(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return events


def test_without_a_key_wandb_is_an_error_before_the_model_loads(workshop, monkeypatch):
    with pytest.raises(ConfigError, match="WANDB_API_KEY.*wandb login.*wandb_mode"):
        workshop.train(tracking__trackers=["wandb"])
    assert not workshop.run_dir().exists()
    monkeypatch.setenv("WANDB_MODE", "offline")
    workshop.check(tracking__trackers=["wandb"])


def test_a_key_is_found_where_wandb_login_writes_it(workshop, monkeypatch, tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine api.wandb.ai\n  login user\n  password {'a' * 40}\n")
    monkeypatch.setenv("NETRC", str(netrc))
    workshop.check(tracking__trackers=["wandb"])
    netrc.write_text("machine elsewhere.example\n  login user\n  password none\n")
    with pytest.raises(ConfigError, match="wandb has no key"):
        workshop.check(tracking__trackers=["wandb"])


def test_an_unknown_or_missing_tracker_is_an_error(workshop, monkeypatch):
    with pytest.raises(ConfigError, match="tracking.trackers"):
        workshop.check(tracking__trackers=["mlflow"])
    with pytest.raises(ConfigError, match="names one twice"):
        workshop.check(tracking__trackers=["tensorboard", "tensorboard"])
    with pytest.raises(ConfigError, match=r"tracking.project: W&B takes no /"):
        workshop.check(**OFFLINE, tracking__project="mine/yours")
    monkeypatch.setitem(sys.modules, "trackio", None)
    missing = r"trackio needs the package trackio; pip install 'finetune\[tracking\]'"
    with pytest.raises(ConfigError, match=missing):
        workshop.check(tracking__trackers=["trackio"])


@pytest.mark.slow
def test_a_resumed_run_is_the_same_run_of_its_trackers(workshop):
    """wandb's resume="allow" without an id would start a second one."""
    half = {
        **OFFLINE, "tracking__trackers": ["wandb", "tensorboard"], "checkpoint__every_steps": 2,
        "checkpoint__keep_last": 9,
    }  # fmt: skip
    run = workshop.train(**half)
    for step in (4, 5):
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.rename(run / folder.name)
    (run / "outcome.json").unlink()
    workshop.train(**half)
    manifest = json.loads((run / "checkpoints/step-00000005/manifest.json").read_text())
    run_id = manifest["progress"]["run_id"]
    assert wandb_ids(run) == [run_id, run_id]
    newest = max((run / "wandb").glob("offline-run-*"), key=lambda folder: folder.stat().st_mtime)
    [log] = newest.glob("*.wandb")
    content = log.read_bytes()  # each value after its length, in history and in summary
    found = re.finditer(rb"grad_norm\x82\x01(.)", content, re.DOTALL)
    norms = {content[match.end() : match.end() + match[1][0]] for match in found}
    assert len(norms) == 5, "what is synced last holds every step, also of the first attempt"
    events = tensorboard_scalars(run)
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(losses(run), rel=1e-6)
    other = workshop.train("other", **OFFLINE, train__max_steps=1)
    assert wandb_ids(other) != [run_id]


def test_tensorboard_has_every_number_the_config_and_the_receipt(workshop):
    run = workshop.train(tracking__trackers=["tensorboard"], data__eval_fraction=0.2)
    events = tensorboard_scalars(run)
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(losses(run), rel=1e-6)
    assert [e.step for e in events.Scalars("grad_norm")] == [1, 2, 3, 4]
    line = read_jsonl(run / "eval.jsonl")[0]
    assert events.Scalars("eval_loss")[0].value == pytest.approx(line["eval_loss"])
    texts = {
        name: events.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0]
        for name in ("config", "receipt")
    }
    assert b'"global_batch_size": 8' in texts["config"]
    assert b'"seed"' in texts["receipt"]


def test_trackio_has_every_step_and_the_config(workshop, tmp_path):
    run = workshop.train(tracking__trackers=["trackio"], tracking__project="mine")
    with sqlite3.connect(tmp_path / "trackio" / "mine.db") as database:
        rows = list(database.execute("select step, metrics from metrics order by step"))
        (config,) = database.execute("select config from configs").fetchone()
    assert [step for step, _ in rows] == [1, 2, 3, 4, 5]
    found = [json.loads(values)["loss"] for _, values in rows]
    assert found == pytest.approx(losses(run))
    assert json.loads(config)["config"]["optimizer"]["lr"] == 0.01


@pytest.mark.slow
def test_a_failing_tracker_is_dropped_and_the_run_continues(workshop, monkeypatch, capfd):
    """Nothing listens at this address; no message shows the key."""
    monkeypatch.setenv("WANDB_API_KEY", "f00d" * 10)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(trackers, "WANDB_INIT_SECONDS", 3)
    run = workshop.train(tracking__trackers=["wandb", "tensorboard"])
    plain = workshop.train("plain")
    assert losses(run) == losses(plain)
    assert workshop.outcome()["state"] == "complete"
    output = capfd.readouterr()
    assert "tracker wandb failed; the run continues without it" in output.out
    assert "f00d" * 10 not in output.err + output.out
    assert [e.step for e in tensorboard_scalars(run).Scalars("loss")] == [1, 2, 3, 4, 5]


def test_a_tracker_that_fails_later_is_dropped(workshop, monkeypatch, capfd):
    from accelerate.tracking import TensorBoardTracker

    log = TensorBoardTracker.log

    def full_disk(self, values, step=None, **rest):
        if step == 3:
            raise OSError("no space left")
        return log(self, values, step, **rest)

    monkeypatch.setattr(TensorBoardTracker, "log", full_disk)
    assert len(losses(workshop.train(tracking__trackers=["tensorboard"]))) == 5
    assert capfd.readouterr().out.count("tracker tensorboard failed") == 1


@pytest.mark.slow
def test_secrets_of_the_environment_are_redacted(workshop, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setenv("USE_TOKENS", "yes")
    values = {"path": "https://user:hf_verysecret@host/rows", "deep": [{"a": "yes hf_verysecret"}]}
    assert redacted({**values, "lr": 0.1}) == {
        "path": "https://user:$HF_TOKEN@host/rows",
        "deep": [{"a": "yes $HF_TOKEN"}],
        "lr": 0.1,
    }
    every = OFFLINE | {"tracking__trackers": ["wandb", "tensorboard", "trackio"]}
    run = workshop.train(**every, data__system_prompt="hf_verysecret", train__max_steps=2)
    folders = (run / "wandb", run / "tensorboard", workshop.folder / "trackio")
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [path for path in files if b"hf_verysecret" in path.read_bytes()]
