"""Trace a step of the real model on tensors without memory, and add up what it would hold.

The model's own forward, with adapters, attention, recomputation and loss, runs under PyTorch's
FakeTensorMode. So no architecture needs a formula, and a change of the code changes the forecast.
"""

import contextlib
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune import failures, kernels
from finetune.config import Config
from finetune.engine.topology import meta
from finetune.errors import ModelError
from finetune.forecast import fused, layers
from finetune.forecast.layers import Mark, Row, Segment
from finetune.models import (
    attention_choice,
    attention_probe,
    cross_entropy,
    families,
    head,
    logits,
    recompute,
    scalar_heads,
)
from finetune.models.build import build
from finetune.models.distributions import Distribution, Reference, TopK

# Attention's backward passes on a CPU, in whose place a GPU's kernel runs; their first arguments
# are the gradient of the output, queries, keys: [.., heads, tokens, width].
ATTENTION_BACKWARD = (
    "finetune::one_by_one_backward", "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
)  # fmt: skip
PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm")}
# The kernel of the loss holds no logits in float32. Here few, but not so few that a trace takes
# long: about 0.2 GB too much, and eight blocks for a chunk.
KERNEL_BLOCK_BYTES = 64 * 2**20
LOSS = Mark("loss")  # forward is over
NLL = frozenset({"nll"})
TOP = 64  # likeliest tokens of a teacher that rows usually hold


@dataclass(frozen=True)
class Shape:
    """The input of a forward pass: sequences, and the tokens and supervised tokens of each."""

    num_sequences: int
    length: int
    supervised: int


@dataclass(frozen=True)
class Trace:
    """Bytes of a forward and backward pass, besides the weights."""

    passing: int
    """Peak without gradients of weights: activations, weights in 16 bits, a chunk of logits."""
    both: int
    """Peak including gradients of weights."""
    gradients: int
    """After the pass."""
    kept: int
    """The part of `passing` that forward keeps for backward."""
    moved: int = 0
    """In host memory between forward and backward (train.activation_offload)."""
    products: int = 0
    """Number of matrix products, each a kernel."""


class Ledger(TorchDispatchMode):
    """Count every storage from the operator that creates it until its last reference is gone.

    `on_gpu`: also what a GPU's attention holds while it runs, which a CPU's does not.
    """

    def __init__(self, on_gpu: bool = False) -> None:
        super().__init__()
        self._on_gpu = on_gpu
        self.passing = self.gradients = self.most_passing = self.most = 0
        self.moved: Callable[[], int] = int
        """Returns the bytes that are in host memory instead."""
        self.segments: list[tuple[Mark, Segment]] = []
        self._products = 0
        self._mark, self._begin = Mark("start"), (0, 0, 0, 0)
        self._gradients: set[int] = set()
        self._known: set[int] = set()

    def ignore(self, tensor: torch.Tensor) -> None:
        """Do not count a weight, which is counted elsewhere."""
        self._known.add(tensor.untyped_storage()._cdata)

    def count_gradient(self, parameter: torch.Tensor) -> None:
        """Count the finished gradient of a weight apart."""
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        if storage._cdata in self._known and storage._cdata not in self._gradients:
            self._gradients.add(storage._cdata)
            self.passing -= storage.nbytes()
            self.gradients += storage.nbytes()

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.passing += size
            self._note()
            weakref.finalize(storage, self._remove, key, size)

    def restart(self) -> None:
        """Begin with the first segment of another pass."""
        self.mark(Mark("start"))
        self.segments = []

    def mark(self, mark: Mark) -> None:
        """End a segment of the pass, and begin the next."""
        now = self.passing, self.gradients, self.moved(), self._products
        passing, gradients, moved, products = self._begin
        ended = Segment(
            self.passing - passing, self.gradients - gradients, now[2] - moved,
            self.most_passing - passing, self.most - passing - gradients, now[3] - products,
        )  # fmt: skip
        self.segments.append((self._mark, ended))
        self._mark, self._begin = mark, now
        self.most_passing, self.most = self.passing, self.passing + self.gradients

    def _note(self, workspace: int = 0) -> None:
        """Remember the most bytes since a mark. `workspace`: of an operator, while it runs."""
        self.most_passing = max(self.most_passing, self.passing + workspace)
        self.most = max(self.most, self.passing + self.gradients + workspace)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        if key in self._gradients:
            self._gradients.discard(key)
            self.gradients -= size
        else:
            self.passing -= size

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        if function is torch.ops.aten._grouped_mm.default and arguments[0].dtype != torch.bfloat16:
            # The fake kernel for experts takes only bfloat16; the real ones take other dtypes too.
            first, second, *others = arguments
            out = function(first.bfloat16(), second.bfloat16(), *others, **(keywords or {}))
            out = out.to(first.dtype)
        else:
            out = function(*arguments, **(keywords or {}))
        self._products += function.name() in PRODUCTS
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self._add(value)
        if self._on_gpu and function.name() in ATTENTION_BACKWARD:
            self._note(attention_workspace(*arguments[1:3]))
        return out


def attention_workspace(query: torch.Tensor, key: torch.Tensor) -> int:
    """Return the bytes that FlashAttention-2 holds during its backward pass; others hold as much.

    The gradient of queries adds up in float32, and where heads share keys and values, each has
    gradients of its own before they are added.
    """
    if query.dtype == torch.float32:  # SDPA, a document at a time
        return 0
    own = 2 * query.numel() * query.element_size() if query.shape[1] != key.shape[1] else 0
    return 4 * query.numel() + own


@dataclass(frozen=True)
class Beside:
    """What distributions are compared with: a teacher's projection [V, H]; None: stored tokens."""

    shape: tuple[int, int] | None
    with_nll: bool
    """Whether the loss has the cross-entropy of the tokens, too."""

    def reference(self, count: int, dtype: torch.dtype) -> Reference:
        """Make the distributions at `count` tokens, on tensors without memory."""
        if self.shape is None:
            ids = torch.zeros(count, TOP, dtype=torch.long)
            return TopK(ids, torch.zeros(count, TOP))
        size, width = self.shape
        states = torch.zeros(count, width, dtype=dtype)
        # Its weights are counted with the teacher's: a row of them stands for all.
        row = torch.zeros(1, width, dtype=dtype)
        return Distribution(states, lambda part: (part @ row.T).repeat(1, size).float())


class Rehearsal:
    """The model of a run without memory, to trace with any number of tokens."""

    def __init__(
        self, config: Config, model_config: Any, tokenizer: Any, *, attention: str, precision: str,
        halved: bool = False, on_gpu: bool = False, asks: frozenset[str] = NLL,
        beside: Beside | None = None,
    ) -> None:  # fmt: skip
        """Build the model. `precision`: of the arithmetic; `halved`: of all weights too.

        ZeRO keeps weights halved, and FSDP2 gathers them so. `asks`: what the loss asks of a pass;
        `beside`: what it compares with.
        """
        offloads = on_gpu and config.train.activation_offload
        plain = {"compile": False, "float8": False, "activation_offload": offloads}
        uncompiled = config.changed("train", **plain)
        self.attention, self.on_gpu, self._beside = attention, on_gpu, beside
        self._asks = asks
        scores = families.of(config) == families.SCORES
        self.dtype = None if precision == "fp32" else torch.bfloat16
        self.model, self.base = build(
            uncompiled, model_config, tokenizer, attention=attention, precision=precision,
            new_token_ids=tokenizer.convert_tokens_to_ids(config.model.new_tokens),
            device=torch.device("cpu"), first_inputs=list, with_weights=False,
            heads=() if scores else asks & scalar_heads.NAMES.keys(),
        )  # fmt: skip
        if halved and self.dtype:
            for parameter in self.model.parameters():
                parameter.data = parameter.data.to(self.dtype)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self.mode:
            meta.move(self.model, "cpu")
        self.model.train()
        if on_gpu:
            # Float8 needs compiled layers; a run replaces auto later.
            is_compiled = config.train.compile is True or bool(config.train.float8)
            fused.install(self.base, is_compiled)
        if on_gpu and attention != "eager":
            _disable_attention_dropout(self.model)
        number = recompute.chosen(self.base, config.train.gradient_checkpointing)
        num_traced = layers.WITH_OFFLOAD if offloads else layers.TRACED
        self._rows = layers.rows(self.base, number, num_traced)

    def trace(self, shape: Shape, backward: bool = True) -> Trace:
        """Trace forward and, unless it is False, backward. Raises ModelError if that fails."""
        return self.tried(lambda rows: self._trace(shape, backward, rows))

    def tried(self, trace: Callable[[Sequence[Row]], Trace]) -> Trace:
        """Trace with rows of layers of which some stand for others, or with all if that fails.

        Raises ModelError if that fails, too.
        """
        try:
            if self._rows:
                # NotAlike, or whatever a layer raises that needs what one left out would have made.
                with contextlib.suppress(Exception):
                    return trace(self._rows)
                self._rows = []
            return trace([])
        except Exception as exc:  # code of any author, on tensors without values
            failures.reraise(exc)
            kind = self.base.config.model_type
            raise ModelError(
                f"the memory of {kind} cannot be forecast: {type(exc).__name__}: "
                f"{' '.join(str(exc).split())[:200]}; set train.micro_batch_size to a number, and "
                "train.gradient_checkpointing to true or false"
            ) from exc

    def _trace(self, shape: Shape, backward: bool, rows_of_layers: Sequence[Row]) -> Trace:
        """Trace a pass. `rows_of_layers`: where some stand for others.

        Raises NotAlike if they cannot.
        """
        ledger = Ledger(self.on_gpu)
        is_padded = attention_choice.is_padded(self.attention)
        rows, documents_of_row = (shape.num_sequences, 1) if is_padded else (1, shape.num_sequences)
        block_bytes = _block_bytes(self.on_gpu)
        hooks = []
        if offload := self.base.offload:
            offload.host_bytes = 0
            ledger.moved = lambda: int(offload.host_bytes)
        with self.mode, layers.shortened(self.base, rows_of_layers, ledger):
            for parameter in self.model.parameters():
                parameter.grad = None
                ledger.ignore(parameter)
                if parameter.requires_grad:
                    hooks.append(
                        parameter.register_post_accumulate_grad_hook(ledger.count_gradient)
                    )
            for buffer in self.model.buffers():
                ledger.ignore(buffer)
            ids = torch.zeros(rows, documents_of_row * shape.length, dtype=torch.long)
            inputs = attention_probe.inputs_of(ids, [shape.length] * documents_of_row, self.base)
            supervised = torch.zeros(shape.num_sequences * shape.supervised, dtype=torch.long)
            is_half, dtype = self.dtype is not None, self.dtype or torch.bfloat16
            with ledger, torch.set_grad_enabled(backward):
                with torch.autocast("cpu", dtype, enabled=is_half, cache_enabled=False):
                    loss = self._loss(inputs, supervised, block_bytes)
                ledger.mark(LOSS)
                if backward:
                    loss.backward()
                del loss
            ledger.mark(Mark("end"))
            for hook in hooks:
                hook.remove()
            for parameter in self.model.parameters():
                parameter.grad = None
        return added(layers.whole(ledger.segments, rows_of_layers))

    def _loss(
        self, inputs: dict[str, Any], supervised: torch.Tensor, block_bytes: int
    ) -> torch.Tensor:
        """Return the loss; `supervised`: int64 [S] of zeros, as only their number matters."""
        want, reference = set(self._asks), None
        if self._beside is not None:
            want |= {"nll"} if self._beside.with_nll else set()
            reference = self._beside.reference(len(supervised), self.dtype or torch.float32)
        question = head.Question(
            supervised, supervised, frozenset(want), block_bytes=block_bytes, ends=supervised[:1],
            reference=reference, beta=0.5,
        )  # fmt: skip
        found = self.model(**inputs, question=question)
        return torch.stack([found[name].sum() for name in sorted(want)]).sum()


def added(segments: Sequence[tuple[Mark, Segment]]) -> Trace:
    passing = gradients = moved = kept = most_passing = most = products = 0
    for mark, segment in segments:
        kept = passing if mark == LOSS else kept
        most_passing = max(most_passing, passing + segment.most_passing)
        most = max(most, passing + gradients + segment.most)
        passing += segment.passing
        gradients += segment.gradients
        moved += segment.moved
        products += segment.products
    return Trace(most_passing, most, gradients, kept, moved, products)


def _block_bytes(on_gpu: bool) -> int:
    """Return the most bytes of logits that are in float32 at once.

    On another machine's GPU the kernel counts as there, unless it is left out by name.
    """
    if not on_gpu:
        return cross_entropy.block_bytes("cpu")
    if torch.cuda.is_available():
        has_kernel = logits.fused(torch.device("cuda", torch.cuda.current_device()))[0] is not None
    else:
        has_kernel = not kernels.is_left_out("cross_entropy_kernel")
    return KERNEL_BLOCK_BYTES if has_kernel else cross_entropy.block_bytes("cuda")


def _disable_attention_dropout(model: Any) -> None:
    """Disable it, as a CPU keeps all scores for it, but a GPU's kernels repeat random numbers."""
    for module in model.modules():
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
        if isinstance(getattr(module, "attn_dropout", None), torch.nn.Dropout):
            module.attn_dropout.p = 0.0
