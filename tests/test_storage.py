"""The object store's copy is whole or absent, verified, of one writer, with clear errors."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
import requests
from conftest import ROOT
from fsspec.implementations.memory import MemoryFileSystem
from s3_server import SECRET, bucket, s3_url
from test_checkpoints import manifest_of

from finetune import object_store
from finetune.engine.checkpoint import folder, storage
from finetune.engine.checkpoint.storage import Storage, TakenOver
from finetune.errors import CheckpointError, ConfigError


class Flaky(MemoryFileSystem):
    """A store in memory that writes down what is done to it, and fails where a test says so."""

    protocol = "flaky"
    done: list[tuple[str, str]] = []  # noqa: RUF012
    fails: dict[tuple[str, str], list[Exception]] = {}  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("flaky://"))

    def _record(self, action, path):
        name = path.split("/run/")[-1] if "/run/" in path else path.split("/")[-1]
        if self.fails.get((action, name)):
            raise self.fails[action, name].pop(0)
        self.done.append((action, name))

    def put_file(self, lpath, rpath, **kwargs):
        self._record("put", rpath)
        super().put_file(lpath, rpath, **kwargs)

    def get_file(self, rpath, lpath, **kwargs):
        self._record("get", rpath)
        super().get_file(rpath, lpath, **kwargs)

    def rm_file(self, path):
        self._record("rm", path)
        super().rm_file(path)

    def ls(self, path, detail=True, **kwargs):
        self._record("ls", path)
        return super().ls(path, detail, **kwargs)


@pytest.fixture
def flaky(monkeypatch, tmp_path):
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(Flaky, "done", [])
    monkeypatch.setattr(Flaky, "fails", {})
    monkeypatch.setattr(storage, "WAITS_SECONDS", (0.01, 0.01))
    return claimed(f"flaky://{tmp_path}")


def claimed(url: str) -> Storage:
    store = Storage(url, "run")
    store.claim()
    return store


def checkpoint(root: Path, step: int, files: dict[str, bytes] | None = None) -> Path:
    """A committed checkpoint as training would leave it."""
    writing = folder.begin(root, step)
    for name, content in (files or FILES).items():
        (writing / name).parent.mkdir(exist_ok=True)
        (writing / name).write_bytes(content + str(step).encode() if content else b"")
    described = folder.described(writing, folder.files(writing))
    return folder.commit(writing, {**manifest_of(step), "files": described})


FILES = {
    "shards/.metadata": b"m" * 100, "shards/__0_0.distcp": bytes(range(256)) * 50,
    "shards/__1_0.distcp": b"y" * 7, "process-0000.json": b"{}", "process-0001.json": b"",
    "config.json": b"c",
}  # fmt: skip


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()
    }


def run_directory(path: Path) -> Path:
    path.mkdir(parents=True)
    for name in ("config.yaml", "receipt.json", "metrics.jsonl", "outcome.json"):
        (path / name).write_text(f"{name} of {path.name}\n")
    (path / ".lock").write_text("")
    (path / "model").mkdir()
    (path / "model/config.json").write_text("{}")
    (path / "model/model.safetensors").write_bytes(b"w" * 1000)
    return path


def test_a_checkpoint_comes_back_bit_by_bit_on_an_empty_machine(s3, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    paths = [checkpoint(here, step) for step in (100, 300, 200)]
    store = claimed(s3_url(tmp_path))
    for path in paths:
        store.upload_checkpoint(path)
    other = Storage(s3_url(tmp_path), "run")
    assert other.steps() == [300, 200, 100]
    assert other.fetch(300, there) == there / "step-00000300"
    assert contents(there / "step-00000300") == contents(here / "step-00000300")
    assert os.listdir(there) == ["step-00000300"]
    found, damaged = folder.find_newest(there)
    assert found.step == 300
    assert not damaged


def test_a_run_survives_upload_and_download(s3, tmp_path):
    run = run_directory(tmp_path / "here/run")
    checkpoint(run / "checkpoints", 100)
    store = claimed(s3_url(tmp_path))
    store.upload_checkpoint(run / "checkpoints/step-00000100")
    store.upload_model(run / "model")
    store.upload_notes(run)
    s3.put_object(Bucket=bucket(tmp_path), Key="runs/run/.check-0123", Body=b"left by a crash")
    keys = [each["Key"] for each in s3.list_objects_v2(Bucket=bucket(tmp_path))["Contents"]]
    assert not [key for key in keys if ".lock" in key]
    back = tmp_path / "there/run"
    assert Storage(s3_url(tmp_path), "run").restore(back)
    wanted = contents(run)
    assert contents(back) == {
        n: c for n, c in wanted.items() if n != ".lock" and not n.startswith("checkpoints")
    }


def test_every_listing_is_fresh(s3, tmp_path):
    mine, theirs = claimed(s3_url(tmp_path)), Storage(s3_url(tmp_path), "run")
    assert theirs.steps() == []
    mine.upload_checkpoint(checkpoint(tmp_path, 100))
    assert theirs.steps() == [100]
    s3.delete_object(
        Bucket=bucket(tmp_path), Key="runs/run/checkpoints/step-00000100/manifest.json"
    )
    assert mine.steps() == theirs.steps() == []


def test_only_names_of_checkpoints_count(s3, tmp_path):
    store = claimed(s3_url(tmp_path))
    store.upload_checkpoint(checkpoint(tmp_path, 100))
    for name in (
        "",
        "best/manifest.json",
        "step-1/manifest.json",
        "step-00000200/",
        "step-00000300/shards/manifest.json",
    ):
        s3.put_object(Bucket=bucket(tmp_path), Key=f"runs/run/checkpoints/{name}", Body=b"")
    assert store.steps() == [100]


@pytest.mark.parametrize("after", range(len(FILES) + 1))
def test_a_torn_upload_is_no_checkpoint_and_the_next_one_repairs_it(flaky, tmp_path, after):
    path = checkpoint(tmp_path / "here", 100)
    name = [*folder.files(path), "manifest.json"][after]
    Flaky.fails["put", f"checkpoints/step-00000100/{name}"] = [OSError("gone")] * 3
    with pytest.raises(
        CheckpointError, match=f"flaky://.*/run: uploading .*{name}.* failed: OSError: gone"
    ):
        flaky.upload_checkpoint(path)
    assert flaky.steps() == []
    flaky.upload_checkpoint(path)
    assert flaky.steps() == [100]
    assert contents(flaky.fetch(100, tmp_path / "there")) == contents(path)


def test_a_replaced_checkpoint_is_invalid_until_the_new_one_is_whole(flaky, tmp_path):
    flaky.upload_checkpoint(checkpoint(tmp_path / "old", 100))
    path = checkpoint(tmp_path / "new", 100, {**FILES, "shards/__0_0.distcp": b"trained again"})
    Flaky.fails["put", "checkpoints/step-00000100/shards/__1_0.distcp"] = [OSError("gone")] * 3
    with pytest.raises(CheckpointError):
        flaky.upload_checkpoint(path)
    assert flaky.steps() == []
    flaky.upload_checkpoint(path)
    assert contents(flaky.fetch(100, tmp_path / "there")) == contents(path)


def test_a_truncated_upload_gets_no_manifest(flaky, tmp_path, monkeypatch):
    def cut(self, lpath, rpath, **kwargs):
        self.pipe_file(rpath, Path(lpath).read_bytes()[:5])

    monkeypatch.setattr(Flaky, "put_file", cut)
    with pytest.raises(
        CheckpointError, match="step-00000100: shards/.metadata has 5 bytes instead of 103"
    ):
        flaky.upload_checkpoint(checkpoint(tmp_path, 100))
    assert flaky.steps() == []


def test_half_a_local_checkpoint_is_not_uploaded(flaky, tmp_path):
    path = checkpoint(tmp_path, 100)
    (path / "shards/__0_0.distcp").write_bytes(b"short")
    with pytest.raises(
        CheckpointError, match="step-00000100 is not complete, so it was not uploaded"
    ):
        flaky.upload_checkpoint(path)
    assert not [done for done in Flaky.done if done[0] == "put"]


def spoiled(content: bytes) -> bytes:
    return content[:50] + bytes([content[50] ^ 1]) + content[51:]


@pytest.mark.parametrize(
    ("name", "spoil", "problem"),
    [
        ("shards/__0_0.distcp", spoiled, "shards/__0_0.distcp is corrupt"),
        (
            "shards/__0_0.distcp",
            lambda content: content[:-1],
            "shards/__0_0.distcp has 12802 bytes instead of 12803",
        ),
        ("shards/__0_0.distcp", None, "shards/__0_0.distcp is missing"),
        (
            "manifest.json",
            lambda content: content.replace(b'"epoch": 0', b'"epoch": 1'),
            "manifest.json is corrupt",
        ),
        ("manifest.json", lambda content: content[:-9], "manifest.json is damaged"),
        ("manifest.json", lambda content: b"[]", "manifest.json is damaged"),
        ("manifest.json", None, "manifest.json is missing"),
    ],
)
def test_a_damaged_object_is_reported_and_removed(flaky, tmp_path, name, spoil, problem):
    flaky.upload_checkpoint(checkpoint(tmp_path / "here", 100))
    store, path = fsspec.filesystem("flaky"), f"{flaky.url}/checkpoints/step-00000100/{name}"
    content = store.cat_file(path)
    store.rm_file(path)
    if spoil:
        store.pipe_file(path, spoil(content))
    root = tmp_path / "there"
    root.mkdir()
    with pytest.raises(CheckpointError, match=f"{flaky.url}/checkpoints/step-00000100: {problem}"):
        flaky.fetch(100, root)
    assert list(root.iterdir()) == []


def test_a_manifest_cannot_write_elsewhere(flaky, tmp_path):
    flaky.upload_checkpoint(checkpoint(tmp_path, 100))
    for name in ("../../escaped", "/escaped"):
        manifest = json.dumps({"files": {name: {"bytes": 1}}}).encode()
        fsspec.filesystem("flaky").pipe_file(
            f"{flaky.url}/checkpoints/step-00000100/manifest.json", manifest
        )
        with pytest.raises(
            CheckpointError, match=f"names {name}, which is not in the checkpoint's folder"
        ):
            flaky.fetch(100, tmp_path / "there")


def test_whole_checkpoints_are_not_fetched_again_and_damaged_ones_set_aside(flaky, tmp_path):
    path = checkpoint(tmp_path, 100)
    flaky.upload_checkpoint(path)
    wanted, Flaky.done = contents(path), []
    assert flaky.fetch(100, tmp_path) == path
    assert Flaky.done == []
    (path / "shards/__0_0.distcp").write_bytes(spoiled(wanted["shards/__0_0.distcp"]))
    (tmp_path / ".fetching-step-00000100").mkdir()
    (tmp_path / ".fetching-step-00000100/left").write_text("of a crash")
    assert contents(flaky.fetch(100, tmp_path)) == wanted
    assert sorted(os.listdir(tmp_path)) == ["damaged-step-00000100.0", "step-00000100"]


def test_pruning_deletes_the_manifest_first_and_only_old_checkpoints(flaky, tmp_path):
    for step in (100, 200, 300, 400):
        flaky.upload_checkpoint(checkpoint(tmp_path, step))
    store, root = fsspec.filesystem("flaky"), f"{flaky.url}/checkpoints"
    store.rm_file(f"{root}/step-00000100/manifest.json")  # a torn one, older than a whole one
    for name in (
        "step-00000500/shards/__0_0.distcp",
        "mine/manifest.json",
        "damaged-step-00000100.0/manifest.json",
        "note",
    ):
        store.pipe_file(f"{root}/{name}", b"x")  # one that is arriving, and what is not ours
    Flaky.done = []
    flaky.prune(1, {"step-00000300"})
    removed = [name.removeprefix("checkpoints/") for action, name in Flaky.done if action == "rm"]
    assert removed[: len(FILES)] == [f"step-00000100/{name}" for name in sorted(FILES)]
    assert removed[len(FILES)] == "step-00000200/manifest.json"
    assert flaky.steps() == [400, 300]
    kept = {name.split("/checkpoints/")[1].split("/")[0] for name in store.find(root)}
    assert kept == {
        "step-00000300",
        "step-00000400",
        "step-00000500",
        "mine",
        "damaged-step-00000100.0",
        "note",
    }


def test_pruning_that_was_cut_short_is_finished_by_the_next(flaky, tmp_path):
    for step in (100, 200):
        flaky.upload_checkpoint(checkpoint(tmp_path, step))
    Flaky.fails["rm", "checkpoints/step-00000100/process-0000.json"] = [PermissionError("denied")]
    with pytest.raises(
        CheckpointError,
        match="removing checkpoints/step-00000100/process-0000.json failed: PermissionError",
    ):
        flaky.prune(1, set())
    assert flaky.steps() == [200]
    flaky.prune(1, set())
    assert not fsspec.filesystem("flaky").find(f"{flaky.url}/checkpoints/step-00000100")


@pytest.mark.parametrize("protected", [set(), {"step-00000300"}])
def test_pruning_keeps_the_last_resumable_checkpoint(flaky, tmp_path, protected):
    """What is protected may not have arrived yet."""
    for step in (100, 200):
        flaky.upload_checkpoint(checkpoint(tmp_path, step))
    flaky.prune(1, protected)
    assert flaky.steps() == [200]


def test_a_run_is_restored_only_into_an_empty_directory(flaky, tmp_path):
    run = run_directory(tmp_path / "here/run")
    assert not flaky.restore(tmp_path / "there")
    assert not (tmp_path / "there").exists()
    flaky.upload_notes(run)
    Flaky.done = []
    assert not flaky.restore(run)
    assert not [done for done in Flaky.done if done[0] == "get"]
    assert Storage(flaky.url.removesuffix("/run"), "other").restore(tmp_path / "there") is False


def test_the_reference_log_probabilities_are_uploaded_once(flaky, tmp_path):
    """A gigabyte of a large set, with notes that each checkpoint uploads; again once it differs."""
    from safetensors.numpy import save_file

    run, name = run_directory(tmp_path / "here/run"), "reference.safetensors"
    values = np.arange(1000, dtype=np.float32)
    for times, sha256 in enumerate(("a" * 64, "b" * 64), 1):
        save_file({"reference": values}, run / name, {"sha256": sha256})
        flaky.upload_notes(run)
        flaky.upload_notes(run)
        assert Flaky.done.count(("put", name)) == times
    assert Flaky.done.count(("put", "metrics.jsonl")) == 4
    assert flaky.restore(tmp_path / "there")
    assert (tmp_path / "there" / name).read_bytes() == (run / name).read_bytes()


def test_config_yaml_is_restored_last_to_mark_completion(flaky, tmp_path):
    run, back = run_directory(tmp_path / "here/run"), tmp_path / "there"
    Flaky.fails["put", "receipt.json"] = [OSError("gone")] * 3
    flaky.upload_model(run / "model")
    with pytest.raises(CheckpointError, match="uploading .*receipt.json"):
        flaky.upload_notes(run)
    assert not flaky.restore(back)
    flaky.upload_notes(run)
    assert Flaky.done[-1] == ("put", "config.yaml")
    Flaky.fails["get", "outcome.json"] = [OSError("gone")] * 3
    with pytest.raises(CheckpointError, match="fetching outcome.json"):
        flaky.restore(back)
    assert not (back / "config.yaml").exists()
    assert flaky.restore(back)
    assert [name for action, name in Flaky.done if action == "get"][-1] == "config.yaml"
    assert contents(back) == {
        name: content for name, content in contents(run).items() if name != ".lock"
    }


def test_no_file_of_an_older_model_stays(flaky, tmp_path):
    run, back = run_directory(tmp_path / "run"), tmp_path / "back"
    flaky.upload_model(run / "model")
    (run / "model/model.safetensors").rename(run / "model/adapter.safetensors")
    flaky.upload_model(run / "model")
    flaky.upload_notes(run)
    assert flaky.restore(back)
    assert sorted(os.listdir(back / "model")) == ["adapter.safetensors", "config.json"]


def test_the_last_to_start_wins_and_the_other_writes_nothing_more(s3, tmp_path):
    run, path = run_directory(tmp_path / "here/run"), checkpoint(tmp_path, 100)
    first = claimed(s3_url(tmp_path))
    first.require_claim()
    second = claimed(s3_url(tmp_path))
    before = s3.list_objects_v2(Bucket=bucket(tmp_path))["Contents"]
    who = (
        rf"another machine, {socket.gethostname()} \(process {os.getpid()}\), "
        "has taken s3://.*/run over at 20.*stops"
    )
    for write in (
        first.require_claim, lambda: first.upload_checkpoint(path), lambda: first.upload_notes(run),
        lambda: first.upload_model(run / "model"), lambda: first.prune(1, set()),
    ):  # fmt: skip
        with pytest.raises(TakenOver, match=who):
            write()
    assert s3.list_objects_v2(Bucket=bucket(tmp_path))["Contents"] == before
    second.upload_checkpoint(path)
    assert not Storage(s3_url(tmp_path), "run").restore(
        tmp_path / "there"
    )  # a claim alone is not a run
    s3.delete_object(Bucket=bucket(tmp_path), Key="runs/run/writer.json")
    with pytest.raises(TakenOver, match="writer.json is gone"):
        second.require_claim()
    s3.put_object(Bucket=bucket(tmp_path), Key="runs/run/writer.json", Body=b"[1")
    with pytest.raises(TakenOver, match="another machine"):
        second.require_claim()


def test_a_run_replaced_during_an_upload_writes_no_manifest(flaky, tmp_path, monkeypatch):
    other = Storage(flaky.url.removesuffix("/run"), "run")
    put = Flaky.put_file

    def slow(self, lpath, rpath, **kwargs):
        put(self, lpath, rpath, **kwargs)
        other.claim()

    monkeypatch.setattr(Flaky, "put_file", slow)
    with pytest.raises(TakenOver):
        flaky.upload_checkpoint(checkpoint(tmp_path, 100))
    assert other.steps() == []


def test_a_store_that_works_passes_the_check_and_keeps_nothing_of_it(s3, tmp_path):
    Storage(s3_url(tmp_path), "run").check()
    assert "Contents" not in s3.list_objects_v2(Bucket=bucket(tmp_path))
    Storage(f"file://{tmp_path}/store", "run").check()
    assert contents(tmp_path) == {}


def refusal(url: str, kind: type[Exception] = ConfigError) -> str:
    with pytest.raises(kind, match=r"^checkpoint.storage: ") as caught:
        Storage(url, "run").check()
    cause = caught.value
    while cause:
        assert SECRET not in str(cause)
        cause = cause.__cause__
    return str(caught.value)


def test_a_missing_bucket_is_reported(s3):
    message = refusal("s3://nowhere/runs")
    assert "s3://nowhere/runs/run cannot be written to" in message
    assert "create the bucket, or correct its name or the endpoint" in message


def test_missing_credentials_are_reported(s3, tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "give credentials through the environment (S3: AWS_ACCESS_KEY_ID" in refusal(
        s3_url(tmp_path)
    )


def test_wrong_credentials_are_reported(s3, server, tmp_path):
    require_signatures_after = f"{server}/moto-api/reset-auth"
    requests.post(require_signatures_after, data="0", timeout=10)
    try:
        message = refusal(s3_url(tmp_path))
    finally:
        requests.post(require_signatures_after, data="inf", timeout=10)
    assert (
        "cannot be written to (PermissionError: The AWS Access Key Id you provided does not exist"
        in message
    )
    assert "that they may list, read, write and delete there" in message


@pytest.mark.slow
def test_an_unresponsive_store_is_reported_in_time(s3, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
    began = time.monotonic()
    assert "AWS_ENDPOINT_URL" in refusal(s3_url(tmp_path), CheckpointError)  # nothing listens there
    assert time.monotonic() - began < 15
    monkeypatch.setattr(object_store, "CHECK_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "cannot be written to (TimeoutError: no answer within 1 s)" in refusal(
            s3_url(tmp_path), CheckpointError
        )


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("/mnt/runs", "got '/mnt/runs', which has no protocol .* run.dir"),
        ("s3:/bucket/runs", "has no protocol"),
        ("s3://", "names no bucket or folder"),
        ("nosuch://bucket", "got 'nosuch://bucket', whose protocol is not known"),
        ("simplecache::s3://bucket", "protocol is not known"),
        (
            "gs://bucket/runs",
            f"gs:// needs a package that is missing: pip install gcsfs=={fsspec.__version__}",
        ),
        (
            "abfs://files@account.dfs.core.windows.net/runs",
            "abfs:// needs a package that is missing: pip install adlfs",
        ),
        (f"s3://AKID:{SECRET}@bucket/runs", "holds a user name, a password or a key"),
        (f"s3://AKID:ab/{SECRET}@bucket/runs", "holds a user name, a password or a key"),
        (f"s3://AKID:{SECRET}/runs", "holds a user name, a password or a key"),
        (
            f"abfs://files:{SECRET}@account.dfs.core.windows.net/runs",
            "holds a user name, a password or a key",
        ),
        (f"AKID:{SECRET}@bucket/runs", "holds a user name, a password or a key"),
        (f"abfs://files@account.dfs.core.windows.net/runs?sig={SECRET}", "has a query string"),
        (f"{SECRET}://bucket@x?", "holds a user name"),
    ],
)
def test_an_invalid_url_is_refused_without_repeating_secrets(url, problem):
    assert re.search(problem, refusal(url))


def test_a_transient_failure_is_retried(flaky, tmp_path):
    path = checkpoint(tmp_path / "here", 100)
    manifest, shard = (
        f"checkpoints/step-00000100/{name}" for name in ("manifest.json", "shards/__0_0.distcp")
    )
    for action, name in (
        ("put", shard),
        ("put", manifest),
        ("get", shard),
        ("ls", "checkpoints"),
        ("rm", manifest),
    ):
        Flaky.fails[action, name] = [OSError("slow down"), TimeoutError()]
    flaky.upload_checkpoint(path)
    assert flaky.steps() == [100]
    assert contents(flaky.fetch(100, tmp_path / "there")) == contents(path)
    flaky.upload_checkpoint(checkpoint(tmp_path / "here", 200))
    flaky.prune(1, set())
    assert flaky.steps() == [200]
    assert not any(Flaky.fails.values())


def test_an_outage_is_not_an_empty_store(flaky, tmp_path):
    flaky.upload_checkpoint(checkpoint(tmp_path, 100))
    flaky.upload_notes(run_directory(tmp_path / "here/run"))
    for look, name in (
        (flaky.steps, "checkpoints"),
        (lambda: flaky.restore(tmp_path / "there"), "run"),
    ):
        Flaky.fails["ls", name] = [OSError("no route")] * 3
        with pytest.raises(
            CheckpointError, match="flaky://.*/run: listing .*failed: OSError: no route"
        ):
            look()


def test_a_vanished_bucket_is_reported(s3, tmp_path):
    store = claimed(s3_url(tmp_path))
    s3.delete_object(Bucket=bucket(tmp_path), Key="runs/run/writer.json")
    s3.delete_bucket(Bucket=bucket(tmp_path))
    with pytest.raises(
        CheckpointError,
        match="s3://.*/run: writing writer.json failed: FileNotFoundError: .*bucket",
    ):
        store.claim()


@pytest.mark.slow
def test_any_thread_may_call(s3, tmp_path):
    """A thread uploads while training itself lists and fetches."""
    store, failures = claimed(s3_url(tmp_path)), []
    paths = [checkpoint(tmp_path / "here", step) for step in range(1, 5)]

    def work(some):
        try:
            for path in some:
                store.upload_checkpoint(path)
                store.fetch(folder.step_of(path.name), tmp_path / "there")
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(paths[start::2],)) for start in (0, 1)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        store.steps()
    assert failures == []
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


BIG = """
import sys, tracemalloc
from pathlib import Path
from finetune.engine.checkpoint.storage import Storage
url, here, there = sys.argv[1:]
store = Storage(url, "run")
store.claim()
tracemalloc.start()
store.upload_checkpoint(Path(here))
sent = tracemalloc.get_traced_memory()[1]
tracemalloc.reset_peak()
store.fetch(100, Path(there))
print(sent, tracemalloc.get_traced_memory()[1])
"""


@pytest.mark.proof
def test_a_big_file_is_never_whole_in_memory(s3, tmp_path):
    """Memory holds 2 x 4 parts of 8 MiB; a process of its own leaves out this one's server."""
    content = os.urandom(2**20) * 88
    path = checkpoint(tmp_path / "here", 100, {"shards/__0_0.distcp": content})
    process = subprocess.run(
        [sys.executable, "-c", BIG, s3_url(tmp_path), str(path), str(tmp_path / "there")],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "there/step-00000100/shards/__0_0.distcp").read_bytes() == content + b"100"
    head = s3.head_object(
        Bucket=bucket(tmp_path), Key="runs/run/checkpoints/step-00000100/shards/__0_0.distcp"
    )
    assert head["ETag"].endswith('-12"')  # in 12 parts: 11 of 8 MiB, and three bytes
    assert all(int(peak) < 80 * 2**20 for peak in process.stdout.split())
