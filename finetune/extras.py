"""Packages that only some settings need, and the extra of `pip install 'finetune[EXTRA]'` with
each.
"""

import importlib.util

from finetune.errors import ConfigError

EXTRA = {
    "bitsandbytes": "gpu",
    "deepspeed": "gpu",
    "matplotlib": "eval",
    "s3fs": "cloud",
    "scipy": "eval",
    "tensorboard": "tracking",
    "trackio": "tracking",
    "wandb": "tracking",
}


def require(package: str, setting: str) -> None:
    """Raise ConfigError if a package is missing that `setting`, or a command, needs."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{setting} needs the package {package}; pip install 'finetune[{EXTRA[package]}]'"
        )
