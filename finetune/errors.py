"""The errors a user can cause. Each one says what is wrong, what was found, and what to do."""


class UserError(Exception):
    """Input that is wrong: the run ends with exit code 2, and trying again cannot help."""


class ConfigError(UserError):
    """A key or a value of the run config is wrong."""


class DataError(UserError):
    """A file, a row or a template is wrong."""


class ModelError(UserError):
    """The model, its tokenizer or its adapter cannot be what the config asks for."""


class RunDirectoryError(UserError):
    """The run directory cannot be written, or holds something that must not be overwritten."""


class CheckpointError(Exception):
    """A checkpoint could not be written or read back. Not the user's input: exit code 1."""


class DamagedCheckpoint(CheckpointError):
    """What was written is not what is there: unlike a store that does not answer, a reason to take an older one."""


class TakenOver(CheckpointError):
    """Another machine writes this run now. Exit code 2: started again, the two would take turns for ever."""


class DirectoryInUse(Exception):
    """Another process writes this run directory. Exit code 1: it may be about to end."""


class ExportError(Exception):
    """The exported model does not match the trained one. Exit code 1."""


class Outage(Exception):
    """A hub does not answer, or a disk is full or has gone. Exit code 1: another attempt may find it well."""


class TopologyError(Exception):
    """Processes did not find, or lost, each other. Exit code 1; starting all of them again may help."""


class TrainingDiverged(Exception):
    """The loss or a gradient is NaN or infinite. Exit code 1; the weights were not updated."""


class OutOfMemory(Exception):
    """A device or a machine has too little memory for what the config asks for. Exit code 1."""


class Preempted(BaseException):
    """The machine is being taken away; exit code 75 asks to be run again.

    No Exception, so that no library's or our own `except Exception` takes it for something else.
    """


EXIT_COMPLETE = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: temporary failure, run it again
EXIT_INTERRUPTED = 130  # what shells give for Ctrl-C
