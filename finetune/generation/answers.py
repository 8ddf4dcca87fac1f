"""answers.jsonl: every answer as soon as it is there, so that a killed evaluation goes on.

Lines are only appended, whole, by any number of processes. Each has the prompt, the reference, the
answer, why it ended, its seed, and the model with its identity. `key` identifies what was asked of
which model: an answer with the same key is not asked for again.
"""

import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from types import UnionType
from typing import Any

from finetune import failures
from finetune.data.conversations import Conversation, Message
from finetune.data.places import Place, printable
from finetune.errors import DataError, Outage, UserError
from finetune.generation.completions import Completion, Prompt
from finetune.generation.engines import SHARD, Decoding, Engine

REASONS = ("stop", "length", "failed")
FIELDS: dict[str, type | UnionType] = {
    "key": str, "model": str, "row": list, "prompt": list, "reference": str | None, "answer": str,
    "seed": int | None, "seconds": int | float, "token_ids": list, "fields": dict,
}  # fmt: skip
TEXTS = ("role", "content")  # of a message of a prompt
POLL_SECONDS = 0.5


def key_of(identity: str, asked: str, decoding: Decoding, number: int) -> str:
    """Return the key of an answer. number: of the prompt, which decides drawn answers."""
    drawn = (decoding.temperature, decoding.seed_of(number // SHARD), number)
    about = [identity, asked, decoding.max_new_tokens, drawn if decoding.temperature else None]
    return blake2b(json.dumps(about).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class Answers:
    """The answers of a file, which it makes if it does not exist. path None: keep no file."""

    def __init__(self, path: Path | None, log: Callable[[str], None] = lambda text: None) -> None:
        self._path, self._log = path, log
        self._known: dict[str, dict[str, Any]] = {}
        self._offset = self._lines = 0
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if _is_cut(path):  # by a kill, in its last line
                    file.write(b"\n")
        except OSError as exc:
            failures.reraise(exc, f"{printable(str(path))}: cannot be written now")
            raise UserError(
                f"{printable(str(path))}: cannot be written: {exc.strerror}; name another folder "
                "with --report"
            ) from exc
        self.refresh()

    def refresh(self) -> None:
        """Read the lines that were added since."""
        if self._path is None:
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                self._lines += 1
                if (values := _values(line)) is not None:
                    self._known[values["key"]] = values
                elif line.strip():
                    place = f"{printable(str(self._path))}:{self._lines}"
                    self._log(f"note: {place} holds no answer, and is left out")

    def get(self, key: str, prompt: Prompt) -> Completion | None:
        """Return the saved answer with this key, as one to `prompt`."""
        values = self._known.get(key)
        return None if values is None else _completion(values, prompt)

    def add(self, key: str, model: str, identity: str, completion: Completion) -> None:
        """Append an answer. Raises Outage if the disk fails."""
        if self._path is None:
            return
        line = _line(key, model, identity, completion)
        try:
            with self._path.open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(line)
        except OSError as exc:
            name = printable(str(self._path))
            raise Outage(f"{name}: cannot be written: {exc.strerror}; run it again later") from exc


def _is_cut(path: Path) -> bool:
    """Return whether the last line of a file does not end."""
    if not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def answered(
    opened: Callable[[], Engine], identity: str, model: str, prompts: Sequence[Prompt],
    asked: Sequence[str], decoding: Decoding, saved: Answers, share: tuple[int, int] = (0, 1),
) -> list[Completion] | None:  # fmt: skip
    """Return the completions of all prompts; asks the engine for those that are not saved.

    opened: gives the engine, which is not opened if all is saved. asked: the prompts as the model
    gets them. share: (process, processes): each answers its shards; only the first returns, once
    the others have saved theirs.
    """
    keys = [key_of(identity, text, decoding, number) for number, text in enumerate(asked)]
    found = {number: saved.get(key, prompts[number]) for number, key in enumerate(keys)}
    process, processes = share
    wanted = [
        number for number in found
        if found[number] is None and number // SHARD % processes == process
    ]  # fmt: skip
    first = {keys[number]: number for number in reversed(wanted)}  # equal prompts are asked once
    if wanted:
        engine = opened()
        for number, completion in engine.complete(prompts, decoding, sorted(first.values())):
            saved.add(keys[number], model, identity, completion)
            found[number] = completion
        for number in wanted:
            if found[number] is None:  # as another row asks
                found[number] = completion = _of(number, found, keys, first, prompts)
                saved.add(keys[number], model, identity, completion)
    if process:
        return None
    while processes > 1 and any(found[number] is None for number in found):
        time.sleep(POLL_SECONDS)
        saved.refresh()
        missing = [number for number in found if found[number] is None]
        found |= {number: saved.get(keys[number], prompts[number]) for number in missing}
    return [_of(number, found, keys, first, prompts) for number in range(len(prompts))]


def _of(
    number: int, found: Mapping[int, Completion | None], keys: Sequence[str],
    first: Mapping[str, int], prompts: Sequence[Prompt],
) -> Completion:  # fmt: skip
    completion = found[number] or found[first[keys[number]]]
    assert completion is not None
    if completion.prompt is prompts[number]:
        return completion
    return Completion(**{**vars(completion), "prompt": prompts[number]})


def share_of_process() -> tuple[int, int]:
    """Return (process, processes) as a launcher sets them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def local_process() -> int:
    """Return the number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def read(path: str, log: Callable[[str], None] = lambda text: None) -> dict[str, list[Completion]]:
    """Return model -> the answers to the rows that all models of a file have answered.

    The last answer of a model to a row counts. `log` gets a note on lines without an answer. Raises
    DataError.
    """
    found: dict[str, dict[str, Completion]] = {}
    try:
        for values in _read_lines(Path(path), log):
            prompt = _prompt(values)
            found.setdefault(values["model"], {})[prompt.place] = _completion(values, prompt)
    except OSError as exc:
        raise DataError(f"--answers: {printable(path)}: cannot be read: {exc.strerror}") from exc
    if not found:
        raise DataError(
            f"--answers: {printable(path)}: holds no answers; give an answers.jsonl that evaluate "
            "wrote"
        )
    rows = [
        row for row in next(iter(found.values()))
        if _are_of_one_row([of.get(row) for of in found.values()])
    ]  # fmt: skip
    if not rows:
        raise DataError(f"--answers: {printable(path)}: no row has an answer of every model")
    return {model: [of[row] for row in rows] for model, of in found.items()}


def _are_of_one_row(given: Sequence[Completion | None]) -> bool:
    """Return whether these answer one row, not what stood at its place at another time.

    A model that was asked with context got that text before the question.
    """
    prompts = [each.prompt for each in given if each is not None]
    if len(prompts) < len(given):
        return False
    own = min((each.question for each in prompts), key=len)
    one = prompts[0].reference
    return all(each.reference == one and each.question.endswith(own) for each in prompts)


def _read_lines(path: Path, log: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    wrong = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if (values := _values(line)) is not None:
                yield values
            elif line.strip():
                wrong.append(number)
    if wrong:
        place, more = f"{printable(str(path))}:{wrong[0]}", len(wrong) - 1
        several = f" and {more:,} more lines hold no answer, and are left out"
        log(f"note: {place}{several if more else ' holds no answer, and is left out'}")


def _line(key: str, model: str, identity: str, completion: Completion) -> bytes:
    prompt = completion.prompt
    turns = [
        {"role": each.role, "content": each.content}
        | ({"context": each.context} if each.context else {})
        for each in prompt.messages
    ]
    place = prompt.conversation.place
    values = {
        "key": key, "model": model, "identity": identity,
        "row": [place.source, place.line, place.row], "prompt": turns,
        "reference": prompt.reference, "answer": completion.text,
        "finish_reason": completion.finish_reason, "seed": completion.seed,
        "seconds": round(completion.seconds, 4), "token_ids": list(completion.token_ids),
        "billed": completion.billed, "fields": dict(prompt.fields), "why": completion.why,
    }  # fmt: skip
    return (json.dumps(values, default=str) + "\n").encode()


def _values(line: bytes) -> dict[str, Any] | None:
    """Return the fields of a line; None if it is none of `_line`."""
    try:
        values = json.loads(line)
        is_whole = (
            all(isinstance(values[name], kind) for name, kind in FIELDS.items())
            and type(values["seed"]) is not bool
            and values["finish_reason"] in REASONS
            and math.isfinite(values["seconds"])
            and list(map(type, values["row"])) == [str, int, int]
            and all(type(each) is int for each in values["token_ids"])
            and list(map(type, values.get("billed") or (0, 0))) == [int, int]
            and isinstance(values.get("why", ""), str)
            and all(isinstance(turn[name], str) for turn in values["prompt"] for name in TEXTS)
            and all(isinstance(turn.get("context", ""), str) for turn in values["prompt"])
        )
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    return values if is_whole else None


def _prompt(values: Mapping[str, Any]) -> Prompt:
    source, line, row = values["row"]
    turns = [
        Message(turn["role"], turn["content"], context=turn.get("context", ""))
        for turn in values["prompt"]
    ]
    place = Place(source, line, row)
    return Prompt(Conversation(tuple(turns), place), values["reference"], values["fields"])


def _completion(values: Mapping[str, Any], prompt: Prompt) -> Completion:
    return Completion(
        prompt, values["answer"], values["finish_reason"], tuple(values["token_ids"]),
        values["seed"], float(values["seconds"]), tuple(values.get("billed") or ()) or None,
        why=values.get("why", ""),
    )  # fmt: skip
