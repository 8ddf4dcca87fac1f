"""A cloud's notice is heard once and in time; other behaviour of the metadata service does not disturb the run."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time

import pytest
from clouds import (
    ACTION,
    ASKED_FOR,
    BEFORE_NOON,
    EVENTS,
    FINAL,
    NAME,
    NOON,
    NOTHING,
    PREEMPTED,
    QUIET,
    REASONS,
    REBALANCE,
    REBALANCED,
    TOKEN,
    Metadata,
    preempt,
)
from conftest import ROOT

from finetune.errors import ConfigError
from finetune.survival import notices
from finetune.survival.notices import CLOUDS, Watch

LONG_SECONDS = 20  # what a loaded machine may take; a healthy one needs a hundredth


@pytest.fixture
def metadata(monkeypatch):
    server = Metadata()
    monkeypatch.setenv("FINETUNE_METADATA_ADDRESS", server.address)
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


class Listener:
    """Who holds a watch; every watch is stopped when the test ends, and leaves no thread."""

    def __init__(self):
        self.heard, self.said, self.watches = [], [], []

    def watch(self, cloud, every_seconds=0.005):
        self.watches.append(Watch(cloud, self.heard.append, self.said.append, every_seconds))
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
    """Waits for it; it must come, however late."""
    end = time.monotonic() + LONG_SECONDS
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def no_watch_runs():
    return not any(thread.name == "notices" for thread in threading.enumerate())


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_notice_is_heard_once_and_then_the_watch_ends(cloud, metadata, listener):
    listener.watch(cloud)
    until(lambda: metadata.num_asked(ASKED_FOR[cloud]) >= 3)
    assert listener.heard == []
    before = time.time()
    metadata.says(ASKED_FOR[cloud], FINAL[cloud])
    until(no_watch_runs)
    [notice] = listener.heard
    assert notice.final
    assert notice.reason == REASONS[cloud]
    lead = {"aws": 120, "gcp": 30, "azure": 120}[cloud]
    assert before + lead <= notice.deadline + 0.1 <= time.time() + lead + 0.1
    assert listener.said == []


def test_a_rebalance_recommendation_is_a_warning_once_and_the_watch_goes_on(metadata, listener):
    metadata.says(REBALANCE, NOTHING, REBALANCED)
    listener.watch("aws")
    until(lambda: listener.heard)
    asked = metadata.num_asked(ACTION)
    until(lambda: metadata.num_asked(ACTION) >= asked + 3)
    [warning] = listener.heard
    assert (warning.final, warning.deadline) == (False, None)
    assert "rebalance recommendation" in warning.reason
    metadata.says(ACTION, FINAL["aws"])
    until(no_watch_runs)
    assert [notice.final for notice in listener.heard] == [False, True]
    assert listener.said == []


def test_a_rebalance_service_that_fails_does_not_hide_the_notice(metadata, listener):
    metadata.says(REBALANCE, (500, ""))
    metadata.says(ACTION, NOTHING, NOTHING, FINAL["aws"])
    listener.watch("aws")
    until(no_watch_runs)
    assert [notice.reason for notice in listener.heard] == [REASONS["aws"]]


@pytest.mark.parametrize("action", ["terminate", "stop", "hibernate"])
def test_each_of_the_actions_of_aws_is_named(action, metadata, listener):
    metadata.says(ACTION, (200, {"action": action, "time": NOON}, BEFORE_NOON))
    listener.watch("aws")
    until(lambda: listener.heard)
    assert listener.heard[0].reason == f"AWS takes this machine at {NOON} ({action})"


@pytest.mark.parametrize("zone", ["UTC", "Asia/Kolkata", "America/St_Johns"])
@pytest.mark.parametrize("cloud", ["aws", "azure"])
def test_a_deadline_is_right_in_every_time_zone_and_by_a_clock_that_is_wrong(
    cloud, zone, metadata, listener, monkeypatch
):
    """The cloud's clock (Date) is months away from this machine's: it goes in two minutes all the same."""
    with monkeypatch.context() as patched:
        patched.setenv("TZ", zone)
        time.tzset()
        metadata.says(ASKED_FOR[cloud], FINAL[cloud])
        listener.watch(cloud)
        until(lambda: listener.heard)
    time.tzset()
    assert 0 < listener.heard[0].deadline - time.time() <= 120
    assert listener.heard[0].reason == REASONS[cloud]


def test_without_a_date_the_deadline_is_by_the_clock_of_this_machine(metadata, listener):
    at = time.time() + 100
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
    metadata.says(ACTION, (200, {"action": "stop", "time": stamp}, {"Date": None}))
    listener.watch("aws")
    until(lambda: listener.heard)
    assert listener.heard[0].deadline == pytest.approx(at, abs=1.1)


@pytest.mark.parametrize(
    "when",
    ["soon", "", None, 5, 1e400, [NOON], "2026-11-21T12:00:00", "2026-13-45T99:99:99Z", "2026-11-21T11:57:59Z",
     "2026-11-21T13:00:00Z", "9999-12-31T23:59:59-12:00", "0001-01-01T00:00:00+14:00", "\x00", "1" * 5000],
    ids=lambda when: repr(when)[:30],
)  # fmt: skip
def test_a_notice_whose_time_makes_no_sense_is_a_notice_without_a_deadline(when, metadata, listener):
    """Not past, not hours away, not in an unnamed time zone."""
    metadata.says(ACTION, (200, {"action": "terminate", "time": when}, BEFORE_NOON))
    metadata.says(EVENTS, (200, preempt("vmss_3", NotBefore=when), BEFORE_NOON))
    listener.watch("aws")
    until(lambda: listener.heard)
    if when != "":  # which has a meaning in Azure
        listener.watch("azure")
        until(lambda: len(listener.heard) == 2)
    assert {(notice.deadline, notice.final) for notice in listener.heard} == {(None, True)}
    assert listener.heard[0].reason == "AWS takes this machine soon (terminate)"


def test_an_event_of_azure_without_a_time_has_begun(metadata, listener):
    metadata.says(EVENTS, (200, preempt("vmss_3", NotBefore="", EventStatus="Started")))
    before = time.time()
    listener.watch("azure")
    until(lambda: listener.heard)
    assert before <= listener.heard[0].deadline <= time.time()
    assert listener.heard[0].reason == "Azure takes this machine now (Preempt)"


def test_what_azure_says_to_other_machines_is_not_heard(metadata, listener):
    others = preempt("vmss_30", "vmss_1", "svmss_3")
    mine = preempt("vmss_1", "VMSS_3")
    metadata.says(EVENTS, (200, others))
    listener.watch("azure")
    until(lambda: metadata.num_asked(EVENTS) >= 4)
    assert listener.heard == []
    both = {"DocumentIncarnation": 3, "Events": others["Events"] + mine["Events"]}
    metadata.says(EVENTS, (200, both, BEFORE_NOON))
    until(no_watch_runs)
    assert [notice.reason for notice in listener.heard] == [REASONS["azure"]]
    assert metadata.num_asked(NAME) == 1
    assert {method for method, _ in metadata.asked} == {"GET"}, "an acknowledged event would not wait for the save"


@pytest.mark.parametrize("kind", ["Freeze", "Reboot", "Redeploy", "Terminate", None, ["Preempt"]])
def test_other_events_of_azure_are_no_notice(kind, metadata, listener):
    metadata.says(EVENTS, (200, preempt("vmss_3", EventType=kind)))
    listener.watch("azure")
    until(lambda: metadata.num_asked(EVENTS) >= 3)
    assert listener.heard == listener.said == []


def test_an_expired_token_is_renewed(metadata, listener):
    listener.watch("aws")
    until(lambda: metadata.num_asked(ACTION) >= 3)
    assert metadata.num_asked(TOKEN) == 1
    metadata.tokens.clear()
    metadata.says(TOKEN, (200, "another=="))
    metadata.says(ACTION, NOTHING, FINAL["aws"])
    until(no_watch_runs)
    assert metadata.num_asked(TOKEN) == 2
    assert len(listener.heard) == 1
    assert listener.said == []


def test_a_token_is_renewed_before_it_expires(metadata, listener, monkeypatch):
    monkeypatch.setattr(notices, "TOKEN_SECONDS", 1)
    listener.watch("aws")
    until(lambda: len(metadata.tokens) >= 2)
    assert listener.said == []


@pytest.mark.parametrize("token", ["", "<html>no token here</html>", "two words", "line\nline", b"\xff\xfe", "tökén"])
def test_what_cannot_be_a_token_is_not_sent_nor_shown(token, metadata, listener):
    metadata.says(TOKEN, *[(200, token)] * 4, (200, "good=="))
    metadata.says(ACTION, FINAL["aws"])
    listener.watch("aws")
    until(no_watch_runs)
    assert metadata.num_asked(ACTION) == 1
    [line] = listener.said
    assert "answered with no token" in line
    assert not token or str(token) not in line


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_service_that_fails_is_asked_again_and_spoken_of_once(cloud, metadata, listener):
    failures = [(status, "TRUE") for status in (500, 503, 429, 400, 401, 403, 201, 204, 301)]
    metadata.says(ASKED_FOR[cloud], *failures, FINAL[cloud])
    listener.watch(cloud)
    until(no_watch_runs)
    assert [notice.reason for notice in listener.heard] == [REASONS[cloud]]
    assert metadata.num_asked(ASKED_FOR[cloud]) == len(failures) + 1
    [line] = listener.said
    assert line.startswith("note: ")
    assert f"GET {metadata.address}{ASKED_FOR[cloud]} answered 429" in line
    assert "SIGTERM" in line
    assert "\n" not in line


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_hiccup_is_not_spoken_of(cloud, metadata, listener):
    metadata.says(ASKED_FOR[cloud], *[(500, ""), (503, ""), QUIET[cloud]] * 3, FINAL[cloud])
    listener.watch(cloud)
    until(no_watch_runs)
    assert len(listener.heard) == 1
    assert listener.said == []


def test_a_service_that_comes_and_goes_is_spoken_of_once(metadata, listener):
    metadata.says(PREEMPTED, *[*[(500, "")] * 5, QUIET["gcp"]] * 3, FINAL["gcp"])
    listener.watch("gcp")
    until(no_watch_runs)
    assert len(listener.said) == 1


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_service_that_cannot_be_reached_is_spoken_of_once_and_heard_when_it_comes(cloud, listener, monkeypatch):
    server = Metadata(listens=False)
    server.says(ASKED_FOR[cloud], FINAL[cloud])
    monkeypatch.setenv("FINETUNE_METADATA_ADDRESS", server.address)
    listener.watch(cloud)
    until(lambda: listener.said)
    server.listen()
    until(no_watch_runs)
    server.shutdown()
    server.server_close()
    assert [notice.reason for notice in listener.heard] == [REASONS[cloud]]
    [line] = listener.said
    assert server.address in line
    assert "refused" in line
    expected = {"aws": "hop limit of 1", "gcp": "Kubernetes", "azure": "two minutes"}[cloud]
    assert expected in line


@pytest.mark.parametrize(
    "address", ["nonsense", "https://127.0.0.1", "http://", "http://[", "http://127.0.0.1:port", "http://a b/"]
)
def test_an_address_that_is_none_is_an_error(address, listener, monkeypatch):
    monkeypatch.setenv("FINETUNE_METADATA_ADDRESS", address)
    with pytest.raises(ConfigError, match=f"FINETUNE_METADATA_ADDRESS: {re.escape(address)} is not an address"):
        listener.watch("gcp")


def test_the_address_is_read_when_a_watch_is_made(metadata, listener, monkeypatch):
    watch = Watch("gcp", listener.heard.append, listener.said.append, 0.02)
    monkeypatch.setenv("FINETUNE_METADATA_ADDRESS", "nonsense")
    metadata.says(PREEMPTED, FINAL["gcp"])
    watch.start()
    until(lambda: listener.heard)
    until(no_watch_runs)
    assert [notice.reason for notice in listener.heard] == [REASONS["gcp"]]


def drip(head, drop):
    """Sends `head`, then a little without end: far more often than any timeout between two bytes."""

    def answer(handler):
        handler.wfile.write(head)
        while not handler.server.over.wait(0.02):
            handler.wfile.write(drop)

    return answer


def hang(handler):
    handler.server.over.wait()


OK = b"HTTP/1.1 200 OK\r\nMetadata-Flavor: Google\r\n"
ENDLESS = {
    "no answer": hang,
    "dripping status": drip(b"HTTP/1.1 200 ", b"O"),
    "dripping headers": drip(OK, b"X-More: 1\r\n"),
    "dripping body": drip(OK + b"Content-Length: 1000000\r\n\r\nTRUE", b" "),
    "dripping body without a length": drip(OK + b"\r\nTRUE", b" "),
    "dripping chunks": drip(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "dripping continuation": drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "half a body": drip(OK + b"Content-Length: 10\r\n\r\nTRUE", b""),
}


@pytest.mark.parametrize("answer", ENDLESS.values(), ids=ENDLESS)
@pytest.mark.slow
def test_an_answer_that_does_not_end_is_given_up_in_time(answer, metadata, listener, monkeypatch):
    monkeypatch.setattr(notices, "REQUEST_SECONDS", 0.1)
    metadata.says(PREEMPTED, answer)
    began = time.monotonic()
    listener.watch("gcp")
    until(lambda: listener.said)
    assert time.monotonic() - began < 5, "three times a tenth of a second, and patience with a loaded machine"
    assert "timed out" in listener.said[0]
    assert listener.heard == []


def test_a_token_that_does_not_come_as_behind_a_hop_limit_of_one_is_spoken_of(metadata, listener, monkeypatch):
    monkeypatch.setattr(notices, "REQUEST_SECONDS", 0.1)
    metadata.says(TOKEN, hang)
    listener.watch("aws")
    until(lambda: listener.said)
    assert f"PUT {metadata.address}{TOKEN}: TimeoutError" in listener.said[0]
    assert "hop limit of 1" in listener.said[0]
    assert metadata.num_asked(ACTION) == 0


def test_a_flood_is_not_read(metadata, listener):
    sent = []

    def flood(handler):
        handler.wfile.write(OK + b"\r\nTRUE")
        while not handler.server.over.is_set():
            handler.wfile.write(b" " * 65536)
            sent.append(65536)

    metadata.says(PREEMPTED, flood, flood, flood, flood, FINAL["gcp"])
    listener.watch("gcp")
    until(no_watch_runs)
    assert sum(sent) < 100e6, "no more than fits into the buffers of four connections"
    assert len(listener.heard) == 1
    assert "more than 65536 bytes" in listener.said[0]


def raw(answer):
    return lambda handler: handler.wfile.write(answer)


GARBAGE = {
    "nothing": (200, b""),
    "html": (200, b"<!DOCTYPE html><html><body>Please log in to use this wifi TRUE</body></html>"),
    "binary": (200, bytes(range(256))),
    "not utf-8": (200, b'{"action": "terminate\xff'),
    "nulls": (200, b"\0" * 100),
    "null": (200, None),
    "number": (200, 5),
    "huge number": (200, b"9" * 10000),
    "infinity": (200, b"Infinity"),
    "string": (200, '"terminate"'),
    "list": (200, [{"action": "terminate"}]),
    "empty object": (200, {}),
    "cut object": (200, b'{"action": "terminate", "time"'),
    "deep": (200, b"[" * 60000),
    "deep objects": (200, b'{"Events":' * 6000),
    "huge": (200, json.dumps({"action": "terminate", "noticeTime": NOON, "rest": "x" * 100_000})),
    "cut off": raw(OK + b'Content-Length: 100\r\n\r\n{"action": "terminate"}'),
    "cut off chunks": raw(OK + b'Transfer-Encoding: chunked\r\n\r\n17\r\n{"action": "terminate"}\r\n'),
    "absurd length": raw(OK + b"Content-Length: 99999999999999999999\r\n\r\nTRUE"),
    "absurd chunk": raw(OK + b"Transfer-Encoding: chunked\r\n\r\n7fffffffffffffff\r\nTRUE"),
    "not http": raw(b"SSH-2.0-OpenSSH_9.2p1\r\n"),
    "no status": raw(b"\r\n\r\n"),
    "hung up": raw(b""),
    "long line": raw(OK + b"X: " + b"x" * 63_000 + b"y" * 4000 + b"\r\n\r\nTRUE"),
    "many headers": raw(OK + b"X: y\r\n" * 200 + b"\r\nTRUE"),
}


def test_what_a_server_sends_is_shown_short_and_harmless(metadata, listener):
    metadata.says(PREEMPTED, raw(b"\x1b[31mred\r\x07" + b"x" * 60_000 + b"\r\n\r\n"))
    listener.watch("gcp")
    until(lambda: listener.said)
    assert "BadStatusLine: [31mred xxx" in listener.said[0]
    assert listener.said[0].isprintable()
    assert len(listener.said[0]) < 700


GARBAGE_OF_A_CLOUD = {
    "aws": [{"action": None}, {"action": "reboot"}, {"action": ["terminate"]}, {"action": {"a": 1}}, {"time": NOON}],
    "gcp": ["true", "TRUE FALSE", "TRU", "1", '"TRUE"', "T R U E"],
    "azure": [
        {"Events": None}, {"Events": {}}, {"Events": "Preempt"}, preempt("vmss_3", Resources="vmss_3"),
        preempt("vmss_3", Resources={"vmss_3": 1}), preempt("vmss_3", Resources=[["vmss_3"], None, 5, {}]),
        {"Events": [None, 5, "Preempt", ["Preempt"], {}]}, {"events": preempt("vmss_3")["Events"]},
    ],
}  # fmt: skip


def heard_beside(path, garbage, cloud, metadata, listener):
    """It is said four times, then the cloud gives its notice: the reasons of all that was heard."""
    metadata.says(path, *[garbage] * 4, FINAL[cloud] if path == ASKED_FOR[cloud] else QUIET[cloud])
    listener.watch(cloud)
    until(lambda: metadata.num_asked(path) > 4)
    metadata.says(ASKED_FOR[cloud], FINAL[cloud])
    until(no_watch_runs)
    assert len(listener.said) <= 1
    return [notice.reason for notice in listener.heard]


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_never_a_notice_and_never_an_error(garbage, metadata, listener):
    """Four times, then comes the notice; of each of the clouds."""
    for cloud in CLOUDS:
        metadata.says(ASKED_FOR[cloud], *[garbage] * 4, FINAL[cloud])
        listener.watch(cloud)
    until(no_watch_runs)
    assert {metadata.num_asked(path) for path in ASKED_FOR.values()} == {5}
    assert sorted(notice.reason for notice in listener.heard) == sorted(REASONS.values())
    assert sorted(line.split()[1] for line in listener.said) == ["AWS", "Azure", "GCP"]


@pytest.mark.parametrize(
    ("cloud", "said"), [(cloud, said) for cloud, all_said in GARBAGE_OF_A_CLOUD.items() for said in all_said]
)
def test_what_is_nearly_a_notice_is_none(cloud, said, metadata, listener):
    assert heard_beside(ASKED_FOR[cloud], (200, said), cloud, metadata, listener) == [REASONS[cloud]]


def test_garbage_is_no_warning(metadata, listener):
    metadata.says(REBALANCE, *GARBAGE.values(), NOTHING)
    listener.watch("aws")
    until(lambda: metadata.num_asked(REBALANCE) > len(GARBAGE))
    assert listener.heard == []
    assert len(listener.said) == 1


def test_garbage_is_no_name_of_a_machine(metadata, listener):
    odd_but_names = ("null", "number", "infinity")
    garbage = [said for name, said in GARBAGE.items() if name not in odd_but_names]
    metadata.says(NAME, *garbage, (200, "vmss_3"))
    metadata.says(EVENTS, FINAL["azure"])
    listener.watch("azure")
    until(no_watch_runs)
    assert metadata.num_asked(NAME) == len(garbage) + 1
    assert [notice.reason for notice in listener.heard] == [REASONS["azure"]]


@pytest.mark.parametrize("when", ["soon", None, 5, [NOON]])
def test_a_recommendation_without_a_time_is_no_warning(when, metadata, listener):
    assert heard_beside(REBALANCE, (200, {"noticeTime": when}), "aws", metadata, listener) == [REASONS["aws"]]


@pytest.mark.parametrize("flavor", [None, "", "google", "Amazon"])
def test_a_server_that_is_not_googles_is_not_believed(flavor, metadata, listener):
    metadata.says(PREEMPTED, (200, "TRUE", {"Metadata-Flavor": flavor}))
    listener.watch("gcp")
    until(lambda: listener.said)
    assert listener.heard == []
    assert "without Metadata-Flavor: Google" in listener.said[0]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_redirect_is_not_followed(cloud, metadata, listener):
    elsewhere = Metadata()
    elsewhere.says("/", FINAL[cloud])
    redirects = [(status, "", {"Location": f"{elsewhere.address}/"}) for status in (301, 302, 303, 307, 308)]
    metadata.says(ASKED_FOR[cloud], *redirects, QUIET[cloud])
    listener.watch(cloud)
    until(lambda: metadata.num_asked(ASKED_FOR[cloud]) > len(redirects))
    elsewhere.shutdown()
    elsewhere.server_close()
    assert elsewhere.asked == listener.heard == []


def test_proxies_of_the_environment_are_not_used(metadata, listener, monkeypatch):
    proxy = Metadata()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "https_proxy"):
        monkeypatch.setenv(name, proxy.address)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for cloud in CLOUDS:
        metadata.says(ASKED_FOR[cloud], FINAL[cloud])
        listener.watch(cloud)
    until(no_watch_runs)
    proxy.shutdown()
    proxy.server_close()
    assert len(listener.heard) == 3
    assert proxy.asked == []


def test_stop_does_not_wait_for_the_next_question(metadata, listener):
    watch = listener.watch("gcp", every_seconds=600)
    until(lambda: metadata.asked)
    began = time.monotonic()
    watch.stop()
    watch.stop()
    assert time.monotonic() - began < 5
    until(no_watch_runs)


def test_stop_waits_no_longer_than_one_question(metadata, listener, monkeypatch):
    """Also where the thread itself hangs for longer: here in what it tells us to do."""
    monkeypatch.setattr(notices, "REQUEST_SECONDS", 0.2)
    hearing, released = threading.Event(), threading.Event()

    def hear(notice):
        hearing.set()
        released.wait()

    metadata.says(PREEMPTED, FINAL["gcp"])
    watch = Watch("gcp", hear, listener.said.append, 0.02)
    watch.start()
    assert hearing.wait(LONG_SECONDS)
    began = time.monotonic()
    watch.stop()
    assert time.monotonic() - began < 5
    released.set()
    until(no_watch_runs)


def test_nothing_is_heard_after_stop(metadata, listener):
    asked = threading.Event()

    def late(handler):
        asked.set()
        handler.server.over.wait(0.2)
        handler.reply(200, "TRUE")

    metadata.says(PREEMPTED, late)
    watch = listener.watch("gcp")
    assert asked.wait(LONG_SECONDS)
    watch.stop()
    until(no_watch_runs)
    assert listener.heard == []


def test_a_watch_that_never_began_can_be_stopped(metadata, listener):
    watch = Watch("aws", listener.heard.append, listener.said.append)
    watch.stop()
    watch.stop()
    assert metadata.asked == []


def test_who_hears_a_notice_may_stop_the_watch(metadata):
    metadata.says(ACTION, FINAL["aws"])
    heard = []

    def stop(notice):
        watch.stop()
        heard.append(notice)

    watch = Watch("aws", stop, print, 0.02)
    watch.start()
    until(no_watch_runs)
    assert len(heard) == 1


def test_a_watch_keeps_no_process_alive_and_needs_no_torch():
    """It hangs on a server that accepts and never answers while the script ends."""
    script = (
        "import sys\n"
        "from finetune.survival.notices import Watch\n"
        "Watch('azure', print, print).start()\n"
        "assert 'torch' not in sys.modules\n"
        "print('end')\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environment = os.environ | {"FINETUNE_METADATA_ADDRESS": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
        )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")
