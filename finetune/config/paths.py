"""Paths as users write them: `~`, half characters, and what is a folder here rather than a name on
the Hub. No torch.
"""

import glob
import os
import stat
import tempfile
from typing import Annotated, Any

from pydantic import AfterValidator

DEFAULT_CACHE = "~/.cache/finetune"


def expanded(path: Any) -> Any:
    """A path, or each of a list, with the home directory in place of `~`. Raises ValueError where
    there is none.
    """
    if isinstance(path, list):
        return [expanded(each) for each in path]
    if not isinstance(path, str):
        return path
    if "\0" in path:
        raise ValueError("holds a zero byte, which no path can; write it again")
    scheme, bare = ("file://", path[7:]) if path.startswith("file://") else ("", path)
    if not bare.startswith("~"):
        return path
    user = bare.split("/")[0]
    if user == "~" and not has_home():
        raise ValueError(
            "begins with ~, but this machine has no home directory; set HOME, or write the full "
            "path"
        )
    whole = os.path.expanduser(bare)
    if whole == bare and user != "~":
        raise ValueError(
            f"begins with {user}, but this machine has no such user; write the full path"
        )
    return scheme + whole


ExpandedPath = AfterValidator(expanded)
"""Marks a setting that holds a path: `Annotated[str, ExpandedPath]`."""
PathString = Annotated[str, ExpandedPath]


def beside_config(value: Any, folder: str) -> Any:
    """A path of a config, or each of a list: as it is if it is there, else in the config's folder
    if it is there.

    Raises ValueError if both are there and differ: either could be meant.
    """
    if isinstance(value, list):
        return [beside_config(each, folder) for each in value]
    if (
        not isinstance(value, str)
        or not value
        or "\0" in value
        or "://" in value
        or value[0] in "/~"
    ):
        return value
    beside = os.path.join(folder, value)
    if not _is_there(beside) or os.path.realpath(beside) == os.path.realpath(value):
        return value
    if _is_there(value):
        raise ValueError(
            f"{value} is in {os.getcwd()} and in {os.path.abspath(folder)}; write the full path"
        )
    return beside


def _is_there(path: str) -> bool:
    return os.path.exists(path) or (glob.has_magic(path) and any(glob.iglob(path, recursive=True)))


def argument(text: str) -> str:
    """A path on the command line of a tool, for argparse."""
    import argparse

    try:
        return str(expanded(text))
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"{text} {exc}") from exc


def cache_dir(given: str, run_dir: str) -> str:
    """data.cache_dir without `~`; the default becomes a folder next to the runs if the home
    directory cannot be written.
    """
    home = os.path.expanduser("~")
    if given == DEFAULT_CACHE and not (
        has_home() and (os.path.isdir(given_to := home + given[1:]) or _writable(given_to))
    ):
        return os.path.join(run_dir, ".cache")
    return str(expanded(given))


def _writable(path: str) -> bool:
    """Whether a folder, or the nearest one above that exists, can be written."""
    while not os.path.exists(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    return os.path.isdir(path) and os.access(path, os.W_OK)


def _stand_in() -> str:
    return os.path.join(tempfile.gettempdir(), f"finetune-home-{os.getuid()}")


def has_home() -> bool:
    """Whether this user has a home directory, other than what `give_home` made."""
    return os.path.expanduser("~") not in ("~", _stand_in())


def give_home() -> None:
    """Let libraries that ask for a home directory and a user name find some: containers run under
    user ids that have neither.

    Without, huggingface_hub writes into a folder called `~`, and torch.compile ends in a KeyError.
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
        except OSError:  # it is there, and should be ours alone, or there is nowhere to write
            with_owner = os.lstat(home) if os.path.lexists(home) else None
            if (
                with_owner is None
                or not stat.S_ISDIR(with_owner.st_mode)
                or with_owner.st_uid != os.getuid()
            ):
                return
        os.environ["HOME"] = home


def is_local(name: str) -> bool:
    """Whether a name can only be a path here: it exists, has the form of a path, or its first
    folder is here. Else it is one of the Hub.
    """
    return (
        os.path.exists(name)
        or name.startswith((".", "/", "~"))
        or name.endswith("/")
        or name.count("/") > 1
        or "\\" in name
        or ("/" in name and os.path.isdir(name.split("/")[0]))
    )


def half_characters(value: Any, key: str = "") -> list[str]:
    """Keys of strings that hold half of a surrogate pair, which no file and no tokenizer can hold."""
    if isinstance(value, str):
        return [key] if any("\ud800" <= letter <= "\udfff" for letter in value) else []
    if isinstance(value, dict):
        return [
            found
            for name, inner in value.items()
            for found in (
                *half_characters(str(name), shown(f"{key}.{name}".lstrip("."))),
                *half_characters(inner, shown(f"{key}.{name}".lstrip("."))),
            )
        ]
    if isinstance(value, list):
        return list(
            dict.fromkeys(found for inner in value for found in half_characters(inner, key))
        )
    return []


def shown(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
