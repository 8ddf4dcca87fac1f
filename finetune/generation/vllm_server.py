"""A vLLM server that samples for training: tokens in, tokens out, and weights that are replaced.

    with Client(Server(url, model)) as client:
        server = VllmServer(client)
        server.load_adapter("step-8", folder)
        server.sample(ids, count=8, max_new_tokens=512, temperature=1.0, seed=1, ends={2})

Its methods as the sources of vLLM 0.33.0 have them: completions with `return_token_ids`; adapters,
with VLLM_ALLOW_RUNTIME_LORA_UPDATING; sleep, wake_up, collective_rpc and reset_prefix_cache, with
VLLM_SERVER_DEV_MODE.
"""

from collections.abc import Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.places import short
from finetune.endpoint import WRONG_SHAPE, Client, Refused
from finetune.errors import Outage, UserError
from finetune.generation.completions import FinishReason

# A server takes others from the model's generation_config.json, and samples by these.
ONLY_TEMPERATURE = {
    "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}  # fmt: skip

ENDED = ("stop", "length")
"""How a completion ends; by `abort` where another client lets the server sleep, for one."""
LOADED, OF_LORA = "has already been loaded", "LoRA"
OF_ADAPTERS = (
    "start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, with a "
    "--max-lora-rank of at least adapter.r, where it sees the run directory"
)
OF_WEIGHTS = "start vLLM with VLLM_SERVER_DEV_MODE=1, where it sees the run directory"
OF_SLEEP = "start vLLM with VLLM_SERVER_DEV_MODE=1 and --enable-sleep-mode"


@dataclass(frozen=True)
class Sampled:
    """A completion as tokens. ids: with the one that ended it. logprobs: float32 [ids]."""

    ids: tuple[int, ...]
    logprobs: np.ndarray
    finish_reason: FinishReason


class VllmServer:
    """`model`: the name that is asked; an adapter's while one is loaded."""

    def __init__(self, client: Client) -> None:
        self._client, self.model = client, client.server.model
        self.adapter: str | None = None
        """The one that is loaded."""

    @property
    def url(self) -> str:
        return self._client.server.url

    # ------------------------------------------------------------------------------ sampling

    def sample(
        self, prompt: Sequence[int], *, count: int, max_new_tokens: int, temperature: float,
        seed: int, ends: Set[int],
    ) -> list[Sampled]:  # fmt: skip
        """Return `count` completions of a prompt, with the log-probability of each token.

        Raises UserError for a server that gives no tokens, or ends answers at others than `ends`.
        """
        body = self._body(prompt, count, max_new_tokens, temperature, seed, ends)
        found = self._asked(body)
        if len(found) != count:
            raise UserError(f"{self.url}: gives {len(found)} of {count} completions of a prompt")
        for each in found:
            if each.finish_reason == "stop" and each.ids[-1] not in ends:
                listed = ", ".join(map(str, sorted(ends)))
                raise UserError(
                    f"{self.url}: ends an answer with token {each.ids[-1]}, and the run ends "
                    f"answers with {listed}; give the server the run's tokenizer"
                )
        return found

    def _body(
        self, prompt: Sequence[int], count: int, max_new_tokens: int, temperature: float,
        seed: int, ends: Set[int],
    ) -> dict[str, Any]:  # fmt: skip
        return {
            "model": self.model, "prompt": list(prompt), "n": count, "max_tokens": max_new_tokens,
            "temperature": temperature, "seed": seed, "stop_token_ids": sorted(ends), "logprobs": 1,
            "return_token_ids": True, "skip_special_tokens": False, "add_special_tokens": False,
            **ONLY_TEMPERATURE,
        }  # fmt: skip

    def require_tokens(self, temperature: float = 1.0) -> None:
        """Raise UserError unless it gives tokens and log-probabilities at this temperature."""
        self._asked(self._body([0], 1, 1, temperature, 0, frozenset()))

    def _asked(self, body: dict[str, Any]) -> list[Sampled]:
        values = self._client.call("/v1/completions", body)
        try:
            choices = values["choices"]
            if others := {str(each["finish_reason"]) for each in choices} - {*ENDED}:
                what = f"ended a completion by {', '.join(sorted(others))}, not by its tokens"
                raise Outage(f"{self.url}: {what}; does another program use or stop the server?")
            return [_sampled(each) for each in choices]
        except WRONG_SHAPE as exc:
            what = f"gives no tokens with log-probabilities, but {short(values)}"
            raise UserError(f"{self.url}: {what}; rollouts need vLLM 0.10.2 or newer") from exc

    # ------------------------------------------------------------------------------- weights

    def load_adapter(self, name: str, folder: Path) -> None:
        """Load an adapter from a folder that the server sees, and ask it from now on.

        name: a new one each time, so that no earlier weights can answer.
        """
        body = {"lora_name": name, "lora_path": str(folder.absolute())}
        self._control("/v1/load_lora_adapter", body, OF_ADAPTERS)
        before, self.adapter, self.model = self.adapter, name, name
        if before:
            self.unload_adapter(before)

    def unload_adapter(self, name: str) -> None:
        """Let the server forget an adapter."""
        with suppress(Refused):  # it was restarted, and knows no such adapter
            self._client.call("/v1/unload_lora_adapter", {"lora_name": name})

    def load_weights(self, folder: Path) -> None:
        """Load all weights from a folder that the server sees."""
        kwargs = {"weights_path": str(folder.absolute())}
        self._control("/collective_rpc", {"method": "reload_weights", "kwargs": kwargs}, OF_WEIGHTS)
        # Keys and values of the weights before. Requests of others may hold some, and then the
        # answer is 200 with `success: false`; older servers answer with an empty text.
        found = self._control("/reset_prefix_cache", {}, OF_WEIGHTS)
        if isinstance(found, dict) and found.get("success") is False:
            raise UserError(
                f"{self.url}: keeps keys and values of earlier weights, as it answers other "
                "requests; let the run alone use it"
            )

    # --------------------------------------------------------------------------------- sleep

    def sleep(self, keeps_weights: bool) -> None:
        """Free the memory of the GPU. keeps_weights: in the memory of the machine."""
        self._control(f"/sleep?level={1 if keeps_weights else 2}", {}, OF_SLEEP)

    def wake_up(self, part: str | None = None) -> None:
        """Take the memory again. part: weights or kv_cache; None: both."""
        self._control("/wake_up" + (f"?tags={part}" if part else ""), {}, OF_SLEEP)

    def _control(self, path: str, body: dict[str, Any], hint: str) -> Any:
        try:
            return self._client.call(path, body)
        except Refused as exc:
            if LOADED in str(exc):  # by a try whose answer came too late
                return None
            raise UserError(f"{exc} (of {path}); {hint}") from exc
        except Outage as exc:  # it answers 500 to adapters of too high a rank, or to all
            if OF_LORA in str(exc):
                raise UserError(f"{exc} (of {path}); {hint}") from exc
            raise


def _sampled(choice: Any) -> Sampled:
    """Read one completion of an answer. Raise what another shape raises."""
    ids = tuple(int(each) for each in choice["token_ids"])
    logprobs = np.array(choice["logprobs"]["token_logprobs"], np.float32)
    if not ids or logprobs.shape != (len(ids),) or not np.isfinite(logprobs).all():
        raise ValueError("as many finite log-probabilities as tokens, and at least one")
    return Sampled(ids, logprobs, "length" if choice["finish_reason"] == "length" else "stop")
