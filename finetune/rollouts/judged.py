"""A judge's score as a reward: asked at most once about the same answer, never waited for in vain.

A question that the judge does not answer is a gap. If it answers none of a call, it is asked one
question more, and where that fails the run ends, to go on when it is started again.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait

from finetune.config.base import model_in
from finetune.config.reward_fields import Judge as Settings
from finetune.endpoint import Client, Refused, Reply, Server
from finetune.errors import ConfigError, Outage, UserError
from finetune.evaluation.judges import rubrics
from finetune.evaluation.judges.g_eval import GEval
from finetune.evaluation.judges.local import LocalJudge
from finetune.evaluation.judges.remote import RemoteJudge, request_of, weights_of
from finetune.evaluation.judges.weights import Judge, Kept, Note, Question, Weights
from finetune.generation.completions import Completion, Score
from finetune.rollouts.apart import SLICE_SECONDS, STOPS
from finetune.rollouts.kept import Folders

RETRIES = 2
TRIAL = Question("Which digit comes after 1? Write only the digit.", ("2", "3"))


class ServersJudge:
    """A judge behind a server; a question that it does not answer in time is a gap."""

    def __init__(self, server: Server, call_seconds: float, log: Callable[[str], None]) -> None:
        self._server, self._call_seconds, self._log = server, call_seconds, log
        self._stop: Callable[[], bool] = lambda: False
        self._client: Client | None = None
        with Client(server) as client:
            judge = RemoteJudge(client)
            self.name, self.identity = judge.name, judge.identity

    def open(self, stop: Callable[[], bool]) -> None:
        """Connect; at a request to stop no answer is waited for."""
        self._stop, self._client = stop, Client(self._server, self._log)

    def close(self) -> None:
        """Send nothing more, and wait for what is under way."""
        if self._client is not None:
            self._client.__exit__(None)
            self._client = None

    def write(self, prompt: str, max_tokens: int) -> str:
        return RemoteJudge(self._opened).write(prompt, max_tokens)

    def weigh(self, questions: Sequence[Question], note: Note) -> None:
        submit = self._opened.submit
        asked = {submit(request_of(each), _ignore): n for n, each in enumerate(questions)}
        end, answered, missing = time.monotonic() + self._call_seconds, 0, set(asked)
        while missing and (left := end - time.monotonic()) > 0 and not self._stop():
            done, missing = wait(missing, min(left, SLICE_SECONDS), FIRST_COMPLETED)
            for future in done:
                found = _outcome(future, questions[asked[future]])
                answered += not found.reason
                note(asked[future], found)
        why = STOPS if self._stop() else f"over {self._call_seconds:g} s for all answers"
        for future in missing:
            future.cancel()
            note(asked[future], Weights({}, 0.0, "", why))
        if questions and not answered and not self._stop():
            self._opened.ask(request_of(TRIAL))

    def ask_trial(self) -> None:
        """Ask a question whose answer does not matter. Raises UserError or Outage."""
        with Client(self._server, self._log) as client:
            client.ask(request_of(TRIAL))

    @property
    def _opened(self) -> Client:
        assert self._client is not None, "open comes first"
        return self._client


def _ignore(reply: Reply) -> None:
    """Do nothing with a reply in the thread that asked."""


def _outcome(future: "Future[Reply]", question: Question) -> Weights:
    try:
        return weights_of(future.result(), question)
    except (Refused, Outage, CancelledError) as exc:
        return Weights({}, 0.0, "", str(exc) or "not asked")


class JudgeReward:
    """Scores answers by a rubric, from 0 for its lowest score to 1 for its highest.

    `open` and `close` are around the calls.
    """

    def __init__(self, settings: Settings, log: Callable[[str], None]) -> None:
        self._log = log
        try:
            self._rubric = rubrics.read(settings.rubric)
        except ConfigError as exc:
            raise ConfigError(str(exc).removeprefix("--rubric: ")) from exc
        self._judge: Judge
        if settings.url is None:
            self._judge = LocalJudge(model_in(settings.model), option="model")
        else:
            server = Server(
                settings.url, settings.model, settings.key_variable, retries=RETRIES,
                timeout=settings.seconds,
            )  # fmt: skip
            self._judge = ServersJudge(server, settings.call_seconds, log)
        self.identity = self._rubric.model_dump_json()
        self._kept: Kept | None = None

    def require_reachable(self) -> None:
        """Raise ConfigError unless a judge at a server answers."""
        if isinstance(self._judge, ServersJudge):
            try:
                self._judge.ask_trial()
            except (Outage, UserError) as exc:
                raise ConfigError(str(exc)) from exc

    def open(self, folders: Folders, stop: Callable[[], bool]) -> None:
        folders.own.mkdir(parents=True, exist_ok=True)
        if isinstance(self._judge, ServersJudge):
            self._judge.open(stop)
        self._kept = Kept(self._judge, folders.own, self._log, folders.others)
        self._scorer = GEval(self._kept, self._rubric, folders.first)

    def prepare(self) -> None:
        """Let the judge write the steps by which it scores, unless they are known."""
        _ = self._scorer.steps

    def __call__(self, completions: Sequence[Completion]) -> list[Score]:
        low, high = min(self._rubric.scores), max(self._rubric.scores)
        found = self._scorer(completions)
        self._scorer.weights.clear()  # what evaluate sums up at its end
        return [
            each if each.value is None else Score((each.value - low) / (high - low))
            for each in found
        ]

    def close(self) -> None:
        if isinstance(self._judge, ServersJudge):
            self._judge.close()
        if self._kept is not None:
            self._kept.__exit__()
            self._kept = None
