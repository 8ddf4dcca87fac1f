"""Load a user's own code, named in a config as FILE.py:NAME or package.module:NAME. No torch.

Only `read` executes code, and only `config` calls it, with names from the user's config or command
line; processes that a run starts read the same by `read_as`. Each file is executed once: an edit
during a run changes nothing.
"""

import difflib
import hashlib
import importlib
import os
import re
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from finetune import failures, places
from finetune.errors import ConfigError, FinetuneError

FORM = r"^.+:[A-Za-z_]\w*$"
EXPECTED = "FILE.py:NAME"


@dataclass(frozen=True, eq=False)
class OwnCode:
    """An object of a user's own.

    `path`: its file; `sha256`: of that file, or of all files of its package.
    """

    name: str
    path: Path
    sha256: str
    value: Any

    def __str__(self) -> str:
        return f"{shown(self.path)}:{self.name.rpartition(':')[2]}"

    def blame(self, exc: BaseException) -> str:
        """Return `file:line: KeyError: 'x'` of the last line of this file in a traceback."""
        return _blame(exc, self.path)


_READ: dict[str, OwnCode] = {}


def is_own(value: object) -> bool:
    """Return whether a value of a setting names code of the user's own."""
    return isinstance(value, str) and re.fullmatch(FORM, value) is not None


def find(name: str, folder: Path | None = None) -> str:
    """Complete the path in `name` from the config's `folder` or from here. Raises ConfigError."""
    place, _, attribute = name.rpartition(":")
    if not _is_file(place):
        return name
    folders = list(dict.fromkeys((*([folder.absolute()] if folder else []), Path.cwd())))
    paths = (each / os.path.expanduser(place) for each in folders)
    try:
        found = list(dict.fromkeys(os.path.realpath(path) for path in paths if path.is_file()))
    except OSError as exc:  # such as a name that is too long
        start = place if len(place) <= 100 else f"{place[:100]}..."
        raise ConfigError(f"{start} cannot be a file: {exc.strerror}; correct the path") from exc
    if len(found) > 1:
        raise ConfigError(f"{place} is in {folders[0]} and in {folders[1]}; write the full path")
    if found:
        return f"{found[0]}:{attribute}"
    inside, file = os.path.split(place)
    near = (places.nearest(str(each / inside), file) for each in folders)
    hint = next((f"did you mean {shown(Path(path))}?" for path in near if path), "correct the path")
    raise ConfigError(f"no file {place} in {' or in '.join(map(str, folders))}; {hint}")


def read(name: str) -> OwnCode:
    """Execute the file of a `name` from `find`, once for each content. Raises ConfigError."""
    place, _, attribute = name.rpartition(":")
    path, content, digest = _sources(place)
    if (known := _READ.get(name)) and known.sha256 == digest:
        return known
    try:
        is_file = _is_file(place)
        module = _execute(path, content, digest) if is_file else importlib.import_module(place)
    except (Exception, SystemExit) as exc:
        raise _failed(exc, path) from exc
    if not hasattr(module, attribute):
        raise ConfigError(f"{shown(path)} defines no {attribute}; {_defined(module, attribute)}")
    _READ[name] = OwnCode(name, path, digest, getattr(module, attribute))
    return _READ[name]


def _defined(module: ModuleType, wanted: str) -> str:
    """Suggest what a module defines for a name that it does not define."""
    own, values = module.__name__, vars(module).items()
    names = [name for name, value in values if getattr(value, "__module__", None) == own]
    lowered = {name.lower(): name for name in reversed(names)}
    near = difflib.get_close_matches(wanted.lower(), lowered, n=1)
    return f"did you mean {lowered[near[0]]}?" if near else f"it has {', '.join(names) or 'none'}"


def read_as(name: str, sha256: str) -> None:
    """Read what another process of this run has read. Raise ConfigError if it has changed since."""
    if name in _READ and _READ[name].sha256 == sha256:
        return
    if (found := read(name)).sha256 != sha256:
        raise ConfigError(f"{shown(found.path)} has changed since this command began; run it again")


def get(name: str) -> OwnCode:
    """Return what `read` returned for this name."""
    return _READ[name]


def sha256(name: str) -> str:
    """Return the hash of the file of `name` without executing it. Raises ConfigError."""
    return _sources(name.rpartition(":")[0])[2]


def _sources(place: str) -> tuple[Path, bytes, str]:
    """Return (the file of a place, its content, the hash of that or of a module's package)."""
    path = Path(place) if _is_file(place) else _path_of_module(place)
    content = _content(path)
    return path, content, hashlib.sha256(content if _is_file(place) else _package(path)).hexdigest()


def shown(path: Path) -> str:
    """Return a path relative to the working directory if it is inside."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def without_folder(name: str) -> str:
    """Return `name` as it is on any machine; to compare its content take the hash."""
    return os.path.basename(name) if _is_file(name.rpartition(":")[0]) else name


def label(setting: str, name: str) -> str:
    """How receipts and checkpoints call the hash of code."""
    return f"code of {setting}: {without_folder(name)}"


def _is_file(place: str) -> bool:
    return place.endswith(".py") or os.sep in place


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        failures.reraise(exc, f"{path} cannot be read now")
        raise ConfigError(f"{path} cannot be read: {exc.strerror}") from exc


def _package(path: Path) -> bytes:
    """Return all sources of the package of a module, or the module alone."""
    is_packaged = (path.parent / "__init__.py").exists()
    return b"".join(map(_content, sorted(path.parent.rglob("*.py")) if is_packaged else [path]))


def _execute(path: Path, content: bytes, sha256: str) -> ModuleType:
    """Execute a file as a module; it cannot import files next to it."""
    module = ModuleType(f"own_code_{path.stem}_{sha256[:12]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses need to find their module
    here = os.getcwd()
    try:
        exec(compile(content, str(path), "exec"), vars(module))
    except BaseException:
        del sys.modules[module.__name__]
        raise
    finally:
        os.chdir(here)  # other paths of the config are relative to it
    return module


def _path_of_module(place: str) -> Path:
    """Return the file of a module that can be imported from here. Raises ConfigError."""
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    found, inside, full_name = None, None, ""
    for part in place.split("."):  # importlib.util.find_spec would execute the packages around it
        full_name = f"{full_name}.{part}".lstrip(".")
        specs = (finder.find_spec(full_name, inside) for finder in sys.meta_path)
        found = next((spec for spec in specs if spec is not None), None)
        inside = found.submodule_search_locations if found else []
    if found is None or not found.has_location or found.origin is None:
        raise ConfigError(f"no module {place} can be imported here; name a file as {EXPECTED}")
    return Path(found.origin)


def _failed(exc: BaseException, path: Path) -> FinetuneError:
    """Return a ConfigError for an exception of the user's code; raise failures of the machine."""
    if isinstance(exc, Exception):
        failures.reraise(exc, f"{shown(path)} cannot be imported now")
    hint = ""
    if isinstance(exc, ModuleNotFoundError):
        hint = "; install it, or, if it is next to the file, move what you need into the file"
    return ConfigError(f"{_blame(exc, path)}{hint}")


def _blame(exc: BaseException, path: Path) -> str:
    """Return where in a file an exception comes from, and the first line of its message."""
    frames = traceback.extract_tb(exc.__traceback__)
    lines, message = [each.lineno for each in frames if each.filename == str(path)], str(exc)
    if isinstance(exc, SyntaxError) and exc.filename == str(path):
        lines, message = [exc.lineno], exc.msg
    first = next(iter(message.strip().splitlines()), "")[: failures.MOST_LETTERS]
    where = f"{shown(path)}:{lines[-1]}" if lines else shown(path)
    return f"{where}: {type(exc).__name__}" + (f": {first}" if first else "")
