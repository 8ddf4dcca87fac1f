"""Output projection and loss, without ever holding all logits.

A causal LM's forward stays as its authors wrote it. Only the call of its output projection is
answered differently while a loss is wanted: the hidden states of supervised tokens become a loss, and
the gradients of hidden states and projection with it, a chunk of tokens at a time (as in Liger
Kernel, Hsu et al., 2024). Inside that call a sharded weight is whole, wherever processes share it.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutput

from finetune.models import attention

# Logits at once, in the precision of the arithmetic: enough rows to keep matrix products busy.
CHUNK_BYTES = 256 * 2**20
# Of these so many at once in float32 on a CPU, whose cache holds them; on a GPU all.
BLOCK_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Finish:
    """What a model does to its logits after the projection: cap * tanh(scale * x / cap), or scale * x."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def backward_(self, grad: torch.Tensor, finished: torch.Tensor) -> None:
        """From the gradient of the finished logits to that of the raw ones, in place."""
        if self.cap is not None:
            grad.mul_(1 - (finished / self.cap) ** 2)  # tanh' = 1 - tanh^2
        if self.scale != 1.0:
            grad.mul_(self.scale)


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
            return CausalLMOutput(loss=_plain(logits, wanted, label_smoothing))
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
    others = [child for child in base.children() if child is not head]
    if head is None or not others:
        return None, "it has no output projection of its own"
    layers = max(others, key=lambda child: sum(p.numel() for p in child.parameters()))
    given = torch.cat([torch.linspace(-200, 200, 4001), torch.tensor([1e-3, 1e6])])[None, None]
    width = base.config.get_text_config().hidden_size
    device = next(base.parameters()).device
    states = torch.zeros(1, 1, width, device=device)
    try:
        with torch.no_grad(), _answering(layers, lambda *_, **__: _Outputs(states)), _answering(head, lambda _: given):
            got = base(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False).logits
    except Exception as exc:  # code of any author
        return None, f"its forward cannot be followed ({type(exc).__name__})"
    if got.shape != given.shape or got.device.type != "cpu":
        return None, "its forward does more than finish the logits"
    x, y = given.flatten().double(), got.flatten().double()
    slope, top = float(y[-2] / x[-2]), float(y[-1])
    for finish in (Finish(_tidy(slope)), Finish(_tidy(slope), _tidy(top))):
        if finish.scale > 0 and finish.cap != 0 and torch.allclose(finish(x), y, rtol=1e-4, atol=1e-5):
            return finish, None
    return None, "its forward does more than scale or cap the logits"


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


def _plain(logits_SV: torch.Tensor, targets_S: torch.Tensor, smoothing: float) -> torch.Tensor:
    return F.cross_entropy(logits_SV.float(), targets_S, reduction="sum", label_smoothing=smoothing)


# --------------------------------------------------------------------------------------- in chunks


def in_chunks(
    head: nn.Module, project: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, targets: torch.Tensor,
    vocab_size: int, finish: Finish, smoothing: float,
) -> torch.Tensor:  # fmt: skip
    """Sum of the losses of hidden [S, H] and targets int64 [S], float32; where the weights of `head` are whole.

    `project`: its own forward.
    """
    plain = _active(head)
    if type(plain) is nn.Linear:
        total: torch.Tensor = _ThroughMatrix.apply(hidden, plain.weight, plain.bias, targets, finish, smoothing)
        return total

    # Adapters on the head, quantised heads: a forward of their own, done again for the gradient.
    def of(states_CH: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
        return _plain(finish(project(states_CH).float()), targets_C, smoothing)

    parts = _chunks(len(hidden), vocab_size * 4, CHUNK_BYTES)
    return torch.stack([checkpoint(of, hidden[part], targets[part], use_reentrant=False) for part in parts]).sum()


class _ThroughMatrix(torch.autograd.Function):
    """The gradient is made along with the loss, chunk by chunk, and waits until it is asked for."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, finish: Finish, smoothing: float
    ) -> torch.Tensor:  # fmt: skip
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dtype = _arithmetic(hidden)
        states_SH, matrix_VH, shift_V = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(states_SH) if needs_hidden else None
        d_weight, d_bias = _Sum(), _Sum()
        parts = _chunks(len(hidden), len(weight) * states_SH.element_size(), CHUNK_BYTES)
        block_bytes = BLOCK_BYTES if hidden.device.type == "cpu" else 4 * CHUNK_BYTES
        logits_CV = states_SH.new_empty(parts[0].stop, len(weight))
        for part in parts:
            states_CH = states_SH[part]
            raw_CV = torch.mm(states_CH, matrix_VH.T, out=logits_CV[: len(states_CH)])
            if shift_V is not None:
                raw_CV += shift_V
            for block in _chunks(len(raw_CV), len(weight) * 4, block_bytes):
                total += _cross_entropy_(
                    raw_CV[block], targets[part][block], finish, smoothing, any(ctx.needs_input_grad)
                )
            if d_hidden is not None:
                torch.mm(raw_CV, matrix_VH, out=d_hidden[part])
            if needs_weight:
                d_weight.add(raw_CV.T @ states_CH)
            if needs_bias:
                d_bias.add(raw_CV.sum(0, dtype=torch.float32))
        found = (
            d_hidden if d_hidden is None else d_hidden.to(hidden.dtype),
            d_weight.of(weight) if needs_weight else None,
            d_bias.of(bias) if needs_bias else None,
        )
        ctx.save_for_backward(*found)
        return total

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> Any:
        return (
            *(None if grad is None else grad * outer.to(grad.dtype) for grad in ctx.saved_tensors),
            None,
            None,
            None,
        )


class _Sum:
    """A sum over chunks, in float32 as soon as there are two."""

    def __init__(self) -> None:
        self.total: torch.Tensor | None = None

    def add(self, part: torch.Tensor) -> None:
        self.total = part if self.total is None else self.total.float().add_(part)

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """In the dtype of what it is the gradient of."""
        return torch.zeros_like(weight) if self.total is None else self.total.to(weight.dtype)


def _cross_entropy_(
    raw_CV: torch.Tensor, targets_C: torch.Tensor, finish: Finish, smoothing: float, needs_grad: bool
) -> torch.Tensor:
    """Sum of losses in float32. What it is given becomes its gradient.

    The sum of exponentials is not needed: the highest probability is exp(highest logit) / sum, never less than 1 / V.
    """
    logits, targets = finish(raw_CV.float()), targets_C[:, None]
    chances = torch.softmax(logits, -1)
    highest = finish(raw_CV.amax(-1, keepdim=True).float())  # scales are positive, and tanh rises
    log_sums = highest - chances.amax(-1, keepdim=True).log()
    losses = log_sums - (1 - smoothing) * logits.gather(1, targets)
    if smoothing:
        losses -= smoothing * logits.mean(-1, keepdim=True)
    if needs_grad:
        if smoothing:
            chances -= smoothing / chances.shape[1]
        chances.scatter_add_(1, targets, torch.full_like(losses, smoothing - 1))
        finish.backward_(chances, logits)
        raw_CV.copy_(chances)
    return losses.sum()


def _chunks(num_rows: int, row_bytes: int, most_bytes: int) -> list[slice]:
    """Equal parts, near enough, of at most so many bytes; at least one."""
    count = max(1, -(-num_rows * row_bytes // most_bytes))
    rows = max(1, -(-num_rows // count))
    return [slice(start, min(start + rows, num_rows)) for start in range(0, max(num_rows, 1), rows)]


def _arithmetic(states: torch.Tensor) -> torch.dtype:
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype


def _active(head: nn.Module) -> nn.Module:
    """The projection itself, where peft keeps a trained copy of it beside the old one."""
    if isinstance(head, ModulesToSaveWrapper) and not head.disable_adapters and len(head.active_adapters) == 1:
        return head.modules_to_save[head.active_adapters[0]]
    return head
