"""Read a ParallelConfig from the environment that `accelerate launch` sets. No torch."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.errors import ConfigError
from finetune.places import found

# What a DeepSpeed file may hold: sharding and logging.
KEYS = ("zero_optimization", "wall_clock_breakdown", "comms_logger", "dump_state")
# Keys that a DeepSpeed file may not set -> the setting of the run config that decides instead.
OWNED = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "optimizer.kind",
    "scheduler": "schedule.kind",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "activation_checkpointing": "train.gradient_checkpointing",
}


@dataclass(frozen=True)
class ParallelConfig:
    """How processes share the model; `kind`: single, ddp, fsdp2, zero1, zero2 or zero3."""

    kind: str = "single"
    num_processes: int = 1
    offload: bool = False
    """Keep weights and optimizer state in host memory; under ZeRO, what the file names."""
    num_replicas: int = 1
    """FSDP2, hybrid: num_replicas groups of num_processes / num_replicas processes each shard."""
    num_context: int = 1
    """FSDP2: the number of processes that share one sequence."""
    reshards: bool = True
    """FSDP2: shard a layer again after its forward; if not, it stays whole until its backward."""
    layer_classes: tuple[str, ...] = ()
    """FSDP2: classes of the layers to shard as units; empty: those that transformers names."""
    mixed_precision: str = "no"
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """ZeRO: the file that deepspeed_config_file names."""

    @property
    def name(self) -> str:
        return (
            self.kind
            + ("_offload" if self.offload else "")
            + ("_hybrid" if self.num_replicas > 1 else "")
            + ("_context" if self.num_context > 1 else "")
        )

    @property
    def is_sharded(self) -> bool:
        return self.kind == "fsdp2" or self.is_zero

    @property
    def gathers(self) -> bool:
        """Whether each pass gathers the weights; `Topology.whole_weights` does so once for many."""
        return self.kind in ("fsdp2", "zero3")

    @property
    def generates_together(self) -> bool:
        """Whether all processes must take part in every token, even after their answers end."""
        return self.gathers and self.num_processes > 1

    @property
    def is_zero(self) -> bool:
        return self.kind.startswith("zero")


def read(environment: Mapping[str, str] = os.environ) -> ParallelConfig:
    """Read the environment. Raises ConfigError for settings that would silently be ignored."""
    number = _whole(environment, "WORLD_SIZE", 1)
    if number > 1:
        for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
            _whole(environment, name, 0)
    if _is_on(environment, "ACCELERATE_USE_CPU") and "WORLD_SIZE" not in environment:
        raise ConfigError(
            "use_cpu: true makes accelerate launch start one process and ignores num_processes; "
            "set it to false (without a GPU train.py uses the CPU by itself), "
            "as in accelerate_configs/cpu_debug.yaml"
        )
    if (steps := environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")) != "1":
        raise ConfigError(
            f"the launcher sets gradient_accumulation_steps to {steps}; remove it there: "
            "accumulation follows from train.global_batch_size and train.micro_batch_size"
        )
    if (clipping := environment.get("ACCELERATE_GRADIENT_CLIPPING", "none")).lower() not in (
        "none",
        "auto",
    ):
        raise ConfigError(
            f"the launcher sets gradient_clipping to {clipping}; "
            "remove it there: train.max_grad_norm decides"
        )
    for name, feature in (("MEGATRON_LM", "Megatron-LM"), ("FP8", "fp8"), ("TPU", "TPUs")):
        if _is_on(environment, f"ACCELERATE_USE_{name}"):
            raise ConfigError(
                f"the topology file asks for {feature}, which is not supported; "
                "see docs/topologies.md"
            )
    if (compiler := environment.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper()) != "NO":
        raise ConfigError(
            f"the topology file sets dynamo_backend: {compiler}; remove it: train.compile decides"
        )
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if _is_on(environment, "ACCELERATE_USE_FSDP"):
        return _fsdp(environment, number, precision)
    if _is_on(environment, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise ConfigError(
            "parallelism_config needs distributed_type: FSDP and fsdp_version: 2, "
            "as in accelerate_configs/fsdp2_hybrid.yaml"
        )
    if _is_on(environment, "ACCELERATE_USE_DEEPSPEED"):
        return _deepspeed(environment, number, precision)
    return ParallelConfig("ddp" if number > 1 else "single", number, mixed_precision=precision)


def recorded(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return what the launcher has set, for the receipt: `replay` starts the same processes."""
    return {name: value for name, value in sorted(environment.items()) if is_recorded(name)}


def is_recorded(name: str) -> bool:
    """Return whether a receipt holds this variable; `replay` sets no other, for safety."""
    return name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE") or name.startswith(
        ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")
    )


def join_minutes(environment: Mapping[str, str] = os.environ) -> float:
    """Return how long processes wait for each other at the start."""
    value = environment.get("FINETUNE_JOIN_MINUTES", "5")
    try:
        minutes = float(value)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise ConfigError(f"FINETUNE_JOIN_MINUTES: {value}; it must be a number of minutes above 0")
    return minutes


def _fsdp(environment: Mapping[str, str], number: int, precision: str) -> ParallelConfig:
    if environment.get("FSDP_VERSION", "1") != "2":
        raise ConfigError(
            "the topology file asks for FSDP 1; "
            "set fsdp_version: 2, as in accelerate_configs/fsdp2.yaml"
        )
    if _is_on(environment, "FSDP_ACTIVATION_CHECKPOINTING"):
        raise ConfigError(
            "fsdp_activation_checkpointing: set it to false: "
            "train.gradient_checkpointing decides, under every topology"
        )
    reshard = environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower()
    if reshard not in ("true", "full_shard", "false", "shard_grad_op"):
        raise ConfigError(f"fsdp_reshard_after_forward: {reshard}; it must be true or false")
    reshards = reshard in ("true", "full_shard")
    offload = _is_on(environment, "FSDP_OFFLOAD_PARAMS")
    if offload and not reshards:
        raise ConfigError(
            "fsdp_reshard_after_forward: false keeps whole layers on the device, from where "
            "fsdp_offload_params: true removes them; set it to true"
        )
    by_layer = "TRANSFORMER_BASED_WRAP"
    if (policy := environment.get("FSDP_AUTO_WRAP_POLICY", by_layer)) != by_layer:
        raise ConfigError(
            f"fsdp_auto_wrap_policy: {policy}; set TRANSFORMER_BASED_WRAP: "
            "every layer is sharded by itself"
        )
    if modules := environment.get("FSDP_IGNORED_MODULES"):
        raise ConfigError(f"fsdp_ignored_modules: {modules}; remove it: every weight is sharded")
    sizes = _parallelism(environment, number)
    classes = environment.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    names = [] if classes == "None" else [name.strip() for name in classes.split(",")]
    return ParallelConfig(
        "fsdp2", number, offload=offload, num_replicas=sizes["DP_REPLICATE"],
        num_context=sizes["CP"], reshards=reshards, mixed_precision=precision,
        layer_classes=tuple(name for name in names if name),
    )  # fmt: skip


def _parallelism(environment: Mapping[str, str], number: int) -> dict[str, int]:
    """Return the sizes of parallelism_config. Raises ConfigError for those that do not fit."""
    sizes = {
        name: _whole(
            environment,
            f"PARALLELISM_CONFIG_{name}_SIZE",
            1,
            f"parallelism_config_{name.lower()}_size",
        )
        for name in ("DP_REPLICATE", "DP_SHARD", "TP", "CP", "SP")
    }
    for name, instead in (("TP", "dp_shard_size"), ("SP", "cp_size")):
        if sizes[name] > 1:
            raise ConfigError(
                f"parallelism_config_{name.lower()}_size: {sizes[name]} is not supported, "
                f"see docs/topologies.md; use parallelism_config_{instead}"
            )
    if _is_on(environment, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        product = sizes["DP_REPLICATE"] * sizes["DP_SHARD"] * sizes["CP"]
        if product != number:
            raise ConfigError(
                f"parallelism_config: dp_replicate_size {sizes['DP_REPLICATE']} "
                f"x dp_shard_size {sizes['DP_SHARD']} x cp_size {sizes['CP']} is {product}, "
                f"but there are {number} processes; make them equal"
            )
    return sizes


def _deepspeed(environment: Mapping[str, str], number: int, precision: str) -> ParallelConfig:
    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file.lower() == "none":
        raise ConfigError(
            "the topology file has no deepspeed_config_file; "
            "point it at a file like those in ds_configs/"
        )
    try:
        values = json.loads(Path(found(file)).read_text())
    except (OSError, ValueError) as exc:
        raise ConfigError(
            f"deepspeed_config_file: {file} cannot be read from {os.getcwd()}: {exc}"
        ) from exc
    if not isinstance(values, dict):
        raise ConfigError(
            f"{file} holds a {type(values).__name__} instead of settings; see ds_configs/"
        )
    for key, owner in OWNED.items():
        if values.get(key, "auto") != "auto":
            raise ConfigError(f"{file}: {key} is decided by {owner} of the run config; remove it")
    if unknown := [key for key in values if key not in (*KEYS, *OWNED)]:
        raise ConfigError(
            f"{file}: {unknown[0]} is untested; "
            f"remove it: a file may hold only zero_optimization, {', '.join(KEYS[1:])}"
        )
    zero = values.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else zero
    if type(stage) is not int or stage not in (1, 2, 3):
        raise ConfigError(
            f"{file}: zero_optimization.stage is {stage}; "
            "take 1, 2 or 3, or accelerate_configs/ddp.yaml for none"
        )
    devices = {}
    for name in ("offload_optimizer", "offload_param"):
        setting = zero.get(name) or {}
        device = devices[name] = (
            setting.get("device", "none") if isinstance(setting, dict) else setting
        )
        if device not in ("none", "cpu"):
            raise ConfigError(f"{file}: {name}.device is {device}; only cpu and none are tested")
        if device == "cpu" and stage != 3:
            raise ConfigError(
                f"{file}: {name} with stage {stage} is untested; "
                "take accelerate_configs/zero3_offload.yaml"
            )
    return ParallelConfig(
        f"zero{stage}", number, offload="cpu" in devices.values(), mixed_precision=precision,
        deepspeed={key: value for key, value in values.items() if key not in OWNED},
    )  # fmt: skip


def _is_on(environment: Mapping[str, str], name: str) -> bool:
    value = environment.get(name, "false").lower()
    if value not in ("true", "1", "yes", "false", "0", "no", "none", ""):
        raise ConfigError(f"{name.lower()}: {value}; it must be true or false")
    return value in ("true", "1", "yes")


def _whole(environment: Mapping[str, str], name: str, least: int, setting: str = "") -> int:
    """Return a whole number of at least `least`; `setting`: its name in a topology file."""
    value = environment.get(name, str(least))
    if not value.isdecimal() or int(value) < least:
        found = f"{setting}: {value}" if setting else f"{name}: {value!r} in the environment"
        raise ConfigError(f"{found}; it must be a whole number from {least}")
    return int(value)
