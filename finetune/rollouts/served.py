"""Completions of a vLLM server, which gets the policy's weights before each phase.

require_server(settings, temperature)    # before weights load
served.hand_over(topology, phase, save)
served.draw(prompts, seeds, ...)
"""

import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from finetune.config.engine_fields import ServerEngine
from finetune.endpoint import Client, Server
from finetune.engine.topology import Topology
from finetune.errors import ConfigError, FinetuneError, Outage, UserError
from finetune.generation.vllm_server import VllmServer
from finetune.rollouts.sampling import Drawn

SETTING = "objective.rollouts.engine"
LAST_SECONDS = 10.0  # for the last request, when all else is done
BEAT_SECONDS = 1.0  # between looks at a request to stop, while requests are under way
PROBES, PROBE_TOKENS = 4, 32
"""Completions of the probe, and their tokens at most: 128 numbers are compared."""


def require_server(settings: ServerEngine, temperature: float) -> None:
    """Raise ConfigError unless the server answers with tokens; let it sleep, if it should."""
    try:
        with _client(settings) as client:
            server = VllmServer(client)
            if settings.sleep:
                server.wake_up()
            server.require_tokens(temperature)
            if settings.sleep:
                server.sleep(keeps_weights=True)
    except (Outage, UserError) as exc:
        raise ConfigError(f"{SETTING}: {exc}") from exc


def _client(settings: ServerEngine, log: Callable[[str], None] = lambda text: None) -> Client:
    return Client(_server(settings), log)


def _server(settings: ServerEngine) -> Server:
    return Server(
        settings.url, settings.model, settings.key_variable, settings.at_once,
        timeout=settings.seconds,
    )  # fmt: skip


class Served:
    """Samples at a server. ends: tokens that end a completion. A context manager.

    run: its directory. is_adapter: whether the server gets adapters; else all weights.
    """

    def __init__(
        self, settings: ServerEngine, run: Path, *, is_adapter: bool, temperature: float,
        ends: Set[int], log: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.settings, self._is_adapter = settings, is_adapter
        # Of this run alone: it is replaced each time, and removed at the end.
        self._folder = Path(settings.folder, run.name) if settings.folder else run
        self._folder /= "server_weights"
        self._temperature, self._ends = temperature, ends
        self._client = _client(settings, log)
        self._server = VllmServer(self._client)

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *exc: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._client.__exit__(*exc)
        if name := self._server.adapter:
            last = replace(_server(self.settings), retries=0, timeout=LAST_SECONDS)
            with suppress(FinetuneError), Client(last) as client:  # the server may be gone
                VllmServer(client).unload_adapter(name)

    # ------------------------------------------------------------------------------- weights

    def hand_over(self, topology: Topology, title: str, save: Callable[[Path], None]) -> None:
        """Give the server the policy's weights, which `save` writes to a folder. Collective."""
        save(self._folder)
        if self.settings.sleep:  # it wakes up on the same GPU
            topology.give_back()
        name: str = topology.on_main(lambda: self._load(title))
        self._server.model = name  # also of the processes that did not load it

    def _load(self, title: str) -> str:
        server, sleeps = self._server, self.settings.sleep
        if self._is_adapter:
            if sleeps:
                server.wake_up()
            # A new name each time: no request can meet earlier weights, nor a cache of theirs.
            server.load_adapter(f"{title}-{time.time_ns():x}", self._folder)
            return server.model
        if sleeps:
            server.wake_up("weights")
        server.load_weights(self._folder)
        if sleeps:
            server.wake_up("kv_cache")
        return server.model

    def require_same(self, sampled: Sequence[Drawn], logprobs: np.ndarray) -> float:
        """Return how far the policy's log-probabilities of a probe are from the server's, in nats.

        logprobs: [tokens] of the policy. Raises UserError if they are too far.
        """
        given = np.concatenate([each.logprobs for each in sampled])
        gap = float(np.abs(given - logprobs).mean())
        if not gap <= self.settings.probe_tolerance:
            raise UserError(
                f"{SETTING}: log-probabilities of {self.settings.url} are {gap:.3g} nats from the "
                f"policy's, on average over {len(given)} tokens; probe_tolerance allows "
                f"{self.settings.probe_tolerance:g}. The server has other weights, computes in "
                "another precision, or gives log-probabilities before the temperature (start vLLM "
                "with --logprobs-mode processed_logprobs). The phase samples nothing with it"
            )
        return gap

    @contextmanager
    def rested(self, topology: Topology) -> Iterator[None]:
        """Let the server sleep at the end of the block, where it should. Collective."""
        yield
        if self.settings.sleep:
            topology.on_main(lambda: self._server.sleep(keeps_weights=self._is_adapter))

    # ------------------------------------------------------------------------------ sampling

    def probe(self, prompt: Sequence[int], max_new_tokens: int, seed: int) -> list[Drawn]:
        """Return completions to compare with the policy."""
        return self._sample(prompt, PROBES, min(PROBE_TOKENS, max_new_tokens), seed)

    def draw(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], count: int,
        max_new_tokens: int, beat: Callable[[], None],
    ) -> list[list[Drawn]]:  # fmt: skip
        """Return `count` completions of each prompt. `beat` is called meanwhile, and may raise.

        The threads are daemons: a process that has to stop does not wait for a slow answer.
        """
        found: list[Any] = [None] * len(prompts)
        waiting = deque(range(len(prompts)))

        def work() -> None:
            while waiting:
                with suppress(IndexError):  # another thread took the last one
                    place = waiting.popleft()
                    try:
                        found[place] = self._sample(
                            prompts[place], count, max_new_tokens, seeds[place]
                        )
                    except BaseException as exc:
                        found[place] = exc
                        waiting.clear()

        number = min(self.settings.at_once, len(prompts))
        threads = [threading.Thread(target=work, daemon=True) for _ in range(number)]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(BEAT_SECONDS)
                beat()
                _raise_any(found)
        _raise_any(found)
        return found

    def _sample(
        self, prompt: Sequence[int], count: int, max_new_tokens: int, seed: int
    ) -> list[Drawn]:
        found = self._server.sample(
            prompt, count=count, max_new_tokens=max_new_tokens, temperature=self._temperature,
            seed=seed, ends=self._ends,
        )  # fmt: skip
        return [Drawn(each.ids, each.logprobs, each.finish_reason) for each in found]


def _raise_any(found: Sequence[Any]) -> None:
    for each in found:
        if isinstance(each, BaseException):
            raise each
