"""Turn the arguments of `accelerate launch` into the environments and command of each process."""

import argparse
import json
import logging
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

import yaml

from finetune import failures, places
from finetune.errors import ConfigError
from finetune.places import found
from finetune.survival.launcher.processes import log

PORT = 29500  # where nodes meet by default; a single node takes any free port
# How Accelerate starts processes; we start them ourselves.
IGNORED = (
    "rdzv_backend", "rdzv_conf", "max_restarts", "monitor_interval", "tee", "log_dir", "role",
    "deepspeed_hostfile", "deepspeed_inclusion_filter", "deepspeed_exclusion_filter",
    "deepspeed_multinode_launcher",
)  # fmt: skip


def read(argv: list[str]) -> tuple[list[dict[str, str]], list[str]]:
    """Return the environments of this node's processes, and the command that each runs."""
    if not argv:
        raise ConfigError(f"launch needs a script: {places.command()} launch train.py my_run.yaml")
    if not argv[0].startswith("-"):  # without Accelerate, whose import takes seconds
        return [dict(os.environ)], _command(argv[0], argv[1:])
    from accelerate.commands import launch

    arguments = _parse(argv)
    command = _command(
        arguments.training_script,
        arguments.training_script_args,
        arguments.module,
        arguments.no_python,
    )
    if arguments.config_file:
        arguments.config_file = found(arguments.config_file)
    where = arguments.config_file or "launch"
    if arguments.config_file:
        _check_file(where)
    elif arguments.num_processes is None:
        arguments.num_processes = 1
    elif arguments.num_processes > 1 and not _paradigm(arguments):
        # Without GPUs Accelerate would silently start one process.
        arguments.multi_gpu = True
    launch.default_config_file = ""  # ignore what `accelerate config` has left in ~/.cache
    logging.getLogger(launch.__name__).setLevel(logging.ERROR)  # hide its notes on defaults
    try:
        _, defaults, from_file = launch._validate_launch_command(arguments)
        _check(arguments, where)
        return _environments(arguments, defaults, from_file, where), command
    except Exception as exc:  # Accelerate's checks, and what it trips over in a malformed file
        failures.reraise(exc)
        raise ConfigError(f"{where}: {_one_line(exc)}; see docs/topologies.md") from exc


def _parse(argv: list[str]) -> argparse.Namespace:
    """Parse with Accelerate's parser; log which options have no effect here."""
    from accelerate.commands import launch

    def wrong(message: str) -> NoReturn:
        raise ConfigError(
            f"launch: {message}; "
            f"{places.command()} launch --help lists the options before the script"
        )

    parser = launch.launch_command_parser()
    parser.prog, parser.error = f"{places.command()} launch", wrong
    arguments: argparse.Namespace = parser.parse_args(argv)
    given = [name for name in IGNORED if name in getattr(arguments, "nondefault", ())]
    if given:
        instead = ""
        if "rdzv_conf" in given:
            instead = "; FINETUNE_JOIN_MINUTES limits the wait for other nodes"
        log(f"ignored, as launch starts the processes itself: --{', --'.join(given)}{instead}")
    return arguments


def _command(
    script: str, arguments: list[str], module: bool = False, no_python: bool = False
) -> list[str]:
    if module and no_python:
        raise ConfigError("launch: --module and --no_python exclude each other; give one of them")
    if no_python:
        if shutil.which(script) is None:
            raise ConfigError(f"{script} cannot be run; check its path, and that it is executable")
        return [script, *arguments]
    if module:
        return [sys.executable, "-m", script, *arguments]
    script = found(script)
    if not Path(script).is_file():
        raise ConfigError(
            f"found no script {script} in {os.getcwd()}; "
            "give the script and its options after the launcher's options"
        )
    return [sys.executable, script, *arguments]


def _check_file(path: str) -> None:
    """Raise ConfigError where Accelerate would say nothing, or print a traceback."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else _one_line(exc)
        raise ConfigError(
            f"--config_file {path} cannot be read from {os.getcwd()}: {why}; "
            "see accelerate_configs/"
        ) from exc
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} holds a {type(values).__name__} instead of settings; see accelerate_configs/"
        )
    if (machine := values.get("compute_environment", "LOCAL_MACHINE")) != "LOCAL_MACHINE":
        raise ConfigError(
            f"{path}: compute_environment is {machine}; "
            "take LOCAL_MACHINE, as in accelerate_configs/"
        )
    for key, value in values.items():
        if str(key).endswith("_config") and not isinstance(value, dict | None):
            raise ConfigError(
                f"{path}: {key} is {value!r}; it must hold settings, as in accelerate_configs/"
            )


def _paradigm(arguments: argparse.Namespace) -> bool:
    """Return whether the arguments choose how to use several devices."""
    names = "cpu multi_gpu tpu tpu_use_cluster use_deepspeed use_fsdp use_megatron_lm"
    return any(getattr(arguments, name) for name in names.split())


def _check(arguments: argparse.Namespace, where: str) -> None:
    """Check the numbers of processes and nodes: Accelerate rounds down, and accepts some text."""
    arguments.num_machines = arguments.num_machines or 1
    arguments.machine_rank = arguments.machine_rank or 0
    smallest = {"num_processes": 1, "num_machines": 1, "machine_rank": 0, "main_process_port": 0}
    for name, least in smallest.items():
        value = getattr(arguments, name)
        if (value is not None or least) and (type(value) is not int or value < least):
            raise ConfigError(
                f"{where}: {name} is {value!r}; it must be a whole number from {least}"
            )
    processes, nodes = arguments.num_processes, arguments.num_machines
    if processes % nodes:
        raise ConfigError(
            f"{where}: num_processes counts those of all nodes: {processes} cannot be "
            f"divided by num_machines: {nodes}; give --num_processes $(({nodes} * GPUs of a node))"
        )
    if arguments.machine_rank >= nodes:
        raise ConfigError(
            f"{where}: machine_rank is {arguments.machine_rank}, "
            f"but there are {nodes} nodes; ranks start at 0"
        )
    if nodes > 1 and not (arguments.main_process_ip and arguments.main_process_port != 0):
        raise ConfigError(
            f"{where}: {nodes} nodes need the address of the first one: give --main_process_ip, "
            f"and, where {PORT} is not free, the same --main_process_port on all"
        )
    if not isinstance(arguments.mixed_precision, str):  # a `no` without quotes is YAML's false
        raise ConfigError(
            f"{where}: mixed_precision is {arguments.mixed_precision!r}; "
            "remove it: train.precision of the run config decides"
        )
    if arguments.tpu or arguments.tpu_use_cluster or arguments.mpirun_hostfile:
        raise ConfigError(
            f"{where}: asks for TPUs or mpirun, which is not supported; see docs/topologies.md"
        )


def _environments(
    arguments: argparse.Namespace, defaults: Any, from_file: bool, where: str
) -> list[dict[str, str]]:
    """Return Accelerate's environment, checked in the order of its `launch_command`, plus ranks."""
    from accelerate import utils
    from accelerate.utils import launch

    zero = arguments.use_deepspeed and not arguments.cpu
    if not zero and (arguments.cpu or not _paradigm(arguments)):
        # train.py explains what is wrong with use_cpu.
        if arguments.num_processes > 1 and not (arguments.cpu or arguments.use_cpu):
            raise ConfigError(
                f"{where}: {arguments.num_processes} processes, "
                "but this distributed_type starts one; take distributed_type: MULTI_GPU, "
                "as in accelerate_configs/ddp.yaml, also without a GPU"
            )
        _, environment = launch.prepare_simple_launcher_cmd_env(arguments)
        return [environment]
    address = arguments.main_process_ip
    if arguments.num_machines == 1:
        address = "127.0.0.1"
        arguments.main_process_port = free_port(arguments.main_process_port or 0)
    arguments.main_process_port = arguments.main_process_port or PORT
    if zero:
        arguments.deepspeed_multinode_launcher = "standard"  # only our own node's processes
        fields = list(defaults.deepspeed_config) if defaults else []
        fields += ["mixed_precision"] if from_file else []
        arguments.deepspeed_fields_from_accelerate_config = ",".join(fields)
        _, environment = launch.prepare_deepspeed_cmd_env(arguments)
    else:
        environment = launch.prepare_multi_gpu_env(arguments)
    if not utils.check_cuda_p2p_ib_support():  # RTX 40 with old drivers
        environment = {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1", **environment}
    number = arguments.num_processes // arguments.num_machines
    if number > 1:
        environment.setdefault("OMP_NUM_THREADS", "1")  # as torchrun; ZeRO's environment lacks it
    environment |= {
        "WORLD_SIZE": str(arguments.num_processes),
        "LOCAL_WORLD_SIZE": str(number),
        "GROUP_RANK": str(arguments.machine_rank),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(arguments.main_process_port),
    }
    return ranked(environment, number, arguments.machine_rank * number)


def ranked(environment: dict[str, str], number: int, first: int = 0) -> list[dict[str, str]]:
    """Return the environments of a node's processes; `first`: the rank of the first one."""
    return [
        {**environment, "RANK": str(first + local), "LOCAL_RANK": str(local)}
        for local in range(number)
    ]


def free_port(wanted: int = 0) -> int:
    """Return a free port of this machine: `wanted` if it is free, else any."""
    with socket.socket() as probe:
        try:
            probe.bind(("", wanted))
        except OSError:
            probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def _one_line(exc: Exception) -> str:
    text = " ".join(str(exc).split()) or "no reason given"
    if isinstance(exc, ValueError | yaml.YAMLError):
        return text.rstrip(".")
    return f"{type(exc).__name__}: {text}"
