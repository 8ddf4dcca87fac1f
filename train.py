"""Specialise a language model to a task.

    accelerate launch --config_file accelerate_configs/ddp.yaml train.py --config configs/my_run.yaml
    python train.py --config configs/my_run.yaml            one process, CPU or one GPU
    python train.py --config configs/my_run.yaml --check    everything that can be known without loading weights

finetune/loop.py tells the run from top to bottom; it imports torch, so --help and a wrong config
answer before that.
"""

import os
import sys
import traceback

from finetune import config as configs
from finetune import failures
from finetune.config import paths
from finetune.console import BrokenPipeProof
from finetune.errors import EXIT_COMPLETE, EXIT_FAILED, EXIT_USER_ERROR, DeviceError, Preempted
from finetune.survival.preemption import StopFlag


def main() -> int:
    """Run, and turn how it ended into the exit code of the contract."""
    sys.stdout, sys.stderr = BrokenPipeProof(sys.stdout), BrokenPipeProof(sys.stderr)
    paths.give_home()
    stop = StopFlag()  # until the run begins, a signal ends the process at once
    stop.follow_launcher()
    grow_segments()
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


def grow_segments() -> None:
    """Let the GPU's allocator grow its blocks: micro-batches differ in length, and blocks that fit
    none would pile up.

    PyTorch reads this when it is imported; a setting of the user's own, under any of its names,
    stays.
    """
    names = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"}
    if not os.environ.keys() & names:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def report(exc: BaseException) -> int:
    """Write how the run failed, in a line if the error is one of ours, and return the exit code."""
    error = exc if isinstance(exc, Preempted) else failures.translate(exc)
    if error is None or isinstance(error, DeviceError):  # the place tells a bug from a broken GPU
        traceback.print_exception(exc)
    if error is None:
        return EXIT_FAILED
    rank, message = os.environ.get("RANK", "0"), f"{error.label}: {error}"
    if error.exit_code == EXIT_USER_ERROR:  # the same on every process: one shows all of it
        message = message if rank == "0" else message.partition("\n")[0]
    elif os.environ.get("WORLD_SIZE", "1") != "1":
        message = f"[process {rank}] {message}"
    sys.stderr.write(message + "\n")  # in one piece, as other processes write too
    return error.exit_code


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads may wait for processes that have gone, and streams for readers
