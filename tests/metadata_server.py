"""One server that speaks as the metadata services of AWS, GCP and Azure do, as a test asks."""

import json
import threading
import time
from collections import defaultdict
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "/latest/api/token"
ACTION = "/latest/meta-data/spot/instance-action"
REBALANCE = "/latest/meta-data/events/recommendations/rebalance"
PREEMPTED = "/computeMetadata/v1/instance/preempted"
EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
ASKED_FOR = {"aws": ACTION, "gcp": PREEMPTED, "azure": EVENTS}

NOTHING = (404, "<html>404 - Not Found</html>")
QUIET = {
    "aws": NOTHING,
    "gcp": (200, "FALSE"),
    "azure": (200, {"DocumentIncarnation": 1, "Events": []}),
}
REBALANCED = (200, {"noticeTime": "2026-11-21T11:45:00Z"})


def preempt(*machines, **changes):
    event = {
        "EventId": "602d9444", "EventType": "Preempt", "EventStatus": "Scheduled",
        "Resources": list(machines), "NotBefore": "",
    }  # fmt: skip
    return {"DocumentIncarnation": 2, "Events": [event | changes]}


def final(cloud):
    """The answer of a cloud that takes this machine in two minutes, and its reason."""
    at = time.time() + 120
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
    return {
        "aws": (
            (200, {"action": "terminate", "time": stamp}),
            f"AWS takes this machine at {stamp} (terminate)",
        ),
        "gcp": ((200, "TRUE"), "GCP takes this machine within 30 s (preempted)"),
        "azure": (
            (200, preempt("vmss_3", NotBefore=formatdate(at, usegmt=True))),
            f"Azure takes this machine at {stamp} (Preempt)",
        ),
    }[cloud]


class Handler(BaseHTTPRequestHandler):
    """Refuses what the clouds refuse, otherwise sends the answers of the test."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer in two writes takes 40 ms

    def do_GET(self):
        self.server.asked.append((self.command, self.path))
        answer = self.server.next_answer(self.path)
        if callable(answer):
            self.close_connection = True
            answer(self)
        else:
            self.reply(*(self.refusal() or answer))

    do_PUT = do_POST = do_GET

    def refusal(self):
        if self.path == TOKEN:
            right = (
                self.command == "PUT"
                and int(self.headers["X-aws-ec2-metadata-token-ttl-seconds"]) <= 21600
            )
            return None if right else (400, "")
        if self.path.startswith("/latest/"):
            return (
                None
                if self.headers["X-aws-ec2-metadata-token"] in self.server.tokens
                else (401, "")
            )
        if self.path.startswith("/computeMetadata/"):
            return None if self.headers["Metadata-Flavor"] == "Google" else (403, "")
        return None if self.headers["Metadata"] == "true" else (400, "")

    def reply(self, status, body, headers=None):
        if self.path == TOKEN and status == 200:
            self.server.tokens.append(body)
        if not isinstance(body, bytes):
            body = (body if isinstance(body, str) else json.dumps(body)).encode()
        head = {"Content-Length": len(body)} | (
            {"Metadata-Flavor": "Google"} if self.path == PREEMPTED else {}
        )
        self.send_response_only(status)
        for name, value in (head | (headers or {})).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


class Metadata(ThreadingHTTPServer):
    """Serves the paths of all three clouds, without notices until a test sets answers."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.tokens, self.over = [], [], threading.Event()
        self.answers = defaultdict(list)
        self.says(NAME, (200, "Vmss_3"))
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=[0.002], daemon=True).start()

    def says(self, path, *answers):
        """Answer one after another, repeating the last: (status, body, headers), or a function."""
        self.answers[path] = list(answers)

    def next_answer(self, path):
        mine = self.answers[path]
        if mine:
            return mine.pop(0) if len(mine) > 1 else mine[0]
        if path == TOKEN:
            return 200, f"token{len(self.tokens)}=="
        return {PREEMPTED: QUIET["gcp"], EVENTS: QUIET["azure"]}.get(path, NOTHING)

    def num_asked(self, path):
        return sum(asked == path for _, asked in self.asked)

    def close(self):
        self.over.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """A client that hangs up early is what some tests want."""
