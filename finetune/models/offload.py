"""Keep the inputs of recomputed layers in host memory between forward and backward.

A recomputed layer keeps its input only: for an 8B Llama 8 KB a token, 262 KB in 32 layers, most of
the memory of long sequences. Over PCIe 5 (55 GB/s) an input takes 0.15 us a token each way, the
layer's forward pass on an H100 0.6 us, recomputing it and backward 1.8. So copies hide behind the
next layer where 2 x width / bandwidth < 26 x width^2 / rate: for widths above about 1,000.
PyTorch's `save_on_cpu` copies while nothing computes: a tenth of a step.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor


class Offload:
    """Moves what its layers save for backward: the inputs that have a gradient."""

    def __init__(self) -> None:
        self.host_bytes = 0
        """Moved so far, in blocks of PyTorch's pinned memory, whose sizes are powers of two."""
        self._newest: Callable[[], _Input | None] = _nothing
        self._stream: torch.cuda.Stream | None = None

    def around(self, layer: Callable[..., Any]) -> Callable[..., Any]:
        """Return `layer`, which `checkpoint` wraps, with its inputs moved.

        `checkpoint` saves the inputs that are given by position under the hooks of its caller, and
        what is inside the layer under its own.
        """

        def forward(*arguments: Any, **keywords: Any) -> Any:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
                return layer(*arguments, **keywords)

        return forward

    def is_moved(self, tensor: torch.Tensor) -> bool:
        """Return whether to move it: not positions and masks, nor what a CPU holds anyway."""
        has_gradient = tensor.grad_fn is not None and tensor.is_floating_point()
        return has_gradient and (tensor.is_cuda or isinstance(tensor, FakeTensor))

    def _pack(self, tensor: torch.Tensor) -> Any:
        if not self.is_moved(tensor):
            return tensor
        if tensor.is_cuda and self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)
        self.host_bytes += 1 << (tensor.nbytes - 1).bit_length()
        if (before := self._newest()) is not None:
            before.leave_device()
        kept = _Input(tensor, self._newest, self._stream)
        self._newest = weakref.ref(kept)
        return kept


def _nothing() -> None:
    return None


def _unpack(kept: Any) -> torch.Tensor:
    return kept.take() if isinstance(kept, _Input) else kept


class _Input:
    """One layer's input. The newest stays on the device, as backward starts with it.

    Copies run on a stream of their own. Memory of the device is taken and freed in the order of the
    main stream, which waits for a copy before it frees what was copied.
    """

    def __init__(
        self, tensor: torch.Tensor, before: Callable[[], "_Input | None"],
        stream: torch.cuda.Stream | None,
    ) -> None:  # fmt: skip
        self.on_device: torch.Tensor | None = tensor.detach()
        self._before, self._stream = before, stream
        self._about = {"size": tensor.shape, "dtype": tensor.dtype, "device": tensor.device}
        self._host: torch.Tensor | None = None
        if not isinstance(tensor, FakeTensor):  # a forecast counts the device's memory
            pinned = stream is not None
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            self._copy(self._host, self.on_device)
        self._copied = stream.record_event() if stream else None

    def _copy(self, target: torch.Tensor, source: torch.Tensor | None) -> None:
        assert source is not None
        if self._stream is None:
            target.copy_(source)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._about["device"]))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def _wait(self) -> None:
        if self._copied is not None:
            torch.cuda.current_stream(self._about["device"]).wait_event(self._copied)

    def leave_device(self) -> None:
        self._wait()
        self.on_device = None

    def fetch(self) -> None:
        """Start to copy the input back, unless it is there."""
        if self.on_device is None:
            self.on_device = torch.empty(**self._about)
            if self._host is not None:
                self._copy(self.on_device, self._host)
            self._copied = self._stream.record_event() if self._stream else None

    def take(self) -> torch.Tensor:
        """Return the input, and start to fetch that of the layer before."""
        self.fetch()
        self._wait()
        if (before := self._before()) is not None:
            before.fetch()
        taken, self.on_device = self.on_device, None
        assert taken is not None
        return taken
