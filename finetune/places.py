"""Where train.py and the topology files are, in a checkout or in the installed package, where
processes leave notes, and what a missing file may be.
"""

import difflib
import os
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parents[1]
IS_CHECKOUT = (_CHECKOUT / "accelerate_configs").is_dir()
SHIPPED = _CHECKOUT if IS_CHECKOUT else Path(__file__).resolve().parent / "shipped"
"""Holds train.py, accelerate_configs/ and ds_configs/; pyproject.toml copies them into the package.
"""
TRAIN = SHIPPED / "train.py"
# A setting of the launcher for its processes, which names a folder. Each process writes what it is
# at, such as "step 38", into a file named by its rank there, and process 0 writes the path of its
# run directory into RUN until it has written how the run ended: the launcher writes the outcome of
# processes that were killed.
BEATS, RUN = "FINETUNE_BEATS", "run"
# A setting of `replay` for its processes: the directory of the run that they repeat
REPLAY_OF = "FINETUNE_REPLAY_OF"
LAUNCHER = "FINETUNE_LAUNCHER"  # a setting of the launcher for its processes: its process number
COMMAND = "FINETUNE_COMMAND"  # how the user calls the program, for the processes that it starts


def note_command(program: str) -> None:
    """`program`: what Python was started with, which for the installed command is its path."""
    if Path(program).stem == "finetune":
        os.environ[COMMAND] = "finetune"


def command() -> str:
    """How to call the program again, for messages."""
    return "finetune" if os.environ.get(COMMAND) == "finetune" else "python -m finetune"


def found(name: str) -> str:
    """A file by its path from the working directory or, where it is not there, among what is
    shipped; as given if nowhere.
    """
    name = os.path.expanduser(name)
    shipped = SHIPPED / name
    return str(shipped) if not Path(name).exists() and shipped.is_file() else name


_config_folder: list[Path] = []


def note_config_folder(folder: Path | None) -> None:
    """Remember where the config lies, for `looked_in`. None: there is no config file."""
    _config_folder[:] = [folder] if folder else []


def looked_in() -> str:
    """The folders that a relative path of the config is looked for in, for messages."""
    folders = dict.fromkeys([os.getcwd(), *(str(each.absolute()) for each in _config_folder)])
    return " and ".join(folders)


def nearest(folder: str, name: str) -> str | None:
    """The path of what is called most like `name` in a folder; None if nothing is, or the folder
    cannot be listed.
    """
    try:
        inside = os.listdir(folder or ".")
    except (OSError, ValueError):
        return None
    near = difflib.get_close_matches(name, inside, n=1) or [
        each for each in inside if each.lower() == name.lower()
    ]
    return os.path.join(folder, near[0]) if near else None
