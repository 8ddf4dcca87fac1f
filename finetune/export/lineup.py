"""Several models side by side: opened when first used; adapters share one base in memory."""

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import GenerationConfig

from finetune.config import from_yaml, paths
from finetune.config.base import (
    is_adapter,
    model_argument,
    name_problem,
    recorded_base,
    require_model,
)
from finetune.errors import ModelError
from finetune.export.load import (
    base_argument,
    base_of,
    load,
    load_chat_tokenizer,
    load_tokenizer,
    require_base,
    trust_remote_code_argument,
)
from finetune.models import adapters, base_identity

BASE, TUNED = "base", "tuned"
CHANGES_BASE = ("pissa", "olora", "corda")  # starts of adapters that subtract from the base


@dataclass(frozen=True)
class Opened:
    """A model that is ready to answer. ends: ids of the tokens that end its answers."""

    model: Any
    tokenizer: Any
    ends: frozenset[int]


class Lineup:
    """Models by name: "tuned", "base" where it is known, and further ones.

    Adapters of the base of "tuned" are put beside it, and "base" is that base without them; other
    models load when they are first used, and stay. Names are checked at once, without weights.
    """

    def __init__(
        self, tuned: str, also: Sequence[str] = (), base: str | None = None,
        trust_remote_code: bool = False, log: Callable[[str], None] = lambda text: None,
    ) -> None:  # fmt: skip
        self.paths = {TUNED: tuned}
        self._trusted, self._moved_base, self._log = trust_remote_code, base, log
        self._tokenizer = load_chat_tokenizer(tuned, trust_remote_code)
        origin, self._revision = base_in(tuned, base)
        if origin:
            self.paths[BASE] = origin
        for path in also:
            self.paths[_free_name(path, self.paths)] = path
        self._beside = {name for name in self.paths if self._shares_base(name)}
        self._opened: dict[str, Opened] = {}

    @property
    def names(self) -> list[str]:
        return list(self.paths)

    def require(self, name: str) -> str:
        """Return the name of a model. Raise ModelError for one that is not in the lineup."""
        if name in self.paths:
            return name
        listed = ", ".join(self.names)
        why = ""
        if name == BASE:
            tuned = self.paths[TUNED]
            why = f"; the base of {tuned} is not known: only adapters and run directories name it"
        raise ModelError(f"the models are {listed}, not {name!r}{why}")

    def is_beside(self, name: str) -> bool:
        """Return whether a model shares its base in memory with others."""
        return name in self._beside

    def open(self, name: str) -> Opened:
        """Open a model if it is not open yet. Raises ModelError."""
        return self._opened.get(self.require(name)) or self._open(name)

    @contextmanager
    def use(self, name: str) -> Iterator[Opened]:
        """Let a model answer inside the block; one at a time, as adapters share their base."""
        opened = self.open(name)
        if name not in self._beside:
            yield opened
            return
        if name != BASE:
            opened.model.set_adapter("default" if name == TUNED else name)
        with opened.model.disable_adapter() if name == BASE else nullcontext():
            yield opened

    def drop(self, name: str) -> None:
        """Delete a further model from memory and from the lineup; others answer as before.

        Raises ModelError for "base" and "tuned".
        """
        if self.require(name) in (BASE, TUNED):
            raise ModelError(f"{name} stays: only models of --also can be dropped")
        opened = self._opened.pop(name, None)
        if opened is not None and name in self._beside:
            opened.model.set_adapter("default")
            opened.model.delete_adapter(name)
        self._beside.discard(name)
        del self.paths[name]

    def tokenizer(self, name: str) -> Any:
        """Return the tokenizer of a model, with the chat template of "tuned" for the base."""
        if name == TUNED or name in self._beside:
            return self._tokenizer
        if name in self._opened:
            return self._opened[name].tokenizer
        revision = self._revision if name == BASE else None
        tokenizer = load_tokenizer(self.paths[name], self._trusted, revision)
        if name == BASE or not tokenizer.chat_template:
            tokenizer.chat_template = self._tokenizer.chat_template
        return tokenizer

    # ---------------------------------------------------------------------------- opening

    def _open(self, name: str) -> Opened:
        path, tokenizer = self.paths[name], self.tokenizer(name)
        if name in self._beside and name != TUNED:
            tuned = self._opened.get(TUNED) or self._open(TUNED)
            ends = tuned.ends
            if name != BASE:
                tuned.model.load_adapter(path, name)
                adapters.require_whole(tuned.model, path, name)
                ends = _ends_in(path) or ends
            opened = Opened(tuned.model, tokenizer, ends)
        else:
            if name != TUNED:
                self._log(f"opening {path}")
            moved = self._moved_base if name == TUNED else None
            revision = self._revision if name == BASE else None
            model = load(path, trust_remote_code=self._trusted, base=moved, revision=revision)
            model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
            ends = _ends_of(model, tokenizer)
            if name == BASE:  # asked by the template of "tuned", it may end as that does
                ends |= self._same_tokens(_ends_in(self.paths[TUNED]), tokenizer)
            opened = Opened(model, tokenizer, ends)
        self._opened[name] = opened
        return opened

    def _same_tokens(self, ids: frozenset[int], tokenizer: Any) -> frozenset[int]:
        """Return the ids that tokens of "tuned" have in another tokenizer, where it has them."""
        known = tokenizer.get_vocab()
        tokens = self._tokenizer.convert_ids_to_tokens(list(ids))
        return frozenset(known[token] for token in tokens if token in known)

    def _shares_base(self, name: str) -> bool:
        """Return whether a model is the base of "tuned", or an adapter that may stand beside it."""
        tuned, path = self.paths[TUNED], self.paths[name]
        if not is_adapter(tuned) or _rewrites_base(tuned):
            return False
        if name in (BASE, TUNED):
            return True
        return is_adapter(path) and not _rewrites_base(path) and _same_base(tuned, path)


def base_in(tuned: str, base: str | None = None) -> tuple[str | None, str | None]:
    """Return the base that an adapter or a run directory names; None if it is not known.

    With the revision that a run began with; an adapter's base loads with that of the adapter.

    `base`: the value of --base, where the base of an adapter is now.
    """
    if is_adapter(tuned):
        return base or recorded_base(tuned) or None, None
    config = Path(tuned).parent / "config.yaml"
    if Path(tuned).name != "model" or not config.is_file():
        return None, None
    try:
        named = from_yaml(config.read_text())["model"]
        path = named["path"] if named["init"] == "pretrained" else None
        revision = named.get("revision")
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return None, None
    return (
        (path, revision) if isinstance(path, str) and name_problem(path) is None else (None, None)
    )


def _free_name(path: str, taken: dict[str, str]) -> str:
    """Return a short name for a model: that of its run or folder, with a number if it is taken."""
    parts = Path(path).parts
    name = parts[-2] if len(parts) > 1 and parts[-1] == "model" else parts[-1]
    name = name.replace(".", "_")  # peft allows no dots in the names of adapters
    known = {*taken, "default", BASE}
    numbered = (f"{name}-{number}" for number in range(2, 1_000))
    return name if name not in known else next(each for each in numbered if each not in known)


def _rewrites_base(path: str) -> bool:
    """Return whether opening an adapter changes weights of its base itself."""
    from peft import PeftConfig

    settings = PeftConfig.from_pretrained(path)
    is_rewritten = settings.init_lora_weights in CHANGES_BASE or settings.bias != "none"
    return is_rewritten or bool(base_identity.read(Path(path)).get("loftq"))


def _same_base(one: str, other: str) -> bool:
    """Return whether two adapters were trained on the same base, quantised in the same way."""
    from peft import PeftConfig

    named = [PeftConfig.from_pretrained(path) for path in (one, other)]
    where = [base_of(Path(path), adapter, None)[0] for path, adapter in zip((one, other), named)]
    records = [{**base_identity.read(Path(path)), "dtype": None} for path in (one, other)]
    return where[0] == where[1] and records[0] == records[1]


def _ends_of(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end answers of a model."""
    given = model.generation_config.eos_token_id
    given = tokenizer.eos_token_id if given is None else given
    return frozenset({*(given if isinstance(given, list) else [given])} - {None})


def _ends_in(folder: str) -> frozenset[int]:
    """Return the tokens that end answers by the generation config of a folder; empty without."""
    if not os.path.exists(os.path.join(folder, "generation_config.json")):
        return frozenset()
    given = GenerationConfig.from_pretrained(folder).eos_token_id
    return frozenset({*(given if isinstance(given, list) else [given])} - {None})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, none = parser.add_argument, argparse.SUPPRESS
    what = "run directory, folder or Hub id, full weights or adapter"
    add("model", nargs="?", type=model_argument, metavar="MODEL", default=none, help=what)
    add("--model", type=model_argument, help="the same, as an option")
    what = "a further model to switch to; an adapter of the same base is put beside the first"
    add("--also", type=model_argument, metavar="MODEL", nargs="+", default=[], help=what)
    base_argument(parser)
    trust_remote_code_argument(parser)


def of_arguments(arguments: argparse.Namespace, command: str, log: Callable[[str], None]) -> Lineup:
    """Return the lineup that a command line names. Raises ModelError."""
    if arguments.model is None:
        example = os.path.join(paths.RUNS, "my_run")
        raise ModelError(f"name a model: {command} {example}, or a folder, or a Hub id")
    require_model(arguments.model, "--model")
    if arguments.base is not None and not is_adapter(arguments.model):
        raise ModelError(
            f"--base: {arguments.model} is not the folder of an adapter, so --base would be "
            "ignored; remove --base"
        )
    require_base(arguments.base)
    for path in arguments.also:
        require_model(path, "--also")
    given = (arguments.model, arguments.also, arguments.base, arguments.trust_remote_code)
    return Lineup(*given, log=log)
