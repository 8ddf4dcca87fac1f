"""A server that speaks the protocol of S3, and what a user sets to reach it."""

import logging
from pathlib import Path

import pytest

SECRET = "wJalrXUtnFEMIK7MDENG"


@pytest.fixture(scope="module")
def server():
    """A server that speaks the protocol of S3."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # or it writes down every request
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    yield "http://{}:{}".format(*moto.get_host_and_port())
    moto.stop()


@pytest.fixture(scope="module")
def client(server):
    """For what users and accidents do there."""
    import boto3

    keys = {
        "aws_access_key_id": "AKIDEXAMPLE",
        "aws_secret_access_key": SECRET,
        "region_name": "us-east-1",
    }
    client = boto3.client("s3", endpoint_url=server, **keys)
    yield client
    client.close()


@pytest.fixture
def s3(server, client, monkeypatch, tmp_path):
    """An empty bucket on that server, and the environment that a user would set."""
    for name, value in {
        "AWS_ENDPOINT_URL": server, "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    client.create_bucket(Bucket=bucket(tmp_path))
    return client


def bucket(tmp_path: Path) -> str:
    return tmp_path.name.replace("_", "-")[-60:].strip("-")


def s3_url(tmp_path: Path) -> str:
    return f"s3://{bucket(tmp_path)}/runs"
