"""Ask the cloud's metadata service whether it is about to take this spot machine away.

This helps on plain machines, where SIGTERM comes late or not at all. The run never waits for it: a
daemon thread asks, and is abandoned if the service hangs. Invalid answers do not count as notices.
"""

import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import Any

from finetune.errors import ConfigError

CLOUDS = ("aws", "gcp", "azure")
ADDRESS = "http://169.254.169.254"  # of all three
IS_ADDRESS = re.compile(r"http://([\w.-]+|\[[0-9a-fA-F:]+\])(:\d{1,5})?/?")
REQUEST_SECONDS = 2.0
MOST_BYTES = 64 * 1024
TOKEN_SECONDS = 6 * 3600  # the most that AWS allows
GCP_LEAD_SECONDS = 30.0
LONGEST_LEAD_SECONDS = 3600.0  # clouds give seconds to minutes: more is a mistake
FAILURES_BEFORE_A_NOTE = 3  # do not report one hiccup in a week
# A proxy in the environment cannot reach the link-local address.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Notice:
    """`deadline`: when the machine goes, as in time.time(); None without a valid time."""

    reason: str
    deadline: float | None
    final: bool  # False: only a warning (AWS's rebalance recommendation): save, and go on


class Watch:
    """Ask one cloud every few seconds in a daemon thread, which never raises.

    `heard` gets the warning and the final notice once each; then the thread ends. `log` gets one
    line if the cloud cannot be asked. The thread calls both; they must not raise.
    """

    def __init__(
        self,
        cloud: str,
        heard: Callable[[Notice], None],
        log: Callable[[str], None],
        every_seconds: float = 5.0,
    ) -> None:
        """FINETUNE_METADATA_ADDRESS (http://host:port) sets another address. Raises ConfigError."""
        address = os.environ.get("FINETUNE_METADATA_ADDRESS") or ADDRESS
        if not IS_ADDRESS.fullmatch(address):
            raise ConfigError(
                f"FINETUNE_METADATA_ADDRESS: {address} is not an address; write http://host:port"
            )
        self._cloud = _SERVICES[cloud](address.rstrip("/"))
        self._heard = heard
        self._log = log
        self._every_seconds = every_seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="notices", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ignore the answer to a pending request."""
        self._stopped.set()

    def _run(self) -> None:
        num_failures, has_logged = 0, False
        while not self._stopped.is_set():
            notice = None
            try:
                notice = self._cloud.poll()
                num_failures = 0
            except Exception as exc:  # a failing service must not end the run
                num_failures += 1
                if num_failures == FAILURES_BEFORE_A_NOTE and not has_logged:
                    has_logged = True
                    self._log(self._cloud.note(exc))
            if notice is not None and not self._stopped.is_set():
                self._heard(notice)
                if notice.final:
                    return
            self._stopped.wait(self._every_seconds)


class _Service:
    """One cloud's metadata service; `poll` may raise any exception for an unusable answer."""

    name: str
    hint: str
    poll: Callable[[], Notice | None]

    def __init__(self, address: str) -> None:
        self._address = address
        self._question = ""

    def note(self, exc: Exception) -> str:
        """Return one line about a failing service; its answer is cut and made printable."""
        why = re.sub("[^ -~]+", " ", f"{self._question}: {type(exc).__name__}: {exc}")[:300]
        return (
            f"note: {self.name} gives no spot notices: {why}. The run keeps asking; "
            f"until then only SIGTERM stops the run before the machine goes. {self.hint}"
        )

    def _ask(self, path: str, headers: dict[str, str], method: str = "GET") -> tuple[str, Message]:
        """Return body and headers of an answer. Raises HTTPError for a status that is not 2xx."""
        self._question = f"{method} {self._address}{path}"
        request = urllib.request.Request(self._address + path, headers=headers, method=method)
        with _OPENER.open(request, timeout=REQUEST_SECONDS) as response:
            return response.read(MOST_BYTES).decode().strip(), response.headers

    def _final(self, moment: float | None, kind: str) -> Notice:
        """Return a final notice, without the time if it is invalid: the machine goes anyway."""
        if moment is None or not 0 <= moment - time.time() <= LONGEST_LEAD_SECONDS:
            return Notice(f"{self.name} takes this machine soon ({kind})", None, final=True)
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))
        return Notice(f"{self.name} takes this machine at {when} ({kind})", moment, final=True)


class _Aws(_Service):
    """IMDSv2: get a token, then ask; 404 means no notice so far."""

    name = "AWS"
    hint = "From a container, IMDSv2's hop limit of 1 is the usual reason: rely on SIGTERM there"
    _token = ""
    _has_warned = False

    def poll(self) -> Notice | None:
        action = self._get("/latest/meta-data/spot/instance-action")
        if action is not None:
            if action["action"] not in ("terminate", "stop", "hibernate"):
                raise ValueError(f"action is {action['action']!r}")
            return self._final(
                _moment(datetime.fromisoformat, action.get("time")), action["action"]
            )
        rebalance = "/latest/meta-data/events/recommendations/rebalance"
        if self._has_warned or self._get(rebalance) is None:
            return None
        self._has_warned = True
        return Notice(
            "AWS may soon take this machine (rebalance recommendation)", None, final=False
        )

    def _get(self, path: str) -> dict[str, Any] | None:
        if not self._token:
            ttl = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
            self._token, _ = self._ask("/latest/api/token", ttl, "PUT")
        try:
            return dict(json.loads(self._ask(path, {"X-aws-ec2-metadata-token": self._token})[0]))
        except urllib.error.HTTPError as exc:
            if exc.code == 404:
                return None
            self._token = ""  # it may have expired: the next poll asks for another
            raise


class _Gcp(_Service):
    name = "GCP"
    hint = "In Kubernetes, rely on SIGTERM"

    def poll(self) -> Notice | None:
        answer, headers = self._ask(
            "/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"}
        )
        if headers["Metadata-Flavor"] != "Google":  # how Google says to recognise its server
            raise ValueError("an answer without Metadata-Flavor: Google")
        if answer not in ("TRUE", "FALSE"):
            raise ValueError("neither TRUE nor FALSE")
        if answer == "FALSE":
            return None
        reason = f"GCP takes this machine within {GCP_LEAD_SECONDS:.0f} s (preempted)"
        return Notice(reason, time.time() + GCP_LEAD_SECONDS, final=True)


class _Azure(_Service):
    """Scheduled events of all machines in a set.

    The run never acknowledges them (POST StartRequests): Azure would take the machine at once,
    before the save ends.
    """

    name = "Azure"
    hint = "Azure's first answer may take two minutes; in Kubernetes, rely on SIGTERM"
    _own_name = ""

    def poll(self) -> Notice | None:
        if not self._own_name:
            path = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
            self._own_name = self._ask(path, {"Metadata": "true"})[0].casefold()
        found = json.loads(
            self._ask("/metadata/scheduledevents?api-version=2020-07-01", {"Metadata": "true"})[0]
        )
        for event in found["Events"]:
            mine = self._own_name in [str(machine).casefold() for machine in event["Resources"]]
            if mine and event["EventType"] == "Preempt":
                if not event["NotBefore"]:  # it has begun
                    return Notice("Azure takes this machine now (Preempt)", time.time(), final=True)
                return self._final(_moment(parsedate_to_datetime, event["NotBefore"]), "Preempt")
        return None


_SERVICES: dict[str, type[_Service]] = {"aws": _Aws, "gcp": _Gcp, "azure": _Azure}


def _moment(parse: Callable[[str], datetime], text: Any) -> float | None:
    """Parse a time to seconds as in time.time(); None without a zone: local time is a guess."""
    try:
        moment = parse(text)
        return None if moment.tzinfo is None else moment.timestamp()
    except Exception:
        return None
