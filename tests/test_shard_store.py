"""Shards in an object store: as in the cache, or an error before any row is read."""

import shutil
from pathlib import Path

import pytest
import requests
from s3_server import bucket, s3_url
from test_streaming import ROWS, SHARD, Stored, Streaming, epoch_of

from finetune import workers
from finetune.data import shard_store, shards
from finetune.data.shard_store import ShardStore
from finetune.errors import ConfigError, Outage

pytestmark = pytest.mark.slow


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """Shards that a store keeps, of which this machine holds two windows of two."""
    monkeypatch.setattr(shards, "SHARD_ROWS", SHARD)
    monkeypatch.setattr(workers, "cores", lambda: 1)
    monkeypatch.setattr(shard_store, "WAITS_SECONDS", (0, 0, 0))
    return Stored(tmp_path)


@pytest.fixture
def in_bucket(stored, s3, tmp_path):
    stored.more["url"] = s3_url(tmp_path)
    return stored


def objects(s3, tmp_path: Path, ends: str = "") -> list[str]:
    listed = s3.list_objects_v2(Bucket=bucket(tmp_path)).get("Contents", [])
    return [each["Key"] for each in listed if each["Key"].endswith(ends)]


@pytest.mark.proof
def test_s3_gives_the_stream_that_the_cache_gives(in_bucket, s3, tmp_path, monkeypatch):
    """To the machine that has built it, and to one that finds it in the bucket."""
    wanted = epoch_of(in_bucket.open(url=None))
    shutil.rmtree(in_bucket.cache)
    in_bucket.make()
    assert in_bucket.num_here() <= 4
    assert len(objects(s3, tmp_path, "input_ids.npy")) == 11
    assert not [key for key in objects(s3, tmp_path) if ".check" in key]
    shutil.rmtree(in_bucket.cache)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "records", None)  # rows are not read, and not tokenised
        sequences = in_bucket.open()
    assert in_bucket.num_here() == 0
    assert epoch_of(sequences) == wanted
    assert len(wanted) == ROWS
    for left in in_bucket.cache.glob("shards/*/[!.]*.0000??"):
        shutil.rmtree(left)
    [meta] = objects(s3, tmp_path, "000005/meta.json")
    s3.delete_object(Bucket=bucket(tmp_path), Key=meta)
    assert epoch_of(in_bucket.open()) == wanted
    assert objects(s3, tmp_path, "000005/meta.json") == [meta]


def test_a_shard_that_was_removed_from_the_store_is_made_anew(stored):
    sequences = stored.open()
    wanted = epoch_of(sequences)
    for left in stored.cache.glob("shards/*/[!.]*.0000??"):
        shutil.rmtree(left)
    shutil.rmtree(next(stored.store.glob("*/*.000005")))
    sequences.opened._open.clear()
    with pytest.raises(Outage, match=r"data\.shards: file://.*000005 is gone; run the same comm"):
        sequences.documents(5 * SHARD)
    assert epoch_of(stored.open()) == wanted


@pytest.mark.proof
def test_a_bucket_that_is_not_there_is_an_error(s3, tmp_path):
    with pytest.raises(ConfigError) as caught:
        ShardStore("s3://nosuchbucket/shards", tmp_path).check()
    says = str(caught.value)
    assert says.startswith("data.shards: s3://nosuchbucket/shards/")
    assert "cannot be written to (FileNotFoundError" in says
    assert "create the bucket, or correct its name" in says


def test_a_store_that_takes_nothing_is_an_error_before_any_row_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "records", None)
    says = r"data\.shards: file:///dev/null/.* cannot be written to .*check the credentials"
    with pytest.raises(ConfigError, match=says):
        Streaming(tmp_path).make(url="file:///dev/null/shards")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("s3://", "names no bucket or folder"),
        ("s3://AKID:key@bucket/shards", "holds a user name, a password or a key"),
        ("nosuch://bucket", "whose protocol is not known"),
        ("file://shards", "give the whole path"),
    ],
)
def test_a_url_that_names_no_store_is_refused(tmp_path, url, says):
    with pytest.raises(ConfigError, match=rf"data\.shards: .*{says}"):
        ShardStore(url, tmp_path).holds("000000")


@pytest.mark.proof
def test_wrong_credentials_and_a_server_that_is_away_are_reported(
    s3, server, tmp_path, monkeypatch
):
    monkeypatch.setattr(shard_store, "WAITS_SECONDS", ())
    store = ShardStore(s3_url(tmp_path), tmp_path)
    require_signatures_after = f"{server}/moto-api/reset-auth"
    requests.post(require_signatures_after, data="0", timeout=10)
    try:
        with pytest.raises(ConfigError, match=r"data\.shards: s3://.*check the credentials"):
            store.holds("000000")
    finally:
        requests.post(require_signatures_after, data="inf", timeout=10)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(Outage, match=r"data\.shards: s3://.*that AWS_ENDPOINT_URL is right"):
        ShardStore(s3_url(tmp_path), tmp_path).holds("000000")
