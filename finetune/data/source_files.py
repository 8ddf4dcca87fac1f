"""Find the files, saved data sets and Hub names that data.train and data.eval name."""

import glob
import hashlib
import os
import re
from pathlib import Path
from typing import NamedTuple

from finetune import places
from finetune.data import encodings, hub, readers, remote
from finetune.data.file_types import TEXTS, TYPES, has_lines, type_of
from finetune.data.places import printable, some, wrong
from finetune.errors import DataError
from finetune.files import json_sha256, sha256

# Files that describe data, by name and ending.
DESCRIPTIONS = {
    **dict.fromkeys(
        "readme license licence copying notice citation changelog contributing".split(),
        ("", "md", "txt", "rst", "cff"),
    ),
    **dict.fromkeys("dataset_info dataset_infos dataset_dict".split(), ("json",)),
}
SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev", "eval", "evaluation", "held", "heldout"},
    "test": {"test", "testing"},
}
# Types whose bytes another type may take for other rows: JSON Lines and CSV are text, too.
READ_OTHERWISE = {**dict.fromkeys(TEXTS, "text"), ".tsv": "tsv"}


class Sources(NamedTuple):
    """Files, saved data sets and Hub names of data.train and data.eval -> hash of their content."""

    train: dict[str, str]
    eval: dict[str, str]
    notes: list[str]
    """Which files of folders and globs are not read, and why; doubts that names raise."""


def sources(train: str | list[str], evaluation: str | list[str] | None) -> Sources:
    """Return the training and evaluation sources. Raise DataError for one that is named twice."""
    train_names = [train] if isinstance(train, str) else train
    eval_names = [evaluation] if isinstance(evaluation, str) else evaluation or []
    if not train_names:
        raise DataError("data.train: the list is empty; name at least one file")
    if evaluation is not None and not eval_names:
        remedy = "name at least one file, or remove it to train without evaluation"
        raise DataError(f"data.eval: the list is empty; {remedy}")
    known: dict[str, str] = {}
    found = Sources({}, {}, [])
    groups = ((found.train, "data.train", train_names), (found.eval, "data.eval", eval_names))
    for own, key, names in groups:
        for name in names:
            files, notes = expand(name, key)
            found.notes.extend(note for note in notes if note not in found.notes)
            for file in files:
                content = fingerprint(file)
                found.notes.extend(_guessed(file))
                if content in known:
                    what = f"{printable(file)} holds the same rows as {known[content]}"
                    remedy = "do not evaluate on training rows, and list each file once"
                    raise DataError(f"{key}: {what}; {remedy}")
                known[content] = f"{key} {printable(file)}"
                own[file] = content
    return found


def expand(name: str, key: str) -> tuple[list[str], list[str]]:
    """Return the files of a file, folder, glob, URL or Hub name, and notes about files not read.

    `key` is data.train, INPUT for all files whatever split their names say, or anything else for
    rows to evaluate on. Raises DataError.
    """
    path = os.path.expanduser(name.removeprefix("file://"))
    if remote.is_url(path):
        return _expand_url(path, key)
    pattern = not os.path.lexists(path) and glob.has_magic(path) and "\0" not in path
    if hub.is_name(path):
        return [path], []
    if not os.path.exists(path) and not pattern:
        raise readers.absent(name, key)
    if not pattern and not os.path.isfile(path) and not os.path.isdir(path):
        why = "which cannot be read twice; write its rows into a file"
        raise DataError(f"{key}: {printable(name)} is a device or a pipe, {why}")
    if not pattern and (not os.path.isdir(path) or hub.is_saved(path)):
        return [path], []
    files: list[str] = []
    left_out: list[tuple[str, str]] = []
    with readers.readable(path):
        seen: set[str] = set()
        for match in sorted(glob.glob(path, recursive=True)) if pattern else [path]:
            _collect(match, seen, files, left_out)
    if any(type_of(file) not in TEXTS for file in files):  # pages about the rows
        pages = [file for file in files if type_of(file) == ".md"]
        left_out += [(file, "a page beside rows") for file in pages]
        files = [file for file in files if file not in pages]
    if pattern and not files and not left_out:
        searched = printable(places.looked_in())
        raise DataError(f"{key}: {printable(name)} matches no file; searched in {searched}")
    return _wanted(name, path, files, left_out, key, pattern)


def _expand_url(url: str, key: str) -> tuple[list[str], list[str]]:
    """Return the files of a URL, and notes about those that are not read."""
    found = remote.expand(url)
    if found == [url]:
        return found, []
    left_out = [
        (file, "describes data" if _describes(file) else "type not known")
        for file in found
        if _describes(file) or type_of(file) not in TYPES
    ]
    without = {file for file, _ in left_out}
    files = [file for file in found if file not in without]
    is_glob = any(letter in url for letter in "*?[")
    return _wanted(url, url.rstrip("/"), files, left_out, key, is_glob)


def _wanted(
    name: str, path: str, files: list[str], left_out: list[tuple[str, str]], key: str, is_glob: bool
) -> tuple[list[str], list[str]]:
    """Return the files that belong to the split of `key`, and notes about those not read."""
    literal, notes = re.split(r"[*?[]", path)[0] if is_glob else f"{path}/", list[str]()
    root = literal[: literal.rfind("/") + 1]
    wanted = _of_split(name, root, files, left_out, key, is_glob, notes)
    if not wanted:
        why = f"; not read: {_listed_reasons(left_out)}" if left_out else ""
        raise DataError(f"{key}: {printable(name)} holds no file with rows{why}")
    if left_out:
        notes.append(f"{key} does not read {_listed_reasons(left_out)}")
    return wanted, notes


def _describes(path: str) -> bool:
    name, _, ending = os.path.basename(path.rstrip("/")).lower().partition(".")
    return ending in DESCRIPTIONS.get(name, ())


def _collect(path: str, seen: set[str], files: list[str], left_out: list[tuple[str, str]]) -> None:
    """Add a file, or a folder's files in order of name. A file with several links counts once."""
    real = os.path.realpath(path)
    if real in seen:
        return
    # A link with another ending does not stand for its file.
    if os.path.isdir(path) or type_of(path) in TYPES:
        seen.add(real)
    if os.path.isdir(path) and not hub.is_saved(path):
        for entry in sorted(os.listdir(path)):
            inside = os.path.join(path, entry)
            if entry.startswith("."):
                left_out.append((inside + "/" * os.path.isdir(inside), "hidden"))
            else:
                _collect(inside, seen, files, left_out)
    elif not os.path.exists(path):
        remedy = "restore the file or remove the link"
        raise wrong(path, f"links to {printable(real)}, which does not exist; {remedy}")
    elif os.path.isdir(path):
        files.append(path)
    elif _describes(path):
        left_out.append((path, "describes data"))
    elif not os.path.isfile(path):
        left_out.append((path, "a device or a pipe"))
    elif type_of(path) not in TYPES:
        left_out.append((path, "type not known"))
    elif os.path.getsize(path) == 0:
        left_out.append((path, "empty"))
    else:
        files.append(path)


def _of_split(
    name: str, root: str, files: list[str], left_out: list[tuple[str, str]], key: str,
    pattern: bool, notes: list[str],
) -> list[str]:  # fmt: skip
    """Return the files of a folder or glob whose names fit `key`: training or evaluation."""
    if key == "INPUT":
        return files
    splits = {file: _split(file.removeprefix(root)) for file in files}
    held_out = [file for file in files if splits[file] in ("validation", "test")]
    held = f"{some(held_out)} {'is' if len(held_out) == 1 else 'are'}"
    has_train = "train" in splits.values()
    if key == "data.train":
        if held_out and has_train:
            left_out += [(file, f"named as {splits[file]} rows") for file in held_out]
            return [file for file in files if file not in held_out]
        if held_out and pattern:
            notes.append(f"data.train: {held} trained on, though named as rows to hold out")
        elif held_out:
            everything = printable(os.path.join(name, "**", "*"))
            raise DataError(
                f"data.train: {held} named as rows to hold out, and no file of {printable(name)} "
                f"is named as training rows; list the files to train on, or write {everything} to "
                "train on all of them"
            )
    elif held_out and has_train:
        best = "validation" if "validation" in splits.values() else "test"
        left_out += [(file, f"not named as {best} rows") for file in files if splits[file] != best]
        return [file for file in files if splits[file] == best]
    return files


def _split(path: str) -> str | None:
    """Return train, validation or test, from the name of a file, else from its nearest folder."""
    for part in reversed(path.split("/")):
        words = {word.removesuffix("set") for word in re.findall(r"[a-z]+", part.lower())}
        found = [split for split, known in SPLIT_WORDS.items() if words & known]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def _listed_reasons(left_out: list[tuple[str, str]]) -> str:
    reasons: dict[str, list[str]] = {}
    for path, why in left_out:
        reasons.setdefault(why, []).append(path)
    return "; ".join(f"{some(paths)} ({why})" for why, paths in reasons.items())


def _guessed(file: str) -> list[str]:
    """Note an encoding that was guessed."""
    if not has_lines(file) or (not remote.is_url(file) and not os.path.isfile(file)):
        return []
    with readers.readable(file):
        encoding = encodings.encoding_of(file)
    if encoding == "utf-8" or encoding in encodings.MARKS.values():
        return []
    name = printable(file)
    return [
        f"{name} is not UTF-8, and is read as {encoding.upper()}, its probable encoding; if "
        "letters of the first example are wrong, save it as UTF-8"
    ]


def fingerprint(source: str) -> str:
    """Return a hash of what a source holds; it changes when any byte does.

    So does that of a file with another name that makes other rows of the same bytes.
    """
    with readers.readable(source):
        if remote.is_url(source) or os.path.isfile(source):
            content = sha256(Path(remote.local(source)))
            read_as = READ_OTHERWISE.get(type_of(source))
            if read_as is None:
                return content
            return json_sha256({"read as": read_as, "content": content})
        if os.path.isdir(source):
            digest = hashlib.sha256()
            for path in sorted(p for p in Path(source).rglob("*") if p.is_file()):
                digest.update(os.fsencode(path.relative_to(source)))
                digest.update(f" {sha256(path)}\n".encode())
            return digest.hexdigest()
    if hub.is_name(source):
        return hub.fingerprint(source)
    raise readers.absent(source)
