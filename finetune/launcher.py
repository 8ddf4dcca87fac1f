"""Start the processes of one node and end with them: signals reach all of them, exit codes come back as they are.

    python -m finetune launch --config_file accelerate_configs/fsdp2.yaml --num_processes 2 train.py --config configs/my_run.yaml
    python -m finetune launch train.py --config configs/my_run.yaml          one process, nothing set

Arguments and the environment that follows from them are Accelerate's; only the processes are ours, because `accelerate
launch` loses the SIGTERM of a single process, kills several 30 seconds after it, and turns exit codes 2 and 75 into 1.
Linux only.
"""

import argparse
import contextlib
import json
import logging
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

from finetune.errors import (
    EXIT_COMPLETE,
    EXIT_FAILED,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
    ConfigError,
    TopologyError,
    UserError,
)

OTHERS_SECONDS = 10.0  # after one has failed: for the others to notice, and to write why they end
FINISH_SECONDS = 120.0  # after one has ended as it should: for the others to finish
START_SECONDS = 10.0  # for a process to install its handlers: before, a signal would only kill it
KILL_SECONDS = 10.0  # for the kernel to end what was killed
BEATS = (
    "FINETUNE_BEATS"  # a folder: each process writes what it is at, such as "step 38", into a file named by its rank
)
PORT = 29500  # where nodes find each other if nobody says; on one node any free port will do

FORWARDED = {
    signal.SIGTERM: signal.SIGTERM, signal.SIGINT: signal.SIGINT, signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGHUP: signal.SIGTERM,  # the terminal has gone: save and end
}  # fmt: skip
# Options of the ways by which Accelerate starts processes, which is what we do ourselves.
IGNORED = (
    "rdzv_backend", "rdzv_conf", "max_restarts", "monitor_interval", "tee", "log_dir", "role", "deepspeed_hostfile",
    "deepspeed_inclusion_filter", "deepspeed_exclusion_filter", "deepspeed_multinode_launcher",
)  # fmt: skip
# What a process is before it is the worker: it asks for SIGTERM when the launcher dies (prctl 1 is PR_SET_PDEATHSIG),
# ends if that has happened before it could ask, and undoes what Python ignores. Not preexec_fn, whose Python would run
# in a fork of a process in which torch has threads.
BECOME = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
for number in (signal.SIGPIPE, signal.SIGXFSZ):
    signal.signal(number, signal.SIG_DFL)
os.execvp(sys.argv[2], sys.argv[2:])
"""


def main(argv: list[str]) -> int:
    """What stands behind `python -m finetune launch` -> exit code."""
    with _Inbox() as inbox, contextlib.ExitStack() as held:
        try:
            environments, command = plan(argv, held)
        except UserError as exc:
            _say(f"error: {exc}")
            return EXIT_USER_ERROR
        except TopologyError as exc:
            _say(f"failed: {exc}")
            return EXIT_FAILED
        except SystemExit as exc:  # --help
            return int(exc.code or 0)
        return _supervise(inbox, environments, command)


def run(environments: list[dict[str, str]], command: list[str]) -> int:
    """Start one process for each environment and wait for all; call it from the main thread, as it handles signals.

    0 if all have ended with 0. Else that of the first one that ended with something else, if it is 2 or 75; else 1.
    """
    with _Inbox() as inbox:
        return _supervise(inbox, environments, command)


def _say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody reads any more: no reason to leave the processes
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


class _Inbox:
    """Signals that have come, each once and in order, also while something else goes on.

    Python's own handler, in C, writes the number of each into a pipe, on which `select` can wait.
    """

    def __enter__(self) -> "_Inbox":
        self._reader, writer = os.pipe()
        self._writer = writer
        for end in (self._reader, writer):
            os.set_blocking(end, False)
        self._wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        numbers = [signal.SIGCHLD, *FORWARDED]
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            numbers.remove(signal.SIGHUP)  # nohup
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._reader)
        os.close(self._writer)

    def wait(self, seconds: float) -> list[signal.Signals]:
        """What is to be forwarded; returns early for any signal, such as that of a process that has ended."""
        if not select.select([self._reader], [], [], None if seconds == float("inf") else seconds)[0]:
            return []
        return [FORWARDED[signal.Signals(number)] for number in os.read(self._reader, 4096) if number in FORWARDED]


class _Worker:
    """One process, the leader of a session of its own: Ctrl-C in a terminal reaches the launcher alone."""

    def __init__(self, environment: dict[str, str], command: list[str], beats: Path | None) -> None:
        self.rank = environment.get("RANK", "0")
        self.code: int | None = None
        """As subprocess has it: -9 is SIGKILL."""
        self.waiting: list[signal.Signals] = []
        """Signals that it has yet to be sent."""
        self._beat = beats / self.rank if beats else None
        self._started = time.monotonic()
        environment = {**environment, BEATS: str(beats)} if beats else environment
        shim = [sys.executable, "-I", "-S", "-c", BECOME, str(os.getpid())]
        self._process = subprocess.Popen([*shim, *command], env=environment, start_new_session=True)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def name(self) -> str:
        return f"process {self.rank}"

    @property
    def has_failed(self) -> bool:
        return self.code not in (None, EXIT_COMPLETE, EXIT_USER_ERROR, EXIT_PREEMPTED)

    def has_ended(self) -> bool:
        """Once it has, nothing of its session is left, such as children that load data, and `code` is known."""
        if self.code is None and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            self.kill()  # before it is reaped, as its number cannot be another's yet
            self.code = self._process.wait()
        return self.code is not None

    def deliver(self) -> None:
        """Send what waits, unless it has only just started and would die of it with nothing said."""
        if self.waiting and (time.monotonic() - self._started > START_SECONDS or _catches(self.pid, signal.SIGTERM)):
            for number in self.waiting:
                os.kill(self.pid, number)  # not send_signal, which might reap it
            self.waiting = []

    def kill(self) -> None:
        """Also ends what is stopped."""
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def bury(self) -> None:
        """Wait until it is gone, after `kill`."""
        try:
            self._process.wait(timeout=KILL_SECONDS)
        except subprocess.TimeoutExpired:
            _say(f"{self.name} cannot be killed and is left behind: it waits in the kernel, for a disk or a GPU")

    def end(self) -> str:
        """How it ended, and where: `was killed by SIGKILL in step 38`."""
        if self.code is not None and self.code < 0:
            known = -self.code in set(signal.Signals)
            how = f"was killed by {signal.Signals(-self.code).name if known else f'signal {-self.code}'}"
        else:
            how = f"ended with exit code {self.code}"
        return how + self.where()

    def where(self) -> str:
        try:
            [at, *_] = self._beat.read_text(errors="replace").splitlines() if self._beat else [""]
        except (OSError, ValueError):  # it never wrote, or was about to
            return ""
        return f" {'in' if at.startswith('step') else 'at'} {at[:100].strip()}" if at.strip() else ""


def _catches(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for it."""
    try:
        caught = re.search(r"^SigCgt:\s*([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return True
    return caught is None or bool(int(caught[1], 16) >> (number - 1) & 1)


def _supervise(inbox: _Inbox, environments: list[dict[str, str]], command: list[str]) -> int:
    """Start, watch, and leave nobody behind, whatever happens."""
    if inbox.wait(0):
        _say("preempted: a signal came before the first process was started; run the same command again")
        return EXIT_PREEMPTED
    workers: list[_Worker] = []
    with _beats() as beats:
        try:
            for environment in environments:
                workers.append(_Worker(environment, command, beats))
            return _watch(inbox, workers)
        finally:
            for worker in workers:
                worker.kill()
            for worker in workers:
                worker.bury()


@contextlib.contextmanager
def _beats() -> Iterator[Path | None]:
    try:
        folder = tempfile.mkdtemp(prefix="finetune-")
    except OSError:  # nothing can be written on this machine; nobody will be told the step
        yield None
        return
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _watch(inbox: _Inbox, workers: list[_Worker]) -> int:
    """Until nobody lives, or those who do have had their time -> exit code. However long they take after a signal."""
    codes: list[int | None] = []  # in the order in which they ended
    deadline, because = float("inf"), ""
    while living := [worker for worker in workers if worker.code is None]:
        left = deadline - time.monotonic()
        if left <= 0:
            for worker in living:
                _say(f"{worker.name} had not ended {because}, and was killed{worker.where()}")
            break
        for number in inbox.wait(min(left, 0.05) if any(worker.waiting for worker in living) else left):
            for worker in living:
                worker.waiting.append(number)
        for worker in living:
            if not worker.has_ended():
                worker.deliver()
                continue
            codes.append(worker.code)
            if worker.has_failed:
                _say(f"{worker.name} {worker.end()}")
            seconds = OTHERS_SECONDS if worker.has_failed else FINISH_SECONDS
            if time.monotonic() + seconds < deadline:
                deadline, because = time.monotonic() + seconds, f"{seconds:g} seconds after {worker.name}"
        if os.getpid() == 1:
            _reap(workers)
    first = next((code for code in codes if code), EXIT_COMPLETE)
    if first in (EXIT_USER_ERROR, EXIT_PREEMPTED):
        return first
    return EXIT_COMPLETE if first == EXIT_COMPLETE and len(codes) == len(workers) else EXIT_FAILED


def _reap(workers: list[_Worker]) -> None:
    """Orphans, whose parent PID 1 becomes; a worker is left for `has_ended`, to which its SIGCHLD leads."""
    own = {worker.pid for worker in workers if worker.code is None}
    with contextlib.suppress(ChildProcessError):
        while found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if found.si_pid in own:
                return
            os.waitpid(found.si_pid, 0)


def plan(argv: list[str], held: contextlib.ExitStack) -> tuple[list[dict[str, str]], list[str]]:
    """Environments of this node's processes, and what each runs. `held` keeps the port for them."""
    if not argv:
        raise ConfigError("launch was given no script; python -m finetune launch train.py --config configs/my_run.yaml")
    if not argv[0].startswith("-"):  # without Accelerate, whose import takes seconds
        return [dict(os.environ)], _command(argv[0], argv[1:])
    from accelerate.commands import launch

    arguments = _parse(argv)
    command = _command(arguments.training_script, arguments.training_script_args, arguments.module, arguments.no_python)
    where = arguments.config_file or "launch"
    if arguments.config_file:
        _check_file(where)
    elif arguments.num_processes is None:
        arguments.num_processes = 1
    elif arguments.num_processes > 1 and not _paradigm(arguments):
        arguments.multi_gpu = True  # Accelerate, without GPUs, would start one process and not say so
    launch.default_config_file = ""  # what `accelerate config` has once left in ~/.cache is no file of this run
    logging.getLogger(launch.__name__).setLevel(logging.ERROR)  # what it says of defaults
    try:
        _, defaults, from_file = launch._validate_launch_command(arguments)
        _check(arguments, where)
        return _environments(arguments, defaults, from_file, where, held), command
    except (UserError, TopologyError):
        raise
    except Exception as exc:  # Accelerate's own checks, and files of a shape that it does not check
        raise ConfigError(f"{where}: {_one_line(exc)}; see docs/topologies.md") from exc


def _parse(argv: list[str]) -> argparse.Namespace:
    """By Accelerate's parser; says which options mean nothing here."""
    from accelerate.commands import launch

    def wrong(message: str) -> NoReturn:
        raise ConfigError(f"launch: {message}; python -m finetune launch --help lists the options before the script")

    parser = launch.launch_command_parser()
    parser.prog, parser.error = "python -m finetune launch", wrong
    arguments: argparse.Namespace = parser.parse_args(argv)
    given = [name for name in IGNORED if name in getattr(arguments, "nondefault", ())]
    if given:
        instead = "; FINETUNE_JOIN_MINUTES bounds the waiting for other nodes" if "rdzv_conf" in given else ""
        _say(f"ignored, as launch starts the processes itself: --{', --'.join(given)}{instead}")
    return arguments


def _command(script: str, arguments: list[str], module: bool = False, no_python: bool = False) -> list[str]:
    if module and no_python:
        raise ConfigError("launch: --module and --no_python exclude each other; give one of them")
    if no_python:
        if shutil.which(script) is None:
            raise ConfigError(f"{script} is no program that can be run; check its path, and that it is executable")
        return [script, *arguments]
    if module:
        return [sys.executable, "-m", script, *arguments]
    if not Path(script).is_file():
        raise ConfigError(
            f"there is no script {script} in {os.getcwd()}; what follows the launcher's options is the script and its own options"
        )
    return [sys.executable, script, *arguments]


def _check_file(path: str) -> None:
    """What Accelerate would not tell, or would tell with a traceback."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else _one_line(exc)
        raise ConfigError(
            f"--config_file {path} cannot be read from {os.getcwd()}: {why}; see accelerate_configs/"
        ) from exc
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no settings, but a {type(values).__name__}; see accelerate_configs/")
    if (machine := values.get("compute_environment", "LOCAL_MACHINE")) != "LOCAL_MACHINE":
        raise ConfigError(f"{path}: compute_environment is {machine}; take LOCAL_MACHINE, as in accelerate_configs/")
    for key, value in values.items():
        if str(key).endswith("_config") and not isinstance(value, dict | None):
            raise ConfigError(f"{path}: {key} is {value!r}; it must hold settings, as in accelerate_configs/")


def _paradigm(arguments: argparse.Namespace) -> bool:
    names = ("cpu", "multi_gpu", "tpu", "tpu_use_cluster", "use_deepspeed", "use_fsdp", "use_megatron_lm")
    return any(getattr(arguments, name) for name in names)


def _check(arguments: argparse.Namespace, where: str) -> None:
    """Numbers of processes and nodes; Accelerate rounds down what does not divide, and takes text for some."""
    arguments.num_machines, arguments.machine_rank = arguments.num_machines or 1, arguments.machine_rank or 0
    smallest = {"num_processes": 1, "num_machines": 1, "machine_rank": 0, "main_process_port": 0}
    for name, least in smallest.items():
        value = getattr(arguments, name)
        if (value is not None or least) and (type(value) is not int or value < least):
            raise ConfigError(f"{where}: {name} is {value!r}; it must be a whole number from {least}")
    processes, nodes = arguments.num_processes, arguments.num_machines
    if processes % nodes:
        raise ConfigError(
            f"{where}: num_processes counts those of all nodes: {processes} cannot be shared out to num_machines: {nodes}; "
            f"give --num_processes $(({nodes} * GPUs of a node))"
        )
    if arguments.machine_rank >= nodes:
        raise ConfigError(
            f"{where}: machine_rank is {arguments.machine_rank}, but there are {nodes} nodes; ranks start at 0"
        )
    if nodes > 1 and not (arguments.main_process_ip and arguments.main_process_port != 0):
        raise ConfigError(
            f"{where}: {nodes} nodes need the address of the first one: give --main_process_ip, and, where {PORT} is not free, "
            "the same --main_process_port on all"
        )
    if not isinstance(arguments.mixed_precision, str):  # a `no` without quotes is YAML's false
        raise ConfigError(
            f"{where}: mixed_precision is {arguments.mixed_precision!r}; remove it: train.precision of the run config decides"
        )
    if arguments.tpu or arguments.tpu_use_cluster or arguments.mpirun_hostfile:
        raise ConfigError(f"{where}: asks for TPUs or mpirun, which this project does not have; see docs/topologies.md")


def _environments(
    arguments: argparse.Namespace, defaults: Any, from_file: bool, where: str, held: contextlib.ExitStack
) -> list[dict[str, str]]:
    """Accelerate's, in the order in which its `launch_command` looks, and the ranks, which torchrun would add."""
    from accelerate import utils
    from accelerate.utils import launch

    zero = arguments.use_deepspeed and not arguments.cpu
    if not zero and (arguments.cpu or not _paradigm(arguments)):
        if arguments.num_processes > 1 and not (arguments.cpu or arguments.use_cpu):  # those train.py explains
            raise ConfigError(
                f"{where}: {arguments.num_processes} processes, but this distributed_type starts one; "
                "take distributed_type: MULTI_GPU, as in accelerate_configs/ddp.yaml, also without a GPU"
            )
        _, environment = launch.prepare_simple_launcher_cmd_env(arguments)
        return [environment]
    address, arguments.main_process_port = _meeting_point(arguments, held)
    if zero:
        arguments.deepspeed_multinode_launcher = "standard"  # only our own node's processes
        fields = [*(defaults.deepspeed_config if defaults else ()), *(["mixed_precision"] if from_file else ())]
        arguments.deepspeed_fields_from_accelerate_config = ",".join(fields)
        _, environment = launch.prepare_deepspeed_cmd_env(arguments)
    else:
        environment = launch.prepare_multi_gpu_env(arguments)
    if not utils.check_cuda_p2p_ib_support():  # RTX 40 with old drivers
        environment = {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1", **environment}
    number = arguments.num_processes // arguments.num_machines
    if number > 1:
        environment.setdefault("OMP_NUM_THREADS", "1")  # ZeRO's lacks it; torchrun sets it so
    environment |= {
        "WORLD_SIZE": str(arguments.num_processes), "LOCAL_WORLD_SIZE": str(number),
        "GROUP_RANK": str(arguments.machine_rank), "MASTER_ADDR": address, "MASTER_PORT": str(arguments.main_process_port),
    }  # fmt: skip
    first = arguments.machine_rank * number
    return [{**environment, "RANK": str(first + local), "LOCAL_RANK": str(local)} for local in range(number)]


def _meeting_point(arguments: argparse.Namespace, held: contextlib.ExitStack) -> tuple[str, int]:
    """Address and port at which process 0 will listen."""
    if arguments.num_machines == 1:
        try:
            return "127.0.0.1", _hold(arguments.main_process_port or 0, held)
        except OSError:
            return "127.0.0.1", _hold(0, held)
    port = arguments.main_process_port or PORT
    if arguments.machine_rank == 0:
        try:
            _hold(port, held, from_the_start=True)
        except OSError as exc:
            raise TopologyError(
                f"port {port} of this node cannot be used: {exc.strerror}; give every node the same other --main_process_port"
            ) from exc
    return arguments.main_process_ip, port


def _hold(port: int, held: contextlib.ExitStack, from_the_start: bool = False) -> int:
    """Take a port, 0 for any, so that no other launcher is given it in the seconds before process 0 listens.

    Who binds it with SO_REUSEADDR, as PyTorch does, still can, since we do not listen. Set after our own bind, another
    launcher's fails; set before, connections of an earlier run that the kernel still remembers are no obstacle.
    """
    dual = socket.has_dualstack_ipv6()
    keeper = held.enter_context(socket.socket(socket.AF_INET6 if dual else socket.AF_INET))
    if dual:
        keeper.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    if from_the_start:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    keeper.bind(("", port))
    keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    taken: int = keeper.getsockname()[1]
    return taken


def _one_line(exc: Exception) -> str:
    text = " ".join(str(exc).split()) or "no reason given"
    return text.rstrip(".") if isinstance(exc, ValueError | yaml.YAMLError) else f"{type(exc).__name__}: {text}"
