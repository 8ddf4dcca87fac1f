"""The tree of errors that finetune raises on purpose; each says what is wrong and what to do.

    FinetuneError              exit code 1
    ├── UserError              2: the input is wrong, and trying again cannot help
    │   ├── ConfigError
    │   ├── DataError
    │   ├── ModelError
    │   └── RunDirectoryError
    ├── CheckpointError        1
    │   ├── DamagedCheckpoint
    │   ├── LostCheckpoints    2
    │   └── TakenOver          2
    ├── DeviceError            1
    ├── DirectoryInUse         1
    ├── ExportError            1
    ├── Outage                 1
    ├── OutOfMemory            1
    ├── ProcessFailed          1
    ├── ScoreTooLow            1
    ├── TopologyError          1
    └── TrainingDiverged       1
    Preempted                  75: a BaseException, see there
    └── Interrupted            75

Each ends a run with one line. Any other exception is a bug: it ends the run with its traceback and
exit code 1. A DeviceError shows both, because the traceback distinguishes a broken GPU from a
broken kernel. `finetune/failures.py` translates the exceptions of libraries into these.

Each error takes one argument, its message, because processes send each other only text.
"""

from collections.abc import Sequence

EXIT_COMPLETE = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: temporary failure, run it again
EXIT_INTERRUPTED = 130  # what shells give for Ctrl-C


class FinetuneError(Exception):
    """The root. `exit_code`: of the process; `label`: begins the line that reports the error."""

    exit_code = EXIT_FAILED
    label = "failed"


class UserError(FinetuneError):
    """The input is wrong: the run ends with exit code 2, and trying again cannot help."""

    exit_code = EXIT_USER_ERROR
    label = "error"


class ConfigError(UserError):
    """A key or a value of the run config is wrong."""


class DataError(UserError):
    """A file, a row or a template is wrong."""


class ModelError(UserError):
    """The model, its tokenizer or its adapter does not fit the config."""


class RunDirectoryError(UserError):
    """The run directory cannot be written, or holds something that must not be overwritten."""


class CheckpointError(FinetuneError):
    """A checkpoint could not be written or read, through no mistake of the user."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint is not what was written; unlike after an Outage, the run uses an older one."""


class LostCheckpoints(CheckpointError):
    """No checkpoint can be resumed, now or at the next attempt: a person must decide what to do."""

    exit_code = EXIT_USER_ERROR
    label = "error"


class TakenOver(CheckpointError):
    """Another machine writes this run now; a restart would make the two overwrite each other."""

    exit_code = EXIT_USER_ERROR
    label = "error"


class DeviceError(FinetuneError):
    """A GPU or its driver failed. Another attempt, perhaps on another machine, may succeed."""


class DirectoryInUse(FinetuneError):
    """Another process writes this run directory. It may be about to end."""


class ExportError(FinetuneError):
    """The exported model does not match the trained one."""


class Outage(FinetuneError):
    """A hub does not answer, or a disk is full or gone. Another attempt may succeed."""


class OutOfMemory(FinetuneError):
    """A device or a machine has too little memory for this config."""


class ProcessFailed(FinetuneError):
    """Another process met an error outside this tree. That process shows its traceback."""


class ScoreTooLow(FinetuneError):
    """The tuned model is below what --fail-under asks for; everything was evaluated and written."""


class TopologyError(FinetuneError):
    """Processes did not find each other, or lost each other. Restarting all of them may help."""


class TrainingDiverged(FinetuneError):
    """The loss or a gradient is NaN or infinite. The weights were not updated."""


class Preempted(BaseException):
    """The machine is being taken away; exit code 75 asks to be run again.

    A BaseException, because the signal can arrive inside any `try`: an `except Exception` of a
    library, or of ours, would take it for a failure of its own and continue.
    """

    exit_code = EXIT_PREEMPTED
    label = "preempted"


class Interrupted(Preempted):
    """A person pressed Ctrl-C before there was anything to save."""

    label = "stopped"


def either(words: Sequence[str], last: str = "or") -> str:
    """Return "a, b or c", for a message. `last`: the word before the last one."""
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
