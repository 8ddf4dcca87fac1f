"""What a cloud says before it takes a spot machine away.

A bonus on plain machines, where SIGTERM comes late or not at all. Whatever the metadata service
does, the run continues: every question has a time limit, and a malformed answer does not count as a notice.
"""

import io
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import Message
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any
from urllib.parse import urlsplit

from finetune.errors import ConfigError

CLOUDS = ("aws", "gcp", "azure")
ADDRESS = "http://169.254.169.254"  # of all three; nothing could bound the look-up of metadata.google.internal
REQUEST_SECONDS = 2.0  # for all of one question: connecting, asking and the whole answer
MOST_BYTES = 64 * 1024
TOKEN_SECONDS = 6 * 3600  # the most that AWS allows
GCP_LEAD_SECONDS = 30.0
LONGEST_LEAD_SECONDS = 3600.0  # clouds give seconds to minutes: what is further off is a mistake
FAILURES_BEFORE_A_NOTE = 3  # do not report one hiccup in a week


@dataclass(frozen=True)
class Notice:
    """`deadline`: when the machine goes, as time.time() counts; None where the cloud gave no time that makes sense."""

    reason: str
    deadline: float | None
    final: bool  # False: only a warning (AWS's rebalance recommendation): save, and go on


class Watch:
    """Asks one cloud every few seconds, in a thread of its own; never raises, and never waits long.

    `heard` gets the warning and the final notice once each, after which the thread ends. `say` gets
    one line if the cloud cannot be asked. Both are called in that thread, and must not raise.
    """

    def __init__(
        self, cloud: str, heard: Callable[[Notice], None], log: Callable[[str], None], every_seconds: float = 5.0
    ) -> None:
        """The address is in FINETUNE_METADATA_ADDRESS (http://host:port) on machines that have another one, else ConfigError."""
        assert cloud in CLOUDS
        address = os.environ.get("FINETUNE_METADATA_ADDRESS") or ADDRESS
        if not _is_address(address):
            raise ConfigError(f"FINETUNE_METADATA_ADDRESS: {address} is not an address; write http://host:port")
        self._cloud = _ASKED[cloud](address.rstrip("/"))
        self._heard = heard
        self._say = log
        self._every_seconds = every_seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="notices", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """At once, or after the question under way; nothing is heard afterwards."""
        self._stopped.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(REQUEST_SECONDS)

    def _run(self) -> None:
        num_failures, told = 0, False
        while not self._stopped.is_set():
            notice = None
            try:
                notice = self._cloud.look()
                num_failures = 0
            except Exception as exc:  # a failing service must not end the run
                num_failures += 1
                if num_failures == FAILURES_BEFORE_A_NOTE and not told:
                    told = True
                    self._say(_note(self._cloud.name, self._cloud.hint, exc))
            if notice is not None and not self._stopped.is_set():
                self._heard(notice)
                if notice.final:
                    return
            self._stopped.wait(self._every_seconds)


class _Unusable(Exception):
    """A question that got no answer, or none that can be used."""


@dataclass(frozen=True)
class _Answer:
    question: str
    status: int
    headers: Message
    body: bytes

    def text(self) -> str:
        if self.status != 200:
            raise _Unusable(f"{self.question} answered {self.status}")
        return self.body.decode(errors="replace").strip()

    def json_object(self) -> dict[str, Any]:
        try:
            value = json.loads(self.text())
        except ValueError as exc:
            raise _Unusable(f"{self.question} answered no JSON") from exc
        if not isinstance(value, dict):
            raise _Unusable(f"{self.question} answered no JSON object")
        return value


class _Aws:
    """IMDSv2: a token first, then 404 as long as there is nothing to say."""

    name = "AWS"
    hint = "From a container, IMDSv2's hop limit of 1 is the usual reason: rely on SIGTERM there"

    def __init__(self, address: str) -> None:
        self._address = address
        self._token = ""
        self._renew_at = time.monotonic()
        self._warned = False

    def look(self) -> Notice | None:
        answer = self._get("/latest/meta-data/spot/instance-action")
        if answer.status != 404:
            said = answer.json_object()
            action = said.get("action")
            if action not in ("terminate", "stop", "hibernate"):
                raise _Unusable(f"{answer.question} answered with no action")
            return _final(self.name, said.get("time"), action, answer)
        if self._warned:
            return None
        answer = self._get("/latest/meta-data/events/recommendations/rebalance")
        if answer.status == 404:
            return None
        if _moment(answer.json_object().get("noticeTime")) is None:
            raise _Unusable(f"{answer.question} answered with no noticeTime")
        self._warned = True
        return Notice("AWS may soon take this machine (rebalance recommendation)", None, final=False)

    def _get(self, path: str) -> _Answer:
        if time.monotonic() >= self._renew_at:
            self._renew()
        answer = self._ask(path)
        if answer.status == 401:  # a machine that slept has older tokens than its monotonic clock says
            self._renew()
            answer = self._ask(path)
        return answer

    def _ask(self, path: str) -> _Answer:
        return _ask("GET", self._address + path, {"X-aws-ec2-metadata-token": self._token})

    def _renew(self) -> None:
        headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
        answer = _ask("PUT", f"{self._address}/latest/api/token", headers)
        token = answer.text()
        if not re.fullmatch("[!-~]+", token):  # checked here: http.client would quote it in its error
            raise _Unusable(f"{answer.question} answered with no token")
        self._token = token
        self._renew_at = time.monotonic() + TOKEN_SECONDS / 2


class _Gcp:
    name = "GCP"
    hint = "In Kubernetes, rely on SIGTERM"

    def __init__(self, address: str) -> None:
        self._url = f"{address}/computeMetadata/v1/instance/preempted"

    def look(self) -> Notice | None:
        answer = _ask("GET", self._url, {"Metadata-Flavor": "Google"})
        said = answer.text()
        if answer.headers["Metadata-Flavor"] != "Google":  # how Google says to recognise its server
            raise _Unusable(f"{answer.question} answered without Metadata-Flavor: Google")
        if said not in ("TRUE", "FALSE"):
            raise _Unusable(f"{answer.question} answered neither TRUE nor FALSE")
        if said == "FALSE":
            return None
        reason = f"GCP takes this machine within {GCP_LEAD_SECONDS:.0f} s (preempted)"
        return Notice(reason, time.time() + GCP_LEAD_SECONDS, final=True)


class _Azure:
    """Scheduled events, of all machines of a set.

    They are never acknowledged (POST StartRequests): that says "go on", and the machine would go
    before the save is done.
    """

    name = "Azure"
    hint = "Azure's first answer may take two minutes; in Kubernetes, rely on SIGTERM"

    def __init__(self, address: str) -> None:
        self._address = address
        self._own_name = ""

    def look(self) -> Notice | None:
        if not self._own_name:
            answer = self._ask("/metadata/instance/compute/name?api-version=2021-02-01&format=text")
            if not re.fullmatch(r"[\w.-]{1,80}", answer.text()):
                raise _Unusable(f"{answer.question} answered with no name")
            self._own_name = answer.text()
        answer = self._ask("/metadata/scheduledevents?api-version=2020-07-01")
        events = answer.json_object().get("Events")
        if not isinstance(events, list):
            raise _Unusable(f"{answer.question} answered with no list of Events")
        for event in events:
            if self._is_mine(event):
                if event.get("NotBefore") == "":  # it has begun
                    return Notice("Azure takes this machine now (Preempt)", time.time(), final=True)
                return _final(self.name, event.get("NotBefore"), "Preempt", answer)
        return None

    def _is_mine(self, event: Any) -> bool:
        if not isinstance(event, dict) or event.get("EventType") != "Preempt":
            return False
        machines = event.get("Resources")
        if not isinstance(machines, list):
            return False
        return self._own_name.casefold() in [name.casefold() for name in machines if isinstance(name, str)]

    def _ask(self, path: str) -> _Answer:
        return _ask("GET", self._address + path, {"Metadata": "true"})


_ASKED: dict[str, type[_Aws] | type[_Gcp] | type[_Azure]] = {"aws": _Aws, "gcp": _Gcp, "azure": _Azure}


class _Incoming(io.RawIOBase):
    """What a socket receives, up to a deadline and a size.

    A socket's own timeout counts anew with every byte, so a server that sends single bytes would hold us without end.
    """

    def __init__(self, sock: socket.socket, until: float) -> None:
        self._socket = sock
        self._until = until  # as time.monotonic() counts
        self._left_bytes = MOST_BYTES

    def makefile(self, mode: str) -> io.BufferedReader:
        """All that HTTPResponse wants of a socket."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left_seconds = self._until - time.monotonic()
        if left_seconds <= 0:
            raise TimeoutError("timed out")
        self._socket.settimeout(left_seconds)
        num_bytes = self._socket.recv_into(buffer)
        self._left_bytes -= num_bytes
        if self._left_bytes < 0:
            raise ValueError(f"more than {MOST_BYTES} bytes")
        return num_bytes


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme == "http" and bool(parts.hostname) and parts.port != 0 and not re.search(r"\s", url)
    except ValueError:
        return False


def _ask(method: str, url: str, headers: dict[str, str]) -> _Answer:
    """By http.client, which knows no proxies and follows no redirects. Raises _Unusable."""
    until = time.monotonic() + REQUEST_SECONDS
    question = f"{method} {url}"
    try:
        parts = urlsplit(url)
        connection = HTTPConnection(str(parts.hostname), parts.port or 80, timeout=REQUEST_SECONDS)
        try:
            connection.request(method, f"{parts.path}?{parts.query}".rstrip("?"), headers=headers)
            response = HTTPResponse(_Incoming(connection.sock, until), method=method)  # type: ignore[arg-type]
            response.begin()
            body = response.read(MOST_BYTES)
            if response.length:  # http.client raises IncompleteRead only where no size is given
                raise ValueError("the answer is cut off")
            return _Answer(question, response.status, response.headers, body)
        finally:
            connection.close()
    except (OSError, HTTPException, ValueError) as exc:
        raise _Unusable(f"{question}: {type(exc).__name__}: {exc}") from exc


def _final(cloud: str, when: Any, kind: str, answer: _Answer) -> Notice:
    """The time is optional: that the machine goes was clearly said."""
    moment = _moment(when)
    deadline = None if moment is None else _deadline(moment, answer)
    if moment is None or deadline is None:
        return Notice(f"{cloud} takes this machine soon ({kind})", None, final=True)
    return Notice(f"{cloud} takes this machine at {moment:%Y-%m-%dT%H:%M:%SZ} ({kind})", deadline, final=True)


def _deadline(moment: datetime, answer: _Answer) -> float | None:
    """The cloud's moment by this machine's clock, which may be wrong: it is as far off as the answer's Date says.

    None outside the next hour: a deadline long ago or far away misleads more than none.
    """
    there = _moment(answer.headers["Date"])
    lead_seconds = moment.timestamp() - (time.time() if there is None else there.timestamp())
    return time.time() + lead_seconds if 0 <= lead_seconds <= LONGEST_LEAD_SECONDS else None


def _moment(text: Any) -> datetime | None:
    """ISO 8601 (AWS) or RFC 1123 (Azure and Date), in UTC; None if it names no zone: local time would be a guess."""
    if not isinstance(text, str):
        return None
    for parse in (datetime.fromisoformat, parsedate_to_datetime):
        try:
            moment = parse(text)
            if moment.tzinfo is not None:
                return moment.astimezone(UTC)
        except (ValueError, TypeError, IndexError, OverflowError):  # email's parser raises several
            continue
    return None


def _note(cloud: str, hint: str, trouble: Exception) -> str:
    why = " ".join(re.sub("[^!-~]", " ", str(trouble)).split())[:300]  # may quote what a server sent
    return (
        f"note: {cloud} gives no spot notices: {why}. The run keeps asking; until then "
        f"only SIGTERM stops the run before the machine goes. {hint}"
    )
