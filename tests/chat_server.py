"""A local server with OpenAI's methods that answers by rule, and misbehaves when asked to."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PAGE = b"<!DOCTYPE html><html><title>Sign in</title></html>"


def echoed(body: dict[str, Any]) -> str:
    """Answer with the last message, or the prompt."""
    return "re: " + str(body["messages"][-1]["content"] if "messages" in body else body["prompt"])


class ChatServer(ThreadingHTTPServer):
    """`faults`: what happens to the next requests, such as "429", "cut" or "html"."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, answer: Callable[[dict[str, Any]], Any] = echoed) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.faults: list[str] = []
        self.seen: list[dict[str, Any]] = []
        """Bodies of the requests that were answered."""
        self.keys: list[str | None] = []
        self.times: list[float] = []
        self.tries = 0
        self.in_flight = self.most_in_flight = 0
        self.delay: Callable[[dict[str, Any]], float] = lambda body: 0.0
        self.usage: dict[str, int] | None = {"prompt_tokens": 10, "completion_tokens": 5}
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has left is what tests provoke."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ChatServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path != "/v1/models":
            self._raw(404, b"404 page not found", "text/plain")
            return
        self._send(200, {"data": [{"id": "good-model"}, {"id": "other-model"}]})

    def _body(self) -> Any:
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

    def do_POST(self) -> None:
        server = self.server
        body = self._body()
        with server.lock:
            server.tries += 1
            server.times.append(time.monotonic())
            server.keys.append(self.headers["Authorization"])
            fault = server.faults.pop(0) if server.faults else ""
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
        try:
            if not self.path.startswith("/v1/"):
                self._raw(404, b"404 page not found", "text/plain")
            elif fault:
                self._misbehave(fault, body)
            else:
                time.sleep(server.delay(body))
                self._answer(body)
        finally:
            with server.lock:
                server.in_flight -= 1

    def _answer(self, body: dict[str, Any]) -> None:
        if body["model"] == "wrong-model":
            error = {"message": "The model does not exist", "code": "model_not_found"}
            self._send(404, {"error": error})
            return
        text = self.server.answer(body)
        with self.server.lock:
            self.server.seen.append(body)
        whole = text if isinstance(text, dict) else reply(body, text, self.server.usage)
        self._send(200, whole)

    def _misbehave(self, fault: str, body: dict[str, Any]) -> None:
        kind, _, more = fault.partition(" ")
        if kind.isdigit():
            headers = {"Retry-After": more} if more else {}
            self._send(int(kind), {"error": {"message": f"fault {kind}", "code": None}}, headers)
        elif kind == "raw":
            self._raw(200, more.encode(), "application/json")
        elif kind == "html":
            self._raw(int(more or 200), PAGE, "text/html")
        elif kind == "cut":  # the length is that of the whole body
            whole = json.dumps(reply(body, "never", None)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(whole)))
            self.end_headers()
            self.wfile.write(whole[:20])
            self.close_connection = True
        elif kind == "reset":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif kind == "slow":
            time.sleep(float(more))
            self._answer(body)
        elif kind == "drip":  # a byte at a time never lets a read time out
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b" ")
                time.sleep(float(more))
        elif kind == "redirect":
            self._send(307, {}, {"Location": more})
        elif kind == "quota":
            self._send(429, {"error": {"message": "no money", "code": "insufficient_quota"}})
        elif kind == "key":
            what = f"Incorrect API key provided: {(self.headers['Authorization'] or '')[7:]}"
            self._send(401, {"error": {"message": what}})

    def _send(self, status: int, values: Any, headers: dict[str, str] | None = None) -> None:
        self._raw(status, json.dumps(values).encode(), "application/json", headers)

    def _raw(
        self, status: int, data: bytes, kind: str, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def reply(body: dict[str, Any], text: str, usage: dict[str, int] | None) -> dict[str, Any]:
    """Return an answer in the shape of the method that `body` asks."""
    choice: dict[str, Any] = {"finish_reason": "stop"}
    if "messages" in body:
        choice["message"] = {"role": "assistant", "content": text}
        if body.get("logprobs"):
            top = [{"token": "a", "logprob": -0.1}, {"token": "b", "logprob": -2.5}]
            choice["logprobs"] = {"content": [{"token": "a", "top_logprobs": top}]}
    else:
        choice["text"] = text
        if body.get("logprobs"):
            choice["logprobs"] = {"top_logprobs": [{"a": -0.1, "b": -2.5}]}
    return {"choices": [choice]} | ({"usage": usage} if usage else {})


@contextlib.contextmanager
def serving(server: Any) -> Iterator[Any]:
    """Serve in a thread; yield the server."""
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def running(**options: Any) -> contextlib.AbstractContextManager[ChatServer]:
    return serving(ChatServer(**options))
