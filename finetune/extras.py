"""Packages that only some settings need: package -> EXTRA of `pip install 'finetune[EXTRA]'`."""

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
    """Raise ConfigError if a package is missing. `setting`: what needs it, perhaps a command."""
    if importlib.util.find_spec(package) is None:
        how = f"pip install 'finetune[{EXTRA[package]}]'"
        raise ConfigError(f"{setting} needs the package {package}; {how}")
