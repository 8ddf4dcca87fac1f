"""A cloud's notice is heard once and in time; a metadata service cannot disturb the run."""

import re
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT
from metadata_server import (
    ACTION,
    ASKED_FOR,
    EVENTS,
    NAME,
    NOTHING,
    PREEMPTED,
    QUIET,
    REBALANCE,
    REBALANCED,
    TOKEN,
    Metadata,
    final,
    preempt,
)  # fmt: skip

from finetune.errors import ConfigError
from finetune.survival import notices
from finetune.survival.notices import CLOUDS, Watch


@pytest.fixture
def metadata(monkeypatch):
    server = Metadata()
    monkeypatch.setenv("FINETUNE_METADATA_ADDRESS", server.address)
    yield server
    server.close()


class Listener:
    """Holds watches, which stop when the test ends."""

    def __init__(self):
        self.heard, self.messages, self.watches = [], [], []

    def watch(self, cloud, every_seconds=0.005):
        self.watches.append(Watch(cloud, self.heard.append, self.messages.append, every_seconds))
        self.watches[-1].start()
        return self.watches[-1]


@pytest.fixture
def listener():
    listener = Listener()
    yield listener
    for watch in listener.watches:
        watch.stop()
    until(no_watch_runs)


def until(condition):
    """Wait for it; a loaded machine may take its time."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def no_watch_runs():
    return not any(thread.name == "notices" for thread in threading.enumerate())


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_notice_is_reported_once_and_ends_the_watch(cloud, metadata, listener):
    listener.watch(cloud)
    until(lambda: metadata.num_asked(ASKED_FOR[cloud]) >= 3)
    assert listener.heard == []
    answer, reason = final(cloud)
    metadata.says(ASKED_FOR[cloud], answer)
    until(no_watch_runs)
    [notice] = listener.heard
    assert (notice.final, notice.reason) == (True, reason)
    assert notice.deadline == pytest.approx(time.time() + (30 if cloud == "gcp" else 120), abs=10)
    assert listener.messages == []
    assert not any(method == "POST" for method, _ in metadata.asked), (
        "an acknowledged event would not wait for the save"
    )


def test_a_rebalance_recommendation_is_a_warning_once_and_the_watch_goes_on(metadata, listener):
    metadata.says(REBALANCE, NOTHING, REBALANCED)
    listener.watch("aws")
    until(lambda: listener.heard)
    asked = metadata.num_asked(ACTION)
    until(lambda: metadata.num_asked(ACTION) >= asked + 3)
    [warning] = listener.heard
    assert (warning.final, warning.deadline) == (False, None)
    metadata.says(ACTION, final("aws")[0])
    until(no_watch_runs)
    assert [notice.final for notice in listener.heard] == [False, True]


def test_a_rebalance_service_that_fails_does_not_hide_the_notice(metadata, listener):
    metadata.says(REBALANCE, (500, ""))
    answer, reason = final("aws")
    metadata.says(ACTION, NOTHING, NOTHING, answer)
    listener.watch("aws")
    until(no_watch_runs)
    assert [notice.reason for notice in listener.heard] == [reason]


@pytest.mark.parametrize(
    "when",
    ["soon", None, "2026-11-21T12:00:00", "2026-11-21T11:57:59Z", "9999-12-31T23:59:59-12:00"],
)
def test_a_notice_whose_time_makes_no_sense_has_no_deadline(when, metadata, listener):
    """Neither past nor hours away, nor in an unnamed time zone."""
    metadata.says(ACTION, (200, {"action": "terminate", "time": when}))
    metadata.says(EVENTS, (200, preempt("vmss_3", NotBefore=when or "soon")))
    listener.watch("aws")
    listener.watch("azure")
    until(no_watch_runs)
    assert {(notice.deadline, notice.final) for notice in listener.heard} == {(None, True)}
    assert "AWS takes this machine soon (terminate)" in [notice.reason for notice in listener.heard]


def test_an_event_of_azure_without_a_time_has_begun(metadata, listener):
    metadata.says(EVENTS, (200, preempt("vmss_3", NotBefore="", EventStatus="Started")))
    listener.watch("azure")
    until(no_watch_runs)
    assert listener.heard[0].deadline == pytest.approx(time.time(), abs=10)
    assert listener.heard[0].reason == "Azure takes this machine now (Preempt)"


def test_azure_events_of_other_machines_or_kinds_are_ignored(metadata, listener):
    others = (
        preempt("vmss_30", "vmss_1", "svmss_3")["Events"]
        + preempt("vmss_3", EventType="Reboot")["Events"]
    )
    metadata.says(EVENTS, (200, {"Events": others}))
    listener.watch("azure")
    until(lambda: metadata.num_asked(EVENTS) >= 4)
    assert listener.heard == listener.messages == []
    metadata.says(EVENTS, (200, {"Events": others + preempt("vmss_1", "VMSS_3")["Events"]}))
    until(no_watch_runs)
    assert len(listener.heard) == metadata.num_asked(NAME) == 1


def test_an_expired_token_is_renewed(metadata, listener):
    listener.watch("aws")
    until(lambda: metadata.num_asked(ACTION) >= 3)
    assert metadata.num_asked(TOKEN) == 1
    metadata.tokens.clear()
    until(lambda: metadata.num_asked(TOKEN) == 2)
    metadata.says(ACTION, final("aws")[0])
    until(no_watch_runs)
    assert len(listener.heard) == 1
    assert listener.messages == []


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_service_that_fails_is_asked_again_and_reported_once(cloud, metadata, listener):
    failures = [(status, "TRUE") for status in (500, 503, 429, 400, 401, 403)]
    answer, reason = final(cloud)
    metadata.says(ASKED_FOR[cloud], *failures, answer)
    listener.watch(cloud)
    until(no_watch_runs)
    assert [notice.reason for notice in listener.heard] == [reason]
    [line] = listener.messages
    assert line.startswith("note: ")
    assert f"GET {metadata.address}{ASKED_FOR[cloud]}: HTTPError: HTTP Error 429" in line
    assert "SIGTERM" in line
    assert {"aws": "hop limit of 1", "gcp": "Kubernetes", "azure": "two minutes"}[cloud] in line


def test_a_hiccup_is_not_reported(metadata, listener):
    metadata.says(PREEMPTED, *[(500, ""), (503, ""), QUIET["gcp"]] * 3, final("gcp")[0])
    listener.watch("gcp")
    until(no_watch_runs)
    assert len(listener.heard) == 1
    assert listener.messages == []


def test_a_service_that_cannot_be_reached_is_reported(listener, metadata):
    metadata.close()
    listener.watch("azure")
    until(lambda: listener.messages)
    assert metadata.address in listener.messages[0]
    assert "refused" in listener.messages[0]


@pytest.mark.parametrize(
    "address", ["nonsense", "https://127.0.0.1", "http://[", "http://a:b", "http://a b"]
)
def test_an_invalid_address_is_an_error(address, listener, monkeypatch):
    monkeypatch.setenv("FINETUNE_METADATA_ADDRESS", address)
    with pytest.raises(
        ConfigError, match=f"FINETUNE_METADATA_ADDRESS: {re.escape(address)} is not an address"
    ):
        listener.watch("gcp")


def hang(handler):
    handler.server.over.wait()


def drip(handler):
    """An answer that does not end, and is never silent for as long as a time-out."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while not handler.server.over.wait(0.02):
        handler.wfile.write(b"X-More: 1\r\n")


def flood(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while not handler.server.over.is_set():
        handler.wfile.write(b" " * 65536)


def test_a_token_blocked_by_a_hop_limit_is_reported(metadata, listener, monkeypatch):
    monkeypatch.setattr(notices, "REQUEST_SECONDS", 0.1)
    metadata.says(TOKEN, hang)
    listener.watch("aws")
    until(lambda: listener.messages)
    assert f"PUT {metadata.address}{TOKEN}: TimeoutError" in listener.messages[0]
    assert "hop limit of 1" in listener.messages[0]
    assert metadata.num_asked(ACTION) == 0


GARBAGE = {
    "nothing": (200, b""),
    "html": (200, b"<!DOCTYPE html><html><body>Please log in to use this wifi TRUE</body></html>"),
    "not utf-8": (200, b'{"action": "terminate\xff'),
    "null": (200, None),
    "list": (200, [{"action": "terminate"}]),
    "empty object": (200, {}),
    "unknown": (200, {"action": "reboot", "Events": [{"EventType": "Preempt"}]}),
    "deep": (200, b"[" * 60000),
    "cut off": lambda handler: handler.wfile.write(
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nTRUE"
    ),
    "not http": lambda handler: handler.wfile.write(
        b"SSH-2.0-\x1b[31mred\r\x07" + b"x" * 60_000 + b"\r\n"
    ),
    "flood": flood,
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_never_a_notice_and_never_an_error(garbage, metadata, listener):
    """Four times, then comes the notice; of each of the clouds."""
    finals = {cloud: final(cloud) for cloud in CLOUDS}
    for cloud in CLOUDS:
        metadata.says(ASKED_FOR[cloud], *[garbage] * 4, finals[cloud][0])
        listener.watch(cloud)
    until(no_watch_runs)
    assert sorted(notice.reason for notice in listener.heard) == sorted(
        reason for _, reason in finals.values()
    )
    assert sorted(line.split()[1] for line in listener.messages) == ["AWS", "Azure", "GCP"]
    assert all(line.isprintable() and len(line) < 600 for line in listener.messages)


def test_a_server_that_is_not_googles_is_ignored(metadata, listener):
    metadata.says(PREEMPTED, (200, "TRUE", {"Metadata-Flavor": "Amazon"}))
    listener.watch("gcp")
    until(lambda: listener.messages)
    assert listener.heard == []
    assert "without Metadata-Flavor: Google" in listener.messages[0]


def run_python(code, **keywords):
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False, **keywords
    )


def test_proxies_of_the_environment_are_not_used(metadata, listener):
    """urllib reads them once, when the module is imported."""
    script = """
from finetune.survival.notices import Watch
watch = Watch('gcp', lambda notice: print(notice.reason), print)
watch.start()
watch._thread.join(20)
"""
    metadata.says(PREEMPTED, final("gcp")[0])
    environment = {
        "FINETUNE_METADATA_ADDRESS": metadata.address,
        "http_proxy": "http://127.0.0.1:9",
        "all_proxy": "http://127.0.0.1:9",
    }
    done = run_python(script, env=environment)
    assert done.stdout == "GCP takes this machine within 30 s (preempted)\n"


@pytest.mark.parametrize("answer", [hang, drip], ids=["silent", "dripping"])
def test_a_watch_keeps_no_process_alive_and_needs_no_torch(answer, metadata):
    script = """
import sys, time
from finetune.survival.notices import Watch
watch = Watch('gcp', print, print)
watch.start()
time.sleep(0.2)
watch.stop()
assert 'torch' not in sys.modules
print('end')
"""
    metadata.says(PREEMPTED, answer)
    done = run_python(script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")
    assert metadata.num_asked(PREEMPTED) == 1


def test_nothing_is_reported_after_stop(metadata, listener):
    asked = threading.Event()

    def late(handler):
        asked.set()
        handler.server.over.wait(0.2)
        handler.reply(200, "TRUE")

    metadata.says(PREEMPTED, late)
    watch = listener.watch("gcp")
    assert asked.wait(20)
    watch.stop()
    until(no_watch_runs)
    assert listener.heard == []
