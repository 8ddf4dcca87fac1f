"""DeepSpeed ZeRO: shard optimizer state (1), gradients (2) and weights (3) with its engine.

The engine runs whole steps: it knows which backward pass is the last, does not scale the loss, and
gets clipping, accumulation and precision from the run config.
"""

import argparse
import contextlib
import io
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune import torch_versions
from finetune.engine.topology import meta
from finetune.engine.topology.launch import ParallelConfig
from finetune.engine.topology.sharing import MakeOptimizer, OnMain, Sharing, without_hooks
from finetune.errors import CheckpointError, ConfigError
from finetune.unpickling import require_tensors, weights_only

FILES, TAG = "shards", "engine"  # DeepSpeed's files lie in shards/engine


class Zero(Sharing):
    def __init__(
        self, parallel: ParallelConfig, device: torch.device, dtype: torch.dtype | None,
        on_main: OnMain,
    ) -> None:  # fmt: skip
        self.parallel, self.device, self.dtype, self.on_main = parallel, device, dtype, on_main
        self.deepspeed = _deepspeed(device)
        self.engine: Any = None
        settings = parallel.deepspeed["zero_optimization"]
        try:
            self.deepspeed.runtime.zero.config.DeepSpeedZeroConfig(**settings)
        except ValueError as exc:  # pydantic's, with one line per error
            why = " ".join(str(exc).split())[:300]
            raise ConfigError(f"zero_optimization: DeepSpeed does not accept it: {why}") from exc
        if old := sorted(
            {"cpu_offload", "cpu_offload_params", "cpu_offload_use_pin_memory"} & set(settings)
        ):
            raise ConfigError(
                f"zero_optimization.{old[0]}: write offload_optimizer and offload_param, "
                "as in ds_configs/zero3_offload.json"
            )

    def prepare(
        self, model: nn.Module, make_optimizer: MakeOptimizer, *,
        accumulation_steps: int, micro_batch_size: int, max_norm: float,
    ) -> tuple[nn.Module, Any]:  # fmt: skip
        """Let the engine broadcast the weights from the main process, and check what it set up.

        Under ZeRO-3 it broadcasts one weight at a time and each process keeps its part, so only the
        main process, and no GPU, holds the whole model: after `meta.move` a weight takes memory
        only when it arrives. By default the engine would put the whole model on the device first.
        """
        buffers = self.on_main(lambda: meta.buffers_of(model))
        self._in_arithmetic(model)  # `zero.Init` shards weights in their present dtype
        if meta.is_empty(model):
            meta.move(model, "cpu")
        config = {
            **self.parallel.deepspeed,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "communication_data_type": "fp32",
            "steps_per_print": None,
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": accumulation_steps,
            "gradient_clipping": 0.0 if math.isinf(max_norm) else max_norm,
            "bf16": {"enabled": self.dtype == torch.bfloat16},
        }
        optimizer = make_optimizer(model)
        if self.parallel.kind == "zero3":
            self.deepspeed.init_distributed(dist_init_required=False)
            self.deepspeed.zero.Init(
                module=model, config_dict_or_path=config, dtype=self.dtype or torch.float32
            )
        self.engine, optimizer, _, _ = self.deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
        meta.put_buffers(model, buffers, self.device)
        self._verify(accumulation_steps, max_norm)
        return self.engine, optimizer

    def share_frozen(self, model: nn.Module) -> nn.Module:
        """Give each process a copy, in the dtype in which DeepSpeed computes.

        An engine counts passes and shards one model: a second engine without an optimizer would
        have to be whole when the first one's backward pass computes logits again.
        """
        self._in_arithmetic(model)
        meta.send(model, self.on_main, self.device)
        return model

    def copy_frozen(self, model: nn.Module) -> nn.Module:
        self._in_arithmetic(model)
        return model.to(self.device)

    def _in_arithmetic(self, model: nn.Module) -> None:
        """Convert weights, but no packed ones, whose bytes may be stored as floats."""
        for parameter in model.parameters():
            is_packed = getattr(parameter, "quant_state", None) is not None
            if self.dtype is not None and parameter.is_floating_point() and not is_packed:
                parameter.data = parameter.data.to(self.dtype)

    def _verify(self, accumulation_steps: int, max_norm: float) -> None:
        """Raise ConfigError unless the engine has the settings that were asked for."""
        engine, parallel = self.engine, self.parallel
        clipping = 0.0 if math.isinf(max_norm) else max_norm
        offload = engine.zero_use_cpu_optimizer() or _is_offloaded(engine.zero_offload_param())
        found = {
            "stage": (engine.zero_optimization_stage(), int(parallel.kind[-1])),
            "gradient_accumulation_steps": (
                engine.gradient_accumulation_steps(),
                accumulation_steps,
            ),
            "gradient_clipping": (engine.gradient_clipping(), clipping),
            "offload": (offload, parallel.offload),
            "processes": (engine.dp_world_size, parallel.num_processes),
        }
        for name, (got, wanted) in found.items():
            if got != wanted:
                raise ConfigError(
                    f"{parallel.name} was asked for with {name} {wanted}, but DeepSpeed has {got}"
                )
        if parallel.kind == "zero3" and not all(
            hasattr(p, "ds_tensor") for p in engine.module.parameters()
        ):
            raise ConfigError("zero3 was asked for, but DeepSpeed did not shard the weights")

    def unwrap(self, model: Any) -> Any:
        return self.engine.module

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    @contextmanager
    def whole_weights(self, model: nn.Module) -> Iterator[None]:
        """Gather all weights under ZeRO-3, as computed with; the other stages keep them whole.

        DeepSpeed's hooks are off meanwhile: they share out a layer after each forward, and fetch
        ahead by what earlier passes asked for.
        """
        if self.parallel.kind != "zero3":
            yield
            return
        from deepspeed import zero

        module = self.engine.module
        self.engine.empty_partition_cache()  # weights that a pass fetched ahead may be on their way
        weights = zero.GatheredParameters(list(module.parameters()))
        with without_hooks(module, "deepspeed"), weights:
            yield

    def clip(self, model: nn.Module, max_norm: float) -> None:
        """Do nothing: DeepSpeed clips in its step, to the norm in its config."""

    def step(self, model: nn.Module, optimizer: Any, norm: float) -> tuple[float, bool]:
        """Step the engine; return (gradient norm, False if it skipped an overflowing step)."""
        self.engine.step()
        moved = bool(self.engine.was_step_applied())
        found = self.engine.get_global_grad_norm()
        return (float(found) if moved and found is not None else math.nan), moved

    def full(
        self, parameters: list[tuple[str, nn.Parameter]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield whole weights, in float32 if they train."""
        from deepspeed import zero
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in parameters:
            if parameter.requires_grad:
                yield name, safe_get_full_fp32_param(parameter).detach().view(_shape(parameter))
            else:
                with zero.GatheredParameters([parameter], enabled=self.parallel.kind == "zero3"):
                    yield name, parameter.detach().clone()  # the gathered one is freed

    def local_shard(self, parameter: Any) -> torch.Tensor:
        """Return this process's part, in float32 if it trains: 16 bits would hide small steps."""
        from deepspeed.utils import safe_get_local_fp32_param

        if not parameter.requires_grad:
            part: Any = getattr(parameter, "ds_tensor", parameter)
        elif self.parallel.kind == "zero3":
            part = safe_get_local_fp32_param(parameter)
        else:
            kept = parameter._hp_mapping  # None if other processes keep all of it
            part = kept.get_hp_fragment() if kept is not None else torch.zeros(0)
        own: torch.Tensor = part.detach()
        return own

    def release(self) -> None:
        self.engine = None

    def files(self, copied: Callable[[Any], Any]) -> dict[str, Any]:
        files: dict[str, Any] = {}

        def keep(state_dict: Any, path: str) -> None:
            files[path] = copied(state_dict)

        writer = self.engine.checkpoint_engine
        writer.save, writer.makedirs = keep, lambda path, exist_ok=False: None
        self.engine._copy_recovery_script = lambda folder: None
        self.engine.save_checkpoint(
            FILES, tag=TAG, save_latest=False, exclude_frozen_parameters=True
        )
        return files

    def load(self, folder: Path) -> None:
        is_universal = (folder / TAG / "zero").exists()
        if not is_universal:  # `universal` has checked the files that it converted
            self.on_main(lambda: require_tensors(sorted((folder / TAG).glob("*.pt")), _in_files()))
        groups = self.engine.optimizer.optimizer.param_groups
        settings = [
            {name: value for name, value in group.items() if name != "params"} for group in groups
        ]
        self.engine._config.load_universal_checkpoint = is_universal
        try:
            with weights_only(_in_files()):
                path, _ = self.engine.load_checkpoint(
                    str(folder), tag=TAG, load_module_strict=False
                )
        finally:
            self.engine._config.load_universal_checkpoint = False
        if path is None:
            raise CheckpointError(f"DeepSpeed found nothing to load in {folder}")
        # After converting, ZeRO-3 gives all groups the settings of the first, and all weights one
        # step counter, which each would increase.
        if is_universal:
            for group, own in zip(groups, settings):
                group.update(own)
            for moments in self.engine.optimizer.optimizer.state.values():
                if isinstance(moments.get("step"), torch.Tensor):
                    moments["step"] = moments["step"].clone()

    def universal(self, folder: Path, converted: Path) -> None:
        """Convert to one folder per weight (Universal Checkpointing, Lian et al., 2024)."""
        from deepspeed.checkpoint import ds_to_universal

        require_tensors(sorted((folder / TAG).glob("*.pt")), _in_files())
        arguments = argparse.Namespace(
            input_folder=str(folder / TAG), output_folder=str(converted / TAG),
            num_extract_workers=1, num_merge_workers=1, keep_temp_folder=False,
            strict=True, inject_missing_state=True,
        )  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()), weights_only(_in_files()):
            ds_to_universal.main(arguments)


def _in_files() -> list[type]:
    """Return the classes in DeepSpeed's files besides tensors and Python's; they hold numbers."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


def _is_offloaded(setting: Any) -> bool:
    return setting is not None and str(setting.device) not in ("none", "OffloadDeviceEnum.none")


def _shape(parameter: Any) -> torch.Size:
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for a device; on a CPU use gloo instead of compiling an extension."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        import deepspeed
    except ImportError as exc:
        raise ConfigError(
            f"ZeRO needs deepspeed, which cannot be imported: {exc}; pip install 'finetune[gpu]'"
        ) from exc
    torch_versions.ignore_new_names()
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
