"""The output projection that answers with losses and log-probabilities, so that all logits are
never in memory at once.

A causal LM's forward stays as its authors wrote it. Only the call of its output projection is
answered differently while these are wanted: the hidden states of supervised tokens become answers,
a chunk at a time. Inside that call a sharded weight is whole, however processes share it.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from finetune import failures
from finetune.models import attention_probe
from finetune.models.cross_entropy import logprobs_in_chunks, nll_in_chunks
from finetune.models.logits import LogitTransform, cross_entropy_sum, logprobs_and_entropy


@dataclass(frozen=True)
class Question:
    """What a forward pass is asked about some of its tokens.

    labels int64 [S] are the tokens that should come next, positions int64 [S] where in the
    flattened hidden states [B * T, H] they are to be predicted. want: any of WANTS. weights float32
    [S]: factors of the losses in nll. label_smoothing: the part of each label in nll that is spread
    over the vocabulary (Szegedy et al., 2016). block_bytes: bytes of logits that nll holds in
    float32 at once; None: what suits the device.
    """

    labels: torch.Tensor
    positions: torch.Tensor
    want: frozenset[str]
    weights: torch.Tensor | None = None
    label_smoothing: float = 0.0
    block_bytes: int | None = None


WANTS = frozenset({"nll", "logprobs", "entropy"})


def install(base: Any) -> str | None:
    """Let the forward of a causal LM take `question`, and answer it with a dict of tensors. Without
    one, it is as it was.

    None, or why all logits are held at once. With no tokens asked about, sums are 0 and still have
    a gradient (of zero), so that every process takes part in every backward pass.
    """
    finish, why = probe(base)
    head, forward, vocab_size = (
        base.get_output_embeddings(),
        base.forward,
        base.config.get_text_config().vocab_size,
    )

    @functools.wraps(forward)
    def answering(*arguments: Any, question: Question | None = None, **keywords: Any) -> Any:
        if question is None:
            return forward(*arguments, **keywords)
        if finish is None or base.holds_all_logits:
            return _of_logits(
                forward(*arguments, **keywords).logits.flatten(0, 1)[question.positions], question
            )
        project, given = head.forward, []

        def keep(hidden: torch.Tensor) -> torch.Tensor:
            given.append(hidden.flatten(0, -2)[question.positions])
            return hidden.new_zeros(
                (*hidden.shape[:-1], 0)
            )  # no logits, so that what follows costs nothing

        with _answering(head, keep):
            forward(*arguments, **keywords)
        (states,) = given

        def answer(hidden: torch.Tensor) -> dict[str, torch.Tensor]:
            return _of_states(head, project, hidden, vocab_size, finish, question)

        # A call of its own, whose result is the answer: ZeRO-3 makes weights whole before the
        # backward pass of a module whose result has a gradient.
        with _answering(head, answer):
            return head(states)

    base.forward, base.holds_all_logits = answering, finish is None
    return why


def _of_logits(logits: torch.Tensor, question: Question) -> dict[str, torch.Tensor]:
    answers = {}
    if "nll" in question.want:
        answers["nll"] = cross_entropy_sum(
            logits, question.labels, question.weights, question.label_smoothing
        )
    if question.want & {"logprobs", "entropy"}:
        answers |= _named(
            logprobs_and_entropy(logits, question.labels, "entropy" in question.want), question
        )
    return answers


def _of_states(
    head: nn.Module, project: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, vocab_size: int, finish: LogitTransform, question: Question
) -> dict[str, torch.Tensor]:  # fmt: skip
    answers = {}
    if "nll" in question.want:
        answers["nll"] = nll_in_chunks(
            head, project, hidden, question.labels, vocab_size, finish, question.label_smoothing,
            question.weights, question.block_bytes,
        )  # fmt: skip
    if question.want & {"logprobs", "entropy"}:
        found = logprobs_in_chunks(
            project, hidden, question.labels, vocab_size, finish, "entropy" in question.want
        )
        answers |= _named(found, question)
    return answers


def _named(found: tuple[torch.Tensor, torch.Tensor], question: Question) -> dict[str, torch.Tensor]:
    return {
        name: value for name, value in zip(("logprobs", "entropy"), found) if name in question.want
    }


def check(model: Any, base: Any, device: torch.device, precision: str) -> str | None:
    """Let a dozen random tokens show that the loss is that of all logits; where it is not, all are
    held from now on, and this says so.

    `base` is the model inside its wrappers. To be called by all processes that share the model.
    """
    if base.holds_all_logits:
        return None
    ids = torch.randint(
        base.config.get_text_config().vocab_size,
        (2, 12),
        generator=torch.Generator().manual_seed(0),
    ).to(device)
    inputs, positions = (
        attention_probe.inputs_of(ids[:1], [12], base),
        torch.arange(0, 12, 2, device=device),
    )
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
    return (
        f"the loss of {base.config.model_type} in chunks is {own:.6g} where it should be "
        f"{wanted:.6g}"
        if base.holds_all_logits
        else None
    )


def probe(base: Any) -> tuple[LogitTransform | None, str | None]:
    """(what the model's own code does between projection and logits, None), or (None, why that is
    unknown).

    Found by running that code: numbers take the place of what the projection gives. The layers are
    passed over, so the model may be without weights.
    """
    head = base.get_output_embeddings()
    if head is None:
        return None, "it has no output projection of its own"
    others = [child for child in base.children() if child is not head]
    why: str | None = None
    # What the forward calls is one or the other, and not always what transformers calls the
    # decoder.
    for layers in (base.get_decoder(), *sorted(others, key=_size, reverse=True)[:1]):
        if layers is not base:
            finish, why = _probe(base, head, layers)
            if finish is not None:
                return finish, None
    return None, why or "it has no layers apart from its output projection"


def _probe(
    base: Any, head: nn.Module, layers: nn.Module
) -> tuple[LogitTransform | None, str | None]:
    given = torch.cat([torch.linspace(-200, 200, 4001), torch.tensor([1e-3, 1e6])])[None, None]
    device = next(base.parameters()).device
    try:
        states = torch.zeros(1, 1, base.config.get_text_config().hidden_size, device=device)
        with (
            torch.no_grad(),
            _answering(layers, lambda *_, **__: _Outputs(states)),
            _answering(head, lambda _: given),
        ):
            got = base(
                input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False
            ).logits
    except Exception as exc:  # code of any author
        failures.reraise(exc)
        return None, f"its forward cannot be followed ({type(exc).__name__})"
    if got.shape != given.shape or got.device.type != "cpu":
        return None, "its forward does more than finish the logits"
    x, y = given.flatten().double(), got.flatten().double()
    slope, top = float(y[-2] / x[-2]), float(y[-1])
    for finish in (LogitTransform(_tidy(slope)), LogitTransform(_tidy(slope), _tidy(top))):
        if (
            finish.scale > 0
            and finish.cap != 0
            and torch.allclose(finish(x), y, rtol=1e-4, atol=1e-5)
        ):
            return finish, None
    return None, "its forward does more than scale or cap the logits"


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


class _Outputs(dict[str, Any]):
    """What layers answer with, for any way to ask for it."""

    def __init__(self, states: torch.Tensor) -> None:
        super().__init__(last_hidden_state=states)
        self.last_hidden_state = states

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, key: Any) -> Any:
        return self.last_hidden_state if key in (0, "last_hidden_state") else None


class _answering:
    """A module answers as a function does, for a while; its hooks are called as ever."""

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
    """What a config says, from what float32 has made of it."""
    return float(f"{value:.6g}")
