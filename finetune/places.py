"""Find train.py and topology files, in a checkout or the installed package, and missing files."""

import difflib
import os
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parents[1]
IS_CHECKOUT = (_CHECKOUT / "accelerate_configs").is_dir()
SHIPPED = _CHECKOUT if IS_CHECKOUT else Path(__file__).resolve().parent / "shipped"
"""Folder of train.py, accelerate_configs/, ds_configs/ and benchmarks/measured.json; packaged."""
TRAIN = SHIPPED / "train.py"
# Environment variables for the processes that the launcher, or `replay`, starts:
# A folder. Each process writes its progress, such as "step 38", into a file named by its rank.
# Process 0 writes the path of its run directory into RUN until it has written the outcome of the
# run: if it is killed first, the launcher writes the outcome.
BEATS, RUN = "FINETUNE_BEATS", "run"
REPLAY_OF = "FINETUNE_REPLAY_OF"  # the directory of the run that they repeat
LAUNCHER = "FINETUNE_LAUNCHER"  # the process number of the launcher
COMMAND = "FINETUNE_COMMAND"  # how the user calls the program, if not as train.py
MODULE = "python -m finetune"


def note_command(program: str) -> None:
    """Remember how the user calls the program. `program`: sys.argv[0]."""
    os.environ[COMMAND] = "finetune" if Path(program).stem == "finetune" else MODULE


def command() -> str:
    """Return how to call the program again, for messages."""
    return "finetune" if os.environ.get(COMMAND) == "finetune" else MODULE


def train_command() -> str:
    """Return how the user trains: `train.py`, or the command `train`."""
    return f"{command()} train" if COMMAND in os.environ else "train.py"


def found(name: str) -> str:
    """Return the path of a file, or of the one that is shipped if only that exists."""
    name = os.path.expanduser(name)
    shipped = SHIPPED / name
    return str(shipped) if not Path(name).exists() and shipped.is_file() else name


_config_folder: list[Path] = []


def note_config_folder(folder: Path | None) -> None:
    """Remember the folder of the config, for `looked_in`; None without a config file."""
    _config_folder[:] = [folder] if folder else []


def looked_in() -> str:
    """Return the folders that relative paths of the config are looked for in, for messages."""
    folders = dict.fromkeys([os.getcwd(), *(str(each.absolute()) for each in _config_folder)])
    return " and ".join(folders)


def nearest(folder: str, name: str) -> str | None:
    """Return the existing path in a folder with the name nearest to `name`, or None."""
    try:
        # Without links whose targets are gone.
        found = os.listdir(folder or ".")
        inside = [each for each in found if os.path.exists(os.path.join(folder, each))]
    except (OSError, ValueError):
        return None
    near = difflib.get_close_matches(name, inside, n=1)
    near = near or [each for each in inside if each.lower() == name.lower()]
    return os.path.join(folder, near[0]) if near else None
