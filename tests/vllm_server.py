"""A server that speaks vLLM's protocol in front of a small model: real tokens, real numbers.

Paths, fields and messages are those of vLLM 0.33.0: vllm/entrypoints/serve/lora, .../dev/sleep,
.../dev/cache, .../dev/rpc, vllm/entrypoints/openai/completion and .../models.
"""

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
    ignores_weights: answers 200 to new weights, and keeps the old. is_busy: other requests hold
    blocks of the cache, so that it cannot be emptied. max_rank: of adapters.
    """

    def __init__(self, model: str | Path) -> None:
        super().__init__()
        self.RequestHandlerClass = _Handler
        self.start, self.off_by, self.ignores_weights, self.without = str(model), 0.0, False, ""
        self.sampled: list[dict[str, Any]] = []
        self.calls: list[str] = []
        self.asleep = False
        self.stale_cache = self.is_busy = False
        self.max_rank = 512
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
            return 404, {"detail": "Not Found"}
        return method(body, query)  # type: ignore[no-any-return]

    # ------------------------------------------------------------------------------ methods

    def _load_lora_adapter(self, body: dict[str, Any], query: Any) -> tuple[int, Any]:
        name = body["lora_name"]
        if name in self.adapters:
            return _error(
                400, f"The lora adapter '{name}' has already been loaded. If you want to load the "
                "adapter in place, set 'load_inplace' to True.", "InvalidUserInput"
            )  # fmt: skip
        if not Path(body["lora_path"], "adapter_config.json").exists():
            what = f"Loading lora {name} failed: No adapter found for {body['lora_path']}"
            return _error(404, what, "NotFoundError")
        from peft import PeftConfig, PeftModel

        if (rank := PeftConfig.from_pretrained(body["lora_path"]).r) > self.max_rank:
            what = f"LoRA rank {rank} is greater than max_lora_rank {self.max_rank}."
            return _error(500, f"Call to add_lora method failed: {what}", "InternalServerError")
        model = _loaded(self.start)
        if not self.ignores_weights:
            model = PeftModel.from_pretrained(model, body["lora_path"]).eval()
        self.adapters[name] = model
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def _unload_lora_adapter(self, body: dict[str, Any], query: Any) -> tuple[int, Any]:
        name = body["lora_name"]
        if self.adapters.pop(name, None) is None:
            return _error(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
        return 200, f"Success: LoRA adapter '{name}' removed successfully."

    def _collective_rpc(self, body: dict[str, Any], query: Any) -> tuple[int, Any]:
        assert body["method"] == "reload_weights"
        if not self.ignores_weights:
            self.weights = _loaded(body["kwargs"]["weights_path"])
        self.stale_cache = True
        return 200, {"results": [None]}

    def _reset_prefix_cache(self, body: dict[str, Any], query: Any) -> tuple[int, Any]:
        self.stale_cache = self.is_busy
        return 200, {"success": not self.is_busy}

    def _sleep(self, body: dict[str, Any], query: dict[str, list[str]]) -> tuple[int, Any]:
        self.asleep = True
        [level] = query["level"]
        if level == "2":
            self.weights = None
        return 200, {"status": "sleeping", "level": int(level)}

    def _wake_up(self, body: dict[str, Any], query: dict[str, list[str]]) -> tuple[int, Any]:
        tags = query.get("tags")
        if tags != ["weights"]:
            self.asleep = False
        return 200, {"status": "sleeping" if self.asleep else "awake", "tags": tags}

    def _completions(self, body: dict[str, Any]) -> tuple[int, Any]:
        model = self.adapters.get(body["model"], self.weights)
        if body["model"] not in (*self.adapters, "policy"):
            what = f"The model `{body['model']}` does not exist."
            return _error(404, what, "NotFoundError", "model")
        if not 0 <= (temperature := body["temperature"]) <= 2:
            what = f"temperature must be in [0, 2], got {temperature}."
            return _error(400, what, "BadRequestError", "temperature")
        assert not self.asleep, "asked while asleep"
        assert not self.stale_cache, "keys and values of earlier weights"
        assert (body["top_p"], body["top_k"], body["min_p"]) == (1.0, -1, 0.0)
        with self.lock:  # the generator is the process's
            self.sampled.append(body)
            choices = [self._choice(model, body, place) for place in range(body["n"])]
        number = sum(len(each.get("token_ids", ())) for each in choices)
        usage = {
            "prompt_tokens": len(body["prompt"]), "completion_tokens": number,
            "total_tokens": len(body["prompt"]) + number,
        }  # fmt: skip
        return 200, {
            "id": f"cmpl-{len(self.sampled)}", "object": "text_completion", "created": 0,
            "model": body["model"], "choices": choices, "usage": usage,
        }  # fmt: skip

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
        words = [f"token_id:{each}" for each in ids[start:]]
        found = {
            "index": place, "text": "", "finish_reason": reason,
            "stop_reason": ids[-1] if reason == "stop" else None,
            "logprobs": {
                "text_offset": [0] * len(words), "token_logprobs": logprobs, "tokens": words,
                "top_logprobs": [{word: each} for word, each in zip(words, logprobs)],
            },
            "token_ids": ids[start:], "prompt_token_ids": body["prompt"], "prompt_logprobs": None,
        }  # fmt: skip
        return {name: value for name, value in found.items() if name != self.without}


def _error(status: int, message: str, kind: str, of: str | None = None) -> tuple[int, Any]:
    return status, {"error": {"message": message, "type": kind, "param": of, "code": status}}


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
