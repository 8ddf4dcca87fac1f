"""A judge on this machine: the probabilities of its options, from one forward pass."""

import inspect
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from finetune.config.base import require_model
from finetune.data.conversations import Message
from finetune.data.tokens import encode_prompt
from finetune.errors import ModelError
from finetune.evaluation.judges.weights import Note, Question, Weights
from finetune.export.load import commit_of, load, load_tokenizer, weights_in
from finetune.generation import generate
from finetune.models import families

BATCH_TOKENS = 8_192  # of a forward pass, padding included
MOST_AT_ONCE = 16  # prompts of a pass: its logits are at most [16, 16, vocabulary]
LONGER = 4  # letters that a vocabulary writes for white space around an option


class LocalJudge:
    """A causal model with a chat template, loaded when it is first asked."""

    def __init__(self, path: str, trust_remote_code: bool = False, option: str = "--judge") -> None:
        require_model(path, option)
        self.name = Path(path).parent.name if Path(path).name == "model" else Path(path).name
        commit = commit_of(path)
        self.identity = f"{path} {commit or weights_in(Path(path))}"
        self._tokenizer = load_tokenizer(path, trust_remote_code, commit)
        if not self._tokenizer.chat_template:
            what = f"{option}: {path}: its tokenizer has no chat template"
            raise ModelError(f"{what}; choose a model that answers instructions")
        self._load: Callable[[], Any] = lambda: load(
            path, trust_remote_code=trust_remote_code, revision=commit
        )
        self._path, self._option = path, option
        self._loaded: Any = None
        self._spellings: dict[str, list[int]] = {}

    @property
    def model(self) -> Any:
        """Return the model; with all answers in the file it is never needed."""
        if self._loaded is None:
            found = self._load()
            if families.is_encoder_decoder(found.config):
                what = f"{self._option}: {self._path} is an encoder-decoder"
                raise ModelError(f"{what}; choose a causal model")
            self._loaded = found.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        return self._loaded

    def write(self, prompt: str, max_tokens: int) -> str:
        asked = generate.chat_prompt(self._tokenizer, [Message("user", prompt)])
        [answer] = generate.answers(
            self.model, self._tokenizer, [asked], max_new_tokens=max_tokens, batch_size=1,
            title="evaluation steps",
        )  # fmt: skip
        self._loaded = None  # the models to judge come before its next question
        return generate.without_opening(answer.text, generate.opening_of(self._tokenizer))

    def weigh(self, questions: Sequence[Question], note: Note) -> None:
        context = getattr(self.model.config, "max_position_embeddings", None) or 1 << 30
        asked: list[tuple[int, list[int], dict[str, list[int]]]] = []
        for number, question in enumerate(questions):
            ids, spelled = self._encoded(question)
            if len(ids) > context:
                why = f"the judge's prompt has {len(ids):,} tokens, and its context {context:,}"
                note(number, Weights({}, 0.0, "", why))
            else:
                asked.append((number, ids, spelled))
        bar = tqdm(total=len(asked), desc="judging", unit=" answers", disable=None, leave=False)
        for batch in _batches(asked):
            chances = last_probabilities(self.model, [ids for _, ids, _ in batch])
            for (number, _, spelled), row in zip(batch, chances):
                best = self._tokenizer.decode([int(row.argmax())])
                found = {option: float(row[ids].sum()) for option, ids in spelled.items()}
                note(number, Weights(found, max(0.0, 1 - sum(found.values())), best))
            bar.update(len(batch))
        bar.close()

    def _encoded(self, question: Question) -> tuple[list[int], dict[str, list[int]]]:
        """Return the tokens up to the options, and the tokens that spell each option there.

        A tokenizer may put a token of white space before an option: what the encodings of all
        options have in common belongs to the prompt.
        """
        text = generate.chat_prompt(self._tokenizer, [Message("user", question.prompt)])
        whole = [encode_prompt(text + option, self._tokenizer) for option in question.options]
        common = len(list(takewhile(lambda each: len(set(each)) == 1, zip(*whole))))
        spelled = {}
        for option, ids in zip(question.options, whole):
            spelled[option] = sorted({*self._alone(option), *ids[common : common + 1]})
        return whole[0][:common], spelled

    def _alone(self, option: str) -> list[int]:
        """Return every token that is the option, perhaps with white space."""
        if option not in self._spellings:
            byte = f"<0x{ord(option):02X}>" if len(option) == 1 else None
            near = [
                number
                for token, number in self._tokenizer.get_vocab().items()
                if token == byte or (option in token and len(token) <= len(option) + LONGER)
            ]
            self._spellings[option] = [
                number for number in near if self._tokenizer.decode([number]).strip() == option
            ]
        return self._spellings[option]


def _batches(asked: list[Any]) -> list[list[Any]]:
    """Return questions in batches of at most BATCH_TOKENS and MOST_AT_ONCE, the longest first."""
    batches: list[list[Any]] = []
    for each in sorted(asked, key=lambda each: -len(each[1])):
        longest = len(batches[-1][0][1]) if batches else 0
        count = len(batches[-1]) + 1 if batches else MOST_AT_ONCE + 1
        if count > MOST_AT_ONCE or longest * count > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(each)
    return batches


@torch.no_grad()
def last_probabilities(model: Any, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return the probabilities of the token after each prompt, float64 [prompts, vocabulary].

    Padding stands on the right, where no token of a causal model sees it.
    """
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    ids = torch.tensor([[*each, *[0] * (longest - len(each))] for each in prompts], device=device)
    mask = torch.tensor(
        [[1] * len(each) + [0] * (longest - len(each)) for each in prompts], device=device
    )
    ends = torch.tensor([len(each) - 1 for each in prompts], device=device)
    kept, places = torch.unique(ends, return_inverse=True)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:
        options["logits_to_keep"] = kept
    else:
        places = ends
    logits = model(input_ids=ids, attention_mask=mask, **options).logits
    chosen = logits[torch.arange(len(prompts), device=device), places]
    return chosen.double().softmax(-1).cpu()
