"""Start the processes of one node, forward signals to all, and return their exit code.

    python -m finetune launch train.py my_run.yaml      one process, nothing set
    python -m finetune launch --config_file accelerate_configs/fsdp2.yaml --num_processes 2
        train.py my_run.yaml

Accelerate parses the arguments and sets the environment. We start the processes ourselves, because
`accelerate launch` does not forward SIGTERM to a single process, kills several 30 seconds after it,
and turns exit codes 2 and 75 into 1. Linux only.
"""

from finetune.errors import FinetuneError
from finetune.survival.launcher.arguments import free_port, ranked, read
from finetune.survival.launcher.processes import forwarding, log, run, supervise

__all__ = ["free_port", "main", "ranked", "read", "run"]


def main(argv: list[str]) -> int:
    """Run `python -m finetune launch`; return its exit code."""
    with forwarding() as heard:
        try:
            environments, command = read(argv)
        except FinetuneError as exc:
            log(f"{exc.label}: {exc}")
            return exc.exit_code
        except SystemExit as exc:  # --help
            return int(exc.code or 0)
        return supervise(heard, environments, command)
