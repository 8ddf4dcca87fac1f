"""One step of the real model on tensors that have shapes and no memory, and a ledger of what it
would have held.

Nothing is estimated from a formula: the model's own forward, with its adapters, its attention, its
recomputation and its loss, runs under PyTorch's FakeTensorMode. So no architecture needs a formula,
and a change of the code changes the forecast.
"""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune import failures
from finetune.config import Config
from finetune.engine.topology import meta
from finetune.errors import ModelError
from finetune.models import attention_choice, attention_probe, cross_entropy, head
from finetune.models.build import build


@dataclass(frozen=True)
class Shape:
    """What a forward pass gets: the number of sequences, their tokens, and how many of these are
    learned.
    """

    num_sequences: int
    length: int
    learned: int


@dataclass(frozen=True)
class Trace:
    """Bytes of a forward and backward pass, besides the weights."""

    passing: int
    """Most that was there at once except gradients of weights: activations, weights in 16 bits,
    logits of a chunk.
    """
    both: int
    """Most of that and of gradients of weights, which stay, together."""
    gradients: int
    """When the pass is over."""
    kept: int
    """Of passing, what the forward pass left for the backward pass."""


class Ledger(TorchDispatchMode):
    """Count every storage from the operator that makes it until the last reference to it is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.passing = self.gradients = self.most_passing = self.most = 0
        self._staying: set[int] = set()
        self._known: set[int] = set()

    def ignore(self, tensor: torch.Tensor) -> None:
        """Weights are counted elsewhere."""
        self._known.add(tensor.untyped_storage()._cdata)

    def stays(self, parameter: torch.Tensor) -> None:
        """The gradient of a weight has its final place."""
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        if storage._cdata in self._known and storage._cdata not in self._staying:
            self._staying.add(storage._cdata)
            self.passing -= storage.nbytes()
            self.gradients += storage.nbytes()

    def _book(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.passing += size
            self.most_passing = max(self.most_passing, self.passing)
            self.most = max(self.most, self.passing + self.gradients)
            weakref.finalize(storage, self._let_go, key, size)

    def _let_go(self, key: int, size: int) -> None:
        self._known.discard(key)
        if key in self._staying:
            self._staying.discard(key)
            self.gradients -= size
        else:
            self.passing -= size

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        if function is torch.ops.aten._grouped_mm.default and arguments[0].dtype != torch.bfloat16:
            # Experts: kernels take other numbers, only what stands for them in a trace does not.
            out = function(
                *(a.bfloat16() for a in arguments[:2]), *arguments[2:], **(keywords or {})
            )
            out = out.to(arguments[0].dtype)
        else:
            out = function(*arguments, **(keywords or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self._book(value)
        return out


class Rehearsal:
    """The model of a run, without memory, to be traced with any number of tokens."""

    def __init__(
        self, config: Config, model_config: Any, tokenizer: Any, *, attention: str, precision: str, halved: bool = False,
        on_gpu: bool = False,
    ) -> None:  # fmt: skip
        """`precision` of the arithmetic; `halved`: all weights are in it, as ZeRO keeps them and
        FSDP2 gathers them.
        """
        plain = config.model_copy(
            update={"train": config.train.model_copy(update={"compile": False})}
        )
        self.attention, self.on_gpu = attention, on_gpu
        self.dtype = None if precision == "fp32" else torch.bfloat16
        self.model, self.base = build(
            plain, model_config, tokenizer, attention=attention, precision=precision,
            new_token_ids=tokenizer.convert_tokens_to_ids(config.model.new_tokens),
            device=torch.device("cpu"), first_inputs=list, with_weights=False,
        )  # fmt: skip
        if halved and self.dtype:
            for parameter in self.model.parameters():
                parameter.data = parameter.data.to(self.dtype)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self.mode:
            meta.move(self.model, "cpu")
        self.model.train()
        if on_gpu and attention != "eager":
            _without_attention_dropout(self.model)

    def trace(self, shape: Shape, learns: bool = True) -> Trace:
        """Of a pass forth and back, or, if nothing is learned from it, forth. Raises ModelError if
        the model cannot be followed.
        """
        try:
            return self._trace(shape, learns)
        except Exception as exc:  # code of any author, on tensors without values
            failures.reraise(exc)
            kind = self.base.config.model_type
            raise ModelError(
                f"the memory of {kind} cannot be forecast: {type(exc).__name__}: "
                f"{' '.join(str(exc).split())[:200]}; "
                "give train.micro_batch_size a number, and try it"
            ) from exc

    def _trace(self, shape: Shape, learns: bool) -> Trace:
        ledger = Ledger()
        rows, documents_of_row = (
            (shape.num_sequences, 1)
            if attention_choice.is_padded(self.attention)
            else (1, shape.num_sequences)
        )
        block_bytes = cross_entropy.block_bytes("cuda" if self.on_gpu else "cpu")
        hooks = []
        with self.mode:
            for parameter in self.model.parameters():
                parameter.grad = None
                ledger.ignore(parameter)
                if parameter.requires_grad:
                    hooks.append(parameter.register_post_accumulate_grad_hook(ledger.stays))
            for buffer in self.model.buffers():
                ledger.ignore(buffer)
            ids = torch.zeros(rows, documents_of_row * shape.length, dtype=torch.long)
            inputs = attention_probe.inputs_of(ids, [shape.length] * documents_of_row, self.base)
            supervised = torch.zeros(shape.num_sequences * shape.learned, dtype=torch.long)
            with ledger, torch.set_grad_enabled(learns):
                with torch.autocast(
                    "cpu",
                    self.dtype or torch.bfloat16,
                    enabled=self.dtype is not None,
                    cache_enabled=False,
                ):
                    loss = _loss(self.model, inputs, supervised, block_bytes)
                kept = ledger.passing
                if learns:
                    loss.backward()
                del loss
            found = Trace(ledger.most_passing, ledger.most, ledger.gradients, kept)
            for hook in hooks:
                hook.remove()
            for parameter in self.model.parameters():
                parameter.grad = None
        return found


def _loss(
    model: Any, inputs: dict[str, Any], supervised: torch.Tensor, block_bytes: int
) -> torch.Tensor:
    """supervised: int64 zeros, as many as tokens that are predicted; which ones does not matter."""
    question = head.Question(supervised, supervised, frozenset({"nll"}), block_bytes=block_bytes)
    loss: torch.Tensor = model(**inputs, question=question)["nll"]
    return loss


def _without_attention_dropout(model: Any) -> None:
    """A CPU keeps all scores for it; a GPU's kernels make the same random numbers again."""
    for module in model.modules():
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
        if isinstance(getattr(module, "attn_dropout", None), torch.nn.Dropout):
            module.attn_dropout.p = 0.0
