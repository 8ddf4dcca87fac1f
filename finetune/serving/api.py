"""OpenAI's chat completions, completions and models, as requests and answers in JSON."""

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from finetune.data.conversations import Message
from finetune.generation.streaming import Sampling, Streamed, Token
from finetune.serving.http import Rejected

MOST_LOGPROBS = 20
LEAST_TEMPERATURE = 1e-3  # below, dividing the logits by it may overflow
# Fields that change nothing in an answer, so they are taken and not used.
NOTES = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}

Stop = Annotated[str, Field(min_length=1)]


class Part(BaseModel):
    type: Literal["text"]
    text: str


class Turn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def message(self) -> Message:
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return Message("system" if self.role == "developer" else self.role, text)


class StreamOptions(BaseModel):
    include_usage: bool = False


class Request(BaseModel):
    """What both methods take. Settings that would be ignored are errors; see `parsed`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    temperature: float = Field(1.0, ge=0, le=100, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | list[Stop] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    max_tokens: int | None = Field(None, ge=1)

    @field_validator("temperature")
    @classmethod
    def _divides(cls, value: float) -> float:
        if 0 < value < LEAST_TEMPERATURE:
            raise ValueError(f"should be 0, or at least {LEAST_TEMPERATURE:g}")
        return value

    def sampling(self, longest: int) -> Sampling:
        """Return how to draw the answer; `longest`: where the request sets no limit."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            self.most_tokens or longest, self.temperature, self.top_p, self.seed, tuple(stop),
            self.num_logprobs,
        )  # fmt: skip

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        raise NotImplementedError

    @property
    def has_usage_chunk(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(Request):
    messages: list[Turn] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TextRequest(Request):
    prompt: str | list[str]
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


def parsed(kind: type[ChatRequest] | type[TextRequest], values: Mapping[str, Any]) -> Any:
    """Return a request. Raises Rejected for the first wrong field.

    A field that this server does not know passes if its value asks for nothing, as 0 or null does.
    """
    known = _asking(kind, values)
    if isinstance(turns := known.get("messages"), list):
        turns = [_asking(Turn, turn) if isinstance(turn, dict) else turn for turn in turns]
        known["messages"] = turns
    known = {name: value for name, value in known.items() if value is not None}
    _require_characters(known)
    try:
        request = kind.model_validate(known)
    except ValidationError as exc:
        raise _rejection(exc) from None
    if isinstance(request, TextRequest) and not (request.prompts and all(request.prompts)):
        raise Rejected(400, "prompt: is empty; give some text", "prompt")
    return request


def _asking(kind: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that ask for something."""
    return {
        name: value
        for name, value in values.items()
        if name in kind.model_fields or (name not in NOTES and value)
    }


def _rejection(exc: ValidationError) -> Rejected:
    # Of the alternatives of a field, such as text or parts, the one that fits furthest in.
    first = max(exc.errors(), key=lambda each: len(each["loc"]))
    types = ("list[", "constrained-str")
    loc = [str(part) for part in first["loc"] if part != "str"]
    field = ".".join(part for part in loc if not part.startswith(types))
    if first["type"] == "extra_forbidden":
        what = "this server does not support it; remove it, or serve the model with vLLM"
        return Rejected(400, f"{field}: {what}", field, "unsupported_parameter")
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return Rejected(400, f"{field}: {first['msg']}", field, code)


def _require_characters(values: Any, place: str = "") -> None:
    """Raise Rejected for text with half a character, which no tokenizer takes."""
    if isinstance(values, str):
        try:
            values.encode()
        except UnicodeEncodeError as exc:
            what = "holds half a character (a lone surrogate); send whole ones"
            raise Rejected(400, f"{place}: {what}", place) from exc
    if isinstance(values, list):
        values = dict(enumerate(values))
    for name, value in values.items() if isinstance(values, dict) else ():
        _require_characters(value, f"{place}.{name}" if place else str(name))


# ---------------------------------------------------------------------------------- answers


class Shape:
    """Answers to one request, in the shape of its method."""

    def __init__(self, request: ChatRequest | TextRequest) -> None:
        self.is_chat = isinstance(request, ChatRequest)
        self.num_logprobs = request.num_logprobs
        kind = "chat.completion" if self.is_chat else "text_completion"
        self._object = kind
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        self._frame = {
            "id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()),
            "model": request.model,
        }  # fmt: skip

    def whole(self, answers: Sequence[Streamed]) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                **self._content("message", answer.text),
                "logprobs": self._logprobs(answer.tokens, 0),
                "finish_reason": reason_of(answer),
            }
            for index, answer in enumerate(answers)
        ]
        frame = {**self._frame, "object": self._object}
        return {**frame, "choices": choices, "usage": self.usage(answers)}

    def chunk(
        self, index: int, text: str, tokens: Sequence[Token] = (), offset: int = 0,
        finish_reason: str | None = None, is_first: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        """Return a piece of answer `index`. `offset`: of its text in the answer."""
        delta = self._content("delta", text)
        if self.is_chat and not is_first:
            del delta["delta"]["role"]
        if self.is_chat and finish_reason:
            delta = {"delta": {}}
        logprobs = self._logprobs(tokens, offset) if tokens else None
        choice = {"index": index, **delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._chunk_frame, "choices": [choice]}

    def usage_chunk(self, answers: Sequence[Streamed]) -> dict[str, Any]:
        return {**self._chunk_frame, "choices": [], "usage": self.usage(answers)}

    @staticmethod
    def usage(answers: Sequence[Streamed]) -> dict[str, int]:
        prompt = sum(answer.prompt_tokens for answer in answers)
        given = sum(answer.completion_tokens for answer in answers)
        return {
            "prompt_tokens": prompt, "completion_tokens": given, "total_tokens": prompt + given
        }  # fmt: skip

    @property
    def _chunk_frame(self) -> dict[str, Any]:
        return {**self._frame, "object": self._object + ".chunk" * self.is_chat}

    def _content(self, name: str, text: str) -> dict[str, Any]:
        return {name: {"role": "assistant", "content": text}} if self.is_chat else {"text": text}

    def _logprobs(self, tokens: Sequence[Token], offset: int) -> dict[str, Any] | None:
        if self.num_logprobs is None:
            return None
        if self.is_chat:
            content = [
                {
                    **_token(token.text, token.logprob),
                    "top_logprobs": [_token(text, value) for text, value in token.top],
                }
                for token in tokens
            ]
            return {"content": content}
        offsets = list(_offsets(tokens, offset))
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            # Of tokens that look alike, such as parts of characters, the likeliest counts.
            "top_logprobs": [dict(reversed(token.top)) for token in tokens],
            "text_offset": offsets,
        }


def reason_of(answer: Streamed) -> str:
    """Return why an answer ended; content_filter: moderation has replaced it."""
    return "content_filter" if answer.is_refused else answer.finish_reason


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _offsets(tokens: Sequence[Token], offset: int) -> Iterator[int]:
    for token in tokens:
        yield offset
        offset += len(token.text)


def models(names: Sequence[str]) -> dict[str, Any]:
    """Return the list of models."""
    listed = [
        {"id": name, "object": "model", "created": 0, "owned_by": "finetune"} for name in names
    ]
    return {"object": "list", "data": listed}
