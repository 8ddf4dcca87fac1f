"""The output projection that answers with a loss, so that all logits are never in memory at once.

A causal LM's forward stays as its authors wrote it. Only the call of its output projection is
answered differently while a loss is wanted: the hidden states of supervised tokens become one, a
chunk at a time. Inside that call a sharded weight is whole, however processes share it.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from finetune import failures
from finetune.models import attention
from finetune.models.cross_entropy import Finish, in_chunks, plain


def loss_sum(
    model: Any, inputs: dict[str, Any], targets: torch.Tensor, learned: torch.Tensor, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Sum of the cross-entropies of all supervised tokens, float32 scalar, in nats.

    `inputs` are the keyword arguments of a model that `install` has prepared; targets int64 [B, T] hold
    the next token, and `learned` int64 [S] where in the flattened targets something is learned. With
    nothing supervised the sum is 0 and still has a gradient (of zero), so that every process takes
    part in every backward pass. `label_smoothing`: a part of each target spread over the vocabulary
    (Szegedy et al., 2016).
    """
    total: torch.Tensor = model(**inputs, targets=targets, learned=learned, label_smoothing=label_smoothing).loss
    return total


def install(base: Any) -> str | None:
    """Let the forward of a causal LM take what `loss_sum` gives it, and answer with a loss. Without it, it is as it was.

    None, or why all logits are held at once.
    """
    finish, why = probe(base)
    head, forward, vocab_size = base.get_output_embeddings(), base.forward, base.config.get_text_config().vocab_size

    @functools.wraps(forward)
    def with_loss(
        *arguments: Any, targets: torch.Tensor | None = None, learned: torch.Tensor | None = None, label_smoothing: float = 0.0,
        **keywords: Any,
    ) -> Any:  # fmt: skip
        if targets is None or learned is None:
            return forward(*arguments, **keywords)
        wanted = targets.flatten()[learned]
        if finish is None or base.holds_all_logits:
            logits = forward(*arguments, **keywords).logits.flatten(0, 1)[learned]
            return CausalLMOutput(loss=plain(logits, wanted, label_smoothing))
        project, given = head.forward, []

        def keep(hidden: torch.Tensor) -> torch.Tensor:
            given.append(hidden.flatten(0, -2)[learned])
            return hidden.new_zeros((*hidden.shape[:-1], 0))  # what is done to logits is done to none

        with _answering(head, keep):
            forward(*arguments, **keywords)
        (states,) = given

        def answer(hidden: torch.Tensor) -> torch.Tensor:
            return in_chunks(head, project, hidden, wanted, vocab_size, finish, label_smoothing)

        # A call of its own, whose result is the loss: ZeRO-3 makes weights whole before the backward pass of a module
        # whose result has a gradient.
        with _answering(head, answer):
            return CausalLMOutput(loss=head(states))

    base.forward, base.holds_all_logits = with_loss, finish is None
    return why


def check(model: Any, base: Any, device: torch.device, precision: str) -> str | None:
    """Let a dozen random tokens show that the loss is that of all logits; where it is not, all are held from now on, and this says so.

    `base` is the model inside its wrappers. To be called by all processes that share the model.
    """
    if base.holds_all_logits:
        return None
    ids = torch.randint(
        base.config.get_text_config().vocab_size, (2, 12), generator=torch.Generator().manual_seed(0)
    ).to(device)
    inputs, targets = attention.inputs_of(ids[:1], [12], base), ids[1:]
    learned = torch.arange(0, 12, 2, device=device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        own = loss_sum(model, inputs, targets, learned).item()
        base.holds_all_logits = True
        wanted = loss_sum(model, inputs, targets, learned).item()
    model.train(was_training)
    exact = precision == "fp32" and next(model.parameters()).dtype == torch.float32
    base.holds_all_logits = not math.isclose(own, wanted, rel_tol=1e-4 if exact else 2e-2)
    return (
        f"the loss of {base.config.model_type} in chunks is {own:.6g} where it should be {wanted:.6g}"
        if base.holds_all_logits
        else None
    )


def probe(base: Any) -> tuple[Finish | None, str | None]:
    """(what the model's own code does between projection and logits, None), or (None, why that is unknown).

    Found by running that code: numbers take the place of what the projection gives. The layers are
    passed over, so the model may be without weights.
    """
    head = base.get_output_embeddings()
    if head is None:
        return None, "it has no output projection of its own"
    others = [child for child in base.children() if child is not head]
    why: str | None = None
    # What the forward calls is one or the other, and not always what transformers calls the decoder.
    for layers in (base.get_decoder(), *sorted(others, key=_size, reverse=True)[:1]):
        if layers is not base:
            finish, why = _probe(base, head, layers)
            if finish is not None:
                return finish, None
    return None, why or "it has no layers apart from its output projection"


def _probe(base: Any, head: nn.Module, layers: nn.Module) -> tuple[Finish | None, str | None]:
    given = torch.cat([torch.linspace(-200, 200, 4001), torch.tensor([1e-3, 1e6])])[None, None]
    device = next(base.parameters()).device
    try:
        states = torch.zeros(1, 1, base.config.get_text_config().hidden_size, device=device)
        with torch.no_grad(), _answering(layers, lambda *_, **__: _Outputs(states)), _answering(head, lambda _: given):
            got = base(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False).logits
    except Exception as exc:  # code of any author
        failures.reraise(exc)
        return None, f"its forward cannot be followed ({type(exc).__name__})"
    if got.shape != given.shape or got.device.type != "cpu":
        return None, "its forward does more than finish the logits"
    x, y = given.flatten().double(), got.flatten().double()
    slope, top = float(y[-2] / x[-2]), float(y[-1])
    for finish in (Finish(_tidy(slope)), Finish(_tidy(slope), _tidy(top))):
        if finish.scale > 0 and finish.cap != 0 and torch.allclose(finish(x), y, rtol=1e-4, atol=1e-5):
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
