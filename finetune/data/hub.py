"""Rows of the Hub, and of folders that datasets.Dataset.save_to_disk wrote."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune import failures
from finetune.data.file_types import COMPRESSIONS, OTHER_TYPES, TYPES
from finetune.data.places import Place, Row, short, wrong
from finetune.errors import DataError

NO_HUB = (
    "without the Hub give a file or a folder, set HF_ENDPOINT to a mirror, or HF_HUB_OFFLINE=1 to "
    "use what was downloaded before"
)
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
NAME = re.compile(rf"({_PART}/{_PART})(?:/({_PART}))?(?::(.+))?")


def is_name(name: str) -> bool:
    """Return whether a name is owner/name[/subset][:split] of the Hub, and no missing file's."""
    if os.path.lexists(name) or not NAME.fullmatch(name):
        return False
    owner, _, rest = name.partition(":")[0].partition("/")
    looks_like_file = Path(rest).suffix.lower() in (*TYPES, *COMPRESSIONS, *OTHER_TYPES)
    return not looks_like_file and not os.path.isdir(owner)


def is_saved(path: str) -> bool:
    """Return whether datasets.Dataset.save_to_disk wrote a folder."""
    files = (os.path.join(path, name) for name in ("state.json", "dataset_info.json"))
    return all(map(os.path.isfile, files))


def read(source: str) -> Iterator[Row]:
    """Yield the rows of a Hub name or of a saved data set."""
    for number, values in enumerate(_load(source), 1):
        yield Row(Place(source, number), values)


def fingerprint(source: str) -> str:
    """Return a hash of what a Hub name holds."""
    return str(_load(source)._fingerprint)


def _load(source: str) -> Any:
    """Load a data set of save_to_disk, or a Hub name."""
    import datasets

    datasets.disable_progress_bars()
    try:
        if is_saved(source):
            return datasets.load_from_disk(source)
        match = NAME.fullmatch(source)
        assert match
        return datasets.load_dataset(match[1], match[2], split=match[3] or "train")
    except Exception as exc:  # of a dozen kinds, many of them plain ValueError and OSError
        if is_saved(source):
            raise wrong(source, f"damaged: {type(exc).__name__}: {short(str(exc))}") from exc
        failures.reraise(exc, f"{source}: datasets cannot load it now, {NO_HUB}")
        remedy = NO_HUB
        if "Config name is missing" in str(exc):
            remedy = "name the subset, as owner/name/subset:split"
        raise DataError(
            f"{source}: datasets cannot load it: {type(exc).__name__}: {exc}; {remedy}"
        ) from exc
