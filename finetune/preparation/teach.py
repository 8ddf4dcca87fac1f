"""Write what a teacher expects at each learned token into rows, for objective.kind: distill.

    finetune data teach rows.jsonl --config distill.yaml --model teacher --top 64 \\
        --output taught.jsonl
    finetune data teach rows.jsonl --config distill.yaml --endpoint http://localhost:8000/v1 \\
        --model my-teacher --top 20 --output taught.jsonl

Rows become tokens as --config makes them: its model's tokenizer, template, system prompt and
maximum length. Each row gets a column `teacher` with these tokens and, for each that is learned,
the teacher's likeliest tokens and their log-probabilities. A run of the same config reads them
without the teacher, and refuses rows whose tokens are others.

Rows leave this machine only with --endpoint. The server gets token ids and has to return log-
probabilities of its prompt as token ids (`echo`, `logprobs`, `return_tokens_as_token_ids`), as vLLM
does; its own limit of --top is --max-logprobs.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch

from finetune import config as configs
from finetune import preflight
from finetune.config import Config, paths
from finetune.config.kinds import TEMPERATURES, temperature_argument
from finetune.config.objective_fields import Clm, Distill, Sft
from finetune.data.batches import Batches
from finetune.data.places import Row
from finetune.data.taught import COLUMN, Taught
from finetune.endpoint import Client, Reply, Request, Server
from finetune.engine import companion
from finetune.engine.topology import Topology
from finetune.errors import UserError
from finetune.models import cross_entropy, teacher
from finetune.preflight import Data
from finetune.preparation import frame as frames
from finetune.preparation.frame import Frame

PROBE = "Hello, world! 123 äß 你好\n\tdef f(x): return x  # ?"
"""Text that other tokenizers rarely cut alike."""
TOKEN = "token_id:"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    frames.add_inputs(parser)
    frames.add_output(parser)
    what = "run config that will train on the rows"
    add("--config", required=True, type=paths.argument, metavar="FILE", help=what)
    what = "the teacher: model of the endpoint; without one a folder or Hub id on this machine"
    add("--model", required=True, metavar="NAME", help=what)
    what = "likeliest tokens to keep at each token; with all of them nothing is lost"
    add("--top", type=frames.positive, default=64, metavar="K", help=what)
    what = "divides the teacher's logits: objective.temperature of the run"
    add("--temperature", type=_temperature, default=1.0, metavar="T", help=what)
    what = "URL of an OpenAI-compatible server, such as http://localhost:8000/v1; it gets the rows"
    add("--endpoint", metavar="URL", help=what)
    what = "environment variable that holds the server's key"
    add("--key", metavar="VARIABLE", help=what)
    what = "requests in flight, or documents of a batch"
    add("--at-once", type=frames.positive, default=8, metavar="N", help=what)


def _temperature(text: str) -> float:
    """Parse a temperature that divides logits, so not 0."""
    with suppress(argparse.ArgumentTypeError):
        if value := temperature_argument(text):
            return value
    least, most = TEMPERATURES
    raise argparse.ArgumentTypeError(f"should be from {least:g} to {most:g}, got {text!r}")


class _Teacher(Protocol):
    def answers(self, examples: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield ids [S, K] and log-probabilities [S, K] of the documents of some examples."""


def main(frame: Frame, given: argparse.Namespace) -> None:
    if given.endpoint is None and given.key is not None:
        raise UserError("--key: would be ignored without --endpoint; remove it")
    if given.endpoint is not None and given.temperature != 1.0:
        raise UserError("--temperature: a server's log-probabilities are those at 1; remove it")
    config = _config(given, frame.sources)
    topology = Topology(config.train.precision, check_only=True)
    data = preflight.prepare(config, topology)
    if given.endpoint is None:
        _write(frame, data, given, _Local(config, topology, data, given))
        return
    server = Server(given.endpoint, given.model, given.key, given.at_once)
    with Client(server, lambda text: frame.note(text.removeprefix("note: "))) as client:
        _write(frame, data, given, _Remote(client, data, given.top))


def _config(given: argparse.Namespace, sources: list[str]) -> Config:
    """Return the config, of these rows alone, and of an objective that needs no teacher."""
    config = configs.parse(["--config", given.config])[0]
    config = config.changed(
        "data", train=sources, eval=None, eval_fraction=0.0, max_rows=None, weights={},
        token_budgets={}, streaming=False, packing=False,
    )  # fmt: skip
    if config.train.micro_batch_size == "auto":
        config = config.changed("train", micro_batch_size=1)
    usual = Clm(kind="clm") if config.distills_text else Sft()
    return config.model_copy(update={"objective": usual})


def _write(frame: Frame, data: Data, given: argparse.Namespace, model: _Teacher) -> None:
    """Write each row with what the teacher says of its documents."""
    examples = data.train.in_memory.examples
    of_rows: dict[str, list[int]] = defaultdict(list)
    for example in range(len(examples)):
        of_rows[examples.place(example)].append(example)
    with frame.writing() as write:
        fit = _that_fit(frame, of_rows)
        while rows := list(islice(fit, given.at_once)):
            _write_some(rows, of_rows, data, given.temperature, model, write)


def _that_fit(frame: Frame, of_rows: Mapping[str, list[int]]) -> Iterator[Row]:
    for row in frame.rows():
        if str(row.place) in of_rows:
            yield row
        else:
            frame.drop(row, "longer than data.max_length")


def _write_some(
    rows: Sequence[Row], of_rows: Mapping[str, list[int]], data: Data, temperature: float,
    model: _Teacher, write: Any,
) -> None:  # fmt: skip
    examples = data.train.in_memory.examples
    members = [of_rows[str(row.place)] for row in rows]
    answers = model.answers([example for each in members for example in each])
    for row, own in zip(rows, members):
        column = []
        for document in (each for example in own for each in examples.documents(example)):
            part = examples.input.span(document)
            tokens, supervised = examples.input.ids[part], examples.supervised[part]
            scored = np.flatnonzero(supervised[1:]) + 1
            ids, logprobs = next(answers)
            column.append(Taught(tokens, scored, ids, logprobs, temperature).values())
        write(row.values | {COLUMN: column}, row.place)


class _Local:
    """A teacher on this machine, in the precision of the config."""

    def __init__(
        self, config: Config, topology: Topology, data: Data, given: argparse.Namespace
    ) -> None:
        wanted = Distill(kind="distill", teacher=given.model)
        found = teacher.prepare(
            config.model_copy(update={"objective": wanted}), data.tokenizer, data.attention,
            topology.device, topology.precision, name="--model",
        )  # fmt: skip
        self._model = companion.load(
            found.config, topology, model_config=found.model_config, tokenizer=found.tokenizer,
            attention=found.attention,
        )  # fmt: skip
        sizes = (
            each.get_text_config().vocab_size for each in (data.model_config, found.model_config)
        )
        self._size = min(sizes)  # the ids that both have
        self._top, self._temperature = min(given.top, self._size), given.temperature
        self._batches: Batches = data.train
        self._device = topology.device

    def answers(self, examples: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        if not examples:
            return
        batch = self._batches.of_sequences(np.array(examples))
        found = self._model(batch.to(self._device), {"distribution"}).distribution
        assert found is not None
        parts = cross_entropy.chunks(len(batch.labels), self._size * 8, cross_entropy.CHUNK_BYTES)
        with torch.no_grad():
            tops = [
                (found.logits(found.states[part])[:, : self._size].float() / self._temperature)
                .log_softmax(-1)
                .topk(self._top)
                for part in parts
            ]
        logprobs, ids = (torch.cat(each).cpu().numpy() for each in zip(*tops))
        for number in range(batch.num_documents):
            own = (batch.document == number).numpy()
            yield ids[own], logprobs[own]


class _Remote:
    """A teacher at a server, which is asked about documents as token ids."""

    def __init__(self, client: Client, data: Data, top: int) -> None:
        self._client, self._top = client, top
        self._examples = data.train.in_memory.examples
        self._require_same_tokens(data.tokenizer)

    def _require_same_tokens(self, tokenizer: Any) -> None:
        """Raise UserError if the server cuts a text into other tokens."""
        mine = tokenizer.encode(PROBE, add_special_tokens=False)
        found = _ids(self._client.ask(Request(PROBE, 1, top_logprobs=1, echo=True)).tokens)
        # A server may put a first token before a text, and writes one after it.
        if mine not in (found[: len(mine)], found[1 : len(mine) + 1]):
            raise UserError(
                f"--model: {self._client.server.model} has another tokenizer: it cuts {PROBE!r} "
                f"into {found}, and the model that learns into {mine}; its distributions are over "
                "other tokens, so train on the answers that it writes (docs/distillation.md)"
            )

    def answers(self, examples: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        spans, waiting = [], []
        for document in (
            each for example in examples for each in self._examples.documents(example)
        ):
            span = self._examples.input.span(document)
            tokens = tuple(map(int, self._examples.input.ids[span]))
            request = Request("", 1, top_logprobs=self._top, echo=True, token_ids=tokens)
            spans.append(span)
            waiting.append((tokens, self._client.submit(request, lambda reply: None)))
        for span, (tokens, future) in zip(spans, waiting):
            scored = np.flatnonzero(self._examples.supervised[span][1:]) + 1
            yield self._read(future.result(), tokens, scored)

    def _read(
        self, reply: Reply, tokens: tuple[int, ...], scored: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        if tuple(_ids(reply.tokens)[: len(tokens)]) != tokens:
            raise UserError(f"{self._client.server.url}: returns other tokens than it was sent")
        tops = [reply.top_logprobs[place] for place in scored]
        if short := [len(top) for top in tops if len(top) < self._top]:
            raise UserError(
                f"{self._client.server.url}: returns {short[0]} tokens of a place, and --top is "
                f"{self._top}; lower it to what the server allows"
            )
        # Besides the likeliest, a server may return the token that is there.
        best = [sorted(top.items(), key=lambda each: -each[1])[: self._top] for top in tops]
        shape = (len(scored), self._top)
        ids = np.array([_ids(word for word, _ in top) for top in best], np.int32).reshape(shape)
        logprobs = np.array([[value for _, value in top] for top in best], np.float32)
        return ids, logprobs.reshape(shape)


def _ids(tokens: Any) -> list[int]:
    """Return the ids that a server names. Raise UserError for words: tokens may look alike."""
    found = list(tokens)
    if not all(word.startswith(TOKEN) and word[len(TOKEN) :].isdecimal() for word in found):
        raise UserError(
            "--endpoint: the server names tokens by their text, which several may share; take one "
            "that returns token ids, as vLLM does, or give the teacher as a folder"
        )
    if not found:
        raise UserError(
            "--endpoint: the server returns no log-probabilities of its prompt; take one that "
            "knows `echo`, as vLLM does, or give the teacher as a folder"
        )
    return [int(word[len(TOKEN) :]) for word in found]
