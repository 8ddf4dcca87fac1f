"""The one client of OpenAI-compatible servers: chat completions and completions.

    server = Server("http://localhost:8000/v1", "my-model")
    with Client(server) as client:
        client.ask(Request([{"role": "user", "content": "2 + 2?"}], max_tokens=8)).text

Rows leave the machine only through here, and only to the URL that the user names. A key comes only
from the environment, and no message shows it.
"""

import contextlib
import email.utils
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx2

from finetune.data.places import short
from finetune.errors import Outage, UserError

OPENAI, OPENAI_KEY = "api.openai.com", "OPENAI_API_KEY"
PATHS = ("/chat/completions", "/completions")
CONNECT_SECONDS = 10.0
MOST_BYTES = 64 << 20  # of an answer
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds; each wait doubles the one before
MOST_ASKED_WAIT = 600.0  # seconds that a server may ask for
NOTED_WAIT = 5.0  # seconds from which a wait is noted
UNREACHED = 2  # tries of a server that has not answered yet: its URL may be wrong
BUSY = {408, 409, 425, 429}
TEMPLATE_TOKENS = 16  # of a chat template, for each message
MILLION = 1_000_000
# What reading an answer of another shape raises.
WRONG_SHAPE = (AttributeError, IndexError, KeyError, TypeError, ValueError)


class Refused(UserError):
    """The server refuses this one request, such as a prompt that is too long."""


class _Again(Exception):
    """Another try may succeed, after `seconds` if the server says so."""

    def __init__(self, reason: str, seconds: float | None = None, reached: bool = True) -> None:
        super().__init__(reason)
        self.seconds, self.reached = seconds, reached


@dataclass(frozen=True)
class Server:
    """Where requests go. `key_variable`: of the environment; see `key`."""

    url: str
    model: str
    key_variable: str | None = None
    at_once: int = 8
    """Requests in flight at most."""
    retries: int = 6
    timeout: float = 300.0
    """Seconds for a whole answer."""

    def key(self) -> str | None:
        """Return the key, or None. Raise UserError for a variable that holds none.

        Without a name only OpenAI itself gets OPENAI_API_KEY: no other server may see that key.
        """
        name = self.key_variable
        url = httpx2.URL(self.url)
        if name is None and (url.scheme, url.host) == ("https", OPENAI):
            name = OPENAI_KEY
        if name is None:
            return None
        if not (key := os.environ.get(name, "").strip()):
            raise UserError(f"the environment has no {name}; export {name}=... and try again")
        if not key.isascii() or not key.isprintable() or " " in key:
            raise UserError(f"{name} holds characters that no key has; set it anew")
        return key


@dataclass(frozen=True)
class Request:
    """A prompt: messages for chat completions, or text for completions."""

    prompt: str | Sequence[Mapping[str, str]]
    max_tokens: int = 1_024
    temperature: float | None = 0.0
    """None: what the server takes by itself."""
    top_logprobs: int = 0
    """How many likeliest tokens to return at each place of the answer."""
    echo: bool = False
    """Return the prompt before the answer, its tokens by their ids (a method of vLLM)."""

    token_ids: tuple[int, ...] = ()
    """A prompt of completions, in place of an empty text."""

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.prompt, str)

    @property
    def texts(self) -> list[str]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [message["content"] for message in self.prompt]

    def body(self, model: str, is_openai: bool = False) -> dict[str, Any]:
        """Return what the server gets. OpenAI's own has another name for the limit of a chat."""
        name = "max_completion_tokens" if is_openai and self.is_chat else "max_tokens"
        limits: dict[str, Any] = {name: self.max_tokens}
        if self.temperature is not None:
            limits["temperature"] = self.temperature
        if not self.is_chat:
            logprobs = {"logprobs": self.top_logprobs} if self.top_logprobs else {}
            echo = {"echo": True, "return_tokens_as_token_ids": True} if self.echo else {}
            prompt = list(self.token_ids) or self.prompt
            return {"model": model, "prompt": prompt, **limits, **logprobs, **echo}
        logprobs = {"top_logprobs": self.top_logprobs} if self.top_logprobs else {}
        logprobs = {"logprobs": True, **logprobs} if logprobs else {}
        messages = [dict(message) for message in self.prompt]  # type: ignore[arg-type]
        return {"model": model, "messages": messages, **limits, **logprobs}


@dataclass(frozen=True)
class Reply:
    text: str
    finish_reason: str = ""
    """Such as stop, or length where max_tokens ended it."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    """None where the server does not say."""
    tries: int = 1
    top_logprobs: tuple[Mapping[str, float], ...] = ()
    """The likeliest tokens and their log-probabilities, at each place of the answer."""
    tokens: tuple[str, ...] = ()
    """Of the answer, where a server names them beside their log-probabilities."""
    missing: str = ""
    """Why the model gave no text at all; empty where it did, or ended its answer at once."""

    @property
    def is_cut(self) -> bool:
        return self.finish_reason == "length" or self.is_filtered

    @property
    def is_filtered(self) -> bool:
        """Whether the server has left out some of the answer, or all of it."""
        return self.finish_reason == "content_filter"


@dataclass
class Budget:
    """What may be asked, in requests and in money; every try counts as a request.

    A request is taken before it is sent, at the most that it can cost, and settled with its reply.
    """

    requests: int | None = None
    money: float | None = None
    price: tuple[float, float] = (0.0, 0.0)
    """Of a million tokens, of prompts and of answers."""
    num_requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    taken: list[Request] = field(default_factory=list)
    """Requests that are not settled."""

    def take(self, request: Request) -> bool:
        """Take a request, and return True, if the budget lasts for it."""
        waiting = [*self.taken, request]
        if self.requests is not None and self.num_requests + len(waiting) > self.requests:
            return False
        if self.money is not None and self.spent + sum(map(self._most, waiting)) > self.money:
            return False
        self.taken = waiting
        return True

    def settle(self, request: Request, reply: Reply | None) -> None:
        """Count what a request has cost; None: it was refused."""
        self.taken.remove(request)
        self.num_requests += reply.tries if reply else 1
        if reply:
            most = _most_tokens(request)
            given = (reply.prompt_tokens, reply.completion_tokens)
            prompt, answer = (m if tokens is None else tokens for m, tokens in zip(most, given))
            self.prompt_tokens += prompt
            self.completion_tokens += answer

    @property
    def spent(self) -> float:
        return self._cost(self.prompt_tokens, self.completion_tokens)

    def _most(self, request: Request) -> float:
        return self._cost(*_most_tokens(request))

    def _cost(self, prompt: int, answer: int) -> float:
        return (prompt * self.price[0] + answer * self.price[1]) / MILLION


def _most_tokens(request: Request) -> tuple[int, int]:
    """Return the most tokens of prompt and answer: a token has at least one byte."""
    texts = request.texts
    size = sum(len(text.encode("utf-8", "replace")) for text in texts)
    return size + TEMPLATE_TOKENS * (len(texts) + 1), request.max_tokens


class Client:
    """A context manager. `log` gets notes, such as on long waits."""

    def __init__(self, server: Server, log: Callable[[str], None] = lambda text: None) -> None:
        self.server = Server(**{**vars(server), "url": _root(server.url)})
        self.identity = server.model
        self._log = log
        self._key = self.server.key()
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._http = httpx2.Client(
            headers={**headers, "Accept": "application/json"},
            timeout=httpx2.Timeout(server.timeout, connect=CONNECT_SECONDS),
            limits=httpx2.Limits(max_connections=server.at_once),
        )
        self._pool = ThreadPoolExecutor(server.at_once)
        self._closed = threading.Event()
        self._has_answered = False
        self._not_before = 0.0  # by time.monotonic: what one request is asked to wait, all do

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: Any, *exc: Any) -> None:
        """Send nothing more. Wait for what is in flight, as it will be paid for."""
        self._closed.set()
        if kind is KeyboardInterrupt:
            self._log("note: waiting for the answers that are under way")
        self._pool.shutdown(cancel_futures=True)
        self._http.close()

    def submit(self, request: Request, note: Callable[[Reply], None]) -> "Future[Reply]":
        """Ask in another thread, at most `at_once` at a time; `note` runs there before the end."""

        def ask() -> Reply:
            reply = self.ask(request)
            note(reply)
            return reply

        return self._pool.submit(ask)

    def flush(self) -> None:
        """Do nothing: requests are sent when they are submitted."""

    def ask(self, request: Request) -> Reply:
        """Return the reply to one request, after as many tries as it needs.

        Raises Refused if the server refuses the request, UserError if it would refuse any other as
        well, and Outage if it does not answer, even after `retries`.
        """
        is_openai = httpx2.URL(self.server.url).host == OPENAI
        url = self.server.url + PATHS[0 if request.is_chat else 1]
        values, tries = self._tried(url, request.body(self.server.model, is_openai), True)
        try:
            reply = _read(values, tries)
        except WRONG_SHAPE as exc:
            shown = short(values)
            raise UserError(f"{self.server.url}: answers with {shown}; {HINT}") from exc
        if request.top_logprobs and not reply.top_logprobs and reply.text:
            raise UserError(f"{self.server.url}: returns no log-probabilities; use another server")
        return reply

    def call(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Return the JSON that another method of the server answers with; None for other answers.

        path: behind the server's name, as /v1/completions or /sleep?level=1. Raises as `ask`.
        """
        url = self.server.url.removesuffix("/v1") + path
        return self._tried(url, body or {}, path.startswith("/v1/completions"))[0]

    def _tried(self, url: str, body: Mapping[str, Any], is_json: bool) -> tuple[Any, int]:
        """Return (the JSON of an answer, tries). is_json: anything else is a fault."""
        tries = 0
        while True:
            self._wait_for_turn()
            tries += 1
            try:
                status, headers, data = self._post(url, body)
                self._has_answered = True
                return self._values(status, headers, data, is_json), tries
            except _Again as exc:
                most = self.server.retries + 1
                if not exc.reached and not self._has_answered:
                    most = min(most, UNREACHED)
                if tries >= most:
                    raise Outage(self._failed(exc, tries)) from exc.__cause__
                self._back_off(exc, tries)

    # ------------------------------------------------------------------------------- tries

    def _wait_for_turn(self) -> None:
        while (seconds := self._not_before - time.monotonic()) > 0:
            if self._closed.wait(seconds):
                break
        if self._closed.is_set():
            raise Outage(f"{self.server.url}: stopped before this request was sent")

    def _back_off(self, exc: _Again, tries: int) -> None:
        """Wait before the next try: as long as the server asks for, or twice the wait before.

        A random part keeps requests that failed together from coming together again.
        """
        doubled = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (tries - 1)) * random.uniform(0.5, 1.0)
        seconds = exc.seconds + random.uniform(0, FIRST_WAIT) if exc.seconds else doubled
        if seconds > MOST_ASKED_WAIT:
            what = f"{exc}; it asks to wait {seconds:,.0f} seconds"
            raise Outage(f"{self.server.url}: {what}; run the same command again then")
        if exc.seconds:
            self._not_before = max(self._not_before, time.monotonic() + seconds)
        if seconds >= NOTED_WAIT:
            self._log(f"note: {self.server.url}: {exc}; trying again in {seconds:.0f} s")
        self._closed.wait(seconds)

    def _failed(self, exc: _Again, tries: int) -> str:
        hint = "run the same command again later"
        if not exc.reached:
            hint = "is the server running, and is the URL right?"
        return f"{self.server.url}: {exc}, {tries} times; {hint}"

    def _post(self, url: str, body: Mapping[str, Any]) -> tuple[int, Mapping[str, str], bytes]:
        """Send a request once; return status, headers and body. Raise _Again without a body."""
        end = time.monotonic() + self.server.timeout
        data = bytearray()
        try:
            with self._http.stream("POST", url, json=body) as response:
                for part in response.iter_bytes():
                    data += part
                    if len(data) > MOST_BYTES:
                        what = f"answers with more than {MOST_BYTES >> 20} MiB"
                        raise UserError(f"{self.server.url}: {what}; is it the right URL?")
                    if time.monotonic() > end:
                        raise _Again(f"no whole answer in {self.server.timeout:g} seconds")
                return response.status_code, response.headers, bytes(data)
        except httpx2.ConnectTimeout as exc:
            what = f"no connection in {CONNECT_SECONDS:g} seconds"
            raise _Again(what, reached=False) from exc
        except httpx2.TimeoutException as exc:
            raise _Again(f"no answer in {self.server.timeout:g} seconds") from exc
        except httpx2.ConnectError as exc:
            if "CERTIFICATE" in str(exc).upper():
                what = f"{self.server.url}: {exc}"
                raise UserError(f"{what}; SSL_CERT_FILE may name your authority's") from exc
            raise _Again(f"no connection ({exc})", reached=False) from exc
        except (OverflowError, UnicodeError, httpx2.InvalidURL) as exc:
            raise UserError(f"{self.server.url}: cannot be asked: {exc}; correct the URL") from exc
        except httpx2.RequestError as exc:
            raise _Again(f"the connection broke ({exc or type(exc).__name__})") from exc

    # ----------------------------------------------------------------------------- replies

    def _values(self, status: int, headers: Mapping[str, str], data: bytes, is_json: bool) -> Any:
        """Read an answer. Raise _Again, Refused or UserError for anything that is none."""
        is_html = "html" in headers.get("content-type", "") or data.lstrip()[:1] == b"<"
        values: Any = None
        with contextlib.suppress(ValueError, RecursionError):
            values = json.loads(data)
        status, what, code = _error(status, values, data)
        what = what.replace(self._key, "***") if self._key else what
        if status in BUSY or status >= 500:
            if code == "insufficient_quota":
                raise UserError(f"{self.server.url}: the account has no quota left: {what}")
            raise _Again(f"it answers {status} ({what})", _retry_after(headers))
        if status in (404, 405) and not is_json:
            raise Refused(f"{self.server.url}: {status}: {what}")
        if status != 200:
            raise self._refusal(status, what, headers.get("location", ""), is_html)
        if values is None and is_html:
            raise UserError(f"{self.server.url}: answers with a page, not JSON ({what}); {HINT}")
        if values is None and is_json:
            raise _Again(f"its answer is cut, or no JSON ({what})")
        return values

    def _refusal(self, status: int, what: str, location: str, is_html: bool) -> UserError:
        url, model, name = self.server.url, self.server.model, self.server.key_variable
        if 300 <= status < 400:
            return UserError(
                f"{url}: redirects to {short(location)}; give that URL, if you know it"
            )
        if status in (401, 403):
            name = name or (OPENAI_KEY if self._key else None)
            how = f"check the key in {name}" if name else "name the variable that holds your key"
            return UserError(f"{url}: refuses the key ({status}: {what}); {how}")
        if status in (404, 405):
            if not is_html and (models := self._models()):
                known = ", ".join(map(short, models[:10]))
                return UserError(f"{url}: has no model {model!r} ({what}); it has {known}")
            return UserError(f"{url}: {status}: {what}; {HINT}")
        return Refused(f"{url}: refuses the request ({status}: {what})")

    def _models(self) -> list[str]:
        """Return the models that the server lists; [] if it does not say."""
        with contextlib.suppress(httpx2.HTTPError, ValueError, KeyError, TypeError, RecursionError):
            answer = self._http.get(f"{self.server.url}/models", timeout=CONNECT_SECONDS)
            return [str(each["id"]) for each in answer.json()["data"]]
        return []


HINT = "the URL of an API often ends in /v1"


def _root(url: str) -> str:
    """Return a URL without the path of a method. Raise UserError for anything else."""
    try:
        parsed = httpx2.URL(url.strip())
    except (httpx2.InvalidURL, ValueError) as exc:
        raise UserError(
            f"{short(url)!r} is not a URL ({exc}), as http://localhost:8000/v1"
        ) from exc
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UserError(f"{short(url)!r} should begin with http:// or https:// and name a server")
    if parsed.userinfo or parsed.query:
        what = "the URL holds a name, a query or a key"
        raise UserError(f"{what}; remove it, and export a key as a variable instead")
    root = str(parsed).rstrip("/")
    for path in PATHS:
        root = root.removesuffix(path)
    return root


def _error(status: int, values: Any, data: bytes) -> tuple[int, str, Any]:
    """Return status, message and code of an answer; some servers answer 200 with an error."""
    error = values.get("error") if isinstance(values, dict) else None
    if error is None:
        detail = values.get("detail") if isinstance(values, dict) else None
        text = data[:400].decode("utf-8", "replace")
        return status, short(" ".join(text.split()) if detail is None else detail, 200), None
    code = error.get("code") if isinstance(error, dict) else None
    if status == 200:
        status = code if type(code) is int and 400 <= code < 600 else 400
    what = error.get("message") if isinstance(error, dict) else error
    return status, short(what, 200), code


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds to wait that a server asks for: a number, or a date."""
    value = headers.get("retry-after", "")
    with contextlib.suppress(ValueError, OverflowError):
        seconds = float(value)
        return max(0.0, seconds) if seconds < float("inf") else None
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return None


def _read(values: Any, tries: int) -> Reply:
    """Read the first choice of an answer. Raise what a wrong shape raises."""
    choice = values["choices"][0]
    message = choice["message"] if "message" in choice else {"content": choice["text"]}
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(part.get("text", "") for part in content)
    if not isinstance(content, str | None):
        raise TypeError
    usage = values.get("usage") or {}
    tokens = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    prompt, answer = (count if type(count) is int and count >= 0 else None for count in tokens)
    logprobs = tuple(_top_logprobs(choice.get("logprobs") or {}))
    words = tuple(map(str, (choice.get("logprobs") or {}).get("tokens") or ()))
    reason = str(choice.get("finish_reason") or "")
    missing = "" if content else _missing(message, reason, usage)
    return Reply(_whole(content or ""), reason, prompt, answer, tries, logprobs, words, missing)


def _missing(message: Mapping[str, Any], reason: str, usage: Mapping[str, Any]) -> str:
    """Return why a message has no content; empty if it is an answer without a word."""
    if refusal := message.get("refusal"):
        return f"the model refuses: {short(refusal)}"
    if reason == "content_filter":
        return "the server has filtered it"
    if message.get("tool_calls") or message.get("function_call"):
        return "the model calls a tool instead"
    spent = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens")
    if message.get("reasoning_content") or message.get("reasoning") or spent:
        if reason == "length":
            return "the limit of tokens ended it in its reasoning"
        return "the model ended after its reasoning"
    return "the server sends content: null" if message.get("content") is None else ""


def _top_logprobs(logprobs: Mapping[str, Any]) -> Iterator[Mapping[str, float]]:
    """Yield the likeliest tokens of each place, of either method's shape."""
    for place in logprobs.get("content") or []:
        yield {each["token"]: float(each["logprob"]) for each in place["top_logprobs"]}
    for place in logprobs.get("top_logprobs") or []:
        yield {token: float(value) for token, value in (place or {}).items()}


def _whole(text: str) -> str:
    """Put U+FFFD where an answer was cut inside a character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
