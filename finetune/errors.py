"""The errors that finetune raises on purpose, as a tree. Each says what is wrong, what was found
and what to do.

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
    ├── TopologyError          1
    └── TrainingDiverged       1
    Preempted                  75: not an Exception, see there
    └── Interrupted            75

An error ends a run with one line; anything else that is raised is a bug and ends with its traceback
and 1. Only a DeviceError has both, as the place tells a broken GPU from a broken kernel.
`finetune/failures.py` translates the exceptions of libraries into these.

Only words travel between processes: each error takes one argument, its message.
"""

EXIT_COMPLETE = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: temporary failure, run it again
EXIT_INTERRUPTED = 130  # what shells give for Ctrl-C


class FinetuneError(Exception):
    """The root. A class says how the process ends (`exit_code`) and how the line about it begins
    (`label`).
    """

    exit_code = EXIT_FAILED
    label = "failed"


class UserError(FinetuneError):
    """Input that is wrong: the run ends with exit code 2, and trying again cannot help."""

    exit_code = EXIT_USER_ERROR
    label = "error"


class ConfigError(UserError):
    """A key or a value of the run config is wrong."""


class DataError(UserError):
    """A file, a row or a template is wrong."""


class ModelError(UserError):
    """The model, its tokenizer or its adapter cannot be what the config asks for."""


class RunDirectoryError(UserError):
    """The run directory cannot be written, or holds something that must not be overwritten."""


class CheckpointError(FinetuneError):
    """A checkpoint could not be written or read back, without a mistake of the user."""


class DamagedCheckpoint(CheckpointError):
    """What was written is not what is there: unlike a store that does not answer, a reason to take
    an older one.
    """


class LostCheckpoints(CheckpointError):
    """No checkpoint can be gone on from, and none will be at the next attempt: a person must decide
    what becomes of the run.
    """

    exit_code = EXIT_USER_ERROR
    label = "error"


class TakenOver(CheckpointError):
    """Another machine writes this run now. Starting again would make the two overwrite each other
    endlessly.
    """

    exit_code = EXIT_USER_ERROR
    label = "error"


class DeviceError(FinetuneError):
    """A GPU or its driver failed. Another attempt, perhaps on another machine, may succeed."""


class DirectoryInUse(FinetuneError):
    """Another process writes this run directory. It may be about to end."""


class ExportError(FinetuneError):
    """The exported model does not match the trained one."""


class Outage(FinetuneError):
    """A hub does not answer, or a disk is full or has gone. Another attempt may find it well."""


class OutOfMemory(FinetuneError):
    """A device or a machine has too little memory for what the config asks for."""


class ProcessFailed(FinetuneError):
    """Another process met an error outside this tree. That process shows its traceback."""


class TopologyError(FinetuneError):
    """Processes did not find, or lost, each other. Starting all of them again may help."""


class TrainingDiverged(FinetuneError):
    """The loss or a gradient is NaN or infinite. The weights were not updated."""


class Preempted(BaseException):
    """The machine is being taken away; exit code 75 asks to be run again.

    Neither an Exception nor a FinetuneError: otherwise an `except Exception` of a library, or of
    ours, that happens to be running when the signal arrives would take it for a failure of its own
    and go on.
    """

    exit_code = EXIT_PREEMPTED
    label = "preempted"


class Interrupted(Preempted):
    """A person pressed Ctrl-C before there was anything to save."""

    label = "stopped"
