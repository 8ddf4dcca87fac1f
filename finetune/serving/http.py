"""A small HTTP server for one user: JSON in, JSON or events out, closed to other web pages.

A page of another site could send requests to a server on this machine through the user's browser.
So a server on loopback refuses a Host that is not loopback (a name that an attacker points at
127.0.0.1), and every server refuses an Origin that is not its own.
"""

import ipaddress
import json
import select
import socket
import sys
import traceback
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from finetune import failures
from finetune.errors import UserError

MOST_BYTES = 16 << 20  # of a request
IDLE_SECONDS = 60.0  # after which a connection that sends or takes nothing is closed


class Rejected(Exception):
    """A request is wrong. param: the field, if one is; code: a word for programs."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


class Gone(Exception):
    """The client has closed the connection."""


class Server(ThreadingHTTPServer):
    """`owner`: what the handlers of requests work with."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type["Handler"], owner: Any) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self.owner = owner
        self.is_loopback = is_loopback(address[0])
        super().__init__(address, handler)

    @property
    def url(self) -> str:
        host, port = str(self.server_address[0]), self.server_address[1]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Do nothing: `Handler` answers errors, and what is left is a client that has gone."""

    def run(self) -> None:
        """Serve until Ctrl-C."""
        try:
            self.serve_forever()
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
        finally:
            self.server_close()


def is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int, handler: type["Handler"], owner: Any) -> Server:
    """Return a server that listens. Raises UserError if it cannot."""
    try:
        return Server((host, port), handler, owner)
    except OSError as exc:
        what = f"--host {host} --port {port}: cannot listen here ({exc.strerror or exc})"
        raise UserError(f"{what}; choose another --port, or 0 for any that is free") from exc
    except OverflowError as exc:
        raise UserError(f"--port {port}: should be from 0 to 65535") from exc


class Handler(BaseHTTPRequestHandler):
    """Answers requests by `get` and `post`; wrong ones with the JSON of `error`."""

    protocol_version = "HTTP/1.1"
    timeout = IDLE_SECONDS
    server: Server

    def get(self, path: str) -> None:
        raise NotImplementedError

    def post(self, path: str, values: dict[str, Any]) -> None:
        raise NotImplementedError

    def error(self, status: int, message: str, param: str | None, code: str | None) -> Any:
        """Return the JSON of an error, as OpenAI's."""
        kind = "invalid_request_error" if status < 500 else "server_error"
        return {"error": {"message": message, "type": kind, "param": param, "code": code}}

    # ---------------------------------------------------------------------------- requests

    def do_GET(self) -> None:
        self._answered(lambda: self.get(urlsplit(self.path).path))

    def do_POST(self) -> None:
        self._answered(lambda: self.post(urlsplit(self.path).path, self._values()))

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: requests hold what users write."""

    def _answered(self, answer: Any) -> None:
        self.has_begun = False
        try:
            self._require_own_page()
            answer()
        except Rejected as exc:
            self._fail(exc.status, exc.message, exc.param, exc.code)
        except UserError as exc:
            self._fail(400, str(exc))
        except (Gone, ConnectionError, TimeoutError):
            self.close_connection = True
        except Exception as exc:  # the server goes on for the next request
            error = failures.translate(exc)
            if error is None:
                traceback.print_exc()
            self._fail(500, str(error or f"{type(exc).__name__}; see the server's terminal"))

    def _fail(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        values = self.error(status, message, param, code)
        self.close_connection = True  # the body of the request may be unread
        try:
            if self.has_begun:
                self.event(values)
            else:
                self.send(status, values)
        except (Gone, OSError):
            return

    def _require_own_page(self) -> None:
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if self.server.is_loopback and not is_loopback(_name(host)):
            what = f"Host is {host!r}, and this server answers only on this machine"
            raise Rejected(403, f"{what}; ask {self.server.url}")
        if origin is not None and origin.partition("://")[2] != host:
            raise Rejected(403, f"pages of {origin} may not ask this server")

    def _values(self) -> dict[str, Any]:
        """Return the JSON object of a request."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise Rejected(411, "Content-Length is missing; send the size of the body")
        # Python reads no number of thousands of digits.
        if len(length) > len(str(MOST_BYTES)) or int(length) > MOST_BYTES:
            raise Rejected(413, f"the body is larger than {MOST_BYTES >> 20} MiB")
        kind = self.headers.get_content_type()
        if kind != "application/json":  # what a form of another page can send without a question
            raise Rejected(415, f"Content-Type is {kind}; send application/json")
        data = self.rfile.read(int(length))
        try:
            values = json.loads(data)
        except (ValueError, RecursionError) as exc:
            raise Rejected(400, f"the body is not JSON: {failures.parsing_reason(exc)}") from exc
        if not isinstance(values, dict):
            raise Rejected(400, f"the body should be a JSON object, got {type(values).__name__}")
        return values

    # ----------------------------------------------------------------------------- answers

    def send(
        self, status: int, values: Any, kind: str = "application/json",
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        """Send JSON, or text of another kind."""
        data = (values if kind != "application/json" else json.dumps(values)).encode()
        self._head(status, kind, {"Content-Length": str(len(data)), **headers})
        self._write(data)

    def begin_events(self) -> None:
        """Begin a stream of server-sent events, which ends with the connection."""
        self.close_connection = True
        self.has_begun = True
        headers = {"Cache-Control": "no-cache", "Connection": "close"}
        self._head(200, "text/event-stream; charset=utf-8", headers)

    def event(self, values: Any) -> None:
        text = values if isinstance(values, str) else json.dumps(values)
        self._write(f"data: {text}\n\n".encode())

    def has_left(self) -> bool:
        """Return whether the client has closed the connection."""
        try:
            is_readable, _, _ = select.select([self.connection], [], [], 0)
            return bool(is_readable) and self.connection.recv(1, socket.MSG_PEEK) == b""
        except (OSError, ValueError):
            return True

    def _head(self, status: int, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in {**headers, "X-Content-Type-Options": "nosniff"}.items():
            self.send_header(name, value)
        if self.close_connection and "Connection" not in headers:
            self.send_header("Connection", "close")
        self.end_headers()

    def _write(self, data: bytes) -> None:
        try:
            self.wfile.write(data)
            self.wfile.flush()
        except (OSError, ValueError) as exc:
            raise Gone from exc


def _name(host: str) -> str:
    """Return the name of a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
