"""Send metrics to Weights & Biases, TensorBoard and Trackio.

metrics.jsonl is the record: if a tracker fails, the run logs one line and continues without it.
Secrets of this machine are removed from what trackers get.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from finetune import extras
from finetune.config import fields
from finetune.errors import ConfigError

SECRET_NAMES = ("TOKEN", "KEY", "SECRET", "PASSWORD", "CREDENTIAL")
SHORTEST_SECRET = 8  # shorter values (true, 1, info) are not secrets and occur everywhere
WANDB_INIT_SECONDS = 30  # instead of 90, since every process waits
# A hanging upload must not outlast the machine; `wandb sync` sends the rest.
WANDB_FINISH_SECONDS = 30


def check(names: Sequence[str], wandb_mode: str | None) -> None:
    """Raise ConfigError if a tracker's package or key is missing."""
    for name in names:
        extras.require(name, f"tracking.trackers: {name}")
    if "wandb" in names and _mode(wandb_mode) == "online" and not _has_wandb_key():
        raise ConfigError(
            "tracking.trackers: wandb has no key; "
            "set WANDB_API_KEY, or call `wandb login` once, or set tracking.wandb_mode to offline"
        )


def redacted(value: Any) -> Any:
    """Replace the values of secret environment variables by their names, at any depth."""
    if isinstance(value, dict):
        return {key: redacted(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [redacted(inner) for inner in value]
    if isinstance(value, str):
        for name, secret in os.environ.items():
            is_secret = any(part in name.upper() for part in SECRET_NAMES)
            if is_secret and len(secret) >= SHORTEST_SECRET:
                value = value.replace(secret, f"${name}")
    return value


class Trackers:
    """The trackers of a run, on the main process."""

    def __init__(
        self, settings: fields.Tracking, *, run_name: str, run_id: str, directory: Path,
        first_step: int, about: dict[str, Any], history: list[dict[str, Any]],
        log: Callable[[str], None],
    ) -> None:  # fmt: skip
        """`about`: config and receipt, to store; `history`: logged lines before `first_step`."""
        self.log = log
        self.running: dict[str, Any] = {}
        about, project, mode = redacted(about), settings.project, _mode(settings.wandb_mode)

        def start(name: str) -> None:
            if name == "wandb":
                self.running[name] = _start_wandb(project, run_name, run_id, directory, mode, about)
            elif name == "tensorboard":
                self.running[name] = _start_tensorboard(directory, first_step, about)
            else:
                self.running[name] = _start_trackio(project, run_name, run_id, about)

        for name in settings.trackers:
            self._guarded(name, start, name)
        # When synced, the newest offline folder replaces earlier ones, so it needs their lines.
        if mode == "offline" and "wandb" in self.running:
            for line in history:
                self._guarded("wandb", self.running["wandb"].log, _numbers(line))

    def record(self, values: dict[str, Any]) -> None:
        """Send the numbers among the values of step values["step"]."""
        numbers = _numbers(values)
        step = numbers.pop("step")
        for name, tracker in list(self.running.items()):
            # wandb's own steps only rise; on our axis a resumed run may repeat steps.
            if name == "wandb":
                self._guarded(name, tracker.log, {"step": step, **numbers})
            else:
                self._guarded(name, tracker.log, numbers, step)

    def close(self) -> None:
        for name, tracker in list(self.running.items()):
            self._guarded(name, tracker.finish)
        self.running.clear()

    def _guarded(self, name: str, action: Callable[..., None], *arguments: Any) -> None:
        try:
            action(*arguments)
        except Exception as exc:  # a tracker's error must not end a run
            self.running.pop(name, None)
            problem = f"{type(exc).__name__}: {exc}"
            self.log(
                redacted(f"note: tracker {name} failed; the run continues without it: {problem}")
            )


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {
        key: value
        for key, value in values.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def _start_wandb(
    project: str, run_name: str, run_id: str, directory: Path, mode: str, about: dict[str, Any]
) -> Any:
    """Open one W&B run for all attempts: checkpoints keep the `run_id`."""
    from accelerate.tracking import WandBTracker

    tracker = WandBTracker(
        project, id=run_id, name=run_name, dir=str(directory), mode=mode, config=about,
        resume="allow" if mode == "online" else None,
        settings={  # command line, remote and output may hold secrets
            "console": "off", "disable_git": True, "x_disable_meta": True, "silent": True,
            "init_timeout": WANDB_INIT_SECONDS, "finish_timeout": WANDB_FINISH_SECONDS,
        },
    )  # fmt: skip
    tracker.start()
    tracker.run.define_metric("*", step_metric="step")
    return tracker


def _start_tensorboard(directory: Path, first_step: int, about: dict[str, Any]) -> Any:
    from accelerate.tracking import TensorBoardTracker

    tracker = TensorBoardTracker("tensorboard", logging_dir=directory, purge_step=first_step)
    tracker.start()
    tracker.log(
        {name: f"```\n{json.dumps(values, indent=2)}\n```" for name, values in about.items()},
        step=first_step,
    )
    return tracker


def _start_trackio(project: str, run_name: str, run_id: str, about: dict[str, Any]) -> Any:
    from accelerate.tracking import TrackioTracker

    tracker = TrackioTracker(
        project, name=f"{run_name}-{run_id}", resume="allow", embed=False, config=about,
        auto_log_cpu=False, auto_log_gpu=False,
    )  # fmt: skip
    tracker.start()
    return tracker


def _mode(wanted: str | None) -> str:
    return wanted or os.environ.get("WANDB_MODE", "online")


def _has_wandb_key() -> bool:
    """Return whether the environment or ~/.netrc, which `wandb login` writes, has a key."""
    from requests.utils import get_netrc_auth

    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    return get_netrc_auth(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")) is not None
