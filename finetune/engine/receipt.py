"""Write the receipt: what ran on what, to repeat the run, or refuse it and list what changed."""

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from finetune.errors import RunDirectoryError
from finetune.places import IS_CHECKOUT, TRAIN

PACKAGES = (
    "torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "numpy",
    "safetensors", "bitsandbytes", "deepspeed", "flash-attn",
)  # fmt: skip
# Another machine, day or folder may change these without changing the run.
FREE = (
    "written", "machine", "code.git_revision", "code.git_changed",
    "train_data.sources", "eval_data.sources", "launch",
)  # fmt: skip


def compose(**facts: Any) -> dict[str, Any]:
    """Return a receipt: `facts` of the run, and versions, code and machine."""
    return {**facts, "versions": versions(), "code": code_fingerprint(), "machine": machine()}


def refusal(what: str, different: list[str], instead: str) -> RunDirectoryError:
    """Return the error that refuses another run: what it is, what differs, what to do instead."""
    return RunDirectoryError("\n  ".join([f"{what}; what differs:", *different]) + f"\n{instead}")


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return the differences between two receipts that change the run."""
    before, now = _flat(old), _flat(new)
    return [
        f"{key}: was {before.get(key)}, now {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(FREE)
    ]


def identity_differences(
    old: dict[str, Any], new: dict[str, Any], usual: dict[str, Any]
) -> list[str]:
    """Return what differs in the data, weights and code that a config names.

    Both map a name to a fingerprint, such as that of the training data, or to fields, such as those
    of the model's config. `usual`: defaults of fields that are missing, as another version of
    transformers may have more fields.
    """
    different = []
    for name, now in new.items():
        before = old.get(name)
        if not (isinstance(now, dict) and isinstance(before, dict)):
            different += [f"{name}: was {before}, now {now}"] if before != now else []
            continue
        for key in sorted(before.keys() | now.keys()):
            one, other = before.get(key, usual.get(key)), now.get(key, usual.get(key))
            different += [f"{name}: {key}: was {one}, now {other}"] if one != other else []
    return different


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        flat |= _flat(value, f"{key}.") if isinstance(value, dict) else {key: value}
    return flat


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    return found | {name: version for name in PACKAGES if (version := _version(name))}


@functools.cache
def _version(package: str) -> str | None:
    """Return the version of an installed package; reading it from disk takes milliseconds."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


@functools.cache
def code_fingerprint() -> dict[str, Any]:
    """Return Git revision, whether the tree was changed, and a hash of the package's sources."""
    package = Path(__file__).resolve().parents[1]
    sources = hashlib.sha256()
    own = sorted(path for path in package.rglob("*.py") if "shipped" not in path.parts)
    for path in [*own, TRAIN]:
        sources.update(path.read_bytes())

    def git(*arguments: str) -> str | None:
        if not IS_CHECKOUT:  # an installed package may lie inside another project's repository
            return None
        try:
            return subprocess.run(
                ["git", "-C", str(package), *arguments],
                capture_output=True,
                text=True,
                check=True,
                timeout=10,
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    changed = git("status", "--porcelain", "--untracked-files=no")
    return {
        "git_revision": git("rev-parse", "HEAD"),
        "git_changed": None if changed is None else bool(changed),
        "sha256": sources.hexdigest(),
    }


def machine() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
    }
