"""The run directory: what a run writes, and the checks that no run overwrites another's."""

import contextlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from finetune import config as configs
from finetune import failures, files
from finetune.config import Config, base
from finetune.engine.checkpoint.folder import MANIFEST, described, difference, read_manifest, steps
from finetune.engine.logs import Logs, lines
from finetune.engine.receipt import differences, identity_differences, refusal
from finetune.errors import (
    EXIT_FAILED,
    DirectoryInUse,
    FinetuneError,
    Outage,
    Preempted,
    RunDirectoryError,
    TakenOver,
)
from finetune.places import BEATS, REPLAY_OF, RUN

LOCK = ".lock"
OUTCOME = "outcome.json"
HELD_OUT = "held_out.jsonl"
LENGTHS = ("train.epochs", "train.max_steps")  # settings of how long a run is
STATES = ("running", "complete", "preempted", "failed")
# Files that a killed `files.write_synced` leaves; `.mode-` is the probe of `files.follow_umask`.
TEMPORARY = re.compile(r"(\.mode-)?\.writing-[a-z_]+\.(json|jsonl|yaml)-[a-z0-9_]{8}")
MOST_REASON = 1_000  # letters, if outcome.json must fit into its present block on a full disk
# After these the directory belongs to another run or process: leave its outcome alone.
REFUSED = (RunDirectoryError, DirectoryInUse, TakenOver)


class RunDirectory:
    """`runs/<name>/` of one run. Only the main process writes."""

    def __init__(self, config: Config, check_only: bool = False) -> None:
        """`check_only`: do not write how this attempt ends."""
        self.path = config.run_dir
        self._config = config
        is_main = os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"
        self._may_note = is_main and not check_only
        self._lock: FileLock | None = None
        self._announced: Path | None = None
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.logs = Logs(self.path)
        self.starts = self.path / "starts.jsonl"
        self.rejects = self.path / "rejects.jsonl"
        self.is_open = False
        """Whether this attempt has begun to write in it."""
        self.has_ended = False
        """Whether `note_end` was called."""

    def check(self, config: Config) -> None:
        """Raise RunDirectoryError if it cannot be written or holds another run. Writes nothing."""
        saved = self.path / "config.yaml"
        if os.path.exists(saved):
            before = configs.read_resolved(saved)
            if different := configs.differences(before, config):
                instead = (
                    "give this run another run.name, "
                    "go back to those values, or remove the directory to start over"
                )
                longer = [line.split(":")[0] in LENGTHS for line in different]
                if all(longer) and self.outcome().get("state") == "complete":
                    instead = self._new_run(config, before["train"].get("epochs"))
                raise refusal(f"{self.path} holds another run", different, instead)
        elif os.path.exists(self.path) and (
            not self.path.is_dir()
            or any(p.name[0] != "." and p.name != OUTCOME for p in self.path.iterdir())
        ):
            if not any(self.path.glob(f"checkpoints/*step-*/{MANIFEST}")):
                raise RunDirectoryError(
                    f"{self.path} exists and is not a run directory (no config.yaml); "
                    "choose another run.name or run.dir"
                )
            raise RunDirectoryError(
                f"{saved} is missing, and {self.checkpoints} holds checkpoints; "
                f"{configs.PUT_BACK}, or choose another run.name"
            )
        self._require_kinds()
        if config.checkpoint.resume == "never" and any(self.checkpoints.glob("step-*")):
            raise RunDirectoryError(
                f"{self.path} has checkpoints, and checkpoint.resume is never; "
                "set it to auto, or choose another run.name"
            )
        if self.outcome().get("state") != "complete":  # reporting a complete run writes nothing
            self.require_writable()

    def _new_run(self, config: Config, epochs: Any) -> str:
        """Say how to train a complete run on; `epochs`: how many it had."""
        key = "model.path" if config.adapter.kind == "full" else "adapter.path"
        options = f"--run.name {config.run.name}-2 --{key} {shlex.quote(str(self.model))}"
        if config.model.init == "random":
            options += " --model.init pretrained"
            given = (name for name in ("config", "tokenizer") if getattr(config.model, name))
            options += "".join(f" --model.{name} null" for name in given)
        if isinstance(epochs, int | float) and config.train.epochs > epochs:
            options += f" --train.epochs {config.train.epochs - epochs:g}"
        return f"this run is complete; to train on, start a new run from its model: {options}"

    def require_writable(self) -> None:
        """Raise Outage if the disk is not writable now, RunDirectoryError if permissions forbid."""
        parents = (self.path, *self.path.absolute().parents)
        nearest = next(parent for parent in parents if os.path.exists(parent))
        if nearest.is_dir() and os.statvfs(nearest).f_flag & os.ST_RDONLY:
            raise Outage(
                f"{self.path} cannot be written now: {nearest} is on a "
                "disk that is mounted read-only; remount it read-write, or choose another run.dir"
            )
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            why = "no permission in" if nearest.is_dir() else "there is a file called"
            raise RunDirectoryError(
                f"{self.path} cannot be written: {why} {nearest}; choose another run.dir"
            )
        if nearest != self.path:
            with self._writing():
                files.probe_folder(nearest)
        for path in self._files():
            if path.exists() and not os.access(path, os.W_OK):
                raise RunDirectoryError(
                    f"{path} cannot be written: no permission; correct its mode or its owner"
                )

    def lock(self, seconds: float) -> None:
        """Make the directory and lock it against other processes, as long as this one lives.

        Waits up to `seconds` for a process that is shutting down. Raises DirectoryInUse,
        RunDirectoryError.
        """
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / LOCK)
            try:
                lock.acquire(timeout=seconds)
            except Timeout:
                raise DirectoryInUse(
                    f"{self.path} is still in use by another process after {seconds:g} s; "
                    "wait for it, or choose another run.name"
                ) from None
            self._lock = lock

    def unlock(self) -> None:
        if self._lock:
            # Keep the file: another process may already hold a lock on it.
            self._lock.release()

    def create(self, config: Config) -> None:
        """Make the directory and write the resolved config. Raises RunDirectoryError."""
        with self._writing():
            # First, as this file makes it a run directory.
            files.write_synced(self.path / "config.yaml", configs.to_yaml(config))
            self.checkpoints.mkdir(exist_ok=True)
            self._sweep()
            self.is_open = True

    def write_rejects(self, sources: Sequence[Path]) -> None:
        """Write the wrong rows that data.on_bad_row skips, from the files of the token cache."""
        if sources:
            with self._writing(), files.replacing(self.rejects) as file:
                for path in sources:
                    with path.open("rb") as part:
                        shutil.copyfileobj(part, file)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Raise Outage if the disk fails inside, RunDirectoryError for any other OSError."""
        try:
            yield
        except OSError as exc:
            failures.reraise(exc, f"{self.path} cannot be written now")
            raise RunDirectoryError(
                f"{self.path} cannot be written: {exc.strerror or exc}; choose another run.dir"
            ) from exc

    def _sweep(self) -> None:
        """Remove temporary files of killed attempts; the lock keeps other writers away."""
        for path in self.path.iterdir():
            if TEMPORARY.fullmatch(path.name) and path.is_file() and not path.is_symlink():
                path.unlink()

    def write_receipt(self, receipt: dict[str, Any], step: int) -> str | None:
        """Write the receipt of an attempt that starts at `step`; return a note, or None.

        The receipt describes the attempt that began at step 0. Resuming never changes it: other
        facts go to starts.jsonl. An attempt that finds no checkpoint begins at step 0 again and
        replaces it; starts.jsonl keeps the old one.
        """
        old, problem = self._read_receipt()
        path, made = self.path / "receipt.json", {"written": _now(), **receipt}
        if problem is None and step:
            if different := differences(old, receipt):
                self._note_start({"written": made["written"], "step": step, "different": different})
                changes = "; ".join(different)
                return f"note: this start differs from the receipt (see {self.starts}): {changes}"
            return None
        if problem is None and differences(old, receipt):
            self._note_start({"written": made["written"], "step": 0, "receipt_before": old})
        if os.path.lexists(path) and problem is not None:
            os.replace(path, files.free_name(path))
        files.write_synced(path, json.dumps(made, indent=2))
        if not step:
            return None
        return f"note: {path} {problem}; a new one describes the run from step {step} on"

    def _note_start(self, facts: dict[str, Any]) -> None:
        kept = [line for line in lines(self.starts) if line]
        files.write_synced(self.starts, "".join(line + "\n" for line in [*kept, json.dumps(facts)]))

    def require_same_receipt(self, receipt: dict[str, Any]) -> None:
        """Raise RunDirectoryError if this receipt differs from that of the run being replayed."""
        if other := os.environ.get(REPLAY_OF):
            old, _ = files.read_note(Path(other) / "receipt.json")
            if different := differences(old, receipt):
                what, instead = (
                    f"this would not repeat the run {other}",
                    "restore these to repeat it",
                )
                raise refusal(what, different, instead)

    def template_date(self) -> str:
        """Return the date in the template at the first start of this run or the one it replays.

        Reads it from the receipt, else from the newest checkpoint; else it is today.
        """
        of = Path(os.environ.get(REPLAY_OF, self.path))
        receipt, _ = files.read_note(of / "receipt.json")
        # `write_receipt` reports a damaged receipt.
        with contextlib.suppress(ValueError, LookupError, TypeError):
            return str(date.fromisoformat(receipt["template_date"]))
        for path in steps(of / "checkpoints"):
            # A checkpoint may be damaged, or of an older version.
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
                day = read_manifest(path)["identity"]["date in the template"]
                return str(date.fromisoformat(day))
        return str(date.today())

    def receipt(self) -> dict[str, Any]:
        return files.read_note(self.path / "receipt.json")[0]

    def write_outcome(
        self, state: str, step: int, reason: str, exported: Sequence[str] = (), **facts: Any
    ) -> None:
        """Write outcome.json; `state`: one of STATES; `exported`: files of a complete model."""
        outcome = {"state": state, "step": step, "reason": reason, **facts, "written": _now()}
        if state == "complete":
            outcome["model"] = described(self.model, list(exported))
        _write_outcome(self.path / OUTCOME, outcome)

    def note_end(
        self, error: BaseException, step: int | None = None, may_create: bool = False
    ) -> None:
        """Write why this attempt ends early. The first call counts, being nearest to the cause.

        Before `create`, writes only where no other run or process works, and never over a complete
        outcome. `may_create`: make a directory for it, except for a mistake of the user, who then
        starts with a clean one. Never raises: a full disk must not hide the reason.
        """
        if self.has_ended:
            return
        self.has_ended = True
        if self._may_note:
            error = failures.translate(error) or error
            state = "preempted" if isinstance(error, Preempted) else "failed"
            is_ours = isinstance(error, FinetuneError | Preempted)
            reason = str(error) if is_ours else f"{type(error).__name__}: {error}"
            with contextlib.suppress(OSError, FinetuneError):
                if self.is_open:
                    self.write_outcome(state, step or 0, reason)
                elif not isinstance(error, REFUSED):
                    self.check(self._config)
                    is_new = not (self.path / "config.yaml").exists()
                    if not is_new or (
                        may_create and getattr(error, "exit_code", EXIT_FAILED) == EXIT_FAILED
                    ):
                        self.unlock()
                        note_end_of(self.path, state, reason)
        self.withdraw()

    def announce(self) -> None:
        """Give the launcher the directory, where it writes the outcome if this process dies."""
        if self._may_note and (folder := os.environ.get(BEATS)):
            with contextlib.suppress(OSError):
                self._announced = Path(folder) / RUN
                self._announced.write_text(str(self.path.absolute()))

    def withdraw(self) -> None:
        """Take the announcement back: this process has written its outcome, or needs none."""
        if self._announced:
            with contextlib.suppress(OSError):
                self._announced.unlink(missing_ok=True)

    def outcome(self) -> dict[str, Any]:
        """Return how the last attempt ended; empty if there was none."""
        return files.read_note(self.path / OUTCOME)[0]

    def completion(
        self, identity: dict[str, Any], usual: dict[str, Any]
    ) -> tuple[bool, str | None]:
        """Return (whether the run is complete with its model unchanged, a note for the user).

        Raises RunDirectoryError if it had other data or another base, or if that is unknown.
        `identity`, `usual`: as in `receipt.identity_differences`. The base's weights are not
        compared: they are not loaded yet.
        """
        outcome, problem = files.read_note(self.path / OUTCOME)
        if problem is None and outcome.get("state") not in STATES:
            problem = "is damaged: it names no state"
        if problem is not None and os.path.lexists(self.path / OUTCOME):
            unknown = "how the run ended is unknown, so it continues"
            return False, f"note: {self.path / OUTCOME} {problem}; {unknown}"
        if outcome.get("state") != "complete":
            return False, None
        if isinstance(outcome.get("model"), dict) and outcome["model"]:
            self._require_no_other_model(outcome["model"])
        if damaged := self._damaged_model(outcome.get("model")):
            again = "exporting the model again"
            return False, f"note: {self.path} was complete, but {damaged}: {again}"
        receipt, problem = self._read_receipt()
        if problem is not None:
            raise RunDirectoryError(
                f"{self.path} is complete, but its receipt.json {problem}, "
                "so it may be another run; put it back, "
                f"or give this run another run.name. Its model is complete: {self.model}"
            )
        known = receipt.get("identity")
        if not isinstance(known, dict):  # an older version had only rows, tokenizer and template
            known = {"training data": receipt["train_data"]["fingerprint"]}
        now = {name: value for name, value in identity.items() if name in known}
        if different := identity_differences(known, now, usual):
            instead = "give this run another run.name, or put those back"
            raise refusal(f"{self.path} is complete, but it is another run", different, instead)
        return True, None

    def require_no_model(self) -> None:
        """Raise RunDirectoryError if training from the beginning would replace a model."""
        if any(self.model.glob("*")):
            raise RunDirectoryError(
                f"{self.path} holds a model, but no checkpoint from "
                "which it could be exported again, and training would start over and replace it; "
                f"restore {self.model}, or move it away to train again"
            )

    def _require_no_other_model(self, known: dict[str, Any]) -> None:
        """Raise RunDirectoryError for an unverified file that changes what programs open there.

        Other files of the user do no harm.
        """
        names = {path.relative_to(self.model).as_posix() for path in self.model.rglob("*")}
        others = [
            name for name in sorted(names) if name not in known and base.decides_what_opens(name)
        ]
        if others:
            raise RunDirectoryError(
                f"{self.model / others[0]} was not there when the model was verified, "
                "and changes what programs open in this folder; "
                "move it away, and start again to verify the rest"
            )

    def _damaged_model(self, known: Any) -> str | None:
        """Return the first file of the export that differs from outcome.json, and how, or None."""
        if not isinstance(known, dict) or not known:
            return "outcome.json does not name the files of its model"
        for name, wanted in known.items():
            path = self.model / name
            try:
                if problem := difference(path, wanted):
                    return f"{path} {problem}"
            except OSError as exc:
                return f"{path} cannot be read ({exc.strerror})"
            except (TypeError, KeyError):
                return f"outcome.json lacks the size or sha256 of {name}"
        return None

    def _require_kinds(self) -> None:
        """Raise RunDirectoryError for files in place of folders, the reverse, or no permission."""
        for path in (self.checkpoints, self.model):
            if os.path.lexists(path) and not path.is_dir():
                raise RunDirectoryError(
                    f"{path} should be a folder, but is not; "
                    "move it away, or choose another run.name"
                )
        for path in self._files():
            if not os.path.lexists(path):
                continue
            if not path.is_file():
                raise RunDirectoryError(
                    f"{path} should be a file, but is not; move it away, or choose another run.name"
                )
            if not os.access(path, os.R_OK):
                raise RunDirectoryError(
                    f"{path} cannot be read: no permission; correct its mode or its owner"
                )

    def _files(self) -> list[Path]:
        """Return the files that this program writes at the top of the directory."""
        return [
            *self.logs.all,
            self.starts,
            self.rejects,
            *(self.path / n for n in ("config.yaml", OUTCOME, "receipt.json", HELD_OUT)),
        ]

    def _read_receipt(self) -> tuple[dict[str, Any], str | None]:
        receipt, problem = files.read_note(self.path / "receipt.json")
        data = receipt.get("train_data")
        has_data = isinstance(data, dict) and isinstance(data.get("fingerprint"), str)
        if problem is None and not has_data:
            problem = "lacks the fingerprint of the training data"
        return receipt, problem


def note_end_of(path: Path, state: str, reason: str) -> None:
    """Write how an attempt ended that does not hold the lock of the run directory `path`.

    Writes nothing if another process runs there, or over a complete outcome. Raises OSError.
    """
    path.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path / LOCK, timeout=0):
            before, _ = files.read_note(path / OUTCOME)
            if before.get("state") != "complete":
                known = before.get("step")
                step = max(known if type(known) is int else 0, Logs(path).last_step())
                outcome = {"state": state, "step": step, "reason": reason, "written": _now()}
                _write_outcome(path / OUTCOME, outcome)
    except Timeout:
        pass


def _write_outcome(path: Path, outcome: dict[str, Any]) -> None:
    """Write outcome.json; on a full disk overwrite the old one in place."""
    text = json.dumps(outcome, indent=2)
    try:
        files.write_synced(path, text)
    except OSError as exc:
        room = os.stat(path).st_size if exc.errno in failures.FULL and path.is_file() else 0
        if outcome["state"] == "complete" or not room:
            raise
        _overwrite(path, {**outcome, "reason": outcome["reason"][:MOST_REASON]}, room)


def _overwrite(path: Path, outcome: dict[str, Any], room: int) -> None:
    """Write JSON into a file of `room` bytes without needing another block of the disk.

    A single write, padded with blanks over the old text, keeps the file valid JSON even if the
    process dies now.
    """
    text = json.dumps(outcome, indent=2).encode()
    with path.open("r+b", buffering=0) as file:
        file.write(text.ljust(room))
        os.fsync(file.fileno())
        file.truncate(len(text))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
