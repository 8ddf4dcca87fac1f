"""An output projection that answers with losses, so that all logits are never in memory at once.

A causal LM's forward stays as its authors wrote it. Only the call of its output projection returns
something else while losses are wanted: the hidden states of supervised tokens become answers, a
chunk at a time. Inside that call a sharded weight is whole, however processes share it.

Why not `logits_to_keep` of transformers: it keeps the last tokens or a list of positions, and still
holds a row of logits for each; and some forwards scale or cap what they return.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from finetune import failures
from finetune.models import attention_probe, families, scalar_heads
from finetune.models.cross_entropy import nll_in_chunks
from finetune.models.distributions import (
    Distribution,
    Reference,
    divergence_in_chunks,
    logprobs_in_chunks,
    predictions_in_chunks,
)
from finetune.models.logits import (
    LogitTransform,
    cross_entropy_sum,
    logprobs_and_entropy,
)


@dataclass(frozen=True)
class Question:
    """What a forward pass is asked about some of its tokens.

    labels int64 [S] are the tokens that should come next, positions int64 [S] where in the
    flattened hidden states [B * T, H] they are to be predicted. want: any of WANTS. weights float32
    [S]: factors of the losses in nll. label_smoothing: the part of each label in nll that is spread
    over the vocabulary (Szegedy et al., 2016). block_bytes: bytes of logits that nll holds in
    float32 at once; None: what suits the device. ends int64 [D]: where in the flattened hidden
    states documents end, for scores; -1: elsewhere. reference and beta: of the divergence.
    temperature: what divides the logits of logprobs, entropy and divergence.
    """

    labels: torch.Tensor
    positions: torch.Tensor
    want: frozenset[str]
    weights: torch.Tensor | None = None
    label_smoothing: float = 0.0
    block_bytes: int | None = None
    ends: torch.Tensor | None = None
    reference: Reference | None = None
    beta: float = 0.0
    temperature: float = 1.0


OF_TOKENS = frozenset({"nll", "logprobs", "entropy", "divergence"})
NO_GRADIENT = frozenset({"distribution", "predictions"})
WANTS = OF_TOKENS | NO_GRADIENT | scalar_heads.NAMES.keys()
Answers = dict[str, Any]


def install(base: Any) -> str | None:
    """Let the forward of a model take a `question` and answer it with a dict of tensors.

    Without a question it is as it was. Return None, or why all logits are held at once. With no
    tokens to ask about, sums are 0 and still have a gradient (of zero), as have heads that are not
    asked, so that every process takes part in every backward pass.
    """
    if families.of_model(base) == families.SCORES:
        _install_scores(base)
        return None
    finish, why = probe(base)
    head, forward = base.get_output_embeddings(), base.forward
    vocab_size = base.config.get_text_config().vocab_size

    @functools.wraps(forward)
    def answering(*arguments: Any, question: Question | None = None, **keywords: Any) -> Any:
        if question is None:
            return forward(*arguments, **keywords)
        scalars, given = scalar_heads.of(base), list[torch.Tensor]()
        if missing := question.want & (scalar_heads.NAMES.keys() - scalars.keys()):
            raise ValueError(f"the model has no head for {', '.join(sorted(missing))}")

        def keep(hidden: torch.Tensor) -> None:
            flat = hidden.flatten(0, -2)
            given.append(flat[question.positions])
            if scalars and question.ends is not None:
                given.append(flat[question.ends.clamp(min=0)])

        if finish is None or base.holds_all_logits:
            # A model whose transform is unknown may have no head.
            hook = head.register_forward_pre_hook(lambda _, got: keep(got[0])) if scalars else None
            try:
                logits = forward(*arguments, **keywords).logits.flatten(0, -2)
            finally:
                if hook is not None:
                    hook.remove()
            answers = _of_logits(logits[question.positions], question)
            return _complete(answers, scalars, given, question)
        project = head.forward

        def skip(hidden: torch.Tensor) -> torch.Tensor:
            keep(hidden)
            # An empty tensor, so that what follows costs nothing.
            return hidden.new_zeros((*hidden.shape[:-1], 0))

        with _answering(head, skip), _zeros_for_biases(base):
            forward(*arguments, **keywords)

        def answer(hidden: torch.Tensor) -> Answers:
            return _of_states(head, project, hidden, vocab_size, finish, question)

        # A call of its own, whose result is the answer: ZeRO-3 makes weights whole before the
        # backward pass of a module whose result has a gradient.
        with _answering(head, answer):
            answers = head(given[0])
        return _complete(answers, scalars, given, question)

    base.forward, base.holds_all_logits = answering, finish is None
    return why


def _install_scores(base: Any) -> None:
    """Do the same for a model whose only head scores: `scores` of documents, `values` of tokens."""
    head, forward = families.score_head(base), base.forward

    @functools.wraps(forward)
    def answering(*arguments: Any, question: Question | None = None, **keywords: Any) -> Any:
        if question is None:
            return forward(*arguments, **keywords)
        if missing := question.want - scalar_heads.NAMES.keys():
            raise ValueError(f"a model that scores has no {', '.join(sorted(missing))}")
        given, ends = list[torch.Tensor](), question.ends

        def skip(hidden: torch.Tensor) -> torch.Tensor:
            given.append(hidden.flatten(0, -2))
            return hidden.new_zeros((*hidden.shape[:-1], 1))

        def answer(hidden: torch.Tensor) -> torch.Tensor:
            return scalar_heads.project(hidden, head.weight)

        with _answering(head, skip):
            forward(*arguments, **keywords)
        places = {"values": question.positions, "scores": None if ends is None else ends.clamp(0)}
        answers = {}
        with _answering(head, answer):  # a call of its own, as above
            for name in sorted(question.want):
                answers[name] = head(given[0][places[name]])
        if "scores" in answers and ends is not None:
            answers["scores"] = torch.where(ends >= 0, answers["scores"], 0.0)
        return answers

    base.forward, base.holds_all_logits = answering, True


def _of_logits(logits: torch.Tensor, question: Question) -> Answers:
    answers: Answers = {}
    labels = question.labels
    if "nll" in question.want:
        smoothing = question.label_smoothing
        answers["nll"] = cross_entropy_sum(logits, labels, question.weights, smoothing)
    if question.want & {"logprobs", "entropy"}:
        found = logprobs_and_entropy(
            logits, labels, "entropy" in question.want, question.temperature
        )
        answers |= _named(found, question)
    if question.reference is not None:
        reference = question.reference
        answers["divergence"] = reference.divergence(
            logits, reference.tensors, question.beta, question.temperature
        )
    if "distribution" in question.want:
        answers["distribution"] = Distribution(logits.detach(), torch.Tensor.float)
    if "predictions" in question.want:
        answers["predictions"] = logits.argmax(-1)
    if not question.want <= OF_TOKENS:
        answers[IDLE] = logits[:0].float().sum()
    return answers


def _of_states(
    head: nn.Module, project: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor,
    vocab_size: int, finish: LogitTransform, question: Question,
) -> Answers:  # fmt: skip
    answers: Answers = {}
    if "nll" in question.want:
        answers["nll"] = nll_in_chunks(
            head, project, hidden, question.labels, vocab_size, finish, question.label_smoothing,
            question.weights, question.block_bytes,
        )  # fmt: skip
    if question.want & {"logprobs", "entropy"}:
        found = logprobs_in_chunks(
            project, hidden, question.labels, vocab_size, finish, "entropy" in question.want,
            question.temperature,
        )  # fmt: skip
        answers |= _named(found, question)
    if question.reference is not None:
        answers["divergence"] = divergence_in_chunks(
            project, hidden, vocab_size, finish, question.reference, question.beta,
            question.temperature,
        )  # fmt: skip
    if "distribution" in question.want:
        answers["distribution"] = Distribution.of(head, project, hidden, finish)
    if "predictions" in question.want:
        answers["predictions"] = predictions_in_chunks(project, hidden, vocab_size, finish)
    if not question.want <= OF_TOKENS:
        answers[IDLE] = project(hidden[:0]).float().sum()
    return answers


IDLE = "idle"  # zero, whose gradient gives the projection one of zero


def _complete(
    answers: Answers, scalars: dict[str, scalar_heads.ScalarHead], given: list[torch.Tensor],
    question: Question,
) -> Answers:  # fmt: skip
    """Add what the scalar heads answer. `given`: states [S, H] of tokens, [D, H] of ends."""
    idle = {IDLE: answers.pop(IDLE)} if IDLE in answers else {}
    if not scalars:
        return answers
    for name, scalar in scalars.items():
        if name == "values" and name in question.want:
            answers[name] = scalar(given[0])
        elif name in question.want:
            assert question.ends is not None
            answers[name] = torch.where(question.ends >= 0, scalar(given[1]), 0.0)
        idle[name] = (answers[name] if name in answers else scalar(given[0][:0]))[:0].sum()
    names = [name for name in answers if name not in NO_GRADIENT]
    found = _Together.apply([*idle], names, *idle.values(), *(answers[name] for name in names))
    return answers | dict(zip(names, found))


class _Together(torch.autograd.Function):
    """Gives a gradient of zero to the projection or head whose answers the loss does without.

    They were not asked, or are only logged; DDP waits for the gradients of all weights.
    """

    @staticmethod
    def forward(
        ctx: Any, idle: list[str], names: list[str], *given: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.idle, ctx.names = idle, names
        ctx.set_materialize_grads(False)
        return given[len(idle) :]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        there = {name: each for name, each in zip(ctx.names, gradients) if each is not None}
        used = {IDLE if name in OF_TOKENS else name for name in there}
        zero = next(iter(there.values())).new_zeros(())
        return None, None, *(None if name in used else zero for name in ctx.idle), *gradients


def _named(found: tuple[torch.Tensor, torch.Tensor], question: Question) -> dict[str, torch.Tensor]:
    both = zip(("logprobs", "entropy"), found)
    return {name: value for name, value in both if name in question.want}


def check(model: Any, base: Any, device: torch.device, precision: str) -> str | None:
    """Check on a dozen random tokens that the loss in chunks is that of all logits.

    Where it is not, the model holds all logits from now on, and this returns why. `base` is the
    model inside its wrappers. Collective where processes share the model.
    """
    if base.holds_all_logits:
        return None
    vocab_size, random = base.config.get_text_config().vocab_size, torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (2, 12), generator=random).to(device)
    inputs = attention_probe.inputs_of(ids[:1], [12], base)
    positions = torch.arange(0, 12, 2, device=device)
    question = Question(ids[1][positions], positions, frozenset({"nll"}))
    was_training = model.training
    model.eval()
    with torch.no_grad():
        own = model(**inputs, question=question)["nll"].item()
        base.holds_all_logits = True
        wanted = model(**inputs, question=question)["nll"].item()
    model.train(was_training)
    exact = precision == "fp32" and next(model.parameters()).dtype == torch.float32
    base.holds_all_logits = not math.isclose(own, wanted, rel_tol=1e-4 if exact else 2e-2)
    if not base.holds_all_logits:
        return None
    kind = base.config.model_type
    return f"the loss of {kind} in chunks is {own:.6g} where it should be {wanted:.6g}"


def probe(base: Any) -> tuple[LogitTransform | None, str | None]:
    """Find out what the model's own code does between projection and logits, by running it.

    Numbers take the place of what the projection returns. The layers are passed over, so the model
    may be without weights. Return (the transform, None), or (None, why it is unknown), or (None,
    None) for a classifier: its logits are few, so all of them are there.
    """
    head = base.get_output_embeddings()
    if not families.of_model(base).has_vocabulary:  # the logits of a few labels
        return None, None
    if head is None:
        return None, "it has no output projection of its own"
    others = [child for child in base.children() if child is not head]
    why: str | None = None
    # What the forward calls is one or the other, and not always what transformers calls the
    # decoder.
    for layers in (base.get_decoder(), *sorted(others, key=_size, reverse=True)[:1]):
        if layers is not base and layers is not head:  # ModernBERT calls its head decoder
            finish, why = _probe(base, head, layers)
            if finish is not None:
                return finish, None
    return None, why or "it has no layers apart from its output projection"


def _probe(
    base: Any, head: nn.Module, layers: nn.Module
) -> tuple[LogitTransform | None, str | None]:
    device = next(base.parameters()).device
    encoder = base.get_encoder() if families.of_model(base) == families.SEQ2SEQ else layers
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    try:
        text = base.config.get_text_config()
        # A grid for the shape, then a slope near 0 and the limit far from it. At least as many
        # numbers as words, as some forwards cut those that only pad the vocabulary.
        grid = torch.linspace(-200, 200, max(4001, text.vocab_size))
        given = torch.cat([grid, torch.tensor([1e-3, 1e6])])[None, None]
        states = torch.zeros(1, 1, text.hidden_size, device=device)
        with (
            torch.no_grad(),
            _zeros_for_biases(base),
            _answering(layers, lambda *_, **__: _Outputs(states)),
            _answering(encoder, lambda *_, **__: _Outputs(states)),
            _answering(head, lambda _: given),
        ):
            got = base(input_ids=token, use_cache=False).logits
    except Exception as exc:  # code of any author
        failures.reraise(exc)
        return None, f"its forward cannot be followed ({type(exc).__name__})"
    if got.shape != given.shape or got.device.type != "cpu":
        return None, "its forward does more than finish the logits"
    x, y = given.flatten().double(), got.flatten().double()
    slope, top = float(y[-2] / x[-2]), float(y[-1])
    for finish in (LogitTransform(_tidy(slope)), LogitTransform(_tidy(slope), _tidy(top))):
        is_one = finish.scale > 0 and finish.cap != 0
        if is_one and torch.allclose(finish(x), y, rtol=1e-4, atol=1e-5):
            return finish, None
    return None, "its forward does more than scale or cap the logits"


@contextmanager
def _zeros_for_biases(base: Any) -> Iterator[None]:
    """Put one zero in place of buffers with a number for each word, which BART adds to its logits.

    They hold zeros in nearly all models; `check` finds those where they do not.
    """
    before, size = dict(base._buffers), base.config.get_text_config().vocab_size
    for name, buffer in before.items():
        if buffer is not None and buffer.shape[-1:] == (size,):
            base._buffers[name] = torch.zeros(buffer.dim() * [1])
    try:
        yield
    finally:
        base._buffers.update(before)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


class _Outputs(dict[str, Any]):
    """Stands for the output of layers, for any way to ask for it."""

    def __init__(self, states: torch.Tensor) -> None:
        super().__init__(last_hidden_state=states)
        self.last_hidden_state = states

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, key: Any) -> Any:
        return self.last_hidden_state if key in (0, "last_hidden_state") else None


class _answering:
    """Puts a function in place of a module's forward inside the block; its hooks still run."""

    def __init__(self, module: nn.Module, answer: Callable[..., Any]) -> None:
        self.module, self.answer, self.before = module, answer, module.__dict__.get("forward")

    def __enter__(self) -> None:
        self.module.__dict__["forward"] = self.answer

    def __exit__(self, *_: object) -> None:
        if self.before is None:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self.before


def _tidy(value: float) -> float:
    """Round to what a config says, from what float32 has made of it."""
    return float(f"{value:.6g}")
