"""Specialise a language model to a task.

    python train.py my_run.yaml --check    check everything but the weights
    python train.py my_run.yaml            one process, CPU or one GPU
    accelerate launch --config_file accelerate_configs/ddp.yaml train.py my_run.yaml

finetune/loop.py shows the run from top to bottom. It imports torch; --help and errors of the config
come first, without waiting for it.
"""

import os
import sys
import traceback

from finetune import config as configs
from finetune import cores, failures
from finetune.config import paths
from finetune.console import BrokenPipeProof, visible
from finetune.errors import EXIT_COMPLETE, EXIT_FAILED, EXIT_USER_ERROR, DeviceError, Preempted
from finetune.survival.preemption import StopFlag


def main() -> int:
    """Run, and return the exit code."""
    sys.stdout, sys.stderr = BrokenPipeProof(sys.stdout), BrokenPipeProof(sys.stderr)
    paths.give_home()
    stop = StopFlag()  # until the run begins, a signal ends the process at once
    stop.follow_launcher()
    prepare_libraries()
    try:
        try:
            config, check_only = configs.parse(sys.argv[1:])
            from finetune import loop

            loop.run(config, check_only, stop)
        finally:
            stop.close()
        return EXIT_COMPLETE
    except (Exception, Preempted) as exc:
        return report(exc)


def prepare_libraries() -> None:
    """Set what PyTorch reads when it is imported. A user's own settings stay.

    The GPU's allocator grows its blocks: lengths differ, and unusable blocks would pile up. Threads
    of OpenMP spin while they wait, which is fastest for a run alone. Where other processes work,
    they sleep: spinning beside a single busy process halves the speed (benchmarks/LOG.md).
    """
    names = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"}
    if not os.environ.keys() & names:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    has_team = os.environ.get("OMP_NUM_THREADS") != "1"
    if has_team and "OMP_WAIT_POLICY" not in os.environ and cores.busy() > 0.5:
        os.environ["OMP_WAIT_POLICY"] = "passive"


def report(exc: BaseException) -> int:
    """Report how the run failed, in one line if the error is ours, and return the exit code."""
    error = exc if isinstance(exc, Preempted) else failures.translate(exc)
    if error is None or isinstance(
        error, DeviceError
    ):  # the traceback distinguishes a bug from a broken GPU
        traceback.print_exception(exc)
    if error is None:
        return EXIT_FAILED
    rank, message = os.environ.get("RANK", "0"), visible(f"{error.label}: {error}")
    is_users = error.exit_code == EXIT_USER_ERROR
    if is_users and rank != "0":  # most are the same on every process: rank 0 shows all of it
        message = message.partition("\n")[0]
    if os.environ.get("WORLD_SIZE", "1") != "1" and not (is_users and rank == "0"):
        message = f"[process {rank}] {message}"
    sys.stderr.write(message + "\n")  # one write, because other processes write too
    return error.exit_code


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads may wait for processes that are gone, and streams for readers
