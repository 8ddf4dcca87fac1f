"""FSDP2: shard weights, gradients and optimizer state with PyTorch's `fully_shard`.

Accelerate's own `prepare` does not fit: on CPUs it silently uses DDP instead; it needs the
optimizer before sharding and maps parameters by address, which meta parameters lack; and it reduces
gradients in 16 bits. Processes reduce gradients in every backward pass: kept until the last, they
would be unsharded.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from finetune import torch_versions
from finetune.engine.topology import meta
from finetune.engine.topology.launch import ParallelConfig
from finetune.engine.topology.sharing import MakeOptimizer, OnMain, Sharing, without_hooks
from finetune.errors import ConfigError
from finetune.models import recompute, scalar_heads


class Fsdp2(Sharing):
    shards_frozen = True

    def __init__(
        self, parallel: ParallelConfig, device: torch.device, dtype: torch.dtype | None,
        on_main: OnMain,
    ) -> None:  # fmt: skip
        """`dtype`: of the arithmetic; None for float32."""
        self.parallel, self.device, self.dtype, self.on_main = parallel, device, dtype, on_main
        shards = parallel.num_processes // parallel.num_replicas
        hybrid = parallel.num_replicas > 1
        self.mesh = init_device_mesh(
            device.type, (parallel.num_replicas, shards) if hybrid else (shards,),
            mesh_dim_names=("replicate", "shard") if hybrid else ("shard",),
        )  # fmt: skip

    def prepare(
        self, model: nn.Module, make_optimizer: MakeOptimizer, **_: Any
    ) -> tuple[nn.Module, Any]:
        """Shard it, and make the optimizer of the shards."""
        self._distribute(model)
        return model, make_optimizer(model)

    def share_frozen(self, model: nn.Module) -> nn.Module:
        self._distribute(model)
        return model

    def copy_frozen(self, model: nn.Module) -> nn.Module:
        model.to(self.device)
        if self.dtype is not None:
            model.forward = _in_precision(model.forward, self.device, self.dtype)
        return model

    def _distribute(self, model: nn.Module) -> None:
        """Shard the empty model, then broadcast one weight at a time from the main process."""
        self._store_as_floats(model)
        weights = {name: p.detach() for name, p in model.named_parameters()}
        buffers = self.on_main(lambda: meta.buffers_of(model))
        meta.move(model, "meta")
        # What generates, with or without adapters.
        root = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._shard(model, root)
        model.to_empty(device="cpu" if self.parallel.offload else self.device)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                self._send(weights.pop(name), parameter)
        meta.put_buffers(model, buffers, self.device)
        if self.dtype is not None:
            root.forward = _in_precision(root.forward, self.device, self.dtype)
        self._verify(model, root)

    def _shard(self, model: nn.Module, root: Any) -> None:
        """Shard layers, head, embedding and the rest, each gathered as a unit.

        Layers and head are gathered in the dtype of the arithmetic, to which autocast would convert
        their weights anyway; embedding and last norm in float32, so that autocast computes the same
        as without sharding. A head that shares the embedding's weights is gathered with it. After
        each pass everything is sharded again: code that reads weights between passes expects
        shards, and whole ones would be those of before the step. Gradients are summed in float32.
        """
        policy: OffloadPolicy = OffloadPolicy()
        if self.parallel.offload:
            policy = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
        # On a CPU, LayerNorm needs its weights in the dtype of its input, which autocast leaves in
        # float32.
        has_layer_norm = any(isinstance(module, nn.LayerNorm) for module in model.modules())
        dtype = None if self.device.type == "cpu" and has_layer_norm else self.dtype
        half = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        whole = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)

        def shard(module: Any, precision: MixedPrecisionPolicy, reshard: bool = True) -> None:
            fully_shard(
                module, mesh=self.mesh, reshard_after_forward=reshard,
                mp_policy=precision, offload_policy=policy,
            )  # fmt: skip

        for layer in reversed(self._layers(model)):  # nested layers first
            shard(layer, half, reshard=self.parallel.reshards)
        embedding, head = root.get_input_embeddings(), root.get_output_embeddings()
        if head is not None and not _share_weights(embedding, head):
            # `models/head.py` calls it twice a pass: it stays whole in between, and until its
            # backward pass.
            shard(head, half, reshard=False)
            # As its own unit it is whole only during the lookup, not until the end of the pass.
            if not _is_shared(embedding, root):  # as by an encoder and a decoder
                shard(embedding, whole)
        for scalar in scalar_heads.of(root).values():  # in float32 beside a frozen 16-bit base
            shard(scalar, whole)
        shard(root, whole)
        root.register_forward_hook(_reshard_after_evaluation)

    def _store_as_floats(self, model: nn.Module) -> None:
        """View the bytes of quantised weights as a float dtype; `as_floats` explains why."""
        dtype = self.dtype or torch.float32
        for module in model.modules():
            if getattr(module, "quant_state", None) is not None:  # bitsandbytes' 4-bit layers
                packed = module.weight
                if not packed.is_floating_point() and packed.numel() % dtype.itemsize == 0:
                    module.weight = nn.Parameter(
                        torch_versions.as_floats(packed, dtype), requires_grad=False
                    )

    def _layers(self, model: nn.Module) -> list[nn.Module]:
        classes = self.parallel.layer_classes or tuple(recompute.classes(model))
        found = [module for module in model.modules() if type(module).__name__ in classes]
        names = {type(layer).__name__ for layer in found}
        wrong = [name for name in self.parallel.layer_classes if name not in names]
        if not found or wrong or any(layer is model for layer in found):
            raise ConfigError(
                "fsdp_transformer_layer_cls_to_wrap: "
                f"{' or '.join(wrong or classes) or '(none is known)'} "
                "is not a layer class of this model; "
                f"use one of {', '.join(sorted({type(m).__name__ for m in model.modules()}))}"
            )
        return found

    def _send(self, weight: torch.Tensor, parameter: Any) -> None:
        """Broadcast a weight from the main process; each process keeps its shard."""
        full = torch.empty(parameter.shape, dtype=parameter.dtype, device=self.device)
        if not weight.is_meta:
            full.copy_(weight)
        torch.distributed.broadcast(full.view(-1).view(torch.uint8), src=0)
        part = distribute_tensor(full, self.mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(part.to_local())

    def _verify(self, model: nn.Module, root: nn.Module) -> None:
        """Raise ConfigError unless the model is sharded as the topology file asks."""
        shards = self.mesh.size(-1)
        for name, parameter in model.named_parameters():
            if not isinstance(parameter, DTensor) or parameter.device_mesh != self.mesh:
                raise ConfigError(
                    f"FSDP2 was asked for, but {name} is not sharded; "
                    "this model needs ddp.yaml or zero3.yaml"
                )
            share = math.ceil(parameter.shape[0] / shards) * parameter.shape[1:].numel()
            if parameter.to_local().numel() > share:
                raise ConfigError(f"FSDP2 was asked for, but {name} is whole on every process")
        if not isinstance(root, FSDPModule):
            raise ConfigError("FSDP2 was asked for, but the model was not wrapped")

    @contextmanager
    def whole_weights(self, model: nn.Module) -> Iterator[None]:
        """Gather every unit, in the dtypes of a pass, and keep it until the block ends.

        FSDP's hooks are off meanwhile, although they would not gather again: each pass without
        gradient lengthens a list by which the next backward pass gathers ahead, and processes that
        made other numbers of passes would then wait for each other.
        """
        units = _units(model)
        with without_hooks(model, "torch.distributed.fsdp", __name__):
            try:
                for unit in units:
                    unit.unshard()
                yield
            finally:
                for unit in units:
                    unit.reshard()

    def clip(self, model: nn.Module, max_norm: float) -> torch.Tensor:
        total: Any = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        norm: torch.Tensor = total.full_tensor() if isinstance(total, DTensor) else total
        return norm

    def full(
        self, parameters: list[tuple[str, nn.Parameter]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in parameters:
            # Offloaded shards are gathered on the device.
            moved: Any = parameter.detach().to(self.device)
            yield name, moved.full_tensor()

    def local_shard(self, parameter: Any) -> torch.Tensor:
        local: torch.Tensor = parameter.detach().to_local()
        return local


def _reshard_after_evaluation(root: nn.Module, *_: Any) -> None:
    """Shard again what stays whole until a backward pass, where there will be none."""
    if not torch.is_grad_enabled():
        for unit in _units(root):
            unit.reshard()


def _units(model: nn.Module) -> list[FSDPModule]:
    """Return what is gathered at once, in the same order on every process."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _share_weights(one: nn.Module, other: nn.Module) -> bool:
    return not {id(p) for p in one.parameters()}.isdisjoint(id(p) for p in other.parameters())


def _is_shared(embedding: nn.Module, root: nn.Module) -> bool:
    """Return whether another module has the embedding's weights, too."""
    return any(
        _share_weights(embedding, each)
        for each in root.modules()
        if isinstance(each, nn.Embedding) and each is not embedding
    )


def _in_precision(
    forward: Callable[..., Any], device: torch.device, dtype: torch.dtype
) -> Callable[..., Any]:
    @functools.wraps(forward)
    def in_precision(*arguments: Any, **keywords: Any) -> Any:
        with torch.autocast(device.type, dtype, cache_enabled=False):
            return forward(*arguments, **keywords)

    return in_precision
