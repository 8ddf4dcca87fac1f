"""Paths as users write them: `~`, half characters, local folders and names on the Hub. No torch."""

import glob
import os
import re
import stat
import tempfile
from typing import Annotated, Any

from pydantic import AfterValidator

DEFAULT_CACHE = "~/.cache/finetune"
RUNS = "runs"  # the default of run.dir
HUB_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")  # owner/name, or the name of an old model


def expanded(path: Any) -> Any:
    """Replace `~` in a path, or in each of a list. Raises ValueError if home is unknown."""
    if isinstance(path, list):
        return [expanded(each) for each in path]
    if isinstance(path, dict):  # names of sources -> settings of each
        return {expanded(name): value for name, value in path.items()}
    if not isinstance(path, str):
        return path
    if "\0" in path:
        raise ValueError("holds a zero byte, which paths cannot; write it again")
    scheme, bare = ("file://", path[7:]) if path.startswith("file://") else ("", path)
    if not bare.startswith("~"):
        return path
    user = bare.split("/")[0]
    if user == "~" and not has_home():
        what = "but this machine has no home directory; set HOME, or write the full path"
        raise ValueError(f"begins with ~, {what}")
    whole = os.path.expanduser(bare)
    if whole == bare and user != "~":
        what = "but this machine has no such user; write the full path"
        raise ValueError(f"begins with {user}, {what}")
    return scheme + whole


ExpandedPath = AfterValidator(expanded)
"""Marks a setting that holds a path: `Annotated[str, ExpandedPath]`."""
PathString = Annotated[str, ExpandedPath]


def beside_config(value: Any, folder: str) -> Any:
    """Return a path, or each of a list, in the config's folder if it exists only there.

    Raises ValueError if it exists here and there, and differs: either could be meant.
    """
    if isinstance(value, list):
        return [beside_config(each, folder) for each in value]
    if isinstance(value, dict):
        return {beside_config(name, folder): each for name, each in value.items()}
    if not isinstance(value, str) or not value or "\0" in value:
        return value
    if "://" in value or value[0] in "/~":
        return value
    beside = os.path.join(folder, value)
    if not _is_there(beside) or os.path.realpath(beside) == os.path.realpath(value):
        return value
    if _is_there(value):
        both = f"{os.getcwd()} and in {os.path.abspath(folder)}"
        raise ValueError(f"{value} is in {both}; write the full path")
    return beside


def _is_there(path: str) -> bool:
    return os.path.exists(path) or (glob.has_magic(path) and any(glob.iglob(path, recursive=True)))


def argument(text: str) -> str:
    """Return a path of a command line with `~` replaced; a type for argparse."""
    import argparse

    try:
        return str(expanded(text))
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"{text} {exc}") from exc


def cache_dir(given: str, run_dir: str) -> str:
    """Return data.cache_dir without `~`; the default is beside the runs if home is not writable."""
    if given == DEFAULT_CACHE:
        path = os.path.expanduser("~") + given[1:]
        if not has_home() or not (os.path.isdir(path) or _writable(path)):
            return os.path.join(run_dir, ".cache")
    return str(expanded(given))


def _writable(path: str) -> bool:
    """Return whether a folder, or the nearest one above that exists, can be written."""
    while not os.path.exists(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    return os.path.isdir(path) and os.access(path, os.W_OK)


def _stand_in() -> str:
    return os.path.join(tempfile.gettempdir(), f"finetune-home-{os.getuid()}")


def has_home() -> bool:
    """Return whether this user has a home directory, other than one of `give_home`."""
    return os.path.expanduser("~") not in ("~", _stand_in())


def give_home() -> None:
    """Set HOME and USER if they are missing: containers run under user ids that have neither.

    Without them huggingface_hub writes into a folder called `~`, and torch.compile raises KeyError.
    """
    import getpass

    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = str(os.getuid())
    if os.path.expanduser("~") == "~":
        home = _stand_in()
        try:
            os.mkdir(home, mode=0o700)
        except OSError:  # it exists, and must be ours; or there is nowhere to write
            if not os.path.lexists(home):
                return
            entry = os.lstat(home)
            if not stat.S_ISDIR(entry.st_mode) or entry.st_uid != os.getuid():
                return
        os.environ["HOME"] = home


def is_local(name: str) -> bool:
    """Return whether a name is a path rather than one of the Hub.

    It is if it exists, does not have the form of a Hub id, or begins with `runs` or a folder that
    exists.
    """
    first, slash, _ = name.partition("/")
    return (
        os.path.exists(name)
        or not HUB_ID.fullmatch(name)
        or bool(slash and (first == RUNS or os.path.isdir(first)))
    )


def half_characters(value: Any, key: str = "") -> list[str]:
    """Return the keys of strings with half a surrogate pair, which UTF-8 cannot encode."""
    if isinstance(value, str):
        return [key] if any("\ud800" <= letter <= "\udfff" for letter in value) else []
    if isinstance(value, dict):
        found = []
        for name, inner in value.items():
            full = shown(f"{key}.{name}".lstrip("."))
            found += [*half_characters(str(name), full), *half_characters(inner, full)]
        return found
    if isinstance(value, list):
        of_each = (half_characters(inner, key) for inner in value)
        return list(dict.fromkeys(found for each in of_each for found in each))
    return []


def shown(text: str) -> str:
    """Replace half characters, which no terminal can print, by their escapes."""
    return text.encode("utf-8", "backslashreplace").decode()
