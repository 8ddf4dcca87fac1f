"""What is nobody's fault ends with 1, and is tried again; what is wrong ends with 2, and is not."""

import errno
import http.server
import threading

import httpx
import pytest
import requests
from conftest import Workshop

from finetune import failures
from finetune.data.rows import _load_dataset
from finetune.engine.rundir import RunDirectory
from finetune.errors import ModelError, Outage, RunDirectoryError
from finetune.models.load import translated


@pytest.fixture
def hub():
    """A server whose every answer is the code that its path names."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(int(self.path[1:]))

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def as_transformers_does(ask):
    """What went wrong is the cause of an OSError, with words of its own."""
    try:
        ask()
    except Exception as exc:
        raise OSError("We couldn't connect to the hub") from exc


@pytest.mark.parametrize("get", [httpx.get, requests.get], ids=["httpx", "requests"])
def test_a_hub_that_is_not_there_is_no_error_of_the_user(get):
    with pytest.raises(Outage, match="model a/b cannot be loaded now: We couldn't connect"), translated("model a/b"):
        as_transformers_does(lambda: get("http://127.0.0.1:9", timeout=1))


@pytest.mark.parametrize(("code", "error"), [(503, Outage), (429, Outage), (404, ModelError), (401, ModelError)])
def test_a_server_that_is_overloaded_is_an_outage_and_one_that_says_no_is_not(hub, code, error):
    with pytest.raises(error), translated("model a/b"):
        as_transformers_does(lambda: httpx.get(f"{hub}/{code}").raise_for_status())


def test_a_data_set_that_is_not_cached_while_no_network_is_wanted_is_an_error_of_the_user():
    """HF_HUB_OFFLINE, which all tests set: huggingface_hub's error is a ConnectionError, too."""
    from finetune.errors import DataError

    with pytest.raises(DataError, match="datasets cannot load it"):
        _load_dataset("owner/name")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS])
def test_a_disk_that_is_full_or_has_gone_is_an_outage(number):
    with pytest.raises(Outage, match="the cache: "):
        failures.reraise(OSError(number, "words"), "the cache")


def test_a_folder_that_forbids_is_not():
    with pytest.raises(ModelError, match="model a/b cannot be loaded: "), translated("model a/b"):
        raise PermissionError(errno.EACCES, "words")


def test_a_run_directory_where_a_file_is_remains_an_error_of_the_user(workshop: Workshop):
    from finetune import config as configs

    (workshop.folder / "runs").write_text("")
    config, _ = configs.parse(["--config", str(workshop.write(workshop.config()))])
    with pytest.raises(RunDirectoryError):
        RunDirectory(config).create(config)
