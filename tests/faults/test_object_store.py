"""The machine goes, and its disk with it: another one goes on from the object store."""

import json
import shutil

import boto3
import pytest
from conftest import Workshop, read_jsonl
from faults.forked import assert_same_end, long_form, run_to_completion, start, wait_for
from moto.server import ThreadedMotoServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS = {
    "train__max_steps": 12, "train__epochs": 9, "train__micro_batch_size": 2,
    "checkpoint__every_steps": 3, "checkpoint__every_minutes": None,
    "data__eval_fraction": 0.2, "evaluation__every_steps": 4,
}  # fmt: skip
KEPT = {**SETTINGS, "checkpoint__storage": "s3://bucket/stored", "checkpoint__keep_last": 9}


@pytest.fixture(scope="module")
def store():
    """A server that speaks S3's protocol, and the environment in which it is found."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    client = boto3.client(
        "s3",
        endpoint_url=f"http://{host}:{port}",
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket="bucket")
    yield {**keys, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}, client
    client.close()
    server.stop()


@pytest.fixture(scope="module")
def stored(tmp_path_factory, store) -> Workshop:
    """A run that nothing disturbed, whole on its disk and in s3://bucket/stored."""
    workshop = Workshop(tmp_path_factory.mktemp("stored"))
    config = workshop.write(workshop.config("single", **KEPT))
    to_the_end_of(start(config, **store[0]))
    return workshop


def objects(client, folder: str) -> list[str]:
    listed = client.list_objects_v2(Bucket="bucket", Prefix=folder).get("Contents", [])
    return [each["Key"].removeprefix(folder) for each in listed]


def wait_for_step(client, folder: str, step: int) -> None:
    manifest = f"checkpoints/step-{step:08d}/manifest.json"
    wait_for(lambda: manifest in objects(client, folder), every=0.05)


@pytest.mark.parametrize(
    ("topology", "processes"), [("single", 1), pytest.param("fsdp2", 2, marks=long_form)]
)
def test_a_machine_with_an_empty_disk_resumes(workshop, stored, store, topology, processes):
    environment, client = store
    folder = f"machines/{topology}/"
    config = workshop.write(
        workshop.config(topology, **SETTINGS, checkpoint__storage="s3://bucket/machines")
    )
    run = workshop.run_dir(topology)
    launch = start(config, topology, processes, **environment)
    wait_for_step(client, folder, 6)
    launch.kill(list(range(processes)))
    launch.codes()
    shutil.rmtree(run)
    launch = start(config, topology, processes, **environment)
    assert launch.codes() == [0] * processes, launch.output()
    assert "restored from s3://bucket/machines" in launch.output()
    assert "resumed from" in launch.output()
    if topology != "single":
        run_to_completion(stored.write(stored.config(topology, **SETTINGS)), topology, processes)
    assert_same_end(run, stored.run_dir(topology))
    there = objects(client, folder)
    steps = {name.split("/")[1] for name in there if name.startswith("checkpoints/")}
    assert steps == {p.name for p in (run / "checkpoints").iterdir()}, (
        "what is pruned here is pruned there"
    )
    assert "model/model.safetensors" in there

    shutil.rmtree(run)
    launch = start(config, topology, processes, **environment)
    assert launch.codes() == [0] * processes, launch.output()
    assert "is complete" in launch.output()
    assert json.loads((run / "outcome.json").read_text())["state"] == "complete"
    assert (run / "model/model.safetensors").exists()


@long_form  # test_disks.py has damage without a store
def test_a_newest_checkpoint_that_arrived_damaged_is_skipped(workshop, stored, store):
    environment, client = store
    for name in set(objects(client, "stored/single/")) - {"outcome.json"}:
        body = client.get_object(Bucket="bucket", Key=f"stored/single/{name}")["Body"].read()
        if name == "checkpoints/step-00000012/shards/__0_0.distcp":
            body = body[:-1] + bytes([body[-1] ^ 1])
        client.put_object(Bucket="bucket", Key=f"damaged/single/{name}", Body=body)
    settings = KEPT | {"checkpoint__storage": "s3://bucket/damaged"}
    config = workshop.config("single", **settings, data__train=str(stored.rows))
    launch = to_the_end_of(start(workshop.write(config), **environment))
    assert "__0_0.distcp" in launch.output()
    assert "at step 9" in launch.output()
    assert_same_end(workshop.run_dir("single"), stored.run_dir("single"))


def test_a_run_taken_over_by_another_machine_stops(workshop, tmp_path, store):
    environment, _ = store
    settings = {
        **SETTINGS,
        "train__max_steps": 100_000,
        "train__epochs": 99_999,
        "checkpoint__storage": "s3://bucket/taken",
    }
    config = workshop.write(workshop.config(**settings))
    first = start(config, **environment)
    wait_for(lambda: list((workshop.run_dir() / "checkpoints").glob("step-*")))
    other = tmp_path / "other"
    second = start(
        config.rename(tmp_path / "other.yaml"), "single", 1, "--run.dir", str(other), **environment
    )
    wait_for(lambda: "resumed from" in second.output(), every=0.02)
    assert first.codes(within=60) == [2], (
        "started again, the two would take turns without end: " + first.output()
    )
    assert "has taken s3://bucket/taken/run over" in first.output()
    assert second.processes[0].is_alive()


@long_form
def test_a_newer_store_wins_over_an_older_disk(workshop, stored, store):
    """Machine A, then B, then A again with what its disk still has."""
    environment, client = store
    config = workshop.write(
        workshop.config(
            "single", **SETTINGS, checkpoint__storage="s3://bucket/again", checkpoint__keep_last=9
        )
    )
    run = workshop.run_dir("single")
    launch = start(config, **environment)
    wait_for_step(client, "again/single/", 3)
    launch.kill([0])
    launch.codes()
    for later in sorted((run / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(later)
    old = workshop.folder / "old"
    run.rename(old)
    launch = start(config, **environment)
    wait_for_step(client, "again/single/", 9)
    launch.kill([0])
    launch.codes()
    shutil.rmtree(run)
    old.rename(run)
    to_the_end_of(start(config, **environment))
    assert_same_end(run, stored.run_dir("single"))
    assert read_jsonl(run / "eval.jsonl") == read_jsonl(stored.run_dir("single") / "eval.jsonl")
    steps = {
        name.split("/")[1]
        for name in objects(client, "again/single/")
        if name.startswith("checkpoints/")
    }
    assert steps == {f"step-{n:08d}" for n in (3, 6, 9, 12)}, (
        "what keep_last keeps stays there, for any state here"
    )


@long_form
def test_another_run_of_that_name_in_the_store_is_refused_and_the_disk_stays(
    workshop, stored, store
):
    mine = {**SETTINGS, "optimizer__lr": 0.02, "data__train": str(stored.rows)}
    run_to_completion(workshop.write(workshop.config("single", **mine)))
    run = workshop.run_dir("single")
    files = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    config = workshop.config("single", **mine, checkpoint__storage="s3://bucket/stored")
    launch = start(workshop.write(config), **store[0])
    assert launch.codes() == [2], launch.output()
    assert "s3://bucket/stored/single holds another run" in launch.output()
    assert "optimizer.lr: was 0.01, now 0.02" in launch.output()
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == files


def test_resume_never_refuses_what_is_in_the_store(workshop, stored, store):
    config = workshop.write(workshop.config("single", **KEPT))
    launch = start(config, "single", 1, "--checkpoint.resume", "never", **store[0])
    assert launch.codes() == [2], launch.output()
    assert "checkpoint.resume is never" in launch.output()


def test_a_store_that_cannot_be_reached_is_an_error_before_anything_loads(workshop, store):
    environment, _ = store
    config = workshop.write(workshop.config(checkpoint__storage="s3://no-such-bucket/runs"))
    launch = start(config, **environment)
    assert launch.codes() == [2], launch.output()
    assert "checkpoint.storage: s3://no-such-bucket" in launch.output()
    assert not workshop.run_dir().exists()


def to_the_end_of(launch):
    assert set(launch.codes()) == {0}, launch.output()
    return launch
