"""Read and write what `make gpu` measured on each kind of GPU: benchmarks/measured.json.

A mapping from the GPU's name to a list of measurements, the newest first. Each has its date,
command and versions, peaks of memory beside their forecasts, and rates of training, by the name of
the case. `make gpu` writes it when it runs on a GPU; without the file nothing counts as measured.
"""

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, PositiveFloat, ValidationError

from finetune import files
from finetune.errors import ConfigError
from finetune.places import SHIPPED

PATH = SHIPPED / "benchmarks/measured.json"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Peak(_Part):
    """Peak memory of PyTorch's allocator in GB (10^9 bytes), and the forecast of it."""

    forecast_gb: PositiveFloat
    measured_gb: PositiveFloat


class Rate(_Part):
    """Speed of one GPU in training."""

    tokens_per_second: PositiveFloat
    tflops: PositiveFloat
    """10^12 FLOPs a second, as `speed.Work` counts them: with recomputed layers."""
    adapter: str
    """adapter.kind"""
    compiled: bool
    float8: bool = False


class Measurement(_Part):
    """What one call of `make gpu` measured."""

    date: str
    """As 2026-11-27."""
    command: str
    versions: dict[str, str]
    memory_gb: PositiveFloat
    """Of the GPU."""
    peaks: dict[str, Peak] = {}
    rates: dict[str, Rate] = {}

    @property
    def source(self) -> str:
        """Where its numbers come from, in a few words."""
        return f"{self.command}, {self.date}, torch {self.versions.get('torch', 'unknown')}"


def read(path: Path | None = None) -> dict[str, list[Measurement]]:
    """Return GPU -> measurements, the newest first; nothing without the file.

    `path`: default PATH. Raises ConfigError if the file is damaged.
    """
    path = path or PATH
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {
            gpu: [Measurement.model_validate(each) for each in measurements]
            for gpu, measurements in found.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as exc:
        problem = exc.errors()[0]["msg"] if isinstance(exc, ValidationError) else str(exc)
        raise ConfigError(
            f"{path}: cannot be read: {problem}; `make gpu` on a GPU writes it: remove it"
        ) from exc


def add(gpu: str, new: Measurement, path: Path | None = None) -> None:
    """Put a measurement in front of those of a GPU; the same cases of older ones go."""
    path = path or PATH
    everything = read(path)
    kept = [new]
    for old in everything.get(gpu, []):
        peaks = {name: peak for name, peak in old.peaks.items() if name not in new.peaks}
        rates = {name: rate for name, rate in old.rates.items() if name not in new.rates}
        if peaks or rates:
            kept.append(old.model_copy(update={"peaks": peaks, "rates": rates}))
    everything[gpu] = kept
    values = {
        name: [each.model_dump(exclude_defaults=True) for each in measurements]
        for name, measurements in sorted(everything.items())
    }
    files.write_whole(path, json.dumps(values, indent=1) + "\n")
