"""A local server with the Hub's methods for models, and what a user sets to reach it."""

import base64
import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from chat_server import serving

TOKEN = "hf_" + "aSecretThatNoLogMayShow"
LARGE = (".safetensors", ".gguf", ".json")  # .json too: small files then go both ways


class HubServer(ThreadingHTTPServer):
    """`faults`: statuses of the next uploads of a large file; "cut" closes the connection."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.is_private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.tokens: set[str | None] = set()
        self.faults: list[str] = []
        self.changes: dict[str, bytes] = {}
        """Files that the server lists otherwise than they were sent."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that the test cuts."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, values: Any, status: int = 200) -> None:
        data = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _known(self) -> bool:
        given = self.headers.get("Authorization")
        self.server.tokens.add(given)
        if given != f"Bearer {TOKEN}":
            self._send({"error": f"Invalid token {given}"}, 401)
            return False
        return True

    def do_GET(self) -> None:
        if not self._known():
            return
        name = re.match(r"/api/models/([^/]+/[^/?]+)", self.path)
        held = self.server.repos.get(name[1]) if name else None
        if name is None or held is None:
            self._send({"error": "Repository not found"}, 404)
        elif "/tree/" in self.path:
            held = {**held, **self.server.changes}
            self._send([_entry(path, data) for path, data in held.items()])
        else:
            siblings = [{"rfilename": path} for path in held]
            private = self.server.is_private[name[1]]
            self._send({"id": name[1], "private": private, "siblings": siblings})

    def do_POST(self) -> None:
        body = self._body()
        if not self._known():
            return
        server = self.server
        if self.path == "/api/validate-yaml":
            self._send({"errors": [], "warnings": []})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in server.repos:
                self._send(
                    {"error": "You already created this", "url": f"{server.url}/{name}"}, 409
                )
                return
            server.repos[name] = {}
            server.is_private[name] = bool(
                asked.get("private") or asked.get("visibility") == "private"
            )
            self._send({"url": f"{server.url}/{name}"})
        elif "/preupload/" in self.path:
            files = [
                {
                    "path": each["path"], "shouldIgnore": False,
                    "uploadMode": "lfs" if each["path"].endswith(LARGE) else "regular",
                }
                for each in json.loads(body)["files"]
            ]  # fmt: skip
            self._send({"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            self._send(
                {
                    "transfer": "basic",
                    "objects": list(map(self._object, json.loads(body)["objects"])),
                }
            )
        elif "/commit/" in self.path:
            name = self.path.split("/commit/")[0].removeprefix("/api/models/")
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    server.repos[name][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    server.repos[name][value["path"]] = server.objects[value["oid"]]
            oid = "0" * 40
            self._send(
                {
                    "commitUrl": f"{server.url}/{name}/commit/{oid}",
                    "commitOid": oid,
                    "success": True,
                }
            )
        else:
            self._send({}, 404)

    def _object(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Ask for what is not there yet, as LFS does."""
        is_there = asked["oid"] in self.server.objects
        href = {"upload": {"href": f"{self.server.url}/lfs/{asked['oid']}"}}
        return {**asked, **({} if is_there else {"actions": href})}

    def do_PUT(self) -> None:
        data = self._body()
        fault = self.server.faults.pop(0) if self.server.faults else ""
        if fault == "cut":
            self.close_connection = True
            return
        if fault:
            self._send({"error": f"fault {fault}"}, int(fault))
            return
        self.server.uploads.append(self.path.rpartition("/")[2])
        self.server.objects[hashlib.sha256(data).hexdigest()] = data
        self._send({})


def _entry(path: str, data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": "1" * 40}
    if path.endswith(LARGE):
        lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        found["lfs"] = lfs
    return found


@contextlib.contextmanager
def running(patch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Run a server, and let huggingface_hub ask it with a token."""
    import huggingface_hub
    from huggingface_hub import constants

    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setenv("HF_TOKEN", TOKEN)
    with serving(HubServer()) as server:
        patch.setattr(constants, "ENDPOINT", server.url)
        huggingface_hub.close_session()
        try:
            yield server
        finally:
            huggingface_hub.close_session()
