"""Keep what was measured on a GPU in benchmarks/measured.json, which `finetune plan` reads."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from on_gpu import speed
from on_gpu.report import MEASURED
from on_gpu.runner import Row


def record(
    rows: Sequence[Row], facts: Mapping[str, Any], command: str, out: Path,
    log: Callable[[str], None],
) -> None:  # fmt: skip
    """Add the peaks and rates of these rows, and copy the file into `out`, which may travel."""
    from finetune.errors import ConfigError  # the caller has put the project on the path
    from finetune.forecast import measured

    found = measured.Measurement(
        date=time.strftime("%Y-%m-%d"), command=command, versions=versions(facts),
        memory_gb=round(facts["memory_gb"], 1), peaks=peaks(rows), rates=rates(rows),
    )  # fmt: skip
    if not (found.peaks or found.rates):
        return
    try:
        measured.add(facts["gpu"], found)
        shutil.copy(measured.PATH, out / measured.PATH.name)
    except (OSError, ConfigError) as exc:
        log(f"not recorded for `finetune plan`: {exc}")
    else:
        log(f"recorded for `finetune plan`: {measured.PATH}")


def versions(facts: Mapping[str, Any]) -> dict[str, str]:
    own = {name: str(facts[name]) for name in ("driver", "cuda") if facts.get(name)}
    return {**facts["versions"], **own}


def peaks(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Return the peaks of cases that ran, whether or not their forecasts were right."""
    return {
        row.name: {
            "forecast_gb": row.values["forecast, GB"], "measured_gb": row.values["measured, GB"],
        }
        for row in rows
        if "measured, GB" in row.values
    }  # fmt: skip


def rates(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Return the rates of runs on one GPU, in bf16, with all that makes them fast."""
    found = {}
    for row in rows:
        if row.status == MEASURED and row.values.get("TFLOP/s") and row.name in speed.CASES:
            case = speed.Case.of(row.name, *speed.CASES[row.name])
            is_usual = case.settings.get("train.precision", "bf16") == "bf16"
            if case.by is None and speed.WITHOUT not in case.own and is_usual:
                found[row.name] = {
                    "tokens_per_second": row.values["tokens/s"], "tflops": row.values["TFLOP/s"],
                    "adapter": case.settings.get("adapter.kind", "full"),
                    "compiled": bool(case.settings.keys() & {"train.compile", "train.float8"}),
                    "float8": bool(case.settings.get("train.float8")),
                }  # fmt: skip
    return found
