"""Write and read the logs of a run directory: JSON lines, one per step. No torch."""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune import files


class Log:
    """Append JSON lines; if the disk is full, keep them and write them with the next line."""

    def __init__(self, path: Path, log: Callable[[str], None]) -> None:
        """`log` reports to the user that the file cannot be written."""
        self.path, self._log = path, log
        self._waiting = ""

    def add(self, values: dict[str, Any]) -> None:
        # JSON has neither NaN nor infinity.
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in values.items()
        }
        line = json.dumps(finite, allow_nan=False, ensure_ascii=False) + "\n"
        text = self._waiting + line
        whole = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
            self._waiting = ""
        except OSError as exc:
            with contextlib.suppress(OSError):
                os.truncate(self.path, whole)  # half a line would spoil the next one
            if not self._waiting:
                why = exc.strerror
                self._log(
                    f"note: {self.path} cannot be written ({why}); its lines are kept until it can"
                )
            self._waiting = text

    def sync(self) -> None:
        if self._waiting:
            raise OSError(f"{self.path} has lines that could not be written")
        if self.path.exists():
            files.flush(self.path)


class Logs:
    """Read what a run has logged, and cut it back to the step where the run resumes."""

    def __init__(self, folder: Path) -> None:
        self.metrics = folder / "metrics.jsonl"
        self.evals = folder / "eval.jsonl"
        self.samples = folder / "samples.jsonl"
        self.saves = folder / "saves.jsonl"
        self.all = (self.metrics, self.evals, self.samples, self.saves)

    def last_step(self) -> int:
        return max((values["step"] for values in records(self.metrics)), default=0)

    def line_of(self, step: int) -> dict[str, Any]:
        """Return the finite numbers that metrics.jsonl has of a step."""
        found = next((line for line in records(self.metrics) if line["step"] == step), {})
        return {name: value for name, value in found.items() if value is not None}

    def eval_losses(self) -> dict[int, float]:
        """Return step -> loss of every recorded evaluation; infinity where the loss was NaN."""
        losses = {}
        for values in records(self.evals):
            if _has_loss(values):
                loss = values["eval_loss"]
                losses[values["step"]] = math.inf if loss is None or math.isnan(loss) else loss
        return losses

    def best_step(self, saved: set[int] | None = None) -> int | None:
        """Return the step of the lowest finite evaluation loss; `saved`: only of these steps."""
        losses = {step: loss for step, loss in self.eval_losses().items() if math.isfinite(loss)}
        could = [step for step in losses if saved is None or step in saved]
        return min(could, key=lambda step: losses[step], default=None)

    def why_stalled(self, patience: int | None) -> str | None:
        """Return why to stop if none of the last `patience` evaluations improved on the others."""
        losses = list(self.eval_losses().values())
        if patience is None or len(losses) <= patience:
            return None
        if math.isinf(min(losses)):
            return "no evaluation loss was finite"
        if min(losses[-patience:]) < min(losses[:-patience]):
            return None
        return "the evaluation loss stopped improving"

    def history(self) -> list[dict[str, Any]]:
        """Return all metrics and evaluations, ordered by step."""
        lines = [*records(self.metrics), *records(self.evals)]
        return sorted(lines, key=lambda line: line["step"])

    def has_samples(self, step: int) -> bool:
        """Return whether the answers to evaluation.sample_prompts are there."""
        return any(each["step"] == step and "answer" in each for each in records(self.samples))

    def has_rollouts(self, step: int) -> bool:
        """Return whether samples of the rollouts after a step are there."""
        return any(each["step"] == step and "reward" in each for each in records(self.samples))

    def rewind(self, step: int) -> list[str]:
        """Remove lines of later steps, which will be trained again, and a partial last line.

        Also removes damaged lines, but then keeps a copy of the log. Returns notes for the user.
        """
        notes = []
        for log in self.all:
            if not log.exists():
                continue
            all_lines = lines(log)
            kept: list[str] = []
            damaged: list[int] = []
            for number, line in enumerate(all_lines, 1):
                values = _values(line)
                if values is None or (log == self.evals and not _has_loss(values)):
                    # A last line without a newline is partial if it begins as our lines do.
                    is_last = number == len(all_lines)
                    is_torn = is_last and line.startswith("{") and (kept or not step)
                    damaged += [number] if line and not is_torn else []
                elif values["step"] <= step:
                    kept.append(line)
            if damaged:
                beside = files.free_name(log)
                shutil.copyfile(log, beside)
                notes.append(
                    f"note: {log}: damaged lines are left out: {len(damaged)}, "
                    f"from line {damaged[0]} on; the file as it was is {beside}"
                )
            files.write_synced(log, "".join(line + "\n" for line in kept))
        return notes

    def missing(self, step: int, log_every: int, eval_every: int | None) -> list[str]:
        """Return notes on lines up to `step` that are missing from the logs after `rewind`.

        The evaluation after `step` itself may be missing: the run catches up on it.
        """
        logged = {values["step"] for values in records(self.metrics)}
        due = range(log_every, step + 1, log_every)
        notes = _missing(self.metrics, due, logged, f"tracking.log_every_steps: {log_every}", step)
        if eval_every is not None:
            due, evaluated = range(eval_every, step, eval_every), set(self.eval_losses())
            key = f"evaluation.every_steps: {eval_every}"
            lost = "; evaluation.patience and evaluation.export_best ignore them"
            notes += [note + lost for note in _missing(self.evals, due, evaluated, key, step)]
        return notes


def _missing(log: Path, due: range, found: set[int], key: str, step: int) -> list[str]:
    absent = [each for each in due if each not in found]
    if not absent:
        return []
    listed = ", ".join(map(str, absent[:5])) + (", ..." if len(absent) > 5 else "")
    return [
        f"note: {log} lacks {len(absent)} of the "
        f"{len(due)} lines that {key} asks for up to step {step}: {listed}"
    ]


def lines(log: Path) -> list[str]:
    """Return the lines of a log, such that writing them again restores each byte.

    Splits only at newlines: a model's answers may hold other characters at which splitlines splits.
    """
    if not log.is_file():
        return []
    return log.read_text("utf-8", errors="surrogateescape").split("\n")


def records(log: Path) -> list[dict[str, Any]]:
    """Return the values of a log's lines, without damaged ones."""
    return [values for line in lines(log) if (values := _values(line))]


def _values(line: str) -> dict[str, Any] | None:
    """Return the values of a line; None if it is damaged or has no step."""
    try:
        line.encode()  # fails for bytes that are not UTF-8
        values = json.loads(line)
        step = values["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return values if isinstance(values, dict) and type(step) is int and step >= 0 else None


def _has_loss(values: dict[str, Any]) -> bool:
    """Return whether a line of eval.jsonl has a usable loss (None stands for NaN)."""
    loss = values.get("eval_loss", "absent")
    return loss is None or type(loss) is float or (type(loss) is int and abs(loss) < 1e300)
