"""Cross-entropy of hidden states through a projection, in chunks of tokens.

The gradient is made along with the loss, as in Liger Kernel (Hsu et al., 2024): when the logits of
a chunk are there, so is all that their gradient needs, and the next chunk may have their place.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from finetune.models.logits import LogitTransform, cross_entropy_, cross_entropy_sum

# Logits at once, in the precision of the arithmetic: enough rows to keep matrix products busy.
CHUNK_BYTES = 256 * 2**20
# Tokens of a chunk in float32 at once on a CPU, whose cache holds them; on a GPU all.
BLOCK_BYTES = 4 * 2**20


def block_bytes(device_type: str) -> int:
    """Most bytes of logits that are in float32 at once."""
    return BLOCK_BYTES if device_type == "cpu" else 4 * CHUNK_BYTES


def nll_in_chunks(
    head: nn.Module, project: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor,
    labels: torch.Tensor, vocab_size: int, finish: LogitTransform, smoothing: float = 0.0,
    weights: torch.Tensor | None = None, most_bytes: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """Sum the losses of hidden [S, H] and labels int64 [S], each times its weight, in float32.

    Call it where the weights of `head` are whole. `project`: the head's own forward. `weights`:
    float32 [S]. `most_bytes`: as `block_bytes`.
    """
    linear = _active(head)
    if type(linear) is nn.Linear:
        tensors = [hidden, linear.weight, linear.bias]
        # In evaluation: inside, a weight that trains would still ask for its gradient.
        if not torch.is_grad_enabled():
            tensors = [tensor if tensor is None else tensor.detach() for tensor in tensors]
        most = most_bytes or block_bytes(hidden.device.type)
        total: torch.Tensor = _ThroughMatrix.apply(
            *tensors, labels, weights, finish, smoothing, most
        )
        return total

    # Adapters on the head, quantised heads: a forward of their own, done again for the gradient.
    def of(
        states_CH: torch.Tensor, labels_C: torch.Tensor, weights_C: torch.Tensor | None
    ) -> torch.Tensor:
        return cross_entropy_sum(finish(project(states_CH).float()), labels_C, weights_C, smoothing)

    sums = []
    for part in chunks(len(hidden), vocab_size * 4, CHUNK_BYTES):
        of_part = None if weights is None else weights[part]
        sums.append(checkpoint(of, hidden[part], labels[part], of_part, use_reentrant=False))
    return torch.stack(sums).sum()


class _ThroughMatrix(torch.autograd.Function):
    """Makes the gradient along with the loss, chunk by chunk, and keeps it until backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
        labels: torch.Tensor, weights: torch.Tensor | None, finish: LogitTransform,
        smoothing: float, most_bytes: int,
    ) -> torch.Tensor:  # fmt: skip
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dtype = arithmetic(hidden)
        states_SH, matrix_VH = hidden.to(dtype), weight.to(dtype)
        shift_V = None if bias is None else bias.to(dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(states_SH) if needs_hidden else None
        d_weight, d_bias = _Sum(), _Sum()
        parts = chunks(len(hidden), len(weight) * states_SH.element_size(), CHUNK_BYTES)
        logits_CV = states_SH.new_empty(parts[0].stop, len(weight))
        for part in parts:
            states_CH = states_SH[part]
            raw_CV = torch.mm(states_CH, matrix_VH.T, out=logits_CV[: len(states_CH)])
            if shift_V is not None:
                raw_CV += shift_V
            for block in chunks(len(raw_CV), len(weight) * 4, most_bytes):
                of_block = None if weights is None else weights[part][block]
                total += cross_entropy_(
                    raw_CV[block], labels[part][block], of_block, finish, smoothing,
                    needs_grad=any(ctx.needs_input_grad),
                )  # fmt: skip
            if d_hidden is not None:
                torch.mm(raw_CV, matrix_VH, out=d_hidden[part])
            if needs_weight:
                # Autocast would convert the product's float32 back to 16 bits.
                with torch.autocast(hidden.device.type, enabled=False):
                    d_weight.add_product(raw_CV.T, states_CH)
            if needs_bias:
                d_bias.add(raw_CV.sum(0, dtype=torch.float32))
        d_hidden = d_hidden if d_hidden is None else d_hidden.to(hidden.dtype)
        of_weight = d_weight.of(weight) if needs_weight else None
        ctx.save_for_backward(d_hidden, of_weight, d_bias.of(bias) if needs_bias else None)
        return total

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> Any:
        # In place: that of the weights is as large as they are. A second backward pass is PyTorch's
        # error, not a wrong number.
        saved = (None if grad is None else grad.mul_(outer) for grad in ctx.saved_tensors)
        return *saved, *[None] * 5


class _Sum:
    """A sum over chunks, in float32 as soon as there are two."""

    def __init__(self) -> None:
        self.total: torch.Tensor | None = None

    def add(self, part: torch.Tensor) -> None:
        self.total = part if self.total is None else self.total.float().add_(part)

    def add_product(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add left @ right. A GPU's product of 16 bits adds to float32 as it writes.

        In float16 a sum over many tokens may overflow, here, where no loss scale reaches.
        """
        if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
            if self.total is None:
                self.total = torch.mm(left, right, out_dtype=torch.float32)
            else:
                torch.addmm(self.total, left, right, out_dtype=torch.float32, out=self.total)
        elif left.dtype == torch.float16:
            self.add(left.float() @ right.float())
        else:
            self.add(left @ right)

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the sum in the dtype of `weight`, whose gradient it is."""
        return torch.zeros_like(weight) if self.total is None else self.total.to(weight.dtype)


def chunks(num_rows: int, row_bytes: int, most_bytes: int) -> list[slice]:
    """Cut rows into nearly equal parts of at most `most_bytes`; at least one part."""
    count = max(1, -(-num_rows * row_bytes // most_bytes))
    rows = max(1, -(-num_rows // count))
    return [slice(start, min(start + rows, num_rows)) for start in range(0, max(num_rows, 1), rows)]


def arithmetic(states: torch.Tensor) -> torch.dtype:
    """Return in which dtype these states are multiplied: autocast's, else their own."""
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype


def _active(head: nn.Module) -> nn.Module:
    """Return the projection itself, where peft keeps a trained copy of it next to the old one."""
    wrapper: Any = head
    is_copied = type(head).__name__ == "ModulesToSaveWrapper"  # peft's, whose import takes long
    if is_copied and not wrapper.disable_adapters and len(wrapper.active_adapters) == 1:
        copied: nn.Module = wrapper.modules_to_save[wrapper.active_adapters[0]]
        return copied
    return head
