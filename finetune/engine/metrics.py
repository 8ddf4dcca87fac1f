"""Report a run's progress: metrics.jsonl, eval.jsonl, and a progress bar or plain lines."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from tqdm import tqdm

from finetune.console import visible
from finetune.engine import chips
from finetune.engine.logs import Log
from finetune.engine.progress import Progress
from finetune.engine.rundir import RunDirectory
from finetune.engine.step import StepResult
from finetune.engine.trackers import Trackers
from finetune.objectives.base import Remark

LINE_SECONDS = 10  # between two lines about steps
BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
SHOWN_SAMPLES, SHOWN_CHARACTERS = 2, 100  # of the answers to evaluation.sample_prompts


def log(message: str) -> None:
    """Print a message for the user to standard output, above any progress bar."""
    tqdm.write(visible(message), file=sys.stdout)
    sys.stdout.flush()  # a file or a pipe would buffer it


class Metrics:
    """Write metrics on the main process; do nothing on the others."""

    def __init__(
        self, directory: RunDirectory, *, num_steps: int, start: int, every: int, is_main: bool,
        num_processes: int, flops_per_token: float | None, trackers: Trackers | None = None,
        remark: Remark = lambda terms: "",
    ) -> None:  # fmt: skip
        """`trackers` get every line that the files get. `remark`: the objective's own notes.

        flops_per_token: None where not every token is put in.
        """
        self.trackers, self.remark = trackers, remark
        logs = directory.logs
        self.steps, self.evals = Log(logs.metrics, log), Log(logs.evals, log)
        self.samples, self.saves = Log(logs.samples, log), Log(logs.saves, log)
        self.num_steps, self.every, self.is_main = num_steps, every, is_main
        self.flops_per_token, self.num_processes = flops_per_token, num_processes
        self.peak = chips.rate_here() if is_main else None
        # No bar if one of them is a pipe: tee would write its lines into the bar.
        shows_bar = is_main and sys.stderr.isatty() and sys.stdout.isatty()
        self.bar = tqdm(
            total=num_steps, initial=start, bar_format=BAR, disable=not shows_bar,
            dynamic_ncols=True, leave=False,
        )  # fmt: skip
        self.started = self.last_line = self.mark = time.monotonic()
        self.tokens = 0
        self.first = start
        self.unwritten: dict[str, Any] | None = None

    def step(
        self, progress: Progress, result: StepResult, *, lr: float, epoch: float, memory_gb: float,
        facts: Mapping[str, float] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        """Record a step. `tokens` and `supervised_tokens` of a line are totals of the whole run.

        `facts`: of the rollouts that it learns from.
        """
        if not self.is_main:
            return
        self.tokens += result.tokens
        self.bar.update()
        if note := self.remark(result.terms):
            log(f"note: {note}")
        step, last = progress.step, progress.step == self.num_steps
        now = time.monotonic()
        seconds = now - self.mark
        rate = self.tokens / max(seconds, 1e-9)
        line = {
            "step": step, "epoch": round(epoch, 4),
            "loss": result.loss, **result.other_terms, **facts, "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens": progress.tokens, "supervised_tokens": progress.supervised_tokens,
            "tokens_per_second": round(rate, 1), "seconds": round(seconds, 4),
            "memory_gb": round(memory_gb, 3), **self._utilisation(rate),
            **({"skipped": True} if result.skipped else {}),
        }  # fmt: skip
        self.unwritten = line if step % self.every and not last else None
        if self.unwritten:
            return
        self.mark, self.tokens = now, 0
        self._record(self.steps, line)
        reward = f"  {of_rollouts(facts)}" if facts else ""
        self.bar.set_postfix_str(f"loss {result.loss:.4f}{reward}")
        if now - self.last_line > LINE_SECONDS or last or step == self.first + 1:
            left = (now - self.started) / (step - self.first) * (self.num_steps - step)
            log(
                f"step {step}/{self.num_steps}  epoch {epoch:.2f}  loss {result.loss:.4f}{reward} "
                f" lr {lr:.2e}  {rate:,.0f} tokens/s  {memory_gb:.1f} GB  {_duration(left)} left"
            )
            self.last_line = now

    def flush(self) -> None:
        """Write the latest step even if it is not due: the run ends here."""
        if self.unwritten:
            self._record(self.steps, self.unwritten)
            self.unwritten = None

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        if self.is_main:
            self._record(self.evals, {"step": step, **values})
            if "reward" in values:
                log(f"step {step}/{self.num_steps}  eval {of_evaluation(values)}")
                return
            own, entropy = values["eval_loss"], values.get("cross_entropy")
            beside = "" if entropy in (own, None) else f"  cross-entropy {entropy:.4f}"
            shown = "accuracy" if entropy is None else "perplexity"
            beside += f"  {shown} {values[shown]:.2f}" if shown in values else ""
            log(f"step {step}/{self.num_steps}  eval loss {own:.4f}{beside}")

    def saved(self, facts: dict[str, Any]) -> None:
        """Record a checkpoint: its step and size, how long it took and how long training waited."""
        if self.is_main:
            self.saves.add(facts)
            uploaded = ""
            if "upload_seconds" in facts:
                uploaded = f", {facts['upload_seconds']:.3g} s of that for the upload"
            log(
                f"saved step {facts['step']}: {facts['bytes'] / 1e9:.3g} GB, training waited "
                f"{facts['stall_seconds']:.3g} s, safe after {facts['seconds']:.3g} s{uploaded}"
            )

    def sampled(self, step: int, prompts: Sequence[str], answers: Sequence[str]) -> None:
        if self.is_main:
            for prompt, answer in zip(prompts, answers):
                self.samples.add({"step": step, "prompt": prompt, "answer": answer})
            for prompt, answer in list(zip(prompts, answers))[:SHOWN_SAMPLES]:
                log(
                    f"step {step}/{self.num_steps}  sample "
                    f" {_line(prompt)}  ->  {_line(answer) or '(nothing)'}"
                )
            if (more := len(prompts) - SHOWN_SAMPLES) > 0:
                log(f"step {step}/{self.num_steps}  {more} more in {self.samples.path}")

    def rollouts(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Record some completions that the steps after `step` learn from, with rewards if any."""
        if self.is_main:
            for sample in samples:
                self.samples.add({"step": step, **sample})
            for sample in samples[:SHOWN_SAMPLES]:
                reward = f"  reward {sample['reward']:g}" if "reward" in sample else ""
                log(
                    f"step {step}/{self.num_steps}  rollout  {_line(sample['prompt'])}  ->  "
                    f"{_line(sample['completion']) or '(nothing)'}{reward}"
                )

    def sync(self) -> None:
        """Flush the logs to the disk, as a checkpoint needs its history there. Raises OSError."""
        for log in (self.steps, self.evals, self.samples):
            log.sync()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the time spent inside from the training time."""
        began = time.monotonic()
        yield
        self.mark += time.monotonic() - began

    def close_bar(self) -> None:
        """Remove the bar after the last step, before other output."""
        self.bar.close()

    def close(self) -> None:
        self.close_bar()
        if self.trackers:
            self.trackers.close()

    def _record(self, log: Log, values: dict[str, Any]) -> None:
        log.add(values)
        if self.trackers:
            self.trackers.record(values)

    def _utilisation(self, tokens_per_second: float) -> dict[str, float]:
        if self.flops_per_token is None:
            return {}
        mfu = chips.utilisation(
            tokens_per_second, self.flops_per_token, self.peak, self.num_processes
        )
        return {} if mfu is None else {"mfu": mfu}


def of_evaluation(values: Mapping[str, float]) -> str:
    """Return what a line says of the rewards of held-out prompts."""
    parts = ", ".join(
        f"{name.removeprefix('reward_')} {value:.3f}" for name, value in values.items()
        if name.startswith("reward_")
    )  # fmt: skip
    return (
        f"reward {values['reward']:.3f}{f' ({parts})' if parts else ''}  "
        f"length {values['completion_length']:.0f}  cut {values['cut_share']:.0%}"
    )


def of_rollouts(facts: Mapping[str, float]) -> str:
    """Return what a progress line says of rollouts."""
    found = [f"length {facts['completion_length']:.0f}", f"cut {facts['cut_share']:.0%}"]
    if "reward" in facts:
        found.insert(0, f"reward {facts['reward']:.3f}")
    if "no_signal_share" in facts:
        found.append(f"without signal {facts['no_signal_share']:.0%}")
    return "  ".join(found)


def _line(text: str) -> str:
    """Return a text in one line, cut if it is long."""
    text = " ".join(text.split())
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
