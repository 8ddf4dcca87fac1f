"""A GPU that is only pretended: tensors that lie on "cuda", and compute on the CPU.

A tensor of the CPU in an operation beside one of the GPU is an error, as it is there, and each wait
of the host for the device is noted. So code that mixes devices, or waits for every token, is found
without a GPU. Kernels are those of the CPU: their numbers, and whether a GPU has them, are not
tried.

    with pretended() as waits:
        model = on_gpu(model)
        model(**batch.to(CUDA).inputs)
"""

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
NOT_ASKING = (__file__, str(Path(torch.__file__).parent))
aten = torch.ops.aten
# The host has to know a number, or how many there are.
WAITS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default,
    aten.equal.default, aten._unique2.default, aten.unique_dim.default,
    aten.repeat_interleave.Tensor,
}  # fmt: skip
# A GPU takes indices of the CPU, which it copies first.
TAKES_INDICES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
COPIES = {aten.copy_.default, aten._to_copy.default}


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU. `inner`: what it holds, on the CPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "OnGpu":
        made: OnGpu = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device="cpu", requires_grad=False,
        )  # fmt: skip
        made.inner = inner
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGpu({self.inner})"

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # fmt: skip
        kwargs = dict(kwargs or {})
        _require_one_device(function, args, kwargs)
        if function in WAITS:
            _note(function)
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, OnGpu)]
        inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
        out = function(*inner_args, **inner_kwargs)
        same = {id(each.inner): each for each in given}  # what works in place returns its argument

        def outer(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return same[id(value)] if id(value) in same else OnGpu(value)

        return tree_map(outer, out)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, OnGpu) else value


def _require_one_device(function: Any, args: Any, kwargs: Any) -> None:
    """Raise RuntimeError, as a GPU does, for a tensor of the CPU; single numbers are allowed."""
    if function in COPIES:
        return
    leaves = tree_leaves((args[:1], kwargs) if function in TAKES_INDICES else (args, kwargs))
    for each in leaves:
        is_other = isinstance(each, torch.Tensor) and not isinstance(each, OnGpu)
        if is_other and each.dim() > 0:
            raise RuntimeError(f"{function}: tensors on the CPU and the GPU: {tuple(each.shape)}")


class Pretending(TorchFunctionMode):
    """Puts tensors where they are asked for: on the CPU, or on the GPU that is not there."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # fmt: skip
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        if name in ("cuda", "pin_memory"):
            return moved(args[0]) if name == "cuda" else args[0]
        if name == "cpu" and isinstance(args[0], OnGpu):
            return _fetched(args[0])
        if name == "numpy" and isinstance(args[0], OnGpu):
            raise TypeError("a tensor on a GPU has no numpy array; copy it to the host first")
        if name == "tolist" and isinstance(args[0], OnGpu):
            return _fetched(args[0]).tolist()
        if name == "to" and isinstance(args[0], torch.Tensor):
            return self._to(function, args, kwargs)
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = "cpu"
            with self._off():
                made = function(*tree_map(_inner, args), **kwargs)
            return moved(made)
        return function(*args, **kwargs)

    @contextlib.contextmanager
    def _off(self) -> Iterator[None]:
        with torch._C.DisableTorchFunction():
            yield

    def _to(self, function: Any, args: Any, kwargs: Any) -> Any:
        tensor, *others = args
        device = kwargs.pop("device", None)
        kept = []
        for each in others:
            if isinstance(each, torch.Tensor):
                device, each = each.device, each.dtype
            if isinstance(each, str | torch.device):
                device = torch.device(each)
            elif isinstance(each, torch.dtype):
                kept.append(each)
        kwargs.pop("non_blocking", None)
        if kept or kwargs:
            tensor = function(tensor, *kept, **kwargs)
        if device is None or torch.device(device).type == tensor.device.type:
            return tensor
        return moved(tensor) if torch.device(device).type == "cuda" else _fetched(tensor)


def moved(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the CPU on the GPU; differentiable."""
    made: torch.Tensor = tensor if isinstance(tensor, OnGpu) else _ToGpu.apply(tensor)
    return made


class _ToGpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return OnGpu(tensor.detach().clone())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return _inner(gradients[0])


_waits: list[str] = []


def _fetched(tensor: torch.Tensor) -> torch.Tensor:
    _note("a copy to the host")
    return tensor.inner.clone() if isinstance(tensor, OnGpu) else tensor


def _note(what: Any) -> None:
    """Note who waits: a line of the project, or of a library."""
    stack = traceback.extract_stack()
    asks = [each for each in stack if not each.filename.startswith(NOT_ASKING)][-1]
    _waits.append(f"{asks.filename}:{asks.lineno} {asks.name}: {what}")


def on_gpu(model: Any) -> Any:
    """Move a model; its weights stay the same parameters of autograd, tied ones tied."""
    known: dict[int, Any] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                made = nn.Parameter(OnGpu(weight.detach().clone()), weight.requires_grad)
                module._parameters[name] = known.setdefault(id(weight), made)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = known.setdefault(id(buffer), OnGpu(buffer.clone()))
    return model


@contextlib.contextmanager
def pretended() -> Iterator[list[str]]:
    """Pretend that there is a GPU, inside; give the list of what has made the host wait."""
    kept = checkpoint.get_device_states, checkpoint.set_device_states
    checkpoint.get_device_states = lambda *_: ([], [])
    checkpoint.set_device_states = lambda *_, **__: None
    _waits.clear()
    try:
        with Pretending():
            yield _waits
    finally:
        checkpoint.get_device_states, checkpoint.set_device_states = kept


def pretend_in_runs(patched: Any) -> None:
    """Let a run compute on the GPU that is not there. `patched`: pytest's monkeypatch.

    Left to the CPU: what asks CUDA how much memory there is, page-locked memory, GPU kernels.
    """
    from finetune import loop, opening
    from finetune.data.batches import Batch
    from finetune.engine.topology.replicated import Replicated
    from finetune.engine.topology.start import Process

    start, prepare, share = Process.__init__, Replicated.prepare, Replicated.share_frozen

    def begun(process: Any, *arguments: Any, **keywords: Any) -> None:
        start(process, *arguments, **keywords)
        process.device, process.accelerator.device_placement = CUDA, False

    def prepared(self: Any, model: Any, make: Any, **keywords: Any) -> Any:
        return prepare(self, on_gpu(model), make, **keywords)

    def sized(config: Any, topology: Any) -> Any:
        return config.changed("train", gradient_checkpointing=False), None

    patched.setattr(Process, "__init__", begun)
    patched.setattr(Replicated, "prepare", prepared)
    patched.setattr(Replicated, "share_frozen", lambda self, model: share(self, on_gpu(model)))
    patched.setattr(loop, "take_kernels", lambda *_: iter(()))
    patched.setattr(opening, "sized", sized)
    patched.setattr(Batch, "pinned", lambda batch: batch)
    patched.setattr(torch.random, "fork_rng", lambda *_, **__: contextlib.nullcontext())
    for name in ("set_device", "empty_cache", "reset_peak_memory_stats"):
        patched.setattr(torch.cuda, name, lambda *_: None)
    patched.setattr(torch.cuda, "mem_get_info", lambda *_: (60 * 10**9, 80 * 10**9))
    patched.setattr(torch.cuda, "max_memory_allocated", lambda *_: 0)
    patched.setattr(torch.cuda, "get_device_name", lambda *_: "pretended")
    patched.setattr(torch.cuda, "get_rng_state", lambda *_: torch.zeros(1, dtype=torch.uint8))
