"""Ask every model of an evaluation its prompts; models open when an answer is not saved yet."""

import gc
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from finetune.config.base import config_of, is_adapter, recorded_base
from finetune.errors import UserError
from finetune.evaluation.candidates import Candidate, same_model
from finetune.evaluation.held_out import note
from finetune.evaluation.results import BASE, TUNED
from finetune.evaluation.scores.reference_loss import ReferenceLoss
from finetune.export.lineup import Lineup
from finetune.export.load import load, load_chat_tokenizer, load_tokenizer, other_base
from finetune.generation import answers, generate
from finetune.generation.answers import Answers
from finetune.generation.completions import Completion, Prompt, Scorer
from finetune.generation.engines import Decoding, Engine, Local
from finetune.generation.remote import Remote, is_remote


@dataclass(frozen=True)
class Asking:
    """How models are asked. key_variable: of the environment, with the key of a server.

    source_prefix: before what an encoder-decoder reads. share: (process, processes).
    """

    decoding: Decoding
    at_once: int = 64
    trust_remote_code: bool = False
    system_prompt: str | None = None
    source_prefix: str = ""
    key_variable: str | None = None
    saved: Answers = field(default_factory=lambda: Answers(None))
    share: tuple[int, int] = (0, 1)


class Models:
    """The models by candidate: adapters of one base share it, others load alone and are let go."""

    def __init__(self, candidates: Sequence[Candidate], asking: Asking) -> None:
        self._candidates, self._asking = candidates, asking
        self._by_name = {each.name: each for each in candidates}
        self._tokenizers: dict[str, Any] = {}
        self._opened: dict[str, Any] = {}
        tuned = self._by_name[TUNED]
        self._template: str | None = None
        if not is_remote(tuned.model):
            trusted = asking.trust_remote_code
            opens = load_tokenizer if is_pair(tuned.model) else load_chat_tokenizer
            self._template = opens(tuned.model, trusted).chat_template
        self._lineup = self._shared(tuned)

    def _shared(self, tuned: Candidate) -> Lineup | None:
        """Return the models that share the base of a tuned adapter; None if it shares none."""
        others = [each for each in self._candidates if each.model != tuned.model]
        adapters = [each.model for each in others if is_adapter(each.model)]
        base = self._by_name[BASE].model
        known = recorded_base(tuned.model) if is_adapter(tuned.model) else ""
        is_its_base = bool(known) and (same_model(known, base) or tuned.base is not None)
        if not is_adapter(tuned.model) or not (is_its_base or adapters):
            return None
        also = list(dict.fromkeys(adapters))
        return Lineup(tuned.model, also, tuned.base, self._asking.trust_remote_code)

    def _name_in_lineup(self, candidate: Candidate) -> str | None:
        if self._lineup is None:
            return None
        for name, path in self._lineup.paths.items():
            if self._lineup.is_beside(name) and same_model(path, candidate.model):
                return name
        return None

    def tokenizer(self, candidate: Candidate) -> Any:
        """Return the tokenizer with the template that the model is asked by.

        That of the tuned model for its base, and for others without one of their own.
        """
        if (found := self._tokenizers.get(candidate.identity)) is None:
            if (name := self._name_in_lineup(candidate)) is not None and self._lineup is not None:
                found = self._lineup.tokenizer(name)
            else:
                trusted = self._asking.trust_remote_code
                found = load_tokenizer(candidate.model, trusted, candidate.revision)
                if not candidate.keeps_template or not found.chat_template:
                    found.chat_template = self._template
            self._tokenizers[candidate.identity] = found
        return found

    def asks(self, candidate: Candidate) -> Callable[[Prompt], str]:
        """Return what makes the text that a candidate gets of a prompt."""
        if is_remote(candidate.model):
            return self._remote(candidate).asked
        tokenizer = self.tokenizer(candidate)
        if not tokenizer.chat_template:
            return lambda prompt: self._asking.source_prefix + prompt.question
        render = generate.Prompts(tokenizer)
        return lambda prompt: render.of(prompt.conversation)

    def _remote(self, candidate: Candidate) -> Remote:
        asking = self._asking
        return Remote(
            candidate.model, asking.system_prompt, asking.key_variable, title=candidate.name
        )

    @contextmanager
    def engine(self, candidate: Candidate) -> Iterator[Engine]:
        """Open what answers for a candidate, inside the block."""
        if is_remote(candidate.model):
            yield self._remote(candidate)
            return
        with self.model(candidate) as (model, ends):
            yield Local(
                model, self.tokenizer(candidate), candidate.identity,
                ends=ends, at_once=self._asking.at_once, title=candidate.name,
                asked=self.asks(candidate),
            )  # fmt: skip
            del model

    @contextmanager
    def model(self, candidate: Candidate) -> Iterator[tuple[Any, Set[int] | None]]:
        """Open a candidate of this machine inside the block; with the tokens that end answers.

        None: those of the model.
        """
        name = self._name_in_lineup(candidate)
        if name is None or self._lineup is None:
            yield self._load(candidate), None
            return
        with self._lineup.use(name) as opened:
            yield opened.model, opened.ends

    def _load(self, candidate: Candidate) -> Any:
        """Load a model alone; keep it only while another candidate asks the same one."""
        if (key := candidate.identity) not in self._opened:
            self._opened.clear()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            trusted = self._asking.trust_remote_code
            model = load(
                candidate.model, trust_remote_code=trusted, base=candidate.base,
                revision=candidate.revision,
            )  # fmt: skip
            if candidate.option == "--base":
                tuned = self._by_name[TUNED].model
                if not is_remote(tuned) and (message := other_base(tuned, model)):
                    note(message)
            self._opened[key] = model.to(_device())
        return self._opened[key]


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", answers.local_process() % torch.cuda.device_count())


def is_pair(model: str) -> bool:
    """Return whether a model, or the base of an adapter, is an encoder-decoder."""
    folder = recorded_base(model) if is_adapter(model) else model
    return bool(config_of(folder).get("is_encoder_decoder"))


def ask(
    candidates: Sequence[Candidate], prompts: Sequence[Prompt], asking: Asking
) -> dict[str, list[Completion]] | None:
    """Return the completions of each candidate; None in all processes but the first.

    All prompts are rendered before any weights load, as one may not fit a template.
    """
    models = Models(candidates, asking)
    of_each = [(each, each.change(prompts)) for each in candidates]
    rendered = [
        (each, own, generate.texts_of(models.asks(each), own)) for each, own in of_each
    ]  # fmt: skip
    for each, _, texts in rendered:
        if each.examples and not is_remote(each.model):
            _require_room(each, texts, models.tokenizer(each), asking.decoding.max_new_tokens)
    found: dict[str, list[Completion]] = {}
    for candidate, own, texts in rendered:
        identity = candidate.identity
        with ExitStack() as stack:

            def opened(candidate: Candidate = candidate, stack: ExitStack = stack) -> Engine:
                return stack.enter_context(models.engine(candidate))

            completions = answers.answered(
                opened, identity, candidate.name, own, texts, asking.decoding, asking.saved,
                asking.share,
            )  # fmt: skip
        if completions is not None:
            found[candidate.name] = completions
    return None if asking.share[0] else found


def _require_room(
    candidate: Candidate, texts: Sequence[str], tokenizer: Any, max_new_tokens: int
) -> None:
    """Raise UserError if no prompt has room for its examples: all would lose their beginning."""
    model = recorded_base(candidate.model) if is_adapter(candidate.model) else candidate.model
    context = config_of(model).get("max_position_embeddings")
    if type(context) is not int or is_pair(candidate.model):
        return
    most = generate.room_of(context, max_new_tokens)
    shortest = min(generate.num_tokens(text, tokenizer) for text in texts)
    if shortest > most:
        raise UserError(
            f"--few-shot: with {len(candidate.examples)} examples every prompt has {shortest:,} "
            f"tokens or more, and the model's {context:,} positions leave {most:,} next to answers "
            f"of {max_new_tokens:,}; give fewer examples, or a smaller --max-new-tokens"
        )


def score_references(
    scorers: Sequence[Scorer], candidates: Sequence[Candidate], prompts: Sequence[Prompt],
    asking: Asking,
) -> None:  # fmt: skip
    """Let scores of references read every model of this machine, which opens for it."""
    asked = [each for each in scorers if isinstance(each, ReferenceLoss)]
    if not asked:
        return
    models = Models(candidates, asking)
    for each in candidates:
        if not is_remote(each.model):
            with models.model(each) as (model, _):
                for scorer in asked:
                    own, tokenizer = each.change(prompts), models.tokenizer(each)
                    scorer.read(each.name, model, tokenizer, own)
                del model
