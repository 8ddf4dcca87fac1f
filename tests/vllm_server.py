"""A server that speaks vLLM's protocol in front of a small model: real tokens, real numbers."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import chat_server
import torch
from chat_server import ChatServer


class VllmServer(ChatServer):
    """`model`: a folder. calls: paths of all methods but completions, as they came.

    faults: of the next completions, as in chat_server. off_by: added to log-probabilities.
    ignores_weights: answers 200 to new weights, and keeps the old.
    """

    def __init__(self, model: str | Path) -> None:
        super().__init__()
        self.RequestHandlerClass = _Handler
        self.start, self.off_by, self.ignores_weights, self.without = str(model), 0.0, False, ""
        self.sampled: list[dict[str, Any]] = []
        self.calls: list[str] = []
        self.asleep = False
        self.stale_cache = False
        self.restart()

    def restart(self) -> None:
        """Forget all that was loaded since the start."""
        self.weights, self.adapters = _loaded(self.start), {}
        self.asleep = False

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        url = urlsplit(path)
        query = parse_qs(url.query)
        if url.path == "/v1/completions":
            return self._completions(body)
        self.calls.append(path)
        method = getattr(self, f"_{url.path.removeprefix('/v1').strip('/')}", None)
        if method is None:
            return 404, {"error": {"message": "Not Found"}}
        return method(body, query)  # type: ignore[no-any-return]

    # ------------------------------------------------------------------------------ methods

    def _load_lora_adapter(self, body: dict[str, Any], query: Any) -> tuple[int, Any]:
        name = body["lora_name"]
        if name in self.adapters:
            return 400, {"error": {"message": f"The lora adapter '{name}' has already been loaded"}}
        if not Path(body["lora_path"], "adapter_config.json").exists():
            return 404, {"error": {"message": f"No adapter found for {body['lora_path']}"}}
        from peft import PeftModel

        model = _loaded(self.start)
        if not self.ignores_weights:
            model = PeftModel.from_pretrained(model, body["lora_path"]).eval()
        self.adapters[name] = model
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def _unload_lora_adapter(self, body: dict[str, Any], query: Any) -> tuple[int, Any]:
        if self.adapters.pop(body["lora_name"], None) is None:
            return 404, {"error": {"message": "The lora adapter cannot be found"}}
        return 200, "Success: LoRA adapter removed successfully."

    def _collective_rpc(self, body: dict[str, Any], query: Any) -> tuple[int, Any]:
        assert body["method"] == "reload_weights"
        if not self.ignores_weights:
            self.weights = _loaded(body["kwargs"]["weights_path"])
        self.stale_cache = True
        return 200, {"results": [None]}

    def _reset_prefix_cache(self, body: dict[str, Any], query: Any) -> tuple[int, Any]:
        self.stale_cache = False
        return 200, None

    def _sleep(self, body: dict[str, Any], query: dict[str, list[str]]) -> tuple[int, Any]:
        self.asleep = True
        if query["level"] == ["2"]:
            self.weights = None
        return 200, None

    def _wake_up(self, body: dict[str, Any], query: dict[str, list[str]]) -> tuple[int, Any]:
        if query.get("tags") != ["weights"]:
            self.asleep = False
        return 200, None

    def _completions(self, body: dict[str, Any]) -> tuple[int, Any]:
        model = self.adapters.get(body["model"], self.weights)
        if body["model"] not in (*self.adapters, "policy"):
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        assert not self.asleep, "asked while asleep"
        assert not self.stale_cache, "keys and values of earlier weights"
        assert (body["top_p"], body["top_k"], body["min_p"]) == (1.0, -1, 0.0)
        with self.lock:  # the generator is the process's
            self.sampled.append(body)
            choices = [self._choice(model, body, place) for place in range(body["n"])]
        return 200, {"choices": choices}

    @torch.no_grad()
    def _choice(self, model: Any, body: dict[str, Any], place: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(body["seed"] + place)
        ids, logprobs, reason = list(body["prompt"]), [], "length"
        start = len(ids)
        while len(ids) - start < body["max_tokens"]:
            logits = model(torch.tensor([ids])).logits[0, -1].float()
            chances = (logits / body["temperature"]).log_softmax(-1)
            token = int(torch.multinomial(chances.exp(), 1, generator=generator))
            ids.append(token)
            logprobs.append(float(chances[token]) + self.off_by)
            if token in body["stop_token_ids"]:
                reason = "stop"
                break
        found = {"token_ids": ids[start:], "logprobs": {"token_logprobs": logprobs},
                 "finish_reason": reason, "text": ""}  # fmt: skip
        return {name: value for name, value in found.items() if name != self.without}


def _loaded(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


class _Handler(chat_server._Handler):
    server: VllmServer

    def do_POST(self) -> None:
        body = self._body()
        server = self.server
        with server.lock:
            server.tries += 1
            server.keys.append(self.headers["Authorization"])
            is_asked = self.path.startswith("/v1/completions")
            fault = server.faults.pop(0) if server.faults and is_asked else ""
        if fault:
            self._misbehave(fault, body)
            return
        status, values = server.post(self.path, body)
        if isinstance(values, str):
            self._raw(status, values.encode(), "text/plain")
        else:
            self._send(status, values)

    def _answer(self, body: dict[str, Any]) -> None:
        """Answer after a slow fault."""
        self._send(*self.server.post(self.path, body))


@contextlib.contextmanager
def running(model: str | Path) -> Iterator[VllmServer]:
    with chat_server.serving(VllmServer(model)) as server:
        yield server
